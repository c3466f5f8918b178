// F32, F16 and BF16 weights on AVX2: one fma chain an output, k rising; activations as they are.
//
// A chain waits 4 cycles for each fma, so a tile keeps several chains in flight: 4 panels of one or
// two rows, 2 panels of three or four.
#include "engine/kernels/avx2_matmul.h"
#include "engine/pack.h"

namespace potluck {
namespace avx2 {
namespace {

struct F32 {
  static constexpr size_t kStep = 32;  // bytes of 8 rows at one k
  static __m256 LoadRows(const uint8_t* at) { return _mm256_castsi256_ps(Load(at)); }
};
struct F16 {
  static constexpr size_t kStep = 16;
  static __m256 LoadRows(const uint8_t* at) { return LoadHalves(at); }
};
struct BF16 {
  static constexpr size_t kStep = 16;
  static __m256 LoadRows(const uint8_t* at) {
    const __m128i halves = _mm_loadu_si128(reinterpret_cast<const __m128i*>(at));
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(halves), 16));
  }
};

// P panels times S rows of a group, from its row `lane` on; out is the output of that row and the
// first panel.
template <class Type, size_t P, size_t S>
void MultiplyTile(const uint8_t* panels, size_t panel_bytes, size_t k, const uint8_t* data,
                  const RowGroup& group, size_t lane, float* out, size_t out_stride) {
  const float* x = reinterpret_cast<const float*>(data + group.codes) + lane;
  __m256 acc[P][S];
  for (size_t p = 0; p < P; ++p) {
    for (size_t t = 0; t < S; ++t) acc[p][t] = _mm256_setzero_ps();
  }
  for (size_t i = 0; i < k; ++i, panels += Type::kStep, x += group.rows) {
    for (size_t p = 0; p < P; ++p) {
      const __m256 w = Type::LoadRows(panels + p * panel_bytes);
      for (size_t t = 0; t < S; ++t)
        acc[p][t] = _mm256_fmadd_ps(w, _mm256_broadcast_ss(x + t), acc[p][t]);
    }
  }
  for (size_t p = 0; p < P; ++p) {
    for (size_t t = 0; t < S; ++t) _mm256_storeu_ps(out + t * out_stride + 8 * p, acc[p][t]);
  }
}

// P panels times a whole group, by tiles of up to 8 sums.
template <class Type, size_t P>
void MultiplyGroup(const uint8_t* panels, size_t panel_bytes, size_t k, const uint8_t* data,
                   const RowGroup& group, float* out, size_t out_stride) {
  size_t lane = 0;
  while (lane < group.rows) {
    const size_t left = group.rows - lane;
    float* to = out + lane * out_stride;
    if (P < 4 && left >= 4) {
      MultiplyTile<Type, P, 4>(panels, panel_bytes, k, data, group, lane, to, out_stride);
      lane += 4;
    } else if (P < 4 && left == 3) {
      MultiplyTile<Type, P, 3>(panels, panel_bytes, k, data, group, lane, to, out_stride);
      lane += 3;
    } else if (left >= 2) {
      MultiplyTile<Type, P, 2>(panels, panel_bytes, k, data, group, lane, to, out_stride);
      lane += 2;
    } else {
      MultiplyTile<Type, P, 1>(panels, panel_bytes, k, data, group, lane, to, out_stride);
      lane += 1;
    }
  }
}

template <class Type, size_t P>
void MultiplyRows(const uint8_t* panels, size_t panel_bytes, const PreparedRows& x, float* out,
                  size_t out_stride) {
  for (size_t index = 0; index < GroupCount(x.grain, x.rows); ++index) {
    const RowGroup group = GroupAt(x.grain, x.rows, x.k, index);
    MultiplyGroup<Type, P>(panels, panel_bytes, x.k, x.data, group, out + group.first * out_stride,
                           out_stride);
  }
}

template <class Type>
void MultiplyPanels(const uint8_t* panels, size_t n_panels, const PreparedRows& x, float* out,
                    size_t out_stride) {
  const size_t panel_bytes = x.k * Type::kStep;
  size_t p = 0;
  if (x.rows <= 2) {
    for (; p + 4 <= n_panels; p += 4) {
      MultiplyRows<Type, 4>(panels + p * panel_bytes, panel_bytes, x, out + 8 * p, out_stride);
    }
  }
  for (; p + 2 <= n_panels; p += 2) {
    MultiplyRows<Type, 2>(panels + p * panel_bytes, panel_bytes, x, out + 8 * p, out_stride);
  }
  if (p < n_panels)
    MultiplyRows<Type, 1>(panels + p * panel_bytes, panel_bytes, x, out + 8 * p, out_stride);
}

}  // namespace

void MultiplyFloat(WeightType type, const uint8_t* panels, size_t n_panels, const PreparedRows& x,
                   float* out, size_t out_stride, uint8_t* /*scratch*/) {
  if (type == WeightType::kF32) {
    MultiplyPanels<F32>(panels, n_panels, x, out, out_stride);
  } else if (type == WeightType::kF16) {
    MultiplyPanels<F16>(panels, n_panels, x, out, out_stride);
  } else {
    MultiplyPanels<BF16>(panels, n_panels, x, out, out_stride);
  }
}

}  // namespace avx2
}  // namespace potluck
