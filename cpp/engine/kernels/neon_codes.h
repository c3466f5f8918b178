// How the ARM kernels read panels of quantized weights: codes, and what each type is. Layout:
// pack.h.
//
// A vector of a panel is two registers here, the halves: rows 0..3 and rows 4..7. Pointers into
// codes point at the first byte of a half. Nothing in here needs more than ARMv8-A; the files of
// every ARM table include it.
//
// Every function here has internal linkage: see matmul_table.h.
#pragma once

#include <arm_neon.h>

#include "engine/kernels/matmul_table.h"
#include "engine/kernels/order_loads.h"
#include "engine/pack.h"

namespace potluck {
namespace arm {
namespace {

constexpr size_t kHalfBytes = 16;        // of a vector of a panel
constexpr size_t kUnpackedBytes = 256;   // 32 values of 8 rows, a byte each
constexpr size_t kHalfScalesBytes = 16;  // f16 of 8 rows

[[maybe_unused]] inline int8x16_t Signed(uint8x16_t bytes) { return vreinterpretq_s8_u8(bytes); }

// Four half floats, exact.
[[maybe_unused]] inline float32x4_t LoadHalves(const uint8_t* at) {
  return vcvt_f32_f16(vreinterpret_f16_u8(vld1_u8(at)));
}

[[maybe_unused]] inline float32x4_t LoadFloats(const uint8_t* at) {
  return vreinterpretq_f32_u8(vld1q_u8(at));
}

// Each byte shifted so that its bit From is bit To; other bits may be anything.
template <int From, int To>
inline uint8x16_t MoveBit(uint8x16_t bytes) {
  if constexpr (From < To) return vshlq_n_u8(bytes, To - From);
  if constexpr (From > To) return vshrq_n_u8(bytes, From - To);
  return bytes;
}

// The nibbles of k = 4G..4G+3 of a run.
template <size_t G>
inline uint8x16_t Nibbles(const uint8_t* run) {
  const uint8x16_t both = vld1q_u8(run + 32 * (G % 4));
  return G < 4 ? vandq_u8(both, vdupq_n_u8(15)) : vshrq_n_u8(both, 4);
}

// The same below bits 4 and up of `tops`; bits outside `mask` are cut off.
template <size_t G>
inline uint8x16_t NibblesBelow(uint8x16_t tops, const uint8_t* run, uint8_t mask) {
  const uint8x16_t both = vld1q_u8(run + 32 * (G % 4));
  const uint8x16_t joined =
      G < 4 ? vbslq_u8(vdupq_n_u8(15), both, tops) : vsriq_n_u8(tops, both, 4);
  return vandq_u8(joined, vdupq_n_u8(mask));
}

// Runs of 32 values by what they are made of: Codes<G> are those of k = 4G..4G+3, unsigned.
struct FourBits {
  static constexpr size_t kRunBytes = 128;
  static constexpr int kLargestCode = 15;
  template <size_t G>
  static int8x16_t Codes(const uint8_t* run) {
    return Signed(Nibbles<G>(run));
  }
};
struct FiveBits {
  static constexpr size_t kRunBytes = 160;
  static constexpr int kLargestCode = 31;
  template <size_t G>
  static int8x16_t Codes(const uint8_t* run) {
    return Signed(NibblesBelow<G>(MoveBit<G, 4>(vld1q_u8(run + 128)), run, 31));
  }
};
struct SixBits {
  static constexpr size_t kRunBytes = 192;
  static constexpr int kLargestCode = 63;
  template <size_t G>
  static int8x16_t Codes(const uint8_t* run) {
    const uint8x16_t twos = vld1q_u8(run + 128 + 32 * (G / 4));
    return Signed(NibblesBelow<G>(MoveBit<2 * (G % 4), 4>(twos), run, 63));
  }
};
struct TwoBits {
  static constexpr size_t kRunBytes = 64;
  static constexpr int kLargestCode = 3;
  template <size_t G>
  static int8x16_t Codes(const uint8_t* run) {
    const uint8x16_t twos = MoveBit<2 * (G % 4), 0>(vld1q_u8(run + 32 * (G / 4)));
    return Signed(G % 4 == 3 ? twos : vandq_u8(twos, vdupq_n_u8(3)));
  }
};
struct ThreeBits {
  static constexpr size_t kRunBytes = 96;
  static constexpr int kLargestCode = 7;
  template <size_t G>
  static int8x16_t Codes(const uint8_t* run) {
    const uint8x16_t twos = MoveBit<2 * (G % 4), 0>(vld1q_u8(run + 32 * (G / 4)));
    const uint8x16_t top = MoveBit<G, 2>(vld1q_u8(run + 64));
    return Signed(vandq_u8(vbslq_u8(vdupq_n_u8(3), twos, top), vdupq_n_u8(7)));
  }
};
// A byte a code, as in Q8_0's panels and in scratch.
struct Bytes {
  static constexpr size_t kRunBytes = kUnpackedBytes;
  static constexpr int kLargestCode = 128;  // -128, legal in a file
  template <size_t G>
  static int8x16_t Codes(const uint8_t* run) {
    return Signed(vld1q_u8(run + 32 * G));
  }
};

// A weight type. kCentre is taken away from the codes: by the int32 that a sum starts from
// (SeedOf), or when codes are unpacked. kSeedFactor times the prepared seeds, which are for a
// centre of 8 (blocks of 32) or 32 (K types), is that start; negative: it is divided.
template <class Run, bool HasMin, int Centre = 0, int SeedFactor = 0>
struct TypeOf : Run {
  static constexpr bool kHasMin = HasMin;
  static constexpr int kCentre = Centre;
  static constexpr int kSeedFactor = SeedFactor;
};

// A K type's sub-blocks: UnitValues values share a scale. FieldBytes: the scales (and mins) of a
// record.
template <class Run, bool HasMin, size_t FieldBytes, size_t UnitValues, int Centre = 0,
          int SeedFactor = 0>
struct KTypeOf : TypeOf<Run, HasMin, Centre, SeedFactor> {
  static constexpr size_t kFields = (HasMin ? 2 : 1) * kHalfScalesBytes;  // offset in a record
  static constexpr size_t kRuns = kFields + FieldBytes;
  static constexpr size_t kRecordBytes = kRuns + 8 * Run::kRunBytes;
  static constexpr size_t kUnitValues = UnitValues;
};

struct Q4_0 : TypeOf<FourBits, false, 8, 1> {};
struct Q4_1 : TypeOf<FourBits, true> {};
struct Q5_0 : TypeOf<FiveBits, false, 16, 2> {};
struct Q5_1 : TypeOf<FiveBits, true> {};
struct Q8_0 : TypeOf<Bytes, false> {};
struct Q2_K : KTypeOf<TwoBits, true, 128, 16> {};
struct Q3_K : KTypeOf<ThreeBits, false, 96, 16, 4, -8> {};
struct Q4_K : KTypeOf<FourBits, true, 96, 32> {};
struct Q5_K : KTypeOf<FiveBits, true, 96, 32> {};
struct Q6_K : KTypeOf<SixBits, false, 128, 16, 32, 1> {};

// A type whose codes lie in scratch, a byte each and centred.
template <class Type>
struct Unpacked : Bytes {
  static constexpr bool kHasMin = Type::kHasMin;
  static constexpr int kCentre = 0;
  static constexpr int kSeedFactor = 0;
  static constexpr int kLargestCode = Type::kCentre > 0 ? Type::kCentre : Type::kLargestCode;
  static_assert(Type::kCentre == 0 || Type::kLargestCode < 2 * Type::kCentre);
};

#if defined(POTLUCK_MUTATION_SEED)
constexpr bool kForgetsCentre = true;  // for tests to catch
#else
constexpr bool kForgetsCentre = false;
#endif

template <class Type, size_t G>
inline int8x16_t CentredCodes(const uint8_t* run) {
  const int8x16_t codes = Type::template Codes<G>(run);
  if constexpr (Type::kCentre == 0 || kForgetsCentre) return codes;
  return vsubq_s8(codes, vdupq_n_s8(Type::kCentre));
}

// What a sum of 4 rows of weights starts from, for row t of R: the activations' sum times -centre.
// `seeds` are pairs of int16, one a row.
template <class Type, size_t R>
inline int32x4_t SeedOf(const uint8_t* seeds, size_t t) {
#if defined(POTLUCK_MUTATION_SEED)
  return vdupq_n_s32(seeds == nullptr || t > R ? 1 : 0);  // dropped, for tests to catch
#else
  int32x4_t seed;
  if constexpr (R < 4) {  // no more may be read than there is
    seed = vpaddlq_s16(
        vreinterpretq_s16_u32(vld1q_dup_u32(reinterpret_cast<const uint32_t*>(seeds + 4 * t))));
  } else {
    const size_t first = t < 4 ? 0 : R - 4;
    seed = vdupq_n_s32(vpaddlq_s16(vreinterpretq_s16_u8(vld1q_u8(seeds + 4 * first)))[t - first]);
  }
  if constexpr (Type::kSeedFactor == 2) return vshlq_n_s32(seed, 1);
  if constexpr (Type::kSeedFactor == -8) return vshrq_n_s32(seed, 3);
  return seed;
#endif
}

}  // namespace
}  // namespace arm
}  // namespace potluck
