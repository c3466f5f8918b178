// Kernels over one row of f32 values: norm, activation, residual, rotation, exponential.
//
// None asks for alignment. Buffers don't overlap, but out may be an input where it says so.
// Included by kernel files: no STL and no inline code.
#pragma once

#include <cstddef>

namespace potluck {

struct VectorTable {
  // out[i] = (x[i] * inv) * w[i], inv = 1 / sqrt(sum / n + eps). sum: lane j of 16 chains
  // fma(x[i], x[i], lane) over the i = j mod 16 in rising order; lanes are added in a tree,
  // 16 > 8 > 4 > 2 > 1: lane j += lane j + 8, and so on. n > 0; out may be x. False: the sum is
  // not finite (values from some 1e19 on), and out, though it may be zeros, means nothing.
  bool (*rms_norm)(const float* x, const float* w, size_t n, float eps, float* out);

  // out[i] = (gate[i] / (1 + exp(-gate[i]))) * up[i], exp as in canon.h; out may be gate or up.
  void (*silu_mul)(const float* gate, const float* up, size_t n, float* out);

  // x[i] = x[i] + a[i].
  void (*add)(const float* a, size_t n, float* x);

  // Turns the pairs a = x[i], b = x[i + half], i < half, by angles of rope.h:
  // a' = fma(a, cosine, -(b * sine)), b' = fma(b, cosine, a * sine).
  void (*rotate)(const float* cosine, const float* sine, size_t half, float* x);

  // out[i] = exp(x[i]) as in canon.h; out may be x.
  void (*exp)(const float* x, size_t n, float* out);

  // The largest of x[0..n), n > 0. Which zero, and what a NaN leads to, is not defined.
  float (*max)(const float* x, size_t n);

  // Sum of exp(x[i] - shift) in f64: 16 lanes, lane j chains the i = j mod 16 in rising order, and
  // the tree of rms_norm.
  double (*sum_exp)(const float* x, size_t n, float shift);
};

const VectorTable* ScalarVectorTable();
const VectorTable* Avx2VectorTable();
const VectorTable* NeonVectorTable();

}  // namespace potluck
