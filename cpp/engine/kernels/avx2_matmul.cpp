// The AVX2 table of matrix kernels.
#include "engine/kernels/avx2_matmul.h"

namespace potluck {
namespace {

void Multiply(WeightType type, const uint8_t* panels, size_t n_panels, const PreparedRows& x,
              float* out, size_t out_stride, uint8_t* scratch) {
  switch (type) {
    case WeightType::kQ4_0:
    case WeightType::kQ4_1:
      return avx2::MultiplyQ4(type, panels, n_panels, x, out, out_stride, scratch);
    case WeightType::kQ8_0:
      return avx2::MultiplyQ8(type, panels, n_panels, x, out, out_stride, scratch);
    case WeightType::kQ6_K:
      return avx2::MultiplyQ6K(type, panels, n_panels, x, out, out_stride, scratch);
    case WeightType::kF32:
    case WeightType::kF16:
    case WeightType::kBF16:
      return avx2::MultiplyFloat(type, panels, n_panels, x, out, out_stride, scratch);
  }
}

constexpr MatMulTable kTable = {"avx2", avx2::Prepare, Multiply};

}  // namespace

const MatMulTable* Avx2MatMulTable() { return &kTable; }

}  // namespace potluck
