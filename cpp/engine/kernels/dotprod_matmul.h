// The matrix kernels of ARM CPUs with dot products, one translation unit each: multiply of
// MatMulTable for some weight types. Float weights and preparing are neon's.
#pragma once

#include "engine/kernels/matmul_table.h"

namespace potluck {
namespace dotprod {

void MultiplyBlock32(WeightType type, const uint8_t* panels, size_t n_panels, const PreparedRows& x,
                     float* out, size_t out_stride, uint8_t* scratch);
void MultiplyK(WeightType type, const uint8_t* panels, size_t n_panels, const PreparedRows& x,
               float* out, size_t out_stride, uint8_t* scratch);

}  // namespace dotprod
}  // namespace potluck
