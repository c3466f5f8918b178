// The vector kernels for ARM: the scalar chains, 4 values at a time. Ends of rows that fill no
// vector go through a vector of their own, so nothing beyond a buffer is touched.
#include <arm_neon.h>
#include <stddef.h>
#include <stdint.h>

#include "engine/kernels/neon_exp.h"
#include "engine/kernels/vector_table.h"

namespace potluck {
namespace {

constexpr size_t kWidth = 4;
constexpr size_t kLanes = 16;  // of the canonical sums

// The first `count` < 4 lanes from x; the others are 0.
inline float32x4_t LoadFirst(const float* x, size_t count) {
  float lanes[kWidth] = {};
  for (size_t i = 0; i < count; ++i) lanes[i] = x[i];
  return vld1q_f32(lanes);
}

inline void StoreFirst(float* x, size_t count, float32x4_t values) {
  float lanes[kWidth];
  vst1q_f32(lanes, values);
  for (size_t i = 0; i < count; ++i) x[i] = lanes[i];
}

// 1 / sqrt(x): true root and division.
inline float InverseRoot(float x) { return 1.0f / vget_lane_f32(vsqrt_f32(vdup_n_f32(x)), 0); }

// Sum of squares: 16 lanes and their tree.
float SumOfSquares(const float* x, size_t n) {
  float32x4_t sums[4] = {vdupq_n_f32(0.0f), vdupq_n_f32(0.0f), vdupq_n_f32(0.0f),
                         vdupq_n_f32(0.0f)};
  size_t i = 0;
  for (; i + kLanes <= n; i += kLanes) {
#pragma GCC unroll 4
    for (size_t j = 0; j < 4; ++j) {
      const float32x4_t a = vld1q_f32(x + i + kWidth * j);
      sums[j] = vfmaq_f32(sums[j], a, a);
    }
  }
  // A lane is never -0, so adding the square of a zero that fills up a vector leaves its bits.
#pragma GCC unroll 4
  for (size_t j = 0; j < 4; ++j) {
    if (i >= n) break;
    const size_t count = n - i < kWidth ? n - i : kWidth;
    const float32x4_t a = LoadFirst(x + i, count);
    sums[j] = vfmaq_f32(sums[j], a, a);
    i += count;
  }
  const float32x4_t four = vaddq_f32(vaddq_f32(sums[0], sums[2]), vaddq_f32(sums[1], sums[3]));
  const float32x2_t two = vadd_f32(vget_low_f32(four), vget_high_f32(four));
  return vget_lane_f32(two, 0) + vget_lane_f32(two, 1);
}

bool RmsNorm(const float* x, const float* w, size_t n, float eps, float* out) {
  const float inv = InverseRoot(SumOfSquares(x, n) / static_cast<float>(n) + eps);
  size_t i = 0;
  for (; i + kWidth <= n; i += kWidth) {
    vst1q_f32(out + i, vmulq_f32(vmulq_n_f32(vld1q_f32(x + i), inv), vld1q_f32(w + i)));
  }
  for (; i < n; ++i) out[i] = (x[i] * inv) * w[i];
  return inv > 0.0f;  // 0 for an infinite sum, NaN for a NaN
}

inline float32x4_t SiluMul4(float32x4_t gate, float32x4_t up) {
  const float32x4_t power = Exp4(vnegq_f32(gate));
  return vmulq_f32(vdivq_f32(gate, vaddq_f32(vdupq_n_f32(1.0f), power)), up);
}

void SiluMul(const float* gate, const float* up, size_t n, float* out) {
  size_t i = 0;
  for (; i + kWidth <= n; i += kWidth) {
    vst1q_f32(out + i, SiluMul4(vld1q_f32(gate + i), vld1q_f32(up + i)));
  }
  if (i == n) return;
  const size_t rest = n - i;
  StoreFirst(out + i, rest, SiluMul4(LoadFirst(gate + i, rest), LoadFirst(up + i, rest)));
}

void Add(const float* a, size_t n, float* x) {
  size_t i = 0;
  for (; i + kWidth <= n; i += kWidth) {
    vst1q_f32(x + i, vaddq_f32(vld1q_f32(x + i), vld1q_f32(a + i)));
  }
  for (; i < n; ++i) x[i] = x[i] + a[i];
}

void Rotate(const float* cosine, const float* sine, size_t half, float* x) {
  size_t i = 0;
  for (; i + kWidth <= half; i += kWidth) {
    const float32x4_t a = vld1q_f32(x + i);
    const float32x4_t b = vld1q_f32(x + i + half);
    const float32x4_t c = vld1q_f32(cosine + i);
    const float32x4_t s = vld1q_f32(sine + i);
    vst1q_f32(x + i, vfmaq_f32(vnegq_f32(vmulq_f32(b, s)), a, c));
    vst1q_f32(x + i + half, vfmaq_f32(vmulq_f32(a, s), b, c));
  }
  for (; i < half; ++i) {
    const float a = x[i];
    const float b = x[i + half];
    x[i] = __builtin_fmaf(a, cosine[i], -(b * sine[i]));
    x[i + half] = __builtin_fmaf(b, cosine[i], a * sine[i]);
  }
}

void ExpRow(const float* x, size_t n, float* out) {
  size_t i = 0;
  for (; i + kWidth <= n; i += kWidth) vst1q_f32(out + i, Exp4(vld1q_f32(x + i)));
  if (i < n) StoreFirst(out + i, n - i, Exp4(LoadFirst(x + i, n - i)));
}

float Max(const float* x, size_t n) {
  float32x4_t lanes = vdupq_n_f32(x[0]);
  size_t i = 0;
  for (; i + kWidth <= n; i += kWidth) lanes = vmaxq_f32(vld1q_f32(x + i), lanes);
  float largest = vmaxvq_f32(lanes);
  for (; i < n; ++i) largest = x[i] > largest ? x[i] : largest;
  return largest;
}

// Lanes 4j..4j+3 of sum_exp in two vectors of two.
inline void AddWidened(float32x4_t values, float64x2_t* sums) {
  sums[0] = vaddq_f64(sums[0], vcvt_f64_f32(vget_low_f32(values)));
  sums[1] = vaddq_f64(sums[1], vcvt_high_f64_f32(values));
}

double SumExp(const float* x, size_t n, float shift) {
  float64x2_t sums[8];
  for (float64x2_t& sum : sums) sum = vdupq_n_f64(0.0);
  const float32x4_t shifts = vdupq_n_f32(shift);
  size_t i = 0;
  for (; i + kLanes <= n; i += kLanes) {
#pragma GCC unroll 4
    for (size_t j = 0; j < 4; ++j) {
      AddWidened(Exp4(vsubq_f32(vld1q_f32(x + i + kWidth * j), shifts)), sums + 2 * j);
    }
  }
  for (size_t j = 0; i < n; ++j) {
    const size_t count = n - i < kWidth ? n - i : kWidth;
    const float32x4_t power = Exp4(vsubq_f32(LoadFirst(x + i, count), shifts));
    float lanes[kWidth];
    vst1q_f32(lanes, power);
    // A lane is never -0, so adding a zero that fills up a vector leaves its bits.
    AddWidened(LoadFirst(lanes, count), sums + 2 * j);
    i += count;
  }
  for (size_t width = 4; width > 0; width /= 2) {
    for (size_t j = 0; j < width; ++j) sums[j] = vaddq_f64(sums[j], sums[j + width]);
  }
  return vgetq_lane_f64(sums[0], 0) + vgetq_lane_f64(sums[0], 1);
}

const VectorTable kTable = {RmsNorm, SiluMul, Add, Rotate, ExpRow, Max, SumExp};

}  // namespace

const VectorTable* NeonVectorTable() { return &kTable; }

}  // namespace potluck
