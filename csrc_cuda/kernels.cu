// The kernels for NVIDIA GPUs, and their launch through the CUDA runtime.
#include <stdexcept>
#include <string>

#include "device_code.cuh"
#include "launchers.h"

namespace portalm {
namespace {

// True if the current device can start a kernel before its predecessor on the stream is complete.
// The kernels wait for it themselves (wait_for_inputs).
bool can_overlap() {
  int device = 0, major = 0;
  if (cudaGetDevice(&device) != cudaSuccess) return false;
  cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device);
  return major >= 9;
}

}  // namespace

void launch(Kernel kernel, const Grid& grid, const void* arguments, int64_t, int64_t stream) {
#define PORTALM_KERNEL(name, Args, threads, ...) reinterpret_cast<const void*>(portalm_##name),
  static const void* const kernels[] = {
#include "instances.h"
  };
  void* pointers[] = {const_cast<void*>(arguments)};
  cudaLaunchAttribute overlap = {};
  overlap.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  overlap.val.programmaticStreamSerializationAllowed = 1;
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(grid.x, grid.y, grid.z);
  config.blockDim = dim3(grid.threads);
  config.stream = reinterpret_cast<cudaStream_t>(stream);
  config.attrs = &overlap;
  config.numAttrs = can_overlap() ? 1 : 0;
  const cudaError_t status =
      cudaLaunchKernelExC(&config, kernels[static_cast<int>(kernel)], pointers);
  if (status != cudaSuccess)
    throw std::runtime_error(std::string(kKernelNames[static_cast<int>(kernel)]) + ": " +
                             cudaGetErrorString(status));
}

}  // namespace portalm
