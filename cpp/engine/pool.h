// The thread pool: one set of threads that lives as long as the engine. The only std::thread.
//
// A Run is a phase: its pieces are shared out, every thread works, and all have finished when it
// returns. Shares follow what each thread did of the runs before, so a slow core starts with less;
// whoever is done takes half of what another has left. Between phases threads spin for a bounded
// time and then sleep, so an idle engine burns no CPU. Which thread takes which piece changes from
// run to run; results must not depend on it.
#pragma once

#include <cstddef>
#include <memory>
#include <type_traits>
#include <vector>

namespace potluck {

class Pool {
 public:
  // threads counts the caller's. pinned: each keeps to a CPU of its own (Linux; elsewhere it
  // changes nothing), the caller's while it holds a Pinned. UsageError: 0, more than kMaxThreads,
  // or than the system gives; pinned and more than there are CPUs.
  explicit Pool(size_t threads, bool pinned = false);
  ~Pool();
  Pool(const Pool&) = delete;
  Pool& operator=(const Pool&) = delete;

  static constexpr size_t kMaxThreads = 1024;
  size_t threads() const;
  bool pinned() const;

  // From the next run on only threads 0 .. n - 1 work, and the others sleep. Cheap if nothing
  // changes. UsageError: 0, or more than threads().
  void Use(size_t n);
  size_t used() const;

  // How many threads the engine uses for steps of a few rows (decode) and of many (prefill): all,
  // unless it is told. UsageError: 0, or more than threads().
  void Allot(size_t for_decode, size_t for_prefill);
  size_t decode_threads() const;
  size_t prefill_threads() const;

  // Calls work(thread, first, last) for disjoint ranges that together are [0, n_pieces), which is
  // below 2^32. thread < used(), the caller's is 0, and calls with one thread number follow each
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
  friend class Pinned;

  std::unique_ptr<State> state_;
};

// Keeps the calling thread to the first CPU of a pinned pool as long as it is held; of another pool
// it does nothing.
class Pinned {
 public:
  explicit Pinned(const Pool& pool);
  ~Pinned();
  Pinned(const Pinned&) = delete;
  Pinned& operator=(const Pinned&) = delete;

 private:
  std::vector<int> former_;  // CPUs to go back to; empty: nothing was changed
};

}  // namespace potluck
