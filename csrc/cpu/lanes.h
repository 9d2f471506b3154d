// Vectors written out, for what the compiler does not vectorise well by itself: Philox's rounds (no vector form of a
// product of 32-bit words with both its halves is found; they were two thirds of a draw) and HMC's passes (arrays of
// lanes between functors went through memory).
//
// Layout: a Vector<E> is one register of the instruction set; Lanes<C> are always 16 elements, in as many registers as
// they take. Invariant: the bits of one element at a time, on every instruction set; sums in 16 lanes on all of them.
#pragma once

#include <cstring>
#include <type_traits>
#include <utility>

#if defined(__AVX2__) && defined(__FMA__)
#include <immintrin.h>
#endif

#include "../core/dtype.h"

namespace tsam {
inline namespace TSAM_ISA {
namespace cpu_apply {

#if defined(__AVX512F__)
constexpr int kVectorBytes = 64;
#elif defined(__AVX2__) && defined(__FMA__)
constexpr int kVectorBytes = 32;
#else
constexpr int kVectorBytes = 16;
#endif

template <typename E, int bytes = kVectorBytes>
struct VectorOf {
  typedef E Type __attribute__((vector_size(bytes)));
};
template <typename E>
using Vector = typename VectorOf<E>::Type;
template <typename E>
constexpr int kVectorLanes = kVectorBytes / static_cast<int>(sizeof(E));

// What an instruction set has beyond the operators: a product of lower halves, fma, and float32 to float64 and back.
#if defined(__AVX512F__)
// The form without a mask makes g++ 12 warn of its own header.
TSAM_HD Vector<uint64_t> lower_product(Vector<uint64_t> x, Vector<uint64_t> y) {
  return reinterpret_cast<Vector<uint64_t>>(
      _mm512_maskz_mul_epu32(0xFF, reinterpret_cast<__m512i>(x), reinterpret_cast<__m512i>(y)));
}
TSAM_HD Vector<float> vector_fma(Vector<float> a, Vector<float> b, Vector<float> c) { return _mm512_fmadd_ps(a, b, c); }
TSAM_HD Vector<double> vector_fma(Vector<double> a, Vector<double> b, Vector<double> c) {
  return _mm512_fmadd_pd(a, b, c);
}
TSAM_HD Vector<double> widen_part(Vector<float> x, int half) {
  const __m512d pairs = _mm512_castps_pd(x);
  const __m256d taken =
      half == 0 ? _mm512_maskz_extractf64x4_pd(0xF, pairs, 0) : _mm512_maskz_extractf64x4_pd(0xF, pairs, 1);
  return _mm512_maskz_cvtps_pd(0xFF, _mm256_castpd_ps(taken));
}
#elif defined(__AVX2__) && defined(__FMA__)
TSAM_HD Vector<uint64_t> lower_product(Vector<uint64_t> x, Vector<uint64_t> y) {
  return reinterpret_cast<Vector<uint64_t>>(
      _mm256_mul_epu32(reinterpret_cast<__m256i>(x), reinterpret_cast<__m256i>(y)));
}
TSAM_HD Vector<float> vector_fma(Vector<float> a, Vector<float> b, Vector<float> c) { return _mm256_fmadd_ps(a, b, c); }
TSAM_HD Vector<double> vector_fma(Vector<double> a, Vector<double> b, Vector<double> c) {
  return _mm256_fmadd_pd(a, b, c);
}
TSAM_HD Vector<double> widen_part(Vector<float> x, int half) {
  return _mm256_cvtps_pd(half == 0 ? _mm256_castps256_ps128(x) : _mm256_extractf128_ps(x, 1));
}
#else
TSAM_HD Vector<uint64_t> lower_product(Vector<uint64_t> x, Vector<uint64_t> y) {
  for (int i = 0; i < kVectorLanes<uint64_t>; ++i) x[i] = (x[i] & 0xFFFFFFFFu) * (y[i] & 0xFFFFFFFFu);
  return x;
}
template <typename V>
TSAM_HD V vector_fma(V a, V b, V c) {
  for (int i = 0; i < static_cast<int>(sizeof(V) / sizeof(a[0])); ++i) c[i] = fused(a[i], b[i], c[i]);
  return c;
}
TSAM_HD Vector<double> widen_part(Vector<float> x, int half) {
  Vector<double> out;
  for (int i = 0; i < kVectorLanes<double>; ++i) out[i] = static_cast<double>(x[half * kVectorLanes<double> + i]);
  return out;
}
#endif
TSAM_HD Vector<double> widen_part(Vector<double> x, int) { return x; }

// The sign bit off, as fabs has it.
TSAM_HD Vector<float> vector_magnitude(Vector<float> x) {
  return reinterpret_cast<Vector<float>>(reinterpret_cast<Vector<uint32_t>>(x) & 0x7FFFFFFFu);
}
TSAM_HD Vector<double> vector_magnitude(Vector<double> x) {
  return reinterpret_cast<Vector<double>>(reinterpret_cast<Vector<uint64_t>>(x) & 0x7FFFFFFFFFFFFFFFu);
}

// Of each pair of registers the first holds the even quads, the second the odd ones, so that one shift merges their
// words (core/philox.h).
struct VectorWords {
  using Type = Vector<uint64_t>;
  static constexpr int kCount = kVectorLanes<uint64_t>;

  TSAM_HD static Type product(Type x, uint32_t factor) { return lower_product(x, Type{} + factor); }
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
      static_assert(__BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__, "the even quad's word comes first");
      const Type pairs = (x[n] & 0xFFFFFFFFu) | (x[n + 1] << 32);
      std::memcpy(out + n * kCount, &pairs, sizeof pairs);
    }
  }
};

// Sixteen elements of a compute type, with the operations that functors ask of one element. Written without loops, so
// that the registers stay registers.
template <typename C>
class Lanes {
 public:
  static constexpr int kCount = 16;

