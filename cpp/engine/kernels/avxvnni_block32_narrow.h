// Blocks of 32 values by dpbusd on vectors of 8 rows: up to 8 rows in one pass over a panel.
//
// Every function here has internal linkage: see matmul_table.h.
#pragma once

#include "engine/kernels/avx2_block32_types.h"
#include "engine/kernels/avxvnni_matmul.h"

namespace potluck {
namespace avxvnni {
namespace {

using avx2::kScaleBytes;
using avx2::PanelShape;
using avx2::ShapeOf;

struct Q8_0 : avx2::Block32<false, 256, 128> {};

template <size_t G, class Type>
inline __m256i CodesOf(Type type, const uint8_t* run) {
  return avx2::Codes<G>(type, run);
}
template <size_t G>
inline __m256i CodesOf(Q8_0 /*type*/, const uint8_t* run) {
  return _mm256_xor_si256(Load(run + 32 * G), _mm256_set1_epi8(-128));
}

// The start of a block's sum: minus the centre times the sum of the activations, of which prepared
// seeds hold -8 times in two halves.
template <class Type>
inline __m256i Start(const uint8_t* seed) {
#if defined(POTLUCK_MUTATION_SEED)
  return seed == nullptr ? _mm256_set1_epi32(1) : _mm256_setzero_si256();  // for tests to catch
#else
  if (Type::kHasMin) return _mm256_setzero_si256();
  return _mm256_madd_epi16(Broadcast(seed), _mm256_set1_epi16(Type::kCentre / 8));
#endif
}

// One panel times the R rows of a group, in one pass over the panel.
template <class Type, size_t R>
__attribute__((noinline)) void MultiplyNarrow(const PanelShape& shape, const uint8_t* panel,
                                              const uint8_t* data, const RowGroup& group,
                                              float* out, size_t out_stride) {
  constexpr Type kType;
  const uint8_t* x = data + group.codes;
  const uint8_t* seeds = data + group.seeds;
  const float* scales = reinterpret_cast<const float*>(data + group.scales);
  const float* sums = reinterpret_cast<const float*>(data + group.sums);
  __m256 acc[R];
#pragma GCC unroll 8
  for (size_t t = 0; t < R; ++t) acc[t] = _mm256_setzero_ps();
  for (size_t b = 0; b < shape.blocks; b += shape.record_blocks, panel += shape.record_bytes) {
    const uint8_t* d = panel;
    const uint8_t* run = panel + shape.codes_offset;
    for (size_t i = 0; i < shape.record_blocks; ++i, d += kScaleBytes, run += Type::kRunBytes) {
      for (size_t line = 0; line < Type::kRunBytes; line += 64)
        _mm_prefetch(reinterpret_cast<const char*>(run + kNarrowPrefetchBytes + line), _MM_HINT_T0);
      __m256i sum[R];
#pragma GCC unroll 8
      for (size_t t = 0; t < R; ++t) sum[t] = Start<Type>(seeds + 4 * t);
      AddWord<R>(sum, CodesOf<0>(kType, run), x);
      AddWord<R>(sum, CodesOf<1>(kType, run), x + 4 * R);
      AddWord<R>(sum, CodesOf<2>(kType, run), x + 8 * R);
      AddWord<R>(sum, CodesOf<3>(kType, run), x + 12 * R);
      AddWord<R>(sum, CodesOf<4>(kType, run), x + 16 * R);
      AddWord<R>(sum, CodesOf<5>(kType, run), x + 20 * R);
      AddWord<R>(sum, CodesOf<6>(kType, run), x + 24 * R);
      AddWord<R>(sum, CodesOf<7>(kType, run), x + 28 * R);
      const __m256 dw = LoadHalves(d);
      const __m256 mw = Type::kHasMin ? LoadHalves(d + kScaleBytes * shape.record_blocks) : dw;
#pragma GCC unroll 8
      for (size_t t = 0; t < R; ++t) {
        const __m256 scale = _mm256_mul_ps(dw, _mm256_broadcast_ss(scales + t));
        acc[t] = _mm256_fmadd_ps(_mm256_cvtepi32_ps(sum[t]), scale, acc[t]);
        if (Type::kHasMin) acc[t] = _mm256_fmadd_ps(mw, _mm256_broadcast_ss(sums + t), acc[t]);
      }
      x += 32 * R;
      seeds += 4 * R;
      scales += R;
      sums += R;
    }
  }
#pragma GCC unroll 8
  for (size_t t = 0; t < R; ++t) _mm256_storeu_ps(out + t * out_stride, acc[t]);
}

}  // namespace
}  // namespace avxvnni
}  // namespace potluck
