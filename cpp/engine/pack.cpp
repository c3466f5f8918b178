#include "engine/pack.h"

#include <cstring>

#include "engine/pack_blocks.h"

namespace potluck {
namespace {

// value_bytes 4: f32; 2: f16 or bf16. `exponent` masks the exponent's bits, all set in NaN and
// infinity.
bool PackFloats(const uint8_t* row, size_t r, size_t k, size_t value_bytes, uint32_t exponent,
                uint8_t* panel) {
  bool finite = true;
  for (size_t i = 0; i < k; ++i, row += value_bytes) {
    uint32_t bits = 0;
    std::memcpy(&bits, row, value_bytes);  // little-endian, as the file is
    finite &= (bits & exponent) != exponent;
    std::memcpy(panel + (i * kPanelRows + r) * value_bytes, row, value_bytes);
  }
  return finite;
}

bool PackRow(WeightType type, const uint8_t* row, size_t r, size_t k, uint8_t* panel) {
  switch (type) {
    case WeightType::kF32:
      return PackFloats(row, r, k, 4, 0x7f800000u, panel);
    case WeightType::kF16:
      return PackFloats(row, r, k, 2, 0x7c00u, panel);
    case WeightType::kBF16:
      return PackFloats(row, r, k, 2, 0x7f80u, panel);
    default:
      return InfoOf(type).block_values == 32 ? PackBlock32(type, row, r, k, panel)
                                             : PackBlock256(type, row, r, k, panel);
  }
}

float FloatAt(WeightType type, const uint8_t* panel, size_t index) {
  if (type == WeightType::kF16) return HalfToFloat(HalfAt(panel + 2 * index));
  if (type == WeightType::kBF16) return BFloatToFloat(HalfAt(panel + 2 * index));
  float value = 0;
  std::memcpy(&value, panel + 4 * index, sizeof value);
  return value;
}

// Value i of row r. Each product and each sum round once, in this order: the dequantization of
// ggml and of the gguf package.
float ValueOf(WeightType type, const PanelBlock& block, size_t r, size_t i) {
  const float code = static_cast<float>(block.codes[r][i]);
  if (InfoOf(type).block_values == 32) {
    const float value = block.d[r] * code;
    return HasMin(type) ? value + block.m[r] : value;
  }
  const size_t sub_block = i / 16;
  const float scale = block.d[r] * static_cast<float>(block.scales[r][sub_block]);
  const float value = scale * code;
  return HasMin(type) ? value - block.m[r] * static_cast<float>(block.mins[r][sub_block]) : value;
}

}  // namespace

size_t RecordBlocks(size_t k) { return k % 128 == 0 ? 4 : k % 64 == 0 ? 2 : 1; }

size_t PanelBytes(WeightType type, size_t k) { return kPanelRows * RowBytes(type, k); }

size_t PackedBytes(WeightType type, size_t n, size_t k) {
  return (n + kPanelRows - 1) / kPanelRows * PanelBytes(type, k);
}

bool HasMin(WeightType type) {
  switch (type) {
    case WeightType::kQ4_1:
    case WeightType::kQ5_1:
    case WeightType::kQ2_K:
    case WeightType::kQ4_K:
    case WeightType::kQ5_K:
      return true;
    default:
      return false;
  }
}

PackResult PackPanel(WeightType type, const uint8_t* const rows[kPanelRows], size_t k,
                     uint8_t* panel) {
  bool finite = true;
  bool is_full = true;
  for (size_t r = 0; r < kPanelRows; ++r) is_full &= rows[r] != nullptr;
  if (!is_full) std::memset(panel, 0, PanelBytes(type, k));
  for (size_t r = 0; r < kPanelRows; ++r) {
    if (rows[r] != nullptr) finite &= PackRow(type, rows[r], r, k, panel);
  }
  return finite ? PackResult::kOk : PackResult::kNotFinite;
}

void ReadPanelBlock(WeightType type, const uint8_t* panel, size_t k, size_t block,
                    PanelBlock& out) {
  switch (InfoOf(type).block_values) {
    case 32:
      return ReadBlock32(type, panel, k, block, out);
    case 256:
      return ReadBlock256(type, panel, block, out);
    default:
      for (size_t r = 0; r < kPanelRows; ++r)
        out.d[r] = FloatAt(type, panel, block * kPanelRows + r);
  }
}

void UnpackRow(WeightType type, const uint8_t* panel, size_t row, size_t k, float* out) {
  const size_t values = InfoOf(type).block_values;
  PanelBlock block;
  for (size_t b = 0; b < k / values; ++b, out += values) {
    ReadPanelBlock(type, panel, k, b, block);
    if (values == 1) {
      *out = block.d[row];
      continue;
    }
    for (size_t i = 0; i < values; ++i) out[i] = ValueOf(type, block, row, i);
  }
}

}  // namespace potluck
