// Stores that go past the caches, so that what they overwrite is not read first: a third less traffic for a copy.
//
// Layout: whole 64-byte lines of the target past the caches, what lies before and behind them as memcpy does it.
// Invariant: bit for bit; who streams lines ends with streamed(), and then other threads see them.
#pragma once

#include <cstdint>
#include <cstring>
#include <type_traits>

#if defined(__SSE2__)
#include <immintrin.h>
#endif

#include "../core/macros.h"

namespace tsam {
inline namespace TSAM_ISA {
namespace cpu_apply {

constexpr int64_t kLine = 64;

#if defined(__AVX512F__)
inline void stream_line(char* to, const char* from) {
  _mm512_stream_si512(reinterpret_cast<__m512i*>(to), _mm512_loadu_si512(from));
}
#elif defined(__AVX2__)
inline void stream_line(char* to, const char* from) {
  for (int i = 0; i < kLine; i += 32)
    _mm256_stream_si256(reinterpret_cast<__m256i*>(to + i),
                        _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from + i)));
}
#elif defined(__SSE2__)
inline void stream_line(char* to, const char* from) {
  for (int i = 0; i < kLine; i += 16)
    _mm_stream_si128(reinterpret_cast<__m128i*>(to + i), _mm_loadu_si128(reinterpret_cast<const __m128i*>(from + i)));
}
#else
inline void stream_line(char* to, const char* from) { std::memcpy(to, from, kLine); }
#endif

// Whole lines.
inline void stream_lines(void* to, const void* from, int64_t bytes) {
  for (int64_t i = 0; i < bytes; i += kLine)
    stream_line(static_cast<char*>(to) + i, static_cast<const char*>(from) + i);
}

inline bool at_line(const void* place) { return reinterpret_cast<uintptr_t>(place) % kLine == 0; }

inline void streamed() {
#if defined(__SSE2__)
  _mm_sfence();
#endif
}

inline void copy_past_caches(void* target, const void* source, int64_t bytes) {
  char* to = static_cast<char*>(target);
  const char* from = static_cast<const char*>(source);
  int64_t head = static_cast<int64_t>(-reinterpret_cast<uintptr_t>(to) % kLine);
  if (head > bytes) head = bytes;
  std::memcpy(to, from, static_cast<size_t>(head));
  const int64_t lines = (bytes - head) / kLine * kLine, tail = head + lines;
  stream_lines(to + head, from + head, lines);
  std::memcpy(to + tail, from + tail, static_cast<size_t>(bytes - tail));
  streamed();
}

// One block as it is: whole blocks past the caches where `past_caches` and the place allow it.
template <int W, typename T, typename Count>
static void save_block(const T* from, Count count, T* to, bool past_caches) {
  if (std::is_same_v<Count, std::integral_constant<int, W>> && past_caches && at_line(to)) {
    stream_lines(to, from, W * static_cast<int64_t>(sizeof(T)));
  } else {
    for (int k = 0; k < count; ++k) to[k] = from[k];
  }
}

}  // namespace cpu_apply
}  // namespace TSAM_ISA
}  // namespace tsam
