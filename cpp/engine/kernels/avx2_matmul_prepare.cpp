// Preparing activations on AVX2: int8 codes, scales, sums and seeds, equal to the scalar ones bit
// for bit.
#include "engine/kernels/avx2_matmul.h"

namespace potluck {
namespace avx2 {
namespace {

#if defined(POTLUCK_MUTATION_CLAMP)
constexpr float kCodeRange = 128.0f;  // a careless quantizer, for tests to catch
constexpr char kLowestCode = -128;
#else
constexpr float kCodeRange = 127.0f;
constexpr char kLowestCode = -127;
#endif
constexpr int kInfinityBits = 0x7f800000;
constexpr int kTinyBits = 27 << 23;  // 2^-100; bits of positive floats order as the floats do

// Largest |x| of 32 values, as bits, a maximum per lane.
__m256i LargestOf32(const float* x, __m256i largest) {
  const __m256i magnitude = _mm256_set1_epi32(0x7fffffff);
  for (int i = 0; i < 32; i += 8) {
    const __m256i bits = _mm256_castps_si256(_mm256_loadu_ps(x + i));
    largest = _mm256_max_epi32(largest, _mm256_and_si256(bits, magnitude));
  }
  return largest;
}

int LargestLane(__m256i lanes) {
  __m128i most = _mm_max_epi32(_mm256_castsi256_si128(lanes), _mm256_extracti128_si256(lanes, 1));
  most = _mm_max_epi32(most, _mm_shuffle_epi32(most, 0x4e));
  most = _mm_max_epi32(most, _mm_shuffle_epi32(most, 0xb1));
  return _mm_cvtsi128_si32(most);
}

// Codes of 32 values in the order of k. Rounds to nearest even by the mode that every engine thread
// has.
__m256i Quantize32(const float* x, float r) {
  const __m256 factor = _mm256_set1_ps(r);
  const __m256i i0 = _mm256_cvtps_epi32(_mm256_mul_ps(_mm256_loadu_ps(x), factor));
  const __m256i i1 = _mm256_cvtps_epi32(_mm256_mul_ps(_mm256_loadu_ps(x + 8), factor));
  const __m256i i2 = _mm256_cvtps_epi32(_mm256_mul_ps(_mm256_loadu_ps(x + 16), factor));
  const __m256i i3 = _mm256_cvtps_epi32(_mm256_mul_ps(_mm256_loadu_ps(x + 24), factor));
  const __m256i mixed = _mm256_packs_epi16(_mm256_packs_epi32(i0, i1), _mm256_packs_epi32(i2, i3));
  const __m256i codes =
      _mm256_permutevar8x32_epi32(mixed, _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7));
  return _mm256_max_epi8(codes, _mm256_set1_epi8(kLowestCode));
}

void PutWord(uint8_t* array, size_t index, int word) {
  __builtin_memcpy(array + 4 * index, &word, 4);
}

void PutFloat(uint8_t* array, size_t index, float value) {
  __builtin_memcpy(array + 4 * index, &value, 4);
}

// The 8 words of 32 codes, `step` words apart.
void PutCodes(uint8_t* at, size_t step, __m256i codes) {
  if (step == 1) return _mm256_storeu_si256(reinterpret_cast<__m256i*>(at), codes);
  const __m128i low = _mm256_castsi256_si128(codes);
  const __m128i high = _mm256_extracti128_si256(codes, 1);
  PutWord(at, 0, _mm_cvtsi128_si32(low));
  PutWord(at, step, _mm_extract_epi32(low, 1));
  PutWord(at, 2 * step, _mm_extract_epi32(low, 2));
  PutWord(at, 3 * step, _mm_extract_epi32(low, 3));
  PutWord(at, 4 * step, _mm_cvtsi128_si32(high));
  PutWord(at, 5 * step, _mm_extract_epi32(high, 1));
  PutWord(at, 6 * step, _mm_extract_epi32(high, 2));
  PutWord(at, 7 * step, _mm_extract_epi32(high, 3));
}

// Each 16 codes (a lane of 128 bits) as the pair (S01, S23), in every word of the lane.
__m256i PairSums(__m256i codes) {
  __m256i sums = _mm256_maddubs_epi16(_mm256_set1_epi8(1), codes);
  sums = _mm256_add_epi16(sums, _mm256_shuffle_epi32(sums, 0x4e));
  return _mm256_add_epi16(sums, _mm256_shuffle_epi32(sums, 0xb1));
}

// Where the words of one row lie: word j of an array at [j * step]. Copies, for the compiler must
// assume that a store of bytes changes what it reaches by reference.
struct Places {
  size_t step;
  uint8_t* codes;
  uint8_t* scales;
  uint8_t* sums;
  uint8_t* seeds;
};

Places PlacesOf(const RowGroup& group, size_t lane, uint8_t* dst) {
  uint8_t* const row = dst + 4 * lane;
  return {group.rows, row + group.codes, row + group.scales, row + group.sums, row + group.seeds};
}

bool PrepareBlocks32(const float* x, size_t k, Places to) {
  for (size_t b = 0; b < k / 32; ++b, x += 32) {
    const int largest = LargestLane(LargestOf32(x, _mm256_setzero_si256()));
    if (largest >= kInfinityBits) return false;
    const bool is_tiny = largest < kTinyBits;
    const float amax = _mm_cvtss_f32(_mm_castsi128_ps(_mm_cvtsi32_si128(largest)));
    const float d = is_tiny ? 0.0f : amax / 127.0f;
    const __m256i codes = is_tiny ? _mm256_setzero_si256() : Quantize32(x, kCodeRange / amax);
    PutCodes(to.codes + 32 * b * to.step, to.step, codes);
    const __m256i halves = PairSums(codes);
    const __m128i pair =
        _mm_add_epi16(_mm256_castsi256_si128(halves), _mm256_extracti128_si256(halves, 1));
    const int sum = _mm_cvtsi128_si32(_mm_madd_epi16(pair, _mm_set1_epi16(1)));
    PutFloat(to.scales, b * to.step, d);
    PutFloat(to.sums, b * to.step, d * static_cast<float>(sum));
    PutWord(to.seeds, b * to.step, _mm_cvtsi128_si32(_mm_mullo_epi16(pair, _mm_set1_epi16(-8))));
  }
  return true;
}

bool PrepareBlocks256(const float* x, size_t k, Places to) {
  for (size_t b = 0; b < k / 256; ++b) {
    __m256i lanes = _mm256_setzero_si256();
    for (size_t i = 0; i < 256; i += 32) lanes = LargestOf32(x + i, lanes);
    const int largest = LargestLane(lanes);
    if (largest >= kInfinityBits) return false;
    const bool is_tiny = largest < kTinyBits;
    const float amax = _mm_cvtss_f32(_mm_castsi128_ps(_mm_cvtsi32_si128(largest)));
    const float r = is_tiny ? 0.0f : kCodeRange / amax;
    PutFloat(to.scales, b * to.step, is_tiny ? 0.0f : amax / 127.0f);
    for (size_t i = 0; i < 8; ++i, x += 32) {
      const __m256i codes = Quantize32(x, r);  // r = 0: zeros
      PutCodes(to.codes, to.step, codes);
      const __m256i pairs = PairSums(codes);
      const __m256i seeds = _mm256_mullo_epi16(pairs, _mm256_set1_epi16(-32));
      const __m256i sums = _mm256_madd_epi16(pairs, _mm256_set1_epi16(1));
      const int even = _mm_cvtsi128_si32(_mm256_castsi256_si128(sums));
      const int odd = _mm_cvtsi128_si32(_mm256_extracti128_si256(sums, 1));
      PutWord(to.sums, 0, (even & 0xffff) | static_cast<int>(static_cast<unsigned>(odd) << 16));
      PutWord(to.seeds, 0, _mm_cvtsi128_si32(_mm256_castsi256_si128(seeds)));
      PutWord(to.seeds, to.step, _mm_cvtsi128_si32(_mm256_extracti128_si256(seeds, 1)));
      to.codes += 32 * to.step;
      to.seeds += 8 * to.step;
      to.sums += 4 * to.step;
    }
  }
  return true;
}

bool PrepareFloats(const float* x, size_t k, Places to) {
  __m256i lanes = _mm256_setzero_si256();
  size_t i = 0;
  for (; i + 32 <= k; i += 32) lanes = LargestOf32(x + i, lanes);
  int largest = LargestLane(lanes);
  for (; i < k; ++i) {
    int bits = 0;
    __builtin_memcpy(&bits, x + i, 4);
    bits &= 0x7fffffff;
    largest = bits > largest ? bits : largest;
  }
  for (i = 0; i < k; ++i) PutFloat(to.codes, i * to.step, x[i]);
  return largest < kInfinityBits;
}

}  // namespace

bool Prepare(Grain grain, const float* x, size_t k, const RowGroup& group, size_t lane,
             uint8_t* dst) {
  const Places to = PlacesOf(group, lane, dst);
  switch (grain) {
    case Grain::kFloat:
      return PrepareFloats(x, k, to);
    case Grain::kBlock32:
      return PrepareBlocks32(x, k, to);
    case Grain::kBlock256:
      return PrepareBlocks256(x, k, to);
  }
  return false;
}

}  // namespace avx2
}  // namespace potluck
