// The seam between the ops and torch's side of a device: which one, its stream, memory for partial sums; and how a list
// becomes launches. Under the host emulation (TSAM_SIMT) the device is the CPU's memory and the key the CPU's.
//
// Layout: a list is split by storage type and then into tables of at most kTensorsPerLaunch tensors, one launch each;
// block numbers run on over the launches of a list, so that all partials lie in one row.
// Invariant: every launch is checked, and all kernels are on the device before the first of them runs; nothing waits
// for the device, and nothing of device memory is read here. A workspace comes from torch's caching allocator: ordered
// by the stream, and in a captured graph from the graph's pool.
#pragma once

#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <mutex>
#include <stdexcept>
#include <string>
#include <vector>

#include "../ops/checks.h"
#include "apply.cuh"
#include "reduce.cuh"

#if defined(TSAM_SIMT)
#define TSAM_CUDA_KEY CPU
#else
#define TSAM_CUDA_KEY CUDA
// Torch's header shows this only to those who see all of CUDA's.
extern "C" AOTITorchError aoti_torch_get_current_cuda_stream(int32_t device_index, void** stream);
#endif

namespace tsam {
namespace cuda {

using checks::Run;
using checks::Runs;
using checks::Tensor;

inline void check_cuda(cudaError_t error, const char* doing) {
  if (error != cudaSuccess) throw std::runtime_error(std::string("tsam: ") + doing + ": " + cudaGetErrorString(error));
}

// Every kernel that an op of this library launches: run() lists what it is made for, before main.
inline std::vector<const void*>& kernels() {
  static std::vector<const void*> all;
  return all;
}
template <auto kernel>
inline const bool listed = (kernels().push_back(reinterpret_cast<const void*>(kernel)), true);

// Once for each device, at its first op: all kernels or none, so that no op finds one missing after it has written.
inline void load_kernels(int32_t device) {
  static std::mutex one_at_a_time;
  static std::vector<bool> loaded;
  const std::lock_guard<std::mutex> lock(one_at_a_time);
  const size_t d = static_cast<size_t>(device);
  if (loaded.size() <= d) loaded.resize(d + 1);
  if (loaded[d]) return;
  for (const void* const kernel : kernels()) check_cuda(load_kernel(kernel), "a kernel could not be loaded");
  loaded[d] = true;
}

// The device that a tensor is on, current while this lives, and its current stream.
class OnDevice {
 public:
#if defined(TSAM_SIMT)
  explicit OnDevice(const Tensor& home) : home_(home) { load_kernels(0); }
#else
  explicit OnDevice(const Tensor& home) : home_(home), guard_(home.get_device_index()) {
    void* stream = nullptr;
    STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(home.get_device_index(), &stream));
    stream_ = static_cast<cudaStream_t>(stream);
    // The runtime that is linked into this library keeps a current device of its own.
    check_cuda(cudaSetDevice(home.get_device_index()), "cannot use the device");
    load_kernels(home.get_device_index());
  }
#endif

  template <auto kernel, typename... Args>
  void run(int64_t blocks, int threads, const Args&... args) const {
    static_cast<void>(listed<kernel>);
    start(kernel, blocks, threads, args...);
  }

  template <int K, typename Finish>
  void finish(const Finish& finish, const double* partial = nullptr, int64_t n = 0) const {
    run<finish_sums<K, Finish>>(1, kFinishThreads, partial, n, finish);
  }

  // As finish, after the pass of stage n of an op that may be called in stages; true where the call ends with its sums.
  template <int K, typename Stage, typename Finish>
  bool finish_stage(const Stage& stage, int64_t n, const Finish& finish, const double* partial, int64_t blocks) const {
    if (stage.number == n) {
      this->finish<K>(LeaveSums<K>{stage.totals}, partial, blocks);
      return true;
    }
    const bool given = stage.number == n + 1;
    this->finish<K>(finish, given ? stage.totals : partial, given ? 1 : blocks);
    return false;
  }

  // `rows` sums a block for `blocks` blocks.
  Tensor workspace(int64_t rows, int64_t blocks) const {
    return torch::stable::new_empty(home_, {rows * blocks}, torch::headeronly::ScalarType::Double);
  }

 private:
  template <typename... Parameters>
  void start(void (*kernel)(Parameters...), int64_t blocks, int threads,
             const std::decay_t<Parameters>&... parameters) const {
    constexpr size_t all = (sizeof(std::decay_t<Parameters>) + ... + 0),
                     largest = std::max({size_t{0}, sizeof(std::decay_t<Parameters>)...});
    static_assert(all - largest <= kOtherParameters, "more than a table leaves room for");
    check_cuda(launch(kernel, dim3(static_cast<unsigned>(blocks)), dim3(static_cast<unsigned>(threads)), 0, stream_,
                      parameters...),
               "a kernel could not be launched");
  }

