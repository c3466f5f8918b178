// How the vector kernels of attention share out the rows of a tile. For kernel files only: every
// function here has internal linkage, so that no copy leaves the file that includes it.
#pragma once

#include <stddef.h>

#include "engine/kernels/attention_table.h"

namespace potluck {
namespace {

constexpr size_t kMostRows = 6;  // in registers at once

template <size_t N>
struct RowCount {
  static constexpr size_t kRows = N;
};

// Calls work(RowCount<6>, first row) for each six of count rows, then once for what is left.
template <class Work>
[[maybe_unused]] inline void BySix(size_t count, const Work& work) {
  size_t first = 0;
  for (; first + kMostRows <= count; first += kMostRows) work(RowCount<kMostRows>(), first);
  switch (count - first) {
    case 1:
      return work(RowCount<1>(), first);
    case 2:
      return work(RowCount<2>(), first);
    case 3:
      return work(RowCount<3>(), first);
    case 4:
      return work(RowCount<4>(), first);
    case 5:
      return work(RowCount<5>(), first);
    default:
      return;
  }
}

// How many positions of the tile a row sees.
[[maybe_unused]] inline size_t SeenBy(const TileRows& rows, size_t row) {
  const size_t seen = rows.n + row / rows.n_heads;
  return seen < kTilePositions ? seen : kTilePositions;
}

constexpr size_t kLineValues = 32;  // f16 values of a cache line

// Fetch the next tile into the cache, some lines at each step of the loops over this one, for a
// burst would be waited for: 8 KV heads of 128 with 4 rows each take 0.41 instead of 0.66 ms for
// 4096 positions (Zen 5, one thread).

// Keys of its pages from `page` on: called for each dimension; a line holds two of a page.
template <size_t Pages>
[[maybe_unused]] inline void FetchKeys(const KvTile& tile, size_t page, size_t d) {
  if (Pages == 1) __builtin_prefetch(tile.ahead[page] + d * kPagePositions);
  page += d % 2 * (Pages / 2);
  for (size_t i = 0; i < Pages / 2; ++i) {
    __builtin_prefetch(tile.ahead[page + i] + d / 2 * kLineValues);
  }
}

// Its values: called for each position and each n of its dimensions.
[[maybe_unused]] inline void FetchValues(const KvTile& tile, size_t head_dim, size_t j, size_t d,
                                         size_t n) {
  const uint16_t* const value =
      tile.ahead[j / kPagePositions] + (kPagePositions + j % kPagePositions) * head_dim;
  for (size_t i = 0; i < n; i += kLineValues) __builtin_prefetch(value + d + i);
}

// Where the scores lie, [kMostTileRows][64].
[[maybe_unused]] inline float* ScoresIn(float* scratch, size_t head_dim) {
  return scratch + kTileScratchPerDim * ((head_dim + 15) / 16 * 16);
}

}  // namespace
}  // namespace potluck
