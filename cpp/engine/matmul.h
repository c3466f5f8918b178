// Weights times activations: preparing rows, and the products of packed panels with them.
//
// The only door of the rest of the engine to the matrix kernels. Shapes: M rows of the batch, N
// output rows of a matrix, K its inner dimension; a panel is 8 rows of a matrix interleaved
// (pack.h).
#pragma once

#include <cstddef>
#include <cstdint>

#include "engine/types.h"

namespace potluck {

struct MatMulTable;  // kernels/matmul_table.h: the inner loops of one ISA

// How activations are prepared for a weight type.
enum class Grain {
  kFloat,     // f32 as they are: F32, F16, BF16 weights
  kBlock32,   // int8 codes and scale per 32 values: Q4_0, Q4_1, Q5_0, Q5_1, Q8_0
  kBlock256,  // int8 codes and scale per 256 values: K types
};
Grain GrainOf(WeightType type);

// M prepared rows; the layout of `data` belongs to matmul and its kernels.
struct PreparedRows {
  Grain grain;
  size_t rows;          // M
  size_t k;             // K
  const uint8_t* data;  // PreparedBytes(grain, rows, k) bytes, 64-byte aligned
};
size_t PreparedBytes(Grain grain, size_t rows, size_t k);

// Threads share the preparing of rows by parts of at most kPartRows: part i is the rows
// [FirstOfPart(rows, i), FirstOfPart(rows, i + 1)), i < PartCount(rows). Rows of one part may lie
// side by side in memory, word by word: two threads would take the cache lines from each other.
constexpr size_t kPartRows = 8;
size_t PartCount(size_t rows);
size_t FirstOfPart(size_t rows, size_t part);

// Prepares rows [first, last) of x ([rows, k], row r at x + r * stride) into dst, the buffer of all
// `rows` rows; each row once. False: a value is NaN or infinite. Source of the arithmetic:
// canonical arithmetic, step 1 (kernels/scalar_matmul.cpp).
bool PrepareRows(const MatMulTable& table, Grain grain, const float* x, size_t stride, size_t rows,
                 size_t k, size_t first, size_t last, uint8_t* dst);

// out[m * out_stride + 8 * p + r] = (row r of panel p) . (row m of x), for p < n_panels and every m
// < x.rows. Any n_panels: a thread calls it with its own share. Same bits whatever the share, M or
// ISA. scratch: MatMulScratchBytes() bytes a thread, 64-byte aligned.
void MatMul(const MatMulTable& table, WeightType type, const uint8_t* panels, size_t n_panels,
            const PreparedRows& x, float* out, size_t out_stride, uint8_t* scratch);
size_t MatMulScratchBytes();

// Kernels are fastest on multiples of so many panels: hand out shares in these units.
constexpr size_t kPanelsAtOnce = 4;

}  // namespace potluck
