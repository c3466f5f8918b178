// The angles of rotary embeddings, the same bits on every machine.
#pragma once

#include <cstddef>
#include <vector>

#include "engine/config.h"

namespace potluck {

// Pair i of a head is turned by position * f rad, i < dim / 2. Without scaling f is
// theta^(-2i / dim) (arXiv:2104.09864, section 3.2.2). Divisors and factor divide it. YaRN
// (arXiv:2309.00071) keeps fast pairs from the factor, those between fast and slow partly, and
// multiplies cosine and sine by 1 + 0.1 ln(factor); the magnitude multiplies them, too. llama.cpp
// does the same in f32. Immutable; any thread may call.
class Rope {
 public:
  Rope() = default;
  // dim: values of a head that are turned; scaling: in the ranges of Check (config.h). UsageError:
  // dim odd or 0, theta not above 0 or not finite.
  Rope(double theta, size_t dim, const RopeScaling& scaling = {});
  size_t half() const { return frequencies_.size(); }
  // cosine[half], sine[half] of one position (below 2^25), in f64 and then rounded to f32.
  void Angles(size_t position, float* cosine, float* sine) const;

 private:
  std::vector<double> frequencies_;  // [dim / 2], radians a position
  double magnitude_ = 1;             // of cosine and sine
};

}  // namespace potluck
