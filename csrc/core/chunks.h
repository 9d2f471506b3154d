// ChunkPlan: a list of tensors cut into chunks of at most kChunk elements, so that one loop or one launch serves
// hundreds of tensors of any size. Plain integers; launches nothing, allocates one prefix array on the host.
//
// Layout: first_chunk[t] is the number of chunks before tensor t (n + 1 entries); chunk c belongs to the tensor
// found by binary search over it. Invariant: every element lies in exactly one chunk, chunk offsets are multiples
// of kChunk (so of 4: a quad of noise is never cut at a chunk border of an aligned tensor).
#pragma once

#include <cstdint>
#include <utility>
#include <vector>

#include "macros.h"

namespace tsam {

// Large enough that finding a chunk, handing it to a thread and making a draw's keys cost nothing beside its elements;
// small enough that 256 KB of float32 stay in a core's cache, and that one large tensor is shared evenly over threads.
// Chunks are part of a sum's definition (one partial a chunk, added in their order): another length is another rounding
// of norms.
constexpr int64_t kChunk = 65536;

struct Chunk {
  int64_t tensor;
  int64_t offset;
  int64_t length;
};

}  // namespace tsam

TSAM_CORE_BEGIN

// The tensor whose chunks contain chunk c: the last t with first_chunk[t] <= c. Empty tensors have no chunk and
// are never found. The prefix array and the sizes are anything with [].
template <typename First>
TSAM_HD int64_t find_tensor(const First& first_chunk, int64_t num_tensors, int64_t c) {
  int64_t low = 0, high = num_tensors;
  while (high - low > 1) {
    const int64_t middle = low + (high - low) / 2;
    if (first_chunk[middle] <= c) {
      low = middle;
    } else {
      high = middle;
    }
  }
  return low;
}

template <typename First, typename Sizes>
TSAM_HD Chunk chunk_at(const First& first_chunk, const Sizes& sizes, int64_t num_tensors, int64_t c, int64_t chunk) {
  const int64_t tensor = find_tensor(first_chunk, num_tensors, c);
  const int64_t offset = (c - first_chunk[tensor]) * chunk;
  const int64_t left = sizes[tensor] - offset;
  return Chunk{tensor, offset, left < chunk ? left : chunk};
}

class ChunkPlan {
 public:
  explicit ChunkPlan(std::vector<int64_t> sizes, int64_t chunk = kChunk) : sizes_(std::move(sizes)), chunk_(chunk) {
    first_chunk_.reserve(sizes_.size() + 1);
    first_chunk_.push_back(0);
    for (const int64_t size : sizes_) {
      first_chunk_.push_back(first_chunk_.back() + (size + chunk - 1) / chunk);
      num_elements_ += size;
    }
  }

  int64_t num_chunks() const { return first_chunk_.back(); }
  int64_t num_elements() const { return num_elements_; }
  const std::vector<int64_t>& first_chunk() const { return first_chunk_; }
  Chunk operator[](int64_t c) const {
    return chunk_at(first_chunk_.data(), sizes_.data(), static_cast<int64_t>(sizes_.size()), c, chunk_);
  }

  // body(c, chunk) for the chunks from begin to end in order; only the first is searched for.
  template <typename Body>
  void walk(int64_t begin, int64_t end, const Body& body) const {
    if (begin >= end) return;
    Chunk chunk = (*this)[begin];
    for (int64_t c = begin;; ++c) {
      body(c, chunk);
      if (c + 1 == end) return;
      chunk.offset += chunk_;
      while (chunk.offset >= sizes_[static_cast<size_t>(chunk.tensor)]) {
        ++chunk.tensor;
        chunk.offset = 0;
      }
      const int64_t left = sizes_[static_cast<size_t>(chunk.tensor)] - chunk.offset;
      chunk.length = left < chunk_ ? left : chunk_;
    }
  }

  // The first chunk of part p of `parts`: contiguous parts of about equal numbers of elements, so that a list of
  // one large tensor and a hundred small ones is still shared evenly.
  int64_t part_begin(int64_t p, int64_t parts) const {
    if (p <= 0) return 0;
    if (p >= parts) return num_chunks();
    const int64_t target = num_elements_ / parts * p + num_elements_ % parts * p / parts;
    int64_t before = 0, tensor = 0;
    const int64_t n = static_cast<int64_t>(sizes_.size());
    while (tensor < n && before + sizes_[tensor] <= target) before += sizes_[tensor++];
    return tensor == n ? num_chunks() : first_chunk_[tensor] + (target - before) / chunk_;
  }

 private:
  std::vector<int64_t> sizes_, first_chunk_;
  int64_t chunk_, num_elements_ = 0;
};

TSAM_CORE_END
