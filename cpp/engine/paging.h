// Which mapped packs stay in memory, and which come from the disk anew in every step.
//
// A step uses a shard's units (layers, then the head) always in the same order. Of a shard larger
// than memory a system that drops what was used longest ago would therefore drop just what is
// needed next, and read everything in every step. So as many units as fit stay for good; the
// others, spread evenly between them, are read by a thread of their own while those before compute,
// and given up after use. What is in memory at any time: the units that stay and two of the others.
#pragma once

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <vector>

#include "engine/pool.h"
#include "engine/weights.h"

namespace potluck {

// For each unit whether it stays, if units of these sizes may take so much memory.
std::vector<bool> ChooseResident(const std::vector<size_t>& unit_bytes, size_t resident_bytes);

// For the one thread that runs steps.
class Paging {
 public:
  // Units are the layers of the span and, if it has one, the head. The span's packs must outlive
  // this.
  Paging(const SpanWeights& span, size_t resident_bytes);
  ~Paging();
  Paging(const Paging&) = delete;
  Paging& operator=(const Paging&) = delete;

  // Before a step; one that does not use the head has it not read ahead.
  void Start(bool uses_head);
  // Before a use of the embedding or of a unit. The first one compares its packs with their
  // checksums. DamagedPack: they differ.
  void EnterEmbedding(Pool& pool, std::atomic<uint64_t>* progress);
  void Enter(size_t unit, Pool& pool, std::atomic<uint64_t>* progress);
  // After a use, or in place of one in a step that has none.
  void Leave(size_t unit);

  size_t n_streamed() const;

 private:
  struct State;
  std::unique_ptr<State> state_;
};

// A use of a unit, to the end of the scope.
class PagedUnit {
 public:
  PagedUnit(Paging& paging, size_t unit, Pool& pool, std::atomic<uint64_t>* progress);
  ~PagedUnit();
  PagedUnit(const PagedUnit&) = delete;
  PagedUnit& operator=(const PagedUnit&) = delete;

 private:
  Paging& paging_;
  size_t unit_;
};

}  // namespace potluck
