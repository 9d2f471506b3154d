// The core on its own, without torch: published Philox vectors, the lane laws, conversions, the streaming tilt against
// long double, ChunkPlan. Prints one line a check and exits with the number of failures; digest lines are compared
// between instruction sets by tests/test_core.py.
#include <cinttypes>
#include <cmath>
#include <cstdio>
#include <cstring>
#include <vector>

#include "../../csrc/core/chunks.h"
#include "../../csrc/core/perturb.h"
#include "../../csrc/core/philox.h"
#include "../../csrc/core/spans.h"
#include "../../csrc/core/tilt.h"
#include "../../csrc/core/weights.h"
#include "../../csrc/cpu/lanes.h"

using namespace tsam;

static int failures = 0;

static void check(bool ok, const char* what) {
  std::printf("%s: %s\n", ok ? "ok" : "FAILED", what);
  failures += ok ? 0 : 1;
}

#include "conversions.h"
#include "sums.h"

static uint64_t digest(const void* data, size_t bytes) {
  uint64_t h = 1469598103934665603u;  // FNV-1a
  for (size_t i = 0; i < bytes; ++i) h = (h ^ static_cast<const unsigned char*>(data)[i]) * 1099511628211u;
  return h;
}

static void known_answers() {
  // Random123's kat_vectors file, philox4x32, 10 rounds.
  struct {
    uint32_t counter[4], key[2], expected[4];
  } const vectors[] = {
      {{0, 0, 0, 0}, {0, 0}, {0x6627e8d5, 0xe169c58d, 0xbc57ac4c, 0x9b00dbd8}},
      {{0xffffffff, 0xffffffff, 0xffffffff, 0xffffffff},
       {0xffffffff, 0xffffffff},
       {0x408f276d, 0x41c83b0e, 0xa20bc7c6, 0x6d5451fd}},
      {{0x243f6a88, 0x85a308d3, 0x13198a2e, 0x03707344},
       {0xa4093822, 0x299f31d0},
       {0xd16cfe09, 0x94fdcceb, 0x5001e420, 0x24126ea1}},
  };
  bool ok = true;
  for (const auto& v : vectors) {
    const uint64_t key = v.key[0] | static_cast<uint64_t>(v.key[1]) << 32;
    uint64_t x[4][1] = {{v.counter[0]}, {v.counter[1]}, {v.counter[2]}, {v.counter[3]}};
    philox_rounds<0, OneWord>(x, PhiloxKeys(key));
    for (int k = 0; k < 4; ++k) ok = ok && static_cast<uint32_t>(x[k][0]) == v.expected[k];
    const Stream stream{key, v.counter[2], v.counter[3]};
    uint32_t y[4][1];
    philox<1>(stream, v.counter[0] | static_cast<uint64_t>(v.counter[1]) << 32, y);
    for (int k = 0; k < 4; ++k) ok = ok && y[k][0] == v.expected[k];
  }
  check(ok, "Random123 known answers, as rounds and through the counter layout");
  const Stream s = make_stream(7, 9, kBallRadius, 5);
  check(s.word3 == (3u << 28 | 5u) && s.step == 9 && s.seed == 7, "word 3 is purpose << 28 | sample");
}

template <int W, typename Words = OneWord>
static std::vector<float> draw(const Stream& stream, uint64_t quad, int quads) {
  std::vector<float> z(static_cast<size_t>(4 * quads));
  for (int q = 0; q < quads; q += W) {
    float block[4 * W];
    normals<W, Words>(stream, quad + static_cast<uint64_t>(q), block);
    std::memcpy(&z[static_cast<size_t>(4 * q)], block, sizeof block);
  }
  return z;
}

// The uniform as defined: rounded to float32 once as x and once as u.
static double unit(uint32_t x) {
  return static_cast<double>(static_cast<float>((static_cast<double>(static_cast<float>(x)) + 0.5) * 0x1p-32));
}

