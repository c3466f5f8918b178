// How long a matrix takes: the figure behind kernel benchmarks, and nothing that serving needs.
#pragma once

#include <cstddef>

#include "engine/kernels/matmul_table.h"
#include "engine/pool.h"
#include "engine/types.h"

namespace potluck {

// Median seconds, over `rounds`, of one product of a [n, k] matrix of seeded random weights with
// `batch` prepared rows. Each round takes another copy of the weights, so that they come from
// memory: all copies together are several times any last cache. UsageError: a size is 0 or
// beyond 2^24, or k is not made of whole blocks.
double BenchmarkMatMul(Pool& pool, const MatMulTable& table, WeightType type, size_t n, size_t k,
                       size_t batch, size_t rounds);

}  // namespace potluck
