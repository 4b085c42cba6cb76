// Tiles by transforms across SIMD lanes: every lane is a channel, so that butterflies need no shuffles; tile_lanes.py.
//
// U real inputs u of a channel meet the lags 1 ... 2U - 1 (shifted by whole sides where inputs are further off) in a
// cyclic convolution of length 2U, whose upper half is the tile. Even and odd positions are the two parts of one complex
// sequence z of M = U values, so that transforms are of length M without a pass that takes real sequences apart. Forward
// by decimation in frequency leaves the spectrum in bit-reversed order, inverse by decimation in time takes it from
// there: nothing is ever reordered. The lower half of z is zero on the way in and not asked for on the way out, and both
// passes that would meet it are cut in half. In bit-reversed order the frequencies k and M - k, which the product needs
// together, mirror each other within each block of 2^j ... 2^(j+1) - 1.

#include <algorithm>
#include <array>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <memory>
#include <mutex>
#include <type_traits>
#include <vector>

#define INLINE inline __attribute__((always_inline))

namespace {

#if defined(__AVX512F__)
constexpr int kBytes = 64;
#elif defined(__AVX__)
constexpr int kBytes = 32;
#else
constexpr int kBytes = 16;
#endif

template <typename T>
constexpr int kLanes = kBytes / sizeof(T);
template <typename T>
struct Vector {
  typedef T type __attribute__((vector_size(kBytes)));
  typedef T unaligned __attribute__((vector_size(kBytes), aligned(sizeof(T))));
};
template <typename T>
using V = typename Vector<T>::type;
template <typename T>
using Loose = typename Vector<T>::unaligned;

// A complex number in every lane; R: a vector, or one number for all lanes.
template <typename R>
struct Complex {
  R re, im;
};

template <typename R>
INLINE Complex<R> operator+(Complex<R> a, Complex<R> b) {
  return {a.re + b.re, a.im + b.im};
}
template <typename R>
INLINE Complex<R> operator-(Complex<R> a, Complex<R> b) {
  return {a.re - b.re, a.im - b.im};
}
template <typename R, typename S>
INLINE Complex<R> operator*(Complex<R> a, Complex<S> b) {
  return {a.re * b.re - a.im * b.im, a.re * b.im + a.im * b.re};
}
template <typename R>
INLINE Complex<R> conjugate(Complex<R> a) {
  return {a.re, -a.im};
}
template <typename R>
INLINE Complex<R> times_i(Complex<R> a) {
  return {-a.im, a.re};
}

int log2_of(int64_t n) {
  int log = 0;
  while ((int64_t(1) << log) < n) ++log;
  return log;
}

template <typename T>
Complex<T> root(double numerator, double denominator) {  // exp(-2 pi i numerator / denominator)
  const double angle = -2 * 3.141592653589793238463 * numerator / denominator;
  return {T(std::cos(angle)), T(std::sin(angle))};
}

// The roots of unity that transforms of one size need.
template <typename T>
struct Roots {
  std::vector<std::vector<Complex<T>>> passes;  // [log2 m][m / 4][3]: w^j, w^2j, w^3j with w = exp(-2 pi i / m)
  std::vector<Complex<T>> met;  // exp(-2 pi i k / M) in the order in which `multiply` meets the frequencies k

  explicit Roots(int64_t size) {
    for (int64_t m = 1; m <= size; m *= 2) {
      passes.emplace_back();
      for (int64_t j = 0; m >= 8 && j < m / 4; ++j)
        for (int p = 1; p <= 3; ++p) passes.back().push_back(root<T>(double(p * j), double(m)));
    }
    const auto add = [&](int64_t place) {
      int64_t k = 0;
      for (int64_t bit = 1, top = size / 2; top; bit *= 2, top /= 2) k += place & bit ? top : 0;
      met.push_back(root<T>(double(k), double(size)));
    };
    add(0), add(1);
    for (int64_t block = 2; block < size; block *= 2)
      for (int64_t i = 0; i < block / 2; ++i) add(block + i);
  }

