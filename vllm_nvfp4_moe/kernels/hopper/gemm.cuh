// The grouped GEMM that both Hopper kernels share: its tiles, its pipeline, its producer.
//
// The file that includes this has said how many bytes an activation has (ELEMENT_BYTES) and how many
// sizes tiles may have (MAX_TILE_SIZES), whether the kernel before the first GEMM may be the one that
// writes the tables of tiles (NEW_TABLES), and defines `consume`. What a column of the output is
// called depends on whom you ask: a token for the layer, a row of X in memory, N for the MMA.
//
// A library is for one form of experts (`Form` in source.py): GATED ones have gate and up, others up
// alone, whose activation is relu(up)^2; BIASED ones have biases.

namespace {

constexpr int CHUNK = 64;          // columns of weights that are packed together
constexpr int STAGE = 2 * CHUNK;   // columns of a pipeline stage
constexpr int GROUP_ROWS = 64;     // rows of weights that a warpgroup works on: the MMA's M
constexpr int CODE_BYTES = GROUP_ROWS * CHUNK / 2;                 // of a chunk's codes,
constexpr int CHUNK_BYTES = CODE_BYTES + GROUP_ROWS * CHUNK / 16;  // and with its block scales
constexpr int WEIGHT_BYTES = CHUNK_BYTES * STAGE / CHUNK;  // of a warpgroup's weights in a stage

// ------------------------------------------------------------------------------------- the tiles

// `tokens` tokens of one expert. They lie in `size` rows of X, a size that an MMA has, from `row` on.
struct Tile {
    int expert, size, tokens, row;
};

// Where a pair of a token and one of its experts lies: row `index` of the tile of `size` rows that
// begins at row `tile_row`. A pair whose expert is not on this rank has tile_row -1.
struct alignas(16) Place {
    int tile_row, size, index, unused;
};

// The gate's numbers, as the contract has them. Mirrored by launch.py.
struct Gate {
    float alpha, beta, limit;
    int tanh;  // gelu's tanh form, instead of the sigmoid
};

__device__ __forceinline__ float activate(float gate, float up, const Gate& rule) {
    // Not fminf and fmaxf: they would turn a NaN into a number.
    gate = gate > rule.limit ? rule.limit : gate;
    up = up > rule.limit ? rule.limit : up < -rule.limit ? -rule.limit : up;
    if (rule.tanh) {
        const float inner = 0.7978845608028654f * (gate + 0.044715f * gate * gate * gate);
        return 0.5f * gate * (1.0f + tanhf(inner)) * (up + rule.beta);
    }
    return gate / (1.0f + __expf(-rule.alpha * gate)) * (up + rule.beta);
}

// Of experts without a gate. Not fmaxf: NaN stays NaN.
__device__ __forceinline__ float relu2(float up) {
    up = up < 0.0f ? 0.0f : up;
    return up * up;
}

// Powers of two to multiply by instead of shifting: shifts share a pipe with masks, multiplications
// have another. They come as kernel arguments, since ptxas turns constants back into shifts.
struct Multipliers {
    uint32_t eight = 8, sixty_four = 64, sixteen = 16;
};

// Where the biases of a product are: nowhere, if experts have none. The parameters of their kernels
// are then as if there were no such thing.
template <bool>
struct Bias {
    void set_bias(const float*) {}
    __device__ const float* bias() const { return nullptr; }
};
template <>
struct Bias<true> {
    const float* values;  // [experts][row tiles][GROUP_ROWS], rows as those of weights; or null
    void set_bias(const float* to) { values = to; }
    __device__ const float* bias() const { return values; }
};

struct GemmArguments : Bias<BIASED> {
    const uint8_t* weights;      // [experts][row tiles][chunks][CHUNK_BYTES]
    const float* global_scales;  // [experts]
    const uint8_t* x;            // tiles of [128 bytes' columns][size][128 bytes], swizzled
    const Tile* tiles;
    const int* size_ends;  // for each size, the largest first: the number of tiles that are as large
    uint8_t* out;          // the next GEMM's input, or of the second GEMM bf16 [rows of X][hidden]
    int row_tiles, chunks, out_columns;
    int row_blocks, block_groups;  // see `Schedule`
    Gate gate;
    Multipliers multipliers;
    const float* x_scales;  // [rows of X], if the activations have scales
};

// What is added to a thread's sums, once they are scaled: in rows g and g + 8 of its warp's 16.
__device__ __forceinline__ float2 bias_of(const GemmArguments& args, const Tile& tile, int row_tile) {
    const float* const bias = args.bias();
    if (!bias) return {0.0f, 0.0f};
    const int row = threadIdx.x / 32 % 4 * 16 + threadIdx.x % 32 / 4;
    const float* const from =
        bias + (int64_t(tile.expert) * args.row_tiles + row_tile) * GROUP_ROWS + row;
    return {from[0], from[8]};
}

__device__ __forceinline__ float scaled(float sum, float scale, float bias) {
    if constexpr (BIASED)
        return sum * scale + bias;
    else
        return sum * scale;  // adding zero is an instruction too
}

// Writes bf16 rows. `value(i)` is what becomes of a thread's sum number i.
template <int N, typename Value>
__device__ __forceinline__ void write_rows(const GemmArguments& args, const Tile& tile, int row_tile,
                                           const Value& value) {
    const int warp = threadIdx.x / 32 % 4, lane = threadIdx.x % 32, group = lane / 4, quad = lane % 4;
    // The weights' rows are packed in such an order that a thread's four are side by side here
    // (`side_by_side` in bf16_weights.py).
    const int column = row_tile * GROUP_ROWS + warp * 16;
    uint8_t* const to = args.out + int64_t(tile.row + group) * args.out_columns * 2 +
                        (column + quad * 4) * 2;
    const int64_t step = int64_t(8) * args.out_columns * 2;
#pragma unroll
    for (int j = 0; j < N / 8; ++j) {
        uint2 values;
        values.x = transpose(pack_bf16x2(value(4 * j), value(4 * j + 1)));
        values.y = transpose(pack_bf16x2(value(4 * j + 2), value(4 * j + 3)));
        if (8 * j + group < tile.tokens && column < args.out_columns)
            *reinterpret_cast<uint2*>(to + j * step) = values;
    }
}

// A position in the ring of stages. The producer and each consumer have their own.
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

// The tile of the output that a CTA computes at a time, and what follows from it: up to MAX_TOKENS_
// tokens by 64 rows of weights for each of ROW_GROUPS_ warpgroups. K_GROUPS_ warpgroups share
// each 64 rows, every one of them taking every K_GROUPS_-th stage of the columns.
template <int MAX_TOKENS_, int ROW_GROUPS_, int K_GROUPS_>
struct TileShape {
    static constexpr int MAX_TOKENS = MAX_TOKENS_, ROW_GROUPS = ROW_GROUPS_, K_GROUPS = K_GROUPS_;
    // A stage has first its part of X, in atoms of 1024 bytes, then its weights.
    static constexpr int X_BYTES = MAX_TOKENS * STAGE * ELEMENT_BYTES;
    static constexpr int STAGE_BYTES = (X_BYTES + ROW_GROUPS * WEIGHT_BYTES + 1023) / 1024 * 1024;
    static constexpr int PARTIAL_BYTES = K_GROUPS > 1 ? (K_GROUPS - 1) * GROUP_ROWS * MAX_TOKENS * 4
                                                      : 0;
    // Of 227 KB: 1 KB to align the stages, 1 KB for barriers.
    static constexpr int BUDGET = 227 * 1024 - 1024 - 1024 - PARTIAL_BYTES;
    static constexpr int STAGES = BUDGET / STAGE_BYTES < 24 ? BUDGET / STAGE_BYTES : 24;
    static constexpr int CONSUMERS = ROW_GROUPS * K_GROUPS, THREADS = (CONSUMERS + 1) * 128;
    // The register file has 64 K, given to all threads alike at the start. Producers need few, and
    // consumers get the rest, in eights; what that leaves is the producers' again.
    static constexpr int ENTRY_REGISTERS = 65536 / THREADS / 8 * 8, FEWEST_REGISTERS = 24;
    static constexpr int CONSUMER_REGISTERS =
        ((CONSUMERS + 1) * ENTRY_REGISTERS - FEWEST_REGISTERS) / CONSUMERS / 8 * 8;
    static constexpr int PRODUCER_REGISTERS =
        ((CONSUMERS + 1) * ENTRY_REGISTERS - CONSUMERS * CONSUMER_REGISTERS) / 8 * 8;
    static constexpr int SHARED_BYTES = 1024 + 1024 + PARTIAL_BYTES + STAGES * STAGE_BYTES;
    static_assert(STAGES >= 2, "no room for two stages");
    // A parity says of two rounds which it is, no more. So whoever waits for a stage must have had its
    // last round: not another group, to whom that may still be on its way (copies overtake copies).
    static_assert(STAGES % K_GROUPS == 0, "a stage would be another group's each time");
};

// ---------------------------------------------------------------------------------- the pipeline

// What a warpgroup does in an item that has fewer row groups than the CTA has warpgroups.
template <typename Shape>
__device__ __forceinline__ void pass_by(int steps, Ring ring, uint32_t full, uint32_t empty) {
    for (; steps > 0; --steps, ring.next<Shape::STAGES>()) {
        barrier_wait(full + 8 * ring.stage, ring.phase);
        __syncwarp();
        if (threadIdx.x % 32 == 0) barrier_arrive(empty + 8 * ring.stage);
    }
}

// Computes a warpgroup's part of a tile of N tokens, and writes what becomes of it.
template <int N, typename Shape, bool FIRST>
__device__ __forceinline__ void consume(const GemmArguments& args, const Tile& tile, int row_tile,
                                        Ring ring, uint8_t* stages, float* partial, uint32_t full,
                                        uint32_t empty);

// Tiles of 64 rows that an item has, from number `first` on.
struct RowGroups {
    int first, count;
};

// Which parts of the output are computed as one, and by whom: items, of which a CTA takes every n-th, n
// being the number of CTAs. An item is a pair of a tile of tokens and one of its blocks of rows, which
// are as few as can be and of as many row groups each, at most ROW_GROUPS: slices of tensor parallelism
// may have six. Where the last pairs are so few that there is a CTA for each of their row groups, or for
// each two, they are items of so many: else most CTAs would be done while a few compute whole pairs.
template <typename Shape>
struct Schedule {
    // Of larger tiles each is many, and ptxas would run MMAs one by one (C7512).
    static constexpr bool SPLITS = Shape::MAX_TOKENS <= 64 && Shape::ROW_GROUPS == 4;
    int row_tiles, block_groups;
    uint32_t row_blocks, whole, shift;  // from `whole` on 2^shift items are a pair
    // How many row groups a block of rows has, but for the last, which may have fewer.
    static __device__ __forceinline__ int groups_of_block(const GemmArguments& args) {
        return SPLITS ? args.block_groups : Shape::ROW_GROUPS;
    }
    // `tiles`: of tokens.
    __device__ __forceinline__ Schedule(const GemmArguments& args, uint32_t tiles)
        : row_tiles(args.row_tiles), block_groups(groups_of_block(args)),
          row_blocks(args.row_blocks), whole(tiles * row_blocks), shift(0) {
        if constexpr (SPLITS) {
            const uint32_t last = whole % gridDim.x;
            whole -= last;
            shift = last * 2 > gridDim.x ? 0 : last * 4 > gridDim.x ? 1 : 2;
        }
    }
    // How many items so many tiles of tokens are, the first ones.
    __device__ __forceinline__ uint32_t items(uint32_t tiles) const {
        const uint32_t pairs = tiles * row_blocks;
        return !SPLITS || pairs <= whole ? pairs : whole + (pairs - whole << shift);
    }
    __device__ __forceinline__ uint32_t pair(uint32_t item) const {
        return !SPLITS || item < whole ? item : whole + (item - whole >> shift);
    }
    __device__ __forceinline__ uint32_t tile(uint32_t item) const { return pair(item) / row_blocks; }
    // An item's row groups, none if there are no more rows.
    __device__ __forceinline__ RowGroups row_groups(uint32_t item) const {
        const int begin = pair(item) % row_blocks * block_groups;
        // Of `8x64` the compiler must see that it is one: its producer has no time for a loop.
        const int groups = min(SPLITS ? block_groups : Shape::ROW_GROUPS, row_tiles - begin);
        if (!SPLITS || item < whole) return {begin, groups};
        const int most = Shape::ROW_GROUPS >> shift;
        const int skipped = (item - whole & (1 << shift) - 1) * most;
        return {begin + skipped, skipped < groups ? min(most, groups - skipped) : 0};
    }
};

// Computes the CTA's items of N tokens, which end before `end`.
template <int N, typename Shape, bool FIRST>
__device__ __forceinline__ void consume_tiles_of_size(const GemmArguments& args,
                                                      const Schedule<Shape>& schedule,
                                                      uint32_t& index, uint32_t end, Tile& next,
                                                      Ring& ring, uint8_t* stages, float* partial,
                                                      uint32_t full, uint32_t empty) {
    const int steps = args.chunks / 2;
    for (; index < end; index += gridDim.x, ring.skip<Shape::STAGES>(steps)) {
        const Tile tile = next;
        const RowGroups rows = schedule.row_groups(index);
        // Read long before it is needed, whether or not there is a next one: the host makes room.
        next = args.tiles[schedule.tile(index + gridDim.x)];
        if (Schedule<Shape>::SPLITS && warpgroup() >= rows.count) {
            pass_by<Shape>(steps, ring, full, empty);
            continue;
        }
        consume<N, Shape, FIRST>(args, tile, rows.first, ring, stages, partial, full, empty);
    }
}

// What a producer copies. Weights are older than all launches of a call, so that their producer need
// not wait for the kernel before: it fills the ring while that one ends.
enum class Input { WEIGHTS, X };
constexpr int PRODUCERS = 2;

// Copies one input of the CTA's tiles into the stages. One thread does all of it.
template <typename Shape, Input INPUT>
__device__ __forceinline__ void produce(const GemmArguments& args, const Schedule<Shape>& schedule,
                                        uint32_t total, uint32_t full) {
    constexpr bool WEIGHTS = INPUT == Input::WEIGHTS;
    // With larger tiles an expert has several, which read its weights again. X is read by every CTA.
    const uint64_t policy = !WEIGHTS                 ? evict_last_policy()
                            : Shape::MAX_TOKENS > 64 ? evict_normal_policy()
                                                     : evict_first_policy();
    const uint32_t end = full + 8 * Shape::STAGES;  // where the barriers of empty stages begin
    uint32_t to = full - Shape::PARTIAL_BYTES - Shape::STAGES * Shape::STAGE_BYTES +
                  (WEIGHTS ? Shape::X_BYTES : 0);
    uint32_t barrier = full, parity = 1;
    for (uint32_t index = blockIdx.x; index < total; index += gridDim.x) {
        const Tile tile = args.tiles[schedule.tile(index)];
        // Where there are no more rows nothing is copied but X, and nothing computed.
        const RowGroups rows = schedule.row_groups(index);
        const int group_bytes = args.chunks * CHUNK_BYTES;
        const int bytes = WEIGHTS ? rows.count * WEIGHT_BYTES : tile.size * STAGE * ELEMENT_BYTES;
        const uint8_t* from =
            WEIGHTS ? args.weights + (int64_t(tile.expert) * args.row_tiles + rows.first) * group_bytes
                    : args.x + int64_t(tile.row) * args.chunks * (CHUNK * ELEMENT_BYTES);
        for (int step = args.chunks / 2; step > 0; --step) {
            barrier_wait(barrier + 8 * Shape::STAGES, parity);
            barrier_expect(barrier, bytes);
            if constexpr (WEIGHTS) {
                const uint8_t* group = from;
                for (int i = 0; i < rows.count; ++i, group += group_bytes)
                    bulk_copy(to + i * WEIGHT_BYTES, group, WEIGHT_BYTES, barrier, policy);
                from += WEIGHT_BYTES;
            } else {
                bulk_copy(to, from, bytes, barrier, policy);
                from += bytes;
            }
            to += Shape::STAGE_BYTES, barrier += 8;
            if (barrier == end)
                to -= Shape::STAGES * Shape::STAGE_BYTES, barrier = full, parity ^= 1;
        }
    }
}

// A CTA of a GEMM: of the FIRST, whose sums are activated, or of the second. SIZES are those that tiles
// may have, the largest first.
template <typename Shape, bool FIRST, int... SIZES>
__device__ __forceinline__ void gemm(const GemmArguments& args) {
    static_assert(sizeof...(SIZES) <= MAX_TILE_SIZES, "more sizes than `route` counts");
    extern __shared__ uint8_t memory[];
    uint8_t* const stages = memory + (1024 - shared_address(memory) % 1024) % 1024;
    float* const partial = reinterpret_cast<float*>(stages + Shape::STAGES * Shape::STAGE_BYTES);
    const uint32_t full =
        shared_address(stages) + Shape::STAGES * Shape::STAGE_BYTES + Shape::PARTIAL_BYTES;
    const uint32_t empty = full + 8 * Shape::STAGES;
    if (threadIdx.x == 0) {
        for (int i = 0; i < Shape::STAGES; ++i) {
            barrier_init(full + 8 * i, PRODUCERS);
            // Each warp of the warpgroups that use the stage says when it is done with it.
            barrier_init(empty + 8 * i, 4 * Schedule<Shape>::groups_of_block(args));
        }
        barrier_init_fence();
    }
    // The tables of `route` are read from here on, by all kernels that follow as well: see `run`.
    if constexpr (FIRST && NEW_TABLES) wait_for_previous_kernel();
    __syncthreads();
    trigger_next_kernel();

    const uint32_t tiles = args.size_ends[sizeof...(SIZES) - 1];
    const Schedule<Shape> schedule(args, tiles);
    if (warpgroup() >= Shape::CONSUMERS) {
        set_max_registers<Shape::PRODUCER_REGISTERS, false>();
        const uint32_t total = schedule.items(tiles);
        // A warp each, since a warp's threads would take turns.
        const int warp = warp_of_group();
        if (warp == 0) {
            if (elected()) produce<Shape, Input::WEIGHTS>(args, schedule, total, full);
        } else if (warp == 1) {
            // Of the second GEMM only X is from the kernel before. What that kernel read may be
            // overwritten by consumers, since they wait for X.
            if constexpr (!FIRST || !NEW_TABLES) wait_for_previous_kernel();
            if (elected()) produce<Shape, Input::X>(args, schedule, total, full);
        }
    } else if (!Schedule<Shape>::SPLITS || warpgroup() < args.block_groups) {
        set_max_registers<Shape::CONSUMER_REGISTERS, true>();
        uint32_t index = blockIdx.x;
        int size = 0;
        Ring ring;
        Tile next = args.tiles[schedule.tile(index)];
        (consume_tiles_of_size<SIZES, Shape, FIRST>(
             args, schedule, index, schedule.items(args.size_ends[size++]), next, ring,
             stages, partial, full, empty),
         ...);
    }
}

}  // namespace
