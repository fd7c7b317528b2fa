// Few tokens as avx512_bf16.h has them; from TILED tokens of an expert on, AMX multiplies sixteen rows
// with sixteen tokens at a time.
//
// A code times its block scale has at most five significant bits, so it is exact in bfloat16, and
// sums run on over all columns.
#include "avx512_bf16.h"
#include "tiles.h"

namespace {

#define HAS_TILES
constexpr int TILED = 8;
constexpr int TILE = 16;       // rows, and tokens, of a tile
constexpr int DEPTH = 32;      // columns of a product of two tiles
constexpr int TOKEN_TILES = 2;

// Sixteen rows of 128 columns, as the four tiles of their places.
inline void decode_tiles(const uint8_t* codes, const uint8_t* scales, int64_t columns, int rows,
                         int64_t c, uint16_t (*out)[TILE][DEPTH]) {
    const __m512i low = _mm512_set_epi32(3, 3, 3, 3, 2, 2, 2, 2, 1, 1, 1, 1, 0, 0, 0, 0);
    const __m512i high = _mm512_add_epi32(low, _mm512_set1_epi32(4));
    const int64_t left = columns - c;
    for (int r = 0; r < rows; r++) {
        const uint8_t* at = codes + (r * columns + c) / 2;
        const uint8_t* of = scales + (r * columns + c) / 16;
        uint8_t last[COLUMNS / 2] = {}, of_last[COLUMNS / 16] = {};
        if (left < COLUMNS) {
            memcpy(last, at, left / 2);
            memcpy(of_last, of, left / 16);
            at = last;
            of = of_last;
        }
        const Weights weights = decode(at, of);  // scales[2 * b]: of block b, that is, of 4 words
        const __m512i even = _mm512_set_epi32(0, 0, 0, 0, 0, 0, 0, 0, 14, 12, 10, 8, 6, 4, 2, 0);
        const __m512 each = _mm512_permutexvar_ps(even, weights.scales);
        const __m512 first = _mm512_permutexvar_ps(low, each);
        const __m512 second = _mm512_permutexvar_ps(high, each);
        for (int k = 0; k < 4; k++) {
            const auto wide = [&](int half) {
                const __m256i part = half ? _mm512_extracti64x4_epi64(weights.values[k], 1)
                                          : _mm512_castsi512_si256(weights.values[k]);
                return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(part), 16));
            };
            const __m512bh both = _mm512_cvtne2ps_pbh(_mm512_mul_ps(wide(1), second),
                                                      _mm512_mul_ps(wide(0), first));
            _mm512_storeu_si512(out[k][r], __m512i(both));
        }
    }
}

// Tokens' inputs as AMX takes its second operand: for each pair of places, the pairs of all tokens.
inline void arrange_tiles(const Input* const* x, int tokens, int64_t wide, Input* out) {
    for (int64_t at = 0; at < wide; at += DEPTH)
        for (int first = 0; first < TOKEN_TILES * TILE; first += TILE, out += TILE * DEPTH)
            for (int t = 0; t < TILE; t++)
                for (int pair = 0; pair < DEPTH / 2; pair++) {
                    uint32_t two = 0;
                    if (first + t < tokens) memcpy(&two, x[first + t] + at + 2 * pair, 4);
                    memcpy(out + (pair * TILE + t) * 2, &two, 4);
                }
}

// take(r, t, sum over columns of row r times token t), without the global scale, for `rows` rows.
template <class Take>
void multiply_tiles(const uint8_t* codes, const uint8_t* scales, int64_t columns, int64_t rows,
                    const Input* arranged, int tokens, const Take& take) {
    alignas(64) uint16_t weights[4][TILE][DEPTH] = {};
    alignas(64) float sums[TOKEN_TILES][TILE][TILE];
    for (int64_t r = 0; r < rows; r += TILE) {
        const int some = int(rows - r < TILE ? rows - r : TILE);
        const Input* x = arranged;
        tile_zero(0);
        tile_zero(1);
        for (int64_t c = 0; c < columns; c += COLUMNS) {
            decode_tiles(codes + r * (columns / 2), scales + r * (columns / 16), columns, some, c,
                         weights);
            for (int k = 0; k < 4; k++, x += TOKEN_TILES * TILE * DEPTH) {
                tile_load(2, weights[k]);
                tile_load(3, x);
                tile_multiply(0, 2, 3);
                if (tokens > TILE) {
                    tile_load(4, x + TILE * DEPTH);
                    tile_multiply(1, 2, 4);
                }
            }
        }
        tile_store(0, sums[0]);
        tile_store(1, sums[1]);
        for (int t = 0; t < tokens; t++)
            for (int i = 0; i < some; i++) take(r + i, t, sums[t / TILE][i][t % TILE] * SCALE);
    }
}

}  // namespace
