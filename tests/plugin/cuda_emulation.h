// What the Hopper kernels' sources need of CUDA and of a Hopper GPU, on a CPU. Included before the source.
//
// A CTA's threads are fibers, switched where one waits. CTAs take turns, those of different kernels
// too: a dependent launch may start once all CTAs of the kernel before have triggered or ended, and
// only `griddepcontrol.wait` waits for that kernel's end. All that a GPU leaves open (which CTA, warp
// or copy is next) follows from a seed. Where PTX lets an operation happen late it happens as late as
// it may, and what must not be read until then is NaN: the target of a copy, the sums of an MMA, what
// a kernel has not written yet (the tests' tensors begin as NaN, or as no index of anything). Rules of
// PTX that can be checked are, and what breaks one or waits forever is reported by `emulation_failure`.
//
// Memory that a kernel may use lies between pages that nobody may (`emulation_allocate`): a plain load
// or store outside of a tensor is a fault, which is reported as well.
//
// DESCRIPTOR is the upper half of the descriptor of an MMA's B, which source.py writes. OPERAND is the
// number of bytes of an MMA's element: 2 for bf16, 1 for e4m3.
//
// Not emulated: the memory model (proxies, fences) and anything that takes time.

#include <dlfcn.h>
#include <errno.h>
#include <setjmp.h>
#include <signal.h>
#include <stdarg.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/wait.h>
#include <ucontext.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <deque>
#include <functional>
#include <list>
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
// In a function. All of it lies in one section, which is exchanged when another CTA has its turn.
// `extern __shared__ uint8_t memory[]`, the dynamic part, comes without the keyword (emulation.py).
#define __shared__ static __attribute__((section("emulated_shared")))

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
alignas(1024) uint8_t memory[MOST_SHARED + 4096];

// ----------------------------------------------------------------------------------- scheduling

enum Why { NOTHING, EXIT, BARRIER, MEETING, LANES, REGISTERS, KERNEL };

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
    bool late;  // it comes once nothing else can happen, after any number of those issued later
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
constexpr int RESIDENT = 8192;  // threads at a time; a GPU has 2048 for each multiprocessor

// A launch, which runs when it may.
struct Kernel {
    std::string name;
    std::function<void()> body;
    unsigned grid;
    int threads, bytes;  // of a CTA, and its dynamic shared memory
    bool dependent;
    std::vector<int> order;  // in which CTAs start
    unsigned started = 0, triggered = 0, ended = 0;  // CTAs; one that ends has triggered
    bool over() const { return ended == grid; }
};

struct Cta {
    size_t kernel;  // its number
    unsigned block;
    std::vector<Fiber*> fibers;
    std::vector<Warp> warps;
    std::map<uint32_t, Barrier> barriers;
    std::map<uint32_t, std::pair<uint32_t, int>> meetings;  // number to generation, threads there
    std::vector<Copy> copies;
    int pool = 0;               // registers that no thread has
    uint32_t base;              // shared address of `memory`
    bool triggered = false, blocked = false;
    uint32_t priority;          // among CTAs, if those decide
    int slow;                   // a warpgroup that is far behind the others
    bool starve;                // then it, or one of its warps, runs where nothing else can
    int starved, starved_count; // which warps
    std::vector<uint8_t> dynamic_memory, static_memory;  // while others have their turns
};

// How CTAs take turns. PATIENT: one after another. EAGER: those of the last kernel that may begin, as
// soon as it may. RANKED: by priorities, which change at a few random moments.
enum Turns { PATIENT, EAGER, RANKED };

struct Machine {
    std::vector<Kernel> kernels;
    std::list<Cta> ctas;  // those that run
    std::vector<std::unique_ptr<Fiber>> all_fibers;
    std::vector<Fiber*> free_fibers;
    std::map<void*, int> allowed;  // dynamic shared memory of a kernel
    struct Tensor {
        uint8_t* start;
        int64_t size;
        std::string name;
        uint8_t* mapped;  // pages, of which the first and the last are nobody's
        int64_t mapped_size;
    };
    std::vector<Tensor> tensors;  // what kernels may use
    jmp_buf scheduler;
    Cta* cta = nullptr;  // whose turn it is
    Turns turns = RANKED;
    int current = 0;
    bool inside = false;  // a thread runs, not the scheduler
    uint64_t random = 1;
    std::string failure;
} machine;

