// A residual unit that keeps its shape, in one call each way: three times normalisation, ReLU and convolution, of which
// the second is 3x3, and the sum with the input.
#pragma once
#include <algorithm>

#include "conv3x3.h"
#include "norm.h"
#include "pointwise.h"
#include "vectors.h"

namespace {

// What a normalisation and the convolution behind it learn and count. Python passes it as an array of addresses.
struct Layer {
    const float *norm_weight, *norm_bias;
    float *running_mean, *running_var;
    int64_t* updates;
    const float* weight;
};

struct LayerGradients {
    float *norm_weight, *norm_bias, *weight;
};

struct Unit {
    int64_t batch, height, width, channels, inner;

    int64_t rows() const { return batch * height * width; }
    Conv3x3 conv() const { return {batch, height, width, inner, inner, 1}; }
    int64_t widest() const { return std::max(channels, inner); }
};

template <class T>
void normalize(const T* x, const Layer& layer, float* saved, int64_t rows, int64_t channels, float eps, float momentum,
               double* moments, int threads) {
    ++*layer.updates;
    norm_moments(x, moments, rows, channels, threads);
    norm_scales(moments, layer.norm_weight, layer.norm_bias, layer.running_mean, layer.running_var, saved, rows,
                channels, eps, momentum);
}

// `maps` are the input, the outputs of the first and the second convolution, and the output. `saved` has what
// norm_scales writes for each normalisation in turn.
template <class T>
void unit_forward(T* const* maps, const Layer* layers, float* saved, const Unit& unit, float eps, float momentum,
                  int threads) {
    const T* x = maps[0];
    T *first = maps[1], *second = maps[2], *out = maps[3];
    const int64_t rows = unit.rows(), C = unit.channels, I = unit.inner;
    float *saved1 = saved, *saved2 = saved1 + 4 * C, *saved3 = saved2 + 4 * I;
    Buffer<double> moments(2 * unit.widest());
    normalize(x, layers[0], saved1, rows, C, eps, momentum, moments.data(), threads);
    pointwise_forward<T>(x, nullptr, first, saved1, layers[0].weight, rows, C, I, threads);
    normalize(first, layers[1], saved2, rows, I, eps, momentum, moments.data(), threads);
    conv3x3_forward<T>(first, second, saved2, layers[1].weight, unit.conv(), threads);
    normalize(second, layers[2], saved3, rows, I, eps, momentum, moments.data(), threads);
    pointwise_forward<T>(second, x, out, saved3, layers[2].weight, rows, I, C, threads);
}

// `maps` are the gradient of the output, the maps as forward without the output, room for the gradients of the two
// convolutions' outputs, and the gradient of the input.
template <class T>
void unit_backward(T* const* maps, const float* const* weights, const LayerGradients* grads, const float* saved,
                   const Unit& unit, int threads) {
    const T *grad_out = maps[0], *x = maps[1], *first = maps[2], *second = maps[3];
    T *grad_first = maps[4], *grad_second = maps[5], *grad_x = maps[6];
    const int64_t rows = unit.rows(), C = unit.channels, I = unit.inner;
    const float *saved1 = saved, *saved2 = saved1 + 4 * C, *saved3 = saved2 + 4 * I;
    Buffer<double> sums(2 * unit.widest());
    auto through_norm = [&](const T* map, T* grad, const T* past, const float* saved, const LayerGradients& to,
                            int64_t channels) {
        norm_input_gradient<false>(grad, past, map, grad, saved, sums.data(), sums.data(), to.norm_weight, to.norm_bias,
                                   rows, rows, channels, threads);
    };
    const T* nothing = nullptr;
    pointwise_backward(grad_out, second, grad_second, saved3, weights[2], grads[2].weight, sums.data(), rows, I, C,
                       threads);
    through_norm(second, grad_second, nothing, saved3, grads[2], I);
    conv3x3_backward<T>(grad_second, first, grad_first, saved2, weights[1], grads[1].weight, sums.data(), unit.conv(),
                        threads);
    through_norm(first, grad_first, nothing, saved2, grads[1], I);
    pointwise_backward<T>(grad_first, x, grad_x, saved1, weights[0], grads[0].weight, sums.data(), rows, C, I, threads);
    through_norm(x, grad_x, grad_out, saved1, grads[0], C);
}

}  // namespace
