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

int64_t num_parts(int64_t whole, int64_t part) { return (whole + part - 1) / part; }

CacheLayer layer_at(int64_t key, int64_t value, int64_t block_stride, int64_t token_stride,
                    int64_t head_stride, int64_t block_size) {
  return {at<void>(key), at<void>(value), block_stride,
          token_stride,  head_stride,     static_cast<int32_t>(block_size)};
}

[[noreturn]] void refuse(const std::string& what) {
  throw std::invalid_argument("no kernel was built: " + what);
}

Kernel write_kernel(int64_t dtype) {
#define PORTALM_KERNEL(...)
#define PORTALM_WRITE(T) \
  if (dtype == T) return Kernel::kv_write_##T;
#define PORTALM_DECODE(...)
#include "instances.h"
  refuse("kv_write of dtype " + std::to_string(dtype));
}

Kernel decode_kernel(int64_t dtype, int64_t head_size, int64_t group_size) {
#define PORTALM_KERNEL(...)
#define PORTALM_WRITE(...)
#define PORTALM_DECODE(T, D)                                      \
  if (dtype == T && head_size == D && group_size <= kDecodeGroup) \
    return Kernel::decode_attention_##T##_##D;
#include "instances.h"
  refuse("decode_attention of dtype " + std::to_string(dtype) + ", head size " +
         std::to_string(head_size) + ", groups of " + std::to_string(group_size));
}

}  // namespace

extern "C" {

void kv_copy(int64_t stream, int64_t cache, int64_t num_pieces, int64_t piece_stride_bytes,
             int64_t block_bytes, int64_t count, int64_t source, int64_t destination) {
  if (count == 0) return;
  const KvCopyArgs args = {at<char>(cache), piece_stride_bytes, block_bytes,
                           at<const int32_t>(source), at<const int32_t>(destination)};
  const int64_t stretches = num_parts(block_bytes / 16, kCopyThreads * kCopyVectors);
  launch(Kernel::kv_copy, {count, num_pieces, stretches, kCopyThreads}, &args, sizeof(args),
         stream);
}

void kv_write(int64_t stream, int64_t dtype, int64_t key_cache, int64_t value_cache,
              int64_t block_stride, int64_t token_stride, int64_t head_stride, int64_t block_size,
              int64_t key, int64_t key_stride, int64_t value, int64_t value_stride, int64_t slots,
              int64_t num_tokens, int64_t num_kv_heads, int64_t head_size, int64_t query,
              int64_t query_stride, int64_t query_out, int64_t num_heads, int64_t positions,
              int64_t cos_sin, int64_t rotary_dim, int64_t is_interleaved) {
  if (num_tokens == 0) return;
  KvWriteArgs args = {};
  args.cache =
      layer_at(key_cache, value_cache, block_stride, token_stride, head_stride, block_size);
  args.query = at<void>(query);
  args.key = at<void>(key);
  args.value = at<void>(value);
  args.query_out = at<void>(query_out);
  args.slots = at<int32_t>(slots);
  args.positions = at<int32_t>(positions);
  args.cos_sin = at<float>(cos_sin);
  args.query_stride = query_stride;
  args.key_stride = key_stride;
  args.value_stride = value_stride;
  args.num_heads = static_cast<int32_t>(num_heads);
  args.num_kv_heads = static_cast<int32_t>(num_kv_heads);
  args.head_size = static_cast<int32_t>(head_size);
  args.rotary_dim = static_cast<int32_t>(rotary_dim);
  args.is_interleaved = is_interleaved != 0;
  const int64_t vectors = (num_heads + 2 * num_kv_heads) * (head_size / kVector);
  const Grid grid = {num_tokens, num_parts(vectors, kWriteThreads), 1, kWriteThreads};
  launch(write_kernel(dtype), grid, &args, sizeof(args), stream);
}

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

void sample(int64_t stream, int64_t logits, int64_t num_rows, int64_t vocab_size, int64_t stride,
            int64_t temperature, int64_t top_k, int64_t top_p, int64_t min_p, int64_t seed,
            int64_t position, int64_t out) {
  if (num_rows == 0) return;
  SampleArgs args = {};
  args.logits = at<float>(logits);
  args.temperature = at<float>(temperature);
  args.top_k = at<int32_t>(top_k);
  args.top_p = at<float>(top_p);
  args.min_p = at<float>(min_p);
  args.seed = at<int64_t>(seed);
  args.position = at<int64_t>(position);
  args.out = at<int32_t>(out);
  args.stride = stride;
  args.vocab_size = static_cast<int32_t>(vocab_size);
  launch(Kernel::sample, {num_rows, 1, 1, kSampleThreads}, &args, sizeof(args), stream);
}

}  // extern "C"
}  // namespace portalm
