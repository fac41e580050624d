// The kernels for AMD's devices: csrc_cuda's device code, compiled to one code object for each.
#include "device_code.cuh"
