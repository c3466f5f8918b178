// Q8_0 on AVX2: |w| times the activation with w's sign, widened after every product.
//
// A pair of products is at most 2 * 128 * 127 = 32512 (code -128 is legal in a file, an activation
// never is -128), so int16 holds one maddubs and no second.
#include "engine/kernels/avx2_matmul.h"
#include "engine/pack.h"

namespace potluck {
namespace avx2 {
namespace {

constexpr size_t kBlockCodes = 256;  // bytes of a block of a panel: 8 rows of 32 codes
constexpr size_t kScaleBytes = 16;   // f16 of 8 rows
constexpr size_t kPrefetchBytes = 8192;

// Adds 8 rows' products of the codes at `w` and `w + 32` with 2 words of a row, each word 4 values
// of k.
inline __m256i AddSigned(__m256i sum, __m256i w0, __m256i w1, __m256i x0, __m256i x1) {
  const __m256i p0 = _mm256_maddubs_epi16(_mm256_abs_epi8(w0), _mm256_sign_epi8(x0, w0));
  const __m256i p1 = _mm256_maddubs_epi16(_mm256_abs_epi8(w1), _mm256_sign_epi8(x1, w1));
  const __m256i ones = _mm256_set1_epi16(1);
#if defined(POTLUCK_MUTATION_DEPTH)
  const __m256i both = _mm256_madd_epi16(_mm256_add_epi16(p0, p1), ones);  // one too deep
#else
  const __m256i both = _mm256_add_epi32(_mm256_madd_epi16(p0, ones), _mm256_madd_epi16(p1, ones));
#endif
  return Pin(_mm256_add_epi32(sum, both));
}

// One panel times R rows of a group, in one pass over the panel.
template <size_t R>
__attribute__((noinline)) void MultiplyNarrow(const uint8_t* panel, size_t k, const uint8_t* data,
                                              const RowGroup& group, float* out,
                                              size_t out_stride) {
  const size_t g = RecordBlocks(k);
  const uint8_t* x = data + group.codes;
  const float* scales = reinterpret_cast<const float*>(data + group.scales);
  __m256 acc[R];
#pragma GCC unroll 8
  for (size_t t = 0; t < R; ++t) acc[t] = _mm256_setzero_ps();
  for (size_t b = 0; b < k / 32; b += g) {
    const uint8_t* d = panel;
    const uint8_t* codes = panel + g * kScaleBytes;
    for (size_t i = 0; i < g; ++i) {
      for (size_t line = 0; line < kBlockCodes; line += 64) {
        _mm_prefetch(reinterpret_cast<const char*>(codes + kPrefetchBytes + line), _MM_HINT_T0);
      }
      __m256i sum[R];
#pragma GCC unroll 8
      for (size_t t = 0; t < R; ++t) sum[t] = _mm256_setzero_si256();
      for (size_t v = 0; v < 8; v += 2) {
        const __m256i w0 = Pin(Load(codes + 32 * v));
        const __m256i w1 = Pin(Load(codes + 32 * v + 32));
#pragma GCC unroll 8
        for (size_t t = 0; t < R; ++t) {
          sum[t] = AddSigned(sum[t], w0, w1, Broadcast(x + (v * R + t) * 4),
                             Broadcast(x + ((v + 1) * R + t) * 4));
        }
        POTLUCK_ORDER_LOADS();
      }
      const __m256 dw = LoadHalves(d);
#pragma GCC unroll 8
      for (size_t t = 0; t < R; ++t) {
        const __m256 scale = _mm256_mul_ps(dw, _mm256_broadcast_ss(scales + t));
        acc[t] = _mm256_fmadd_ps(_mm256_cvtepi32_ps(sum[t]), scale, acc[t]);
      }
      d += kScaleBytes;
      codes += kBlockCodes;
      x += 32 * R;
      scales += R;
    }
    panel = codes;
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

// A panel stays in L1 or L2 while all groups of rows pass over it, and needs no unpacking.
void MultiplyQ8(WeightType /*type*/, const uint8_t* panels, size_t n_panels, const PreparedRows& x,
                float* out, size_t out_stride, uint8_t* /*scratch*/) {
  const size_t panel_bytes = PanelBytes(WeightType::kQ8_0, x.k);
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
