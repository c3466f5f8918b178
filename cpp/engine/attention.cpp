#include "engine/attention.h"

#include <algorithm>
#include <limits>

#include "engine/kernels/attention_q8.h"

namespace potluck {
namespace {

// Splits give decode its tasks and cost a merge each: 256 take 3 % longer at 4096 positions.
constexpr size_t kSplitPositions = 512;
constexpr size_t kTilesPerSplit = kSplitPositions / kTilePositions;
constexpr size_t kEverySplit = std::numeric_limits<size_t>::max();
// Query rows (rows times heads) of a task.
constexpr size_t kTaskRows = kMostTileRows;
// Sessions with at most so many rows in the batch are cut into splits, one task each; the states
// of longer ones would take more memory than they save time, for their rows are tasks enough.
constexpr size_t kMostCutRows = 8;
// Tasks take unequal times; so many for each thread even that out.
constexpr size_t kTasksPerThread = 4;

size_t DivideUp(size_t a, size_t b) { return (a + b - 1) / b; }

size_t SplitsOf(const SessionRows& rows) {
  return DivideUp(rows.start_position + rows.n_rows, kSplitPositions);
}

bool IsCut(const SessionRows& rows) { return rows.n_rows <= kMostCutRows && SplitsOf(rows) > 1; }

}  // namespace

struct Attention::Step {
  const AttentionTable& table;
  const KvKernels& kernels;  // of the table, for the type of kv
  const KvPages& kv;
  size_t layer;
  const float* q;
  float* out;
};

Attention::Attention(const Config& config, KvType type, size_t threads)
    : n_heads_(config.n_heads),
      n_kv_heads_(config.n_kv_heads),
      head_dim_(config.head_dim),
      n_threads_(threads),
      state_values_(DivideUp(config.head_dim + 2, 16) * 16),
      thread_values_(2 * kTaskRows * state_values_ +
                     kTileScratchPerDim * DivideUp(config.head_dim, 16) * 16 + kTileScores),
      query_bytes_(type == KvType::kQ8 ? q8::QueryBytes(config.head_dim) : 0) {
  queries_.Reserve(n_threads_ * kTaskRows * query_bytes_);
  scratch_.Reserve(n_threads_ * thread_values_);
}

void Attention::Plan(const std::vector<SessionRows>& sessions) {
  sessions_.assign(sessions.begin(), sessions.end());
  tasks_.clear();
  joins_.clear();
  n_states_ = 0;
  size_t n_basic_tasks = 0;
  for (const SessionRows& rows : sessions_) {
    n_basic_tasks += n_kv_heads_ * (IsCut(rows) ? SplitsOf(rows) : 1);
  }
  for (size_t i = 0; i < sessions_.size(); ++i) PlanSession(i, n_basic_tasks);
  states_.Reserve(n_states_ * state_values_);
  if (joins_.size() > n_arrived_) {
    n_arrived_ = joins_.size();
    arrived_ = std::make_unique<std::atomic<size_t>[]>(n_arrived_);
  }
  // A step that was given up may have left some.
  for (size_t i = 0; i < n_arrived_; ++i) arrived_[i].store(0, std::memory_order_relaxed);
}

// n_basic_tasks: what the batch would give if a task took all rows and heads of its KV head. Too
// few for the threads: tasks are made smaller, by rows if there are several, and then by heads.
void Attention::PlanSession(size_t session, size_t n_basic_tasks) {
  const SessionRows& rows = sessions_[session];
  const size_t group = n_heads_ / n_kv_heads_;
  const bool cut = IsCut(rows);
  const size_t n_splits = SplitsOf(rows);
  const size_t wanted_parts =
      DivideUp(kTasksPerThread * n_threads_, std::max<size_t>(n_basic_tasks, 1));
  const size_t row_parts = std::min(wanted_parts, rows.n_rows);
  const size_t head_parts = n_threads_ == 1 ? 1 : DivideUp(wanted_parts, 2 * row_parts);
  const size_t heads = std::min(DivideUp(group, head_parts), kTaskRows);
  const size_t n_rows = std::min(DivideUp(rows.n_rows, row_parts), kTaskRows / heads);
  for (size_t row = 0; row < rows.n_rows; row += n_rows) {
    for (size_t head = 0; head < n_heads_;) {
      const size_t kv_head = head / group;
      const size_t last_head = std::min(head + heads, (kv_head + 1) * group);
      AddTasks({session, row, std::min(row + n_rows, rows.n_rows), kv_head, head, last_head, 0, 0},
               n_splits, cut);
      head = last_head;
    }
  }
}

void Attention::AddTasks(Task task, size_t n_splits, bool cut) {
  if (!cut) {
    task.split = kEverySplit;
    tasks_.push_back(task);
    return;
  }
  task.join = joins_.size();
  joins_.push_back({n_states_, n_splits});
  n_states_ += n_splits * task.Rows();
  for (task.split = 0; task.split < n_splits; ++task.split) tasks_.push_back(task);
}

void Attention::Attend(Pool& pool, const AttentionTable& kernels, const KvPages& kv, size_t layer,
                       const float* q, float* out) {
  const Step step = {kernels, KernelsFor(kernels, kv.shape().type), kv, layer, q, out};
  pool.Run(tasks_.size(), 1, [&](size_t thread, size_t first, size_t last) {
    for (size_t i = first; i < last; ++i) Work(step, thread, tasks_[i]);
  });
}

size_t Attention::scratch_bytes() const {
  return states_.bytes() + scratch_.bytes() + queries_.bytes();
}

void Attention::Work(const Step& step, size_t thread, const Task& task) {
  if (task.split == kEverySplit) {
    WorkAllSplits(step, thread, task);
  } else {
    WorkOneSplit(step, thread, task);
  }
}

// For the kernels; the thread's states lie before it.
float* Attention::TileScratch(size_t thread) const {
  return scratch_.data() + thread * thread_values_ + 2 * kTaskRows * state_values_;
}

void Attention::WorkAllSplits(const Step& step, size_t thread, const Task& task) {
  const SessionRows& rows = sessions_[task.session];
  const size_t n_splits = DivideUp(rows.start_position + task.last_row, kSplitPositions);
  float* const states = scratch_.data() + thread * thread_values_;
  float* const later = states + kTaskRows * state_values_;
  const void* q[kTaskRows];
  TakeQueries(step, thread, task, q);
  AddSplit(step, thread, task, q, 0, states);
  for (size_t split = 1; split < n_splits; ++split) {
    AddSplit(step, thread, task, q, split, later);
    MergeSplit(step, task, split, later, states);
  }
  Finish(step, task, states);
}

void Attention::WorkOneSplit(const Step& step, size_t thread, const Task& task) {
  const Join& join = joins_[task.join];
  float* const states = states_.data() + join.first_state * state_values_;
  const size_t split_values = task.Rows() * state_values_;
  const void* q[kTaskRows];
  TakeQueries(step, thread, task, q);
  AddSplit(step, thread, task, q, task.split, states + task.split * split_values);
  std::atomic<size_t>& arrived = arrived_[task.join];
  if (arrived.fetch_add(1, std::memory_order_acq_rel) + 1 < join.n_splits) return;
  arrived.store(0, std::memory_order_relaxed);  // for the next layer, which a barrier precedes
  for (size_t split = 1; split < join.n_splits; ++split) {
    MergeSplit(step, task, split, states + split * split_values, states);
  }
  Finish(step, task, states);
}

// Where the task's query rows are, in the form that the kernels take.
void Attention::TakeQueries(const Step& step, size_t thread, const Task& task,
                            const void** q) const {
  const size_t first_row = sessions_[task.session].first_row + task.first_row;
  uint8_t* prepared = queries_.data() + thread * kTaskRows * query_bytes_;
  for (size_t i = 0; i < task.Rows(); ++i, prepared += query_bytes_) {
    const size_t head = task.first_head + i % task.Heads();
    const float* const row =
        step.q + ((first_row + i / task.Heads()) * n_heads_ + head) * head_dim_;
    q[i] = row;
    if (step.kernels.prepare_query == nullptr) continue;
    step.kernels.prepare_query(row, head_dim_, prepared);
    q[i] = prepared;
  }
}

// The states of the task's query rows over one split; rows before the split keep the empty state.
void Attention::AddSplit(const Step& step, size_t thread, const Task& task, const void* const* q,
                         size_t split, float* states) const {
  const SessionRows& rows = sessions_[task.session];
  const size_t heads = task.Heads();
  float* state[kTaskRows];
  for (size_t i = 0; i < task.Rows(); ++i) {
    state[i] = states + i * state_values_;
    std::fill_n(state[i], state_values_, 0.0f);
    state[i][head_dim_] = -std::numeric_limits<float>::infinity();
  }
  const size_t stop = rows.start_position + task.last_row;  // positions seen by the last row
  for (size_t t = 0; t < kTilesPerSplit; ++t) {
    const size_t tile_start = split * kSplitPositions + t * kTilePositions;
    if (tile_start >= stop) return;
    // Rows below `first` stand before the tile.
    const size_t first_row = tile_start - std::min(tile_start, rows.start_position);
    const size_t first = std::clamp(first_row, task.first_row, task.last_row);
    const size_t i = (first - task.first_row) * heads;
    const size_t seen = rows.start_position + first + 1 - tile_start;
    step.kernels.add_tile(TileAt(step, task, tile_start, stop), head_dim_,
                          {q + i, state + i, task.Rows() - i, heads, seen}, TileScratch(thread));
  }
}

// The tile's positions below stop, and the pages of the next tile to be fetched meanwhile: a
// section is short (4 KiB if head_dim is 64), so the CPU's own prefetcher has hardly begun when it
// ends. Places beyond the last page repeat it.
KvTile Attention::TileAt(const Step& step, const Task& task, size_t tile_start, size_t stop) const {
  const int32_t* const pages = sessions_[task.session].pages;
  const size_t last_page = (stop - 1) / kKvPageTokens;
  KvTile tile = {};
  for (size_t p = 0; p < kTilePages; ++p) {
    const size_t page = tile_start / kKvPageTokens + p;
    const auto section = [&](size_t i) {
      return step.kv.Section(pages[std::min(i, last_page)], step.layer, task.kv_head);
    };
    tile.sections[p] = section(page);
    tile.ahead[p] = section(page + kTilePages);
  }
  return tile;
}

// Rows that stand before the split are left out: merging an empty state could turn a -0.
void Attention::MergeSplit(const Step& step, const Task& task, size_t split, const float* from,
                           float* into) const {
  const size_t start = sessions_[task.session].start_position;
  for (size_t i = 0; i < task.Rows(); ++i) {
    const size_t position = start + task.first_row + i / task.Heads();
    if (position < split * kSplitPositions) continue;
    step.table.merge(from + i * state_values_, head_dim_, into + i * state_values_);
  }
}

void Attention::Finish(const Step& step, const Task& task, const float* states) const {
  const size_t first_row = sessions_[task.session].first_row + task.first_row;
  for (size_t i = 0; i < task.Rows(); ++i) {
    const size_t row = first_row + i / task.Heads();
    const size_t head = task.first_head + i % task.Heads();
    step.table.finish(states + i * state_values_, head_dim_,
                      step.out + (row * n_heads_ + head) * head_dim_);
  }
}

}  // namespace potluck
