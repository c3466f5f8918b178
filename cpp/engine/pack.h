// The packed layout of a matrix (P8k4): panels of 8 rows interleaved by 4 values, same size as the
// file's blocks.
//
// A panel is read from start to end by one thread; row r of the panel is lane r of every vector. It
// is a run of records, and a record is g blocks of each row, scales first (f16, [g][8] each). g =
// RecordBlocks(k): 4, 2 or 1.
//   Q4_0   d[g][8], codes [g][4][32]       vector v, byte 4r+i: low nibble k = 4v+i, high nibble k
//   = 16+4v+i Q4_1   d[g][8], m[g][8], codes as Q4_0 Q8_0   d[g][8], codes [g][8][32]       vector
//   v, byte 4r+i: k = 4v+i Q6_K   one superblock of 256 a record: d[8], scales i8 [16][8], then 8
//   times (32 values): nibbles [4][32] as Q4_0,
//          tops [2][32]; vector t, byte 4r+i, bits 2j, 2j+1: bits 4, 5 of k = 16t+4j+i
//   F32, F16, BF16   [k][8]
#pragma once

#include <cstddef>
#include <cstdint>

#include "engine/types.h"

namespace potluck {

// Blocks of 32 in one record of a panel with rows of k values.
size_t RecordBlocks(size_t k);

// Bytes of one panel (8 rows of k values) and of a whole matrix [n, k]; the last panel is padded
// with zeros.
size_t PanelBytes(WeightType type, size_t k);
size_t PackedBytes(WeightType type, size_t n, size_t k);

enum class PackResult { kOk, kNotFinite };  // a scale (or a float weight) is NaN or infinite

// Packs up to 8 rows of the file's layout into one panel. rows[r] points at row r's file bytes;
// null: a zero row.
PackResult PackPanel(WeightType type, const uint8_t* const rows[kPanelRows], size_t k,
                     uint8_t* panel);

// Row `row` (0..7) of a panel as floats: out[k]. Exact: what the file's block says, as the gguf
// package dequantizes.
void UnpackRow(WeightType type, const uint8_t* panel, size_t row, size_t k, float* out);

// One block of all 8 rows, decoded; for the scalar kernels and UnpackRow.
struct PanelBlock {
  int8_t codes[kPanelRows][256];  // less the centre (Q4_0 8, Q6_K 32)
  int8_t scales[kPanelRows][16];  // Q6_K
  float d[kPanelRows];            // float types: the value itself
  float m[kPanelRows];            // Q4_1
};
void ReadPanelBlock(WeightType type, const uint8_t* panel, size_t k, size_t block, PanelBlock& out);

}  // namespace potluck
