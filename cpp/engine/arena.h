// One mapping that holds all weights of a shard and costs exactly what is put into it.
//
// Addresses for the largest possible shard are reserved at first, without memory behind them; each
// Take makes the next bytes usable, and Seal gives the unused addresses back and makes the rest
// read-only. So types may differ from matrix to matrix and be known only when a matrix arrives.
// Memory comes in huge pages where the system has them for those who ask; who has forbidden them
// (/sys/kernel/mm/transparent_hugepage, prctl) gets small ones.
#pragma once

#include <cstddef>
#include <cstdint>

namespace potluck {

class Arena {
 public:
  static constexpr size_t kAlignment = 64;

  // UsageError: the system can't reserve so many addresses.
  explicit Arena(size_t most_bytes);
  ~Arena();
  Arena(const Arena&) = delete;
  Arena& operator=(const Arena&) = delete;

  // The next n_bytes, zeroed, aligned to kAlignment. The sum of all must stay within most_bytes,
  // each rounded up to kAlignment. std::bad_alloc: the system has no memory.
  uint8_t* Take(size_t n_bytes);
  void Seal();

  size_t used_bytes() const { return used_bytes_; }

 private:
  uint8_t* mapped_ = nullptr;
  uint8_t* start_ = nullptr;  // the first place in it that may be a huge page
  size_t mapped_bytes_ = 0;
  size_t usable_bytes_ = 0;  // readable and writable, whole huge pages
  size_t used_bytes_ = 0;
};

}  // namespace potluck
