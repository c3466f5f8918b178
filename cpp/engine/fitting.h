// Steps and offsets for values that are to become small whole codes: a search with little squared
// error, and the same result everywhere (plain f32 operations in a fixed order, no libm).
#pragma once

#include <cstddef>

#include "engine/lanes.h"
#include "engine/types.h"

namespace potluck {

// Values x that share a step come as kN vectors of four; codes are whole numbers in [least, most].
// Candidates are compared by the closed form of their error, so that each costs one pass.
struct CodeRange {
  float least;
  float most;
};

inline float Half(float x) { return HalfToFloat(FloatToHalf(x)); }

// The f16 nearest x, or the next away from zero where f16s are sparse: of a d that has to reach the
// largest step with its largest scale, a little too much costs less than too little, or than none.
inline float HalfToReach(float x) {
  const float half = Half(x);
  if (x > 0.0f && x < 0x1p-17f && half < x) return half + 0x1p-24f;
  if (x < 0.0f && x > -0x1p-17f && half > x) return half - 0x1p-24f;
  return half;
}

// The nearest codes, never NaN.
inline F4 CodesOf(F4 x, F4 inverse, CodeRange range) {
  return Rounded(Most(Least(x * inverse, AllOf(range.most)), AllOf(range.least)));
}

// How much the squared error of each of x's values counts: all alike ...
struct Alike {
  explicit Alike(const F4*) {}
  F4 operator()(size_t, F4 term) const { return term; }
};

// ... or by |x| + the mean of |x|: Q4_0's models lose less so, in spite of the larger squared
// error. No other type's did (docs/decisions/0022-own-quantizers.md).
template <size_t kN>
struct ByMagnitude {
  F4 w[kN];
  explicit ByMagnitude(const F4* x) {
    F4 sum{};
    for (size_t i = 0; i < kN; ++i) {
      w[i] = Most(x[i], -x[i]);
      sum += w[i];
    }
    const F4 mean = AllOf(SumOf(sum) * (1.0f / (4.0f * kN)));
    for (size_t i = 0; i < kN; ++i) w[i] += mean;
  }
  F4 operator()(size_t i, F4 term) const { return w[i] * term; }
};

// Sums over values x and their codes q, weighed.
struct CodeSums {
  float xq;
  float qq;
};
template <size_t kN, typename Weigh>
CodeSums SumCodes(const F4* x, float inverse, CodeRange range, const Weigh& weigh) {
  F4 xq{}, qq{};
  const F4 all = AllOf(inverse);
  for (size_t i = 0; i < kN; ++i) {
    const F4 q = CodesOf(x[i], all, range);
    const F4 wq = weigh(i, q);
    xq += x[i] * wq;
    qq += q * wq;
  }
  return {SumOf(xq), SumOf(qq)};
}

// Sum of (x - step * q)^2, weighed, with the nearest codes.
template <size_t kN, typename Weigh>
float StepError(const F4* x, float step, CodeRange range, const Weigh& weigh) {
  F4 sum{};
  const F4 inverse = AllOf(step != 0.0f ? 1.0f / step : 0.0f), all = AllOf(step);
  for (size_t i = 0; i < kN; ++i) {
    const F4 rest = x[i] - all * CodesOf(x[i], inverse, range);
    sum += weigh(i, rest * rest);
  }
  return SumOf(sum);
}

// The value of largest magnitude, with its sign.
template <size_t kN>
float ExtremeOf(const F4* x) {
  F4 least = x[0], most = x[0];
  for (size_t i = 1; i < kN; ++i) {
    least = Least(least, x[i]);
    most = Most(most, x[i]);
  }
  const float low = LeastOf(least), high = MostOf(most);
  return -low > high ? low : high;
}

// How many steps the extreme value is from zero (or a line's highest from its lowest).
struct Candidates {
  float first;
  float by;
  size_t n;
};

// Gains above this share of the best are as good: they differ by a few roundings of the sums.
constexpr float kEqual = 1.0f - 5e-7f;

// The step, of the sign that gives the extreme value the code of larger magnitude. Among equally
// good ones the last, the one of the largest codes: nearly constant values then get the same code
// in all sub-blocks of a block, and not steps of 1/2, 1/3 and 1/4, which no d has for multiples.
template <size_t kN, typename Weigh>
float FitStep(const F4* x, float extreme, CodeRange range, Candidates candidates,
              const Weigh& weigh) {
  float best = -1.0f, step = 0.0f;
  for (size_t i = 0; i < candidates.n; ++i) {
    const float steps = candidates.first + candidates.by * static_cast<float>(i);
    const CodeSums sums = SumCodes<kN>(x, -steps / extreme, range, weigh);
    if (sums.qq <= 0.0f) continue;
    const float gain = sums.xq * sums.xq / sums.qq;
    if (gain < kEqual * best) continue;
    best = gain > best ? gain : best;
    step = sums.xq / sums.qq;
  }
  return step;
}

// A step and an offset: x is nearly step * q + offset, with codes in [0, most].
struct Line {
  float step;
  float offset;
};

inline F4 LineCodesOf(F4 x, F4 inverse, F4 offset, F4 most) {
  return Rounded(Most(Least((x - offset) * inverse, most), F4{}));
}

struct LineSums {
  float q;
  float qq;
  float xq;
};
template <size_t kN>
LineSums SumLineCodes(const F4* x, float inverse, float offset, float most) {
  F4 sum_q{}, sum_qq{}, sum_xq{};
  const F4 scale = AllOf(inverse), shift = AllOf(offset), top = AllOf(most);
  for (size_t i = 0; i < kN; ++i) {
    const F4 q = LineCodesOf(x[i], scale, shift, top);
    sum_q += q;
    sum_qq += q * q;
    sum_xq += x[i] * q;
  }
  return {SumOf(sum_q), SumOf(sum_qq), SumOf(sum_xq)};
}

// Sum of (x - step * q - offset)^2 with the nearest codes.
template <size_t kN>
float LineError(const F4* x, Line line, float most) {
  F4 sum{};
  const F4 inverse = AllOf(line.step != 0.0f ? 1.0f / line.step : 0.0f);
  const F4 step = AllOf(line.step), offset = AllOf(line.offset), top = AllOf(most);
  for (size_t i = 0; i < kN; ++i) {
    const F4 rest = x[i] - (step * LineCodesOf(x[i], inverse, offset, top) + offset);
    sum += rest * rest;
  }
  return SumOf(sum);
}

// The line of least squares through codes; never_above_zero: of its offset.
template <size_t kN>
Line LeastSquares(const LineSums& sums, float sum_x, bool never_above_zero) {
  constexpr float kCount = 4.0f * kN;
  const float determinant = kCount * sums.qq - sums.q * sums.q;
  if (determinant <= 0.0f) return {0.0f, sum_x / kCount};
  const Line line = {(kCount * sums.xq - sum_x * sums.q) / determinant,
                     (sums.qq * sum_x - sums.q * sums.xq) / determinant};
  if (never_above_zero && line.offset > 0.0f) return {sums.xq / sums.qq, 0.0f};
  return line;
}

// The best of several candidates, by how much of the squares it takes away.
template <size_t kN>
Line FitLine(const F4* x, float most, Candidates candidates, size_t repeats,
             bool never_above_zero) {
  F4 least4 = x[0], most4 = x[0], sum4 = x[0];
  for (size_t i = 1; i < kN; ++i) {
    least4 = Least(least4, x[i]);
    most4 = Most(most4, x[i]);
    sum4 += x[i];
  }
  float low = LeastOf(least4);
  const float high = MostOf(most4), sum_x = SumOf(sum4);
  if (never_above_zero && low > 0.0f) low = 0.0f;
  if (high <= low) return {0.0f, low};
  Line best = {(high - low) / most, low};
  float best_gain = -1.0f;
  const auto consider = [&](float inverse, float offset) {
    const LineSums sums = SumLineCodes<kN>(x, inverse, offset, most);
    const Line line = LeastSquares<kN>(sums, sum_x, never_above_zero);
    const float gain = line.step * sums.xq + line.offset * sum_x;
    if (line.step <= 0.0f || gain <= best_gain) return false;
    best_gain = gain;
    best = line;
    return true;
  };
  for (size_t i = 0; i < candidates.n; ++i) {
    const float steps = candidates.first + candidates.by * static_cast<float>(i);
    consider(steps / (high - low), low);
  }
  for (size_t i = 0; i < repeats; ++i)
    if (!consider(1.0f / best.step, best.offset)) break;
  return best;
}

}  // namespace potluck
