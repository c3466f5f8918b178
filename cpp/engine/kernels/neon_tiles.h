// Many rows on ARM: a panel's codes and scales are unpacked once for a band of rows, a chunk of K
// at a time, and groups of 3 or 4 rows take them from L1. What the ARM tables share.
//
// Every function here has internal linkage: see matmul_table.h.
#pragma once

#include "engine/kernels/neon_block32.h"

namespace potluck {
namespace arm {
namespace {

constexpr size_t kChunkBlocks = 32;  // codes and scales of a chunk: 9 KiB of L1, 10 with mins
constexpr size_t kBandRows = 128;    // rows that share one unpacking; their outputs take 4 KiB

// A chunk of a panel of blocks of 32, a byte a code and f32 scales, and the outputs of a band of
// rows so far.
struct Chunk {
  uint8_t codes[kChunkBlocks * kUnpackedBytes];  // [block][8 groups of 4 k][32]
  float d[kChunkBlocks * 8];                     // [block][8 rows of weights]
  float m[kChunkBlocks * 8];                     // the same; types with a min
  float sums[kBandRows * 8];                     // [row of the band][8]
};

// The store is a macro in clang: its arguments may hold no comma outside parentheses.
template <class Type, size_t G>
inline void UnpackVector(const uint8_t* run, uint8_t* to) {
  for (size_t at = 0; at < 2 * kHalfBytes; at += kHalfBytes) {
    const int8x16_t codes = CentredCodes<Type, G>(run + at);
    vst1q_u8(to + 32 * G + at, vreinterpretq_u8_s8(codes));
  }
}

// 32 values of 8 rows.
template <class Type>
inline void UnpackRun(const uint8_t* run, uint8_t* to) {
  UnpackVector<Type, 0>(run, to);
  UnpackVector<Type, 1>(run, to);
  UnpackVector<Type, 2>(run, to);
  UnpackVector<Type, 3>(run, to);
  UnpackVector<Type, 4>(run, to);
  UnpackVector<Type, 5>(run, to);
  UnpackVector<Type, 6>(run, to);
  UnpackVector<Type, 7>(run, to);
}

[[maybe_unused]] inline void UnpackScales(const uint8_t* halves, float* to) {
  vst1q_f32(to, LoadHalves(halves));
  vst1q_f32(to + 4, LoadHalves(halves + 8));
}

// A row's 8 outputs.
[[maybe_unused]] inline void StoreRow(const float* c, float* out) {
  vst1q_f32(out, vld1q_f32(c));
  vst1q_f32(out + 4, vld1q_f32(c + 4));
}

// Blocks of 32 in tiles for an Isa that has sums of its own; what MultiplyBands asks for.
template <class Isa, class Type>
class BlockTiles {
 public:
  BlockTiles(size_t k, uint8_t* scratch)
      : shape_(ShapeOf<Type>(k)), chunk_(*reinterpret_cast<Chunk*>(scratch)) {
    static_assert(sizeof(Chunk) <= kScratchBytes);
  }

  size_t panel_bytes() const { return shape_.panel_bytes; }
  size_t chunks() const { return (shape_.blocks + kChunkBlocks - 1) / kChunkBlocks; }
  float* sums() { return chunk_.sums; }

  void Unpack(const uint8_t* panel, size_t chunk) {
    const size_t g = shape_.record_blocks;
    for (size_t b = First(chunk); b < Last(chunk); ++b) {
      const size_t at = b - First(chunk);
      const uint8_t* record = panel + b / g * shape_.record_bytes;
      const uint8_t* d = record + b % g * kHalfScalesBytes;
      UnpackRun<Type>(record + shape_.codes_offset + b % g * Type::kRunBytes,
                      chunk_.codes + at * kUnpackedBytes);
      UnpackScales(d, chunk_.d + 8 * at);
      if (Type::kHasMin) UnpackScales(d + g * kHalfScalesBytes, chunk_.m + 8 * at);
    }
  }

  // c[S][8] += the chunk times a group of S rows.
  template <size_t S>
  __attribute__((noinline)) void AddTile(size_t chunk, const uint8_t* data, const RowGroup& group,
                                         float* c) const {
    RowGroup of_s = group;
    of_s.rows = S;
    AddBlocks<Isa, Unpacked<Type>, S, 2>({chunk_.codes, reinterpret_cast<const uint8_t*>(chunk_.d),
                                          reinterpret_cast<const uint8_t*>(chunk_.m)},
                                         Last(chunk) - First(chunk),
                                         RowsOf(data, of_s, First(chunk)), c);
  }

  static void Store(const float* c, size_t rows, float* out, size_t out_stride) {
    for (size_t t = 0; t < rows; ++t) StoreRow(c + 8 * t, out + t * out_stride);
  }

 private:
  static size_t First(size_t chunk) { return chunk * kChunkBlocks; }
  size_t Last(size_t chunk) const {
    const size_t last = First(chunk) + kChunkBlocks;
    return last < shape_.blocks ? last : shape_.blocks;
  }

  PanelShape shape_;
  Chunk& chunk_;
};

// All panels times more than kFewRows rows, whose groups have 3 or 4. `tiles` unpacks and
// multiplies chunk by chunk; its sums are 8 floats a row.
template <class Tiles>
void MultiplyBands(Tiles tiles, const uint8_t* panels, size_t n_panels, const PreparedRows& x,
                   float* out, size_t out_stride) {
  constexpr size_t kBandGroups = kBandRows / kTileRows;
  constexpr size_t kGroupSums = kTileRows * 8;
  const size_t groups = GroupCount(x.grain, x.rows);
  for (size_t p = 0; p < n_panels; ++p, panels += tiles.panel_bytes(), out += 8) {
    for (size_t first = 0; first < groups; first += kBandGroups) {
      const size_t last = first + kBandGroups < groups ? first + kBandGroups : groups;
      __builtin_memset(tiles.sums(), 0, (last - first) * kGroupSums * sizeof(float));
      for (size_t chunk = 0; chunk < tiles.chunks(); ++chunk) {
        tiles.Unpack(panels, chunk);
        float* c = tiles.sums();
        for (size_t index = first; index < last; ++index, c += kGroupSums) {
          const RowGroup group = GroupAt(x.grain, x.rows, x.k, index);
          if (group.rows == kTileRows) {
            tiles.template AddTile<kTileRows>(chunk, x.data, group, c);
          } else {
            tiles.template AddTile<kTileRows - 1>(chunk, x.data, group, c);
          }
        }
      }
      const float* c = tiles.sums();
      for (size_t index = first; index < last; ++index, c += kGroupSums) {
        const RowGroup group = GroupAt(x.grain, x.rows, x.k, index);
        tiles.Store(c, group.rows, out + group.first * out_stride, out_stride);
      }
    }
  }
}

}  // namespace
}  // namespace arm
}  // namespace potluck
