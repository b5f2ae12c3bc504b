/*
train_gpt2.cpp: GPT-2 from scratch, in one file.

It trains, evaluates and samples GPT-2 on a CPU. Every layer's forward and backward pass is written by hand, for three
attentions that share the same sixteen parameter tensors:

    vanilla   queries attend to the keys and values of their own layer                           GPT-2
    skip      in some heads, queries attend to the keys and values of an earlier layer           arXiv 2406.11274
    depth     each value is first mixed with the values of earlier layers at the same token      arXiv 2606.05014

It is not a framework: it has no automatic differentiation, no class for arrays with shapes, and no dependency but
OpenMP, and MPI to train on several machines. data_prep/prepare.py turns text into tokens. train_gpt2.cu is the same
program on a GPU: it includes this file and replaces section 4. `make && ./train_gpt2 --help` shows what it can do.

How to read it. These functions, in this order, are GPT-2 and its training. § is the section that they are in.
     1  forward                                    §2   the whole model: a transformer block is seven calls
     2  backward                                   §2   the same calls in reverse, each under the formula it inverts
     3  linear_forward, linear_backward_*          §4   y = x wᵀ + b and its three gradients, over matmul_plain
     4  layernorm_backward                         §4   a gradient through a mean and a variance
     5  attention_plain_forward, _backward         §4   softmax(q kᵀ/√HS) v in four passes; the gradient of a softmax
     6  skip_attention_backward, skip_backward     §2   gradients where two layers attend to the same keys and values
     7  depth_forward, depth_backward              §4   an attention over layers instead of positions; formulas in §2
     8  classifier                                 §2   cross-entropy and its gradient, without holding all logits
     9  adamw_update                               §4   the optimizer
    10  train_steps                                §3   the training loop
The program uses a faster matmul and attention than the plain ones: "What makes the layers fast" in section 4.

Contents
     1  utilities
     2  the model     config, tensors · what a backend supplies · what a model holds · forward · backward · attention:
                      vanilla, skip, depth · decoding · several processes · memory · the interface for program and tests
     3  the program   options · files · tokenizer · data · checkpoints · generation · training · main
     4  the layers    on a CPU, in the order of a step; what makes them fast; the machine

Dimensions have these letters. In a linear layer, C is the number of its input channels.
    B batch   T time (tokens in a sequence)   C channels   NH heads   HS = C/NH head size   L layers
    OC output channels   V vocabulary   Vp = V padded to a multiple of 128   maxT context, the longest sequence
A comment like (B, T, C) is the shape of a row-major array. dx is the gradient dloss/dx; that of o is called dout.
*/

#include <algorithm>
#include <array>
#include <atomic>
#include <bit>
#include <charconv>
#include <chrono>
#include <climits>
#include <cmath>
#include <concepts>
#include <csignal>
#include <cstdarg>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <filesystem>
#include <fstream>
#include <future>
#include <map>
#include <numeric>
#include <optional>
#include <queue>
#include <string>
#include <string_view>
#include <thread>
#include <tuple>
#include <unordered_map>
#include <utility>
#include <variant>
#include <vector>
#include <fcntl.h>
#include <glob.h>
#include <sys/file.h>
#include <sys/ioctl.h>
#include <sys/stat.h>
#include <unistd.h>
#ifdef GPT2_MPI
#include <mpi.h>
#endif

// ====================================================================================================================
// 1 · Utilities

static std::string format_list(const char* form, va_list args) {  // as vprintf does
    va_list again;
    va_copy(again, args);
    std::string text(vsnprintf(nullptr, 0, form, args), '\0');
    vsnprintf(text.data(), text.size() + 1, form, again);
    va_end(again);
    return text;
}

__attribute__((format(printf, 1, 2))) static std::string format(const char* form, ...) {
    va_list args;
    va_start(args, form);
    std::string text = format_list(form, args);
    va_end(args);
    return text;
}

// The text with its control characters as \n, \x1b or \u009b, except those in `kept`. In a name they would break up a
// message; in a text of a model they could command the terminal.
static std::string escaped(const std::string& text, const char* kept = "") {
    std::string out;
    for (size_t i = 0; i < text.size(); i++) {
        const uint8_t c = text[i], next = text.c_str()[i + 1];
        if (c == 0xc2 && next >= 0x80 && next < 0xa0) out += format("\\u%04x", next), i++;  // UTF-8 of U+0080 to U+009F
        else if ((c >= ' ' && c != 0x7f) || (c && strchr(kept, c))) out += text[i];
        else out += c == '\n' ? "\\n" : c == '\t' ? "\\t" : format("\\x%02x", c);
    }
    return out;
}

// This process's number and how many there are ("Several processes", section 2); the same of those on this machine
[[maybe_unused]] static int process = 0, processes = 1, local_process = 0, local_processes = 1;

// Prints one line that says what is wrong and how to fix it, and ends all processes with status 1.
[[noreturn, gnu::cold]] __attribute__((format(printf, 1, 2))) static void die(const char* form, ...) {
    va_list args;
    va_start(args, form);
    fflush(stdout);
    // If all meet an error, the first speaks.
    std::this_thread::sleep_for(std::chrono::milliseconds(process > 0 ? 2000 + 250 * std::min(process, 40) : 0));
    const char* over = isatty(STDERR_FILENO) ? "\r\x1b[K" : "";  // a progress line
    fprintf(stderr, "%serror: %s\n", over, escaped(format_list(form, args)).c_str());
    va_end(args);
#ifdef GPT2_MPI
    std::this_thread::sleep_for(std::chrono::milliseconds(processes > 1 ? 300 : 0));  // mpirun loses newer lines
    if (processes > 1) MPI_Abort(MPI_COMM_WORLD, 1);
#endif
    exit(1);
}

static double seconds() {  // since some fixed moment
    return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count();
}

constexpr size_t ceil_div(size_t a, size_t b) { return (a + b - 1) / b; }
constexpr size_t round_up(size_t a, size_t b) { return ceil_div(a, b) * b; }

// ====================================================================================================================
// 2 · The model
//
// Written once for both backends, as templates over X, the type of weights and activations: float or bf16. Templates
// may call functions that are defined further down; so forward and backward come first, and what they call follows.

// --------------------------------------------------------------------------------------------------------------------
// Config and tensors

enum Attention { VANILLA, SKIP, DEPTH, ATTENTIONS };
static const char* const attention_names[ATTENTIONS] = {"vanilla", "skip", "depth"};

struct Config {
    int maxT = 1024, V = 50257, Vp = 50304, L = 12, NH = 12, C = 768;  // GPT-2 (124M)
    int attention = VANILLA;
    int skip_distance = 9;  // n_l: a skipping head attends to the layer n_l below
    int skip_heads = 9;     // n_h: heads 0 .. n_h-1 skip
    int depth_stride = 6;   // s: every s-th layer is a source of those above it ...
    int depth_window = 0;   // w: ... and so are the w layers just below

    int head_size() const { return C / NH; }
};

enum Precision { FP32, BF16 };
static const char* const precision_names[] = {"fp32", "bf16"};

// What a model is created for. This decides what is allocated.
struct Workload {
    int B = 0, T = 0;        // shape of the batches that model_forward takes; 0: none
    bool train = false;      // allocate gradients and AdamW's moments, keep activations for backward
    int sequences = 0;       // number of KV caches, each for maxT tokens, that model_prefill fills; 0: none
    bool recompute = false;  // training: compute LayerNorm and GELU outputs again in backward instead of keeping them

    size_t tokens() const { return (size_t)B * T; }
};

struct AdamW {
    float lr, beta1, beta2, eps, weight_decay;
};

// min(1, clip/norm); clip 0: no limit. 0 if the norm is not finite: adamw_update then changes nothing.
constexpr float clip_scale(double norm, float clip) {
    return !(norm < INFINITY) ? 0.0f : clip > 0 && norm > clip ? (float)(clip / norm) : 1.0f;
}

// What a training step gives back.
struct StepResults {
    double loss_sum = 0, norm = 0;  // sum of the tokens' losses; norm of all gradients
    float gradient_scale = 1;       // by clip_scale
};

// The types and constants that a backend supplies, here for a CPU. train_gpt2.cu defines its own before it includes
// this file. Shared code copies values of type bf16 but does no arithmetic on them.
#ifndef GPT2_CUDA
// bf16: the upper half of a float. It has a float's range and 8 bits of precision.
struct bf16 {
    uint16_t bits;

    bf16() = default;
    bf16(float x) {  // to nearest, ties to even; NaN stays NaN
        uint32_t b = std::bit_cast<uint32_t>(x), rounded = (b + 0x7fff + (b >> 16 & 1)) >> 16;
        bits = (uint16_t)(x != x ? 0x7fc0 : rounded);
    }
    operator float() const { return std::bit_cast<float>((uint32_t)bits << 16); }
};

constexpr size_t SLOT_ALIGNMENT = 32;      // in elements: 64 bytes, a cache line, of bf16
constexpr bool ALWAYS_RECOMPUTES = true;  // on a CPU, computing LayerNorm and GELU again is cheaper than keeping them
constexpr bool COMPUTES_PADDING = false;  // logits of the vocabulary's padding: not on a CPU
constexpr size_t CLASSIFIER_LOGITS = 1 << 22;  // logits at a time: 16 MB in fp32
static size_t vocabulary_chunk = 4096;    // columns of dlogits per product for dx: 8 MB, which stay in L3 meanwhile

struct Inputs {
    int *x, *y;  // (B, T) tokens and targets
};
using Results = StepResults;  // (a GPU has them in its own memory until read_results)

// Scratch memory of the layers
struct Workspace {
    float* local;      // (threads, local_size) each thread's own
    size_t local_size;
    float* partial;    // layernorm_backward: sums over chunks of tokens
    double* squares;   // global_norm: sums over chunks of gradients
    float* dx_sum;     // bf16: linear_backward_input's sums over chunks, (rows, C)
};
#endif

// One parameter tensor: `layers` matrices of rows × cols, or vectors where cols is 1. A file holds the tensors without
// gaps; in memory each layer has a slot, of which each process owns an equal share, a multiple of SLOT_ALIGNMENT.
struct Tensor {
    const char* name;
    size_t layers, rows, cols;
    double mean, deviation;  // initial values: N(mean, deviation)
    bool decays;             // weight decay applies
    size_t offset = 0;       // of the first element among all parameters in a file
    size_t place = 0;        // of the first element in memory

    size_t layer_size() const { return rows * cols; }
    size_t size() const { return layers * rows * cols; }
    size_t stride() const { return round_up(layer_size(), SLOT_ALIGNMENT * processes); }  // from slot to slot
    size_t share() const { return stride() / processes; }
};

enum { WTE, WPE, LN1W, LN1B, QKVW, QKVB, ATTPROJW, ATTPROJB, LN2W, LN2B, FCW, FCB, FCPROJW, FCPROJB, LNFW, LNFB,
       TENSORS };
using TensorTable = std::array<Tensor, TENSORS>;

// The sixteen tensors, in the order of every file. Sizes, offsets, initial values, decay and tests all come from here.
static TensorTable tensor_table(const Config& c) {
    size_t L = c.L, C = c.C, one = 1;
    double w = 0.02, residual = 0.02 / sqrt(2.0 * c.L);  // the 2L projections into the residual stream start smaller
    TensorTable t = {{  // name, layers, rows, cols, mean, deviation, decays
        {"wte", one, (size_t)c.Vp, C, 0, w, true},       // token embedding and, transposed, the classifier
        {"wpe", one, (size_t)c.maxT, C, 0, w, true},     // position embedding
        {"ln1w", L, C, one, 1, 0, false},
        {"ln1b", L, C, one, 0, 0, false},
        {"qkvw", L, 3 * C, C, 0, w, true},               // rows: C of queries, C of keys, C of values
        {"qkvb", L, 3 * C, one, 0, 0, false},
        {"attprojw", L, C, C, 0, residual, true},
        {"attprojb", L, C, one, 0, 0, false},
        {"ln2w", L, C, one, 1, 0, false},
        {"ln2b", L, C, one, 0, 0, false},
        {"fcw", L, 4 * C, C, 0, w, true},
        {"fcb", L, 4 * C, one, 0, 0, false},
        {"fcprojw", L, C, 4 * C, 0, residual, true},
        {"fcprojb", L, C, one, 0, 0, false},
        {"lnfw", one, C, one, 1, 0, false},
        {"lnfb", one, C, one, 0, 0, false},
    }};
    for (int i = 1; i < TENSORS; i++) {
        t[i].offset = t[i - 1].offset + t[i - 1].size();
        t[i].place = t[i - 1].place + t[i - 1].layers * t[i - 1].stride();
    }
    return t;
}

// --------------------------------------------------------------------------------------------------------------------
// What a backend supplies: the layers
//
// Section 4 defines these functions for a CPU, train_gpt2.cu for a GPU. Arguments are outputs, inputs, sizes. An output
// is written (=) unless `add` is true: then it is added to (+=). It overlaps no input unless this is said. Weight
// gradients are float, all other arrays are X, where not stated otherwise. Pointers are to the device's memory; calls
// may be asynchronous, in order.
//
// A slot begins at a multiple of SLOT_ALIGNMENT elements; a row, a head or a range of columns begins at a multiple of
// the head size. Vp is a multiple of 128. Gradients start as 0, and what no function writes stays 0: gaps between
// slots, positions from T on, rows of qkvw and qkvb that are not live, rows of wte from V on. Without training,
// gradients and what backward needs (lse, h, mean, rstd, a) may be null.

// Where an array has the HS channels of each head: at(b, h, t) points to those of sequence b, head h, position t.
template <class X> struct Heads {
    X* data;
    size_t batch, head, row;  // distance from sequence to sequence, head to head, position to position

    constexpr X* at(size_t b, size_t h, size_t t) const { return data + b * batch + h * head + t * row; }
    template <std::same_as<const X> Y> constexpr operator Heads<Y>() const { return {data, batch, head, row}; }
};

// The keys and values that a layer attends to, or their gradients. Those of the first `skipping` heads are another
// layer's, the one n_l below.
template <class X> struct KeysValues {
    Heads<X> k, v, k_below = {}, v_below = {};
    int skipping = 0;

    constexpr Heads<X> keys(int h) const { return h < skipping ? k_below : k; }
    constexpr Heads<X> values(int h) const { return h < skipping ? v_below : v; }
    template <std::same_as<const X> Y> constexpr operator KeysValues<Y>() const {
        return {k, v, k_below, v_below, skipping};
    }
};

struct AttentionShape {
    int B, NH, HS;
    int queries, before;  // query i is at position before + i; there are before + queries keys
};

// x (B, T, C) = wte[token] + wpe[t]. Decoding passes wpe from its first position on.
template <class X> static void embedding_forward(X* x, const int* tokens, const X* wte, const X* wpe, size_t B,
                                                 size_t T, size_t C);
// dwte[token] += dx[b,t] (always: the classifier has written its share before); dwpe[t] = or += Σ_b dx[b,t]
template <class X> static void embedding_backward(float* dwte, float* dwpe, const X* dx, const Inputs&, size_t B,
                                                  size_t T, size_t C, bool add);

// y (rows, C) = LayerNorm(x) w + b; mean, rstd (rows): float =, or null if nobody needs them. again: the same y from x
// and the mean and rstd that an earlier call has left
template <class X> static void layernorm_forward(X* y, float* mean, float* rstd, const X* x, const X* w, const X* b,
                                                 size_t rows, size_t C, bool again = false);
// dx = or += (add_dx); dw, db = or += (add)
template <class X> static void layernorm_backward(const Workspace&, X* dx, float* dw, float* db, const X* dy,
                                                  const X* x, const X* w, const float* mean, const float* rstd,
                                                  size_t rows, size_t C, bool add_dx, bool add);

// y (rows, OC) = residual + x (rows, C) wᵀ + b, without residual or b if it is null. Rows of y and of residual begin
// ldy elements apart; y may be residual.
template <class X> static void linear_forward(const Workspace&, X* y, const X* residual, const X* x, const X* w,
                                              const X* b, size_t rows, size_t C, size_t OC, size_t ldy);
// h = x wᵀ + b, unless h is null; y = gelu(x wᵀ + b)
template <class X> static void linear_gelu_forward(const Workspace&, X* y, X* h, const X* x, const X* w, const X* b,
                                                   size_t rows, size_t C, size_t OC);
// dx (rows, C) = dy (rows, OC) w. Rows of dy begin lddy elements apart. If dy and w come in chunks, each a range
// of the OC columns of dy, the first call begins a sum in fp32 and the last one completes dx, which until then
// holds nothing or part of it; other layers may be called in between.
template <class X> static void linear_backward_input(const Workspace&, X* dx, const X* dy, const X* w, size_t rows,
                                                     size_t C, size_t OC, size_t lddy, bool first = true,
                                                     bool last = true);
// dh = (dy w) gelu'(h), where the layer's input was gelu(h); x = gelu(h) again, unless x is null
template <class X> static void linear_gelu_backward_input(const Workspace&, X* dh, X* x, const X* h, const X* dy,
                                                          const X* w, size_t rows, size_t C, size_t OC);
// dw (OC, C) = or += dyᵀ x; db (OC) = or += Σ over rows of dy, unless db is null
template <class X> static void linear_backward_weight(const Workspace&, float* dw, float* db, const X* dy, const X* x,
                                                      size_t rows, size_t C, size_t OC, size_t lddy, bool add);

// o = softmax(causal(q kᵀ/√HS)) v in each head; lse (B, NH, queries): float, the scores' log-sum-exp, or null
template <class X> static void attention_forward(const Workspace&, Heads<X> o, float* lse, Heads<const X> q,
                                                 const KeysValues<const X>& kv, const AttentionShape&);
// dq, dk, dv =. DKV, the type of dk and dv, is X or float. dk and dv of skipping heads go to the layer below's.
// `before` is 0.
template <class X, class DKV> static void attention_backward(const Workspace&, Heads<X> dq, const KeysValues<DKV>& dkv,
                                                             Heads<const X> dout, Heads<const X> o, const float* lse,
                                                             Heads<const X> q, const KeysValues<const X>& kv,
                                                             const AttentionShape&);
// dk, dv of layer l in dqkv (rows, 3C) = the sum of two layers' shares, float (rows, 2C). own: layer l's, in heads that
// do not skip in layer l. above: layer l + n_l's, in heads h < n_h, or null. Heads without a share are not written.
template <class X> static void skip_backward(X* dqkv, const float* own, const float* above, const Config&, int l,
                                             size_t rows);
// v = ṽ, in place; a (B, queries, |S|+1, NH): float =. Layer j's v and k lie (j - l)·layer_stride from layer l's. l ≥ 1
template <class X> static void depth_forward(const Workspace&, Heads<X> v, float* a, Heads<const X> q,
                                             Heads<const X> k, ptrdiff_t layer_stride, const Config&, int l,
                                             const AttentionShape&);
// dqkv (rows, 3C): dq +=, dk and dv =. dkv (rows, 2C), float: the dk and dṽ that attention_backward left. qkv is layer
// l's, and dṽ_l takes the place of ṽ_l in it; layer j's lies (j - l)·layer_stride elements from it. ds (rows, |S|, NH)
// =. a and ds are layer l's, and layer l+1's lie behind them; layer 0 has none, so for l = 0 they are layer 1's.
template <class X> static void depth_backward(const Workspace&, X* dqkv, const float* dkv, float* ds, const float* a,
                                              X* qkv, ptrdiff_t layer_stride, const Config&, int l, size_t rows);
// k, v of the new positions in the cache = new_k, new_v (B, queries), for heads from first_head on
template <class X> static void cache_append(Heads<X> k, Heads<X> v, Heads<const X> new_k, Heads<const X> new_v,
                                            int first_head, const AttentionShape&);

// losses (rows): float, = -log softmax(logits)[target] over the first V columns of logits (rows, Vp). Unless
// gradient_scale is 0: logits = the gradients of gradient_scale · Σ losses, 0 in columns that are computed padding
template <class X> static void softmax_cross_entropy(float* losses, X* logits, const int* targets, size_t rows,
                                                     size_t V, size_t Vp, float gradient_scale);
// logits (rows, V), in the host's memory, = x wteᵀ in fp32. Synchronizes.
template <class X> static void logits_forward(const Workspace&, float* logits, const X* x, const X* wte, size_t rows,
                                              size_t C, size_t V, size_t Vp);

// loss_sum = or += Σ losses (n)
static void sum_losses(Results&, const float* losses, size_t n, bool add);
// norm of g (n), and gradient_scale = clip_scale(norm, clip)
static void global_norm(const Workspace&, Results&, const float* g, size_t n, float clip);
// One AdamW step of w, m, v (n) with gradients gradient_scale · g; then working = w rounded to X. The corrections are
// 1/(1-β1^step) and 1/(1-β2^step).
template <class X> static void adamw_update(X* working, float* w, float* m, float* v, const float* g, size_t n,
                                            const AdamW&, float decay, const Results&, float m_correction,
                                            float v_correction);
template <class X> static void round_weights(X* working, const float* w, size_t n);  // working = w rounded to X
static StepResults read_results(Results&);                                           // synchronizes

// --------------------------------------------------------------------------------------------------------------------
// What a model holds

// An array with a slot for each layer. If there are fewer slots than layers, layers take turns.
template <class X> struct Slots {
    X* data = nullptr;
    size_t stride = 0, count = 1;  // distance from slot to slot; number of slots

    X* operator[](size_t i) const { return data + i % count * stride; }
};

struct Memory {  // bytes
    size_t parameters = 0, gradients = 0, moments = 0, activations = 0, cache = 0, scratch = 0;
    size_t total() const { return parameters + gradients + moments + activations + cache + scratch; }
};

static void* device_allocate(size_t bytes, bool zero);  // these two are a backend's; exits if there is not enough
static void copy_to_device(void* to, const void* from, size_t bytes);  // synchronizes

// Gives a model its memory and counts it.
struct Allocator {
    bool dry;  // only count
    Memory memory = {};
    std::vector<void*> blocks = {};

    template <class T> void take(T*& p, size_t n, size_t Memory::*purpose, bool zero = false) {
        memory.*purpose += n * sizeof(T);
        p = dry || n == 0 ? nullptr : (T*)device_allocate(n * sizeof(T), zero);
        if (p) blocks.push_back(p);
    }
    template <class T> void take(Slots<T>& slots, size_t count, size_t n, size_t Memory::*purpose) {
        slots.count = std::max<size_t>(1, count);
        slots.stride = round_up(n, SLOT_ALIGNMENT);
        take(slots.data, count * slots.stride, purpose);
    }
};

// The part of a model that does not depend on the type of weights and activations
struct Model {
    Config config;
    int precision;  // FP32 or BF16
    Workload work;
    TensorTable tensors;
    Allocator allocator;
    Workspace ws;
    Inputs inputs;
    Results results;
    float *parameters, *gradients;  // where tensors[i].place says
    float *moment1, *moment2, *own_gradients;  // of this process's shares only: that of a slot lies at slot/processes
    float* received;              // in reduce_gradients: (processes, share) of a slot
    int accumulated;              // backward passes since the last update
    size_t loss_count;            // tokens in results.loss_sum
    Slots<float> ln_mean, ln_rstd;  // (2L+1, B, T) LayerNorm 2l is before layer l's attention, 2l+1 before its MLP
    Slots<float> lse;             // (L, B, NH, T) attention's log-sum-exp
    float *a, *ds;                // depth: (B, T, |S_l|+1, NH) and (B, T, |S_l|, NH), |S_l| sources, by depth_place
    float* losses;                // (B, T)
    float* dkv;                   // skip, depth: (B, T, 2C) dk, dv of a layer before other layers' are added
    Slots<float> skip_dkv;        // (skip_slots, B, T, 2C) ring buffer of dk, dv passed down to lower layers
    size_t cache_length;          // positions filled, the same of each sequence
    std::vector<size_t> cache_place;  // (L) where each layer's part of the cache begins
    int* new_tokens;              // decoding, of the new tokens: (sequences · maxT)
    float* new_a;                 // depth's a, of one layer

    bool recomputes() const { return ALWAYS_RECOMPUTES || work.recompute; }
};

// X is float or bf16. Training keeps the activations of all layers, except ln and fch_gelu if the model recomputes()
// these: then they have one slot, which backward fills again.
template <class X> struct ModelOf : Model {
    X* weights;                   // the working copy of the parameters; the parameters themselves if X is float
    Slots<X> residual;            // (2L+1, B, T, C) the residual stream before each attention and MLP, and the last
    Slots<X> ln;                  // (2L+1, B, T, C) output of each LayerNorm
    Slots<X> qkv;                 // (L, B, T, 3C)   depth: ṽ in place of v, and after backward dṽ
    Slots<X> atty;                // (L, B, T, C)    attention's output
    Slots<X> fch, fch_gelu;       // (L, B, T, 4C)   the MLP's hidden layer before and after GELU
    X* logits;                    // (classifier_rows, Vp)
    X *dresidual, *dln, *datty;   // (B, T, C)
    X *dqkv, *dfch;               // (B, T, 3C), (B, T, 4C)
    X* cache;                     // L × (sequences, 2, heads that are cached, maxT, HS): keys and (mixed) values
    X *new_x, *new_ln, *new_atty, *new_qkv, *new_fch;  // decoding, of the new tokens: (sequences · maxT, C), 3C, 4C

    X* weight(int tensor, int l = 0) const { return weights + tensors[tensor].place + l * tensors[tensor].stride(); }
    float* gradient(int tensor, int l = 0) const {
        return gradients + tensors[tensor].place + l * tensors[tensor].stride();
    }
};

// --------------------------------------------------------------------------------------------------------------------
// The model: forward
//
// Pre-LayerNorm GPT-2. x is the residual stream, (B, T, C):
//     x = wte[token] + wpe[t]
//     in each block:
//         x += attention(LayerNorm(x)) attprojwᵀ + attprojb
//         x += gelu(LayerNorm(x) fcwᵀ + fcb) fcprojwᵀ + fcprojb
//     logits = LayerNorm(x) wteᵀ
//
// Adds the losses of the batch in m.inputs to m.results. With `train` this also begins the backward pass, since the
// classifier never holds all logits: it computes the gradients of its input, m.dln, and of wte along with the loss, for
// loss_scale · (mean loss of the batch).
template <class X> static void forward(ModelOf<X>& m, bool train, float loss_scale) {
    const Config& c = m.config;
    const Workspace& ws = m.ws;
    const size_t B = m.work.B, T = m.work.T, BT = B * T, C = c.C;

    embedding_forward(m.residual[0], m.inputs.x, m.weight(WTE), m.weight(WPE), B, T, C);
    for (int l = 0; l < c.L; l++) {
        auto w = [&](int tensor) { return m.weight(tensor, l); };
        const int i = 2 * l, j = i + 1;  // LayerNorm and residual stream before attention, before the MLP
        X *x = m.residual[i], *x2 = m.residual[j], *x3 = m.residual[j + 1], *ln1 = m.ln[i], *ln2 = m.ln[j];
        X *qkv = m.qkv[l], *atty = m.atty[l], *fch = m.fch[l], *fch_gelu = m.fch_gelu[l];

        layernorm_forward(ln1, m.ln_mean[i], m.ln_rstd[i], x, w(LN1W), w(LN1B), BT, C);
        qkv_forward(m, l, qkv, ln1, BT);
        attend_forward(m, l, atty);
        linear_forward(ws, x2, x, atty, w(ATTPROJW), w(ATTPROJB), BT, C, C, C);
        layernorm_forward(ln2, m.ln_mean[j], m.ln_rstd[j], x2, w(LN2W), w(LN2B), BT, C);
        linear_gelu_forward(ws, fch_gelu, fch, ln2, w(FCW), w(FCB), BT, C, 4 * C);
        linear_forward(ws, x3, x2, fch_gelu, w(FCPROJW), w(FCPROJB), BT, 4 * C, C, C);
    }
    const int last = 2 * c.L;
    layernorm_forward(m.ln[last], m.ln_mean[last], m.ln_rstd[last], m.residual[last], m.weight(LNFW), m.weight(LNFB),
                      BT, C);
    classifier(m, m.ln[last], train ? loss_scale / BT : 0);
    sum_losses(m.results, m.losses, BT, m.loss_count > 0);
    m.loss_count += BT;
}

// --------------------------------------------------------------------------------------------------------------------
// The model: backward
//
// The chain rule, from the loss down: forward's calls in reverse. A block computes x2 = x + f(x), so dx = dx2 + (the
// gradient through f). One array holds dx3, dx2 and dx in turn: what flows past a branch stays there, and the branch's
// LayerNorm adds to it. The classifier has left the gradient of its input in dln. `reduces`: calls reduce_gradients.
template <class X> static void backward(ModelOf<X>& m, bool reduces) {
    const Config& c = m.config;
    const Workspace& ws = m.ws;
    const size_t B = m.work.B, T = m.work.T, BT = B * T, C = c.C;
    const bool add = m.accumulated > 0;     // to the gradients of earlier micro-batches
    const bool recompute = m.recomputes();  // fch_gelu, ln2 and ln1 were not kept: compute each again before its use
    const int last = 2 * c.L;
    X *dx = m.dresidual, *dln = m.dln;

    layernorm_backward(ws, dx, m.gradient(LNFW), m.gradient(LNFB), dln, m.residual[last], m.weight(LNFW),
                       m.ln_mean[last], m.ln_rstd[last], BT, C, false, add);
    for (int l = c.L - 1; l >= 0; l--) {
        auto w = [&](int tensor) { return m.weight(tensor, l); };
        auto d = [&](int tensor) { return m.gradient(tensor, l); };
        const int i = 2 * l, j = i + 1;
        X *x = m.residual[i], *x2 = m.residual[j], *ln1 = m.ln[i], *ln2 = m.ln[j];
        X *atty = m.atty[l], *fch = m.fch[l], *fch_gelu = m.fch_gelu[l];

        // x3 = x2 + fch_gelu fcprojwᵀ + fcprojb,  fch_gelu = gelu(fch)
        linear_gelu_backward_input(ws, m.dfch, recompute ? fch_gelu : nullptr, fch, dx, w(FCPROJW), BT, 4 * C, C);
        linear_backward_weight(ws, d(FCPROJW), d(FCPROJB), dx, fch_gelu, BT, 4 * C, C, C, add);
        // fch = ln2 fcwᵀ + fcb
        if (recompute) layernorm_forward(ln2, m.ln_mean[j], m.ln_rstd[j], x2, w(LN2W), w(LN2B), BT, C, true);
        linear_backward_input(ws, dln, m.dfch, w(FCW), BT, C, 4 * C, 4 * C);
        linear_backward_weight(ws, d(FCW), d(FCB), m.dfch, ln2, BT, C, 4 * C, 4 * C, add);
        // ln2 = layernorm(x2); dx3 becomes dx2
        layernorm_backward(ws, dx, d(LN2W), d(LN2B), dln, x2, w(LN2W), m.ln_mean[j], m.ln_rstd[j], BT, C, true, add);
        // x2 = x + atty attprojwᵀ + attprojb
        linear_backward_input(ws, m.datty, dx, w(ATTPROJW), BT, C, C, C);
        linear_backward_weight(ws, d(ATTPROJW), d(ATTPROJB), dx, atty, BT, C, C, C, add);
        // atty = attention(qkv)
        attend_backward(m, l);
        // qkv = ln1 qkvwᵀ + qkvb
        if (recompute) layernorm_forward(ln1, m.ln_mean[i], m.ln_rstd[i], x, w(LN1W), w(LN1B), BT, C, true);
        qkv_backward(m, l, ln1, add);
        // ln1 = layernorm(x); dx2 becomes dx
        layernorm_backward(ws, dx, d(LN1W), d(LN1B), dln, x, w(LN1W), m.ln_mean[i], m.ln_rstd[i], BT, C, true, add);
        if (reduces) reduce_gradients(m, l);
    }
    embedding_backward(m.gradient(WTE), m.gradient(WPE), dx, m.inputs, B, T, C, add);
    if (reduces) reduce_gradients(m, -1);
    m.accumulated++;
}

// AdamW, with gradients scaled by min(1, clip/norm). Step 1 is the first. Of several processes, each updates its shares
// (ZeRO's first stage: Rajbhandari et al., arXiv 1910.02054).
template <class X> static void update(ModelOf<X>& m, const AdamW& a, float clip, int step) {
    const float m_correction = (float)(1.0 / (1.0 - pow(a.beta1, step)));
    const float v_correction = (float)(1.0 / (1.0 - pow(a.beta2, step)));
    global_norm(m.ws, m.results, m.own_gradients, allocated_parameters(m.tensors) / processes, clip);  // gaps hold 0
    for (const Tensor& t : m.tensors) {
        const size_t n = processes == 1 ? t.layers * t.stride() : t.share();  // of one process, all layers at once
        for (size_t slot = t.place; slot < t.place + t.layers * t.stride(); slot += n * processes) {
            const size_t share = slot + process * n, own = slot / processes;
            adamw_update(m.weights + share, m.parameters + share, m.moment1 + own, m.moment2 + own,
                         m.own_gradients + own, n, a, t.decays ? a.weight_decay : 0.0f, m.results, m_correction,
                         v_correction);
        }
    }
    if (processes > 1) gather_weights(m);
    m.accumulated = 0;
}

// --------------------------------------------------------------------------------------------------------------------
// Classifier: logits = x wteᵀ, loss = -log softmax(logits)[target]
//
// A few hundred tokens at a time (classifier_rows) go all the way to the gradients of x and wte, so logits for all B·T
// tokens never exist at once. With p = softmax(logits), loss = log Σ e^logit - logit_target, so dlogits = p, less 1 at
// the target. The vocabulary's padding, columns V to Vp, gets no probability, and its rows of wte get no gradient.

static size_t classifier_rows_least = 512, classifier_logits_most = CLASSIFIER_LOGITS;  // (the tests make them small)
// Tokens at a time: enough that reading wte costs little beside the arithmetic, few enough to keep the logits small
static size_t classifier_rows(size_t rows, size_t Vp) {
    size_t most = std::max(classifier_rows_least, classifier_logits_most / Vp);
    return rows == 0 ? 0 : ceil_div(rows, ceil_div(rows, most));
}

template <class X> static void classifier(ModelOf<X>& m, const X* x, float gradient_scale) {
    const Config& c = m.config;
    const size_t C = c.C, V = COMPUTES_PADDING ? c.Vp : c.V;
    const size_t rows = m.work.tokens(), at_once = classifier_rows(rows, c.Vp);
    const bool add = m.accumulated > 0;
    const X* wte = m.weight(WTE);
    for (size_t r = 0; r < rows; r += at_once) {
        const size_t n = std::min(rows - r, at_once);
        const X* x_r = x + r * C;
        linear_forward<X>(m.ws, m.logits, nullptr, x_r, wte, nullptr, n, C, V, c.Vp);
        softmax_cross_entropy(m.losses + r, m.logits, m.inputs.y + r, n, c.V, c.Vp, gradient_scale);
        if (gradient_scale == 0) continue;
        for (size_t v = 0; v < V; v += vocabulary_chunk)
            linear_backward_input(m.ws, m.dln + r * C, m.logits + v, wte + v * C, n, C,
                                  std::min(V - v, vocabulary_chunk), c.Vp, v == 0, v + vocabulary_chunk >= V);
        linear_backward_weight<X>(m.ws, m.gradient(WTE), nullptr, m.logits, x_r, n, C, V, c.Vp, add || r > 0);
    }
}

// --------------------------------------------------------------------------------------------------------------------
// Vanilla attention, and where the three differ
//
// All of them project qkv = ln1 qkvwᵀ + qkvb, and end in o = softmax(causal(q kᵀ/√HS)) v in each head. They differ in
// which k and v stand there. Training finds k and v in qkv, decoding in the cache; attend() serves both.

