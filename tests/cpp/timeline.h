// A session's keys, values and queries, attended by kernels of any table and type, and in f64.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstring>
#include <random>
#include <string>
#include <vector>

#include "check.h"
#include "engine/attention.h"
#include "engine/isa.h"
#include "engine/kernels/table.h"
#include "engine/types.h"

namespace timelines {

using potluck::Attention;
using potluck::AttentionTable;
using potluck::Config;
using potluck::KvKernels;
using potluck::KvPages;
using potluck::KvType;
using potluck::Pool;
using potluck::SessionRows;

struct Shape {
  size_t n_heads, n_kv_heads, head_dim;
};

inline Config ConfigOf(const Shape& shape) {
  Config config;
  config.n_heads = shape.n_heads;
  config.n_kv_heads = shape.n_kv_heads;
  config.head_dim = shape.head_dim;
  return config;
}

inline std::vector<float> Normal(size_t n, uint32_t seed, float scale) {
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

inline void Store(const KvKernels& kernels, KvPages& kv, uint64_t session, const Timeline& timeline,
                  size_t start, size_t stop) {
  const Shape& shape = timeline.shape;
  kv.Prepare(session, start, stop);
  for (size_t position = start; position < stop; ++position) {
    for (size_t head = 0; head < shape.n_kv_heads; ++head) {
      const size_t from = (position * shape.n_kv_heads + head) * shape.head_dim;
      uint8_t* section = kv.Section(kv.Table(session)[position / 16], 0, head);
      CHECK(kernels.store_key(timeline.keys.data() + from, shape.head_dim, position % 16, section));
      CHECK(kernels.store_value(timeline.values.data() + from, shape.head_dim, position % 16,
                                section));
    }
  }
  kv.Commit(session, stop);
}

// Attention of the whole timeline, in steps of `chunk` rows.
inline std::vector<float> Attended(const AttentionTable& table, KvType type,
                                   const Timeline& timeline, size_t threads, size_t chunk) {
  const Shape& shape = timeline.shape;
  const size_t width = shape.n_heads * shape.head_dim;
  Pool pool(threads);
  KvPages kv({1, shape.n_kv_heads, shape.head_dim, type}, size_t{1} << 24, 4);
  Attention attention(ConfigOf(shape), type, threads);
  kv.Open(1, timeline.length);
  std::vector<float> out(timeline.length * width);
  for (size_t start = 0; start < timeline.length; start += chunk) {
    const size_t n = std::min(chunk, timeline.length - start);
    Store(potluck::KernelsFor(table, type), kv, 1, timeline, start, start + n);
    attention.Plan({SessionRows{kv.Table(1), start, 0, n}});
    attention.Attend(pool, table, kv, 0, timeline.q.data() + start * width,
                     out.data() + start * width);
  }
  return out;
}

inline bool SameBits(const std::vector<float>& a, const std::vector<float>& b) {
  return a.size() == b.size() && std::memcmp(a.data(), b.data(), a.size() * sizeof(float)) == 0;
}

inline float AsF16(float value) { return potluck::HalfToFloat(potluck::FloatToHalf(value)); }

// One head of one row in f64, over keys and values that `kept` gives.
template <class Kept>
std::vector<double> Exact(const Timeline& t, size_t row, size_t head, const Kept& kept) {
  const Shape& s = t.shape;
  const size_t kv_head = head / (s.n_heads / s.n_kv_heads);
  const auto at = [&](const std::vector<float>& x, size_t position, size_t d) {
    return static_cast<double>(kept(x[(position * s.n_kv_heads + kv_head) * s.head_dim + d]));
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

// The largest difference of some rows from Exact.
template <class Kept>
double WorstError(const Timeline& timeline, const std::vector<float>& out, const Kept& kept) {
  const Shape& shape = timeline.shape;
  double worst = 0;
  for (size_t row = 0; row < timeline.length; row += 13) {
    for (size_t head = 0; head < shape.n_heads; ++head) {
      const std::vector<double> exact = Exact(timeline, row, head, kept);
      for (size_t d = 0; d < shape.head_dim; ++d) {
        const float got = out[(row * shape.n_heads + head) * shape.head_dim + d];
        worst = std::max(worst, std::fabs(static_cast<double>(got) - exact[d]));
      }
    }
  }
  return worst;
}

// Queries as models have them: scores of about +-2, so that many positions count.
inline Timeline Moderate(const Shape& shape) {
  Timeline timeline(shape, 300, 3);
  for (float& q : timeline.q) q *= 2.0f / 0.7f / std::sqrt(static_cast<float>(shape.head_dim));
  return timeline;
}

inline const AttentionTable& TableOf(const std::string& isa) {
  return *potluck::ChooseTable(isa).attention;
}

// Those of the ISAs that this CPU runs; some share one.
inline std::vector<const AttentionTable*> Tables() {
  std::vector<const AttentionTable*> tables;
  for (const std::string& isa : potluck::AvailableIsas()) {
    const AttentionTable* table = potluck::ChooseTable(isa).attention;
    if (tables.empty() || tables.back() != table) tables.push_back(table);
  }
  return tables;
}

// In groups and alone; whole slices of 16 dimensions, parts of one, and such as no register holds.
inline std::vector<Shape> Shapes() {
  if (check::IsShort()) return {{3, 1, 64}, {2, 1, 20}, {7, 1, 36}, {1, 1, 104}, {2, 1, 22}};
  return {{9, 3, 64}, {4, 4, 128}, {2, 1, 20}, {8, 1, 16}, {7, 1, 100}, {1, 1, 104}, {2, 1, 22}};
}

constexpr KvType kTypes[] = {KvType::kF16, KvType::kQ8};

}  // namespace timelines
