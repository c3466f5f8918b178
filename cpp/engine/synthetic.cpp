#include "engine/synthetic.h"

#include <cmath>
#include <cstring>

#include "engine/config.h"
#include "engine/errors.h"

namespace potluck {
namespace {

constexpr uint64_t kGamma = 0x9e3779b97f4a7c15;
constexpr size_t kScales = 1024;
constexpr size_t kValues = 4096;
// Mean of the squares of (512 + i) / 1024 over all i, but for 1/2048 of it.
constexpr double kScaleVariance = 13.0 / 12.0;

uint64_t Mix(uint64_t z) {
  z = (z ^ z >> 30) * 0xbf58476d1ce4e5b9;
  z = (z ^ z >> 27) * 0x94d049bb133111eb;
  return z ^ z >> 31;
}

uint64_t Fnv1a(const std::string& text) {
  uint64_t hash = 0xcbf29ce484222325;
  for (const char letter : text) {
    hash = (hash ^ static_cast<unsigned char>(letter)) * 0x100000001b3;
  }
  return hash;
}

// Codes of a type as values: the middle of those that have a minimum, and the mean of the squares
// about it (of code * scale in K types).
struct Codes {
  WeightType type;
  float middle;
  double variance;
};
constexpr Codes kCodes[] = {
    {WeightType::kQ4_0, 0, 21.5},
    {WeightType::kQ4_1, -7.5F, 21.25},
    {WeightType::kQ5_0, 0, 85.5},
    {WeightType::kQ5_1, -15.5F, 85.25},
    {WeightType::kQ8_0, 0, 5461.5},
    {WeightType::kQ2_K, 1.5F, 77.5 * 1.25},
    {WeightType::kQ3_K, 0, 341.5 * 5.5},
    {WeightType::kQ4_K, 7.5F, 1333.5 * 21.25},
    {WeightType::kQ5_K, 15.5F, 1333.5 * 85.25},
    {WeightType::kQ6_K, 0, 5461.5 * 341.5},
};

const Codes* CodesOf(WeightType type) {
  for (const Codes& codes : kCodes) {
    if (codes.type == type) return &codes;
  }
  return nullptr;
}

// A matrix that takes vectors of values of order 1 to such of order `gain`; what is added to the
// hidden state is divided over the layers.
struct Gain {
  const char* name;
  double gain;
  bool is_added;
};
constexpr Gain kGains[] = {
    {".attn_q.", 1.5, false}, {".attn_k.", 1.5, false},    {".attn_output.", 1, true},
    {".ffn_down.", 1, true},  {"output.weight", 3, false},
};

bool Holds(const std::string& name, const char* part) {
  return name.find(part) != std::string::npos;
}

uint16_t HalfAt(const uint8_t* bytes) {
  uint16_t half = 0;
  std::memcpy(&half, bytes, sizeof half);
  return half;
}

uint32_t WordAt(const uint8_t* bytes) {
  uint32_t word = 0;
  std::memcpy(&word, bytes, sizeof word);
  return word;
}

template <class T>
void Put(uint8_t* bytes, T value) {
  std::memcpy(bytes, &value, sizeof value);
}

uint16_t FloatToBFloat(float value) {
  const uint32_t bits = WordAt(reinterpret_cast<const uint8_t*>(&value));
  return static_cast<uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

// Even spread about 0.
float Centred(size_t k) { return static_cast<float>(2 * k) - static_cast<float>(kValues - 1); }

float NormOf(size_t k) { return 1.0F + Centred(k) / 32768.0F; }

// Minimums beside the scales of 6 bits of Q4_K and Q5_K, in 12 bytes: near them.
void FinishSixBits(uint8_t* bytes) {
  const uint32_t first = WordAt(bytes), last = WordAt(bytes + 8);
  Put(bytes + 4, first ^ (WordAt(bytes + 4) & 0x03030303));
  Put(bytes + 8, (last & 0x0f0f0f0f) * 17 ^ (last & 0x10101010));
}

void FinishFourBits(uint8_t* bytes) {
  for (size_t i = 0; i < 16; ++i) {
    const unsigned scale = bytes[i] & 15u;
    bytes[i] = static_cast<uint8_t>(scale * 17 ^ (bytes[i] & 16u));
  }
}

}  // namespace

void Check(const Synthetic& model) {
  if (model.n_layers == 0) throw ModelError("a synthetic model of no layers");
  if (model.n_layers > kMostLayers)
    throw ModelError("a synthetic model of " + std::to_string(model.n_layers) +
                     " layers; the most are " + std::to_string(kMostLayers));
}

double Deviation(const Synthetic& model, const std::string& name, size_t cols) {
  if (name == "token_embd.weight") return 0.5;
  Gain found = {"", 1, false};
  for (const Gain& gain : kGains) {
    if (Holds(name, gain.name)) {
      found = gain;
      break;
    }
  }
  const size_t parts = found.is_added ? 2 * model.n_layers : 1;
  return found.gain / std::sqrt(static_cast<double>(cols * parts));
}

SyntheticTensor::SyntheticTensor(const Synthetic& model, const std::string& name, WeightType type,
                                 size_t cols)
    : type_(type),
      row_bytes_(RowBytes(type, cols)),
      block_bytes_(InfoOf(type).block_bytes),
      scale_offset_(ScaleOffset(type)),
      key_(Mix(Fnv1a(name) ^ Mix(model.seed))),
      is_norm_(Holds(name, "norm")) {
  Check(model);
  if (is_norm_) {
    if (type != WeightType::kF32) throw ModelError(name + ": synthetic norms are f32");
    return;
  }
  const double deviation = Deviation(model, name, cols);
  if (const Codes* codes = CodesOf(type)) {
    const double usual = deviation / std::sqrt(codes->variance * kScaleVariance);
    const auto unit = static_cast<float>(usual / kScales);
    for (size_t i = 0; i < kScales; ++i) {
      scales_.push_back(FloatToHalf(unit * (512.0F + static_cast<float>(i))));
    }
    middle_ = codes->middle;
    return;
  }
  const auto unit = static_cast<float>(deviation * std::sqrt(3.0) / kValues);
  for (size_t k = 0; k < kValues; ++k) {
    values_.push_back(unit * Centred(k));
    halves_.push_back(type == WeightType::kF16 ? FloatToHalf(values_[k])
                                               : FloatToBFloat(values_[k]));
  }
}

void SyntheticTensor::Row(size_t row, uint8_t* out) const {
  uint64_t counter = Mix(key_ + (row + 1) * kGamma);
  size_t at = 0;
  for (; at + sizeof counter <= row_bytes_; at += sizeof counter)
    Put(out + at, Mix(counter += kGamma));
  const uint64_t last = Mix(counter + kGamma);
  std::memcpy(out + at, &last, row_bytes_ - at);
  FinishRow(out);
}

void SyntheticTensor::FinishRow(uint8_t* row) const {
  uint8_t* const end = row + row_bytes_;
  switch (type_) {
    case WeightType::kF32:
      for (; row < end; row += 4) {
        const uint32_t k = WordAt(row) % kValues;
        Put(row, is_norm_ ? NormOf(k) : values_[k]);
      }
      return;
    case WeightType::kF16:
    case WeightType::kBF16:
      for (; row < end; row += 2) Put(row, halves_[HalfAt(row) % kValues]);
      return;
    case WeightType::kQ2_K:
      for (uint8_t* block = row; block < end; block += block_bytes_) FinishFourBits(block);
      break;
    case WeightType::kQ4_K:
    case WeightType::kQ5_K:
      for (uint8_t* block = row; block < end; block += block_bytes_) FinishSixBits(block + 4);
      break;
    default:
      break;
  }
  for (; row < end; row += block_bytes_) FinishScales(row + scale_offset_);
}

// d of a block and, behind it, what belongs to its minimum.
void SyntheticTensor::FinishScales(uint8_t* place) const {
  const uint16_t bits = HalfAt(place);
  const uint16_t scale = scales_[bits % kScales];
  if (middle_ == 0) {
    Put(place, static_cast<uint16_t>(scale | (bits & 0x8000u)));
    return;
  }
  Put(place, scale);
  const auto jitter = static_cast<float>(2 * (HalfAt(place + 2) & 15)) - 15.0F;
  Put(place + 2, FloatToHalf(HalfToFloat(scale) * (middle_ + jitter / 32.0F)));
}

}  // namespace potluck
