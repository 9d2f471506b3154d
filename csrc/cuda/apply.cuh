// A list of tensors as a kernel sees it, and the walk of one block over one chunk of it.
//
//   block b: the chunk b of the table's plan (core/chunks.h), kDeviceChunk elements, kThreads threads of W lanes
//
// Layout: a TensorTable goes by value as a __grid_constant__ parameter, so a launch needs no copy to the device and can
// be captured in a graph. The driver takes the whole parameter at each launch, so there are two sizes of it, and of
// each kernel. One block per chunk: with chunks this short the hardware spreads lists of any mix of sizes evenly over
// any number of SMs, and a sum's order does not depend on their number.
// Invariant: functors see W lanes, those beyond the chunk zero. Whole blocks of lanes move in 16-byte accesses where
// all of a tensor's pointers allow it once the same few elements are peeled off; elsewhere lanes lie side by side, or,
// where they are quads of noise, move one element at a time.
#pragma once

#include <type_traits>

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

// What a kernel may take from CUDA 12.1 on (sm_70 and later), what any could before, and the room for its other
// parameters in it.
constexpr size_t kParameterBytes = 32764, kFewBytes = 4096, kOtherParameters = 128;

// A tensor in each of L lists.
template <int L>
struct TensorEntry {
  char* data[L];
  int64_t size;
  uint64_t element;  // index in the noise of the first element
  double scale;
  int32_t first_chunk;  // of this launch's, which number its blocks
  bool adaptive;
};

// Tensors a launch takes: as many entries as the room holds, which for few tensors is the smaller one.
template <int L, bool few = false>
constexpr int kTensorsPerLaunch =
    static_cast<int>(((few ? kFewBytes : kParameterBytes) - kOtherParameters - 8) / sizeof(TensorEntry<L>));

template <int L, bool few = false>
struct TensorTable {
  static constexpr int kLists = L, kTensors = kTensorsPerLaunch<L, few>;
  static constexpr bool kFew = few;

  int64_t num_tensors;
  TensorEntry<L> entries[kTensors];

  TSAM_DEVICE const TensorEntry<L>& operator[](const Chunk& chunk) const { return entries[chunk.tensor]; }

  template <typename T>
  TSAM_DEVICE T* at(int list, const Chunk& chunk) const {
    return reinterpret_cast<T*>(entries[chunk.tensor].data[list]) + chunk.offset;
  }
};
// ResNet-18's 62 tensors are few in two and three lists.
static_assert(kTensorsPerLaunch<2, true> >= 62 && kTensorsPerLaunch<3, true> >= 62);
static_assert(sizeof(TensorTable<2, true>) + kOtherParameters <= kFewBytes && kTensorsPerLaunch<7, true> >= 40);
static_assert(sizeof(TensorTable<1>) + kOtherParameters <= kParameterBytes && kTensorsPerLaunch<1> >= 700);
static_assert(sizeof(TensorTable<2>) + kOtherParameters <= kParameterBytes && kTensorsPerLaunch<2> >= 600);
static_assert(sizeof(TensorTable<3>) + kOtherParameters <= kParameterBytes && kTensorsPerLaunch<3> >= 500);
static_assert(sizeof(TensorTable<7>) + kOtherParameters <= kParameterBytes && kTensorsPerLaunch<7> >= 350);

// Lanes that fill 16 bytes of a 16-bit type, and a whole number of quads of noise for every type.
template <typename T>
constexpr int kLanes = sizeof(T) == 2 ? 8 : 4;

// One number of each entry, as the core's plans look at them.
template <int L>
struct FirstChunks {
  const TensorEntry<L>* entries;
  TSAM_DEVICE int64_t operator[](int64_t t) const { return entries[t].first_chunk; }
};
template <int L>
struct Sizes {
  const TensorEntry<L>* entries;
  TSAM_DEVICE int64_t operator[](int64_t t) const { return entries[t].size; }
};

template <int L, bool few>
TSAM_DEVICE Chunk chunk_of(const TensorTable<L, few>& table) {
  return chunk_at(FirstChunks<L>{table.entries}, Sizes<L>{table.entries}, table.num_tensors,
                  static_cast<int64_t>(blockIdx.x), kDeviceChunk);
}

// Which of a thread's W lanes hold elements: all of them, in aligned memory; or some, in any. Beside: lane k is the
// element 32 k further on, so that a warp's lanes k are one piece of memory, however it is aligned.
template <int W>
struct Whole {
  TSAM_DEVICE bool operator[](int) const { return true; }
};
struct Some {
  int first, last;
  TSAM_DEVICE bool operator[](int lane) const { return lane >= first && lane < last; }
};

