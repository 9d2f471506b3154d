// Batch tilt over s losses with shares p_j of the batch (sum 1): the value and the weights.
//
//   value = Lbar + log1p(sum_j p_j expm1(t (L_j - Lbar))) / t,  Lbar = sum_j p_j L_j;   weights_j ~ p_j e^(t L_j)
//
// Exact at the ends: t = 0 is the mean, t = +-inf the extreme with ties shared. The log1p form keeps all digits
// where t (L - Lbar) is small; where it is large the maximum is taken out instead, since expm1 would overflow.
#pragma once

#include "dtype.h"

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

TSAM_CORE_END
