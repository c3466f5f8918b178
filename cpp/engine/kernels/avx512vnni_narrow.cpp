// Up to 8 rows on AVX-512 VNNI: one pass over two panels at once, one in each half of a vector.
#include "engine/kernels/avx512vnni_block32_types.h"
#include "engine/kernels/avx512vnni_prefetch.h"

namespace potluck {
namespace avx512vnni {
namespace {

template <size_t R>
inline void AddWord(__m512i (&sum)[R], __m512i w, const uint8_t* x) {
#pragma GCC unroll 8
  for (size_t t = 0; t < R; ++t) sum[t] = _mm512_dpbusd_epi32(sum[t], w, Broadcast(x + 4 * t));
}

// Adds 32 values of 16 rows of weights.
template <class Type, size_t R>
inline void AddCodes(__m512i (&sum)[R], const uint8_t* run, size_t apart, const uint8_t* x) {
  constexpr Type kType;
  AddWord<R>(sum, Codes<0>(kType, run, apart), x);
  AddWord<R>(sum, Codes<1>(kType, run, apart), x + 4 * R);
  AddWord<R>(sum, Codes<2>(kType, run, apart), x + 8 * R);
  AddWord<R>(sum, Codes<3>(kType, run, apart), x + 12 * R);
  AddWord<R>(sum, Codes<4>(kType, run, apart), x + 16 * R);
  AddWord<R>(sum, Codes<5>(kType, run, apart), x + 20 * R);
  AddWord<R>(sum, Codes<6>(kType, run, apart), x + 24 * R);
  AddWord<R>(sum, Codes<7>(kType, run, apart), x + 28 * R);
}

// Two panels times the R rows of a group.
template <class Type, size_t R>
__attribute__((noinline)) void MultiplyTwo(const PanelShape& shape, const uint8_t* panel,
                                           const uint8_t* data, const RowGroup& group, float* out,
                                           size_t out_stride) {
  const size_t apart = shape.panel_bytes;
  const uint8_t* x = data + group.codes;
  const uint8_t* seeds = data + group.seeds;
  const float* scales = reinterpret_cast<const float*>(data + group.scales);
  const float* sums = reinterpret_cast<const float*>(data + group.sums);
  Prefetch prefetch(panel, shape.panel_bytes, shape.record_bytes / shape.record_blocks);
  __m512 acc[R];
#pragma GCC unroll 8
  for (size_t t = 0; t < R; ++t) acc[t] = _mm512_setzero_ps();
  for (size_t b = 0; b < shape.blocks; b += shape.record_blocks, panel += shape.record_bytes) {
    const uint8_t* d = panel;
    const uint8_t* codes = panel + shape.codes_offset;
    for (size_t i = 0; i < shape.record_blocks; ++i) {
      prefetch.NextBlock();
      __m512i sum[R];
#pragma GCC unroll 8
      for (size_t t = 0; t < R; ++t) sum[t] = Seed<Type>(seeds + 4 * t);
      AddCodes<Type, R>(sum, codes, apart, x);
      const __m512 dw = LoadTwoScales(d, d + apart);
      const uint8_t* min = d + kScaleBytes * shape.record_blocks;
      const __m512 mw = Type::kHasMin ? LoadTwoScales(min, min + apart) : dw;
#pragma GCC unroll 8
      for (size_t t = 0; t < R; ++t)
        acc[t] = AddBlock<Type>(acc[t], sum[t], dw, mw, scales + t, sums + t);
      d += kScaleBytes;
      codes += Type::kRunBytes;
      x += 32 * R;
      seeds += 4 * R;
      scales += R;
      sums += R;
    }
  }
#pragma GCC unroll 8
  for (size_t t = 0; t < R; ++t) _mm512_storeu_ps(out + t * out_stride, acc[t]);
}

template <class Type>
void MultiplyGroup(const PanelShape& shape, const uint8_t* panel, const uint8_t* data,
                   const RowGroup& group, float* out, size_t out_stride) {
  switch (group.rows) {
    case 1:
      return MultiplyTwo<Type, 1>(shape, panel, data, group, out, out_stride);
    case 2:
      return MultiplyTwo<Type, 2>(shape, panel, data, group, out, out_stride);
    case 3:
      return MultiplyTwo<Type, 3>(shape, panel, data, group, out, out_stride);
    case 4:
      return MultiplyTwo<Type, 4>(shape, panel, data, group, out, out_stride);
    case 5:
      return MultiplyTwo<Type, 5>(shape, panel, data, group, out, out_stride);
    case 6:
      return MultiplyTwo<Type, 6>(shape, panel, data, group, out, out_stride);
    case 7:
      return MultiplyTwo<Type, 7>(shape, panel, data, group, out, out_stride);
    default:
      return MultiplyTwo<Type, 8>(shape, panel, data, group, out, out_stride);
  }
}

template <class Type>
size_t MultiplyAll(const uint8_t* panels, size_t p, size_t n_panels, const PreparedRows& x,
                   float* out, size_t out_stride) {
  const PanelShape shape = ShapeOf<Type>(x.k);
  for (; p + 2 <= n_panels; p += 2) {
    for (size_t index = 0; index < GroupCount(x.grain, x.rows); ++index) {
      const RowGroup group = GroupAt(x.grain, x.rows, x.k, index);
      MultiplyGroup<Type>(shape, panels + p * shape.panel_bytes, x.data, group,
                          out + group.first * out_stride + 8 * p, out_stride);
    }
  }
  return p;
}

}  // namespace

size_t MultiplyTwos(WeightType type, const uint8_t* panels, size_t p, size_t n_panels,
                    const PreparedRows& x, float* out, size_t out_stride) {
  switch (type) {
    case WeightType::kQ4_0:
      return MultiplyAll<Q4_0>(panels, p, n_panels, x, out, out_stride);
    case WeightType::kQ4_1:
      return MultiplyAll<Q4_1>(panels, p, n_panels, x, out, out_stride);
    case WeightType::kQ5_0:
      return MultiplyAll<Q5_0>(panels, p, n_panels, x, out, out_stride);
    case WeightType::kQ5_1:
      return MultiplyAll<Q5_1>(panels, p, n_panels, x, out, out_stride);
    default:
      return MultiplyAll<Q8_0>(panels, p, n_panels, x, out, out_stride);
  }
}

}  // namespace avx512vnni
}  // namespace potluck
