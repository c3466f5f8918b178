// Attention: every table against the scalar one by bits, the scalar one against f64, and the same
// bits however a session was cut into steps, pages, batches and threads.
#include "engine/attention.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <vector>

#include "check.h"
#include "engine/isa.h"
#include "engine/kernels/table.h"
#include "engine/types.h"
#include "timeline.h"

using potluck::Attention;
using potluck::AttentionTable;
using potluck::KvKernels;
using potluck::KvPages;
using potluck::KvType;
using potluck::Pool;
using potluck::SessionRows;
using timelines::AsF16;
using timelines::Attended;
using timelines::ConfigOf;
using timelines::kTypes;
using timelines::Moderate;
using timelines::Normal;
using timelines::SameBits;
using timelines::Shape;
using timelines::Shapes;
using timelines::Store;
using timelines::TableOf;
using timelines::Tables;
using timelines::Timeline;
using timelines::WorstError;

TEST(every_table_gives_the_scalar_bits) {
  for (const KvType type : kTypes) {
    for (const Shape& shape : Shapes()) {
      const Timeline timeline(shape, 530, 11);  // two splits
      const auto scalar = Attended(TableOf("scalar"), type, timeline, 1, 530);
      for (const AttentionTable* table : Tables()) {
        for (const size_t chunk : {530u, 1u, 13u}) {  // a kernel takes six rows at a time
          CHECK(SameBits(Attended(*table, type, timeline, 1, chunk), scalar));
        }
      }
    }
  }
}

TEST(every_table_has_kernels_of_its_own) {
  for (const AttentionTable* table : Tables()) {
    if (table == &TableOf("scalar")) continue;
    for (const KvType type : kTypes) {
      const KvKernels& own = potluck::KernelsFor(*table, type);
      const KvKernels& scalar = potluck::KernelsFor(TableOf("scalar"), type);
      CHECK(own.add_tile != scalar.add_tile);
      CHECK(own.store_key != scalar.store_key);
      CHECK(own.store_value != scalar.store_value);
    }
  }
}

TEST(rows_are_near_attention_in_f64) {
  const auto as_it_is = [](float value) { return value; };
  for (const Shape& shape : Shapes()) {
    const Timeline timeline(shape, 300, 3);
    const auto out = Attended(TableOf("auto"), KvType::kF16, timeline, 2, 64);
    CHECK(WorstError(timeline, out, AsF16) < 2e-5);
    CHECK(WorstError(timeline, out, AsF16) > 1e-9);  // else the comparison compares nothing
    const Timeline moderate = Moderate(shape);
    const auto moderate_out = Attended(TableOf("auto"), KvType::kF16, moderate, 2, 64);
    CHECK(WorstError(moderate, moderate_out, as_it_is) < 2e-3);
  }
}

TEST(a_byte_a_value_stays_within_a_hundredth_of_the_largest) {
  const auto as_it_is = [](float value) { return value; };
  for (const Shape& shape : Shapes()) {
    const Timeline timeline = Moderate(shape);
    const auto larger = [](float a, float b) { return std::fabs(a) < std::fabs(b); };
    const auto largest = std::max_element(timeline.values.begin(), timeline.values.end(), larger);
    const auto out = Attended(TableOf("auto"), KvType::kQ8, timeline, 2, 64);
    const double error = WorstError(timeline, out, as_it_is) / std::fabs(*largest);
    CHECK(error < 1e-2);
    CHECK(error > 1e-4);  // else it is not what is measured
  }
}

// All values alike: a row is that value, however its weights were rounded.
TEST(weights_of_bytes_sum_to_one) {
  const Shape shape = {2, 1, 64};
  for (const size_t length : {1u, 2u, 64u, 700u}) {
    Timeline timeline(shape, length, 5);
    std::fill(timeline.values.begin(), timeline.values.end(), -3.5f);
    const auto out = Attended(TableOf("auto"), KvType::kQ8, timeline, 1, length);
    for (const float value : out) CHECK(std::fabs(value + 3.5f) < 3.5f * 2e-3f);
  }
}

