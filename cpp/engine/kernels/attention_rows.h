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

// Where the scores lie, [kMostTileRows][64].
[[maybe_unused]] inline float* ScoresIn(float* scratch, size_t head_dim) {
  return scratch + kTileScratchPerDim * ((head_dim + 15) / 16 * 16);
}

}  // namespace
}  // namespace potluck
