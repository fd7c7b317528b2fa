// NVFP4 routed experts on Hopper (sm_90a) with FP8 activations: e4m3, a scale for each token.
//
// It shares its pipeline and tiles with bf16.cu (gemm.cuh), but both MMA operands are e4m3, at twice
// bf16's rate. A weight becomes its E2M1 magnitude times its block's scale, rounded to e4m3: only
// 1.5, 3 and 6 times a scale of some mantissas are not exact. Scales were shifted by a power of two
// for each expert so that this neither overflows nor meets subnormals (fp8_weights.py).
//
// An MMA's columns are not the matrix's: of a chunk of 64, MMA i's column 16 h + 4 q + e is column
// 16 q + 8 i + 4 h + e. So what thread q has of a row are the 16 columns of block q, which share a
// scale. Activations are stored in that order.
//
// The hardware adds e4m3's products with fewer bits than float32 has: about 14, and cut off. There
// are no registers left to add parts of the larger tiles up in float32.
//
// The wgmma wrappers `mma<N>` are generated (source.py).

#ifndef EMULATED
#include <cuda_bf16.h>
#endif
#include <stdint.h>

namespace {

constexpr int ELEMENT_BYTES = 1;    // of an activation
constexpr int MAX_TILE_SIZES = 16;  // of one tile shape
constexpr bool NEW_TABLES = false;  // `gather` is not, and triggers after it has waited for `route`

}  // namespace

#include "primitives.cuh"
#include "gemm.cuh"
#include "routing.cuh"
#include "launch.cuh"

namespace {

#ifndef EMULATED

// Does what __byte_perm does, which however masks the selector once more. The highest bit of each of
// the selector's nibbles must be clear.
__device__ __forceinline__ uint32_t pick_bytes(uint32_t low, uint32_t high, uint32_t selector) {
    uint32_t result;
    asm("prmt.b32 %0, %1, %2, %3;" : "=r"(result) : "r"(low), "r"(high), "r"(selector));
    return result;
}

// Rounds to the nearest e4m3, at most 448 in magnitude. The first is the lower byte.
__device__ __forceinline__ uint32_t pack_e4m3x2(float low, float high) {
    uint16_t result;
    asm("cvt.rn.satfinite.e4m3x2.f32 %0, %1, %2;" : "=h"(result) : "f"(high), "f"(low));
    return result;
}

#endif

// --------------------------------------------------------------------------------- dequantizing

// E4M3's codes for E2M1's magnitudes times a scale: for 0.5, 1, 2, 4, and for 0, 1.5, 3, 6.
struct MagnitudeTable {
    uint32_t low, high;
};

// The scale is byte `at` of `ones`; 1.5 times it, rounded, is that of `threes`. A factor of two adds 8
// to an e4m3 code. A product puts one byte into all four of a register, and no sum carries into the
// next byte.
__device__ __forceinline__ MagnitudeTable magnitude_table(uint32_t ones, uint32_t threes, int at) {
    return {__byte_perm(ones, 0, 0x4440 | at) * 0x01010101 + 0x1007FFF8,
            __byte_perm(threes, 0, 0x4440 | at) * 0x01010100 + 0x10080000};
}

// Makes eight weights of a row, two registers of e4m3, from a word of codes. The nibbles' lower three
// bits have the magnitudes' numbers in the table, in order. Their highest bits have the signs: of the
// first four in the odd nibbles, of the others in the even ones.
__device__ __forceinline__ void dequantize(uint32_t& first, uint32_t& second, uint32_t codes,
                                           const MagnitudeTable& table, const Multipliers& by) {
    constexpr uint32_t SIGNS = 0x80808080;
    const uint32_t magnitudes = codes & 0x77777777;
    first = pick_bytes(table.low, table.high, magnitudes) | (codes & SIGNS);
    second = pick_bytes(table.low, table.high, magnitudes >> 16) | (codes * by.sixteen & SIGNS);
}

// ----------------------------------------------------------------------------------------- GEMMs

// Computes the sums of a tile by WGMMA.
template <int N, typename Shape>
__device__ __forceinline__ void multiply(const GemmArguments& args, float (&d)[N / 2], Ring ring,
                                         const uint8_t* stages, uint32_t full, uint32_t empty) {
    const int thread = threadIdx.x % 128, lane = thread % 32;
    // All that the loop reads is at constant distances from these.
    const uint8_t* const stage = stages + ring.stage * Shape::STAGE_BYTES;
    const uint8_t* codes = stage + Shape::X_BYTES + warpgroup() * WEIGHT_BYTES + thread * 16;
    const uint8_t* scales =
        stage + Shape::X_BYTES + warpgroup() * WEIGHT_BYTES + 2 * CODE_BYTES + thread * 4;
    uint32_t b = b_descriptor(shared_address(stage));
    uint32_t barrier = full + 8 * ring.stage, phase = ring.phase;
    uint32_t before = 0;  // the "empty" barrier of a stage whose MMAs may still run
    uint32_t a[4][4];
    for (int step = args.chunks / 2; step > 0; --step) {
        barrier_wait(barrier, phase);
        // Rows g and g + 8 of each of the stage's two chunks. The sign bit says that the code of 1.5
        // times the scale is 5 more, not 4.
        const uint32_t signs = *reinterpret_cast<const uint32_t*>(scales);
        const uint32_t ones = signs & 0x7F7F7F7F;
        const uint32_t threes = ones + (signs >> 7 & 0x01010101) + 0x04040404;
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            const auto words = *reinterpret_cast<const uint4*>(codes + half * CODE_BYTES);
            const MagnitudeTable first = magnitude_table(ones, threes, 2 * half);
            const MagnitudeTable second = magnitude_table(ones, threes, 2 * half + 1);
#pragma unroll
            for (int i = 0; i < 2; ++i) {
                // Three MMAs run while the fourth's weights are made.
                const int k = 2 * half + i;
                dequantize(a[k][0], a[k][2], i ? words.y : words.x, first, args.multipliers);
                dequantize(a[k][1], a[k][3], i ? words.w : words.z, second, args.multipliers);
                mma_fence();
                mma<N>(d, a[k], b + 2 * k);
                mma_commit();
                mma_wait<3>();
                if (k == 2 && before && lane == 0) barrier_arrive(before);
            }
        }
        before = barrier + (empty - full);
        codes += Shape::STAGE_BYTES, scales += Shape::STAGE_BYTES;
        b += Shape::STAGE_BYTES >> 4, barrier += 8;
        if (barrier == full + 8 * Shape::STAGES) {
            constexpr int ALL = Shape::STAGES * Shape::STAGE_BYTES;
            codes -= ALL, scales -= ALL, b -= ALL >> 4, barrier = full, phase ^= 1;
        }
    }
    mma_wait<0>();
    mma_size_ends<N>();
    __syncwarp();
    if (lane == 0) barrier_arrive(before);
}

