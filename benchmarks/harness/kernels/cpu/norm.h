// Batch normalisation and the ReLU after it, each way in two passes over the maps instead of torch's five. Between the
// two, processes that train together may exchange what the first has found.
#pragma once
#include <type_traits>

#include "vectors.h"

namespace {

constexpr int BLOCK = 16384;  // values of a part of the maps, which fits the cache nearest to the core
constexpr int COLUMNS = REGISTERS / 8;  // vectors of a row taken at a time, of which up to four each have a constant

// Rows of few channels are taken several at a time, as one wide row, so that the additions do not wait for each other.
struct Shape {
    int64_t rows, channels, width, wide_rows;

    Shape(int64_t rows, int64_t channels) : rows(rows), channels(channels), width(channels), wide_rows(rows) {
        while (width < COLUMNS * LANES && wide_rows % 2 == 0) {
            width *= 2;
            wide_rows /= 2;
        }
    }

    Buffer<float> widen(const float* per_channel) const {
        Buffer<float> wide(width);
        for (int64_t i = 0; i < width; i++) wide[i] = per_channel[i % channels];
        return wide;
    }

    int64_t first_row(int thread, int threads) const { return wide_rows * thread / threads; }

    double narrow(const Buffer<double>& wide, int64_t channel) const {
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
        for (; column + COLUMNS * LANES <= shape.width; column += COLUMNS * LANES)
            body(std::integral_constant<int, COLUMNS>(), row, end, column);
        for (; column < shape.width; column += LANES) body(std::integral_constant<int, 1>(), row, end, column);
    }
}

template <int N>
struct Columns {
    Floats values[N];

    explicit Columns(const Buffer<float>& from, int64_t column) : Columns(&from[column]) {}

    explicit Columns(const float* from) {
        for (int v = 0; v < N; v++) values[v] = load(from + v * LANES);
    }

    Columns() {
        for (int v = 0; v < N; v++) values[v] = Floats{};
    }

    void add_to(double* sums) const {
        for (int v = 0; v < N; v++) add(sums + v * LANES, values[v]);
    }

    void store_to(float* to) const {
        for (int v = 0; v < N; v++) store(to + v * LANES, values[v]);
    }

    Floats operator[](int v) const { return values[v]; }
    Floats& operator[](int v) { return values[v]; }
};

// Normalises and activates the values of some columns of a row.
template <int N, class T, class U>
inline void activate(const T* from, const Columns<N>& scale, const Columns<N>& shift, U* to) {
    Floats active[N];
    for (int v = 0; v < N; v++) active[v] = activated<true>(load(from + v * LANES) * scale[v] + shift[v]);
    store_all(to, active);
}

// One double a column from each thread, added up in the order of the threads.
struct Partial {
    Buffer<double> sums, others;

    Partial(int threads, int64_t width) : sums(threads * width, 0), others(threads * width, 0) {}
};

// Writes to `moments` the mean of each channel, then the sums of its squared differences from that.
template <class T>
void norm_moments(const T* x, double* moments, int64_t rows, int64_t channels, int threads) {
    const Shape shape(rows, channels);
    const int64_t width = shape.width;
    // Sums of squares lose the digits that mean and deviation differ in, unless they are taken around a typical value.
    Buffer<float> center(channels);
    for (int64_t c = 0; c < channels; c += LANES) store(&center[c], load(x + c));
    const Buffer<float> centers = shape.widen(center.data());
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
        double sum = shape.narrow(partial.sums, c), squares = shape.narrow(partial.others, c) - sum * sum / rows;
        moments[c] = center[c] + sum / rows;
        moments[channels + c] = squares < 0 ? 0 : squares;
    }
}

// Writes mean, 1 / deviation, scale and shift of each channel to `saved`, and updates the running statistics.
inline void norm_scales(const double* moments, const float* weight, const float* bias, float* running_mean,
                        float* running_var, float* saved, int64_t rows, int64_t channels, float eps, float momentum) {
    float *mean = saved, *invstd = saved + channels, *scale = saved + 2 * channels, *shift = saved + 3 * channels;
    for (int64_t c = 0; c < channels; c++) {
        const double squares = moments[channels + c];
        mean[c] = float(moments[c]);
        invstd[c] = float(1 / __builtin_sqrt(squares / rows + eps));
        scale[c] = weight[c] * invstd[c];
        shift[c] = bias[c] - mean[c] * scale[c];
        running_mean[c] += momentum * (mean[c] - running_mean[c]);
        running_var[c] += momentum * (float(squares / (rows > 1 ? rows - 1 : 1)) - running_var[c]);
    }
}

template <bool RELU, class T>
void norm_forward(const T* x, T* y, const float* saved, int64_t rows, int64_t channels, int threads) {
    const Shape shape(rows, channels);
    const int64_t width = shape.width;
    const Buffer<float> scales = shape.widen(saved + 2 * channels), shifts = shape.widen(saved + 3 * channels);
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

// The second pass backward. `sums` has each channel's sum of `grad`, then that of `grad * (x - mean)`, over all the
// rows that were normalised together, `rows_of_all`; `own_sums` those of the rows here, whose gradients are asked for.
// `grad_past` is the gradient of what takes x past the normalisation, a shortcut; null where nothing does.
template <bool RELU, class T>
void norm_input_gradient(const T* grad_y, const T* grad_past, const T* x, T* grad_x, const float* saved,
                         const double* own_sums, const double* sums, float* grad_weight, float* grad_bias,
                         int64_t rows, int64_t rows_of_all, int64_t channels, int threads) {
    const Shape shape(rows, channels);
    const int64_t width = shape.width;
    const float *mean = saved, *invstd = saved + channels, *scale = saved + 2 * channels;
    Buffer<float> slope(channels), offset(channels);
    for (int64_t c = 0; c < channels; c++) {
        grad_bias[c] = float(own_sums[c]);
        grad_weight[c] = float(own_sums[channels + c] * invstd[c]);
        double per_value = -double(scale[c]) * invstd[c] * invstd[c] * sums[channels + c] / rows_of_all;
        slope[c] = float(per_value);
        offset[c] = float(-scale[c] * sums[c] / rows_of_all - per_value * mean[c]);
    }
    const Buffer<float> scales = shape.widen(scale), shifts = shape.widen(saved + 3 * channels);
    const Buffer<float> slopes = shape.widen(slope.data()), offsets = shape.widen(offset.data());
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

// The first pass backward, where there is no convolution that makes it.
template <bool RELU, class T>
void norm_sums(const T* grad_y, const T* x, const float* saved, double* sums, int64_t rows, int64_t channels,
               int threads) {
    const Shape shape(rows, channels);
    const int64_t width = shape.width;
    const Buffer<float> means = shape.widen(saved), scales = shape.widen(saved + 2 * channels),
                             shifts = shape.widen(saved + 3 * channels);
    Partial partial(threads, width);
#pragma omp parallel for num_threads(threads) schedule(static, 1)
    for (int thread = 0; thread < threads; thread++) {
        double *sum_of = &partial.sums[thread * width], *product_of = &partial.others[thread * width];
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
            sum.add_to(sum_of + column);
            products.add_to(product_of + column);
        });
    }
    for (int64_t c = 0; c < channels; c++) {
        sums[c] = shape.narrow(partial.sums, c);
        sums[channels + c] = shape.narrow(partial.others, c);
    }
}

}  // namespace
