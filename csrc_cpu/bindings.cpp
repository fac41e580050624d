// portalm_backends._cpu: the kernels as functions of integers. Pointers come from data_ptr(); the
// caller keeps what they point to alive. Shapes are the caller's to check (backends/cpu).
#include <nanobind/nanobind.h>
#include <nanobind/stl/pair.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/tuple.h>
#include <nanobind/stl/vector.h>

#include "dispatch.h"
#include "program.h"
#include "thread_team.h"

namespace nb = nanobind;
using portalm::DType;
using portalm::kernels;

namespace {

using Ptr = uintptr_t;

template <typename T = void>
T* at(Ptr p) {
  return reinterpret_cast<T*>(p);
}

DType dtype(int code) { return static_cast<DType>(code); }
portalm::Format format(int code) { return static_cast<portalm::Format>(code); }

portalm::KVShape kv_shape(int code, int64_t blocks, int64_t block_size, int64_t kv_heads,
                          int64_t head_size, bool shares_values) {
  return {dtype(code), blocks, block_size, kv_heads, head_size, shares_values};
}

}  // namespace

NB_MODULE(_cpu, m) {
  m.def("isa", [] { return std::string(kernels().name); });
  m.def("set_isa", &portalm::set_isa);
  m.def("isas", [] {  // that this CPU runs, best last
    std::vector<std::string> names;
    for (const portalm::Kernels* k : portalm::runnable_kernels()) names.emplace_back(k->name);
    return names;
  });
  m.def("usable_cores", &portalm::usable_cores);
  m.def("num_threads", [] { return portalm::ThreadTeam::instance().size(); });
  m.def("set_num_threads", [](int size) { portalm::ThreadTeam::instance().resize(size); });

  m.def("packed_bytes",
        [](int code, int64_t n, int64_t k) { return kernels().packed_bytes(format(code), n, k); });
  m.def("pack", [](Ptr source, int code, int64_t n, int64_t k, Ptr packed, int format_code) {
    nb::gil_scoped_release released;
    kernels().pack({at(source), dtype(code), n, k, at(packed), format(format_code)});
  });
  m.def("pack_codes", [](Ptr codes, Ptr scales, Ptr minimums, int64_t n, int64_t k, Ptr packed,
                         int format_code) {
    nb::gil_scoped_release released;
    kernels().pack_codes({at<uint8_t>(codes), at<float>(scales), at<float>(minimums), n, k,
                          at(packed), format(format_code)});
  });
  m.def("linear", [](Ptr x, int x_code, int64_t rows, int64_t x_stride, Ptr packed, int w_code,
                     int64_t n, int64_t k, Ptr bias, Ptr out, int out_code, int64_t out_stride) {
    nb::gil_scoped_release released;
    kernels().linear({at(x), dtype(x_code), rows, x_stride, at(packed), format(w_code), n, k,
                      at(bias), at(out), dtype(out_code), out_stride});
  });
  m.def("linear_heads", [](Ptr x, int code, int64_t rows, int64_t x_stride, int64_t head_stride,
                           const std::vector<Ptr>& packed, int w_code, int64_t n, int64_t k,
                           Ptr out) {  // strides in elements; out is [rows, heads, n]
    nb::gil_scoped_release released;
    const int64_t heads = packed.size(), size = portalm::kDTypeBytes[code];
    for (int64_t h = 0; h < heads; ++h)
      kernels().linear({at(x + h * head_stride * size), dtype(code), rows, x_stride, at(packed[h]),
                        format(w_code), n, k, nullptr, at(out + h * n * size), dtype(code),
                        heads * n});
  });
  m.def("rms_norm", [](Ptr x, Ptr residual, Ptr weight, Ptr out, Ptr total, int code, int64_t rows,
                       int64_t columns, int64_t x_stride, int64_t residual_stride, float eps) {
    nb::gil_scoped_release released;
    kernels().rms_norm({at(x), at(residual), at(weight), at(out), at(total), dtype(code), rows,
                        columns, x_stride, residual_stride, eps});
  });
  m.def("silu_mul", [](Ptr gate_up, Ptr out, int code, int64_t rows, int64_t columns,
                       int64_t stride) {
    nb::gil_scoped_release released;
    kernels().silu_mul({at(gate_up), at(out), dtype(code), rows, columns, stride});
  });
  m.def("moe", [](Ptr x, int code, int64_t tokens, int64_t x_stride, Ptr ids, Ptr shares,
                  int64_t top_k, Ptr experts, int64_t num_experts, int64_t hidden, int64_t inner,
                  Ptr gate_up_bias, Ptr down_bias, float limit, float alpha, Ptr out) {
    nb::gil_scoped_release released;
    kernels().moe({at(x), dtype(code), tokens, x_stride, at<int32_t>(ids), at<float>(shares), top_k,
                   at<int64_t>(experts), num_experts, hidden, inner, at(gate_up_bias),
                   at(down_bias), limit, alpha, at(out)});
  });
  m.def("take_rows", [](Ptr x, Ptr rows, Ptr out, int64_t num_rows, int64_t num_source_rows,
                        int64_t row_bytes, int64_t stride_bytes) {
    nb::gil_scoped_release released;
    kernels().take_rows({at(x), at<int32_t>(rows), at(out), num_rows, num_source_rows, row_bytes,
                         stride_bytes});
  });
  m.def("rope", [](Ptr query, Ptr key, Ptr query_out, Ptr key_out, Ptr positions, Ptr cos_sin,
                   int code, int64_t tokens, int64_t heads, int64_t kv_heads, int64_t head_size,
                   int64_t rotary_dim, int64_t query_stride, int64_t key_stride, bool interleaved) {
    nb::gil_scoped_release released;
    kernels().rope({at(query), at(key), at(query_out), at(key_out), at<int32_t>(positions),
                    at<float>(cos_sin), dtype(code), tokens, heads, kv_heads, head_size, rotary_dim,
                    query_stride, key_stride, interleaved});
  });
  m.def("kv_write", [](Ptr cache, int kv_code, int64_t blocks, int64_t block_size, int64_t kv_heads,
                       int64_t head_size, bool shares_values, Ptr key, Ptr value, int code,
                       int64_t tokens, int64_t key_stride, int64_t value_stride, Ptr slots) {
    nb::gil_scoped_release released;
    kernels().kv_write(
        {at(cache), kv_shape(kv_code, blocks, block_size, kv_heads, head_size, shares_values),
         at(key), at(value), dtype(code), tokens, key_stride, value_stride, at<int32_t>(slots)});
  });
  m.def("kv_copy", [](Ptr cache, int64_t layers, int64_t layer_bytes, int64_t block_bytes,
                      int64_t count, Ptr source, Ptr destination) {
    nb::gil_scoped_release released;
    kernels().kv_copy({at<char>(cache), layers, layer_bytes, block_bytes, count,
                       at<int32_t>(source), at<int32_t>(destination)});
  });
  m.def("kv_wire", [](Ptr cache, int kv_code, int64_t num_blocks, int64_t block_size,
                      int64_t kv_heads, int64_t head_size, bool shares_values, int64_t layers,
                      int64_t layer_bytes, int64_t count, Ptr blocks, Ptr wire, bool is_export) {
    nb::gil_scoped_release released;
    kernels().kv_wire(
        {at<char>(cache),
         kv_shape(kv_code, num_blocks, block_size, kv_heads, head_size, shares_values), layers,
         layer_bytes, count, at<int32_t>(blocks), at(wire), is_export});
  });
  m.def("attention", [](Ptr query, Ptr out, int code, int64_t query_stride, int64_t heads,
                        int64_t value_size, Ptr cache, int kv_code, int64_t num_blocks,
                        int64_t block_size, int64_t kv_heads, int64_t head_size,
                        bool shares_values, Ptr block_table, int64_t max_blocks, Ptr items,
                        int64_t num_items, Ptr partials, Ptr counters, float scale, float soft_cap,
                        int64_t window, Ptr slopes, Ptr sinks) {
    nb::gil_scoped_release released;
    kernels().attention({at(query), at(out), dtype(code), query_stride, heads, value_size, at(cache),
                         kv_shape(kv_code, num_blocks, block_size, kv_heads, head_size,
                                  shares_values),
                         at<int32_t>(block_table), max_blocks, at<int32_t>(items), num_items,
                         at<float>(partials), at<int32_t>(counters), scale, soft_cap, window,
                         at<float>(slopes), at<float>(sinks)});
  });
  using portalm::Program;
  nb::class_<Program>(m, "Program")
      .def(nb::init<>())
      .def("add_slot", &Program::add_slot)
      .def("add_call",
           [](Program& program, const std::string& kernel, std::vector<int64_t> arguments,
              const std::vector<std::tuple<int, int, int, int64_t>>& patches) {
             std::vector<portalm::Patch> list;
             for (auto [argument, kind, index, offset] : patches)
               list.push_back({argument, static_cast<portalm::PatchKind>(kind), index, offset});
             program.add_call(kernel, std::move(arguments), list);
           })
      .def("run", &Program::run, nb::call_guard<nb::gil_scoped_release>())
      .def("__len__", &Program::size)
      .def_rw("profile", &Program::profile)
      .def("take_seconds", &Program::take_seconds);

  m.def("sample", [](Ptr logits, int64_t rows, int64_t vocab, int64_t stride, Ptr temperature,
                     Ptr top_k, Ptr top_p, Ptr min_p, Ptr seed, Ptr position, Ptr out) {
    nb::gil_scoped_release released;
    kernels().sample({at<float>(logits), rows, vocab, stride, at<float>(temperature),
                      at<int32_t>(top_k), at<float>(top_p), at<float>(min_p), at<int64_t>(seed),
                      at<int64_t>(position), at<int32_t>(out)});
  });
}
