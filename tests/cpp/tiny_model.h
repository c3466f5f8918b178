// A model small enough for any test, with seeded weights of several types, and how to run it.
#pragma once

#include <cmath>
#include <cstring>
#include <functional>
#include <memory>
#include <random>
#include <string>
#include <vector>

#include "engine/isa.h"
#include "engine/shard.h"
#include "engine/types.h"
#include "weights.h"

namespace tiny {

using potluck::Config;
using potluck::Pool;
using potluck::RowSpan;
using potluck::Shard;
using potluck::ShardPart;
using potluck::TensorShape;
using potluck::WeightType;

constexpr size_t kLayers = 4;
constexpr size_t kKvBytes = size_t{4} << 20;

// Small, but odd where models are: grouped heads, a vocabulary that fills no panel, partly rotated
// heads.
inline Config TinyConfig() {
  Config config;
  config.dim = 64;
  config.n_layers = kLayers;
  config.n_heads = 4;
  config.n_kv_heads = 2;
  config.head_dim = 24;
  config.ffn_dim = 160;
  config.vocab = 45;
  config.context_tokens = 1024;
  config.norm_eps = 1e-5;
  config.rope_theta = 10000;
  config.rope_dim = 16;
  config.rope_interleaved = true;
  return config;
}

// All that a model may have beside that.
inline Config FullConfig() {
  Config config = TinyConfig();
  config.rope_scaling = {4, 0.75, 256, 32, 1, 1.1, {1, 1, 1.5f, 2, 3, 4, 8, 8}};
  config.qkv_bias = true;
  config.output_bias = true;
  config.qk_norm = true;
  return config;
}

inline bool IsVector(const std::string& name) {
  return name.find("norm") != std::string::npos || name.find(".bias") != std::string::npos;
}

inline WeightType TypeOf(const std::string& name) {
  if (IsVector(name)) return WeightType::kF32;
  if (name == "token_embd.weight") return WeightType::kQ8_0;
  if (name == "output.weight") return WeightType::kQ4_0;
  if (name.find("attn_v") != std::string::npos) return WeightType::kF16;
  if (name.find("ffn_down") != std::string::npos) return WeightType::kQ8_0;
  return WeightType::kQ4_1;
}

// A tensor's bytes in the file; the same for every shard.
inline std::vector<uint8_t> BytesOf(const TensorShape& shape) {
  if (TypeOf(shape.name) == WeightType::kF32) {
    std::vector<uint8_t> bytes(shape.cols * 4);
    for (size_t i = 0; i < shape.cols; ++i) {
      const float value = 1.0f + 0.01f * static_cast<float>(i % 7);
      std::memcpy(bytes.data() + 4 * i, &value, 4);
    }
    return bytes;
  }
  const auto seed = static_cast<uint32_t>(std::hash<std::string>()(shape.name));
  const WeightType type = TypeOf(shape.name);
  if (type != WeightType::kF16) return weights::FileBytes(type, shape.rows, shape.cols, seed);
  std::vector<uint8_t> bytes(shape.rows * shape.cols * 2);
  const auto values = weights::Activations(shape.rows, shape.cols, seed);
  for (size_t i = 0; i < values.size(); ++i) weights::PutHalf(&bytes[2 * i], 0.1f * values[i]);
  return bytes;
}

inline void PutAll(Shard& shard) {
  for (const TensorShape& shape : shard.Matrices()) {
    const auto bytes = BytesOf(shape);
    shard.Put(shape.name, potluck::InfoOf(TypeOf(shape.name)).name, shape.rows, shape.cols, 0,
              bytes.data(), bytes.size());
  }
}

struct Made {
  explicit Made(size_t threads = 1, ShardPart part = {0, kLayers, true, true, kKvBytes, 64},
                const std::string& isa = "auto", bool pinned = false,
                const Config& config = TinyConfig())
      : pool(std::make_unique<Pool>(threads, pinned)),
        shard(std::make_unique<Shard>(*pool, potluck::ChooseTable(isa), config, part)) {
    PutAll(*shard);
    shard->Seal();
  }
  Shard* operator->() const { return shard.get(); }
  std::unique_ptr<Pool> pool;
  std::unique_ptr<Shard> shard;
};

inline std::vector<int32_t> TokensOf(size_t n, uint32_t seed = 1) {
  std::mt19937 random(seed);
  std::vector<int32_t> tokens(n);
  for (int32_t& token : tokens) token = static_cast<int32_t>(random() % 45);
  return tokens;
}

// Logits of every row.
inline std::vector<float> Run(const Made& made, const std::vector<RowSpan>& rows,
                              const std::vector<int32_t>& tokens) {
  size_t n_wanted = 0;
  for (const RowSpan& r : rows) n_wanted += r.want_logits;
  std::vector<float> logits(n_wanted * TinyConfig().vocab, NAN);
  made->Forward(tokens.data(), tokens.size(), rows, logits.data(), logits.size());
  return logits;
}

// A whole session in chunks, all logits.
inline std::vector<float> RunSession(const Made& made, const std::vector<int32_t>& tokens,
                                     size_t chunk, uint64_t session = 1) {
  made->Open(session, tokens.size());
  std::vector<float> logits;
  for (size_t start = 0; start < tokens.size(); start += chunk) {
    const size_t n = std::min(chunk, tokens.size() - start);
    const std::vector<int32_t> part(tokens.begin() + static_cast<ptrdiff_t>(start),
                                    tokens.begin() + static_cast<ptrdiff_t>(start + n));
    const auto more = Run(made, {{session, start, n, n}}, part);
    logits.insert(logits.end(), more.begin(), more.end());
  }
  return logits;
}

inline bool SameBits(const std::vector<float>& a, const std::vector<float>& b) {
  return a.size() == b.size() && std::memcmp(a.data(), b.data(), a.size() * sizeof(float)) == 0;
}

inline std::vector<float> RowsOf(const std::vector<float>& logits, size_t first, size_t n) {
  const auto vocab = static_cast<ptrdiff_t>(TinyConfig().vocab);
  const auto start = logits.begin() + static_cast<ptrdiff_t>(first) * vocab;
  return {start, start + static_cast<ptrdiff_t>(n) * vocab};
}

}  // namespace tiny
