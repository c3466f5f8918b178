#include "engine/vector.h"

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <memory>
#include <random>
#include <string>
#include <vector>

#include "check.h"
#include "engine/crc32c.h"
#include "engine/isa.h"

using potluck::VectorTable;

namespace {

constexpr float kInfinity = std::numeric_limits<float>::infinity();
const VectorTable& Scalar() { return *potluck::ScalarVectorTable(); }

// A buffer of exactly n values on the heap, shifted off any alignment: ASan sees a step beyond it.
class Row {
 public:
  explicit Row(size_t n) : n_(n), bytes_(new uint8_t[n * sizeof(float) + 4]) {}
  explicit Row(const std::vector<float>& values) : Row(values.size()) {
    if (n_ > 0) std::memcpy(data(), values.data(), n_ * sizeof(float));
  }
  float* data() { return reinterpret_cast<float*>(bytes_.get() + 4); }
  size_t size() const { return n_; }

 private:
  size_t n_;
  std::unique_ptr<uint8_t[]> bytes_;
};

// Equal bits; two NaNs are equal whatever their payload, for which no ISA promises anything.
bool SameBits(Row& a, Row& b) {
  for (size_t i = 0; i < a.size(); ++i)
    if (std::memcmp(a.data() + i, b.data() + i, sizeof(float)) != 0 &&
        !(std::isnan(a.data()[i]) && std::isnan(b.data()[i])))
      return false;
  return true;
}

// Kinds of rows: what a model sees, and what breaks shortcuts.
std::vector<float> Values(const std::string& kind, size_t n, uint32_t seed) {
  std::mt19937 random(seed);
  std::normal_distribution<float> normal;
  const std::vector<float> extremes = {0.0f,   -0.0f,      1e-45f,  -1e-45f,  1e-38f,
                                       1e30f,  -1e30f,     3.4e38f, -3.4e38f, 88.7f,
                                       -88.7f, -86.99999f, 0.5f,    -127.0f};
  std::vector<float> values(n);
  for (float& value : values) {
    if (kind == "normal") value = normal(random);
    if (kind == "wide") value = normal(random) * std::exp(30.0f * normal(random));
    if (kind == "logits") value = 40.0f * normal(random);
    if (kind == "extreme") value = extremes[random() % extremes.size()];
    if (kind == "not finite")
      value = random() % 3 == 0 ? kInfinity : random() % 2 == 0 ? NAN : 1.0f;
    if (kind == "zero") value = 0.0f;
  }
  return values;
}

const std::vector<std::string> kKinds = {"normal",  "wide",       "logits",
                                         "extreme", "not finite", "zero"};

// Calls `look` with every table that this CPU runs but the scalar one, on every kind and length.
template <class Look>
void WithEachTable(const Look& look) {
  for (const std::string& isa : potluck::AvailableIsas()) {
    if (isa == "scalar") continue;
    const VectorTable& table = *potluck::ChooseTable(isa).vector;
    for (const std::string& kind : kKinds)
      for (size_t n = 1; n < 70; ++n) look(table, kind, n);
    for (const std::string& kind : kKinds)
      for (const size_t n : {96u, 576u, 4096u, 11008u}) look(table, kind, n);
  }
}

}  // namespace

TEST(random_rows_vary) {
  CHECK(Values("normal", 8, 1) != Values("normal", 8, 2));
  const std::vector<float> row = Values("wide", 100, 1);
  for (size_t i = 1; i < row.size(); ++i) CHECK(row[i] != row[0]);
}

TEST(every_isa_norms_to_the_bits_of_scalar) {
  WithEachTable([](const VectorTable& table, const std::string& kind, size_t n) {
    Row x(Values(kind, n, 1));
    Row w(Values("normal", n, 2));
    Row expected(n);
    Row got(n);
    const bool is_finite = Scalar().rms_norm(x.data(), w.data(), n, 1e-5f, expected.data());
    CHECK_EQ(table.rms_norm(x.data(), w.data(), n, 1e-5f, got.data()), is_finite);
    CHECK(SameBits(expected, got));
    table.rms_norm(x.data(), w.data(), n, 1e-5f, x.data());  // in place
    CHECK(SameBits(expected, x));
  });
}