TEST(chunks_and_threads_change_no_bit) {
  for (const KvType type : kTypes) {
    for (const Shape& shape : {Shape{9, 3, 64}, Shape{8, 1, 16}}) {
      const size_t length = check::IsShort() ? 600 : 1100;  // two splits or three
      const Timeline timeline(shape, length, 7);
      const auto whole = Attended(TableOf("auto"), type, timeline, 1, length);
      for (const size_t threads : {1u, 2u, 3u, 4u}) {
        if (check::IsShort() && threads % 2 == 0) continue;
        for (const size_t chunk :
             {size_t{1}, size_t{7}, size_t{8}, size_t{9}, size_t{64}, size_t{257}, length}) {
          if (check::IsShort() && (chunk == 1 || chunk == 8)) continue;
          CHECK(SameBits(Attended(TableOf("auto"), type, timeline, threads, chunk), whole));
        }
      }
    }
  }
}

TEST(what_a_page_held_before_is_never_seen) {
  const Shape shape = {4, 2, 32};
  const Timeline timeline(shape, 21, 9);
  for (const KvType type : kTypes) {
    for (const AttentionTable* known : Tables()) {
      const AttentionTable& table = *known;
      KvPages kv({1, 2, 32, type}, size_t{1} << 18, 4);
      Pool pool(1);
      kv.Open(1, 32);
      kv.Prepare(1, 0, 32);
      for (const int32_t page : {0, 1}) {  // NaN everywhere
        std::fill_n(kv.Section(page, 0, 0), kv.shape().PageBytes(), uint8_t{0xff});
      }
      Attention attention(ConfigOf(shape), type, 1);
      Store(potluck::KernelsFor(table, type), kv, 1, timeline, 0, 21);
      std::vector<float> out(21 * 128);
      attention.Plan({SessionRows{kv.Table(1), 0, 0, 21}});
      attention.Attend(pool, table, kv, 0, timeline.q.data(), out.data());
      CHECK(SameBits(out, Attended(table, type, timeline, 1, 21)));
    }
  }
}

TEST(keys_and_values_round_to_nearest_even_and_refuse_what_overflows) {
  std::vector<float> values = Normal(37, 5, 100.0f);
  values[3] = 1.0f + 0x1p-11f;  // halfway: to even, down
  values[4] = 1.0f + 3 * 0x1p-11f;
  values[5] = 0x1p-25f;
  values[6] = 0x1.8p-24f;
  values[7] = -0.0f;
  values[8] = 65519.0f;
  for (const std::string& isa : potluck::AvailableIsas()) {
    const KvKernels& kernels = TableOf(isa).f16;
    std::vector<uint16_t> section(2 * 16 * 37);
    auto* const bytes = reinterpret_cast<uint8_t*>(section.data());
    CHECK(kernels.store_key(values.data(), 37, 5, bytes));
    CHECK(kernels.store_value(values.data(), 37, 5, bytes));
    for (size_t d = 0; d < 37; ++d) {
      const uint16_t half = potluck::FloatToHalf(values[d]);
      CHECK_EQ(section[d * 16 + 5], half);
      CHECK_EQ(section[(16 + 5) * 37 + d], half);
      CHECK_EQ(section[d * 16 + 4], 0);
      CHECK_EQ(section[(16 + 4) * 37 + d], 0);
    }
    for (const float bad : {65520.0f, -1e9f, INFINITY, -INFINITY, NAN}) {
      for (const size_t place : {0u, 12u, 36u}) {
        std::vector<float> damaged = values;
        damaged[place] = bad;
        CHECK(!kernels.store_value(damaged.data(), 37, 0, bytes));
        CHECK(!kernels.store_key(damaged.data(), 37, 0, bytes));
      }
    }
  }
}

// A section of q8, position 5: codes, and scales after all of them.
struct ByteSection {
  explicit ByteSection(size_t n) : head_dim(n), padded((n + 3) / 4 * 4), bytes(padded * 32 + 128) {}
  int KeyCode(size_t d) const { return Code((d / 4 * 16 + 5) * 4 + d % 4); }
  int ValueCode(size_t d) const { return Code(padded * 16 + (padded + d) * 4 + 1); }
  float Scale(size_t which) const {
    float scale = 0;
    std::memcpy(&scale, bytes.data() + padded * 32 + which * 64 + 5 * 4, 4);
    return scale;
  }
  int Code(size_t at) const { return static_cast<int8_t>(bytes[at]); }
  size_t head_dim, padded;
  std::vector<uint8_t> bytes;
};

