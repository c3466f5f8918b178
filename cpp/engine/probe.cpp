#include "engine/probe.h"

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstdint>
#include <memory>
#include <string>

#include "engine/errors.h"

namespace potluck {
namespace {

constexpr size_t kPieceBytes =
    size_t{256} * 1024;  // some 10 us each: sharing them out costs nothing
constexpr size_t kPieceWords = kPieceBytes / sizeof(uint64_t);

// Eight sums side by side, so that loads and not additions are the limit, even at the baseline ISA.
uint64_t SumOf(const uint64_t* words, size_t n) {
  uint64_t sums[8] = {};
  for (size_t i = 0; i < n; i += 8)
    for (size_t j = 0; j < 8; ++j) sums[j] += words[i + j];
  uint64_t total = 0;
  for (const uint64_t sum : sums) total += sum;
  return total;
}

}  // namespace

double ReadBandwidth(Pool& pool, size_t size_bytes, size_t rounds) {
  const size_t least = pool.threads() << 20;
  if (size_bytes < least)
    throw UsageError("size_bytes: at least 1 MiB a thread, " + std::to_string(least) + ", not " +
                     std::to_string(size_bytes));
  if (rounds == 0) throw UsageError("rounds: at least 1");
  const Pinned pinned(pool);
  const size_t pieces = size_bytes / kPieceBytes;
  const std::unique_ptr<uint64_t[]> words(new uint64_t[pieces * kPieceWords]);
  // Written before it is read: pages never touched are all one page of zeros, which stays in cache.
  pool.Run(pieces, 1, [&](size_t, size_t first, size_t last) {
    std::fill(&words[first * kPieceWords], &words[0] + last * kPieceWords, first + 1);
  });
  std::atomic<uint64_t> total{0};  // so that the reads are not optimized away
  double best = 0;
  for (size_t round = 0; round < rounds; ++round) {
    const auto start = std::chrono::steady_clock::now();
    pool.Run(pieces, 1, [&](size_t, size_t first, size_t last) {
      const uint64_t sum = SumOf(&words[first * kPieceWords], (last - first) * kPieceWords);
      total.fetch_add(sum, std::memory_order_relaxed);
    });
    const std::chrono::duration<double> took = std::chrono::steady_clock::now() - start;
    best = std::max(best, static_cast<double>(pieces * kPieceBytes) / took.count());
  }
  if (total.load(std::memory_order_relaxed) == 0)
    throw EngineError("the memory probe read nothing");
  return best;
}

}  // namespace potluck
