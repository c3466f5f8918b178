// How AVX-512 VNNI reads blocks of 32 values: Q4_0, Q4_1, Q5_0, Q5_1, Q8_0.
//
// dpbusd adds four products of unsigned and signed bytes to an int32, so there is no depth to
// watch. The dot of unsigned codes exceeds the centred one by the centre times the sum of the
// activations, which a sum starts with; prepared seeds hold -8 times that sum in two halves, so one
// madd makes any multiple of it.
//
// Every function here has internal linkage: see matmul_table.h.
#pragma once

#include "engine/kernels/avx512vnni_codes.h"

namespace potluck {
namespace avx512vnni {
namespace {

template <bool HasMin, size_t RunBytes, short Centre>
struct Block32 {
  static constexpr bool kHasMin = HasMin;
  static constexpr size_t kRunBytes = RunBytes;
  static constexpr short kSeedFactor = Centre / 8;
};
struct Q4_0 : Block32<false, 128, 8> {};
struct Q4_1 : Block32<true, 128, 0> {};
struct Q5_0 : Block32<false, 160, 16> {};
struct Q5_1 : Block32<true, 160, 0> {};
struct Q8_0 : Block32<false, 256, 128> {};

// Unsigned codes of k = 4G..4G+3 of a block of two panels.
template <size_t G, class Type>
inline __m512i Codes(Type /*type*/, const uint8_t* run, size_t apart) {
  if (Type::kRunBytes == 128) return Nibbles<G>(run, apart);
  const __m512i plane = LoadTwo(run + 128, run + apart + 128);
  return _mm512_or_si512(Nibbles<G>(run, apart), PlaneBit<G, 4>(plane));
}
template <size_t G>
inline __m512i Codes(Q8_0 /*type*/, const uint8_t* run, size_t apart) {
  const __m512i codes = LoadTwo(run + 32 * G, run + apart + 32 * G);
  return _mm512_xor_si512(codes, _mm512_set1_epi8(-128));
}

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
  const size_t record_bytes = codes_offset + g * Type::kRunBytes;
  return {k / 32, g, record_bytes, codes_offset, k / 32 / g * record_bytes};
}

#if defined(POTLUCK_MUTATION_SEED)  // dropped, for tests to catch
template <class Type>
inline __m512i SeedOf(__m512i /*pairs*/) {
  return _mm512_setzero_si512();
}
#else
// The starts of sums from prepared seeds.
template <class Type>
inline __m512i SeedOf(__m512i pairs) {
  if (Type::kSeedFactor == 0) return _mm512_setzero_si512();
  return _mm512_madd_epi16(pairs, _mm512_set1_epi16(Type::kSeedFactor));
}
#endif

// The start of a sum, one row of activations in all lanes.
template <class Type>
inline __m512i Seed(const uint8_t* at) {
  return SeedOf<Type>(Broadcast(at));
}

// The starts of `count` sums, words of prepared seeds, as int32.
template <class Type>
inline void ReadStarts(const uint8_t* seeds, size_t count, int32_t* starts) {
  for (size_t i = 0; i < count; i += 16) {
    const __mmask16 mask =
        static_cast<__mmask16>(count - i < 16 ? (1u << (count - i)) - 1 : 0xffff);
    const __m512i pairs = _mm512_maskz_loadu_epi32(mask, seeds + 4 * i);
    _mm512_store_si512(starts + i, SeedOf<Type>(pairs));
  }
}

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
