// Blocks of 32 values on ARM with dot products.
#include "engine/kernels/dotprod_matmul.h"
#include "engine/kernels/dotprod_sums.h"
#include "engine/kernels/neon_tiles.h"

namespace potluck {
namespace dotprod {
namespace {

template <class Type>
void MultiplyPanels(const uint8_t* panels, size_t n_panels, const PreparedRows& x, float* out,
                    size_t out_stride, uint8_t* scratch) {
  if (x.rows <= kFewRows)
    return arm::MultiplyFewRows<Isa, Type>(panels, n_panels, x, out, out_stride);
  arm::MultiplyBands(arm::BlockTiles<Isa, Type>(x.k, scratch), panels, n_panels, x, out,
                     out_stride);
}

}  // namespace

void MultiplyBlock32(WeightType type, const uint8_t* panels, size_t n_panels, const PreparedRows& x,
                     float* out, size_t out_stride, uint8_t* scratch) {
  switch (type) {
    case WeightType::kQ4_0:
      return MultiplyPanels<arm::Q4_0>(panels, n_panels, x, out, out_stride, scratch);
    case WeightType::kQ4_1:
      return MultiplyPanels<arm::Q4_1>(panels, n_panels, x, out, out_stride, scratch);
    case WeightType::kQ5_0:
      return MultiplyPanels<arm::Q5_0>(panels, n_panels, x, out, out_stride, scratch);
    case WeightType::kQ5_1:
      return MultiplyPanels<arm::Q5_1>(panels, n_panels, x, out, out_stride, scratch);
    default:
      return MultiplyPanels<arm::Q8_0>(panels, n_panels, x, out, out_stride, scratch);
  }
}

}  // namespace dotprod
}  // namespace potluck
