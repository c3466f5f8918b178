// Every ISA's matrix kernels equal the scalar ones bit for bit, and the scalar ones are near the
// truth.
#include "engine/matmul.h"

#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <cstdlib>
#include <memory>
#include <new>

#include "check.h"
#include "engine/isa.h"
#include "engine/kernels/matmul_table.h"
#include "weights.h"

using namespace potluck;
using weights::kAllTypes;
using weights::Scales;

namespace {

constexpr float kUntouched = -12345.0f;

std::vector<const MatMulTable*> Tables() {
  std::vector<const MatMulTable*> tables = {ScalarMatMulTable()};
  for (const std::string& isa : AvailableIsas()) {
    if (isa != "scalar") tables.push_back(ChooseTable(isa).matmul);
  }
  return tables;
}

void SayTables() {
  for (const MatMulTable* table : Tables()) std::printf("tried %s\n", table->name);
}

struct Free {
  void operator()(uint8_t* bytes) const { std::free(bytes); }
};
using Buffer = std::unique_ptr<uint8_t, Free>;

Buffer Allocate(size_t bytes) {
  const size_t size = (bytes + 63) / 64 * 64;
  Buffer buffer(static_cast<uint8_t*>(std::aligned_alloc(64, size)));
  std::memset(buffer.get(), 0, size);
  return buffer;
}

struct Unmap {
  void* pages;
  size_t size;
  void operator()(uint8_t* /*bytes*/) const { munmap(pages, size); }
};
using Guarded = std::unique_ptr<uint8_t, Unmap>;

// Bytes that end where a page begins that nobody may touch: what goes beyond crashes, where no
// sanitizer runs (emulated) and within the rounding of other buffers too.
Guarded Guard(size_t bytes) {
  const auto page = static_cast<size_t>(sysconf(_SC_PAGESIZE));
  const size_t room = (bytes + page - 1) / page * page;
  void* pages =
      mmap(nullptr, room + page, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (pages == MAP_FAILED) throw std::bad_alloc();
  uint8_t* const end = static_cast<uint8_t*>(pages) + room;
  CHECK_EQ(mprotect(end, page, PROT_NONE), 0);
  return Guarded(end - bytes, Unmap{pages, room + page});
}

Guarded GuardCopy(const void* bytes, size_t count) {
  Guarded copy = Guard(count);
  std::memcpy(copy.get(), bytes, count);
  return copy;
}

// PreparedBytes without its rounding.
size_t PreparedSize(Grain grain, size_t rows, size_t k) {
  return rows * PreparedWords(grain, k) * 4;
}

struct Prepared {
  Guarded bytes;
  PreparedRows rows;
  bool finite;
};

Prepared Prepare(const MatMulTable& table, Grain grain, const std::vector<float>& x, size_t rows,
                 size_t k) {
  const Guarded values = GuardCopy(x.data(), rows * k * sizeof(float));
  Prepared prepared = {Guard(PreparedSize(grain, rows, k)), {grain, rows, k, nullptr}, true};
  prepared.rows.data = prepared.bytes.get();
  prepared.finite = PrepareRows(table, grain, reinterpret_cast<const float*>(values.get()), k, rows,
                                k, 0, rows, prepared.bytes.get());
  return prepared;
}

// [rows, stride] with the columns beyond the panels untouched. The kernel's ends with the last
// panel.
std::vector<float> Multiply(const MatMulTable& table, WeightType type, const uint8_t* panels,
                            size_t n_panels, const PreparedRows& x, size_t stride) {
  const Guarded scratch = Guard(MatMulScratchBytes());
  std::memset(scratch.get(), 0xff,
              MatMulScratchBytes());  // NaN: what isn't written must not be read
  std::vector<float> out(x.rows * stride, kUntouched);
  const size_t bytes = ((x.rows - 1) * stride + 8 * n_panels) * sizeof(float);
  const Guarded room = GuardCopy(out.data(), bytes);
  MatMul(table, type, panels, n_panels, x, reinterpret_cast<float*>(room.get()), stride,
         scratch.get());
  std::memcpy(out.data(), room.get(), bytes);
  return out;
}

bool HasSameBits(float a, float b) {
  return std::memcmp(&a, &b, sizeof a) == 0 || (std::isnan(a) && std::isnan(b));
}

// out [rows, stride] equals the first rows and columns of wanted [.., wanted_stride]; nothing else
// was written.
bool IsPartOf(const std::vector<float>& out, size_t rows, size_t columns, size_t stride,
              const std::vector<float>& wanted, size_t wanted_stride) {
  for (size_t m = 0; m < rows; ++m) {
    for (size_t c = 0; c < stride; ++c) {
      const float expected = c < columns ? wanted[m * wanted_stride + c] : kUntouched;
      if (!HasSameBits(out[m * stride + c], expected)) return false;
    }
  }
  return true;
}

std::vector<size_t> WidthsOf(WeightType type) {
  if (check::IsShort()) {  // one chunk of K and several, records of 1, 2 and 4 blocks
    if (InfoOf(type).block_values == 256) return {256, 768};
    return {32, 192, 640, 1056};
  }
  if (InfoOf(type).block_values == 256) return {256, 512, 768, 4096, 11008};
  return {32, 64, 96, 160, 256, 512, 576, 640, 672, 4096, 11008};
}

std::string Describe(const MatMulTable& table, WeightType type, size_t k, size_t rows,
                     size_t n_panels) {
  std::ostringstream text;
  text << table.name << " " << InfoOf(type).name << " K " << k << " M " << rows << " panels "
       << n_panels;
  return text.str();
}

struct Case {
  WeightType type;
  size_t n, k, rows;
  std::vector<uint8_t> file;
  std::vector<float> x;
};

// Every table against the scalar one, for the first rows of the case and its first panels.
void CheckCase(const Case& c, const std::vector<size_t>& batches,
               const std::vector<size_t>& shares) {
  const Grain grain = GrainOf(c.type);
  const std::vector<uint8_t> packed = weights::Pack(c.type, c.file, c.n, c.k);
  const size_t wanted_stride = (c.n + 7) / 8 * 8;
  const Prepared all = Prepare(*ScalarMatMulTable(), grain, c.x, c.rows, c.k);
  CHECK(all.finite);
  const std::vector<float> wanted = Multiply(*ScalarMatMulTable(), c.type, packed.data(),
                                             wanted_stride / 8, all.rows, wanted_stride);
  std::vector<Guarded> ends;
  for (const size_t n_panels : shares) {
    ends.push_back(GuardCopy(packed.data(), n_panels * PanelBytes(c.type, c.k)));
  }
  for (const size_t rows : batches) {
    const Prepared expected = Prepare(*ScalarMatMulTable(), grain, c.x, rows, c.k);
    for (const MatMulTable* table : Tables()) {
      const Prepared x = Prepare(*table, grain, c.x, rows, c.k);
      if (std::memcmp(x.rows.data, expected.rows.data, PreparedSize(grain, rows, c.k)) != 0) {
        check::Fail(__FILE__, __LINE__,
                    "prepared otherwise: " + Describe(*table, c.type, c.k, rows, 0));
      }
      for (size_t share = 0; share < shares.size(); ++share) {
        const size_t n_panels = shares[share];
        // The scalar kernel is slow, and takes one row at a time whatever M is.
        const size_t most = check::IsShort() ? 1 : 9;
        if (table == ScalarMatMulTable() && (rows > most || c.k > 700)) continue;
        const size_t stride = 8 * n_panels + 3;
        const std::vector<float> out =
            Multiply(*table, c.type, ends[share].get(), n_panels, x.rows, stride);
        if (!IsPartOf(out, rows, 8 * n_panels, stride, wanted, wanted_stride)) {
          check::Fail(__FILE__, __LINE__,
                      "other bits: " + Describe(*table, c.type, c.k, rows, n_panels));
        }
      }
    }
  }
}

std::vector<size_t> Batches() {
  if (check::IsShort()) return {1, 2, 3, 4, 5, 6, 7, 8, 13, 65, 130};
  return {1,  2,  3,  4,  5,  6,  7,  8,  9,  10, 11, 12, 13,
          14, 15, 16, 17, 18, 20, 33, 64, 65, 66, 67, 130};
}

}  // namespace

TEST(EveryIsaHasTheBitsOfTheScalarKernels) {
  SayTables();
  for (const WeightType type : kAllTypes) {
    for (const size_t k : WidthsOf(type)) {
      const Case c = {
          type, 40, k, 130, weights::FileBytes(type, 40, k, 1), weights::Activations(130, k, 2)};
      CheckCase(c, Batches(),
                check::IsShort() ? std::vector<size_t>{5} : std::vector<size_t>{1, 2, 3, 4, 5});
    }
  }
}

// The tiles of many rows share one unpacking among up to 256 rows: here are three more, and two
// chunks of K in every kernel.
TEST(MoreRowsThanABandHaveTheSameBits) {
  for (const WeightType type : kAllTypes) {
    const size_t k = InfoOf(type).block_values == 256 ? 512 : 1056;
    const size_t rows = check::IsShort() ? 131 : 259;  // ARM's bands hold 128
    const Case c = {
        type, 40, k, rows, weights::FileBytes(type, 40, k, 15), weights::Activations(rows, k, 16)};
    CheckCase(c, {rows}, {5});
  }
}

// 66 rows are groups of 4 and of 3 where floats have tiles for 8 panels; 160 and 672 leave a rest
// of a chunk of K.
TEST(ManyPanelsAndAnOddLastOneHaveTheSameBits) {
  for (const WeightType type : kAllTypes) {
    const bool is_k = InfoOf(type).block_values == 256;
    for (const size_t n : {157u, 576u}) {
      for (const size_t k : is_k ? std::vector<size_t>{512} : std::vector<size_t>{160, 512, 672}) {
        const Case c = {
            type, n, k, 66, weights::FileBytes(type, n, k, 3), weights::Activations(66, k, 4)};
        CheckCase(c, {1, 4, 12, 13, 66}, {(n + 7) / 8});
      }
    }
  }
}

// Saturation hides from random data.
TEST(ExtremeCodesAndActivationsHaveTheSameBits) {
  SayTables();
  const size_t k = 512;
  const auto sign = [](bool is_negative) { return is_negative ? -1.0f : 1.0f; };
  for (int pattern = 0; pattern < 10; ++pattern) {
    const size_t rows = pattern < 6 ? 66 : 13;  // enough for tiles of many rows
    std::vector<float> x = weights::Activations(rows, k, 5);
    for (size_t i = 0; i < x.size(); ++i) {
      const size_t j = i % k;
      if (pattern == 0) x[i] = 1.0f;
      if (pattern == 1) x[i] = -1.0f;
      if (pattern == 2) x[i] = sign(j % 2 != 0);
      if (pattern == 3) x[i] = sign(j / 2 % 2 != 0);
      if (pattern == 4) x[i] = sign(j / 16 % 2 != 0);
      if (pattern == 5) x[i] = sign(j / 4 % 2 != 0) * 1e30f;
      if (pattern == 6) x[i] = j == 77 ? -3e4f : x[i];
      if (pattern == 7) x[i] = j % 3 == 0 ? 1e-42f : 0.0f;
      if (pattern == 8) x[i] = j % 2 == 0 ? 0.0f : -0.0f;
      if (pattern == 9)
        x[i] = sign(j % 5 == 0) * (j / 32 % 2 != 0 ? 0x1p-100f : std::nextafter(0x1p-100f, 0.0f));
    }
    for (const WeightType type : kAllTypes) {
      for (const int byte : {-1, 0x00, 0xff, 0x80, 0x7f, 0xf0, 0x0f}) {
        const Case c = {
            type, 40, k, rows, weights::FileBytes(type, 40, k, 6, Scales::kRandom, byte), x};
        // Tiles of 1, 2 and 4 panels and what they leave.
        CheckCase(c, {1, 2, 5, 8, 13, rows},
                  check::IsShort() ? std::vector<size_t>{5} : std::vector<size_t>{3, 5});
      }
    }
  }
}

// Lanes of +-32512 times scales of -128, in every sub-block: the largest sums of Q6_K.
TEST(SixBitCodesAndTheirScalesAtBothEndsHaveTheSameBits) {
  const size_t n = 40, k = 512, rows = 66;  // enough for tiles of many rows, and panels for all
  for (const int codes : {0x00, 0xff}) {    // -32, 31
    for (const int scale : {-128, 127}) {
      std::vector<uint8_t> file =
          weights::FileBytes(WeightType::kQ6_K, n, k, 14, Scales::kRandom, codes);
      for (size_t block = 0; block < file.size(); block += 210) {
        std::memset(file.data() + block + 192, scale, 16);
      }
      for (const size_t run : {1u, 2u, 8u, 16u, 512u}) {
        for (const float size : {1.0f, -1.0f}) {
          std::vector<float> x(rows * k);
          for (size_t i = 0; i < x.size(); ++i) x[i] = i % k / run % 2 != 0 ? -size : size;
          CheckCase({WeightType::kQ6_K, n, k, rows, file, x}, {1, 5, 8, 13, 66}, {3, 5});
        }
      }
    }
  }
}

TEST(ExtremeScalesHaveTheSameBits) {
  for (const Scales scales : {Scales::kZero, Scales::kNegativeZero, Scales::kSubnormal,
                              Scales::kLargest, Scales::kNegative}) {
    for (const WeightType type : kAllTypes) {
      for (const float size : {1e-30f, 1.0f, 1e30f}) {
        std::vector<float> x = weights::Activations(66, 512, 7);
        for (float& value : x) value *= size;
        const Case c = {type, 40, 512, 66, weights::FileBytes(type, 40, 512, 8, scales), x};
        CheckCase(c, {1, 4, 7, 13, 66}, {3, 5});
      }
    }
  }
}

TEST(RowsPreparedByPartsEqualRowsPreparedAtOnce) {
  const size_t k = 512;
  for (const MatMulTable* table : Tables()) {
    for (const Grain grain : {Grain::kFloat, Grain::kBlock32, Grain::kBlock256}) {
      for (const size_t rows : {1u, 3u, 8u, 9u, 10u, 13u, 23u, 64u, 65u, 70u}) {
        const std::vector<float> x = weights::Activations(rows, k + 5, 9);
        const Buffer once = Allocate(PreparedBytes(grain, rows, k));
        const Buffer parts = Allocate(PreparedBytes(grain, rows, k));
        CHECK(PrepareRows(*table, grain, x.data(), k + 5, rows, k, 0, rows, once.get()));
        size_t first = 0;
        for (size_t part = 0; part < PartCount(rows); ++part) {
          CHECK_EQ(FirstOfPart(rows, part), first);
          const size_t last = FirstOfPart(rows, part + 1);
          CHECK(first < last && last - first <= kPartRows);
          CHECK(PrepareRows(*table, grain, x.data(), k + 5, rows, k, first, last, parts.get()));
          first = last;
        }
        CHECK_EQ(first, rows);
        CHECK(std::memcmp(once.get(), parts.get(), PreparedBytes(grain, rows, k)) == 0);
      }
    }
  }
}

TEST(CodesOfActivationsNeverReachMinus128) {
  const size_t k = 256;
  std::vector<float> x = weights::Activations(1, k, 10);
  for (size_t i = 0; i < k; i += 32) x[i] = -100.0f;
  for (const MatMulTable* table : Tables()) {
    for (const Grain grain : {Grain::kBlock32, Grain::kBlock256}) {
      const Prepared prepared = Prepare(*table, grain, x, 1, k);
      int lowest = 0, highest = 0;
      for (size_t i = 0; i < k; ++i) {
        int8_t code = 0;
        std::memcpy(&code, prepared.rows.data + i, 1);
        lowest = std::min<int>(lowest, code);
        highest = std::max<int>(highest, code);
      }
      CHECK_EQ(lowest, -127);
      CHECK(highest > 0 && highest <= 127);
    }
  }
}

TEST(NanAndInfinityAreNoticed) {
  const size_t k = 256;
  for (const MatMulTable* table : Tables()) {
    for (const Grain grain : {Grain::kFloat, Grain::kBlock32, Grain::kBlock256}) {
      for (const float bad : {NAN, -NAN, INFINITY, -INFINITY}) {
        for (size_t at = 0; at < k; ++at) {
          std::vector<float> x = weights::Activations(5, k, 11);
          CHECK(at != 0 || Prepare(*table, grain, x, 5, k).finite);
          x[(at % 5) * k + at] = bad;
          CHECK(!Prepare(*table, grain, x, 5, k).finite);
        }
      }
    }
    const std::vector<float> odd = {1.0f, -2.0f, 3.0f, NAN,
                                    0.0f};  // float rows may have any length
    CHECK(!Prepare(*table, Grain::kFloat, odd, 1, 5).finite);
    CHECK(Prepare(*table, Grain::kFloat, odd, 1, 3).finite);
  }
}

// Against float64 on the dequantized weights and unquantized activations. Limits: ggml's own NMSE;
// and a mean error about 0, which shows a wrong min or centre that NMSE hides.
TEST(TheAnswerIsNearTheTruth) {
  for (const WeightType type : kAllTypes) {
    const size_t n = 256, k = InfoOf(type).block_values == 256 ? 512 : 576, rows = 8;
    const std::vector<uint8_t> packed =
        weights::Pack(type, weights::FileBytes(type, n, k, 12), n, k);
    std::vector<float> x = weights::Activations(rows, k, 13);
    for (float& value : x) value += 0.25f;  // a mean, so that a lost min shows
    const Prepared prepared = Prepare(*ScalarMatMulTable(), GrainOf(type), x, rows, k);
    const std::vector<float> out =
        Multiply(*ScalarMatMulTable(), type, packed.data(), n / 8, prepared.rows, n);
    double error = 0, square_error = 0, square = 0;
    std::vector<float> row(k);
    for (size_t j = 0; j < n; ++j) {
      UnpackRow(type, packed.data() + j / 8 * PanelBytes(type, k), j % 8, k, row.data());
      for (size_t m = 0; m < rows; ++m) {
        double truth = 0;
        for (size_t i = 0; i < k; ++i)
          truth += static_cast<double>(row[i]) * static_cast<double>(x[m * k + i]);
        const double difference = static_cast<double>(out[m * n + j]) - truth;
        error += difference;
        square_error += difference * difference;
        square += truth * truth;
      }
    }
    const double count = static_cast<double>(n * rows);
    const double nmse = square_error / square;
    std::printf("%s: NMSE %.2g\n", InfoOf(type).name, nmse);
    CHECK(square > 0);
    CHECK(nmse <= (GrainOf(type) == Grain::kFloat ? 1e-10 : 5e-4));
    CHECK(std::abs(error / count) <=
          0.1 * std::sqrt(square_error / count) + 1e-9 * std::sqrt(square / count));
  }
}

CHECK_MAIN
