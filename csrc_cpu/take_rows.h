// take_rows: gather rows of a matrix by index: embeddings, and the rows that need logits.
//
//   x   [T, C]; rows int32 [R]; out [R, C]
//
// Mapping:  the team shares the rows.
// Bound by: memory.
// Meaning:  TorchBackend.take_rows and embed of portalm_backends.portable; an index outside the
//           matrix yields a row of zeros, never a stray read.
// Tested:   tests/unit/test_cpu_kernels.py
#pragma once

#include "parallel.h"

namespace portalm::PORTALM_ISA {

inline void take_rows(const TakeRowsArgs& a) {
  const char* x = static_cast<const char*>(a.x);
  char* out = static_cast<char*>(a.out);
  parallel_for(a.num_rows, 64, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t row = a.rows[i];
      if (row >= 0 && row < a.num_source_rows) {
        memcpy(out + i * a.row_bytes, x + row * a.stride_bytes, a.row_bytes);
      } else {
        memset(out + i * a.row_bytes, 0, a.row_bytes);
      }
    }
  });
}

}  // namespace portalm::PORTALM_ISA
