// What packing shares between types: runs of 32 values of a panel. See pack.h for the layout.
#pragma once

#include <cstddef>
#include <cstdint>

#include "engine/pack.h"

namespace potluck {

uint16_t HalfAt(const uint8_t* bytes);
bool IsFiniteHalf(const uint8_t* bytes);

// Which vectors a run of a type has, in this order; each holds bits of the code from its shift up.
struct RunShape {
  bool has_nibbles;  // bits 0 to 3
  bool has_twos;     // 2 bits from twos_shift up
  bool has_plane;    // 1 bit, plane_shift
  size_t twos_shift;
  size_t plane_shift;
  size_t Bytes() const {
    return (has_nibbles ? 128u : 0) + (has_twos ? 64u : 0) + (has_plane ? 32u : 0);
  }
};
RunShape RunOf(WeightType type);  // all but Q8_0 and the floats

// 32 unsigned codes of row r, into and out of a run.
void WriteRun(const RunShape& shape, const uint8_t codes[32], size_t r, uint8_t* run);
void ReadRun(const RunShape& shape, const uint8_t* run, size_t r, uint8_t codes[32]);

// A row of the file into row r of a panel of zeros or of other rows; false: a scale is not finite.
bool PackBlock32(WeightType type, const uint8_t* row, size_t r, size_t k, uint8_t* panel);
bool PackBlock256(WeightType type, const uint8_t* row, size_t r, size_t k, uint8_t* panel);
void ReadBlock32(WeightType type, const uint8_t* panel, size_t k, size_t block, PanelBlock& out);
void ReadBlock256(WeightType type, const uint8_t* panel, size_t block, PanelBlock& out);

}  // namespace potluck
