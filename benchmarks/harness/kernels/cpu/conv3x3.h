// A 3x3 convolution, with padding of one pixel, of a normalised and activated map, which is made part by part in the
// cache and never written.
//
// It is a sum of products of matrices, one for each position of the output and each of the nine taps that lie inside
// the map there, of which the rows are images. So nothing is padded, and on small maps, where most taps lie outside,
// most of the multiplications fall away.
#pragma once
#include <algorithm>
#include <vector>

#include "norm.h"
#include "pointwise.h"
#include "product.h"
#include "vectors.h"

namespace {

constexpr int TAPS = 9;

// Sizes of the maps in and out: K and N channels.
struct Conv3x3 {
    int64_t batch, height, width, K, N, stride;

    int64_t height_out() const { return (height - 1) / stride + 1; }
    int64_t width_out() const { return (width - 1) / stride + 1; }
    int64_t positions() const { return height * width; }
    int64_t positions_out() const { return height_out() * width_out(); }

    // Images whose maps the cache holds.
    int64_t part() const { return std::max<int64_t>(16, 65536 / (positions() * std::max(K, N)) / 16 * 16); }

    // The position that each tap sees from each position of the output, -1 outside of the map.
    std::vector<int64_t> seen() const {
        std::vector<int64_t> table;
        for (int64_t y = 0; y < height_out(); y++)
            for (int64_t x = 0; x < width_out(); x++)
                for (int tap = 0; tap < TAPS; tap++) {
                    int64_t seen_y = y * stride + tap / 3 - 1, seen_x = x * stride + tap % 3 - 1;
                    bool outside = seen_y < 0 || seen_y >= height || seen_x < 0 || seen_x >= width;
                    table.push_back(outside ? -1 : seen_y * width + seen_x);
                }
        return table;
    }

