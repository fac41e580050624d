// Checks linear in every format against double precision loops, without Python, for architectures
// that are only cross-compiled and emulated (ci/aarch64.sh). Built with PORTALM_ISA=baseline.
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <vector>

#include "../kernels.h"
#include "../thread_team.h"

namespace portalm::baseline { extern const Kernels table; }

namespace {

using namespace portalm;

float widened(uint16_t bits) {
  const uint32_t wide = static_cast<uint32_t>(bits) << 16;
  float value;
  memcpy(&value, &wide, sizeof value);
  return value;
}

// Random bfloat16 values of both signs, over four powers of two from the bits `exponent` on.
std::vector<uint16_t> random_values(int64_t count, uint16_t exponent) {
  std::vector<uint16_t> values(static_cast<size_t>(count));
  for (uint16_t& value : values)
    value = static_cast<uint16_t>(exponent + (rand() & 0x1FF) + (rand() & 1 ? 0x8000 : 0));
  return values;
}

double nmse_of(const Kernels& kernels, Format format, int64_t rows) {
  const int64_t n = 70, k = 96;
  const std::vector<uint16_t> w = random_values(n * k, 0x3C00), x = random_values(rows * k, 0x3F00);
  const int64_t bytes = kernels.packed_bytes(format, n, k);
  void* packed = aligned_alloc(64, static_cast<size_t>((bytes + 63) / 64 * 64));
  kernels.pack({w.data(), DType::bf16, n, k, packed, format});
  std::vector<float> out(static_cast<size_t>(rows * n));
  kernels.linear(
      {x.data(), DType::bf16, rows, k, packed, format, n, k, nullptr, out.data(), DType::f32, n});
  double error = 0, size = 0;
  for (int64_t r = 0; r < rows; ++r)
    for (int64_t j = 0; j < n; ++j) {
      double exact = 0;
      for (int64_t i = 0; i < k; ++i)
        exact += double{widened(x[r * k + i])} * double{widened(w[j * k + i])};
      error += std::pow(out[r * n + j] - exact, 2);
      size += exact * exact;
    }
  free(packed);
  return error / size;
}

}  // namespace

int main() {
  ThreadTeam::instance().resize(2);
  const struct {
    const char* name;
    Format format;
    double most;
  } cases[] = {
      {"bf16", Format::bf16, 1e-11},
      {"blocks", Format::blocks, 3e-8},
      {"q8", Format::q8, 1e-4},
      {"q4", Format::q4, 2e-2},
      {"q4_min", Format::q4_min, 1.5e-2},
      {"q8_16_x16", Format::q8_16_x16, 1e-4},
      {"q8_min", Format::q8_min_x16, 1e-4},
      {"q8_16_min", Format::q8_16_min_x16, 1e-4},
  };
  bool is_right = true;
  for (const auto& one : cases)
    for (int64_t rows : {1, 3, 7, 64}) {
      const double nmse = nmse_of(baseline::table, one.format, rows);
      printf("%-10s rows %2ld  NMSE %.2e\n", one.name, static_cast<long>(rows), nmse);
      is_right = is_right && nmse < one.most;
    }
  puts(is_right ? "right" : "WRONG");
  return is_right ? 0 : 1;
}
