#include "engine/activations.h"

#include <algorithm>
#include <cmath>

#include "engine/finite.h"
#include "engine/kernels/vector_table.h"

namespace potluck {
namespace {

size_t IndexOf(Grain grain) { return static_cast<size_t>(grain); }

}  // namespace

Activations::Activations(const KernelTable& kernels, float norm_eps, size_t threads)
    : kernels_(kernels), norm_eps_(norm_eps), own_(threads) {}

void Activations::Reserve(size_t n_rows, size_t k) {
  const auto reserve = [&](Copy& copy, size_t rows) { copy.normed.Reserve(rows * k); };
  for (Copy& copy : own_) reserve(copy, std::min(n_rows, kOwnRows));
  if (n_rows > kOwnRows) reserve(shared_, n_rows);
}

bool Activations::Begin(Step& step, const Rows& rows,
                        std::initializer_list<const Matrix*> matrices) {
  ++phase_;
  rows_ = rows;
  is_needed_ = {};
  for (const Matrix* matrix : matrices) is_needed_[IndexOf(GrainOf(matrix->type))] = true;
  const bool is_shared = rows.n_rows > kOwnRows;
  for (size_t grain = 0; grain < kGrains; ++grain) {
    if (!is_needed_[grain]) continue;
    // The first steps of a size find out which grains the span has; later ones reserve nothing.
    const size_t bytes = PreparedBytes(static_cast<Grain>(grain), rows.n_rows, rows.k);
    if (is_shared) {
      shared_.prepared[grain].Reserve(bytes);
    } else {
      for (Copy& copy : own_) copy.prepared[grain].Reserve(bytes);
    }
  }
  if (!is_shared) return true;
  return step.Run(PartCount(rows.n_rows), 1, [&](size_t, size_t first, size_t last) {
    Prepare(step, FirstOfPart(rows_.n_rows, first), FirstOfPart(rows_.n_rows, last), &shared_);
  });
}

PreparedRows Activations::Get(Step& step, size_t thread, WeightType type) {
  const Grain grain = GrainOf(type);
  Copy& copy = rows_.n_rows > kOwnRows ? shared_ : own_[thread];
  if (&copy != &shared_ && copy.phase != phase_) {
    copy.is_finite = Prepare(step, 0, rows_.n_rows, &copy);
    copy.phase = phase_;
  }
  const uint8_t* data = copy.is_finite ? copy.prepared[IndexOf(grain)].data() : nullptr;
  return {grain, rows_.n_rows, rows_.k, data};
}

size_t Activations::scratch_bytes() const {
  size_t bytes = 0;
  const auto add = [&](const Copy& copy) {
    bytes += copy.normed.bytes();
    for (const auto& prepared : copy.prepared) bytes += prepared.bytes();
  };
  add(shared_);
  for (const Copy& copy : own_) add(copy);
  return bytes;
}

bool Activations::Prepare(Step& step, size_t first, size_t last, Copy* copy) {
  const float* x = rows_.x;
  if (rows_.norm != nullptr) {
    for (size_t row = first; row < last; ++row) {
      float* const normed = copy->normed.data() + row * rows_.k;
      if (kernels_.vector->rms_norm(rows_.x + row * rows_.k, rows_.norm, rows_.k, norm_eps_,
                                    normed)) {
        continue;
      }
      step.failure.Report(row);
      return false;
    }
    x = copy->normed.data();
  }
  bool is_finite = true;
  for (size_t grain = 0; grain < kGrains; ++grain) {
    if (!is_needed_[grain]) continue;
    is_finite &= PrepareRows(*kernels_.matmul, static_cast<Grain>(grain), x, rows_.k, rows_.n_rows,
                             rows_.k, first, last, copy->prepared[grain].data());
  }
  if (!is_finite) ReportRow(step, x, rows_.k, first, last);
  return is_finite;
}

void Activations::ReportRow(Step& step, const float* x, size_t k, size_t first, size_t last) {
  for (size_t row = first; row < last; ++row) {
    if (!std::isfinite(LargestMagnitude(x + row * k, k))) return step.failure.Report(row);
  }
  step.failure.Report(first);
}

}  // namespace potluck
