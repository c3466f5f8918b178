// The AVX-VNNI table of matrix kernels: its own for blocks, AVX2's for floats and for preparing.
#include "engine/kernels/avxvnni_matmul.h"

namespace potluck {
namespace {

void Multiply(WeightType type, const uint8_t* panels, size_t n_panels, const PreparedRows& x,
              float* out, size_t out_stride, uint8_t* scratch) {
  switch (x.grain) {
    case Grain::kFloat:
      return avx2::MultiplyFloat(type, panels, n_panels, x, out, out_stride, scratch);
    case Grain::kBlock32:
      return avxvnni::MultiplyBlock32(type, panels, n_panels, x, out, out_stride, scratch);
    case Grain::kBlock256:
      return avxvnni::MultiplyK(type, panels, n_panels, x, out, out_stride, scratch);
  }
}

constexpr MatMulTable kTable = {"avxvnni", avx2::Prepare, Multiply};

}  // namespace

const MatMulTable* AvxVnniMatMulTable() { return &kTable; }

}  // namespace potluck
