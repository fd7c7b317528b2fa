// What tiles.h does, in plain C++, for processors without AMX. Tiles that were not set up hold NaN, as
// a thread's would be missing.
#include <cmath>
#include <cstdint>
#include <cstring>

namespace {

thread_local bool begun = false;
thread_local uint8_t the_tiles[8][16][64];

inline bool tiles_are_allowed() { return true; }
inline void tiles_begin() { begun = true; }
inline void tiles_end() { begun = false; }
inline void tile_zero(int tile) { memset(the_tiles[tile], begun ? 0 : 0xff, 1024); }
inline void tile_load(int tile, const void* from) { memcpy(the_tiles[tile], from, 1024); }
inline void tile_store(int tile, void* to) { memcpy(to, the_tiles[tile], 1024); }
inline float bf16(const uint8_t* at) {
    uint16_t half;
    memcpy(&half, at, 2);
    const uint32_t bits = uint32_t(half) << 16;
    float value;
    memcpy(&value, &bits, 4);
    return value;
}
// TDPBF16PS: sums[m][n] += a[m][2 k] b[k][2 n] + a[m][2 k + 1] b[k][2 n + 1].
inline void tile_multiply(int sums, int a, int b) {
    for (int m = 0; m < 16; m++)
        for (int n = 0; n < 16; n++) {
            float sum;
            memcpy(&sum, &the_tiles[sums][m][4 * n], 4);
            for (int k = 0; k < 16; k++)
                for (int i = 0; i < 2; i++)
                    sum = std::fma(bf16(&the_tiles[a][m][4 * k + 2 * i]),
                                   bf16(&the_tiles[b][k][4 * n + 2 * i]), sum);
            memcpy(&the_tiles[sums][m][4 * n], &sum, 4);
        }
}

}  // namespace
