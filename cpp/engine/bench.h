// How long a matrix takes: the figure behind kernel benchmarks and the choice of thread counts.
#pragma once

#include <cstddef>
#include <memory>

#include "engine/kernels/matmul_table.h"
#include "engine/pool.h"
#include "engine/types.h"

namespace potluck {

// A [n, k] matrix of seeded random weights and `batch` prepared rows, ready to be multiplied.
class MatMulBenchmark {
 public:
  // There are as many copies of the weights as fill `weight_bytes`, at least one. UsageError: a
  // size is 0 or beyond 2^24, or k is not made of whole blocks.
  MatMulBenchmark(const MatMulTable& table, WeightType type, size_t n, size_t k, size_t batch,
                  size_t weight_bytes);
  ~MatMulBenchmark();
  MatMulBenchmark(const MatMulBenchmark&) = delete;
  MatMulBenchmark& operator=(const MatMulBenchmark&) = delete;

  // Median over `rounds` of one product. Each round takes the next copy of the weights, so that
  // they come from memory. UsageError: rounds is 0.
  double MedianSeconds(Pool& pool, size_t rounds);

 private:
  struct State;
  std::unique_ptr<State> state_;
};

// The same once. Takes weight_bytes and one matrix more. UsageError: weight_bytes above 1 TiB.
double BenchmarkMatMul(Pool& pool, const MatMulTable& table, WeightType type, size_t n, size_t k,
                       size_t batch, size_t rounds, size_t weight_bytes);

}  // namespace potluck
