// From one weight type into another: every value, every edge, any number of threads.
#include "engine/convert.h"

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstring>
#include <limits>
#include <random>
#include <vector>

#include "check.h"
#include "engine/crc32c.h"
#include "engine/dequantize.h"
#include "engine/errors.h"
#include "weights.h"

using namespace potluck;
using weights::kAllTypes;

namespace {

using Bytes = std::vector<uint8_t>;

Bytes BytesOf(const std::vector<float>& x) {
  Bytes bytes(x.size() * sizeof(float));
  std::memcpy(bytes.data(), x.data(), bytes.size());
  return bytes;
}

std::vector<float> Gaussian(size_t n, float scale, uint64_t seed = 1) {
  std::mt19937_64 random(seed);
  std::normal_distribution<float> normal(0.0f, scale);
  std::vector<float> x(n);
  for (float& value : x) value = normal(random);
  return x;
}

// Nearly Gaussian, of sizes that differ from one 64 values to the next; no libm, so that every
// machine makes the same ones.
std::vector<float> Portable(size_t n) {
  std::mt19937_64 random(9);
  const auto uniform = [&random] { return static_cast<float>(random() >> 40) * 0x1p-24f; };
  std::vector<float> x(n);
  float size = 0.0f;
  for (size_t i = 0; i < n; ++i) {
    if (i % 64 == 0) size = 0.001f + 0.05f * uniform();
    const float a = uniform(), b = uniform(), c = uniform();
    x[i] = size * ((a + b) + (c - 1.5f));
  }
  return x;
}

// The same and, of such values, 512 each that are heavy-tailed, far from zero, tiny, nearly
// constant and huge.
std::vector<float> OfEveryKind() {
  auto x = Portable(32768);
  for (size_t i = 0; i < 512; ++i) x.push_back(x[i] * x[i] * x[i] * x[i] * x[i]);
  for (size_t i = 0; i < 512; ++i) x.push_back(x[i] - 8.0f);
  for (size_t i = 0; i < 512; ++i) x.push_back(x[i] * 0x1p-15f);
  for (size_t i = 0; i < 512; ++i) x.push_back(x[i] * 0x1p-7f + 1.0f);
  for (size_t i = 0; i < 512; ++i) x.push_back(x[i] * 0x1p19f);
  return x;
}

Bytes Converted(Pool& pool, WeightType to, const std::vector<float>& x) {
  Bytes out(RowBytes(to, x.size()));
  const Bytes in = BytesOf(x);
  CHECK(!Convert(pool, WeightType::kF32, to, x.size(), in.data(), out.data()).has_value());
  return out;
}

std::vector<float> ThereAndBack(Pool& pool, WeightType type, const std::vector<float>& x) {
  const Bytes blocks = Converted(pool, type, x);
  std::vector<float> back(x.size());
  Dequantize(type, blocks.data(), x.size(), back.data());
  return back;
}

double RelativeError(const std::vector<float>& x, const std::vector<float>& y) {
  double wrong = 0, all = 0;
  for (size_t i = 0; i < x.size(); ++i) {
    const double d = static_cast<double>(x[i]) - static_cast<double>(y[i]);
    wrong += d * d;
    all += static_cast<double>(x[i]) * static_cast<double>(x[i]);
  }
  return std::sqrt(wrong / all);
}

// Root mean square error relative to Gaussian values: a range, so that an improvement is seen, too.
struct Expected {
  WeightType type;
  double least;
  double most;
};
constexpr Expected kExpected[] = {
    {WeightType::kF32, 0.0, 0.0},       {WeightType::kF16, 1e-4, 3e-4},
    {WeightType::kBF16, 1e-3, 2e-3},    {WeightType::kQ4_0, 0.07, 0.092},
    {WeightType::kQ4_1, 0.06, 0.076},   {WeightType::kQ5_0, 0.035, 0.047},
    {WeightType::kQ5_1, 0.03, 0.037},   {WeightType::kQ8_0, 0.004, 0.0058},
    {WeightType::kQ2_K, 0.2, 0.31},     {WeightType::kQ3_K, 0.12, 0.17},
    {WeightType::kQ4_K, 0.06, 0.078},   {WeightType::kQ5_K, 0.03, 0.039},
    {WeightType::kQ6_K, 0.015, 0.0195},
};

}  // namespace

TEST(ErrorsOfGaussianValuesAreAsExpected) {
  Pool pool(2);
  const auto x = Gaussian(65536, 0.02f);
  for (const Expected& expected : kExpected) {
    const double error = RelativeError(x, ThereAndBack(pool, expected.type, x));
    std::printf("  %s: %.5f\n", InfoOf(expected.type).name, error);
    CHECK(error >= expected.least && error <= expected.most);
  }
}

TEST(ErrorsAreAsSmallAtEveryMagnitudeThatHalvesHave) {
  Pool pool(1);
  for (const float scale : {1e-3f, 1.0f, 1e4f}) {
    const auto x = Gaussian(4096, scale);
    for (const Expected& expected : kExpected)
      CHECK(RelativeError(x, ThereAndBack(pool, expected.type, x)) <= 1.1 * expected.most);
  }
}

