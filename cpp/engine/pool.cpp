#include "engine/pool.h"

#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <condition_variable>
#include <cstdint>
#include <exception>
#include <mutex>
#include <string>
#include <system_error>
#include <thread>
#include <utility>
#include <vector>

#include "engine/cpu.h"
#include "engine/errors.h"
#include "engine/float_rules.h"
#include "engine/shares.h"
#include "engine/spin.h"

namespace potluck {
namespace {

// How long a thread looks for the next phase before it sleeps. Waking a sleeper costs some 50 us,
// more than most phases of a small model; a forward has no longer gap than this between phases.
constexpr std::chrono::microseconds kSpin{80};
// With more threads than CPUs, one that spins keeps another from working.
constexpr std::chrono::microseconds kSpinIfCrowded{5};

// The gate: bit 0 open, bits 1..15 threads that came in, bits 16..63 the number of the run.
constexpr uint64_t kOpen = 1;
constexpr uint64_t kOneIn = 2;
constexpr uint64_t kOneRun = 1 << 16;
constexpr uint64_t RunOf(uint64_t gate) { return gate / kOneRun; }
constexpr uint64_t InOf(uint64_t gate) { return gate % kOneRun / kOneIn; }

void CheckUse(size_t n, size_t threads) {
  if (n >= 1 && n <= threads) return;
  throw UsageError("threads to use: 1 to " + std::to_string(threads) + ", not " +
                   std::to_string(n));
}

}  // namespace

// Who may touch what: job and shares are written by the caller while the gate is shut and
// nobody is in, and read by threads that came in. Orderings stand on the atomics themselves.
struct Pool::State {
  explicit State(size_t threads)
      : shares(threads), used(threads), for_decode(threads), for_prefill(threads) {
    patience = threads > AllowedCpus() ? kSpinIfCrowded : kSpin;
  }

  Shares shares;
  std::vector<int> cpus;  // where each thread is pinned; empty: nowhere
  std::chrono::microseconds patience;
  Job job{};

  alignas(128) std::atomic<uint64_t> gate{0};
  alignas(128) std::atomic<uint64_t> out{0};  // threads that came in and have finished
  alignas(128) std::atomic<bool> failed{false};
  std::exception_ptr failure;  // written by the thread that sets `failed`, read when all are out

  std::mutex callers;  // one run at a time
  std::mutex sleep;    // guards the three waits below, not the atomics they look at
  std::condition_variable run_began;
  std::condition_variable all_out;
  std::atomic<size_t> sleepers{0};  // threads that wait for run_began, or are about to
  std::condition_variable called_up;
  std::atomic<size_t> used;  // threads 0 .. used - 1 work
  std::atomic<size_t> for_decode;
  std::atomic<size_t> for_prefill;
  std::atomic<bool> caller_sleeps{false};
  std::atomic<bool> stopping{false};
  std::vector<std::thread> helpers;  // threads 1 .. n - 1
  const pid_t process = getpid();    // the helpers'

