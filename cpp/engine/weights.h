// What a span's weights are once they are loaded: packed matrices and f32 vectors, read-only.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

#include "engine/pack.h"
#include "engine/types.h"

namespace potluck {

class PackFile;

// [rows, cols] in panels of 8 rows (pack.h).
struct Matrix {
  WeightType type = WeightType::kF32;
  size_t rows = 0;
  size_t cols = 0;
  const uint8_t* panels = nullptr;

  size_t n_panels() const { return (rows + kPanelRows - 1) / kPanelRows; }
  size_t panel_bytes() const { return PanelBytes(type, cols); }
  const uint8_t* panel(size_t index) const { return panels + index * panel_bytes(); }
};

struct LayerWeights {
  const float* attn_norm = nullptr;  // [dim]
  Matrix q;                          // [n_heads * head_dim, dim], rotary pairs rope_dim / 2 apart
  Matrix k;                          // [n_kv_heads * head_dim, dim], likewise
  Matrix v;                          // [n_kv_heads * head_dim, dim]
  Matrix output;                     // [dim, n_heads * head_dim]
  const float* ffn_norm = nullptr;   // [dim]
  Matrix gate;                       // [ffn_dim, dim]
  Matrix up;                         // [ffn_dim, dim]
  Matrix down;                       // [dim, ffn_dim]
  // Those that the model has, or null. The values of q and k lie as the rows of their matrices.
  const float* q_bias = nullptr;       // [n_heads * head_dim]
  const float* k_bias = nullptr;       // [n_kv_heads * head_dim]
  const float* v_bias = nullptr;       // [n_kv_heads * head_dim]
  const float* output_bias = nullptr;  // [dim]
  const float* q_norm = nullptr;       // [head_dim]
  const float* k_norm = nullptr;       // [head_dim]
  std::vector<PackFile*> packs;        // that hold any of these; of Loading
};

struct SpanWeights {
  Matrix embedding;                    // [vocab, dim], if the shard embeds
  std::vector<LayerWeights> layers;    // of the span
  const float* output_norm = nullptr;  // [dim], if it has the head
  Matrix head;                         // [vocab, dim], likewise; tied: the embedding itself
  std::vector<PackFile*> embedding_packs;
  std::vector<PackFile*> head_packs;  // of the norm too
};

}  // namespace potluck
