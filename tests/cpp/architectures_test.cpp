// Models beyond the first LLaMA: biases, norms of heads and stretched rotary angles keep every
// promise of a shard, in memory and in packs.
#include <algorithm>
#include <cmath>
#include <cstring>
#include <functional>
#include <limits>
#include <memory>
#include <string>
#include <vector>

#include "check.h"
#include "engine/config.h"
#include "engine/errors.h"
#include "engine/isa.h"
#include "engine/shard.h"
#include "packs.h"
#include "tiny_model.h"

using potluck::Config;
using potluck::Pool;
using potluck::RowSpan;
using potluck::Shard;
using potluck::ShardPart;
using potluck::TensorShape;
using tiny::BytesOf;
using tiny::Folder;
using tiny::FullConfig;
using tiny::kKvBytes;
using tiny::kLayers;
using tiny::kWhole;
using tiny::Logits;
using tiny::Made;
using tiny::MapAll;
using tiny::NewShard;
using tiny::RunSession;
using tiny::SameBits;
using tiny::TokensOf;
using tiny::TypeOf;
using tiny::WriteAll;

namespace {

Made MadeOf(const Config& config, size_t threads = 1, const ShardPart& part = kWhole,
            const std::string& isa = "auto") {
  return Made(threads, part, isa, false, config);
}

// The row of the file that the engine keeps as `row`, of heads of 24 rows whose first 16 are
// rotated.
size_t RowOfPairs(size_t row) {
  const size_t head = row / 24, i = row % 24;
  if (i >= 16) return row;
  return head * 24 + (i < 8 ? 2 * i : 2 * i - 15);
}

bool IsRotated(const std::string& name) {
  return name.find("attn_q") != std::string::npos || name.find("attn_k") != std::string::npos;
}

// A tensor of a file whose pairs lie side by side, as a file has it whose pairs lie apart.
std::vector<uint8_t> WithPairsApart(const TensorShape& shape, const std::vector<uint8_t>& bytes) {
  const size_t n = tiny::IsVector(shape.name) ? shape.cols : shape.rows;
  const size_t size = bytes.size() / n;
  std::vector<uint8_t> apart(bytes.size());
  for (size_t i = 0; i < n; ++i) {
    std::memcpy(&apart[i * size], &bytes[RowOfPairs(i) * size], size);
  }
  return apart;
}

}  // namespace

TEST(threads_chunks_tables_and_splits_change_no_bit) {
  const auto tokens = TokensOf(90);
  const auto expected = RunSession(MadeOf(FullConfig()), tokens, 90);
  for (const float value : expected) CHECK(std::isfinite(value));
  for (const std::string& isa : potluck::AvailableIsas()) {
    const Made made = MadeOf(FullConfig(), 3, kWhole, isa);
    CHECK(SameBits(RunSession(made, tokens, 33), expected));
    CHECK(SameBits(RunSession(made, tokens, 1, 2), expected));
  }
  for (const size_t cut : {1u, 3u}) {
    const Made first = MadeOf(FullConfig(), 2, {0, cut, true, false, kKvBytes, 64});
    const Made second = MadeOf(FullConfig(), 1, {cut, kLayers, false, true, kKvBytes, 64});
    std::vector<float> x(90 * 64), logits(90 * 45);
    const std::vector<RowSpan> rows = {{5, 0, 90, 90}};
    first->Open(5, 90);
    second->Open(5, 90);
    first->Forward(tokens.data(), 90, rows, x.data(), x.size());
    second->Forward(x.data(), x.size(), rows, logits.data(), logits.size());
    CHECK(SameBits(logits, expected));
  }
}

