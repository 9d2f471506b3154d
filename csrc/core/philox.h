// Noise as a pure function of (seed, step, purpose, sample, element): Philox4x32-10 (Salmon et al., SC 2011,
// "Parallel random numbers: as easy as 1, 2, 3"), whose four words become four normals by Box-Muller or 128 signs.
//
// Counter: words 0-1 the quad (element index / 4; of signs the block, element index / 128), word 2 the step, word 3
// purpose << 28 | sample. Key: the seed.
// Layout: W consecutive quads side by side, x[component][lane]; element 4 * quad + component takes that component.
// Sign e is bit e mod 32 of word (e mod 128) / 32 of block e / 128: a set bit is -1, any other +1.
// Invariant: every float operation is IEEE basic, sqrt or an explicit fma, so the bits are the same for every W,
// instruction set, thread count, chunking and device. u in [2^-33, 1] is a float32: |z| <= sqrt(66 ln 2) < 6.764, and
// of radii below 2^-12 (one draw in 3e7) only zero is ever seen.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#include "macros.h"

namespace tsam {

enum Purpose : uint32_t {
  kPerturbation = 0,
  kMomentum = 1,
  kAccept = 2,
  kBallRadius = 3,
  kStochasticRounding = 4,
  kSigns = 5,  // its elements are signs, those of all others normals
};

// Everything of the counter but the element, and the key.
struct Stream {
  uint64_t seed;
  uint32_t step;
  uint32_t word3;
};

// The same where the step is counted in memory that kernels read (`held`, a whole number in float64): a launch that a
// CUDA graph repeats then finds another step each time. Without `held` the stream's own.
struct CountedStream {
  Stream stream;
  const double* held;
};

constexpr uint64_t kSignsPerBlock = 128;
constexpr int64_t kMaxSample = (int64_t{1} << 28) - 1;
constexpr int64_t kStepHeld = -1;  // an op's `step`: the one that its scalars hold

}  // namespace tsam

TSAM_CORE_BEGIN

TSAM_HD Stream make_stream(uint64_t seed, uint32_t step, Purpose purpose, uint32_t sample) {
  return Stream{seed, step, (static_cast<uint32_t>(purpose) << 28) | sample};
}

// Where the memory is. The step enters the counter modulo 2^32; what is no step at all counts as 0.
TSAM_HD Stream stream_now(const CountedStream& counted) {
  Stream stream = counted.stream;
  if (counted.held != nullptr) {
    const double step = *counted.held;
    stream.step = step >= 0.0 && step < 0x1p63 ? static_cast<uint32_t>(static_cast<uint64_t>(step)) : 0u;
  }
  return stream;
}

// The ten round keys of a seed, made once for many draws.
struct PhiloxKeys {
  uint64_t word[2][10];

  TSAM_HD explicit PhiloxKeys(uint64_t seed) {
    uint32_t key0 = static_cast<uint32_t>(seed), key1 = static_cast<uint32_t>(seed >> 32);
    TSAM_UNROLL
    for (int round = 0; round < 10; ++round) {
      word[0][round] = key0;
      word[1][round] = key1;
      key0 += 0x9E3779B9u;
      key1 += 0xBB67AE85u;
    }
  }
};

// From a stream by itself: who draws once pays for the keys there, who draws often keeps one.
struct KeyedStream {
  Stream stream;
  PhiloxKeys keys;

  TSAM_HD KeyedStream(const Stream& stream) : stream(stream), keys(stream.seed) {}
};

// How the rounds' words lie: each in the lower half of a 64-bit lane, whose upper half may hold anything. So the
// product of two words is one lane, both halves of it in place. A processor's own vectors of lanes: cpu/lanes.h.
struct OneWord {
  using Type = uint64_t;
  static constexpr int kCount = 1;

  TSAM_HD static Type product(Type x, uint32_t factor) {
    return static_cast<uint64_t>(factor) * static_cast<uint32_t>(x);
  }
  // N lanes of consecutive quads, and the words of such lanes in the order of their quads.
  template <int N>
  TSAM_HD static void count(uint64_t quad, Type (&x)[N]) {
    TSAM_UNROLL
    for (int i = 0; i < N; ++i) x[i] = quad + static_cast<uint64_t>(i);
  }
  template <int N>
  TSAM_HD static void words(const Type (&x)[N], uint32_t* out) {
    TSAM_UNROLL
    for (int i = 0; i < N; ++i) out[i] = static_cast<uint32_t>(x[i]);
  }
};

