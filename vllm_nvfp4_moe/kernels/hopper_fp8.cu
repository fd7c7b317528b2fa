// NVFP4 routed experts on Hopper (sm_90a) with FP8 activations: e4m3, a scale for each token.
//
// As hopper_moe.cu, whose pipeline and tiles it shares (hopper_common.cuh), but both MMA operands
// are e4m3, at twice bf16's rate. A weight becomes its E2M1 magnitude times its block's scale,
// rounded to e4m3: only 1.5, 3 and 6 times a scale of some mantissas are not exact. Scales were
// shifted by a power of two for each expert so that this neither overflows nor meets subnormals
// (hopper_fp8_weights.py).
//
// An MMA's columns are not the matrix's: of a chunk of 64, MMA i's column 16 h + 4 q + e is column
// 16 q + 8 i + 4 h + e, so that what thread q has of a row are the 16 columns of block q, which
// share a scale. Activations are stored in that order.
//
// The hardware adds e4m3's products with fewer bits than float32 has: about 14, and cut off. There
// are no registers to add parts of the larger tiles up in float32.

#ifndef EMULATED
#include <cuda_bf16.h>
#endif
#include <stdint.h>

namespace {

constexpr int ELEMENT = 1;      // bytes of an activation
constexpr int MOST_SORTS = 16;  // sizes of tiles

}  // namespace

#include "hopper_common.cuh"

namespace {

#ifndef EMULATED

// As __byte_perm, which however masks the selector once more. Its nibbles' highest bits must be clear.
__device__ __forceinline__ uint32_t pick(uint32_t low, uint32_t high, uint32_t selector) {
    uint32_t result;
    asm("prmt.b32 %0, %1, %2, %3;" : "=r"(result) : "r"(low), "r"(high), "r"(selector));
    return result;
}

// To e4m3, the nearest, at most 448 in magnitude; the first is the lower byte.
__device__ __forceinline__ uint32_t e4m3(float low, float high) {
    uint16_t result;
    asm("cvt.rn.satfinite.e4m3x2.f32 %0, %1, %2;" : "=h"(result) : "f"(high), "f"(low));
    return result;
}

#endif

// --------------------------------------------------------------------------------- dequantizing

// E4M3's codes for E2M1's magnitudes times a scale: of 0.5, 1, 2, 4, and of 0, 1.5, 3, 6.
struct Table {
    uint32_t low, high;
};

// The scale is byte `at` of `ones`, 1.5 times it, rounded, that of `threes`. In e4m3 a factor of two is
// 8, and a product puts a byte into each of a register's; no sum is carried into the next.
__device__ __forceinline__ Table table(uint32_t ones, uint32_t threes, int at) {
    return {__byte_perm(ones, 0, 0x4440 | at) * 0x01010101 + 0x1007FFF8,
            __byte_perm(threes, 0, 0x4440 | at) * 0x01010100 + 0x10080000};
}

// Eight weights of a row, two registers of e4m3, from a word of codes: magnitudes' numbers in the nibbles'
// lower three bits, in order; signs in their highest, of the first four in the odd nibbles, of the
// others in the even ones.
__device__ __forceinline__ void dequantize(uint32_t& first, uint32_t& second, uint32_t codes,
                                           const Table& of, const Powers& by) {
    constexpr uint32_t SIGNS = 0x80808080;
    const uint32_t magnitudes = codes & 0x77777777;
    first = pick(of.low, of.high, magnitudes) | (codes & SIGNS);
    second = pick(of.low, of.high, magnitudes >> 16) | (codes * by.sixteen & SIGNS);
}

// ----------------------------------------------------------------------------------------- GEMMs

template <int N, int MAX_N, int WM>
__device__ __forceinline__ void multiply(const Gemm& args, float (&d)[N / 2], Ring ring,
                                         const uint8_t* stages, uint32_t full, uint32_t empty) {
    using S = Shape<MAX_N, WM, 1>;
    const int thread = threadIdx.x % 128, lane = thread % 32;
    // All that the loop reads is at constant distances from these.
    const uint8_t* const stage = stages + ring.stage * S::STAGE_BYTES;
    const uint8_t* codes = stage + S::X + warpgroup() * WEIGHTS + thread * 16;
    const uint8_t* scales = stage + S::X + warpgroup() * WEIGHTS + 2 * CODES + thread * 4;
    uint32_t b = descriptor(shared(stage)), barrier = full + 8 * ring.stage, phase = ring.phase;
    uint32_t before = 0;  // of a stage whose MMAs may still run, what says that it is empty
    uint32_t a[4][4];
    for (int step = args.chunks / 2; step > 0; --step) {
        barrier_wait(barrier, phase);
        // Of the stage's two chunks: rows g and g + 8. The sign says that 1.5 times this is 5 more.
        const uint32_t signs = *reinterpret_cast<const uint32_t*>(scales);
        const uint32_t ones = signs & 0x7F7F7F7F;
        const uint32_t threes = ones + (signs >> 7 & 0x01010101) + 0x04040404;
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            const auto words = *reinterpret_cast<const uint4*>(codes + half * CODES);
            const Table first = table(ones, threes, 2 * half);
            const Table second = table(ones, threes, 2 * half + 1);
#pragma unroll
            for (int i = 0; i < 2; ++i) {
                // Three MMAs run while the fourth's weights are made.
                const int k = 2 * half + i;
                dequantize(a[k][0], a[k][2], i ? words.y : words.x, first, args.powers);
                dequantize(a[k][1], a[k][3], i ? words.w : words.z, second, args.powers);
                mma_fence();
                mma<N>(d, a[k], b + 2 * k);
                mma_commit();
                mma_wait<3>();
                if (k == 2 && before && lane == 0) barrier_arrive(before);
            }
        }
        before = barrier + (empty - full);
        codes += S::STAGE_BYTES, scales += S::STAGE_BYTES, b += S::STAGE_BYTES >> 4, barrier += 8;
        if (barrier == full + 8 * S::STAGES) {
            codes -= S::STAGES * S::STAGE_BYTES, scales -= S::STAGES * S::STAGE_BYTES;
            b -= S::STAGES * S::STAGE_BYTES >> 4, barrier = full, phase ^= 1;
        }
    }
    mma_wait<0>();
    variant_ends<N>();
    __syncwarp();
    if (lane == 0) barrier_arrive(before);
}

