// The kernels of one instruction set. The scalar ones define the answer; every other table equals
// them bit for bit.
//
// Included by kernel files, so it holds no STL and no inline code: a copy compiled with an ISA's
// flags could become the one that the linker keeps for all CPUs.
#pragma once

namespace potluck {

struct MatMulTable;     // kernels/matmul_table.h
struct VectorTable;     // kernels/vector_table.h
struct AttentionTable;  // kernels/attention_table.h

// Chosen once, when the engine starts (isa.h), and passed down; kernels know no model and never
// throw or allocate.
struct KernelTable {
  const char* name;  // "scalar", "avx2"
  const MatMulTable* matmul;
  const VectorTable* vector;
  const AttentionTable* attention;
};

}  // namespace potluck
