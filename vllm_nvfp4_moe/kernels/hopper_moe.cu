// NVFP4 routed experts on Hopper (sm_90a): bf16 activations, weights of 4.5 bits.
//
// Both GEMMs compute D[weight rows, tokens] = W X^T with WGMMA: the weights are the A operand and
// come from registers, where they are made from E2M1 codes and block scales on the fly; the tokens
// are the B operand, in shared memory, and may be as few as 8. Everything is streamed by bulk
// copies, one thread of a CTA issuing them: weights are repacked at load into the order in which
// the MMA's threads hold them (hopper_weights.py), activations are laid out in swizzled tiles by
// `gather` and by the first GEMM's epilogue. A grid of one CTA per multiprocessor walks over tiles.
//
// Column j of D depends on row j of X alone: rows of a tile that hold no token are never cleared.
// Every sum is taken in one order, whoever computes it: outputs are equal from run to run.
//
// The wgmma wrappers `mma<N>` are generated (hopper_moe.py).

// What a host's compiler cannot do is not there if EMULATED: tests/plugin/cuda_emulation.h has it.

#ifndef EMULATED
#include <cuda_bf16.h>
#endif
#include <stdint.h>

namespace {

constexpr int CHUNK = 64;              // columns of weights (and of a swizzled row of X, 128 bytes)
constexpr int STAGE = 128;             // columns a pipeline stage
constexpr int ROWS = 64;               // rows of weights a warpgroup's tile
constexpr int CODES = ROWS * CHUNK / 2;        // bytes of a chunk's codes,
constexpr int PACKED = CODES + ROWS * CHUNK / 16;  // and with its block scales
constexpr int WEIGHTS = PACKED * STAGE / CHUNK;    // bytes of a warpgroup's weights a stage
constexpr int MOST_EXPERTS = 1024, MOST_SORTS = 8;  // sorts: sizes of tiles

// ---------------------------------------------------------------------------------- primitives

__device__ __forceinline__ uint32_t shared(const void* pointer) {
    return static_cast<uint32_t>(__cvta_generic_to_shared(pointer));
}

// The lower half of a shared-memory descriptor of a K-major B operand, in units of 16 bytes. The
// upper half (in mma<N>) says: rows of 128 bytes, swizzled, 1024 bytes to the next 8 rows.
__device__ __forceinline__ uint32_t descriptor(uint32_t address) {
    return address >> 4 | 1 << 16;
}

__device__ __forceinline__ uint32_t pack(float low, float high) {
    const __nv_bfloat162 pair = __floats2bfloat162_rn(low, high);
    return reinterpret_cast<const uint32_t&>(pair);
}

#ifndef EMULATED

__device__ __forceinline__ void barrier_init(uint32_t barrier, int count) {
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(barrier), "r"(count));
}

__device__ __forceinline__ void barriers_made() {
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
}

__device__ __forceinline__ void barrier_expect(uint32_t barrier, int bytes) {
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "r"(bytes)
                 : "memory");
}

__device__ __forceinline__ void barrier_arrive(uint32_t barrier) {
    asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(barrier) : "memory");
}

__device__ __forceinline__ void barrier_wait(uint32_t barrier, uint32_t parity) {
    asm volatile(
        "{\n.reg .pred done;\n"
        "again: mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n"
        "@!done bra again;\n}\n" ::"r"(barrier),
        "r"(parity)
        : "memory");
}

// All of the first `THREADS` threads of a CTA.
template <int THREADS>
__device__ __forceinline__ void meet() {
    asm volatile("bar.sync 1, %0;" ::"n"(THREADS) : "memory");
}

__device__ __forceinline__ void bulk_copy(uint32_t to, const void* from, int bytes, uint32_t barrier,
                                          uint64_t policy) {
    asm volatile(
        "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint "
        "[%0], [%1], %2, [%3], %4;" ::"r"(to),
        "l"(from), "r"(bytes), "r"(barrier), "l"(policy)
        : "memory");
}

__device__ __forceinline__ uint64_t read_once() {
    uint64_t policy;
    asm("createpolicy.fractional.L2::evict_first.b64 %0, 1.0;" : "=l"(policy));
    return policy;
}

