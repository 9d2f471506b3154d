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

// Taylor series about the nearest quarter turn, which is taken off as a sum of two numbers: error below 3e-16, and the
// same bits on host and device. The library's own need local memory on a device, for angles far beyond any
// trajectory's.
TSAM_HD void sine_cosine(double angle, double& sine, double& cosine) {
  const double quarters = rint(angle * 0.6366197723675814),
               x = fma(-quarters, 6.123233995736766e-17, fma(-quarters, 1.5707963267948966, angle));
  const double x2 = x * x;
  double s = -1.0 / 1307674368000.0;
  s = fma(s, x2, 1.0 / 6227020800.0);
  s = fma(s, x2, -1.0 / 39916800.0);
  s = fma(s, x2, 1.0 / 362880.0);
  s = fma(s, x2, -1.0 / 5040.0);
  s = fma(s, x2, 1.0 / 120.0);
  s = fma(s, x2, -1.0 / 6.0);
  s = fma(x * x2, s, x);
  double c = 1.0 / 20922789888000.0;
  c = fma(c, x2, -1.0 / 87178291200.0);
  c = fma(c, x2, 1.0 / 479001600.0);
  c = fma(c, x2, -1.0 / 3628800.0);
  c = fma(c, x2, 1.0 / 40320.0);
  c = fma(c, x2, -1.0 / 720.0);
  c = fma(c, x2, 1.0 / 24.0);
  c = fma(x2 * x2, c, fma(-0.5, x2, 1.0));
  // In floating point: what is not finite has no quarter turn and comes out as NaN.
  const double turn = quarters - 4.0 * floor(0.25 * quarters);
  const bool odd = turn == 1.0 || turn == 3.0;
  sine = odd ? c : s;
  cosine = odd ? s : c;
  if (turn >= 2.0) sine = -sine;
  if (turn == 1.0 || turn == 2.0) cosine = -cosine;
}

TSAM_HD Drift rotation_drift(double h) {
  double sine, cosine;
  sine_cosine(h, sine, cosine);
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
  double cosine, sine;
  sine_cosine(angle, sine, cosine);
  sine = q > 0.0 ? sine / q : -cosine * 2.0 * chords * w / vv;
  // The last hit is keep n + sine v, and v' = turn n + keep v.
  const double keep = fma(-sine, w, cosine), turn = fma(sine, w2 - q2, -2.0 * w * cosine);
  const double a = fma(after, turn, keep);
  return Drift{a, fma(a, tau, fma(after, keep, sine)), turn, fma(turn, tau, keep), chords + 1.0};
}

// A coefficient as a sum of two numbers of the compute type: at d = 1e7 a typical gap 1 - |u|^2 is 1e-7, the size of a
// float32 rounding of the coefficients, the same for all elements, which would not average out.
template <typename C>
struct DriftMap {
  C a, b, c, d, a_rest, b_rest, c_rest, d_rest;

  TSAM_HD explicit DriftMap(const Drift& map)
      : a(static_cast<C>(map.a)),
        b(static_cast<C>(map.b)),
        c(static_cast<C>(map.c)),
        d(static_cast<C>(map.d)),
        a_rest(rest(map.a, a)),
        b_rest(rest(map.b, b)),
        c_rest(rest(map.c, c)),
        d_rest(rest(map.d, d)) {}

  template <typename V>
  TSAM_HD void operator()(V& u, V& v) const {
    const V x = u, y = v;
    u = mapped(a, a_rest, b, b_rest, x, y);
    v = mapped(c, c_rest, d, d_rest, x, y);
  }

 private:
  // Nothing where the coefficient is no finite number of the type: the rounded one says so.
  TSAM_HD static C rest(double exact, C rounded) {
    const C left = static_cast<C>(exact - static_cast<double>(rounded));
    return left - left == C(0) ? left : C(0);
  }
  template <typename V>
  TSAM_HD static V mapped(C a, C a_rest, C b, C b_rest, const V& x, const V& y) {
    if constexpr (sizeof(C) == sizeof(double)) return fused(V(a), x, V(b) * y);
    return fused(V(a), x, fused(V(b), y, fused(V(a_rest), x, V(b_rest) * y)));
  }
};

TSAM_CORE_END
