// Correlations of some rows with every atom, bf16 x bf16 -> fp32, for CPUs with AVX512-BF16.
//
// rows:   [groups, pairs, TILE_B]      two neighbouring columns of a row in each 32 bits
// packed: [n / TILE_N, pairs, TILE_N]  the same of the encoder
// A panel of TILE_N atoms stays in cache while all groups of rows pass; 24 accumulators.
#include "problem.h"

#if defined(__x86_64__) && defined(__GNUC__)
#include <immintrin.h>

namespace mpsae {

#define MPSAE_BF16 __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx512bf16")))

MPSAE_BF16 static void tile(const uint32_t* rows, const uint16_t* panel, int64_t pairs,
                            float* correlation, int64_t stride) {
  __m512 sum[TILE_B][2];
#pragma GCC unroll 16
  for (int b = 0; b < TILE_B; b++) sum[b][0] = sum[b][1] = _mm512_setzero_ps();
  for (int64_t i = 0; i < pairs; i++) {
    const __m512bh e0 = (__m512bh)_mm512_loadu_si512(panel + i * 2 * TILE_N);
    const __m512bh e1 = (__m512bh)_mm512_loadu_si512(panel + i * 2 * TILE_N + TILE_N);
#pragma GCC unroll 16
    for (int b = 0; b < TILE_B; b++) {
      const __m512bh x = (__m512bh)_mm512_set1_epi32(int(rows[i * TILE_B + b]));
      sum[b][0] = _mm512_dpbf16_ps(sum[b][0], x, e0);
      sum[b][1] = _mm512_dpbf16_ps(sum[b][1], x, e1);
    }
  }
#pragma GCC unroll 16
  for (int b = 0; b < TILE_B; b++) {
    _mm512_storeu_ps(correlation + b * stride, sum[b][0]);
    _mm512_storeu_ps(correlation + b * stride + 16, sum[b][1]);
  }
}

void product_bf16(const uint32_t* rows, int64_t groups, const uint16_t* packed, int64_t n,
                  int64_t pairs, float* correlation, int64_t stride) {
  for (int64_t first = 0; first < n; first += TILE_N)
    for (int64_t g = 0; g < groups; g++)
      tile(rows + g * pairs * TILE_B, packed + first * pairs * 2, pairs,
           correlation + g * TILE_B * stride + first, stride);
}

}  // namespace mpsae
#endif
