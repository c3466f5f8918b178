// How a span's tensors get into their packed places: from a file or a generator, from memory, or
// mapped from a pack, in any order.
//
// Knows GGUF's names of tensors and which a span needs, but no file format: the caller says where
// a tensor's bytes are. Peak memory is the shard plus a slab of 8 rows a thread. Not for several
// threads at once (Shard's mutex); the pool's threads share a tensor by panels.
#pragma once

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <string>
#include <unordered_map>
#include <vector>

#include "engine/arena.h"
#include "engine/config.h"
#include "engine/pack_file.h"
#include "engine/packing.h"
#include "engine/pool.h"
#include "engine/weight_source.h"
#include "engine/weights.h"

namespace potluck {

// Where a tensor lies in a file, and what the file says of it. A generator heeds no offset.
struct TensorSource {
  std::string name;
  std::string type_name;
  size_t rows;
  size_t cols;
  uint64_t offset_bytes;
};

class Loading {
 public:
  Loading(const Config& config, const ShardPart& part);

  // As the functions of Shard. Those that read a file count its pieces in *progress.
  std::vector<TensorShape> Matrices() const;
  void PutFile(Pool& pool, const TensorSource& source, const Origin& origin,
               std::atomic<uint64_t>* progress);
  void Put(Pool& pool, const std::string& name, const std::string& type_name, size_t rows,
           size_t cols, size_t first_row, const uint8_t* data, size_t size_bytes);
  std::string WritePack(Pool& pool, const std::string& pack, const Origin& origin,
                        const std::vector<TensorSource>& sources,
                        std::atomic<uint64_t>* progress) const;
  uint64_t PackBytes(const std::vector<TensorSource>& sources) const;
  std::string MapPack(const std::string& pack, const Origin& origin,
                      const std::vector<TensorSource>& sources);
  std::vector<std::string> DamagedPacks() const;
  // All weights of the span, valid as long as this object and until MapPack is called again.
  // ModelError names what is missing.
  SpanWeights Seal();

  size_t used_bytes() const;  // mapped ones included
  size_t mapped_bytes() const;

 private:
  struct Slot {
    TensorForm form;           // its type is set by the first put
    uint8_t* place = nullptr;  // panels, or f32 values of a vector; of the arena
    PackFile* pack = nullptr;  // or mapped, as its tensor `in_pack`
    size_t in_pack = 0;
    std::vector<bool> has_panel;  // by panel
    size_t n_panels_missing = 0;
    std::vector<uint8_t> pending;  // file rows of a rotated matrix until all have come
    bool is_complete() const { return form.type != nullptr && n_panels_missing == 0; }
    const uint8_t* bytes() const { return pack != nullptr ? pack->tensor(in_pack) : place; }
  };

  enum class Kind { kMatrix, kVector };
  struct Wanted {
    size_t rows;
    size_t cols;
    Kind kind = Kind::kMatrix;
    bool is_rotated = false;  // rows, or values, are those of heads of q or k
  };

  void Add(const std::string& name, const Wanted& wanted);
  void AddLayer(size_t layer);
  const Slot& Find(const std::string& name) const;
  size_t Expected(const TensorSource& source) const;
  TensorForm FormOf(const TensorSource& source) const;
  Slot& Claim(const TensorSource& source);
  void CheckTied(const Slot& slot) const;
  void PutRows(Pool& pool, Slot& slot, size_t first_row, size_t last_row, const uint8_t* data);
  PackPlan PlanOf(const std::vector<TensorSource>& sources, const PackSource& file) const;
  void CheckComplete() const;
  LayerWeights LayerOf(size_t layer) const;
  Matrix MatrixOf(const std::string& name) const;
  const float* VectorOf(const std::string& name) const;
  std::vector<PackFile*> PacksOf(const std::vector<std::string>& names) const;

  Config config_;
  ShardPart part_;
  std::vector<Slot> slots_;                        // in the order of the model
  std::unordered_map<std::string, size_t> index_;  // of slots_, by name
  Arena arena_;
  std::vector<std::unique_ptr<PackFile>> packs_;
};

}  // namespace potluck
