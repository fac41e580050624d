"""Triton kernels with their launchers, one file per operation."""