// qkv (rows, 3C) = x qkvwᵀ + qkvb, in the columns that some layer needs (with skip, not all)
template <class X> static void qkv_forward(ModelOf<X>& m, int l, X* qkv, const X* x, size_t rows) {
    const size_t C = m.config.C;
    const X *w = m.weight(QKVW, l), *b = m.weight(QKVB, l);
    for_live_columns(m, l, [&](size_t at, size_t count, bool, bool) {
        linear_forward<X>(m.ws, qkv + at, nullptr, x, w + at * C, b + at, rows, C, count, 3 * C);
    });
}

// m.dln = dqkv qkvw; the gradients of qkvw and qkvb = or +=, except in rows of columns that no layer needs: these keep
// gradient 0. x is what qkv_forward was given.
template <class X> static void qkv_backward(ModelOf<X>& m, int l, const X* x, bool add) {
    const size_t C = m.config.C, BT = m.work.tokens();
    for_live_columns(m, l, [&](size_t at, size_t count, bool first, bool last) {
        linear_backward_input(m.ws, m.dln, m.dqkv + at, m.weight(QKVW, l) + at * C, BT, C, count, 3 * C, first, last);
        linear_backward_weight(m.ws, m.gradient(QKVW, l) + at * C, m.gradient(QKVB, l) + at, m.dqkv + at, x, BT, C,
                               count, 3 * C, add);
    });
}

// Part 0, 1 or 2 of an array (B, T, parts, C): in qkv, these are queries, keys and values
template <class X> static Heads<X> heads(X* data, int part, int parts, const Config& c, size_t T) {
    const size_t C = c.C;
    return {data + part * C, T * parts * C, (size_t)c.head_size(), parts * C};
}

static AttentionShape training_shape(const Model& m) {
    return {.B = m.work.B, .NH = m.config.NH, .HS = m.config.head_size(), .queries = m.work.T, .before = 0};
}

// The last two parts of such an array: in qkv (B, T, 3C), or with parts = 2 in an array (B, T, 2C) of keys and values
template <class X> static KeysValues<X> keys_values(X* data, int parts, const Config& c, size_t T) {
    return {heads(data, parts - 2, parts, c, T), heads(data, parts - 1, parts, c, T)};
}

// o (B, queries, C) = attention of layer l with queries q. kv_of(j) gives the keys and values of layer j; depth needs
// them layer_stride elements apart from layer to layer. a is depth_forward's.
template <class X>
static void attend(ModelOf<X>& m, int l, X* o, float* lse, float* a, Heads<X> q, auto kv_of, ptrdiff_t layer_stride,
                   const AttentionShape& s) {
    const Config& c = m.config;
    const KeysValues<X> kv = c.attention == SKIP ? skip_keys_values(c, l, kv_of) : kv_of(l);
    if (c.attention == DEPTH && l > 0) depth_forward<X>(m.ws, kv.v, a, q, kv.k, layer_stride, c, l, s);
    attention_forward<X>(m.ws, heads(o, 0, 1, c, s.queries), lse, q, kv, s);
}

template <class X> static void attend_forward(ModelOf<X>& m, int l, X* o) {
    const Config& c = m.config;
    const int T = m.work.T;
    attend(m, l, o, m.lse[l], m.a + depth_place(m, l, 1), heads(m.qkv[l], 0, 3, c, T),
           [&](int j) { return keys_values(m.qkv[j], 3, c, T); }, m.qkv.stride, training_shape(m));
}

// From do in m.datty: dq, written to m.dqkv, and dk and dv, written to dkv. kv is what layer l attended to.
template <class X, class DKV>
static void attention_gradients(ModelOf<X>& m, int l, const KeysValues<DKV>& dkv, const KeysValues<X>& kv) {
    const Config& c = m.config;
    const int T = m.work.T;
    attention_backward<X, DKV>(m.ws, heads(m.dqkv, 0, 3, c, T), dkv, heads(m.datty, 0, 1, c, T),
                               heads(m.atty[l], 0, 1, c, T), m.lse[l], heads(m.qkv[l], 0, 3, c, T), kv,
                               training_shape(m));
}

template <class X> static void attend_backward(ModelOf<X>& m, int l) {
    const Config& c = m.config;
    if (c.attention == SKIP) return skip_attention_backward(m, l);
    if (c.attention == DEPTH) return depth_attention_backward(m, l);
    attention_gradients(m, l, keys_values(m.dqkv, 3, c, m.work.T), keys_values(m.qkv[l], 3, c, m.work.T));
}

// --------------------------------------------------------------------------------------------------------------------
// Skip-Layer Attention
//
// With n_l = skip_distance and n_h = skip_heads: in heads h < n_h of layers l ≥ n_l, queries attend to k_{l-n_l} and
// v_{l-n_l} of the same head in place of k_l and v_l. For n_l = 2:
//
//                    heads h < n_h       heads h ≥ n_h
//     layer 3        q                   q ──► k v
//                    └────────┐
//     layer 2        q        │          q ──► k v         k and v of layers 2 and 3 have no reader in heads h < n_h:
//                    └──────┐ │                            they are neither projected nor cached
//     layer 1        q ──► k v◄          q ──► k v
//     layer 0        q ──► k v◄          q ──► k v         k and v of layers 0 and 1 have two: layers l and l + n_l
//
// Backward. A head's k and v get a gradient from each layer that attends to them. Backward goes down, so layer l + n_l
// comes first: it writes its dk and dv of heads h < n_h, in fp32, to the ring buffer skip_dkv, whose slot
// l mod skip_slots belongs to layer l until layer l has used it. When backward reaches layer l, it writes the dk and dv
// of the heads that attend to layer l itself (h ≥ n_h; all heads, if l < n_l) to dkv, and skip_backward adds the two.

// Does head h of layer l skip?
static bool skips(const Config& c, int l, int h) {
    return c.attention == SKIP && h < c.skip_heads && l >= c.skip_distance;
}

static int skipping_heads(const Config& c, int l) { return skips(c, l, 0) ? c.skip_heads : 0; }

static bool is_skipped_to(const Config& c, int l) {  // by layer l + n_l
    return c.attention == SKIP && c.skip_heads > 0 && l + c.skip_distance < c.L;
}

// Slots of the ring buffer. Layer l writes to layer l - n_l's slot before it reads its own, and the layers in between
// still wait for theirs: n_l + 1. But no more than L - n_l layers are skipped to.
static size_t skip_slots(const Config& c) {
    return is_skipped_to(c, 0) ? std::min(c.skip_distance + 1, c.L - c.skip_distance) : 0;
}

// First head whose keys and values some layer attends to
static int first_live_head(const Config& c, int l) { return is_skipped_to(c, l) ? 0 : skipping_heads(c, l); }

static size_t kv_channels(const Config& c, int l) { return c.C - first_live_head(c, l) * c.head_size(); }

// Calls f(at, count, first, last) for each range of qkv's columns that is projected.
static void for_live_columns(const Model& m, int l, auto f) {
    const size_t C = m.config.C, kvC = kv_channels(m.config, l);
    if (kvC == C) return f(0, 3 * C, true, true);
    f(0, C, true, kvC == 0);
    if (kvC == 0) return;
    f(2 * C - kvC, kvC, false, false);
    f(3 * C - kvC, kvC, false, true);
}

// Is dx of the qkv projection a sum of chunks, of (B, T, C), in some layer? If in any, then in the last.
static bool has_chunks(const Config& c) { return kv_channels(c, c.L - 1) < (size_t)c.C; }

// The keys and values that layer l attends to, or their gradients, from those of each layer j, kv_of(j)
static auto skip_keys_values(const Config& c, int l, auto kv_of) {
    auto kv = kv_of(l), below = skips(c, l, 0) ? kv_of(l - c.skip_distance) : kv;
    return decltype(kv){kv.k, kv.v, below.k, below.v, skipping_heads(c, l)};
}

// dk and dv of a head are the sum of up to two layers' shares. If there is only the layer's own, it goes straight to
// m.dqkv. The shares of heads that skip go to layer l - n_l.
template <class X> static void skip_attention_backward(ModelOf<X>& m, int l) {
    const Config& c = m.config;
    const int T = m.work.T;
    auto kv_of = [&](int j) { return keys_values(m.qkv[j], 3, c, T); };
    auto dkv_of = [&](int j) { return keys_values(j == l ? m.dkv : m.skip_dkv[j], 2, c, T); };
    if (!is_skipped_to(c, l) && !skips(c, l, 0))  // no other layer has a share in dk and dv
        return attention_gradients(m, l, keys_values(m.dqkv, 3, c, T), kv_of(l));
    attention_gradients(m, l, skip_keys_values(c, l, dkv_of), skip_keys_values(c, l, kv_of));
    skip_backward(m.dqkv, m.dkv, is_skipped_to(c, l) ? m.skip_dkv[l] : nullptr, c, l, m.work.tokens());
}

// --------------------------------------------------------------------------------------------------------------------
// Depth-Attention
//
// With s = depth_stride and w = depth_window, layer l has the sources S_l = { j < l : j mod s = 0 or j ≥ l - w }.
// Before attention, at each token separately, its values are mixed with those of its sources, in each head:
//
//     a = softmax over j in S_l and l itself of q_l·k_j/√HS      ṽ_l = Σ_{j in S_l} a_j ṽ_j + a_l v_l      ṽ_0 = v_0
//
//     layer 3        q ──► k ṽ ◄─┬────┐     For s = 2, w = 0: S_1 = S_2 = {0}, S_3 = {0, 2}.
//                                │    │     ṽ_l replaces v_l in qkv and in the cache, which is no larger than
//     layer 2        q ──► k ṽ ──┘◄───┤     vanilla's. Layer 3 mixes the ṽ_2 that layer 2 attended to, not v_2.
//                                     │
//     layer 1        q ──► k ṽ ◄──────┤
//                                     │
//     layer 0        q ──► k v ───────┘
//
// Backward, given dṽ_l. ṽ_l is a softmax-weighted mean of x_j = ṽ_j (j in S_l) and x_l = v_l. As for attention's
// softmax (derived in section 4, attention_plain_backward), with j over S_l and l,
//     da_j = dṽ_l·x_j       ds_j = a_j (da_j - δ)       δ = Σ_j a_j da_j = dṽ_l·ṽ_l
//     dq_l += Σ_j ds_j k_j/√HS       dk_j += ds_j q_l/√HS       dṽ_j += a_j dṽ_l       dv_l = a_l dṽ_l
// The layer's own ds_l would take v_l, which ṽ_l has overwritten; but Σ_j ds_j = 0, so ds_l = -Σ_{j in S_l} ds_j.
// dṽ_l comes from layer l's attention and from every layer m above with l in S_m. Instead of scattering, layer l
// gathers when its turn comes:
//     dk_l += Σ_m ds_{m,l} q_m/√HS       dṽ_l += Σ_m a_{m,l} dṽ_m
// from what each layer m has left: a, ds, q_m, and dṽ_m, in qkv in the place of ṽ_m, which no lower layer needs.

// S_l in increasing order: 0, s, 2s, ... below `near`, then near, near+1, ..., l-1
struct DepthSources {
    int l, stride, near, strided;  // strided: how many sources lie below `near`

    constexpr DepthSources(int l_, int s, int w)
        : l(l_), stride(s), near(w < l_ ? l_ - w : 0), strided((near + s - 1) / s) {}
    constexpr int count() const { return strided + l - near; }
    constexpr int operator[](int n) const { return n < strided ? n * stride : near + n - strided; }  // count(): l
    constexpr int index(int j) const { return j < near ? j / stride : strided + j - near; }  // of source j
};
static DepthSources depth_sources(const Config& c, int l) { return {l, c.depth_stride, c.depth_window}; }
static int depth_source_count(const Config& c, int l) { return c.attention == DEPTH ? depth_sources(c, l).count() : 0; }

// Layers l+1 .. last_depth_reader have l among their sources.
static int last_depth_reader(const Config& c, int l) {
    return l % c.depth_stride == 0 ? c.L - 1 : std::min(c.L - 1, l + c.depth_window);
}

// Elements of an array (rows, n, NH) in the slot of one layer
constexpr size_t depth_slot(size_t rows, size_t n, size_t NH) { return round_up(rows * n * NH, SLOT_ALIGNMENT); }

// Where layer l's a (own = 1) or ds (own = 0) begins: behind the (B, T, |S_j| + own, NH) of layers 1 ≤ j < l
static size_t depth_place(const Model& m, int l, int own) {
    const Config& c = m.config;
    size_t place = 0;
    for (int j = 1; j < l && c.attention == DEPTH; j++)
        place += depth_slot(m.work.tokens(), depth_source_count(c, j) + own, c.NH);
    return place;
}

template <class X> static void depth_attention_backward(ModelOf<X>& m, int l) {
    const Config& c = m.config;
    attention_gradients(m, l, keys_values(m.dkv, 2, c, m.work.T), keys_values(m.qkv[l], 3, c, m.work.T));
    depth_backward(m.ws, m.dqkv, m.dkv, m.ds + depth_place(m, l, 0), m.a + depth_place(m, l, 1), m.qkv[l],
                   m.qkv.stride, c, l, m.work.tokens());
}

// --------------------------------------------------------------------------------------------------------------------
// Decoding with a KV cache
//
// The same layers, for new tokens alone: their keys and (mixed) values join the cache, their queries attend to all of
// it. In the cache each head's keys lie together, as do its values, since attention reads them so.

// The keys and values of layer j in the cache, which begin with the first live head's. So k points before the layer's
// part of the cache if heads before that are not cached.
template <class X> static KeysValues<X> cached_keys_values(const ModelOf<X>& m, int j) {
    const Config& c = m.config;
    const size_t HS = c.head_size(), head = c.maxT * HS, first = first_live_head(c, j), kept = c.NH - first;
    X* k = m.cache + m.cache_place[j] - first * head;
    return {{k, 2 * kept * head, head, HS}, {k + kept * head, 2 * kept * head, head, HS}};
}

// Appends n tokens to each sequence; tokens (sequences, n), logits (sequences, V) after the last of them
template <class X> static void decode(ModelOf<X>& m, const int* tokens, int n, float* logits) {
    const Config& c = m.config;
    const Workspace& ws = m.ws;
    const size_t B = m.work.sequences, rows = B * n, C = c.C, before = m.cache_length;
    const AttentionShape s = {(int)B, c.NH, c.head_size(), n, (int)before};
    X *x = m.new_x, *ln = m.new_ln, *qkv = m.new_qkv, *atty = m.new_atty, *fch = m.new_fch;
    const ptrdiff_t layer_stride = c.L > 1 ? m.cache_place[1] : 0;  // of the cache, for depth

    copy_to_device(m.new_tokens, tokens, rows * sizeof(int));
    embedding_forward(x, m.new_tokens, m.weight(WTE), m.weight(WPE) + before * C, B, n, C);
    for (int l = 0; l < c.L; l++) {
        auto w = [&](int tensor) { return m.weight(tensor, l); };
        const KeysValues<X> kv = cached_keys_values(m, l), new_kv = keys_values(qkv, 3, c, n);
        layernorm_forward(ln, nullptr, nullptr, x, w(LN1W), w(LN1B), rows, C);
        qkv_forward(m, l, qkv, ln, rows);
        cache_append<X>(kv.k, kv.v, new_kv.k, new_kv.v, first_live_head(c, l), s);
        attend(m, l, atty, nullptr, m.new_a, heads(qkv, 0, 3, c, n),
               [&](int j) { return cached_keys_values(m, j); }, layer_stride, s);
        linear_forward(ws, x, x, atty, w(ATTPROJW), w(ATTPROJB), rows, C, C, C);
        layernorm_forward(ln, nullptr, nullptr, x, w(LN2W), w(LN2B), rows, C);
        linear_gelu_forward<X>(ws, fch, nullptr, ln, w(FCW), w(FCB), rows, C, 4 * C);
        linear_forward(ws, x, x, fch, w(FCPROJW), w(FCPROJB), rows, 4 * C, C, C);
    }
    m.cache_length += n;
    for (size_t b = 0; b < B; b++)  // of each sequence, the last token alone
        layernorm_forward(ln + b * C, nullptr, nullptr, x + (b * n + n - 1) * C, m.weight(LNFW), m.weight(LNFB), 1, C);
    logits_forward(ws, logits, ln, m.weight(WTE), B, C, c.V, c.Vp);
}

// --------------------------------------------------------------------------------------------------------------------
// Several processes
//
// mpirun or srun starts them. In a step, each computes its share of micro-batches, they sum up their gradients, each
// updates its share of the parameters, and they exchange them. They talk through MPI, GPUs through NCCL. All sums are
// in a fixed order, so they repeat to the bit. Only process 0 writes files and to standard output.

#ifdef GPT2_MPI
static const char* const mpi = ", MPI";
static MPI_Comm local_world;  // the processes on this machine
static void join_processes() {
    int level = 0;
    MPI_Init_thread(nullptr, nullptr, MPI_THREAD_SERIALIZED, &level);
    MPI_Comm_rank(MPI_COMM_WORLD, &process);
    MPI_Comm_size(MPI_COMM_WORLD, &processes);
    MPI_Comm_split_type(MPI_COMM_WORLD, MPI_COMM_TYPE_SHARED, process, MPI_INFO_NULL, &local_world);
    MPI_Comm_rank(local_world, &local_process);
    MPI_Comm_size(local_world, &local_processes);
    if (level < MPI_THREAD_SERIALIZED) die("this MPI was built without MPI_THREAD_SERIALIZED, which is needed here");
    if (process > 0 && !freopen("/dev/null", "w", stdout)) die("/dev/null: %s", strerror(errno));
    atexit([] { MPI_Finalize(); });
}
static double sum_all(double x) {  // over processes
    if (processes == 1) return x;
    std::vector<double> all(processes);
    MPI_Allgather(&x, 1, MPI_DOUBLE, all.data(), 1, MPI_DOUBLE, MPI_COMM_WORLD);
    return std::accumulate(all.begin(), all.end(), 0.0);
}
static void sum_in_process_0(uint32_t* x, size_t n) {  // of integers, so the order does not matter
    if (processes > 1) MPI_Reduce(process == 0 ? MPI_IN_PLACE : x, x, n, MPI_UINT32_T, MPI_SUM, 0, MPI_COMM_WORLD);
}
// Calls f(t, slot) for each slot in memory of layer l, or with l = -1 of the tensors that no layer has.
static void for_slots(const TensorTable& tensors, int l, auto f) {
    for (int i = 0; i < TENSORS; i++) {
        const bool in_layer = i > WPE && i < LNFW;
        if (in_layer == (l >= 0)) f(tensors[i], tensors[i].place + std::max(l, 0) * tensors[i].stride());
    }
}
// A backend supplies these two. reduce_gradients begins to sum layer l's gradients into m.own_gradients, while backward
// goes on. With l = -1 it sums those of the other tensors, and all sums are complete.
static void reduce_gradients(Model& m, int l);
template <class X> static void gather_weights(ModelOf<X>& m);  // gives each process the weights in others' shares
#else
static const char* const mpi = "";
static void join_processes() {}
static double sum_all(double x) { return x; }
static void sum_in_process_0(uint32_t*, size_t) {}
static void reduce_gradients(Model&, int) {}
template <class X> static void gather_weights(ModelOf<X>&) {}
#endif

// --------------------------------------------------------------------------------------------------------------------
// What a backend supplies: the device

// The tests set it: fresh memory is NaN, so that a value used before it is written shows.
static bool poison_memory = false;

// device_precision, device_build and device_help work at any time. device_start is called first, since it may start the
// program again; then device_init, before all others. It exits if there is no device that this binary can use. If
// `computes` is false, only model_memory will be used after it.
static void device_start(char** argv);
static void device_init(bool computes = true);
static std::string device_name();               // "2 threads, AVX-512"
static Precision device_precision();            // the default for --precision
static std::string device_build();              // what the program was compiled for: "AVX-512, OpenMP"
static const char* device_help();               // how the user chooses threads or the GPU
static size_t device_free_memory();             // bytes that can still be allocated
static bool device_is_host();                   // model memory is host memory
static void device_check(const Config&, const Workload&);    // exits if the device cannot run such a model
static void device_free(void*);
static void host_parallel_for(size_t n, auto f);  // calls f(0) ... f(n - 1), on the host's threads
static void copy_to_host(void* to, const void* from, size_t bytes);  // synchronizes
template <class X> static void backend_create(Allocator&, Workspace&, Inputs&, Results&, const Config&,
                                              const Workload&);
static void backend_free(Inputs&, Results&);
// Copies x and y (BT), all < V, into inputs. May be called once the last backward is: it overlaps with a step under
// way. backend_create allocates through the Allocator, and only counts if that is dry.
static void set_inputs(Inputs&, const int* x, const int* y, size_t BT, size_t V);

// --------------------------------------------------------------------------------------------------------------------
// Memory

static size_t allocated_parameters(const TensorTable& t) { return t[LNFB].place + t[LNFB].stride(); }

static size_t parameter_count(const Config& c) {
    const Tensor last = tensor_table(c)[LNFB];
    return last.offset + last.size();
}

// Everything a model holds. If m.allocator.dry, it is only counted.
template <class X> static void lay_out(ModelOf<X>& m) {
    const Config& c = m.config;
    Allocator& all = m.allocator;
    const bool train = m.work.train, keeps = train && !m.recomputes(), reads_other_layers = c.attention != VANILLA;
    const size_t L = c.L, C = c.C, NH = c.NH, BT = m.work.tokens();
    const size_t layers = train ? L : 1, norms = train ? 2 * L + 1 : 1, kept_norms = keeps ? 2 * L + 1 : 1;
    const size_t P = allocated_parameters(m.tensors), P_trained = train ? P : 0, BT_trained = train ? BT : 0;

    all.take(m.parameters, P, &Memory::parameters);
    if constexpr (std::is_same_v<X, float>) m.weights = m.parameters;
    else all.take(m.weights, P, &Memory::parameters);
    all.take(m.gradients, P_trained, &Memory::gradients, true);
    for (float** moment : {&m.moment1, &m.moment2}) all.take(*moment, P_trained / processes, &Memory::moments, true);
    const size_t largest = std::max({m.tensors[WTE].stride(), m.tensors[WPE].stride(), m.tensors[FCW].stride()});
    all.take(m.received, processes > 1 && train ? largest : 0, &Memory::gradients);
    if (processes == 1) m.own_gradients = m.gradients;
    else all.take(m.own_gradients, P_trained / processes, &Memory::gradients);

    // Activations. Backward needs those of all layers. Without it layers share a slot, except in qkv, which skip and
    // depth read in later layers.
    all.take(m.residual, BT ? (train ? 2 * L + 1 : 2) : 0, BT * C, &Memory::activations);
    for (auto* statistic : {&m.ln_mean, &m.ln_rstd}) all.take(*statistic, norms, BT, &Memory::activations);
    all.take(m.qkv, train || reads_other_layers ? L : 1, BT * 3 * C, &Memory::activations);
    all.take(m.lse, layers, BT * NH, &Memory::activations);
    all.take(m.atty, layers, BT * C, &Memory::activations);
    all.take(m.fch, train ? L : 0, BT * 4 * C, &Memory::activations);
    all.take(m.a, depth_place(m, c.L, 1), &Memory::activations);
    all.take(m.ds, train ? depth_place(m, c.L, 0) : 0, &Memory::activations);
    all.take(m.losses, BT, &Memory::activations);
    auto recomputed = keeps ? &Memory::activations : &Memory::scratch;
    all.take(m.ln, kept_norms, BT * C, recomputed);
    all.take(m.fch_gelu, keeps ? L : 1, BT * 4 * C, recomputed);

    all.take(m.logits, classifier_rows(BT, c.Vp) * c.Vp, &Memory::scratch);
    for (X** dx : {&m.dresidual, &m.dln, &m.datty}) all.take(*dx, BT_trained * C, &Memory::scratch);
    all.take(m.dqkv, BT_trained * 3 * C, &Memory::scratch);
    all.take(m.dfch, BT_trained * 4 * C, &Memory::scratch);
    all.take(m.dkv, reads_other_layers ? BT_trained * 2 * C : 0, &Memory::scratch);
    all.take(m.skip_dkv, skip_slots(c), BT_trained * 2 * C, &Memory::scratch);

    // Decoding. All layers' parts of the cache are equally large, but for skip's.
    const size_t rows = m.work.sequences * (size_t)c.maxT;
    size_t cached = 0;
    for (int l = 0; l < c.L; l++) {
        m.cache_place.push_back(cached);
        cached += round_up(rows * 2 * kv_channels(c, l), SLOT_ALIGNMENT);
    }
    all.take(m.cache, cached, &Memory::cache);
    all.take(m.new_tokens, rows, &Memory::scratch);
    for (X** x : {&m.new_x, &m.new_ln, &m.new_atty}) all.take(*x, rows * C, &Memory::scratch);
    all.take(m.new_qkv, rows * 3 * C, &Memory::scratch);
    all.take(m.new_fch, rows * 4 * C, &Memory::scratch);
    const size_t sources = depth_source_count(c, c.L - 1);  // the last layer has the most
    all.take(m.new_a, sources ? rows * (sources + 1) * NH : 0, &Memory::scratch);
    backend_create<X>(all, m.ws, m.inputs, m.results, c, m.work);
}

// Calls f with the model as the ModelOf<bf16> or ModelOf<float> that it is.
static void with_type(Model* m, auto f) {
    if (m->precision == BF16) f(*(ModelOf<bf16>*)m);
    else f(*(ModelOf<float>*)m);
}

// --------------------------------------------------------------------------------------------------------------------
// The model's interface, for the program and the tests. Values cross it in fp32.
//
// A training step is: for each micro-batch model_set_inputs, model_forward, model_backward; then model_update; then
// model_norm and model_loss. Calls may be asynchronous; model_norm and model_loss synchronize. So the next inputs may
// be set before these, while a GPU is still at the last step.

static void model_free(Model* m) {
    backend_free(m->inputs, m->results);
    for (void* block : m->allocator.blocks) device_free(block);
    with_type(m, [](auto& model) { delete &model; });
}

// Parameters are not initialized; gradients and moments are 0. dry: memory is only counted
static Model* model_create(const Config& c, int precision, const Workload& work, bool dry = false) {
    device_check(c, work);
    Model* m = precision == BF16 ? (Model*)new ModelOf<bf16>{} : new ModelOf<float>{};
    m->config = c;
    m->precision = precision;
    m->work = work;
    m->tensors = tensor_table(c);
    m->allocator.dry = dry;
    with_type(m, [](auto& model) { lay_out(model); });
    return m;
}

// What model_create will allocate, to the byte
static Memory model_memory(const Config& c, int precision, const Workload& work) {
    Model* m = model_create(c, precision, work, true);
    Memory memory = m->allocator.memory;
    model_free(m);
    return memory;
}

// Splits the n values from element `begin` of the file's order on into runs that lie together in memory, and calls
// f(place, done, count, own) for each: `count` values, after `done` others, lie from `place` on in an array of all
// parameters or, with `shares`, in the owner's array of its shares. own: this process is the owner.
static void for_each_contiguous(const TensorTable& tensors, bool shares, size_t begin, size_t n, auto f) {
    for (const Tensor& t : tensors)
        for (size_t i = 0; i < t.layers * processes; i++) {
            const size_t l = i / processes, owner = i % processes, slot = t.place + l * t.stride();
            const size_t first = t.offset + l * t.layer_size(), share = first + owner * t.share();
            const size_t from = std::max(share, begin);
            const size_t end = std::min({share + t.share(), first + t.layer_size(), begin + n});
            const size_t place = shares ? slot / processes + from - share : slot + from - first;
            if (from < end) f(place, from - begin, end - from, (int)owner == process);
        }
}

// Copy n values, from element `begin` of all parameters in file order (Tensor::offset) on. All must call model_get, and
// process 0 gets the values, each as a sum of its bits and zeros.
using Quantity = float* Model::*;
[[maybe_unused]] constexpr Quantity PARAMETERS = &Model::parameters, GRADIENTS = &Model::own_gradients,
                                    MOMENT1 = &Model::moment1, MOMENT2 = &Model::moment2;
static void model_get(const Model* m, Quantity q, size_t begin, size_t n, float* out) {
    const bool in_all = q == PARAMETERS && m->precision == FP32;  // the weights, which gather_weights has seen to
    std::fill_n(out, n, 0.0f);
    for_each_contiguous(m->tensors, q != PARAMETERS, begin, n, [=](size_t place, size_t done, size_t count, bool own) {
        if (own || in_all) copy_to_host(out + done, m->*q + place, count * sizeof(float));
    });
    if (!in_all) sum_in_process_0((uint32_t*)out, n);
}
static void model_put(Model* m, Quantity q, size_t begin, size_t n, const float* in) {
    for_each_contiguous(m->tensors, q != PARAMETERS, begin, n, [=](size_t place, size_t done, size_t count, bool own) {
        if (own || q == PARAMETERS) copy_to_device(m->*q + place, in + done, count * sizeof(float));
        if (q == PARAMETERS)
            with_type(m, [&](auto& model) { round_weights(model.weights + place, model.parameters + place, count); });
    });
}

// Tokens x and targets y (B, T) are < V. They are copied. Not between a model_forward and its model_backward.
static void model_set_inputs(Model* m, const int* x, const int* y) {
    set_inputs(m->inputs, x, y, m->work.tokens(), m->config.V);
}

// Cross-entropy of the inputs. With `train`, exactly one model_backward must follow; the gradients are those of
// loss_scale · (mean loss of this micro-batch).
static void model_forward(Model* m, bool train, float loss_scale) {
    with_type(m, [=](auto& model) { forward(model, train, loss_scale); });
}
// Gradients = (first since model_update or model_create) or +=. Of several processes, each `reduces` in a step's last.
static void model_backward(Model* m, bool reduces = false) {
    with_type(m, [=](auto& model) { backward(model, reduces); });
}
static void model_update(Model* m, const AdamW& a, float clip, int step) {  // clip 0: gradients as they are
    with_type(m, [&](auto& model) { update(model, a, clip, step); });
}

static double model_norm(Model* m) { return read_results(m->results).norm; }  // of the gradients, in the last update

// Mean cross-entropy, in nats per token, over the forward passes since the last call
static double model_loss(Model* m) {
    double mean = read_results(m->results).loss_sum / m->loss_count;
    m->loss_count = 0;
    return mean;
}

static void model_token_losses(const Model* m, float* out) {  // (B, T), of the last forward
    copy_to_host(out, m->losses, m->work.tokens() * sizeof(float));
}

// The weights a (T, |S_l|+1, NH) with which layer l > 0 mixed values in sequence b of the last forward.
static std::vector<float> model_depth_weights(const Model* m, int l, size_t b) {
    std::vector<float> a((size_t)m->work.T * (depth_source_count(m->config, l) + 1) * m->config.NH);
    copy_to_host(a.data(), m->a + depth_place(*m, l, 1) + b * a.size(), a.size() * sizeof(float));
    return a;
}

// Appends tokens (sequences, n) to the sequences, up to maxT in all. Gives the logits (sequences, V) that follow.
static void model_prefill(Model* m, const int* tokens, int n, float* logits) {
    with_type(m, [=](auto& model) { decode(model, tokens, n, logits); });
}
static void model_reset_cache(Model* m) { m->cache_length = 0; }

// ====================================================================================================================
// 3 · The program
//
// In the order in which a training run needs it. It calls the model through section 2's interface, for any backend.

static_assert(std::endian::native == std::endian::little, "files are little endian, and are read without conversion");
#if __FAST_MATH__ || __FINITE_MATH_ONLY__ || __ASSOCIATIVE_MATH__
#error "-Ofast and -ffast-math change results and hide NaN: use -O3; the Makefile has the parts of them that are safe"
#endif

// --------------------------------------------------------------------------------------------------------------------
// Text

// The word as a shell takes it, for commands that a message suggests.
static std::string shell_word(const std::string& word) {
    auto plain = [](char c) { return isalnum((uint8_t)c) || (c && strchr("_./-+=:,@%", c)); };
    if (!word.empty() && std::all_of(word.begin(), word.end(), plain)) return word;
    if (word.find_first_of("'\\") == word.npos && escaped(word) == word) return "'" + word + "'";
    std::string inside;
    for (char c : word) inside += std::string(c == '\'' || c == '\\' ? "\\" : "") + c;
    return "$'" + escaped(inside) + "'";
}

static std::string commas(size_t n) {  // 1,234,567
    return n < 1000 ? format("%zu", n) : commas(n / 1000) + format(",%03zu", n % 1000);
}

static std::string plural(size_t n, const char* noun) { return commas(n) + " " + noun + (n == 1 ? "" : "s"); }
static std::string mebibytes(size_t bytes) {
    double mib = bytes / 0x1p20;
    return mib < 4096 ? format("%.*f MiB", mib < 10 ? 2 : 1, mib) : format("%.1f GiB", mib / 1024);
}

static std::string duration(double s) {
    if (s < 100) return format("%.0f s", s);
    if (s < 6000) return format("%.0f min %02.0f s", floor(s / 60), floor(fmod(s, 60)));
    return format("%.0f h %02.0f min", floor(s / 3600), floor(fmod(s / 60, 60)));
}

static std::vector<std::string> split(const std::string& text, char separator) {
    std::vector<std::string> parts = {""};
    for (char c : text)
        if (c == separator) parts.emplace_back();
        else parts.back() += c;
    return parts;
}

// Number of insertions, deletions and replacements of a letter that turn a into b (Levenshtein).
static size_t edit_distance(const std::string& a, const std::string& b) {
    std::vector<std::vector<size_t>> d(a.size() + 1, std::vector<size_t>(b.size() + 1));  // between their beginnings
    for (size_t i = 0; i <= a.size(); i++)
        for (size_t j = 0; j <= b.size(); j++)
            if (i == 0 || j == 0) d[i][j] = i + j;
            else d[i][j] = std::min({d[i - 1][j] + 1, d[i][j - 1] + 1, d[i - 1][j - 1] + (a[i - 1] != b[j - 1])});
    return d[a.size()][b.size()];
}

// Suggests the name of a row that is closest to a misspelled word, or `otherwise` if none is close.
static std::string did_you_mean(const std::string& word, const auto& table, const char* prefix,
                                const std::string& otherwise) {
    auto distance = [&](const auto& row) { return edit_distance(word, row.name); };
    const std::string nearest = std::ranges::min_element(table, {}, distance)->name;
    return 2 * edit_distance(word, nearest) <= word.size() ? "did you mean " + (prefix + nearest) + "?" : otherwise;
}

// --------------------------------------------------------------------------------------------------------------------
// Options
//
// An option is a row of a table, which drives parsing, range checks, --help, the summary and what checkpoints remember.

enum CommandBit { TRAIN = 1, EVAL = 2, GENERATE = 4, DESCRIBE = 8, EVERY = 255 };
constexpr int SHAPES = TRAIN | DESCRIBE | 256;  // the options of a shape: the other commands have a model file

