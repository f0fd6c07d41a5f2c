// Compiled with AVX-512 (x86-64-v4). 32 registers: 24 sums, two of B, one of A.
#define LPMFLOW_ISA avx512
#define LPMFLOW_VECTOR_BYTES 64
#define LPMFLOW_TILE_ROWS 12
#include "isa.inl"
