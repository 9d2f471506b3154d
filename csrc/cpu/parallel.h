// The one parallel loop of the CPU back end: a ChunkPlan's chunks, shared over torch's threads.
//
// Layout: each thread takes a contiguous part of the plan of about equal numbers of elements.
// Invariant: no result depends on the number of threads: elements are independent, and sums go through one partial a
// chunk, added in chunk order. The body must not throw: an exception inside parallel_for loses its message.
#pragma once

#include <torch/csrc/stable/ops.h>

#include <numeric>
#include <utility>
#include <vector>

#include "../core/chunks.h"
#include "../ops/checks.h"
#include "kernels.h"

namespace tsam {
namespace cpu {

// Below this many elements waking a second thread costs more than it saves.
constexpr int64_t kSerialElements = 32768;

inline ChunkPlan plan_of(const checks::Runs& runs) {
  std::vector<int64_t> sizes;
  sizes.reserve(runs.size());
  for (const checks::Run& run : runs) sizes.push_back(run.size);
  return ChunkPlan(std::move(sizes));
}

// body(chunk index, chunk) for every chunk, once, in parallel over about equal numbers of elements.
template <typename Body>
void for_chunks(const ChunkPlan& plan, const Body& body) {
  const bool serial = plan.num_elements() < kSerialElements;
  const int64_t parts = serial ? 1 : static_cast<int64_t>(torch::stable::get_num_threads());
  const auto run_part = [&](int64_t part) {
    plan.walk(plan.part_begin(part, parts), plan.part_begin(part + 1, parts), body);
  };
  if (parts == 1) {
    run_part(0);
    return;
  }
  torch::stable::parallel_for(0, parts, 1, [&](int64_t begin, int64_t end) {
    for (int64_t part = begin; part < end; ++part) run_part(part);
  });
}

// Sum over chunks in chunk order.
template <typename Body>
double sum_chunks(const ChunkPlan& plan, const Body& body) {
  std::vector<double> partial(static_cast<size_t>(plan.num_chunks()), 0.0);
  for_chunks(plan, [&](int64_t c, const Chunk& chunk) { partial[static_cast<size_t>(c)] = body(chunk); });
  return std::accumulate(partial.begin(), partial.end(), 0.0);
}

// Lists of more bytes than this are copied past the caches: what is written is not read again before others have used
// them up. Smaller ones are better kept there.
constexpr int64_t kPastCaches = int64_t{16} << 20;

inline bool goes_past_caches(const checks::Runs& runs) {
  int64_t bytes = 0;
  for (const checks::Run& run : runs) bytes += run.size * checks::item_bytes(run.dtype);
  return bytes > kPastCaches;
}

// The index in the noise of a chunk's first element.
inline uint64_t element_of(const std::vector<int64_t>& base, const Chunk& chunk) {
  return static_cast<uint64_t>(base[static_cast<size_t>(chunk.tensor)]) + static_cast<uint64_t>(chunk.offset);
}

// As the kernels take it, the step looked up where it is held.
inline Round round_of(const Rounding& rounding) { return {rounding.stochastic, stream_now(rounding.counted)}; }

inline char* at(const checks::Run& run, const Chunk& chunk) {
  return run.data + chunk.offset * checks::item_bytes(run.dtype);
}

}  // namespace cpu
}  // namespace tsam
