#include "engine/pack.h"

#include <cstring>

namespace potluck {
namespace {

constexpr size_t kSuperblock = 256;
constexpr size_t kSuperblockRecord = 1680;                 // Q6_K: 8 blocks of 210 bytes
constexpr size_t kSuperblockCodes = 16 + 16 * kPanelRows;  // offset of the codes in it

uint16_t HalfAt(const uint8_t* bytes) {
  uint16_t half = 0;
  std::memcpy(&half, bytes, sizeof half);
  return half;
}

bool IsFiniteHalf(const uint8_t* bytes) { return (HalfAt(bytes) & 0x7c00u) != 0x7c00u; }

// Types of 32-blocks: what a record holds besides codes of 4 or 8 bits.
struct Block32Shape {
  size_t n_scales;    // f16 fields at the start of a file block: d, or d and m
  size_t code_bytes;  // 16 or 32 a row
};

Block32Shape ShapeOf(WeightType type) {
  return {type == WeightType::kQ4_1 ? 2u : 1u, type == WeightType::kQ8_0 ? 32u : 16u};
}

// File and panel agree on the bytes of a group of 4 values, so packing moves whole words: Q4_0's
// own pairing (j and j+16 in a byte) is the panel's.
bool PackBlock32(WeightType type, const uint8_t* row, size_t r, size_t k, uint8_t* panel) {
  const Block32Shape shape = ShapeOf(type);
  const size_t g = RecordBlocks(k);
  const size_t codes_offset = shape.n_scales * g * 2 * kPanelRows;
  const size_t record_bytes = codes_offset + g * shape.code_bytes * kPanelRows;
  bool finite = true;
  for (size_t b = 0; b < k / 32; ++b) {
    uint8_t* record = panel + b / g * record_bytes;
    for (size_t s = 0; s < shape.n_scales; ++s, row += 2) {
      finite &= IsFiniteHalf(row);
      std::memcpy(record + ((s * g + b % g) * kPanelRows + r) * 2, row, 2);
    }
    uint8_t* codes = record + codes_offset + b % g * shape.code_bytes * kPanelRows + 4 * r;
    for (size_t v = 0; v < shape.code_bytes / 4; ++v, row += 4) std::memcpy(codes + 32 * v, row, 4);
  }
  return finite;
}

// The 256 codes (0..63) of one Q6_K block of a file. Each half of 128 values has 64 bytes of low
// nibbles and 32 of tops.
void ReadCodesQ6K(const uint8_t* block, uint8_t codes[kSuperblock]) {
  for (size_t half = 0; half < 2; ++half) {
    const uint8_t* low = block + 64 * half;
    const uint8_t* top = block + 128 + 32 * half;
    uint8_t* out = codes + 128 * half;
    for (size_t l = 0; l < 32; ++l) {
      out[l] = static_cast<uint8_t>((low[l] & 15) | (top[l] & 3) << 4);
      out[l + 32] = static_cast<uint8_t>((low[l + 32] & 15) | (top[l] >> 2 & 3) << 4);
      out[l + 64] = static_cast<uint8_t>(low[l] >> 4 | (top[l] >> 4 & 3) << 4);
      out[l + 96] = static_cast<uint8_t>(low[l + 32] >> 4 | (top[l] >> 6) << 4);
    }
  }
}

bool PackQ6K(const uint8_t* row, size_t r, size_t k, uint8_t* panel) {
  uint8_t codes[kSuperblock];
  bool finite = true;
  for (size_t b = 0; b < k / kSuperblock; ++b, row += 210) {
    uint8_t* record = panel + b * kSuperblockRecord;
    finite &= IsFiniteHalf(row + 208);
    std::memcpy(record + 2 * r, row + 208, 2);
    for (size_t s = 0; s < 16; ++s) record[16 + s * kPanelRows + r] = row[192 + s];
    ReadCodesQ6K(row, codes);
    for (size_t c = 0; c < 8; ++c) {  // each 32 values: 4 vectors of nibbles, 2 of tops
      uint8_t* to = record + kSuperblockCodes + c * 192 + 4 * r;
      const uint8_t* q = codes + 32 * c;
      for (size_t i = 0; i < 16; ++i) {
        to[i / 4 * 32 + i % 4] = static_cast<uint8_t>((q[i] & 15) | (q[16 + i] & 15) << 4);
      }
      for (size_t t = 0; t < 2; ++t) {
        for (size_t i = 0; i < 4; ++i) {
          const uint8_t* from = q + 16 * t + i;
          to[128 + 32 * t + i] = static_cast<uint8_t>(from[0] >> 4 | from[4] >> 4 << 2 |
                                                      from[8] >> 4 << 4 | from[12] >> 4 << 6);
        }
      }
    }
  }
  return finite;
}

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
    case WeightType::kQ6_K:
      return PackQ6K(row, r, k, panel);
    case WeightType::kQ4_0:
    case WeightType::kQ4_1:
    case WeightType::kQ8_0:
      return PackBlock32(type, row, r, k, panel);
  }
  return false;
}

