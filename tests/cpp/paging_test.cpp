// What of mapped weights stays in memory, and what a step reads, drops and leaves.
#include "engine/paging.h"

#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdio>
#include <functional>
#include <memory>
#include <string>
#include <vector>

#include "check.h"
#include "engine/errors.h"
#include "engine/pack_file.h"
#include "packs.h"
#include "tiny_model.h"

using potluck::Pool;
using potluck::Shard;
using potluck::ShardPart;
using tiny::Folder;
using tiny::kKvBytes;
using tiny::kLayers;
using tiny::kWhole;
using tiny::TinyConfig;
using tiny::TokensOf;

namespace {

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
  // Said where it does not hold, for then a test leaves itself out.
  bool CanDrop() const {
    if (!can_drop) std::printf("left out: files in /tmp stay in memory here\n");
    return can_drop;
  }
  bool IsIn(size_t i) const { return IsCached(all[i]->path()); }

  std::vector<std::unique_ptr<potluck::PackFile>> all;
  potluck::SpanWeights span;
  bool can_drop = false;
};

}  // namespace

TEST(a_step_without_logits_reads_no_head_but_what_comes_after_it) {
  const Folder folder;
  const Packs packs(folder);
  if (!packs.CanDrop()) return;
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
    if (!packs.CanDrop()) return;
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
  if (!Packs(folder).CanDrop()) return;
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
