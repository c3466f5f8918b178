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

// Bit From of each byte moved to bit To, the others with it.
template <int From, int To>
inline __m512i MoveBit(__m512i bytes) {
  constexpr int kUp = From < To ? To - From : 0, kDown = From < To ? 0 : From - To;
  return From < To ? _mm512_slli_epi16(bytes, kUp) : _mm512_srli_epi16(bytes, kDown);
}

// Bits 2J and 2J + 1 of each byte, moved to bits To and To + 1.
template <int J, int To>
inline __m512i Twos(__m512i fields) {
  return _mm512_and_si512(MoveBit<2 * J, To>(fields), _mm512_set1_epi8(3 << To));
}

// Bit G of each byte, moved to bit To.
template <int G, int To>
inline __m512i PlaneBit(__m512i plane) {
  return _mm512_and_si512(MoveBit<G, To>(plane), _mm512_set1_epi8(1 << To));
}

}  // namespace
}  // namespace avx512vnni
}  // namespace potluck
