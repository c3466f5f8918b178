// A shard's steps: the same bits however layers, rows, threads and pages are arranged, and a clean
// refusal of everything that does not fit.
#include "engine/shard.h"

#include <cmath>
#include <cstdint>
#include <random>
#include <string>
#include <thread>
#include <vector>

#include "check.h"
#include "engine/errors.h"
#include "engine/isa.h"
#include "tiny_model.h"
#include "weights.h"

using potluck::KvType;
using potluck::RowSpan;
using potluck::ShardPart;
using tiny::kKvBytes;
using tiny::kLayers;
using tiny::Made;
using tiny::RowsOf;
using tiny::Run;
using tiny::RunSession;
using tiny::SameBits;
using tiny::TokensOf;

TEST(logits_vary_and_are_finite) {
  const auto logits = RunSession(Made(), TokensOf(40), 40);
  double sum = 0, squares = 0;
  for (const float value : logits) {
    CHECK(std::isfinite(value));
    sum += static_cast<double>(value);
    squares += static_cast<double>(value) * static_cast<double>(value);
  }
  const auto n = static_cast<double>(logits.size());
  CHECK(squares / n - sum / n * sum / n > 1e-4);
  CHECK(!SameBits(RowsOf(logits, 0, 1), RowsOf(logits, 39, 1)));
}

TEST(threads_chunks_and_tables_change_no_bit) {
  const auto tokens = TokensOf(200);
  const auto expected = RunSession(Made(1), tokens, 200);
  for (const size_t threads : {1u, 2u, 3u, 4u}) {
    for (const size_t chunk : {1u, 7u, 64u, 200u}) {
      CHECK(SameBits(RunSession(Made(threads), tokens, chunk), expected));
    }
  }
  for (const std::string& isa : potluck::AvailableIsas()) {
    const Made made(2, {0, kLayers, true, true, kKvBytes, 64}, isa);
    CHECK(SameBits(RunSession(made, tokens, 33), expected));
  }
}

TEST(fewer_threads_for_some_steps_change_no_bit) {
  const auto tokens = TokensOf(60);
  const auto expected = RunSession(Made(1), tokens, 60);
  const Made made(4);
  made.pool->Allot(1, 3);
  CHECK(SameBits(RunSession(made, tokens, 20), expected));
  CHECK_EQ(made.pool->used(), size_t{3});
  CHECK(SameBits(RunSession(made, tokens, 1, 2), expected));
  CHECK_EQ(made.pool->used(), size_t{1});
  const Made pinned(1, {0, kLayers, true, true, kKvBytes, 64}, "auto", true);
  CHECK(SameBits(RunSession(pinned, tokens, 7), expected));
}

TEST(every_number_of_rows_gives_the_same_bits) {
  const auto tokens = TokensOf(130);
  const auto expected = RunSession(Made(1), tokens, 1);
  const Made made(2);
  for (size_t n = 1; n <= 130; ++n) {
    made->Open(n, n);
    const std::vector<int32_t> part(tokens.begin(), tokens.begin() + static_cast<ptrdiff_t>(n));
    CHECK(SameBits(Run(made, {{n, 0, n, n}}, part), RowsOf(expected, 0, n)));
    made->Close(n);
  }
}

TEST(neighbours_in_a_batch_change_no_bit) {
  const auto a = TokensOf(90, 2), b = TokensOf(70, 3), c = TokensOf(50, 4);
  const auto alone_a = RunSession(Made(1), a, 90);
  const auto alone_b = RunSession(Made(1), b, 70);
  const auto alone_c = RunSession(Made(1), c, 50);
  const Made made(2);
  std::mt19937 random(8);
  for (uint64_t session = 1; session <= 3; ++session) made->Open(session, 90);
  size_t at[3] = {};
  const std::vector<int32_t>* tokens[3] = {&a, &b, &c};
  const std::vector<float>* alone[3] = {&alone_a, &alone_b, &alone_c};
  while (at[0] < 90 || at[1] < 70 || at[2] < 50) {
    std::vector<RowSpan> rows;
    std::vector<int32_t> ids;
    for (const size_t i : {2u, 0u, 1u}) {
      const size_t left = tokens[i]->size() - at[i];
      const size_t n = std::min<size_t>(left, random() % 3 != 0 ? random() % 3 : random() % 20);
      if (n == 0) continue;
      rows.push_back({i + 1, at[i], n, n});
      for (size_t t = 0; t < n; ++t) ids.push_back((*tokens[i])[at[i] + t]);
    }
    const auto logits = Run(made, rows, ids);
    size_t row = 0;
    for (const RowSpan& r : rows) {
      const size_t i = r.session - 1;
      CHECK(SameBits(RowsOf(logits, row, r.n_tokens), RowsOf(*alone[i], at[i], r.n_tokens)));
      row += r.n_tokens;
      at[i] += r.n_tokens;
    }
  }
}

