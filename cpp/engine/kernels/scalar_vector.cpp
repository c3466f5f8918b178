// The vector kernels that define the answer, one value at a time.
#include <cmath>

#include "engine/canon.h"
#include "engine/kernels/vector_table.h"

namespace potluck {
namespace {

constexpr size_t kLanes = 16;

template <class T>
T Tree(T* lanes) {
  for (size_t width = kLanes / 2; width > 0; width /= 2)
    for (size_t j = 0; j < width; ++j) lanes[j] = lanes[j] + lanes[j + width];
  return lanes[0];
}

bool RmsNorm(const float* x, const float* w, size_t n, float eps, float* out) {
  float lanes[kLanes] = {};
  for (size_t i = 0; i < n; ++i) lanes[i % kLanes] = std::fma(x[i], x[i], lanes[i % kLanes]);
  const float inv = 1.0f / std::sqrt(Tree(lanes) / static_cast<float>(n) + eps);
  for (size_t i = 0; i < n; ++i) out[i] = (x[i] * inv) * w[i];
  return inv > 0.0f;  // 0 for an infinite sum, NaN for a NaN
}

void SiluMul(const float* gate, const float* up, size_t n, float* out) {
  for (size_t i = 0; i < n; ++i) out[i] = (gate[i] / (1.0f + Exp(-gate[i]))) * up[i];
}

void Add(const float* a, size_t n, float* x) {
  for (size_t i = 0; i < n; ++i) x[i] = x[i] + a[i];
}

void Rotate(const float* cosine, const float* sine, size_t half, float* x) {
  for (size_t i = 0; i < half; ++i) {
    const float a = x[i];
    const float b = x[i + half];
    x[i] = std::fma(a, cosine[i], -(b * sine[i]));
    x[i + half] = std::fma(b, cosine[i], a * sine[i]);
  }
}

void ExpRow(const float* x, size_t n, float* out) {
  for (size_t i = 0; i < n; ++i) out[i] = Exp(x[i]);
}

float Max(const float* x, size_t n) {
  float largest = x[0];
  for (size_t i = 1; i < n; ++i) largest = x[i] > largest ? x[i] : largest;
  return largest;
}

double SumExp(const float* x, size_t n, float shift) {
  double lanes[kLanes] = {};
  for (size_t i = 0; i < n; ++i)
    lanes[i % kLanes] = lanes[i % kLanes] + static_cast<double>(Exp(x[i] - shift));
  return Tree(lanes);
}

const VectorTable kTable = {RmsNorm, SiluMul, Add, Rotate, ExpRow, Max, SumExp};

}  // namespace

const VectorTable* ScalarVectorTable() { return &kTable; }

}  // namespace potluck
