#include "engine/loading.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <utility>

#include "engine/errors.h"

namespace potluck {
namespace {

const char* const kEmbedding = "token_embd.weight";
const char* const kOutputNorm = "output_norm.weight";
const char* const kHead = "output.weight";

// What a thread reads before it drops the file's pages again; a panel may be larger.
constexpr size_t kReadBytes = size_t{1} << 20;

std::string LayerTensor(size_t layer, const char* name) {
  return "blk." + std::to_string(layer) + "." + name + ".weight";
}

size_t PlaceBytes(const TensorShape& shape, bool is_vector, WeightType type) {
  if (is_vector) return shape.cols * sizeof(float);
  return PackedBytes(type, shape.rows, shape.cols);
}

size_t PanelsOf(size_t rows) { return (rows + kPanelRows - 1) / kPanelRows; }

float WidenedAt(WeightType type, const uint8_t* bytes, size_t i) {
  if (type == WeightType::kF32) {
    float value = 0;
    std::memcpy(&value, bytes + i * sizeof(value), sizeof(value));
    return value;
  }
  uint16_t bits = 0;
  std::memcpy(&bits, bytes + i * sizeof(bits), sizeof(bits));
  return type == WeightType::kF16 ? HalfToFloat(bits) : BFloatToFloat(bits);
}

bool IsFloat(WeightType type) {
  return type == WeightType::kF32 || type == WeightType::kF16 || type == WeightType::kBF16;
}

}  // namespace

Loading::Loading(const Config& config, const ShardPart& part)
    : config_(config), part_(part), arena_([&] {
        if (part.embeds || part.has_head) Add(kEmbedding, config.vocab, config.dim);
        for (size_t layer = part.start; layer < part.stop; ++layer) AddLayer(layer);
        if (part.has_head) {
          Add(kOutputNorm, 1, config.dim);
          Add(kHead, config.vocab, config.dim);
        }
        size_t most_bytes = 0;  // no type takes more than f32
        for (const Slot& slot : slots_) {
          most_bytes += PlaceBytes(slot.shape, slot.is_vector, WeightType::kF32) + 64;
        }
        return most_bytes;
      }()) {}

void Loading::Add(const std::string& name, size_t rows, size_t cols) {
  Slot slot;
  slot.shape = {name, rows, cols};
  slot.is_vector = name.find("norm") != std::string::npos;
  slot.is_rotated = config_.rope_interleaved && (name.find("attn_q.") != std::string::npos ||
                                                 name.find("attn_k.") != std::string::npos);
  index_[name] = slots_.size();
  slots_.push_back(std::move(slot));
}

void Loading::AddLayer(size_t layer) {
  const size_t dim = config_.dim;
  Add(LayerTensor(layer, "attn_norm"), 1, dim);
  Add(LayerTensor(layer, "attn_q"), config_.QueryDim(), dim);
  Add(LayerTensor(layer, "attn_k"), config_.KvDim(), dim);
  Add(LayerTensor(layer, "attn_v"), config_.KvDim(), dim);
  Add(LayerTensor(layer, "attn_output"), dim, config_.QueryDim());
  Add(LayerTensor(layer, "ffn_norm"), 1, dim);
  Add(LayerTensor(layer, "ffn_gate"), config_.ffn_dim, dim);
  Add(LayerTensor(layer, "ffn_up"), config_.ffn_dim, dim);
  Add(LayerTensor(layer, "ffn_down"), dim, config_.ffn_dim);
}

std::vector<TensorShape> Loading::Matrices() const {
  std::vector<TensorShape> shapes;
  for (const Slot& slot : slots_) {
    if (slot.shape.name != kEmbedding || part_.embeds) shapes.push_back(slot.shape);
  }
  return shapes;
}

const Loading::Slot& Loading::Find(const std::string& name) const {
  return slots_[index_.at(name)];
}

// The slot of a tensor with its type set and its place taken, or the reason why not.
Loading::Slot& Loading::Claim(const std::string& name, const std::string& type_name, size_t rows,
                              size_t cols) {
  const auto found = index_.find(name);
  if (found == index_.end()) {
    throw ModelError(name + ": no tensor of layers [" + std::to_string(part_.start) + ", " +
                     std::to_string(part_.stop) + ") or of what this shard holds beside them");
  }
  Slot& slot = slots_[found->second];
  const TensorShape& shape = slot.shape;
  if (rows != shape.rows || cols != shape.cols) {
    throw ModelError(name + ": " + std::to_string(rows) + " rows of " + std::to_string(cols) +
                     " columns, expected " + std::to_string(shape.rows) + " of " +
                     std::to_string(shape.cols));
  }
  const TypeInfo* type = FindType(type_name.c_str());
  if (type == nullptr || (slot.is_vector && !IsFloat(type->type))) {
    throw ModelError(name + ": weight type " + type_name + " is not supported here");
  }
  if (cols % type->block_values != 0) {
    throw ModelError(name + ": " + std::to_string(cols) + " columns, but " + type_name +
                     " has blocks of " + std::to_string(type->block_values));
  }
  if (slot.is_complete()) throw ModelError(name + ": put twice");
  if (slot.type != nullptr && slot.type->type != type->type) {
    throw ModelError(name + ": put as " + type_name + " after " + slot.type->name);
  }
  CheckTied(slot);
  if (slot.type != nullptr) return slot;
  slot.place = arena_.Take(PlaceBytes(shape, slot.is_vector, type->type));
  slot.has_panel.assign(PanelsOf(rows), false);
  slot.n_panels_missing = slot.has_panel.size();
  slot.type = type;
  return slot;
}

// A shard that doesn't embed has one head: output.weight, or token_embd.weight in place of it.
void Loading::CheckTied(const Slot& slot) const {
  if (part_.embeds || !part_.has_head) return;
  const bool is_embedding = slot.shape.name == kEmbedding;
  if (!is_embedding && slot.shape.name != kHead) return;
  if (Find(is_embedding ? kHead : kEmbedding).type == nullptr) return;
  throw ModelError(slot.shape.name + ": this shard holds " + (is_embedding ? kHead : kEmbedding) +
                   " as its head already");
}

// The file's row that is packed as `row`. Interleaved pairs (2i, 2i + 1) of a head come to lie at
// i and i + rope_dim / 2, so that one rotation serves all models; scores stay the same.
size_t Loading::FileRow(const Slot& slot, size_t row) const {
  if (!slot.is_rotated) return row;
  const size_t in_head = row % config_.head_dim;
  const size_t half = config_.rope_dim / 2;
  if (in_head >= config_.rope_dim) return row;
  return row - in_head + (in_head < half ? 2 * in_head : 2 * (in_head - half) + 1);
}

void Loading::Pack(const Slot& slot, size_t panel, const RowAt& row_at) const {
  const TensorShape& shape = slot.shape;
  const uint8_t* rows[kPanelRows] = {};
  for (size_t r = 0; r < kPanelRows && panel * kPanelRows + r < shape.rows; ++r) {
    rows[r] = row_at(panel * kPanelRows + r);
  }
  bool finite = true;
  if (slot.is_vector) {
    auto* const values = reinterpret_cast<float*>(slot.place);
    for (size_t i = 0; i < shape.cols; ++i) {
      values[i] = WidenedAt(slot.type->type, rows[0], i);
      finite &= std::isfinite(values[i]);
    }
  } else {
    uint8_t* const place = slot.place + panel * PanelBytes(slot.type->type, shape.cols);
    finite = PackPanel(slot.type->type, rows, shape.cols, place) == PackResult::kOk;
  }
  if (finite) return;
  throw ModelError(shape.name + ": a weight or scale of rows " +
                   std::to_string(panel * kPanelRows) + " to " +
                   std::to_string(std::min((panel + 1) * kPanelRows, shape.rows) - 1) +
                   " is not finite; is the file damaged?");
}

void Loading::PutFile(Pool& pool, const std::string& name, const std::string& type_name,
                      size_t rows, size_t cols, const std::string& path, uint64_t offset_bytes) {
  Slot& slot = Claim(name, type_name, rows, cols);
  if (slot.n_panels_missing != slot.has_panel.size() || !slot.pending.empty()) {
    throw ModelError(name + ": put twice, some rows of it from memory");
  }
  const WeightFile file(path);
  const size_t row_bytes = RowBytes(slot.type->type, cols);
  file.CheckHolds(name, offset_bytes, rows * row_bytes);
  const size_t slab_bytes = kPanelRows * row_bytes;
  std::vector<uint8_t> slabs(pool.threads() * slab_bytes);
  const size_t grain = std::max<size_t>(1, kReadBytes / slab_bytes);
  pool.Run(slot.has_panel.size(), grain, [&](size_t thread, size_t first, size_t last) {
    ReadPanels(slot, file, offset_bytes, first, last, slabs.data() + thread * slab_bytes);
  });
  file.Drop(offset_bytes, rows * row_bytes);
  slot.has_panel.assign(slot.has_panel.size(), true);
  slot.n_panels_missing = 0;
}

// Reads and packs panels [first, last), one slab at a time.
void Loading::ReadPanels(const Slot& slot, const WeightFile& file, uint64_t offset_bytes,
                         size_t first, size_t last, uint8_t* slab) const {
  const size_t row_bytes = RowBytes(slot.type->type, slot.shape.cols);
  for (size_t panel = first; panel < last; ++panel) {
    const size_t first_row = panel * kPanelRows;
    const size_t n_rows = std::min(kPanelRows, slot.shape.rows - first_row);
    if (slot.is_rotated) {
      for (size_t r = 0; r < n_rows; ++r) {
        const uint64_t place = FileRow(slot, first_row + r) * row_bytes;
        file.Read(offset_bytes + place, row_bytes, slab + r * row_bytes);
      }
    } else {
      file.Read(offset_bytes + first_row * row_bytes, n_rows * row_bytes, slab);
    }
    Pack(slot, panel, [&](size_t row) { return slab + (row - first_row) * row_bytes; });
  }
  const uint64_t start = first * kPanelRows * row_bytes;
  file.Drop(offset_bytes + start, last * kPanelRows * row_bytes - start);
}

void Loading::Put(Pool& pool, const std::string& name, const std::string& type_name, size_t rows,
                  size_t cols, size_t first_row, const uint8_t* data, size_t size_bytes) {
  Slot& slot = Claim(name, type_name, rows, cols);
  const size_t row_bytes = RowBytes(slot.type->type, cols);
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
  const size_t row_bytes = RowBytes(slot.type->type, slot.shape.cols);
  const size_t rows = slot.shape.rows;
  if (slot.is_rotated && last_row - first_row < rows) {
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
      Pack(slot, first_panel + panel,
           [&](size_t row) { return data + (FileRow(slot, row) - first_row) * row_bytes; });
    }
  });
  slot.pending = {};
}

