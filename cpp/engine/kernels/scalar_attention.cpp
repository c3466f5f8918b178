// Attention's canonical arithmetic: what every ISA's kernels must equal bit for bit.
#include <cmath>
#include <cstring>

#include "engine/canon.h"
#include "engine/kernels/attention_q8.h"
#include "engine/kernels/attention_table.h"
#include "engine/types.h"

namespace potluck {
namespace {

constexpr size_t kLanes = 8;  // of the sum of weights
constexpr uint16_t kHalfExponent = 0x7c00;

// Scores become weights, the state's o and l follow a risen maximum, l takes the new weights.
void Weigh(size_t head_dim, size_t n, float* scores, float* state) {
  float& m = state[head_dim];
  float& l = state[head_dim + 1];
  float largest = scores[0];
  for (size_t j = 1; j < n; ++j) largest = scores[j] > largest ? scores[j] : largest;
  if (largest > m) {
    const float factor = Exp(m - largest);
    for (size_t d = 0; d < head_dim; ++d) state[d] = state[d] * factor;
    l = l * factor;
    m = largest;
  }
  float lanes[kLanes] = {};
  for (size_t j = 0; j < n; ++j) {
    scores[j] = Exp(scores[j] - m);
    lanes[j % kLanes] = lanes[j % kLanes] + scores[j];
  }
  for (size_t width = kLanes / 2; width > 0; width /= 2) {
    for (size_t i = 0; i < width; ++i) lanes[i] = lanes[i] + lanes[i + width];
  }
  l = l + lanes[0];
}

// How many positions of the tile a row sees.
size_t SeenBy(const TileRows& rows, size_t row) {
  const size_t seen = rows.n + row / rows.n_heads;
  return seen < kTilePositions ? seen : kTilePositions;
}

void Merge(const float* from, size_t head_dim, float* into) {
  const float m = from[head_dim] > into[head_dim] ? from[head_dim] : into[head_dim];
  const float a = Exp(into[head_dim] - m);
  const float b = Exp(from[head_dim] - m);
  for (size_t d = 0; d < head_dim; ++d) into[d] = std::fma(from[d], b, into[d] * a);
  into[head_dim] = m;
  into[head_dim + 1] = std::fma(from[head_dim + 1], b, into[head_dim + 1] * a);
}

void Finish(const float* state, size_t head_dim, float* out) {
  for (size_t d = 0; d < head_dim; ++d) out[d] = state[d] / state[head_dim + 1];
}

namespace f16 {

const uint16_t* SectionOf(const KvTile& tile, size_t j) {
  return reinterpret_cast<const uint16_t*>(tile.sections[j / kPagePositions]);
}

void ScoreTile(const KvTile& tile, size_t head_dim, size_t n, const float* q, float* scores) {
  for (size_t j = 0; j < n; ++j) {
    const uint16_t* const key = SectionOf(tile, j) + j % kPagePositions;
    float score = 0.0f;
    for (size_t d = 0; d < head_dim; ++d) {
      score = std::fma(q[d], HalfToFloat(key[d * kPagePositions]), score);
    }
    scores[j] = score;
  }
}

void AddTile(const KvTile& tile, size_t head_dim, const TileRows& rows, float* scratch) {
  for (size_t row = 0; row < rows.count; ++row) {
    const size_t n = SeenBy(rows, row);
    float* const state = rows.states[row];
    ScoreTile(tile, head_dim, n, static_cast<const float*>(rows.q[row]), scratch);
    Weigh(head_dim, n, scratch, state);
    for (size_t j = 0; j < n; ++j) {
      const size_t slot = j % kPagePositions;
      const uint16_t* const value = SectionOf(tile, j) + (kPagePositions + slot) * head_dim;
      for (size_t d = 0; d < head_dim; ++d) {
        state[d] = std::fma(scratch[j], HalfToFloat(value[d]), state[d]);
      }
    }
  }
}

bool StoreKey(const float* key, size_t head_dim, size_t slot, uint8_t* section) {
  bool finite = true;
  auto* const out = reinterpret_cast<uint16_t*>(section) + slot;
  for (size_t d = 0; d < head_dim; ++d) {
    const uint16_t half = FloatToHalf(key[d]);
    finite &= (half & kHalfExponent) != kHalfExponent;
    out[d * kPagePositions] = half;
  }
  return finite;
}

bool StoreValue(const float* value, size_t head_dim, size_t slot, uint8_t* section) {
  bool finite = true;
  auto* const out = reinterpret_cast<uint16_t*>(section) + (kPagePositions + slot) * head_dim;
  for (size_t d = 0; d < head_dim; ++d) {
    out[d] = FloatToHalf(value[d]);
    finite &= (out[d] & kHalfExponent) != kHalfExponent;
  }
  return finite;
}

}  // namespace f16

namespace q8 {

// Exact for |x| <= 2^22: the addition leaves no bits below 1 and rounds to even.
float RintEven(float x) {
  constexpr float kShift = 12582912.0f;  // 1.5 * 2^23
  return (x + kShift) - kShift;
}

// Infinity if a value is not finite.
float LargestOf(const float* x, size_t n) {
  float largest = 0.0f;
  for (size_t i = 0; i < n; ++i) {
    if (!std::isfinite(x[i])) return INFINITY;
    largest = std::fabs(x[i]) > largest ? std::fabs(x[i]) : largest;
  }
  return largest;
}

float FloatAt(const uint8_t* at) {
  float value = 0;
  std::memcpy(&value, at, sizeof(value));
  return value;
}

// Place of dimension d of position j of the tile, and of position j's scale.
const int8_t* KeyCode(const KvTile& tile, size_t j, size_t d) {
  return reinterpret_cast<const int8_t*>(tile.sections[j / kPagePositions]) +
         (d / 4 * kPagePositions + j % kPagePositions) * 4 + d % 4;
}
const int8_t* ValueCode(const KvTile& tile, size_t head_dim, size_t j, size_t d) {
  const size_t slot = j % kPagePositions;
  return reinterpret_cast<const int8_t*>(tile.sections[j / kPagePositions]) + ValuesAt(head_dim) +
         (slot / 4 * Padded(head_dim) + d) * 4 + slot % 4;
}
float ScaleOf(const KvTile& tile, size_t scales_at, size_t j) {
  return FloatAt(tile.sections[j / kPagePositions] + scales_at +
                 j % kPagePositions * sizeof(float));
}

void PrepareQuery(const float* q, size_t head_dim, void* out) {
  auto* const codes = static_cast<int16_t*>(out);
  const float range = QueryRange(head_dim);
  const float largest = LargestOf(q, head_dim);
  const bool is_tiny = largest < kTiny;
  const float scale = is_tiny ? 0.0f : largest / range;
  std::memset(out, 0, QueryBytes(head_dim));
  for (size_t d = 0; d < head_dim && !is_tiny; ++d) {
    codes[d] = static_cast<int16_t>(RintEven(q[d] * (range / largest)));
  }
  std::memcpy(static_cast<uint8_t*>(out) + QueryScaleAt(head_dim), &scale, sizeof(scale));
}

void ScoreTile(const KvTile& tile, size_t head_dim, size_t n, const void* q, float* scores) {
  const auto* const codes = static_cast<const int16_t*>(q);
  const float scale = FloatAt(static_cast<const uint8_t*>(q) + QueryScaleAt(head_dim));
  for (size_t j = 0; j < n; ++j) {
    int32_t sum = 0;
    for (size_t d = 0; d < head_dim; ++d) sum += codes[d] * *KeyCode(tile, j, d);
    scores[j] = static_cast<float>(sum) * (scale * ScaleOf(tile, KeyScalesAt(head_dim), j));
  }
}

// Weights become codes; returns their unit g.
float QuantizeWeights(const KvTile& tile, size_t head_dim, size_t n, const float* weights,
                      int16_t* codes) {
  float scaled[kTilePositions];
  float largest = 0.0f;
  for (size_t j = 0; j < n; ++j) {
    scaled[j] = weights[j] * ScaleOf(tile, ValueScalesAt(head_dim), j);
    largest = scaled[j] > largest ? scaled[j] : largest;
  }
  if (largest < kTiny) {
    std::memset(codes, 0, n * sizeof(codes[0]));
    return 0.0f;
  }
  for (size_t j = 0; j < n; ++j) {
    codes[j] = static_cast<int16_t>(RintEven(scaled[j] * (kWeightRange / largest)));
  }
  return largest / kWeightRange;
}

void AddTile(const KvTile& tile, size_t head_dim, const TileRows& rows, float* scratch) {
  for (size_t row = 0; row < rows.count; ++row) {
    const size_t n = SeenBy(rows, row);
    float* const state = rows.states[row];
    ScoreTile(tile, head_dim, n, rows.q[row], scratch);
    Weigh(head_dim, n, scratch, state);
    int16_t codes[kTilePositions];
    const float unit = QuantizeWeights(tile, head_dim, n, scratch, codes);
    for (size_t d = 0; d < head_dim; ++d) {
      int32_t sum = 0;
      for (size_t j = 0; j < n; ++j) sum += codes[j] * *ValueCode(tile, head_dim, j, d);
      state[d] = std::fma(static_cast<float>(sum), unit, state[d]);
    }
  }
}

// Calls put(d, code) for each dimension and for those that pad; the scale goes to *scale.
template <class Put>
bool Store(const float* x, size_t head_dim, uint8_t* scale_at, const Put& put) {
  const float largest = LargestOf(x, head_dim);
  if (!(largest < kTooLarge)) return false;
  const bool is_tiny = largest < kTiny;
  const float scale = is_tiny ? 0.0f : largest / kCodeRange;
  for (size_t d = 0; d < Padded(head_dim); ++d) {
    const bool is_zero = is_tiny || d >= head_dim;
    put(d, is_zero ? int8_t{0} : static_cast<int8_t>(RintEven(x[d] * (kCodeRange / largest))));
  }
  std::memcpy(scale_at, &scale, sizeof(scale));
  return true;
}

bool StoreKey(const float* key, size_t head_dim, size_t slot, uint8_t* section) {
  auto* const codes = reinterpret_cast<int8_t*>(section);
  return Store(
      key, head_dim, section + KeyScalesAt(head_dim) + slot * sizeof(float),
      [&](size_t d, int8_t code) { codes[(d / 4 * kPagePositions + slot) * 4 + d % 4] = code; });
}

bool StoreValue(const float* value, size_t head_dim, size_t slot, uint8_t* section) {
  auto* const codes = reinterpret_cast<int8_t*>(section) + ValuesAt(head_dim);
  return Store(value, head_dim, section + ValueScalesAt(head_dim) + slot * sizeof(float),
               [&](size_t d, int8_t code) {
                 codes[(slot / 4 * Padded(head_dim) + d) * 4 + slot % 4] = code;
               });
}

}  // namespace q8

constexpr AttentionTable kTable = {
    {nullptr, f16::AddTile, f16::StoreKey, f16::StoreValue},
    {q8::PrepareQuery, q8::AddTile, q8::StoreKey, q8::StoreValue},
    Merge,
    Finish,
};

}  // namespace

const AttentionTable* ScalarAttentionTable() { return &kTable; }

}  // namespace potluck
