// F32, F16 and BF16 weights on ARM: one fma chain an output, k rising; activations as they are.
//
// A chain waits 4 cycles for each fma, so a tile keeps 8 to 16 of them in flight: 4 panels of one
// or two rows, 2 panels of three or four.
#include <arm_neon.h>

#include "engine/kernels/neon_matmul.h"

namespace potluck {
namespace neon {
namespace {

struct Eight {
  float32x4_t low, high;
};

struct F32 {
  static constexpr size_t kStep = 32;  // bytes of 8 rows at one k
  static Eight LoadRows(const uint8_t* at) {
    return {vreinterpretq_f32_u8(vld1q_u8(at)), vreinterpretq_f32_u8(vld1q_u8(at + 16))};
  }
};
struct F16 {
  static constexpr size_t kStep = 16;
  static Eight LoadRows(const uint8_t* at) {
    const float16x8_t halves = vreinterpretq_f16_u8(vld1q_u8(at));
    return {vcvt_f32_f16(vget_low_f16(halves)), vcvt_high_f32_f16(halves)};
  }
};
struct BF16 {
  static constexpr size_t kStep = 16;
  static Eight LoadRows(const uint8_t* at) {
    const uint16x8_t halves = vreinterpretq_u16_u8(vld1q_u8(at));
    return {vreinterpretq_f32_u32(vshll_n_u16(vget_low_u16(halves), 16)),
            vreinterpretq_f32_u32(vshll_high_n_u16(halves, 16))};
  }
};

// P panels times S rows of a group, from its row `lane` on; out is the output of that row and the
// first panel.
template <class Type, size_t P, size_t S>
void MultiplyTile(const uint8_t* panels, size_t panel_bytes, size_t k, const uint8_t* data,
                  const RowGroup& group, size_t lane, float* out, size_t out_stride) {
  const float* x = reinterpret_cast<const float*>(data + group.codes) + lane;
  Eight acc[P][S];
#pragma GCC unroll 4
  for (size_t p = 0; p < P; ++p) {
#pragma GCC unroll 4
    for (size_t t = 0; t < S; ++t) acc[p][t] = {vdupq_n_f32(0.0f), vdupq_n_f32(0.0f)};
  }
  for (size_t i = 0; i < k; ++i, panels += Type::kStep, x += group.rows) {
#pragma GCC unroll 4
    for (size_t p = 0; p < P; ++p) {
      const Eight w = Type::LoadRows(panels + p * panel_bytes);
#pragma GCC unroll 4
      for (size_t t = 0; t < S; ++t) {
        acc[p][t].low = vfmaq_n_f32(acc[p][t].low, w.low, x[t]);
        acc[p][t].high = vfmaq_n_f32(acc[p][t].high, w.high, x[t]);
      }
    }
  }
#pragma GCC unroll 4
  for (size_t p = 0; p < P; ++p) {
#pragma GCC unroll 4
    for (size_t t = 0; t < S; ++t) {
      vst1q_f32(out + t * out_stride + 8 * p, acc[p][t].low);
      vst1q_f32(out + t * out_stride + 8 * p + 4, acc[p][t].high);
    }
  }
}

// P panels times a whole group, by tiles of up to 8 pairs of sums.
template <class Type, size_t P>
void MultiplyGroup(const uint8_t* panels, size_t panel_bytes, size_t k, const uint8_t* data,
                   const RowGroup& group, float* out, size_t out_stride) {
  size_t lane = 0;
  while (lane < group.rows) {
    const size_t left = group.rows - lane;
    float* to = out + lane * out_stride;
    if (P < 4 && left >= 4) {
      MultiplyTile<Type, P, 4>(panels, panel_bytes, k, data, group, lane, to, out_stride);
      lane += 4;
    } else if (P < 4 && left == 3) {
      MultiplyTile<Type, P, 3>(panels, panel_bytes, k, data, group, lane, to, out_stride);
      lane += 3;
    } else if (left >= 2) {
      MultiplyTile<Type, P, 2>(panels, panel_bytes, k, data, group, lane, to, out_stride);
      lane += 2;
    } else {
      MultiplyTile<Type, P, 1>(panels, panel_bytes, k, data, group, lane, to, out_stride);
      lane += 1;
    }
  }
}

template <class Type, size_t P>
void MultiplyRows(const uint8_t* panels, size_t panel_bytes, const PreparedRows& x, float* out,
                  size_t out_stride) {
  for (size_t index = 0; index < GroupCount(x.grain, x.rows); ++index) {
    const RowGroup group = GroupAt(x.grain, x.rows, x.k, index);
    MultiplyGroup<Type, P>(panels, panel_bytes, x.k, x.data, group, out + group.first * out_stride,
                           out_stride);
  }
}

template <class Type>
void MultiplyPanels(const uint8_t* panels, size_t n_panels, const PreparedRows& x, float* out,
                    size_t out_stride) {
  const size_t panel_bytes = x.k * Type::kStep;
  size_t p = 0;
  if (x.rows <= 2) {
    for (; p + 4 <= n_panels; p += 4) {
      MultiplyRows<Type, 4>(panels + p * panel_bytes, panel_bytes, x, out + 8 * p, out_stride);
    }
  }
  for (; p + 2 <= n_panels; p += 2) {
    MultiplyRows<Type, 2>(panels + p * panel_bytes, panel_bytes, x, out + 8 * p, out_stride);
  }
  if (p < n_panels)
    MultiplyRows<Type, 1>(panels + p * panel_bytes, panel_bytes, x, out + 8 * p, out_stride);
}

}  // namespace

void MultiplyFloat(WeightType type, const uint8_t* panels, size_t n_panels, const PreparedRows& x,
                   float* out, size_t out_stride) {
  if (type == WeightType::kF32) {
    MultiplyPanels<F32>(panels, n_panels, x, out, out_stride);
  } else if (type == WeightType::kF16) {
    MultiplyPanels<F16>(panels, n_panels, x, out, out_stride);
  } else {
    MultiplyPanels<BF16>(panels, n_panels, x, out, out_stride);
  }
}

}  // namespace neon
}  // namespace potluck
