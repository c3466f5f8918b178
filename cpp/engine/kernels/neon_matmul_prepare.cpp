// Preparing activations on ARM: int8 codes, scales, sums and seeds, equal to the scalar ones bit
// for bit.
#include <arm_neon.h>

#include "engine/kernels/neon_matmul.h"

namespace potluck {
namespace neon {
namespace {

#if defined(POTLUCK_MUTATION_CLAMP)
constexpr float kCodeRange = 128.0f;  // a careless quantizer, for tests to catch
constexpr int8_t kLowestCode = -128;
#else
constexpr float kCodeRange = 127.0f;
constexpr int8_t kLowestCode = -127;
#endif
constexpr uint32_t kInfinityBits = 0x7f800000u;
constexpr uint32_t kTinyBits = 27u << 23;  // 2^-100; bits of positive floats order as the floats do

// Largest |x| of 16 values, as bits, a maximum per lane.
uint32x4_t LargestOf16(const float* x, uint32x4_t largest) {
  const uint32x4_t magnitude = vdupq_n_u32(0x7fffffffu);
  for (size_t i = 0; i < 16; i += 4) {
    largest = vmaxq_u32(largest, vandq_u32(vreinterpretq_u32_f32(vld1q_f32(x + i)), magnitude));
  }
  return largest;
}

float FloatOf(uint32_t bits) {
  float value = 0;
  __builtin_memcpy(&value, &bits, sizeof value);
  return value;
}

// 8 codes, rounded to nearest even; as int16, for 128 may come out of a mutation.
int16x8_t Quantize8(const float* x, float r) {
  const int32x4_t low = vcvtnq_s32_f32(vmulq_n_f32(vld1q_f32(x), r));
  const int32x4_t high = vcvtnq_s32_f32(vmulq_n_f32(vld1q_f32(x + 4), r));
  return vcombine_s16(vqmovn_s32(low), vqmovn_s32(high));
}

// 16 codes in the order of k.
int8x16_t Quantize16(const float* x, float r) {
  const int8x16_t codes = vcombine_s8(vqmovn_s16(Quantize8(x, r)), vqmovn_s16(Quantize8(x + 8, r)));
  return vmaxq_s8(codes, vdupq_n_s8(kLowestCode));
}

void PutWord(uint8_t* array, size_t index, int32_t word) {
  __builtin_memcpy(array + 4 * index, &word, 4);
}

void PutFloat(uint8_t* array, size_t index, float value) {
  __builtin_memcpy(array + 4 * index, &value, 4);
}

// The 4 words of 16 codes, `step` words apart.
void PutCodes(uint8_t* at, size_t step, int8x16_t codes) {
  if (step == 1) return vst1q_s8(reinterpret_cast<int8_t*>(at), codes);
  const int32x4_t words = vreinterpretq_s32_s8(codes);
  PutWord(at, 0, vgetq_lane_s32(words, 0));
  PutWord(at, step, vgetq_lane_s32(words, 1));
  PutWord(at, 2 * step, vgetq_lane_s32(words, 2));
  PutWord(at, 3 * step, vgetq_lane_s32(words, 3));
}

// Sums of neighbours, 8 of them, to the pair (S01, S23) of the even and the odd ones, in lanes 0
// and 1.
int16x4_t PairOf(int16x8_t neighbours) {
  const int16x4_t four = vadd_s16(vget_low_s16(neighbours), vget_high_s16(neighbours));
  return vadd_s16(four, vext_s16(four, four, 2));
}

int32_t WordOf(int16x4_t pair) { return vget_lane_s32(vreinterpret_s32_s16(pair), 0); }
int32_t SumOf(int16x4_t pair) { return vget_lane_s16(pair, 0) + vget_lane_s16(pair, 1); }

// Where the words of one row lie: word j of an array at [j * step]. Copies, for the compiler must
// assume that a store of bytes changes what it reaches by reference.
struct Places {
  size_t step;
  uint8_t* codes;
  uint8_t* scales;
  uint8_t* sums;
  uint8_t* seeds;
};

Places PlacesOf(const RowGroup& group, size_t lane, uint8_t* dst) {
  uint8_t* const row = dst + 4 * lane;
  return {group.rows, row + group.codes, row + group.scales, row + group.sums, row + group.seeds};
}

bool PrepareBlocks32(const float* x, size_t k, Places to) {
  for (size_t b = 0; b < k / 32; ++b, x += 32) {
    const uint32_t largest = vmaxvq_u32(LargestOf16(x + 16, LargestOf16(x, vdupq_n_u32(0))));
    if (largest >= kInfinityBits) return false;
    const bool is_tiny = largest < kTinyBits;
    const float d = is_tiny ? 0.0f : FloatOf(largest) / 127.0f;
    const float r = is_tiny ? 0.0f : kCodeRange / FloatOf(largest);  // r = 0: zeros
    const int8x16_t low = Quantize16(x, r);
    const int8x16_t high = Quantize16(x + 16, r);
    PutCodes(to.codes + 32 * b * to.step, to.step, low);
    PutCodes(to.codes + (32 * b + 16) * to.step, to.step, high);
    const int16x4_t pair = PairOf(vpadalq_s8(vpaddlq_s8(low), high));
    PutFloat(to.scales, b * to.step, d);
    PutFloat(to.sums, b * to.step, d * static_cast<float>(SumOf(pair)));
    PutWord(to.seeds, b * to.step, WordOf(vmul_n_s16(pair, -8)));
  }
  return true;
}

bool PrepareBlocks256(const float* x, size_t k, Places to) {
  for (size_t b = 0; b < k / 256; ++b) {
    uint32x4_t lanes = vdupq_n_u32(0);
    for (size_t i = 0; i < 256; i += 16) lanes = LargestOf16(x + i, lanes);
    const uint32_t largest = vmaxvq_u32(lanes);
    if (largest >= kInfinityBits) return false;
    const bool is_tiny = largest < kTinyBits;
    const float r = is_tiny ? 0.0f : kCodeRange / FloatOf(largest);
    PutFloat(to.scales, b * to.step, is_tiny ? 0.0f : FloatOf(largest) / 127.0f);
    uint32_t even = 0;  // the sum of the sub-block before this one
    for (size_t s = 0; s < 16; ++s, x += 16) {
      const int8x16_t codes = Quantize16(x, r);
      PutCodes(to.codes + 16 * s * to.step, to.step, codes);
      const int16x4_t pair = PairOf(vpaddlq_s8(codes));
      PutWord(to.seeds, s * to.step, WordOf(vmul_n_s16(pair, -32)));
      const auto sum = static_cast<uint32_t>(SumOf(pair));
      if (s % 2 == 1) {
        PutWord(to.sums, s / 2 * to.step, static_cast<int32_t>((even & 0xffffu) | sum << 16));
      }
      even = sum;
    }
    to.codes += 256 * to.step;
    to.seeds += 64 * to.step;
    to.sums += 32 * to.step;
  }
  return true;
}

bool PrepareFloats(const float* x, size_t k, Places to) {
  uint32x4_t lanes = vdupq_n_u32(0);
  size_t i = 0;
  for (; i + 16 <= k; i += 16) lanes = LargestOf16(x + i, lanes);
  uint32_t largest = vmaxvq_u32(lanes);
  for (; i < k; ++i) {
    uint32_t bits = 0;
    __builtin_memcpy(&bits, x + i, sizeof bits);
    bits &= 0x7fffffffu;
    largest = bits > largest ? bits : largest;
  }
  for (i = 0; i < k; ++i) PutFloat(to.codes, i * to.step, x[i]);
  return largest < kInfinityBits;
}

}  // namespace

bool Prepare(Grain grain, const float* x, size_t k, const RowGroup& group, size_t lane,
             uint8_t* dst) {
  const Places to = PlacesOf(group, lane, dst);
  switch (grain) {
    case Grain::kFloat:
      return PrepareFloats(x, k, to);
    case Grain::kBlock32:
      return PrepareBlocks32(x, k, to);
    case Grain::kBlock256:
      return PrepareBlocks256(x, k, to);
  }
  return false;
}

}  // namespace neon
}  // namespace potluck
