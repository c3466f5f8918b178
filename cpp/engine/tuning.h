// How many threads a machine should use: all of them are not always the fastest.
#pragma once

#include <cstddef>
#include <vector>

#include "engine/kernels/matmul_table.h"
#include "engine/pool.h"

namespace potluck {

// The first of `counts`, which ascend, that takes about as long as the fastest: readings differ by
// some percent, and fewer threads that are as good leave the rest to others. Both alike in size,
// not empty.
size_t FewestAsFast(const std::vector<size_t>& counts, const std::vector<double>& seconds);

// Measures Q4_0 products of one row (decode: bound by memory, which fewer threads may saturate) and
// of many (prefill: bound by arithmetic, which slow cores and siblings may hold up) with all
// threads and with fewer, and allots the pool the fewest that are as fast as the best; all of them
// where others used the CPUs meanwhile, for then the figures say nothing of a quiet machine.
// Weights are read out of `weight_bytes` of memory, which should be several times the last cache.
// Takes some tenths of a second. UsageError: weight_bytes below 1 MiB.
void TuneThreads(Pool& pool, const MatMulTable& table, size_t weight_bytes);

}  // namespace potluck
