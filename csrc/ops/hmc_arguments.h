// The ops of Hamiltonian Monte Carlo up to their kernels: signatures and checks, once for every back end.
//
// Layout: as list_arguments.h. `chain` and `state` stay pointers: which buffer holds the chain's position, a drift's
// coefficients and every decision are known to the memory they lie in alone.
// Invariant: when run is called, nothing is left to refuse and nothing is written yet.
#pragma once

#include <string>

#include "../core/trajectory.h"
#include "list_arguments.h"

namespace tsam {
namespace ops {

inline double* checked_chain(const Op& op, const Tensor& chain) {
  const Where where{op, "chain"};
  const Run run = checked_run(where, chain);
  if (run.dtype != DType::kFloat64 || run.size < kChain || !run.layout.is_contiguous())
    fail(where, shape_name(run.layout) + " and dtype " + dtype_name(run.dtype),
         "a contiguous float64 tensor of at least " + std::to_string(kChain) + " elements");
  return reinterpret_cast<double*>(run.data);
}

inline Runs checked_wide(const Op& op, const char* argument, const TensorList& tensors, const Runs& reference) {
  Runs runs = checked_runs(op, argument, tensors);
  same_layouts(op, argument, runs, "saved", reference);
  same_dtypes(op, argument, runs, "saved", reference, /*in_compute_type=*/true);
  return runs;
}

inline Runs checked_grads(const Op& op, const TensorList& grads, const Runs& reference) {
  Runs runs = checked_runs(op, "grads", grads);
  same_layouts(op, "grads", runs, "saved", reference);
  same_dtypes(op, "grads", runs, "saved", reference);
  return runs;
}

// A coefficient of an integrator; the ball's drift runs forward only.
inline double checked_factor(const Op& op, const char* argument, double value, bool forward = false) {
  if (!std::isfinite(value) || (forward && value < 0.0))
    fail({op, argument}, std::to_string(value), forward ? "a finite number not below 0" : "a finite number");
  return value;
}

// What every pass shares: theta_0, T and the prior.
struct Scaled {
  Runs origin;
  Numbers rho;
  Flags adaptive;
  int64_t dimension;
  Prior prior;