__device__ __forceinline__ uint64_t read_again() {
    uint64_t policy;
    asm("createpolicy.fractional.L2::evict_normal.b64 %0, 1.0;" : "=l"(policy));
    return policy;
}

__device__ __forceinline__ uint64_t read_often() {
    uint64_t policy;
    asm("createpolicy.fractional.L2::evict_last.b64 %0, 1.0;" : "=l"(policy));
    return policy;
}

__device__ __forceinline__ void mma_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
__device__ __forceinline__ void mma_commit() {
    asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
}
template <int GROUPS>
__device__ __forceinline__ void mma_wait() {
    asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(GROUPS) : "memory");
}

template <int COUNT, bool MORE>
__device__ __forceinline__ void registers() {
    if constexpr (MORE)
        asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(COUNT));
    else
        asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(COUNT));
}

__device__ __forceinline__ uint32_t transpose(uint32_t matrix) {
    uint32_t result;
    asm volatile("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;" : "=r"(result) : "r"(matrix));
    return result;
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

// The warpgroup's number. From a shuffle ptxas sees that it is one for the warp, and keeps what
// follows from it, descriptors above all, in uniform registers.
__device__ __forceinline__ int warpgroup() { return __shfl_sync(~0u, threadIdx.x / 128, 0); }

// Keep what variants have in common from being merged: ptxas would run the MMAs one by one.
template <int N>
__device__ __forceinline__ void variant_begins() {
    asm volatile("// %0 tokens" ::"n"(N) : "memory");
}
template <int N>
__device__ __forceinline__ void variant_ends() {
    asm volatile("// %0 tokens done" ::"n"(N) : "memory");
}

template <typename... Parameters, typename... Arguments>
int launch(void (*kernel)(Parameters...), int grid, int threads, int bytes, cudaStream_t stream,
           const Arguments&... arguments) {
    kernel<<<grid, threads, bytes, stream>>>(arguments...);
    return cudaGetLastError();
}

#endif

// --------------------------------------------------------------------------------- dequantizing

// Eight weights of a thread: two in each of the MMA's four A registers.
//
// A code's sign, exponent and mantissa bits, put at bits 15, 8:7 and 6 of a bf16, are its value
// times 2^-126 (zero and 0.5 are then bf16's zero and a subnormal). Block scales come with a 5-bit
// exponent, as bf16 bits 11:4; under an exponent of 192 they are times 2^74. So a product is the
// weight times 2^-52, exactly: 2 bits of mantissa times 4.
__device__ __forceinline__ void dequantize(uint32_t (&a)[4], uint32_t codes, uint32_t scales) {
    constexpr uint32_t WHOLE = 0x81C081C0, VALUE = 0x01C001C0, SIGN = 0x80008000;
    uint32_t first, second;
    halves(first, second, scales);
    a[0] = scaled(codes & WHOLE, first);
    a[1] = scaled((codes << 3) & WHOLE, second);
    a[2] = scaled(((codes << 6) & VALUE) | ((codes << 2) & SIGN), first);
    a[3] = scaled(((codes >> 3) & VALUE) | ((codes << 1) & SIGN), second);
}

__device__ __forceinline__ void dequantize(uint32_t (&a)[4][4], const uint4& codes,
                                           const uint2& scales) {
    constexpr uint32_t MASK = 0x0FF00FF0, EXPONENT = 0x60006000;
    dequantize(a[0], codes.x, masked_with<MASK, EXPONENT>(scales.x >> 4));
    dequantize(a[1], codes.y, masked_with<MASK, EXPONENT>(scales.x << 4));
    dequantize(a[2], codes.z, masked_with<MASK, EXPONENT>(scales.y >> 4));
    dequantize(a[3], codes.w, masked_with<MASK, EXPONENT>(scales.y << 4));
}

constexpr float UNSCALE = 4503599627370496.0f;  // 2^52

// ------------------------------------------------------------------------------------- the tiles

// `count` tokens of one expert, in `n` rows of X from `row` on.
struct Tile {
    int expert, n, count, row;
};

struct Gate {
    float alpha, beta, limit;
    int tanh;  // gelu's, instead of the sigmoid
};

__device__ __forceinline__ float activate(float gate, float up, const Gate& rule) {
    // Not fminf, fmaxf: NaN must come out.
    gate = gate > rule.limit ? rule.limit : gate;
    up = up > rule.limit ? rule.limit : up < -rule.limit ? -rule.limit : up;
    if (rule.tanh) {
        const float inner = 0.7978845608028654f * (gate + 0.044715f * gate * gate * gate);
        return 0.5f * gate * (1.0f + tanhf(inner)) * (up + rule.beta);
    }
    return gate / (1.0f + __expf(-rule.alpha * gate)) * (up + rule.beta);
}

struct Gemm {
    const uint8_t* weights;  // [experts][row tiles][chunks][PACKED]
    const float* globals;    // [experts], global scales
    const uint8_t* x;        // tiles of [chunks][n][128 bytes], swizzled
    const Tile* tiles;
    const int* sorts;  // where the tiles of each size end, the largest first
    const float* row_weight;  // the router's, of each row of X
    const int* row_pair;      // token * top k + place, of each row of X
    uint8_t* out;             // as x (first GEMM), or bf16 [pairs][hidden] (second)
    int row_tiles, chunks, out_columns;
    Gate gate;
};

template <int N, bool GATED>
__device__ __forceinline__ void write(const Gemm& args, const Tile& tile, const float (&d)[N / 2],
                                      int row_tile) {
    const int warp = threadIdx.x / 32 % 4, lane = threadIdx.x % 32, group = lane / 4, quad = lane % 4;
    const float scale = args.globals[tile.expert] * UNSCALE;
    if constexpr (GATED) {
        // Rows come as 8 of gate, 8 of up: a warp's 16 are 8 columns, one swizzled unit of 16 bytes.
        const int column = row_tile * (ROWS / 2) + warp * 8;
        uint8_t* const tiles = args.out + int64_t(tile.row) * args.out_columns * 2 +
                               int64_t(column / CHUNK) * tile.n * 128;
#pragma unroll
        for (int j = 0; j < N / 8; ++j) {
            const float first = activate(d[4 * j] * scale, d[4 * j + 2] * scale, args.gate);
            const float second = activate(d[4 * j + 1] * scale, d[4 * j + 3] * scale, args.gate);
            const uint32_t value = transpose(pack(first, second));
            const int token = 8 * j + group;
            if (token < tile.count) {
                const int unit = column % CHUNK / 8 ^ token % 8;
                *reinterpret_cast<uint32_t*>(tiles + token * 128 + unit * 16 + quad * 4) = value;
            }
        }
    } else {
        const int column = row_tile * ROWS + warp * 16 + quad * 2;
#pragma unroll
        for (int j = 0; j < N / 8; ++j) {
            const int token = 8 * j + group, pair_first = tile.row + 8 * j + 2 * quad;
            const bool there = 8 * j + 2 * quad < tile.count, next = 8 * j + 2 * quad + 1 < tile.count;
            const float first = there ? args.row_weight[pair_first] * scale : 0.0f;
            const float second = next ? args.row_weight[pair_first + 1] * scale : 0.0f;
            const uint32_t low = transpose(pack(d[4 * j] * first, d[4 * j + 1] * second));
            const uint32_t high = transpose(pack(d[4 * j + 2] * first, d[4 * j + 3] * second));
            if (token < tile.count) {
                uint8_t* const row =
                    args.out + int64_t(args.row_pair[tile.row + token]) * args.out_columns * 2;
                if (column < args.out_columns) *reinterpret_cast<uint32_t*>(row + column * 2) = low;
                if (column + 8 < args.out_columns)
                    *reinterpret_cast<uint32_t*>(row + (column + 8) * 2) = high;
            }
        }
    }
}

// The state of the ring of stages, for its producer as for its consumers.
struct Ring {
    int stage = 0;
    uint32_t phase = 0;
    template <int STAGES>
    __device__ __forceinline__ void next() {
        if (++stage == STAGES) stage = 0, phase ^= 1;
    }
    template <int STAGES>
    __device__ __forceinline__ void skip(int steps) {
        phase ^= (stage + steps) / STAGES & 1;
        stage = (stage + steps) % STAGES;
    }
};

// WM warpgroups side by side take 64 rows each, WK of them the same rows and every WK-th stage.
template <int MAX_N, int WM, int WK>
struct Shape {
    // Of a stage: first its part of X, in atoms of 1024 bytes, then its weights.
    static constexpr int X = MAX_N * STAGE * 2;
    static constexpr int STAGE_BYTES = (X + WM * WEIGHTS + 1023) / 1024 * 1024;
    static constexpr int PARTIAL = WK > 1 ? (WK - 1) * ROWS * MAX_N * 4 : 0;
    static constexpr int BUDGET = 227 * 1024 - 1024 - 1024 - PARTIAL;
    static constexpr int STAGES = BUDGET / STAGE_BYTES < 24 ? BUDGET / STAGE_BYTES : 24;
    static constexpr int CONSUMERS = WM * WK, THREADS = (CONSUMERS + 1) * 128;
    // A register file of 64 K, given to all alike at the start; the producer needs few.
    static constexpr int ENTRY = 65536 / THREADS / 8 * 8, PRODUCER_REGISTERS = 24;
    static constexpr int CONSUMER_REGISTERS =
        ((CONSUMERS + 1) * ENTRY - PRODUCER_REGISTERS) / CONSUMERS / 8 * 8;
    static constexpr int BYTES = 1024 + 1024 + PARTIAL + STAGES * STAGE_BYTES;
    static_assert(STAGES >= 2, "no room for two stages");
};

template <int N, int MAX_N, int WM, int WK, bool GATED>
__device__ __forceinline__ void consume(const Gemm& args, const Tile& tile, int row_tile, Ring ring,
                                        uint8_t* stages, float* partial, uint32_t full,
                                        uint32_t empty) {
    using S = Shape<MAX_N, WM, WK>;
    const int thread = threadIdx.x % 128, group = warpgroup(), lane = threadIdx.x % 32;
    const int part = WK > 1 ? group : 0, side = WM > 1 ? group : 0;
    variant_begins<N>();
    float d[N / 2];
#pragma unroll
    for (int i = 0; i < N / 2; ++i) d[i] = 0.0f;
    uint32_t a[2][4][4];
    uint32_t before = 0;  // the stage whose MMAs may still run
    bool any = false;
    const int steps = args.chunks / 2;
    for (int step = 0; step < steps; ++step, ring.next<S::STAGES>()) {
        if (WK > 1 && step % WK != part) continue;
        uint8_t* const base = stages + ring.stage * S::STAGE_BYTES;
        const uint8_t* const packed = base + S::X + side * WEIGHTS;
        const uint32_t b = descriptor(shared(base));
        barrier_wait(full + 8 * ring.stage, ring.phase);
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            const uint8_t* const chunk = packed + half * PACKED;
            const uint4 codes = *reinterpret_cast<const uint4*>(chunk + thread * 16);
            const uint2 scales = *reinterpret_cast<const uint2*>(chunk + CODES + thread / 4 * 8);
            dequantize(a[half], codes, scales);
            mma_fence();
#pragma unroll
            for (int k = 0; k < 4; ++k) mma<N>(d, a[half][k], b + half * (tile.n * 128 >> 4) + 2 * k);
            mma_commit();
            mma_wait<1>();
            if (half == 0 && any && lane == 0) barrier_arrive(empty + 8 * before);
        }
        before = ring.stage;
        any = true;
    }
    mma_wait<0>();
    variant_ends<N>();
    __syncwarp();
    if (any && lane == 0) barrier_arrive(empty + 8 * before);
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
    if (row_tile + side < args.row_tiles) write<N, GATED>(args, tile, d, row_tile + side);
}

