// Attention for ARM: the scalar chains, lanes being positions (scores) or dimensions (sums).
//
// Query rows are taken six at a time against 16 positions or dimensions: 24 sums, 4 vectors and a
// factor in 32 registers. Fewer rows take more positions, for a chain waits 4 cycles for each fma.
// More than six rows share a tile widened to f32 once: they pass over it slice by slice, so that
// what is in use stays in the first cache.
#include "engine/kernels/neon_attention.h"

#include <arm_neon.h>
#include <stddef.h>
#include <stdint.h>

#include "engine/kernels/attention_f16.h"
#include "engine/kernels/attention_rows.h"
#include "engine/kernels/neon_weigh.h"
#include "engine/kernels/order_loads.h"

namespace potluck {
namespace {

constexpr size_t kSlice = kPagePositions;  // positions or dimensions of a slice of a widened tile
constexpr size_t kSliceVectors = kSlice / kLanes;

inline float32x4_t Load(const uint16_t* halves) {
  return vcvt_f32_f16(vreinterpret_f16_u16(vld1_u16(halves)));
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
// [head_dim / 16][64 positions][16 dimensions].
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
      vst1q_f32(keys + i, Load(HalvesOf(to.tile.sections[p]) + i));
    }
  }
}

// Dimensions of whole vectors; what is left is read from the page.
void WidenValues(const Floats& to, size_t n) {
  const Halves from = {to.tile, to.head_dim};
  for (size_t j = 0; j < n; ++j) {
    for (size_t d = 0; d + kLanes <= to.head_dim; d += kLanes) {
      vst1q_f32(to.Value(j, d), Load(from.Value(j, d)));
    }
  }
}

// sums[r][v] += *factor(r) * value(v), in the order that needs the fewest registers: the smaller
// side is held, the larger one passes by.
template <size_t Rows, size_t Vectors, class Factor, class Value>
inline void AddProducts(const Factor& factor, const Value& value,
                        float32x4_t (&sums)[Rows][Vectors]) {
  if constexpr (Rows < Vectors) {
    float held[Rows];
#pragma GCC unroll 8
    for (size_t r = 0; r < Rows; ++r) held[r] = *factor(r);
#pragma GCC unroll 16
    for (size_t v = 0; v < Vectors; ++v) {
      const float32x4_t passing = Load(value(v));
#pragma GCC unroll 8
      for (size_t r = 0; r < Rows; ++r) sums[r][v] = vfmaq_n_f32(sums[r][v], passing, held[r]);
      POTLUCK_ORDER_LOADS();
    }
  } else {
    float32x4_t held[Vectors];
#pragma GCC unroll 16
    for (size_t v = 0; v < Vectors; ++v) held[v] = Load(value(v));
#pragma GCC unroll 8
    for (size_t r = 0; r < Rows; ++r) {
      const float passing = *factor(r);
#pragma GCC unroll 16
      for (size_t v = 0; v < Vectors; ++v) {
        sums[r][v] = vfmaq_n_f32(sums[r][v], held[v], passing);
      }
      if (Rows * Vectors == 24) POTLUCK_ORDER_LOADS();
    }
  }
}

// Scores of `Rows` query rows with positions [start, start + 4 * Vectors); scores is [Rows][64].
template <size_t Rows, size_t Vectors, class Source>
void Score(const Source& source, size_t start, bool fetches, const void* const* q, float* scores) {
  static_assert(Vectors % kSliceVectors == 0, "whole pages");
  constexpr size_t kPages = Vectors / kSliceVectors;
  float32x4_t sums[Rows][Vectors];
  decltype(source.Keys(0)) keys[kPages];
  const float* row[Rows];
#pragma GCC unroll 4
  for (size_t i = 0; i < kPages; ++i) keys[i] = source.Keys(start / kPagePositions + i);
#pragma GCC unroll 8
  for (size_t r = 0; r < Rows; ++r) {
    row[r] = static_cast<const float*>(q[r]);
#pragma GCC unroll 16
    for (size_t v = 0; v < Vectors; ++v) sums[r][v] = vdupq_n_f32(0.0f);
  }
  for (size_t d = 0; d < source.head_dim; ++d) {
    if (fetches) FetchKeys<kPages>(source.tile, start / kPagePositions, d);
    AddProducts([&](size_t r) { return row[r] + d; },
                [&](size_t v) {
                  return keys[v / kSliceVectors] + d * kPagePositions + v % kSliceVectors * kLanes;
                },
                sums);
  }
#pragma GCC unroll 8
  for (size_t r = 0; r < Rows; ++r) {
#pragma GCC unroll 16
    for (size_t v = 0; v < Vectors; ++v) {
      vst1q_f32(scores + r * kTilePositions + start + v * kLanes, sums[r][v]);
    }
  }
}

