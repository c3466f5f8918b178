// Q4_0 and Q4_1 on AVX2: 4-bit codes summed in int16 over a whole block, one widening a block.
//
// Depth of the int16 sums: 16 products of at most 15 * 127 a lane. Q4_1 as it is: 8 maddubs of at
// most 3810, 30480. Q4_0 starts from the seed -8 * (sum of the lane's activations): the final lane
// is the centred sum, at most 16 * 8 * 127 = 16256, and what wraps on the way wraps back.
#include "engine/kernels/avx2_matmul.h"
#include "engine/pack.h"

namespace potluck {
namespace avx2 {
namespace {

constexpr size_t kBlockCodes = 128;     // bytes of a block of a panel: 8 rows of 32 nibbles
constexpr size_t kScaleBytes = 16;      // f16 of 8 rows
constexpr size_t kUnpackedBlock = 512;  // bytes of a block of two panels, a byte a code
// Blocks of a GEMM chunk: codes and scales of 16 rows take 11.5 KiB (Q4_1 12.7) and stay in L1
// beside the activations.
constexpr size_t kChunkBlocks = 20;
constexpr size_t kPrefetchBytes = 8192;

// Where the blocks of a panel lie.
struct PanelShape {
  size_t blocks;  // of a row
  size_t record_blocks;
  size_t record_bytes;
  size_t codes_offset;  // in a record
};

template <bool kHasMin>
PanelShape ShapeOf(size_t k) {
  const size_t g = RecordBlocks(k);
  const size_t codes_offset = (kHasMin ? 2 : 1) * kScaleBytes * g;
  return {k / 32, g, codes_offset + g * kBlockCodes, codes_offset};
}

// One panel times the R rows of a group, in one pass over the panel.
template <bool kHasMin, size_t R>
__attribute__((noinline)) void MultiplyNarrow(const PanelShape& shape, const uint8_t* panel,
                                              const uint8_t* data, const RowGroup& group,
                                              float* out, size_t out_stride) {
  const __m256i low = _mm256_set1_epi8(15);
  const uint8_t* x = data + group.codes;
  const uint8_t* seeds = data + group.seeds;
  const float* scales = reinterpret_cast<const float*>(data + group.scales);
  const float* sums = reinterpret_cast<const float*>(data + group.sums);
  __m256 acc[R];
#pragma GCC unroll 8
  for (size_t t = 0; t < R; ++t) acc[t] = _mm256_setzero_ps();
  for (size_t b = 0; b < shape.blocks; b += shape.record_blocks, panel += shape.record_bytes) {
    const uint8_t* d = panel;
    const uint8_t* codes = panel + shape.codes_offset;
    for (size_t i = 0; i < shape.record_blocks; ++i) {
      _mm_prefetch(reinterpret_cast<const char*>(codes + kPrefetchBytes), _MM_HINT_T0);
      _mm_prefetch(reinterpret_cast<const char*>(codes + kPrefetchBytes + 64), _MM_HINT_T0);
      __m256i sum[R];
#pragma GCC unroll 8
      for (size_t t = 0; t < R; ++t)
        sum[t] = kHasMin ? _mm256_setzero_si256() : Seed(seeds + 4 * t);
#pragma GCC unroll 4
      for (size_t v = 0; v < 4; ++v) {
        const __m256i both = Pin(Load(codes + 32 * v));
        const __m256i lo = _mm256_and_si256(both, low);
        const __m256i hi = _mm256_and_si256(_mm256_srli_epi16(both, 4), low);
#pragma GCC unroll 8
        for (size_t t = 0; t < R; ++t) {
          sum[t] = AddProducts(sum[t], lo, Broadcast(x + (v * R + t) * 4));
          sum[t] = AddProducts(sum[t], hi, Broadcast(x + ((v + 4) * R + t) * 4));
        }
        POTLUCK_ORDER_LOADS();
      }
      const __m256 dw = LoadHalves(d);
#pragma GCC unroll 8
      for (size_t t = 0; t < R; ++t) {
        acc[t] = _mm256_fmadd_ps(PairsToFloat(sum[t]),
                                 _mm256_mul_ps(dw, _mm256_broadcast_ss(scales + t)), acc[t]);
      }
      if (kHasMin) {
        const __m256 mw = LoadHalves(d + kScaleBytes * shape.record_blocks);
#pragma GCC unroll 8
        for (size_t t = 0; t < R; ++t)
          acc[t] = _mm256_fmadd_ps(mw, _mm256_broadcast_ss(sums + t), acc[t]);
      }
      d += kScaleBytes;
      codes += kBlockCodes;
      x += 32 * R;
      seeds += 4 * R;
      scales += R;
      sums += R;
    }
  }
#pragma GCC unroll 8
  for (size_t t = 0; t < R; ++t) _mm256_storeu_ps(out + t * out_stride, acc[t]);
}

template <bool kHasMin>
void MultiplyGroup(const PanelShape& shape, const uint8_t* panel, const uint8_t* data,
                   const RowGroup& group, float* out, size_t out_stride) {
  switch (group.rows) {
    case 1:
      return MultiplyNarrow<kHasMin, 1>(shape, panel, data, group, out, out_stride);
    case 2:
      return MultiplyNarrow<kHasMin, 2>(shape, panel, data, group, out, out_stride);
    case 3:
      return MultiplyNarrow<kHasMin, 3>(shape, panel, data, group, out, out_stride);
    case 4:
      return MultiplyNarrow<kHasMin, 4>(shape, panel, data, group, out, out_stride);
    case 5:
      return MultiplyNarrow<kHasMin, 5>(shape, panel, data, group, out, out_stride);
    case 6:
      return MultiplyNarrow<kHasMin, 6>(shape, panel, data, group, out, out_stride);
    case 7:
      return MultiplyNarrow<kHasMin, 7>(shape, panel, data, group, out, out_stride);
    default:
      return MultiplyNarrow<kHasMin, 8>(shape, panel, data, group, out, out_stride);
  }
}

// Rows that share one unpacking. Their sums take 8 KiB of scratch.
constexpr size_t kBandRows = 128;

// A chunk of K of two panels, unpacked to a byte a code and f32 scales; and the sums of a band of
// rows: in `out` the rows lie far apart, often a multiple of 4 KiB, and would push each other out
// of L1.
struct Chunk {
  uint8_t* codes;  // [blocks][8 groups of 4 k][2 panels][32]
  float* d;        // [blocks][16 rows of weights]
  float* m;        // the same; Q4_1
  float* sums;     // [band rows][16]
};

Chunk ChunkIn(uint8_t* scratch) {
  float* d = reinterpret_cast<float*>(scratch + kChunkBlocks * kUnpackedBlock);
  return {scratch, d, d + kChunkBlocks * 16, d + 2 * kChunkBlocks * 16};
}

// Unpacks blocks [first, last) of one of two panels (side 0 or 1).
template <bool kHasMin>
void Unpack(const PanelShape& shape, const uint8_t* panel, size_t first, size_t last, size_t side,
            const Chunk& chunk) {
  const __m256i low = _mm256_set1_epi8(15);
  const size_t g = shape.record_blocks;
  uint8_t* to = chunk.codes + 32 * side;
  for (size_t b = first; b < last; ++b, to += kUnpackedBlock) {
    const uint8_t* record = panel + b / g * shape.record_bytes;
    const uint8_t* d = record + b % g * kScaleBytes;
    const uint8_t* codes = record + shape.codes_offset + b % g * kBlockCodes;
    for (size_t v = 0; v < 4; ++v) {
      const __m256i both = Pin(Load(codes + 32 * v));
      const __m256i lo = _mm256_and_si256(both, low);
      const __m256i hi = _mm256_and_si256(_mm256_srli_epi16(both, 4), low);
      _mm256_storeu_si256(reinterpret_cast<__m256i*>(to + 64 * v), lo);
      _mm256_storeu_si256(reinterpret_cast<__m256i*>(to + 64 * (v + 4)), hi);
    }
    const size_t at = (b - first) * 16 + 8 * side;
    _mm256_storeu_ps(chunk.d + at, LoadHalves(d));
    if (kHasMin) _mm256_storeu_ps(chunk.m + at, LoadHalves(d + kScaleBytes * g));
  }
}

// c += (sum as float) * (d * da), then c += m * sums; c are 8 outputs of one row.
template <bool kHasMin>
inline void AddBlock(float* c, __m256i sum, const float* d, const float* da, const float* m,
                     const float* dsum) {
  const __m256 scale = _mm256_mul_ps(_mm256_loadu_ps(d), _mm256_broadcast_ss(da));
  __m256 acc = _mm256_fmadd_ps(PairsToFloat(sum), scale, _mm256_loadu_ps(c));
  if (kHasMin) acc = _mm256_fmadd_ps(_mm256_loadu_ps(m), _mm256_broadcast_ss(dsum), acc);
  _mm256_storeu_ps(c, acc);
}

// c[S rows][16] += a chunk of two panels times a group of S rows; named sums, for gcc spills an
// array of them.
template <bool kHasMin, size_t S>
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
    __m256i a0 = kHasMin ? _mm256_setzero_si256() : Seed(seeds);
    __m256i a1 = kHasMin ? _mm256_setzero_si256() : Seed(seeds + 4);
    __m256i a2 = kHasMin ? _mm256_setzero_si256() : Seed(seeds + 8);
    __m256i a3 = kHasMin || S < 4 ? _mm256_setzero_si256() : Seed(seeds + 12);
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
    AddBlock<kHasMin>(c, a0, d, scales, m, sums);
    AddBlock<kHasMin>(c + 8, b0, d + 8, scales, m + 8, sums);
    AddBlock<kHasMin>(c + 16, a1, d, scales + 1, m, sums + 1);
    AddBlock<kHasMin>(c + 24, b1, d + 8, scales + 1, m + 8, sums + 1);
    AddBlock<kHasMin>(c + 32, a2, d, scales + 2, m, sums + 2);
    AddBlock<kHasMin>(c + 40, b2, d + 8, scales + 2, m + 8, sums + 2);
    if (S == 4) {
      AddBlock<kHasMin>(c + 48, a3, d, scales + 3, m, sums + 3);
      AddBlock<kHasMin>(c + 56, b3, d + 8, scales + 3, m + 8, sums + 3);
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
template <bool kHasMin>
void MultiplyBand(const PanelShape& shape, const uint8_t* panels, size_t panel_bytes,
                  const PreparedRows& x, size_t first_group, size_t last_group, float* out,
                  size_t out_stride, const Chunk& chunk) {
  __builtin_memset(chunk.sums, 0, (last_group - first_group) * kTileRows * 16 * sizeof(float));
  for (size_t first = 0; first < shape.blocks; first += kChunkBlocks) {
    const size_t last = first + kChunkBlocks < shape.blocks ? first + kChunkBlocks : shape.blocks;
    Unpack<kHasMin>(shape, panels, first, last, 0, chunk);
    Unpack<kHasMin>(shape, panels + panel_bytes, first, last, 1, chunk);
    float* c = chunk.sums;
    for (size_t index = first_group; index < last_group; ++index, c += kTileRows * 16) {
      const RowGroup group = GroupAt(x.grain, x.rows, x.k, index);
      if (group.rows == kTileRows) {
        AddTile<kHasMin, 4>(chunk, last - first, first, x.data, group, c);
      } else {
        AddTile<kHasMin, 3>(chunk, last - first, first, x.data, group, c);
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

template <bool kHasMin>
void MultiplyPair(const PanelShape& shape, const uint8_t* panels, size_t panel_bytes,
                  const PreparedRows& x, float* out, size_t out_stride, uint8_t* scratch) {
  constexpr size_t kBandGroups = kBandRows / kTileRows;
  const size_t groups = GroupCount(x.grain, x.rows);
  for (size_t first = 0; first < groups; first += kBandGroups) {
    const size_t last = first + kBandGroups < groups ? first + kBandGroups : groups;
    MultiplyBand<kHasMin>(shape, panels, panel_bytes, x, first, last, out, out_stride,
                          ChunkIn(scratch));
  }
}

template <bool kHasMin>
void MultiplyPanels(const uint8_t* panels, size_t n_panels, const PreparedRows& x, float* out,
                    size_t out_stride, uint8_t* scratch) {
  const PanelShape shape = ShapeOf<kHasMin>(x.k);
  const size_t panel_bytes = shape.blocks / shape.record_blocks * shape.record_bytes;
  size_t p = 0;
  if (x.rows > kFewRows) {
    for (; p + 2 <= n_panels; p += 2) {
      MultiplyPair<kHasMin>(shape, panels + p * panel_bytes, panel_bytes, x, out + 8 * p,
                            out_stride, scratch);
    }
  }
  for (; p < n_panels; ++p) {
    for (size_t index = 0; index < GroupCount(x.grain, x.rows); ++index) {
      const RowGroup group = GroupAt(x.grain, x.rows, x.k, index);
      MultiplyGroup<kHasMin>(shape, panels + p * panel_bytes, x.data, group,
                             out + group.first * out_stride + 8 * p, out_stride);
    }
  }
}

}  // namespace

void MultiplyQ4(WeightType type, const uint8_t* panels, size_t n_panels, const PreparedRows& x,
                float* out, size_t out_stride, uint8_t* scratch) {
  if (type == WeightType::kQ4_1) {
    MultiplyPanels<true>(panels, n_panels, x, out, out_stride, scratch);
  } else {
    MultiplyPanels<false>(panels, n_panels, x, out, out_stride, scratch);
  }
}

}  // namespace avx2
}  // namespace potluck
