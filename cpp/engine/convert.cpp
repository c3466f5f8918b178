#include "engine/convert.h"

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstring>
#include <string>

#include "engine/dequantize.h"
#include "engine/errors.h"
#include "engine/finite.h"
#include "engine/quantize_blocks.h"

namespace potluck {
namespace {

constexpr size_t kPieceValues = 4096;  // whole blocks of any type; their floats stay in L1
constexpr float kLargestHalf = 65504.0f;
constexpr float kLargestBFloat = 0x1.fep+127f;

void WriteHalves(const float* x, size_t n, uint8_t* out) {
  for (size_t i = 0; i < n; ++i) {
    const uint16_t half = FloatToHalf(x[i]);
    std::memcpy(out + 2 * i, &half, sizeof half);
  }
}

// The upper half of an f32, rounded to nearest even.
void WriteBFloats(const float* x, size_t n, uint8_t* out) {
  for (size_t i = 0; i < n; ++i) {
    uint32_t bits = 0;
    std::memcpy(&bits, x + i, sizeof bits);
    const auto upper = static_cast<uint16_t>((bits + 0x7fffu + (bits >> 16 & 1u)) >> 16);
    std::memcpy(out + 2 * i, &upper, sizeof upper);
  }
}

void Write(WeightType type, const float* x, size_t n, uint8_t* out) {
  if (type == WeightType::kF32) {
    std::memcpy(out, x, n * sizeof(float));
  } else if (type == WeightType::kF16) {
    WriteHalves(x, n, out);
  } else if (type == WeightType::kBF16) {
    WriteBFloats(x, n, out);
  } else {
    const TypeInfo& info = InfoOf(type);
    const auto quantize = info.block_values == 32 ? QuantizeBlock32 : QuantizeBlock256;
    for (size_t i = 0; i < n / info.block_values; ++i)
      quantize(type, x + i * info.block_values, out + i * info.block_bytes);
  }
}

// Whether each value can be written; false for NaN.
bool Fits(const float* x, size_t n, float largest) { return LargestMagnitude(x, n) <= largest; }

struct Work {
  WeightType from;
  WeightType to;
  size_t n;
  const uint8_t* in;
  uint8_t* out;
};

// Values [first, first + n); false if one can't be written.
bool ConvertPiece(const Work& work, size_t first, size_t n) {
  alignas(64) float x[kPieceValues];
  const uint8_t* in = work.in + RowBytes(work.from, first);
  uint8_t* out = work.out + RowBytes(work.to, first);
  Dequantize(work.from, in, n, x);
  if (!Fits(x, n, LargestOf(work.to))) return false;
  if (work.from == work.to)
    std::memcpy(out, in, RowBytes(work.to, n));
  else
    Write(work.to, x, n, out);
  return true;
}

Flaw FindFlaw(const Work& work, size_t first, size_t n) {
  float x[kPieceValues];
  Dequantize(work.from, work.in + RowBytes(work.from, first), n, x);
  size_t i = 0;
  while (i + 1 < n && Fits(x + i, 1, LargestOf(work.to))) ++i;
  return {first + i, x[i]};
}

void CheckBlocks(WeightType type, size_t n) {
  const TypeInfo& info = InfoOf(type);
  if (n % info.block_values == 0) return;
  throw UsageError(std::to_string(n) + " values are no whole blocks of " + info.name);
}

}  // namespace

float LargestOf(WeightType type) {
  if (type == WeightType::kF32) return 0x1.fffffep+127f;
  return type == WeightType::kBF16 ? kLargestBFloat : kLargestHalf;
}

std::optional<Flaw> Convert(Pool& pool, WeightType from, WeightType to, size_t n, const uint8_t* in,
                            uint8_t* out) {
  CheckBlocks(from, n);
  CheckBlocks(to, n);
  const Work work = {from, to, n, in, out};
  const size_t n_pieces = (n + kPieceValues - 1) / kPieceValues;
  const auto length = [n](size_t piece) {
    return std::min(kPieceValues, n - piece * kPieceValues);
  };
  std::atomic<size_t> flawed{n_pieces};  // the first piece that has a flaw
  pool.Run(n_pieces, 4, [&](size_t, size_t first, size_t last) {
    for (size_t i = first; i < last; ++i) {
      if (ConvertPiece(work, i * kPieceValues, length(i))) continue;
      size_t lowest = flawed.load();
      while (i < lowest && !flawed.compare_exchange_weak(lowest, i)) continue;
    }
  });
  const size_t piece = flawed.load();
  if (piece == n_pieces) return std::nullopt;
  return FindFlaw(work, piece * kPieceValues, length(piece));
}

}  // namespace potluck
