// 128 columns of a row at a time, against float inputs, by AVX-512.
//
// 64 bytes of codes are 16 words of 8 codes. Code k of each word is one permutation of a table of 16
// values away: the instruction looks at an index's lowest 4 bits.
#include "avx512_sums.h"

namespace {

using Input = float;
constexpr int ROWS = 2, FEW = 4, TOKENS = 4;
constexpr int rows_at_once(int) { return 2; }

struct Weights {
    __m512i words;
    __m512 scales;
};

// Writes the inputs of 16 columns, of which `column` is the first, to where `add` reads them: in 128,
// those of code 0 of all words come first, then those of code 1.
inline void put(const float* inputs, int64_t column, Input* out) {
    const __m512i by_code = _mm512_set_epi32(15, 7, 14, 6, 13, 5, 12, 4, 11, 3, 10, 2, 9, 1, 8, 0);
    alignas(64) Input codes[8][2];
    _mm512_store_ps(codes, _mm512_permutexvar_ps(by_code, _mm512_loadu_ps(inputs)));
    out += column / COLUMNS * COLUMNS + column % COLUMNS / 8;
    for (int code = 0; code < 8; code++) memcpy(out + 16 * code, codes[code], sizeof codes[code]);
}

inline Weights decode(const uint8_t* codes, const uint8_t* scales) {
    Weights out;
    out.words = _mm512_loadu_si512(codes);
    out.scales = scales_of(scales);
    return out;
}

template <int>
inline void add(Sums* sums, const Weights* weights, const Input* x) {
    const __m512 table = _mm512_set_ps(-6, -4, -3, -2, -1.5, -1, -0.5, 0, 6, 4, 3, 2, 1.5, 1, 0.5, 0);
    __m512 part = _mm512_setzero_ps();
    for (int k = 0; k < 8; k++) {
        const __m512i index = _mm512_srli_epi32(weights->words, 4 * k);
        part = _mm512_fmadd_ps(_mm512_permutexvar_ps(index, table), _mm512_loadu_ps(x + 16 * k), part);
    }
    *sums = _mm512_fmadd_ps(part, weights->scales, *sums);
}

}  // namespace
