// 128 columns of a row at a time, against bfloat16 inputs, by AVX-512 with BF16.
//
// 64 bytes of codes are 32 words of 4 codes. Code k of each word is one permutation of a table away:
// the instruction looks at an index's lowest 5 bits, so the table has its 16 values twice.
#include "avx512_sums.h"

namespace {

using Input = uint16_t;
// Of one call of `multiply`. Its sums stay in registers: with FEW tokens those of rows that are decoded
// one after the other, with more those of two rows that are decoded at once.
constexpr int ROWS = 8, FEW = 4, TOKENS = 8;
constexpr int rows_at_once(int tokens) { return tokens <= FEW ? 4 : 2; }

struct Weights {
    __m512i values[4];
    __m512 scales;
};

// Rounds the inputs of 16 columns, of which `column` is the first, and writes them to where `add` reads
// them: in 128, those of code 0 of all words come first, then those of code 1.
inline void put(const float* inputs, int64_t column, Input* out) {
    const __m512 values = _mm512_loadu_ps(inputs);
    const __m512i bits = _mm512_castps_si512(values);
    const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
    const __m512i up = _mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff)));
    const __mmask16 nan = _mm512_cmp_ps_mask(values, values, _CMP_UNORD_Q);
    const __m512i rounded = _mm512_mask_mov_epi32(_mm512_srli_epi32(up, 16), nan,
                                                  _mm512_set1_epi32(0x7fc0));
    const __m256i by_code = _mm256_set_epi16(15, 11, 7, 3, 14, 10, 6, 2, 13, 9, 5, 1, 12, 8, 4, 0);
    const __m256i four = _mm256_permutexvar_epi16(by_code, _mm512_cvtepi32_epi16(rounded));
    alignas(32) Input codes[4][4];
    _mm256_store_si256(reinterpret_cast<__m256i*>(codes), four);
    out += column / COLUMNS * COLUMNS + column % COLUMNS / 4;
    for (int code = 0; code < 4; code++) memcpy(out + 32 * code, codes[code], sizeof codes[code]);
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

// To the sums of R rows, their products with a token's inputs. Each input is read once, and rows take
// turns, since a multiplication waits for the one before of its row.
template <int R>
inline void add(Sums* sums, const Weights* weights, const Input* x) {
    __m512 part[R];
#pragma GCC unroll 8
    for (int r = 0; r < R; r++) part[r] = _mm512_setzero_ps();
#pragma GCC unroll 4
    for (int k = 0; k < 4; k++) {
        const __m512bh inputs = __m512bh(_mm512_loadu_si512(x + 32 * k));
#pragma GCC unroll 8
        for (int r = 0; r < R; r++)
            part[r] = _mm512_dpbf16_ps(part[r], __m512bh(weights[r].values[k]), inputs);
    }
#pragma GCC unroll 8
    for (int r = 0; r < R; r++)
        sums[r] = _mm512_fmadd_ps(part[r], weights[r].scales, sums[r]);
}

}  // namespace
