// The list ops up to their kernels: each op's signature and all its checks, once for every back end.
//
// Layout: <op>_<run> is the function that a back end registers; it parses the arguments into the op's struct and calls
// run with it. Tensors have become Runs, the state a pointer, numbers that came as tensors Scalars: the back end alone
// may read what they point to. Invariant: when run is called, nothing is written yet, and nothing is left to refuse but
// what only the values behind those pointers tell (accumulate_).
#pragma once

#include <algorithm>
#include <string>
#include <vector>

#include "../core/direction.h"
#include "../core/perturb.h"
#include "../core/round.h"
#include "checks.h"

namespace tsam {
namespace ops {

using namespace checks;
using Numbers = std::vector<double>;
using Flags = std::vector<bool>;
using Integers = std::vector<int64_t>;

// The whole of a draw's counter but the purpose and the element. `held`: the slot for a step that is not an argument.
struct Counter {
  uint64_t seed;
  uint32_t step, draw;
  const double* held;

  Counter(const Op& op, int64_t seed, int64_t step, const double* held, const char* argument, int64_t draw)
      : seed(static_cast<uint64_t>(seed)),
        step(static_cast<uint32_t>(step)),
        draw(static_cast<uint32_t>(draw)),
        held(step == kStepHeld ? held : nullptr) {
    in_range({op, "step"}, step, kStepHeld, UINT32_MAX);
    in_range({op, argument}, draw, 0, kMaxSample);
  }
  CountedStream stream(Purpose purpose) const { return {make_stream(seed, step, purpose, draw), held}; }
};

// `number`: kToNearest, or the sample of the rounding's counter (core/round.h). `base` says where each tensor lies
// there.
inline Rounding checked_rounding(const Op& op, int64_t number, int64_t seed, int64_t step, const double* held) {
  in_range({op, "rounding"}, number, kToNearest, kMaxSample);
  const bool stochastic = number != kToNearest;
  const Counter counter(op, seed, step, held, "rounding", stochastic ? number : 0);
  return {stochastic, counter.stream(kStochasticRounding)};
}

// A list over several devices takes a call per device and stage. A stage ends where a sum over the whole list is
// needed: it leaves this device's sums in `totals`, and the next stage finds there what all devices have. Otherwise one
// call does all.
constexpr int64_t kAllStages = -1;

struct Stage {
  int64_t number;
  double* totals;

