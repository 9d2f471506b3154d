// How fast this machine's memory is: copy a = b, triad a = b + s c, in-place add a += b and read, the sum of c^2, on
// arrays that no cache holds.
//
// Layout: float32 arrays of n elements, each thread owns one contiguous part, touches it first and streams over it.
// Stores go past the caches where the instruction set has such stores, so that copy moves 2 words per element, triad 3,
// add 3 and nothing is read only to be overwritten; read moves 1. What walks memory fastest when nothing is written
// differs: read goes through 1, 2, 4 and 8 places of a part at once, and the shortest time of these is the run's.
// Invariant: every array is checked after its last run, and every sum.
// Built when it is needed by bench/floor.py: g++ -O3 -march=native -shared -fPIC -pthread.
#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstddef>
#include <cstdlib>
#include <cstring>
#include <thread>
#include <vector>

#if defined(__SSE2__)
#include <immintrin.h>
#endif

namespace {

#if defined(__AVX512F__)
constexpr const char* kStores = "non-temporal, AVX-512";
using Vector = __m512;
Vector load(const float* p) { return _mm512_load_ps(p); }
Vector all(float s) { return _mm512_set1_ps(s); }
Vector add(Vector x, Vector y) { return _mm512_add_ps(x, y); }
Vector mul(Vector x, Vector y) { return _mm512_mul_ps(x, y); }
void stream(float* p, Vector x) { _mm512_stream_ps(p, x); }
void fence() { _mm_sfence(); }
#elif defined(__AVX2__)
constexpr const char* kStores = "non-temporal, AVX2";
using Vector = __m256;
Vector load(const float* p) { return _mm256_load_ps(p); }
Vector all(float s) { return _mm256_set1_ps(s); }
Vector add(Vector x, Vector y) { return _mm256_add_ps(x, y); }
Vector mul(Vector x, Vector y) { return _mm256_mul_ps(x, y); }
void stream(float* p, Vector x) { _mm256_stream_ps(p, x); }
void fence() { _mm_sfence(); }
#elif defined(__SSE2__)
constexpr const char* kStores = "non-temporal, SSE";
using Vector = __m128;
Vector load(const float* p) { return _mm_load_ps(p); }
Vector all(float s) { return _mm_set1_ps(s); }
Vector add(Vector x, Vector y) { return _mm_add_ps(x, y); }
Vector mul(Vector x, Vector y) { return _mm_mul_ps(x, y); }
void stream(float* p, Vector x) { _mm_stream_ps(p, x); }
void fence() { _mm_sfence(); }
#else
constexpr const char* kStores = "plain: no non-temporal stores here, the bandwidth is a lower estimate";
using Vector = float;
Vector load(const float* p) { return *p; }
Vector all(float s) { return s; }
Vector add(Vector x, Vector y) { return x + y; }
Vector mul(Vector x, Vector y) { return x * y; }
void stream(float* p, Vector x) { *p = x; }
void fence() {}
#endif

constexpr size_t kLanes = sizeof(Vector) / sizeof(float);
constexpr size_t kAlignment = 64;
constexpr float kScale = 0.5f;

enum Kernel : int { kCopy = 0, kTriad = 1, kAdd = 2, kRead = 3, kKernels = 4 };
constexpr int kShapes = 4;       // of read: 1, 2, 4 and 8 streams
constexpr size_t kBlock = 4096;  // vectors whose squares one float32 lane adds up exactly

double lanes_of(Vector x) {
  float lanes[kLanes];
  std::memcpy(lanes, &x, sizeof x);
  double total = 0.0;
  for (float lane : lanes) total += lane;
  return total;
}

template <size_t Streams>
double sum_squares(const float* p, size_t vectors) {
  const size_t part = vectors / Streams;
  double total = 0.0;
  for (size_t i = 0; i < part; i += kBlock) {
    Vector sums[Streams];
    for (Vector& sum : sums) sum = all(0.0f);
    for (size_t k = i; k < std::min(part, i + kBlock); ++k)
      for (size_t s = 0; s < Streams; ++s) {
        const Vector x = load(p + (s * part + k) * kLanes);
        sums[s] = add(sums[s], mul(x, x));
      }
    for (const Vector& sum : sums) total += lanes_of(sum);
  }
  for (size_t k = Streams * part; k < vectors; ++k) {
    const Vector x = load(p + k * kLanes);
    total += lanes_of(mul(x, x));
  }
  return total;
}

double read(int shape, const float* c, size_t begin, size_t end) {
  const size_t vectors = (end - begin) / kLanes;
  return shape == 0   ? sum_squares<1>(c + begin, vectors)
         : shape == 1 ? sum_squares<2>(c + begin, vectors)
         : shape == 2 ? sum_squares<4>(c + begin, vectors)
                      : sum_squares<8>(c + begin, vectors);
}

void run(int kernel, float* a, const float* b, const float* c, size_t begin, size_t end) {
  const Vector s = all(kScale);
  if (kernel == kCopy) {
    for (size_t i = begin; i < end; i += kLanes) stream(a + i, load(b + i));
  } else if (kernel == kTriad) {
    for (size_t i = begin; i < end; i += kLanes) stream(a + i, add(load(b + i), mul(s, load(c + i))));
  } else {
    for (size_t i = begin; i < end; i += kLanes) stream(a + i, add(load(a + i), load(b + i)));
  }
  fence();
}

// What kernel makes of a, b, c in exact small numbers.
float expected(int kernel, float a, float b, float c) {
  return kernel == kCopy ? b : kernel == kTriad ? b + kScale * c : kernel == kAdd ? a + b : a;
}

// All threads arrive before any leaves. Spins, politely: there may be more threads than idle cores.
class Barrier {
 public:
  explicit Barrier(int threads) : threads_(threads) {}
  void wait() {
    const int round = round_.load();
    if (arrived_.fetch_add(1) + 1 == threads_) {
      arrived_.store(0);
      round_.fetch_add(1);
    } else {
      while (round_.load() == round) std::this_thread::yield();
    }
  }

