// How AVX2 reads the records of K types: codes, scales and mins of 8 rows. Layout: pack.h.
//
// Every function here has internal linkage: see matmul_table.h.
#pragma once

#include "engine/kernels/avx2_codes.h"

namespace potluck {
namespace avx2 {
namespace {

constexpr size_t kHalvesBytes = 16;  // an f16 of 8 rows

// A K type. A unit is what one int16 sum holds: 8 vectors of codes up to 15, else 4, which is as
// deep as 31 goes without a centre, and 63 with one. kSeedShift: prepared seeds are for a centre of
// 32; a smaller one's are those shifted to the right.
template <bool HasMin, size_t FieldBytes, size_t RunBytes, size_t UnitVectors>
struct KShape {
  static constexpr bool kHasMin = HasMin;
  static constexpr size_t kFields = HasMin ? 2 * kHalvesBytes : kHalvesBytes;  // offset in a record
  static constexpr size_t kRuns = kFields + FieldBytes;
  static constexpr size_t kRunBytes = RunBytes;
  static constexpr size_t kRecordBytes = kRuns + 8 * RunBytes;
  static constexpr size_t kUnitVectors = UnitVectors;
  static constexpr bool kHasSeeds = false;
  static constexpr int kSeedShift = 0;
  static constexpr bool kHasScalesOf32 = false;
};
struct Q2_K : KShape<true, 128, 64, 4> {};
struct Q3_K : KShape<false, 96, 96, 4> {
  static constexpr bool kHasSeeds = true;  // centre 4
  static constexpr int kSeedShift = 3;
};
struct Q4_K : KShape<true, 96, 128, 8> {
  static constexpr bool kHasScalesOf32 = true;
};
struct Q5_K : KShape<true, 96, 160, 4> {
  static constexpr bool kHasScalesOf32 = true;
};
struct Q6_K : KShape<false, 128, 192, 4> {
  static constexpr bool kHasSeeds = true;  // centre 32
};

// Scales and mins of a record, a byte each: [sub-block][8 rows], sub-blocks of 16 or of 32.
struct SubScales {
  alignas(32) uint8_t scales[128];
  alignas(32) uint8_t mins[128];
};

// Bits 0 and 1 of each byte, moved to bits 4 and 5.
inline __m256i ToBits45(__m256i bytes) {
  return _mm256_and_si256(_mm256_slli_epi16(bytes, 4), _mm256_set1_epi8(0x30));
}

inline void ReadSubScales(Q2_K /*type*/, const uint8_t* fields, SubScales& out) {
  for (size_t i = 0; i < 128; i += 32) {
    const __m256i both = Load(fields + i);
    Store(out.scales + i, Low4(both));
    Store(out.mins + i, High4(both));
  }
}

inline void ReadSubScales(Q3_K /*type*/, const uint8_t* fields, SubScales& out) {
  const __m256i low0 = Load(fields), low1 = Load(fields + 32), tops = Load(fields + 64);
  const __m256i bias = _mm256_set1_epi8(32);
  const auto put = [&](size_t at, __m256i low, __m256i top) {
    Store(out.scales + at, _mm256_sub_epi8(_mm256_or_si256(low, ToBits45(top)), bias));
  };
  put(0, Low4(low0), tops);
  put(32, Low4(low1), _mm256_srli_epi16(tops, 2));
  put(64, High4(low0), _mm256_srli_epi16(tops, 4));
  put(96, High4(low1), _mm256_srli_epi16(tops, 6));
}

inline void ReadSixBits(const uint8_t* fields, SubScales& out) {
  const __m256i tops = Load(fields + 64);
  for (size_t half = 0; half < 2; ++half) {
    const __m256i low = Load(fields + 32 * half);
    const __m256i top = half == 0 ? tops : _mm256_srli_epi16(tops, 4);
    Store(out.scales + 32 * half, _mm256_or_si256(Low4(low), ToBits45(top)));
    Store(out.mins + 32 * half, _mm256_or_si256(High4(low), ToBits45(_mm256_srli_epi16(top, 2))));
  }
}
inline void ReadSubScales(Q4_K /*type*/, const uint8_t* fields, SubScales& out) {
  ReadSixBits(fields, out);
}
inline void ReadSubScales(Q5_K /*type*/, const uint8_t* fields, SubScales& out) {
  ReadSixBits(fields, out);
}

inline void ReadSubScales(Q6_K /*type*/, const uint8_t* fields, SubScales& out) {
  for (size_t i = 0; i < 128; i += 32) Store(out.scales + i, Load(fields + i));
}

// 8 int8 as pairs of equal int16, each in the lane of its row.
inline __m256i Pairs(const uint8_t* at) {
  long long bytes = 0;
  __builtin_memcpy(&bytes, at, sizeof bytes);
  // Byte r becomes the high byte of both halves of word r; the shift brings its sign along.
  const __m256i high = _mm256_setr_epi8(-1, 0, -1, 0, -1, 1, -1, 1, -1, 2, -1, 2, -1, 3, -1, 3, -1,
                                        4, -1, 4, -1, 5, -1, 5, -1, 6, -1, 6, -1, 7, -1, 7);
  return _mm256_srai_epi16(_mm256_shuffle_epi8(_mm256_set1_epi64x(bytes), high), 8);
}

// Mins of sub-blocks 2w and 2w + 1 of 16 values, a pair in the lane of each row.
template <class Type>
inline __m256i MinPairs(const SubScales& sub, size_t w) {
  if (Type::kHasScalesOf32) return Pairs(sub.mins + 8 * w);
  const __m128i even = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(sub.mins + 16 * w));
  const __m128i odd = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(sub.mins + 16 * w + 8));
  return _mm256_cvtepu8_epi16(_mm_unpacklo_epi8(even, odd));
}

// Scales of the sub-block that holds unit u of a run, as pairs.
template <class Type>
inline __m256i ScalePairs(const SubScales& sub, size_t run, size_t u) {
  return Pairs(sub.scales + 8 * (Type::kHasScalesOf32 ? run : 2 * run + u));
}

// Unsigned codes of k = 4G..4G+3 of a run.
template <size_t G>
inline __m256i Codes(Q2_K /*type*/, const uint8_t* run) {
  return Twos<G % 4>(Load(run + 32 * (G / 4)));
}
template <size_t G>
inline __m256i Codes(Q3_K /*type*/, const uint8_t* run) {
  return _mm256_or_si256(Twos<G % 4>(Load(run + 32 * (G / 4))), PlaneBit<G, 2>(Load(run + 64)));
}
template <size_t G>
inline __m256i Codes(Q4_K /*type*/, const uint8_t* run) {
  return Nibbles<G>(run);
}
template <size_t G>
inline __m256i Codes(Q5_K /*type*/, const uint8_t* run) {
  return _mm256_or_si256(Nibbles<G>(run), PlaneBit<G, 4>(Load(run + 128)));
}
template <size_t G>
inline __m256i Codes(Q6_K /*type*/, const uint8_t* run) {
  return _mm256_or_si256(Nibbles<G>(run), HighTwos<G % 4>(Load(run + 128 + 32 * (G / 4))));
}

// The start of an int16 sum of a unit of 16 values.
template <class Type>
inline __m256i UnitSeed(const uint8_t* at) {
  if (!Type::kHasSeeds) return _mm256_setzero_si256();
  return _mm256_srai_epi16(Seed(at), Type::kSeedShift);
}

// acc + f32(total) * (d * da), then - f32(mins) * (dmin * da): one step of the canonical chain.
template <class Type>
inline __m256 AddRecord(__m256 acc, __m256i total, __m256i mins, __m256 d, __m256 dmin,
                        const float* da) {
  const __m256 factor = _mm256_broadcast_ss(da);
  acc = _mm256_fmadd_ps(_mm256_cvtepi32_ps(total), _mm256_mul_ps(d, factor), acc);
  if (!Type::kHasMin) return acc;
  return _mm256_fnmadd_ps(_mm256_cvtepi32_ps(mins), _mm256_mul_ps(dmin, factor), acc);
}

}  // namespace
}  // namespace avx2
}  // namespace potluck