// The fields of a Config that options set: its shape, which is fixed once a model has weights, and the settings of each
// attention, which any run may choose anew. A new attention adds its settings here.
enum { SHAPE = -1 };
struct Setting {
    const char* name;    // of its option
    int Config::*field;
    int attention;       // that it is a setting of, or SHAPE
    int low, high;
    int header;          // its index in the header of a model file
    int (*initial)(const Config&);  // the default of an attention's setting, given the shape
    const char* help;
};
static const Setting config_settings[] = {
    {"layers", &Config::L, SHAPE, 1, 1024, 4, nullptr, "number of layers [12, or the model's]"},
    {"heads", &Config::NH, SHAPE, 1, 65536, 5, nullptr, "heads; must divide channels [12, or the model's]"},
    {"channels", &Config::C, SHAPE, 1, 65536, 6, nullptr, "width of the residual stream [768, or the model's]"},
    {"context", &Config::maxT, SHAPE, 1, 1 << 20, 2, nullptr, "maximum sequence length [1024, or the model's]"},
    {"vocab", &Config::V, SHAPE, 1, 65536, 3, nullptr, "vocabulary size [the tokenizer's, or 50257]"},
    {"skip-distance", &Config::skip_distance, SKIP, 1, 65536, 9,
     [](const Config& c) { return std::max(1, 3 * c.L / 4); }, "skip: heads read N layers below [3/4 of layers]"},
    {"skip-heads", &Config::skip_heads, SKIP, 0, 65536, 10,
     [](const Config& c) { return std::max(1, 3 * c.NH / 4); }, "skip: how many heads do so [3/4 of heads]"},
    {"depth-stride", &Config::depth_stride, DEPTH, 1, 65536, 11,
     [](const Config& c) { return std::max(1, c.L / 2); }, "depth: mix in layers 0, N, 2N, ... [half of layers]"},
    {"depth-window", &Config::depth_window, DEPTH, 0, 65536, 12,
     [](const Config&) { return 0; }, "depth: and also the N layers just below [0]"},
};

enum Schedule { COSINE, LINEAR, CONSTANT, WSD };  // in the order of the choices of --schedule

// A number below its option's range means "not set"; a default that depends on the model or the data replaces it.
struct Options {
    std::string program;  // argv[0], for messages

    std::string model, tokenizer;
    Config wanted;  // the fields of config_settings
    int attention = -1, precision = device_precision(), seed = 1;

    std::string train, val, out;
    bool resume = false, overwrite = false, keep = false, recompute = false;
    int batch = 4, sequence = 0, total_batch = 0, steps = 0;
    double lr = 6e-4, min_lr = -1, weight_decay = 0.1, beta1 = 0.9, beta2 = 0.95, clip = 1;
    int warmup = -1, schedule = COSINE;
    int log_every = 0, val_every = 100, val_tokens = -1, sample_every = 0, save_every = 100;

    std::string hellaswag, depth_weights;
    bool by_position = false;

    std::string prompt, prompt_file, prompt_tokens;
    std::vector<std::string> stop;
    bool stop_at_end = false;
    int tokens = 200, top_k = 0, samples = 1;
    double temperature = 0.8, top_p = 0.95, repetition_penalty = 1;
};

// Whether a checkpoint stores the option: no; yes, and --resume refuses another value; yes, and --resume accepts one.
enum Persistence { TRANSIENT, FIXED, CHANGEABLE };

struct Option {
    const char* name;
    std::variant<std::string*, std::vector<std::string>*, bool*, int*, double*> place;  // of its value
    std::string form;  // of its value, as --help shows it: N and X are numbers, a|b|c are choices, "" makes it a flag
    int commands;
    Persistence persistence;
    const char* help;
    double low = 0, high = INT_MAX;  // range of a number; a choice is stored as its index
    bool given = false;              // on the command line
    std::string initial = "";        // its default, as text

    template <class T> T* as() const {  // where its value goes, or null if that is no T
        auto found = std::get_if<T*>(&place);
        return found ? *found : nullptr;
    }
};
using OptionTable = std::vector<Option>;

// The option's value as text, or "" if it is not set. A real number has the fewest digits that give it back exactly.
static std::string value_text(const Option& o) {
    if (auto text = o.as<std::string>()) return *text;
    if (auto flag = o.as<bool>()) return *flag ? "yes" : "";
    if (auto n = o.as<int>()) return *n < o.low ? "" : o.form == "N" ? std::to_string(*n) : split(o.form, '|')[*n];
    auto x = o.as<double>();
    if (!x || *x < o.low) return "";
    char digits[32];
    return std::string(digits, std::to_chars(digits, digits + sizeof digits, *x).ptr);
}

[[maybe_unused]] static OptionTable option_table(Options& o) {
    std::string attentions;
    for (const char* name : attention_names) attentions += std::string(attentions.empty() ? "" : "|") + name;
    OptionTable table = {
        {"train", &o.train, "GLOB", TRAIN, CHANGEABLE, "training shards, in quotes: 'data/train_*.bin'"},
        {"val", &o.val, "GLOB", TRAIN | EVAL, CHANGEABLE, "validation shards"},
        {"hellaswag", &o.hellaswag, "FILE", EVAL, TRANSIENT, "instead: questions, in llm.c's format"},
        {"by-position", &o.by_position, "", EVAL, TRANSIENT, "also print the loss by position, as CSV"},
        {"depth-weights", &o.depth_weights, "FILE", EVAL, TRANSIENT, "depth: CSV of each source's mean weight"},
        {"out", &o.out, "DIR", TRAIN, TRANSIENT, "folder for model.bin, best.bin, metrics.csv"},
        {"resume", &o.resume, "", TRAIN, TRANSIENT, "continue the run in DIR"},
        {"overwrite", &o.overwrite, "", TRAIN, TRANSIENT, "replace the run in DIR"},
        {"batch", &o.batch, "N", TRAIN | EVAL | DESCRIBE, FIXED, "sequences per forward pass", 1, 65535},
        {"sequence", &o.sequence, "N", TRAIN | EVAL | DESCRIBE, FIXED, "tokens in each [the model's context]", 1},
        {"total-batch", &o.total_batch, "N", TRAIN, FIXED, "tokens per update, a multiple of [batch x sequence]", 1},
        {"recompute", &o.recompute, "", TRAIN | DESCRIBE, FIXED, "GPU: compute cheap activations twice; less memory"},
        {"steps", &o.steps, "N", TRAIN, CHANGEABLE, "updates in all [a pass over --train, at least 1000]", 1},
        {"lr", &o.lr, "X", TRAIN, FIXED, "peak learning rate", 0, 10},
        {"min-lr", &o.min_lr, "X", TRAIN, FIXED, "final learning rate [1/10 of --lr]", 0, 10},
        {"warmup", &o.warmup, "N", TRAIN, FIXED, "steps of linear warmup [1/20 of --steps]"},
        {"schedule", &o.schedule, "cosine|linear|constant|wsd", TRAIN, FIXED,
         "decay after warmup; wsd: in the last fifth"},
        {"weight-decay", &o.weight_decay, "X", TRAIN, FIXED, "weight decay of matrices and embeddings", 0, 10},
        {"beta1", &o.beta1, "X", TRAIN, FIXED, "AdamW: decay of the gradient's mean", 0, 0.9999999},
        {"beta2", &o.beta2, "X", TRAIN, FIXED, "AdamW: decay of the squared gradient's mean", 0, 0.9999999},
        {"clip", &o.clip, "X", TRAIN, FIXED, "maximum norm of the gradient; 0: no limit", 0, 1e6},
        {"log-every", &o.log_every, "N", TRAIN, CHANGEABLE, "steps between lines; 0: one line a second"},
        {"val-every", &o.val_every, "N", TRAIN, CHANGEABLE, "steps between validations; 0: only at the end"},
        {"val-tokens", &o.val_tokens, "N", TRAIN | EVAL, CHANGEABLE, "measure N tokens; 0: all [16384; eval: all]"},
        {"sample-every", &o.sample_every, "N", TRAIN, CHANGEABLE, "steps between samples; 0: only at the end"},
        {"save-every", &o.save_every, "N", TRAIN, CHANGEABLE, "steps between saves; 0: only new best and end"},
        {"keep", &o.keep, "", TRAIN, CHANGEABLE, "also keep each save, as DIR/model_STEP.bin"},
        {"prompt", &o.prompt, "TEXT", TRAIN | GENERATE, CHANGEABLE, "text to continue [a newline; GPT-2: end-of-text]"},
        {"prompt-file", &o.prompt_file, "FILE", GENERATE, TRANSIENT, "the prompt is FILE's text; -: standard input's"},
        {"prompt-tokens", &o.prompt_tokens, "LIST", TRAIN | GENERATE, CHANGEABLE, "prompt as token numbers: 1,2,3"},
        {"stop", &o.stop, "TEXT", GENERATE, TRANSIENT, "end before TEXT, like $'\\n'; may be given again"},
        {"stop-at-end", &o.stop_at_end, "", GENERATE, TRANSIENT, "end at end-of-text instead of beginning a new text"},
        {"samples", &o.samples, "N", GENERATE, TRANSIENT, "texts, each with the next seed, with --- between", 1},
        {"tokens", &o.tokens, "N", TRAIN | GENERATE, CHANGEABLE, "generate up to N tokens"},
        {"temperature", &o.temperature, "X", TRAIN | GENERATE, CHANGEABLE, "sampling temperature; 0: greedy", 0, 100},
        {"top-k", &o.top_k, "N", TRAIN | GENERATE, CHANGEABLE, "sample from the N likeliest tokens; 0: all", 0, 65536},
        {"top-p", &o.top_p, "X", TRAIN | GENERATE, CHANGEABLE, "nucleus sampling: total probability X", 0, 1},
        {"repetition-penalty", &o.repetition_penalty, "X", GENERATE, TRANSIENT,
         "above 1: avoid tokens that the text has", 0.01, 100},
        {"model", &o.model, "NAME|FILE", EVERY, FIXED, "file, or shape like gpt2-medium or gpt2-xl [gpt2]"},
        {"attention", &o.attention, attentions, EVERY, FIXED, "attention variant [the file's, or vanilla]"},
        {"tokenizer", &o.tokenizer, "FILE", EVERY, TRANSIENT, "tokenizer file [beside the shards or the model]"},
        {"precision", &o.precision, "fp32|bf16", EVERY, FIXED, "format of weights and activations"},
        {"seed", &o.seed, "N", EVERY, FIXED, "random seed: weights, data order, samples"},
    };
    for (const Setting& s : config_settings) {
        o.wanted.*s.field = -1;  // not set
        const int commands = s.attention == SHAPE ? SHAPES : (int)EVERY;
        table.push_back({s.name, &(o.wanted.*s.field), "N", commands, FIXED, s.help, (double)s.low, (double)s.high});
    }
    for (Option& option : table) option.initial = value_text(option);
    return table;
}

static Option* find_option(OptionTable& table, const std::string& name) {
    auto found = std::ranges::find(table, name, &Option::name);
    return found == table.end() ? nullptr : &*found;
}

static bool is_given(OptionTable& table, const char* name) { return find_option(table, name)->given; }

// Sets the option. Returns what is wrong with the text, or "".
static std::string set_value(Option& o, const std::string& text) {
    auto n = o.as<int>();
    auto texts = o.as<std::vector<std::string>>();
    if (text.empty() && (texts || o.form == "LIST")) return "is empty";
    if (texts) {
        texts->push_back(text);
    } else if (auto only = o.as<std::string>()) {
        *only = text;
    } else if (auto flag = o.as<bool>()) {
        *flag = true;
    } else if (n && o.form != "N") {
        const std::vector<std::string> choices = split(o.form, '|');
        const auto found = std::find(choices.begin(), choices.end(), text);
        if (found == choices.end()) return "must be one of " + o.form;
        *n = found - choices.begin();
    } else {
        // strtod also accepts spaces, hexadecimal numbers and "nan"; the letters allowed here exclude those.
        char* end;
        const double x = strtod(text.c_str(), &end);
        if (text.empty() || text.find_first_not_of(n ? "-0123456789" : "+-.0123456789eE") != text.npos || *end)
            return n ? "must be a whole number" : "must be a number";
        if (!(o.low <= x && x <= o.high)) return format("must be from %.10g to %.10g", o.low, o.high);
        if (n) *n = x;
        else *o.as<double>() = x;
    }
    return "";
}

static void print_options(FILE* out, const OptionTable& table, bool common) {
    for (const Option& o : table) {
        if ((o.commands == EVERY) != common) continue;
        std::string left = format("  --%s %s", o.name, o.form.c_str());
        if (left.size() > 26) left += format("\n%28s", "");  // a long form has a line of its own
        bool shown = !o.initial.empty() && !strchr(o.help, '[');
        fprintf(out, "%-28s%s%s\n", left.c_str(), o.help, shown ? format(" [%s]", o.initial.c_str()).c_str() : "");
    }
}

// What llm.c, nanoGPT and others call an option
static const std::map<std::string, const char*> foreign_names = {
    {"i", "train"}, {"j", "val"}, {"o", "out"}, {"e", "model"}, {"b", "batch"}, {"t", "sequence"}, {"d", "total-batch"},
    {"x", "steps"}, {"l", "lr"}, {"u", "warmup"}, {"c", "weight-decay"}, {"v", "val-every"}, {"s", "sample-every"},
    {"g", "tokens"}, {"n", "save-every"}, {"y", "resume"}, {"dataset", "train"}, {"out-dir", "out"},
    {"epochs", "steps"}, {"max-iters", "steps"}, {"num-iterations", "steps"}, {"learning-rate", "lr"},
    {"grad-clip", "clip"}, {"dtype", "precision"}, {"block-size", "context"}, {"n-layer", "layers"},
    {"n-head", "heads"}, {"n-embd", "channels"}, {"eval-interval", "val-every"}, {"eval-iters", "val-tokens"},
    {"val-batches", "val-tokens"}, {"init-from", "model"}, {"num-samples", "samples"}, {"max-new-tokens", "tokens"},
    {"start", "prompt"}};

// Suggests an option for a word that is none, or `otherwise`.
static std::string suggestion(OptionTable& table, std::string word, const std::string& otherwise) {
    word.erase(0, word.find_first_not_of('-'));
    word = split(word, '=')[0];
    std::replace(word.begin(), word.end(), '_', '-');
    auto foreign = foreign_names.find(word);
    if (foreign != foreign_names.end() && find_option(table, foreign->second))
        return format("did you mean --%s?", foreign->second);
    return did_you_mean(word, table, "--", otherwise);
}

static bool is_help(const std::string& word) { return word == "--help" || word == "-h" || word == "help"; }

// Sets the options that the words of a command line give. Returns false if one of the words is --help.
static bool parse_options(OptionTable& table, const std::vector<std::string>& words, const char* command,
                          const std::string& help) {
    for (size_t i = 0; i < words.size(); i++) {
        const std::string& word = words[i];
        if (is_help(word)) return false;
        if (!word.starts_with("--"))
            die("'%s' is not an option; %s", word.c_str(),
                suggestion(table, word, "put patterns, and texts with spaces, in quotes").c_str());
        const std::string name = split(word.substr(2), '=')[0];
        Option* o = find_option(table, name);
        if (!o) die("%s has no option --%s; %s", command, name.c_str(), suggestion(table, word, help).c_str());
        const char* form = o->form.c_str();
        if (word.find('=') != word.npos) die("%s: use a space instead of '=': --%s %s", word.c_str(), o->name, form);
        if (o->given && !o->as<std::vector<std::string>>()) die("--%s is given twice", o->name);
        o->given = true;
        if (o->form.empty()) {
            set_value(*o, "");
            continue;
        }
        // A word that begins with -- is the next option rather than a value, but a TEXT may begin so.
        bool missing = i + 1 == words.size();
        if (!missing && words[i + 1].starts_with("--"))
            missing = o->form != "TEXT" || find_option(table, words[i + 1].substr(2));
        if (missing) die("--%s needs a value: --%s %s", o->name, o->name, form);
        const std::string error = set_value(*o, words[++i]);
        if (!error.empty()) die("--%s %s: %s", o->name, words[i].c_str(), error.c_str());
    }
    return true;
}

// --------------------------------------------------------------------------------------------------------------------
// Files
//
// A file that others may read is written under a temporary name, flushed to disk, and then renamed, which is atomic:
// readers see the old file or the new one, never a partial one. Nothing that is read is trusted: sizes are checked
// against the length of the file before memory is allocated for them.

enum Magic { MODEL_MAGIC = 20240326, DUMP_MAGIC = 20240327, TOKENIZER_MAGIC = 20240328, TRAILER_MAGIC = 20240329,
             SHARD_MAGIC = 20240520, EVAL_MAGIC = 20240522, LLAMA_SHARD_MAGIC = 20240801 };
constexpr size_t HEADER_BYTES = 1024;
using Header = std::array<int32_t, 256>;

// CRC-32 (polynomial 0xedb88320, as in zlib): the remainder of a division of polynomials over GF(2). Table k advances
// the remainder of one byte by k further bytes, so eight look-ups divide eight bytes at once.
static constexpr auto crc_tables = [] {
    std::array<std::array<uint32_t, 256>, 8> t{};
    for (uint32_t i = 0; i < 256; i++) {
        t[0][i] = i;
        for (int bit = 0; bit < 8; bit++) t[0][i] = (t[0][i] >> 1) ^ (t[0][i] & 1 ? 0xedb88320 : 0);
    }
    for (int k = 1; k < 8; k++)
        for (int i = 0; i < 256; i++) t[k][i] = (t[k - 1][i] >> 8) ^ t[0][t[k - 1][i] & 255];
    return t;
}();

static uint32_t crc32(uint32_t crc, const void* data, size_t n) {  // continues from crc; the first call passes 0
    const uint8_t* p = (const uint8_t*)data;
    const auto& t = crc_tables;
    crc = ~crc;
    for (; n >= 8; n -= 8, p += 8) {
        uint64_t word;
        memcpy(&word, p, 8);
        word ^= crc;
        crc = 0;
        for (int i = 0; i < 8; i++) crc ^= t[7 - i][word >> (8 * i) & 255];
    }
    for (; n > 0; n--) crc = (crc >> 8) ^ t[0][(crc ^ *p++) & 255];
    return ~crc;
}

static std::string folder_of(const std::string& path) {
    std::string folder = std::filesystem::path(path).parent_path();
    return folder.empty() ? "." : folder;
}

static bool exists(const std::string& path) {  // or cannot be looked at, for which opening it gives the reason
    struct stat s;
    return stat(path.c_str(), &s) == 0 || (errno != ENOENT && errno != ENOTDIR);
}

struct InputFile {
    std::string path;
    int fd = -1;
    size_t size = 0;
};

// Opens a regular file. Returns what went wrong, or "".
static std::string try_open(InputFile& f, const std::string& path) {
    struct stat s;
    f.path = path;
    f.fd = open(path.c_str(), O_RDONLY | O_CLOEXEC | O_NONBLOCK);  // O_NONBLOCK: opening a pipe must not wait
    if (f.fd < 0 || fstat(f.fd, &s) != 0) return strerror(errno);
    f.size = s.st_size;
    return S_ISREG(s.st_mode) ? "" : S_ISDIR(s.st_mode) ? "is a folder; name a file in it" : "is not a regular file";
}

static InputFile open_file(const std::string& path) {
    InputFile f;
    if (std::string error = try_open(f, path); !error.empty()) die("%s: %s", path.c_str(), error.c_str());
    return f;
}

// Reads n bytes. Returns false if not all of them could be read.
static bool read_at(const InputFile& f, size_t offset, void* out, size_t n) {
    char* p = (char*)out;
    while (n > 0) {
        ssize_t got = pread(f.fd, p, std::min<size_t>(n, 1 << 30), offset);
        if (got < 0 && errno == EINTR) continue;
        if (got <= 0) return false;
        p += got;
        offset += got;
        n -= got;
    }
    return true;
}

static void must_read_at(const InputFile& f, size_t offset, void* out, size_t n) {
    if (!read_at(f, offset, out, n))
        die("%s: cannot be read at byte %zu: the file has changed, or the disk fails", f.path.c_str(), offset);
}

static std::string read_whole(const InputFile& f) {
    std::string content(f.size, '\0');
    must_read_at(f, 0, content.data(), f.size);
    close(f.fd);
    return content;
}

// "SIZE CRC", by which a shard is recognized; the CRC-32 is that of its first and its last 64 KiB. "" if reading fails.
static std::string fingerprint(const InputFile& f) {
    const size_t n = std::min<size_t>(f.size, 1 << 16);
    std::string ends(2 * n, '\0');
    if (!read_at(f, 0, ends.data(), n) || !read_at(f, f.size - n, ends.data() + n, n)) return "";
    return format("%zu %08x", f.size, crc32(0, ends.data(), ends.size()));
}

struct OutputFile {
    std::string path, temporary;
    int fd = -1;
    size_t size = 0;
    uint32_t crc = 0;
};

[[noreturn]] static void die_writing(const OutputFile& f, const char* reason = strerror(errno)) {
    unlink(f.temporary.c_str());
    die("%s could not be written: %s%s", f.path.c_str(), reason, exists(f.path) ? "; the old file is unchanged" : "");
}

static void write_file(OutputFile& f, const void* data, size_t n) {
    if (process > 0) return;
    const char* p = (const char*)data;
    f.crc = crc32(f.crc, data, n);
    f.size += n;
    while (n > 0) {
        ssize_t put = write(f.fd, p, std::min<size_t>(n, 1 << 30));
        if (put < 0 && errno == EINTR) continue;
        if (put < 0) die_writing(f);
        p += put;
        n -= put;
    }
}

static OutputFile create_file(const std::string& path, const std::string& content = "") {
    OutputFile f = {.path = path, .temporary = path + ".tmp"};
    if (process > 0) return f;
    unlink(f.temporary.c_str());  // a killed run may have left it, and it may be a link
    f.fd = open(f.temporary.c_str(), O_WRONLY | O_CREAT | O_EXCL | O_CLOEXEC, 0666);
    if (f.fd < 0) die_writing(f);
    write_file(f, content.data(), content.size());
    return f;
}

// Returns once the file is on the disk.
static int sync_to_disk(int fd) {
#ifdef F_FULLFSYNC  // macOS, where fsync leaves data in the disk's own cache
    if (fcntl(fd, F_FULLFSYNC) == 0) return 0;
#endif
    return fsync(fd);
}

static void commit_file(const OutputFile& f) {
    if (process > 0) return;
    if (sync_to_disk(f.fd) != 0 || close(f.fd) != 0 || rename(f.temporary.c_str(), f.path.c_str()) != 0) die_writing(f);
    int folder = open(folder_of(f.path).c_str(), O_RDONLY | O_DIRECTORY | O_CLOEXEC);
    if (folder < 0) return;
    sync_to_disk(folder);  // the new name, too
    close(folder);
}

// The files that a pattern matches, sorted by name.
static std::vector<std::string> expand_glob(const char* option, const std::string& pattern) {
    if (exists(pattern)) return {pattern};  // a name may contain brackets
    glob_t found = {};
    int status = glob(pattern.c_str(), GLOB_ERR, nullptr, &found);
    const int reason = status == GLOB_ABORTED ? errno : ENOENT;  // aborted: a folder cannot be read
    std::vector<std::string> paths(found.gl_pathv, found.gl_pathv + (status == 0 ? found.gl_pathc : 0));
    globfree(&found);
    if (paths.empty())
        die("--%s %s: %s; if shards have moved, give their new place", option, pattern.c_str(), strerror(reason));
    return paths;
}

// The paths, and where those of them that are links lead.
static std::vector<std::string> with_targets(std::vector<std::string> paths) {
    std::error_code error;  // for which opening the file gives the reason
    for (size_t i = 0, n = paths.size(); i < n; i++) {
        if (!std::filesystem::is_symlink(paths[i], error)) continue;
        const std::string target = std::filesystem::canonical(paths[i], error);
        if (!error) paths.push_back(target);
    }
    return paths;
}

// --------------------------------------------------------------------------------------------------------------------
// Tokenizer
//
// data_prep/prepare.py turns text into tokens. The program turns them back, with a table of each token's bytes, and
// encodes prompts. Where each token is one byte or one character, this is a matter of looking them up. All other
// vocabularies are byte pair encodings like GPT-2's, whose merges follow from the numbers of the tokens.

struct Tokenizer {
    std::string path = "", content = "";   // of its file
    std::vector<std::string> tokens = {};  // bytes of each token; empty if there is no tokenizer
    int end_of_text = -1;                  // -1 if it has none
    std::string crc = "";                  // of the two above, by which tokenizers are compared
    size_t appendix = 0;                   // where the tokens end in the content

    bool known() const { return !tokens.empty(); }
};

static Tokenizer read_tokenizer(const std::string& path) {
    constexpr size_t most = 1 << 26;  // 65,536 tokens take at most 2^24 bytes; the rest is for what may follow them
    const char* name = path.c_str();
    InputFile f = open_file(path);
    if (f.size < HEADER_BYTES || f.size > most) die("%s: not a tokenizer: it has %zu bytes", name, f.size);
    Tokenizer t = {.path = path, .content = read_whole(f)};
    Header h;
    memcpy(h.data(), t.content.data(), HEADER_BYTES);
    const int version = h[1], n = h[2], appendix = h[4], end_of_text = version == 1 ? 50256 : h[3];
    if (h[0] != TOKENIZER_MAGIC) die("%s: not a tokenizer: it begins with %d, not %d", name, h[0], TOKENIZER_MAGIC);
    if (version != 1 && version != 2) die("%s: tokenizer version %d is unknown; 1 and 2 are supported", name, version);
    if (n < 1 || n > 65536) die("%s: damaged: a vocabulary of %d tokens; it must be from 1 to 65536", name, n);
    size_t at = HEADER_BYTES;
    for (int i = 0; i < n; i++) {
        size_t length = at < f.size ? (uint8_t)t.content[at] : 0;
        if (at + 1 + length > f.size) die("%s: truncated in token %d of %d", name, i, n);
        if (length == 0) die("%s: damaged: token %d is empty", name, i);
        t.tokens.push_back(t.content.substr(at + 1, length));
        at += 1 + length;
    }
    if (appendix < 0 || f.size != at + appendix)
        die("%s: damaged: %zu bytes, but its header and tokens say %zu", name, f.size, at + appendix);
    if (end_of_text >= 0 && end_of_text < n) t.end_of_text = end_of_text;
    t.appendix = at;
    const uint32_t crc = crc32(0, t.content.data() + HEADER_BYTES, at - HEADER_BYTES);
    t.crc = format("%08x", crc32(crc, &t.end_of_text, sizeof t.end_of_text));
    return t;
}

// Adds the tokenizer that lies beside a file, if there is one. llm.c calls its own gpt2_tokenizer.bin.
static void add_tokenizer_beside(std::vector<std::string>& paths, const std::string& file) {
    for (const char* name : {"/tokenizer.bin", "/gpt2_tokenizer.bin"})
        if (exists(folder_of(file) + name)) return paths.push_back(folder_of(file) + name);
}

// Length in bytes of the UTF-8 character that begins with this byte; 0 if none does.
static size_t utf8_length(uint8_t first) {
    return first < 0x80 ? 1 : first < 0xc2 ? 0 : first < 0xe0 ? 2 : first < 0xf0 ? 3 : first < 0xf5 ? 4 : 0;
}

// Makes a stream of bytes valid UTF-8, a character once it is complete, as Python's errors="replace" does: each longest
// run of bytes that begins a character without completing it becomes one U+FFFD, as does each byte that begins none.
struct Utf8Stream {
    std::string ready = "", held = "";  // complete characters, for the caller to take; an incomplete one

    void put(const std::string& bytes) {
        for (uint8_t byte : bytes) {
            // The second byte's range excludes surrogates, codes above U+10FFFF, and those with a shorter form.
            const uint8_t first = held.size() == 1 ? held[0] : 0;
            const uint8_t low = first == 0xe0 ? 0xa0 : first == 0xf0 ? 0x90 : 0x80;
            const uint8_t high = first == 0xed ? 0x9f : first == 0xf4 ? 0x8f : 0xbf;
            if (byte < low || byte > high) finish();  // this byte does not continue a character
            held += byte;
            const size_t length = utf8_length(held[0]);
            if (length == 0) finish();
            if (held.size() == length) ready += std::exchange(held, "");
        }
    }
    void finish() {
        if (!held.empty()) ready += "\xef\xbf\xbd";
        held.clear();
    }
};

enum CharacterClass { OTHER, LETTER, NUMBER, SPACE };
using CharacterClasses = std::map<uint32_t, CharacterClass>;  // from this code point on, characters have this class
using TokenNumbers = std::unordered_map<std::string_view, int>;  // by a token's bytes

// What follows the tokens of a byte pair encoding in its file: Unicode's letters, numbers and white space. Each is a
// list, uint32 n, then n ranges, uint32 first and last code point. llm.c's file lacks them: then only ASCII is known.
static CharacterClasses character_classes(const Tokenizer& t) {
    CharacterClasses from = {{0, OTHER}, {'\t', SPACE}, {'\r' + 1, OTHER}, {' ', SPACE}, {' ' + 1, OTHER},
                             {'0', NUMBER}, {'9' + 1, OTHER}, {'A', LETTER}, {'Z' + 1, OTHER}, {'a', LETTER},
                             {'z' + 1, OTHER}};
    if (t.appendix == t.content.size()) return from;
    std::vector<uint32_t> words((t.content.size() - t.appendix) / 4);
    t.content.copy((char*)words.data(), 4 * words.size(), t.appendix);
    size_t at = 0;
    for (CharacterClass kind : {LETTER, NUMBER, SPACE}) {
        const size_t end = at < words.size() ? at + 1 + 2 * (size_t)words[at] : at + 1;
        if (end > words.size()) die("%s: damaged: what follows its tokens is cut off", t.path.c_str());
        for (at++; at < end; at += 2) {
            from[words[at]] = kind;
            from.emplace(words[at + 1] + 1, OTHER);
        }
    }
    return from;
}

// The class of the character at text[at], valid UTF-8.
static CharacterClass class_at(const CharacterClasses& classes, const std::string& text, size_t at) {
    const size_t length = utf8_length(text[at]);
    uint32_t code = (uint8_t)text[at];
    if (length > 1) code &= 0x7f >> length;  // a first byte has as many leading ones as the character has bytes
    for (size_t i = 1; i < length; i++) code = code << 6 | ((uint8_t)text[at + i] & 0x3f);
    return std::prev(classes.upper_bound(code))->second;
}

// Where the word that begins at text[at] ends. The words of GPT-2 are endings like 's; letters, or numbers, or other
// visible characters, with a space before them if there is one; and white space, whose last character is left to the
// word after it.
static size_t word_end(const CharacterClasses& classes, const std::string& text, size_t at) {
    for (const char* ending : {"'s", "'t", "'re", "'ve", "'m", "'ll", "'d"})
        if (text.compare(at, strlen(ending), ending) == 0) return at + strlen(ending);
    if (text[at] == ' ' && at + 1 < text.size() && class_at(classes, text, at + 1) != SPACE) at++;
    const CharacterClass kind = class_at(classes, text, at);
    size_t end = at, last = at;
    for (; end < text.size() && class_at(classes, text, end) == kind; end += utf8_length(text[end])) last = end;
    return kind == SPACE && end < text.size() && last > at ? last : end;
}

// Appends the tokens of a word. It starts as single bytes. As long as two neighboring parts together are a token, the
// two that are the lowest token are merged, the leftmost of equals. n bytes take O(n log n) time.
static void encode_word(std::vector<int>& tokens, const TokenNumbers& token_of, std::string_view word) {
    if (auto whole = token_of.find(word); whole != token_of.end()) return tokens.push_back(whole->second);
    const size_t n = word.size();
    std::vector<size_t> next(n), previous(n + 1);  // where the neighbors of the part at a byte begin; 0: no part there
    using Merge = std::tuple<int, size_t, size_t>;  // a token, where its first part begins, where its second ends
    std::priority_queue<Merge, std::vector<Merge>, std::greater<>> merges;
    auto consider = [&](size_t begin) {  // the part there and the one after it
        if (next[begin] == n) return;
        const size_t end = next[next[begin]];
        if (auto found = token_of.find(word.substr(begin, end - begin)); found != token_of.end())
            merges.emplace(found->second, begin, end);
    };
    for (size_t i = 0; i < n; i++) next[i] = i + 1, previous[i + 1] = i;
    for (size_t i = 0; i < n; i++) consider(i);
    while (!merges.empty()) {
        const auto [token, begin, end] = merges.top();
        const size_t second = next[begin];
        merges.pop();
        if (second == 0 || second == n || next[second] != end) continue;  // one of them was merged with another
        next[begin] = end;
        previous[end] = begin;
        next[second] = 0;
        consider(begin);
        if (begin > 0) consider(previous[begin]);
    }
    for (size_t i = 0; i < n; i = next[i]) tokens.push_back(token_of.at(word.substr(i, next[i] - i)));
}

// The tokens of a text by a byte pair encoding, as tiktoken's encode_ordinary has them.
static std::vector<int> encode_pairs(const Tokenizer& t, const TokenNumbers& token_of, const std::string& bytes) {
    for (int byte = 0; byte < 256; byte++)
        if (const char c = byte; !token_of.contains({&c, 1}))
            die("%s: cannot encode text: its tokens are neither characters nor a byte pair encoding; byte %d is not "
                "among them", t.path.c_str(), byte);
    Utf8Stream stream;
    stream.put(bytes);
    stream.finish();
    const std::string& text = stream.ready;
    const bool ascii = std::all_of(text.begin(), text.end(), [](char c) { return (uint8_t)c < 0x80; });
    if (!ascii && t.appendix == t.content.size())
        die("%s: does not say which characters beyond ASCII are letters; prepare.py --tokenizer %s writes a file that "
            "does", t.path.c_str(), shell_word(t.path).c_str());
    const CharacterClasses classes = character_classes(t);
    std::vector<int> tokens;
    for (size_t at = 0, end; at < text.size(); at = end) {
        end = word_end(classes, text, at);
        encode_word(tokens, token_of, std::string_view(text).substr(at, end - at));
    }
    return tokens;
}

static std::vector<int> encode(const Tokenizer& t, const std::string& text) {
    if (!t.known()) die("a prompt needs a tokenizer: name one with --tokenizer, or use --prompt-tokens");
    TokenNumbers token_of;  // the first of equal tokens counts
    bool characters = true;
    for (size_t i = 0; i < t.tokens.size(); i++) {
        const std::string& token = t.tokens[i];
        if ((int)i == t.end_of_text) continue;  // in a prompt, its letters are text
        characters &= token.size() == 1 || token.size() == utf8_length(token[0]);
        token_of.emplace(token, i);
    }
    if (!characters) return encode_pairs(t, token_of, text);
    std::vector<int> tokens;
    for (size_t at = 0; at < text.size();) {
        std::string_view part = std::string_view(text).substr(at, 4);  // the longest match, of at most a character
        while (!part.empty() && !token_of.contains(part)) part.remove_suffix(1);
        if (part.empty()) {
            std::string character = text.substr(at, std::max<size_t>(1, utf8_length(text[at])));
            die("the prompt's '%s' at byte %zu is not in the vocabulary of %s", character.c_str(), at, t.path.c_str());
        }
        tokens.push_back(token_of.at(part));
        at += part.size();
    }
    return tokens;
}

// --------------------------------------------------------------------------------------------------------------------
// Data
//
// A shard is a file of uint16 tokens. A window is T+1 of them: T inputs and, shifted by one, T targets. The windows of
// a shard have stride T, so each target is trained on once per epoch.
//
// Each epoch shuffles the order of the shards, and for each shard the phase of its windows (where they begin, 0 to T-1)
// and their order. All of this follows from (seed, epoch, shard), so a position in the data is two numbers, (epoch,
// windows taken), and resuming is exact. A second thread reads the next shard while the current one is used, so a step
// never waits for the disk. Shards are not mapped into memory: truncating a mapped file would crash the program.

// Random numbers: splitmix64, a counter passed through a mixing function (Steele, Lea and Flood 2014). The whole state
// is one integer, so each use and step can have a stream of its own.
struct Random {
    uint64_t state;

