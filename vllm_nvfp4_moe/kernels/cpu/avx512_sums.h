// What both sets of AVX-512 share: a sum has 16 lanes of 8 columns each.
#include <immintrin.h>

#include <cstdint>
#include <cstring>

namespace {

using Sums = __m512;
constexpr int COLUMNS = 128;
constexpr float SCALE = 256;

// A block's scale for two lanes: E4M3 read as half is 2^-8 of its value.
inline __m512 scales_of(const uint8_t* scales) {
    const __m128i eight = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(scales));
    const __m256i pairs = _mm256_cvtepu8_epi16(_mm_unpacklo_epi8(eight, eight));
    return _mm512_cvtph_ps(_mm256_slli_epi16(pairs, 7));
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
