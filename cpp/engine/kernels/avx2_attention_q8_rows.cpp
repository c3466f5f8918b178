// What attention over q8 keys and values does to single rows, for AVX2: codes of queries, keys and
// values.
#include <immintrin.h>
#include <stddef.h>
#include <stdint.h>

#include "engine/kernels/attention_q8.h"
#include "engine/kernels/avx2_attention.h"

namespace potluck {
namespace avx2 {
namespace {

constexpr size_t kFour = 4;

// x[d..d+4), zeros from n on.
inline __m128 LoadFour(const float* x, size_t d, size_t n) {
  if (d + kFour <= n) return _mm_loadu_ps(x + d);
  const __m128i lanes = _mm_setr_epi32(0, 1, 2, 3);
  const auto left = static_cast<int32_t>(n - d);
  return _mm_maskload_ps(x + d, _mm_cmpgt_epi32(_mm_set1_epi32(left), lanes));
}

// The largest |x|; above all numbers if one is not finite, for their bits are.
inline float LargestOf(const float* x, size_t n) {
  const __m128i magnitude = _mm_set1_epi32(0x7fffffff);
  __m128i largest = _mm_setzero_si128();
  for (size_t d = 0; d < n; d += kFour) {
    const __m128i bits = _mm_castps_si128(LoadFour(x, d, n));
    largest = _mm_max_epi32(largest, _mm_and_si128(bits, magnitude));
  }
  largest = _mm_max_epi32(largest, _mm_shuffle_epi32(largest, 0x4e));
  largest = _mm_max_epi32(largest, _mm_shuffle_epi32(largest, 0xb1));
  return _mm_cvtss_f32(_mm_castsi128_ps(largest));
}

// Factor that turns values into codes up to `range`, and what a code stands for.
struct Unit {
  float per_value;
  float of_code;
};

inline Unit UnitOf(float largest, float range) {
  if (largest < q8::kTiny) return {0.0f, 0.0f};
  return {range / largest, largest / range};
}

// Four codes, each an int32. A tiny row's are 0, whatever the sign.
inline __m128i CodesOf(const float* x, size_t d, size_t n, float per_value) {
  return _mm_cvtps_epi32(_mm_mul_ps(LoadFour(x, d, n), _mm_set1_ps(per_value)));
}

inline int32_t PackBytes(__m128i codes) {
  const __m128i words = _mm_packs_epi32(codes, codes);
  return _mm_cvtsi128_si32(_mm_packs_epi16(words, words));
}

inline void PutFloat(uint8_t* at, float value) { __builtin_memcpy(at, &value, sizeof value); }

}  // namespace

void PrepareQueryQ8(const float* q, size_t head_dim, void* out) {
  auto* const bytes = static_cast<uint8_t*>(out);
  const Unit unit = UnitOf(LargestOf(q, head_dim), q8::QueryRange(head_dim));
  // Words 0, 2, 1, 3 of the low half.
  const __m128i even_first =
      _mm_setr_epi8(0, 1, 8, 9, 4, 5, 12, 13, -1, -1, -1, -1, -1, -1, -1, -1);
  for (size_t d = 0; d < head_dim; d += kFour) {
    const __m128i codes = _mm_shuffle_epi8(CodesOf(q, d, head_dim, unit.per_value), even_first);
    _mm_storel_epi64(reinterpret_cast<__m128i*>(bytes + 2 * d), codes);
  }
  PutFloat(bytes + q8::QueryScaleAt(head_dim), unit.of_code);
}

bool StoreKeyQ8(const float* key, size_t head_dim, size_t slot, uint8_t* section) {
  const float largest = LargestOf(key, head_dim);
  if (!(largest < q8::kTooLarge)) return false;
  const Unit unit = UnitOf(largest, q8::kCodeRange);
  uint8_t* const out = section + kFour * slot;
  for (size_t d = 0; d < head_dim; d += kFour) {
    const int32_t four = PackBytes(CodesOf(key, d, head_dim, unit.per_value));
    __builtin_memcpy(out + d * kPagePositions, &four, sizeof four);
  }
  PutFloat(section + q8::KeyScalesAt(head_dim) + slot * sizeof(float), unit.of_code);
  return true;
}

bool StoreValueQ8(const float* value, size_t head_dim, size_t slot, uint8_t* section) {
  const float largest = LargestOf(value, head_dim);
  if (!(largest < q8::kTooLarge)) return false;
  const Unit unit = UnitOf(largest, q8::kCodeRange);
  uint8_t* out =
      section + q8::ValuesAt(head_dim) + slot / kFour * q8::Padded(head_dim) * kFour + slot % kFour;
  for (size_t d = 0; d < head_dim; d += kFour, out += kFour * kFour) {
    const auto four = static_cast<uint32_t>(PackBytes(CodesOf(value, d, head_dim, unit.per_value)));
    out[0] = static_cast<uint8_t>(four);
    out[4] = static_cast<uint8_t>(four >> 8);
    out[8] = static_cast<uint8_t>(four >> 16);
    out[12] = static_cast<uint8_t>(four >> 24);
  }
  PutFloat(section + q8::ValueScalesAt(head_dim) + slot * sizeof(float), unit.of_code);
  return true;
}

}  // namespace avx2
}  // namespace potluck
