// Pages and sessions against a model that keeps every position's value by itself.
#include "engine/kv.h"

#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <map>
#include <random>
#include <vector>

#include "check.h"
#include "engine/errors.h"

using potluck::KvPages;
using potluck::KvShape;

namespace {

constexpr KvShape kShape = {2, 2, 24};  // a page is no multiple of the system's
constexpr size_t kPage = potluck::kKvPageTokens;

KvPages MakePages(size_t n_pages, size_t max_sessions = 64) {
  return KvPages(kShape, n_pages * kShape.PageBytes(), max_sessions);
}

// A position's mark: one value in the last layer and head of its page.
uint16_t& MarkAt(const KvPages& kv, uint64_t session, size_t position) {
  uint8_t* const section = kv.Section(kv.Table(session)[position / kPage], 1, 1);
  return reinterpret_cast<uint16_t*>(section)[position % kPage];
}

// Writes positions [start, stop) as a step does.
void Write(KvPages& kv, uint64_t session, size_t start, size_t stop, uint16_t mark) {
  kv.Prepare(session, start, stop);
  for (size_t position = start; position < stop; ++position) {
    MarkAt(kv, session, position) = static_cast<uint16_t>(mark + position);
  }
  kv.Commit(session, stop);
}

size_t ResidentBytes(const uint8_t* start, size_t n_bytes) {
  const auto unit = static_cast<size_t>(sysconf(_SC_PAGESIZE));
  std::vector<unsigned char> resident(n_bytes / unit);
  auto* const address = const_cast<uint8_t*>(start);
  CHECK_EQ(mincore(address, n_bytes, resident.data()), 0);
  size_t n = 0;
  for (const unsigned char flags : resident) n += flags & 1u;
  return n * unit;
}

struct Expected {
  std::vector<uint16_t> marks;  // by position
  size_t room;
};

void CheckSame(const KvPages& kv, const std::map<uint64_t, Expected>& expected) {
  for (const auto& [session, want] : expected) {
    CHECK_EQ(kv.Length(session), want.marks.size());
    for (size_t position = 0; position < want.marks.size(); ++position) {
      if (MarkAt(kv, session, position) == want.marks[position]) continue;
      CHECK_EQ(MarkAt(kv, session, position), want.marks[position]);
      return;
    }
  }
}

}  // namespace

TEST(a_byte_a_value_takes_about_half_the_room) {
  const KvShape f16 = {30, 3, 64};
  const KvShape q8 = {30, 3, 64, potluck::KvType::kQ8};
  CHECK_EQ(f16.PageBytes(), size_t{30 * 3 * 16 * 64 * 2 * 2});
  CHECK_EQ(q8.PageBytes(), size_t{30 * 3 * 16 * (64 + 4) * 2});  // 0.53 of it
  CHECK_EQ((KvShape{1, 1, 22, potluck::KvType::kQ8}.SectionBytes()), size_t{16 * (24 + 4) * 2});
}

TEST(opening_reserves_room_that_writing_never_lacks) {
  KvPages kv = MakePages(4);
  kv.Open(1, 33);
  CHECK_EQ(kv.used_pages(), 3u);
  CHECK_THROWS(kv.Open(2, 17), potluck::Full);
  kv.Open(2, 16);
  Write(kv, 1, 0, 33, 0);
  Write(kv, 2, 0, 16, 0);
  CHECK_EQ(kv.used_pages(), 4u);
}

TEST(a_step_must_not_skip_and_must_not_leave_its_room) {
  KvPages kv = MakePages(4);
  kv.Open(1, 20);
  CHECK_THROWS(kv.Prepare(1, 1, 2), potluck::SessionError);
  CHECK_THROWS(kv.Prepare(1, 0, 21), potluck::SessionError);
  CHECK_THROWS(kv.Prepare(9, 0, 1), potluck::UnknownSession);
  CHECK_THROWS(kv.Open(1, 5), potluck::SessionError);
  CHECK_THROWS(kv.Open(2, 0), potluck::UsageError);
  CHECK_EQ(kv.Length(1), 0u);
}

TEST(places_for_sessions_are_limited) {
  KvPages kv = MakePages(8, 2);
  kv.Open(1, 1);
  kv.Open(2, 1);
  CHECK_THROWS(kv.Open(3, 1), potluck::Full);
  kv.Close(1);
  kv.Close(77);
  kv.Open(3, 1);
}

