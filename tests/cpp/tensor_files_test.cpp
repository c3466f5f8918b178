// Tensors that each lie in a file of their own: the same shard, the same packs, and nothing of a
// file that is not exactly the tensor.
#include <sys/stat.h>
#include <unistd.h>

#include <cstdlib>
#include <memory>
#include <string>
#include <vector>

#include "check.h"
#include "engine/errors.h"
#include "engine/shard.h"
#include "packs.h"
#include "tiny_model.h"

using potluck::Pool;
using potluck::Shard;
using potluck::TensorFiles;
using potluck::TensorSource;
using tiny::BytesOf;
using tiny::Folder;
using tiny::Logits;
using tiny::Made;
using tiny::NewShard;
using tiny::RunSession;
using tiny::SameBits;
using tiny::TokensOf;

namespace {

std::string FileOf(const Folder& folder, const std::string& tensor) {
  return folder.path() + "/" + tensor + ".tensor";
}

// Each tensor of the folder's model, written to its own file.
TensorFiles WriteFiles(const Folder& folder) {
  TensorFiles files;
  files.identity = {77, -5};
  for (const auto& [part, tensors] : folder.parts()) {
    for (const TensorSource& tensor : tensors) {
      Folder::Write(FileOf(folder, tensor.name), BytesOf({tensor.name, tensor.rows, tensor.cols}));
      files.paths[tensor.name] = FileOf(folder, tensor.name);
    }
  }
  return files;
}

void PutAll(Shard& shard, const Folder& folder, const TensorFiles& files) {
  for (const auto& [part, tensors] : folder.parts()) {
    for (const TensorSource& t : tensors) {
      // What the model's own file would have it at is of no concern.
      shard.PutFile(t.name, t.type_name, t.rows, t.cols, files, t.offset_bytes);
    }
  }
  shard.Seal();
}

}  // namespace

TEST(a_file_for_each_tensor_gives_the_bits_of_one_for_all) {
  const Folder folder;
  const TensorFiles files = WriteFiles(folder);
  const auto tokens = TokensOf(30);
  const auto expected = RunSession(Made(1), tokens, 30);
  for (const size_t threads : {1, 3}) {
    Pool pool(threads);
    const auto shard = NewShard(pool);
    PutAll(*shard, folder, files);
    CHECK(SameBits(Logits(*shard, tokens, 7), expected));
  }
}

TEST(a_pack_of_such_tensors_is_mapped_when_their_files_are_gone) {
  const Folder folder;
  const TensorFiles files = WriteFiles(folder);
  const auto tokens = TokensOf(30);
  const auto expected = RunSession(Made(1), tokens, 30);
  Pool pool(2);
  const auto writer = NewShard(pool);
  for (const auto& [part, tensors] : folder.parts()) {
    CHECK_EQ(writer->WritePack(folder.pack(part), files, tensors), "");
  }
  for (const auto& [name, path] : files.paths) unlink(path.c_str());
  const auto shard = NewShard(pool);
  for (const auto& [part, tensors] : folder.parts()) {
    CHECK_EQ(shard->MapPack(folder.pack(part), files, tensors), "");
  }
  shard->Seal();
  CHECK(SameBits(Logits(*shard, tokens, 30), expected));
}

TEST(a_pack_of_other_contents_is_never_used) {
  const Folder folder;
  TensorFiles files = WriteFiles(folder);
  Pool pool(1);
  const auto shard = NewShard(pool);
  const auto& layer = folder.parts().at("layer2");
  CHECK_EQ(shard->WritePack(folder.pack("layer2"), files, layer), "");
  for (const potluck::PackSource other :
       {potluck::PackSource{78, -5}, potluck::PackSource{77, 5}}) {
    TensorFiles changed = files;
    changed.identity = other;
    CHECK_THROWS(shard->MapPack(folder.pack("layer2"), changed, layer), potluck::DamagedPack);
  }
  CHECK_THROWS(shard->MapPack(folder.pack("layer2"), folder.model(), layer), potluck::DamagedPack);
  CHECK_EQ(shard->MapPack(folder.pack("layer2"), files, layer), "");
}

TEST(a_file_that_is_not_exactly_the_tensor_is_refused) {
  const Folder folder;
  TensorFiles files = WriteFiles(folder);
  const TensorSource up = {"blk.1.ffn_up.weight", "q4_1", 160, 64, 0};
  auto bytes = Folder::Read(files.paths[up.name]);
  Pool pool(2);
  const auto put = [&] {
    const auto shard = NewShard(pool);
    shard->PutFile(up.name, up.type_name, up.rows, up.cols, files, 0);
  };
  put();
  bytes.push_back(0);
  Folder::Write(files.paths[up.name], bytes);
  CHECK_THROWS(put(), potluck::ModelError);
  bytes.resize(bytes.size() - 2);
  Folder::Write(files.paths[up.name], bytes);
  CHECK_THROWS(put(), potluck::ModelError);
  // The pack is not written then, and nothing is left of it.
  const auto shard = NewShard(pool);
  const size_t n_files = folder.Names().size();
  CHECK_THROWS(shard->WritePack(folder.pack("layer1"), files, folder.parts().at("layer1")),
               potluck::ModelError);
  CHECK_EQ(folder.Names().size(), n_files);
  unlink(files.paths[up.name].c_str());
  CHECK_THROWS(put(), potluck::ModelError);
  CHECK_EQ(mkfifo(files.paths[up.name].c_str(), 0600), 0);  // without a writer
  CHECK_THROWS(put(), potluck::ModelError);
  files.paths.erase(up.name);
  CHECK_THROWS(put(), potluck::ModelError);
}

CHECK_MAIN
