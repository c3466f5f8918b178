#include "engine/types.h"

#include <cstring>

namespace potluck {
namespace {

// Source: the block structs of GGUF; sizes in bytes are those of the file.
constexpr TypeInfo kTypes[kTypeCount] = {
    {WeightType::kF32, "f32", 1, 4},       {WeightType::kF16, "f16", 1, 2},
    {WeightType::kQ4_0, "q4_0", 32, 18},   {WeightType::kQ4_1, "q4_1", 32, 20},
    {WeightType::kQ5_0, "q5_0", 32, 22},   {WeightType::kQ5_1, "q5_1", 32, 24},
    {WeightType::kQ8_0, "q8_0", 32, 34},   {WeightType::kQ2_K, "q2_k", 256, 84},
    {WeightType::kQ3_K, "q3_k", 256, 110}, {WeightType::kQ4_K, "q4_k", 256, 144},
    {WeightType::kQ5_K, "q5_k", 256, 176}, {WeightType::kQ6_K, "q6_k", 256, 210},
    {WeightType::kBF16, "bf16", 1, 2},
};

float FloatOfBits(uint32_t bits) {
  float value = 0;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

}  // namespace

const TypeInfo* AllTypes() { return kTypes; }

const TypeInfo* FindType(const char* name) {
  for (const TypeInfo& info : kTypes) {
    if (std::strcmp(info.name, name) == 0) return &info;
  }
  return nullptr;
}

const TypeInfo& InfoOf(WeightType type) {
  const TypeInfo* found = kTypes;
  for (const TypeInfo& info : kTypes) {
    if (info.type == type) found = &info;
  }
  return *found;
}

size_t ScaleOffset(WeightType type) {
  switch (type) {
    case WeightType::kQ2_K:
      return 80;
    case WeightType::kQ3_K:
      return 108;
    case WeightType::kQ6_K:
      return 208;
    default:
      return 0;
  }
}

size_t RowBytes(WeightType type, size_t k) {
  const TypeInfo& info = InfoOf(type);
  return k / info.block_values * info.block_bytes;
}

float HalfToFloat(uint16_t half) {
  const uint32_t sign = static_cast<uint32_t>(half & 0x8000u) << 16;
  const uint32_t exponent = (half >> 10) & 31u;
  const uint32_t fraction = half & 0x3ffu;
  if (exponent == 31) return FloatOfBits(sign | 0x7f800000u | fraction << 13);
  if (exponent != 0) return FloatOfBits(sign | (exponent + 112) << 23 | fraction << 13);
  // Zero and subnormals: fraction * 2^-24 is exact in f32.
  const float magnitude = static_cast<float>(fraction) * 0x1p-24f;
  return sign != 0 ? -magnitude : magnitude;
}

uint16_t FloatToHalf(float value) {
  uint32_t bits = 0;
  std::memcpy(&bits, &value, sizeof bits);
  const uint32_t sign = (bits >> 16) & 0x8000u;
  const uint32_t magnitude = bits & 0x7fffffffu;
  if (magnitude > 0x7f800000u) {  // NaN: made quiet, the top of its payload is kept
    return static_cast<uint16_t>(sign | 0x7e00u | (magnitude >> 13 & 0x1ffu));
  }
  if (magnitude >= 0x477ff000u) return static_cast<uint16_t>(sign | 0x7c00u);  // >= 65520
  if (magnitude >=
      0x38800000u) {  // >= 2^-14: normal; a carry out of the fraction raises the exponent
    const uint32_t rebased = magnitude - (112u << 23);
    return static_cast<uint16_t>(sign | (rebased + 0xfffu + (rebased >> 13 & 1u)) >> 13);
  }
  if (magnitude < 0x33000000u) return static_cast<uint16_t>(sign);  // < 2^-25
  // Subnormal: value = significand * 2^(exponent - 150), wanted in units of 2^-24.
  const uint32_t significand = (magnitude & 0x7fffffu) | 0x800000u;
  const uint32_t shift = 126u - (magnitude >> 23);  // 14..24
  const uint32_t kept = significand >> shift;
  const uint32_t rest = significand & ((1u << shift) - 1u);
  const uint32_t half_unit = 1u << (shift - 1u);
  const bool up = rest > half_unit || (rest == half_unit && (kept & 1u) != 0);
  return static_cast<uint16_t>(sign | (kept + (up ? 1u : 0u)));
}

float BFloatToFloat(uint16_t bits) { return FloatOfBits(static_cast<uint32_t>(bits) << 16); }

}  // namespace potluck