static void noise() {
  const Stream stream = make_stream(0x123456789abcdef0u, 77, kPerturbation, 3);
  bool same = true, close = true;
  double worst = 0.0, largest = 0.0;
  // Quads around 2^32 cross a word of the counter.
  for (const uint64_t quad : {uint64_t{0}, uint64_t{4294967296u} - 32, uint64_t{1} << 50}) {
    const auto a = draw<1>(stream, quad, 2048), b = draw<8>(stream, quad, 2048),
               c = draw<32, cpu_apply::VectorWords>(stream, quad, 2048);
    same = same && std::memcmp(a.data(), b.data(), a.size() * 4) == 0 &&
           std::memcmp(a.data(), c.data(), a.size() * 4) == 0;
    std::printf("digest noise %" PRIu64 " %016" PRIx64 "\n", quad, digest(c.data(), c.size() * 4));
    for (size_t i = 0; i < a.size(); ++i) {
      uint32_t x[4][1];
      philox<1>(stream, quad + i / 4, x);
      const size_t pair = i % 4 / 2 * 2;
      const double u = unit(x[pair][0]), r = std::sqrt(-2.0 * std::log(u));
      const double angle = 2.0 * M_PI * static_cast<double>(x[pair + 1][0]) * 0x1p-32;
      const double exact = r * (i % 2 ? std::sin(angle) : std::cos(angle));
      worst = std::fmax(worst, std::fabs(a[i] - exact));
      largest = std::fmax(largest, std::fabs(static_cast<double>(a[i])));
    }
  }
  check(same, "the same bits for W = 1 and 8 and for 32 in vectors, also across 2^32 quads");
  std::printf("worst |z - exact| = %.3g, largest |z| = %.3g\n", worst, largest);
  close = worst < 1e-6;
  check(close, "float32 Box-Muller within 1e-6 of float64");

  // The whole range of the radius, its ends included: monotone up to rounding, bounded, and never NaN.
  double worst_radius = 0.0;
  for (uint64_t x = 0; x <= 0xffffffffu; x += 65521) {
    const double exact = std::sqrt(-2.0 * std::log(unit(static_cast<uint32_t>(x))));
    worst_radius = std::fmax(worst_radius, std::fabs(box_muller_radius(static_cast<uint32_t>(x)) - exact));
  }
  check(worst_radius < 1e-6, "radius within 1e-6 over its range");
  check(std::fabs(box_muller_radius(0) - std::sqrt(66.0 * std::log(2.0))) < 1e-6, "largest |z| is sqrt(66 ln 2)");
  check(box_muller_radius(0xffffffffu) == 0.0f, "u = 1 gives radius 0");
  float c = 0, s = 0;
  bool corners = true;
  for (uint32_t quarter = 0; quarter < 4; ++quarter) {
    box_muller_direction(quarter << 30, c, s);
    const int ec[4] = {1, 0, -1, 0}, es[4] = {0, 1, 0, -1};
    corners = corners && c == static_cast<float>(ec[quarter]) && s == static_cast<float>(es[quarter]);
  }
  check(corners, "quarter turns are exact");
}

// Four or eight signs at a time, from every multiple of 4 in two blocks, also across 2^32 blocks.
static void signs() {
  bool ok = true;
  const Stream stream = make_stream(0x123456789abcdef0u, 77, kSigns, 3);
  const uint64_t first = (uint64_t{1} << 39) - kSignsPerBlock;
  for (uint64_t at = first; at < first + 2 * kSignsPerBlock - 8; at += 4) {
    float four[4], eight[8];
    normals_or_signs<1>(stream, at, four);
    normals_or_signs<2>(stream, at, eight);
    for (uint64_t k = 0; k < 8; ++k) {
      uint32_t x[4][1];
      philox<1>(stream, (at + k) / 128, x);
      const float sign = x[(at + k) % 128 / 32][0] >> (at + k) % 32 & 1 ? -1.0f : 1.0f;
      ok = ok && eight[k] == sign && (k >= 4 || four[k] == sign);
    }
  }
  check(ok, "sign e is bit e mod 32 of word (e mod 128) / 32 of block e / 128");
}

