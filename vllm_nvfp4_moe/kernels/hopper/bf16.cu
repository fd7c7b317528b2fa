// NVFP4 routed experts on Hopper (sm_90a): bf16 activations, weights of 4.5 bits.
//
// Both GEMMs compute D[weight rows, tokens] = W X^T with WGMMA, or with each warp's own MMAs where
// tokens are few. The weights are the A operand and come from registers, where they are made from
// E2M1 codes and block scales on the fly. The tokens are the B operand, in shared memory, and may be
// as few as 8. Everything is streamed by bulk copies, which one thread of a CTA issues: weights are
// repacked at load into the order in which the MMA's threads hold them (bf16_weights.py), and
// activations are laid out in swizzled tiles by `gather` and by the first GEMM's epilogue. A grid of
// one CTA per multiprocessor walks over the tiles. docs/contributors/hopper-kernel.md shows it whole.
//
// Column j of D depends on row j of X alone, so rows of a tile that hold no token are never cleared.
// Every sum is taken in one order, whoever computes it: outputs are equal from run to run.
//
// The wgmma wrappers `mma<N>` are generated (source.py).

#ifndef EMULATED
#include <cuda_bf16.h>
#endif
#include <stdint.h>

namespace {

constexpr int ELEMENT_BYTES = 2;     // of an activation
constexpr int MAX_TILE_SIZES = 16;   // of one tile shape
constexpr bool NEW_TABLES = true;  // `route_and_gather` is
constexpr int WARP_MMA_TOKENS = 16;  // up to which each warp's own MMAs are used

}  // namespace

#include "primitives.cuh"
#include "gemm.cuh"
#include "routing.cuh"
#include "launch.cuh"

namespace {

#ifndef EMULATED

// Loads four matrices of 8 x 8. Each lane gives the address of one row.
__device__ __forceinline__ void load_matrices(uint32_t (&matrices)[4], uint32_t row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(matrices[0]), "=r"(matrices[1]), "=r"(matrices[2]), "=r"(matrices[3])
                 : "r"(row)
                 : "memory");
}

// D[16, 8] += A[16, 16] B[16, 8], by one warp and at once.
__device__ __forceinline__ void warp_mma(float* d, const uint32_t (&a)[4], uint32_t b, uint32_t b_next) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, "
        "{%8, %9}, {%0, %1, %2, %3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b), "r"(b_next));
}

__device__ __forceinline__ uint32_t multiply_bf16x2(uint32_t values, uint32_t scale) {
    uint32_t result;
    asm("mul.rn.bf16x2 %0, %1, %2;" : "=r"(result) : "r"(values), "r"(scale));
    return result;
}

// Gives the lower 16 bits of `pair` twice, and the upper ones twice.
__device__ __forceinline__ void broadcast_halves(uint32_t& low, uint32_t& high, uint32_t pair) {
    // Not __byte_perm: of these moves ptxas makes operand modifiers of the multiplications.
    asm("{.reg .b16 l, h; mov.b32 {l, h}, %2; mov.b32 %0, {l, l}; mov.b32 %1, {h, h};}"
        : "=r"(low), "=r"(high)
        : "r"(pair));
}

template <uint32_t MASK, uint32_t BITS>
__device__ __forceinline__ uint32_t mask_then_set(uint32_t value) {
    uint32_t result;  // (value & MASK) | BITS: of this written in C++ ptxas makes two instructions
    asm("lop3.b32 %0, %1, %2, %3, 0xEA;" : "=r"(result) : "r"(value), "n"(MASK), "n"(BITS));
    return result;
}

#endif

// --------------------------------------------------------------------------------- dequantizing

// Makes eight weights of a thread: two in each of the MMA's four A registers.
//
// A code's sign, exponent and mantissa bits, put at bits 15, 8:7 and 6 of a bf16, are its value
// times 2^-126 (zero and 0.5 are then bf16's zero and a subnormal). Four codes cannot lie in 16 bits
// so that one shift each brings them there. Three can, and a product spreads the fourth's bits.
// Block scales come with a 5-bit exponent, as bf16 bits 11:4; under an exponent of 192 they are times
// 2^74. So a product is the weight times 2^-52, and exact: the weight has at most 2 + 4 bits.
__device__ __forceinline__ void dequantize(uint32_t (&a)[4], uint32_t codes, uint32_t scales,
                                           const Multipliers& by) {
    constexpr uint32_t CODE_BITS = 0x81C081C0, SPREAD = 1 << 10 | 1 << 5 | 1;
    uint32_t first, second;
    broadcast_halves(first, second, scales);
    a[0] = multiply_bf16x2(codes & CODE_BITS, first);
    a[1] = multiply_bf16x2((codes * by.eight) & CODE_BITS, second);
    a[2] = multiply_bf16x2((codes * by.sixty_four) & CODE_BITS, first);
    a[3] = multiply_bf16x2((((codes >> 8) & 0x006C006C) * SPREAD) & CODE_BITS, second);
}

