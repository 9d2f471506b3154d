// Kernels with one planted bug each, and correct ones: what the emulation must report, and what it must let pass.
//
//   selftest NAME   runs one case; exit 0: the right numbers, 1: wrong ones, 2: the launch returned an error
//
// Invariant: each bug is of a kind that CUDA leaves undefined or that depends on who runs first; which build of this
// program must see it stands in tests/test_simt.py. Device memory is the heap's, so ASan watches its ends.
#include <algorithm>
#include <cstdio>
#include <functional>
#include <map>
#include <numeric>
#include <string>
#include <vector>

#include "simt.h"

namespace {

constexpr int kBlock = 96;
constexpr unsigned kAll = 0xFFFFFFFFu;
using Floats = std::vector<float>;

struct Outcome {
  cudaError_t error;
  bool right;
};

Floats ramp(int n) {
  Floats x(static_cast<size_t>(n));
  std::iota(x.begin(), x.end(), 1.0f);
  return x;
}

template <typename... P>
Outcome one_block(void (*kernel)(P...), int threads, const Floats& expected, int n = kBlock, size_t shared = 0) {
  const Floats in = ramp(n);
  Floats out(expected.size(), -7.0f);
  const cudaError_t error =
      launch(kernel, 1, static_cast<unsigned>(threads), shared, nullptr, in.data(), out.data(), n);
  return {error, out == expected};
}

Floats reversed_ramp() {
  Floats x = ramp(kBlock);
  std::reverse(x.begin(), x.end());
  return x;
}

// ---- correct ----

__global__ void reverse_right(const float* in, float* out, int n) {
  TSAM_SHARED(float, tile, kBlock);
  const int i = static_cast<int>(threadIdx.x);
  tile[i] = in[i];
  __syncthreads();
  out[i] = tile[n - 1 - i];
}

__device__ float warp_sum(float x) {
  for (int half = 16; half > 0; half /= 2) x += __shfl_down_sync(kAll, x, half);
  return x;
}

__device__ float block_sum(float x) {
  TSAM_SHARED(float, warp, kBlock / 32);
  x = warp_sum(x);
  if (threadIdx.x % 32 == 0) warp[threadIdx.x / 32] = x;
  __syncthreads();
  float sum = 0.0f;
  for (int w = 0; w < kBlock / 32; ++w) sum += warp[w];
  __syncthreads();
  return sum;
}

// Two sums through the same memory, over a grid of several blocks with a stride.
__global__ void reduce_right(const float* in, float* out, int n) {
  float x = 0.0f;
  for (int i = static_cast<int>(blockIdx.x * blockDim.x + threadIdx.x); i < n;
       i += static_cast<int>(gridDim.x * blockDim.x))
    x += in[i];
  const float sum = block_sum(x), twice = block_sum(2.0f * x);
  if (threadIdx.x == 0) out[blockIdx.x] = sum + twice;
}

Outcome reduce_blocks() {
  const int n = 1000;
  const Floats in = ramp(n);
  Floats out(3, -7.0f);
  const cudaError_t error = launch(reduce_right, 3, kBlock, 0, nullptr, in.data(), out.data(), n);
  return {error, out[0] + out[1] + out[2] == 3.0f * 500500.0f};
}

__global__ void scan_right(const float* in, float* out, int n) {
  TSAM_DYNAMIC_SHARED(float, sums);
  const int i = static_cast<int>(threadIdx.x);
  sums[i] = in[i];
  __syncthreads();
  for (int by = 1; by < n; by *= 2) {
    const float before = i >= by ? sums[i - by] : 0.0f;
    __syncthreads();
    sums[i] += before;
    __syncthreads();
  }
  out[i] = sums[i];
}

Floats scanned() {
  Floats x = ramp(kBlock);
  std::partial_sum(x.begin(), x.end(), x.begin());
  return x;
}

// Halves of a warp with masks of their own, a broadcast, a butterfly, a vote, and memory passed over __syncwarp.
__global__ void warps_right(const float* in, float* out, int) {
  TSAM_SHARED(float, tile, 32);
  const unsigned lane = threadIdx.x;
  const unsigned half = lane < 16 ? 0x0000FFFFu : 0xFFFF0000u;
  float x = in[lane];
  if (lane < 16) {
    for (int by = 8; by > 0; by /= 2) x += __shfl_xor_sync(half, x, by);
  } else {
    x = __shfl_sync(half, x, 16);
  }
  tile[lane] = x;
  __syncwarp();
  const unsigned odd = __ballot_sync(kAll, lane % 2);
  const float segment = __shfl_down_sync(kAll, in[lane], 1, 8);
  out[lane] = tile[31 - lane] + static_cast<float>(odd == 0xAAAAAAAAu) + segment;
}

Outcome warps() {
  Floats expected(32);
  for (int i = 0; i < 32; ++i) {
    const float other = 31 - i < 16 ? 136.0f : 17.0f, segment = static_cast<float>(i % 8 == 7 ? i + 1 : i + 2);
    expected[static_cast<size_t>(i)] = other + 1.0f + segment;
  }
  return one_block(warps_right, 32, expected, 32);
}

// ---- planted: shared memory ----

__global__ void read_before_write(const float* in, float* out, int n) {
  TSAM_SHARED(float, tile, kBlock);
  const int i = static_cast<int>(threadIdx.x);
  tile[i] = in[i];
  out[i] = tile[n - 1 - i];  // no barrier
}

__global__ void missing_barrier_in_tree(const float* in, float* out, int) {
  TSAM_SHARED(float, sums, 64);
  const int i = static_cast<int>(threadIdx.x);
  sums[i] = in[i];
  __syncthreads();
  for (int half = 32; half > 0; half /= 2)
    if (i < half) sums[i] += sums[i + half];  // no barrier between the levels
  if (i == 0) out[0] = sums[0];
}

__device__ float sum_without_second_barrier(float x) {
  TSAM_SHARED(float, warp, kBlock / 32);
  x = warp_sum(x);
  if (threadIdx.x % 32 == 0) warp[threadIdx.x / 32] = x;
  __syncthreads();
  return warp[0] + warp[1] + warp[2];
}

__global__ void missing_second_barrier(const float* in, float* out, int) {
  const float x = in[threadIdx.x], sum = sum_without_second_barrier(x);
  out[threadIdx.x] = sum + sum_without_second_barrier(2.0f * x);
}

__global__ void uninitialised(const float* in, float* out, int) {
  TSAM_SHARED(float, sum, kBlock);
  if (threadIdx.x > 0) sum[threadIdx.x] = in[threadIdx.x];  // the first is forgotten
  __syncthreads();
  out[threadIdx.x] = sum[threadIdx.x];
}

__global__ void missing_syncwarp(const float* in, float* out, int n) {
  TSAM_SHARED(float, tile, 32);
  const int i = static_cast<int>(threadIdx.x);
  tile[i] = in[i];
  out[i] = tile[n - 1 - i];
}

// The lanes have met in a shuffle, which orders no memory.
__global__ void shuffle_for_syncwarp(const float* in, float* out, int n) {
  TSAM_SHARED(float, tile, 32);
  const int i = static_cast<int>(threadIdx.x);
  tile[i] = in[i];
  const float same = __shfl_sync(kAll, 1.0f, 0);
  out[i] = same * tile[n - 1 - i];
}

__global__ void shared_past_the_end(const float* in, float* out, int) {
  TSAM_SHARED(float, tile, kBlock);
  float* const p = tile;
  p[threadIdx.x + 1] = in[threadIdx.x];
  __syncthreads();
  out[threadIdx.x] = p[threadIdx.x + 1];
}

__global__ void shared_before_the_start(const float* in, float* out, int) {
  TSAM_SHARED(float, tile, kBlock);
  float* const p = tile;
  p[threadIdx.x] = in[threadIdx.x];
  __syncthreads();
  out[threadIdx.x] = p[static_cast<int>(threadIdx.x) - 1];
}

__global__ void dynamic_past_the_end(const float* in, float* out, int) {
  TSAM_DYNAMIC_SHARED(float, tile);
  tile[threadIdx.x] = in[threadIdx.x];
  __syncthreads();
  out[threadIdx.x] = tile[threadIdx.x];
}

__global__ void too_much_shared(const float* in, float* out, int) {
  TSAM_SHARED(float, tile, 13000);
  tile[threadIdx.x] = in[threadIdx.x];
  out[threadIdx.x] = tile[threadIdx.x];
}

// ---- planted: barriers ----

__global__ void divergent_barriers(const float* in, float* out, int) {
  if (threadIdx.x < 32) {
    __syncthreads();
  } else {
    __syncthreads();
  }
  out[threadIdx.x] = in[threadIdx.x];
}

__global__ void early_return(const float* in, float* out, int) {
  if (threadIdx.x == 5) return;
  __syncthreads();
  out[threadIdx.x] = in[threadIdx.x];
}

__global__ void barrier_in_uneven_loop(const float* in, float* out, int) {
  for (unsigned k = 0; k < 3 + threadIdx.x / 64; ++k) __syncthreads();
  out[threadIdx.x] = in[threadIdx.x];
}

__global__ void barrier_against_warp(const float* in, float* out, int) {
  if (threadIdx.x % 32 < 16) {
    __syncthreads();
  } else {
    __syncwarp();
  }
  out[threadIdx.x] = in[threadIdx.x];
}

// ---- planted: warps ----

__global__ void mask_without_self(const float* in, float* out, int) {
  out[threadIdx.x] = __shfl_sync(0x0000FFFFu, in[threadIdx.x], 0);
}

__global__ void shuffle_with_the_exited(const float* in, float* out, int n) {
  if (threadIdx.x >= 20) return;
  out[threadIdx.x] = __shfl_down_sync(kAll, in[threadIdx.x], 1) + static_cast<float>(n);
}

__global__ void mask_of_a_partial_warp(const float* in, float* out, int) {
  out[threadIdx.x] = __shfl_xor_sync(kAll, in[threadIdx.x], 1);
}

__global__ void masks_that_differ(const float* in, float* out, int) {
  const unsigned mask = threadIdx.x < 16 ? kAll : 0xFFFF0000u;
  out[threadIdx.x] = __shfl_sync(mask, in[threadIdx.x], 16);
}

__global__ void lane_outside_the_mask(const float* in, float* out, int) {
  float x = in[threadIdx.x];
  if (threadIdx.x < 16) x = __shfl_sync(0x0000FFFFu, x, 16);
  out[threadIdx.x] = x;
}

__global__ void vote_in_a_branch(const float* in, float* out, int) {
  if (threadIdx.x % 2 == 0) out[threadIdx.x] = static_cast<float>(__ballot_sync(kAll, in[threadIdx.x] > 3.0f));
  __syncthreads();
}

__global__ void different_operations(const float* in, float* out, int) {
  if (threadIdx.x == 0) {
    out[0] = __shfl_sync(kAll, in[0], 1);
  } else {
    out[threadIdx.x] = __shfl_xor_sync(kAll, in[threadIdx.x], 1);
  }
}

// ---- planted: global memory ----

__global__ void global_past_the_end(const float* in, float* out, int n) {
  const int i = static_cast<int>(threadIdx.x);
  out[i] = in[i + (i == n - 1)];
}

__global__ void tail_of_a_vector(const float* in, float* out, int n) {
  const int i = 4 * static_cast<int>(threadIdx.x);
  if (i < n) {  // for i + 4 <= n
    const float4 x = *reinterpret_cast<const float4*>(in + i);
    out[threadIdx.x] = x.x + x.y + x.z + x.w;
  }
}

__global__ void misaligned(const float* in, float* out, int) {
  const float2 x = *reinterpret_cast<const float2*>(in + 1 + 2 * threadIdx.x);
  out[threadIdx.x] = x.x + x.y;
}

__global__ void all_blocks_one_cell(const float* in, float* out, int) {
  if (threadIdx.x == 0) out[0] = in[0] + out[0] * 0.0f;  // each block reads and writes it
}

__global__ void block_after_block(const float* in, float* out, int) {
  if (threadIdx.x == 0) out[blockIdx.x] = in[blockIdx.x] + (blockIdx.x > 0 ? out[blockIdx.x - 1] : 0.0f);
}

template <typename... P>
Outcome blocks(void (*kernel)(P...), unsigned count, const Floats& expected) {
  const Floats in = ramp(kBlock);
  Floats out(expected.size(), 0.0f);
  const cudaError_t error = launch(kernel, count, 8, 0, nullptr, in.data(), out.data(), kBlock);
  return {error, out == expected};
}

Outcome too_many_threads() { return one_block(reverse_right, 1025, reversed_ramp()); }

Floats first(int n) { return ramp(n); }
Floats reversed_warp() {
  Floats x = ramp(32);
  std::reverse(x.begin(), x.end());
  return x;
}

const std::map<std::string, std::function<Outcome()>> kCases = {
    {"right: reverse", [] { return one_block(reverse_right, kBlock, reversed_ramp()); }},
    {"right: reduction", reduce_blocks},
    {"right: scan", [] { return one_block(scan_right, kBlock, scanned(), kBlock, kBlock * sizeof(float)); }},
    {"right: warps", warps},
    {"read before write", [] { return one_block(read_before_write, kBlock, reversed_ramp()); }},
    {"missing barrier in a tree", [] { return one_block(missing_barrier_in_tree, 64, {2080.0f}, 64); }},
    {"missing second barrier",
     [] { return one_block(missing_second_barrier, kBlock, Floats(kBlock, 3.0f * 4656.0f)); }},
    {"uninitialised shared", [] { return one_block(uninitialised, kBlock, first(kBlock)); }},
    {"missing syncwarp", [] { return one_block(missing_syncwarp, 32, reversed_warp(), 32); }},
    {"shuffle for syncwarp", [] { return one_block(shuffle_for_syncwarp, 32, reversed_warp(), 32); }},
    {"shared past the end", [] { return one_block(shared_past_the_end, kBlock, first(kBlock)); }},
    {"shared before the start", [] { return one_block(shared_before_the_start, kBlock, first(kBlock)); }},
    {"dynamic past the end", [] { return one_block(dynamic_past_the_end, kBlock, first(kBlock), kBlock, 40); }},
    {"too much shared", [] { return one_block(too_much_shared, kBlock, first(kBlock)); }},
    {"divergent barriers", [] { return one_block(divergent_barriers, kBlock, first(kBlock)); }},
    {"early return", [] { return one_block(early_return, kBlock, first(kBlock)); }},
    {"barrier in an uneven loop", [] { return one_block(barrier_in_uneven_loop, kBlock, first(kBlock)); }},
    {"barrier against warp", [] { return one_block(barrier_against_warp, kBlock, first(kBlock)); }},
    {"mask without self", [] { return one_block(mask_without_self, 32, first(32)); }},
    {"shuffle with the exited", [] { return one_block(shuffle_with_the_exited, 32, first(32)); }},
    {"mask of a partial warp", [] { return one_block(mask_of_a_partial_warp, 48, first(48)); }},
    {"masks that differ", [] { return one_block(masks_that_differ, 32, first(32)); }},
    {"lane outside the mask", [] { return one_block(lane_outside_the_mask, 32, first(32)); }},
    {"vote in a branch", [] { return one_block(vote_in_a_branch, 32, first(32)); }},
    {"different operations", [] { return one_block(different_operations, 32, first(32)); }},
    {"global past the end", [] { return one_block(global_past_the_end, kBlock, first(kBlock)); }},
    {"tail of a vector", [] { return one_block(tail_of_a_vector, 4, {10.0f, 26.0f, 42.0f, 0.0f}, 14); }},
    {"misaligned vector",
     [] { return one_block(misaligned, 8, {5.0f, 9.0f, 13.0f, 17.0f, 21.0f, 25.0f, 29.0f, 33.0f}); }},
    {"all blocks, one cell", [] { return blocks(all_blocks_one_cell, 4, {1.0f}); }},
    {"block after block", [] { return blocks(block_after_block, 4, {1.0f, 3.0f, 6.0f, 10.0f}); }},
    {"too many threads", too_many_threads},
};

}  // namespace

int main(int argc, char** argv) {
  if (argc != 2) {
    for (const auto& entry : kCases) std::printf("%s\n", entry.first.c_str());
    return 0;
  }
  const auto found = kCases.find(argv[1]);
  if (found == kCases.end()) return 3;
  const Outcome outcome = found->second();
  if (outcome.error != cudaSuccess) {
    std::fprintf(stderr, "%s\n", cudaGetErrorString(outcome.error));
    return 2;
  }
  if (!outcome.right) std::fprintf(stderr, "wrong numbers\n");
  return outcome.right ? 0 : 1;
}
