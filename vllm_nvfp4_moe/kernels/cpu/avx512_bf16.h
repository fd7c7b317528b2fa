// 128 columns of a row at a time, against bfloat16 inputs, by AVX-512 with BF16.
//
// 64 bytes of codes are 32 words of 4 codes. Code k of each word is one permutation of a table away:
// the instruction looks at an index's lowest 5 bits, so the table has its 16 values twice.
#include <immintrin.h>

#include <cstdint>
#include <cstring>

namespace {

using Input = uint16_t;
using Sums = __m512;
constexpr int COLUMNS = 128;
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
    // A sum's 16 lanes have 8 columns each, so a block's scale goes to two of them.
    const __m128i eight = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(scales));
    const __m256i pairs = _mm256_cvtepu8_epi16(_mm_unpacklo_epi8(eight, eight));
    out.scales = _mm512_cvtph_ps(_mm256_slli_epi16(pairs, 7));  // E4M3 as half: 2^-8 of its value
    return out;
}
constexpr float SCALE = 256;

inline void add(Sums& sums, const Weights& weights, const Input* x) {
    __m512 part = _mm512_setzero_ps();
    for (int k = 0; k < 4; k++) {
        const __m512i inputs = _mm512_loadu_si512(x + 32 * k);
        part = _mm512_dpbf16_ps(part, __m512bh(weights.values[k]), __m512bh(inputs));
    }
    sums = _mm512_fmadd_ps(part, weights.scales, sums);
}

inline Sums zero() { return _mm512_setzero_ps(); }
// The totals of four sums: lanes are added in one order, whichever of the four it is.
inline void totals(const Sums* sums, float* out) {
    const auto pairs = [](Sums a, Sums b) {
        return _mm512_add_ps(_mm512_unpacklo_ps(a, b), _mm512_unpackhi_ps(a, b));
    };
    const __m512d ab = _mm512_castps_pd(pairs(sums[0], sums[1]));
    const __m512d cd = _mm512_castps_pd(pairs(sums[2], sums[3]));
    const __m512 lanes = _mm512_add_ps(_mm512_castpd_ps(_mm512_unpacklo_pd(ab, cd)),
                                       _mm512_castpd_ps(_mm512_unpackhi_pd(ab, cd)));
    const __m256 halves = _mm256_add_ps(_mm512_castps512_ps256(lanes),
                                        _mm512_extractf32x8_ps(lanes, 1));
    const __m128 all = _mm_add_ps(_mm256_castps256_ps128(halves), _mm256_extractf128_ps(halves, 1));
    _mm_storeu_ps(out, _mm_mul_ps(all, _mm_set1_ps(SCALE)));
}

}  // namespace
