// The loops over blocks of 32 values that the ARM tables share: R rows of activations times a
// panel, from the panel itself (up to 8 rows) or from its codes unpacked to scratch (tiles of many
// rows).
//
// An Isa is a class with Sums<Type, R, H>, the integer sums of R rows of activations and H halves
// of a panel:
//   Start(seeds)                       before the products
//   AddPair<First, A, B>(codes, x)     adds the products of k = 4A.. and 4B.. of a run; First: the
//                                      first ones after Start
//   Dot(t, h)                          the sum of row t, 4 rows of weights: centred, exact
//
// Every function here has internal linkage: see matmul_table.h.
#pragma once

#include "engine/kernels/neon_codes.h"

namespace potluck {
namespace arm {
namespace {

// Where the blocks of a panel lie.
struct PanelShape {
  size_t blocks;  // of a row
  size_t record_blocks;
  size_t record_bytes;
  size_t codes_offset;  // in a record
  size_t panel_bytes;
};

template <class Type>
PanelShape ShapeOf(size_t k) {
  const size_t g = RecordBlocks(k);
  const size_t codes_offset = (Type::kHasMin ? 2 : 1) * kHalfScalesBytes * g;
  const size_t record_bytes = codes_offset + g * Type::kRunBytes;
  return {k / 32, g, record_bytes, codes_offset, k / 32 / g * record_bytes};
}

// The next block of a group's rows, and of a panel (of its first half that is wanted).
struct RowsAt {
  const uint8_t* codes;
  const uint8_t* seeds;
  const float* scales;
  const float* sums;
};
struct BlocksAt {
  const uint8_t* codes;
  const uint8_t* d;
  const uint8_t* m;
};

[[maybe_unused]] inline RowsAt RowsOf(const uint8_t* data, const RowGroup& group, size_t block) {
  return {data + group.codes + block * 32 * group.rows, data + group.seeds + block * 4 * group.rows,
          reinterpret_cast<const float*>(data + group.scales) + block * group.rows,
          reinterpret_cast<const float*>(data + group.sums) + block * group.rows};
}

// Scales of a half: f16 in panels, f32 in scratch.
template <class Type>
struct ScalesOf {
  static constexpr size_t kBlockBytes = kHalfScalesBytes;
  static constexpr size_t kHalfBytes = 8;
  static float32x4_t Load(const uint8_t* at) { return LoadHalves(at); }
};
template <class Type>
struct ScalesOf<Unpacked<Type>> {
  static constexpr size_t kBlockBytes = 32;
  static constexpr size_t kHalfBytes = 16;
  static float32x4_t Load(const uint8_t* at) { return LoadFloats(at); }
};

// The 32 values of a run. The two of a pair share their bytes in most types.
template <class Sums>
inline void AddRun(Sums& sums, const uint8_t* codes, const uint8_t* x) {
  sums.template AddPair<true, 0, 4>(codes, x);
  sums.template AddPair<false, 1, 5>(codes, x);
  sums.template AddPair<false, 2, 6>(codes, x);
  sums.template AddPair<false, 3, 7>(codes, x);
}

// c[t * 8 + 4 * h ..] += n blocks of H halves of a panel times R rows.
template <class Isa, class Type, size_t R, size_t H>
__attribute__((always_inline)) inline void AddBlocks(BlocksAt w, size_t n, RowsAt x, float* c) {
  using Scales = ScalesOf<Type>;
  float32x4_t acc[R][H];
#pragma GCC unroll 8
  for (size_t t = 0; t < R; ++t) {
#pragma GCC unroll 2
    for (size_t h = 0; h < H; ++h) acc[t][h] = vld1q_f32(c + 8 * t + 4 * h);
  }
  for (; n > 0; --n) {
    typename Isa::template Sums<Type, R, H> sums;
    sums.Start(x.seeds);
    AddRun(sums, w.codes, x.codes);
#pragma GCC unroll 2
    for (size_t h = 0; h < H; ++h) {
      const float32x4_t d = Scales::Load(w.d + Scales::kHalfBytes * h);
#pragma GCC unroll 8
      for (size_t t = 0; t < R; ++t) {
        const float32x4_t dot = vcvtq_f32_s32(sums.Dot(t, h));
        acc[t][h] = vfmaq_f32(acc[t][h], dot, vmulq_n_f32(d, x.scales[t]));
      }
      if constexpr (Type::kHasMin) {
        const float32x4_t m = Scales::Load(w.m + Scales::kHalfBytes * h);
#pragma GCC unroll 8
        for (size_t t = 0; t < R; ++t) acc[t][h] = vfmaq_n_f32(acc[t][h], m, x.sums[t]);
      }
    }
    w = {w.codes + Type::kRunBytes, w.d + Scales::kBlockBytes, w.m + Scales::kBlockBytes};
    x = {x.codes + 32 * R, x.seeds + 4 * R, x.scales + R, x.sums + R};
  }
#pragma GCC unroll 8
  for (size_t t = 0; t < R; ++t) {
#pragma GCC unroll 2
    for (size_t h = 0; h < H; ++h) vst1q_f32(c + 8 * t + 4 * h, acc[t][h]);
  }
}

// One panel times the R rows of a group, record by record. Beyond 4 rows the sums of both halves
// and the outputs don't fit the registers, and the halves of a record follow each other: its second
// half comes from L1.
template <class Isa, class Type, size_t R>
__attribute__((noinline)) void MultiplyNarrow(const PanelShape& shape, const uint8_t* panel,
                                              const uint8_t* data, const RowGroup& group,
                                              float* out, size_t out_stride) {
  constexpr size_t kAtOnce = R <= 4 ? 2 : 1;  // halves
  float c[8 * R] = {};
  for (size_t b = 0; b < shape.blocks; b += shape.record_blocks, panel += shape.record_bytes) {
    const RowsAt x =
        RowsOf(data, {group.first, R, group.codes, group.scales, group.sums, group.seeds}, b);
#pragma GCC unroll 2
    for (size_t h = 0; h < 2; h += kAtOnce) {
      const uint8_t* d = panel + 8 * h;
      AddBlocks<Isa, Type, R, kAtOnce>({panel + shape.codes_offset + kHalfBytes * h, d,
                                        d + kHalfScalesBytes * shape.record_blocks},
                                       shape.record_blocks, x, c + 4 * h);
    }
  }
  for (size_t t = 0; t < R; ++t) {
    vst1q_f32(out + t * out_stride, vld1q_f32(c + 8 * t));
    vst1q_f32(out + t * out_stride + 4, vld1q_f32(c + 8 * t + 4));
  }
}

template <class Isa, class Type>
void MultiplyGroup(const PanelShape& shape, const uint8_t* panel, const uint8_t* data,
                   const RowGroup& group, float* out, size_t out_stride) {
  switch (group.rows) {
    case 1:
      return MultiplyNarrow<Isa, Type, 1>(shape, panel, data, group, out, out_stride);
    case 2:
      return MultiplyNarrow<Isa, Type, 2>(shape, panel, data, group, out, out_stride);
    case 3:
      return MultiplyNarrow<Isa, Type, 3>(shape, panel, data, group, out, out_stride);
    case 4:
      return MultiplyNarrow<Isa, Type, 4>(shape, panel, data, group, out, out_stride);
    case 5:
      return MultiplyNarrow<Isa, Type, 5>(shape, panel, data, group, out, out_stride);
    case 6:
      return MultiplyNarrow<Isa, Type, 6>(shape, panel, data, group, out, out_stride);
    case 7:
      return MultiplyNarrow<Isa, Type, 7>(shape, panel, data, group, out, out_stride);
    default:
      return MultiplyNarrow<Isa, Type, 8>(shape, panel, data, group, out, out_stride);
  }
}

// All panels times at most kFewRows rows.
template <class Isa, class Type>
void MultiplyFewRows(const uint8_t* panels, size_t n_panels, const PreparedRows& x, float* out,
                     size_t out_stride) {
  const PanelShape shape = ShapeOf<Type>(x.k);
  for (size_t p = 0; p < n_panels; ++p) {
    for (size_t index = 0; index < GroupCount(x.grain, x.rows); ++index) {
      const RowGroup group = GroupAt(x.grain, x.rows, x.k, index);
      MultiplyGroup<Isa, Type>(shape, panels + p * shape.panel_bytes, x.data, group,
                               out + group.first * out_stride + 8 * p, out_stride);
    }
  }
}

}  // namespace
}  // namespace arm
}  // namespace potluck