TEST(every_isa_gates_to_the_bits_of_scalar) {
  WithEachTable([](const VectorTable& table, const std::string& kind, size_t n) {
    Row gate(Values(kind, n, 3));
    Row up(Values("wide", n, 4));
    Row expected(n);
    Row got(n);
    Scalar().silu_mul(gate.data(), up.data(), n, expected.data());
    table.silu_mul(gate.data(), up.data(), n, got.data());
    CHECK(SameBits(expected, got));
    table.silu_mul(gate.data(), up.data(), n, up.data());
    CHECK(SameBits(expected, up));
  });
}

TEST(every_isa_adds_to_the_bits_of_scalar) {
  WithEachTable([](const VectorTable& table, const std::string& kind, size_t n) {
    Row a(Values(kind, n, 5));
    Row expected(Values("wide", n, 6));
    Row got(Values("wide", n, 6));
    Scalar().add(a.data(), n, expected.data());
    table.add(a.data(), n, got.data());
    CHECK(SameBits(expected, got));
  });
}

TEST(every_isa_rotates_to_the_bits_of_scalar) {
  WithEachTable([](const VectorTable& table, const std::string& kind, size_t half) {
    Row cosine(Values("normal", half, 7));
    Row sine(Values("normal", half, 8));
    Row expected(Values(kind, 2 * half, 9));
    Row got(Values(kind, 2 * half, 9));
    Scalar().rotate(cosine.data(), sine.data(), half, expected.data());
    table.rotate(cosine.data(), sine.data(), half, got.data());
    CHECK(SameBits(expected, got));
  });
}

TEST(every_isa_exponentiates_and_sums_to_the_bits_of_scalar) {
  WithEachTable([](const VectorTable& table, const std::string& kind, size_t n) {
    Row x(Values(kind, n, 10));
    Row expected(n);
    Row got(n);
    Scalar().exp(x.data(), n, expected.data());
    table.exp(x.data(), n, got.data());
    CHECK(SameBits(expected, got));
    const double a = LogSumExp(Scalar(), x.data(), n);
    const double b = LogSumExp(table, x.data(), n);
    CHECK((std::isnan(a) && std::isnan(b)) || std::memcmp(&a, &b, sizeof(a)) == 0);
  });
}

TEST(every_isa_exponentiates_each_part_of_the_range_alike) {
  for (const std::string& isa : potluck::AvailableIsas()) {
    const VectorTable& table = *potluck::ChooseTable(isa).vector;
    for (uint64_t start = 0; start < (uint64_t{1} << 32); start += uint64_t{64} * 5003) {
      Row x(64);
      for (uint32_t i = 0; i < 64; ++i) {
        const auto bits = static_cast<uint32_t>(start + i * 5003);
        std::memcpy(x.data() + i, &bits, sizeof(bits));
      }
      Row expected(64);
      Row got(64);
      Scalar().exp(x.data(), 64, expected.data());
      table.exp(x.data(), 64, got.data());
      CHECK_EQ(std::memcmp(expected.data(), got.data(), 64 * sizeof(float)), 0);
    }
  }
}

TEST(norm_and_gate_agree_with_f64) {
  const size_t n = 4096;
  Row x(Values("normal", n, 11));
  Row w(Values("normal", n, 12));
  Row out(n);
  double sum = 0;
  for (size_t i = 0; i < n; ++i) sum += static_cast<double>(x.data()[i]) * x.data()[i];
  const double inv = 1 / std::sqrt(sum / n + 1e-5);
  Scalar().rms_norm(x.data(), w.data(), n, 1e-5f, out.data());
  for (size_t i = 0; i < n; ++i) {
    const double exact = x.data()[i] * inv * w.data()[i];
    CHECK(std::abs(out.data()[i] - exact) <= 4e-7 * std::abs(exact));
  }
  Scalar().silu_mul(x.data(), w.data(), n, out.data());
  for (size_t i = 0; i < n; ++i) {
    const double gate = x.data()[i];
    const double exact = gate / (1 + std::exp(-gate)) * w.data()[i];
    CHECK(std::abs(out.data()[i] - exact) <= 4e-7 * std::abs(exact));
  }
}

