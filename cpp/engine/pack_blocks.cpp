#include "engine/pack_blocks.h"

#include <cstring>

namespace potluck {

uint16_t HalfAt(const uint8_t* bytes) {
  uint16_t half = 0;
  std::memcpy(&half, bytes, sizeof half);
  return half;
}

bool IsFiniteHalf(const uint8_t* bytes) { return (HalfAt(bytes) & 0x7c00u) != 0x7c00u; }

RunShape RunOf(WeightType type) {
  switch (type) {
    case WeightType::kQ2_K:
      return {false, true, false, 0, 0};
    case WeightType::kQ3_K:
      return {false, true, true, 0, 2};
    case WeightType::kQ5_0:
    case WeightType::kQ5_1:
    case WeightType::kQ5_K:
      return {true, false, true, 0, 4};
    case WeightType::kQ6_K:
      return {true, true, false, 4, 0};
    default:
      return {true, false, false, 0, 0};
  }
}

// Four codes at a time: a word of 4 bytes is the same operation on each.
void WriteRun(const RunShape& shape, const uint8_t codes[32], size_t r, uint8_t* run) {
  uint32_t words[8];
  std::memcpy(words, codes, sizeof words);
  uint8_t* to = run + 4 * r;
  if (shape.has_nibbles) {
    for (size_t v = 0; v < 4; ++v, to += 32) {
      const uint32_t word = (words[v] & 0x0f0f0f0fu) | (words[4 + v] & 0x0f0f0f0fu) << 4;
      std::memcpy(to, &word, sizeof word);
    }
  }
  if (shape.has_twos) {
    for (size_t t = 0; t < 2; ++t, to += 32) {
      uint32_t word = 0;
      for (size_t j = 0; j < 4; ++j)
        word |= (words[4 * t + j] >> shape.twos_shift & 0x03030303u) << (2 * j);
      std::memcpy(to, &word, sizeof word);
    }
  }
  if (shape.has_plane) {
    uint32_t word = 0;
    for (size_t g = 0; g < 8; ++g) word |= (words[g] >> shape.plane_shift & 0x01010101u) << g;
    std::memcpy(to, &word, sizeof word);
  }
}

void ReadRun(const RunShape& shape, const uint8_t* run, size_t r, uint8_t codes[32]) {
  const uint8_t* from = run + 4 * r;
  std::memset(codes, 0, 32);
  if (shape.has_nibbles) {
    for (size_t k = 0; k < 32; ++k) codes[k] = from[k % 16 / 4 * 32 + k % 4] >> (k / 16 * 4) & 15;
    from += 128;
  }
  if (shape.has_twos) {
    for (size_t k = 0; k < 32; ++k) {
      const unsigned bits = from[k / 16 * 32 + k % 4] >> (k % 16 / 4 * 2) & 3u;
      codes[k] = static_cast<uint8_t>(codes[k] | bits << shape.twos_shift);
    }
    from += 64;
  }
  if (shape.has_plane) {
    for (size_t k = 0; k < 32; ++k) {
      const unsigned bit = from[k % 4] >> (k / 4) & 1u;
      codes[k] = static_cast<uint8_t>(codes[k] | bit << shape.plane_shift);
    }
  }
}

}  // namespace potluck
