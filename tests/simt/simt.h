// The names of CUDA that csrc/cuda uses, for g++: kernels are compiled as they stand and run by simt.cpp on the CPU.
//
// Layout: a CUDA thread is a fiber, all fibers share one OS thread, blocks run one after another. A thread runs until
// it waits at a barrier or for the lanes of its warp; who runs next: TSAM_SIMT_ORDER, TSAM_SIMT_SEED (simt.cpp).
// Invariant: what CUDA leaves undefined and the emulation can see (divergent barriers, early returns, lanes that are
// not there) makes launch() return an error whose text names the place. Shared memory starts as NaN in every block.
#pragma once

#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <tuple>
#include <type_traits>
#include <utility>

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline __attribute__((always_inline))
#define __launch_bounds__(...)
// A large parameter, that every thread would have to copy: here all read the launch's one.
#define TSAM_PARAMETER(...) const __VA_ARGS__&
// No __shared__: shared memory is declared by the macros below, and no __noinline__, which libstdc++ uses itself.

struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};
struct uint3 {
  unsigned x, y, z;
};

// Vector types with the alignment of their loads, which -fsanitize=alignment checks.
#define TSAM_SIMT_VECTOR(name, type, count)                      \
  struct alignas(sizeof(type) * (count)) name##2 { type x, y; }; \
  struct alignas(sizeof(type) * 2 * (count) <= 16 ? sizeof(type) * 2 * (count) : 16) name##4 { type x, y, z, w; }
TSAM_SIMT_VECTOR(float, float, 2);
TSAM_SIMT_VECTOR(double, double, 2);
TSAM_SIMT_VECTOR(int, int, 2);
TSAM_SIMT_VECTOR(uint, unsigned, 2);
TSAM_SIMT_VECTOR(ushort, unsigned short, 2);
#undef TSAM_SIMT_VECTOR

enum cudaError_t {
  cudaSuccess = 0,
  cudaErrorInvalidConfiguration = 9,
  cudaErrorLaunchOutOfResources = 701,
  cudaErrorLaunchFailure = 719
};
using cudaStream_t = struct CUstream_st*;

cudaError_t cudaGetLastError();
const char* cudaGetErrorString(cudaError_t error);

// Where the running thread is.
extern uint3 threadIdx, blockIdx;
extern dim3 blockDim, gridDim;

namespace simt {

struct Place {
  const char* file;
  int line;
};

enum class WarpOp : uint8_t { kSync, kShuffle, kBallot };

void sync_threads(Place place);
// Meets the lanes of `mask` at `place`; the value of `lane` comes back (kBallot: one bit per lane). A lane that is not
// in the mask gives all bits set: a NaN, or -1.
uint64_t sync_warp(WarpOp op, uint32_t mask, uint64_t value, unsigned lane, Place place);
// The block's memory of one declaration, full of NaN when it is first asked for. `site` names the declaration.
void* shared(const void* site, size_t bytes);
void* dynamic_shared();
unsigned lane_id();

using Body = void (*)(void* parameters);
cudaError_t run(const void* kernel, dim3 grid, dim3 block, size_t shared_bytes, Body body, void* parameters);

// Where a shuffle reads: as the PTX instruction, from a segment of `width` lanes.
enum class Direction { kIndex, kDown, kXor };
inline unsigned source(Direction direction, int by, int width) {
  const int lane = static_cast<int>(lane_id()), first = lane & ~(width - 1), last = first + width - 1;
  const int from = direction == Direction::kIndex  ? first + (by & (width - 1))
                   : direction == Direction::kDown ? lane + by
                                                   : lane ^ by;
  return static_cast<unsigned>(from <= last ? from : lane);
}

template <typename T>
T shuffle(uint32_t mask, T value, Direction direction, int by, int width, Place place) {
  static_assert(sizeof(T) <= 8 && std::is_arithmetic_v<T>);
  uint64_t word = 0;
  std::memcpy(&word, &value, sizeof value);
  word = sync_warp(WarpOp::kShuffle, mask, word, source(direction, by, width), place);
  std::memcpy(&value, &word, sizeof value);
  return value;
}

template <typename... Parameters>
struct Call {
  void (*kernel)(Parameters...);
  std::tuple<const std::decay_t<Parameters>&...> parameters;