TEST(forks_share_full_pages_and_part_when_one_writes) {
  KvPages kv = MakePages(6);
  kv.Open(1, 48);
  Write(kv, 1, 0, 40, 100);
  kv.Fork(1, 2, 48);
  CHECK_EQ(kv.used_pages(), 4u);  // two shared, one each
  CHECK_EQ(kv.Length(2), 40u);
  Write(kv, 2, 40, 41, 500);
  Write(kv, 2, 3, 4, 900);  // the first page parts
  CHECK_EQ(kv.used_pages(), 5u);
  CHECK_EQ(MarkAt(kv, 1, 3), 103);
  CHECK_EQ(MarkAt(kv, 2, 3), 903);
  CHECK_EQ(MarkAt(kv, 2, 2), 102);
  kv.Close(1);
  CHECK_EQ(kv.used_pages(), 3u);
  CHECK_EQ(MarkAt(kv, 2, 20), 120);
}

TEST(a_shared_page_without_a_free_one_is_refused_and_nothing_changes) {
  KvPages kv = MakePages(3);
  kv.Open(1, 32);
  Write(kv, 1, 0, 32, 0);
  kv.Fork(1, 2, 48);
  CHECK_THROWS(kv.Prepare(2, 5, 6), potluck::Full);
  CHECK_EQ(kv.Length(2), 32u);
  Write(kv, 2, 32, 48, 7);
}

TEST(memory_is_what_sessions_have_written_and_comes_back) {
  const KvShape shape = {4, 2, 64};  // a page of 64 KiB
  KvPages kv(shape, size_t{1} << 30, 4);
  const uint8_t* const start = kv.Section(0, 0, 0);
  CHECK_EQ(ResidentBytes(start, size_t{1} << 30), 0u);
  kv.Open(1, 1000);
  kv.Prepare(1, 0, 40);
  for (const size_t page : {0u, 1u, 2u}) {
    std::fill_n(kv.Section(kv.Table(1)[page], 0, 0), shape.PageBytes(), uint8_t{1});
  }
  CHECK_EQ(ResidentBytes(start, size_t{1} << 30), 3 * shape.PageBytes());
  kv.Close(1);
  CHECK_EQ(ResidentBytes(start, size_t{1} << 30), 0u);
}

TEST(random_sessions_are_what_a_simple_model_says) {
  constexpr size_t kPages = 22;
  KvPages kv = MakePages(kPages);
  std::map<uint64_t, Expected> expected;
  std::mt19937 random(5);
  size_t n_full = 0, n_forks = 0, n_writes = 0;
  for (size_t turn = 0; turn < 20000; ++turn) {
    const uint64_t session = random() % 8;
    const bool is_open = expected.count(session) != 0;
    const uint16_t mark = static_cast<uint16_t>(random());
    try {
      switch (random() % 8) {
        case 0:
          if (is_open) break;
          expected[session].room = random() % 150 + 1;
          kv.Open(session, expected[session].room);
          break;
        case 1:
          kv.Close(session);
          expected.erase(session);
          break;
        case 2: {
          const uint64_t added = random() % 8;
          if (!is_open || expected.count(added) != 0) break;
          const Expected from = expected[session];
          const size_t room = from.marks.size() + random() % 40 + 1;
          expected[added] = {from.marks, room};
          try {
            kv.Fork(session, added, room);
            ++n_forks;
          } catch (const potluck::Full&) {
            expected.erase(added);
            throw;
          }
          break;
        }
        case 3: {
          if (!is_open) break;
          const size_t position = random() % 160;
          kv.Truncate(session, position);
          auto& marks = expected[session].marks;
          marks.resize(std::min(marks.size(), position));
          break;
        }
        default: {
          if (!is_open) break;
          Expected& want = expected[session];
          const size_t length = want.marks.size();
          const size_t start = random() % 4 != 0 ? length : random() % (length + 1);
          if (start >= want.room) break;
          const size_t stop = start + random() % (want.room - start) + 1;
          Write(kv, session, start, stop, mark);
          want.marks.resize(stop);
          for (size_t i = start; i < stop; ++i) want.marks[i] = static_cast<uint16_t>(mark + i);
          ++n_writes;
        }
      }
    } catch (const potluck::Full&) {
      ++n_full;
      if (!is_open && expected.count(session) != 0) expected.erase(session);
    }
    CheckSame(kv, expected);
    CHECK(kv.used_pages() <= kPages);
  }
  CHECK(n_full > 100);
  CHECK(n_forks > 100);
  CHECK(n_writes > 1000);
  for (uint64_t session = 0; session < 8; ++session) kv.Close(session);
  CHECK_EQ(kv.used_pages(), 0u);
}

CHECK_MAIN
