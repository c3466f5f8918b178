// How a span's tensors get into their packed places: from a file or from memory, in any order.
//
// Knows GGUF's names of tensors and which a span needs, but no file format: the caller says where
// a tensor's bytes are. Peak memory is the shard plus a slab of 8 rows a thread. Not for several
// threads at once (Shard's mutex); the pool's threads share a tensor by panels.
#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>
#include <string>
#include <unordered_map>
#include <vector>

#include "engine/arena.h"
#include "engine/config.h"
#include "engine/pool.h"
#include "engine/weight_file.h"
#include "engine/weights.h"

namespace potluck {

class Loading {
 public:
  Loading(const Config& config, const ShardPart& part);

  // As the functions of Shard.
  std::vector<TensorShape> Matrices() const;
  void PutFile(Pool& pool, const std::string& name, const std::string& type_name, size_t rows,
               size_t cols, const std::string& path, uint64_t offset_bytes);
  void Put(Pool& pool, const std::string& name, const std::string& type_name, size_t rows,
           size_t cols, size_t first_row, const uint8_t* data, size_t size_bytes);
  // All weights of the span, valid as long as this object. ModelError names what is missing.
  SpanWeights Seal();

  size_t used_bytes() const { return arena_.used_bytes(); }

 private:
  struct Slot {
    TensorShape shape;
    bool is_vector = false;
    bool is_rotated = false;         // Q or K: rows are permuted within each head
    const TypeInfo* type = nullptr;  // set by the first put
    uint8_t* place = nullptr;        // panels, or f32 values of a vector
    std::vector<bool> has_panel;     // by panel
    size_t n_panels_missing = 0;
    std::vector<uint8_t> pending;  // file rows of a rotated matrix until all have come
    bool is_complete() const { return type != nullptr && n_panels_missing == 0; }
  };
  using RowAt = std::function<const uint8_t*(size_t row)>;  // a packed row's bytes of the file

  void Add(const std::string& name, size_t rows, size_t cols);
  void AddLayer(size_t layer);
  const Slot& Find(const std::string& name) const;
  Slot& Claim(const std::string& name, const std::string& type_name, size_t rows, size_t cols);
  void CheckTied(const Slot& slot) const;
  size_t FileRow(const Slot& slot, size_t row) const;
  void ReadPanels(const Slot& slot, const WeightFile& file, uint64_t offset_bytes, size_t first,
                  size_t last, uint8_t* slab) const;
  void Pack(const Slot& slot, size_t panel, const RowAt& row_at) const;
  void PutRows(Pool& pool, Slot& slot, size_t first_row, size_t last_row, const uint8_t* data);
  Matrix MatrixOf(const std::string& name) const;
  const float* VectorOf(const std::string& name) const;

  Config config_;
  ShardPart part_;
  std::vector<Slot> slots_;                        // in the order of the model
  std::unordered_map<std::string, size_t> index_;  // of slots_, by name
  Arena arena_;
};

}  // namespace potluck
