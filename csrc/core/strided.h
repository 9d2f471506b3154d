// StridedWalk: the elements of a strided tensor in the order of a dense one of the same shape, as runs of equal steps.
//
// Layout: dimensions sorted by the dense tensor's strides, outermost first, neighbours merged where one step over the
// outer is a whole pass over the inner; so a contiguous pair is one run. Plain integers, host only.
// Invariant: for_runs covers dense elements [begin, end) once, in order.
#pragma once

#include <algorithm>
#include <cstdint>
#include <utility>
#include <vector>

#include "macros.h"

namespace tsam {

struct StridedDim {
  int64_t size, dense_stride, stride;
};

}  // namespace tsam

TSAM_CORE_BEGIN

// Where dense element i lies in the strided tensor.
TSAM_HD int64_t strided_offset(const StridedDim* dims, int64_t num_dims, int64_t i) {
  int64_t offset = 0;
  for (int64_t k = num_dims; k-- > 0;) {
    offset += i % dims[k].size * dims[k].stride;
    i /= dims[k].size;
  }
  return offset;
}

class StridedWalk {
 public:
  using Dim = StridedDim;

  explicit StridedWalk(std::vector<Dim> dims) {
    std::stable_sort(dims.begin(), dims.end(),
                     [](const Dim& a, const Dim& b) { return a.dense_stride > b.dense_stride; });
    for (const Dim& dim : dims) {
      if (dim.size == 1) continue;
      if (!dims_.empty() && dims_.back().stride == dim.stride * dim.size) {
        dims_.back() = Dim{dims_.back().size * dim.size, dim.dense_stride, dim.stride};
      } else {
        dims_.push_back(dim);
      }
    }
    if (dims_.empty()) dims_.push_back(Dim{1, 1, 1});
  }

  const std::vector<Dim>& dims() const { return dims_; }

  // The step between elements of a run.
  int64_t step() const { return dims_.back().stride; }

  // body(dense index, offset in the strided tensor, count), for count elements that step() separates.
  template <typename Body>
  void for_runs(int64_t begin, int64_t end, const Body& body) const {
    const int64_t inner = dims_.back().size;
    for (int64_t i = begin; i < end;) {
      const int64_t count = std::min(inner - i % inner, end - i);
      body(i, strided_offset(dims_.data(), static_cast<int64_t>(dims_.size()), i), count);
      i += count;
    }
  }

 private:
  std::vector<Dim> dims_;
};

TSAM_CORE_END
