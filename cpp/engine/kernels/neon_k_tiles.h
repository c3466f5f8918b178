// Records of K types unpacked for many rows; see neon_tiles.h.
//
// Every function here has internal linkage: see matmul_table.h.
#pragma once

#include "engine/kernels/neon_k.h"

namespace potluck {
namespace arm {
namespace {

// Sub-blocks stay what they are when codes are unpacked.
template <class Type>
struct UnpackedK : Unpacked<Type> {
  static constexpr size_t kUnitValues = Type::kUnitValues;
};

// K types in tiles for an Isa that has sums of its own; a chunk is a record.
template <class Isa, class Type>
class RecordTiles {
 public:
  RecordTiles(size_t k, uint8_t* scratch)
      : records_(k / 256), chunk_(*reinterpret_cast<RecordChunk*>(scratch)) {
    static_assert(sizeof(RecordChunk) <= kScratchBytes);
  }

  size_t panel_bytes() const { return records_ * Type::kRecordBytes; }
  size_t chunks() const { return records_; }
  float* sums() { return chunk_.sums; }

  void Unpack(const uint8_t* panel, size_t record) {
    const uint8_t* from = panel + record * Type::kRecordBytes;
    ReadRecordScales<Type>(from, chunk_.scales);
    for (size_t run = 0; run < 8; ++run) {
      UnpackRun<Type>(from + Type::kRuns + run * Type::kRunBytes,
                      chunk_.codes + run * kUnpackedBytes);
    }
  }

  // c[S][8] += the record times a group of S rows.
  template <size_t S>
  __attribute__((noinline)) void AddTile(size_t record, const uint8_t* data, const RowGroup& group,
                                         float* c) const {
    AddRecord<Isa, UnpackedK<Type>, S, 2>(chunk_.codes, chunk_.scales, 0,
                                          RecordRowsOf<S>(data, group, record), c);
  }

  static void Store(const float* c, size_t rows, float* out, size_t out_stride) {
    for (size_t t = 0; t < rows; ++t) StoreRow(c + 8 * t, out + t * out_stride);
  }

 private:
  struct RecordChunk {
    uint8_t codes[8 * kUnpackedBytes];  // [run][8 groups of 4 k][32]
    RecordScales scales;
    float sums[kBandRows * 8];  // [row of the band][8]
  };

  size_t records_;
  RecordChunk& chunk_;
};

}  // namespace
}  // namespace arm
}  // namespace potluck
