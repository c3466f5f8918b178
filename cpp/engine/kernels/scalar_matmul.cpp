// The matrix kernels that define the answer: no SIMD, no libm but fmaf, one chain of operations an
// output.
//
// Steps, bit for bit the contract of every ISA (f32, round to nearest even, subnormals kept, fma =
// one rounding):
// 1. Activations to int8 codes, per 32 values (kBlock32) or 256 (kBlock256): amax = largest |x|;
// below 2^-100: d = 0,
//    codes 0. Else d = amax / 127, code = rint_even(x * (127 / amax)) clamped to +-127.
// 2. Blocks of 32, k rising: isum = exact dot of the codes less their centre; acc = fma(isum, dw *
// da, acc); with a min
//    then acc = fma(mw, da * f32(S), acc), S the sum of the block's activation codes.
// 3. K types, 256 values: isum = sum over its 16 sub-blocks of scale * dot, codes and scales less
// their centres; acc = fma(f32(isum), dw * da, acc); with mins then isum = sum of min * S, S the
// sum of the sub-block's activation codes, and acc = fma(f32(isum), -(dmin * da), acc).
// 4. Float weights: acc = fma(w, x, acc), k rising, activations unrounded.
#include <cmath>
#include <cstring>

#include "engine/kernels/matmul_table.h"
#include "engine/pack.h"

