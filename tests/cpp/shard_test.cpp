// A shard from loading to logits: the same bits however layers, rows, threads and pages are
// arranged, and a clean refusal of everything that does not fit.
#include "engine/shard.h"

#include <fcntl.h>
#include <unistd.h>

#include <cmath>
#include <cstdio>
#include <cstring>
#include <functional>
#include <map>
#include <memory>
#include <numeric>
#include <random>
#include <string>
#include <vector>

#include "check.h"
#include "engine/errors.h"
#include "engine/isa.h"
#include "engine/types.h"
#include "weights.h"

using potluck::Config;
using potluck::Pool;
using potluck::RowSpan;
using potluck::Shard;
using potluck::ShardPart;
using potluck::TensorShape;
using potluck::WeightType;

namespace {

constexpr size_t kLayers = 4;
constexpr size_t kKvBytes = size_t{4} << 20;

// Small, but odd where models are: grouped heads, a vocabulary that fills no panel, partly rotated
// heads.
Config TinyConfig() {
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

WeightType TypeOf(const std::string& name) {
  if (name.find("norm") != std::string::npos) return WeightType::kF32;
  if (name == "token_embd.weight") return WeightType::kQ8_0;
  if (name == "output.weight") return WeightType::kQ4_0;
  if (name.find("attn_v") != std::string::npos) return WeightType::kF16;
  if (name.find("ffn_down") != std::string::npos) return WeightType::kQ8_0;
  return WeightType::kQ4_1;
}

// A tensor's bytes in the file; the same for every shard.
std::vector<uint8_t> BytesOf(const TensorShape& shape) {
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

void PutAll(Shard& shard) {
  for (const TensorShape& shape : shard.Matrices()) {
    const auto bytes = BytesOf(shape);
    shard.Put(shape.name, potluck::InfoOf(TypeOf(shape.name)).name, shape.rows, shape.cols, 0,
              bytes.data(), bytes.size());
  }
}

struct Made {
  explicit Made(size_t threads = 1, ShardPart part = {0, kLayers, true, true, kKvBytes, 64},
                const std::string& isa = "auto")
      : pool(std::make_unique<Pool>(threads)),
        shard(std::make_unique<Shard>(*pool, potluck::ChooseTable(isa), TinyConfig(), part)) {
    PutAll(*shard);
    shard->Seal();
  }
  Shard* operator->() const { return shard.get(); }
  std::unique_ptr<Pool> pool;
  std::unique_ptr<Shard> shard;
};

std::vector<int32_t> TokensOf(size_t n, uint32_t seed = 1) {
  std::mt19937 random(seed);
  std::vector<int32_t> tokens(n);
  for (int32_t& token : tokens) token = static_cast<int32_t>(random() % 45);
  return tokens;
}

// Logits of every row.
std::vector<float> Run(const Made& made, const std::vector<RowSpan>& rows,
                       const std::vector<int32_t>& tokens) {
  size_t n_wanted = 0;
  for (const RowSpan& r : rows) n_wanted += r.want_logits;
  std::vector<float> logits(n_wanted * TinyConfig().vocab, NAN);
  made->Forward(tokens.data(), tokens.size(), rows, logits.data(), logits.size());
  return logits;
}

// A whole session in chunks, all logits.
std::vector<float> RunSession(const Made& made, const std::vector<int32_t>& tokens, size_t chunk,
                              uint64_t session = 1) {
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

bool SameBits(const std::vector<float>& a, const std::vector<float>& b) {
  return a.size() == b.size() && std::memcmp(a.data(), b.data(), a.size() * sizeof(float)) == 0;
}

std::vector<float> RowsOf(const std::vector<float>& logits, size_t first, size_t n) {
  const auto vocab = static_cast<ptrdiff_t>(TinyConfig().vocab);
  const auto start = logits.begin() + static_cast<ptrdiff_t>(first) * vocab;
  return {start, start + static_cast<ptrdiff_t>(n) * vocab};
}

}  // namespace

TEST(logits_vary_and_are_finite) {
  const auto logits = RunSession(Made(), TokensOf(40), 40);
  double sum = 0, squares = 0;
  for (const float value : logits) {
    CHECK(std::isfinite(value));
    sum += static_cast<double>(value);
    squares += static_cast<double>(value) * static_cast<double>(value);
  }
  const auto n = static_cast<double>(logits.size());
  CHECK(squares / n - sum / n * sum / n > 1e-4);
  CHECK(!SameBits(RowsOf(logits, 0, 1), RowsOf(logits, 39, 1)));
}

TEST(threads_chunks_and_tables_change_no_bit) {
  const auto tokens = TokensOf(200);
  const auto expected = RunSession(Made(1), tokens, 200);
  for (const size_t threads : {1, 2, 3, 4}) {
    for (const size_t chunk : {1, 7, 64, 200}) {
      CHECK(SameBits(RunSession(Made(threads), tokens, chunk), expected));
    }
  }
  for (const std::string& isa : potluck::AvailableIsas()) {
    const Made made(2, {0, kLayers, true, true, kKvBytes, 64}, isa);
    CHECK(SameBits(RunSession(made, tokens, 33), expected));
  }
}

TEST(every_number_of_rows_gives_the_same_bits) {
  const auto tokens = TokensOf(130);
  const auto expected = RunSession(Made(1), tokens, 1);
  const Made made(2);
  for (size_t n = 1; n <= 130; ++n) {
    made->Open(n, n);
    const std::vector<int32_t> part(tokens.begin(), tokens.begin() + static_cast<ptrdiff_t>(n));
    CHECK(SameBits(Run(made, {{n, 0, n, n}}, part), RowsOf(expected, 0, n)));
    made->Close(n);
  }
}

TEST(neighbours_in_a_batch_change_no_bit) {
  const auto a = TokensOf(90, 2), b = TokensOf(70, 3), c = TokensOf(50, 4);
  const auto alone_a = RunSession(Made(1), a, 90);
  const auto alone_b = RunSession(Made(1), b, 70);
  const auto alone_c = RunSession(Made(1), c, 50);
  const Made made(2);
  std::mt19937 random(8);
  for (uint64_t session = 1; session <= 3; ++session) made->Open(session, 90);
  size_t at[3] = {};
  const std::vector<int32_t>* tokens[3] = {&a, &b, &c};
  const std::vector<float>* alone[3] = {&alone_a, &alone_b, &alone_c};
  while (at[0] < 90 || at[1] < 70 || at[2] < 50) {
    std::vector<RowSpan> rows;
    std::vector<int32_t> ids;
    for (const size_t i : {2, 0, 1}) {
      const size_t left = tokens[i]->size() - at[i];
      const size_t n = std::min<size_t>(left, random() % 3 != 0 ? random() % 3 : random() % 20);
      if (n == 0) continue;
      rows.push_back({i + 1, at[i], n, n});
      for (size_t t = 0; t < n; ++t) ids.push_back((*tokens[i])[at[i] + t]);
    }
    const auto logits = Run(made, rows, ids);
    size_t row = 0;
    for (const RowSpan& r : rows) {
      const size_t i = r.session - 1;
      CHECK(SameBits(RowsOf(logits, row, r.n_tokens), RowsOf(*alone[i], at[i], r.n_tokens)));
      row += r.n_tokens;
      at[i] += r.n_tokens;
    }
  }
}

TEST(only_wanted_rows_get_logits) {
  const auto tokens = TokensOf(30);
  const auto all = RunSession(Made(1), tokens, 30);
  const Made made(2);
  made->Open(1, 30);
  CHECK(SameBits(Run(made, {{1, 0, 30, 2}}, tokens), RowsOf(all, 28, 2)));
  made->Truncate(1, 0);
  CHECK(Run(made, {{1, 0, 30, 0}}, tokens).empty());
  CHECK_EQ(made->Length(1), 30u);
}

TEST(a_model_in_two_shards_is_the_model_in_one) {
  const auto tokens = TokensOf(77);
  const auto expected = RunSession(Made(2), tokens, 20);
  for (const size_t cut : {1, 2, 3}) {
    const Made first(1, {0, cut, true, false, kKvBytes, 64});
    const Made second(2, {cut, kLayers, false, true, kKvBytes, 64});
    first->Open(5, 77);
    second->Open(5, 77);
    std::vector<float> logits;
    for (size_t start = 0; start < 77; start += 11) {
      std::vector<float> x(11 * 64), part(11 * 45);
      const std::vector<RowSpan> rows = {{5, start, 11, 11}};
      CHECK_EQ(first->Forward(tokens.data() + start, 11, rows, x.data(), x.size()).size(), cut);
      second->Forward(x.data(), x.size(), rows, part.data(), part.size());
      logits.insert(logits.end(), part.begin(), part.end());
    }
    CHECK(SameBits(logits, expected));
  }
}

TEST(pages_in_any_order_and_used_before_change_no_bit) {
  const auto tokens = TokensOf(150);
  const auto expected = RunSession(Made(1), tokens, 150);
  const Made made(2);
  for (uint64_t session = 10; session < 20; ++session) {
    made->Open(session, 60);
    Run(made, {{session, 0, 60, 0}}, TokensOf(60, static_cast<uint32_t>(session)));
  }
  for (const uint64_t session : {13, 10, 17, 12, 19}) made->Close(session);
  CHECK(SameBits(RunSession(made, tokens, 50), expected));
}

TEST(truncate_and_replay_give_the_same_bits) {
  const auto tokens = TokensOf(120);
  const auto expected = RunSession(Made(1), tokens, 120);
  const Made made(2);
  RunSession(made, tokens, 31);
  for (const size_t position : {119, 64, 63, 17, 0}) {
    made->Truncate(1, position);
    CHECK_EQ(made->Length(1), position);
    const size_t n = 120 - position;
    const std::vector<int32_t> part(tokens.begin() + static_cast<ptrdiff_t>(position),
                                    tokens.end());
    CHECK(SameBits(Run(made, {{1, position, n, n}}, part), RowsOf(expected, position, n)));
  }
  // A start below the length overwrites without a truncate.
  const std::vector<int32_t> part(tokens.begin() + 40, tokens.begin() + 50);
  CHECK(SameBits(Run(made, {{1, 40, 10, 10}}, part), RowsOf(expected, 40, 10)));
  CHECK_EQ(made->Length(1), 50u);
}

TEST(a_fork_goes_on_as_its_origin_and_parts_without_a_trace) {
  const auto tokens = TokensOf(100), other = TokensOf(100, 6);
  const auto expected = RunSession(Made(1), tokens, 100);
  const Made made(2);
  made->Open(1, 100);
  Run(made, {{1, 0, 41, 0}}, {tokens.begin(), tokens.begin() + 41});
  const size_t before = made->kv_used_bytes();
  made->Fork(1, 2, 100);
  CHECK(made->kv_used_bytes() < 2 * before);
  Run(made, {{2, 30, 40, 0}}, {other.begin(), other.begin() + 40});
  const std::vector<int32_t> rest(tokens.begin() + 41, tokens.end());
  CHECK(SameBits(Run(made, {{1, 41, 59, 59}}, rest), RowsOf(expected, 41, 59)));
  CHECK_THROWS(made->Fork(1, 2, 100), potluck::SessionError);
  CHECK_THROWS(made->Fork(1, 3, 99), potluck::SessionError);
  CHECK_THROWS(made->Fork(8, 3, 99), potluck::UnknownSession);
}

TEST(a_file_in_slabs_and_memory_in_pieces_load_alike) {
  char path[] = "/tmp/potluck_shard_XXXXXX";
  const int descriptor = mkstemp(path);
  CHECK(descriptor >= 0);
  const auto tokens = TokensOf(30);
  const auto expected = RunSession(Made(1), tokens, 30);
  Pool pool(3);
  const ShardPart part = {0, kLayers, true, true, kKvBytes, 64};
  auto from_file = std::make_unique<Shard>(pool, potluck::ChooseTable("auto"), TinyConfig(), part);
  auto in_pieces = std::make_unique<Shard>(pool, potluck::ChooseTable("auto"), TinyConfig(), part);
  off_t offset = 13;
  size_t file_bytes = 0;
  for (const TensorShape& shape : from_file->Matrices()) {
    const auto bytes = BytesOf(shape);
    const char* type = potluck::InfoOf(TypeOf(shape.name)).name;
    CHECK(pwrite(descriptor, bytes.data(), bytes.size(), offset) ==
          static_cast<ssize_t>(bytes.size()));
    from_file->PutFile(shape.name, type, shape.rows, shape.cols, path,
                       static_cast<uint64_t>(offset));
    offset += static_cast<off_t>(bytes.size());
    file_bytes += bytes.size();
    const size_t row_bytes = bytes.size() / shape.rows;
    for (size_t row = 0; row < shape.rows; row += 16) {
      const size_t n = std::min<size_t>(16, shape.rows - row);
      in_pieces->Put(shape.name, type, shape.rows, shape.cols, row, &bytes[row * row_bytes],
                     n * row_bytes);
    }
  }
  CHECK_THROWS(from_file->PutFile("output.weight", "q4_0", 45, 64, path, 13), potluck::ModelError);
  unlink(path);
  close(descriptor);
  CHECK(from_file->shard_bytes() < file_bytes + file_bytes / 20);  // the last panels are padded
  for (auto* shard : {&from_file, &in_pieces}) {
    Made made(1);
    made.shard = std::move(*shard);
    made.shard->Seal();
    CHECK(SameBits(RunSession(made, tokens, 30), expected));
    made.shard.reset();
  }
}

TEST(tied_embeddings_serve_both_ends_and_are_held_once) {
  const auto put = [](Shard& shard) {
    for (TensorShape shape : shard.Matrices()) {
      if (shape.name == "output.weight") {
        if (shard.embeds()) continue;
        shape.name = "token_embd.weight";
      }
      const auto bytes = BytesOf(shape);
      shard.Put(shape.name, potluck::InfoOf(TypeOf(shape.name)).name, shape.rows, shape.cols, 0,
                bytes.data(), bytes.size());
    }
    shard.Seal();
  };
  Pool pool(2);
  const auto& kernels = potluck::ChooseTable("auto");
  Shard whole(pool, kernels, TinyConfig(), {0, kLayers, true, true, kKvBytes, 64});
  Shard last(pool, kernels, TinyConfig(), {2, kLayers, false, true, kKvBytes, 64});
  Shard first(pool, kernels, TinyConfig(), {0, 2, true, false, kKvBytes, 64});
  put(whole);
  put(last);
  put(first);
  CHECK(whole.shard_bytes() < Made()->shard_bytes());
  const auto tokens = TokensOf(9);
  for (Shard* shard : {&whole, &first, &last}) shard->Open(1, 9);
  const std::vector<RowSpan> rows = {{1, 0, 9, 9}};
  std::vector<float> expected(9 * 45), x(9 * 64), logits(9 * 45);
  whole.Forward(tokens.data(), 9, rows, expected.data(), expected.size());
  first.Forward(tokens.data(), 9, rows, x.data(), x.size());
  last.Forward(x.data(), x.size(), rows, logits.data(), logits.size());
  CHECK(SameBits(logits, expected));
}

TEST(wrong_tensors_are_refused_by_name) {
  Pool pool(1);
  Shard shard(pool, potluck::ChooseTable("auto"), TinyConfig(), {1, 2, false, false, kKvBytes, 4});
  const TensorShape up = {"blk.1.ffn_up.weight", 160, 64};
  const auto bytes = BytesOf(up);
  const auto put = [&](const char* name, const char* type, size_t rows, size_t first, size_t n) {
    shard.Put(name, type, rows, 64, first, bytes.data(), n);
  };
  CHECK_THROWS(put("blk.2.ffn_up.weight", "q4_1", 160, 0, bytes.size()), potluck::ModelError);
  CHECK_THROWS(put("token_embd.weight", "q4_1", 45, 0, 45 * 40), potluck::ModelError);
  CHECK_THROWS(put("blk.1.ffn_up.weight", "q4_1", 161, 0, bytes.size()), potluck::ModelError);
  CHECK_THROWS(put("blk.1.ffn_up.weight", "iq9_z", 160, 0, bytes.size()), potluck::ModelError);
  CHECK_THROWS(put("blk.1.ffn_up.weight", "q6_k", 160, 0, bytes.size()), potluck::ModelError);
  CHECK_THROWS(put("blk.1.ffn_up.weight", "q4_1", 160, 0, bytes.size() - 1), potluck::ModelError);
  CHECK_THROWS(put("blk.1.ffn_up.weight", "q4_1", 160, 4, 8 * 40), potluck::ModelError);
  CHECK_THROWS(put("blk.1.ffn_up.weight", "q4_1", 160, 8, bytes.size()), potluck::ModelError);
  CHECK_THROWS(shard.PutFile("blk.1.ffn_up.weight", "q4_1", 160, 64, "/nonexistent", 0),
               potluck::ModelError);
  CHECK_THROWS(shard.PutFile("blk.1.ffn_up.weight", "q4_1", 160, 64, "/dev/null", 0),
               potluck::ModelError);
  put("blk.1.ffn_up.weight", "q4_1", 160, 8, 8 * 40);
  CHECK_THROWS(put("blk.1.ffn_up.weight", "q4_1", 160, 0, bytes.size()), potluck::ModelError);
  CHECK_THROWS(put("blk.1.ffn_up.weight", "q8_0", 160, 0, bytes.size()), potluck::ModelError);
  CHECK_THROWS(shard.Seal(), potluck::ModelError);
  std::vector<uint8_t> damaged = bytes;
  weights::PutHalf(&damaged[40 * 20 + 20], INFINITY);
  CHECK_THROWS(shard.Put("blk.1.ffn_gate.weight", "q4_1", 160, 64, 0, damaged.data(), 160 * 40),
               potluck::ModelError);
}

TEST(a_missing_tensor_is_named) {
  Pool pool(1);
  Shard shard(pool, potluck::ChooseTable("auto"), TinyConfig(), {0, 1, true, true, kKvBytes, 4});
  for (const TensorShape& shape : shard.Matrices()) {
    if (shape.name == "blk.0.attn_v.weight") continue;
    const auto bytes = BytesOf(shape);
    shard.Put(shape.name, potluck::InfoOf(TypeOf(shape.name)).name, shape.rows, shape.cols, 0,
              bytes.data(), bytes.size());
  }
  std::string message;
  try {
    shard.Seal();
  } catch (const potluck::ModelError& error) {
    message = error.what();
  }
  CHECK_EQ(message, "blk.0.attn_v.weight is missing");
  std::vector<float> none;
  CHECK_THROWS(shard.Forward(static_cast<const int32_t*>(nullptr), 0, {}, none.data(), 0),
               potluck::UsageError);
}

TEST(steps_that_do_not_fit_are_refused_and_change_nothing) {
  const Made made(2);
  made->Open(1, 20);
  made->Open(2, 20);
  Run(made, {{1, 0, 5, 1}}, TokensOf(5));
  const auto refuses = [&](const std::vector<RowSpan>& rows, size_t n) {
    return Run(made, rows, TokensOf(n));
  };
  CHECK_THROWS(refuses({{1, 6, 1, 1}}, 1), potluck::SessionError);
  CHECK_THROWS(refuses({{1, 5, 16, 1}}, 16), potluck::SessionError);
  CHECK_THROWS(refuses({{1, SIZE_MAX, 1, 1}}, 1), potluck::SessionError);
  CHECK_THROWS(refuses({{3, 0, 1, 1}}, 1), potluck::UnknownSession);
  CHECK_THROWS(refuses({{1, 5, 1, 1}, {2, 0, 1, 1}, {1, 6, 1, 1}}, 3), potluck::UsageError);
  CHECK_THROWS(refuses({{1, 5, 0, 0}}, 0), potluck::UsageError);
  CHECK_THROWS(refuses({{1, 5, 1, 2}}, 1), potluck::UsageError);
  CHECK_THROWS(refuses({{1, 5, 1, 1}}, 2), potluck::UsageError);
  CHECK_THROWS(refuses({{2, 0, 4, 1}, {1, 7, 1, 1}}, 5), potluck::SessionError);
  for (const int32_t token : {-1, 45, INT32_MAX}) {
    CHECK_THROWS(Run(made, {{2, 0, 2, 1}}, {1, token}), potluck::UsageError);
  }
  CHECK_EQ(made->Length(1), 5u);
  CHECK_EQ(made->Length(2), 0u);
  CHECK(made->Forward(static_cast<const int32_t*>(nullptr), 0, {}, nullptr, 0).size() == 5);
}

TEST(values_that_are_not_finite_are_refused_with_layer_and_session) {
  const Made made(2, {1, 3, false, false, kKvBytes, 64});
  made->Open(7, 64);
  made->Open(8, 64);
  for (const size_t n : {1, 3, 9, 40}) {
    for (const float bad : {NAN, INFINITY, -INFINITY}) {
      auto x = weights::Activations(n + 2, 64, 3);
      std::vector<float> out(x.size());
      x[(n + 1) * 64 + 17] = bad;
      std::string message;
      try {
        made->Forward(x.data(), x.size(), {{7, 0, n, 0}, {8, 0, 2, 0}}, out.data(), out.size());
      } catch (const potluck::FrameError& error) {
        message = error.what();
      }
      CHECK_EQ(message.substr(0, message.find(':')), "layer 1, session 8, position 1");
      CHECK_EQ(made->Length(7), 0u);
      CHECK_EQ(made->Length(8), 0u);
    }
  }
}

TEST(cancel_without_a_step_does_nothing_and_progress_rises) {
  const Made made(2);
  made->Cancel();
  made->Open(1, 10);
  const uint64_t before = made->progress();
  Run(made, {{1, 0, 10, 1}}, TokensOf(10));
  CHECK(made->progress() > before + 5 * kLayers);
  CHECK(made->scratch_bytes() > 0);
}

CHECK_MAIN
