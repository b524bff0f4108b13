// Batch normalisation and the ReLU after it, each way in two passes over the maps instead of torch's five; and the gate
// of an Attention Module, each way in one.
//
// Maps are channels-last, seen as (rows, channels) with rows = batch * height * width, in float or bfloat16; everything
// per channel is float. Built by cpu_kernels.py with the system's compiler, without torch's headers.
#include <cstdint>
#include <cstring>
#include <type_traits>
#include <vector>
#ifdef __AVX512BF16__
#include <immintrin.h>
#endif

namespace {

constexpr int LANES = 16;  // floats of a vector
constexpr int BLOCK = 16384;  // values of a part of the maps, which fits the cache nearest to the core
typedef float Floats __attribute__((vector_size(4 * LANES)));
typedef int32_t Ints __attribute__((vector_size(4 * LANES)));
typedef uint32_t Words __attribute__((vector_size(4 * LANES)));
typedef uint16_t Halves __attribute__((vector_size(2 * LANES)));
typedef double Doubles __attribute__((vector_size(8 * LANES)));

struct BFloat16 {
    uint16_t bits;
};

inline Floats load(const float* from) {
    Floats value;
    std::memcpy(&value, from, sizeof value);
    return value;
}

inline Floats load(const BFloat16* from) {
#ifdef __AVX512BF16__
    __m512i words = _mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)from));
#else
    Halves halves;
    std::memcpy(&halves, from, sizeof halves);
    Words words = __builtin_convertvector(halves, Words);
#endif
    return (Floats)((Words)words << 16);
}

inline void store(float* to, Floats value) { std::memcpy(to, &value, sizeof value); }

inline void store(BFloat16* to, Floats value) {
#ifdef __AVX512BF16__
    __m256bh halves = _mm512_cvtneps_pbh((__m512)value);
#else
    Words bits = (Words)value;
    Words rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;  // to the nearest, to the even one of two
    Words is_nan = (Words)(value != value);
    Halves halves = __builtin_convertvector((rounded & ~is_nan) | (0x7fc0 & is_nan), Halves);
#endif
    std::memcpy(to, &halves, sizeof halves);
}

inline Floats keep(Ints mask, Floats value) { return (Floats)(mask & (Ints)value); }

inline void add(double* to, Floats value) {
    Doubles sum;
    std::memcpy(&sum, to, sizeof sum);
    sum += __builtin_convertvector(value, Doubles);
    std::memcpy(to, &sum, sizeof sum);
}

// Rows of few channels are taken several at a time, as one wide row, so that the additions do not wait for each other.
struct Shape {
    int64_t rows, channels, width, wide_rows;

    Shape(int64_t rows, int64_t channels) : rows(rows), channels(channels), width(channels), wide_rows(rows) {
        while (width < 4 * LANES && wide_rows % 2 == 0) {
            width *= 2;
            wide_rows /= 2;
        }
    }

    std::vector<float> widen(const float* per_channel) const {
        std::vector<float> wide(width);
        for (int64_t i = 0; i < width; i++) wide[i] = per_channel[i % channels];
        return wide;
    }

    int64_t first_row(int thread, int threads) const { return wide_rows * thread / threads; }

    double narrow(const std::vector<double>& wide, int64_t channel) const {
        double sum = 0;
        for (int64_t i = channel; i < int64_t(wide.size()); i += channels) sum += wide[i];
        return sum;
    }
};

// Calls `body(number of vectors, first row, last row, column)` for parts of the maps that fit the cache, so that what
// belongs to a column stays in registers while the rows go by.
template <class Body>
void each_part(const Shape& shape, int64_t first, int64_t last, const Body& body) {
    const int64_t rows = shape.width < BLOCK ? BLOCK / shape.width : 1;
    for (int64_t row = first; row < last; row += rows) {
        int64_t end = row + rows < last ? row + rows : last, column = 0;
        for (; column + 4 * LANES <= shape.width; column += 4 * LANES)
            body(std::integral_constant<int, 4>(), row, end, column);
        for (; column < shape.width; column += LANES) body(std::integral_constant<int, 1>(), row, end, column);
    }
}

template <int N>
struct Columns {
    Floats values[N];

    explicit Columns(const std::vector<float>& from, int64_t column) {
        for (int v = 0; v < N; v++) values[v] = load(&from[column + v * LANES]);
    }

    Columns() {
        for (int v = 0; v < N; v++) values[v] = Floats{};
    }

    void add_to(double* sums) const {
        for (int v = 0; v < N; v++) add(sums + v * LANES, values[v]);
    }

    Floats operator[](int v) const { return values[v]; }
    Floats& operator[](int v) { return values[v]; }
};

// One double a column from each thread, added up in the order of the threads.
struct Partial {
    std::vector<double> sums, others;

    Partial(int threads, int64_t width) : sums(threads * width), others(threads * width) {}
};

// The output of the ReLU; what is not a number stays so.
template <bool RELU>
inline Floats activated(Floats value) {
    return RELU ? keep(~(value < 0), value) : value;
}

