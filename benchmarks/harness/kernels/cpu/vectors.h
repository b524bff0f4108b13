// Vectors of floats as wide as the processor's, and maps in float or bfloat16 that are read and written as such.
#pragma once
#include <cstdint>
#include <cstring>
#include <new>
#include <type_traits>
#include <vector>
#ifdef __AVX2__
#include <immintrin.h>
#endif

// Whether bfloat16 values are multiplied in pairs: where cpu_library.py says that the processor is fast at it, and the
// compiler has the instruction too.
#if defined(PREFER_BF16_PRODUCTS) && defined(__AVX512BF16__)
#define BF16_PRODUCTS 1
#else
#define BF16_PRODUCTS 0
#endif

namespace {

// Floats of a vector, and how many vectors the processor holds. A wider vector than it has would live in memory.
#if defined(__AVX512F__)
constexpr int LANES = 16, REGISTERS = 32;
#elif defined(__AVX__)
constexpr int LANES = 8, REGISTERS = 16;
#else
constexpr int LANES = 4, REGISTERS = 16;
#endif
typedef float Floats __attribute__((vector_size(4 * LANES)));
typedef int32_t Ints __attribute__((vector_size(4 * LANES)));
typedef uint32_t Words __attribute__((vector_size(4 * LANES)));
typedef uint16_t Halves __attribute__((vector_size(2 * LANES)));
typedef double Doubles __attribute__((vector_size(8 * LANES)));

constexpr int CHANNELS = 16;  // a row has a multiple of it
static_assert(CHANNELS % LANES == 0, "rows of channels are taken in whole vectors too");

struct BFloat16 {
    uint16_t bits;
};

// Memory that begins where a line of the cache does: vectors that lie across two lines are read and written twice.
template <class T>
struct Aligned {
    typedef T value_type;
    static constexpr std::align_val_t LINE_OF_CACHE{64};

    Aligned() = default;
    template <class U>
    Aligned(const Aligned<U>&) {}

    T* allocate(size_t n) { return static_cast<T*>(::operator new(n * sizeof(T), LINE_OF_CACHE)); }
    void deallocate(T* from, size_t) { ::operator delete(from, LINE_OF_CACHE); }

    // What is to be zero says so; most is written before it is read.
    template <class U>
    void construct(U* value) { ::new (static_cast<void*>(value)) U; }
    template <class U, class V>
    void construct(U* value, const V& other) { ::new (static_cast<void*>(value)) U(other); }

    bool operator==(const Aligned&) const { return true; }
    bool operator!=(const Aligned&) const { return false; }
};

template <class T>
using Buffer = std::vector<T, Aligned<T>>;

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

// The bits of the nearest bfloat16, the even one of two, of each value.
inline Words rounded(Floats value) {
#ifdef __AVX512BF16__
    return (Words)_mm512_cvtepu16_epi32((__m256i)_mm512_cvtneps_pbh((__m512)value));
#else
    Words bits = (Words)value;
    Words is_nan = (Words)(value != value);
    return (((bits + 0x7fff + ((bits >> 16) & 1)) >> 16) & ~is_nan) | (0x7fc0 & is_nan);
#endif
}

inline void store(BFloat16* to, Floats value) {
#ifdef __AVX512BF16__
    __m256bh halves = _mm512_cvtneps_pbh((__m512)value);
#else
    Halves halves = __builtin_convertvector(rounded(value), Halves);
#endif
    std::memcpy(to, &halves, sizeof halves);
}

// The same of vectors side by side.
template <int N>
inline void store_all(float* to, const Floats (&values)[N]) {
    for (int v = 0; v < N; v++) store(to + v * LANES, values[v]);
}

template <int N>
inline void store_all(BFloat16* to, const Floats (&values)[N]) {
    int v = 0;
#ifdef __AVX512BF16__
    for (; v + 1 < N; v += 2) {  // two are rounded in the time of one
        __m512bh halves = _mm512_cvtne2ps_pbh((__m512)values[v + 1], (__m512)values[v]);
        std::memcpy(to + v * LANES, &halves, sizeof halves);
    }
#endif
    for (; v < N; v++) store(to + v * LANES, values[v]);
}

inline Floats keep(Ints mask, Floats value) { return (Floats)(mask & (Ints)value); }

inline void add(double* to, Floats value) {
    Doubles sum;
    std::memcpy(&sum, to, sizeof sum);
    sum += __builtin_convertvector(value, Doubles);
    std::memcpy(to, &sum, sizeof sum);
}

// The output of the ReLU; what is not a number stays so.
template <bool RELU>
inline Floats activated(Floats value) {
#ifdef __AVX512F__
    return RELU ? (Floats)_mm512_max_ps(_mm512_setzero_ps(), (__m512)value) : value;  // of NaN and zero the second
#else
    return RELU ? keep(~(value < 0), value) : value;
#endif
}

// The gradient that passes it, given its input.
template <bool RELU>
inline Floats passed(Floats grad, Floats input) {
    return RELU ? keep(~(input <= 0), grad) : grad;
}

}  // namespace
