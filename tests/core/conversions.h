// Part of core_test.cpp, whose check() it uses: float16 and bfloat16 against their definitions, and the processor's own
// conversions of blocks against those of one element.
//
// Invariant: all 2^16 narrow values are tried, and of the 2^32 floats those around every border between two of them.
#pragma once

#include <cmath>
#include <cstring>

#if defined(__SSE2__)
#include <immintrin.h>
#endif

#include "../../csrc/core/dtype.h"
#include "../../csrc/cpu/halves.h"

static void conversions() {
  bool ok = true;
  for (uint32_t bits = 0; bits < 65536; ++bits) {
    const Float16 h{static_cast<uint16_t>(bits)};
    const float f = to_compute(h);
    Float16 back{0};
    from_compute(f, back);
    ok = ok && back.bits == (f != f ? 0x7e00 : h.bits);
    const int e = static_cast<int>(bits >> 10 & 31), m = static_cast<int>(bits & 1023);
    const double value = e == 0 ? std::ldexp(m, -24) : std::ldexp(1024 + m, e - 25);
    if (e < 31) ok = ok && f == static_cast<float>(bits & 0x8000u ? -value : value);
  }
  check(ok, "all 65,536 float16 values survive, with the right value, NaNs as one");
  ok = true;
  for (uint32_t bits = 0; bits < 65536; ++bits) {
    BFloat16 back{0};
    const float f = float_from_bits(bits << 16);
    from_compute(f, back);
    ok = ok && back.bits == (f != f ? 0x7fc0 : bits);
  }
  check(ok, "all 65,536 bfloat16 values survive, NaNs as one");
  const auto half = [](float f) {
    Float16 h{0};
    from_compute(f, h);
    return h.bits;
  };
  check(half(65519.0f) == 0x7bff && half(65520.0f) == 0x7c00 && half(2049.0f) == 0x6800 && half(2051.0f) == 0x6802 &&
            half(0x1p-25f) == 0 && half(0x1.8p-24f) == 2 && half(0x1.002p-14f) == 0x0400 &&
            half(0x1.006p-14f) == 0x0402,
        "float16 rounds to nearest even, overflows at 65520, keeps subnormals");
  const auto brain = [](float f) {
    BFloat16 b{0};
    from_compute(f, b);
    return b.bits;
  };
  check(brain(1.00390625f) == 0x3f80 && brain(1.01171875f) == 0x3f82 && brain(3.4e38f) == 0x7f80,
        "bfloat16 rounds to nearest even");
}

// The processor's own conversions of float16 blocks, where it has them: every half, and floats at every exponent and
// around every border between two halves; also where it flushes subnormals.
static bool same_halves() {
  bool same = true;
  constexpr int W = 16;
  for (uint32_t bits = 0; bits < 65536; bits += W) {
    Float16 halves[W], back[W], wanted[W];
    float wide[W], mine[W];
    for (uint32_t i = 0; i < W; ++i) {
      halves[i].bits = static_cast<uint16_t>(bits + i);
      mine[i] = to_compute(halves[i]);
    }
    for (int i = 0; i < W; i += cpu_apply::kHalves) cpu_apply::widen_halves(halves + i, wide + i);
    same = same && std::memcmp(wide, mine, sizeof wide) == 0;
    for (const uint32_t low : {0u, 1u, 0x0fffu, 0x1000u, 0x1001u, 0x1fffu}) {  // of the 13 bits that are rounded away
      for (int i = 0; i < W; ++i) {
        wide[i] = float_from_bits(bits_from_float(mine[i]) + low);
        from_compute(wide[i], wanted[i]);
      }
      for (int i = 0; i < W; i += cpu_apply::kHalves) cpu_apply::narrow_halves(wide + i, back + i);
      same = same && std::memcmp(back, wanted, sizeof back) == 0;
    }
  }
  for (uint64_t bits = 0; bits < uint64_t{1} << 32; bits += W * 257) {
    float wide[W];
    Float16 back[W], wanted[W];
    for (uint32_t i = 0; i < W; ++i) {
      wide[i] = float_from_bits(static_cast<uint32_t>(bits) + 257 * i);
      from_compute(wide[i], wanted[i]);
    }
    for (int i = 0; i < W; i += cpu_apply::kHalves) cpu_apply::narrow_halves(wide + i, back + i);
    same = same && std::memcmp(back, wanted, sizeof back) == 0;
  }
  return same;
}

static void halves() {
  check(same_halves(), "float16 blocks have the bits of one element at a time");
#if defined(__SSE2__)
  const unsigned before = _mm_getcsr();
  _mm_setcsr(before | 0x8040u);
  const bool same = same_halves();
  _mm_setcsr(before);
  check(same, "also where the processor flushes subnormals");
#endif
}
