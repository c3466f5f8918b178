// F32, F16 and BF16 weights on AVX-512: one fma chain an output, k rising; activations as they are.
//
// A vector holds one k of two panels. A chain waits 4 cycles for each of two fma a cycle, so a tile
// keeps at least 8 chains in flight where there are rows for that. For many rows the weights of a
// chunk of K are made f32 once.
#include "engine/kernels/avx512vnni_matmul.h"

namespace potluck {
namespace avx512vnni {
namespace {

constexpr size_t kPrefetchBytes = 4096;
// From so many rows on widening pays for 8 panels, and for 4, which it serves less: below, a tile
// that widens as it goes is faster (Zen 5: 12 rows of F16, 8 panels, by a third).
constexpr size_t kRowsForEight = 40;
constexpr size_t kRowsForFour = 97;
constexpr size_t kMostVectors = 4;  // of a tile of many rows: 8 panels
constexpr size_t kChunk = 128;      // k; widened weights of 8 panels take 32 KiB of L1 and L2

struct F32 {
  static constexpr size_t kStep = 32;  // bytes of 8 rows at one k
  static __m512 LoadRows(const uint8_t* first, const uint8_t* second) {
    return _mm512_castsi512_ps(LoadTwo(first, second));
  }
};
struct F16 {
  static constexpr size_t kStep = 16;
  static __m512 LoadRows(const uint8_t* first, const uint8_t* second) {
    return LoadTwoScales(first, second);
  }
};
struct BF16 {
  static constexpr size_t kStep = 16;
  static __m512 LoadRows(const uint8_t* first, const uint8_t* second) {
    const __m128i low = _mm_loadu_si128(reinterpret_cast<const __m128i*>(first));
    const __m128i high = _mm_loadu_si128(reinterpret_cast<const __m128i*>(second));
    const __m256i both = _mm256_inserti128_si256(_mm256_castsi128_si256(low), high, 1);
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(both), 16));
  }
};

// V vectors (2 V panels) times S rows of a group, from its row `lane` on; out is the output of that
// row and the first panel.
template <class Type, size_t V, size_t S>
void MultiplyTile(const uint8_t* panels, size_t panel_bytes, size_t k, const uint8_t* data,
                  const RowGroup& group, size_t lane, float* out, size_t out_stride) {
  const float* x = reinterpret_cast<const float*>(data + group.codes) + lane;
  __m512 acc[V][S];
#pragma GCC unroll 4
  for (size_t v = 0; v < V; ++v) {
#pragma GCC unroll 4
    for (size_t t = 0; t < S; ++t) acc[v][t] = _mm512_setzero_ps();
  }
  for (size_t i = 0; i < k; ++i, panels += Type::kStep, x += group.rows) {
#pragma GCC unroll 4
    for (size_t v = 0; v < V; ++v) {
      const uint8_t* first = panels + 2 * v * panel_bytes;
      if (i % (64 / Type::kStep) == 0) {
        _mm_prefetch(reinterpret_cast<const char*>(first + kPrefetchBytes), _MM_HINT_T0);
        _mm_prefetch(reinterpret_cast<const char*>(first + panel_bytes + kPrefetchBytes),
                     _MM_HINT_T0);
      }
      const __m512 w = Type::LoadRows(first, first + panel_bytes);
#pragma GCC unroll 4
      for (size_t t = 0; t < S; ++t)
        acc[v][t] = _mm512_fmadd_ps(w, _mm512_set1_ps(x[t]), acc[v][t]);
    }
  }
#pragma GCC unroll 4
  for (size_t v = 0; v < V; ++v) {
#pragma GCC unroll 4
    for (size_t t = 0; t < S; ++t) _mm512_storeu_ps(out + t * out_stride + 16 * v, acc[v][t]);
  }
}

template <class Type, size_t V>
void MultiplyGroup(const uint8_t* panels, size_t panel_bytes, size_t k, const uint8_t* data,
                   const RowGroup& group, float* out, size_t out_stride) {
  for (size_t lane = 0; lane < group.rows; lane += kTileRows) {
    float* to = out + lane * out_stride;
    switch (group.rows - lane) {
      case 1:
        MultiplyTile<Type, V, 1>(panels, panel_bytes, k, data, group, lane, to, out_stride);
        break;
      case 2:
        MultiplyTile<Type, V, 2>(panels, panel_bytes, k, data, group, lane, to, out_stride);
        break;
      case 3:
        MultiplyTile<Type, V, 3>(panels, panel_bytes, k, data, group, lane, to, out_stride);
        break;
      default:
        MultiplyTile<Type, V, 4>(panels, panel_bytes, k, data, group, lane, to, out_stride);
    }
  }
}

template <class Type, size_t V>
void MultiplyRows(const uint8_t* panels, size_t panel_bytes, const PreparedRows& x, float* out,
                  size_t out_stride) {
  for (size_t index = 0; index < GroupCount(x.grain, x.rows); ++index) {
    const RowGroup group = GroupAt(x.grain, x.rows, x.k, index);
    MultiplyGroup<Type, V>(panels, panel_bytes, x.k, x.data, group, out + group.first * out_stride,
                           out_stride);
  }
}

// k [first, last) of 2 V panels, widened: [k][16 V].
template <class Type, size_t V>
void Widen(const uint8_t* panels, size_t panel_bytes, size_t first, size_t last, float* to) {
  for (size_t i = first; i < last; ++i) {
#pragma GCC unroll 4
    for (size_t v = 0; v < V; ++v, to += 16) {
      const uint8_t* at = panels + 2 * v * panel_bytes + i * Type::kStep;
      _mm512_store_ps(to, Type::LoadRows(at, at + panel_bytes));
    }
  }
}

// Goes on with the outputs of S rows and 2 V panels over k [first, last) of widened weights.
template <size_t V, size_t S>
__attribute__((noinline)) void AddTile(const float* w, size_t first, size_t last, const float* x,
                                       float* out, size_t out_stride) {
  __m512 acc[V][S];
#pragma GCC unroll 4
  for (size_t v = 0; v < V; ++v) {
#pragma GCC unroll 4
    for (size_t t = 0; t < S; ++t) {
      acc[v][t] = first == 0 ? _mm512_setzero_ps() : _mm512_loadu_ps(out + t * out_stride + 16 * v);
    }
  }
  for (size_t i = first; i < last; ++i, w += 16 * V) {
    __m512 wi[V];
#pragma GCC unroll 4
    for (size_t v = 0; v < V; ++v) wi[v] = _mm512_load_ps(w + 16 * v);
#pragma GCC unroll 4
    for (size_t t = 0; t < S; ++t) {
      const __m512 xt = _mm512_set1_ps(x[i * S + t]);
#pragma GCC unroll 4
      for (size_t v = 0; v < V; ++v) acc[v][t] = _mm512_fmadd_ps(wi[v], xt, acc[v][t]);
    }
  }
#pragma GCC unroll 4
  for (size_t v = 0; v < V; ++v) {
#pragma GCC unroll 4
    for (size_t t = 0; t < S; ++t) _mm512_storeu_ps(out + t * out_stride + 16 * v, acc[v][t]);
  }
}

template <class Type, size_t V>
void MultiplyWide(const uint8_t* panels, size_t panel_bytes, const PreparedRows& x, float* out,
                  size_t out_stride, float* widened) {
  constexpr size_t kStep = kChunk * kMostVectors / V;
  static_assert(kStep * 16 * V * sizeof(float) <= kScratchBytes, "fits into scratch");
  const size_t groups = GroupCount(x.grain, x.rows);
  for (size_t first = 0; first < x.k; first += kStep) {
    const size_t last = first + kStep < x.k ? first + kStep : x.k;
    Widen<Type, V>(panels, panel_bytes, first, last, widened);
    for (size_t index = 0; index < groups; ++index) {
      const RowGroup group = GroupAt(x.grain, x.rows, x.k, index);
      const float* rows = reinterpret_cast<const float*>(x.data + group.codes);
      float* to = out + group.first * out_stride;
      if (group.rows == kTileRows) {
        AddTile<V, 4>(widened, first, last, rows, to, out_stride);
      } else {
        AddTile<V, 3>(widened, first, last, rows, to, out_stride);
      }
    }
  }
}

template <class Type>
size_t MultiplyPanels(const uint8_t* panels, size_t n_panels, const PreparedRows& x, float* out,
                      size_t out_stride, uint8_t* scratch) {
  const size_t panel_bytes = x.k * Type::kStep;
  size_t p = 0;
  float* widened = reinterpret_cast<float*>(scratch);
  for (; x.rows >= kRowsForEight && p + 8 <= n_panels; p += 8)
    MultiplyWide<Type, 4>(panels + p * panel_bytes, panel_bytes, x, out + 8 * p, out_stride,
                          widened);
  for (; x.rows >= kRowsForFour && p + 4 <= n_panels; p += 4)
    MultiplyWide<Type, 2>(panels + p * panel_bytes, panel_bytes, x, out + 8 * p, out_stride,
                          widened);
  for (; p + 4 <= n_panels; p += 4)
    MultiplyRows<Type, 2>(panels + p * panel_bytes, panel_bytes, x, out + 8 * p, out_stride);
  for (; p + 2 <= n_panels; p += 2)
    MultiplyRows<Type, 1>(panels + p * panel_bytes, panel_bytes, x, out + 8 * p, out_stride);
  return p;
}

}  // namespace

size_t MultiplyFloats(WeightType type, const uint8_t* panels, size_t n_panels,
                      const PreparedRows& x, float* out, size_t out_stride, uint8_t* scratch) {
  switch (type) {
    case WeightType::kF32:
      return MultiplyPanels<F32>(panels, n_panels, x, out, out_stride, scratch);
    case WeightType::kF16:
      return MultiplyPanels<F16>(panels, n_panels, x, out, out_stride, scratch);
    default:
      return MultiplyPanels<BF16>(panels, n_panels, x, out, out_stride, scratch);
  }
}

}  // namespace avx512vnni
}  // namespace potluck
