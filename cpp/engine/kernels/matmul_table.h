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
// Up to so many rows several narrow passes over a panel, which is in the cache after the first,
// cost less than unpacking it for tiles (16 rows by 4096 columns: 0.6 of the time on Zen 5, VNNI).
constexpr size_t kFewRows = 64;

// What a thread has for unpacked codes and scales of a chunk of K, and for sums.
constexpr size_t kScratchBytes = size_t{64} * 1024;

// Prepared rows lie in groups. The `rows` rows of a group are interleaved by words of 4 bytes: word
// j of row i stands at word [j * rows + i] of each array. They are as few as hold at most 8 rows
// each, or 4 where kernels have tiles for that: beyond kFewRows, kFloat beyond 8. And they are
// nearly equal, so that none is nearly empty (9 = 5+4; ik_llama.cpp #71). Arrays are byte
// offsets into the buffer of all rows.
struct RowGroup {
  size_t first;   // row of the batch
  size_t rows;    // 1..8
  size_t codes;   // [k/4] words of four int8 codes; kFloat: [k] words, f32
  size_t scales;  // f32 d; kBlock32: [k/32]; kBlock256: [k/256]
  // kBlock32: f32 d * (sum of the block's codes), [k/32]; kBlock256: sums of the codes of two
  // sub-blocks of 16 as a pair of int16, [k/32].
  size_t sums;
  // Starts of the kernels' int16 sums: (-c*S01, -c*S23) as a pair of int16, S01 being the sum of
  // the codes with k mod 4 in {0, 1}, S23 of the others. kBlock32: c = 8, [k/32]; kBlock256: c =
  // 32, [k/16].
  size_t seeds;
};

namespace {

// Words of 4 bytes that one prepared row takes.
[[maybe_unused]] inline size_t PreparedWords(Grain grain, size_t k) {
  if (grain == Grain::kFloat) return k;
  return grain == Grain::kBlock32 ? k / 4 + 3 * (k / 32) : k / 4 + k / 256 + k / 32 + k / 16;
}

[[maybe_unused]] inline size_t GroupCount(Grain grain, size_t rows) {
  const size_t few = grain == Grain::kFloat ? kNarrowRows : kFewRows;
  const size_t most = rows > few ? kTileRows : kNarrowRows;
  return (rows + most - 1) / most;
}

// How many of the first groups are one row longer than the others.
[[maybe_unused]] inline size_t LongGroups(Grain grain, size_t rows) {
  return rows % GroupCount(grain, rows);
}

[[maybe_unused]] inline RowGroup GroupAt(Grain grain, size_t rows, size_t k, size_t index) {
  const size_t least = rows / GroupCount(grain, rows);
  const size_t n_long = LongGroups(grain, rows);
  RowGroup group = {0, least, 0, 0, 0, 0};
  if (index < n_long) group.rows = least + 1;
  group.first = index * least + (index < n_long ? index : n_long);
  group.codes = group.first * PreparedWords(grain, k) * 4;
  group.scales = group.codes + k * group.rows;
  group.sums = group.scales + k / (grain == Grain::kBlock256 ? 256 : 32) * group.rows * 4;
  group.seeds = group.sums + k / 32 * group.rows * 4;
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
// Defined where POTLUCK_X86 is; the CPU must have AVX2, FMA, F16C and BMI2.
const MatMulTable* Avx2MatMulTable();
// Where POTLUCK_AVXVNNI is; needs AVX-VNNI too.
const MatMulTable* AvxVnniMatMulTable();
// Where POTLUCK_AVX512VNNI is; needs AVX-512 F, BW, DQ, VL and VNNI beside AVX2.
const MatMulTable* Avx512VnniMatMulTable();
// Defined where POTLUCK_ARM64 is.
const MatMulTable* NeonMatMulTable();
// Where POTLUCK_DOTPROD is; the CPU must have the dot product instructions.
const MatMulTable* DotProdMatMulTable();
// Where POTLUCK_I8MM is; and those for matrices of bytes.
const MatMulTable* I8mmMatMulTable();

}  // namespace potluck
