// Every op of the library on one screen. (a!) marks what an op writes; list ops take lists of any length and dtype mix
// on one device. csrc/README.md says how an op is added; python/tsam_ext/_ops.py holds fakes and autograd formulas.
//
// rounding: of what is written into 16 bits, -1 to nearest, else stochastic with this sample of the counter
// (core/round.h); other types do not look.
//
// No str arguments: with the headers of torch 2.13 and older each one leaks a string a call. noise: core/perturb.h.
// state: float64, core/tilt.h gives its slots. base: element index of each tensor's first element. stage: for lists
// over several devices (list_arguments.h); -1 is the whole op.
#include <torch/csrc/stable/library.h>

#include <utility>
#include <vector>

#include "../core/perturb.h"

namespace tsam {
namespace ops {

// For Python: the kinds of noise by number, and whether each needs the norm of a whole draw.
std::vector<std::pair<const char*, bool>> noises() {
  std::vector<std::pair<const char*, bool>> all;
  for (const Noise& noise : kNoises) all.emplace_back(noise.name, noise.needs_norm);
  return all;
}

}  // namespace ops
}  // namespace tsam

STABLE_TORCH_LIBRARY(tsam, m) {
  // Differentiable.
  m.def("tilted_loss(Tensor losses, float tilt) -> Tensor");
  m.def("tilted_weights(Tensor losses, float tilt) -> Tensor");
  m.def("tilted_reduce(Tensor losses, Tensor values, float tilt) -> Tensor");
  m.def(
      "leapfrog(Tensor position, Tensor momentum, Tensor grad_log_density, Tensor step_size, Tensor inverse_mass) "
      "-> (Tensor, Tensor)");
  m.def("kick(Tensor momentum, Tensor grad_log_density, Tensor a) -> Tensor");
  m.def("perturb(Tensor x, Tensor radius, int seed, int draw, int base, int kind) -> Tensor");

  // The same moves in place; not differentiable.
  m.def(
      "leapfrog_(Tensor(a!) position, Tensor(b!) momentum, Tensor grad_log_density, Tensor step_size, "
      "Tensor inverse_mass) -> ()");
  m.def("kick_(Tensor(a!) momentum, Tensor grad_log_density, Tensor a) -> ()");

  // Weights of the samples that state has seen, then ESS and tilted loss: float64 [num_samples + 2].
  m.def("tilt_summary(Tensor state, int num_samples) -> Tensor");

  // In place over lists; not differentiable.
  m.def(
      "perturb_(Tensor(a!)[] position, Tensor(b!)[] saved, Tensor(c!) state, float[] radius, bool[] adaptive, "
      "int[] base, int seed, int step, int sample, int noise, int dimension, bool negate, bool save, int rounding=-1, "
      "int stage=-1) -> ()");
  m.def("grad_norm_(Tensor[] grads, Tensor[] origin, Tensor(a!) state, bool[] adaptive, int row, int stage=-1) -> ()");
  m.def(
      "ascend_(Tensor(a!)[] position, Tensor(b!)[] saved, Tensor[] grads, Tensor(c!) state, float[] rho, bool[] "
      "adaptive, bool save, int[] base=[], int seed=0, int step=0, int rounding=-1) -> ()");
  // grad_norm_ and ascend_ at once. rho and adaptive: one entry is for all. saved may be empty where nobody needs it.
  m.def(
      "norm_ascend_(Tensor(a!)[] position, Tensor(b!)[] saved, Tensor[] grads, Tensor(c!) state, float[] rho, bool[] "
      "adaptive, bool save, int row, int[] base=[], int seed=0, int step=0, int rounding=-1, int stage=-1) -> ()");
  // How far positions are from where they were saved: to sums, float64 [3], are added those of |change / D|^2, change.g
  // and rho |D g|^2; without grads the last two are 0.
  m.def(
      "displacement_(Tensor[] position, Tensor[] saved, Tensor[] grads, Tensor(a!) sums, float[] rho, bool[] adaptive) "
      "-> ()");
  m.def("tilt_begin_(Tensor(a!) state, Tensor tilt) -> ()");
  m.def("tilt_update_(Tensor(a!) state, Tensor loss, float log_size, int row, bool skip_nonfinite, bool last) -> ()");
  m.def("accumulate_(Tensor(a!)[] accumulator, Tensor[] grads, Tensor state) -> ()");
  m.def(
      "accumulate_perturb_(Tensor(a!)[] accumulator, Tensor[] grads, Tensor(b!)[] position, Tensor[] saved, "
      "Tensor(c!) state, float[] radius, bool[] adaptive, int[] base, int seed, int step, int sample, int noise, "
      "int dimension, bool negate, int rounding=-1, int stage=-1) -> ()");
  // The direction that is carried from a full step to the steps after it; direction: float64, core/direction.h gives
  // its slots. take: `plain`, the mean of the first gradients, becomes the direction. add: grads += |grads| carried.
  m.def("take_direction_(Tensor(a!)[] plain, Tensor[] tilted, Tensor(b!) direction, int stage=-1) -> ()");
  m.def("add_direction_(Tensor(a!)[] grads, Tensor[] carried, Tensor(b!) direction, int stage=-1) -> ()");
  m.def("restore_(Tensor(a!)[] position, Tensor[] saved) -> ()");

  // Hamiltonian Monte Carlo, in place over lists. chain: float64, core/metropolis.h gives its slots. prior: core/hmc.h.
  // kick, drift: factors of the step size, from an integrator's list of coefficients.
  m.def(
      "hmc_place_(Tensor(a!)[] position, Tensor(b!)[] saved, Tensor(c!)[] x0, Tensor(d!)[] x1, Tensor(e!)[] x2, "
      "Tensor chain, Tensor(f!) state, float[] rho, bool[] adaptive, int[] base, int seed, int step, int dimension, "
      "int prior, bool draw, int rounding=-1, int stage=-1) -> ()");
  m.def(
      "hmc_begin_(Tensor[] saved, Tensor[] grads, Tensor(a!) chain, Tensor(b!) state, Tensor loss, Tensor tilt, "
      "Tensor delta, bool automatic, float[] rho, bool[] adaptive, int dimension, int prior, int stage=-1) -> ()");
  m.def(
      "hmc_leapfrog_(Tensor(a!)[] position, Tensor[] saved, Tensor(b!)[] momentum, Tensor(c!)[] x0, Tensor(d!)[] x1, "
      "Tensor(e!)[] x2, Tensor[] grads, Tensor(f!) chain, float[] rho, bool[] adaptive, int[] base, int seed, "
      "int step, int trajectory, int dimension, int prior, float kick, float drift, bool first, bool measure, int "
      "rounding=-1, int stage=-1) -> ()");
  m.def(
      "hmc_end_(Tensor[] saved, Tensor[] momentum, Tensor[] grads, Tensor(a!) chain, Tensor(b!) state, Tensor loss, "
      "float[] rho, bool[] adaptive, int seed, int step, int trajectory, int dimension, int prior, float kick, "
      "int row, bool metropolis, bool skip_nonfinite, bool last, int stage=-1) -> ()");
  m.def(
      "hmc_recycle_(Tensor(a!) chain, Tensor(b!) state, Tensor loss, float share, int row, int part, bool metropolis, "
      "bool skip_nonfinite, bool last) -> ()");
  m.def(
      "hmc_carry_(Tensor(a!)[] accumulator, Tensor(b!)[] carried, Tensor[] grads, Tensor chain, Tensor state, "
      "bool count) -> ()");
  m.def("hmc_adapt_(Tensor(a!) chain, float highest) -> ()");
}
