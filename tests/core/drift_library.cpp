// The drifts and the accept test as a shared library for ctypes: tests/test_drift.py asserts their laws.
//
// Layout: a drift is five doubles (a, b, c, d, reflections), a chain kChain doubles. Invariant: no arithmetic of its
// own; every function hands its arguments to csrc/core.
#include "../../csrc/core/drift.h"
#include "../../csrc/core/metropolis.h"
#include "../../csrc/cpu/lanes.h"

using namespace tsam;

static void store(const Drift& drift, double* out) {
  const double values[] = {drift.a, drift.b, drift.c, drift.d, drift.reflections};
  std::memcpy(out, values, sizeof values);
}

template <typename C>
static void apply(const double* drift, int64_t n, C* u, C* v) {
  const DriftMap<C> map(Drift{drift[0], drift[1], drift[2], drift[3], 0.0});
  for (int64_t i = 0; i < n; ++i) map(u[i], v[i]);
}

// n: a multiple of 16.
static void apply_lanes(const double* drift, int64_t n, float* u, float* v) {
  using V = cpu_apply::Lanes<float>;
  const DriftMap<float> map(Drift{drift[0], drift[1], drift[2], drift[3], 0.0});
  for (int64_t i = 0; i < n; i += V::kCount) {
    V x(u + i), y(v + i);
    map(x, y);
    x.store(u + i);
    y.store(v + i);
  }
}

extern "C" {

void rotation(double h, double* out) { store(rotation_drift(h), out); }
void ball(double uu, double uv, double vv, double h, double* out) { store(ball_drift(uu, uv, vv, h), out); }

void apply_float1(const double* drift, int64_t n, float* u, float* v) { apply<float>(drift, n, u, v); }
void apply_float_lanes(const double* drift, int64_t n, float* u, float* v) { apply_lanes(drift, n, u, v); }
void apply_double1(const double* drift, int64_t n, double* u, double* v) { apply<double>(drift, n, u, v); }

int chain_slots() { return kChain; }
void create(double* s, double log_step) { chain_create(s, log_step); }
void begin(double* s, double delta, double loss) { chain_begin(s, delta, loss); }
void launch(double* s) { trajectory_begin(s); }
void kick(double* s, double a, double pq, double qq) { kick_energy(s, a, pq, qq); }
int land(double* s, double loss, uint64_t seed, uint32_t step, uint32_t trajectory) {
  return trajectory_end(s, loss, make_stream(seed, step, kAccept, trajectory));
}
double accept_uniform(uint64_t seed, uint32_t step, uint32_t trajectory) {
  return scalar_uniform(make_stream(seed, step, kAccept, trajectory));
}
void adapt(double* s) { adapt_step(s); }

}  // extern "C"
