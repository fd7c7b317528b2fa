// Weights become NVFP4 on a CPU, with the bits of the reference kernel (reference.py).
//
// LANES blocks are worked on at once. A lane of a vector is a block, and a block's sixteen weights
// are in sixteen vectors. Each lane computes what the reference does, in its order, and nothing is
// fused (-ffp-contract=off), so the bits do not depend on the instruction set.
#include <immintrin.h>

#include <cstdint>
#include <cstring>

namespace {

#ifdef __AVX512F__
constexpr int LANES = 16;
#else
constexpr int LANES = 8;
#endif
constexpr int BLOCK = 16;
using F = float __attribute__((vector_size(4 * LANES)));
using I = int32_t __attribute__((vector_size(4 * LANES)));
using H = uint16_t __attribute__((vector_size(2 * LANES)));

// Numbers of kernel.py's dtypes.
enum Kind : int64_t { BF16, F16, F32 };

constexpr float E4M3_LEAST = 0x1p-9f, E4M3_NORMAL = 0x1p-6f, E4M3_MOST = 448;
constexpr int32_t LOWEST = 1, HIGHEST = 126;  // bits of E4M3's positive finite numbers

F splat(float value) { return value - F{}; }
I splat(int32_t value) { return value - I{}; }
I bits(F value) { return reinterpret_cast<I>(value); }
F floats(I value) { return reinterpret_cast<F>(value); }
F magnitude(F value) { return floats(bits(value) & 0x7fffffff); }
I least(I a, I b) { return a < b ? a : b; }
I most(I a, I b) { return a > b ? a : b; }
// Of floats that are not negative, which are in the order of their bits.
F least(F a, F b) { return floats(least(bits(a), bits(b))); }
F most(F a, F b) { return floats(most(bits(a), bits(b))); }

double sum(F value) {
    double all = 0;
    for (int lane = 0; lane < LANES; lane++) all += value[lane];
    return all;
}

// The E2M1 magnitude nearest to t >= 0, ties to even. Adding a number and taking it away again
// rounds to a multiple of 0.5, 1 or 2: the spacings of E2M1 below 2, from 2 to 4, and above 4. The
// number is 1.5 * 2^22 times the power of two below t.
F round_e2m1(F t) {
    t = least(t, splat(6.0f));
    const I power = bits(most(t, splat(1.0f))) & 0x7f800000;
    const F magic = floats(power + (22 << 23 | 1 << 22));
    return (t + magic) - magic;
}

F e4m3(I code) {
    const F normal = floats((code << 20) + (120 << 23));
    return code < 8 ? __builtin_convertvector(code, F) * E4M3_LEAST : normal;
}

F widen(const void* source, int64_t at, Kind kind) {
    F out;
    if (kind == F32) {
        memcpy(&out, static_cast<const float*>(source) + at, sizeof out);
        return out;
    }
    H half;
    memcpy(&half, static_cast<const uint16_t*>(source) + at, sizeof half);
    if (kind == BF16) return floats(__builtin_convertvector(half, I) << 16);
#ifdef __AVX512F__
    return F(_mm512_cvtph_ps(reinterpret_cast<__m256i>(half)));
#else
    return F(_mm256_cvtph_ps(reinterpret_cast<__m128i>(half)));
#endif
}

// Afterwards x[k][b] is what x[b][k] was.
void transpose(F* x) {
#pragma GCC unroll 4
    for (int half = LANES / 2; half; half /= 2) {
        I low, high;
        for (int i = 0; i < LANES; i++) {
            low[i] = i & half ? (i ^ half) + LANES : i;
            high[i] = i & half ? i + LANES : i ^ half;
        }
#pragma GCC unroll 16
        for (int i = 0; i < LANES; i++)
            if (!(i & half)) {
                const F a = x[i], b = x[i + half];
                x[i] = __builtin_shuffle(a, b, low);
                x[i + half] = __builtin_shuffle(a, b, high);
            }
    }
}

// x[k]: weight k of each of `blocks` blocks from `first` on; 0 in the lanes that are left.
void load(const void* source, int64_t first, int blocks, Kind kind, F* x) {
    for (int part = 0; part < BLOCK; part += LANES) {
        for (int b = 0; b < LANES; b++)
            x[part + b] = b < blocks ? widen(source, (first + b) * BLOCK + part, kind) : F{};
        transpose(x + part);
    }
}

// Bits of the `max` rule's scales.
I max_scales(const F* x, float global_scale) {
    F largest{};
    for (int k = 0; k < BLOCK; k++) largest = most(largest, magnitude(x[k]));
    const F ratio = least(most(largest / (6 * global_scale), splat(E4M3_LEAST)), splat(E4M3_MOST));
    // Three bits of mantissa, ties to even. The exponent's bias changes from 127 to 7.
    const I rounded = bits(ratio) + 0x7ffff + (bits(ratio) >> 20 & 1);
    const F subnormal = (ratio * 512 + 0x1p23f) - 0x1p23f;
    return ratio < E4M3_NORMAL ? __builtin_convertvector(subnormal, I)
                               : (rounded >> 20) - (120 << 3);
}

// Mirrored by rule.py's Reach.
struct Reach {
    int64_t below, above, least;
};

// The search of quantize.nvfp4.scales.mse, from the `max` rule's scales on.
I search(const F* x, float global_scale, I start, const Reach& reach) {
    F y[BLOCK];
    for (int k = 0; k < BLOCK; k++) y[k] = magnitude(x[k]) / global_scale;
    const I reached = most(start + int32_t(reach.above), splat(int32_t(reach.least)));
    const I highest = least(reached, splat(HIGHEST));
    F best = splat(__builtin_inff());
    I chosen = start;
    const auto attempt = [&](int32_t offset) {
        const I candidate = most(least(start + offset, highest), splat(LOWEST));
        const F value = e4m3(candidate), inverse = 1 / value;
        F error{};
        for (int k = 0; k < BLOCK; k++) {
            const F lost = y[k] - round_e2m1(y[k] * inverse) * value;
            error += lost * lost;
        }
        const I better = error < best;
        best = better ? error : best;
        chosen = better ? candidate : chosen;
    };
    int32_t last = 0;
    for (int lane = 0; lane < LANES; lane++)
        if (highest[lane] - start[lane] > last) last = highest[lane] - start[lane];
    attempt(0);
    for (int32_t offset = -int32_t(reach.below); offset < 0; offset++) attempt(offset);
    for (int32_t offset = 1; offset <= last; offset++) attempt(offset);
    return chosen;
}

}  // namespace

