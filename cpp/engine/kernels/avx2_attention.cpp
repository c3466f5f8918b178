// Attention for AVX2, FMA and F16C: the scalar chains, lanes being positions (scores) or dimensions
// (sums).
//
// Query rows are taken up to six at a time, so that a key or value is loaded once for all of them;
// the template's numbers of rows and vectors keep all sums in the 16 registers. More than six rows
// share a tile widened to f32 once: they pass over it slice by slice, so that what is in use stays
// in the first cache.
#include "engine/kernels/avx2_attention.h"

#include <immintrin.h>
#include <stddef.h>
#include <stdint.h>

#include "engine/kernels/attention_f16.h"
#include "engine/kernels/attention_rows.h"
#include "engine/kernels/avx2_weigh.h"

namespace potluck {
namespace {

constexpr size_t kSlice = kPagePositions;  // positions or dimensions of a slice of a widened tile
static_assert(kSlice == 2 * kLanes, "six rows times a slice are twelve sums");

inline __m256 Load(const uint16_t* halves) {
  return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(halves)));
}

// Where a tile's keys and values are: in their pages as f16, ...
struct Halves {
  const KvTile& tile;
  size_t head_dim;
  const uint16_t* Keys(size_t page) const { return HalvesOf(tile.sections[page]); }
  const uint16_t* Value(size_t j, size_t d) const {
    return HalvesOf(tile.sections[j / kPagePositions]) +
           (kPagePositions + j % kPagePositions) * head_dim + d;
  }
};

// ... or in scratch as f32: keys [4 pages][head_dim][16 positions] and then, in their place, values
// [head_dim / 16][64 positions][16 dimensions], of which a row of sums takes at most one slice.
struct Floats {
  const KvTile& tile;
  size_t head_dim;
  float* wide;
  float* Keys(size_t page) const { return wide + page * kPagePositions * head_dim; }
  float* Value(size_t j, size_t d) const {
    return wide + d / kSlice * kSlice * kTilePositions + j * kSlice + d % kSlice;
  }
};

void WidenKeys(const Floats& to) {
  for (size_t p = 0; p < kTilePages; ++p) {
    float* const keys = to.Keys(p);
    for (size_t i = 0; i < kPagePositions * to.head_dim; i += kLanes) {
      _mm256_store_ps(keys + i, Load(HalvesOf(to.tile.sections[p]) + i));
    }
  }
}

// Dimensions of whole vectors; what is left is read from the page.
void WidenValues(const Floats& to, size_t n) {
  const Halves from = {to.tile, to.head_dim};
  for (size_t j = 0; j < n; ++j) {
    for (size_t d = 0; d + kLanes <= to.head_dim; d += kLanes) {
      _mm256_store_ps(to.Value(j, d), Load(from.Value(j, d)));
    }
  }
}

// sums[r][v] = fma(weight(r), value(v), sums[r][v]), in the order that needs the fewest registers:
// the smaller side is held, the larger one passes by.
template <size_t Rows, size_t Vectors, class Weight, class Value>
inline void AddProducts(const Weight& weight, const Value& value, __m256 (&sums)[Rows][Vectors]) {
  if constexpr (Rows < Vectors) {
    __m256 held[Rows];
#pragma GCC unroll 8
    for (size_t r = 0; r < Rows; ++r) held[r] = _mm256_broadcast_ss(weight(r));
#pragma GCC unroll 8
    for (size_t v = 0; v < Vectors; ++v) {
      __m256 passing = Load(value(v));
#pragma GCC unroll 8
      for (size_t r = 0; r < Rows; ++r) sums[r][v] = _mm256_fmadd_ps(held[r], passing, sums[r][v]);
    }
  } else {
    __m256 held[Vectors];
#pragma GCC unroll 8
    for (size_t v = 0; v < Vectors; ++v) held[v] = Load(value(v));
#pragma GCC unroll 8
    for (size_t r = 0; r < Rows; ++r) {
      const __m256 passing = _mm256_broadcast_ss(weight(r));
#pragma GCC unroll 8
      for (size_t v = 0; v < Vectors; ++v) {
        sums[r][v] = _mm256_fmadd_ps(passing, held[v], sums[r][v]);
      }
    }
  }
}

