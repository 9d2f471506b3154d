// The differentiable ops on CPU tensors: out of place, one result each (leapfrog two).
//
// Derivatives are formulas over these same ops (python/tsam_ext/_ops.py). Results have the layout of their input.
// Invariant: all checks and all allocation come before the first write, and each result is rounded once. A number
// that comes as a tensor is used as it is: only its shape and dtype are checked, since looking would be a sync.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <string>
#include <tuple>
#include <vector>

#include "../core/strided.h"
#include "../core/weights.h"
#include "../ops/checks.h"
#include "kernels.h"
#include "parallel.h"

namespace tsam {
namespace cpu {
namespace {

using namespace checks;

std::vector<double> even_shares(size_t s) { return std::vector<double>(s, 1.0 / static_cast<double>(s)); }

std::vector<double> checked_losses(const char* op, const Tensor& losses) {
  const Run run = checked_run({op, "losses"}, losses);
  if (losses.dim() != 1 || run.size == 0) fail({op, "losses"}, shape_name(losses), "a vector of at least one loss");
  std::vector<double> values(static_cast<size_t>(run.size), 0.0);
  kernels().to_float64(run.dtype, values.data(), run.data, run.size);
  return values;
}

void checked_tilt(const char* op, double tilt) {
  if (std::isnan(tilt)) fail({op, "tilt"}, "nan", "a number or an infinity");
}

Tensor rounded(const std::vector<double>& values, const Tensor& like, torch::headeronly::IntHeaderOnlyArrayRef shape) {
  Tensor out = torch::stable::new_empty(like, shape);
  const Run run = checked_run({"tilted", "result"}, out);
  kernels().round_sum(run.dtype, run.data, values.data(), run.size);
  return out;
}

Tensor tilted_loss(Tensor losses, double tilt) {
  const std::vector<double> values = checked_losses("tilted_loss", losses);
  checked_tilt("tilted_loss", tilt);
  return rounded(
      {tilted_value(values.data(), even_shares(values.size()).data(), static_cast<int64_t>(values.size()), tilt)},
      losses, {});
}

Tensor tilted_weights(Tensor losses, double tilt) {
  const std::vector<double> values = checked_losses("tilted_weights", losses);
  checked_tilt("tilted_weights", tilt);
  std::vector<double> weights(values.size());
  tilted_softmax(values.data(), even_shares(values.size()).data(), static_cast<int64_t>(values.size()), tilt,
                 weights.data());
  return rounded(weights, losses, losses.sizes());
}

// Words an element of a sample: read s, write 1. The samples may lie anyhow (channels_last, the sample axis innermost,
// expanded): they are read where they are.
Tensor tilted_reduce(Tensor losses, Tensor values, double tilt) {
  const char* op = "tilted_reduce";
  const std::vector<double> loss = checked_losses(op, losses);
  checked_tilt(op, tilt);
  const Run all = checked_elements({op, "values"}, values);
  const int64_t s = static_cast<int64_t>(loss.size());
  if (values.dim() < 1 || values.size(0) != s)
    fail({op, "values"}, shape_name(values), "a tensor with " + std::to_string(s) + " entries in front");
  std::vector<double> weights(loss.size());
  tilted_softmax(loss.data(), even_shares(loss.size()).data(), s, tilt, weights.data());

  Tensor out = torch::stable::empty_like(torch::stable::select(values, 0, 0));
  const Run result = checked_run({op, "result"}, out);
  std::vector<StridedWalk::Dim> dims;
  for (int64_t d = 0; d < out.dim(); ++d) dims.push_back({out.size(d), out.stride(d), values.stride(d + 1)});
  const StridedWalk walk(dims);
  const int64_t bytes = item_bytes(all.dtype), row = values.stride(0);
  const Kernels& k = kernels();
  for_chunks(plan_of({result}), [&](int64_t, const Chunk& chunk) {
    walk.for_runs(chunk.offset, chunk.offset + chunk.length, [&](int64_t i, int64_t offset, int64_t count) {
      k.weighted_sum(all.dtype, result.data + i * bytes, all.data + offset * bytes, row, walk.step(), count, s,
                     weights.data());
    });
  });
  return out;
}

// One number for all elements (0-dim, any of the four dtypes) or one an element (laid out as `like`).
struct CheckedFactor {
  double all = 0.0;
  const char* each = nullptr;

