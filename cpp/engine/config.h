// What the engine must know of a model: sizes, the norm's epsilon, how heads are rotated.
//
// A plain value, checked once by Check and trusted afterwards. It says nothing of files and weight
// types.
#pragma once

#include <cstddef>

namespace potluck {

struct Config {
  size_t dim = 0;             // values of a hidden state
  size_t n_layers = 0;        // of the whole model
  size_t n_heads = 0;         // of queries
  size_t n_kv_heads = 0;      // of keys and values; divides n_heads
  size_t head_dim = 0;        // values of a head
  size_t ffn_dim = 0;         // inner values of the feed-forward part
  size_t vocab = 0;           // tokens
  size_t context_tokens = 0;  // positions the model was made for
  double norm_eps = 0;        // of the RMS norms
  double rope_theta = 0;      // base of the rotary embedding
  size_t rope_dim = 0;        // leading values of a head that are rotated; even, at most head_dim
  bool rope_interleaved =
      false;  // the file's Q and K rows hold rotary pairs side by side (LLaMA's GGUF)

  size_t QueryDim() const { return n_heads * head_dim; }
  size_t KvDim() const { return n_kv_heads * head_dim; }
  size_t HeadsPerKvHead() const { return n_heads / n_kv_heads; }
};

// ModelError names the value that makes no model, with its range.
void Check(const Config& config);

}  // namespace potluck
