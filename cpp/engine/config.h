// What the engine must know of a model, and which part of it a shard is.
//
// Plain values, checked once by Check and trusted afterwards. It says nothing of files and weight
// types.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>
#include <string_view>
#include <vector>

namespace potluck {

// Angles of positions beyond would lose precision (canon.h, SinCosDouble).
constexpr size_t kMostPositions = size_t{1} << 24;

// Far above any model, and small enough that no product of two overflows size_t.
constexpr size_t kMostValues = size_t{1} << 24;  // of a row, rows of a matrix
constexpr size_t kMostLayers = size_t{1} << 16;

// How the angles of rotary embeddings are stretched for more positions than a model saw at first.
// What it starts with changes nothing.
struct RopeScaling {
  double factor = 1;            // frequencies are divided by it
  double extrapolation = 0;     // of YaRN: how far fast pairs are kept from that; 0: not at all
  double original_tokens = 0;   // of YaRN: positions that the model saw at first
  double beta_fast = 32;        // of YaRN: a pair that turns so often within them is fast,
  double beta_slow = 1;         // and one that turns so often is slow
  double magnitude = 1;         // of cosine and sine, beside what YaRN gives them
  std::vector<float> divisors;  // [rope_dim / 2] of the frequencies, before all that; none: 1
};

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
  RopeScaling rope_scaling;
  bool qkv_bias = false;     // q, k and v are products plus a bias,
  bool output_bias = false;  // and so is what attention adds
  bool qk_norm = false;      // each head of q and k is normed before it is rotated

  size_t QueryDim() const { return n_heads * head_dim; }
  size_t KvDim() const { return n_kv_heads * head_dim; }
};

// How a key or value is kept: as f16, or as a byte and a share of a scale
// (kernels/attention_table.h).
enum class KvType : uint8_t { kF16, kQ8 };

// Which part of a model a shard is.
struct ShardPart {
  size_t start = 0;  // layers [start, stop)
  size_t stop = 0;
  bool embeds = false;    // takes token ids: holds the embedding
  bool has_head = false;  // gives logits: holds the last norm and the head
  size_t kv_bytes = 0;    // budget of the KV pages; whole pages of it are used
  size_t max_sessions = 256;
  KvType kv_type = KvType::kF16;
};

// One matrix of the file, or one vector (a single row).
struct TensorShape {
  std::string name;  // GGUF's
  size_t rows;
  size_t cols;
};

// The type of a name, "f16" or "q8". UsageError: there is no such type.
KvType KvTypeOf(std::string_view name);

// ModelError names the value that makes no model, with its range. UsageError: a span that is empty
// or ends beyond the model.
void Check(const Config& config, const ShardPart& part);

}  // namespace potluck
