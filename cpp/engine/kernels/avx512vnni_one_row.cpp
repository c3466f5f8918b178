// One row on AVX-512 VNNI: one panel after another in vectors of 8 rows. A single row waits for
// memory, and one stream of it is faster than the two that vectors of 16 rows need.
#include "engine/kernels/avx512vnni_matmul.h"
#include "engine/kernels/avxvnni_block32_narrow.h"
#include "engine/kernels/avxvnni_k_narrow.h"

namespace potluck {
namespace avx512vnni {
namespace {

template <class Type>
void MultiplyBlocks(const uint8_t* panels, size_t n_panels, const PreparedRows& x, float* out) {
  const avx2::PanelShape shape = avx2::ShapeOf<Type>(x.k);
  const RowGroup group = GroupAt(x.grain, 1, x.k, 0);
  for (size_t p = 0; p < n_panels; ++p, panels += shape.panel_bytes)
    avxvnni::MultiplyNarrow<Type, 1>(shape, panels, x.data, group, out + 8 * p, 0);
}

template <class Type>
void MultiplyK(const uint8_t* panels, size_t n_panels, const PreparedRows& x, float* out) {
  const RowGroup group = GroupAt(x.grain, 1, x.k, 0);
  for (size_t p = 0; p < n_panels; ++p, panels += x.k / 256 * Type::kRecordBytes)
    avxvnni::MultiplyNarrow<Type, 1>(panels, x.k, x.data, group, out + 8 * p, 0);
}

}  // namespace

void MultiplyOneRow(WeightType type, const uint8_t* panels, size_t n_panels, const PreparedRows& x,
                    float* out) {
  switch (type) {
    case WeightType::kQ4_0:
      return MultiplyBlocks<avx2::Q4_0>(panels, n_panels, x, out);
    case WeightType::kQ4_1:
      return MultiplyBlocks<avx2::Q4_1>(panels, n_panels, x, out);
    case WeightType::kQ5_0:
      return MultiplyBlocks<avx2::Q5_0>(panels, n_panels, x, out);
    case WeightType::kQ5_1:
      return MultiplyBlocks<avx2::Q5_1>(panels, n_panels, x, out);
    case WeightType::kQ8_0:
      return MultiplyBlocks<avxvnni::Q8_0>(panels, n_panels, x, out);
    case WeightType::kQ2_K:
      return MultiplyK<avx2::Q2_K>(panels, n_panels, x, out);
    case WeightType::kQ3_K:
      return MultiplyK<avx2::Q3_K>(panels, n_panels, x, out);
    case WeightType::kQ4_K:
      return MultiplyK<avx2::Q4_K>(panels, n_panels, x, out);
    case WeightType::kQ5_K:
      return MultiplyK<avx2::Q5_K>(panels, n_panels, x, out);
    default:
      return MultiplyK<avx2::Q6_K>(panels, n_panels, x, out);
  }
}

}  // namespace avx512vnni
}  // namespace potluck