TEST(log_sum_exp_agrees_with_f64_and_knows_its_ends) {
  const size_t n = 49152;
  Row x(Values("logits", n, 13));
  double largest = -kInfinity;
  // std::fmax makes GCC 12 for AArch64 crash here.
  for (size_t i = 0; i < n; ++i) largest = std::max(largest, static_cast<double>(x.data()[i]));
  double sum = 0;
  for (size_t i = 0; i < n; ++i) sum += std::exp(x.data()[i] - largest);
  CHECK(std::abs(LogSumExp(Scalar(), x.data(), n) - (largest + std::log(sum))) < 1e-6);

  const float low = -kInfinity;
  const float high[] = {1.0f, kInfinity, low};
  const float bad[] = {kInfinity, NAN, 0.0f};
  const float masked[] = {low, 2.0f, low};
  CHECK_EQ(LogSumExp(Scalar(), nullptr, 0), -static_cast<double>(kInfinity));
  CHECK_EQ(LogSumExp(Scalar(), &low, 1), -static_cast<double>(kInfinity));
  CHECK_EQ(LogSumExp(Scalar(), high, 3), static_cast<double>(kInfinity));
  CHECK(std::isnan(LogSumExp(Scalar(), bad, 3)));
  CHECK_EQ(LogSumExp(Scalar(), masked, 3), 2.0);
}

TEST(a_norm_of_zeros_is_zero_and_silu_saturates) {
  Row zero(Values("zero", 33, 0));
  Row w(Values("normal", 33, 1));
  Scalar().rms_norm(zero.data(), w.data(), 33, 1e-5f, zero.data());
  for (size_t i = 0; i < 33; ++i) CHECK_EQ(zero.data()[i], 0.0f);
  const float gates[] = {100.0f, -100.0f, 0.0f};
  const float ones[] = {1.0f, 1.0f, 1.0f};
  float out[3];
  Scalar().silu_mul(gates, ones, 3, out);
  CHECK_EQ(out[0], 100.0f);
  CHECK_EQ(out[1], 0.0f);
  CHECK_EQ(out[2], 0.0f);
}

TEST(a_norm_whose_sum_of_squares_overflows_says_so) {
  for (const std::string& isa : potluck::AvailableIsas()) {
    const VectorTable& table = *potluck::ChooseTable(isa).vector;
    for (const size_t n : {1u, 7u, 16u, 33u, 576u}) {
      Row w(Values("normal", n, 1));
      Row out(n);
      for (const float large : {1.8e19f, 1.9e19f, -3.4e38f, kInfinity, static_cast<float>(NAN)}) {
        for (const size_t place : {size_t{0}, n / 2, n - 1}) {
          std::vector<float> values(n, 0.0f);
          values[place] = large;
          Row x(values);
          CHECK_EQ(table.rms_norm(x.data(), w.data(), n, 1e-5f, out.data()), large == 1.8e19f);
        }
      }
    }
  }
}

TEST(crc32c_is_that_of_the_rfc_by_tables_and_by_instruction) {
  std::vector<uint8_t> zeros(32, 0);
  std::vector<uint8_t> ones(32, 0xff);
  std::vector<uint8_t> rising(32);
  for (uint8_t i = 0; i < 32; ++i) rising[i] = i;
  CHECK_EQ(potluck::Crc32c(zeros.data(), 32), 0x8a9136aau);
  CHECK_EQ(potluck::Crc32c(ones.data(), 32), 0x62a8ab43u);
  CHECK_EQ(potluck::Crc32c(rising.data(), 32), 0x46dd794eu);
  CHECK_EQ(potluck::Crc32c("123456789", 9), 0xe3069283u);
  CHECK_EQ(potluck::Crc32c(nullptr, 0), 0u);

  std::mt19937 random(5);
  std::vector<uint8_t> bytes(10000);
  for (uint8_t& byte : bytes) byte = static_cast<uint8_t>(random());
  for (size_t n = 0; n < bytes.size(); n += 1 + n / 7) {
    const size_t start = random() % 9 % (bytes.size() - n);
    const uint32_t whole = potluck::Crc32c(bytes.data() + start, n);
    CHECK_EQ(whole, potluck::Crc32cByTables(bytes.data() + start, n));
    const size_t cut = n == 0 ? 0 : random() % n;
    const uint32_t front = potluck::Crc32c(bytes.data() + start, cut);
    CHECK_EQ(whole, potluck::Crc32c(bytes.data() + start + cut, n - cut, front));
  }
}

CHECK_MAIN
