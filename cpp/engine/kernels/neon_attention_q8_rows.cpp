// What attention over q8 keys and values does to single rows on ARM: codes of queries, keys and
// values.
#include <arm_neon.h>
#include <stddef.h>
#include <stdint.h>

#include "engine/kernels/attention_q8.h"
#include "engine/kernels/neon_attention.h"

namespace potluck {
namespace neon {
namespace {

constexpr size_t kFour = 4;

// x[d..d+4), zeros from n on.
inline float32x4_t LoadFour(const float* x, size_t d, size_t n) {
  if (d + kFour <= n) return vld1q_f32(x + d);
  float four[kFour] = {};
  for (size_t i = 0; d + i < n; ++i) four[i] = x[d + i];
  return vld1q_f32(four);
}

// The largest |x|; above all numbers or NaN if one is not finite, for their bits are.
inline float LargestOf(const float* x, size_t n) {
  uint32x4_t largest = vdupq_n_u32(0);
  for (size_t d = 0; d < n; d += kFour) {
    const uint32x4_t bits = vreinterpretq_u32_f32(LoadFour(x, d, n));
    largest = vmaxq_u32(largest, vandq_u32(bits, vdupq_n_u32(0x7fffffff)));
  }
  const uint32_t bits = vmaxvq_u32(largest);
  float value = 0.0f;
  __builtin_memcpy(&value, &bits, sizeof value);
  return value;
}

// Factor that turns values into codes up to `range`, and what a code stands for.
struct Unit {
  float per_value;
  float of_code;
};

inline Unit UnitOf(float largest, float range) {
  if (largest < q8::kTiny) return {0.0f, 0.0f};
  return {range / largest, largest / range};
}

// Four codes, to nearest even. A tiny row's are 0, whatever the sign.
inline int16x4_t CodesOf(const float* x, size_t d, size_t n, float per_value) {
  return vmovn_s32(vcvtnq_s32_f32(vmulq_n_f32(LoadFour(x, d, n), per_value)));
}

inline uint32_t PackBytes(int16x4_t codes) {
  return vget_lane_u32(vreinterpret_u32_s8(vmovn_s16(vcombine_s16(codes, codes))), 0);
}

inline void PutFloat(uint8_t* at, float value) { __builtin_memcpy(at, &value, sizeof value); }

}  // namespace

void PrepareQueryQ8(const float* q, size_t head_dim, void* out) {
  auto* const codes = static_cast<int16_t*>(out);
  const Unit unit = UnitOf(LargestOf(q, head_dim), q8::QueryRange(head_dim));
  for (size_t d = 0; d < head_dim; d += kFour) {
    vst1_s16(codes + d, CodesOf(q, d, head_dim, unit.per_value));
  }
  PutFloat(static_cast<uint8_t*>(out) + q8::QueryScaleAt(head_dim), unit.of_code);
}

bool StoreKeyQ8(const float* key, size_t head_dim, size_t slot, uint8_t* section) {
  const float largest = LargestOf(key, head_dim);
  if (!(largest < q8::kTooLarge)) return false;
  const Unit unit = UnitOf(largest, q8::kCodeRange);
  uint8_t* const out = section + kFour * slot;
  for (size_t d = 0; d < head_dim; d += kFour) {
    const uint32_t four = PackBytes(CodesOf(key, d, head_dim, unit.per_value));
    __builtin_memcpy(out + d * kPagePositions, &four, sizeof four);
  }
  PutFloat(section + q8::KeyScalesAt(head_dim) + slot * sizeof(float), unit.of_code);
  return true;
}

bool StoreValueQ8(const float* value, size_t head_dim, size_t slot, uint8_t* section) {
  const float largest = LargestOf(value, head_dim);
  if (!(largest < q8::kTooLarge)) return false;
  const Unit unit = UnitOf(largest, q8::kCodeRange);
  uint8_t* out =
      section + q8::ValuesAt(head_dim) + slot / kFour * q8::Padded(head_dim) * kFour + slot % kFour;
  for (size_t d = 0; d < head_dim; d += kFour, out += kFour * kFour) {
    const uint32_t four = PackBytes(CodesOf(value, d, head_dim, unit.per_value));
    for (size_t i = 0; i < kFour; ++i) out[kFour * i] = static_cast<uint8_t>(four >> (8 * i));
  }
  PutFloat(section + q8::ValueScalesAt(head_dim) + slot * sizeof(float), unit.of_code);
  return true;
}

}  // namespace neon
}  // namespace potluck
