// From scores to weights, for AVX-512 kernel files: every function here has internal linkage.
#pragma once

#include <immintrin.h>
#include <stddef.h>
#include <stdint.h>

#include "engine/kernels/attention_table.h"
#include "engine/kernels/avx512_exp.h"

namespace potluck {
namespace {

constexpr size_t kLanes = 16;
constexpr size_t kVectors = kTilePositions / kLanes;

// The lanes below count.
[[maybe_unused]] inline __mmask16 MaskOf(size_t count) {
  return static_cast<__mmask16>(count >= kLanes ? 0xffffu : (1u << count) - 1);
}

[[maybe_unused]] inline float LargestOf(__m512 lanes) {
  const __m256 eight =
      _mm256_max_ps(_mm512_castps512_ps256(lanes), _mm512_extractf32x8_ps(lanes, 1));
  __m128 four = _mm_max_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
  four = _mm_max_ps(four, _mm_movehl_ps(four, four));
  return _mm_cvtss_f32(_mm_max_ss(four, _mm_shuffle_ps(four, four, 1)));
}

[[maybe_unused]] inline float Tree(__m256 lanes) {
  const __m128 four = _mm_add_ps(_mm256_castps256_ps128(lanes), _mm256_extractf128_ps(lanes, 1));
  const __m128 two = _mm_add_ps(four, _mm_movehl_ps(four, four));
  return _mm_cvtss_f32(_mm_add_ss(two, _mm_shuffle_ps(two, two, 1)));
}

[[maybe_unused]] inline float ExpOf(float x) { return _mm512_cvtss_f32(Exp16(_mm512_set1_ps(x))); }

[[maybe_unused]] inline void Scale(float factor, size_t head_dim, float* o) {
  for (size_t d = 0; d < head_dim; d += kLanes) {
    const __mmask16 mask = MaskOf(head_dim - d);
    const __m512 scaled = _mm512_mul_ps(_mm512_maskz_loadu_ps(mask, o + d), _mm512_set1_ps(factor));
    _mm512_mask_storeu_ps(o + d, mask, scaled);
  }
}

// Scores become weights. Lanes at or above n may hold anything: they count as -infinity and get the
// weight 0, which changes no sum (a lane's sum is never -0).
[[maybe_unused]] inline void Weigh(size_t head_dim, size_t n, float* scores, float* state) {
  __m512 score[kVectors];
  for (size_t v = 0; v < kVectors; ++v) {
    const __mmask16 seen = n > v * kLanes ? MaskOf(n - v * kLanes) : __mmask16{0};
    const __m512 lowest = _mm512_set1_ps(-__builtin_inff());
    score[v] = _mm512_mask_load_ps(lowest, seen, scores + v * kLanes);
  }
  const float tile_largest = LargestOf(
      _mm512_max_ps(_mm512_max_ps(score[0], score[1]), _mm512_max_ps(score[2], score[3])));
  float m = state[head_dim];
  float l = state[head_dim + 1];
  if (tile_largest > m) {
    const float factor = ExpOf(m - tile_largest);
    Scale(factor, head_dim, state);
    l = l * factor;
    m = tile_largest;
  }
  __m256 sums = _mm256_setzero_ps();
  for (size_t v = 0; v < kVectors; ++v) {
    const __m512 weights = Exp16(_mm512_sub_ps(score[v], _mm512_set1_ps(m)));
    _mm512_store_ps(scores + v * kLanes, weights);
    sums = _mm256_add_ps(sums, _mm512_castps512_ps256(weights));
    sums = _mm256_add_ps(sums, _mm512_extractf32x8_ps(weights, 1));
  }
  state[head_dim] = m;
  state[head_dim + 1] = l + Tree(sums);
}

}  // namespace
}  // namespace potluck
