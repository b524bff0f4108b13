// The steps of a mask branch between resolutions, each way in one pass over the maps: 3x3 max-pooling with stride 2 and
// padding of one, and bilinear interpolation, corners not aligned.
#pragma once
#include <algorithm>
#include <vector>

#include "product.h"
#include "vectors.h"

namespace {

typedef uint8_t Bytes __attribute__((vector_size(LANES)));

inline void store(uint8_t* to, Ints values) {
    const Bytes bytes = __builtin_convertvector(values, Bytes);
    std::memcpy(to, &bytes, sizeof bytes);
}

// Bytes as integers; GCC takes them apart one by one unless told the instruction.
inline Ints load(const uint8_t* from) {
#if defined(__AVX512F__)
    return (Ints)_mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i*)from));
#elif defined(__AVX2__)
    return (Ints)_mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i*)from));
#else
    Bytes bytes;
    std::memcpy(&bytes, from, sizeof bytes);
    return __builtin_convertvector(bytes, Ints);
#endif
}

// Sizes of the maps: those at the higher resolution, and the other height and width.
struct Resample {
    int64_t batch, height, width, channels, low_height, low_width;
};

// Calls `body(vectors, image, y, column)` for each row of pixels, `height` to an image, and each panel of its channels.
template <class Body>
void each_row(int64_t batch, int64_t height, int64_t channels, int threads, const Body& body) {
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t row = 0; row < batch * height; row++)
        each_panel(channels, [&](auto vectors, int64_t k) { body(vectors, row / height, row % height, k); });
}

// `taps` says which of the nine values was the largest, for the way back. What is not a number is taken as the largest.
template <class T>
void pool_forward(const T* x, T* y, uint8_t* taps, const Resample& size, int threads) {
    const int64_t C = size.channels;
    each_row(size.batch, size.low_height, C, threads, [&](auto vectors, int64_t image, int64_t low_y, int64_t k) {
        constexpr int V = decltype(vectors)::value;
        for (int64_t low_x = 0; low_x < size.low_width; low_x++) {
            Floats best[V];
            Ints tap[V];
            bool any = false;
            for (int i = 0; i < 9; i++) {
                const int64_t at_y = 2 * low_y - 1 + i / 3, at_x = 2 * low_x - 1 + i % 3;
                if (at_y < 0 || at_y >= size.height || at_x < 0 || at_x >= size.width) continue;
                const T* from = x + ((image * size.height + at_y) * size.width + at_x) * C + k;
                for (int v = 0; v < V; v++) {
                    const Floats value = load(from + v * LANES);
                    const Ints larger = (value > best[v]) | (value != value);
                    best[v] = !any ? value : larger ? value : best[v];
                    tap[v] = !any ? Ints{} + i : larger ? Ints{} + i : tap[v];
                }
                any = true;
            }
            const int64_t to = ((image * size.low_height + low_y) * size.low_width + low_x) * C + k;
            store_all(y + to, best);
            for (int v = 0; v < V; v++) store(taps + to + v * LANES, tap[v]);
        }
    });
}

template <class T>
void pool_backward(const T* grad_y, const uint8_t* taps, T* grad_x, const Resample& size, int threads) {
    const int64_t C = size.channels;
    each_row(size.batch, size.height, C, threads, [&](auto vectors, int64_t image, int64_t y, int64_t k) {
        constexpr int V = decltype(vectors)::value;
        for (int64_t x = 0; x < size.width; x++) {
            Floats sum[V]{};
            for (int64_t low_y = y / 2; low_y <= std::min((y + 1) / 2, size.low_height - 1); low_y++)
                for (int64_t low_x = x / 2; low_x <= std::min((x + 1) / 2, size.low_width - 1); low_x++) {
                    const int64_t from = ((image * size.low_height + low_y) * size.low_width + low_x) * C + k;
                    const int tap = int((y + 1 - 2 * low_y) * 3 + x + 1 - 2 * low_x);
                    for (int v = 0; v < V; v++)
                        sum[v] += keep(load(taps + from + v * LANES) == tap, load(grad_y + from + v * LANES));
                }
            store_all(grad_x + ((image * size.height + y) * size.width + x) * C + k, sum);
        }
    });
}

