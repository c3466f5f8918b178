#include "engine/matmul.h"

#include <algorithm>

#include "engine/kernels/matmul_table.h"

namespace potluck {
namespace {

// Index of the group that holds a row of the batch.
size_t GroupOf(Grain grain, size_t row, size_t rows) {
  const size_t least = rows / GroupCount(grain, rows);
  const size_t n_long = LongGroups(grain, rows);
  const size_t in_long = n_long * (least + 1);
  return row < in_long ? row / (least + 1) : n_long + (row - in_long) / least;
}

}  // namespace

Grain GrainOf(WeightType type) {
  switch (InfoOf(type).block_values) {
    case 32:
      return Grain::kBlock32;
    case 256:
      return Grain::kBlock256;
    default:
      return Grain::kFloat;
  }
}

size_t PreparedBytes(Grain grain, size_t rows, size_t k) {
  return (rows * PreparedWords(grain, k) * 4 + 63) / 64 * 64;
}

// As the groups of kBlock32 and kBlock256, unless there are many rows.
size_t PartCount(size_t rows) { return (rows + kPartRows - 1) / kPartRows; }

size_t FirstOfPart(size_t rows, size_t part) {
  const size_t least = rows / PartCount(rows);
  return part * least + std::min(part, rows % PartCount(rows));
}

bool PrepareRows(const MatMulTable& table, Grain grain, const float* x, size_t stride, size_t rows,
                 size_t k, size_t first, size_t last, uint8_t* dst) {
  bool finite = true;
  for (size_t row = first; row < last; ++row) {
    const RowGroup group = GroupAt(grain, rows, k, GroupOf(grain, row, rows));
    finite &= table.prepare(grain, x + row * stride, k, group, row - group.first, dst);
  }
  return finite;
}

void MatMul(const MatMulTable& table, WeightType type, const uint8_t* panels, size_t n_panels,
            const PreparedRows& x, float* out, size_t out_stride, uint8_t* scratch) {
  if (n_panels == 0 || x.rows == 0) return;
  table.multiply(type, panels, n_panels, x, out, out_stride, scratch);
}

size_t MatMulScratchBytes() { return kScratchBytes; }

}  // namespace potluck
