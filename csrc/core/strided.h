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

TSAM_CORE_BEGIN

class StridedWalk {
 public:
  struct Dim {
    int64_t size, dense_stride, stride;
  };

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

  // The step between elements of a run.
  int64_t step() const { return dims_.back().stride; }

  // body(dense index, offset in the strided tensor, count), for count elements that step() separates.
  template <typename Body>
  void for_runs(int64_t begin, int64_t end, const Body& body) const {
    const int64_t inner = dims_.back().size;
    for (int64_t i = begin; i < end;) {
      const int64_t first = i % inner, count = std::min(inner - first, end - i);
      int64_t outer = i / inner, offset = first * step();
      for (size_t k = dims_.size() - 1; k-- > 0;) {
        offset += outer % dims_[k].size * dims_[k].stride;
        outer /= dims_[k].size;
      }
      body(i, offset, count);
      i += count;
    }
  }

 private:
  std::vector<Dim> dims_;
};

TSAM_CORE_END
