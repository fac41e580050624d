#include "program.h"

#include <chrono>
#include <cstdlib>
#include <cstring>
#include <new>
#include <stdexcept>

#if defined(__linux__)
#include <sys/mman.h>
#endif

#include "dispatch.h"
#include "thread_team.h"

namespace portalm {
namespace {

constexpr int64_t kAlignment = 64;
constexpr int64_t kHugePage = 2 << 20;

// Takes a call's arguments one after the other.
class Reader {
 public:
  explicit Reader(const int64_t* next) : next_(next) {}
  int64_t number() { return *next_++; }
  template <typename T = void>
  T* at() {
    return reinterpret_cast<T*>(*next_++);
  }
  DType dtype() { return static_cast<DType>(*next_++); }
  Format format() { return static_cast<Format>(*next_++); }
  float real() {
    const auto bits = static_cast<uint32_t>(*next_++);
    float x;
    memcpy(&x, &bits, sizeof x);
    return x;
  }
  KVShape kv_shape() {
    return {dtype(), number(), number(), number(), number(), number() != 0};
  }

 private:
  const int64_t* next_;
};

// In the order of the bindings; members of a braced list are evaluated from left to right.
struct Kernel {
  const char* name;
  void (*run)(Reader);
};
constexpr Kernel kKernels[] = {
    {"linear",
     [](Reader r) {
       kernels().linear({r.at(), r.dtype(), r.number(), r.number(), r.at(), r.format(), r.number(),
                         r.number(), r.at(), r.at(), r.dtype(), r.number()});
     }},
    {"rms_norm",
     [](Reader r) {
       kernels().rms_norm({r.at(), r.at(), r.at(), r.at(), r.at(), r.dtype(), r.number(),
                           r.number(), r.number(), r.number(), r.real()});
     }},
    {"silu_mul",
     [](Reader r) {
       kernels().silu_mul({r.at(), r.at(), r.dtype(), r.number(), r.number(), r.number()});
     }},
    {"take_rows",
     [](Reader r) {
       kernels().take_rows({r.at(), r.at<int32_t>(), r.at(), r.number(), r.number(), r.number(),
                            r.number()});
     }},
    {"rope",
     [](Reader r) {
       kernels().rope({r.at(), r.at(), r.at(), r.at(), r.at<int32_t>(), r.at<float>(), r.dtype(),
                       r.number(), r.number(), r.number(), r.number(), r.number(), r.number(),
                       r.number(), r.number() != 0});
     }},
    {"kv_write",
     [](Reader r) {
       kernels().kv_write({r.at(), r.kv_shape(), r.at(), r.at(), r.dtype(), r.number(), r.number(),
                           r.number(), r.at<int32_t>()});
     }},
    {"attention",
     [](Reader r) {
       kernels().attention({r.at(), r.at(), r.dtype(), r.number(), r.number(), r.number(), r.at(),
                            r.kv_shape(), r.at<int32_t>(), r.number(), r.at<int32_t>(), r.number(),
                            r.at<float>(), r.at<int32_t>(), r.real(), r.real(), r.number(),
                            r.at<float>(), r.at<float>()});
     }},
};
constexpr int kNumKernels = sizeof kKernels / sizeof *kKernels;

int kernel_named(const std::string& name) {
  for (int i = 0; i < kNumKernels; ++i)
    if (name == kKernels[i].name) return i;
  throw std::invalid_argument("no kernel " + name + " can be recorded");
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
  for (const Patch& patch : patches)
    if (patch.argument < 0 || patch.argument >= static_cast<int>(arguments.size()))
      throw std::invalid_argument(kernel + " has no argument " + std::to_string(patch.argument));
  calls_.push_back({kernel_named(kernel), std::move(arguments), patches});
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
      kKernels[call.kernel].run(Reader(call.arguments.data()));
      continue;
    }
    const double started = now();
    kKernels[call.kernel].run(Reader(call.arguments.data()));
    seconds_.resize(kNumKernels);
    seconds_[call.kernel] += now() - started;
  }
}

std::vector<std::pair<std::string, double>> Program::take_seconds() {
  std::vector<std::pair<std::string, double>> taken;
  for (size_t i = 0; i < seconds_.size(); ++i) taken.emplace_back(kKernels[i].name, seconds_[i]);
  seconds_.clear();
  taken.emplace_back("waiting", ThreadTeam::instance().take_wait_seconds());
  return taken;
}

}  // namespace portalm
