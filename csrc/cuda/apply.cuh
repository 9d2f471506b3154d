// A list of tensors as a kernel sees it, and the walk of one block over one chunk of it.
//
//   block b: the chunk b of the table's plan (core/chunks.h), kDeviceChunk elements, kThreads threads of W lanes
//
// Layout: a TensorTable goes by value as a __grid_constant__ parameter, so a launch needs no copy to the device and can
// be captured in a graph. One block per chunk: with chunks this short the hardware spreads lists of any mix of sizes
// evenly over any number of SMs, and a sum's order does not depend on their number.
// Invariant: functors see W lanes, those beyond the chunk zero; whole blocks of lanes move in 16-byte accesses where
// all of a tensor's pointers allow it, one element at a time elsewhere.
#pragma once

#include "../core/chunks.h"
#include "../core/dtype.h"
#include "../core/round.h"
#include "device.cuh"

namespace tsam {
namespace cuda {

constexpr int kThreads = 256;
// One block's: 16 elements a thread, four turns of 16 bytes in float32, so that even small networks make blocks for all
// SMs (ResNet-18: 2,893) and the last ones to end are short. A sum's order follows from it, whatever the GPU.
constexpr int64_t kDeviceChunk = 4096;

// What a kernel may take from CUDA 12.1 on (sm_70 and later), less room for its other parameters.
constexpr size_t kParameterBytes = 32764, kOtherParameters = 512;

// Tensors a launch takes: what an entry below needs for L lists, into the room that there is.
template <int L>
constexpr int kTensorsPerLaunch = static_cast<int>((kParameterBytes - kOtherParameters - 32) / (8 * L + 33));

template <int L>
struct TensorTable {
  static constexpr int kLists = L, kTensors = kTensorsPerLaunch<L>;

  char* data[L][kTensors];
  int64_t size[kTensors];
  int64_t first_chunk[kTensors + 1];
  uint64_t element[kTensors];  // index in the noise of the first element
  double scale[kTensors];
  bool adaptive[kTensors];
  int num_tensors;

