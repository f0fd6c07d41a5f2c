// Compiled with the compiler's default instruction set: SSE2 on x86-64, NEON on 64-bit ARM.
#define LPMFLOW_ISA baseline
#define LPMFLOW_VECTOR_BYTES 16
#define LPMFLOW_TILE_ROWS 6
#include "isa.inl"
