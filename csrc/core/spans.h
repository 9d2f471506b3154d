// Whether stretches of memory overlap: sorted by where they begin, each must end before the next begins.
//
// Layout: a Span is a first byte and the byte after the last; an Overlap names two spans by their places in the list.
// Invariant: lists found to be apart are remembered byte for byte (kRemembered a thread), and only an equal list skips
// the sort. A training step asks about the same memory again and again; the memory of addresses holds no tensor.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <utility>
#include <vector>

namespace tsam {

struct Span {
  const char *begin, *end;
};

struct Overlap {
  bool found;
  size_t first, second;  // in the order of the list
};

class SpanMemory {
 public:
  static constexpr size_t kRemembered = 8;

  Overlap look(const std::vector<Span>& spans) {
    for (const std::vector<Span>& apart : known_)
      if (apart.size() == spans.size() && !spans.empty() &&
          std::memcmp(apart.data(), spans.data(), spans.size() * sizeof(Span)) == 0)
        return {false, 0, 0};
    const Overlap overlap = search(spans);
    if (!overlap.found) {
      known_[next_] = spans;
      next_ = (next_ + 1) % kRemembered;
    }
    return overlap;
  }

 private:
  static Overlap search(const std::vector<Span>& spans) {
    std::vector<std::pair<const char*, size_t>> order;
    order.reserve(spans.size());
    for (size_t i = 0; i < spans.size(); ++i)
      if (spans[i].begin != spans[i].end) order.emplace_back(spans[i].begin, i);
    std::sort(order.begin(), order.end());
    for (size_t k = 1; k < order.size(); ++k) {
      const size_t before = order[k - 1].second, after = order[k].second;
      if (spans[after].begin < spans[before].end) return {true, std::min(before, after), std::max(before, after)};
    }
    return {false, 0, 0};
  }

  std::vector<Span> known_[kRemembered];
  size_t next_ = 0;
};

}  // namespace tsam
