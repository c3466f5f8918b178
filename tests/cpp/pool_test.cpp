#include "engine/pool.h"

#include <sched.h>
#include <sys/resource.h>
#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstdint>
#include <limits>
#include <memory>
#include <random>
#include <set>
#include <stdexcept>
#include <thread>
#include <vector>

#include "check.h"
#include "engine/cpu.h"
#include "engine/errors.h"
#include "engine/float_rules.h"

using potluck::Pool;

namespace {

double CpuSeconds() {
  rusage usage{};
  getrusage(RUSAGE_SELF, &usage);
  const auto seconds = [](const timeval& t) {
    return static_cast<double>(t.tv_sec) + static_cast<double>(t.tv_usec) * 1e-6;
  };
  return seconds(usage.ru_utime) + seconds(usage.ru_stime);
}

// Plain counters, not atomics: a piece given to two threads at once is a race that TSan reports.
void CoversEachPieceOnce(Pool& pool, size_t n_pieces, size_t grain) {
  std::vector<int> times(n_pieces, 0);
  pool.Run(n_pieces, grain, [&](size_t thread, size_t first, size_t last) {
    CHECK(thread < pool.threads());
    CHECK(first < last && last <= n_pieces && last - first <= (grain == 0 ? 1 : grain));
    for (size_t i = first; i < last; ++i) ++times[i];
  });
  for (const int count : times) CHECK_EQ(count, 1);
}

}  // namespace

TEST(each_piece_is_worked_on_exactly_once) {
  for (const size_t threads : {1u, 2u, 3u, 8u}) {
    Pool pool(threads);
    for (const size_t n_pieces : {1u, 2u, 3u, 7u, 64u, 1000u})
      for (const size_t grain : {0u, 1u, 3u, 64u, 2000u})
        CoversEachPieceOnce(pool, n_pieces, grain);
  }
}

TEST(a_run_without_pieces_calls_nothing) {
  Pool pool(2);
  pool.Run(0, 1, [](size_t, size_t, size_t) { CHECK(false); });
}

TEST(calls_of_one_thread_number_never_overlap) {
  Pool pool(4);
  std::vector<int> scratch(4, 0);  // one a thread: a second user would be a race
  for (int run = 0; run < 200; ++run)
    pool.Run(100, 1, [&](size_t thread, size_t first, size_t) {
      scratch[thread] += static_cast<int>(first);
    });
  int total = 0;
  for (const int part : scratch) total += part;
  CHECK_EQ(total, 200 * 4950);
}

TEST(work_is_shared_with_the_other_threads) {
  Pool pool(2);
  std::set<std::thread::id> seen;
  std::atomic<bool> was_elsewhere{false};
  const auto caller = std::this_thread::get_id();
  const auto deadline = std::chrono::steady_clock::now() + std::chrono::seconds(20);
  while (!was_elsewhere && std::chrono::steady_clock::now() < deadline)
    pool.Run(64, 1, [&](size_t thread, size_t, size_t) {
      if (std::this_thread::get_id() != caller) was_elsewhere = true;
      CHECK_EQ(thread == 0, std::this_thread::get_id() == caller);
      std::this_thread::sleep_for(std::chrono::microseconds(20));
    });
  CHECK(was_elsewhere);
}

TEST(an_idle_thread_takes_over_what_a_slow_one_has_left) {
  Pool pool(2);
  std::atomic<size_t> by_caller{0};
  // The other thread, if it comes in at all, holds on to its first piece until the rest is done.
  pool.Run(100, 1, [&](size_t thread, size_t, size_t) {
    if (thread == 0)
      ++by_caller;
    else
      while (by_caller < 50) std::this_thread::yield();
  });
  CHECK(by_caller > 50);
}