  Stage(const Op& op, int64_t number, int64_t last, double* totals) : number(number), totals(totals) {
    in_range({op, "stage"}, number, kAllStages, last);
  }
  bool has(int64_t n) const { return number == kAllStages || number == n; }
  // After the pass of stage n: true where the call ends with its sums left. Otherwise they are those of all devices.
  template <size_t K>
  bool ends(int64_t n, double (&sums)[K]) const {
    if (number == n) std::copy_n(sums, K, totals);
    if (number == n + 1) std::copy_n(totals, K, sums);
    return number == n;
  }
};

struct PerturbArguments {
  Tensor home;  // any tensor of the op, for where its memory is
  Runs position, saved;
  double* state;
  Numbers radius;
  Flags adaptive;
  Integers base;
  Counter counter;
  Noise noise;
  int64_t dimension;
  bool negate, save;
  Rounding rounding;
  Stage stage;
};

inline PerturbArguments perturb_arguments(const Op& op, const TensorList& position, const TensorList& saved,
                                          const Tensor& state, const Numbers& radius, const Flags& adaptive,
                                          const Integers& base, int64_t seed, int64_t step, int64_t sample,
                                          int64_t noise, int64_t dimension, bool negate, bool save, int64_t rounding,
                                          int64_t stage) {
  const Runs moved = checked_runs(op, "position", position), kept = checked_runs(op, "saved", saved);
  same_layouts(op, "saved", kept, "position", moved);
  same_dtypes(op, "saved", kept, "position", moved);
  double* const s = checked_state(op, state, 0);
  same_length(op, "radius", radius.size(), "position", moved.size());
  same_length(op, "adaptive", adaptive.size(), "position", moved.size());
  same_length(op, "base", base.size(), "position", moved.size());
  not_negative(op, "radius", radius);
  const Counter counter(op, seed, step, s + kStep, "sample", sample);
  in_range({op, "dimension"}, dimension, 0, INT64_MAX);
  const Noise& kind = checked_noise({op, "noise"}, noise);
  const Rounding rounds = checked_rounding(op, rounding, seed, step, s + kStep);
  const Stage part(op, stage, 1, s + kTotal);
  return {state, moved, kept, s, radius, adaptive, base, counter, kind, dimension, negate, save, rounds, part};
}

template <void (*run)(const PerturbArguments&)>
void perturb_(const TensorList& position, const TensorList& saved, Tensor state, Numbers radius, Flags adaptive,
              Integers base, int64_t seed, int64_t step, int64_t sample, int64_t noise, int64_t dimension, bool negate,
              bool save, int64_t rounding, int64_t stage) {
  const Op op("perturb_", state);
  const PerturbArguments a = perturb_arguments(op, position, saved, state, radius, adaptive, base, seed, step, sample,
                                               noise, dimension, negate, save, rounding, stage);
  disjoint(op, {{"position", a.position}, {"saved", a.saved}});
  run(a);
}

struct GradNormArguments {
  Tensor home;
  Runs grads, origin;
  double* state;
  Flags adaptive;
  int64_t row;
  Stage stage;
};

template <void (*run)(const GradNormArguments&)>
void grad_norm_(const TensorList& grads, const TensorList& origin, Tensor state, Flags adaptive, int64_t row,
                int64_t stage) {
  const Op op("grad_norm_", state);
  const Runs gradients = checked_runs(op, "grads", grads), origins = checked_runs(op, "origin", origin);
  same_layouts(op, "origin", origins, "grads", gradients);
  same_dtypes(op, "origin", origins, "grads", gradients);
  same_length(op, "adaptive", adaptive.size(), "grads", gradients.size());
  in_range({op, "row"}, row, 0, kMaxSample);
  double* const s = checked_state(op, state, row + 1);
  run({state, gradients, origins, s, adaptive, row, Stage(op, stage, 1, s + kTotal)});
}

struct AscendArguments {
  Tensor home;
  Runs position, saved, grads;
  double* state;
  Numbers rho;
  Flags adaptive;
  bool save;
  Integers base;
  Rounding rounding;
};

inline AscendArguments ascend_arguments(const Op& op, const TensorList& position, const TensorList& saved,
                                        const TensorList& grads, const Tensor& state, int64_t rows, const Numbers& rho,
                                        const Flags& adaptive, bool save, Integers base, int64_t seed, int64_t step,
                                        int64_t rounding, bool unsaved = false) {
  const Runs moved = checked_runs(op, "position", position), kept = checked_runs(op, "saved", saved),
             gradients = checked_runs(op, "grads", grads);
  if (!unsaved) same_layouts(op, "saved", kept, "position", moved);
  same_layouts(op, "grads", gradients, "position", moved);
  same_dtypes(op, "saved", kept, "position", moved);
  same_dtypes(op, "grads", gradients, "position", moved);
  double* const s = checked_state(op, state, rows);
  same_length(op, "rho", rho.size(), "position", moved.size());
  same_length(op, "adaptive", adaptive.size(), "position", moved.size());
  finite(op, "rho", rho);  // below 0: a descent
  const Rounding rounds = checked_rounding(op, rounding, seed, step, s + kStep);
  if (rounds.stochastic || !base.empty()) same_length(op, "base", base.size(), "position", moved.size());
  if (base.empty()) base.resize(moved.size());  // nobody looks
  disjoint(op, {{"position", moved}, {"saved", kept}, {"grads", gradients}});
  return {state, moved, unsaved ? moved : kept, gradients, s, rho, adaptive, save, base, rounds};
}

template <void (*run)(const AscendArguments&)>
void ascend_(const TensorList& position, const TensorList& saved, const TensorList& grads, Tensor state, Numbers rho,
             Flags adaptive, bool save, Integers base, int64_t seed, int64_t step, int64_t rounding) {
  const Op op("ascend_", state);
  run(ascend_arguments(op, position, saved, grads, state, 0, rho, adaptive, save, std::move(base), seed, step,
                       rounding));
}

// grad_norm_ and ascend_ over the same tensors, whose lists are converted and checked once. With save the positions are
// where the ascent begins, and so the norm's origin. One rho, one adaptive: of all tensors. An empty saved: nobody
// looks.
template <void (*norm)(const GradNormArguments&), void (*ascend)(const AscendArguments&)>
void norm_ascend_(const TensorList& position, const TensorList& saved, const TensorList& grads, Tensor state,
                  Numbers rho, Flags adaptive, bool save, int64_t row, Integers base, int64_t seed, int64_t step,
                  int64_t rounding, int64_t stage) {
  const Op op("norm_ascend_", state);
  in_range({op, "row"}, row, 0, kMaxSample);
  if (rho.size() == 1) rho.resize(position.size(), rho[0]);
  if (adaptive.size() == 1) adaptive.resize(position.size(), adaptive[0]);
  const bool unsaved = saved.empty() && !save && std::find(adaptive.begin(), adaptive.end(), true) == adaptive.end();
  const AscendArguments a = ascend_arguments(op, position, saved, grads, state, row + 1, rho, adaptive, save,
                                             std::move(base), seed, step, rounding, unsaved);
  const Stage part(op, stage, 1, a.state + kTotal);
  norm({state, a.grads, save ? a.position : a.saved, a.state, adaptive, row, part});
  if (part.has(1)) ascend(a);
}

// What displacement_ adds its sums to.
enum Displacement : int { kSquares = 0, kAlong = 1, kAscent = 2, kDisplacements = 3 };

struct DisplacementArguments {
  Tensor home;
  Runs position, saved, grads;  // no grads: only squares
  double* sums;
  Numbers rho;
  Flags adaptive;
};

template <void (*run)(const DisplacementArguments&)>
void displacement_(const TensorList& position, const TensorList& saved, const TensorList& grads, Tensor sums,
                   Numbers rho, Flags adaptive) {
  const Op op("displacement_", sums);
  const Runs moved = checked_runs(op, "position", position), kept = checked_runs(op, "saved", saved),
             gradients = checked_runs(op, "grads", grads);
  same_layouts(op, "saved", kept, "position", moved);
  same_dtypes(op, "saved", kept, "position", moved);
  if (!grads.empty()) {
    same_layouts(op, "grads", gradients, "position", moved);
    same_dtypes(op, "grads", gradients, "position", moved);
  }
  same_length(op, "rho", rho.size(), "position", moved.size());
  same_length(op, "adaptive", adaptive.size(), "position", moved.size());
  not_negative(op, "rho", rho);
  const Where where{op, "sums"};
  const Run out = checked_run(where, sums);
  if (out.dtype != DType::kFloat64 || out.size < kDisplacements || !out.layout.is_contiguous())
    fail(where, shape_name(out.layout) + " and dtype " + dtype_name(out.dtype),
         "a contiguous float64 tensor of at least " + std::to_string(int{kDisplacements}) + " elements");
  run({sums, moved, kept, gradients, reinterpret_cast<double*>(out.data), rho, adaptive});
}

struct TiltBeginArguments {
  Tensor home;
  double* state;
  int64_t length;
  Scalar tilt;
};

template <void (*run)(const TiltBeginArguments&)>
void tilt_begin_(Tensor state, Tensor tilt) {
  const Op op("tilt_begin_", state);
  double* const s = checked_state(op, state, 0);
  run({state, s, state.numel(), checked_scalar({op, "tilt"}, tilt)});
}

struct TiltUpdateArguments {
  Tensor home;
  double* state;
  Scalar loss;
  double log_size;
  int64_t row;
  bool skip_nonfinite, last;
};

template <void (*run)(const TiltUpdateArguments&)>
void tilt_update_(Tensor state, Tensor loss, double log_size, int64_t row, bool skip_nonfinite, bool last) {
  const Op op("tilt_update_", state);
  in_range({op, "row"}, row, 0, kMaxSample);
  double* const s = checked_state(op, state, row + 1);
  const Scalar value = checked_scalar({op, "loss"}, loss);
  if (!(std::fabs(log_size) < kInfinity)) fail({op, "log_size"}, std::to_string(log_size), "a finite number");
  run({state, s, value, log_size, row, skip_nonfinite, last});
}

// With no grads for its tensors the accumulator already holds this sample's gradient (`adopted`).
struct AccumulateArguments {
  Op op;
  Tensor home;
  Runs accumulator, grads;
  double* state;
  bool adopted;
};

inline AccumulateArguments accumulate_arguments(const Op& op, const TensorList& accumulator, const TensorList& grads,
                                                const Tensor& state) {
  const Runs sums = checked_runs(op, "accumulator", accumulator), gradients = checked_runs(op, "grads", grads);
  const bool adopted = grads.empty() && !sums.empty();
  if (!adopted) {
    same_layouts(op, "grads", gradients, "accumulator", sums);
    same_dtypes(op, "accumulator", sums, "grads", gradients, /*in_compute_type=*/true);
  }
  return {op, state, sums, gradients, checked_state(op, state, 0), adopted};
}

template <void (*run)(const AccumulateArguments&)>
void accumulate_(const TensorList& accumulator, const TensorList& grads, Tensor state) {
  const Op op("accumulate_", state);
  const AccumulateArguments a = accumulate_arguments(op, accumulator, grads, state);
  disjoint(op, {{"accumulator", a.accumulator}, {"grads", a.grads}});
  run(a);
}

// One sample's accumulate_ and the next one's perturb_, over the same tensors.
struct AccumulatePerturbArguments {
  AccumulateArguments mean;
  PerturbArguments next;
};

template <void (*run)(const AccumulatePerturbArguments&)>
void accumulate_perturb_(const TensorList& accumulator, const TensorList& grads, const TensorList& position,
                         const TensorList& saved, Tensor state, Numbers radius, Flags adaptive, Integers base,
                         int64_t seed, int64_t step, int64_t sample, int64_t noise, int64_t dimension, bool negate,
                         int64_t rounding, int64_t stage) {
  const Op op("accumulate_perturb_", state);
  const PerturbArguments next = perturb_arguments(op, position, saved, state, radius, adaptive, base, seed, step,
                                                  sample, noise, dimension, negate, /*save=*/false, rounding, stage);
  const AccumulateArguments mean = accumulate_arguments(op, accumulator, grads, state);
  same_layouts(op, "grads", mean.grads, "position", next.position);
  same_dtypes(op, "grads", mean.grads, "position", next.position);
  disjoint(
      op,
      {{"position", next.position}, {"saved", next.saved}, {"accumulator", mean.accumulator}, {"grads", mean.grads}});
  run({mean, next});
}

// `blended` becomes v (take_direction_) or gets it added (add_direction_): in the compute type of `others`, which are A
// or v.
struct DirectionArguments {
  Tensor home;
  Runs blended, others;
  double* direction;
  Stage stage;
};

inline DirectionArguments direction_arguments(const Op& op, const char* blended, const TensorList& into,
                                              const char* others, const TensorList& from, const Tensor& direction,
                                              int64_t stage) {
  const Runs to = checked_runs(op, blended, into), added = checked_runs(op, others, from);
  same_layouts(op, others, added, blended, to);
  same_dtypes(op, blended, to, others, added, /*in_compute_type=*/true);
  const Where where{op, "direction"};
  const Run run = checked_run(where, direction);
  if (run.dtype != DType::kFloat64 || run.size != kDirectionSlots || !run.layout.is_contiguous())
    fail(where, shape_name(run.layout) + " and dtype " + dtype_name(run.dtype),
         "a contiguous float64 tensor of " + std::to_string(int{kDirectionSlots}) + " elements");
  double* const d = reinterpret_cast<double*>(run.data);
  const Stage part(op, stage, 1, d);
  disjoint(op, {{blended, to}, {others, added}});
  return {direction, to, added, d, part};
}

template <void (*run)(const DirectionArguments&)>
void take_direction_(const TensorList& plain, const TensorList& tilted, Tensor direction, int64_t stage) {
  const Op op("take_direction_", direction);
  run(direction_arguments(op, "plain", plain, "tilted", tilted, direction, stage));
}

template <void (*run)(const DirectionArguments&)>
void add_direction_(const TensorList& grads, const TensorList& carried, Tensor direction, int64_t stage) {
  const Op op("add_direction_", direction);
  run(direction_arguments(op, "grads", grads, "carried", carried, direction, stage));
}

struct RestoreArguments {
  Tensor home;
  Runs position, saved;
};

template <void (*run)(const RestoreArguments&)>
void restore_(const TensorList& position, const TensorList& saved) {
  if (position.empty() && saved.empty()) return;
  const Op op("restore_", position.empty() ? saved[0] : position[0]);
  const Runs to = checked_runs(op, "position", position), from = checked_runs(op, "saved", saved);
  same_layouts(op, "saved", from, "position", to);
  same_dtypes(op, "saved", from, "position", to);
  disjoint(op, {{"position", to}, {"saved", from}});
  run({position[0], to, from});
}

struct TiltSummaryArguments {
  Tensor home;
  double* state;
  int64_t num_samples;
};

template <Tensor (*run)(const TiltSummaryArguments&)>
Tensor tilt_summary(Tensor state, int64_t num_samples) {
  const Op op("tilt_summary", state);
  in_range({op, "num_samples"}, num_samples, 0, kMaxSample);
  double* const s = checked_state(op, state, num_samples);
  return run({state, s, num_samples});
}

}  // namespace ops
}  // namespace tsam
