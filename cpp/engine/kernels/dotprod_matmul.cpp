// The table of matrix kernels for ARM CPUs with dot products.
#include "engine/kernels/dotprod_matmul.h"

#include "engine/kernels/neon_matmul.h"

namespace potluck {
namespace {

void Multiply(WeightType type, const uint8_t* panels, size_t n_panels, const PreparedRows& x,
              float* out, size_t out_stride, uint8_t* scratch) {
  if (x.grain == Grain::kFloat)
    return neon::MultiplyFloat(type, panels, n_panels, x, out, out_stride);
  if (x.grain == Grain::kBlock256)
    return dotprod::MultiplyK(type, panels, n_panels, x, out, out_stride, scratch);
  dotprod::MultiplyBlock32(type, panels, n_panels, x, out, out_stride, scratch);
}

constexpr MatMulTable kTable = {"dotprod", neon::Prepare, Multiply};

}  // namespace

const MatMulTable* DotProdMatMulTable() { return &kTable; }

}  // namespace potluck