  Factor at(const Chunk& chunk, DType dtype) const {
    return Factor{all, each == nullptr ? nullptr : each + chunk.offset * item_bytes(dtype)};
  }
};

CheckedFactor checked_factor(const Where& where, const Tensor& factor, const Tensor& like, DType dtype,
                             const char* reference) {
  if (factor.dim() == 0) return CheckedFactor{checked_scalar(where, factor)};
  const Run run = checked_run(where, factor);
  same_layout(where, factor, like, reference);
  if (run.dtype != dtype) fail(where, std::string("dtype ") + dtype_name(run.dtype), dtype_name(dtype));
  return CheckedFactor{0.0, run.data};
}

Run checked_alike(const Where& where, const Tensor& tensor, const Tensor& like, DType dtype, const char* reference) {
  const Run run = checked_run(where, tensor);
  same_layout(where, tensor, like, reference);
  if (run.dtype != dtype)
    fail(where, std::string("dtype ") + dtype_name(run.dtype),
         std::string(dtype_name(dtype)) + " to go with " + reference);
  return run;
}

// Words: read 3, write 2; an elementwise step_size or inverse_mass one more each.
std::tuple<Tensor, Tensor> leapfrog(Tensor position, Tensor momentum, Tensor grad_log_density, Tensor step_size,
                                    Tensor inverse_mass) {
  const char* op = "leapfrog";
  const Run x = checked_run({op, "position"}, position);
  const Run p = checked_alike({op, "momentum"}, momentum, position, x.dtype, "position");
  const Run g = checked_alike({op, "grad_log_density"}, grad_log_density, position, x.dtype, "position");
  const CheckedFactor step = checked_factor({op, "step_size"}, step_size, position, x.dtype, "position");
  const CheckedFactor inverse = checked_factor({op, "inverse_mass"}, inverse_mass, position, x.dtype, "position");
  Tensor new_position = torch::stable::empty_like(position), new_momentum = torch::stable::empty_like(position);
  const Run x_out = checked_run({op, "result"}, new_position), p_out = checked_run({op, "result"}, new_momentum);
  const Kernels& k = kernels();
  for_chunks(plan_of({x}), [&](int64_t, const Chunk& chunk) {
    k.leapfrog(x.dtype, at(x, chunk), at(p, chunk), at(g, chunk), step.at(chunk, x.dtype), inverse.at(chunk, x.dtype),
               at(x_out, chunk), at(p_out, chunk), chunk.length);
  });
  return {new_position, new_momentum};
}

// Words: read 2, write 1; an elementwise a one more.
Tensor kick(Tensor momentum, Tensor grad_log_density, Tensor a) {
  const char* op = "kick";
  const Run p = checked_run({op, "momentum"}, momentum);
  const Run g = checked_alike({op, "grad_log_density"}, grad_log_density, momentum, p.dtype, "momentum");
  const CheckedFactor factor = checked_factor({op, "a"}, a, momentum, p.dtype, "momentum");
  Tensor out = torch::stable::empty_like(momentum);
  const Run result = checked_run({op, "result"}, out);
  const Kernels& k = kernels();
  for_chunks(plan_of({p}), [&](int64_t, const Chunk& chunk) {
    k.kick(p.dtype, at(p, chunk), at(g, chunk), factor.at(chunk, p.dtype), at(result, chunk), chunk.length);
  });
  return out;
}

// Words: read 1, write 1; sphere and ball draw twice. The draw is step << 28 | sample of the optimizer's noise.
Tensor perturb(Tensor x, Tensor radius, int64_t seed, int64_t draw, int64_t base, int64_t kind) {
  const char* op = "perturb";
  const Run from = checked_run({op, "x"}, x);
  const double length = checked_scalar({op, "radius"}, radius);
  in_range({op, "draw"}, draw, 0, (int64_t{1} << 60) - 1);
  in_range({op, "base"}, base, 0, INT64_MAX);
  in_range({op, "kind"}, kind, 0, 2);
  Tensor out = torch::stable::empty_like(x);
  const Run to = checked_run({op, "result"}, out);

  const Noise noise = static_cast<Noise>(kind);
  const uint64_t key = static_cast<uint64_t>(seed);
  const uint32_t step = static_cast<uint32_t>(draw >> 28), sample = static_cast<uint32_t>(draw & kMaxSample);
  const Stream stream = make_stream(key, step, kPerturbation, sample);
  const Kernels& k = kernels();
  const ChunkPlan plan = plan_of({from});
  const auto element = [&](const Chunk& chunk) { return static_cast<uint64_t>(base + chunk.offset); };
  double sum_squares = 0.0;
  if (noise != Noise::kGaussian)
    sum_squares =
        sum_chunks(plan, [&](const Chunk& chunk) { return k.noise_sum_squares(chunk.length, element(chunk), stream); });
  const double scale = noise_scale(noise, from.size, sum_squares, make_stream(key, step, kBallRadius, sample));
  for_chunks(plan, [&](int64_t, const Chunk& chunk) {
    k.perturb(from.dtype, at(to, chunk), at(from, chunk), chunk.length, element(chunk), stream, scale * length,
              /*adaptive=*/false, /*save=*/false);
  });
  return out;
}

}  // namespace
}  // namespace cpu
}  // namespace tsam

STABLE_TORCH_LIBRARY_IMPL(tsam, CPU, m) {
  m.impl("tilted_loss", TORCH_BOX(&tsam::cpu::tilted_loss));
  m.impl("tilted_weights", TORCH_BOX(&tsam::cpu::tilted_weights));
  m.impl("tilted_reduce", TORCH_BOX(&tsam::cpu::tilted_reduce));
  m.impl("leapfrog", TORCH_BOX(&tsam::cpu::leapfrog));
  m.impl("kick", TORCH_BOX(&tsam::cpu::kick));
  m.impl("perturb", TORCH_BOX(&tsam::cpu::perturb));
}
