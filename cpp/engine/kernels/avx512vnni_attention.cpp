// Attention for AVX-512: the scalar chains, lanes being positions (scores) or dimensions (sums).
//
// Query rows are taken six at a time against 64 positions or dimensions: 24 sums, 4 vectors that
// pass by and a broadcast in 32 registers, so that a load serves four fma or more. More than six
// rows share a tile widened to f32 once; its keys, then its values, stay in the first cache.
#include "engine/kernels/avx512vnni_attention.h"

#include <immintrin.h>
#include <stddef.h>
#include <stdint.h>

#include "engine/kernels/attention_f16.h"
#include "engine/kernels/attention_rows.h"
#include "engine/kernels/attention_table.h"
#include "engine/kernels/avx2_attention.h"
#include "engine/kernels/avx512_weigh.h"

namespace potluck {
namespace {

static_assert(kPagePositions == kLanes, "a vector holds one dimension of a page's keys");

inline __m512 Widen(const uint16_t* halves) {
  return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(halves)));
}

// Where a tile's keys and values are: in their pages as f16, ...
struct Halves {
  const KvTile& tile;
  size_t head_dim;
  __m512 Key(size_t d, size_t v) const {
    return Widen(HalvesOf(tile.sections[v]) + d * kPagePositions);
  }
  const uint16_t* ValueAt(size_t j) const {
    return HalvesOf(tile.sections[j / kPagePositions]) +
           (kPagePositions + j % kPagePositions) * head_dim;
  }
  static __m512 Load(const uint16_t* at) { return Widen(at); }
  static __m512 Load(const uint16_t* at, __mmask16 mask) {
    return _mm512_cvtph_ps(_mm256_maskz_loadu_epi16(mask, at));
  }
};

// ... or in scratch as f32, keys [head_dim][64] and then, in their place, values [64][head_dim].
struct Floats {
  const KvTile& tile;
  size_t head_dim;
  const float* wide;
  __m512 Key(size_t d, size_t v) const {
    return _mm512_load_ps(wide + d * kTilePositions + v * kLanes);
  }
  const float* ValueAt(size_t j) const { return wide + j * head_dim; }
  static __m512 Load(const float* at) { return _mm512_loadu_ps(at); }
  static __m512 Load(const float* at, __mmask16 mask) { return _mm512_maskz_loadu_ps(mask, at); }
};

void WidenKeys(const KvTile& tile, size_t head_dim, float* wide) {
  for (size_t d = 0; d < head_dim; ++d) {
    for (size_t p = 0; p < kTilePages; ++p) {
      _mm512_store_ps(wide + d * kTilePositions + p * kLanes,
                      Widen(HalvesOf(tile.sections[p]) + d * kPagePositions));
    }
  }
}

// A page's values lie one after another.
void WidenValues(const KvTile& tile, size_t head_dim, size_t n, float* wide) {
  for (size_t p = 0; p * kPagePositions < n; ++p) {
    const uint16_t* const values = HalvesOf(tile.sections[p]) + kPagePositions * head_dim;
    for (size_t i = 0; i < kPagePositions * head_dim; i += kLanes) {
      _mm512_storeu_ps(wide + p * kPagePositions * head_dim + i, Widen(values + i));
    }
  }
}

// Scores of `Rows` query rows with all positions: scores is [Rows][64].
template <size_t Rows, class Source>
void Score(const Source& source, bool fetches, const void* const* q, float* scores) {
  const float* row[Rows];
  __m512 sums[Rows][kVectors];
#pragma GCC unroll 8
  for (size_t r = 0; r < Rows; ++r) {
    row[r] = static_cast<const float*>(q[r]);
#pragma GCC unroll 8
    for (size_t v = 0; v < kVectors; ++v) sums[r][v] = _mm512_setzero_ps();
  }
  for (size_t d = 0; d < source.head_dim; ++d) {
    if (fetches) FetchKeys<kTilePages>(source.tile, 0, d);
    __m512 key[kVectors];
#pragma GCC unroll 8
    for (size_t v = 0; v < kVectors; ++v) key[v] = source.Key(d, v);
#pragma GCC unroll 8
    for (size_t r = 0; r < Rows; ++r) {
      const __m512 factor = _mm512_set1_ps(row[r][d]);
#pragma GCC unroll 8
      for (size_t v = 0; v < kVectors; ++v) {
        sums[r][v] = _mm512_fmadd_ps(factor, key[v], sums[r][v]);
      }
    }
  }
#pragma GCC unroll 8
  for (size_t r = 0; r < Rows; ++r) {
#pragma GCC unroll 8
    for (size_t v = 0; v < kVectors; ++v) {
      _mm512_store_ps(scores + r * kTilePositions + v * kLanes, sums[r][v]);
    }
  }
}