TEST(each_part_of_an_architecture_changes_the_answer) {
  const auto tokens = TokensOf(30);
  const std::vector<std::function<void(Config&)>> changes = {
      [](Config& c) { c.qkv_bias = false; },
      [](Config& c) { c.output_bias = false; },
      [](Config& c) { c.qk_norm = false; },
      [](Config& c) { c.rope_scaling.factor = 1; },
      [](Config& c) { c.rope_scaling.extrapolation = 0; },
      [](Config& c) { c.rope_scaling.original_tokens = 8; },
      [](Config& c) { c.rope_scaling.beta_fast = 4; },
      [](Config& c) { c.rope_scaling.magnitude = 1; },
      [](Config& c) { c.rope_scaling.divisors.clear(); },
  };
  const auto expected = RunSession(MadeOf(FullConfig()), tokens, 30);
  for (size_t i = 0; i < changes.size(); ++i) {
    Config config = FullConfig();
    changes[i](config);
    if (SameBits(RunSession(MadeOf(config), tokens, 30), expected)) {
      CHECK_EQ("the same bits without change", std::to_string(i));
    }
  }
}

TEST(rows_biases_and_norms_of_a_head_are_permuted_alike) {
  const auto tokens = TokensOf(40);
  const auto expected = RunSession(MadeOf(FullConfig()), tokens, 40);
  Config config = FullConfig();
  config.rope_interleaved = false;
  CHECK(!SameBits(RunSession(MadeOf(config), tokens, 40), expected));
  Made apart(1);
  apart.shard = std::make_unique<Shard>(*apart.pool, potluck::ChooseTable("auto"), config, kWhole);
  for (const TensorShape& shape : apart->Matrices()) {
    auto bytes = BytesOf(shape);
    if (IsRotated(shape.name)) bytes = WithPairsApart(shape, bytes);
    apart->Put(shape.name, potluck::InfoOf(TypeOf(shape.name)).name, shape.rows, shape.cols, 0,
               bytes.data(), bytes.size());
  }
  apart->Seal();
  CHECK(SameBits(RunSession(apart, tokens, 40), expected));
}

TEST(packs_hold_biases_and_norms_and_serve_no_other_architecture) {
  const Folder folder(FullConfig());
  const auto tokens = TokensOf(40);
  const auto expected = RunSession(MadeOf(FullConfig()), tokens, 40);
  Pool pool(2);
  auto first = NewShard(pool, FullConfig());
  WriteAll(*first, folder);
  for (const size_t resident : {size_t{0}, SIZE_MAX}) {
    auto second = NewShard(pool, FullConfig());
    CHECK(MapAll(*second, folder).empty());
    second->Seal(resident);
    CHECK(SameBits(Logits(*second, tokens, 7), expected));
  }
  Config config = FullConfig();
  config.rope_interleaved = false;  // other rows, biases and norms in the same places
  CHECK_THROWS(MapAll(*NewShard(pool, config), folder), potluck::DamagedPack);
  auto biases = folder.parts().at("layer1");
  const auto matrices = [](const potluck::TensorSource& t) { return t.rows > 1; };
  biases.erase(std::remove_if(biases.begin(), biases.end(), matrices), biases.end());
  const std::string pack = folder.pack("layer0");
  CHECK_EQ(first->WritePack(pack, folder.model(), biases), "");
  CHECK_EQ(first->MapPack(pack, folder.model(), biases), "");
  auto other = NewShard(pool, config);
  CHECK_THROWS(other->MapPack(pack, folder.model(), biases), potluck::DamagedPack);
  // A pack of fewer tensors is not one of more.
  CHECK_THROWS(
      NewShard(pool, FullConfig())->MapPack(pack, folder.model(), folder.parts().at("layer0")),
      potluck::DamagedPack);
}