constexpr float UNSCALE = 4503599627370496.0f;  // 2^52

// What a thread has of a chunk: codes for four MMAs, and their block scales.
struct Fragment {
    uint4 codes;
    uint2 scales;
};

__device__ __forceinline__ Fragment load_fragment(const uint8_t* chunk) {
    const int thread = threadIdx.x % 128;
    return {*reinterpret_cast<const uint4*>(chunk + thread * 16),
            *reinterpret_cast<const uint2*>(chunk + CODE_BYTES + thread / 4 * 8)};
}

// Makes the weights for COUNT of the four MMAs, from number `first` on.
template <int COUNT>
__device__ __forceinline__ void dequantize(uint32_t (&a)[COUNT][4], const Fragment& from, int first,
                                           const Multipliers& by) {
    constexpr uint32_t SCALE_BITS = 0x0FF00FF0, EXPONENT = 0x60006000;
    const uint32_t codes[4] = {from.codes.x, from.codes.y, from.codes.z, from.codes.w};
#pragma unroll
    for (int i = 0; i < COUNT; ++i) {
        const uint32_t pair = first + i < 2 ? from.scales.x : from.scales.y;
        const uint32_t moved = (first + i) % 2 ? __byte_perm(pair, 0, 0x2301) : pair;
        dequantize(a[i], codes[first + i], mask_then_set<SCALE_BITS, EXPONENT>(moved), by);
    }
}

// -------------------------------------------------------------------------------------- consumers

// Writes a tile: of the first GEMM, activated, into the second's tiles.
template <int N, bool FIRST>
__device__ __forceinline__ void write_tile(const GemmArguments& args, const Tile& tile,
                                           const float (&d)[N / 2], int row_tile, float scale) {
    const float2 bias = bias_of(args, tile, row_tile);
    const auto sum = [&](int i) { return scaled(d[i], scale, i & 2 ? bias.y : bias.x); };
    const int warp = threadIdx.x / 32 % 4, lane = threadIdx.x % 32;
    const int group = lane / 4, quad = lane % 4;
    if constexpr (!FIRST) {
        write_rows<N>(args, tile, row_tile, sum);
    } else if constexpr (GATED) {
        // Rows come as 8 of gate, 8 of up: a warp's 16 are 8 columns, one swizzled unit of 16 bytes.
        const int column = row_tile * (GROUP_ROWS / 2) + warp * 8;
        uint8_t* const tiles = args.out + int64_t(tile.row) * args.out_columns * 2 +
                               column / CHUNK * (N * 128);
        const int unit = column % CHUNK / 8 ^ group;  // the token's number, modulo 8, is `group`
        uint8_t* const to = tiles + group * 128 + unit * 16 + quad * 4;
#pragma unroll
        for (int j = 0; j < N / 8; ++j) {
            const float first = activate(sum(4 * j), sum(4 * j + 2), args.gate);
            const float second = activate(sum(4 * j + 1), sum(4 * j + 3), args.gate);
            const uint32_t value = transpose(pack_bf16x2(first, second));
            if (8 * j + group < tile.tokens) *reinterpret_cast<uint32_t*>(to + j * 1024) = value;
        }
    } else {
        // A warp's 16 columns are two swizzled units. Of each token a thread has four columns, half a
        // unit, once they are transposed (see `write_rows`).
        uint8_t* const tiles = args.out + int64_t(tile.row) * args.out_columns * 2 +
                               int64_t(row_tile) * (N * 128);
        const int unit = warp * 2 + quad / 2 ^ group;  // the token's number, modulo 8, is `group`
        uint8_t* const to = tiles + group * 128 + unit * 16 + quad % 2 * 8;
#pragma unroll
        for (int j = 0; j < N / 8; ++j) {
            const auto pair = [&](int i) {
                return transpose(pack_bf16x2(relu2(sum(4 * j + i)), relu2(sum(4 * j + i + 1))));
            };
            const uint2 values{pair(0), pair(2)};
            if (8 * j + group < tile.tokens) *reinterpret_cast<uint2*>(to + j * 1024) = values;
        }
    }
}

