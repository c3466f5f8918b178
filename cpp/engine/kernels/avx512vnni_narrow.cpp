// Up to 8 rows on AVX-512 VNNI: one pass over two panels at once, one in each half of a vector.
#include "engine/kernels/avx512vnni_matmul.h"

namespace potluck {
namespace avx512vnni {
namespace {

constexpr size_t kPrefetchBytes = 4096;  // in each of the two panels

// Fetches both panels kPrefetchBytes ahead of the place that is read, and at their end the next
// two: the bytes behind the first panel are the second one's.
class Prefetch {
 public:
  Prefetch(const PanelShape& shape, const uint8_t* panel)
      : panel_bytes_(shape.panel_bytes),
        block_bytes_(shape.record_bytes / shape.record_blocks),
        left_bytes_(shape.panel_bytes - kPrefetchBytes % shape.panel_bytes),
        at_(panel + kPrefetchBytes + kPrefetchBytes / shape.panel_bytes * shape.panel_bytes) {}

  void NextBlock() {
    for (size_t line = 0; line < block_bytes_; line += 64) {
      _mm_prefetch(reinterpret_cast<const char*>(at_ + line), _MM_HINT_T0);
      _mm_prefetch(reinterpret_cast<const char*>(at_ + panel_bytes_ + line), _MM_HINT_T0);
    }
    at_ += block_bytes_;
    if (left_bytes_ > block_bytes_) {
      left_bytes_ -= block_bytes_;
      return;
    }
    left_bytes_ += panel_bytes_ - block_bytes_;
    at_ += panel_bytes_;
  }

