// The kernels of the list ops on small tables, without torch, so that TSan and ASan see every access: tensors of each
// storage type, aligned or not, over a chunk, empty; the sums, the moves and HMC's passes, four blocks a launch.
//
//   kernels     exit 0: every sum and every element is a number; a sanitizer's report or a launch's error ends it
//
// Invariant: no value is compared here but with NaN, which shared memory starts as: tests/test_emulated.py compares.
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <memory>
#include <vector>

#include "../../csrc/cuda/hmc_kernels.cuh"
#include "../../csrc/cuda/list_kernels.cuh"
#include "../../csrc/cuda/row_kernels.cuh"

using namespace tsam;
using namespace tsam::cuda;

namespace {

int failures = 0;

void check(cudaError_t error, const char* what) {
  if (error == cudaSuccess) return;
  std::printf("%s: %s\n", what, cudaGetErrorString(error));
  ++failures;
}

// Tensors of memory that ends where they end.
template <typename T>
struct List {
  std::vector<std::unique_ptr<char[]>> memory;
  std::vector<T*> data;

  List(const std::vector<int64_t>& sizes, size_t off) {
    for (const int64_t n : sizes) {
      memory.emplace_back(new char[(static_cast<size_t>(n) + off) * sizeof(T)]);
      data.push_back(reinterpret_cast<T*>(memory.back().get()) + off);
      for (int64_t i = 0; i < n; ++i)
        from_compute(static_cast<compute_t<T>>(0.25 * static_cast<double>(i % 7 - 3)), data.back()[i]);
    }
  }
};

template <int L, bool few>
int64_t fill(TensorTable<L, few>& table, const std::vector<int64_t>& sizes, const std::vector<char*> (&lists)[L]) {
  table.num_tensors = 0;
  int64_t blocks = 0;
  for (size_t i = 0; i < sizes.size(); ++i) {
    if (sizes[i] == 0) continue;
    TensorEntry<L>& entry = table.entries[table.num_tensors++];
    for (int l = 0; l < L; ++l) entry.data[l] = lists[l][i];
    entry.size = sizes[i];
    entry.element = 4 * i + i % 3;
    entry.scale = 0.5;
    entry.adaptive = i % 2 == 0;
    entry.first_chunk = static_cast<int32_t>(blocks);
    blocks += (sizes[i] + kDeviceChunk - 1) / kDeviceChunk;
  }
  return blocks;
}

template <typename T>
std::vector<char*> pointers(const List<T>& list) {
  std::vector<char*> out;
  for (T* const p : list.data) out.push_back(reinterpret_cast<char*>(p));
  return out;
}

template <typename Kernel, typename... Args>
void go(const char* what, Kernel kernel, int64_t blocks, const Args&... args) {
  check(launch(kernel, dim3(static_cast<unsigned>(blocks)), dim3(kThreads), 0, nullptr, args...), what);
}

void expect_numbers(const char* what, const std::vector<double>& values) {
  for (const double value : values)
    if (!(std::fabs(value) < 1e30)) {
      std::printf("%s: %g\n", what, value);
      ++failures;
    }
}

const CountedStream kWords{make_stream(3, 1, kStochasticRounding, 0), nullptr};

template <typename T, bool few>
void run_lists(size_t off) {
  using C = compute_t<T>;
  const std::vector<int64_t> sizes = {kDeviceChunk + 37, 0, 5, 130};
  const List<T> position(sizes, off), saved(sizes, 0), grads(sizes, off ? 1 : 0);
  const List<C> total(sizes, off);
  std::vector<double> state(64, 0.5), partial(8, kNaN);
  TensorTable<2, few> pair;
  TensorTable<3, few> triple;
  const int64_t blocks = fill(pair, sizes, {pointers(position), pointers(saved)});
  const CountedStream stream{make_stream(3, 1, kPerturbation, 2), nullptr};
  go("noise_sum_squares", noise_sum_squares<2, few>, blocks, pair, stream, partial.data());
  check(launch(finish_sums<1, FinishNoise>, 1, kFinishThreads, 0, nullptr, partial.data(), blocks,
               FinishNoise{state.data(), kNoises[2], 200, {make_stream(3, 1, kBallRadius, 2), nullptr}}),
        "finish");
  const CountedStream signs{make_stream(3, 1, kSigns, 2), nullptr};
  for (const CountedStream& drawn : {stream, signs})
    go("perturb_chunks", perturb_chunks<T, few>, blocks, pair, drawn, state.data(), false, true, kWords);
  fill(pair, sizes, {pointers(grads), pointers(saved)});
  go("grad_sum_squares", grad_sum_squares<T, few>, blocks, pair, partial.data());
  check(launch(finish_sums<1, FinishNorm>, 1, kFinishThreads, 0, nullptr, partial.data(), blocks,
               FinishNorm{state.data(), 0}),
        "finish");
  fill(triple, sizes, {pointers(position), pointers(saved), pointers(grads)});
  go("ascend_chunks", ascend_chunks<T, few>, blocks, triple, state.data(), false, kWords);
  std::vector<double> changes(3 * static_cast<size_t>(blocks), kNaN);
  for (const bool along : {true, false}) {
    go("displacement_chunks", displacement_chunks<T, few>, blocks, triple, along, changes.data(), blocks);
    expect_numbers("displacement", changes);
  }
  fill(pair, sizes, {pointers(total), pointers(grads)});
  for (const Action action : {kAssign, kBlend, kZero}) {
    state[kAction] = action;
    go("accumulate_chunks", accumulate_chunks<T, few>, blocks, pair, state.data(), false);
  }
  std::vector<double> products(kDirectionSums * static_cast<size_t>(blocks), kNaN);
  go("direction_sums", direction_sums<T, few>, blocks, pair, products.data(), blocks);
  expect_numbers("products", products);
  fill(pair, sizes, {pointers(position), pointers(saved)});
  go("copy_chunks", copy_chunks<T, few>, blocks, pair);
  expect_numbers("partial sums", std::vector<double>(partial.begin(), partial.begin() + blocks));
  expect_numbers("state", state);
}

template <typename T, HmcPassKind kind, bool first, bool few>
void run_pass(const TensorTable<kLeapfrogLists, few>& table, int64_t blocks, const std::vector<double>& chain,
              const PassScalars& scalars) {
  std::vector<double> partial(static_cast<size_t>(blocks) * kPassSums<kind>, kNaN);
  go("hmc_pass", hmc_pass<T, kind, first, few>, blocks, table, CountedStream{make_stream(3, 1, kMomentum, 0), nullptr},
     true, chain.data(), &scalars, partial.data(), blocks, kWords);
  expect_numbers("sums of a pass", partial);
}

template <typename T, bool few>
void run_hmc(size_t off) {
  using C = compute_t<T>;
  const std::vector<int64_t> sizes = {kDeviceChunk + 37, 0, 5, 130};
  const List<T> position(sizes, off), saved(sizes, 0), grads(sizes, off ? 1 : 0), carried(sizes, off);
  const List<C> momentum(sizes, off), x0(sizes, 0), x1(sizes, off), x2(sizes, 1), total(sizes, 0);
  std::vector<double> chain(kChain, 0.0), state(64, 0.5), partial(8, kNaN);
  const double length = 0.1;
  const Drift drift = rotation_drift(0.3);
  const PassScalars scalars{0.25, drift, DriftMap<float>(drift), energy_unit(0.25)};
  TensorTable<kPlaceLists, few> places;
  TensorTable<kLeapfrogLists, few> table;
  TensorTable<3, few> triple;
  const int64_t blocks =
      fill(places, sizes, {pointers(position), pointers(saved), pointers(x0), pointers(x1), pointers(x2)});
  fill(table, sizes,
       {pointers(position), pointers(saved), pointers(momentum), pointers(grads), pointers(x0), pointers(x1),
        pointers(x2)});
  for (const double* const draw : {&length, static_cast<const double*>(nullptr)})
    go("hmc_place_chunks", hmc_place_chunks<T, few>, blocks, places,
       CountedStream{make_stream(3, 1, kPerturbation, 0), nullptr}, chain.data(), draw, kWords);
  run_pass<T, HmcPassKind::kWhole, true>(table, blocks, chain, scalars);
  run_pass<T, HmcPassKind::kWhole, false>(table, blocks, chain, scalars);
  run_pass<T, HmcPassKind::kKick, true>(table, blocks, chain, scalars);
  run_pass<T, HmcPassKind::kKick, false>(table, blocks, chain, scalars);
  run_pass<T, HmcPassKind::kDrift, false>(table, blocks, chain, scalars);
  fill(triple, sizes, {pointers(saved), pointers(momentum), pointers(grads)});
  go("hmc_last_kick", hmc_last_kick<T, few>, blocks, triple, chain.data(), partial.data(), blocks);
  expect_numbers("sums of the last kick", std::vector<double>(partial.begin(), partial.begin() + 2 * blocks));
  fill(triple, sizes, {pointers(total), pointers(carried), pointers(grads)});
  for (const double taken : {0.0, 1.0}) {
    chain[kTaken] = taken;
    for (const bool adopted : {false, true}) {
      state[kAction] = adopted ? kAssign : kBlend;
      go("hmc_carry_chunks", hmc_carry_chunks<T, few>, blocks, triple, chain.data(), state.data(), true, adopted);
    }
  }
}

// Means of 70 rows, in tiles of 32, by 4 or 32 threads a column, with a number that float32 pairs cannot hold; and of
// what the tiles leave.
template <typename T, int W>
void run_rows(size_t off) {
  constexpr int64_t kRows = 70, kColumns = 7 * W, kTile = 32, kTiles = 3;
  const List<T> values({kRows * kColumns}, off);
  from_compute(static_cast<compute_t<T>>(sizeof(T) == 2 ? 6e4 : 3e38), values.data[0][kColumns + 1]);
  const std::vector<double> weights(kRows, 1.0 / kRows);
  const std::vector<PairSum> pairs(kRows, weight_pair(1.0 / kRows));
  std::vector<double> partial(kTiles * kColumns, kNaN);
  List<T> out({kColumns}, W == 1 ? off : 0);
  Rows rows{kColumns, kRows, kColumns, true, 1, {}, W == 1 ? 64 : 8, 1, kTile};
  go("weighted_sum", weighted_sum<T, T, W>, kTiles, rows, values.data[0], weights.data(), pairs.data(), partial.data(),
     static_cast<T*>(nullptr));
  for (double& x : partial) x = std::fabs(x) < 1e39 ? 0.0 : x;
  expect_numbers("partial means", partial);
  rows = Rows{kColumns, kTiles, kColumns, true, 1, {}, 64, 1, kTile};
  go("weighted_sum", weighted_sum<double, T, 1>, 1, rows, static_cast<const double*>(partial.data()),
     static_cast<const double*>(nullptr), static_cast<const PairSum*>(nullptr), static_cast<double*>(nullptr),
     out.data[0]);
  rows = Rows{0, kRows, kColumns, false, 1, {{kColumns, 1, 1}}, 8, (kColumns + 7) / 8, kRows};  // the first row again
  go("weighted_sum", weighted_sum<T, T, 1>, rows.tiles, rows, values.data[0], weights.data(), pairs.data(),
     partial.data(), out.data[0]);
}

template <typename T>
void run(size_t off) {
  run_lists<T, false>(off);
  run_hmc<T, false>(off);
  run_lists<T, true>(off);
  run_hmc<T, true>(off);
}

}  // namespace

int main() {
  for (const size_t off : {0, 3}) {
    run<float>(off);
    run<double>(off);
    run<BFloat16>(off);
    run<Float16>(off);
    run_rows<float, 1>(off);
    run_rows<double, 1>(off);
    run_rows<Float16, 1>(off);
    run<StochasticBFloat16>(off);
    run<StochasticFloat16>(off);
  }
  run_rows<float, kColumnLanes<float>>(0);
  run_rows<double, kColumnLanes<double>>(0);
  run_rows<BFloat16, kColumnLanes<BFloat16>>(0);
  if (failures == 0) std::printf("ok\n");
  return failures == 0 ? 0 : 1;
}