  Scaled(const Op& op, const TensorList& saved, const Numbers& rho, const Flags& adaptive, int64_t dimension,
         int64_t prior)
      : origin(checked_runs(op, "saved", saved)), rho(rho), adaptive(adaptive), dimension(dimension) {
    same_length(op, "rho", rho.size(), "saved", origin.size());
    same_length(op, "adaptive", adaptive.size(), "saved", origin.size());
    not_negative(op, "rho", rho);
    in_range({op, "dimension"}, dimension, 0, INT64_MAX);
    in_range({op, "prior"}, prior, 0, 2);
    this->prior = static_cast<Prior>(prior);
  }
  double scale(size_t t) const { return rho[t] * prior_scale(prior, dimension); }
};

struct HmcPlaceArguments {
  Tensor home;
  Runs position;
  Scaled scaled;
  Runs x[3];
  double *chain, *state;
  Integers base;
  Counter counter;
  bool draw;
  Rounding rounding;
  Stage stage;
};

template <void (*run)(const HmcPlaceArguments&)>
void hmc_place_(const TensorList& position, const TensorList& saved, const TensorList& x0, const TensorList& x1,
                const TensorList& x2, Tensor chain, Tensor state, Numbers rho, Flags adaptive, Integers base,
                int64_t seed, int64_t step, int64_t dimension, int64_t prior, bool draw, int64_t rounding,
                int64_t stage) {
  const Op op("hmc_place_", chain);
  const Runs moved = checked_runs(op, "position", position);
  const Scaled scaled(op, saved, rho, adaptive, dimension, prior);
  same_layouts(op, "saved", scaled.origin, "position", moved);
  same_dtypes(op, "saved", scaled.origin, "position", moved);
  const Runs first_x = checked_wide(op, "x0", x0, scaled.origin), second_x = checked_wide(op, "x1", x1, scaled.origin),
             third_x = checked_wide(op, "x2", x2, scaled.origin);
  same_length(op, "base", base.size(), "position", moved.size());
  double* const c = checked_chain(op, chain);
  const Counter counter(op, seed, step, c + kChainStep, "trajectory", 0);
  double* const s = checked_state(op, state, 0);
  const Rounding rounds = checked_rounding(op, rounding, seed, step, c + kChainStep);
  const Stage part(op, stage, 1, c + kTotals);
  disjoint(op, {{"position", moved}, {"saved", scaled.origin}, {"x0", first_x}, {"x1", second_x}, {"x2", third_x}});
  run({chain, moved, scaled, {first_x, second_x, third_x}, c, s, base, counter, draw, rounds, part});
}

struct HmcBeginArguments {
  Tensor home;
  Scaled scaled;
  Runs grads;
  double *chain, *state;
  Scalar loss, tilt, delta;
  bool automatic;
  Stage stage;
};

template <void (*run)(const HmcBeginArguments&)>
void hmc_begin_(const TensorList& saved, const TensorList& grads, Tensor chain, Tensor state, Tensor loss, Tensor tilt,
                Tensor delta, bool automatic, Numbers rho, Flags adaptive, int64_t dimension, int64_t prior,
                int64_t stage) {
  const Op op("hmc_begin_", chain);
  const Scaled scaled(op, saved, rho, adaptive, dimension, prior);
  const Runs gradients = checked_grads(op, grads, scaled.origin);
  double* const c = checked_chain(op, chain);
  double* const s = checked_state(op, state, 0);
  const Scalar first_loss = checked_scalar({op, "loss"}, loss), t = checked_scalar({op, "tilt"}, tilt),
               density = checked_scalar({op, "delta"}, delta);
  run({chain, scaled, gradients, c, s, first_loss, t, density, automatic, Stage(op, stage, 1, c + kTotals)});
}

struct HmcLeapfrogArguments {
  Tensor home;
  Runs position;
  Scaled scaled;
  Runs momentum, x[3], grads;
  double* chain;
  Integers base;
  Counter counter;
  Substep substep;
  bool first, measure;
  Rounding rounding;
  Stage stage;
};

template <void (*run)(const HmcLeapfrogArguments&)>
void hmc_leapfrog_(const TensorList& position, const TensorList& saved, const TensorList& momentum,
                   const TensorList& x0, const TensorList& x1, const TensorList& x2, const TensorList& grads,
                   Tensor chain, Numbers rho, Flags adaptive, Integers base, int64_t seed, int64_t step,
                   int64_t trajectory, int64_t dimension, int64_t prior, double kick, double drift, bool first,
                   bool measure, int64_t rounding, int64_t stage) {
  const Op op("hmc_leapfrog_", chain);
  const Runs moved = checked_runs(op, "position", position);
  const Scaled scaled(op, saved, rho, adaptive, dimension, prior);
  same_layouts(op, "saved", scaled.origin, "position", moved);
  same_dtypes(op, "saved", scaled.origin, "position", moved);
  const Runs p = checked_wide(op, "momentum", momentum, scaled.origin),
             first_x = checked_wide(op, "x0", x0, scaled.origin), second_x = checked_wide(op, "x1", x1, scaled.origin),
             third_x = checked_wide(op, "x2", x2, scaled.origin), gradients = checked_grads(op, grads, scaled.origin);
  same_length(op, "base", base.size(), "position", moved.size());
  double* const c = checked_chain(op, chain);
  const Counter counter(op, seed, step, c + kChainStep, "trajectory", trajectory);
  const Substep substep{checked_factor(op, "kick", kick),
                        checked_factor(op, "drift", drift, scaled.prior == Prior::kBall)};
  const Rounding rounds = checked_rounding(op, rounding, seed, step, c + kChainStep);
  const Stage part(op, stage, 2, c + kTotals);
  disjoint(op, {{"position", moved},
                {"saved", scaled.origin},
                {"momentum", p},
                {"x0", first_x},
                {"x1", second_x},
                {"x2", third_x},
                {"grads", gradients}});
  run({chain,
       moved,
       scaled,
       p,
       {first_x, second_x, third_x},
       gradients,
       c,
       base,
       counter,
       substep,
       first,
       measure,
       rounds,
       part});
}

struct HmcEndArguments {
  Tensor home;
  Scaled scaled;
  Runs momentum, grads;
  double *chain, *state;
  Scalar loss;
  Counter counter;
  double kick;
  int64_t row;
  bool metropolis, skip_nonfinite, last;
  Stage stage;
};

template <void (*run)(const HmcEndArguments&)>
void hmc_end_(const TensorList& saved, const TensorList& momentum, const TensorList& grads, Tensor chain, Tensor state,
              Tensor loss, Numbers rho, Flags adaptive, int64_t seed, int64_t step, int64_t trajectory,
              int64_t dimension, int64_t prior, double kick, int64_t row, bool metropolis, bool skip_nonfinite,
              bool last, int64_t stage) {
  const Op op("hmc_end_", chain);
  const Scaled scaled(op, saved, rho, adaptive, dimension, prior);
  const Runs p = checked_wide(op, "momentum", momentum, scaled.origin),
             gradients = checked_grads(op, grads, scaled.origin);
  double* const c = checked_chain(op, chain);
  const Counter counter(op, seed, step, c + kChainStep, "trajectory", trajectory);
  checked_factor(op, "kick", kick);
  in_range({op, "row"}, row, -1, kMaxSample);
  double* const s = checked_state(op, state, row + 1);
  const Scalar proposed = checked_scalar({op, "loss"}, loss);
  run({chain, scaled, p, gradients, c, s, proposed, counter, kick, row, metropolis, skip_nonfinite, last,
       Stage(op, stage, 1, c + kTotals)});
}

struct HmcRecycleArguments {
  Tensor home;
  double *chain, *state;
  Scalar loss;
  double share;
  int64_t row;
  Part part;
  bool metropolis, skip_nonfinite, last;
};

template <void (*run)(const HmcRecycleArguments&)>
void hmc_recycle_(Tensor chain, Tensor state, Tensor loss, double share, int64_t row, int64_t part, bool metropolis,
                  bool skip_nonfinite, bool last) {
  const Op op("hmc_recycle_", chain);
  double* const c = checked_chain(op, chain);
  in_range({op, "row"}, row, 0, kMaxSample);
  double* const s = checked_state(op, state, row + 1);
  const Scalar value = checked_scalar({op, "loss"}, loss);
  checked_factor(op, "share", share);
  in_range({op, "part"}, part, 0, 2);
  run({chain, c, s, value, share, row, static_cast<Part>(part), metropolis, skip_nonfinite, last});
}

// With no grads for its tensors the accumulator holds the proposal's gradient (`adopted`), and is to begin the mean.
struct HmcCarryArguments {
  Op op;
  Tensor home;
  Runs accumulator, carried, grads;
  double *chain, *state;
  bool count, adopted;
};

template <void (*run)(const HmcCarryArguments&)>
void hmc_carry_(const TensorList& accumulator, const TensorList& carried, const TensorList& grads, Tensor chain,
                Tensor state, bool count) {
  const Op op("hmc_carry_", chain);
  const Runs kept = checked_runs(op, "carried", carried), fresh = checked_runs(op, "grads", grads),
             sums = checked_runs(op, "accumulator", accumulator);
  const bool adopted = grads.empty() && !kept.empty();
  const char* const proposal = adopted ? "accumulator" : "grads";
  same_layouts(op, proposal, adopted ? sums : fresh, "carried", kept);
  same_dtypes(op, proposal, adopted ? sums : fresh, "carried", kept);
  same_layouts(op, "accumulator", sums, "carried", kept);
  same_dtypes(op, "accumulator", sums, "carried", kept, /*in_compute_type=*/true);
  double* const c = checked_chain(op, chain);
  double* const s = checked_state(op, state, 0);
  disjoint(op, {{"accumulator", sums}, {"carried", kept}, {"grads", fresh}});
  run({op, chain, sums, kept, fresh, c, s, count, adopted});
}

struct HmcAdaptArguments {
  Tensor home;
  double* chain;
  double highest;
};

template <void (*run)(const HmcAdaptArguments&)>
void hmc_adapt_(Tensor chain, double highest) {
  double* const c = checked_chain(Op("hmc_adapt_", chain), chain);
  run({chain, c, highest});
}

}  // namespace ops
}  // namespace tsam
