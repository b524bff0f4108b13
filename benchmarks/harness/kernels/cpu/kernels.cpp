// The kernels that cpu_library.py builds with the system's compiler, without torch's headers, and calls by name.
//
// Maps are channels-last, seen as (rows, channels) with rows = batch * height * width, in float or bfloat16; everything
// per channel is float, what is exchanged between processes double.
#include <cstdint>

#include "conv3x3.h"
#include "gate.h"
#include "norm.h"
#include "pointwise.h"
#include "resample.h"
#include "unit.h"

// The types of the maps, as functions that ctypes finds by name.
#define EXPORT(TYPE, SUFFIX)                                                                                          \
    void norm_moments_##SUFFIX(const TYPE* x, double* moments, int64_t rows, int64_t channels, int threads) {         \
        norm_moments(x, moments, rows, channels, threads);                                                            \
    }                                                                                                                 \
    void norm_forward_##SUFFIX(const TYPE* x, TYPE* y, const float* saved, int64_t rows, int64_t channels, int relu,  \
                               int threads) {                                                                         \
        (relu ? norm_forward<true, TYPE> : norm_forward<false, TYPE>)(x, y, saved, rows, channels, threads);          \
    }                                                                                                                 \
    void norm_sums_##SUFFIX(const TYPE* grad_y, const TYPE* x, const float* saved, double* sums, int64_t rows,        \
                            int64_t channels, int relu, int threads) {                                                \
        (relu ? norm_sums<true, TYPE> : norm_sums<false, TYPE>)(grad_y, x, saved, sums, rows, channels, threads);     \
    }                                                                                                                 \
    void norm_input_gradient_##SUFFIX(const TYPE* grad_y, const TYPE* grad_past, const TYPE* x, TYPE* grad_x,         \
                                      const float* saved, const double* own_sums, const double* sums,                 \
                                      float* grad_weight, float* grad_bias, int64_t rows, int64_t rows_of_all,        \
                                      int64_t channels, int relu, int threads) {                                      \
        (relu ? norm_input_gradient<true, TYPE> : norm_input_gradient<false, TYPE>)(                                  \
            grad_y, grad_past, x, grad_x, saved, own_sums, sums, grad_weight, grad_bias, rows, rows_of_all, channels, \
            threads);                                                                                                 \
    }                                                                                                                 \
    void pointwise_forward_##SUFFIX(const TYPE* x, const TYPE* other, TYPE* y, const float* saved,                    \
                                    const float* weight, int64_t rows, int64_t channels_in, int64_t channels_out,     \
                                    int threads) {                                                                    \
        pointwise_forward(x, other, y, saved, weight, rows, channels_in, channels_out, threads);                      \
    }                                                                                                                 \
    void pointwise_backward_##SUFFIX(const TYPE* grad_y, const TYPE* x, TYPE* grad_norm, const float* saved,          \
                                     const float* weight, float* grad_weight, double* norm_sums, int64_t rows,        \
                                     int64_t channels_in, int64_t channels_out, int threads) {                        \
        pointwise_backward(grad_y, x, grad_norm, saved, weight, grad_weight, norm_sums, rows, channels_in,            \
                           channels_out, threads);                                                                    \
    }                                                                                                                 \
    void conv3x3_forward_##SUFFIX(const TYPE* x, TYPE* y, const float* saved, const float* weight, int64_t batch,     \
                                  int64_t height, int64_t width, int64_t channels_in, int64_t channels_out,           \
                                  int64_t stride, int threads) {                                                      \
        conv3x3_forward(x, y, saved, weight, {batch, height, width, channels_in, channels_out, stride}, threads);     \
    }                                                                                                                 \
    void conv3x3_backward_##SUFFIX(const TYPE* grad_y, const TYPE* x, TYPE* grad_norm, const float* saved,            \
                                   const float* weight, float* grad_weight, double* norm_sums, int64_t batch,         \
                                   int64_t height, int64_t width, int64_t channels_in, int64_t channels_out,          \
                                   int64_t stride, int threads) {                                                     \
        conv3x3_backward(grad_y, x, grad_norm, saved, weight, grad_weight, norm_sums,                                 \
                         {batch, height, width, channels_in, channels_out, stride}, threads);                         \
    }                                                                                                                 \
    void gate_forward_##SUFFIX(const TYPE* trunk, const TYPE* logits, TYPE* y, int64_t values, int threads) {         \
        gate_forward(trunk, logits, y, values, threads);                                                              \
    }                                                                                                                 \
    void gate_backward_##SUFFIX(const TYPE* grad_y, const TYPE* trunk, const TYPE* logits, TYPE* grad_trunk,          \
                                TYPE* grad_logits, int64_t values, int threads) {                                     \
        gate_backward(grad_y, trunk, logits, grad_trunk, grad_logits, values, threads);                               \
    }                                                                                                                 \
    void pool_forward_##SUFFIX(const TYPE* x, TYPE* y, uint8_t* taps, int64_t batch, int64_t height, int64_t width,   \
                               int64_t channels, int64_t low_height, int64_t low_width, int threads) {                \
        pool_forward(x, y, taps, {batch, height, width, channels, low_height, low_width}, threads);                   \
    }                                                                                                                 \
    void pool_backward_##SUFFIX(const TYPE* grad_y, const uint8_t* taps, TYPE* grad_x, int64_t batch,                 \
                                int64_t height, int64_t width, int64_t channels, int64_t low_height,                  \
                                int64_t low_width, int threads) {                                                     \
        pool_backward(grad_y, taps, grad_x, {batch, height, width, channels, low_height, low_width}, threads);        \
    }                                                                                                                 \
    void upsample_forward_##SUFFIX(const TYPE* x, TYPE* y, int64_t batch, int64_t height, int64_t width,              \
                                   int64_t channels, int64_t low_height, int64_t low_width, int threads) {            \
        upsample_forward(x, y, {batch, height, width, channels, low_height, low_width}, threads);                     \
    }                                                                                                                 \
    void upsample_backward_##SUFFIX(const TYPE* grad_y, TYPE* grad_x, int64_t batch, int64_t height, int64_t width,   \
                                    int64_t channels, int64_t low_height, int64_t low_width, int threads) {           \
        upsample_backward(grad_y, grad_x, {batch, height, width, channels, low_height, low_width}, threads);          \
    }                                                                                                                 \
    void unit_forward_##SUFFIX(TYPE* const* maps, const Layer* layers, float* saved, int64_t batch, int64_t height,   \
                               int64_t width, int64_t channels, int64_t inner, float eps, float momentum,             \
                               int threads) {                                                                         \
        unit_forward(maps, layers, saved, {batch, height, width, channels, inner}, eps, momentum, threads);           \
    }                                                                                                                 \
    void unit_backward_##SUFFIX(TYPE* const* maps, const float* const* weights, const LayerGradients* grads,          \
                                float* saved, int64_t batch, int64_t height, int64_t width, int64_t channels,         \
                                int64_t inner, int threads) {                                                         \
        unit_backward(maps, weights, grads, saved, {batch, height, width, channels, inner}, threads);                 \
    }

extern "C" {
void norm_scales_of(const double* moments, const float* weight, const float* bias, float* running_mean,
                    float* running_var, float* saved, int64_t rows, int64_t channels, float eps, float momentum) {
    norm_scales(moments, weight, bias, running_mean, running_var, saved, rows, channels, eps, momentum);
}

EXPORT(float, float32)
EXPORT(BFloat16, bfloat16)
}
