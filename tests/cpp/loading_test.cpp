// Weights into a shard: from a file and from memory alike, exact in size, and refused by name if
// they are not what the span needs.
#include <fcntl.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <memory>
#include <string>
#include <vector>

#include "check.h"
#include "engine/errors.h"
#include "engine/isa.h"
#include "engine/shard.h"
#include "tiny_model.h"
#include "weights.h"

using potluck::Pool;
using potluck::RowSpan;
using potluck::Shard;
using potluck::ShardPart;
using potluck::TensorShape;
using tiny::BytesOf;
using tiny::kKvBytes;
using tiny::kLayers;
using tiny::Made;
using tiny::RunSession;
using tiny::SameBits;
using tiny::TinyConfig;
using tiny::TokensOf;
using tiny::TypeOf;

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
  char folder[] = "/tmp/potluck_pipe_XXXXXX";
  CHECK(mkdtemp(folder) != nullptr);
  const std::string pipe = std::string(folder) + "/pipe";  // without a writer
  CHECK_EQ(mkfifo(pipe.c_str(), 0600), 0);
  CHECK_THROWS(shard.PutFile("blk.1.ffn_up.weight", "q4_1", 160, 64, pipe, 0), potluck::ModelError);
  unlink(pipe.c_str());
  rmdir(folder);
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

CHECK_MAIN
