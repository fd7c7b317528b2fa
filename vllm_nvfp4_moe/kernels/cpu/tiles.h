// AMX's tiles: sixteen rows of 64 bytes each, of which this kernel has eight.
#include <immintrin.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <cstdint>

namespace {

// Asks Linux, which keeps room for tiles only for processes that use them.
inline bool tiles_are_allowed() {
    constexpr long REQUEST = 0x1023, TILE_DATA = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
    return syscall(SYS_arch_prctl, REQUEST, TILE_DATA) == 0;
}

inline void tiles_begin() {
    struct alignas(64) Shape {
        uint8_t palette = 1, start = 0, reserved[14] = {};
        uint16_t columns[16] = {64, 64, 64, 64, 64, 64, 64, 64};
        uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
    };
    static constexpr Shape shape;  // see is_read: of one on the stack, 8 bytes count
    _tile_loadconfig(&shape);
}
inline void tiles_end() { _tile_release(); }

// What was written to `from` is there. GCC's macros do not say that they read memory: it may write
// later what they load, or not at all.
inline void is_read(const void* from) { asm volatile("" : : "r"(from) : "memory"); }

// Macros, since a tile's number is part of the instruction.
#define tile_zero(tile) _tile_zero(tile)
#define tile_load(tile, from) do { is_read(from); _tile_loadd(tile, from, 64); } while (0)
#define tile_store(tile, to) _tile_stored(tile, to, 64)
#define tile_multiply(sums, a, b) _tile_dpbf16ps(sums, a, b)

}  // namespace
