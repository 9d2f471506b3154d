// The direction that a full step leaves for the steps after it: what the tilted gradient A has beside the plain one.
//
//   c = A.G / G.G;  v = (A - c G) / |G|;  at a later step g <- g + |g| v
//
// with G the mean of the samples' first gradients (MATHEMATICS 7: v / |G| there, so that |g| alone is needed later and
// no scalar has to last). Layout: float64 slots; elements are a blend with two coefficients (Accumulate, core/tilt.h).
// Invariant: v is free of the loss's scale and orthogonal to G; where nothing is carried it is 0, never NaN.
#pragma once

#include "dtype.h"

namespace tsam {

enum DirectionSlot : int {
  kTiltedSquares = 0,  // A.A; in a later step g.g
  kProduct = 1,        // A.G
  kPlainSquares = 2,   // G.G
  kDirectionSums = 3,
  kDirectionKeep = 3,  // of what is blended into: G, later g
  kDirectionAdd = 4,   // of A, later v; keep and add both 0: the result is 0, whatever there was
  kRatio = 5,          // |v| by MATHEMATICS 7, over |G|
  kDirectionSlots = 6
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
  d[kDirectionKeep] = carries ? -c / norm : 0.0;
  d[kDirectionAdd] = carries ? 1.0 / norm : 0.0;
  d[kRatio] = carries ? sqrt(rest) / norm : 0.0;
}

TSAM_HD void add_direction(double* d) {
  const double norm = sqrt(d[kTiltedSquares]);
  d[kDirectionKeep] = 1.0;
  d[kDirectionAdd] = norm < kInfinity ? norm : 0.0;
}

// What the elements have to do: without v there is nothing to blend.
TSAM_HD bool writes_zeros(const double* d) { return d[kDirectionKeep] == 0.0 && d[kDirectionAdd] == 0.0; }
TSAM_HD bool writes_nothing(const double* d) { return d[kDirectionKeep] == 1.0 && d[kDirectionAdd] == 0.0; }

TSAM_HD void add_products(double a, double g, double& tilted, double& product, double& plain) {
  tilted = fma(a, a, tilted);
  product = fma(a, g, product);
  plain = fma(g, g, plain);
}

TSAM_CORE_END