// Streaming against softmax in long double, one element of gradient per sample.
static void streaming() {
  const double tilts[] = {-INFINITY, -20, 0, 1e-8, 1, 20, 1e4, INFINITY};
  const double scales[] = {1e-8, 1e-3, 1, 1e4, 1e8};
  double worst = 0.0, worst_ess = 0.0;
  for (const double tilt : tilts)
    for (const double scale : scales)
      for (int seed = 0; seed < 50; ++seed) {
        constexpr int s = 7;
        double loss[s], size[s], grad[s], state[kHeader + kRow * s];
        const Stream stream = make_stream(static_cast<uint64_t>(seed), 0, kPerturbation, 0);
        float z[32];
        normals<8>(stream, 0, z);
        for (int j = 0; j < s; ++j) {
          loss[j] = scale * (seed % 3 == 0 ? std::round(z[j]) : z[j]);  // every third run has ties
          size[j] = seed % 2 ? 1.0 + j % 3 : 1.0;
          grad[j] = z[8 + j] * std::pow(10.0, static_cast<int>(8 * z[16 + j]) % 8);
        }
        tilt_begin(state, tilt, kHeader + kRow * s);
        double a = NAN;  // may hold anything before
        for (int j = 0; j < s; ++j) {
          tilt_update(state, loss[j], std::log(size[j]), false, j == s - 1);
          const int action = static_cast<int>(state[kAction]);
          if (action == kAssign) a = grad[j];
          if (action == kBlend) a = std::fma(state[kAdd], grad[j], state[kKeep] * a);
        }
        long double best = -INFINITY, sum = 0, squares = 0, mean = 0, absolute = 0, w[s];
        const long double t = std::isinf(tilt) ? (tilt > 0 ? 1 : -1) : static_cast<long double>(tilt);
        for (int j = 0; j < s; ++j) best = std::fmax(best, t * loss[j]);
        for (int j = 0; j < s; ++j) {
          w[j] = std::isinf(tilt) ? (t * loss[j] == best ? 1.0L : 0.0L) : std::exp(t * loss[j] - best);
          w[j] *= size[j];
          sum += w[j];
          squares += w[j] * w[j];
        }
        for (int j = 0; j < s; ++j) {
          mean += w[j] / sum * grad[j];
          absolute += w[j] / sum * std::fabs(static_cast<long double>(grad[j]));
        }
        // A float64 exponent of size |t L| carries |t L| 2^-53 of rounding; beyond that streaming is exact to 1e-12.
        const double exponent = std::isinf(tilt) ? 0.0 : std::fabs(tilt) * scale * 8;
        const double allowed = 1e-12 + exponent * 2.3e-16;
        worst = std::fmax(worst, static_cast<double>(std::fabs(a - mean) / absolute) / allowed);
        const double ess = state[kSum] * state[kSum] / state[kSumSquares];
        worst_ess = std::fmax(worst_ess, std::fabs(ess - static_cast<double>(sum * sum / squares)) / ess / allowed);
      }
  std::printf("streaming: worst error over tolerance %.3g, ESS %.3g\n", worst, worst_ess);
  check(worst < 1.0 && worst_ess < 4.0, "streaming equals batch softmax for every tilt and scale");

  double state[kHeader + 4 * kRow];
  tilt_begin(state, 1.0, kHeader + 4 * kRow);
  tilt_update(state, NAN, 0, true, false);
  const bool skipped = state[kAction] == kSkip && state[kNonfinite] == 1.0;
  tilt_update(state, 2.0, 0, true, false);
  const bool assigned = state[kAction] == kAssign;
  tilt_update(state, INFINITY, 0, false, false);
  const bool poisoned = state[kAction] == kPoison;
  tilt_update(state, 1.0, 0, false, true);
  check(skipped && assigned && poisoned && state[kAction] == kPoison && is_nan(state[kAdd]),
        "non-finite losses: skipped samples count as never seen, others make the result NaN for good");
  tilt_begin(state, 1.0, kHeader + 4 * kRow);
  tilt_update(state, NAN, 0, true, true);
  check(state[kAction] == kPoison, "a step whose samples were all skipped is NaN");
}

static void values() {
  const double losses[] = {1.0, 1.5, 0.25}, third[] = {1.0 / 3, 1.0 / 3, 1.0 / 3};
  const double mean = 2.75 / 3, variance = (1.0 + 2.25 + 0.0625) / 3 - mean * mean;
  bool ok = true;
  for (const double t : {1e-8, 1e-6, -1e-7})
    ok = ok && std::fabs((tilted_value(losses, third, 3, t) - mean) / (t / 2) - variance) < 1e-5 + 1e-15 / std::fabs(t);
  check(ok, "small t: mean + (t/2) variance, all digits");
  check(tilted_value(losses, third, 3, 0) == mean_loss(losses, third, 3) &&
            tilted_value(losses, third, 3, INFINITY) == 1.5 && tilted_value(losses, third, 3, -INFINITY) == 0.25,
        "t = 0, inf and -inf");
  double continuity = 0;
  for (double t = 0.05; t < 4; t *= 1.01) {
    long double sum = 0;
    for (const double l : losses) sum += std::exp(static_cast<long double>(t) * l) / 3;
    continuity =
        std::fmax(continuity, std::fabs(tilted_value(losses, third, 3, t) - static_cast<double>(std::log(sum) / t)));
  }
  check(continuity < 1e-14, "both forms of the value agree with long double");
  const double equal[] = {INFINITY, INFINITY, 0.0};
  double w[3];
  tilted_softmax(equal, third, 3, 1.0, w);
  check(w[0] == 0.5 && w[1] == 0.5 && w[2] == 0.0, "infinite losses share the weight");
}

