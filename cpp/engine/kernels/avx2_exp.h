// Exp of canon.h for 8 values at once. For AVX2 kernel files only; static, so that no copy leaves
// the file that includes it.
#pragma once

#include <immintrin.h>

#include "engine/canon.h"

namespace potluck {

// For x in [-87, 88.7]; elsewhere nonsense.
static inline __m256 ExpInRange(__m256 x) {
  const __m256 shifted = _mm256_fmadd_ps(x, _mm256_set1_ps(kExpLog2E), _mm256_set1_ps(kExpRound));
  const __m256 n = _mm256_sub_ps(shifted, _mm256_set1_ps(kExpRound));
  __m256 r = _mm256_fnmadd_ps(n, _mm256_set1_ps(kExpLn2High), x);
  r = _mm256_fnmadd_ps(n, _mm256_set1_ps(kExpLn2Low), r);
  const __m256 one = _mm256_set1_ps(1.0f);
  __m256 p = _mm256_set1_ps(kExpC6);
  p = _mm256_fmadd_ps(p, r, _mm256_set1_ps(kExpC5));
  p = _mm256_fmadd_ps(p, r, _mm256_set1_ps(kExpC4));
  p = _mm256_fmadd_ps(p, r, _mm256_set1_ps(kExpC3));
  p = _mm256_fmadd_ps(p, r, _mm256_set1_ps(kExpC2));
  p = _mm256_fmadd_ps(p, r, one);
  p = _mm256_fmadd_ps(p, r, one);
  const __m256i exponent = _mm256_slli_epi32(_mm256_castps_si256(shifted), 23);
  return _mm256_castsi256_ps(_mm256_add_epi32(_mm256_castps_si256(p), exponent));
}

// x is neither above 0 nor a NaN.
[[maybe_unused]] static inline __m256 ExpBelow0(__m256 x) {
  const __m256 counts = _mm256_cmp_ps(x, _mm256_set1_ps(kExpSmallest), _CMP_GE_OQ);
  return _mm256_and_ps(ExpInRange(x), counts);
}

[[maybe_unused]] static inline __m256 Exp8(__m256 x) {
  __m256 y = ExpInRange(x);
  const __m256 below = _mm256_cmp_ps(x, _mm256_set1_ps(kExpSmallest), _CMP_LT_OQ);
  const __m256 above = _mm256_cmp_ps(x, _mm256_set1_ps(kExpLargest), _CMP_GT_OQ);
  const __m256 no_number = _mm256_cmp_ps(x, x, _CMP_UNORD_Q);
  y = _mm256_andnot_ps(below, y);
  y = _mm256_blendv_ps(y, _mm256_castsi256_ps(_mm256_set1_epi32(0x7f800000)), above);
  return _mm256_blendv_ps(y, _mm256_castsi256_ps(_mm256_set1_epi32(0x7fc00000)), no_number);
}

}  // namespace potluck
