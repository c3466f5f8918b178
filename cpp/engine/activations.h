// Rows of a batch made ready for matrices: norm and quantization, once for all matrices of a phase.
//
// Up to kOwnRows rows every thread prepares its own copy inside the phase that uses it: that is
// cheaper than a barrier and gives the same bits. More rows are prepared in a phase of their own.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <vector>

#include "engine/buffer.h"
#include "engine/kernels/table.h"
#include "engine/matmul.h"
#include "engine/step.h"
#include "engine/weights.h"

namespace potluck {

// Rows [n_rows, k], one after the other. norm is the RMS norm's weights [k], or null: as they are.
struct Rows {
  const float* x;
  size_t n_rows;
  size_t k;
  const float* norm;
};

class Activations {
 public:
  static constexpr size_t kOwnRows = kPartRows;

  Activations(const KernelTable& kernels, float norm_eps, size_t threads);

  // Room for n_rows rows of at most k values.
  void Reserve(size_t n_rows, size_t k);

  // Takes the rows that the next phase multiplies with the given matrices; runs a phase if they
  // are many. False: a value was not finite.
  bool Begin(Step& step, const Rows& rows, std::initializer_list<const Matrix*> matrices);

  // The rows as a matrix of this type needs them, inside the phase after Begin; `thread` is the
  // caller's. Null data: a value was not finite, and the failure is reported.
  PreparedRows Get(Step& step, size_t thread, WeightType type);

  size_t scratch_bytes() const;

 private:
  static constexpr size_t kGrains = 3;
  struct Copy {
    Buffer<float> normed;                           // [n_rows, k]
    std::array<Buffer<uint8_t>, kGrains> prepared;  // by grain
    uint64_t phase = 0;                             // that it was prepared for
    bool is_finite = true;
  };

  bool Prepare(Step& step, size_t first, size_t last, Copy* copy);
  static void ReportRow(Step& step, const float* x, size_t k, size_t first, size_t last);

  const KernelTable& kernels_;
  float norm_eps_;
  uint64_t phase_ = 0;  // counts Begin
  Rows rows_{};
  std::array<bool, kGrains> is_needed_{};  // by grain
  Copy shared_;
  std::vector<Copy> own_;  // by thread, kOwnRows rows each
};

}  // namespace potluck
