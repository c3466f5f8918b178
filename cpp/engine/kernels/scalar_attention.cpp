// Attention's canonical arithmetic: what every ISA's kernels must equal bit for bit.
#include <cmath>

#include "engine/canon.h"
#include "engine/kernels/attention_table.h"
#include "engine/types.h"

namespace potluck {
namespace {

constexpr size_t kLanes = 8;  // of the sum of weights
constexpr uint16_t kHalfExponent = 0x7c00;

void ScoreTile(const KvTile& tile, size_t head_dim, size_t n, const float* q, float* scores) {
  for (size_t j = 0; j < n; ++j) {
    const uint16_t* key = tile.sections[j / kPagePositions] + j % kPagePositions;
    float score = 0.0f;
    for (size_t d = 0; d < head_dim; ++d) {
      score = std::fma(q[d], HalfToFloat(key[d * kPagePositions]), score);
    }
    scores[j] = score;
  }
}

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

void AddTile(const KvTile& tile, size_t head_dim, const TileRows& rows, float* scratch) {
  for (size_t row = 0; row < rows.count; ++row) {
    const size_t seen = rows.n + row / rows.n_heads;
    const size_t n = seen < kTilePositions ? seen : kTilePositions;
    float* const state = rows.states[row];
    ScoreTile(tile, head_dim, n, rows.q[row], scratch);
    Weigh(head_dim, n, scratch, state);
    for (size_t j = 0; j < n; ++j) {
      const uint16_t* const section = tile.sections[j / kPagePositions];
      const uint16_t* const value = section + (kPagePositions + j % kPagePositions) * head_dim;
      for (size_t d = 0; d < head_dim; ++d) {
        state[d] = std::fma(scratch[j], HalfToFloat(value[d]), state[d]);
      }
    }
  }
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

bool StoreKey(const float* key, size_t head_dim, size_t slot, uint16_t* section) {
  bool finite = true;
  for (size_t d = 0; d < head_dim; ++d) {
    const uint16_t half = FloatToHalf(key[d]);
    finite &= (half & kHalfExponent) != kHalfExponent;
    section[d * kPagePositions + slot] = half;
  }
  return finite;
}

bool StoreValue(const float* value, size_t head_dim, size_t slot, uint16_t* section) {
  bool finite = true;
  uint16_t* const out = section + (kPagePositions + slot) * head_dim;
  for (size_t d = 0; d < head_dim; ++d) {
    out[d] = FloatToHalf(value[d]);
    finite &= (out[d] & kHalfExponent) != kHalfExponent;
  }
  return finite;
}

constexpr AttentionTable kTable = {AddTile, Merge, Finish, StoreKey, StoreValue};

}  // namespace

const AttentionTable* ScalarAttentionTable() { return &kTable; }

}  // namespace potluck
