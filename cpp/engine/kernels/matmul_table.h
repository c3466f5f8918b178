// What the matrix kernels of every ISA share: the table, and the places of prepared rows.
//
// ISA files include this, so it holds no STL and no function with external linkage: what an ISA
// file compiles with its own flags must never become the copy that the linker keeps for all.
#pragma once

#include <cstddef>
#include <cstdint>

#include "engine/matmul.h"

namespace potluck {

constexpr size_t kNarrowRows = 8;  // so many rows are taken in one pass over the weights
constexpr size_t kTileRows = 4;    // rows of a GEMM tile

// Prepared rows lie in groups. The `rows` rows of a group are interleaved by words of 4 bytes: word
// j of row i stands at word [j * rows + i] of each array. M <= 8: one group. More: groups of 4 and
// up to three of 3, so that no tile of the GEMM is nearly empty (9 = 3+3+3; ik_llama.cpp #71).
// Arrays are byte offsets into the buffer of all rows.
struct RowGroup {
  size_t first;   // row of the batch
  size_t rows;    // 1..8
  size_t codes;   // [k/4] words of four int8 codes; kFloat: [k] words, f32
  size_t scales;  // f32 d; kBlock32: [k/32]; kBlock256: [k/256]
  size_t sums;    // kBlock32: f32 d * (sum of the block's codes), [k/32]
  // Starts of the kernels' int16 sums: (-c*S01, -c*S23) as a pair of int16, S01 being the sum of
  // the codes with k mod 4 in {0, 1}, S23 of the others. kBlock32: c = 8, [k/32]; kBlock256: c =
  // 32, [k/16].
  size_t seeds;
};

namespace {

// Words of 4 bytes that one prepared row takes.
[[maybe_unused]] inline size_t PreparedWords(Grain grain, size_t k) {
  if (grain == Grain::kFloat) return k;
  return grain == Grain::kBlock32 ? k / 4 + 3 * (k / 32) : k / 4 + k / 256 + k / 16;
}

[[maybe_unused]] inline size_t GroupCount(size_t rows) {
  return rows <= kNarrowRows ? 1 : (rows + kTileRows - 1) / kTileRows;
}

// Groups of kTileRows rows that come before those that are one row short; rows > kNarrowRows.
[[maybe_unused]] inline size_t FullGroups(size_t rows) {
  return rows - GroupCount(rows) * (kTileRows - 1);
}

[[maybe_unused]] inline RowGroup GroupAt(Grain grain, size_t rows, size_t k, size_t index) {
  RowGroup group = {0, rows, 0, 0, 0, 0};
  if (rows > kNarrowRows) {
    const size_t full = FullGroups(rows);
    group.rows = index < full ? kTileRows : kTileRows - 1;
    group.first = index * (kTileRows - 1) + (index < full ? index : full);
  }
  group.codes = group.first * PreparedWords(grain, k) * 4;
  group.scales = group.codes + k * group.rows;
  group.sums = group.scales + k / 32 * group.rows * 4;
  group.seeds = group.sums + k / 32 * group.rows * 4;
  if (grain == Grain::kBlock256) group.seeds = group.scales + k / 256 * group.rows * 4;
  return group;
}

}  // namespace

// The inner loops of one ISA. The scalar ones are the answer; others equal their bits.
struct MatMulTable {
  const char* name;  // "scalar", "avx2"
  // Prepares x[k] as row `lane` of `group` of the buffer dst. False: a value is NaN or infinite.
  bool (*prepare)(Grain grain, const float* x, size_t k, const RowGroup& group, size_t lane,
                  uint8_t* dst);
  // MatMul of matmul.h, for x.rows > 0 and n_panels > 0.
  void (*multiply)(WeightType type, const uint8_t* panels, size_t n_panels, const PreparedRows& x,
                   float* out, size_t out_stride, uint8_t* scratch);
};

const MatMulTable* ScalarMatMulTable();
// Defined where POTLUCK_X86 is; the CPU must have AVX2, FMA and F16C.
const MatMulTable* Avx2MatMulTable();
// The same; needs AVX-512 F, BW, DQ, VL and VNNI too.
const MatMulTable* Avx512VnniMatMulTable();

}  // namespace potluck
