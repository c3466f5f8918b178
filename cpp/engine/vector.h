// What the engine asks of vectors beyond the kernels of one row (kernels/vector_table.h).
#pragma once

#include <cstddef>

#include "engine/kernels/vector_table.h"

namespace potluck {

// ln(sum(exp(x[i]))) in f64: the largest value, plus the logarithm of sum_exp with it as shift.
// The same bits on every ISA. n = 0 or all -inf: -inf. A NaN among them: NaN; else a +inf: +inf.
double LogSumExp(const VectorTable& table, const float* x, size_t n);

}  // namespace potluck
