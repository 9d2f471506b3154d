// The scalar side of a step of HMC: what each pass over the elements needs to know before, and what follows from its
// sums.
//
//   h = the time of a unit step;  a = kick delta h;  drift over drift * h;  delta given, or from |T g|
//
// Layout: the chain's scalars (metropolis.h), the step's (tilt.h) and a pass's sums (hmc.h). Invariant: everything here
// depends on device memory alone, so that a back end can run it where that memory is.
#pragma once

#include "hmc.h"
#include "recycle.h"

namespace tsam {

// A kick and a drift in units of the step size, from an integrator's list.
struct Substep {
  double kick, drift;
};

}  // namespace tsam

TSAM_CORE_BEGIN

TSAM_HD double step_time(const double* chain, Prior prior, int64_t dimension) {
  return drift_time(prior, dimension, exp(chain[kLogStep]));
}

TSAM_HD double kick_length(const double* chain, Prior prior, int64_t dimension, double kick) {
  return kick * chain[kDelta] * step_time(chain, prior, dimension);
}

// The unit of the last kick's sums, which are taken before its length is worked out: the kick before it was about as
// long.
TSAM_HD float last_kick_unit(const double* chain) {
  if (chain[kDelta] == 0.0) return 0.0f;
  return chain[kKick] == 0.0 ? 1.0f : energy_unit(chain[kKick]);
}

// `squares`: |T g|^2 of the step's first gradient, looked at where delta is automatic.
TSAM_HD void step_begin(double* chain, double* state, double loss, double tilt, double delta, bool automatic,
                        double squares, int64_t dimension) {
  const double density = automatic ? automatic_delta(chain, delta, sqrt(squares), dimension) : delta;
  chain_begin(chain, density, loss);
  state[kTilt] = tilt == density ? 0.0 : tilt - density;
}

// At the end of a trajectory: |x' - x|^2 in the units of x with a unit prior, from its sum over the elements.
TSAM_HD void proposal_moved(double* chain, double moved, Prior prior, int64_t dimension) {
  const double unit = prior_scale(prior, dimension);
  chain[kProposed] = unit * unit * moved;
}

// After the pass (the ball: passes) of a substep.
TSAM_HD void substep_end(double* chain, double a, const HmcSums& sums, const Drift& map, Prior prior, int64_t dimension,
                         bool measure) {
  chain[kReflections] += map.reflections;
  kick_energy(chain, a, sums.pq, sums.qq);
  if (measure) proposal_moved(chain, sums.moved, prior, dimension);
}

// The last kick's energy, the accept test, and (row >= 0) the sample's weight.
TSAM_HD void step_end(double* chain, double* state, double a, const HmcSums& sums, double loss, const Stream& accept,
                      int64_t row, bool metropolis, bool skip_nonfinite, bool last) {
  kick_energy(chain, a, sums.pq, sums.qq);
  trajectory_end(chain, loss, accept, metropolis);
  if (row >= 0) count_sample(state, chain[kLoss], 0.0, chain[kEnergy], row, skip_nonfinite, last);
}

TSAM_CORE_END
