// NVFP4 routed experts on Hopper (sm_90a): bf16 activations, weights of 4.5 bits.
//
// Both GEMMs compute D[weight rows, tokens] = W X^T with WGMMA, or with each warp's own MMAs where
// tokens are few: the weights are the A operand and come from registers, where they are made from
// E2M1 codes and block scales on the fly; the tokens are the B operand, in shared memory, and may be
// as few as 8. docs/kernel-notes.md has what was measured. Everything is streamed by bulk
// copies, one thread of a CTA issuing them: weights are repacked at load into the order in which
// the MMA's threads hold them (hopper_weights.py), activations are laid out in swizzled tiles by
// `gather` and by the first GEMM's epilogue. A grid of one CTA per multiprocessor walks over tiles.
//
// Column j of D depends on row j of X alone: rows of a tile that hold no token are never cleared.
// Every sum is taken in one order, whoever computes it: outputs are equal from run to run.
//
// The wgmma wrappers `mma<N>` are generated (hopper_moe.py).

#ifndef EMULATED
#include <cuda_bf16.h>
#endif
#include <stdint.h>

namespace {

constexpr int ELEMENT = 2;        // bytes of an activation
constexpr int MOST_SORTS = 8;     // sizes of tiles
constexpr int WARPS_TOKENS = 16;  // up to which each warp's own MMAs are used

}  // namespace

#include "hopper_common.cuh"

namespace {

#ifndef EMULATED

// Four matrices of 8 x 8; each lane gives the address of a row.
__device__ __forceinline__ void load_matrices(uint32_t (&matrices)[4], uint32_t row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(matrices[0]), "=r"(matrices[1]), "=r"(matrices[2]), "=r"(matrices[3])
                 : "r"(row)
                 : "memory");
}

// D[16, 8] += A[16, 16] B[16, 8] of one warp, at once.
__device__ __forceinline__ void warp_mma(float* d, const uint32_t (&a)[4], uint32_t b, uint32_t b_next) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, "
        "{%8, %9}, {%0, %1, %2, %3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b), "r"(b_next));
}

__device__ __forceinline__ uint32_t scaled(uint32_t values, uint32_t scale) {
    uint32_t result;
    asm("mul.rn.bf16x2 %0, %1, %2;" : "=r"(result) : "r"(values), "r"(scale));
    return result;
}

// The same number in both halves, each of two.
__device__ __forceinline__ void halves(uint32_t& low, uint32_t& high, uint32_t pair) {
    // Not __byte_perm: of these moves ptxas makes operand modifiers of the multiplications.
    asm("{.reg .b16 l, h; mov.b32 {l, h}, %2; mov.b32 %0, {l, l}; mov.b32 %1, {h, h};}"
        : "=r"(low), "=r"(high)
        : "r"(pair));
}

template <uint32_t MASK, uint32_t BITS>
__device__ __forceinline__ uint32_t masked_with(uint32_t value) {
    uint32_t result;  // (value & MASK) | BITS: of this written in C++ ptxas makes two instructions
    asm("lop3.b32 %0, %1, %2, %3, 0xEA;" : "=r"(result) : "r"(value), "n"(MASK), "n"(BITS));
    return result;
}

#endif

// --------------------------------------------------------------------------------- dequantizing

// Eight weights of a thread: two in each of the MMA's four A registers.
//
// A code's sign, exponent and mantissa bits, put at bits 15, 8:7 and 6 of a bf16, are its value
// times 2^-126 (zero and 0.5 are then bf16's zero and a subnormal). Four codes cannot lie so in 16
// bits that a shift each brings them there; three can, and a product spreads the fourth's bits.
// Block scales come with a 5-bit exponent, as bf16 bits 11:4; under an exponent of 192 they are times
// 2^74. So a product is the weight times 2^-52, exactly: 2 bits of mantissa times 4.
__device__ __forceinline__ void dequantize(uint32_t (&a)[4], uint32_t codes, uint32_t scales,
                                           const Powers& by) {
    constexpr uint32_t WHOLE = 0x81C081C0, SPREAD = 1 << 10 | 1 << 5 | 1;
    uint32_t first, second;
    halves(first, second, scales);
    a[0] = scaled(codes & WHOLE, first);
    a[1] = scaled((codes * by.eight) & WHOLE, second);
    a[2] = scaled((codes * by.sixty_four) & WHOLE, first);
    a[3] = scaled((((codes >> 8) & 0x006C006C) * SPREAD) & WHOLE, second);
}