TEST(threads_beyond_those_in_use_take_no_part_and_come_back) {
  Pool pool(4);
  for (const size_t used : {1u, 3u, 2u, 4u, 1u, 4u}) {
    pool.Use(used);
    CHECK_EQ(pool.used(), used);
    for (int run = 0; run < 100; ++run) {
      std::vector<int> times(64, 0);
      pool.Run(64, 1, [&](size_t thread, size_t first, size_t last) {
        CHECK(thread < used);
        for (size_t i = first; i < last; ++i) ++times[i];
      });
      for (const int count : times) CHECK_EQ(count, 1);
    }
  }
  CHECK_THROWS(pool.Use(0), potluck::UsageError);
  CHECK_THROWS(pool.Use(5), potluck::UsageError);
}

TEST(a_thread_called_up_again_works) {
  Pool pool(2);
  for (int round = 0; round < 20; ++round) {
    pool.Use(1);
    CoversEachPieceOnce(pool, 100, 1);
    pool.Use(2);
    std::atomic<bool> was_elsewhere{false};
    const auto deadline = std::chrono::steady_clock::now() + std::chrono::seconds(20);
    while (!was_elsewhere && std::chrono::steady_clock::now() < deadline)
      pool.Run(64, 1, [&](size_t thread, size_t, size_t) {
        if (thread == 1) was_elsewhere = true;
        std::this_thread::sleep_for(std::chrono::microseconds(20));
      });
    CHECK(was_elsewhere);
  }
}

TEST(pinned_threads_keep_to_cpus_of_their_own) {
  const std::vector<int> cpus = potluck::CpusByPreference();
  const size_t threads = std::min<size_t>(cpus.size(), 4);
  Pool pool(threads, true);
  CHECK(pool.pinned());
  std::vector<std::set<int>> seen(threads);
  {
    const potluck::Pinned pinned(pool);
    for (int run = 0; run < 50; ++run)
      pool.Run(64, 1, [&](size_t thread, size_t, size_t) {
        seen[thread].insert(sched_getcpu());
        std::this_thread::sleep_for(std::chrono::microseconds(20));
      });
  }
  for (size_t thread = 0; thread < threads; ++thread)
    for (const int cpu : seen[thread]) CHECK_EQ(cpu, cpus[thread]);
  CHECK_EQ(seen[0].size(), size_t{1});
  CHECK_EQ(potluck::CpusByPreference().size(), cpus.size());  // the caller is free again
  CHECK_THROWS(Pool(cpus.size() + 1, true), potluck::UsageError);
}

TEST(an_exception_of_any_thread_reaches_the_caller_and_the_pool_goes_on) {
  Pool pool(4);
  for (size_t bad = 0; bad < 40; ++bad) {
    CHECK_THROWS(pool.Run(40, 1,
                          [&](size_t, size_t first, size_t) {
                            if (first == bad) throw potluck::ModelError("piece");
                          }),
                 potluck::ModelError);
    CoversEachPieceOnce(pool, 40, 3);
  }
}

TEST(after_an_exception_no_more_pieces_are_handed_out) {
  Pool pool(1);
  size_t calls = 0;
  CHECK_THROWS(pool.Run(1000, 1,
                        [&](size_t, size_t, size_t) {
                          ++calls;
                          throw std::runtime_error("first");
                        }),
               std::runtime_error);
  CHECK_EQ(calls, size_t{1});
}

TEST(what_a_failed_run_left_over_is_not_worked_on_by_the_next) {
  Pool pool(3);
  for (int round = 0; round < 50; ++round) {
    CHECK_THROWS(pool.Run(90, 1, [](size_t, size_t, size_t) { throw std::runtime_error("any"); }),
                 std::runtime_error);
    CoversEachPieceOnce(pool, 2, 2);  // one thread's work: nothing is shared out
  }
}

// A child of fork() has none of the pool's threads.
TEST(a_forked_child_works_alone_and_ends) {
  auto pool = std::make_unique<Pool>(3);
  CoversEachPieceOnce(*pool, 100, 1);
  std::this_thread::sleep_for(std::chrono::milliseconds(20));  // all sleep: none holds a mutex
  const pid_t child = fork();
  if (child == 0) {
    alarm(20);  // a hung child is a failed one
    for (int run = 0; run < 100; ++run) CoversEachPieceOnce(*pool, 100, 1);
    pool.reset();
    _exit(check::Failures() == 0 ? 0 : 1);
  }
  int status = -1;
  CHECK_EQ(waitpid(child, &status, 0), child);
  CHECK_EQ(status, 0);
}

