// What every op demands of its arguments, written once for all back ends; all of it runs before the first write.
//
// An error is std::invalid_argument (ValueError in Python) and reads
//   tsam.<op>: <argument>[<index>]: got <what came>, expected <what was wanted>
// Layout: a checked list becomes Runs, one dense stretch of memory a tensor, in storage order, without torch types.
// A tensor is asked each thing once: every question is a call into torch, and a list has hundreds of tensors.
#pragma once

#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <initializer_list>
#include <sstream>
#include <stdexcept>
#include <string>
#include <vector>

#include "../core/dtype.h"
#include "../core/perturb.h"
#include "../core/spans.h"
#include "../core/tilt.h"

namespace tsam {
namespace checks {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using TensorList = std::vector<Tensor>;

// Borrowed from a tensor, which outlives the op's call.
struct Layout {
  int64_t dim = 0, size = 1;  // size: elements
  int64_t *sizes = nullptr, *strides = nullptr;

  Layout(const Tensor& tensor) {
    STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_dim(tensor.get(), &dim));
    STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_sizes(tensor.get(), &sizes));
    STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_strides(tensor.get(), &strides));
    for (int64_t i = 0; i < dim; ++i) size *= sizes[i];
  }
  bool is_contiguous() const {
    int64_t step = 1;
    for (int64_t i = dim; size != 0 && i-- > 0; step *= sizes[i])
      if (sizes[i] != 1 && strides[i] != step) return false;
    return true;
  }
};

struct Run {
  char* data;
  int64_t size;
  DType dtype;
  int64_t bytes;
  Layout layout;
};
using Runs = std::vector<Run>;

// Where a tensor lies, as far as the stable ABI tells.
struct Place {
  bool cpu, cuda;
  int32_t index;

  explicit Place(const Tensor& tensor) : cpu(false), cuda(false), index(0) {
    static const int32_t kCpu = aoti_torch_device_type_cpu(), kCuda = aoti_torch_device_type_cuda();
    int32_t type;
    STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(tensor.get(), &type));
    cpu = type == kCpu;
    cuda = type == kCuda;
    if (!cpu) index = tensor.get_device_index();
  }
  bool operator==(const Place& other) const { return cpu == other.cpu && cuda == other.cuda && index == other.index; }
  std::string name() const {
    if (cpu) return "a cpu tensor";
    if (cuda) return "a cuda:" + std::to_string(index) + " tensor";
    return "a tensor on another kind of device";
  }
};

// An op: its name for messages, and the place that all its tensors share with the given one. The dispatcher has picked
// the back end by then, so a list on one place is on that back end's.
struct Op {
  const char* name;
  Place place;

  Op(const char* name, const Tensor& tensor) : name(name), place(tensor) {}
};

// Names the op, an argument and the place in its list, for messages.
struct Where {
  Op op;
  const char* argument;
  int64_t index = -1;
};

[[noreturn]] inline void fail(const Where& where, const std::string& got, const std::string& expected) {
  std::ostringstream message;
  message << "tsam." << where.op.name << ": " << where.argument;
  if (where.index >= 0) message << "[" << where.index << "]";
  message << ": got " << got << ", expected " << expected;
  throw std::invalid_argument(message.str());
}

inline std::string shape_name(const Layout& layout) {
  std::ostringstream text;
  text << "shape (";
  for (int64_t i = 0; i < layout.dim; ++i) text << (i ? ", " : "") << layout.sizes[i];
  text << ") with strides (";
  for (int64_t i = 0; i < layout.dim; ++i) text << (i ? ", " : "") << layout.strides[i];
  text << ")";
  return text.str();
}

inline const char* dtype_name(DType dtype) {
  switch (dtype) {
    case DType::kFloat64:
      return "float64";
    case DType::kBFloat16:
      return "bfloat16";
    case DType::kFloat16:
      return "float16";
    default:
      return "float32";
  }
}

