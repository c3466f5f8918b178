#include "engine/layer.h"

#include <algorithm>
#include <cmath>
#include <numeric>

#include "engine/activations.h"
#include "engine/finite.h"
#include "engine/kernels/attention_table.h"
#include "engine/kernels/matmul_table.h"
#include "engine/kernels/vector_table.h"
#include "engine/matmul.h"

namespace potluck {
namespace {

// Products of a piece, [rows, columns] f32, should stay in the second cache beside the weights.
constexpr size_t kPieceBytes = size_t{64} << 10;
constexpr size_t kMostPiecePanels = 16;
// Of few rows the weights are read once, and each range of them begins with a wait for memory: long
// ones lose little (two threads, 7B: 1 MiB 96 GB/s, 512 KiB 95, 256 KiB 94, 64 KiB 86).
constexpr size_t kNarrowPieceWeightBytes = size_t{1} << 20;
constexpr size_t kMostNarrowPiecePanels = 64;
constexpr size_t kPiecesPerThread = 8;

// Of work that is small for one row; fewer are not worth waking a thread.
constexpr size_t kRowsAtATime = 8;

// Rotated and scaled queries are below this, keys and values below 65536, head_dim at most 65536:
// so every score is finite, and attention need not look.
constexpr float kLargestQuery = 0x1p80f;

size_t DivideUp(size_t a, size_t b) { return (a + b - 1) / b; }

// How the panels of a matrix are shared out: `panels` to a piece, `grain` pieces at a time.
struct Pieces {
  size_t panels;
  size_t count;
  size_t grain;
  size_t First(size_t piece) const { return piece * panels; }
  size_t Last(size_t piece, const Matrix& m) const {
    return std::min(piece * panels, m.n_panels());
  }
};

// A balance of even shares, streaming and caches.
Pieces PiecesOf(const Step& step, const Matrix& matrix, size_t n_rows) {
  const bool is_narrow = n_rows <= kNarrowRows;
  const size_t panels = is_narrow ? 2 : kPanelsAtOnce;  // what the kernels take in one go
  const size_t even = matrix.n_panels() / (kPiecesPerThread * step.pool.used());
  const size_t most = is_narrow ? kNarrowPieceWeightBytes / matrix.panel_bytes()
                                : kPieceBytes / (n_rows * kPanelRows * sizeof(float));
  const size_t limit = is_narrow ? kMostNarrowPiecePanels : kMostPiecePanels;
  const size_t at_a_time = std::clamp(std::min(even, most), panels, limit);
  return {panels, DivideUp(matrix.n_panels(), panels), at_a_time / panels};
}

// Heads that together fill whole panels: 1, but for odd sizes.
size_t HeadsOfUnit(const Config& config) {
  return kPanelRows / std::gcd(config.head_dim, kPanelRows);
}

size_t UnitColumns(const Config& config) { return HeadsOfUnit(config) * config.head_dim; }

// Values of a thread's products: of a piece, or of a unit of heads.
size_t PieceValues(const Config& config, size_t n_rows) {
  const size_t columns = std::max(UnitColumns(config), kMostPiecePanels * kPanelRows);
  const size_t narrow = std::min(n_rows, kNarrowRows) * kMostNarrowPiecePanels * kPanelRows;
  return std::max(n_rows * columns, narrow);
}

// Panels [first, last) of a matrix times the prepared rows; out is [rows, out_stride]. False: the
// rows are not finite.
bool Multiply(Step& step, size_t thread, const Matrix& matrix, size_t first, size_t last,
              float* out, size_t out_stride) {
  const PreparedRows rows = step.activations.Get(step, thread, matrix.type);
  if (rows.data == nullptr) return false;
  MatMul(*step.kernels.matmul, matrix.type, matrix.panel(first), last - first, rows, out,
         out_stride, step.scratch.threads[thread].matmul.data());
  return true;
}

void Rotate(Step& step, size_t row, float* head) {
  const size_t half = step.config.rope_dim / 2;
  step.kernels.vector->rotate(step.scratch.cosine.data() + row * half,
                              step.scratch.sine.data() + row * half, half, head);
}

// Copies a rotated head times 1 / sqrt(head_dim). False: a value is not finite or absurdly large.
bool ScaleQuery(const float* head, size_t head_dim, float scale, float* out) {
  for (size_t d = 0; d < head_dim; ++d) out[d] = head[d] * scale;
  return LargestMagnitude(out, head_dim) < kLargestQuery;
}

enum class Part { kKeys, kValues, kQueries };

// What makes one of q, k and v.
struct Projection {
  Part part;
  const Matrix& matrix;
  const float* bias;  // [matrix.rows] or null
  const float* norm;  // [head_dim] or null
};

// A head's values, fresh from their matrix, plus their bias; then normed as hidden states are. Both
// by its own values only, so that no split of the heads changes a bit. False: not finite.
bool FinishHead(Step& step, const Projection& projection, size_t head, float* values) {
  const size_t head_dim = step.config.head_dim;
  const VectorTable& vector = *step.kernels.vector;
  if (projection.bias != nullptr) vector.add(projection.bias + head * head_dim, head_dim, values);
  if (projection.norm == nullptr) return true;
  return vector.rms_norm(values, projection.norm, head_dim,
                         static_cast<float>(step.config.norm_eps), values);
}

// One head of one row goes to its place. False: not finite.
bool PlaceHead(Step& step, Part part, size_t index, size_t row, size_t head, float* values) {
  const size_t head_dim = step.config.head_dim;
  if (part != Part::kValues) Rotate(step, row, values);
  if (part == Part::kQueries) {
    const float scale = 1.0f / std::sqrt(static_cast<float>(head_dim));
    float* const out = step.scratch.q.data() + row * step.config.QueryDim() + head * head_dim;
    return ScaleQuery(values, head_dim, scale, out);
  }
  const KvPlace place = step.batch.places()[row];
  const size_t slot = place.position % kKvPageTokens;
  const KvKernels& kernels = KernelsFor(*step.kernels.attention, step.kv.shape().type);
  uint8_t* const section = step.kv.Section(place.page, index, head);
  if (part == Part::kKeys) {
    return kernels.store_key(values, head_dim, slot, section);
  }
  return kernels.store_value(values, head_dim, slot, section);
}

// A unit of heads (whole panels) of q, k or v, over all rows.
void ProjectUnit(Step& step, size_t thread, const Projection& projection, size_t index,
                 size_t unit) {
  const Config& config = step.config;
  const Matrix& matrix = projection.matrix;
  const size_t n_heads = matrix.rows / config.head_dim;
  const size_t first_head = unit * HeadsOfUnit(config);
  const size_t last_head = std::min(first_head + HeadsOfUnit(config), n_heads);
  const size_t first = unit * UnitColumns(config) / kPanelRows;
  const size_t last = std::min(first + UnitColumns(config) / kPanelRows, matrix.n_panels());
  float* const product = step.scratch.threads[thread].first.data();
  const size_t columns = (last - first) * kPanelRows;
  if (!Multiply(step, thread, matrix, first, last, product, columns)) return;
  for (size_t row = 0; row < step.batch.n_rows(); ++row) {
    for (size_t head = first_head; head < last_head; ++head) {
      float* const values = product + row * columns + (head - first_head) * config.head_dim;
      if (!FinishHead(step, projection, head, values) ||
          !PlaceHead(step, projection.part, index, row, head, values)) {
        step.failure.Report(row);
      }
    }
  }
}

// Norm; q and k normed by heads, if the model does so; q rotated and scaled; keys and values into
// their pages.
bool ProjectQkv(Step& step, const LayerWeights& layer, size_t index) {
  const Config& config = step.config;
  const Rows x = {step.scratch.x.data(), step.batch.n_rows(), config.dim, layer.attn_norm};
  if (!step.activations.Begin(step, x, {&layer.q, &layer.k, &layer.v})) return false;
  const size_t kv_units = DivideUp(config.n_kv_heads, HeadsOfUnit(config));
  const size_t q_units = DivideUp(config.n_heads, HeadsOfUnit(config));
  const Projection keys = {Part::kKeys, layer.k, layer.k_bias, layer.k_norm};
  const Projection values = {Part::kValues, layer.v, layer.v_bias, nullptr};
  const Projection queries = {Part::kQueries, layer.q, layer.q_bias, layer.q_norm};
  return step.Run(2 * kv_units + q_units, 1, [&](size_t thread, size_t first, size_t last) {
    for (size_t unit = first; unit < last; ++unit) {
      if (unit < kv_units) {
        ProjectUnit(step, thread, keys, index, unit);
      } else if (unit < 2 * kv_units) {
        ProjectUnit(step, thread, values, index, unit - kv_units);
      } else {
        ProjectUnit(step, thread, queries, index, unit - 2 * kv_units);
      }
    }
  });
}

bool Attend(Step& step, size_t index) {
  step.attention.Attend(step.pool, *step.kernels.attention, step.kv, index, step.scratch.q.data(),
                        step.scratch.mixed.data());
  return step.EndPhase();
}

// scratch.x += rows . matrix^T + bias, if there is one: [dim] or null
bool AddProduct(Step& step, const Matrix& matrix, const float* bias, const float* rows) {
  const size_t dim = step.config.dim;
  if (!step.activations.Begin(step, {rows, step.batch.n_rows(), matrix.cols, nullptr}, {&matrix})) {
    return false;
  }
  const Pieces pieces = PiecesOf(step, matrix, step.batch.n_rows());
  return step.Run(pieces.count, pieces.grain, [&](size_t thread, size_t begin, size_t end) {
    const size_t first = pieces.First(begin);
    const size_t last = pieces.Last(end, matrix);
    float* const product = step.scratch.threads[thread].first.data();
    const size_t columns = (last - first) * kPanelRows;
    if (!Multiply(step, thread, matrix, first, last, product, columns)) return;
    const size_t start = first * kPanelRows;
    const size_t n = std::min(columns, dim - start);
    for (size_t row = 0; row < step.batch.n_rows(); ++row) {
      float* const x = step.scratch.x.data() + row * dim + start;
      float* const added = product + row * columns;
      if (bias != nullptr) step.kernels.vector->add(bias + start, n, added);
      step.kernels.vector->add(added, n, x);
    }
  });
}

// Norm; scratch.hidden = silu(gate) * up.
bool GateUp(Step& step, const LayerWeights& layer) {
  const Config& config = step.config;
  const Rows x = {step.scratch.x.data(), step.batch.n_rows(), config.dim, layer.ffn_norm};
  if (!step.activations.Begin(step, x, {&layer.gate, &layer.up})) return false;
  const Pieces pieces = PiecesOf(step, layer.gate, step.batch.n_rows());
  return step.Run(pieces.count, pieces.grain, [&](size_t thread, size_t begin, size_t end) {
    const size_t first = pieces.First(begin);
    const size_t last = pieces.Last(end, layer.gate);
    float* const gate = step.scratch.threads[thread].first.data();
    float* const up = step.scratch.threads[thread].second.data();
    const size_t columns = (last - first) * kPanelRows;
    if (!Multiply(step, thread, layer.gate, first, last, gate, columns)) return;
    if (!Multiply(step, thread, layer.up, first, last, up, columns)) return;
    const size_t start = first * kPanelRows;
    const size_t n = std::min(columns, config.ffn_dim - start);
    for (size_t row = 0; row < step.batch.n_rows(); ++row) {
      float* const hidden = step.scratch.hidden.data() + row * config.ffn_dim + start;
      step.kernels.vector->silu_mul(gate + row * columns, up + row * columns, n, hidden);
    }
  });
}

}  // namespace

void ReserveScratch(Step& step, size_t n_rows, size_t n_wanted) {
  const Config& config = step.config;
  Scratch& scratch = step.scratch;
  scratch.x.Reserve(n_rows * config.dim);
  scratch.q.Reserve(n_rows * config.QueryDim());
  scratch.mixed.Reserve(n_rows * config.QueryDim());
  scratch.hidden.Reserve(n_rows * config.ffn_dim);
  scratch.wanted.Reserve(n_wanted * config.dim);
  scratch.cosine.Reserve(n_rows * config.rope_dim / 2);
  scratch.sine.Reserve(n_rows * config.rope_dim / 2);
  scratch.threads.resize(step.pool.threads());
  for (ThreadScratch& thread : scratch.threads) {
    thread.matmul.Reserve(MatMulScratchBytes());
    thread.first.Reserve(PieceValues(config, n_rows));
    thread.second.Reserve(PieceValues(config, n_rows));
  }
  step.activations.Reserve(n_rows, config.dim);
}

size_t ScratchBytes(const Scratch& scratch) {
  size_t bytes = scratch.x.bytes() + scratch.q.bytes() + scratch.mixed.bytes() +
                 scratch.hidden.bytes() + scratch.wanted.bytes() + scratch.cosine.bytes() +
                 scratch.sine.bytes();
  for (const ThreadScratch& thread : scratch.threads) {
    bytes += thread.matmul.bytes() + thread.first.bytes() + thread.second.bytes();
  }
  return bytes;
}

void TurnAngles(Step& step, const Rope& rope) {
  const size_t half = rope.half();
  step.Run(step.batch.n_rows(), kRowsAtATime, [&](size_t, size_t first, size_t last) {
    for (size_t row = first; row < last; ++row) {
      rope.Angles(step.batch.places()[row].position, step.scratch.cosine.data() + row * half,
                  step.scratch.sine.data() + row * half);
    }
  });
}

void Embed(Step& step, const Matrix& embedding, const int32_t* tokens) {
  const size_t dim = step.config.dim;
  step.Run(step.batch.n_rows(), kRowsAtATime, [&](size_t, size_t first, size_t last) {
    for (size_t row = first; row < last; ++row) {
      const auto token = static_cast<size_t>(tokens[row]);
      UnpackRow(embedding.type, embedding.panel(token / kPanelRows), token % kPanelRows, dim,
                step.scratch.x.data() + row * dim);
    }
  });
}

bool RunLayer(Step& step, const LayerWeights& layer, size_t index) {
  const Scratch& scratch = step.scratch;
  return ProjectQkv(step, layer, index) &&  // norm; q, keys, values
         Attend(step, index) &&             // mixed
         AddProduct(step, layer.output, layer.output_bias, scratch.mixed.data()) &&
         GateUp(step, layer) &&  // norm; hidden
         AddProduct(step, layer.down, nullptr, scratch.hidden.data());
}

bool RunHead(Step& step, const SpanWeights& span, size_t n_rows, float* logits) {
  const Matrix& head = span.head;
  const Rows wanted = {step.scratch.wanted.data(), n_rows, step.config.dim, span.output_norm};
  if (!step.activations.Begin(step, wanted, {&head})) return false;
  const Pieces pieces = PiecesOf(step, head, n_rows);
  return step.Run(pieces.count, pieces.grain, [&](size_t thread, size_t begin, size_t end) {
    const size_t first = pieces.First(begin);
    const size_t last = pieces.Last(end, head);
    const size_t start = first * kPanelRows;
    const size_t columns = (last - first) * kPanelRows;
    const size_t n = std::min(columns, head.rows - start);
    const bool fits = n == columns;  // else the last panel's padding must not reach the next row
    float* const product = fits ? logits + start : step.scratch.threads[thread].first.data();
    const size_t stride = fits ? head.rows : columns;
    if (!Multiply(step, thread, head, first, last, product, stride)) return;
    for (size_t row = 0; row < n_rows; ++row) {
      const float* const values = product + row * stride;
      if (!std::isfinite(LargestMagnitude(values, n))) step.failure.Report(row);
      if (!fits) std::copy_n(values, n, logits + row * head.rows + start);
    }
  });
}

}  // namespace potluck
