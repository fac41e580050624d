#include "launchers.h"

#include <stdexcept>
#include <string>

namespace portalm {
namespace {

// The types that instances.h names, as DType numbers.
constexpr int64_t Half = kHalf, BFloat16 = kBFloat16;

template <typename T>
T* at(int64_t address) {
  return reinterpret_cast<T*>(address);
}

CacheLayer layer_at(int64_t key, int64_t value, int64_t block_stride, int64_t token_stride,
                    int64_t head_stride, int64_t block_size) {
  return {at<void>(key), at<void>(value), block_stride,
          token_stride,  head_stride,     static_cast<int32_t>(block_size)};
}

[[noreturn]] void refuse(const std::string& what) {
  throw std::invalid_argument("no kernel was built: " + what);
}

Kernel decode_kernel(int64_t dtype, int64_t head_size, int64_t group_size) {
#define PORTALM_KERNEL(...)
#define PORTALM_DECODE(T, D)                                      \
  if (dtype == T && head_size == D && group_size <= kDecodeGroup) \
    return Kernel::decode_attention_##T##_##D;
#include "instances.h"
  refuse("decode_attention of dtype " + std::to_string(dtype) + ", head size " +
         std::to_string(head_size) + ", groups of " + std::to_string(group_size));
}

}  // namespace

extern "C" {

void decode_attention(int64_t stream, int64_t dtype, int64_t key_cache, int64_t value_cache,
                      int64_t block_stride, int64_t token_stride, int64_t head_stride,
                      int64_t block_size, int64_t query, int64_t query_stride, int64_t out,
                      int64_t block_table, int64_t table_stride, int64_t seq_lens, int64_t items,
                      int64_t num_items, int64_t partials, int64_t counters, int64_t num_kv_heads,
                      int64_t group_size, int64_t head_size, double scale, double soft_cap,
                      int64_t window, int64_t slopes, int64_t sinks) {
  if (num_items == 0) return;
  DecodeAttentionArgs args = {};
  args.cache =
      layer_at(key_cache, value_cache, block_stride, token_stride, head_stride, block_size);
  args.query = at<void>(query);
  args.out = at<void>(out);
  args.block_table = at<int32_t>(block_table);
  args.items = at<DecodeItem>(items);
  args.seq_lens = at<int32_t>(seq_lens);
  args.partials = at<float>(partials);
  args.counters = at<int32_t>(counters);
  args.slopes = at<float>(slopes);
  args.sinks = at<float>(sinks);
  args.query_stride = query_stride;
  args.table_stride = table_stride;
  args.scale = static_cast<float>(scale);
  args.soft_cap = static_cast<float>(soft_cap);
  args.window = static_cast<int32_t>(window);
  args.num_kv_heads = static_cast<int32_t>(num_kv_heads);
  args.group_size = static_cast<int32_t>(group_size);
  launch(decode_kernel(dtype, head_size, group_size), {num_items, num_kv_heads, 1, kDecodeThreads},
         &args, sizeof(args), stream);
}

}  // extern "C"
}  // namespace portalm
