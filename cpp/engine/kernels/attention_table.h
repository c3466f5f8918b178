// Kernels of attention over f16 keys and values, one tile of 64 positions at a time.
//
// Included by kernel files: no STL and no inline code. A query row here is one head of one row of
// the batch, rotated and multiplied by 1 / sqrt(head_dim); rows given together share the KV head,
// so that keys and values are read once for all.
#pragma once

#include <cstddef>
#include <cstdint>

namespace potluck {

constexpr size_t kTilePositions = 64;
constexpr size_t kTileGroups = 8;  // of 8 positions
constexpr size_t kTilePages = 4;   // of 16 positions

// One KV head's keys and values of 64 positions; pointers beyond the positions in use are not
// followed.
struct KvTile {
  const uint16_t* keys[kTileGroups];   // f16 [head_dim][8 positions] each
  const uint16_t* values[kTilePages];  // f16 [16 positions][head_dim] each
};

// What a row has seen so far is its state, f32: [head_dim] weighted sums o, then the largest score
// m, then the sum of weights l. Before the first tile: zeros and m = -infinity.
struct AttentionTable {
  // Adds positions [0, n) of a tile, 1 <= n <= 64, to the states of n_rows query rows, any number.
  // For each row:
  //   s[j] = chain over d of fma(q[d], key[j][d], .) from 0
  //   largest = maximum of s[0..n); if it is above m: f = exp(m - largest), l = l * f, o[d] = o[d]
  //   * f, m = largest p[j] = exp(s[j] - m); l = l + sum of p: 8 lanes, lane i chains the additions
  //   of j = i mod 8 in rising order from 0, then the tree 8 > 4 > 2 > 1 (lane i with lane i + 4,
  //   and so on) o[d] = fma(p[j], value[j][d], o[d]) by rising j
  // Scores must be finite, so must keys and values of positions below n; others may hold anything.
  void (*add_tile)(const KvTile& tile, size_t head_dim, size_t n, const float* const* q,
                   float* const* states, size_t n_rows);

  // Merges the state of a later split into that of the earlier ones: m = larger m, a = exp(m of
  // into - m), b = exp(m of from - m), l = fma(l of from, b, l * a), o[d] = fma(o of from, b, o *
  // a).
  void (*merge)(const float* from, size_t head_dim, float* into);

  // out[d] = o[d] / l.
  void (*finish)(const float* state, size_t head_dim, float* out);

  // Rounds one position's key to f16, to nearest even, into lane `lane` of its group [head_dim][8];
  // the same for a value row [head_dim]. False: a result is not finite.
  bool (*store_key)(const float* key, size_t head_dim, size_t lane, uint16_t* group);
  bool (*store_value)(const float* value, size_t head_dim, uint16_t* out);
};

const AttentionTable* ScalarAttentionTable();
const AttentionTable* Avx2AttentionTable();

}  // namespace potluck
