#include "engine/pack.h"

#include <algorithm>
#include <set>
#include <utility>

#include "check.h"
#include "weights.h"

using namespace potluck;
using weights::kAllTypes;

namespace {

float HalfAt(const uint8_t* at) {
  uint16_t half = 0;
  std::memcpy(&half, at, sizeof half);
  return HalfToFloat(half);
}

// Scale and min of 6 bits of sub-block j of Q4_K and Q5_K.
std::pair<int, int> SixBits(const uint8_t* s, size_t j) {
  if (j < 4) return {s[j] & 63, s[j + 4] & 63};
  return {(s[j + 4] & 15) | s[j - 4] >> 6 << 4, s[j + 4] >> 4 | s[j] >> 6 << 4};
}

// Value j of a block of 256.
float ValueOfK(WeightType type, const uint8_t* block, size_t j) {
  const size_t half = j / 128, l = j % 32, run = j % 128 / 32;
  const float d = HalfAt(block + ScaleOffset(type));
  const float dmin = HasMin(type) ? HalfAt(block + ScaleOffset(type) + 2) : 0.0f;
  if (type == WeightType::kQ6_K) {
    const int low = block[half * 64 + run % 2 * 32 + l] >> (run / 2 * 4) & 15;
    const int top = block[128 + half * 32 + l] >> (2 * run) & 3;
    const float scale = d * static_cast<float>(static_cast<int8_t>(block[192 + j / 16]));
    return scale * static_cast<float>((low | top << 4) - 32);
  }
  if (type == WeightType::kQ2_K) {
    const int code = block[16 + 32 * half + l] >> (2 * run) & 3;
    const float value = d * static_cast<float>(block[j / 16] & 15) * static_cast<float>(code);
    return value - dmin * static_cast<float>(block[j / 16] >> 4);
  }
  if (type == WeightType::kQ3_K) {
    const uint8_t* s = block + 96;
    const size_t sub = j / 16;
    const int low = sub < 8 ? s[sub] & 15 : s[sub - 8] >> 4;
    const int scale = (low | (s[8 + sub % 4] >> (2 * (sub / 4)) & 3) << 4) - 32;
    const bool is_high = (block[l] >> (4 * half + run) & 1) != 0;
    const int code = (block[32 + 32 * half + l] >> (2 * run) & 3) - (is_high ? 0 : 4);
    return d * static_cast<float>(scale) * static_cast<float>(code);
  }
  const bool has_fifth = type == WeightType::kQ5_K;
  const auto [scale, min] = SixBits(block + 4, j / 32);
  int code = block[(has_fifth ? 48 : 16) + j / 64 * 32 + l] >> (j % 64 / 32 * 4) & 15;
  if (has_fifth) code |= (block[16 + l] >> (j / 32) & 1) << 4;
  const float value = d * static_cast<float>(scale) * static_cast<float>(code);
  return value - dmin * static_cast<float>(min);
}

// A row of the file as floats, written from the block layouts alone; each operation rounds once.
std::vector<float> Dequantized(WeightType type, const uint8_t* row, size_t k) {
  std::vector<float> out(k);
  for (size_t i = 0; i < k; ++i) {
    const uint8_t* block = row + i / InfoOf(type).block_values * InfoOf(type).block_bytes;
    const size_t j = i % InfoOf(type).block_values;
    if (type == WeightType::kF32) std::memcpy(&out[i], block, 4);
    if (type == WeightType::kF16) out[i] = HalfAt(block);
    if (type == WeightType::kBF16)
      out[i] = BFloatToFloat(static_cast<uint16_t>(block[0] | block[1] << 8));
    if (type == WeightType::kQ4_0) {
      out[i] = static_cast<float>((block[2 + j % 16] >> (j / 16 * 4) & 15) - 8) * HalfAt(block);
    }
    if (type == WeightType::kQ4_1) {
      const float product =
          static_cast<float>(block[4 + j % 16] >> (j / 16 * 4) & 15) * HalfAt(block);
      out[i] = product + HalfAt(block + 2);
    }
    if (type == WeightType::kQ8_0)
      out[i] = static_cast<float>(static_cast<int8_t>(block[2 + j])) * HalfAt(block);
    if (type == WeightType::kQ5_0 || type == WeightType::kQ5_1) {
      const bool has_min = type == WeightType::kQ5_1;
      const uint8_t* tops = block + (has_min ? 4 : 2);
      const int low = tops[4 + j % 16] >> (j / 16 * 4) & 15;
      const int code = low | (tops[j / 8] >> (j % 8) & 1) << 4;
      out[i] = static_cast<float>(has_min ? code : code - 16) * HalfAt(block);
      if (has_min) out[i] += HalfAt(block + 2);
    }
    if (InfoOf(type).block_values == 256) out[i] = ValueOfK(type, block, j);
  }
  return out;
}

std::vector<size_t> WidthsOf(WeightType type) {
  if (InfoOf(type).block_values == 256) return {256, 512, 4096};
  return {32, 64, 96, 160, 256, 576, 4096};
}

bool HaveEqualBits(const std::vector<float>& a, const std::vector<float>& b) {
  return a.size() == b.size() && std::memcmp(a.data(), b.data(), 4 * a.size()) == 0;
}

void CheckUnpacking(weights::Scales scales) {
  for (const WeightType type : kAllTypes) {
    for (const size_t k : WidthsOf(type)) {
      const size_t n = 13;
      const std::vector<uint8_t> file = weights::FileBytes(type, n, k, 7, scales);
      const std::vector<uint8_t> packed = weights::Pack(type, file, n, k);
      for (size_t row = 0; row < n; ++row) {
        std::vector<float> out(k, -1.0f);
        UnpackRow(type, packed.data() + row / 8 * PanelBytes(type, k), row % 8, k, out.data());
        CHECK(HaveEqualBits(out, Dequantized(type, file.data() + row * RowBytes(type, k), k)));
      }
    }
  }
}

}  // namespace

