// The integer sums of plain ARMv8-A: products of bytes added in int16 and widened once a block.
//
// smull and smlal keep one product a lane: lane 4r + i of a register holds the products of row r
// with k = i mod 4, so a unit of 32 values puts 8 products into a lane, one of 16 puts 4. An
// activation is at most 127 and the largest code c of a type says how far int16 reaches:
//
//   Values / 4 * c * 127 <= 32767: the lanes hold; checked below for every type. The tightest are
//   five bits, 8 * 31 * 127 = 31496, and six, 4 * 63 * 127 = 32004.
//
//   Twice that: neighbours may be added in int16 too (addp). 4 bits, 30480; centred codes of 5
//   bits, and of 6 in units of 16, 32512.
//
//   Four times that: so may a whole row. Codes of 2 and 3 bits in units of 16, at most 14224.
//
// Codes of 8 bits: two products, 2 * 128 * 127 = 32512, then they are widened.
//
// Every function here has internal linkage: see matmul_table.h.
#pragma once

#include "engine/kernels/neon_codes.h"

namespace potluck {
namespace neon {
namespace {

#if defined(POTLUCK_MUTATION_DEPTH)
// One addition in int16 more than there is room for; for tests to catch.
constexpr int kTooDeep = 1;
#else
constexpr int kTooDeep = 0;
#endif

// Word `Index` of x (4 codes of one row) in all words of a register.
template <size_t Index>
inline int8x16_t Word(const uint8_t* x) {
  const int32x4_t four = vreinterpretq_s32_u8(vld1q_u8(x + Index / 4 * 16));
  return vreinterpretq_s8_s32(vdupq_laneq_s32(four, Index % 4));
}

inline int16x8_t LowProducts(int8x16_t a, int8x16_t b) {
  return vmull_s8(vget_low_s8(a), vget_low_s8(b));
}
inline int16x8_t AddLowProducts(int16x8_t sum, int8x16_t a, int8x16_t b) {
  return vmlal_s8(sum, vget_low_s8(a), vget_low_s8(b));
}

// Sums of R rows of activations, H halves of a panel and units of `Values` values; see
// neon_block32.h.
template <class Type, size_t R, size_t H, size_t Values>
class LaneSums {
 public:
  void Start(const uint8_t* seeds) { seeds_ = seeds; }

  template <bool First, size_t A, size_t B>
  void AddPair(const uint8_t* codes, const uint8_t* x) {
    AddVector<First, A>(codes, x);
    AddVector<false, B>(codes, x);
  }

  int32x4_t Dot(size_t t, size_t h) const {
    constexpr int kPairings = (kMost * 2 <= kRoom ? 1 : 0) + kTooDeep;
    int32x4_t dot;
    if constexpr (kPairings == 0) {
      dot = vpaddq_s32(vpaddlq_s16(low_[t][h]), vpaddlq_s16(high_[t][h]));
    } else {
      const int16x8_t pairs = vpaddq_s16(low_[t][h], high_[t][h]);
      if constexpr (kPairings == 2) {
        dot = vmovl_s16(vget_low_s16(vpaddq_s16(pairs, pairs)));
      } else if constexpr (Type::kSeedFactor != 0) {
        return vpadalq_s16(arm::SeedOf<Type, R>(seeds_, t), pairs);
      } else {
        dot = vpaddlq_s16(pairs);
      }
    }
    if constexpr (Type::kSeedFactor == 0) return dot;
    return vaddq_s32(dot, arm::SeedOf<Type, R>(seeds_, t));
  }

