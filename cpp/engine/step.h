// What the phases of a step share: its rows, the buffers they pass through, and who computes.
//
// A phase is one Run of the pool. The step's owner (Shard) builds a Batch, and the phases of
// layer.h and activations.h read it; only they write the scratch.
#pragma once

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <limits>
#include <vector>

#include "engine/attention.h"
#include "engine/batch.h"
#include "engine/buffer.h"
#include "engine/config.h"
#include "engine/kernels/table.h"
#include "engine/kv.h"
#include "engine/pool.h"

namespace potluck {

// The first row of a batch in which a value was not finite; kept by whichever thread finds one.
class Failure {
 public:
  static constexpr size_t kNone = std::numeric_limits<size_t>::max();

  void Report(size_t row) {
    size_t found = row_.load(std::memory_order_relaxed);
    while (row < found && !row_.compare_exchange_weak(found, row, std::memory_order_relaxed)) {
    }
  }
  void Clear() { row_.store(kNone, std::memory_order_relaxed); }
  size_t row() const { return row_.load(std::memory_order_relaxed); }

 private:
  std::atomic<size_t> row_{kNone};
};

// Buffers of one thread. Products of matrices are made piece by piece, so these stay in its cache.
struct ThreadScratch {
  Buffer<uint8_t> matmul;  // MatMulScratchBytes()
  Buffer<float> first;     // [n_rows, columns of a piece]
  Buffer<float> second;    // likewise
};

// Buffers of a batch, of the largest so far.
struct Scratch {
  Buffer<float> x;       // [n_rows, dim]: the hidden states
  Buffer<float> q;       // [n_rows, n_heads * head_dim]: rotated and scaled queries
  Buffer<float> mixed;   // [n_rows, n_heads * head_dim]: attention's result
  Buffer<float> hidden;  // [n_rows, ffn_dim]: silu(gate) * up
  Buffer<float> wanted;  // [rows that want logits, dim]
  Buffer<float> cosine;  // [n_rows, rope_dim / 2]
  Buffer<float> sine;    // likewise
  std::vector<ThreadScratch> threads;
};

class Activations;

struct Step {
  const Config& config;
  Pool& pool;
  const KernelTable& kernels;
  KvPages& kv;
  Attention& attention;
  Activations& activations;
  Scratch& scratch;
  const Batch& batch;
  Failure& failure;
  std::atomic<uint64_t>& progress;  // phases finished

  // One phase. False: a value was not finite (failure).
  template <class F>
  bool Run(size_t n_pieces, size_t grain, F&& work) {
    pool.Run(n_pieces, grain, work);
    return EndPhase();
  }
  bool EndPhase() {
    progress.fetch_add(1, std::memory_order_relaxed);
    return failure.row() == Failure::kNone;
  }
};

}  // namespace potluck
