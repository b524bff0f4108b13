// A 1x1 convolution of a normalised and activated map. The activated map is made part by part in the cache and never
// written: forward that saves a pass out and a pass in, backward the gradient's too.
//
// K is the channels in, N those out, both multiples of LINE. Sums are in float. bfloat16 values are multiplied in
// pairs, so what is summed over, K forward, N and rows backward, is laid out in words of two.
#pragma once
#include <algorithm>
#include <vector>

#include "norm.h"
#include "vectors.h"

namespace {

// What a multiplication takes at once: `STEP` values of each factor, in a word.
template <class T>
struct Factor;

template <>
struct Factor<float> {
    typedef float Word;
    typedef Floats Vector;
    static constexpr int STEP = 1;

    static Word pack(const float* values) { return values[0]; }

    static Vector words(const Word* from) { return load(from); }

    static Floats multiply_add(Floats sum, Word a, Vector b) { return sum + a * b; }

    static void store_rows(Word* to, const Floats* rows) { store(to, rows[0]); }
};

template <>
struct Factor<BFloat16> {
    typedef uint32_t Word;
    typedef Words Vector;
    static constexpr int STEP = 2;

    static Word pack(const float* values) {
        Words words = rounded(Floats{values[0], values[1]});
        return words[0] | words[1] << 16;
    }

    static Vector words(const Word* from) {
        Words words;
        std::memcpy(&words, from, sizeof words);
        return words;
    }

    static Floats multiply_add(Floats sum, Word a, Vector b) {
        Words first = Words{} + a;
#ifdef __AVX512BF16__
        return (Floats)_mm512_dpbf16_ps((__m512)sum, (__m512bh)first, (__m512bh)b);
#else
        sum += (Floats)(first << 16) * (Floats)(b << 16);
        return sum + (Floats)(first & 0xffff0000) * (Floats)(b & 0xffff0000);
#endif
    }

    static void store_rows(Word* to, const Floats* rows) {
        Words words = rounded(rows[0]) | rounded(rows[1]) << 16;
        std::memcpy(to, &words, sizeof words);
    }
};

// The second factor of a product lies in panels of some columns, each with all its rows one after the other: rows as
// long as the matrix would be a power of two apart, and of such the cache holds few.
struct Panels {
    int bits = __builtin_ctz(REGISTERS / 8 * LANES);  // the columns of a panel are a power of two
    int64_t rows;                                     // for which there is room

    Panels(int64_t columns, int64_t rows) : rows(rows) {
        while (columns % width()) bits--;
    }

    int64_t width() const { return int64_t(1) << bits; }

