#include "program.h"

#include <chrono>
#include <cstdlib>
#include <new>
#include <stdexcept>

#if defined(__linux__)
#include <sys/mman.h>
#endif

#include "signatures.h"
#include "thread_team.h"

namespace portalm {
namespace {

constexpr int64_t kAlignment = 64;
constexpr int64_t kHugePage = 2 << 20;

struct Kernel {
  const char* name;
  int num_arguments;
  void (*run)(const int64_t* words);  // null: the kernel cannot be recorded
};

template <typename Args>
constexpr Kernel kernel_of() {
  return {Signature<Args>::name, kNumArguments<Args>,
          kIsRecorded<Args> ? run_words<Args> : nullptr};
}

constexpr Kernel kKernels[] = {
#define PORTALM_KERNEL(name, Args) kernel_of<Args>(),
#include "arguments.h"
};
constexpr int kNumKernels = sizeof kKernels / sizeof *kKernels;

int kernel_named(const std::string& name) {
  for (int i = 0; i < kNumKernels; ++i)
    if (name == kKernels[i].name && kKernels[i].run != nullptr) return i;
  throw std::invalid_argument("a program cannot call a kernel " + name);
}

double now() {
  return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count();
}

}  // namespace

Program::~Program() { free(arena_); }

int Program::add_slot(int64_t row_bytes, int count) {
  slots_.push_back({row_bytes, count, nullptr});
  return static_cast<int>(slots_.size()) - 1;
}

void Program::add_call(const std::string& kernel, std::vector<int64_t> arguments,
                       const std::vector<Patch>& patches) {
  const int index = kernel_named(kernel);
  const int wanted = kKernels[index].num_arguments, given = static_cast<int>(arguments.size());
  if (given != wanted)
    throw std::invalid_argument(kernel + " takes " + std::to_string(wanted) + " arguments; got " +
                                std::to_string(given));
  for (const Patch& patch : patches)
    if (patch.argument < 0 || patch.argument >= wanted)
      throw std::invalid_argument(kernel + " has no argument " + std::to_string(patch.argument));
  calls_.push_back({index, std::move(arguments), patches});
}

void Program::place_slots(const std::vector<int64_t>& counts) {
  int64_t total = 0;
  for (const Slot& slot : slots_)
    total += (slot.row_bytes * counts.at(slot.count) + kAlignment - 1) / kAlignment * kAlignment;
  if (total > arena_bytes_) {
    free(arena_);
    arena_bytes_ = 0;
    const int64_t bytes = (total + kHugePage - 1) / kHugePage * kHugePage;
    arena_ = static_cast<char*>(std::aligned_alloc(kHugePage, bytes));
    if (arena_ == nullptr) throw std::bad_alloc();
#if defined(__linux__)
    madvise(arena_, bytes, MADV_HUGEPAGE);
#endif
    arena_bytes_ = bytes;
  }
  char* next = arena_;
  for (Slot& slot : slots_) {
    slot.address = next;
    next += (slot.row_bytes * counts[slot.count] + kAlignment - 1) / kAlignment * kAlignment;
  }
}

void Program::run(const std::vector<int64_t>& inputs, const std::vector<int64_t>& counts) {
  place_slots(counts);
  ThreadTeam::instance().profile = profile;
  for (Call& call : calls_) {
    for (const Patch& patch : call.patches) {
      int64_t value = 0;
      switch (patch.kind) {
        case PatchKind::input: value = inputs.at(patch.index) + patch.offset; break;
        case PatchKind::slot:
          value = reinterpret_cast<int64_t>(slots_[patch.index].address) + patch.offset;
          break;
        case PatchKind::count: value = counts.at(patch.index); break;
      }
      call.arguments[patch.argument] = value;
    }
    if (!profile) {
      kKernels[call.kernel].run(call.arguments.data());
      continue;
    }
    const double started = now();
    kKernels[call.kernel].run(call.arguments.data());
    seconds_.resize(kNumKernels);
    seconds_[call.kernel] += now() - started;
  }
}

std::vector<std::pair<std::string, double>> Program::take_seconds() {
  std::vector<std::pair<std::string, double>> taken;
  for (size_t i = 0; i < seconds_.size(); ++i)
    if (kKernels[i].run != nullptr) taken.emplace_back(kKernels[i].name, seconds_[i]);
  seconds_.clear();
  taken.emplace_back("waiting", ThreadTeam::instance().take_wait_seconds());
  return taken;
}

}  // namespace portalm
