// The list ops on CPU tensors: check every argument, plan the chunks, share them over threads, run the kernels.
//
// Layout: lists become Runs (checks.h), a ChunkPlan cuts them, parallel.h shares the chunks over threads.
// Invariant: nothing is written before all checks passed, and no result depends on the number of threads.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <cstring>
#include <string>
#include <vector>

#include "../core/chunks.h"
#include "../core/weights.h"
#include "../ops/checks.h"
#include "kernels.h"
#include "parallel.h"

namespace tsam {
namespace cpu {
namespace {

using namespace checks;

// Words a float32 element: read 1, write 2 with save, else read 1, write 1. sphere and ball draw twice and so need
// no buffer for z: their norm has to be known before the first element is written.
void perturb_(TensorList position, TensorList saved, Tensor state, std::vector<double> radius,
              std::vector<bool> adaptive, std::vector<int64_t> base, int64_t seed, int64_t step, int64_t sample,
              int64_t noise, int64_t dimension, bool negate, bool save) {
  const char* op = "perturb_";
  const Runs moved = checked_runs(op, "position", position), kept = checked_runs(op, "saved", saved);
  same_layouts(op, "saved", saved, "position", position);
  same_dtypes(op, "saved", kept, "position", moved);
  double* const s = checked_state(op, state, 0);
  same_length(op, "radius", radius.size(), "position", moved.size());
  same_length(op, "adaptive", adaptive.size(), "position", moved.size());
  same_length(op, "base", base.size(), "position", moved.size());
  not_negative(op, "radius", radius);
  in_range({op, "step"}, step, 0, UINT32_MAX);
  in_range({op, "sample"}, sample, 0, kMaxSample);
  in_range({op, "dimension"}, dimension, 0, INT64_MAX);
  in_range({op, "noise"}, noise, 0, 2);
  const Noise kind = static_cast<Noise>(noise);
  disjoint(op, {{"position", moved}, {"saved", kept}});

  const uint64_t key = static_cast<uint64_t>(seed);
  const uint32_t step_word = static_cast<uint32_t>(step), sample_word = static_cast<uint32_t>(sample);
  const Stream stream = make_stream(key, step_word, kPerturbation, sample_word);
  const Kernels& k = kernels();
  const ChunkPlan plan = plan_of(moved);
  const auto element = [&](const Chunk& chunk) {
    return static_cast<uint64_t>(base[static_cast<size_t>(chunk.tensor)]) + static_cast<uint64_t>(chunk.offset);
  };
  double sum_squares = 0.0;
  if (kind != Noise::kGaussian)
    sum_squares =
        sum_chunks(plan, [&](const Chunk& chunk) { return k.noise_sum_squares(chunk.length, element(chunk), stream); });
  const double scale = noise_scale(kind, dimension, sum_squares, make_stream(key, step_word, kBallRadius, sample_word));
  s[kNoiseScale] = scale;
  for_chunks(plan, [&](int64_t, const Chunk& chunk) {
    const size_t t = static_cast<size_t>(chunk.tensor);
    k.perturb(moved[t].dtype, at(moved[t], chunk), at(kept[t], chunk), chunk.length, element(chunk), stream,
              (negate ? -scale : scale) * radius[t], adaptive[t], save);
  });
  if (save) s[kSaves] += 1.0;
}

// Words: read 1, adaptive 2. state gets |D g| over all tensors together.
void grad_norm_(TensorList grads, TensorList origin, Tensor state, std::vector<bool> adaptive, int64_t row) {
  const char* op = "grad_norm_";
  const Runs gradients = checked_runs(op, "grads", grads), origins = checked_runs(op, "origin", origin);
  same_layouts(op, "origin", origin, "grads", grads);
  same_dtypes(op, "origin", origins, "grads", gradients);
  same_length(op, "adaptive", adaptive.size(), "grads", gradients.size());
  in_range({op, "row"}, row, 0, kMaxSample);
  double* const s = checked_state(op, state, row + 1);
  const Kernels& k = kernels();
  const double total = sum_chunks(plan_of(gradients), [&](const Chunk& chunk) {
    const size_t t = static_cast<size_t>(chunk.tensor);
    const void* scale = adaptive[t] ? at(origins[t], chunk) : nullptr;
    return k.sum_squares(gradients[t].dtype, at(gradients[t], chunk), scale, chunk.length);
  });
  s[kGradNorm] = s[kHeader + kRow * row + kRowGradNorm] = std::sqrt(total);
}

// Words: read 2 (adaptive 3), write 1; with save read 2, write 2. Takes |D g| from state.
void ascend_(TensorList position, TensorList saved, TensorList grads, Tensor state, std::vector<double> rho,
             std::vector<bool> adaptive, bool save) {
  const char* op = "ascend_";
  const Runs moved = checked_runs(op, "position", position), kept = checked_runs(op, "saved", saved),
             gradients = checked_runs(op, "grads", grads);
  same_layouts(op, "saved", saved, "position", position);
  same_layouts(op, "grads", grads, "position", position);
  same_dtypes(op, "saved", kept, "position", moved);
  same_dtypes(op, "grads", gradients, "position", moved);
  double* const s = checked_state(op, state, 0);
  same_length(op, "rho", rho.size(), "position", moved.size());
  same_length(op, "adaptive", adaptive.size(), "position", moved.size());
  not_negative(op, "rho", rho);
  disjoint(op, {{"position", moved}, {"saved", kept}, {"grads", gradients}});
  const Kernels& k = kernels();
  for_chunks(plan_of(moved), [&](int64_t, const Chunk& chunk) {
    const size_t t = static_cast<size_t>(chunk.tensor);
    k.ascend(moved[t].dtype, at(moved[t], chunk), at(kept[t], chunk), at(gradients[t], chunk), chunk.length,
             ascent_scale(rho[t], s[kGradNorm]), adaptive[t], save);
  });
  if (save) s[kSaves] += 1.0;
}

void tilt_begin_(Tensor state, Tensor tilt) {
  const char* op = "tilt_begin_";
  double* const s = checked_state(op, state, 0);
  const double value = checked_scalar({op, "tilt"}, tilt);
  tilt_begin(s, value, state.numel());
}

// One sample more: its weight enters state, and state says what accumulate_ does with its gradient.
void tilt_update_(Tensor state, Tensor loss, double log_size, int64_t row, bool skip_nonfinite, bool last) {
  const char* op = "tilt_update_";
  in_range({op, "row"}, row, 0, kMaxSample);
  double* const s = checked_state(op, state, row + 1);
  const double value = checked_scalar({op, "loss"}, loss);
  if (!(std::fabs(log_size) < kInfinity)) fail({op, "log_size"}, std::to_string(log_size), "a finite number");
  tilt_update(s, value, log_size, skip_nonfinite, last);
  s[kHeader + kRow * row + kRowLoss] = value;
  s[kHeader + kRow * row + kRowLogSize] = log_size;
}

// Words: read 2, write 1; the first counted sample read 1, write 1. Without grads the accumulator already holds this
// sample's gradient: words 0, unless the result has become NaN.
void accumulate_(TensorList accumulator, TensorList grads, Tensor state) {
  const char* op = "accumulate_";
  const Runs sums = checked_runs(op, "accumulator", accumulator), gradients = checked_runs(op, "grads", grads);
  const bool adopted = grads.empty();
  if (!adopted) {
    same_layouts(op, "grads", grads, "accumulator", accumulator);
    same_dtypes(op, "accumulator", sums, "grads", gradients, /*in_compute_type=*/true);
  }
  const double* const s = checked_state(op, state, 0);
  disjoint(op, {{"accumulator", sums}, {"grads", gradients}});
  const int action = checked_action(op, s);
  if (action == kSkip || (adopted && action == kAssign)) return;
  if (adopted && action == kBlend) fail({op, "grads"}, "none", "gradients: only the first sample can be adopted");
  const Kernels& k = kernels();
  for_chunks(plan_of(sums), [&](int64_t, const Chunk& chunk) {
    const size_t t = static_cast<size_t>(chunk.tensor);
    char* const sum = at(sums[t], chunk);
    if (action == kPoison) {
      k.poison(sums[t].dtype, sum, chunk.length);
    } else if (action == kAssign) {
      k.assign(gradients[t].dtype, sum, at(gradients[t], chunk), chunk.length);
    } else {
      k.blend(gradients[t].dtype, sum, at(gradients[t], chunk), chunk.length, s[kKeep], s[kAdd]);
    }
  });
}

// Words: read 1, write 1. Bit for bit, whatever the dtype.
void restore_(TensorList position, TensorList saved) {
  const char* op = "restore_";
  const Runs to = checked_runs(op, "position", position), from = checked_runs(op, "saved", saved);
  same_layouts(op, "saved", saved, "position", position);
  same_dtypes(op, "saved", from, "position", to);
  disjoint(op, {{"position", to}, {"saved", from}});
  for_chunks(plan_of(to), [&](int64_t, const Chunk& chunk) {
    const size_t t = static_cast<size_t>(chunk.tensor);
    std::memcpy(at(to[t], chunk), at(from[t], chunk), static_cast<size_t>(chunk.length * item_bytes(to[t].dtype)));
  });
}

Tensor tilt_summary(Tensor state, int64_t num_samples) {
  const char* op = "tilt_summary";
  in_range({op, "num_samples"}, num_samples, 0, kMaxSample);
  const double* const s = checked_state(op, state, num_samples);
  Tensor out = torch::stable::new_empty(state, {num_samples + 2});
  double* const weights = static_cast<double*>(out.data_ptr());

  // What has no share or was skipped takes no part: it has weight 0 unless the whole result is NaN.
  std::vector<double> losses, shares;
  std::vector<int64_t> counted;
  double rows = 0.0;
  for (int64_t j = 0; j < num_samples; ++j) {
    const double* const row = s + kHeader + kRow * j;
    weights[j] = 0.0;
    if ((std::isfinite(row[kRowLoss]) && row[kRowLogSize] > -kInfinity) || std::isnan(s[kSum])) {
      counted.push_back(j);
      losses.push_back(row[kRowLoss]);
      shares.push_back(std::exp(row[kRowLogSize]));
      rows += shares.back();
    }
  }
  for (double& share : shares) share /= rows;
  std::vector<double> packed(losses.size());
  const int64_t n = static_cast<int64_t>(losses.size());
  double ess = kNaN, value = kNaN;
  if (n > 0 && !std::isnan(s[kSum])) {
    tilted_softmax(losses.data(), shares.data(), n, s[kTilt], packed.data());
    value = tilted_value(losses.data(), shares.data(), n, s[kTilt]);
    ess = s[kSum] * s[kSum] / s[kSumSquares];
  } else {
    std::fill(packed.begin(), packed.end(), kNaN);
  }
  for (size_t i = 0; i < counted.size(); ++i) weights[counted[i]] = packed[i];
  weights[num_samples] = ess;
  weights[num_samples + 1] = value;
  return out;
}

}  // namespace
}  // namespace cpu
}  // namespace tsam

STABLE_TORCH_LIBRARY_IMPL(tsam, CPU, m) {
  m.impl("perturb_", TORCH_BOX(&tsam::cpu::perturb_));
  m.impl("grad_norm_", TORCH_BOX(&tsam::cpu::grad_norm_));
  m.impl("ascend_", TORCH_BOX(&tsam::cpu::ascend_));
  m.impl("tilt_begin_", TORCH_BOX(&tsam::cpu::tilt_begin_));
  m.impl("tilt_update_", TORCH_BOX(&tsam::cpu::tilt_update_));
  m.impl("accumulate_", TORCH_BOX(&tsam::cpu::accumulate_));
  m.impl("restore_", TORCH_BOX(&tsam::cpu::restore_));
  m.impl("tilt_summary", TORCH_BOX(&tsam::cpu::tilt_summary));
}
