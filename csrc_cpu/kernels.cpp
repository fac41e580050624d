// Every kernel for one instruction set: compiled once for each, with PORTALM_ISA its name.
#include "kernels.h"

#include "attention.h"
#include "kv_cache.h"
#include "linear.h"
#include "linear_quantized.h"
#include "rms_norm.h"
#include "rope.h"
#include "sample.h"
#include "silu_mul.h"
#include "simd.h"
#include "take_rows.h"

#define PORTALM_STRING(x) #x
#define PORTALM_NAME(x) PORTALM_STRING(x)

namespace portalm::PORTALM_ISA {

extern const Kernels table;
const Kernels table = {
    PORTALM_NAME(PORTALM_ISA), kLanes,   packed_bytes, pack,     pack_codes, linear,  rms_norm,
    silu_mul,                  take_rows, rope,        kv_write, kv_copy,    kv_wire, attention,
    sample,
};

}  // namespace portalm::PORTALM_ISA