// Computes the sums of a tile by each warp's own MMAs, where tokens are so few that a warpgroup's would
// be idle most of the time and cost more instructions to prepare than they save.
template <int N, typename Shape>
__device__ __forceinline__ void multiply_by_warps(const GemmArguments& args, float (&d)[N / 2],
                                                  Ring ring, uint8_t* stages, uint32_t full,
                                                  uint32_t empty) {
    const int lane = threadIdx.x % 32, row_group = Shape::ROW_GROUPS > 1 ? warpgroup() : 0;
    const int steps = args.chunks / 2;
    // A lane's row of the four matrices that are two MMAs' operand B.
    const uint32_t row = lane % 8 * 128 + (lane / 8 ^ lane % 8) * 16;
    const int first = Shape::K_GROUPS > 1 ? warpgroup() : 0;
    ring.skip<Shape::STAGES>(first);
    // All that the loop reads is at constant distances from these.
    const uint8_t* stage = stages + ring.stage * Shape::STAGE_BYTES;
    uint32_t barrier = full + 8 * ring.stage, phase = ring.phase;
    for (int step = first; step < steps; step += Shape::K_GROUPS) {
        const uint8_t* const weights = stage + Shape::X_BYTES + row_group * WEIGHT_BYTES;
        barrier_wait(barrier, phase);
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            const Fragment fragment = load_fragment(weights + half * CHUNK_BYTES);
            uint32_t a[4][4];
            dequantize(a, fragment, 0, args.multipliers);
#pragma unroll
            for (int pair = 0; pair < 2; ++pair) {
                const uint32_t x = shared_address(stage) + (row ^ pair * 64) + half * N * 128;
#pragma unroll
                for (int j = 0; j < N / 8; ++j) {
                    uint32_t b[4];
                    load_matrices(b, x + j * 1024);
                    warp_mma(d + 4 * j, a[2 * pair], b[0], b[1]);
                    warp_mma(d + 4 * j, a[2 * pair + 1], b[2], b[3]);
                }
            }
        }
        __syncwarp();
        if (lane == 0) barrier_arrive(barrier + (empty - full));
        stage += Shape::K_GROUPS * Shape::STAGE_BYTES, barrier += Shape::K_GROUPS * 8;
        if (barrier >= full + 8 * Shape::STAGES) {
            stage -= Shape::STAGES * Shape::STAGE_BYTES, barrier -= 8 * Shape::STAGES;
            phase ^= 1;
        }
    }
}

// Computes the sums of a tile by WGMMA. A stage is given back to the producer once the MMAs of the
// next have been issued: only then is it known that its own are done.
template <int N, typename Shape>
__device__ __forceinline__ void multiply_by_warpgroups(const GemmArguments& args, float (&d)[N / 2],
                                                       Ring ring, uint8_t* stages, uint32_t full,
                                                       uint32_t empty) {
    static_assert(Shape::K_GROUPS == 1, "every stage is multiplied here");
    const int lane = threadIdx.x % 32, row_group = warpgroup();
    // Where half or more of a thread's registers are sums, weights are made for fewer MMAs at a time.
    constexpr int AT_ONCE = N > 64 ? 2 : 4;
    uint32_t a[2][AT_ONCE][4];
    int before = -1;  // the stage whose MMAs may still run
    for (int step = 0; step < args.chunks / 2; ++step, ring.next<Shape::STAGES>()) {
        const uint8_t* const base = stages + ring.stage * Shape::STAGE_BYTES;
        const uint32_t b = b_descriptor(shared_address(base));
        barrier_wait(full + 8 * ring.stage, ring.phase);
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            const Fragment fragment = load_fragment(base + Shape::X_BYTES + row_group * WEIGHT_BYTES +
                                                    half * CHUNK_BYTES);
#pragma unroll
            for (int first = 0; first < 4; first += AT_ONCE) {
                auto& weights = a[AT_ONCE == 4 ? half : first / 2];
                dequantize(weights, fragment, first, args.multipliers);
                mma_fence();
#pragma unroll
                for (int k = 0; k < AT_ONCE; ++k)
                    mma<N>(d, weights[k], b + half * (N * 128 >> 4) + 2 * (first + k));
                mma_commit();
                mma_wait<1>();
                if (half == 0 && first == 0 && before >= 0 && lane == 0)
                    barrier_arrive(empty + 8 * before);
            }
        }
        before = ring.stage;
    }
    mma_wait<0>();
    mma_size_ends<N>();
    __syncwarp();
    if (lane == 0) barrier_arrive(empty + 8 * before);
}