// What a thread has of a chunk: codes for four MMAs, and their block scales.
struct Fragment {
    uint4 codes;
    uint2 scales;
};

__device__ __forceinline__ Fragment fragment(const uint8_t* chunk) {
    const int thread = threadIdx.x % 128;
    return {*reinterpret_cast<const uint4*>(chunk + thread * 16),
            *reinterpret_cast<const uint2*>(chunk + CODES + thread / 4 * 8)};
}

// For the MMAs from `first` on.
template <int COUNT>
__device__ __forceinline__ void dequantize(uint32_t (&a)[COUNT][4], const Fragment& from, int first,
                                           const Powers& by) {
    constexpr uint32_t MASK = 0x0FF00FF0, EXPONENT = 0x60006000;
    const uint32_t codes[4] = {from.codes.x, from.codes.y, from.codes.z, from.codes.w};
#pragma unroll
    for (int i = 0; i < COUNT; ++i) {
        const uint32_t pair = first + i < 2 ? from.scales.x : from.scales.y;
        const uint32_t moved = (first + i) % 2 ? __byte_perm(pair, 0, 0x2301) : pair;
        dequantize(a[i], codes[first + i], masked_with<MASK, EXPONENT>(moved), by);
    }
}

constexpr float UNSCALE = 4503599627370496.0f;  // 2^52

template <int N, bool GATED>
__device__ __forceinline__ void write(const Gemm& args, const Tile& tile, const float (&d)[N / 2],
                                      int row_tile, float scale) {
    if constexpr (GATED) {
        const int warp = threadIdx.x / 32 % 4, lane = threadIdx.x % 32;
        const int group = lane / 4, quad = lane % 4;
        // Rows come as 8 of gate, 8 of up: a warp's 16 are 8 columns, one swizzled unit of 16 bytes.
        const int column = row_tile * (ROWS / 2) + warp * 8;
        uint8_t* const tiles = args.out + int64_t(tile.row) * args.out_columns * 2 +
                               column / CHUNK * (N * 128);
        const int unit = column % CHUNK / 8 ^ group;  // the token's, modulo 8, is `group`
        uint8_t* const to = tiles + group * 128 + unit * 16 + quad * 4;
#pragma unroll
        for (int j = 0; j < N / 8; ++j) {
            const float first = activate(d[4 * j] * scale, d[4 * j + 2] * scale, args.gate);
            const float second = activate(d[4 * j + 1] * scale, d[4 * j + 3] * scale, args.gate);
            const uint32_t value = transpose(pack(first, second));
            if (8 * j + group < tile.count) *reinterpret_cast<uint32_t*>(to + j * 1024) = value;
        }
    } else {
        write_rows<N>(args, tile, d, row_tile, scale);
    }
}

