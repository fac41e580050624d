// Chooses the kernels of the best instruction set that this CPU has.
#include <atomic>
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

// CMake defines PORTALM_HAS_name for each instruction set that is built in.
#define PORTALM_TABLE(isa) \
  namespace isa { extern const Kernels table; }
PORTALM_TABLE(baseline)
PORTALM_TABLE(avx2)
PORTALM_TABLE(avxvnni)
PORTALM_TABLE(avx512)
namespace avx512bf16 { extern const Kernels table, table_with_tiles; }
namespace emulated512 { extern const Kernels table, table_with_tiles; }

#if defined(__x86_64__)
namespace {

enum class Register { eax, edx };

// Whether a CPUID bit is set, for features that __builtin_cpu_supports does not name.
[[maybe_unused]] bool has_bit(unsigned leaf, unsigned part, Register which, int bit) {
  unsigned eax = 0, ebx = 0, ecx = 0, edx = 0;
  if (!__get_cpuid_count(leaf, part, &eax, &ebx, &ecx, &edx)) return false;
  return (which == Register::eax ? eax : edx) >> bit & 1;
}

// Tiles are 8 KiB of registers that Linux (5.16 and newer) saves only for processes that request
// it.
[[maybe_unused]] bool may_use_tiles() {
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
  std::vector<const Kernels*> found;
#if PORTALM_HAS_baseline
  found.push_back(&baseline::table);
#endif
#if defined(__x86_64__)
  __builtin_cpu_init();
  const bool has_avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
                        __builtin_cpu_supports("f16c");
  [[maybe_unused]] const bool has_avxvnni = has_avx2 && has_bit(7, 1, Register::eax, 4);
  const bool has_avx512 = has_avx2 && __builtin_cpu_supports("avx512f") &&
                          __builtin_cpu_supports("avx512bw") &&
                          __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
  [[maybe_unused]] const bool has_bf16 =
      has_avx512 && __builtin_cpu_supports("avx512bf16") && __builtin_cpu_supports("avx512vnni");
  [[maybe_unused]] const auto add = [&](bool is_runnable, const Kernels& table) {
    if (is_runnable) found.push_back(&table);
  };
#if PORTALM_HAS_emulated512
  add(has_avx2, emulated512::table_with_tiles);
  add(has_avx2, emulated512::table);
#endif
#if PORTALM_HAS_avx2
  add(has_avx2, avx2::table);
#endif
#if PORTALM_HAS_avxvnni
  add(has_avxvnni, avxvnni::table);
#endif
#if PORTALM_HAS_avx512
  add(has_avx512, avx512::table);
#endif
#if PORTALM_HAS_avx512bf16
  add(has_bf16, avx512bf16::table);
  add(has_bf16 && has_bit(7, 0, Register::edx, 22) && may_use_tiles(),
      avx512bf16::table_with_tiles);
#endif
#endif
  return found;
}

namespace {

const Kernels* kernels_named(const std::string& wanted) {
  std::string names;
  for (const Kernels* k : runnable_kernels()) {
    if (wanted == k->name) return k;
    names += names.empty() ? k->name : std::string(", ") + k->name;
  }
  throw std::invalid_argument("this CPU cannot run instruction set '" + wanted +
                              "'; it can run: " + names);
}

const Kernels* default_kernels() {
  const char* wanted = std::getenv("PORTALM_CPU_ISA");
  if (wanted && *wanted) return kernels_named(wanted);
  const std::vector<const Kernels*> found = runnable_kernels();
  if (found.empty()) throw std::invalid_argument("this build has no kernels that this CPU can run");
  return found.back();
}

std::atomic<const Kernels*> chosen{nullptr};

}  // namespace

void set_isa(const std::string& name) { chosen = kernels_named(name); }

const Kernels& kernels() {
  const Kernels* k = chosen.load(std::memory_order_acquire);
  if (k == nullptr) chosen = k = default_kernels();
  return *k;
}

}  // namespace portalm
