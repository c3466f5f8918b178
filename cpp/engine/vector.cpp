#include "engine/vector.h"

#include <cmath>
#include <limits>

#include "engine/canon.h"

namespace potluck {

double LogSumExp(const VectorTable& table, const float* x, size_t n) {
  constexpr double kInfinity = std::numeric_limits<double>::infinity();
  if (n == 0) return -kInfinity;
  for (size_t i = 0; i < n; ++i)
    if (std::isnan(x[i])) return std::numeric_limits<double>::quiet_NaN();
  const float largest = table.max(x, n);
  if (std::isinf(largest)) return static_cast<double>(largest);
  return static_cast<double>(largest) + LogDouble(table.sum_exp(x, n, largest));
}

}  // namespace potluck
