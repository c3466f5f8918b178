// What the AVX-512 VNNI matrix kernels share. Every function here has internal linkage: see
// matmul_table.h.
#pragma once

#include <immintrin.h>

#include "engine/kernels/matmul_table.h"
#include "engine/pack.h"

namespace potluck {
namespace avx512vnni {

// One translation unit each. Panels [p, n_panels) times all rows; both return the first panel they
// left out.
size_t MultiplyFours(WeightType type, const uint8_t* panels, size_t n_panels, const PreparedRows& x,
                     float* out, size_t out_stride, uint8_t* scratch);
size_t MultiplyTwos(WeightType type, const uint8_t* panels, size_t p, size_t n_panels,
                    const PreparedRows& x, float* out, size_t out_stride);

namespace {

constexpr size_t kScaleBytes = 16;  // f16 of 8 rows

// A weight type: how its blocks lie in a panel, and how to get unsigned codes out of them. The dot
// of unsigned codes exceeds the centred one by kCentre * (sum of the activations), which a sum
// starts with; prepared seeds hold -8 times that sum in two halves, so one madd makes any multiple
// of it.
struct Q4_0 {
  static constexpr bool kHasMin = false;
  static constexpr short kSeedFactor = 1;  // centre 8
  static constexpr size_t kCodeBytes = 128;
};
struct Q4_1 {
  static constexpr bool kHasMin = true;
  static constexpr short kSeedFactor = 0;
  static constexpr size_t kCodeBytes = 128;
};
struct Q8_0 {
  static constexpr bool kHasMin = false;
  static constexpr short kSeedFactor = 16;  // code + 128
  static constexpr size_t kCodeBytes = 256;
};

// Where the blocks of a panel lie.
struct PanelShape {
  size_t blocks;  // of a row
  size_t record_blocks;
  size_t record_bytes;
  size_t codes_offset;  // in a record
  size_t panel_bytes;
};

template <class Type>
PanelShape ShapeOf(size_t k) {
  const size_t g = RecordBlocks(k);
  const size_t codes_offset = (Type::kHasMin ? 2 : 1) * kScaleBytes * g;
  const size_t record_bytes = codes_offset + g * Type::kCodeBytes;
  return {k / 32, g, record_bytes, codes_offset, k / 32 / g * record_bytes};
}

[[maybe_unused]] inline __m512i Broadcast(const uint8_t* at) {
  int word = 0;
  __builtin_memcpy(&word, at, sizeof word);
  return _mm512_set1_epi32(word);
}

#if defined(POTLUCK_MUTATION_SEED)  // dropped, for tests to catch
template <class Type>
inline __m512i Seed(const uint8_t* /*at*/) {
  return _mm512_setzero_si512();
}
#else
// The start of a sum, one row of activations in all lanes.
template <class Type>
inline __m512i Seed(const uint8_t* at) {
  if (Type::kSeedFactor == 0) return _mm512_setzero_si512();
  return _mm512_madd_epi16(Broadcast(at), _mm512_set1_epi16(Type::kSeedFactor));
}
#endif

// acc + (sum as float) * (d * da), then + m * dsum: one step of the canonical chain, for 16 rows of
// weights.
template <class Type>
inline __m512 AddBlock(__m512 acc, __m512i sum, __m512 d, __m512 m, const float* da,
                       const float* dsum) {
  acc = _mm512_fmadd_ps(_mm512_cvtepi32_ps(sum), _mm512_mul_ps(d, _mm512_set1_ps(*da)), acc);
  return Type::kHasMin ? _mm512_fmadd_ps(m, _mm512_set1_ps(*dsum), acc) : acc;
}

}  // namespace
}  // namespace avx512vnni
}  // namespace potluck
