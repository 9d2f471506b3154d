// What every op demands of its arguments, written once for all back ends; all of it runs before the first write.
//
// An error is std::invalid_argument (ValueError in Python) and reads
//   tsam.<op>: <argument>[<index>]: got <what came>, expected <what was wanted>
// Layout: a checked list becomes Runs, one dense stretch of memory a tensor, in storage order, without torch types.
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
#include "../core/tilt.h"

namespace tsam {
namespace checks {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using TensorList = std::vector<Tensor>;

struct Run {
  char* data;
  int64_t size;
  DType dtype;
  int64_t bytes;
};
using Runs = std::vector<Run>;

// Where a tensor lies, as far as the stable ABI tells.
struct Place {
  bool cpu, cuda;
  int32_t index;

  explicit Place(const Tensor& tensor)
      : cpu(tensor.is_cpu()), cuda(!cpu && tensor.is_cuda()), index(cpu ? 0 : tensor.get_device_index()) {}
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

inline std::string shape_name(const Tensor& tensor) {
  std::ostringstream text;
  text << "shape (";
  for (int64_t i = 0; i < tensor.dim(); ++i) text << (i ? ", " : "") << tensor.size(i);
  text << ") with strides (";
  for (int64_t i = 0; i < tensor.dim(); ++i) text << (i ? ", " : "") << tensor.stride(i);
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

inline DType dtype_of(const Where& where, const Tensor& tensor) {
  if (!tensor.defined()) fail(where, "None", "a tensor");
  switch (tensor.scalar_type()) {
    case ScalarType::Float:
      return DType::kFloat32;
    case ScalarType::Double:
      return DType::kFloat64;
    case ScalarType::BFloat16:
      return DType::kBFloat16;
    case ScalarType::Half:
      return DType::kFloat16;
    default:
      fail(where, std::string("dtype ") + torch::headeronly::toString(tensor.scalar_type()),
           "float32, float64, bfloat16 or float16");
  }
}

inline DType compute_dtype(DType dtype) { return dtype == DType::kFloat64 ? DType::kFloat64 : DType::kFloat32; }

inline int64_t item_bytes(DType dtype) { return dtype == DType::kFloat64 ? 8 : dtype == DType::kFloat32 ? 4 : 2; }

// Dense and without overlap: sorted by stride, every dimension steps over exactly the ones below it. Then the
// elements are one stretch of memory, whatever the order of the dimensions (contiguous, channels_last, permuted).
inline bool is_dense(const Tensor& tensor) {
  if (tensor.numel() < 2 || tensor.is_contiguous()) return true;
  std::vector<std::pair<int64_t, int64_t>> dims;
  for (int64_t i = 0; i < tensor.dim(); ++i)
    if (tensor.size(i) != 1) dims.emplace_back(tensor.stride(i), tensor.size(i));
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
  const int64_t size = tensor.numel();
  return Run{static_cast<char*>(tensor.data_ptr()), size, dtype, size * item_bytes(dtype)};
}

inline Run checked_run(const Where& where, const Tensor& tensor) {
  const Run run = checked_elements(where, tensor);
  if (!is_dense(tensor)) fail(where, shape_name(tensor), "a dense tensor whose elements do not overlap");
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
inline void same_layout(const Where& where, const Tensor& got, const Tensor& expected, const char* reference) {
  bool same = got.dim() == expected.dim();
  for (int64_t i = 0; same && i < got.dim(); ++i)
    same = got.size(i) == expected.size(i) &&
           (got.size(i) == 1 || got.numel() == 0 || got.stride(i) == expected.stride(i));
  if (!same) fail(where, shape_name(got), shape_name(expected) + " as in " + reference);
}

inline void same_layouts(const Op& op, const char* argument, const TensorList& got, const char* reference,
                         const TensorList& expected) {
  same_length(op, argument, got.size(), reference, expected.size());
  for (size_t i = 0; i < got.size(); ++i)
    same_layout({op, argument, static_cast<int64_t>(i)}, got[i], expected[i], reference);
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
  struct Span {
    const char *begin, *end, *argument;
    int64_t index;
  };
  std::vector<Span> spans;
  for (const NamedRuns& list : lists)
    for (size_t i = 0; i < list.runs.size(); ++i)
      if (list.runs[i].bytes > 0)
        spans.push_back(
            {list.runs[i].data, list.runs[i].data + list.runs[i].bytes, list.argument, static_cast<int64_t>(i)});
  std::sort(spans.begin(), spans.end(), [](const Span& a, const Span& b) { return a.begin < b.begin; });
  for (size_t k = 1; k < spans.size(); ++k) {
    if (spans[k].begin >= spans[k - 1].end) continue;
    Span first = spans[k - 1], second = spans[k];
    if (first.argument == second.argument && first.index > second.index) std::swap(first, second);
    fail({op, second.argument, second.index},
         "memory shared with " + std::string(first.argument) + "[" + std::to_string(first.index) + "]",
         "tensors that do not overlap");
  }
}

// The step's float64 scalars, with room for `rows` samples.
inline double* checked_state(const Op& op, const Tensor& state, int64_t rows) {
  const Where where{op, "state"};
  const Run run = checked_run(where, state);
  const int64_t wanted = kHeader + kRow * rows;
  if (run.dtype != DType::kFloat64 || run.size < wanted || !state.is_contiguous())
    fail(where, shape_name(state) + " and dtype " + dtype_name(run.dtype),
         "a contiguous float64 tensor of at least " + std::to_string(wanted) + " elements");
  return reinterpret_cast<double*>(run.data);
}

// A number that stays where it is: only its shape and dtype are looked at.
inline Scalar checked_scalar(const Where& where, const Tensor& tensor) {
  const Run run = checked_run(where, tensor);
  if (run.size != 1) fail(where, shape_name(tensor), "a tensor of one element");
  return Scalar{run.data, run.dtype};
}

inline void in_range(const Where& where, int64_t value, int64_t low, int64_t high) {
  if (value < low || value > high)
    fail(where, std::to_string(value), "an integer from " + std::to_string(low) + " to " + std::to_string(high));
}

inline void not_negative(const Op& op, const char* argument, const std::vector<double>& values) {
  for (size_t i = 0; i < values.size(); ++i)
    if (!(values[i] >= 0.0) || std::isinf(values[i]))
      fail({op, argument, static_cast<int64_t>(i)}, std::to_string(values[i]), "a finite number not below 0");
}

}  // namespace checks
}  // namespace tsam
