// portalm_backends._cpu: the kernels as functions of integers, with the arguments of arguments.h by
// name. Addresses come from data_ptr(); the caller keeps the memory alive and has checked shapes
// (backends/cpu). The tables that both sides use are exported as data.
#include <nanobind/nanobind.h>
#include <nanobind/stl/pair.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/tuple.h>
#include <nanobind/stl/vector.h>

#include <utility>

#include "dispatch.h"
#include "program.h"
#include "signatures.h"
#include "thread_team.h"

#if !defined(PORTALM_MODULE)
#define PORTALM_MODULE _cpu
#endif

namespace nb = nanobind;
using namespace nb::literals;
using namespace portalm;

namespace {

using Ptr = uintptr_t;

template <Kind kind>
struct PythonTypeOf {
  using type = int64_t;
};
template <>
struct PythonTypeOf<Kind::address> {
  using type = Ptr;
};
template <>
struct PythonTypeOf<Kind::real> {
  using type = float;
};
template <>
struct PythonTypeOf<Kind::flag> {
  using type = bool;
};

// The kernel of `Args` as a function; every argument is given by name.
template <typename Args, size_t... I>
void define(nb::module_& m, std::index_sequence<I...>) {
  using S = Signature<Args>;
  m.def(
      S::name,
      [](typename PythonTypeOf<S::arguments[I].kind>::type... values) {
        nb::gil_scoped_release released;
        const int64_t words[] = {to_word(values)...};
        run_words<Args>(words);
      },
      nb::kw_only(), nb::arg(S::arguments[I].name)...);
}

nb::str text(std::string_view s) { return nb::str(s.data(), s.size()); }

// (name, role, kind) of each argument.
template <typename Args>
nb::tuple arguments_of() {
  nb::list list;
  for (const Argument& a : Signature<Args>::arguments)
    list.append(nb::make_tuple(a.name, text(kRoleNames[static_cast<int>(a.role)]),
                               text(kKindNames[static_cast<int>(a.kind)])));
  return nb::tuple(list);
}

void export_tables(nb::module_& m) {
  nb::dict arguments, dtypes, formats, patch_kinds, item_columns;
#define PORTALM_KERNEL(name, Args) arguments[#name] = arguments_of<Args>();
#include "arguments.h"
#define PORTALM_DTYPE(enumerator, name) dtypes[name] = static_cast<int>(DType::enumerator);
  PORTALM_DTYPES(PORTALM_DTYPE)
#define PORTALM_FORMAT(enumerator, name) formats[name] = static_cast<int>(Format::enumerator);
  PORTALM_FORMATS(PORTALM_FORMAT)
#define PORTALM_COLUMN(name) item_columns[#name] = nb::len(item_columns);
  PORTALM_ITEM_MEMBERS(PORTALM_COLUMN)
  patch_kinds["input"] = static_cast<int>(PatchKind::input);
  patch_kinds["slot"] = static_cast<int>(PatchKind::slot);
  patch_kinds["count"] = static_cast<int>(PatchKind::count);
  m.attr("ARGUMENTS") = arguments;
  m.attr("DTYPES") = dtypes;
  m.attr("FORMATS") = formats;
  m.attr("ITEM_COLUMNS") = item_columns;
  m.attr("PATCH_KINDS") = patch_kinds;
  m.attr("SPLIT_TOKENS") = kSplitTokens;
}

void linear_heads(Ptr x, int dtype, int64_t rows, int64_t x_stride, int64_t head_stride,
                  const std::vector<Ptr>& packed, int format, int64_t n, int64_t k, Ptr out) {
  const auto at = [](Ptr p) { return reinterpret_cast<void*>(p); };
  const auto type = static_cast<DType>(dtype);
  const int64_t heads = packed.size(), size = kDTypeBytes[dtype];
  for (int64_t h = 0; h < heads; ++h)
    kernels().linear({at(x + h * head_stride * size), type, rows, x_stride, at(packed[h]),
                      static_cast<Format>(format), n, k, nullptr, at(out + h * n * size), type,
                      heads * n});
}

}  // namespace

NB_MODULE(PORTALM_MODULE, m) {
  export_tables(m);
  m.def("isa", [] { return std::string(kernels().name); });
  m.def("set_isa", &set_isa);
  m.def("isas", [] {  // those that this CPU can run, best last
    std::vector<std::string> names;
    for (const Kernels* k : runnable_kernels()) names.emplace_back(k->name);
    return names;
  });
  m.def("usable_cores", &usable_cores);
  m.def("num_threads", [] { return ThreadTeam::instance().size(); });
  m.def("set_num_threads", [](int size) { ThreadTeam::instance().resize(size); });
  m.def("packed_bytes", [](int format, int64_t n, int64_t k) {
    return kernels().packed_bytes(static_cast<Format>(format), n, k);
  });
  m.def("partial_floats", [](int64_t rows, int64_t value_size) {  // on any instruction set
    return partial_floats(rows, value_size, kMaxLanes);
  });

#define PORTALM_KERNEL(name, Args) define<Args>(m, std::make_index_sequence<kNumArguments<Args>>());
#include "arguments.h"
  // `linear` for each head's own weight: x [rows, heads, K], out [rows, heads, N]
  m.def("linear_heads", &linear_heads, nb::kw_only(), "x"_a, "dtype"_a, "rows"_a, "x_stride"_a,
        "head_stride"_a, "packed"_a, "format"_a, "n"_a, "k"_a, "out"_a,
        nb::call_guard<nb::gil_scoped_release>());

  nb::class_<Program>(m, "Program")
      .def(nb::init<>())
      .def("add_slot", &Program::add_slot)
      .def("add_call",
           [](Program& program, const std::string& kernel, std::vector<int64_t> arguments,
              const std::vector<std::tuple<int, int, int, int64_t>>& patches) {
             std::vector<Patch> list;
             for (auto [argument, kind, index, offset] : patches)
               list.push_back({argument, static_cast<PatchKind>(kind), index, offset});
             program.add_call(kernel, std::move(arguments), list);
           })
      .def("run", &Program::run, nb::call_guard<nb::gil_scoped_release>())
      .def("__len__", &Program::size)
      .def_rw("profile", &Program::profile)
      .def("take_seconds", &Program::take_seconds);
}