TEST(UnpackedRowsSayWhatTheFileSays) { CheckUnpacking(weights::Scales::kRandom); }

TEST(NegativeZeroAndSubnormalScalesSurvive) {
  CheckUnpacking(weights::Scales::kNegativeZero);
  CheckUnpacking(weights::Scales::kSubnormal);
  CheckUnpacking(weights::Scales::kLargest);
}

TEST(PanelsTakeTheBytesOfTheFile) {
  CHECK_EQ(PanelBytes(WeightType::kQ4_0, 128), 576u);
  CHECK_EQ(PanelBytes(WeightType::kQ4_1, 128), 640u);
  CHECK_EQ(PanelBytes(WeightType::kQ8_0, 128), 1088u);
  CHECK_EQ(PanelBytes(WeightType::kQ6_K, 256), 1680u);
  CHECK_EQ(PanelBytes(WeightType::kQ4_K, 256), 1152u);
  CHECK_EQ(PanelBytes(WeightType::kQ2_K, 256), 672u);
  for (const WeightType type : kAllTypes) {
    CHECK_EQ(PackedBytes(type, 24, 256), 24 * RowBytes(type, 256));
    CHECK_EQ(PackedBytes(type, 17, 256), 24 * RowBytes(type, 256));
  }
}

TEST(TheLastPanelIsPaddedWithZeros) {
  for (const WeightType type : kAllTypes) {
    const std::vector<uint8_t> file = weights::FileBytes(type, 3, 256, 11);
    const uint8_t* rows[kPanelRows] = {};
    for (size_t r = 0; r < 3; ++r) rows[r] = file.data() + r * RowBytes(type, 256);
    std::vector<uint8_t> panel(PanelBytes(type, 256), 0xff);
    CHECK(PackPanel(type, rows, 256, panel.data()) == PackResult::kOk);
    for (size_t r = 3; r < kPanelRows; ++r) {
      std::vector<float> out(256, 1.0f);
      UnpackRow(type, panel.data(), r, 256, out.data());
      for (const float value : out) CHECK_EQ(value, 0.0f);
    }
  }
}

TEST(ScalesThatAreNotFiniteAreRefused) {
  for (const WeightType type : kAllTypes) {
    const TypeInfo& info = InfoOf(type);
    const size_t exponent_byte = type == WeightType::kF32 ? 2 : ScaleOffset(type);
    const uint16_t patterns[] = {0x7f80, 0xff80, 0x7fc1, 0x7c00, 0xfc00, 0x7e01};
    const bool is_wide = type == WeightType::kF32 || type == WeightType::kBF16;
    for (size_t i = 0; i < 3; ++i) {
      std::vector<uint8_t> file = weights::FileBytes(type, 8, 512, 3);
      // The last block of the last row.
      std::memcpy(file.data() + file.size() - info.block_bytes + exponent_byte,
                  &patterns[is_wide ? i : i + 3], 2);
      const uint8_t* rows[kPanelRows] = {};
      for (size_t r = 0; r < kPanelRows; ++r) rows[r] = file.data() + r * RowBytes(type, 512);
      std::vector<uint8_t> panel(PanelBytes(type, 512));
      CHECK(PackPanel(type, rows, 512, panel.data()) == PackResult::kNotFinite);
      rows[7] = nullptr;
      CHECK(PackPanel(type, rows, 512, panel.data()) == PackResult::kOk);
    }
  }
  std::vector<uint8_t> file = weights::FileBytes(WeightType::kQ4_1, 8, 32, 3);
  weights::PutHalf(file.data() + 2, INFINITY);  // the min
  const uint8_t* rows[kPanelRows] = {file.data()};
  std::vector<uint8_t> panel(PanelBytes(WeightType::kQ4_1, 32));
  CHECK(PackPanel(WeightType::kQ4_1, rows, 32, panel.data()) == PackResult::kNotFinite);
}

TEST(TheGeneratorsOfTestDataVary) {
  for (const WeightType type : kAllTypes) {
    const std::vector<uint8_t> file = weights::FileBytes(type, 8, 512, 5);
    CHECK(std::set<uint8_t>(file.begin(), file.end()).size() > 60);
    CHECK(file != weights::FileBytes(type, 8, 512, 6));
    const std::vector<float> row = Dequantized(type, file.data(), 512);
    CHECK(std::set<float>(row.begin(), row.end()).size() > 40);
  }
  const std::vector<float> x = weights::Activations(2, 512, 1);
  CHECK(std::set<float>(x.begin(), x.end()).size() > 1000);
  CHECK(*std::min_element(x.begin(), x.end()) < -1.0f &&
        *std::max_element(x.begin(), x.end()) > 1.0f);
}

CHECK_MAIN
