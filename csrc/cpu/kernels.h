// The table of CPU kernels: one object per instruction set fills it, kernels() picks one at run time.
//
// Every kernel works on one contiguous run of n elements through raw pointers, in the calling thread; ops_cpu.cpp
// cuts lists into runs and shares them over threads. Invariant: all tables compute the same bits.
#pragma once

#include <cstdint>

#include "../core/hmc.h"
#include "../core/perturb.h"
#include "../core/round.h"

namespace tsam {
namespace cpu {

// A factor of a formula: a value per element in the op's dtype, or (each null) one for all.
struct Factor {
  double all;
  const void* each;
};

// How what is written into 16 bits is rounded: to nearest, or by the words of the stream (core/round.h). Wider types do
// not look.
struct Round {
  bool stochastic;
  Stream stream;
};

// The sums of displacement_ over one run.
struct DisplacementSums {
  double squares = 0.0, along = 0.0, ascent = 0.0;  // |change / D|^2, change.g, |D g|^2
};

// The sums of take_direction_ over one run.
struct DirectionSums {
  double tilted = 0.0, product = 0.0, plain = 0.0;  // A.A, A.G, G.G
};

// A pass of HMC over one run (core/hmc.h). Null: not there.
struct HmcRun {
  void* position;      // theta, written from the moved x
  const void* origin;  // theta_0
  void* momentum;      // read, or drawn from `stream`; written but by a last kick
  const void* from;    // x before the drift
  void* to;            // x after it; may be `from`
  const void* start;   // x at the trajectory's start: sum |x' - start|^2
  const void* grad;    // for the kick
};
struct HmcPass {
  double scale;  // T = scale D
  bool adaptive;
  bool draw;      // p is drawn anew
  double a;       // of the kick
  bool products;  // u.u, u.v, v.v of the kicked momentum
  bool move;      // drift, and write theta
  Drift drift;
  Stream stream;
  uint64_t element;
  Round round;
};

// `past_caches`: the lists do not fit into the caches (parallel.h), which changes no bit.
struct Kernels {
  const char* isa;

  // sum of z^2 over the run. Words: 0.
  double (*noise_sum_squares)(int64_t n, uint64_t element, Stream stream);

  // A copy, bit for bit, past the caches or not. Words: read 1, write 1; through the caches the target is read too.
  void (*copy)(void* to, const void* from, int64_t bytes, bool past_caches);

  // position = origin + scale D z; the origin may be position itself. Words: read 1, write 1, and 1 if `saved` takes
  // the origin on the way: drawing is slower than memory, which then costs nothing.
  void (*perturb)(DType dtype, void* position, const void* origin, void* saved, int64_t n, uint64_t element,
                  Stream stream, double scale, bool adaptive, const Round& round);

  // As perturb with an origin elsewhere and as blend, side by side: the draw has no use for memory, the mean for
  // nothing else. Words: read 3, write 2.
  void (*blend_perturb)(DType dtype, void* accumulator, const void* grad, double keep, double add, void* position,
                        const void* origin, int64_t n, uint64_t element, Stream stream, double scale, bool adaptive,
                        const Round& round);

  // sum of (D g)^2, D = |origin| if origin is given. Words: read 1 (2 adaptive).
  double (*sum_squares)(DType dtype, const void* grad, const void* origin, int64_t n);

  // position += scale D^2 g, D = |origin|, which may be position itself, if origin is given. Words: read 2 (3
  // adaptive), write 1, and 1 if `saved` takes the position on the way, past the caches or not.
  void (*ascend)(DType dtype, void* position, const void* origin, void* saved, const void* grad, int64_t n,
                 double scale, bool past_caches, uint64_t element, const Round& round);

  // change = position - origin, of which D = |origin| if adaptive; no grad: the last two sums are 0. Words: read 3 (2).
  DisplacementSums (*displacement)(DType dtype, const void* position, const void* origin, const void* grad, int64_t n,
                                   bool adaptive);

  // A in dtype, G in its compute type. Words: read 2.
  DirectionSums (*direction_sums)(DType dtype, const void* tilted, const void* plain, int64_t n);

  // accumulator (in the compute type of dtype) = grad, or keep * accumulator + add * grad. Words: read 1 or 2, write 1.
  // What needs no conversion is a copy, past the caches or not.
  void (*assign)(DType dtype, void* accumulator, const void* grad, int64_t n, bool past_caches);
  // `saved` takes the gradient on the way (write 1), past the caches or not.
  void (*blend)(DType dtype, void* accumulator, const void* grad, void* saved, int64_t n, double keep, double add,
                bool past_caches);

  // accumulator = NaN, in the compute type of dtype. Words: write 1.
  void (*poison)(DType dtype, void* accumulator, int64_t n);

  // out = sum over rows of weight_j value_j, in float64 and rounded once; rows lie `row` apart, values `step` apart.
  // Words: read rows, write 1.
  void (*weighted_sum)(DType dtype, void* out, const void* values, int64_t row, int64_t step, int64_t n, int64_t rows,
                       const double* weights);
  // Words: read 1, write 2.
  void (*to_float64)(DType dtype, double* out, const void* values, int64_t n);
  // out (dtype) = rounded sum. Words: read 1, write 1.
  void (*round_sum)(DType dtype, void* out, const double* sum, int64_t n);

  // momentum_out = momentum + step / 2 grad, position_out = position + step inverse_mass momentum_out.
  // Words: read 3, write 2, and 1 for each factor that has a value per element.
  void (*leapfrog)(DType dtype, const void* position, const void* momentum, const void* grad, Factor step,
                   Factor inverse_mass, void* position_out, void* momentum_out, int64_t n, bool past_caches);

  // One pass of HMC. Words: what is not null, once each; the momentum of a draw is not read.
  HmcSums (*hmc)(DType dtype, const HmcRun& run, const HmcPass& pass, int64_t n);

  // saved = position, then position += T x with x = draw_scale z, or x itself (`draw` false). Words: read 2, write 2,
  // or read 1, write 3.
  // `past_caches`: for `saved`.
  void (*hmc_place)(DType dtype, void* position, void* saved, void* x, double scale, bool adaptive, bool draw,
                    double draw_scale, Stream stream, uint64_t element, int64_t n, bool past_caches,
                    const Round& round);

  // out = momentum + a grad. Words: read 2, write 1, and 1 if a has a value per element.
  void (*kick)(DType dtype, const void* momentum, const void* grad, Factor a, void* out, int64_t n, bool past_caches);
};

// The table for this processor; TSAM_ISA=baseline, avx2 or avx512 in the environment picks a lower one.
const Kernels& kernels();

// Its name, for tests that compare instruction sets.
const char* isa_name();

}  // namespace cpu
}  // namespace tsam
