#include "device.h"

#include <dlfcn.h>

#include <stdexcept>

#include "launchers.h"

// The functions of the HIP runtime that are used, as its documentation declares them.
namespace {

using hipError_t = int;
using hipModule_t = void*;
using hipFunction_t = void*;
using hipStream_t = void*;

struct Runtime {
  hipError_t (*module_load)(hipModule_t*, const char* path);
  hipError_t (*module_get_function)(hipFunction_t*, hipModule_t, const char* name);
  hipError_t (*module_launch)(hipFunction_t, unsigned, unsigned, unsigned, unsigned, unsigned,
                              unsigned, unsigned, hipStream_t, void** parameters, void** extra);
  const char* (*error_string)(hipError_t);
};

// The runtime that torch has loaded, or else the system's.
void* open_runtime() {
  for (const int flags : {RTLD_NOW | RTLD_NOLOAD, RTLD_NOW})
    for (const char* name : {"libamdhip64.so", "libamdhip64.so.7", "libamdhip64.so.6"})
      if (void* library = dlopen(name, flags)) return library;
  throw std::runtime_error("no HIP runtime: libamdhip64.so (ROCm 6.4 or 7) was not found");
}

template <typename F>
void find(void* library, const char* name, F*& function) {
  function = reinterpret_cast<F*>(dlsym(library, name));
  if (!function) throw std::runtime_error(std::string("the HIP runtime has no ") + name);
}

const Runtime& runtime() {
  static const Runtime loaded = [] {
    void* const library = open_runtime();
    Runtime r;
    find(library, "hipModuleLoad", r.module_load);
    find(library, "hipModuleGetFunction", r.module_get_function);
    find(library, "hipModuleLaunchKernel", r.module_launch);
    find(library, "hipGetErrorString", r.error_string);
    return r;
  }();
  return loaded;
}

void check(hipError_t status, const std::string& what) {
  if (status != 0) throw std::runtime_error(what + ": " + runtime().error_string(status));
}

hipFunction_t functions[portalm::kNumKernels];

}  // namespace

namespace portalm {

void load_code_object(const std::string& path) {
  hipModule_t module;
  check(runtime().module_load(&module, path.c_str()), path);
  for (int i = 0; i < kNumKernels; ++i)
    check(runtime().module_get_function(&functions[i], module, kKernelNames[i]), kKernelNames[i]);
}

void launch(Kernel kernel, const Grid& grid, const void* arguments, int64_t bytes, int64_t stream) {
  const int index = static_cast<int>(kernel);
  if (!functions[index]) throw std::runtime_error("no code object is loaded");
  size_t size = bytes;
  // HIP_LAUNCH_PARAM_BUFFER_POINTER, _SIZE and _END of hip/hip_runtime_api.h
  void* extra[] = {reinterpret_cast<void*>(1), const_cast<void*>(arguments),
                   reinterpret_cast<void*>(2), &size, reinterpret_cast<void*>(3)};
  check(runtime().module_launch(functions[index], grid.x, grid.y, grid.z, grid.threads, 1, 1, 0,
                                reinterpret_cast<hipStream_t>(stream), nullptr, extra),
        kKernelNames[index]);
}

}  // namespace portalm
