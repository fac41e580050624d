// A step as a flat list of kernel calls, recorded once (backends/cpu/program.py) and replayed here
// without Python: values that differ from step to step are patched into each call's arguments.
//
// Meaning:  the recorded calls with the same arguments in the same order, so the same results bit
//           for bit; only sizes and addresses follow the step.
// Memory:   intermediate results are in slots of one arena. A slot has a fixed number of bytes per
//           row, and one of the step's row counts; values that are not alive at the same time share
//           a slot.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

namespace portalm {

// The value of a patched argument in a step.
enum class PatchKind : int {
  input = 0,  // inputs[index], a number or an address
  slot = 1,   // the address of slot `index`, plus `offset` bytes
  count = 2,  // counts[index]: a number of rows
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

  // Add a slot of counts[count] rows of `row_bytes` each; returns its index.
  int add_slot(int64_t row_bytes, int count);

  // Add a call of `kernel` with its arguments in the order of arguments.h, floats as their bits.
  // Throws std::invalid_argument for an unknown kernel or a wrong number of arguments.
  void add_call(const std::string& kernel, std::vector<int64_t> arguments,
                const std::vector<Patch>& patches);

  // Run all calls in order. Throws std::bad_alloc if the arena cannot grow.
  void run(const std::vector<int64_t>& inputs, const std::vector<int64_t>& counts);

  int size() const { return static_cast<int>(calls_.size()); }

  // Seconds by kernel since the last call of this, and as "waiting" the part in which the caller
  // waited for other threads; measured only while `profile` is set.
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
