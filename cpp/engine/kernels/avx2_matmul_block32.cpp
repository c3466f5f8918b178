// Blocks of 32 values of 4 and 5 bits on AVX2, up to 8 rows in one pass over a panel.
#include "engine/kernels/avx2_block32_types.h"

namespace potluck {
namespace avx2 {
namespace {

constexpr size_t kPrefetchBytes = 8192;

// Adds the products of vectors V and V + 4, which share their bytes, for R rows.
template <class Type, size_t R, int V>
inline void AddPair(__m256i (&sum)[R], const uint8_t* run, const uint8_t* x) {
  const __m256i lo = Codes<V>(Type(), run);
  const __m256i hi = Codes<V + 4>(Type(), run);
#pragma GCC unroll 8
  for (size_t t = 0; t < R; ++t) {
    sum[t] = AddProducts(sum[t], lo, Broadcast(x + (V * R + t) * 4));
    sum[t] = AddProducts(sum[t], hi, Broadcast(x + ((V + 4) * R + t) * 4));
  }
  POTLUCK_ORDER_LOADS();
}

// One panel times the R rows of a group, in one pass over the panel.
template <class Type, size_t R>
__attribute__((noinline)) void MultiplyNarrow(const PanelShape& shape, const uint8_t* panel,
                                              const uint8_t* data, const RowGroup& group,
                                              float* out, size_t out_stride) {
  const uint8_t* x = data + group.codes;
  const uint8_t* seeds = data + group.seeds;
  const float* scales = reinterpret_cast<const float*>(data + group.scales);
  const float* sums = reinterpret_cast<const float*>(data + group.sums);
  __m256 acc[R];
#pragma GCC unroll 8
  for (size_t t = 0; t < R; ++t) acc[t] = _mm256_setzero_ps();
  for (size_t b = 0; b < shape.blocks; b += shape.record_blocks, panel += shape.record_bytes) {
    const uint8_t* d = panel;
    const uint8_t* codes = panel + shape.codes_offset;
    for (size_t i = 0; i < shape.record_blocks; ++i) {
      for (size_t line = 0; line < Type::kRunBytes; line += 64)
        _mm_prefetch(reinterpret_cast<const char*>(codes + kPrefetchBytes + line), _MM_HINT_T0);
      __m256i sum[R];
#pragma GCC unroll 8
      for (size_t t = 0; t < R; ++t) sum[t] = BlockSeed<Type>(seeds + 4 * t);
      AddPair<Type, R, 0>(sum, codes, x);
      AddPair<Type, R, 1>(sum, codes, x);
      AddPair<Type, R, 2>(sum, codes, x);
      AddPair<Type, R, 3>(sum, codes, x);
      const __m256 dw = LoadHalves(d);
#pragma GCC unroll 8
      for (size_t t = 0; t < R; ++t) {
        acc[t] = _mm256_fmadd_ps(DotToFloat<Type>(sum[t], Uncentred<Type>(seeds + 4 * t)),
                                 _mm256_mul_ps(dw, _mm256_broadcast_ss(scales + t)), acc[t]);
      }
      if (Type::kHasMin) {
        const __m256 mw = LoadHalves(d + kScaleBytes * shape.record_blocks);
#pragma GCC unroll 8
        for (size_t t = 0; t < R; ++t)
          acc[t] = _mm256_fmadd_ps(mw, _mm256_broadcast_ss(sums + t), acc[t]);
      }
      d += kScaleBytes;
      codes += Type::kRunBytes;
      x += 32 * R;
      seeds += 4 * R;
      scales += R;
      sums += R;
    }
  }
#pragma GCC unroll 8
  for (size_t t = 0; t < R; ++t) _mm256_storeu_ps(out + t * out_stride, acc[t]);
}

template <class Type>
void MultiplyGroup(const PanelShape& shape, const uint8_t* panel, const uint8_t* data,
                   const RowGroup& group, float* out, size_t out_stride) {
  switch (group.rows) {
    case 1:
      return MultiplyNarrow<Type, 1>(shape, panel, data, group, out, out_stride);
    case 2:
      return MultiplyNarrow<Type, 2>(shape, panel, data, group, out, out_stride);
    case 3:
      return MultiplyNarrow<Type, 3>(shape, panel, data, group, out, out_stride);
    case 4:
      return MultiplyNarrow<Type, 4>(shape, panel, data, group, out, out_stride);
    case 5:
      return MultiplyNarrow<Type, 5>(shape, panel, data, group, out, out_stride);
    case 6:
      return MultiplyNarrow<Type, 6>(shape, panel, data, group, out, out_stride);
    case 7:
      return MultiplyNarrow<Type, 7>(shape, panel, data, group, out, out_stride);
    default:
      return MultiplyNarrow<Type, 8>(shape, panel, data, group, out, out_stride);
  }
}

template <class Type>
void MultiplyPanels(WeightType type, const uint8_t* panels, size_t n_panels, const PreparedRows& x,
                    float* out, size_t out_stride, uint8_t* scratch) {
  const PanelShape shape = ShapeOf<Type>(x.k);
  size_t p = 0;
  if (x.rows > kFewRows)
    p = MultiplyBlock32Pairs(type, panels, n_panels, x, out, out_stride, scratch);
  for (; p < n_panels; ++p) {
    for (size_t index = 0; index < GroupCount(x.grain, x.rows); ++index) {
      const RowGroup group = GroupAt(x.grain, x.rows, x.k, index);
      MultiplyGroup<Type>(shape, panels + p * shape.panel_bytes, x.data, group,
                          out + group.first * out_stride + 8 * p, out_stride);
    }
  }
}

}  // namespace

void MultiplyBlock32(WeightType type, const uint8_t* panels, size_t n_panels, const PreparedRows& x,
                     float* out, size_t out_stride, uint8_t* scratch) {
  switch (type) {
    case WeightType::kQ4_0:
      return MultiplyPanels<Q4_0>(type, panels, n_panels, x, out, out_stride, scratch);
    case WeightType::kQ4_1:
      return MultiplyPanels<Q4_1>(type, panels, n_panels, x, out, out_stride, scratch);
    case WeightType::kQ5_0:
      return MultiplyPanels<Q5_0>(type, panels, n_panels, x, out, out_stride, scratch);
    default:
      return MultiplyPanels<Q5_1>(type, panels, n_panels, x, out, out_stride, scratch);
  }
}

}  // namespace avx2
}  // namespace potluck
