#include "engine/kv.h"

#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <cstring>
#include <string>
#include <utility>

#include "engine/errors.h"
#include "engine/kernels/attention_q8.h"

namespace potluck {
namespace {

size_t PagesFor(size_t tokens) {
  return tokens / kKvPageTokens + (tokens % kKvPageTokens != 0 ? 1 : 0);
}

std::string Named(uint64_t session) { return "session " + std::to_string(session); }

}  // namespace

size_t KvShape::SectionBytes() const {
  if (type == KvType::kQ8) return q8::SectionBytes(head_dim);
  return 2 * kKvPageTokens * head_dim * sizeof(uint16_t);
}

KvPages::KvPages(const KvShape& shape, size_t budget_bytes, size_t max_sessions)
    : shape_(shape),
      section_bytes_(shape.SectionBytes()),
      page_bytes_(shape.PageBytes()),
      max_sessions_(max_sessions) {
  // Page numbers are int32 in the tables.
  n_pages_ = std::min<size_t>(budget_bytes / page_bytes_, INT32_MAX);
  references_.assign(n_pages_, 0);
  free_.reserve(n_pages_);
  for (size_t page = n_pages_; page > 0; --page) free_.push_back(static_cast<int32_t>(page - 1));
  if (n_pages_ > 0) {
    void* mapped = mmap(nullptr, n_pages_ * page_bytes_, PROT_READ | PROT_WRITE,
                        MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (mapped == MAP_FAILED) {
      throw UsageError("kv_bytes: the system can't reserve " + std::to_string(budget_bytes) +
                       " bytes");
    }
    bytes_ = static_cast<uint8_t*>(mapped);  // last: nothing may throw that would leave it mapped
  }
}

KvPages::~KvPages() {
  if (bytes_ != nullptr) munmap(bytes_, n_pages_ * page_bytes_);
}

void KvPages::Open(uint64_t session, size_t max_tokens) {
  if (max_tokens == 0) throw UsageError("max_tokens: at least 1");
  Add(session, max_tokens, PagesFor(max_tokens));
}

void KvPages::Truncate(uint64_t session, size_t position) {
  Session& found = Find(session);
  found.length = std::min(found.length, position);
}

void KvPages::Fork(uint64_t session, uint64_t new_session, size_t max_tokens) {
  const Session& origin = Find(session);  // elements of an unordered_map stay where they are
  const size_t length = origin.length;
  if (max_tokens == 0) throw UsageError("max_tokens: at least 1");
  if (max_tokens < length) {
    throw SessionError(Named(session) + " has " + std::to_string(length) +
                       " positions, more than the new session's " + std::to_string(max_tokens));
  }
  const size_t n_shared = length / kKvPageTokens;
  Session& added = Add(new_session, max_tokens, PagesFor(max_tokens) - n_shared);
  for (size_t i = 0; i < n_shared; ++i) {
    added.pages.push_back(origin.pages[i]);
    ++references_[static_cast<size_t>(origin.pages[i])];
  }
  added.length = n_shared * kKvPageTokens;
  Prepare(new_session, added.length, length);
  if (length > added.length) CopyPage(origin.pages[n_shared], added.pages[n_shared]);
  added.length = length;
}

void KvPages::Close(uint64_t session) {
  const auto found = sessions_.find(session);
  if (found == sessions_.end()) return;
  promised_ -= found->second.promised;
  for (const int32_t page : found->second.pages) ReleasePage(page);
  sessions_.erase(found);
}

size_t KvPages::Length(uint64_t session) const { return Find(session).length; }

void KvPages::Prepare(uint64_t session, size_t start, size_t stop) {
  Session& found = Find(session);
  if (start > found.length) {
    throw SessionError(Named(session) + " is at position " + std::to_string(found.length) +
                       " and this step starts at " + std::to_string(start) + "; it must not skip");
  }
  if (stop < start || stop > found.room_tokens) {
    throw SessionError(Named(session) + " has room for " + std::to_string(found.room_tokens) +
                       " positions and this step ends at " + std::to_string(stop));
  }
  for (size_t i = start / kKvPageTokens; i < PagesFor(stop); ++i) {
    if (i >= found.pages.size()) {
      --found.promised;
      --promised_;
      found.pages.push_back(TakePage());
      continue;
    }
    const int32_t shared = found.pages[i];
    if (references_[static_cast<size_t>(shared)] == 1) continue;
    if (Available() == 0) {
      throw Full(Named(session) + " rewrites position " + std::to_string(start) +
                     ", which a fork shares, and no KV page is left for a copy",
                 "close a session, or give the workers more memory for KV");
    }
    found.pages[i] = TakePage();
    CopyPage(shared, found.pages[i]);
    ReleasePage(shared);
  }
}

void KvPages::Commit(uint64_t session, size_t length) { Find(session).length = length; }

const int32_t* KvPages::Table(uint64_t session) const { return Find(session).pages.data(); }

KvPages::Session& KvPages::Find(uint64_t session) {
  return const_cast<Session&>(std::as_const(*this).Find(session));
}

const KvPages::Session& KvPages::Find(uint64_t session) const {
  const auto found = sessions_.find(session);
  if (found == sessions_.end()) throw UnknownSession(Named(session) + " is not open here");
  return found->second;
}

KvPages::Session& KvPages::Add(uint64_t session, size_t room_tokens, size_t n_promised) {
  if (sessions_.count(session) != 0) throw SessionError(Named(session) + " is open already");
  if (sessions_.size() >= max_sessions_) {
    throw Full("all " + std::to_string(max_sessions_) + " places for sessions are taken",
               "close a session, or try again later");
  }
  if (n_promised > Available()) {
    throw Full(std::to_string(room_tokens) + " positions need " + std::to_string(n_promised) +
                   " KV pages, " + std::to_string(Available()) + " of " + std::to_string(n_pages_) +
                   " are left",
               "close a session, or give the workers more memory for KV");
  }
  Session& added = sessions_[session];
  added.pages.reserve(PagesFor(room_tokens));  // so that a step does not allocate
  added.room_tokens = room_tokens;
  added.promised = n_promised;
  promised_ += n_promised;
  return added;
}

int32_t KvPages::TakePage() {
  const int32_t page = free_.back();
  free_.pop_back();
  references_[static_cast<size_t>(page)] = 1;
  return page;
}

void KvPages::ReleasePage(int32_t page) {
  if (--references_[static_cast<size_t>(page)] != 0) return;
  free_.push_back(page);
  // Only whole pages of the system can be given back; the rest is reused.
  const auto unit = static_cast<size_t>(sysconf(_SC_PAGESIZE));
  uint8_t* const start = Section(page, 0, 0);
  const size_t before = (unit - reinterpret_cast<uintptr_t>(start) % unit) % unit;
  if (before >= page_bytes_) return;
  const size_t whole = (page_bytes_ - before) / unit * unit;
  if (whole > 0) madvise(start + before, whole, MADV_DONTNEED);
}

void KvPages::CopyPage(int32_t from, int32_t to) {
  std::memcpy(Section(to, 0, 0), Section(from, 0, 0), page_bytes_);
}

}  // namespace potluck
