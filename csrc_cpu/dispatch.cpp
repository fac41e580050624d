// Chooses the kernels of the best instruction set that this CPU has.
#include <cstdlib>
#include <stdexcept>
#include <string>

#include "dispatch.h"

#if defined(__x86_64__)
#include <cpuid.h>
#endif
#if defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace portalm {

namespace baseline { extern const Kernels table; }
#if PORTALM_HAS_avx2
namespace avx2 { extern const Kernels table; }
#endif
#if PORTALM_HAS_avxvnni
namespace avxvnni { extern const Kernels table; }
#endif
#if PORTALM_HAS_avx512
namespace avx512 { extern const Kernels table; }
#endif
#if PORTALM_HAS_avx512bf16
namespace avx512bf16 { extern const Kernels table, table_with_tiles; }
#endif
#if PORTALM_HAS_emulated512
namespace emulated512 { extern const Kernels table, table_with_tiles; }
#endif

#if defined(__x86_64__)
namespace {

enum class Register { eax, edx };

// A feature that this compiler's __builtin_cpu_supports does not name.
bool has_bit(unsigned leaf, unsigned part, Register which, int bit) {
  unsigned eax = 0, ebx = 0, ecx = 0, edx = 0;
  if (!__get_cpuid_count(leaf, part, &eax, &ebx, &ecx, &edx)) return false;
  return (which == Register::eax ? eax : edx) >> bit & 1;
}

// Tiles are 8 KiB of registers, which the kernel saves only for a process that asks (Linux 5.16).
bool may_use_tiles() {
#if defined(__linux__)
  constexpr long kRequestPermission = 0x1023, kTileData = 18;
  return syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
#else
  return false;
#endif
}

}  // namespace
#endif

std::vector<const Kernels*> runnable_kernels() {
  std::vector<const Kernels*> found{&baseline::table};
#if defined(__x86_64__)
  __builtin_cpu_init();
  const bool has_avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
                        __builtin_cpu_supports("f16c");
#if PORTALM_HAS_emulated512
  if (has_avx2) {
    found.push_back(&emulated512::table_with_tiles);
    found.push_back(&emulated512::table);
  }
#endif
#if PORTALM_HAS_avx2
  if (has_avx2) found.push_back(&avx2::table);
#endif
#if PORTALM_HAS_avxvnni
  if (has_avx2 && has_bit(7, 1, Register::eax, 4)) found.push_back(&avxvnni::table);
#endif
#if PORTALM_HAS_avx512
  const bool has_avx512 = has_avx2 && __builtin_cpu_supports("avx512f") &&
                          __builtin_cpu_supports("avx512bw") &&
                          __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
  if (has_avx512) found.push_back(&avx512::table);
#endif
#if PORTALM_HAS_avx512bf16
  if (has_avx512 && __builtin_cpu_supports("avx512bf16") && __builtin_cpu_supports("avx512vnni")) {
    found.push_back(&avx512bf16::table);
    if (has_bit(7, 0, Register::edx, 22) && may_use_tiles())
      found.push_back(&avx512bf16::table_with_tiles);
  }
#endif
#endif
  return found;
}

namespace {

const Kernels* named(const std::string& wanted) {
  std::string names;
  for (const Kernels* k : runnable_kernels()) {
    if (wanted == k->name) return k;
    names += names.empty() ? k->name : std::string(", ") + k->name;
  }
  throw std::invalid_argument("no instruction set " + wanted + " on this CPU, which runs: " + names);
}

const Kernels*& chosen() {
  static const Kernels* kernels = [] {
    const char* wanted = std::getenv("PORTALM_CPU_ISA");
    return wanted && *wanted ? named(wanted) : runnable_kernels().back();
  }();
  return kernels;
}

}  // namespace

void set_isa(const std::string& name) { chosen() = named(name); }

const Kernels& kernels() { return *chosen(); }

}  // namespace portalm