    uint64_t next() {
        uint64_t z = (state += 0x9e3779b97f4a7c15);
        z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9;
        z = (z ^ (z >> 27)) * 0x94d049bb133111eb;
        return z ^ (z >> 31);
    }
    double uniform() { return (double)(next() >> 11) * 0x1p-53; }                            // [0, 1)
    uint64_t below(uint64_t n) { return (uint64_t)(((unsigned __int128)next() * n) >> 64); }  // 0 .. n-1
    double normal() {                                                                        // N(0, 1), Box-Muller
        double radius = sqrt(-2.0 * log(1.0 - uniform()));
        return radius * cos(2.0 * M_PI * uniform());
    }
};

// Separate streams of random numbers for separate uses, so that none depends on how many numbers another has drawn.
enum RandomUse { INITIAL_VALUES, SHARD_ORDER, WINDOW_ORDER, SAMPLES };
static Random random_stream(uint64_t seed, RandomUse use, uint64_t a = 0, uint64_t b = 0) {
    Random r = {seed};
    for (uint64_t word : {(uint64_t)use, a, b}) r.state = r.next() ^ word;
    return {r.next()};
}

// The numbers 0 .. n-1 in random order (Fisher and Yates).
static std::vector<uint32_t> permutation(size_t n, Random& r) {
    std::vector<uint32_t> v(n);
    for (size_t i = 0; i < n; i++) v[i] = i;
    for (size_t i = n; i > 1; i--) std::swap(v[i - 1], v[r.below(i)]);
    return v;
}

struct Shard {
    std::string path, fingerprint;
    size_t begin;      // byte offset of its first token
    size_t tokens;
    size_t first = 0;  // index in the file of its first token, if it is a part of a file
};

// Number of windows from token `phase` on.
static size_t window_count(const Shard& s, size_t T, size_t phase) { return (s.tokens - 1 - phase) / T; }

static size_t window_count(const std::vector<Shard>& shards, size_t T) {
    size_t n = 0;
    for (const Shard& s : shards) n += window_count(s, T, 0);
    return n;
}

static std::string shards_text(const std::vector<Shard>& shards) {
    size_t tokens = 0;
    for (const Shard& s : shards) tokens += s.tokens;
    return plural(shards.size(), "shard") + ", " + commas(tokens) + " tokens";
}

// Dies if the file has a header of another kind, or is something that can be no headerless shard.
static void check_headerless(const char* name, size_t size, const Header& header) {
    for (auto [magic, kind] : {std::pair(MODEL_MAGIC, "a model"), {DUMP_MAGIC, "a debug state"},
                               {TOKENIZER_MAGIC, "a tokenizer"}, {EVAL_MAGIC, "a file of questions"},
                               {LLAMA_SHARD_MAGIC, "a shard of uint32 tokens"}})
        if (header[0] == magic) die("%s: is %s, not a shard of uint16 tokens", name, kind);
    const char *begin = (const char*)header.data(), *end = begin + std::min(size, HEADER_BYTES);
    if (std::all_of(begin, end, [](char c) { return (c >= ' ' && c <= '~') || (c >= '\t' && c <= '\r'); }))
        die("%s: looks like text; make shards from it with data_prep/prepare.py", name);
    // 1,012 zero bytes are unlikely tokens, but they end each kind of header.
    bool zeros = std::all_of(header.begin() + 3, header.end(), [](int x) { return x == 0; });
    if (size >= HEADER_BYTES && zeros) die("%s: not a shard: it begins with %d, not %d", name, header[0], SHARD_MAGIC);
    if (size % 2 != 0) die("%s: not a shard: no header, and an odd number of bytes", name);
    bool wide = std::all_of(header.begin(), header.end(), [](int x) { return x >= 0 && x < 1 << 16; });
    if (size >= HEADER_BYTES && wide) die("%s: not a shard: each second token is 0, as in tokens of 32 bits", name);
}

// Dies if a folder with shards is not as its gpt2x3_manifest.txt says: a line for each file, "NAME FINGERPRINT".
// prepare.py writes it last; folders of other programs have none.
static void check_manifest(const std::string& folder, const std::vector<std::string>& shards) {
    const std::string path = folder + "/gpt2x3_manifest.txt";
    auto refuse = [&](const std::string& file, const char* fault) {
        die("%s %s; run prepare.py again, or remove %s to use what is there", file.c_str(), fault, path.c_str());
    };
    if (!exists(path)) return;
    const std::vector<std::string> lines = split(read_whole(open_file(path)), '\n');
    if (lines[0] == "incomplete") refuse(folder, "is incomplete: prepare.py was stopped while it moved files");
    if (lines[0] != "gpt2x3 manifest 1" || !lines.back().empty()) refuse(path, "is damaged");
    std::vector<std::string> names;
    for (size_t i = 1; i + 1 < lines.size(); i++) {
        InputFile f;
        names.push_back(split(lines[i], ' ')[0]);
        if (!try_open(f, folder + "/" + names.back()).empty()) refuse(f.path, "is missing");
        if (names.back() + " " + fingerprint(f) != lines[i]) refuse(f.path, "is not what prepare.py wrote");
        close(f.fd);
    }
    for (const std::string& shard : shards) {
        const bool listed = std::count(names.begin(), names.end(), shard.substr(shard.rfind('/') + 1)) > 0;
        if (!listed && folder_of(shard) == folder)
            die("%s is not one of prepare.py's shards; name only those, as in '%s/val_*.bin'; %s lists them",
                shard.c_str(), folder.c_str(), path.c_str());
    }
}

static std::vector<Shard> open_shards(const char* option, const std::vector<std::string>& paths, int T) {
    std::vector<Shard> shards;
    const std::vector<std::string> all = with_targets(paths);
    for (size_t i = 0; i < all.size(); i++)
        if (i == 0 || folder_of(all[i]) != folder_of(all[i - 1])) check_manifest(folder_of(all[i]), all);
    size_t headerless = 0;
    for (const std::string& path : paths) {
        const char* name = path.c_str();
        InputFile f = open_file(path);
        Header header = {};
        if (f.size == 0) die("%s: is empty", name);
        must_read_at(f, 0, header.data(), std::min(f.size, HEADER_BYTES));
        Shard s = {.path = path, .fingerprint = fingerprint(f), .begin = 0, .tokens = f.size / 2};
        close(f.fd);
        if (s.fingerprint.empty()) die("%s: cannot be read to its end: the disk fails", name);
        if (header[0] == SHARD_MAGIC) {
            if (header[1] != 1) die("%s: shard version %d is unknown; only 1 is supported", name, header[1]);
            s.begin = HEADER_BYTES;
            s.tokens = (uint32_t)header[2];
            size_t bytes = HEADER_BYTES + 2 * s.tokens;
            if (f.size != bytes) die("%s: damaged: %zu bytes, but its header says %zu", name, f.size, bytes);
        } else {
            check_headerless(name, f.size, header);
            headerless++;
        }
        if (s.tokens > (size_t)T) shards.push_back(s);
        else printf("left out: %s, %zu tokens; a window takes %d\n", escaped(path).c_str(), s.tokens, T + 1);
    }
    if (shards.empty())
        die("--%s: no shard has the %d tokens of a window; use more text, or a smaller --sequence", option, T + 1);
    if (headerless > 0)
        printf("headerless: %zu of %zu files of --%s, read as plain uint16 tokens\n", headerless, paths.size(), option);
    return shards;
}

// Splits a window's T+1 tokens into inputs x and targets y. The window begins at token `at` of the shard.
static void split_window(int* x, int* y, const uint16_t* tokens, int T, int V, const Shard& s, size_t at) {
    for (int t = 0; t <= T; t++) {
        if (tokens[t] >= V)
            die("%s: token %zu (at byte %zu) is %d, outside the vocabulary of %d: is it another tokenizer's?",
                s.path.c_str(), s.first + at + t, s.begin + 2 * (at + t), tokens[t], V);
        if (t < T) x[t] = tokens[t];
        if (t > 0) y[t - 1] = tokens[t];
    }
}

// Long shards are trained on in parts, which bounds the memory that two of them take.
constexpr size_t LONGEST_PART = 1 << 26;  // tokens
static std::vector<Shard> split_shards(const std::vector<Shard>& shards) {
    std::vector<Shard> parts;
    for (const Shard& s : shards) {
        size_t n = ceil_div(s.tokens, LONGEST_PART);
        for (size_t i = 0; i < n; i++) {
            size_t first = s.tokens / n * i, last = i + 1 < n ? s.tokens / n * (i + 1) : s.tokens;
            parts.push_back({s.path, s.fingerprint, s.begin + 2 * first, last - first, first});
        }
    }
    return parts;
}

// A shard in memory, with its windows in the order in which an epoch takes them.
struct LoadedShard {
    std::vector<uint16_t> tokens;
    std::vector<uint32_t> order;
    size_t phase = 0;   // token at which window 0 begins
    std::string error;  // what went wrong, or ""
};

// The first number of a shard's stream in an epoch: where its windows begin. The stream then shuffles them.
static size_t window_phase(const Shard& s, size_t T, Random& r) { return r.below(std::min(T, s.tokens - T)); }

// Runs in a second thread, so errors are returned.
static LoadedShard load_shard(Shard s, size_t index, size_t T, uint64_t seed, uint64_t epoch) {
    LoadedShard loaded;
    Random r = random_stream(seed, WINDOW_ORDER, epoch, index);
    loaded.phase = window_phase(s, T, r);
    loaded.order = permutation(window_count(s, T, loaded.phase), r);
    loaded.tokens.resize(s.tokens);
    InputFile f;
    loaded.error = try_open(f, s.path);
    if (loaded.error.empty() && fingerprint(f) != s.fingerprint) loaded.error = "has changed since the program started";
    if (loaded.error.empty() && !read_at(f, s.begin, loaded.tokens.data(), 2 * s.tokens))
        loaded.error = "cannot be read to its end: it was truncated, or the disk fails";
    if (f.fd >= 0) close(f.fd);
    return loaded;
}

struct Loader {
    std::vector<Shard> shards = {};
    int T = 0, V = 0;
    uint64_t seed = 0;
    uint64_t epoch = 0, position = 0;  // position: windows taken in this epoch
    size_t shard = 0, taken = 0;       // the current shard; windows taken from it
    LoadedShard current = {};
    std::future<LoadedShard> next = {};
};

// The shard that window `position` of an epoch belongs to, and which of its windows this is; nothing past the end
static std::optional<std::pair<size_t, size_t>> find_window(const Loader& l, uint64_t epoch, uint64_t position) {
    Random shard_order = random_stream(l.seed, SHARD_ORDER, epoch);
    for (size_t shard : permutation(l.shards.size(), shard_order)) {
        const Shard& s = l.shards[shard];
        Random r = random_stream(l.seed, WINDOW_ORDER, epoch, shard);
        const size_t windows = window_count(s, l.T, window_phase(s, l.T, r));
        if (position < windows) return {{shard, position}};
        position -= windows;
    }
    return {};
}

// Makes the shard current that the next window belongs to, and begins to read the one after it.
static void use_shard(Loader& l) {
    const auto place = find_window(l, l.epoch, l.position);
    if (!place) die("the checkpoint's position is past the end of the data: these are other shards");
    std::tie(l.shard, l.taken) = *place;
    l.current = l.next.valid() ? l.next.get() : load_shard(l.shards[l.shard], l.shard, l.T, l.seed, l.epoch);
    if (!l.current.error.empty()) die("%s: %s", l.shards[l.shard].path.c_str(), l.current.error.c_str());
    uint64_t epoch = l.epoch;
    auto after = find_window(l, epoch, l.position + l.current.order.size() - l.taken);
    if (!after) after = find_window(l, ++epoch, 0);
    const auto policy = std::launch::async | std::launch::deferred;  // deferred, to get(), if no thread can be started
    l.next = std::async(policy, load_shard, l.shards[after->first], after->first, l.T, l.seed, epoch);
}

// Takes the next B windows: x, y (B, T).
static void loader_batch(Loader& l, int* x, int* y, int B) {
    for (int b = 0; b < B; b++, x += l.T, y += l.T) {
        size_t at = l.current.phase + (size_t)l.current.order[l.taken] * l.T;
        split_window(x, y, &l.current.tokens[at], l.T, l.V, l.shards[l.shard], at);
        l.position++;
        if (++l.taken < l.current.order.size()) continue;
        if (!find_window(l, l.epoch, l.position)) l.epoch++, l.position = 0;
        use_shard(l);
    }
}

// Memory that two loaded shards take at most.
static size_t loader_bytes(const std::vector<Shard>& shards, size_t T) {
    const Shard& longest = *std::ranges::max_element(shards, {}, &Shard::tokens);
    return 2 * (sizeof(uint16_t) * longest.tokens + sizeof(uint32_t) * window_count(longest, T, 0));
}

// Reads window i of all windows of the shards, in order from token 0 of each, as validation takes them: x, y (T).
static void read_window(const std::vector<Shard>& shards, size_t i, int* x, int* y, int T, int V) {
    const Shard* s = shards.data();
    for (; i >= window_count(*s, T, 0); s++) i -= window_count(*s, T, 0);
    std::vector<uint16_t> tokens(T + 1);
    InputFile f = open_file(s->path);
    must_read_at(f, s->begin + 2 * i * T, tokens.data(), 2 * tokens.size());
    close(f.fd);
    split_window(x, y, tokens.data(), T, V, *s, i * T);
}

// --------------------------------------------------------------------------------------------------------------------
// Models and checkpoints
//
//     header    256 int32: [0] magic, [1] version, [7] Vp, [8] attention, the config_settings at their indices;
//               [255] is 1 if a trailer ends the file. Versions 3 (fp32) and 5 (bf16) are llm.c's, for vanilla; other
//               attentions have 1003 and 1005, so that llm.c refuses them instead of running them as vanilla
//     tensors   in the order of tensor_table
//     state     checkpoints only: uint64 n; n bytes of "name\0value\0" pairs; AdamW's moments m, then v, fp32
//     trailer   uint32 magic, CRC-32 of header and tensors, CRC-32 of the state; uint64 length of the whole file
//
// Weights and state share one file, so they cannot disagree. Values are copied chunk by chunk.

static size_t chunk_values = 1 << 20;  // values copied at a time; the tests set it lower
struct [[gnu::packed]] Trailer {
    uint32_t magic = TRAILER_MAGIC, weights_crc = 0, state_crc = 0;
    uint64_t length = 0;
};

static std::string config_text(const Config& c) {
    return format("%s, %s, %d channels, context %d, vocabulary %d (padded to %d)", plural(c.L, "layer").c_str(),
                  plural(c.NH, "head").c_str(), c.C, c.maxT, c.V, c.Vp);
}

static std::string attention_text(const Config& c) {  // "NAME SETTINGS: what it does"
    if (c.attention == SKIP) {
        const std::string name = format("skip %d/%d: ", c.skip_distance, c.skip_heads);
        if (c.skip_distance >= c.L || c.skip_heads == 0) return name + "no head skips, so this is vanilla";
        return name + format("in layers l >= %d, %d of %d heads read the keys and values of layer l - %d",
                             c.skip_distance, c.skip_heads, c.NH, c.skip_distance);
    }
    if (c.attention == DEPTH) {
        const std::string name = format("depth %d/%d: ", c.depth_stride, c.depth_window);
        if (c.L == 1) return name + "one layer has none below it, so this is vanilla";
        std::string window = c.depth_window > 0 ? format(", and of the last %d", c.depth_window) : "";
        return name + format("each layer mixes in the values of layers 0, %d, ... below it", c.depth_stride) + window;
    }
    return attention_names[c.attention];
}

static bool applies(const Setting& s, int attention) { return s.attention == SHAPE || s.attention == attention; }

// What is wrong with a Config, or "".
static std::string config_error(const Config& c) {
    if (c.attention < 0 || c.attention >= (int)std::size(attention_names))
        return format("there is no attention %d", c.attention);
    for (const Setting& s : config_settings) {
        int value = c.*s.field;
        if (applies(s, c.attention) && (value < s.low || value > s.high))
            return format("%s is %d, but must be from %d to %d", s.name, value, s.low, s.high);
    }
    if (c.C % c.NH != 0) return format("%d channels are not a multiple of %d heads", c.C, c.NH);
    if (c.Vp != (int)round_up(c.V, 128)) return format("a vocabulary of %d is padded to %d", c.V, c.Vp);
    if (c.attention == SKIP && c.skip_heads > c.NH)
        return format("skip-heads is %d, but the model has only %s", c.skip_heads, plural(c.NH, "head").c_str());
    return "";
}

struct ModelFile {
    InputFile file = {};
    Config config = {};
    int version = 0;
    size_t value_bytes = 0;  // 4, or 2 for bf16
    size_t values = 0;
    size_t state_bytes = 0;  // 0: weights only
};

static size_t state_begin(const ModelFile& m) { return HEADER_BYTES + m.values * m.value_bytes; }

// Dies if the file is not what was once written.
static void verify_model(const ModelFile& m) {
    const char* name = m.file.path.c_str();
    auto part_crc = [&](size_t begin, size_t end) {
        std::vector<uint8_t> buffer(chunk_values);
        uint32_t crc = 0;
        for (size_t n; begin < end; begin += n) {
            n = std::min(end - begin, buffer.size());
            must_read_at(m.file, begin, buffer.data(), n);
            crc = crc32(crc, buffer.data(), n);
        }
        return crc;
    };
    Trailer t;
    const size_t end = m.file.size - sizeof t;
    must_read_at(m.file, end, &t, sizeof t);
    if (t.magic != TRAILER_MAGIC || t.length != m.file.size) die("%s: truncated: it has no trailer at its end", name);
    if (part_crc(0, state_begin(m)) != t.weights_crc) die("%s: damaged: wrong checksum of the weights", name);
    if (part_crc(state_begin(m), end) != t.state_crc) die("%s: damaged: wrong checksum of the training state", name);
}

// Opens a model or a checkpoint, and checks its header and, if there is a trailer, its content.
static ModelFile open_model(const std::string& path) {
    const char* name = path.c_str();
    ModelFile m = {.file = open_file(path)};
    Header h;
    if (m.file.size < HEADER_BYTES) die("%s: not a model: %zu bytes are less than a header", name, m.file.size);
    must_read_at(m.file, 0, h.data(), HEADER_BYTES);
    if (h[0] != MODEL_MAGIC)
        die("%s: not a model: it begins with %d, not %d; data_prep/convert.py takes other programs'", name, h[0],
            MODEL_MAGIC);
    m.version = h[1];
    const bool vanilla = m.version == 3 || m.version == 5;
    if (!vanilla && m.version != 1003 && m.version != 1005)
        die("%s: model version %d is unknown; 3, 5, 1003 and 1005 are supported", name, m.version);
    m.value_bytes = m.version % 1000 == 5 ? 2 : 4;
    m.config.Vp = h[7];
    m.config.attention = h[8];
    for (const Setting& s : config_settings)
        if (applies(s, m.config.attention)) m.config.*s.field = h[s.header];
    std::string error = config_error(m.config);
    if (vanilla != (m.config.attention == VANILLA)) error = format("version %d with attention %d", h[1], h[8]);
    if (!error.empty()) die("%s: damaged header: %s", name, error.c_str());

    m.values = parameter_count(m.config);
    const bool trailer = h[255] != 0;  // llm.c's files have none
    size_t least = state_begin(m) + (trailer ? sizeof(Trailer) : 0);
    if (m.file.size < least || (!trailer && m.file.size != least))
        die("%s: truncated or damaged: %zu bytes, but its header says %zu", name, m.file.size, least);
    if (trailer) verify_model(m);
    m.state_bytes = m.file.size - least;
    return m;
}

static bool finite(const std::vector<float>& values, size_t n) {
    return std::all_of(values.begin(), values.begin() + n, [](float x) { return std::isfinite(x); });
}

// Copies values from a byte offset of the file to the model.
static void read_quantity(const ModelFile& m, Model* model, Quantity quantity, size_t offset) {
    std::vector<float> values(std::min(chunk_values, m.values));
    std::vector<uint16_t> halves(m.value_bytes == 2 ? values.size() : 0);
    for (size_t begin = 0; begin < m.values; begin += chunk_values) {
        size_t n = std::min(chunk_values, m.values - begin);
        void* raw = m.value_bytes == 2 ? (void*)halves.data() : (void*)values.data();
        must_read_at(m.file, offset + begin * m.value_bytes, raw, n * m.value_bytes);
        if (m.value_bytes == 2)  // bf16 is the upper half of an fp32
            for (size_t i = 0; i < n; i++) values[i] = std::bit_cast<float>((uint32_t)halves[i] << 16);
        if (!finite(values, n))
            die("%s: holds infinite values or NaN: its training failed, or it is damaged", m.file.path.c_str());
        model_put(model, quantity, begin, n, values.data());
    }
}

// Random initial parameters, which depend only on the seed and the shape: blocks of 2^16 values have a stream each.
static void initialize_parameters(Model* model, const Config& c, uint64_t seed) {
    constexpr size_t BLOCK = 1 << 16;
    std::vector<float> values(std::min(chunk_values, parameter_count(c)));
    TensorTable table = tensor_table(c);
    for (int i = 0; i < TENSORS; i++) {
        const Tensor& t = table[i];
        size_t live = i == WTE ? (size_t)c.V * c.C : t.size();  // the padding rows of wte are 0
        for (size_t begin = 0; begin < t.size(); begin += chunk_values) {
            size_t n = std::min(chunk_values, t.size() - begin);
            host_parallel_for(ceil_div(n, BLOCK), [&](size_t block) {
                const size_t first = block * BLOCK;
                Random r = random_stream(seed, INITIAL_VALUES, i, begin + first);
                for (size_t j = first; j < std::min(n, first + BLOCK); j++) {
                    double value = t.mean + (t.deviation > 0 ? t.deviation * r.normal() : 0);
                    values[j] = begin + j < live ? value : 0;
                }
            });
            model_put(model, PARAMETERS, t.offset + begin, n, values.data());
        }
    }
}

// What a checkpoint remembers besides weights and moments: the run's progress, its shards, its options.
using State = std::map<std::string, std::string>;

static void write_quantity(OutputFile& f, const Model* model, Quantity quantity, size_t total) {
    std::vector<float> values(std::min(chunk_values, total));
    for (size_t begin = 0; begin < total; begin += chunk_values) {
        size_t n = std::min(chunk_values, total - begin);
        model_get(model, quantity, begin, n, values.data());
        if (!finite(values, n))
            die_writing(f, "the weights became infinite or NaN (try a lower --lr or a longer --warmup)");
        write_file(f, values.data(), n * sizeof(float));
    }
}

static void write_checkpoint(const std::string& path, const Model* model, const Config& c, const State& state) {
    OutputFile f = create_file(path);
    Header h = {};
    h[0] = MODEL_MAGIC;
    h[1] = c.attention == VANILLA ? 3 : 1003;
    h[7] = c.Vp;
    h[8] = c.attention;
    for (const Setting& s : config_settings)
        if (s.attention == SHAPE || c.attention != VANILLA) h[s.header] = c.*s.field;
    h[255] = 1;
    write_file(f, h.data(), HEADER_BYTES);
    const size_t total = parameter_count(c);
    write_quantity(f, model, PARAMETERS, total);
    Trailer trailer = {.weights_crc = f.crc};

    f.crc = 0;
    std::string text;
    for (const auto& [name, value] : state) text += name + '\0' + value + '\0';
    uint64_t n = text.size();
    write_file(f, &n, 8);
    write_file(f, text.data(), n);
    write_quantity(f, model, MOMENT1, total);
    write_quantity(f, model, MOMENT2, total);
    trailer.state_crc = f.crc;
    trailer.length = f.size + sizeof trailer;
    write_file(f, &trailer, sizeof trailer);
    commit_file(f);
}

// The state of a checkpoint without the moments; empty if there is none.
static State read_state(const ModelFile& m) {
    if (m.state_bytes == 0) return {};
    uint64_t n = 0;
    if (m.state_bytes >= 8) must_read_at(m.file, state_begin(m), &n, 8);
    if (m.state_bytes < 8 || n > m.state_bytes || m.state_bytes != 8 + n + 8 * m.values || m.value_bytes != 4)
        die("%s: damaged: %zu bytes after the weights are no training state", m.file.path.c_str(), m.state_bytes);
    std::string text(n, '\0');
    must_read_at(m.file, state_begin(m) + 8, text.data(), n);
    std::vector<std::string> words = split(text, '\0');
    State state;
    for (size_t i = 0; i + 1 < words.size(); i += 2) state[words[i]] = words[i + 1];
    return state;
}

// The tokenizer that was named, or lies beside the model, or beside the shards. All that are found must be equal, and
// equal to the one that the model was trained with.
static Tokenizer find_tokenizer(const std::string& named, const std::optional<ModelFile>& model,
                                const std::vector<std::string>& shard_paths) {
    const std::vector<std::string> shards = with_targets(shard_paths);
    State state = model ? read_state(*model) : State{};
    const std::string expected = state["tokenizer"];
    std::vector<std::string> paths;
    if (model && (named.empty() || expected.empty())) add_tokenizer_beside(paths, model->file.path);
    // What lies beside a checkpoint of step 0 may be of the run that it overwrites.
    if (state.contains("overwrites") && !paths.empty() && read_tokenizer(paths[0]).crc != expected) paths.clear();
    if (!named.empty()) paths.push_back(named);
    for (size_t i = 0; i < shards.size(); i++)
        if (i == 0 || folder_of(shards[i]) != folder_of(shards[i - 1])) add_tokenizer_beside(paths, shards[i]);
    Tokenizer first;
    for (const std::string& path : paths) {
        const Tokenizer t = read_tokenizer(path);
        if (first.known() && t.crc != first.crc)
            die("%s and %s are different tokenizers; make the second's shards anew, with prepare.py --tokenizer %s",
                first.path.c_str(), path.c_str(), shell_word(first.path).c_str());
        if (!expected.empty() && t.crc != expected)
            die("%s was trained with another tokenizer than %s; %s", model->file.path.c_str(), path.c_str(),
                path == named ? "leave out --tokenizer, or name its own"
                : folder_of(path) == folder_of(model->file.path) ? "name its own with --tokenizer"
                : "make the shards anew, with prepare.py --tokenizer and the model's own");
        if (!first.known()) first = t;
    }
    if (!first.known()) first.crc = expected;
    return first;
}

// --------------------------------------------------------------------------------------------------------------------
// From options to a model

static const std::map<std::string, std::tuple<int, int, int>> shapes = {  // layers, heads, channels
    {"gpt2", {12, 12, 768}}, {"gpt2-medium", {24, 16, 1024}},
    {"gpt2-large", {36, 20, 1280}}, {"gpt2-xl", {48, 25, 1600}}};

static bool is_file(const std::string& model) { return !model.empty() && !shapes.contains(model); }

// Opens --model, which must be a file.
static ModelFile open_weights(const Options& o, const char* command) {
    const char* name = o.model.c_str();
    if (o.model.empty()) die("%s needs --model FILE, a model that train wrote", command);
    if (shapes.contains(o.model)) die("--model %s is a shape without weights; %s needs a model file", name, command);
    if (!exists(o.model) && errno == ENOENT)
        die("--model %s: no such file, nor a shape like gpt2 or gpt2-xl%s", name,
            exists(folder_of(o.model) + "/model.bin") ? "; the newest checkpoint there is model.bin" : "");
    return open_model(o.model);
}

// c with an attention. Its settings come from the options, else from the file if it has that attention, else defaults.
static Config with_attention(Config c, int attention, const Options& o, const std::optional<ModelFile>& file) {
    bool same = file && file->config.attention == attention;
    c.attention = attention;
    for (const Setting& s : config_settings) {
        if (s.attention == SHAPE) continue;
        if (o.wanted.*s.field >= s.low) c.*s.field = o.wanted.*s.field;
        else c.*s.field = same && s.attention == attention ? file->config.*s.field : s.initial(c);
    }
    if (std::string error = config_error(c); !error.empty()) die("impossible model: %s", error.c_str());
    return c;
}

// The Config on which file, options and tokenizer agree. Sets the options that were not given. Settings of attentions
// other than the chosen one are refused, unless the command compares all attentions.
static Config configure(Options& o, const std::optional<ModelFile>& file, const Tokenizer& tokenizer,
                        bool all_attentions = false) {
    Config c;
    if (file) c = file->config;
    else if (shapes.contains(o.model)) std::tie(c.L, c.NH, c.C) = shapes.at(o.model);
    if (!file && tokenizer.known()) c.V = tokenizer.tokens.size();
    for (const Setting& s : config_settings) {
        int &field = c.*s.field, &wanted = o.wanted.*s.field;
        if (s.attention != SHAPE) continue;
        if (wanted < s.low) wanted = field;
        if (file && wanted != field)
            die("--%s %d contradicts %s, where it is %d", s.name, wanted, file->file.path.c_str(), field);
        field = wanted;
    }
    c.Vp = round_up(c.V, 128);
    if (tokenizer.known() && tokenizer.tokens.size() != (size_t)c.V)
        die("%s has %zu tokens, but the model's vocabulary is %d: shards made with it are not for this model",
            tokenizer.path.c_str(), tokenizer.tokens.size(), c.V);

    if (o.attention < 0) o.attention = c.attention;
    c = with_attention(c, o.attention, o, file);
    for (const Setting& s : config_settings)
        if (applies(s, c.attention)) o.wanted.*s.field = c.*s.field;
        else if (o.wanted.*s.field >= s.low && !all_attentions)
            die("--%s needs --attention %s", s.name, attention_names[s.attention]);

    if (o.sequence < 1) o.sequence = c.maxT;
    if (o.sequence > c.maxT) die("--sequence %d is longer than the model's context, %d", o.sequence, c.maxT);
    if ((size_t)o.batch * o.sequence > 1 << 26)
        die("--batch %d x --sequence %d is more than 2^26 tokens at a time", o.batch, o.sequence);
    return c;
}

// Floating-point operations per token, forward and backward. A multiply-add counts as two; backward is two matmuls for
// each one of forward; causal attention reads T/2 keys and values on average.
static double flops_per_token(const Config& c, int T) {
    double L = c.L, C = c.C, V = c.V;
    double flops = 6 * (V * C + 12 * L * C * C) + 6 * L * C * T;
    for (int l = 0; l < c.L; l++) {
        flops -= 6 * 2 * (C - kv_channels(c, l)) * C;  // keys and values that no layer reads are not projected
        size_t sources = depth_source_count(c, l);
        if (sources > 0) flops += 12 * C * (sources + 1);
    }
    return flops;
}

// Memory that the model will allocate. If that and `others` bytes are not free, dies and names the largest batch that
// fits, which divides `sequences` unless that is 0.
static Memory check_memory(const Config& c, int precision, Workload work, size_t others = 0, int sequences = 0) {
    auto needed = [&] { return model_memory(c, precision, work).total() + others; };
    const size_t free = device_free_memory();
    if (needed() <= free) return model_memory(c, precision, work);
    std::string line = format("this needs %s of memory, but only %s are free", mebibytes(needed()).c_str(),
                              mebibytes(free).c_str());
    if (work.B == 0) die("%s: use a smaller model", line.c_str());
    do work.B--;
    while (work.B > 0 && (sequences % work.B != 0 || needed() > free));
    if (work.B == 0) die("%s: not even --batch 1 fits; use a smaller --sequence or model", line.c_str());
    die("%s: the largest --batch that fits is %d", line.c_str(), work.B);
}

static Model* load_model(const ModelFile& file, const Config& c, const Options& o, const Workload& work) {
    check_memory(c, o.precision, work);
    Model* model = model_create(c, o.precision, work);
    read_quantity(file, model, PARAMETERS, HEADER_BYTES);
    return model;
}

// --------------------------------------------------------------------------------------------------------------------
// Loss on a validation set

static std::atomic<int> interrupts{0};  // number of signals that asked the program to stop

static bool on_terminal() { return processes == 1 && isatty(STDOUT_FILENO); }  // mpirun passes lines on

// Prints a line of progress. On a terminal, the next line is drawn over it unless it stays.
static void show_line(const std::string& text, bool stays) {
    if (!on_terminal()) {
        printf("%s\n", text.c_str());
    } else {
        winsize window = {};
        bool known = ioctl(STDOUT_FILENO, TIOCGWINSZ, &window) == 0 && window.ws_col > 3;
        int width = known && !stays ? window.ws_col - 3 : text.size();  // a line that wraps could not be drawn over
        printf("\r\x1b[K%.*s%s", width, text.c_str(), stays ? "\n" : "");
    }
    fflush(stdout);
}

// Computes the losses of windows 0 ... n-1, of T tokens and targets, B at a time: read(i, x, y) sets those of window i,
// take(i, y, losses) gets their losses. Processes take turns.
static void for_each_window(Model* model, size_t n, const char* name, auto read, auto take) {
    const size_t B = model->work.B, T = model->work.T;
    std::vector<int> x(B * T), y(B * T);
    std::vector<float> losses(B * T);
    double shown = seconds();
    for (size_t first = process * B; first < n; first += processes * B) {
        const size_t count = std::min(B, n - first);  // of the last batch, other rows do not count
        for (size_t b = 0; b < count; b++) read(first + b, &x[b * T], &y[b * T]);
        model_set_inputs(model, x.data(), y.data());
        model_forward(model, false, 1);
        model_token_losses(model, losses.data());
        for (size_t b = 0; b < count; b++) take(first + b, &y[b * T], &losses[b * T]);
        if (!on_terminal() || seconds() < shown + 0.1) continue;
        show_line(format("%s: %zu of %zu", name, first + count, n), false);
        shown = seconds();
    }
    // So that these forwards do not count in the next training loss; a process may have had none
    if (model->loss_count > 0) model_loss(model);
}

struct Evaluation {
    double loss = 0;     // mean cross-entropy, nats per token
    double entropy = 0;  // of the tokens' frequencies: the loss of the best prediction without context
    size_t tokens = 0, bytes = 0;
    std::vector<double> by_position = {};  // (T) mean loss of the tokens predicted from 1, 2, ... T tokens
    std::vector<std::vector<double>> depth_weights = {};  // (L, |S_l|+1, NH) mean weights, if they were asked for
};

// The loss over all windows, or over as many as have --val-tokens, spread evenly.
static Evaluation evaluate(Model* model, const Config& c, const std::vector<Shard>& shards, const Options& o,
                           const Tokenizer& tokenizer) {
    const size_t T = o.sequence, all = window_count(shards, T);
    const size_t total = o.val_tokens > 0 ? std::clamp<size_t>(o.val_tokens / T, 1, all) : all;
    for (const Shard& s : shards) {
        InputFile f = open_file(s.path);
        if (fingerprint(f) != s.fingerprint) die("%s: has changed since the program started", s.path.c_str());
        close(f.fd);
    }
    Evaluation e = {.tokens = total * T, .by_position = std::vector<double>(T)};
    std::vector<uint32_t> counts(c.V);
    if (!o.depth_weights.empty())
        for (int l = 0; l < c.L; l++) e.depth_weights.emplace_back((depth_source_count(c, l) + 1) * c.NH);
    auto read = [&](size_t i, int* x, int* y) { read_window(shards, i * all / total, x, y, T, c.V); };
    for_each_window(model, total, "validation windows", read, [&](size_t i, const int* y, const float* losses) {
        for (size_t t = 0; t < T; t++) {
            e.loss += losses[t];
            e.by_position[t] += losses[t] / total;
            counts[y[t]]++;
        }
        for (size_t l = 1; l < e.depth_weights.size(); l++) {
            const std::vector<float> a = model_depth_weights(model, l, i % o.batch);
            const size_t weights = e.depth_weights[l].size();  // of a token
            for (size_t k = 0; k < a.size(); k++) e.depth_weights[l][k % weights] += a[k] / (total * T);
        }
    });
    e.loss = sum_all(e.loss) / e.tokens;
    sum_in_process_0(counts.data(), c.V);
    for (int i = 0; i < c.V; i++) {
        double p = (double)counts[i] / e.tokens;
        if (p > 0) e.entropy -= p * log(p);
        if (tokenizer.known() && i != tokenizer.end_of_text) e.bytes += (size_t)counts[i] * tokenizer.tokens[i].size();
    }
    return e;
}

