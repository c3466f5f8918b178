// Attention: every table against the scalar one by bits, the scalar one against f64, and the same
// bits however a session was cut into steps, pages, batches and threads.
#include "engine/attention.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <memory>
#include <random>
#include <vector>

#include "check.h"
#include "engine/isa.h"
#include "engine/kernels/table.h"
#include "engine/types.h"

using potluck::Attention;
using potluck::AttentionTable;
using potluck::Config;
using potluck::KvPages;
using potluck::Pool;
using potluck::SessionRows;

namespace {

struct Shape {
  size_t n_heads, n_kv_heads, head_dim;
};

Config ConfigOf(const Shape& shape) {
  Config config;
  config.n_heads = shape.n_heads;
  config.n_kv_heads = shape.n_kv_heads;
  config.head_dim = shape.head_dim;
  return config;
}

std::vector<float> Normal(size_t n, uint32_t seed, float scale) {
  std::mt19937 random(seed);
  std::normal_distribution<float> normal(0.0f, scale);
  std::vector<float> values(n);
  for (float& value : values) value = normal(random);
  return values;
}

// Keys, values and queries of one session, [length, heads, head_dim] each.
struct Timeline {
  Timeline(const Shape& s, size_t n, uint32_t seed)
      : shape(s),
        length(n),
        keys(Normal(n * s.n_kv_heads * s.head_dim, seed, 1.0f)),
        values(Normal(n * s.n_kv_heads * s.head_dim, seed + 1, 1.0f)),
        q(Normal(n * s.n_heads * s.head_dim, seed + 2, 0.7f)) {}
  Shape shape;
  size_t length;
  std::vector<float> keys, values, q;
};

void Store(const AttentionTable& kernels, KvPages& kv, uint64_t session, const Timeline& timeline,
           size_t start, size_t stop) {
  const Shape& shape = timeline.shape;
  kv.Prepare(session, start, stop);
  for (size_t position = start; position < stop; ++position) {
    for (size_t head = 0; head < shape.n_kv_heads; ++head) {
      const size_t from = (position * shape.n_kv_heads + head) * shape.head_dim;
      uint16_t* section = kv.Section(kv.Table(session)[position / 16], 0, head);
      CHECK(kernels.store_key(timeline.keys.data() + from, shape.head_dim, position % 16, section));
      CHECK(kernels.store_value(timeline.values.data() + from, shape.head_dim, position % 16,
                                section));
    }
  }
  kv.Commit(session, stop);
}

// Attention of the whole timeline, in steps of `chunk` rows.
std::vector<float> Attended(const AttentionTable& kernels, const Timeline& timeline, size_t threads,
                            size_t chunk) {
  const Shape& shape = timeline.shape;
  const size_t width = shape.n_heads * shape.head_dim;
  Pool pool(threads);
  KvPages kv({1, shape.n_kv_heads, shape.head_dim}, size_t{1} << 24, 4);
  Attention attention(ConfigOf(shape), threads);
  kv.Open(1, timeline.length);
  std::vector<float> out(timeline.length * width);
  for (size_t start = 0; start < timeline.length; start += chunk) {
    const size_t n = std::min(chunk, timeline.length - start);
    Store(kernels, kv, 1, timeline, start, start + n);
    attention.Plan({SessionRows{kv.Table(1), start, 0, n}});
    attention.Attend(pool, kernels, kv, 0, timeline.q.data() + start * width,
                     out.data() + start * width);
  }
  return out;
}

bool SameBits(const std::vector<float>& a, const std::vector<float>& b) {
  return a.size() == b.size() && std::memcmp(a.data(), b.data(), a.size() * sizeof(float)) == 0;
}

// One head of one row in f64, over keys and values rounded to f16.
std::vector<double> Exact(const Timeline& t, size_t row, size_t head) {
  const Shape& s = t.shape;
  const size_t kv_head = head / (s.n_heads / s.n_kv_heads);
  const auto at = [&](const std::vector<float>& x, size_t position, size_t d) {
    const float value = x[(position * s.n_kv_heads + kv_head) * s.head_dim + d];
    return static_cast<double>(potluck::HalfToFloat(potluck::FloatToHalf(value)));
  };
  std::vector<double> scores(row + 1), out(s.head_dim);
  for (size_t j = 0; j <= row; ++j) {
    for (size_t d = 0; d < s.head_dim; ++d) {
      scores[j] +=
          static_cast<double>(t.q[(row * s.n_heads + head) * s.head_dim + d]) * at(t.keys, j, d);
    }
  }
  const double largest = *std::max_element(scores.begin(), scores.end());
  double sum = 0;
  for (double& score : scores) sum += score = std::exp(score - largest);
  for (size_t j = 0; j <= row; ++j) {
    for (size_t d = 0; d < s.head_dim; ++d) out[d] += scores[j] / sum * at(t.values, j, d);
  }
  return out;
}

// Those of the ISAs that this CPU runs; some share one.
std::vector<const AttentionTable*> Tables() {
  std::vector<const AttentionTable*> tables;
  for (const std::string& isa : potluck::AvailableIsas()) {
    const AttentionTable* table = potluck::ChooseTable(isa).attention;
    if (tables.empty() || tables.back() != table) tables.push_back(table);
  }
  return tables;
}

// In groups and alone; whole slices of 16 dimensions, parts of one, and such as no register holds.
std::vector<Shape> Shapes() {
  if (check::IsShort()) return {{3, 1, 64}, {2, 1, 20}, {7, 1, 36}, {1, 1, 104}, {2, 1, 22}};
  return {{9, 3, 64}, {4, 4, 128}, {2, 1, 20}, {8, 1, 16}, {7, 1, 100}, {1, 1, 104}, {2, 1, 22}};
}

}  // namespace