 private:
  size_t panel_bytes_;
  size_t block_bytes_;
  size_t left_bytes_;  // of the panel, from at_ on
  const uint8_t* at_;
};

inline __m512i LoadTwo(const uint8_t* first, const uint8_t* second) {
  const __m256i low = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(first));
  const __m256i high = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(second));
  return _mm512_inserti64x4(_mm512_castsi256_si512(low), high, 1);
}

inline __m512 LoadTwoScales(const uint8_t* first, const uint8_t* second) {
  const __m128i low = _mm_loadu_si128(reinterpret_cast<const __m128i*>(first));
  const __m128i high = _mm_loadu_si128(reinterpret_cast<const __m128i*>(second));
  return _mm512_cvtph_ps(_mm256_inserti128_si256(_mm256_castsi128_si256(low), high, 1));
}

template <size_t R>
inline void AddWord(__m512i (&sum)[R], __m512i w, const uint8_t* x) {
#pragma GCC unroll 8
  for (size_t t = 0; t < R; ++t) sum[t] = _mm512_dpbusd_epi32(sum[t], w, Broadcast(x + 4 * t));
}

// Adds 32 values of 16 rows; the codes of the second panel lie `apart` bytes behind those of the
// first.
template <size_t R>
inline void AddCodes(Q8_0 /*type*/, __m512i (&sum)[R], const uint8_t* codes, size_t apart,
                     const uint8_t* x) {
#pragma GCC unroll 8
  for (size_t v = 0; v < 8; ++v) {
    const __m512i w = LoadTwo(codes + 32 * v, codes + apart + 32 * v);
    AddWord<R>(sum, _mm512_xor_si512(w, _mm512_set1_epi8(-128)), x + 4 * v * R);
  }
}

template <size_t R>
inline void AddNibbles(__m512i (&sum)[R], const uint8_t* codes, size_t apart, const uint8_t* x) {
  const __m512i low = _mm512_set1_epi8(15);
#pragma GCC unroll 4
  for (size_t v = 0; v < 4; ++v) {
    const __m512i both = LoadTwo(codes + 32 * v, codes + apart + 32 * v);
    AddWord<R>(sum, _mm512_and_si512(both, low), x + 4 * v * R);
    AddWord<R>(sum, _mm512_and_si512(_mm512_srli_epi16(both, 4), low), x + 4 * (v + 4) * R);
  }
}
template <size_t R>
inline void AddCodes(Q4_0 /*type*/, __m512i (&sum)[R], const uint8_t* codes, size_t apart,
                     const uint8_t* x) {
  AddNibbles<R>(sum, codes, apart, x);
}
template <size_t R>
inline void AddCodes(Q4_1 /*type*/, __m512i (&sum)[R], const uint8_t* codes, size_t apart,
                     const uint8_t* x) {
  AddNibbles<R>(sum, codes, apart, x);
}

// Two panels times the R rows of a group.
template <class Type, size_t R>
__attribute__((noinline)) void MultiplyTwo(const PanelShape& shape, const uint8_t* panel,
                                           const uint8_t* data, const RowGroup& group, float* out,
                                           size_t out_stride) {
  const size_t apart = shape.panel_bytes;
  const uint8_t* x = data + group.codes;
  const uint8_t* seeds = data + group.seeds;
  const float* scales = reinterpret_cast<const float*>(data + group.scales);
  const float* sums = reinterpret_cast<const float*>(data + group.sums);
  Prefetch prefetch(shape, panel);
  __m512 acc[R];
#pragma GCC unroll 8
  for (size_t t = 0; t < R; ++t) acc[t] = _mm512_setzero_ps();
  for (size_t b = 0; b < shape.blocks; b += shape.record_blocks, panel += shape.record_bytes) {
    const uint8_t* d = panel;
    const uint8_t* codes = panel + shape.codes_offset;
    for (size_t i = 0; i < shape.record_blocks; ++i) {
      prefetch.NextBlock();
      __m512i sum[R];
#pragma GCC unroll 8
      for (size_t t = 0; t < R; ++t) sum[t] = Seed<Type>(seeds + 4 * t);
      AddCodes<R>(Type(), sum, codes, apart, x);
      const __m512 dw = LoadTwoScales(d, d + apart);
      const uint8_t* min = d + kScaleBytes * shape.record_blocks;
      const __m512 mw = Type::kHasMin ? LoadTwoScales(min, min + apart) : dw;
#pragma GCC unroll 8
      for (size_t t = 0; t < R; ++t)
        acc[t] = AddBlock<Type>(acc[t], sum[t], dw, mw, scales + t, sums + t);
      d += kScaleBytes;
      codes += Type::kCodeBytes;
      x += 32 * R;
      seeds += 4 * R;
      scales += R;
      sums += R;
    }
  }
#pragma GCC unroll 8
  for (size_t t = 0; t < R; ++t) _mm512_storeu_ps(out + t * out_stride, acc[t]);
}

template <class Type>
void MultiplyGroup(const PanelShape& shape, const uint8_t* panel, const uint8_t* data,
                   const RowGroup& group, float* out, size_t out_stride) {
  switch (group.rows) {
    case 1:
      return MultiplyTwo<Type, 1>(shape, panel, data, group, out, out_stride);
    case 2:
      return MultiplyTwo<Type, 2>(shape, panel, data, group, out, out_stride);
    case 3:
      return MultiplyTwo<Type, 3>(shape, panel, data, group, out, out_stride);
    case 4:
      return MultiplyTwo<Type, 4>(shape, panel, data, group, out, out_stride);
    case 5:
      return MultiplyTwo<Type, 5>(shape, panel, data, group, out, out_stride);
    case 6:
      return MultiplyTwo<Type, 6>(shape, panel, data, group, out, out_stride);
    case 7:
      return MultiplyTwo<Type, 7>(shape, panel, data, group, out, out_stride);
    default:
      return MultiplyTwo<Type, 8>(shape, panel, data, group, out, out_stride);
  }
}

template <class Type>
size_t MultiplyAll(const uint8_t* panels, size_t p, size_t n_panels, const PreparedRows& x,
                   float* out, size_t out_stride) {
  const PanelShape shape = ShapeOf<Type>(x.k);
  for (; p + 2 <= n_panels; p += 2) {
    for (size_t index = 0; index < GroupCount(x.grain, x.rows); ++index) {
      const RowGroup group = GroupAt(x.grain, x.rows, x.k, index);
      MultiplyGroup<Type>(shape, panels + p * shape.panel_bytes, x.data, group,
                          out + group.first * out_stride + 8 * p, out_stride);
    }
  }
  return p;
}

}  // namespace

size_t MultiplyTwos(WeightType type, const uint8_t* panels, size_t p, size_t n_panels,
                    const PreparedRows& x, float* out, size_t out_stride) {
  if (type == WeightType::kQ4_0) return MultiplyAll<Q4_0>(panels, p, n_panels, x, out, out_stride);
  if (type == WeightType::kQ4_1) return MultiplyAll<Q4_1>(panels, p, n_panels, x, out, out_stride);
  return MultiplyAll<Q8_0>(panels, p, n_panels, x, out, out_stride);
}

}  // namespace avx512vnni
}  // namespace potluck
