// Blocks of quantized types from values, by a search for small errors.
#pragma once

#include <cstddef>
#include <cstdint>

#include "engine/types.h"

namespace potluck {

// Values x are finite and within f16's range; [32] and [256].
void QuantizeBlock32(WeightType type, const float* x, uint8_t* block);
void QuantizeBlock256(WeightType type, const float* x, uint8_t* block);

}  // namespace potluck