// Scores of `Rows` query rows with positions [start, start + 8 * Vectors); scores is [Rows][64].
template <size_t Rows, size_t Vectors, class Source>
void Score(const Source& source, size_t start, bool fetches, const void* const* q, float* scores) {
  static_assert(Vectors % 2 == 0, "whole pages");
  __m256 sums[Rows][Vectors];
  decltype(source.Keys(0)) keys[Vectors / 2];
  const float* row[Rows];
#pragma GCC unroll 8
  for (size_t i = 0; i < Vectors / 2; ++i) keys[i] = source.Keys(start / kPagePositions + i);
#pragma GCC unroll 8
  for (size_t r = 0; r < Rows; ++r) {
    row[r] = static_cast<const float*>(q[r]);
#pragma GCC unroll 8
    for (size_t v = 0; v < Vectors; ++v) sums[r][v] = _mm256_setzero_ps();
  }
  for (size_t d = 0; d < source.head_dim; ++d) {
    if (fetches) FetchKeys<Vectors / 2>(source.tile, start / kPagePositions, d);
    AddProducts([&](size_t r) { return row[r] + d; },
                [&](size_t v) { return keys[v / 2] + d * kPagePositions + v % 2 * kLanes; }, sums);
  }
#pragma GCC unroll 8
  for (size_t r = 0; r < Rows; ++r) {
#pragma GCC unroll 8
    for (size_t v = 0; v < Vectors; ++v) {
      _mm256_store_ps(scores + r * kTilePositions + start + v * kLanes, sums[r][v]);
    }
  }
}

// Adds the weighted values of positions [start, stop) to dimensions [d, d + 8 * Vectors) of Rows
// states.
template <size_t Rows, size_t Vectors, class Source>
void MixPositions(const Source& source, size_t start, size_t stop, size_t d, bool fetches,
                  const float* weights, float* const* states) {
  __m256 sums[Rows][Vectors];
#pragma GCC unroll 8
  for (size_t r = 0; r < Rows; ++r) {
#pragma GCC unroll 8
    for (size_t v = 0; v < Vectors; ++v) sums[r][v] = Load(states[r] + d + v * kLanes);
  }
  for (size_t j = start; j < stop; ++j) {
    const auto* const value = source.Value(j, d);
    if (fetches) FetchValues(source.tile, source.head_dim, j, d, Vectors * kLanes);
    AddProducts([&](size_t r) { return weights + r * kTilePositions + j; },
                [&](size_t v) { return value + v * kLanes; }, sums);
  }
#pragma GCC unroll 8
  for (size_t r = 0; r < Rows; ++r) {
#pragma GCC unroll 8
    for (size_t v = 0; v < Vectors; ++v) _mm256_storeu_ps(states[r] + d + v * kLanes, sums[r][v]);
  }
}

// Dimensions from d of rows [first, first + Rows). Positions that all of them see are taken
// together.
template <size_t Rows, size_t Vectors, class Source>
void Mix(const Source& source, const TileRows& rows, size_t first, size_t d, const float* weights) {
  float* const* const states = rows.states + first;
  const size_t common = SeenBy(rows, first);
  weights += first * kTilePositions;
  MixPositions<Rows, Vectors>(source, 0, common, d, first == 0, weights, states);
  if (common == kTilePositions) return;
  for (size_t r = 1; r < Rows; ++r) {
    MixPositions<1, Vectors>(source, common, SeenBy(rows, first + r), d, false,
                             weights + r * kTilePositions, states + r);
  }
}

