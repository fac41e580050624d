// A step as a flat list of kernel calls, recorded once (backends/cpu/program.py) and replayed here
// without Python: what differs from step to step is patched into each call's arguments.
//
// Meaning:  the same calls with the same arguments in the same order as were recorded, so the same
//           results bit for bit; only sizes and addresses follow the step.
// Memory:   intermediate results lie in slots of one arena. A slot has so many bytes a row, and as
//           many rows as the step has of its kind; values that do not live at the same time share one.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

namespace portalm {

// What a patched argument becomes in a step.
enum class PatchKind : int {
  input = 0,  // inputs[index], a number or an address
  slot = 1,   // the address of slot `index`, plus `offset` bytes
  count = 2,  // counts[index]: rows of a kind
};

struct Patch {
  int argument;
  PatchKind kind;
  int index;
  int64_t offset;
};

class Program {
 public:
  ~Program();

  // A slot of `row_bytes` a row and counts[count] rows; its index.
  int add_slot(int64_t row_bytes, int count);

  // One more call: `kernel` as the bindings name it, arguments in their order, floats by their bits.
  void add_call(const std::string& kernel, std::vector<int64_t> arguments,
                const std::vector<Patch>& patches);

  // All calls in order. Raises std::bad_alloc if the arena cannot grow.
  void run(const std::vector<int64_t>& inputs, const std::vector<int64_t>& counts);

  int size() const { return static_cast<int>(calls_.size()); }

  // Seconds by kernel since the last call of this, and under "waiting" those of them in which the
  // caller waited for other threads; measured only while `profile` is set.
  std::vector<std::pair<std::string, double>> take_seconds();
  bool profile = false;

 private:
  struct Call {
    int kernel;
    std::vector<int64_t> arguments;
    std::vector<Patch> patches;
  };
  struct Slot {
    int64_t row_bytes;
    int count;
    char* address;
  };
  void place_slots(const std::vector<int64_t>& counts);

  std::vector<Call> calls_;
  std::vector<Slot> slots_;
  std::vector<double> seconds_;
  char* arena_ = nullptr;
  int64_t arena_bytes_ = 0;
};

}  // namespace portalm
