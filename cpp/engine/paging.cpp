#include "engine/paging.h"

#include <algorithm>
#include <condition_variable>
#include <mutex>
#include <numeric>
#include <optional>
#include <thread>

#include "engine/pack_file.h"

namespace potluck {
namespace {

using Unit = std::vector<PackFile*>;

// What is read at once: long enough to stream, short enough to stop soon.
constexpr size_t kReadBytes = size_t{1} << 20;

size_t BytesOf(const Unit& unit) {
  return std::accumulate(unit.begin(), unit.end(), size_t{0},
                         [](size_t sum, const PackFile* p) { return sum + p->size_bytes(); });
}

// Reads units ahead of their use, in the order of use. Position p of that endless order is unit
// p % n; a cancelled step skips some.
class Reader {
 public:
  explicit Reader(std::vector<Unit> units)
      : units_(std::move(units)), buffer_(kReadBytes), thread_([this] { Serve(); }) {}
  ~Reader() {
    {
      const std::lock_guard<std::mutex> lock(mutex_);
      is_stopping_ = true;
    }
    changed_.notify_one();
    thread_.join();
  }
  Reader(const Reader&) = delete;
  Reader& operator=(const Reader&) = delete;

  // Unit i is not read ahead until this is called with another, or with none.
  void Omit(std::optional<size_t> i) {
    {
      const std::lock_guard<std::mutex> lock(mutex_);
      omitted_ = i;
    }
    changed_.notify_one();
  }
  // Unit i is used from now on. The one after it may be read meanwhile, if it is another.
  void Begin(size_t i) {
    MoveTo(i);
    Want(position_, position_ + (units_.size() > 1 ? 2 : 1));
  }
  // Unit i is not used any more, or not at all in this step.
  void End(size_t i) {
    MoveTo(i);
    ++position_;
    Want(position_, position_ + 1);
  }

 private:
  void MoveTo(size_t i) {
    position_ += (i + units_.size() - position_ % units_.size()) % units_.size();
  }

  // Positions [first, last) are wanted, and none before.
  void Want(uint64_t first, uint64_t last) {
    {
      const std::lock_guard<std::mutex> lock(mutex_);
      next_ = std::max(next_, first);
      last_ = std::max(last_, last);
    }
    changed_.notify_one();
  }

  void Serve() {
    std::unique_lock<std::mutex> lock(mutex_);
    while (!is_stopping_) {
      if (next_ == last_ || next_ % units_.size() == omitted_) {
        changed_.wait(lock);
        continue;
      }
      const uint64_t position = next_++;
      lock.unlock();
      ReadAhead(units_[position % units_.size()]);
      lock.lock();
    }
  }

  void ReadAhead(const Unit& unit) {
    for (const PackFile* pack : unit) {
      for (size_t at = 0; at < pack->size_bytes(); at += kReadBytes) {
        {
          const std::lock_guard<std::mutex> lock(mutex_);
          if (is_stopping_) return;
        }
        pack->ReadAhead(at, std::min(kReadBytes, pack->size_bytes() - at), buffer_.data());
      }
    }
  }