  // Made on first use, and kept.
  static const Roots& of(int64_t size) {
    static std::mutex lock;
    static std::unique_ptr<Roots> known[64];
    const std::lock_guard<std::mutex> guard(lock);
    auto& found = known[log2_of(size)];
    if (!found) found = std::make_unique<Roots>(size);
    return *found;
  }
};

struct Range {
  int64_t first, last;
};

// Sizes from which on a transform fits into the nearest cache and goes pass by pass, not part by part.
constexpr int64_t kNear = 256;
// Sides up to which rows are so short that the processor does not see them coming.
constexpr int64_t kFetched = 64;

template <typename T>
struct Transform {
  using C = Complex<V<T>>;

  // A pass of radix 4, two of radix 2 in one: parts come out in bit-reversed order. js: of its m / 4 butterflies.
  static INLINE void pass(C* x, int64_t m, const Complex<T>* w, Range js) {
    const int64_t q = m / 4;
    w += 3 * js.first;
    for (int64_t j = js.first; j < js.last; ++j, w += 3) {
      const C a = x[j], b = x[j + q], c = x[j + 2 * q], d = x[j + 3 * q];
      const C s = a + c, e = a - c, t = b + d, f = times_i(b - d);
      x[j] = s + t;
      x[j + q] = (s - t) * w[1];
      x[j + 2 * q] = (e - f) * w[0];
      x[j + 3 * q] = (e + f) * w[2];
    }
  }

  // The same where the upper half is zero, whatever lies there.
  static void first_pass(C* x, int64_t m, const Complex<T>* w, Range js) {
    const int64_t q = m / 4;
    w += 3 * js.first;
    for (int64_t j = js.first; j < js.last; ++j, w += 3) {
      const C a = x[j], b = x[j + q], f = times_i(b);
      x[j] = a + b;
      x[j + q] = (a - b) * w[1];
      x[j + 2 * q] = (a - f) * w[0];
      x[j + 3 * q] = (a + f) * w[2];
    }
  }

  static INLINE void inverse_pass(C* x, int64_t m, const Complex<T>* w, Range js) {
    const int64_t q = m / 4;
    w += 3 * js.first;
    for (int64_t j = js.first; j < js.last; ++j, w += 3) {
      const C a = x[j], b = x[j + q] * conjugate(w[1]);
      const C c = x[j + 2 * q] * conjugate(w[0]), d = x[j + 3 * q] * conjugate(w[2]);
      const C s = a + b, e = a - b, t = c + d, f = times_i(c - d);
      x[j] = s + t;
      x[j + q] = e + f;
      x[j + 2 * q] = s - t;
      x[j + 3 * q] = e - f;
    }
  }

  // The same where only the upper half is asked for.
  static void last_pass(C* x, int64_t m, const Complex<T>* w, Range js) {
    const int64_t q = m / 4;
    w += 3 * js.first;
    for (int64_t j = js.first; j < js.last; ++j, w += 3) {
      const C a = x[j], b = x[j + q] * conjugate(w[1]);
      const C c = x[j + 2 * q] * conjugate(w[0]), d = x[j + 3 * q] * conjugate(w[2]);
      x[j + 2 * q] = (a + b) - (c + d);
      x[j + 3 * q] = (a - b) - times_i(c - d);
    }
  }

  static INLINE void pair(C* x) {
    const C s = x[0] + x[1], d = x[0] - x[1];
    x[0] = s, x[1] = d;
  }

  static INLINE void four(C* x) {
    const C s = x[0] + x[2], e = x[0] - x[2], t = x[1] + x[3], f = times_i(x[1] - x[3]);
    x[0] = s + t, x[1] = s - t, x[2] = e - f, x[3] = e + f;
  }

  static INLINE void inverse_four(C* x) {
    const C s = x[0] + x[1], e = x[0] - x[1], t = x[2] + x[3], f = times_i(x[2] - x[3]);
    x[0] = s + t, x[1] = e + f, x[2] = s - t, x[3] = e - f;
  }

