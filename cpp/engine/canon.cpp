#include "engine/canon.h"

#include <cmath>
#include <cstdint>
#include <cstring>

namespace potluck {
namespace {

template <class To, class From>
To BitsAs(From from) {
  static_assert(sizeof(To) == sizeof(From));
  To to{};
  std::memcpy(&to, &from, sizeof(to));
  return to;
}

// ln 2 and pi / 2 in parts short enough that their products with the n of their reductions are
// exact in f64 (n below 2^11 and below 2^25).
constexpr double kLn2High = 0x1.62e42fefa38p-1;
constexpr double kLn2Low = 0x1.ef35793c7673p-45;
constexpr double kHalfPi1 = 0x1.921fb54p+0;
constexpr double kHalfPi2 = 0x1.10b4610p-30;
constexpr double kHalfPi3 = 0x1.a62633145c06ep-58;
constexpr double kRound = 0x1.8p+52;  // adding and taking it away rounds to the nearest integer

}  // namespace

float Exp(float x) {
  if (std::isnan(x)) return BitsAs<float>(uint32_t{0x7fc00000});
  if (x < kExpSmallest) return 0.0f;
  if (x > kExpLargest) return BitsAs<float>(uint32_t{0x7f800000});
  const float shifted = std::fma(x, kExpLog2E, kExpRound);
  const float n = shifted - kExpRound;
  float r = std::fma(n, -kExpLn2High, x);
  r = std::fma(n, -kExpLn2Low, r);
  float p = kExpC6;
  p = std::fma(p, r, kExpC5);
  p = std::fma(p, r, kExpC4);
  p = std::fma(p, r, kExpC3);
  p = std::fma(p, r, kExpC2);
  p = std::fma(p, r, 1.0f);
  p = std::fma(p, r, 1.0f);
  // The low bits of `shifted` are n: kExpRound's own are zero.
  return BitsAs<float>(BitsAs<uint32_t>(p) + (BitsAs<uint32_t>(shifted) << 23));
}

double ExpDouble(double x) {
  const double shifted = x * 0x1.71547652b82fep+0 + kRound;
  const double n = shifted - kRound;
  const double r = (x - n * kLn2High) - n * kLn2Low;
  double p = 1.0;
  for (int k = 13; k > 0; --k) p = 1.0 + p * r / k;  // Taylor: the next term is below 5e-18
  return BitsAs<double>(BitsAs<uint64_t>(p) + (BitsAs<uint64_t>(shifted) << 52));
}

double LogDouble(double x) {
  // x = m * 2^n with m in [sqrt(1/2), sqrt(2)); ln m = 2 atanh(s).
  const uint64_t bits = BitsAs<uint64_t>(x);
  double n = static_cast<double>(static_cast<int64_t>(bits >> 52)) - 1023.0;
  double m = BitsAs<double>((bits & 0x000fffffffffffff) | 0x3ff0000000000000);
  if (m > 0x1.6a09e667f3bcdp+0) {
    m *= 0.5;
    n += 1.0;
  }
  const double s = (m - 1.0) / (m + 1.0);
  const double z = s * s;  // at most 0.0295
  double p = 0.0;
  for (int k = 23; k > 1; k -= 2) p = (p + 1.0 / k) * z;
  return n * kLn2High + (2.0 * s + (2.0 * s * p + n * kLn2Low));
}

double PowDouble(double x, double y) { return ExpDouble(y * LogDouble(x)); }

void SinCosDouble(double x, double* sine, double* cosine) {
  const double shifted = x * 0x1.45f306dc9c883p-1 + kRound;
  const double n = shifted - kRound;
  const double r = ((x - n * kHalfPi1) - n * kHalfPi2) - n * kHalfPi3;
  const double z = r * r;  // at most 0.617
  double s = 1.0;
  double c = 1.0;
  for (int k = 16; k > 0; k -= 2) {  // Taylor: the next terms are below 1e-19 and 3e-18
    s = 1.0 - s * z / (k * (k + 1));
    c = 1.0 - c * z / (k * (k - 1));
  }
  s *= r;
  switch (BitsAs<uint64_t>(shifted) & 3) {  // the low bits are n: one quarter turn each
    case 0:
      *sine = s, *cosine = c;
      break;
    case 1:
      *sine = c, *cosine = -s;
      break;
    case 2:
      *sine = -s, *cosine = -c;
      break;
    default:
      *sine = -c, *cosine = s;
      break;
  }
}

}  // namespace potluck
