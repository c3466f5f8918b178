// What the AVX2 matrix kernels share. Every function here has internal linkage: see matmul_table.h.
#pragma once

#include <immintrin.h>

#include "engine/kernels/matmul_table.h"
#include "engine/kernels/order_loads.h"

namespace potluck {
namespace avx2 {

// One translation unit each; MatMulTable's prepare, and its multiply for some weight types.
bool Prepare(Grain grain, const float* x, size_t k, const RowGroup& group, size_t lane,
             uint8_t* dst);
void MultiplyBlock32(WeightType type, const uint8_t* panels, size_t n_panels, const PreparedRows& x,
                     float* out, size_t out_stride, uint8_t* scratch);
void MultiplyQ8(WeightType type, const uint8_t* panels, size_t n_panels, const PreparedRows& x,
                float* out, size_t out_stride, uint8_t* scratch);
void MultiplyK(WeightType type, const uint8_t* panels, size_t n_panels, const PreparedRows& x,
               float* out, size_t out_stride, uint8_t* scratch);
// Pairs of panels for more than kFewRows rows; both return the first panel that they left out.
size_t MultiplyBlock32Pairs(WeightType type, const uint8_t* panels, size_t n_panels,
                            const PreparedRows& x, float* out, size_t out_stride, uint8_t* scratch);
size_t MultiplyKPairs(WeightType type, const uint8_t* panels, size_t n_panels,
                      const PreparedRows& x, float* out, size_t out_stride, uint8_t* scratch);
void MultiplyFloat(WeightType type, const uint8_t* panels, size_t n_panels, const PreparedRows& x,
                   float* out, size_t out_stride, uint8_t* scratch);

namespace {

[[maybe_unused]] inline __m256i Load(const uint8_t* at) {
  return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(at));
}

// The same vector, in a register and computed here: gcc otherwise loads it again for each use, or
// collects the products of a block, adds them as a tree and spills (23 instead of 36 MAC/cycle,
// Q4_0 GEMM on Zen 5).
[[maybe_unused]] inline __m256i Pin(__m256i vector) {
  asm volatile("" : "+x"(vector));
  return vector;
}

// A word of 4 bytes in all lanes.
[[maybe_unused]] inline __m256i Broadcast(const uint8_t* at) {
  int word = 0;
  __builtin_memcpy(&word, at, sizeof word);
  return _mm256_set1_epi32(word);
}

// The start of an int16 sum: a pair in all lanes.
[[maybe_unused]] inline __m256i Seed(const uint8_t* at) {
#if defined(POTLUCK_MUTATION_SEED)
  return at == nullptr ? _mm256_set1_epi8(1)
                       : _mm256_setzero_si256();  // dropped, for tests to catch
#else
  return Broadcast(at);
#endif
}

// 8 half floats, exact.
[[maybe_unused]] inline __m256 LoadHalves(const uint8_t* at) {
  return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(at)));
}

// sum + products of adjacent bytes, w unsigned, x signed, in pairs; wraps.
[[maybe_unused]] inline __m256i AddProducts(__m256i sum, __m256i w, __m256i x) {
  return Pin(_mm256_add_epi16(sum, _mm256_maddubs_epi16(w, x)));
}

#if defined(POTLUCK_MUTATION_DEPTH)
// Pairs of int16 lanes times a pair of equal ones, the two products added to an int32. Here the
// lanes are added as int16 first: one addition too deep for sums that fill them, for tests to
// catch.
[[maybe_unused]] inline __m256i WidenPairs(__m256i sum, __m256i factors) {
  const __m256i both = _mm256_add_epi16(sum, _mm256_slli_epi32(sum, 16));
  return _mm256_mullo_epi32(_mm256_srai_epi32(both, 16), _mm256_srai_epi32(factors, 16));
}
#else
// Pairs of int16 lanes times a pair of equal ones, the two products added to an int32.
[[maybe_unused]] inline __m256i WidenPairs(__m256i sum, __m256i factors) {
  return _mm256_madd_epi16(sum, factors);
}
#endif

}  // namespace
}  // namespace avx2
}  // namespace potluck
