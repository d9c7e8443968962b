"""Kernels and what launches them. Importing a module of this package needs Triton."""
