// Kernels of attention over paged keys and values, one tile of 64 positions at a time.
//
// Included by kernel files: no STL and no inline code. A query row here is one head of one row of
// the batch, rotated and multiplied by 1 / sqrt(head_dim); rows given together share the KV head,
// so that keys and values are read, and for many rows widened, once for all.
#pragma once

#include <cstddef>
#include <cstdint>

namespace potluck {

constexpr size_t kPagePositions = 16;
constexpr size_t kTilePositions = 64;
constexpr size_t kTilePages = 4;
// Rows that one call takes at most: a multiple of the six that registers hold, so many that
// widening a tile costs each of them little.
constexpr size_t kMostTileRows = 192;
// Room for kernels to work in, f32: a tile widened takes so many a dimension, head_dim rounded up
// to 16; scores take the rest.
constexpr size_t kTileScratchPerDim = kTilePositions;
constexpr size_t kTileScores = kMostTileRows * kTilePositions;

// One KV head's keys and values of 64 positions: a section of each page. Every section can be read,
// but positions that no row sees may hold anything.
struct KvTile {
  const uint8_t* sections[kTilePages];
  const uint8_t* ahead[kTilePages];  // what is wanted next, to be fetched into the cache
};

// Query rows that see positions [0, n) of a tile. The rows of one position stand together and each
// position sees one more than the last: row i sees min(64, n + i / n_heads).
struct TileRows {
  const void* const* q;  // [count] as prepare_query leaves them
  float* const* states;  // [count] states, see AttentionTable
  size_t count;          // at most kMostTileRows
  size_t n_heads;        // rows of one position
  size_t n;              // at least 1
};

// Keys and values of one type, and where they lie in the section of a page and KV head.
//
// Adding a tile to the states, for each row, n being what it sees:
//   s[j] = scores, see below
//   largest = maximum of s[0..n)
//   if it is above m: f = exp(m - largest), l = l * f, o[d] = o[d] * f, m = largest
//   p[j] = exp(s[j] - m)
//   l = l + sum of p: 8 lanes, lane i chains the additions of j = i mod 8 in rising order from 0,
//   then the tree 8 > 4 > 2 > 1 (lane i with lane i + 4, and so on)
//   o[d] takes p times the values, see below
//
// f16: keys [head_dim][16 positions], then values [16 positions][head_dim].
//   s[j] = chain over d of fma(q[d], key[j][d], .) from 0
//   o[d] = fma(p[j], value[j][d], o[d]) by rising j
//
// q8: codes in -127..127, head_dim rounded up to 4 with codes 0: keys [head_dim / 4][16 positions]
// [4], values [4][head_dim][4 positions]; then f32 scales [16] of the keys and [16] of the values.
// Integers are exact, so their order is free.
//   q: largest |q[d]| below 2^-100: dq = 0, codes 0; else dq = largest / R, code = rint(q[d] *
//   (R / largest)), with R the most that keeps a sum of products in an int32, at most 32767
//   s[j] = f32(integer dot of the codes) * (dq * dk[j])
//   w[j] = p[j] * dv[j], largest w below 2^-100: g = 0, codes 0; else g = largest / 32767,
//   code[j] = rint(w[j] * (32767 / largest))
//   o[d] = fma(f32(integer sum of code[j] * value[j][d]), g, o[d])
struct KvKernels {
  // Leaves a row [head_dim] in the form that add_tile takes: out has query_bytes(head_dim), 64-byte
  // aligned. Null: rows are taken as they are.
  void (*prepare_query)(const float* q, size_t head_dim, void* out);

  // Scores must be finite, so must keys and values that a row sees. scratch: 64-byte aligned.
  void (*add_tile)(const KvTile& tile, size_t head_dim, const TileRows& rows, float* scratch);

  // Puts the key or value [head_dim] of position `slot` of a page into its section. f16: rounded to
  // nearest even. q8: as q above, with R = 127. False: not finite, or from 65520 (f16), 65536 (q8)
  // on.
  bool (*store_key)(const float* key, size_t head_dim, size_t slot, uint8_t* section);
  bool (*store_value)(const float* value, size_t head_dim, size_t slot, uint8_t* section);
};

// What a row has seen so far is its state, f32: [head_dim] weighted sums o, then the largest score
// m, then the sum of weights l. Before the first tile: zeros and m = -infinity.
struct AttentionTable {
  KvKernels f16;
  KvKernels q8;

  // Merges the state of a later split into that of the earlier ones: m = larger m, a = exp(m of
  // into - m), b = exp(m of from - m), l = fma(l of from, b, l * a),
  // o[d] = fma(o of from, b, o * a).
  void (*merge)(const float* from, size_t head_dim, float* into);

  // out[d] = o[d] / l.
  void (*finish)(const float* state, size_t head_dim, float* out);
};

const AttentionTable* ScalarAttentionTable();
const AttentionTable* Avx2AttentionTable();
const AttentionTable* Avx512VnniAttentionTable();
const AttentionTable* NeonAttentionTable();

}  // namespace potluck
