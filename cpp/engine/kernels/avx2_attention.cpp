// Attention for AVX2, FMA and F16C: the scalar chains, lanes being positions (scores) or dimensions
// (sums).
//
// Query rows are taken up to six at a time, so that a key or value is loaded and widened once for
// all of them; the template's numbers of rows and vectors keep all accumulators in the 16
// registers.
#include <immintrin.h>
#include <stddef.h>
#include <stdint.h>

#include "engine/kernels/attention_table.h"
#include "engine/kernels/avx2_exp.h"

namespace potluck {
namespace {

constexpr size_t kGroup = 8;  // positions a key group, and lanes
constexpr size_t kPage = 16;  // positions a page
constexpr size_t kMostRows = 6;
constexpr size_t kVectors = kTilePositions / kGroup;

inline __m256 Widen(const uint16_t* halves) {
  return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(halves)));
}

// All ones in the lanes below count.
inline __m256 MaskOf(size_t count) {
  const __m256i lanes = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
  return _mm256_castsi256_ps(
      _mm256_cmpgt_epi32(_mm256_set1_epi32(static_cast<int32_t>(count)), lanes));
}

// sums[r][i] = fma(weights[r], wide[i], sums[r][i]), in the order that needs the fewest registers:
// the smaller side is held, the larger one passes by.
template <size_t Rows, size_t Count>
inline void AddProducts(const float* const* weights, size_t at, const uint16_t* const* wide,
                        size_t from, __m256 (&sums)[Rows][Count]) {
  if constexpr (Rows < Count) {
    __m256 weight[Rows];
    for (size_t r = 0; r < Rows; ++r) weight[r] = _mm256_broadcast_ss(weights[r] + at);
    for (size_t i = 0; i < Count; ++i) {
      const __m256 value = Widen(wide[i] + from);
      for (size_t r = 0; r < Rows; ++r) sums[r][i] = _mm256_fmadd_ps(weight[r], value, sums[r][i]);
      // Keeps the compiler from loading all values first, which would spill.
      asm volatile("" ::: "memory");
    }
  } else {
    __m256 value[Count];
    for (size_t i = 0; i < Count; ++i) value[i] = Widen(wide[i] + from);
    for (size_t r = 0; r < Rows; ++r) {
      const __m256 weight = _mm256_broadcast_ss(weights[r] + at);
      for (size_t i = 0; i < Count; ++i) sums[r][i] = _mm256_fmadd_ps(weight, value[i], sums[r][i]);
    }
  }
}

// Scores of `Rows` query rows with `Groups` key groups, Rows * Groups chains at once. scores is
// [Rows][64].
template <size_t Rows, size_t Groups>
void ScoreGroups(const uint16_t* const* keys, size_t head_dim, const float* const* q,
                 float* scores) {
  __m256 sums[Rows][Groups];
  for (size_t r = 0; r < Rows; ++r) {
    for (size_t g = 0; g < Groups; ++g) sums[r][g] = _mm256_setzero_ps();
  }
  for (size_t d = 0; d < head_dim; ++d) {
    AddProducts<Rows, Groups>(q, d, keys, d * kGroup, sums);
  }
  for (size_t r = 0; r < Rows; ++r) {
    for (size_t g = 0; g < Groups; ++g) {
      _mm256_store_ps(scores + r * kTilePositions + g * kGroup, sums[r][g]);
    }
  }
}

template <size_t Rows, size_t Groups>
void Score(const KvTile& tile, size_t head_dim, size_t n_groups, const float* const* q,
           float* scores) {
  size_t g = 0;
  for (; g + Groups <= n_groups; g += Groups) {
    ScoreGroups<Rows, Groups>(tile.keys + g, head_dim, q, scores + g * kGroup);
  }
  for (; g < n_groups; ++g) {
    ScoreGroups<Rows, 1>(tile.keys + g, head_dim, q, scores + g * kGroup);
  }
}

inline float LargestOf(__m256 lanes) {
  __m128 four = _mm_max_ps(_mm256_castps256_ps128(lanes), _mm256_extractf128_ps(lanes, 1));
  four = _mm_max_ps(four, _mm_movehl_ps(four, four));
  return _mm_cvtss_f32(_mm_max_ss(four, _mm_shuffle_ps(four, four, 1)));
}

inline float Tree(__m256 lanes) {
  const __m128 four = _mm_add_ps(_mm256_castps256_ps128(lanes), _mm256_extractf128_ps(lanes, 1));
  const __m128 two = _mm_add_ps(four, _mm_movehl_ps(four, four));
  return _mm_cvtss_f32(_mm_add_ss(two, _mm_shuffle_ps(two, two, 1)));
}

