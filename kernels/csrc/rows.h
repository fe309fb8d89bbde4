// The beginning and the end of a row, and the error bounds its correlations begin with.
#pragma once
#include <cmath>
#include <limits>

#include "driver.h"

namespace mpsae {

constexpr double EPS = 1.1920929e-7;
constexpr double TINY = 1.1754944e-38;

inline int64_t blocks_of(int64_t n) { return (round_up(n, PAD) + BLOCK - 1) / BLOCK; }

inline bool finite(double value) { return std::fabs(value) < std::numeric_limits<double>::infinity(); }

// Rounding bound of an fp32 product of a vector of this norm with every encoder row, bias added.
inline double product_bound(const Problem& p, double norm) {
  if (norm == 0) return 0;
  return EPS * ((double(p.d) + 2) * norm * p.encoder_norm + p.bias_size) +
         TINY * double(p.d) * (4 + norm + p.encoder_norm);
}

inline double packed_bound(const Problem& p, double norm, double miss) {
  if (norm == 0) return 0;
  return (miss * p.encoder_norm + (norm + miss) * p.packed_error) * (1 + 1e-6) +
         product_bound(p, norm + miss);
}

// Where row `at` of a block goes among the packed rows.
inline uint32_t* place(uint32_t* packed, int64_t at, int64_t pairs) {
  return packed + at / TILE_B * TILE_B * pairs + at % TILE_B;
}

// Begin a row: the residual in fp64, its norm, no step taken. False where it is not finite.
inline bool open_row(const Problem& p, Row& row, int64_t b) {
  row.row = b;
  row.t = 0;
  row.limit = p.k;
  if (p.k_rows) row.limit = p.k_rows[b] < p.k ? p.k_rows[b] : p.k;
  row.excess = 0;
  row.count = 0;
  double sum = 0;
  for (int64_t i = 0; i < p.d; i++) {
    row.residual[i] = p.x[b * p.d + i];
    sum += row.residual[i] * row.residual[i];
  }
  row.norm = std::sqrt(sum);
  row.drift = EPS * (row.norm * p.encoder_norm + p.bias_size);  // exact ones are put in as fp32
  return finite(row.norm) && finite(p.encoder_norm) && finite(p.bias_size);
}

inline void close_row(const Problem& p, const Row& row) {
  p.steps[row.row] = row.t;
  for (int64_t i = 0; i < p.d; i++) p.residual[row.row * p.d + i] = float(row.residual[i]);
}

inline void products(const Problem& p, const uint32_t* rows, int64_t count, float* out, int64_t stride) {
  product_bf16(rows, round_up(count, TILE_B) / TILE_B, p.packed, p.n, (p.d + 1) / 2, out, stride);
}

}  // namespace mpsae
