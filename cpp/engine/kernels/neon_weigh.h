// From scores to weights, for ARM kernel files: every function here has internal linkage.
#pragma once

#include <arm_neon.h>
#include <stddef.h>

#include "engine/kernels/attention_table.h"
#include "engine/kernels/neon_exp.h"

namespace potluck {
namespace {

constexpr size_t kLanes = 4;

[[maybe_unused]] inline float32x4_t Load(const float* x) { return vld1q_f32(x); }

[[maybe_unused]] inline void Scale(float factor, size_t head_dim, float* o) {
  size_t d = 0;
  for (; d + kLanes <= head_dim; d += kLanes) {
    vst1q_f32(o + d, vmulq_n_f32(vld1q_f32(o + d), factor));
  }
  for (; d < head_dim; ++d) o[d] = o[d] * factor;
}

// Scores become weights. Lanes at or above n may hold anything: they count as -infinity and get the
// weight 0, which changes no sum (a lane's sum is never -0).
[[maybe_unused]] inline void Weigh(size_t head_dim, size_t n, float* scores, float* state) {
  const size_t n_lanes = (n + 2 * kLanes - 1) / (2 * kLanes) * (2 * kLanes);  // of the canonical 8
  for (size_t j = n; j < n_lanes; ++j) scores[j] = -__builtin_inff();
  float32x4_t largest = vld1q_f32(scores);
  for (size_t j = kLanes; j < n_lanes; j += kLanes) {
    largest = vmaxq_f32(largest, vld1q_f32(scores + j));
  }
  const float tile_largest = vmaxvq_f32(largest);
  float m = state[head_dim];
  float l = state[head_dim + 1];
  if (tile_largest > m) {
    const float factor = vgetq_lane_f32(ExpBelow0(vdupq_n_f32(m - tile_largest)), 0);
    Scale(factor, head_dim, state);
    l = l * factor;
    m = tile_largest;
  }
  const float32x4_t shift = vdupq_n_f32(m);
  float32x4_t low = vdupq_n_f32(0.0f), high = low;
  for (size_t j = 0; j < n_lanes; j += 2 * kLanes) {
    const float32x4_t a = ExpBelow0(vsubq_f32(vld1q_f32(scores + j), shift));
    const float32x4_t b = ExpBelow0(vsubq_f32(vld1q_f32(scores + j + kLanes), shift));
    vst1q_f32(scores + j, a);
    vst1q_f32(scores + j + kLanes, b);
    low = vaddq_f32(low, a);
    high = vaddq_f32(high, b);
  }
  const float32x4_t four = vaddq_f32(low, high);
  const float32x2_t two = vadd_f32(vget_low_f32(four), vget_high_f32(four));
  state[head_dim] = m;
  state[head_dim + 1] = l + (vget_lane_f32(two, 0) + vget_lane_f32(two, 1));
}

}  // namespace
}  // namespace potluck
