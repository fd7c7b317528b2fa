// Which experts a token goes to, and how much of each: those with the highest scores, which are
// sigmoids or a softmax of the router's logits. A bias is added for the choice alone.
#include <cmath>
#include <cstdlib>

namespace {

struct Routing {
    int64_t tokens, experts, slots;
    bool sigmoid, renormalize;  // so that a token's weights add up to 1
    float factor;
    Numbers logits_are, bias_is;
    const void* logits;  // [tokens, experts]
    const void* bias;    // [experts], or null
    float* weights;      // [tokens, slots]
    int32_t* ids;        // [tokens, slots], the highest first; of equal ones, the first
};

// Of a number that is not normal, too: there is no instruction here that every processor has.
float half_to_float(uint16_t half) {
    const uint32_t sign = uint32_t(half >> 15) << 31, rest = half & 0x7fff;
    float value = float(rest) * 0x1p-24f;  // below the normal ones
    if (rest >= 0x400) {
        const uint32_t bits = (rest << 13) + (rest >= 0x7c00 ? 0x70000000 : 0x38000000);
        memcpy(&value, &bits, 4);
    }
    return sign ? -value : value;
}

// Number `at` of those, as float32.
float number(const void* of, Numbers they_are, int64_t at) {
    if (they_are == FLOAT32) return static_cast<const float*>(of)[at];
    const uint16_t bits = static_cast<const uint16_t*>(of)[at];
    if (they_are == FLOAT16) return half_to_float(bits);
    const uint32_t wide = uint32_t(bits) << 16;
    float value;
    memcpy(&value, &wide, 4);
    return value;
}

// `scores` and `choice` have room for all experts.
void route_one(const Routing& work, int64_t token, float* scores, float* choice) {
    const int64_t experts = work.experts, slots = work.slots;
    for (int64_t e = 0; e < experts; e++)
        scores[e] = number(work.logits, work.logits_are, token * experts + e);
    if (work.sigmoid) {
        for (int64_t e = 0; e < experts; e++) scores[e] = 1 / (1 + std::exp(-scores[e]));
    } else {
        float most = -INFINITY, total = 0;
        for (int64_t e = 0; e < experts; e++) most = scores[e] > most ? scores[e] : most;
        for (int64_t e = 0; e < experts; e++) total += scores[e] = std::exp(scores[e] - most);
        for (int64_t e = 0; e < experts; e++) scores[e] /= total;
    }
    for (int64_t e = 0; e < experts; e++) {
        choice[e] = scores[e] + (work.bias ? number(work.bias, work.bias_is, e) : 0);
        // Taken first: where a score is not a number, the token's result must not be one either.
        if (choice[e] != choice[e]) choice[e] = INFINITY;
    }
    float* weights = work.weights + token * slots;
    int32_t* ids = work.ids + token * slots;
    float total = 0;
    for (int64_t s = 0; s < slots; s++) {
        int64_t best = -1;
        for (int64_t e = 0; e < experts; e++)
            if (best < 0 ? choice[e] == choice[e] : choice[e] > choice[best]) best = e;
        choice[best] = NAN;  // less than none, and equal to none
        ids[s] = int32_t(best);
        total += weights[s] = scores[best];
    }
    for (int64_t s = 0; s < slots; s++)
        weights[s] = (work.renormalize ? weights[s] / total : weights[s]) * work.factor;
}

// False if there is no memory.
bool route_all(const Routing& work) {
    bool done = true;
#pragma omp parallel if (work.tokens > 64)
    {
        auto* scores = static_cast<float*>(malloc(2 * sizeof(float) * (work.experts + 1)));
        if (!scores) done = false;
#pragma omp for schedule(static)
        for (int64_t token = 0; token < work.tokens; token++)
            if (scores) route_one(work, token, scores, scores + work.experts);
        free(scores);
    }
    return done;
}

}  // namespace
