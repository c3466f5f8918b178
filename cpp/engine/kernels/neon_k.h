// The loops over records of K types that the ARM tables share; see neon_block32.h for what an Isa
// is. Its sums here have AddScaled(total, scales) besides: total += the sums times the scales of
// the rows.
//
// The largest total: 16 sub-blocks of 16 values, scale 128, code 32 and activation 127 give 1.4e8,
// an int32.
//
// Every function here has internal linkage: see matmul_table.h.
#pragma once

#include "engine/kernels/neon_tiles.h"

namespace potluck {
namespace arm {
namespace {

// Scales and mins of a record, [sub-block][8 rows], sub-blocks of 16 or of 32; and its floats.
struct RecordScales {
  int16_t scales[128];
  int16_t mins[128];
  float d[8];
  float dmin[8];
};

[[maybe_unused]] inline void PutWide(int16_t* to, uint8x16_t bytes) {
  vst1q_s16(to, vmovl_s8(vget_low_s8(Signed(bytes))));
  vst1q_s16(to + 8, vmovl_high_s8(Signed(bytes)));
}

[[maybe_unused]] inline uint8x16_t Low4(uint8x16_t bytes) {
  return vandq_u8(bytes, vdupq_n_u8(15));
}

// Bits 0 and 1 of `tops`, as bits 4 and 5 above the low nibble of `low`.
[[maybe_unused]] inline uint8x16_t WithTops(uint8x16_t low, uint8x16_t tops) {
  return vandq_u8(vsliq_n_u8(low, tops, 4), vdupq_n_u8(63));
}

[[maybe_unused]] inline void ReadFields(Q2_K /*type*/, const uint8_t* fields, RecordScales& out) {
  for (size_t i = 0; i < 128; i += 16) {
    const uint8x16_t both = vld1q_u8(fields + i);
    PutWide(out.scales + i, Low4(both));
    PutWide(out.mins + i, vshrq_n_u8(both, 4));
  }
}

[[maybe_unused]] inline void ReadFields(Q3_K /*type*/, const uint8_t* fields, RecordScales& out) {
  const uint8x16_t bias = vdupq_n_u8(32);
  const auto put = [&](size_t at, uint8x16_t low, uint8x16_t tops) {
    PutWide(out.scales + at, vsubq_u8(WithTops(low, tops), bias));
  };
  for (size_t i = 0; i < 32; i += 16) {  // 2 of 4 sub-blocks
    const uint8x16_t low0 = vld1q_u8(fields + i), low1 = vld1q_u8(fields + 32 + i);
    const uint8x16_t tops = vld1q_u8(fields + 64 + i);
    put(i, low0, tops);
    put(32 + i, low1, vshrq_n_u8(tops, 2));
    put(64 + i, vshrq_n_u8(low0, 4), vshrq_n_u8(tops, 4));
    put(96 + i, vshrq_n_u8(low1, 4), vshrq_n_u8(tops, 6));
  }
}

[[maybe_unused]] inline void ReadSixBits(const uint8_t* fields, RecordScales& out) {
  for (size_t i = 0; i < 32; i += 16) {
    const uint8x16_t tops = vld1q_u8(fields + 64 + i);
    for (size_t half = 0; half < 2; ++half) {
      const uint8x16_t both = vld1q_u8(fields + 32 * half + i);
      const uint8x16_t top = half == 0 ? tops : vshrq_n_u8(tops, 4);
      PutWide(out.scales + 32 * half + i, WithTops(both, top));
      PutWide(out.mins + 32 * half + i, WithTops(vshrq_n_u8(both, 4), vshrq_n_u8(top, 2)));
    }
  }
}
[[maybe_unused]] inline void ReadFields(Q4_K /*type*/, const uint8_t* fields, RecordScales& out) {
  ReadSixBits(fields, out);
}
[[maybe_unused]] inline void ReadFields(Q5_K /*type*/, const uint8_t* fields, RecordScales& out) {
  ReadSixBits(fields, out);
}

[[maybe_unused]] inline void ReadFields(Q6_K /*type*/, const uint8_t* fields, RecordScales& out) {
  for (size_t i = 0; i < 128; i += 16) PutWide(out.scales + i, vld1q_u8(fields + i));
}

template <class Type>
inline void ReadRecordScales(const uint8_t* record, RecordScales& out) {
  ReadFields(Type(), record + Type::kFields, out);
  UnpackScales(record, out.d);
  if (Type::kHasMin) UnpackScales(record + kHalfScalesBytes, out.dmin);
}

// The next record of a group's rows.
struct RecordRows {
  const uint8_t* codes;
  const uint8_t* seeds;
  const uint8_t* sums;
  const float* scales;
};

// Scales that a run of 32 values has in RecordScales.
template <class Type>
constexpr size_t kRunScales = 8 * (32 / Type::kUnitValues);

template <size_t R>
inline RecordRows RecordRowsOf(const uint8_t* data, const RowGroup& group, size_t record) {
  return {data + group.codes + record * 256 * R, data + group.seeds + record * 64 * R,
          data + group.sums + record * 32 * R,
          reinterpret_cast<const float*>(data + group.scales) + record * R};
}

// totals[t][h] += a run's integer sums, each sub-block's times its scales.
template <class Isa, class Type, size_t R, size_t H>
inline void AddScaledRun(int32x4_t (&totals)[R][H], const uint8_t* codes, const int16_t* scales,
                         const uint8_t* x, const uint8_t* seeds) {
  typename Isa::template Sums<Type, R, H> sums;
  sums.Start(seeds);
  if constexpr (Type::kUnitValues == 32) {
    AddRun(sums, codes, x);
    return sums.AddScaled(totals, scales);
  }
  sums.template AddPair<true, 0, 1>(codes, x);
  sums.template AddPair<false, 2, 3>(codes, x);
  sums.AddScaled(totals, scales);
  sums.Start(seeds + 4 * R);
  sums.template AddPair<true, 4, 5>(codes, x);
  sums.template AddPair<false, 6, 7>(codes, x);
  sums.AddScaled(totals, scales + 8);
}

// total += mins times the activations' sums of two sub-blocks of 16, whose pair is lanes 2L and 2L
// + 1 of `pairs`.
template <class Type, int L>
inline int32x4_t AddMin(int32x4_t total, const int16_t* mins, int16x8_t pairs) {
  if constexpr (Type::kUnitValues == 32) {
    return vmlal_laneq_s16(total, vld1_s16(mins), vpaddq_s16(pairs, pairs), L);
  } else {
    total = vmlal_laneq_s16(total, vld1_s16(mins), pairs, 2 * L);
    return vmlal_laneq_s16(total, vld1_s16(mins + 8), pairs, 2 * L + 1);
  }
}

// Beyond the words of the sums that are wanted stand others of the same group: reading 16 bytes is
// safe.
template <class Type, size_t R, size_t H, size_t T>
inline void AddMinsOfRows(int32x4_t (&totals)[R][H], const int16_t* mins, const uint8_t* sums) {
  const int16x8_t pairs = vreinterpretq_s16_u8(vld1q_u8(sums + T / 4 * 16));
#pragma GCC unroll 2
  for (size_t h = 0; h < H; ++h) {
    totals[T][h] = AddMin<Type, T % 4>(totals[T][h], mins + 4 * h, pairs);
  }
  if constexpr (T + 1 < R) AddMinsOfRows<Type, R, H, T + 1>(totals, mins, sums);
}

// c[t * 8 + 4 * h ..] += the floats of a record: totals are its integer sums, c begins at half
// `half`.
template <class Type, size_t R, size_t H>
inline void FinishRecord(const int32x4_t (&totals)[R][H], const RecordScales& w, size_t half,
                         RecordRows x, float* c) {
#pragma GCC unroll 2
  for (size_t h = 0; h < H; ++h) {
    const float32x4_t d = vld1q_f32(w.d + 4 * (half + h));
#pragma GCC unroll 8
    for (size_t t = 0; t < R; ++t) {
      float* const at = c + 8 * t + 4 * h;
      const float32x4_t scale = vmulq_n_f32(d, x.scales[t]);
      vst1q_f32(at, vfmaq_f32(vld1q_f32(at), vcvtq_f32_s32(totals[t][h]), scale));
    }
  }
  if constexpr (!Type::kHasMin) return;
  int32x4_t mins[R][H];
#pragma GCC unroll 8
  for (size_t t = 0; t < R; ++t) {
#pragma GCC unroll 2
    for (size_t h = 0; h < H; ++h) mins[t][h] = vdupq_n_s32(0);
  }
  for (size_t i = 0; i < 8; ++i) {
    AddMinsOfRows<Type, R, H, 0>(mins, w.mins + i * kRunScales<Type> + 4 * half,
                                 x.sums + i * 4 * R);
  }
#pragma GCC unroll 2
  for (size_t h = 0; h < H; ++h) {
    const float32x4_t dmin = vld1q_f32(w.dmin + 4 * (half + h));
#pragma GCC unroll 8
    for (size_t t = 0; t < R; ++t) {
      float* const at = c + 8 * t + 4 * h;
      const float32x4_t scale = vmulq_n_f32(dmin, x.scales[t]);
      vst1q_f32(at, vfmsq_f32(vld1q_f32(at), vcvtq_f32_s32(mins[t][h]), scale));
    }
  }
}

// c[t * 8 + 4 * h ..] += H halves of a record times R rows; `codes` and `c` begin at half `half`.
template <class Isa, class Type, size_t R, size_t H>
__attribute__((always_inline)) inline void AddRecord(const uint8_t* codes, const RecordScales& w,
                                                     size_t half, RecordRows x, float* c) {
  int32x4_t totals[R][H];
#pragma GCC unroll 8
  for (size_t t = 0; t < R; ++t) {
#pragma GCC unroll 2
    for (size_t h = 0; h < H; ++h) totals[t][h] = vdupq_n_s32(0);
  }
  for (size_t run = 0; run < 8; ++run) {
    AddScaledRun<Isa, Type, R, H>(totals, codes + run * Type::kRunBytes,
                                  w.scales + run * kRunScales<Type> + 4 * half,
                                  x.codes + run * 32 * R, x.seeds + run * 8 * R);
  }
  FinishRecord<Type, R, H>(totals, w, half, x, c);
}

// One panel times the R rows of a group, record by record; halves as in neon_block32.h.
template <class Isa, class Type, size_t R>
__attribute__((noinline)) void MultiplyNarrowK(const uint8_t* record, size_t k, const uint8_t* data,
                                               const RowGroup& group, float* out,
                                               size_t out_stride) {
  constexpr size_t kAtOnce = R <= 4 ? 2 : 1;
  float c[8 * R] = {};
  RecordScales scales;
  for (size_t b = 0; b < k / 256; ++b, record += Type::kRecordBytes) {
    ReadRecordScales<Type>(record, scales);
    const RecordRows x = RecordRowsOf<R>(data, group, b);
    for (size_t h = 0; h < 2; h += kAtOnce) {
      AddRecord<Isa, Type, R, kAtOnce>(record + Type::kRuns + kHalfBytes * h, scales, h, x,
                                       c + 4 * h);
    }
  }
  for (size_t t = 0; t < R; ++t) StoreRow(c + 8 * t, out + t * out_stride);
}

template <class Isa, class Type>
void MultiplyGroupK(const uint8_t* panel, size_t k, const uint8_t* data, const RowGroup& group,
                    float* out, size_t out_stride) {
  switch (group.rows) {
    case 1:
      return MultiplyNarrowK<Isa, Type, 1>(panel, k, data, group, out, out_stride);
    case 2:
      return MultiplyNarrowK<Isa, Type, 2>(panel, k, data, group, out, out_stride);
    case 3:
      return MultiplyNarrowK<Isa, Type, 3>(panel, k, data, group, out, out_stride);
    case 4:
      return MultiplyNarrowK<Isa, Type, 4>(panel, k, data, group, out, out_stride);
    case 5:
      return MultiplyNarrowK<Isa, Type, 5>(panel, k, data, group, out, out_stride);
    case 6:
      return MultiplyNarrowK<Isa, Type, 6>(panel, k, data, group, out, out_stride);
    case 7:
      return MultiplyNarrowK<Isa, Type, 7>(panel, k, data, group, out, out_stride);
    default:
      return MultiplyNarrowK<Isa, Type, 8>(panel, k, data, group, out, out_stride);
  }
}

// All panels times at most kFewRows rows.
template <class Isa, class Type>
void MultiplyFewRowsK(const uint8_t* panels, size_t n_panels, const PreparedRows& x, float* out,
                      size_t out_stride) {
  const size_t panel_bytes = x.k / 256 * Type::kRecordBytes;
  for (size_t p = 0; p < n_panels; ++p) {
    for (size_t index = 0; index < GroupCount(x.grain, x.rows); ++index) {
      const RowGroup group = GroupAt(x.grain, x.rows, x.k, index);
      MultiplyGroupK<Isa, Type>(panels + p * panel_bytes, x.k, x.data, group,
                                out + group.first * out_stride + 8 * p, out_stride);
    }
  }
}

}  // namespace
}  // namespace arm
}  // namespace potluck
