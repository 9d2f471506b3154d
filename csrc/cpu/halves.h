// float16 blocks by the processor's own conversions, eight or sixteen at a time; elsewhere core/dtype.h's integers.
//
// Layout: a block is a multiple of 16 elements. Invariant: the bits of to_compute and from_compute for all 2^16 and all
// 2^32 of them: these instructions too keep subnormals whatever the processor flushes, and any NaN is stored as one.
#pragma once

#if defined(__AVX2__)
#include <immintrin.h>
#endif

#include "../core/dtype.h"

namespace tsam {
inline namespace TSAM_ISA {
namespace cpu_apply {

#if defined(__AVX512F__) && defined(__AVX512BW__) && defined(__AVX512VL__)
constexpr int kHalves = 16;
TSAM_HD void widen_halves(const Float16* from, float* to) {
  const __m256i halves = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from));
  _mm512_storeu_ps(to, _mm512_maskz_cvtph_ps(0xFFFF, halves));
}
TSAM_HD void narrow_halves(const float* from, Float16* to) {
  const __m512 x = _mm512_loadu_ps(from);
  const __m256i halves = _mm512_maskz_cvtps_ph(0xFFFF, x, _MM_FROUND_TO_NEAREST_INT);
  const __mmask16 nans = _mm512_cmp_ps_mask(x, x, _CMP_UNORD_Q);
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), _mm256_mask_mov_epi16(halves, nans, _mm256_set1_epi16(0x7E00)));
}
#elif defined(__F16C__) && defined(__AVX2__)
constexpr int kHalves = 8;
TSAM_HD void widen_halves(const Float16* from, float* to) {
  _mm256_storeu_ps(to, _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from))));
}
TSAM_HD void narrow_halves(const float* from, Float16* to) {
  const __m256 x = _mm256_loadu_ps(from);
  const __m128i halves = _mm256_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT);
  const __m256i nans = _mm256_castps_si256(_mm256_cmp_ps(x, x, _CMP_UNORD_Q));
  const __m128i narrow = _mm_packs_epi32(_mm256_castsi256_si128(nans), _mm256_extracti128_si256(nans, 1));
  _mm_storeu_si128(reinterpret_cast<__m128i*>(to), _mm_blendv_epi8(halves, _mm_set1_epi16(0x7E00), narrow));
}
#else
constexpr int kHalves = 1;
TSAM_HD void widen_halves(const Float16* from, float* to) { *to = to_compute(*from); }
TSAM_HD void narrow_halves(const float* from, Float16* to) { from_compute(*from, *to); }
#endif

}  // namespace cpu_apply
}  // namespace TSAM_ISA
}  // namespace tsam
