// A folder of packs of the tiny model, and shards that use them.
#pragma once

#include <dirent.h>
#include <fcntl.h>
#include <unistd.h>

#include <algorithm>
#include <map>
#include <memory>
#include <string>
#include <vector>

#include "check.h"
#include "engine/isa.h"
#include "engine/shard.h"
#include "engine/weight_file.h"
#include "tiny_model.h"

namespace tiny {

inline const potluck::ShardPart kWhole = {0, tiny::kLayers, true, true, tiny::kKvBytes, 64};

// A folder with a file of all tensors, gone in the end.
class Folder {
 public:
  explicit Folder(const Config& config = tiny::TinyConfig()) {
    char name[] = "/tmp/potluck_packs_XXXXXX";
    CHECK(mkdtemp(name) != nullptr);
    path_ = name;
    potluck::Pool pool(1);
    const potluck::Shard shard(pool, potluck::ChooseTable("auto"), config, kWhole);
    std::vector<uint8_t> file(77);
    for (const potluck::TensorShape& shape : shard.Matrices()) {
      const auto bytes = tiny::BytesOf(shape);
      parts_[PartOf(shape.name)].push_back({shape.name,
                                            potluck::InfoOf(tiny::TypeOf(shape.name)).name,
                                            shape.rows, shape.cols, file.size()});
      file.insert(file.end(), bytes.begin(), bytes.end());
    }
    Write(model(), file);
  }
  ~Folder() {
    for (const std::string& name : Names()) unlink((path_ + "/" + name).c_str());
    rmdir(path_.c_str());
  }
  Folder(const Folder&) = delete;
  Folder& operator=(const Folder&) = delete;

  const std::string& path() const { return path_; }
  std::string model() const { return path_ + "/model.gguf"; }
  std::string pack(const std::string& part) const { return path_ + "/" + part + ".pack"; }
  const std::map<std::string, std::vector<potluck::TensorSource>>& parts() const { return parts_; }
  std::vector<std::string> Names() const {
    std::vector<std::string> names;
    DIR* const folder = opendir(path_.c_str());
    while (const dirent* entry = readdir(folder)) {
      if (entry->d_name[0] != '.') names.emplace_back(entry->d_name);
    }
    closedir(folder);
    std::sort(names.begin(), names.end());
    return names;
  }

  static void Write(const std::string& path, const std::vector<uint8_t>& bytes) {
    const int descriptor = open(path.c_str(), O_WRONLY | O_CREAT | O_TRUNC, 0600);
    CHECK(write(descriptor, bytes.data(), bytes.size()) == static_cast<ssize_t>(bytes.size()));
    close(descriptor);
  }
  static std::vector<uint8_t> Read(const std::string& path) {
    const potluck::WeightFile file(path);
    std::vector<uint8_t> bytes(file.size_bytes());
    file.Read(0, bytes.size(), bytes.data());
    return bytes;
  }

 private:
  static std::string PartOf(const std::string& name) {
    if (name.compare(0, 4, "blk.") == 0) return "layer" + name.substr(4, 1);
    return name.find("embd") != std::string::npos ? "embedding" : "head";
  }

  std::string path_;
  std::map<std::string, std::vector<potluck::TensorSource>> parts_;
};

inline std::unique_ptr<potluck::Shard> NewShard(potluck::Pool& pool,
                                                const Config& config = tiny::TinyConfig()) {
  return std::make_unique<potluck::Shard>(pool, potluck::ChooseTable("auto"), config, kWhole);
}

inline void WriteAll(potluck::Shard& shard, const Folder& folder) {
  for (const auto& [part, tensors] : folder.parts()) {
    CHECK_EQ(shard.WritePack(folder.pack(part), folder.model(), tensors), "");
  }
}

// The logits of a session in chunks.
inline std::vector<float> Logits(potluck::Shard& shard, const std::vector<int32_t>& tokens,
                                 size_t chunk) {
  std::vector<float> logits(tokens.size() * 45);
  shard.Close(1);
  shard.Open(1, tokens.size());
  for (size_t at = 0; at < tokens.size(); at += chunk) {
    const size_t n = std::min(chunk, tokens.size() - at);
    shard.Forward(tokens.data() + at, n, {{1, at, n, n}}, logits.data() + at * 45, n * 45);
  }
  return logits;
}

// Maps everything; what was not mapped and why.
inline std::map<std::string, std::string> MapAll(potluck::Shard& shard, const Folder& folder) {
  std::map<std::string, std::string> failed;
  for (const auto& [part, tensors] : folder.parts()) {
    const std::string why = shard.MapPack(folder.pack(part), folder.model(), tensors);
    if (!why.empty()) failed[part] = why;
  }
  return failed;
}

}  // namespace tiny
