// What the host's side of both Hopper kernels has in common: the one struct that Python fills for a
// call, and the table of GEMMs by the shape of their tiles.

#define EXPORTED extern "C" __attribute__((visibility("default")))  // the rest of a library is hidden

// One call: a layer's weights, a batch, and memory to work in. Mirrored by launch.py, field by field.
struct LaunchSpec {
    const void *x, *w13, *w2;
    const float *global_scales13, *global_scales2;
    const float *bias13, *bias2;  // either may be null, and both are where experts have none
    const int *ids, *local;
    const float* router_weights;
    void* out;
    // Workspace. `middle` is what is between the two GEMMs: as bf16 rows and with scales for FP8 alone.
    void *x_tiles, *middle_rows, *middle_tiles, *pair_outputs;
    float *x_scales, *middle_scales;
    Tile* tiles;
    int* size_ends;
    Place* places;
    int64_t x_stride;
    // The columns that the first GEMM writes, `intermediate`, may be fewer than the second reads.
    int tokens, top_k, experts, hidden, hidden_padded, intermediate, intermediate_padded;
    int w13_row_tiles, w2_row_tiles;
    int tile_shape;  // its number in GEMMS
    int processors;
    Gate gate;
};

namespace {

// The numbers of a TileShape, and the step in which a tile's tokens grow. Mirrored by launch.py.
struct TileShapeNumbers {
    int max_tokens, row_groups, k_groups, token_step;
};

// The kernels of both GEMMs for tiles of one shape.
struct Gemms {
    TileShapeNumbers shape;
    int (*launch)(bool first, const GemmArguments& args, int processors, cudaStream_t stream);
    int (*allow_shared_memory)();
};

template <int COUNT>
constexpr int smallest(const int (&sizes)[COUNT]) {
    return sizes[COUNT - 1];
}

template <typename Shape, typename Kernel>
int launch_gemm(Kernel kernel, GemmArguments args, int processors, cudaStream_t stream) {
    args.row_blocks = (args.row_tiles + Shape::ROW_GROUPS - 1) / Shape::ROW_GROUPS;
    args.block_groups = (args.row_tiles + args.row_blocks - 1) / args.row_blocks;
    return launch(kernel, processors, Shape::THREADS, Shape::SHARED_BYTES, stream, true, args);
}

template <typename Shape, typename Kernel>
int allow_shared_memory(Kernel kernel) {
    return cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                Shape::SHARED_BYTES);
}

GemmArguments first_arguments(const LaunchSpec& spec, void* out, int out_columns) {
    GemmArguments args{};
    args.weights = static_cast<const uint8_t*>(spec.w13), args.global_scales = spec.global_scales13;
    args.set_bias(spec.bias13);
    args.x = static_cast<const uint8_t*>(spec.x_tiles), args.x_scales = spec.x_scales;
    args.tiles = spec.tiles, args.size_ends = spec.size_ends;
    args.out = static_cast<uint8_t*>(out), args.out_columns = out_columns;
    args.row_tiles = spec.w13_row_tiles;
    args.chunks = spec.hidden_padded / CHUNK;
    args.gate = spec.gate;
    return args;
}

GemmArguments second_arguments(const LaunchSpec& spec) {
    GemmArguments args{};
    args.weights = static_cast<const uint8_t*>(spec.w2), args.global_scales = spec.global_scales2;
    args.set_bias(spec.bias2);
    args.x = static_cast<const uint8_t*>(spec.middle_tiles), args.x_scales = spec.middle_scales;
    args.tiles = spec.tiles, args.size_ends = spec.size_ends;
    args.out = static_cast<uint8_t*>(spec.pair_outputs), args.out_columns = spec.hidden;
    args.row_tiles = spec.w2_row_tiles;
    args.chunks = spec.intermediate_padded / CHUNK;
    args.gate = spec.gate;
    return args;
}

int launch_route(const LaunchSpec& spec, const TileShapeNumbers& shape, cudaStream_t stream) {
    return launch(route, 1, MAX_EXPERTS, 0, stream, false, spec.ids, spec.router_weights,
                  spec.local, spec.tokens * spec.top_k, spec.experts, shape.token_step,
                  shape.max_tokens, spec.tiles, spec.size_ends, spec.places);
}

int launch_combine(const LaunchSpec& spec, cudaStream_t stream) {
    const int blocks = (spec.hidden / 8 + COMBINE_THREADS - 1) / COMBINE_THREADS;
    return launch(combine, spec.tokens * blocks, COMBINE_THREADS, 0, stream, true,
                  static_cast<const uint4*>(spec.pair_outputs), spec.places, spec.router_weights,
                  spec.top_k, spec.hidden, blocks, static_cast<uint4*>(spec.out));
}

}  // namespace

// Defines the two kernels of a tile shape, and GEMMS_<MAX_TOKENS>x<ROWS> for the table. After the
// shape's numbers come the sizes that its tiles may have, the largest first.
#define DEFINE_GEMMS(MAX_TOKENS, ROWS, K_GROUPS, ...)                                                \
    DEFINE_NAMED_GEMMS(MAX_TOKENS##x##ROWS, MAX_TOKENS, ROWS / GROUP_ROWS, K_GROUPS, __VA_ARGS__)
#define DEFINE_NAMED_GEMMS(NAME, MAX_TOKENS, ROW_GROUPS, K_GROUPS, ...)                              \
    using Shape##NAME = TileShape<MAX_TOKENS, ROW_GROUPS, K_GROUPS>;                                 \
    extern "C" __global__ void __launch_bounds__(Shape##NAME::THREADS, 1)                            \
        gemm##NAME##_first(const __grid_constant__ GemmArguments args) {                             \
        gemm<Shape##NAME, true, __VA_ARGS__>(args);                                                  \
    }                                                                                                \
    extern "C" __global__ void __launch_bounds__(Shape##NAME::THREADS, 1)                            \
        gemm##NAME##_second(const __grid_constant__ GemmArguments args) {                            \
        gemm<Shape##NAME, false, __VA_ARGS__>(args);                                                 \
    }                                                                                                \
    constexpr int SIZES_##NAME[] = {__VA_ARGS__};                                                    \
    constexpr Gemms GEMMS_##NAME{                                                                    \
        {MAX_TOKENS, ROW_GROUPS, K_GROUPS, smallest(SIZES_##NAME)},                                  \
        [](bool first, const GemmArguments& args, int processors, cudaStream_t stream) {             \
            return launch_gemm<Shape##NAME>(first ? gemm##NAME##_first : gemm##NAME##_second, args,  \
                                            processors, stream);                                     \
        },                                                                                           \
        [] {                                                                                         \
            if (const int error = allow_shared_memory<Shape##NAME>(gemm##NAME##_first))              \
                return error;                                                                        \
            return allow_shared_memory<Shape##NAME>(gemm##NAME##_second);                            \
        }};
