# portalm_backends._cpu
file(GLOB CPU_BINDINGS CONFIGURE_DEPENDS csrc_cpu/bindings*.cpp)
nanobind_add_module(_cpu NB_STATIC ${CPU_BINDINGS} csrc_cpu/dispatch.cpp csrc_cpu/program.cpp
                   csrc_cpu/thread_team.cpp)
target_link_libraries(_cpu PRIVATE Threads::Threads)

# Every kernel is compiled once for each instruction set, in a namespace of its own; dispatch.cpp
# chooses at run time. contract=fast lets a * b + c become one instruction; nothing else is relaxed.
set(KERNEL_OPTIONS -Wall -Wextra -Wno-psabi -fno-math-errno -fno-trapping-math -ffp-contract=fast)
function(portalm_isa name lanes)
  if(PORTALM_ISAS AND NOT name IN_LIST PORTALM_ISAS)
    return()
  endif()
  add_library(_cpu_${name} OBJECT csrc_cpu/kernels.cpp)
  target_compile_definitions(_cpu_${name} PRIVATE PORTALM_ISA=${name} PORTALM_LANES=${lanes})
  target_compile_options(_cpu_${name} PRIVATE ${KERNEL_OPTIONS} ${ARGN}) # the last -O counts
  target_sources(_cpu PRIVATE $<TARGET_OBJECTS:_cpu_${name}>)
  target_compile_definitions(_cpu PRIVATE PORTALM_HAS_${name}=1)
endfunction()

portalm_isa(baseline 4 -O2)
if(CMAKE_SYSTEM_PROCESSOR MATCHES "x86_64|AMD64")
  portalm_isa(avx2 8 -mavx2 -mfma -mf16c)
  portalm_isa(avxvnni 8 -mavx2 -mfma -mf16c -mavxvnni) # Alder Lake, Zen 5 and later
  portalm_isa(avx512 16 -O2 -mavx2 -mfma -mf16c -mavx512f -mavx512bw -mavx512vl -mavx512dq
              -mprefer-vector-width=512
              -Wno-maybe-uninitialized -Wno-uninitialized) # false ones in GCC 12's headers
  # Zen 4, Sapphire Rapids and later
  portalm_isa(avx512bf16 16 -O2 -mavx2 -mfma -mf16c -mavx512f -mavx512bw -mavx512vl -mavx512dq
              -mavx512bf16 -mavx512vnni -mprefer-vector-width=512
              -Wno-maybe-uninitialized -Wno-uninitialized)
  # the 16-lane code on a CPU without AVX-512: its logic can be tested there, its speed cannot
  portalm_isa(emulated512 16 -O1 -mavx2 -mfma -mf16c -DPORTALM_EMULATED)
endif()

if(PORTALM_SANITIZE)
  get_property(targets DIRECTORY PROPERTY BUILDSYSTEM_TARGETS)
  foreach(target ${targets})
    target_compile_options(${target} PRIVATE -fsanitize=${PORTALM_SANITIZE} -g -O1
                           -fno-omit-frame-pointer)
  endforeach()
  target_link_options(_cpu PRIVATE -fsanitize=${PORTALM_SANITIZE})
endif()

install(TARGETS _cpu LIBRARY DESTINATION portalm_backends)
