// The integer sums of the dot product instructions: sdot adds four products of bytes to an int32,
// so there is no depth to watch, and takes the 4 codes of a row of activations from a lane, so
// nothing is broadcast.
//
// Every function here has internal linkage: see matmul_table.h.
#pragma once

#include "engine/kernels/neon_codes.h"

namespace potluck {
namespace dotprod {
namespace {

// Sums of R rows of activations and H halves of a panel; see neon_block32.h.
template <class Type, size_t R, size_t H>
class Sums {
 public:
  // The centre is in the start of the sums.
  void Start(const uint8_t* seeds) {
#pragma GCC unroll 8
    for (size_t t = 0; t < R; ++t) {
      const int32x4_t seed =
          Type::kSeedFactor == 0 ? vdupq_n_s32(0) : arm::SeedOf<Type, R>(seeds, t);
#pragma GCC unroll 2
      for (size_t h = 0; h < H; ++h) sums_[t][h] = seed;
    }
  }

  template <bool First, size_t A, size_t B>
  void AddPair(const uint8_t* codes, const uint8_t* x) {
    AddVector<A>(codes, x);
    AddVector<B>(codes, x);
  }

  int32x4_t Dot(size_t t, size_t h) const { return sums_[t][h]; }

  // total += the sums times the scales of the rows, [8].
  void AddScaled(int32x4_t (&total)[R][H], const int16_t* scales) const {
#pragma GCC unroll 2
    for (size_t h = 0; h < H; ++h) {
      const int32x4_t scale = vmovl_s16(vld1_s16(scales + 4 * h));
#pragma GCC unroll 8
      for (size_t t = 0; t < R; ++t) total[t][h] = vmlaq_s32(total[t][h], sums_[t][h], scale);
    }
  }

 private:
  template <size_t G>
  void AddVector(const uint8_t* codes, const uint8_t* x) {
    int8x16_t w[H];
#pragma GCC unroll 2
    for (size_t h = 0; h < H; ++h) w[h] = Type::template Codes<G>(codes + arm::kHalfBytes * h);
    AddRow<G * R, 0>(w, x);
    if (R > 2) POTLUCK_ORDER_LOADS();
  }

  // Word `Word` + T of x holds the codes of row T.
  template <size_t Word, size_t T>
  void AddRow(const int8x16_t (&w)[H], const uint8_t* x) {
    const int8x16_t four = arm::Signed(vld1q_u8(x + (Word + T) / 4 * 16));
#pragma GCC unroll 2
    for (size_t h = 0; h < H; ++h) {
      sums_[T][h] = vdotq_laneq_s32(sums_[T][h], w[h], four, (Word + T) % 4);
    }
    if constexpr (T + 1 < R) AddRow<Word, T + 1>(w, x);
  }

  int32x4_t sums_[R][H];
};

struct Isa {
  template <class Type, size_t R, size_t H>
  using Sums = dotprod::Sums<Type, R, H>;
};

}  // namespace
}  // namespace dotprod
}  // namespace potluck