// The linker's names of the ends of the section with static shared memory.
extern "C" __attribute__((visibility("hidden"))) uint8_t __start_emulated_shared[];
extern "C" __attribute__((visibility("hidden"))) uint8_t __stop_emulated_shared[];

Kernel& kernel_of(const Cta& cta) { return machine.kernels[cta.kernel]; }

// For sources with faults put in on purpose (test_hopper_mutants.py): whether that of this number is on.
uint64_t mutants = 0;
bool mutated(int number) { return mutants >> number & 1; }

uint32_t chance(uint32_t below) {
    machine.random ^= machine.random << 13;
    machine.random ^= machine.random >> 7;
    machine.random ^= machine.random << 17;
    return (machine.random >> 20) % below;
}

__attribute__((noinline)) void leave() {
    if (!_setjmp(machine.cta->fibers[machine.current]->context)) _longjmp(machine.scheduler, 1);
}

// In a thread it never returns: the fiber is left where it is.
__attribute__((format(printf, 1, 2), noinline)) void fail(const char* format, ...) {
    char text[512];
    va_list arguments;
    va_start(arguments, format);
    vsnprintf(text, sizeof text, format, arguments);
    va_end(arguments);
    char where[128];
    snprintf(where, sizeof where, "%s, CTA %u, thread %d: ", kernel_of(*machine.cta).name.c_str(),
             blockIdx.x, machine.current);
    if (machine.failure.empty()) machine.failure = std::string(where) + text;
    if (machine.inside) leave();
}

Fiber& self() { return *machine.cta->fibers[machine.current]; }
Warp& my_warp() { return machine.cta->warps[machine.current / 32]; }

void wait(Why why, uint32_t what, uint32_t count) {
    self().why = why, self().what = what, self().count = count;
    leave();
}

Barrier& barrier_at(uint32_t address) {
    const auto found = machine.cta->barriers.find(address);
    if (found == machine.cta->barriers.end()) {
        fail("no mbarrier at %u", address);
        abort();
    }
    return found->second;
}

bool ready(const Cta& cta, int index) {
    const Fiber& fiber = *cta.fibers[index];
    switch (fiber.why) {
        case NOTHING: return true;
        case EXIT: return false;
        case BARRIER: return (cta.barriers.at(fiber.what).phase & 1) != fiber.count;
        case MEETING: return cta.meetings.at(fiber.what).first != fiber.count;
        case LANES: return cta.warps[index / 32].meetings != fiber.count;
        case REGISTERS: return cta.pool >= int(fiber.count);
        case KERNEL: return machine.kernels[cta.kernel - 1].over();
    }
    return false;
}

void phase_may_end(Barrier& barrier) {
    if (barrier.pending || barrier.bytes) return;
    ++barrier.phase;
    barrier.pending = barrier.expected;
}

void complete(Cta& cta, int index) {
    const Copy copy = cta.copies[index];
    cta.copies[index] = cta.copies.back();
    cta.copies.pop_back();
    memcpy(memory + (copy.to - cta.base), copy.from, copy.bytes);
    Barrier& barrier = cta.barriers.at(copy.barrier);
    barrier.bytes -= copy.bytes;
    phase_may_end(barrier);
}

void entry() {
    for (;;) {
        kernel_of(*machine.cta).body();
        if (self().in_flight) fail("exits with MMAs in flight");
        self().why = EXIT;
        leave();
    }
}

