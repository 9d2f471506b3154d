// Streaming tilt: the weighted mean of gradients under weights n_j e^(t L_j), without keeping them.
//
//   e = t (L - L_first) + log n;  m' = max(m, e);  a = S e^(m - m');  b = e^(e - m');  S' = a + b
//   A <- (a / S') A + (b / S') g, the first counted sample assigns;  t = +-inf: greater replaces, equal averages
//
// Layout: one float64 tensor per step, kHeader slots and then kRow values per sample; kernels read and write it, the
// host never does. Invariant: A is at all times the normalised weighted mean of the samples counted so far.
#pragma once

#include "dtype.h"

namespace tsam {

enum Slot : int {
  kTilt = 0,
  kFirstLoss = 1,
  kMax = 2,         // m, or the best +-loss when t is infinite
  kSum = 3,         // S; 0: nothing counted yet; NaN: the result is NaN
  kSumSquares = 4,  // sum of the squared weights, on the scale of S
  kAction = 5,      // what the elements have to do next
  kKeep = 6,        // a / S'
  kAdd = 7,         // b / S'
  kNonfinite = 8,   // samples with a non-finite loss
  kNoiseScale = 9,
  kGradNorm = 10,
  kSaves = 11,   // saving ops that have finished in this step
  kNewest = 12,  // weight of the sample counted last, on the scale of S
  kHeld = 13,    // that of the state which a chain stands at, over all its counts, on the scale of S
  kStep = 14,    // the step of the noise, for ops that are told to look here (kStepHeld); no op writes it
  kTotal = 15,   // a sum over several devices, between the stages of an op
  kHeader = 16
};
enum RowSlot : int { kRowLoss = 0, kRowLogSize = 1, kRowGradNorm = 2, kRowEnergy = 3, kRow = 4 };

enum Action : int {
  kSkip = 0,    // this sample has no weight: its gradient is not read
  kAssign = 1,  // A = g, whatever A held
  kBlend = 2,   // A = keep A + add g
  kPoison = 3,  // A = NaN
  kZero = 4     // A = 0, whatever A held (direction.h)
};

}  // namespace tsam

TSAM_CORE_BEGIN

TSAM_HD void tilt_begin(double* s, double tilt, int64_t length) {
  for (int64_t i = 0; i < length; ++i)
    if (i != kStep) s[i] = i < kHeader ? 0.0 : kNaN;
  s[kTilt] = tilt;
  s[kMax] = -kInfinity;
}

TSAM_HD void tilt_act(double* s, Action action, double keep, double add) {
  s[kAction] = action;
  s[kKeep] = keep;
  s[kAdd] = add;
}

// What the elements have to do. A state in which no step has begun does not say: the result is NaN.
TSAM_HD int tilt_action(const double* s) {
  const double action = s[kAction];
  return action >= kSkip && action <= kZero ? static_cast<int>(action) : static_cast<int>(kPoison);
}

// Counts one sample and says what the elements do. `last` closes the step: if every sample was skipped there is
// no mean, and the result is NaN.
TSAM_HD void tilt_update(double* s, double loss, double log_size, bool skip_nonfinite, bool last) {
  const double tilt = s[kTilt];
  const bool counted_before = s[kSum] != 0.0;
  s[kNewest] = 0.0;
  if (log_size == -kInfinity) {  // before the loss is looked at, which may be anything
    tilt_act(s, kSkip, 1.0, 0.0);
  } else if (!(fabs(loss) < kInfinity)) {
    s[kNonfinite] += 1.0;
    if (!skip_nonfinite) s[kSum] = kNaN;
    tilt_act(s, kSkip, 1.0, 0.0);
  } else if (is_nan(s[kSum])) {
    tilt_act(s, kPoison, kNaN, kNaN);
  } else if (is_infinite(tilt)) {
    const double key = tilt > 0.0 ? loss : -loss, size = exp(log_size);
    if (!counted_before || key > s[kMax]) {
      s[kMax] = key;
      s[kHeld] = 0.0;
      s[kSum] = s[kNewest] = size;
      s[kSumSquares] = size * size;
      tilt_act(s, kAssign, 0.0, 1.0);
    } else if (key == s[kMax]) {
      const double before = s[kSum];
      s[kSum] = before + size;
      s[kNewest] = size;
      s[kSumSquares] += size * size;
      tilt_act(s, kBlend, before / s[kSum], size / s[kSum]);
    } else {
      tilt_act(s, kSkip, 1.0, 0.0);
    }
  } else {
    if (!counted_before) s[kFirstLoss] = loss;
    const double lift = tilt == 0.0 ? 0.0 : tilt * (loss - s[kFirstLoss]);
    const double e = lift + log_size;
    if (e == -kInfinity) {
      tilt_act(s, kSkip, 1.0, 0.0);
    } else if (!counted_before) {
      s[kMax] = e;
      s[kHeld] = 0.0;
      s[kSum] = s[kSumSquares] = s[kNewest] = 1.0;
      tilt_act(s, kAssign, 0.0, 1.0);
    } else {
      const double top = e > s[kMax] ? e : s[kMax];
      const double shrink = exp(s[kMax] - top), b = exp(e - top), a = s[kSum] * shrink;
      s[kMax] = top;
      s[kSum] = a + b;
      s[kSumSquares] = s[kSumSquares] * shrink * shrink + b * b;
      s[kHeld] *= shrink;
      s[kNewest] = b;
      tilt_act(s, kBlend, a / s[kSum], b / s[kSum]);
    }
  }
  if (last && s[kSum] == 0.0) s[kSum] = kNaN;
  if (is_nan(s[kSum])) tilt_act(s, kPoison, kNaN, kNaN);
}

// One sample of the step, with its row.
TSAM_HD void count_sample(double* state, double loss, double log_size, double energy, int64_t row, bool skip_nonfinite,
                          bool last) {
  double* const values = state + kHeader + kRow * row;
  tilt_update(state, loss, log_size, skip_nonfinite, last);
  values[kRowLoss] = loss;
  values[kRowLogSize] = log_size;
  values[kRowEnergy] = energy;
}

// What was counted last is the state that the chain stood at already: one state, one weight in the sum of squares.
TSAM_HD void tilt_join(double* s) {
  s[kSumSquares] += 2.0 * s[kHeld] * s[kNewest];
  s[kHeld] += s[kNewest];
}

// One lane block of the accumulator. Two coefficients, not A + c (g - A): that form loses the dominating
// sample's gradient when it is much smaller than what A holds.
template <typename C>
struct Accumulate {
  C keep, add;

  // V: a number, or lanes of them.
  template <typename V>
  TSAM_HD V mean(const V& grad, const V& accumulator) const {
    return fused(V(add), grad, V(keep) * accumulator);
  }
  template <int W>
  TSAM_HD void operator()(const C (&grad)[W], C (&accumulator)[W]) const {
    for (int i = 0; i < W; ++i) accumulator[i] = mean(grad[i], accumulator[i]);
  }
};

TSAM_CORE_END
