// The kernels before and after the GEMMs that do not depend on the type of activations: `route`
// says which tile and row each pair of a token and an expert gets, `combine` adds up a token's pairs.

namespace {

constexpr int MAX_EXPERTS = 1024;  // and threads of `route`: one for each expert
constexpr int COMBINE_THREADS = 128;

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
        const float weight = router_weights[pair];
        const int expert = local && ids[pair] >= 0 ? local[ids[pair]] : ids[pair];
        // Zero times an expert's output is zero, also where that is infinite or NaN.
        const bool here = expert >= 0 && expert < experts && weight != 0.0f;
        // Until all pairs are counted, a place holds the expert and the pair's number among its pairs.
        Place place{-1, 0, 0, 0};
        if (here) place.tile_row = expert, place.size = atomicAdd(&counts[expert], 1);
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

// Adds up each token's experts, times the router's weights, in the order of its top k. Each thread has
// 8 columns of a token; `blocks` CTAs share a token.
extern "C" __global__ void __launch_bounds__(COMBINE_THREADS)
    combine(const uint4* pair_outputs, const Place* places, const float* router_weights, int top_k,
            int hidden, int blocks, uint4* out) {
    wait_for_previous_kernel();
    const int64_t token = blockIdx.x / blocks;
    const int unit = blockIdx.x % blocks * COMBINE_THREADS + threadIdx.x;
    if (unit >= hidden / 8) return;
    float sum[8] = {};
#pragma unroll 4
    for (int choice = 0; choice < top_k; ++choice) {
        const int64_t pair = token * top_k + choice;
        const Place place = places[pair];
        if (place.tile_row < 0) continue;
        const float weight = router_weights[pair];
        const uint4 value =
            pair_outputs[int64_t(place.tile_row + place.index) * (hidden / 8) + unit];
        const auto* const pairs = reinterpret_cast<const __nv_bfloat162*>(&value);
        for (int i = 0; i < 4; ++i) {
            const float2 both = __bfloat1622float2(pairs[i]);
            sum[2 * i] += both.x * weight, sum[2 * i + 1] += both.y * weight;
        }
    }
    out[token * (hidden / 8) + unit] =
        make_uint4(pack_bf16x2(sum[0], sum[1]), pack_bf16x2(sum[2], sum[3]),
                   pack_bf16x2(sum[4], sum[5]), pack_bf16x2(sum[6], sum[7]));
}