// Not Tensor::scalar_type(), which compares with one dtype after the other.
inline DType dtype_of(const Where& where, const Tensor& tensor) {
  static const int32_t kFloat = aoti_torch_dtype_float32(), kDouble = aoti_torch_dtype_float64(),
                       kBrain = aoti_torch_dtype_bfloat16(), kHalf = aoti_torch_dtype_float16();
  if (!tensor.defined()) fail(where, "None", "a tensor");
  int32_t dtype;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_dtype(tensor.get(), &dtype));
  if (dtype == kFloat) return DType::kFloat32;
  if (dtype == kDouble) return DType::kFloat64;
  if (dtype == kBrain) return DType::kBFloat16;
  if (dtype == kHalf) return DType::kFloat16;
  fail(where, std::string("dtype ") + torch::headeronly::toString(tensor.scalar_type()),
       "float32, float64, bfloat16 or float16");
}

inline DType compute_dtype(DType dtype) { return dtype == DType::kFloat64 ? DType::kFloat64 : DType::kFloat32; }

inline int64_t item_bytes(DType dtype) { return dtype == DType::kFloat64 ? 8 : dtype == DType::kFloat32 ? 4 : 2; }

// Dense and without overlap: sorted by stride, every dimension steps over exactly the ones below it. Then the
// elements are one stretch of memory, whatever the order of the dimensions (contiguous, channels_last, permuted).
inline bool is_dense(const Layout& layout) {
  if (layout.size < 2 || layout.is_contiguous()) return true;
  std::vector<std::pair<int64_t, int64_t>> dims;
  for (int64_t i = 0; i < layout.dim; ++i)
    if (layout.sizes[i] != 1) dims.emplace_back(layout.strides[i], layout.sizes[i]);
  std::sort(dims.begin(), dims.end());
  int64_t step = 1;
  for (const auto& [stride, size] : dims) {
    if (stride != step) return false;
    step *= size;
  }
  return true;
}

// The elements of a tensor that is only read, whatever its strides.
inline Run checked_elements(const Where& where, const Tensor& tensor) {
  const DType dtype = dtype_of(where, tensor);
  const Place place(tensor);
  if (!(place == where.op.place)) fail(where, place.name(), where.op.place.name() + ", like the op's other arguments");
  const Layout layout(tensor);
  return Run{static_cast<char*>(tensor.data_ptr()), layout.size, dtype, layout.size * item_bytes(dtype), layout};
}

inline Run checked_run(const Where& where, const Tensor& tensor) {
  const Run run = checked_elements(where, tensor);
  if (!is_dense(run.layout)) fail(where, shape_name(run.layout), "a dense tensor whose elements do not overlap");
  return run;
}

inline Runs checked_runs(const Op& op, const char* argument, const TensorList& tensors) {
  Runs runs;
  runs.reserve(tensors.size());
  for (size_t i = 0; i < tensors.size(); ++i)
    runs.push_back(checked_run({op, argument, static_cast<int64_t>(i)}, tensors[i]));
  return runs;
}

inline void same_length(const Op& op, const char* argument, size_t got, const char* reference, size_t expected) {
  if (got != expected)
    fail({op, argument}, std::to_string(got) + " entries",
         std::to_string(expected) + " (as many as " + reference + ")");
}

// Equal shapes, and equal strides where a dimension has more than one element.
inline void same_layout(const Where& where, const Layout& got, const Layout& expected, const char* reference) {
  bool same = got.dim == expected.dim;
  for (int64_t i = 0; same && i < got.dim; ++i)
    same = got.sizes[i] == expected.sizes[i] &&
           (got.sizes[i] == 1 || got.size == 0 || got.strides[i] == expected.strides[i]);
  if (!same) fail(where, shape_name(got), shape_name(expected) + " as in " + reference);
}

