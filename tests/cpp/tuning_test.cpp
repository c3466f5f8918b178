#include "engine/tuning.h"

#include "check.h"
#include "engine/cpu.h"
#include "engine/errors.h"
#include "engine/isa.h"
#include "engine/pool.h"

using potluck::Pool;

namespace {

constexpr size_t kWeights = size_t{8} << 20;

const potluck::MatMulTable& Table() { return *potluck::ChooseTable("auto").matmul; }

}  // namespace

TEST(threads_beyond_the_cpus_are_found_to_be_no_use) {
  Pool pool(4 * potluck::AllowedCpus());
  CHECK_EQ(pool.decode_threads(), pool.threads());
  potluck::TuneThreads(pool, Table(), kWeights);
  CHECK(pool.decode_threads() < pool.threads());
  CHECK(pool.prefill_threads() < pool.threads());
  CHECK_EQ(pool.used(), pool.threads());  // what is in use now is not changed
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