  // All minus 0, not 0 plus all: that would take the sign off -0.
  TSAM_HD explicit Lanes(C all) : Lanes(make([&](int) { return all - Vector<C>{}; })) {}
  TSAM_HD explicit Lanes(const C* from)
      : Lanes(make([&](int k) {
          Vector<C> x;
          std::memcpy(&x, from + k * kVectorLanes<C>, sizeof x);
          return x;
        })) {}
  TSAM_HD void store(C* to) const { store(to, Registers{}); }

  TSAM_HD friend Lanes operator*(const Lanes& x, const Lanes& y) {
    return make([&](int k) { return x.vector_[k] * y.vector_[k]; });
  }
  TSAM_HD friend Lanes operator-(const Lanes& x, const Lanes& y) {
    return make([&](int k) { return x.vector_[k] - y.vector_[k]; });
  }
  TSAM_HD friend Lanes fused(const Lanes& a, const Lanes& b, const Lanes& c) {
    return make([&](int k) { return vector_fma(a.vector_[k], b.vector_[k], c.vector_[k]); });
  }
  TSAM_HD friend Lanes magnitude(const Lanes& x) {
    return make([&](int k) { return vector_magnitude(x.vector_[k]); });
  }
  TSAM_HD friend Lanes<double> widened(const Lanes& x) {
    constexpr int parts = sizeof(double) / sizeof(C);
    return Lanes<double>::make([&](int k) { return widen_part(x.vector_[k / parts], k % parts); });
  }
  // Folded in halves, in an order that no instruction set changes.
  TSAM_HD C total() const {
    C lane[kCount];
    store(lane);
    for (int half = kCount / 2; half > 0; half /= 2)
      for (int i = 0; i < half; ++i) lane[i] += lane[i + half];
    return lane[0];
  }

 private:
  template <typename>
  friend class Lanes;
  using Registers = std::make_integer_sequence<int, kCount / kVectorLanes<C>>;

  template <int... K, typename F>
  TSAM_HD Lanes(std::integer_sequence<int, K...>, const F& of) : vector_{of(K)...} {}
  template <typename F>
  TSAM_HD static Lanes make(const F& of) {
    return Lanes(Registers{}, of);
  }

  template <int... K>
  TSAM_HD void store(C* to, std::integer_sequence<int, K...>) const {
    (std::memcpy(to + K * kVectorLanes<C>, &vector_[K], sizeof(Vector<C>)), ...);
  }

  Vector<C> vector_[kCount / kVectorLanes<C>];
};

// A register of 16 bytes on every instruction set, with the operations of Lanes: memory is read faster in these than in
// wide ones, caches are not (csrc/README.md).
template <typename C>
class NarrowLanes {
  using Register = typename VectorOf<C, 16>::Type;

 public:
  static constexpr int kCount = 16 / static_cast<int>(sizeof(C));

  TSAM_HD explicit NarrowLanes(C all) : vector_(all - Register{}) {}
  TSAM_HD explicit NarrowLanes(const C* from) { std::memcpy(&vector_, from, sizeof vector_); }
  TSAM_HD void store(C* to) const { std::memcpy(to, &vector_, sizeof vector_); }

  TSAM_HD friend NarrowLanes operator*(const NarrowLanes& x, const NarrowLanes& y) { return of(x.vector_ * y.vector_); }
  TSAM_HD friend NarrowLanes fused(const NarrowLanes& a, const NarrowLanes& b, const NarrowLanes& c) {
#if defined(__FMA__)
    if constexpr (std::is_same_v<C, float>) return of(_mm_fmadd_ps(a.vector_, b.vector_, c.vector_));
    if constexpr (std::is_same_v<C, double>) return of(_mm_fmadd_pd(a.vector_, b.vector_, c.vector_));
#else
    Register sum;
    for (int i = 0; i < kCount; ++i) sum[i] = fused(a.vector_[i], b.vector_[i], c.vector_[i]);
    return of(sum);
#endif
  }
  TSAM_HD friend NarrowLanes magnitude(const NarrowLanes& x) {
    Register size;
    for (int i = 0; i < kCount; ++i) size[i] = magnitude(x.vector_[i]);
    return of(size);
  }

 private:
  TSAM_HD static NarrowLanes of(const Register& vector) {
    NarrowLanes lanes(C(0));
    lanes.vector_ = vector;
    return lanes;
  }

  Register vector_;
};

}  // namespace cpu_apply
}  // namespace TSAM_ISA
}  // namespace tsam
