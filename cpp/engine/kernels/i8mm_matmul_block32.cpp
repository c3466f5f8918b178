// Blocks of 32 values with smmla, tiles of 3 or 4 rows of activations and a panel. The running
// outputs lie as the sums do, 2 x 2; only the last step puts them into rows.
#include "engine/kernels/i8mm_codes.h"
#include "engine/kernels/i8mm_matmul.h"
#include "engine/kernels/neon_tiles.h"

namespace potluck {
namespace i8mm {
namespace {

constexpr size_t kChunkBlocks = 32;  // 10 KiB of L1, 12 with mins

struct Chunk {
  uint8_t codes[kChunkBlocks * arm::kUnpackedBytes];
  float d[kChunkBlocks * 16];      // [block][pair of rows][2 rows][twice]
  float m[kChunkBlocks * 16];      // the same; types with a min
  float sums[arm::kBandRows * 8];  // [group][pair of rows][pair of activations][2][2]
};

// Scales of 8 rows, each twice.
inline void UnpackScales(const uint8_t* halves, float* to) {
  for (size_t h = 0; h < 2; ++h) {
    const float32x4_t four = arm::LoadHalves(halves + 8 * h);
    vst1q_f32(to + 8 * h, vzip1q_f32(four, four));
    vst1q_f32(to + 8 * h + 4, vzip2q_f32(four, four));
  }
}

inline float32x4_t Twice(float32x2_t pair) { return vcombine_f32(pair, pair); }

// Factors of a group's rows 2 and 3, or 2 alone.
template <size_t S>
inline float32x4_t LastPair(const float* factors) {
  return S == 4 ? Twice(vld1_f32(factors + 2)) : vdupq_n_f32(factors[2]);
}

// c += n blocks of a panel times a group of S rows.
template <class Type, size_t S>
inline void AddBlocks(const Chunk& w, size_t n, arm::RowsAt x, float* c) {
  float32x4_t acc[4][2];
#pragma GCC unroll 4
  for (size_t i = 0; i < 4; ++i) {
    acc[i][0] = vld1q_f32(c + 8 * i);
    acc[i][1] = vld1q_f32(c + 8 * i + 4);
  }
  for (size_t b = 0; b < n; ++b) {
    Tile tile;
    SetZero(tile);
    const uint8_t* codes = w.codes + b * arm::kUnpackedBytes;
#pragma GCC unroll 4
    for (size_t p = 0; p < 4; ++p) AddEight<S>(tile, codes + 64 * p, x.codes + 8 * S * p);
    const float32x4_t first = Twice(vld1_f32(x.scales)), second = LastPair<S>(x.scales);
#pragma GCC unroll 4
    for (size_t i = 0; i < 4; ++i) {
      const float32x4_t d = vld1q_f32(w.d + 16 * b + 4 * i);
      acc[i][0] = vfmaq_f32(acc[i][0], vcvtq_f32_s32(tile[i][0]), vmulq_f32(d, first));
      acc[i][1] = vfmaq_f32(acc[i][1], vcvtq_f32_s32(tile[i][1]), vmulq_f32(d, second));
    }
    if constexpr (Type::kHasMin) {
      const float32x4_t first_sum = Twice(vld1_f32(x.sums)), second_sum = LastPair<S>(x.sums);
#pragma GCC unroll 4
      for (size_t i = 0; i < 4; ++i) {
        const float32x4_t m = vld1q_f32(w.m + 16 * b + 4 * i);
        acc[i][0] = vfmaq_f32(acc[i][0], m, first_sum);
        acc[i][1] = vfmaq_f32(acc[i][1], m, second_sum);
      }
    }
    x = {x.codes + 32 * S, x.seeds, x.scales + S, x.sums + S};
  }
#pragma GCC unroll 4
  for (size_t i = 0; i < 4; ++i) {
    vst1q_f32(c + 8 * i, acc[i][0]);
    vst1q_f32(c + 8 * i + 4, acc[i][1]);
  }
}

// What MultiplyBands asks for.
template <class Type>
class Tiles {
 public:
  Tiles(size_t k, uint8_t* scratch)
      : shape_(arm::ShapeOf<Type>(k)), chunk_(*reinterpret_cast<Chunk*>(scratch)) {
    static_assert(sizeof(Chunk) <= kScratchBytes);
  }

