// Hamiltonian Monte Carlo over lists of CPU tensors: theta = theta_0 + T x, density ~ prior(x) e^(delta L(theta)).
//
// Layout: x lives in three buffers a tensor; `chain` (core/metropolis.h) says which is the chain's, which is the step's
// first and so which takes the proposal. A trajectory is hmc_leapfrog_ N times, a gradient after each, then hmc_end_.
// Invariant: the host never learns a decision; sums go through one partial a chunk, added in chunk order.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <cstring>
#include <string>
#include <vector>

#include "../core/recycle.h"
#include "../ops/checks.h"
#include "kernels.h"
#include "parallel.h"

namespace tsam {
namespace cpu {
namespace {

using namespace checks;
using Numbers = std::vector<double>;
using Flags = std::vector<bool>;
using Integers = std::vector<int64_t>;

double* checked_chain(const Op& op, const Tensor& chain) {
  const Where where{op, "chain"};
  const Run run = checked_run(where, chain);
  if (run.dtype != DType::kFloat64 || run.size < kChain || !chain.is_contiguous())
    fail(where, shape_name(chain) + " and dtype " + dtype_name(run.dtype),
         "a contiguous float64 tensor of at least " + std::to_string(kChain) + " elements");
  return reinterpret_cast<double*>(run.data);
}

Runs checked_wide(const Op& op, const char* argument, const TensorList& tensors, const TensorList& like,
                  const Runs& reference) {
  Runs runs = checked_runs(op, argument, tensors);
  same_layouts(op, argument, tensors, "saved", like);
  same_dtypes(op, argument, runs, "saved", reference, /*in_compute_type=*/true);
  return runs;
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

struct Counter {
  uint64_t key;
  uint32_t step, trajectory;

  Counter(const Op& op, int64_t seed, int64_t step, int64_t trajectory)
      : key(static_cast<uint64_t>(seed)),
        step(static_cast<uint32_t>(step)),
        trajectory(static_cast<uint32_t>(trajectory)) {
    in_range({op, "step"}, step, 0, UINT32_MAX);
    in_range({op, "trajectory"}, trajectory, 0, kMaxSample);
  }
  Stream stream(Purpose purpose) const { return make_stream(key, step, purpose, trajectory); }
};

// A coefficient of an integrator; the ball's drift runs forward only.
void checked_factor(const Op& op, const char* argument, double value, bool forward = false) {
  if (!std::isfinite(value) || (forward && value < 0.0))
    fail({op, argument}, std::to_string(value), forward ? "a finite number not below 0" : "a finite number");
}

template <typename Body>
HmcSums sum_passes(const ChunkPlan& plan, const Body& body) {
  std::vector<HmcSums> partial(static_cast<size_t>(plan.num_chunks()));
  for_chunks(plan, [&](int64_t c, const Chunk& chunk) { partial[static_cast<size_t>(c)] = body(chunk); });
  HmcSums sums;
  for (const HmcSums& part : partial) {
    sums.pq += part.pq;
    sums.qq += part.qq;
    sums.uu += part.uu;
    sums.uv += part.uv;
    sums.vv += part.vv;
    sums.moved += part.moved;
  }
  return sums;
}

uint64_t element_of(const Integers& base, const Chunk& chunk) {
  return static_cast<uint64_t>(base[static_cast<size_t>(chunk.tensor)]) + static_cast<uint64_t>(chunk.offset);
}

// Words: read 2, write 2 (a draw: read 1, write 3). Saves theta_0 and moves to the chain's state, or to a draw from the
// prior, which then is the chain's state.
void hmc_place_(TensorList position, TensorList saved, TensorList x0, TensorList x1, TensorList x2, Tensor chain,
                Tensor state, Numbers rho, Flags adaptive, Integers base, int64_t seed, int64_t step, int64_t dimension,
                int64_t prior, bool draw) {
  const Op op("hmc_place_", chain);
  const Runs moved = checked_runs(op, "position", position);
  same_layouts(op, "saved", saved, "position", position);
  const Scaled scaled(op, saved, rho, adaptive, dimension, prior);
  same_dtypes(op, "saved", scaled.origin, "position", moved);
  const Runs x[3] = {checked_wide(op, "x0", x0, saved, scaled.origin), checked_wide(op, "x1", x1, saved, scaled.origin),
                     checked_wide(op, "x2", x2, saved, scaled.origin)};
  same_length(op, "base", base.size(), "position", moved.size());
  const Counter counter(op, seed, step, 0);
  const double* const c = checked_chain(op, chain);
  double* const s = checked_state(op, state, 0);
  disjoint(op, {{"position", moved}, {"saved", scaled.origin}, {"x0", x[0]}, {"x1", x[1]}, {"x2", x[2]}});

  const Stream stream = counter.stream(kPerturbation);
  const Runs& current = x[current_slot(c)];
  const Kernels& k = kernels();
  const ChunkPlan plan = plan_of(moved);
  double draw_scale = 1.0;
  if (draw && scaled.prior == Prior::kBall)
    draw_scale = noise_scale(Noise::kBall, dimension,
                             sum_chunks(plan,
                                        [&](const Chunk& chunk) {
                                          return k.noise_sum_squares(chunk.length, element_of(base, chunk), stream);
                                        }),
                             counter.stream(kBallRadius));
  for_chunks(plan, [&](int64_t, const Chunk& chunk) {
    const size_t t = static_cast<size_t>(chunk.tensor);
    const Run& theta = moved[t];
    char* const origin = at(scaled.origin[t], chunk);
    std::memcpy(origin, at(theta, chunk), static_cast<size_t>(chunk.length * item_bytes(theta.dtype)));
    k.hmc_place(theta.dtype, at(theta, chunk), origin, at(current[t], chunk), scaled.scale(t), adaptive[t], draw,
                draw_scale, stream, element_of(base, chunk), chunk.length);
  });
  s[kSaves] += 1.0;
}

// The step's first gradient and loss are there: delta, and with it the exponent t - delta of the weights. Words: 0, or
// with `automatic` read 1 (2 adaptive) for |T g|; delta then is the scale of the rule.
void hmc_begin_(TensorList saved, TensorList grads, Tensor chain, Tensor state, Tensor loss, Tensor tilt, Tensor delta,
                bool automatic, Numbers rho, Flags adaptive, int64_t dimension, int64_t prior) {
  const Op op("hmc_begin_", chain);
  const Scaled scaled(op, saved, rho, adaptive, dimension, prior);
  const Runs gradients = checked_runs(op, "grads", grads);
  same_layouts(op, "grads", grads, "saved", saved);
  same_dtypes(op, "grads", gradients, "saved", scaled.origin);
  double* const c = checked_chain(op, chain);
  double* const s = checked_state(op, state, 0);
  const double first_loss = scalar_value(checked_scalar({op, "loss"}, loss)),
               t = scalar_value(checked_scalar({op, "tilt"}, tilt));
  double density = scalar_value(checked_scalar({op, "delta"}, delta));
  if (automatic) {
    const Kernels& k = kernels();
    const double squares = sum_chunks(plan_of(gradients), [&](const Chunk& chunk) {
      const size_t i = static_cast<size_t>(chunk.tensor);
      const void* origin = adaptive[i] ? at(scaled.origin[i], chunk) : nullptr;
      return rho[i] * rho[i] * k.sum_squares(gradients[i].dtype, at(gradients[i], chunk), origin, chunk.length);
    });
    density = automatic_delta(c, density, std::sqrt(squares), dimension);
  }
  chain_begin(c, density, first_loss);
  s[kTilt] = t == density ? 0.0 : t - density;
}

// Kick by the gradient at x, drift, write theta: kick and drift are in units of the step size. `first`: the momentum is
// drawn and grads are those of the chain's state; otherwise x is the proposal. Words: gaussian and flat: first read 3,
// write 3, else read 4, write 3; ball three more (momentum and x once more for the drift's dot products); `measure` one
// more unless first.
void hmc_leapfrog_(TensorList position, TensorList saved, TensorList momentum, TensorList x0, TensorList x1,
                   TensorList x2, TensorList grads, Tensor chain, Numbers rho, Flags adaptive, Integers base,
                   int64_t seed, int64_t step, int64_t trajectory, int64_t dimension, int64_t prior, double kick,
                   double drift, bool first, bool measure) {
  const Op op("hmc_leapfrog_", chain);
  const Runs moved = checked_runs(op, "position", position);
  same_layouts(op, "saved", saved, "position", position);
  const Scaled scaled(op, saved, rho, adaptive, dimension, prior);
  same_dtypes(op, "saved", scaled.origin, "position", moved);
  const Runs p = checked_wide(op, "momentum", momentum, saved, scaled.origin);
  const Runs x[3] = {checked_wide(op, "x0", x0, saved, scaled.origin), checked_wide(op, "x1", x1, saved, scaled.origin),
                     checked_wide(op, "x2", x2, saved, scaled.origin)};
  const Runs gradients = checked_runs(op, "grads", grads);
  same_layouts(op, "grads", grads, "saved", saved);
  same_dtypes(op, "grads", gradients, "saved", scaled.origin);
  same_length(op, "base", base.size(), "position", moved.size());
  const Counter counter(op, seed, step, trajectory);
  checked_factor(op, "kick", kick);
  checked_factor(op, "drift", drift, scaled.prior == Prior::kBall);
  double* const c = checked_chain(op, chain);
  disjoint(op, {{"position", moved},
                {"saved", scaled.origin},
                {"momentum", p},
                {"x0", x[0]},
                {"x1", x[1]},
                {"x2", x[2]},
                {"grads", gradients}});

  const Runs &start = x[current_slot(c)], &proposal = x[proposal_slot(c)];
  const Runs& from = first ? start : proposal;
  const double h = drift_time(scaled.prior, dimension, std::exp(c[kLogStep]));
  const double a = kick * c[kDelta] * h, time = drift * h;
  const bool ball = scaled.prior == Prior::kBall;
  if (first) trajectory_begin(c);
  const Kernels& k = kernels();
  const ChunkPlan plan = plan_of(moved);
  const auto run_of = [&](const Chunk& chunk, bool kicks, bool drifts) {
    const size_t t = static_cast<size_t>(chunk.tensor);
    return HmcRun{at(moved[t], chunk),
                  at(scaled.origin[t], chunk),
                  at(p[t], chunk),
                  at(from[t], chunk),
                  at(proposal[t], chunk),
                  measure && drifts ? at(start[t], chunk) : nullptr,
                  kicks ? at(gradients[t], chunk) : nullptr};
  };
  const auto pass_of = [&](const Chunk& chunk) {
    const size_t t = static_cast<size_t>(chunk.tensor);
    HmcPass pass{};
    pass.scale = scaled.scale(t);
    pass.adaptive = adaptive[t];
    pass.keep_momentum = true;
    pass.stream = counter.stream(kMomentum);
    pass.element = element_of(base, chunk);
    return pass;
  };
  const auto kicks = [&](const Chunk& chunk, const Drift* map) {
    HmcPass pass = pass_of(chunk);
    pass.draw = first;
    pass.a = a;
    pass.products = ball;
    pass.move = map != nullptr;
    if (map != nullptr) pass.drift = *map;
    const size_t t = static_cast<size_t>(chunk.tensor);
    return k.hmc(moved[t].dtype, run_of(chunk, true, map != nullptr), pass, chunk.length);
  };
  HmcSums sums;
  if (ball) {
    sums = sum_passes(plan, [&](const Chunk& chunk) { return kicks(chunk, nullptr); });
    const Drift map = prior_drift(scaled.prior, time, sums);
    c[kReflections] += map.reflections;
    const HmcSums drifted = sum_passes(plan, [&](const Chunk& chunk) {
      HmcPass pass = pass_of(chunk);
      pass.move = true;
      pass.drift = map;
      return k.hmc(moved[static_cast<size_t>(chunk.tensor)].dtype, run_of(chunk, false, true), pass, chunk.length);
    });
    sums.moved = drifted.moved;
  } else {
    const Drift map = prior_drift(scaled.prior, time, sums);
    sums = sum_passes(plan, [&](const Chunk& chunk) { return kicks(chunk, &map); });
  }
  kick_energy(c, a, sums.pq, sums.qq);
  const double unit = prior_scale(scaled.prior, dimension);
  if (measure) c[kProposed] = unit * unit * sums.moved;
}

// The last kick's energy, the accept test, and (row >= 0) the sample's weight. Words: read 2 (3 adaptive).
void hmc_end_(TensorList saved, TensorList momentum, TensorList grads, Tensor chain, Tensor state, Tensor loss,
              Numbers rho, Flags adaptive, int64_t seed, int64_t step, int64_t trajectory, int64_t dimension,
              int64_t prior, double kick, int64_t row, bool metropolis, bool skip_nonfinite, bool last) {
  const Op op("hmc_end_", chain);
  const Scaled scaled(op, saved, rho, adaptive, dimension, prior);
  const Runs p = checked_wide(op, "momentum", momentum, saved, scaled.origin);
  const Runs gradients = checked_runs(op, "grads", grads);
  same_layouts(op, "grads", grads, "saved", saved);
  same_dtypes(op, "grads", gradients, "saved", scaled.origin);
  const Counter counter(op, seed, step, trajectory);
  checked_factor(op, "kick", kick);
  in_range({op, "row"}, row, -1, kMaxSample);
  double* const c = checked_chain(op, chain);
  double* const s = checked_state(op, state, row + 1);
  const double proposed = scalar_value(checked_scalar({op, "loss"}, loss));

  const double h = drift_time(scaled.prior, dimension, std::exp(c[kLogStep])), a = kick * c[kDelta] * h;
  const Kernels& k = kernels();
  const HmcSums sums = sum_passes(plan_of(p), [&](const Chunk& chunk) {
    const size_t t = static_cast<size_t>(chunk.tensor);
    HmcPass pass{};
    pass.scale = scaled.scale(t);
    pass.adaptive = adaptive[t];
    pass.a = a;
    const HmcRun run{nullptr, at(scaled.origin[t], chunk), at(p[t], chunk), nullptr, nullptr,
                     nullptr, at(gradients[t], chunk)};
    return k.hmc(gradients[t].dtype, run, pass, chunk.length);
  });
  kick_energy(c, a, sums.pq, sums.qq);
  trajectory_end(c, proposed, counter.stream(kAccept), metropolis);
  if (row >= 0) count_sample(s, c[kLoss], 0.0, c[kEnergy], row, skip_nonfinite, last);
}

// Recycling counts one more state of the running trajectory; its gradient follows in accumulate_. Words: 0.
// part 0: the state between two steps that the last kick ran through, `share` of which would have ended it there;
// part 1, after hmc_end_: the start, its loss from the chain; part 2, after that: the end.
void hmc_recycle_(Tensor chain, Tensor state, Tensor loss, double share, int64_t row, int64_t part, bool metropolis,
                  bool skip_nonfinite, bool last) {
  const Op op("hmc_recycle_", chain);
  double* const c = checked_chain(op, chain);
  in_range({op, "row"}, row, 0, kMaxSample);
  double* const s = checked_state(op, state, row + 1);
  const double value = scalar_value(checked_scalar({op, "loss"}, loss));
  checked_factor(op, "share", share);
  in_range({op, "part"}, part, 0, 2);
  recycle_state(c, s, value, share, row, static_cast<Part>(part), metropolis, skip_nonfinite, last);
}

// The gradient of the chain's state after a trajectory: grads if the proposal was taken, else what is carried already;
// with `count` it enters the mean. Words: taken read 2, write 2, otherwise read 2, write 1; without `count` a copy or
// nothing.
void hmc_carry_(TensorList accumulator, TensorList carried, TensorList grads, Tensor chain, Tensor state, bool count) {
  const Op op("hmc_carry_", chain);
  const Runs kept = checked_runs(op, "carried", carried), fresh = checked_runs(op, "grads", grads),
             sums = checked_runs(op, "accumulator", accumulator);
  same_layouts(op, "grads", grads, "carried", carried);
  same_dtypes(op, "grads", fresh, "carried", kept);
  same_layouts(op, "accumulator", accumulator, "carried", carried);
  same_dtypes(op, "accumulator", sums, "carried", kept, /*in_compute_type=*/true);
  const double* const c = checked_chain(op, chain);
  const double* const s = checked_state(op, state, 0);
  disjoint(op, {{"accumulator", sums}, {"carried", kept}, {"grads", fresh}});
  const bool taken = c[kTaken] != 0.0;
  const int action = count ? static_cast<int>(s[kAction]) : static_cast<int>(kSkip);
  if (!taken && action == kSkip) return;
  const Kernels& k = kernels();
  for_chunks(plan_of(kept), [&](int64_t, const Chunk& chunk) {
    const size_t t = static_cast<size_t>(chunk.tensor);
    const DType dtype = kept[t].dtype;
    char *const held = at(kept[t], chunk), *const sum = at(sums[t], chunk);
    if (taken) std::memcpy(held, at(fresh[t], chunk), static_cast<size_t>(chunk.length * item_bytes(dtype)));
    if (action == kPoison) {
      k.poison(sums[t].dtype, sum, chunk.length);
    } else if (action == kAssign) {
      k.assign(dtype, sum, held, chunk.length);
    } else if (action == kBlend) {
      k.blend(dtype, sum, held, chunk.length, s[kKeep], s[kAdd]);
    }
  });
}

// Adapts the step size after a step's trajectories.
void hmc_adapt_(Tensor chain, double highest) { adapt_step(checked_chain(Op("hmc_adapt_", chain), chain), highest); }

}  // namespace
}  // namespace cpu
}  // namespace tsam

STABLE_TORCH_LIBRARY_IMPL(tsam, CPU, m) {
  m.impl("hmc_place_", TORCH_BOX(&tsam::cpu::hmc_place_));
  m.impl("hmc_begin_", TORCH_BOX(&tsam::cpu::hmc_begin_));
  m.impl("hmc_leapfrog_", TORCH_BOX(&tsam::cpu::hmc_leapfrog_));
  m.impl("hmc_end_", TORCH_BOX(&tsam::cpu::hmc_end_));
  m.impl("hmc_recycle_", TORCH_BOX(&tsam::cpu::hmc_recycle_));
  m.impl("hmc_carry_", TORCH_BOX(&tsam::cpu::hmc_carry_));
  m.impl("hmc_adapt_", TORCH_BOX(&tsam::cpu::hmc_adapt_));
}
