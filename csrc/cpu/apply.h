// The two loops of the CPU back end: over a run in lane blocks (here), over a ChunkPlan in threads (parallel.h).
//
// Layout: a run is walked in blocks of kLanes elements; the last block is filled up with zeros and only its first
// elements are stored, so functors never see a tail. Noise blocks are 32 quads = 128 elements, the width that
// g++ turns into full vectors; a run may begin inside a quad.
#pragma once

#include <type_traits>

#include "halves.h"
#include "kernels.h"
#include "lanes.h"

namespace tsam {
inline namespace TSAM_ISA {
namespace cpu_apply {

constexpr int kLanes = 64;
constexpr int kQuads = 32;

// A block of float16 that the processor converts.
template <typename T, typename C, int W, typename Count>
constexpr bool kWholeHalves = std::is_same_v<T, Float16> && std::is_same_v<C, float> &&
                              std::is_same_v<Count, std::integral_constant<int, W>> && W % kHalves == 0;

template <typename T, typename C, int W, typename Count>
TSAM_HD void load(const T* from, Count count, C (&x)[W]) {
  if constexpr (kWholeHalves<T, C, W, Count>) {
    for (int i = 0; i < W; i += kHalves) widen_halves(from + i, x + i);
    return;
  }
  if constexpr (!std::is_same_v<Count, std::integral_constant<int, W>>) {
    for (int i = 0; i < W; ++i) x[i] = C(0);
  }
  for (int i = 0; i < count; ++i) x[i] = static_cast<C>(to_compute(from[i]));
}

template <typename T, typename C, int W, typename Count>
TSAM_HD void store(const C (&x)[W], Count count, T* to) {
  if constexpr (kWholeHalves<T, C, W, Count>) {
    for (int i = 0; i < W; i += kHalves) narrow_halves(x + i, to + i);
    return;
  }
  for (int i = 0; i < count; ++i) from_compute(x[i], to[i]);
}

// How a block of W elements is written whose first has the index `element`: to nearest, or stochastically.
struct ToNearest {
  template <typename T, typename C, int W, typename Count>
  TSAM_HD void operator()(const C (&x)[W], uint64_t, Count count, T* to) const {
    store(x, count, to);
  }
};

class Stochastically {
 public:
  TSAM_HD explicit Stochastically(const Stream& stream) : keyed_(stream) {}

  template <typename T, int W, typename Count>
  TSAM_HD void operator()(const float (&x)[W], uint64_t element, Count count, T* to) const {
    uint32_t r[W];
    const int skip = static_cast<int>(element % 4);
    rounding_words<W / 4, VectorWords>(keyed_, element - static_cast<uint64_t>(skip), r);
    if (skip != 0) {
      uint32_t next[4];
      rounding_words<1>(keyed_, element - static_cast<uint64_t>(skip) + W, next);
      for (int i = 0; i < W; ++i) r[i] = i + skip < W ? r[i + skip] : next[i + skip - W];
    }
    for (int i = 0; i < count; ++i) round_by(x[i], r[i], to[i]);
  }

 private:
  const KeyedStream keyed_;
};

// body(how a run of T is written): only 16 bits are ever rounded stochastically.
template <typename T, typename Body>
TSAM_HD auto with_rounding(const cpu::Round& round, const Body& body) {
  if constexpr (kRounds<T>) {
    if (round.stochastic) return body(Stochastically(round.stream));
  }
  return body(ToNearest{});
}

// body(offset, count): count is a compile-time W for all blocks but the last.
template <int W, typename Body>
TSAM_HD void for_blocks(int64_t n, Body body) {
  int64_t i = 0;
  for (; i + W <= n; i += W) body(i, std::integral_constant<int, W>{});
  if (i < n) body(i, static_cast<int>(n - i));
}

// Whole blocks of what needs no conversion stay in registers, sixteen lanes at a time: as arrays of 64 or 128 they
// would go through memory and back, twice the time of a pass in cache.
template <typename T, typename Count>
constexpr bool kInRegisters = std::is_same_v<T, compute_t<T>> && !std::is_same_v<Count, int>;

// body(a null pointer of the lanes to walk a run of T in): narrow ones where the list does not fit into the caches.
template <typename T, typename Body>
TSAM_HD void with_lanes(bool past_caches, const Body& body) {
  if constexpr (std::is_same_v<T, compute_t<T>>) {
    if (past_caches) return body(static_cast<NarrowLanes<T>*>(nullptr));
  }
  body(static_cast<Lanes<compute_t<T>>*>(nullptr));
}

// What a run's z is made of: four from an element that is a multiple of 4, and 128 from such an element on, never from
// one before the last.
struct NormalBlocks {
  const KeyedStream keyed;

  TSAM_HD explicit NormalBlocks(const Stream& stream) : keyed(stream) {}
  TSAM_HD void four(uint64_t element, float (&z)[4]) const { normals<1>(keyed, element / 4, z); }
  TSAM_HD void operator()(uint64_t element, float (&z)[4 * kQuads]) const {
    normals<kQuads, VectorWords>(keyed, element / 4, z);
  }
};

// Words are made for kQuads blocks of signs, 4,096 elements, ahead: their rounds then fill vectors as those of normals
// do, and cost a thirty-second of them per element.
class SignBlocks {
 public:
  TSAM_HD explicit SignBlocks(const Stream& stream) : keyed_(stream) {}
  TSAM_HD void four(uint64_t element, float (&z)[4]) const { normals_or_signs<1>(keyed_, element, z); }
  TSAM_HD void operator()(uint64_t element, float (&z)[4 * kQuads]) {
    if (element + 4 * kQuads > end_) make_words(element / kSignsPerBlock);
    const uint64_t at = element + kQuads * kSignsPerBlock - end_;  // bits from the first word on
    const uint32_t* const from = words_ + at / 32;
    for (int k = 0; k < 4 * kQuads / 32; ++k) {
      const uint32_t bits = static_cast<uint32_t>((from[k] | static_cast<uint64_t>(from[k + 1]) << 32) >> (at % 32));
      write(bits, z + 32 * k, std::make_integer_sequence<int, 32 / kVectorLanes<float>>{});
    }
  }

 private:
  // Written out in vectors: of loops over bits g++ makes one that shuffles four words together.
  template <int... V>
  TSAM_HD static void write(uint32_t bits, float* z, std::integer_sequence<int, V...>) {
    const Vector<uint32_t> all = Vector<uint32_t>{} + bits;
    const Vector<float> plus = Vector<float>{} + 1.0f;
    Vector<uint32_t> first;
    for (int i = 0; i < kVectorLanes<uint32_t>; ++i) first[i] = 1u << i;
    const auto lanes = [&](int at) {
      const Vector<float> signs = (all & first << at) == 0 ? plus : -plus;
      std::memcpy(z + at, &signs, sizeof signs);
    };
    (lanes(V * kVectorLanes<float>), ...);
  }

  TSAM_HD void make_words(uint64_t block) {
    uint32_t x[4][kQuads];
    philox<kQuads, VectorWords>(keyed_, block, x);
    for (int i = 0; i < kQuads; ++i)
      for (int k = 0; k < 4; ++k) words_[4 * i + k] = x[k][i];
    end_ = (block + kQuads) * kSignsPerBlock;
  }

  const KeyedStream keyed_;
  uint64_t end_ = 0;                // elements before this one have their words
  uint32_t words_[4 * kQuads + 1];  // in the order of elements; of the last no bit is taken
};

// body(offset, count, z): the noise of the run, in blocks that follow the quads of the element index.
template <typename Blocks = NormalBlocks, typename Body>
TSAM_HD void for_noise(int64_t n, uint64_t element, const Stream& stream, Body body) {
  constexpr int W = 4 * kQuads;
  Blocks noise(stream);
  float z[W];
  int64_t i = 0;
  const int skip = static_cast<int>(element % 4);
  if (skip != 0 && n > 0) {
    float head[4];
    noise.four(element - static_cast<uint64_t>(skip), head);
    const int count = n < 4 - skip ? static_cast<int>(n) : 4 - skip;
    for (int k = 0; k < W; ++k) z[k] = k < count ? head[skip + k] : 0.0f;
    body(i, count, z);
    i += count;
  }
  for (; i + W <= n; i += W) {
    noise(element + static_cast<uint64_t>(i), z);
    body(i, std::integral_constant<int, W>{}, z);
  }
  if (i < n) {
    noise(element + static_cast<uint64_t>(i), z);
    body(i, static_cast<int>(n - i), z);
  }
}

// A sum whose rounding is part of its definition: element i of a run goes to lane i mod kLanes, and the lanes are
// folded in halves. Float64 throughout, so that no gradient scale over- or underflows it.
struct LaneSum {
  double lane[kLanes] = {};

  TSAM_HD double total() {
    for (int half = kLanes / 2; half > 0; half /= 2)
      for (int i = 0; i < half; ++i) lane[i] += lane[i + half];
    return lane[0];
  }
};
struct SquareSum : LaneSum {
  template <typename C>
  TSAM_HD void add(const C (&x)[kLanes]) {
    for (int i = 0; i < kLanes; ++i) lane[i] = fma(static_cast<double>(x[i]), static_cast<double>(x[i]), lane[i]);
  }
};

// Calls body with a null pointer of the storage type.
template <typename Body>
TSAM_HD auto for_dtype(DType dtype, Body body) {
  switch (dtype) {
    case DType::kFloat64:
      return body(static_cast<double*>(nullptr));
    case DType::kBFloat16:
      return body(static_cast<BFloat16*>(nullptr));
    case DType::kFloat16:
      return body(static_cast<Float16*>(nullptr));
    default:
      return body(static_cast<float*>(nullptr));
  }
}

}  // namespace cpu_apply
}  // namespace TSAM_ISA
}  // namespace tsam
