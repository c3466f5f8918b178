// Weights that no file holds: made from a seed, the same bytes on every machine, any part alone.
//
// The definition, version 1. All numbers are little-endian, all integers wrap.
//   Mix       SplitMix64's mixing (Steele, Lea, Flood, OOPSLA 2014); g = 0x9e3779b97f4a7c15
//   tensor    t = Mix(FNV-1a-64 of its GGUF name ^ Mix(seed))
//   row       r = Mix(t + (row + 1) * g), the row being that of a file
//   bytes     word j of 8 bytes is Mix(r + (j + 1) * g); as many as a row of the type has
// So codes, and scales of sub-blocks, are any bits. What may not be is made of the bits in its
// place, i being bits 0 to 9 and s bit 15 of a block's d:
//   d         f16(unit * (512 + i)), negative if s and codes are not symmetric (Q4_0, Q5_0, Q8_0,
//             Q3_K, Q6_K): else all weights would have a mean
//   m, dmin   f16(d * (c + (2 * bits 0 to 3 - 15) / 32)), c being -7.5 (Q4_1), -15.5 (Q5_1), 1.5
//             (Q2_K), 7.5 (Q4_K) or 15.5 (Q5_K): the middle of the codes becomes about 0
//   mins      of sub-blocks: the scale's bits, the lowest bit (Q2_K, bytes of Q4_K's and Q5_K's
//             last four sub-blocks) or two (of the first four) xor those in their place
//   floats    unit * (2k - 4095), k being bits 0 to 11; in f32, then rounded to the type
//   norms     1 + (2k - 4095) / 32768, f32
// unit gives weights the deviation that is wanted (Deviation): 0.5 for the embedding, gain /
// sqrt(cols) for a matrix. Then activations are of order 1 in every layer, queries meet keys with
// scores that spread over some units, and logits over ten and more.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>
#include <vector>

#include "engine/types.h"

namespace potluck {

// Raised whenever the same seed gives other bytes.
constexpr uint32_t kSyntheticVersion = 1;

// Which model of random weights.
struct Synthetic {
  uint64_t seed = 0;
  size_t n_layers = 1;  // of the whole model: each layer adds the less to a hidden state
};

// ModelError: no layers, or more than any model has.
void Check(const Synthetic& model);

// What the weights of a matrix shall deviate from 0.
double Deviation(const Synthetic& model, const std::string& name, size_t cols);

// One tensor of it. Immutable: any thread may make any row at any time.
class SyntheticTensor {
 public:
  // `cols` is a multiple of the type's block. ModelError: a norm that is not f32, or Check.
  SyntheticTensor(const Synthetic& model, const std::string& name, WeightType type, size_t cols);

  // The bytes of row `row` in the layout of a file: RowBytes(type, cols).
  void Row(size_t row, uint8_t* out) const;

 private:
  void FinishRow(uint8_t* row) const;
  void FinishScales(uint8_t* place) const;

  WeightType type_;
  size_t row_bytes_;
  size_t block_bytes_;
  size_t scale_offset_;
  uint64_t key_;
  bool is_norm_;
  float middle_ = 0;              // of a type with minimums, negative if they are added
  std::vector<uint16_t> scales_;  // [1024] f16, of blocks
  std::vector<float> values_;     // [4096], of floats
  std::vector<uint16_t> halves_;  // [4096] of these as f16 or bf16
};

}  // namespace potluck
