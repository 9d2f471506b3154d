// The accept test of HMC and the adaptation of its step size, as a scalar state machine.
//
//   dH = sum over kicks (a p.q + a^2/2 q.q) - delta (L_N - L_0);  accept when log U < -dH
//   log_step += 0.05 (mean over the step of min(1, e^-dH) - 0.8)
//   recycling: state n of a trajectory counts min(1, e^(H_0 - H_n)), its start what these lack of N
//
// Layout: one float64 array of kChain slots, which kernels read and write and the host never does. Three buffers hold
// positions: number kCurrent the chain's, kStart the one that this step began with (so that an exception can go back),
// and proposal_slot() the proposal. Invariant: acceptance changes kCurrent and copies nothing; no absolute kinetic
// energy is ever formed, as its rounding alone would exceed dH.
#pragma once

#include "dtype.h"

namespace tsam {

enum ChainSlot : int {
  kDelta = 0,
  kLogStep = 1,     // kept from step to step, as kCurrent is
  kCurrent = 2,     // 0, 1 or 2, kept too
  kLoss = 3,        // of the chain's state
  kEnergy = 4,      // of the running trajectory: what its kicks added; after its end dH
  kAcceptance = 5,  // sum of min(1, e^-dH)
  kTrajectories = 6,
  kAccepted = 7,
  kDivergent = 8,  // |dH| above kDivergence, or anything not finite
  kStart = 9,      // 0, 1 or 2
  kProposed = 10,  // |x' - x|^2 of the running trajectory
  kMoved = 11,     // sum of |x' - x| of the accepted ones
  kReflections = 12,
  kGradScale = 13,   // running mean of |T g| at the start of a step, kept too
  kGradScales = 14,  // how many it has seen, kept too
  kRounding = 15,    // delta |L| 2^-23: how far rounding of a float32 loss moves dH
  kTaken = 16,       // 1 if the last trajectory's proposal was accepted
  kBefore = 17,      // the energy before the last kick, and the kick: the state there closes with a part of it
  kKick = 18,
  kKickPq = 19,
  kKickQq = 20,
  kAlpha = 21,      // min(1, e^(H_0 - H_n)) of the last state looked at
  kRejected = 22,   // sum over the trajectory's states of 1 - alpha
  kStartLoss = 23,  // of the running trajectory
  kChainStep = 24,  // as kStep of core/tilt.h
  kTotals = 25,     // to 29: as kTotal there, of the sums of a pass
  kChain = 30
};

constexpr double kDivergence = 1000.0, kTargetAcceptance = 0.8, kAdaptationRate = 0.05, kGradScaleSteps = 20.0;

}  // namespace tsam

TSAM_CORE_BEGIN

TSAM_HD void chain_create(double* s, double log_step) {
  for (int i = 0; i < kChain; ++i) s[i] = 0.0;
  s[kLogStep] = log_step;
}

// 0, 1 or 2, whatever the array holds: it may come from a file.
TSAM_HD int buffer_number(double slot) { return slot == 1.0 ? 1 : slot == 2.0 ? 2 : 0; }

TSAM_HD int current_slot(const double* s) { return buffer_number(s[kCurrent]); }

// The buffer that takes the proposal: neither the chain's nor the step's first.
TSAM_HD int proposal_slot(const double* s) {
  const int current = current_slot(s), start = buffer_number(s[kStart]);
  if (current != start) return 3 - current - start;
  return current == 0 ? 1 : 0;
}

// A new step has a new loss function: the state stays, its loss is another.
TSAM_HD void chain_begin(double* s, double delta, double loss) {
  const double log_step = s[kLogStep], current = s[kCurrent], norm = s[kGradScale], norms = s[kGradScales];
  const double step = s[kChainStep];
  chain_create(s, log_step);
  s[kChainStep] = step;
  s[kDelta] = delta;
  s[kCurrent] = s[kStart] = current;
  s[kLoss] = loss;
  s[kGradScale] = norm;
  s[kGradScales] = norms;
  s[kRounding] = fabs(delta * loss) * 0x1p-23;
}

