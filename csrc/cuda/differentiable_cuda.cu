// The differentiable ops on CUDA tensors: out of place, one result each (leapfrog two); and two of them in place.
//
// Layout: ops/differentiable_arguments.h has checked the arguments and allocated the results;
// differentiable_kernels.cuh has the kernels, perturb those of the list op. Invariant: the host learns no value of a
// tensor, so an op can be captured in a CUDA graph.
#include "../ops/differentiable_arguments.h"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>

#include "differentiable_kernels.cuh"
#include "launch.h"
#include "list_kernels.cuh"

namespace tsam {
namespace cuda {
namespace {

using namespace ops;

int64_t blocks_of(int64_t n) { return (n + kDeviceChunk - 1) / kDeviceChunk; }

template <typename T>
T* as(const Run& run) {
  return reinterpret_cast<T*>(run.data);
}

Numbers64 numbers64(const Run& run) { return Numbers64{run.data, run.dtype, item_bytes(run.dtype)}; }

void tilted_loss(const TiltedArguments& a) {
  OnDevice(a.home).run<tilted_value_of>(1, kFinishThreads, numbers64(a.losses), a.losses.size, a.tilt,
                                        numbers64(a.out));
}

void tilted_weights(const TiltedArguments& a) {
  const OnDevice device(a.home);
  const Tensor weights = device.workspace(1, a.losses.size);
  device.run<tilted_weights_of>(1, kFinishThreads, numbers64(a.losses), a.losses.size, a.tilt, numbers(weights),
                                static_cast<PairSum*>(nullptr), numbers64(a.out));
}

// How the rows and columns of a mean are spread over threads and blocks; the number of tiles of rows. Fewer threads
// across, so that a tile has fewer columns and each column more threads, until there are enough tiles; then tiles of
// rows.
int64_t spread(Rows& rows, int64_t lanes, bool over_blocks) {
  int64_t across = kThreads, share = 0;  // share: rows that keep a tile's threads busy
  for (;; across /= 2) {
    rows.tiles = (rows.n + across * lanes - 1) / (across * lanes);
    share = kThreads / across * kLeastRows;
    const bool idle = across > 1 && across / 2 * lanes >= rows.n;
    if (!idle && (across <= kLeastAcross || rows.tiles >= kEnoughBlocks || rows.rows < 2 * share)) break;
  }
  const int64_t most = over_blocks ? std::max(rows.rows / share, int64_t{1}) : 1;
  const int64_t slices = kThreads / across, parts = std::min(most, (kEnoughBlocks + rows.tiles - 1) / rows.tiles);
  rows.across = static_cast<int>(across);
  rows.tile = (rows.rows + parts * slices - 1) / (parts * slices) * slices;
  return (rows.rows + rows.tile - 1) / rows.tile;
}

template <typename T, int W>
void sum_rows(const OnDevice& device, Rows& rows, const T* values, const Tensor& weights, const Tensor& pairs, T* out) {
  const int64_t parts = spread(rows, W, /*over_blocks=*/true);
  const Tensor partial = device.workspace(parts > 1 ? parts : 0, rows.n);
  device.run<weighted_sum<T, T, W>>(rows.tiles * parts, kThreads, rows, values, numbers(weights),
                                    reinterpret_cast<const PairSum*>(numbers(pairs)), numbers(partial),
                                    parts > 1 ? nullptr : out);
  if (parts == 1) return;
  Rows joined{rows.n, parts, rows.n, /*dense=*/true, 1, {}, 0, 0, 0};
  spread(joined, 1, /*over_blocks=*/false);
  device.run<weighted_sum<double, T, 1>>(joined.tiles, kThreads, joined, numbers(partial), nullptr, nullptr, nullptr,
                                         out);
}

// Launches: the weights, the sum, and where rows are spread over blocks the sum of their partials.
void tilted_reduce(const TiltedReduceArguments& a) {
  if (a.out.size == 0) return;
  const OnDevice device(a.home);
  const int64_t s = a.losses.size;
  const Tensor weights = device.workspace(1, s), pairs = device.workspace(1, s);
  device.run<tilted_weights_of>(1, kFinishThreads, numbers64(a.losses), s, a.tilt, numbers(weights),
                                reinterpret_cast<PairSum*>(numbers(pairs)), Numbers64{nullptr, DType::kFloat64, 8});
  const std::vector<StridedDim>& dims = a.walk.dims();
  Rows rows{};
  rows.row = a.row;
  rows.rows = s;
  rows.n = a.out.size;
  rows.dense = dims.size() == 1 && dims[0].stride == 1;
  rows.num_dims = static_cast<int64_t>(dims.size());
  std::copy(dims.begin(), dims.end(), rows.dims);
  for_storage(a.values.dtype, [&](auto* t) {
    using T = std::remove_pointer_t<decltype(t)>;
    constexpr int W = kColumnLanes<T>;
    const T* const values = as<T>(a.values);
    T* const out = as<T>(a.out);
    const auto cut = [](const void* p) { return reinterpret_cast<uintptr_t>(p) % (sizeof(T) * W) != 0; };
    if (!rows.dense || rows.n % W != 0 || rows.row % W != 0 || cut(values) || cut(out)) {
      sum_rows<T, 1>(device, rows, values, weights, pairs, out);
    } else {
      sum_rows<T, W>(device, rows, values, weights, pairs, out);
    }
  });
}

template <typename T>
Factor<T> factor_of(const CheckedFactor& factor) {
  return Factor<T>{factor.all, reinterpret_cast<const T*>(factor.each)};
}

void leapfrog(const LeapfrogArguments& a) {
  if (a.position.size == 0) return;
  const OnDevice device(a.home);
  for_storage(a.position.dtype, [&](auto* t) {
    using T = std::remove_pointer_t<decltype(t)>;
    const LeapfrogRun<T> run{as<T>(a.position),
                             as<T>(a.momentum),
                             as<T>(a.grad),
                             factor_of<T>(a.step),
                             factor_of<T>(a.inverse_mass),
                             as<T>(a.position_out),
                             as<T>(a.momentum_out),
                             a.position.size};
    device.run<leapfrog_chunks<T>>(blocks_of(run.n), kThreads, run);
  });
}

void kick(const KickArguments& a) {
  if (a.momentum.size == 0) return;
  const OnDevice device(a.home);
  for_storage(a.momentum.dtype, [&](auto* t) {
    using T = std::remove_pointer_t<decltype(t)>;
    const KickRun<T> run{as<T>(a.momentum), as<T>(a.grad), factor_of<T>(a.a), as<T>(a.out), a.momentum.size};
    device.run<kick_chunks<T>>(blocks_of(run.n), kThreads, run);
  });
}

// Launches: a sum over z where its norm is needed, the scale, the move.
void perturb(const NoiseArguments& a) {
  const OnDevice device(a.home);
  const bool normed = a.noise.needs_norm;
  const Runs to{a.out}, from{a.x};
  const int64_t blocks = normed ? blocks_of(a.x.size) : 0;
  const Tensor partial = device.workspace(1, blocks), scale = device.workspace(1, kHeader);
  const auto entry = [&](auto& at, size_t) { at.element = static_cast<uint64_t>(a.base); };
  if (normed)
    for_shares<2>({&to, &from}, 0, entry, [&](const auto& share) {
      device.run<noise_sum_squares<2, kFewIn<decltype(share)>>>(
          share.blocks, kThreads, share.table, CountedStream{a.stream, nullptr}, numbers(partial) + share.before);
    });
  device.finish<1>(FinishDraw{numbers(scale), a.noise, a.x.size, a.radius_stream, a.radius}, numbers(partial), blocks);
  for_shares<2>({&to, &from}, 0, entry, [&](const auto& share) {
    for_storage(share.dtype, [&](auto* t) {
      using T = std::remove_pointer_t<decltype(t)>;
      device.run<perturb_chunks<T, kFewIn<decltype(share)>>>(share.blocks, kThreads, share.table,
                                                             CountedStream{a.stream, nullptr}, numbers(scale),
                                                             /*negate=*/false, /*save=*/false, CountedStream{});
    });
  });
}

}  // namespace
}  // namespace cuda
}  // namespace tsam

STABLE_TORCH_LIBRARY_IMPL(tsam, TSAM_CUDA_KEY, m) {
  m.impl("tilted_loss", TORCH_BOX(&tsam::ops::tilted_loss<tsam::cuda::tilted_loss>));
  m.impl("tilted_weights", TORCH_BOX(&tsam::ops::tilted_weights<tsam::cuda::tilted_weights>));
  m.impl("tilted_reduce", TORCH_BOX(&tsam::ops::tilted_reduce<tsam::cuda::tilted_reduce>));
  m.impl("leapfrog", TORCH_BOX(&tsam::ops::leapfrog<tsam::cuda::leapfrog>));
  m.impl("kick", TORCH_BOX(&tsam::ops::kick<tsam::cuda::kick>));
  m.impl("leapfrog_", TORCH_BOX(&tsam::ops::leapfrog_<tsam::cuda::leapfrog>));
  m.impl("kick_", TORCH_BOX(&tsam::ops::kick_<tsam::cuda::kick>));
  m.impl("perturb", TORCH_BOX(&tsam::ops::perturb<tsam::cuda::perturb>));
}
