#include "engine/canon.h"

#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <random>
#include <vector>

#include "check.h"
#include "engine/errors.h"
#include "engine/rope.h"

namespace {

constexpr float kInfinity = std::numeric_limits<float>::infinity();

float FloatOf(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, sizeof(value));
  return value;
}

uint32_t BitsOf(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof(bits));
  return bits;
}

// |got - exact| in units of the spacing of f32 values at `exact`.
double Ulps(float got, double exact) {
  const float near = static_cast<float>(exact);
  const double unit = std::nextafter(std::abs(near), kInfinity) - std::abs(near);
  return std::abs(static_cast<double>(got) - exact) / unit;
}

}  // namespace

TEST(exp_is_within_one_ulp_over_its_whole_range) {
  double worst = 0;
  size_t values = 0;
  // Every 977th f32 between -87 and 88.72: 977 is odd, so all low bits occur.
  for (uint32_t bits = 0; bits <= BitsOf(potluck::kExpLargest); bits += 977) {
    for (const float x : {FloatOf(bits), -FloatOf(bits)}) {
      if (x < potluck::kExpSmallest) continue;
      worst = std::fmax(worst, Ulps(potluck::Exp(x), std::exp(static_cast<double>(x))));
      ++values;
    }
  }
  CHECK(values > 2000000);
  std::printf("exp: worst error %.4f ulp\n", worst);
  CHECK(worst < 0.85);  // measured 0.829; rounding alone is 0.5
}

TEST(exp_has_fixed_answers_at_its_ends) {
  CHECK_EQ(potluck::Exp(0.0f), 1.0f);
  CHECK_EQ(potluck::Exp(-0.0f), 1.0f);
  CHECK_EQ(potluck::Exp(-kInfinity), 0.0f);
  CHECK_EQ(potluck::Exp(kInfinity), kInfinity);
  CHECK_EQ(potluck::Exp(std::nextafter(potluck::kExpSmallest, -kInfinity)), 0.0f);
  CHECK(potluck::Exp(potluck::kExpSmallest) > std::numeric_limits<float>::min());
  CHECK(std::isfinite(potluck::Exp(potluck::kExpLargest)));
  CHECK_EQ(potluck::Exp(std::nextafter(potluck::kExpLargest, kInfinity)), kInfinity);
  for (const uint32_t bits : {0x7fc00000u, 0xffc00001u, 0x7f800001u, 0x7fffffffu})
    CHECK_EQ(BitsOf(potluck::Exp(FloatOf(bits))), 0x7fc00000u);
  CHECK_EQ(potluck::Exp(FloatOf(1)), 1.0f);  // the least subnormal
}

TEST(exp_never_falls) {
  float before = 0;
  for (float x = -88.0f; x < 89.0f; x += 0x1p-10f) {
    const float now = potluck::Exp(x);
    CHECK(now >= before);
    before = now;
  }
}

// The bits are the contract between machines: a change of any constant or step shows here.
TEST(exp_keeps_its_bits) {
  std::mt19937 random(1);
  uint64_t hash = 14695981039346656037u;
  for (int i = 0; i < 100000; ++i) {
    const float x = static_cast<float>(random()) * 0x1p-32f * 200.0f - 100.0f;
    hash = (hash ^ BitsOf(potluck::Exp(x))) * 1099511628211u;
  }
  CHECK_EQ(hash, uint64_t{12902105650605061159u});
}

TEST(log_exp_and_power_of_f64_agree_with_libm) {
  std::mt19937_64 random(2);
  std::uniform_real_distribution<double> exponents(-700, 700);
  for (int i = 0; i < 20000; ++i) {
    const double y = exponents(random);
    const double x = std::exp(y);
    CHECK(std::abs(potluck::ExpDouble(y) / x - 1) < 1e-15);
    const double log = std::log(x);
    CHECK(std::abs(potluck::LogDouble(x) - log) <= 1e-15 * std::fmax(1, std::abs(log)));
  }
  for (const double x : {1.0 - 0x1p-53, 1.0, 1.0 + 0x1p-52, 1.5, 0x1.6a09e667f3bcdp+0})
    CHECK(std::abs(potluck::LogDouble(x) - std::log(x)) <= 2e-16);
  for (const double theta : {10000.0, 500000.0, 1e6})
    for (int i = 0; i <= 64; ++i)
      CHECK(std::abs(potluck::PowDouble(theta, -i / 64.0) / std::pow(theta, -i / 64.0) - 1) <
            2e-15);
}

TEST(sine_and_cosine_agree_with_libm_at_every_position_of_a_long_context) {
  std::mt19937_64 random(3);
  std::uniform_real_distribution<double> angles(0, 0x1p+25);
  double worst = 0;
  const auto look = [&](double x) {
    double sine = 0;
    double cosine = 0;
    potluck::SinCosDouble(x, &sine, &cosine);
    worst =
        std::fmax(worst, std::fmax(std::abs(sine - std::sin(x)), std::abs(cosine - std::cos(x))));
  };
  for (int i = 0; i < 100000; ++i) {
    look(i);  // the angles of pair 0
    look(-0.01 * i);
    look(angles(random));
    look(i * 1.57079632679489661923);  // next to the quarter turns
  }
  CHECK(worst < 1e-15);
}

