"""What CUDA and ROCm share: one backend, one set of kernels, one way to capture steps."""
