// Weights that no file holds: always the same bytes, fit for every type, and in shards and packs
// like those of a file.
#include "engine/synthetic.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <memory>
#include <string>
#include <vector>

#include "check.h"
#include "engine/crc32c.h"
#include "engine/errors.h"
#include "engine/pack.h"
#include "packs.h"
#include "tiny_model.h"

using potluck::Deviation;
using potluck::Pool;
using potluck::Shard;
using potluck::Synthetic;
using potluck::SyntheticTensor;
using potluck::TensorShape;
using potluck::TypeInfo;
using potluck::WeightType;
using tiny::SameBits;
using tiny::TinyConfig;

namespace {

constexpr Synthetic kModel = {1, 4};

std::vector<uint8_t> RowsOf(const std::string& name, WeightType type, size_t first, size_t n,
                            size_t cols, const Synthetic& model = kModel) {
  const SyntheticTensor tensor(model, name, type, cols);
  const size_t row_bytes = potluck::RowBytes(type, cols);
  std::vector<uint8_t> bytes(n * row_bytes);
  for (size_t i = 0; i < n; ++i) tensor.Row(first + i, &bytes[i * row_bytes]);
  return bytes;
}

uint32_t SumOf(const std::vector<uint8_t>& bytes) {
  return potluck::Crc32c(bytes.data(), bytes.size());
}

// The values of 8 rows, by way of the engine's own packing; none if a scale is not finite.
std::vector<float> ValuesOf(const std::string& name, WeightType type, size_t cols) {
  const auto bytes = RowsOf(name, type, 0, 8, cols);
  const uint8_t* rows[8];
  for (size_t r = 0; r < 8; ++r) rows[r] = &bytes[r * potluck::RowBytes(type, cols)];
  std::vector<uint8_t> panel(potluck::PanelBytes(type, cols));
  if (PackPanel(type, rows, cols, panel.data()) != potluck::PackResult::kOk) return {};
  std::vector<float> values(8 * cols);
  for (size_t r = 0; r < 8; ++r) UnpackRow(type, panel.data(), r, cols, &values[r * cols]);
  return values;
}

// A shard of the tiny model in these types, all of it synthetic.
std::unique_ptr<Shard> Loaded(Pool& pool, const potluck::Origin& origin) {
  auto shard = tiny::NewShard(pool);
  for (const TensorShape& shape : shard->Matrices()) {
    shard->PutFile(shape.name, potluck::InfoOf(tiny::TypeOf(shape.name)).name, shape.rows,
                   shape.cols, origin, 0);
  }
  shard->Seal();
  return shard;
}

}  // namespace

// A change of these is a change of what every worker computes: it needs another kSyntheticVersion.
TEST(the_bytes_of_a_seed_are_known) {
  const struct {
    WeightType type;
    uint32_t sum;
  } known[] = {
      {WeightType::kF32, 2199786673},  {WeightType::kF16, 679248108},
      {WeightType::kBF16, 2213527694}, {WeightType::kQ4_0, 161788765},
      {WeightType::kQ4_1, 4047088410}, {WeightType::kQ5_0, 1687204920},
      {WeightType::kQ5_1, 345732141},  {WeightType::kQ8_0, 3202461497},
      {WeightType::kQ2_K, 1220630998}, {WeightType::kQ3_K, 226506163},
      {WeightType::kQ4_K, 3858997854}, {WeightType::kQ5_K, 1542266933},
      {WeightType::kQ6_K, 443402159},
  };
  CHECK_EQ(std::size(known), potluck::kTypeCount);
  for (const auto& [type, sum] : known) {
    const auto bytes = RowsOf("blk.1.ffn_down.weight", type, 5, 3, 512);
    check::Equal(SumOf(bytes), sum, potluck::InfoOf(type).name, __FILE__, __LINE__);
  }
  CHECK_EQ(SumOf(RowsOf("output_norm.weight", WeightType::kF32, 0, 1, 512)), 2542247342u);
  CHECK_EQ(SumOf(RowsOf("token_embd.weight", WeightType::kQ8_0, 0, 1, 512)), 42782745u);
}

TEST(rows_blocks_tensors_and_seeds_differ) {
  const std::string name = "blk.0.attn_q.weight";
  const auto bytes = RowsOf(name, WeightType::kQ4_0, 0, 2, 64);
  const size_t row_bytes = bytes.size() / 2;
  CHECK(!std::equal(bytes.begin(), bytes.begin() + 36, bytes.begin() + 36));
  CHECK(std::memcmp(&bytes[0], &bytes[18], 18) != 0);
  CHECK(bytes != RowsOf("blk.1.attn_q.weight", WeightType::kQ4_0, 0, 2, 64));
  CHECK(bytes != RowsOf(name, WeightType::kQ4_0, 0, 2, 64, {2, 4}));
  const auto second = RowsOf(name, WeightType::kQ4_0, 1, 1, 64);
  CHECK(std::equal(second.begin(), second.end(), &bytes[row_bytes]));
}

