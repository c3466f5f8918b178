// Which pages hold the keys and values of which session.
//
// A page holds 16 positions of one session: keys and values of every layer and KV head of the span.
// Pages live in one reserved mapping that the system fills when it is touched, so memory in use is
// what sessions have written. Sessions that were forked share full pages until one of them writes
// (copy on write). Positions at or above a session's length are never read, so what a page held
// before does not matter. The caller (Shard) lets one thread in at a time; while the pool works on
// a step, threads read the tables and write to disjoint parts of prepared pages.
#pragma once

#include <cstddef>
#include <cstdint>
#include <unordered_map>
#include <vector>

#include "engine/config.h"

namespace potluck {

constexpr size_t kKvPageTokens = 16;

struct KvShape {
  size_t n_layers;  // of the span
  size_t n_kv_heads;
  size_t head_dim;
  KvType type = KvType::kF16;

  // A section: keys and values of one layer and KV head in a page.
  size_t SectionBytes() const;
  size_t PageBytes() const { return n_layers * n_kv_heads * SectionBytes(); }
};

class KvPages {
 public:
  // Whole pages of budget_bytes. UsageError: the system can't reserve so many addresses.
  KvPages(const KvShape& shape, size_t budget_bytes, size_t max_sessions);
  ~KvPages();
  KvPages(const KvPages&) = delete;
  KvPages& operator=(const KvPages&) = delete;

  // Reserves pages for max_tokens positions, so that writing them never fails. Full: no pages or
  // places left. SessionError: the id is in use. UsageError: max_tokens is 0.
  void Open(uint64_t session, size_t max_tokens);
  // The session then has at most `position` positions; its room stays. UnknownSession.
  void Truncate(uint64_t session, size_t position);
  // new_session gets the positions written so far: full pages are shared, the one that both would
  // write next is copied. Only what is not shared is reserved. UnknownSession, Full; SessionError:
  // id in use, max_tokens below the length.
  void Fork(uint64_t session, uint64_t new_session, size_t max_tokens);
  // Gives the session's pages back, to the system too; an unknown session is no error.
  void Close(uint64_t session);

  size_t Length(uint64_t session) const;  // UnknownSession

  // Makes positions [start, stop) writable: takes reserved pages and copies shared ones. The length
  // stays. UnknownSession; SessionError: start is beyond the length, stop beyond the room; Full: a
  // shared page needs a copy.
  void Prepare(uint64_t session, size_t start, size_t stop);
  // Ends a step: the session now has `length` positions, all of them prepared.
  void Commit(uint64_t session, size_t length);

  // The session's page numbers, by position / 16; valid until the session is next prepared or
  // closed.
  const int32_t* Table(uint64_t session) const;
  // Of one page, layer (counted in the span) and KV head; SectionBytes(), 64-byte aligned.
  uint8_t* Section(int32_t page, size_t layer, size_t kv_head) const {
    return bytes_ + static_cast<size_t>(page) * page_bytes_ +
           (layer * shape_.n_kv_heads + kv_head) * section_bytes_;
  }

  const KvShape& shape() const { return shape_; }
  size_t n_pages() const { return n_pages_; }
  size_t used_pages() const { return n_pages_ - Available(); }  // held or promised

 private:
  struct Session {
    size_t length = 0;
    size_t room_tokens = 0;
    size_t promised = 0;         // pages that it may still take
    std::vector<int32_t> pages;  // by position / 16
  };

  Session& Find(uint64_t session);
  const Session& Find(uint64_t session) const;
  size_t Available() const { return free_.size() - promised_; }
  Session& Add(uint64_t session, size_t room_tokens, size_t n_promised);
  int32_t TakePage();
  void ReleasePage(int32_t page);
  void CopyPage(int32_t from, int32_t to);

  KvShape shape_;
  size_t section_bytes_;
  size_t page_bytes_;
  size_t max_sessions_;
  size_t n_pages_;
  uint8_t* bytes_ = nullptr;          // [n_pages, page_bytes_]
  std::vector<int32_t> free_;         // taken from the back
  size_t promised_ = 0;               // of the free pages, how many belong to sessions already
  std::vector<uint32_t> references_;  // sessions that hold a page, by page
  std::unordered_map<uint64_t, Session> sessions_;
};

}  // namespace potluck
