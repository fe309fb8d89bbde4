// Vectors of floats and doubles for the instruction set that the including file is compiled for.
// MPSAE_ISA names the namespace: the same code in several files must not share symbols.
#pragma once
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>

#include "problem.h"
#if defined(__x86_64__) && defined(__GNUC__)
#include <immintrin.h>
#endif

#if MPSAE_LEVEL >= 2 && defined(__clang__)
#if MPSAE_LEVEL == 3
#pragma clang attribute push(__attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,fma"))), \
                             apply_to = function)
#else
#pragma clang attribute push(__attribute__((target("avx2,fma"))), apply_to = function)
#endif
#elif MPSAE_LEVEL == 3
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,fma")
#elif MPSAE_LEVEL == 2
#pragma GCC target("avx2,fma")
#endif

namespace mpsae {
namespace MPSAE_ISA {

// larger(a, b) is b where a is NaN: banned and padded places never win
#if MPSAE_LEVEL == 3

constexpr int64_t LANES = 16;
constexpr int64_t LANES64 = 8;
using Float = __m512;
using Double = __m512d;
static inline Float fill(float a) { return _mm512_set1_ps(a); }
static inline Float load(const float* p) { return _mm512_loadu_ps(p); }
static inline Float load(const int16_t* p) {
  return _mm512_cvtepi32_ps(
      _mm512_cvtepi16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p))));
}
static inline void store(float* p, Float a) { _mm512_storeu_ps(p, a); }
static inline void store16(int16_t* p, Float a) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p),
                      _mm512_cvtepi32_epi16(_mm512_cvtps_epi32(a)));
}
static inline Float add(Float a, Float b) { return _mm512_add_ps(a, b); }
static inline Float sub(Float a, Float b) { return _mm512_sub_ps(a, b); }
static inline Float mul(Float a, Float b) { return _mm512_mul_ps(a, b); }
static inline Float fused(Float a, Float b, Float c) { return _mm512_fmadd_ps(a, b, c); }
static inline Float negated(Float a, Float b, Float c) { return _mm512_fnmadd_ps(a, b, c); }
static inline Float larger(Float a, Float b) { return _mm512_max_ps(a, b); }
static inline Float magnitude(Float a) { return _mm512_abs_ps(a); }
static inline uint32_t at_least(Float a, Float b) {
  return _mm512_cmp_ps_mask(a, b, _CMP_GE_OQ);
}
static inline Float whole(Float a) { return _mm512_roundscale_ps(a, 0); }
static inline Double fill64(double a) { return _mm512_set1_pd(a); }
static inline Double load64(const double* p) { return _mm512_loadu_pd(p); }
static inline Double load64(const float* p) { return _mm512_cvtps_pd(_mm256_loadu_ps(p)); }
static inline void store64(double* p, Double a) { _mm512_storeu_pd(p, a); }
static inline void store64(float* p, Double a) { _mm256_storeu_ps(p, _mm512_cvtpd_ps(a)); }
static inline Double add64(Double a, Double b) { return _mm512_add_pd(a, b); }
static inline Double fused64(Double a, Double b, Double c) { return _mm512_fmadd_pd(a, b, c); }
static inline Double negated64(Double a, Double b, Double c) {
  return _mm512_fnmadd_pd(a, b, c);
}

#elif MPSAE_LEVEL == 2

constexpr int64_t LANES = 8;
constexpr int64_t LANES64 = 4;
using Float = __m256;
using Double = __m256d;
static inline Float fill(float a) { return _mm256_set1_ps(a); }
static inline Float load(const float* p) { return _mm256_loadu_ps(p); }
static inline Float load(const int16_t* p) {
  return _mm256_cvtepi32_ps(
      _mm256_cvtepi16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))));
}
static inline void store(float* p, Float a) { _mm256_storeu_ps(p, a); }
static inline void store16(int16_t* p, Float a) {
  __m256i wide = _mm256_cvtps_epi32(a);
  __m128i narrow =
      _mm_packs_epi32(_mm256_castsi256_si128(wide), _mm256_extracti128_si256(wide, 1));
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), narrow);
}
static inline Float add(Float a, Float b) { return _mm256_add_ps(a, b); }
static inline Float sub(Float a, Float b) { return _mm256_sub_ps(a, b); }
static inline Float mul(Float a, Float b) { return _mm256_mul_ps(a, b); }
static inline Float fused(Float a, Float b, Float c) { return _mm256_fmadd_ps(a, b, c); }
static inline Float negated(Float a, Float b, Float c) { return _mm256_fnmadd_ps(a, b, c); }
static inline Float larger(Float a, Float b) { return _mm256_max_ps(a, b); }
static inline Float magnitude(Float a) {
  return _mm256_andnot_ps(_mm256_set1_ps(-0.0f), a);
}
static inline uint32_t at_least(Float a, Float b) {
  return static_cast<uint32_t>(_mm256_movemask_ps(_mm256_cmp_ps(a, b, _CMP_GE_OQ)));
}
static inline Float whole(Float a) { return _mm256_round_ps(a, 0); }
static inline Double fill64(double a) { return _mm256_set1_pd(a); }
static inline Double load64(const double* p) { return _mm256_loadu_pd(p); }
static inline Double load64(const float* p) { return _mm256_cvtps_pd(_mm_loadu_ps(p)); }
static inline void store64(double* p, Double a) { _mm256_storeu_pd(p, a); }
static inline void store64(float* p, Double a) { _mm_storeu_ps(p, _mm256_cvtpd_ps(a)); }
static inline Double add64(Double a, Double b) { return _mm256_add_pd(a, b); }
static inline Double fused64(Double a, Double b, Double c) { return _mm256_fmadd_pd(a, b, c); }
static inline Double negated64(Double a, Double b, Double c) {
  return _mm256_fnmadd_pd(a, b, c);
}

