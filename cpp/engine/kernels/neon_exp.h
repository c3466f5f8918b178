// Exp of canon.h for 4 values at once. For ARM kernel files only; static, so that no copy leaves
// the file that includes it.
#pragma once

#include <arm_neon.h>

#include "engine/canon.h"

namespace potluck {

// For x in [-87, 88.7]; elsewhere nonsense.
static inline uint32x4_t ExpInRange(float32x4_t x) {
  const float32x4_t round = vdupq_n_f32(kExpRound);
  const float32x4_t shifted = vfmaq_f32(round, x, vdupq_n_f32(kExpLog2E));
  const float32x4_t n = vsubq_f32(shifted, round);
  float32x4_t r = vfmsq_f32(x, n, vdupq_n_f32(kExpLn2High));
  r = vfmsq_f32(r, n, vdupq_n_f32(kExpLn2Low));
  const float32x4_t one = vdupq_n_f32(1.0f);
  float32x4_t p = vdupq_n_f32(kExpC6);
  p = vfmaq_f32(vdupq_n_f32(kExpC5), p, r);
  p = vfmaq_f32(vdupq_n_f32(kExpC4), p, r);
  p = vfmaq_f32(vdupq_n_f32(kExpC3), p, r);
  p = vfmaq_f32(vdupq_n_f32(kExpC2), p, r);
  p = vfmaq_f32(one, p, r);
  p = vfmaq_f32(one, p, r);
  const uint32x4_t exponent = vshlq_n_u32(vreinterpretq_u32_f32(shifted), 23);
  return vaddq_u32(vreinterpretq_u32_f32(p), exponent);
}

// x is neither above 0 nor a NaN.
[[maybe_unused]] static inline float32x4_t ExpBelow0(float32x4_t x) {
  const uint32x4_t counts = vcgeq_f32(x, vdupq_n_f32(kExpSmallest));
  return vreinterpretq_f32_u32(vandq_u32(ExpInRange(x), counts));
}

[[maybe_unused]] static inline float32x4_t Exp4(float32x4_t x) {
  uint32x4_t y = ExpInRange(x);
  y = vbicq_u32(y, vcltq_f32(x, vdupq_n_f32(kExpSmallest)));
  y = vbslq_u32(vcgtq_f32(x, vdupq_n_f32(kExpLargest)), vdupq_n_u32(0x7f800000u), y);
  return vreinterpretq_f32_u32(vbslq_u32(vceqq_f32(x, x), y, vdupq_n_u32(0x7fc00000u)));
}

}  // namespace potluck