namespace potluck {
namespace {

#if defined(POTLUCK_MUTATION_CLAMP)
constexpr float kCodeRange = 128.0f,
                kLowestCode = -128.0f;  // a careless quantizer, for tests to catch
#else
constexpr float kCodeRange = 127.0f, kLowestCode = -127.0f;
#endif
constexpr float kHighestCode = 127.0f;
constexpr uint32_t kInfinityBits = 0x7f800000u;
constexpr float kTiny = 0x1p-100f;

float MagnitudeOf(uint32_t bits) {
  float value = 0;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

// Largest |x|, as bits: NaN and infinity come out as >= kInfinityBits.
uint32_t LargestBits(const float* x, size_t n) {
  uint32_t largest = 0;
  for (size_t i = 0; i < n; ++i) {
    uint32_t bits = 0;
    std::memcpy(&bits, x + i, sizeof bits);
    bits &= 0x7fffffffu;
    largest = bits > largest ? bits : largest;
  }
  return largest;
}

// Exact for |x| <= 2^22: the addition leaves no bits below 1 and rounds to even.
float RintEven(float x) {
  constexpr float kShift = 12582912.0f;  // 1.5 * 2^23
  return (x + kShift) - kShift;
}

void PutWord(uint8_t* array, size_t index, const void* word) {
  std::memcpy(array + 4 * index, word, 4);
}

// Quantizes x[n] into `codes`; returns d.
float Quantize(const float* x, size_t n, float amax, int8_t* codes) {
  if (amax < kTiny) {
    std::memset(codes, 0, n);
    return 0.0f;
  }
  const float r = kCodeRange / amax;
  for (size_t i = 0; i < n; ++i) {
    float code = RintEven(x[i] * r);
    code = code < kLowestCode ? kLowestCode : code > kHighestCode ? kHighestCode : code;
    codes[i] = static_cast<int8_t>(code);
  }
  return amax / 127.0f;
}

// The sum of codes[n]; `seed` becomes (-c*S01, -c*S23).
int Sums(const int8_t* codes, size_t n, int c, int16_t seed[2]) {
  int s01 = 0, s23 = 0;
  for (size_t i = 0; i < n; i += 4) {
    s01 += codes[i] + codes[i + 1];
    s23 += codes[i + 2] + codes[i + 3];
  }
  seed[0] = static_cast<int16_t>(-c * s01);
  seed[1] = static_cast<int16_t>(-c * s23);
  return s01 + s23;
}

bool Prepare(Grain grain, const float* x, size_t k, const RowGroup& group, size_t lane,
             uint8_t* dst) {
  const size_t block = grain == Grain::kBlock32 ? 32 : 256;
  if (grain == Grain::kFloat) {
    for (size_t i = 0; i < k; ++i) PutWord(dst + group.codes, i * group.rows + lane, x + i);
    return LargestBits(x, k) < kInfinityBits;
  }
  int8_t codes[256] = {};
  int16_t seed[2] = {0, 0};
  for (size_t b = 0; b < k / block; ++b) {
    const uint32_t largest = LargestBits(x + b * block, block);
    if (largest >= kInfinityBits) return false;
    const float d = Quantize(x + b * block, block, MagnitudeOf(largest), codes);
    for (size_t j = 0; j < block / 4; ++j) {
      PutWord(dst + group.codes, (b * block / 4 + j) * group.rows + lane, codes + 4 * j);
    }
    PutWord(dst + group.scales, b * group.rows + lane, &d);
    if (grain == Grain::kBlock32) {
      const float sum = d * static_cast<float>(Sums(codes, 32, 8, seed));
      PutWord(dst + group.sums, b * group.rows + lane, &sum);
      PutWord(dst + group.seeds, b * group.rows + lane, seed);
      continue;
    }
    int16_t sums[2] = {0, 0};
    for (size_t s = 0; s < 16; ++s) {
      sums[s % 2] = static_cast<int16_t>(Sums(codes + 16 * s, 16, 32, seed));
      PutWord(dst + group.seeds, (b * 16 + s) * group.rows + lane, seed);
      if (s % 2 == 1) PutWord(dst + group.sums, (b * 8 + s / 2) * group.rows + lane, sums);
    }
  }
  return true;
}

// One row of a group, read back in the order of k.
struct RowReader {
  const uint8_t* data;
  RowGroup group;
  size_t lane;

  int Code(size_t i) const {
    const uint8_t byte = data[group.codes + (i / 4 * group.rows + lane) * 4 + i % 4];
    return byte < 128 ? byte : byte - 256;
  }
  float Float(size_t array, size_t index) const {
    float value = 0;
    std::memcpy(&value, data + array + (index * group.rows + lane) * 4, 4);
    return value;
  }
};

// acc after one block of a panel's row and one prepared row; the codes are centred.
float AddBlock32(const PanelBlock& w, size_t r, const RowReader& x, size_t block, bool has_min,
                 float acc) {
  int sum = 0;
  for (size_t i = 0; i < 32; ++i) sum += w.codes[r][i] * x.Code(32 * block + i);
  acc = std::fmaf(static_cast<float>(sum), w.d[r] * x.Float(x.group.scales, block), acc);
  return has_min ? std::fmaf(w.m[r], x.Float(x.group.sums, block), acc) : acc;
}

float AddBlock256(const PanelBlock& w, size_t r, const RowReader& x, size_t block, bool has_min,
                  float acc) {
  int sum = 0, mins = 0;
  for (size_t s = 0; s < 16; ++s) {
    int dot = 0, of_codes = 0;
    for (size_t i = 16 * s; i < 16 * s + 16; ++i) {
      const int code = x.Code(256 * block + i);
      dot += w.codes[r][i] * code;
      of_codes += code;
    }
    sum += w.scales[r][s] * dot;
    mins += w.mins[r][s] * of_codes;
  }
  const float da = x.Float(x.group.scales, block);
  acc = std::fmaf(static_cast<float>(sum), w.d[r] * da, acc);
  return has_min ? std::fmaf(static_cast<float>(mins), -(w.m[r] * da), acc) : acc;
}

float AddFloat(float w, const RowReader& x, size_t i, float acc) {
  return std::fmaf(w, x.Float(x.group.codes, i), acc);
}

// out[m * out_stride + r] for one panel; `block` is scratch.
void MultiplyPanel(WeightType type, const uint8_t* panel, const PreparedRows& x, float* out,
                   size_t out_stride, PanelBlock& block) {
  const size_t values = InfoOf(type).block_values;
  for (size_t m = 0; m < x.rows; ++m) {
    for (size_t r = 0; r < kPanelRows; ++r) out[m * out_stride + r] = 0.0f;
  }
  for (size_t b = 0; b < x.k / values; ++b) {
    ReadPanelBlock(type, panel, x.k, b, block);
    for (size_t index = 0; index < GroupCount(x.grain, x.rows); ++index) {
      RowReader row = {x.data, GroupAt(x.grain, x.rows, x.k, index), 0};
      for (; row.lane < row.group.rows; ++row.lane) {
        float* acc = out + (row.group.first + row.lane) * out_stride;
        for (size_t r = 0; r < kPanelRows; ++r) {
          if (x.grain == Grain::kFloat) {
            acc[r] = AddFloat(block.d[r], row, b, acc[r]);
          } else if (x.grain == Grain::kBlock32) {
            acc[r] = AddBlock32(block, r, row, b, HasMin(type), acc[r]);
          } else {
            acc[r] = AddBlock256(block, r, row, b, HasMin(type), acc[r]);
          }
        }
      }
    }
  }
}

void Multiply(WeightType type, const uint8_t* panels, size_t n_panels, const PreparedRows& x,
              float* out, size_t out_stride, uint8_t* /*scratch*/) {
  PanelBlock block;
  const size_t panel_bytes = PanelBytes(type, x.k);
  for (size_t p = 0; p < n_panels; ++p) {
    MultiplyPanel(type, panels + p * panel_bytes, x, out + p * kPanelRows, out_stride, block);
  }
}

constexpr MatMulTable kTable = {"scalar", Prepare, Multiply};

}  // namespace

const MatMulTable* ScalarMatMulTable() { return &kTable; }

}  // namespace potluck