void ReadBlock32(WeightType type, const uint8_t* panel, size_t k, size_t block, PanelBlock& out) {
  const Block32Shape shape = ShapeOf(type);
  const size_t g = RecordBlocks(k);
  const size_t codes_offset = shape.n_scales * g * 2 * kPanelRows;
  const uint8_t* record = panel + block / g * (codes_offset + g * shape.code_bytes * kPanelRows);
  const uint8_t* scales = record + block % g * 2 * kPanelRows;
  const uint8_t* codes = record + codes_offset + block % g * shape.code_bytes * kPanelRows;
  const int centre = type == WeightType::kQ4_0 ? 8 : 0;
  for (size_t r = 0; r < kPanelRows; ++r) {
    out.d[r] = HalfToFloat(HalfAt(scales + 2 * r));
    out.m[r] =
        shape.n_scales == 2 ? HalfToFloat(HalfAt(scales + g * 2 * kPanelRows + 2 * r)) : 0.0f;
    for (size_t i = 0; i < shape.code_bytes; ++i) {
      const uint8_t byte = codes[i / 4 * 32 + 4 * r + i % 4];
      if (shape.code_bytes == 32) {
        out.codes[r][i] = static_cast<int8_t>(byte);
      } else {
        out.codes[r][i] = static_cast<int8_t>((byte & 15) - centre);
        out.codes[r][16 + i] = static_cast<int8_t>((byte >> 4) - centre);
      }
    }
  }
}

void ReadQ6K(const uint8_t* panel, size_t block, PanelBlock& out) {
  const uint8_t* record = panel + block * kSuperblockRecord;
  for (size_t r = 0; r < kPanelRows; ++r) {
    out.d[r] = HalfToFloat(HalfAt(record + 2 * r));
    for (size_t s = 0; s < 16; ++s) {
      out.scales[r][s] = static_cast<int8_t>(record[16 + s * kPanelRows + r]);
    }
    for (size_t i = 0; i < kSuperblock; ++i) {
      const uint8_t* codes = record + kSuperblockCodes + i / 32 * 192 + 4 * r + i % 4;
      const size_t in_half = i % 16;
      const size_t half = i / 16 % 2;
      const int low = codes[in_half / 4 * 32] >> (4 * half) & 15;
      const int top = codes[128 + 32 * half] >> (in_half / 4 * 2) & 3;
      out.codes[r][i] = static_cast<int8_t>((low | top << 4) - 32);
    }
  }
}

float FloatAt(WeightType type, const uint8_t* panel, size_t index) {
  if (type == WeightType::kF16) return HalfToFloat(HalfAt(panel + 2 * index));
  if (type == WeightType::kBF16) return BFloatToFloat(HalfAt(panel + 2 * index));
  float value = 0;
  std::memcpy(&value, panel + 4 * index, sizeof value);
  return value;
}

}  // namespace

size_t RecordBlocks(size_t k) { return k % 128 == 0 ? 4 : k % 64 == 0 ? 2 : 1; }

size_t PanelBytes(WeightType type, size_t k) { return kPanelRows * RowBytes(type, k); }

size_t PackedBytes(WeightType type, size_t n, size_t k) {
  return (n + kPanelRows - 1) / kPanelRows * PanelBytes(type, k);
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
  switch (type) {
    case WeightType::kQ4_0:
    case WeightType::kQ4_1:
    case WeightType::kQ8_0:
      return ReadBlock32(type, panel, k, block, out);
    case WeightType::kQ6_K:
      return ReadQ6K(panel, block, out);
    case WeightType::kF32:
    case WeightType::kF16:
    case WeightType::kBF16:
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
    // Each product and the sum round once, in this order: the dequantization of ggml and of the
    // gguf package.
    for (size_t i = 0; i < values; ++i) {
      const size_t sub_block = i / 16;
      float d = block.d[row];
      if (type == WeightType::kQ6_K) d *= static_cast<float>(block.scales[row][sub_block]);
      out[i] = d * static_cast<float>(block.codes[row][i]);
      if (type == WeightType::kQ4_1) out[i] += block.m[row];
    }
  }
}

}  // namespace potluck
