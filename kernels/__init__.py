"""Triton kernels, each beside its eager reference."""