// Along one side: between which two positions of the lower resolution each one of the higher lies, and the part that
// the second has in it. The other way round, those of the higher that position `j` of the lower has a part in, and that
// part: the entries from `begins[j]` to `begins[j + 1]` of `into` and `parts`.
struct Side {
    std::vector<int64_t> first, second;
    std::vector<float> part;
    std::vector<int64_t> begins, into;
    std::vector<float> parts;

    Side(int64_t low, int64_t high) {
        const float scale = float(low) / float(high);
        for (int64_t i = 0; i < high; i++) {
            const float at = std::max(0.f, (float(i) + 0.5f) * scale - 0.5f);
            first.push_back(std::min(int64_t(at), low - 1));
            second.push_back(std::min(first[i] + 1, low - 1));
            part.push_back(at - float(first[i]));
        }
        for (int64_t j = 0; j < low; j++) {
            begins.push_back(int64_t(into.size()));
            for (int64_t i = 0; i < high; i++)
                if (first[i] == j || second[i] == j) {
                    into.push_back(i);
                    parts.push_back((first[i] == j ? 1 - part[i] : 0) + (second[i] == j ? part[i] : 0));
                }
        }
        begins.push_back(int64_t(into.size()));
    }
};

template <class T>
void upsample_forward(const T* x, T* y, const Resample& size, int threads) {
    const int64_t C = size.channels;
    const Side down(size.low_height, size.height), along(size.low_width, size.width);
    each_row(size.batch, size.height, C, threads, [&](auto vectors, int64_t image, int64_t at, int64_t k) {
        constexpr int V = decltype(vectors)::value;
        const T* above = x + (image * size.low_height + down.first[at]) * size.low_width * C + k;
        const T* below = x + (image * size.low_height + down.second[at]) * size.low_width * C + k;
        for (int64_t column = 0; column < size.width; column++) {
            const int64_t left = along.first[column] * C, right = along.second[column] * C;
            const float low = down.part[at], late = along.part[column];
            const float weights[4] = {(1 - low) * (1 - late), (1 - low) * late, low * (1 - late), low * late};
            Floats sum[V];
            for (int v = 0; v < V; v++)
                sum[v] = load(above + left + v * LANES) * weights[0] + load(above + right + v * LANES) * weights[1] +
                         load(below + left + v * LANES) * weights[2] + load(below + right + v * LANES) * weights[3];
            store_all(y + ((image * size.height + at) * size.width + column) * C + k, sum);
        }
    });
}

template <class T>
void upsample_backward(const T* grad_y, T* grad_x, const Resample& size, int threads) {
    const int64_t C = size.channels;
    const Side down(size.low_height, size.height), along(size.low_width, size.width);
    each_row(size.batch, size.low_height, C, threads, [&](auto vectors, int64_t image, int64_t at, int64_t k) {
        constexpr int V = decltype(vectors)::value;
        for (int64_t column = 0; column < size.low_width; column++) {
            Floats sum[V]{};
            for (int64_t i = down.begins[at]; i < down.begins[at + 1]; i++)
                for (int64_t j = along.begins[column]; j < along.begins[column + 1]; j++) {
                    const int64_t row = image * size.height + down.into[i];
                    const T* from = grad_y + (row * size.width + along.into[j]) * C + k;
                    const float weight = down.parts[i] * along.parts[j];
                    for (int v = 0; v < V; v++) sum[v] += load(from + v * LANES) * weight;
                }
            store_all(grad_x + ((image * size.low_height + at) * size.low_width + column) * C + k, sum);
        }
    });
}

}  // namespace
