// K types on AVX-512 VNNI, up to 8 rows: one pass over two panels at once, one in each half of a
// vector.
#include "engine/kernels/avx512vnni_k_types.h"
#include "engine/kernels/avx512vnni_prefetch.h"

namespace potluck {
namespace avx512vnni {
namespace {

template <size_t R>
inline void AddWord(__m512i (&sum)[R], __m512i w, const uint8_t* x) {
#pragma GCC unroll 8
  for (size_t t = 0; t < R; ++t) sum[t] = _mm512_dpbusd_epi32(sum[t], w, Broadcast(x + 4 * t));
}

template <size_t R>
inline void Clear(__m512i (&sum)[R]) {
#pragma GCC unroll 8
  for (size_t t = 0; t < R; ++t) sum[t] = _mm512_setzero_si512();
}

template <size_t R>
inline void AddScaled(__m512i (&total)[R], const __m512i (&sum)[R], __m512i scales) {
#pragma GCC unroll 8
  for (size_t t = 0; t < R; ++t)
    total[t] = _mm512_add_epi32(total[t], _mm512_mullo_epi32(sum[t], scales));
}

// Adds 32 values of 16 rows of weights, run `run` of two records.
template <class Type, size_t R>
inline void AddRun(__m512i (&total)[R], const uint8_t* codes, size_t apart, const SubScales& sub,
                   size_t run, const uint8_t* x) {
  constexpr Type kType;
  __m512i sum[R];
  Clear<R>(sum);
  AddWord<R>(sum, Codes<0>(kType, codes, apart), x);
  AddWord<R>(sum, Codes<1>(kType, codes, apart), x + 4 * R);
  AddWord<R>(sum, Codes<2>(kType, codes, apart), x + 8 * R);
  AddWord<R>(sum, Codes<3>(kType, codes, apart), x + 12 * R);
  if (!Type::kHasScalesOf32) {
    AddScaled<R>(total, sum, ScaleWords(sub, 2 * run));
    Clear<R>(sum);
  }
  AddWord<R>(sum, Codes<4>(kType, codes, apart), x + 16 * R);
  AddWord<R>(sum, Codes<5>(kType, codes, apart), x + 20 * R);
  AddWord<R>(sum, Codes<6>(kType, codes, apart), x + 24 * R);
  AddWord<R>(sum, Codes<7>(kType, codes, apart), x + 28 * R);
  AddScaled<R>(total, sum, ScaleWords(sub, Type::kHasScalesOf32 ? run : 2 * run + 1));
}

// Two panels times the R rows of a group.
template <class Type, size_t R>
__attribute__((noinline)) void MultiplyTwo(const uint8_t* record, size_t k, const uint8_t* data,
                                           const RowGroup& group, float* out, size_t out_stride) {
  const size_t apart = k / 256 * Type::kRecordBytes;
  const uint8_t* x = data + group.codes;
  const uint8_t* sums = data + group.sums;
  const float* scales = reinterpret_cast<const float*>(data + group.scales);
  Prefetch prefetch(record, apart, Type::kRecordBytes / 8);
  __m512 acc[R];
#pragma GCC unroll 8
  for (size_t t = 0; t < R; ++t) acc[t] = _mm512_setzero_ps();
  SubScales sub;
  for (size_t b = 0; b < k / 256; ++b, record += Type::kRecordBytes) {
    ReadSubScales(Type(), record + Type::kFields, apart, sub);
    __m512i total[R], taken[R];
    Clear<R>(total);
    const uint8_t* codes = record + Type::kRuns;
    for (size_t run = 0; run < 8; ++run, codes += Type::kRunBytes, x += 32 * R) {
      prefetch.NextBlock();
      AddRun<Type, R>(total, codes, apart, sub, run, x);
    }
    Clear<R>(taken);
    for (size_t w = 0; w < 8; ++w, sums += 4 * R) {
      const __m512i factors = FactorPairs<Type>(sub, w);
#pragma GCC unroll 8
      for (size_t t = 0; t < R; ++t)
        taken[t] = _mm512_dpwssd_epi32(taken[t], factors, Broadcast(sums + 4 * t));
    }
    const __m512 d = LoadTwoScales(record, record + apart);
    const uint8_t* min = record + kScaleBytes;
    const __m512 dmin = Type::kHasMin ? LoadTwoScales(min, min + apart) : d;
#pragma GCC unroll 8
    for (size_t t = 0; t < R; ++t)
      acc[t] = AddRecord<Type>(acc[t], total[t], taken[t], d, dmin, scales + t);
    scales += R;
  }
#pragma GCC unroll 8
  for (size_t t = 0; t < R; ++t) _mm512_storeu_ps(out + t * out_stride, acc[t]);
}

template <class Type>
void MultiplyGroup(const uint8_t* panel, size_t k, const uint8_t* data, const RowGroup& group,
                   float* out, size_t out_stride) {
  switch (group.rows) {
    case 1:
      return MultiplyTwo<Type, 1>(panel, k, data, group, out, out_stride);
    case 2:
      return MultiplyTwo<Type, 2>(panel, k, data, group, out, out_stride);
    case 3:
      return MultiplyTwo<Type, 3>(panel, k, data, group, out, out_stride);
    case 4:
      return MultiplyTwo<Type, 4>(panel, k, data, group, out, out_stride);
    case 5:
      return MultiplyTwo<Type, 5>(panel, k, data, group, out, out_stride);
    case 6:
      return MultiplyTwo<Type, 6>(panel, k, data, group, out, out_stride);
    case 7:
      return MultiplyTwo<Type, 7>(panel, k, data, group, out, out_stride);
    default:
      return MultiplyTwo<Type, 8>(panel, k, data, group, out, out_stride);
  }
}

template <class Type>
size_t MultiplyAll(const uint8_t* panels, size_t p, size_t n_panels, const PreparedRows& x,
                   float* out, size_t out_stride) {
  const size_t panel_bytes = x.k / 256 * Type::kRecordBytes;
  for (; p + 2 <= n_panels; p += 2) {
    for (size_t index = 0; index < GroupCount(x.grain, x.rows); ++index) {
      const RowGroup group = GroupAt(x.grain, x.rows, x.k, index);
      MultiplyGroup<Type>(panels + p * panel_bytes, x.k, x.data, group,
                          out + group.first * out_stride + 8 * p, out_stride);
    }
  }
  return p;
}

}  // namespace

size_t MultiplyKTwos(WeightType type, const uint8_t* panels, size_t p, size_t n_panels,
                     const PreparedRows& x, float* out, size_t out_stride) {
  switch (type) {
    case WeightType::kQ2_K:
      return MultiplyAll<Q2_K>(panels, p, n_panels, x, out, out_stride);
    case WeightType::kQ3_K:
      return MultiplyAll<Q3_K>(panels, p, n_panels, x, out, out_stride);
    case WeightType::kQ4_K:
      return MultiplyAll<Q4_K>(panels, p, n_panels, x, out, out_stride);
    case WeightType::kQ5_K:
      return MultiplyAll<Q5_K>(panels, p, n_panels, x, out, out_stride);
    default:
      return MultiplyAll<Q6_K>(panels, p, n_panels, x, out, out_stride);
  }
}

}  // namespace avx512vnni
}  // namespace potluck
