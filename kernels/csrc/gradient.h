// Gradient pursuit of one row: the choice of orthogonal.h, all coefficients moved along their
// gradient in each step. An atom that comes again moves them once more; its place keeps 0.
#pragma once
#include "orthogonal.h"

namespace mpsae {
namespace MPSAE_ISA {

// v += <g, g> / <g, G g> g with g = D_S r = start - G v; v is kept at 0 or above if asked.
static void gradient_step(const OrthogonalScratch& w, int64_t count, bool nonnegative) {
  const int64_t stride = w.stride;
  double length = 0, curvature = 0;
  for (int64_t p = 0; p < count; p++) {
    w.gradient[p] = w.start[p] - dot64(w.pairs + p * stride, w.value, count);
    length += w.gradient[p] * w.gradient[p];
  }
  for (int64_t p = 0; p < count; p++)
    curvature += w.gradient[p] * dot64(w.pairs + p * stride, w.gradient, count);
  if (!(curvature > 0)) return;
  for (int64_t p = 0; p < count; p++) {
    w.value[p] += length / curvature * w.gradient[p];
    if (nonnegative && w.value[p] < 0) w.value[p] = 0;
  }
}

// `start` [n] is x . dictionary^T.
static void gradient_row(const Orthogonal& q, int64_t b, const OrthogonalScratch& w) {
  const int64_t n = q.n, stride = w.stride;
  const float* x = q.x + b * q.d;
  const float* start = q.correlation + b * n;
  int64_t* atoms = q.indices + b * q.k;
  const int64_t limit = q.k_rows && q.k_rows[b] < q.k ? q.k_rows[b] : q.k;
  const auto choose = q.select == ABS ? best_atom<true> : best_atom<false>;
  int64_t t = 0, count = 0, used = 0;  // w.members holds the places of the distinct atoms
  while (t < limit) {
    const int64_t j = choose(q, w, start, used, nullptr);
    if (j < 0) break;
    atoms[t] = j;
    int64_t p = 0;
    while (p < count && atoms[w.members[p]] != j) p++;
    if (p == count) {
      w.members[count++] = t;
      w.start[p] = double(start[j]);
      w.value[p] = 0;
      for (int64_t s = 0; s <= p; s++)
        w.pairs[p * stride + s] = w.pairs[s * stride + p] =
            double(q.gram[atoms[w.members[s]] * n + j]);
    }
    gradient_step(w, count, q.nonnegative);
    t++;
    used = 0;
    for (int64_t s = 0; s < count; s++) {
      w.rows[used] = q.gram + atoms[w.members[s]] * n;
      w.weight[used] = float(w.value[s]);
      used += w.value[s] != 0;
    }
    if (q.residual_threshold > 0 &&
        subtract_all(q, w, x, atoms, w.members, count, w.value) < q.residual_threshold)
      break;
  }
  for (int64_t s = 0; s < q.k; s++) q.values[b * q.k + s] = 0;
  for (int64_t p = 0; p < count; p++) q.values[b * q.k + w.members[p]] = float(w.value[p]);
  for (int64_t s = t; s < q.k; s++) atoms[s] = 0;
  q.steps[b] = t;
}

static void refit_row(const Orthogonal& q, int64_t b, const OrthogonalScratch& w) {
  q.gradient ? gradient_row(q, b, w) : orthogonal_row(q, b, w);
}

}  // namespace MPSAE_ISA
}  // namespace mpsae
