// The PTX that the Hopper kernels use, and how a kernel is launched.
//
// What a host's compiler cannot do is left out if EMULATED is defined: the tests' emulation
// (tests/plugin/cuda_emulation.h) then defines functions of the same names that run on a CPU.

namespace {

__device__ __forceinline__ uint32_t shared_address(const void* pointer) {
    return static_cast<uint32_t>(__cvta_generic_to_shared(pointer));
}

// The lower half of the shared-memory descriptor of a K-major B operand, in units of 16 bytes. The
// upper half, which mma<N> adds, says: rows of 128 bytes, swizzled, 1024 bytes to the next 8 rows.
__device__ __forceinline__ uint32_t b_descriptor(uint32_t address) {
    return address >> 4 | 1 << 16;
}

__device__ __forceinline__ uint32_t pack_bf16x2(float low, float high) {
    const __nv_bfloat162 pair = __floats2bfloat162_rn(low, high);
    return reinterpret_cast<const uint32_t&>(pair);
}

#ifndef EMULATED

__device__ __forceinline__ void barrier_init(uint32_t barrier, int count) {
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(barrier), "r"(count));
}

__device__ __forceinline__ void barrier_init_fence() {
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

// Programmatic dependent launch (PDL). Once all CTAs of a kernel have called the first function, the
// next kernel's CTAs may start. The second returns when all of the kernel before has ended and what
// it wrote can be read. `run` says in which order a kernel must call the two.
__device__ __forceinline__ void trigger_next_kernel() {
    asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
}
__device__ __forceinline__ void wait_for_previous_kernel() {
    asm volatile("griddepcontrol.wait;" ::: "memory");
}

// Whether this is the one of a warp's threads that the warp has chosen. All 32 must call. Of no other
// condition does ptxas see that a single thread goes on: it would put a loop around each bulk copy.
__device__ __forceinline__ bool elected() {
    uint32_t chosen;
    asm volatile(
        "{\n.reg .pred is;\nelect.sync _|is, 0xFFFFFFFF;\nselp.u32 %0, 1, 0, is;\n}\n"
        : "=r"(chosen));
    return chosen;
}

// A barrier of the first `THREADS` threads of a CTA. __syncthreads has number 0.
template <int THREADS>
__device__ __forceinline__ void named_barrier_sync() {
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

// L2 cache policies: for what is read once, again soon, and by every CTA.
__device__ __forceinline__ uint64_t evict_first_policy() {
    uint64_t policy;
    asm("createpolicy.fractional.L2::evict_first.b64 %0, 1.0;" : "=l"(policy));
    return policy;
}

__device__ __forceinline__ uint64_t evict_normal_policy() {
    uint64_t policy;
    asm("createpolicy.fractional.L2::evict_normal.b64 %0, 1.0;" : "=l"(policy));
    return policy;
}

__device__ __forceinline__ uint64_t evict_last_policy() {
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

template <int COUNT, bool INCREASE>
__device__ __forceinline__ void set_max_registers() {
    if constexpr (INCREASE)
        asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(COUNT));
    else
        asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(COUNT));
}

// An 8 x 8 matrix of 16-bit elements, held by a warp, transposed.
__device__ __forceinline__ uint32_t transpose(uint32_t matrix) {
    uint32_t result;
    asm volatile("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;" : "=r"(result) : "r"(matrix));
    return result;
}

// The warpgroup's number. From a shuffle ptxas sees that it is the same in the whole warp, and keeps
// what follows from it, descriptors above all, in uniform registers.
__device__ __forceinline__ int warpgroup() { return __shfl_sync(~0u, threadIdx.x / 128, 0); }

// The warp's number in its warpgroup.
__device__ __forceinline__ int warp_of_group() { return __shfl_sync(~0u, threadIdx.x / 32 % 4, 0); }

// These two keep the code for different MMA sizes apart. ptxas would merge what it has in common,
// and then run the MMAs one by one.
template <int N>
__device__ __forceinline__ void mma_size_begins() {
    asm volatile("// %0 tokens" ::"n"(N) : "memory");
}
template <int N>
__device__ __forceinline__ void mma_size_ends() {
    asm volatile("// %0 tokens done" ::"n"(N) : "memory");
}

// Launches a kernel. If `dependent`, its CTAs may start as soon as those of the kernel before have
// called trigger_next_kernel; the kernel must then wait itself.
template <typename... Parameters, typename... Arguments>
int launch(void (*kernel)(Parameters...), int grid, int threads, int shared_bytes,
           cudaStream_t stream, bool dependent, const Arguments&... arguments) {
    cudaLaunchAttribute attribute{};
    attribute.id = cudaLaunchAttributeProgrammaticStreamSerialization;
    attribute.val.programmaticStreamSerializationAllowed = 1;
    cudaLaunchConfig_t config{};
    config.gridDim = dim3(grid), config.blockDim = dim3(threads);
    config.dynamicSmemBytes = shared_bytes, config.stream = stream;
    config.attrs = &attribute, config.numAttrs = dependent;
    return cudaLaunchKernelEx(&config, kernel, Parameters(arguments)...);
}

#endif

}  // namespace