  static void forward(C* x, int log, const Roots<T>& roots) {
    const int64_t m = int64_t(1) << log;
    if (m > kNear) {
      pass(x, m, roots.passes[log].data(), {0, m / 4});
      for (int part = 0; part < 4; ++part) forward(x + part * (m / 4), log - 2, roots);
      return;
    }
    for (; log > 3; log -= 2)
      for (int64_t start = 0, part = int64_t(1) << log; start < m; start += part)
        pass(x + start, part, roots.passes[log].data(), {0, part / 4});
    for (int64_t start = 0; start < m; start += int64_t(1) << log) {
      if (log == 2) {
        four(x + start);
      } else {
        pass(x + start, 8, roots.passes[3].data(), {0, 2});
        for (int i = 0; i < 8; i += 2) pair(x + start + i);
      }
    }
  }

  static void inverse(C* x, int log, const Roots<T>& roots) {
    const int64_t m = int64_t(1) << log;
    if (m > kNear) {
      for (int part = 0; part < 4; ++part) inverse(x + part * (m / 4), log - 2, roots);
      inverse_pass(x, m, roots.passes[log].data(), {0, m / 4});
      return;
    }
    int part = log % 2 ? 3 : 2;
    for (int64_t start = 0; start < m; start += int64_t(1) << part) {
      if (part == 2) {
        inverse_four(x + start);
      } else {
        for (int i = 0; i < 8; i += 2) pair(x + start + i);
        inverse_pass(x + start, 8, roots.passes[3].data(), {0, 2});
      }
    }
    for (part += 2; part <= log; part += 2)
      for (int64_t start = 0, size = int64_t(1) << part; start < m; start += size)
        inverse_pass(x + start, size, roots.passes[part].data(), {0, size / 4});
  }

  // Calls meet(p, q, n) for pairs n of the M / 2 + 1 there are of places of frequencies k and M - k.
  template <typename F>
  static INLINE void mirrored(Range pairs, F&& meet) {
    int64_t n = pairs.first;
    for (; n < std::min<int64_t>(2, pairs.last); ++n) meet(n, n, n);
    while (n < pairs.last) {
      int64_t block = 2;
      while (block < n) block *= 2;  // of pairs block / 2 + 1 ... block
      const int64_t last = std::min(block + 1, pairs.last);
      for (int64_t i = n - 1 - block / 2; n < last; ++i, ++n) meet(block + i, 2 * block - 1 - i, n);
    }
  }

  // The product of spectra, of u with those of the even and the odd lags, divided by 2M as `spectrum` keeps them: into
  // `to`, or added there. R: a vector, or one number where all lanes share a filter.
  template <bool Add, typename R>
  static void multiply(C* to, const C* x, Range pairs, const Complex<R>* filter, const Complex<T>* w) {
    mirrored(pairs, [&](int64_t p, int64_t q, int64_t n) {
      const Complex<R> even = filter[2 * n], odd = filter[2 * n + 1];
      const C z = x[p], y = conjugate(x[q]);
      const C a = z + y, d = z - y, b = {d.im, -d.re};  // twice the spectra at even and at odd positions
      const C e = a * even + (b * w[n]) * odd, o = a * odd + b * even;
      const C here = {e.re - o.im, e.im + o.re}, there = {e.re + o.im, o.re - e.im};
      if (Add && p != q) to[q] = to[q] + there;
      if (!Add && p != q) to[q] = there;
      to[p] = Add ? to[p] + here : here;
    });
  }

  // From the transform of the even lags + i times the odd ones to what `multiply` reads.
  static void separate(Complex<V<T>>* filter, const C* x, int64_t m) {
    const T half = T(0.25) / T(m);
    mirrored({0, m / 2 + 1}, [&](int64_t p, int64_t q, int64_t n) {
      const C z = x[p], y = conjugate(x[q]), d = z - y;
      filter[2 * n] = {(z.re + y.re) * half, (z.im + y.im) * half};
      filter[2 * n + 1] = {d.im * half, -d.re * half};
    });
  }
};

// A square of lanes x lanes values in registers, transposed by exchanging halves, quarters, ...
template <typename T>
struct Square {
  static constexpr int n = kLanes<T>;
  using Index = typename std::conditional<sizeof(T) == 4, int32_t, int64_t>::type;
  typedef Index Mask __attribute__((vector_size(kBytes)));

