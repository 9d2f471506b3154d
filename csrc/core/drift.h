// The exact drifts of HMC: position u and momentum v after the time h, one linear map of the pair for all elements.
//
//   u' = a u + b v,  v' = c u + d v
//   gaussian: rotation by the angle h;  ball: straight on inside |u| <= 1, reflected at every hit, in closed form
//
// Layout: four float64 coefficients, of h alone or of u.u, u.v and v.v too; u and v are mapped in place, side by side.
// Invariant: reversible (negate v), determinant 1; |u|^2 + |v|^2 (gaussian) or |v| and |u| <= 1 (ball) are conserved.
#pragma once

#include "dtype.h"

namespace tsam {

struct Drift {
  double a, b, c, d;
  double reflections;  // 0: no hit; a slide along the wall counts as one
};

}  // namespace tsam

TSAM_CORE_BEGIN

TSAM_HD Drift rotation_drift(double h) {
  const double cosine = cos(h), sine = sin(h);
  return Drift{cosine, sine, -sine, cosine, 0.0};
}

// h >= 0. The first hit is n = u + tau v with n.v = w; between later hits lies the chord, 2 w / v.v in time and phi in
// angle, so that m of them turn n by m phi in the plane of n and v. Below w = 1e-14 |v| the chords have no length to
// count: the point slides along the great circle. A NaN or infinity in a dot product comes out as NaN coefficients,
// or meets the same NaN in the elements.
TSAM_HD Drift ball_drift(double uu, double uv, double vv, double h) {
  // Rounding may leave u just outside; it is then on the wall.
  const bool inside = !(uu > 1.0);
  const double gap = inside ? uu - 1.0 : 0.0;
  if (vv == 0.0) return Drift{1.0, h, 0.0, 1.0, 0.0};
  // Neither term of w^2 is negative: no cancellation, however close to the wall.
  const double w2 = fma(uv, uv, -vv * gap), w = sqrt(w2);
  const double tau = uv > 0.0 ? -gap / (uv + w) : (w - uv) / vv;
  if (h <= tau) return Drift{1.0, h, 0.0, 1.0, 0.0};
  // q^2 = v.v - w^2, written as the Gram determinant of u and v: exact to |u|^2 where u is short.
  const double gram = fma(-uv, uv, vv * (inside ? uu : 1.0)), q2 = gram > 0.0 ? gram : 0.0, q = sqrt(q2);
  const double rest = h - tau;
  double chords = 0.0, angle = rest * sqrt(vv), after = 0.0;
  if (w2 > 1e-28 * vv) {
    const double chord = 2.0 * w / vv;
    chords = floor(rest / chord);
    angle = chords * (2.0 * atan2(w, q));
    after = fma(-chords, chord, rest);
  }
  // With q = 0 every chord is a diameter and the cosine is (-1)^m.
  const double cosine = cos(angle), sine = q > 0.0 ? sin(angle) / q : -cosine * 2.0 * chords * w / vv;
  // The last hit is keep n + sine v, and v' = turn n + keep v.
  const double keep = fma(-sine, w, cosine), turn = fma(sine, w2 - q2, -2.0 * w * cosine);
  const double a = fma(after, turn, keep);
  return Drift{a, fma(a, tau, fma(after, keep, sine)), turn, fma(turn, tau, keep), chords + 1.0};
}

// Applied in float64 and rounded once to C: at d = 1e7 a typical gap 1 - |u|^2 is 1e-7, the size of a float32 rounding
// of the coefficients, and would be lost.
template <typename C>
struct DriftMap {
  double a, b, c, d;

  template <int W>
  TSAM_HD void operator()(C (&u)[W], C (&v)[W]) const {
    for (int i = 0; i < W; ++i) {
      const double x = static_cast<double>(u[i]), y = static_cast<double>(v[i]);
      u[i] = static_cast<C>(fma(a, x, b * y));
      v[i] = static_cast<C>(fma(c, x, d * y));
    }
  }
};

TSAM_CORE_END
