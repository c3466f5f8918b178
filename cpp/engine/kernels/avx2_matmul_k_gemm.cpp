// K types on AVX2, many rows: tiles of 4 rows of activations and 16 rows of weights (2 panels),
// whose codes and scales are unpacked once for a band of rows. Depths: avx2_matmul_k.cpp.
#include "engine/kernels/avx2_k_types.h"

namespace potluck {
namespace avx2 {
namespace {

constexpr size_t kBandRows = 128;  // rows that share one unpacking; their sums take 8 KiB
constexpr size_t kUnits = 16;      // at most, of a record

// A record of two panels, unpacked, and the outputs of a band of rows so far.
struct Chunk {
  uint8_t codes[256 * 16];     // [64 groups of 4 k][2 panels][32]
  __m256i scales[2 * kUnits];  // pairs, [unit][2 panels]
  __m256i mins[2 * 8];         // pairs, [w][2 panels]
  __m256i totals[8];           // of a tile, [row][2 panels]
  float d[16];                 // of the 16 rows of weights
  float dmin[16];
  float sums[kBandRows * 16];  // [band row][16]
};
static_assert(sizeof(Chunk) <= kScratchBytes, "fits into a thread's scratch");

template <size_t G, class Type>
inline void UnpackRun(Type type, const uint8_t* run, uint8_t* to) {
  Store(to + 64 * G, Codes<G>(type, run));
}

// One of the two panels (side 0 or 1).
template <class Type>
void Unpack(const uint8_t* record, size_t side, Chunk& chunk) {
  constexpr Type kType;
  SubScales sub;
  ReadSubScales(kType, record + Type::kFields, sub);
  const uint8_t* run = record + Type::kRuns;
  uint8_t* to = chunk.codes + 32 * side;
  for (size_t i = 0; i < 8; ++i, run += Type::kRunBytes, to += 512) {
    UnpackRun<0>(kType, run, to);
    UnpackRun<1>(kType, run, to);
    UnpackRun<2>(kType, run, to);
    UnpackRun<3>(kType, run, to);
    UnpackRun<4>(kType, run, to);
    UnpackRun<5>(kType, run, to);
    UnpackRun<6>(kType, run, to);
    UnpackRun<7>(kType, run, to);
    constexpr size_t kUnitsOfRun = 8 / Type::kUnitVectors;
    for (size_t u = 0; u < kUnitsOfRun; ++u)
      chunk.scales[2 * (kUnitsOfRun * i + u) + side] = ScalePairs<Type>(sub, i, u);
    if (Type::kHasMin) chunk.mins[2 * i + side] = MinPairs<Type>(sub, i);
  }
  _mm256_storeu_ps(chunk.d + 8 * side, LoadHalves(record));
  if (Type::kHasMin) _mm256_storeu_ps(chunk.dmin + 8 * side, LoadHalves(record + kHalvesBytes));
}

inline void AddScaled(__m256i* total, __m256i sum, const __m256i* pairs) {
  _mm256_store_si256(
      total, _mm256_add_epi32(_mm256_load_si256(total), WidenPairs(sum, _mm256_load_si256(pairs))));
}

// Adds a unit of 16 or 32 values to the totals of S rows; named sums, for gcc spills an array.
template <class Type, size_t S>
inline void AddUnit(const uint8_t* w, const __m256i* scales, const uint8_t* x, const uint8_t* seeds,
                    __m256i* totals) {
  __m256i a0 = UnitSeed<Type>(seeds), a1 = UnitSeed<Type>(seeds + 4);
  __m256i a2 = UnitSeed<Type>(seeds + 8);
  __m256i a3 = S < 4 ? _mm256_setzero_si256() : UnitSeed<Type>(seeds + 12);
  __m256i b0 = a0, b1 = a1, b2 = a2, b3 = a3;
#pragma GCC unroll 8
  for (size_t g = 0; g < Type::kUnitVectors; ++g) {
    const __m256i w0 = Load(w + 64 * g);
    const __m256i w1 = Load(w + 64 * g + 32);
    const uint8_t* xg = x + 4 * S * g;
    __m256i xt = Broadcast(xg);
    a0 = AddProducts(a0, w0, xt);
    b0 = AddProducts(b0, w1, xt);
    xt = Broadcast(xg + 4);
    a1 = AddProducts(a1, w0, xt);
    b1 = AddProducts(b1, w1, xt);
    xt = Broadcast(xg + 8);
    a2 = AddProducts(a2, w0, xt);
    b2 = AddProducts(b2, w1, xt);
    if (S == 4) {
      xt = Broadcast(xg + 12);
      a3 = AddProducts(a3, w0, xt);
      b3 = AddProducts(b3, w1, xt);
    }
    POTLUCK_ORDER_LOADS();
  }
  AddScaled(totals, a0, scales);
  AddScaled(totals + 1, b0, scales + 1);
  AddScaled(totals + 2, a1, scales);
  AddScaled(totals + 3, b1, scales + 1);
  AddScaled(totals + 4, a2, scales);
  AddScaled(totals + 5, b2, scales + 1);
  if (S < 4) return;
  AddScaled(totals + 6, a3, scales);
  AddScaled(totals + 7, b3, scales + 1);
}

// Sum of min times sum of activations, one row of a group, one panel.
template <size_t S>
inline __m256i MinsOf(const __m256i* mins, const uint8_t* sums) {
  __m256i total = _mm256_setzero_si256();
#pragma GCC unroll 8
  for (size_t w = 0; w < 8; ++w) {
    const __m256i pairs = _mm256_load_si256(mins + 2 * w);
    total = _mm256_add_epi32(total, _mm256_madd_epi16(pairs, Broadcast(sums + 4 * S * w)));
  }
  return total;
}

// c[S rows][16] += record b of two panels times a group of S rows.
template <class Type, size_t S>
__attribute__((noinline)) void AddTile(Chunk& chunk, size_t b, const uint8_t* data,
                                       const RowGroup& group, float* c) {
  const uint8_t* x = data + group.codes + b * 256 * S;
  const uint8_t* seeds = data + group.seeds + b * 64 * S;
  const uint8_t* sums = data + group.sums + b * 32 * S;
  const float* scales = reinterpret_cast<const float*>(data + group.scales) + b * S;
  for (__m256i& total : chunk.totals) total = _mm256_setzero_si256();
  const uint8_t* w = chunk.codes;
  for (size_t unit = 0; unit < 64 / Type::kUnitVectors; ++unit) {
    AddUnit<Type, S>(w, chunk.scales + 2 * unit, x, seeds, chunk.totals);
    w += 64 * Type::kUnitVectors;
    x += 4 * S * Type::kUnitVectors;
    seeds += S * Type::kUnitVectors;
  }
  for (size_t t = 0; t < S; ++t) {
    for (size_t side = 0; side < 2; ++side) {
      const __m256i mins =
          Type::kHasMin ? MinsOf<S>(chunk.mins + side, sums + 4 * t) : _mm256_setzero_si256();
      float* at = c + 16 * t + 8 * side;
      const __m256 d = _mm256_loadu_ps(chunk.d + 8 * side);
      const __m256 dmin = Type::kHasMin ? _mm256_loadu_ps(chunk.dmin + 8 * side) : d;
      _mm256_storeu_ps(at, AddRecord<Type>(_mm256_loadu_ps(at), chunk.totals[2 * t + side], mins, d,
                                           dmin, scales + t));
    }
  }
}

// Two panels times the groups [first_group, last_group), at most kBandRows rows.
template <class Type>
void MultiplyBand(const uint8_t* panels, const PreparedRows& x, size_t first_group,
                  size_t last_group, float* out, size_t out_stride, Chunk& chunk) {
  const size_t records = x.k / 256;
  __builtin_memset(chunk.sums, 0, (last_group - first_group) * kTileRows * 16 * sizeof(float));
  for (size_t b = 0; b < records; ++b) {
    Unpack<Type>(panels + b * Type::kRecordBytes, 0, chunk);
    Unpack<Type>(panels + (records + b) * Type::kRecordBytes, 1, chunk);
    float* c = chunk.sums;
    for (size_t index = first_group; index < last_group; ++index, c += kTileRows * 16) {
      const RowGroup group = GroupAt(x.grain, x.rows, x.k, index);
      if (group.rows == kTileRows) {
        AddTile<Type, 4>(chunk, b, x.data, group, c);
      } else {
        AddTile<Type, 3>(chunk, b, x.data, group, c);
      }
    }
  }
  const float* c = chunk.sums;
  for (size_t index = first_group; index < last_group; ++index, c += kTileRows * 16) {
    const RowGroup group = GroupAt(x.grain, x.rows, x.k, index);
    for (size_t t = 0; t < group.rows; ++t) {
      float* to = out + (group.first + t) * out_stride;
      _mm256_storeu_ps(to, _mm256_loadu_ps(c + 16 * t));
      _mm256_storeu_ps(to + 8, _mm256_loadu_ps(c + 16 * t + 8));
    }
  }
}

template <class Type>
size_t MultiplyAll(const uint8_t* panels, size_t n_panels, const PreparedRows& x, float* out,
                   size_t out_stride, uint8_t* scratch) {
  constexpr size_t kBandGroups = kBandRows / kTileRows;
  Chunk& chunk = *reinterpret_cast<Chunk*>(scratch);
  const size_t panel_bytes = x.k / 256 * Type::kRecordBytes;
  const size_t groups = GroupCount(x.grain, x.rows);
  size_t p = 0;
  for (; p + 2 <= n_panels; p += 2) {
    for (size_t first = 0; first < groups; first += kBandGroups) {
      const size_t last = first + kBandGroups < groups ? first + kBandGroups : groups;
      MultiplyBand<Type>(panels + p * panel_bytes, x, first, last, out + 8 * p, out_stride, chunk);
    }
  }
  return p;
}

}  // namespace

size_t MultiplyKPairs(WeightType type, const uint8_t* panels, size_t n_panels,
                      const PreparedRows& x, float* out, size_t out_stride, uint8_t* scratch) {
  switch (type) {
    case WeightType::kQ2_K:
      return MultiplyAll<Q2_K>(panels, n_panels, x, out, out_stride, scratch);
    case WeightType::kQ3_K:
      return MultiplyAll<Q3_K>(panels, n_panels, x, out, out_stride, scratch);
    case WeightType::kQ4_K:
      return MultiplyAll<Q4_K>(panels, n_panels, x, out, out_stride, scratch);
    case WeightType::kQ5_K:
      return MultiplyAll<Q5_K>(panels, n_panels, x, out, out_stride, scratch);
    default:
      return MultiplyAll<Q6_K>(panels, n_panels, x, out, out_stride, scratch);
  }
}

}  // namespace avx2
}  // namespace potluck
