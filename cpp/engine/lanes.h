// Four floats at a time, by the compiler's own vectors: the same bits on every CPU, no intrinsics.
//
// Each operation rounds as its scalar does; sums keep four partial sums, added in SumOf's order.
// For code at the baseline of the architecture only, never for the files of an ISA.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>

namespace potluck {

using F4 = float __attribute__((vector_size(16)));

inline F4 LoadF4(const float* from) {
  F4 x{};
  std::memcpy(&x, from, sizeof x);
  return x;
}
inline void StoreF4(F4 x, float* to) { std::memcpy(to, &x, sizeof x); }
inline F4 AllOf(float x) { return F4{x, x, x, x}; }
inline F4 Least(F4 a, F4 b) { return a < b ? a : b; }
inline F4 Most(F4 a, F4 b) { return a > b ? a : b; }
inline float SumOf(F4 x) { return (x[0] + x[2]) + (x[1] + x[3]); }
inline float LeastOf(F4 x) {
  const float a = x[0] < x[2] ? x[0] : x[2], b = x[1] < x[3] ? x[1] : x[3];
  return a < b ? a : b;
}
inline float MostOf(F4 x) { return -LeastOf(-x); }

// To the nearest whole number, ties to even; |x| < 2^22.
inline F4 Rounded(F4 x) {
  const F4 shift = AllOf(0x1.8p+23f);
  return (x + shift) - shift;
}

}  // namespace potluck
