// The parts of ARM's attention that have files of their own; members of AttentionTable and
// KvKernels of these names.
#pragma once

#include "engine/kernels/attention_table.h"

namespace potluck {
namespace neon {

void AddTileQ8(const KvTile& tile, size_t head_dim, const TileRows& rows, float* scratch);

// Of single rows.
void Merge(const float* from, size_t head_dim, float* into);
void Finish(const float* state, size_t head_dim, float* out);
bool StoreKeyF16(const float* key, size_t head_dim, size_t slot, uint8_t* section);
bool StoreValueF16(const float* value, size_t head_dim, size_t slot, uint8_t* section);
void PrepareQueryQ8(const float* q, size_t head_dim, void* out);
bool StoreKeyQ8(const float* key, size_t head_dim, size_t slot, uint8_t* section);
bool StoreValueQ8(const float* value, size_t head_dim, size_t slot, uint8_t* section);

}  // namespace neon
}  // namespace potluck
