// The thread pool: one set of threads that lives as long as the engine. The only std::thread.
//
// A Run is a phase: its pieces are shared out, every thread works, and all have finished when it
// returns. Between phases threads spin for a bounded time and then sleep, so an idle engine burns
// no CPU. Which thread takes which piece changes from run to run; results must not depend on it.
#pragma once

#include <cfenv>
#include <cstddef>
#include <memory>
#include <type_traits>

namespace potluck {

class Pool {
 public:
  // threads counts the caller's. UsageError: 0, more than kMaxThreads, or than the system gives.
  explicit Pool(size_t threads);
  ~Pool();
  Pool(const Pool&) = delete;
  Pool& operator=(const Pool&) = delete;

  static constexpr size_t kMaxThreads = 1024;
  size_t threads() const;

  // Calls work(thread, first, last) for disjoint ranges that together are [0, n_pieces), which is
  // below 2^32. thread < threads(), the caller's is 0, and calls with one thread number follow each
  // other, so it names a scratch buffer. Threads take `grain` pieces at a time (0 counts as 1);
  // ranges may be shorter and start anywhere. What work wrote is visible when Run returns. An
  // exception of work stops the handing out and is thrown here, the first if there are several.
  // Allocates nothing. Any thread may call: runs of several callers follow each other. work must
  // not call Run of the same pool. In a child of fork() the caller works alone.
  template <class F>
  void Run(size_t n_pieces, size_t grain, F&& work) {
    using Work = std::remove_reference_t<F>;
    const Job job = {[](void* context, size_t thread, size_t first, size_t last) {
                       (*static_cast<Work*>(context))(thread, first, last);
                     },
                     const_cast<void*>(static_cast<const void*>(&work))};
    RunJob(job, n_pieces, grain);
  }

 private:
  struct Job {
    void (*call)(void* context, size_t thread, size_t first, size_t last);
    void* context;
  };
  struct State;
  void RunJob(const Job& job, size_t n_pieces, size_t grain);

  std::unique_ptr<State> state_;
};

// Gives this thread the float rules that canonical arithmetic assumes (round to nearest, subnormals
// kept) and its former ones back at the end. The pool's threads have them; a thread that calls into
// the engine holds one for the length of the call.
class FloatRules {
 public:
  FloatRules();
  ~FloatRules();
  FloatRules(const FloatRules&) = delete;
  FloatRules& operator=(const FloatRules&) = delete;

 private:
  std::fenv_t former_;
};

}  // namespace potluck
