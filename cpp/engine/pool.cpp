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

namespace potluck {
namespace {

using Clock = std::chrono::steady_clock;

// How long a thread looks for the next phase before it sleeps. Waking a sleeper costs some 50 us,
// more than most phases of a small model; a forward has no longer gap than this between phases.
constexpr std::chrono::microseconds kSpin{80};
// With more threads than CPUs, one that spins keeps another from working.
constexpr std::chrono::microseconds kSpinIfCrowded{5};
// So long a CPU is kept from others; then each look gives way to whoever else wants to run. Two
// processes of two threads on two CPUs do twice as much, three a third more; one alone loses
// nothing.
constexpr std::chrono::microseconds kUnyielding{5};
constexpr int kLooksPerClock = 32;  // reading the clock costs about as much as this many looks

inline void Relax() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  asm volatile("yield");
#endif
}

// Looks at `ready` until it holds or the time is over; what it last said.
template <class Ready>
bool SpinUntil(const Ready& ready, std::chrono::microseconds patience) {
  const auto start = Clock::now();
  for (;;) {
    for (int i = 0; i < kLooksPerClock; ++i) {
      if (ready()) return true;
      Relax();
    }
    const auto waited = Clock::now() - start;
    if (waited >= patience) return ready();
    if (waited >= kUnyielding) std::this_thread::yield();
  }
}

// Pieces [begin, end) that a thread has left, in one word: the owner takes from the front, others
// from the back. A piece leaves a share once and for all, so a word seen twice is the same share.
constexpr uint64_t Pieces(uint64_t begin, uint64_t end) { return begin << 32 | end; }
constexpr uint64_t BeginOf(uint64_t pieces) { return pieces >> 32; }
constexpr uint64_t EndOf(uint64_t pieces) { return pieces & 0xffffffff; }
constexpr uint64_t CountOf(uint64_t pieces) { return EndOf(pieces) - BeginOf(pieces); }

// Two lines, because the prefetcher of x86 fetches lines in pairs.
struct alignas(128) Share {
  std::atomic<uint64_t> pieces{0};
};

// The gate: bit 0 open, bits 1..15 threads that came in, bits 16..63 the number of the run.
constexpr uint64_t kOpen = 1;
constexpr uint64_t kOneIn = 2;
constexpr uint64_t kOneRun = 1 << 16;
constexpr uint64_t RunOf(uint64_t gate) { return gate / kOneRun; }
constexpr uint64_t InOf(uint64_t gate) { return gate % kOneRun / kOneIn; }

}  // namespace

// Who may touch what: job, grain and shares are written by the caller while the gate is shut and
// nobody is in, and read by threads that came in. Orderings stand on the atomics themselves.
struct Pool::State {
  explicit State(size_t threads) : shares(threads) {
    patience = threads > AllowedCpus() ? kSpinIfCrowded : kSpin;
  }

  std::vector<Share> shares;  // [threads]
  std::chrono::microseconds patience;
  Job job{};
  uint64_t grain = 1;

  alignas(128) std::atomic<uint64_t> gate{0};
  alignas(128) std::atomic<uint64_t> out{0};  // threads that came in and have finished
  alignas(128) std::atomic<bool> failed{false};
  std::exception_ptr failure;  // written by the thread that sets `failed`, read when all are out

  std::mutex callers;  // one run at a time
  std::mutex sleep;    // guards the two waits below, not the atomics they look at
  std::condition_variable run_began;
  std::condition_variable all_out;
  std::atomic<size_t> sleepers{0};  // threads that wait for run_began, or are about to
  std::atomic<bool> caller_sleeps{false};
  std::atomic<bool> stopping{false};
  std::vector<std::thread> helpers;  // threads 1 .. n - 1
  const pid_t process = getpid();    // the helpers'

  bool Refill(size_t thread);
  void Work(size_t thread);
  bool ComeIn(uint64_t* seen);
  void Serve(size_t thread);
  void Announce();
  void AwaitOut(uint64_t in);
  void Stop();
};

// Takes half of the fullest share, from its back. False: nothing is left.
bool Pool::State::Refill(size_t thread) {
  for (;;) {
    Share* fullest = nullptr;
    uint64_t pieces = 0;
    for (Share& share : shares) {
      const uint64_t found = share.pieces.load(std::memory_order_relaxed);
      if (CountOf(found) <= CountOf(pieces)) continue;
      fullest = &share;
      pieces = found;
    }
    if (fullest == nullptr) return false;
    const uint64_t middle = EndOf(pieces) - (CountOf(pieces) + 1) / 2;
    if (!fullest->pieces.compare_exchange_weak(pieces, Pieces(BeginOf(pieces), middle),
                                               std::memory_order_relaxed))
      continue;
    shares[thread].pieces.store(Pieces(middle, EndOf(pieces)), std::memory_order_relaxed);
    return true;
  }
}

