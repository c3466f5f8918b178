// Where the weights of a model come from: a file, a file for each tensor, or a generator.
#pragma once

#include <cstdint>
#include <memory>
#include <string>
#include <unordered_map>
#include <variant>

#include "engine/pack_file.h"
#include "engine/packing.h"
#include "engine/synthetic.h"

namespace potluck {

// Tensors that lie in files of their own (potluck/tensor_store.py), each from the first byte to the
// last.
struct TensorFiles {
  std::unordered_map<std::string, std::string> paths;  // by name
  PackSource identity;  // a hash of their contents, so that it takes no file to map their pack
};

// A file's path, or which synthetic model, or files of tensors.
using Origin = std::variant<std::string, Synthetic, TensorFiles>;

// An origin at hand. Any thread.
class WeightSource {
 public:
  virtual ~WeightSource() = default;
  // What a pack of these weights is made of.
  virtual PackSource identity() const = 0;
  // The rows of a tensor; of one file for all, from offset_bytes on. Valid as long as this object.
  // ModelError: they are not all there.
  virtual std::unique_ptr<RowReader> RowsOf(const TensorForm& form,
                                            uint64_t offset_bytes) const = 0;
};

// ModelError: a file that can't be opened; files of tensors are opened when they are read.
// Valid as long as the origin.
std::unique_ptr<WeightSource> Open(const Origin& origin);

}  // namespace potluck
