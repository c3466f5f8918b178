#include "engine/shard.h"

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cmath>
#include <mutex>
#include <string>

#include "engine/activations.h"
#include "engine/attention.h"
#include "engine/errors.h"
#include "engine/finite.h"
#include "engine/float_rules.h"
#include "engine/kernels/matmul_table.h"
#include "engine/kv.h"
#include "engine/layer.h"
#include "engine/loading.h"
#include "engine/paging.h"
#include "engine/rope.h"
#include "engine/step.h"

namespace potluck {
namespace {

using Clock = std::chrono::steady_clock;
using Lock = std::lock_guard<std::mutex>;

double SecondsSince(Clock::time_point start) {
  return std::chrono::duration<double>(Clock::now() - start).count();
}

void CheckRoom(size_t max_tokens) {
  if (max_tokens <= kMostPositions) return;
  throw UsageError("max_tokens: at most " + std::to_string(kMostPositions) + ", not " +
                   std::to_string(max_tokens));
}

// Config and part are right before anything is made of them.
Config Checked(const Config& config, const ShardPart& part) {
  Check(config, part);
  return config;
}

// Cancel turns kRunning into kCancelled and changes nothing else.
enum class Running { kIdle, kRunning, kCancelled };

// A step is running from here to the end of the scope.
class RunningScope {
 public:
  explicit RunningScope(std::atomic<Running>* running) : running_(running) {
    running_->store(Running::kRunning);
  }
  ~RunningScope() { running_->store(Running::kIdle); }
  RunningScope(const RunningScope&) = delete;
  RunningScope& operator=(const RunningScope&) = delete;

 private:
  std::atomic<Running>* running_;
};

struct Input {
  bool is_tokens;         // which of the two it is; an empty one may be null
  const int32_t* tokens;  // [n_rows]
  const float* x;         // [n_rows, dim]
  size_t n_values;
};

}  // namespace

struct Shard::State {
  State(Pool& shared_pool, const KernelTable& table, const Config& model, const ShardPart& which)
      : pool(shared_pool),
        kernels(table),
        config(Checked(model, which)),
        part(which),
        loading(config, part),
        kv({part.stop - part.start, config.n_kv_heads, config.head_dim, part.kv_type},
           part.kv_bytes, part.max_sessions),
        attention(config, part.kv_type, pool.threads()),
        activations(kernels, static_cast<float>(config.norm_eps), pool.threads()),
        rope(config.rope_theta, config.rope_dim, config.rope_scaling) {}

  std::vector<double> Forward(const Input& input, const std::vector<RowSpan>& rows, float* output,
                              size_t output_values);
  void Seal();
  void CheckBuffers(const Input& input, size_t output_values) const;
  void TakeTokens(const Input& input);
  void Begin(Step& step, const Input& input);
  void RunLayers(Step& step, std::vector<double>* seconds);
  void GiveLogits(Step& step, float* output);
  void GiveHidden(float* output) const;
  void StopIfCancelled() const;
  [[noreturn]] void Refuse(const std::string& where, size_t row) const;

  mutable std::mutex mutex;  // of everything but the two atomics
  std::atomic<Running> running{Running::kIdle};
  std::atomic<uint64_t> progress{0};