  const Tensor& home_;
#if !defined(TSAM_SIMT)
  torch::stable::accelerator::DeviceGuard guard_;
#endif
  cudaStream_t stream_ = nullptr;
};

inline double* numbers(const Tensor& workspace) { return static_cast<double*>(workspace.data_ptr()); }

inline ChunkPlan device_plan(const Runs& runs) {
  std::vector<int64_t> sizes;
  for (const Run& run : runs) sizes.push_back(run.size);
  return ChunkPlan(sizes, kDeviceChunk);
}

// body(null pointer of the storage type).
template <typename Body>
void for_storage(DType dtype, const Body& body) {
  switch (dtype) {
    case DType::kFloat64:
      return body(static_cast<double*>(nullptr));
    case DType::kBFloat16:
      return body(static_cast<BFloat16*>(nullptr));
    case DType::kFloat16:
      return body(static_cast<Float16*>(nullptr));
    default:
      return body(static_cast<float*>(nullptr));
  }
}

// The same for a pass that writes positions: with stochastic rounding a type of its own for 16 bits.
template <typename Body>
void for_positions(DType dtype, const Rounding& rounding, const Body& body) {
  if (rounding.stochastic && dtype == DType::kBFloat16) return body(static_cast<StochasticBFloat16*>(nullptr));
  if (rounding.stochastic && dtype == DType::kFloat16) return body(static_cast<StochasticFloat16*>(nullptr));
  for_storage(dtype, body);
}

// One launch's share of a list.
template <int L, bool few>
struct Share {
  TensorTable<L, few> table;
  DType dtype;
  int64_t before, blocks;  // of this list's blocks
};

// Of the type of a share: whether its kernels are those of few tensors.
template <typename Share>
constexpr bool kFewIn = decltype(std::decay_t<Share>::table)::kFew;

// The share of the n tensors at `indices`. What lies beyond them needs no zeros, as it is never read.
template <int L, bool few, typename Entry>
void fill(Share<L, few>& share, const Runs* const (&lists)[L], int key, const int64_t* indices, size_t n,
          const Entry& entry) {
  share.blocks = 0;
  for (size_t k = 0; k < n; ++k) {
    const size_t i = static_cast<size_t>(indices[k]);
    TensorEntry<L>& at = share.table.entries[k];
    for (int l = 0; l < L; ++l) at.data[l] = lists[l]->empty() ? nullptr : (*lists[l])[i].data;
    at.size = (*lists[key])[i].size;
    at.element = 0;
    at.scale = 1.0;
    at.first_chunk = static_cast<int32_t>(share.blocks);
    at.adaptive = false;
    entry(at, i);
    share.blocks += (at.size + kDeviceChunk - 1) / kDeviceChunk;
  }
  share.table.num_tensors = static_cast<int64_t>(n);
}

// body(share) for tables over the given lists, all as long as the first and, but for the accumulators of list `key`'s
// dtype, of its types; entry(entry of the table, index) fills in what is not a pointer or a size.
template <int L, typename Entry, typename Body>
void for_shares(const Runs* const (&lists)[L], int key, const Entry& entry, const Body& body) {
  const Runs& first = *lists[key];
  int64_t before = 0;
  const auto take = [&](auto& share, DType dtype, const int64_t* indices, size_t n) {
    fill(share, lists, key, indices, n, entry);
    share.dtype = dtype;
    share.before = before;
    body(share);
    before += share.blocks;
  };
  for (const DType dtype : {DType::kFloat32, DType::kFloat64, DType::kBFloat16, DType::kFloat16}) {
    std::vector<int64_t> indices;
    for (size_t i = 0; i < first.size(); ++i)
      if (first[i].dtype == dtype && first[i].size > 0) indices.push_back(static_cast<int64_t>(i));
    for (size_t begin = 0; begin < indices.size(); begin += kTensorsPerLaunch<L>) {
      const size_t n = std::min(indices.size() - begin, static_cast<size_t>(kTensorsPerLaunch<L>));
      if (n <= static_cast<size_t>(kTensorsPerLaunch<L, true>)) {
        Share<L, true> share;
        take(share, dtype, indices.data() + begin, n);
      } else {
        Share<L, false> share;
        take(share, dtype, indices.data() + begin, n);
      }
    }
  }
}

}  // namespace cuda
}  // namespace tsam
