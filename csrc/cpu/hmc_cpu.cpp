// Hamiltonian Monte Carlo over lists of CPU tensors: theta = theta_0 + T x, density ~ prior(x) e^(delta L(theta)).
//
// Layout: x lives in three buffers a tensor; `chain` (core/metropolis.h) says which is the chain's, which is the step's
// first and so which takes the proposal. A trajectory is hmc_leapfrog_ N times, a gradient after each, then hmc_end_.
// Invariant: sums go through one partial a chunk, added in chunk order; ops/hmc_arguments.h has checked everything.
#include "../ops/hmc_arguments.h"

#include <torch/csrc/stable/library.h>

#include <vector>

#include "kernels.h"
#include "parallel.h"

namespace tsam {
namespace cpu {
namespace {

using namespace ops;

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

// Words: read 2, write 2 (a draw: read 1, write 3). Saves theta_0 and moves to the chain's state, or to a draw from the
// prior, which then is the chain's state.
void place(const HmcPlaceArguments& a) {
  const Scaled& scaled = a.scaled;
  const Stream stream = stream_now(a.counter.stream(kPerturbation));
  const Runs& current = a.x[current_slot(a.chain)];
  const Kernels& k = kernels();
  const ChunkPlan plan = plan_of(a.position);
  const bool normed = a.draw && scaled.prior == Prior::kBall;
  double squares[1] = {0.0};
  if (normed && a.stage.has(0))
    squares[0] = sum_chunks(
        plan, [&](const Chunk& chunk) { return k.noise_sum_squares(chunk.length, element_of(a.base, chunk), stream); });
  if (a.stage.ends(0, squares)) return;
  const double draw_scale =
      normed ? ball_scale(scaled.dimension, squares[0], stream_now(a.counter.stream(kBallRadius))) : 1.0;
  const bool past_caches = !a.draw && goes_past_caches(scaled.origin);  // a draw leaves memory time enough
  const Round round = round_of(a.rounding);
  for_chunks(plan, [&](int64_t, const Chunk& chunk) {
    const size_t t = static_cast<size_t>(chunk.tensor);
    k.hmc_place(a.position[t].dtype, at(a.position[t], chunk), at(scaled.origin[t], chunk), at(current[t], chunk),
                scaled.scale(t), scaled.adaptive[t], a.draw, draw_scale, stream, element_of(a.base, chunk),
                chunk.length, past_caches, round);
  });
  a.state[kSaves] += 1.0;
}

// The step's first gradient and loss are there: delta, and with it the exponent t - delta of the weights. Words: 0, or
// with `automatic` read 1 (2 adaptive) for |T g|; delta then is the scale of the rule.
void begin(const HmcBeginArguments& a) {
  double squares[1] = {0.0};
  if (a.automatic && a.stage.has(0)) {
    const Kernels& k = kernels();
    squares[0] = sum_chunks(plan_of(a.grads), [&](const Chunk& chunk) {
      const size_t i = static_cast<size_t>(chunk.tensor);
      const void* origin = a.scaled.adaptive[i] ? at(a.scaled.origin[i], chunk) : nullptr;
      return a.scaled.rho[i] * a.scaled.rho[i] *
             k.sum_squares(a.grads[i].dtype, at(a.grads[i], chunk), origin, chunk.length);
    });
  }
  if (a.stage.ends(0, squares)) return;
  step_begin(a.chain, a.state, scalar_value(a.loss), scalar_value(a.tilt), scalar_value(a.delta), a.automatic,
             squares[0], a.scaled.dimension);
}

// Kick by the gradient at x, drift, write theta: kick and drift are in units of the step size. `first`: the momentum is
// drawn and grads are those of the chain's state; otherwise x is the proposal. Words: gaussian and flat: first read 3,
// write 3, else read 4, write 3; ball three more (momentum and x once more for the drift's dot products); `measure` one
// more unless first.
void leapfrog(const HmcLeapfrogArguments& a) {
  const Scaled& scaled = a.scaled;
  double* const c = a.chain;
  const Runs &start = a.x[current_slot(c)], &proposal = a.x[proposal_slot(c)];
  const Runs& from = a.first ? start : proposal;
  const double length = kick_length(c, scaled.prior, scaled.dimension, a.substep.kick),
               time = a.substep.drift * step_time(c, scaled.prior, scaled.dimension);
  const bool ball = scaled.prior == Prior::kBall;
  const Kernels& k = kernels();
  const ChunkPlan plan = plan_of(a.position);
  const auto run_of = [&](const Chunk& chunk, bool kicks, bool drifts) {
    const size_t t = static_cast<size_t>(chunk.tensor);
    return HmcRun{at(a.position[t], chunk),
                  at(scaled.origin[t], chunk),
                  at(a.momentum[t], chunk),
                  at(from[t], chunk),
                  at(proposal[t], chunk),
                  a.measure && drifts ? at(start[t], chunk) : nullptr,
                  kicks ? at(a.grads[t], chunk) : nullptr};
  };
  const auto pass_of = [&](const Chunk& chunk) {
    const size_t t = static_cast<size_t>(chunk.tensor);
    HmcPass pass{};
    pass.scale = scaled.scale(t);
    pass.adaptive = scaled.adaptive[t];
    pass.stream = stream_now(a.counter.stream(kMomentum));
    pass.element = element_of(a.base, chunk);
    pass.round = round_of(a.rounding);
    return pass;
  };
  const auto kicks = [&](const Chunk& chunk, const Drift* map) {
    HmcPass pass = pass_of(chunk);
    pass.draw = a.first;
    pass.a = length;
    pass.products = ball;
    pass.move = map != nullptr;
    if (map != nullptr) pass.drift = *map;
    const size_t t = static_cast<size_t>(chunk.tensor);
    return k.hmc(a.position[t].dtype, run_of(chunk, true, map != nullptr), pass, chunk.length);
  };
  // In stages it is done twice, before anything of the trajectory is in the chain.
  if (a.first && a.stage.number < 2) trajectory_begin(c);
  if (!ball) {
    const Drift map = prior_drift(scaled.prior, time, HmcSums{});
    double sums[3] = {0.0, 0.0, 0.0};
    if (a.stage.has(0)) {
      const HmcSums found = sum_passes(plan, [&](const Chunk& chunk) { return kicks(chunk, &map); });
      sums[0] = found.pq, sums[1] = found.qq, sums[2] = found.moved;
    }
    if (a.stage.ends(0, sums) || a.stage.number == 2) return;
    const HmcSums all{sums[0], sums[1], 0.0, 0.0, 0.0, sums[2]};
    substep_end(c, length, all, map, scaled.prior, scaled.dimension, a.measure);
    return;
  }
  double dots[5] = {0.0, 0.0, 0.0, 0.0, 0.0};
  if (a.stage.has(0)) {
    const HmcSums found = sum_passes(plan, [&](const Chunk& chunk) { return kicks(chunk, nullptr); });
    dots[0] = found.pq, dots[1] = found.qq, dots[2] = found.uu, dots[3] = found.uv, dots[4] = found.vv;
  }
  if (a.stage.ends(0, dots)) return;
  double moved[1] = {0.0};
  if (a.stage.has(1)) {
    const HmcSums all{dots[0], dots[1], dots[2], dots[3], dots[4], 0.0};
    const Drift map = prior_drift(scaled.prior, time, all);
    const HmcSums drifted = sum_passes(plan, [&](const Chunk& chunk) {
      HmcPass pass = pass_of(chunk);
      pass.move = true;
      pass.drift = map;
      return k.hmc(a.position[static_cast<size_t>(chunk.tensor)].dtype, run_of(chunk, false, true), pass, chunk.length);
    });
    moved[0] = drifted.moved;
    substep_end(c, length, all, map, scaled.prior, scaled.dimension, /*measure=*/false);
  }
  if (a.stage.ends(1, moved)) return;
  if (a.measure) proposal_moved(c, moved[0], scaled.prior, scaled.dimension);
}

// The last kick's energy, the accept test, and (row >= 0) the sample's weight. Words: read 2 (3 adaptive).
void end(const HmcEndArguments& a) {
  const Scaled& scaled = a.scaled;
  const double length = kick_length(a.chain, scaled.prior, scaled.dimension, a.kick);
  double dots[2] = {0.0, 0.0};
  if (a.stage.has(0)) {
    const Kernels& k = kernels();
    const HmcSums found = sum_passes(plan_of(a.momentum), [&](const Chunk& chunk) {
      const size_t t = static_cast<size_t>(chunk.tensor);
      HmcPass pass{};
      pass.scale = scaled.scale(t);
      pass.adaptive = scaled.adaptive[t];
      pass.a = length;
      const HmcRun run{nullptr, at(scaled.origin[t], chunk), at(a.momentum[t], chunk), nullptr, nullptr,
                       nullptr, at(a.grads[t], chunk)};
      return k.hmc(a.grads[t].dtype, run, pass, chunk.length);
    });
    dots[0] = found.pq, dots[1] = found.qq;
  }
  if (a.stage.ends(0, dots)) return;
  step_end(a.chain, a.state, length, HmcSums{dots[0], dots[1], 0.0, 0.0, 0.0, 0.0}, scalar_value(a.loss),
           stream_now(a.counter.stream(kAccept)), a.row, a.metropolis, a.skip_nonfinite, a.last);
}

// Recycling counts one more state of the running trajectory; its gradient follows in accumulate_. Words: 0.
// part 0: the state between two steps that the last kick ran through, `share` of which would have ended it there;
// part 1, after hmc_end_: the start, its loss from the chain; part 2, after that: the end.
void recycle(const HmcRecycleArguments& a) {
  recycle_state(a.chain, a.state, scalar_value(a.loss), a.share, a.row, a.part, a.metropolis, a.skip_nonfinite, a.last);
}

// The gradient of the chain's state after a trajectory: grads if the proposal was taken, else what is carried already;
// with `count` it enters the mean. Words: taken read 2, write 2, otherwise read 2, write 1; a mean that begins reads
// one less; adopted read 1, write 1; without `count` a copy or nothing.
void carry(const HmcCarryArguments& a) {
  const double* const s = a.state;
  const bool taken = a.chain[kTaken] != 0.0;
  const int action = a.count ? tilt_action(s) : static_cast<int>(kSkip);
  if (a.adopted && action == kBlend) fail({a.op, "grads"}, "none", "gradients: only the first sample can be adopted");
  if (!taken && action == kSkip) return;
  const Kernels& k = kernels();
  const bool past_caches = goes_past_caches(a.carried);
  for_chunks(plan_of(a.carried), [&](int64_t, const Chunk& chunk) {
    const size_t t = static_cast<size_t>(chunk.tensor);
    const DType dtype = a.carried[t].dtype;
    char *const held = at(a.carried[t], chunk), *const sum = at(a.accumulator[t], chunk);
    const char* const from = !taken ? held : a.adopted ? sum : at(a.grads[t], chunk);
    if (taken && action != kBlend) k.copy(held, from, chunk.length * item_bytes(dtype), past_caches);
    if (action == kPoison) {
      k.poison(a.accumulator[t].dtype, sum, chunk.length);
    } else if (action == kAssign && !(a.adopted && taken)) {
      k.assign(dtype, sum, from, chunk.length, past_caches);
    } else if (action == kBlend) {
      k.blend(dtype, sum, from, taken ? held : nullptr, chunk.length, s[kKeep], s[kAdd], past_caches);
    }
  });
}

// Adapts the step size after a step's trajectories.
void adapt(const HmcAdaptArguments& a) { adapt_step(a.chain, a.highest); }

}  // namespace
}  // namespace cpu
}  // namespace tsam

STABLE_TORCH_LIBRARY_IMPL(tsam, CPU, m) {
  using namespace tsam;
  m.impl("hmc_place_", TORCH_BOX(&ops::hmc_place_<cpu::place>));
  m.impl("hmc_begin_", TORCH_BOX(&ops::hmc_begin_<cpu::begin>));
  m.impl("hmc_leapfrog_", TORCH_BOX(&ops::hmc_leapfrog_<cpu::leapfrog>));
  m.impl("hmc_end_", TORCH_BOX(&ops::hmc_end_<cpu::end>));
  m.impl("hmc_recycle_", TORCH_BOX(&ops::hmc_recycle_<cpu::recycle>));
  m.impl("hmc_carry_", TORCH_BOX(&ops::hmc_carry_<cpu::carry>));
  m.impl("hmc_adapt_", TORCH_BOX(&ops::hmc_adapt_<cpu::adapt>));
}
