// The inverse of a Gram matrix that grows and shrinks by one atom, in fp64. Rows of it are `stride`
// apart, a multiple of the vectors; behind `count` columns they are 0 to the end of the vector.
#pragma once
#include "problem.h"
#include "simd.h"

namespace mpsae {
namespace MPSAE_ISA {

template <int V>
static inline void multiply_part(const double* inverse, int64_t stride, int64_t count,
                                 const double* g, double* out) {
  Double sum[V];
  for (int m = 0; m < V; m++) sum[m] = fill64(0);
  for (int64_t s = 0; s < count; s++) {
    const Double by = fill64(g[s]);
    for (int m = 0; m < V; m++)
      sum[m] = fused64(by, load64(inverse + s * stride + m * LANES64), sum[m]);
  }
  for (int m = 0; m < V; m++) store64(out + m * LANES64, sum[m]);
}

// out = inverse g, the inverse being symmetric
static void multiply(const double* inverse, int64_t stride, int64_t count, const double* g,
                     double* out) {
  const int64_t end = round_up(count, LANES64);
  int64_t i = 0;
  for (; i + 4 * LANES64 <= end; i += 4 * LANES64)
    multiply_part<4>(inverse + i, stride, count, g, out + i);
  for (; i < end; i += LANES64) multiply_part<1>(inverse + i, stride, count, g, out + i);
}

// inverse += factor u u^T
static void add_square(double* inverse, int64_t stride, int64_t count, const double* u,
                       double factor) {
  const int64_t end = round_up(count, LANES64);
  for (int64_t s = 0; s < count; s++) {
    const Double by = fill64(factor * u[s]);
    double* row = inverse + s * stride;
    for (int64_t i = 0; i < end; i += LANES64)
      store64(row + i, fused64(by, load64(u + i), load64(row + i)));
  }
}

// Make room for an atom at squared distance `left` from those before it, u being its coefficients
// on them. u becomes (u, -1).
static void append(double* inverse, int64_t stride, int64_t count, double* u, double left) {
  u[count] = -1;
  for (int64_t i = count + 1; i < round_up(count + 1, LANES64); i++) u[i] = 0;
  std::memset(inverse + count * stride, 0, size_t(stride) * sizeof(double));
  add_square(inverse, stride, count + 1, u, 1 / left);
}

// Take atom p out; the last one comes to its place. u is scratch.
static void remove(double* inverse, int64_t stride, int64_t count, int64_t p, double* u) {
  const int64_t last = count - 1;
  std::memcpy(u, inverse + p * stride, size_t(round_up(count, LANES64)) * sizeof(double));
  add_square(inverse, stride, count, u, -1 / u[p]);
  std::memmove(inverse + p * stride, inverse + last * stride, size_t(stride) * sizeof(double));
  for (int64_t s = 0; s < last; s++) {
    inverse[s * stride + p] = inverse[s * stride + last];
    inverse[s * stride + last] = 0;
  }
}

static inline double dot64(const double* a, const double* b, int64_t count) {
  Double sum = fill64(0);
  int64_t i = 0;
  for (; i + LANES64 <= count; i += LANES64) sum = fused64(load64(a + i), load64(b + i), sum);
  double all = total(sum);
  for (; i < count; i++) all += a[i] * b[i];
  return all;
}

}  // namespace MPSAE_ISA
}  // namespace mpsae
