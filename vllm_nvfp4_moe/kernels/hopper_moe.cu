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
constexpr int WARPS_TOKENS = 16;       // up to which each warp's own MMAs are used
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

// Programmatic dependent launch: the next kernel's CTAs may take their places, and wait in turn
// until all of the kernel before has ended and what it wrote is there.
__device__ __forceinline__ void next_may_come() {
    asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
}
__device__ __forceinline__ void wait_for_last() {
    asm volatile("griddepcontrol.wait;" ::: "memory");
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

// `early`: as soon as the kernel before says so, which `kernel` then waits for.
template <typename... Parameters, typename... Arguments>
int launch(void (*kernel)(Parameters...), int grid, int threads, int bytes, cudaStream_t stream,
           bool early, const Arguments&... arguments) {
    cudaLaunchAttribute attribute{};
    attribute.id = cudaLaunchAttributeProgrammaticStreamSerialization;
    attribute.val.programmaticStreamSerializationAllowed = 1;
    cudaLaunchConfig_t config{};
    config.gridDim = dim3(grid), config.blockDim = dim3(threads);
    config.dynamicSmemBytes = bytes, config.stream = stream;
    config.attrs = &attribute, config.numAttrs = early;
    return cudaLaunchKernelEx(&config, kernel, Parameters(arguments)...);
}

#endif

// --------------------------------------------------------------------------------- dequantizing

// Numbers to multiply by instead of shifting: shifts and masks share a pipe, with half a warp's lanes,
// and multiplications have another. They come as arguments: ptxas makes shifts of constants.
struct Powers {
    uint32_t eight = 8, sixty_four = 64;
};

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
    uint8_t* out;      // as x (first GEMM), or bf16 [rows of X][hidden] (second)
    int row_tiles, chunks, out_columns;
    Gate gate;
    Powers powers;
};

