// Part of core_test.cpp, whose check() it uses: sums in pairs of float32 against long double.
//
// Invariant: a sum's error is measured against the sum of the sizes of its terms, so that cancelling terms are in it
// too.
#pragma once

#include <cmath>

#include "../../csrc/core/hmc.h"
#include "../../csrc/core/perturb.h"
#include "../../csrc/core/sums.h"

// The draws of a sum's terms: numbers of about `size`, of both signs, some of them far smaller.
static float term(uint64_t i, double size) {
  float z[4];
  normals<1>(make_stream(5, 3, kMomentum, 1), i / 4, z);
  return static_cast<float>(static_cast<double>(z[i % 4]) * (i % 7 == 0 ? 1e-6 * size : size));
}

static void sums() {
  double worst = 0.0;
  PairSum halves[2] = {};
  long double exact = 0.0L, sizes = 0.0L;
  for (uint64_t i = 0; i < 4096; ++i) {
    const float x = term(i, 1.0), y = term(i + 5000, 3.0);
    halves[i / 2048].add_product(x, y);
    exact += static_cast<long double>(x) * y;
    sizes += std::fabs(static_cast<long double>(x) * y);
  }
  PairSum all = halves[0];
  all.merge(halves[1]);
  worst = static_cast<double>(std::fabs(exact - all.value()) / sizes);
  check(worst < 1e-13, "4,096 products in float32 pairs are right to 1e-13 of their sizes");

  bool ok = true;
  for (const double size : {1e-44, 1e-30, 1e-22, 1e-10, 1.0, 1e10, 1e16, 1e25, 1e38}) {
    RangedSum sum = {};
    long double squares = 0.0L;
    for (uint64_t i = 0; i < 256; i += 4) {
      float x[4];
      for (uint64_t k = 0; k < 4; ++k) {
        x[k] = term(i + k, size / 7.0);
        squares += static_cast<long double>(x[k]) * x[k];
      }
      sum.add_products(x, x);
    }
    ok = ok && squares > 0.0L && std::fabs(sum.value() - squares) <= 1e-12L * squares;
    ok = ok && (sum.rest != 0.0) == (size < 1e-15 || size > 1e15);
  }
  check(ok, "a sum of squares of any float32 is right to 1e-12, in float64 only where it has to be");
  RangedSum zeros = {}, infinite = {}, nan = {};
  const float none[2] = {0.0f, -0.0f}, one[2] = {1.0f, -INFINITY}, two[2] = {NAN, 1.0f};
  zeros.add_products(none, none);
  infinite.add_products(one, one);
  nan.add_products(two, two);
  check(zeros.value() == 0.0 && zeros.rest == 0.0 && infinite.value() == INFINITY && std::isnan(nan.value()),
        "nothing, infinities and NaN come out as they are");
  PairSum overflown = {};
  overflown.add_product(1e30f, 1e30f);
  overflown.add_product(1.0f, 1.0f);
  check(overflown.value() == INFINITY, "a pair that overflows is infinite, not NaN");
}

static void units() {
  bool ok = true;
  for (const double a : {1e-5, 0.3, -2.0, 1e3, 7e12}) {
    const double unit = energy_unit(a);
    ok = ok && unit <= std::fabs(a) && 2.0 * unit > std::fabs(a) && unit * per_unit(static_cast<float>(unit)) == 1.0;
  }
  ok = ok && energy_unit(0.0) == 0.0f && per_unit(0.0f) == 0.0 && energy_unit(1e-200) == 0x1p-20f;
  ok = ok && energy_unit(1e300) == 0x1p60f && energy_unit(NAN) == 0x1p60f;
  check(ok, "an energy's unit is the power of two below its kick, within its range, and 0 for none");
  // Gradients that float32 cannot square, at the kick that makes them count.
  for (const double size : {1e-28, 1e-12, 1.0, 1e12}) {
    const HmcKick<float> kick{static_cast<float>(1.0 / size)};
    const HmcKick<double> wide{1.0 / size};
    const float unit = energy_unit(1.0 / size);
    PairSum pq = {}, qq = {};
    double pq_wide = 0.0, qq_wide = 0.0;
    for (uint64_t i = 0; i < 1000; ++i) {
      const float q = term(i, size);
      float p = term(i + 9000, 1.0);
      double p_wide = p;
      kick(1.0f, q, p, unit, pq, qq);
      wide(1.0, static_cast<double>(q), p_wide, pq_wide, qq_wide);
      ok = ok && std::fabs(p - p_wide) <= 1e-6 * (1.0 + std::fabs(p_wide));
    }
    const double per = per_unit(unit);
    ok = ok && std::fabs(pq.value() * per - pq_wide) <= 1e-11 * size * 1000.0;
    ok = ok && std::fabs(qq.value() * per * per - qq_wide) <= 1e-11 * qq_wide;
  }
  check(ok, "the dot products of a kick, whatever the size of its gradient");
}