// A d that is rounded there may be too large, but not too small. Q8_0's step, a 127th, is coarse.
TEST(ErrorsStaySmallWhereHalvesAreSparse) {
  Pool pool(1);
  for (const float scale : {1e-4f, 1e-5f, 3e-6f}) {
    const auto x = Gaussian(4096, scale);
    for (const Expected& expected : kExpected) {
      if (expected.type == WeightType::kF16 || expected.type == WeightType::kQ8_0) continue;
      CHECK(RelativeError(x, ThereAndBack(pool, expected.type, x)) <= 1.8 * expected.most);
    }
  }
  const auto x = Gaussian(4096, 1e-7f);  // where nothing is better than a bad guess
  for (const Expected& expected : kExpected)
    CHECK(RelativeError(x, ThereAndBack(pool, expected.type, x)) <= 1.0);
}

// All sub-blocks of a block then need the same step.
TEST(NearlyConstantValuesLoseNoMoreThanTheirSpread) {
  Pool pool(1);
  for (const float middle : {1.0f, -1.0f, 1000.0f}) {
    auto x = Gaussian(4096, 5e-4f * middle);
    for (float& value : x) value += middle;
    for (const Expected& expected : kExpected) {
      if (expected.type == WeightType::kQ8_0 || expected.type == WeightType::kBF16) continue;
      CHECK(RelativeError(x, ThereAndBack(pool, expected.type, x)) <= 7e-4);
    }
  }
}

TEST(ConstantsAndZerosAreMetExactly) {
  Pool pool(1);
  for (const WeightType type : kAllTypes) {
    for (const float value : {0.0f, -0.0f, 0.5f, -0.25f}) {
      // Q2_K's and other mins are whole multiples of a half precision step.
      const std::vector<float> x(512, value);
      for (const float y : ThereAndBack(pool, type, x))
        CHECK(std::fabs(y - value) <= 1e-3f * std::fabs(value));
    }
  }
}

TEST(ExtremesGiveFiniteBlocks) {
  Pool pool(1);
  const float tiny = std::numeric_limits<float>::denorm_min();
  for (const WeightType type : kAllTypes) {
    for (const float value : {tiny, -tiny, 1e-30f, 6e-8f, 1e-7f, 65504.0f, -65504.0f}) {
      auto x = Gaussian(512, std::fabs(value) / 8);
      x[0] = x[40] = x[300] = value;
      for (float& v : x) v = std::fmin(std::fmax(v, -65504.0f), 65504.0f);
      for (const float y : ThereAndBack(pool, type, x)) CHECK(std::isfinite(y));
      for (size_t i = 0; i < x.size(); ++i) x[i] = i % 2 == 0 ? value : -value;
      const auto back = ThereAndBack(pool, type, x);
      for (const float y : back) CHECK(std::isfinite(y));
      if (std::fabs(value) > 1) CHECK(RelativeError(x, back) < 0.4);
    }
  }
}

TEST(ValuesOfATypeStayWhatTheyAre) {
  Pool pool(1);
  // Quantizing what was dequantized finds the grid again, or at least leaves less than a tenth of
  // the type's own error.
  const auto x = Gaussian(4096, 0.02f);
  for (const Expected& expected : kExpected) {
    const auto once = ThereAndBack(pool, expected.type, x);
    CHECK(RelativeError(once, ThereAndBack(pool, expected.type, once)) <= 0.6 * expected.most);
  }
}

TEST(EqualTypesAreCopied) {
  Pool pool(2);
  for (const WeightType type : kAllTypes) {
    const auto x = Gaussian(10240, 0.02f);
    const Bytes blocks = Converted(pool, type, x);
    Bytes out(blocks.size());
    CHECK(!Convert(pool, type, type, x.size(), blocks.data(), out.data()).has_value());
    CHECK(out == blocks);
  }
}

TEST(ThreadsAndSplittingChangeNothing) {
  Pool one(1), three(3);
  const auto x = Gaussian(3 * 4096 + 256, 0.02f);
  for (const WeightType type : kAllTypes) {
    const Bytes whole = Converted(one, type, x);
    CHECK(Converted(three, type, x) == whole);
    Bytes parts;
    for (size_t first = 0; first < x.size(); first += 512) {
      const size_t n = std::min<size_t>(512, x.size() - first);
      const Bytes part = Converted(three, type, {x.data() + first, x.data() + first + n});
      parts.insert(parts.end(), part.begin(), part.end());
    }
    CHECK(parts == whole);
  }
}

