// The AVX-512 VNNI table of matrix kernels: its own for 4 and 8 bit blocks, AVX2's for the rest.
#include "engine/kernels/avx512vnni_matmul.h"

#include "engine/kernels/avx2_matmul.h"

namespace potluck {
namespace {

void MultiplyByAvx2(WeightType type, const uint8_t* panels, size_t n_panels, const PreparedRows& x,
                    float* out, size_t out_stride, uint8_t* scratch) {
  Avx2MatMulTable()->multiply(type, panels, n_panels, x, out, out_stride, scratch);
}

void MultiplyBlocks(WeightType type, const uint8_t* panels, size_t n_panels, const PreparedRows& x,
                    float* out, size_t out_stride, uint8_t* scratch) {
  // One row waits for memory, and memory likes one stream better than two: 51 against 40 GB/s (Zen
  // 5).
  if (x.rows == 1) return MultiplyByAvx2(type, panels, n_panels, x, out, out_stride, scratch);
  size_t p = 0;
  if (x.rows > kFewRows) {
    p = avx512vnni::MultiplyFours(type, panels, n_panels, x, out, out_stride, scratch);
  }
  p = avx512vnni::MultiplyTwos(type, panels, p, n_panels, x, out, out_stride);
  if (p == n_panels) return;
  panels += p * PanelBytes(type, x.k);  // an odd last one
  MultiplyByAvx2(type, panels, 1, x, out + p * kPanelRows, out_stride, scratch);
}

void Multiply(WeightType type, const uint8_t* panels, size_t n_panels, const PreparedRows& x,
              float* out, size_t out_stride, uint8_t* scratch) {
  switch (type) {
    case WeightType::kQ4_0:
    case WeightType::kQ4_1:
    case WeightType::kQ8_0:
      return MultiplyBlocks(type, panels, n_panels, x, out, out_stride, scratch);
    default:
      return MultiplyByAvx2(type, panels, n_panels, x, out, out_stride, scratch);
  }
}

constexpr MatMulTable kTable = {"avx512vnni", avx2::Prepare, Multiply};

}  // namespace

const MatMulTable* Avx512VnniMatMulTable() { return &kTable; }

}  // namespace potluck
