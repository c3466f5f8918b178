// How AVX2 reads blocks of 32 values of 4 and 5 bits: Q4_0, Q4_1, Q5_0, Q5_1.
//
// Depth of the int16 sums, 16 products a lane, one widening a block. Q4_1 as it is: 8 maddubs of at
// most 2 * 15 * 127, 30480. Q4_0 starts from the seed -8 * (sum of the lane's activations): the
// final lane is the centred sum, at most 16 * 8 * 127 = 16256, and what wraps on the way wraps
// back. Q5_0 the same with 16: 32512. Q5_1 too, and 16 * (sum of the activations) is added as an
// int32.
//
// Every function here has internal linkage: see matmul_table.h.
#pragma once

#include "engine/kernels/avx2_codes.h"
#include "engine/pack.h"

namespace potluck {
namespace avx2 {
namespace {

constexpr size_t kScaleBytes = 16;  // f16 of 8 rows

template <bool HasMin, size_t RunBytes, short Centre>
struct Block32 {
  static constexpr bool kHasMin = HasMin;
  static constexpr size_t kRunBytes = RunBytes;
  static constexpr short kCentre = Centre;  // 0: no seed
};
struct Q4_0 : Block32<false, 128, 8> {};
struct Q4_1 : Block32<true, 128, 0> {};
struct Q5_0 : Block32<false, 160, 16> {};
struct Q5_1 : Block32<true, 160, 16> {};

// Unsigned codes of k = 4G..4G+3 of a block.
template <size_t G, class Type>
inline __m256i Codes(Type /*type*/, const uint8_t* run) {
  if (Type::kRunBytes == 128) return Nibbles<G>(run);
  return _mm256_or_si256(Nibbles<G>(run), PlaneBit<G, 4>(Load(run + 128)));
}

// The start of the sums of a block; prepared seeds are for a centre of 8.
template <class Type>
inline __m256i BlockSeed(const uint8_t* at) {
  if (Type::kCentre == 0) return _mm256_setzero_si256();
  return Type::kCentre == 8 ? Seed(at) : _mm256_slli_epi16(Seed(at), 1);
}

// What the centred dot of a block lacks: the centre times the sum of the activations, where the
// codes have a min instead of a centre.
template <class Type>
inline __m256i Uncentred(const uint8_t* seed) {
  if (!Type::kHasMin || Type::kCentre == 0) return _mm256_setzero_si256();
  return _mm256_madd_epi16(Broadcast(seed), _mm256_set1_epi16(-Type::kCentre / 8));
}

// Pairs of int16 lanes, summed, as floats.
template <class Type>
inline __m256 DotToFloat(__m256i sum, __m256i uncentred) {
  const __m256i dot = WidenPairs(sum, _mm256_set1_epi16(1));
  if (!Type::kHasMin || Type::kCentre == 0) return _mm256_cvtepi32_ps(dot);
  return _mm256_cvtepi32_ps(_mm256_add_epi32(dot, uncentred));
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

}  // namespace
}  // namespace avx2
}  // namespace potluck
