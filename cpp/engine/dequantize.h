// Values of rows as they lie in a file: exactly those that every GGUF tool computes.
#pragma once

#include <cstddef>
#include <cstdint>

#include "engine/types.h"

namespace potluck {

// n values of whole blocks into out [n]. Each operation rounds once, to f32, in the order of the
// layouts' formulas: (d * sc) * q - dmin * mn and the like. NaN and infinity are passed on.
void Dequantize(WeightType type, const uint8_t* blocks, size_t n, float* out);

}  // namespace potluck
