// Orthogonal matching pursuit of one row, in the domain of correlations (Batch-OMP). Compiled once
// per instruction set.
//
// With S the atoms in use and v their coefficients, c = c_0 - sum_s v_s G[j_s]: the rows of the
// Gram in use stay in cache, a tile of c stays in registers while all of them pass, and the maxima
// are kept on the way. c and G are fp32 and only choose. The small algebra is fp64: the inverse
// of G over the atoms fitted grows and shrinks by updates of rank one. The last fit is corrected
// by residuals in fp64, so that the values are those of the atoms and not of the rounded Gram.
#pragma once
#include "backward.h"
#include "inverse.h"
#include "pursuit.h"

namespace mpsae {
namespace MPSAE_ISA {

// An atom is dependent on those in use below this squared distance from their span, over ||d||^2.
constexpr double DEPENDENT = 1e-6;
// Below this one the rounding of the Gram shows in the distance: it is taken from the atoms.
constexpr double DOUBTFUL = 1e-3;
// A gradient is 0 below this share of the terms it is made of.
constexpr double GRADIENT_ROUNDING = 1e-12;

constexpr int64_t TILE = MPSAE_LEVEL == 3 ? 16 : 8;  // vectors of a tile: half of the registers
constexpr int64_t WIDTH = TILE * LANES;
constexpr int64_t AHEAD = 2 * WIDTH;  // columns of a new Gram row that are fetched at once

// Keep the compiler from giving each vector of a tile a register for its address.
static inline void hide(const float*& p) {
#if defined(__GNUC__)
  asm("" : "+r"(p));
#else
  (void)p;
#endif
}

// V vectors of c from column i on; returns the maximum of their scores, lane by lane.
template <bool ABS, int V>
static inline Float correlate(const float* start, const float* const* rows, const float* weight,
                              int64_t count, int64_t i, float* c) {
  Float sum[V];
  for (int m = 0; m < V; m++) sum[m] = load(start + i + m * LANES);
  for (int64_t s = 0; s < count; s++) {
    const Float by = fill(weight[s]);
    const float* row = rows[s] + i;
    hide(row);
    for (int m = 0; m < V; m++) sum[m] = negated(by, load(row + m * LANES), sum[m]);
  }
  Float top = fill(NOTHING);
  for (int m = 0; m < V; m++) {
    store(c + i + m * LANES, sum[m]);
    top = larger(score_of<ABS>(sum[m]), top);
  }
  return top;
}

// c for all atoms, and the best of them; -1 where no score is above the threshold. `coming` is a
// row that is not in cache but for its first AHEAD columns, or null.
template <bool ABS>
static int64_t best_atom(const Orthogonal& q, const OrthogonalScratch& w, const float* start,
                         int64_t count, const float* coming) {
  const int64_t n = q.n, tiles = n / WIDTH;
  float* c = w.correlation;
  Float top = fill(NOTHING);
  for (int64_t tile = 0; tile < tiles; tile++) {
    const int64_t ahead = tile * WIDTH + AHEAD;
    if (coming && ahead < n) fetch_row(coming + ahead, WIDTH < n - ahead ? WIDTH : n - ahead);
    const Float here =
        correlate<ABS, TILE>(start, w.rows, w.weight, count, tile * WIDTH, c);
    store(w.maxima + tile * LANES, here);
    top = larger(here, top);
  }
  int64_t i = tiles * WIDTH;
  for (; i + 4 * LANES <= n; i += 4 * LANES)
    top = larger(correlate<ABS, 4>(start, w.rows, w.weight, count, i, c), top);
  for (; i + LANES <= n; i += LANES)
    top = larger(correlate<ABS, 1>(start, w.rows, w.weight, count, i, c), top);
  float best = largest(top);
  if (i < n && n >= LANES) {
    // the last vector covers columns once more, with the same result
    const float edge =
        largest(correlate<ABS, 1>(start, w.rows, w.weight, count, n - LANES, c));
    best = edge > best ? edge : best;
  } else {
    for (; i < n; i++) {
      c[i] = start[i];
      for (int64_t s = 0; s < count; s++) c[i] -= w.weight[s] * w.rows[s][i];
      const float here = ABS ? std::fabs(c[i]) : c[i];
      best = here > best ? here : best;
    }
  }
  if (!(double(best) > q.correlation_threshold)) return -1;
  const Float bar = fill(best);
  int64_t tile = 0;
  while (tile < tiles && !at_least(load(w.maxima + tile * LANES), bar)) tile++;
  i = tile * WIDTH;
  while (i + LANES <= n && !at_least(score_of<ABS>(load(c + i)), bar)) i += LANES;
  for (; i < n; i++)
    if ((ABS ? std::fabs(c[i]) : c[i]) == best) return i;
  return -1;
}

static inline const float* atom_of(const Orthogonal& q, const int64_t* atoms,
                                   const int64_t* members, int64_t p) {
  return q.dictionary + atoms[members ? members[p] : p] * q.d;
}

// w.residual = y - sum over the atoms of `members` of value[p] d_p; returns its norm
static double subtract_all(const Orthogonal& q, const OrthogonalScratch& w, const float* y,
                           const int64_t* atoms, const int64_t* members, int64_t count,
                           const double* value) {
  for (int64_t i = 0; i < q.d; i++) w.residual[i] = double(y[i]);
  double norm = std::sqrt(dot64(w.residual, w.residual, q.d));
  for (int64_t p = 0; p < count; p++) {
    if (p + 1 < count) fetch_row(atom_of(q, atoms, members, p + 1), q.d);
    norm = subtract_atom(w.residual, atom_of(q, atoms, members, p), value[p], q.d);
  }
  return norm;
}

// Correct coefficients of y by the residual that they leave: what the rounding of the Gram did to
// them shrinks by that rounding times the condition of the inverse. Returns the largest change
// over the largest coefficient; nothing is changed where it is not finite.
static double correct(const Orthogonal& q, const OrthogonalScratch& w, const float* y,
                      const int64_t* atoms, const int64_t* members, int64_t count,
                      const double* inverse, double* value) {
  subtract_all(q, w, y, atoms, members, count, value);
  for (int64_t p = 0; p < count; p++)
    w.gradient[p] = dot(w.residual, atom_of(q, atoms, members, p), q.d);
  multiply(inverse, w.stride, count, w.gradient, w.change);
  double most = 0, size = 0;
  for (int64_t p = 0; p < count; p++) {
    if (!(std::fabs(w.change[p]) < std::numeric_limits<double>::infinity())) return 0;
    most = std::fmax(most, std::fabs(w.change[p]));
    size = std::fmax(size, std::fabs(value[p]));
  }
  for (int64_t p = 0; p < count; p++) value[p] += w.change[p];
  return size > 0 ? most / size : 0;
}

// argmin ||x - v D_S||^2 over v >= 0 (Lawson and Hanson), from the fit before the last atom came.
// The atoms of w.members[0 .. fitted) are fitted, the others of S are 0. Returns how many are.
static int64_t fit_nonnegative(const OrthogonalScratch& w, int64_t count, int64_t fitted) {
  const int64_t stride = w.stride;
  int64_t* members = w.members;
  // In exact arithmetic each round lowers the error, so no set comes back and there is an end.
  // Rounding could make a circle of two sets of the same error: either is the fit, so stop.
  for (int64_t round = 0; round < 3 * count; round++) {
    int64_t enter = -1;
    double steepest = 0;
    for (int64_t s = 0; s < count; s++) {
      if (w.fitted[s]) continue;
      double down = w.start[s], size = std::fabs(down);
      for (int64_t p = 0; p < fitted; p++) {
        const double term = w.value[members[p]] * w.pairs[s * stride + members[p]];
        down -= term;
        size += std::fabs(term);
      }
      if (down > GRADIENT_ROUNDING * size && down > steepest) steepest = down, enter = s;
    }
    if (enter < 0) break;
    for (int64_t p = 0; p < fitted; p++) w.g[p] = w.pairs[enter * stride + members[p]];
    multiply(w.fit, stride, fitted, w.g, w.u);
    const double square = w.pairs[enter * stride + enter];
    const double left = square - dot64(w.g, w.u, fitted);
    // only rounding brings it here: the distance was above DEPENDENT when the atom was taken
    if (!(left > DEPENDENT * DOUBTFUL * square)) break;
    append(w.fit, stride, fitted, w.u, left);
    members[fitted++] = enter;
    w.fitted[enter] = true;
    for (int64_t p = 0; p < fitted; p++)
      w.target[p] = w.value[members[p]] - steepest / left * w.u[p];
    for (;;) {
      // as far towards the target as all stay at 0 or above; those that come to 0 leave
      double way = 1;
      int64_t stop = -1;
      for (int64_t p = 0; p < fitted; p++) {
        if (w.target[p] > 0) continue;
        const double here = w.value[members[p]];
        const double until = here > 0 ? here / (here - w.target[p]) : 0;
        if (stop < 0 || until < way) way = until, stop = p;
      }
      if (stop < 0) break;
      for (int64_t p = 0; p < fitted; p++) {
        double& here = w.value[members[p]];
        here += way * (w.target[p] - here);
        if (p == stop || here < 0) here = 0;
      }
      for (int64_t p = fitted - 1; p >= 0; p--) {
        if (w.value[members[p]] > 0 || (p != stop && w.target[p] > 0)) continue;
        remove(w.fit, stride, fitted, p, w.u);
        w.fitted[members[p]] = false;
        members[p] = members[--fitted];
        w.target[p] = w.target[fitted];
      }
      for (int64_t p = 0; p < fitted; p++) w.g[p] = w.start[members[p]];
      multiply(w.fit, stride, fitted, w.g, w.target);
    }
    for (int64_t p = 0; p < fitted; p++) w.value[members[p]] = w.target[p];
  }
  return fitted;
}

// Whether ||r|| is above the threshold for certain: from ||r||^2 = ||x||^2 - v . c_0, less what the
// rounding of c_0 and of the Gram may have done to it. `size` is ||x||, `longest` the largest ||d||.
static bool surely_above(const Orthogonal& q, const OrthogonalScratch& w, int64_t count,
                         double size, double longest) {
  double square = size * size, sum = 0;
  for (int64_t s = 0; s < count; s++) {
    square -= w.value[s] * w.start[s];
    sum += std::fabs(w.value[s]) * longest;
  }
  // d u ||a|| ||b|| with u = 2^-24 bounds an fp32 product in any order of summation
  const double rounding = double(q.d + 2) * 0x1p-24 * 1.01 * sum * (2 * size + sum);
  return square - rounding > q.residual_threshold * q.residual_threshold;
}

// `start` [n] is x . dictionary^T; NaN comes to the places of the atoms taken.
static void orthogonal_row(const Orthogonal& q, int64_t b, const OrthogonalScratch& w) {
  const int64_t n = q.n, d = q.d, stride = w.stride;
  const float* x = q.x + b * d;
  float* start = q.correlation + b * n;
  int64_t* atoms = q.indices + b * q.k;
  int64_t limit = q.k_rows && q.k_rows[b] < q.k ? q.k_rows[b] : q.k;
  // d atoms that are independent span everything: the next one would depend on them
  for (const int64_t most : {n, d}) limit = limit < most ? limit : most;
  const auto choose = q.select == ABS ? best_atom<true> : best_atom<false>;
  double* fit = q.nonnegative ? w.fit : w.span;
  const double size = q.residual_threshold > 0 ? norm(x, d) : 0;
  double longest = 0;
  const float* coming = nullptr;
  int64_t t = 0, fitted = 0, used = 0;
  while (t < limit) {
    const int64_t j = choose(q, w, start, used, coming);
    if (j < 0) break;
    coming = q.gram + j * n;
    fetch_row(coming, AHEAD < n ? AHEAD : n);
    // columns of the rows that are in cache: the row of j is only on its way
    for (int64_t s = 0; s < t; s++) w.g[s] = double(q.gram[atoms[s] * n + j]);
    const double square = double(q.gram[j * n + j]);
    multiply(w.span, stride, t, w.g, w.u);
    double left = square - dot64(w.g, w.u, t);
    if (!(left >= DOUBTFUL * square)) {
      correct(q, w, q.dictionary + j * d, atoms, nullptr, t, w.span, w.u);
      left = subtract_all(q, w, q.dictionary + j * d, atoms, nullptr, t, w.u);
      left *= left;
    }
    if (!(left > DEPENDENT * square)) break;
    append(w.span, stride, t, w.u, left);
    atoms[t] = j;
    w.start[t] = double(start[j]);
    w.value[t] = 0;
    start[j] = BANNED;
    if (q.nonnegative) {
      for (int64_t s = 0; s < t; s++)
        w.pairs[t * stride + s] = w.pairs[s * stride + t] = w.g[s];
      w.pairs[t * stride + t] = square;
      w.fitted[t] = false;
      fitted = fit_nonnegative(w, t + 1, fitted);
    } else {
      const double share = (w.start[t] - dot64(w.g, w.value, t)) / left;
      for (int64_t s = 0; s <= t; s++) w.value[s] -= share * w.u[s];
      w.members[t] = t;
      fitted = t + 1;
    }
    t++;
    used = 0;
    for (int64_t s = 0; s < t; s++) {
      w.rows[used] = q.gram + atoms[s] * n;
      w.weight[used] = float(w.value[s]);
      used += w.value[s] != 0;
    }
    longest = std::fmax(longest, std::sqrt(square));
    if (q.residual_threshold > 0 && !surely_above(q, w, t, size, longest) &&
        subtract_all(q, w, x, atoms, nullptr, t, w.value) < q.residual_threshold)
      break;
  }
  for (int64_t p = 0; p < fitted; p++) w.target[p] = w.value[w.members[p]];
  double first = 1;  // the first change is also the rate at which they shrink
  for (int pass = 0; pass < 8; pass++) {
    const double change = correct(q, w, x, atoms, w.members, fitted, fit, w.target);
    if (pass == 0) first = change;
    if (first * change < 1e-8) break;
  }
  for (int64_t p = 0; p < fitted; p++)
    w.value[w.members[p]] = q.nonnegative && !(w.target[p] > 0) ? 0 : w.target[p];
  for (int64_t s = 0; s < q.k; s++) {
    q.values[b * q.k + s] = s < t ? float(w.value[s]) : 0.0f;
    if (s >= t) atoms[s] = 0;
  }
  q.steps[b] = t;
}

}  // namespace MPSAE_ISA
}  // namespace mpsae