// Writes the sums of a tile, scaled. The first GEMM's are activated and become bf16 rows, which
// `requantize` reads.
template <int N, bool FIRST>
__device__ __forceinline__ void write_tile(const GemmArguments& args, const Tile& tile,
                                           float (&d)[N / 2], int row_tile, float scale) {
    const int warp = threadIdx.x / 32 % 4, lane = threadIdx.x % 32, group = lane / 4, quad = lane % 4;
    // The kernel before has written the scales, and only the producer has waited for it.
    wait_for_previous_kernel();
    const auto* const scales = reinterpret_cast<const float2*>(args.x_scales + tile.row) + quad;
    const float2 bias = bias_of(args, tile, row_tile);
    const auto apply = [&](int j) {
        const float2 both = scales[4 * j];
        d[4 * j] = scaled(d[4 * j], both.x * scale, bias.x);
        d[4 * j + 1] = scaled(d[4 * j + 1], both.y * scale, bias.x);
        d[4 * j + 2] = scaled(d[4 * j + 2], both.x * scale, bias.y);
        d[4 * j + 3] = scaled(d[4 * j + 3], both.y * scale, bias.y);
    };
    if constexpr (FIRST && GATED) {
        // This is `activate` without its branches, which one after another take a tenth of a tile's
        // time: gelu's (1 + tanh(y)) / 2 is the sigmoid of 2 y. What is squared stays finite.
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
        const int column = row_tile * (GROUP_ROWS / 2) + warp * 8 + quad * 2;
        uint8_t* const to = args.out + (int64_t(tile.row + group) * args.out_columns + column) * 2;
        const int64_t step = int64_t(8) * args.out_columns * 2;
#pragma unroll
        for (int j = 0; j < N / 8; ++j) {
            apply(j);
            const uint32_t value = transpose(pack_bf16x2(activated(d[4 * j], d[4 * j + 2]),
                                                         activated(d[4 * j + 1], d[4 * j + 3])));
            if (8 * j + group < tile.tokens) *reinterpret_cast<uint32_t*>(to + j * step) = value;
        }
    } else {
#pragma unroll
        for (int j = 0; j < N / 8; ++j) apply(j);
        write_rows<N>(args, tile, row_tile,
                      [&](int i) { return FIRST ? relu2(d[i]) : d[i]; });
    }
}