template <int N, typename Shape, bool FIRST>
__device__ __forceinline__ void consume(const GemmArguments& args, const Tile& tile, int row_tile,
                                        Ring ring, uint8_t* stages, float* partial, uint32_t full,
                                        uint32_t empty) {
    constexpr int K_GROUPS = Shape::K_GROUPS;
    const int thread = threadIdx.x % 128, group = warpgroup();
    const int k_group = K_GROUPS > 1 ? group : 0, row_group = Shape::ROW_GROUPS > 1 ? group : 0;
    const float scale = args.global_scales[tile.expert] * UNSCALE;
    mma_size_begins<N>();
    float d[N / 2];
#pragma unroll
    for (int i = 0; i < N / 2; ++i) d[i] = 0.0f;
    if constexpr (N <= WARP_MMA_TOKENS)
        multiply_by_warps<N, Shape>(args, d, ring, stages, full, empty);
    else
        multiply_by_warpgroups<N, Shape>(args, d, ring, stages, full, empty);
    if constexpr (K_GROUPS > 1) {
        // The groups' sums are added in the order of their numbers. The first barrier makes sure that
        // the last tile's have been read.
        named_barrier_sync<K_GROUPS * 128>();
        if (k_group > 0) {
#pragma unroll
            for (int i = 0; i < N / 2; ++i)
                partial[((k_group - 1) * N / 2 + i) * 128 + thread] = d[i];
        }
        named_barrier_sync<K_GROUPS * 128>();
        if (k_group > 0) return;
        for (int other = 0; other < K_GROUPS - 1; ++other) {
#pragma unroll
            for (int i = 0; i < N / 2; ++i) d[i] += partial[(other * N / 2 + i) * 128 + thread];
        }
    }
    // Warpgroups past the last row compute on what lies there, and write nothing.
    if (row_tile + row_group < args.row_tiles)
        write_tile<N, FIRST>(args, tile, d, row_tile + row_group, scale);
}

}  // namespace

// Stores 16 bytes of a row in its tile, whose rows have `padded` columns.
__device__ __forceinline__ void store_unit(uint8_t* tiles, int padded, const Place& place, int unit,
                                           const uint4& value) {
    uint8_t* const tile = tiles + int64_t(place.tile_row) * padded * 2 + place.index * 128;
    *reinterpret_cast<uint4*>(tile + int64_t(unit / 8) * place.size * 128 +
                              (unit % 8 ^ place.index % 8) * 16) = value;
}

// The second GEMM's tiles: the first writes `columns` of the `padded` that they have.
struct Middle {
    uint8_t* tiles;
    int columns, padded;
};

// Clears what the first GEMM leaves out of a pair's row. Weights are zero there, and zero times what
// happens to be in memory may be NaN.
__device__ __forceinline__ void clear_padding(const Middle& middle, const Place& place) {
    const int unit = middle.columns / 8 + threadIdx.x;  // they are less than a stage
    if (unit < middle.padded / 8)
        store_unit(middle.tiles, middle.padded, place, unit, make_uint4(0, 0, 0, 0));
}

constexpr int GATHER_THREADS = 128, FEW_THREADS = 256;

// Copies rows of x, bf16 [tokens][stride], into the first GEMM's tiles. A CTA for each pair.
extern "C" __global__ void __launch_bounds__(GATHER_THREADS)
    gather(const uint4* x, int64_t stride, int top_k, int hidden, int padded, const Place* places,
           uint8_t* out, Middle middle) {
    wait_for_previous_kernel();
    trigger_next_kernel();
    const Place place = places[blockIdx.x];
    if (place.tile_row < 0) return;
    clear_padding(middle, place);
    const uint4* const row = x + int64_t(blockIdx.x / top_k) * stride / 8;
#pragma unroll 4
    for (int unit = threadIdx.x; unit < padded / 8; unit += GATHER_THREADS)
        store_unit(out, padded, place, unit,
                   unit < hidden / 8 ? row[unit] : make_uint4(0, 0, 0, 0));
}

