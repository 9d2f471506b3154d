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

// How terms are gone through: one after another here, by the threads of a block in csrc/cuda.
struct InOrder {
  template <typename Term>
  TSAM_HD double sum(int64_t n, const Term& term) const {
    double total = 0.0;
    for (int64_t j = 0; j < n; ++j) total += term(j);
    return total;
  }
  // The last of what combine makes of values 0 to n - 1.
  template <typename Value, typename Combine>
  TSAM_HD double fold(int64_t n, const Value& value, const Combine& combine) const {
    double result = value(0);
    for (int64_t j = 1; j < n; ++j) result = combine(result, value(j));
    return result;
  }
  template <typename Body>
  TSAM_HD void each(int64_t n, const Body& body) const {
    for (int64_t j = 0; j < n; ++j) body(j);
  }
};

// Losses and shares are anything with [j] in float64.
template <typename Losses, typename Shares, typename Terms = InOrder>
TSAM_HD double mean_loss(const Losses& losses, const Shares& shares, int64_t s, const Terms& terms = {}) {
  const double first = losses[0];
  return first + terms.sum(s, [&](int64_t j) { return losses[j] != first ? shares[j] * (losses[j] - first) : 0.0; });
}

// A NaN among them is the extreme.
template <typename Losses, typename Terms = InOrder>
TSAM_HD double extreme_loss(const Losses& losses, int64_t s, bool greatest, const Terms& terms = {}) {
  return terms.fold(
      s, [&](int64_t j) { return losses[j]; },
      [&](double best, double loss) {
        if (is_nan(best)) return best;
        return is_nan(loss) || (greatest ? loss > best : loss < best) ? loss : best;
      });
}

template <typename Losses, typename Shares, typename Terms = InOrder>
TSAM_HD double tilted_value(const Losses& losses, const Shares& shares, int64_t s, double tilt,
                            const Terms& terms = {}) {
  const double center = mean_loss(losses, shares, s, terms);
  if (tilt == 0.0) return center;
  const double best = extreme_loss(losses, s, tilt > 0.0, terms);
  if (is_infinite(tilt) || is_infinite(best)) return best;
  if (fabs(tilt * (best - center)) < 0.5) {
    const double sum = terms.sum(s, [&](int64_t j) { return shares[j] * expm1(tilt * (losses[j] - center)); });
    return center + log1p(sum) / tilt;
  }
  const double sum = terms.sum(s, [&](int64_t j) { return shares[j] * exp(tilt * (losses[j] - best)); });
  return best + log(sum) / tilt;
}

template <typename Losses, typename Shares, typename Terms = InOrder>
TSAM_HD void tilted_softmax(const Losses& losses, const Shares& shares, int64_t s, double tilt, double* weights,
                            const Terms& terms = {}) {
  const double best = extreme_loss(losses, s, tilt > 0.0, terms);
  const double sum = terms.sum(s, [&](int64_t j) {
    // Equal losses have equal weights at every tilt, also where inf - inf or 0 * inf would be NaN.
    const double lift = losses[j] == best || tilt == 0.0 ? 1.0 : exp(tilt * (losses[j] - best));
    return weights[j] = is_nan(best) ? best : shares[j] * lift;
  });
  terms.each(s, [&](int64_t j) { weights[j] /= sum; });
}

// One row of a weighted mean, lane by lane in float64; the mean is rounded once, at its end.
struct WeightedSum {
  double weight;

  // V: a number, or lanes of them.
  template <typename V>
  TSAM_HD V added(const V& x, const V& sum) const {
    return fused(V(weight), x, sum);
  }
  template <typename C, int W>
  TSAM_HD void operator()(const C (&x)[W], double (&sum)[W]) const {
    for (int i = 0; i < W; ++i) sum[i] = added(static_cast<double>(x[i]), sum[i]);
  }
};

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
