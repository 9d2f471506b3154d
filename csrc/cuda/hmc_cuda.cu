// Hamiltonian Monte Carlo over lists of CUDA tensors: theta = theta_0 + T x, density ~ prior(x) e^(delta L(theta)).
//
// Layout: ops/hmc_arguments.h has checked every argument; hmc_kernels.cuh has the passes and hmc_scalars.cuh what is
// decided between them. Invariant: the host learns no decision, so what an op launches depends on its arguments alone
// and it can be captured in a CUDA graph.
#include "../ops/hmc_arguments.h"

#include <torch/csrc/stable/library.h>

#include "hmc_scalars.cuh"
#include "launch.h"
#include "list_kernels.cuh"
#include "saving.h"

namespace tsam {
namespace cuda {
namespace {

using namespace ops;

// Launches: with a draw the sum over z (ball) and the scale; the move; the count.
void place(const HmcPlaceArguments& a) {
  const OnDevice device(a.home);
  const CountedStream stream = a.counter.stream(kPerturbation);
  const bool normed = a.draw && a.scaled.prior == Prior::kBall && a.stage.has(0);
  const int64_t blocks = normed ? device_plan(a.position).num_chunks() : 0;
  const Tensor partial = device.workspace(1, blocks), scale = device.workspace(1, 1);
  const Runs* const lists[kPlaceLists] = {&a.position, &a.scaled.origin, &a.x[0], &a.x[1], &a.x[2]};
  const auto entry = [&](auto& at, size_t i) {
    at.element = static_cast<uint64_t>(a.base[i]);
    at.scale = a.scaled.scale(i);
    at.adaptive = a.scaled.adaptive[i];
  };
  if (normed)
    for_shares<kPlaceLists>(lists, 0, entry, [&](const auto& share) {
      device.run<noise_sum_squares<kPlaceLists, kFewIn<decltype(share)>>>(share.blocks, kThreads, share.table, stream,
                                                                          numbers(partial) + share.before);
    });
  const FinishPlace finish{numbers(scale), a.scaled.prior, a.scaled.dimension, a.counter.stream(kBallRadius)};
  if (a.draw && device.finish_stage<1>(a.stage, 0, finish, numbers(partial), blocks)) return;
  if (a.stage.number == 0) return;
  move_shares<kPlaceLists>(device, lists, entry, a.state, [&](const auto& share) {
    for_positions(share.dtype, a.rounding, [&](auto* t) {
      using T = std::remove_pointer_t<decltype(t)>;
      device.run<hmc_place_chunks<T, kFewIn<decltype(share)>>>(share.blocks, kThreads, share.table, stream, a.chain,
                                                               a.draw ? numbers(scale) : nullptr, a.rounding.counted);
    });
  });
}

void begin(const HmcBeginArguments& a) {
  const OnDevice device(a.home);
  const bool summed = a.automatic && a.stage.has(0);
  const int64_t blocks = summed ? device_plan(a.grads).num_chunks() : 0;
  const Tensor partial = device.workspace(1, blocks);
  const auto entry = [&](auto& at, size_t i) {
    at.scale = a.scaled.rho[i];
    at.adaptive = a.scaled.adaptive[i];
  };
  if (summed)
    for_shares<2>({&a.grads, &a.scaled.origin}, 0, entry, [&](const auto& share) {
      for_storage(share.dtype, [&](auto* t) {
        using T = std::remove_pointer_t<decltype(t)>;
        device.run<grad_sum_squares<T, kFewIn<decltype(share)>>>(share.blocks, kThreads, share.table,
                                                                 numbers(partial) + share.before);
      });
    });
  const StepBegin finish{a.chain, a.state, a.loss, a.tilt, a.delta, a.automatic, a.scaled.dimension};
  device.finish_stage<1>(a.stage, 0, finish, numbers(partial), blocks);
}

// Launches: the scalars, the pass and what follows from its sums; for the ball a second pass, and its sum.
void leapfrog(const HmcLeapfrogArguments& a) {
  const OnDevice device(a.home);
  const int64_t blocks = a.stage.number < 2 ? device_plan(a.position).num_chunks() : 0;
  const Tensor partial = device.workspace(kPassSums<HmcPassKind::kKick>, blocks),
               memory = device.workspace(1, kPassNumbers);
  PassScalars* const scalars = reinterpret_cast<PassScalars*>(numbers(memory));
  const Runs* const lists[kLeapfrogLists] = {&a.position, &a.scaled.origin, &a.momentum, &a.grads,
                                             &a.x[0],     &a.x[1],          &a.x[2]};
  const auto entry = [&](auto& at, size_t i) {
    at.element = static_cast<uint64_t>(a.base[i]);
    at.scale = a.scaled.scale(i);
    at.adaptive = a.scaled.adaptive[i];
  };
  const SubstepScalars at{a.chain, scalars, a.scaled.prior, a.scaled.dimension, a.substep, a.first, a.measure};
  const auto pass = [&](auto kind, auto first) {
    for_shares<kLeapfrogLists>(lists, 0, entry, [&](const auto& share) {
      const auto run = [&](auto* t) {
        using T = std::remove_pointer_t<decltype(t)>;
        device.run<hmc_pass<T, decltype(kind)::value, decltype(first)::value, kFewIn<decltype(share)>>>(
            share.blocks, kThreads, share.table, a.counter.stream(kMomentum), a.measure, a.chain, scalars,
            numbers(partial) + share.before, blocks, a.rounding.counted);
      };
      if constexpr (decltype(kind)::value == HmcPassKind::kKick) {
        for_storage(share.dtype, run);  // it writes no position
      } else {
        for_positions(share.dtype, a.rounding, run);
      }
    });
  };
  const auto pass_of = [&](auto kind) {
    if (a.first) {
      pass(kind, std::true_type{});
    } else {
      pass(kind, std::false_type{});
    }
  };
  const bool ball = a.scaled.prior == Prior::kBall;
  if (a.stage.number < 2) {
    device.finish<0>(SubstepBegin{at});  // in stages twice, before anything of the trajectory is in the chain
    if (!ball) {
      if (a.stage.has(0)) pass_of(std::integral_constant<HmcPassKind, HmcPassKind::kWhole>{});
      device.finish_stage<kPassSums<HmcPassKind::kWhole>>(a.stage, 0, WholeEnd{at}, numbers(partial), blocks);
    } else {
      if (a.stage.has(0)) pass_of(std::integral_constant<HmcPassKind, HmcPassKind::kKick>{});
      constexpr int kDots = kPassSums<HmcPassKind::kKick>;
      if (device.finish_stage<kDots>(a.stage, 0, BallDrift{at}, numbers(partial), blocks)) return;
      pass_of(std::integral_constant<HmcPassKind, HmcPassKind::kDrift>{});
    }
  }
  if (ball && a.measure)
    device.finish_stage<kPassSums<HmcPassKind::kDrift>>(a.stage, 1, BallMoved{at}, numbers(partial), blocks);
}

void end(const HmcEndArguments& a) {
  const OnDevice device(a.home);
  const int64_t blocks = a.stage.has(0) ? device_plan(a.momentum).num_chunks() : 0;
  const Tensor partial = device.workspace(2, blocks);
  const auto entry = [&](auto& at, size_t i) {
    at.scale = a.scaled.scale(i);
    at.adaptive = a.scaled.adaptive[i];
  };
  if (a.stage.has(0))
    for_shares<3>({&a.scaled.origin, &a.momentum, &a.grads}, 0, entry, [&](const auto& share) {
      for_storage(share.dtype, [&](auto* t) {
        using T = std::remove_pointer_t<decltype(t)>;
        device.run<hmc_last_kick<T, kFewIn<decltype(share)>>>(share.blocks, kThreads, share.table, a.chain,
                                                              numbers(partial) + share.before, blocks);
      });
    });
  const StepEnd finish{a.chain, a.state, a.loss,       a.counter.stream(kAccept), a.scaled.prior, a.scaled.dimension,
                       a.kick,  a.row,   a.metropolis, a.skip_nonfinite,          a.last};
  device.finish_stage<2>(a.stage, 0, finish, numbers(partial), blocks);
}

void recycle(const HmcRecycleArguments& a) {
  OnDevice(a.home).finish<0>(
      Recycle{a.chain, a.state, a.loss, a.share, a.row, a.part, a.metropolis, a.skip_nonfinite, a.last});
}

void carry(const HmcCarryArguments& a) {
  const OnDevice device(a.home);
  const auto entry = [](auto&, size_t) {};
  const Runs* const proposal = a.adopted ? &a.accumulator : &a.grads;
  for_shares<3>({&a.accumulator, &a.carried, proposal}, 1, entry, [&](const auto& share) {
    for_storage(share.dtype, [&](auto* t) {
      using T = std::remove_pointer_t<decltype(t)>;
      device.run<hmc_carry_chunks<T, kFewIn<decltype(share)>>>(share.blocks, kThreads, share.table, a.chain, a.state,
                                                               a.count, a.adopted);
    });
  });
}

void adapt(const HmcAdaptArguments& a) { OnDevice(a.home).finish<0>(Adapt{a.chain, a.highest}); }

}  // namespace
}  // namespace cuda
}  // namespace tsam

STABLE_TORCH_LIBRARY_IMPL(tsam, TSAM_CUDA_KEY, m) {
  m.impl("hmc_place_", TORCH_BOX(&tsam::ops::hmc_place_<tsam::cuda::place>));
  m.impl("hmc_begin_", TORCH_BOX(&tsam::ops::hmc_begin_<tsam::cuda::begin>));
  m.impl("hmc_leapfrog_", TORCH_BOX(&tsam::ops::hmc_leapfrog_<tsam::cuda::leapfrog>));
  m.impl("hmc_end_", TORCH_BOX(&tsam::ops::hmc_end_<tsam::cuda::end>));
  m.impl("hmc_recycle_", TORCH_BOX(&tsam::ops::hmc_recycle_<tsam::cuda::recycle>));
  m.impl("hmc_carry_", TORCH_BOX(&tsam::ops::hmc_carry_<tsam::cuda::carry>));
  m.impl("hmc_adapt_", TORCH_BOX(&tsam::ops::hmc_adapt_<tsam::cuda::adapt>));
}