#else

// plain C++: short loops that any compiler turns into its own vectors
constexpr int64_t LANES = 8;
constexpr int64_t LANES64 = 4;
struct Float {
  float v[LANES];
};
struct Double {
  double v[LANES64];
};
#define MPSAE_EACH(T, N, expression) \
  T out;                             \
  for (int l = 0; l < N; l++) out.v[l] = (expression); \
  return out
static inline Float fill(float a) { MPSAE_EACH(Float, LANES, a); }
static inline Float load(const float* p) { MPSAE_EACH(Float, LANES, p[l]); }
static inline Float load(const int16_t* p) { MPSAE_EACH(Float, LANES, float(p[l])); }
static inline void store(float* p, Float a) { std::memcpy(p, a.v, sizeof a.v); }
static inline void store16(int16_t* p, Float a) {
  for (int l = 0; l < LANES; l++) p[l] = int16_t(a.v[l]);
}
static inline Float add(Float a, Float b) { MPSAE_EACH(Float, LANES, a.v[l] + b.v[l]); }
static inline Float sub(Float a, Float b) { MPSAE_EACH(Float, LANES, a.v[l] - b.v[l]); }
static inline Float mul(Float a, Float b) { MPSAE_EACH(Float, LANES, a.v[l] * b.v[l]); }
static inline Float fused(Float a, Float b, Float c) {
  MPSAE_EACH(Float, LANES, c.v[l] + a.v[l] * b.v[l]);
}
static inline Float negated(Float a, Float b, Float c) {
  MPSAE_EACH(Float, LANES, c.v[l] - a.v[l] * b.v[l]);
}
static inline Float larger(Float a, Float b) {
  MPSAE_EACH(Float, LANES, a.v[l] > b.v[l] ? a.v[l] : b.v[l]);
}
static inline Float magnitude(Float a) { MPSAE_EACH(Float, LANES, std::fabs(a.v[l])); }
static inline uint32_t at_least(Float a, Float b) {
  uint32_t mask = 0;
  for (int l = 0; l < LANES; l++) mask |= uint32_t(a.v[l] >= b.v[l]) << l;
  return mask;
}
static inline Float whole(Float a) { MPSAE_EACH(Float, LANES, std::nearbyint(a.v[l])); }
static inline Double fill64(double a) { MPSAE_EACH(Double, LANES64, a); }
static inline Double load64(const double* p) { MPSAE_EACH(Double, LANES64, p[l]); }
static inline Double load64(const float* p) { MPSAE_EACH(Double, LANES64, double(p[l])); }
static inline void store64(double* p, Double a) { std::memcpy(p, a.v, sizeof a.v); }
static inline void store64(float* p, Double a) {
  for (int l = 0; l < LANES64; l++) p[l] = float(a.v[l]);
}
static inline Double add64(Double a, Double b) {
  MPSAE_EACH(Double, LANES64, a.v[l] + b.v[l]);
}
static inline Double fused64(Double a, Double b, Double c) {
  MPSAE_EACH(Double, LANES64, c.v[l] + a.v[l] * b.v[l]);
}
static inline Double negated64(Double a, Double b, Double c) {
  MPSAE_EACH(Double, LANES64, c.v[l] - a.v[l] * b.v[l]);
}
#undef MPSAE_EACH

#endif

static inline float largest(Float a) {
  float v[LANES];
  store(v, a);
  float top = v[0];
  for (int l = 1; l < LANES; l++) top = v[l] > top ? v[l] : top;
  return top;
}

static inline double total(Double a) {
  double v[LANES64];
  store64(v, a);
  double sum = 0;
  for (int l = 0; l < LANES64; l++) sum += v[l];
  return sum;
}

static inline void fetch(const void* p) {
#if defined(__GNUC__)
  __builtin_prefetch(p, 0, 2);
#endif
}

}  // namespace MPSAE_ISA
}  // namespace mpsae
