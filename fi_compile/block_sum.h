// The sum inside a base block: out [batch, channels] = sum over i < rows of inputs[i] · table[i].
//
// TorchInductor would write all products of a block of rows, and works out for every 16 values where they lie. Here a
// strip of channels stays in registers while the rows there are stream by. Every tensor's last axis is contiguous,
// *_row is the distance of its rows.
#include <cstdint>
#include <cstring>
#include <type_traits>

constexpr int kStrip = 8;                           // vectors of channels at once
constexpr int64_t kSumWorthAThread = int64_t(1) << 16;  // multiplications

template <typename T, int S>
inline __attribute__((always_inline)) void sum_strip(const T* inputs, int64_t inputs_row, const T* table,
                                                     int64_t table_row, int64_t rows, const int64_t* source,
                                                     T* out) {
  typedef T Vector __attribute__((vector_size(kVectorBytes)));
  constexpr int lanes = kVectorBytes / sizeof(T);
  Vector sums[S] = {};
  for (int64_t i = 0; i < rows; ++i) {
#pragma GCC unroll 32
    for (int s = 0; s < S; ++s) {
      Vector x, weight;
      if (source) {
        for (int lane = 0; lane < lanes; ++lane) x[lane] = inputs[i * inputs_row + source[s * lanes + lane]];
      } else {
        std::memcpy(&x, inputs + i * inputs_row + s * lanes, sizeof(Vector));
      }
      std::memcpy(&weight, table + i * table_row + s * lanes, sizeof(Vector));
      sums[s] += x * weight;
    }
  }
  std::memcpy(out, sums, sizeof(sums));
}

// source: of each channel its input, or null.
template <typename T>
void block_sum(const T* inputs, int64_t inputs_row, int64_t inputs_batch, const T* table, int64_t table_row, int64_t rows,
               const int64_t* source, T* out, int64_t out_batch, int64_t batch, int64_t channels, int threads) {
  constexpr int64_t lanes = kVectorBytes / sizeof(T), strip = kStrip * lanes;
  const int64_t strips = (channels + strip - 1) / strip;
#pragma omp parallel for collapse(2) num_threads(threads) if (threads > 1 && batch * channels * rows >= kSumWorthAThread)
  for (int64_t b = 0; b < batch; ++b)
    for (int64_t n = 0; n < strips; ++n) {
      const T* row = inputs + b * inputs_batch;
      int64_t c = n * strip;
      const int64_t end = c + strip < channels ? c + strip : channels;
      const auto add = [&](auto size, int64_t width) {
        for (; c + width <= end; c += width)
          sum_strip<T, size.value>(source ? row : row + c, inputs_row, table + c, table_row, rows,
                                   source ? source + c : nullptr, out + b * out_batch + c);
      };
      add(std::integral_constant<int, kStrip>(), strip);
      add(std::integral_constant<int, 1>(), lanes);
      for (; c < end; ++c) {
        T sum = 0;
        for (int64_t i = 0; i < rows; ++i) sum += row[i * inputs_row + (source ? source[c] : c)] * table[i * table_row + c];
        out[b * out_batch + c] = sum;
      }
    }
}
