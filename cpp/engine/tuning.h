// How many threads a machine should use: all of them are not always the fastest.
#pragma once

#include <cstddef>

#include "engine/kernels/matmul_table.h"
#include "engine/pool.h"

namespace potluck {

// Measures Q4_0 products of one row (decode: bound by memory, which fewer threads may saturate) and
// of many (prefill: bound by arithmetic, which slow cores and siblings may hold up) with all
// threads and with fewer, and allots the pool the fewest that are as fast as the best. Weights are
// read out of `weight_bytes` of memory, which should be several times the last cache. Takes some
// tenths of a second. UsageError: weight_bytes below 1 MiB.
void TuneThreads(Pool& pool, const MatMulTable& table, size_t weight_bytes);

}  // namespace potluck
