// Exp of canon.h for 16 values at once, none above 0 and none a NaN. For AVX-512 kernel files only;
// static, so that no copy leaves the file that includes it.
#pragma once

#include <immintrin.h>

#include "engine/canon.h"

namespace potluck {

static inline __m512 Exp16(__m512 x) {
  const __m512 shifted = _mm512_fmadd_ps(x, _mm512_set1_ps(kExpLog2E), _mm512_set1_ps(kExpRound));
  const __m512 n = _mm512_sub_ps(shifted, _mm512_set1_ps(kExpRound));
  __m512 r = _mm512_fnmadd_ps(n, _mm512_set1_ps(kExpLn2High), x);
  r = _mm512_fnmadd_ps(n, _mm512_set1_ps(kExpLn2Low), r);
  const __m512 one = _mm512_set1_ps(1.0f);
  __m512 p = _mm512_set1_ps(kExpC6);
  p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(kExpC5));
  p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(kExpC4));
  p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(kExpC3));
  p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(kExpC2));
  p = _mm512_fmadd_ps(p, r, one);
  p = _mm512_fmadd_ps(p, r, one);
  const __m512i exponent = _mm512_slli_epi32(_mm512_castps_si512(shifted), 23);
  const __mmask16 counts = _mm512_cmp_ps_mask(x, _mm512_set1_ps(kExpSmallest), _CMP_GE_OQ);
  return _mm512_castsi512_ps(_mm512_maskz_add_epi32(counts, _mm512_castps_si512(p), exponent));
}

}  // namespace potluck
