// Canonical arithmetic beyond matrix products: functions whose bits are the same on every CPU.
//
// No libm but fma (whose rounding IEEE fixes), no SIMD, no contraction. Kernels of every ISA repeat
// these operations in this order; scalar kernels call them. Any thread may call; nothing has state.
// Included by kernel files: no STL and no inline code.
#pragma once

namespace potluck {

// The exponential of f32. n = nearest integer to x * log2(e), by adding and taking away 1.5 * 2^23;
// r = x - n * ln 2 in two fma steps; a polynomial of degree 6 in r by Horner's rule with fma; times
// 2^n by adding n to the exponent's bits. Below -87: 0. Above kExpLargest: infinity. NaN: the NaN
// with bits 0x7fc00000. Error at most 1 ulp (canon_test.cpp measures it).
float Exp(float x);

// Constants of Exp, for the kernels that repeat it in vectors.
constexpr float kExpLog2E = 0x1.715476p+0f;
constexpr float kExpRound = 0x1.8p+23f;
constexpr float kExpLn2High = 0x1.62e4p-1f;    // 15 bits: n * kExpLn2High is exact
constexpr float kExpLn2Low = 0x1.7f7d1cp-20f;  // ln 2 - kExpLn2High
constexpr float kExpSmallest = -87.0f;
constexpr float kExpLargest = 0x1.62e42ep+6f;  // 88.72283; e to the next f32 is beyond f32
// exp(r) = 1 + r * (1 + r * (c2 + r * (c3 + r * (c4 + r * (c5 + r * c6))))) on |r| <= ln(2) / 2.
// Minimax for the relative error: 2^-28 before rounding.
constexpr float kExpC2 = 0x1.fffffcp-2f;
constexpr float kExpC3 = 0x1.555492p-3f;
constexpr float kExpC4 = 0x1.5558f2p-5f;
constexpr float kExpC5 = 0x1.123a2p-7f;
constexpr float kExpC6 = 0x1.6a23dp-10f;

// f64 functions by own series, for tables and log-probabilities. Relative error below 4e-16 times
// the size of the result's logarithm (Pow), else below 1e-15; Sine and Cosine: absolute.
double ExpDouble(double x);                                 // |x| <= 700
double LogDouble(double x);                                 // finite, normal and above 0
double PowDouble(double x, double y);                       // x as for LogDouble
void SinCosDouble(double x, double* sine, double* cosine);  // |x| <= 2^25

}  // namespace potluck