    int64_t operator()(int64_t row, int64_t column) const {
        return (((column >> bits) * rows + row) << bits) + (column & (width() - 1));
    }
};

// The factors of a product of matrices: `rows` by `steps` words at `a`, of which the next in a row is `a_step` on and
// that of the next row `a_row`; and at `b`, in panels with room for `b_rows`, `steps` rows of `columns` words.
template <class Word>
struct Product {
    const Word* a;
    int64_t a_row, a_step, rows;
    const Word* b;
    int64_t b_rows, columns, steps;
};

template <class T, bool ADD, int ROWS, int VECTORS>
inline void tile(const Product<typename Factor<T>::Word>& p, int64_t row, int64_t column, float* out) {
    Floats sums[ROWS][VECTORS];
    out += row * p.columns + column;
    for (int r = 0; r < ROWS; r++)
        for (int v = 0; v < VECTORS; v++) sums[r][v] = ADD ? load(out + r * p.columns + v * LANES) : Floats{};
    const auto *a = p.a + row * p.a_row, *b = p.b + column * p.b_rows;
    for (int64_t step = 0; step < p.steps; step++, a += p.a_step, b += VECTORS * LANES) {
        typename Factor<T>::Vector vectors[VECTORS];
        for (int v = 0; v < VECTORS; v++) {
            vectors[v] = Factor<T>::words(b + v * LANES);
#if defined(__AVX__) && !defined(__AVX512F__)
            asm("" : "+x"(vectors[v]));  // else GCC loads it anew for each row
#endif
        }
        for (int r = 0; r < ROWS; r++)
            for (int v = 0; v < VECTORS; v++)
                sums[r][v] = Factor<T>::multiply_add(sums[r][v], a[r * p.a_row], vectors[v]);
    }
    for (int r = 0; r < ROWS; r++)
        for (int v = 0; v < VECTORS; v++) store(out + r * p.columns + v * LANES, sums[r][v]);
}

// Sums enough at a time that they need not wait for each other, and no more than there are registers, of which the
// second factor and what it is multiplied by take some. More than eight rows take more addresses than there are.
template <class T, bool ADD, int VECTORS>
void multiply_panels(const Product<typename Factor<T>::Word>& p, float* out) {
    constexpr int ROWS = std::min(8, REGISTERS / 2 / VECTORS);
    for (int64_t column = 0; column < p.columns; column += VECTORS * LANES) {
        int64_t row = 0;
        for (; row + ROWS <= p.rows; row += ROWS) tile<T, ADD, ROWS, VECTORS>(p, row, column, out);
        for (; row < p.rows; row++) tile<T, ADD, 1, VECTORS>(p, row, column, out);
    }
}

// out = a b, or out += a b
template <class T, bool ADD>
void multiply(const Product<typename Factor<T>::Word>& p, float* out) {
    constexpr int VECTORS = REGISTERS / 8;
    switch (Panels(p.columns, p.b_rows).width() / LANES) {
        case VECTORS: return multiply_panels<T, ADD, VECTORS>(p, out);
        case VECTORS / 2: return multiply_panels<T, ADD, VECTORS / 2>(p, out);
        default: return multiply_panels<T, ADD, 1>(p, out);
    }
}

// Calls `body(first row, last row, column)` for some rows of a line each, so that what belongs to the columns stays in
// registers, while the whole map is met about in its order.
template <class Body>
void each_line(int64_t rows, int64_t columns, const Body& body) {
    constexpr int64_t ROWS = 16;
    for (int64_t row = 0; row < rows; row += ROWS)
        for (int64_t column = 0; column < columns; column += LINE) body(row, std::min(row + ROWS, rows), column);
}

// Rows of a part of the maps, of which the cache holds all that is made of them.
inline int64_t part_rows(int64_t channels_in, int64_t channels_out) {
    return std::max<int64_t>(32, 16384 / (channels_in + channels_out) / 16 * 16);
}

// `weight`, which is (N, taps, K), as the second factor of a product for each tap: of those forward, which sum over K ...
template <class T>
std::vector<typename Factor<T>::Word> forward_words(
        const float* weight, int64_t taps, int64_t K, int64_t N, int threads) {
    constexpr int STEP = Factor<T>::STEP;
    const Panels place(N, K / STEP);
    std::vector<typename Factor<T>::Word> words(taps * K / STEP * N);
#pragma omp parallel for num_threads(threads) if (taps > 1)
    for (int64_t tap = 0; tap < taps; tap++)
        for (int64_t n = 0; n < N; n++)
            for (int64_t k = 0; k < K; k += STEP)
                words[tap * K / STEP * N + place(k / STEP, n)] = Factor<T>::pack(weight + (n * taps + tap) * K + k);
    return words;
}

// ... and of those backward, which sum over N.
template <class T>
std::vector<typename Factor<T>::Word> backward_words(
        const float* weight, int64_t taps, int64_t K, int64_t N, int threads) {
    constexpr int STEP = Factor<T>::STEP;
    const Panels place(K, N / STEP);
    std::vector<typename Factor<T>::Word> words(taps * N / STEP * K);
#pragma omp parallel for num_threads(threads) if (taps > 1)
    for (int64_t tap = 0; tap < taps; tap++)
        for (int64_t n = 0; n < N; n += STEP)
            for (int64_t k = 0; k < K; k += LANES) {
                const Floats rows[2] = {load(weight + (n * taps + tap) * K + k),
                                        load(weight + ((n + STEP - 1) * taps + tap) * K + k)};
                Factor<T>::store_rows(&words[tap * N / STEP * K + place(n / STEP, k)], rows);
            }
    return words;
}

// Adds up what each thread has, in the order of the threads, and keeps the sum alone.
template <class Number>
void add_threads(std::vector<Number>& values, int threads) {
    const int64_t size = values.size() / threads;
    for (int thread = 1; thread < threads; thread++)
        for (int64_t i = 0; i < size; i++) values[i] += values[thread * size + i];
    values.resize(size);
}

// y = weight * relu(norm(x)) + other; `other` may be null.
template <class T>
void pointwise_forward(const T* x, const T* other, T* y, const float* saved, const float* weight, int64_t rows,
                       int64_t K, int64_t N, int threads) {
    typedef Factor<T> F;
    typedef typename F::Word Word;
    const float *scale = saved + 2 * K, *shift = saved + 3 * K;
    const std::vector<Word> packed = forward_words<T>(weight, 1, K, N, threads);
    const int64_t part = part_rows(K, N);
#pragma omp parallel for num_threads(threads) schedule(static, 1)
    for (int thread = 0; thread < threads; thread++) {
        std::vector<T> activations(part * K);
        std::vector<float> sums(part * N);
        const int64_t last = rows * (thread + 1) / threads;
        for (int64_t row = rows * thread / threads; row < last; row += part) {
            const int64_t count = std::min(part, last - row);
            each_line(count, K, [&](int64_t first, int64_t end, int64_t k) {
                const Line a(scale + k), b(shift + k);
                for (int64_t i = first * K + k; i < end * K; i += K)
                    for (int v = 0; v < VECTORS_OF_LINE; v++)
                        store(&activations[i + v * LANES],
                              activated<true>(load(x + row * K + i + v * LANES) * a[v] + b[v]));
            });
            multiply<T, false>({reinterpret_cast<const Word*>(activations.data()), K / F::STEP, 1, count,
                                packed.data(), K / F::STEP, N, K / F::STEP}, sums.data());
            for (int64_t i = 0; i < count * N; i += LANES) {
                Floats sum = load(&sums[i]);
                store(y + row * N + i, other ? sum + load(other + row * N + i) : sum);
            }
        }
    }
}

// Rows as a sum over rows takes them: a word has a value of each of `STEP` rows, zeros for those beyond the last.
inline const float* words_of_rows(const float* rows, int64_t, int64_t, std::vector<float>&) { return rows; }

inline const uint32_t* words_of_rows(
        const BFloat16* rows, int64_t count, int64_t width, std::vector<uint32_t>& buffer) {
    for (int64_t r = 0; r < count; r += 2)
        for (int64_t c = 0; c < width; c += LANES) {
            const Floats both[2] = {
                load(rows + r * width + c), r + 1 < count ? load(rows + (r + 1) * width + c) : Floats{}};
            Factor<BFloat16>::store_rows(&buffer[r / 2 * width + c], both);
        }
    return buffer.data();
}

// The gradients of `weight` and of the normalised map, with each channel's sum of the latter, then of its product with
// `x - mean`: the first pass backward of the normalisation. The gradient of `other` is `grad_y` itself.
template <class T>
void pointwise_backward(const T* grad_y, const T* x, T* grad_norm, const float* saved, const float* weight,
                        float* grad_weight, double* norm_sums, int64_t rows, int64_t K, int64_t N, int threads) {
    typedef Factor<T> F;
    typedef typename F::Word Word;
    const float *mean = saved, *scale = saved + 2 * K, *shift = saved + 3 * K;
    const std::vector<Word> packed = backward_words<T>(weight, 1, K, N, threads);
    const int64_t part = part_rows(K, N);
    const Panels place(K, part / F::STEP);
    std::vector<double> sums(threads * 2 * K);
    std::vector<float> grad_weights(threads * N * K);
#pragma omp parallel for num_threads(threads) schedule(static, 1)
    for (int thread = 0; thread < threads; thread++) {
        std::vector<float> grads(part * K), part_sums(2 * K);
        std::vector<Word> activations(part * K), grad_words(part * N);
        const int64_t last = rows * (thread + 1) / threads;
        for (int64_t row = rows * thread / threads; row < last; row += part) {
            const int64_t count = std::min(part, last - row), steps = (count + F::STEP - 1) / F::STEP;
            const T* grad = grad_y + row * N;
            multiply<T, false>({reinterpret_cast<const Word*>(grad), N / F::STEP, 1, count, packed.data(),
                                N / F::STEP, K, N / F::STEP}, grads.data());
            std::fill(part_sums.begin(), part_sums.end(), 0.f);
            each_line(count, K, [&](int64_t first, int64_t end, int64_t k) {
                const Line a(scale + k), b(shift + k), middle(mean + k);
                Line sum(&part_sums[k]), product(&part_sums[K + k]);
                for (int64_t step = first / F::STEP; step * F::STEP < end; step++)
                    for (int v = 0; v < VECTORS_OF_LINE; v++) {
                        const int64_t column = k + v * LANES;
                        Floats active[F::STEP]{};
                        for (int64_t i = 0, r = step * F::STEP; i < F::STEP && r < end; i++, r++) {
                            Floats value = load(x + (row + r) * K + column), input = value * a[v] + b[v];
                            Floats passing = passed<true>(load(&grads[r * K + column]), input);
                            store(grad_norm + (row + r) * K + column, passing);
                            active[i] = activated<true>(input);
                            sum[v] += passing;
                            product[v] += passing * (value - middle[v]);
                        }
                        F::store_rows(&activations[place(step, column)], active);
                    }
                sum.store_to(&part_sums[k]);
                product.store_to(&part_sums[K + k]);
            });
            for (int64_t i = 0; i < 2 * K; i += LANES) add(&sums[thread * 2 * K + i], load(&part_sums[i]));
            multiply<T, true>({words_of_rows(grad, count, N, grad_words), 1, N, N, activations.data(),
                               part / F::STEP, K, steps},
                              &grad_weights[thread * N * K]);
        }
    }
    add_threads(sums, threads), add_threads(grad_weights, threads);
    std::copy(sums.begin(), sums.end(), norm_sums);
    std::copy(grad_weights.begin(), grad_weights.end(), grad_weight);
}

}  // namespace
