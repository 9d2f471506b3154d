// The differentiable ops up to their kernels: each op's signature, checks and results, once for every back end.
//
// Layout: <op><run> is the function that a back end registers, as in list_arguments.h; results are allocated here, in
// the layout of the input. Invariant: a number that comes as a tensor is used as it is: only its shape and dtype are
// checked, since looking would be a sync.
#pragma once

#include <torch/csrc/stable/ops.h>

#include <string>
#include <tuple>
#include <vector>

#include "../core/perturb.h"
#include "../core/strided.h"
#include "checks.h"

namespace tsam {
namespace ops {

using namespace checks;

inline Run checked_losses(const Op& op, const Tensor& losses) {
  const Run run = checked_run({op, "losses"}, losses);
  if (losses.dim() != 1 || run.size == 0) fail({op, "losses"}, shape_name(losses), "a vector of at least one loss");
  return run;
}

inline void checked_tilt(const Op& op, double tilt) {
  if (std::isnan(tilt)) fail({op, "tilt"}, "nan", "a number or an infinity");
}

struct TiltedArguments {
  Tensor home;  // any tensor of the op, for where its memory is
  Run losses;
  double tilt;
  Run out;
};

template <void (*run)(const TiltedArguments&)>
Tensor tilted_loss(Tensor losses, double tilt) {
  const Op op("tilted_loss", losses);
  const Run values = checked_losses(op, losses);
  checked_tilt(op, tilt);
  Tensor out = torch::stable::new_empty(losses, {});
  run({losses, values, tilt, checked_run({op, "result"}, out)});
  return out;
}

template <void (*run)(const TiltedArguments&)>
Tensor tilted_weights(Tensor losses, double tilt) {
  const Op op("tilted_weights", losses);
  const Run values = checked_losses(op, losses);
  checked_tilt(op, tilt);
  Tensor out = torch::stable::new_empty(losses, losses.sizes());
  run({losses, values, tilt, checked_run({op, "result"}, out)});
  return out;
}

struct TiltedReduceArguments {
  Tensor home;
  Run losses, values;
  StridedWalk walk;  // of one sample, in the order of out
  int64_t row;       // elements from a sample to the next
  double tilt;
  Run out;
};

// The samples may lie anyhow (channels_last, the sample axis innermost, expanded): they are read where they are.
template <void (*run)(const TiltedReduceArguments&)>
Tensor tilted_reduce(Tensor losses, Tensor values, double tilt) {
  const Op op("tilted_reduce", losses);
  const Run loss = checked_losses(op, losses);
  checked_tilt(op, tilt);
  const Run all = checked_elements({op, "values"}, values);
  if (values.dim() < 1 || values.size(0) != loss.size)
    fail({op, "values"}, shape_name(values), "a tensor with " + std::to_string(loss.size) + " entries in front");
  Tensor out = torch::stable::empty_like(torch::stable::select(values, 0, 0));
  std::vector<StridedWalk::Dim> dims;
  for (int64_t d = 0; d < out.dim(); ++d) dims.push_back({out.size(d), out.stride(d), values.stride(d + 1)});
  run({losses, loss, all, StridedWalk(dims), values.stride(0), tilt, checked_run({op, "result"}, out)});
  return out;
}

// One number for all elements (0-dim, any of the four dtypes) or one per element. Both may be null where there is none.
struct CheckedFactor {
  Scalar all;
  const char* each;
};

inline CheckedFactor checked_factor(const Where& where, const Tensor& factor, const Tensor& like, DType dtype,
                                    const char* reference) {
  if (factor.dim() == 0) return CheckedFactor{checked_scalar(where, factor), nullptr};
  const Run run = checked_run(where, factor);
  same_layout(where, factor, like, reference);
  if (run.dtype != dtype) fail(where, std::string("dtype ") + dtype_name(run.dtype), dtype_name(dtype));
  return CheckedFactor{Scalar{nullptr, dtype}, run.data};
}

inline Run checked_alike(const Where& where, const Tensor& tensor, const Tensor& like, DType dtype,
                         const char* reference) {
  const Run run = checked_run(where, tensor);
  same_layout(where, tensor, like, reference);
  if (run.dtype != dtype)
    fail(where, std::string("dtype ") + dtype_name(run.dtype),
         std::string(dtype_name(dtype)) + " to go with " + reference);
  return run;
}

struct LeapfrogArguments {
  Tensor home;
  Run position, momentum, grad;
  CheckedFactor step, inverse_mass;
  Run position_out, momentum_out;
};

template <void (*run)(const LeapfrogArguments&)>
std::tuple<Tensor, Tensor> leapfrog(Tensor position, Tensor momentum, Tensor grad_log_density, Tensor step_size,
                                    Tensor inverse_mass) {
  const Op op("leapfrog", position);
  const Run x = checked_run({op, "position"}, position);
  const Run p = checked_alike({op, "momentum"}, momentum, position, x.dtype, "position");
  const Run g = checked_alike({op, "grad_log_density"}, grad_log_density, position, x.dtype, "position");
  const CheckedFactor step = checked_factor({op, "step_size"}, step_size, position, x.dtype, "position");
  const CheckedFactor inverse = checked_factor({op, "inverse_mass"}, inverse_mass, position, x.dtype, "position");
  Tensor new_position = torch::stable::empty_like(position), new_momentum = torch::stable::empty_like(position);
  run({position, x, p, g, step, inverse, checked_run({op, "result"}, new_position),
       checked_run({op, "result"}, new_momentum)});
  return {new_position, new_momentum};
}

struct KickArguments {
  Tensor home;
  Run momentum, grad;
  CheckedFactor a;
  Run out;
};

template <void (*run)(const KickArguments&)>
Tensor kick(Tensor momentum, Tensor grad_log_density, Tensor a) {
  const Op op("kick", momentum);
  const Run p = checked_run({op, "momentum"}, momentum);
  const Run g = checked_alike({op, "grad_log_density"}, grad_log_density, momentum, p.dtype, "momentum");
  const CheckedFactor factor = checked_factor({op, "a"}, a, momentum, p.dtype, "momentum");
  Tensor out = torch::stable::empty_like(momentum);
  run({momentum, p, g, factor, checked_run({op, "result"}, out)});
  return out;
}

// The draw is step << 28 | sample of the optimizer's noise.
struct NoiseArguments {
  Tensor home;
  Run x;
  Scalar radius;
  Stream stream, radius_stream;
  int64_t base;
  Noise noise;
  Run out;
};

template <void (*run)(const NoiseArguments&)>
Tensor perturb(Tensor x, Tensor radius, int64_t seed, int64_t draw, int64_t base, int64_t kind) {
  const Op op("perturb", x);
  const Run from = checked_run({op, "x"}, x);
  const Scalar length = checked_scalar({op, "radius"}, radius);
  in_range({op, "draw"}, draw, 0, (int64_t{1} << 60) - 1);
  in_range({op, "base"}, base, 0, INT64_MAX);
  const Noise& noise = checked_noise({op, "kind"}, kind);
  Tensor out = torch::stable::empty_like(x);
  const uint64_t key = static_cast<uint64_t>(seed);
  const uint32_t step = static_cast<uint32_t>(draw >> 28), sample = static_cast<uint32_t>(draw & kMaxSample);
  run({x, from, length, make_stream(key, step, noise.purpose, sample), make_stream(key, step, kBallRadius, sample),
       base, noise, checked_run({op, "result"}, out)});
  return out;
}

}  // namespace ops
}  // namespace tsam
