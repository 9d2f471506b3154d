// The list ops on CUDA tensors: shares of the list, one launch each, sums and scalars finished on the device.
//
// Layout: ops/list_arguments.h has checked every argument; launch.h cuts the lists into tables; list_kernels.cuh has
// the kernels. Invariant: the host learns no value of a tensor, so an op can be captured in a CUDA graph; what it
// launches is the same whatever the state says.
#include "../ops/list_arguments.h"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include "launch.h"
#include "list_kernels.cuh"
#include "saving.h"

namespace tsam {
namespace cuda {
namespace {

using namespace ops;

// Launches: a sum over z where its norm is needed, the scale, the move, with save the count.
void perturb(const PerturbArguments& a) {
  const OnDevice device(a.home);
  const CountedStream stream = a.counter.stream(a.noise.purpose);
  const bool normed = a.noise.needs_norm;
  const int64_t blocks = normed && a.stage.has(0) ? device_plan(a.position).num_chunks() : 0;
  const Tensor partial = device.workspace(1, blocks);
  const auto entry = [&](auto& at, size_t i) {
    at.element = static_cast<uint64_t>(a.base[i]);
    at.scale = a.radius[i];
    at.adaptive = a.adaptive[i];
  };
  if (normed && a.stage.has(0))
    for_shares<2>({&a.position, &a.saved}, 0, entry, [&](const auto& share) {
      device.run<noise_sum_squares<2, kFewIn<decltype(share)>>>(share.blocks, kThreads, share.table, stream,
                                                                numbers(partial) + share.before);
    });
  const FinishNoise finish{a.state, a.noise, a.dimension, a.counter.stream(kBallRadius)};
  if (device.finish_stage<1>(a.stage, 0, finish, numbers(partial), blocks)) return;
  move_shares<2>(device, {&a.position, &a.saved}, entry, a.save ? a.state : nullptr, [&](const auto& share) {
    for_positions(share.dtype, a.rounding, [&](auto* t) {
      using T = std::remove_pointer_t<decltype(t)>;
      device.run<perturb_chunks<T, kFewIn<decltype(share)>>>(share.blocks, kThreads, share.table, stream, a.state,
                                                             a.negate, a.save, a.rounding.counted);
    });
  });
}

void grad_norm(const GradNormArguments& a) {
  const OnDevice device(a.home);
  const int64_t blocks = a.stage.has(0) ? device_plan(a.grads).num_chunks() : 0;
  const Tensor partial = device.workspace(1, blocks);
  const auto entry = [&](auto& at, size_t i) { at.adaptive = a.adaptive[i]; };
  if (a.stage.has(0))
    for_shares<2>({&a.grads, &a.origin}, 0, entry, [&](const auto& share) {
      for_storage(share.dtype, [&](auto* t) {
        using T = std::remove_pointer_t<decltype(t)>;
        device.run<grad_sum_squares<T, kFewIn<decltype(share)>>>(share.blocks, kThreads, share.table,
                                                                 numbers(partial) + share.before);
      });
    });
  device.finish_stage<1>(a.stage, 0, FinishNorm{a.state, a.row}, numbers(partial), blocks);
}

void ascend(const AscendArguments& a) {
  const OnDevice device(a.home);
  const auto entry = [&](auto& at, size_t i) {
    at.element = static_cast<uint64_t>(a.base[i]);
    at.scale = a.rho[i];
    at.adaptive = a.adaptive[i];
  };
  double* const counter = a.save ? a.state : nullptr;
  move_shares<3>(device, {&a.position, &a.saved, &a.grads}, entry, counter, [&](const auto& share) {
    for_positions(share.dtype, a.rounding, [&](auto* t) {
      using T = std::remove_pointer_t<decltype(t)>;
      device.run<ascend_chunks<T, kFewIn<decltype(share)>>>(share.blocks, kThreads, share.table, a.state, a.save,
                                                            a.rounding.counted);
    });
  });
}

// Launches: the pass, and what adds its sums to those that are there.
void displacement(const DisplacementArguments& a) {
  const OnDevice device(a.home);
  const int64_t blocks = device_plan(a.position).num_chunks();
  const Tensor partial = device.workspace(kDisplacements, blocks);
  const auto entry = [&](auto& at, size_t i) {
    at.scale = a.rho[i];
    at.adaptive = a.adaptive[i];
  };
  for_shares<3>({&a.position, &a.saved, &a.grads}, 0, entry, [&](const auto& share) {
    for_storage(share.dtype, [&](auto* t) {
      using T = std::remove_pointer_t<decltype(t)>;
      device.run<displacement_chunks<T, kFewIn<decltype(share)>>>(share.blocks, kThreads, share.table, !a.grads.empty(),
                                                                  numbers(partial) + share.before, blocks);
    });
  });
  device.finish<kDisplacements>(AddSums<kDisplacements>{a.sums}, numbers(partial), blocks);
}

void begin(const TiltBeginArguments& a) { OnDevice(a.home).finish<0>(TiltBegin{a.state, a.length, a.tilt}); }

void update(const TiltUpdateArguments& a) {
  OnDevice(a.home).finish<0>(TiltUpdate{a.state, a.loss, a.log_size, a.row, a.skip_nonfinite, a.last});
}

void act(const OnDevice& device, const double* state, const Runs& accumulator, const Runs& grads, bool adopted) {
  const auto entry = [](auto&, size_t) {};
  // Without gradients all that can happen is NaN, which is written by the accumulator's own type.
  for_shares<2>({&accumulator, &grads}, adopted ? 0 : 1, entry, [&](const auto& share) {
    for_storage(share.dtype, [&](auto* t) {
      using T = std::remove_pointer_t<decltype(t)>;
      device.run<accumulate_chunks<T, kFewIn<decltype(share)>>>(share.blocks, kThreads, share.table, state, adopted);
    });
  });
}

void accumulate(const AccumulateArguments& a) { act(OnDevice(a.home), a.state, a.accumulator, a.grads, a.adopted); }

// One pass after the other: both wait for memory here, and side by side they would move the same words.
void accumulate_perturb(const AccumulatePerturbArguments& both) {
  if (both.next.stage.has(1)) accumulate(both.mean);
  perturb(both.next);
}

// Launches: the sums, what follows from them, the blend.
void take_direction(const DirectionArguments& a) {
  const OnDevice device(a.home);
  const int64_t blocks = a.stage.has(0) ? device_plan(a.blended).num_chunks() : 0;
  const Tensor partial = device.workspace(kDirectionSums, blocks);
  const auto entry = [](auto&, size_t) {};
  if (a.stage.has(0))
    for_shares<2>({&a.blended, &a.others}, 1, entry, [&](const auto& share) {
      for_storage(share.dtype, [&](auto* t) {
        using T = std::remove_pointer_t<decltype(t)>;
        device.run<direction_sums<T, kFewIn<decltype(share)>>>(share.blocks, kThreads, share.table,
                                                               numbers(partial) + share.before, blocks);
      });
    });
  if (device.finish_stage<kDirectionSums>(a.stage, 0, TakeDirection{a.direction}, numbers(partial), blocks)) return;
  act(device, a.direction, a.blended, a.others, /*adopted=*/false);
}

// Launches: as take_direction.
void add_direction(const DirectionArguments& a) {
  const OnDevice device(a.home);
  const int64_t blocks = a.stage.has(0) ? device_plan(a.blended).num_chunks() : 0;
  const Tensor partial = device.workspace(1, blocks);
  const auto entry = [](auto&, size_t) {};
  if (a.stage.has(0))
    for_shares<2>({&a.blended, &a.blended}, 0, entry, [&](const auto& share) {
      for_storage(share.dtype, [&](auto* t) {
        using T = std::remove_pointer_t<decltype(t)>;
        device.run<grad_sum_squares<T, kFewIn<decltype(share)>>>(share.blocks, kThreads, share.table,
                                                                 numbers(partial) + share.before);
      });
    });
  if (device.finish_stage<1>(a.stage, 0, AddDirection{a.direction}, numbers(partial), blocks)) return;
  act(device, a.direction, a.blended, a.others, /*adopted=*/false);
}

void restore(const RestoreArguments& a) {
  const OnDevice device(a.home);
  const auto entry = [](auto&, size_t) {};
  for_shares<2>({&a.position, &a.saved}, 0, entry, [&](const auto& share) {
    for_storage(share.dtype, [&](auto* t) {
      using T = std::remove_pointer_t<decltype(t)>;
      device.run<copy_chunks<T, kFewIn<decltype(share)>>>(share.blocks, kThreads, share.table);
    });
  });
}

Tensor summary(const TiltSummaryArguments& a) {
  const OnDevice device(a.home);
  Tensor out = torch::stable::new_empty(a.home, {a.num_samples + 2});
  const Tensor scratch = device.workspace(2, a.num_samples);
  device.finish<0>(Summary{a.state, a.num_samples, numbers(scratch), numbers(out)});
  return out;
}

}  // namespace
}  // namespace cuda
}  // namespace tsam

