// 32 columns of a row at a time, against float inputs, by AVX2.
#include <immintrin.h>

#include <cstdint>
#include <cstring>

namespace {

using Input = float;
using Sums = __m256;
constexpr int COLUMNS = 32;
constexpr int ROWS = 2, FEW = 2, TOKENS = 2;
constexpr int rows_at_once(int) { return 2; }

struct Weights {
    __m256 values[4];
    __m256 scales[2];
};

// Writes the inputs of 16 columns, of which `column` is the first, to where `add` reads them: in 32,
// those of even columns come first, then those of odd ones.
inline void put(const float* inputs, int64_t column, Input* out) {
    out += column / COLUMNS * COLUMNS + column % COLUMNS / 2;
    for (int i = 0; i < 8; i++) {
        out[i] = inputs[2 * i];
        out[16 + i] = inputs[2 * i + 1];
    }
}

inline Weights decode(const uint8_t* codes, const uint8_t* scales) {
    const __m128i table = _mm_setr_epi8(0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12);
    const __m128i low = _mm_set1_epi8(15);
    const __m128i bytes = _mm_loadu_si128(reinterpret_cast<const __m128i*>(codes));
    const __m128i even = _mm_shuffle_epi8(table, _mm_and_si128(bytes, low));
    const __m128i odd = _mm_shuffle_epi8(table, _mm_and_si128(_mm_srli_epi16(bytes, 4), low));
    Weights out;
    out.values[0] = _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(even));
    out.values[1] = _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_srli_si128(even, 8)));
    out.values[2] = _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(odd));
    out.values[3] = _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_srli_si128(odd, 8)));
    // E4M3 as half is 2^-8 of its value.
    const __m128i two = _mm_cvtsi32_si128(int(scales[0]) << 7 | int(scales[1]) << 23);
    const __m128 both = _mm_cvtph_ps(two);
    out.scales[0] = _mm256_broadcastss_ps(both);
    out.scales[1] = _mm256_broadcastss_ps(_mm_movehdup_ps(both));
    return out;
}
constexpr float SCALE = 128;  // of a code's half

template <int>
inline void add(Sums* sums, const Weights* weights, const Input* x) {
    for (int block = 0; block < 2; block++) {
        const __m256 even = _mm256_mul_ps(weights->values[block], _mm256_loadu_ps(x + 8 * block));
        const __m256 odd = _mm256_loadu_ps(x + 16 + 8 * block);
        const __m256 part = _mm256_fmadd_ps(weights->values[2 + block], odd, even);
        *sums = _mm256_fmadd_ps(part, weights->scales[block], *sums);
    }
}

inline Sums zero() { return _mm256_setzero_ps(); }

// The totals of four sums: lanes are added in one order, whichever of the four it is.
inline void totals(const Sums* sums, float* out) {
    const __m256 lanes = _mm256_hadd_ps(_mm256_hadd_ps(sums[0], sums[1]),
                                        _mm256_hadd_ps(sums[2], sums[3]));
    const __m128 all = _mm_add_ps(_mm256_castps256_ps128(lanes), _mm256_extractf128_ps(lanes, 1));
    _mm_storeu_ps(out, _mm_mul_ps(all, _mm_set1_ps(SCALE)));
}

}  // namespace