// The tiles of N rows: up to index `end`.
template <int N, int MAX_N, int WM, int WK, bool GATED>
__device__ __forceinline__ void walk(const Gemm& args, int& index, int end, int across, Ring& ring,
                                     uint8_t* stages, float* partial, uint32_t full, uint32_t empty) {
    using S = Shape<MAX_N, WM, WK>;
    const int steps = args.chunks / 2;
    for (; index < end; index += gridDim.x, ring.skip<S::STAGES>(steps)) {
        const Tile tile = args.tiles[index / across];
        const int row_tile = index % across * WM;
        consume<N, MAX_N, WM, WK, GATED>(args, tile, row_tile, ring, stages, partial, full, empty);
    }
}

template <int MAX_N, int WM, int WK, bool GATED, int... NS>
__device__ __forceinline__ void gemm(const Gemm& args) {
    using S = Shape<MAX_N, WM, WK>;
    extern __shared__ uint8_t memory[];
    uint8_t* const aligned = memory + (1024 - shared(memory) % 1024) % 1024;
    float* const partial = reinterpret_cast<float*>(aligned + S::STAGES * S::STAGE_BYTES);
    const uint32_t full = shared(aligned) + S::STAGES * S::STAGE_BYTES + S::PARTIAL;
    const uint32_t empty = full + 8 * S::STAGES;
    if (threadIdx.x == 0) {
        for (int i = 0; i < S::STAGES; ++i) {
            barrier_init(full + 8 * i, 1);
            barrier_init(empty + 8 * i, 4 * WM);  // a warp each, of the warpgroups that use it
        }
        barriers_made();
    }
    __syncthreads();

    const int across = (args.row_tiles + WM - 1) / WM, steps = args.chunks / 2;
    const int total = args.sorts[sizeof...(NS) - 1] * across;
    Ring ring;
    if (warpgroup() >= S::CONSUMERS) {
        registers<S::PRODUCER_REGISTERS, false>();
        if (threadIdx.x % 128) return;
        // Where most experts have one tile their weights are read once.
        const uint64_t weights_policy = MAX_N > 64 ? read_again() : read_once();
        const uint64_t x_policy = read_often();
        for (int index = blockIdx.x; index < total; index += gridDim.x) {
            const Tile tile = args.tiles[index / across];
            const int row_tile = index % across * WM;
            const int sides = min(WM, args.row_tiles - row_tile);
            const int64_t chunks = args.chunks;
            const uint8_t* weights =
                args.weights + (int64_t(tile.expert) * args.row_tiles + row_tile) * chunks * PACKED;
            const uint8_t* x = args.x + int64_t(tile.row) * chunks * 128;
            const int bytes = tile.n * STAGE * 2;
            for (int step = 0; step < steps; ++step, ring.next<S::STAGES>()) {
                const uint32_t to = shared(aligned) + ring.stage * S::STAGE_BYTES;
                const uint32_t barrier = full + 8 * ring.stage;
                barrier_wait(empty + 8 * ring.stage, ring.phase ^ 1);
                barrier_expect(barrier, sides * WEIGHTS + bytes);
                for (int side = 0; side < sides; ++side)
                    bulk_copy(to + S::X + side * WEIGHTS,
                              weights + side * chunks * PACKED + step * WEIGHTS, WEIGHTS, barrier,
                              weights_policy);
                bulk_copy(to, x + int64_t(step) * bytes, bytes, barrier, x_policy);
            }
        }
        return;
    } else {
    registers<S::CONSUMER_REGISTERS, true>();
    int index = blockIdx.x, sort = 0;
    (walk<NS, MAX_N, WM, WK, GATED>(args, index, args.sorts[sort++] * across, across, ring, aligned,
                                    partial, full, empty),
     ...);
    }
}

}  // namespace

