// What the Hopper kernels share: primitives, tiles, the pipeline, routing and the last sum.
//
// Included by hopper_moe.cu and hopper_fp8.cu, which have said how many bytes an activation has
// (ELEMENT) and how many sizes tiles may have (MOST_SORTS), and which define `consume`. What a
// host's compiler cannot do is not there if EMULATED: tests/plugin/cuda_emulation.h has it.

namespace {

constexpr int CHUNK = 64;              // columns of weights
constexpr int STAGE = 128;             // columns a pipeline stage
constexpr int ROWS = 64;               // rows of weights a warpgroup's tile
constexpr int CODES = ROWS * CHUNK / 2;        // bytes of a chunk's codes,
constexpr int PACKED = CODES + ROWS * CHUNK / 16;  // and with its block scales
constexpr int WEIGHTS = PACKED * STAGE / CHUNK;    // bytes of a warpgroup's weights a stage
constexpr int MOST_EXPERTS = 1024;

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

// Numbers to multiply by instead of shifting: shifts and masks share a pipe, with half a warp's lanes,
// and multiplications have another. They come as arguments: ptxas makes shifts of constants.
struct Powers {
    uint32_t eight = 8, sixty_four = 64, sixteen = 16;
};

struct Gemm {
    const uint8_t* weights;  // [experts][row tiles][chunks][PACKED]
    const float* globals;    // [experts], global scales
    const uint8_t* x;        // tiles of [128 bytes' columns][n][128 bytes], swizzled
    const Tile* tiles;
    const int* sorts;  // where the tiles of each size end, the largest first
    uint8_t* out;      // of the first GEMM its own, of the second bf16 [rows of X][hidden]
    int row_tiles, chunks, out_columns;
    Gate gate;
    Powers powers;
    const float* scales;  // of X's rows, if it has any
};

// Sums times `scale`, as bf16 rows: the second GEMM's output.
template <int N>
__device__ __forceinline__ void write_rows(const Gemm& args, const Tile& tile,
                                           const float (&d)[N / 2], int row_tile, float scale) {
    const int warp = threadIdx.x / 32 % 4, lane = threadIdx.x % 32, group = lane / 4, quad = lane % 4;
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
    static constexpr int X = MAX_N * STAGE * ELEMENT;
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

// A warpgroup's part of the sums of a tile, and what becomes of them.
template <int N, int MAX_N, int WM, int WK, bool GATED>
__device__ __forceinline__ void consume(const Gemm& args, const Tile& tile, int row_tile, Ring ring,
                                        uint8_t* stages, float* partial, uint32_t full,
                                        uint32_t empty);

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
        const uint8_t* const x = args.x + int64_t(tile.row) * chunks * CHUNK * ELEMENT;
        const int bytes = tile.n * STAGE * ELEMENT;
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
    static_assert(sizeof...(NS) <= MOST_SORTS, "more sizes than `route` counts");
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
    }                                                                                              \
    static int NAME##_start(bool gated, const Gemm& args, int processors, cudaStream_t stream) {   \
        return start<MAX_N, WM, WK>(gated ? NAME##_gated : NAME##_plain, args, processors, stream); \
    }                                                                                              \
    static int NAME##_allow() {                                                                    \
        const int error = allow<MAX_N, WM, WK>(NAME##_gated);                                      \
        return error ? error : allow<MAX_N, WM, WK>(NAME##_plain);                                 \
    }                                                                                              \
    constexpr int NAME##_sizes[] = {__VA_ARGS__};                                                  \
    constexpr Kind NAME##_kind{smallest(NAME##_sizes), MAX_N, NAME##_start, NAME##_allow};

namespace {

// Both GEMMs' kernels of one shape: tiles are multiples of `unit`, up to `most`.
struct Kind {
    int unit, most;
    int (*start)(bool gated, const Gemm& args, int processors, cudaStream_t stream);
    int (*allow)();
};

template <int COUNT>
constexpr int smallest(const int (&sizes)[COUNT]) {
    return sizes[COUNT - 1];
}

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