inline __m256 Load(const float* x) { return _mm256_loadu_ps(x); }
inline float ExpOf(float x) { return _mm256_cvtss_f32(Exp8(_mm256_set1_ps(x))); }

void Scale(float factor, size_t head_dim, float* o) {
  const __m256 factors = _mm256_set1_ps(factor);
  size_t d = 0;
  for (; d + kGroup <= head_dim; d += kGroup) {
    _mm256_storeu_ps(o + d, _mm256_mul_ps(Load(o + d), factors));
  }
  for (; d < head_dim; ++d) o[d] = o[d] * factor;
}

// Scores become weights. Lanes at or above n may hold anything: they count as -infinity and get the
// weight 0, which changes no sum (a lane's sum is never -0).
void Weigh(size_t head_dim, size_t n, float* scores, float* state) {
  const size_t n_vectors = (n + kGroup - 1) / kGroup;
  const __m256 lowest = _mm256_set1_ps(-__builtin_inff());
  const __m256 mask = MaskOf(n - (n_vectors - 1) * kGroup);
  float* const last = scores + (n_vectors - 1) * kGroup;
  _mm256_store_ps(last, _mm256_blendv_ps(lowest, _mm256_load_ps(last), mask));
  __m256 largest = _mm256_load_ps(scores);
  for (size_t v = 1; v < n_vectors; ++v) {
    largest = _mm256_max_ps(largest, _mm256_load_ps(scores + v * kGroup));
  }
  const float tile_largest = LargestOf(largest);
  float m = state[head_dim];
  float l = state[head_dim + 1];
  if (tile_largest > m) {
    const float factor = ExpOf(m - tile_largest);
    Scale(factor, head_dim, state);
    l = l * factor;
    m = tile_largest;
  }
  const __m256 shift = _mm256_set1_ps(m);
  __m256 sums = _mm256_setzero_ps();
  for (size_t v = 0; v < n_vectors; ++v) {
    float* const place = scores + v * kGroup;
    const __m256 weights = Exp8(_mm256_sub_ps(_mm256_load_ps(place), shift));
    _mm256_store_ps(place, weights);
    sums = _mm256_add_ps(sums, weights);
  }
  state[head_dim] = m;
  state[head_dim + 1] = l + Tree(sums);
}

// Adds the weighted values of dimensions [d, d + 8 * Vectors) to Rows states.
template <size_t Rows, size_t Vectors>
void MixVectors(const KvTile& tile, size_t head_dim, size_t n, size_t d, const float* weights,
                float* const* states) {
  __m256 sums[Rows][Vectors];
  for (size_t r = 0; r < Rows; ++r) {
    for (size_t v = 0; v < Vectors; ++v) sums[r][v] = Load(states[r] + d + v * kGroup);
  }
  const float* weight[Rows];
  for (size_t r = 0; r < Rows; ++r) weight[r] = weights + r * kTilePositions;
  for (size_t j = 0; j < n; ++j) {
    const uint16_t* const row = tile.values[j / kPage] + j % kPage * head_dim + d;
    const uint16_t* value[Vectors];
    for (size_t v = 0; v < Vectors; ++v) value[v] = row + v * kGroup;
    AddProducts<Rows, Vectors>(weight, j, value, 0, sums);
  }
  for (size_t r = 0; r < Rows; ++r) {
    for (size_t v = 0; v < Vectors; ++v) _mm256_storeu_ps(states[r] + d + v * kGroup, sums[r][v]);
  }
}

// The one dimension d, for heads that are no multiple of 8.
template <size_t Rows>
void MixOne(const KvTile& tile, size_t head_dim, size_t n, size_t d, const float* weights,
            float* const* states) {
  for (size_t r = 0; r < Rows; ++r) {
    __m128 sum = _mm_set_ss(states[r][d]);
    for (size_t j = 0; j < n; ++j) {
      const uint16_t half = tile.values[j / kPage][j % kPage * head_dim + d];
      const __m128 value = _mm_cvtph_ps(_mm_cvtsi32_si128(half));
      sum = _mm_fmadd_ss(_mm_load_ss(weights + r * kTilePositions + j), value, sum);
    }
    states[r][d] = _mm_cvtss_f32(sum);
  }
}