template <int N, typename Shape, bool FIRST>
__device__ __forceinline__ void consume(const GemmArguments& args, const Tile& tile, int row_tile,
                                        Ring ring, uint8_t* stages, float*, uint32_t full,
                                        uint32_t empty) {
    static_assert(Shape::K_GROUPS == 1, "no sums of several groups are added up here");
    const int row_group = warpgroup();
    const float scale = args.global_scales[tile.expert];
    mma_size_begins<N>();
    float d[N / 2];
#pragma unroll
    for (int i = 0; i < N / 2; ++i) d[i] = 0.0f;
    multiply<N, Shape>(args, d, ring, stages, full, empty);
    // Warpgroups past the last row compute on what lies there, and write nothing.
    if (row_tile + row_group < args.row_tiles)
        write_tile<N, FIRST>(args, tile, d, row_tile + row_group, scale);
}

// ------------------------------------------------------------------------------------ activations

constexpr int QUANTIZE_THREADS = 128;  // for a row

// Finds a row's scale, the value of 1 in e4m3 that brings the row's largest magnitude to 448. All
// threads of a CTA take part. A NaN makes it NaN; an infinity makes what is divided by it NaN.
__device__ __forceinline__ float scale_of(const uint4* row, int columns) {
    __shared__ uint32_t warps[QUANTIZE_THREADS / 32];
    constexpr uint32_t MAGNITUDES = 0x7FFF7FFF;
    // Of two columns each. Without their signs bf16's bits are in the order of its values, NaN last.
    uint32_t largest = 0;
#pragma unroll 4
    for (int unit = threadIdx.x; unit < columns / 8; unit += QUANTIZE_THREADS) {
        const uint4 values = row[unit];
        largest = __vmaxu2(largest, __vmaxu2(values.x & MAGNITUDES, values.y & MAGNITUDES));
        largest = __vmaxu2(largest, __vmaxu2(values.z & MAGNITUDES, values.w & MAGNITUDES));
    }
    largest = __reduce_max_sync(~0u, largest >> 16 > (largest & 0xFFFF) ? largest >> 16
                                                                        : largest & 0xFFFF);
    if (threadIdx.x % 32 == 0) warps[threadIdx.x / 32] = largest;
    __syncthreads();
#pragma unroll
    for (int i = 0; i < QUANTIZE_THREADS / 32; ++i) largest = warps[i] > largest ? warps[i] : largest;
    const uint32_t bits = largest << 16;
    const float scale = reinterpret_cast<const float&>(bits) / 448.0f;
    return scale < 1e-30f ? 1e-30f : scale;  // its inverse must be finite; NaN stays
}

// Where the first 16 bytes of a row lie in its tile, whose rows have `padded` columns.
__device__ __forceinline__ uint8_t* row_in_tile(uint8_t* tiles, int padded, const Place& place) {
    return tiles + int64_t(place.tile_row) * padded + place.index * 128;
}

// Rounds 16 columns of a row, its `unit`, in the order in which they lie in a tile.
__device__ __forceinline__ uint4 quantized(const uint2* row, int columns, int unit, float inverse) {
    const int first = unit / 4 * CHUNK + unit % 4 * 4;  // unit % 4 is 2 i + h
    uint32_t words[4];
#pragma unroll
    for (int q = 0; q < 4; ++q) {
        const int column = first + 16 * q;
        const uint2 values = column < columns ? row[column / 4] : uint2{0, 0};
        const auto* const pairs = reinterpret_cast<const __nv_bfloat162*>(&values);
        const float2 low = __bfloat1622float2(pairs[0]), high = __bfloat1622float2(pairs[1]);
        words[q] = pack_e4m3x2(low.x * inverse, low.y * inverse) |
                   pack_e4m3x2(high.x * inverse, high.y * inverse) << 16;
    }
    return make_uint4(words[0], words[1], words[2], words[3]);
}

// Stores 16 bytes in a tile, as `unit` of the row whose first unit would lie at `to`.
__device__ __forceinline__ void store_unit(uint8_t* to, const Place& place, int unit,
                                           const uint4& bytes) {
    *reinterpret_cast<uint4*>(to + int64_t(unit / 8) * place.size * 128 +
                              (unit % 8 ^ place.index % 8) * 16) = bytes;
}

}  // namespace