// --------------------------------------------------------------------------------------------------------------------
// HellaSwag and its like: which of several endings continues a text? (Zellers et al. 2019)
//
// The file is llm.c's: the header, [0] magic, [1] version 1, [2] number of questions, and of ours [4] the tokenizer's
// CRC; then each question, in uint16: 65535, its length in bytes, its index, index of the right ending, number of
// endings; n and the n tokens of the context; n and the n tokens of each ending.

struct Ending {
    size_t question;
    bool right;
    std::vector<int> tokens;
    double loss = 0, mean = 0;  // of the tokens: their sum, their mean
};

struct Questions {
    std::vector<std::vector<int>> contexts = {};  // tokens, by question
    std::vector<Ending> endings = {};             // in the order of their questions
};

static Questions read_questions(const std::string& path, int V, const Tokenizer& tokenizer) {
    const char* name = path.c_str();
    const std::string content = read_whole(open_file(path));
    Header h = {};
    memcpy(h.data(), content.data(), std::min(content.size(), HEADER_BYTES));
    if (h[0] != EVAL_MAGIC || h[1] != 1)
        die("%s: holds no questions: it begins with %d and %d, not %d and 1; data_prep/hellaswag.py makes such files",
            name, h[0], h[1], EVAL_MAGIC);
    if (h[4] != 0 && tokenizer.known() && tokenizer.crc != format("%08x", h[4]))
        die("%s: made with another tokenizer than %s; make it anew with that one", name, tokenizer.path.c_str());
    Questions all;
    size_t at = HEADER_BYTES, end = content.size(), question = 0;
    auto next = [&](int low, int high, const char* what) {
        uint16_t value = 0;
        if (at + 2 <= end) memcpy(&value, &content[at], 2);
        if (at + 2 > end || value < low || value > high)
            die("%s: damaged, or another tokenizer's: question %zu, byte %zu: %s must be from %d to %d, but %s", name,
                question, at, what, low, high, at + 2 > end ? "the file ends" : format("is %d", value).c_str());
        at += 2;
        return (int)value;
    };
    auto append = [&](std::vector<int>& tokens) {
        for (int n = next(1, 65534, "a number of tokens"); n > 0; n--) tokens.push_back(next(0, V - 1, "a token"));
    };
    for (; at < end; question++) {
        next(65535, 65535, "a question's first number");
        at += 4;  // its length and index follow from the rest
        const int right = next(0, 65535, "a label"), n = next(right + 1, 65535, "a number of endings");
        append(all.contexts.emplace_back());
        for (int i = 0; i < n; i++) {
            all.endings.push_back({question, i == right, {}});
            append(all.endings.back().tokens);
        }
    }
    if (question == 0 || question != (size_t)h[2])
        die("%s: damaged: %s, but its header says %d", name, plural(question, "question").c_str(), h[2]);
    return all;
}

// Share of the questions whose right ending has the lowest loss
static double accuracy(const Questions& all, double Ending::*loss) {
    std::vector<const Ending*> best(all.contexts.size());
    for (const Ending& e : all.endings)
        if (const Ending*& so_far = best[e.question]; !so_far || e.*loss < so_far->*loss) so_far = &e;
    return (double)std::ranges::count(best, true, &Ending::right) / best.size();
}

// --------------------------------------------------------------------------------------------------------------------
// Generation
//
// Each token is sampled from the model's distribution given all tokens before it, whose keys and values are cached. A
// full cache is emptied, and the last ⌊maxT/2⌋ tokens are read again from position 0.

// How many of the last tokens are read when n follow `cached` others. If there is no room for them, they would, one by
// one, fill the cache and then, in each round, empty it, read the last `half` again and fill it. The last round counts.
static int tokens_to_read(int maxT, int cached, int n) {
    const int room = maxT - cached, half = std::max(1, maxT / 2), round = maxT - half + 1;
    return n <= room ? n : half + (n - room - 1) % round;
}

// Makes tokens that the text already has less likely, as CTRL does (Keskar et al. 2019): their logits l become
// l/penalty where l > 0, else l·penalty.
static void penalize_repetition(std::vector<float>& logits, const std::vector<bool>& seen, double penalty) {
    for (size_t i = 0; i < logits.size(); i++)
        if (seen[i]) logits[i] *= logits[i] > 0 ? 1 / penalty : penalty;
}

// Samples a token from softmax(logits/temperature), restricted to the top_k likeliest, and of these to the likeliest
// that together reach probability top_p.
static int choose_token(const std::vector<float>& logits, const Options& o, Random& r) {
    const int V = logits.size();
    const int best = std::max_element(logits.begin(), logits.end()) - logits.begin();
    if (!finite(logits, V)) die("the model's logits are not finite: its training failed, or it is damaged");
    if (o.temperature == 0) return best;

    struct Candidate {
        double p;  // not normalized
        int token;
    };
    std::vector<Candidate> candidates;
    for (int i = 0; i < V; i++) candidates.push_back({exp((logits[i] - logits[best]) / o.temperature), i});
    auto likelier = [](const Candidate& a, const Candidate& b) { return a.p != b.p ? a.p > b.p : a.token < b.token; };
    if (o.top_k > 0 && o.top_k < V) {
        std::partial_sort(candidates.begin(), candidates.begin() + o.top_k, candidates.end(), likelier);
        candidates.resize(o.top_k);
    }
    double sum = 0;
    for (const Candidate& c : candidates) sum += c.p;
    if (o.top_p < 1) {
        // The last token that is kept and all after it share at least 1 - top_p, and none of them has more than the
        // last, which therefore has at least (1 - top_p)/n. Dropping what has less leaves few tokens to sort.
        double least = (1 - o.top_p) * sum / candidates.size();
        std::erase_if(candidates, [&](const Candidate& c) { return c.p < least; });
        std::sort(candidates.begin(), candidates.end(), likelier);
        double reached = 0;
        size_t n = 0;
        while (n < candidates.size() && (n == 0 || reached < o.top_p * sum)) reached += candidates[n++].p;
        candidates.resize(n);
        sum = reached;
    }
    double left = r.uniform() * sum;
    for (const Candidate& c : candidates) {
        left -= c.p;
        if (left < 0) return c.token;
    }
    return candidates.back().token;  // left >= 0 by rounding
}

// Number of bytes of a text that come before a --stop text, or before what may become one as the text goes on.
static size_t before_stop(const std::string& text, const std::vector<std::string>& stops, bool& stopped) {
    size_t end = text.size();
    for (const std::string& stop : stops) end = std::min(end, text.find(stop));
    stopped = end < text.size();
    for (size_t i = 0; i < end && !stopped; i++)
        for (const std::string& stop : stops)
            if (stop.starts_with(text.substr(i))) return i;
    return end;
}

// Prints the prompt and --tokens more, or fewer if the text ends; returns a line on its speed. The model has one cache.
static std::string generate_text(Model* model, const Config& c, const Options& o, const Tokenizer& tokenizer,
                                 const std::vector<int>& prompt, Random r) {
    Utf8Stream stream;
    std::string held, space;  // bytes that may become a --stop text; what stands before a token's number
    bool stopped = false;
    auto print = [&](const std::string& bytes) {
        stream.put(bytes);
        const std::string text = std::exchange(stream.ready, "");
        const std::string shown = on_terminal() ? escaped(text, "\n\t") : text;
        fwrite(shown.data(), 1, shown.size(), stdout);
        fflush(stdout);
    };
    auto text_of = [&](int token) {
        return tokenizer.known() ? tokenizer.tokens[token] : std::exchange(space, " ") + std::to_string(token);
    };
    std::vector<int> tokens;         // all so far
    std::vector<bool> seen(c.V);     // which of the vocabulary these are
    std::vector<float> logits(c.V);  // of the next token
    auto read = [&](const std::vector<int>& more) {
        const int cached = model->cache_length, n = tokens_to_read(c.maxT, cached, more.size());
        tokens.insert(tokens.end(), more.begin(), more.end());
        for (int token : more) seen[token] = true;
        if (cached + more.size() > (size_t)c.maxT) model_reset_cache(model);
        model_prefill(model, tokens.data() + tokens.size() - n, n, logits.data());
    };

    for (int token : prompt)
        if (token != tokenizer.end_of_text) print(text_of(token));
    model_reset_cache(model);
    const double start = seconds();
    read(prompt);
    const double middle = seconds();
    int made = 0;
    while (made < o.tokens && !stopped && interrupts == 0) {
        penalize_repetition(logits, seen, o.repetition_penalty);
        int token = choose_token(logits, o, r);
        made++;
        if (token == tokenizer.end_of_text && o.stop_at_end) break;
        held += text_of(token);
        const size_t n = before_stop(held, o.stop, stopped);
        print(held.substr(0, n));
        held.erase(0, n);
        if (made < o.tokens && !stopped) read({token});
    }
    const double end = seconds();
    if (!stopped) stream.put(held);
    stream.finish();
    print("\n");
    return format("prompt: %s in %.3f s; then %s in %.3f s, %.1f tokens/s", plural(prompt.size(), "token").c_str(),
                  middle - start, plural(made, "token").c_str(), end - middle, made / std::max(end - middle, 1e-9));
}

static std::vector<int> parse_tokens(const std::string& list, int V) {
    std::vector<int> tokens;
    for (const std::string& word : split(list, ',')) {
        unsigned token = V;
        const auto [end, error] = std::from_chars(word.data(), word.data() + word.size(), token);
        if (*end || error != std::errc() || token >= (unsigned)V)
            die("--prompt-tokens: '%s' is not a number from 0 to %d, as in 1,2,3", word.c_str(), V - 1);
        tokens.push_back(token);
    }
    return tokens;
}

static size_t longest_prompt = 16 << 20;  // bytes; the tests set it lower

static std::string read_prompt(const std::string& path) {
    FILE* f = path == "-" ? stdin : fopen(path.c_str(), "r");
    std::string text;
    char buffer[1 << 16];
    while (size_t n = f ? fread(buffer, 1, sizeof buffer, f) : 0) {
        text.append(buffer, n);
        if (text.size() > longest_prompt) die("--prompt-file %s: longer than 16 MiB, or without end", path.c_str());
    }
    if (!f || ferror(f)) die("--prompt-file %s: %s", path.c_str(), strerror(errno));
    return text;
}

// What a text begins with: --prompt-tokens, --prompt or --prompt-file; or a newline, since a small model has seen few
// ends of texts, but GPT-2's end-of-text in its vocabulary; or -1 if there is none of these.
static std::vector<int> prompt_of(const Options& o, const Tokenizer& t, int V) {
    if (!o.prompt.empty() + !o.prompt_file.empty() + !o.prompt_tokens.empty() > 1)
        die("give one of --prompt, --prompt-file and --prompt-tokens");
    if (!o.prompt_tokens.empty()) return parse_tokens(o.prompt_tokens, V);
    const std::string text = o.prompt_file.empty() ? o.prompt : read_prompt(o.prompt_file);
    if (!text.empty()) return encode(t, text);
    if (!t.known()) return {V == 50257 ? 50256 : -1};
    auto newline = std::find(t.tokens.begin(), t.tokens.end(), "\n");
    return {V == 50257 || newline == t.tokens.end() ? t.end_of_text : (int)(newline - t.tokens.begin())};
}

// --------------------------------------------------------------------------------------------------------------------
// Training

// The learning rate of step 1, 2, ...: rises to lr in `warmup` steps, then falls to min_lr at the last (or stays).
static double learning_rate(const Options& o, int step) {
    if (step <= o.warmup) return o.lr * step / o.warmup;
    // The step after which the rate falls
    int start = o.schedule == WSD ? std::max(o.warmup, o.steps - o.steps / 5) : o.warmup;
    double progress = step <= start ? 0 : (double)(step - start) / (o.steps - start);
    double share = o.schedule == CONSTANT ? 1
                 : o.schedule == LINEAR ? 1 - progress
                 : o.schedule == COSINE ? 0.5 + 0.5 * cos(M_PI * progress)
                                        : 1 - sqrt(progress);
    return o.min_lr + (o.lr - o.min_lr) * share;
}

struct Run {
    Options& o;
    OptionTable& table;
    int folder = -1;                      // DIR, open and locked
    std::optional<ModelFile> start = {};  // what the run starts from, if not from random weights
    State state = {};                     // of the checkpoint that is resumed
    Config c = {};
    Tokenizer tokenizer = {};
    std::vector<Shard> train = {}, val = {};
    Loader loader = {};
    std::vector<int> x = {}, y = {};  // (B, T) the next batch
    Model* model = nullptr;
    int step = 0, saved = 0;           // updates made; step of DIR/model.bin
    uint64_t epoch = 0, position = 0;  // of the loader, after the batches of these updates
    double loss = 0;                   // of the last step
    Evaluation validation = {};        // the last one
    std::string first_row = {};        // of metrics.csv, if there was a validation before step 1
    double best_loss = INFINITY;       // lowest validation loss so far, but not of random weights
    int best_step = -1;                // at which it was found; -1: none yet
    FILE* metrics = nullptr;
    double shown = -INFINITY;          // when a step's line was printed last, in seconds()

    std::string path(const std::string& name) const { return o.out + "/" + name; }
};

// Opens DIR, if it exists, and locks it until the process ends. Dies if it does not suit what is asked.
static void check_folder(Run& run) {
    if (process > 0) return;
    const Options& o = run.o;
    const char* out = o.out.c_str();
    run.folder = open(out, O_RDONLY | O_DIRECTORY | O_CLOEXEC);
    if (run.folder < 0 && errno != ENOENT) die("--out %s: %s", out, strerror(errno));
    if (run.folder >= 0 && flock(run.folder, LOCK_EX | LOCK_NB) != 0) {
        if (errno == EWOULDBLOCK) die("--out %s is in use by another process that trains into it", out);
        printf("note: --out %s cannot be locked against other processes: %s\n", out, strerror(errno));
    }
    std::string place = o.out;  // if there is no DIR, the folder in which it will be made
    while (run.folder < 0 && !exists(place) && place != folder_of(place)) place = folder_of(place);
    if (access(place.c_str(), W_OK | X_OK) != 0) die("--out %s: %s: %s", out, place.c_str(), strerror(errno));
    const bool checkpoint = exists(run.path("model.bin"));
    if (o.resume && !checkpoint) die("--resume: nothing to resume in %s: it has no model.bin", out);
    for (const char* name : {"model.bin", "best.bin", "metrics.csv"})
        if (!o.resume && !o.overwrite && exists(run.path(name)))
            die("--out %s has a run's %s: %s--overwrite replaces it", out, name,
                checkpoint ? "--resume continues it, " : "");
    if (run.folder < 0 && std::filesystem::is_symlink(o.out)) die("--out %s is a link that leads nowhere", out);
}

// Sets the options that were not given to what the checkpoint remembers. Dies if one that was given contradicts it.
static void recall_options(OptionTable& table, State& state, const char* path) {
    for (Option& o : table) {
        if (o.persistence == TRANSIENT) continue;
        const std::string value = value_text(o), remembered = state[std::string("--") + o.name];
        if (!o.given && !remembered.empty()) {
            std::string error = set_value(o, remembered);
            if (!error.empty()) die("%s: --%s %s: %s", path, o.name, remembered.c_str(), error.c_str());
        } else if (o.given && o.persistence == FIXED && value != remembered) {
            die("--%s %s contradicts %s, where it is %s; leave it out, or start a new run with --model %s", o.name,
                value.c_str(), path, remembered.empty() ? "not set" : remembered.c_str(), shell_word(path).c_str());
        }
    }
}

// Reads DIR/model.bin to resume from it. Returns false if that run is complete.
static bool open_checkpoint(Run& run) {
    const std::string path = run.path("model.bin");
    const char* name = path.c_str();
    run.start = open_model(path);
    run.state = read_state(*run.start);
    if (run.state.empty())
        die("%s has weights without training state; start a new run with --model %s", name, shell_word(path).c_str());
    if (is_given(run.table, "prompt") || is_given(run.table, "prompt-tokens"))  // one replaces the other
        run.state.erase("--prompt"), run.state.erase("--prompt-tokens");
    recall_options(run.table, run.state, name);
    auto number = [&](const char* key) { return strtoull(run.state[key].c_str(), nullptr, 10); };
    const uint64_t step = number("step"), former = number("--steps");
    if (step > former) die("%s: damaged: it is past its last step", name);
    run.step = run.saved = step;
    run.epoch = number("epoch");
    run.position = number("position");
    run.first_row = run.state["first row"];
    if (run.state.contains("best loss")) run.state["best"] = run.state["best step"] + " " + run.state["best loss"];
    if (number("--val-tokens") == (uint64_t)run.o.val_tokens)  // the same windows
        sscanf(run.state["best"].c_str(), "%d %lf", &run.best_step, &run.best_loss);
    else if (!run.o.val.empty()) printf("note: with another --val-tokens, the search for best.bin begins anew\n");
    run.o.overwrite = run.state.contains("overwrites");
    if ((uint64_t)run.o.steps != former && run.o.steps <= run.step)
        die("--steps %d: %s is already at step %d", run.o.steps, name, run.step);
    if (run.step < run.o.steps) return true;
    printf("%s is complete at step %d; to train further, add --steps N\n", escaped(path).c_str(), run.step);
    return false;
}

static std::string fingerprints(const std::vector<Shard>& shards) {
    std::string text;
    for (const Shard& s : shards) text += s.fingerprint + "\n";
    return text;
}

// Opens shards. Dies if they are not those of a checkpoint that is resumed.
static std::vector<Shard> open_run_shards(Run& run, const char* option, const std::vector<std::string>& paths) {
    std::vector<Shard> shards = open_shards(option, paths, run.o.sequence);
    const std::string remembered = run.state[std::string(option) + " data"];
    if (!remembered.empty() && remembered != fingerprints(shards))
        die("--%s: these are not the shards that %s was trained with", option, run.path("model.bin").c_str());
    return shards;
}

// Opens shards and tokenizer, and settles the model's shape.
static void open_data(Run& run) {
    Options& o = run.o;
    if (o.train.empty()) die("train needs --train GLOB, shards that data_prep/prepare.py makes from text");
    std::vector<std::string> train_paths = expand_glob("train", o.train), val_paths, paths = train_paths;
    if (!o.val.empty()) val_paths = expand_glob("val", o.val);
    paths.insert(paths.end(), val_paths.begin(), val_paths.end());
    run.tokenizer = find_tokenizer(o.tokenizer, run.start, paths);
    run.c = configure(o, run.start, run.tokenizer);
    run.train = open_run_shards(run, "train", train_paths);
    if (!o.val.empty()) run.val = open_run_shards(run, "val", val_paths);
}

// Sets the options that depend on the data or on each other.
static void complete_options(Run& run) {
    Options& o = run.o;
    const int B = o.batch, T = o.sequence;
    const ssize_t least = (ssize_t)B * T * processes, all = std::max(o.total_batch, 0);
    const ssize_t most = std::max<ssize_t>(1, INT_MAX / least);
    const ssize_t nearest = std::clamp<ssize_t>((all + least / 2) / least, 1, most) * least;
    if (all < 1) o.total_batch = std::min<ssize_t>(least, INT_MAX);
    if (o.total_batch % least != 0)
        die("--total-batch %d is not a multiple of batch x sequence%s, %zd; the nearest is %zd%s", o.total_batch,
            processes > 1 ? " x processes" : "", least, nearest,
            o.resume ? "; to resume, start another number of processes" : "");
    if (o.steps < 1) o.steps = std::clamp<size_t>(window_count(run.train, T) / (o.total_batch / T), 1000, INT_MAX);
    if (o.warmup < 0) o.warmup = o.steps / 20;
    if (o.warmup > o.steps) die("--steps %d is less than the warmup, %d steps; use more", o.steps, o.warmup);
    if (o.min_lr < 0) o.min_lr = strtod(format("%.9g", o.lr / 10).c_str(), nullptr);  // 6e-5, not 5.9999999999999995e-5
    if (o.min_lr > o.lr) die("--min-lr %g is more than --lr %g", o.min_lr, o.lr);
    if (o.val_tokens < 0) o.val_tokens = 1 << 14;
    const std::string own = run.path("tokenizer.bin");
    if (!o.resume && !o.overwrite && exists(own) && read_tokenizer(own).crc != run.tokenizer.crc)
        die("%s is not the tokenizer of the shards; use another --out", own.c_str());
}

static bool can_sample(const Run& run) {
    const bool known = run.tokenizer.known() || !run.o.prompt_tokens.empty();
    return process == 0 && prompt_of(run.o, run.tokenizer, run.c.V)[0] >= 0 && known;
}

static void print_sample(const Run& run) {
    show_line(format("sample after step %d:", run.step), true);
    Random r = random_stream(run.o.seed, SAMPLES, run.step);
    generate_text(run.model, run.c, run.o, run.tokenizer, prompt_of(run.o, run.tokenizer, run.c.V), r);
}

static void print_start(const Run& run, size_t memory_needed) {
    const Options& o = run.o;
    const size_t B = o.batch, T = o.sequence;
    const double mflop = flops_per_token(run.c, T) * 1e-6;
    std::string origin = format("random from seed %d", o.seed);
    if (o.resume) origin = format("as after step %d", run.step);
    else if (run.start) origin = "from " + escaped(o.model);
    printf("model      %s\n", config_text(run.c).c_str());
    printf("attention  %s\n", attention_text(run.c).c_str());
    printf("parameters %s, %s; %.*f MFLOP per token, forward and backward\n", commas(parameter_count(run.c)).c_str(),
           origin.c_str(), mflop < 10 ? 2 : 0, mflop);
    printf("data       %s; %s make %.2f epochs\n", shards_text(run.train).c_str(), plural(o.steps, "step").c_str(),
           (double)o.steps * (o.total_batch / T) / window_count(run.train, T));
    const int used = 1 + *std::ranges::max_element(run.loader.current.tokens);
    if (used < run.c.V / 8 && !run.tokenizer.known() && !run.start)
        printf("           the first shard has tokens below %d only: is the vocabulary that small (--vocab)?\n", used);
    if (!run.val.empty()) printf("validation %s\n", shards_text(run.val).c_str());
    printf("step       %s of %zu tokens%s: %s tokens\n", plural(B, "sequence").c_str(), T,
           o.total_batch == o.batch * o.sequence ? "" : format(", %zu times", o.total_batch / (B * T)).c_str(),
           commas(o.total_batch).c_str());
    if (processes > 1)
        printf("processes  %1$d; each computes 1/%1$d of a step, updates 1/%1$d of the parameters\n", processes);
    Options former = o;
    if (o.resume) former.steps = atoi(run.state.at("--steps").c_str());
    if (o.steps != former.steps)
        printf("steps      %d instead of %d; the next learning rate is %.2e, after %.2e\n", o.steps, former.steps,
               learning_rate(o, run.step + 1), learning_rate(former, std::max(1, run.step)));
    printf("machine    %s, computing in %s; %s of memory needed, %s free\n", device_name().c_str(),
           precision_names[o.precision], mebibytes(memory_needed).c_str(), mebibytes(device_free_memory()).c_str());
    std::string line = "options   ";  // except those of the model, which the lines above describe
    for (const Option& option : run.table) {
        std::string value = value_text(option);
        const bool of_model = option.commands == EVERY || option.commands == SHAPES;
        if (option.as<std::string>() || value.empty() || of_model || option.persistence == TRANSIENT) continue;
        const std::string word = format(" %s %s", option.name, value.c_str());
        if (line.size() + word.size() > 80) printf("%s\n", line.c_str()), line = format("%10s", "");
        line += word;
    }
    printf("%s\n\n", line.c_str());
}

// Checks memory and the first batches, describes the run, creates the model. Nothing is written yet.
static void create_run_model(Run& run) {
    const Options& o = run.o;
    const int B = o.batch, T = o.sequence;
    run.loader = {.shards = split_shards(run.train), .T = T, .V = run.c.V, .seed = (uint64_t)o.seed,
                  .epoch = run.epoch, .position = run.position};
    const Workload work = {.B = B, .T = T, .train = true, .sequences = can_sample(run), .recompute = o.recompute};
    const size_t loading = device_is_host() ? loader_bytes(run.loader.shards, T) : 0;
    const int sequences = is_given(run.table, "total-batch") ? o.total_batch / T / processes : 0;
    const Memory memory = check_memory(run.c, o.precision, work, loading, sequences);
    run.x = run.y = std::vector<int>(work.tokens());
    for (size_t i = 0; i < std::min<size_t>(B, window_count(run.val, T)); i++)  // wrong tokens are found now
        read_window(run.val, i, run.x.data(), run.y.data(), T, run.c.V);
    use_shard(run.loader);
    loader_batch(run.loader, run.x.data(), run.y.data(), B);

    print_start(run, memory.total() + loading);
    std::string setup = fingerprints(run.train) + fingerprints(run.val);
    if (run.start) setup += fingerprint(run.start->file);
    for (const Option& option : run.table)  // but for paths
        if (!option.as<std::string>()) setup += value_text(option) + "\n";
    const double crc = crc32(0, setup.data(), setup.size());  // sum_all also waits till all have found memory free
    if (sum_all(crc) != processes * crc)
        die("the processes have different options, models or shards; all must see the same files");
    run.model = model_create(run.c, o.precision, work);
    if (run.start) read_quantity(*run.start, run.model, PARAMETERS, HEADER_BYTES);
    else initialize_parameters(run.model, run.c, o.seed);
    if (o.resume) {
        const size_t size = 4 * run.start->values, moments = run.start->file.size - sizeof(Trailer) - 2 * size;
        read_quantity(*run.start, run.model, MOMENT1, moments);
        read_quantity(*run.start, run.model, MOMENT2, moments + size);
    }
    if (run.start) close(run.start->file.fd);
    model_set_inputs(run.model, run.x.data(), run.y.data());
}

static State run_state(const Run& run) {
    State state = {{"step", std::to_string(run.step)}, {"epoch", std::to_string(run.epoch)},
                   {"position", std::to_string(run.position)}, {"train data", fingerprints(run.train)},
                   {"val data", fingerprints(run.val)}, {"tokenizer", run.tokenizer.crc},
                   {"first row", run.first_row}, {"best", format("%d %.17g", run.best_step, run.best_loss)}};
    if (run.step == 0 && run.o.overwrite) state["overwrites"] = "yes";  // until all of the former run is removed
    for (const Option& o : run.table)
        if (o.persistence != TRANSIENT && !value_text(o).empty()) state[std::string("--") + o.name] = value_text(o);
    return state;
}

// Opens DIR/metrics.csv to append to it, without the rows that a killed run wrote after its last checkpoint.
static FILE* open_metrics(const Run& run) {
    if (process > 0) return fopen("/dev/null", "a");
    const std::string path = run.path("metrics.csv"), names = "step,train_loss,val_loss,lr,grad_norm,ms,tokens_per_s";
    std::string kept = names + "\n" + (run.step == 0 ? run.first_row : "");
    if (run.step > 0 && exists(path)) {
        const std::vector<std::string> lines = split(read_whole(open_file(path)), '\n');
        int step = -1;  // of the last row
        if (lines[0] != names) die("%s: is not of this program; move it away to resume without it", path.c_str());
        for (size_t i = 1; i + 1 < lines.size() && step < run.step; i++) {  // the last line is empty, or incomplete
            const std::vector<std::string> fields = split(lines[i], ',');
            const bool numbers = lines[i].find_first_not_of("0123456789.e+-,") == lines[i].npos;
            if (!numbers || fields.size() != 7 || atoi(fields[0].c_str()) <= step)
                die("%s: line %zu is no row of this run; move the file away to resume without it", path.c_str(), i + 1);
            step = atoi(fields[0].c_str());
            if (step <= run.step) kept += lines[i] + '\n';
        }
    }
    commit_file(create_file(path, kept));
    FILE* metrics = fopen(path.c_str(), "a");
    if (!metrics) die("%s: %s", path.c_str(), strerror(errno));
    return metrics;
}

// Removes what is left of the run that the folder held: numbered checkpoints, and what this run does not have.
static void remove_old_run(const Run& run) {
    for (const auto& entry : std::filesystem::directory_iterator(run.o.out)) {
        std::string name = entry.path().filename();
        if (name.ends_with(".tmp")) name.resize(name.size() - 4);
        bool numbered = name.starts_with("model_") && name.ends_with(".bin") && name.size() > 10 &&
                        name.find_first_not_of("0123456789", 6) == name.size() - 4;
        bool best = name == "best.bin" && run.best_step < 0;
        bool tokenizer = name == "tokenizer.bin" && !run.tokenizer.known();
        if (!numbered && !best && !tokenizer) continue;
        if (unlink(entry.path().c_str()) != 0) die("%s: cannot be removed: %s", entry.path().c_str(), strerror(errno));
    }
}

// Whether something is due that is done every so many steps, and after the last.
static bool is_due(int every, const Run& run) {
    return run.step == run.o.steps || (every > 0 && run.step % every == 0);
}

// Gives DIR/model.bin its second names: best.bin, and a numbered one with --keep. They cost no space.
static void name_checkpoint(const Run& run) {
    if (process > 0) return;
    const std::string model = run.path("model.bin");
    std::vector<std::string> names;
    if (run.best_step == run.step) names.push_back("best.bin");
    if (run.o.keep && run.step > 0 && is_due(run.o.save_every, run))
        names.push_back(format("model_%06d.bin", run.step));
    for (const std::string& name : names) {
        const std::string path = run.path(name), temporary = path + ".tmp";
        std::error_code error;
        unlink(temporary.c_str());
        std::filesystem::create_hard_link(model, temporary, error);
        if (!error) {
            std::filesystem::rename(temporary, path);
            unlink(temporary.c_str());  // rename leaves it if both are already names of the same file
        } else {  // a file system without links
            OutputFile copy = create_file(path);
            std::filesystem::copy_file(model, temporary, std::filesystem::copy_options::overwrite_existing, error);
            if (error) die_writing(copy, error.message().c_str());
            commit_file(copy);
        }
    }
}

// Prepares the folder. A new run saves its start: so --resume cannot take a former run's checkpoint for this run's, a
// former run stays whole until this one replaces it, and a disk without room for a checkpoint is noticed now.
static void open_folder(Run& run) {
    const Options& o = run.o;
    if (process == 0 && run.folder < 0) {
        std::error_code error;
        std::filesystem::create_directories(o.out, error);
        if (error) die("--out %s cannot be created: %s", o.out.c_str(), error.message().c_str());
        check_folder(run);  // again, since another process may have been faster
    }
    OutputFile tokenizer;
    if (run.tokenizer.known()) tokenizer = create_file(run.path("tokenizer.bin"), run.tokenizer.content);
    if (!o.resume) write_checkpoint(run.path("model.bin"), run.model, run.c, run_state(run));
    if (run.tokenizer.known()) commit_file(tokenizer);
    run.metrics = open_metrics(run);
    if (o.overwrite && process == 0) remove_old_run(run);
    name_checkpoint(run);  // also when it resumes: a killed run may not have come to it
}

static void save_run(Run& run) {
    struct stat opened, named;
    if (process == 0 && (fstat(run.folder, &opened) != 0 || stat(run.o.out.c_str(), &named) != 0 ||
                         opened.st_ino != named.st_ino || opened.st_dev != named.st_dev))
        die("--out %s: the folder was removed or replaced during the run; step %d could not be saved",
            run.o.out.c_str(), run.step);
    if (run.loss > 2 * log(run.c.V))
        show_line(format("warning: the loss, %.3g, is far above that of guessing, %.3g; try a lower --lr", run.loss,
                         log(run.c.V)), true);
    sync_to_disk(fileno(run.metrics));  // the rows up to this step will not be written again
    write_checkpoint(run.path("model.bin"), run.model, run.c, run_state(run));
    run.saved = run.step;
    name_checkpoint(run);
}

// Dies if a value is not finite, from which a run never recovers.
static void check_finite(const Run& run, const char* what, double value) {
    if (std::isfinite(value)) return;
    die("%s became %s in step %d; %s is still that of step %d; try a lower --lr or a longer --warmup", what,
        std::isnan(value) ? "NaN" : "infinite", run.step, run.path("model.bin").c_str(), run.saved);
}

static void validate(Run& run) {
    run.validation = evaluate(run.model, run.c, run.val, run.o, run.tokenizer);
    check_finite(run, "the validation loss", run.validation.loss);
    if (run.step < run.o.steps) model_set_inputs(run.model, run.x.data(), run.y.data());  // evaluate set others
    const bool random = run.step == 0 && !run.start;  // random weights are of no use as best.bin
    if (random || !(run.validation.loss < run.best_loss)) return;
    run.best_loss = run.validation.loss;
    run.best_step = run.step;
}

// Shows the line of a step, after a validation if one is due, and writes its row of metrics.csv. Of lines that do not
// stay, it shows ten a second on a terminal, and elsewhere one a second, or none with --log-every.
static void log_step(Run& run, double norm, double lr, double step_seconds, double seconds_left) {
    const Options& o = run.o;
    const int step = run.step;
    const bool validates = !run.val.empty() && is_due(o.val_every, run);
    const double ms = step_seconds * 1e3, rate = o.total_batch / step_seconds;
    std::string line = format("step %d/%d  loss %.4f", step, o.steps, run.loss), val_loss;
    if (validates) {
        validate(run);
        line += format("  val %.4f", run.validation.loss);
        val_loss = format("%.9g", run.validation.loss);
    }
    if (step < o.steps) line += "  " + duration(seconds_left) + " left";
    line += format("  %.*f ms  %.0f tokens/s  lr %.2e  norm %.3f", ms < 10 ? 1 : 0, ms, rate, lr, norm);
    const bool stays = validates || step == o.steps || (o.log_every > 0 && step % o.log_every == 0);
    const bool may_show = on_terminal() || o.log_every == 0;
    if (stays || (may_show && seconds() >= run.shown + (on_terminal() ? 0.1 : 1))) {
        show_line(line, stays);
        run.shown = seconds();
    }
    fprintf(run.metrics, "%d,%.9g,%s,%.9g,%.9g,%.2f,%.0f\n", step, run.loss, val_loss.c_str(), lr, norm, ms, rate);
    if (fflush(run.metrics) != 0) die("%s: %s", run.path("metrics.csv").c_str(), strerror(errno));
}

// Trains until the last step, or until a signal comes to a process. The model already has the first batch.
static void train_steps(Run& run) {
    const Options& o = run.o;
    const int first_step = run.step, micro_batches = o.total_batch / (o.batch * o.sequence);
    const double start = seconds();
    while (run.step < o.steps && sum_all(interrupts) == 0) {
        const double step_start = seconds();
        run.step++;
        for (int i = 1; i <= micro_batches; i++) {
            if ((i - 1) % processes == process) {  // processes take turns
                model_forward(run.model, true, 1.0f / micro_batches);
                model_backward(run.model, processes > 1 && i + processes > micro_batches);
            }
            run.epoch = run.loader.epoch;
            run.position = run.loader.position;
            if (i == micro_batches && run.step == o.steps) break;  // the last batch
            loader_batch(run.loader, run.x.data(), run.y.data(), o.batch);  // while a GPU is still computing
            if (i % processes == process) model_set_inputs(run.model, run.x.data(), run.y.data());
        }
        const double lr = learning_rate(o, run.step);
        const AdamW adamw = {.lr = (float)lr, .beta1 = (float)o.beta1, .beta2 = (float)o.beta2, .eps = 1e-8f,
                             .weight_decay = (float)o.weight_decay};
        model_update(run.model, adamw, o.clip, run.step);
        run.loss = sum_all(model_loss(run.model) / processes);
        const double norm = model_norm(run.model), now = seconds();
        check_finite(run, "the loss", run.loss);
        check_finite(run, "the gradient's norm", norm);

        log_step(run, norm, lr, now - step_start, (now - start) / (run.step - first_step) * (o.steps - run.step));
        if (is_due(o.sample_every, run) && run.step < o.steps && can_sample(run) && interrupts == 0) print_sample(run);
        if (is_due(o.save_every, run) || run.best_step == run.step) save_run(run);
    }
    if (run.saved < run.step) save_run(run);  // a signal came between two checkpoints
}

