// The packed layout of a matrix (P8k4): panels of 8 rows interleaved by 4 values, same size as the
// file's blocks.
//
// A panel is read from start to end by one thread; row r of the panel is lane r of every vector. It
// is a run of records. Codes come in vectors of 32 bytes, byte 4r+i being row r, and 32 values of
// 8 rows are a run of them:
//   nibbles [4]  vector v: low nibble k = 4v+i, high nibble k = 16+4v+i
//   twos    [2]  vector t, bits 2j and 2j+1: k = 16t+4j+i
//   plane   [1]  bit g: k = 4g+i
//   bytes   [8]  vector g: k = 4g+i
//
// Blocks of 32: a record is g blocks of each row, g = RecordBlocks(k), scales (f16, [g][8]) first.
//   Q4_0   d, then nibbles               Q4_1   d, m, then nibbles
//   Q5_0   d, then nibbles, plane        Q5_1   d, m, then nibbles, plane     (bit 4 in the plane)
//   Q8_0   d, then bytes
// Blocks of 256: a record is one block of each row: d f16 [8], dmin f16 [8] if there are mins, the
// fields of scales, then 8 runs.
//   Q2_K   dmin; scale and min of a sub-block of 16 as nibbles of a byte [16][8]; twos
//   Q3_K   scales of 6 bits: bytes [8][8], low nibble of sub-block s in the low half, of s+8 in the
//          high half; then bytes [4][8], bits 2(s/4) and up of byte s%4 the top two bits; twos,
//          plane (bit 2)
//   Q4_K   dmin; sub-blocks of 32: bytes [8][8], low nibbles of scale and min; then bytes [4][8],
//          nibble s/4 of byte s%4 the top two bits of the scale, then of the min; nibbles
//   Q5_K   as Q4_K, and a plane (bit 4)
//   Q6_K   scales i8 [16][8]; nibbles, twos (bits 4 and 5; docs/decisions/0010)
// F32, F16, BF16   [k][8]
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

// One block of all 8 rows, decoded; for the scalar kernels and UnpackRow. Sub-blocks have 16
// values: two share the scale of a type whose scales are for 32.
struct PanelBlock {
  int8_t codes[kPanelRows][256];  // less the centre (Q4_0 8, Q5_0 16, Q3_K 4, Q6_K 32)
  int8_t scales[kPanelRows][16];  // K types; Q3_K less 32
  int8_t mins[kPanelRows][16];    // Q2_K, Q4_K, Q5_K
  float d[kPanelRows];            // float types: the value itself
  float m[kPanelRows];            // Q4_1, Q5_1; dmin of Q2_K, Q4_K, Q5_K
};
void ReadPanelBlock(WeightType type, const uint8_t* panel, size_t k, size_t block, PanelBlock& out);

// Whether a value is scale * code + min (blocks of 32) or scale * code - min (K types).
bool HasMin(WeightType type);

}  // namespace potluck