TEST(every_table_gives_the_scalar_bits) {
  for (const Shape& shape : Shapes()) {
    const Timeline timeline(shape, 530, 11);  // two splits
    const auto scalar = Attended(*potluck::ChooseTable("scalar").attention, timeline, 1, 530);
    for (const AttentionTable* kernels : Tables()) {
      for (const size_t chunk : {530u, 1u, 13u}) {  // a kernel takes six rows at a time
        CHECK(SameBits(Attended(*kernels, timeline, 1, chunk), scalar));
      }
    }
  }
}

TEST(rows_are_near_attention_in_f64) {
  for (const Shape& shape : Shapes()) {
    const Timeline timeline(shape, 300, 3);
    const auto out = Attended(*potluck::ChooseTable("auto").attention, timeline, 2, 64);
    double worst = 0;
    for (size_t row = 0; row < timeline.length; row += 13) {
      for (size_t head = 0; head < shape.n_heads; ++head) {
        const std::vector<double> exact = Exact(timeline, row, head);
        for (size_t d = 0; d < shape.head_dim; ++d) {
          const float got = out[(row * shape.n_heads + head) * shape.head_dim + d];
          worst = std::max(worst, std::fabs(static_cast<double>(got) - exact[d]));
        }
      }
    }
    CHECK(worst < 2e-5);
    CHECK(worst > 1e-9);  // else the comparison compares nothing
  }
}

TEST(chunks_and_threads_change_no_bit) {
  for (const Shape& shape : {Shape{9, 3, 64}, Shape{8, 1, 16}}) {
    const size_t length = check::IsShort() ? 600 : 1100;  // two splits or three
    const Timeline timeline(shape, length, 7);
    const AttentionTable& kernels = *potluck::ChooseTable("auto").attention;
    const auto whole = Attended(kernels, timeline, 1, length);
    for (const size_t threads : {1u, 2u, 3u, 4u}) {
      if (check::IsShort() && threads % 2 == 0) continue;
      for (const size_t chunk :
           {size_t{1}, size_t{7}, size_t{8}, size_t{9}, size_t{64}, size_t{257}, length}) {
        if (check::IsShort() && (chunk == 1 || chunk == 8)) continue;
        CHECK(SameBits(Attended(kernels, timeline, threads, chunk), whole));
      }
    }
  }
}

TEST(what_a_page_held_before_is_never_seen) {
  const Shape shape = {4, 2, 32};
  const Timeline timeline(shape, 21, 9);
  for (const std::string& isa : potluck::AvailableIsas()) {
    const AttentionTable& kernels = *potluck::ChooseTable(isa).attention;
    KvPages kv({1, 2, 32}, size_t{1} << 18, 4);
    Pool pool(1);
    kv.Open(1, 32);
    kv.Prepare(1, 0, 32);
    for (const int32_t page : {0, 1}) {  // NaN everywhere
      std::fill_n(kv.Section(page, 0, 0), kv.shape().PageValues(), uint16_t{0x7e00});
    }
    Attention attention(ConfigOf(shape), 1);
    Store(kernels, kv, 1, timeline, 0, 21);
    std::vector<float> out(21 * 128);
    attention.Plan({SessionRows{kv.Table(1), 0, 0, 21}});
    attention.Attend(pool, kernels, kv, 0, timeline.q.data(), out.data());
    CHECK(SameBits(out, Attended(kernels, timeline, 1, 21)));
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
    const AttentionTable& kernels = *potluck::ChooseTable(isa).attention;
    std::vector<uint16_t> section(2 * 16 * 37);
    CHECK(kernels.store_key(values.data(), 37, 5, section.data()));
    CHECK(kernels.store_value(values.data(), 37, 5, section.data()));
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
        CHECK(!kernels.store_value(damaged.data(), 37, 0, section.data()));
        CHECK(!kernels.store_key(damaged.data(), 37, 0, section.data()));
      }
    }
  }
}

TEST(scores_far_apart_and_all_alike_are_the_same_on_every_table) {
  const Shape shape = {3, 1, 64};
  for (const float scale : {0.0f, 1e-3f, 100.0f, 3e4f}) {
    Timeline timeline(shape, 300, 21);
    for (float& q : timeline.q) q *= scale;
    const auto scalar = Attended(*potluck::ChooseTable("scalar").attention, timeline, 1, 300);
    CHECK(std::all_of(scalar.begin(), scalar.end(), [](float v) { return std::isfinite(v); }));
    for (const std::string& isa : potluck::AvailableIsas()) {
      CHECK(SameBits(Attended(*potluck::ChooseTable(isa).attention, timeline, 2, 50), scalar));
    }
  }
}

CHECK_MAIN
