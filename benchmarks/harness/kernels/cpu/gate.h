// The gate of an Attention Module, each way in one pass over the maps.
#pragma once
#include "vectors.h"

namespace {

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