// Where each pair (token, place among its top k) goes. One CTA.
//
// ids: [pairs], of experts as the router numbers them; local: [experts] or null, what this rank
// calls them, -1 if it has them not. An expert's tiles are as few as can be and of one size, a
// multiple of `unit` up to `most`. Which tile comes before which of the same size, and which token
// where in its expert's, is left to chance: no figure depends on it.
extern "C" __global__ void __launch_bounds__(1024) route(
    const int* ids, const float* weights, const int* local, int pairs, int experts, int unit, int most,
    Tile* tiles, int* sorts, int* row_pair, float* row_weight, int4* places) {
    __shared__ int counts[MOST_EXPERTS], rows[MOST_EXPERTS], sizes[MOST_EXPERTS];
    __shared__ int used[MOST_SORTS], row_count;
    const int thread = threadIdx.x;
    counts[thread] = 0;
    if (thread < MOST_SORTS) used[thread] = 0;
    if (thread == 0) row_count = 0;
    __syncthreads();
    for (int pair = thread; pair < pairs; pair += blockDim.x) {
        const int expert = local && ids[pair] >= 0 ? local[ids[pair]] : ids[pair];
        if (expert >= 0 && expert < experts) atomicAdd(&counts[expert], 1);
    }
    __syncthreads();
    const int count = counts[thread], mine = (count + most - 1) / most;
    const int each = mine ? (count + mine - 1) / mine : 0, n = (each + unit - 1) / unit * unit;
    const int sort = (most - n) / unit;
    int first = 0;
    if (mine) {
        first = atomicAdd(&used[sort], mine);
        rows[thread] = atomicAdd(&row_count, mine * n);
    }
    sizes[thread] = n | each << 16;
    counts[thread] = 0;
    __syncthreads();
    if (thread < most / unit) {
        int end = 0;
        for (int i = 0; i <= thread; ++i) end += used[i];
        sorts[thread] = end;
    }
    for (int i = 0; i < sort && mine; ++i) first += used[i];
    for (int i = 0; i < mine; ++i)
        tiles[first + i] = Tile{thread, n, min(each, count - i * each), rows[thread] + i * n};
    for (int pair = thread; pair < pairs; pair += blockDim.x) {
        const int expert = local && ids[pair] >= 0 ? local[ids[pair]] : ids[pair];
        if (expert < 0 || expert >= experts) {
            places[pair] = make_int4(-1, 0, 0, 0);
            continue;
        }
        const int place = atomicAdd(&counts[expert], 1);
        const int size = sizes[expert] & 0xFFFF, step = sizes[expert] >> 16;
        const int base = rows[expert] + place / step * size;
        places[pair] = make_int4(base, size, place % step, 0);
        row_pair[base + place % step] = pair;
        row_weight[base + place % step] = weights[pair];
    }
}

