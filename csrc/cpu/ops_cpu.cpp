// The list ops on CPU tensors: plan the chunks, share them over threads, run the kernels.
//
// Layout: ops/list_arguments.h has checked every argument; a ChunkPlan cuts the Runs, parallel.h shares the chunks over
// threads. Invariant: no result depends on the number of threads.
#include "../ops/list_arguments.h"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <cstring>
#include <string>
#include <vector>

#include "../core/chunks.h"
#include "../core/weights.h"
#include "kernels.h"
#include "parallel.h"

namespace tsam {
namespace cpu {
namespace {

using namespace ops;

// The element index of a chunk's first element, and the chunk's factor of the noise.
struct Draw {
  const PerturbArguments& a;
  Stream stream;
  double scale;

  uint64_t element(const Chunk& chunk) const { return element_of(a.base, chunk); }
  double factor(size_t t) const { return (a.negate ? -scale : scale) * a.radius[t]; }
};

// What precedes the first element of a perturbation: the noise's scale, which may take a draw of all elements without
// writing. False where the call ends with a stage's sum.
bool begin_draw(Draw& draw, const ChunkPlan& plan) {
  const PerturbArguments& a = draw.a;
  const Kernels& k = kernels();
  double squares[1] = {0.0};
  if (a.noise.needs_norm && a.stage.has(0))
    squares[0] = sum_chunks(
        plan, [&](const Chunk& chunk) { return k.noise_sum_squares(chunk.length, draw.element(chunk), draw.stream); });
  if (a.stage.ends(0, squares)) return false;
  draw.scale = noise_scale(a.noise, a.dimension, squares[0], stream_now(a.counter.stream(kBallRadius)));
  a.state[kNoiseScale] = draw.scale;
  return true;
}

// Words a float32 element: read 1, write 2 with save, else read 1, write 1. What needs the norm of z draws
// twice, and so needs no buffer: the norm has to be known before the first element is written.
void perturb(const PerturbArguments& a) {
  const ChunkPlan plan = plan_of(a.position);
  Draw draw{a, stream_now(a.counter.stream(a.noise.purpose)), 0.0};
  if (!begin_draw(draw, plan)) return;
  const Kernels& k = kernels();
  const Round round = round_of(a.rounding);
  for_chunks(plan, [&](int64_t, const Chunk& chunk) {
    const size_t t = static_cast<size_t>(chunk.tensor);
    const Run &position = a.position[t], &origin = a.save ? position : a.saved[t];
    k.perturb(position.dtype, at(position, chunk), at(origin, chunk), a.save ? at(a.saved[t], chunk) : nullptr,
              chunk.length, draw.element(chunk), draw.stream, draw.factor(t), a.adaptive[t], round);
  });
  if (a.save) a.state[kSaves] += 1.0;
}

// Words: read 1, adaptive 2. state gets |D g| over all tensors together.
void grad_norm(const GradNormArguments& a) {
  const Kernels& k = kernels();
  double squares[1] = {0.0};
  if (a.stage.has(0))
    squares[0] = sum_chunks(plan_of(a.grads), [&](const Chunk& chunk) {
      const size_t t = static_cast<size_t>(chunk.tensor);
      const void* scale = a.adaptive[t] ? at(a.origin[t], chunk) : nullptr;
      return k.sum_squares(a.grads[t].dtype, at(a.grads[t], chunk), scale, chunk.length);
    });
  if (a.stage.ends(0, squares)) return;
  a.state[kGradNorm] = a.state[kHeader + kRow * a.row + kRowGradNorm] = std::sqrt(squares[0]);
}

// Words: read 2 (adaptive 3), write 1; with save read 2, write 2. Takes |D g| from state.
void ascend(const AscendArguments& a) {
  const Kernels& k = kernels();
  const bool past_caches = goes_past_caches(a.position);
  const Round round = round_of(a.rounding);
  for_chunks(plan_of(a.position), [&](int64_t, const Chunk& chunk) {
    const size_t t = static_cast<size_t>(chunk.tensor);
    const Run &position = a.position[t], &origin = a.save ? position : a.saved[t];
    k.ascend(position.dtype, at(position, chunk), a.adaptive[t] ? at(origin, chunk) : nullptr,
             a.save ? at(a.saved[t], chunk) : nullptr, at(a.grads[t], chunk), chunk.length,
             ascent_scale(a.rho[t], a.state[kGradNorm]), past_caches, element_of(a.base, chunk), round);
  });
  if (a.save) a.state[kSaves] += 1.0;
}

// Words: read 3, without gradients 2.
void displacement(const DisplacementArguments& a) {
  const Kernels& k = kernels();
  const ChunkPlan plan = plan_of(a.position);
  std::vector<DisplacementSums> partial(static_cast<size_t>(plan.num_chunks()));
  for_chunks(plan, [&](int64_t c, const Chunk& chunk) {
    const size_t t = static_cast<size_t>(chunk.tensor);
    partial[static_cast<size_t>(c)] =
        k.displacement(a.position[t].dtype, at(a.position[t], chunk), at(a.saved[t], chunk),
                       a.grads.empty() ? nullptr : at(a.grads[t], chunk), chunk.length, a.adaptive[t]);
  });
  for (int64_t c = 0; c < plan.num_chunks(); ++c) {
    const DisplacementSums& sums = partial[static_cast<size_t>(c)];
    const size_t t = static_cast<size_t>(plan[c].tensor);
    a.sums[kSquares] += sums.squares;
    a.sums[kAlong] += sums.along;
    a.sums[kAscent] += a.rho[t] * sums.ascent;
  }
}

void tilt_begin(const TiltBeginArguments& a) { tsam::tilt_begin(a.state, scalar_value(a.tilt), a.length); }

// One sample more: its weight enters state, and state says what accumulate_ does with its gradient.
void tilt_update(const TiltUpdateArguments& a) {
  count_sample(a.state, scalar_value(a.loss), a.log_size, kNaN, a.row, a.skip_nonfinite, a.last);
}

// What the elements of an accumulator have to do; a state in which no step has begun does not say.
int action_of(const Op& op, const double* state) {
  const double action = state[kAction];
  if (!(action >= kSkip && action <= kZero))
    fail({op, "state"}, "a state in which no step has begun", "one that tilt_begin_ and tilt_update_ have written");
  return static_cast<int>(action);
}

// Words: read 2, write 1; assign read 1, write 1; poison and zero write 1.
void act(int action, const double* state, const Runs& accumulator, const Runs& grads) {
  if (action == kSkip) return;
  const Kernels& k = kernels();
  const bool past_caches = goes_past_caches(accumulator);
  for_chunks(plan_of(accumulator), [&](int64_t, const Chunk& chunk) {
    const size_t t = static_cast<size_t>(chunk.tensor);
    char* const sum = at(accumulator[t], chunk);
    if (action == kPoison) {
      k.poison(accumulator[t].dtype, sum, chunk.length);
    } else if (action == kZero) {
      std::memset(sum, 0, static_cast<size_t>(chunk.length * item_bytes(accumulator[t].dtype)));
    } else if (action == kAssign) {
      k.assign(grads[t].dtype, sum, at(grads[t], chunk), chunk.length, past_caches);
    } else {
      k.blend(grads[t].dtype, sum, at(grads[t], chunk), /*saved=*/nullptr, chunk.length, state[kKeep], state[kAdd],
              past_caches);
    }
  });
}

// Adopted: words 0, unless the result has become NaN.
void accumulate(const AccumulateArguments& a) {
  const int action = action_of(a.op, a.state);
  if (a.adopted && action == kAssign) return;
  if (a.adopted && action == kBlend) fail({a.op, "grads"}, "none", "gradients: only the first sample can be adopted");
  act(action, a.state, a.accumulator, a.grads);
}

// Both in one pass where the mean blends: it waits for memory, the draw for arithmetic. Words: read 3, write 2.
void accumulate_perturb(const AccumulatePerturbArguments& both) {
  const AccumulateArguments& mean = both.mean;
  const PerturbArguments& next = both.next;
  if (action_of(mean.op, mean.state) != kBlend) {
    if (next.stage.has(1)) accumulate(mean);
    perturb(next);
    return;
  }
  const ChunkPlan plan = plan_of(next.position);
  Draw draw{next, stream_now(next.counter.stream(next.noise.purpose)), 0.0};
  if (!begin_draw(draw, plan)) return;
  const Kernels& k = kernels();
  const Round round = round_of(next.rounding);
  for_chunks(plan, [&](int64_t, const Chunk& chunk) {
    const size_t t = static_cast<size_t>(chunk.tensor);
    k.blend_perturb(next.position[t].dtype, at(mean.accumulator[t], chunk), at(mean.grads[t], chunk), mean.state[kKeep],
                    mean.state[kAdd], at(next.position[t], chunk), at(next.saved[t], chunk), chunk.length,
                    draw.element(chunk), draw.stream, draw.factor(t), next.adaptive[t], round);
  });
}

// Words: read 2 for the sums, then read 2, write 1.
void take_direction(const DirectionArguments& a) {
  const Kernels& k = kernels();
  double sums[kDirectionSums] = {};
  if (a.stage.has(0)) {
    const ChunkPlan plan = plan_of(a.blended);
    std::vector<DirectionSums> partial(static_cast<size_t>(plan.num_chunks()));
    for_chunks(plan, [&](int64_t c, const Chunk& chunk) {
      const size_t t = static_cast<size_t>(chunk.tensor);
      partial[static_cast<size_t>(c)] =
          k.direction_sums(a.others[t].dtype, at(a.others[t], chunk), at(a.blended[t], chunk), chunk.length);
    });
    for (const DirectionSums& each : partial) {
      sums[kTiltedSquares] += each.tilted;
      sums[kProduct] += each.product;
      sums[kPlainSquares] += each.plain;
    }
  }
  if (a.stage.ends(0, sums)) return;
  std::copy_n(sums, size_t{kDirectionSums}, a.direction);
  tsam::take_direction(a.direction);
  act(tilt_action(a.direction), a.direction, a.blended, a.others);
}

// Words: read 1 for the norm, then read 2, write 1.
void add_direction(const DirectionArguments& a) {
  const Kernels& k = kernels();
  double squares[1] = {0.0};
  if (a.stage.has(0))
    squares[0] = sum_chunks(plan_of(a.blended), [&](const Chunk& chunk) {
      const Run& grad = a.blended[static_cast<size_t>(chunk.tensor)];
      return k.sum_squares(grad.dtype, at(grad, chunk), nullptr, chunk.length);
    });
  if (a.stage.ends(0, squares)) return;
  a.direction[kTiltedSquares] = squares[0];
  tsam::add_direction(a.direction);
  act(tilt_action(a.direction), a.direction, a.blended, a.others);
}

// Words: read 1, write 1. Bit for bit, whatever the dtype.
void restore(const RestoreArguments& a) {
  const Kernels& k = kernels();
  const bool past_caches = goes_past_caches(a.position);
  for_chunks(plan_of(a.position), [&](int64_t, const Chunk& chunk) {
    const size_t t = static_cast<size_t>(chunk.tensor);
    const Run& to = a.position[t];
    k.copy(at(to, chunk), at(a.saved[t], chunk), chunk.length * item_bytes(to.dtype), past_caches);
  });
}

Tensor summary(const TiltSummaryArguments& a) {
  Tensor out = torch::stable::new_empty(a.home, {a.num_samples + 2});
  std::vector<double> scratch(static_cast<size_t>(2 * a.num_samples));
  tilt_summary(a.state, a.num_samples, scratch.data(), static_cast<double*>(out.data_ptr()));
  return out;
}

}  // namespace
}  // namespace cpu
}  // namespace tsam