  // total += the sums times the scales of the rows, [8].
  void AddScaled(int32x4_t (&total)[R][H], const int16_t* scales) const {
#pragma GCC unroll 2
    for (size_t h = 0; h < H; ++h) {
      const int16x4_t scale = vld1_s16(scales + 4 * h);
#pragma GCC unroll 8
      for (size_t t = 0; t < R; ++t) {
        if constexpr (kMost * 4 <= kRoom && Type::kSeedFactor == 0) {
          const int16x8_t pairs = vpaddq_s16(low_[t][h], high_[t][h]);
          const int16x4_t rows = vget_low_s16(vpaddq_s16(pairs, pairs));
          total[t][h] = vmlal_s16(total[t][h], rows, scale);
        } else {
          total[t][h] = vmlaq_s32(total[t][h], Dot(t, h), vmovl_s16(scale));
        }
      }
    }
  }

 private:
  static constexpr int kRoom = 32767;
  static constexpr int kMost = static_cast<int>(Values / 4) * Type::kLargestCode * 127;
  static_assert(kMost <= kRoom);

  template <bool First, size_t G>
  void AddVector(const uint8_t* codes, const uint8_t* x) {
    int8x16_t w[H];
#pragma GCC unroll 2
    for (size_t h = 0; h < H; ++h) w[h] = Type::template Codes<G>(codes + arm::kHalfBytes * h);
    AddRow<First, G, 0>(w, x);
    if (R > 1) POTLUCK_ORDER_LOADS();
  }

  template <bool First, size_t G, size_t T>
  void AddRow(const int8x16_t (&w)[H], const uint8_t* x) {
    const int8x16_t xt = Word<G * R + T>(x);
#pragma GCC unroll 2
    for (size_t h = 0; h < H; ++h) {
      low_[T][h] = First ? LowProducts(w[h], xt) : AddLowProducts(low_[T][h], w[h], xt);
      high_[T][h] = First ? vmull_high_s8(w[h], xt) : vmlal_high_s8(high_[T][h], w[h], xt);
    }
    if constexpr (T + 1 < R) AddRow<First, G, T + 1>(w, x);
  }

  int16x8_t low_[R][H], high_[R][H];  // rows 0 and 1 of a half; 2 and 3
  const uint8_t* seeds_;
};

// The same for codes of 8 bits: two products in int16, then int32.
template <class Type, size_t R, size_t H>
class WideSums {
 public:
  void Start(const uint8_t* /*seeds*/) {
    static_assert(Type::kSeedFactor == 0 && 2 * Type::kLargestCode * 127 <= 32767);
  }

  template <bool First, size_t A, size_t B>
  void AddPair(const uint8_t* codes, const uint8_t* x) {
#pragma GCC unroll 2
    for (size_t h = 0; h < H; ++h) {  // both halves at once need more registers than there are
      const int8x16_t a = Type::template Codes<A>(codes + arm::kHalfBytes * h);
      const int8x16_t b = Type::template Codes<B>(codes + arm::kHalfBytes * h);
      AddRow<First, A, B, 0>(h, a, b, x);
      if (R > 1) POTLUCK_ORDER_LOADS();
    }
  }

  int32x4_t Dot(size_t t, size_t h) const {
    return kTooDeep ? low_[t][h] : vpaddq_s32(low_[t][h], high_[t][h]);
  }

 private:
  template <bool First, size_t A, size_t B, size_t T>
  void AddRow(size_t h, int8x16_t a, int8x16_t b, const uint8_t* x) {
    const int8x16_t xa = Word<A * R + T>(x), xb = Word<B * R + T>(x);
    int16x8_t low = AddLowProducts(LowProducts(a, xa), b, xb);
    const int16x8_t high = vmlal_high_s8(vmull_high_s8(a, xa), b, xb);
    if (kTooDeep) low = vpaddq_s16(low, high);
    low_[T][h] = First ? vpaddlq_s16(low) : vpadalq_s16(low_[T][h], low);
    if (!kTooDeep) high_[T][h] = First ? vpaddlq_s16(high) : vpadalq_s16(high_[T][h], high);
    if constexpr (T + 1 < R) AddRow<First, A, B, T + 1>(h, a, b, x);
  }

  int32x4_t low_[R][H], high_[R][H];
};

}  // namespace
}  // namespace neon
}  // namespace potluck