// Rows of x, bf16 [tokens][stride], into the first GEMM's tiles. A CTA a pair.
extern "C" __global__ void __launch_bounds__(128) gather(const uint4* x, int64_t stride, int top_k,
                                                         int hidden, int padded, const int4* places,
                                                         uint8_t* out) {
    const int4 place = places[blockIdx.x];
    if (place.x < 0) return;
    const uint4* const row = x + int64_t(blockIdx.x / top_k) * stride / 8;
    uint8_t* const tile = out + int64_t(place.x) * padded * 2 + place.z * 128;
    for (int unit = threadIdx.x; unit < padded / 8; unit += blockDim.x) {
        const uint4 value = unit < hidden / 8 ? row[unit] : make_uint4(0, 0, 0, 0);
        uint8_t* const to = tile + int64_t(unit / 8) * place.y * 128 + (unit % 8 ^ place.z % 8) * 16;
        *reinterpret_cast<uint4*>(to) = value;
    }
}

// The sum over a token's experts, in the order of its top k. A CTA a token.
extern "C" __global__ void __launch_bounds__(256) combine(const uint4* parts, const int4* places,
                                                          int top_k, int hidden, uint4* out) {
    const int64_t token = blockIdx.x;
    for (int unit = threadIdx.x; unit < hidden / 8; unit += blockDim.x) {
        float sum[8] = {};
        for (int place = 0; place < top_k; ++place) {
            const int64_t pair = token * top_k + place;
            if (places[pair].x < 0) continue;
            const uint4 value = parts[pair * (hidden / 8) + unit];
            const auto* const pairs = reinterpret_cast<const __nv_bfloat162*>(&value);
            for (int i = 0; i < 4; ++i) {
                const float2 both = __bfloat1622float2(pairs[i]);
                sum[2 * i] += both.x, sum[2 * i + 1] += both.y;
            }
        }
        out[token * (hidden / 8) + unit] = make_uint4(pack(sum[0], sum[1]), pack(sum[2], sum[3]),
                                                      pack(sum[4], sum[5]), pack(sum[6], sum[7]));
    }
}

