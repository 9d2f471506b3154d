// The compiler seams of the core, and nothing else: this is the only file that asks whether nvcc is compiling.
//
// Invariant: everything in csrc/core is plain C++17 on scalars and small arrays, without torch, allocation or
// libm calls in float32. A host object is compiled once per instruction set with TSAM_ISA naming an inline
// namespace, so that two objects never share a weak symbol (the linker would keep either one's instructions).
// Types without code (enums, plain structs) stand outside it and are the same everywhere.
#pragma once

#include <cstdint>

#ifndef TSAM_ISA
#define TSAM_ISA portable
#endif

#if defined(__CUDACC__)
#define TSAM_HD __host__ __device__ __forceinline__
#else
#define TSAM_HD inline __attribute__((always_inline))
#endif

// Of nvcc's two passes the host's compiler sees one, and knows no such pragma.
#if defined(__CUDA_ARCH__)
#define TSAM_UNROLL _Pragma("unroll")
#define TSAM_ROLLED _Pragma("unroll 1")
#else
#define TSAM_UNROLL
#define TSAM_ROLLED
#endif

#define TSAM_CORE_BEGIN \
  namespace tsam {      \
  inline namespace TSAM_ISA {
#define TSAM_CORE_END \
  }                   \
  }