static void chunks() {
  const std::vector<int64_t> sizes = {0, 1, 65536, 0, 65537, 7, 200000, 0};
  bool ok = true;
  for (const int64_t size : {int64_t{4}, int64_t{1000}, kChunk}) {
    const ChunkPlan plan(sizes, size);
    std::vector<std::vector<int>> seen;
    for (const int64_t n : sizes) seen.emplace_back(static_cast<size_t>(n), 0);
    for (const int64_t parts : {1, 2, 3, 64}) {
      for (auto& s : seen) std::fill(s.begin(), s.end(), 0);
      int64_t largest = 0;
      for (int64_t p = 0; p < parts; ++p) {
        int64_t elements = 0;
        const int64_t begin = plan.part_begin(p, parts), end = plan.part_begin(p + 1, parts);
        int64_t next = begin;
        plan.walk(begin, end, [&](int64_t c, const Chunk& chunk) {
          const Chunk found = plan[c];
          ok = ok && c == next++ && found.tensor == chunk.tensor && found.offset == chunk.offset;
          ok = ok && found.length == chunk.length && chunk.length > 0 && chunk.length <= size;
          ok = ok && chunk.offset % size == 0;
          elements += chunk.length;
          for (int64_t i = 0; i < chunk.length; ++i)
            ++seen[static_cast<size_t>(chunk.tensor)][static_cast<size_t>(chunk.offset + i)];
        });
        ok = ok && next == (begin < end ? end : begin);
        largest = elements > largest ? elements : largest;
      }
      ok = ok && largest <= plan.num_elements() / parts + 2 * size;
      for (const auto& s : seen)
        for (const int count : s) ok = ok && count == 1;
    }
  }
  check(ok, "ChunkPlan: every element in exactly one chunk and one part, parts even");
  const ChunkPlan none({});
  check(none.num_chunks() == 0 && none.part_begin(1, 2) == 0, "an empty list has no chunks");
}

// Against every pair: lists that one memory sees one after the other, each the last one with a single end moved.
static void spans() {
  const std::vector<char> bytes(1000);
  const auto at = [&](uint32_t i) { return bytes.data() + i; };
  bool ok = true;
  int apart = 0, overlapping = 0;
  uint32_t random = 1;
  const auto below = [&](uint32_t n) { return (random = random * 1664525u + 1013904223u) / 65536u % n; };
  SpanMemory memory;
  std::vector<Span> list;
  for (int turn = 0; turn < 3000; ++turn) {
    if (turn % 10 == 0) {
      list.clear();
      for (uint32_t i = 0; i < 12; ++i) {
        const uint32_t begin = 80 * (11 * i % 12) + below(15);
        list.push_back({at(begin), at(begin + below(4) * 20)});
      }
    } else {
      Span& moved = list[below(12)];
      moved.end = moved.begin + below(100) % static_cast<uint32_t>(bytes.data() + bytes.size() - moved.begin);
    }
    bool expected = false;
    for (size_t i = 0; i < list.size(); ++i)
      for (size_t j = 0; j < i; ++j)
        expected = expected || (list[i].begin < list[j].end && list[j].begin < list[i].end &&
                                list[i].begin != list[i].end && list[j].begin != list[j].end);
    for (int again = 0; again < 2; ++again) {
      const Overlap got = memory.look(list);
      ok = ok && got.found == expected;
      if (got.found) {
        const Span &a = list[got.first], &b = list[got.second];
        ok = ok && got.first < got.second && a.begin < b.end && b.begin < a.end;
      }
    }
    ++(expected ? overlapping : apart);
  }
  check(ok && apart > 300 && overlapping > 300, "SpanMemory: finds an overlap wherever one of all pairs has one");
}

static void moves() {
  const Perturb<float> perturb{0.5f, true};
  const float origin[2] = {-2.0f, 0.0f}, z[2] = {1.0f, 3.0f};
  float out[2];
  perturb(origin, z, out);
  const Ascend<float> ascend{2.0f, true};
  const float grad[2] = {1.0f, 5.0f};
  float position[2] = {1.0f, 1.0f};
  ascend(origin, grad, position);
  check(out[0] == -1.0f && out[1] == 0.0f && position[0] == 9.0f && position[1] == 1.0f,
        "adaptive: noise scales by |theta_0|, ascent by its square, a zero parameter never moves");
  check(ascent_scale(0.1, 0.0) == 0.0 && ascent_scale(0.1, 2.0) == 0.05, "no ascent at a zero gradient");
  const Stream stream = make_stream(1, 0, kBallRadius, 0);
  check(noise_scale(kNoises[0], 16, 0, stream) == 0.25 && noise_scale(kNoises[1], 16, 4.0, stream) == 0.5 &&
            std::fabs(noise_scale(kNoises[2], 2, 4.0, stream) - 0.5 * std::sqrt(scalar_uniform(stream))) < 1e-16,
        "noise scales");
  check(noise_scale(kNoises[3], 16, 0, stream) == 0.25, "signs have the norm sqrt(d)");
}

int main() {
  known_answers();
  noise();
  signs();
  conversions();
  halves();
  streaming();
  values();
  chunks();
  spans();
  moves();
  sums();
  units();
  displacements();
  row_means();
  std::printf("%d failures\n", failures);
  return failures;
}