static void displacements() {
  bool ok = true;
  for (const bool adaptive : {false, true})
    for (const double size : {1e-25, 1e-3, 1.0, 1e20}) {
      RangedSum sums[3] = {};
      WideSum wide[3] = {};
      for (uint64_t i = 0; i < 400; i += 4) {
        float x[4], o[4], g[4];
        double x_wide[4], o_wide[4], g_wide[4];
        for (uint64_t k = 0; k < 4; ++k) {
          o[k] = (i + k) % 9 == 0 ? 0.0f : term(i + k, 1.0);
          x[k] = (i + k) % 5 == 0 || o[k] == 0.0f ? o[k] : o[k] + term(i + k + 700, 1e-3);
          g[k] = term(i + k + 1400, size);
          x_wide[k] = x[k], o_wide[k] = o[k], g_wide[k] = g[k];
        }
        add_displacements(x, o, g, adaptive, sums[0], sums[1], sums[2]);
        add_displacements(x_wide, o_wide, g_wide, adaptive, wide[0], wide[1], wide[2]);
      }
      const double sizes = std::sqrt(wide[0].sum * wide[2].sum);
      ok = ok && std::fabs(sums[0].value() - wide[0].sum) <= 1e-12 * wide[0].sum;
      ok = ok && std::fabs(sums[1].value() - wide[1].sum) <= 1e-12 * (adaptive ? 10.0 : 1.0) * sizes;
      ok = ok && std::fabs(sums[2].value() - wide[2].sum) <= 1e-12 * wide[2].sum && wide[2].sum > 0.0;
    }
  check(ok, "displacements in float32 pairs are those in float64");
}

// Means of rows by weights from 0 to 1: right to a rounding of float32 beside the sizes of the terms, for numbers of
// any size side by side, in float64 only where there are large ones.
static void row_means() {
  bool ok = true, apart = true;
  for (const double size : {1e-45, 1e-40, 1e-30, 1e-6, 1.0, 1e6, 1e12, 1e30, 1e38})
    for (const double other : {0.0, 1e-42, 1.0, 1e20}) {
      RowMeans<float, 2> means = {};
      long double exact[2] = {}, sizes[2] = {};
      for (uint64_t i = 0; i < 300; ++i) {
        const double weight = std::exp(-0.7 * static_cast<double>(i));  // down to 1e-91
        const float x[2] = {term(i, size / 7.0), term(i + 400, other / 7.0)};
        means.add(weight_pair(weight), weight, x);
        for (int k = 0; k < 2; ++k) {
          exact[k] += static_cast<long double>(weight) * x[k];
          sizes[k] += std::fabs(static_cast<long double>(weight) * x[k]);
        }
      }
      for (int k = 0; k < 2; ++k) {
        const long double error = std::fabs(exact[k] - means.mean(k)), value = std::fabs(exact[k] - means.value(k));
        // Half a unit in the last place, which is never below half of 2^-149.
        ok = ok && error <= 0x1.001p-24L * std::fabs(exact[k]) + 1e-12L * sizes[k] + 0x1.001p-150L;
        ok = ok && value <= 1e-12L * sizes[k] + 1e-55L;
      }
      apart = apart && means.wide == (size > 1e9 || other > 1e9);
    }
  check(ok, "means of rows are right to one rounding, whatever the sizes of numbers and weights");
  check(apart, "and float64 has a part in them for large numbers alone");
  const float odd[4] = {INFINITY, NAN, 0.0f, -0.0f};
  for (const double weight : {1.0, 1e-217, 0.0, kNaN}) {
    RowMeans<float, 4> means = {};
    means.add(weight_pair(weight), weight, odd);
    for (int k = 0; k < 4; ++k) {
      const float want = static_cast<float>(weight * static_cast<double>(odd[k])), got = means.mean(k);
      check(got == want || (std::isnan(got) && std::isnan(want)), "what is not finite enters a mean as in float64");
    }
  }
}
