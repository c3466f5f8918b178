// Types with blocks of 32 values: Q4_0, Q4_1, Q5_0, Q5_1, Q8_0.
#include <cstring>

#include "engine/pack_blocks.h"

namespace potluck {
namespace {

constexpr size_t kScaleBytes = 2 * kPanelRows;  // an f16 field of 8 rows

// Where a block lies in a panel.
struct Shape {
  size_t n_scales;  // f16 fields at the start of a file's block: d, or d and m
  bool has_tops;    // 4 bytes of fifth bits in a file's block
  size_t run_bytes;

  size_t CodesOffset(size_t g) const { return n_scales * g * kScaleBytes; }
  size_t RecordBytes(size_t g) const { return CodesOffset(g) + g * run_bytes; }
};

Shape ShapeOf(WeightType type) {
  const bool has_tops = type == WeightType::kQ5_0 || type == WeightType::kQ5_1;
  const size_t run_bytes = type == WeightType::kQ8_0 ? 256 : RunOf(type).Bytes();
  return {HasMin(type) ? 2u : 1u, has_tops, run_bytes};
}

int CentreOf(WeightType type) {
  return type == WeightType::kQ4_0 ? 8 : type == WeightType::kQ5_0 ? 16 : 0;
}

// The codes of a file's block, after its scales: fifth bits, if any, then a byte for j and j + 16.
void ReadFileCodes(const uint8_t* bytes, bool has_tops, uint8_t codes[32]) {
  uint32_t tops = 0;
  if (has_tops) {
    std::memcpy(&tops, bytes, sizeof tops);
    bytes += sizeof tops;
  }
  for (size_t j = 0; j < 16; ++j) {
    codes[j] = static_cast<uint8_t>((bytes[j] & 15) | (tops >> j & 1u) << 4);
    codes[16 + j] = static_cast<uint8_t>(bytes[j] >> 4 | (tops >> (16 + j) & 1u) << 4);
  }
}

}  // namespace

// File and panel agree on the bytes of a group of 4 values where there are no fifth bits, so
// packing moves whole words: Q4_0's own pairing (j and j+16 in a byte) is the panel's.
bool PackBlock32(WeightType type, const uint8_t* row, size_t r, size_t k, uint8_t* panel) {
  const Shape shape = ShapeOf(type);
  const RunShape run_shape = RunOf(type);
  const size_t g = RecordBlocks(k);
  const size_t file_codes = InfoOf(type).block_bytes - 2 * shape.n_scales;
  bool finite = true;
  for (size_t b = 0; b < k / 32; ++b) {
    uint8_t* record = panel + b / g * shape.RecordBytes(g);
    for (size_t s = 0; s < shape.n_scales; ++s, row += 2) {
      finite &= IsFiniteHalf(row);
      std::memcpy(record + (s * g + b % g) * kScaleBytes + 2 * r, row, 2);
    }
    uint8_t* run = record + shape.CodesOffset(g) + b % g * shape.run_bytes;
    if (shape.has_tops) {
      uint8_t codes[32];
      ReadFileCodes(row, true, codes);
      WriteRun(run_shape, codes, r, run);
    } else {
      for (size_t v = 0; v < file_codes / 4; ++v) std::memcpy(run + 32 * v + 4 * r, row + 4 * v, 4);
    }
    row += file_codes;
  }
  return finite;
}

void ReadBlock32(WeightType type, const uint8_t* panel, size_t k, size_t block, PanelBlock& out) {
  const Shape shape = ShapeOf(type);
  const size_t g = RecordBlocks(k);
  const uint8_t* record = panel + block / g * shape.RecordBytes(g);
  const uint8_t* scales = record + block % g * kScaleBytes;
  const uint8_t* run = record + shape.CodesOffset(g) + block % g * shape.run_bytes;
  const int centre = CentreOf(type);
  for (size_t r = 0; r < kPanelRows; ++r) {
    out.d[r] = HalfToFloat(HalfAt(scales + 2 * r));
    out.m[r] = shape.n_scales == 2 ? HalfToFloat(HalfAt(scales + g * kScaleBytes + 2 * r)) : 0.0f;
    if (type == WeightType::kQ8_0) {
      for (size_t i = 0; i < 32; ++i)
        out.codes[r][i] = static_cast<int8_t>(run[i / 4 * 32 + 4 * r + i % 4]);
      continue;
    }
    uint8_t codes[32];
    ReadRun(RunOf(type), run, r, codes);
    for (size_t i = 0; i < 32; ++i) out.codes[r][i] = static_cast<int8_t>(codes[i] - centre);
  }
}

}  // namespace potluck