// Ten rounds in place, written out: a loop would move every word to another register in each round.
template <int Round, typename Words, int N>
TSAM_HD void philox_rounds(typename Words::Type (&x)[4][N], const PhiloxKeys& keys) {
  if constexpr (Round < 10) {
    TSAM_UNROLL
    for (int i = 0; i < N; ++i) {
      const typename Words::Type p0 = Words::product(x[0][i], 0xD2511F53u), p1 = Words::product(x[2][i], 0xCD9E8D57u);
      x[0][i] = (p1 >> 32) ^ x[1][i] ^ keys.word[0][Round];
      x[1][i] = p1;
      x[2][i] = (p0 >> 32) ^ x[3][i] ^ keys.word[1][Round];
      x[3][i] = p0;
    }
    philox_rounds<Round + 1, Words>(x, keys);
  }
}

// Random words of the W quads that start at `quad`; four registers at a time hide each other's latency.
template <int W, typename Words = OneWord>
TSAM_HD void philox(const KeyedStream& keyed, uint64_t quad, uint32_t (&x)[4][W]) {
  using Type = typename Words::Type;
  constexpr int N = W < 4 * Words::kCount ? W / Words::kCount : 4, kQuads = N * Words::kCount;
  static_assert(W % kQuads == 0, "blocks of whole registers");
  TSAM_UNROLL
  for (int at = 0; at < W; at += kQuads) {
    Type lane[4][N];
    Words::count(quad + static_cast<uint64_t>(at), lane[0]);
    TSAM_UNROLL
    for (int i = 0; i < N; ++i) {
      lane[1][i] = lane[0][i] >> 32;
      lane[2][i] = Type{} + keyed.stream.step;
      lane[3][i] = Type{} + keyed.stream.word3;
    }
    philox_rounds<0, Words>(lane, keyed.keys);
    TSAM_UNROLL
    for (int k = 0; k < 4; ++k) Words::words(lane[k], &x[k][at]);
  }
}

TSAM_HD float float_from_bits(uint32_t bits) {
  float f;
  memcpy(&f, &bits, sizeof f);
  return f;
}

TSAM_HD uint32_t bits_from_float(float f) {
  uint32_t bits;
  memcpy(&bits, &f, sizeof bits);
  return bits;
}

// sqrt(-2 ln u) for u = (x + 1/2) 2^-32. u = m 2^e with m in [sqrt(1/2), sqrt(2)), f = m - 1 (exact), and
// ln m = f - f^2/2 + f^3 P(f), P a minimax polynomial of degree 6 (relative error of the logarithm 4e-8).
TSAM_HD float box_muller_radius(uint32_t x) {
  const float u = fmaf(static_cast<float>(x), 0x1p-32f, 0x1p-33f);
  constexpr uint32_t kSqrtHalf = 0x3F3504F3u;
  const uint32_t shifted = bits_from_float(u) - kSqrtHalf;
  const float e = static_cast<float>(static_cast<int32_t>(shifted) >> 23);
  const float f = float_from_bits((shifted & 0x007FFFFFu) + kSqrtHalf) - 1.0f;
  float p = 0.087003596f;
  p = fmaf(p, f, -0.14267476f);
  p = fmaf(p, f, 0.14914787f);
  p = fmaf(p, f, -0.16577587f);
  p = fmaf(p, f, 0.19963062f);
  p = fmaf(p, f, -0.25001338f);
  p = fmaf(p, f, 0.3333391f);
  const float f2 = f * f;
  // Small terms first: -2 ln u = -2 e ln2 - 2 f + f^2 - 2 f^3 P(f); the last two are below f^2 in size.
  float r = f2 * fmaf(-2.0f * f, p, 1.0f);
  r = fmaf(-2.0f, f, r);
  r = fmaf(e, -1.38629436f, r);
  // u = 1 gives 0 exactly; rounding must not turn a value next to it into a negative number.
  return sqrtf(r > 0.0f ? r : 0.0f);
}