// Works until no share holds a piece, or some work failed.
void Pool::State::Work(size_t thread) {
  std::atomic<uint64_t>& own = shares[thread].pieces;
  try {
    do {
      uint64_t pieces = own.load(std::memory_order_relaxed);
      while (CountOf(pieces) > 0) {
        const uint64_t first = BeginOf(pieces);
        const uint64_t last = std::min(first + grain, EndOf(pieces));
        if (!own.compare_exchange_weak(pieces, Pieces(last, EndOf(pieces)),
                                       std::memory_order_relaxed))
          continue;
        if (failed.load(std::memory_order_relaxed)) return;
        job.call(job.context, thread, first, last);
        pieces = own.load(std::memory_order_relaxed);
      }
    } while (Refill(thread));
  } catch (...) {
    if (!failed.exchange(true, std::memory_order_relaxed)) failure = std::current_exception();
  }
}

// Waits for a run that this thread has not seen and enters it. False: it is over already, or the
// pool stops.
bool Pool::State::ComeIn(uint64_t* seen) {
  const auto is_new = [&] { return RunOf(gate.load(std::memory_order_seq_cst)) != *seen; };
  if (!SpinUntil(is_new, patience)) {
    std::unique_lock<std::mutex> lock(sleep);
    // Either the caller sees this sleeper, or this thread sees the caller's run: both are seq_cst.
    sleepers.fetch_add(1, std::memory_order_seq_cst);
    run_began.wait(lock, is_new);
    sleepers.fetch_sub(1, std::memory_order_relaxed);
  }
  uint64_t found = gate.load(std::memory_order_acquire);
  while ((found & kOpen) != 0) {
    if (gate.compare_exchange_weak(found, found + kOneIn, std::memory_order_acq_rel)) break;
  }
  *seen = RunOf(found);
  return (found & kOpen) != 0;
}

// The life of threads 1 .. n - 1.
void Pool::State::Serve(size_t thread) {
  const FloatRules rules;
  uint64_t seen = 0;
  while (!stopping.load(std::memory_order_acquire)) {
    if (!ComeIn(&seen)) continue;
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
  stopping.store(true, std::memory_order_release);
  gate.fetch_add(kOneRun, std::memory_order_seq_cst);
  Announce();
  for (std::thread& helper : helpers) helper.join();
}

Pool::Pool(size_t threads) {
  if (threads == 0 || threads > kMaxThreads)
    throw UsageError("threads: 1 to " + std::to_string(kMaxThreads) + ", not " +
                     std::to_string(threads));
  state_ = std::make_unique<State>(threads);
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

size_t Pool::threads() const { return state_->shares.size(); }

void Pool::RunJob(const Job& job, size_t n_pieces, size_t grain) {
  State& state = *state_;
  if (n_pieces == 0) return;
  if (n_pieces > UINT32_MAX)
    throw UsageError("a run of " + std::to_string(n_pieces) + " pieces; at most 2^32 - 1");
  const std::lock_guard<std::mutex> one_caller(state.callers);
  const size_t threads = state.shares.size();
  state.job = job;
  state.grain = std::clamp<uint64_t>(grain, 1, n_pieces);
  state.failed.store(false, std::memory_order_relaxed);
  state.out.store(0, std::memory_order_relaxed);
  const bool is_shared = threads > 1 && n_pieces > state.grain;
  const size_t parts = is_shared ? threads : 1;
  for (size_t part = 0; part < parts; ++part)
    state.shares[part].pieces.store(Pieces(n_pieces * part / parts, n_pieces * (part + 1) / parts),
                                    std::memory_order_relaxed);
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
  if (!state.failed.load(std::memory_order_relaxed)) return;
  // What was not handed out must not be found by the next run.
  for (Share& share : state.shares) share.pieces.store(0, std::memory_order_relaxed);
  std::rethrow_exception(std::exchange(state.failure, nullptr));
}

FloatRules::FloatRules() {
  std::fegetenv(&former_);
  std::fesetenv(FE_DFL_ENV);
}

FloatRules::~FloatRules() { std::fesetenv(&former_); }

}  // namespace potluck
