# portalm_backends._cpu; and _cpu_emulated, which only tests use and which is not installed: the code
# for 16 lanes and for tiles with AVX2 instructions, to test its logic on a CPU without AVX-512.

# Every kernel is compiled once for each instruction set, in a namespace of its own; dispatch.cpp
# chooses at run time. contract=fast lets a * b + c become one instruction; nothing else is relaxed.
set(KERNEL_OPTIONS -Wall -Wextra -Wno-psabi -fno-math-errno -fno-trapping-math -ffp-contract=fast)

function(portalm_cpu_module module)
  file(GLOB bindings CONFIGURE_DEPENDS csrc_cpu/bindings*.cpp)
  # a domain of its own: two modules of one process may both have a class Program
  nanobind_add_module(${module} NB_STATIC NB_DOMAIN portalm${module} ${bindings}
                      csrc_cpu/dispatch.cpp csrc_cpu/program.cpp csrc_cpu/thread_team.cpp)
  target_link_libraries(${module} PRIVATE Threads::Threads)
  target_compile_definitions(${module} PRIVATE PORTALM_MODULE=${module})
endfunction()

function(portalm_isa module name lanes)
  if(PORTALM_ISAS AND NOT name IN_LIST PORTALM_ISAS AND module STREQUAL _cpu)
    return()
  endif()
  add_library(${module}_${name} OBJECT csrc_cpu/kernels.cpp)
  target_compile_definitions(${module}_${name} PRIVATE PORTALM_ISA=${name} PORTALM_LANES=${lanes})
  target_compile_options(${module}_${name} PRIVATE ${KERNEL_OPTIONS} ${ARGN}) # the last -O counts
  target_sources(${module} PRIVATE $<TARGET_OBJECTS:${module}_${name}>)
  target_compile_definitions(${module} PRIVATE PORTALM_HAS_${name}=1)
endfunction()

set(IS_X86 FALSE)
if(CMAKE_SYSTEM_PROCESSOR MATCHES "x86_64|AMD64")
  set(IS_X86 TRUE)
endif()

if(cpu IN_LIST PORTALM_MODULES)
  portalm_cpu_module(_cpu)
  portalm_isa(_cpu baseline 4 -O2)
  if(IS_X86)
    portalm_isa(_cpu avx2 8 -mavx2 -mfma -mf16c)
    portalm_isa(_cpu avxvnni 8 -mavx2 -mfma -mf16c -mavxvnni) # Alder Lake, Zen 5 and later
    set(AVX512 -O2 -mavx2 -mfma -mf16c -mavx512f -mavx512bw -mavx512vl -mavx512dq
        -mprefer-vector-width=512
        -Wno-maybe-uninitialized -Wno-uninitialized) # false ones in GCC 12's headers
    portalm_isa(_cpu avx512 16 ${AVX512})
    portalm_isa(_cpu avx512bf16 16 ${AVX512} -mavx512bf16 -mavx512vnni) # Zen 4, Sapphire Rapids
  endif()
  install(TARGETS _cpu LIBRARY DESTINATION portalm_backends)
endif()

if(cpu_emulated IN_LIST PORTALM_MODULES AND IS_X86)
  portalm_cpu_module(_cpu_emulated)
  portalm_isa(_cpu_emulated emulated512 16 -O1 -mavx2 -mfma -mf16c -DPORTALM_EMULATED)
endif()

if(PORTALM_SANITIZE)
  get_property(targets DIRECTORY PROPERTY BUILDSYSTEM_TARGETS)
  foreach(target ${targets})
    target_compile_options(${target} PRIVATE -fsanitize=${PORTALM_SANITIZE} -g -O1
                           -fno-omit-frame-pointer)
    get_target_property(type ${target} TYPE)
    if(type STREQUAL MODULE_LIBRARY)
      target_link_options(${target} PRIVATE -fsanitize=${PORTALM_SANITIZE})
    endif()
  endforeach()
endif()
