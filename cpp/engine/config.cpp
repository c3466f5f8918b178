#include "engine/config.h"

#include <cmath>
#include <string>

#include "engine/errors.h"

namespace potluck {
namespace {

void CheckCount(const char* name, size_t value, size_t most) {
  if (value >= 1 && value <= most) return;
  throw ModelError(std::string(name) + ": 1 to " + std::to_string(most) + ", not " +
                   std::to_string(value));
}

void CheckPositive(const char* name, double value) {
  if (std::isfinite(value) && value > 0) return;
  throw ModelError(std::string(name) + ": a positive number, not " + std::to_string(value));
}

// Zeros, negative values, infinities and NaN are outside of all ranges.
void CheckRange(const char* name, double value, double least, double most) {
  if (value >= least && value <= most) return;
  throw ModelError(std::string(name) + ": " + std::to_string(least) + " to " +
                   std::to_string(most) + ", not " + std::to_string(value));
}

// Frequencies end up at most 2 radians a position, so that all angles are such as SinCosDouble
// takes.
void CheckRope(const Config& config) {
  const RopeScaling& scaling = config.rope_scaling;
  CheckRange("rope scaling factor", scaling.factor, 1, 0x1p20);
  CheckRange("rope extrapolation", scaling.extrapolation, 0, 1);
  CheckRange("rope magnitude", scaling.magnitude, 0x1p-10, 0x1p10);
  if (scaling.extrapolation > 0) {
    CheckRange("rope_theta with YaRN", config.rope_theta, 1.5, 1e12);
    CheckRange("rope original_tokens", scaling.original_tokens, 1, 0x1p24);
    CheckRange("rope beta_fast", scaling.beta_fast, 0x1p-10, 0x1p20);
    CheckRange("rope beta_slow", scaling.beta_slow, 0x1p-10, 0x1p20);
  }
  if (!scaling.divisors.empty() && scaling.divisors.size() != config.rope_dim / 2) {
    throw ModelError("rope divisors: " + std::to_string(config.rope_dim / 2) + ", not " +
                     std::to_string(scaling.divisors.size()));
  }
  for (const float divisor : scaling.divisors) {
    CheckRange("rope divisor", static_cast<double>(divisor), 0.5, 0x1p20);
  }
}

}  // namespace

KvType KvTypeOf(std::string_view name) {
  if (name == "f16") return KvType::kF16;
  if (name == "q8") return KvType::kQ8;
  throw UsageError("kv_type " + std::string(name) + ": f16 or q8");
}

void Check(const Config& config, const ShardPart& part) {
  CheckCount("dim", config.dim, kMostValues);
  CheckCount("n_layers", config.n_layers, kMostLayers);
  CheckCount("n_heads", config.n_heads, kMostLayers);
  CheckCount("n_kv_heads", config.n_kv_heads, config.n_heads);
  CheckCount("head_dim", config.head_dim, kMostLayers);
  CheckCount("values of all heads", config.QueryDim(), kMostValues);
  CheckCount("ffn_dim", config.ffn_dim, kMostValues);
  CheckCount("vocab", config.vocab, kMostValues);
  CheckCount("context_tokens", config.context_tokens, kMostPositions);
  CheckCount("rope_dim", config.rope_dim, config.head_dim);
  if (config.n_heads % config.n_kv_heads != 0) {
    throw ModelError("n_heads: a multiple of n_kv_heads (" + std::to_string(config.n_kv_heads) +
                     "), not " + std::to_string(config.n_heads));
  }
  if (config.rope_dim % 2 != 0) {
    throw ModelError("rope_dim: an even number, not " + std::to_string(config.rope_dim));
  }
  CheckPositive("norm_eps", config.norm_eps);
  CheckRange("rope_theta", config.rope_theta, 1, 1e12);
  CheckRope(config);
  if (part.start >= part.stop || part.stop > config.n_layers) {
    throw UsageError("span [" + std::to_string(part.start) + ", " + std::to_string(part.stop) +
                     ") of a model of " + std::to_string(config.n_layers) + " layers");
  }
}

}  // namespace potluck
