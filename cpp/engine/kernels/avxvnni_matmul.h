// What matrix kernels with dpbusd on vectors of 8 rows share: the AVX-VNNI table's, and those of
// the AVX-512 VNNI table for one row, where the same instructions have another encoding.
//
// It adds four products of unsigned and signed bytes to an int32, so there is no depth to watch;
// codes come out of a panel as on AVX2. Every function here has internal linkage: see
// matmul_table.h.
#pragma once

#include "engine/kernels/avx2_codes.h"

namespace potluck {
namespace avxvnni {

// One translation unit each: MatMulTable's multiply for blocks of 32, and for K types.
void MultiplyBlock32(WeightType type, const uint8_t* panels, size_t n_panels, const PreparedRows& x,
                     float* out, size_t out_stride, uint8_t* scratch);
void MultiplyK(WeightType type, const uint8_t* panels, size_t n_panels, const PreparedRows& x,
               float* out, size_t out_stride, uint8_t* scratch);

namespace {

// Ahead in a panel that is read in one pass: of blocks of 32 values, and of 256 (Zen 5: 12 KiB feed
// Q6_K 3 % faster than 8, Q4_0 5 % slower).
constexpr size_t kNarrowPrefetchBytes = 8192;
constexpr size_t kFarPrefetchBytes = 12288;

using avx2::Broadcast;
using avx2::Load;
using avx2::LoadHalves;
using avx2::Store;

#if defined(__AVX512VNNI__) && defined(__AVX512VL__)
inline __m256i AddDot(__m256i sum, __m256i w, __m256i x) { return _mm256_dpbusd_epi32(sum, w, x); }
inline __m256i AddPairs(__m256i sum, __m256i a, __m256i b) {
  return _mm256_dpwssd_epi32(sum, a, b);
}
#else
inline __m256i AddDot(__m256i sum, __m256i w, __m256i x) {
  return _mm256_dpbusd_avx_epi32(sum, w, x);
}
// Adds two products of int16.
inline __m256i AddPairs(__m256i sum, __m256i a, __m256i b) {
  return _mm256_dpwssd_avx_epi32(sum, a, b);
}
#endif

// Adds codes of 4 values of 8 rows times R rows of activations.
template <size_t R>
inline void AddWord(__m256i (&sum)[R], __m256i w, const uint8_t* x) {
#pragma GCC unroll 8
  for (size_t t = 0; t < R; ++t) sum[t] = AddDot(sum[t], w, Broadcast(x + 4 * t));
}

// Codes of 2 panels times S rows; a and b are the sums of the first and the second panel. Named
// sums, for gcc spills an array of them.
#define POTLUCK_ADD_TILE_WORD(S, w, x)               \
  do {                                               \
    const __m256i w0 = Load(w), w1 = Load((w) + 32); \
    __m256i xt = Broadcast(x);                       \
    a0 = AddDot(a0, w0, xt);                         \
    b0 = AddDot(b0, w1, xt);                         \
    xt = Broadcast((x) + 4);                         \
    a1 = AddDot(a1, w0, xt);                         \
    b1 = AddDot(b1, w1, xt);                         \
    xt = Broadcast((x) + 8);                         \
    a2 = AddDot(a2, w0, xt);                         \
    b2 = AddDot(b2, w1, xt);                         \
    if ((S) == 4) {                                  \
      xt = Broadcast((x) + 12);                      \
      a3 = AddDot(a3, w0, xt);                       \
      b3 = AddDot(b3, w1, xt);                       \
    }                                                \
    POTLUCK_ORDER_LOADS();                           \
  } while (false)

}  // namespace
}  // namespace avxvnni
}  // namespace potluck
