// A product with few rows on one side, as a step of a batch has: out [m, n] = x [m, k] · weight [n, k]ᵀ + bias [n].
//
// All it costs should be to read the weight once. A BLAS copies the weight into its own layout first, which for few
// rows takes longer than the product. Here a tile of the output is summed in registers, along k, for M rows of x by R
// rows of the weight, where both lie as they are.
#include <cstdint>
#include <cstring>

#if defined(__AVX512F__)
constexpr int kVectorBytes = 64, kAccumulators = 24;  // of 32 registers
#else
constexpr int kVectorBytes = 32, kAccumulators = 10;  // of 16
#endif
constexpr int64_t kMostAtOnce = 8;             // rows of x
constexpr int64_t kWorthAThread = int64_t(1) << 17;  // multiplications

template <typename T, int M, int R>
inline __attribute__((always_inline)) void skinny_tile(
    const T* x, int64_t x_row, const T* weight, int64_t weight_row, int64_t k, T (&sums)[R][M]) {
  typedef T Vector __attribute__((vector_size(kVectorBytes)));
  constexpr int lanes = kVectorBytes / sizeof(T);
  Vector partial[R][M] = {};
  int64_t i = 0;
  for (; i + lanes <= k; i += lanes) {
    Vector w[R];
#pragma GCC unroll 32
    for (int r = 0; r < R; ++r) {
      std::memcpy(&w[r], weight + r * weight_row + i, sizeof(Vector));
      __builtin_prefetch(weight + (R + r) * weight_row + i);  // of the next tile: rows are too short a stream to foresee
    }
#pragma GCC unroll 32
    for (int m = 0; m < M; ++m) {
      Vector v;
      std::memcpy(&v, x + m * x_row + i, sizeof(Vector));
#pragma GCC unroll 32
      for (int r = 0; r < R; ++r) partial[r][m] += w[r] * v;
    }
  }
#pragma GCC unroll 32
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 32
    for (int m = 0; m < M; ++m) {
      T sum = 0;
#pragma GCC unroll 32
      for (int lane = 0; lane < lanes; ++lane) sum += partial[r][m][lane];
      for (int64_t rest = i; rest < k; ++rest) sum += weight[r * weight_row + rest] * x[m * x_row + rest];
      sums[r][m] = sum;
    }
}

template <typename T, int M, int R>
inline void skinny_rows(const T* x, int64_t x_row, const T* weight, int64_t weight_row, const T* bias, T* out,
                        int64_t out_row, int64_t k) {
  T sums[R][M];
  skinny_tile<T, M, R>(x, x_row, weight, weight_row, k, sums);
  for (int m = 0; m < M; ++m)
    for (int r = 0; r < R; ++r) out[m * out_row + r] = bias ? sums[r][m] + bias[r] : sums[r][m];
}

// M rows of x, at most kMostAtOnce; every tensor's last axis is contiguous, *_row is the distance of its rows.
template <typename T, int M>
void skinny_gemm_at_once(const T* x, int64_t x_row, const T* weight, int64_t weight_row, const T* bias, T* out,
                         int64_t out_row, int64_t n, int64_t k, int threads) {
  constexpr int R = kAccumulators / M < 1 ? 1 : kAccumulators / M > 8 ? 8 : kAccumulators / M;
  const int64_t whole = n / R;
#pragma omp parallel for num_threads(threads) if (threads > 1 && M * n * k >= kWorthAThread)
  for (int64_t tile = 0; tile < whole; ++tile) {
    const int64_t j = tile * R;
    skinny_rows<T, M, R>(x, x_row, weight + j * weight_row, weight_row, bias ? bias + j : nullptr, out + j, out_row, k);
  }
  for (int64_t j = whole * R; j < n; ++j)
    skinny_rows<T, M, 1>(x, x_row, weight + j * weight_row, weight_row, bias ? bias + j : nullptr, out + j, out_row, k);
}

template <typename T, int M>
void skinny_gemm(const T* x, int64_t x_row, const T* weight, int64_t weight_row, const T* bias, T* out, int64_t out_row,
                 int64_t n, int64_t k, int threads) {
  constexpr int at_once = M < kMostAtOnce ? M : kMostAtOnce, rest = M % at_once;
  int64_t m = 0;
  for (; m + at_once <= M; m += at_once)
    skinny_gemm_at_once<T, at_once>(
        x + m * x_row, x_row, weight, weight_row, bias, out + m * out_row, out_row, n, k, threads);
  if constexpr (rest > 0)
    skinny_gemm_at_once<T, rest>(
        x + m * x_row, x_row, weight, weight_row, bias, out + m * out_row, out_row, n, k, threads);
}
