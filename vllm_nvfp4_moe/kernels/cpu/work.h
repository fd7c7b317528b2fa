// What the experts of a layer compute in one call: `operators.cpp` fills it in, `experts.cpp` does it.
#include <cstdint>

namespace {

constexpr int RELU2 = 4;  // the form that has no gate

struct Gate {
    int form;  // as FORMS in kernel.py has them
    float alpha, beta, limit;
};

enum Numbers : int64_t { BFLOAT16, FLOAT16, FLOAT32 };

struct Work {
    int64_t tokens, slots, hidden, inner, experts, gated;
    int64_t weight_on_input, known;       // known: numbers in `local`
    Numbers x_is, out_is;
    const void* x;                        // [tokens, hidden]
    const int32_t *ids, *local;           // [tokens, slots]; local numbers, null if ids are these
    const float* weights;                 // [tokens, slots]
    const uint8_t *w13, *s13, *w2, *s2;   // codes and block scales, [experts, out, in / 2 or 16]
    const float *g13, *g2, *b13, *b2;     // [experts], and biases [experts, out] or null
    void* out;                            // [tokens, hidden]
    Gate gate;
};

// Returns 0; 1 if a token is sent to an expert that there is not, 2 if there is no memory.
using Run = int (*)(const Work*);

}  // namespace
