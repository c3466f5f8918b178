// K types: blocks of 256 values whose sub-blocks have scales, and mins, of few bits.
#include <cstring>

#include "engine/pack_blocks.h"

namespace potluck {
namespace {

constexpr size_t kValues = 256;
constexpr size_t kScaleBytes = 2 * kPanelRows;  // an f16 field of 8 rows

// One block of a file's row. Sub-blocks have 16 values; two share what a type has for 32.
struct FileBlock {
  uint8_t codes[kValues];  // unsigned
  uint8_t scales[16];      // as stored: Q3_K with its bias, Q6_K the bits of an int8
  uint8_t mins[16];
};

int CentreOf(WeightType type) {
  return type == WeightType::kQ3_K ? 4 : type == WeightType::kQ6_K ? 32 : 0;
}

int ScaleBiasOf(WeightType type) { return type == WeightType::kQ3_K ? 32 : 0; }

// 8 columns l at once: a shift may carry bits into the next byte, and the mask drops them.
using Word = uint64_t;

Word Load(const uint8_t* at) {
  Word word = 0;
  std::memcpy(&word, at, sizeof word);
  return word;
}

Word Bits(Word word, size_t shift, unsigned mask) {
  return word >> shift & mask * Word{0x0101010101010101};
}

// Each half of 128 values has 32 bytes of two-bit codes, four runs of 32 in it; bit 4 * half + run
// of a column's byte of `high`, if given, is the third bit.
void ReadTwoBits(const uint8_t* twos, const uint8_t* high, uint8_t codes[kValues]) {
  for (size_t i = 0; i < kValues; i += 8) {
    const size_t half = i / 128, run = i % 128 / 32, l = i % 32;
    Word code = Bits(Load(twos + 32 * half + l), 2 * run, 3);
    if (high != nullptr) code |= Bits(Load(high + l), 4 * half + run, 1) << 2;
    std::memcpy(codes + i, &code, sizeof code);
  }
}

// Runs of 64 values share 32 bytes, low nibbles first; bit 2 * run + (0 or 1) of a column's byte of
// `high`, if given, is the fifth bit.
void ReadFourBits(const uint8_t* nibbles, const uint8_t* high, uint8_t codes[kValues]) {
  for (size_t i = 0; i < kValues; i += 8) {
    const size_t run = i / 64, is_upper = i % 64 / 32, l = i % 32;
    Word code = Bits(Load(nibbles + 32 * run + l), 4 * is_upper, 15);
    if (high != nullptr) code |= Bits(Load(high + l), 2 * run + is_upper, 1) << 4;
    std::memcpy(codes + i, &code, sizeof code);
  }
}

// Each half of 128 values has 64 bytes of low nibbles and 32 of tops.
void ReadSixBits(const uint8_t* nibbles, const uint8_t* tops, uint8_t codes[kValues]) {
  for (size_t i = 0; i < kValues; i += 8) {
    const size_t half = i / 128, run = i % 128 / 32, l = i % 32;
    const Word low = Bits(Load(nibbles + 64 * half + run % 2 * 32 + l), run / 2 * 4, 15);
    const Word code = low | Bits(Load(tops + 32 * half + l), 2 * run, 3) << 4;
    std::memcpy(codes + i, &code, sizeof code);
  }
}

void ReadScalesQ3K(const uint8_t s[12], FileBlock& out) {
  for (size_t j = 0; j < 16; ++j) {
    const unsigned low = j < 8 ? s[j] & 15u : static_cast<unsigned>(s[j - 8]) >> 4;
    out.scales[j] = static_cast<uint8_t>(low | (s[8 + j % 4] >> (2 * (j / 4)) & 3u) << 4);
  }
}

void ReadScalesQ4K(const uint8_t s[12], FileBlock& out) {
  for (size_t j = 0; j < 8; ++j) {
    unsigned scale = s[j] & 63u, min = s[j + 4] & 63u;
    if (j >= 4) {
      scale = (s[j + 4] & 15u) | static_cast<unsigned>(s[j - 4] >> 6) << 4;
      min = static_cast<unsigned>(s[j + 4] >> 4) | static_cast<unsigned>(s[j] >> 6) << 4;
    }
    out.scales[2 * j] = out.scales[2 * j + 1] = static_cast<uint8_t>(scale);
    out.mins[2 * j] = out.mins[2 * j + 1] = static_cast<uint8_t>(min);
  }
}

void ReadFileBlock(WeightType type, const uint8_t* block, FileBlock& out) {
  switch (type) {
    case WeightType::kQ2_K:
      ReadTwoBits(block + 16, nullptr, out.codes);
      for (size_t j = 0; j < 16; ++j) {
        out.scales[j] = block[j] & 15;
        out.mins[j] = block[j] >> 4;
      }
      return;
    case WeightType::kQ3_K:
      ReadTwoBits(block + 32, block, out.codes);
      return ReadScalesQ3K(block + 96, out);
    case WeightType::kQ4_K:
      ReadFourBits(block + 16, nullptr, out.codes);
      return ReadScalesQ4K(block + 4, out);
    case WeightType::kQ5_K:
      ReadFourBits(block + 48, block + 16, out.codes);
      return ReadScalesQ4K(block + 4, out);
    default:  // Q6_K
      ReadSixBits(block, block + 128, out.codes);
      std::memcpy(out.scales, block + 192, 16);
  }
}

// A field of few bits, spread over a byte of a panel.
void PutBits(uint8_t& byte, size_t shift, unsigned mask, unsigned value) {
  byte = static_cast<uint8_t>((byte & ~(mask << shift)) | (value & mask) << shift);
}

// Scales (and mins) of row r into and out of the fields of a record; see pack.h.
void WriteScales(WeightType type, const FileBlock& block, size_t r, uint8_t* fields) {
  for (size_t s = 0; s < 16; ++s) {
    const unsigned scale = block.scales[s], min = block.mins[s];
    if (type == WeightType::kQ6_K) {
      fields[s * kPanelRows + r] = block.scales[s];
    } else if (type == WeightType::kQ2_K) {
      fields[s * kPanelRows + r] = static_cast<uint8_t>(scale | min << 4);
    } else if (type == WeightType::kQ3_K) {
      PutBits(fields[s % 8 * kPanelRows + r], s / 8 * 4, 15, scale);
      PutBits(fields[(8 + s % 4) * kPanelRows + r], s / 4 * 2, 3, scale >> 4);
    } else if (s % 2 == 0) {
      const size_t j = s / 2;
      fields[j * kPanelRows + r] = static_cast<uint8_t>((scale & 15) | (min & 15) << 4);
      PutBits(fields[(8 + j % 4) * kPanelRows + r], j / 4 * 4, 15, scale >> 4 | min >> 4 << 2);
    }
  }
}

void ReadScales(WeightType type, const uint8_t* fields, size_t r, FileBlock& out) {
  for (size_t s = 0; s < 16; ++s) {
    const unsigned byte = fields[s * kPanelRows % (8 * kPanelRows) + r];
    if (type == WeightType::kQ6_K) {
      out.scales[s] = fields[s * kPanelRows + r];
    } else if (type == WeightType::kQ2_K) {
      out.scales[s] = fields[s * kPanelRows + r] & 15;
      out.mins[s] = fields[s * kPanelRows + r] >> 4;
    } else if (type == WeightType::kQ3_K) {
      const unsigned tops = fields[(8 + s % 4) * kPanelRows + r] >> (s / 4 * 2) & 3u;
      out.scales[s] = static_cast<uint8_t>((byte >> (s / 8 * 4) & 15u) | tops << 4);
    } else {
      const size_t j = s / 2;
      const unsigned lows = fields[j * kPanelRows + r];
      const unsigned tops = fields[(8 + j % 4) * kPanelRows + r] >> (j / 4 * 4) & 15u;
      out.scales[s] = static_cast<uint8_t>((lows & 15) | (tops & 3) << 4);
      out.mins[s] = static_cast<uint8_t>(lows >> 4 | tops >> 2 << 4);
    }
  }
}

size_t FieldsOffset(WeightType type) { return HasMin(type) ? 2 * kScaleBytes : kScaleBytes; }

size_t RunsOffset(WeightType type) {
  return FieldsOffset(type) + (type == WeightType::kQ2_K || type == WeightType::kQ6_K ? 128u : 96u);
}

}  // namespace

bool PackBlock256(WeightType type, const uint8_t* row, size_t r, size_t k, uint8_t* panel) {
  const TypeInfo& info = InfoOf(type);
  const RunShape run_shape = RunOf(type);
  FileBlock block = {};
  bool finite = true;
  for (size_t b = 0; b < k / kValues; ++b, row += info.block_bytes) {
    uint8_t* record = panel + b * info.block_bytes * kPanelRows;
    const uint8_t* d = row + ScaleOffset(type);
    finite &= IsFiniteHalf(d);
    std::memcpy(record + 2 * r, d, 2);
    if (HasMin(type)) {
      finite &= IsFiniteHalf(d + 2);
      std::memcpy(record + kScaleBytes + 2 * r, d + 2, 2);
    }
    ReadFileBlock(type, row, block);
    WriteScales(type, block, r, record + FieldsOffset(type));
    for (size_t run = 0; run < 8; ++run)
      WriteRun(run_shape, block.codes + 32 * run, r,
               record + RunsOffset(type) + run * run_shape.Bytes());
  }
  return finite;
}

void ReadBlock256(WeightType type, const uint8_t* panel, size_t block, PanelBlock& out) {
  const RunShape run_shape = RunOf(type);
  const uint8_t* record = panel + block * InfoOf(type).block_bytes * kPanelRows;
  FileBlock read = {};
  for (size_t r = 0; r < kPanelRows; ++r) {
    out.d[r] = HalfToFloat(HalfAt(record + 2 * r));
    out.m[r] = HasMin(type) ? HalfToFloat(HalfAt(record + kScaleBytes + 2 * r)) : 0.0f;
    ReadScales(type, record + FieldsOffset(type), r, read);
    for (size_t s = 0; s < 16; ++s) {
      const int scale = type == WeightType::kQ6_K ? static_cast<int8_t>(read.scales[s])
                                                  : read.scales[s] - ScaleBiasOf(type);
      out.scales[r][s] = static_cast<int8_t>(scale);
      out.mins[r][s] = static_cast<int8_t>(read.mins[s]);
    }
    for (size_t run = 0; run < 8; ++run)
      ReadRun(run_shape, record + RunsOffset(type) + run * run_shape.Bytes(), r,
              read.codes + 32 * run);
    for (size_t i = 0; i < kValues; ++i)
      out.codes[r][i] = static_cast<int8_t>(read.codes[i] - CentreOf(type));
  }
}

}  // namespace potluck