// The products of a tile, scaled; of the first GEMM activated, as bf16 rows, which `requantize` reads.
template <int N, bool GATED>
__device__ __forceinline__ void write(const Gemm& args, const Tile& tile, float (&d)[N / 2],
                                      int row_tile, float scale) {
    const int warp = threadIdx.x / 32 % 4, lane = threadIdx.x % 32, group = lane / 4, quad = lane % 4;
    // Only the producer has waited for the last kernel, which these are of.
    wait_for_last();
    const auto* const scales = reinterpret_cast<const float2*>(args.scales + tile.row) + quad;
    const auto apply = [&](int j) {
        const float2 both = scales[4 * j];
        d[4 * j] *= both.x * scale, d[4 * j + 1] *= both.y * scale;
        d[4 * j + 2] *= both.x * scale, d[4 * j + 3] *= both.y * scale;
    };
    if constexpr (GATED) {
        // `activate` without its branches, which one after another take a tenth of a tile's time:
        // gelu's (1 + tanh(y)) / 2 is the sigmoid of 2 y, and what is squared stays finite.
        const Gate rule = args.gate;
        const float linear = rule.tanh ? 1.5957691216057308f : rule.alpha;
        const float cubic = rule.tanh ? 0.07135481627160025f : 0.0f;
        const auto activated = [&](float gate, float up) {
            gate = gate > rule.limit ? rule.limit : gate;
            up = up > rule.limit ? rule.limit : up;
            up = up < -rule.limit ? -rule.limit : up;
            const float inner = gate * (linear + cubic * fminf(gate * gate, 1e38f));
            return __fdividef(gate, 1.0f + __expf(-inner)) * (up + rule.beta);
        };
        // Rows come as 8 of gate, 8 of up: a warp's 16 are 8 columns.
        const int column = row_tile * (ROWS / 2) + warp * 8 + quad * 2;
        uint8_t* const to = args.out + (int64_t(tile.row + group) * args.out_columns + column) * 2;
        const int64_t step = int64_t(8) * args.out_columns * 2;
#pragma unroll
        for (int j = 0; j < N / 8; ++j) {
            apply(j);
            const uint32_t value = transpose(pack(activated(d[4 * j], d[4 * j + 2]),
                                                  activated(d[4 * j + 1], d[4 * j + 3])));
            if (8 * j + group < tile.count) *reinterpret_cast<uint32_t*>(to + j * step) = value;
        }
    } else {
#pragma unroll
        for (int j = 0; j < N / 8; ++j) apply(j);
        write_rows<N>(args, tile, d, row_tile, 1.0f);
    }
}

template <int N, int MAX_N, int WM, int WK, bool GATED>
__device__ __forceinline__ void consume(const Gemm& args, const Tile& tile, int row_tile, Ring ring,
                                        uint8_t* stages, float*, uint32_t full, uint32_t empty) {
    static_assert(WK == 1, "sums are not added up");
    const int side = warpgroup();
    const float scale = args.globals[tile.expert];
    variant_begins<N>();
    float d[N / 2];
#pragma unroll
    for (int i = 0; i < N / 2; ++i) d[i] = 0.0f;
    multiply<N, MAX_N, WM>(args, d, ring, stages, full, empty);
    // Warpgroups past the last row compute on what lies there, and write nothing.
    if (row_tile + side < args.row_tiles) write<N, GATED>(args, tile, d, row_tile + side, scale);
}

