"""Kernels for NVIDIA GPUs, in Triton: one lesson a file, the signatures of ``kernels/reference.py``."""
