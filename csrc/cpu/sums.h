// The kernels of kernels.h that only add up: squares of noise and of gradients, how far positions have moved, and the
// products that a carried direction is made of.
//
// Layout: kLanes sums in float64, element i of a run in lane i mod kLanes, added up in halves at the end.
// Invariant: a sum has the same bits on every instruction set; lanes beyond the run add nothing.
#pragma once

#include "../core/direction.h"
#include "apply.h"

namespace tsam {
inline namespace TSAM_ISA {
namespace cpu_apply {

static double noise_sum_squares(int64_t n, uint64_t element, Stream stream) {
  SquareSum sum;
  for_noise(n, element, stream, [&](int64_t, auto count, const float (&z)[4 * kQuads]) {
    for (int offset = 0; offset < 4 * kQuads; offset += kLanes) {
      double x[kLanes];
      for (int k = 0; k < kLanes; ++k) x[k] = offset + k < count ? static_cast<double>(z[offset + k]) : 0.0;
      sum.add(x);
    }
  });
  return sum.total();
}

static double sum_squares(DType dtype, const void* grad, const void* origin, int64_t n) {
  return for_dtype(dtype, [&](auto* t) -> double {
    using T = std::remove_pointer_t<decltype(t)>;
    using C = compute_t<T>;
    const T *g = static_cast<const T*>(grad), *o = static_cast<const T*>(origin);
    SquareSum sum;
    for_blocks<kLanes>(n, [&](int64_t i, auto count) {
      C x[kLanes];
      load(g + i, count, x);
      if (o != nullptr) {
        C d[kLanes];
        load(o + i, count, d);
        for (int k = 0; k < kLanes; ++k) x[k] *= magnitude(d[k]);
      }
      sum.add(x);
    });
    return sum.total();
  });
}

static cpu::DisplacementSums displacement(DType dtype, const void* position, const void* origin, const void* grad,
                                          int64_t n, bool adaptive) {
  return for_dtype(dtype, [&](auto* t) {
    using T = std::remove_pointer_t<decltype(t)>;
    using C = compute_t<T>;
    const T *const p = static_cast<const T*>(position), *const o = static_cast<const T*>(origin),
                   *const g = static_cast<const T*>(grad);
    LaneSum squares, along, ascent;
    for_blocks<kLanes>(n, [&](int64_t i, auto count) {
      C x[kLanes], from[kLanes], gradient[kLanes];
      load(p + i, count, x);
      load(o + i, count, from);
      if (g != nullptr) {
        load(g + i, count, gradient);
      } else {
        for (int k = 0; k < kLanes; ++k) gradient[k] = C(0);
      }
      for (int k = 0; k < kLanes; ++k)
        add_displacement(x[k], from[k], gradient[k], adaptive, squares.lane[k], along.lane[k], ascent.lane[k]);
    });
    return cpu::DisplacementSums{squares.total(), along.total(), ascent.total()};
  });
}

static cpu::DirectionSums direction_sums(DType dtype, const void* tilted, const void* plain, int64_t n) {
  return for_dtype(dtype, [&](auto* t) {
    using T = std::remove_pointer_t<decltype(t)>;
    using C = compute_t<T>;
    LaneSum squares, product, plain_squares;
    for_blocks<kLanes>(n, [&](int64_t i, auto count) {
      C a[kLanes], g[kLanes];
      load(static_cast<const T*>(tilted) + i, count, a);
      load(static_cast<const C*>(plain) + i, count, g);
      for (int k = 0; k < kLanes; ++k)
        add_products(static_cast<double>(a[k]), static_cast<double>(g[k]), squares.lane[k], product.lane[k],
                     plain_squares.lane[k]);
    });
    return cpu::DirectionSums{squares.total(), product.total(), plain_squares.total()};
  });
}

}  // namespace cpu_apply
}  // namespace TSAM_ISA
}  // namespace tsam
