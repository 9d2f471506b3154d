// The seam between the kernels and what compiles them: nvcc for a GPU, or g++ with the host emulation of tests/simt.
// This file and launch.h, for what torch knows of a device, alone tell them apart.
//
// Layout: kernels are torch-free and take raw pointers and plain structs by value; shared memory is declared by
// TSAM_SHARED alone, a large parameter by TSAM_PARAMETER(type). Invariant: every launch goes through launch(),
// which says whether it was accepted; cudaLaunchKernelExC does that without asking for the last error. load_kernel()
// comes before, for a kernel's first launch not to fail halfway through an op.
#pragma once

#if defined(TSAM_SIMT)

// From the emulation: __global__, the index variables, barriers, shuffles and votes, vector types, streams and errors,
// launch(), TSAM_SHARED, TSAM_PARAMETER, and what ops_cuda.cu needs of the runtime.
#include "../core/dtype.h"
#include "simt.h"

#define TSAM_DEVICE inline

namespace tsam {
namespace cuda {
template <typename Word>
TSAM_DEVICE void store_word(const Word& word, Word* to) {
  *to = word;
}

TSAM_DEVICE float widen_half(Float16 x) { return to_compute(x); }
TSAM_DEVICE void narrow_half(float x, Float16& out) { from_compute(x, out); }
}  // namespace cuda
}  // namespace tsam

#define TSAM_LAUNCH_BOUNDS(...)
#define TSAM_FOUR_BLOCKS(threads)

#else

#include <cuda_runtime.h>

#include <cstddef>
#include <type_traits>

#include "../core/dtype.h"

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

// float16 by the processor's own conversions, which take one instruction where core/dtype.h's integers take thirty. The
// same bits but a NaN's: PTX leaves open which one is read, and the one that is stored is chosen here.
TSAM_DEVICE float widen_half(Float16 x) {
  float wide;
  asm("cvt.f32.f16 %0, %1;" : "=f"(wide) : "h"(x.bits));
  return wide;
}
TSAM_DEVICE void narrow_half(float x, Float16& out) {
  uint16_t bits;
  asm("cvt.rn.f16.f32 %0, %1;" : "=h"(bits) : "f"(x));
  out.bits = x != x ? uint16_t{0x7E00} : bits;
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

// Parameters go by their addresses, so that nobody but the driver copies a table.
template <typename... Parameters>
[[nodiscard]] cudaError_t launch(void (*kernel)(Parameters...), dim3 grid, dim3 block, size_t shared_bytes,
                                 cudaStream_t stream, const std::decay_t<Parameters>&... parameters) {
  cudaLaunchConfig_t config{};
  config.gridDim = grid;
  config.blockDim = block;
  config.dynamicSmemBytes = shared_bytes;
  config.stream = stream;
  void* addresses[] = {const_cast<void*>(static_cast<const void*>(&parameters))..., nullptr};
  return cudaLaunchKernelExC(&config, reinterpret_cast<const void*>(kernel), addresses);
}

}  // namespace cuda
}  // namespace tsam

#endif