  size_t panel_bytes() const { return shape_.panel_bytes; }
  size_t chunks() const { return (shape_.blocks + kChunkBlocks - 1) / kChunkBlocks; }
  float* sums() { return chunk_.sums; }

  void Unpack(const uint8_t* panel, size_t chunk) {
    const size_t g = shape_.record_blocks;
    for (size_t at = 0; at < Blocks(chunk); ++at) {
      const size_t b = chunk * kChunkBlocks + at;
      const uint8_t* record = panel + b / g * shape_.record_bytes;
      const uint8_t* d = record + b % g * arm::kHalfScalesBytes;
      UnpackRun<Type>(record + shape_.codes_offset + b % g * Type::kRunBytes,
                      chunk_.codes + at * arm::kUnpackedBytes);
      UnpackScales(d, chunk_.d + 16 * at);
      if (Type::kHasMin) UnpackScales(d + g * arm::kHalfScalesBytes, chunk_.m + 16 * at);
    }
  }

  template <size_t S>
  __attribute__((noinline)) void AddTile(size_t chunk, const uint8_t* data, const RowGroup& group,
                                         float* c) const {
    RowGroup of_s = group;
    of_s.rows = S;
    AddBlocks<Type, S>(chunk_, Blocks(chunk), arm::RowsOf(data, of_s, chunk * kChunkBlocks), c);
  }

  static void Store(const float* c, size_t rows, float* out, size_t out_stride) {
    for (size_t t = 0; t < rows; ++t) {
      for (size_t h = 0; h < 2; ++h) {
        const float32x4_t a = vld1q_f32(c + 16 * h + 4 * (t / 2));
        const float32x4_t b = vld1q_f32(c + 16 * h + 8 + 4 * (t / 2));
        vst1q_f32(out + t * out_stride + 4 * h, t % 2 == 0 ? vuzp1q_f32(a, b) : vuzp2q_f32(a, b));
      }
    }
  }

 private:
  size_t Blocks(size_t chunk) const {
    const size_t left = shape_.blocks - chunk * kChunkBlocks;
    return left < kChunkBlocks ? left : kChunkBlocks;
  }

  arm::PanelShape shape_;
  Chunk& chunk_;
};

template <class Type>
void MultiplyPanels(const uint8_t* panels, size_t n_panels, const PreparedRows& x, float* out,
                    size_t out_stride, uint8_t* scratch) {
  arm::MultiplyBands(Tiles<Type>(x.k, scratch), panels, n_panels, x, out, out_stride);
}

}  // namespace

void MultiplyBlock32(WeightType type, const uint8_t* panels, size_t n_panels, const PreparedRows& x,
                     float* out, size_t out_stride, uint8_t* scratch) {
  switch (type) {
    case WeightType::kQ4_0:
      return MultiplyPanels<arm::Q4_0>(panels, n_panels, x, out, out_stride, scratch);
    case WeightType::kQ4_1:
      return MultiplyPanels<arm::Q4_1>(panels, n_panels, x, out, out_stride, scratch);
    case WeightType::kQ5_0:
      return MultiplyPanels<arm::Q5_0>(panels, n_panels, x, out, out_stride, scratch);
    case WeightType::kQ5_1:
      return MultiplyPanels<arm::Q5_1>(panels, n_panels, x, out, out_stride, scratch);
    default:
      return MultiplyPanels<arm::Q8_0>(panels, n_panels, x, out, out_stride, scratch);
  }
}

}  // namespace i8mm
}  // namespace potluck
