// The packed layout of a matrix (P8k4): panels of 8 rows interleaved by 4 values, same size as the file's blocks.
#pragma once

#include <cstddef>
#include <cstdint>

#include "engine/types.h"

namespace potluck {

// Bytes of one panel (8 rows of k values) and of a whole matrix [n, k]; the last panel is padded with zeros.
size_t PanelBytes(WeightType type, size_t k);
size_t PackedBytes(WeightType type, size_t n, size_t k);

enum class PackResult { kOk, kNotFinite };  // a scale (or a float weight) is NaN or infinite

// Packs up to 8 rows of the file's layout into one panel. rows[r] points at row r's file bytes; null: a zero row.
PackResult PackPanel(WeightType type, const uint8_t* const rows[kPanelRows], size_t k, uint8_t* panel);

// Row `row` (0..7) of a panel as floats: out[k]. Exact: what the file's block says, as the gguf package dequantizes.
void UnpackRow(WeightType type, const uint8_t* panel, size_t row, size_t k, float* out);

}  // namespace potluck