STABLE_TORCH_LIBRARY_IMPL(tsam, TSAM_CUDA_KEY, m) {
  m.impl("perturb_", TORCH_BOX(&tsam::ops::perturb_<tsam::cuda::perturb>));
  m.impl("grad_norm_", TORCH_BOX(&tsam::ops::grad_norm_<tsam::cuda::grad_norm>));
  m.impl("ascend_", TORCH_BOX(&tsam::ops::ascend_<tsam::cuda::ascend>));
  m.impl("norm_ascend_", TORCH_BOX((&tsam::ops::norm_ascend_<tsam::cuda::grad_norm, tsam::cuda::ascend>)));
  m.impl("displacement_", TORCH_BOX(&tsam::ops::displacement_<tsam::cuda::displacement>));
  m.impl("tilt_begin_", TORCH_BOX(&tsam::ops::tilt_begin_<tsam::cuda::begin>));
  m.impl("tilt_update_", TORCH_BOX(&tsam::ops::tilt_update_<tsam::cuda::update>));
  m.impl("accumulate_", TORCH_BOX(&tsam::ops::accumulate_<tsam::cuda::accumulate>));
  m.impl("accumulate_perturb_", TORCH_BOX(&tsam::ops::accumulate_perturb_<tsam::cuda::accumulate_perturb>));
  m.impl("take_direction_", TORCH_BOX(&tsam::ops::take_direction_<tsam::cuda::take_direction>));
  m.impl("add_direction_", TORCH_BOX(&tsam::ops::add_direction_<tsam::cuda::add_direction>));
  m.impl("restore_", TORCH_BOX(&tsam::ops::restore_<tsam::cuda::restore>));
  m.impl("tilt_summary", TORCH_BOX(&tsam::ops::tilt_summary<tsam::cuda::summary>));
}
