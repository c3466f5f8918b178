// How tiles for smmla lie in scratch. An smmla multiplies 2 rows of weights by 2 rows of
// activations, 8 values of k each, into 2 x 2 sums: (weight 0, activation 0), (0, 1), (1, 0), (1,
// 1). A panel holds 4 values of k of a row side by side; two of its vectors zipped are 8 of each
// row, so unpacking zips and there is no second layout of panels. The words of 4 rows of
// activations are zipped as they are read.
//
// Every function here has internal linkage: see matmul_table.h.
#pragma once

#include "engine/kernels/neon_codes.h"

namespace potluck {
namespace i8mm {
namespace {

// A tile: 4 pairs of rows of weights times 2 pairs of rows of activations.
using Tile = int32x4_t[4][2];

// Values 8P..8P+7 of a run: [pair of rows][2 rows][8].
template <class Type, size_t P>
inline void UnpackEight(const uint8_t* run, uint8_t* to) {
  for (size_t h = 0; h < 2; ++h) {
    const uint8_t* half = run + arm::kHalfBytes * h;
    const int32x4_t a = vreinterpretq_s32_s8(arm::CentredCodes<Type, 2 * P>(half));
    const int32x4_t b = vreinterpretq_s32_s8(arm::CentredCodes<Type, 2 * P + 1>(half));
    vst1q_u8(to + 64 * P + 32 * h, vreinterpretq_u8_s32(vzip1q_s32(a, b)));
    vst1q_u8(to + 64 * P + 32 * h + 16, vreinterpretq_u8_s32(vzip2q_s32(a, b)));
  }
}

// 32 values of 8 rows.
template <class Type>
inline void UnpackRun(const uint8_t* run, uint8_t* to) {
  UnpackEight<Type, 0>(run, to);
  UnpackEight<Type, 1>(run, to);
  UnpackEight<Type, 2>(run, to);
  UnpackEight<Type, 3>(run, to);
}

inline void SetZero(Tile& tile) {
#pragma GCC unroll 4
  for (size_t i = 0; i < 4; ++i) tile[i][0] = tile[i][1] = vdupq_n_s32(0);
}

// Adds the products of 8 values of k; w and x point at them. With 3 rows of activations the words
// after the third's are of any other: a column of the tile that nobody reads.
template <size_t S>
inline void AddEight(Tile& tile, const uint8_t* w, const uint8_t* x) {
  const int32x4_t a = vreinterpretq_s32_u8(vld1q_u8(x));
  const int32x4_t b = vreinterpretq_s32_u8(vld1q_u8(x + 4 * S));
  const int8x16_t first = vreinterpretq_s8_s32(vzip1q_s32(a, b));
  const int8x16_t second = vreinterpretq_s8_s32(vzip2q_s32(a, b));
#pragma GCC unroll 4
  for (size_t i = 0; i < 4; ++i) {
    const int8x16_t pair = arm::Signed(vld1q_u8(w + 16 * i));
    tile[i][0] = vmmlaq_s32(tile[i][0], pair, first);
    tile[i][1] = vmmlaq_s32(tile[i][1], pair, second);
  }
}

}  // namespace
}  // namespace i8mm
}  // namespace potluck
