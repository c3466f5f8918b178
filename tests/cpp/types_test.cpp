#include "engine/types.h"

#include <cmath>
#include <cstring>

#include "check.h"

using namespace potluck;

namespace {

uint32_t BitsOf(float value) {
  uint32_t bits = 0;
  std::memcpy(&bits, &value, sizeof bits);
  return bits;
}

}  // namespace

TEST(EveryHalfSurvivesTheWayToFloatAndBack) {
  for (uint32_t half = 0; half < 65536; ++half) {
    const float value = HalfToFloat(static_cast<uint16_t>(half));
    const bool is_nan = (half & 0x7fff) > 0x7c00;
    CHECK_EQ(std::isnan(value), is_nan);
    // A signalling NaN comes back quiet.
    CHECK_EQ(FloatToHalf(value), is_nan ? half | 0x200u : half);
  }
}

TEST(HalvesHaveTheirValues) {
  CHECK_EQ(HalfToFloat(0x3c00), 1.0f);
  CHECK_EQ(HalfToFloat(0xc000), -2.0f);
  CHECK_EQ(HalfToFloat(0x7bff), 65504.0f);
  CHECK_EQ(HalfToFloat(0x0001), 0x1p-24f);
  CHECK_EQ(HalfToFloat(0x03ff), 1023 * 0x1p-24f);
  CHECK_EQ(BitsOf(HalfToFloat(0x8000)), 0x80000000u);
  CHECK(std::isinf(HalfToFloat(0x7c00)));
}

TEST(FloatsRoundToTheNearestEvenHalf) {
  for (uint32_t half = 0; half < 0x7bff; ++half) {
    const double low = HalfToFloat(static_cast<uint16_t>(half));
    const double high = HalfToFloat(static_cast<uint16_t>(half + 1));
    const float middle = static_cast<float>((low + high) / 2);  // exact
    CHECK_EQ(FloatToHalf(middle), half + half % 2);
    CHECK_EQ(FloatToHalf(std::nextafter(middle, 0.0f)), half);
    CHECK_EQ(FloatToHalf(std::nextafter(middle, 1e6f)), half + 1);
    CHECK_EQ(FloatToHalf(-middle), 0x8000u + half + half % 2);
  }
  CHECK_EQ(FloatToHalf(65519.99f), 0x7bffu);
  CHECK_EQ(FloatToHalf(65520.0f), 0x7c00u);
  CHECK_EQ(FloatToHalf(1e30f), 0x7c00u);
}

TEST(BFloatsAreTheTopOfAFloat) {
  CHECK_EQ(BFloatToFloat(0x3f80), 1.0f);
  CHECK_EQ(BFloatToFloat(0xc040), -3.0f);
  CHECK_EQ(BitsOf(BFloatToFloat(0x0001)), 0x10000u);
}

TEST(TypesAreFoundByNameAndKnowTheirBlocks) {
  CHECK(FindType("q4_2") == nullptr);
  CHECK(FindType("") == nullptr);
  CHECK(FindType("q6_k") == &InfoOf(WeightType::kQ6_K));
  CHECK_EQ(RowBytes(WeightType::kQ4_0, 4096), 4096u / 32 * 18);
  CHECK_EQ(RowBytes(WeightType::kQ4_1, 576), 576u / 32 * 20);
  CHECK_EQ(RowBytes(WeightType::kQ8_0, 576), 576u / 32 * 34);
  CHECK_EQ(RowBytes(WeightType::kQ6_K, 512), 420u);
  CHECK_EQ(RowBytes(WeightType::kBF16, 5), 10u);
}

CHECK_MAIN