// The gradient that passes it, given its input.
template <bool RELU>
inline Floats passed(Floats grad, Floats input) {
    return RELU ? keep(~(input <= 0), grad) : grad;
}

template <bool RELU, class T>
void norm_forward(const T* x, T* y, const float* weight, const float* bias, float* running_mean, float* running_var,
                  float* saved, int64_t rows, int64_t channels, float eps, float momentum, int threads) {
    const Shape shape(rows, channels);
    const int64_t width = shape.width;
    float *mean = saved, *invstd = saved + channels, *scale = saved + 2 * channels, *shift = saved + 3 * channels;
    // Sums of squares lose the digits that mean and deviation differ in, unless they are taken around a typical value.
    std::vector<float> center(channels);
    for (int64_t c = 0; c < channels; c += LANES) store(&center[c], load(x + c));
    const std::vector<float> centers = shape.widen(center.data());
    Partial partial(threads, width);
#pragma omp parallel for num_threads(threads) schedule(static, 1)
    for (int thread = 0; thread < threads; thread++) {
        double *sums = &partial.sums[thread * width], *others = &partial.others[thread * width];
        each_part(shape, shape.first_row(thread, threads), shape.first_row(thread + 1, threads),
                  [=, &centers](auto vectors, int64_t row, int64_t end, int64_t column) {
            constexpr int N = decltype(vectors)::value;
            const Columns<N> middle(centers, column);
            Columns<N> sum, squares;
            for (const T* from = x + row * width + column; row < end; row++, from += width)
                for (int v = 0; v < N; v++) {
                    Floats difference = load(from + v * LANES) - middle[v];
                    sum[v] += difference;
                    squares[v] += difference * difference;
                }
            sum.add_to(sums + column);
            squares.add_to(others + column);
        });
    }
    for (int64_t c = 0; c < channels; c++) {
        double offset = shape.narrow(partial.sums, c) / rows;
        double var = shape.narrow(partial.others, c) / rows - offset * offset;
        var = var < 0 ? 0 : var;
        mean[c] = float(center[c] + offset);
        invstd[c] = float(1 / __builtin_sqrt(var + eps));
        scale[c] = weight[c] * invstd[c];
        shift[c] = bias[c] - mean[c] * scale[c];
        running_mean[c] += momentum * (mean[c] - running_mean[c]);
        running_var[c] += momentum * (float(var * rows / (rows > 1 ? rows - 1 : 1)) - running_var[c]);
    }
    const std::vector<float> scales = shape.widen(scale), shifts = shape.widen(shift);
#pragma omp parallel for num_threads(threads) schedule(static, 1)
    for (int thread = 0; thread < threads; thread++)
        each_part(shape, shape.first_row(thread, threads), shape.first_row(thread + 1, threads),
                  [=, &scales, &shifts](auto vectors, int64_t row, int64_t end, int64_t column) {
            constexpr int N = decltype(vectors)::value;
            const Columns<N> a(scales, column), b(shifts, column);
            const T* from = x + row * width + column;
            T* to = y + row * width + column;
            for (; row < end; row++, from += width, to += width)
                for (int v = 0; v < N; v++)
                    store(to + v * LANES, activated<RELU>(load(from + v * LANES) * a[v] + b[v]));
        });
}

// `grad_past` is the gradient of what takes x past the normalisation, a shortcut; null where nothing does.
template <bool RELU, class T>
void norm_backward(const T* grad_y, const T* grad_past, const T* x, T* grad_x, const float* saved, float* grad_weight,
                   float* grad_bias, int64_t rows, int64_t channels, int threads) {
    const Shape shape(rows, channels);
    const int64_t width = shape.width;
    const float *mean = saved, *invstd = saved + channels, *scale = saved + 2 * channels;
    const std::vector<float> means = shape.widen(mean), scales = shape.widen(scale),
                             shifts = shape.widen(saved + 3 * channels);
    Partial partial(threads, width);
#pragma omp parallel for num_threads(threads) schedule(static, 1)
    for (int thread = 0; thread < threads; thread++) {
        double *sums = &partial.sums[thread * width], *others = &partial.others[thread * width];
        each_part(shape, shape.first_row(thread, threads), shape.first_row(thread + 1, threads),
                  [=, &means, &scales, &shifts](auto vectors, int64_t row, int64_t end, int64_t column) {
            constexpr int N = decltype(vectors)::value;
            const Columns<N> a(scales, column), b(shifts, column), middle(means, column);
            Columns<N> sum, products;
            const T *from = x + row * width + column, *above = grad_y + row * width + column;
            for (; row < end; row++, from += width, above += width)
                for (int v = 0; v < N; v++) {
                    Floats value = load(from + v * LANES);
                    Floats grad = passed<RELU>(load(above + v * LANES), value * a[v] + b[v]);
                    sum[v] += grad;
                    products[v] += grad * (value - middle[v]);
                }
            sum.add_to(sums + column);
            products.add_to(others + column);
        });
    }
    std::vector<float> slope(channels), offset(channels);
    for (int64_t c = 0; c < channels; c++) {
        double sum = shape.narrow(partial.sums, c), product = shape.narrow(partial.others, c);
        grad_bias[c] = float(sum);
        grad_weight[c] = float(product * invstd[c]);
        double per_value = -double(scale[c]) * invstd[c] * invstd[c] * product / rows;
        slope[c] = float(per_value);
        offset[c] = float(-scale[c] * sum / rows - per_value * mean[c]);
    }
    const std::vector<float> slopes = shape.widen(slope.data()), offsets = shape.widen(offset.data());
#pragma omp parallel for num_threads(threads) schedule(static, 1)
    for (int thread = 0; thread < threads; thread++)
        each_part(shape, shape.first_row(thread, threads), shape.first_row(thread + 1, threads),
                  [=, &scales, &shifts, &slopes, &offsets](auto vectors, int64_t row, int64_t end, int64_t column) {
            constexpr int N = decltype(vectors)::value;
            const Columns<N> a(scales, column), b(shifts, column), s(slopes, column), o(offsets, column);
            const int64_t start = row * width + column;
            const T *from = x + start, *above = grad_y + start, *past = grad_past ? grad_past + start : nullptr;
            T* to = grad_x + start;
            for (; row < end; row++, from += width, above += width, to += width) {
                for (int v = 0; v < N; v++) {
                    Floats value = load(from + v * LANES);
                    Floats grad = passed<RELU>(load(above + v * LANES), value * a[v] + b[v]);
                    Floats sum = grad * a[v] + (value * s[v] + o[v]);
                    store(to + v * LANES, past ? sum + load(past + v * LANES) : sum);
                }
                if (past) past += width;
            }
        });
}

