// Whether all of many values are finite, in one pass that compilers turn into vectors.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <cstring>

namespace potluck {

// The largest |x[i]| by the order of its bits: infinity and NaN stand above all numbers, so the
// result is finite exactly if every value is. 0 if n is 0.
inline float LargestMagnitude(const float* x, size_t n) {
  int32_t largest = 0;
  for (size_t i = 0; i < n; ++i) {
    int32_t bits = 0;
    std::memcpy(&bits, x + i, sizeof(bits));
    largest = std::max(largest, bits & 0x7fffffff);
  }
  float value = 0;
  std::memcpy(&value, &largest, sizeof(value));
  return value;
}

}  // namespace potluck
