// The list in arguments.h as C++ data: names, roles and kinds of each kernel's arguments, and the
// conversion of a list of 64-bit words, in that order, to its struct.
#pragma once

#include <bit>
#include <string_view>
#include <type_traits>

#include "kernels.h"

namespace portalm {

// What an argument is to a recorded step (backends/cpu/program.py). A kernel is recorded unless its
// arguments have the role `none`.
enum class Role {
  none,
  fixed,        // the same in every step
  input,        // an address in the step's inputs or in an earlier result, or 0
  table,        // as `input`, or an address in the weights, which is fixed
  output,       // address of a result
  rows,         // as many rows as the last `input` or `table` address before it has
  source_rows,  // as many rows as the first argument has
  max_blocks,   // width of the block table
  plan,         // a member of the AttentionPlan
};
constexpr std::string_view kRoleNames[] = {"none", "fixed",       "input",      "table", "output",
                                           "rows", "source_rows", "max_blocks", "plan"};

// What a word holds.
enum class Kind { address, number, real, flag };
constexpr std::string_view kKindNames[] = {"address", "number", "real", "flag"};

template <typename T>
constexpr Kind kKindOf = std::is_pointer_v<T>          ? Kind::address
                         : std::is_same_v<T, bool>     ? Kind::flag
                         : std::is_floating_point_v<T> ? Kind::real
                                                       : Kind::number;

struct Argument {
  const char* name;
  Role role;
  Kind kind;
};

template <typename T>
T from_word(int64_t word) {
  if constexpr (std::is_pointer_v<T>) return reinterpret_cast<T>(word);
  else if constexpr (std::is_same_v<T, float>)
    return std::bit_cast<float>(static_cast<int32_t>(word));
  else return static_cast<T>(word);
}
template <typename T>
int64_t to_word(T value) {
  if constexpr (std::is_same_v<T, float>) return std::bit_cast<int32_t>(value);
  else return static_cast<int64_t>(value);
}

// Signature<Args>: `arguments`, and `visit`, which calls visitor(member) for each in their order.
template <typename Args>
struct Signature;

// clang-format off
#define PORTALM_SHAPE_none(Type, member, name) {#name, Role::none, kKindOf<Type>},
#define PORTALM_SHAPE_fixed(Type, member, name) {#name, Role::fixed, kKindOf<Type>},
#define PORTALM_KERNEL(kernel, Args)                     \
  template <>                                            \
  struct Signature<Args> {                               \
    static constexpr const char* name = #kernel;         \
    static constexpr auto pointer = &Kernels::kernel;    \
    static constexpr Argument arguments[] = {
#define PORTALM_ARGUMENT(role, Type, name) {#name, Role::role, kKindOf<Type>},
#define PORTALM_KV_SHAPE(role, shape) PORTALM_KV_SHAPE_MEMBERS(PORTALM_SHAPE_##role)
#define PORTALM_END }; };
// clang-format on
#include "arguments.h"
#undef PORTALM_SHAPE_none
#undef PORTALM_SHAPE_fixed

#define PORTALM_SHAPE_VISIT(Type, member, name) visitor(member_of.member);
#define PORTALM_KERNEL(kernel, Args) \
  template <typename Visitor>        \
  void visit(Args& args, Visitor&& visitor) {
#define PORTALM_ARGUMENT(role, Type, name) visitor(args.name);
#define PORTALM_KV_SHAPE(role, shape)             \
  {                                               \
    KVShape& member_of = args.shape;              \
    PORTALM_KV_SHAPE_MEMBERS(PORTALM_SHAPE_VISIT) \
  }
#define PORTALM_END }
#include "arguments.h"
#undef PORTALM_SHAPE_VISIT

template <typename Args>
constexpr int kNumArguments = static_cast<int>(std::size(Signature<Args>::arguments));

template <typename Args>
constexpr bool kIsRecorded = Signature<Args>::arguments[0].role != Role::none;

// Run the kernel of `Args` with these words as its arguments.
template <typename Args>
void run_words(const int64_t* words) {
  Args args;
  visit(args, [&]<typename T>(T& member) { member = from_word<T>(*words++); });
  (kernels().*Signature<Args>::pointer)(args);
}

}  // namespace portalm
