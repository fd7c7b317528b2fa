// 128 columns of a row at a time, against float inputs, by AVX-512.
//
// 64 bytes of codes are 16 words of 8 codes. Code k of each word is one permutation of a table of 16
// values away: the instruction looks at an index's lowest 4 bits.
#include <immintrin.h>

#include <cstdint>
#include <cstring>

namespace {

using Input = float;
using Sums = __m512;
constexpr int COLUMNS = 128;
constexpr int ROWS = 2, TOKENS = 4;

struct Weights {
    __m512i words;
    __m512 scales;
};

// Where a column's input lies: those of code 0 of all words first, then those of code 1.
inline int place(int column) {
    return column / COLUMNS * COLUMNS + column % 8 * 16 + column % COLUMNS / 8;
}

inline Input rounded(float value) { return value; }

inline Weights decode(const uint8_t* codes, const uint8_t* scales) {
    Weights out;
    out.words = _mm512_loadu_si512(codes);
    const __m128i eight = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(scales));
    const __m256i pairs = _mm256_cvtepu8_epi16(_mm_unpacklo_epi8(eight, eight));
    out.scales = _mm512_cvtph_ps(_mm256_slli_epi16(pairs, 7));
    return out;
}
constexpr float SCALE = 256;

inline void add(Sums& sums, const Weights& weights, const Input* x) {
    const __m512 table = _mm512_set_ps(-6, -4, -3, -2, -1.5, -1, -0.5, 0, 6, 4, 3, 2, 1.5, 1, 0.5, 0);
    __m512 part = _mm512_setzero_ps();
    for (int k = 0; k < 8; k++) {
        const __m512i index = _mm512_srli_epi32(weights.words, 4 * k);
        part = _mm512_fmadd_ps(_mm512_permutexvar_ps(index, table), _mm512_loadu_ps(x + 16 * k), part);
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