// ------------------------------------------------------------------------------------ activations

constexpr int QUANTIZERS = 128;  // threads, for a row

// What is 1 in e4m3, by all threads of a CTA, so that a row's largest magnitude is 448. A NaN, or of an
// infinity and its neighbours the product, is NaN.
__device__ __forceinline__ float scale_of(const uint4* row, int columns) {
    __shared__ uint32_t warps[QUANTIZERS / 32];
    constexpr uint32_t MAGNITUDES = 0x7FFF7FFF;
    uint32_t largest = 0;  // of two columns: without signs bf16's bits order as its values, NaN last
#pragma unroll 4
    for (int unit = threadIdx.x; unit < columns / 8; unit += QUANTIZERS) {
        const uint4 values = row[unit];
        largest = __vmaxu2(largest, __vmaxu2(values.x & MAGNITUDES, values.y & MAGNITUDES));
        largest = __vmaxu2(largest, __vmaxu2(values.z & MAGNITUDES, values.w & MAGNITUDES));
    }
    largest = __reduce_max_sync(~0u, largest >> 16 > (largest & 0xFFFF) ? largest >> 16
                                                                        : largest & 0xFFFF);
    if (threadIdx.x % 32 == 0) warps[threadIdx.x / 32] = largest;
    __syncthreads();
#pragma unroll
    for (int i = 0; i < QUANTIZERS / 32; ++i) largest = warps[i] > largest ? warps[i] : largest;
    const uint32_t bits = largest << 16;
    const float scale = reinterpret_cast<const float&>(bits) / 448.0f;
    return scale < 1e-30f ? 1e-30f : scale;  // its inverse must be finite; NaN stays
}

// Where the first 16 bytes of a row lie in its tile, of rows of `padded` columns.
__device__ __forceinline__ uint8_t* place_of(uint8_t* tiles, int padded, const int4& place) {
    return tiles + int64_t(place.x) * padded + place.z * 128;
}

// Sixteen bytes of a row as they lie in a tile: `unit` of all that the row has.
__device__ __forceinline__ uint4 quantized(const uint2* row, int columns, int unit, float inverse) {
    const int first = unit / 4 * CHUNK + unit % 4 * 4;  // unit % 4 is 2 i + h
    uint32_t words[4];
#pragma unroll
    for (int q = 0; q < 4; ++q) {
        const int column = first + 16 * q;
        const uint2 values = column < columns ? row[column / 4] : uint2{0, 0};
        const auto* const pairs = reinterpret_cast<const __nv_bfloat162*>(&values);
        const float2 low = __bfloat1622float2(pairs[0]), high = __bfloat1622float2(pairs[1]);
        words[q] = e4m3(low.x * inverse, low.y * inverse) |
                   e4m3(high.x * inverse, high.y * inverse) << 16;
    }
    return make_uint4(words[0], words[1], words[2], words[3]);
}

// Into a tile, at `unit` of the row whose first unit would lie at `to`.
__device__ __forceinline__ void put(uint8_t* to, const int4& place, int unit, const uint4& bytes) {
    *reinterpret_cast<uint4*>(to + int64_t(unit / 8) * place.y * 128 +
                              (unit % 8 ^ place.z % 8) * 16) = bytes;
}

}  // namespace

// Rows of x, bf16 [tokens][stride], into the first GEMM's tiles, with their scales. A CTA a token.
extern "C" __global__ void __launch_bounds__(QUANTIZERS) gather(const uint4* x, int64_t stride,
                                                                int top_k, int hidden, int padded,
                                                                const int4* places, uint8_t* out,
                                                                float* scales) {
    wait_for_last();
    next_may_come();
    const uint4* const row = x + int64_t(blockIdx.x) * stride / 8;
    places += int64_t(blockIdx.x) * top_k;
    const float scale = scale_of(row, hidden), inverse = 1.0f / scale;
    for (int unit = threadIdx.x; unit < padded / 16; unit += QUANTIZERS) {
        const uint4 bytes = quantized(reinterpret_cast<const uint2*>(row), hidden, unit, inverse);
#pragma unroll 4
        for (int i = 0; i < top_k; ++i) {
            const int4 place = places[i];
            if (place.x >= 0) put(place_of(out, padded, place), place, unit, bytes);
        }
    }
    for (int i = threadIdx.x; i < top_k; i += QUANTIZERS)
        if (places[i].x >= 0) scales[places[i].x + places[i].z] = scale;
}

