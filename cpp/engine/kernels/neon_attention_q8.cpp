// Attention over q8 keys and values for ARM. Integer sums are exact, so all that must follow the
// scalar kernel are the few float operations of a row.
//
// Query rows are taken up to six at a time against 16 positions or dimensions: 24 sums in 32
// registers. ld4 sorts the fours of a page apart, so a vector holds one dimension (or position) of
// 16 codes. More than six rows share a tile widened to int16 once.
#include <arm_neon.h>
#include <stddef.h>
#include <stdint.h>

#include "engine/kernels/attention_q8.h"
#include "engine/kernels/attention_rows.h"
#include "engine/kernels/neon_attention.h"
#include "engine/kernels/neon_weigh.h"

namespace potluck {
namespace {

constexpr size_t kSlice = kPagePositions;  // positions or dimensions that a row of sums takes
constexpr size_t kVectors = kSlice / kLanes;
constexpr size_t kWords = 4 * kSlice;  // of a slice's four widened

// Four dimensions of 16 positions, or four positions of 16 dimensions: as bytes of a page, ...
struct FourBytes {
  int8x16x4_t codes;
  int16x8_t Low(size_t i) const { return vmovl_s8(vget_low_s8(codes.val[i])); }
  int16x8_t High(size_t i) const { return vmovl_high_s8(codes.val[i]); }
};

// ... or as int16 in scratch.
struct FourWords {
  const int16_t* at;
  int16x8_t Low(size_t i) const { return vld1q_s16(at + i * kSlice); }
  int16x8_t High(size_t i) const { return vld1q_s16(at + i * kSlice + kSlice / 2); }
};

inline const int8_t* CodesAt(const uint8_t* at) { return reinterpret_cast<const int8_t*>(at); }

// Where a tile's codes are: in their pages, ...
struct Bytes {
  const KvTile& tile;
  size_t head_dim;
  FourBytes Keys(size_t page, size_t four) const {
    return {vld4q_s8(CodesAt(tile.sections[page]) + four * kWords)};
  }
  FourBytes Values(size_t four, size_t d) const {
    const int8_t* const values = CodesAt(tile.sections[four / 4]) + q8::ValuesAt(head_dim);
    return {vld4q_s8(values + (four % 4 * q8::Padded(head_dim) + d) * 4)};
  }
};

// ... or in scratch: keys [4 pages][head_dim][16 positions] and then, in their place, values
// [head_dim / 16][64 positions][16 dimensions].
struct Words {
  const KvTile& tile;
  size_t head_dim;
  int16_t* wide;
  int16_t* KeysAt(size_t page, size_t four) const {
    return wide + (page * (q8::Padded(head_dim) / 4) + four) * kWords;
  }
  int16_t* ValuesAt(size_t four, size_t d) const {
    return wide + (d / kSlice * (kTilePositions / 4) + four) * kWords;
  }
  FourWords Keys(size_t page, size_t four) const { return {KeysAt(page, four)}; }
  FourWords Values(size_t four, size_t d) const { return {ValuesAt(four, d)}; }
};

inline void Widen(const FourBytes& from, int16_t* to) {
#pragma GCC unroll 4
  for (size_t i = 0; i < 4; ++i) {
    vst1q_s16(to + i * kSlice, from.Low(i));
    vst1q_s16(to + i * kSlice + kSlice / 2, from.High(i));
  }
}

void WidenKeys(const Words& to, size_t n) {
  const Bytes from = {to.tile, to.head_dim};
  for (size_t page = 0; page * kPagePositions < n; ++page) {
    for (size_t four = 0; four < q8::Padded(to.head_dim) / 4; ++four) {
      Widen(from.Keys(page, four), to.KeysAt(page, four));
    }
  }
}

void WidenValues(const Words& to, size_t n_fours) {
  const Bytes from = {to.tile, to.head_dim};
  for (size_t four = 0; four < n_fours; ++four) {
    for (size_t d = 0; d < to.head_dim; d += kSlice) {
      Widen(from.Values(four, d), to.ValuesAt(four, d));
    }
  }
}

// sums[r] += code kLane of row r's four times 16 codes.
template <int kLane, size_t kRows, class Row>
inline void AddProducts(int16x8_t low, int16x8_t high, const Row& row,
                        int32x4_t (&sums)[kRows][kVectors]) {
#pragma GCC unroll 8
  for (size_t r = 0; r < kRows; ++r) {
    const int16x4_t four = vld1_s16(row(r));
    sums[r][0] = vmlal_lane_s16(sums[r][0], vget_low_s16(low), four, kLane);
    sums[r][1] = vmlal_high_lane_s16(sums[r][1], low, four, kLane);
    sums[r][2] = vmlal_lane_s16(sums[r][2], vget_low_s16(high), four, kLane);
    sums[r][3] = vmlal_high_lane_s16(sums[r][3], high, four, kLane);
    // gcc otherwise loads the fours of all rows first and spills sums.
    if (kRows == kMostRows) asm volatile("" ::: "memory");
  }
}

template <size_t kRows, class Four, class Row>
inline void AddFour(const Four& codes, const Row& row, int32x4_t (&sums)[kRows][kVectors]) {
  AddProducts<0>(codes.Low(0), codes.High(0), row, sums);
  AddProducts<1>(codes.Low(1), codes.High(1), row, sums);
  AddProducts<2>(codes.Low(2), codes.High(2), row, sums);
  AddProducts<3>(codes.Low(3), codes.High(3), row, sums);
}

template <size_t kRows>
inline void Clear(int32x4_t (&sums)[kRows][kVectors]) {
#pragma GCC unroll 8
  for (size_t r = 0; r < kRows; ++r) {
#pragma GCC unroll 4
    for (size_t v = 0; v < kVectors; ++v) sums[r][v] = vdupq_n_s32(0);
  }
}

// Integer scores of query rows with a page's positions; scores is [kRows][64] and holds int32.
template <size_t kRows, class Source>
void Score(const Source& source, size_t page, bool fetches, const void* const* q, float* scores) {
  int32x4_t sums[kRows][kVectors];
  const int16_t* row[kRows];
  Clear(sums);
#pragma GCC unroll 8
  for (size_t r = 0; r < kRows; ++r) row[r] = static_cast<const int16_t*>(q[r]);
  for (size_t four = 0; four < q8::Padded(source.head_dim) / 4; ++four) {
    if (fetches) q8::FetchKeys<1>(source.tile, source.head_dim, page, four);
    AddFour(source.Keys(page, four), [&](size_t r) { return row[r] + 4 * four; }, sums);
  }
#pragma GCC unroll 8
  for (size_t r = 0; r < kRows; ++r) {
    float* const at = scores + r * kTilePositions + page * kPagePositions;
#pragma GCC unroll 4
    for (size_t v = 0; v < kVectors; ++v) {
      vst1q_f32(at + v * kLanes, vreinterpretq_f32_s32(sums[r][v]));
    }
  }
}

inline float32x4_t ScalesAt(const KvTile& tile, size_t scales_at, size_t position) {
  const uint8_t* const scales = tile.sections[position / kPagePositions] + scales_at;
  return vld1q_f32(reinterpret_cast<const float*>(scales) + position % kPagePositions);
}

// Integer sums become scores.
void ToScores(const KvTile& tile, size_t head_dim, size_t n, const void* q, float* scores) {
  float scale = 0.0f;
  __builtin_memcpy(&scale, static_cast<const uint8_t*>(q) + q8::QueryScaleAt(head_dim),
                   sizeof scale);
  for (size_t j = 0; j < n; j += kLanes) {
    const int32x4_t sums = vreinterpretq_s32_f32(vld1q_f32(scores + j));
    const float32x4_t unit = vmulq_n_f32(ScalesAt(tile, q8::KeyScalesAt(head_dim), j), scale);
    vst1q_f32(scores + j, vmulq_f32(vcvtq_f32_s32(sums), unit));
  }
}

// Weights become codes, and 0 from n on.
void QuantizeWeights(const KvTile& tile, size_t head_dim, size_t n, float* scores) {
  float32x4_t largest_lanes = vdupq_n_f32(0.0f);
  for (size_t j = 0; j < n; j += kLanes) {
    const float32x4_t scales = ScalesAt(tile, q8::ValueScalesAt(head_dim), j);
    vst1q_f32(scores + j, vmulq_f32(vld1q_f32(scores + j), scales));
    for (size_t unseen = n; unseen < j + kLanes; ++unseen) scores[unseen] = 0.0f;
    largest_lanes = vmaxq_f32(largest_lanes, vld1q_f32(scores + j));
  }
  const float largest = vmaxvq_f32(largest_lanes);
  const bool is_tiny = largest < q8::kTiny;
  const float per_weight = is_tiny ? 0.0f : q8::kWeightRange / largest;
  int16_t codes[kTilePositions];
  for (size_t j = 0; j < kTilePositions; j += kLanes) {
    const float32x4_t weights = j < n ? vld1q_f32(scores + j) : vdupq_n_f32(0.0f);
    vst1_s16(codes + j, vmovn_s32(vcvtnq_s32_f32(vmulq_n_f32(weights, per_weight))));
  }
  __builtin_memcpy(scores, codes, sizeof codes);
  scores[q8::kUnitAt] = is_tiny ? 0.0f : largest / q8::kWeightRange;
}

// Integer sums of rows [first, stop) become codes, step by step for all of them: the steps of one
// row wait for each other.
void WeighRows(const KvTile& tile, size_t head_dim, const TileRows& rows, size_t first, size_t stop,
               float* scores) {
  const auto at = [&](size_t row) { return scores + row * kTilePositions; };
  for (size_t row = first; row < stop; ++row) {
    ToScores(tile, head_dim, SeenBy(rows, row), rows.q[row], at(row));
  }
  for (size_t row = first; row < stop; ++row) {
    Weigh(head_dim, SeenBy(rows, row), at(row), rows.states[row]);
  }
  for (size_t row = first; row < stop; ++row) {
    QuantizeWeights(tile, head_dim, SeenBy(rows, row), at(row));
  }
}

// o[d..d+4) = fma(sums, unit, o); those below head_dim.
inline void AddTo(float* o, size_t d, size_t head_dim, int32x4_t sums, float unit) {
  const float32x4_t added = vcvtq_f32_s32(sums);
  if (d + kLanes <= head_dim) {
    return vst1q_f32(o + d, vfmaq_n_f32(vld1q_f32(o + d), added, unit));
  }
  float each[kLanes];
  vst1q_f32(each, added);
  for (size_t i = 0; d + i < head_dim; ++i) o[d + i] = __builtin_fmaf(each[i], unit, o[d + i]);
}

// Adds the weighted values to dimensions [d, d + 16) of rows [first, first + kRows).
template <size_t kRows, class Source>
void Mix(const Source& source, const TileRows& rows, size_t first, size_t n_fours, size_t d,
         const float* scores) {
  int32x4_t sums[kRows][kVectors];
  scores += first * kTilePositions;
  const auto* const codes = reinterpret_cast<const int16_t*>(scores);
  Clear(sums);
  for (size_t four = 0; four < n_fours; ++four) {
    if (first == 0) q8::FetchValues(source.tile, source.head_dim, four, d, kSlice);
    AddFour(
        source.Values(four, d),
        [&](size_t r) { return codes + (r * 2 * kTilePositions + 4 * four); }, sums);
  }
#pragma GCC unroll 8
  for (size_t r = 0; r < kRows; ++r) {
    const float unit = scores[r * kTilePositions + q8::kUnitAt];
#pragma GCC unroll 4
    for (size_t v = 0; v < kVectors; ++v) {
      if (d + v * kLanes >= source.head_dim) break;
      AddTo(rows.states[first + r], d + v * kLanes, source.head_dim, sums[r][v], unit);
    }
  }
}

template <class Source>
void ScoreAndWeigh(const Source& source, const TileRows& rows, float* scores) {
  const size_t n = SeenBy(rows, rows.count - 1);
  for (size_t page = 0; page * kPagePositions < n; ++page) {
    BySix(rows.count, [&](auto count, size_t first) {
      Score<decltype(count)::kRows>(source, page, first == 0, rows.q + first,
                                    scores + first * kTilePositions);
    });
  }
  BySix(rows.count, [&](auto count, size_t first) {
    WeighRows(source.tile, source.head_dim, rows, first, first + decltype(count)::kRows, scores);
  });
}

template <class Source>
void MixAll(const Source& source, const TileRows& rows, size_t n_fours, const float* scores) {
  for (size_t d = 0; d < source.head_dim; d += kSlice) {
    BySix(rows.count, [&](auto count, size_t first) {
      Mix<decltype(count)::kRows>(source, rows, first, n_fours, d, scores);
    });
  }
}

}  // namespace

namespace neon {

void AddTileQ8(const KvTile& tile, size_t head_dim, const TileRows& rows, float* scratch) {
  float* const scores = ScoresIn(scratch, head_dim);
  const size_t n = SeenBy(rows, rows.count - 1);
  const size_t n_fours = (n + 3) / 4;
  if (rows.count <= kMostRows) {
    const Bytes source = {tile, head_dim};
    ScoreAndWeigh(source, rows, scores);
    return MixAll(source, rows, n_fours, scores);
  }
  const Words source = {tile, head_dim, reinterpret_cast<int16_t*>(scratch)};
  WidenKeys(source, n);
  ScoreAndWeigh(source, rows, scores);
  WidenValues(source, n_fours);
  MixAll(source, rows, n_fours, scores);
}

}  // namespace neon
}  // namespace potluck
