// Waiting for another thread without going to sleep.
#pragma once

#include <chrono>
#include <thread>

namespace potluck {

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
  using Clock = std::chrono::steady_clock;
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

}  // namespace potluck
