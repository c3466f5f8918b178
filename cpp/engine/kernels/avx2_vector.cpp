// The vector kernels for AVX2 and FMA: the scalar chains, 8 values at a time. Ends of rows that
// fill no vector are loaded and stored under a mask, so nothing beyond a buffer is touched.
#include <immintrin.h>
#include <stddef.h>
#include <stdint.h>

#include "engine/kernels/avx2_exp.h"
#include "engine/kernels/vector_table.h"

namespace potluck {
namespace {

constexpr size_t kWidth = 8;
const int32_t kMasks[2 * kWidth] = {-1, -1, -1, -1, -1, -1, -1, -1};  // then zeros

// All ones in the first `count` of 8 lanes.
inline __m256i MaskOf(size_t count) {
  return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(kMasks + kWidth - count));
}

// The sum by the canonical tree of lanes 0..7 and 8..15.
inline float Tree(__m256 low, __m256 high) {
  const __m256 eight = _mm256_add_ps(low, high);
  const __m128 four = _mm_add_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
  const __m128 two = _mm_add_ps(four, _mm_movehl_ps(four, four));
  return _mm_cvtss_f32(_mm_add_ss(two, _mm_shuffle_ps(two, two, 1)));
}

bool RmsNorm(const float* x, const float* w, size_t n, float eps, float* out) {
  __m256 low = _mm256_setzero_ps();
  __m256 high = _mm256_setzero_ps();
  size_t i = 0;
  for (; i + 2 * kWidth <= n; i += 2 * kWidth) {
    const __m256 a = _mm256_loadu_ps(x + i);
    const __m256 b = _mm256_loadu_ps(x + i + kWidth);
    low = _mm256_fmadd_ps(a, a, low);
    high = _mm256_fmadd_ps(b, b, high);
  }
  // A lane is never -0, so adding the square of a masked zero leaves its bits.
  const size_t rest = n - i;
  if (rest > 0) {
    const __m256 a = _mm256_maskload_ps(x + i, MaskOf(rest < kWidth ? rest : kWidth));
    low = _mm256_fmadd_ps(a, a, low);
  }
  if (rest > kWidth) {
    const __m256 b = _mm256_maskload_ps(x + i + kWidth, MaskOf(rest - kWidth));
    high = _mm256_fmadd_ps(b, b, high);
  }
  const __m128 mean = _mm_div_ss(_mm_set_ss(Tree(low, high)), _mm_set_ss(static_cast<float>(n)));
  const __m128 length = _mm_sqrt_ss(_mm_add_ss(mean, _mm_set_ss(eps)));
  const __m256 inv = _mm256_broadcastss_ps(_mm_div_ss(_mm_set_ss(1.0f), length));
  for (i = 0; i + kWidth <= n; i += kWidth) {
    const __m256 scaled = _mm256_mul_ps(_mm256_loadu_ps(x + i), inv);
    _mm256_storeu_ps(out + i, _mm256_mul_ps(scaled, _mm256_loadu_ps(w + i)));
  }
  if (i < n) {
    const __m256i mask = MaskOf(n - i);
    const __m256 scaled = _mm256_mul_ps(_mm256_maskload_ps(x + i, mask), inv);
    _mm256_maskstore_ps(out + i, mask, _mm256_mul_ps(scaled, _mm256_maskload_ps(w + i, mask)));
  }
  return _mm256_cvtss_f32(inv) > 0.0f;  // 0 for an infinite sum, NaN for a NaN
}

inline __m256 SiluMul8(__m256 gate, __m256 up) {
  const __m256 power = Exp8(_mm256_xor_ps(gate, _mm256_set1_ps(-0.0f)));
  return _mm256_mul_ps(_mm256_div_ps(gate, _mm256_add_ps(_mm256_set1_ps(1.0f), power)), up);
}

void SiluMul(const float* gate, const float* up, size_t n, float* out) {
  size_t i = 0;
  for (; i + kWidth <= n; i += kWidth)
    _mm256_storeu_ps(out + i, SiluMul8(_mm256_loadu_ps(gate + i), _mm256_loadu_ps(up + i)));
  if (i < n) {
    const __m256i mask = MaskOf(n - i);
    const __m256 g = _mm256_maskload_ps(gate + i, mask);
    _mm256_maskstore_ps(out + i, mask, SiluMul8(g, _mm256_maskload_ps(up + i, mask)));
  }
}

void Add(const float* a, size_t n, float* x) {
  size_t i = 0;
  for (; i + kWidth <= n; i += kWidth)
    _mm256_storeu_ps(x + i, _mm256_add_ps(_mm256_loadu_ps(x + i), _mm256_loadu_ps(a + i)));
  if (i < n) {
    const __m256i mask = MaskOf(n - i);
    const __m256 sum =
        _mm256_add_ps(_mm256_maskload_ps(x + i, mask), _mm256_maskload_ps(a + i, mask));
    _mm256_maskstore_ps(x + i, mask, sum);
  }
}

void Rotate(const float* cosine, const float* sine, size_t half, float* x) {
  size_t i = 0;
  for (; i + kWidth <= half; i += kWidth) {
    const __m256 a = _mm256_loadu_ps(x + i);
    const __m256 b = _mm256_loadu_ps(x + i + half);
    const __m256 c = _mm256_loadu_ps(cosine + i);
    const __m256 s = _mm256_loadu_ps(sine + i);
    _mm256_storeu_ps(x + i, _mm256_fmsub_ps(a, c, _mm256_mul_ps(b, s)));
    _mm256_storeu_ps(x + i + half, _mm256_fmadd_ps(b, c, _mm256_mul_ps(a, s)));
  }
  if (i < half) {
    const __m256i mask = MaskOf(half - i);
    const __m256 a = _mm256_maskload_ps(x + i, mask);
    const __m256 b = _mm256_maskload_ps(x + i + half, mask);
    const __m256 c = _mm256_maskload_ps(cosine + i, mask);
    const __m256 s = _mm256_maskload_ps(sine + i, mask);
    _mm256_maskstore_ps(x + i, mask, _mm256_fmsub_ps(a, c, _mm256_mul_ps(b, s)));
    _mm256_maskstore_ps(x + i + half, mask, _mm256_fmadd_ps(b, c, _mm256_mul_ps(a, s)));
  }
}

void ExpRow(const float* x, size_t n, float* out) {
  size_t i = 0;
  for (; i + kWidth <= n; i += kWidth) _mm256_storeu_ps(out + i, Exp8(_mm256_loadu_ps(x + i)));
  if (i < n) {
    const __m256i mask = MaskOf(n - i);
    _mm256_maskstore_ps(out + i, mask, Exp8(_mm256_maskload_ps(x + i, mask)));
  }
}

float Max(const float* x, size_t n) {
  __m256 largest = _mm256_broadcast_ss(x);
  size_t i = 0;
  for (; i + kWidth <= n; i += kWidth) largest = _mm256_max_ps(_mm256_loadu_ps(x + i), largest);
  if (i < n) {
    const __m256i mask = MaskOf(n - i);
    const __m256 rest =
        _mm256_blendv_ps(largest, _mm256_maskload_ps(x + i, mask), _mm256_castsi256_ps(mask));
    largest = _mm256_max_ps(rest, largest);
  }
  __m128 four = _mm_max_ps(_mm256_castps256_ps128(largest), _mm256_extractf128_ps(largest, 1));
  four = _mm_max_ps(four, _mm_movehl_ps(four, four));
  return _mm_cvtss_f32(_mm_max_ss(four, _mm_shuffle_ps(four, four, 1)));
}

// Lanes 0..7 of sum_exp in two vectors of 4; 8..15 in two more.
inline void AddWidened(__m256 values, __m256d* first, __m256d* second) {
  *first = _mm256_add_pd(*first, _mm256_cvtps_pd(_mm256_castps256_ps128(values)));
  *second = _mm256_add_pd(*second, _mm256_cvtps_pd(_mm256_extractf128_ps(values, 1)));
}

double SumExp(const float* x, size_t n, float shift) {
  __m256d a = _mm256_setzero_pd();
  __m256d b = a;
  __m256d c = a;
  __m256d d = a;
  const __m256 shifts = _mm256_set1_ps(shift);
  size_t i = 0;
  for (; i + 2 * kWidth <= n; i += 2 * kWidth) {
    AddWidened(Exp8(_mm256_sub_ps(_mm256_loadu_ps(x + i), shifts)), &a, &b);
    AddWidened(Exp8(_mm256_sub_ps(_mm256_loadu_ps(x + i + kWidth), shifts)), &c, &d);
  }
  for (size_t half = 0; half < 2 && i < n; ++half, i += kWidth) {
    const __m256i mask = MaskOf(n - i < kWidth ? n - i : kWidth);
    const __m256 power = Exp8(_mm256_sub_ps(_mm256_maskload_ps(x + i, mask), shifts));
    // A lane is never -0, so adding a masked zero leaves its bits.
    AddWidened(_mm256_and_ps(power, _mm256_castsi256_ps(mask)), half == 0 ? &a : &c,
               half == 0 ? &b : &d);
  }
  const __m256d four = _mm256_add_pd(_mm256_add_pd(a, c), _mm256_add_pd(b, d));
  const __m128d two = _mm_add_pd(_mm256_castpd256_pd128(four), _mm256_extractf128_pd(four, 1));
  return _mm_cvtsd_f64(_mm_add_sd(two, _mm_unpackhi_pd(two, two)));
}

const VectorTable kTable = {RmsNorm, SiluMul, Add, Rotate, ExpRow, Max, SumExp};

}  // namespace

const VectorTable* Avx2VectorTable() { return &kTable; }

}  // namespace potluck
