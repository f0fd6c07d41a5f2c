// Compiled with AVX2 and FMA (x86-64-v3). 16 registers: 12 sums, two of B, one of A.
#define LPMFLOW_ISA avx2
#define LPMFLOW_VECTOR_BYTES 32
#define LPMFLOW_TILE_ROWS 6
#include "isa.inl"
