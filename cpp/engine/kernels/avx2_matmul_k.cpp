// K types on AVX2, up to 8 rows in one pass over a panel: codes summed in int16 over a unit,
// widened by the madd with the sub-block's scale.
//
// Depths: a lane of a unit adds 16 products of codes up to 15 (30480), or 8 of codes up to 31
// (31496), or 8 of centred ones up to 32 (32512, from a seed). Over 256 values the int32 sum is at
// most 16 * 128 * 16 * 32 * 127 = 1.4e8.
#include "engine/kernels/avx2_k_types.h"

namespace potluck {
namespace avx2 {
namespace {

constexpr size_t kPrefetchBytes = 8192;

template <size_t R>
inline void AddVector(__m256i (&sum)[R], __m256i codes, const uint8_t* x) {
#pragma GCC unroll 8
  for (size_t t = 0; t < R; ++t) sum[t] = AddProducts(sum[t], codes, Broadcast(x + t * 4));
  POTLUCK_ORDER_LOADS();
}

template <size_t R>
inline void AddScaled(__m256i (&total)[R], const __m256i (&sum)[R], __m256i pairs) {
#pragma GCC unroll 8
  for (size_t t = 0; t < R; ++t) total[t] = _mm256_add_epi32(total[t], WidenPairs(sum[t], pairs));
}

template <class Type, size_t R>
inline void StartUnit(__m256i (&sum)[R], const uint8_t* seeds) {
#pragma GCC unroll 8
  for (size_t t = 0; t < R; ++t) sum[t] = UnitSeed<Type>(seeds + 4 * t);
}

// Adds 32 values of 8 rows, run `run` of a record, for R rows of activations.
template <class Type, size_t R>
inline void AddRun(__m256i (&total)[R], const uint8_t* codes, const SubScales& sub, size_t run,
                   const uint8_t* x, const uint8_t* seeds) {
  constexpr Type kType;
  __m256i sum[R];
  StartUnit<Type, R>(sum, seeds);
  AddVector<R>(sum, Codes<0>(kType, codes), x);
  AddVector<R>(sum, Codes<1>(kType, codes), x + 4 * R);
  AddVector<R>(sum, Codes<2>(kType, codes), x + 8 * R);
  AddVector<R>(sum, Codes<3>(kType, codes), x + 12 * R);
  if (Type::kUnitVectors == 4) {
    AddScaled<R>(total, sum, ScalePairs<Type>(sub, run, 0));
    StartUnit<Type, R>(sum, seeds + 4 * R);
  }
  AddVector<R>(sum, Codes<4>(kType, codes), x + 16 * R);
  AddVector<R>(sum, Codes<5>(kType, codes), x + 20 * R);
  AddVector<R>(sum, Codes<6>(kType, codes), x + 24 * R);
  AddVector<R>(sum, Codes<7>(kType, codes), x + 28 * R);
  AddScaled<R>(total, sum, ScalePairs<Type>(sub, run, Type::kUnitVectors == 4 ? 1 : 0));
}

template <class Type, size_t R>
inline void AddMins(__m256i (&mins)[R], const SubScales& sub, const uint8_t* sums) {
  for (size_t w = 0; w < 8; ++w) {
    const __m256i pairs = MinPairs<Type>(sub, w);
#pragma GCC unroll 8
    for (size_t t = 0; t < R; ++t) {
      const __m256i products = _mm256_madd_epi16(pairs, Broadcast(sums + 4 * (w * R + t)));
      mins[t] = _mm256_add_epi32(mins[t], products);
    }
  }
}

template <class Type, size_t R>
__attribute__((noinline)) void MultiplyNarrow(const uint8_t* record, size_t k, const uint8_t* data,
                                              const RowGroup& group, float* out,
                                              size_t out_stride) {
  const uint8_t* x = data + group.codes;
  const uint8_t* seeds = data + group.seeds;
  const uint8_t* sums = data + group.sums;
  const float* scales = reinterpret_cast<const float*>(data + group.scales);
  __m256 acc[R];
#pragma GCC unroll 8
  for (size_t t = 0; t < R; ++t) acc[t] = _mm256_setzero_ps();
  SubScales sub;
  for (size_t b = 0; b < k / 256; ++b, record += Type::kRecordBytes) {
    ReadSubScales(Type(), record + Type::kFields, sub);
    __m256i total[R], mins[R];
#pragma GCC unroll 8
    for (size_t t = 0; t < R; ++t) total[t] = mins[t] = _mm256_setzero_si256();
    const uint8_t* codes = record + Type::kRuns;
    for (size_t run = 0; run < 8; ++run, codes += Type::kRunBytes) {
      for (size_t line = 0; line < Type::kRecordBytes / 8; line += 64) {
        const uint8_t* ahead = record + kPrefetchBytes + run * (Type::kRecordBytes / 8) + line;
        _mm_prefetch(reinterpret_cast<const char*>(ahead), _MM_HINT_T0);
      }
      AddRun<Type, R>(total, codes, sub, run, x, seeds);
      x += 32 * R;
      seeds += 8 * R;
    }
    if (Type::kHasMin) AddMins<Type, R>(mins, sub, sums);
    const __m256 d = LoadHalves(record);
    const __m256 dmin = Type::kHasMin ? LoadHalves(record + kHalvesBytes) : d;
#pragma GCC unroll 8
    for (size_t t = 0; t < R; ++t)
      acc[t] = AddRecord<Type>(acc[t], total[t], mins[t], d, dmin, scales + t);
    scales += R;
    sums += 32 * R;
  }
#pragma GCC unroll 8
  for (size_t t = 0; t < R; ++t) _mm256_storeu_ps(out + t * out_stride, acc[t]);
}

template <class Type>
void MultiplyGroup(const uint8_t* panel, size_t k, const uint8_t* data, const RowGroup& group,
                   float* out, size_t out_stride) {
  switch (group.rows) {
    case 1:
      return MultiplyNarrow<Type, 1>(panel, k, data, group, out, out_stride);
    case 2:
      return MultiplyNarrow<Type, 2>(panel, k, data, group, out, out_stride);
    case 3:
      return MultiplyNarrow<Type, 3>(panel, k, data, group, out, out_stride);
    case 4:
      return MultiplyNarrow<Type, 4>(panel, k, data, group, out, out_stride);
    case 5:
      return MultiplyNarrow<Type, 5>(panel, k, data, group, out, out_stride);
    case 6:
      return MultiplyNarrow<Type, 6>(panel, k, data, group, out, out_stride);
    case 7:
      return MultiplyNarrow<Type, 7>(panel, k, data, group, out, out_stride);
    default:
      return MultiplyNarrow<Type, 8>(panel, k, data, group, out, out_stride);
  }
}

template <class Type>
void MultiplyPanels(WeightType type, const uint8_t* panels, size_t n_panels, const PreparedRows& x,
                    float* out, size_t out_stride, uint8_t* scratch) {
  const size_t panel_bytes = x.k / 256 * Type::kRecordBytes;
  size_t p = 0;
  if (x.rows > kFewRows) p = MultiplyKPairs(type, panels, n_panels, x, out, out_stride, scratch);
  for (; p < n_panels; ++p) {
    for (size_t index = 0; index < GroupCount(x.grain, x.rows); ++index) {
      const RowGroup group = GroupAt(x.grain, x.rows, x.k, index);
      MultiplyGroup<Type>(panels + p * panel_bytes, x.k, x.data, group,
                          out + group.first * out_stride + 8 * p, out_stride);
    }
  }
}

}  // namespace

void MultiplyK(WeightType type, const uint8_t* panels, size_t n_panels, const PreparedRows& x,
               float* out, size_t out_stride, uint8_t* scratch) {
  switch (type) {
    case WeightType::kQ2_K:
      return MultiplyPanels<Q2_K>(type, panels, n_panels, x, out, out_stride, scratch);
    case WeightType::kQ3_K:
      return MultiplyPanels<Q3_K>(type, panels, n_panels, x, out, out_stride, scratch);
    case WeightType::kQ4_K:
      return MultiplyPanels<Q4_K>(type, panels, n_panels, x, out, out_stride, scratch);
    case WeightType::kQ5_K:
      return MultiplyPanels<Q5_K>(type, panels, n_panels, x, out, out_stride, scratch);
    default:
      return MultiplyPanels<Q6_K>(type, panels, n_panels, x, out, out_stride, scratch);
  }
}

}  // namespace avx2
}  // namespace potluck
