// The kernels before and after the GEMMs that do not depend on the type of activations: `route`
// says which tile and row each pair of a token and an expert gets, `combine` adds up a token's pairs.

namespace {

constexpr int MAX_EXPERTS = 1024;  // and threads of `route`: one for each expert
constexpr int FEW_PAIRS = 64;      // up to which each CTA of a kernel may route for itself
constexpr int COMBINE_THREADS = 128;

// The expert of a pair as this rank calls it, or -1: of a pair that is not here. Zero times an
// expert's output is zero, also where that is infinite or NaN.
__device__ __forceinline__ int expert_here(const int* ids, const float* router_weights,
                                           const int* local, int experts, int pair) {
    const float weight = router_weights[pair];
    const int expert = local && ids[pair] >= 0 ? local[ids[pair]] : ids[pair];
    return expert >= 0 && expert < experts && weight != 0.0f ? expert : -1;
}

}  // namespace

// Gives each pair (token, one of its top k) a place. One CTA.
//
// ids: [pairs], experts as the router numbers them. router_weights: [pairs]; a pair of weight 0 is
// nobody's (vLLM gives expert 0 such pairs in the place of LongCat's zero experts). local: [all experts]
// or null, what this rank calls them, -1 for those that it does not have. An expert's tiles are as few as can be and of one
// size, a multiple of `token_step` up to `max_tokens`. Which of two tiles of the same size comes
// first, and which token of an expert has which row, is left to chance: no result depends on it.
extern "C" __global__ void __launch_bounds__(MAX_EXPERTS)
    route(const int* ids, const float* router_weights, const int* local, int pairs, int experts,
          int token_step, int max_tokens, Tile* tiles, int* size_ends, Place* places) {
    __shared__ int counts[MAX_EXPERTS], rows[MAX_EXPERTS], sizes[MAX_EXPERTS];
    __shared__ int used[MAX_TILE_SIZES], row_count;
    const int thread = threadIdx.x;
    counts[thread] = 0;
    if (thread < MAX_TILE_SIZES) used[thread] = 0;
    if (thread == 0) row_count = 0;
    __syncthreads();
    trigger_next_kernel();
#pragma unroll 4
    for (int pair = thread; pair < pairs; pair += blockDim.x) {
        const int expert = expert_here(ids, router_weights, local, experts, pair);
        // Until all pairs are counted, a place holds the expert and the pair's number among its pairs.
        Place place{-1, 0, 0, 0};
        if (expert >= 0) place.tile_row = expert, place.size = atomicAdd(&counts[expert], 1);
        places[pair] = place;
    }
    __syncthreads();
    // From here on a thread is an expert.
    const int count = counts[thread], mine = (count + max_tokens - 1) / max_tokens;
    const int each = mine ? (count + mine - 1) / mine : 0;
    const int size = (each + token_step - 1) / token_step * token_step;
    const int size_index = (max_tokens - size) / token_step;
    int first = 0;
    if (mine) {
        first = atomicAdd(&used[size_index], mine);
        rows[thread] = atomicAdd(&row_count, mine * size);
    }
    sizes[thread] = size | each << 16;
    __syncthreads();
    if (thread < max_tokens / token_step) {
        int end = 0;
        for (int i = 0; i <= thread; ++i) end += used[i];
        size_ends[thread] = end;
    }
    for (int i = 0; i < size_index && mine; ++i) first += used[i];
    for (int i = 0; i < mine; ++i)
        tiles[first + i] = Tile{thread, size, min(each, count - i * each), rows[thread] + i * size};
#pragma unroll 4
    for (int pair = thread; pair < pairs; pair += blockDim.x) {
        const Place place = places[pair];
        if (place.tile_row < 0) continue;
        const int expert = place.tile_row, number = place.size;
        const int tile_size = sizes[expert] & 0xFFFF, step = sizes[expert] >> 16;
        const int tile = number / step;
        places[pair] = Place{rows[expert] + tile * tile_size, tile_size, number - tile * step, 0};
    }
}

