// Kernels of attention over paged f16 keys and values, one tile of 64 positions at a time.
//
// Included by kernel files: no STL and no inline code. A query row here is one head of one row of
// the batch, rotated and multiplied by 1 / sqrt(head_dim); rows given together share the KV head,
// so that keys and values are read, and for many rows widened to f32, once for all.
#pragma once

#include <cstddef>
#include <cstdint>

namespace potluck {

constexpr size_t kPagePositions = 16;
constexpr size_t kTilePositions = 64;
constexpr size_t kTilePages = 4;
// Rows that one call takes at most: while they use a tile it stays in the first cache, and 96 are
// sixteen times the six that the registers hold.
constexpr size_t kMostTileRows = 192;
// Room for kernels to work in, f32: a tile widened takes so many a dimension, head_dim rounded up
// to 16; scores take the rest.
constexpr size_t kTileScratchPerDim = kTilePositions;
constexpr size_t kTileScores = kMostTileRows * kTilePositions;

// One KV head's keys and values of 64 positions: a section of each page, which holds f16 keys
// [head_dim][16 positions], then f16 values [16 positions][head_dim]. Every section can be read,
// but positions that no row sees may hold anything.
struct KvTile {
  const uint16_t* sections[kTilePages];
  const uint16_t* ahead[kTilePages];  // what is wanted next, to be fetched into the cache
};

// Query rows that see positions [0, n) of a tile. The rows of one position stand together and each
// position sees one more than the last: row i sees min(64, n + i / n_heads).
struct TileRows {
  const float* const* q;  // [count] rows of [head_dim]
  float* const* states;   // [count] states, see below
  size_t count;           // at most kMostTileRows
  size_t n_heads;         // rows of one position
  size_t n;               // at least 1
};

// What a row has seen so far is its state, f32: [head_dim] weighted sums o, then the largest score
// m, then the sum of weights l. Before the first tile: zeros and m = -infinity.
struct AttentionTable {
  // Adds a tile to the states. For each row, n being what it sees:
  //   s[j] = chain over d of fma(q[d], key[j][d], .) from 0
  //   largest = maximum of s[0..n)
  //   if it is above m: f = exp(m - largest), l = l * f, o[d] = o[d] * f, m = largest
  //   p[j] = exp(s[j] - m)
  //   l = l + sum of p: 8 lanes, lane i chains the additions of j = i mod 8 in rising order from 0,
  //   then the tree 8 > 4 > 2 > 1 (lane i with lane i + 4, and so on)
  //   o[d] = fma(p[j], value[j][d], o[d]) by rising j
  // Scores must be finite, so must keys and values that a row sees. scratch: 64-byte
  // aligned.
  void (*add_tile)(const KvTile& tile, size_t head_dim, const TileRows& rows, float* scratch);

  // Merges the state of a later split into that of the earlier ones: m = larger m, a = exp(m of
  // into - m), b = exp(m of from - m), l = fma(l of from, b, l * a),
  // o[d] = fma(o of from, b, o * a).
  void (*merge)(const float* from, size_t head_dim, float* into);

  // out[d] = o[d] / l.
  void (*finish)(const float* state, size_t head_dim, float* out);

  // Rounds the key or value [head_dim] of position `slot` of a page to f16, to nearest even, into
  // its section. False: a result is not finite.
  bool (*store_key)(const float* key, size_t head_dim, size_t slot, uint16_t* section);
  bool (*store_value)(const float* value, size_t head_dim, size_t slot, uint16_t* section);
};

const AttentionTable* ScalarAttentionTable();
const AttentionTable* Avx2AttentionTable();
const AttentionTable* Avx512VnniAttentionTable();
const AttentionTable* NeonAttentionTable();

}  // namespace potluck
