"""Kernels that several ops share, and the functions that launch them."""
