// K types with smmla, tiles of 3 or 4 rows of activations and a panel. Totals over a record lie as
// the sums do, 2 x 2, and are put into rows once a record.
#include "engine/kernels/i8mm_codes.h"
#include "engine/kernels/i8mm_matmul.h"
#include "engine/kernels/neon_k.h"

namespace potluck {
namespace i8mm {
namespace {

struct Chunk {
  uint8_t codes[8 * arm::kUnpackedBytes];
  int32_t scales[16 * 16];  // [sub-block][pair of rows][2 rows][twice]
  arm::RecordScales record;
  float sums[arm::kBandRows * 8];  // [row of the band][8]
};

// Scales of 8 rows, each twice.
inline void UnpackSubScales(const int16_t* scales, int32_t* to) {
  for (size_t h = 0; h < 2; ++h) {
    const int32x4_t four = vmovl_s16(vld1_s16(scales + 4 * h));
    vst1q_s32(to + 8 * h, vzip1q_s32(four, four));
    vst1q_s32(to + 8 * h + 4, vzip2q_s32(four, four));
  }
}

inline void AddScaled(Tile& totals, const Tile& sums, const int32_t* scales) {
#pragma GCC unroll 4
  for (size_t i = 0; i < 4; ++i) {
    const int32x4_t scale = vld1q_s32(scales + 4 * i);
    totals[i][0] = vmlaq_s32(totals[i][0], sums[i][0], scale);
    totals[i][1] = vmlaq_s32(totals[i][1], sums[i][1], scale);
  }
}

// The integer sums of a record, put into rows.
template <class Type, size_t S>
inline void AddUnits(const Chunk& w, const uint8_t* x, int32x4_t (&rows)[S][2]) {
  constexpr size_t kEights = Type::kUnitValues / 8;
  Tile totals;
  SetZero(totals);
  for (size_t unit = 0; unit < 256 / Type::kUnitValues; ++unit) {
    Tile sums;
    SetZero(sums);
#pragma GCC unroll 4
    for (size_t p = 0; p < kEights; ++p) {
      AddEight<S>(sums, w.codes + 64 * (kEights * unit + p), x + 8 * S * (kEights * unit + p));
    }
    AddScaled(totals, sums, w.scales + 16 * unit);
  }
#pragma GCC unroll 4
  for (size_t t = 0; t < S; ++t) {
#pragma GCC unroll 2
    for (size_t h = 0; h < 2; ++h) {
      const int32x4_t a = totals[2 * h][t / 2], b = totals[2 * h + 1][t / 2];
      rows[t][h] = t % 2 == 0 ? vuzp1q_s32(a, b) : vuzp2q_s32(a, b);
    }
  }
}

// What MultiplyBands asks for; a chunk is a record.
template <class Type>
class Tiles {
 public:
  Tiles(size_t k, uint8_t* scratch)
      : records_(k / 256), chunk_(*reinterpret_cast<Chunk*>(scratch)) {
    static_assert(sizeof(Chunk) <= kScratchBytes);
  }

  size_t panel_bytes() const { return records_ * Type::kRecordBytes; }
  size_t chunks() const { return records_; }
  float* sums() { return chunk_.sums; }

  void Unpack(const uint8_t* panel, size_t record) {
    const uint8_t* from = panel + record * Type::kRecordBytes;
    arm::ReadRecordScales<Type>(from, chunk_.record);
    for (size_t unit = 0; unit < 256 / Type::kUnitValues; ++unit) {
      UnpackSubScales(chunk_.record.scales + 8 * unit, chunk_.scales + 16 * unit);
    }
    for (size_t run = 0; run < 8; ++run) {
      UnpackRun<Type>(from + Type::kRuns + run * Type::kRunBytes,
                      chunk_.codes + run * arm::kUnpackedBytes);
    }
  }

  template <size_t S>
  __attribute__((noinline)) void AddTile(size_t record, const uint8_t* data, const RowGroup& group,
                                         float* c) const {
    const arm::RecordRows x = arm::RecordRowsOf<S>(data, group, record);
    int32x4_t rows[S][2];
    AddUnits<Type, S>(chunk_, x.codes, rows);
    arm::FinishRecord<Type, S, 2>(rows, chunk_.record, 0, x, c);
  }

  static void Store(const float* c, size_t rows, float* out, size_t out_stride) {
    for (size_t t = 0; t < rows; ++t) arm::StoreRow(c + 8 * t, out + t * out_stride);
  }

 private:
  size_t records_;
  Chunk& chunk_;
};

template <class Type>
void MultiplyPanels(const uint8_t* panels, size_t n_panels, const PreparedRows& x, float* out,
                    size_t out_stride, uint8_t* scratch) {
  arm::MultiplyBands(Tiles<Type>(x.k, scratch), panels, n_panels, x, out, out_stride);
}

}  // namespace

void MultiplyK(WeightType type, const uint8_t* panels, size_t n_panels, const PreparedRows& x,
               float* out, size_t out_stride, uint8_t* scratch) {
  switch (type) {
    case WeightType::kQ2_K:
      return MultiplyPanels<arm::Q2_K>(panels, n_panels, x, out, out_stride, scratch);
    case WeightType::kQ3_K:
      return MultiplyPanels<arm::Q3_K>(panels, n_panels, x, out, out_stride, scratch);
    case WeightType::kQ4_K:
      return MultiplyPanels<arm::Q4_K>(panels, n_panels, x, out, out_stride, scratch);
    case WeightType::kQ5_K:
      return MultiplyPanels<arm::Q5_K>(panels, n_panels, x, out, out_stride, scratch);
    default:
      return MultiplyPanels<arm::Q6_K>(panels, n_panels, x, out, out_stride, scratch);
  }
}

}  // namespace i8mm
}  // namespace potluck
