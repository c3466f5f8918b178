// Attention over q8 keys and values for AVX-512 VNNI. Integer sums are exact, so all that must
// follow the scalar kernel are the few float operations of a row.
//
// dpwssd takes pairs of int16: the even and the odd ones of four codes. As with f16, up to six rows
// read a page as it is, and more share a tile widened to such pairs.
#include <immintrin.h>
#include <stddef.h>
#include <stdint.h>

#include "engine/kernels/attention_q8.h"
#include "engine/kernels/attention_rows.h"
#include "engine/kernels/avx512_weigh.h"
#include "engine/kernels/avx512vnni_attention.h"

namespace potluck {
namespace {

constexpr size_t kVectorBytes = 64;

inline __m512i LoadBytes(const uint8_t* at) { return _mm512_loadu_si512(at); }

// The even or the odd ones of each four codes.
inline __m512i PairsOf(__m512i codes, size_t odd) {
  return _mm512_srai_epi16(odd != 0 ? codes : _mm512_slli_epi16(codes, 8), 8);
}

// Where a tile's codes are: in their pages as bytes, ...
struct Bytes {
  const KvTile& tile;
  size_t head_dim;
  // Of dimensions 4 * four + odd and + 2, for the 16 positions of a page.
  __m512i KeyPairs(size_t four, size_t odd, size_t page) const {
    return PairsOf(LoadBytes(tile.sections[page] + four * kVectorBytes), odd);
  }
  // Of positions 4 * four + odd and + 2, for 16 dimensions from d on.
  __m512i ValuePairs(size_t four, size_t odd, size_t d) const {
    const uint8_t* const values = tile.sections[four / 4] + q8::ValuesAt(head_dim);
    return PairsOf(LoadBytes(values + (four % 4 * q8::Padded(head_dim) + d) * 4), odd);
  }
};

// ... or in scratch as pairs: keys [head_dim / 4][even, odd][64 positions] and then, in their
// place, values [16][even, odd][head_dim].
struct Pairs {
  const KvTile& tile;
  size_t head_dim;
  uint8_t* wide;
  uint8_t* Keys(size_t four, size_t odd, size_t page) const {
    return wide + ((2 * four + odd) * kTilePages + page) * kVectorBytes;
  }
  uint8_t* Values(size_t four, size_t odd, size_t d) const {
    const size_t row_bytes = (head_dim + kLanes - 1) / kLanes * kVectorBytes;
    return wide + (2 * four + odd) * row_bytes + d * 4;
  }
  __m512i KeyPairs(size_t four, size_t odd, size_t page) const {
    return LoadBytes(Keys(four, odd, page));
  }
  __m512i ValuePairs(size_t four, size_t odd, size_t d) const {
    return LoadBytes(Values(four, odd, d));
  }
};

void WidenKeys(const Pairs& to) {
  const Bytes from = {to.tile, to.head_dim};
  for (size_t four = 0; four < q8::Padded(to.head_dim) / 4; ++four) {
    for (size_t page = 0; page < kTilePages; ++page) {
      for (size_t odd = 0; odd < 2; ++odd) {
        _mm512_store_si512(to.Keys(four, odd, page), from.KeyPairs(four, odd, page));
      }
    }
  }
}

void WidenValues(const Pairs& to, size_t n_fours) {
  const Bytes from = {to.tile, to.head_dim};
  for (size_t four = 0; four < n_fours; ++four) {
    for (size_t d = 0; d < to.head_dim; d += kLanes) {
      for (size_t odd = 0; odd < 2; ++odd) {
        _mm512_store_si512(to.Values(four, odd, d), from.ValuePairs(four, odd, d));
      }
    }
  }
}

// sum + a . b, computed here: gcc otherwise loads for several steps at once and spills.
inline __m512i AddDots(__m512i sum, __m512i a, __m512i b) {
  sum = _mm512_dpwssd_epi32(sum, a, b);
  asm volatile("" : "+v"(sum));
  return sum;
}

inline __m512i Broadcast(const uint8_t* pair) {
  int32_t both = 0;
  __builtin_memcpy(&both, pair, sizeof both);
  return _mm512_set1_epi32(both);
}

// Integer scores of kRows query rows with all positions: scores is [kRows][64] and holds int32.
template <size_t kRows, class Source>
void Score(const Source& source, bool fetches, const void* const* q, float* scores) {
  __m512i sums[kRows][kVectors];
  const uint8_t* row[kRows];
#pragma GCC unroll 8
  for (size_t r = 0; r < kRows; ++r) {
    row[r] = static_cast<const uint8_t*>(q[r]);
#pragma GCC unroll 8
    for (size_t v = 0; v < kVectors; ++v) sums[r][v] = _mm512_setzero_si512();
  }
  for (size_t four = 0; four < q8::Padded(source.head_dim) / 4; ++four) {
    if (fetches) q8::FetchKeys<kTilePages>(source.tile, source.head_dim, 0, four);
#pragma GCC unroll 2
    for (size_t odd = 0; odd < 2; ++odd) {
      __m512i key[kVectors];
#pragma GCC unroll 8
      for (size_t v = 0; v < kVectors; ++v) key[v] = source.KeyPairs(four, odd, v);
#pragma GCC unroll 8
      for (size_t r = 0; r < kRows; ++r) {
        const __m512i pair = Broadcast(row[r] + four * 8 + odd * 4);
#pragma GCC unroll 8
        for (size_t v = 0; v < kVectors; ++v) {
          sums[r][v] = AddDots(sums[r][v], pair, key[v]);
        }
      }
    }
  }
#pragma GCC unroll 8
  for (size_t r = 0; r < kRows; ++r) {
#pragma GCC unroll 8
    for (size_t v = 0; v < kVectors; ++v) {
      _mm512_store_si512(scores + r * kTilePositions + v * kLanes, sums[r][v]);
    }
  }
}

inline __m512 ScalesOf(const KvTile& tile, size_t scales_at, size_t page) {
  return _mm512_loadu_ps(tile.sections[page] + scales_at);
}

// Integer sums become scores.
inline void ToScores(const KvTile& tile, size_t head_dim, const void* q, float* scores) {
  float scale = 0.0f;
  __builtin_memcpy(&scale, static_cast<const uint8_t*>(q) + q8::QueryScaleAt(head_dim),
                   sizeof scale);
  for (size_t v = 0; v < kVectors; ++v) {
    const __m512 unit =
        _mm512_mul_ps(_mm512_set1_ps(scale), ScalesOf(tile, q8::KeyScalesAt(head_dim), v));
    const __m512i sums = _mm512_load_si512(scores + v * kLanes);
    _mm512_store_ps(scores + v * kLanes, _mm512_mul_ps(_mm512_cvtepi32_ps(sums), unit));
  }
}

// Weights become codes, and 0 from n on.
inline void QuantizeWeights(const KvTile& tile, size_t head_dim, size_t n, float* scores) {
  __m512 scaled[kVectors];
  for (size_t v = 0; v < kVectors; ++v) {
    const __mmask16 seen = n > v * kLanes ? MaskOf(n - v * kLanes) : __mmask16{0};
    scaled[v] = _mm512_maskz_mul_ps(seen, _mm512_load_ps(scores + v * kLanes),
                                    ScalesOf(tile, q8::ValueScalesAt(head_dim), v));
  }
  const float largest = LargestOf(
      _mm512_max_ps(_mm512_max_ps(scaled[0], scaled[1]), _mm512_max_ps(scaled[2], scaled[3])));
  const bool is_tiny = largest < q8::kTiny;
  const float per_weight = is_tiny ? 0.0f : q8::kWeightRange / largest;
  // Words 0, 2, 1, 3 of each half.
  const __m256i even_first = _mm256_broadcastsi128_si256(
      _mm_setr_epi8(0, 1, 4, 5, 2, 3, 6, 7, 8, 9, 12, 13, 10, 11, 14, 15));
  for (size_t v = 0; v < kVectors; ++v) {
    const __m512 exact = _mm512_mul_ps(scaled[v], _mm512_set1_ps(per_weight));
    const __m256i words = _mm512_cvtepi32_epi16(_mm512_cvtps_epi32(exact));
    _mm256_store_si256(reinterpret_cast<__m256i*>(scores) + v,
                       _mm256_shuffle_epi8(words, even_first));
  }
  scores[q8::kUnitAt] = is_tiny ? 0.0f : largest / q8::kWeightRange;
}

// Integer sums of rows [first, stop) become codes, step by step for all of them: the steps of one
// row wait for each other.
void WeighRows(const KvTile& tile, size_t head_dim, const TileRows& rows, size_t first, size_t stop,
               float* scores) {
  const auto at = [&](size_t row) { return scores + row * kTilePositions; };
  for (size_t row = first; row < stop; ++row) ToScores(tile, head_dim, rows.q[row], at(row));
  for (size_t row = first; row < stop; ++row) {
    Weigh(head_dim, SeenBy(rows, row), at(row), rows.states[row]);
  }
  for (size_t row = first; row < stop; ++row) {
    QuantizeWeights(tile, head_dim, SeenBy(rows, row), at(row));
  }
}

// Adds the weighted values to dimensions [d, d + 16 * kSums) of rows [first, first + kRows).
template <size_t kRows, size_t kSums, class Source>
void Mix(const Source& source, const TileRows& rows, size_t first, size_t n_fours, size_t d,
         const float* scores) {
  __m512i sums[kRows][kSums];
  const auto* const codes = reinterpret_cast<const uint8_t*>(scores);
#pragma GCC unroll 8
  for (size_t r = 0; r < kRows; ++r) {
#pragma GCC unroll 8
    for (size_t v = 0; v < kSums; ++v) sums[r][v] = _mm512_setzero_si512();
  }
  for (size_t four = 0; four < n_fours; ++four) {
    if (first == 0) q8::FetchValues(source.tile, source.head_dim, four, d, kSums * kLanes);
#pragma GCC unroll 2
    for (size_t odd = 0; odd < 2; ++odd) {
      __m512i value[kSums];
#pragma GCC unroll 8
      for (size_t v = 0; v < kSums; ++v) value[v] = source.ValuePairs(four, odd, d + v * kLanes);
#pragma GCC unroll 8
      for (size_t r = 0; r < kRows; ++r) {
        const __m512i pair =
            Broadcast(codes + r * kTilePositions * sizeof(float) + four * 8 + odd * 4);
#pragma GCC unroll 8
        for (size_t v = 0; v < kSums; ++v) {
          sums[r][v] = AddDots(sums[r][v], pair, value[v]);
        }
      }
    }
  }
#pragma GCC unroll 8
  for (size_t r = 0; r < kRows; ++r) {
    const __m512 unit = _mm512_set1_ps(scores[r * kTilePositions + q8::kUnitAt]);
    float* const o = rows.states[first + r] + d;
#pragma GCC unroll 8
    for (size_t v = 0; v < kSums; ++v) {
      // More than one vector: only where all of them are whole.
      const __mmask16 mask = kSums == 1 ? MaskOf(source.head_dim - d) : __mmask16{0xffff};
      const __m512 before = _mm512_maskz_loadu_ps(mask, o + v * kLanes);
      const __m512 added = _mm512_cvtepi32_ps(sums[r][v]);
      _mm512_mask_storeu_ps(o + v * kLanes, mask, _mm512_fmadd_ps(added, unit, before));
    }
  }
}

template <class Source>
void ScoreAll(const Source& source, const TileRows& rows, float* scores) {
  BySix(rows.count, [&](auto count, size_t first) {
    Score<decltype(count)::kRows>(source, first == 0, rows.q + first,
                                  scores + first * kTilePositions);
  });
}

template <class Source>
void MixAll(const Source& source, const TileRows& rows, size_t n_fours, float* scores) {
  BySix(rows.count, [&](auto count, size_t first) {
    constexpr size_t kRows = decltype(count)::kRows;
    constexpr size_t kAtOnce = kRows == 1 ? 8 : 4;  // chains enough to hide the latency
    float* const own = scores + first * kTilePositions;
    WeighRows(source.tile, source.head_dim, rows, first, first + kRows, scores);
    size_t d = 0;
    for (; d + kAtOnce * kLanes <= source.head_dim; d += kAtOnce * kLanes) {
      Mix<kRows, kAtOnce>(source, rows, first, n_fours, d, own);
    }
    for (; d < source.head_dim; d += kLanes) Mix<kRows, 1>(source, rows, first, n_fours, d, own);
  });
}

}  // namespace

namespace avx512vnni {

void AddTileQ8(const KvTile& tile, size_t head_dim, const TileRows& rows, float* scratch) {
  float* const scores = ScoresIn(scratch, head_dim);
  const size_t n_fours = (SeenBy(rows, rows.count - 1) + 3) / 4;
  if (rows.count <= kMostRows) {
    const Bytes source = {tile, head_dim};
    ScoreAll(source, rows, scores);
    return MixAll(source, rows, n_fours, scores);
  }
  const Pairs source = {tile, head_dim, reinterpret_cast<uint8_t*>(scratch)};
  WidenKeys(source);
  ScoreAll(source, rows, scores);
  WidenValues(source, n_fours);
  MixAll(source, rows, n_fours, scores);
}

}  // namespace avx512vnni
}  // namespace potluck