TEST(a_model_without_a_bias_or_norm_has_no_place_for_it_and_one_with_it_needs_it) {
  Pool pool(1);
  const float zeros[96] = {};
  const auto* bytes = reinterpret_cast<const uint8_t*>(zeros);
  auto plain = NewShard(pool);
  CHECK_THROWS(plain->Put("blk.0.attn_q.bias", "f32", 1, 96, 0, bytes, 96 * 4),
               potluck::ModelError);
  auto full = NewShard(pool, FullConfig());
  CHECK_THROWS(full->Put("blk.0.attn_q.bias", "q8_0", 1, 96, 0, bytes, 102), potluck::ModelError);
  CHECK_THROWS(full->Put("blk.0.attn_q_norm.weight", "f32", 1, 96, 0, bytes, 96 * 4),
               potluck::ModelError);
  for (const TensorShape& shape : full->Matrices()) {
    if (shape.name == "blk.3.attn_k_norm.weight") continue;
    const auto data = BytesOf(shape);
    full->Put(shape.name, potluck::InfoOf(TypeOf(shape.name)).name, shape.rows, shape.cols, 0,
              data.data(), data.size());
  }
  std::string message;
  try {
    full->Seal();
  } catch (const potluck::ModelError& error) {
    message = error.what();
  }
  CHECK_EQ(message, "blk.3.attn_k_norm.weight is missing");
}

TEST(a_head_whose_norm_is_not_finite_is_refused_with_layer_and_session) {
  Pool pool(2);
  auto shard = std::make_unique<Shard>(pool, potluck::ChooseTable("auto"), FullConfig(),
                                       ShardPart{1, 2, false, false, kKvBytes, 64});
  for (const TensorShape& shape : shard->Matrices()) {
    auto bytes = BytesOf(shape);
    if (shape.name == "blk.1.attn_k.bias") {
      const float large = 3e30f;  // finite, but not its square
      std::memcpy(&bytes[4 * 30], &large, 4);
    }
    shard->Put(shape.name, potluck::InfoOf(TypeOf(shape.name)).name, shape.rows, shape.cols, 0,
               bytes.data(), bytes.size());
  }
  shard->Seal();
  shard->Open(7, 8);
  const auto x = weights::Activations(2, 64, 3);
  std::vector<float> out(x.size());
  std::string message;
  try {
    shard->Forward(x.data(), x.size(), {{7, 0, 2, 0}}, out.data(), out.size());
  } catch (const potluck::FrameError& error) {
    message = error.what();
  }
  CHECK_EQ(message.substr(0, message.find(':')), "layer 1, session 7, position 0");
}

TEST(rope_scaling_that_makes_no_sense_is_refused) {
  const double nan = std::nan(""), infinite = std::numeric_limits<double>::infinity();
  const auto refuses = [](const std::function<void(Config&)>& change) {
    Config config = FullConfig();
    change(config);
    potluck::Check(config, kWhole);
  };
  for (const double bad : {0.0, -1.0, nan, infinite, 1e30}) {
    const auto narrow = static_cast<float>(bad);
    CHECK_THROWS(refuses([&](Config& c) { c.rope_scaling.factor = bad; }), potluck::ModelError);
    CHECK_THROWS(refuses([&](Config& c) { c.rope_scaling.magnitude = bad; }), potluck::ModelError);
    CHECK_THROWS(refuses([&](Config& c) { c.rope_scaling.beta_fast = bad; }), potluck::ModelError);
    CHECK_THROWS(refuses([&](Config& c) { c.rope_scaling.beta_slow = bad; }), potluck::ModelError);
    CHECK_THROWS(refuses([&](Config& c) { c.rope_scaling.original_tokens = bad; }),
                 potluck::ModelError);
    CHECK_THROWS(refuses([&](Config& c) { c.rope_scaling.divisors[3] = narrow; }),
                 potluck::ModelError);
  }
  for (const double bad : {-0.5, 1.5, nan}) {
    CHECK_THROWS(refuses([&](Config& c) { c.rope_scaling.extrapolation = bad; }),
                 potluck::ModelError);
  }
  CHECK_THROWS(refuses([](Config& c) { c.rope_scaling.divisors.pop_back(); }), potluck::ModelError);
  CHECK_THROWS(refuses([](Config& c) { c.rope_theta = 1; }), potluck::ModelError);
  refuses([](Config& c) { c.rope_scaling = {}; });  // that is none
}

CHECK_MAIN
