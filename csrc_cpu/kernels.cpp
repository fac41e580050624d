// All kernels for one instruction set, named PORTALM_ISA: compiled once for each.
#include "kernels.h"

#include "attention.h"
#include "kv_cache.h"
#include "linear.h"
#include "linear_quantized.h"
#include "linear_tiles.h"
#include "moe.h"
#include "rms_norm.h"
#include "rope.h"
#include "sample.h"
#include "silu_mul.h"
#include "simd.h"
#include "take_rows.h"

#define PORTALM_STRING(x) #x
#define PORTALM_NAME(x) PORTALM_STRING(x)

namespace portalm::PORTALM_ISA {

#if PORTALM_HAS_TILES
// uses tiles if weight and x are bfloat16
void linear_with_tiles(const LinearArgs& a) {
  const bool is_bf16 = a.format == Format::bf16 || a.format == Format::blocks;
  if (is_bf16 && a.x_dtype == DType::bf16) return linear_by_tiles(a);
  linear(a);
}
#endif

extern const Kernels table;
const Kernels table = {
    PORTALM_NAME(PORTALM_ISA),
    kLanes,
    packed_bytes,
#define PORTALM_KERNEL(name, Args) name,
#include "arguments.h"
};

#if PORTALM_HAS_TILES
extern const Kernels table_with_tiles;
const Kernels table_with_tiles = [] {
  Kernels with_tiles = table;
#if defined(PORTALM_EMULATED)
  with_tiles.name = "emulated_amx";
#else
  with_tiles.name = "amx";
#endif
  with_tiles.linear = linear_with_tiles;
  return with_tiles;
}();
#endif

}  // namespace portalm::PORTALM_ISA
