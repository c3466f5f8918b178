// From integer sums to weights as codes, for AVX2 kernel files of q8: every function here has
// internal linkage.
#pragma once

#include <immintrin.h>
#include <stddef.h>
#include <stdint.h>

#include "engine/kernels/attention_q8.h"
#include "engine/kernels/attention_rows.h"
#include "engine/kernels/avx2_weigh.h"

namespace potluck {
namespace {

[[maybe_unused]] inline __m256 ScalesAt(const KvTile& tile, size_t scales_at, size_t position) {
  const uint8_t* const scales = tile.sections[position / kPagePositions] + scales_at;
  return _mm256_loadu_ps(reinterpret_cast<const float*>(scales) + position % kPagePositions);
}

// Integer sums become scores.
[[maybe_unused]] inline void ToScores(const KvTile& tile, size_t head_dim, size_t n, const void* q,
                                      float* scores) {
  float scale = 0.0f;
  __builtin_memcpy(&scale, static_cast<const uint8_t*>(q) + q8::QueryScaleAt(head_dim),
                   sizeof scale);
  for (size_t j = 0; j < n; j += kLanes) {
    const __m256i sums = _mm256_load_si256(reinterpret_cast<const __m256i*>(scores + j));
    const __m256 unit =
        _mm256_mul_ps(_mm256_set1_ps(scale), ScalesAt(tile, q8::KeyScalesAt(head_dim), j));
    _mm256_store_ps(scores + j, _mm256_mul_ps(_mm256_cvtepi32_ps(sums), unit));
  }
}

// Weights become codes, and 0 from n on.
[[maybe_unused]] inline void QuantizeWeights(const KvTile& tile, size_t head_dim, size_t n,
                                             float* scores) {
  __m256 largest_lanes = _mm256_setzero_ps();
  for (size_t j = 0; j < n; j += kLanes) {
    const __m256 scales = ScalesAt(tile, q8::ValueScalesAt(head_dim), j);
    const __m256 seen = _mm256_castsi256_ps(MaskOf(n - j));
    const __m256 scaled = _mm256_and_ps(_mm256_mul_ps(_mm256_load_ps(scores + j), scales), seen);
    _mm256_store_ps(scores + j, scaled);
    largest_lanes = _mm256_max_ps(largest_lanes, scaled);
  }
  const float largest = LargestOf(largest_lanes);
  const bool is_tiny = largest < q8::kTiny;
  const float per_weight = is_tiny ? 0.0f : q8::kWeightRange / largest;
  // Words 0, 2, 1, 3 of each half.
  const __m256i even_first = _mm256_broadcastsi128_si256(
      _mm_setr_epi8(0, 1, 8, 9, 4, 5, 12, 13, 0, 1, 8, 9, 4, 5, 12, 13));
  auto* const codes = reinterpret_cast<__m128i*>(scores);
  for (size_t v = 0; v < kTilePositions / kLanes; ++v) {
    if (v * kLanes >= n) {
      _mm_store_si128(codes + v, _mm_setzero_si128());
      continue;
    }
    const __m256 exact =
        _mm256_mul_ps(_mm256_load_ps(scores + v * kLanes), _mm256_set1_ps(per_weight));
    const __m256i words = _mm256_shuffle_epi8(_mm256_cvtps_epi32(exact), even_first);
    _mm_store_si128(codes + v, _mm256_castsi256_si128(_mm256_permute4x64_epi64(words, 0x08)));
  }
  scores[q8::kUnitAt] = is_tiny ? 0.0f : largest / q8::kWeightRange;
}

// Integer sums of rows [first, stop) become codes, step by step for all of them: the steps of one
// row wait for each other.
[[maybe_unused]] inline void WeighRows(const KvTile& tile, size_t head_dim, const TileRows& rows,
                                       size_t first, size_t stop, float* scores) {
  const auto at = [&](size_t row) { return scores + row * kTilePositions; };
  for (size_t row = first; row < stop; ++row) {
    ToScores(tile, head_dim, SeenBy(rows, row), rows.q[row], at(row));
  }
  for (size_t row = first; row < stop; ++row) {
    Weigh(head_dim, SeenBy(rows, row), at(row), rows.states[row]);
  }
  for (size_t row = first; row < stop; ++row) {
    QuantizeWeights(tile, head_dim, SeenBy(rows, row), at(row));
  }
}

}  // namespace
}  // namespace potluck