struct Beside {
  static constexpr int kStep = 32;
  int left;  // elements from the first lane on
  TSAM_DEVICE bool operator[](int lane) const { return lane * kStep < left; }
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
TSAM_DEVICE void load_raw(const T* from, Beside lanes, T (&raw)[W]) {
  TSAM_UNROLL
  for (int i = 0; i < W; ++i) raw[i] = lanes[i] ? from[i * Beside::kStep] : T{};
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

template <typename T, int W>
TSAM_DEVICE void store_raw(const T (&raw)[W], Beside lanes, T* to) {
  TSAM_UNROLL
  for (int i = 0; i < W; ++i)
    if (lanes[i]) to[i * Beside::kStep] = raw[i];
}

template <typename T, typename C, int W>
TSAM_DEVICE void widen(const T (&raw)[W], C (&x)[W]) {
  TSAM_UNROLL
  for (int i = 0; i < W; ++i) {
    if constexpr (std::is_base_of_v<Float16, T>) {
      x[i] = widen_half(raw[i]);
    } else {
      x[i] = static_cast<C>(to_compute(raw[i]));
    }
  }
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
  for (int i = 0; i < W; ++i) {
    if constexpr (std::is_base_of_v<Float16, T>) {
      narrow_half(x[i], raw[i]);
    } else {
      from_compute(x[i], raw[i]);
    }
  }
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

// How the lanes of a chunk lie. They begin `skip` elements before it; whole: those that it fills have 16-byte accesses;
// beside: nothing does, and they may lie side by side.
struct Lay {
  int skip;
  bool whole, beside;
};

// Whether groups of W lanes that begin `skip` elements before all the pointers begin at their words. None is at null.
template <int W, typename... T>
TSAM_DEVICE bool words_at(int skip, const T*... pointers) {
  const auto off = [&](auto* pointer) {
    constexpr size_t size = sizeof(*pointer), word = sizeof(typename Word<size * W>::type);
    const uintptr_t first = reinterpret_cast<uintptr_t>(pointer) - static_cast<uintptr_t>(skip) * size;
    return pointer == nullptr ? uintptr_t{0} : first % word;
  };
  return (... | off(pointers)) == 0;
}

// Of what may be cut anywhere; the first pointer's type is the narrowest.
template <int W, typename T, typename... Others>
TSAM_DEVICE Lay lay_by_memory(const T* first, const Others*... others) {
  const int skip = static_cast<int>(reinterpret_cast<uintptr_t>(first) / sizeof(T) % W);
  const bool whole = words_at<W>(skip, first, others...);
  return Lay{whole ? skip : 0, whole, !whole};
}

// Of what is drawn by the quad: the first element is the `element`-th of the noise.
template <int W, typename... T>
TSAM_DEVICE Lay lay_by_quads(uint64_t element, const T*... pointers) {
  constexpr int kQuad = W < 4 ? W : 4;
  const int skip = static_cast<int>(element % kQuad);
  // Not before the noise begins: its first quad has none in front.
  const bool quad_before = W > kQuad && element >= static_cast<uint64_t>(skip + kQuad);
  if (quad_before && words_at<W>(skip + kQuad, pointers...)) return Lay{skip + kQuad, true, false};
  return Lay{skip, words_at<W>(skip, pointers...), false};
}

// body(first element, lanes) for the block's `length` elements, W a thread at a time. kBeside, kPeel: whether lanes may
// lie side by side and elements be peeled off; both cost registers, which the largest bodies do not have.
template <int W, bool kBeside, bool kPeel = true, typename Body>
TSAM_DEVICE void for_lanes(int64_t length, Lay lay, Body body) {
  constexpr int kStep = kThreads * W;
  const int n = static_cast<int>(length), thread = static_cast<int>(threadIdx.x);
  if constexpr (kBeside) {
    if (lay.beside) {
      TSAM_ROLLED
      for (int at = thread / 32 * 32 * W + thread % 32; at < n; at += kStep) body(at, Beside{n - at});
      return;
    }
  }
  const int begin = thread * W - lay.skip;
  const bool whole = lay.whole && (kPeel || lay.skip == 0), head = kPeel && whole && begin < 0;
  int at = head ? begin + kStep : begin;
  if (whole) {
    TSAM_ROLLED
    for (; at + W <= n; at += kStep) body(at, Whole<W>{});
  }
  // What is left: the end, and of the first thread what lies before the first word.
  int next = head ? at : at + kStep;
  TSAM_ROLLED
  for (int some = head ? begin : at; some < n; some = next, next += kStep)
    body(some, Some{some < 0 ? -some : 0, n - some < W ? n - some : W});
}

}  // namespace cuda
}  // namespace tsam
