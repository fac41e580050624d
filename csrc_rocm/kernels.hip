// The kernels for AMD GPUs: csrc_cuda's device code, compiled to one code object per architecture.
#include "device_code.cuh"
