// K types on plain ARMv8-A. Depths: neon_sums.h.
#include "engine/kernels/neon_k_tiles.h"
#include "engine/kernels/neon_matmul.h"
#include "engine/kernels/neon_sums.h"

namespace potluck {
namespace neon {
namespace {

struct Isa {
  template <class Type, size_t R, size_t H>
  using Sums = LaneSums<Type, R, H, Type::kUnitValues>;
};

template <class Type>
void MultiplyPanels(const uint8_t* panels, size_t n_panels, const PreparedRows& x, float* out,
                    size_t out_stride, uint8_t* scratch) {
  if (x.rows <= kFewRows)
    return arm::MultiplyFewRowsK<Isa, Type>(panels, n_panels, x, out, out_stride);
  arm::MultiplyBands(arm::RecordTiles<Isa, Type>(x.k, scratch), panels, n_panels, x, out,
                     out_stride);
}

}  // namespace

void MultiplyK(WeightType type, const uint8_t* panels, size_t n_panels, const PreparedRows& x,
               float* out, size_t out_stride, uint8_t* scratch) {
  switch (type) {
    case WeightType::kQ2_K:
      return MultiplyPanels<arm::Q2_K>(panels, n_panels, x, out, out_stride, scratch);
    case WeightType::kQ3_K:
      return MultiplyPanels<arm::Q3_K>(panels, n_panels, x, out, out_stride, scratch);
    case WeightType::kQ4_K:
      return MultiplyPanels<arm::Q4_K>(panels, n_panels, x, out, out_stride, scratch);
    case WeightType::kQ5_K:
      return MultiplyPanels<arm::Q5_K>(panels, n_panels, x, out, out_stride, scratch);
    default:
      return MultiplyPanels<arm::Q6_K>(panels, n_panels, x, out, out_stride, scratch);
  }
}

}  // namespace neon
}  // namespace potluck
