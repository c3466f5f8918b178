// Where the weights of a model come from: a file, or a generator that needs none.
#pragma once

#include <cstdint>
#include <memory>
#include <string>
#include <variant>

#include "engine/pack_file.h"
#include "engine/packing.h"
#include "engine/synthetic.h"

namespace potluck {

// A file's path, or which synthetic model.
using Origin = std::variant<std::string, Synthetic>;

// An origin at hand. Any thread.
class WeightSource {
 public:
  virtual ~WeightSource() = default;
  // What a pack of these weights is made of.
  virtual PackSource identity() const = 0;
  // The rows of a tensor; of a file, from offset_bytes on. Valid as long as this object.
  // ModelError: they are not all there.
  virtual std::unique_ptr<RowReader> RowsOf(const TensorForm& form,
                                            uint64_t offset_bytes) const = 0;
};

// ModelError: a file that can't be opened.
std::unique_ptr<WeightSource> Open(const Origin& origin);

}  // namespace potluck
