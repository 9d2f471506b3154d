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

// Memory for a result of these sizes and strides, of the dtype and on the device of `like`. Not torch::stable's
// empty_like, which looks the op up by its name each time (half a microsecond).
inline Tensor new_strided(const Tensor& like, int64_t dim, const int64_t* sizes, const int64_t* strides) {
  int32_t dtype, device;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_dtype(like.get(), &dtype));
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(like.get(), &device));
  AtenTensorHandle handle;
  STABLE_TORCH_ERROR_CODE_CHECK(
      aoti_torch_empty_strided(dim, sizes, strides, dtype, device, like.get_device_index(), &handle));
  return Tensor(handle);
}

// In the layout of a dense tensor.
inline Tensor new_like(const Tensor& like, const Run& run) {
  return new_strided(like, run.layout.dim, run.layout.sizes, run.layout.strides);
}

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
  Tensor out = new_strided(losses, 0, nullptr, nullptr);
  run({losses, values, tilt, checked_run({op, "result"}, out)});
  return out;
}

template <void (*run)(const TiltedArguments&)>
Tensor tilted_weights(Tensor losses, double tilt) {
  const Op op("tilted_weights", losses);
  const Run values = checked_losses(op, losses);
  checked_tilt(op, tilt);
  Tensor out = new_like(losses, values);
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

// With the results in the memory of position and momentum.
inline LeapfrogArguments checked_leapfrog(const Op& op, const Tensor& position, const Tensor& momentum,
                                          const Tensor& grad, const Tensor& step_size, const Tensor& inverse_mass) {
  const Run x = checked_run({op, "position"}, position);
  const Run p = checked_alike({op, "momentum"}, momentum, position, x.dtype, "position");
  const Run g = checked_alike({op, "grad_log_density"}, grad, position, x.dtype, "position");
  const CheckedFactor step = checked_factor({op, "step_size"}, step_size, position, x.dtype, "position");
  const CheckedFactor inverse = checked_factor({op, "inverse_mass"}, inverse_mass, position, x.dtype, "position");
  return {position, x, p, g, step, inverse, x, p};
}

template <void (*run)(const LeapfrogArguments&)>
std::tuple<Tensor, Tensor> leapfrog(Tensor position, Tensor momentum, Tensor grad_log_density, Tensor step_size,
                                    Tensor inverse_mass) {
  const Op op("leapfrog", position);
  LeapfrogArguments a = checked_leapfrog(op, position, momentum, grad_log_density, step_size, inverse_mass);
  Tensor new_position = new_like(position, a.position), new_momentum = new_like(position, a.position);
  a.position_out = checked_run({op, "result"}, new_position);
  a.momentum_out = checked_run({op, "result"}, new_momentum);
  run(a);
  return {new_position, new_momentum};
}

// The memory of an argument.
struct NamedSpan {
  const char* argument;
  const char* data;
  int64_t bytes;

  NamedSpan(const char* argument, const Run& run) : argument(argument), data(run.data), bytes(run.bytes) {}
  // A value per element is laid out as `like`; a number is one element.
  NamedSpan(const char* argument, const CheckedFactor& factor, const Run& like)
      : argument(argument),
        data(factor.each != nullptr ? factor.each : static_cast<const char*>(factor.all.data)),
        bytes(factor.each != nullptr ? like.bytes : item_bytes(factor.all.dtype)) {}
  const char* end() const { return data + bytes; }
};

// What an op in place writes shares no memory with what it reads.
inline void apart(const Op& op, const char* written, const Run& run, std::initializer_list<NamedSpan> others) {
  for (const NamedSpan& other : others)
    if (run.data < other.end() && other.data < run.data + run.bytes)
      fail({op, other.argument}, std::string("memory shared with ") + written, "tensors that do not overlap");
}

template <void (*run)(const LeapfrogArguments&)>
void leapfrog_(Tensor position, Tensor momentum, Tensor grad_log_density, Tensor step_size, Tensor inverse_mass) {
  const Op op("leapfrog_", position);
  const LeapfrogArguments a = checked_leapfrog(op, position, momentum, grad_log_density, step_size, inverse_mass);
  const NamedSpan grad("grad_log_density", a.grad), step("step_size", a.step, a.grad),
      inverse("inverse_mass", a.inverse_mass, a.grad);
  apart(op, "position", a.position, {NamedSpan("momentum", a.momentum), grad, step, inverse});
  apart(op, "momentum", a.momentum, {grad, step, inverse});
  run(a);
}

struct KickArguments {
  Tensor home;
  Run momentum, grad;
  CheckedFactor a;
  Run out;
};

// With the result in the memory of momentum.
inline KickArguments checked_kick(const Op& op, const Tensor& momentum, const Tensor& grad, const Tensor& a) {
  const Run p = checked_run({op, "momentum"}, momentum);
  const Run g = checked_alike({op, "grad_log_density"}, grad, momentum, p.dtype, "momentum");
  return {momentum, p, g, checked_factor({op, "a"}, a, momentum, p.dtype, "momentum"), p};
}

template <void (*run)(const KickArguments&)>
Tensor kick(Tensor momentum, Tensor grad_log_density, Tensor a) {
  const Op op("kick", momentum);
  KickArguments arguments = checked_kick(op, momentum, grad_log_density, a);
  Tensor out = new_like(momentum, arguments.momentum);
  arguments.out = checked_run({op, "result"}, out);
  run(arguments);
  return out;
}

template <void (*run)(const KickArguments&)>
void kick_(Tensor momentum, Tensor grad_log_density, Tensor a) {
  const Op op("kick_", momentum);
  const KickArguments arguments = checked_kick(op, momentum, grad_log_density, a);
  apart(op, "momentum", arguments.momentum,
        {NamedSpan("grad_log_density", arguments.grad), NamedSpan("a", arguments.a, arguments.grad)});
  run(arguments);
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
  Tensor out = new_like(x, from);
  const uint64_t key = static_cast<uint64_t>(seed);
  const uint32_t step = static_cast<uint32_t>(draw >> 28), sample = static_cast<uint32_t>(draw & kMaxSample);
  run({x, from, length, make_stream(key, step, noise.purpose, sample), make_stream(key, step, kBallRadius, sample),
       base, noise, checked_run({op, "result"}, out)});
  return out;
}

}  // namespace ops
}  // namespace tsam
