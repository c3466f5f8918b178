// What attention does to single rows on ARM: AttentionTable's members of these names.
#pragma once

#include "engine/kernels/attention_table.h"

namespace potluck {
namespace neon {

void Merge(const float* from, size_t head_dim, float* into);
void Finish(const float* state, size_t head_dim, float* out);
bool StoreKey(const float* key, size_t head_dim, size_t slot, uint16_t* section);
bool StoreValue(const float* value, size_t head_dim, size_t slot, uint16_t* section);

}  // namespace neon
}  // namespace potluck
