#include "engine/rope.h"

#include <cmath>
#include <string>

#include "engine/canon.h"
#include "engine/errors.h"

namespace potluck {

Rope::Rope(double theta, size_t dim) : frequencies_(dim / 2) {
  if (dim == 0 || dim % 2 != 0)
    throw UsageError("rotary values: an even number, not " + std::to_string(dim));
  if (!std::isnormal(theta) || theta < 0)
    throw UsageError("rope_theta: a finite number above 0, not " + std::to_string(theta));
  for (size_t i = 0; i < dim / 2; ++i)
    frequencies_[i] = PowDouble(theta, -2.0 * static_cast<double>(i) / static_cast<double>(dim));
}

void Rope::Angles(size_t position, float* cosine, float* sine) const {
  for (size_t i = 0; i < frequencies_.size(); ++i) {
    double s = 0;
    double c = 0;
    SinCosDouble(static_cast<double>(position) * frequencies_[i], &s, &c);
    cosine[i] = static_cast<float>(c);
    sine[i] = static_cast<float>(s);
  }
}

}  // namespace potluck
