// The differentiable ops on CPU tensors: out of place, one result each (leapfrog two); and two of them in place.
//
// Layout: ops/differentiable_arguments.h has checked the arguments and allocated the results; derivatives are formulas
// over these same ops (python/tsam_ext/_ops.py). Invariant: each result is rounded once.
#include "../ops/differentiable_arguments.h"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/tensor.h>

#include <vector>

#include "../core/weights.h"
#include "kernels.h"
#include "parallel.h"

namespace tsam {
namespace cpu {
namespace {

using namespace ops;

struct EvenShares {
  double share;

  explicit EvenShares(int64_t s) : share(1.0 / static_cast<double>(s)) {}
  double operator[](int64_t) const { return share; }
};

std::vector<double> widened(const Run& run) {
  std::vector<double> values(static_cast<size_t>(run.size), 0.0);
  kernels().to_float64(run.dtype, values.data(), run.data, run.size);
  return values;
}

std::vector<double> weights_of(const Run& losses, double tilt) {
  const std::vector<double> values = widened(losses);
  std::vector<double> weights(values.size());
  tilted_softmax(values.data(), EvenShares(losses.size), losses.size, tilt, weights.data());
  return weights;
}

void tilted_loss(const TiltedArguments& a) {
  const std::vector<double> values = widened(a.losses);
  const double value = tilted_value(values.data(), EvenShares(a.losses.size), a.losses.size, a.tilt);
  kernels().round_sum(a.out.dtype, a.out.data, &value, 1);
}

void tilted_weights(const TiltedArguments& a) {
  kernels().round_sum(a.out.dtype, a.out.data, weights_of(a.losses, a.tilt).data(), a.out.size);
}

// Words an element of a sample: read s, write 1.
void tilted_reduce(const TiltedReduceArguments& a) {
  const std::vector<double> weights = weights_of(a.losses, a.tilt);
  const int64_t bytes = item_bytes(a.values.dtype);
  const Kernels& k = kernels();
  for_chunks(plan_of({a.out}), [&](int64_t, const Chunk& chunk) {
    a.walk.for_runs(chunk.offset, chunk.offset + chunk.length, [&](int64_t i, int64_t offset, int64_t count) {
      k.weighted_sum(a.values.dtype, a.out.data + i * bytes, a.values.data + offset * bytes, a.row, a.walk.step(),
                     count, a.losses.size, weights.data());
    });
  });
}

// As the kernels take it; one number is read once.
struct ReadFactor {
  double all;
  const char* each;

  explicit ReadFactor(const CheckedFactor& factor)
      : all(factor.all.data != nullptr ? scalar_value(factor.all) : 0.0), each(factor.each) {}
  Factor at(const Chunk& chunk, DType dtype) const {
    return Factor{all, each == nullptr ? nullptr : each + chunk.offset * item_bytes(dtype)};
  }
};

// Words: read 3, write 2; an elementwise step_size or inverse_mass one more each.
void leapfrog(const LeapfrogArguments& a) {
  const DType dtype = a.position.dtype;
  const ReadFactor step(a.step), inverse(a.inverse_mass);
  const bool past_caches = goes_past_caches({a.position});
  const Kernels& k = kernels();
  for_chunks(plan_of({a.position}), [&](int64_t, const Chunk& chunk) {
    k.leapfrog(dtype, at(a.position, chunk), at(a.momentum, chunk), at(a.grad, chunk), step.at(chunk, dtype),
               inverse.at(chunk, dtype), at(a.position_out, chunk), at(a.momentum_out, chunk), chunk.length,
               past_caches);
  });
}

// Words: read 2, write 1; an elementwise a one more.
void kick(const KickArguments& a) {
  const DType dtype = a.momentum.dtype;
  const ReadFactor factor(a.a);
  const bool past_caches = goes_past_caches({a.momentum});
  const Kernels& k = kernels();
  for_chunks(plan_of({a.momentum}), [&](int64_t, const Chunk& chunk) {
    k.kick(dtype, at(a.momentum, chunk), at(a.grad, chunk), factor.at(chunk, dtype), at(a.out, chunk), chunk.length,
           past_caches);
  });
}

// Words: read 1, write 1; what needs the norm of z draws twice.
void perturb(const NoiseArguments& a) {
  const Kernels& k = kernels();
  const ChunkPlan plan = plan_of({a.x});
  const auto element = [&](const Chunk& chunk) { return static_cast<uint64_t>(a.base + chunk.offset); };
  double sum_squares = 0.0;
  if (a.noise.needs_norm)
    sum_squares = sum_chunks(
        plan, [&](const Chunk& chunk) { return k.noise_sum_squares(chunk.length, element(chunk), a.stream); });
  const double scale = noise_scale(a.noise, a.x.size, sum_squares, a.radius_stream) * scalar_value(a.radius);
  for_chunks(plan, [&](int64_t, const Chunk& chunk) {
    k.perturb(a.x.dtype, at(a.out, chunk), at(a.x, chunk), /*saved=*/nullptr, chunk.length, element(chunk), a.stream,
              scale, /*adaptive=*/false, Round{});
  });
}

}  // namespace
}  // namespace cpu
}  // namespace tsam

STABLE_TORCH_LIBRARY_IMPL(tsam, CPU, m) {
  using namespace tsam;
  m.impl("tilted_loss", TORCH_BOX(&ops::tilted_loss<cpu::tilted_loss>));
  m.impl("tilted_weights", TORCH_BOX(&ops::tilted_weights<cpu::tilted_weights>));
  m.impl("tilted_reduce", TORCH_BOX(&ops::tilted_reduce<cpu::tilted_reduce>));
  m.impl("leapfrog", TORCH_BOX(&ops::leapfrog<cpu::leapfrog>));
  m.impl("kick", TORCH_BOX(&ops::kick<cpu::kick>));
  m.impl("leapfrog_", TORCH_BOX(&ops::leapfrog_<cpu::leapfrog>));
  m.impl("kick_", TORCH_BOX(&ops::kick_<cpu::kick>));
  m.impl("perturb", TORCH_BOX(&ops::perturb<cpu::perturb>));
}
