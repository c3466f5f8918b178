#include "engine/tuning.h"

#include "check.h"
#include "engine/errors.h"
#include "engine/isa.h"
#include "engine/pool.h"

using potluck::Pool;

namespace {

constexpr size_t kWeights = size_t{8} << 20;

const potluck::MatMulTable& Table() { return *potluck::ChooseTable("auto").matmul; }

}  // namespace

TEST(the_fewest_threads_that_are_about_as_fast_as_the_best_are_chosen) {
  using potluck::FewestAsFast;
  CHECK_EQ(FewestAsFast({1, 2, 4, 8}, {8.0, 4.0, 2.0, 1.0}), size_t{8});
  CHECK_EQ(FewestAsFast({1, 2, 4, 8}, {2.0, 1.02, 1.0, 1.01}), size_t{2});
  CHECK_EQ(FewestAsFast({1, 2, 4, 8}, {2.0, 1.04, 1.0, 1.5}), size_t{4});
  CHECK_EQ(FewestAsFast({1, 2}, {1.0, 1.0}), size_t{1});
}

// Which counts are the fastest depends on what else runs, so any in range may be found.
TEST(a_pool_is_allotted_what_it_has) {
  Pool pool(5);
  CHECK_EQ(pool.decode_threads(), size_t{5});
  CHECK_EQ(pool.prefill_threads(), size_t{5});
  potluck::TuneThreads(pool, Table(), kWeights);
  CHECK(pool.decode_threads() >= 1 && pool.decode_threads() <= 5);
  CHECK(pool.prefill_threads() >= 1 && pool.prefill_threads() <= 5);
  CHECK_EQ(pool.used(), size_t{5});  // what is in use now is not changed
}

TEST(a_single_thread_needs_no_measurement) {
  Pool pool(1);
  potluck::TuneThreads(pool, Table(), kWeights);
  CHECK_EQ(pool.decode_threads(), size_t{1});
  CHECK_EQ(pool.prefill_threads(), size_t{1});
}

TEST(too_little_memory_to_measure_in_is_refused) {
  Pool pool(2);
  CHECK_THROWS(potluck::TuneThreads(pool, Table(), 1000), potluck::UsageError);
}

TEST(counts_out_of_range_are_refused_and_change_nothing) {
  Pool pool(3);
  pool.Allot(1, 2);
  CHECK_THROWS(pool.Allot(0, 2), potluck::UsageError);
  CHECK_THROWS(pool.Allot(2, 4), potluck::UsageError);
  CHECK_EQ(pool.decode_threads(), size_t{1});
  CHECK_EQ(pool.prefill_threads(), size_t{2});
}

CHECK_MAIN