// The sums of a tile by each warp's own MMAs, where tokens are so few that a warpgroup's would be idle
// most of the time and cost more instructions to prepare than they save.
template <int N, int MAX_N, int WM, int WK>
__device__ __forceinline__ void multiply_by_warps(const Gemm& args, float (&d)[N / 2], Ring ring,
                                                  uint8_t* stages, uint32_t full, uint32_t empty) {
    using S = Shape<MAX_N, WM, WK>;
    const int lane = threadIdx.x % 32, side = WM > 1 ? warpgroup() : 0;
    const int steps = args.chunks / 2;
    // A lane's row of the four matrices that are two MMAs' operand B.
    const uint32_t row = lane % 8 * 128 + (lane / 8 ^ lane % 8) * 16;
    const int first = WK > 1 ? warpgroup() : 0;
    ring.skip<S::STAGES>(first);
    // All that the loop reads is at constant distances from these.
    const uint8_t* stage = stages + ring.stage * S::STAGE_BYTES;
    uint32_t barrier = full + 8 * ring.stage, phase = ring.phase;
    for (int step = first; step < steps; step += WK) {
        const uint8_t* const mine = stage + S::X + side * WEIGHTS;
        barrier_wait(barrier, phase);
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            const Fragment of = fragment(mine + half * PACKED);
            uint32_t a[4][4];
            dequantize(a, of, 0, args.powers);
#pragma unroll
            for (int pair = 0; pair < 2; ++pair) {
                const uint32_t x = shared(stage) + (row ^ pair * 64) + half * N * 128;
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
        stage += WK * S::STAGE_BYTES, barrier += WK * 8;
        if (barrier >= full + 8 * S::STAGES) {
            stage -= S::STAGES * S::STAGE_BYTES, barrier -= 8 * S::STAGES;
            phase ^= 1;
        }
    }
}

template <int N, int MAX_N, int WM>
__device__ __forceinline__ void multiply_by_warpgroups(const Gemm& args, float (&d)[N / 2], Ring ring,
                                                       uint8_t* stages, uint32_t full,
                                                       uint32_t empty) {
    using S = Shape<MAX_N, WM, 1>;
    const int lane = threadIdx.x % 32, side = warpgroup();
    // Where half or more of a thread's registers are sums, MMAs are given fewer weights at a time.
    constexpr int AT_ONCE = N > 64 ? 2 : 4;
    uint32_t a[2][AT_ONCE][4];
    int before = -1;  // the stage whose MMAs may still run
    for (int step = 0; step < args.chunks / 2; ++step, ring.next<S::STAGES>()) {
        const uint8_t* const base = stages + ring.stage * S::STAGE_BYTES;
        const uint32_t b = descriptor(shared(base));
        barrier_wait(full + 8 * ring.stage, ring.phase);
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            const Fragment of = fragment(base + S::X + side * WEIGHTS + half * PACKED);
#pragma unroll
            for (int first = 0; first < 4; first += AT_ONCE) {
                auto& registers = a[AT_ONCE == 4 ? half : first / 2];
                dequantize(registers, of, first, args.powers);
                mma_fence();
#pragma unroll
                for (int k = 0; k < AT_ONCE; ++k)
                    mma<N>(d, registers[k], b + half * (N * 128 >> 4) + 2 * (first + k));
                mma_commit();
                mma_wait<1>();
                if (half == 0 && first == 0 && before >= 0 && lane == 0)
                    barrier_arrive(empty + 8 * before);
            }
        }
        before = ring.stage;
    }
    mma_wait<0>();
    variant_ends<N>();
    __syncwarp();
    if (lane == 0) barrier_arrive(empty + 8 * before);
}

