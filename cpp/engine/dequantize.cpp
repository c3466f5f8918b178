#include "engine/dequantize.h"

#include <cstring>

namespace potluck {
namespace {

float HalfOf(const uint8_t* at) {
  uint16_t half = 0;
  std::memcpy(&half, at, sizeof half);
  return HalfToFloat(half);
}

// The same as HalfToFloat, without branches: compilers make vectors of it.
void WidenHalves(const uint8_t* from, size_t n, float* out) {
  for (size_t i = 0; i < n; ++i) {
    uint16_t half = 0;
    std::memcpy(&half, from + 2 * i, sizeof half);
    const uint32_t sign = static_cast<uint32_t>(half & 0x8000u) << 16;
    const uint32_t magnitude = half & 0x7fffu;
    const uint32_t normal = (magnitude << 13) + (112u << 23);
    const uint32_t special = normal + (112u << 23);  // infinity and NaN
    // Subnormals: the fraction above one half, less the half, is fraction * 2^-24, exactly.
    const uint32_t shifted = magnitude | 126u << 23;
    float small = 0;
    std::memcpy(&small, &shifted, sizeof small);
    small -= 0.5f;
    uint32_t subnormal = 0;
    std::memcpy(&subnormal, &small, sizeof subnormal);
    uint32_t bits = magnitude < 0x400u ? subnormal : normal;
    bits = magnitude >= 0x7c00u ? special : bits;
    bits |= sign;
    std::memcpy(out + i, &bits, sizeof bits);
  }
}

void WidenBFloats(const uint8_t* from, size_t n, float* out) {
  for (size_t i = 0; i < n; ++i) {
    uint16_t half = 0;
    std::memcpy(&half, from + 2 * i, sizeof half);
    const uint32_t bits = static_cast<uint32_t>(half) << 16;
    std::memcpy(out + i, &bits, sizeof bits);
  }
}

// 32 codes of four bits: the low nibbles of 16 bytes, then the high ones.
void ReadNibbles(const uint8_t* from, uint8_t codes[32]) {
  for (size_t j = 0; j < 16; ++j) {
    codes[j] = from[j] & 15u;
    codes[j + 16] = static_cast<uint8_t>(from[j] >> 4);
  }
}

void AddFifthBits(const uint8_t* from, uint8_t codes[32]) {
  uint32_t bits = 0;
  std::memcpy(&bits, from, sizeof bits);
  for (size_t j = 0; j < 32; ++j) codes[j] |= static_cast<uint8_t>((bits >> j & 1u) << 4);
}

// value = step * (code - centre) + offset
void Scale(const uint8_t codes[], size_t n, float step, float centre, float offset, float* out) {
  for (size_t j = 0; j < n; ++j) out[j] = step * (static_cast<float>(codes[j]) - centre) + offset;
}

void BlockQ4(const uint8_t* block, bool has_min, float* out) {
  uint8_t codes[32];
  ReadNibbles(block + (has_min ? 4 : 2), codes);
  if (has_min)
    Scale(codes, 32, HalfOf(block), 0.0f, HalfOf(block + 2), out);
  else
    for (size_t j = 0; j < 32; ++j) out[j] = HalfOf(block) * (static_cast<float>(codes[j]) - 8.0f);
}

void BlockQ5(const uint8_t* block, bool has_min, float* out) {
  uint8_t codes[32];
  const size_t at = has_min ? 4 : 2;
  ReadNibbles(block + at + 4, codes);
  AddFifthBits(block + at, codes);
  if (has_min)
    Scale(codes, 32, HalfOf(block), 0.0f, HalfOf(block + 2), out);
  else
    for (size_t j = 0; j < 32; ++j) out[j] = HalfOf(block) * (static_cast<float>(codes[j]) - 16.0f);
}

void BlockQ8(const uint8_t* block, float* out) {
  const float step = HalfOf(block);
  for (size_t j = 0; j < 32; ++j)
    out[j] = step * static_cast<float>(static_cast<int8_t>(block[2 + j]));
}

void BlockQ2K(const uint8_t* block, float* out) {
  const float d = HalfOf(block + 80), dmin = HalfOf(block + 82);
  for (size_t i = 0; i < 256; ++i) {
    const size_t half = i / 128, run = i % 128 / 32, l = i % 32;
    const unsigned code = block[16 + 32 * half + l] >> (2 * run) & 3u;
    const float step = d * static_cast<float>(block[i / 16] & 15u);
    const float min = dmin * static_cast<float>(block[i / 16] >> 4);
    out[i] = step * static_cast<float>(code) - min;
  }
}

void BlockQ3K(const uint8_t* block, float* out) {
  const float d = HalfOf(block + 108);
  const uint8_t* s = block + 96;
  for (size_t i = 0; i < 256; ++i) {
    const size_t half = i / 128, run = i % 128 / 32, l = i % 32, j = i / 16;
    const int low = j < 8 ? s[j] & 15 : s[j - 8] >> 4;
    const int scale = (low | (s[8 + j % 4] >> (2 * (j / 4)) & 3) << 4) - 32;
    const int code = block[32 + 32 * half + l] >> (2 * run) & 3;
    const bool is_high = (block[l] >> (4 * half + run) & 1) != 0;
    out[i] = d * static_cast<float>(scale) * static_cast<float>(is_high ? code : code - 4);
  }
}

void BlockQ45K(const uint8_t* block, bool has_fifth, float* out) {
  const float d = HalfOf(block), dmin = HalfOf(block + 2);
  const uint8_t* s = block + 4;
  const uint8_t* high = block + 16;
  const uint8_t* low = block + (has_fifth ? 48 : 16);
  for (size_t j = 0; j < 8; ++j) {
    unsigned scale = s[j] & 63u, min = s[j + 4] & 63u;
    if (j >= 4) {
      scale = (s[j + 4] & 15u) | (s[j - 4] >> 6 & 3u) << 4;
      min = (s[j + 4] >> 4 & 15u) | (s[j] >> 6 & 3u) << 4;
    }
    const float step = d * static_cast<float>(scale), offset = dmin * static_cast<float>(min);
    for (size_t l = 0; l < 32; ++l) {
      unsigned code = low[j / 2 * 32 + l] >> (j % 2 * 4) & 15u;
      if (has_fifth) code |= (high[l] >> j & 1u) << 4;
      out[32 * j + l] = step * static_cast<float>(code) - offset;
    }
  }
}

void BlockQ6K(const uint8_t* block, float* out) {
  const float d = HalfOf(block + 208);
  for (size_t i = 0; i < 256; ++i) {
    const size_t half = i / 128, run = i % 128 / 32, l = i % 32;
    const int low = block[64 * half + run % 2 * 32 + l] >> (run / 2 * 4) & 15;
    const int top = block[128 + 32 * half + l] >> (2 * run) & 3;
    const float step = d * static_cast<float>(static_cast<int8_t>(block[192 + i / 16]));
    out[i] = step * static_cast<float>((low | top << 4) - 32);
  }
}

void Block(WeightType type, const uint8_t* block, float* out) {
  switch (type) {
    case WeightType::kQ4_0:
    case WeightType::kQ4_1:
      return BlockQ4(block, type == WeightType::kQ4_1, out);
    case WeightType::kQ5_0:
    case WeightType::kQ5_1:
      return BlockQ5(block, type == WeightType::kQ5_1, out);
    case WeightType::kQ8_0:
      return BlockQ8(block, out);
    case WeightType::kQ2_K:
      return BlockQ2K(block, out);
    case WeightType::kQ3_K:
      return BlockQ3K(block, out);
    case WeightType::kQ4_K:
    case WeightType::kQ5_K:
      return BlockQ45K(block, type == WeightType::kQ5_K, out);
    default:
      return BlockQ6K(block, out);
  }
}

}  // namespace

void Dequantize(WeightType type, const uint8_t* blocks, size_t n, float* out) {
  if (type == WeightType::kF32) {
    std::memcpy(out, blocks, n * sizeof(float));
  } else if (type == WeightType::kF16) {
    WidenHalves(blocks, n, out);
  } else if (type == WeightType::kBF16) {
    WidenBFloats(blocks, n, out);
  } else {
    const TypeInfo& info = InfoOf(type);
    for (size_t i = 0; i < n / info.block_values; ++i)
      Block(type, blocks + i * info.block_bytes, out + i * info.block_values);
  }
}

}  // namespace potluck
