# portalm_backends._cuda, if nvcc is found. It holds code for those of the architectures below that
# this nvcc supports, and PTX for newer ones. The CUDA runtime is linked in and the driver is loaded
# when the module is used, so that it can be built and imported without a GPU.

find_package(CUDAToolkit QUIET)
if(NOT CUDAToolkit_NVCC_EXECUTABLE)
  message(STATUS "_cuda is not built: no nvcc was found")
  return()
endif()

execute_process(COMMAND "${CUDAToolkit_NVCC_EXECUTABLE}" --list-gpu-arch
                OUTPUT_VARIABLE known OUTPUT_STRIP_TRAILING_WHITESPACE)
string(REPLACE "\n" ";" known "${known}")
set(codes)
foreach(arch 80 90 100) # sm_80 code also runs on 86 and 89, sm_100 code on 103
  if("compute_${arch}" IN_LIST known)
    list(APPEND codes -gencode arch=compute_${arch},code=sm_${arch})
  endif()
endforeach()
list(APPEND codes -gencode arch=compute_90,code=compute_90)

set(source "${CMAKE_CURRENT_SOURCE_DIR}/csrc_cuda/kernels.cu")
set(object "${CMAKE_CURRENT_BINARY_DIR}/kernels.cu.o")
file(GLOB device_code CONFIGURE_DEPENDS csrc_cuda/*.h csrc_cuda/*.cuh)
add_custom_command(
  OUTPUT "${object}"
  COMMAND "${CUDAToolkit_NVCC_EXECUTABLE}" -std=c++17 -O3 -Xcompiler -fPIC,-fvisibility=hidden
          ${codes} -c "${source}" -o "${object}"
  DEPENDS "${source}" ${device_code}
  VERBATIM)

nanobind_add_module(_cuda NB_STATIC csrc_cuda/bindings.cpp csrc_cuda/launchers.cpp "${object}")
target_link_libraries(_cuda PRIVATE CUDA::cudart_static)
install(TARGETS _cuda LIBRARY DESTINATION portalm_backends)
