// The AVX-512 VNNI table of matrix kernels. AVX2's prepare rows, and take the odd last panel that
// kernels for two panels leave.
#include "engine/kernels/avx512vnni_matmul.h"

#include "engine/kernels/avx2_matmul.h"

namespace potluck {
namespace {

void MultiplyByAvx2(WeightType type, const uint8_t* panels, size_t n_panels, const PreparedRows& x,
                    float* out, size_t out_stride, uint8_t* scratch) {
  Avx2MatMulTable()->multiply(type, panels, n_panels, x, out, out_stride, scratch);
}

// Panels that are left out are an odd last one at most.
size_t MultiplyMany(WeightType type, const uint8_t* panels, size_t n_panels, const PreparedRows& x,
                    float* out, size_t out_stride, uint8_t* scratch) {
  if (x.grain == Grain::kFloat)
    return avx512vnni::MultiplyFloats(type, panels, n_panels, x, out, out_stride, scratch);
  const bool is_k = x.grain == Grain::kBlock256;
  size_t p = 0;
  if (x.rows > kFewRows) {
    const auto fours = is_k ? avx512vnni::MultiplyKFours : avx512vnni::MultiplyFours;
    p = fours(type, panels, n_panels, x, out, out_stride, scratch);
  }
  const auto twos = is_k ? avx512vnni::MultiplyKTwos : avx512vnni::MultiplyTwos;
  return twos(type, panels, p, n_panels, x, out, out_stride);
}

void Multiply(WeightType type, const uint8_t* panels, size_t n_panels, const PreparedRows& x,
              float* out, size_t out_stride, uint8_t* scratch) {
  if (x.rows == 1 && x.grain != Grain::kFloat)
    return avx512vnni::MultiplyOneRow(type, panels, n_panels, x, out);
  const size_t p = MultiplyMany(type, panels, n_panels, x, out, out_stride, scratch);
  if (p == n_panels) return;
  panels += p * PanelBytes(type, x.k);
  MultiplyByAvx2(type, panels, 1, x, out + p * kPanelRows, out_stride, scratch);
}

constexpr MatMulTable kTable = {"avx512vnni", avx2::Prepare, Multiply};

}  // namespace

const MatMulTable* Avx512VnniMatMulTable() { return &kTable; }

}  // namespace potluck
