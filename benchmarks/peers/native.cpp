// Kernels of the baselines. Sums over a history, as fast as it can be read:
//
// out[c, s] = sum over i < n of h[c, i] * r[c, i + s], s < K. One read of h and r serves K outputs: two neighbouring
// vectors of r are kept, and shifted in registers. Rows of r must have n + K - 1 values.
#include <cstdint>
#include <utility>
#ifdef __AVX512F__
#include <immintrin.h>
#endif

typedef float Vector __attribute__((vector_size(64)));
typedef float Unaligned __attribute__((vector_size(64), aligned(4)));
typedef int32_t Mask __attribute__((vector_size(64)));
constexpr int WIDTH = 16;

template <int S>
static inline Vector shifted(Vector low, Vector high) {
#ifdef __AVX512F__
  return (Vector)_mm512_alignr_epi32((__m512i)high, (__m512i)low, S);
#else
  const Mask m = {S, S + 1, S + 2, S + 3, S + 4, S + 5, S + 6, S + 7,
                  S + 8, S + 9, S + 10, S + 11, S + 12, S + 13, S + 14, S + 15};
  return __builtin_shuffle(low, high, m);
#endif
}

template <int... S>
static void sums(const float* h, const float* r, float* out, int64_t channels, int64_t n, int64_t stride_h,
                 int64_t stride_r, int threads, std::integer_sequence<int, S...>) {
  constexpr int K = sizeof...(S);
#pragma omp parallel for num_threads(threads)
  for (int64_t c = 0; c < channels; ++c) {
    const float *a = h + c * stride_h, *b = r + c * stride_r;
    Vector sum[K] = {};
    int64_t i = 0;
    if (n >= 2 * WIDTH) {
      Vector low = *(const Unaligned*)b;
      for (; i + 2 * WIDTH <= n; i += WIDTH) {
        const Vector x = *(const Unaligned*)(a + i), high = *(const Unaligned*)(b + i + WIDTH);
        ((sum[S] += x * shifted<S>(low, high)), ...);
        low = high;
      }
    }
    for (int s = 0; s < K; ++s) {
      float total = 0;
      for (int v = 0; v < WIDTH; ++v) total += sum[s][v];
      for (int64_t j = i; j < n; ++j) total += a[j] * b[j + s];
      out[c * K + s] = total;
    }
  }
}

#define OUTPUTS(K)                                                                                              \
  extern "C" void sums_##K(const float* h, const float* r, float* out, int64_t channels, int64_t n,           \
                           int64_t stride_h, int64_t stride_r, int threads) {                                   \
    sums(h, r, out, channels, n, stride_h, stride_r, threads, std::make_integer_sequence<int, K>());          \
  }
OUTPUTS(1)
OUTPUTS(8)
OUTPUTS(16)

// One step of a sum of N exponentials a channel: z = Re<R, x> + skip u, then x <- lambda x + u. All rows contiguous.
extern "C" void modal_step(float* re, float* im, const float* pole_re, const float* pole_im, const float* r_re,
                           const float* r_im, const float* skip, const float* u, float* z, int64_t channels, int64_t n,
                           int threads) {
#pragma omp parallel for num_threads(threads)
  for (int64_t c = 0; c < channels; ++c) {
    float *a = re + c * n, *b = im + c * n;
    const float *p = pole_re + c * n, *q = pole_im + c * n, *s = r_re + c * n, *t = r_im + c * n, input = u[c];
    float total = skip[c] * input;
    for (int64_t i = 0; i < n; ++i) {
      total += s[i] * a[i] - t[i] * b[i];
      const float x = p[i] * a[i] - q[i] * b[i] + input;
      b[i] = q[i] * a[i] + p[i] * b[i];
      a[i] = x;
    }
    z[c] = total;
  }
}
