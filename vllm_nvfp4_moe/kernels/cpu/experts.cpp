// NVFP4 experts on a CPU: codes are read from memory once, and become numbers in registers.
//
// A header says how an instruction set decodes COLUMNS columns of a row and multiplies them with the
// inputs of a token (Input, Weights, decode, add, ...). All sums of one output are added in the same
// order however many tokens there are and however the work is split, so a token's output does not
// depend on its neighbours.
#include "vectors.h"

#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <limits>

extern "C" int omp_get_max_threads();

namespace {

struct Gate {
    int form;
    float alpha, beta, limit;
};

// Mirrored by `Work` in kernel.py.
struct Work {
    int64_t tokens, slots, hidden, inner, experts, gated;
    int64_t x_is_float, weight_on_input, known;  // known: numbers in `local`
    const void* x;                        // [tokens, hidden], float or bfloat16
    const int32_t *ids, *local;           // [tokens, slots]; local numbers, null if ids are these
    const float* weights;                 // [tokens, slots]
    const uint8_t *w13, *s13, *w2, *s2;   // codes and block scales, [experts, out, in / 2 or 16]
    const float *g13, *g2, *b13, *b2;     // [experts], and biases [experts, out] or null
    Input *inputs, *middle;               // [tokens, padded(hidden)], [pairs, padded(inner)]
    float* output;                        // [tokens, hidden], zero
    int64_t *routed, *start, *pairs;      // [experts], [experts + 1], [tokens * slots]: see `route`
    Gate gate;
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
    } else if constexpr (FORM == 4) {
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

template <int R, int T>
void step(Sums (*sums)[T], const uint8_t* const* codes, const uint8_t* const* scales,
          const Input* const* x, int64_t c, int64_t ahead) {
#pragma GCC unroll 8
    for (int r = 0; r < R; r++) {
        const uint8_t* at = codes[r] + c * (COLUMNS / 2);
        if (c % (128 / COLUMNS) == 0) __builtin_prefetch(at + ahead);
        const Weights weights = decode(at, scales[r] + c * (COLUMNS / 16));
#pragma GCC unroll 8
        for (int t = 0; t < T; t++) add(sums[r][t], weights, x[t] + c * COLUMNS);
    }
}

// out[r][t] = sum over columns of row r times token t, without the global scale.
template <int R, int T>
void multiply(const uint8_t* const* codes, const uint8_t* const* scales, const Input* const* x,
              int64_t columns, float (*out)[TOKENS]) {
    constexpr int COUNT = (R * T + 3) / 4 * 4;
    Sums sums[COUNT];
    for (auto& each : sums) each = zero();
    const auto of = reinterpret_cast<Sums(*)[T]>(sums);
    const int64_t whole = columns / COLUMNS;
    // Prefetched are the next rows but a few: hardware sees no stream, since each row is a short one.
    if constexpr (T == 1) {  // one stream through memory is faster than several
        for (int r = 0; r < R; r++)
            for (int64_t c = 0; c < whole; c++)
                step<1, 1>(of + r, codes + r, scales + r, x, c, columns / 2);
    } else {
        for (int64_t c = 0; c < whole; c++) step<R, T>(of, codes, scales, x, c, R * (columns / 2));
    }
    if (const int64_t rest = columns % COLUMNS)
        for (int r = 0; r < R; r++) {
            uint8_t last[COLUMNS / 2] = {}, of_last[COLUMNS / 16] = {};
            memcpy(last, codes[r] + whole * (COLUMNS / 2), rest / 2);
            memcpy(of_last, scales[r] + whole * (COLUMNS / 16), rest / 16);
            const Weights weights = decode(last, of_last);
            for (int t = 0; t < T; t++) add(of[r][t], weights, x[t] + whole * COLUMNS);
        }
    float all[COUNT];
    for (int i = 0; i < COUNT; i += 4) totals(sums + i, all + i);
    for (int r = 0; r < R; r++)
        for (int t = 0; t < T; t++) out[r][t] = all[r * T + t];
}

template <int R, int T>
void dispatch(int tokens, const uint8_t* const* codes, const uint8_t* const* scales,
              const Input* const* x, int64_t columns, float (*out)[TOKENS]) {
    if constexpr (T > 1)
        if (tokens < T) return dispatch<R, T - 1>(tokens, codes, scales, x, columns, out);
    multiply<R, T>(codes, scales, x, columns, out);
}

template <int R = ROWS>
void multiply_any(int rows, int tokens, const uint8_t* const* codes, const uint8_t* const* scales,
                  const Input* const* x, int64_t columns, float (*out)[TOKENS]) {
    if constexpr (R > 1)
        if (rows < R)
            return multiply_any<R - 1>(rows, tokens, codes, scales, x, columns, out);
    dispatch<R, TOKENS>(tokens, codes, scales, x, columns, out);
}

// Sorts pairs of a token and a slot by their experts: routed[i] is the i-th expert that has any, and
// its pairs are start[i] to start[i + 1], in the order of tokens. Returns how many experts that are,
// or -1 if there is a number that no expert has.
int64_t route(const Work& work) {
    const int64_t all = work.tokens * work.slots;
    auto local = [&](int64_t pair) -> int64_t {
        const int32_t id = work.ids[pair];
        if (!work.local || id < 0) return id;
        return id < work.known ? work.local[id] : work.experts;
    };
    for (int64_t e = 0; e <= work.experts; e++) work.start[e] = 0;
    for (int64_t pair = 0; pair < all; pair++) {
        const int64_t expert = local(pair);
        if (expert >= work.experts) return -1;
        if (expert >= 0) work.start[expert + 1]++;
    }
    for (int64_t e = 0; e < work.experts; e++) work.start[e + 1] += work.start[e];
    for (int64_t pair = 0; pair < all; pair++)
        if (const int64_t expert = local(pair); expert >= 0)
            work.pairs[work.start[expert]++] = pair;
    // Now start[e] is where e's pairs end.
    int64_t count = 0, from = 0;
    for (int64_t e = 0; e < work.experts; e++) {
        const int64_t to = work.start[e];
        if (to == from) continue;
        work.routed[count] = e;
        work.start[count++] = from;
        from = to;
    }
    work.start[count] = from;
    return count;
}

constexpr int BLOCK = 32;   // tokens whose inputs stay in the second-level cache meanwhile

// Rows that one thread takes at a time: long streams, but eight of them for each thread.
int64_t rows_of_job(int64_t rows, int64_t least, int64_t most) {
    const int64_t many = rows / (8 * omp_get_max_threads()) / 16 * 16;
    return std::min(std::max(many, least), most);
}

void arrange(const Work& work, int64_t token) {
    Input* out = work.inputs + token * padded(work.hidden);
    const float* floats = static_cast<const float*>(work.x) + token * work.hidden;
    const uint16_t* halves = static_cast<const uint16_t*>(work.x) + token * work.hidden;
    for (int64_t c = 0; c < work.hidden; c++) {
        float value;
        if (work.x_is_float) {
            value = floats[c];
        } else {
            const uint32_t bits = uint32_t(halves[c]) << 16;
            memcpy(&value, &bits, 4);
        }
        out[place(c)] = rounded(value);
    }
}

// Rows lo to hi of gate and of up, of one expert; at most MOST_ROWS.
void gate_up(const Work& work, int64_t i, int64_t lo, int64_t hi, [[maybe_unused]] Input* tiles) {
    const int64_t expert = work.routed[i], inner = work.inner, columns = work.hidden;
    const int64_t all = inner * (work.gated ? 2 : 1), wide = padded(columns);
    const int parts = work.gated ? 2 : 1, step = ROWS / parts;
    float made[BLOCK][2][MOST_ROWS];
    for (int64_t from = work.start[i]; from < work.start[i + 1]; from += BLOCK) {
        const int block = int(std::min<int64_t>(BLOCK, work.start[i + 1] - from));
        const Input* x[BLOCK];
        for (int t = 0; t < block; t++) x[t] = work.inputs + work.pairs[from + t] / work.slots * wide;
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
            const int rows = int(std::min<int64_t>(step, hi - r));
            const uint8_t *codes[ROWS], *scales[ROWS];
            for (int j = 0; j < rows * parts; j++) {
                const int64_t row = expert * all + (j < rows ? r + j : inner + r + j - rows);
                codes[j] = work.w13 + row * (columns / 2);
                scales[j] = work.s13 + row * (columns / 16);
            }
            for (int first = 0; first < block; first += TOKENS) {
                const int tokens = std::min(TOKENS, block - first);
                float out[ROWS][TOKENS];
                multiply_any(rows * parts, tokens, codes, scales, x + first, columns, out);
                for (int t = 0; t < tokens; t++)
                    for (int part = 0; part < parts; part++)
                        for (int j = 0; j < rows; j++)
                            made[first + t][part][r - lo + j] = out[part * rows + j][t];
            }
        }
        for (int t = 0; t < block; t++) {
            float(&both)[2][MOST_ROWS] = made[t];
            const float before = work.weight_on_input ? work.weights[work.pairs[from + t]] : 1.0f;
            const float factor = work.g13[expert] * before;
            for (int part = 0; part < parts; part++) {
                const float* bias = work.b13 ? work.b13 + expert * all + part * inner : nullptr;
                for (int64_t r = lo; r < hi; r++)
                    both[part][r - lo] = both[part][r - lo] * factor + (bias ? bias[r] : 0);
                for (int64_t r = hi - lo; r % LANES; r++) both[part][r] = 0;
            }
            activate_any(int(hi - lo), both[0], both[work.gated], work.gate);
            Input* out = work.middle + (from + t) * padded(inner);
            for (int64_t r = lo; r < hi; r++) out[place(int(r))] = rounded(both[0][r - lo]);
        }
    }
}

// Columns lo to hi of the output. Experts come in ascending order.
void down(const Work& work, int64_t experts, int64_t lo, int64_t hi,
          [[maybe_unused]] Input* tiles) {
    const int64_t columns = work.inner, wide = padded(columns);
    for (int64_t i = 0; i < experts; i++) {
        const int64_t expert = work.routed[i];
        for (int64_t from = work.start[i]; from < work.start[i + 1]; from += BLOCK) {
            const int block = int(std::min<int64_t>(BLOCK, work.start[i + 1] - from));
            const Input* x[BLOCK];
            float *outputs[BLOCK], after[BLOCK];
            for (int t = 0; t < block; t++) {
                const int64_t pair = work.pairs[from + t];
                x[t] = work.middle + (from + t) * wide;
                outputs[t] = work.output + pair / work.slots * work.hidden;
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
                                   outputs[t][lo + j] += (sum * work.g2[expert] + bias) * after[t];
                               });
                r = hi;
            }
#endif
            for (; r < hi; r += ROWS) {
                const int rows = int(std::min<int64_t>(ROWS, hi - r));
                const uint8_t *codes[ROWS], *scales[ROWS];
                float bias[ROWS] = {};
                for (int j = 0; j < rows; j++) {
                    const int64_t row = expert * work.hidden + r + j;
                    codes[j] = work.w2 + row * (columns / 2);
                    scales[j] = work.s2 + row * (columns / 16);
                    if (work.b2) bias[j] = work.b2[row];
                }
                for (int first = 0; first < block; first += TOKENS) {
                    const int tokens = std::min(TOKENS, block - first);
                    float out[ROWS][TOKENS];
                    multiply_any(rows, tokens, codes, scales, x + first, columns, out);
                    for (int t = 0; t < tokens; t++)
                        for (int j = 0; j < rows; j++)
                            outputs[first + t][r + j] +=
                                (out[j][t] * work.g2[expert] + bias[j]) * after[first + t];
                }
            }
        }
    }
}

}  // namespace

