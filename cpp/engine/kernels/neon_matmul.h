// The matrix kernels of plain ARMv8-A, one translation unit each: MatMulTable's prepare, and its
// multiply for some weight types.
#pragma once

#include "engine/kernels/matmul_table.h"

namespace potluck {
namespace neon {

bool Prepare(Grain grain, const float* x, size_t k, const RowGroup& group, size_t lane,
             uint8_t* dst);
void MultiplyBlock32(WeightType type, const uint8_t* panels, size_t n_panels, const PreparedRows& x,
                     float* out, size_t out_stride, uint8_t* scratch);
void MultiplyK(WeightType type, const uint8_t* panels, size_t n_panels, const PreparedRows& x,
               float* out, size_t out_stride, uint8_t* scratch);
void MultiplyFloat(WeightType type, const uint8_t* panels, size_t n_panels, const PreparedRows& x,
                   float* out, size_t out_stride);

}  // namespace neon
}  // namespace potluck
