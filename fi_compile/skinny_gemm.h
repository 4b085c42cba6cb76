// A product with few rows on one side, as a step of a batch has: out [m, n] = x [m, k] · weight [n, k]ᵀ + bias [n].
//
// All it costs should be to read the weight once. A BLAS copies the weight into its own layout first, which for few
// rows takes longer than the product. Here a tile of the output is summed in registers, along k, for M rows of x by R
// rows of the weight, where both lie as they are.
#include <cstdint>
#include <cstring>
#include <utility>

#if defined(__AVX512F__)
constexpr int kVectorBytes = 64, kAccumulators = 24;  // of 32 registers
#else
constexpr int kVectorBytes = 32, kAccumulators = 10;  // of 16
#endif
constexpr int64_t kMostAtOnce = 8;                       // rows of x
constexpr int64_t kWorthAThread = int64_t(1) << 17;      // multiplications
constexpr int64_t kReadWorthAThread = int64_t(1) << 16;  // entries of a weight that one row meets

// Two vectors folded to halves of one: lanes with the bit `half` are sums within b, the others within a.
template <int half, typename Vector, size_t... I>
inline __attribute__((always_inline)) Vector fold(Vector a, Vector b, std::index_sequence<I...>) {
  constexpr size_t lanes = sizeof...(I);
#if __has_builtin(__builtin_shufflevector)
  return __builtin_shufflevector(a, b, (I & half ? I + lanes : I)...) +
         __builtin_shufflevector(a, b, (I & half ? (I ^ half) + lanes : I ^ half)...);
#else
  Vector folded;
  ((folded[I] = I & half ? b[I] + b[I ^ half] : a[I] + a[I ^ half]), ...);
  return folded;
#endif
}

// The sums of the lanes of as many vectors as each has lanes, in v[0].
template <int half, typename Vector, size_t lanes>
inline __attribute__((always_inline)) void sum_lanes(Vector (&v)[lanes]) {
  if constexpr (half > 0) {
#pragma GCC unroll 32
    for (int r = 0; r < half; ++r) v[r] = fold<half>(v[r], v[r + half], std::make_index_sequence<lanes>());
    sum_lanes<half / 2>(v);
  }
}

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

// One row of x of K entries: as many rows of the weight as a vector has lanes, one after another, for a single stream
// from memory is what the processor foresees best; then all their sums at once.
template <typename T, int64_t K>
inline void gemv_rows(const T* x, const T* weight, int64_t weight_row, const T* bias, T* out) {
  typedef T Vector __attribute__((vector_size(kVectorBytes)));
  constexpr int lanes = kVectorBytes / sizeof(T);
  const auto at = [](const T* p) {
    Vector v;
    std::memcpy(&v, p, sizeof(v));
    return v;
  };
  Vector sums[lanes];
#pragma GCC unroll 16
  for (int r = 0; r < lanes; ++r, weight += weight_row) {
    Vector even = {}, odd = {};
    int64_t i = 0;
    for (; i + 2 * lanes <= K; i += 2 * lanes) {
      even += at(weight + i) * at(x + i);
      odd += at(weight + i + lanes) * at(x + i + lanes);
    }
    for (; i + lanes <= K; i += lanes) even += at(weight + i) * at(x + i);
    for (; i < K; ++i) odd[0] += weight[i] * x[i];
    sums[r] = even + odd;
  }
  sum_lanes<lanes / 2>(sums);
  if (bias) sums[0] += at(bias);
  std::memcpy(out, sums, sizeof(Vector));
}

template <typename T, int64_t K>
void gemv(const T* x, const T* weight, int64_t weight_row, const T* bias, T* out, int64_t n, int threads) {
  constexpr int64_t lanes = kVectorBytes / sizeof(T);
  const int64_t whole = n / lanes;
#pragma omp parallel for num_threads(threads) if (threads > 1 && n * K >= kReadWorthAThread)
  for (int64_t tile = 0; tile < whole; ++tile) {
    const int64_t j = tile * lanes;
    gemv_rows<T, K>(x, weight + j * weight_row, weight_row, bias ? bias + j : nullptr, out + j);
  }
  for (int64_t j = whole * lanes; j < n; ++j)
    skinny_rows<T, 1, 1>(x, 0, weight + j * weight_row, weight_row, bias ? bias + j : nullptr, out + j, 0, K);
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