// `route` and `gather` of at most FEW_PAIRS pairs. A CTA for each pair, which routes for itself while
// its part of x is on the way.
extern "C" __global__ void __launch_bounds__(FEW_THREADS)
    route_and_gather(const int* ids, const float* router_weights, const int* local, int pairs,
                     int experts, int token_step, int max_tokens, Tile* tiles, int* size_ends,
                     Place* places, const uint4* x, int64_t stride, int top_k, int hidden, int padded,
                     uint8_t* out, Middle middle) {
    constexpr int AHEAD = 4;
    trigger_next_kernel();
    const uint4* const row = x + int64_t(blockIdx.x / top_k) * stride / 8;
    uint4 ahead[AHEAD];
#pragma unroll
    for (int i = 0; i < AHEAD; ++i) {
        const int unit = threadIdx.x + i * FEW_THREADS;
        ahead[i] = unit < hidden / 8 ? row[unit] : make_uint4(0, 0, 0, 0);
    }
    const Place place = route_few(ids, router_weights, local, pairs, experts, token_step, max_tokens,
                                  blockIdx.x, blockIdx.x == 0, tiles, size_ends);
    if (threadIdx.x == 0) places[blockIdx.x] = place;
    if (place.tile_row < 0) return;
    clear_padding(middle, place);
#pragma unroll
    for (int i = 0; i < AHEAD; ++i) {
        const int unit = threadIdx.x + i * FEW_THREADS;
        if (unit < padded / 8) store_unit(out, padded, place, unit, ahead[i]);
    }
    for (int unit = threadIdx.x + AHEAD * FEW_THREADS; unit < padded / 8; unit += FEW_THREADS)
        store_unit(out, padded, place, unit,
                   unit < hidden / 8 ? row[unit] : make_uint4(0, 0, 0, 0));
}

DEFINE_GEMMS(8, 64, 4, 8)                                // where there are few tiles
DEFINE_GEMMS(64, 256, 1, 64, 56, 48, 40, 32, 24, 16, 8)  // decoding
// Prefill. Steps of 8 make fewer rows that hold no token; larger tiles make weights less often.
DEFINE_GEMMS(128, 256, 1, 128, 120, 112, 104, 96, 88, 80, 72, 64, 56, 48, 40, 32, 24, 16, 8)
DEFINE_GEMMS(192, 192, 1, 192, 176, 160, 144, 128, 112, 96, 80, 64, 48, 32, 16)

// As `tile_shapes` in bf16.py.
constexpr Gemms GEMMS[] = {GEMMS_8x64, GEMMS_64x256, GEMMS_128x256, GEMMS_192x192};

// Runs the layer. Returns a cudaError_t.
//
// All kernels but the first are dependent launches: they start while the one before still runs. The
// invariant: the first GEMM triggers the next kernel only AFTER it has waited. For what follows it reads
// `tiles`, `size_ends` and `places`, which `route` writes, without waiting; the second GEMM waits
// before it reads X, and `combine` before it reads the GEMM's output. That these have started must
// therefore mean that `route` has ended.
EXPORTED int run(const LaunchSpec* given, cudaStream_t stream) {
    const LaunchSpec& spec = *given;
    const Gemms& gemms = GEMMS[spec.tile_shape];
    const int pairs = spec.tokens * spec.top_k;
    const auto* const x = static_cast<const uint4*>(spec.x);
    auto* const x_tiles = static_cast<uint8_t*>(spec.x_tiles);
    const Middle middle{static_cast<uint8_t*>(spec.middle_tiles), spec.intermediate,
                        spec.intermediate_padded};
    int error;
    if (pairs <= FEW_PAIRS) {
        error = launch(route_and_gather, pairs, FEW_THREADS, 0, stream, false, spec.ids,
                       spec.router_weights, spec.local, pairs, spec.experts, gemms.shape.token_step,
                       gemms.shape.max_tokens, spec.tiles, spec.size_ends, spec.places, x,
                       spec.x_stride, spec.top_k, spec.hidden, spec.hidden_padded, x_tiles, middle);
    } else {
        error = launch_route(spec, gemms.shape, stream);
        if (!error)
            error = launch(gather, pairs, GATHER_THREADS, 0, stream, true, x, spec.x_stride,
                           spec.top_k, spec.hidden, spec.hidden_padded, spec.places, x_tiles,
                           middle);
    }
    if (!error)
        error = gemms.launch(true, first_arguments(spec, middle.tiles, middle.padded),
                             spec.processors, stream);
    if (!error) error = gemms.launch(false, second_arguments(spec), spec.processors, stream);
    return error ? error : launch_combine(spec, stream);
}

#include "exports.cuh"
