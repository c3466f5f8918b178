// K types on AVX-512 VNNI, many rows: tiles of 4 rows of activations and 32 rows of weights (4
// panels), whose codes and scales are unpacked once for a band of rows.
#include "engine/kernels/avx512vnni_k_types.h"

namespace potluck {
namespace avx512vnni {
namespace {

constexpr size_t kWeightRows = 32;  // of a tile
constexpr size_t kBandRows = 256;   // rows that share one unpacking; their outputs take 32 KiB

// Records unpacked at once: fewer calls, and outputs loaded and stored less often.
constexpr size_t kChunkRecords = 2;

// A record of 4 panels, unpacked.
struct Record {
  uint8_t codes[256 * kWeightRows];  // [64 groups of 4 k][4 panels][32]
  int32_t scales[16 * kWeightRows];  // [sub-block][32 rows]
  int32_t factors[8 * kWeightRows];  // pairs of int16, [w][32 rows]
  float d[kWeightRows];
  float dmin[kWeightRows];
};

// Records of 4 panels, and the outputs of a band of rows so far.
struct Chunk {
  Record records[kChunkRecords];
  float sums[kBandRows * kWeightRows];  // [band row][32]
};
static_assert(sizeof(Chunk) <= kScratchBytes, "fits into a thread's scratch");

template <size_t G, class Type>
inline void UnpackWord(Type type, const uint8_t* run, size_t apart, uint8_t* to) {
  _mm512_store_si512(to + 128 * G, Codes<G>(type, run, apart));
}

// A record of two of the 4 panels, sides `side` and `side` + 1.
template <class Type>
void Unpack(const uint8_t* record, size_t apart, size_t side, Record& chunk) {
  constexpr Type kType;
  SubScales sub;
  ReadSubScales(kType, record + Type::kFields, apart, sub);
  const uint8_t* run = record + Type::kRuns;
  uint8_t* to = chunk.codes + 32 * side;
  for (size_t i = 0; i < 8; ++i, run += Type::kRunBytes, to += 1024) {
    UnpackWord<0>(kType, run, apart, to);
    UnpackWord<1>(kType, run, apart, to);
    UnpackWord<2>(kType, run, apart, to);
    UnpackWord<3>(kType, run, apart, to);
    UnpackWord<4>(kType, run, apart, to);
    UnpackWord<5>(kType, run, apart, to);
    UnpackWord<6>(kType, run, apart, to);
    UnpackWord<7>(kType, run, apart, to);
    if (Type::kHasMin)
      _mm512_store_si512(chunk.factors + kWeightRows * i + 8 * side, FactorPairs<Type>(sub, i));
  }
  for (size_t s = 0; s < Type::kSubBlocks; ++s)
    _mm512_store_si512(chunk.scales + kWeightRows * s + 8 * side, ScaleWords(sub, s));
  _mm512_store_ps(chunk.d + 8 * side, LoadTwoScales(record, record + apart));
  const uint8_t* min = record + kScaleBytes;
  if (Type::kHasMin) _mm512_store_ps(chunk.dmin + 8 * side, LoadTwoScales(min, min + apart));
}

// What the sums of sub-blocks of 16 start with where there is a centre: minus the centre times the
// sum of the activations, [pairs][S rows][2]. A start costs a load, subtracting at the end
// products.
template <class Type, size_t S>
inline void ReadStarts([[maybe_unused]] const uint8_t* sums, int32_t* starts) {
  for (size_t i = 0; i < 8 * S; i += 8) {
#if defined(POTLUCK_MUTATION_SEED)
    _mm512_store_si512(starts + 2 * i, _mm512_setzero_si512());  // dropped, for tests to catch
#else
    const __m512i wide =
        _mm512_cvtepi16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(sums + 4 * i)));
    _mm512_store_si512(
        starts + 2 * i,
        _mm512_sub_epi32(_mm512_setzero_si512(), _mm512_slli_epi32(wide, Type::kCentreShift)));
#endif
  }
}

// c[S rows][32] += record b of 4 panels times a group of S rows.
template <class Type, size_t S>
inline void AddRecords(const Record& chunk, size_t b, const uint8_t* data, const RowGroup& group,
                       float* c) {
  const uint8_t* w = chunk.codes;
  const uint8_t* x = data + group.codes + b * 256 * S;
  const uint8_t* sums = data + group.sums + b * 32 * S;
  const float* da = reinterpret_cast<const float*>(data + group.scales) + b * S;
  __m512i total0[S], total1[S];
#pragma GCC unroll 4
  for (size_t t = 0; t < S; ++t) total0[t] = total1[t] = _mm512_setzero_si512();
  alignas(64) int32_t starts[16 * S];
  if (Type::kCentreShift != 0) ReadStarts<Type, S>(sums, starts);
  for (size_t s = 0; s < Type::kSubBlocks; ++s) {
    __m512i sum0[S], sum1[S];
    const int32_t* start = starts + 2 * S * (s / 2) + s % 2;
#pragma GCC unroll 4
    for (size_t t = 0; t < S; ++t)
      sum0[t] = sum1[t] = _mm512_set1_epi32(Type::kCentreShift != 0 ? start[2 * t] : 0);
#pragma GCC unroll 8
    for (int g = 0; g < Type::kWords; ++g) {
      const __m512i w0 = _mm512_load_si512(w), w1 = _mm512_load_si512(w + 64);
#pragma GCC unroll 4
      for (size_t t = 0; t < S; ++t) {
        const __m512i xt = Broadcast(x + 4 * t);
        sum0[t] = _mm512_dpbusd_epi32(sum0[t], w0, xt);
        sum1[t] = _mm512_dpbusd_epi32(sum1[t], w1, xt);
      }
      w += 128;
      x += 4 * S;
    }
    const __m512i scale0 = _mm512_load_si512(chunk.scales + kWeightRows * s);
    const __m512i scale1 = _mm512_load_si512(chunk.scales + kWeightRows * s + 16);
#pragma GCC unroll 4
    for (size_t t = 0; t < S; ++t) {
      total0[t] = _mm512_add_epi32(total0[t], _mm512_mullo_epi32(sum0[t], scale0));
      total1[t] = _mm512_add_epi32(total1[t], _mm512_mullo_epi32(sum1[t], scale1));
    }
  }
  __m512i taken0[S], taken1[S];
#pragma GCC unroll 4
  for (size_t t = 0; t < S; ++t) taken0[t] = taken1[t] = _mm512_setzero_si512();
#pragma GCC unroll 8
  for (size_t i = 0; Type::kHasMin && i < 8; ++i) {
    const __m512i factor0 = _mm512_load_si512(chunk.factors + kWeightRows * i);
    const __m512i factor1 = _mm512_load_si512(chunk.factors + kWeightRows * i + 16);
#pragma GCC unroll 4
    for (size_t t = 0; t < S; ++t) {
      const __m512i xt = Broadcast(sums + 4 * (S * i + t));
      taken0[t] = _mm512_dpwssd_epi32(taken0[t], factor0, xt);
      taken1[t] = _mm512_dpwssd_epi32(taken1[t], factor1, xt);
    }
  }
  const __m512 d0 = _mm512_load_ps(chunk.d), d1 = _mm512_load_ps(chunk.d + 16);
  const __m512 dmin0 = Type::kHasMin ? _mm512_load_ps(chunk.dmin) : d0;
  const __m512 dmin1 = Type::kHasMin ? _mm512_load_ps(chunk.dmin + 16) : d1;
#pragma GCC unroll 4
  for (size_t t = 0; t < S; ++t) {
    float* at = c + kWeightRows * t;
    _mm512_store_ps(at,
                    AddCentred<Type>(_mm512_load_ps(at), total0[t], taken0[t], d0, dmin0, da + t));
    _mm512_store_ps(at + 16, AddCentred<Type>(_mm512_load_ps(at + 16), total1[t], taken1[t], d1,
                                              dmin1, da + t));
  }
}

// The same for records [first, last).
template <class Type, size_t S>
__attribute__((noinline)) void AddTile(const Chunk& chunk, size_t first, size_t last,
                                       const uint8_t* data, const RowGroup& group, float* c) {
  for (size_t b = first; b < last; ++b)
    AddRecords<Type, S>(chunk.records[b - first], b, data, group, c);
}

// 4 panels times the groups [first_group, last_group), at most kBandRows rows.
template <class Type>
void MultiplyBand(const uint8_t* panels, const PreparedRows& x, size_t first_group,
                  size_t last_group, float* out, size_t out_stride, Chunk& chunk) {
  const size_t records = x.k / 256, panel_bytes = records * Type::kRecordBytes;
  constexpr size_t kGroupSums = kTileRows * kWeightRows;
  RowGroup groups[kBandRows / kTileRows];
  for (size_t index = first_group; index < last_group; ++index)
    groups[index - first_group] = GroupAt(x.grain, x.rows, x.k, index);
  __builtin_memset(chunk.sums, 0, (last_group - first_group) * kGroupSums * sizeof(float));
  for (size_t first = 0; first < records; first += kChunkRecords) {
    const size_t last = first + kChunkRecords < records ? first + kChunkRecords : records;
    for (size_t b = first; b < last; ++b) {
      const uint8_t* record = panels + b * Type::kRecordBytes;
      Unpack<Type>(record, panel_bytes, 0, chunk.records[b - first]);
      Unpack<Type>(record + 2 * panel_bytes, panel_bytes, 2, chunk.records[b - first]);
    }
    float* c = chunk.sums;
    for (size_t index = first_group; index < last_group; ++index, c += kGroupSums) {
      const RowGroup& group = groups[index - first_group];
      if (group.rows == kTileRows) {
        AddTile<Type, 4>(chunk, first, last, x.data, group, c);
      } else {
        AddTile<Type, 3>(chunk, first, last, x.data, group, c);
      }
    }
  }
  const float* c = chunk.sums;
  for (size_t index = first_group; index < last_group; ++index, c += kGroupSums) {
    const RowGroup& group = groups[index - first_group];
    for (size_t t = 0; t < group.rows; ++t) {
      float* to = out + (group.first + t) * out_stride;
      _mm512_storeu_ps(to, _mm512_load_ps(c + kWeightRows * t));
      _mm512_storeu_ps(to + 16, _mm512_load_ps(c + kWeightRows * t + 16));
    }
  }
}

template <class Type>
size_t MultiplyAll(const uint8_t* panels, size_t n_panels, const PreparedRows& x, float* out,
                   size_t out_stride, uint8_t* scratch) {
  constexpr size_t kBandGroups = kBandRows / kTileRows;
  Chunk& chunk = *reinterpret_cast<Chunk*>(scratch);
  const size_t panel_bytes = x.k / 256 * Type::kRecordBytes;
  const size_t groups = GroupCount(x.grain, x.rows);
  size_t p = 0;
  for (; p + 4 <= n_panels; p += 4) {
    for (size_t first = 0; first < groups; first += kBandGroups) {
      const size_t last = first + kBandGroups < groups ? first + kBandGroups : groups;
      MultiplyBand<Type>(panels + p * panel_bytes, x, first, last, out + 8 * p, out_stride, chunk);
    }
  }
  return p;
}

}  // namespace

size_t MultiplyKFours(WeightType type, const uint8_t* panels, size_t n_panels,
                      const PreparedRows& x, float* out, size_t out_stride, uint8_t* scratch) {
  switch (type) {
    case WeightType::kQ2_K:
      return MultiplyAll<Q2_K>(panels, n_panels, x, out, out_stride, scratch);
    case WeightType::kQ3_K:
      return MultiplyAll<Q3_K>(panels, n_panels, x, out, out_stride, scratch);
    case WeightType::kQ4_K:
      return MultiplyAll<Q4_K>(panels, n_panels, x, out, out_stride, scratch);
    case WeightType::kQ5_K:
      return MultiplyAll<Q5_K>(panels, n_panels, x, out, out_stride, scratch);
    default:
      return MultiplyAll<Q6_K>(panels, n_panels, x, out, out_stride, scratch);
  }
}

}  // namespace avx512vnni
}  // namespace potluck
