// How the pieces of a run are shared out among threads, and pass from one to another.
//
// Shares follow what each thread did of the runs before, so a slow core starts with less; whoever
// has none left takes half of the fullest. A piece leaves a share once and for all.
#pragma once

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <vector>

namespace potluck {

class Shares {
 public:
  explicit Shares(size_t threads);

  size_t threads() const { return shares_.size(); }

  // Begins a run: shares out [0, n_pieces), below 2^32, to threads 0 .. parts - 1 in proportion to
  // their speeds; `grain` pieces, at least 1, are taken at a time. Nobody may be taking any.
  void Deal(size_t n_pieces, size_t grain, size_t parts);
  // Takes a range for this thread; less than the grain towards the end, so that no thread is left
  // with a long range when others are done. False: nothing is left.
  bool Take(size_t thread, size_t* first, size_t* last);
  // After a run in which threads 0 .. parts - 1 took part until nothing was left: they finished
  // together, so each did as much as it is fast.
  void Learn(size_t parts);
  // Drops what was not taken.
  void Clear();

  // Of a thread, about 1 on average over all.
  double speed(size_t thread) const { return speeds_[thread]; }

 private:
  // Two lines, because the prefetcher of x86 fetches lines in pairs.
  struct alignas(128) Share {
    std::atomic<uint64_t> pieces{0};  // first of those left * 2^32 + the end
    uint64_t done = 0;                // pieces of this run that its thread took; its own to write
  };

  bool Refill(size_t thread);

  std::vector<Share> shares_;
  std::vector<double> speeds_;  // between runs
  size_t n_pieces_ = 0;
  size_t grain_ = 1;
};

}  // namespace potluck
