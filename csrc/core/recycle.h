// Recycling: which states of a trajectory enter the weighted mean, and with what share.
//
//   state n: exponent log alpha_n + (t - delta) L_n,  alpha_n = min(1, e^(H_0 - H_n));  start: log sum (1 - alpha_n)
//
// Layout: the chain's scalars (metropolis.h) and the step's (tilt.h), of which one row a counted state. Invariant: a
// state with share 0 is never looked at, and a state counted several times is one weight in the effective sample size.
#pragma once

#include "metropolis.h"
#include "tilt.h"

namespace tsam {

enum class Part : int { kInner = 0, kStart = 1, kEnd = 2 };

}  // namespace tsam

TSAM_CORE_BEGIN

TSAM_HD void recycle_state(double* chain, double* state, double loss, double share, int64_t row, Part part,
                           bool metropolis, bool skip_nonfinite, bool last) {
  if (part == Part::kStart) {
    count_sample(state, chain[kStartLoss], log(chain[kRejected]), kNaN, row, skip_nonfinite, last);
    tilt_join(state);
    return;
  }
  const double energy = part == Part::kInner ? inner_state(chain, loss, share, metropolis) : chain[kEnergy];
  count_sample(state, loss, log(chain[kAlpha]), energy, row, skip_nonfinite, last);
  if (part == Part::kEnd && chain[kTaken] != 0.0) state[kHeld] = state[kNewest];
}

TSAM_CORE_END
