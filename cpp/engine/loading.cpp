#include "engine/loading.h"

#include <algorithm>
#include <cstring>
#include <utility>

#include "engine/errors.h"

namespace potluck {
namespace {

const char* const kEmbedding = "token_embd.weight";
const char* const kOutputNorm = "output_norm.weight";
const char* const kHead = "output.weight";

std::string LayerTensor(size_t layer, const char* name) {
  return "blk." + std::to_string(layer) + "." + name;
}

size_t PanelsOf(size_t rows) { return (rows + kPanelRows - 1) / kPanelRows; }

}  // namespace

Loading::Loading(const Config& config, const ShardPart& part)
    : config_(config), part_(part), arena_([&] {
        if (part.embeds || part.has_head) Add(kEmbedding, {config.vocab, config.dim});
        for (size_t layer = part.start; layer < part.stop; ++layer) AddLayer(layer);
        if (part.has_head) {
          Add(kOutputNorm, {1, config.dim, Kind::kVector});
          Add(kHead, {config.vocab, config.dim});
        }
        size_t most_bytes = 0;
        for (const Slot& slot : slots_) {
          TensorForm largest = slot.form;
          largest.type = FindType("f32");  // no type takes more
          most_bytes += largest.packed_bytes() + Arena::kAlignment;
        }
        return most_bytes;
      }()) {}

void Loading::Add(const std::string& name, const Wanted& wanted) {
  Slot slot;
  slot.form.shape = {name, wanted.rows, wanted.cols};
  slot.form.is_vector = wanted.kind == Kind::kVector;
  if (wanted.is_rotated && config_.rope_interleaved) {
    slot.form.head_dim = config_.head_dim;
    slot.form.rope_dim = config_.rope_dim;
  }
  index_[name] = slots_.size();
  slots_.push_back(std::move(slot));
}

void Loading::AddLayer(size_t layer) {
  const size_t dim = config_.dim;
  const size_t q_dim = config_.QueryDim();
  const size_t kv_dim = config_.KvDim();
  const auto matrix = [&](const char* name, size_t rows, size_t cols, bool is_rotated = false) {
    Add(LayerTensor(layer, name), {rows, cols, Kind::kMatrix, is_rotated});
  };
  const auto vector = [&](const char* name, size_t values, bool is_rotated = false) {
    Add(LayerTensor(layer, name), {1, values, Kind::kVector, is_rotated});
  };
  vector("attn_norm.weight", dim);
  matrix("attn_q.weight", q_dim, dim, true);
  matrix("attn_k.weight", kv_dim, dim, true);
  matrix("attn_v.weight", kv_dim, dim);
  matrix("attn_output.weight", dim, q_dim);
  vector("ffn_norm.weight", dim);
  matrix("ffn_gate.weight", config_.ffn_dim, dim);
  matrix("ffn_up.weight", config_.ffn_dim, dim);
  matrix("ffn_down.weight", dim, config_.ffn_dim);
  if (config_.qkv_bias) {
    vector("attn_q.bias", q_dim, true);
    vector("attn_k.bias", kv_dim, true);
    vector("attn_v.bias", kv_dim);
  }
  if (config_.output_bias) vector("attn_output.bias", dim);
  if (config_.qk_norm) {
    vector("attn_q_norm.weight", config_.head_dim, true);
    vector("attn_k_norm.weight", config_.head_dim, true);
  }
}

std::vector<TensorShape> Loading::Matrices() const {
  std::vector<TensorShape> shapes;
  for (const Slot& slot : slots_) {
    const TensorShape& shape = slot.form.shape;
    if (shape.name != kEmbedding || part_.embeds) shapes.push_back(shape);
  }
  return shapes;
}

const Loading::Slot& Loading::Find(const std::string& name) const {
  return slots_[index_.at(name)];
}

// The slot of a tensor that is what the span needs, or the reason why it is not.
size_t Loading::Expected(const TensorSource& source) const {
  const std::string& name = source.name;
  const auto found = index_.find(name);
  if (found == index_.end()) {
    throw ModelError(name + ": no tensor of layers [" + std::to_string(part_.start) + ", " +
                     std::to_string(part_.stop) + ") or of what this shard holds beside them");
  }
  const TensorForm& form = slots_[found->second].form;
  const TensorShape& shape = form.shape;
  if (source.rows != shape.rows || source.cols != shape.cols) {
    throw ModelError(name + ": " + std::to_string(source.rows) + " rows of " +
                     std::to_string(source.cols) + " columns, expected " +
                     std::to_string(shape.rows) + " of " + std::to_string(shape.cols));
  }
  const TypeInfo* type = FindType(source.type_name.c_str());
  if (type == nullptr || (form.is_vector && !IsFloat(type->type))) {
    throw ModelError(name + ": weight type " + source.type_name + " is not supported here");
  }
  if (source.cols % type->block_values != 0) {
    throw ModelError(name + ": " + std::to_string(source.cols) + " columns, but " +
                     source.type_name + " has blocks of " + std::to_string(type->block_values));
  }
  return found->second;
}

TensorForm Loading::FormOf(const TensorSource& source) const {
  TensorForm form = slots_[Expected(source)].form;
  form.type = FindType(source.type_name.c_str());
  return form;
}

// The slot of a tensor with its type set and its place taken, or the reason why not.
Loading::Slot& Loading::Claim(const TensorSource& source) {
  Slot& slot = slots_[Expected(source)];
  const TypeInfo* type = FindType(source.type_name.c_str());
  if (slot.is_complete()) throw ModelError(source.name + ": put twice");
  if (slot.form.type != nullptr && slot.form.type != type) {
    throw ModelError(source.name + ": put as " + source.type_name + " after " +
                     slot.form.type->name);
  }
  CheckTied(slot);
  if (slot.form.type != nullptr) return slot;
  TensorForm form = slot.form;
  form.type = type;
  slot.place = arena_.Take(form.packed_bytes());
  slot.has_panel.assign(form.n_panels(), false);
  slot.n_panels_missing = slot.has_panel.size();
  slot.form = std::move(form);
  return slot;
}

// A shard that doesn't embed has one head: output.weight, or token_embd.weight in place of it.
void Loading::CheckTied(const Slot& slot) const {
  if (part_.embeds || !part_.has_head) return;
  const std::string& name = slot.form.shape.name;
  const bool is_embedding = name == kEmbedding;
  if (!is_embedding && name != kHead) return;
  const char* const other = is_embedding ? kHead : kEmbedding;
  if (Find(other).form.type == nullptr) return;
  throw ModelError(name + ": this shard holds " + other + " as its head already");
}

void Loading::PutFile(Pool& pool, const TensorSource& source, const Origin& origin,
                      std::atomic<uint64_t>* progress) {
  Slot& slot = Claim(source);
  if (slot.n_panels_missing != slot.has_panel.size() || !slot.pending.empty()) {
    throw ModelError(source.name + ": put twice, some rows of it from memory");
  }
  const auto from = Open(origin);
  const auto rows = from->RowsOf(slot.form, source.offset_bytes);
  const size_t panel_bytes = slot.form.panel_bytes();
  PackRows(
      pool, slot.form, *rows,
      [&](const Piece& piece) { return slot.place + piece.first * panel_bytes; },
      [&](const Piece&, const uint8_t*) { progress->fetch_add(1, std::memory_order_relaxed); });
  slot.has_panel.assign(slot.has_panel.size(), true);
  slot.n_panels_missing = 0;
}

void Loading::Put(Pool& pool, const std::string& name, const std::string& type_name, size_t rows,
                  size_t cols, size_t first_row, const uint8_t* data, size_t size_bytes) {
  Slot& slot = Claim({name, type_name, rows, cols, 0});
  const size_t row_bytes = slot.form.row_bytes();
  const size_t n_rows = size_bytes / row_bytes;
  const bool is_whole_panels = first_row % kPanelRows == 0 && n_rows > 0 && first_row < rows &&
                               n_rows <= rows - first_row &&
                               (n_rows % kPanelRows == 0 || first_row + n_rows == rows);
  if (!is_whole_panels || size_bytes % row_bytes != 0) {
    throw ModelError(name + ": " + std::to_string(size_bytes) + " bytes for rows from " +
                     std::to_string(first_row) + " on; expected a multiple of 8 whole rows of " +
                     std::to_string(row_bytes) + " bytes, or the last ones of " +
                     std::to_string(rows));
  }
  const size_t first_panel = first_row / kPanelRows;
  const size_t last_panel = PanelsOf(first_row + n_rows);
  for (size_t panel = first_panel; panel < last_panel; ++panel) {
    if (slot.has_panel[panel]) {
      throw ModelError(name + ": row " + std::to_string(panel * kPanelRows) + " put twice");
    }
  }
  PutRows(pool, slot, first_row, first_row + n_rows, data);
  for (size_t panel = first_panel; panel < last_panel; ++panel) slot.has_panel[panel] = true;
  slot.n_panels_missing -= last_panel - first_panel;
}

void Loading::PutRows(Pool& pool, Slot& slot, size_t first_row, size_t last_row,
                      const uint8_t* data) {
  const size_t row_bytes = slot.form.row_bytes();
  const size_t rows = slot.form.shape.rows;
  if (slot.form.rope_dim > 0 && last_row - first_row < rows) {
    // A panel takes its rows from all over a head, so it waits for the rest.
    if (slot.pending.empty()) slot.pending.resize(rows * row_bytes);
    std::memcpy(slot.pending.data() + first_row * row_bytes, data,
                (last_row - first_row) * row_bytes);
    if (slot.n_panels_missing > PanelsOf(last_row) - first_row / kPanelRows) return;
    data = slot.pending.data();
    first_row = 0;
    last_row = rows;
  }
  const size_t first_panel = first_row / kPanelRows;
  const size_t n_panels = PanelsOf(last_row) - first_panel;
  pool.Run(n_panels, 8, [&](size_t, size_t first, size_t last) {
    for (size_t panel = first; panel < last; ++panel) {
      PackPanelOf(
          slot.form, first_panel + panel,
          [&](size_t row) { return data + (slot.form.FileRow(row) - first_row) * row_bytes; },
          slot.place + (first_panel + panel) * slot.form.panel_bytes());
    }
  });
  slot.pending = {};
}

// The pack of these tensors as it must be.
PackPlan Loading::PlanOf(const std::vector<TensorSource>& sources, const PackSource& file) const {
  if (sources.empty()) throw UsageError("a pack of no tensors");
  std::vector<TensorForm> forms;
  forms.reserve(sources.size());
  for (const TensorSource& source : sources) forms.push_back(FormOf(source));
  return {std::move(forms), file};
}

uint64_t Loading::PackBytes(const std::vector<TensorSource>& sources) const {
  return PlanOf(sources, {}).file_bytes();
}

std::string Loading::WritePack(Pool& pool, const std::string& pack, const Origin& origin,
                               const std::vector<TensorSource>& sources,
                               std::atomic<uint64_t>* progress) const {
  const auto from = Open(origin);
  const PackPlan plan = PlanOf(sources, from->identity());
  PackWriter writer(pack, plan, pool.threads());
  std::vector<std::vector<uint8_t>> buffers(pool.threads());
  for (size_t i = 0; i < sources.size() && writer.why().empty(); ++i) {
    const TensorForm& form = plan.forms()[i];
    const auto rows = from->RowsOf(form, sources[i].offset_bytes);
    PackRows(
        pool, form, *rows,
        [&](const Piece& piece) {
          std::vector<uint8_t>& buffer = buffers[piece.thread];
          buffer.resize((piece.last - piece.first) * form.panel_bytes());
          return buffer.data();
        },
        [&](const Piece& piece, const uint8_t* packed) {
          writer.Write(i, piece, packed);
          progress->fetch_add(1, std::memory_order_relaxed);
        });
  }
  return writer.Finish();
}

std::string Loading::MapPack(const std::string& pack, const Origin& origin,
                             const std::vector<TensorSource>& sources) {
  PackPlan plan = PlanOf(sources, Open(origin)->identity());
  for (const TensorSource& source : sources) {
    const Slot& slot = Find(source.name);
    if (slot.place != nullptr) throw ModelError(source.name + ": put twice");
    CheckTied(slot);
  }
  std::string why;
  std::unique_ptr<PackFile> mapped = PackFile::Open(pack, std::move(plan), &why);
  if (mapped == nullptr) return why;
  for (size_t i = 0; i < sources.size(); ++i) {
    Slot& slot = slots_[index_.at(sources[i].name)];
    slot.form = mapped->plan().forms()[i];
    slot.pack = mapped.get();
    slot.in_pack = i;
  }
  packs_.push_back(std::move(mapped));
  // One that this one replaces.
  const auto is_unused = [&](const std::unique_ptr<PackFile>& other) {
    return std::none_of(slots_.begin(), slots_.end(),
                        [&](const Slot& slot) { return slot.pack == other.get(); });
  };
  packs_.erase(std::remove_if(packs_.begin(), packs_.end(), is_unused), packs_.end());
  return "";
}

std::vector<std::string> Loading::DamagedPacks() const {
  std::vector<std::string> paths;
  for (const auto& pack : packs_) {
    if (pack->is_damaged()) paths.push_back(pack->path());
  }
  return paths;
}

size_t Loading::used_bytes() const { return arena_.used_bytes() + mapped_bytes(); }

size_t Loading::mapped_bytes() const {
  size_t bytes = 0;
  for (const auto& pack : packs_) bytes += pack->size_bytes();
  return bytes;
}

void Loading::CheckComplete() const {
  const bool has_own_head = part_.has_head && Find(kHead).is_complete();
  for (const Slot& slot : slots_) {
    const std::string& name = slot.form.shape.name;
    const bool is_absent = slot.form.type == nullptr;
    if (slot.is_complete()) continue;
    if (name == kEmbedding && !part_.embeds && has_own_head) continue;
    if (name == kHead && is_absent && Find(kEmbedding).is_complete()) continue;
    if (name == kEmbedding && !part_.embeds && is_absent) continue;  // the head is named
    throw ModelError(name + (is_absent ? " is missing" : " is not complete"));
  }
}

SpanWeights Loading::Seal() {
  CheckComplete();
  SpanWeights span;
  if (part_.embeds) {
    span.embedding = MatrixOf(kEmbedding);
    span.embedding_packs = PacksOf({kEmbedding});
  }
  for (size_t layer = part_.start; layer < part_.stop; ++layer) {
    span.layers.push_back(LayerOf(layer));
  }
  if (part_.has_head) {
    const char* const head = Find(kHead).is_complete() ? kHead : kEmbedding;
    span.output_norm = VectorOf(kOutputNorm);
    span.head = MatrixOf(head);
    span.head_packs = PacksOf({kOutputNorm, head});
  }
  arena_.Seal();
  return span;
}

LayerWeights Loading::LayerOf(size_t layer) const {
  std::vector<std::string> names;
  const auto matrix = [&](const char* name) {
    names.push_back(LayerTensor(layer, name));
    return MatrixOf(names.back());
  };
  const auto vector = [&](const char* name) -> const float* {
    if (index_.count(LayerTensor(layer, name)) == 0) return nullptr;
    names.push_back(LayerTensor(layer, name));
    return VectorOf(names.back());
  };
  LayerWeights weights;
  weights.attn_norm = vector("attn_norm.weight");
  weights.q = matrix("attn_q.weight");
  weights.k = matrix("attn_k.weight");
  weights.v = matrix("attn_v.weight");
  weights.output = matrix("attn_output.weight");
  weights.ffn_norm = vector("ffn_norm.weight");
  weights.gate = matrix("ffn_gate.weight");
  weights.up = matrix("ffn_up.weight");
  weights.down = matrix("ffn_down.weight");
  weights.q_bias = vector("attn_q.bias");
  weights.k_bias = vector("attn_k.bias");
  weights.v_bias = vector("attn_v.bias");
  weights.output_bias = vector("attn_output.bias");
  weights.q_norm = vector("attn_q_norm.weight");
  weights.k_norm = vector("attn_k_norm.weight");
  weights.packs = PacksOf(names);
  return weights;
}

Matrix Loading::MatrixOf(const std::string& name) const {
  const Slot& slot = Find(name);
  return {slot.form.type->type, slot.form.shape.rows, slot.form.shape.cols, slot.bytes()};
}

const float* Loading::VectorOf(const std::string& name) const {
  return reinterpret_cast<const float*>(Find(name).bytes());
}

// Each once.
std::vector<PackFile*> Loading::PacksOf(const std::vector<std::string>& names) const {
  std::vector<PackFile*> packs;
  for (const std::string& name : names) {
    PackFile* const pack = Find(name).pack;
    if (pack == nullptr || std::find(packs.begin(), packs.end(), pack) != packs.end()) continue;
    packs.push_back(pack);
  }
  return packs;
}

}  // namespace potluck
