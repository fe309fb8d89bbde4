// One row of the Gram matrix to 16 bits: G[j, i] = scale entries[i], round to nearest, and the
// largest error of doing so. The diagonal is kept apart: it would set the scale of every row.
#pragma once
#include "problem.h"
#include "simd.h"

namespace mpsae {
namespace MPSAE_ISA {

// `rounding` bounds the error of `product` itself; entries[n .. stride) are zeroed.
static void quantise(const float* product, int64_t n, int64_t diagonal_at, double rounding,
                     int16_t* entries, int64_t stride, float* scale, float* diagonal,
                     float* error) {
  const int64_t whole_part = n / LANES * LANES;
  const int64_t diagonal_vector = diagonal_at / LANES * LANES;
  Float top = fill(0);
  float edge = 0;
  bool finite = true;
  for (int64_t i = 0; i < whole_part; i += LANES)
    if (i != diagonal_vector) {
      const Float g = magnitude(load(product + i));
      top = larger(g, top);
      finite &= at_least(g, g) == (1u << LANES) - 1;  // NaN equals nothing
    }
  const auto scalar = [&](auto visit) {
    for (int64_t i = diagonal_vector; i < whole_part && i < diagonal_vector + LANES; i++)
      if (i != diagonal_at) visit(i);
    for (int64_t i = whole_part; i < n; i++)
      if (i != diagonal_at) visit(i);
  };
  scalar([&](int64_t i) {
    const float g = std::fabs(product[i]);
    finite &= g == g;
    edge = g > edge ? g : edge;
  });
  const float inner = largest(top);
  const float size = inner > edge ? inner : edge;
  finite &= size < std::numeric_limits<float>::infinity();
  *diagonal = product[diagonal_at];

  const float unit = size / 32767.0f;
  const float inverse = 1.0f / unit;
  if (!finite || !(inverse < 1e37f)) {  // nothing to keep, or nothing that can be kept
    std::memset(entries, 0, size_t(stride) * sizeof *entries);
    *scale = 0;
    *error = finite ? float((double(size) + rounding) * (1 + 1e-6))
                    : std::numeric_limits<float>::infinity();
    return;
  }
  const Float by = fill(inverse), back = fill(unit);
  Float worst = fill(0);
  for (int64_t i = 0; i < whole_part; i += LANES)
    if (i != diagonal_vector) {
      const Float g = load(product + i);
      const Float q = whole(mul(g, by));
      store16(entries + i, q);
      worst = larger(magnitude(negated(q, back, g)), worst);
    }
  float worst_edge = 0;
  scalar([&](int64_t i) {
    const float q = std::nearbyint(product[i] * inverse);
    entries[i] = int16_t(q);
    const float miss = std::fabs(product[i] - q * unit);
    worst_edge = miss > worst_edge ? miss : worst_edge;
  });
  entries[diagonal_at] = 0;
  std::memset(entries + n, 0, size_t(stride - n) * sizeof *entries);
  const float inner_worst = largest(worst);
  const double measured = inner_worst > worst_edge ? inner_worst : worst_edge;
  *scale = unit;
  // 1.2e-7 size: q * unit is itself rounded where there is no fused multiply-add
  *error = float((measured + 1.2e-7 * double(size) + rounding) * (1 + 1e-6));
}

}  // namespace MPSAE_ISA
}  // namespace mpsae
