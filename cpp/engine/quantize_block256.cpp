// K types: blocks of 256 values in sub-blocks, whose steps (and mins) are small whole multiples of
// one f16 step (and one f16 min).
#include <cstring>

#include "engine/fitting.h"
#include "engine/quantize_blocks.h"

namespace potluck {
namespace {

constexpr size_t kValues = 256;

// Candidates of a sub-block's step, found by trying on Gaussian and heavy-tailed rows. What the
// rounding of steps and mins costs is won back afterwards, so few are enough.
constexpr Candidates kSteps3 = {2.5f, 0.3f, 8};
constexpr Candidates kSteps6 = {29.0f, 0.5f, 8};
constexpr Candidates kLines2 = {2.0f, 0.2f, 8};
constexpr Candidates kLines4 = {13.0f, 0.4f, 8};
constexpr Candidates kLines5 = {29.0f, 0.5f, 6};
constexpr int kRefits = 2;  // of d and dmin; a third changes nothing that can be measured

void PutHalf(float x, uint8_t* to) {
  const uint16_t half = FloatToHalf(x);
  std::memcpy(to, &half, sizeof half);
}

// Nearest whole number within [least, most].
float Whole(float x, float least, float most) {
  x = x < least ? least : x > most ? most : x;
  return (x + 0x1.8p+23f) - 0x1.8p+23f;
}

// Of a block with mins: values are nearly d * scale * code - dmin * min.
struct LineBlock {
  float d;
  float dmin;
  float scales[16];
  float mins[16];
};

template <size_t kN>
Line LineAt(const LineBlock& block, size_t j) {
  return {block.d * block.scales[j], -(block.dmin * block.mins[j])};
}

// Scales and mins for given d and dmin: the nearest of `lines`, then the best of their neighbours.
// The error they leave. kN: vectors of a sub-block.
template <size_t kN>
float ChooseLines(const F4* x, const Line* lines, size_t n, float most, float scale_most,
                  LineBlock& block) {
  float total = 0.0f;
  const float by_d = block.d > 0.0f ? 1.0f / block.d : 0.0f;
  const float by_dmin = block.dmin > 0.0f ? 1.0f / block.dmin : 0.0f;
  for (size_t j = 0; j < n; ++j) {
    const float scale = Whole(lines[j].step * by_d, 0.0f, scale_most);
    const float min = Whole(-lines[j].offset * by_dmin, 0.0f, scale_most);
    float best = -1.0f;
    for (int ds = -1; ds <= 1; ++ds)
      for (int dm = -1; dm <= 1; ++dm) {
        const float s = scale + static_cast<float>(ds), m = min + static_cast<float>(dm);
        if (s < 0.0f || m < 0.0f || s > scale_most || m > scale_most) continue;
        const float error = LineError<kN>(x + j * kN, {block.d * s, -(block.dmin * m)}, most);
        if (best >= 0.0f && error >= best) continue;
        best = error;
        block.scales[j] = s;
        block.mins[j] = m;
      }
    total += best;
  }
  return total;
}

// d and dmin of least squares for the chosen scales, mins and their nearest codes.
template <size_t kN>
bool RefitLines(const F4* x, size_t n, float most, LineBlock& block) {
  // x ~ d * a - dmin * b with a = scale * code and b = min
  float aa = 0.0f, ab = 0.0f, bb = 0.0f, xa = 0.0f, xb = 0.0f;
  for (size_t j = 0; j < n; ++j) {
    const Line line = LineAt<kN>(block, j);
    const LineSums sums = SumLineCodes<kN>(x + j * kN, line.step != 0.0f ? 1.0f / line.step : 0.0f,
                                           line.offset, most);
    F4 sum4{};
    for (size_t i = 0; i < kN; ++i) sum4 += x[j * kN + i];
    const float s = block.scales[j], m = block.mins[j];
    aa += s * s * sums.qq;
    ab += s * m * sums.q;
    bb += 4.0f * kN * m * m;
    xa += s * sums.xq;
    xb += m * SumOf(sum4);
  }
  const float determinant = aa * bb - ab * ab;
  if (aa <= 0.0f) return false;
  float d = xa / aa, dmin = block.dmin;
  if (determinant > 1e-6f * aa * bb) {
    d = (xa * bb - xb * ab) / determinant;
    dmin = (xa * ab - xb * aa) / determinant;
  }
  d = Half(d);
  dmin = Half(dmin);
  if (!(d > 0.0f) || dmin < 0.0f || (d == block.d && dmin == block.dmin)) return false;
  block.d = d;
  block.dmin = dmin;
  return true;
}

template <size_t kN>
LineBlock FitLines(const F4* x, float most, float scale_most, Candidates candidates) {
  constexpr size_t kSubs = 64 / kN;
  Line lines[kSubs];
  float largest_step = 0.0f, largest_min = 0.0f;
  for (size_t j = 0; j < kSubs; ++j) {
    lines[j] = FitLine<kN>(x + j * kN, most, candidates, 2, true);
    largest_step = lines[j].step > largest_step ? lines[j].step : largest_step;
    largest_min = -lines[j].offset > largest_min ? -lines[j].offset : largest_min;
  }
  LineBlock block{};
  block.d = HalfToReach(largest_step / scale_most);
  block.dmin = HalfToReach(largest_min / scale_most);
  float error = ChooseLines<kN>(x, lines, kSubs, most, scale_most, block);
  for (int i = 0; i < kRefits; ++i) {
    LineBlock other = block;
    if (!RefitLines<kN>(x, kSubs, most, other)) break;
    const float other_error = ChooseLines<kN>(x, lines, kSubs, most, scale_most, other);
    if (!(other_error < error)) break;
    block = other;
    error = other_error;
  }
  return block;
}

template <size_t kN>
void PutLineCodes(const F4* x, float most, const LineBlock& block, uint8_t codes[kValues]) {
  for (size_t i = 0; i < 64; ++i) {
    const Line line = LineAt<kN>(block, i / kN);
    const F4 inverse = AllOf(line.step != 0.0f ? 1.0f / line.step : 0.0f);
    const F4 q = LineCodesOf(x[i], inverse, AllOf(line.offset), AllOf(most));
    for (size_t l = 0; l < 4; ++l)
      codes[4 * i + l] = static_cast<uint8_t>(static_cast<int32_t>(q[l]));
  }
}

// Of a block without: values are nearly d * scale * code, codes and scales signed.
struct StepBlock {
  float d;
  float scales[16];
};

constexpr size_t kSubN = 4;  // vectors of a sub-block

// As ChooseLines.
float ChooseSteps(const F4* x, const float* steps, CodeRange range, CodeRange scales,
                  StepBlock& block) {
  float total = 0.0f;
  const float by_d = block.d != 0.0f ? 1.0f / block.d : 0.0f;
  for (size_t j = 0; j < 16; ++j) {
    const float scale = Whole(steps[j] * by_d, scales.least, scales.most);
    float best = -1.0f;
    for (int ds = -1; ds <= 1; ++ds) {
      const float s = scale + static_cast<float>(ds);
      if (s < scales.least || s > scales.most) continue;
      const float error = StepError<kSubN>(x + j * kSubN, block.d * s, range, Alike(x));
      if (best >= 0.0f && error >= best) continue;
      best = error;
      block.scales[j] = s;
    }
    total += best;
  }
  return total;
}

bool RefitSteps(const F4* x, CodeRange range, StepBlock& block) {
  float aa = 0.0f, xa = 0.0f;
  for (size_t j = 0; j < 16; ++j) {
    const float s = block.scales[j], step = block.d * s;
    const CodeSums sums =
        SumCodes<kSubN>(x + j * kSubN, step != 0.0f ? 1.0f / step : 0.0f, range, Alike(x));
    aa += s * s * sums.qq;
    xa += s * sums.xq;
  }
  if (aa <= 0.0f) return false;
  const float d = Half(xa / aa);
  if (d == 0.0f || d == block.d) return false;
  block.d = d;
  return true;
}

StepBlock FitSteps(const F4* x, CodeRange range, CodeRange scales, Candidates candidates) {
  float steps[16];
  float extreme = 0.0f;
  for (size_t j = 0; j < 16; ++j) {
    const float largest = ExtremeOf<kSubN>(x + j * kSubN);
    steps[j] = largest != 0.0f ? FitStep<kSubN>(x + j * kSubN, largest, range, candidates, Alike(x))
                               : 0.0f;
    const float size = steps[j] < 0.0f ? -steps[j] : steps[j];
    if (size > (extreme < 0.0f ? -extreme : extreme)) extreme = steps[j];
  }
  StepBlock block{};
  block.d = HalfToReach(extreme / scales.least);
  float error = ChooseSteps(x, steps, range, scales, block);
  for (int i = 0; i < kRefits; ++i) {
    StepBlock other = block;
    if (!RefitSteps(x, range, other)) break;
    const float other_error = ChooseSteps(x, steps, range, scales, other);
    if (!(other_error < error)) break;
    block = other;
    error = other_error;
  }
  return block;
}

void PutStepCodes(const F4* x, CodeRange range, const StepBlock& block, uint8_t codes[kValues]) {
  for (size_t i = 0; i < 64; ++i) {
    const float step = block.d * block.scales[i / kSubN];
    const F4 inverse = AllOf(step != 0.0f ? 1.0f / step : 0.0f);
    const F4 q = CodesOf(x[i], inverse, range) - AllOf(range.least);
    for (size_t l = 0; l < 4; ++l)
      codes[4 * i + l] = static_cast<uint8_t>(static_cast<int32_t>(q[l]));
  }
}

uint8_t Byte(float whole) { return static_cast<uint8_t>(static_cast<int32_t>(whole)); }

// Scales and mins of six bits of Q4_K and Q5_K: 4 of each in whole bytes, the tops of the others
// above them.
void PutSixBits(const LineBlock& block, uint8_t s[12]) {
  for (size_t j = 0; j < 4; ++j) {
    const unsigned scale = Byte(block.scales[j + 4]), min = Byte(block.mins[j + 4]);
    s[j] = static_cast<uint8_t>(Byte(block.scales[j]) | scale >> 4 << 6);
    s[j + 4] = static_cast<uint8_t>(Byte(block.mins[j]) | min >> 4 << 6);
    s[j + 8] = static_cast<uint8_t>((scale & 15u) | (min & 15u) << 4);
  }
}

void PutNibbles(const uint8_t codes[kValues], uint8_t* to) {
  for (size_t i = 0; i < 128; ++i) {
    const size_t run = i / 32, l = i % 32;
    to[i] =
        static_cast<uint8_t>((codes[64 * run + l] & 15u) | (codes[64 * run + 32 + l] & 15u) << 4);
  }
}

void PutTwoBits(const uint8_t codes[kValues], uint8_t* to) {
  for (size_t i = 0; i < 64; ++i) {
    const uint8_t* c = codes + i / 32 * 128 + i % 32;
    to[i] = static_cast<uint8_t>((c[0] & 3u) | (c[32] & 3u) << 2 | (c[64] & 3u) << 4 |
                                 (c[96] & 3u) << 6);
  }
}

void PutQ2K(const LineBlock& b, const uint8_t codes[kValues], uint8_t* out) {
  for (size_t j = 0; j < 16; ++j)
    out[j] = static_cast<uint8_t>(Byte(b.scales[j]) | static_cast<unsigned>(Byte(b.mins[j])) << 4);
  PutTwoBits(codes, out + 16);
  PutHalf(b.d, out + 80);
  PutHalf(b.dmin, out + 82);
}

void PutQ3K(const StepBlock& b, const uint8_t codes[kValues], uint8_t* out) {
  for (size_t l = 0; l < 32; ++l) {
    unsigned bits = 0;
    for (size_t g = 0; g < 8; ++g) bits |= static_cast<unsigned>(codes[32 * g + l] >> 2) << g;
    out[l] = static_cast<uint8_t>(bits);
  }
  PutTwoBits(codes, out + 32);
  uint8_t* s = out + 96;
  std::memset(s, 0, 12);
  for (size_t j = 0; j < 16; ++j) {
    const unsigned scale = Byte(b.scales[j] + 32.0f);
    s[j % 8] = static_cast<uint8_t>(s[j % 8] | (scale & 15u) << (j < 8 ? 0 : 4));
    s[8 + j % 4] = static_cast<uint8_t>(s[8 + j % 4] | scale >> 4 << (2 * (j / 4)));
  }
  PutHalf(b.d, out + 108);
}

void PutQ45K(const LineBlock& b, const uint8_t codes[kValues], bool has_fifth, uint8_t* out) {
  PutHalf(b.d, out);
  PutHalf(b.dmin, out + 2);
  PutSixBits(b, out + 4);
  if (has_fifth)
    for (size_t l = 0; l < 32; ++l) {
      unsigned bits = 0;
      for (size_t j = 0; j < 8; ++j) bits |= static_cast<unsigned>(codes[32 * j + l] >> 4) << j;
      out[16 + l] = static_cast<uint8_t>(bits);
    }
  PutNibbles(codes, out + (has_fifth ? 48 : 16));
}

void PutQ6K(const StepBlock& b, const uint8_t codes[kValues], uint8_t* out) {
  for (size_t i = 0; i < 128; ++i) {  // [half, 64]: runs 0 and 2, then 1 and 3
    const uint8_t* c = codes + i / 64 * 128 + i % 64;
    out[i] = static_cast<uint8_t>((c[0] & 15u) | (c[64] & 15u) << 4);
  }
  for (size_t i = 0; i < 64; ++i) {
    const uint8_t* c = codes + i / 32 * 128 + i % 32;
    out[128 + i] = static_cast<uint8_t>((c[0] >> 4 & 3u) | (c[32] >> 4 & 3u) << 2 |
                                        (c[64] >> 4 & 3u) << 4 | (c[96] >> 4 & 3u) << 6);
  }
  for (size_t j = 0; j < 16; ++j) out[192 + j] = Byte(b.scales[j]);
  PutHalf(b.d, out + 208);
}

}  // namespace

void QuantizeBlock256(WeightType type, const float* from, uint8_t* out) {
  F4 x[64];
  for (size_t i = 0; i < 64; ++i) x[i] = LoadF4(from + 4 * i);
  uint8_t codes[kValues];
  if (type == WeightType::kQ2_K) {
    const LineBlock block = FitLines<4>(x, 3.0f, 15.0f, kLines2);
    PutLineCodes<4>(x, 3.0f, block, codes);
    PutQ2K(block, codes, out);
  } else if (type == WeightType::kQ4_K || type == WeightType::kQ5_K) {
    const bool has_fifth = type == WeightType::kQ5_K;
    const float most = has_fifth ? 31.0f : 15.0f;
    const LineBlock block = FitLines<8>(x, most, 63.0f, has_fifth ? kLines5 : kLines4);
    PutLineCodes<8>(x, most, block, codes);
    PutQ45K(block, codes, has_fifth, out);
  } else if (type == WeightType::kQ3_K) {
    constexpr CodeRange kRange = {-4.0f, 3.0f};
    const StepBlock block = FitSteps(x, kRange, {-32.0f, 31.0f}, kSteps3);
    PutStepCodes(x, kRange, block, codes);
    PutQ3K(block, codes, out);
  } else {
    constexpr CodeRange kRange = {-32.0f, 31.0f};
    const StepBlock block = FitSteps(x, kRange, {-128.0f, 127.0f}, kSteps6);
    PutStepCodes(x, kRange, block, codes);
    PutQ6K(block, codes, out);
  }
}

}  // namespace potluck
