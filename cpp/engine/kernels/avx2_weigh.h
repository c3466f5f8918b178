// From scores to weights, for AVX2 kernel files: every function here has internal linkage.
#pragma once

#include <immintrin.h>
#include <stddef.h>
#include <stdint.h>

#include "engine/kernels/attention_table.h"
#include "engine/kernels/avx2_exp.h"

namespace potluck {
namespace {

constexpr size_t kLanes = 8;

[[maybe_unused]] inline __m256 Load(const float* x) { return _mm256_loadu_ps(x); }

// All ones in the lanes below count.
[[maybe_unused]] inline __m256i MaskOf(size_t count) {
  const __m256i lanes = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
  return _mm256_cmpgt_epi32(_mm256_set1_epi32(static_cast<int32_t>(count)), lanes);
}

[[maybe_unused]] inline float LargestOf(__m256 lanes) {
  __m128 four = _mm_max_ps(_mm256_castps256_ps128(lanes), _mm256_extractf128_ps(lanes, 1));
  four = _mm_max_ps(four, _mm_movehl_ps(four, four));
  return _mm_cvtss_f32(_mm_max_ss(four, _mm_shuffle_ps(four, four, 1)));
}

[[maybe_unused]] inline float Tree(__m256 lanes) {
  const __m128 four = _mm_add_ps(_mm256_castps256_ps128(lanes), _mm256_extractf128_ps(lanes, 1));
  const __m128 two = _mm_add_ps(four, _mm_movehl_ps(four, four));
  return _mm_cvtss_f32(_mm_add_ss(two, _mm_shuffle_ps(two, two, 1)));
}

[[maybe_unused]] inline void Scale(float factor, size_t head_dim, float* o) {
  const __m256 factors = _mm256_set1_ps(factor);
  size_t d = 0;
  for (; d + kLanes <= head_dim; d += kLanes) {
    _mm256_storeu_ps(o + d, _mm256_mul_ps(Load(o + d), factors));
  }
  for (; d < head_dim; ++d) o[d] = o[d] * factor;
}

// Scores become weights. Lanes at or above n may hold anything: they count as -infinity and get the
// weight 0, which changes no sum (a lane's sum is never -0).
[[maybe_unused]] inline void Weigh(size_t head_dim, size_t n, float* scores, float* state) {
  const size_t n_vectors = (n + kLanes - 1) / kLanes;
  const __m256 lowest = _mm256_set1_ps(-__builtin_inff());
  const __m256 seen = _mm256_castsi256_ps(MaskOf(n - (n_vectors - 1) * kLanes));
  float* const last = scores + (n_vectors - 1) * kLanes;
  _mm256_store_ps(last, _mm256_blendv_ps(lowest, _mm256_load_ps(last), seen));
  __m256 largest = _mm256_load_ps(scores);
  for (size_t v = 1; v < n_vectors; ++v) {
    largest = _mm256_max_ps(largest, _mm256_load_ps(scores + v * kLanes));
  }
  const float tile_largest = LargestOf(largest);
  float m = state[head_dim];
  float l = state[head_dim + 1];
  if (tile_largest > m) {
    const float factor = _mm256_cvtss_f32(ExpBelow0(_mm256_set1_ps(m - tile_largest)));
    Scale(factor, head_dim, state);
    l = l * factor;
    m = tile_largest;
  }
  const __m256 shift = _mm256_set1_ps(m);
  __m256 sums = _mm256_setzero_ps();
  for (size_t v = 0; v < n_vectors; ++v) {
    float* const place = scores + v * kLanes;
    const __m256 weights = ExpBelow0(_mm256_sub_ps(_mm256_load_ps(place), shift));
    _mm256_store_ps(place, weights);
    sums = _mm256_add_ps(sums, weights);
  }
  state[head_dim] = m;
  state[head_dim + 1] = l + Tree(sums);
}

}  // namespace
}  // namespace potluck