inline void same_layouts(const Op& op, const char* argument, const Runs& got, const char* reference,
                         const Runs& expected) {
  same_length(op, argument, got.size(), reference, expected.size());
  for (size_t i = 0; i < got.size(); ++i)
    same_layout({op, argument, static_cast<int64_t>(i)}, got[i].layout, expected[i].layout, reference);
}

inline void same_dtypes(const Op& op, const char* argument, const Runs& got, const char* reference,
                        const Runs& expected, bool in_compute_type = false) {
  for (size_t i = 0; i < got.size(); ++i) {
    const DType wanted = in_compute_type ? compute_dtype(expected[i].dtype) : expected[i].dtype;
    if (got[i].dtype != wanted)
      fail({op, argument, static_cast<int64_t>(i)}, std::string("dtype ") + dtype_name(got[i].dtype),
           std::string(dtype_name(wanted)) + " to go with " + dtype_name(expected[i].dtype) + " in " + reference);
  }
}

struct NamedRuns {
  const char* argument;
  const Runs& runs;
};

// No two tensors of these lists share memory: an element that two entries name would be moved twice.
inline void disjoint(const Op& op, std::initializer_list<NamedRuns> lists) {
  static thread_local std::vector<Span> spans;
  static thread_local SpanMemory memory;
  spans.clear();
  for (const NamedRuns& list : lists)
    for (const Run& run : list.runs) spans.push_back({run.data, run.data + run.bytes});
  const Overlap overlap = memory.look(spans);
  if (!overlap.found) return;
  const auto entry = [&](size_t k) {
    for (const NamedRuns& list : lists) {
      if (k < list.runs.size()) return Where{op, list.argument, static_cast<int64_t>(k)};
      k -= list.runs.size();
    }
    return Where{op, ""};
  };
  const Where first = entry(overlap.first);
  fail(entry(overlap.second),
       "memory shared with " + std::string(first.argument) + "[" + std::to_string(first.index) + "]",
       "tensors that do not overlap");
}

// The step's float64 scalars, with room for `rows` samples.
inline double* checked_state(const Op& op, const Tensor& state, int64_t rows) {
  const Where where{op, "state"};
  const Run run = checked_run(where, state);
  const int64_t wanted = kHeader + kRow * rows;
  if (run.dtype != DType::kFloat64 || run.size < wanted || !run.layout.is_contiguous())
    fail(where, shape_name(run.layout) + " and dtype " + dtype_name(run.dtype),
         "a contiguous float64 tensor of at least " + std::to_string(wanted) + " elements");
  return reinterpret_cast<double*>(run.data);
}

// A number that stays where it is: only its shape and dtype are looked at.
inline Scalar checked_scalar(const Where& where, const Tensor& tensor) {
  const Run run = checked_run(where, tensor);
  if (run.size != 1) fail(where, shape_name(run.layout), "a tensor of one element");
  return Scalar{run.data, run.dtype};
}

inline void in_range(const Where& where, int64_t value, int64_t low, int64_t high) {
  if (value < low || value > high)
    fail(where, std::to_string(value), "an integer from " + std::to_string(low) + " to " + std::to_string(high));
}

// A kind of noise by its number.
inline const Noise& checked_noise(const Where& where, int64_t number) {
  in_range(where, number, 0, kNumNoises - 1);
  return kNoises[number];
}

inline void not_negative(const Op& op, const char* argument, const std::vector<double>& values) {
  for (size_t i = 0; i < values.size(); ++i)
    if (!(values[i] >= 0.0) || std::isinf(values[i]))
      fail({op, argument, static_cast<int64_t>(i)}, std::to_string(values[i]), "a finite number not below 0");
}

inline void finite(const Op& op, const char* argument, const std::vector<double>& values) {
  for (size_t i = 0; i < values.size(); ++i)
    if (!std::isfinite(values[i]))
      fail({op, argument, static_cast<int64_t>(i)}, std::to_string(values[i]), "a finite number");
}

}  // namespace checks
}  // namespace tsam
