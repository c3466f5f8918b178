#include "engine/product.h"

#include <algorithm>
#include <atomic>
#include <string>

#include "engine/buffer.h"
#include "engine/errors.h"
#include "engine/matmul.h"
#include "engine/pack.h"

namespace potluck {
namespace {

size_t CeilDiv(size_t n, size_t unit) { return (n + unit - 1) / unit; }

void PackAll(Pool& pool, WeightType type, size_t rows, size_t cols, const uint8_t* weights,
             uint8_t* packed) {
  const size_t row_bytes = RowBytes(type, cols);
  const size_t panel_bytes = PanelBytes(type, cols);
  std::atomic<bool> is_finite{true};
  pool.Run(CeilDiv(rows, kPanelRows), 1, [&](size_t, size_t first, size_t last) {
    for (size_t panel = first; panel < last; ++panel) {
      const uint8_t* sources[kPanelRows] = {};
      for (size_t r = 0; r < std::min(kPanelRows, rows - panel * kPanelRows); ++r)
        sources[r] = weights + (panel * kPanelRows + r) * row_bytes;
      if (PackPanel(type, sources, cols, packed + panel * panel_bytes) != PackResult::kOk)
        is_finite.store(false, std::memory_order_relaxed);
    }
  });
  if (!is_finite.load(std::memory_order_relaxed))
    throw ModelError("weights: a scale or a weight is NaN or infinite");
}

}  // namespace

void MultiplyFileRows(Pool& pool, const KernelTable& kernels, WeightType type, size_t rows,
                      size_t cols, const uint8_t* weights, const float* x, size_t batch,
                      float* out) {
  const size_t block = InfoOf(type).block_values;
  if (rows == 0 || cols == 0 || batch == 0)
    throw UsageError("rows, cols and batch: at least 1 each, not " + std::to_string(rows) + ", " +
                     std::to_string(cols) + " and " + std::to_string(batch));
  if (cols % block != 0)
    throw UsageError(std::string("cols of ") + InfoOf(type).name + ": whole blocks of " +
                     std::to_string(block) + ", not " + std::to_string(cols));
  Buffer<uint8_t> packed;
  packed.Reserve(PackedBytes(type, rows, cols));
  PackAll(pool, type, rows, cols, weights, packed.data());

  const Grain grain = GrainOf(type);
  Buffer<uint8_t> prepared;
  prepared.Reserve(PreparedBytes(grain, batch, cols));
  std::atomic<bool> is_finite{true};
  pool.Run(PartCount(batch), 1, [&](size_t, size_t first, size_t last) {
    if (!PrepareRows(*kernels.matmul, grain, x, cols, batch, cols, FirstOfPart(batch, first),
                     FirstOfPart(batch, last), prepared.data()))
      is_finite.store(false, std::memory_order_relaxed);
  });
  if (!is_finite.load(std::memory_order_relaxed)) throw FrameError("x: a value is NaN or infinite");

  // The last panel may be padded, so rows of the product are whole panels here.
  const size_t n_panels = CeilDiv(rows, kPanelRows);
  const size_t stride = n_panels * kPanelRows;
  Buffer<float> product;
  product.Reserve(batch * stride);
  Buffer<uint8_t> scratch;
  scratch.Reserve(pool.threads() * MatMulScratchBytes());
  const PreparedRows prepared_rows = {grain, batch, cols, prepared.data()};
  pool.Run(n_panels, 4, [&](size_t thread, size_t first, size_t last) {
    MatMul(*kernels.matmul, type, packed.data() + first * PanelBytes(type, cols), last - first,
           prepared_rows, product.data() + first * kPanelRows, stride,
           scratch.data() + thread * MatMulScratchBytes());
  });
  for (size_t m = 0; m < batch; ++m) std::copy_n(product.data() + m * stride, rows, out + m * rows);
}

}  // namespace potluck
