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
  kQ5_0 = 6,
  kQ5_1 = 7,
  kQ8_0 = 8,
  kQ2_K = 10,
  kQ3_K = 11,
  kQ4_K = 12,
  kQ5_K = 13,
  kQ6_K = 14,
  kBF16 = 30,
};

struct TypeInfo {
  WeightType type;
  const char* name;     // "q4_0", as in GGUF tools, lower case
  size_t block_values;  // 1 for floats
  size_t block_bytes;
};

// All that are supported, in the order of their numbers.
constexpr size_t kTypeCount = 13;
const TypeInfo* AllTypes();  // [kTypeCount]

// Null if the type is not supported.
const TypeInfo* FindType(const char* name);
const TypeInfo& InfoOf(WeightType type);

// Where a block of a quantized type in a file has its f16 scale d; its m or dmin, if any, is next.
size_t ScaleOffset(WeightType type);

// Bytes of a row of k values in the file's layout; k is a multiple of block_values.
size_t RowBytes(WeightType type, size_t k);

constexpr size_t kPanelRows = 8;

// Exact; NaN and infinity are kept.
float HalfToFloat(uint16_t half);
uint16_t FloatToHalf(float value);  // round to nearest even
float BFloatToFloat(uint16_t bits);

}  // namespace potluck