TEST(only_wanted_rows_get_logits) {
  const auto tokens = TokensOf(30);
  const auto all = RunSession(Made(1), tokens, 30);
  const Made made(2);
  made->Open(1, 30);
  CHECK(SameBits(Run(made, {{1, 0, 30, 2}}, tokens), RowsOf(all, 28, 2)));
  made->Truncate(1, 0);
  CHECK(Run(made, {{1, 0, 30, 0}}, tokens).empty());
  CHECK_EQ(made->Length(1), 30u);
}

TEST(a_model_in_two_shards_is_the_model_in_one) {
  const auto tokens = TokensOf(77);
  const auto expected = RunSession(Made(2), tokens, 20);
  for (const size_t cut : {1u, 2u, 3u}) {
    const Made first(1, {0, cut, true, false, kKvBytes, 64});
    const Made second(2, {cut, kLayers, false, true, kKvBytes, 64});
    first->Open(5, 77);
    second->Open(5, 77);
    std::vector<float> logits;
    for (size_t start = 0; start < 77; start += 11) {
      std::vector<float> x(11 * 64), part(11 * 45);
      const std::vector<RowSpan> rows = {{5, start, 11, 11}};
      CHECK_EQ(first->Forward(tokens.data() + start, 11, rows, x.data(), x.size()).size(), cut);
      second->Forward(x.data(), x.size(), rows, part.data(), part.size());
      logits.insert(logits.end(), part.begin(), part.end());
    }
    CHECK(SameBits(logits, expected));
  }
}

TEST(keys_and_values_in_bytes_keep_every_promise_of_f16) {
  const auto tokens = TokensOf(150), other = TokensOf(40, 9);
  const ShardPart part = {0, kLayers, true, true, kKvBytes, 64, KvType::kQ8};
  const auto expected = RunSession(Made(1, part), tokens, 150);
  CHECK(!SameBits(expected, RunSession(Made(1), tokens, 150)));
  for (const std::string& isa : potluck::AvailableIsas()) {
    const Made made(2, part, isa);
    CHECK(SameBits(RunSession(made, tokens, 33), expected));
    made->Fork(1, 2, 150);
    made->Truncate(2, 21);  // within a page that both hold
    Run(made, {{2, 21, 40, 40}}, other);
    made->Truncate(2, 21);
    const std::vector<int32_t> rest(tokens.begin() + 21, tokens.end());
    CHECK(SameBits(Run(made, {{2, 21, 129, 129}}, rest), RowsOf(expected, 21, 129)));
    made->Truncate(1, 149);  // what the fork wrote is not in here
    CHECK(SameBits(Run(made, {{1, 149, 1, 1}}, {tokens[149]}), RowsOf(expected, 149, 1)));
  }
  const Made f16(1), q8(1, part);
  CHECK(q8->kv_bytes() <= kKvBytes);
  f16->Open(1, 64);
  q8->Open(1, 64);
  CHECK_EQ(q8->kv_used_bytes() * 24 * 2, f16->kv_used_bytes() * (24 + 4));  // head_dim 24
}

TEST(pages_in_any_order_and_used_before_change_no_bit) {
  const auto tokens = TokensOf(150);
  const auto expected = RunSession(Made(1), tokens, 150);
  const Made made(2);
  for (uint64_t session = 10; session < 20; ++session) {
    made->Open(session, 60);
    Run(made, {{session, 0, 60, 0}}, TokensOf(60, static_cast<uint32_t>(session)));
  }
  for (const uint64_t session : {13u, 10u, 17u, 12u, 19u}) made->Close(session);
  CHECK(SameBits(RunSession(made, tokens, 50), expected));
}

TEST(truncate_and_replay_give_the_same_bits) {
  const auto tokens = TokensOf(120);
  const auto expected = RunSession(Made(1), tokens, 120);
  const Made made(2);
  RunSession(made, tokens, 31);
  for (const size_t position : {119u, 64u, 63u, 17u, 0u}) {
    made->Truncate(1, position);
    CHECK_EQ(made->Length(1), position);
    const size_t n = 120 - position;
    const std::vector<int32_t> part(tokens.begin() + static_cast<ptrdiff_t>(position),
                                    tokens.end());
    CHECK(SameBits(Run(made, {{1, position, n, n}}, part), RowsOf(expected, position, n)));
  }
  // A start below the length overwrites without a truncate.
  const std::vector<int32_t> part(tokens.begin() + 40, tokens.begin() + 50);
  CHECK(SameBits(Run(made, {{1, 40, 10, 10}}, part), RowsOf(expected, 40, 10)));
  CHECK_EQ(made->Length(1), 50u);
}