#define EXPORT extern "C" __attribute__((visibility("default")))

EXPORT int64_t size_of_work() { return sizeof(Work); }
EXPORT int64_t size_of_input() { return sizeof(Input); }
EXPORT int64_t columns() { return COLUMNS; }
#ifdef HAS_TILES
EXPORT int allowed() { return tiles_are_allowed(); }
#else
EXPORT int allowed() { return 1; }
#endif

// Returns 0; or 1 if a token is sent to an expert that there is not.
EXPORT int run(const Work* given) {
    const Work work = *given;
    const int64_t experts = route(work);
    if (experts < 0) return 1;
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
        for (int64_t token = 0; token < work.tokens; token++) arrange(work, token);
#pragma omp for schedule(dynamic)
        for (int64_t job = 0; job < experts * per_expert; job++) {
            const int64_t lo = job % per_expert * job_of_first;
            gate_up(work, job / per_expert, lo, std::min(lo + job_of_first, work.inner), tiles);
        }
#pragma omp for schedule(dynamic)
        for (int64_t lo = 0; lo < work.hidden; lo += job_of_second)
            down(work, experts, lo, std::min(lo + job_of_second, work.hidden), tiles);
#ifdef HAS_TILES
        tiles_end();
        free(tiles);
#endif
    }
    return 0;
}
