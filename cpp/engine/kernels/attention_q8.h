// Where the parts of a q8 section and of a prepared query row lie, and the bounds of codes. Every
// function here has internal linkage, so that kernel files of any ISA may include it.
#pragma once

#include <stddef.h>
#include <stdint.h>

#include "engine/kernels/attention_table.h"

namespace potluck {
namespace {
namespace q8 {

constexpr float kCodeRange = 127.0f;
constexpr float kWeightRange = 32767.0f;
constexpr float kTiny = 0x1p-100f;  // what is below becomes 0
constexpr float kTooLarge = 65536.0f;

// Codes lie in fours; x86 kernels take one as two pairs of int16, the even ones and the odd ones.
[[maybe_unused]] constexpr size_t Padded(size_t head_dim) { return (head_dim + 3) / 4 * 4; }

// A section: keys, values, scales of the keys, scales of the values.
[[maybe_unused]] constexpr size_t ValuesAt(size_t head_dim) {
  return kPagePositions * Padded(head_dim);
}
[[maybe_unused]] constexpr size_t KeyScalesAt(size_t head_dim) { return 2 * ValuesAt(head_dim); }
[[maybe_unused]] constexpr size_t ValueScalesAt(size_t head_dim) {
  return KeyScalesAt(head_dim) + kPagePositions * sizeof(float);
}
[[maybe_unused]] constexpr size_t SectionBytes(size_t head_dim) {
  return ValueScalesAt(head_dim) + kPagePositions * sizeof(float);
}

// A query row: codes int16, x86 kernels' of each four the even ones first; then their scale.
[[maybe_unused]] constexpr size_t QueryScaleAt(size_t head_dim) { return 2 * Padded(head_dim); }
[[maybe_unused]] constexpr size_t QueryBytes(size_t head_dim) {
  return (QueryScaleAt(head_dim) + sizeof(float) + 63) / 64 * 64;
}
[[maybe_unused]] constexpr float QueryRange(size_t head_dim) {
  const size_t most = size_t{INT32_MAX} / (127 * Padded(head_dim));
  return static_cast<float>(most < 32767 ? most : 32767);
}

// Fetch the next tile into the cache, some lines at each step of the loops over this one.

// Keys of kPages pages from `page` on: called for each four of dimensions.
template <size_t kPages>
[[maybe_unused]] inline void FetchKeys(const KvTile& tile, size_t head_dim, size_t page,
                                       size_t four) {
  for (size_t p = page; p < page + kPages; ++p) {
    __builtin_prefetch(tile.ahead[p] + four * 64);
    if (four != 0) continue;
    __builtin_prefetch(tile.ahead[p] + KeyScalesAt(head_dim));
    __builtin_prefetch(tile.ahead[p] + ValueScalesAt(head_dim));
  }
}

// Values: called for each four of positions and each n of their dimensions.
[[maybe_unused]] inline void FetchValues(const KvTile& tile, size_t head_dim, size_t four, size_t d,
                                         size_t n) {
  const uint8_t* const at =
      tile.ahead[four / 4] + ValuesAt(head_dim) + (four % 4 * Padded(head_dim) + d) * 4;
  for (size_t i = 0; i < n * 4; i += 64) __builtin_prefetch(at + i);
}

// While rows are mixed, a row of scores holds their codes, 64 int16 in the order of a query's, and
// here their unit.
constexpr size_t kUnitAt = kTilePositions - 1;

}  // namespace q8
}  // namespace
}  // namespace potluck