static void on_signal(int) {
    static const char text[] = "\nstopping soon; Ctrl-C again stops at once, without saving\n";
    if (interrupts++ > 0) _exit(130);
    const int old = errno;
    if (isatty(STDERR_FILENO)) (void)!write(STDERR_FILENO, text, sizeof text - 1);
    errno = old;
}

static void print_end(const Run& run, double run_seconds) {
    const Options& o = run.o;
    if (run.step < o.steps)
        return show_line(format("stopped after step %d of %d, and saved; to continue:\n    ", run.step, o.steps) +
                         (processes > 1 ? format("mpirun -n %d ", processes) : "") +
                         format("%s train --out %s --resume", shell_word(o.program).c_str(),
                                shell_word(o.out).c_str()), true);
    printf("\ntrained to step %d in %s%s\n", o.steps, duration(run_seconds).c_str(),
           o.resume ? " since it was resumed" : "");
    if (!run.val.empty()) {
        const Evaluation& e = run.validation;
        printf("validation loss %.4f nats per token, over %s tokens whose frequencies alone would give %.4f\n", e.loss,
               commas(e.tokens).c_str(), e.entropy);
        if (e.loss > e.entropy) printf("note: the frequencies alone are better; try another --lr, or train longer\n");
        if (run.best_step < o.steps) printf("best validation loss %.4f at step %d\n", run.best_loss, run.best_step);
    }
    if (can_sample(run) && interrupts == 0) print_sample(run);
    const std::string path = run.path(run.val.empty() || run.best_step == o.steps ? "model.bin" : "best.bin");
    printf("\ncheckpoint %s; to generate text:\n    %s generate --model %s --seed %d", escaped(path).c_str(),
           shell_word(o.program).c_str(), shell_word(path).c_str(), o.seed < INT_MAX ? o.seed + 1 : 0);
    for (const Option& option : run.table)  // those of sampling
        if (option.commands == (TRAIN | GENERATE) && value_text(option) != option.initial)
            printf(" --%s %s", option.name, shell_word(value_text(option)).c_str());
    printf("%s\n", prompt_of(o, run.tokenizer, run.c.V)[0] < 0 ? " --prompt-tokens 0" : "");
}

static void train(Options& o, OptionTable& table) {
    if (o.out.empty()) die("train needs --out DIR, a folder for its checkpoint");
    if (o.resume && o.overwrite) die("--resume continues a run and --overwrite replaces it: give one of them");
    o.stop_at_end = true;  // a sample is one text
    while (o.out.size() > 1 && o.out.back() == '/') o.out.pop_back();
    Run run = {.o = o, .table = table};
    check_folder(run);
    if (o.resume) {
        if (sum_all(open_checkpoint(run)) == 0) return name_checkpoint(run);
    } else if (is_file(o.model)) {
        run.start = open_weights(o, "train");
        std::error_code error;  // there may be no --out yet
        if (o.overwrite && std::filesystem::equivalent(folder_of(o.model), o.out, error))
            die("--model %s is in the --out that --overwrite would empty; use another --out", o.model.c_str());
    }
    open_data(run);
    complete_options(run);
    create_run_model(run);

    signal(SIGPIPE, SIG_IGN);  // training goes on when its output is no longer read
    for (int number : {SIGINT, SIGTERM, SIGHUP, SIGUSR1, SIGXCPU})
        if (signal(number, on_signal) == SIG_IGN) signal(number, SIG_IGN);  // as nohup wants SIGHUP, for example
    if (!o.resume && !run.val.empty() && o.val_every > 0) {
        validate(run);
        run.first_row = format("0,,%.9g,,,,\n", run.validation.loss);
        show_line(format("step 0/%d  val %.4f", o.steps, run.validation.loss), true);
    }
    if (!o.resume && sum_all(interrupts) > 0) return show_line("stopped before the first step; nothing is saved", true);
    open_folder(run);  // from here on, files are written
    const double start = seconds();
    train_steps(run);
    fclose(run.metrics);
    print_end(run, seconds() - start);
    model_free(run.model);
}

// --------------------------------------------------------------------------------------------------------------------
// The other commands

// Writes the weights as CSV. Layers are numbered from 0; a layer's last source is itself.
static void write_depth_weights(const std::string& path, const Config& c, const Evaluation& e) {
    std::string rows = "layer,head,source,weight\n";
    for (int l = 1; l < c.L; l++) {
        const DepthSources sources = depth_sources(c, l);
        for (int h = 0; h < c.NH; h++)
            for (int i = 0; i <= sources.count(); i++)
                rows += format("%d,%d,%d,%.6f\n", l, h, sources[i], e.depth_weights[l][i * c.NH + h]);
    }
    commit_file(create_file(path, rows));
}

static void eval_questions(const Options& o, const ModelFile& file, const Config& c, const Tokenizer& tokenizer) {
    Questions all = read_questions(o.hellaswag, c.V, tokenizer);
    size_t longest = 0;
    for (const Ending& e : all.endings) {
        const size_t n = all.contexts[e.question].size() + e.tokens.size();
        longest = std::max(longest, n);
        if (n > (size_t)c.maxT + 1)
            die("%s: question %zu with an ending has %zu tokens, but the model's context is %d; leave it out",
                o.hellaswag.c_str(), e.question + 1, n, c.maxT);
    }
    Model* model = load_model(file, c, o, {.B = o.batch, .T = (int)longest - 1});
    auto read = [&](size_t i, int* x, int* y) {
        std::vector<int> tokens = all.contexts[all.endings[i].question];
        tokens.insert(tokens.end(), all.endings[i].tokens.begin(), all.endings[i].tokens.end());
        std::copy(tokens.begin(), tokens.end() - 1, x);
        std::copy(tokens.begin() + 1, tokens.end(), y);
    };
    for_each_window(model, all.endings.size(), "endings", read, [&](size_t i, const int*, const float* losses) {
        Ending& e = all.endings[i];
        const float* own = losses + all.contexts[e.question].size() - 1;
        e.loss = std::accumulate(own, own + e.tokens.size(), 0.0);
        if (!std::isfinite(e.loss)) die("%s: a loss is not finite: its training failed", o.model.c_str());
        e.mean = e.loss / e.tokens.size();
    });
    show_line(format("data       %s with %s", plural(all.contexts.size(), "question").c_str(),
                     plural(all.endings.size(), "ending").c_str()), true);
    printf("accuracy   %.4f\nnormalized %.4f: by the mean over an ending's tokens instead of their sum\n",
           accuracy(all, &Ending::loss), accuracy(all, &Ending::mean));
    model_free(model);
}

static void eval(Options& o, OptionTable& table) {
    ModelFile file = open_weights(o, "eval");
    if (o.val.empty() == o.hellaswag.empty())
        die("eval needs --val GLOB, the shards to measure the loss on, or --hellaswag FILE, and not both");
    for (const char* name : {"sequence", "val-tokens", "by-position", "depth-weights"})
        if (!o.hellaswag.empty() && is_given(table, name)) die("--%s goes with --val, not with --hellaswag", name);
    std::vector<std::string> paths = o.val.empty() ? std::vector<std::string>{} : expand_glob("val", o.val);
    Tokenizer tokenizer = find_tokenizer(o.tokenizer, file, paths);
    Config c = configure(o, file, tokenizer);
    if (!o.depth_weights.empty() && c.attention != DEPTH) die("--depth-weights needs --attention depth");
    FILE* out = o.by_position ? stderr : stdout;  // keeps the CSV apart
    fprintf(out, "model      %s: %s\n", escaped(o.model).c_str(), config_text(c).c_str());
    fprintf(out, "attention  %s; trained as %s\n", attention_text(c).c_str(), attention_names[file.config.attention]);
    if (!o.hellaswag.empty()) return eval_questions(o, file, c, tokenizer);
    std::vector<Shard> shards = open_shards("val", paths, o.sequence);
    Model* model = load_model(file, c, o, {.B = o.batch, .T = o.sequence});
    Evaluation e = evaluate(model, c, shards, o, tokenizer);
    if (!std::isfinite(e.loss)) die("%s: the loss is not finite: its training failed", o.model.c_str());
    if (on_terminal()) show_line("", false);  // clears the progress
    fprintf(out, "data       %s tokens in windows of %d; their frequencies alone would give a loss of %.6f\n",
            commas(e.tokens).c_str(), o.sequence, e.entropy);
    fprintf(out, "loss       %.6f nats per token\nperplexity %.4f\n", e.loss, exp(e.loss));
    if (e.bytes > 0) fprintf(out, "bits/byte  %.6f\n", e.loss / log(2) * e.tokens / e.bytes);
    else fprintf(out, "bits/byte  unknown without a tokenizer\n");
    if (!o.depth_weights.empty()) write_depth_weights(o.depth_weights, c, e);
    if (o.by_position) printf("position,loss\n");
    for (int t = 0; o.by_position && t < o.sequence; t++) printf("%d,%.6f\n", t, e.by_position[t]);
    model_free(model);
}

static void generate(Options& o, OptionTable&) {
    ModelFile file = open_weights(o, "generate");
    Tokenizer tokenizer = find_tokenizer(o.tokenizer, file, {});
    Config c = configure(o, file, tokenizer);
    const std::vector<int> prompt = prompt_of(o, tokenizer, c.V);
    if (prompt[0] < 0 && tokenizer.known()) die("the vocabulary has no newline to begin with; use --prompt");
    if (prompt[0] < 0) die("%s has no tokenizer.bin beside it: use --tokenizer or --prompt-tokens", o.model.c_str());
    if (!o.stop.empty() && !tokenizer.known()) die("--stop needs a tokenizer: name one with --tokenizer");
    if (o.stop_at_end && tokenizer.end_of_text < 0)
        die("--stop-at-end needs a tokenizer that has an end-of-text; name one with --tokenizer");
    if (prompt.size() > (size_t)c.maxT)
        fprintf(stderr, "note: the prompt has %s, more than the context, %d; only the last %d are read\n",
                plural(prompt.size(), "token").c_str(), c.maxT, tokens_to_read(c.maxT, 0, prompt.size()));
    Model* model = load_model(file, c, o, {.sequences = 1});
    for (int i = 0; i < o.samples; i++) {
        if (i > 0) printf("---\n");
        const Random r = random_stream((uint64_t)o.seed + i, SAMPLES);
        fprintf(stderr, "%s\n", generate_text(model, c, o, tokenizer, prompt, r).c_str());
    }
    model_free(model);
}

static void print_tensors(const Config& c) {
    printf("\n%-10s %-20s %15s   %-18s %s\n", "tensor", "shape", "values", "starts as", "weight decay");
    for (const Tensor& t : tensor_table(c)) {
        std::string shape = t.layers > 1 ? format("%zu x ", t.layers) : "";
        shape += t.cols > 1 ? format("%zu x %zu", t.rows, t.cols) : format("%zu", t.rows);
        std::string initial = t.deviation > 0 ? format("N(0, %.4g)", t.deviation) : format("%g", t.mean);
        printf("%-10s %-20s %15s   %-18s %s\n", t.name, shape.c_str(), commas(t.size()).c_str(), initial.c_str(),
               t.decays ? "yes" : "no");
    }
    printf("%-31s %15s   of which %s in wte are padding\n\n", "all", commas(parameter_count(c)).c_str(),
           commas((size_t)(c.Vp - c.V) * c.C).c_str());
}

static void describe(Options& o, OptionTable&) {
    std::optional<ModelFile> file;
    if (is_file(o.model)) file = open_weights(o, "describe");
    const Config c = configure(o, file, find_tokenizer(o.tokenizer, {}, {}), true);
    const Workload training = {.B = o.batch, .T = o.sequence, .train = true, .recompute = o.recompute};
    std::vector<Config> configs;  // one per attention
    std::vector<Memory> memory, decoding;
    for (size_t a = 0; a < std::size(attention_names); a++) {
        configs.push_back(with_attention(c, a, o, file));
        memory.push_back(model_memory(configs[a], o.precision, training));  // dies if the backend cannot compute it
        decoding.push_back(model_memory(configs[a], o.precision, {.sequences = 1}));
    }
    printf("%s\n", config_text(c).c_str());
    if (file) {
        State state = read_state(*file);
        std::string content = state.empty() ? "weights only" : "checkpoint of step " + state["step"];
        printf("%s: version %d, %s, %s\n", escaped(o.model).c_str(), file->version,
               attention_names[file->config.attention], content.c_str());
    }
    print_tensors(c);
    for (const Config& a : configs)
        if (a.attention != VANILLA) printf("%s\n", attention_text(a).c_str());
    printf("\n");
    auto row = [&](const std::string& label, auto cell) {  // cell(a): for attention a
        printf("%-46s", label.c_str());
        for (size_t a = 0; a < configs.size(); a++) printf(" %12s", cell(a).c_str());
        printf("\n");
    };
    row("", [&](size_t a) { return split(attention_text(configs[a]), ':')[0]; });
    row(format("MFLOP per token, forward and backward, T = %d", o.sequence),
        [&](size_t a) { return format("%.3f", flops_per_token(configs[a], o.sequence) * 1e-6); });
    row("KV cache, bytes per token", [&](size_t a) { return commas(decoding[a].cache / c.maxT); });
    row(format("training, B = %d, T = %d: activations", o.batch, o.sequence),
        [&](size_t a) { return mebibytes(memory[a].activations); });
    row("    parameters, gradients, moments",
        [&](size_t a) { return mebibytes(memory[a].parameters + memory[a].gradients + memory[a].moments); });
    row("    total, with scratch", [&](size_t a) { return mebibytes(memory[a].total()); });
    row("generating: total, with a full cache", [&](size_t a) { return mebibytes(decoding[a].total()); });
}

// --------------------------------------------------------------------------------------------------------------------
// The command line

struct Command {
    const char* name;
    CommandBit bit;
    void (*run)(Options&, OptionTable&);
    const char* summary;
    const char* notes;  // for its --help
};

static const Command commands[] = {
    {"train", TRAIN, train, "trains a new or an existing model, or resumes a run",
     "DIR/model.bin is always the newest complete checkpoint. With --val, DIR/best.bin\n"
     "is that of the lowest validation loss, but never random weights. DIR/metrics.csv\n"
     "has one row per step. Ctrl-C finishes the step, saves and stops; a second Ctrl-C\n"
     "stops at once. --resume takes options from the checkpoint. With it, you may\n"
     "change --steps, the paths of the shards, and what and how often it logs,\n"
     "validates, samples and saves; nothing else that the result depends on.\n"
     "Built with MPI=1, N processes under mpirun each compute an N-th of a step, and\n"
     "--total-batch must be a multiple of N x batch x sequence. To stop them, send\n"
     "SIGUSR1 to mpirun instead of Ctrl-C."},
    {"eval", EVAL, eval, "measures a model's loss on text",
     "Needs --model FILE, and --val GLOB or --hellaswag FILE. With --by-position, all\n"
     "but the CSV goes to standard error."},
    {"generate", GENERATE, generate, "continues a prompt",
     "Needs --model FILE. Without a tokenizer it prints token numbers. When the\n"
     "context is full, its second half is processed again from position 0."},
    {"describe", DESCRIBE, describe, "shows a model's tensors, FLOPs and memory",
     "It compares the attention variants. Memory is for training with --batch and\n"
     "--sequence, and for generating one text."},
};

static void print_help(FILE* out, const char* program, const OptionTable& table, const Command* command) {
    if (command) {
        fprintf(out, "%s %s [--option value]...\n%s.\n\n%s\n\nOptions [and their defaults]\n", program, command->name,
                command->summary, command->notes);
        print_options(out, table, false);
    } else {
        fprintf(out, "%s COMMAND [--option value]...\nTrains GPT-2 with any of three attention variants.\n\nCommands\n",
                program);
        for (const Command& c : commands) fprintf(out, "  %-26s%s\n", c.name, c.summary);
        fprintf(out, "  %-26s%s\n", "COMMAND --help", "lists the command's options");
        fprintf(out, "  %-26s%s\n", "--version", "what this program was built for");
    }
    fprintf(out, "\nOptions of every command\n");
    print_options(out, table, true);
    fprintf(out, "\n%s\nExit status: 0, 1 after an error, 130 after Ctrl-C (in train, the second).\n", device_help());
    if (fflush(out) != 0 || ferror(out)) die("standard output could not be written");
}

[[maybe_unused]] static int run_program(int argc, char** argv) try {
    Options o;
    OptionTable table = option_table(o);
    for (int fd = 0; fd < 3; fd++)  // if standard output were closed, a file of ours could take its place
        if (fcntl(fd, F_GETFD) < 0 && open("/dev/null", O_RDONLY) != fd) return 1;
    setvbuf(stdout, nullptr, _IOLBF, 0);  // lines appear at once in a pipe, too
    signal(SIGXFSZ, SIG_IGN);             // a limit on file sizes makes writes fail instead of ending the process
    device_start(argv);
    join_processes();
    for (auto [size, number] : {std::pair("OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_RANK"), {"PMI_SIZE", "PMI_RANK"}})
        if (const char *n = getenv(size), *i = getenv(number); n && i && processes == 1 && atoi(n) > 1) {
            if (atoi(i) > 0) sleep(1), exit(1);  // the first one speaks
            die("mpirun has started %s processes, but this program was built without its MPI: see make MPI=1", n);
        }
    o.program = argv[0];
    const std::string word = argc > 1 ? argv[1] : "";
    const Command* command = std::ranges::find(commands, word, &Command::name);
    const bool found = command != std::end(commands);
    if (word.empty() || is_help(word)) {
        print_help(word.empty() && process == 0 ? stderr : stdout, argv[0], table, nullptr);
        return word.empty();
    }
    if (word == "--version") return printf("gpt2x3 0.9: %s%s; fp32 and bf16\n", device_build().c_str(), mpi) < 0;
    std::string help = format("see %s --help", argv[0]);
    if (!found && word[0] == '-') die("the first word must be a command; %s", help.c_str());
    if (!found) die("there is no command %s; %s", word.c_str(), did_you_mean(word, commands, "", help).c_str());
    std::erase_if(table, [&](const Option& option) { return !(option.commands & command->bit); });
    help = format("see %s %s --help", argv[0], command->name);
    if (!parse_options(table, {argv + 2, argv + argc}, command->name, help)) {
        print_help(stdout, argv[0], table, command);
        return 0;
    }
    if (sum_all(command->bit) != processes * command->bit) die("the processes were given different commands");
    if (processes > 1 && command->bit & (EVAL | GENERATE)) die("%s needs one process: leave out mpirun", command->name);
    device_init(command->bit != DESCRIBE);
    command->run(o, table);
    if (command->bit != TRAIN && (fflush(stdout) != 0 || ferror(stdout))) die("standard output could not be written");
    return 0;
} catch (const std::bad_alloc&) {
    die("not enough memory: use a smaller --batch or model, or smaller shards");
} catch (const std::filesystem::filesystem_error& e) {
    die("%s", e.what());
} catch (const std::system_error&) {  // of std::async
    die("a thread could not be started: raise `ulimit -u` or `ulimit -v`, or use fewer processes");
} catch (const std::exception& e) {
    die("%s", e.what());
}

#ifndef GPT2_NO_MAIN
int main(int argc, char** argv) { return run_program(argc, argv); }
#endif

#ifndef GPT2_CUDA
#ifdef __AVX512BW__
#include <immintrin.h>
#endif
#ifdef __AMX_BF16__
#include <cpuid.h>
#include <sys/syscall.h>
#endif
#ifdef _OPENMP
#include <omp.h>
#endif
#include <sys/mman.h>

// ====================================================================================================================
// 4 · The layers on a CPU
//
// Arithmetic is in float, whatever X is: a bf16 is converted when it is read and rounded when it is written.
//
// Every result is the same to the bit for any number of threads: they share out output elements, or chunks of fixed
// size whose sums are then added in order.

// --------------------------------------------------------------------------------------------------------------------
// Numbers, vectors and threads

constexpr size_t CACHE_LINE = 16;  // floats

// A register of floats. GCC's and Clang's vector extension works lane by lane. The matmul's microkernel keeps ROWS × NV
// vectors of sums in registers, beside NV vectors of B and one broadcast element of A: as many as fit, so that enough
// independent sums hide the latency of a multiply-add.
#if defined(__AVX512F__)                     // 32 registers of 16 floats
constexpr int LANES = 16, ROWS = 14, NV = 2;
#elif defined(__AVX2__) && defined(__FMA__)  // 16 registers of 8
constexpr int LANES = 8, ROWS = 6, NV = 2;
#elif defined(__ARM_NEON)                    // 32 registers of 4
constexpr int LANES = 4, ROWS = 8, NV = 3;
#else                                        // baseline x86-64: 16 registers of 4
constexpr int LANES = 4, ROWS = 4, NV = 2;
#endif
typedef float vec __attribute__((vector_size(LANES * 4), may_alias));
typedef float unaligned_vec __attribute__((vector_size(LANES * 4), aligned(4), may_alias));
typedef uint32_t bits_vec __attribute__((vector_size(LANES * 4)));
typedef uint16_t half_vec __attribute__((vector_size(LANES * 2)));

// The n bytes at p, and zeros
static inline vec load_bytes(const void* p, size_t n) {
#ifdef __AVX512BW__
    return (vec)_mm512_maskz_loadu_epi8(n < sizeof(vec) ? (1ull << n) - 1 : ~0ull, p);
#else
    vec v = {};
    if (n >= sizeof v) memcpy(&v, p, sizeof v);
    else memcpy(&v, p, n);
    return v;
#endif
}

// The LANES values at p; or the first n, and zeros
static inline vec load(const float* p) { return *(const unaligned_vec*)p; }
static inline vec load(const bf16* p) {
    half_vec halves;
    memcpy(&halves, p, sizeof halves);
    return (vec)(__builtin_convertvector(halves, bits_vec) << 16);
}
template <class X> static inline vec load(const X* p, size_t n) {
    if (n >= LANES) return load(p);
    const vec bytes = load_bytes(p, n * sizeof *p);
    return load((const X*)&bytes);
}

// Rounds to X, as bf16's constructor does.
template <class X> static inline vec rounded(vec v) {
    if constexpr (std::is_same_v<X, float>) return v;
    const bits_vec b = (bits_vec)v, up = b + 0x7fff + (b >> 16 & 1), nan = (bits_vec)(v != v);
    return (vec)((nan & 0x7fc00000) | (~nan & up & 0xffff0000));
}
static inline void store(float* p, vec v) { *(unaligned_vec*)p = v; }
static inline void store(bf16* p, vec v) {
    const half_vec halves = __builtin_convertvector((bits_vec)rounded<bf16>(v) >> 16, half_vec);
    memcpy(p, &halves, sizeof halves);
}
template <class X> static inline void store(X* p, vec v, size_t n) {  // the first n lanes
    if (n >= LANES) return store(p, v);
    X all[LANES];
    store(all, v);
    memcpy(p, all, n * sizeof *p);
}

// e^x = 2^n · e^r with n = round(x/ln 2), |r| ≤ ln(2)/2 and a polynomial for e^r. F is float or vec; compilers
// vectorize loops over the former. Relative error below 2^-23 for |x| ≤ 87; 0 below, the value at 87 above, whose
// reciprocal is still a normal number; NaN stays NaN.
template <class F> [[gnu::always_inline]] static inline F exp_approx(F x) {
    using Bits = std::conditional_t<std::is_same_v<F, float>, uint32_t, bits_vec>;
    const F zero = {}, most = zero + 87.0f, clamped = x > most ? most : x;
    const F shifted = clamped * 1.44269504f + 0x1.8p23f;  // adding 1.5·2^23 leaves round(x/ln 2) in the low bits
    const F n = shifted - 0x1.8p23f;
    const F r = (clamped - n * 0.693359375f) - n * -2.12194440e-4f;  // ln 2 in two parts, so that n·ln 2 loses nothing
    F p = zero + 1.9875691500e-4f;  // Cephes' minimax coefficients for (e^r - 1 - r)/r²
    p = p * r + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = p * r * r + r + 1.0f;
    const Bits power = (std::bit_cast<Bits>(shifted) + 127u) << 23;  // 2^n: n+127 in the exponent
    return x < zero - 87.0f ? zero : p * std::bit_cast<F>(power);
}

// The largest of `start` and of `rows` registers at x, `stride` apart, lane by lane
template <class X> static inline vec maxima(vec start, const X* x, size_t stride, size_t rows) {
    vec most[4] = {start, start, start, start};  // four comparisons do not wait for each other
    for (size_t r = 0; r < rows; r++) {
        const vec x_r = load(x + r * stride);
        most[r % 4] = x_r > most[r % 4] ? x_r : most[r % 4];
    }
    for (int i = 1; i < 4; i++) most[0] = most[i] > most[0] ? most[i] : most[0];
    return most[0];
}
template <class X> static float maximum(const X* x, size_t n) {
    const vec most = maxima(vec{} - INFINITY, x, LANES, n / LANES);
    float max = -INFINITY;
    for (int lane = 0; lane < LANES; lane++) max = std::max(max, most[lane]);
    for (size_t i = n / LANES * LANES; i < n; i++) max = std::max(max, (float)x[i]);
    return max;
}

#ifdef _OPENMP
static const char* const threading = "OpenMP";
static int thread_id() { return omp_get_thread_num(); }
static int thread_count() { return omp_get_max_threads(); }
static void set_thread_count(int n) { omp_set_num_threads(n); }
#else
static const char* const threading = "no OpenMP: one thread";
static int thread_id() { return 0; }
static int thread_count() { return 1; }
static void set_thread_count(int) {}
#endif
static void choose_threads();  // for the next step (in "The machine")
static double pass_start;       // when the newest forward pass began
static float* local_scratch(const Workspace& ws) { return ws.local + thread_id() * ws.local_size; }

// --------------------------------------------------------------------------------------------------------------------
// Matmul: C (M, N) = A (M, K) B (K, N)
//
// One routine serves all three products of a linear layer y = x wᵀ:
//     forward    y (rows, OC)  = x (rows, C)       wᵀ (C, OC)
//     backward   dx (rows, C)  = dy (rows, OC)     w (OC, C)
//                dw (OC, C)    = dyᵀ (OC, rows)    x (rows, C)
// The operands differ only in which index is contiguous.

// An operand's element (i, k) is data[i·stride + k] if k is the contiguous index, else data[k·stride + i]. i is a row
// of A or a column of B; the product sums over k.
template <class X> struct Operand {
    const X* data;
    size_t stride;
    bool along_k;

    Operand at(size_t i, size_t k) const {
        return {data + (along_k ? i * stride + k : k * stride + i), stride, along_k};
    }
    X value(size_t i, size_t k) const { return *at(i, k).data; }
};
template <class X> static Operand<X> along_k(const X* data, size_t stride) { return {data, stride, true}; }
template <class X> static Operand<X> across_k(const X* data, size_t stride) { return {data, stride, false}; }

// The plain version: three loops. The tests hold the fast one against it, with Sum = double.
template <class Sum, class X>
static void matmul_plain(Sum* c, size_t M, size_t N, size_t K, Operand<X> A, Operand<X> B) {
    for (size_t m = 0; m < M; m++)
        for (size_t n = 0; n < N; n++) {
            Sum sum = 0;
            for (size_t k = 0; k < K; k++) sum += (Sum)A.value(m, k) * (Sum)B.value(n, k);
            c[m * N + n] = sum;
        }
}

// Stores finished elements in an array of floats, = or +=. matmul knows this type: its microkernel then sums in place.
struct StoreSums {
    float* c;
    size_t stride;
    bool add;

    float* at(size_t m, size_t n) const { return c + m * stride + n; }
    void operator()(size_t m, size_t n, vec x, size_t count) const {
        store(at(m, n), add ? load(at(m, n), count) + x : x, count);
    }
};

// The fast version is matmul(ws, M, N, K, A, B, store, also_read) ("What makes the layers fast", below). It does not
// store C: store(m, n, x, count) receives the finished elements (m, n) .. (m, n + count - 1) in a register, count ≤
// LANES, and adds a bias, applies GELU, ... If it reads another (M, N) array, pass it as also_read, and it is
// prefetched. M, N and K are at least 1.

// --------------------------------------------------------------------------------------------------------------------
// Linear layers: y = x wᵀ + b, with x (rows, C), w (OC, C), b (OC), y (rows, OC)
//
// Element by element, y_rj = Σ_i x_ri w_ji + b_j. So, with dy = ∂loss/∂y,
//     dx_ri = Σ_j dy_rj w_ji       dw_ji = Σ_r dy_rj x_ri       db_j = Σ_r dy_rj.
// The forward variants differ in what happens to the finished product while it is in registers.

template <class X>
static void linear_forward(const Workspace& ws, X* y, const X* residual, const X* x, const X* w, const X* b,
                           size_t rows, size_t C, size_t OC, size_t ldy) {
    matmul(ws, rows, OC, C, along_k(x, C), along_k(w, C), [=](size_t m, size_t n, vec xw, size_t count) {
        const vec sum = b ? xw + load(b + n, count) : xw;
        store(y + m * ldy + n, residual ? load(residual + m * ldy + n, count) + sum : sum, count);
    }, residual);
}

// GELU in GPT-2's tanh form: ½ x (1 + tanh u), u = √(2/π) (x + 0.044715 x³). As ½ (1 + tanh u) = σ(2u), the logistic
// function σ(z) = 1/(1 + e^-z), this is x σ(2u): one exponential. With z = 2u,
//     d(x σ(z))/dx = σ + x σ' z' = σ + x σ (1 - σ) z'.
struct Gelu {
    vec value, derivative;
};
static inline Gelu gelu(vec x) {
    const float c = 2.0f * 0.7978845608f, d = 0.044715f;
    const vec z = c * (x + d * x * x * x), dz = c * (1.0f + 3.0f * d * x * x), s = 1.0f / (1.0f + exp_approx(-z));
    return {x * s, s + x * s * (1.0f - s) * dz};
}

template <class X>
static void linear_gelu_forward(const Workspace& ws, X* y, X* h, const X* x, const X* w, const X* b, size_t rows,
                                size_t C, size_t OC) {
    matmul(ws, rows, OC, C, along_k(x, C), along_k(w, C), [=](size_t m, size_t n, vec xw, size_t count) {
        const vec h_mn = rounded<X>(xw + load(b + n, count));
        if (h) store(h + m * OC + n, h_mn, count);
        store(y + m * OC + n, gelu(h_mn).value, count);
    });
}

template <class X>
static void linear_backward_input(const Workspace& ws, X* dx, const X* dy, const X* w, size_t rows, size_t C, size_t OC,
                                  size_t lddy, bool first, bool last) {
    const Operand<X> A = along_k(dy, lddy), B = across_k(w, C);
    if constexpr (std::is_same_v<X, float>) return matmul(ws, rows, C, OC, A, B, StoreSums{dx, C, !first});
    if (!last) return matmul(ws, rows, C, OC, A, B, StoreSums{ws.dx_sum, C, !first});
    matmul(ws, rows, C, OC, A, B, [=](size_t m, size_t n, vec dyw, size_t count) {
        store(dx + m * C + n, first ? dyw : load(ws.dx_sum + m * C + n, count) + dyw, count);
    });
}

template <class X>
static void linear_gelu_backward_input(const Workspace& ws, X* dh, X* x, const X* h, const X* dy, const X* w,
                                       size_t rows, size_t C, size_t OC) {
    matmul(ws, rows, C, OC, along_k(dy, OC), across_k(w, C), [=](size_t m, size_t n, vec dyw, size_t count) {
        const Gelu g = gelu(load(h + m * C + n, count));
        store(dh + m * C + n, dyw * g.derivative, count);
        if (x) store(x + m * C + n, g.value, count);
    }, h);
}

template <class X>
static void linear_backward_weight(const Workspace& ws, float* dw, float* db, const X* dy, const X* x, size_t rows,
                                   size_t C, size_t OC, size_t lddy, bool add) {
    matmul(ws, OC, C, rows, across_k(dy, lddy), across_k(x, C), StoreSums{dw, C, add});
    if (!db) return;
    constexpr size_t COLUMNS = 64;
#pragma omp parallel for schedule(static)
    for (size_t n0 = 0; n0 < OC; n0 += COLUMNS) {
        size_t columns = std::min(OC - n0, COLUMNS);
        float sum[COLUMNS] = {};
        for (size_t r = 0; r < rows; r++)
            for (size_t i = 0; i < columns; i++) sum[i] += dy[r * lddy + n0 + i];
        for (size_t i = 0; i < columns; i++) db[n0 + i] = add ? db[n0 + i] + sum[i] : sum[i];
    }
}

// --------------------------------------------------------------------------------------------------------------------
// Embedding: x[b,t] = wte[token] + wpe[t]

template <class X>
static void embedding_forward(X* x, const int* tokens, const X* wte, const X* wpe, size_t B, size_t T, size_t C) {
    pass_start = seconds();
#pragma omp parallel for schedule(static) if (B * T > 1)
    for (size_t bt = 0; bt < B * T; bt++) {
        const X *token = wte + tokens[bt] * C, *position = wpe + bt % T * C;
        for (size_t i = 0; i < C; i++) x[bt * C + i] = (float)token[i] + (float)position[i];
    }
}

// A token may occur many times, so threads share out channels, not tokens.
template <class X>
static void embedding_backward(float* dwte, float* dwpe, const X* dx, const Inputs& inputs, size_t B, size_t T,
                               size_t C, bool add) {
#pragma omp parallel for schedule(static)
    for (size_t c = 0; c < C; c += CACHE_LINE) {
        size_t channels = std::min(C - c, CACHE_LINE);
        for (size_t bt = 0; bt < B * T; bt++) {
            const X* dx_bt = dx + bt * C + c;
            float *dwte_bt = dwte + inputs.x[bt] * C + c, *dwpe_t = dwpe + bt % T * C + c;
            bool add_sequence = add || bt >= T;
            for (size_t i = 0; i < channels; i++) dwte_bt[i] += dx_bt[i];
            for (size_t i = 0; i < channels; i++) dwpe_t[i] = add_sequence ? dwpe_t[i] + dx_bt[i] : (float)dx_bt[i];
        }
    }
}

// --------------------------------------------------------------------------------------------------------------------
// LayerNorm: n = (x - mean) rstd, y = n w + b, over the C channels of each row; rstd = 1/√(variance + 1e-5)

template <class X>
static void layernorm_forward(X* y, float* mean, float* rstd, const X* x, const X* w, const X* b, size_t rows,
                              size_t C, bool again) {
#pragma omp parallel for schedule(static) if (rows > 1)
    for (size_t r = 0; r < rows; r++) {
        const X* x_r = x + r * C;
        X* y_r = y + r * C;
        float sum = 0, variance = 0, m = again ? mean[r] : 0, s = again ? rstd[r] : 0;
        if (!again) {
#pragma omp simd reduction(+ : sum)
            for (size_t i = 0; i < C; i++) sum += x_r[i];
            m = sum / C;
#pragma omp simd reduction(+ : variance)
            for (size_t i = 0; i < C; i++) variance += (x_r[i] - m) * (x_r[i] - m);
            s = 1.0f / sqrtf(variance / C + 1e-5f);
            if (mean) mean[r] = m, rstd[r] = s;  // for backward
        }
        for (size_t i = 0; i < C; i++) y_r[i] = (x_r[i] - m) * s * w[i] + b[i];
    }
}

