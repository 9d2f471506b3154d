// The seam between the kernels and what compiles them: nvcc for a GPU, or g++ with the host emulation of tests/simt.
// This file and launch.h, for what torch knows of a device, alone tell them apart.
//
// Layout: kernels are torch-free and take raw pointers and plain structs by value; shared memory is declared by
// TSAM_SHARED alone, a large parameter by TSAM_PARAMETER(type). Invariant: every launch goes through launch(),
// which says whether it was accepted; cudaLaunchKernelEx does that without asking for the last error. load_kernel()
// comes before, for a kernel's first launch not to fail halfway through an op.
#pragma once

#if defined(TSAM_SIMT)

// From the emulation: __global__, the index variables, barriers, shuffles and votes, vector types, streams and errors,
// launch(), TSAM_SHARED, TSAM_PARAMETER, and what ops_cuda.cu needs of the runtime.
#include "simt.h"

#define TSAM_DEVICE inline

namespace tsam {
namespace cuda {
template <typename Word>
TSAM_DEVICE void store_word(const Word& word, Word* to) {
  *to = word;
}
}  // namespace cuda
}  // namespace tsam

#define TSAM_LAUNCH_BOUNDS(...)
#define TSAM_FOUR_BLOCKS(threads)

#else

#include <cuda_runtime.h>

#include <cstddef>
#include <utility>

#define TSAM_DEVICE __device__ __forceinline__
#define TSAM_LAUNCH_BOUNDS(...) __launch_bounds__(__VA_ARGS__)
// Where the compiler would else take more than the 64 registers a thread that let four blocks run on an SM at once.
// From sm_100 on it would make the room by spilling; three blocks are a reasoned choice, not a timed one.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 1000
#define TSAM_FOUR_BLOCKS(threads) __launch_bounds__(threads)
#else
#define TSAM_FOUR_BLOCKS(threads) __launch_bounds__(threads, 4)
#endif
#define TSAM_PARAMETER(...) const __grid_constant__ __VA_ARGS__
#define TSAM_SHARED(type, name, count) __shared__ type name[count]

namespace tsam {
namespace cuda {

// To global memory in one access: an assignment is taken apart again for sm_90 and older.
template <typename Word>
TSAM_DEVICE void store_word(const Word& word, Word* to) {
  __stwb(to, word);
}

// Brings a kernel to the current device now: by itself the driver does that at the first launch, and fails there. In a
// captured graph too, since it changes nothing that a graph holds.
[[nodiscard]] inline cudaError_t load_kernel(const void* kernel) {
  cudaStreamCaptureMode mode = cudaStreamCaptureModeRelaxed;
  cudaError_t error = cudaThreadExchangeStreamCaptureMode(&mode);
  if (error != cudaSuccess) return error;
  cudaFuncAttributes attributes;
  error = cudaFuncGetAttributes(&attributes, kernel);
  const cudaError_t back = cudaThreadExchangeStreamCaptureMode(&mode);
  return error != cudaSuccess ? error : back;
}

template <typename... Parameters, typename... Args>
[[nodiscard]] cudaError_t launch(void (*kernel)(Parameters...), dim3 grid, dim3 block, size_t shared_bytes,
                                 cudaStream_t stream, Args&&... args) {
  cudaLaunchConfig_t config{};
  config.gridDim = grid;
  config.blockDim = block;
  config.dynamicSmemBytes = shared_bytes;
  config.stream = stream;
  return cudaLaunchKernelEx(&config, kernel, std::forward<Args>(args)...);
}

}  // namespace cuda
}  // namespace tsam

#endif
