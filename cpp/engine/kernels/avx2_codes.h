// Unsigned codes out of a panel's vectors on AVX2: nibbles, fields of two bits, bit planes. Layout:
// pack.h.
//
// Every function here has internal linkage: see matmul_table.h.
#pragma once

#include "engine/kernels/avx2_matmul.h"

namespace potluck {
namespace avx2 {
namespace {

[[maybe_unused]] inline void Store(uint8_t* at, __m256i vector) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(at), vector);
}

[[maybe_unused]] inline __m256i Low4(__m256i bytes) {
  return _mm256_and_si256(bytes, _mm256_set1_epi8(15));
}
[[maybe_unused]] inline __m256i High4(__m256i bytes) { return Low4(_mm256_srli_epi16(bytes, 4)); }

// The nibbles of k = 4G..4G+3 of a run.
template <size_t G>
inline __m256i Nibbles(const uint8_t* run) {
  const __m256i both = Load(run + 32 * (G % 4));
  return G < 4 ? Low4(both) : High4(both);
}

// Bits 2J and 2J + 1 of each byte, moved to the bottom.
template <int J>
inline __m256i Twos(__m256i fields) {
  return _mm256_and_si256(_mm256_srli_epi16(fields, 2 * J), _mm256_set1_epi8(3));
}
// The same, moved to bits 4 and 5.
template <int J>
inline __m256i HighTwos(__m256i fields) {
  const __m256i moved = J < 2 ? _mm256_slli_epi16(fields, J < 2 ? 4 - 2 * J : 0)
                              : _mm256_srli_epi16(fields, J < 2 ? 0 : 2 * J - 4);
  return _mm256_and_si256(moved, _mm256_set1_epi8(0x30));
}

// Bit G of each byte, moved to bit To.
template <int G, int To>
inline __m256i PlaneBit(__m256i plane) {
  const __m256i moved = G < To ? _mm256_slli_epi16(plane, G < To ? To - G : 0)
                               : _mm256_srli_epi16(plane, G < To ? 0 : G - To);
  return _mm256_and_si256(moved, _mm256_set1_epi8(1 << To));
}

}  // namespace
}  // namespace avx2
}  // namespace potluck
