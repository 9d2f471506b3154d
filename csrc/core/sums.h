// Sums of products in pairs of float32, for processors on which float64 is slow (many GPUs: a 64th of float32's rate).
//
//   x y = p + e exactly (one fma);  high + p = s + r exactly (six additions);  high = s, low += r + e
//
// Layout: PairSum is the unevaluated sum of two float32; RangedSum has a float64 beside it, for terms that float32
// cannot hold. All are made by = {}, as shared memory takes no constructors. Invariant: a PairSum of n terms is off by
// at most about n 2^-48 of the sum of their sizes, as long as that lies within kLeastTerms and kMostTerms; whoever
// cannot know that takes a RangedSum. A RowMean is one of numbers with weights: its terms need no lower end, as they
// are in units of 2^-48.
#pragma once

#include "dtype.h"

TSAM_CORE_BEGIN

// Below the first what float32 drops of an error could count (2^-149 against 2^-41 of the terms); above the second the
// terms of a block might overflow.
constexpr float kLeastTerms = 0x1p-106f, kMostTerms = 0x1p100f;

// a + b = the result + error
TSAM_HD float two_sum(float a, float b, float& error) {
  const float sum = a + b, of_b = sum - a;
  error = (a - (sum - of_b)) + (b - of_b);
  return sum;
}

struct PairSum {
  float high, low;

  // high + low + x + rest
  TSAM_HD void add(float x, float rest) {
    float error;
    high = two_sum(high, x, error);
    low += error + rest;
  }
  TSAM_HD void add_product(float x, float y) {
    const float p = x * y;
    add(p, fmaf(x, y, -p));
  }
  TSAM_HD void merge(const PairSum& other) { add(other.high, other.low); }

  // What is infinite or NaN has made a NaN of `low`.
  TSAM_HD double value() const {
    const double wide = static_cast<double>(high);
    return high - high == 0.0f ? wide + static_cast<double>(low) : wide;
  }
};

// float64 for who is summed in it anyway.
struct WideSum {
  double sum;

  TSAM_HD void add_product(double x, double y) { sum = fma(x, y, sum); }
  TSAM_HD void merge(const WideSum& other) { sum += other.sum; }
  TSAM_HD double value() const { return sum; }

  template <int W>
  TSAM_HD void add_products(const double (&x)[W], const double (&y)[W]) {
    TSAM_UNROLL
    for (int k = 0; k < W; ++k) add_product(x[k], y[k]);
  }
};

// Whether float32 pairs may hold terms whose sizes add up to `size`. A NaN is never in range.
TSAM_HD bool in_range(float size) { return size >= kLeastTerms && size <= kMostTerms; }

// Any float32 terms: W of them at a time go into the pair, or, where that could not hold them, into float64.
struct RangedSum {
  PairSum pair;
  double rest;

  template <int W>
  TSAM_HD void add_products(const float (&x)[W], const float (&y)[W]) {
    float size = 0.0f;
    TSAM_UNROLL
    for (int k = 0; k < W; ++k) size += fabsf(x[k] * y[k]);
    if (in_range(size)) {
      TSAM_UNROLL
      for (int k = 0; k < W; ++k) pair.add_product(x[k], y[k]);
    } else {
      // Zeros, as whole rows of an embedding's gradient are, stay out of float64.
      TSAM_UNROLL
      for (int k = 0; k < W; ++k)
        if (x[k] != 0.0f && y[k] != 0.0f) rest = fma(static_cast<double>(x[k]), static_cast<double>(y[k]), rest);
    }
  }
  TSAM_HD double value() const { return pair.value() + rest; }
};

// A weight from 0 to 1 in units of 2^-48. What its pair drops is below 2^-198: nothing beside the smallest float32.
constexpr double kWeightUnit = 0x1p-48;
constexpr float kMostWeighted = 0x1p76f;

TSAM_HD PairSum weight_pair(double weight) {
  const double units = weight / kWeightUnit;
  const float high = static_cast<float>(units);
  return PairSum{high, static_cast<float>(units - static_cast<double>(high))};
}

// W means side by side of rows that weights multiply. In float32 pairs, but for rows of numbers above 2^28 and those
// that are not finite; `wide`: there were such.
template <typename C, int W>
struct RowMeans {
  PairSum near[W];
  WideSum rest[W];
  bool wide;

  // `pair` is that of `weight`, which is read only where it is needed.
  TSAM_HD void add(const PairSum& pair, const double& weight, const float (&x)[W]) {
    float size = 0.0f;
    TSAM_UNROLL
    for (int k = 0; k < W; ++k) size += fabsf(pair.high * x[k]);
    if (size <= kMostWeighted) {
      TSAM_UNROLL
      for (int k = 0; k < W; ++k) {
        const float p = pair.high * x[k];
        near[k].add(p, fmaf(pair.low, x[k], fmaf(pair.high, x[k], -p)));
      }
    } else {
      wide = true;
      TSAM_UNROLL
      for (int k = 0; k < W; ++k) rest[k].add_product(weight, static_cast<double>(x[k]));
    }
  }

  TSAM_HD double value(int k) const { return fma(near[k].value(), kWeightUnit, rest[k].sum); }
  // Rounded once: without float64, unless that has a part in it or the result is subnormal.
  TSAM_HD float mean(int k) const {
    const float sum = near[k].high + near[k].low;
    const bool usual = !wide && (fabsf(sum) >= 0x1p-78f || sum == 0.0f);
    return usual ? sum * static_cast<float>(kWeightUnit) : static_cast<float>(value(k));
  }
};

template <int W>
struct RowMeans<double, W> {
  WideSum near[W];

  TSAM_HD void add(const PairSum&, const double& weight, const double (&x)[W]) {
    TSAM_UNROLL
    for (int k = 0; k < W; ++k) near[k].add_product(weight, x[k]);
  }
  TSAM_HD double value(int k) const { return near[k].sum; }
  TSAM_HD double mean(int k) const { return near[k].sum; }
};

// By compute type: terms that are known to be in range, and any.
template <typename C>
struct SumsOf {
  using Near = PairSum;
  using Any = RangedSum;
};
template <>
struct SumsOf<double> {
  using Near = WideSum;
  using Any = WideSum;
};
template <typename C>
using near_sum_t = typename SumsOf<C>::Near;
template <typename C>
using any_sum_t = typename SumsOf<C>::Any;

TSAM_CORE_END
