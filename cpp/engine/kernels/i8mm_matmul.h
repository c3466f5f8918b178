// The matrix kernels of ARM CPUs with matrix products of bytes, one translation unit each: more
// than kFewRows rows. Fewer take the kernels of dot products.
#pragma once

#include "engine/kernels/matmul_table.h"

namespace potluck {
namespace i8mm {

void MultiplyBlock32(WeightType type, const uint8_t* panels, size_t n_panels, const PreparedRows& x,
                     float* out, size_t out_stride, uint8_t* scratch);
void MultiplyK(WeightType type, const uint8_t* panels, size_t n_panels, const PreparedRows& x,
               float* out, size_t out_stride, uint8_t* scratch);

}  // namespace i8mm
}  // namespace potluck
