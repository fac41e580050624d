// The kernels for NVIDIA GPUs, and their launch through the CUDA runtime.
#include <stdexcept>
#include <string>

#include "device_code.cuh"
#include "launchers.h"

namespace portalm {

void launch(Kernel kernel, const Grid& grid, const void* arguments, int64_t, int64_t stream) {
#define PORTALM_KERNEL(name, Args, threads, ...) reinterpret_cast<const void*>(portalm_##name),
  static const void* const kernels[] = {
#include "instances.h"
  };
  void* pointers[] = {const_cast<void*>(arguments)};
  const dim3 blocks(grid.x, grid.y, grid.z);
  const cudaError_t status =
      cudaLaunchKernel(kernels[static_cast<int>(kernel)], blocks, dim3(grid.threads), pointers, 0,
                       reinterpret_cast<cudaStream_t>(stream));
  if (status != cudaSuccess)
    throw std::runtime_error(std::string(kKernelNames[static_cast<int>(kernel)]) + ": " +
                             cudaGetErrorString(status));
}

}  // namespace portalm