// Backward. The gradient of n is g = dy w. n depends on x directly, through the mean and through rstd (Kronecker's δ):
//     ∂n_j/∂x_i = rstd (δ_ij - 1/C - n_i n_j/C),
// since ∂mean/∂x_i = 1/C and ∂rstd/∂x_i = -rstd² n_i/C (differentiate (variance + eps)^-½). Summed over j with g_j:
//     dx_i = rstd (g_i - mean(g) - n_i mean(g n)).
// dw = Σ dy n and db = Σ dy over rows: first over chunks of rows, then over chunks in order.
constexpr size_t LAYERNORM_CHUNK = 32;

template <class X>
static void layernorm_backward(const Workspace& ws, X* dx, float* dw, float* db, const X* dy, const X* x, const X* w,
                               const float* mean, const float* rstd, size_t rows, size_t C, bool add_dx, bool add) {
    const size_t chunks = ceil_div(rows, LAYERNORM_CHUNK);
    float* partial = ws.partial;  // (chunks, 2, C)
#pragma omp parallel for schedule(static)
    for (size_t chunk = 0; chunk < chunks; chunk++) {
        float *dw_chunk = partial + chunk * 2 * C, *db_chunk = dw_chunk + C;
        std::fill_n(dw_chunk, 2 * C, 0.0f);
        for (size_t r = chunk * LAYERNORM_CHUNK; r < std::min(rows, (chunk + 1) * LAYERNORM_CHUNK); r++) {
            const X *x_r = x + r * C, *dy_r = dy + r * C;
            X* dx_r = dx + r * C;
            float m = mean[r], s = rstd[r], g_sum = 0, gn_sum = 0;
#pragma omp simd reduction(+ : g_sum, gn_sum)
            for (size_t i = 0; i < C; i++) {
                float n = (x_r[i] - m) * s, dy_i = dy_r[i], g = dy_i * w[i];
                dw_chunk[i] += dy_i * n;
                db_chunk[i] += dy_i;
                g_sum += g;
                gn_sum += g * n;
            }
            float g_mean = g_sum / C, gn_mean = gn_sum / C;
            for (size_t i = 0; i < C; i++) {
                float n = (x_r[i] - m) * s, g = (float)dy_r[i] * (float)w[i];
                float dx_i = s * (g - g_mean - n * gn_mean);
                dx_r[i] = add_dx ? dx_r[i] + dx_i : dx_i;
            }
        }
    }
#pragma omp parallel for schedule(static)
    for (size_t i = 0; i < C; i++) {
        float dw_i = 0, db_i = 0;
        for (size_t chunk = 0; chunk < chunks; chunk++) {
            dw_i += partial[chunk * 2 * C + i];
            db_i += partial[chunk * 2 * C + C + i];
        }
        dw[i] = add ? dw[i] + dw_i : dw_i;
        db[i] = add ? db[i] + db_i : db_i;
    }
}

// --------------------------------------------------------------------------------------------------------------------
// Attention: o = softmax(causal(q kᵀ/√HS)) v, in each head of each sequence

// One head's rows: row i begins at data + i·stride.
template <class X> struct Rows {
    X* data;
    size_t stride;

    X* operator[](size_t i) const { return data + i * stride; }
};

template <class X> static Rows<X> rows_of(const Heads<X>& heads, size_t b, size_t h) {
    return {heads.at(b, h, 0), heads.row};
}

// The plain version, which the tests hold the fast ones against: four passes over the keys j ≤ i of each query i.
// o (T, HS) and p (T, T) =; p_ij with j > i is neither written nor read.
template <class Sum, class X>
static void attention_plain_forward(Sum* o, Sum* p, Rows<const X> q, Rows<const X> k, Rows<const X> v, size_t T,
                                    size_t HS) {
    for (size_t i = 0; i < T; i++) {
        Sum *p_i = p + i * T, *o_i = o + i * HS, max = -INFINITY, sum = 0;
        for (size_t j = 0; j <= i; j++) {  // 1: scores, q_i·k_j/√HS
            Sum score = 0;
            for (size_t d = 0; d < HS; d++) score += (Sum)q[i][d] * (Sum)k[j][d];
            p_i[j] = score / std::sqrt((Sum)HS);
            max = std::max(max, p_i[j]);
        }
        for (size_t j = 0; j <= i; j++) {  // 2: e^(score - max), which is at most 1
            p_i[j] = std::exp(p_i[j] - max);
            sum += p_i[j];
        }
        for (size_t j = 0; j <= i; j++) p_i[j] /= sum;  // 3: p = softmax(scores)
        for (size_t d = 0; d < HS; d++) o_i[d] = 0;
        for (size_t j = 0; j <= i; j++)  // 4: o_i = Σ_j p_ij v_j
            for (size_t d = 0; d < HS; d++) o_i[d] += p_i[j] * (Sum)v[j][d];
    }
}

// Backward, given do = ∂loss/∂o. With p = softmax(s), s = q kᵀ/√HS, o = p v:
//     dv_j = Σ_i p_ij do_i        dp_ij = do_i·v_j
//     ds_ij = p_ij (dp_ij - Σ_j' p_ij' dp_ij')     (softmax: ∂p_j'/∂s_j = p_j' (δ_jj' - p_j))
//     dq_i = Σ_j ds_ij k_j/√HS    dk_j = Σ_i ds_ij q_i/√HS
// The plain version: dq, dk, dv (T, HS) =; p (T, T) from forward
template <class Sum, class X>
static void attention_plain_backward(Sum* dq, Sum* dk, Sum* dv, Rows<const X> dout, const Sum* p, Rows<const X> q,
                                     Rows<const X> k, Rows<const X> v, size_t T, size_t HS) {
    const Sum scale = 1 / std::sqrt((Sum)HS);
    for (Sum* d : {dq, dk, dv}) std::fill_n(d, T * HS, Sum(0));
    std::vector<Sum> dp(T);
    for (size_t i = 0; i < T; i++) {
        Sum p_dp = 0;  // Σ_j p_ij dp_ij
        for (size_t j = 0; j <= i; j++) {
            dp[j] = 0;
            for (size_t d = 0; d < HS; d++) dp[j] += (Sum)dout[i][d] * (Sum)v[j][d];
            p_dp += p[i * T + j] * dp[j];
        }
        for (size_t j = 0; j <= i; j++) {
            const Sum p_ij = p[i * T + j], ds_ij = p_ij * (dp[j] - p_dp);
            for (size_t d = 0; d < HS; d++) {
                dv[j * HS + d] += p_ij * (Sum)dout[i][d];
                dq[i * HS + d] += scale * ds_ij * (Sum)k[j][d];
                dk[j * HS + d] += scale * ds_ij * (Sum)q[i][d];
            }
        }
    }
}

// The fast versions of one head, in tiles and for a single query, are below, in "What makes the layers fast".
template <class X>
static void attention_forward(const Workspace& ws, Heads<X> o, float* lse, Heads<const X> q,
                              const KeysValues<const X>& kv, const AttentionShape& s) {
    const size_t B = s.B, NH = s.NH, HS = s.HS, queries = s.queries, before = s.before;
#pragma omp parallel for collapse(2) schedule(dynamic)
    for (size_t b = 0; b < B; b++)
        for (size_t h = 0; h < NH; h++) {
            Rows<const X> k = rows_of(kv.keys(h), b, h), v = rows_of(kv.values(h), b, h);
            float *local = local_scratch(ws), *lse_bh = lse ? lse + (b * NH + h) * queries : nullptr;
            if (queries == 1 && !lse)
                attention_head_decode(local, o.at(b, h, 0), q.at(b, h, 0), k, v, before + 1, HS);
            else
                attention_head_forward(local, rows_of(o, b, h), lse_bh, rows_of(q, b, h), k, v, queries, before, HS);
        }
}

template <class X, class DKV>
static void attention_backward(const Workspace& ws, Heads<X> dq, const KeysValues<DKV>& dkv, Heads<const X> dout,
                               Heads<const X> o, const float* lse, Heads<const X> q, const KeysValues<const X>& kv,
                               const AttentionShape& s) {
    const size_t B = s.B, NH = s.NH, HS = s.HS, T = s.queries;
#pragma omp parallel for collapse(2) schedule(dynamic)
    for (size_t b = 0; b < B; b++)
        for (size_t h = 0; h < NH; h++)
            attention_head_backward(local_scratch(ws), rows_of(dq, b, h), rows_of(dkv.keys(h), b, h),
                                    rows_of(dkv.values(h), b, h), rows_of(dout, b, h), rows_of(o, b, h),
                                    lse + (b * NH + h) * T, rows_of(q, b, h), rows_of(kv.keys(h), b, h),
                                    rows_of(kv.values(h), b, h), T, HS);
}

// --------------------------------------------------------------------------------------------------------------------
// Skip-Layer Attention (explained in section 2): the sum of two layers' gradients

template <class X>
static void skip_backward(X* dqkv, const float* own, const float* above, const Config& c, int l, size_t rows) {
    const size_t C = c.C, HS = c.head_size();
#pragma omp parallel for schedule(static)
    for (size_t r = 0; r < rows; r++)
        for (int h = 0; h < c.NH; h++) {
            const bool from_own = !skips(c, l, h), from_above = above && h < c.skip_heads;
            for (size_t part : {0, 1}) {  // keys, values
                const size_t at = (r * 2 + part) * C + h * HS;
                X* out = dqkv + (r * 3 + 1 + part) * C + h * HS;
                if (from_own && from_above)
                    for (size_t i = 0; i < HS; i++) out[i] = own[at + i] + above[at + i];
                else if (from_own || from_above)
                    std::copy_n((from_own ? own : above) + at, HS, out);
            }
        }
}

// --------------------------------------------------------------------------------------------------------------------
// Depth-Attention (explained and derived in section 2): mixing values, a token at a time
//
// A token's sources lie far apart, its heads together: so each source is read once, for all heads.

// These two use registers explicitly: a compiler's loop takes 32 values of bf16 at a time, more than a small head has.
template <class X, class Y> static inline float dot(const X* a, const Y* b, size_t n) {
    vec sums = {};
    for (size_t i = 0; i < n; i += LANES) sums += load(a + i, n - i) * load(b + i, n - i);
    float sum = 0;
#pragma omp simd reduction(+ : sum)
    for (int lane = 0; lane < LANES; lane++) sum += sums[lane];
    return sum;
}
template <class X> static inline void add_scaled(float* y, float a, const X* x, size_t n) {  // y += a x
    size_t i = 0;
    for (; i + LANES <= n; i += LANES) store(y + i, load(y + i) + a * load(x + i));
    for (; i < n; i++) y[i] += a * x[i];
}

template <class X>
static void depth_forward(const Workspace& ws, Heads<X> v, float* a, Heads<const X> q, Heads<const X> k,
                          ptrdiff_t layer_stride, const Config& c, int l, const AttentionShape& shape) {
    const DepthSources sources = depth_sources(c, l);
    const size_t NH = shape.NH, HS = shape.HS, queries = shape.queries, rows = shape.B * queries, S = sources.count();
    const float scale = 1.0f / sqrtf(HS);
#pragma omp parallel for schedule(static) if (rows > 1)
    for (size_t r = 0; r < rows; r++) {
        const size_t b = r / queries, i = r % queries, t = shape.before + i;
        float* mixed = local_scratch(ws);   // (NH, HS)
        float* a_l = a + r * (S + 1) * NH;  // (S + 1, NH); of the layer itself last
        for (size_t n = 0; n <= S; n++)
            for (size_t h = 0; h < NH; h++)
                a_l[n * NH + h] = scale * dot(q.at(b, h, i), k.at(b, h, t) + layer_stride * (sources[n] - l), HS);
        for (size_t h = 0; h < NH; h++) {
            float max = -INFINITY, sum = 0;
            for (size_t n = 0; n <= S; n++) max = std::max(max, a_l[n * NH + h]);
            for (size_t n = 0; n <= S; n++) {
                a_l[n * NH + h] = exp_approx(a_l[n * NH + h] - max);
                sum += a_l[n * NH + h];
            }
            for (size_t n = 0; n <= S; n++) a_l[n * NH + h] /= sum;
            for (size_t d = 0; d < HS; d++) mixed[h * HS + d] = a_l[S * NH + h] * v.at(b, h, t)[d];
        }
        for (size_t n = 0; n < S; n++)
            for (size_t h = 0; h < NH; h++) {
                const X* v_j = v.at(b, h, t) + layer_stride * (sources[n] - l);
                add_scaled(mixed + h * HS, a_l[n * NH + h], v_j, HS);
            }
        for (size_t h = 0; h < NH; h++) std::copy_n(mixed + h * HS, HS, v.at(b, h, t));
    }
}

template <class X>
static void depth_backward(const Workspace& ws, X* dqkv, const float* dkv, float* ds, const float* a, X* qkv,
                           ptrdiff_t layer_stride, const Config& c, int l, size_t rows) {
    const size_t C = c.C, NH = c.NH, HS = c.head_size();
    const DepthSources sources = depth_sources(c, l);
    const size_t S = sources.count();
    const float scale = 1.0f / sqrtf(HS);
    const int last = last_depth_reader(c, l);
#pragma omp parallel for schedule(static)
    for (size_t r = 0; r < rows; r++) {
        float *dq = local_scratch(ws), *dk = dq + C, *dv = dk + C, *delta = dv + C;  // (C), (C), (C), (NH)
        X *q = qkv + r * 3 * C, *k = q + C, *v = k + C, *dqkv_r = dqkv + r * 3 * C;
        std::copy_n(dqkv_r, C, dq);
        std::copy_n(dkv + r * 2 * C, C, dk);
        std::copy_n(dkv + r * 2 * C + C, C, dv);
        // Gather: dk_l += Σ_m ds_{m,l} q_m/√HS, dṽ_l += Σ_m a_{m,l} dṽ_m. Layer m's a and ds follow layer m-1's; layer
        // 0 has none.
        const float *a_m = a, *ds_m = ds;
        for (int m = l + 1, previous = S; m <= last; m++) {
            const DepthSources of_m = depth_sources(c, m);
            const size_t n = of_m.index(l), S_m = of_m.count();
            if (m > 1) a_m += depth_slot(rows, previous + 1, NH), ds_m += depth_slot(rows, previous, NH);
            previous = S_m;
            const X *q_m = q + layer_stride * (m - l), *dv_m = v + layer_stride * (m - l);
            for (size_t h = 0; h < NH; h++) {
                const float a_ml = a_m[(r * (S_m + 1) + n) * NH + h], ds_ml = scale * ds_m[(r * S_m + n) * NH + h];
                add_scaled(dk + h * HS, ds_ml, q_m + h * HS, HS);
                add_scaled(dv + h * HS, a_ml, dv_m + h * HS, HS);
            }
        }
        // Through the mixing; dv is dṽ_l up to here
        const float* a_l = a + r * (S + 1) * NH;  // (S + 1, NH)
        float* ds_l = ds + r * S * NH;            // (S, NH)
        for (size_t h = 0; h < NH; h++) delta[h] = dot(dv + h * HS, v + h * HS, HS);
        for (size_t n = 0; n < S; n++) {
            const X *k_j = k + layer_stride * (sources[n] - l), *v_j = k_j + C;
            for (size_t h = 0; h < NH; h++) {
                const float ds_j = a_l[n * NH + h] * (dot(dv + h * HS, v_j + h * HS, HS) - delta[h]);
                ds_l[n * NH + h] = ds_j;
                add_scaled(dq + h * HS, scale * ds_j, k_j + h * HS, HS);
            }
        }
        for (size_t h = 0; h < NH; h++) {
            float ds_own = 0, a_own = S > 0 ? a_l[S * NH + h] : 1;
            for (size_t n = 0; n < S; n++) ds_own -= ds_l[n * NH + h];
            for (size_t i = h * HS; i < (h + 1) * HS; i++) {
                dqkv_r[i] = dq[i] + scale * ds_own * k[i];
                dqkv_r[C + i] = dk[i] + scale * ds_own * q[i];
                dqkv_r[2 * C + i] = a_own * dv[i];
            }
        }
        std::copy_n(dv, C, v);
    }
}

// --------------------------------------------------------------------------------------------------------------------
// KV cache

template <class X>
static void cache_append(Heads<X> k, Heads<X> v, Heads<const X> new_k, Heads<const X> new_v, int first_head,
                         const AttentionShape& s) {
    for (int b = 0; b < s.B; b++)
        for (int h = first_head; h < s.NH; h++)
            for (int i = 0; i < s.queries; i++) {
                std::copy_n(new_k.at(b, h, i), s.HS, k.at(b, h, s.before + i));
                std::copy_n(new_v.at(b, h, i), s.HS, v.at(b, h, s.before + i));
            }
}

// --------------------------------------------------------------------------------------------------------------------
// Classifier

// p_target is computed apart, since its logit is overwritten, and rounded to X, before 1 is subtracted.
template <class X>
static void softmax_cross_entropy(float* losses, X* all_logits, const int* targets, size_t rows, size_t V, size_t Vp,
                                  float gradient_scale) {
#pragma omp parallel for schedule(static)
    for (size_t r = 0; r < rows; r++) {
        X* logits = all_logits + r * Vp;
        const int target = targets[r];
        const float max = maximum(logits, V), logit_target = logits[target];
        double total = 0;
        for (size_t begin = 0; begin < V; begin += 1024) {
            float part = 0;
#pragma omp simd reduction(+ : part)
            for (size_t i = begin; i < std::min(V, begin + 1024); i++) part += exp_approx(logits[i] - max);
            total += part;
        }
        const float sum = (float)total;
        losses[r] = logf(sum) + max - logit_target;
        if (gradient_scale == 0) continue;
        const float p_target = exp_approx(logit_target - max) / sum, scale = gradient_scale / sum;
        for (size_t i = 0; i < V; i++) logits[i] = scale * exp_approx(logits[i] - max);
        logits[target] = gradient_scale * (p_target - 1.0f);
    }
}

template <class X>
static void logits_forward(const Workspace& ws, float* logits, const X* x, const X* wte, size_t rows, size_t C,
                           size_t V, size_t) {
    matmul(ws, rows, V, C, along_k(x, C), along_k(wte, C), StoreSums{logits, V, false});
}

// --------------------------------------------------------------------------------------------------------------------
// Several processes (explained in section 2)

#ifdef GPT2_MPI
static std::future<void> reduction;  // the newest, which waits for those before it

// In a thread of its own, which sleeps in between: MPI goes on with a message only when it is called.
static void reduce_gradients(Model& m, int l) {
    reduction = std::async(std::launch::async, [&m, l, former = std::move(reduction)] {
        if (former.valid()) former.wait();
        for_slots(m.tensors, l, [&](const Tensor& t, size_t slot) {
            const size_t n = t.share();
            MPI_Request request;
            MPI_Ialltoall(m.gradients + slot, n, MPI_FLOAT, m.received, n, MPI_FLOAT, MPI_COMM_WORLD, &request);
            for (int done = 0; !done; usleep(50)) MPI_Test(&request, &done, MPI_STATUS_IGNORE);
            float* sum = m.own_gradients + slot / processes;
            std::copy_n(m.received, n, sum);
            for (int p = 1; p < processes; p++)
                for (size_t i = 0; i < n; i++) sum[i] += m.received[p * n + i];
        });
    });
    if (l < 0) reduction.get();
}

template <class X> static void gather_weights(ModelOf<X>& m) {
    const MPI_Datatype type = sizeof(X) == 4 ? MPI_FLOAT : MPI_UINT16_T;
    std::vector<MPI_Request> requests;  // all slots at once, so that the link need not wait for any
    for (const Tensor& t : m.tensors)
        for (size_t slot = t.place; slot < t.place + t.layers * t.stride(); slot += t.stride())
            MPI_Iallgather(MPI_IN_PLACE, 0, type, m.weights + slot, t.share(), type, MPI_COMM_WORLD,
                           &requests.emplace_back());
    MPI_Waitall(requests.size(), requests.data(), MPI_STATUSES_IGNORE);
}
#endif

// --------------------------------------------------------------------------------------------------------------------
// Losses, norm, AdamW

static void sum_losses(Results& results, const float* losses, size_t n, bool add) {
    results.loss_sum = std::accumulate(losses, losses + n, add ? results.loss_sum : 0.0);
}

constexpr size_t UPDATE_CHUNK = 1 << 12;  // elements that a thread goes through at a time

// Σ g² over chunks, then over the chunks in order. Gradients end here, so the number of threads may change.
static void global_norm(const Workspace& ws, Results& results, const float* g, size_t n, float clip) {
    const size_t chunks = ceil_div(n, UPDATE_CHUNK);
#pragma omp parallel for schedule(static)
    for (size_t chunk = 0; chunk < chunks; chunk++) {
        double sum = 0;
#pragma omp simd reduction(+ : sum)
        for (size_t i = chunk * UPDATE_CHUNK; i < std::min(n, (chunk + 1) * UPDATE_CHUNK); i++)
            sum += (double)g[i] * g[i];
        ws.squares[chunk] = sum;
    }
    results.norm = sqrt(sum_all(std::accumulate(ws.squares, ws.squares + chunks, 0.0)));
    results.gradient_scale = clip_scale(results.norm, clip);
    choose_threads();
}

// g is the clipped gradient. m = β1 m + (1-β1) g and v = β2 v + (1-β2) g² are moving averages of g and g². As both
// start at 0, they are too small by the factors 1-β1^step and 1-β2^step; m̂ and v̂ are m and v divided by these. Then w
// -= lr (m̂/(√v̂ + eps) + decay w)   (Loshchilov and Hutter, arXiv 1711.05101).
template <class X>
static void adamw_update(X* working, float* w, float* m, float* v, const float* gradient, size_t n, const AdamW& a,
                         float decay, const Results& results, float m_correction, float v_correction) {
    const float gradient_scale = results.gradient_scale;
    if (gradient_scale == 0) return;
#pragma omp parallel for schedule(static) if (n > UPDATE_CHUNK)
    for (size_t chunk = 0; chunk < n; chunk += UPDATE_CHUNK) {
        size_t end = std::min(n, chunk + UPDATE_CHUNK);
#pragma omp simd
        for (size_t i = chunk; i < end; i++) {
            float g = gradient[i] * gradient_scale;
            m[i] = a.beta1 * m[i] + (1.0f - a.beta1) * g;
            v[i] = a.beta2 * v[i] + (1.0f - a.beta2) * g * g;
            w[i] -= a.lr * (m[i] * m_correction / (sqrtf(v[i] * v_correction) + a.eps) + decay * w[i]);
        }
        round_weights(working + chunk, w + chunk, end - chunk);
    }
}

template <class X> static void round_weights(X* working, const float* w, size_t n) {
    if constexpr (!std::is_same_v<X, float>) std::copy_n(w, n, working);  // float: they are the same array
}

static StepResults read_results(Results& results) { return results; }

// --------------------------------------------------------------------------------------------------------------------
// What makes the layers fast: matmul
//
// The microkernel sums up ROWS × NR elements of C in registers. A step, one k, takes NR neighbouring elements of B as
// NV vectors, and ROWS elements of A, each broadcast to all lanes: with AVX-512, 28 multiply-adds and 16 loads.
// Processors do two of each per cycle, so the loads hide behind the arithmetic, wherever A's elements lie. Therefore:
//     - A is read where it lies, along k or across it.
//     - B is read where it lies if n is its contiguous index and its rows are short, so that L2 holds them. Long rows
//       are copied into panels [step][NR], without gaps. If k is contiguous, as in the weights of a forward pass, B is
//       transposed into panels. Either takes as long as multiplying 3 to 6 rows of A.
//     - C is cut into blocks, which threads take one by one. A block's part of B stays in L2 while the rows of A go by.
//     - K is cut into chunks of KC steps, so that ROWS rows of A stay in L1 while they meet all panels of a block.
//       A block's partial sums wait in L2; the next chunk's sums begin at 0, since one long chain of additions would
//       round more, and are added to them. (AMX continues the former ones.)
//     - Finished sums go through `store`: bias, GELU and residual need no pass over memory of their own.
// Every element is summed in the same order, for any number of threads. (After "Anatomy of High-Performance Matrix
// Multiplication", Goto and van de Geijn 2008, and BLIS, which pack A too.)

// A cell is four bytes, what the microkernel multiplies in one lane and step: a float, or two neighbours along k if the
// processor multiplies pairs of bf16. On other processors bf16 is converted to float when it is packed.
struct Pair {
    bf16 low, high;
};
#if defined(__AMX_BF16__)      // tiles of 16 × 16 sums, 16 pairs of k at a time
static_assert(LANES == 16, "AMX takes AVX-512 beside it: drop -mno-avx512f, or add -mno-amx-bf16");
constexpr bool HAS_PAIRS = true, HAS_AMX = true;
#elif defined(__AVX512BF16__)  // vectors of 16 sums, a pair at a time
constexpr bool HAS_PAIRS = true, HAS_AMX = false;
#else
constexpr bool HAS_PAIRS = false, HAS_AMX = false;
#endif
template <class X> constexpr bool PAIRS = HAS_PAIRS && std::is_same_v<X, bf16>;
template <class X> constexpr bool AMX = HAS_AMX && std::is_same_v<X, bf16>;
template <class X> using Cell = std::conditional_t<PAIRS<X>, Pair, float>;
template <class X> constexpr size_t K_PER_STEP = PAIRS<X> ? 2 : 1;
template <class X> constexpr size_t steps(size_t K) {  // with AMX, whole tiles; cells past K are 0
    return round_up(ceil_div(K, K_PER_STEP<X>), AMX<X> ? LANES : 1);
}

constexpr size_t NR = NV * LANES;
template <class X> constexpr size_t MR = AMX<X> ? 2 * LANES : ROWS;

template <size_t FROM, size_t... I>
static vec interleave(vec a, vec b, std::index_sequence<I...>) {  // a[FROM] b[FROM] a[FROM + 1] b[FROM + 1] ...
    return __builtin_shufflevector(a, b, (FROM + I / 2 + I % 2 * LANES)...);
}

// Transposes LANES × LANES cells in registers. Interleaving rows i and i + LANES/2 rotates the bits of (row, column) by
// one; after log2(LANES) times, row and column have changed places.
static inline void transpose(vec (&rows)[LANES]) {
    constexpr auto lanes = std::make_index_sequence<LANES>();
    vec other[LANES];
#pragma GCC unroll 4
    for (int stage = 1; stage < LANES; stage *= 2) {
#pragma GCC unroll 16
        for (int i = 0; i < LANES / 2; i++) {
            other[2 * i] = interleave<0>(rows[i], rows[i + LANES / 2], lanes);
            other[2 * i + 1] = interleave<LANES / 2>(rows[i], rows[i + LANES / 2], lanes);
        }
#pragma GCC unroll 16
        for (int i = 0; i < LANES; i++) rows[i] = other[i];
    }
}

// The cells of a's first row from its first k on, of which `remaining` values are left; behind these, zeros
template <class X> static inline vec cells_along_k(Operand<X> a, size_t remaining) {
    if constexpr (PAIRS<X>) return load_bytes(a.data, remaining * sizeof(X));  // a pair is two neighbours as they lie
    else return load(a.data, remaining);
}

// One cell of each of a's first n rows, with `remaining` values each; others are 0.
template <class X> static inline vec cells_across_k(Operand<X> a, size_t remaining, size_t n) {
    if (n == 0 || remaining == 0) return vec{};
    const vec low = load(a.data, n);
    if constexpr (!PAIRS<X>) return low;
    const vec high = remaining > 1 ? load(a.at(0, 1).data, n) : vec{};
    return (vec)((bits_vec)low >> 16 | (bits_vec)high);  // bf16 as float is the upper half of each lane
}

// Packs n rows of A, or columns of B, over K: into panels [n / width][step][width], or if `along` into rows [n][step]
// as AMX takes A. Cells past n or K are 0, up to whole panels and steps. `width` is a multiple of LANES.
template <class X> static void pack(Cell<X>* out, bool along, size_t width, Operand<X> a, size_t n, size_t K) {
    constexpr size_t PER = K_PER_STEP<X>;
    const size_t S = steps<X>(K), high = round_up(n, width) / LANES, wide = ceil_div(S, LANES);
    for (size_t i = 0; i < high * wide; i++) {  // blocks of LANES × LANES cells, in the order in which they lie
        const size_t n0 = LANES * (a.along_k ? i / wide : i % high), step0 = LANES * (a.along_k ? i % wide : i / high);
        const size_t count = std::min<size_t>(n - std::min(n, n0), LANES);
        auto remaining = [&](size_t step) { return K - std::min(K, step * PER); };
        vec block[LANES];
#pragma GCC unroll 16
        for (size_t j = 0; j < LANES; j++) {
            if (!a.along_k) block[j] = cells_across_k(a.at(n0, (step0 + j) * PER), remaining(step0 + j), count);
            else block[j] = j < count ? cells_along_k(a.at(n0 + j, step0 * PER), remaining(step0)) : vec{};
        }
        if (a.along_k != along) transpose(block);
        Cell<X>* to = along ? out + n0 * S + step0 : out + n0 / width * width * S + step0 * width + n0 % width;
#pragma GCC unroll 16
        for (size_t j = 0; j < LANES; j++)
            if (along || step0 + j < S) store((float*)(to + j * (along ? S : width)), block[j]);
    }
}

// n rows of A as the microkernel takes them: where they lie, or packed into `buffer`, of steps(K) · round_up(n,
// 2·LANES) cells. It packs pairs whose two values are not neighbours, or an odd K; bf16 on processors without pairs;
// with AMX, rows or steps that do not fill whole tiles.
template <class X> static Operand<Cell<X>> cells_of_A(Cell<X>* buffer, Operand<X> a, size_t n, size_t K) {
    constexpr size_t PER = K_PER_STEP<X>;
    if constexpr (sizeof(Cell<X>) == PER * sizeof(X)) {
        const bool whole = !AMX<X> || (n % MR<X> == 0 && steps<X>(K) * PER == K);
        if (PER == 1 || (a.along_k && a.stride % PER == 0 && K % PER == 0 && whole))
            return {(const Cell<X>*)a.data, a.stride / (a.along_k ? PER : 1), a.along_k};
    }
    const size_t width = round_up(n, AMX<X> ? MR<X> : LANES);
    pack(buffer, AMX<X>, width, a, n, K);
    return {buffer, AMX<X> ? steps<X>(K) : width, AMX<X>};
}

// Columns of B as the microkernel takes them, in panels of NR
template <class X> struct Panels {
    const Cell<X>* data;
    size_t step_stride, panel_stride;

    const Cell<X>* at(size_t n) const { return data + n / NR * panel_stride; }  // n: a multiple of NR
    Panels from_k(size_t k) const { return {data + k / K_PER_STEP<X> * step_stride, step_stride, panel_stride}; }
    Panels from_n(size_t n) const { return {data + n, step_stride, panel_stride}; }  // within the first panel
};

// n columns of B: where they lie, if possible, else packed into `buffer`, of steps(K) · round_up(n, NR) cells
template <class X>
static Panels<X> cells_of_B(Cell<X>* buffer, Operand<X> b, size_t n, size_t K, bool in_place = true) {
    if constexpr (std::is_same_v<X, float>)
        if (in_place && !b.along_k && n % LANES == 0) return {b.data, b.stride, NR};
    pack(buffer, false, NR, b, n, K);
    return {buffer, NR, NR * steps<X>(K)};
}

// sum += x · y, lane by lane. A lane of bf16 holds a pair: sum += x.low y.low + x.high y.high.
template <class X> static inline void add_products(vec& sum, vec x, vec y) {
    if constexpr (std::is_same_v<X, float>) return (void)(sum += x * y);
#ifdef __AVX512BF16__
    sum = (vec)_mm512_dpbf16_ps((__m512)sum, (__m512bh)x, (__m512bh)y);
#else
    const bits_vec upper = bits_vec{} + 0xffff0000u;
    sum += (vec)((bits_vec)x << 16) * (vec)((bits_vec)y << 16);
    sum += (vec)((bits_vec)x & upper) * (vec)((bits_vec)y & upper);
#endif
}

// The same, with one cell of A in all lanes of x and a register of cells of B
template <class CellType> static inline void multiply_add(vec& sum, CellType a, const CellType* b) {
    if constexpr (std::is_same_v<CellType, float>) sum += a * load(b);
    else add_products<bf16>(sum, (vec)(bits_vec{} + std::bit_cast<uint32_t>(a)), load((const float*)b));
}

// The microkernel: c (R, V·LANES) = or += Σ over steps of a[., step] ⊗ b[step, .]. All of c is in registers meanwhile.
template <int R, int V, class CellType>
[[gnu::noinline]] static void microkernel(float* c, size_t ldc, const CellType* a, size_t a_row, size_t a_step,
                                          const CellType* b, size_t ldb, size_t steps, bool add) {
    vec sum[R][V] = {};
    for (size_t step = 0; step < steps; step++, a += a_step, b += ldb) {
#pragma GCC unroll 16
        for (int i = 0; i < R; i++)
#pragma GCC unroll 4
            for (int j = 0; j < V; j++) multiply_add(sum[i][j], a[i * a_row], b + j * LANES);
    }
#pragma GCC unroll 16
    for (int i = 0; i < R; i++)
#pragma GCC unroll 4
        for (int j = 0; j < V; j++)
            store(c + i * ldc + j * LANES, add ? load(c + i * ldc + j * LANES) + sum[i][j] : sum[i][j]);
}

// Rows per tile. `rows` are split evenly into tiles of at most MR: a tile of only a few rows has too few sums to hide
// the latency of a multiply-add.
template <class X> constexpr size_t tile_rows(size_t rows) {
    return AMX<X> ? MR<X> : ceil_div(rows, ceil_div(rows, MR<X>));
}

// The microkernel for `rows` ≤ ROWS and `columns` ≤ NR. It writes whole vectors of c.
template <int R = ROWS, int V = NV, class CellType>
static inline void multiply_tile(float* c, size_t ldc, Operand<CellType> a, size_t rows, const CellType* b, size_t ldb,
                                 size_t columns, size_t steps, bool add) {
    if constexpr (R > 1)
        if (rows < R) return multiply_tile<R - 1, V>(c, ldc, a, rows, b, ldb, columns, steps, add);
    if constexpr (V > 1)
        if (columns <= (V - 1) * LANES) return multiply_tile<R, V - 1>(c, ldc, a, rows, b, ldb, columns, steps, add);
    const size_t a_row = a.along_k ? a.stride : 1, a_step = a.along_k ? 1 : a.stride;
    microkernel<R, V>(c, ldc, a.data, a_row, a_step, b, ldb, steps, add);
}

#ifdef __AMX_BF16__
// AMX has eight tiles of 16 rows of 64 bytes: 16 × 16 sums in float, or 16 × 16 pairs of bf16. Tiles 0 to 3 are the
// four quarters of c, 4 and 5 the halves of a, 6 and 7 the halves of b.
struct alignas(64) TileShapes {
    uint8_t palette = 1, start_row = 0, reserved[14] = {};
    uint16_t row_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
    uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
};