  static void body(void* call) {
    Call& self = *static_cast<Call*>(call);
    std::apply(self.kernel, self.parameters);
  }
};

}  // namespace simt

#define TSAM_SIMT_PLACE (simt::Place{__FILE__, __LINE__})
#define __syncthreads() simt::sync_threads(TSAM_SIMT_PLACE)
#define __syncwarp(...) \
  simt::sync_warp(simt::WarpOp::kSync, simt::mask_of(__VA_ARGS__), 0, simt::lane_id(), TSAM_SIMT_PLACE)
#define __ballot_sync(mask, predicate) \
  static_cast<unsigned>(               \
      simt::sync_warp(simt::WarpOp::kBallot, mask, (predicate) ? 1 : 0, simt::lane_id(), TSAM_SIMT_PLACE))
#define __shfl_sync(mask, value, ...) simt::indexed(mask, value, TSAM_SIMT_PLACE, __VA_ARGS__)
#define __shfl_down_sync(mask, value, ...) simt::down(mask, value, TSAM_SIMT_PLACE, __VA_ARGS__)
#define __shfl_xor_sync(mask, value, ...) simt::crossed(mask, value, TSAM_SIMT_PLACE, __VA_ARGS__)

namespace simt {

inline uint32_t mask_of(uint32_t mask = 0xFFFFFFFFu) { return mask; }
template <typename T>
T indexed(uint32_t mask, T value, Place place, int by, int width = 32) {
  return shuffle(mask, value, Direction::kIndex, by, width, place);
}
template <typename T>
T down(uint32_t mask, T value, Place place, int by, int width = 32) {
  return shuffle(mask, value, Direction::kDown, by, width, place);
}
template <typename T>
T crossed(uint32_t mask, T value, Place place, int by, int width = 32) {
  return shuffle(mask, value, Direction::kXor, by, width, place);
}

}  // namespace simt

// A declaration in a device function is one piece of memory a block, as in CUDA: whoever calls it again gets the same.
#define TSAM_SHARED(type, name, count) \
  static const char name##_site = 0;   \
  type(&name)[count] = *static_cast<type(*)[count]>(simt::shared(&name##_site, sizeof(type[count])))
#define TSAM_DYNAMIC_SHARED(type, name) type* const name = static_cast<type*>(simt::dynamic_shared())

// A program that loads any kernel has to load each before it launches it.
[[nodiscard]] cudaError_t load_kernel(const void* kernel);

// For tests, by ctypes: how many launches there have been; refuses `count` of them from the nth from now on (1: next),
// the nth load from now on.
extern "C" __attribute__((visibility("default"))) uint64_t simt_launches();
extern "C" __attribute__((visibility("default"))) void simt_refuse(uint64_t nth, uint64_t count);
extern "C" __attribute__((visibility("default"))) void simt_refuse_load(uint64_t nth);

// Runs the whole grid before it returns; what it returns stands for the launch's and the kernel's own errors.
template <typename... Parameters>
[[nodiscard]] cudaError_t launch(void (*kernel)(Parameters...), dim3 grid, dim3 block, size_t shared_bytes,
                                 cudaStream_t, const std::decay_t<Parameters>&... parameters) {
  static_assert((sizeof(std::decay_t<Parameters>) + ... + 0) <= 32764, "more than a kernel's parameters can hold");
  simt::Call<Parameters...> call{kernel, {parameters...}};
  return simt::run(reinterpret_cast<const void*>(kernel), grid, block, shared_bytes, &simt::Call<Parameters...>::body,
                   &call);
}
