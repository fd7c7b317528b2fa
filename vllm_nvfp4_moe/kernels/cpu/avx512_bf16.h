// 128 columns of a row at a time, against bfloat16 inputs, by AVX-512 with BF16.
//
// 64 bytes of codes are 32 words of 4 codes. Code k of each word is one permutation of a table away:
// the instruction looks at an index's lowest 5 bits, so the table has its 16 values twice.
#include "avx512_sums.h"

namespace {

using Input = uint16_t;
constexpr int ROWS = 4, TOKENS = 4;  // of one call of `multiply`: 16 sums stay in registers

struct Weights {
    __m512i values[4];
    __m512 scales;
};

// Where a column's input lies: those of code 0 of all words first, then those of code 1.
inline int place(int column) {
    return column / COLUMNS * COLUMNS + column % 4 * 32 + column % COLUMNS / 4;
}

inline Input rounded(float value) {
    uint32_t bits;
    memcpy(&bits, &value, 4);
    if (value != value) return 0x7fc0;
    return Input((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

inline Weights decode(const uint8_t* codes, const uint8_t* scales) {
    const __m512i table = _mm512_set_epi16(
        short(0xc0c0), short(0xc080), short(0xc040), short(0xc000), short(0xbfc0), short(0xbf80),
        short(0xbf00), 0, 0x40c0, 0x4080, 0x4040, 0x4000, 0x3fc0, 0x3f80, 0x3f00, 0,
        short(0xc0c0), short(0xc080), short(0xc040), short(0xc000), short(0xbfc0), short(0xbf80),
        short(0xbf00), 0, 0x40c0, 0x4080, 0x4040, 0x4000, 0x3fc0, 0x3f80, 0x3f00, 0);
    const __m512i words = _mm512_loadu_si512(codes);
    Weights out;
    out.values[0] = _mm512_permutexvar_epi16(words, table);
    out.values[1] = _mm512_permutexvar_epi16(_mm512_srli_epi16(words, 4), table);
    out.values[2] = _mm512_permutexvar_epi16(_mm512_srli_epi16(words, 8), table);
    out.values[3] = _mm512_permutexvar_epi16(_mm512_srli_epi16(words, 12), table);
    out.scales = scales_of(scales);
    return out;
}

inline void add(Sums& sums, const Weights& weights, const Input* x) {
    __m512 part = _mm512_setzero_ps();
    for (int k = 0; k < 4; k++) {
        const __m512i inputs = _mm512_loadu_si512(x + 32 * k);
        part = _mm512_dpbf16_ps(part, __m512bh(weights.values[k]), __m512bh(inputs));
    }
    sums = _mm512_fmadd_ps(part, weights.scales, sums);
}

}  // namespace