  const std::vector<Unit> units_;
  std::vector<uint8_t> buffer_;  // of the thread
  uint64_t position_ = 0;        // of the caller: in use, or used next
  std::mutex mutex_;             // of all below
  std::condition_variable changed_;
  uint64_t next_ = 0;  // positions [next_, last_) are to be read
  uint64_t last_ = 1;
  std::optional<size_t> omitted_;
  bool is_stopping_ = false;
  std::thread thread_;
};

}  // namespace

std::vector<bool> ChooseResident(const std::vector<size_t>& unit_bytes, size_t resident_bytes) {
  std::vector<bool> stays(unit_bytes.size(), true);
  const size_t total = std::accumulate(unit_bytes.begin(), unit_bytes.end(), size_t{0});
  if (total <= resident_bytes) return stays;
  // One in use, one that is read.
  const size_t passing = 2 * *std::max_element(unit_bytes.begin(), unit_bytes.end());
  const size_t left = resident_bytes - std::min(resident_bytes, passing);
  const double share = static_cast<double>(left) / static_cast<double>(total);
  double credit = 0;
  for (size_t i = 0; i < unit_bytes.size(); ++i) {
    const auto bytes = static_cast<double>(unit_bytes[i]);
    credit += share * bytes;
    stays[i] = bytes <= credit;
    if (stays[i]) credit -= bytes;
  }
  return stays;
}

struct Paging::State {
  Unit embedding;
  bool drops_embedding = false;
  std::vector<Unit> units;
  std::vector<std::optional<size_t>> streamed;  // by unit: its place among those that don't stay
  size_t n_streamed = 0;
  std::unique_ptr<Reader> reader;  // if there are any

  static void Check(const Unit& unit, Pool& pool, std::atomic<uint64_t>* progress) {
    for (PackFile* pack : unit) pack->Check(pool, progress);
  }
};

Paging::Paging(const SpanWeights& span, size_t resident_bytes) : state_(std::make_unique<State>()) {
  State& state = *state_;
  state.embedding = span.embedding_packs;
  for (const LayerWeights& layer : span.layers) state.units.push_back(layer.packs);
  state.units.push_back(span.head_packs);
  std::vector<size_t> unit_bytes;
  unit_bytes.reserve(state.units.size());
  for (const Unit& unit : state.units) unit_bytes.push_back(BytesOf(unit));
  const std::vector<bool> stays = ChooseResident(unit_bytes, resident_bytes);
  std::vector<Unit> passing;
  for (size_t i = 0; i < stays.size(); ++i) {
    state.streamed.emplace_back();
    if (stays[i] || unit_bytes[i] == 0) continue;
    state.streamed[i] = passing.size();
    passing.push_back(state.units[i]);
  }
  state.n_streamed = passing.size();
  // Only some rows of it are used, unless it is the head as well.
  const Unit& head = span.head_packs;
  const bool is_tied = std::any_of(
      state.embedding.begin(), state.embedding.end(),
      [&](PackFile* pack) { return std::find(head.begin(), head.end(), pack) != head.end(); });
  state.drops_embedding = state.n_streamed > 0 && !is_tied;
  if (!passing.empty()) state.reader = std::make_unique<Reader>(std::move(passing));
}

Paging::~Paging() = default;

void Paging::Start(bool uses_head) {
  State& state = *state_;
  if (state.reader == nullptr) return;
  state.reader->Omit(uses_head ? std::nullopt : state.streamed.back());
}

void Paging::EnterEmbedding(Pool& pool, std::atomic<uint64_t>* progress) {
  State& state = *state_;
  State::Check(state.embedding, pool, progress);
  if (!state.drops_embedding) return;
  for (const PackFile* pack : state.embedding) pack->Drop();  // what the check has read
  state.drops_embedding = false;
}

void Paging::Enter(size_t unit, Pool& pool, std::atomic<uint64_t>* progress) {
  State& state = *state_;
  const std::optional<size_t> place = state.streamed[unit];
  if (place) state.reader->Begin(*place);
  State::Check(state.units[unit], pool, progress);
}

void Paging::Leave(size_t unit) {
  State& state = *state_;
  const std::optional<size_t> place = state.streamed[unit];
  if (!place) return;
  for (const PackFile* pack : state.units[unit]) pack->Drop();
  state.reader->End(*place);
}

PagedUnit::PagedUnit(Paging& paging, size_t unit, Pool& pool, std::atomic<uint64_t>* progress)
    : paging_(paging), unit_(unit) {
  paging_.Enter(unit, pool, progress);
}

PagedUnit::~PagedUnit() { paging_.Leave(unit_); }

size_t Paging::n_streamed() const { return state_->n_streamed; }

}  // namespace potluck