#define GEMM(NAME, MAX_N, WM, WK, ...)                                                             \
    extern "C" __global__ void __launch_bounds__(Shape<MAX_N, WM, WK>::THREADS, 1)                 \
        NAME##_gated(const __grid_constant__ Gemm args) {                                          \
        gemm<MAX_N, WM, WK, true, __VA_ARGS__>(args);                                              \
    }                                                                                              \
    extern "C" __global__ void __launch_bounds__(Shape<MAX_N, WM, WK>::THREADS, 1)                 \
        NAME##_plain(const __grid_constant__ Gemm args) {                                          \
        gemm<MAX_N, WM, WK, false, __VA_ARGS__>(args);                                             \
    }

GEMM(few, 8, 1, 4, 8)                                   // a token or two
GEMM(some, 64, 4, 1, 64, 56, 48, 40, 32, 24, 16, 8)         // decoding
GEMM(many, 256, 2, 1, 256, 224, 192, 160, 128, 96, 64, 32)  // prefill

namespace {

template <int MAX_N, int WM, int WK, typename Kernel>
int start(Kernel kernel, const Gemm& args, int processors, cudaStream_t stream) {
    using S = Shape<MAX_N, WM, WK>;
    return launch(kernel, processors, S::THREADS, S::BYTES, stream, args);
}

template <int MAX_N, int WM, int WK, typename Kernel>
int allow(Kernel kernel) {
    return cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                Shape<MAX_N, WM, WK>::BYTES);
}

}  // namespace

