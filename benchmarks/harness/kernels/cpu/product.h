// Sums of products of matrices, with the sums in float and in registers.
//
// bfloat16 values are multiplied in pairs where a processor is fast at that (`BF16_PRODUCTS`), so what is summed over is
// laid out in words of two there; elsewhere they are multiplied as floats.
#pragma once
#include <algorithm>

#include "vectors.h"

namespace {

// What a multiplication takes at once: `STEP` values of each factor, in a word.
template <class T>
struct Factor;

template <>
struct Factor<float> {
    typedef float Value, Word;
    typedef Floats Vector;
    static constexpr int STEP = 1;

    static Word pack(const float* values) { return values[0]; }

    static Vector words(const Word* from) { return load(from); }

    static Floats multiply_add(Floats sum, Word a, Vector b) { return sum + a * b; }

    static void store_rows(Word* to, const Floats* rows) { store(to, rows[0]); }
};

#if BF16_PRODUCTS
template <>
struct Factor<BFloat16> {
    typedef BFloat16 Value;
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
        return (Floats)_mm512_dpbf16_ps((__m512)sum, (__m512bh)(Words{} + a), (__m512bh)b);
    }

    static void store_rows(Word* to, const Floats* rows) {
        Words words = rounded(rows[0]) | rounded(rows[1]) << 16;
        std::memcpy(to, &words, sizeof words);
    }
};
#else
// Maps of bfloat16, which take half the way to the memory, are multiplied as floats.
template <>
struct Factor<BFloat16> : Factor<float> {};
#endif

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

// Factors of products of matrices that are added up: of each `rows` by `steps` words at `a`, of which the next in a row
// is `a_step` on and that of the next row `a_row`; and at `b`, in panels with room for `b_rows`, `steps` rows of
// `columns` words.
template <class Word>
struct Term {
    const Word *a, *b;
};

template <class Word>
struct Product {
    int64_t a_row, a_step, rows, b_rows, columns, steps;
    const Term<Word>* terms;
    int64_t count = 1;
};

template <class T, bool ADD, int ROWS, int VECTORS>
inline void tile(const Product<typename Factor<T>::Word>& p, int64_t row, int64_t column, float* out) {
    Floats sums[ROWS][VECTORS];
    out += row * p.columns + column;
    for (int r = 0; r < ROWS; r++)
        for (int v = 0; v < VECTORS; v++) sums[r][v] = ADD ? load(out + r * p.columns + v * LANES) : Floats{};
    for (int64_t term = 0; term < p.count; term++) {
        const auto *a = p.terms[term].a + row * p.a_row, *b = p.terms[term].b + column * p.b_rows;
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

// out = sum of a b, or out += that
template <class T, bool ADD>
void multiply(const Product<typename Factor<T>::Word>& p, float* out) {
    constexpr int VECTORS = REGISTERS / 8;
    switch (Panels(p.columns, p.b_rows).width() / LANES) {
        case VECTORS: return multiply_panels<T, ADD, VECTORS>(p, out);
        case VECTORS / 2: return multiply_panels<T, ADD, VECTORS / 2>(p, out);
        default: return multiply_panels<T, ADD, 1>(p, out);
    }
}

// Adds up products term by term: as many at a time, so that the sums stay in registers, as the nearest cache holds
// second factors of.
template <class T>
class Sum {
    typedef typename Factor<T>::Word Word;
    static constexpr int MOST = 32, BYTES = 24576;
    Term<Word> terms[MOST];
    Product<Word> product;
    float* out;
    bool add;
    int64_t limit;

public:
    // `out` has something to be added to, or is to be written.
    Sum(const Product<Word>& factors, float* out, bool add) : product(factors), out(out), add(add) {
        product.terms = terms, product.count = 0;
        const int64_t bytes = product.steps * product.columns * int64_t(sizeof(Word));
        limit = std::max<int64_t>(1, std::min<int64_t>(MOST, BYTES / bytes));
    }

    void operator()(const Word* a, const Word* b) {
        terms[product.count++] = {a, b};
        if (product.count == limit) finish();
    }

    void finish() {
        if (!product.count && add) return;
        (add ? multiply<T, true> : multiply<T, false>)(product, out);
        product.count = 0, add = true;
    }
};

}  // namespace
