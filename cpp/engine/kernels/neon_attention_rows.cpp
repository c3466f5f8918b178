// What attention does to single rows on ARM: merging and ending states, storing keys and values.
// f16 is converted by instructions that every 64-bit ARM has.
#include <arm_neon.h>
#include <stddef.h>
#include <stdint.h>

#include "engine/kernels/neon_attention.h"
#include "engine/kernels/neon_exp.h"

namespace potluck {
namespace neon {
namespace {

constexpr size_t kLanes = 4;

inline float ExpOf(float x) { return vgetq_lane_f32(Exp4(vdupq_n_f32(x)), 0); }

// To nearest even.
inline uint16x4_t Narrow(float32x4_t values) { return vreinterpret_u16_f16(vcvt_f16_f32(values)); }

inline bool IsFinite(uint16x4_t halves) {
  const uint16x4_t exponent = vdup_n_u16(0x7c00);
  return vmaxv_u16(vceq_u16(vand_u16(halves, exponent), exponent)) == 0;
}

// The f16 of [n] values, n <= 4, into halves; false: one is not finite.
inline bool Store(const float* values, size_t n, uint16_t halves[kLanes]) {
  float four[kLanes] = {};
  for (size_t i = 0; i < n; ++i) four[i] = values[i];
  const uint16x4_t narrow = Narrow(vld1q_f32(four));
  vst1_u16(halves, narrow);
  return IsFinite(narrow);
}

}  // namespace

void Merge(const float* from, size_t head_dim, float* into) {
  const float from_m = from[head_dim];
  const float into_m = into[head_dim];
  const float m = from_m > into_m ? from_m : into_m;
  const float a = ExpOf(into_m - m);
  const float b = ExpOf(from_m - m);
  // The sum of weights, one value beyond m, follows the rule of the o.
  into[head_dim + 1] = __builtin_fmaf(from[head_dim + 1], b, into[head_dim + 1] * a);
  into[head_dim] = m;
  size_t d = 0;
  for (; d + kLanes <= head_dim; d += kLanes) {
    const float32x4_t scaled = vmulq_n_f32(vld1q_f32(into + d), a);
    vst1q_f32(into + d, vfmaq_n_f32(scaled, vld1q_f32(from + d), b));
  }
  for (; d < head_dim; ++d) into[d] = __builtin_fmaf(from[d], b, into[d] * a);
}

void Finish(const float* state, size_t head_dim, float* out) {
  const float l = state[head_dim + 1];
  size_t d = 0;
  for (; d + kLanes <= head_dim; d += kLanes) {
    vst1q_f32(out + d, vdivq_f32(vld1q_f32(state + d), vdupq_n_f32(l)));
  }
  for (; d < head_dim; ++d) out[d] = state[d] / l;
}

bool StoreKeyF16(const float* key, size_t head_dim, size_t slot, uint8_t* section) {
  bool finite = true;
  auto* const out = reinterpret_cast<uint16_t*>(section) + slot;
  for (size_t d = 0; d < head_dim; d += kLanes) {
    const size_t n = head_dim - d < kLanes ? head_dim - d : kLanes;
    uint16_t halves[kLanes];
    finite &= Store(key + d, n, halves);
    for (size_t i = 0; i < n; ++i) out[(d + i) * kPagePositions] = halves[i];
  }
  return finite;
}

bool StoreValueF16(const float* value, size_t head_dim, size_t slot, uint8_t* section) {
  bool finite = true;
  auto* const out = reinterpret_cast<uint16_t*>(section) + (kPagePositions + slot) * head_dim;
  for (size_t d = 0; d < head_dim; d += kLanes) {
    const size_t n = head_dim - d < kLanes ? head_dim - d : kLanes;
    uint16_t halves[kLanes];
    finite &= Store(value + d, n, halves);
    for (size_t i = 0; i < n; ++i) out[d + i] = halves[i];
  }
  return finite;
}

}  // namespace neon
}  // namespace potluck
