// Compiles a function for the platform's baseline and, on x86-64, also for AVX2, and picks one at run time. So the
// package is portable, and as fast as if it were built for the machine.

#pragma once

#define SAFE_KERNELS_INLINE inline __attribute__((always_inline))

#if defined(__x86_64__) && !defined(SAFE_KERNELS_BASELINE)

#define SAFE_KERNELS_AVX2 __attribute__((target("avx2,fma,f16c")))

namespace safe_kernels::cpu {

inline bool has_avx2() {
  static const bool answer =
      __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
  return answer;
}

}  // namespace safe_kernels::cpu

// Defines `name(const Args&, begin, end)`, which runs the always-inline `body` in the best variant.
#define SAFE_KERNELS_VARIANTS(name, body, Args)                                                                \
  SAFE_KERNELS_AVX2 void name##_avx2(const Args& args, int64_t begin, int64_t end) { body(args, begin, end); } \
  void name##_baseline(const Args& args, int64_t begin, int64_t end) { body(args, begin, end); }               \
  void name(const Args& args, int64_t begin, int64_t end) {                                                    \
    if (has_avx2()) return name##_avx2(args, begin, end);                                                      \
    name##_baseline(args, begin, end);                                                                         \
  }

#else

#define SAFE_KERNELS_VARIANTS(name, body, Args) \
  void name(const Args& args, int64_t begin, int64_t end) { body(args, begin, end); }

#endif

// The same for templates: `body` with Args<float> and Args<double>.
#define SAFE_KERNELS_REAL_VARIANTS(name, body, Args) \
  SAFE_KERNELS_VARIANTS(name, body, Args<float>)     \
  SAFE_KERNELS_VARIANTS(name, body, Args<double>)
