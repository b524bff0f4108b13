// The kernels that cpu_kernels.py builds with the system's compiler, without torch's headers, and calls by name.
//
// Maps are channels-last, seen as (rows, channels) with rows = batch * height * width, in float or bfloat16; everything
// per channel is float.
#include <cstdint>

#include "conv3x3.h"
#include "gate.h"
#include "norm.h"
#include "pointwise.h"

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
    void norm_statistics_##SUFFIX(const TYPE* x, const float* weight, const float* bias, float* mean, float* var,     \
                                  float* saved, int64_t rows, int64_t channels, float eps, float momentum,            \
                                  int threads) {                                                                      \
        norm_statistics(x, weight, bias, mean, var, saved, rows, channels, eps, momentum, threads);                   \
    }                                                                                                                 \
    void pointwise_forward_##SUFFIX(const TYPE* x, const TYPE* other, TYPE* y, const float* saved,                    \
                                    const float* weight, int64_t rows, int64_t channels_in, int64_t channels_out,     \
                                    int threads) {                                                                    \
        pointwise_forward(x, other, y, saved, weight, rows, channels_in, channels_out, threads);                      \
    }                                                                                                                 \
    void pointwise_backward_##SUFFIX(const TYPE* grad_y, const TYPE* grad_past, const TYPE* x, TYPE* grad_x,          \
                                     const float* saved, const float* weight, float* grad_weight,                     \
                                     float* grad_norm_weight, float* grad_norm_bias, int64_t rows,                    \
                                     int64_t channels_in, int64_t channels_out, int threads) {                        \
        pointwise_backward(grad_y, grad_past, x, grad_x, saved, weight, grad_weight, grad_norm_weight,                \
                           grad_norm_bias, rows, channels_in, channels_out, threads);                                 \
    }                                                                                                                 \
    void conv3x3_forward_##SUFFIX(const TYPE* x, TYPE* y, const float* saved, const float* weight, int64_t batch,     \
                                  int64_t height, int64_t width, int64_t channels_in, int64_t channels_out,           \
                                  int64_t stride, int threads) {                                                      \
        conv3x3_forward(x, y, saved, weight, {batch, height, width, channels_in, channels_out, stride}, threads);     \
    }                                                                                                                 \
    void conv3x3_backward_##SUFFIX(const TYPE* grad_y, const TYPE* grad_past, const TYPE* x, TYPE* grad_x,            \
                                   const float* saved, const float* weight, float* grad_weight,                       \
                                   float* grad_norm_weight, float* grad_norm_bias, int64_t batch, int64_t height,     \
                                   int64_t width, int64_t channels_in, int64_t channels_out, int64_t stride,          \
                                   int threads) {                                                                     \
        conv3x3_backward(grad_y, grad_past, x, grad_x, saved, weight, grad_weight, grad_norm_weight,                  \
                         grad_norm_bias, {batch, height, width, channels_in, channels_out, stride}, threads);         \
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
