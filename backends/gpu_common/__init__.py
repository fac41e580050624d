"""Code that the CUDA and ROCm backends share: the backend, the kernels, captured steps."""
