// Attention of a ragged batch over paged keys and values, in one canonical order.
//
// Positions are cut into splits of 512 and tiles of 64, both counted from position 0; a split is
// one running softmax over its tiles, and splits are merged in rising order. So a row's bits depend
// on its session's keys and values alone: not on chunking, batch, threads or pages. What is shared
// out is only who computes what: a task is one KV head with some of its query heads and some rows
// of one session, over one split (few rows, long session: decode) or over all of them (prefill).
#pragma once

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <vector>

#include "engine/buffer.h"
#include "engine/config.h"
#include "engine/kernels/attention_table.h"
#include "engine/kv.h"
#include "engine/pool.h"

namespace potluck {

// Rows of one session in a batch. Row i stands at start_position + i and sees positions up to its
// own; all of them are prepared (kv.h), and their keys and values written before Attend.
struct SessionRows {
  const int32_t* pages;  // the session's table
  size_t start_position;
  size_t first_row;  // in the batch
  size_t n_rows;
};

// A table's kernels for a type.
inline const KvKernels& KernelsFor(const AttentionTable& table, KvType type) {
  return type == KvType::kQ8 ? table.q8 : table.f16;
}

class Attention {
 public:
  Attention(const Config& config, KvType type, size_t threads);

  // Shares a step out; holds for every layer of it. Allocates only if no step was as large before.
  void Plan(const std::vector<SessionRows>& sessions);

  // q and out are [rows, n_heads * head_dim]; q rotated and multiplied by 1 / sqrt(head_dim); kv of
  // the type given above. One Run of the pool. layer counts in the span.
  void Attend(Pool& pool, const AttentionTable& kernels, const KvPages& kv, size_t layer,
              const float* q, float* out);

  size_t scratch_bytes() const;

 private:
  struct Task {
    size_t session;              // in sessions_
    size_t first_row, last_row;  // rows [first_row, last_row) of the session's rows
    size_t kv_head;
    size_t first_head, last_head;  // query heads
    size_t join;                   // in joins_, if the session is cut into split tasks
    size_t split;                  // kEverySplit: the task takes all of them
    size_t Heads() const { return last_head - first_head; }
    size_t Rows() const { return (last_row - first_row) * Heads(); }  // query rows
  };
  // Tasks whose states are merged: the one that finishes last does it.
  struct Join {
    size_t first_state;  // in states_, in rows of state_values_
    size_t n_splits;
  };
  struct Step;  // the arguments of Attend

  void PlanSession(size_t session, size_t n_basic_tasks);
  void AddTasks(Task task, size_t n_splits, bool cut);
  void Work(const Step& step, size_t thread, const Task& task);
  void WorkAllSplits(const Step& step, size_t thread, const Task& task);
  void WorkOneSplit(const Step& step, size_t thread, const Task& task);
  void TakeQueries(const Step& step, size_t thread, const Task& task, const void** q) const;
  void AddSplit(const Step& step, size_t thread, const Task& task, const void* const* q,
                size_t split, float* states) const;
  float* TileScratch(size_t thread) const;
  KvTile TileAt(const Step& step, const Task& task, size_t tile_start, size_t stop) const;
  void MergeSplit(const Step& step, const Task& task, size_t split, const float* from,
                  float* into) const;
  void Finish(const Step& step, const Task& task, const float* states) const;

  size_t n_heads_;
  size_t n_kv_heads_;
  size_t head_dim_;
  size_t n_threads_;
  size_t state_values_;  // f32 of one state, rounded up so that rows start on a cache line
  std::vector<SessionRows> sessions_;
  std::vector<Task> tasks_;
  std::vector<Join> joins_;
  std::unique_ptr<std::atomic<size_t>[]> arrived_;  // by join; 0 between layers
  size_t n_arrived_ = 0;
  size_t n_states_ = 0;
  Buffer<float> states_;   // [n_states, state_values] of all joins
  size_t thread_values_;   // f32 of scratch_ for each thread
  size_t query_bytes_;     // of a prepared row; 0: rows are taken as they are
  Buffer<float> scratch_;  // [threads]: states [2][kMostTileRows, state_values], scratch of a tile
  Buffer<uint8_t> queries_;  // [threads][kMostTileRows, query_bytes]
};

}  // namespace potluck
