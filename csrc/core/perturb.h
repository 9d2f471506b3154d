// How a sample leaves the parameters theta_0: by noise, and by ascent along the gradient there.
//
//   perturb: theta = theta_0 + (r_k nu) D z              nu = 1/sqrt(d), 1/|z| or U^(1/d)/|z|
//   ascend:  theta = theta   + (rho_k / |D g|) D (D g)   no ascent where |D g| = 0
//
// D = 1, or |theta_0| elementwise (adaptive, from the saved copy, never from the perturbed value).
// Invariant: one multiply-add per element, in the compute type; scalars come in float64 and are rounded once.
#pragma once

#include "sums.h"

namespace tsam {

// What nu is made of. The purpose's stream gives z (philox.h); z is divided by sqrt(d), or by its norm, which has to be
// summed over all elements before the first is written, and then multiplied by U^(1/d) where the ball is to be filled.
struct Noise {
  const char* name;
  Purpose purpose;
  bool needs_norm, fills_ball;
};

// The only list of them: an op's `noise` is an index, and Python gets the names from here (_C.__noises__).
constexpr Noise kNoises[] = {
    {"gaussian", kPerturbation, /*needs_norm=*/false, /*fills_ball=*/false},
    {"sphere", kPerturbation, /*needs_norm=*/true, /*fills_ball=*/false},
    {"ball", kPerturbation, /*needs_norm=*/true, /*fills_ball=*/true},
    {"rademacher", kSigns, /*needs_norm=*/false, /*fills_ball=*/false},  // signs have the norm sqrt(d) themselves
};
constexpr int64_t kNumNoises = sizeof kNoises / sizeof kNoises[0];

}  // namespace tsam

TSAM_CORE_BEGIN

template <typename C>
struct Perturb {
  C scale;
  bool adaptive;

  // A number, or a processor's vector of them.
  template <typename V>
  TSAM_HD V moved(const V& origin, const V& z) const {
    return fused(adaptive ? V(scale) * magnitude(origin) : V(scale), z, origin);
  }

  template <int W>
  TSAM_HD void operator()(const C (&origin)[W], const float (&z)[W], C (&position)[W]) const {
    for (int i = 0; i < W; ++i) position[i] = moved(origin[i], static_cast<C>(z[i]));
  }
};

template <typename C>
struct Ascend {
  C scale;
  bool adaptive;

  // V: a number, or lanes of them. By D^2 g, or by g.
  template <typename V>
  TSAM_HD V moved_by(const V& origin, const V& grad, const V& position) const {
    const V d = magnitude(origin);
    return fused(V(scale) * d, d * grad, position);
  }
  template <typename V>
  TSAM_HD V moved(const V& grad, const V& position) const {
    return fused(V(scale), grad, position);
  }
  template <int W>
  TSAM_HD void operator()(const C (&origin)[W], const C (&grad)[W], C (&position)[W]) const {
    if (adaptive) {
      for (int i = 0; i < W; ++i) position[i] = moved_by(origin[i], grad[i], position[i]);
    } else {
      for (int i = 0; i < W; ++i) position[i] = moved(grad[i], position[i]);
    }
  }
};

// How far an element has moved, in the units of D, and how far along the gradient: (change / D)^2, change g, (D g)^2.
// What is 0 under adaptive stays there. `grad` may be NaN or infinite, and the sums then are.
template <typename C>
TSAM_HD void add_displacement(C position, C origin, C grad, bool adaptive, double& squares, double& along,
                              double& ascent) {
  const double d = adaptive ? static_cast<double>(magnitude(origin)) : 1.0;
  const double change = static_cast<double>(position) - static_cast<double>(origin);
  const double moved = change == 0.0 ? 0.0 : change / d, scaled = d * static_cast<double>(grad);
  squares = fma(moved, moved, squares);
  along = fma(change, static_cast<double>(grad), along);
  ascent = fma(scaled, scaled, ascent);
}

// The same for W elements at once.
template <int W>
TSAM_HD void add_displacements(const double (&position)[W], const double (&origin)[W], const double (&grad)[W],
                               bool adaptive, WideSum& squares, WideSum& along, WideSum& ascent) {
  TSAM_UNROLL
  for (int k = 0; k < W; ++k)
    add_displacement(position[k], origin[k], grad[k], adaptive, squares.sum, along.sum, ascent.sum);
}

// In pairs of float32: change, change / D and D g are each a float32 and what that leaves.
template <int W>
TSAM_HD void add_displacements(const float (&position)[W], const float (&origin)[W], const float (&grad)[W],
                               bool adaptive, RangedSum& squares, RangedSum& along, RangedSum& ascent) {
  TSAM_UNROLL
  for (int k = 0; k < W; ++k) {
    const float d = adaptive ? magnitude(origin[k]) : 1.0f;
    float change_rest;
    const float change = two_sum(position[k], -origin[k], change_rest), inverse = 1.0f / d;
    const float moved = change == 0.0f ? 0.0f : change * inverse, scaled = d * grad[k];
    const bool stays = change == 0.0f, flat = grad[k] == 0.0f || (d == 0.0f && scaled == 0.0f);
    if ((stays || in_range(moved * moved)) && (stays || grad[k] == 0.0f || in_range(fabsf(change * grad[k]))) &&
        (flat || in_range(scaled * scaled))) {
      // (m + r)^2 = m^2 + 2 m r to within the pair's precision, and r makes up for what the inverse is rounded by.
      const float moved_rest = stays ? 0.0f : (fmaf(-moved, d, change) + change_rest) * inverse;
      squares.pair.add_product(moved, moved);
      squares.pair.low = fmaf(2.0f * moved, moved_rest, squares.pair.low);
      along.pair.add_product(change, grad[k]);
      along.pair.low = fmaf(change_rest, grad[k], along.pair.low);
      ascent.pair.add_product(scaled, scaled);
      ascent.pair.low = fmaf(2.0f * scaled, fmaf(d, grad[k], -scaled), ascent.pair.low);
    } else {
      add_displacement(position[k], origin[k], grad[k], adaptive, squares.rest, along.rest, ascent.rest);
    }
  }
}

// What makes unit vectors of normals whose sum of squares is known, and points of the ball.
TSAM_HD double sphere_scale(double sum_squares) { return sum_squares > 0.0 ? 1.0 / sqrt(sum_squares) : 0.0; }

TSAM_HD double ball_scale(int64_t dimension, double sum_squares, const Stream& radius_stream) {
  const double d = static_cast<double>(dimension > 0 ? dimension : 1);
  return sphere_scale(sum_squares) * pow(scalar_uniform(radius_stream), 1.0 / d);
}

// nu = scale z. The sum of squares of all z of the sample is looked at where the noise needs its norm.
TSAM_HD double noise_scale(const Noise& noise, int64_t dimension, double sum_squares, const Stream& radius_stream) {
  if (!noise.needs_norm) return 1.0 / sqrt(static_cast<double>(dimension > 0 ? dimension : 1));
  return noise.fills_ball ? ball_scale(dimension, sum_squares, radius_stream) : sphere_scale(sum_squares);
}

// A zero gradient has no direction: no ascent, and never 0/0. Infinite or NaN norms pass through as 0 * inf
// or NaN, so that a gradient scaler sees them in the result.
TSAM_HD double ascent_scale(double rho, double norm) { return norm == 0.0 ? 0.0 : rho / norm; }

TSAM_CORE_END
