// The direction that a full step leaves for the steps after it: what the tilted gradient A has beside the plain one.
//
//   c = A.G / G.G;  v = (A - c G) / |G|;  at a later step g <- g + |g| v
//
// with G the mean of the samples' first gradients (MATHEMATICS 7: v / |G| there, so that |g| alone is needed later and
// no scalar has to last). Layout: float64 slots, of which three say what the elements do, as in a step's state
// (tilt.h). Invariant: v is free of the loss's scale and orthogonal to G; where nothing is carried it is 0, never NaN.
#pragma once

#include "tilt.h"

namespace tsam {

enum DirectionSlot : int {
  kTiltedSquares = 0,  // A.A; in a later step g.g
  kProduct = 1,        // A.G
  kPlainSquares = 2,   // G.G
  kDirectionSums = 3,
  // kAction, kKeep and kAdd, where a step's state has them: G, later g, is blended as a mean is.
  kRatio = 8,  // |v| by MATHEMATICS 7, over |G|
  kDirectionSlots = 9
};

}  // namespace tsam

TSAM_CORE_BEGIN

// 1 / |G| has to be a float32.
constexpr double kSmallestNorm = 1e-37;

TSAM_HD void take_direction(double* d) {
  const double tilted = d[kTiltedSquares], product = d[kProduct], plain = d[kPlainSquares];
  const double c = product / plain, norm = sqrt(plain), rest = tilted - c * product;
  const bool finite = tilted < kInfinity && fabs(product) < kInfinity && plain < kInfinity;  // false for NaN
  // Below 1e-6 of A it is what rounding has left.
  const bool carries = finite && norm > kSmallestNorm && rest > 1e-12 * tilted;
  tilt_act(d, carries ? kBlend : kZero, -c / norm, 1.0 / norm);
  d[kRatio] = carries ? sqrt(rest) / norm : 0.0;
}

TSAM_HD void add_direction(double* d) {
  const double norm = sqrt(d[kTiltedSquares]);
  tilt_act(d, norm < kInfinity ? kBlend : kSkip, 1.0, norm);
}

TSAM_HD void add_products(double a, double g, double& tilted, double& product, double& plain) {
  tilted = fma(a, a, tilted);
  product = fma(a, g, product);
  plain = fma(g, g, plain);
}

TSAM_CORE_END