template <int N, bool GATED>
__device__ __forceinline__ void write(const Gemm& args, const Tile& tile, const float (&d)[N / 2],
                                      int row_tile, float scale) {
    const int warp = threadIdx.x / 32 % 4, lane = threadIdx.x % 32, group = lane / 4, quad = lane % 4;
    if constexpr (GATED) {
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
        // Rows come in such an order that a thread's four are side by side (hopper_weights.py).
        const int column = row_tile * ROWS + warp * 16;
        uint8_t* const to = args.out + int64_t(tile.row + group) * args.out_columns * 2 +
                            (column + quad * 4) * 2;
        const int64_t step = int64_t(8) * args.out_columns * 2;
#pragma unroll
        for (int j = 0; j < N / 8; ++j) {
            uint2 values;
            values.x = transpose(pack(d[4 * j] * scale, d[4 * j + 1] * scale));
            values.y = transpose(pack(d[4 * j + 2] * scale, d[4 * j + 3] * scale));
            if (8 * j + group < tile.count && column < args.out_columns)
                *reinterpret_cast<uint2*>(to + j * step) = values;
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

// The tiles of N rows: up to index `end`.
template <int N, int MAX_N, int WM, int WK, bool GATED>
__device__ __forceinline__ void walk(const Gemm& args, int& index, int end, int across, Tile& next,
                                     Ring& ring, uint8_t* stages, float* partial, uint32_t full,
                                     uint32_t empty) {
    using S = Shape<MAX_N, WM, WK>;
    const int steps = args.chunks / 2;
    for (; index < end; index += gridDim.x, ring.skip<S::STAGES>(steps)) {
        const Tile tile = next;
        const int row_tile = index % across * WM;
        next = args.tiles[(index + gridDim.x) / across];  // long before it is needed; there or not
        consume<N, MAX_N, WM, WK, GATED>(args, tile, row_tile, ring, stages, partial, full, empty);
    }
}

// What the CTA's tiles need, by one thread.
template <int MAX_N, int WM, int WK>
__device__ __forceinline__ void produce(const Gemm& args, int across, int total, uint32_t stages,
                                        uint32_t full, uint32_t empty) {
    using S = Shape<MAX_N, WM, WK>;
    // Where most experts have one tile their weights are read once.
    const uint64_t weights_policy = MAX_N > 64 ? read_again() : read_once();
    const uint64_t x_policy = read_often();
    const int64_t chunks = args.chunks;
    const int steps = args.chunks / 2;
    Ring ring;
    for (int index = blockIdx.x; index < total; index += gridDim.x) {
        const Tile tile = args.tiles[index / across];
        const int row_tile = index % across * WM;
        const int sides = min(WM, args.row_tiles - row_tile);
        const uint8_t* const weights =
            args.weights + (int64_t(tile.expert) * args.row_tiles + row_tile) * chunks * PACKED;
        const uint8_t* const x = args.x + int64_t(tile.row) * chunks * 128;
        const int bytes = tile.n * STAGE * 2;
        for (int step = 0; step < steps; ++step, ring.next<S::STAGES>()) {
            const uint32_t to = stages + ring.stage * S::STAGE_BYTES;
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
    next_may_come();

    const int across = (args.row_tiles + WM - 1) / WM;
    if (warpgroup() >= S::CONSUMERS) {
        registers<S::PRODUCER_REGISTERS, false>();
        const int total = args.sorts[sizeof...(NS) - 1] * across;
        if (threadIdx.x % 128) return;
        // Only X is the last kernel's; what it read may be written over once X has come.
        wait_for_last();
        produce<MAX_N, WM, WK>(args, across, total, shared(aligned), full, empty);
    } else {
        registers<S::CONSUMER_REGISTERS, true>();
        int index = blockIdx.x, sort = 0;
        Ring ring;
        Tile next = args.tiles[index / across];
        (walk<NS, MAX_N, WM, WK, GATED>(args, index, args.sorts[sort++] * across, across, next, ring,
                                        aligned, partial, full, empty),
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
extern "C" __global__ void __launch_bounds__(1024) route(const int* ids, const int* local, int pairs,
                                                         int experts, int unit, int most, Tile* tiles,
                                                         int* sorts, int4* places) {
    __shared__ int counts[MOST_EXPERTS], rows[MOST_EXPERTS], sizes[MOST_EXPERTS];
    __shared__ int used[MOST_SORTS], row_count;
    const int thread = threadIdx.x;
    counts[thread] = 0;
    if (thread < MOST_SORTS) used[thread] = 0;
    if (thread == 0) row_count = 0;
    __syncthreads();
    next_may_come();
#pragma unroll 4
    for (int pair = thread; pair < pairs; pair += blockDim.x) {
        const int expert = local && ids[pair] >= 0 ? local[ids[pair]] : ids[pair];
        const bool there = expert >= 0 && expert < experts;
        // Until all are counted: the expert, and the how manyth of its pairs this is.
        int4 place{-1, 0, 0, 0};
        if (there) place.x = expert, place.y = atomicAdd(&counts[expert], 1);
        places[pair] = place;
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
    __syncthreads();
    if (thread < most / unit) {
        int end = 0;
        for (int i = 0; i <= thread; ++i) end += used[i];
        sorts[thread] = end;
    }
    for (int i = 0; i < sort && mine; ++i) first += used[i];
    for (int i = 0; i < mine; ++i)
        tiles[first + i] = Tile{thread, n, min(each, count - i * each), rows[thread] + i * n};
#pragma unroll 4
    for (int pair = thread; pair < pairs; pair += blockDim.x) {
        const int4 place = places[pair];
        if (place.x < 0) continue;
        const int size = sizes[place.x] & 0xFFFF, step = sizes[place.x] >> 16;
        const int tile = place.y / step;
        places[pair] = make_int4(rows[place.x] + tile * size, size, place.y - tile * step, 0);
    }
}

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

constexpr int COMBINED = 128;  // threads, each of which adds up 8 columns of a token

// The sum over a token's experts, times the router's weights, in the order of its top k.
extern "C" __global__ void __launch_bounds__(COMBINED) combine(const uint4* parts, const int4* places,
                                                               const float* weights, int top_k,
                                                               int hidden, int across, uint4* out) {
    wait_for_last();
    const int64_t token = blockIdx.x / across;
    const int unit = blockIdx.x % across * COMBINED + threadIdx.x;
    if (unit >= hidden / 8) return;
    float sum[8] = {};
#pragma unroll 4
    for (int place = 0; place < top_k; ++place) {
        const int64_t pair = token * top_k + place;
        const int4 at = places[pair];
        if (at.x < 0) continue;
        const float weight = weights[pair];
        const uint4 value = parts[int64_t(at.x + at.z) * (hidden / 8) + unit];
        const auto* const pairs = reinterpret_cast<const __nv_bfloat162*>(&value);
        for (int i = 0; i < 4; ++i) {
            const float2 both = __bfloat1622float2(pairs[i]);
            sum[2 * i] += both.x * weight, sum[2 * i + 1] += both.y * weight;
        }
    }
    out[token * (hidden / 8) + unit] = make_uint4(pack(sum[0], sum[1]), pack(sum[2], sum[3]),
                                                  pack(sum[4], sum[5]), pack(sum[6], sum[7]));
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

GEMM(few, 8, 1, 4, 8)                                      // a token or two
GEMM(some, 64, 4, 1, 64, 56, 48, 40, 32, 24, 16, 8)        // decoding
GEMM(many, 128, 4, 1, 128, 112, 96, 80, 64, 48, 32, 16)    // prefill

namespace {

template <int MAX_N, int WM, int WK, typename Kernel>
int start(Kernel kernel, const Gemm& args, int processors, cudaStream_t stream) {
    using S = Shape<MAX_N, WM, WK>;
    return launch(kernel, processors, S::THREADS, S::BYTES, stream, true, args);
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
    if (!error) error = allow<128, 4, 1>(many_gated);
    if (!error) error = allow<128, 4, 1>(many_plain);
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
    int* sorts;
    int4* places;
    int64_t stride;
    int tokens, top_k, experts, hidden, hidden_padded, intermediate_padded, row_tiles2, kind, processors;
    Gate gate;
};

extern "C" int run(const Layer* layer, cudaStream_t stream) {
    const Layer& l = *layer;
    const int pairs = l.tokens * l.top_k;
    const int unit = l.kind == 2 ? 16 : 8, most = l.kind == 2 ? 128 : l.kind == 1 ? 64 : 8;
    int error = launch(route, 1, 1024, 0, stream, false, l.ids, l.local, pairs, l.experts, unit, most,
                       l.tiles, l.sorts, l.places);
    if (!error)
        error = launch(gather, pairs, 128, 0, stream, true, static_cast<const uint4*>(l.x), l.stride,
                       l.top_k, l.hidden, l.hidden_padded, l.places, static_cast<uint8_t*>(l.rows1));
    Gemm first{static_cast<const uint8_t*>(l.w13), l.globals13, static_cast<const uint8_t*>(l.rows1),
               l.tiles, l.sorts, static_cast<uint8_t*>(l.rows2), 2 * l.intermediate_padded / ROWS,
               l.hidden_padded / CHUNK, l.intermediate_padded, l.gate};
    Gemm second{static_cast<const uint8_t*>(l.w2), l.globals2, static_cast<const uint8_t*>(l.rows2),
                l.tiles, l.sorts, static_cast<uint8_t*>(l.parts), l.row_tiles2,
                l.intermediate_padded / CHUNK, l.hidden, l.gate};
    if (l.kind == 0) {
        if (!error) error = start<8, 1, 4>(few_gated, first, l.processors, stream);
        if (!error) error = start<8, 1, 4>(few_plain, second, l.processors, stream);
    } else if (l.kind == 1) {
        if (!error) error = start<64, 4, 1>(some_gated, first, l.processors, stream);
        if (!error) error = start<64, 4, 1>(some_plain, second, l.processors, stream);
    } else {
        if (!error) error = start<128, 4, 1>(many_gated, first, l.processors, stream);
        if (!error) error = start<128, 4, 1>(many_plain, second, l.processors, stream);
    }
    if (error) return error;
    const int across = (l.hidden / 8 + COMBINED - 1) / COMBINED;
    return launch(combine, l.tokens * across, COMBINED, 0, stream, true,
                  static_cast<const uint4*>(l.parts), l.places, l.weights, l.top_k, l.hidden, across,
                  static_cast<uint4*>(l.out));
}
