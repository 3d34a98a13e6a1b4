"""How kernels are launched: checks, tiles, tuning, and the replay of launches from C++."""
