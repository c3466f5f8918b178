// Many rows on AVX-512 VNNI: tiles of 4 rows of activations and 32 rows of weights (4 panels).
// 8 sums and 8 running outputs stay in registers over a chunk of K.
#include "engine/kernels/avx512vnni_block32_types.h"

namespace potluck {
namespace avx512vnni {
namespace {

constexpr size_t kTileRowsOfWeights = 32;
constexpr size_t kUnpackedBlock = 32 * kTileRowsOfWeights;  // bytes, a byte a code
// Codes and scales of a chunk take 25 KiB of L1 (28 with mins). Larger chunks load and store the
// outputs less often, but push the activations out.
constexpr size_t kChunkBlocks = 22;
constexpr size_t kBandRows = 256;  // rows that share one unpacking; their outputs take 32 KiB

// A chunk of K of 4 panels, unpacked, and the outputs of a band of rows so far.
struct Chunk {
  uint8_t* codes;  // [blocks][8 groups of 4 k][4 panels][32]
  float* d;        // [blocks][32 rows of weights]
  float* m;        // the same; Q4_1 and Q5_1
  float* sums;     // [band rows][32]
};

static_assert(kChunkBlocks * (kUnpackedBlock + 2 * kTileRowsOfWeights * sizeof(float)) +
                      kBandRows * kTileRowsOfWeights * sizeof(float) <=
                  kScratchBytes,
              "fits into a thread's scratch");

Chunk ChunkIn(uint8_t* scratch) {
  float* d = reinterpret_cast<float*>(scratch + kChunkBlocks * kUnpackedBlock);
  float* m = d + kChunkBlocks * kTileRowsOfWeights;
  return {scratch, d, m, m + kChunkBlocks * kTileRowsOfWeights};
}

template <size_t G, class Type>
inline void UnpackWord(Type type, const uint8_t* run, size_t apart, uint8_t* to) {
  _mm512_storeu_si512(to + 128 * G, Codes<G>(type, run, apart));
}

// Blocks [first, last) of two of the 4 panels, sides `side` and `side` + 1.
template <class Type>
void Unpack(const PanelShape& shape, const uint8_t* panel, size_t first, size_t last, size_t side,
            const Chunk& chunk) {
  constexpr Type kType;
  const size_t g = shape.record_blocks, apart = shape.panel_bytes;
  for (size_t b = first; b < last; ++b) {
    const uint8_t* record = panel + b / g * shape.record_bytes;
    const uint8_t* d = record + b % g * kScaleBytes;
    const uint8_t* run = record + shape.codes_offset + b % g * Type::kRunBytes;
    uint8_t* to = chunk.codes + (b - first) * kUnpackedBlock + 32 * side;
    const uint8_t* ahead = run + kChunkBlocks * (shape.record_bytes / g);  // the next chunk's
    for (size_t line = 0; line < shape.record_bytes / g; line += 64) {
      _mm_prefetch(reinterpret_cast<const char*>(ahead + line), _MM_HINT_T1);
      _mm_prefetch(reinterpret_cast<const char*>(ahead + apart + line), _MM_HINT_T1);
    }
    UnpackWord<0>(kType, run, apart, to);
    UnpackWord<1>(kType, run, apart, to);
    UnpackWord<2>(kType, run, apart, to);
    UnpackWord<3>(kType, run, apart, to);
    UnpackWord<4>(kType, run, apart, to);
    UnpackWord<5>(kType, run, apart, to);
    UnpackWord<6>(kType, run, apart, to);
    UnpackWord<7>(kType, run, apart, to);
    const size_t at = (b - first) * kTileRowsOfWeights + 8 * side;
    _mm512_storeu_ps(chunk.d + at, LoadTwoScales(d, d + apart));
    const uint8_t* m = d + kScaleBytes * g;
    if (Type::kHasMin) _mm512_storeu_ps(chunk.m + at, LoadTwoScales(m, m + apart));
  }
}

// c[S rows][32] += a chunk of 4 panels times a group of S rows.
template <class Type, size_t S>
__attribute__((noinline)) void AddTile(const Chunk& chunk, size_t blocks, size_t first,
                                       const uint8_t* data, const RowGroup& group, float* c) {
  const uint8_t* w = chunk.codes;
  const uint8_t* x = data + group.codes + first * 32 * S;
  const float* scales = reinterpret_cast<const float*>(data + group.scales) + first * S;
  const float* sums = reinterpret_cast<const float*>(data + group.sums) + first * S;
  const float* d = chunk.d;
  const float* m = chunk.m;
  __m512 acc0[S], acc1[S];
#pragma GCC unroll 4
  for (size_t t = 0; t < S; ++t) {
    acc0[t] = _mm512_loadu_ps(c + 32 * t);
    acc1[t] = _mm512_loadu_ps(c + 32 * t + 16);
  }
  // One madd makes 16 starts here; in the loop it would take dpbusd's place for each.
  alignas(64) int32_t starts[(kChunkBlocks * S + 15) / 16 * 16];
  if (Type::kSeedFactor != 0)
    ReadStarts<Type>(data + group.seeds + first * 4 * S, blocks * S, starts);
  for (size_t b = 0; b < blocks; ++b) {
    __m512i sum0[S], sum1[S];
#pragma GCC unroll 4
    for (size_t t = 0; t < S; ++t)
      sum0[t] = sum1[t] =
          Type::kSeedFactor == 0 ? _mm512_setzero_si512() : _mm512_set1_epi32(starts[b * S + t]);
#pragma GCC unroll 8
    for (size_t g = 0; g < 8; ++g) {
      const __m512i w0 = _mm512_loadu_si512(w + 128 * g);
      const __m512i w1 = _mm512_loadu_si512(w + 128 * g + 64);
#pragma GCC unroll 4
      for (size_t t = 0; t < S; ++t) {
        const __m512i xt = Broadcast(x + 4 * (S * g + t));
        sum0[t] = _mm512_dpbusd_epi32(sum0[t], w0, xt);
        sum1[t] = _mm512_dpbusd_epi32(sum1[t], w1, xt);
      }
    }
    const __m512 d0 = _mm512_loadu_ps(d), d1 = _mm512_loadu_ps(d + 16);
    const __m512 m0 = Type::kHasMin ? _mm512_loadu_ps(m) : d0,
                 m1 = Type::kHasMin ? _mm512_loadu_ps(m + 16) : d1;
#pragma GCC unroll 4
    for (size_t t = 0; t < S; ++t) {
      acc0[t] = AddBlock<Type>(acc0[t], sum0[t], d0, m0, scales + t, sums + t);
      acc1[t] = AddBlock<Type>(acc1[t], sum1[t], d1, m1, scales + t, sums + t);
    }
    w += kUnpackedBlock;
    x += 32 * S;
    scales += S;
    sums += S;
    d += 32;
    m += 32;
  }
#pragma GCC unroll 4
  for (size_t t = 0; t < S; ++t) {
    _mm512_storeu_ps(c + 32 * t, acc0[t]);
    _mm512_storeu_ps(c + 32 * t + 16, acc1[t]);
  }
}

// 4 panels times the groups [first_group, last_group), at most kBandRows rows.
template <class Type>
void MultiplyBand(const PanelShape& shape, const uint8_t* panels, const PreparedRows& x,
                  size_t first_group, size_t last_group, float* out, size_t out_stride,
                  const Chunk& chunk) {
  RowGroup groups[kBandRows / kTileRows];
  for (size_t index = first_group; index < last_group; ++index)
    groups[index - first_group] = GroupAt(x.grain, x.rows, x.k, index);
  __builtin_memset(chunk.sums, 0, (last_group - first_group) * kTileRows * 32 * sizeof(float));
  for (size_t first = 0; first < shape.blocks; first += kChunkBlocks) {
    const size_t last = first + kChunkBlocks < shape.blocks ? first + kChunkBlocks : shape.blocks;
    for (size_t side = 0; side < 4; side += 2) {
      Unpack<Type>(shape, panels + side * shape.panel_bytes, first, last, side, chunk);
    }
    float* c = chunk.sums;
    for (size_t index = first_group; index < last_group; ++index, c += kTileRows * 32) {
      const RowGroup& group = groups[index - first_group];
      if (group.rows == kTileRows) {
        AddTile<Type, 4>(chunk, last - first, first, x.data, group, c);
      } else {
        AddTile<Type, 3>(chunk, last - first, first, x.data, group, c);
      }
    }
  }
  const float* c = chunk.sums;
  for (size_t index = first_group; index < last_group; ++index, c += kTileRows * 32) {
    const RowGroup& group = groups[index - first_group];
    for (size_t t = 0; t < group.rows; ++t) {
      float* to = out + (group.first + t) * out_stride;
      _mm512_storeu_ps(to, _mm512_loadu_ps(c + 32 * t));
      _mm512_storeu_ps(to + 16, _mm512_loadu_ps(c + 32 * t + 16));
    }
  }
}

template <class Type>
size_t MultiplyAll(const uint8_t* panels, size_t n_panels, const PreparedRows& x, float* out,
                   size_t out_stride, uint8_t* scratch) {
  constexpr size_t kBandGroups = kBandRows / kTileRows;
  const PanelShape shape = ShapeOf<Type>(x.k);
  const size_t groups = GroupCount(x.grain, x.rows);
  size_t p = 0;
  for (; p + 4 <= n_panels; p += 4) {
    for (size_t first = 0; first < groups; first += kBandGroups) {
      const size_t last = first + kBandGroups < groups ? first + kBandGroups : groups;
      MultiplyBand<Type>(shape, panels + p * shape.panel_bytes, x, first, last, out + 8 * p,
                         out_stride, ChunkIn(scratch));
    }
  }
  return p;
}

}  // namespace

size_t MultiplyFours(WeightType type, const uint8_t* panels, size_t n_panels, const PreparedRows& x,
                     float* out, size_t out_stride, uint8_t* scratch) {
  switch (type) {
    case WeightType::kQ4_0:
      return MultiplyAll<Q4_0>(panels, n_panels, x, out, out_stride, scratch);
    case WeightType::kQ4_1:
      return MultiplyAll<Q4_1>(panels, n_panels, x, out, out_stride, scratch);
    case WeightType::kQ5_0:
      return MultiplyAll<Q5_0>(panels, n_panels, x, out, out_stride, scratch);
    case WeightType::kQ5_1:
      return MultiplyAll<Q5_1>(panels, n_panels, x, out, out_stride, scratch);
    default:
      return MultiplyAll<Q8_0>(panels, n_panels, x, out, out_stride, scratch);
  }
}

}  // namespace avx512vnni
}  // namespace potluck