template <int N, int MAX_N, int WM, int WK, bool GATED>
__device__ __forceinline__ void consume(const Gemm& args, const Tile& tile, int row_tile, Ring ring,
                                        uint8_t* stages, float* partial, uint32_t full,
                                        uint32_t empty) {
    using S = Shape<MAX_N, WM, WK>;
    const int thread = threadIdx.x % 128, group = warpgroup();
    const int part = WK > 1 ? group : 0, side = WM > 1 ? group : 0;
    const float scale = args.globals[tile.expert] * UNSCALE;
    variant_begins<N>();
    float d[N / 2];
#pragma unroll
    for (int i = 0; i < N / 2; ++i) d[i] = 0.0f;
    if constexpr (N <= WARPS_TOKENS)
        multiply_by_warps<N, MAX_N, WM, WK>(args, d, ring, stages, full, empty);
    else
        multiply_by_warpgroups<N, MAX_N, WM>(args, d, ring, stages, full, empty);
    if constexpr (WK > 1) {
        // In the order of the parts. The barrier before makes sure the last tile's were read.
        meet<WK * 128>();
        if (part > 0) {
#pragma unroll
            for (int i = 0; i < N / 2; ++i) partial[((part - 1) * N / 2 + i) * 128 + thread] = d[i];
        }
        meet<WK * 128>();
        if (part > 0) return;
        for (int other = 0; other < WK - 1; ++other) {
#pragma unroll
            for (int i = 0; i < N / 2; ++i) d[i] += partial[(other * N / 2 + i) * 128 + thread];
        }
    }
    // Warpgroups past the last row compute on what lies there, and write nothing.
    if (row_tile + side < args.row_tiles) write<N, GATED>(args, tile, d, row_tile + side, scale);
}

}  // namespace

// Rows of x, bf16 [tokens][stride], into the first GEMM's tiles. A CTA a pair.
extern "C" __global__ void __launch_bounds__(128) gather(const uint4* x, int64_t stride, int top_k,
                                                         int hidden, int padded, const int4* places,
                                                         uint8_t* out) {
    wait_for_last();
    next_may_come();
    const int4 place = places[blockIdx.x];
    if (place.x < 0) return;
    const uint4* const row = x + int64_t(blockIdx.x / top_k) * stride / 8;
    uint8_t* const tile = out + int64_t(place.x) * padded * 2 + place.z * 128;
#pragma unroll 4
    for (int unit = threadIdx.x; unit < padded / 8; unit += blockDim.x) {
        const uint4 value = unit < hidden / 8 ? row[unit] : make_uint4(0, 0, 0, 0);
        uint8_t* const to = tile + int64_t(unit / 8) * place.y * 128 + (unit % 8 ^ place.z % 8) * 16;
        *reinterpret_cast<uint4*>(to) = value;
    }
}

GEMM(few, 8, 1, 4, 8)                                      // where tiles are few
GEMM(some, 64, 4, 1, 64, 56, 48, 40, 32, 24, 16, 8)        // decoding
GEMM(many, 128, 4, 1, 128, 112, 96, 80, 64, 48, 32, 16)    // prefill

constexpr Kind KINDS[] = {few_kind, some_kind, many_kind};  // as hopper_moe.py's UNITS

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
    void *rows1, *rows2, *parts;
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
        error = launch(gather, pairs, 128, 0, stream, true, static_cast<const uint4*>(l.x), l.stride,
                       l.top_k, l.hidden, l.hidden_padded, l.places, static_cast<uint8_t*>(l.rows1));
    Gemm first{static_cast<const uint8_t*>(l.w13), l.globals13, static_cast<const uint8_t*>(l.rows1),
               l.tiles, l.sorts, static_cast<uint8_t*>(l.rows2), 2 * l.intermediate_padded / ROWS,
               l.hidden_padded / CHUNK, l.intermediate_padded, l.gate};
    Gemm second{static_cast<const uint8_t*>(l.w2), l.globals2, static_cast<const uint8_t*>(l.rows2),
                l.tiles, l.sorts, static_cast<uint8_t*>(l.parts), l.row_tiles2,
                l.intermediate_padded / CHUNK, l.hidden, l.gate};
    if (!error) error = kind.start(true, first, l.processors, stream);
    if (!error) error = kind.start(false, second, l.processors, stream);
    if (error) return error;
    const int across = (l.hidden / 8 + COMBINED - 1) / COMBINED;
    return launch(combine, l.tokens * across, COMBINED, 0, stream, true,
                  static_cast<const uint4*>(l.parts), l.places, l.weights, l.top_k, l.hidden, across,
                  static_cast<uint4*>(l.out));
}
