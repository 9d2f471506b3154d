// The scalar work of Hamiltonian Monte Carlo between its passes, for finish_sums: core/trajectory.h by one thread.
//
// Layout: one functor for each place of an op where the CPU back end would look at a number; sums in the order of the
// pass that made them. Invariant: `chain` and `state` are read and written here and by no other thread of the launch.
#pragma once

#include "hmc_kernels.cuh"

namespace tsam {
namespace cuda {

// The scale of a draw from the ball's prior, or 1.
struct FinishPlace {
  double* scale;
  Prior prior;
  int64_t dimension;
  CountedStream radius_stream;

  TSAM_DEVICE void operator()(const double* sums) const {
    *scale = prior == Prior::kBall ? ball_scale(dimension, sums[0], stream_now(radius_stream)) : 1.0;
  }
};

struct StepBegin {
  double *chain, *state;
  Scalar loss, tilt, delta;
  bool automatic;
  int64_t dimension;

  TSAM_DEVICE void operator()(const double* sums) const {
    step_begin(chain, state, scalar_value(loss), scalar_value(tilt), scalar_value(delta), automatic, sums[0],
               dimension);
  }
};

// A substep's scalars: before its pass, and (the ball) once more when the sums for its drift are there.
struct SubstepScalars {
  double* chain;
  PassScalars* scalars;
  Prior prior;
  int64_t dimension;
  Substep substep;
  bool first, measure;

  TSAM_DEVICE double time() const { return substep.drift * step_time(chain, prior, dimension); }
};

struct SubstepBegin {
  SubstepScalars at;

  TSAM_DEVICE void operator()(const double*) const {
    if (at.first) trajectory_begin(at.chain);
    at.scalars->kick = kick_length(at.chain, at.prior, at.dimension, at.substep.kick);
    at.scalars->unit = energy_unit(at.scalars->kick);
    if (at.prior != Prior::kBall) at.scalars->set(prior_drift(at.prior, at.time(), HmcSums{}));
  }
};

struct BallDrift {
  SubstepScalars at;

  TSAM_DEVICE void operator()(const double* sums) const {
    HmcSums all;
    all.pq = sums[0];
    all.qq = sums[1];
    all.uu = sums[2];
    all.uv = sums[3];
    all.vv = sums[4];
    at.scalars->set(prior_drift(at.prior, at.time(), all));
    substep_end(at.chain, at.scalars->kick, all, at.scalars->map, at.prior, at.dimension, /*measure=*/false);
  }
};

struct WholeEnd {
  SubstepScalars at;

  TSAM_DEVICE void operator()(const double* sums) const {
    HmcSums all;
    all.pq = sums[0];
    all.qq = sums[1];
    all.moved = sums[2];
    substep_end(at.chain, at.scalars->kick, all, at.scalars->map, at.prior, at.dimension, at.measure);
  }
};

struct BallMoved {
  SubstepScalars at;

  TSAM_DEVICE void operator()(const double* sums) const { proposal_moved(at.chain, sums[0], at.prior, at.dimension); }
};

struct StepEnd {
  double *chain, *state;
  Scalar loss;
  CountedStream accept;
  Prior prior;
  int64_t dimension;
  double kick;
  int64_t row;
  bool metropolis, skip_nonfinite, last;

  TSAM_DEVICE void operator()(const double* sums) const {
    HmcSums all;
    all.pq = sums[0];
    all.qq = sums[1];
    step_end(chain, state, kick_length(chain, prior, dimension, kick), all, scalar_value(loss), stream_now(accept), row,
             metropolis, skip_nonfinite, last);
  }
};

struct Recycle {
  double *chain, *state;
  Scalar loss;
  double share;
  int64_t row;
  Part part;
  bool metropolis, skip_nonfinite, last;

  TSAM_DEVICE void operator()(const double*) const {
    recycle_state(chain, state, scalar_value(loss), share, row, part, metropolis, skip_nonfinite, last);
  }
};

struct Adapt {
  double* chain;
  double highest;

  TSAM_DEVICE void operator()(const double*) const { adapt_step(chain, highest); }
};

}  // namespace cuda
}  // namespace tsam
