// Sums of products of matrices, with the sums in float and in registers.
//
// bfloat16 values are multiplied in pairs where a processor is fast at that (`BF16_PRODUCTS`), so what is summed over is
// laid out in words of two there; elsewhere they are multiplied as floats.
#pragma once
#include <algorithm>
#include <type_traits>

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
        const __m512i halves = (__m512i)_mm512_cvtne2ps_pbh((__m512)rows[1], (__m512)rows[0]);
        const __m512i order = _mm512_set_epi16(
            31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9, 24, 8, 23, 7, 22, 6, 21, 5, 20, 4, 19, 3, 18, 2, 17,
            1, 16, 0);
        _mm512_storeu_si512(to, _mm512_permutexvar_epi16(order, halves));
    }

    // The same of rows that are there already.
    static void store_rows(Word* to, const Value* first, const Value* second) {
        const __m512i low = _mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)first));
        const __m512i high = _mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)second));
        _mm512_storeu_si512(to, _mm512_or_si512(low, _mm512_slli_epi32(high, 16)));
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

// Calls `body(vectors, column)` for each panel of so many vectors.
template <class Body>
void each_panel(int64_t columns, const Body& body) {
    constexpr int VECTORS = REGISTERS / 8;
    const int64_t width = Panels(columns, 0).width();
    for (int64_t column = 0; column < columns; column += width) {
        if (width == VECTORS * LANES) body(std::integral_constant<int, VECTORS>(), column);
        else if (width == VECTORS / 2 * LANES) body(std::integral_constant<int, VECTORS / 2>(), column);
        else body(std::integral_constant<int, 1>(), column);
    }
}

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

// Where a product goes: to rows that are `row_length` apart, with what lies at `added` added, if anything does. That
// may be what was there before.
template <class T, class U = T>
struct Into {
    T* out;
    int64_t row_length;
    const U* added = nullptr;
    int64_t added_length = 0;

    template <int N>
    void begin(Floats (&sums)[N], int64_t row, int64_t column) const {
        for (int v = 0; v < N; v++)
            sums[v] = added ? load(added + row * added_length + column + v * LANES) : Floats{};
    }

    template <int N>
    void end(const Floats (&sums)[N], int64_t row, int64_t column) const {
        store_all(out + row * row_length + column, sums);
    }
};

template <class T, int ROWS, int VECTORS, class Out>
inline void tile(const Product<typename Factor<T>::Word>& p, int64_t row, int64_t column, const Out& out) {
    Floats sums[ROWS][VECTORS];
    for (int r = 0; r < ROWS; r++) out.begin(sums[r], row + r, column);
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
    for (int r = 0; r < ROWS; r++) out.end(sums[r], row + r, column);
}

// The sum of a b, into `out`: sums enough at a time that they need not wait for each other, and no more than there are
// registers, of which the second factor and what it is multiplied by take some. More than eight rows take more
// addresses than there are.
template <class T, class Out>
void multiply(const Product<typename Factor<T>::Word>& p, const Out& out) {
    each_panel(p.columns, [&](auto vectors, int64_t column) {
        constexpr int VECTORS = decltype(vectors)::value, ROWS = std::min(8, REGISTERS / 2 / VECTORS);
        int64_t row = 0;
        for (; row + ROWS <= p.rows; row += ROWS) tile<T, ROWS, VECTORS>(p, row, column, out);
        for (; row < p.rows; row++) tile<T, 1, VECTORS>(p, row, column, out);
    });
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
        multiply<T>(product, Into<float>{out, product.columns, add ? out : nullptr, product.columns});
        product.count = 0, add = true;
    }

    // The sums go to a map instead, of which the next row is `row_length` on.
    template <class U>
    void finish_into(U* map, int64_t row_length) {
        multiply<T>(product, Into<U, float>{map, row_length, add ? out : nullptr, product.columns});
    }
};

}  // namespace
