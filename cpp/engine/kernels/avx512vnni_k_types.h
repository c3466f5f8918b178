// How AVX-512 VNNI reads the records of K types, two panels at once. Layout: pack.h.
//
// dpbusd sums the products of unsigned codes of a sub-block, one multiplication by its scale adds
// them to the record's total. What centres and mins take away is a sum of (scale or min) * (sum of
// the activations), two sub-blocks in one dpwssd. int32 holds it all: 16 * 128 * 16 * 63 * 127 =
// 2.7e8.
//
// Every function here has internal linkage: see matmul_table.h.
#pragma once

#include "engine/kernels/avx512vnni_codes.h"

namespace potluck {
namespace avx512vnni {
namespace {

template <bool HasMin, size_t FieldBytes, size_t RunBytes, bool HasScalesOf32, int CentreShift>
struct KShape {
  static constexpr bool kHasMin = HasMin;
  static constexpr size_t kFields = HasMin ? 2 * kScaleBytes : kScaleBytes;  // offset in a record
  static constexpr size_t kRuns = kFields + FieldBytes;
  static constexpr size_t kRunBytes = RunBytes;
  static constexpr size_t kRecordBytes = kRuns + 8 * RunBytes;
  static constexpr bool kHasScalesOf32 = HasScalesOf32;
  static constexpr int kCentreShift = CentreShift;  // the centre is 1 << that; 0: there is none
  static constexpr size_t kSubBlocks = HasScalesOf32 ? 8 : 16;
  static constexpr int kWords = HasScalesOf32 ? 8 : 4;  // groups of 4 values in a sub-block
};
struct Q2_K : KShape<true, 128, 64, false, 0> {};
struct Q3_K : KShape<false, 96, 96, false, 2> {};
struct Q4_K : KShape<true, 96, 128, true, 0> {};
struct Q5_K : KShape<true, 96, 160, true, 0> {};
struct Q6_K : KShape<false, 128, 192, false, 5> {};

// Unsigned codes of k = 4G..4G+3 of a run of two panels.
template <size_t G>
inline __m512i TwoBits(const uint8_t* run, size_t apart) {
  const uint8_t* at = run + 32 * (G / 4);
  return LoadTwo(at, at + apart);
}
template <size_t G>
inline __m512i Codes(Q2_K /*type*/, const uint8_t* run, size_t apart) {
  return Twos<G % 4, 0>(TwoBits<G>(run, apart));
}
template <size_t G>
inline __m512i Codes(Q3_K /*type*/, const uint8_t* run, size_t apart) {
  const __m512i plane = LoadTwo(run + 64, run + apart + 64);
  return _mm512_or_si512(Twos<G % 4, 0>(TwoBits<G>(run, apart)), PlaneBit<G, 2>(plane));
}
template <size_t G>
inline __m512i Codes(Q4_K /*type*/, const uint8_t* run, size_t apart) {
  return Nibbles<G>(run, apart);
}
template <size_t G>
inline __m512i Codes(Q5_K /*type*/, const uint8_t* run, size_t apart) {
  const __m512i plane = LoadTwo(run + 128, run + apart + 128);
  return _mm512_or_si512(Nibbles<G>(run, apart), PlaneBit<G, 4>(plane));
}
template <size_t G>
inline __m512i Codes(Q6_K /*type*/, const uint8_t* run, size_t apart) {
  const __m512i tops = TwoBits<G>(run + 128, apart);
  return _mm512_or_si512(Nibbles<G>(run, apart), Twos<G % 4, 4>(tops));
}

// Scales and mins of a record of two panels, a byte each: [sub-block][16 rows].
struct SubScales {
  alignas(64) uint8_t scales[256];
  alignas(64) uint8_t mins[256];
};

// 4 times 8 bytes of each panel, in turns.
inline __m512i LoadFields(const uint8_t* at, size_t apart) {
  const __m512i turns = _mm512_setr_epi64(0, 4, 1, 5, 2, 6, 3, 7);
  return _mm512_permutexvar_epi64(turns, LoadTwo(at, at + apart));
}

inline void ReadSubScales(Q2_K /*type*/, const uint8_t* fields, size_t apart, SubScales& out) {
  for (size_t i = 0; i < 4; ++i) {
    const __m512i both = LoadFields(fields + 32 * i, apart);
    _mm512_store_si512(out.scales + 64 * i, Low4(both));
    _mm512_store_si512(out.mins + 64 * i, High4(both));
  }
}

inline void ReadSubScales(Q3_K /*type*/, const uint8_t* fields, size_t apart, SubScales& out) {
  const __m512i low0 = LoadFields(fields, apart), low1 = LoadFields(fields + 32, apart);
  const __m512i tops = LoadFields(fields + 64, apart);
  const __m512i bias = _mm512_set1_epi8(32);
  const auto put = [&](size_t at, __m512i low, __m512i top) {
    _mm512_store_si512(out.scales + at, _mm512_sub_epi8(_mm512_or_si512(low, top), bias));
  };
  put(0, Low4(low0), Twos<0, 4>(tops));
  put(64, Low4(low1), Twos<1, 4>(tops));
  put(128, High4(low0), Twos<2, 4>(tops));
  put(192, High4(low1), Twos<3, 4>(tops));
}

inline void ReadSixBits(const uint8_t* fields, size_t apart, SubScales& out) {
  const __m512i low0 = LoadFields(fields, apart), low1 = LoadFields(fields + 32, apart);
  const __m512i tops = LoadFields(fields + 64, apart);
  _mm512_store_si512(out.scales, _mm512_or_si512(Low4(low0), Twos<0, 4>(tops)));
  _mm512_store_si512(out.mins, _mm512_or_si512(High4(low0), Twos<1, 4>(tops)));
  _mm512_store_si512(out.scales + 64, _mm512_or_si512(Low4(low1), Twos<2, 4>(tops)));
  _mm512_store_si512(out.mins + 64, _mm512_or_si512(High4(low1), Twos<3, 4>(tops)));
}
inline void ReadSubScales(Q4_K /*type*/, const uint8_t* fields, size_t apart, SubScales& out) {
  ReadSixBits(fields, apart, out);
}
inline void ReadSubScales(Q5_K /*type*/, const uint8_t* fields, size_t apart, SubScales& out) {
  ReadSixBits(fields, apart, out);
}

inline void ReadSubScales(Q6_K /*type*/, const uint8_t* fields, size_t apart, SubScales& out) {
  for (size_t i = 0; i < 4; ++i)
    _mm512_store_si512(out.scales + 64 * i, LoadFields(fields + 32 * i, apart));
}

// Scales of a sub-block, int32 in the lanes of their rows.
inline __m512i ScaleWords(const SubScales& sub, size_t sub_block) {
  const uint8_t* at = sub.scales + 16 * sub_block;
  return _mm512_cvtepi8_epi32(_mm_load_si128(reinterpret_cast<const __m128i*>(at)));
}

// What a total lacks is a sum over pairs of sub-blocks of 16: their mins, or their scales where
// there is a centre, times the sums of the activations. Factors of pair w as int16 in the lanes of
// their rows.
template <class Type>
inline __m512i FactorPairs(const SubScales& sub, size_t w) {
  if (Type::kHasScalesOf32) {
    const __m128i mins = _mm_load_si128(reinterpret_cast<const __m128i*>(sub.mins + 16 * w));
    const __m512i words = _mm512_cvtepi8_epi32(mins);
    return _mm512_or_si512(words, _mm512_slli_epi32(words, 16));
  }
  const uint8_t* at = (Type::kHasMin ? sub.mins : sub.scales) + 32 * w;
  const __m128i even = _mm_load_si128(reinterpret_cast<const __m128i*>(at));
  const __m128i odd = _mm_load_si128(reinterpret_cast<const __m128i*>(at + 16));
  return _mm512_cvtepi8_epi16(
      _mm256_set_m128i(_mm_unpackhi_epi8(even, odd), _mm_unpacklo_epi8(even, odd)));
}

#if defined(POTLUCK_MUTATION_SEED)  // dropped, for tests to catch
template <class Type>
inline __m512i Centred(__m512i total, __m512i /*taken*/) {
  return total;
}
#else
template <class Type>
inline __m512i Centred(__m512i total, __m512i taken) {
  if (Type::kCentreShift == 0) return total;
  return _mm512_sub_epi32(total, _mm512_slli_epi32(taken, Type::kCentreShift));
}
#endif

// acc + f32(total) * (d * da), then - f32(mins) * (dmin * da): one step of the canonical chain. The
// total is of centred codes.
template <class Type>
inline __m512 AddCentred(__m512 acc, __m512i total, __m512i mins, __m512 d, __m512 dmin,
                         const float* da) {
  const __m512 factor = _mm512_set1_ps(*da);
  acc = _mm512_fmadd_ps(_mm512_cvtepi32_ps(total), _mm512_mul_ps(d, factor), acc);
  if (!Type::kHasMin) return acc;
  return _mm512_fnmadd_ps(_mm512_cvtepi32_ps(mins), _mm512_mul_ps(dmin, factor), acc);
}

// The same of codes as they are; `taken` as FactorPairs says.
template <class Type>
inline __m512 AddRecord(__m512 acc, __m512i total, __m512i taken, __m512 d, __m512 dmin,
                        const float* da) {
  return AddCentred<Type>(acc, Centred<Type>(total, taken), taken, d, dmin, da);
}

}  // namespace
}  // namespace avx512vnni
}  // namespace potluck
