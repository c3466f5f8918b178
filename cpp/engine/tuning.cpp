#include "engine/tuning.h"

#include <algorithm>
#include <cstdint>
#include <limits>
#include <string>
#include <vector>

#include "engine/bench.h"
#include "engine/errors.h"

namespace potluck {
namespace {

// A square of 7B's width: 9 MiB of Q4_0, so a few rounds read memory and not a cache.
constexpr size_t kWidth = 4096;
// Of prefill the rows matter, not the weights.
constexpr size_t kPrefillRows = 64;
constexpr size_t kPrefillWeights = 512;
constexpr size_t kRounds = 7;
// Counts are measured in turns; the best time of a count is what it can do.
constexpr size_t kTurns = 3;
constexpr double kAsGood = 1.03;

// Counts worth a try: all, three quarters, half and a quarter; half is the cores of CPUs with two
// threads each, or the fast cores of many phones and laptops.
std::vector<size_t> Candidates(size_t threads) {
  std::vector<size_t> counts;
  for (const size_t quarters : {1u, 2u, 3u, 4u}) {
    const size_t count = std::max<size_t>(1, threads * quarters / 4);
    if (counts.empty() || counts.back() != count) counts.push_back(count);
  }
  return counts;
}

// The fewest threads whose `seconds()` are about the best.
template <class Seconds>
size_t Fewest(Pool& pool, const Seconds& seconds) {
  const std::vector<size_t> counts = Candidates(pool.threads());
  std::vector<double> best(counts.size(), std::numeric_limits<double>::infinity());
  for (size_t turn = 0; turn < kTurns; ++turn) {
    for (size_t i = 0; i < counts.size(); ++i) {
      pool.Use(counts[i]);
      best[i] = std::min(best[i], seconds());
    }
  }
  pool.Use(pool.threads());
  return FewestAsFast(counts, best);
}

}  // namespace

size_t FewestAsFast(const std::vector<size_t>& counts, const std::vector<double>& seconds) {
  const double least = *std::min_element(seconds.begin(), seconds.end());
  size_t chosen = 0;
  while (seconds[chosen] > kAsGood * least) ++chosen;
  return counts[chosen];
}

void TuneThreads(Pool& pool, const MatMulTable& table, size_t weight_bytes) {
  if (weight_bytes < size_t{1} << 20)
    throw UsageError("weight_bytes: at least 1 MiB, not " + std::to_string(weight_bytes));
  if (pool.threads() == 1) return;
  const WeightType type = WeightType::kQ4_0;
  MatMulBenchmark decode(table, type, kWidth, kWidth, 1, weight_bytes);
  MatMulBenchmark prefill(table, type, kPrefillWeights, kWidth, kPrefillRows, weight_bytes);
  const size_t for_decode = Fewest(pool, [&] { return decode.MedianSeconds(pool, kRounds); });
  const size_t for_prefill = Fewest(pool, [&] { return prefill.MedianSeconds(pool, kRounds); });
  pool.Allot(for_decode, for_prefill);
}

}  // namespace potluck
