// A 1x1 convolution of a normalised and activated map. The activated map is made part by part in the cache and never
// written: forward that saves a pass out and a pass in, backward the gradient's too.
//
// K is the channels in, N those out, both multiples of CHANNELS. What is summed over is K forward, N and rows backward.
#pragma once
#include <algorithm>

#include "norm.h"
#include "product.h"
#include "vectors.h"

namespace {

// Rows of a part of the maps, of which the cache holds all that is made of them.
inline int64_t part_rows(int64_t channels_in, int64_t channels_out) {
    return std::max<int64_t>(32, 32768 / (channels_in + channels_out) / 16 * 16);
}

// `weight`, which is (N, taps, K), as the second factor of a product for each tap: of those forward, which sum over K ...
template <class T>
Buffer<typename Factor<T>::Word> forward_words(
        const float* weight, int64_t taps, int64_t K, int64_t N, int threads) {
    constexpr int STEP = Factor<T>::STEP;
    const Panels place(N, K / STEP);
    Buffer<typename Factor<T>::Word> words(taps * K / STEP * N);
#pragma omp parallel for collapse(2) num_threads(threads) if (taps * N * K > 16384)
    for (int64_t tap = 0; tap < taps; tap++)
        for (int64_t n = 0; n < N; n++)
            for (int64_t k = 0; k < K; k += STEP)
                words[tap * K / STEP * N + place(k / STEP, n)] = Factor<T>::pack(weight + (n * taps + tap) * K + k);
    return words;
}

// ... and of those backward, which sum over N.
template <class T>
Buffer<typename Factor<T>::Word> backward_words(
        const float* weight, int64_t taps, int64_t K, int64_t N, int threads) {
    constexpr int STEP = Factor<T>::STEP;
    const Panels place(K, N / STEP);
    Buffer<typename Factor<T>::Word> words(taps * N / STEP * K);
#pragma omp parallel for collapse(2) num_threads(threads) if (taps * N * K > 16384)
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
void add_threads(Buffer<Number>& values, int threads) {
    const int64_t size = values.size() / threads, part = 1024;
#pragma omp parallel for num_threads(threads) if (values.size() > 65536)
    for (int64_t first = 0; first < size; first += part) {
        const int64_t last = std::min(size, first + part);
        for (int thread = 1; thread < threads; thread++)
            for (int64_t i = first; i < last; i++) values[i] += values[thread * size + i];
    }
    values.resize(size);
}

// y = weight * relu(norm(x)) + other; `other` may be null.
template <class T>
void pointwise_forward(const T* x, const T* other, T* y, const float* saved, const float* weight, int64_t rows,
                       int64_t K, int64_t N, int threads) {
    typedef Factor<T> F;
    typedef typename F::Word Word;
    const float *scale = saved + 2 * K, *shift = saved + 3 * K;
    const Buffer<Word> packed = forward_words<T>(weight, 1, K, N, threads);
    const int64_t part = part_rows(K, N);
#pragma omp parallel for num_threads(threads) schedule(static, 1)
    for (int thread = 0; thread < threads; thread++) {
        Buffer<typename F::Value> activations(part * K);
        const int64_t last = rows * (thread + 1) / threads;
        for (int64_t row = rows * thread / threads; row < last; row += part) {
            const int64_t count = std::min(part, last - row);
            each_panel(K, [&](auto vectors, int64_t k) {
                constexpr int V = decltype(vectors)::value;
                const Columns<V> a(scale + k), b(shift + k);
                for (int64_t r = 0; r < count; r++)
                    activate(x + (row + r) * K + k, a, b, &activations[r * K + k]);
            });
            const Term<Word> term{reinterpret_cast<const Word*>(activations.data()), packed.data()};
            multiply<T>({K / F::STEP, 1, count, K / F::STEP, N, K / F::STEP, &term},
                        Into<T>{y + row * N, N, other ? other + row * N : nullptr, N});
        }
    }
}

// Rows as a product takes them that sums over their columns ...
inline const float* words_of_columns(const float* rows, int64_t, Buffer<float>&) { return rows; }

#if BF16_PRODUCTS
inline const uint32_t* words_of_columns(const BFloat16* rows, int64_t, Buffer<uint32_t>&) {
    return reinterpret_cast<const uint32_t*>(rows);
}
#else
inline const float* words_of_columns(const BFloat16* rows, int64_t values, Buffer<float>& buffer) {
    for (int64_t i = 0; i < values; i += LANES) store(&buffer[i], load(rows + i));
    return buffer.data();
}
#endif

// ... and as one that sums over the rows: a word has a value of each of `STEP` rows, zeros for those beyond the last.
// Where it has one alone, that is the same, and there already.
inline const float* words_of_rows(const float* words, const void*, int64_t, int64_t, Buffer<float>&) { return words; }

#if BF16_PRODUCTS
inline const uint32_t* words_of_rows(
        const uint32_t*, const BFloat16* rows, int64_t count, int64_t width, Buffer<uint32_t>& buffer) {
    int64_t r = 0;
    for (; r + 1 < count; r += 2)
        for (int64_t c = 0; c < width; c += LANES)
            Factor<BFloat16>::store_rows(&buffer[r / 2 * width + c], rows + r * width + c, rows + (r + 1) * width + c);
    if (r < count)
        for (int64_t c = 0; c < width; c += LANES) {
            const Floats both[2] = {load(rows + r * width + c), Floats{}};
            Factor<BFloat16>::store_rows(&buffer[r / 2 * width + c], both);
        }
    return buffer.data();
}
#endif

// The gradients of `weight` and of the normalised map, with each channel's sum of the latter, then of its product with
// `x - mean`: the first pass backward of the normalisation. The gradient of `other` is `grad_y` itself.
template <class T>
void pointwise_backward(const T* grad_y, const T* x, T* grad_norm, const float* saved, const float* weight,
                        float* grad_weight, double* norm_sums, int64_t rows, int64_t K, int64_t N, int threads) {
    typedef Factor<T> F;
    typedef typename F::Word Word;
    const float *mean = saved, *scale = saved + 2 * K, *shift = saved + 3 * K;
    const Buffer<Word> packed = backward_words<T>(weight, 1, K, N, threads);
    const int64_t part = part_rows(K, N);
    const Panels place(K, part / F::STEP);
    Buffer<double> sums(threads * 2 * K, 0);
    Buffer<float> grad_weights(threads * N * K);
#pragma omp parallel for num_threads(threads) schedule(static, 1)
    for (int thread = 0; thread < threads; thread++) {
        std::fill_n(&grad_weights[thread * N * K], N * K, 0.f);
        Buffer<float> grads(part * K), part_sums(2 * K);
        Buffer<Word> activations(part * K), grad_words(part * N);
        const int64_t last = rows * (thread + 1) / threads;
        for (int64_t row = rows * thread / threads; row < last; row += part) {
            const int64_t count = std::min(part, last - row), steps = (count + F::STEP - 1) / F::STEP;
            const Word* grad = words_of_columns(grad_y + row * N, count * N, grad_words);
            const Term<Word> term{grad, packed.data()};
            multiply<T>({N / F::STEP, 1, count, N / F::STEP, K, N / F::STEP, &term}, Into<float>{grads.data(), K});
            each_panel(K, [&](auto vectors, int64_t k) {
                constexpr int V = decltype(vectors)::value;
                const Columns<V> a(scale + k), b(shift + k), middle(mean + k);
                Columns<V> sum, product;
                Word* to = &activations[place(0, k)];
                const T* from = x + row * K + k;
                T* out = grad_norm + row * K + k;
                const float* above = &grads[k];
                for (int64_t r = 0; r < count; r += F::STEP, to += V * LANES) {
                    Floats active[V][F::STEP]{};
                    for (int64_t i = 0; i < F::STEP && r + i < count; i++) {
                        Floats passing[V];
                        for (int v = 0; v < V; v++) {
                            const int64_t at = (r + i) * K + v * LANES;
                            Floats value = load(from + at), input = value * a[v] + b[v];
                            passing[v] = passed<true>(load(above + at), input);
                            active[v][i] = activated<true>(input);
                            sum[v] += passing[v];
                            product[v] += passing[v] * (value - middle[v]);
                        }
                        store_all(out + (r + i) * K, passing);
                    }
                    for (int v = 0; v < V; v++) F::store_rows(to + v * LANES, active[v]);
                }
                sum.store_to(&part_sums[k]);
                product.store_to(&part_sums[K + k]);
            });
            for (int64_t i = 0; i < 2 * K; i += LANES) add(&sums[thread * 2 * K + i], load(&part_sums[i]));
            const Term<Word> weight_term{
                words_of_rows(grad, grad_y + row * N, count, N, grad_words), activations.data()};
            float* weights = &grad_weights[thread * N * K];
            multiply<T>({1, N, N, part / F::STEP, K, steps, &weight_term}, Into<float>{weights, K, weights, K});
        }
    }
    add_threads(sums, threads), add_threads(grad_weights, threads);
    std::copy(sums.begin(), sums.end(), norm_sums);
    std::copy(grad_weights.begin(), grad_weights.end(), grad_weight);
}

}  // namespace
