#include "engine/packing.h"

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstring>
#include <string>
#include <vector>

#include "engine/errors.h"
#include "engine/pack.h"

namespace potluck {
namespace {

constexpr size_t kPieceBytes = size_t{1} << 20;

float WidenedAt(WeightType type, const uint8_t* bytes, size_t i) {
  if (type == WeightType::kF32) {
    float value = 0;
    std::memcpy(&value, bytes + i * sizeof(value), sizeof(value));
    return value;
  }
  uint16_t bits = 0;
  std::memcpy(&bits, bytes + i * sizeof(bits), sizeof(bits));
  return type == WeightType::kF16 ? HalfToFloat(bits) : BFloatToFloat(bits);
}

// False: a value is not finite.
bool Widen(const TensorForm& form, const uint8_t* row, float* out) {
  bool finite = true;
  for (size_t i = 0; i < form.shape.cols; ++i) {
    out[i] = WidenedAt(form.type->type, row, form.FileRow(i));
    finite &= std::isfinite(out[i]);
  }
  return finite;
}

// Reads and packs panels [first, last), one slab at a time.
void PackPanels(const TensorForm& form, const RowReader& rows, size_t first, size_t last,
                uint8_t* slab, uint8_t* out) {
  const size_t row_bytes = form.row_bytes();
  for (size_t panel = first; panel < last; ++panel, out += form.panel_bytes()) {
    const size_t first_row = panel * kPanelRows;
    const size_t n_rows = std::min(kPanelRows, form.shape.rows - first_row);
    if (form.rope_dim > 0) {
      for (size_t r = 0; r < n_rows; ++r) {
        const size_t row = form.FileRow(first_row + r);
        rows.Read(row, row + 1, slab + r * row_bytes);
      }
    } else {
      rows.Read(first_row, first_row + n_rows, slab);
    }
    PackPanelOf(form, panel, [&](size_t row) { return slab + (row - first_row) * row_bytes; }, out);
  }
}

}  // namespace

size_t TensorForm::panel_bytes() const {
  return is_vector ? shape.cols * sizeof(float) : PanelBytes(type->type, shape.cols);
}

// Interleaved pairs (2i, 2i + 1) of a head come to lie at i and i + rope_dim / 2, so that one
// rotation serves all models; scores stay the same.
size_t TensorForm::FileRow(size_t row) const {
  if (rope_dim == 0) return row;
  const size_t in_head = row % head_dim;
  const size_t half = rope_dim / 2;
  if (in_head >= rope_dim) return row;
  return row - in_head + (in_head < half ? 2 * in_head : 2 * (in_head - half) + 1);
}

size_t TensorForm::PiecePanels() const { return std::max<size_t>(1, kPieceBytes / panel_bytes()); }

bool IsFloat(WeightType type) {
  return type == WeightType::kF32 || type == WeightType::kF16 || type == WeightType::kBF16;
}

void PackPanelOf(const TensorForm& form, size_t panel, const RowAt& row_at, uint8_t* out) {
  const TensorShape& shape = form.shape;
  const uint8_t* rows[kPanelRows] = {};
  for (size_t r = 0; r < kPanelRows && panel * kPanelRows + r < shape.rows; ++r) {
    rows[r] = row_at(panel * kPanelRows + r);
  }
  const bool finite = form.is_vector
                          ? Widen(form, rows[0], reinterpret_cast<float*>(out))
                          : PackPanel(form.type->type, rows, shape.cols, out) == PackResult::kOk;
  if (finite) return;
  throw ModelError(shape.name + ": a weight or scale of rows " +
                   std::to_string(panel * kPanelRows) + " to " +
                   std::to_string(std::min((panel + 1) * kPanelRows, shape.rows) - 1) +
                   " is not finite; is the file damaged?");
}

void ForPieces(Pool& pool, const TensorForm& form, const std::function<void(const Piece&)>& work) {
  std::atomic<size_t> next{0};
  const size_t at_once = form.PiecePanels();
  pool.Run(pool.threads(), 1, [&](size_t thread, size_t, size_t) {
    for (size_t i = next++; i < form.n_pieces(); i = next++) {
      work({thread, i * at_once, std::min((i + 1) * at_once, form.n_panels())});
    }
  });
}

void PackRows(Pool& pool, const TensorForm& form, const RowReader& rows,
              const std::function<uint8_t*(const Piece&)>& place,
              const std::function<void(const Piece&, const uint8_t* packed)>& done) {
  const size_t slab_bytes = kPanelRows * form.row_bytes();
  std::vector<uint8_t> slabs(pool.threads() * slab_bytes);
  ForPieces(pool, form, [&](const Piece& piece) {
    uint8_t* const out = place(piece);
    PackPanels(form, rows, piece.first, piece.last, slabs.data() + piece.thread * slab_bytes, out);
    done(piece, out);
    if (form.rope_dim > 0) return;
    rows.Drop(piece.first * kPanelRows, std::min(piece.last * kPanelRows, form.shape.rows));
  });
  rows.Drop(0, form.shape.rows);  // pages that pieces share
}

}  // namespace potluck
