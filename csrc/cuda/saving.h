// Passes that save theta_0 while they move it: such a call moves the whole list and counts itself, or moves nothing.
//
//   each share: saved = position, position = moved; then state[kSaves] += 1
//
// Layout: lists 0 and 1 of a pass's table are position and saved. Invariant: whichever launch of a call that saves
// fails, `position` has the bits that it had and nothing is counted; or the error says that this failed too.
#pragma once

#include "launch.h"
#include "list_kernels.cuh"

namespace tsam {
namespace cuda {

template <int L>
void put_back(const OnDevice& device, const Share<L>& share) {
  TablePair pair;
  const auto n = static_cast<size_t>(share.table.num_tensors);
  for (size_t list = 0; list < 2; ++list) std::copy_n(share.table.data[list], n, pair.data[list]);
  std::copy_n(share.table.size, n, pair.size);
  std::copy_n(share.table.first_chunk, n + 1, pair.first_chunk);
  pair.num_tensors = share.table.num_tensors;
  for_storage(share.dtype, [&](auto* t) {
    using T = std::remove_pointer_t<decltype(t)>;
    device.run<copy_chunks<T>>(share.blocks, kThreads, pair);
  });
}

// pass(share) for each share of the lists; `state` is null where nothing is saved, as then the caller has the copy.
template <int L, typename Entry, typename Pass>
void move_shares(const OnDevice& device, const Runs* const (&lists)[L], const Entry& entry, double* state,
                 const Pass& pass) {
  int64_t moved = 0;  // blocks
  try {
    for_shares<L>(lists, 0, entry, [&](const Share<L>& share) {
      pass(share);
      moved = share.before + share.blocks;
    });
    if (state != nullptr) device.finish<0>(CountSave{state});
  } catch (const std::exception& error) {
    if (state == nullptr) throw;
    try {
      for_shares<L>(lists, 0, entry, [&](const Share<L>& share) {
        if (share.before < moved) put_back(device, share);
      });
    } catch (const std::exception& second) {
      throw std::runtime_error(std::string(error.what()) + "; and position could not be put back: " + second.what());
    }
    throw;
  }
}

}  // namespace cuda
}  // namespace tsam
