// Q6_K on AVX2: 6-bit codes summed in int16 over a sub-block of 16, widened by the madd with its
// scale.
//
// The seed -32 * (sum of the lane's activations) makes the final lane the centred sum, at most 8 *
// 32 * 127 = 32512. Over 256 values the int32 sum is at most 16 * 128 * 16 * 32 * 127 = 1.4e8.
#include "engine/kernels/avx2_matmul.h"
#include "engine/pack.h"

namespace potluck {
namespace avx2 {
namespace {

constexpr size_t kRecordBytes = 1680;
constexpr size_t kScalesOffset = 16;
constexpr size_t kCodesOffset = 16 + 128;
constexpr size_t kRunBytes = 192;  // 32 values of 8 rows: 4 vectors of nibbles, 2 of top bits
constexpr size_t kPrefetchBytes = 8192;

// Codes of 4 values of k: the nibbles at bits 0-3 and field j of the tops.
template <int J>
inline __m256i JoinCodes(__m256i nibbles, __m256i tops) {
  const __m256i mask = _mm256_set1_epi8(0x30);
  const __m256i moved = J == 0   ? _mm256_slli_epi16(tops, 4)
                        : J == 1 ? _mm256_slli_epi16(tops, 2)
                        : J == 2 ? tops
                                 : _mm256_srli_epi16(tops, 2);
  return _mm256_or_si256(nibbles, _mm256_and_si256(moved, mask));
}

// 8 int8 scales, each as a pair of int16, in the lanes of their rows.
inline __m256i ScalePairs(const uint8_t* at) {
  long long bytes = 0;
  __builtin_memcpy(&bytes, at, sizeof bytes);
  // Scale r becomes the high byte of both halves of word r; the shift brings its sign along.
  const __m256i high = _mm256_setr_epi8(-1, 0, -1, 0, -1, 1, -1, 1, -1, 2, -1, 2, -1, 3, -1, 3, -1,
                                        4, -1, 4, -1, 5, -1, 5, -1, 6, -1, 6, -1, 7, -1, 7);
  return _mm256_srai_epi16(_mm256_shuffle_epi8(_mm256_set1_epi64x(bytes), high), 8);
}

// Sums of one sub-block of 16 values for R rows; nibbles are 4 vectors, half 0 their low halves, 1
// the high ones.
template <int R, size_t Half>
inline void AddSubBlock(__m256i (&total)[R], const uint8_t* run, const uint8_t* scales,
                        const uint8_t* x, const uint8_t* seeds) {
  const __m256i low = _mm256_set1_epi8(15);
  const __m256i tops = Load(run + 128 + 32 * Half);
  __m256i sum[R];
#pragma GCC unroll 8
  for (size_t t = 0; t < R; ++t) sum[t] = Seed(seeds + 4 * t);
  auto add = [&](__m256i codes, size_t v) {
#pragma GCC unroll 8
    for (size_t t = 0; t < R; ++t)
      sum[t] = AddProducts(sum[t], codes, Broadcast(x + (v * R + t) * 4));
    POTLUCK_ORDER_LOADS();
  };
  auto nibbles = [&](size_t v) {
    const __m256i both = Load(run + 32 * v);
    return _mm256_and_si256(Half == 0 ? both : _mm256_srli_epi16(both, 4), low);
  };
  add(JoinCodes<0>(nibbles(0), tops), 0);
  add(JoinCodes<1>(nibbles(1), tops), 1);
  add(JoinCodes<2>(nibbles(2), tops), 2);
  add(JoinCodes<3>(nibbles(3), tops), 3);
  const __m256i pairs = ScalePairs(scales);
#pragma GCC unroll 8
  for (size_t t = 0; t < R; ++t) total[t] = _mm256_add_epi32(total[t], WidenPairs(sum[t], pairs));
}

// One panel times R rows of a group, in one pass over the panel.
template <size_t R>
__attribute__((noinline)) void MultiplyNarrow(const uint8_t* panel, size_t k, const uint8_t* data,
                                              const RowGroup& group, float* out,
                                              size_t out_stride) {
  const uint8_t* x = data + group.codes;
  const uint8_t* seeds = data + group.seeds;
  const float* scales = reinterpret_cast<const float*>(data + group.scales);
  __m256 acc[R];
#pragma GCC unroll 8
  for (size_t t = 0; t < R; ++t) acc[t] = _mm256_setzero_ps();
  for (size_t b = 0; b < k / 256; ++b, panel += kRecordBytes) {
    __m256i total[R];
#pragma GCC unroll 8
    for (size_t t = 0; t < R; ++t) total[t] = _mm256_setzero_si256();
    const uint8_t* run = panel + kCodesOffset;
    const uint8_t* sub_scales = panel + kScalesOffset;
    for (size_t i = 0; i < 8; ++i) {
      for (size_t line = 0; line < kRunBytes; line += 64) {
        _mm_prefetch(reinterpret_cast<const char*>(run + kPrefetchBytes + line), _MM_HINT_T0);
      }
      AddSubBlock<R, 0>(total, run, sub_scales, x, seeds);
      AddSubBlock<R, 1>(total, run, sub_scales + 8, x + 16 * R, seeds + 4 * R);
      run += kRunBytes;
      sub_scales += 16;
      x += 32 * R;
      seeds += 8 * R;
    }
    const __m256 d = LoadHalves(panel);
#pragma GCC unroll 8
    for (size_t t = 0; t < R; ++t) {
      const __m256 scale = _mm256_mul_ps(d, _mm256_broadcast_ss(scales + t));
      acc[t] = _mm256_fmadd_ps(_mm256_cvtepi32_ps(total[t]), scale, acc[t]);
    }
    scales += R;
  }
#pragma GCC unroll 8
  for (size_t t = 0; t < R; ++t) _mm256_storeu_ps(out + t * out_stride, acc[t]);
}

void MultiplyGroup(const uint8_t* panel, size_t k, const uint8_t* data, const RowGroup& group,
                   float* out, size_t out_stride) {
  switch (group.rows) {
    case 1:
      return MultiplyNarrow<1>(panel, k, data, group, out, out_stride);
    case 2:
      return MultiplyNarrow<2>(panel, k, data, group, out, out_stride);
    case 3:
      return MultiplyNarrow<3>(panel, k, data, group, out, out_stride);
    case 4:
      return MultiplyNarrow<4>(panel, k, data, group, out, out_stride);
    case 5:
      return MultiplyNarrow<5>(panel, k, data, group, out, out_stride);
    case 6:
      return MultiplyNarrow<6>(panel, k, data, group, out, out_stride);
    case 7:
      return MultiplyNarrow<7>(panel, k, data, group, out, out_stride);
    default:
      return MultiplyNarrow<8>(panel, k, data, group, out, out_stride);
  }
}

}  // namespace

void MultiplyQ6K(WeightType /*type*/, const uint8_t* panels, size_t n_panels, const PreparedRows& x,
                 float* out, size_t out_stride, uint8_t* /*scratch*/) {
  const size_t panel_bytes = x.k / 256 * kRecordBytes;
  for (size_t p = 0; p < n_panels; ++p) {
    for (size_t index = 0; index < GroupCount(x.grain, x.rows); ++index) {
      const RowGroup group = GroupAt(x.grain, x.rows, x.k, index);
      MultiplyGroup(panels + p * panel_bytes, x.k, x.data, group,
                    out + group.first * out_stride + 8 * p, out_stride);
    }
  }
}

}  // namespace avx2
}  // namespace potluck