// exp(x) as far as its result is a normal number; what is not a number stays so.
inline Floats exponential(Floats x) {
    x = x > 87 ? Floats{} + 87 : x;
    x = x < -87 ? Floats{} - 87 : x;
    const float shift = 12582912;  // 1.5 * 2 ** 23, above which floats are integers
    Floats n = (x * 1.44269504f + shift) - shift;
    Floats r = (x - n * 0.693359375f) + n * 2.12194440e-4f;  // ln 2 in two parts, the first of few bits
    Floats power = r * (1.f / 5040) + 1.f / 720;
    for (float coefficient : {1.f / 120, 1.f / 24, 1.f / 6, 1.f / 2, 1.f, 1.f}) power = power * r + coefficient;
    return power * (Floats)((__builtin_convertvector(n, Ints) + 127) << 23);
}

inline Floats sigmoid(Floats x) { return 1 / (1 + exponential(-x)); }

// (1 + sigmoid(logits)) * trunk
template <class T>
void gate_forward(const T* trunk, const T* logits, T* y, int64_t values, int threads) {
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t i = 0; i < values; i += LANES) {
        Floats t = load(trunk + i);
        store(y + i, t + t * sigmoid(load(logits + i)));
    }
}

template <class T>
void gate_backward(const T* grad_y, const T* trunk, const T* logits, T* grad_trunk, T* grad_logits, int64_t values,
                   int threads) {
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t i = 0; i < values; i += LANES) {
        Floats grad = load(grad_y + i), mask = sigmoid(load(logits + i));
        store(grad_trunk + i, grad + grad * mask);
        store(grad_logits + i, grad * load(trunk + i) * (mask * (1 - mask)));
    }
}

}  // namespace

// The types of the maps, as functions that ctypes finds by name.
#define EXPORT(TYPE, SUFFIX)                                                                                          \
    void norm_forward_##SUFFIX(const TYPE* x, TYPE* y, const float* weight, const float* bias, float* mean,           \
                               float* var, float* saved, int64_t rows, int64_t channels, float eps, float momentum,   \
                               int relu, int threads) {                                                               \
        (relu ? norm_forward<true, TYPE> : norm_forward<false, TYPE>)(                                                \
            x, y, weight, bias, mean, var, saved, rows, channels, eps, momentum, threads);                            \
    }                                                                                                                 \
    void norm_backward_##SUFFIX(const TYPE* grad_y, const TYPE* grad_past, const TYPE* x, TYPE* grad_x,               \
                                const float* saved, float* grad_weight, float* grad_bias, int64_t rows,               \
                                int64_t channels, int relu, int threads) {                                            \
        (relu ? norm_backward<true, TYPE> : norm_backward<false, TYPE>)(                                              \
            grad_y, grad_past, x, grad_x, saved, grad_weight, grad_bias, rows, channels, threads);                    \
    }                                                                                                                 \
    void gate_forward_##SUFFIX(const TYPE* trunk, const TYPE* logits, TYPE* y, int64_t values, int threads) {         \
        gate_forward(trunk, logits, y, values, threads);                                                              \
    }                                                                                                                 \
    void gate_backward_##SUFFIX(const TYPE* grad_y, const TYPE* trunk, const TYPE* logits, TYPE* grad_trunk,          \
                                TYPE* grad_logits, int64_t values, int threads) {                                     \
        gate_backward(grad_y, trunk, logits, grad_trunk, grad_logits, values, threads);                               \
    }

extern "C" {
EXPORT(float, float32)
EXPORT(BFloat16, bfloat16)
}
