"""The Triton backend: interpreted on the CPU, and compiled for GPUs that need not be present."""