template <size_t Rows, size_t Vectors>
void Mix(const KvTile& tile, size_t head_dim, size_t n, const float* weights,
         float* const* states) {
  size_t d = 0;
  for (; d + Vectors * kGroup <= head_dim; d += Vectors * kGroup) {
    MixVectors<Rows, Vectors>(tile, head_dim, n, d, weights, states);
  }
  for (; d + kGroup <= head_dim; d += kGroup) {
    MixVectors<Rows, 1>(tile, head_dim, n, d, weights, states);
  }
  for (; d < head_dim; ++d) MixOne<Rows>(tile, head_dim, n, d, weights, states);
}

// Groups and Vectors: enough chains at once to hide the latency of fma, as many as the registers
// hold.
template <size_t Rows, size_t Groups, size_t Vectors>
void AddRows(const KvTile& tile, size_t head_dim, size_t n, const float* const* q,
             float* const* states) {
  alignas(32) float weights[Rows * kTilePositions] = {};
  Score<Rows, Groups>(tile, head_dim, (n + kGroup - 1) / kGroup, q, weights);
  for (size_t r = 0; r < Rows; ++r) Weigh(head_dim, n, weights + r * kTilePositions, states[r]);
  Mix<Rows, Vectors>(tile, head_dim, n, weights, states);
}

void AddTile(const KvTile& tile, size_t head_dim, size_t n, const float* const* q,
             float* const* states, size_t n_rows) {
  static_assert(kVectors == kTileGroups, "a vector holds a key group");
  for (; n_rows >= kMostRows; n_rows -= kMostRows, q += kMostRows, states += kMostRows) {
    AddRows<kMostRows, 2, 2>(tile, head_dim, n, q, states);
  }
  switch (n_rows) {
    case 1:
      return AddRows<1, 8, 8>(tile, head_dim, n, q, states);
    case 2:
      return AddRows<2, 4, 4>(tile, head_dim, n, q, states);
    case 3:
      return AddRows<3, 4, 4>(tile, head_dim, n, q, states);
    case 4:
      return AddRows<4, 2, 2>(tile, head_dim, n, q, states);
    case 5:
      return AddRows<5, 2, 2>(tile, head_dim, n, q, states);
    default:
      return;
  }
}

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
  for (; d + kGroup <= head_dim; d += kGroup) {
    const __m256 scaled = _mm256_mul_ps(Load(into + d), _mm256_set1_ps(a));
    _mm256_storeu_ps(into + d, _mm256_fmadd_ps(Load(from + d), _mm256_set1_ps(b), scaled));
  }
  for (; d < head_dim; ++d) into[d] = __builtin_fmaf(from[d], b, into[d] * a);
}

void Finish(const float* state, size_t head_dim, float* out) {
  const float l = state[head_dim + 1];
  size_t d = 0;
  for (; d + kGroup <= head_dim; d += kGroup) {
    _mm256_storeu_ps(out + d, _mm256_div_ps(Load(state + d), _mm256_set1_ps(l)));
  }
  for (; d < head_dim; ++d) out[d] = state[d] / l;
}

inline bool IsFinite(__m128i halves) {
  const __m128i exponent = _mm_set1_epi16(0x7c00);
  const __m128i full = _mm_cmpeq_epi16(_mm_and_si128(halves, exponent), exponent);
  return _mm_movemask_epi8(full) == 0;
}

inline __m128i Narrow(__m256 values) {
  return _mm256_cvtps_ph(values, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
}

bool StoreKey(const float* key, size_t head_dim, size_t lane, uint16_t* group) {
  bool finite = true;
  size_t d = 0;
  for (; d + kGroup <= head_dim; d += kGroup) {
    alignas(16) uint16_t halves[kGroup];
    const __m128i narrow = Narrow(Load(key + d));
    finite &= IsFinite(narrow);
    _mm_store_si128(reinterpret_cast<__m128i*>(halves), narrow);
    for (size_t i = 0; i < kGroup; ++i) group[(d + i) * kGroup + lane] = halves[i];
  }
  for (; d < head_dim; ++d) {
    const __m128i narrow = Narrow(_mm256_castps128_ps256(_mm_load_ss(key + d)));
    const auto half = static_cast<uint16_t>(_mm_extract_epi16(narrow, 0));
    finite &= (half & 0x7c00) != 0x7c00;
    group[d * kGroup + lane] = half;
  }
  return finite;
}

bool StoreValue(const float* value, size_t head_dim, uint16_t* out) {
  bool finite = true;
  size_t d = 0;
  for (; d + kGroup <= head_dim; d += kGroup) {
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

constexpr AttentionTable kTable = {AddTile, Merge, Finish, StoreKey, StoreValue};

}  // namespace

const AttentionTable* Avx2AttentionTable() { return &kTable; }

}  // namespace potluck