  template <typename T>
  TSAM_DEVICE T* at(int list, const Chunk& chunk) const {
    return reinterpret_cast<T*>(data[list][chunk.tensor]) + chunk.offset;
  }
};
static_assert(sizeof(TensorTable<1>) + kOtherParameters <= kParameterBytes && kTensorsPerLaunch<1> >= 700);
static_assert(sizeof(TensorTable<2>) + kOtherParameters <= kParameterBytes && kTensorsPerLaunch<2> >= 600);
static_assert(sizeof(TensorTable<3>) + kOtherParameters <= kParameterBytes && kTensorsPerLaunch<3> >= 500);
static_assert(sizeof(TensorTable<7>) + kOtherParameters <= kParameterBytes && kTensorsPerLaunch<7> >= 350);

// Lanes that fill 16 bytes of a 16-bit type, and a whole number of quads of noise for every type.
template <typename T>
constexpr int kLanes = sizeof(T) == 2 ? 8 : 4;

template <typename Table>
TSAM_DEVICE Chunk chunk_of(const Table& table) {
  return chunk_at(table.first_chunk, table.size, table.num_tensors, static_cast<int64_t>(blockIdx.x), kDeviceChunk);
}

template <typename... Pointers>
TSAM_DEVICE bool aligned(Pointers... pointers) {
  return ((... | reinterpret_cast<uintptr_t>(pointers)) & 15) == 0;
}

// Which of a thread's W lanes hold elements: all of them, in aligned memory; or some, in any.
template <int W>
struct Whole {
  TSAM_DEVICE bool operator[](int) const { return true; }
};
struct Some {
  int first, last;
  TSAM_DEVICE bool operator[](int lane) const { return lane >= first && lane < last; }
};

// The word that W lanes of T move in.
template <size_t bytes>
struct Word {
  using type = uint4;
};
template <>
struct Word<8> {
  using type = uint2;
};

// Bits, not values: what is copied keeps a NaN's payload.
template <typename T, int W>
TSAM_DEVICE void load_raw(const T* from, Whole<W>, T (&raw)[W]) {
  using word = typename Word<sizeof(T) * W>::type;
  constexpr int kWords = sizeof(T) * W / sizeof(word);
  word words[kWords];
  TSAM_UNROLL
  for (int k = 0; k < kWords; ++k) words[k] = reinterpret_cast<const word*>(from)[k];
  memcpy(raw, words, sizeof raw);
}

template <typename T, int W>
TSAM_DEVICE void load_raw(const T* from, Some lanes, T (&raw)[W]) {
  TSAM_UNROLL
  for (int i = 0; i < W; ++i) raw[i] = lanes[i] ? from[i] : T{};
}

template <typename T, int W>
TSAM_DEVICE void store_raw(const T (&raw)[W], Whole<W>, T* to) {
  using word = typename Word<sizeof(T) * W>::type;
  constexpr int kWords = sizeof(T) * W / sizeof(word);
  word words[kWords];
  memcpy(words, raw, sizeof raw);
  TSAM_UNROLL
  for (int k = 0; k < kWords; ++k) store_word(words[k], reinterpret_cast<word*>(to) + k);
}

template <typename T, int W>
TSAM_DEVICE void store_raw(const T (&raw)[W], Some lanes, T* to) {
  TSAM_UNROLL
  for (int i = 0; i < W; ++i)
    if (lanes[i]) to[i] = raw[i];
}

template <typename T, typename C, int W>
TSAM_DEVICE void widen(const T (&raw)[W], C (&x)[W]) {
  TSAM_UNROLL
  for (int i = 0; i < W; ++i) x[i] = static_cast<C>(to_compute(raw[i]));
}

template <typename T, typename C, int W, typename Lanes>
TSAM_DEVICE void load(const T* from, Lanes lanes, C (&x)[W]) {
  T raw[W];
  load_raw(from, lanes, raw);
  widen(raw, x);
}

template <typename T, typename C, int W, typename Lanes>
TSAM_DEVICE void store(const C (&x)[W], Lanes lanes, T* to) {
  T raw[W];
  TSAM_UNROLL
  for (int i = 0; i < W; ++i) from_compute(x[i], raw[i]);
  store_raw(raw, lanes, to);
}

// The same into positions, the first of the lanes being the element `element` of the noise, where T is stochastic a
// multiple of 4.
template <typename T, typename C, int W, typename Lanes>
TSAM_DEVICE void store_position(const C (&x)[W], Lanes lanes, const Stream& rounding, uint64_t element, T* to) {
  if constexpr (kStochastic<T>) {
    uint32_t r[W];
    rounding_words<W / 4>(rounding, element, r);
    T raw[W];
    TSAM_UNROLL
    for (int i = 0; i < W; ++i) round_by(x[i], r[i], raw[i]);
    store_raw(raw, lanes, to);
  } else {
    store(x, lanes, to);
  }
}

// body(first element, lanes) for the block's `length` elements, W a thread at a time. Lanes begin `skip` elements
// before the chunk, where its first element is the skip-th of a quad of noise; `whole` says that 16-byte accesses are
// allowed.
template <int W, typename Body>
TSAM_DEVICE void for_lanes(int64_t length, int skip, bool whole, Body body) {
  const int n = static_cast<int>(length);
  int begin = static_cast<int>(threadIdx.x) * W - skip;
  if (whole && skip == 0) {
    TSAM_ROLLED
    for (; begin + W <= n; begin += kThreads * W) body(begin, Whole<W>{});
  }
  TSAM_ROLLED
  for (; begin < n; begin += kThreads * W) body(begin, Some{begin < 0 ? -begin : 0, n - begin < W ? n - begin : W});
}

}  // namespace cuda
}  // namespace tsam
