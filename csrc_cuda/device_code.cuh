// All device code, and an entry point named portalm_<name> for each kernel of instances.h.
#pragma once

#include "decode_attention.cuh"

namespace portalm {
#define PORTALM_KERNEL(name, Args, threads, ...) \
  extern "C" __global__ void PORTALM_BOUNDS(threads) portalm_##name(Args a) { __VA_ARGS__(a); }
#include "instances.h"
}  // namespace portalm