#define EXPORT extern "C" __attribute__((visibility("default")))

// The largest magnitude; infinite if any number is infinite or NaN.
EXPORT float amax(const void* source, int64_t kind, int64_t blocks) {
    I largest{};
    for (int64_t i = 0; i < blocks * BLOCK; i += BLOCK)
        for (int part = 0; part < BLOCK; part += LANES)
            largest = most(largest, bits(magnitude(widen(source, i + part, Kind(kind)))));
    int32_t all = 0;
    for (int lane = 0; lane < LANES; lane++) all = largest[lane] > all ? largest[lane] : all;
    return all >= 255 << 23 ? __builtin_inff() : floats(splat(all))[0];
}

// packed: [8 * blocks]; scales: [blocks]; counts: [127], to which blocks are added by their scales;
// sums: noise and signal in units of the squared global scale. No `reach` is the `max` rule.
EXPORT void encode(const void* source, int64_t kind, int64_t blocks, float global_scale,
                   const Reach* reach, uint8_t* packed, uint8_t* scales, int64_t* counts,
                   double* sums) {
    const float inverse = 1 / global_scale;
    for (int64_t first = 0; first < blocks; first += LANES) {
        const int there = int(blocks - first < LANES ? blocks - first : LANES);
        F x[BLOCK];
        load(source, first, there, Kind(kind), x);
        I scale = max_scales(x, global_scale);
        if (reach) scale = search(x, global_scale, scale, *reach);
        const F value = e4m3(scale), step = value * global_scale;
        F noise{}, signal{};
        I words[2] = {};
        for (int k = 0; k < BLOCK; k++) {
            const F rounded = round_e2m1(magnitude(x[k]) / step);
            // From 1 on, the exponent and the first bit of the mantissa, read as one integer, count
            // the codes up from 2.
            const I above = (bits(rounded) >> 22) - 252;
            const I code = rounded < 1 ? __builtin_convertvector(rounded * 2, I) : above;
            words[k / 8] |= (code | (bits(x[k]) >> 31 & 8)) << (4 * (k % 8));
            const F whole = magnitude(x[k]) * inverse, lost = whole - rounded * value;
            noise += lost * lost;
            signal += whole * whole;
        }
        sums[0] += sum(noise);
        sums[1] += sum(signal);
        for (int b = 0; b < there; b++) {
            const int32_t both[2] = {words[0][b], words[1][b]};
            memcpy(packed + (first + b) * (BLOCK / 2), both, sizeof both);
            scales[first + b] = uint8_t(scale[b]);
            counts[scale[b]]++;
        }
    }
}
