// K types on AVX-VNNI: up to 8 rows in one pass over a panel, or tiles of 4 rows of activations and
// 2 panels, unpacked once for a band of rows.
#include "engine/kernels/avxvnni_k_narrow.h"

namespace potluck {
namespace avxvnni {
namespace {

constexpr size_t kBandRows = 128;  // rows that share one unpacking; their sums take 8 KiB

template <class Type>
void MultiplyGroup(const uint8_t* panel, size_t k, const uint8_t* data, const RowGroup& group,
                   float* out, size_t out_stride) {
  switch (group.rows) {
    case 1:
      return MultiplyNarrow<Type, 1>(panel, k, data, group, out, out_stride);
    case 2:
      return MultiplyNarrow<Type, 2>(panel, k, data, group, out, out_stride);
    case 3:
      return MultiplyNarrow<Type, 3>(panel, k, data, group, out, out_stride);
    case 4:
      return MultiplyNarrow<Type, 4>(panel, k, data, group, out, out_stride);
    case 5:
      return MultiplyNarrow<Type, 5>(panel, k, data, group, out, out_stride);
    case 6:
      return MultiplyNarrow<Type, 6>(panel, k, data, group, out, out_stride);
    case 7:
      return MultiplyNarrow<Type, 7>(panel, k, data, group, out, out_stride);
    default:
      return MultiplyNarrow<Type, 8>(panel, k, data, group, out, out_stride);
  }
}

// A record of two panels, unpacked, and the outputs of a band of rows so far.
struct Chunk {
  uint8_t codes[256 * 16];  // [64 groups of 4 k][2 panels][32]
  __m256i scales[2 * 16];   // [sub-block][2 panels]
  __m256i factors[2 * 8];   // pairs, [w][2 panels]
  __m256i totals[8];        // of a tile, [row][2 panels]
  float d[16];              // of the 16 rows of weights
  float dmin[16];
  float sums[kBandRows * 16];  // [band row][16]
};
static_assert(sizeof(Chunk) <= kScratchBytes, "fits into a thread's scratch");

// One of the two panels (side 0 or 1).
template <class Type>
void Unpack(const uint8_t* record, size_t side, Chunk& chunk) {
  constexpr Type kType;
  SubScales sub;
  avx2::ReadSubScales(kType, record + Type::kFields, sub);
  const uint8_t* run = record + Type::kRuns;
  uint8_t* to = chunk.codes + 32 * side;
  for (size_t i = 0; i < 8; ++i, run += Type::kRunBytes, to += 512) {
    Store(to, avx2::Codes<0>(kType, run));
    Store(to + 64, avx2::Codes<1>(kType, run));
    Store(to + 128, avx2::Codes<2>(kType, run));
    Store(to + 192, avx2::Codes<3>(kType, run));
    Store(to + 256, avx2::Codes<4>(kType, run));
    Store(to + 320, avx2::Codes<5>(kType, run));
    Store(to + 384, avx2::Codes<6>(kType, run));
    Store(to + 448, avx2::Codes<7>(kType, run));
    for (size_t s = 0; s < kSubBlocksOfRun<Type>; ++s) {
      const size_t sub_block = kSubBlocksOfRun<Type> * i + s;
      chunk.scales[2 * sub_block + side] = ScaleWords(sub, sub_block);
    }
    chunk.factors[2 * i + side] = FactorPairs<Type>(sub, i);
  }
  _mm256_storeu_ps(chunk.d + 8 * side, LoadHalves(record));
  if (Type::kHasMin) _mm256_storeu_ps(chunk.dmin + 8 * side, LoadHalves(record + kHalvesBytes));
}

inline void AddScaled(__m256i* total, __m256i sum, const __m256i* scales) {
  const __m256i product = _mm256_mullo_epi32(sum, _mm256_load_si256(scales));
  _mm256_store_si256(total, _mm256_add_epi32(_mm256_load_si256(total), product));
}

// Adds a sub-block to the totals of S rows.
template <class Type, size_t S>
inline void AddSubBlock(const uint8_t* w, const __m256i* scales, const uint8_t* x,
                        __m256i* totals) {
  __m256i a0 = _mm256_setzero_si256(), a1 = a0, a2 = a0, a3 = a0, b0 = a0, b1 = a0, b2 = a0,
          b3 = a0;
#pragma GCC unroll 8
  for (size_t g = 0; g < kWords<Type>; ++g) POTLUCK_ADD_TILE_WORD(S, w + 64 * g, x + 4 * S * g);
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

// c[S rows][16] += record b of two panels times a group of S rows.
template <class Type, size_t S>
__attribute__((noinline)) void AddTile(Chunk& chunk, size_t b, const uint8_t* data,
                                       const RowGroup& group, float* c) {
  const uint8_t* x = data + group.codes + b * 256 * S;
  const uint8_t* sums = data + group.sums + b * 32 * S;
  const float* da = reinterpret_cast<const float*>(data + group.scales) + b * S;
  for (__m256i& total : chunk.totals) total = _mm256_setzero_si256();
  const uint8_t* w = chunk.codes;
  for (size_t s = 0; s < 8 * kSubBlocksOfRun<Type>; ++s) {
    AddSubBlock<Type, S>(w, chunk.scales + 2 * s, x, chunk.totals);
    w += 64 * kWords<Type>;
    x += 4 * S * kWords<Type>;
  }
  for (size_t t = 0; t < S; ++t) {
    for (size_t side = 0; side < 2; ++side) {
      __m256i taken = _mm256_setzero_si256();
      for (size_t i = 0; i < 8; ++i) {
        const __m256i factors = _mm256_load_si256(chunk.factors + 2 * i + side);
        taken = AddPairs(taken, factors, Broadcast(sums + 4 * (S * i + t)));
      }
      float* at = c + 16 * t + 8 * side;
      const __m256 d = _mm256_loadu_ps(chunk.d + 8 * side);
      const __m256 dmin = Type::kHasMin ? _mm256_loadu_ps(chunk.dmin + 8 * side) : d;
      _mm256_storeu_ps(at, AddTotals<Type>(_mm256_loadu_ps(at), chunk.totals[2 * t + side], taken,
                                           d, dmin, da + t));
    }
  }
}

// Two panels times the groups [first_group, last_group), at most kBandRows rows.
template <class Type>
void MultiplyBand(const uint8_t* panels, const PreparedRows& x, size_t first_group,
                  size_t last_group, float* out, size_t out_stride, Chunk& chunk) {
  RowGroup groups[kBandRows / kTileRows];
  for (size_t index = first_group; index < last_group; ++index)
    groups[index - first_group] = GroupAt(x.grain, x.rows, x.k, index);
  const size_t n_groups = last_group - first_group, records = x.k / 256;
  __builtin_memset(chunk.sums, 0, n_groups * kTileRows * 16 * sizeof(float));
  for (size_t b = 0; b < records; ++b) {
    Unpack<Type>(panels + b * Type::kRecordBytes, 0, chunk);
    Unpack<Type>(panels + (records + b) * Type::kRecordBytes, 1, chunk);
    for (size_t i = 0; i < n_groups; ++i) {
      float* c = chunk.sums + i * kTileRows * 16;
      if (groups[i].rows == kTileRows) {
        AddTile<Type, 4>(chunk, b, x.data, groups[i], c);
      } else {
        AddTile<Type, 3>(chunk, b, x.data, groups[i], c);
      }
    }
  }
  for (size_t i = 0; i < n_groups; ++i) {
    for (size_t t = 0; t < groups[i].rows; ++t) {
      const float* c = chunk.sums + (i * kTileRows + t) * 16;
      float* to = out + (groups[i].first + t) * out_stride;
      _mm256_storeu_ps(to, _mm256_loadu_ps(c));
      _mm256_storeu_ps(to + 8, _mm256_loadu_ps(c + 8));
    }
  }
}

template <class Type>
void MultiplyPanels(const uint8_t* panels, size_t n_panels, const PreparedRows& x, float* out,
                    size_t out_stride, uint8_t* scratch) {
  constexpr size_t kBandGroups = kBandRows / kTileRows;
  const size_t panel_bytes = x.k / 256 * Type::kRecordBytes;
  const size_t groups = GroupCount(x.grain, x.rows);
  size_t p = 0;
  for (; x.rows > kFewRows && p + 2 <= n_panels; p += 2) {
    for (size_t first = 0; first < groups; first += kBandGroups) {
      const size_t last = first + kBandGroups < groups ? first + kBandGroups : groups;
      MultiplyBand<Type>(panels + p * panel_bytes, x, first, last, out + 8 * p, out_stride,
                         *reinterpret_cast<Chunk*>(scratch));
    }
  }
  for (; p < n_panels; ++p) {
    for (size_t index = 0; index < groups; ++index) {
      const RowGroup group = GroupAt(x.grain, x.rows, x.k, index);
      MultiplyGroup<Type>(panels + p * panel_bytes, x.k, x.data, group,
                          out + group.first * out_stride + 8 * p, out_stride);
    }
  }
}

}  // namespace

void MultiplyK(WeightType type, const uint8_t* panels, size_t n_panels, const PreparedRows& x,
               float* out, size_t out_stride, uint8_t* scratch) {
  switch (type) {
    case WeightType::kQ2_K:
      return MultiplyPanels<avx2::Q2_K>(panels, n_panels, x, out, out_stride, scratch);
    case WeightType::kQ3_K:
      return MultiplyPanels<avx2::Q3_K>(panels, n_panels, x, out, out_stride, scratch);
    case WeightType::kQ4_K:
      return MultiplyPanels<avx2::Q4_K>(panels, n_panels, x, out, out_stride, scratch);
    case WeightType::kQ5_K:
      return MultiplyPanels<avx2::Q5_K>(panels, n_panels, x, out, out_stride, scratch);
    default:
      return MultiplyPanels<avx2::Q6_K>(panels, n_panels, x, out, out_stride, scratch);
  }
}

}  // namespace avxvnni
}  // namespace potluck