// c (32, 32) = or += Σ over steps, a multiple of 16, of a[., step] ⊗ b[step, .]; a along k. It writes all of c.
static inline void multiply_tile(float* c, size_t ldc, Operand<Pair> a, size_t, const Pair* b, size_t ldb, size_t,
                                 size_t steps, bool add) {
    const size_t c_row = ldc * sizeof *c, a_row = a.stride * sizeof *b, b_row = ldb * sizeof *b;
    for (size_t i = 0; !add && i < MR<bf16>; i++) std::fill_n(c + i * ldc, NR, 0.0f);
    static constexpr TileShapes shapes;
    static thread_local bool shaped = false;  // each thread configures its tiles once
    if (!shaped) _tile_loadconfig(&shapes), shaped = true;
    asm volatile("" : : : "memory");  // the tile loads below read memory, which the compiler does not know
    _tile_loadd(0, c, c_row);
    _tile_loadd(1, c + LANES, c_row);
    _tile_loadd(2, c + LANES * ldc, c_row);
    _tile_loadd(3, c + LANES * ldc + LANES, c_row);
    for (size_t step = 0; step < steps; step += LANES, b += ldb * LANES) {
        _tile_loadd(4, a.data + step, a_row);
        _tile_loadd(6, b, b_row);
        _tile_loadd(7, b + LANES, b_row);
        _tile_loadd(5, a.data + LANES * a.stride + step, a_row);
        _tile_dpbf16ps(0, 4, 6);
        _tile_dpbf16ps(1, 4, 7);
        _tile_dpbf16ps(2, 5, 6);
        _tile_dpbf16ps(3, 5, 7);
    }
    _tile_stored(0, c, c_row);
    _tile_stored(1, c + LANES, c_row);
    _tile_stored(2, c + LANES * ldc, c_row);
    _tile_stored(3, c + LANES * ldc + LANES, c_row);
}
#endif

// Lane i of the result is the sum of the lanes of sums[i]: once transposed, they add up as vectors.
static inline vec add_up(vec (&sums)[LANES]) {
    transpose(sums);
    vec total = sums[0];
    for (int lane = 1; lane < LANES; lane++) total += sums[lane];
    return total;
}

// Few rows of A, as in decoding (GEMV): nothing is used often enough to be worth packing, and the time goes into
// reading B, the weights, whose contiguous index is k. A thread has one range of columns and reads it as eight streams
// side by side: these keep enough cache misses in flight. Prefetching past a column's end reaches the stream's next.
constexpr size_t FEW_ROWS = 4;

template <class X> static void matmul_few_rows(size_t M, size_t N, size_t K, Operand<X> A, Operand<X> B, auto store) {
    constexpr size_t STREAMS = 8, STEP = sizeof(vec) / sizeof(X);
    constexpr size_t AHEAD = 512 / sizeof(X);  // 8 cache lines of each stream in flight: more than the queues hold
    const size_t parts = thread_count();
#pragma omp parallel for schedule(static)
    for (size_t part = 0; part < parts; part++) {
        const size_t begin = N * part / parts, end = N * (part + 1) / parts, length = ceil_div(end - begin, STREAMS);
        for (size_t i0 = 0; i0 < length; i0 += LANES) {
            const size_t columns = std::min<size_t>(length - i0, LANES);  // of each stream, beginning at n0(stream)
            auto n0 = [&](size_t stream) { return begin + stream * length + i0; };
            for (size_t m = 0; m < M; m++) {
                const X* a = A.data + m * A.stride;
                vec sums[STREAMS][LANES] = {};
                for (size_t i = 0; i < columns; i++) {
                    const X* b[STREAMS];
                    vec sum[STREAMS] = {};
                    for (size_t s = 0; s < STREAMS; s++) b[s] = B.data + std::min(n0(s) + i, end - 1) * B.stride;
                    for (size_t k = 0; k < K; k += STEP) {
                        const size_t rest = (K - k) * sizeof(X);
                        const vec a_k = load_bytes(a + k, rest);
#pragma GCC unroll 8
                        for (size_t s = 0; s < STREAMS; s++) {
                            __builtin_prefetch(b[s] + k + AHEAD);
                            add_products<X>(sum[s], a_k, load_bytes(b[s] + k, rest));
                        }
                    }
                    for (size_t s = 0; s < STREAMS; s++) sums[s][i] = sum[s];
                }
                for (size_t s = 0; s < STREAMS && n0(s) < end; s++)
                    store(m, n0(s), add_up(sums[s]), std::min(columns, end - n0(s)));
            }
        }
    }
}

// A thread computes one block of C at a time, at most NC columns wide, in chunks of KC steps. Blocks are up to
// NC_PACKED wide where A is packed, since every block packs it again.
static size_t KC = 384;  // 14 rows of A are 21 KB, of 32 or 48 KB of L1. (The tests make it small.)
constexpr size_t NC = 128 / NR * NR, NC_PACKED = 3 * NC;  // KC x NC of B are 197 KB, of 1 MB of L2
constexpr size_t SUMS = 1 << 17;         // a block's sums, if they have to wait for another chunk: 512 KB, half of L2
constexpr size_t SHORT_CHUNK = 1 << 16;  // a chunk of B that is read in place spans up to 256 KB of L2, gaps included

// The size of a thread's scratch memory for a product
template <class X> static size_t matmul_local_size() { return SUMS + MR<X> * NC_PACKED + KC * (2 * LANES + NC_PACKED); }

template <class X>
static void matmul(const Workspace& ws, size_t M, size_t N, size_t K, Operand<X> A, Operand<X> B, auto store,
                   const X* also_read = nullptr) {
    if (M <= FEW_ROWS && A.along_k && B.along_k) return matmul_few_rows(M, N, K, A, B, store);
    constexpr size_t PER = K_PER_STEP<X>;
    const size_t chunks = ceil_div(steps<X>(K), KC), k_chunk = steps<X>(ceil_div(K, chunks)) * PER;
    const bool packs_A = !std::is_same_v<X, float> && !(PAIRS<X> && A.along_k);
    const bool packs_B = !std::is_same_v<X, float> || B.along_k || k_chunk * B.stride > SHORT_CHUNK;
    // Two blocks or more for each thread where C is large enough, and a number that threads can share evenly. As each
    // block packs its part of B, C is first cut into columns; but into rows if B is not packed, or A is.
    const bool by_rows = packs_A || !packs_B;
    const size_t threads = thread_count(), panels = ceil_div(N, NR);
    const size_t most = std::min(panels, (packs_A ? NC_PACKED : NC) / NR);
    const size_t width = NR * (by_rows ? most : std::clamp<size_t>(panels / (2 * threads), 1, most));
    const size_t column_blocks = ceil_div(N, width);
    size_t row_blocks = std::max(chunks > 1 ? ceil_div(M, SUMS / width) : 1,
                                 by_rows ? ceil_div(2 * threads, column_blocks) : 1);
    auto blocks = [&] { return column_blocks * row_blocks; };
    while (blocks() % threads != 0 && blocks() < 8 * threads && M / row_blocks > 4 * MR<X>) row_blocks++;
    const size_t height = round_up(ceil_div(M, row_blocks), AMX<X> ? MR<X> : 1);
#pragma omp parallel for collapse(2) schedule(dynamic)
    for (size_t m0 = 0; m0 < M; m0 += height)  // these rows of A stay in L3 while all blocks of columns use them
        for (size_t n0 = 0; n0 < N; n0 += width) {
            const size_t columns = std::min(N - n0, width), rows = std::min(M - m0, height);
            const size_t tile_height = tile_rows<X>(rows);
            float* sums = local_scratch(ws);  // (rows, width), or just of one tile if K is one chunk
            Cell<X>* a_buffer = (Cell<X>*)(sums + SUMS + MR<X> * NC_PACKED);
            Cell<X>* b_buffer = a_buffer + KC * 2 * LANES;
            for (size_t k0 = 0; k0 < K; k0 += k_chunk) {
                const size_t k_count = std::min(K - k0, k_chunk);
                const Panels<X> b = cells_of_B(b_buffer, B.at(n0, k0), columns, k_count, !packs_B);
                for (size_t m = 0; m < rows; m += tile_height) {
                    const size_t tile_m = std::min(rows - m, tile_height);
                    const Operand<Cell<X>> a = cells_of_A(a_buffer, A.at(m0 + m, k0), tile_m, k_count);
                    for (size_t n = 0; n < columns; n += NR) {
                        const size_t tile_n = std::min(columns - n, NR);
                        float* c = sums + (chunks > 1 ? m : 0) * width + n;
                        size_t ldc = width;
                        bool add = k0 > 0, finish = k0 + k_count == K;
                        if constexpr (std::is_same_v<decltype(store), StoreSums>)
                            if (AMX<X> ? tile_m == MR<X> && tile_n == NR : tile_n % LANES == 0) {
                                // What the microkernel writes, whole vectors or tiles, is all wanted: it sums in place.
                                c = store.at(m0 + m, n0 + n), ldc = store.stride;
                                add = add || store.add, finish = false;
                            }
                        for (size_t i = 0; also_read && finish && i < tile_m; i++)
                            for (size_t j = 0; j < tile_n; j += 64 / sizeof(X))  // a cache line
                                __builtin_prefetch(also_read + (m0 + m + i) * N + n0 + n + j);
                        multiply_tile(c, ldc, a, tile_m, b.at(n), b.step_stride, tile_n, steps<X>(k_count), add);
                        for (size_t i = 0; finish && i < tile_m; i++)
                            for (size_t j = 0; j < tile_n; j += LANES)
                                store(m0 + m + i, n0 + n + j, load(c + i * ldc + j),
                                      std::min<size_t>(tile_n - j, LANES));
                    }
                }
            }
        }
}

// --------------------------------------------------------------------------------------------------------------------
// What makes the layers fast: attention
//
// Attention works on tiles of up to KEYS keys and NR queries; nothing of size T × T exists. Scores are computed
// transposed, sᵀ = k qᵀ: each of the NR lanes of a row belongs to one query, so maxima and sums over keys go lane by
// lane. In fp32 only q and dout are packed, unless HS is not a multiple of LANES.
//
// Online softmax (Milakov and Gimelshein 2018; FlashAttention). For each query, keep over the keys seen so far
//     max = max_j s_j      sum = Σ_j e^(s_j - max)      o = Σ_j e^(s_j - max) v_j
// A new tile may raise max to max'. As e^(s - max') = e^(s - max) e^(max - max'), sum and o are first scaled by
// e^(max - max'), as if max' had been used from the start; then the tile's own terms are added. At the end softmax(s) v
// is o/sum, and the log-sum-exp lse = max + log(sum) is all that backward needs: p_j = e^(s_j - lse).
// In the code s is q·k alone: the factor scale = 1/√HS enters at the exponential, p_j = e^(scale·s_j - lse), and in
// backward is already part of ds.

template <class X> constexpr size_t KEYS = 8 * MR<X>;  // scores of 112 keys and 32 queries: 14 KB, which stay in L1

// A thread's scratch memory for one head of T keys, laid out from `local` on, or only counted if that is null
template <class X> struct HeadScratch {
    float* local;
    size_t T, HS;
    bool backward;
    static constexpr bool same = std::is_same_v<X, float>;  // p takes the place of s, and ds that of dp
    static constexpr size_t tile = KEYS<X> * NR;
    const size_t columns = round_up(HS, NR), packed = same ? 0 : round_up(T, 2 * LANES) * steps<X>(HS);
    size_t size = 0;                                          // floats in all
    float* s = take<float>(tile);                             // sᵀ = k qᵀ, not yet scaled (KEYS, NR)
    X* p = same ? (X*)s : take<X>(tile);                      // pᵀ (KEYS, NR), rounded to X
    float* sum = take<float>(std::max(NR, MR<X>) * columns);  // o, or in backward dq (NR, HS), in rows of `columns`
    Cell<X>* q = take(steps<X>(HS) * NR);                     // operands, where they have to be packed
    Cell<X>* k = take(packed);
    Cell<X>* v_rows = take(steps<X>(T) * columns);
    Cell<X>* p_rows = take(same ? 0 : tile);
    // In backward, also
    float* dp = take<float>(backward * tile);                 // dpᵀ (KEYS, NR)
    X* ds = same ? (X*)dp : take<X>(backward * tile);         // scale·dsᵀ (KEYS, NR), rounded to X
    float* dk_sum = take<float>(backward * round_up(T, MR<X>) * columns);  // (T, HS), in rows of `columns`
    float* dv_sum = take<float>(backward * round_up(T, MR<X>) * columns);
    Cell<X>* dout = take(backward * steps<X>(HS) * NR);
    Cell<X>* q_rows = take(backward * steps<X>(NR) * columns);
    Cell<X>* dout_rows = take(backward * steps<X>(NR) * columns);
    Cell<X>* v = take(backward * packed);
    Cell<X>* k_rows = take(backward * steps<X>(T) * columns);

    template <class Element = Cell<X>> Element* take(size_t n) {
        float* array = local ? local + size : nullptr;
        size += round_up(n, CACHE_LINE);
        return (Element*)array;
    }
};

// c (rows, columns) = or += a b over K
template <class X>
static void multiply(float* c, size_t ldc, Operand<Cell<X>> a, size_t rows, Panels<X> b, size_t columns, size_t K,
                     bool add) {
    const size_t height = tile_rows<X>(rows);
    for (size_t m = 0; m < rows; m += height)
        for (size_t n = 0; n < columns; n += NR)
            multiply_tile(c + m * ldc + n, ldc, a.at(m, 0), std::min(rows - m, height), b.at(n), b.step_stride,
                          std::min(columns - n, NR), steps<X>(K), add);
}

// Calls f(j0, keys, first) for each tile of keys that n queries, at positions i0, i0 + 1, ..., attend to. The tile's
// keys begin with j0; queries before `first` see none of them.
template <class X> static void for_key_tiles(size_t i0, size_t n, auto f) {
    constexpr size_t PER = K_PER_STEP<X>, STRIP = AMX<X> ? NR : LANES;
    for (size_t j0 = 0, first = 0; first < n; first += STRIP) {
        const size_t end = first + STRIP < n ? round_up(i0 + first + STRIP, PER) : i0 + n;
        for (; j0 < end; j0 += KEYS<X>) f(j0, std::min(end - j0, KEYS<X>), first);
        j0 = end;
    }
}

// sᵀ (keys, NR), in the columns of the queries from `first` to n, whose positions begin with i0. k (keys, HS) begins
// with j0. Query i sees key j if j ≤ i.
template <class X>
static void scores_tile(float* s, Operand<Cell<X>> k, Panels<X> q, size_t keys, size_t n, size_t j0, size_t i0,
                        size_t first, size_t HS) {
    multiply<X>(s + first, NR, k, keys, q.from_n(first), n - first, HS, false);
    for (size_t r = i0 + first > j0 ? i0 + first - j0 : 0; r < keys; r++)
        for (size_t lane = first; lane < std::min(j0 + r - i0, NR); lane++) s[r * NR + lane] = -INFINITY;
}

// o, q (queries, HS); k, v (before + queries, HS); lse (queries) or null. Query i is at position before + i.
template <class X>
static void attention_head_forward(float* local, Rows<X> o, float* lse, Rows<const X> q, Rows<const X> k,
                                   Rows<const X> v, size_t queries, size_t before, size_t HS) {
    const size_t T = before + queries;
    const float scale = 1.0f / sqrtf(HS);
    const size_t columns = round_up(HS, NR);
    const HeadScratch<X> h = {local, T, HS, false};
    const Operand<Cell<X>> k_cells = cells_of_A(h.k, along_k(k.data, k.stride), T, HS);
    const Panels<X> v_rows = cells_of_B(h.v_rows, across_k(v.data, v.stride), HS, T);

    for (size_t i0 = 0; i0 < queries; i0 += NR) {
        const size_t n = std::min(queries - i0, NR), lanes = round_up(n, LANES);
        float max[NR], sum[NR], rescale[NR];
        std::fill_n(max, NR, -INFINITY);
        std::fill_n(sum, NR, 0.0f);
        std::fill_n(h.sum, NR * columns, 0.0f);  // o
        const Panels<X> q_cells = cells_of_B(h.q, along_k(q[i0], q.stride), n, HS);
        for_key_tiles<X>(before + i0, n, [&](size_t j0, size_t keys, size_t first) {
            scores_tile<X>(h.s, k_cells.at(j0, 0), q_cells, keys, n, j0, before + i0, first, HS);
            for (size_t lane = first; lane < lanes; lane += LANES) {
                const vec old = load(max + lane), most = maxima(old, h.s + lane, NR, keys);
                vec total = {};
                for (size_t r = 0; r < keys; r++) {
                    const vec p = exp_approx(scale * (load(h.s + r * NR + lane) - most));
                    store(h.p + r * NR + lane, p);
                    total += p;
                }
                store(rescale + lane, exp_approx(scale * (old - most)));
                store(max + lane, most);
                store(sum + lane, load(sum + lane) * load(rescale + lane) + total);
            }
            for (size_t i = first; i < n; i++)
                for (float* o_i = h.sum + i * columns; o_i < h.sum + i * columns + HS; o_i += LANES)
                    store(o_i, load(o_i) * rescale[i]);
            const Operand<Cell<X>> p = cells_of_A(h.p_rows, across_k<X>(h.p + first, NR), n - first, keys);
            multiply<X>(h.sum + first * columns, columns, p, n - first, v_rows.from_k(j0), HS, keys, true);
        });
        for (size_t i = 0; i < n; i++)
            for (size_t d = 0; d < HS; d += LANES)
                store(o[i0 + i] + d, load(h.sum + i * columns + d) * (1 / sum[i]), HS - d);
        for (size_t i = 0; lse && i < n; i++) lse[i0 + i] = scale * max[i] + logf(sum[i]);
    }
}

// Tile by tile, p is computed again from lse. The sum in ds_ij = p_ij (dp_ij - Σ_j' p_ij' dp_ij') runs over a whole
// row, but equals do_i·Σ_j p_ij v_j = do_i·o_i =: delta_i, which is known before the first tile. All arrays (T, HS).
template <class X, class DKV>
static void attention_head_backward(float* local, Rows<X> dq, Rows<DKV> dk, Rows<DKV> dv, Rows<const X> dout,
                                    Rows<const X> o, const float* lse, Rows<const X> q, Rows<const X> k,
                                    Rows<const X> v, size_t T, size_t HS) {
    const size_t columns = round_up(HS, NR);
    const float scale = 1.0f / sqrtf(HS);
    const HeadScratch<X> h = {local, T, HS, true};
    const Operand<Cell<X>> k_cells = cells_of_A(h.k, along_k(k.data, k.stride), T, HS);
    const Operand<Cell<X>> v_cells = cells_of_A(h.v, along_k(v.data, v.stride), T, HS);
    const Panels<X> k_rows = cells_of_B(h.k_rows, across_k(k.data, k.stride), HS, T);
    std::fill_n(h.dk_sum, round_up(T, MR<X>) * columns, 0.0f);
    std::fill_n(h.dv_sum, round_up(T, MR<X>) * columns, 0.0f);

    for (size_t i0 = 0; i0 < T; i0 += NR) {
        const size_t n = std::min(T - i0, NR), lanes = round_up(n, LANES);
        float row_lse[NR] = {}, delta[NR];  // past the last query p is 1 and ds is 0; neither is used
        std::copy_n(lse + i0, n, row_lse);
        for (size_t lane = 0; lane < lanes; lane += LANES) {
            vec sums[LANES] = {};
            for (size_t i = lane; i < std::min(n, lane + LANES); i++)
                for (size_t d = 0; d < HS; d += LANES)
                    sums[i - lane] += load(dout[i0 + i] + d, HS - d) * load(o[i0 + i] + d, HS - d);
            store(delta + lane, add_up(sums));
        }
        const Panels<X> q_cells = cells_of_B(h.q, along_k(q[i0], q.stride), n, HS);
        const Panels<X> dout_cells = cells_of_B(h.dout, along_k(dout[i0], dout.stride), n, HS);
        const Panels<X> q_rows = cells_of_B(h.q_rows, across_k(q[i0], q.stride), HS, n);
        const Panels<X> dout_rows = cells_of_B(h.dout_rows, across_k(dout[i0], dout.stride), HS, n);
        std::fill_n(h.sum, NR * columns, 0.0f);  // dq
        for_key_tiles<X>(i0, n, [&](size_t j0, size_t keys, size_t first) {
            scores_tile<X>(h.s, k_cells.at(j0, 0), q_cells, keys, n, j0, i0, first, HS);
            multiply<X>(h.dp + first, NR, v_cells.at(j0, 0), keys, dout_cells.from_n(first), n - first, HS, false);
            for (size_t r = 0; r < keys; r++)
                for (size_t lane = first; lane < lanes; lane += LANES) {
                    const size_t i = r * NR + lane;
                    const vec p = exp_approx(scale * load(h.s + i) - load(row_lse + lane));
                    store(h.ds + i, scale * p * (load(h.dp + i) - load(delta + lane)));
                    store(h.p + i, p);
                }
            // Sums over queries, dv += p do and dk += ds q; and over keys, dq += ds k
            const Operand<X> p = along_k<X>(h.p + first, NR), ds = along_k<X>(h.ds + first, NR);
            multiply<X>(h.dv_sum + j0 * columns, columns, cells_of_A(h.p_rows, p, keys, n - first), keys,
                        dout_rows.from_k(first), HS, n - first, true);
            multiply<X>(h.dk_sum + j0 * columns, columns, cells_of_A(h.p_rows, ds, keys, n - first), keys,
                        q_rows.from_k(first), HS, n - first, true);
            const Operand<X> dsT = across_k<X>(h.ds + first, NR);
            multiply<X>(h.sum + first * columns, columns, cells_of_A(h.p_rows, dsT, n - first, keys), n - first,
                        k_rows.from_k(j0), HS, keys, true);
        });
        for (size_t i = 0; i < n; i++) std::copy_n(h.sum + i * columns, HS, dq[i0 + i]);
    }
    for (size_t t = 0; t < T; t++) {
        std::copy_n(h.dk_sum + t * columns, HS, dk[t]);
        std::copy_n(h.dv_sum + t * columns, HS, dv[t]);
    }
}

// One query and `keys` keys, as in decoding: there is no tile to fill, and all the time goes into reading k and v.
// o, q (HS), k, v (keys, HS), local (keys + LANES + HS).
template <class X>
static void attention_head_decode(float* local, X* o, const X* q, Rows<const X> k, Rows<const X> v, size_t keys,
                                  size_t HS) {
    constexpr size_t STEP = sizeof(vec) / sizeof(X);
    float *p = local, *sum_o = p + keys + LANES, scale = 1.0f / sqrtf(HS), sum = 0;
    for (size_t j0 = 0; j0 < keys; j0 += LANES) {
        vec sums[LANES] = {};
        for (size_t i = 0; i < std::min<size_t>(keys - j0, LANES); i++)
            for (size_t d = 0; d < HS; d += STEP) {
                const size_t rest = (HS - d) * sizeof(X);
                add_products<X>(sums[i], load_bytes(q + d, rest), load_bytes(k[j0 + i] + d, rest));
            }
        store(p + j0, scale * add_up(sums));
    }
    float max = maximum(p, keys);
#pragma omp simd reduction(+ : sum)
    for (size_t j = 0; j < keys; j++) {
        p[j] = exp_approx(p[j] - max);
        sum += p[j];
    }
    std::fill_n(sum_o, HS, 0.0f);
    for (size_t j = 0; j < keys; j++)
        for (size_t d = 0; d < HS; d++) sum_o[d] += p[j] * v[j][d];
    for (size_t d = 0; d < HS; d++) o[d] = sum_o[d] / sum;
}

// --------------------------------------------------------------------------------------------------------------------
// The machine

// Finds the number of threads that is fastest. Threads wait for each other dozens of times in a layer; where other
// programs use the cores too, or a model is tiny, waiting can take longer than arithmetic. As results are the same for
// any number, it can be tried out: from time to time a few steps run on half or twice as many threads.
struct ThreadTrials {
    int most, threads = most, settled = most;  // allowed; in use; the best found so far, which trials are compared with
    int step = 0, interval = 16;               // steps since `threads` changed; steps to the next trial
    bool fewer = false;                        // whether the last trial used fewer threads
    double times[3] = {};                      // of the last three steps, in seconds
    double settled_time = INFINITY;            // their median before the trial

    // The number of threads for the next step, after one that took `time`
    int next(double time) {
        times[step++ % 3] = time;
        const bool on_trial = threads != settled, slower = on_trial && step > 1 && time > 1.5 * settled_time;
        if (most == 1 || (step < 4 && !slower)) return threads;  // the first step warms up
        const double median = std::max(std::min(times[0], times[1]), std::min(std::max(times[0], times[1]), times[2]));
        if (on_trial) {
            const bool faster = !slower && median < 0.95 * settled_time;
            interval = faster ? 16 : std::min(2 * interval, 512);
            if (faster) settled = threads, settled_time = median;
            else threads = settled;
            step = 0;
        } else if (step >= interval || (step > 4 && median > 2 * settled_time)) {
            fewer = threads == most || (threads > 1 && !fewer);
            threads = fewer ? threads / 2 : std::min(2 * threads, most);
            settled_time = median;
            step = 0;
        }
        return threads;
    }
};

static ThreadTrials thread_trials = {.most = 0};  // of the newest model

// Called after each step's last backward. Trials time the passes of the step's last batch and the reading of the next.
static void choose_threads() {
    if (processes > 1) return;  // these wait for each other
    if (thread_count() == thread_trials.threads) set_thread_count(thread_trials.next(seconds() - pass_start));
}
static void end_thread_trials() {
    if (thread_count() == thread_trials.threads) set_thread_count(thread_trials.most);
    thread_trials = {.most = thread_trials.most};
}

template <class X>
static void backend_create(Allocator& all, Workspace& ws, Inputs& inputs, Results&, const Config& c,
                           const Workload& work) {
    const size_t C = c.C, HS = c.head_size(), BT = work.tokens(), BT_trained = work.train ? BT : 0;
    if (!all.dry) end_thread_trials(), thread_trials = {.most = thread_count()};
    for (int** tokens : {&inputs.x, &inputs.y}) all.take(*tokens, BT, &Memory::activations);
    size_t head = HeadScratch<X>{nullptr, (size_t)work.T, HS, work.train}.size;
    size_t decoding = work.sequences ? HeadScratch<X>{nullptr, (size_t)c.maxT, HS, false}.size : 0;
    ws.local_size = std::max({matmul_local_size<X>(), head, decoding, 3 * C + c.NH});
    all.take(ws.local, thread_count() * ws.local_size, &Memory::scratch);
    all.take(ws.partial, ceil_div(BT_trained, LAYERNORM_CHUNK) * 2 * C, &Memory::scratch);
    const size_t parameters = work.train ? allocated_parameters(tensor_table(c)) : 0;
    all.take(ws.squares, ceil_div(parameters, UPDATE_CHUNK), &Memory::scratch);
    const size_t summed = has_chunks(c) ? BT_trained : classifier_rows(BT_trained, c.Vp);
    all.take(ws.dx_sum, std::is_same_v<X, float> ? 0 : summed * C, &Memory::scratch);  // in fp32, dx gathers the sums
}
static void backend_free(Inputs&, Results&) { end_thread_trials(); }

static void set_inputs(Inputs& inputs, const int* x, const int* y, size_t BT, size_t) {
    std::copy_n(x, BT, inputs.x);
    std::copy_n(y, BT, inputs.y);
}

static void* device_allocate(size_t bytes, bool zero) {
    constexpr size_t HUGE_PAGE = 1 << 21, CHUNK = 1 << 20;
    const size_t alignment = bytes < HUGE_PAGE ? 64 : HUGE_PAGE;
    void* p = aligned_alloc(alignment, round_up(bytes, alignment));
    if (!p) die("cannot allocate %zu MiB: use a smaller model, --batch or --sequence", bytes >> 20);
#ifdef MADV_HUGEPAGE
    if (bytes >= HUGE_PAGE) madvise(p, round_up(bytes, alignment), MADV_HUGEPAGE);  // fewer TLB misses
#endif
    if (!zero && !poison_memory) return p;
#pragma omp parallel for schedule(static)  // each thread touches first what it will use
    for (size_t i = 0; i < bytes; i += CHUNK) memset((char*)p + i, zero ? 0 : 0xff, std::min(CHUNK, bytes - i));
    return p;
}
static void device_free(void* p) { free(p); }
static void device_check(const Config&, const Workload&) {}  // a CPU runs any model
static void copy_to_device(void* to, const void* from, size_t bytes) { memcpy(to, from, bytes); }
static void copy_to_host(void* to, const void* from, size_t bytes) { memcpy(to, from, bytes); }

static void host_parallel_for(size_t n, auto f) {
#pragma omp parallel for schedule(static)
    for (size_t i = 0; i < n; i++) f(i);
}

static std::string system_root = "";  // the tests set it

// The number after `word` at the start of a line of a file, or `otherwise` if there is none
static double number_after(const std::string& path, const std::string& word, double otherwise) {
    std::ifstream file(path);
    for (std::string line; std::getline(file, line);)
        if (line.starts_with(word)) otherwise = atof(line.c_str() + word.size());
    return otherwise;
}

// Calls f with the folder of each control group that limits this process: its own, and those above it. In version 1,
// each controller has a tree of its own. f reads numbers from files there: one that is missing changes nothing, and a
// word ("max": no limit) makes the first number 0.
static void for_control_groups(const std::string& controller, auto f) {
    std::ifstream file(system_root + "/proc/self/cgroup");
    for (std::string line; std::getline(file, line);) {  // number:controllers:path; version 2 names none
        const size_t names = line.find(':') + 1, path = line.find(':', names) + 1;
        if (names == 0 || path == 0) continue;
        const std::vector<std::string> controllers = split(line.substr(names, path - 1 - names), ',');
        const bool own = std::count(controllers.begin(), controllers.end(), controller) > 0;
        for (std::string group = line.substr(path); own || controllers[0].empty(); group = folder_of(group)) {
            f(system_root + "/sys/fs/cgroup/" + (own ? controller : "") + group + "/");
            if (group.size() <= 1) break;
        }
    }
}

static const char* const instruction_set =
    HAS_AMX ? "AVX-512 with AMX" : HAS_PAIRS ? "AVX-512 with bf16" : LANES == 16 ? "AVX-512" : LANES == 8 ? "AVX2" :
    NV == 3 ? "NEON" : "128-bit vectors";

#ifdef __x86_64__
// Exits if the processor or the system lacks instructions that this binary was built for. It runs before main, compiled
// for any x86-64, and calls fputs, since fprintf is inline where _FORTIFY_SOURCE is the default (Ubuntu).
[[gnu::constructor(101), gnu::target("arch=x86-64")]] static void check_instructions() {
    bool found = true;
    __builtin_cpu_init();
#ifdef __AVX2__
    found = found && __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
#endif
#ifdef __AVX512F__
    found = found && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512vl");
#endif
#ifdef __AVX512VBMI2__
    found = found && __builtin_cpu_supports("avx512vbmi2");
#endif
#ifdef __AVX512BF16__
    found = found && __builtin_cpu_supports("avx512bf16");
#endif
#ifdef __AMX_BF16__
    constexpr int ARCH_REQ_XCOMP_PERM = 0x1023, XFEATURE_XTILEDATA = 18;  // Linux grants tiles on request
    unsigned registers[4];  // bit 22 of the last is AMX-BF16, which not all compilers can ask for by name
    __cpuid_count(7, 0, registers[0], registers[1], registers[2], registers[3]);
    found = found && (registers[3] >> 22 & 1);
    if (found && syscall(SYS_arch_prctl, ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA) != 0) {
        fputs("error: this system does not let programs use AMX: run 'make clean' and "
              "'make ARCH=\"-march=native -mno-amx-bf16\"'\n", stderr);
        exit(1);
    }
#endif
    if (found) return;
    fputs("error: this binary was built for ", stderr);
    fputs(instruction_set, stderr);
    fputs(", which this processor lacks: run 'make clean' and 'make' here\n", stderr);
    exit(1);
}
#endif

[[maybe_unused]] static int allowed_threads() {  // by quotas of processor time
    double allowed = INT_MAX;
    for_control_groups("cpu", [&](const std::string& group) {
        double quota = 0, period = 100000;
        std::ifstream(group + "cpu.max") >> quota >> period;
        std::ifstream(group + "cpu.cfs_quota_us") >> quota;  // version 1
        std::ifstream(group + "cpu.cfs_period_us") >> period;
        if (quota > 0) allowed = std::min(allowed, std::max(1.0, ceil(quota / period)));
    });
    return allowed;
}

static void device_start([[maybe_unused]] char** argv) {
#ifdef _OPENMP
    // By default, OpenMP's threads spin for milliseconds when they wait for each other, which on cores that other
    // programs use too makes small steps many times slower. 10,000 rounds are a fraction of a millisecond: enough to
    // stay awake from one loop to the next. OpenMP reads these variables when it is loaded, so the program starts
    // itself again. (Where even this is too long, ThreadTrials finds that fewer threads are faster.)
    // Not done if threads are bound: OpenMP has already bound the first one, and the new program would inherit that.
    const char* bind = getenv("OMP_PROC_BIND");
    const bool bound = (bind && strcasecmp(bind, "false") != 0) || getenv("OMP_PLACES") ||
                       getenv("GOMP_CPU_AFFINITY") || getenv("KMP_AFFINITY");
    if (!getenv("OMP_WAIT_POLICY") && !bound) {
        setenv("OMP_WAIT_POLICY", "passive", 1);
        setenv("GOMP_SPINCOUNT", "10000", 0);
        std::error_code error;  // on macOS there is no such file, and OpenMP reads the variables when it is first used
        execv(std::filesystem::read_symlink("/proc/self/exe", error).c_str(), argv);
    }
#endif
}

static void device_init(bool) {
#ifdef _OPENMP
    int sharers = local_processes;  // processes that may use the same cores
#if defined(GPT2_MPI) && defined(__linux__)
    if (processes > 1) {
        std::vector<cpu_set_t> masks(local_processes);
        sched_getaffinity(0, sizeof masks[0], &masks[local_process]);
        MPI_Allgather(MPI_IN_PLACE, 0, MPI_BYTE, masks.data(), sizeof masks[0], MPI_BYTE, local_world);
        sharers = std::ranges::count_if(masks, [&](auto& mask) { return CPU_EQUAL(&mask, &masks[local_process]); });
    }
#endif
    const int cores = std::min(allowed_threads() / local_processes, omp_get_num_procs() / sharers);
    const char* wanted = getenv("OMP_NUM_THREADS");
    if (!wanted) omp_set_num_threads(std::max(1, cores));  // as many as affinity and the container's quota allow
    else if (thread_count() > 4096) die("OMP_NUM_THREADS=%s: at most 4096 threads are of use", wanted);
    if (processes > 1 && thread_count() > cores)
        printf("note: there are fewer cores than %d processes x %s\n", local_processes,
               plural(thread_count(), "thread").c_str());
#endif
}

static std::string device_name() { return plural(thread_count(), "thread") + ", " + instruction_set; }

static Precision device_precision() { return FP32; }
static std::string device_build() { return instruction_set + std::string(", ") + threading; }
static const char* device_help() { return "OMP_NUM_THREADS sets the number of threads."; }

// Memory available without swapping, or what is left of the container's limit. File caches count as free.
static size_t device_free_memory() {
    const double all = (double)sysconf(_SC_PHYS_PAGES) * sysconf(_SC_PAGESIZE);  // if there is no /proc, as on macOS
    double free_bytes = 1024 * number_after(system_root + "/proc/meminfo", "MemAvailable:", all / 1024);
    for_control_groups("memory", [&](const std::string& group) {
        double limit = 0, used = 0;
        for (const char* name : {"memory.max", "memory.limit_in_bytes"}) std::ifstream(group + name) >> limit;
        for (const char* name : {"memory.current", "memory.usage_in_bytes"}) std::ifstream(group + name) >> used;
        for (const std::string caches : {"inactive_file ", "active_file "})  // version 1: total_, with groups below
            used -= std::max(number_after(group + "memory.stat", caches, 0),
                             number_after(group + "memory.stat", "total_" + caches, 0));
        if (limit > 0) free_bytes = std::min(free_bytes, limit - used);
    });
    return (size_t)std::max(0.0, free_bytes) / local_processes;
}

static bool device_is_host() { return true; }
#endif  // GPT2_CUDA
