// Packs: the same bits as from the file, whole or not used at all, and never a crash.
#include "engine/pack_file.h"

#include <dirent.h>
#include <fcntl.h>
#include <signal.h>
#include <sys/file.h>
#include <sys/mman.h>
#include <sys/resource.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <cerrno>
#include <chrono>
#include <cmath>
#include <functional>
#include <map>
#include <memory>
#include <string>
#include <vector>

#include "check.h"
#include "engine/errors.h"
#include "engine/isa.h"
#include "engine/paging.h"
#include "engine/shard.h"
#include "tiny_model.h"

using potluck::Pool;
using potluck::RowSpan;
using potluck::Shard;
using potluck::ShardPart;
using potluck::TensorShape;
using potluck::TensorSource;
using tiny::kKvBytes;
using tiny::kLayers;
using tiny::Made;
using tiny::RunSession;
using tiny::SameBits;
using tiny::TinyConfig;
using tiny::TokensOf;

namespace {

// Called when a file is to be on the disk; the errno that this then fails with.
std::function<int()> on_sync;
// The same for locks.
std::function<int()> on_lock;

const ShardPart kWhole = {0, kLayers, true, true, kKvBytes, 64};

// A folder with a file of all tensors, gone in the end.
class Folder {
 public:
  Folder() {
    char name[] = "/tmp/potluck_packs_XXXXXX";
    CHECK(mkdtemp(name) != nullptr);
    path_ = name;
    Pool pool(1);
    const Shard shard(pool, potluck::ChooseTable("auto"), TinyConfig(), kWhole);
    std::vector<uint8_t> file(77);
    for (const TensorShape& shape : shard.Matrices()) {
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
  const std::map<std::string, std::vector<TensorSource>>& parts() const { return parts_; }
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
  std::map<std::string, std::vector<TensorSource>> parts_;
};

std::unique_ptr<Shard> NewShard(Pool& pool) {
  return std::make_unique<Shard>(pool, potluck::ChooseTable("auto"), TinyConfig(), kWhole);
}

void WriteAll(Shard& shard, const Folder& folder) {
  for (const auto& [part, tensors] : folder.parts()) {
    CHECK_EQ(shard.WritePack(folder.pack(part), folder.model(), tensors), "");
  }
}

// The logits of a session in chunks.
std::vector<float> Logits(Shard& shard, const std::vector<int32_t>& tokens, size_t chunk) {
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
std::map<std::string, std::string> MapAll(Shard& shard, const Folder& folder) {
  std::map<std::string, std::string> failed;
  for (const auto& [part, tensors] : folder.parts()) {
    const std::string why = shard.MapPack(folder.pack(part), folder.model(), tensors);
    if (!why.empty()) failed[part] = why;
  }
  return failed;
}

}  // namespace

// In place of the system's, which can't be made to fail.
extern "C" int fdatasync(int descriptor) {
  errno = on_sync ? on_sync() : 0;
  return errno == 0 ? fsync(descriptor) : -1;
}
extern "C" int flock(int descriptor, int how) noexcept {
  errno = on_lock ? on_lock() : 0;
  return errno == 0 ? static_cast<int>(syscall(SYS_flock, descriptor, how)) : -1;
}

TEST(first_and_second_loads_give_the_bits_of_the_arena_whatever_stays_in_memory) {
  const Folder folder;
  const auto tokens = TokensOf(40);
  const auto expected = RunSession(Made(1), tokens, 40);
  Pool pool(3);
  auto first = NewShard(pool);
  CHECK_EQ(MapAll(*first, folder).size(), kLayers + 2);  // nothing there yet
  WriteAll(*first, folder);
  CHECK(MapAll(*first, folder).empty());
  first->Seal();
  CHECK(SameBits(Logits(*first, tokens, 40), expected));
  CHECK_EQ(first->n_streamed(), 0u);
  for (const size_t resident : {size_t{0}, size_t{600} << 10, size_t{1100} << 10, SIZE_MAX}) {
    auto second = NewShard(pool);
    CHECK(MapAll(*second, folder).empty());
    second->Seal(resident);
    CHECK_EQ(second->n_streamed() > 0, resident != SIZE_MAX);
    for (const size_t chunk : {40u, 7u, 1u}) {
      CHECK(SameBits(Logits(*second, tokens, chunk), expected));
    }
  }
}

TEST(packs_and_the_arena_mix) {
  const Folder folder;
  const auto tokens = TokensOf(20);
  Pool pool(2);
  auto shard = NewShard(pool);
  WriteAll(*shard, folder);
  size_t i = 0;
  for (const auto& [part, tensors] : folder.parts()) {
    if (++i % 2 == 0) {
      CHECK_EQ(shard->MapPack(folder.pack(part), folder.model(), tensors), "");
      continue;
    }
    for (const TensorSource& t : tensors) {
      shard->PutFile(t.name, t.type_name, t.rows, t.cols, folder.model(), t.offset_bytes);
    }
    CHECK_THROWS(shard->MapPack(folder.pack(part), folder.model(), tensors), potluck::ModelError);
  }
  shard->Seal(0);
  CHECK(SameBits(Logits(*shard, tokens, 20), RunSession(Made(1), tokens, 20)));
}

TEST(every_other_header_size_or_source_is_refused_with_its_reason) {
  const Folder folder;
  Pool pool(1);
  auto shard = NewShard(pool);
  WriteAll(*shard, folder);
  const std::string path = folder.pack("layer1");
  const auto& tensors = folder.parts().at("layer1");
  const auto right = Folder::Read(path);
  const auto why = [&](const std::vector<uint8_t>& bytes) -> std::string {
    unlink(path.c_str());  // never in place: others may have mapped it
    Folder::Write(path, bytes);
    try {
      CHECK_EQ(shard->MapPack(path, folder.model(), tensors), "");
      return "";
    } catch (const potluck::DamagedPack& error) {
      return error.what();
    }
  };
  for (const size_t size : {size_t{0}, size_t{1}, size_t{4096}, right.size() - 1}) {
    CHECK(!why({right.begin(), right.begin() + static_cast<ptrdiff_t>(size)}).empty());
  }
  auto longer = right;
  longer.push_back(0);
  CHECK(!why(longer).empty());
  // Magic, layout, format, byte order, count, its own sum, sizes, source, an entry, padding.
  for (const size_t at : {0u, 16u, 32u, 36u, 40u, 44u, 48u, 56u, 64u, 80u, 150u, 5000u}) {
    auto other = right;
    other[at] ^= 1;
    CHECK(!why(other).empty());
  }
  auto reversed = right;
  std::reverse(reversed.begin() + 36, reversed.begin() + 40);
  CHECK(!why(reversed).empty());
  CHECK(!why(Folder::Read(folder.pack("layer2"))).empty());
  unlink(path.c_str());
  mkdir(path.c_str(), 0700);
  CHECK_THROWS(shard->MapPack(path, folder.model(), tensors), potluck::DamagedPack);
  rmdir(path.c_str());
  CHECK(!shard->MapPack(path, folder.model(), tensors).empty());
  CHECK_EQ(why(right), "");
  // The model was written again: as long, but not the same.
  auto again = NewShard(pool);
  const timespec times[2] = {{0, UTIME_OMIT}, {1, 5}};
  utimensat(AT_FDCWD, folder.model().c_str(), times, 0);
  CHECK_THROWS(again->MapPack(path, folder.model(), tensors), potluck::DamagedPack);
}

TEST(contents_that_changed_are_found_before_they_are_used_and_can_be_made_again) {
  const Folder folder;
  const auto tokens = TokensOf(12);
  const auto expected = RunSession(Made(1), tokens, 12);
  Pool pool(2);
  WriteAll(*NewShard(pool), folder);
  for (const std::string part : {"embedding", "layer0", "layer3", "head"}) {
    const auto right = Folder::Read(folder.pack(part));
    const auto& tensors = folder.parts().at(part);
    for (size_t i = 0; i < tensors.size(); ++i) {
      auto damaged = right;
      damaged[(i + 1) * (64 << 10) + 3] ^= 16;  // each begins at a page
      unlink(folder.pack(part).c_str());
      Folder::Write(folder.pack(part), damaged);
      auto shard = NewShard(pool);
      CHECK(MapAll(*shard, folder).empty());
      shard->Seal(0);
      CHECK_THROWS(Logits(*shard, tokens, 12), potluck::DamagedPack);
      CHECK_THROWS(Logits(*shard, tokens, 12), potluck::DamagedPack);
      CHECK_EQ(shard->Length(1), 0u);
      const auto found = shard->DamagedPacks();
      CHECK(found == std::vector<std::string>{folder.pack(part)});
      CHECK_EQ(shard->WritePack(found[0], folder.model(), tensors), "");
      CHECK_EQ(shard->MapPack(found[0], folder.model(), tensors), "");
      CHECK(shard->DamagedPacks().empty());
      CHECK(SameBits(Logits(*shard, tokens, 12), expected));
    }
  }
}

TEST(a_pack_that_shrinks_before_its_first_use_is_an_error_and_no_signal) {
  const Folder folder;
  Pool pool(2);
  auto shard = NewShard(pool);
  WriteAll(*shard, folder);
  CHECK(MapAll(*shard, folder).empty());
  shard->Seal();
  CHECK_EQ(truncate(folder.pack("layer2").c_str(), 100000), 0);
  CHECK_THROWS(Logits(*shard, TokensOf(3), 3), potluck::DamagedPack);
  CHECK_EQ(shard->DamagedPacks().size(), 1u);
}

TEST(what_can_not_be_written_is_told_and_leaves_nothing) {
  const Folder folder;
  Pool pool(2);
  auto shard = NewShard(pool);
  const auto& tensors = folder.parts().at("layer0");
  CHECK(!shard->WritePack("/nonexistent/a.pack", folder.model(), tensors).empty());
  CHECK(!shard->WritePack("/dev/full/a.pack", folder.model(), tensors).empty());
  signal(SIGXFSZ, SIG_IGN);  // a limit of the process stands for a full disk
  const rlimit before = [] {
    rlimit limit{};
    getrlimit(RLIMIT_FSIZE, &limit);
    return limit;
  }();
  for (const rlim_t bytes : {rlim_t{0}, rlim_t{70000}, rlim_t{200000}}) {
    const rlimit small = {bytes, before.rlim_max};
    setrlimit(RLIMIT_FSIZE, &small);
    CHECK(!shard->WritePack(folder.pack("layer0"), folder.model(), tensors).empty());
    setrlimit(RLIMIT_FSIZE, &before);
    CHECK_EQ(folder.Names().size(), 1u);
  }
  auto damaged = tensors;
  damaged[1].offset_bytes = size_t{1} << 30;
  CHECK_THROWS(shard->WritePack(folder.pack("layer0"), folder.model(), damaged),
               potluck::ModelError);
  damaged = tensors;
  damaged[1].name = "blk.9.attn_q.weight";
  CHECK_THROWS(shard->WritePack(folder.pack("layer0"), folder.model(), damaged),
               potluck::ModelError);
  CHECK_THROWS(shard->WritePack(folder.pack("layer0"), folder.model(), {}), potluck::UsageError);
  CHECK_EQ(folder.Names().size(), 1u);
}

TEST(writing_and_reading_count_as_progress) {
  const Folder folder;
  Pool pool(2);
  auto shard = NewShard(pool);
  for (const auto& [part, tensors] : folder.parts()) {
    const uint64_t before = shard->progress();
    CHECK_EQ(shard->WritePack(folder.pack(part), folder.model(), tensors), "");
    CHECK(shard->progress() >= before + tensors.size());
  }
  const uint64_t before = shard->progress();
  for (const TensorSource& t : folder.parts().at("head")) {
    shard->PutFile(t.name, t.type_name, t.rows, t.cols, folder.model(), t.offset_bytes);
  }
  CHECK(shard->progress() > before);
}

TEST(a_pack_is_on_the_disk_before_it_has_its_name) {
  const Folder folder;
  Pool pool(2);
  auto shard = NewShard(pool);
  const std::string path = folder.pack("layer0");
  const auto& tensors = folder.parts().at("layer0");
  size_t n_syncs = 0;
  int error = EIO;
  on_sync = [&] {
    ++n_syncs;
    CHECK(access(path.c_str(), F_OK) != 0);
    return error;
  };
  CHECK(shard->WritePack(path, folder.model(), tensors).find("error") != std::string::npos);
  CHECK_EQ(folder.Names().size(), 1u);
  for (const int known_by_few : {0, EINVAL, ENOSYS}) {
    error = known_by_few;
    CHECK_EQ(shard->WritePack(path, folder.model(), tensors), "");
    CHECK_EQ(shard->MapPack(path, folder.model(), tensors), "");
    unlink(path.c_str());
  }
  CHECK_EQ(n_syncs, 4u);
  on_sync = nullptr;
}

TEST(a_part_that_is_swept_away_before_it_is_locked_is_begun_again) {
  const Folder folder;
  const auto& tensors = folder.parts().at("layer0");
  Pool pool(1);
  auto shard = NewShard(pool);
  size_t n_swept = 0;
  on_lock = [&] {
    for (const std::string& name : folder.Names()) {
      if (name.find(".part-") == std::string::npos || n_swept == 3) continue;
      n_swept += unlink((folder.path() + "/" + name).c_str()) == 0;
    }
    return 0;
  };
  CHECK_EQ(shard->WritePack(folder.pack("layer0"), folder.model(), tensors), "");
  on_lock = nullptr;
  CHECK_EQ(n_swept, 3u);
  CHECK_EQ(shard->MapPack(folder.pack("layer0"), folder.model(), tensors), "");
}

TEST(a_file_system_without_locks_holds_packs_too) {
  const Folder folder;
  const auto& tensors = folder.parts().at("layer0");
  Pool pool(1);
  auto shard = NewShard(pool);
  for (const int error : {EOPNOTSUPP, ENOSYS, ENOLCK}) {
    on_lock = [error] { return error; };
    CHECK_EQ(shard->WritePack(folder.pack("layer0"), folder.model(), tensors), "");
    CHECK_EQ(shard->MapPack(folder.pack("layer0"), folder.model(), tensors), "");
  }
  on_lock = nullptr;
}

TEST(a_pack_in_use_is_locked_until_its_shard_is_gone) {
  const Folder folder;
  Pool pool(1);
  auto shard = NewShard(pool);
  WriteAll(*shard, folder);
  const int other = open(folder.pack("head").c_str(), O_RDONLY);
  CHECK_EQ(flock(other, LOCK_EX | LOCK_NB), 0);
  flock(other, LOCK_UN);
  CHECK(MapAll(*shard, folder).empty());
  CHECK_EQ(flock(other, LOCK_EX | LOCK_NB), -1);
  CHECK_EQ(flock(other, LOCK_SH | LOCK_NB), 0);  // several may use it
  flock(other, LOCK_UN);
  shard.reset();
  CHECK_EQ(flock(other, LOCK_EX | LOCK_NB), 0);
  close(other);
}

TEST(a_writer_that_is_killed_leaves_no_pack_in_use) {
  const Folder folder;
  const auto& tensors = folder.parts().at("layer0");
  size_t n_cut = 0;
  const auto deadline = std::chrono::steady_clock::now() + std::chrono::seconds(30);
  for (int turn = 0; turn < 20 || (n_cut == 0 && std::chrono::steady_clock::now() < deadline);
       ++turn) {
    const pid_t child = fork();
    if (child == 0) {
      Pool pool(1);
      auto shard = NewShard(pool);
      for (;;) shard->WritePack(folder.pack("layer0"), folder.model(), tensors);
    }
    usleep(3000 + 500 * (turn % 20));
    kill(child, SIGKILL);
    waitpid(child, nullptr, 0);
    n_cut += folder.Names().size() > 2;
    Pool pool(1);
    auto shard = NewShard(pool);
    if (access(folder.pack("layer0").c_str(), F_OK) != 0) continue;
    CHECK_EQ(shard->MapPack(folder.pack("layer0"), folder.model(), tensors), "");
  }
  CHECK(n_cut > 0);  // else it was never killed in the middle
}

// Whether more than half of a file is in the page cache.
bool IsCached(const std::string& path) {
  const potluck::WeightFile file(path);
  const size_t n_bytes = file.size_bytes();
  void* const mapped = mmap(nullptr, n_bytes, PROT_READ, MAP_SHARED, file.descriptor(), 0);
  CHECK(mapped != MAP_FAILED);
  const auto page = static_cast<size_t>(sysconf(_SC_PAGESIZE));
  std::vector<unsigned char> cached((n_bytes + page - 1) / page);
  CHECK_EQ(mincore(mapped, n_bytes, cached.data()), 0);
  munmap(mapped, n_bytes);
  const auto n = std::count_if(cached.begin(), cached.end(), [](auto c) { return (c & 1) != 0; });
  return 2 * static_cast<size_t>(n) > cached.size();
}

// True as soon as it holds, false after a while.
bool Soon(const std::function<bool()>& condition, int tries = 5000) {
  for (int i = 0; i < tries; ++i) {
    if (condition()) return true;
    usleep(1000);
  }
  return false;
}

// Packs of 1 MiB, for a span of three layers.
struct Packs {
  explicit Packs(const Folder& folder) {
    potluck::TensorForm form;
    form.shape = {"x.weight", 256, 1024};
    form.type = potluck::FindType("f32");
    const potluck::PackPlan plan({form}, {});
    const std::vector<uint8_t> bytes(form.packed_bytes(), 7);
    for (const char* name : {"0", "1", "2", "head", "embedding"}) {
      potluck::PackWriter writer(folder.pack(name), plan, 1);
      for (size_t first = 0; first < form.n_panels(); first += form.PiecePanels()) {
        const size_t last = std::min(first + form.PiecePanels(), form.n_panels());
        writer.Write(0, {0, first, last}, bytes.data());
      }
      CHECK_EQ(writer.Finish(), "");
      std::string why;
      all.push_back(potluck::PackFile::Open(folder.pack(name), plan, &why));
      CHECK_EQ(why, "");
    }
    span.layers.resize(3);
    for (size_t i = 0; i < 3; ++i) span.layers[i].packs = {all[i].get()};
    span.head_packs = {all[3].get()};
    span.embedding_packs = {all[4].get()};
    all[0]->Drop();
    can_drop = !IsCached(all[0]->path());  // a disk that is memory itself drops nothing
  }
  bool IsIn(size_t i) const { return IsCached(all[i]->path()); }

  std::vector<std::unique_ptr<potluck::PackFile>> all;
  potluck::SpanWeights span;
  bool can_drop = false;
};

TEST(a_step_without_logits_reads_no_head_but_what_comes_after_it) {
  const Folder folder;
  const Packs packs(folder);
  if (!packs.can_drop) return;
  Pool pool(1);
  std::atomic<uint64_t> progress{0};
  potluck::Paging paging(packs.span, 0);
  for (const bool uses_head : {true, false, false, true}) {
    paging.Start(uses_head);
    for (size_t i = 0; i < 3; ++i) {
      const potluck::PagedUnit unit(paging, i, pool, &progress);
      CHECK(Soon([&] { return packs.IsIn(i); }));
      if (i < 2) CHECK(Soon([&] { return packs.IsIn(i + 1); }));
    }
    // It would be read by now: a few milliseconds are given to what must not happen.
    CHECK_EQ(Soon([&] { return packs.IsIn(3); }, uses_head ? 5000 : 20), uses_head);
    if (uses_head) {
      const potluck::PagedUnit unit(paging, 3, pool, &progress);
    } else {
      paging.Leave(3);
    }
    CHECK(Soon([&] { return packs.IsIn(0); }));
    CHECK(!packs.IsIn(1) && !packs.IsIn(2) && !packs.IsIn(3));
  }
}

TEST(an_embedding_is_dropped_after_its_check_unless_it_is_the_head_too) {
  for (const bool is_tied : {false, true}) {
    const Folder folder;
    Packs packs(folder);
    if (!packs.can_drop) return;
    if (is_tied) packs.span.head_packs.push_back(packs.all[4].get());  // the norm's is its own
    packs.all[4]->Drop();
    Pool pool(1);
    std::atomic<uint64_t> progress{0};
    potluck::Paging paging(packs.span, 0);
    paging.EnterEmbedding(pool, &progress);
    CHECK_EQ(packs.IsIn(4), is_tied);
  }
}

TEST(a_step_that_fails_in_a_layer_leaves_it) {
  const Folder folder;
  if (!Packs(folder).can_drop) return;
  Pool pool(1);
  const ShardPart part = {1, 3, false, false, kKvBytes, 4};
  Shard shard(pool, potluck::ChooseTable("auto"), TinyConfig(), part);
  for (const std::string name : {"layer1", "layer2"}) {
    const auto& tensors = folder.parts().at(name);
    CHECK_EQ(shard.WritePack(folder.pack(name), folder.model(), tensors), "");
    CHECK_EQ(shard.MapPack(folder.pack(name), folder.model(), tensors), "");
  }
  shard.Seal(0);
  shard.Open(1, 1);
  const std::vector<float> input(64, INFINITY);
  std::vector<float> output(64);
  CHECK_THROWS(shard.Forward(input.data(), 64, {{1, 0, 1, 0}}, output.data(), 64),
               potluck::FrameError);
  CHECK(Soon([&] { return IsCached(folder.pack("layer2")); }));  // what is used next
  CHECK(!IsCached(folder.pack("layer1")));
}

TEST(units_that_stay_fit_and_are_spread_evenly) {
  using potluck::ChooseResident;
  CHECK(ChooseResident({5, 5, 5}, 15) == std::vector<bool>(3, true));
  CHECK(ChooseResident({5, 5, 5}, 0) == std::vector<bool>(3, false));
  for (size_t n = 3; n < 40; ++n) {
    const std::vector<size_t> sizes(n, 10);
    for (size_t room = 0; room < 10 * n; room += 5) {
      const auto stays = ChooseResident(sizes, room);
      const auto kept = static_cast<size_t>(std::count(stays.begin(), stays.end(), true));
      CHECK(kept == 0 || 10 * (kept + 2) <= room);
      CHECK(10 * (kept + 4) > room || kept + 2 >= n);
      // Between two that pass, as many stay as between any other two, but for one; where a step
      // ends and the next begins, the rest.
      std::vector<size_t> between;
      size_t run = 0;
      for (size_t i = 0; i < n; ++i) {
        if (stays[i]) {
          ++run;
        } else {
          between.push_back(run);
          run = 0;
        }
      }
      if (between.size() < 3) continue;
      const auto [least, most] = std::minmax_element(between.begin() + 1, between.end());
      CHECK(*most <= *least + 1);
    }
  }
}

CHECK_MAIN