SpanWeights Loading::Seal() {
  const bool has_own_head = part_.has_head && Find(kHead).is_complete();
  for (const Slot& slot : slots_) {
    const std::string& name = slot.shape.name;
    if (slot.is_complete()) continue;
    if (name == kEmbedding && !part_.embeds && has_own_head) continue;
    if (name == kHead && slot.type == nullptr && Find(kEmbedding).is_complete()) continue;
    if (name == kEmbedding && !part_.embeds && slot.type == nullptr) continue;  // the head is named
    throw ModelError(name + (slot.type == nullptr ? " is missing" : " is not complete"));
  }
  SpanWeights span;
  if (part_.embeds) span.embedding = MatrixOf(kEmbedding);
  for (size_t layer = part_.start; layer < part_.stop; ++layer) {
    const auto matrix = [&](const char* name) { return MatrixOf(LayerTensor(layer, name)); };
    const auto vector = [&](const char* name) { return VectorOf(LayerTensor(layer, name)); };
    span.layers.push_back({vector("attn_norm"), matrix("attn_q"), matrix("attn_k"),
                           matrix("attn_v"), matrix("attn_output"), vector("ffn_norm"),
                           matrix("ffn_gate"), matrix("ffn_up"), matrix("ffn_down")});
  }
  if (part_.has_head) {
    span.output_norm = VectorOf(kOutputNorm);
    span.head = MatrixOf(has_own_head ? kHead : kEmbedding);
  }
  arena_.Seal();
  return span;
}

Matrix Loading::MatrixOf(const std::string& name) const {
  const Slot& slot = Find(name);
  return {slot.type->type, slot.shape.rows, slot.shape.cols, slot.place};
}

const float* Loading::VectorOf(const std::string& name) const {
  return reinterpret_cast<const float*>(Find(name).place);
}

}  // namespace potluck
