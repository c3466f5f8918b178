// The part of AVX-512's attention that has a file of its own; KvKernels' member of this name.
#pragma once

#include "engine/kernels/attention_table.h"

namespace potluck {
namespace avx512vnni {

void AddTileQ8(const KvTile& tile, size_t head_dim, const TileRows& rows, float* scratch);

}  // namespace avx512vnni
}  // namespace potluck