  template <int S>
  static INLINE void exchange(V<T>* r) {
    Mask low, high;
    for (int i = 0; i < n; ++i) low[i] = i & S ? n + i - S : i, high[i] = i & S ? n + i : i + S;
    for (int i = 0; i < n; ++i) {
      if (i & S) continue;
      const V<T> a = r[i], b = r[i + S];
      r[i] = __builtin_shuffle(a, b, low);
      r[i + S] = __builtin_shuffle(a, b, high);
    }
  }

  static INLINE void transpose(V<T>* r) {
    if constexpr (n >= 16) exchange<8>(r);
    if constexpr (n >= 8) exchange<4>(r);
    if constexpr (n >= 4) exchange<2>(r);
    if constexpr (n >= 2) exchange<1>(r);
  }
};

// `count` positions of each lane's channel, as one vector a position; beyond them nothing is read.
template <typename T>
void gather(V<T>* to, const T* const* rows, int64_t count) {
  constexpr int n = kLanes<T>;
  int64_t p = 0;
  for (; p + n <= count; p += n) {
    V<T> r[n];
    for (int c = 0; c < n; ++c) r[c] = *reinterpret_cast<const Loose<T>*>(rows[c] + p);
    Square<T>::transpose(r);
    for (int c = 0; c < n; ++c) to[p + c] = r[c];
  }
  for (; p < count; ++p)
    for (int c = 0; c < n; ++c) to[p][c] = rows[c][p];
}

// The way back, added to the first `lanes` rows.
template <typename T>
void scatter_add(T* const* rows, const V<T>* from, int64_t count, int lanes) {
  constexpr int n = kLanes<T>;
  int64_t p = 0;
  for (; p + n <= count; p += n) {
    V<T> r[n];
    for (int c = 0; c < n; ++c) r[c] = from[p + c];
    Square<T>::transpose(r);
    for (int c = 0; c < lanes; ++c) *reinterpret_cast<Loose<T>*>(rows[c] + p) += r[c];
  }
  for (; p < count; ++p)
    for (int c = 0; c < lanes; ++c) rows[c][p] += from[p][c];
}

// Memory of a thread's own, aligned, that stays for its next tile.
template <typename T>
V<T>* room(int which, int64_t vectors) {
  struct Room {
    void* data = nullptr;
    int64_t bytes = 0;
    ~Room() { std::free(data); }
  };
  static thread_local Room rooms[3];
  Room& own = rooms[which];
  if (own.bytes < vectors * kBytes) {
    std::free(own.data);
    own.bytes = vectors * kBytes;
    own.data = std::aligned_alloc(kBytes, size_t(own.bytes));
  }
  return reinterpret_cast<V<T>*>(own.data);
}

}  // namespace

extern "C" {

// What tile_lanes.py hands over. Strides are in values; positions are contiguous.
struct Filters {
  const void* filters;  // [F, lags]
  int64_t stride, lags;
  int64_t distance;  // of the block of inputs that meets them, in sides
};

struct Tile {
  const void* inputs;  // [B, Cin, ...]
  int64_t inputs_row, inputs_channel;
  void* outputs;  // [B, Cout, length]
  int64_t outputs_row, outputs_channel;
  const int64_t* source;  // the input channel of each output channel, or null
  const int64_t* shared;  // the filter of each group of lanes, where all of its lanes have one, or null
  int64_t batch, first, last;  // rows; channels first ... last - 1, first a multiple of the lanes
  int64_t side, length;
  int64_t blocks;
  const int64_t* starts;  // where each block of inputs begins
  const void* const* spectra;  // of the filters for each block, or null: made of `fresh` on the way
  Filters fresh;
  int64_t threads;
  int64_t grain;  // side of the parts that a task is about, for `run_tasks`
  void* work;  // and memory between them: for one block of inputs, or for two where there are several
};

struct Block {
  void* rows;  // [K, B, C], channels contiguous
  int64_t rows_position, rows_batch;
  void* columns;  // [B, C, K], positions contiguous
  int64_t columns_batch, columns_channel;
  int64_t positions, batch, channels;
  int64_t threads;
};
}