STABLE_TORCH_LIBRARY_IMPL(tsam, CPU, m) {
  using namespace tsam;
  m.impl("perturb_", TORCH_BOX(&ops::perturb_<cpu::perturb>));
  m.impl("grad_norm_", TORCH_BOX(&ops::grad_norm_<cpu::grad_norm>));
  m.impl("ascend_", TORCH_BOX(&ops::ascend_<cpu::ascend>));
  m.impl("norm_ascend_", TORCH_BOX((&ops::norm_ascend_<cpu::grad_norm, cpu::ascend>)));
  m.impl("displacement_", TORCH_BOX(&ops::displacement_<cpu::displacement>));
  m.impl("tilt_begin_", TORCH_BOX(&ops::tilt_begin_<cpu::tilt_begin>));
  m.impl("tilt_update_", TORCH_BOX(&ops::tilt_update_<cpu::tilt_update>));
  m.impl("accumulate_", TORCH_BOX(&ops::accumulate_<cpu::accumulate>));
  m.impl("accumulate_perturb_", TORCH_BOX(&ops::accumulate_perturb_<cpu::accumulate_perturb>));
  m.impl("take_direction_", TORCH_BOX(&ops::take_direction_<cpu::take_direction>));
  m.impl("add_direction_", TORCH_BOX(&ops::add_direction_<cpu::add_direction>));
  m.impl("restore_", TORCH_BOX(&ops::restore_<cpu::restore>));
  m.impl("tilt_summary", TORCH_BOX(&ops::tilt_summary<cpu::summary>));
}
