// For loops that keep many sums in registers.
#pragma once

// Keeps loads from moving across. gcc hoists all broadcasts or words of a block to its start
// otherwise, or loads all that passes by first, and spills the sums (21 instead of 33 MAC/cycle in
// AVX2's tiles; measured on Zen 3 with gcc 12 and clang 19).
#define POTLUCK_ORDER_LOADS() asm volatile("" ::: "memory")