TEST(a_fork_goes_on_as_its_origin_and_parts_without_a_trace) {
  const auto tokens = TokensOf(100), other = TokensOf(100, 6);
  const auto expected = RunSession(Made(1), tokens, 100);
  const Made made(2);
  made->Open(1, 100);
  Run(made, {{1, 0, 41, 0}}, {tokens.begin(), tokens.begin() + 41});
  const size_t before = made->kv_used_bytes();
  made->Fork(1, 2, 100);
  CHECK(made->kv_used_bytes() < 2 * before);
  Run(made, {{2, 30, 40, 0}}, {other.begin(), other.begin() + 40});
  const std::vector<int32_t> rest(tokens.begin() + 41, tokens.end());
  CHECK(SameBits(Run(made, {{1, 41, 59, 59}}, rest), RowsOf(expected, 41, 59)));
  CHECK_THROWS(made->Fork(1, 2, 100), potluck::SessionError);
  CHECK_THROWS(made->Fork(1, 3, 99), potluck::SessionError);
  CHECK_THROWS(made->Fork(8, 3, 99), potluck::UnknownSession);
  CHECK_THROWS(made->Fork(1, 3, potluck::kMostPositions + 1), potluck::UsageError);
  CHECK_THROWS(made->Open(3, potluck::kMostPositions + 1), potluck::UsageError);
}

TEST(steps_that_do_not_fit_are_refused_and_change_nothing) {
  const Made made(2);
  made->Open(1, 20);
  made->Open(2, 20);
  Run(made, {{1, 0, 5, 1}}, TokensOf(5));
  const auto refuses = [&](const std::vector<RowSpan>& rows, size_t n) {
    return Run(made, rows, TokensOf(n));
  };
  CHECK_THROWS(refuses({{1, 6, 1, 1}}, 1), potluck::SessionError);
  CHECK_THROWS(refuses({{1, 5, 16, 1}}, 16), potluck::SessionError);
  CHECK_THROWS(refuses({{1, SIZE_MAX, 1, 1}}, 1), potluck::SessionError);
  CHECK_THROWS(refuses({{3, 0, 1, 1}}, 1), potluck::UnknownSession);
  CHECK_THROWS(refuses({{1, 5, 1, 1}, {2, 0, 1, 1}, {1, 6, 1, 1}}, 3), potluck::UsageError);
  CHECK_THROWS(refuses({{1, 5, 0, 0}}, 0), potluck::UsageError);
  CHECK_THROWS(refuses({{1, 5, 1, 2}}, 1), potluck::UsageError);
  CHECK_THROWS(refuses({{1, 5, 1, 1}}, 2), potluck::UsageError);
  CHECK_THROWS(refuses({{2, 0, 4, 1}, {1, 7, 1, 1}}, 5), potluck::SessionError);
  for (const int32_t token : {-1, 45, INT32_MAX}) {
    CHECK_THROWS(Run(made, {{2, 0, 2, 1}}, {1, token}), potluck::UsageError);
  }
  CHECK_EQ(made->Length(1), 5u);
  CHECK_EQ(made->Length(2), 0u);
  CHECK(made->Forward(static_cast<const int32_t*>(nullptr), 0, {}, nullptr, 0).size() == 5);
}

TEST(values_that_are_not_finite_are_refused_with_layer_and_session) {
  const Made made(2, {1, 3, false, false, kKvBytes, 64});
  made->Open(7, 64);
  made->Open(8, 64);
  for (const size_t n : {1u, 3u, 9u, 40u}) {
    for (const float bad : {NAN, INFINITY, -INFINITY, 2e19f, -3e38f}) {  // the last two: squared
      auto x = weights::Activations(n + 2, 64, 3);
      std::vector<float> out(x.size());
      x[(n + 1) * 64 + 17] = bad;
      std::string message;
      try {
        made->Forward(x.data(), x.size(), {{7, 0, n, 0}, {8, 0, 2, 0}}, out.data(), out.size());
      } catch (const potluck::FrameError& error) {
        message = error.what();
      }
      CHECK_EQ(message.substr(0, message.find(':')), "layer 1, session 8, position 1");
      CHECK_EQ(made->Length(7), 0u);
      CHECK_EQ(made->Length(8), 0u);
    }
  }
}

TEST(cancel_stops_a_step_between_layers_and_nothing_has_changed) {
  const Made made(2);
  made->Open(1, 400);
  const auto tokens = TokensOf(400);
  const auto expected = RunSession(Made(1), tokens, 400);
  size_t n_cancelled = 0;
  for (size_t turn = 0; turn < 1000 && n_cancelled < 3; ++turn) {
    made->Truncate(1, 0);
    const uint64_t before = made->progress();
    std::thread other([&] {
      while (made->progress() == before) std::this_thread::yield();
      made->Cancel();
    });
    try {
      Run(made, {{1, 0, 400, 1}}, tokens);
    } catch (const potluck::Cancelled&) {
      ++n_cancelled;
      CHECK_EQ(made->Length(1), 0u);
    }
    other.join();
  }
  CHECK(n_cancelled > 0);
  made->Truncate(1, 0);
  CHECK(SameBits(Run(made, {{1, 0, 400, 400}}, tokens), expected));
}

TEST(cancel_without_a_step_does_nothing_and_progress_rises) {
  const Made made(2);
  made->Cancel();
  made->Open(1, 10);
  const uint64_t before = made->progress();
  Run(made, {{1, 0, 10, 1}}, TokensOf(10));
  CHECK(made->progress() > before + 5 * kLayers);
  CHECK(made->scratch_bytes() > 0);
}

CHECK_MAIN