// What the first GEMM wrote, bf16 rows of `columns`, into the second's tiles. A CTA a pair.
extern "C" __global__ void __launch_bounds__(QUANTIZERS) requantize(const uint4* rows, int columns,
                                                                    const int4* places, uint8_t* out,
                                                                    float* scales) {
    wait_for_last();
    next_may_come();
    const int4 place = places[blockIdx.x];
    if (place.x < 0) return;
    const int at = place.x + place.z;
    const uint4* const row = rows + int64_t(at) * columns / 8;
    const float scale = scale_of(row, columns), inverse = 1.0f / scale;
    uint8_t* const to = place_of(out, columns, place);
#pragma unroll 2
    for (int unit = threadIdx.x; unit < columns / 16; unit += QUANTIZERS)
        put(to, place, unit, quantized(reinterpret_cast<const uint2*>(row), columns, unit, inverse));
    if (threadIdx.x == 0) scales[at] = scale;
}

GEMM(some, 64, 4, 1, 64, 56, 48, 40, 32, 24, 16, 8)      // decoding
GEMM(many, 128, 4, 1, 128, 112, 96, 80, 64, 48, 32, 16)
// The more tokens for each weight that a warpgroup makes, the less of the GPU's power goes into
// making it; but tiles of up to 128 tokens hide it better behind copies where experts have few.
GEMM(more, 192, 3, 1, 192, 176, 160, 144, 128, 112, 96, 80, 64, 48, 32, 16)
GEMM(most, 256, 2, 1, 256, 240, 224, 208, 192, 176, 160, 144, 128, 112, 96, 80, 64, 48, 32, 16)

constexpr Kind KINDS[] = {some_kind, many_kind, more_kind, most_kind};  // as hopper_fp8.py's UNITS

// Everything below is called through ctypes; each returns a cudaError_t.

extern "C" int prepare() {
    for (const Kind& kind : KINDS)
        if (const int error = kind.allow()) return error;
    return 0;
}

struct Layer {
    const void *x, *w13, *w2;
    const float *globals13, *globals2;
    const int *ids, *local;
    const float* weights;
    void* out;
    // Workspace.
    void *rows1, *middle, *rows2, *parts;
    float *scales1, *scales2;
    Tile* tiles;
    int* sorts;
    int4* places;
    int64_t stride;
    int tokens, top_k, experts, hidden, hidden_padded, intermediate_padded, row_tiles2, kind, processors;
    Gate gate;
};

extern "C" int run(const Layer* layer, cudaStream_t stream) {
    const Layer& l = *layer;
    const int pairs = l.tokens * l.top_k;
    const Kind& kind = KINDS[l.kind];
    int error = launch(route, 1, 1024, 0, stream, false, l.ids, l.local, pairs, l.experts, kind.unit,
                       kind.most, l.tiles, l.sorts, l.places);
    if (!error)
        error = launch(gather, l.tokens, QUANTIZERS, 0, stream, true, static_cast<const uint4*>(l.x),
                       l.stride, l.top_k, l.hidden, l.hidden_padded, l.places,
                       static_cast<uint8_t*>(l.rows1), l.scales1);
    Gemm first{static_cast<const uint8_t*>(l.w13), l.globals13, static_cast<const uint8_t*>(l.rows1),
               l.tiles, l.sorts, static_cast<uint8_t*>(l.middle), 2 * l.intermediate_padded / ROWS,
               l.hidden_padded / CHUNK, l.intermediate_padded, l.gate, {}, l.scales1};
    Gemm second{static_cast<const uint8_t*>(l.w2), l.globals2, static_cast<const uint8_t*>(l.rows2),
                l.tiles, l.sorts, static_cast<uint8_t*>(l.parts), l.row_tiles2,
                l.intermediate_padded / CHUNK, l.hidden, l.gate, {}, l.scales2};
    if (!error) error = kind.start(true, first, l.processors, stream);
    if (!error)
        error = launch(requantize, pairs, QUANTIZERS, 0, stream, true,
                       static_cast<const uint4*>(l.middle), l.intermediate_padded, l.places,
                       static_cast<uint8_t*>(l.rows2), l.scales2);
    if (!error) error = kind.start(false, second, l.processors, stream);
    if (error) return error;
    const int across = (l.hidden / 8 + COMBINED - 1) / COMBINED;
    return launch(combine, l.tokens * across, COMBINED, 0, stream, true,
                  static_cast<const uint4*>(l.parts), l.places, l.weights, l.top_k, l.hidden, across,
                  static_cast<uint4*>(l.out));
}