namespace {

// The spectra of one group of filters, rows first ... first + lanes - 1 of count (beyond it the last again).
template <typename T>
void spectrum_of(Complex<V<T>>* to, const Filters& given, int64_t first, int64_t count, int64_t side) {
  using F = Transform<T>;
  constexpr int n = kLanes<T>;
  const Roots<T>& roots = Roots<T>::of(side);
  const int64_t begin = (given.distance - 1) * side;
  const int64_t known = std::max<int64_t>(0, std::min(2 * side, given.lags - begin));
  const T* rows[n];
  for (int c = 0; c < n; ++c)
    rows[c] = static_cast<const T*>(given.filters) + std::min(first + c, count - 1) * given.stride + begin;
  V<T>* flat = room<T>(0, 2 * side);
  gather<T>(flat, rows, known);
  for (int64_t p = known; p < 2 * side; ++p) flat[p] = V<T>{};
  auto* x = reinterpret_cast<typename F::C*>(flat);
  F::forward(x, log2_of(side), roots);
  F::separate(to, x, side);
}

template <typename T>
INLINE void fetch(const T* row, int64_t count) {
  for (int64_t p = 0; p < count; p += 64 / int64_t(sizeof(T))) __builtin_prefetch(row + p, 1);
}

// One row's tile of one group of lanes, in stages. Of each stage but the first and the last any range may be run.
template <typename T>
struct Group {
  using F = Transform<T>;
  using C = typename F::C;
  static constexpr int n = kLanes<T>;

  const Tile& tile;
  const int64_t group, row;
  const Complex<V<T>>* made;  // the spectra, where they were made on the way
  const int64_t side = tile.side;
  const int lanes = int(std::min<int64_t>(n, tile.last - group * n));
  const Roots<T>& roots = Roots<T>::of(side);

  // Gather inputs and run the first pass.
  void begin(V<T>* flat, int64_t block, Range js) const {
    const T* rows[n];
    for (int c = 0; c < n; ++c) {
      const int64_t channel = group * n + std::min(c, lanes - 1);
      rows[c] = static_cast<const T*>(tile.inputs) + row * tile.inputs_row + tile.starts[block] +
          (tile.source ? tile.source[channel] : channel) * tile.inputs_channel;
    }
    for (const Range at : positions(js)) {
      const T* from[n];
      for (int c = 0; c < n; ++c) from[c] = rows[c] + at.first;
      gather<T>(flat + at.first, from, at.last - at.first);
    }
    F::first_pass(reinterpret_cast<C*>(flat), side, roots.passes[log2_of(side)].data(), js);
  }

  void multiply(V<T>* sum, const V<T>* flat, int64_t block, Range pairs) const {
    const C* x = reinterpret_cast<const C*>(flat);
    C* to = reinterpret_cast<C*>(sum);
    const auto meet = [&](const auto* filter) {
      if (block) F::template multiply<true>(to, x, pairs, filter, roots.met.data());
      else F::template multiply<false>(to, x, pairs, filter, roots.met.data());
    };
    const int64_t each = side + 2;
    if (made) meet(made);
    else if (tile.shared) meet(static_cast<const Complex<T>*>(tile.spectra[block]) + tile.shared[group] * each);
    else meet(static_cast<const Complex<V<T>>*>(tile.spectra[block]) + group * each);
  }

  // Run the last pass and add to outputs.
  void end(V<T>* flat, Range js) const {
    F::last_pass(reinterpret_cast<C*>(flat), side, roots.passes[log2_of(side)].data(), js);
    for (const Range at : positions(js)) {
      const int64_t count = std::min(at.last, tile.length) - at.first;
      T* rows[n];
      for (int c = 0; c < lanes; ++c) rows[c] = output(c) + at.first;
      if (count > 0) scatter_add<T>(rows, flat + side + at.first, count, lanes);
    }
  }

