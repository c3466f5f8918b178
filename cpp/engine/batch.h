// The rows of a step: which sessions, which positions, where their keys and values go.
//
// Rows of several sessions, of prefill chunks and of single tokens, mix freely. A batch is built
// anew for each step and keeps its memory.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>
#include <vector>

#include "engine/attention.h"
#include "engine/config.h"
#include "engine/kv.h"

namespace potluck {

// Rows of one session: n_tokens tokens from start_position on; the last want_logits of them want
// logits.
struct RowSpan {
  uint64_t session = 0;
  size_t start_position = 0;
  size_t n_tokens = 0;
  size_t want_logits = 0;
};

// Where a row's keys and values go.
struct KvPlace {
  int32_t page;
  size_t position;  // in the session; position % kKvPageTokens in the page
};

class Batch {
 public:
  // Takes the rows of the next step, before any page is prepared for them. UsageError: a session
  // twice, no token, more logits than tokens.
  void Count(const std::vector<RowSpan>& rows, const Config& config);

  // Makes the rows' pages writable and lists their places. No session's length changes.
  // UnknownSession, SessionError, Full: as KvPages::Prepare.
  void Place(const std::vector<RowSpan>& rows, KvPages* kv);

  size_t n_rows() const { return n_rows_; }
  size_t n_wanted() const { return n_wanted_; }
  const std::vector<SessionRows>& sessions() const { return sessions_; }  // as in the step
  const std::vector<KvPlace>& places() const { return places_; }          // [n_rows]
  const std::vector<size_t>& wanted() const { return wanted_; }           // [n_wanted] rows, rising

  // "session 7, position 12", for messages.
  std::string NameOf(size_t row) const;

 private:
  size_t n_rows_ = 0;
  size_t n_wanted_ = 0;
  std::vector<SessionRows> sessions_;
  std::vector<KvPlace> places_;
  std::vector<size_t> wanted_;
  std::vector<uint64_t> ids_;         // of sessions_
  std::vector<uint64_t> sorted_ids_;  // to find one that comes twice
};

}  // namespace potluck