TEST(runs_of_several_callers_follow_each_other) {
  Pool pool(3);
  int inside = 0;  // guarded by the pool's promise alone
  std::vector<std::thread> callers;
  for (int caller = 0; caller < 3; ++caller)
    callers.emplace_back([&] {
      for (int run = 0; run < 300; ++run) pool.Run(1, 1, [&](size_t, size_t, size_t) { ++inside; });
    });
  for (std::thread& caller : callers) caller.join();
  CHECK_EQ(inside, 900);
}

// Phases of random length with pauses on both sides of the time that threads spin, so that every
// interleaving of spinning, falling asleep and waking is met; under TSan this is the proof.
TEST(phases_of_random_length_with_random_sleep_lose_nothing) {
  std::mt19937 random(7);
  for (const size_t threads : {2u, 5u}) {
    Pool pool(threads);
    std::vector<uint32_t> values(64, 0);
    const int n_runs = 60000;
    uint64_t pieces = 0;
    for (int run = 0; run < n_runs; ++run) {
      const size_t n_pieces = 1 + random() % values.size();
      pieces += n_pieces;
      pool.Run(n_pieces, 1 + random() % 8, [&](size_t, size_t first, size_t last) {
        for (size_t i = first; i < last; ++i) ++values[i];
      });
      if (random() % 512 == 0)
        std::this_thread::sleep_for(std::chrono::microseconds(random() % 300));
    }
    uint64_t total = 0;
    for (const uint32_t value : values) total += value;
    CHECK_EQ(total, pieces);
  }
}

TEST(pools_come_and_go_at_any_moment) {
  for (int round = 0; round < 100; ++round) {
    Pool pool(3);
    if (round % 2 == 0) CoversEachPieceOnce(pool, 5, 1);
  }
}

TEST(an_idle_pool_burns_no_cpu) {
  Pool pool(4);
  CoversEachPieceOnce(pool, 100, 1);
  pool.Use(3);
  CoversEachPieceOnce(pool, 100, 1);
  std::this_thread::sleep_for(std::chrono::milliseconds(20));  // longer than any thread spins
  const double before = CpuSeconds();
  std::this_thread::sleep_for(std::chrono::milliseconds(500));
  CHECK(CpuSeconds() - before < 0.02);
}

TEST(pool_threads_keep_subnormals_and_round_to_nearest) {
  // The pool inherits the rules of the thread that makes it, unless it sets its own.
  std::fenv_t former;
  std::fegetenv(&former);
  std::fesetround(FE_UPWARD);
  Pool pool(2);
  std::atomic<bool> was_elsewhere{false};
  const auto deadline = std::chrono::steady_clock::now() + std::chrono::seconds(20);
  while (!was_elsewhere && std::chrono::steady_clock::now() < deadline)
    pool.Run(64, 1, [&](size_t thread, size_t, size_t) {
      std::this_thread::sleep_for(std::chrono::microseconds(20));
      if (thread == 0) return;
      was_elsewhere = true;
      CHECK_EQ(std::fegetround(), FE_TONEAREST);
      volatile float least = std::numeric_limits<float>::min();
      volatile float half = 0.5f;
      CHECK(least * half > 0.0f);
    });
  CHECK(was_elsewhere);
  {
    const potluck::FloatRules rules;
    CHECK_EQ(std::fegetround(), FE_TONEAREST);
  }
  CHECK_EQ(std::fegetround(), FE_UPWARD);
  std::fesetenv(&former);
}

TEST(a_number_of_threads_out_of_range_is_refused) {
  CHECK_THROWS(Pool(0), potluck::UsageError);
  CHECK_THROWS(Pool(Pool::kMaxThreads + 1), potluck::UsageError);
}

CHECK_MAIN
