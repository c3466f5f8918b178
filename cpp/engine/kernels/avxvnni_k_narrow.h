// K types by dpbusd on vectors of 8 rows: up to 8 rows in one pass over a panel.
//
// A sub-block's dot is one int32, times its scale; what centres and mins take away is a sum over
// pairs of sub-blocks (as in avx512vnni_k_types.h). Every function here has internal linkage: see
// matmul_table.h.
#pragma once

#include "engine/kernels/avx2_k_types.h"
#include "engine/kernels/avxvnni_matmul.h"

namespace potluck {
namespace avxvnni {
namespace {

using avx2::kHalvesBytes;
using avx2::SubScales;

// Groups of 4 values in a sub-block, and how many sub-blocks a run of 32 has.
template <class Type>
constexpr size_t kWords = Type::kHasScalesOf32 ? 8 : 4;
template <class Type>
constexpr size_t kSubBlocksOfRun = 8 / kWords<Type>;

// Scales of a sub-block, int32 in the lanes of their rows.
inline __m256i ScaleWords(const SubScales& sub, size_t sub_block) {
  const uint8_t* at = sub.scales + 8 * sub_block;
  return _mm256_cvtepi8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(at)));
}

// Mins, or scales where there is a centre, of sub-blocks 2w and 2w + 1 of 16 values, as pairs of
// int16.
template <class Type>
inline __m256i FactorPairs(const SubScales& sub, size_t w) {
  static_assert(Type::kHasMin != Type::kHasSeeds, "every type has mins or a centre");
  if (Type::kHasMin) return avx2::MinPairs<Type>(sub, w);
  const __m128i even = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(sub.scales + 16 * w));
  const __m128i odd = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(sub.scales + 16 * w + 8));
  return _mm256_cvtepi8_epi16(_mm_unpacklo_epi8(even, odd));
}

// The total of centred codes; the centre is 32, or 4 (Q3_K).
template <class Type>
inline __m256i Centred(__m256i total, [[maybe_unused]] __m256i taken) {
#if defined(POTLUCK_MUTATION_SEED)
  return total;  // dropped, for tests to catch
#else
  if (!Type::kHasSeeds) return total;
  return _mm256_sub_epi32(total, _mm256_slli_epi32(taken, 5 - Type::kSeedShift));
#endif
}

// acc after one record of the canonical chain; `taken` as FactorPairs says.
template <class Type>
inline __m256 AddTotals(__m256 acc, __m256i total, __m256i taken, __m256 d, __m256 dmin,
                        const float* da) {
  return avx2::AddRecord<Type>(acc, Centred<Type>(total, taken), taken, d, dmin, da);
}

// Adds 32 values of 8 rows, run `run` of a record, for R rows of activations.
template <class Type, size_t R>
inline void AddRun(__m256i (&total)[R], const uint8_t* codes, const SubScales& sub, size_t run,
                   const uint8_t* x) {
  constexpr Type kType;
  __m256i sum[R];
  const auto start = [&sum] {
#pragma GCC unroll 8
    for (size_t t = 0; t < R; ++t) sum[t] = _mm256_setzero_si256();
  };
  const auto finish = [&](size_t sub_block) {
    const __m256i scales = ScaleWords(sub, sub_block);
#pragma GCC unroll 8
    for (size_t t = 0; t < R; ++t)
      total[t] = _mm256_add_epi32(total[t], _mm256_mullo_epi32(sum[t], scales));
  };
  start();
  AddWord<R>(sum, avx2::Codes<0>(kType, codes), x);
  AddWord<R>(sum, avx2::Codes<1>(kType, codes), x + 4 * R);
  AddWord<R>(sum, avx2::Codes<2>(kType, codes), x + 8 * R);
  AddWord<R>(sum, avx2::Codes<3>(kType, codes), x + 12 * R);
  if (!Type::kHasScalesOf32) {
    finish(2 * run);
    start();
  }
  AddWord<R>(sum, avx2::Codes<4>(kType, codes), x + 16 * R);
  AddWord<R>(sum, avx2::Codes<5>(kType, codes), x + 20 * R);
  AddWord<R>(sum, avx2::Codes<6>(kType, codes), x + 24 * R);
  AddWord<R>(sum, avx2::Codes<7>(kType, codes), x + 28 * R);
  finish(Type::kHasScalesOf32 ? run : 2 * run + 1);
}

template <class Type, size_t R>
__attribute__((noinline)) void MultiplyNarrow(const uint8_t* record, size_t k, const uint8_t* data,
                                              const RowGroup& group, float* out,
                                              size_t out_stride) {
  const uint8_t* x = data + group.codes;
  const uint8_t* sums = data + group.sums;
  const float* da = reinterpret_cast<const float*>(data + group.scales);
  __m256 acc[R];
#pragma GCC unroll 8
  for (size_t t = 0; t < R; ++t) acc[t] = _mm256_setzero_ps();
  SubScales sub;
  for (size_t b = 0; b < k / 256; ++b, record += Type::kRecordBytes, da += R) {
    avx2::ReadSubScales(Type(), record + Type::kFields, sub);
    __m256i total[R], taken[R];
#pragma GCC unroll 8
    for (size_t t = 0; t < R; ++t) total[t] = taken[t] = _mm256_setzero_si256();
    const uint8_t* codes = record + Type::kRuns;
    for (size_t run = 0; run < 8; ++run, codes += Type::kRunBytes, x += 32 * R) {
      for (size_t line = 0; line < Type::kRecordBytes / 8; line += 64) {
        const uint8_t* ahead = record + kFarPrefetchBytes + run * (Type::kRecordBytes / 8) + line;
        _mm_prefetch(reinterpret_cast<const char*>(ahead), _MM_HINT_T0);
      }
      AddRun<Type, R>(total, codes, sub, run, x);
    }
    for (size_t w = 0; w < 8; ++w, sums += 4 * R) {
      const __m256i factors = FactorPairs<Type>(sub, w);
#pragma GCC unroll 8
      for (size_t t = 0; t < R; ++t)
        taken[t] = AddPairs(taken[t], factors, Broadcast(sums + 4 * t));
    }
    const __m256 d = LoadHalves(record);
    const __m256 dmin = Type::kHasMin ? LoadHalves(record + kHalvesBytes) : d;
#pragma GCC unroll 8
    for (size_t t = 0; t < R; ++t)
      acc[t] = AddTotals<Type>(acc[t], total[t], taken[t], d, dmin, da + t);
  }
#pragma GCC unroll 8
  for (size_t t = 0; t < R; ++t) _mm256_storeu_ps(out + t * out_stride, acc[t]);
}

}  // namespace
}  // namespace avxvnni
}  // namespace potluck
