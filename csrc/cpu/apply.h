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

// body(offset, count): count is a compile-time W for all blocks but the last.
template <int W, typename Body>
TSAM_HD void for_blocks(int64_t n, Body body) {
  int64_t i = 0;
  for (; i + W <= n; i += W) body(i, std::integral_constant<int, W>{});
  if (i < n) body(i, static_cast<int>(n - i));
}

// body(offset, count, z): the noise of the run, in blocks that follow the quads of the element index.
template <typename Body>
TSAM_HD void for_noise(int64_t n, uint64_t element, const Stream& stream, Body body) {
  constexpr int W = 4 * kQuads;
  const KeyedStream keyed(stream);
  float z[W];
  int64_t i = 0;
  const int skip = static_cast<int>(element % 4);
  if (skip != 0 && n > 0) {
    float head[4];
    normals<1>(keyed, element / 4, head);
    const int count = n < 4 - skip ? static_cast<int>(n) : 4 - skip;
    for (int k = 0; k < W; ++k) z[k] = k < count ? head[skip + k] : 0.0f;
    body(i, count, z);
    i += count;
  }
  for (; i + W <= n; i += W) {
    normals<kQuads, VectorWords>(keyed, (element + static_cast<uint64_t>(i)) / 4, z);
    body(i, std::integral_constant<int, W>{}, z);
  }
  if (i < n) {
    normals<kQuads, VectorWords>(keyed, (element + static_cast<uint64_t>(i)) / 4, z);
    body(i, static_cast<int>(n - i), z);
  }
}

// A sum of squares whose rounding is part of its definition: element i of a run goes to lane i mod kLanes, and the
// lanes are folded in halves. Float64 throughout, so that no gradient scale over- or underflows it.
struct SquareSum {
  double lane[kLanes] = {};

  template <typename C>
  TSAM_HD void add(const C (&x)[kLanes]) {
    for (int i = 0; i < kLanes; ++i) lane[i] = fma(static_cast<double>(x[i]), static_cast<double>(x[i]), lane[i]);
  }
  TSAM_HD double total() {
    for (int half = kLanes / 2; half > 0; half /= 2)
      for (int i = 0; i < half; ++i) lane[i] += lane[i + half];
    return lane[0];
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
