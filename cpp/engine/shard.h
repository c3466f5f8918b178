// The weights of a span, the KV of its sessions, and one call a step.
//
// What bindings.cpp shows to Python, one to one. A mutex lets one thread in at a time; Cancel and
// progress are for any thread at any time. Nothing here allocates once the largest batch has been
// seen.
#pragma once

#include <cstddef>
#include <cstdint>
#include <limits>
#include <memory>
#include <string>
#include <vector>

#include "engine/batch.h"
#include "engine/config.h"
#include "engine/kernels/table.h"
#include "engine/loading.h"
#include "engine/pool.h"

namespace potluck {

class Shard {
 public:
  // pool and kernels must outlive the shard. ModelError: a config that makes no model. UsageError:
  // a span outside it.
  Shard(Pool& pool, const KernelTable& kernels, const Config& config, const ShardPart& part);
  ~Shard();
  Shard(const Shard&) = delete;
  Shard& operator=(const Shard&) = delete;

  // Every tensor the span needs. Without an output.weight the head is token_embd.weight (tied
  // embeddings): it may be put in place of it, and a shard that embeds too holds it once.
  std::vector<TensorShape> Matrices() const;

  // Reads one tensor from a file (or makes it), slab by slab, into its packed place; the page cache
  // is dropped behind. ModelError: not in the span, put twice, wrong shape, type not supported,
  // file too short, a value that is not finite.
  void PutFile(const std::string& name, const std::string& type_name, size_t rows, size_t cols,
               const Origin& origin, uint64_t offset_bytes);
  // The same from memory: whole rows from first_row on (first_row and their number multiples of 8,
  // but for the last).
  void Put(const std::string& name, const std::string& type_name, size_t rows, size_t cols,
           size_t first_row, const uint8_t* data, size_t size_bytes);
  // Writes a pack of these tensors of `origin` and takes no memory for them. Why the pack could not
  // be written (a full disk, say); empty: it is there. ModelError: as PutFile.
  std::string WritePack(const std::string& pack, const Origin& origin,
                        const std::vector<TensorSource>& sources);
  // What that takes on disk. ModelError: as PutFile, of what the sources say.
  uint64_t PackBytes(const std::vector<TensorSource>& sources) const;
  // Takes tensors from a pack that WritePack made of the same origin. Why it can't be used (there
  // is none, or the system refuses), and then nothing has changed; empty: they are put. After Seal
  // only in place of a pack of the same tensors. DamagedPack: it is not what would be written now.
  // ModelError: as PutFile.
  std::string MapPack(const std::string& pack, const Origin& origin,
                      const std::vector<TensorSource>& sources);
  // Packs that a Forward found damaged.
  std::vector<std::string> DamagedPacks() const;
  // Ends loading. Of mapped packs so much may stay in memory; the rest is read from the disk in
  // every step. ModelError names a tensor that is missing.
  void Seal(size_t resident_bytes = std::numeric_limits<size_t>::max());

  // See kv.h: sessions and their pages.
  void Open(uint64_t session, size_t max_tokens);
  void Truncate(uint64_t session, size_t position);
  void Fork(uint64_t session, uint64_t new_session, size_t max_tokens);
  void Close(uint64_t session);
  size_t Length(uint64_t session) const;

  // One step; n is the sum of the rows' n_tokens. input: token ids [n] if the shard embeds, else
  // f32 [n, dim]. output: f32 [n, dim], or [sum of want_logits, vocab] if it has the head. Counts
  // are in values. Returns the seconds of each layer, then of the head if it has one.
  // UnknownSession. SessionError: skips positions or beyond the session's room. Full: a shared page
  // must be copied and none is free. FrameError: a value that is not finite (names layer and
  // session). UsageError: a token id outside the vocabulary, a session twice, wrong counts, not
  // sealed. Cancelled. DamagedPack: see there. After an error no session has changed its length;
  // rows at or above a start_position are then to be written again.
  std::vector<double> Forward(const int32_t* input, size_t input_values,
                              const std::vector<RowSpan>& rows, float* output,
                              size_t output_values);
  std::vector<double> Forward(const float* input, size_t input_values,
                              const std::vector<RowSpan>& rows, float* output,
                              size_t output_values);

  // Makes a running Forward stop between layers; without one it does nothing.
  void Cancel();
  // Phases finished since the shard was made, and pieces of weights read or written (about 1 MiB).
  uint64_t progress() const;

  bool embeds() const;
  bool has_head() const;
  const Config& config() const;
  size_t shard_bytes() const;    // of packed weights, mapped ones included
  size_t mapped_bytes() const;   // of these, in packs
  size_t n_streamed() const;     // layers (and head) that are read from the disk in every step
  size_t scratch_bytes() const;  // of buffers for the largest batch so far
  size_t kv_bytes() const;       // budget, in whole pages
  size_t kv_used_bytes() const;  // reserved by open sessions

 private:
  struct State;
  std::unique_ptr<State> state_;
};

}  // namespace potluck
