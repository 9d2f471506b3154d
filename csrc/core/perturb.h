// How a sample leaves the parameters theta_0: by noise, and by ascent along the gradient there.
//
//   perturb: theta = theta_0 + (r_k nu) D z              nu = 1/sqrt(d), 1/|z| or U^(1/d)/|z|
//   ascend:  theta = theta   + (rho_k / |D g|) D (D g)   no ascent where |D g| = 0
//
// D = 1, or |theta_0| elementwise (adaptive, from the saved copy, never from the perturbed value).
// Invariant: one multiply-add an element, in the compute type; scalars come in float64 and are rounded once.
#pragma once

#include "dtype.h"

namespace tsam {

enum class Noise : int { kGaussian = 0, kSphere = 1, kBall = 2 };

}  // namespace tsam

TSAM_CORE_BEGIN

template <typename C>
struct Perturb {
  C scale;
  bool adaptive;

  template <int W>
  TSAM_HD void operator()(const C (&origin)[W], const float (&z)[W], C (&position)[W]) const {
    if (adaptive) {
      for (int i = 0; i < W; ++i) position[i] = fused(scale * magnitude(origin[i]), static_cast<C>(z[i]), origin[i]);
    } else {
      for (int i = 0; i < W; ++i) position[i] = fused(scale, static_cast<C>(z[i]), origin[i]);
    }
  }
};

template <typename C>
struct Ascend {
  C scale;
  bool adaptive;

  template <int W>
  TSAM_HD void operator()(const C (&origin)[W], const C (&grad)[W], C (&position)[W]) const {
    if (adaptive) {
      for (int i = 0; i < W; ++i) {
        const C d = magnitude(origin[i]);
        position[i] = fused(scale * d, d * grad[i], position[i]);
      }
    } else {
      for (int i = 0; i < W; ++i) position[i] = fused(scale, grad[i], position[i]);
    }
  }
};

// nu times what is still missing of a unit-norm draw, from the sum of squares of all z of the sample.
TSAM_HD double noise_scale(Noise noise, int64_t dimension, double sum_squares, const Stream& radius_stream) {
  const double d = static_cast<double>(dimension > 0 ? dimension : 1);
  if (noise == Noise::kGaussian) return 1.0 / sqrt(d);
  const double unit = sum_squares > 0.0 ? 1.0 / sqrt(sum_squares) : 0.0;
  return noise == Noise::kSphere ? unit : unit * pow(scalar_uniform(radius_stream), 1.0 / d);
}

// A zero gradient has no direction: no ascent, and never 0/0. Infinite or NaN norms pass through as 0 * inf
// or NaN, so that a gradient scaler sees them in the result.
TSAM_HD double ascent_scale(double rho, double norm) { return norm == 0.0 ? 0.0 : rho / norm; }

TSAM_CORE_END
