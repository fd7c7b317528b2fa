// The few functions of PyTorch's stable C ABI (torch/csrc/inductor/aoti_torch/c/shim.h) by which a
// library is an operator. `operators.py` finds them in the PyTorch that runs. So nothing is compiled
// against PyTorch or linked to it, and one library serves every version that has them.
#include <cstdarg>
#include <cstdint>
#include <cstdio>
#include <cstring>

namespace {

using Tensor = struct Opaque*;  // a reference, which must be given back
using Value = uint64_t;         // an argument: a Tensor, an int64_t, a double or a bool

// Mirrored by `Torch` in operators.py. Those with a result return 0 if they succeed.
struct Torch {
    void (*check)(bool, const char* function, const char* file, uint32_t line, const char* message);
    int32_t (*get_data_ptr)(Tensor, void**);
    int32_t (*get_dim)(Tensor, int64_t*);
    int32_t (*get_sizes)(Tensor, int64_t**);
    int32_t (*get_dtype)(Tensor, int32_t*);
    int32_t (*is_contiguous)(Tensor, bool*);
    int32_t (*delete_tensor_object)(Tensor);
    int32_t (*library_init_impl)(const char* name, const char* key, const char* file, uint32_t line,
                                 struct Library**);
    int32_t (*library_impl)(struct Library*, const char* name,
                            void (*)(Value*, uint64_t inputs, uint64_t outputs));
    void (*operator_delete)(void*);  // of C++'s runtime
    int32_t bfloat16, float16, float32, int32, int64, uint8, float8_e4m3fn;
};

Torch torch;

template <class T>
T as(Value value) {
    T out;
    memcpy(&out, &value, sizeof out);
    return out;
}

// The tensors with which the arguments of an operator begin. They are given back with this, and
// before an error is raised: nothing here is destroyed by one.
template <int COUNT>
class Tensors {
public:
    // Which of them may be none is a bit of `optional`. What is not none is then behind a pointer.
    Tensors(Value* values, uint32_t optional) {
        for (int i = 0; i < COUNT; i++) {
            tensors_[i] = as<Tensor>(values[i]);
            if (!(optional >> i & 1) || !values[i]) continue;
            auto* holder = as<Value*>(values[i]);
            tensors_[i] = as<Tensor>(*holder);
            torch.operator_delete(holder);
        }
    }
    Tensors(const Tensors&) = delete;
    ~Tensors() { give_back(); }

    // Raises a RuntimeError.
    __attribute__((format(printf, 2, 3), noreturn)) void fail(const char* format, ...) {
        char message[512];
        va_list more;
        va_start(more, format);
        vsnprintf(message, sizeof message, format, more);
        va_end(more);
        give_back();
        torch.check(false, "vllm_nvfp4_moe", "operators.cpp", 0, message);
        __builtin_unreachable();
    }

    bool none(int i) const { return !tensors_[i]; }

    int64_t rank(int i) const {
        int64_t rank = 0;
        torch.get_dim(tensors_[i], &rank);
        return rank;
    }

    int32_t dtype(int i) const {
        int32_t dtype = 0;
        torch.get_dtype(tensors_[i], &dtype);
        return dtype;
    }

    int64_t size(int i, int dim) const {
        int64_t* sizes = nullptr;
        torch.get_sizes(tensors_[i], &sizes);
        return sizes[dim];
    }

    bool contiguous(int i) const {
        bool is = false;
        torch.is_contiguous(tensors_[i], &is);
        return is;
    }

    // Where the numbers of a tensor lie, which must be as they are wanted; null if there is none.
    template <class T, class... Sizes>
    T* data(int i, const char* name, int32_t want, Sizes... sizes) {
        if (none(i)) return nullptr;
        constexpr int RANK = sizeof...(sizes);
        const int64_t wanted[] = {int64_t(sizes)...};
        bool fits = rank(i) == RANK && dtype(i) == want && contiguous(i);
        for (int d = 0; fits && d < RANK; d++) fits = size(i, d) == wanted[d];
        if (!fits) {
            char is[96], should[96];
            spell(is, int(rank(i)), [&](int d) { return size(i, d); });
            spell(should, RANK, [&](int d) { return wanted[d]; });
            fail("%s: %s %s where %s %s in C order is taken", name, spelt(dtype(i)), is, spelt(want),
                 should);
        }
        void* at = nullptr;
        torch.get_data_ptr(tensors_[i], &at);
        return static_cast<T*>(at);
    }

    Numbers numbers(int i, const char* name) {
        const int32_t is = dtype(i);
        if (is == torch.bfloat16) return BFLOAT16;
        if (is == torch.float16) return FLOAT16;
        if (is == torch.float32) return FLOAT32;
        fail("%s: %s where bfloat16, float16 or float32 is taken", name, spelt(is));
    }

private:
    void give_back() {
        for (Tensor& tensor : tensors_) {
            if (tensor) torch.delete_tensor_object(tensor);
            tensor = nullptr;
        }
    }

    static const char* spelt(int32_t dtype) {
        const struct { int32_t dtype; const char* name; } known[] = {
            {torch.bfloat16, "bfloat16"}, {torch.float16, "float16"}, {torch.float32, "float32"},
            {torch.int32, "int32"}, {torch.int64, "int64"}, {torch.uint8, "uint8"},
            {torch.float8_e4m3fn, "float8_e4m3fn"},
        };
        for (const auto& each : known)
            if (each.dtype == dtype) return each.name;
        return "another dtype";
    }

    template <class Of>
    static void spell(char (&out)[96], int rank, const Of& of) {
        int at = snprintf(out, sizeof out, "[");
        for (int d = 0; d < rank && at < int(sizeof out) - 24; d++)
            at += snprintf(out + at, sizeof out - at, "%s%lld", d ? ", " : "", (long long)of(d));
        snprintf(out + at, sizeof out - at, "]");
    }

    Tensor tensors_[COUNT];
};

}  // namespace
