// The accept test of HMC and the adaptation of its step size, as a scalar state machine.
//
//   dH = sum over kicks (a p.q + a^2/2 q.q) - delta (L_N - L_0);  accept when log U < -dH
//   log_step += 0.05 (mean over the step of min(1, e^-dH) - 0.8)
//
// Layout: one float64 array of kChain slots, which kernels read and write and the host never does. Two buffers hold
// states: the chain's is number kCurrent, the other takes the proposal. Invariant: acceptance flips kCurrent and
// copies nothing; no absolute kinetic energy is ever formed, as its rounding alone would exceed dH.
#pragma once

#include "dtype.h"

namespace tsam {

enum ChainSlot : int {
  kDelta = 0,
  kLogStep = 1,     // kept from step to step, as kCurrent is
  kCurrent = 2,     // 0 or 1
  kLoss = 3,        // two slots: the loss of each buffer's state
  kEnergy = 5,      // of the running trajectory: what its kicks added; after its end dH
  kAcceptance = 6,  // sum of min(1, e^-dH)
  kTrajectories = 7,
  kAccepted = 8,
  kDivergent = 9,  // |dH| above kDivergence, or anything not finite
  kChain = 10
};

constexpr double kDivergence = 1000.0, kTargetAcceptance = 0.8, kAdaptationRate = 0.05;

}  // namespace tsam

TSAM_CORE_BEGIN

TSAM_HD void chain_create(double* s, double log_step) {
  for (int i = 0; i < kChain; ++i) s[i] = 0.0;
  s[kLogStep] = log_step;
}

// A new step has a new loss function: the state stays, its loss is another.
TSAM_HD void chain_begin(double* s, double delta, double loss) {
  const double log_step = s[kLogStep], current = s[kCurrent];
  chain_create(s, log_step);
  s[kDelta] = delta;
  s[kCurrent] = current;
  s[kLoss + static_cast<int>(current)] = loss;
}

TSAM_HD void trajectory_begin(double* s) { s[kEnergy] = 0.0; }

// The kick p += a q, from the dot products of q with itself and with p before the kick.
TSAM_HD void kick_energy(double* s, double a, double pq, double qq) { s[kEnergy] += a * fma(0.5 * a, qq, pq); }

// Decides on the proposal with the given loss; `stream` has the purpose kAccept and the trajectory's number. What is
// not finite is rejected: a loss of +inf would otherwise be the best of all.
TSAM_HD bool trajectory_end(double* s, double loss, const Stream& stream) {
  const int current = static_cast<int>(s[kCurrent]), proposed = 1 - current;
  s[kLoss + proposed] = loss;
  const double energy = fma(-s[kDelta], loss - s[kLoss + current], s[kEnergy]);
  const bool finite = fabs(energy) < kInfinity && fabs(loss) < kInfinity;
  const bool accepted = finite && log(scalar_uniform(stream)) < -energy;
  s[kEnergy] = energy;
  s[kTrajectories] += 1.0;
  if (finite) s[kAcceptance] += energy > 0.0 ? exp(-energy) : 1.0;
  if (!finite || fabs(energy) > kDivergence) s[kDivergent] += 1.0;
  if (accepted) {
    s[kAccepted] += 1.0;
    s[kCurrent] = proposed;
  }
  return accepted;
}

// Once a step, after its trajectories.
TSAM_HD void adapt_step(double* s) {
  if (s[kTrajectories] > 0.0) s[kLogStep] += kAdaptationRate * (s[kAcceptance] / s[kTrajectories] - kTargetAcceptance);
}

TSAM_CORE_END
