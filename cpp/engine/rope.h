// The angles of rotary embeddings, the same bits on every machine.
#pragma once

#include <cstddef>
#include <vector>

namespace potluck {

// Pair i of a head is turned by position * theta^(-2i / dim) rad, i < dim / 2 (arXiv:2104.09864,
// section 3.2.2). Immutable; any thread may call.
class Rope {
 public:
  Rope() = default;
  // dim: values of a head that are turned. UsageError: odd or 0, theta not above 0 or not finite.
  Rope(double theta, size_t dim);
  size_t half() const { return frequencies_.size(); }
  // cosine[half], sine[half] of one position (below 2^25), in f64 and then rounded to f32.
  void Angles(size_t position, float* cosine, float* sine) const;

 private:
  std::vector<double> frequencies_;  // [dim / 2], radians a position
};

}  // namespace potluck