// Adds the weighted values of positions [start, stop) to dimensions [d, d + 4 * Vectors) of Rows
// states.
template <size_t Rows, size_t Vectors, class Source>
void MixPositions(const Source& source, size_t start, size_t stop, size_t d, bool fetches,
                  const float* weights, float* const* states) {
  float32x4_t sums[Rows][Vectors];
#pragma GCC unroll 8
  for (size_t r = 0; r < Rows; ++r) {
#pragma GCC unroll 16
    for (size_t v = 0; v < Vectors; ++v) sums[r][v] = vld1q_f32(states[r] + d + v * kLanes);
  }
  for (size_t j = start; j < stop; ++j) {
    const auto* const value = source.Value(j, d);
    if (fetches) FetchValues(source.tile, source.head_dim, j, d, Vectors * kLanes);
    AddProducts([&](size_t r) { return weights + r * kTilePositions + j; },
                [&](size_t v) { return value + v * kLanes; }, sums);
  }
#pragma GCC unroll 8
  for (size_t r = 0; r < Rows; ++r) {
#pragma GCC unroll 16
    for (size_t v = 0; v < Vectors; ++v) vst1q_f32(states[r] + d + v * kLanes, sums[r][v]);
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

// The one dimension d of a row, for heads that are no multiple of 4.
void MixOne(const Halves& source, size_t n, size_t d, const float* weights, float* state) {
  float sum = state[d];
  for (size_t j = 0; j < n; ++j) {
    const float16x4_t value = vreinterpret_f16_u16(vdup_n_u16(*source.Value(j, d)));
    sum = __builtin_fmaf(weights[j], vgetq_lane_f32(vcvt_f32_f16(value), 0), sum);
  }
  state[d] = sum;
}

// Vectors of a row at once: enough chains to hide the latency of fma, and no more than the
// registers hold.
constexpr size_t VectorsFor(size_t n_rows) { return n_rows == 1 ? 16 : n_rows < 4 ? 8 : 4; }

// Dimensions [d, d + 4 * Vectors) by as many as fit; returns the first that is left.
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
    d = MixWhole<kRows, kSliceVectors>(source, rows, first, d, scores);
    MixWhole<kRows, 1>(source, rows, first, d, scores);
  });
}

void AddToMany(const Floats& source, const TileRows& rows, float* scores) {
  const size_t n = SeenBy(rows, rows.count - 1);
  WidenKeys(source);
  for (size_t start = 0; start < n; start += kSlice) {
    BySix(rows.count, [&](auto count, size_t first) {
      Score<decltype(count)::kRows, kSliceVectors>(source, start, first == 0, rows.q + first,
                                                   scores + first * kTilePositions);
    });
  }
  for (size_t r = 0; r < rows.count; ++r) {
    Weigh(source.head_dim, SeenBy(rows, r), scores + r * kTilePositions, rows.states[r]);
  }
  WidenValues(source, n);
  for (size_t d = 0; d + kLanes <= source.head_dim;) {
    const bool is_whole = d + kSlice <= source.head_dim;
    BySix(rows.count, [&](auto count, size_t first) {
      constexpr size_t kRows = decltype(count)::kRows;
      if (is_whole) return Mix<kRows, kSliceVectors>(source, rows, first, d, scores);
      Mix<kRows, 1>(source, rows, first, d, scores);
    });
    d += is_whole ? kSlice : kLanes;
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
    {nullptr, AddTile, neon::StoreKeyF16, neon::StoreValueF16},
    {neon::PrepareQueryQ8, neon::AddTileQ8, neon::StoreKeyQ8, neon::StoreValueQ8},
    neon::Merge,
    neon::Finish,
};

}  // namespace

const AttentionTable* NeonAttentionTable() { return &kTable; }

}  // namespace potluck