    // The position of the output from which each tap sees each position, -1 if there is none.
    std::vector<int64_t> seen_from() const {
        std::vector<int64_t> table(positions() * TAPS, -1), inverse = seen();
        for (int64_t i = 0; i < int64_t(inverse.size()); i++)
            if (inverse[i] >= 0) table[inverse[i] * TAPS + i % TAPS] = i / TAPS;
        return table;
    }
};

// `weight` is (N, taps, K).
template <class T>
void conv3x3_forward(const T* x, T* y, const float* saved, const float* weight, const Conv3x3& conv, int threads) {
    typedef Factor<T> F;
    typedef typename F::Word Word;
    const int64_t K = conv.K, N = conv.N, words = K / F::STEP, positions = conv.positions();
    const float *scale = saved + 2 * K, *shift = saved + 3 * K;
    const Buffer<Word> packed = forward_words<T>(weight, TAPS, K, N, threads);
    const int64_t part = conv.part();
    const std::vector<int64_t> seen = conv.seen();
#pragma omp parallel for num_threads(threads) schedule(static, 1)
    for (int thread = 0; thread < threads; thread++) {
        Buffer<typename F::Value> activations(positions * part * K);  // by position, then by image
        Buffer<float> sums(part * N);
        const int64_t last = conv.batch * (thread + 1) / threads;
        for (int64_t image = conv.batch * thread / threads; image < last; image += part) {
            const int64_t count = std::min(part, last - image);
            each_panel(K, [&](auto vectors, int64_t k) {
                constexpr int V = decltype(vectors)::value;
                const Columns<V> a(scale + k), b(shift + k);
                for (int64_t i = 0; i < count; i++)
                    for (int64_t position = 0; position < positions; position++)
                        activate(x + ((image + i) * positions + position) * K + k, a, b,
                                 &activations[(position * part + i) * K + k]);
            });
            for (int64_t position = 0; position < conv.positions_out(); position++) {
                Sum<T> products({words, 1, count, words, N, words}, sums.data(), false);
                for (int tap = 0; tap < TAPS; tap++) {
                    const int64_t at = seen[position * TAPS + tap];
                    if (at >= 0)
                        products(reinterpret_cast<const Word*>(&activations[at * part * K]), &packed[tap * words * N]);
                }
                products.finish_into(y + (image * conv.positions_out() + position) * N, conv.positions_out() * N);
            }
        }
    }
}

// Lays `count` maps of T out by position, and at each as a sum over images takes them. `place` says where; `make`
// returns, for the vectors of a panel, what turns each of their values into what is laid out.
template <class T, class Place, class Make>
void words_of_images(const T* maps, int64_t count, int64_t part, int64_t positions, int64_t channels,
                     typename Factor<T>::Word* words, const Place& place, const Make& make) {
    constexpr int STEP = Factor<T>::STEP;
    each_panel(channels, [&](auto vectors, int64_t first) {
        constexpr int V = decltype(vectors)::value;
        const auto made = make(vectors, first);
        for (int64_t i = 0; i < count; i += STEP) {
            auto* to = words + place(i / STEP, first);
            for (int64_t position = 0; position < positions; position++, to += part / STEP * channels)
                for (int v = 0; v < V; v++) {
                    Floats values[STEP]{};
                    for (int64_t s = 0; s < STEP && i + s < count; s++) {
                        const int64_t row = (i + s) * positions + position;
                        values[s] = made(load(maps + row * channels + first + v * LANES), v);
                    }
                    Factor<T>::store_rows(to + v * LANES, values);
                }
        }
    });
}

// As pointwise_backward.
template <class T>
void conv3x3_backward(const T* grad_y, const T* x, T* grad_norm, const float* saved, const float* weight,
                      float* grad_weight, double* norm_sums, const Conv3x3& conv, int threads) {
    typedef Factor<T> F;
    typedef typename F::Word Word;
    const int64_t K = conv.K, N = conv.N, words = N / F::STEP;
    const int64_t positions = conv.positions(), positions_out = conv.positions_out();
    const float *mean = saved, *scale = saved + 2 * K, *shift = saved + 3 * K;
    const Buffer<Word> packed = backward_words<T>(weight, TAPS, K, N, threads);
    const int64_t part = conv.part();
    const std::vector<int64_t> seen = conv.seen(), seen_from = conv.seen_from();
    Buffer<double> sums(threads * 2 * K, 0);
    Buffer<float> grad_weights(threads * TAPS * N * K);
#pragma omp parallel for num_threads(threads) schedule(static, 1)
    for (int thread = 0; thread < threads; thread++) {
        std::fill_n(&grad_weights[thread * TAPS * N * K], TAPS * N * K, 0.f);
        Buffer<Word> activations(positions * part / F::STEP * K), grads(positions_out * part / F::STEP * N);
        Buffer<float> input_grads(part * K), part_sums(2 * K);
        const int64_t last = conv.batch * (thread + 1) / threads;
        for (int64_t image = conv.batch * thread / threads; image < last; image += part) {
            const int64_t count = std::min(part, last - image), steps = (count + F::STEP - 1) / F::STEP;
            const T *maps = x + image * positions * K, *above = grad_y + image * positions_out * N;
            words_of_images(maps, count, part, positions, K, activations.data(), Panels(K, part / F::STEP),
                            [=](auto vectors, int64_t k) {
                constexpr int V = decltype(vectors)::value;
                return [a = Columns<V>(scale + k), b = Columns<V>(shift + k)](Floats value, int v) {
                    return activated<true>(value * a[v] + b[v]);
                };
            });
            words_of_images(above, count, part, positions_out, N, grads.data(),
                            [=](int64_t row, int64_t n) { return row * N + n; },
                            [](auto, int64_t) { return [](Floats value, int) { return value; }; });
            for (int tap = 0; tap < TAPS; tap++) {
                Sum<T> products({1, N, N, part / F::STEP, K, steps}, &grad_weights[(thread * TAPS + tap) * N * K],
                                true);
                for (int64_t position = 0; position < positions_out; position++) {
                    const int64_t at = seen[position * TAPS + tap];
                    if (at >= 0) products(&grads[position * part / F::STEP * N], &activations[at * part / F::STEP * K]);
                }
                products.finish();
            }
            // Not too many values are added up in float.
            int64_t summed = 0;
            auto add_part = [&] {
                for (int64_t i = 0; i < 2 * K; i += LANES) add(&sums[thread * 2 * K + i], load(&part_sums[i]));
                std::fill(part_sums.begin(), part_sums.end(), 0.f);
                summed = 0;
            };
            std::fill(part_sums.begin(), part_sums.end(), 0.f);
            for (int64_t position = 0; position < positions; position++) {
                // Where a word has one value, the rows are there by position already, one after the other.
                const bool apart = F::STEP > 1;
                Sum<T> products({apart ? positions_out * words : N, 1, count, words, K, words}, input_grads.data(),
                                false);
                for (int tap = 0; tap < TAPS; tap++) {
                    const int64_t from = seen_from[position * TAPS + tap];
                    if (from < 0) continue;
                    products(apart ? reinterpret_cast<const Word*>(above + from * N) : &grads[from * part * N],
                             &packed[tap * words * K]);
                }
                products.finish();
                each_panel(K, [&](auto vectors, int64_t k) {
                    constexpr int V = decltype(vectors)::value;
                    const Columns<V> a(scale + k), b(shift + k), middle(mean + k);
                    Columns<V> sum(&part_sums[k]), product(&part_sums[K + k]);
                    for (int64_t i = 0; i < count; i++) {
                        const int64_t at = (i * positions + position) * K + k;
                        Floats passing[V];
                        for (int v = 0; v < V; v++) {
                            Floats value = load(maps + at + v * LANES);
                            passing[v] = passed<true>(load(&input_grads[i * K + k + v * LANES]), value * a[v] + b[v]);
                            sum[v] += passing[v];
                            product[v] += passing[v] * (value - middle[v]);
                        }
                        store_all(grad_norm + image * positions * K + at, passing);
                    }
                    sum.store_to(&part_sums[k]);
                    product.store_to(&part_sums[K + k]);
                });
                if ((summed += count) >= 1024) add_part();
            }
            add_part();
        }
    }
    add_threads(sums, threads), add_threads(grad_weights, threads);
    std::copy(sums.begin(), sums.end(), norm_sums);
    for (int tap = 0; tap < TAPS; tap++)
        for (int64_t n = 0; n < N; n++)
            std::copy_n(&grad_weights[(tap * N + n) * K], K, grad_weight + (n * TAPS + tap) * K);
}

}  // namespace
