"""The training steps' own kernels: for CPUs in C++, for NVIDIA GPUs in Triton."""
