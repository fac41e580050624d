"""What CUDA and ROCm share: Triton kernels, capture of steps, memory."""
