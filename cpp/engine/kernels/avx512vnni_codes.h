// Unsigned codes out of two panels at once on AVX-512, one in each half of a vector; the bytes of
// the second lie `apart` behind those of the first. Layout: pack.h.
//
// Every function here has internal linkage: see matmul_table.h.
#pragma once

#include "engine/kernels/avx512vnni_matmul.h"

namespace potluck {
namespace avx512vnni {
namespace {

inline __m512i Low4(__m512i bytes) { return _mm512_and_si512(bytes, _mm512_set1_epi8(15)); }
inline __m512i High4(__m512i bytes) { return Low4(_mm512_srli_epi16(bytes, 4)); }

// The nibbles of k = 4G..4G+3 of a run.
template <size_t G>
inline __m512i Nibbles(const uint8_t* run, size_t apart) {
  const uint8_t* at = run + 32 * (G % 4);
  const __m512i both = LoadTwo(at, at + apart);
  return G < 4 ? Low4(both) : High4(both);
}

// Bits 2J and 2J + 1 of each byte, moved to bits To and To + 1.
template <int J, int To>
inline __m512i Twos(__m512i fields) {
  const __m512i moved = 2 * J < To ? _mm512_slli_epi16(fields, 2 * J < To ? To - 2 * J : 0)
                                   : _mm512_srli_epi16(fields, 2 * J < To ? 0 : 2 * J - To);
  return _mm512_and_si512(moved, _mm512_set1_epi8(3 << To));
}

// Bit G of each byte, moved to bit To.
template <int G, int To>
inline __m512i PlaneBit(__m512i plane) {
  const __m512i moved = G < To ? _mm512_slli_epi16(plane, G < To ? To - G : 0)
                               : _mm512_srli_epi16(plane, G < To ? 0 : G - To);
  return _mm512_and_si512(moved, _mm512_set1_epi8(1 << To));
}

}  // namespace
}  // namespace avx512vnni
}  // namespace potluck