// What `route` does, of at most FEW_PAIRS pairs, by a CTA for itself: every CTA comes to the same. All
// threads, at least FEW_PAIRS, take part. Returns the place of the CTA's `pair`; the CTA that is the
// `writer` also writes the tables.
__device__ __forceinline__ Place route_few(const int* ids, const float* router_weights,
                                           const int* local, int pairs, int experts, int token_step,
                                           int max_tokens, int pair, bool writer, Tile* tiles,
                                           int* size_ends) {
    __shared__ int expert_of[FEW_PAIRS], plans[FEW_PAIRS];
    __shared__ Place places[FEW_PAIRS];
    const int thread = threadIdx.x;
    if (thread < FEW_PAIRS)
        expert_of[thread] =
            thread < pairs ? expert_here(ids, router_weights, local, experts, thread) : -1;
    __syncthreads();
    // A thread is a pair. The first pair of an expert stands for it.
    const int expert = thread < FEW_PAIRS ? expert_of[thread] : -1;
    int count = 0, number = 0, leader = FEW_PAIRS;
#pragma unroll 8
    for (int other = pairs - 1; other >= 0; --other) {
        if (expert_of[other] != expert) continue;
        ++count, number += other < thread, leader = other;
    }
    const int mine = (count + max_tokens - 1) / max_tokens;
    const int each = expert >= 0 ? (count + mine - 1) / mine : 0;
    const int size = (each + token_step - 1) / token_step * token_step;
    const bool leads = expert >= 0 && leader == thread;
    if (thread < FEW_PAIRS) plans[thread] = leads ? size << 16 | mine : 0;
    __syncthreads();
    if (expert >= 0) {
        // Larger tiles come first.
        int first = 0, row = 0;
#pragma unroll 8
        for (int other = 0; other < pairs; ++other) {
            const int plan = plans[other], its_size = plan >> 16, its_tiles = plan & 0xFFFF;
            if (its_size < size || (its_size == size && other >= leader)) continue;
            first += its_tiles, row += its_tiles * its_size;
        }
        const int tile = number / each;
        places[thread] = Place{row + tile * size, size, number - tile * each, 0};
        for (int i = 0; i < mine && leads && writer; ++i)
            tiles[first + i] = Tile{expert, size, min(each, count - i * each), row + i * size};
    } else if (thread < FEW_PAIRS) {
        places[thread] = Place{-1, 0, 0, 0};
    }
    if (writer && thread < max_tokens / token_step) {
        int end = 0;
        for (int other = 0; other < pairs; ++other)
            if (plans[other] >> 16 >= max_tokens - thread * token_step) end += plans[other] & 0xFFFF;
        size_ends[thread] = end;
    }
    __syncthreads();
    return places[pair];
}

// Adds up each token's experts, times the router's weights, in the order of its top k. Each thread has
// 8 columns of a token; `blocks` CTAs share a token.
//
// What does not come from the GEMM before is read before it has ended: see `run`. With 32 registers a
// CTA has room beside a GEMM's, and is there when that ends.
extern "C" __global__ void __launch_bounds__(COMBINE_THREADS, 16)
    combine(const uint4* pair_outputs, const Place* places, const float* router_weights, int top_k,
            int hidden, int blocks, uint4* out) {
    __shared__ int rows[COMBINE_THREADS];
    __shared__ float weights[COMBINE_THREADS];
    const int64_t token = blockIdx.x / blocks;
    const int unit = blockIdx.x % blocks * COMBINE_THREADS + threadIdx.x;
    float sum[8] = {};
    for (int begin = 0; begin < top_k; begin += COMBINE_THREADS) {
        const int count = min(COMBINE_THREADS, top_k - begin);
        if (begin) __syncthreads();
        if (threadIdx.x < count) {
            const int64_t pair = token * top_k + begin + threadIdx.x;
            const Place place = places[pair];
            rows[threadIdx.x] = place.tile_row < 0 ? -1 : place.tile_row + place.index;
            weights[threadIdx.x] = router_weights[pair];
        }
        __syncthreads();
        if (!begin) wait_for_previous_kernel();
        if (unit >= hidden / 8) continue;
#pragma unroll 4
        for (int choice = 0; choice < count; ++choice) {
            const int row = rows[choice];
            if (row < 0) continue;
            const float weight = weights[choice];
            const uint4 value = pair_outputs[int64_t(row) * (hidden / 8) + unit];
            const auto* const pairs = reinterpret_cast<const __nv_bfloat162*>(&value);
            for (int i = 0; i < 4; ++i) {
                const float2 both = __bfloat1622float2(pairs[i]);
                sum[2 * i] += both.x * weight, sum[2 * i + 1] += both.y * weight;
            }
        }
    }
    if (unit >= hidden / 8) return;
    out[token * (hidden / 8) + unit] =
        make_uint4(pack_bf16x2(sum[0], sum[1]), pack_bf16x2(sum[2], sum[3]),
                   pack_bf16x2(sum[4], sum[5]), pack_bf16x2(sum[6], sum[7]));
}