// The delta that lifts the sampled loss by about `scale` standard deviations: scale sqrt(d) / |T g|, the norm a mean
// over about kGradScaleSteps steps. A zero norm gives no lift.
TSAM_HD double automatic_delta(double* s, double scale, double norm, int64_t dimension) {
  if (norm < kInfinity) {
    s[kGradScales] = fmin(s[kGradScales] + 1.0, kGradScaleSteps);
    s[kGradScale] += (norm - s[kGradScale]) / s[kGradScales];
  }
  return s[kGradScale] > 0.0 ? scale * sqrt(static_cast<double>(dimension)) / s[kGradScale] : 0.0;
}

TSAM_HD void trajectory_begin(double* s) {
  s[kEnergy] = s[kProposed] = s[kRejected] = 0.0;
  s[kStartLoss] = s[kLoss];
}

TSAM_HD double kick_work(double a, double pq, double qq) { return a * fma(0.5 * a, qq, pq); }

// The kick p += a q, from the dot products of q with itself and with p before the kick.
TSAM_HD void kick_energy(double* s, double a, double pq, double qq) {
  s[kBefore] = s[kEnergy];
  s[kKick] = a;
  s[kKickPq] = pq;
  s[kKickQq] = qq;
  s[kEnergy] += kick_work(a, pq, qq);
}

TSAM_HD double energy_change(const double* s, double loss, double work) {
  return fma(-s[kDelta], loss - s[kStartLoss], work);
}

TSAM_HD void weigh_state(double* s, double energy, bool metropolis) {
  const bool finite = fabs(energy) < kInfinity;
  s[kAlpha] = !finite ? 0.0 : metropolis && energy > 0.0 ? exp(-energy) : 1.0;
  s[kRejected] += 1.0 - s[kAlpha];
}

// A state inside a trajectory, where the last kick ran through: `share` of that kick would have ended the trajectory
// here. Returns dH of such an end.
TSAM_HD double inner_state(double* s, double loss, double share, bool metropolis) {
  const double energy = energy_change(s, loss, s[kBefore] + kick_work(share * s[kKick], s[kKickPq], s[kKickQq]));
  weigh_state(s, energy, metropolis);
  return energy;
}

// Decides on the proposal with the given loss; `stream` has the purpose kAccept and the trajectory's number. What is
// not finite makes dH so, at delta = 0 too (0 * inf is NaN), and is rejected, with Metropolis or without: +inf would
// else be the best of losses.
TSAM_HD bool trajectory_end(double* s, double loss, const Stream& stream, bool metropolis = true) {
  const int proposed = proposal_slot(s);
  const double energy = energy_change(s, loss, s[kEnergy]);
  const bool finite = fabs(energy) < kInfinity;
  const bool accepted = finite && (!metropolis || log(scalar_uniform(stream)) < -energy);
  weigh_state(s, energy, metropolis);
  s[kEnergy] = energy;
  s[kTaken] = accepted ? 1.0 : 0.0;
  s[kTrajectories] += 1.0;
  if (finite) s[kAcceptance] += energy > 0.0 ? exp(-energy) : 1.0;
  if (!finite || fabs(energy) > kDivergence) s[kDivergent] += 1.0;
  if (accepted) {
    s[kAccepted] += 1.0;
    s[kCurrent] = proposed;
    s[kLoss] = loss;
    s[kMoved] += sqrt(s[kProposed]);
  }
  return accepted;
}

// Once a step, after its trajectories; never above `highest` (a rotation beyond a half turn comes back).
TSAM_HD void adapt_step(double* s, double highest = kInfinity) {
  if (s[kTrajectories] > 0.0)
    s[kLogStep] =
        fmin(s[kLogStep] + kAdaptationRate * (s[kAcceptance] / s[kTrajectories] - kTargetAcceptance), highest);
}

TSAM_CORE_END