// The one dimension d of a row, for heads that are no multiple of 8.
void MixOne(const Halves& source, size_t n, size_t d, const float* weights, float* state) {
  __m128 sum = _mm_load_ss(state + d);
  for (size_t j = 0; j < n; ++j) {
    const __m128 value = _mm_cvtph_ps(_mm_cvtsi32_si128(*source.Value(j, d)));
    sum = _mm_fmadd_ss(_mm_load_ss(weights + j), value, sum);
  }
  _mm_store_ss(state + d, sum);
}

// Sums of a row at once: enough chains to hide the latency of fma, and no more than the registers
// hold.
constexpr size_t VectorsFor(size_t n_rows) { return n_rows == 1 ? 8 : n_rows < 4 ? 4 : 2; }

// Dimensions [d, d + 8 * Vectors) by as many as fit; returns the first that is left.
template <size_t Rows, size_t Vectors, class Source>
size_t MixWhole(const Source& source, const TileRows& rows, size_t first, size_t d,
                const float* weights) {
  for (; d + Vectors * kLanes <= source.head_dim; d += Vectors * kLanes) {
    Mix<Rows, Vectors>(source, rows, first, d, weights);
  }
  return d;
}

void AddToFew(const Halves& source, const TileRows& rows, float* scores) {
  const size_t n = SeenBy(rows, rows.count - 1);
  BySix(rows.count, [&](auto count, size_t first) {
    constexpr size_t kRows = decltype(count)::kRows;
    constexpr size_t kVectors = VectorsFor(kRows);
    for (size_t start = 0; start < n; start += kVectors * kLanes) {
      Score<kRows, kVectors>(source, start, true, rows.q + first, scores);
    }
    for (size_t r = 0; r < kRows; ++r) {
      Weigh(source.head_dim, SeenBy(rows, r), scores + r * kTilePositions, rows.states[r]);
    }
    size_t d = MixWhole<kRows, kVectors>(source, rows, first, 0, scores);
    MixWhole<kRows, 1>(source, rows, first, d, scores);
  });
}

void AddToMany(const Floats& source, const TileRows& rows, float* scores) {
  const size_t n = SeenBy(rows, rows.count - 1);
  WidenKeys(source);
  for (size_t start = 0; start < n; start += kSlice) {
    BySix(rows.count, [&](auto count, size_t first) {
      Score<decltype(count)::kRows, 2>(source, start, first == 0, rows.q + first,
                                       scores + first * kTilePositions);
    });
  }
  for (size_t r = 0; r < rows.count; ++r) {
    Weigh(source.head_dim, SeenBy(rows, r), scores + r * kTilePositions, rows.states[r]);
  }
  WidenValues(source, n);
  for (size_t d = 0; d + kLanes <= source.head_dim; d += kSlice) {
    BySix(rows.count, [&](auto count, size_t first) {
      constexpr size_t kRows = decltype(count)::kRows;
      if (d + kSlice <= source.head_dim) return Mix<kRows, 2>(source, rows, first, d, scores);
      Mix<kRows, 1>(source, rows, first, d, scores);
    });
  }
}

void AddTile(const KvTile& tile, size_t head_dim, const TileRows& rows, float* scratch) {
  float* const scores = ScoresIn(scratch, head_dim);
  const Halves pages = {tile, head_dim};
  if (rows.count <= kMostRows) {
    AddToFew(pages, rows, scores);
  } else {
    AddToMany({tile, head_dim, scratch}, rows, scores);
  }
  for (size_t d = head_dim / kLanes * kLanes; d < head_dim; ++d) {
    for (size_t r = 0; r < rows.count; ++r) {
      MixOne(pages, SeenBy(rows, r), d, scores + r * kTilePositions, rows.states[r]);
    }
  }
}

constexpr AttentionTable kTable = {
    {nullptr, AddTile, avx2::StoreKeyF16, avx2::StoreValueF16},
    {avx2::PrepareQueryQ8, avx2::AddTileQ8, avx2::StoreKeyQ8, avx2::StoreValueQ8},
    avx2::Merge,
    avx2::Finish,
};

}  // namespace

const AttentionTable* Avx2AttentionTable() { return &kTable; }

}  // namespace potluck