  void Work(size_t thread);
  bool ComeIn(size_t thread, uint64_t* seen);
  void SitOut(size_t thread);
  void Serve(size_t thread);
  void Announce();
  void AwaitOut(uint64_t in);
  void Stop();
};

// Works until no share holds a piece, or some work failed.
void Pool::State::Work(size_t thread) {
  size_t first = 0, last = 0;
  try {
    while (shares.Take(thread, &first, &last)) {
      if (failed.load(std::memory_order_relaxed)) return;
      job.call(job.context, thread, first, last);
    }
  } catch (...) {
    if (!failed.exchange(true, std::memory_order_relaxed)) failure = std::current_exception();
  }
}

// Waits for a run that this thread has not seen and enters it. False: it is over already, this
// thread has no part in it, or the pool stops.
bool Pool::State::ComeIn(size_t thread, uint64_t* seen) {
  const auto is_new = [&] { return RunOf(gate.load(std::memory_order_seq_cst)) != *seen; };
  if (!SpinUntil(is_new, patience)) {
    std::unique_lock<std::mutex> lock(sleep);
    // Either the caller sees this sleeper, or this thread sees the caller's run: both are seq_cst.
    sleepers.fetch_add(1, std::memory_order_seq_cst);
    run_began.wait(lock, is_new);
    sleepers.fetch_sub(1, std::memory_order_relaxed);
  }
  if (thread >= used.load(std::memory_order_relaxed)) return false;
  uint64_t found = gate.load(std::memory_order_acquire);
  while ((found & kOpen) != 0) {
    // `used` changes between runs only, so what is read here is that of the run which is entered.
    if (thread >= used.load(std::memory_order_relaxed)) return false;
    if (gate.compare_exchange_weak(found, found + kOneIn, std::memory_order_acq_rel)) break;
  }
  *seen = RunOf(found);
  return (found & kOpen) != 0;
}

// Sleeps until this thread is one of those that work.
void Pool::State::SitOut(size_t thread) {
  std::unique_lock<std::mutex> lock(sleep);
  called_up.wait(lock, [&] { return thread < used || stopping; });
}

// The life of threads 1 .. n - 1.
void Pool::State::Serve(size_t thread) {
  const FloatRules rules;
  if (!cpus.empty()) KeepToCpus({cpus[thread]});
  uint64_t seen = 0;
  while (!stopping.load(std::memory_order_acquire)) {
    if (thread >= used.load(std::memory_order_relaxed)) SitOut(thread);
    if (!ComeIn(thread, &seen)) continue;
    Work(thread);
    out.fetch_add(1, std::memory_order_seq_cst);
    if (!caller_sleeps.load(std::memory_order_seq_cst)) continue;
    {
      const std::lock_guard<std::mutex> looked(sleep);
    }  // it looked before, or it waits by now
    all_out.notify_one();
  }
}

// Wakes those who sleep through the run that `gate` has just told of.
void Pool::State::Announce() {
  if (sleepers.load(std::memory_order_seq_cst) == 0) return;
  {
    const std::lock_guard<std::mutex> looked(sleep);
  }  // they looked before, or they wait by now
  run_began.notify_all();
}

void Pool::State::AwaitOut(uint64_t in) {
  const auto are_out = [&] { return out.load(std::memory_order_seq_cst) == in; };
  if (SpinUntil(are_out, patience)) return;
  std::unique_lock<std::mutex> lock(sleep);
  // Either the last thread out sees this, or this sees it out. A store would do; but qemu on x86
  // doesn't keep stlr before a later ldar, only what reads and writes at once.
  caller_sleeps.exchange(true, std::memory_order_seq_cst);
  all_out.wait(lock, are_out);
  caller_sleeps.store(false, std::memory_order_relaxed);
}

// Ends the helpers that were started.
void Pool::State::Stop() {
  {
    const std::lock_guard<std::mutex> lock(sleep);
    stopping.store(true, std::memory_order_release);
  }
  called_up.notify_all();
  gate.fetch_add(kOneRun, std::memory_order_seq_cst);
  Announce();
  for (std::thread& helper : helpers) helper.join();
}

Pool::Pool(size_t threads, bool pinned) {
  if (threads == 0 || threads > kMaxThreads)
    throw UsageError("threads: 1 to " + std::to_string(kMaxThreads) + ", not " +
                     std::to_string(threads));
  state_ = std::make_unique<State>(threads);
  if (pinned) {
    state_->cpus = CpusByPreference();
    if (!state_->cpus.empty() && state_->cpus.size() < threads)
      throw UsageError("threads: " + std::to_string(threads) + " can't be pinned to " +
                           std::to_string(state_->cpus.size()) + " CPUs",
                       "use fewer threads, or don't pin them");
  }
  state_->helpers.reserve(threads - 1);
  try {
    for (size_t thread = 1; thread < threads; ++thread)
      state_->helpers.emplace_back([state = state_.get(), thread] { state->Serve(thread); });
  } catch (const std::system_error& error) {
    const size_t started = state_->helpers.size() + 1;
    state_->Stop();
    throw UsageError("threads: the system gives " + std::to_string(started) + " of " +
                         std::to_string(threads) + " (" + error.what() + ")",
                     "use fewer threads");
  }
}

Pool::~Pool() {
  // A child of fork() has the state but none of the threads: they can neither be joined nor leave
  // what they wait for, so its copy stays as it is.
  if (state_->process == getpid()) {
    state_->Stop();
  } else {
    static_cast<void>(state_.release());  // NOLINT(bugprone-unused-return-value)
  }
}

size_t Pool::threads() const { return state_->shares.threads(); }
bool Pool::pinned() const { return !state_->cpus.empty(); }
size_t Pool::used() const { return state_->used.load(std::memory_order_relaxed); }

size_t Pool::decode_threads() const { return state_->for_decode.load(std::memory_order_relaxed); }
size_t Pool::prefill_threads() const { return state_->for_prefill.load(std::memory_order_relaxed); }

void Pool::Allot(size_t for_decode, size_t for_prefill) {
  CheckUse(for_decode, threads());
  CheckUse(for_prefill, threads());
  state_->for_decode.store(for_decode, std::memory_order_relaxed);
  state_->for_prefill.store(for_prefill, std::memory_order_relaxed);
}

void Pool::Use(size_t n) {
  CheckUse(n, threads());
  const std::lock_guard<std::mutex> one_caller(state_->callers);
  if (n == used()) return;
  {
    const std::lock_guard<std::mutex> lock(state_->sleep);
    state_->used.store(n, std::memory_order_relaxed);
  }
  state_->called_up.notify_all();
}

void Pool::RunJob(const Job& job, size_t n_pieces, size_t grain) {
  State& state = *state_;
  if (n_pieces == 0) return;
  if (n_pieces > UINT32_MAX)
    throw UsageError("a run of " + std::to_string(n_pieces) + " pieces; at most 2^32 - 1");
  const std::lock_guard<std::mutex> one_caller(state.callers);
  const size_t threads = state.used.load(std::memory_order_relaxed);
  state.job = job;
  grain = std::clamp<size_t>(grain, 1, n_pieces);
  state.failed.store(false, std::memory_order_relaxed);
  state.out.store(0, std::memory_order_relaxed);
  const bool is_shared = threads > 1 && n_pieces > grain;
  state.shares.Deal(n_pieces, grain, is_shared ? threads : 1);
  uint64_t gate = state.gate.load(std::memory_order_relaxed);
  if (is_shared) {
    state.gate.store((RunOf(gate) + 1) * kOneRun + kOpen, std::memory_order_seq_cst);
    state.Announce();
  }
  state.Work(0);
  if (is_shared) {
    // A thread that has not come in by now finds the gate shut: nobody waits for a sleeper.
    gate = state.gate.fetch_and(~kOpen, std::memory_order_acq_rel);
    state.AwaitOut(InOf(gate));
  }
  if (!state.failed.load(std::memory_order_relaxed)) {
    if (is_shared && InOf(gate) + 1 == threads) state.shares.Learn(threads);
    return;
  }
  // What was not handed out must not be found by the next run.
  state.shares.Clear();
  std::rethrow_exception(std::exchange(state.failure, nullptr));
}

Pinned::Pinned(const Pool& pool) {
  if (pool.pinned()) former_ = KeepToCpus({pool.state_->cpus[0]});
}

Pinned::~Pinned() {
  if (!former_.empty()) KeepToCpus(former_);
}

}  // namespace potluck
