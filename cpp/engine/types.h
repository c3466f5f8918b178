// Weight types, their blocks in a file, and exact conversions of 16-bit floats.
#pragma once

#include <cstddef>
#include <cstdint>

namespace potluck {

// Numbers are GGUF's.
enum class WeightType : uint32_t {
  kF32 = 0,
  kF16 = 1,
  kQ4_0 = 2,
  kQ4_1 = 3,
  kQ8_0 = 8,
  kQ6_K = 14,
  kBF16 = 30,
};

struct TypeInfo {
  WeightType type;
  const char* name;     // "q4_0", as in GGUF tools, lower case
  size_t block_values;  // 1 for floats
  size_t block_bytes;
};

// Null if the type is not supported.
const TypeInfo* FindType(const char* name);
const TypeInfo& InfoOf(WeightType type);

// Bytes of a row of k values in the file's layout; k is a multiple of block_values.
size_t RowBytes(WeightType type, size_t k);

constexpr size_t kPanelRows = 8;

// Exact; NaN and infinity are kept.
float HalfToFloat(uint16_t half);
uint16_t FloatToHalf(float value);  // round to nearest even
float BFloatToFloat(uint16_t bits);

}  // namespace potluck
