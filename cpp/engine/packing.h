// How one tensor becomes packed bytes: from rows in memory, or streamed from a file by the pool.
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
#include "engine/weight_file.h"

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

// Packs a whole tensor, whose rows begin at offset_bytes of the file, piece by piece: `place` says
// where a piece's packed bytes go, `done` gets them. The file's pages are dropped behind. Takes a
// slab of 8 rows a thread. ModelError: as WeightFile and PackPanelOf.
void PackFromFile(Pool& pool, const TensorForm& form, const WeightFile& file, uint64_t offset_bytes,
                  const std::function<uint8_t*(const Piece&)>& place,
                  const std::function<void(const Piece&, const uint8_t* packed)>& done);

}  // namespace potluck
