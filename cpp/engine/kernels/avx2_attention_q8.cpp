// Attention over q8 keys and values for AVX2. Integer sums are exact, so all that must follow the
// scalar kernel are the few float operations of a row.
//
// madd takes pairs of int16: the even and the odd ones of four codes. As with f16, up to six rows
// read a page as it is, and more share a tile widened to such pairs, slice by slice.
#include <immintrin.h>
#include <stddef.h>
#include <stdint.h>

#include "engine/kernels/attention_q8.h"
#include "engine/kernels/attention_rows.h"
#include "engine/kernels/avx2_attention.h"
#include "engine/kernels/avx2_weigh_q8.h"

namespace potluck {
namespace {

constexpr size_t kSlice = kPagePositions;  // positions or dimensions of a slice of a widened tile
constexpr size_t kPairBytes = 4 * kSlice;  // of a slice, one pair of each
constexpr size_t kFours = kTilePositions / 4;

inline __m256i LoadBytes(const uint8_t* at) {
  return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(at));
}

// The even or the odd ones of each four codes.
inline __m256i PairsOf(__m256i codes, size_t odd) {
  return _mm256_srai_epi16(odd != 0 ? codes : _mm256_slli_epi16(codes, 8), 8);
}

// Where a tile's codes are: in their pages as bytes, ...
struct Bytes {
  const KvTile& tile;
  size_t head_dim;
  const uint8_t* Keys(size_t page) const { return tile.sections[page]; }
  // Of dimensions 4 * four + odd and + 2, for 8 positions of a page.
  static __m256i KeyPairs(const uint8_t* keys, size_t four, size_t odd, size_t half) {
    return PairsOf(LoadBytes(keys + four * kPairBytes + half * 32), odd);
  }
  // Of positions 4 * four + odd and + 2, for dimensions from d on.
  __m256i ValuePairs(size_t four, size_t odd, size_t d) const {
    const uint8_t* const values = tile.sections[four / 4] + q8::ValuesAt(head_dim);
    return PairsOf(LoadBytes(values + (four % 4 * q8::Padded(head_dim) + d) * 4), odd);
  }
};

// ... or in scratch as pairs: keys [4 pages][head_dim / 4][even, odd][16 positions] and then, in
// their place, values [head_dim / 16][16][even, odd][16 dimensions].
struct Pairs {
  const KvTile& tile;
  size_t head_dim;
  uint8_t* wide;
  uint8_t* Keys(size_t page) const { return wide + page * q8::Padded(head_dim) / 2 * kPairBytes; }
  static __m256i KeyPairs(const uint8_t* keys, size_t four, size_t odd, size_t half) {
    return LoadBytes(keys + (2 * four + odd) * kPairBytes + half * 32);
  }
  uint8_t* Values(size_t four, size_t odd, size_t d) const {
    return wide + (d / kSlice * 2 * kFours + 2 * four + odd) * kPairBytes + d % kSlice * 4;
  }
  __m256i ValuePairs(size_t four, size_t odd, size_t d) const {
    return LoadBytes(Values(four, odd, d));
  }
};

inline void StoreBytes(uint8_t* at, __m256i bytes) {
  _mm256_store_si256(reinterpret_cast<__m256i*>(at), bytes);
}

void WidenKeys(const Pairs& to) {
  for (size_t p = 0; p < kTilePages; ++p) {
    uint8_t* at = to.Keys(p);
    const uint8_t* const from = to.tile.sections[p];
    for (size_t four = 0; four < q8::Padded(to.head_dim) / 4; ++four) {
      for (size_t odd = 0; odd < 2; ++odd, at += kPairBytes) {
        StoreBytes(at, Bytes::KeyPairs(from, four, odd, 0));
        StoreBytes(at + 32, Bytes::KeyPairs(from, four, odd, 1));
      }
    }
  }
}

void WidenValues(const Pairs& to, size_t n_fours) {
  const Bytes from = {to.tile, to.head_dim};
  for (size_t four = 0; four < n_fours; ++four) {
    for (size_t d = 0; d < to.head_dim; d += kLanes) {
      for (size_t odd = 0; odd < 2; ++odd) {
        StoreBytes(to.Values(four, odd, d), from.ValuePairs(four, odd, d));
      }
    }
  }
}

inline __m256i Broadcast(const uint8_t* pair) {
  int32_t both = 0;
  __builtin_memcpy(&both, pair, sizeof both);
  return _mm256_set1_epi32(both);
}

// sum + a . b, computed here: gcc otherwise collects the products of several steps, adds them as a
// tree and spills.
inline __m256i AddDots(__m256i sum, __m256i a, __m256i b) {
  sum = _mm256_add_epi32(sum, _mm256_madd_epi16(a, b));
  asm volatile("" : "+x"(sum));
  return sum;
}

// sums[r][v] += pairs(r) . pairs(v), in the order that needs the fewest registers: the smaller side
// is held, the larger one passes by.
template <size_t kRows, size_t kVectors, class Row, class Value>
inline void AddProducts(const Row& row, const Value& value, __m256i (&sums)[kRows][kVectors]) {
  __m256i held[kRows < kVectors ? kRows : kVectors];
  if constexpr (kRows < kVectors) {
#pragma GCC unroll 8
    for (size_t r = 0; r < kRows; ++r) held[r] = row(r);
#pragma GCC unroll 8
    for (size_t v = 0; v < kVectors; ++v) {
      const __m256i passing = value(v);
#pragma GCC unroll 8
      for (size_t r = 0; r < kRows; ++r) {
        sums[r][v] = AddDots(sums[r][v], held[r], passing);
      }
    }
  } else {
#pragma GCC unroll 8
    for (size_t v = 0; v < kVectors; ++v) held[v] = value(v);
#pragma GCC unroll 8
    for (size_t r = 0; r < kRows; ++r) {
      const __m256i passing = row(r);
#pragma GCC unroll 8
      for (size_t v = 0; v < kVectors; ++v) {
        sums[r][v] = AddDots(sums[r][v], passing, held[v]);
      }
    }
  }
}

// Integer scores of kRows query rows with positions [start, start + 8 * kVectors); sums is
// [kRows][64] and holds int32.
template <size_t kRows, size_t kVectors, class Source>
void Score(const Source& source, size_t start, bool fetches, const void* const* q, float* scores) {
  static_assert(kVectors % 2 == 0, "whole pages");
  __m256i sums[kRows][kVectors];
  const uint8_t* keys[kVectors / 2];
  const uint8_t* row[kRows];
#pragma GCC unroll 8
  for (size_t i = 0; i < kVectors / 2; ++i) keys[i] = source.Keys(start / kPagePositions + i);
#pragma GCC unroll 8
  for (size_t r = 0; r < kRows; ++r) {
    row[r] = static_cast<const uint8_t*>(q[r]);
#pragma GCC unroll 8
    for (size_t v = 0; v < kVectors; ++v) sums[r][v] = _mm256_setzero_si256();
  }
  for (size_t four = 0; four < q8::Padded(source.head_dim) / 4; ++four) {
    if (fetches) {
      q8::FetchKeys<kVectors / 2>(source.tile, source.head_dim, start / kPagePositions, four);
    }
#pragma GCC unroll 2
    for (size_t odd = 0; odd < 2; ++odd) {
      AddProducts([&](size_t r) { return Broadcast(row[r] + four * 8 + odd * 4); },
                  [&](size_t v) { return Source::KeyPairs(keys[v / 2], four, odd, v % 2); }, sums);
    }
  }
#pragma GCC unroll 8
  for (size_t r = 0; r < kRows; ++r) {
#pragma GCC unroll 8
    for (size_t v = 0; v < kVectors; ++v) {
      float* const at = scores + r * kTilePositions + start + v * kLanes;
      _mm256_store_si256(reinterpret_cast<__m256i*>(at), sums[r][v]);
    }
  }
}

// o[d..d+8) = fma(sums, unit, o); those below head_dim.
inline void AddTo(float* o, size_t d, size_t head_dim, __m256i sums, float unit) {
  const __m256 added = _mm256_cvtepi32_ps(sums);
  if (d + kLanes <= head_dim) {
    _mm256_storeu_ps(o + d, _mm256_fmadd_ps(added, _mm256_set1_ps(unit), Load(o + d)));
    return;
  }
  const __m256i mask = MaskOf(head_dim - d);
  const __m256 before = _mm256_maskload_ps(o + d, mask);
  _mm256_maskstore_ps(o + d, mask, _mm256_fmadd_ps(added, _mm256_set1_ps(unit), before));
}

// Adds the weighted values to dimensions [d, d + 8 * kVectors) of rows [first, first + kRows).
template <size_t kRows, size_t kVectors, class Source>
void Mix(const Source& source, const TileRows& rows, size_t first, size_t n_fours, size_t d,
         const float* scores) {
  __m256i sums[kRows][kVectors];
  scores += first * kTilePositions;
  const auto* const codes = reinterpret_cast<const uint8_t*>(scores);
#pragma GCC unroll 8
  for (size_t r = 0; r < kRows; ++r) {
#pragma GCC unroll 8
    for (size_t v = 0; v < kVectors; ++v) sums[r][v] = _mm256_setzero_si256();
  }
  for (size_t four = 0; four < n_fours; ++four) {
    if (first == 0) q8::FetchValues(source.tile, source.head_dim, four, d, kVectors * kLanes);
#pragma GCC unroll 2
    for (size_t odd = 0; odd < 2; ++odd) {
      AddProducts(
          [&](size_t r) {
            return Broadcast(codes + r * kTilePositions * sizeof(float) + four * 8 + odd * 4);
          },
          [&](size_t v) { return source.ValuePairs(four, odd, d + v * kLanes); }, sums);
    }
  }
#pragma GCC unroll 8
  for (size_t r = 0; r < kRows; ++r) {
    const float unit = scores[r * kTilePositions + q8::kUnitAt];
#pragma GCC unroll 8
    for (size_t v = 0; v < kVectors; ++v) {
      AddTo(rows.states[first + r], d + v * kLanes, source.head_dim, sums[r][v], unit);
    }
  }
}

constexpr size_t VectorsFor(size_t n_rows) { return n_rows == 1 ? 8 : n_rows < 4 ? 4 : 2; }

void AddToFew(const Bytes& source, const TileRows& rows, float* scores) {
  const size_t n = SeenBy(rows, rows.count - 1);
  const size_t head_dim = source.head_dim;
  BySix(rows.count, [&](auto count, size_t first) {
    constexpr size_t kRows = decltype(count)::kRows;
    constexpr size_t kVectors = VectorsFor(kRows);
    for (size_t start = 0; start < n; start += kVectors * kLanes) {
      Score<kRows, kVectors>(source, start, true, rows.q, scores);
    }
    WeighRows(source.tile, head_dim, rows, 0, kRows, scores);
    size_t d = 0;
    for (; d + kVectors * kLanes <= head_dim; d += kVectors * kLanes) {
      Mix<kRows, kVectors>(source, rows, first, (n + 3) / 4, d, scores);
    }
    for (; d < head_dim; d += kLanes) {
      Mix<kRows, 1>(source, rows, first, (n + 3) / 4, d, scores);
    }
  });
}

void AddToMany(const Pairs& source, const TileRows& rows, float* scores) {
  const size_t n = SeenBy(rows, rows.count - 1);
  const size_t n_fours = (n + 3) / 4;
  WidenKeys(source);
  for (size_t start = 0; start < n; start += kSlice) {
    BySix(rows.count, [&](auto count, size_t first) {
      Score<decltype(count)::kRows, 2>(source, start, first == 0, rows.q + first,
                                       scores + first * kTilePositions);
    });
  }
  BySix(rows.count, [&](auto count, size_t first) {
    WeighRows(source.tile, source.head_dim, rows, first, first + decltype(count)::kRows, scores);
  });
  WidenValues(source, n_fours);
  for (size_t d = 0; d < source.head_dim; d += kSlice) {
    BySix(rows.count, [&](auto count, size_t first) {
      constexpr size_t kRows = decltype(count)::kRows;
      if (d + kLanes < source.head_dim) {
        return Mix<kRows, 2>(source, rows, first, n_fours, d, scores);
      }
      Mix<kRows, 1>(source, rows, first, n_fours, d, scores);
    });
  }
}

}  // namespace

namespace avx2 {

void AddTileQ8(const KvTile& tile, size_t head_dim, const TileRows& rows, float* scratch) {
  float* const scores = ScoresIn(scratch, head_dim);
  if (rows.count <= kMostRows) {
    AddToFew({tile, head_dim}, rows, scores);
  } else {
    AddToMany({tile, head_dim, reinterpret_cast<uint8_t*>(scratch)}, rows, scores);
  }
}

}  // namespace avx2
}  // namespace potluck