TEST(rope_turns_pair_i_by_position_times_theta_to_the_minus_2i_over_dim) {
  const potluck::Rope rope(10000.0, 64);
  CHECK_EQ(rope.half(), size_t{32});
  std::vector<float> cosine(32);
  std::vector<float> sine(32);
  for (const size_t position : {0u, 1u, 17u, 2047u, 131071u}) {
    rope.Angles(position, cosine.data(), sine.data());
    for (size_t i = 0; i < 32; ++i) {
      const double angle =
          static_cast<double>(position) * std::pow(10000.0, -2.0 * static_cast<double>(i) / 64);
      CHECK(std::abs(cosine[i] - std::cos(angle)) < 4e-8);
      CHECK(std::abs(sine[i] - std::sin(angle)) < 4e-8);
    }
  }
  rope.Angles(0, cosine.data(), sine.data());
  CHECK_EQ(cosine[31], 1.0f);
  CHECK_EQ(sine[31], 0.0f);
}

namespace {

// Angle and length of each pair at a position.
void CheckTurns(const potluck::Rope& rope, const std::vector<double>& frequencies, double length) {
  const size_t half = rope.half();
  CHECK_EQ(half, frequencies.size());
  std::vector<float> cosine(half);
  std::vector<float> sine(half);
  for (const size_t position : {0u, 1u, 17u, 4095u}) {
    rope.Angles(position, cosine.data(), sine.data());
    for (size_t i = 0; i < half; ++i) {
      const double angle = static_cast<double>(position) * frequencies[i];
      CHECK(std::abs(cosine[i] - length * std::cos(angle)) < 8e-8 * length);
      CHECK(std::abs(sine[i] - length * std::sin(angle)) < 8e-8 * length);
    }
  }
}

}  // namespace

TEST(rope_divides_frequencies_by_factor_and_divisors) {
  potluck::RopeScaling scaling;
  scaling.factor = 4;
  scaling.divisors = {1, 2, 4, 8};
  const auto exact = [](double i) { return std::pow(10000.0, -i / 4); };
  CheckTurns(potluck::Rope(10000.0, 8, scaling),
             {exact(0) / 4, exact(1) / 8, exact(2) / 16, exact(3) / 32}, 1);
  scaling.magnitude = 1.5;
  scaling.divisors.clear();
  CheckTurns(potluck::Rope(10000.0, 8, scaling),
             {exact(0) / 4, exact(1) / 4, exact(2) / 4, exact(3) / 4}, 1.5);
}

// By hand, for theta 10000, 16 values, 1024 positions at first: pair i turns 163 * 10^(-i / 2)
// times within them. 32 times: i = 1.41, so pairs 0 and 1 are fast; once: i = 4.42, so 5 and more
// are slow; 2, 3 and 4 lie at 1/4, 2/4 and 3/4 of the way.
TEST(rope_of_yarn_keeps_fast_pairs_and_stretches_slow_ones) {
  potluck::RopeScaling scaling;
  scaling.factor = 8;
  scaling.extrapolation = 1;
  scaling.original_tokens = 1024;
  const auto frequency = [](double i, double kept) {
    return std::pow(10000.0, -i / 8) * (kept + (1 - kept) / 8);
  };
  const std::vector<double> shares = {1, 1, 0.75, 0.5, 0.25, 0, 0, 0};
  const double length = 1 + 0.1 * std::log(8.0);
  std::vector<double> expected, halfway;
  for (size_t i = 0; i < 8; ++i) {
    expected.push_back(frequency(static_cast<double>(i), shares[i]));
    halfway.push_back(frequency(static_cast<double>(i), shares[i] / 2));
  }
  CheckTurns(potluck::Rope(10000.0, 16, scaling), expected, length);
  scaling.extrapolation = 0.5;
  scaling.magnitude = 2;
  CheckTurns(potluck::Rope(10000.0, 16, scaling), halfway, 2 * length);
}

// The bits are the contract between machines, as those of exp.
TEST(rope_of_yarn_keeps_its_bits) {
  const potluck::Rope rope(500000.0, 128, {4, 0.75, 8192, 32, 1, 1.1, {}});
  std::vector<float> cosine(64);
  std::vector<float> sine(64);
  uint64_t hash = 14695981039346656037u;
  for (size_t position = 0; position < 40000; position += 97) {
    rope.Angles(position, cosine.data(), sine.data());
    for (const float value : cosine) hash = (hash ^ BitsOf(value)) * 1099511628211u;
    for (const float value : sine) hash = (hash ^ BitsOf(value)) * 1099511628211u;
  }
  CHECK_EQ(hash, uint64_t{13604120933524765743u});
}

TEST(rope_of_an_odd_width_or_an_impossible_theta_is_refused) {
  CHECK_THROWS(potluck::Rope(10000.0, 63), potluck::UsageError);
  CHECK_THROWS(potluck::Rope(10000.0, 0), potluck::UsageError);
  CHECK_THROWS(potluck::Rope(-1.0, 64), potluck::UsageError);
  CHECK_THROWS(potluck::Rope(std::nan(""), 64), potluck::UsageError);
}

CHECK_MAIN
