// Dropout from Philox4x32-7 (Salmon et al. 2011): an element's bits depend on its row, its column and the seed, so
// backward recomputes the mask instead of keeping it. The definition is in safe_kernels/reference/philox.py.

#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>

#include "cpu/isa.h"

#ifdef SAFE_KERNELS_AVX2
#include <immintrin.h>
#endif

namespace safe_kernels::cpu {

struct Dropout {
  uint64_t seed = 0;
  uint64_t offset = 0;
  int32_t threshold = 0;  // drop if an element's 16 bits are below it; 0 keeps everything
  double scale = 1.0;

  Dropout() = default;
  Dropout(double p, int64_t seed, int64_t offset)
      : seed(static_cast<uint64_t>(seed)),
        offset(static_cast<uint64_t>(offset)),
        threshold(threshold_of(p)),
        scale(p >= 1.0 ? 0.0 : kSteps / (kSteps - threshold)) {}

 private:
  static constexpr double kSteps = 65536.0;

  // Only p = 1 drops everything: a smaller p keeps the expectation.
  static int32_t threshold_of(double p) {
    return p >= 1.0 ? 65536 : static_cast<int32_t>(std::min(std::nearbyint(p * kSteps), kSteps - 1.0));
  }
};

constexpr uint32_t kMultiplier0 = 0xD2511F53, kMultiplier1 = 0xCD9E8D57;
constexpr uint32_t kKeyStep0 = 0x9E3779B9, kKeyStep1 = 0xBB67AE85;
constexpr int kRounds = 7;  // the fewest that pass the paper's tests (BigCrush); its default is 10
constexpr int64_t kColumnsPerCounter = 8, kColumnsAtOnce = 64;

// 16 bits for each column of one row; the size of `bits` is a multiple of kColumnsAtOnce.
inline void philox_row_baseline(const Dropout& dropout, uint32_t row, int64_t columns, uint16_t* bits) {
  for (int64_t group = 0; group * kColumnsPerCounter < columns; ++group) {
    uint32_t c0 = static_cast<uint32_t>(group), c1 = row;
    uint32_t c2 = static_cast<uint32_t>(dropout.offset), c3 = static_cast<uint32_t>(dropout.offset >> 32);
    uint32_t k0 = static_cast<uint32_t>(dropout.seed), k1 = static_cast<uint32_t>(dropout.seed >> 32);
    for (int round = 0; round < kRounds; ++round, k0 += kKeyStep0, k1 += kKeyStep1) {
      const uint64_t p0 = uint64_t{kMultiplier0} * c0, p1 = uint64_t{kMultiplier1} * c2;
      c0 = static_cast<uint32_t>(p1 >> 32) ^ c1 ^ k0;
      c1 = static_cast<uint32_t>(p1);
      c2 = static_cast<uint32_t>(p0 >> 32) ^ c3 ^ k1;
      c3 = static_cast<uint32_t>(p0);
    }
    for (const uint32_t word : {c0, c1, c2, c3}) {
      *bits++ = static_cast<uint16_t>(word);
      *bits++ = static_cast<uint16_t>(word >> 16);
    }
  }
}

#ifdef SAFE_KERNELS_AVX2

// Four counters per vector, one in each 64-bit lane, so that both halves of a product stay in its lane. The
// multiplication reads only the lower half of a lane, so the upper half may contain anything.
SAFE_KERNELS_AVX2 inline void philox_row_avx2(const Dropout& dropout, uint32_t row, int64_t columns, uint16_t* bits) {
  const __m256i m0 = _mm256_set1_epi64x(kMultiplier0), m1 = _mm256_set1_epi64x(kMultiplier1);
  for (int64_t j = 0; j < columns; j += kColumnsAtOnce, bits += kColumnsAtOnce) {
    __m256i c0[2], c1[2], c2[2], c3[2];
#pragma GCC unroll 2
    for (int v = 0; v < 2; ++v) {
      c0[v] = _mm256_add_epi64(_mm256_set1_epi64x(j / kColumnsPerCounter + 4 * v), _mm256_set_epi64x(3, 2, 1, 0));
      c1[v] = _mm256_set1_epi64x(row);
      c2[v] = _mm256_set1_epi64x(static_cast<uint32_t>(dropout.offset));
      c3[v] = _mm256_set1_epi64x(static_cast<uint32_t>(dropout.offset >> 32));
    }
    uint32_t k0 = static_cast<uint32_t>(dropout.seed), k1 = static_cast<uint32_t>(dropout.seed >> 32);
#pragma GCC unroll 7
    for (int round = 0; round < kRounds; ++round, k0 += kKeyStep0, k1 += kKeyStep1) {
      const __m256i key0 = _mm256_set1_epi64x(k0), key1 = _mm256_set1_epi64x(k1);
#pragma GCC unroll 2
      for (int v = 0; v < 2; ++v) {
        const __m256i p0 = _mm256_mul_epu32(c0[v], m0), p1 = _mm256_mul_epu32(c2[v], m1);
        c0[v] = _mm256_xor_si256(_mm256_xor_si256(_mm256_srli_epi64(p1, 32), c1[v]), key0);
        c1[v] = p1;
        c2[v] = _mm256_xor_si256(_mm256_xor_si256(_mm256_srli_epi64(p0, 32), c3[v]), key1);
        c3[v] = p0;
      }
    }
#pragma GCC unroll 2
    for (int v = 0; v < 2; ++v) {
      const __m256i w01 = _mm256_blend_epi32(c0[v], _mm256_slli_epi64(c1[v], 32), 0xAA);
      const __m256i w23 = _mm256_blend_epi32(c2[v], _mm256_slli_epi64(c3[v], 32), 0xAA);
      const __m256i even = _mm256_unpacklo_epi64(w01, w23), odd = _mm256_unpackhi_epi64(w01, w23);
      __m256i* target = reinterpret_cast<__m256i*>(bits + 32 * v);
      _mm256_storeu_si256(target, _mm256_permute2x128_si256(even, odd, 0x20));
      _mm256_storeu_si256(target + 1, _mm256_permute2x128_si256(even, odd, 0x31));
    }
  }
}

#endif

inline void philox_row(const Dropout& dropout, uint32_t row, int64_t columns, uint16_t* bits) {
#ifdef SAFE_KERNELS_AVX2
  if (has_avx2()) return philox_row_avx2(dropout, row, columns, bits);
#endif
  philox_row_baseline(dropout, row, columns, bits);
}

// factor[j] = dropout's factor for column j of `row`: 0 or 1 / (1 - p).
template <typename T>
SAFE_KERNELS_INLINE void dropout_factors(const Dropout& dropout, int64_t row, int64_t columns, uint16_t* bits,
                                         T* factor) {
  philox_row(dropout, static_cast<uint32_t>(row), columns, bits);
  const T scale = static_cast<T>(dropout.scale);
  for (int64_t j = 0; j < columns; ++j) factor[j] = bits[j] < dropout.threshold ? T(0) : scale;
}

}  // namespace safe_kernels::cpu