// Everything below is called through ctypes; each returns a cudaError_t.

extern "C" int prepare() {
    int error = 0;
    if (!error) error = allow<8, 1, 4>(few_gated);
    if (!error) error = allow<8, 1, 4>(few_plain);
    if (!error) error = allow<64, 4, 1>(some_gated);
    if (!error) error = allow<64, 4, 1>(some_plain);
    if (!error) error = allow<256, 2, 1>(many_gated);
    if (!error) error = allow<256, 2, 1>(many_plain);
    return error;
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
    int *sorts, *row_pair;
    float* row_weight;
    int4* places;
    int64_t stride;
    int tokens, top_k, experts, hidden, hidden_padded, intermediate_padded, row_tiles2, kind, processors;
    Gate gate;
};

extern "C" int run(const Layer* layer, cudaStream_t stream) {
    const Layer& l = *layer;
    const int pairs = l.tokens * l.top_k;
    const int unit = l.kind == 2 ? 32 : 8, most = l.kind == 2 ? 256 : l.kind == 1 ? 64 : 8;
    int error = launch(route, 1, 1024, 0, stream, l.ids, l.weights, l.local, pairs, l.experts, unit,
                       most, l.tiles, l.sorts, l.row_pair, l.row_weight, l.places);
    if (!error)
        error = launch(gather, pairs, 128, 0, stream, static_cast<const uint4*>(l.x), l.stride,
                       l.top_k, l.hidden, l.hidden_padded, l.places, static_cast<uint8_t*>(l.rows1));
    Gemm first{static_cast<const uint8_t*>(l.w13), l.globals13, static_cast<const uint8_t*>(l.rows1),
               l.tiles, l.sorts, l.row_weight, l.row_pair, static_cast<uint8_t*>(l.rows2),
               2 * l.intermediate_padded / ROWS, l.hidden_padded / CHUNK, l.intermediate_padded, l.gate};
    Gemm second{static_cast<const uint8_t*>(l.w2), l.globals2, static_cast<const uint8_t*>(l.rows2),
                l.tiles, l.sorts, l.row_weight, l.row_pair, static_cast<uint8_t*>(l.parts),
                l.row_tiles2, l.intermediate_padded / CHUNK, l.hidden, l.gate};
    if (l.kind == 0) {
        if (!error) error = start<8, 1, 4>(few_gated, first, l.processors, stream);
        if (!error) error = start<8, 1, 4>(few_plain, second, l.processors, stream);
    } else if (l.kind == 1) {
        if (!error) error = start<64, 4, 1>(some_gated, first, l.processors, stream);
        if (!error) error = start<64, 4, 1>(some_plain, second, l.processors, stream);
    } else {
        if (!error) error = start<256, 2, 1>(many_gated, first, l.processors, stream);
        if (!error) error = start<256, 2, 1>(many_plain, second, l.processors, stream);
    }
    if (error) return error;
    return launch(combine, l.tokens, 256, 0, stream, static_cast<const uint4*>(l.parts), l.places,
                  l.top_k, l.hidden, static_cast<uint4*>(l.out));
}
