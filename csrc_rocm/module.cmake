# portalm_backends._rocm and a code object per architecture, if a clang that compiles for AMD GPUs is
# found (ROCm's own, or clang and lld 19 or newer). The HIP runtime is loaded when the module is used,
# so that it can be built and imported without ROCm.

find_program(PORTALM_AMD_CLANG NAMES clang++ clang-21 clang-20 clang-19
             HINTS /opt/rocm/llvm/bin NO_CACHE)
set(options -std=c++17 -O3 -x hip --cuda-device-only --no-gpu-bundle-output -nogpulib -nogpuinc
            "-I${CMAKE_CURRENT_SOURCE_DIR}/csrc_cuda")
set(probe "${CMAKE_CURRENT_BINARY_DIR}/probe.hip")
file(WRITE "${probe}" "__attribute__((global)) void nothing() {}\n")
set(archs)
if(PORTALM_AMD_CLANG)
  foreach(arch gfx90a gfx942 gfx950 gfx1100 gfx1201)
    execute_process(COMMAND "${PORTALM_AMD_CLANG}" ${options} --offload-arch=${arch} "${probe}"
                            -o "${probe}.o"
                    RESULT_VARIABLE failed OUTPUT_QUIET ERROR_QUIET)
    if(NOT failed)
      list(APPEND archs ${arch})
    endif()
  endforeach()
endif()
if(NOT archs)
  message(STATUS "_rocm is not built: no clang that compiles for AMD GPUs was found")
  return()
endif()

set(source "${CMAKE_CURRENT_SOURCE_DIR}/csrc_rocm/kernels.hip")
file(GLOB device_code CONFIGURE_DEPENDS csrc_cuda/*.h csrc_cuda/*.cuh)
set(code_objects)
foreach(arch ${archs})
  set(code_object "${CMAKE_CURRENT_BINARY_DIR}/${arch}.hsaco")
  add_custom_command(
    OUTPUT "${code_object}"
    COMMAND "${PORTALM_AMD_CLANG}" ${options} --offload-arch=${arch} "${source}"
            -o "${code_object}"
    DEPENDS "${source}" ${device_code}
    VERBATIM)
  list(APPEND code_objects "${code_object}")
endforeach()
add_custom_target(rocm_kernels ALL DEPENDS ${code_objects})

nanobind_add_module(_rocm NB_STATIC csrc_cuda/bindings.cpp csrc_cuda/launchers.cpp
                    csrc_rocm/device.cpp)
target_compile_definitions(_rocm PRIVATE PORTALM_ROCM)
target_include_directories(_rocm PRIVATE csrc_cuda)
target_link_libraries(_rocm PRIVATE ${CMAKE_DL_LIBS})
install(TARGETS _rocm LIBRARY DESTINATION portalm_backends)
install(FILES ${code_objects} DESTINATION portalm_backends/_rocm_kernels)
