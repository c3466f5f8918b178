// Weights of a file from one type into another, on all threads.
#pragma once

#include <cstddef>
#include <cstdint>
#include <optional>

#include "engine/pool.h"
#include "engine/types.h"

namespace potluck {

// The first value that can't be written.
struct Flaw {
  size_t index;
  float value;  // not finite, or of larger magnitude than LargestOf the type
};

// What a value of the type may be at most: f16's range for every type with f16 in it.
float LargestOf(WeightType type);

// n values, whole blocks of both types (UsageError), from `in` to `out`, which don't overlap. Equal
// types are copied byte for byte. The same bytes for any number of threads and any splitting into
// calls. Nothing, or the flaw of the lowest index; `out` is then of no use.
std::optional<Flaw> Convert(Pool& pool, WeightType from, WeightType to, size_t n, const uint8_t* in,
                            uint8_t* out);

}  // namespace potluck
