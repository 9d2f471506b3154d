// Stochastic rounding of float32 to bfloat16 and float16: up or down at random, right in the mean, E[rounded] = x.
//
//   u = r 2^-32, r the element's random word; |x| = (k + f) ulp with 0 <= f < 1;  k + 1 where f + u >= 1, else k
//   ulp: that of x; of float16 never below 2^-24, the spacing of its subnormals
//
// Layout: r is word (element mod 4) of the block element / 4 of the purpose kStochasticRounding; of u the leading bits
// count, as many as are cut off of x (16; 13, float16's subnormals 21, so that there what |x| has below 2^-45 is lost).
// Invariant: integers only, so the same bits everywhere; a value of the storage type stays what it is; infinite where
// rounding to nearest is and nowhere else: at the largest value nothing is rounded up; NaN as from_compute has it.
#pragma once

#include "dtype.h"

namespace tsam {

constexpr int64_t kToNearest = -1;  // an op's `rounding`; any other number is the counter's sample

// How an op rounds what it writes into tensors of 16 bits.
struct Rounding {
  bool stochastic;
  CountedStream counted;
};

template <typename T>
constexpr bool kRounds = sizeof(T) == 2;

// The storage types of a kernel that is made for stochastic rounding.
struct StochasticBFloat16 : BFloat16 {};
struct StochasticFloat16 : Float16 {};
template <typename T>
constexpr bool kStochastic = false;
template <>
constexpr bool kStochastic<StochasticBFloat16> = true;
template <>
constexpr bool kStochastic<StochasticFloat16> = true;

}  // namespace tsam

TSAM_CORE_BEGIN

TSAM_HD void round_by(float x, uint32_t r, BFloat16& out) {
  const uint32_t bits = bits_from_float(x), magnitude = bits & 0x7FFFFFFFu;
  uint32_t k = (magnitude + (r >> 16)) >> 16;
  k = k > 0x7F7Fu ? 0x7F7Fu : k;
  k = magnitude >= 0x7F7F8000u ? 0x7F80u : k;  // half a unit above the largest value, where nearest overflows
  k |= (bits >> 16) & 0x8000u;
  out.bits = static_cast<uint16_t>(x != x ? 0x7FC0u : k);
}

TSAM_HD void round_by(float x, uint32_t r, Float16& out) {
  const uint32_t bits = bits_from_float(x), magnitude = bits & 0x7FFFFFFFu;
  const bool tiny = magnitude < 0x38800000u;  // below 2^-14
  const uint32_t normal = (magnitude - (112u << 23) + (r >> 19)) >> 13;
  // In fixed point, below 2^31; a float32 subnormal is 0 there, whether the processor flushes it or not.
  const float fixed = float_from_bits(tiny ? magnitude : 0u) * 0x1p45f;
  const uint32_t subnormal = (static_cast<uint32_t>(static_cast<int32_t>(fixed)) + (r >> 11)) >> 21;
  uint32_t k = tiny ? subnormal : normal;
  k = k > 0x7BFFu ? 0x7BFFu : k;
  k = magnitude >= 0x477FF000u ? 0x7C00u : k;  // 65520
  k |= (bits >> 16) & 0x8000u;
  out.bits = static_cast<uint16_t>(x != x ? 0x7E00u : k);
}

// The words of the 4 W elements that start at `element`, a multiple of 4.
template <int W, typename Words = OneWord>
TSAM_HD void rounding_words(const KeyedStream& stream, uint64_t element, uint32_t (&r)[4 * W]) {
  uint32_t x[4][W];
  philox<W, Words>(stream, element / 4, x);
  TSAM_UNROLL
  for (int i = 0; i < W; ++i)
    for (int k = 0; k < 4; ++k) r[4 * i + k] = x[k][i];
}

TSAM_CORE_END
