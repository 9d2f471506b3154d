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

template <int L, bool few>
void put_back(const OnDevice& device, const Share<L, few>& share) {
  TensorTable<2, few> pair;
  pair.num_tensors = share.table.num_tensors;
  for (int64_t k = 0; k < pair.num_tensors; ++k) {
    const TensorEntry<L>& from = share.table.entries[k];
    pair.entries[k] = TensorEntry<2>{{from.data[0], from.data[1]}, from.size, 0, 1.0, from.first_chunk, false};
  }
  for_storage(share.dtype, [&](auto* t) {
    using T = std::remove_pointer_t<decltype(t)>;
    device.run<copy_chunks<T, few>>(share.blocks, kThreads, pair);
  });
}

// pass(share) for each share of the lists; `state` is null where nothing is saved, as then the caller has the copy.
template <int L, typename Entry, typename Pass>
void move_shares(const OnDevice& device, const Runs* const (&lists)[L], const Entry& entry, double* state,
                 const Pass& pass) {
  int64_t moved = 0;  // blocks
  try {
    for_shares<L>(lists, 0, entry, [&](const auto& share) {
      pass(share);
      moved = share.before + share.blocks;
    });
    if (state != nullptr) device.finish<0>(CountSave{state});
  } catch (const std::exception& error) {
    if (state == nullptr) throw;
    try {
      for_shares<L>(lists, 0, entry, [&](const auto& share) {
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
