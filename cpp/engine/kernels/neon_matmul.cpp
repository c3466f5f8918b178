// The table of matrix kernels for plain ARMv8-A.
#include "engine/kernels/neon_matmul.h"

namespace potluck {
namespace {

void Multiply(WeightType type, const uint8_t* panels, size_t n_panels, const PreparedRows& x,
              float* out, size_t out_stride, uint8_t* scratch) {
  if (x.grain == Grain::kFloat)
    return neon::MultiplyFloat(type, panels, n_panels, x, out, out_stride);
  if (x.grain == Grain::kBlock256)
    return neon::MultiplyK(type, panels, n_panels, x, out, out_stride, scratch);
  neon::MultiplyBlock32(type, panels, n_panels, x, out, out_stride, scratch);
}

constexpr MatMulTable kTable = {"neon", neon::Prepare, Multiply};

}  // namespace

const MatMulTable* NeonMatMulTable() { return &kTable; }

}  // namespace potluck
