// Blocks of 32 values on AVX-VNNI: Q4_0, Q4_1, Q5_0, Q5_1, Q8_0; up to 8 rows in one pass over a
// panel, or tiles of 4 rows of activations and 2 panels whose codes are unpacked once for a band.
#include "engine/kernels/avxvnni_block32_narrow.h"

namespace potluck {
namespace avxvnni {
namespace {

constexpr size_t kUnpackedBlock = 512;  // bytes of a block of two panels, a byte a code
constexpr size_t kChunkBlocks = 20;     // codes and scales take 12.5 KiB and stay in L1
constexpr size_t kBandRows = 128;       // rows that share one unpacking; their sums take 8 KiB

template <class Type>
void MultiplyGroup(const PanelShape& shape, const uint8_t* panel, const uint8_t* data,
                   const RowGroup& group, float* out, size_t out_stride) {
  switch (group.rows) {
    case 1:
      return MultiplyNarrow<Type, 1>(shape, panel, data, group, out, out_stride);
    case 2:
      return MultiplyNarrow<Type, 2>(shape, panel, data, group, out, out_stride);
    case 3:
      return MultiplyNarrow<Type, 3>(shape, panel, data, group, out, out_stride);
    case 4:
      return MultiplyNarrow<Type, 4>(shape, panel, data, group, out, out_stride);
    case 5:
      return MultiplyNarrow<Type, 5>(shape, panel, data, group, out, out_stride);
    case 6:
      return MultiplyNarrow<Type, 6>(shape, panel, data, group, out, out_stride);
    case 7:
      return MultiplyNarrow<Type, 7>(shape, panel, data, group, out, out_stride);
    default:
      return MultiplyNarrow<Type, 8>(shape, panel, data, group, out, out_stride);
  }
}

// A chunk of K of two panels, unpacked, and the outputs of a band of rows so far.
struct Chunk {
  uint8_t codes[kChunkBlocks * kUnpackedBlock];  // [block][8 groups of 4 k][2 panels][32]
  float d[kChunkBlocks * 16];                    // [block][16 rows of weights]
  float m[kChunkBlocks * 16];
  float sums[kBandRows * 16];  // [band row][16]
};
static_assert(sizeof(Chunk) <= kScratchBytes, "fits into a thread's scratch");

// Blocks [first, last) of one of two panels (side 0 or 1).
template <class Type>
void Unpack(const PanelShape& shape, const uint8_t* panel, size_t first, size_t last, size_t side,
            Chunk& chunk) {
  constexpr Type kType;
  const size_t g = shape.record_blocks;
  for (size_t b = first; b < last; ++b) {
    const uint8_t* record = panel + b / g * shape.record_bytes;
    const uint8_t* d = record + b % g * kScaleBytes;
    const uint8_t* run = record + shape.codes_offset + b % g * Type::kRunBytes;
    uint8_t* to = chunk.codes + (b - first) * kUnpackedBlock + 32 * side;
    Store(to, CodesOf<0>(kType, run));
    Store(to + 64, CodesOf<1>(kType, run));
    Store(to + 128, CodesOf<2>(kType, run));
    Store(to + 192, CodesOf<3>(kType, run));
    Store(to + 256, CodesOf<4>(kType, run));
    Store(to + 320, CodesOf<5>(kType, run));
    Store(to + 384, CodesOf<6>(kType, run));
    Store(to + 448, CodesOf<7>(kType, run));
    const size_t at = (b - first) * 16 + 8 * side;
    _mm256_storeu_ps(chunk.d + at, LoadHalves(d));
    if (Type::kHasMin) _mm256_storeu_ps(chunk.m + at, LoadHalves(d + kScaleBytes * g));
  }
}

// c += sum * (d * da), then + m * dsum; c are 8 outputs of one row.
template <class Type>
inline void AddBlock(float* c, __m256i sum, const float* d, const float* da, const float* m,
                     const float* dsum) {
  const __m256 scale = _mm256_mul_ps(_mm256_loadu_ps(d), _mm256_broadcast_ss(da));
  __m256 acc = _mm256_fmadd_ps(_mm256_cvtepi32_ps(sum), scale, _mm256_loadu_ps(c));
  if (Type::kHasMin) acc = _mm256_fmadd_ps(_mm256_loadu_ps(m), _mm256_broadcast_ss(dsum), acc);
  _mm256_storeu_ps(c, acc);
}

// c[S rows][16] += blocks [first, last) of two panels times a group of S rows.
template <class Type, size_t S>
__attribute__((noinline)) void AddTile(const Chunk& chunk, size_t first, size_t last,
                                       const uint8_t* data, const RowGroup& group, float* c) {
  const uint8_t* w = chunk.codes;
  const uint8_t* x = data + group.codes + first * 32 * S;
  const uint8_t* seeds = data + group.seeds + first * 4 * S;
  const float* da = reinterpret_cast<const float*>(data + group.scales) + first * S;
  const float* sums = reinterpret_cast<const float*>(data + group.sums) + first * S;
  const float* d = chunk.d;
  const float* m = chunk.m;
  for (size_t b = first; b < last; ++b) {
    __m256i a0 = Start<Type>(seeds), a1 = Start<Type>(seeds + 4), a2 = Start<Type>(seeds + 8);
    __m256i a3 = S < 4 ? _mm256_setzero_si256() : Start<Type>(seeds + 12);
    __m256i b0 = a0, b1 = a1, b2 = a2, b3 = a3;
#pragma GCC unroll 8
    for (size_t g = 0; g < 8; ++g) POTLUCK_ADD_TILE_WORD(S, w + 64 * g, x + 4 * S * g);
    AddBlock<Type>(c, a0, d, da, m, sums);
    AddBlock<Type>(c + 8, b0, d + 8, da, m + 8, sums);
    AddBlock<Type>(c + 16, a1, d, da + 1, m, sums + 1);
    AddBlock<Type>(c + 24, b1, d + 8, da + 1, m + 8, sums + 1);
    AddBlock<Type>(c + 32, a2, d, da + 2, m, sums + 2);
    AddBlock<Type>(c + 40, b2, d + 8, da + 2, m + 8, sums + 2);
    if (S == 4) {
      AddBlock<Type>(c + 48, a3, d, da + 3, m, sums + 3);
      AddBlock<Type>(c + 56, b3, d + 8, da + 3, m + 8, sums + 3);
    }
    w += kUnpackedBlock;
    x += 32 * S;
    seeds += 4 * S;
    da += S;
    sums += S;
    d += 16;
    m += 16;
  }
}

// Two panels times the groups [first_group, last_group), at most kBandRows rows.
template <class Type>
void MultiplyBand(const PanelShape& shape, const uint8_t* panels, const PreparedRows& x,
                  size_t first_group, size_t last_group, float* out, size_t out_stride,
                  Chunk& chunk) {
  RowGroup groups[kBandRows / kTileRows];
  for (size_t index = first_group; index < last_group; ++index)
    groups[index - first_group] = GroupAt(x.grain, x.rows, x.k, index);
  const size_t n_groups = last_group - first_group;
  __builtin_memset(chunk.sums, 0, n_groups * kTileRows * 16 * sizeof(float));
  for (size_t first = 0; first < shape.blocks; first += kChunkBlocks) {
    const size_t last = first + kChunkBlocks < shape.blocks ? first + kChunkBlocks : shape.blocks;
    Unpack<Type>(shape, panels, first, last, 0, chunk);
    Unpack<Type>(shape, panels + shape.panel_bytes, first, last, 1, chunk);
    for (size_t i = 0; i < n_groups; ++i) {
      float* c = chunk.sums + i * kTileRows * 16;
      if (groups[i].rows == kTileRows) {
        AddTile<Type, 4>(chunk, first, last, x.data, groups[i], c);
      } else {
        AddTile<Type, 3>(chunk, first, last, x.data, groups[i], c);
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
  const PanelShape shape = ShapeOf<Type>(x.k);
  const size_t groups = GroupCount(x.grain, x.rows);
  size_t p = 0;
  for (; x.rows > kFewRows && p + 2 <= n_panels; p += 2) {
    for (size_t first = 0; first < groups; first += kBandGroups) {
      const size_t last = first + kBandGroups < groups ? first + kBandGroups : groups;
      MultiplyBand<Type>(shape, panels + p * shape.panel_bytes, x, first, last, out + 8 * p,
                         out_stride, *reinterpret_cast<Chunk*>(scratch));
    }
  }
  for (; p < n_panels; ++p) {
    for (size_t index = 0; index < groups; ++index) {
      const RowGroup group = GroupAt(x.grain, x.rows, x.k, index);
      MultiplyGroup<Type>(shape, panels + p * shape.panel_bytes, x.data, group,
                          out + group.first * out_stride + 8 * p, out_stride);
    }
  }
}

}  // namespace

void MultiplyBlock32(WeightType type, const uint8_t* panels, size_t n_panels, const PreparedRows& x,
                     float* out, size_t out_stride, uint8_t* scratch) {
  switch (type) {
    case WeightType::kQ4_0:
      return MultiplyPanels<avx2::Q4_0>(panels, n_panels, x, out, out_stride, scratch);
    case WeightType::kQ4_1:
      return MultiplyPanels<avx2::Q4_1>(panels, n_panels, x, out, out_stride, scratch);
    case WeightType::kQ5_0:
      return MultiplyPanels<avx2::Q5_0>(panels, n_panels, x, out, out_stride, scratch);
    case WeightType::kQ5_1:
      return MultiplyPanels<avx2::Q5_1>(panels, n_panels, x, out, out_stride, scratch);
    default:
      return MultiplyPanels<Q8_0>(panels, n_panels, x, out, out_stride, scratch);
  }
}

}  // namespace avxvnni
}  // namespace potluck