// Who changes a quantizer changes these, and FORMAT of potluck/model_writer.py, so that nobody's
// interrupted file becomes a mixture.
TEST(TheBytesAreTheSameOnEveryMachine) {
  constexpr struct {
    WeightType type;
    uint32_t checksum;
  } kGolden[] = {
      {WeightType::kF16, 0x337416bb},  {WeightType::kBF16, 0x5f7be1e3},
      {WeightType::kQ4_0, 0x7b49604f}, {WeightType::kQ4_1, 0x1682e5d2},
      {WeightType::kQ5_0, 0x01ad93ca}, {WeightType::kQ5_1, 0x34926d21},
      {WeightType::kQ8_0, 0xa0614fcf}, {WeightType::kQ2_K, 0x0c59f0c0},
      {WeightType::kQ3_K, 0x56bf98fd}, {WeightType::kQ4_K, 0xcf48c13b},
      {WeightType::kQ5_K, 0x9f5228fd}, {WeightType::kQ6_K, 0x584d084a},
  };
  Pool pool(2);
  const auto x = OfEveryKind();
  for (const auto& golden : kGolden) {
    const Bytes blocks = Converted(pool, golden.type, x);
    check::Equal(Crc32c(blocks.data(), blocks.size()), golden.checksum, InfoOf(golden.type).name,
                 __FILE__, __LINE__);
  }
}

TEST(TheFirstFlawIsNamed) {
  Pool pool(2);
  const float infinity = std::numeric_limits<float>::infinity();
  for (const WeightType type : kAllTypes) {
    for (const float bad : {std::nanf(""), infinity, -infinity}) {
      auto x = Gaussian(5 * 4096, 0.02f);
      x[4097] = x[9000] = x[20000] = bad;
      Bytes out(RowBytes(type, x.size()));
      const Bytes in = BytesOf(x);
      const auto flaw = Convert(pool, WeightType::kF32, type, x.size(), in.data(), out.data());
      CHECK(flaw.has_value());
      if (!flaw) continue;
      CHECK_EQ(flaw->index, size_t{4097});
      CHECK(std::isnan(bad) ? std::isnan(flaw->value) : flaw->value == bad);
    }
  }
}

TEST(ValuesBeyondATypeAreFlaws) {
  Pool pool(1);
  for (const WeightType type : kAllTypes) {
    auto x = Gaussian(512, 0.02f);
    x[511] = -65505.0f;
    Bytes out(RowBytes(type, x.size()));
    const Bytes in = BytesOf(x);
    const auto flaw = Convert(pool, WeightType::kF32, type, x.size(), in.data(), out.data());
    const bool is_wide = type == WeightType::kF32 || type == WeightType::kBF16;
    CHECK_EQ(flaw.has_value(), !is_wide);
    if (flaw) CHECK_EQ(flaw->index, size_t{511});
  }
  const std::vector<float> largest(32,
                                   std::numeric_limits<float>::max());  // would round to infinity
  Bytes out(64);
  const Bytes in = BytesOf(largest);
  CHECK(Convert(pool, WeightType::kF32, WeightType::kBF16, 32, in.data(), out.data()).has_value());
}

TEST(HalvesWidenLikeOneByOne) {
  std::vector<uint16_t> halves(65536);
  for (size_t i = 0; i < halves.size(); ++i) halves[i] = static_cast<uint16_t>(i);
  Bytes in(2 * halves.size());
  std::memcpy(in.data(), halves.data(), in.size());
  std::vector<float> out(halves.size());
  Dequantize(WeightType::kF16, in.data(), halves.size(), out.data());
  for (size_t i = 0; i < halves.size(); ++i) {
    const float expected = HalfToFloat(halves[i]);
    CHECK(std::memcmp(&expected, &out[i], sizeof expected) == 0);
  }
}

TEST(BFloatsRoundToNearestEven) {
  Pool pool(1);
  const std::vector<float> x = {1.0f,           0x1.01p+0f,  0x1.03p+0f,
                                0x1.010002p+0f, -0x1.01p+0f, 0x1p-133f};
  const std::vector<float> expected = {1.0f, 1.0f, 0x1.04p+0f, 0x1.02p+0f, -1.0f, 0x1p-133f};
  CHECK(ThereAndBack(pool, WeightType::kBF16, x) == expected);
}

TEST(ABrokenScaleIsAFlaw) {
  Pool pool(1);
  Bytes block(144, 1);
  const uint16_t nan = 0x7e00;
  std::memcpy(block.data() + 2, &nan, sizeof nan);  // dmin of Q4_K
  Bytes out(256 * 2);
  CHECK(Convert(pool, WeightType::kQ4_K, WeightType::kF16, 256, block.data(), out.data()));
  CHECK(Convert(pool, WeightType::kQ4_K, WeightType::kQ4_K, 256, block.data(), out.data()));
}

TEST(WholeBlocksAreAskedFor) {
  Pool pool(1);
  const std::vector<float> x(48);
  const Bytes in = BytesOf(x);
  Bytes out(1024);
  CHECK_THROWS(Convert(pool, WeightType::kF32, WeightType::kQ4_0, 48, in.data(), out.data()),
               UsageError);
}

CHECK_MAIN