 private:
  const int threads_;
  std::atomic<int> arrived_{0}, round_{0};
};

struct Free {
  float* data;
  ~Free() { std::free(data); }
};

}  // namespace

extern "C" {

// The kind of stores that this build uses.
const char* floor_stores() { return kStores; }

// seconds[kernel * repeats + r] of run r of each kernel, in the order of Kernel. n: a multiple of 16 elements.
// Returns 0, 1 if there is no memory for three arrays, 2 if a result is wrong, 3 if an argument is.
int floor_measure(size_t n, int threads, int repeats, double* seconds) {
  if (threads < 1 || repeats < 1 || n == 0 || n % (kAlignment / sizeof(float)) != 0) return 3;
  const size_t bytes = n * sizeof(float);
  const Free a{static_cast<float*>(std::aligned_alloc(kAlignment, bytes))};
  const Free b{static_cast<float*>(std::aligned_alloc(kAlignment, bytes))};
  const Free c{static_cast<float*>(std::aligned_alloc(kAlignment, bytes))};
  if (!a.data || !b.data || !c.data) return 1;

  Barrier barrier(threads);
  std::atomic<bool> right{true};
  const auto work = [&](int thread) {
    const size_t grain = kAlignment / sizeof(float), blocks = n / grain;
    const auto border = [&](int t) { return blocks * static_cast<size_t>(t) / static_cast<size_t>(threads) * grain; };
    const size_t begin = border(thread), end = border(thread + 1);
    double sums[kShapes] = {};
    for (int kernel = 0; kernel < kKernels; ++kernel) {
      for (size_t i = begin; i < end; ++i) {
        a.data[i] = 1.0f;
        b.data[i] = static_cast<float>(i % 64);
        c.data[i] = static_cast<float>(i % 61);  // no period that parts and vectors share
      }
      for (int r = 0; r < repeats; ++r) {
        for (int shape = 0; shape < (kernel == kRead ? kShapes : 1); ++shape) {
          barrier.wait();
          const auto start = std::chrono::steady_clock::now();
          barrier.wait();
          if (kernel == kRead)
            sums[shape] = read(shape, c.data, begin, end);
          else
            run(kernel, a.data, b.data, c.data, begin, end);
          barrier.wait();
          const std::chrono::duration<double> passed = std::chrono::steady_clock::now() - start;
          double& kept = seconds[kernel * repeats + r];
          if (thread == 0) kept = shape == 0 ? passed.count() : std::min(kept, passed.count());
        }
      }
      double squares = 0.0;
      for (size_t i = begin; i < end; ++i) {
        // Only add reads what it wrote, once per run; the sums stay exact for some ten thousand runs.
        float want = expected(kernel, 1.0f, b.data[i], c.data[i]);
        if (kernel == kAdd) want = 1.0f + static_cast<float>(repeats) * b.data[i];
        if (a.data[i] != want) right = false;
        squares += static_cast<double>(c.data[i]) * static_cast<double>(c.data[i]);
      }
      if (kernel == kRead && std::any_of(sums, sums + kShapes, [&](double sum) { return sum != squares; }))
        right = false;
    }
  };
  std::vector<std::thread> others;
  for (int t = 1; t < threads; ++t) others.emplace_back(work, t);
  work(0);
  for (std::thread& other : others) other.join();
  return right ? 0 : 2;
}
}
