// Memory that grows to the largest use so far and is never shrunk, aligned for vectors and cache
// lines.
#pragma once

#include <cstddef>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <new>

namespace potluck {

// n values of a plain type, not initialized; one owner.
template <class T>
class Buffer {
 public:
  static constexpr size_t kAlignment = 64;

  // Room for n values; what was there is lost if the buffer had to grow.
  void Reserve(size_t n) {
    if (n <= size_) return;
    const size_t bytes = (n * sizeof(T) + kAlignment - 1) / kAlignment * kAlignment;
    values_.reset();
    size_ = 0;
    values_.reset(static_cast<T*>(std::aligned_alloc(kAlignment, bytes)));
    if (values_ == nullptr) throw std::bad_alloc();
    size_ = n;
    Poison();
  }

  // In debug builds every byte becomes 0xff, a NaN in f32: what is read before it is written shows.
  void Poison() {
#if !defined(NDEBUG)
    if (size_ > 0) std::memset(static_cast<void*>(values_.get()), 0xff, bytes());
#endif
  }

  T* data() const { return values_.get(); }
  size_t bytes() const { return size_ * sizeof(T); }

 private:
  struct Free {
    void operator()(T* values) const { std::free(values); }
  };
  std::unique_ptr<T, Free> values_;
  size_t size_ = 0;
};

}  // namespace potluck
