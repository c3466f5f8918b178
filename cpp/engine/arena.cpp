#include "engine/arena.h"

#include <sys/mman.h>
#include <unistd.h>

#include <new>
#include <string>

#include "engine/errors.h"

namespace potluck {
namespace {

size_t RoundUp(size_t bytes, size_t unit) { return (bytes + unit - 1) / unit * unit; }

size_t PageBytes() { return static_cast<size_t>(sysconf(_SC_PAGESIZE)); }

}  // namespace

Arena::Arena(size_t most_bytes) : mapped_bytes_(RoundUp(most_bytes + 1, PageBytes())) {
  // PROT_NONE: no overcommit limit counts what can't be touched.
  void* mapped =
      mmap(nullptr, mapped_bytes_, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (mapped == MAP_FAILED) {
    throw UsageError("the system can't reserve " + std::to_string(mapped_bytes_) +
                     " bytes for weights");
  }
  start_ = static_cast<uint8_t*>(mapped);
}

Arena::~Arena() { munmap(start_, mapped_bytes_); }

uint8_t* Arena::Take(size_t n_bytes) {
  uint8_t* const place = start_ + used_bytes_;
  const size_t used = used_bytes_ + RoundUp(n_bytes, kAlignment);
  const size_t usable = RoundUp(used, PageBytes());
  if (usable > mapped_bytes_) throw std::bad_alloc();
  if (usable > usable_bytes_ &&
      mprotect(start_ + usable_bytes_, usable - usable_bytes_, PROT_READ | PROT_WRITE) != 0) {
    throw std::bad_alloc();
  }
  if (usable > usable_bytes_) usable_bytes_ = usable;
  used_bytes_ = used;
  return place;
}

void Arena::Seal() {
  const size_t kept = RoundUp(used_bytes_ + 1, PageBytes());
  if (kept < mapped_bytes_) {
    munmap(start_ + kept, mapped_bytes_ - kept);
    mapped_bytes_ = kept;
  }
  if (usable_bytes_ > 0) mprotect(start_, usable_bytes_, PROT_READ);
}

}  // namespace potluck
