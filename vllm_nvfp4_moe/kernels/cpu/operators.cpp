// What PyTorch calls: it looks at the tensors, and no Python runs. `operators.py` has the schemas.
#include "work.h"
#include "torch_abi.h"
#include "routing.h"

namespace {

constexpr int KERNELS = 64;
Run kernels[KERNELS];

void experts(Value* values, uint64_t, uint64_t) {
    enum { OUT, X, W13, S13, G13, W2, S2, G2, WEIGHTS, IDS, MAP, B13, B2, CHOICE, COUNT };
    Tensors<COUNT> given(values, 1u << MAP | 1u << B13 | 1u << B2);
    const Value* more = values + COUNT;
    if (given.rank(X) != 2 || given.rank(IDS) != 2 || given.rank(W2) != 3 || given.rank(CHOICE) != 2)
        given.fail("x, topk_ids, w2 or choice has not 2, 2, 3 and 2 dimensions");
    Work work;
    work.gate = {int(as<int64_t>(more[0])), float(as<double>(more[1])), float(as<double>(more[2])),
                 float(as<double>(more[3]))};
    work.gated = work.gate.form != RELU2;
    work.weight_on_input = as<bool>(more[4]);
    const int64_t tokens = work.tokens = given.size(X, 0), hidden = work.hidden = given.size(X, 1);
    const int64_t slots = work.slots = given.size(IDS, 1);
    const int64_t count = work.experts = given.size(W2, 0), inner = work.inner = 2 * given.size(W2, 2);
    const int64_t rows = inner * (work.gated ? 2 : 1);
    if (hidden % 16 || inner % 16)
        given.fail("rows of %lld and %lld columns are no whole number of blocks", (long long)hidden,
                   (long long)inner);
    work.x_is = given.numbers(X, "x");
    work.out_is = given.numbers(OUT, "out");
    work.x = given.data<void>(X, "x", given.dtype(X), tokens, hidden);
    work.out = given.data<void>(OUT, "out", given.dtype(OUT), tokens, hidden);
    work.ids = given.data<int32_t>(IDS, "topk_ids", torch.int32, tokens, slots);
    work.weights = given.data<float>(WEIGHTS, "topk_weights", torch.float32, tokens, slots);
    work.known = given.none(MAP) || given.rank(MAP) != 1 ? 0 : given.size(MAP, 0);
    work.local = given.data<int32_t>(MAP, "expert_map", torch.int32, work.known);
    work.w13 = given.data<uint8_t>(W13, "w13", torch.uint8, count, rows, hidden / 2);
    work.s13 = given.data<uint8_t>(S13, "w13_scale", torch.float8_e4m3fn, count, rows, hidden / 16);
    work.g13 = given.data<float>(G13, "w13_global", torch.float32, count);
    work.w2 = given.data<uint8_t>(W2, "w2", torch.uint8, count, hidden, inner / 2);
    work.s2 = given.data<uint8_t>(S2, "w2_scale", torch.float8_e4m3fn, count, hidden, inner / 16);
    work.g2 = given.data<float>(G2, "w2_global", torch.float32, count);
    work.b13 = given.data<float>(B13, "w13_bias", torch.float32, count, rows);
    work.b2 = given.data<float>(B2, "w2_bias", torch.float32, count, hidden);
    const int64_t lines = given.size(CHOICE, 0);
    const int64_t* choice = given.data<int64_t>(CHOICE, "choice", torch.int64, lines, 2);
    int64_t line = 0;
    while (line < lines && tokens > choice[2 * line]) line++;
    const int64_t kernel = line < lines ? choice[2 * line + 1] : -1;
    if (kernel < 0 || kernel >= KERNELS || !kernels[kernel])
        given.fail("choice: it has no kernel for %lld tokens", (long long)tokens);
    const int problem = kernels[kernel](&work);
    if (problem == 1)
        given.fail("a token is sent to an expert beyond the last of %lld", (long long)count);
    if (problem) given.fail("no memory for the experts of %lld tokens", (long long)tokens);
}

void route(Value* values, uint64_t, uint64_t) {
    enum { WEIGHTS, IDS, LOGITS, BIAS, COUNT };
    Tensors<COUNT> given(values, 1u << BIAS);
    const Value* more = values + COUNT;
    if (given.rank(WEIGHTS) != 2 || given.rank(LOGITS) != 2)
        given.fail("weights or logits has not 2 dimensions");
    Routing work;
    work.sigmoid = as<bool>(more[0]);
    work.renormalize = as<bool>(more[1]);
    work.factor = float(as<double>(more[2]));
    work.tokens = given.size(LOGITS, 0);
    work.experts = given.size(LOGITS, 1);
    work.slots = given.size(WEIGHTS, 1);
    if (work.slots > work.experts)
        given.fail("%lld experts a token, of %lld", (long long)work.slots, (long long)work.experts);
    work.logits_are = given.numbers(LOGITS, "logits");
    work.logits = given.data<void>(LOGITS, "logits", given.dtype(LOGITS), work.tokens, work.experts);
    work.weights = given.data<float>(WEIGHTS, "weights", torch.float32, work.tokens, work.slots);
    work.ids = given.data<int32_t>(IDS, "ids", torch.int32, work.tokens, work.slots);
    work.bias = nullptr;
    if (!given.none(BIAS)) {
        work.bias_is = given.numbers(BIAS, "bias");
        work.bias = given.data<void>(BIAS, "bias", given.dtype(BIAS), work.experts);
    }
    if (!route_all(work))
        given.fail("no memory for the scores of %lld experts", (long long)work.experts);
}

}  // namespace

#define EXPORT extern "C" __attribute__((visibility("default")))

EXPORT int64_t size_of_torch() { return sizeof(Torch); }

// Returns 0 if PyTorch has taken the operators.
EXPORT int attach(const Torch* given) {
    torch = *given;
    struct Library* library = nullptr;
    return torch.library_init_impl("vllm_nvfp4_moe", "CPU", "operators.cpp", 0, &library) ||
           torch.library_impl(library, "experts", experts) ||
           torch.library_impl(library, "route", route);
}

// What `choice` calls a kernel in this process, or -1 if there are too many.
EXPORT int use(Run run) {
    for (int number = 0; number < KERNELS; number++) {
        if (!kernels[number]) kernels[number] = run;
        if (kernels[number] == run) return number;
    }
    return -1;
}