  // Where butterflies of the first pass take their inputs from, and those of the last put their outputs.
  std::array<Range, 2> positions(Range js) const {
    if (js.last - js.first == side / 4) return {Range{0, side}, Range{side, side}};
    const int64_t half = side / 2;
    return {Range{2 * js.first, 2 * js.last}, Range{half + 2 * js.first, half + 2 * js.last}};
  }

  T* output(int lane) const {
    return static_cast<T*>(tile.outputs) + row * tile.outputs_row + (group * n + lane) * tile.outputs_channel;
  }

  // All of it.
  void run() const {
    V<T>* sum = room<T>(0, 2 * side);
    V<T>* next = tile.blocks > 1 ? room<T>(1, 2 * side) : nullptr;
    const Range all{0, side / 4};
    const int log = log2_of(side);
    if (side <= kFetched)
      for (int c = 0; c < lanes; ++c) fetch(output(c), tile.length);
    for (int64_t block = 0; block < tile.blocks; ++block) {
      V<T>* flat = block ? next : sum;
      begin(flat, block, all);
      for (int part = 0; part < 4; ++part) F::forward(reinterpret_cast<C*>(flat) + part * all.last, log - 2, roots);
      multiply(sum, flat, block, {0, side / 2 + 1});
    }
    for (int part = 0; part < 4; ++part) F::inverse(reinterpret_cast<C*>(sum) + part * all.last, log - 2, roots);
    end(sum, all);
  }

