// Shared by the ISA files only.
#pragma once

#define TKT_INLINE static inline __attribute__((always_inline))
#define TKT_NOINLINE static __attribute__((noinline))
// Tile loops must unroll completely, or the accumulators live in memory instead of registers.
#define TKT_UNROLL _Pragma("GCC unroll 16")
