// Seeded weights in the file's layout and activations, random and extreme, for the tests of the
// matrix kernels.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <random>
#include <vector>

#include "engine/pack.h"
#include "engine/types.h"

namespace weights {

using potluck::WeightType;

constexpr WeightType kAllTypes[] = {
    WeightType::kF32,  WeightType::kF16,  WeightType::kBF16, WeightType::kQ4_0, WeightType::kQ4_1,
    WeightType::kQ5_0, WeightType::kQ5_1, WeightType::kQ8_0, WeightType::kQ2_K, WeightType::kQ3_K,
    WeightType::kQ4_K, WeightType::kQ5_K, WeightType::kQ6_K};

enum class Scales { kRandom, kZero, kNegativeZero, kSubnormal, kLargest, kNegative };

using Random = std::mt19937;

inline void PutHalf(uint8_t* at, float value) {
  const uint16_t half = potluck::FloatToHalf(value);
  std::memcpy(at, &half, sizeof half);
}

inline float ScaleOf(Scales scales, Random& random) {
  switch (scales) {
    case Scales::kZero:
      return 0.0f;
    case Scales::kNegativeZero:
      return -0.0f;
    case Scales::kSubnormal:
      return 0x1p-24f * static_cast<float>(random() % 1023 + 1);
    case Scales::kLargest:
      return random() % 2 != 0 ? 65504.0f : -65504.0f;
    case Scales::kNegative:
      return -0.01f - 0.00001f * static_cast<float>(random() % 1000);
    case Scales::kRandom:
      return 0.00002f * (static_cast<float>(random() % 1000) - 300.0f);
  }
  return 0.0f;
}

// Bytes [n, k] of a file; `byte` (0..255), if given, fills all but the scales.
inline std::vector<uint8_t> FileBytes(WeightType type, size_t n, size_t k, uint32_t seed,
                                      Scales scales = Scales::kRandom, int byte = -1) {
  Random random(seed);
  const potluck::TypeInfo& info = potluck::InfoOf(type);
  std::vector<uint8_t> bytes(n * potluck::RowBytes(type, k));
  for (uint8_t& b : bytes)
    b = static_cast<uint8_t>(byte >= 0 ? static_cast<uint32_t>(byte) : random() >> 13);
  for (size_t at = 0; at < bytes.size(); at += info.block_bytes) {
    uint8_t* block = bytes.data() + at;
    const float d = ScaleOf(scales, random);
    if (type == WeightType::kF32) std::memcpy(block, &d, sizeof d);
    if (type == WeightType::kBF16) std::memcpy(block, reinterpret_cast<const uint8_t*>(&d) + 2, 2);
    if (type == WeightType::kF32 || type == WeightType::kBF16) continue;
    PutHalf(block + potluck::ScaleOffset(type), d);
    if (!potluck::HasMin(type)) continue;
    const float largest_code = type == WeightType::kQ5_1 ? 31.0f : 15.0f;
    const float min = info.block_values == 32 ? -0.5f * largest_code * d : 1.5f * d;
    PutHalf(block + potluck::ScaleOffset(type) + 2, std::abs(min) > 65504.0f ? d : min);
  }
  return bytes;
}

inline std::vector<uint8_t> Pack(WeightType type, const std::vector<uint8_t>& bytes, size_t n,
                                 size_t k) {
  std::vector<uint8_t> packed(potluck::PackedBytes(type, n, k));
  for (size_t first = 0; first < n; first += potluck::kPanelRows) {
    const uint8_t* rows[potluck::kPanelRows] = {};
    for (size_t r = 0; r < potluck::kPanelRows && first + r < n; ++r) {
      rows[r] = bytes.data() + (first + r) * potluck::RowBytes(type, k);
    }
    potluck::PackPanel(type, rows, k,
                       packed.data() + first / potluck::kPanelRows * potluck::PanelBytes(type, k));
  }
  return packed;
}

// About normal, [rows, k].
inline std::vector<float> Activations(size_t rows, size_t k, uint32_t seed) {
  Random random(seed);
  std::normal_distribution<float> normal(0.0f, 1.0f);
  std::vector<float> x(rows * k);
  for (float& value : x) value = normal(random);
  return x;
}

}  // namespace weights
