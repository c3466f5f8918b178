// What attention does to single rows, for AVX2, FMA and F16C: merging and ending states, storing
// keys and values.
#include <immintrin.h>
#include <stddef.h>
#include <stdint.h>

#include "engine/kernels/avx2_attention.h"
#include "engine/kernels/avx2_exp.h"

namespace potluck {
namespace avx2 {
namespace {

constexpr size_t kLanes = 8;

inline __m256 Load(const float* x) { return _mm256_loadu_ps(x); }
inline float ExpOf(float x) { return _mm256_cvtss_f32(Exp8(_mm256_set1_ps(x))); }

inline bool IsFinite(__m128i halves) {
  const __m128i exponent = _mm_set1_epi16(0x7c00);
  const __m128i full = _mm_cmpeq_epi16(_mm_and_si128(halves, exponent), exponent);
  return _mm_movemask_epi8(full) == 0;
}

inline __m128i Narrow(__m256 values) {
  return _mm256_cvtps_ph(values, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
}

}  // namespace

void Merge(const float* from, size_t head_dim, float* into) {
  const float from_m = from[head_dim];
  const float into_m = into[head_dim];
  const float m = from_m > into_m ? from_m : into_m;
  const float a = ExpOf(into_m - m);
  const float b = ExpOf(from_m - m);
  // The sum of weights, one value beyond m, follows the rule of the o.
  into[head_dim + 1] = __builtin_fmaf(from[head_dim + 1], b, into[head_dim + 1] * a);
  into[head_dim] = m;
  size_t d = 0;
  for (; d + kLanes <= head_dim; d += kLanes) {
    const __m256 scaled = _mm256_mul_ps(Load(into + d), _mm256_set1_ps(a));
    _mm256_storeu_ps(into + d, _mm256_fmadd_ps(Load(from + d), _mm256_set1_ps(b), scaled));
  }
  for (; d < head_dim; ++d) into[d] = __builtin_fmaf(from[d], b, into[d] * a);
}

void Finish(const float* state, size_t head_dim, float* out) {
  const float l = state[head_dim + 1];
  size_t d = 0;
  for (; d + kLanes <= head_dim; d += kLanes) {
    _mm256_storeu_ps(out + d, _mm256_div_ps(Load(state + d), _mm256_set1_ps(l)));
  }
  for (; d < head_dim; ++d) out[d] = state[d] / l;
}

bool StoreKeyF16(const float* key, size_t head_dim, size_t slot, uint8_t* section) {
  auto* const out = reinterpret_cast<uint16_t*>(section) + slot;
  bool finite = true;
  size_t d = 0;
  for (; d + kLanes <= head_dim; d += kLanes) {
    alignas(16) uint16_t halves[kLanes];
    const __m128i narrow = Narrow(Load(key + d));
    finite &= IsFinite(narrow);
    _mm_store_si128(reinterpret_cast<__m128i*>(halves), narrow);
    for (size_t i = 0; i < kLanes; ++i) out[(d + i) * kPagePositions] = halves[i];
  }
  for (; d < head_dim; ++d) {
    const __m128i narrow = Narrow(_mm256_castps128_ps256(_mm_load_ss(key + d)));
    const auto half = static_cast<uint16_t>(_mm_extract_epi16(narrow, 0));
    finite &= (half & 0x7c00) != 0x7c00;
    out[d * kPagePositions] = half;
  }
  return finite;
}

bool StoreValueF16(const float* value, size_t head_dim, size_t slot, uint8_t* section) {
  bool finite = true;
  auto* const out = reinterpret_cast<uint16_t*>(section) + (kPagePositions + slot) * head_dim;
  size_t d = 0;
  for (; d + kLanes <= head_dim; d += kLanes) {
    const __m128i narrow = Narrow(Load(value + d));
    finite &= IsFinite(narrow);
    _mm_storeu_si128(reinterpret_cast<__m128i*>(out + d), narrow);
  }
  for (; d < head_dim; ++d) {
    const __m128i narrow = Narrow(_mm256_castps128_ps256(_mm_load_ss(value + d)));
    out[d] = static_cast<uint16_t>(_mm_extract_epi16(narrow, 0));
    finite &= (out[d] & 0x7c00) != 0x7c00;
  }
  return finite;
}

}  // namespace avx2
}  // namespace potluck
