#include "engine/crc32c.h"

#include <array>
#include <cstring>

#if defined(POTLUCK_X86)
#include <nmmintrin.h>
#endif

namespace potluck {
namespace {

constexpr uint32_t kPolynomial = 0x82f63b78;  // Castagnoli's, its bits reversed
constexpr size_t kSlices = 8;

// tables[s][b]: the checksum's change by byte b that stands s bytes before the end of a word.
using Tables = std::array<std::array<uint32_t, 256>, kSlices>;

constexpr Tables MakeTables() {
  Tables tables{};
  for (uint32_t byte = 0; byte < 256; ++byte) {
    uint32_t crc = byte;
    for (int bit = 0; bit < 8; ++bit) crc = crc >> 1 ^ ((crc & 1) != 0 ? kPolynomial : 0);
    tables[0][byte] = crc;
  }
  for (size_t slice = 1; slice < kSlices; ++slice)
    for (size_t byte = 0; byte < 256; ++byte) {
      const uint32_t before = tables[slice - 1][byte];
      tables[slice][byte] = before >> 8 ^ tables[0][before & 0xff];
    }
  return tables;
}
constexpr Tables kTables = MakeTables();

uint32_t ByTables(uint32_t crc, const uint8_t* bytes, size_t n) {
  for (; n >= kSlices; n -= kSlices, bytes += kSlices) {
    uint32_t next = 0;
    for (size_t i = 0; i < kSlices; ++i) {
      const uint32_t mixed = i < 4 ? bytes[i] ^ (crc >> (8 * i) & 0xff) : bytes[i];
      next ^= kTables[kSlices - 1 - i][mixed];
    }
    crc = next;
  }
  for (; n > 0; --n, ++bytes) crc = crc >> 8 ^ kTables[0][(crc ^ *bytes) & 0xff];
  return crc;
}

#if defined(POTLUCK_X86)
// The instruction takes 8 bytes every cycle but gives its result after three, so three runs of
// kLane bytes are summed side by side and joined.
constexpr size_t kLane = 1024;

// joints[i][b]: byte i of a checksum, moved on over kLane zero bytes.
using Joints = std::array<std::array<uint32_t, 256>, 4>;

Joints MakeJoints() {
  const std::array<uint8_t, kLane> zeros{};
  Joints joints{};
  for (uint32_t i = 0; i < 4; ++i)
    for (uint32_t byte = 0; byte < 256; ++byte)
      joints[i][byte] = ByTables(byte << (8 * i), zeros.data(), zeros.size());
  return joints;
}

uint32_t MovedOn(const Joints& joints, uint32_t crc) {
  return joints[0][crc & 0xff] ^ joints[1][crc >> 8 & 0xff] ^ joints[2][crc >> 16 & 0xff] ^
         joints[3][crc >> 24];
}

uint64_t WordAt(const uint8_t* bytes) {
  uint64_t word = 0;
  std::memcpy(&word, bytes, sizeof(word));
  return word;
}

__attribute__((target("sse4.2"))) uint32_t ByInstruction(uint32_t crc, const uint8_t* bytes,
                                                         size_t n) {
  static const Joints joints = MakeJoints();
  for (; n >= 3 * kLane; n -= 3 * kLane, bytes += 3 * kLane) {
    uint64_t a = crc;
    uint64_t b = 0;
    uint64_t c = 0;
    for (size_t i = 0; i < kLane; i += sizeof(uint64_t)) {
      a = _mm_crc32_u64(a, WordAt(bytes + i));
      b = _mm_crc32_u64(b, WordAt(bytes + kLane + i));
      c = _mm_crc32_u64(c, WordAt(bytes + 2 * kLane + i));
    }
    const uint32_t two = MovedOn(joints, static_cast<uint32_t>(a)) ^ static_cast<uint32_t>(b);
    crc = MovedOn(joints, two) ^ static_cast<uint32_t>(c);
  }
  uint64_t wide = crc;
  for (; n >= sizeof(uint64_t); n -= sizeof(uint64_t), bytes += sizeof(uint64_t))
    wide = _mm_crc32_u64(wide, WordAt(bytes));
  crc = static_cast<uint32_t>(wide);
  for (; n > 0; --n, ++bytes) crc = _mm_crc32_u8(crc, *bytes);
  return crc;
}
#endif

}  // namespace

uint32_t Crc32c(const void* data, size_t n, uint32_t before) {
  const auto* bytes = static_cast<const uint8_t*>(data);
#if defined(POTLUCK_X86)
  static const bool has_instruction = __builtin_cpu_supports("sse4.2");
  if (has_instruction) return ~ByInstruction(~before, bytes, n);
#endif
  return ~ByTables(~before, bytes, n);
}

uint32_t Crc32cByTables(const void* data, size_t n, uint32_t before) {
  return ~ByTables(~before, static_cast<const uint8_t*>(data), n);
}

}  // namespace potluck
