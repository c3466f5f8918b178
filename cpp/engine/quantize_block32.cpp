// Types whose blocks of 32 values share an f16 step, and an f16 offset if they have one.
#include <cstring>

#include "engine/fitting.h"
#include "engine/quantize_blocks.h"

namespace potluck {
namespace {

constexpr size_t kN = 8;  // vectors of a block

// Found by trying on Gaussian and heavy-tailed rows: more candidates take away below 0.1 % of the
// error, and halve the speed.
constexpr Candidates kStepsQ4 = {7.1f, 0.4f, 5};
constexpr Candidates kStepsQ5 = {14.4f, 0.4f, 5};
constexpr Candidates kStepsQ8 = {125.0f, 0.5f, 5};
constexpr Candidates kLinesQ4 = {13.6f, 0.4f, 4};
constexpr Candidates kLinesQ5 = {29.4f, 0.5f, 4};

void PutHalf(float x, uint8_t* to) {
  const uint16_t half = FloatToHalf(x);
  std::memcpy(to, &half, sizeof half);
}

void LoadBlock(const float* from, F4* x) {
  for (size_t i = 0; i < kN; ++i) x[i] = LoadF4(from + 4 * i);
}

// Low nibbles of 16 bytes are the first 16 codes; bits 4, if wanted, go to the word before them.
void PutCodes(const float codes[32], bool has_fifth, uint8_t* to) {
  uint8_t whole[32];
  for (size_t j = 0; j < 32; ++j) whole[j] = static_cast<uint8_t>(static_cast<int32_t>(codes[j]));
  if (has_fifth) {
    uint32_t bits = 0;
    for (size_t j = 0; j < 32; ++j) bits |= static_cast<uint32_t>(whole[j] >> 4) << j;
    std::memcpy(to, &bits, sizeof bits);
    to += sizeof bits;
  }
  for (size_t j = 0; j < 16; ++j)
    to[j] = static_cast<uint8_t>((whole[j] & 15u) | (whole[j + 16] & 15u) << 4);
}

// The step, an f16, whose nearest codes leave the least error: the reference's, or a fitted one.
template <typename Weigh>
float StepOf(const F4* x, CodeRange range, Candidates candidates, const Weigh& weigh) {
  const float extreme = ExtremeOf<kN>(x);
  float step = Half(extreme / range.least);
  if (step == 0.0f) return 0.0f;
  float error = StepError<kN>(x, step, range, weigh);
  float fitted = Half(FitStep<kN>(x, extreme, range, candidates, weigh));
  for (size_t i = 0; i < 2; ++i) {
    if (fitted == step || fitted == 0.0f) break;
    const float other = StepError<kN>(x, fitted, range, weigh);
    if (!(other < error)) break;
    error = other;
    step = fitted;
    const CodeSums sums = SumCodes<kN>(x, 1.0f / step, range, weigh);
    fitted = Half(sums.xq / sums.qq);
  }
  return step;
}

template <typename Weigh>
void QuantizeSteps(const float* from, CodeRange range, Candidates candidates, float codes[32],
                   float* step) {
  F4 x[kN];
  LoadBlock(from, x);
  *step = StepOf(x, range, candidates, Weigh(x));
  const F4 inverse = AllOf(*step != 0.0f ? 1.0f / *step : 0.0f);
  for (size_t i = 0; i < kN; ++i) StoreF4(CodesOf(x[i], inverse, range), codes + 4 * i);
}

// The same for a step and an offset.
Line LineOf(const F4* x, float most, Candidates candidates) {
  F4 least4 = x[0], most4 = x[0];
  for (size_t i = 1; i < kN; ++i) {
    least4 = Least(least4, x[i]);
    most4 = Most(most4, x[i]);
  }
  const float low = LeastOf(least4), high = MostOf(most4);
  Line line = {Half((high - low) / most), Half(low)};
  float error = LineError<kN>(x, line, most);
  Line fitted = FitLine<kN>(x, most, candidates, 2, false);
  fitted = {HalfToReach(fitted.step), Half(fitted.offset)};
  const float other = LineError<kN>(x, fitted, most);
  if (other < error) line = fitted;
  return line;
}

void QuantizeLines(const float* from, float most, Candidates candidates, float codes[32],
                   uint8_t* block) {
  F4 x[kN];
  LoadBlock(from, x);
  const Line line = LineOf(x, most, candidates);
  PutHalf(line.step, block);
  PutHalf(line.offset, block + 2);
  const F4 inverse = AllOf(line.step != 0.0f ? 1.0f / line.step : 0.0f);
  for (size_t i = 0; i < kN; ++i)
    StoreF4(LineCodesOf(x[i], inverse, AllOf(line.offset), AllOf(most)), codes + 4 * i);
}

}  // namespace

void QuantizeBlock32(WeightType type, const float* x, uint8_t* block) {
  float codes[32];
  float step = 0.0f;
  switch (type) {
    case WeightType::kQ4_0:
      QuantizeSteps<ByMagnitude<kN>>(x, {-8.0f, 7.0f}, kStepsQ4, codes, &step);
      for (float& code : codes) code += 8.0f;
      PutHalf(step, block);
      return PutCodes(codes, false, block + 2);
    case WeightType::kQ5_0:
      QuantizeSteps<Alike>(x, {-16.0f, 15.0f}, kStepsQ5, codes, &step);
      for (float& code : codes) code += 16.0f;
      PutHalf(step, block);
      return PutCodes(codes, true, block + 2);
    case WeightType::kQ4_1:
      QuantizeLines(x, 15.0f, kLinesQ4, codes, block);
      return PutCodes(codes, false, block + 4);
    case WeightType::kQ5_1:
      QuantizeLines(x, 31.0f, kLinesQ5, codes, block);
      return PutCodes(codes, true, block + 4);
    default:  // Q8_0
      QuantizeSteps<Alike>(x, {-127.0f, 127.0f}, kStepsQ8, codes, &step);
      PutHalf(step, block);
      for (size_t j = 0; j < 32; ++j)
        block[2 + j] = static_cast<uint8_t>(static_cast<int32_t>(codes[j]));
  }
}

}  // namespace potluck