TEST(weights_of_every_type_have_the_wanted_deviation_and_no_mean) {
  for (size_t t = 0; t < potluck::kTypeCount; ++t) {
    const TypeInfo& info = potluck::AllTypes()[t];
    for (const char* name : {"token_embd.weight", "output.weight", "blk.3.ffn_down.weight"}) {
      const auto values = ValuesOf(name, info.type, 8192);
      CHECK_EQ(values.size(), size_t{8 * 8192});
      double sum = 0, squares = 0;
      for (const float value : values) {
        CHECK(std::isfinite(value));
        sum += static_cast<double>(value);
        squares += static_cast<double>(value) * static_cast<double>(value);
      }
      const double n = static_cast<double>(values.size());
      const double wanted = Deviation(kModel, name, 8192);
      CHECK(std::fabs(std::sqrt(squares / n) / wanted - 1) < 0.05);
      CHECK(std::fabs(sum / n) < 0.05 * wanted);
      std::vector<float> some(values.begin(), values.begin() + 512);
      std::sort(some.begin(), some.end());
      CHECK(std::unique(some.begin(), some.end()) - some.begin() > 60);
    }
  }
}

TEST(deep_models_add_less_a_layer) {
  const double one = Deviation({1, 1}, "blk.0.ffn_down.weight", 1024);
  CHECK(std::fabs(one / Deviation({1, 64}, "blk.0.ffn_down.weight", 1024) - 8) < 1e-9);
  CHECK_EQ(Deviation({1, 1}, "blk.0.ffn_up.weight", 1024), 1.0 / 32);
  CHECK_EQ(Deviation({1, 64}, "blk.0.ffn_up.weight", 1024), 1.0 / 32);
}

TEST(norms_are_near_one) {
  const auto bytes = RowsOf("blk.2.ffn_norm.weight", WeightType::kF32, 0, 1, 4096);
  std::vector<float> values(4096);
  std::memcpy(values.data(), bytes.data(), bytes.size());
  const auto [least, most] = std::minmax_element(values.begin(), values.end());
  CHECK(*least > 0.87f && *least < 0.88f);
  CHECK(*most > 1.12f && *most < 1.13f);
}

TEST(what_can_not_be_made_is_refused) {
  CHECK_THROWS(SyntheticTensor(kModel, "output_norm.weight", WeightType::kQ4_0, 64),
               potluck::ModelError);
  for (const size_t n_layers : {size_t{0}, size_t{1} << 63}) {
    CHECK_THROWS(SyntheticTensor({1, n_layers}, "output.weight", WeightType::kQ4_0, 64),
                 potluck::ModelError);
  }
}

// Rows of Q and K are taken out of their order while they are packed.
TEST(a_shard_holds_the_rows_of_a_file_whatever_the_threads) {
  const auto tokens = tiny::TokensOf(30);
  Pool one(1);
  auto from_memory = tiny::NewShard(one);
  for (const TensorShape& shape : from_memory->Matrices()) {
    const WeightType type = tiny::TypeOf(shape.name);
    const auto bytes = RowsOf(shape.name, type, 0, shape.rows, shape.cols);
    from_memory->Put(shape.name, potluck::InfoOf(type).name, shape.rows, shape.cols, 0,
                     bytes.data(), bytes.size());
  }
  from_memory->Seal();
  const auto expected = tiny::Logits(*from_memory, tokens, 30);
  for (const float logit : expected) CHECK(std::isfinite(logit));
  for (const size_t threads : {1, 3}) {
    Pool pool(threads);
    CHECK(SameBits(tiny::Logits(*Loaded(pool, kModel), tokens, 7), expected));
  }
  CHECK(!SameBits(tiny::Logits(*Loaded(one, Synthetic{2, 4}), tokens, 7), expected));
}

TEST(packs_of_synthetic_weights_are_used_for_their_seed_and_layers_only) {
  const tiny::Folder folder;
  const auto tokens = tiny::TokensOf(12);
  Pool pool(2);
  const auto expected = tiny::Logits(*Loaded(pool, kModel), tokens, 12);
  const auto first = tiny::NewShard(pool);
  for (const auto& [part, tensors] : folder.parts()) {
    CHECK_EQ(first->WritePack(folder.pack(part), kModel, tensors), "");
  }
  const auto second = tiny::NewShard(pool);
  for (const auto& [part, tensors] : folder.parts()) {
    CHECK_THROWS(second->MapPack(folder.pack(part), Synthetic{2, 4}, tensors),
                 potluck::DamagedPack);
    CHECK_THROWS(second->MapPack(folder.pack(part), Synthetic{1, 5}, tensors),
                 potluck::DamagedPack);
    CHECK_THROWS(second->MapPack(folder.pack(part), folder.model(), tensors), potluck::DamagedPack);
    CHECK_EQ(second->MapPack(folder.pack(part), kModel, tensors), "");
  }
  second->Seal();
  CHECK(SameBits(tiny::Logits(*second, tokens, 12), expected));
}

CHECK_MAIN
