// How one tensor becomes packed bytes: from rows in memory, or streamed by the pool.
//
// Knows what a packed tensor is (panels, or the f32 values of a vector; rotated rows in another
// order), and neither which tensors there are nor where their packed bytes go.
#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>

#include "engine/config.h"
#include "engine/pool.h"
#include "engine/types.h"

namespace potluck {

struct TensorForm {
  TensorShape shape;
  bool is_vector = false;          // kept as f32, whatever the file has
  size_t head_dim = 0;             // Q and K with rotary pairs side by side: rows of a head (of a
                                   // vector: values),
  size_t rope_dim = 0;             // and how many of them are permuted; 0: rows stay in order
  const TypeInfo* type = nullptr;  // in the file

  size_t n_panels() const { return (shape.rows + kPanelRows - 1) / kPanelRows; }
  size_t panel_bytes() const;  // packed
  size_t packed_bytes() const { return n_panels() * panel_bytes(); }
  size_t row_bytes() const { return RowBytes(type->type, shape.cols); }  // in the file
  // The file's row that is packed as `row`; of a vector, its value.
  size_t FileRow(size_t row) const;
  // What streaming, writing and checking take at once: about 1 MiB, and the same on every machine.
  size_t PiecePanels() const;
  size_t n_pieces() const { return (n_panels() + PiecePanels() - 1) / PiecePanels(); }
};

// Vectors are kept as f32, so they come in a type of floats.
bool IsFloat(WeightType type);

// A row's bytes of the file, by the packed row's number.
using RowAt = std::function<const uint8_t*(size_t row)>;

// Packs one panel. ModelError: a weight or scale is not finite.
void PackPanelOf(const TensorForm& form, size_t panel, const RowAt& row_at, uint8_t* out);

// Panels [first, last) of a tensor; the piece's number is first / PiecePanels().
struct Piece {
  size_t thread;
  size_t first;
  size_t last;
};

// Runs `work` for every piece of a tensor. The pool's threads take them in rising order, so that a
// disk reads on without seeking.
void ForPieces(Pool& pool, const TensorForm& form, const std::function<void(const Piece&)>& work);

// The rows of one tensor as a file has them. Any thread may read at any time.
class RowReader {
 public:
  virtual ~RowReader() = default;
  // Rows [first, last), one behind the other. ModelError: they can't be read.
  virtual void Read(size_t first, size_t last, uint8_t* out) const = 0;
  // These will not be read again.
  virtual void Drop(size_t first, size_t last) const = 0;
};

// Packs a whole tensor, piece by piece: `place` says where a piece's packed bytes go, `done` gets
// them. Rows are dropped behind. Takes a slab of 8 rows a thread. ModelError: as RowReader and
// PackPanelOf.
void PackRows(Pool& pool, const TensorForm& form, const RowReader& rows,
              const std::function<uint8_t*(const Piece&)>& place,
              const std::function<void(const Piece&, const uint8_t* packed)>& done);

}  // namespace potluck
