// What the AVX-512 VNNI matrix kernels share. Every function here has internal linkage: see
// matmul_table.h.
#pragma once

#include <immintrin.h>

#include "engine/kernels/matmul_table.h"
#include "engine/pack.h"

namespace potluck {
namespace avx512vnni {

// One translation unit each. Panels from p on, four or two at once, times all rows; all return the
// first panel they left out.
size_t MultiplyFours(WeightType type, const uint8_t* panels, size_t n_panels, const PreparedRows& x,
                     float* out, size_t out_stride, uint8_t* scratch);
size_t MultiplyTwos(WeightType type, const uint8_t* panels, size_t p, size_t n_panels,
                    const PreparedRows& x, float* out, size_t out_stride);
size_t MultiplyKFours(WeightType type, const uint8_t* panels, size_t n_panels,
                      const PreparedRows& x, float* out, size_t out_stride, uint8_t* scratch);
size_t MultiplyKTwos(WeightType type, const uint8_t* panels, size_t p, size_t n_panels,
                     const PreparedRows& x, float* out, size_t out_stride);
// All panels times one row.
void MultiplyOneRow(WeightType type, const uint8_t* panels, size_t n_panels, const PreparedRows& x,
                    float* out);
size_t MultiplyFloats(WeightType type, const uint8_t* panels, size_t n_panels,
                      const PreparedRows& x, float* out, size_t out_stride, uint8_t* scratch);

namespace {

constexpr size_t kScaleBytes = 16;  // f16 of 8 rows

[[maybe_unused]] inline __m512i Broadcast(const uint8_t* at) {
  int word = 0;
  __builtin_memcpy(&word, at, sizeof word);
  return _mm512_set1_epi32(word);
}

[[maybe_unused]] inline __m512i LoadTwo(const uint8_t* first, const uint8_t* second) {
  const __m256i low = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(first));
  const __m256i high = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(second));
  return _mm512_inserti64x4(_mm512_castsi256_si512(low), high, 1);
}

// f16 of 8 rows of each of two panels.
[[maybe_unused]] inline __m512 LoadTwoScales(const uint8_t* first, const uint8_t* second) {
  const __m128i low = _mm_loadu_si128(reinterpret_cast<const __m128i*>(first));
  const __m128i high = _mm_loadu_si128(reinterpret_cast<const __m128i*>(second));
  return _mm512_cvtph_ps(_mm256_inserti128_si256(_mm256_castsi128_si256(low), high, 1));
}

}  // namespace
}  // namespace avx512vnni
}  // namespace potluck
