// Prefetching of two panels that are read at once.
//
// Every function here has internal linkage: see matmul_table.h.
#pragma once

#include "engine/kernels/avx512vnni_matmul.h"

namespace potluck {
namespace avx512vnni {
namespace {

constexpr size_t kPrefetchBytes = 4096;  // in each of the two panels

// Fetches both panels kPrefetchBytes ahead of the place that is read, and at their end the next
// two: the bytes behind the first panel are the second one's.
class Prefetch {
 public:
  // block_bytes: as many as NextBlock fetches of each panel.
  Prefetch(const uint8_t* panel, size_t panel_bytes, size_t block_bytes)
      : panel_bytes_(panel_bytes),
        block_bytes_(block_bytes),
        left_bytes_(panel_bytes - kPrefetchBytes % panel_bytes),
        at_(panel + kPrefetchBytes + kPrefetchBytes / panel_bytes * panel_bytes) {}

  void NextBlock() {
    for (size_t line = 0; line < block_bytes_; line += 64) {
      _mm_prefetch(reinterpret_cast<const char*>(at_ + line), _MM_HINT_T0);
      _mm_prefetch(reinterpret_cast<const char*>(at_ + panel_bytes_ + line), _MM_HINT_T0);
    }
    at_ += block_bytes_;
    if (left_bytes_ > block_bytes_) {
      left_bytes_ -= block_bytes_;
      return;
    }
    left_bytes_ += panel_bytes_ - block_bytes_;
    at_ += panel_bytes_;
  }

 private:
  size_t panel_bytes_;
  size_t block_bytes_;
  size_t left_bytes_;  // of the panel, from at_ on
  const uint8_t* at_;
};

}  // namespace
}  // namespace avx512vnni
}  // namespace potluck
