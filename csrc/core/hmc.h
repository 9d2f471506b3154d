// The elements of HMC's passes, in scaled coordinates: x the position, p the momentum, q the gradient with respect to
// x.
//
//   theta = theta_0 + T x,  T = scale D,  q = T g;   kick p += a q;   drift (x, p) <- four coefficients of (x, p)
//   scale: rho / sqrt(d) (gaussian prior), rho (ball), 1 (flat);  D = 1 or |theta_0|
//
// V is one element of the compute type or lanes of it (cpu/lanes.h). Invariant: what feeds an accept test or a drift
// coefficient is summed in float64; a kick's energy is a p.q + a^2/2 q.q with the momentum before the kick.
#pragma once

#include "drift.h"

namespace tsam {

enum class Prior : int { kGaussian = 0, kBall = 1, kFlat = 2 };

// What a pass sums over its elements.
struct HmcSums {
  double pq = 0.0, qq = 0.0;            // of the kick
  double uu = 0.0, uv = 0.0, vv = 0.0;  // for the ball's drift
  double moved = 0.0;                   // |x - start|^2
};

}  // namespace tsam

TSAM_CORE_BEGIN

// T as one multiplication an element.
template <typename C>
struct HmcScale {
  C scale;
  bool adaptive;

  template <typename V>
  TSAM_HD V operator()(const V& origin) const {
    return adaptive ? V(scale) * magnitude(origin) : V(scale);
  }
};

// theta from x, one multiply-add.
template <typename V>
TSAM_HD V hmc_move(const V& origin, const V& t, const V& x) {
  return fused(t, x, origin);
}

// p += a q, after the dot products of the energy.
template <typename C>
struct HmcKick {
  C a;

  template <typename V, typename D>
  TSAM_HD void operator()(const V& t, const V& grad, V& p, D& pq, D& qq) const {
    const V q = t * grad;
    const D wide = widened(q);
    pq = fused(widened(p), wide, pq);
    qq = fused(wide, wide, qq);
    p = fused(V(a), q, p);
  }

  // The same into sums of core/sums.h, which count q in steps of 1 / unit (energy_unit): p.q unit and q.q unit^2.
  template <typename Sum>
  TSAM_HD void operator()(C t, C grad, C& p, C unit, Sum& pq, Sum& qq) const {
    const C q = t * grad, counted = unit * q;
    pq.add_product(p, counted);
    qq.add_product(counted, counted);
    p = fused(a, q, p);
  }
};

// What feeds an energy is looked at where a q is of the size of p, however large or small q itself may be: a power of
// two beside |a|, within what leaves float32 its range; 0 where no kick has an energy.
TSAM_HD float energy_unit(double a) {
  if (a == 0.0) return 0.0f;
  constexpr uint32_t kLeast = (127u - 20u) << 23, kMost = (127u + 60u) << 23;
  const uint32_t power = bits_from_float(static_cast<float>(a)) & 0x7F800000u;
  return float_from_bits(power < kLeast ? kLeast : power > kMost ? kMost : power);
}

// 1 / unit; 0 for 0.
TSAM_HD double per_unit(float unit) {
  return unit == 0.0f ? 0.0 : static_cast<double>(float_from_bits((254u << 23) - bits_from_float(unit)));
}

// sum += x y
template <typename V, typename D>
TSAM_HD void add_product(const V& x, const V& y, D& sum) {
  sum = fused(widened(x), widened(y), sum);
}

// The factor of T that does not depend on the parameter.
TSAM_HD double prior_scale(Prior prior, int64_t dimension) {
  const double d = static_cast<double>(dimension > 0 ? dimension : 1);
  return prior == Prior::kGaussian ? 1.0 / sqrt(d) : 1.0;
}

// The time of one drift: step_size is an angle (gaussian), a length (ball), itself (flat).
TSAM_HD double drift_time(Prior prior, int64_t dimension, double step_size) {
  const double d = static_cast<double>(dimension > 0 ? dimension : 1);
  return prior == Prior::kBall ? step_size / sqrt(d) : step_size;
}

TSAM_HD Drift prior_drift(Prior prior, double h, const HmcSums& dots) {
  if (prior == Prior::kGaussian) return rotation_drift(h);
  if (prior == Prior::kBall) return ball_drift(dots.uu, dots.uv, dots.vv, h);
  return Drift{1.0, h, 0.0, 1.0, 0.0};
}

TSAM_CORE_END
