// What the Hopper kernels' sources need of CUDA and of a Hopper GPU, on a CPU. Included before the source.
//
// A CTA's threads are fibers, switched where one waits; CTAs run one after another. All that a GPU
// leaves open (which CTA, warp or copy is next) follows from a seed. Where PTX lets an operation
// happen late it happens as late as it may, and what must not be read until then is NaN: the target
// of a copy, the sums of an MMA. Rules of PTX that can be checked are, and what breaks one or waits
// forever is reported by `emulation_failure`.
//
// DESCRIPTOR is the upper half of the descriptor of an MMA's B, which source.py writes. OPERAND is the
// number of bytes of an MMA's element: 2 for bf16, 1 for e4m3.
//
// Not emulated: the memory model (proxies, fences) and anything that takes time.

#include <dlfcn.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <ucontext.h>

#include <array>
#include <cmath>
#include <deque>
#include <map>
#include <memory>
#include <string>
#include <vector>

#define EMULATED
#define __global__
#define __device__
#define __forceinline__ inline
#define __grid_constant__
#define __launch_bounds__(...)
#define __shared__ thread_local  // extern at will, and static in a function: one OS thread runs all

// --------------------------------------------------------------------------------------- types

struct uint3 {
    unsigned x, y, z;
};
struct uint2 {
    uint32_t x, y;
};
struct alignas(16) uint4 {
    uint32_t x, y, z, w;
};
struct float2 {
    float x, y;
};
inline uint4 make_uint4(uint32_t x, uint32_t y, uint32_t z, uint32_t w) { return {x, y, z, w}; }
inline int min(int a, int b) { return a < b ? a : b; }

struct __nv_bfloat16 {
    uint16_t bits;
};
struct __nv_bfloat162 {
    __nv_bfloat16 x, y;
};
inline float emulated_float(uint32_t bf16) {
    const uint32_t bits = bf16 << 16;
    float value;
    memcpy(&value, &bits, 4);
    return value;
}
inline uint16_t emulated_bf16(float value) {  // the nearest, ties to even
    uint32_t bits;
    memcpy(&bits, &value, 4);
    if (value != value) return 0x7FFF;
    return (bits + 0x7FFF + (bits >> 16 & 1)) >> 16;
}
inline __nv_bfloat162 __floats2bfloat162_rn(float x, float y) {
    return {{emulated_bf16(x)}, {emulated_bf16(y)}};
}
inline float2 __bfloat1622float2(__nv_bfloat162 pair) {
    return {emulated_float(pair.x.bits), emulated_float(pair.y.bits)};
}
inline float emulated_e4m3(uint32_t bits) {
    static const auto values = [] {
        std::array<float, 256> values;
        for (int i = 0; i < 256; ++i) {
            const int exponent = i >> 3 & 15, mantissa = i & 7;
            float value = ldexpf(exponent ? 8 + mantissa : mantissa, exponent ? exponent - 10 : -9);
            if ((i & 0x7F) == 0x7F) value = NAN;
            values[i] = i & 0x80 ? -value : value;
        }
        return values;
    }();
    return values[bits];
}
inline uint32_t emulated_to_e4m3(float value) {  // the nearest, ties to even; at most 448
    const uint32_t sign = std::signbit(value) ? 0x80 : 0;
    const float size = fabsf(value);
    if (size != size) return 0x7F;
    if (size >= 448) return sign | 0x7E;
    int exponent;
    frexpf(size, &exponent);  // under 2^exponent; of zero it says 0
    exponent = exponent < -5 || size == 0 ? -5 : exponent;
    // Codes of one exponent are this far apart; nearbyint rounds ties to even, as codes are to be.
    const int steps = int(nearbyintf(ldexpf(size, 4 - exponent)));
    return sign | (exponent + 5) * 8 + steps;
}
// Bytes of x, the lowest first, then of y.
inline uint32_t __byte_perm(uint32_t x, uint32_t y, uint32_t selector) {
    uint32_t result = 0;
    for (int i = 0; i < 4; ++i) {
        const uint32_t byte = selector >> 4 * i & 7;
        result |= (byte < 4 ? x >> 8 * byte : y >> 8 * (byte - 4)) % 256 << 8 * i;
    }
    return result;
}
inline uint32_t __vmaxu2(uint32_t x, uint32_t y) {
    const auto most = [&](uint32_t mask) { return (x & mask) > (y & mask) ? x & mask : y & mask; };
    return most(0xFFFF0000) | most(0xFFFF);
}
inline float __expf(float x) { return expf(x); }
inline float __fdividef(float x, float y) { return x / y; }
inline int atomicAdd(int* to, int value) {
    const int before = *to;
    *to += value;
    return before;
}

