// One matrix times a batch, from a file's bytes to the result: what tests compare with other
// people's arithmetic.
#pragma once

#include <cstddef>
#include <cstdint>

#include "engine/kernels/table.h"
#include "engine/pool.h"
#include "engine/types.h"

namespace potluck {

// out[batch, rows] = x[batch, cols] . weights^T; weights: rows * RowBytes(type, cols) bytes as in a
// file. Packed, prepared and multiplied as in a forward. UsageError: a size of 0, cols not whole
// blocks. ModelError: a scale that is not finite. FrameError: an x that is not finite.
void MultiplyFileRows(Pool& pool, const KernelTable& kernels, WeightType type, size_t rows,
                      size_t cols, const uint8_t* weights, const float* x, size_t batch,
                      float* out);

}  // namespace potluck