// Rounds rows of x, bf16 [tokens][stride], into the first GEMM's tiles, with their scales. A CTA for
// each token.
extern "C" __global__ void __launch_bounds__(QUANTIZE_THREADS)
    gather(const uint4* x, int64_t stride, int top_k, int hidden, int padded, const Place* places,
           uint8_t* out, float* scales) {
    wait_for_previous_kernel();
    trigger_next_kernel();
    const uint4* const row = x + int64_t(blockIdx.x) * stride / 8;
    places += int64_t(blockIdx.x) * top_k;
    const float scale = scale_of(row, hidden), inverse = 1.0f / scale;
    for (int unit = threadIdx.x; unit < padded / 16; unit += QUANTIZE_THREADS) {
        const uint4 bytes = quantized(reinterpret_cast<const uint2*>(row), hidden, unit, inverse);
#pragma unroll 4
        for (int i = 0; i < top_k; ++i) {
            const Place place = places[i];
            if (place.tile_row >= 0) store_unit(row_in_tile(out, padded, place), place, unit, bytes);
        }
    }
    for (int i = threadIdx.x; i < top_k; i += QUANTIZE_THREADS)
        if (places[i].tile_row >= 0) scales[places[i].tile_row + places[i].index] = scale;
}

// Rounds what the first GEMM wrote, bf16 rows of `columns`, into the second's tiles, which may have
// more. A CTA for each pair.
extern "C" __global__ void __launch_bounds__(QUANTIZE_THREADS)
    requantize(const uint4* rows, int columns, int padded, const Place* places, uint8_t* out,
               float* scales) {
    wait_for_previous_kernel();
    trigger_next_kernel();
    const Place place = places[blockIdx.x];
    if (place.tile_row < 0) return;
    const int at = place.tile_row + place.index;
    const uint4* const row = rows + int64_t(at) * columns / 8;
    const float scale = scale_of(row, columns), inverse = 1.0f / scale;
    uint8_t* const to = row_in_tile(out, padded, place);
#pragma unroll 2
    for (int unit = threadIdx.x; unit < padded / 16; unit += QUANTIZE_THREADS)
        store_unit(to, place, unit,
                   quantized(reinterpret_cast<const uint2*>(row), columns, unit, inverse));
    if (threadIdx.x == 0) scales[at] = scale;
}

DEFINE_GEMMS(64, 256, 1, 64, 56, 48, 40, 32, 24, 16, 8)  // decoding
DEFINE_GEMMS(128, 256, 1, 128, 112, 96, 80, 64, 48, 32, 16)
// The more tokens for each weight that a warpgroup makes, the less of the GPU's power goes into
// making it; but tiles of up to 128 tokens hide it better behind copies where experts have few.
DEFINE_GEMMS(192, 192, 1, 192, 176, 160, 144, 128, 112, 96, 80, 64, 48, 32, 16)

constexpr Gemms GEMMS[] = {GEMMS_64x256, GEMMS_128x256, GEMMS_192x192};  // as `tile_shapes` in fp8.py

// Runs the layer. Returns a cudaError_t.
//
// All that lies between `route` and a GEMM, `gather` and `requantize`, triggers only AFTER it has waited:
// what follows reads the tables without waiting. A GEMM's epilogue reads its activations' scales,
// which the kernel before wrote, and waits for that kernel itself.
EXPORTED int run(const LaunchSpec* given, cudaStream_t stream) {
    const LaunchSpec& spec = *given;
    const Gemms& gemms = GEMMS[spec.tile_shape];
    int error = launch_route(spec, gemms.shape, stream);
    if (!error)
        error = launch(gather, spec.tokens, QUANTIZE_THREADS, 0, stream, true,
                       static_cast<const uint4*>(spec.x), spec.x_stride, spec.top_k, spec.hidden,
                       spec.hidden_padded, spec.places, static_cast<uint8_t*>(spec.x_tiles),
                       spec.x_scales);
    if (!error)
        error = gemms.launch(true, first_arguments(spec, spec.middle_rows, spec.intermediate),
                             spec.processors, stream);
    if (!error)
        error = launch(requantize, spec.tokens * spec.top_k, QUANTIZE_THREADS, 0, stream, true,
                       static_cast<const uint4*>(spec.middle_rows), spec.intermediate,
                       spec.intermediate_padded, spec.places, static_cast<uint8_t*>(spec.middle_tiles), spec.middle_scales);
    if (!error) error = gemms.launch(false, second_arguments(spec), spec.processors, stream);
    return error ? error : launch_combine(spec, stream);
}

#include "exports.cuh"