using cudaStream_t = void*;
using cudaError_t = int;
enum { cudaFuncAttributeMaxDynamicSharedMemorySize };
enum { cudaErrorInvalidValue = 1, cudaErrorInvalidConfiguration = 9, cudaErrorLaunchFailure = 719 };
inline const char* cudaGetErrorString(cudaError_t error) {  // CUDA's own words
    switch (error) {
        case cudaErrorInvalidValue: return "invalid argument";
        case cudaErrorInvalidConfiguration: return "invalid configuration argument";
        case cudaErrorLaunchFailure: return "unspecified launch failure";
    }
    return "unrecognized error code";
}

namespace {

uint3 threadIdx, blockIdx, blockDim, gridDim;

constexpr int MOST_SHARED = 227 * 1024, RESERVED = 1024;  // bytes; the hardware's lie below
constexpr uint8_t UNTOUCHED = 0xFF;                       // twice: a NaN, as bf16 and as float
// Dynamic shared memory, and behind it what must stay untouched.
alignas(1024) thread_local uint8_t memory[MOST_SHARED + 4096];

// ----------------------------------------------------------------------------------- scheduling

enum Why { NOTHING, EXIT, BARRIER, MEETING, LANES, REGISTERS };

struct Fiber {
    ucontext_t start;
    jmp_buf context;
    bool started = false;
    Why why = EXIT;  // it waits, and for what: an address and a parity, or a number and a count
    uint32_t what = 0, count = 0;
    int issued = 0, in_flight = 0;  // MMAs
    int committed = 0;              // groups of them
    bool fenced = false;
    int registers = 0;
    std::unique_ptr<char[]> stack;
};

struct Barrier {
    int expected, pending, bytes;
    uint32_t phase;
};

struct Copy {
    uint32_t to;
    const uint8_t* from;
    int bytes;
    uint32_t barrier;
};

// One m64nN of a warp: its 16 rows. Lanes enter theirs one after another.
struct Mma {
    int n, group, lanes;
    uint32_t b;
    uint32_t a[32][4];
    const uint32_t* registers[32];
};

struct Warp {
    uint32_t meetings = 0, slots[2][32];  // of all lanes; the last and the one before
    int there = 0;
    std::deque<Mma> mmas;
    int done = 0;  // MMAs, and which of all were issued:
    std::vector<uint64_t> history;
    float* sums[32];
    float d[16][256];
};

constexpr int STACK = 64 * 1024, MOST_THREADS = 1024;

struct Machine {
    std::vector<Fiber> fibers{MOST_THREADS};
    std::vector<Warp> warps{MOST_THREADS / 32};
    std::map<uint32_t, Barrier> barriers;
    std::map<uint32_t, std::pair<uint32_t, int>> meetings;  // number to generation, threads there
    std::vector<Copy> copies;
    std::map<void*, int> allowed;  // dynamic shared memory of a kernel
    std::vector<std::pair<const uint8_t*, int64_t>> sources;  // what copies may read
    jmp_buf scheduler;
    int current = 0, threads = 0, bytes = 0, pool = 0;
    bool inside = false;  // a thread runs, not the scheduler
    uint32_t base = RESERVED;  // shared address of `memory`
    uint64_t random = 1;
    const char* kernel = "";
    std::string failure;
    void (*body)(void*) = nullptr;
    void* arguments = nullptr;
} machine;

uint32_t chance(uint32_t below) {
    machine.random ^= machine.random << 13;
    machine.random ^= machine.random >> 7;
    machine.random ^= machine.random << 17;
    return (machine.random >> 20) % below;
}

__attribute__((noinline)) void leave() {
    if (!_setjmp(machine.fibers[machine.current].context)) _longjmp(machine.scheduler, 1);
}

// In a thread it never returns: the fiber is left where it is.
__attribute__((format(printf, 1, 2), noinline)) void fail(const char* format, ...) {
    char text[512];
    va_list arguments;
    va_start(arguments, format);
    vsnprintf(text, sizeof text, format, arguments);
    va_end(arguments);
    char where[128];
    snprintf(where, sizeof where, "%s, CTA %u, thread %d: ", machine.kernel, blockIdx.x,
             machine.current);
    if (machine.failure.empty()) machine.failure = std::string(where) + text;
    if (machine.inside) leave();
}

Fiber& self() { return machine.fibers[machine.current]; }
Warp& my_warp() { return machine.warps[machine.current / 32]; }

void wait(Why why, uint32_t what, uint32_t count) {
    self().why = why, self().what = what, self().count = count;
    leave();
}

Barrier& barrier_at(uint32_t address) {
    const auto found = machine.barriers.find(address);
    if (found == machine.barriers.end()) {
        fail("no mbarrier at %u", address);
        abort();
    }
    return found->second;
}

bool ready(const Fiber& fiber, int index) {
    switch (fiber.why) {
        case NOTHING: return true;
        case EXIT: return false;
        case BARRIER: return (machine.barriers.at(fiber.what).phase & 1) != fiber.count;
        case MEETING: return machine.meetings[fiber.what].first != fiber.count;
        case LANES: return machine.warps[index / 32].meetings != fiber.count;
        case REGISTERS: return machine.pool >= int(fiber.count);
    }
    return false;
}

void phase_may_end(Barrier& barrier) {
    if (barrier.pending || barrier.bytes) return;
    ++barrier.phase;
    barrier.pending = barrier.expected;
}

void complete(int index) {
    const Copy copy = machine.copies[index];
    machine.copies[index] = machine.copies.back();
    machine.copies.pop_back();
    memcpy(memory + (copy.to - machine.base), copy.from, copy.bytes);
    Barrier& barrier = machine.barriers.at(copy.barrier);
    barrier.bytes -= copy.bytes;
    phase_may_end(barrier);
}

void entry() {
    for (;;) {
        machine.body(machine.arguments);
        if (self().in_flight) fail("exits with MMAs in flight");
        self().why = EXIT;
        leave();
    }
}

void enter(int index) {
    machine.current = index;
    threadIdx = {unsigned(index), 0, 0};
    Fiber& fiber = machine.fibers[index];
    fiber.why = NOTHING;
    if (_setjmp(machine.scheduler)) {
        machine.inside = false;
        return;
    }
    machine.inside = true;
    if (fiber.started) _longjmp(fiber.context, 1);
    fiber.started = true;
    if (!fiber.stack) fiber.stack.reset(new char[STACK]);
    getcontext(&fiber.start);
    fiber.start.uc_stack.ss_sp = fiber.stack.get();
    fiber.start.uc_stack.ss_size = STACK;
    fiber.start.uc_link = nullptr;
    makecontext(&fiber.start, entry, 0);
    setcontext(&fiber.start);
}

// Everything waits, and no copy is under way.
void deadlock() {
    std::string text = "deadlock:";
    const char* const names[] = {"", "", "mbarrier", "CTA barrier", "its warp", "registers"};
    for (int i = 0, shown = 0; i < machine.threads && shown < 6; ++i) {
        const Fiber& fiber = machine.fibers[i];
        if (fiber.why == EXIT) continue;
        const Fiber& before = machine.fibers[i ? i - 1 : 0];
        if (i % 32 && before.why == fiber.why && before.what == fiber.what) continue;
        char line[192];
        if (fiber.why == BARRIER) {
            const Barrier& barrier = machine.barriers.at(fiber.what);
            snprintf(line, sizeof line,
                     " thread %d waits for mbarrier %u, parity %u (phase %u, %d of %d arrivals and "
                     "%d bytes outstanding);",
                     i, fiber.what, fiber.count, barrier.phase, barrier.pending, barrier.expected,
                     barrier.bytes);
        } else {
            snprintf(line, sizeof line, " thread %d waits for %s %u;", i, names[fiber.why],
                     fiber.what);
        }
        text += line;
        ++shown;
    }
    machine.failure = std::string(machine.kernel) + ": " + text;
}

void run_cta() {
    for (int i = 0; i < machine.threads; ++i) {
        Fiber& fiber = machine.fibers[i];
        fiber.why = NOTHING;
        fiber.issued = fiber.committed = fiber.in_flight = 0;
        fiber.fenced = false;
        // What ptxas gives each at most, under the launch bound; the rest lies idle.
        fiber.registers = min(255, 65536 / machine.threads) / 8 * 8;
    }
    const int count = (machine.threads + 31) / 32;
    for (int i = 0; i < count; ++i) {
        Warp& warp = machine.warps[i];
        warp.meetings = warp.there = warp.done = 0;
        warp.mmas.clear();
        warp.history.clear();
    }
    machine.barriers.clear();
    machine.meetings.clear();
    machine.copies.clear();
    machine.pool = 0;
    machine.base = RESERVED + 16 * chance(64);
    memset(memory, UNTOUCHED, machine.bytes + 4096);
    const int slow = chance(count) / 4;  // a warpgroup that is far behind the others
    for (int living = count; living;) {
        bool progress = false;
        living = 0;
        const int first = chance(count);
        const bool hold = chance(4) == 0;  // some lanes a while, at times
        for (int w = 0; w < count; ++w) {
            const int warp = (first + w) % count;
            bool alive = false;
            const bool held = warp / 4 == slow ? chance(8) : hold && chance(2);
            const int end = held ? 32 * warp + chance(32) : MOST_THREADS;
            for (int i = 32 * warp; i < min(32 * warp + 32, machine.threads); ++i) {
                if (machine.fibers[i].why == EXIT) continue;
                alive = true;
                if (i >= end || !ready(machine.fibers[i], i)) continue;
                progress = true;
                enter(i);
                if (!machine.failure.empty()) return;
            }
            progress |= held && alive;
            living += alive;
        }
        for (int i = machine.copies.size() - 1; i >= 0; --i)
            if (i < int(machine.copies.size()) && chance(6) == 0) complete(i), progress = true;
        if (!progress && living) {
            if (machine.copies.empty()) return deadlock();
            complete(chance(machine.copies.size()));
        }
    }
    if (!machine.copies.empty()) fail("exits with copies under way");
    for (int i = 0; i < 4096; ++i)
        if (memory[machine.bytes + i] != UNTOUCHED) fail("wrote past its shared memory, %d", i);
    for (int i = 0; i < count; ++i)
        if (machine.warps[i].history != machine.warps[i / 4 * 4].history)
            fail("warps of a warpgroup issued different MMAs");
}

// Of all lanes of the warp, which all give a value; true in the last. Reading it: slots[now & 1].
bool gather_lanes(uint32_t value, uint32_t& now) {
    Warp& warp = my_warp();
    now = warp.meetings;
    warp.slots[now & 1][machine.current % 32] = value;
    if (++warp.there < 32) return false;
    warp.there = 0;
    return true;
}

// ----------------------------------------------------------------------------------- primitives
// Under the names that the source has for them.

void meet_number(uint32_t number, int threads) {
    auto& [generation, there] = machine.meetings[number];
    if (++there < threads) return wait(MEETING, number, generation);
    there = 0;
    ++generation;
}
template <int THREADS>
void named_barrier_sync() {
    if (machine.current >= THREADS) fail("is not one of the %d", THREADS);
    meet_number(1, THREADS);
}
void __syncthreads() { meet_number(0, machine.threads); }

void __syncwarp() {
    uint32_t now;
    if (gather_lanes(0, now))
        ++my_warp().meetings;
    else
        wait(LANES, 0, now);
}

// What each lane has.
std::array<uint32_t, 32> lanes(uint32_t mine) {
    uint32_t now;
    if (gather_lanes(mine, now))
        ++my_warp().meetings;
    else
        wait(LANES, 0, now);
    std::array<uint32_t, 32> all;
    memcpy(all.data(), my_warp().slots[now & 1], sizeof(all));
    return all;
}

uint32_t __reduce_max_sync(uint32_t, uint32_t value) {
    for (const uint32_t other : lanes(value)) value = other > value ? other : value;
    return value;
}

// Lane 4 g + q holds columns 2 q and 2 q + 1 of row g, in its lower half and its upper.
uint32_t transpose(uint32_t matrix) {
    const auto rows = lanes(matrix);
    const int row = machine.current % 32 / 4, column = machine.current % 4 * 2;
    const auto element = [&](int i, int j) { return rows[4 * i + j / 2] >> 16 * (j % 2) & 0xFFFF; };
    return element(column, row) | element(column + 1, row) << 16;
}

uint32_t __cvta_generic_to_shared(const void* pointer) {
    return machine.base + uint32_t(static_cast<const uint8_t*>(pointer) - memory);
}

void check_shared(uint32_t address, int bytes, int alignment, const char* what) {
    if (address % alignment || address < machine.base ||
        int64_t(address) + bytes > int64_t(machine.base) + machine.bytes)
        fail("%s at %u, %d bytes: misaligned or not in shared memory", what, address, bytes);
}

void load_matrices(uint32_t (&matrices)[4], uint32_t row) {
    check_shared(row, 16, 16, "row of a matrix");
    const auto rows = lanes(row);
    const int lane = machine.current % 32;
    for (int i = 0; i < 4; ++i)
        memcpy(&matrices[i], memory + (rows[8 * i + lane / 4] - machine.base) + lane % 4 * 4, 4);
}

// A: as of wgmma. Lane 4 g + q has of B column g, rows 2 q and 2 q + 1, and those plus 8; of D, rows
// g and g + 8, columns 2 q and 2 q + 1.
void warp_mma(float* d, const uint32_t (&a)[4], uint32_t b, uint32_t b_next) {
    std::array<uint32_t, 32> all[6];
    for (int i = 0; i < 4; ++i) all[i] = lanes(a[i]);
    all[4] = lanes(b), all[5] = lanes(b_next);
    const int lane = machine.current % 32;
    const auto half = [](uint32_t pair, int i) { return emulated_float(pair >> 16 * (i % 2) & 0xFFFF); };
    for (int i = 0; i < 4; ++i) {
        const int row = i / 2, column = lane % 4 * 2 + i % 2;
        for (int k = 0; k < 16; ++k)
            d[i] += half(all[row + k / 8 * 2][lane / 4 * 4 + k % 8 / 2], k) *
                    half(all[4 + k / 8][column * 4 + k % 8 / 2], k);
    }
}

void barrier_init(uint32_t barrier, int count) {
    check_shared(barrier, 8, 8, "mbarrier");
    if (machine.barriers.count(barrier)) fail("mbarrier %u is there already", barrier);
    if (count < 1) fail("mbarrier of %d", count);
    machine.barriers[barrier] = Barrier{count, count, 0, 0};
}
void barrier_init_fence() {}

void barrier_arrive(uint32_t address) {
    Barrier& barrier = barrier_at(address);
    if (barrier.pending == 0) fail("one arrival too many at mbarrier %u", address);
    --barrier.pending;
    phase_may_end(barrier);
}
void barrier_expect(uint32_t address, int bytes) {
    Barrier& barrier = barrier_at(address);
    barrier.bytes += bytes;
    if (barrier.bytes >= 1 << 20) fail("too many bytes for mbarrier %u", address);
    barrier_arrive(address);
}
void barrier_wait(uint32_t address, uint32_t parity) {
    if (parity > 1) fail("parity %u", parity);
    if ((barrier_at(address).phase & 1) == parity) wait(BARRIER, address, parity);
}

// A kernel's CTAs come when all of the kernel before have ended: what comes early waits for that.
void trigger_next_kernel() {}
void wait_for_previous_kernel() {}

void bulk_copy(uint32_t to, const void* from, int bytes, uint32_t barrier, uint64_t) {
    check_shared(to, bytes, 16, "copy");
    barrier_at(barrier);
    if (bytes <= 0 || bytes % 16 || uintptr_t(from) % 16) fail("misaligned copy, %d bytes", bytes);
    const uint8_t* const source = static_cast<const uint8_t*>(from);
    bool allowed = false;
    for (const auto& [start, size] : machine.sources)
        allowed |= source >= start && source + bytes <= start + size;
    if (!allowed) fail("copy of %d bytes from outside of any tensor", bytes);
    for (const auto& [address, state] : machine.barriers)
        if (to < address + 8 && address < to + bytes) fail("copy over mbarrier %u", address);
    for (const Copy& other : machine.copies)
        if (to < other.to + other.bytes && other.to < to + bytes) fail("copy over another");
    memset(memory + (to - machine.base), UNTOUCHED, bytes);
    machine.copies.push_back(Copy{to, source, bytes, barrier});
}
uint64_t evict_first_policy() { return 0; }
uint64_t evict_normal_policy() { return 0; }
uint64_t evict_last_policy() { return 0; }

template <int COUNT, bool INCREASE>
void set_max_registers() {
    static_assert(COUNT % 8 == 0 && COUNT >= 24 && COUNT <= 256, "setmaxnreg");
    const int more = COUNT - self().registers;
    if (INCREASE ? more < 0 : more > 0) fail("setmaxnreg goes the other way");
    if (INCREASE && machine.pool < more) wait(REGISTERS, COUNT, more);
    machine.pool -= more;
    self().registers = COUNT;
}

uint32_t multiply_bf16x2(uint32_t values, uint32_t scale) {
    uint32_t result = 0;
    for (int half = 0; half < 32; half += 16)
        result |= uint32_t(emulated_bf16(emulated_float(values >> half & 0xFFFF) *
                                         emulated_float(scale >> half & 0xFFFF)))
                  << half;
    return result;
}

void broadcast_halves(uint32_t& low, uint32_t& high, uint32_t pair) {
    low = (pair & 0xFFFF) * 0x10001u;
    high = (pair >> 16) * 0x10001u;
}

template <uint32_t MASK, uint32_t BITS>
uint32_t mask_then_set(uint32_t value) {
    return (value & MASK) | BITS;
}

uint32_t pick_bytes(uint32_t low, uint32_t high, uint32_t selector) {
    if (selector & 0x8888) fail("PRMT of a sign");
    return __byte_perm(low, high, selector);
}

uint32_t pack_e4m3x2(float low, float high) { return emulated_to_e4m3(low) | emulated_to_e4m3(high) << 8; }

int warpgroup() { return int(threadIdx.x / 128); }

template <int N>
void mma_size_begins() {}
template <int N>
void mma_size_ends() {}

// ------------------------------------------------------------------------------------------ mma

void mma_fence() { self().fenced = true; }
void mma_commit() {
    ++self().committed;
    self().fenced = false;
}

// D: of lane 4 g + q, d[4 j + 2 h + i] is row g + 8 h, column 8 j + 2 q + i.
template <typename Visit>
void fragment(int lane, int n, Visit visit) {
    for (int i = 0; i < n / 2; ++i)
        visit(i, lane / 4 + i / 2 % 2 * 8, i / 4 * 8 + lane % 4 * 2 + i % 2);
}

template <int N>
void mma(float (&d)[N / 2], const uint32_t (&a)[4], uint32_t b) {
    Fiber& fiber = self();
    Warp& warp = my_warp();
    const int lane = machine.current % 32;
    if (!fiber.fenced) fail("an MMA without wgmma.fence before it");
    if (fiber.in_flight++ == 0) {
        warp.sums[lane] = d;
        fragment(lane, N, [&](int i, int row, int column) {
            warp.d[row][column] = d[i];
            d[i] = NAN;
        });
    }
    if (warp.sums[lane] != d) fail("sums of two MMAs in flight");
    const size_t index = fiber.issued++ - warp.done;
    if (index == warp.mmas.size()) {
        warp.mmas.push_back(Mma{N, fiber.committed, 0, b, {}, {}});
        warp.history.push_back(uint64_t(N) << 32 | b);
    }
    Mma& mma = warp.mmas[index];
    if (mma.n != N || mma.b != b || mma.group != fiber.committed) fail("lanes' MMAs differ");
    memcpy(mma.a[lane], a, 16);
    mma.registers[lane] = a;
    ++mma.lanes;
}

// The tokens' operand from shared memory, as its descriptor says.
void multiply(Warp& warp, const Mma& mma) {
    const uint64_t descriptor = uint64_t(DESCRIPTOR) << 32 | mma.b;
    const uint32_t start = (descriptor & 0x3FFF) << 4, apart = (descriptor >> 32 & 0x3FFF) << 4;
    if (descriptor >> 62 != 1 || descriptor >> 46 & 0x3F || descriptor >> 14 & 3) fail("a descriptor of another kind");
    constexpr int COLUMNS = 32 / OPERAND, EACH = 4 / OPERAND;  // of A; of one of its registers
    const auto value = [](uint32_t bits) {
        return OPERAND == 1 ? emulated_e4m3(bits & 0xFF) : emulated_float(bits & 0xFFFF);
    };
    float a[16][COLUMNS], b[COLUMNS][256];
    for (int n = 0; n < mma.n; ++n) {
        for (int k = 0; k < COLUMNS; ++k) {
            uint32_t address = start + n / 8 * apart + n % 8 * 128 + k * OPERAND;
            address ^= (address >> 7 & 7) << 4;
            if (k * OPERAND % 16 == 0) check_shared(address, 16, 16, "operand B");
            uint16_t bits = 0;
            memcpy(&bits, memory + (address - machine.base), OPERAND);
            b[k][n] = value(bits);
        }
    }
    for (int lane = 0; lane < 32; ++lane) {
        if (memcmp(mma.a[lane], mma.registers[lane], 16)) fail("A overwritten under an MMA");
        for (int i = 0; i < 4; ++i)
            for (int j = 0; j < EACH; ++j)
                a[lane / 4 + i % 2 * 8][(i / 2 * 4 + lane % 4) * EACH + j] =
                    value(mma.a[lane][i] >> 8 * OPERAND * j);
    }
    for (int row = 0; row < 16; ++row)
        for (int k = 0; k < COLUMNS; ++k)
            for (int n = 0; n < mma.n; ++n) warp.d[row][n] += a[row][k] * b[k][n];
}

template <int GROUPS>
void mma_wait() {
    Warp& warp = my_warp();
    uint32_t now;
    if (!gather_lanes(self().committed, now)) return wait(LANES, 0, now);
    for (int lane = 0; lane < 32; ++lane)
        if (int(warp.slots[now & 1][lane]) != self().committed) fail("lanes' groups differ");
    const bool any = !warp.mmas.empty();
    const int n = any ? warp.mmas.front().n : 0;
    while (!warp.mmas.empty() && warp.mmas.front().group < self().committed - GROUPS) {
        if (warp.mmas.front().lanes != 32) fail("an MMA of %d lanes", warp.mmas.front().lanes);
        multiply(warp, warp.mmas.front());
        warp.mmas.pop_front();
        ++warp.done;
    }
    if (any && warp.mmas.empty()) {
        for (int lane = 0; lane < 32; ++lane) {
            fragment(lane, n, [&](int i, int row, int column) {
                warp.sums[lane][i] = warp.d[row][column];
            });
            machine.fibers[machine.current / 32 * 32 + lane].in_flight = 0;
        }
    }
    ++warp.meetings;
}

// ------------------------------------------------------------------------------------ launching

template <typename Kernel>
int cudaFuncSetAttribute(Kernel kernel, int, int bytes) {
    if (bytes > MOST_SHARED) return cudaErrorInvalidValue;
    machine.allowed[reinterpret_cast<void*>(kernel)] = bytes;
    return 0;
}

template <typename... Parameters, typename... Arguments>
int launch(void (*kernel)(Parameters...), int grid, int threads, int bytes, cudaStream_t,
           bool, const Arguments&... arguments) {
    const auto all = [&] { kernel(arguments...); };
    void* const address = reinterpret_cast<void*>(kernel);
    const auto allowed = machine.allowed.find(address);
    if (grid < 1 || threads < 1 || threads > MOST_THREADS) return cudaErrorInvalidConfiguration;
    if (bytes > (allowed == machine.allowed.end() ? 48 * 1024 : allowed->second))
        return cudaErrorInvalidValue;
    Dl_info symbol;
    machine.kernel = dladdr(address, &symbol) && symbol.dli_sname ? symbol.dli_sname : "kernel";
    machine.threads = threads, machine.bytes = bytes;
    machine.arguments = const_cast<void*>(static_cast<const void*>(&all));
    machine.body = [](void* call) { (*static_cast<decltype(all)*>(call))(); };
    blockDim = {unsigned(threads), 1, 1}, gridDim = {unsigned(grid), 1, 1};
    std::vector<int> order(grid);
    for (int i = 0; i < grid; ++i) {
        const int other = chance(i + 1);
        order[i] = order[other];
        order[other] = i;
    }
    for (const int block : order) {
        blockIdx = {unsigned(block), 0, 0};
        run_cta();
        if (machine.failure.empty()) continue;
        for (Fiber& fiber : machine.fibers) fiber.started = false;
        return cudaErrorLaunchFailure;
    }
    return 0;
}

}  // namespace

extern "C" void emulation_seed(uint64_t seed) {
    machine.random = seed * 0x9E3779B97F4A7C15 + 1;
    machine.failure.clear();
    machine.sources.clear();
}
extern "C" void emulation_source(const void* start, int64_t bytes) {
    machine.sources.emplace_back(static_cast<const uint8_t*>(start), bytes);
}
extern "C" const char* emulation_failure() { return machine.failure.c_str(); }
