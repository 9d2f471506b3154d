// The kernels of one instruction set: core functors walked by the loops of apply.h. Compiled once per set with
// TSAM_ISA naming it; words moved per element stand beside each kernel in kernels.h.
//
// Invariant: nothing but the table is named outside this set's namespace, and none is a template of another library.
#include "apply.h"

#include <cstring>

#include "../core/weights.h"
#include "copy.h"
#include "hmc_pass.h"
#include "leapfrog_pass.h"
#include "rows.h"
#include "sums.h"

namespace tsam {
inline namespace TSAM_ISA {
namespace cpu_apply {
namespace {

void copy(void* to, const void* from, int64_t bytes, bool past_caches) {
  if (past_caches) {
    copy_past_caches(to, from, bytes);
  } else {
    std::memcpy(to, from, static_cast<size_t>(bytes));
  }
}

struct NothingBeside {
  template <typename Count>
  void operator()(int64_t, Count) const {}
};

template <typename C>
Lanes<C> lanes_of(const float* z) {
  if constexpr (std::is_same_v<C, double>) {
    return widened(Lanes<float>(z));
  } else {
    return Lanes<C>(z);
  }
}

// `beside` does its own work on the lanes of each block.
template <typename T, typename Write, typename Beside = NothingBeside>
void perturb_run(T* position, const T* from, T* saved, int64_t n, uint64_t element, const Stream& stream, double scale,
                 bool adaptive, const Write& write, const Beside& beside = {}) {
  using C = compute_t<T>;
  constexpr int W = 4 * kQuads;
  const Perturb<C> functor{static_cast<C>(scale), adaptive};
  const auto block = [&](int64_t i, auto count, const float (&z)[W]) {
    beside(i, count);
    if (saved != nullptr) std::memcpy(saved + i, from + i, static_cast<size_t>(count) * sizeof(T));
    if constexpr (kInRegisters<T, decltype(count)>) {
      for (int k = 0; k < W; k += Lanes<C>::kCount)
        functor.moved(Lanes<C>(from + i + k), lanes_of<C>(z + k)).store(position + i + k);
    } else {
      C origin[W], moved[W];
      load(from + i, count, origin);
      functor(origin, z, moved);
      write(moved, element + static_cast<uint64_t>(i), count, position + i);
    }
  };
  if (draws_signs(stream)) {
    for_noise<SignBlocks>(n, element, stream, block);
  } else {
    for_noise(n, element, stream, block);
  }
}

void perturb(DType dtype, void* position, const void* origin, void* saved, int64_t n, uint64_t element, Stream stream,
             double scale, bool adaptive, const cpu::Round& round) {
  for_dtype(dtype, [&](auto* t) {
    using T = std::remove_pointer_t<decltype(t)>;
    with_rounding<T>(round, [&](const auto& write) {
      perturb_run(static_cast<T*>(position), static_cast<const T*>(origin), static_cast<T*>(saved), n, element, stream,
                  scale, adaptive, write);
    });
  });
}

template <typename L, typename T, typename Write>
void ascend_run(T* p, const T* o, T* kept, const T* g, int64_t n, double scale, bool past_caches, uint64_t element,
                const Write& write) {
  using C = compute_t<T>;
  // A draw of words is vectorised at its own width.
  constexpr int W = std::is_same_v<Write, ToNearest> ? kLanes : 4 * kQuads;
  const Ascend<C> functor{static_cast<C>(scale), o != nullptr};
  for_blocks<W>(n, [&](int64_t i, auto count) {
    if (kept != nullptr) save_block<W>(p + i, count, kept + i, past_caches);
    if constexpr (kInRegisters<T, decltype(count)>) {
      for (int64_t k = i; k < i + W; k += L::kCount) {
        const L x(p + k), gradient(g + k);
        (o != nullptr ? functor.moved_by(L(o + k), gradient, x) : functor.moved(gradient, x)).store(p + k);
      }
    } else {
      C x[W], d[W], gradient[W];
      load(p + i, count, x);
      load(g + i, count, gradient);
      if (o != nullptr) {
        load(o + i, count, d);
      } else {
        for (int k = 0; k < W; ++k) d[k] = C(0);
      }
      functor(d, gradient, x);
      write(x, element + static_cast<uint64_t>(i), count, p + i);
    }
  });
  if (kept != nullptr && past_caches) streamed();
}

void ascend(DType dtype, void* position, const void* origin, void* saved, const void* grad, int64_t n, double scale,
            bool past_caches, uint64_t element, const cpu::Round& round) {
  for_dtype(dtype, [&](auto* t) {
    using T = std::remove_pointer_t<decltype(t)>;
    with_rounding<T>(round, [&](const auto& write) {
      with_lanes<T>(past_caches, [&](auto* lanes) {
        using L = std::remove_pointer_t<decltype(lanes)>;
        ascend_run<L>(static_cast<T*>(position), static_cast<const T*>(origin), static_cast<T*>(saved),
                      static_cast<const T*>(grad), n, scale, past_caches, element, write);
      });
    });
  });
}

void assign(DType dtype, void* accumulator, const void* grad, int64_t n, bool past_caches) {
  for_dtype(dtype, [&](auto* t) {
    using T = std::remove_pointer_t<decltype(t)>;
    using C = compute_t<T>;
    if constexpr (std::is_same_v<T, C>) {
      copy(accumulator, grad, n * static_cast<int64_t>(sizeof(T)), past_caches);
    } else {
      C* a = static_cast<C*>(accumulator);
      const T* g = static_cast<const T*>(grad);
      for_blocks<kLanes>(n, [&](int64_t i, auto count) {
        C x[kLanes];
        load(g + i, count, x);
        store(x, count, a + i);
      });
    }
  });
}

// One lane block of blend.
template <typename T, int W, typename L = Lanes<compute_t<T>>>
struct Blend {
  using C = compute_t<T>;
  C* accumulator;
  const T* grad;
  Accumulate<C> functor;

  Blend(void* accumulator, const void* grad, double keep, double add)
      : accumulator(static_cast<C*>(accumulator)),
        grad(static_cast<const T*>(grad)),
        functor{static_cast<C>(keep), static_cast<C>(add)} {}

  template <typename Count>
  void operator()(int64_t i, Count count) const {
    if constexpr (kInRegisters<T, Count>) {
      for (int64_t k = i; k < i + W; k += L::kCount)
        functor.mean(L(grad + k), L(accumulator + k)).store(accumulator + k);
    } else {
      C x[W], g[W];
      load(accumulator + i, count, x);
      load(grad + i, count, g);
      functor(g, x);
      store(x, count, accumulator + i);
    }
  }
};

void blend(DType dtype, void* accumulator, const void* grad, void* saved, int64_t n, double keep, double add,
           bool past_caches) {
  for_dtype(dtype, [&](auto* t) {
    using T = std::remove_pointer_t<decltype(t)>;
    T* const kept = static_cast<T*>(saved);
    with_lanes<T>(past_caches, [&](auto* lanes) {
      const Blend<T, kLanes, std::remove_pointer_t<decltype(lanes)>> block(accumulator, grad, keep, add);
      for_blocks<kLanes>(n, [&](int64_t i, auto count) {
        if (kept != nullptr) save_block<kLanes>(block.grad + i, count, kept + i, past_caches);
        block(i, count);
      });
    });
    if (kept != nullptr && past_caches) streamed();
  });
}

void blend_perturb(DType dtype, void* accumulator, const void* grad, double keep, double add, void* position,
                   const void* origin, int64_t n, uint64_t element, Stream stream, double scale, bool adaptive,
                   const cpu::Round& round) {
  for_dtype(dtype, [&](auto* t) {
    using T = std::remove_pointer_t<decltype(t)>;
    with_rounding<T>(round, [&](const auto& write) {
      perturb_run(static_cast<T*>(position), static_cast<const T*>(origin), static_cast<T*>(nullptr), n, element,
                  stream, scale, adaptive, write, Blend<T, 4 * kQuads>(accumulator, grad, keep, add));
    });
  });
}

void poison(DType dtype, void* accumulator, int64_t n) {
  for_dtype(dtype, [&](auto* t) {
    using C = compute_t<std::remove_pointer_t<decltype(t)>>;
    C* a = static_cast<C*>(accumulator);
    for (int64_t i = 0; i < n; ++i) a[i] = static_cast<C>(kNaN);
  });
}

void weighted_sum(DType dtype, void* out, const void* values, int64_t row, int64_t step, int64_t n, int64_t rows,
                  const double* weights) {
  for_dtype(dtype, [&](auto* t) {
    using T = std::remove_pointer_t<decltype(t)>;
    using C = compute_t<T>;
    const T* v = static_cast<const T*>(values);
    T* const to = static_cast<T*>(out);
    for_blocks<kLanes>(n, [&](int64_t i, auto count) {
      if constexpr (kInRegisters<T, decltype(count)>) {
        if (step == 1) return sum_rows(to + i, v + i, row, rows, weights);
      }
      double sum[kLanes] = {};
      add_rows(sum, v + i * step, row, step, count, rows, weights);
      C rounded[kLanes];
      for (int k = 0; k < kLanes; ++k) rounded[k] = static_cast<C>(sum[k]);
      store(rounded, count, to + i);
    });
  });
}

void to_float64(DType dtype, double* out, const void* values, int64_t n) {
  for_dtype(dtype, [&](auto* t) {
    using T = std::remove_pointer_t<decltype(t)>;
    for (int64_t i = 0; i < n; ++i) out[i] = static_cast<double>(to_compute(static_cast<const T*>(values)[i]));
  });
}

void round_sum(DType dtype, void* out, const double* sum, int64_t n) {
  for_dtype(dtype, [&](auto* t) {
    using T = std::remove_pointer_t<decltype(t)>;
    using C = compute_t<T>;
    T* o = static_cast<T*>(out);
    for (int64_t i = 0; i < n; ++i) from_compute(static_cast<C>(sum[i]), o[i]);
  });
}

void leapfrog(DType dtype, const void* position, const void* momentum, const void* grad, cpu::Factor step,
              cpu::Factor inverse_mass, void* position_out, void* momentum_out, int64_t n, bool past_caches) {
  for_dtype(dtype, [&](auto* t) {
    using T = std::remove_pointer_t<decltype(t)>;
    with_lanes<T>(past_caches, [&](auto* lanes) {
      leapfrog_run<std::remove_pointer_t<decltype(lanes)>>(
          static_cast<const T*>(position), static_cast<const T*>(momentum), static_cast<const T*>(grad),
          FactorOf<T>(step), FactorOf<T>(inverse_mass), static_cast<T*>(position_out), static_cast<T*>(momentum_out),
          n);
    });
  });
}

void kick(DType dtype, const void* momentum, const void* grad, cpu::Factor a, void* out, int64_t n, bool past_caches) {
  for_dtype(dtype, [&](auto* t) {
    using T = std::remove_pointer_t<decltype(t)>;
    with_lanes<T>(past_caches, [&](auto* lanes) {
      kick_run<std::remove_pointer_t<decltype(lanes)>>(static_cast<const T*>(momentum), static_cast<const T*>(grad),
                                                       FactorOf<T>(a), static_cast<T*>(out), n);
    });
  });
}

HmcSums hmc(DType dtype, const cpu::HmcRun& run, const cpu::HmcPass& pass, int64_t n) {
  return for_dtype(dtype, [&](auto* t) {
    using T = std::remove_pointer_t<decltype(t)>;
    const bool measured = run.start != nullptr;
    const ToNearest none{};  // of what writes no position
    if (!pass.move)
      return pass.products ? hmc_run<HmcKind::kKick, T>(run, pass, n, none)
                           : hmc_run<HmcKind::kLastKick, T>(run, pass, n, none);
    return with_rounding<T>(pass.round, [&](const auto& write) {
      if (run.grad != nullptr)
        return measured ? hmc_run<HmcKind::kWholeMeasured, T>(run, pass, n, write)
                        : hmc_run<HmcKind::kWhole, T>(run, pass, n, write);
      return measured ? hmc_run<HmcKind::kDriftMeasured, T>(run, pass, n, write)
                      : hmc_run<HmcKind::kDrift, T>(run, pass, n, write);
    });
  });
}

void hmc_place(DType dtype, void* position, void* saved, void* x, double scale, bool adaptive, bool draw,
               double draw_scale, Stream stream, uint64_t element, int64_t n, bool past_caches,
               const cpu::Round& round) {
  for_dtype(dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    with_rounding<T>(round, [&](const auto& write) {
      place_run(static_cast<T*>(position), static_cast<T*>(saved), static_cast<compute_t<T>*>(x), scale, adaptive, draw,
                draw_scale, stream, element, n, past_caches, write);
    });
  });
}

}  // namespace
}  // namespace cpu_apply

#define TSAM_STRING_(x) #x
#define TSAM_STRING(x) TSAM_STRING_(x)
extern const cpu::Kernels kernel_table;
const cpu::Kernels kernel_table = {TSAM_STRING(TSAM_ISA),
                                   cpu_apply::noise_sum_squares,
                                   cpu_apply::copy,
                                   cpu_apply::perturb,
                                   cpu_apply::blend_perturb,
                                   cpu_apply::sum_squares,
                                   cpu_apply::ascend,
                                   cpu_apply::displacement,
                                   cpu_apply::direction_sums,
                                   cpu_apply::assign,
                                   cpu_apply::blend,
                                   cpu_apply::poison,
                                   cpu_apply::weighted_sum,
                                   cpu_apply::to_float64,
                                   cpu_apply::round_sum,
                                   cpu_apply::leapfrog,
                                   cpu_apply::hmc,
                                   cpu_apply::hmc_place,
                                   cpu_apply::kick};

}  // namespace TSAM_ISA
}  // namespace tsam
