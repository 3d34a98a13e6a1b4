"""What several ops are made of: kernels, and functions that launch them."""
