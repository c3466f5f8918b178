#include "engine/shares.h"

#include <atomic>
#include <cmath>
#include <random>
#include <thread>
#include <vector>

#include "check.h"

using potluck::Shares;

namespace {

// A run of threads that need `cost` for a piece each, without a clock: who is free first takes
// next. Returns the time at which the last was done, over the shortest possible.
double TimeOfRun(Shares& shares, const std::vector<double>& cost, size_t n_pieces, size_t grain) {
  shares.Deal(n_pieces, grain, cost.size());
  std::vector<double> free_at(cost.size(), 0.0);
  std::vector<bool> is_done(cost.size(), false);
  double end = 0, rate = 0;
  for (const double c : cost) rate += 1 / c;
  for (size_t left = cost.size(); left > 0;) {
    size_t next = 0;
    double earliest = HUGE_VAL;
    for (size_t t = 0; t < cost.size(); ++t)
      if (!is_done[t] && free_at[t] < earliest) earliest = free_at[next = t];
    size_t first = 0, last = 0;
    if (shares.Take(next, &first, &last)) {
      free_at[next] += cost[next] * static_cast<double>(last - first);
      continue;
    }
    is_done[next] = true;
    end = std::fmax(end, free_at[next]);
    --left;
  }
  shares.Learn(cost.size());
  return end * rate / static_cast<double>(n_pieces);
}

}  // namespace

TEST(each_piece_is_taken_once) {
  std::mt19937 random(11);
  for (const size_t threads : {1u, 2u, 5u}) {
    Shares shares(threads);
    for (int run = 0; run < 300; ++run) {
      const size_t n_pieces = 1 + random() % 200;
      const size_t grain = 1 + random() % 9;
      std::vector<int> times(n_pieces, 0);
      std::vector<bool> is_done(threads, false);
      shares.Deal(n_pieces, grain, threads);
      for (size_t left = threads; left > 0;) {
        const size_t thread = random() % threads;
        size_t first = 0, last = 0;
        if (is_done[thread]) continue;
        if (!shares.Take(thread, &first, &last)) {
          is_done[thread] = true;
          --left;
          continue;
        }
        CHECK(last - first <= grain);
        for (size_t i = first; i < last; ++i) ++times[i];
      }
      for (const int count : times) CHECK_EQ(count, 1);
      shares.Learn(threads);
    }
  }
}

TEST(shares_become_proportional_to_speed) {
  Shares shares(4);
  const std::vector<double> cost = {1, 1, 3, 3};
  for (int run = 0; run < 200; ++run) TimeOfRun(shares, cost, 128, 8);
  CHECK(std::fabs(shares.speed(0) - 1.5) < 0.1);
  CHECK(std::fabs(shares.speed(3) - 0.5) < 0.1);
  // A slow core that is slow no longer is found out.
  for (int run = 0; run < 200; ++run) TimeOfRun(shares, {1, 1, 1, 1}, 128, 8);
  CHECK(std::fabs(shares.speed(3) - 1.0) < 0.1);
}

TEST(runs_of_some_threads_tell_nothing_of_the_others) {
  Shares shares(4);
  for (int run = 0; run < 200; ++run) TimeOfRun(shares, {1, 1, 3, 3}, 128, 8);
  for (int run = 0; run < 200; ++run) TimeOfRun(shares, {1, 1}, 128, 8);
  CHECK(std::fabs(shares.speed(0) - 1.5) < 0.1);
  CHECK(std::fabs(shares.speed(3) - 0.5) < 0.1);
}

TEST(unequal_cores_finish_together) {
  Shares shares(8);
  const std::vector<double> cost = {1, 1, 1, 1, 3, 3, 3, 3};
  double worst = 0;
  for (int run = 0; run < 100; ++run) {
    const double over = TimeOfRun(shares, cost, 512, 8);
    if (run >= 50) worst = std::fmax(worst, over);
  }
  CHECK(worst < 1.03);
}

TEST(a_thread_that_stands_still_holds_up_no_more_than_its_own_range) {
  Shares shares(2);
  shares.Deal(100, 4, 2);
  size_t first = 0, last = 0, taken = 0;
  CHECK(shares.Take(1, &first, &last));  // and never comes back
  const size_t kept = last - first;
  while (shares.Take(0, &first, &last)) taken += last - first;
  CHECK_EQ(taken, 100 - kept);
}

TEST(short_runs_tell_nothing_of_speed) {
  Shares shares(2);
  for (int run = 0; run < 100; ++run) TimeOfRun(shares, {1, 9}, 4, 1);
  CHECK_EQ(shares.speed(1), 1.0);
}

TEST(what_is_cleared_is_not_taken) {
  Shares shares(3);
  shares.Deal(90, 1, 3);
  shares.Clear();
  size_t first = 0, last = 0;
  CHECK(!shares.Take(2, &first, &last));
}

CHECK_MAIN
