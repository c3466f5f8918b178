#include "engine/rope.h"

#include <cmath>
#include <string>

#include "engine/canon.h"
#include "engine/errors.h"

namespace potluck {
namespace {

constexpr double kTwoPi = 0x1.921fb54442d18p+2;
constexpr double kLeastRamp = 0.001;  // of YaRN, in pairs

// The pair, not a whole number, that turns so many times within `tokens` positions.
double PairOfTurns(double turns, double tokens, double theta, double dim) {
  return dim * LogDouble(tokens / (turns * kTwoPi)) / (2.0 * LogDouble(theta));
}

// The share of pairs' frequencies that YaRN keeps: 1 up to `fast`, 0 from `slow` on, linear
// between.
struct Ramp {
  double fast;
  double slow;
  double KeptOf(double pair) const {
    const double done = (pair - fast) / std::fmax(kLeastRamp, slow - fast);
    return 1.0 - std::fmin(1.0, std::fmax(0.0, done));
  }
};

Ramp RampOf(double theta, double dim, const RopeScaling& scaling) {
  const double tokens = scaling.original_tokens;
  const double fast = std::floor(PairOfTurns(scaling.beta_fast, tokens, theta, dim));
  const double slow = std::ceil(PairOfTurns(scaling.beta_slow, tokens, theta, dim));
  return {std::fmax(0.0, fast), std::fmin(dim - 1.0, slow)};
}

}  // namespace

Rope::Rope(double theta, size_t dim, const RopeScaling& scaling)
    : frequencies_(dim / 2), magnitude_(scaling.magnitude) {
  if (dim == 0 || dim % 2 != 0)
    throw UsageError("rotary values: an even number, not " + std::to_string(dim));
  if (!std::isnormal(theta) || theta < 0)
    throw UsageError("rope_theta: a finite number above 0, not " + std::to_string(theta));
  for (size_t i = 0; i < dim / 2; ++i) {
    frequencies_[i] = PowDouble(theta, -2.0 * static_cast<double>(i) / static_cast<double>(dim));
    if (!scaling.divisors.empty()) frequencies_[i] /= static_cast<double>(scaling.divisors[i]);
  }
  if (scaling.extrapolation == 0) {
    for (double& frequency : frequencies_) frequency /= scaling.factor;
    return;
  }
  const Ramp ramp = RampOf(theta, static_cast<double>(dim), scaling);
  for (size_t i = 0; i < dim / 2; ++i) {
    const double kept = ramp.KeptOf(static_cast<double>(i)) * scaling.extrapolation;
    frequencies_[i] = frequencies_[i] / scaling.factor * (1.0 - kept) + frequencies_[i] * kept;
  }
  magnitude_ *= 1.0 + 0.1 * LogDouble(scaling.factor);
}

void Rope::Angles(size_t position, float* cosine, float* sine) const {
  for (size_t i = 0; i < frequencies_.size(); ++i) {
    double s = 0;
    double c = 0;
    SinCosDouble(static_cast<double>(position) * frequencies_[i], &s, &c);
    cosine[i] = static_cast<float>(c * magnitude_);
    sine[i] = static_cast<float>(s * magnitude_);
  }
}

}  // namespace potluck