  Pool& pool;
  const KernelTable& kernels;
  const Config config;
  const ShardPart part;
  Loading loading;
  bool is_sealed = false;
  SpanWeights span;
  size_t resident_bytes = 0;
  std::unique_ptr<Paging> paging;  // of span's packs, once it is sealed
  KvPages kv;
  Attention attention;
  Activations activations;
  Rope rope;
  Scratch scratch;
  std::vector<int32_t> tokens;  // [n_rows], checked
  Batch batch;
  Failure failure;
};

void Shard::State::Seal() {
  span = loading.Seal();
  paging = std::make_unique<Paging>(span, resident_bytes);
  is_sealed = true;
}

std::vector<double> Shard::State::Forward(const Input& input, const std::vector<RowSpan>& rows,
                                          float* output, size_t output_values) {
  const FloatRules rules;
  const Pinned pinned(pool);
  if (!is_sealed) throw UsageError("forward before seal");
  batch.Count(rows, config);
  pool.Use(batch.n_rows() <= kNarrowRows ? pool.decode_threads() : pool.prefill_threads());
  CheckBuffers(input, output_values);
  if (part.embeds) TakeTokens(input);
  batch.Place(rows, &kv);
  std::vector<double> seconds;
  seconds.reserve(span.layers.size() + 1);
  failure.Clear();
  Step step = {config,      pool,    kernels, kv,      attention,
               activations, scratch, batch,   failure, progress};
  Begin(step, input);
  RunLayers(step, &seconds);
  StopIfCancelled();
  const auto start = Clock::now();
  if (part.has_head) {
    GiveLogits(step, output);
    seconds.push_back(SecondsSince(start));
  } else {
    GiveHidden(output);
  }
  for (const RowSpan& r : rows) kv.Commit(r.session, r.start_position + r.n_tokens);
  return seconds;
}

void Shard::State::CheckBuffers(const Input& input, size_t output_values) const {
  if (input.is_tokens != part.embeds) {
    throw UsageError(part.embeds ? "this shard embeds: its input is token ids"
                                 : "this shard does not embed: its input is activations");
  }
  const size_t n_rows = batch.n_rows();
  const size_t taken = n_rows * (part.embeds ? 1 : config.dim);
  if (input.n_values != taken) {
    throw UsageError("input: " + std::to_string(input.n_values) + " values, the rows take " +
                     std::to_string(taken));
  }
  const size_t given = part.has_head ? batch.n_wanted() * config.vocab : n_rows * config.dim;
  if (output_values != given) {
    throw UsageError("output: room for " + std::to_string(output_values) +
                     " values, the rows give " + std::to_string(given));
  }
}

// A copy, checked: whoever owns the buffer may write to it while the step runs.
void Shard::State::TakeTokens(const Input& input) {
  tokens.assign(input.tokens, input.tokens + input.n_values);
  for (size_t i = 0; i < tokens.size(); ++i) {
    const int32_t token = tokens[i];
    if (token >= 0 && static_cast<size_t>(token) < config.vocab) continue;
    throw UsageError("token id " + std::to_string(token) + " of row " + std::to_string(i) +
                     "; the vocabulary has " + std::to_string(config.vocab));
  }
}

void Shard::State::Begin(Step& step, const Input& input) {
  if (batch.n_rows() == 0) return;
  ReserveScratch(step, batch.n_rows(), batch.n_wanted());
  attention.Plan(batch.sessions());
  TurnAngles(step, rope);
  paging->Start(batch.n_wanted() > 0);
  if (part.embeds) {
    paging->EnterEmbedding(pool, &progress);
    Embed(step, span.embedding, tokens.data());
  } else {
    std::copy_n(input.x, input.n_values, scratch.x.data());
  }
}

void Shard::State::RunLayers(Step& step, std::vector<double>* seconds) {
  for (size_t layer = 0; layer < span.layers.size(); ++layer) {
    StopIfCancelled();
    const auto start = Clock::now();
    if (batch.n_rows() > 0) {
      const PagedUnit unit(*paging, layer, pool, &progress);
      if (!RunLayer(step, span.layers[layer], layer)) {
        Refuse("layer " + std::to_string(part.start + layer), failure.row());
      }
    }
    seconds->push_back(SecondsSince(start));
  }
}

void Shard::State::GiveLogits(Step& step, float* output) {
  const std::vector<size_t>& wanted = batch.wanted();
  const size_t head = span.layers.size();
  if (wanted.empty()) {
    if (batch.n_rows() > 0) paging->Leave(head);
    return;
  }
  for (size_t i = 0; i < wanted.size(); ++i) {
    std::copy_n(scratch.x.data() + wanted[i] * config.dim, config.dim,
                scratch.wanted.data() + i * config.dim);
  }
  const PagedUnit unit(*paging, head, pool, &progress);
  if (!RunHead(step, span, wanted.size(), output)) Refuse("head", wanted[failure.row()]);
}

void Shard::State::GiveHidden(float* output) const {
  for (size_t row = 0; row < batch.n_rows(); ++row) {
    const float* const x = scratch.x.data() + row * config.dim;
    if (!std::isfinite(LargestMagnitude(x, config.dim))) {
      Refuse("layer " + std::to_string(part.stop - 1), row);
    }
    std::copy_n(x, config.dim, output + row * config.dim);
  }
}

void Shard::State::StopIfCancelled() const {
  if (running.load(std::memory_order_relaxed) != Running::kCancelled) return;
  throw Cancelled("the step was cancelled");
}

void Shard::State::Refuse(const std::string& where, size_t row) const {
  throw FrameError(where + ", " + batch.NameOf(row) +
                   ": a value is not finite or too large (keys and values are f16: at most 65504)");
}

Shard::Shard(Pool& pool, const KernelTable& kernels, const Config& config, const ShardPart& part)
    : state_(std::make_unique<State>(pool, kernels, config, part)) {}

Shard::~Shard() = default;

std::vector<TensorShape> Shard::Matrices() const { return state_->loading.Matrices(); }

void Shard::PutFile(const std::string& name, const std::string& type_name, size_t rows, size_t cols,
                    const Origin& origin, uint64_t offset_bytes) {
  const Lock lock(state_->mutex);
  if (state_->is_sealed) throw ModelError(name + ": put after seal");
  state_->loading.PutFile(state_->pool, {name, type_name, rows, cols, offset_bytes}, origin,
                          &state_->progress);
}

void Shard::Put(const std::string& name, const std::string& type_name, size_t rows, size_t cols,
                size_t first_row, const uint8_t* data, size_t size_bytes) {
  const Lock lock(state_->mutex);
  if (state_->is_sealed) throw ModelError(name + ": put after seal");
  state_->loading.Put(state_->pool, name, type_name, rows, cols, first_row, data, size_bytes);
}

std::string Shard::WritePack(const std::string& pack, const Origin& origin,
                             const std::vector<TensorSource>& sources) {
  const Lock lock(state_->mutex);
  return state_->loading.WritePack(state_->pool, pack, origin, sources, &state_->progress);
}

uint64_t Shard::PackBytes(const std::vector<TensorSource>& sources) const {
  const Lock lock(state_->mutex);
  return state_->loading.PackBytes(sources);
}

std::string Shard::MapPack(const std::string& pack, const Origin& origin,
                           const std::vector<TensorSource>& sources) {
  const Lock lock(state_->mutex);
  state_->paging.reset();  // it knows the packs of before
  const auto seal_again = [&] {
    if (state_->is_sealed) state_->Seal();
  };
  try {
    std::string why = state_->loading.MapPack(pack, origin, sources);
    seal_again();
    return why;
  } catch (...) {
    seal_again();
    throw;
  }
}

std::vector<std::string> Shard::DamagedPacks() const {
  const Lock lock(state_->mutex);
  return state_->loading.DamagedPacks();
}

void Shard::Seal(size_t resident_bytes) {
  const Lock lock(state_->mutex);
  if (state_->is_sealed) return;
  state_->resident_bytes = resident_bytes;
  state_->Seal();
}

void Shard::Open(uint64_t session, size_t max_tokens) {
  const Lock lock(state_->mutex);
  CheckRoom(max_tokens);
  state_->kv.Open(session, max_tokens);
}

void Shard::Truncate(uint64_t session, size_t position) {
  const Lock lock(state_->mutex);
  state_->kv.Truncate(session, position);
}

void Shard::Fork(uint64_t session, uint64_t new_session, size_t max_tokens) {
  const Lock lock(state_->mutex);
  CheckRoom(max_tokens);
  state_->kv.Fork(session, new_session, max_tokens);
}

void Shard::Close(uint64_t session) {
  const Lock lock(state_->mutex);
  state_->kv.Close(session);
}

size_t Shard::Length(uint64_t session) const {
  const Lock lock(state_->mutex);
  return state_->kv.Length(session);
}

std::vector<double> Shard::Forward(const int32_t* input, size_t input_values,
                                   const std::vector<RowSpan>& rows, float* output,
                                   size_t output_values) {
  const Lock lock(state_->mutex);
  const RunningScope running(&state_->running);
  return state_->Forward({true, input, nullptr, input_values}, rows, output, output_values);
}

std::vector<double> Shard::Forward(const float* input, size_t input_values,
                                   const std::vector<RowSpan>& rows, float* output,
                                   size_t output_values) {
  const Lock lock(state_->mutex);
  const RunningScope running(&state_->running);
  return state_->Forward({false, nullptr, input, input_values}, rows, output, output_values);
}

void Shard::Cancel() {
  Running expected = Running::kRunning;
  state_->running.compare_exchange_strong(expected, Running::kCancelled);
}

uint64_t Shard::progress() const { return state_->progress.load(std::memory_order_relaxed); }

bool Shard::embeds() const { return state_->part.embeds; }
bool Shard::has_head() const { return state_->part.has_head; }
const Config& Shard::config() const { return state_->config; }

size_t Shard::shard_bytes() const {
  const Lock lock(state_->mutex);
  return state_->loading.used_bytes();
}

size_t Shard::mapped_bytes() const {
  const Lock lock(state_->mutex);
  return state_->loading.mapped_bytes();
}

size_t Shard::n_streamed() const {
  const Lock lock(state_->mutex);
  return state_->paging ? state_->paging->n_streamed() : 0;
}

size_t Shard::scratch_bytes() const {
  const Lock lock(state_->mutex);
  return ScratchBytes(state_->scratch) + state_->attention.scratch_bytes() +
         state_->activations.scratch_bytes() + state_->tokens.capacity() * sizeof(int32_t);
}

size_t Shard::kv_bytes() const { return state_->kv.n_pages() * state_->kv.shape().PageBytes(); }

size_t Shard::kv_used_bytes() const {
  const Lock lock(state_->mutex);
  return state_->kv.used_pages() * state_->kv.shape().PageBytes();
}

}  // namespace potluck