// Adds the weighted values of positions [start, stop) to dimensions [d, d + 16 * Vectors) of Rows
// states.
template <size_t Rows, size_t Vectors, class Source>
void MixVectors(const Source& source, size_t start, size_t stop, size_t d, bool fetches,
                const float* weights, float* const* states) {
  __m512 sums[Rows][Vectors];
#pragma GCC unroll 8
  for (size_t r = 0; r < Rows; ++r) {
#pragma GCC unroll 8
    for (size_t v = 0; v < Vectors; ++v) sums[r][v] = _mm512_loadu_ps(states[r] + d + v * kLanes);
  }
  for (size_t j = start; j < stop; ++j) {
    const auto* const at = source.ValueAt(j) + d;
    if (fetches) FetchValues(source.tile, source.head_dim, j, d, Vectors * kLanes);
    __m512 value[Vectors];
#pragma GCC unroll 8
    for (size_t v = 0; v < Vectors; ++v) value[v] = Source::Load(at + v * kLanes);
#pragma GCC unroll 8
    for (size_t r = 0; r < Rows; ++r) {
      const __m512 weight = _mm512_set1_ps(weights[r * kTilePositions + j]);
#pragma GCC unroll 8
      for (size_t v = 0; v < Vectors; ++v) {
        sums[r][v] = _mm512_fmadd_ps(weight, value[v], sums[r][v]);
      }
    }
  }
#pragma GCC unroll 8
  for (size_t r = 0; r < Rows; ++r) {
#pragma GCC unroll 8
    for (size_t v = 0; v < Vectors; ++v) _mm512_storeu_ps(states[r] + d + v * kLanes, sums[r][v]);
  }
}

// The same for the 16 dimensions from d that the mask holds.
template <size_t Rows, class Source>
void MixMasked(const Source& source, size_t start, size_t stop, size_t d, __mmask16 mask,
               const float* weights, float* const* states) {
  __m512 sums[Rows];
#pragma GCC unroll 8
  for (size_t r = 0; r < Rows; ++r) sums[r] = _mm512_maskz_loadu_ps(mask, states[r] + d);
  for (size_t j = start; j < stop; ++j) {
    const __m512 value = Source::Load(source.ValueAt(j) + d, mask);
#pragma GCC unroll 8
    for (size_t r = 0; r < Rows; ++r) {
      sums[r] = _mm512_fmadd_ps(_mm512_set1_ps(weights[r * kTilePositions + j]), value, sums[r]);
    }
  }
#pragma GCC unroll 8
  for (size_t r = 0; r < Rows; ++r) _mm512_mask_storeu_ps(states[r] + d, mask, sums[r]);
}

template <size_t Rows, size_t Vectors, class Source>
void MixPositions(const Source& source, size_t start, size_t stop, bool fetches,
                  const float* weights, float* const* states) {
  size_t d = 0;
  for (; d + Vectors * kLanes <= source.head_dim; d += Vectors * kLanes) {
    MixVectors<Rows, Vectors>(source, start, stop, d, fetches, weights, states);
  }
  for (; d < source.head_dim; d += kLanes) {
    MixMasked<Rows>(source, start, stop, d, MaskOf(source.head_dim - d), weights, states);
  }
}

// Adds the weighted values to rows [first, first + Rows). Positions that all of them see are taken
// together.
template <size_t Rows, class Source>
void Mix(const Source& source, const TileRows& rows, size_t first, const float* weights) {
  constexpr size_t kEnough = Rows == 1 ? 8 : 4;  // chains at once to hide the latency of fma
  float* const* const states = rows.states + first;
  const size_t common = SeenBy(rows, first);
  MixPositions<Rows, kEnough>(source, 0, common, first == 0, weights, states);
  if (common == kTilePositions) return;
  for (size_t r = 1; r < Rows; ++r) {
    MixPositions<1, 8>(source, common, SeenBy(rows, first + r), false, weights + r * kTilePositions,
                       states + r);
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
void MixAll(const Source& source, const TileRows& rows, float* scores) {
  BySix(rows.count, [&](auto count, size_t first) {
    constexpr size_t kRows = decltype(count)::kRows;
    float* const weights = scores + first * kTilePositions;
    for (size_t r = 0; r < kRows; ++r) {
      Weigh(source.head_dim, SeenBy(rows, first + r), weights + r * kTilePositions,
            rows.states[first + r]);
    }
    Mix<kRows>(source, rows, first, weights);
  });
}

void AddTile(const KvTile& tile, size_t head_dim, const TileRows& rows, float* scratch) {
  float* const scores = ScoresIn(scratch, head_dim);
  if (rows.count <= kMostRows) {
    const Halves source = {tile, head_dim};
    ScoreAll(source, rows, scores);
    return MixAll(source, rows, scores);
  }
  const Floats source = {tile, head_dim, scratch};
  WidenKeys(tile, head_dim, scratch);
  ScoreAll(source, rows, scores);
  WidenValues(tile, head_dim, SeenBy(rows, rows.count - 1), scratch);
  MixAll(source, rows, scores);
}

constexpr AttentionTable kTable = {
    {nullptr, AddTile, avx2::StoreKeyF16, avx2::StoreValueF16},
    {avx2::PrepareQueryQ8, avx512vnni::AddTileQ8, avx2::StoreKeyQ8, avx2::StoreValueQ8},
    avx2::Merge,
    avx2::Finish,
};

}  // namespace

const AttentionTable* Avx512VnniAttentionTable() { return &kTable; }

}  // namespace potluck