  // One of the tasks that are all of it when run in order; tile_lanes.py counts them. In a stage there are
  // side / grain, each about grain values: passes down to parts of that size, these, the product, and the way back.
  void run_task(int64_t task) const {
    const int64_t grain = tile.grain, each = side / grain, levels = (log2_of(side) - log2_of(grain)) / 2;
    const int64_t stage = task / each, index = task % each;
    const int64_t stages = levels + 2, block = std::min(stage / stages, tile.blocks), within = stage - block * stages;
    V<T>* sum = static_cast<V<T>*>(tile.work);
    V<T>* flat = block && block < tile.blocks ? sum + 2 * side : sum;
    C* x = reinterpret_cast<C*>(flat);
    const auto part = [&](int64_t level, auto&& run) {  // of a pass over parts of side / 4^level
      const int log = log2_of(side) - 2 * int(level);
      const int64_t m = int64_t(1) << log, place = index * grain, start = place / m * m;
      run(x + start, m, roots.passes[log].data(), Range{(place - start) / 4, (place - start + grain) / 4});
    };
    if (block < tile.blocks) {
      if (within == 0) begin(flat, block, {index * grain / 4, (index + 1) * grain / 4});
      else if (within < levels) part(within, [](auto... given) { F::pass(given...); });
      else if (within == levels) F::forward(x + index * grain, log2_of(grain), roots);
      else multiply(sum, flat, block, {index * grain / 2, (index + 1) * grain / 2 + (index + 1 == each)});
    } else if (within == 0) {
      F::inverse(x + index * grain, log2_of(grain), roots);
    } else if (within < levels) {
      part(levels - within, [](auto... given) { F::inverse_pass(given...); });
    } else {
      end(flat, {index * grain / 4, (index + 1) * grain / 4});
    }
  }
};

template <typename T>
void add_group(const Tile& tile, int64_t group) {
  constexpr int n = kLanes<T>;
  const Complex<V<T>>* made = nullptr;
  if (!tile.spectra) {
    auto* to = reinterpret_cast<Complex<V<T>>*>(room<T>(2, 2 * (tile.side + 2)));
    spectrum_of<T>(to, tile.fresh, group * n, tile.last, tile.side);
    made = to;
  }
  for (int64_t row = 0; row < tile.batch; ++row) Group<T>{tile, group, row, made}.run();
}

// Tasks first ... last - 1 of those of one row of one group.
template <typename T>
void run_tasks(const Tile& tile, int64_t row, int64_t first, int64_t last) {
  const Group<T> group{tile, tile.first / kLanes<T>, row, nullptr};
  for (int64_t task = first; task < last; ++task) group.run_task(task);
}

template <typename F>
void for_each_group(int64_t first, int64_t last, int64_t threads, F&& body) {
#pragma omp parallel for schedule(dynamic) num_threads(threads) if (threads > 1)
  for (int64_t group = first; group < last; ++group) body(group);
}

template <typename T>
void add_tile(const Tile& tile) {
  constexpr int n = kLanes<T>;
  for_each_group(tile.first / n, (tile.last + n - 1) / n, tile.threads, [&](int64_t group) { add_group<T>(tile, group); });
}

// Between a block, position-major, and the columns of the state. In: from rows to columns; else the way back.
template <typename T, bool In>
void move_group(const Block& block, int64_t group) {
  constexpr int n = kLanes<T>;
  const int64_t first = group * n, lanes = std::min<int64_t>(n, block.channels - first);
  for (int64_t b = 0; b < block.batch; ++b) {
    T* rows = static_cast<T*>(block.rows) + b * block.rows_batch + first;
    T* columns = static_cast<T*>(block.columns) + b * block.columns_batch + first * block.columns_channel;
    // Of the next group: every channel lies in a page of its own, which the processor does not foresee.
    for (int64_t c = n; c < std::min<int64_t>(2 * n, block.channels - first); ++c)
      fetch(columns + c * block.columns_channel, block.positions);
    int64_t p = 0;
    for (; lanes == n && p + n <= block.positions; p += n) {
      V<T> r[n];
      for (int i = 0; i < n; ++i)
        r[i] = *reinterpret_cast<Loose<T>*>(In ? rows + (p + i) * block.rows_position : columns + i * block.columns_channel + p);
      Square<T>::transpose(r);
      for (int i = 0; i < n; ++i)
        *reinterpret_cast<Loose<T>*>(In ? columns + i * block.columns_channel + p : rows + (p + i) * block.rows_position) = r[i];
    }
    for (; p < block.positions; ++p)
      for (int64_t c = 0; c < lanes; ++c) {
        T& row = rows[p * block.rows_position + c];
        T& column = columns[c * block.columns_channel + p];
        (In ? column : row) = In ? row : column;
      }
  }
}

template <typename T>
void move_block(const Block& block, bool in) {
  const int64_t groups = (block.channels + kLanes<T> - 1) / kLanes<T>;
  for_each_group(0, groups, block.threads, [&](int64_t group) {
    if (in) move_group<T, true>(block, group);
    else move_group<T, false>(block, group);
  });
}

template <typename T>
void make_spectra(void* to, const Filters& given, int64_t count, int64_t side, int64_t threads) {
  constexpr int n = kLanes<T>;
  for_each_group(0, (count + n - 1) / n, threads, [&](int64_t group) {
    auto* filter = static_cast<Complex<V<T>>*>(to) + group * (side + 2);
    spectrum_of<T>(filter, given, group * n, count, side);
  });
}

}  // namespace

extern "C" {

int lanes(int bytes) { return kBytes / bytes; }

void add_tile_float(const Tile* tile) { add_tile<float>(*tile); }
void add_tile_double(const Tile* tile) { add_tile<double>(*tile); }

void run_tasks_float(const Tile* tile, int64_t row, int64_t first, int64_t last) {
  run_tasks<float>(*tile, row, first, last);
}
void run_tasks_double(const Tile* tile, int64_t row, int64_t first, int64_t last) {
  run_tasks<double>(*tile, row, first, last);
}

void move_block_float(const Block* block, int64_t in) { move_block<float>(*block, in); }
void move_block_double(const Block* block, int64_t in) { move_block<double>(*block, in); }

void make_spectra_float(void* to, const Filters* given, int64_t count, int64_t side, int64_t threads) {
  make_spectra<float>(to, *given, count, side, threads);
}
void make_spectra_double(void* to, const Filters* given, int64_t count, int64_t side, int64_t threads) {
  make_spectra<double>(to, *given, count, side, threads);
}
}
