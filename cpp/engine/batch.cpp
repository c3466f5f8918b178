#include "engine/batch.h"

#include <algorithm>
#include <limits>
#include <string>

#include "engine/errors.h"

namespace potluck {

void Batch::Count(const std::vector<RowSpan>& rows, const Config& config) {
  n_rows_ = 0;
  n_wanted_ = 0;
  ids_.clear();
  for (const RowSpan& span : rows) {
    if (span.n_tokens == 0 || span.want_logits > span.n_tokens ||
        span.n_tokens > config.context_tokens) {
      throw UsageError("session " + std::to_string(span.session) + ": " +
                       std::to_string(span.n_tokens) + " tokens, of which " +
                       std::to_string(span.want_logits) + " want logits; at least 1, at most " +
                       std::to_string(config.context_tokens));
    }
    n_rows_ += span.n_tokens;
    n_wanted_ += span.want_logits;
    ids_.push_back(span.session);
  }
  sorted_ids_.assign(ids_.begin(), ids_.end());
  std::sort(sorted_ids_.begin(), sorted_ids_.end());
  const auto twice = std::adjacent_find(sorted_ids_.begin(), sorted_ids_.end());
  if (twice == sorted_ids_.end()) return;
  throw UsageError("session " + std::to_string(*twice) + " comes twice in one step");
}

void Batch::Place(const std::vector<RowSpan>& rows, KvPages* kv) {
  sessions_.clear();
  places_.clear();
  wanted_.clear();
  for (const RowSpan& span : rows) {
    // A start so large that the sum would wrap is beyond every length, which Prepare says.
    constexpr size_t kLargest = std::numeric_limits<size_t>::max();
    const size_t start = std::min(span.start_position, kLargest - span.n_tokens);
    kv->Prepare(span.session, start, start + span.n_tokens);
    const int32_t* const pages = kv->Table(span.session);
    const size_t first_row = places_.size();
    sessions_.push_back({pages, start, first_row, span.n_tokens});
    for (size_t i = 0; i < span.n_tokens; ++i) {
      places_.push_back({pages[(start + i) / kKvPageTokens], start + i});
      if (i + span.want_logits >= span.n_tokens) wanted_.push_back(first_row + i);
    }
  }
}

std::string Batch::NameOf(size_t row) const {
  size_t i = 0;
  while (sessions_[i].first_row + sessions_[i].n_rows <= row) ++i;
  return "session " + std::to_string(ids_[i]) + ", position " +
         std::to_string(places_[row].position);
}

}  // namespace potluck
