// Weighted sums of rows, a block of elements at a time: in float64, the rows in order.
#pragma once

#include <cstdint>

#include "../core/weights.h"
#include "apply.h"

namespace tsam {
inline namespace TSAM_ISA {
namespace cpu_apply {

template <int W, typename T, typename Count>
static void add_rows(double (&sum)[W], const T* values, int64_t row, int64_t step, Count count, int64_t rows,
                     const double* weights) {
  for (int64_t j = 0; j < rows; ++j) {
    double x[W];
    const T* v = values + j * row;
    if (step == 1) {
      load(v, count, x);
    } else {
      for (int k = 0; k < W; ++k) x[k] = k < count ? static_cast<double>(to_compute(v[k * step])) : 0.0;
    }
    WeightedSum{weights[j]}(x, sum);
  }
}

// A whole block of rows that lie as the result does.
template <typename C>
static void sum_rows(C* out, const C* values, int64_t row, int64_t rows, const double* weights) {
  constexpr int W = Lanes<C>::kCount;
  for (int k = 0; k < kLanes; k += W) {
    Lanes<double> sum(0.0);
    for (int64_t j = 0; j < rows; ++j)
      sum = WeightedSum{weights[j]}.added(widened(Lanes<C>(values + j * row + k)), sum);
    double wide[W];
    sum.store(wide);
    for (int i = 0; i < W; ++i) out[k + i] = static_cast<C>(wide[i]);
  }
}

}  // namespace cpu_apply
}  // namespace TSAM_ISA
}  // namespace tsam
