// What a kernel's threads do with each other: run, wait at barriers, meet in warps; and what is reported instead of the
// undefined.
//
// Layout: a worker stack runs threads one after another until one has to wait; the wait keeps the stack, and another
// one takes over. So a kernel without barriers costs a call per thread, and no switch. Invariant: compiled without
// sanitizers. TSan sees a fiber per thread, ordered by launches, barriers and __syncwarp alone.
#include "simt.h"

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <mutex>
#include <string>
#include <vector>

#include "machine.h"

uint3 threadIdx, blockIdx;
dim3 blockDim, gridDim;

namespace simt {
namespace {

std::mutex one_launch;

Context& own(Machine& m) { return *m.threads[m.current].stack; }

// Ends the launch from inside a fiber, which is left where it is.
[[noreturn]] void fail(Machine& m, const Failure& failure) {
  m.failure = failure;
  switch_context(own(m), m.host, /*ends=*/false);
  std::abort();
}

void run_threads();

// The running thread waits: others run, until somebody has made it ready.
void wait(Machine& m) {
  const unsigned me = m.current;
  Context& mine = own(m);
  if (!pick(m)) fail(m, {kDeadlock});
  if (m.current != me) {
    Context*& stack = m.threads[m.current].stack;
    if (stack == nullptr) {
      stack = m.stacks.take();
      prepare(*stack, run_threads);
    }
    switch_context(mine, *stack, /*ends=*/false);
    arrived(mine, nullptr);
  }
  if (m.tsan_host && m.threads[me].clock) __tsan_acquire(m.threads[me].clock);
}

void check_exit(Machine& m) {
  const unsigned me = m.current, warp = me / 32 * 32;
  if (m.at_barrier > 0)
    fail(m, {"{a} has returned, and {b} waits for it at the barrier {there}",
             me,
             m.barrier_first,
             0,
             {},
             m.threads[m.barrier_first].place});
  for (unsigned t = warp; t < std::min<size_t>(warp + 32, m.threads.size()); ++t)
    if (m.threads[t].state == State::kInWarp && (m.threads[t].mask >> (me - warp) & 1))
      fail(m, {"{a} has returned, and {b} waits for its lane at {there}", me, t, 0, {}, m.threads[t].place});
}

// The life of a worker stack: threads one after another. It starts with the one that is current.
void run_threads() {
  Machine& m = machine();
  arrived(own(m), m.first_arrival ? &m.host : nullptr);
  m.first_arrival = false;
  for (;;) {
    Context* const stack = m.threads[m.current].stack;
    if (m.tsan_host) __tsan_acquire(&m.clocks[0]);
    m.body(m.parameters);
    check_exit(m);
    if (m.tsan_host) __tsan_release(&m.clocks[8]);
    m.threads[m.current].state = State::kExited;
    ++m.exited;
    if (!pick(m)) {
      if (m.exited < m.threads.size()) {
        m.threads[m.current].stack = stack;
        fail(m, {kDeadlock});
      }
      if (!m.tsan_host) m.stacks.give(stack);
      switch_context(*stack, m.host, /*ends=*/true);
    }
    Context*& next = m.threads[m.current].stack;
    if (next == nullptr && !m.tsan_host) {
      next = stack;
      continue;
    }
    // Under TSan two threads of a launch never have one stack: their locals would be races.
    if (!m.tsan_host) m.stacks.give(stack);
    if (next == nullptr) {
      next = m.stacks.take();
      prepare(*next, run_threads);
    }
    switch_context(*stack, *next, /*ends=*/true);
  }
}

void start_block(Machine& m) {
  m.ready.clear();
  m.exited = m.at_barrier = 0;
  unsigned t = 0;
  for (unsigned z = 0; z < blockDim.z; ++z)
    for (unsigned y = 0; y < blockDim.y; ++y)
      for (unsigned x = 0; x < blockDim.x; ++x) {
        Thread& thread = m.threads[t++];
        thread.index = uint3{x, y, z};
        thread.stack = nullptr;
        thread.state = State::kReady;
        thread.clock = nullptr;
        if (m.tsan_host) {
          thread.tsan = __tsan_create_fiber(0);
          m.tsan_fibers.push_back(thread.tsan);
        }
      }
  make_ready(m, 0, t, kAllLanes);
}

void end_block(Machine& m) {
  for (const SharedBlock& block : m.shared) {
    if (m.tsan_host) {
      m.garbage.push_back(block.memory);
    } else {
      std::free(block.memory);
    }
  }
  m.shared.clear();
  m.shared_used = m.shared_bytes;
}

void run_block(Machine& m) {
  start_block(m);
  pick(m);
  Context*& stack = m.threads[m.current].stack;
  stack = m.stacks.take();
  prepare(*stack, run_threads);
  m.first_arrival = true;
  switch_context(m.host, *stack, /*ends=*/false);
  arrived(m.host, nullptr);
  if (m.tsan_host) __tsan_switch_to_fiber(m.tsan_host, kNoSync);
  end_block(m);
}

cudaError_t refuse(Machine& m, const std::string& text, cudaError_t error) {
  m.last_text = "simt: " + text;
  return m.last = error;
}

}  // namespace

unsigned lane_id() { return machine().current % 32; }

void sync_threads(Place place) {
  Machine& m = machine();
  const unsigned me = m.current;
  if (m.exited > 0) fail(m, {"{a} has come to the barrier {here}, and others have returned", me, 0, 0, place});
  if (m.at_barrier > 0 && !same(m.threads[m.barrier_first].place, place))
    fail(m, {"divergent barriers: {b} waits at {there}, {a} has come to {here}", me, m.barrier_first, 0, place,
             m.threads[m.barrier_first].place});
  if (m.at_barrier++ == 0) m.barrier_first = me;
  Thread& self = m.threads[me];
  self.place = place;
  self.state = State::kAtBarrier;
  if (m.tsan_host) {
    self.clock = m.barrier_first == me ? m.new_clock() : m.threads[m.barrier_first].clock;
    __tsan_release(self.clock);
  }
  if (m.at_barrier == m.threads.size()) {
    m.at_barrier = 0;
    make_ready(m, 0, static_cast<unsigned>(m.threads.size()), kAllLanes);
  }
  wait(m);
}

uint64_t sync_warp(WarpOp op, uint32_t mask, uint64_t value, unsigned lane, Place place) {
  Machine& m = machine();
  const unsigned me = m.current, warp = me / 32 * 32, own_lane = me - warp;
  const unsigned lanes = static_cast<unsigned>(std::min<size_t>(32, m.threads.size() - warp));
  Thread& self = m.threads[me];
  if (!(mask >> own_lane & 1)) fail(m, {"{a} is not in the mask that it gives at {here}", me, 0, 0, place});
  self.clock = nullptr;
  uint32_t here = 1u << own_lane;
  for (unsigned k = 0; k < 32; ++k) {
    const bool named = mask >> k & 1;
    if (named && (k >= lanes || m.threads[warp + k].state == State::kExited))
      fail(m, {k >= lanes ? "{a} names lane {n} in its mask at {here}, and the block has no such thread"
                          : "{a} names lane {n} in its mask at {here}, and that thread has returned",
               me, 0, k, place});
    if (k >= lanes || k == own_lane || m.threads[warp + k].state != State::kInWarp) continue;
    const Thread& other = m.threads[warp + k];
    if (!named) continue;
    if (other.mask == mask && other.op == op && same(other.place, place)) {
      here |= 1u << k;
      if (op == WarpOp::kSync) self.clock = other.clock;
    } else if (other.mask >> own_lane & 1) {
      fail(m, {"lanes that do not meet: {b} waits at {there}, {a} has come to {here} with another mask or operation",
               me, warp + k, 0, place, other.place});
    }
  }
  self.place = place;
  self.state = State::kInWarp;
  self.op = op;
  self.mask = mask;
  self.lane = lane;
  self.value = value;
  // A shuffle orders no memory: only the lanes' values pass.
  if (m.tsan_host && op == WarpOp::kSync) {
    if (self.clock == nullptr) self.clock = m.new_clock();
    __tsan_release(self.clock);
  }
  if (here == mask) {
    uint64_t brought[32] = {}, votes = 0;
    for (unsigned k = 0; k < lanes; ++k) {
      brought[k] = m.threads[warp + k].value;
      if (mask >> k & 1) votes |= (brought[k] & 1) << k;
    }
    for (unsigned k = 0; k < lanes; ++k) {
      if (!(mask >> k & 1)) continue;
      Thread& thread = m.threads[warp + k];
      const unsigned from = thread.lane;
      thread.value = op == WarpOp::kBallot ? votes : from < 32 && (mask >> from & 1) ? brought[from] : ~uint64_t{0};
    }
    make_ready(m, warp, lanes, mask);
  }
  wait(m);
  return m.threads[me].value;
}

void* shared(const void* site, size_t bytes) {
  Machine& m = machine();
  for (const SharedBlock& block : m.shared)
    if (block.site == site) {
      if (m.tsan_host) __tsan_acquire(block.memory);
      return block.memory;
    }
  if (site != &kDynamicSite) m.shared_used += bytes;
  if (m.shared_used > kStaticAndDynamic) fail(m, {"a block asks for more than 48 KiB of shared memory"});
  // TSan takes an allocation for a write: it is the host's, which every thread of the block comes after.
  if (m.tsan_host) __tsan_switch_to_fiber(m.tsan_host, kNoSync);
  void* const memory = std::malloc(bytes > 0 ? bytes : 1);
  if (memory == nullptr) std::abort();
  std::memset(memory, 0xFF, bytes);
  if (m.tsan_host) {
    __tsan_release(memory);
    __tsan_switch_to_fiber(m.threads[m.current].tsan, kNoSync);
    __tsan_acquire(memory);
  }
  m.shared.push_back({site, memory, bytes});
  return memory;
}

void* dynamic_shared() { return shared(&kDynamicSite, machine().shared_bytes); }

cudaError_t run(const void* kernel, dim3 grid, dim3 block, size_t shared_bytes, Body body, void* parameters) {
  const std::lock_guard<std::mutex> lock(one_launch);
  Machine& m = machine();
  if (++m.launches >= m.refused_from && m.launches < m.refused_to)
    return refuse(m, "launch " + std::to_string(m.launches) + " is to be refused", cudaErrorLaunchOutOfResources);
  if (!m.loaded.empty() && m.loaded.count(kernel) == 0)
    return refuse(m, "a kernel that was not loaded", cudaErrorLaunchFailure);
  const uint64_t blocks = uint64_t{grid.x} * grid.y * grid.z, threads = uint64_t{block.x} * block.y * block.z;
  if (threads == 0 || threads > 1024 || block.z > 64)
    return refuse(m, "a block of " + std::to_string(threads) + " threads", cudaErrorInvalidConfiguration);
  if (blocks == 0 || grid.y > 65535 || grid.z > 65535 || grid.x > 0x7FFFFFFFu || blocks > 1u << 24)
    return refuse(m, "a grid of " + std::to_string(blocks) + " blocks", cudaErrorInvalidConfiguration);
  if (__tsan_create_fiber && threads * blocks > 6000)
    return refuse(m, "TSan knows 8000 threads at most, and the grid has " + std::to_string(threads * blocks),
                  cudaErrorInvalidConfiguration);
  if (shared_bytes > kStaticAndDynamic)
    return refuse(m, std::to_string(shared_bytes) + " bytes of shared memory", cudaErrorInvalidConfiguration);
  blockDim = block;
  gridDim = grid;
  m.body = body;
  m.parameters = parameters;
  m.shared_bytes = m.shared_used = shared_bytes;
  m.failure = Failure{};
  m.threads.resize(threads);
  std::vector<uint32_t> blocks_in_order(blocks);
  for (uint64_t i = 0; i < blocks; ++i)
    blocks_in_order[i] = static_cast<uint32_t>(m.order == Order::kReversed ? blocks - 1 - i : i);
  if (m.order != Order::kReversed)
    for (uint64_t i = blocks; i > 1; --i) std::swap(blocks_in_order[i - 1], blocks_in_order[m.next_random() % i]);
  if (__tsan_create_fiber) {
    // All memory is the host's: what a fiber allocates and another frees would be a race of the emulation's own.
    m.stacks.reserve(threads * blocks);
    m.ready.reserve(threads);
    m.shared.reserve(64);
    m.tsan_host = __tsan_get_current_fiber();
    __tsan_release(&m.clocks[0]);
  }
  std::string text;
  for (const uint32_t b : blocks_in_order) {
    blockIdx = uint3{b % grid.x, b / grid.x % grid.y, b / grid.x / grid.y};
    run_block(m);
    if (m.failure.what == nullptr) continue;
    text = text_of(m);
    break;
  }
  if (m.tsan_host) {
    __tsan_acquire(&m.clocks[8]);
    for (void* const memory : m.garbage) std::free(memory);
    for (void* const fiber : m.tsan_fibers) __tsan_destroy_fiber(fiber);
    m.garbage.clear();
    m.stacks.give_all();
    m.tsan_fibers.clear();
  }
  if (m.failure.what == nullptr) return cudaSuccess;
  m.stacks.give_all();
  return refuse(m, text, cudaErrorLaunchFailure);
}

}  // namespace simt

cudaError_t load_kernel(const void* kernel) {
  simt::Machine& m = simt::machine();
  if (m.loads_to_refused > 0 && --m.loads_to_refused == 0)
    return simt::refuse(m, "a load that is to be refused", cudaErrorLaunchOutOfResources);
  m.loaded.insert(kernel);
  return cudaSuccess;
}

void simt_refuse_load(uint64_t nth) { simt::machine().loads_to_refused = nth; }

uint64_t simt_launches() { return simt::machine().launches; }

void simt_refuse(uint64_t nth, uint64_t count) {
  simt::Machine& m = simt::machine();
  m.refused_from = m.launches + nth;
  m.refused_to = m.refused_from + count;
}

cudaError_t cudaGetLastError() {
  const cudaError_t last = simt::machine().last;
  simt::machine().last = cudaSuccess;
  return last;
}

const char* cudaGetErrorString(cudaError_t error) {
  return error == cudaSuccess ? "no error" : simt::machine().last_text.c_str();
}
