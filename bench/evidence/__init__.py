"""The experiments about the method, see docs/evidence.md. Each run is one JSON; what exists is not run again."""
