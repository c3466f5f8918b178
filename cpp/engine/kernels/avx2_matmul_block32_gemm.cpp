// Blocks of 32 values of 4 and 5 bits on AVX2, many rows: tiles of 4 rows of activations and 16
// rows of weights (2 panels), whose codes are unpacked once for a band of rows.
#include "engine/kernels/avx2_block32_types.h"

namespace potluck {
namespace avx2 {
namespace {

constexpr size_t kUnpackedBlock = 512;  // bytes of a block of two panels, a byte a code
// Blocks of a GEMM chunk: codes and scales of 16 rows take 11.3 KiB (12.5 with mins) and stay in L1
// beside the activations.
constexpr size_t kChunkBlocks = 20;

// Rows that share one unpacking. Their sums take 8 KiB of scratch.
constexpr size_t kBandRows = 128;

// A chunk of K of two panels, unpacked to a byte a code and f32 scales; and the sums of a band of
// rows: in `out` the rows lie far apart, often a multiple of 4 KiB, and would push each other out
// of L1.
struct Chunk {
  uint8_t* codes;  // [blocks][8 groups of 4 k][2 panels][32]
  float* d;        // [blocks][16 rows of weights]
  float* m;        // the same; Q4_1 and Q5_1
  float* sums;     // [band rows][16]
};

static_assert(kChunkBlocks * (kUnpackedBlock + 2 * sizeof(float) * 16) +
                      kBandRows * 16 * sizeof(float) <=
                  kScratchBytes,
              "fits into a thread's scratch");

Chunk ChunkIn(uint8_t* scratch) {
  float* d = reinterpret_cast<float*>(scratch + kChunkBlocks * kUnpackedBlock);
  return {scratch, d, d + kChunkBlocks * 16, d + 2 * kChunkBlocks * 16};
}

// Unpacks blocks [first, last) of one of two panels (side 0 or 1).
template <class Type>
void Unpack(const PanelShape& shape, const uint8_t* panel, size_t first, size_t last, size_t side,
            const Chunk& chunk) {
  constexpr Type kType;
  const size_t g = shape.record_blocks;
  uint8_t* to = chunk.codes + 32 * side;
  for (size_t b = first; b < last; ++b, to += kUnpackedBlock) {
    const uint8_t* record = panel + b / g * shape.record_bytes;
    const uint8_t* d = record + b % g * kScaleBytes;
    const uint8_t* run = record + shape.codes_offset + b % g * Type::kRunBytes;
    Store(to, Codes<0>(kType, run));
    Store(to + 64, Codes<1>(kType, run));
    Store(to + 128, Codes<2>(kType, run));
    Store(to + 192, Codes<3>(kType, run));
    Store(to + 256, Codes<4>(kType, run));
    Store(to + 320, Codes<5>(kType, run));
    Store(to + 384, Codes<6>(kType, run));
    Store(to + 448, Codes<7>(kType, run));
    const size_t at = (b - first) * 16 + 8 * side;
    _mm256_storeu_ps(chunk.d + at, LoadHalves(d));
    if (Type::kHasMin) _mm256_storeu_ps(chunk.m + at, LoadHalves(d + kScaleBytes * g));
  }
}

// c += (sum as float) * (d * da), then c += m * sums; c are 8 outputs of one row.
template <class Type>
inline void AddBlock(float* c, __m256i sum, __m256i uncentred, const float* d, const float* da,
                     const float* m, const float* dsum) {
  const __m256 scale = _mm256_mul_ps(_mm256_loadu_ps(d), _mm256_broadcast_ss(da));
  __m256 acc = _mm256_fmadd_ps(DotToFloat<Type>(sum, uncentred), scale, _mm256_loadu_ps(c));
  if (Type::kHasMin) acc = _mm256_fmadd_ps(_mm256_loadu_ps(m), _mm256_broadcast_ss(dsum), acc);
  _mm256_storeu_ps(c, acc);
}

// c[S rows][16] += a chunk of two panels times a group of S rows; named sums, for gcc spills an
// array of them.
template <class Type, size_t S>
__attribute__((noinline)) void AddTile(const Chunk& chunk, size_t blocks, size_t first,
                                       const uint8_t* data, const RowGroup& group, float* c) {
  const uint8_t* w = chunk.codes;
  const uint8_t* x = data + group.codes + first * 32 * S;
  const uint8_t* seeds = data + group.seeds + first * 4 * S;
  const float* scales = reinterpret_cast<const float*>(data + group.scales) + first * S;
  const float* sums = reinterpret_cast<const float*>(data + group.sums) + first * S;
  const float* d = chunk.d;
  const float* m = chunk.m;
  for (size_t b = 0; b < blocks; ++b) {
    __m256i a0 = BlockSeed<Type>(seeds), a1 = BlockSeed<Type>(seeds + 4);
    __m256i a2 = BlockSeed<Type>(seeds + 8);
    __m256i a3 = S < 4 ? _mm256_setzero_si256() : BlockSeed<Type>(seeds + 12);
    __m256i b0 = a0, b1 = a1, b2 = a2, b3 = a3;
#pragma GCC unroll 8
    for (size_t g = 0; g < 8; ++g) {
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
    __m256i more = Uncentred<Type>(seeds);
    AddBlock<Type>(c, a0, more, d, scales, m, sums);
    AddBlock<Type>(c + 8, b0, more, d + 8, scales, m + 8, sums);
    more = Uncentred<Type>(seeds + 4);
    AddBlock<Type>(c + 16, a1, more, d, scales + 1, m, sums + 1);
    AddBlock<Type>(c + 24, b1, more, d + 8, scales + 1, m + 8, sums + 1);
    more = Uncentred<Type>(seeds + 8);
    AddBlock<Type>(c + 32, a2, more, d, scales + 2, m, sums + 2);
    AddBlock<Type>(c + 40, b2, more, d + 8, scales + 2, m + 8, sums + 2);
    if (S == 4) {
      more = Uncentred<Type>(seeds + 12);
      AddBlock<Type>(c + 48, a3, more, d, scales + 3, m, sums + 3);
      AddBlock<Type>(c + 56, b3, more, d + 8, scales + 3, m + 8, sums + 3);
    }
    w += kUnpackedBlock;
    x += 32 * S;
    seeds += 4 * S;
    scales += S;
    sums += S;
    d += 16;
    m += 16;
  }
}

// Two panels times the groups [first_group, last_group), at most kBandRows rows.
template <class Type>
void MultiplyBand(const PanelShape& shape, const uint8_t* panels, const PreparedRows& x,
                  size_t first_group, size_t last_group, float* out, size_t out_stride,
                  const Chunk& chunk) {
  __builtin_memset(chunk.sums, 0, (last_group - first_group) * kTileRows * 16 * sizeof(float));
  for (size_t first = 0; first < shape.blocks; first += kChunkBlocks) {
    const size_t last = first + kChunkBlocks < shape.blocks ? first + kChunkBlocks : shape.blocks;
    Unpack<Type>(shape, panels, first, last, 0, chunk);
    Unpack<Type>(shape, panels + shape.panel_bytes, first, last, 1, chunk);
    float* c = chunk.sums;
    for (size_t index = first_group; index < last_group; ++index, c += kTileRows * 16) {
      const RowGroup group = GroupAt(x.grain, x.rows, x.k, index);
      if (group.rows == kTileRows) {
        AddTile<Type, 4>(chunk, last - first, first, x.data, group, c);
      } else {
        AddTile<Type, 3>(chunk, last - first, first, x.data, group, c);
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
void MultiplyPair(const PanelShape& shape, const uint8_t* panels, const PreparedRows& x, float* out,
                  size_t out_stride, uint8_t* scratch) {
  constexpr size_t kBandGroups = kBandRows / kTileRows;
  const size_t groups = GroupCount(x.grain, x.rows);
  for (size_t first = 0; first < groups; first += kBandGroups) {
    const size_t last = first + kBandGroups < groups ? first + kBandGroups : groups;
    MultiplyBand<Type>(shape, panels, x, first, last, out, out_stride, ChunkIn(scratch));
  }
}

template <class Type>
size_t MultiplyAll(const uint8_t* panels, size_t n_panels, const PreparedRows& x, float* out,
                   size_t out_stride, uint8_t* scratch) {
  const PanelShape shape = ShapeOf<Type>(x.k);
  size_t p = 0;
  for (; p + 2 <= n_panels; p += 2) {
    MultiplyPair<Type>(shape, panels + p * shape.panel_bytes, x, out + 8 * p, out_stride, scratch);
  }
  return p;
}

}  // namespace

size_t MultiplyBlock32Pairs(WeightType type, const uint8_t* panels, size_t n_panels,
                            const PreparedRows& x, float* out, size_t out_stride,
                            uint8_t* scratch) {
  switch (type) {
    case WeightType::kQ4_0:
      return MultiplyAll<Q4_0>(panels, n_panels, x, out, out_stride, scratch);
    case WeightType::kQ4_1:
      return MultiplyAll<Q4_1>(panels, n_panels, x, out, out_stride, scratch);
    case WeightType::kQ5_0:
      return MultiplyAll<Q5_0>(panels, n_panels, x, out, out_stride, scratch);
    default:
      return MultiplyAll<Q5_1>(panels, n_panels, x, out, out_stride, scratch);
  }
}

}  // namespace avx2
}  // namespace potluck
