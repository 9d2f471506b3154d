// Batch tilt over s losses with shares p_j of the batch (sum 1): the value and the weights.
//
//   value = Lbar + log1p(sum_j p_j expm1(t (L_j - Lbar))) / t,  Lbar = sum_j p_j L_j;   weights_j ~ p_j e^(t L_j)
//
// tilt_summary gives them for the samples that a step has counted.
//
// Exact at the ends: t = 0 is the mean, t = +-inf the extreme with ties shared. The log1p form keeps all digits
// where t (L - Lbar) is small; where it is large the maximum is taken out instead, since expm1 would overflow.
#pragma once

#include "tilt.h"

TSAM_CORE_BEGIN

TSAM_HD double mean_loss(const double* losses, const double* shares, int64_t s) {
  double shift = 0.0;
  for (int64_t j = 0; j < s; ++j)
    if (losses[j] != losses[0]) shift += shares[j] * (losses[j] - losses[0]);
  return losses[0] + shift;
}

TSAM_HD double extreme_loss(const double* losses, int64_t s, bool greatest) {
  double best = losses[0];
  for (int64_t j = 0; j < s; ++j) {
    if (is_nan(losses[j])) return losses[j];
    if (greatest ? losses[j] > best : losses[j] < best) best = losses[j];
  }
  return best;
}

TSAM_HD double tilted_value(const double* losses, const double* shares, int64_t s, double tilt) {
  const double center = mean_loss(losses, shares, s);
  if (tilt == 0.0) return center;
  const double best = extreme_loss(losses, s, tilt > 0.0);
  if (is_infinite(tilt) || is_infinite(best)) return best;
  double sum = 0.0;
  if (fabs(tilt * (best - center)) < 0.5) {
    for (int64_t j = 0; j < s; ++j) sum += shares[j] * expm1(tilt * (losses[j] - center));
    return center + log1p(sum) / tilt;
  }
  for (int64_t j = 0; j < s; ++j) sum += shares[j] * exp(tilt * (losses[j] - best));
  return best + log(sum) / tilt;
}

TSAM_HD void tilted_softmax(const double* losses, const double* shares, int64_t s, double tilt, double* weights) {
  const double best = extreme_loss(losses, s, tilt > 0.0);
  double sum = 0.0;
  for (int64_t j = 0; j < s; ++j) {
    // Equal losses have equal weights at every tilt, also where inf - inf or 0 * inf would be NaN.
    const double lift = losses[j] == best || tilt == 0.0 ? 1.0 : exp(tilt * (losses[j] - best));
    weights[j] = is_nan(best) ? best : shares[j] * lift;
    sum += weights[j];
  }
  for (int64_t j = 0; j < s; ++j) weights[j] /= sum;
}

// Whether sample j takes part in a summary: not if it was skipped or has no share, unless the whole result is NaN.
TSAM_HD bool takes_part(const double* s, int64_t j) {
  const double* const row = s + kHeader + kRow * j;
  return (fabs(row[kRowLoss]) < kInfinity && row[kRowLogSize] > -kInfinity) || is_nan(s[kSum]);
}

// The weights of the samples that state has counted, then the effective sample size and the tilted loss; `out` has
// num_samples + 2 values, `scratch` room for 2 num_samples. Who takes no part has weight 0.
TSAM_HD void tilt_summary(const double* s, int64_t num_samples, double* scratch, double* out) {
  double *const losses = scratch, *const shares = scratch + num_samples;
  double rows = 0.0;
  int64_t n = 0;
  for (int64_t j = 0; j < num_samples; ++j) {
    const double* const row = s + kHeader + kRow * j;
    if (!takes_part(s, j)) continue;
    losses[n] = row[kRowLoss];
    shares[n] = exp(row[kRowLogSize]);
    rows += shares[n++];
  }
  double ess = kNaN, value = kNaN;
  for (int64_t i = 0; i < n; ++i) {
    shares[i] /= rows;
    out[i] = kNaN;
  }
  if (n > 0 && !is_nan(s[kSum])) {
    tilted_softmax(losses, shares, n, s[kTilt], out);
    value = tilted_value(losses, shares, n, s[kTilt]);
    ess = s[kSum] * s[kSum] / s[kSumSquares];
  }
  // From the end: the weight of a sample never lies behind its place.
  for (int64_t j = num_samples; j-- > 0;) out[j] = takes_part(s, j) ? out[--n] : 0.0;
  out[num_samples] = ess;
  out[num_samples + 1] = value;
}

TSAM_CORE_END
