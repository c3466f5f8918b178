#include "engine/bench.h"

#include <algorithm>
#include <chrono>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <new>
#include <random>
#include <string>
#include <vector>

#include "engine/errors.h"
#include "engine/matmul.h"
#include "engine/pack.h"

namespace potluck {
namespace {

constexpr size_t kMostWeightBytes = size_t{1} << 40;
// Bytes of panels that a thread takes at once: small beside a share, large beside the cost of
// taking it.
constexpr size_t kPieceBytes = size_t{64} << 10;

struct Free {
  void operator()(uint8_t* bytes) const { std::free(bytes); }
};
using Buffer = std::unique_ptr<uint8_t, Free>;

Buffer Allocate(size_t bytes) {
  Buffer buffer(static_cast<uint8_t*>(std::aligned_alloc(64, (bytes + 63) / 64 * 64)));
  if (buffer == nullptr) throw std::bad_alloc();
  return buffer;
}

// One panel of random codes with modest scales.
void FillPanel(WeightType type, size_t k, std::mt19937& random, uint8_t* panel) {
  const TypeInfo& info = InfoOf(type);
  std::vector<uint8_t> file(kPanelRows * RowBytes(type, k));
  for (uint8_t& byte : file) byte = static_cast<uint8_t>(random() >> 24);
  for (size_t at = 0; at < file.size(); at += info.block_bytes) {
    const float value = static_cast<float>(random() % 1000 + 1) * 1e-4f;
    const uint16_t half = FloatToHalf(value);
    if (type == WeightType::kF32) {
      std::memcpy(&file[at], &value, sizeof value);
    } else if (type == WeightType::kBF16) {
      file[at + 1] = 0x3c;  // about 0.01
    } else {
      std::memcpy(&file[at + ScaleOffset(type)], &half, sizeof half);
    }
    if (HasMin(type)) std::memcpy(&file[at + ScaleOffset(type) + 2], &half, sizeof half);
  }
  const uint8_t* rows[kPanelRows];
  for (size_t r = 0; r < kPanelRows; ++r) rows[r] = file.data() + r * RowBytes(type, k);
  PackPanel(type, rows, k, panel);
}

void CheckSizes(WeightType type, size_t n, size_t k, size_t batch) {
  constexpr size_t kMost = size_t{1} << 24;  // so that no product of three overflows size_t
  const TypeInfo& info = InfoOf(type);
  if (n > kMost || k > kMost || batch > kMost)
    throw UsageError("a benchmark takes sizes of at most " + std::to_string(kMost));
  if (n == 0 || k == 0 || batch == 0) throw UsageError("a benchmark needs sizes above 0");
  if (k % info.block_values != 0) {
    throw UsageError(std::to_string(k) + " columns: " + info.name + " needs a multiple of " +
                     std::to_string(info.block_values));
  }
}

}  // namespace

struct MatMulBenchmark::State {
  State(const MatMulTable& kernels, WeightType weight_type, size_t n, size_t k, size_t batch_rows,
        size_t weight_bytes)
      : table(kernels),
        type(weight_type),
        n_panels((n + kPanelRows - 1) / kPanelRows),
        panel_bytes(PanelBytes(type, k)),
        copies(weight_bytes / (n_panels * panel_bytes) + 1),
        weights(Allocate(copies * n_panels * panel_bytes)),
        prepared(Allocate(PreparedBytes(GrainOf(type), batch_rows, k))),
        rows{GrainOf(type), batch_rows, k, prepared.get()},
        out(batch_rows * n_panels * kPanelRows) {
    std::mt19937 random(7);
    const size_t different = std::min<size_t>(n_panels, 64);
    for (size_t p = 0; p < copies * n_panels; ++p) {
      uint8_t* panel = weights.get() + p * panel_bytes;
      if (p < different) {
        FillPanel(type, k, random, panel);
      } else {
        std::memcpy(panel, weights.get() + p % different * panel_bytes, panel_bytes);
      }
    }
    std::vector<float> x(batch_rows * k);
    for (float& value : x) value = static_cast<float>(random() % 2001) * 1e-3f - 1.0f;
    PrepareRows(table, rows.grain, x.data(), k, batch_rows, k, 0, batch_rows, prepared.get());
  }

  const MatMulTable& table;
  WeightType type;
  size_t n_panels;
  size_t panel_bytes;
  size_t copies;
  size_t next_copy = 0;
  Buffer weights;
  Buffer prepared;
  PreparedRows rows;
  std::vector<float> out;
};

MatMulBenchmark::MatMulBenchmark(const MatMulTable& table, WeightType type, size_t n, size_t k,
                                 size_t batch, size_t weight_bytes) {
  CheckSizes(type, n, k, batch);
  state_ = std::make_unique<State>(table, type, n, k, batch, weight_bytes);
}

MatMulBenchmark::~MatMulBenchmark() = default;

double MatMulBenchmark::MedianSeconds(Pool& pool, size_t rounds) {
  if (rounds == 0) throw UsageError("a benchmark needs rounds above 0");
  State& state = *state_;
  const Buffer scratch = Allocate(pool.threads() * MatMulScratchBytes());
  const size_t pieces = (state.n_panels + kPanelsAtOnce - 1) / kPanelsAtOnce;
  const size_t grain = std::max<size_t>(1, kPieceBytes / (state.panel_bytes * kPanelsAtOnce));
  std::vector<double> seconds(rounds);
  for (double& taken : seconds) {
    const uint8_t* panels =
        state.weights.get() + state.next_copy * state.n_panels * state.panel_bytes;
    state.next_copy = (state.next_copy + 1) % state.copies;
    const auto start = std::chrono::steady_clock::now();
    pool.Run(pieces, grain, [&](size_t thread, size_t first, size_t last) {
      const size_t begin = first * kPanelsAtOnce;
      const size_t end = std::min(state.n_panels, last * kPanelsAtOnce);
      MatMul(state.table, state.type, panels + begin * state.panel_bytes, end - begin, state.rows,
             state.out.data() + begin * kPanelRows, state.n_panels * kPanelRows,
             scratch.get() + thread * MatMulScratchBytes());
    });
    taken = std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
  }
  const auto middle = seconds.begin() + static_cast<std::ptrdiff_t>(rounds / 2);
  std::nth_element(seconds.begin(), middle, seconds.end());
  return *middle;
}

double BenchmarkMatMul(Pool& pool, const MatMulTable& table, WeightType type, size_t n, size_t k,
                       size_t batch, size_t rounds, size_t weight_bytes) {
  if (weight_bytes > kMostWeightBytes) {
    throw UsageError("weight_bytes: at most " + std::to_string(kMostWeightBytes) + ", not " +
                     std::to_string(weight_bytes));
  }
  return MatMulBenchmark(table, type, n, k, batch, weight_bytes).MedianSeconds(pool, rounds);
}

}  // namespace potluck
