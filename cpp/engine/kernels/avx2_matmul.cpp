// The AVX2 table of matrix kernels.
#include "engine/kernels/avx2_matmul.h"

namespace potluck {
namespace {

void Multiply(WeightType type, const uint8_t* panels, size_t n_panels, const PreparedRows& x,
              float* out, size_t out_stride, uint8_t* scratch) {
  if (x.grain == Grain::kFloat)
    return avx2::MultiplyFloat(type, panels, n_panels, x, out, out_stride, scratch);
  if (x.grain == Grain::kBlock256)
    return avx2::MultiplyK(type, panels, n_panels, x, out, out_stride, scratch);
  if (type == WeightType::kQ8_0)
    return avx2::MultiplyQ8(type, panels, n_panels, x, out, out_stride, scratch);
  avx2::MultiplyBlock32(type, panels, n_panels, x, out, out_stride, scratch);
}

constexpr MatMulTable kTable = {"avx2", avx2::Prepare, Multiply};

}  // namespace

const MatMulTable* Avx2MatMulTable() { return &kTable; }

}  // namespace potluck
