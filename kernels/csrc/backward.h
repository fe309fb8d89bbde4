// Reverse of the pursuit. From the last residual r_k, with g = dL/dr_k:
//
//     for t = steps-1 .. 0:  r_t = r_{t+1} + a_t d_j
//                            s   = dL/da_t - <g, d_j>            (0 where relu cut it off)
//                            grad_encoder[j] += s r_t,  grad_bias[j] += s
//                            grad_dictionary[j] -= a_t g         (g before its update)
//                            g  += s e_j                         (not with a detached residual)
//     dL/dx = g
//
// Two passes: s and dL/dx row by row, then the sums by columns: a thread owns some columns of d for
// all rows, so the sums need no atomics and have one order whatever the number of threads.
#pragma once
#include "problem.h"
#include "simd.h"

namespace mpsae {
namespace MPSAE_ISA {

static inline void fetch_row(const float* p, int64_t count) {
  for (int64_t i = 0; i < count; i += 16) fetch(p + i);
}

static inline float dot(const float* a, const float* b, int64_t d) {
  Float s0 = fill(0), s1 = s0, s2 = s0, s3 = s0;
  int64_t i = 0;
  for (; i + 4 * LANES <= d; i += 4 * LANES) {
    s0 = fused(load(a + i), load(b + i), s0);
    s1 = fused(load(a + i + LANES), load(b + i + LANES), s1);
    s2 = fused(load(a + i + 2 * LANES), load(b + i + 2 * LANES), s2);
    s3 = fused(load(a + i + 3 * LANES), load(b + i + 3 * LANES), s3);
  }
  for (; i + LANES <= d; i += LANES) s0 = fused(load(a + i), load(b + i), s0);
  float v[LANES];
  store(v, add(add(s0, s1), add(s2, s3)));
  float sum = 0;
  for (int l = 0; l < LANES; l++) sum += v[l];
  for (; i < d; i++) sum += a[i] * b[i];
  return sum;
}

// g is the row of grad_x; it starts as the row of grad_residual.
static void backward_row(const Backward& q, int64_t row, float* g) {
  const int64_t* indices = q.indices + row * q.k;
  const int64_t d = q.d;
  for (int64_t t = q.steps[row] - 1; t >= 0; t--) {
    if (t > 0) fetch_row(q.dictionary + indices[t - 1] * d, d);
    const int64_t j = indices[t];
    const float a = q.values[row * q.k + t];
    float s = 0;
    if (!q.relu || a > 0) {
      s = -dot(g, q.dictionary + j * d, d);
      if (q.grad_values) s += q.grad_values[row * q.k + t];
    }
    q.share[row * q.k + t] = s;
    if (q.detach || s == 0) continue;
    const float* e = q.encoder + j * d;
    const Float by = fill(s);
    int64_t i = 0;
    for (; i + LANES <= d; i += LANES) store(g + i, fused(by, load(e + i), load(g + i)));
    for (; i < d; i++) g[i] += s * e[i];
  }
}

template <bool TIED, bool DETACH>
static void step_columns(const Backward& q, int64_t j, float a, float s, int64_t first,
                         int64_t last, float* r, float* g) {
  const float* atom = q.dictionary + j * q.d;
  const float* e = q.encoder + j * q.d;
  float* to_dictionary = q.grad_dictionary + j * q.d;
  float* to_encoder = q.grad_encoder + j * q.d;
  const Float va = fill(a), vs = fill(s);
  int64_t i = first;
  for (; i + LANES <= last; i += LANES) {
    const Float d0 = load(atom + i);
    const Float r0 = fused(va, d0, load(r + i));
    const Float g0 = load(g + i);
    store(r + i, r0);
    if (TIED) {
      store(to_dictionary + i, negated(va, g0, fused(vs, r0, load(to_dictionary + i))));
    } else {
      store(to_encoder + i, fused(vs, r0, load(to_encoder + i)));
      store(to_dictionary + i, negated(va, g0, load(to_dictionary + i)));
    }
    if (!DETACH) store(g + i, fused(vs, TIED ? d0 : load(e + i), g0));
  }
  for (; i < last; i++) {
    r[i] += a * atom[i];
    to_encoder[i] += s * r[i];
    to_dictionary[i] -= a * g[i];
    if (!DETACH) g[i] += s * e[i];
  }
}

// r and g: scratch of d floats each.
static void backward_columns(const Backward& q, int64_t first, int64_t last, float* r, float* g) {
  const int64_t d = q.d, width = last - first;
  const size_t bytes = size_t(width) * sizeof(float);
  const auto step = q.tied ? (q.detach ? step_columns<true, true> : step_columns<true, false>)
                           : (q.detach ? step_columns<false, true> : step_columns<false, false>);
  for (int64_t row = 0; row < q.B; row++) {
    const int64_t* indices = q.indices + row * q.k;
    std::memcpy(r + first, q.residual + row * d + first, bytes);
    if (q.grad_residual)
      std::memcpy(g + first, q.grad_residual + row * d + first, bytes);
    else
      std::memset(g + first, 0, bytes);
    for (int64_t t = q.steps[row] - 1; t >= 0; t--) {
      if (t > 0) {
        const int64_t ahead = indices[t - 1] * d + first;
        fetch_row(q.dictionary + ahead, width);
        fetch_row(q.grad_dictionary + ahead, width);
        if (!q.tied) {
          fetch_row(q.encoder + ahead, width);
          fetch_row(q.grad_encoder + ahead, width);
        }
      }
      const float s = q.share[row * q.k + t];
      step(q, indices[t], q.values[row * q.k + t], s, first, last, r, g);
      if (q.grad_bias && first == 0) q.grad_bias[indices[t]] += s;
    }
  }
}

}  // namespace MPSAE_ISA
}  // namespace mpsae
