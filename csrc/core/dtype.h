// Storage types and the type each is computed in: float64 in float64, everything else in float32.
//
// Conversions are integer arithmetic (round to nearest even, subnormals exact even where the processor flushes them,
// any NaN stored as one and read as a quiet one: processors differ in sign and payload of those that they make), so
// that every instruction set and device has the same bits.
#pragma once

#include "philox.h"

namespace tsam {

enum class DType : int { kFloat32 = 0, kFloat64 = 1, kBFloat16 = 2, kFloat16 = 3 };

struct BFloat16 {
  uint16_t bits;
};
struct Float16 {
  uint16_t bits;
};

// A number in memory, which only the back end that owns the memory may read.
struct Scalar {
  const void* data;
  DType dtype;
};

}  // namespace tsam

TSAM_CORE_BEGIN

template <typename T>
struct Compute {
  using type = float;
};
template <>
struct Compute<double> {
  using type = double;
};
template <typename T>
using compute_t = typename Compute<T>::type;

TSAM_HD float to_compute(float x) { return x; }
TSAM_HD double to_compute(double x) { return x; }
TSAM_HD float to_compute(BFloat16 x) { return float_from_bits(static_cast<uint32_t>(x.bits) << 16); }

TSAM_HD float to_compute(Float16 x) {
  const uint32_t sign = (x.bits & 0x8000u) << 16, magnitude = x.bits & 0x7FFFu;
  const uint32_t normal = (magnitude << 13) + (112u << 23);
  const uint32_t subnormal = bits_from_float(static_cast<float>(static_cast<int32_t>(magnitude)) * 0x1p-24f);
  const uint32_t special = (magnitude << 13) | (magnitude > 0x7C00u ? 0x7FC00000u : 0x7F800000u);
  const uint32_t finite = magnitude < 0x0400u ? subnormal : normal;
  return float_from_bits(sign | (magnitude >= 0x7C00u ? special : finite));
}

TSAM_HD double scalar_value(const Scalar& scalar) {
  switch (scalar.dtype) {
    case DType::kFloat64:
      return *static_cast<const double*>(scalar.data);
    case DType::kBFloat16:
      return static_cast<double>(to_compute(*static_cast<const BFloat16*>(scalar.data)));
    case DType::kFloat16:
      return static_cast<double>(to_compute(*static_cast<const Float16*>(scalar.data)));
    default:
      return static_cast<double>(*static_cast<const float*>(scalar.data));
  }
}

TSAM_HD void from_compute(float x, float& out) { out = x; }
TSAM_HD void from_compute(double x, double& out) { out = x; }

TSAM_HD void from_compute(float x, BFloat16& out) {
  const uint32_t bits = bits_from_float(x);
  const uint32_t rounded = (bits + 0x7FFFu + ((bits >> 16) & 1u)) >> 16;
  out.bits = static_cast<uint16_t>(x != x ? 0x7FC0u : rounded);
}

TSAM_HD void from_compute(float x, Float16& out) {
  const uint32_t bits = bits_from_float(x), magnitude = bits & 0x7FFFFFFFu;
  const uint32_t normal = (magnitude - (112u << 23) + 0x0FFFu + ((magnitude >> 13) & 1u)) >> 13;
  // Adding 1/2 leaves 2^-24 as the unit in the last place, the spacing of float16's subnormals.
  const uint32_t subnormal = bits_from_float(float_from_bits(magnitude) + 0.5f) - 0x3F000000u;
  uint32_t r = magnitude < 0x38800000u ? subnormal : normal;
  r = magnitude >= 0x477FF000u ? 0x7C00u : r;  // 65520 and above round to infinity
  r |= (bits >> 16) & 0x8000u;
  out.bits = static_cast<uint16_t>(x != x ? 0x7E00u : r);
}

// Rounded once to the type that a result is computed in, then to its own.
TSAM_HD void store_number(double value, DType dtype, void* to) {
  switch (dtype) {
    case DType::kFloat64:
      return from_compute(value, *static_cast<double*>(to));
    case DType::kBFloat16:
      return from_compute(static_cast<float>(value), *static_cast<BFloat16*>(to));
    case DType::kFloat16:
      return from_compute(static_cast<float>(value), *static_cast<Float16*>(to));
    default:
      return from_compute(static_cast<float>(value), *static_cast<float*>(to));
  }
}

TSAM_HD float fused(float a, float b, float c) { return fmaf(a, b, c); }
TSAM_HD double fused(double a, double b, double c) { return fma(a, b, c); }
TSAM_HD double widened(float x) { return static_cast<double>(x); }
TSAM_HD double widened(double x) { return x; }
TSAM_HD float magnitude(float x) { return fabsf(x); }
TSAM_HD double magnitude(double x) { return fabs(x); }

constexpr double kNaN = __builtin_nan(""), kInfinity = __builtin_inf();
TSAM_HD bool is_nan(double x) { return x != x; }
TSAM_HD bool is_infinite(double x) { return fabs(x) == kInfinity; }

TSAM_CORE_END
