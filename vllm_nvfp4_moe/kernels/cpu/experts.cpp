// NVFP4 experts on a CPU: codes are read from memory once, and become numbers in registers.
//
// A header says how an instruction set decodes COLUMNS columns of a row and multiplies them with the
// inputs of a token (Input, Weights, decode, add, ...). All sums of one output are added in the same
// order however many tokens there are and however the work is split, so a token's output does not
// depend on its neighbours.
#include "work.h"
#include "vectors.h"

#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <limits>

extern "C" int omp_get_max_threads();

namespace {

// A call's own memory: the inputs of both products, sums, and which pair of a token and a slot is
// whose.
struct Room {
    Input *inputs, *middle;            // [tokens, padded(hidden)], [pairs, padded(inner)]
    float* sums;                       // [tokens, hidden]
    int64_t *routed, *start, *pairs;   // [experts], [experts + 1], [tokens * slots]: see `route`
};

int64_t padded(int64_t columns) { return (columns + COLUMNS - 1) / COLUMNS * COLUMNS; }

// e^x to two units in the last place. Unlike the library's, the compiler makes vectors of it.
float exponential(float x) {
    x = x < -87.3f ? -87.3f : x > 88.8f ? 88.8f : x;
    const float shifted = x * 1.44269504f + 0x1.8p23f;  // rounds to a whole number, in its last bits
    const float whole = shifted - 0x1.8p23f;
    const float r = (x - whole * 0.693359375f) + whole * 2.12194440e-4f;
    float power = 1.9875691500e-4f;  // Cephes' polynomial for e^r - 1 - r, |r| < 0.35
    power = power * r + 1.3981999507e-3f;
    power = power * r + 8.3334519073e-3f;
    power = power * r + 4.1665795894e-2f;
    power = power * r + 1.6666665459e-1f;
    power = power * r + 5.0000001201e-1f;
    power = power * r * r + r + 1;
    uint32_t bits;
    memcpy(&bits, &shifted, 4);
    bits = (bits << 23) + (127u << 23);
    float scale;
    memcpy(&scale, &bits, 4);
    return power * scale;
}

template <int FORM>
float activate(float gate, float up, const Gate& g) {
    if constexpr (FORM == 0) {
        gate = std::min(gate, g.limit);
        up = std::min(std::max(up, -g.limit), g.limit);
        return (up + g.beta) * gate / (1 + exponential(-g.alpha * gate));
    } else if constexpr (FORM == 1) {
        return up * 0.5f * gate * (1 + std::erf(gate * 0.7071067811865476f));
    } else if constexpr (FORM == 2) {
        // 0.5 * (1 + tanh(x)) is 1 / (1 + e^(-2 x)).
        const float x = 0.7978845608028654f * (gate + 0.044715f * gate * gate * gate);
        return up * gate / (1 + exponential(-2 * x));
    } else if constexpr (FORM == 3) {
        up = std::min(std::max(up, -g.limit), g.limit);
        return up * std::min(gate / (1 + exponential(-gate)), g.limit);
    } else if constexpr (FORM == RELU2) {
        up = std::max(up, 0.0f);
        return up * up;
    } else {
        if (g.limit < std::numeric_limits<float>::infinity())
            up = g.limit * std::tanh(up / g.limit);
        return up * g.alpha * std::tanh(gate / g.alpha) / (1 + exponential(-gate));
    }
}

constexpr int LANES = 16, MOST_ROWS = 128;  // rows of gate_up's jobs

// The gate for each of MOST_ROWS rows, as vectors: a row's bits do not depend on its place.
template <int FORM>
void activate_rows(int rows, float* gate, const float* up, const Gate& g) {
    for (int at = 0; at < rows; at += LANES)
        for (int j = at; j < at + LANES; j++) gate[j] = activate<FORM>(gate[j], up[j], g);
}

void activate_any(int rows, float* gate, const float* up, const Gate& g) {
    switch (g.form) {
        case 0: return activate_rows<0>(rows, gate, up, g);
        case 1: return activate_rows<1>(rows, gate, up, g);
        case 2: return activate_rows<2>(rows, gate, up, g);
        case 3: return activate_rows<3>(rows, gate, up, g);
        case 4: return activate_rows<4>(rows, gate, up, g);
        default: return activate_rows<5>(rows, gate, up, g);
    }
}

// One step through the columns, of R rows and T tokens: sums[t * R + r].
template <int R, int T>
void step(Sums* sums, const uint8_t* const* codes, const uint8_t* const* scales,
          const Input* const* x, int64_t c, int64_t ahead) {
    const auto row = [&](int r) {
        const uint8_t* at = codes[r] + c * (COLUMNS / 2);
        if (c % (128 / COLUMNS) == 0) __builtin_prefetch(at + ahead);
        return decode(at, scales[r] + c * (COLUMNS / 16));
    };
    if constexpr (T <= FEW) {
#pragma GCC unroll 8
        for (int r = 0; r < R; r++) {
            const Weights weights = row(r);
#pragma GCC unroll 8
            for (int t = 0; t < T; t++) add<1>(sums + t * R + r, &weights, x[t] + c * COLUMNS);
        }
    } else {
        Weights weights[R];
#pragma GCC unroll 8
        for (int r = 0; r < R; r++) weights[r] = row(r);
#pragma GCC unroll 8
        for (int t = 0; t < T; t++) add<R>(sums + t * R, weights, x[t] + c * COLUMNS);
    }
}

// out[t][r] = sum over columns of row r times token t, without the global scale.
template <int R, int T>
void multiply(const uint8_t* const* codes, const uint8_t* const* scales, const Input* const* x,
              int64_t columns, float (*out)[ROWS]) {
    constexpr int COUNT = (R * T + 3) / 4 * 4;
    // All loops over these are unrolled: else they would lie in memory.
    Sums sums[COUNT];
#pragma GCC unroll 32
    for (int i = 0; i < COUNT; i++) sums[i] = zero();
    const int64_t whole = columns / COLUMNS;
    // Prefetched are the next rows but a few: hardware sees no stream, since each row is a short one.
    if constexpr (T == 1) {  // one stream through memory is faster than several
#pragma GCC unroll 8
        for (int r = 0; r < R; r++)
            for (int64_t c = 0; c < whole; c++)
                step<1, 1>(sums + r, codes + r, scales + r, x, c, columns / 2);
    } else {
        for (int64_t c = 0; c < whole; c++) step<R, T>(sums, codes, scales, x, c, R * (columns / 2));
    }
    if (const int64_t rest = columns % COLUMNS) {
#pragma GCC unroll 8
        for (int r = 0; r < R; r++) {
            uint8_t last[COLUMNS / 2] = {}, of_last[COLUMNS / 16] = {};
            memcpy(last, codes[r] + whole * (COLUMNS / 2), rest / 2);
            memcpy(of_last, scales[r] + whole * (COLUMNS / 16), rest / 16);
            const Weights weights = decode(last, of_last);
#pragma GCC unroll 8
            for (int t = 0; t < T; t++)
                add<1>(sums + t * R + r, &weights, x[t] + whole * COLUMNS);
        }
    }
    float all[COUNT];
#pragma GCC unroll 8
    for (int i = 0; i < COUNT; i += 4) totals(sums + i, all + i);
#pragma GCC unroll 8
    for (int t = 0; t < T; t++) memcpy(out[t], all + t * R, R * sizeof(float));
}

// The same for ROWS rows, R at a time, and any number of tokens up to TOKENS.
template <int T = TOKENS>
void multiply_all(int tokens, const uint8_t* const* codes, const uint8_t* const* scales,
                  const Input* const* x, int64_t columns, float (*out)[ROWS]) {
    if constexpr (T > 1)
        if (tokens < T) return multiply_all<T - 1>(tokens, codes, scales, x, columns, out);
    constexpr int R = rows_at_once(T);
    static_assert(ROWS % R == 0);
    for (int r = 0; r < ROWS; r += R)
        multiply<R, T>(codes + r, scales + r, x, columns,
                       reinterpret_cast<float(*)[ROWS]>(&out[0][r]));
}

// Sorts pairs of a token and a slot by their experts: routed[i] is the i-th expert that has any, and
// its pairs are start[i] to start[i + 1], in the order of tokens. Returns how many experts that are,
// or -1 if there is a number that no expert has.
int64_t route(const Work& work, const Room& room) {
    const int64_t all = work.tokens * work.slots;
    auto local = [&](int64_t pair) -> int64_t {
        const int32_t id = work.ids[pair];
        if (!work.local || id < 0) return id;
        return id < work.known ? work.local[id] : work.experts;
    };
    for (int64_t e = 0; e <= work.experts; e++) room.start[e] = 0;
    for (int64_t pair = 0; pair < all; pair++) {
        const int64_t expert = local(pair);
        if (expert >= work.experts) return -1;
        if (expert >= 0) room.start[expert + 1]++;
    }
    for (int64_t e = 0; e < work.experts; e++) room.start[e + 1] += room.start[e];
    for (int64_t pair = 0; pair < all; pair++)
        if (const int64_t expert = local(pair); expert >= 0)
            room.pairs[room.start[expert]++] = pair;
    // Now start[e] is where e's pairs end.
    int64_t count = 0, from = 0;
    for (int64_t e = 0; e < work.experts; e++) {
        const int64_t to = room.start[e];
        if (to == from) continue;
        room.routed[count] = e;
        room.start[count++] = from;
        from = to;
    }
    room.start[count] = from;
    return count;
}

constexpr int BLOCK = 32;   // tokens whose inputs stay in the second-level cache meanwhile

// Rows that one thread takes at a time: long streams, but eight of them for each thread.
int64_t rows_of_job(int64_t rows, int64_t least, int64_t most) {
    const int64_t many = rows / (8 * omp_get_max_threads()) / 16 * 16;
    return std::min(std::max(many, least), most);
}

uint16_t float_to_half(float value) {
    return uint16_t(_mm_cvtsi128_si32(_mm_cvtps_ph(_mm_set_ss(value), _MM_FROUND_TO_NEAREST_INT)));
}
uint16_t float_to_bfloat(float value) {
    uint32_t bits;
    memcpy(&bits, &value, 4);
    return value != value ? 0x7fc0 : uint16_t((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

// Sixteen of a token's inputs as float32.
void widen(const Work& work, int64_t at, float* out) {
    const auto* halves = static_cast<const uint16_t*>(work.x) + at;
    if (work.x_is == FLOAT32) {
        memcpy(out, static_cast<const float*>(work.x) + at, 16 * sizeof(float));
    } else if (work.x_is == FLOAT16) {
        for (int i = 0; i < 16; i += 8)
            _mm256_storeu_ps(out + i, _mm256_cvtph_ps(_mm_loadu_si128(
                reinterpret_cast<const __m128i*>(halves + i))));
    } else {
        uint32_t bits[16];
        for (int i = 0; i < 16; i++) bits[i] = uint32_t(halves[i]) << 16;
        memcpy(out, bits, sizeof bits);
    }
}

constexpr float ZEROS[16] = {};

void arrange(const Work& work, const Room& room, int64_t token) {
    const int64_t wide = padded(work.hidden);
    Input* out = room.inputs + token * wide;
    float sixteen[16];
    for (int64_t c = 0; c < work.hidden; c += 16) {
        widen(work, token * work.hidden + c, sixteen);
        put(sixteen, c, out);
    }
    for (int64_t c = work.hidden; c < wide; c += 16) put(ZEROS, c, out);
}

// Columns lo to hi of the sums, in the result's dtype.
void finish(const Work& work, const Room& room, int64_t lo, int64_t hi) {
    if (work.out_is == FLOAT32) return;  // it has them
    for (int64_t token = 0; token < work.tokens; token++) {
        const float* sums = room.sums + token * work.hidden;
        uint16_t* out = static_cast<uint16_t*>(work.out) + token * work.hidden;
        if (work.out_is == BFLOAT16)
            for (int64_t c = lo; c < hi; c++) out[c] = float_to_bfloat(sums[c]);
        else
            for (int64_t c = lo; c < hi; c++) out[c] = float_to_half(sums[c]);
    }
}

// Rows lo to hi of gate and of up, of one expert; at most MOST_ROWS.
void gate_up(const Work& work, const Room& room, int64_t i, int64_t lo, int64_t hi,
             [[maybe_unused]] Input* tiles) {
    const int64_t expert = room.routed[i], inner = work.inner, columns = work.hidden;
    const int64_t all = inner * (work.gated ? 2 : 1), wide = padded(columns);
    const int parts = work.gated ? 2 : 1, step = ROWS / parts;
    const int turn = parts == 1 ? ROWS : 2 < step ? 2 : step;  // rows of gate, and then as many of up
    float made[BLOCK][2][MOST_ROWS];
    for (int64_t from = room.start[i]; from < room.start[i + 1]; from += BLOCK) {
        const int block = int(std::min<int64_t>(BLOCK, room.start[i + 1] - from));
        const Input* x[BLOCK];
        for (int t = 0; t < block; t++) x[t] = room.inputs + room.pairs[from + t] / work.slots * wide;
        int64_t r = lo;
#ifdef HAS_TILES
        if (block >= TILED) {
            arrange_tiles(x, block, wide, tiles);
            for (int part = 0; part < parts; part++) {
                const int64_t row = expert * all + part * inner + lo;
                multiply_tiles(work.w13 + row * (columns / 2), work.s13 + row * (columns / 16),
                               columns, hi - lo, tiles, block,
                               [&](int64_t j, int t, float sum) { made[t][part][j] = sum; });
            }
            r = hi;
        }
#endif
        for (; r < hi; r += step) {
            const uint8_t *codes[ROWS], *scales[ROWS];
            int part[ROWS], at[ROWS];
            for (int j = 0; j < ROWS; j++) {
                part[j] = j / turn % parts;
                at[j] = j / (turn * parts) * turn + j % turn;
                const int64_t row = expert * all + part[j] * inner + r + at[j];
                codes[j] = work.w13 + row * (columns / 2);
                scales[j] = work.s13 + row * (columns / 16);
            }
            for (int first = 0; first < block; first += TOKENS) {
                const int tokens = std::min(TOKENS, block - first);
                float out[TOKENS][ROWS];
                multiply_all(tokens, codes, scales, x + first, columns, out);
                for (int t = 0; t < tokens; t++)
                    for (int j = 0; j < ROWS; j++)
                        made[first + t][part[j]][r - lo + at[j]] = out[t][j];
            }
        }
        for (int t = 0; t < block; t++) {
            float(&both)[2][MOST_ROWS] = made[t];
            const float before = work.weight_on_input ? work.weights[room.pairs[from + t]] : 1.0f;
            const float factor = work.g13[expert] * before;
            for (int part = 0; part < parts; part++) {
                const float* bias = work.b13 ? work.b13 + expert * all + part * inner : nullptr;
                for (int64_t r = lo; r < hi; r++)
                    both[part][r - lo] = both[part][r - lo] * factor + (bias ? bias[r] : 0);
            }
            activate_any(int(hi - lo), both[0], both[work.gated], work.gate);
            Input* out = room.middle + (from + t) * padded(inner);
            for (int64_t r = lo; r < hi; r += 16) put(both[0] + r - lo, r, out);
            if (hi == inner)
                for (int64_t r = hi; r < padded(inner); r += 16) put(ZEROS, r, out);
        }
    }
}

// Columns lo to hi of the output. Experts come in ascending order.
void down(const Work& work, const Room& room, int64_t experts, int64_t lo, int64_t hi,
          [[maybe_unused]] Input* tiles) {
    const int64_t columns = work.inner, wide = padded(columns);
    for (int64_t token = 0; token < work.tokens; token++)
        std::fill(room.sums + token * work.hidden + lo, room.sums + token * work.hidden + hi, 0.0f);
    for (int64_t i = 0; i < experts; i++) {
        const int64_t expert = room.routed[i];
        const float factor = work.g2[expert];
        for (int64_t from = room.start[i]; from < room.start[i + 1]; from += BLOCK) {
            const int block = int(std::min<int64_t>(BLOCK, room.start[i + 1] - from));
            const Input* x[BLOCK];
            float *outputs[BLOCK], after[BLOCK];
            for (int t = 0; t < block; t++) {
                const int64_t pair = room.pairs[from + t];
                x[t] = room.middle + (from + t) * wide;
                outputs[t] = room.sums + pair / work.slots * work.hidden;
                after[t] = work.weight_on_input ? 1.0f : work.weights[pair];
            }
            int64_t r = lo;
#ifdef HAS_TILES
            if (block >= TILED) {
                arrange_tiles(x, block, wide, tiles);
                const int64_t row = expert * work.hidden + lo;
                multiply_tiles(work.w2 + row * (columns / 2), work.s2 + row * (columns / 16),
                               columns, hi - lo, tiles, block, [&](int64_t j, int t, float sum) {
                                   const float bias = work.b2 ? work.b2[row + j] : 0;
                                   outputs[t][lo + j] += (sum * factor + bias) * after[t];
                               });
                r = hi;
            }
#endif
            for (; r < hi; r += ROWS) {
                const uint8_t *codes[ROWS], *scales[ROWS];
                float bias[ROWS] = {};
                for (int j = 0; j < ROWS; j++) {
                    const int64_t row = expert * work.hidden + r + j;
                    codes[j] = work.w2 + row * (columns / 2);
                    scales[j] = work.s2 + row * (columns / 16);
                    if (work.b2) bias[j] = work.b2[row];
                }
                for (int first = 0; first < block; first += TOKENS) {
                    const int tokens = std::min(TOKENS, block - first);
                    float out[TOKENS][ROWS];
                    multiply_all(tokens, codes, scales, x + first, columns, out);
                    for (int t = 0; t < tokens; t++) {
                        float sums[ROWS];  // not where the others are: so this becomes vectors
                        memcpy(sums, outputs[first + t] + r, sizeof sums);
                        for (int j = 0; j < ROWS; j++)
                            sums[j] += (out[t][j] * factor + bias[j]) * after[first + t];
                        memcpy(outputs[first + t] + r, sums, sizeof sums);
                    }
                }
            }
        }
    }
    finish(work, room, lo, hi);
}

// A block of memory for a call, the last one's if that is large enough and not in use.
struct Block {
    static constexpr int64_t MOST = 4 << 20;  // bytes that are kept
    int64_t bytes;
};
Block* kept = nullptr;

Block* take(int64_t bytes) {
    Block* block = __atomic_exchange_n(&kept, nullptr, __ATOMIC_ACQ_REL);
    if (block && block->bytes >= bytes) return block;
    free(block);
    block = static_cast<Block*>(aligned_alloc(64, 64 + bytes));
    if (block) block->bytes = bytes;
    return block;
}

void give(Block* block) {
    if (block->bytes <= Block::MOST) block = __atomic_exchange_n(&kept, block, __ATOMIC_ACQ_REL);
    free(block);
}

// Parts of a block, one behind the other; of none, how many bytes they take.
struct Parts {
    uint8_t* at;
    int64_t bytes = 0;
    template <class T>
    T* next(int64_t count) {
        T* part = at ? reinterpret_cast<T*>(at + bytes) : nullptr;
        bytes += (count * int64_t(sizeof(T)) + 63) / 64 * 64;
        return part;
    }
};

Room rooms(const Work& work, Parts& parts) {
    const int64_t pairs = work.tokens * work.slots;
    Room room;
    room.inputs = parts.next<Input>(work.tokens * padded(work.hidden));
    room.middle = parts.next<Input>(pairs * padded(work.inner));
    room.routed = parts.next<int64_t>(work.experts);
    room.start = parts.next<int64_t>(work.experts + 1);
    room.pairs = parts.next<int64_t>(pairs);
    room.sums = work.out_is == FLOAT32 ? static_cast<float*>(work.out)
                                       : parts.next<float>(work.tokens * work.hidden);
    return room;
}

}  // namespace

#define EXPORT extern "C" __attribute__((visibility("default")))

#ifdef HAS_TILES
EXPORT int allowed() { return tiles_are_allowed(); }
#else
EXPORT int allowed() { return 1; }
#endif

EXPORT int run(const Work* given) {
    const Work work = *given;
    Parts wanted{nullptr};
    rooms(work, wanted);
    Block* block = take(wanted.bytes);
    if (!block) return 2;
    Parts parts{reinterpret_cast<uint8_t*>(block) + 64};
    const Room room = rooms(work, parts);
    const int64_t experts = route(work, room);
    if (experts < 0) {
        give(block);
        return 1;
    }
    const int64_t job_of_first = rows_of_job(experts * work.inner, 16, MOST_ROWS);
    const int64_t job_of_second = rows_of_job(work.hidden, 32, 256);
    const int64_t per_expert = (work.inner + job_of_first - 1) / job_of_first;
#pragma omp parallel
    {
        Input* tiles = nullptr;
#ifdef HAS_TILES
        static_assert(BLOCK == TOKEN_TILES * TILE);
        const int64_t wide = std::max(padded(work.hidden), padded(work.inner));
        tiles = static_cast<Input*>(aligned_alloc(64, sizeof(Input) * BLOCK * wide));
        tiles_begin();
#endif
#pragma omp for schedule(static)
        for (int64_t token = 0; token < work.tokens; token++) arrange(work, room, token);
#pragma omp for schedule(dynamic)
        for (int64_t job = 0; job < experts * per_expert; job++) {
            const int64_t lo = job % per_expert * job_of_first;
            gate_up(work, room, job / per_expert, lo, std::min(lo + job_of_first, work.inner), tiles);
        }
#pragma omp for schedule(dynamic)
        for (int64_t lo = 0; lo < work.hidden; lo += job_of_second)
            down(work, room, experts, lo, std::min(lo + job_of_second, work.hidden), tiles);
#ifdef HAS_TILES
        tiles_end();
        free(tiles);
#endif
    }
    give(block);
    return 0;
}
