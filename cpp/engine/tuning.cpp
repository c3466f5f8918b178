#include "engine/tuning.h"

#include <algorithm>
#include <chrono>
#include <cmath>
#include <cstdint>
#include <ctime>
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
// How long a reading takes, in whole rounds.
constexpr double kReadingSeconds = 0.01;
constexpr size_t kFewestRounds = 3;
constexpr size_t kMostRounds = 99;
// Counts are measured in turns; the best time of a count is what it can do.
constexpr size_t kTurns = 5;
constexpr double kAsGood = 1.03;
// Threads of a pool that works spin between its runs. A reading in which they had less of the CPUs
// than that tells of what else ran, or of threads that the system had yet to spread.
constexpr double kUndisturbed = 0.9;

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

// Of all threads of this process.
double CpuSeconds() {
  timespec time{};
  clock_gettime(CLOCK_PROCESS_CPUTIME_ID, &time);
  return static_cast<double>(time.tv_sec) + static_cast<double>(time.tv_nsec) * 1e-9;
}

// The fewest threads whose times are about the best; all if some count had no
// undisturbed reading.
size_t Fewest(Pool& pool, MatMulBenchmark& benchmark) {
  const std::vector<size_t> counts = Candidates(pool.threads());
  std::vector<double> best(counts.size(), std::numeric_limits<double>::infinity());
  for (size_t turn = 0; turn < kTurns; ++turn) {
    for (size_t i = 0; i < counts.size(); ++i) {
      pool.Use(counts[i]);
      const double once = benchmark.MedianSeconds(pool, 1);  // wakes the threads, too
      const size_t rounds =
          std::clamp(static_cast<size_t>(kReadingSeconds / once), kFewestRounds, kMostRounds);
      const auto start = std::chrono::steady_clock::now();
      const double before = CpuSeconds();
      const double reading = benchmark.MedianSeconds(pool, rounds);
      const std::chrono::duration<double> took = std::chrono::steady_clock::now() - start;
      const double could = took.count() * static_cast<double>(counts[i]);
      if (CpuSeconds() - before >= kUndisturbed * could) best[i] = std::min(best[i], reading);
    }
  }
  pool.Use(pool.threads());
  const bool is_known =
      std::all_of(best.begin(), best.end(), [](double s) { return s < HUGE_VAL; });
  return is_known ? FewestAsFast(counts, best) : pool.threads();
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
  const Pinned pinned(pool);
  const size_t for_decode = [&] {
    MatMulBenchmark decode(table, type, kWidth, kWidth, 1, weight_bytes);
    return Fewest(pool, decode);
  }();
  MatMulBenchmark prefill(table, type, kPrefillWeights, kWidth, kPrefillRows, 1);
  const size_t for_prefill = Fewest(pool, prefill);
  pool.Allot(for_decode, for_prefill);
}

}  // namespace potluck
