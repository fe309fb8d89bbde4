// One row of the pursuit: watch the correlations, choose, subtract. Compiled once per instruction
// set.
//
// The correlations c are fp32 and only choose; the residual r is fp64, so that the coefficient
// a = <r, e_j> + b_j and the comparison of near ties are those of an fp64 pursuit.
// With |c_i - (<r, e_i> + b_i)| <= E_i for all i, the best atom is among those with
// c_i + E_i >= max (c_j - E_j): one candidate needs no proof, several are compared by their exact
// correlations. These go into c, and such an atom has a small E_i from then on: it is not compared
// again and again because it stays close to the maximum.
#pragma once
#include "problem.h"
#include "simd.h"

namespace mpsae {
namespace MPSAE_ISA {

// twice the unit roundoff: room for the roundings of the bounds themselves
constexpr double EPS = 1.1920929e-7;
constexpr float NOTHING = -std::numeric_limits<float>::infinity();
constexpr float BANNED = std::numeric_limits<float>::quiet_NaN();

static inline double dot(const double* r, const float* e, int64_t d) {
  Double s0 = fill64(0), s1 = s0, s2 = s0, s3 = s0;
  int64_t i = 0;
  for (; i + 4 * LANES64 <= d; i += 4 * LANES64) {
    s0 = fused64(load64(r + i), load64(e + i), s0);
    s1 = fused64(load64(r + i + LANES64), load64(e + i + LANES64), s1);
    s2 = fused64(load64(r + i + 2 * LANES64), load64(e + i + 2 * LANES64), s2);
    s3 = fused64(load64(r + i + 3 * LANES64), load64(e + i + 3 * LANES64), s3);
  }
  double sum = total(add64(add64(s0, s1), add64(s2, s3)));
  for (; i < d; i++) sum += r[i] * double(e[i]);
  return sum;
}

// r -= a atom; returns ||r||
static inline double subtract_atom(double* r, const float* atom, double a, int64_t d) {
  const Double share = fill64(a);
  Double s0 = fill64(0), s1 = s0;
  int64_t i = 0;
  for (; i + 2 * LANES64 <= d; i += 2 * LANES64) {
    const Double r0 = negated64(share, load64(atom + i), load64(r + i));
    const Double r1 = negated64(share, load64(atom + i + LANES64), load64(r + i + LANES64));
    store64(r + i, r0);
    store64(r + i + LANES64, r1);
    s0 = fused64(r0, r0, s0);
    s1 = fused64(r1, r1, s1);
  }
  double sum = total(add64(s0, s1));
  for (; i < d; i++) {
    r[i] -= a * double(atom[i]);
    sum += r[i] * r[i];
  }
  return std::sqrt(sum);
}

template <bool ABS>
static inline Float score_of(Float c) {
  return ABS ? magnitude(c) : c;
}

static inline double score_of(const Problem& p, double c) {
  return p.select == ABS ? std::fabs(c) : c;
}

template <bool ABS>
static void watch(Row& row, int64_t n) {
  Float top = fill(NOTHING);
  const int64_t padded = round_up(n, PAD);
  float* maxima = row.maxima;
  for (int64_t first = 0; first < padded; first += BLOCK, maxima += LANES) {
    const int64_t last = first + BLOCK < padded ? first + BLOCK : padded;
    Float m0 = fill(NOTHING), m1 = m0;
    for (int64_t i = first; i < last; i += 2 * LANES) {
      m0 = larger(score_of<ABS>(load(row.correlation + i)), m0);
      m1 = larger(score_of<ABS>(load(row.correlation + i + LANES)), m1);
    }
    m0 = larger(m0, m1);
    store(maxima, m0);
    top = larger(m0, top);
  }
  row.top = largest(top);
}

static void start(const Problem& p, Row& row) {
  float* c = row.correlation;
  if (p.bias)
    for (int64_t i = 0; i < p.n; i++) c[i] += p.bias[i];
  for (int64_t i = p.n; i < round_up(p.n, PAD); i++) c[i] = BANNED;
  std::memset(row.scored, 0, size_t(words(p.n)) * sizeof *row.scored);
  if (!p.allow_repeats)
    for (int64_t t = 0; t < row.t; t++) c[p.indices[row.row * p.k + t]] = BANNED;
  if (p.select == ABS)
    watch<true>(row, p.n);
  else
    watch<false>(row, p.n);
}

// Compute all correlations anew from r: bound and correlations belong together again.
static void refresh(const Problem& p, Row& row) {
  for (int64_t i = 0; i < p.n; i++)
    row.correlation[i] = float(dot(row.residual, p.encoder + i * p.d, p.d));
  start(p, row);
  row.bound = row.norm == 0 ? 0 : 2 * EPS * (row.norm * p.encoder_norm + p.bias_size);
  row.drift = row.bound;
  row.excess = 0;
}

struct Window {
  int64_t first, last;
};

static inline Window window_of(const Problem& p, int64_t t) {
  if (!p.slices) return {0, p.n};
  const int64_t first = p.slices[2 * t], last = p.slices[2 * t + 1];
  return {first < 0 ? 0 : first, last > p.n ? p.n : last};
}

template <bool ABS>
static float window_top(const Row& row, Window w) {
  Float top = fill(NOTHING);
  float edge = NOTHING;
  for (int64_t q = w.first / BLOCK; q * BLOCK < w.last; q++) {
    if (q * BLOCK >= w.first && (q + 1) * BLOCK <= w.last) {
      top = larger(load(row.maxima + q * LANES), top);
      continue;
    }
    const int64_t first = w.first > q * BLOCK ? w.first : q * BLOCK;
    const int64_t last = w.last < (q + 1) * BLOCK ? w.last : (q + 1) * BLOCK;
    for (int64_t i = first; i < last; i++) {
      const float s = ABS ? std::fabs(row.correlation[i]) : row.correlation[i];
      edge = s > edge ? s : edge;
    }
  }
  const float inner = largest(top);
  return inner > edge ? inner : edge;
}

template <bool ABS>
static int64_t collect(Row& row, int64_t n, float least, Window w) {
  const Float limit = fill(least);
  const int64_t padded = round_up(n, PAD);
  int64_t count = 0;
  for (int64_t q = w.first / BLOCK; q * BLOCK < w.last; q++) {
    if (!at_least(load(row.maxima + q * LANES), limit)) continue;
    const int64_t last = (q + 1) * BLOCK < padded ? (q + 1) * BLOCK : padded;
    for (int64_t i = q * BLOCK; i < last; i += LANES) {
      uint32_t hits = at_least(score_of<ABS>(load(row.correlation + i)), limit);
      for (int64_t l = 0; hits; l++, hits >>= 1)
        if ((hits & 1) && i + l >= w.first && i + l < w.last)
          row.candidates[count++] = int32_t(i + l);
    }
  }
  return count;
}

static inline bool is_scored(const Row& row, int64_t atom) {
  return row.scored[atom / 64] >> (atom % 64) & 1;
}

// What a correlation may be off. An eighth of the bound is more than errors come to in practice,
// though nothing proves it: that is what a pursuit without certificate goes by.
static inline double reach(const Problem& p, const Row& row, int64_t atom) {
  return (is_scored(row, atom) ? row.drift : row.bound) * (p.certified ? 1 : 0.125);
}

// Keep the candidates that may be the best; returns how many of them were never scored.
static int64_t narrow(const Problem& p, Row& row) {
  double low = NOTHING;
  for (int64_t i = 0; i < row.count; i++) {
    const int64_t atom = row.candidates[i];
    const double sure = score_of(p, row.correlation[atom]) - reach(p, row, atom);
    low = sure > low ? sure : low;
  }
  int64_t kept = 0, fresh = 0;
  for (int64_t i = 0; i < row.count; i++) {
    const int64_t atom = row.candidates[i];
    if (score_of(p, row.correlation[atom]) + reach(p, row, atom) < low) continue;
    fresh += !is_scored(row, atom);
    row.candidates[kept++] = int32_t(atom);
  }
  row.count = kept;
  return fresh;
}

static bool scan(const Problem& p, Row& row) {
  if (row.t >= row.limit) return false;
  const Window w = window_of(p, row.t);
  const bool absolute = p.select == ABS;
  for (bool refreshed = false;; refreshed = true) {
    if (!(row.bound < std::numeric_limits<double>::infinity())) return false;
    float top = row.top;
    if (p.slices) top = absolute ? window_top<true>(row, w) : window_top<false>(row, w);
    if (!(top > NOTHING)) return false;
    if (double(top) + row.bound <= p.correlation_threshold) return false;
    const double window = row.bound * (p.certified ? 2 : 0.25);
    const float least = window > 0 ? std::nextafter(float(double(top) - window), NOTHING) : top;
    row.count = absolute ? collect<true>(row, p.n, least, w) : collect<false>(row, p.n, least, w);
    if (window == 0 && row.count > 1) row.count = 1;  // exact: the lowest index it is
    const int64_t fresh = row.count > 1 ? narrow(p, row) : 0;
    // scoring many candidates costs more than computing all correlations once
    if (refreshed || row.bound == 0 || row.excess + fresh <= p.n / 4 + 1) {
      row.excess += fresh;
      break;
    }
    refresh(p, row);
  }
  for (int64_t i = 0; i < row.count && i < 8; i++) {
    const float* e = p.encoder + int64_t(row.candidates[i]) * p.d;
    for (int64_t l = 0; l < p.d; l += 16) fetch(e + l);
  }
  return row.count > 0;
}

static double correlate(const Problem& p, const Row& row, int64_t atom) {
  const double c = dot(row.residual, p.encoder + atom * p.d, p.d);
  return p.bias ? c + double(p.bias[atom]) : c;
}

static bool decide(const Problem& p, Row& row) {
  double low = NOTHING;
  for (int64_t i = 0; i < row.count; i++) {
    const int64_t atom = row.candidates[i];
    double sure;
    if (is_scored(row, atom)) {
      row.exact[i] = BANNED;
      sure = score_of(p, row.correlation[atom]) - reach(p, row, atom);
    } else {
      row.exact[i] = correlate(p, row, atom);
      sure = score_of(p, row.exact[i]);
    }
    low = sure > low ? sure : low;
  }
  int64_t best = -1, compared = 0;
  for (int64_t i = 0; i < row.count; i++) {
    const int64_t atom = row.candidates[i];
    if (is_scored(row, atom)) {
      if (score_of(p, row.correlation[atom]) + reach(p, row, atom) < low) continue;
      row.exact[i] = correlate(p, row, atom);
    }
    const double c = row.exact[i];
    if (c != c) continue;
    compared++;
    row.correlation[atom] = float(c);
    row.scored[atom / 64] |= uint64_t(1) << (atom % 64);
    if (best < 0 || score_of(p, c) > score_of(p, row.exact[best])) best = i;
  }
  if (best < 0) return false;
  row.atom = row.candidates[best];
  row.best = row.exact[best];
  if (!(score_of(p, row.best) > p.correlation_threshold)) return false;
  p.rescored[row.row] += compared > 1;
  row.value = p.select == RELU && row.best < 0 ? 0 : row.best;

  int64_t* indices = p.indices + row.row * p.k;
  bool repeated = false;
  if (p.stop_on_repeat)
    for (int64_t t = 0; t < row.t; t++) repeated |= indices[t] == row.atom;
  indices[row.t] = row.atom;
  p.values[row.row * p.k + row.t] = float(row.value);
  row.norm = subtract_atom(row.residual, p.dictionary + row.atom * p.d, row.value, p.d);
  row.t++;
  if (repeated || row.t >= row.limit) return false;
  if (!(row.norm < std::numeric_limits<double>::infinity())) return false;
  return !(p.residual_threshold > 0 && row.norm < p.residual_threshold);
}

template <bool ABS, class Entry>
static void subtract_entries(Row& row, const Entry* entries, float share, int64_t n,
                             const char* next) {
  const Float a = fill(share);
  const int64_t padded = round_up(n, PAD);
  float* c = row.correlation;
  float* maxima = row.maxima;
  Float top = fill(NOTHING);
  for (int64_t first = 0; first < padded; first += BLOCK, maxima += LANES) {
    const int64_t last = first + BLOCK < padded ? first + BLOCK : padded;
    Float m0 = fill(NOTHING), m1 = m0;
    for (int64_t i = first; i < last; i += PAD) {
      for (int64_t line = 0; line < int64_t(PAD * sizeof(Entry)); line += 64)
        fetch(next + i * int64_t(sizeof(Entry)) + line);
      for (int64_t v = 0; v < PAD; v += 2 * LANES) {
        const int64_t at = i + v;
        const Float c0 = negated(a, load(entries + at), load(c + at));
        const Float c1 = negated(a, load(entries + at + LANES), load(c + at + LANES));
        store(c + at, c0);
        store(c + at + LANES, c1);
        m0 = larger(score_of<ABS>(c0), m0);
        m1 = larger(score_of<ABS>(c1), m1);
      }
    }
    m0 = larger(m0, m1);
    store(maxima, m0);
    top = larger(m0, top);
  }
  row.top = largest(top);
}

template <class Entry>
static void subtract(const Problem& p, Row& row, const Entry* entries, float scale,
                     float diagonal, float error, const void* next) {
  const double a = std::fabs(row.value);
  const double more = a * double(error) +
                      EPS * (4 * a * p.dictionary_norm * p.encoder_norm +
                             row.norm * p.encoder_norm + p.bias_size + row.bound);
  row.bound += more;
  row.drift += more;
  // entries[j, j] is 0, so the pass below leaves this place as it is
  row.correlation[row.atom] =
      p.allow_repeats ? float(row.best - row.value * double(diagonal)) : BANNED;
  const float share = float(row.value * double(scale));
  const char* ahead = static_cast<const char*>(next ? next : entries);
  if (p.select == ABS)
    subtract_entries<true>(row, entries, share, p.n, ahead);
  else
    subtract_entries<false>(row, entries, share, p.n, ahead);
}

static void subtract16(const Problem& p, Row& row, const int16_t* entries, float scale,
                       float diagonal, float error, const void* next) {
  subtract(p, row, entries, scale, diagonal, error, next);
}

static void subtract32(const Problem& p, Row& row, const float* entries, float scale,
                       float diagonal, float error, const void* next) {
  subtract(p, row, entries, scale, diagonal, error, next);
}

static double norm(const float* row, int64_t d) {
  Double s0 = fill64(0), s1 = s0;
  int64_t i = 0;
  for (; i + 2 * LANES64 <= d; i += 2 * LANES64) {
    const Double a = load64(row + i), b = load64(row + i + LANES64);
    s0 = fused64(a, a, s0);
    s1 = fused64(b, b, s1);
  }
  double sum = total(add64(s0, s1));
  for (; i < d; i++) sum += double(row[i]) * double(row[i]);
  return std::sqrt(sum);
}

}  // namespace MPSAE_ISA
}  // namespace mpsae
