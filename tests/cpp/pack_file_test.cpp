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
#include "packs.h"
#include "tiny_model.h"

using potluck::Pool;
using potluck::RowSpan;
using potluck::Shard;
using potluck::ShardPart;
using potluck::TensorShape;
using potluck::TensorSource;
using tiny::Folder;
using tiny::kKvBytes;
using tiny::kLayers;
using tiny::kWhole;
using tiny::Logits;
using tiny::Made;
using tiny::MapAll;
using tiny::NewShard;
using tiny::RunSession;
using tiny::SameBits;
using tiny::TinyConfig;
using tiny::TokensOf;
using tiny::WriteAll;

namespace {

// Called when a file is to be on the disk; the errno that this then fails with.
std::function<int()> on_sync;
// The same for locks.
std::function<int()> on_lock;

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

CHECK_MAIN
