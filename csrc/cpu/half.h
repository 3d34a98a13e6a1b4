// float16 to float32 and back with the processor's conversion, if it has one: in software the conversion takes longer
// than the rest of a kernel's work on a row.

#pragma once

#include <c10/util/Half.h>

#include <cstdint>

#include "cpu/isa.h"

#ifdef SAFE_KERNELS_AVX2
#include <immintrin.h>
#endif

namespace safe_kernels::cpu {

#ifdef SAFE_KERNELS_AVX2

// Converts whole vectors; returns the number of converted elements.
SAFE_KERNELS_AVX2 inline int64_t half_to_float_avx2(const c10::Half* from, int64_t count, float* to) {
  int64_t i = 0;
  for (; i + 8 <= count; i += 8)
    _mm256_storeu_ps(to + i, _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from + i))));
  return i;
}

SAFE_KERNELS_AVX2 inline int64_t float_to_half_avx2(const float* from, int64_t count, c10::Half* to) {
  int64_t i = 0;
  for (; i + 8 <= count; i += 8)
    _mm_storeu_si128(reinterpret_cast<__m128i*>(to + i),
                     _mm256_cvtps_ph(_mm256_loadu_ps(from + i), _MM_FROUND_TO_NEAREST_INT));
  return i;
}

#endif

inline void half_to_float(const c10::Half* from, int64_t count, float* to) {
  int64_t i = 0;
#ifdef SAFE_KERNELS_AVX2
  if (has_avx2()) i = half_to_float_avx2(from, count, to);
#endif
  for (; i < count; ++i) to[i] = static_cast<float>(from[i]);
}

inline void float_to_half(const float* from, int64_t count, c10::Half* to) {
  int64_t i = 0;
#ifdef SAFE_KERNELS_AVX2
  if (has_avx2()) i = float_to_half_avx2(from, count, to);
#endif
  for (; i < count; ++i) to[i] = static_cast<c10::Half>(from[i]);
}

}  // namespace safe_kernels::cpu
