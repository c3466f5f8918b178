// The table of matrix kernels for ARM CPUs with matrix products of bytes.
#include "engine/kernels/i8mm_matmul.h"

#include "engine/kernels/dotprod_matmul.h"
#include "engine/kernels/neon_matmul.h"

namespace potluck {
namespace {

void Multiply(WeightType type, const uint8_t* panels, size_t n_panels, const PreparedRows& x,
              float* out, size_t out_stride, uint8_t* scratch) {
  const bool is_many = x.rows > kFewRows;
  switch (x.grain) {
    case Grain::kFloat:
      return neon::MultiplyFloat(type, panels, n_panels, x, out, out_stride);
    case Grain::kBlock256:
      return is_many ? i8mm::MultiplyK(type, panels, n_panels, x, out, out_stride, scratch)
                     : dotprod::MultiplyK(type, panels, n_panels, x, out, out_stride, scratch);
    case Grain::kBlock32:
      return is_many
                 ? i8mm::MultiplyBlock32(type, panels, n_panels, x, out, out_stride, scratch)
                 : dotprod::MultiplyBlock32(type, panels, n_panels, x, out, out_stride, scratch);
  }
}

constexpr MatMulTable kTable = {"i8mm", neon::Prepare, Multiply};

}  // namespace

const MatMulTable* I8mmMatMulTable() { return &kTable; }

}  // namespace potluck