void enter(int index) {
    machine.current = index;
    threadIdx = {unsigned(index), 0, 0};
    Fiber& fiber = self();
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
    const char* const names[] = {"", "", "mbarrier", "CTA barrier", "its warp", "registers",
                                 "the kernel before"};
    const Cta& cta = *machine.cta;
    for (int i = 0, shown = 0; i < int(cta.fibers.size()) && shown < 6; ++i) {
        const Fiber& fiber = *cta.fibers[i];
        if (fiber.why == EXIT) continue;
        const Fiber& before = *cta.fibers[i ? i - 1 : 0];
        if (i % 32 && before.why == fiber.why && before.what == fiber.what) continue;
        char line[192];
        if (fiber.why == BARRIER) {
            const Barrier& barrier = cta.barriers.at(fiber.what);
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
    machine.failure = kernel_of(cta).name + ": " + text;
}

// -- a CTA

void start_cta(size_t number) {
    Kernel& kernel = machine.kernels[number];
    machine.ctas.emplace_back();
    Cta& cta = machine.ctas.back();
    cta.kernel = number, cta.block = kernel.order[kernel.started++];
    for (int i = 0; i < kernel.threads; ++i) {
        if (machine.free_fibers.empty()) {
            machine.all_fibers.emplace_back(new Fiber);
            machine.free_fibers.push_back(machine.all_fibers.back().get());
        }
        Fiber& fiber = *machine.free_fibers.back();
        machine.free_fibers.pop_back();
        fiber.why = NOTHING;
        fiber.issued = fiber.committed = fiber.in_flight = 0;
        fiber.fenced = false;
        // What ptxas gives each at most, under the launch bound; the rest lies idle.
        fiber.registers = min(255, 65536 / kernel.threads) / 8 * 8;
        cta.fibers.push_back(&fiber);
    }
    cta.warps.resize((kernel.threads + 31) / 32);
    cta.base = RESERVED + 16 * chance(64);
    cta.dynamic_memory.assign(kernel.bytes + 4096, UNTOUCHED);
    cta.static_memory.assign(__stop_emulated_shared - __start_emulated_shared, UNTOUCHED);
    cta.priority = chance(1 << 30);
    cta.slow = chance(cta.warps.size()) / 4;
    cta.starve = chance(3) > 0;
    cta.starved = cta.starved_count = 0;
}

// Gives the turn to a CTA, or to none: its shared memory is then where its threads look for it.
void change_to(Cta* cta) {
    if (machine.cta == cta) return;
    if (machine.cta) {
        Cta& last = *machine.cta;
        memcpy(last.dynamic_memory.data(), memory, last.dynamic_memory.size());
        memcpy(last.static_memory.data(), __start_emulated_shared, last.static_memory.size());
    }
    machine.cta = cta;
    if (!cta) return;
    memcpy(memory, cta->dynamic_memory.data(), cta->dynamic_memory.size());
    memcpy(__start_emulated_shared, cta->static_memory.data(), cta->static_memory.size());
    const Kernel& kernel = kernel_of(*cta);
    blockIdx = {cta->block, 0, 0};
    blockDim = {unsigned(kernel.threads), 1, 1}, gridDim = {kernel.grid, 1, 1};
}

// What must be right at the end of a CTA, which has the turn.
void end_cta() {
    Cta& cta = *machine.cta;
    Kernel& kernel = kernel_of(cta);
    if (!cta.copies.empty()) fail("exits with copies under way");
    for (int i = 0; i < 4096; ++i)
        if (memory[kernel.bytes + i] != UNTOUCHED) fail("wrote past its shared memory, %d", i);
    for (size_t i = 0; i < cta.warps.size(); ++i)
        if (cta.warps[i].history != cta.warps[i / 4 * 4].history)
            fail("warps of a warpgroup issued different MMAs");
    ++kernel.ended;
    kernel.triggered += !cta.triggered;
    machine.free_fibers.insert(machine.free_fibers.end(), cta.fibers.begin(), cta.fibers.end());
    machine.cta = nullptr;
    machine.ctas.erase(std::find_if(machine.ctas.begin(), machine.ctas.end(),
                                    [&](const Cta& other) { return &other == &cta; }));
}

// Runs each thread of a warp that can, up to lane `lanes`. Says whether any could.
bool run_warp(Cta& cta, int warp, int lanes) {
    bool progress = false;
    const int end = min(32 * warp + lanes, int(cta.fibers.size()));
    for (int i = 32 * warp; i < end; ++i) {
        if (!ready(cta, i)) continue;
        progress = true;
        enter(i);
        if (!machine.failure.empty()) break;
    }
    return progress;
}

// Runs the CTA's threads once, in some order. Says whether any could run, or a copy was completed.
bool run_round(Cta& cta) {
    const int count = cta.warps.size();
    bool progress = false;
    const bool hold = chance(4) == 0;  // some lanes a while, at times
    const int first = chance(count);
    for (int w = 0; w < count; ++w) {
        const int warp = (first + w) % count;
        if (cta.starve && warp >= cta.starved && warp < cta.starved + cta.starved_count) continue;
        const bool held = !cta.starve && (warp / 4 == cta.slow ? chance(8) : hold && chance(2));
        progress |= run_warp(cta, warp, held ? chance(32) : 32);
        if (!machine.failure.empty()) return true;
        progress |= held;
    }
    for (int i = cta.copies.size() - 1; i >= 0; --i)
        if (i < int(cta.copies.size()) && !cta.copies[i].late && chance(6) == 0)
            complete(cta, i), progress = true;
    if (!progress && !cta.copies.empty()) complete(cta, chance(cta.copies.size())), progress = true;
    for (int w = cta.starved; !progress && cta.starve && w < cta.starved + cta.starved_count; ++w) {
        progress = run_warp(cta, w, 32);
        if (!machine.failure.empty()) return true;
    }
    // At a few moments, another warp or warpgroup is the last that may run.
    if (cta.starve && (cta.starved_count == 0 || chance(200) == 0)) {
        cta.starved_count = chance(2) ? 1 : min(4, count);
        cta.starved = chance(count) / cta.starved_count * cta.starved_count;
    }
    return progress;
}

bool alive(const Cta& cta) {
    for (const Fiber* fiber : cta.fibers)
        if (fiber->why != EXIT) return true;
    return false;
}

// -- all CTAs

// Whether CTAs of the kernel of this number may begin.
bool may_begin(size_t number) {
    if (number == 0) return true;
    const Kernel& before = machine.kernels[number - 1];
    if (!machine.kernels[number].dependent) return before.over();
    return before.triggered == before.grid;
}

// Starts a CTA of a kernel that may begin, the last or the first of those, or returns null.
Cta* start_any() {
    size_t threads = 0;
    for (const Cta& cta : machine.ctas) threads += cta.fibers.size();
    Cta* started = nullptr;
    for (size_t i = 0; i < machine.kernels.size() && may_begin(i); ++i) {
        const Kernel& kernel = machine.kernels[i];
        if (kernel.started == kernel.grid || threads + kernel.threads > RESIDENT) continue;
        start_cta(i);
        started = &machine.ctas.back();
        break;  // later kernels begin once all CTAs of this one have
    }
    return started;
}

// Whose turn it is next, null if all that run wait for a kernel's end.
Cta* next_cta() {
    if (machine.turns == EAGER || (machine.turns == RANKED && chance(2)))
        if (Cta* const started = start_any()) return started;
    Cta* best = nullptr;
    for (Cta& cta : machine.ctas) {
        if (cta.blocked && !machine.kernels[cta.kernel - 1].over()) continue;
        const auto before = [&](const Cta& one, const Cta& other) {
            if (machine.turns == RANKED) return one.priority > other.priority;
            return machine.turns == EAGER ? one.kernel > other.kernel : one.kernel < other.kernel;
        };
        if (!best || before(cta, *best)) best = &cta;
    }
    return best ? best : start_any();
}

// Gives turns until all kernels have ended or something is wrong.
void run_all() {
    for (;;) {
        const auto over = [](const Kernel& kernel) { return kernel.over(); };
        if (std::all_of(machine.kernels.begin(), machine.kernels.end(), over)) return;
        Cta* const cta = next_cta();
        if (!cta) {
            machine.failure = "deadlock: kernels wait for each other";
            return;
        }
        change_to(cta);
        cta->blocked = false;
        // A turn ends where the CTA triggers, waits for a kernel or ends, or at a random moment.
        for (bool triggered = cta->triggered; !cta->blocked && triggered == cta->triggered;) {
            if (!run_round(*cta)) {
                const auto waits = [](const Fiber* fiber) { return fiber->why == KERNEL; };
                if (!std::any_of(cta->fibers.begin(), cta->fibers.end(), waits)) return deadlock();
                cta->blocked = true;
            }
            if (!machine.failure.empty()) return;
            if (!alive(*cta)) {
                end_cta();
                if (!machine.failure.empty()) return;
                break;
            }
            if (machine.turns == RANKED && chance(300) == 0) {
                cta->priority = 0;
                break;
            }
        }
    }
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
    auto& [generation, there] = machine.cta->meetings[number];
    if (++there < threads) return wait(MEETING, number, generation);
    there = 0;
    ++generation;
}
template <int THREADS>
void named_barrier_sync() {
    if (machine.current >= THREADS) fail("is not one of the %d", THREADS);
    meet_number(1, THREADS);
}
void __syncthreads() { meet_number(0, blockDim.x); }

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
    return machine.cta->base + uint32_t(static_cast<const uint8_t*>(pointer) - memory);
}

void check_shared(uint32_t address, int bytes, int alignment, const char* what) {
    if (address % alignment || address < machine.cta->base ||
        int64_t(address) + bytes > int64_t(machine.cta->base) + kernel_of(*machine.cta).bytes)
        fail("%s at %u, %d bytes: misaligned or not in shared memory", what, address, bytes);
}

void load_matrices(uint32_t (&matrices)[4], uint32_t row) {
    check_shared(row, 16, 16, "row of a matrix");
    const auto rows = lanes(row);
    const int lane = machine.current % 32;
    for (int i = 0; i < 4; ++i)
        memcpy(&matrices[i], memory + (rows[8 * i + lane / 4] - machine.cta->base) + lane % 4 * 4, 4);
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
    if (machine.cta->barriers.count(barrier)) fail("mbarrier %u is there already", barrier);
    if (count < 1) fail("mbarrier of %d", count);
    machine.cta->barriers[barrier] = Barrier{count, count, 0, 0};
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

// The first thread's call counts for its CTA.
void trigger_next_kernel() {
    Cta& cta = *machine.cta;
    if (!cta.triggered) ++kernel_of(cta).triggered;
    cta.triggered = true;
    // Whoever may start now does so before it goes on, or some of it.
    if (machine.turns == EAGER || chance(4) == 0) wait(NOTHING, 0, 0);
}
void wait_for_previous_kernel() {
    const size_t number = machine.cta->kernel;
    if (number && !machine.kernels[number - 1].over()) wait(KERNEL, 0, 0);
}

void bulk_copy(uint32_t to, const void* from, int bytes, uint32_t barrier, uint64_t) {
    check_shared(to, bytes, 16, "copy");
    barrier_at(barrier);
    if (bytes <= 0 || bytes % 16 || uintptr_t(from) % 16) fail("misaligned copy, %d bytes", bytes);
    const uint8_t* const source = static_cast<const uint8_t*>(from);
    bool allowed = false;
    for (const auto& tensor : machine.tensors)
        allowed |= source >= tensor.start && source + bytes <= tensor.start + tensor.size;
    if (!allowed) fail("copy of %d bytes from outside of any tensor", bytes);
    for (const auto& [address, state] : machine.cta->barriers)
        if (to < address + 8 && address < to + bytes) fail("copy over mbarrier %u", address);
    for (const Copy& other : machine.cta->copies)
        if (to < other.to + other.bytes && other.to < to + bytes) fail("copy over another");
    memset(memory + (to - machine.cta->base), UNTOUCHED, bytes);
    machine.cta->copies.push_back(Copy{to, source, bytes, barrier, chance(4) == 0});
}
uint64_t evict_first_policy() { return 0; }
uint64_t evict_normal_policy() { return 0; }
uint64_t evict_last_policy() { return 0; }

template <int COUNT, bool INCREASE>
void set_max_registers() {
    static_assert(COUNT % 8 == 0 && COUNT >= 24 && COUNT <= 256, "setmaxnreg");
    const int more = COUNT - self().registers;
    if (INCREASE ? more < 0 : more > 0) fail("setmaxnreg goes the other way");
    if (INCREASE && machine.cta->pool < more) wait(REGISTERS, COUNT, more);
    machine.cta->pool -= more;
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
int warp_of_group() { return threadIdx.x / 32 % 4; }
bool elected() { return threadIdx.x % 32 == 0; }

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
            memcpy(&bits, memory + (address - machine.cta->base), OPERAND);
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
            machine.cta->fibers[machine.current / 32 * 32 + lane]->in_flight = 0;
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

// As a GPU does it takes note of what to run, and of its arguments: `emulation_finish` runs it.
template <typename... Parameters, typename... Arguments>
int launch(void (*kernel)(Parameters...), int grid, int threads, int bytes, cudaStream_t,
           bool dependent, const Arguments&... arguments) {
    void* const address = reinterpret_cast<void*>(kernel);
    const auto allowed = machine.allowed.find(address);
    if (grid < 1 || threads < 1 || threads > MOST_THREADS) return cudaErrorInvalidConfiguration;
    if (bytes > (allowed == machine.allowed.end() ? 48 * 1024 : allowed->second))
        return cudaErrorInvalidValue;
    Dl_info symbol;
    const bool known = dladdr(address, &symbol) && symbol.dli_sname;
    machine.kernels.push_back(Kernel{known ? symbol.dli_sname : "kernel",
                                     [=] { kernel(arguments...); }, unsigned(grid), threads, bytes,
                                     dependent, {}});
    std::vector<int>& order = machine.kernels.back().order;
    for (int i = 0; i < grid; ++i) {
        const int other = chance(i + 1);
        order.push_back(i);
        std::swap(order[i], order[other]);
    }
    return 0;
}

// ------------------------------------------------------------------------------- memory's bounds

constexpr int64_t PAGE = 4096;

// A thread's load or store of what is not there.
void fault(int signal, siginfo_t* info, void*) {
    if (!machine.inside) _exit(128 + signal);  // not a thread's: the emulation itself is wrong
    if (signal == SIGFPE) fail("divides by zero");
    const auto* const address = static_cast<const uint8_t*>(info->si_addr);
    const Machine::Tensor* nearest = nullptr;
    const auto distance = [&](const Machine::Tensor& tensor) {
        return address < tensor.start ? tensor.start - address
                                      : address - (tensor.start + tensor.size) + 1;
    };
    for (const auto& tensor : machine.tensors)
        if (!nearest || distance(tensor) < distance(*nearest)) nearest = &tensor;
    if (!nearest || distance(*nearest) > 1 << 30) fail("reads or writes where there is no tensor");
    fail("reads or writes %lld bytes %s %s", static_cast<long long>(distance(*nearest)),
         address < nearest->start ? "before" : "past the end of", nearest->name.c_str());
}

struct FaultHandler {
    static constexpr int SIGNALS[] = {SIGSEGV, SIGBUS, SIGFPE};
    struct sigaction before[3];
    stack_t stack_before;
    static inline char stack[64 * 1024];
    FaultHandler() {
        stack_t own{};
        own.ss_sp = stack, own.ss_size = sizeof stack;
        sigaltstack(&own, &stack_before);
        struct sigaction action{};
        action.sa_sigaction = fault;
        // It is left by a jump: the signal must not stay blocked.
        action.sa_flags = SA_SIGINFO | SA_ONSTACK | SA_NODEFER;
        for (int i = 0; i < 3; ++i) sigaction(SIGNALS[i], &action, &before[i]);
    }
    ~FaultHandler() {
        for (int i = 0; i < 3; ++i) sigaction(SIGNALS[i], &before[i], nullptr);
        sigaltstack(&stack_before, nullptr);
    }
};

}  // namespace

// Forgets all of the run before; its memory is gone.
extern "C" void emulation_begin(uint64_t seed) {
    machine.random = seed * 0x9E3779B97F4A7C15 + 1;
    machine.turns = Turns(seed % 3);
    machine.failure.clear();
    for (const auto& tensor : machine.tensors) munmap(tensor.mapped, tensor.mapped_size);
    machine.tensors.clear();
    machine.kernels.clear();
    if (!machine.ctas.empty())  // left where something was wrong
        for (const auto& fiber : machine.all_fibers) fiber->started = false;
    for (const Cta& cta : machine.ctas)
        machine.free_fibers.insert(machine.free_fibers.end(), cta.fibers.begin(), cta.fibers.end());
    machine.ctas.clear();
    machine.cta = nullptr;
}

extern "C" void emulation_mutants(uint64_t mask) { mutants = mask; }

// Memory for a tensor until the next run, aligned to `alignment`. Beside it, before or after, lies a
// page that nobody may touch.
extern "C" void* emulation_allocate(int64_t bytes, int alignment, const char* name) {
    const int64_t inner = (bytes + PAGE - 1) / PAGE * PAGE + PAGE, size = inner + 2 * PAGE;
    // Shared with a process in which the kernel may run.
    void* const mapped = mmap(nullptr, size, PROT_NONE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
    if (mapped == MAP_FAILED) return nullptr;
    uint8_t* const pages = static_cast<uint8_t*>(mapped);
    uint8_t* const begin = pages + PAGE;
    mprotect(begin, inner, PROT_READ | PROT_WRITE);
    memset(begin, UNTOUCHED, inner);
    uint8_t* const start = chance(3) ? begin + (inner - bytes) / alignment * alignment : begin;
    machine.tensors.push_back({start, bytes, name, pages, size});
    return start;
}

// What lies on a tensor's pages beside it.
void check_surroundings() {
    for (const auto& tensor : machine.tensors)
        for (const uint8_t* byte = tensor.mapped + PAGE;
             byte < tensor.mapped + tensor.mapped_size - PAGE; ++byte)
            if (byte == tensor.start) byte += tensor.size - 1;
            else if (*byte != UNTOUCHED && machine.failure.empty())
                machine.failure = "wrote beside " + tensor.name;
}

void run_here() {
    const FaultHandler handler;
    run_all();
    check_surroundings();
}

// In a process of its own, which has the tensors in common with this one.
void run_apart() {
    constexpr int BYTES = 1024;
    void* const shared =
        mmap(nullptr, BYTES, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
    if (shared == MAP_FAILED) {
        machine.failure = "no memory";
        return;
    }
    char* const text = static_cast<char*>(shared);
    const pid_t child = fork();
    if (child == 0) {
        signal(SIGABRT, SIG_DFL);  // Python's handler would dump this process as if it were its own
        run_here();
        snprintf(text, BYTES, "%s", machine.failure.c_str());
        _exit(0);
    }
    int status = 0;
    while (child > 0 && waitpid(child, &status, 0) < 0 && errno == EINTR) {
    }
    machine.failure = text;
    if (child < 0) machine.failure = "no process";
    if (WIFEXITED(status) && WEXITSTATUS(status))
        machine.failure = "its process ended with " + std::to_string(WEXITSTATUS(status));
    if (WIFSIGNALED(status))
        machine.failure = "its process died of signal " + std::to_string(WTERMSIG(status));
    munmap(shared, BYTES);
}

// Runs what was launched. Returns a cudaError_t. With a fault put in on purpose it runs apart: a wrong
// index may meet any memory of a process, as well as none, and the tests' own is not to be its.
extern "C" int emulation_finish() {
    if (mutants) run_apart();
    else run_here();
    return machine.failure.empty() ? 0 : cudaErrorLaunchFailure;
}

extern "C" const char* emulation_failure() { return machine.failure.c_str(); }
