#include "engine/shares.h"

#include <algorithm>
#include <cmath>

namespace potluck {
namespace {

// Pieces [begin, end) that a thread has left, in one word: the owner takes from the front, others
// from the back. A word seen twice is the same share.
constexpr uint64_t Pieces(uint64_t begin, uint64_t end) { return begin << 32 | end; }
constexpr uint64_t BeginOf(uint64_t pieces) { return pieces >> 32; }
constexpr uint64_t EndOf(uint64_t pieces) { return pieces & 0xffffffff; }
constexpr uint64_t CountOf(uint64_t pieces) { return EndOf(pieces) - BeginOf(pieces); }

// A run tells of speeds if it has so many pieces a thread, and then a little, as a thread may have
// been disturbed. None is taken for slower than that, so that it is noticed when it is not.
constexpr size_t kTellingPieces = 8;
constexpr double kLearning = 1.0 / 16;
constexpr double kSlowest = 1.0 / 16;

}  // namespace

Shares::Shares(size_t threads) : shares_(threads), speeds_(threads, 1.0) {}

void Shares::Deal(size_t n_pieces, size_t grain, size_t parts) {
  n_pieces_ = n_pieces;
  grain_ = grain;
  double total = 0;
  for (size_t part = 0; part < parts; ++part) total += speeds_[part];
  double before = 0;
  size_t begin = 0;
  for (size_t part = 0; part < parts; ++part) {
    before += speeds_[part];
    const double share = std::min(1.0, before / total) * static_cast<double>(n_pieces);
    const size_t end = part + 1 == parts ? n_pieces : static_cast<size_t>(std::lround(share));
    shares_[part].pieces.store(Pieces(begin, end), std::memory_order_relaxed);
    shares_[part].done = 0;
    begin = end;
  }
}

bool Shares::Take(size_t thread, size_t* first, size_t* last) {
  Share& own = shares_[thread];
  do {
    uint64_t pieces = own.pieces.load(std::memory_order_relaxed);
    while (CountOf(pieces) > 0) {
      const uint64_t count = std::min<uint64_t>(grain_, (CountOf(pieces) + 1) / 2);
      const uint64_t begin = BeginOf(pieces);
      if (!own.pieces.compare_exchange_weak(pieces, Pieces(begin + count, EndOf(pieces)),
                                            std::memory_order_relaxed))
        continue;
      own.done += count;
      *first = begin;
      *last = begin + count;
      return true;
    }
  } while (Refill(thread));
  return false;
}

// Takes half of the fullest share, from its back. False: nothing is left.
bool Shares::Refill(size_t thread) {
  for (;;) {
    Share* fullest = nullptr;
    uint64_t pieces = 0;
    for (Share& share : shares_) {
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
    shares_[thread].pieces.store(Pieces(middle, EndOf(pieces)), std::memory_order_relaxed);
    return true;
  }
}

void Shares::Learn(size_t parts) {
  if (n_pieces_ < kTellingPieces * parts) return;
  double total = 0;  // which these threads keep beside the others
  for (size_t part = 0; part < parts; ++part) total += speeds_[part];
  for (size_t part = 0; part < parts; ++part) {
    const double done = static_cast<double>(shares_[part].done) / static_cast<double>(n_pieces_);
    const double change = (done * total - speeds_[part]) * kLearning;
    speeds_[part] = std::max(kSlowest, speeds_[part] + change);
  }
}

void Shares::Clear() {
  for (Share& share : shares_) share.pieces.store(0, std::memory_order_relaxed);
}

}  // namespace potluck
