// How fast this machine reads memory: the ceiling of decode, which reads every weight once a token.
#pragma once

#include <cstddef>

#include "engine/pool.h"

namespace potluck {

// Bytes/s that all threads of the pool together read from a buffer of size_bytes, each its share
// from start to end; best of `rounds`. size_bytes should be several times the last cache.
// UsageError: less than 1 MiB a thread, or no round.
double ReadBandwidth(Pool& pool, size_t size_bytes, size_t rounds);

}  // namespace potluck
