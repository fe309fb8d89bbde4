// Correlations of some rows with every atom, bf16 x bf16 -> fp32, for CPUs with AVX512-BF16.
//
// rows:   [groups, pairs, TILE_B]      two neighbouring columns of a row in each 32 bits
// packed: [n / TILE_N, pairs, TILE_N]  the same of the encoder
// A panel of TILE_N atoms stays in cache while all groups of rows pass; 24 accumulators.
#include "problem.h"

#if defined(MPSAE_X86)
#include <immintrin.h>

#include <cmath>

namespace mpsae {

#define MPSAE_BF16 __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx512bf16")))

MPSAE_BF16 static void tile(const uint32_t* rows, const uint32_t* panel, int64_t pairs,
                            float* correlation, int64_t stride) {
  __m512 sum[TILE_B][2];
#pragma GCC unroll 16
  for (int b = 0; b < TILE_B; b++) sum[b][0] = sum[b][1] = _mm512_setzero_ps();
  for (int64_t i = 0; i < pairs; i++) {
    const __m512bh e0 = (__m512bh)_mm512_loadu_si512(panel + i * TILE_N);
    const __m512bh e1 = (__m512bh)_mm512_loadu_si512(panel + i * TILE_N + 16);
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

void product_bf16(const uint32_t* rows, int64_t groups, const uint32_t* packed, int64_t n,
                  int64_t pairs, float* correlation, int64_t stride) {
  for (int64_t first = 0; first < n; first += TILE_N)
    for (int64_t g = 0; g < groups; g++)
      tile(rows + g * pairs * TILE_B, packed + first * pairs, pairs,
           correlation + g * TILE_B * stride + first, stride);
}

MPSAE_BF16 double pack_bf16(const float* v, int64_t d, uint32_t* out, int64_t stride) {
  __m512d miss = _mm512_setzero_pd();
  for (int64_t i = 0; i < d; i += 16) {
    const int64_t width = d - i < 16 ? d - i : 16;
    const __m512 value = _mm512_maskz_loadu_ps(__mmask16((1u << width) - 1), v + i);
    const __m256i half = (__m256i)_mm512_cvtneps_pbh(value);
    const __m512 back =
        _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(half), 16));
    const __m512 gap = _mm512_sub_ps(value, back);
    const __m512d low = _mm512_cvtps_pd(_mm512_castps512_ps256(gap));
    const __m512d high = _mm512_cvtps_pd(_mm512_extractf32x8_ps(gap, 1));
    miss = _mm512_fmadd_pd(low, low, _mm512_fmadd_pd(high, high, miss));
    uint32_t pair[8];
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(pair), half);
    for (int64_t l = 0; l < (width + 1) / 2; l++) out[(i / 2 + l) * stride] = pair[l];
  }
  return std::sqrt(_mm512_reduce_add_pd(miss));
}

}  // namespace mpsae

#else

namespace mpsae {

// has_bf16() is false here, and nobody packs or multiplies
void product_bf16(const uint32_t*, int64_t, const uint32_t*, int64_t, int64_t, float*, int64_t) {}
double pack_bf16(const float*, int64_t, uint32_t*, int64_t) { return 0; }

}  // namespace mpsae
#endif
