// Vectors of 64-bit lanes for Philox's rounds (core/philox.h): the compiler finds no vector form of a product of 32-bit
// words with both its halves by itself, and the ten rounds are two thirds of a draw.
//
// Layout: of each pair of registers the first holds the even quads, the second the odd ones, so that their words are
// merged by one shift. Invariant: the same words as OneLane's, which is also what other processors use.
#pragma once

#include <cstring>

#if defined(__SSE2__)
#include <immintrin.h>
#endif

#include "../core/philox.h"

namespace tsam {
inline namespace TSAM_ISA {
namespace cpu_apply {

#if defined(__SSE2__)
#if defined(__AVX512F__)
constexpr int kVectorBytes = 64;
#elif defined(__AVX2__)
constexpr int kVectorBytes = 32;
#else
constexpr int kVectorBytes = 16;
#endif

struct VectorLanes {
  using Type = uint64_t __attribute__((vector_size(kVectorBytes)));
  static constexpr int kCount = kVectorBytes / 8;

  TSAM_HD static Type product(Type x, uint32_t factor) {
    const Type y = Type{} + factor;
#if defined(__AVX512F__)
    // The form without a mask makes g++ 12 warn of its own header.
    return reinterpret_cast<Type>(
        _mm512_maskz_mul_epu32(0xFF, reinterpret_cast<__m512i>(x), reinterpret_cast<__m512i>(y)));
#elif defined(__AVX2__)
    return reinterpret_cast<Type>(_mm256_mul_epu32(reinterpret_cast<__m256i>(x), reinterpret_cast<__m256i>(y)));
#else
    return reinterpret_cast<Type>(_mm_mul_epu32(reinterpret_cast<__m128i>(x), reinterpret_cast<__m128i>(y)));
#endif
  }
  template <int N>
  TSAM_HD static void count(uint64_t quad, Type (&x)[N]) {
    static_assert(N % 2 == 0, "registers in pairs");
    Type even;
    for (int i = 0; i < kCount; ++i) even[i] = 2 * static_cast<uint64_t>(i);
    for (int n = 0; n < N; ++n) x[n] = even + (quad + static_cast<uint64_t>(n / 2 * 2 * kCount + n % 2));
  }
  template <int N>
  TSAM_HD static void words(const Type (&x)[N], uint32_t* out) {
    for (int n = 0; n < N; n += 2) {
      const Type pairs = (x[n] & 0xFFFFFFFFu) | (x[n + 1] << 32);
      std::memcpy(out + n * kCount, &pairs, sizeof pairs);
    }
  }
};
#else
using VectorLanes = OneLane;
#endif

}  // namespace cpu_apply
}  // namespace TSAM_ISA
}  // namespace tsam