TEST(bytes_share_the_scale_of_their_row_and_refuse_what_overflows) {
  for (const std::string& isa : potluck::AvailableIsas()) {
    const KvKernels& kernels = TableOf(isa).q8;
    for (const float scale : {1.0f, 100.0f, 0x1p-99f, 0x1p-120f, 0.0f}) {
      std::vector<float> x = Normal(37, 5, scale);
      x[9] = -4.0f * scale;  // the largest
      ByteSection section(37);
      std::fill(section.bytes.begin(), section.bytes.end(), uint8_t{0x55});
      CHECK(kernels.store_key(x.data(), 37, 5, section.bytes.data()));
      CHECK(kernels.store_value(x.data(), 37, 5, section.bytes.data()));
      const bool is_tiny = 4.0f * scale < 0x1p-100f;
      for (const size_t which : {0u, 1u}) {
        CHECK_EQ(section.Scale(which), is_tiny ? 0.0f : 4.0f * scale / 127.0f);
      }
      for (size_t d = 0; d < 40; ++d) {
        const float exact = d < 37 && !is_tiny ? x[d] * (127.0f / (4.0f * scale)) : 0.0f;
        CHECK_EQ(section.KeyCode(d), static_cast<int>(std::nearbyint(exact)));
        CHECK_EQ(section.ValueCode(d), section.KeyCode(d));
      }
      CHECK_EQ(section.Code(4 * 4), 0x55);  // another position
    }
    for (const float bad : {65536.0f, -1e9f, INFINITY, -INFINITY, NAN}) {
      for (const size_t place : {0u, 12u, 36u}) {
        std::vector<float> damaged = Normal(37, 5, 1.0f);
        damaged[place] = bad;
        ByteSection section(37);
        CHECK(!kernels.store_value(damaged.data(), 37, 0, section.bytes.data()));
        CHECK(!kernels.store_key(damaged.data(), 37, 0, section.bytes.data()));
      }
    }
  }
}

TEST(scores_far_apart_and_all_alike_are_the_same_on_every_table) {
  const Shape shape = {3, 1, 64};
  for (const KvType type : kTypes) {
    for (const float scale : {0.0f, 1e-3f, 100.0f, 3e4f, 0x1p79f}) {
      Timeline timeline(shape, 300, 21);
      for (float& q : timeline.q) q *= std::min(scale, 0x1p77f);
      if (scale < 1.0f) {  // and some rows of zeros
        std::fill_n(timeline.values.begin(), 100 * 64, 0.0f);
        std::fill_n(timeline.keys.begin() + 64 * 64, 100 * 64, -0.0f);
      }
      const auto scalar = Attended(TableOf("scalar"), type, timeline, 1, 300);
      CHECK(std::all_of(scalar.begin(), scalar.end(), [](float v) { return std::isfinite(v); }));
      for (const std::string& isa : potluck::AvailableIsas()) {
        CHECK(SameBits(Attended(TableOf(isa), type, timeline, 2, 50), scalar));
      }
    }
  }
}

// The most that a sum of codes can be: every product of a row has the same sign.
TEST(codes_all_at_their_largest_do_not_overflow) {
  for (const Shape& shape :
       {Shape{1, 1, 64}, Shape{1, 1, 512}, Shape{1, 1, 520}, Shape{1, 1, 2048}}) {
    Timeline timeline(shape, 70, 1);
    std::fill(timeline.keys.begin(), timeline.keys.end(), -2.0f);
    std::fill(timeline.values.begin(), timeline.values.end(), 5.0f);
    std::fill(timeline.q.begin(), timeline.q.end(), 0.01f);
    for (const std::string& isa : potluck::AvailableIsas()) {
      const auto out = Attended(TableOf(isa), KvType::kQ8, timeline, 1, 70);
      for (const float value : out) CHECK(std::fabs(value - 5.0f) < 1e-4f);
      CHECK(SameBits(out, Attended(TableOf("scalar"), KvType::kQ8, timeline, 1, 70)));
    }
  }
}

CHECK_MAIN
