// The passes of leapfrog and kick over one run; L: the lanes to walk it in (lanes.h), where it needs no conversion.
//
// Invariant: results may lie where the arguments do, each at its own element.
#pragma once

#include <cstdint>
#include <type_traits>

#include "../core/leapfrog.h"
#include "apply.h"

namespace tsam {
inline namespace TSAM_ISA {
namespace cpu_apply {

// A factor of a run: lanes of it, or a block.
template <typename T>
struct FactorOf {
  using C = compute_t<T>;
  const T* each;
  C all;

  TSAM_HD explicit FactorOf(const cpu::Factor& factor)
      : each(static_cast<const T*>(factor.each)), all(static_cast<C>(factor.all)) {}
  template <typename L>
  TSAM_HD L lanes(int64_t i) const {
    if constexpr (std::is_same_v<T, C>) {
      if (each != nullptr) return L(each + i);
    }
    return L(all);
  }
  template <typename Count>
  TSAM_HD void block(int64_t i, Count count, C (&x)[kLanes]) const {
    if (each != nullptr) {
      load(each + i, count, x);
    } else {
      for (int k = 0; k < kLanes; ++k) x[k] = all;
    }
  }
};

template <typename L, typename T>
static void leapfrog_run(const T* position, const T* momentum, const T* grad, const FactorOf<T>& step,
                         const FactorOf<T>& inverse_mass, T* position_out, T* momentum_out, int64_t n) {
  using C = compute_t<T>;
  for_blocks<kLanes>(n, [&](int64_t i, auto count) {
    if constexpr (kInRegisters<T, decltype(count)>) {
      for (int64_t k = i; k < i + kLanes; k += L::kCount) {
        L x(position + k), p(momentum + k);
        Leapfrog<C>::move(L(grad + k), step.template lanes<L>(k), inverse_mass.template lanes<L>(k), x, p);
        x.store(position_out + k);
        p.store(momentum_out + k);
      }
    } else {
      C x[kLanes], p[kLanes], g[kLanes], h[kLanes], m[kLanes];
      load(position + i, count, x);
      load(momentum + i, count, p);
      load(grad + i, count, g);
      step.block(i, count, h);
      inverse_mass.block(i, count, m);
      Leapfrog<C>{}(g, h, m, x, p);
      store(x, count, position_out + i);
      store(p, count, momentum_out + i);
    }
  });
}

template <typename L, typename T>
static void kick_run(const T* momentum, const T* grad, const FactorOf<T>& a, T* out, int64_t n) {
  using C = compute_t<T>;
  for_blocks<kLanes>(n, [&](int64_t i, auto count) {
    if constexpr (kInRegisters<T, decltype(count)>) {
      for (int64_t k = i; k < i + kLanes; k += L::kCount)
        Kick<C>::moved(L(grad + k), a.template lanes<L>(k), L(momentum + k)).store(out + k);
    } else {
      C p[kLanes], g[kLanes], factor[kLanes];
      load(momentum + i, count, p);
      load(grad + i, count, g);
      a.block(i, count, factor);
      Kick<C>{}(g, factor, p);
      store(p, count, out + i);
    }
  });
}

}  // namespace cpu_apply
}  // namespace TSAM_ISA
}  // namespace tsam