// cos and sin of 2 pi x / 2^32. The nearest quarter turn is taken off in integers, so the remaining angle in
// [-pi/4, pi/4] carries no cancellation; minimax polynomials of degree 7 and 8.
TSAM_HD void box_muller_direction(uint32_t x, float& c, float& s) {
  const uint32_t y = x + 0x20000000u;  // its upper two bits count the quarter turns
  const float a = static_cast<float>(static_cast<int32_t>((y & 0x3FFFFFFFu) - 0x20000000u)) * 1.4629180792671596e-9f;
  const float a2 = a * a;
  float ps = -0.00019517298f;
  ps = fmaf(ps, a2, 0.008332178f);
  ps = fmaf(ps, a2, -0.16666655f);
  const float sine = fmaf(a * a2, ps, a);
  float pc = 2.443845e-05f;
  pc = fmaf(pc, a2, -0.0013887368f);
  pc = fmaf(pc, a2, 0.041666646f);
  const float cosine = fmaf(a2, fmaf(a2, pc, -0.5f), 1.0f);
  const bool swap = (y & 0x40000000u) != 0;
  const uint32_t sin_sign = y & 0x80000000u, cos_sign = (y + 0x40000000u) & 0x80000000u;
  c = float_from_bits(bits_from_float(swap ? sine : cosine) ^ cos_sign);
  s = float_from_bits(bits_from_float(swap ? cosine : sine) ^ sin_sign);
}

// Standard normals of W quads' words, in element order: z[4 * lane + component].
template <int W>
TSAM_HD void box_muller(const uint32_t (&x)[4][W], float (&z)[4 * W]) {
  TSAM_UNROLL
  for (int i = 0; i < W; ++i) {
    const float r0 = box_muller_radius(x[0][i]);
    const float r1 = box_muller_radius(x[2][i]);
    float c0, s0, c1, s1;
    box_muller_direction(x[1][i], c0, s0);
    box_muller_direction(x[3][i], c1, s1);
    z[4 * i + 0] = r0 * c0;
    z[4 * i + 1] = r0 * s0;
    z[4 * i + 2] = r1 * c1;
    z[4 * i + 3] = r1 * s1;
  }
}

// Standard normals of the W quads that start at `quad`.
template <int W, typename Words = OneWord>
TSAM_HD void normals(const KeyedStream& stream, uint64_t quad, float (&z)[4 * W]) {
  uint32_t x[4][W];
  philox<W, Words>(stream, quad, x);
  box_muller(x, z);
}

TSAM_HD bool draws_signs(const Stream& stream) { return stream.word3 >> 28 == kSigns; }

TSAM_HD float sign(uint32_t word, int bit) { return (word & (1u << bit)) != 0 ? -1.0f : 1.0f; }

// What the stream draws for the 4 W elements that start at `element`, a multiple of 4. Four signs never lie in two
// words; eight may lie in two blocks.
template <int W>
TSAM_HD void normals_or_signs(const KeyedStream& stream, uint64_t element, float (&z)[4 * W]) {
  static_assert(W <= 2, "no more than two blocks of signs");
  const bool signs = draws_signs(stream.stream);
  uint32_t x[4][W];
  philox<W>(stream, signs ? element / kSignsPerBlock : element / 4, x);
  if (!signs) {
    box_muller(x, z);
    return;
  }
  TSAM_UNROLL
  for (int i = 0; i < W; ++i) {
    const uint64_t e = element + 4 * static_cast<uint64_t>(i);
    const int lane = W - 1;
    const bool next = e / kSignsPerBlock != element / kSignsPerBlock, upper = (e & 64) != 0, odd = (e & 32) != 0;
    const uint32_t even_word = upper ? (next ? x[2][lane] : x[2][0]) : (next ? x[0][lane] : x[0][0]);
    const uint32_t odd_word = upper ? (next ? x[3][lane] : x[3][0]) : (next ? x[1][lane] : x[1][0]);
    const uint32_t word = (odd ? odd_word : even_word) >> (e & 31);
    TSAM_UNROLL
    for (int k = 0; k < 4; ++k) z[4 * i + k] = sign(word, k);
  }
}

// One uniform in (0, 1) that belongs to the whole sample and to no element (element index 2^64 - 1).
TSAM_HD double scalar_uniform(const Stream& stream) {
  uint32_t x[4][1];
  philox<1>(stream, ~uint64_t{0} / 4, x);
  return (static_cast<double>(x[3][0]) + 0.5) * 0x1p-32;
}

TSAM_CORE_END
