// The state of the emulated GPU, who is ready to run and in which order, and the text of a failure.
//
// Environment: TSAM_SIMT_ORDER=forward, reversed or random (threads between barriers; blocks are always shuffled but in
// reversed), TSAM_SIMT_SEED. Layout: the threads of one block at a time; ready ones lie on a stack.
// Invariant: nothing here allocates while a fiber runs under TSan, which would take the emulation's own lists for
// races.
#pragma once

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <set>
#include <string>
#include <vector>

#include "fiber.h"
#include "simt.h"

namespace simt {

enum class State : uint8_t { kReady, kAtBarrier, kInWarp, kExited };
enum class Order { kForward, kReversed, kRandom };

struct Thread {
  uint3 index;
  State state;
  Context* stack;  // null: not started
  Place place;     // where it waits
  WarpOp op;
  uint32_t mask;
  unsigned lane;   // that it reads
  uint64_t value;  // what it brings, then what it gets
  char* clock;     // what it acquires when it goes on
  void* tsan;
};

struct SharedBlock {
  const void* site;
  void* memory;
  size_t bytes;
};

inline constexpr char kDynamicSite = 0;
constexpr const char* kDeadlock = "deadlock: no thread can go on";
constexpr uint32_t kAllLanes = 0xFFFFFFFFu;
constexpr size_t kStaticAndDynamic = 48 * 1024;
constexpr unsigned kNoSync = 1;  // of __tsan_switch_to_fiber

// What has ended a launch, by pieces: a fiber that fails is left where it stands, so it may own no text.
struct Failure {
  const char* what = nullptr;  // {a} {b}: threads, {here} {there}: places, {n}: a number
  unsigned a = 0, b = 0, n = 0;
  Place here{}, there{};
};

struct Machine {
  Order order = Order::kForward;
  uint64_t random = 0x9E3779B97F4A7C15u;
  Stacks stacks;
  Context host;
  std::vector<Thread> threads;
  std::vector<uint32_t> ready;  // a stack: the last one runs next
  unsigned current = 0;
  unsigned exited = 0, at_barrier = 0, barrier_first = 0;
  bool running = false, first_arrival = false;
  Failure failure;
  std::string last_text;
  cudaError_t last = cudaSuccess;
  std::set<const void*> loaded;
  uint64_t launches = 0, refused_from = 0, refused_to = 0, loads_to_refused = 0;

  Body body = nullptr;
  void* parameters = nullptr;
  size_t shared_bytes = 0, shared_used = 0;
  std::vector<SharedBlock> shared;
  std::vector<void*> pool, garbage;  // memory of ended blocks: to be used again, or (TSan) to be freed at the end

  void* tsan_host = nullptr;
  std::vector<void*> tsan_fibers;
  std::vector<char> clocks = std::vector<char>(1 << 20);
  size_t next_clock = 8;  // the first two are the launch's: its start, its end

  Machine() {
    const char* const asked = std::getenv("TSAM_SIMT_ORDER");
    const std::string name = asked ? asked : "forward";
    order = name == "reversed" ? Order::kReversed : name == "random" ? Order::kRandom : Order::kForward;
    if (name != "forward" && order == Order::kForward) {
      std::fprintf(stderr, "simt: TSAM_SIMT_ORDER=%s: got neither forward nor reversed nor random\n", asked);
      std::abort();
    }
    const char* const seed = std::getenv("TSAM_SIMT_SEED");
    if (seed) random ^= std::strtoull(seed, nullptr, 10) * 0xD1342543DE82EF95u;
  }

  uint64_t next_random() {
    random ^= random << 13;
    random ^= random >> 7;
    random ^= random << 17;
    return random;
  }
  char* new_clock() {
    next_clock = next_clock + 16 < clocks.size() ? next_clock + 8 : 16;
    return &clocks[next_clock];
  }
};

// Never destroyed: kernels may run in destructors of the program's own statics.
inline Machine& machine() {
  static Machine* const m = new Machine();
  return *m;
}

// The next thread that can run, as `current`; false if none can.
inline bool pick(Machine& m) {
  if (m.ready.empty()) return false;
  m.current = m.ready.back();
  m.ready.pop_back();
  threadIdx = m.threads[m.current].index;
  if (m.tsan_host) __tsan_switch_to_fiber(m.threads[m.current].tsan, kNoSync);
  return true;
}

template <typename Iterator>
void shuffle_range(Machine& m, Iterator begin, Iterator end) {
  for (auto n = end - begin; n > 1; --n) std::swap(begin[n - 1], begin[m.next_random() % static_cast<uint64_t>(n)]);
}

// The threads of `mask` in a range run next, and before all that are ready already: a warp whose lanes have met runs as
// far ahead of the others as it can, which is what a missing barrier must not survive.
inline void make_ready(Machine& m, unsigned first, unsigned count, uint32_t mask) {
  const size_t before = m.ready.size();
  for (unsigned i = 0; i < count; ++i) {
    const unsigned k = m.order == Order::kForward ? count - 1 - i : i;
    if (count <= 32 && !(mask >> k & 1)) continue;
    m.threads[first + k].state = State::kReady;
    m.ready.push_back(first + k);
  }
  if (m.order != Order::kRandom) return;
  const auto begin = m.ready.begin() + static_cast<std::ptrdiff_t>(before), end = m.ready.end();
  shuffle_range(m, begin, end);
  // Every second time whole warps in random order.
  if (count <= 32 || m.next_random() % 2 == 0) return;
  const uint32_t key = static_cast<uint32_t>(m.next_random());
  std::sort(begin, end, [key](uint32_t a, uint32_t b) {
    return ((a / 32 + 1) * 0x9E3779B1u ^ key) < ((b / 32 + 1) * 0x9E3779B1u ^ key);
  });
}

inline std::string where(Place place) {
  const char* const slash = std::strrchr(place.file, '/');
  return std::string(slash ? slash + 1 : place.file) + ":" + std::to_string(place.line);
}

inline std::string name_of(const Machine& m, unsigned thread) {
  const auto triple = [](uint3 i) {
    return "(" + std::to_string(i.x) + "," + std::to_string(i.y) + "," + std::to_string(i.z) + ")";
  };
  return "thread " + triple(m.threads[thread].index) + " of block " + triple(blockIdx);
}

inline bool same(Place a, Place b) {
  return a.line == b.line && (a.file == b.file || std::strcmp(a.file, b.file) == 0);
}

// The host's: what has gone wrong; for a deadlock one waiting thread of each place.
inline std::string text_of(const Machine& m) {
  const Failure& failure = m.failure;
  std::string text = failure.what;
  const auto put = [&text](const char* key, const auto& value) {
    const size_t at = text.find(key);
    if (at != std::string::npos) text.replace(at, std::strlen(key), value());
  };
  put("{a}", [&] { return name_of(m, failure.a); });
  put("{b}", [&] { return name_of(m, failure.b); });
  put("{here}", [&] { return where(failure.here); });
  put("{there}", [&] { return where(failure.there); });
  put("{n}", [&] { return std::to_string(failure.n); });
  if (text != kDeadlock) return text;
  std::vector<Place> seen;
  for (unsigned t = 0; t < m.threads.size(); ++t) {
    const Thread& thread = m.threads[t];
    if (thread.state != State::kAtBarrier && thread.state != State::kInWarp) continue;
    if (std::any_of(seen.begin(), seen.end(), [&](Place p) { return same(p, thread.place); })) continue;
    seen.push_back(thread.place);
    text += "; " + name_of(m, t) + " waits at " + where(thread.place);
  }
  return text;
}

}  // namespace simt
