#include "engine/arena.h"

#include <sys/mman.h>

#include <new>
#include <string>

#include "engine/errors.h"

namespace potluck {
namespace {

size_t RoundUp(size_t bytes, size_t unit) { return (bytes + unit - 1) / unit * unit; }

// Of x86 and of ARM with pages of 4 KiB. Only what covers one whole can become one.
constexpr size_t kHugePageBytes = size_t{2} << 20;

}  // namespace

Arena::Arena(size_t most_bytes)
    : mapped_bytes_(RoundUp(most_bytes, kHugePageBytes) + kHugePageBytes) {
  // PROT_NONE: no overcommit limit counts what can't be touched.
  void* mapped =
      mmap(nullptr, mapped_bytes_, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (mapped == MAP_FAILED) {
    throw UsageError("the system can't reserve " + std::to_string(mapped_bytes_) +
                     " bytes for weights");
  }
  mapped_ = static_cast<uint8_t*>(mapped);
  start_ = mapped_ + RoundUp(reinterpret_cast<uintptr_t>(mapped_), kHugePageBytes) -
           reinterpret_cast<uintptr_t>(mapped_);
#if defined(MADV_HUGEPAGE)
  madvise(mapped_, mapped_bytes_, MADV_HUGEPAGE);
#endif
}

Arena::~Arena() { munmap(mapped_, mapped_bytes_); }

uint8_t* Arena::Take(size_t n_bytes) {
  uint8_t* const place = start_ + used_bytes_;
  const size_t used = used_bytes_ + RoundUp(n_bytes, kAlignment);
  const size_t usable = RoundUp(used, kHugePageBytes);
  if (start_ + usable > mapped_ + mapped_bytes_) throw std::bad_alloc();
  if (usable > usable_bytes_ &&
      mprotect(start_ + usable_bytes_, usable - usable_bytes_, PROT_READ | PROT_WRITE) != 0) {
    throw std::bad_alloc();
  }
  if (usable > usable_bytes_) usable_bytes_ = usable;
  used_bytes_ = used;
  return place;
}

void Arena::Seal() {
  // The last huge page stays whole: giving back a part of it would make it small ones.
  const size_t kept = static_cast<size_t>(start_ - mapped_) + RoundUp(used_bytes_, kHugePageBytes);
  if (kept > 0 && kept < mapped_bytes_) {
    munmap(mapped_ + kept, mapped_bytes_ - kept);
    mapped_bytes_ = kept;
  }
  if (used_bytes_ > 0) mprotect(start_, usable_bytes_, PROT_READ);
}

}  // namespace potluck
