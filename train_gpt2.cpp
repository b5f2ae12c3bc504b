/*
train_gpt2.cpp: GPT-2 from scratch, in one file that reads from top to bottom.

It trains, evaluates and samples GPT-2 on a CPU, with every layer's forward and backward pass written out by hand and
three attentions that share the same sixteen parameter tensors:

    vanilla   a layer's queries read the keys and values of their own layer                        GPT-2
    skip      some heads read the keys and values of an earlier layer instead                      arXiv 2406.11274
    depth     each value is first mixed with the values of earlier layers at the same token        arXiv 2606.05014

It is not a framework: no automatic differentiation, no tensor class, no dependency but OpenMP. It does not tokenize
text for training (data_prep/prepare.py does), and one process runs on one machine. train_gpt2.cu is the same program
with section 3 on a GPU.

    make && ./train_gpt2 --help                          what it can do
    ./train_gpt2 train --train 'data/train_*.bin' --val 'data/val_*.bin' --out run

Contents
     1  utilities         errors, time, random numbers
     2  model interface   Config, the table of tensors, what a backend provides
     3  CPU model         numbers · threads · matmul · linear layers · embedding · LayerNorm · attention, skip and
                          depth · classifier · AdamW · the model, forward, backward · decoding · the machine
     4  program           options · files · tokenizer · data loader · checkpoints · schedule · train, eval, generate,
                          describe, bench · main

Dimensions, the same letters everywhere:
    B batch   T time (tokens in a sequence)   C channels   NH heads   HS = C/NH head size   L layers
    V vocabulary   Vp = V padded to a multiple of 128   maxT context: the longest sequence
A comment like (B, T, C) is a row-major array; a `d` in front of a name is the gradient of the loss by it.
*/

#include <algorithm>
#include <array>
#include <atomic>
#include <bit>
#include <charconv>
#include <chrono>
#include <climits>
#include <cmath>
#include <csignal>
#include <cstdarg>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <filesystem>
#include <future>
#include <map>
#include <optional>
#include <string>
#include <utility>
#include <variant>
#include <vector>
#include <fcntl.h>
#include <glob.h>
#include <sys/file.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>
#ifdef _OPENMP
#include <omp.h>
#endif

// ====================================================================================================================
// 1 · Utilities

// Ends the program over something its user can mend: one line that says what, where and what to do; exit status 1.
[[noreturn]] __attribute__((format(printf, 1, 2))) static void die(const char* format, ...) {
    va_list args;
    va_start(args, format);
    fflush(stdout);
    fprintf(stderr, "%serror: ", isatty(STDERR_FILENO) ? "\r\x1b[K" : "");  // over a line that is being redrawn
    vfprintf(stderr, format, args);
    fprintf(stderr, "\n");
    va_end(args);
    exit(1);
}

static double seconds() {  // since some fixed moment
    return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count();
}

static size_t ceil_div(size_t a, size_t b) { return (a + b - 1) / b; }
static size_t round_up(size_t a, size_t b) { return ceil_div(a, b) * b; }

// Random numbers: splitmix64, a counter passed through a mixing function (Steele, Lea and Flood 2014). Its whole state
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

// ====================================================================================================================
// 2 · The model interface
//
// All that the program knows of a model. Section 3 implements it on a CPU; train_gpt2.cu, which defines GPT2_CUDA and
// includes this file, does so on a GPU. Commands and tests are written once, against what follows. Values cross it as
// fp32, whatever the backend computes in.

enum Attention { VANILLA, SKIP, DEPTH };
static const char* const attention_names[] = {"vanilla", "skip", "depth"};

struct Config {
    int maxT = 1024;
    int V = 50257;
    int Vp = 50304;
    int L = 12;
    int NH = 12;
    int C = 768;
    int attention = VANILLA;
    int skip_distance = 9;  // n_l: a skipping head reads the layer so many below
    int skip_heads = 9;     // n_h: the heads 0 .. n_h-1 skip
    int depth_stride = 6;   // s: every s-th layer is a source ...
    int depth_window = 0;   // w: ... and so are the w layers just below

    int head_size() const { return C / NH; }
};

// Whether head h of layer l reads the keys and values of layer l - skip_distance in place of its own.
static bool skips(const Config& c, int l, int h) {
    return c.attention == SKIP && h < c.skip_heads && l >= c.skip_distance;
}

static int skipping_heads(const Config& c, int l) { return skips(c, l, 0) ? c.skip_heads : 0; }

// How many channels of layer l's keys (and values) somebody reads: its own heads that do not skip, and those that the
// layer skip_distance above reads. The others, always the first heads, are neither computed nor cached.
static int kv_channels(const Config& c, int l) {
    bool read_above = l + c.skip_distance < c.L;
    return read_above ? c.C : c.C - skipping_heads(c, l) * c.head_size();
}

// The columns of qkv that have a reader: all, or queries, keys and values of some heads only.
struct Columns {
    size_t begin, count;
};
static std::vector<Columns> live_columns(const Config& c, int l) {
    size_t C = c.C, kvC = kv_channels(c, l);
    if (kvC == C) return {{0, 3 * C}};
    if (kvC == 0) return {{0, C}};
    return {{0, C}, {2 * C - kvC, kvC}, {3 * C - kvC, kvC}};
}

// The layers whose dk, dv wait at the same time for their own turn: from l - skip_distance, just written, to l.
static size_t skip_slots(const Config& c) {
    bool active = c.attention == SKIP && c.skip_heads > 0 && c.skip_distance < c.L;
    return active ? std::min(c.skip_distance + 1, c.L - c.skip_distance) : 0;
}

// The layers j < l whose values layer l mixes into its own.
static std::vector<int> depth_sources(const Config& c, int l) {
    std::vector<int> sources;
    for (int j = 0; j < l && c.attention == DEPTH; j++)
        if (j % c.depth_stride == 0 || j >= l - c.depth_window) sources.push_back(j);
    return sources;
}

// The layers m that layer l is a source of.
struct Reader {
    int m;
    size_t n, sources;  // layer l is the n-th of so many
};
static std::vector<Reader> depth_readers(const Config& c, int l) {
    std::vector<Reader> readers;
    for (int m = l + 1; m < c.L; m++) {
        const std::vector<int> of_m = depth_sources(c, m);
        size_t n = std::find(of_m.begin(), of_m.end(), l) - of_m.begin();
        if (n < of_m.size()) readers.push_back({m, n, of_m.size()});
    }
    return readers;
}

// Operations of causal attention: 2·T·T·HS for each product and head, of which causality leaves half.
static double attention_flops(size_t B, size_t T, size_t C, int products) { return 1.0 * products * B * T * T * C; }

static size_t classifier_rows_least = 512, classifier_logits_most = 1 << 22;  // (the tests make them small)
// How many tokens the classifier takes at a time: enough that reading wte for them costs little beside computing, few
// enough that their logits do not take much memory, and no less for the last ones than for the others.
static size_t classifier_rows(size_t rows, size_t Vp) {
    size_t most = std::max(classifier_rows_least, classifier_logits_most / Vp);
    return rows == 0 ? 0 : ceil_div(rows, ceil_div(rows, most));
}

// One parameter tensor: `layers` matrices of rows × cols, or one vector a layer where cols is 1.
struct Tensor {
    const char* name;
    size_t layers, rows, cols;
    double mean, deviation;  // initial values: N(mean, deviation)
    bool decays;             // weight decay applies
    size_t offset = 0;       // of its first element among all parameters

    size_t layer_size() const { return rows * cols; }
    size_t size() const { return layers * rows * cols; }
};

enum { WTE, WPE, LN1W, LN1B, QKVW, QKVB, ATTPROJW, ATTPROJB, LN2W, LN2B, FCW, FCB, FCPROJW, FCPROJB, LNFW, LNFB,
       TENSORS };
using TensorTable = std::array<Tensor, TENSORS>;

// The sixteen tensors, in the order of every file. Sizes, offsets, initial values, decay and tests all come from here.
static TensorTable tensor_table(const Config& c) {
    size_t L = c.L, C = c.C, one = 1;
    double w = 0.02, residual = 0.02 / sqrt(2.0 * c.L);  // the 2L projections into the residual stream start smaller
    TensorTable t = {{
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
    for (int i = 1; i < TENSORS; i++) t[i].offset = t[i - 1].offset + t[i - 1].size();
    return t;
}

static size_t parameter_count(const Config& c) {
    const Tensor last = tensor_table(c)[TENSORS - 1];
    return last.offset + last.size();
}

enum Precision { FP32, BF16 };
static const char* const precision_names[] = {"fp32", "bf16"};

// What a model is made to do, which decides what is allocated.
struct Workload {
    int B = 0, T = 0;    // batches that model_forward takes; 0: none
    bool train = false;  // gradients and AdamW's moments too
    int sequences = 0;   // KV caches, each for maxT tokens, that model_prompt and model_decode fill; 0: none
    bool recompute = false;  // training: to need less memory, what is cheap to compute again is not kept
};

struct Memory {  // bytes
    size_t parameters, gradients, moments, activations, cache, scratch;
    size_t total() const { return parameters + gradients + moments + activations + cache + scratch; }
};

struct AdamW {
    float lr, beta1, beta2, eps, weight_decay;
};

// The tests set it: fresh memory is NaN, so that a value used before it is written shows.
static bool poison_memory = false;

// A kind of work, and what it has taken since the start.
struct Spent {
    const char* name;
    double seconds = 0, flops = 0, bytes = 0;
};
// Every layer function counts its time under one of these, and the operations, or the bytes read and written, that it
// cannot do without; a function that another calls counts under that other's.
enum Part { EMBEDDING, LAYERNORM, MATMUL, MATMUL_DX, MATMUL_DW, ATTENTION, DEPTH_MIXING, CLASSIFIER, ADAMW, PARTS };
static Spent profile[] = {{"embedding"}, {"LayerNorm"},    {"matmuls"},    {"matmuls, dx"}, {"matmuls, dw"},
                          {"attention"}, {"depth mixing"}, {"classifier"}, {"AdamW"}};
static_assert(std::size(profile) == PARTS);
static std::vector<Spent> model_profile();

struct Model;  // parameters, gradients, moments, activations, KV cache: the backend's own

// The machine. device_init goes first. Where the machine lacks what this binary was built for, the program has ended
// when it returns, or even before main. Without `computes`, nothing but model_memory will be asked for.
static void device_init(char** argv, bool computes = true);
static std::string device_name();              // "2 threads, AVX-512"
static Precision device_precision();           // what it computes in unless told otherwise
static const char* device_help();              // how a user chooses what of the machine is used
static size_t device_free_memory();            // bytes that can still be allocated
static bool device_is_host();                  // models take of the same memory as the program does
static double device_most_memory();            // MiB: the most that was in use at a time since the last call
static double device_bandwidth(bool writing);  // bytes/s of reading large arrays, or reading and writing, measured now
static double device_peak(Precision);          // FLOP/s that a loop of nothing but multiply-adds reaches, measured now
static size_t device_bandwidth_memory();       // bytes that these two
static size_t device_peak_memory(Precision);   // take meanwhile

// What model_create will allocate, to the byte. Parameters are not initialised, gradients and moments are zero.
static Memory model_memory(const Config&, Precision, const Workload&);
static Model* model_create(const Config&, Precision, const Workload&);
static void model_free(Model*);

// Copies n values, from element `begin` of all parameters in file order (tensor_table's offsets).
enum Quantity { PARAMETERS, GRADIENTS, MOMENT1, MOMENT2 };
static void model_get(const Model*, Quantity, size_t begin, size_t n, float* out);
static void model_put(Model*, Quantity, size_t begin, size_t n, const float* in);

// A training step is: for each micro-batch set_inputs, forward(train), backward; then update; then norm and loss. A
// backend may only note what it has to do, and do it by and by; it is norm and loss that wait for it. So the next
// inputs may be set before these, while the last step is still under way.
// The tokens x and targets y (B, T) are < V; they are copied.
static void model_set_inputs(Model*, const int* x, const int* y);
// Cross-entropy of the inputs. With `train`, what backward needs stays behind, and the gradients, which are those of
// loss_scale · (mean loss of this micro-batch), are begun: exactly one backward must follow.
static void model_forward(Model*, bool train, float loss_scale);
static void model_backward(Model*);  // gradients = (first since update or create) or +=
// AdamW, step 1 being the first, on gradients times min(1, clip/norm); clip 0: as they are.
static void model_update(Model*, const AdamW&, float clip, int step);
static double model_norm(Model*);  // of the gradients, in the last update
// Mean cross-entropy, in nats a token, over the forwards since the last call.
static double model_loss(Model*);
static void model_token_losses(const Model*, float* out);      // (B, T), of the last forward
[[maybe_unused]] static void model_logits(Model*, float* out);  // (B, T, V), of the last forward, before its backward

// Decoding, one cache a sequence. Prompt appends n tokens to each, decode one; both give the logits (sequences, V)
// that follow the last. The caller keeps the length within maxT.
static void model_prompt(Model*, const int* tokens, int n, float* logits);  // tokens (sequences, n)
static void model_decode(Model*, const int* tokens, float* logits);         // tokens (sequences)
static void model_reset_cache(Model*);

#ifndef GPT2_CUDA
#if defined(__AVX512BF16__) || defined(__AMX_BF16__)
#include <immintrin.h>
#endif
#ifdef __AMX_BF16__
#include <cpuid.h>
#include <sys/syscall.h>
#endif
// ====================================================================================================================
// 3 · The CPU model
//
// Every result is the same to the bit for any number of threads: threads share out output elements, never the terms of
// a sum, so each element is summed in one fixed order.
//
// Layers are templates over X, the type that weights and activations are kept in: float, or bf16 (--precision bf16).
// Either way arithmetic is in float: a bf16 converts when it is read, and rounds when it is written.

// --------------------------------------------------------------------------------------------------------------------
// Numbers

// The upper half of a float: its range, with 8 bits of precision.
struct bf16 {
    uint16_t bits;

    bf16() = default;
    bf16(float x) {  // to the nearest, ties to even; NaN stays NaN
        uint32_t b = std::bit_cast<uint32_t>(x), rounded = (b + 0x7fff + (b >> 16 & 1)) >> 16;
        bits = (uint16_t)(x != x ? 0x7fc0 : rounded);
    }
    operator float() const { return std::bit_cast<float>((uint32_t)bits << 16); }
};

// A register of floats: GCC's and Clang's vector extension works lane by lane. A product's tile that stays in registers
// has ROWS rows of NV vectors: these sums, NV vectors of B and one broadcast element of A fill the register file, and
// ROWS·NV is more than latency times throughput of a fused multiply-add.
#if defined(__AVX512F__)                     // 32 registers of 16 floats
constexpr int LANES = 16, ROWS = 14, NV = 2;
#elif defined(__AVX2__) && defined(__FMA__)  // 16 registers of 8
constexpr int LANES = 8, ROWS = 6, NV = 2;
#elif defined(__ARM_NEON)                    // 32 registers of 4
constexpr int LANES = 4, ROWS = 8, NV = 3;
#else                                        // x86-64 at its plainest: 16 registers of 4
constexpr int LANES = 4, ROWS = 4, NV = 2;
#endif
constexpr size_t CACHE_LINE = 16;  // floats
typedef float vec __attribute__((vector_size(LANES * 4), may_alias));
typedef float unaligned_vec __attribute__((vector_size(LANES * 4), aligned(4), may_alias));
typedef uint32_t bits_vec __attribute__((vector_size(LANES * 4)));
typedef uint16_t half_vec __attribute__((vector_size(LANES * 2)));

static inline vec load(const float* p) { return *(const unaligned_vec*)p; }
static inline vec load(const bf16* p) {
    half_vec halves;
    memcpy(&halves, p, sizeof halves);
    return (vec)(__builtin_convertvector(halves, bits_vec) << 16);
}
static inline void store(float* p, vec v) { *(unaligned_vec*)p = v; }

// e^x = 2^n · e^r with n = round(x/ln 2), |r| ≤ ln(2)/2 and a polynomial for e^r, in plain arithmetic that compilers
// vectorise. Relative error below 2^-23 for -87 ≤ x ≤ 88; 0 below, the value at 88 above; NaN stays NaN.
static inline float exp_approx(float x) {
    float clamped = x > 88.0f ? 88.0f : x;
    float shifted = clamped * 1.44269504f + 0x1.8p23f;  // adding 1.5·2^23 leaves round(x/ln 2) in the low bits
    float n = shifted - 0x1.8p23f;
    float r = (clamped - n * 0.693359375f) - n * -2.12194440e-4f;  // ln 2 in two parts, so that n·ln 2 loses nothing
    float p = 1.9875691500e-4f;  // Cephes' minimax coefficients for (e^r - 1 - r)/r²
    p = p * r + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = p * r * r + r + 1.0f;
    float power = std::bit_cast<float>((std::bit_cast<uint32_t>(shifted) + 127u) << 23);  // 2^n: n+127 in the exponent
    return x < -87.0f ? 0.0f : p * power;
}

template <class X>
static float maximum(const X* x, size_t n) {
    constexpr size_t SEVERAL = 32;  // running maxima: few compilers make vectors of a single one
    float maxima[SEVERAL], max = -INFINITY;
    std::fill_n(maxima, SEVERAL, -INFINITY);
    size_t i = 0;
    for (; i + SEVERAL <= n; i += SEVERAL)
        for (size_t lane = 0; lane < SEVERAL; lane++) maxima[lane] = std::max(maxima[lane], (float)x[i + lane]);
    for (float m : maxima) max = std::max(max, m);
    for (; i < n; i++) max = std::max(max, (float)x[i]);
    return max;
}

template <class X, class Y>
static float dot(const X* a, const Y* b, size_t n) {
    float sum = 0;
#pragma omp simd reduction(+ : sum)
    for (size_t i = 0; i < n; i++) sum += (float)a[i] * (float)b[i];
    return sum;
}

// --------------------------------------------------------------------------------------------------------------------
// Threads, and where the time goes

static int thread_id() {
#ifdef _OPENMP
    return omp_get_thread_num();
#else
    return 0;
#endif
}
static int thread_count() {
#ifdef _OPENMP
    return omp_get_max_threads();
#else
    return 1;
#endif
}

static std::vector<Spent> model_profile() { return {profile, profile + PARTS}; }

struct Timed {
    static inline Timed* outermost = nullptr;
    Part part;
    double start = 0;

    Timed(Part p, double flops, double bytes) : part(outermost ? outermost->part : p) {
        if (!outermost) outermost = this, start = seconds();
        profile[part].flops += flops;
        profile[part].bytes += bytes;
    }
    ~Timed() {
        if (outermost != this) return;
        profile[part].seconds += seconds() - start;
        outermost = nullptr;
    }
};

// --------------------------------------------------------------------------------------------------------------------
// Matmul: C (M, N) = A (M, K) B (K, N)
//
// One routine serves all three products of a linear layer y = x wᵀ:
//     forward    y (rows, OC)  = x (rows, C)       wᵀ (C, OC)
//     backward   dx (rows, C)  = dy (rows, OC)     w (OC, C)
//                dw (OC, C)   += dyᵀ (OC, rows)    x (rows, C)
// The operands differ only in which index is contiguous, and packing evens that out. After "Anatomy of High-Performance
// Matrix Multiplication" (Goto and van de Geijn 2008) and BLIS:
//     - A is packed into panels of MR rows, [panel][step][MR], by all threads together, once if it fits the buffer;
//     - C is cut into blocks of NC columns, which threads take one by one. A thread packs its NC columns of B into
//       panels [panel][step][NR], which stay in its L2 cache while A goes by, panel after panel: the microkernel sums
//       up MR × NR of C in registers, over all of K.
//     - The finished MR rows of the block go through `store_row` while in L1: bias, GELU, residual and the like cost no
//       pass over memory.
// The books also block K, so that B's panels fit a cache however long it is. Here K is never so long that this pays:
// sums of C would go in and out of registers once a block, and need room in L2.
// Each element is summed over k in one order, which depends on the sizes alone, never on the number of threads.

// What a microkernel multiplies in a step, four bytes of a packed panel: one k, or a pair of k where the processor
// multiplies pairs of bf16. Elsewhere bf16 becomes float as it is packed.
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
template <class X> constexpr size_t steps(size_t K) {  // whole tiles with AMX; what is past K is 0
    return round_up(ceil_div(K, K_PER_STEP<X>), AMX<X> ? LANES : 1);
}

constexpr int NR = NV * LANES;
template <class X> constexpr int MR = AMX<X> ? 2 * LANES : ROWS;
constexpr size_t NC = 128 / NR * NR;  // over K = 768 they take 393 KB of L2; narrow, so that small N feeds all threads

// An operand's element (i, k) is data[i·stride + k] where k is the contiguous index, else data[k·stride + i];
// i is a row of A or a column of B, k is what the product sums over.
template <class X>
struct Operand {
    const X* data;
    size_t stride;
    bool along_k;

    Operand at(size_t i, size_t k) const {
        return {data + (along_k ? i * stride + k : k * stride + i), stride, along_k};
    }
};
template <class X> static Operand<X> along_k(const X* data, size_t stride) { return {data, stride, true}; }
template <class X> static Operand<X> across_k(const X* data, size_t stride) { return {data, stride, false}; }

// A product over very many tokens, or over the whole vocabulary, is summed slab by slab, so that 512 rows of A at the
// least fit the packed buffer. (Not constants, since the tests make them small.)
static size_t token_slab = 4096, vocabulary_slab = 4096;

// Scratch memory of matmul and attention, in cells.
struct Workspace {
    float* packed;      // (packed_size) the A operand, shared by all threads
    size_t packed_size;
    float* local;       // (threads, local_size) each thread's own
    size_t local_size;

    float* mine() const { return local + thread_id() * local_size; }
};

template <size_t... I>
static vec interleave_low(vec a, vec b, std::index_sequence<I...>) {  // a0 b0 a1 b1 ...
    return __builtin_shufflevector(a, b, (I / 2 + I % 2 * LANES)...);
}
template <size_t... I>
static vec interleave_high(vec a, vec b, std::index_sequence<I...>) {  // the same of the upper halves
    return __builtin_shufflevector(a, b, (LANES / 2 + I / 2 + I % 2 * LANES)...);
}

// Transposes LANES × LANES cells in registers. Interleaving row i with row i + LANES/2, log2(LANES) times, rotates the
// bits of (row, column) until the two have changed places.
static inline void transpose(vec (&rows)[LANES]) {
    constexpr auto lanes = std::make_index_sequence<LANES>();
    vec other[LANES];
#pragma GCC unroll 4
    for (int stage = 1; stage < LANES; stage *= 2) {
#pragma GCC unroll 16
        for (int i = 0; i < LANES / 2; i++) {
            other[2 * i] = interleave_low(rows[i], rows[i + LANES / 2], lanes);
            other[2 * i + 1] = interleave_high(rows[i], rows[i + LANES / 2], lanes);
        }
#pragma GCC unroll 16
        for (int i = 0; i < LANES; i++) rows[i] = other[i];
    }
}

// The first n of `count` values at p, zeros after them, where reading them all would run past the end.
template <size_t count, class X>
static inline const X* padded(X (&buffer)[count], const X* p, size_t n) {
    if (n >= count) return p;
    memset(buffer, 0, sizeof buffer);
    memcpy(buffer, p, n * sizeof(X));
    return buffer;
}

// LANES cells of a's first row: `left` values of k are left.
template <class X>
static inline vec cells_along_k(Operand<X> a, size_t left) {
    constexpr int count = LANES * K_PER_STEP<X>;
    X buffer[count];
    const X* row = padded(buffer, a.data, left);
    if constexpr (!PAIRS<X>) return load(row);
    vec cells;
    memcpy(&cells, row, sizeof cells);  // a pair is two neighbours as they lie
    return cells;
}

// One cell each of a's first n rows, at most LANES: its k, and k + 1, as far as they are less than K.
template <class X>
static inline vec cells_across_k(Operand<X> a, size_t K, size_t k, size_t n) {
    X buffer[LANES];
    if (n == 0 || k >= K) return vec{};
    vec low = load(padded(buffer, a.data, n)), high = {};
    if constexpr (!PAIRS<X>) return low;
    if (k + 1 < K) high = load(padded(buffer, a.at(0, 1).data, n));
    return (vec)((bits_vec)low >> 16 | (bits_vec)high);  // bf16 as float is the upper half of each lane
}

// Packs n rows of A, or columns of B, into panels of `width`, MR or NR, that follow each other:
// panels[i / width][step][i % width] from a(i, k), k < K; cells past n or K are 0.
template <int width, class X>
static void pack(Cell<X>* panels, Operand<X> a, size_t n, size_t K) {
    constexpr size_t PER = K_PER_STEP<X>, AHEAD = 8 * PER;  // steps whose rows of memory are fetched in time
    const size_t S = steps<X>(K);
    auto lanes = [&](size_t i) { return i < n ? std::min<size_t>(n - i, LANES) : 0; };
    // Where a panel is narrower than a vector, a store runs into the next step, which is yet to be written; the last
    // step has no next.
    auto put = [&](size_t panel, size_t i, size_t step, vec cells) {
        float* out = (float*)(panels + panel * S + step * width + i);
        if (i + LANES <= width || step + 1 < S) store(out, cells);
        else memcpy(out, &cells, (width - i) * sizeof(float));
    };
    if (a.along_k) {
        for (size_t panel = 0; panel < n; panel += width)
            for (size_t i0 = 0; i0 < width; i0 += LANES)
                for (size_t step = 0; step < S; step += LANES) {
                    vec block[LANES];
                    const size_t rows = lanes(panel + i0), left = K - step * PER;
#pragma GCC unroll 16
                    for (size_t i = 0; i < LANES; i++)
                        block[i] = i < rows ? cells_along_k(a.at(panel + i0 + i, step * PER), left) : vec{};
                    transpose(block);
#pragma GCC unroll 16
                    for (size_t j = 0; j < LANES; j++)
                        if (j < S - step) put(panel, i0, step + j, block[j]);
                }
    } else {  // all panels at once, since their rows lie side by side
        for (size_t step = 0; step < S; step++)
            for (size_t panel = 0; panel < n; panel += width)
                for (size_t i = 0; i < width; i += LANES) {
                    Operand<X> from = a.at(panel + i, step * PER);
                    for (size_t k = 0; k < PER; k++) __builtin_prefetch(from.at(0, AHEAD + k).data);
                    put(panel, i, step, cells_across_k(from, K, step * PER, lanes(panel + i)));
                }
    }
}

// The same for rows of A. AMX takes a row's 16 pairs together, so there a panel is [step/16][MR][16], which spares the
// transposition where k is contiguous.
template <class X>
static void pack_A(Cell<X>* panels, Operand<X> a, size_t n, size_t K) {
    if constexpr (!AMX<X>) return pack<MR<X>>(panels, a, n, K);
    constexpr size_t PER = K_PER_STEP<X>;
    const size_t S = steps<X>(K);
    for (size_t i0 = 0; i0 < round_up(n, MR<X>); i0 += LANES)
        for (size_t step = 0; step < S; step += LANES) {
            size_t rows = i0 < n ? std::min<size_t>(n - i0, LANES) : 0, panel = i0 / MR<X> * MR<X>;
            vec block[LANES] = {};
            if (a.along_k) {
                for (size_t i = 0; i < rows; i++) block[i] = cells_along_k(a.at(i0 + i, step * PER), K - step * PER);
            } else {
                for (size_t j = 0; j < LANES; j++)
                    block[j] = cells_across_k(a.at(i0, (step + j) * PER), K, (step + j) * PER, rows);
                transpose(block);
            }
            float* out = (float*)(panels + panel * S + step * MR<X> + (i0 - panel) * LANES);
            for (int i = 0; i < LANES; i++) store(out + i * LANES, block[i]);
        }
}

static inline void multiply_add(vec& sum, float a, const float* b) { sum += a * load(b); }
#ifdef __AVX512BF16__
static inline void multiply_add(vec& sum, Pair a, const Pair* b) {  // sum += a.low b.low + a.high b.high
    __m512bh a_all = (__m512bh)_mm512_set1_epi32(std::bit_cast<int>(a));
    sum = (vec)_mm512_dpbf16_ps((__m512)sum, a_all, (__m512bh)_mm512_loadu_si512(b));
}
#endif

#ifdef __AMX_BF16__
// AMX has eight tiles of 16 rows of 64 bytes: sums of 16 × 16 floats, or 16 rows of 16 pairs. Tiles 0 to 3 are the
// four quarters of c, 4 and 5 the halves of a, 6 and 7 those of b.
struct alignas(64) TileShapes {
    uint8_t palette = 1, start_row = 0, reserved[14] = {};
    uint16_t row_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
    uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
};

// A thread says once how it divides its tiles.
static inline void shape_tiles() {
    static thread_local bool shaped = false;
    if (shaped) return;
    static constexpr TileShapes shapes;
    _tile_loadconfig(&shapes);
    shaped = true;
}

// c (32, 32) = or += Σ over steps of a ⊗ b; a [steps/16][32][16] pairs, b [steps][32].
static inline void microkernel(float* c, size_t ldc, const Pair* a, const Pair* b, size_t steps, bool accumulate) {
    const size_t row = ldc * sizeof(float), a_row = LANES * sizeof(Pair), b_row = NR * sizeof(Pair);
    shape_tiles();
    asm volatile("" : : : "memory");  // what was stored up to here is loaded below, which compilers are not told
    if (accumulate) {
        _tile_loadd(0, c, row);
        _tile_loadd(1, c + LANES, row);
        _tile_loadd(2, c + LANES * ldc, row);
        _tile_loadd(3, c + LANES * ldc + LANES, row);
    } else {
        _tile_zero(0);
        _tile_zero(1);
        _tile_zero(2);
        _tile_zero(3);
    }
    for (size_t step = 0; step < steps; step += LANES, a += MR<bf16> * LANES, b += NR * LANES) {
        _tile_loadd(4, a, a_row);
        _tile_loadd(6, b, b_row);
        _tile_loadd(7, b + LANES, b_row);
        _tile_loadd(5, a + LANES * LANES, a_row);
        _tile_dpbf16ps(0, 4, 6);
        _tile_dpbf16ps(1, 4, 7);
        _tile_dpbf16ps(2, 5, 6);
        _tile_dpbf16ps(3, 5, 7);
    }
    _tile_stored(0, c, row);
    _tile_stored(1, c + LANES, row);
    _tile_stored(2, c + LANES * ldc, row);
    _tile_stored(3, c + LANES * ldc + LANES, row);
}
#endif

// The microkernel: c (ROWS, NR) = or += Σ over steps of a[step][ROWS] ⊗ b[step][NR], all of c in registers meanwhile.
template <class Cell>
static inline void microkernel(float* c, size_t ldc, const Cell* a, const Cell* b, size_t steps, bool accumulate) {
    vec sum[ROWS][NV];
#pragma GCC unroll 16
    for (int i = 0; i < ROWS; i++)
#pragma GCC unroll 4
        for (int j = 0; j < NV; j++) sum[i][j] = accumulate ? load(c + i * ldc + j * LANES) : vec{};
    for (size_t step = 0; step < steps; step++, a += ROWS, b += NR) {
#pragma GCC unroll 16
        for (int i = 0; i < ROWS; i++)
#pragma GCC unroll 4
            for (int j = 0; j < NV; j++) multiply_add(sum[i][j], a[i], b + j * LANES);
    }
#pragma GCC unroll 16
    for (int i = 0; i < ROWS; i++)
#pragma GCC unroll 4
        for (int j = 0; j < NV; j++) store(c + i * ldc + j * LANES, sum[i][j]);
}

// sum += the products of a register of a and one of b, lane by lane; of bf16 a lane has two.
template <class X>
static inline void add_products(vec& sum, const X* a, const X* b) {
    vec x, y;
    memcpy(&x, a, sizeof x), memcpy(&y, b, sizeof y);
    if constexpr (std::is_same_v<X, float>) {
        sum += x * y;
    } else {
#ifdef __AVX512BF16__
        sum = (vec)_mm512_dpbf16_ps((__m512)sum, (__m512bh)x, (__m512bh)y);
#else
        const bits_vec upper = bits_vec{} + 0xffff0000u;
        sum += (vec)((bits_vec)x << 16) * (vec)((bits_vec)y << 16);
        sum += (vec)((bits_vec)x & upper) * (vec)((bits_vec)y & upper);
#endif
    }
}

// Lane i of the result is the sum of sums[i]'s lanes: transposed, they add up as vectors.
static inline vec add_up(vec (&sums)[LANES]) {
    transpose(sums);
    vec total = sums[0];
    for (int lane = 1; lane < LANES; lane++) total += sums[lane];
    return total;
}

// A few rows, as in decoding: nothing is used often enough to be worth packing, and reading B (k contiguous: weights)
// is all the time it takes. A thread has one run of columns, which it reads as eight streams side by side: memory then
// always has as much to do as it can. Prefetching at the end of a column reaches into the next one of its stream.
constexpr size_t FEW_ROWS = 4;

template <class X, class Store>
static void matmul_few_rows(size_t M, size_t N, size_t K, Operand<X> A, Operand<X> B, Store store_row) {
    constexpr size_t STREAMS = 8, STEP = sizeof(vec) / sizeof(X);
    constexpr size_t AHEAD = 512 / sizeof(X);  // 64 cache lines of all streams are on their way, more than fit a queue
    const size_t parts = thread_count();
#pragma omp parallel for schedule(static)
    for (size_t part = 0; part < parts; part++) {
        const size_t begin = N * part / parts, end = N * (part + 1) / parts, length = ceil_div(end - begin, STREAMS);
        for (size_t i0 = 0; i0 < length; i0 += LANES) {
            const size_t columns = std::min<size_t>(length - i0, LANES);  // of each stream, from n0(stream) on
            auto n0 = [&](size_t stream) { return begin + stream * length + i0; };
            for (size_t m = 0; m < M; m++) {
                const X* a = A.data + m * A.stride;
                vec sums[STREAMS][LANES] = {};
                for (size_t i = 0; i < columns; i++) {
                    const X* b[STREAMS];
                    vec sum[STREAMS] = {};
                    for (size_t s = 0; s < STREAMS; s++) b[s] = B.data + std::min(n0(s) + i, end - 1) * B.stride;
                    size_t k = 0;
                    for (; k + STEP <= K; k += STEP) {
#pragma GCC unroll 8
                        for (size_t s = 0; s < STREAMS; s++) {
                            __builtin_prefetch(b[s] + k + AHEAD);
                            add_products(sum[s], a + k, b[s] + k);
                        }
                    }
                    for (size_t s = 0; s < STREAMS; s++) {
                        X a_rest[STEP], b_rest[STEP];
                        if (k < K) add_products(sum[s], padded(a_rest, a + k, K - k), padded(b_rest, b[s] + k, K - k));
                        sums[s][i] = sum[s];
                    }
                }
                for (size_t s = 0; s < STREAMS && n0(s) < end; s++) {
                    vec c = add_up(sums[s]);
                    store_row(m, n0(s), std::min(columns, end - n0(s)), (const float*)&c);
                }
            }
        }
    }
}

// store_row(m, n, count, c) receives C's finished elements (m, n .. n+count-1).
template <class X, class Store>
static void matmul(Workspace& ws, size_t M, size_t N, size_t K, Operand<X> A, Operand<X> B, Store store_row) {
    Timed timed(MATMUL, 2.0 * M * N * K, (1.0 * M * K + 1.0 * N * K + 1.0 * M * N) * sizeof(X));
    if (M <= FEW_ROWS && A.along_k && B.along_k) return matmul_few_rows(M, N, K, A, B, store_row);
    const size_t S = steps<X>(K);
    Cell<X>* packed = (Cell<X>*)ws.packed;
    constexpr size_t MR = ::MR<X>, PACKED = 4 * MR;  // rows that a thread packs at a time
    // As many rows of A at once as fit the packed buffer; blocks of C small enough to go round.
    size_t rows_at_once = std::min(round_up(M, MR), ws.packed_size / S / MR * MR);
    size_t column_blocks = ceil_div(N, NC), row_blocks = 1;
    while (column_blocks * row_blocks < 3 * (size_t)thread_count() && rows_at_once / row_blocks > 6 * MR) row_blocks++;
    size_t block_rows = round_up(ceil_div(rows_at_once, row_blocks), MR);
#pragma omp parallel
    for (size_t first = 0; first < M; first += rows_at_once) {
        size_t rows = std::min(rows_at_once, M - first);
#pragma omp for schedule(static)
        for (size_t m = 0; m < rows; m += PACKED)
            pack_A(packed + m * S, A.at(first + m, 0), std::min(rows - m, PACKED), K);

        Cell<X>* b_block = (Cell<X>*)ws.mine();  // [NC/NR][S][NR]
        float* c_rows = ws.mine() + S * NC;      // (MR, NC)
#pragma omp for collapse(2) schedule(dynamic)
        for (size_t n0 = 0; n0 < N; n0 += NC) {
            for (size_t m0 = 0; m0 < rows; m0 += block_rows) {
                size_t columns = std::min(N - n0, NC), end = std::min(rows, m0 + block_rows);
                pack<NR>(b_block, B.at(n0, 0), columns, K);
                for (size_t m = m0; m < end; m += MR) {
                    for (size_t n = 0; n < columns; n += NR)
                        microkernel(c_rows + n, NC, packed + m * S, b_block + n * S, S, false);
                    for (size_t i = 0; i < std::min(end - m, MR); i++)
                        store_row(first + m + i, n0, columns, c_rows + i * NC);
                }
            }
        }
    }
}

// A thread's own scratch memory for products over at most K: its part of B and of C.
template <class X>
static size_t matmul_local_size(size_t K) {
    return (steps<X>(K) + MR<X>) * NC;
}

// --------------------------------------------------------------------------------------------------------------------
// Linear layers: y = x wᵀ + b, with w (OC, C) and `rows` tokens
//
// The three forward variants differ in what happens to a finished row of the product while it is in cache. ldy is the
// distance between rows of y: a layer may write some columns of a wider array. x (rows, C), b (OC), y (rows, OC).

template <class X>
static void linear_forward(Workspace& ws, X* y, const X* x, const X* w, const X* b, size_t rows, size_t C, size_t OC,
                           size_t ldy) {
    matmul(ws, rows, OC, C, along_k(x, C), along_k(w, C), [=](size_t m, size_t n, size_t count, const float* xw) {
        X* y_m = y + m * ldy + n;
        for (size_t i = 0; i < count; i++) y_m[i] = xw[i] + b[n + i];
    });
}

// y = residual + (x wᵀ + b); y may be the residual itself
template <class X>
static void linear_residual_forward(Workspace& ws, X* y, const X* residual, const X* x, const X* w, const X* b,
                                    size_t rows, size_t C, size_t OC) {
    matmul(ws, rows, OC, C, along_k(x, C), along_k(w, C), [=](size_t m, size_t n, size_t count, const float* xw) {
        X* y_m = y + m * OC + n;
        const X* residual_m = residual + m * OC + n;
        for (size_t i = 0; i < count; i++) y_m[i] = residual_m[i] + (xw[i] + b[n + i]);
    });
}

// GELU, in the tanh form of GPT-2: ½ x (1 + tanh u), u = √(2/π) (x + 0.044715 x³). As ½ (1 + tanh u) = σ(2u), the
// logistic function, that is x σ(2u) with σ(z) = 1/(1 + e^-z): one exponential.
static inline float gelu(float x) {
    float z = 2.0f * 0.7978845608f * (x + 0.044715f * x * x * x);
    return x / (1.0f + exp_approx(-z));
}

// d(x σ(z))/dx = σ + x σ' z' = σ + x σ (1 - σ) z'
static inline float gelu_derivative(float x) {
    float z = 2.0f * 0.7978845608f * (x + 0.044715f * x * x * x);
    float dz = 2.0f * 0.7978845608f * (1.0f + 3.0f * 0.044715f * x * x);
    float s = 1.0f / (1.0f + exp_approx(-z));
    return s + x * s * (1.0f - s) * dz;
}

// h = x wᵀ + b, y = gelu(h), which may be in h's place
template <class X>
static void linear_gelu_forward(Workspace& ws, X* y, X* h, const X* x, const X* w, const X* b, size_t rows, size_t C,
                                size_t OC) {
    matmul(ws, rows, OC, C, along_k(x, C), along_k(w, C), [=](size_t m, size_t n, size_t count, const float* xw) {
        X *h_m = h + m * OC + n, *y_m = y + m * OC + n;
        for (size_t i = 0; i < count; i++) h_m[i] = xw[i] + b[n + i];
        for (size_t i = 0; i < count; i++) y_m[i] = gelu(h_m[i]);
    });
}

// dx = dy w. Where dy and w come in pieces, a few columns of dy and as many rows of w, dx_sum (rows, C) gathers what
// they give, in fp32, and the last one writes dx.
template <class X>
static void linear_backward_input(Workspace& ws, X* dx, const X* dy, const X* w, size_t rows, size_t C, size_t OC,
                                  size_t lddy, float* dx_sum = nullptr, bool first = true, bool last = true) {
    Timed timed(MATMUL_DX, 0, 0);
    matmul(ws, rows, C, OC, along_k(dy, lddy), across_k(w, C), [=](size_t m, size_t n, size_t count, const float* dyw) {
        size_t at = m * C + n;
        for (size_t i = 0; i < count; i++) {
            float sum = first ? dyw[i] : dx_sum[at + i] + dyw[i];
            if (last) dx[at + i] = sum;
            else dx_sum[at + i] = sum;
        }
    });
}

// The same through the GELU that made the layer's input from h: dh = (dy w) gelu'(h); and gelu(h) again, which dw needs
template <class X>
static void linear_gelu_backward_input(Workspace& ws, X* dh, X* gelu_h, const X* h, const X* dy, const X* w,
                                       size_t rows, size_t C, size_t OC) {
    Timed timed(MATMUL_DX, 0, 0);
    matmul(ws, rows, C, OC, along_k(dy, OC), across_k(w, C), [=](size_t m, size_t n, size_t count, const float* dyw) {
        X *dh_m = dh + m * C + n, *gelu_m = gelu_h + m * C + n;
        const X* h_m = h + m * C + n;
        for (size_t i = 0; i < count; i++) dh_m[i] = dyw[i] * gelu_derivative(h_m[i]);
        for (size_t i = 0; i < count; i++) gelu_m[i] = gelu(h_m[i]);
    });
}

// dw = or += dyᵀ x and, unless db is null, db = or += Σ over tokens of dy. Sums over very many tokens go slab by slab,
// so that a good part of dyᵀ fits the packed buffer.
template <class X>
static void linear_backward_weight(Workspace& ws, float* dw, float* db, const X* dy, const X* x, size_t rows, size_t C,
                                   size_t OC, size_t lddy, bool accumulate) {
    Timed timed(MATMUL_DW, 0, 0);
    for (size_t r = 0; r < rows; r += token_slab) {
        bool add = accumulate || r > 0;
        matmul(ws, OC, C, std::min(rows - r, token_slab), across_k(dy + r * lddy, lddy), across_k(x + r * C, C),
               [=](size_t m, size_t n, size_t count, const float* dyx) {
                   float* dw_m = dw + m * C + n;
                   for (size_t i = 0; i < count; i++) dw_m[i] = add ? dw_m[i] + dyx[i] : dyx[i];
               });
    }
    if (!db) return;
    constexpr size_t COLUMNS = 64;
#pragma omp parallel for schedule(static)
    for (size_t n0 = 0; n0 < OC; n0 += COLUMNS) {
        size_t columns = std::min(OC - n0, COLUMNS);
        float sum[COLUMNS] = {};
        for (size_t r = 0; r < rows; r++)
            for (size_t i = 0; i < columns; i++) sum[i] += dy[r * lddy + n0 + i];
        for (size_t i = 0; i < columns; i++) db[n0 + i] = accumulate ? db[n0 + i] + sum[i] : sum[i];
    }
}

// --------------------------------------------------------------------------------------------------------------------
// Embedding: x[b,t] = wte[token] + wpe[t], x (B, T, C), tokens (B, T)

template <class X>
static void embedding_forward(X* x, const int* tokens, const X* wte, const X* wpe, size_t B, size_t T, size_t C) {
    Timed timed(EMBEDDING, 0, 3.0 * B * T * C * sizeof(X));
#pragma omp parallel for schedule(static) if (B * T > 1)
    for (size_t bt = 0; bt < B * T; bt++) {
        const X *token = wte + tokens[bt] * C, *position = wpe + bt % T * C;
        for (size_t i = 0; i < C; i++) x[bt * C + i] = (float)token[i] + (float)position[i];
    }
}

// dwte[token] += dx[b,t] (wte is the classifier too, whose share is there already); dwpe[t] = or += Σ_b dx[b,t].
// A token may stand at many places, so threads share out channels, not tokens.
template <class X>
static void embedding_backward(float* dwte, float* dwpe, const X* dx, const int* tokens, size_t B, size_t T, size_t C,
                               bool accumulate) {
    Timed timed(EMBEDDING, 0, B * T * C * (sizeof(X) + 2.0 * sizeof(float)) + 2.0 * T * C * sizeof(float));
#pragma omp parallel for schedule(static)
    for (size_t c = 0; c < C; c += CACHE_LINE) {
        size_t channels = std::min(C - c, CACHE_LINE);
        for (size_t bt = 0; bt < B * T; bt++) {
            const X* dx_bt = dx + bt * C + c;
            float *dwte_bt = dwte + tokens[bt] * C + c, *dwpe_t = dwpe + bt % T * C + c;
            bool add = accumulate || bt >= T;
            for (size_t i = 0; i < channels; i++) dwte_bt[i] += dx_bt[i];
            for (size_t i = 0; i < channels; i++) dwpe_t[i] = add ? dwpe_t[i] + dx_bt[i] : (float)dx_bt[i];
        }
    }
}

// --------------------------------------------------------------------------------------------------------------------
// LayerNorm: n = (x - mean) rstd, y = n w + b, over the C channels of each token; x, y (rows, C), mean, rstd (rows)

template <class X>
static void layernorm_normalize(X* y, const X* x, const X* w, const X* b, float mean, float rstd, size_t C) {
    for (size_t i = 0; i < C; i++) y[i] = (x[i] - mean) * rstd * w[i] + b[i];
}

template <class X>
static void layernorm_forward(X* y, float* mean, float* rstd, const X* x, const X* w, const X* b, size_t rows,
                              size_t C) {
    Timed timed(LAYERNORM, 0, 2.0 * rows * C * sizeof(X));
#pragma omp parallel for schedule(static) if (rows > 1)
    for (size_t r = 0; r < rows; r++) {
        const X* x_r = x + r * C;
        float sum = 0, variance = 0;
#pragma omp simd reduction(+ : sum)
        for (size_t i = 0; i < C; i++) sum += x_r[i];
        float m = sum / C;
#pragma omp simd reduction(+ : variance)
        for (size_t i = 0; i < C; i++) variance += (x_r[i] - m) * (x_r[i] - m);
        float s = 1.0f / sqrtf(variance / C + 1e-5f);
        if (mean) mean[r] = m, rstd[r] = s;  // for backward
        layernorm_normalize(y + r * C, x_r, w, b, m, s, C);
    }
}

// y again from the saved statistics: cheaper than keeping it from the forward pass.
template <class X>
static void layernorm_recompute(X* y, const X* x, const X* w, const X* b, const float* mean, const float* rstd,
                                size_t rows, size_t C) {
    Timed timed(LAYERNORM, 0, 2.0 * rows * C * sizeof(X));
#pragma omp parallel for schedule(static)
    for (size_t r = 0; r < rows; r++) layernorm_normalize(y + r * C, x + r * C, w, b, mean[r], rstd[r], C);
}

// dx = (or +=, into the gradient that flows past the layer in the residual stream); dw, db = or +=.
// With g = dy w, the gradient by n: n depends on x directly, through the mean and through rstd,
//     ∂n_j/∂x_i = rstd (δ_ij - 1/C - n_i n_j/C),
// since ∂mean/∂x_i = 1/C and ∂rstd/∂x_i = -rstd² n_i/C (differentiate rstd = (var + eps)^-½). Summed over j with g_j:
//     dx_i = rstd (g_i - mean(g) - n_i mean(g n)).
// dw = Σ dy n and db = Σ dy over tokens: partial sums over fixed runs of tokens, then added up in order.
constexpr size_t LAYERNORM_RUN = 32;

template <class X>
static void layernorm_backward(X* dx, float* dw, float* db, float* partial /* (runs, 2, C) */, const X* dy, const X* x,
                               const X* w, const float* mean, const float* rstd, size_t rows, size_t C,
                               bool accumulate_dx, bool accumulate) {
    Timed timed(LAYERNORM, 0, (accumulate_dx ? 4.0 : 3.0) * rows * C * sizeof(X));
    size_t runs = ceil_div(rows, LAYERNORM_RUN);
#pragma omp parallel for schedule(static)
    for (size_t run = 0; run < runs; run++) {
        float *dw_run = partial + run * 2 * C, *db_run = dw_run + C;
        std::fill_n(dw_run, 2 * C, 0.0f);
        for (size_t r = run * LAYERNORM_RUN; r < std::min(rows, (run + 1) * LAYERNORM_RUN); r++) {
            const X *x_r = x + r * C, *dy_r = dy + r * C;
            X* dx_r = dx + r * C;
            float m = mean[r], s = rstd[r], g_sum = 0, gn_sum = 0;
#pragma omp simd reduction(+ : g_sum, gn_sum)
            for (size_t i = 0; i < C; i++) {
                float n = (x_r[i] - m) * s, dy_i = dy_r[i], g = dy_i * w[i];
                dw_run[i] += dy_i * n;
                db_run[i] += dy_i;
                g_sum += g;
                gn_sum += g * n;
            }
            float g_mean = g_sum / C, gn_mean = gn_sum / C;
            for (size_t i = 0; i < C; i++) {
                float n = (x_r[i] - m) * s, g = (float)dy_r[i] * (float)w[i];
                float dx_i = s * (g - g_mean - n * gn_mean);
                dx_r[i] = accumulate_dx ? dx_r[i] + dx_i : dx_i;
            }
        }
    }
#pragma omp parallel for schedule(static)
    for (size_t i = 0; i < C; i++) {
        float dw_i = 0, db_i = 0;
        for (size_t run = 0; run < runs; run++) {
            dw_i += partial[run * 2 * C + i];
            db_i += partial[run * 2 * C + C + i];
        }
        dw[i] = accumulate ? dw[i] + dw_i : dw_i;
        db[i] = accumulate ? db[i] + db_i : db_i;
    }
}

// --------------------------------------------------------------------------------------------------------------------
// Attention: o = softmax(causal(q kᵀ/√HS)) v, for one head of one sequence at a time
//
// Tiles of NR queries by KEYS keys; nothing of size T × T exists. Scores are computed transposed, sᵀ = k qᵀ: each of a
// row's NR lanes is then a query of its own, and maxima and sums over keys go lane by lane.
//
// Softmax online (Milakov and Gimelshein 2018, FlashAttention). Over the keys seen so far, keep for each query
//     max = max_j s_j      sum = Σ_j e^(s_j - max)      o = Σ_j e^(s_j - max) v_j
// A new tile may raise max to max'. As e^(s - max') = e^(s - max) e^(max - max'), scaling sum and o by e^(max - max')
// makes them what they would have been with max' from the start; then the tile's own terms are added. At the end
// o/sum is softmax(s) v, and lse = max + log(sum) is all that backward needs: p_j = e^(s_j - lse).

template <class X> constexpr size_t KEYS = 8 * MR<X>;

// One head's rows in an array of many heads: row i begins at data + i·stride.
template <class X>
struct Rows {
    X* data;
    size_t stride;

    X* operator[](size_t i) const { return data + i * stride; }
};

// A thread's scratch memory for one head of T keys, laid out from `local` on. Panels are operands of the microkernel:
// A operands lie in panels of MR rows, B operands in panels of NR columns.
template <class X>
struct HeadScratch {
    Cell<X>*k_panels, *vT_panels;           // A: k (T, HS), vᵀ (HS, T)
    Cell<X>* q_panel;                       // B: qᵀ (HS, NR queries)
    float* s;                               // sᵀ (KEYS, NR)
    X* p;                                   // pᵀ or dsᵀ (KEYS, NR), rounded for a matmul ...
    Cell<X>* p_rows;                        // ... and packed as B, for a sum over keys
    float* oT;                              // (HS, NR)
    // In backward, also
    Cell<X>*v_panels, *kT_panels;           // A: v (T, HS), kᵀ (HS, T)
    Cell<X>*do_panel, *q_rows, *do_rows;    // B: doᵀ (HS, NR queries); q, do (NR queries, HS)
    float* ds;                              // (KEYS, NR)
    Cell<X>* p_panels;                      // p packed as A, for a sum over queries
    float *dqT, *dk_sum, *dv_sum;           // (HS, NR); (T, HS), rows of round_up(HS, NR)
    size_t size = 0;                        // floats in all

    HeadScratch(float* local, size_t T, size_t HS, bool backward) {
        auto take = [&](auto*& p, size_t n) {
            p = local ? (std::remove_reference_t<decltype(p)>)(local + size) : nullptr;  // null: only counts
            size += round_up(n, CACHE_LINE);
        };
        size_t rows_T = round_up(T, MR<X>), rows_HS = round_up(HS, MR<X>), columns_HS = round_up(HS, NR);
        size_t tile_HS = std::max(rows_HS, round_up(HS, LANES)) * NR;
        take(k_panels, rows_T * steps<X>(HS)), take(vT_panels, rows_HS * steps<X>(T));
        take(q_panel, steps<X>(HS) * NR);
        take(s, KEYS<X> * NR), take(p, KEYS<X> * NR), take(p_rows, KEYS<X> * NR);
        take(oT, tile_HS);
        if (!backward) return;
        take(v_panels, rows_T * steps<X>(HS)), take(kT_panels, rows_HS * steps<X>(T));
        take(do_panel, steps<X>(HS) * NR);
        take(q_rows, columns_HS * steps<X>(NR)), take(do_rows, columns_HS * steps<X>(NR));
        take(ds, KEYS<X> * NR), take(p_panels, KEYS<X> * NR);
        take(dqT, tile_HS), take(dk_sum, rows_T * columns_HS), take(dv_sum, rows_T * columns_HS);
    }
};

// sᵀ (keys, NR) of the NR queries in q_panel; key j0 + r against query i0 + lane is causal if j0 + r ≤ i0 + lane.
template <class X>
static void scores_tile(HeadScratch<X>& h, size_t keys, size_t j0, size_t i0, size_t HS) {
    for (size_t r = 0; r < keys; r += MR<X>)
        microkernel(h.s + r * NR, NR, h.k_panels + (j0 + r) * steps<X>(HS), h.q_panel, steps<X>(HS), false);
    for (size_t r = i0 > j0 ? i0 - j0 : 0; r < keys; r++)
        for (size_t lane = 0; lane < std::min<size_t>(j0 + r - i0, NR); lane++) h.s[r * NR + lane] = -INFINITY;
}

// sumᵀ (HS, NR) += aᵀ (HS, keys) p (keys, NR), for keys from j0 on; aT_panels (HS, T)
template <class X>
static void add_over_keys(float* sumT, HeadScratch<X>& h, const Cell<X>* aT_panels, size_t keys, size_t j0, size_t T,
                          size_t HS) {
    pack<NR>(h.p_rows, across_k<X>(h.p, NR), NR, keys);
    const Cell<X>* from_j0 = aT_panels + steps<X>(j0) * MR<X>;
    for (size_t d = 0; d < HS; d += MR<X>)
        microkernel(sumT + d * NR, NR, from_j0 + d * steps<X>(T), h.p_rows, steps<X>(keys), true);
}

// sum (keys from j0 on, HS) += p (keys, n queries) a (n, HS); a_rows packed
template <class X>
static void add_over_queries(float* sum, HeadScratch<X>& h, const Cell<X>* a_rows, size_t keys, size_t j0, size_t n,
                             size_t HS) {
    size_t columns = round_up(HS, NR);
    pack_A(h.p_panels, along_k<X>(h.p, NR), keys, n);
    for (size_t r = 0; r < keys; r += MR<X>)
        for (size_t d = 0; d < HS; d += NR)
            microkernel(sum + (j0 + r) * columns + d, columns, h.p_panels + r * steps<X>(n), a_rows + d * steps<X>(n),
                        steps<X>(n), true);
}

// out (n, HS) = tileᵀ, from tile (HS, NR), whose room ends with a multiple of LANES rows at the least
template <class X>
static void transpose_tile(Rows<X> out, const float* tile, size_t n, size_t HS) {
    for (size_t d0 = 0; d0 < HS; d0 += LANES)
        for (size_t i0 = 0; i0 < n; i0 += LANES) {
            vec block[LANES];
            for (size_t d = 0; d < LANES; d++) block[d] = load(tile + (d0 + d) * NR + i0);
            transpose(block);
            for (size_t i = 0; i < std::min<size_t>(n - i0, LANES); i++)
                std::copy_n((const float*)&block[i], std::min<size_t>(HS - d0, LANES), out[i0 + i] + d0);
        }
}

// o, q (queries, HS); k, v (before + queries, HS); lse (queries) or null. Query i is at position before + i.
template <class X>
static void attention_head_forward(float* local, Rows<X> o, float* lse, Rows<const X> q, Rows<const X> k,
                                   Rows<const X> v, size_t queries, size_t before, size_t HS) {
    size_t T = before + queries;
    float scale = 1.0f / sqrtf(HS);
    HeadScratch<X> h(local, T, HS, false);
    pack_A(h.k_panels, along_k(k.data, k.stride), T, HS);
    pack_A(h.vT_panels, across_k(v.data, v.stride), HS, T);

    for (size_t i0 = 0; i0 < queries; i0 += NR) {
        size_t n = std::min<size_t>(queries - i0, NR), visible = before + i0 + n;
        float max[NR], sum[NR], rescale[NR];
        std::fill_n(max, NR, -INFINITY);
        std::fill_n(sum, NR, 0.0f);
        std::fill_n(h.oT, round_up(HS, MR<X>) * NR, 0.0f);
        pack<NR>(h.q_panel, along_k(q[i0], q.stride), n, HS);
        for (size_t j0 = 0; j0 < visible; j0 += KEYS<X>) {
            size_t keys = std::min(visible - j0, KEYS<X>);
            scores_tile(h, keys, j0, before + i0, HS);
            float new_max[NR];
            for (int lane = 0; lane < NR; lane += LANES) {  // as vectors, which few compilers make of a maximum
                vec most = load(max + lane);
                for (size_t r = 0; r < keys; r++) {
                    vec s = load(h.s + r * NR + lane);
                    most = s > most ? s : most;
                }
                store(new_max + lane, most);
            }
            for (int lane = 0; lane < NR; lane++) rescale[lane] = exp_approx(scale * (max[lane] - new_max[lane]));
            for (int lane = 0; lane < NR; lane++) sum[lane] *= rescale[lane];
            for (size_t r = 0; r < keys; r++)
                for (int lane = 0; lane < NR; lane++) {
                    float p = exp_approx(scale * (h.s[r * NR + lane] - new_max[lane]));
                    h.p[r * NR + lane] = p;
                    sum[lane] += p;
                }
            for (size_t d = 0; d < HS; d++)
                for (int lane = 0; lane < NR; lane++) h.oT[d * NR + lane] *= rescale[lane];
            add_over_keys(h.oT, h, h.vT_panels, keys, j0, T, HS);
            std::copy_n(new_max, NR, max);
        }
        for (int lane = 0; lane < NR; lane++) rescale[lane] = 1 / sum[lane];
        for (size_t d = 0; d < HS; d++)
            for (int lane = 0; lane < NR; lane++) h.oT[d * NR + lane] *= rescale[lane];
        transpose_tile(Rows<X>{o[i0], o.stride}, h.oT, n, HS);
        for (size_t i = 0; lse && i < n; i++) lse[i0 + i] = scale * max[i] + logf(sum[i]);
    }
}

// dq, dk, dv = from do; dk, dv of type DKV; all (T, HS). With p = softmax(s), s = scale q kᵀ, o = p v:
//     dv_j = Σ_i p_ij do_i        dp_ij = do_i·v_j
//     ds_ij = p_ij (dp_ij - Σ_j' p_ij' dp_ij')     (softmax: ∂p_j'/∂s_j = p_j' (δ_jj' - p_j))
// and Σ_j p_ij dp_ij = do_i·Σ_j p_ij v_j = do_i·o_i =: delta_i, so the sum over a whole row needs no second sweep. Then
//     dq_i = scale Σ_j ds_ij k_j      dk_j = scale Σ_i ds_ij q_i
template <class X, class DKV>
static void attention_head_backward(float* local, Rows<X> dq, Rows<DKV> dk, Rows<DKV> dv, Rows<const X> dout,
                                    Rows<const X> o, const float* lse, Rows<const X> q, Rows<const X> k,
                                    Rows<const X> v, size_t T, size_t HS) {
    size_t columns = round_up(HS, NR);
    float scale = 1.0f / sqrtf(HS);
    HeadScratch<X> h(local, T, HS, true);
    pack_A(h.k_panels, along_k(k.data, k.stride), T, HS);
    pack_A(h.v_panels, along_k(v.data, v.stride), T, HS);
    pack_A(h.kT_panels, across_k(k.data, k.stride), HS, T);
    std::fill_n(h.dk_sum, round_up(T, MR<X>) * columns, 0.0f);
    std::fill_n(h.dv_sum, round_up(T, MR<X>) * columns, 0.0f);

    for (size_t i0 = 0; i0 < T; i0 += NR) {
        size_t n = std::min<size_t>(T - i0, NR), visible = i0 + n;
        float row_lse[NR] = {}, delta[NR] = {};  // Lanes past the last query stay 0, as their rows are
        for (size_t i = 0; i < n; i++) {
            row_lse[i] = lse[i0 + i];
            delta[i] = dot(dout[i0 + i], o[i0 + i], HS);
        }
        pack<NR>(h.q_panel, along_k(q[i0], q.stride), n, HS);
        pack<NR>(h.do_panel, along_k(dout[i0], dout.stride), n, HS);
        pack<NR>(h.q_rows, across_k(q[i0], q.stride), HS, n);
        pack<NR>(h.do_rows, across_k(dout[i0], dout.stride), HS, n);
        std::fill_n(h.dqT, round_up(HS, MR<X>) * NR, 0.0f);
        for (size_t j0 = 0; j0 < visible; j0 += KEYS<X>) {
            size_t keys = std::min(visible - j0, KEYS<X>);
            scores_tile(h, keys, j0, i0, HS);
            for (size_t r = 0; r < keys; r += MR<X>)  // dpᵀ
                microkernel(h.ds + r * NR, NR, h.v_panels + (j0 + r) * steps<X>(HS), h.do_panel, steps<X>(HS), false);
            for (size_t r = 0; r < keys; r++)
                for (int lane = 0; lane < NR; lane++) {
                    float p = exp_approx(scale * h.s[r * NR + lane] - row_lse[lane]);
                    h.p[r * NR + lane] = p;
                    h.ds[r * NR + lane] = scale * p * (h.ds[r * NR + lane] - delta[lane]);
                }
            add_over_queries(h.dv_sum, h, h.do_rows, keys, j0, n, HS);
            for (size_t i = 0; i < keys * NR; i++) h.p[i] = h.ds[i];
            add_over_queries(h.dk_sum, h, h.q_rows, keys, j0, n, HS);
            add_over_keys(h.dqT, h, h.kT_panels, keys, j0, T, HS);
        }
        transpose_tile(Rows<X>{dq[i0], dq.stride}, h.dqT, n, HS);
    }
    for (size_t t = 0; t < T; t++) {
        std::copy_n(h.dk_sum + t * columns, HS, dk[t]);
        std::copy_n(h.dv_sum + t * columns, HS, dv[t]);
    }
}

// One query against `keys` keys, as in decoding: no tile to fill, and reading k and v is all the time it takes.
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
                X q_rest[STEP], k_rest[STEP];
                add_products(sums[i], padded(q_rest, q + d, HS - d), padded(k_rest, k[j0 + i] + d, HS - d));
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
    size_t j = 0;
    for (; j + 4 <= keys; j += 4) {  // four at a time: fewer passes over sum_o
        const X *v0 = v[j], *v1 = v[j + 1], *v2 = v[j + 2], *v3 = v[j + 3];
        const float p0 = p[j], p1 = p[j + 1], p2 = p[j + 2], p3 = p[j + 3];
        for (size_t d = 0; d < HS; d++) sum_o[d] += p0 * v0[d] + p1 * v1[d] + p2 * v2[d] + p3 * v3[d];
    }
    for (; j < keys; j++)
        for (size_t d = 0; d < HS; d++) sum_o[d] += p[j] * v[j][d];
    for (size_t d = 0; d < HS; d++) o[d] = sum_o[d] / sum;
}

// A whole layer. qkv (B, T, 3C) is the layer's own; skipping heads find keys and values in qkv_below, that of layer
// l - skip_distance. o (B, T, C), lse (B, NH, T).
template <class X>
static void attention_forward(Workspace& ws, X* o, float* lse, const X* qkv, const X* qkv_below, const Config& c, int l,
                              size_t B, size_t T) {
    size_t C = c.C, NH = c.NH, HS = c.head_size();
    Timed timed(ATTENTION, attention_flops(B, T, C, 2), 0);
#pragma omp parallel for collapse(2) schedule(dynamic)
    for (size_t b = 0; b < B; b++) {
        for (size_t h = 0; h < NH; h++) {
            size_t at = b * T * 3 * C + h * HS;
            const X *q = qkv + at, *k = (skips(c, l, h) ? qkv_below : qkv) + at + C, *v = k + C;
            attention_head_forward<X>(ws.mine(), {o + b * T * C + h * HS, C}, lse + (b * NH + h) * T, {q, 3 * C},
                                      {k, 3 * C}, {v, 3 * C}, T, 0, HS);
        }
    }
}

// dq = in dqkv (B, T, 3C). dk, dv = there too if dkv is null, as with vanilla; else they are only shares of a sum, and
// go to dkv (B, T, 2C), those of skipping heads to dkv_below, which belongs to layer l - skip_distance.
template <class X>
static void attention_backward(Workspace& ws, X* dqkv, float* dkv, float* dkv_below, const X* dout, const X* o,
                               const float* lse, const X* qkv, const X* qkv_below, const Config& c, int l, size_t B,
                               size_t T) {
    size_t C = c.C, NH = c.NH, HS = c.head_size();
    Timed timed(ATTENTION, attention_flops(B, T, C, 4), 0);
#pragma omp parallel for collapse(2) schedule(dynamic)
    for (size_t b = 0; b < B; b++) {
        for (size_t h = 0; h < NH; h++) {
            size_t at = b * T * 3 * C + h * HS, at_o = b * T * C + h * HS, at_dkv = b * T * 2 * C + h * HS;
            const X *q = qkv + at, *k = (skips(c, l, h) ? qkv_below : qkv) + at + C, *v = k + C;
            auto head = [&](auto* dk, size_t stride) {
                using DKV = std::remove_pointer_t<decltype(dk)>;
                attention_head_backward<X, DKV>(ws.mine(), {dqkv + at, 3 * C}, {dk, stride}, {dk + C, stride},
                                                {dout + at_o, C}, {o + at_o, C}, lse + (b * NH + h) * T, {q, 3 * C},
                                                {k, 3 * C}, {v, 3 * C}, T, HS);
            };
            float* share = skips(c, l, h) ? dkv_below : dkv;
            if (share) head(share + at_dkv, 2 * C);
            else head(dqkv + at + C, 3 * C);
        }
    }
}

// --------------------------------------------------------------------------------------------------------------------
// Skip-Layer Attention: where the keys and values of a layer go
//
// Head h < skip_heads of layer l ≥ skip_distance reads layer l - skip_distance. So the keys and values of such a head
// in layer l have up to two readers: layer l + skip_distance, if there is one, and layer l itself, if it does not skip.

// dk, dv of layer l in dqkv (rows, 3C) = the sum of its readers' shares (rows, 2C): dkv, of its own heads that do not
// skip, and dkv_above, of the heads that layer l + skip_distance read here (null: there is no such layer). Heads that
// nobody reads stay untouched.
template <class X>
static void skip_backward(X* dqkv, const float* dkv, const float* dkv_above, const Config& c, int l, size_t rows) {
    size_t C = c.C, HS = c.head_size();
    Timed timed(ATTENTION, 0, 2.0 * rows * C * (sizeof(float) + sizeof(X)));
#pragma omp parallel for schedule(static)
    for (size_t r = 0; r < rows; r++) {
        for (int h = 0; h < c.NH; h++) {
            bool own = !skips(c, l, h), above = dkv_above && h < c.skip_heads;
            for (size_t at : {h * HS, C + h * HS}) {  // keys, values
                X* out = dqkv + r * 3 * C + C + at;
                if (own && above)
                    for (size_t i = 0; i < HS; i++) out[i] = dkv[r * 2 * C + at + i] + dkv_above[r * 2 * C + at + i];
                else if (own || above)
                    std::copy_n((own ? dkv : dkv_above) + r * 2 * C + at, HS, out);
            }
        }
    }
}

// --------------------------------------------------------------------------------------------------------------------
// Depth-Attention: each value is mixed with the values of earlier layers, at one token at a time
//
// Layer l with sources S_l, per head; x_j is the mixed value ṽ_j of source j < l, and x_l = v_l:
//     s_j = q_l·k_j/√HS,   a = softmax over j in S_l and l of s,   ṽ_l = Σ_j a_j x_j
// ṽ_l takes the place of v_l: everything after, in this layer and in later ones, reads ṽ_l only.
//
// Backward, given dṽ_l complete. ṽ is a softmax-weighted mean, so as in attention
//     da_j = dṽ_l·x_j        ds_j = a_j (da_j - δ)        δ = Σ_j a_j da_j = dṽ_l·ṽ_l
//     dq_l += Σ_j ds_j k_j/√HS       dk_j += ds_j q_l/√HS       dx_j += a_j dṽ_l     (dx_l is dv_l)
// Since Σ_j a_j (da_j - δ) = 0, the layer's own ds_l = -Σ of the others': v_l, overwritten, is not needed.
// What flows to a source j comes from every later layer m with j in S_m. Instead of scattering it there, layer j
// gathers it when its turn comes, from what layer m left behind: a, ds, q_m and dṽ_m, which lies where ṽ_m was; as
// backward goes down, nobody reads ṽ_m any more. So depth needs no memory beyond a, ds and one layer's dkv.

// One head of one token: v (HS) becomes ṽ. The n-th source's key and value are k_of(n) and v_of(n), n < S. a (S + 1) at
// distance lda, the layer itself last; mixed (HS) is scratch.
template <class X, class KeyOf, class ValueOf>
static inline void depth_mix(X* v, float* a, size_t lda, float* mixed, const X* q, const X* k, KeyOf k_of, ValueOf v_of,
                             size_t S, size_t HS) {
    float scale = 1.0f / sqrtf(HS), max = a[S * lda] = scale * dot(q, k, HS), sum = 0;
    for (size_t n = 0; n < S; n++) {
        a[n * lda] = scale * dot(q, k_of(n), HS);
        max = std::max(max, a[n * lda]);
    }
    for (size_t n = 0; n <= S; n++) sum += a[n * lda] = exp_approx(a[n * lda] - max);
    for (size_t n = 0; n <= S; n++) a[n * lda] /= sum;
    for (size_t i = 0; i < HS; i++) mixed[i] = a[S * lda] * v[i];
    for (size_t n = 0; n < S; n++) {
        const X* v_n = v_of(n);
        const float a_n = a[n * lda];
        for (size_t i = 0; i < HS; i++) mixed[i] += a_n * v_n[i];
    }
    std::copy_n(mixed, HS, v);
}

// All tokens of layer l: qkv[j] (rows, 3C) of each layer j, a (rows, S + 1, NH)
template <class X>
static void depth_forward(Workspace& ws, float* a, X* const* qkv, const std::vector<int>& sources, const Config& c,
                          int l, size_t rows) {
    size_t C = c.C, NH = c.NH, HS = c.head_size(), S = sources.size();
    if (S == 0) return;
    Timed timed(DEPTH_MIXING, 4.0 * rows * C * (S + 1), (2.0 * S + 4) * rows * C * sizeof(X));
#pragma omp parallel for schedule(static)
    for (size_t r = 0; r < rows; r++) {
        for (size_t h = 0; h < NH; h++) {
            size_t at_q = r * 3 * C + h * HS, at_k = at_q + C, at_v = at_q + 2 * C;
            depth_mix(
                qkv[l] + at_v, a + r * (S + 1) * NH + h, NH, ws.mine(), qkv[l] + at_q, qkv[l] + at_k,
                [&](size_t n) { return qkv[sources[n]] + at_k; }, [&](size_t n) { return qkv[sources[n]] + at_v; }, S,
                HS);
        }
    }
}

// dqkv (rows, 3C) comes in with causal attention's dq, dkv (rows, 2C) with its dk and dṽ of layer l; dqkv goes out with
// dq, dk, dv complete. a[m] (rows, |S_m| + 1, NH) and ds[m] (rows, |S_m|, NH) of each layer m; ds[l] =, and dṽ_l in
// place of ṽ_l in qkv[l].
template <class X>
static void depth_backward(Workspace& ws, X* dqkv, float* dkv, float* const* ds, const float* const* a, X* const* qkv,
                           const std::vector<int>& sources, const std::vector<Reader>& readers, const Config& c, int l,
                           size_t rows) {
    size_t C = c.C, NH = c.NH, HS = c.head_size(), S = sources.size(), R = readers.size();
    float scale = 1.0f / sqrtf(HS);
    Timed timed(DEPTH_MIXING, (8.0 * (S > 0 ? S + 1 : 0) + 4.0 * R) * rows * C,
                (4.0 * S + 2.0 * R + 6) * rows * C * sizeof(X));
#pragma omp parallel for schedule(static)
    for (size_t r = 0; r < rows; r++) {
        float* dq_sum = ws.mine();  // (HS)
        for (size_t h = 0; h < NH; h++) {
            size_t at_q = r * 3 * C + h * HS, at_k = at_q + C, at_v = at_q + 2 * C;
            float *dk = dkv + r * 2 * C + h * HS, *dv = dk + C, a_own = 1;
            // Gather: dk_l += Σ_m ds_m,l q_m/√HS, dṽ_l += Σ_m a_m,l dṽ_m
            for (const Reader& reader : readers) {
                float a_ml = a[reader.m][(r * (reader.sources + 1) + reader.n) * NH + h];
                float ds_ml = scale * ds[reader.m][(r * reader.sources + reader.n) * NH + h];
                const X *q_m = qkv[reader.m] + at_q, *dv_m = qkv[reader.m] + at_v;
                for (size_t i = 0; i < HS; i++) dk[i] += ds_ml * q_m[i];
                for (size_t i = 0; i < HS; i++) dv[i] += a_ml * dv_m[i];
            }
            // Through the mixing; dv is dṽ_l up to here
            if (S > 0) {
                const X *q = qkv[l] + at_q, *k = qkv[l] + at_k;
                X *v = qkv[l] + at_v, *dq = dqkv + at_q;
                const float* a_l = a[l] + r * (S + 1) * NH + h;
                float delta = dot(dv, v, HS), ds_own = 0;
                std::copy_n(dq, HS, dq_sum);
                for (size_t n = 0; n < S; n++) {
                    const X *k_j = qkv[sources[n]] + at_k, *v_j = qkv[sources[n]] + at_v;
                    float ds_j = a_l[n * NH] * (dot(dv, v_j, HS) - delta);
                    ds[l][(r * S + n) * NH + h] = ds_j;
                    ds_own -= ds_j;
                    for (size_t i = 0; i < HS; i++) dq_sum[i] += scale * ds_j * k_j[i];
                }
                for (size_t i = 0; i < HS; i++) dq[i] = dq_sum[i] + scale * ds_own * k[i];
                for (size_t i = 0; i < HS; i++) dk[i] += scale * ds_own * q[i];
                std::copy_n(dv, HS, v);
                a_own = a_l[S * NH];
            }
            for (size_t i = 0; i < HS; i++) dqkv[at_k + i] = dk[i];
            for (size_t i = 0; i < HS; i++) dqkv[at_v + i] = a_own * dv[i];
        }
    }
}

// --------------------------------------------------------------------------------------------------------------------
// Classifier: logits = x wteᵀ, loss = -log softmax(logits)[y]
//
// Some tokens at a time (classifier_rows) go all the way, to the gradients of x and wte, so that logits for all B·T
// never exist at once. With p = softmax(logits), loss = log Σ e^logit - logit_y, so dlogits = p - 1[y].
// Columns from V to Vp are never computed: they get no probability and their rows of wte no gradient.

// One token: returns its loss; with gradient_scale ≠ 0, logits (V) become gradient_scale · dlogits.
template <class X>
static float softmax_cross_entropy(X* logits, size_t V, int y, float gradient_scale) {
    float max = maximum(logits, V), sum = 0, logit_y = logits[y];
#pragma omp simd reduction(+ : sum)
    for (size_t i = 0; i < V; i++) sum += exp_approx(logits[i] - max);
    if (gradient_scale != 0) {
        float p_y = exp_approx(logit_y - max) / sum, scale = gradient_scale / sum;
        for (size_t i = 0; i < V; i++) logits[i] = scale * exp_approx(logits[i] - max);
        logits[y] = gradient_scale * (p_y - 1.0f);
    }
    return logf(sum) + max - logit_y;
}

// losses (rows); with gradient_scale ≠ 0 also dx = and dwte = or +=. Scratch: logits (classifier_rows, Vp), dx_sum
// (classifier_rows, C).
template <class X>
static void classifier(Workspace& ws, float* losses, X* dx, float* dwte, X* logits, float* dx_sum, const X* x,
                       const X* wte, const int* targets, size_t rows, size_t C, size_t V, size_t Vp,
                       float gradient_scale, bool accumulate) {
    Timed timed(CLASSIFIER, 0, 0);
    size_t at_once = classifier_rows(rows, Vp);
    for (size_t r = 0; r < rows; r += at_once) {
        size_t n = std::min(rows - r, at_once);
        matmul(ws, n, V, C, along_k(x + r * C, C), along_k(wte, C),
               [=](size_t m, size_t v, size_t count, const float* xw) { std::copy_n(xw, count, logits + m * Vp + v); });
#pragma omp parallel for schedule(static)
        for (size_t i = 0; i < n; i++)
            losses[r + i] = softmax_cross_entropy(logits + i * Vp, V, targets[r + i], gradient_scale);
        if (gradient_scale == 0) continue;
        for (size_t v = 0; v < V; v += vocabulary_slab)
            linear_backward_input(ws, dx + r * C, logits + v, wte + v * C, n, C, std::min(V - v, vocabulary_slab), Vp,
                                  dx_sum, v == 0, v + vocabulary_slab >= V);
        linear_backward_weight(ws, dwte, nullptr, logits, x + r * C, n, C, V, Vp, accumulate || r > 0);
    }
}

// --------------------------------------------------------------------------------------------------------------------
// AdamW

constexpr size_t UPDATE_RUN = 1 << 12;  // elements that one thread goes through at a time

// Σ g², over fixed runs, then over the runs in order; partial (runs) is scratch
static double sum_of_squares(double* partial, const float* g, size_t n) {
    Timed timed(ADAMW, 0, n * sizeof(float));
    size_t runs = ceil_div(n, UPDATE_RUN);
#pragma omp parallel for schedule(static)
    for (size_t run = 0; run < runs; run++) {
        double sum = 0;
#pragma omp simd reduction(+ : sum)
        for (size_t i = run * UPDATE_RUN; i < std::min(n, (run + 1) * UPDATE_RUN); i++) sum += (double)g[i] * g[i];
        partial[run] = sum;
    }
    double sum = 0;
    for (size_t run = 0; run < runs; run++) sum += partial[run];
    return sum;
}

// m = β1 m + (1-β1) g, v = β2 v + (1-β2) g²; both start at 0 and so fall short of the mean of the g, g² so far by the
// factor 1-β^step, which is divided out; w -= lr (m̂/(√v̂ + eps) + decay w)   (Loshchilov and Hutter, arXiv 1711.05101)
// `working` is the copy of w that layers use; with float it is w itself.
template <class X>
static void adamw_update(X* working, float* w, float* m, float* v, const float* gradient, size_t n, const AdamW& a,
                         float decay, float gradient_scale, int step) {
    Timed timed(ADAMW, 0, n * (7.0 * sizeof(float) + (sizeof(X) == sizeof(float) ? 0 : sizeof(X))));
    float m_correction = (float)(1.0 / (1.0 - pow(a.beta1, step)));
    float v_correction = (float)(1.0 / (1.0 - pow(a.beta2, step)));
#pragma omp parallel for schedule(static)
    for (size_t run = 0; run < n; run += UPDATE_RUN) {
        size_t end = std::min(n, run + UPDATE_RUN);
#pragma omp simd
        for (size_t i = run; i < end; i++) {
            float g = gradient[i] * gradient_scale;
            m[i] = a.beta1 * m[i] + (1.0f - a.beta1) * g;
            v[i] = a.beta2 * v[i] + (1.0f - a.beta2) * g * g;
            w[i] -= a.lr * (m[i] * m_correction / (sqrtf(v[i] * v_correction) + a.eps) + decay * w[i]);
        }
        if constexpr (!std::is_same_v<X, float>) std::copy(w + run, w + end, working + run);
    }
}

// --------------------------------------------------------------------------------------------------------------------
// The model

struct Model {
    Config config;
    Precision precision;
    Workload work;
    TensorTable tensors;
    Memory memory;
    std::vector<void*> blocks;  // all that was allocated

    float *parameters, *gradients, *moment1, *moment2;  // (parameter_count) each, in tensor_table's order
    int accumulated;                  // backward passes since the last update
    int *x, *y;                       // (B, T)
    float *ln_mean, *ln_rstd;         // (2L+1, B, T)    of the LayerNorm that reads the residual stream there
    float* lse;                       // (L, B, NH, T)   attention's log-sum-exp
    std::vector<float*> mix, dmix;    // depth: a, L × (B, T, |S_l|+1, NH), and its gradient ds, L × (B, T, |S_l|, NH)
    float* losses;                    // (B, T)
    double loss_sum;
    size_t loss_count;
    float *dkv, *skip_dkv;            // (B, T, 2C) shares of dk, dv; (skip_slots, B, T, 2C) those that wait for a layer
    float *ln_partial, *dx_sum;       // scratch of layernorm_backward and linear_backward_input
    double* norm_partial;             // scratch of sum_of_squares
    double norm;                      // of the gradients, in the last update
    // By layer, as depth_sources, depth_readers and live_columns say
    std::vector<std::vector<int>> sources;
    std::vector<std::vector<Reader>> readers;
    std::vector<std::vector<Columns>> live;
    size_t cache_length;              // positions filled
    Workspace ws;
};

// What is kept in the type that layers compute on. Training keeps every layer's activations; else layers take turns,
// but for qkv, which skip and depth read later.
template <class X>
struct ModelOf : Model {
    X* weights;                       // the working copy of the parameters; with float, these themselves
    X* residual;                      // (2L+1, B, T, C) the stream into each attention and MLP, and out of the last
    std::vector<X*> qkv;              // L × (B, T, 3C); depth: ṽ in place of v, and after backward dṽ
    X* atty;                          // (L, B, T, C)
    X* fch;                           // (L, B, T, 4C)   before GELU

    // Scratch, used within a layer. Gradients:
    X *ln, *fch_gelu, *logits;        // (B, T, C) a LayerNorm's output, (B, T, 4C) GELU's, (classifier_rows, Vp)
    X *dresidual, *dln, *datty;       // (B, T, C)
    X *dqkv, *dfch;                   // (B, T, 3C), (B, T, 4C)

    // Decoding
    std::vector<X*> cache;            // L × (sequences, 2, kept heads, maxT, HS): keys and (mixed) values
    X *new_x, *new_ln, *new_q, *new_atty, *new_fch;  // of the new tokens: (sequences · maxT, C); fch 4C

    size_t offset(int tensor, int l) const { return tensors[tensor].offset + l * tensors[tensor].layer_size(); }
    X* weight(int tensor, int l = 0) { return weights + offset(tensor, l); }
    float* gradient(int tensor, int l = 0) { return gradients + offset(tensor, l); }
    // Keys (part 1, as in qkv) or values (part 2) of head h in layer l, from position t of sequence b on. Skip may have
    // left out first heads.
    X* cached(int l, size_t b, size_t part, size_t h, size_t t) {
        size_t HS = config.head_size(), kept_heads = kv_channels(config, l) / HS, left_out = config.NH - kept_heads;
        return cache[l] + (((b * 2 + part - 1) * kept_heads + h - left_out) * config.maxT + t) * HS;
    }
};

// Calls f with the model as what it is.
template <class F>
static void with_type(Model* m, F f) {
    if (m->precision == BF16) f(*(ModelOf<bf16>*)m);
    else f(*(ModelOf<float>*)m);
}

constexpr size_t HUGE_PAGE = 1 << 21;
static size_t block_alignment(size_t bytes) { return bytes < HUGE_PAGE ? 64 : HUGE_PAGE; }
static size_t block_size(size_t bytes) { return round_up(bytes, block_alignment(bytes)); }

static void* allocate(size_t bytes, bool zero) {
    void* p = aligned_alloc(block_alignment(bytes), block_size(bytes));
#ifdef MADV_HUGEPAGE
    if (p && bytes >= HUGE_PAGE) madvise(p, block_size(bytes), MADV_HUGEPAGE);  // fewer misses of address translation
#endif
    if (!p) die("cannot allocate %zu MiB: use a smaller model, --batch or --sequence", bytes >> 20);
    if (!zero && !poison_memory) return p;
    constexpr size_t PIECE = 1 << 20;
#pragma omp parallel for schedule(static)  // each thread touches first what it will use
    for (size_t i = 0; i < bytes; i += PIECE) memset((char*)p + i, zero ? 0 : 0xff, std::min(PIECE, bytes - i));
    return p;
}

// Everything a model holds; with `dry` it is only counted.
template <class X>
static void lay_out(ModelOf<X>& m, bool dry) {
    const Config& c = m.config;
    bool train = m.work.train;
    size_t L = c.L, C = c.C, NH = c.NH, P = parameter_count(c), threads = thread_count();
    size_t BT = (size_t)m.work.B * m.work.T, kept_layers = train ? L : 1, streams = train ? 2 * L + 1 : 2;
    m.memory = {};
    auto take = [&](auto*& p, size_t n, size_t& account, bool zero = false) {
        p = nullptr;
        if (n == 0) return;
        account += block_size(n * sizeof *p);
        if (!dry) m.blocks.push_back(p = (std::remove_reference_t<decltype(p)>)allocate(n * sizeof *p, zero));
    };
    take(m.parameters, P, m.memory.parameters);
    if constexpr (std::is_same_v<X, float>) m.weights = m.parameters;
    else take(m.weights, P, m.memory.parameters);
    take(m.gradients, train ? P : 0, m.memory.gradients, true);
    take(m.moment1, train ? P : 0, m.memory.moments, true);
    take(m.moment2, train ? P : 0, m.memory.moments, true);

    size_t& activations = m.memory.activations;
    take(m.x, BT, activations);
    take(m.y, BT, activations);
    take(m.residual, streams * BT * C, activations);
    take(m.ln_mean, (train ? streams : 1) * BT, activations);
    take(m.ln_rstd, (train ? streams : 1) * BT, activations);
    m.qkv.resize(L), m.mix.resize(L), m.dmix.resize(L), m.cache.resize(L);
    for (size_t l = 0; l < L; l++) {
        m.sources.push_back(depth_sources(c, l));
        m.readers.push_back(depth_readers(c, l));
        m.live.push_back(live_columns(c, l));
        size_t sources = m.sources[l].size();
        if (l == 0 || train || c.attention != VANILLA) take(m.qkv[l], BT * 3 * C, activations);
        else m.qkv[l] = m.qkv[0];
        take(m.mix[l], sources ? BT * (sources + 1) * NH : 0, activations);
        take(m.dmix[l], train ? BT * sources * NH : 0, activations);
        take(m.cache[l], m.work.sequences * (size_t)c.maxT * 2 * kv_channels(c, l), m.memory.cache);
    }
    take(m.lse, kept_layers * BT * NH, activations);
    take(m.atty, kept_layers * BT * C, activations);
    take(m.fch, kept_layers * BT * 4 * C, activations);
    take(m.losses, BT, activations);

    size_t& scratch = m.memory.scratch;
    take(m.ln, BT * C, scratch);
    take(m.fch_gelu, BT * 4 * C, scratch);
    take(m.logits, classifier_rows(BT, c.Vp) * c.Vp, scratch);
    if (train) {
        take(m.dresidual, BT * C, scratch);
        take(m.dln, BT * C, scratch);
        take(m.datty, BT * C, scratch);
        take(m.dqkv, BT * 3 * C, scratch);
        take(m.dfch, BT * 4 * C, scratch);
        take(m.dkv, c.attention == VANILLA ? 0 : BT * 2 * C, scratch);
        take(m.skip_dkv, skip_slots(c) * BT * 2 * C, scratch);
        take(m.ln_partial, ceil_div(BT, LAYERNORM_RUN) * 2 * C, scratch);
        take(m.norm_partial, ceil_div(P, UPDATE_RUN), scratch);
        take(m.dx_sum, (skip_slots(c) ? BT : classifier_rows(BT, c.Vp)) * C, scratch);
    }
    size_t rows = m.work.sequences * (size_t)c.maxT, HS = c.head_size();
    take(m.new_x, rows * C, scratch);
    take(m.new_ln, rows * C, scratch);
    take(m.new_q, rows * C, scratch);
    take(m.new_atty, rows * C, scratch);
    take(m.new_fch, rows * 4 * C, scratch);
    // A whole A operand where it is small, else as many rows as 16 MB hold, but 512 at the least.
    size_t widest = std::max({4 * C, std::min(BT, token_slab), std::min<size_t>(c.V, vocabulary_slab)});
    m.ws.packed_size = std::max<size_t>(1 << 22, 512 * widest);
    size_t head = HeadScratch<X>(nullptr, m.work.T, HS, train).size, mixing = L + 1 + HS;
    size_t decoding = m.work.sequences ? HeadScratch<X>(nullptr, c.maxT, HS, false).size : 0;
    m.ws.local_size = std::max({matmul_local_size<X>(widest), head, decoding, mixing});
    take(m.ws.packed, m.ws.packed_size, scratch);
    take(m.ws.local, threads * m.ws.local_size, scratch);
}

template <class X>
static Model* create(const Config& c, Precision precision, const Workload& work, bool dry) {
    ModelOf<X>* m = new ModelOf<X>{};
    m->config = c;
    m->precision = precision;
    m->work = work;
    m->tensors = tensor_table(c);
    lay_out(*m, dry);
    return m;
}

static Model* model_create(const Config& c, Precision precision, const Workload& work) {
    return precision == BF16 ? create<bf16>(c, precision, work, false) : create<float>(c, precision, work, false);
}

static void model_free(Model* m) {
    for (void* block : m->blocks) free(block);
    with_type(m, [](auto& model) { delete &model; });
}

static Memory model_memory(const Config& c, Precision precision, const Workload& work) {
    Model* m = precision == BF16 ? create<bf16>(c, precision, work, true) : create<float>(c, precision, work, true);
    Memory memory = m->memory;
    model_free(m);
    return memory;
}

static float* quantity(const Model* m, Quantity q) {
    return q == PARAMETERS ? m->parameters : q == GRADIENTS ? m->gradients : q == MOMENT1 ? m->moment1 : m->moment2;
}
static void model_get(const Model* m, Quantity q, size_t begin, size_t n, float* out) {
    std::copy_n(quantity(m, q) + begin, n, out);
}
static void model_put(Model* m, Quantity q, size_t begin, size_t n, const float* in) {
    std::copy_n(in, n, quantity(m, q) + begin);
    if (q == PARAMETERS) with_type(m, [=](auto& model) { std::copy_n(in, n, model.weights + begin); });
}

static void model_set_inputs(Model* m, const int* x, const int* y) {
    std::copy_n(x, (size_t)m->work.B * m->work.T, m->x);
    std::copy_n(y, (size_t)m->work.B * m->work.T, m->y);
}

// A layer's lines stand once here and once, reversed, in backward. w(QKVW) is a weight of layer l, d(QKVW) its
// gradient; mean(i) and rstd(i) are those of the LayerNorm that reads residual(i).
template <class X>
static void forward(ModelOf<X>& m, bool train, float loss_scale) {
    const Config& c = m.config;
    Workspace& ws = m.ws;
    const size_t B = m.work.B, T = m.work.T, BT = B * T, C = c.C;
    const bool keeps_all = m.work.train;
    auto residual = [&](int i) { return m.residual + (keeps_all ? i : i % 2) * BT * C; };
    auto mean = [&](int i) { return m.ln_mean + (keeps_all ? i : 0) * BT; };
    auto rstd = [&](int i) { return m.ln_rstd + (keeps_all ? i : 0) * BT; };

    embedding_forward(residual(0), m.x, m.weight(WTE), m.weight(WPE), B, T, C);
    for (int l = 0; l < c.L; l++) {
        const int i = 2 * l, slot = keeps_all ? l : 0;
        auto w = [&](int tensor) { return m.weight(tensor, l); };
        X *x = residual(i), *x2 = residual(i + 1), *x3 = residual(i + 2);  // into attention, into the MLP, out of it
        X *qkv = m.qkv[l], *atty = m.atty + slot * BT * C, *fch = m.fch + slot * BT * 4 * C;
        const X* qkv_below = m.qkv[std::max(0, l - c.skip_distance)];
        float* lse = m.lse + slot * BT * c.NH;

        layernorm_forward(m.ln, mean(i), rstd(i), x, w(LN1W), w(LN1B), BT, C);
        for (auto [at, count] : m.live[l])
            linear_forward(ws, qkv + at, m.ln, w(QKVW) + at * C, w(QKVB) + at, BT, C, count, 3 * C);
        depth_forward(ws, m.mix[l], m.qkv.data(), m.sources[l], c, l, BT);
        attention_forward(ws, atty, lse, qkv, qkv_below, c, l, B, T);
        linear_residual_forward(ws, x2, x, atty, w(ATTPROJW), w(ATTPROJB), BT, C, C);
        layernorm_forward(m.ln, mean(i + 1), rstd(i + 1), x2, w(LN2W), w(LN2B), BT, C);
        linear_gelu_forward(ws, m.fch_gelu, fch, m.ln, w(FCW), w(FCB), BT, C, 4 * C);
        linear_residual_forward(ws, x3, x2, m.fch_gelu, w(FCPROJW), w(FCPROJB), BT, 4 * C, C);
    }
    const int last = 2 * c.L;
    layernorm_forward(m.ln, mean(last), rstd(last), residual(last), m.weight(LNFW), m.weight(LNFB), BT, C);
    // Each token's loss counts loss_scale/(B·T) in the loss that gradients are of.
    classifier(ws, m.losses, m.dln, m.gradients, m.logits, m.dx_sum, m.ln, m.weight(WTE), m.y, BT, C, c.V, c.Vp,
               train ? loss_scale / BT : 0, m.accumulated > 0);
    for (size_t bt = 0; bt < BT; bt++) m.loss_sum += m.losses[bt];
    m.loss_count += BT;
}

// dresidual is the gradient of the residual stream: each LayerNorm adds to it what flows back through its branch. dln
// came from the classifier. `add`: to the gradients of earlier micro-batches.
template <class X>
static void backward(ModelOf<X>& m) {
    const Config& c = m.config;
    Workspace& ws = m.ws;
    const size_t B = m.work.B, T = m.work.T, BT = B * T, C = c.C, slots = skip_slots(c), slot_size = BT * 2 * C;
    const bool add = m.accumulated > 0;
    X* dx = m.dresidual;
    auto layernorm = [&](int i, float* dw, float* db, const X* w, bool into_stream) {
        layernorm_backward(dx, dw, db, m.ln_partial, m.dln, m.residual + i * BT * C, w, m.ln_mean + i * BT,
                           m.ln_rstd + i * BT, BT, C, into_stream, add);
    };
    auto layernorm_again = [&](int i, const X* w, const X* b) {
        layernorm_recompute(m.ln, m.residual + i * BT * C, w, b, m.ln_mean + i * BT, m.ln_rstd + i * BT, BT, C);
    };

    layernorm(2 * c.L, m.gradient(LNFW), m.gradient(LNFB), m.weight(LNFW), false);
    for (int l = c.L - 1; l >= 0; l--) {
        const int i = 2 * l, below = l - c.skip_distance, above = l + c.skip_distance;
        auto w = [&](int tensor) { return m.weight(tensor, l); };
        auto d = [&](int tensor) { return m.gradient(tensor, l); };
        const X *qkv = m.qkv[l], *qkv_below = m.qkv[std::max(0, below)];
        const X *atty = m.atty + l * BT * C, *fch = m.fch + l * BT * 4 * C;
        const float* lse = m.lse + l * BT * c.NH;
        // Skip: where this layer leaves dk, dv for the one that it reads, and where the one that reads it left them.
        float* dkv_below = slots > 0 && below >= 0 ? m.skip_dkv + below % slots * slot_size : nullptr;
        float* dkv_above = slots > 0 && above < c.L ? m.skip_dkv + l % slots * slot_size : nullptr;

        linear_gelu_backward_input(ws, m.dfch, m.fch_gelu, fch, dx, w(FCPROJW), BT, 4 * C, C);
        linear_backward_weight(ws, d(FCPROJW), d(FCPROJB), dx, m.fch_gelu, BT, 4 * C, C, C, add);
        linear_backward_input(ws, m.dln, m.dfch, w(FCW), BT, C, 4 * C, 4 * C);
        layernorm_again(i + 1, w(LN2W), w(LN2B));
        linear_backward_weight(ws, d(FCW), d(FCB), m.dfch, m.ln, BT, C, 4 * C, 4 * C, add);
        layernorm(i + 1, d(LN2W), d(LN2B), w(LN2W), true);
        linear_backward_input(ws, m.datty, dx, w(ATTPROJW), BT, C, C, C);
        linear_backward_weight(ws, d(ATTPROJW), d(ATTPROJB), dx, atty, BT, C, C, C, add);
        attention_backward(ws, m.dqkv, m.dkv, dkv_below, m.datty, atty, lse, qkv, qkv_below, c, l, B, T);
        if (c.attention == SKIP) skip_backward(m.dqkv, m.dkv, dkv_above, c, l, BT);
        if (c.attention == DEPTH)
            depth_backward(ws, m.dqkv, m.dkv, m.dmix.data(), m.mix.data(), m.qkv.data(), m.sources[l], m.readers[l], c,
                           l, BT);
        layernorm_again(i, w(LN1W), w(LN1B));
        for (const Columns& some : m.live[l]) {
            const size_t at = some.begin, count = some.count;
            linear_backward_input(ws, m.dln, m.dqkv + at, w(QKVW) + at * C, BT, C, count, 3 * C, m.dx_sum,
                                  &some == &m.live[l].front(), &some == &m.live[l].back());
            linear_backward_weight(ws, d(QKVW) + at * C, d(QKVB) + at, m.dqkv + at, m.ln, BT, C, count, 3 * C, add);
        }
        layernorm(i, d(LN1W), d(LN1B), w(LN1W), true);
    }
    embedding_backward(m.gradient(WTE), m.gradient(WPE), dx, m.x, B, T, C, add);
    m.accumulated++;
}

static void model_forward(Model* m, bool train, float loss_scale) {
    with_type(m, [=](auto& model) { forward(model, train, loss_scale); });
}
static void model_backward(Model* m) {
    with_type(m, [](auto& model) { backward(model); });
}

static void model_update(Model* m, const AdamW& a, float clip, int step) {
    m->norm = sqrt(sum_of_squares(m->norm_partial, m->gradients, parameter_count(m->config)));
    float scale = clip > 0 && m->norm > clip ? (float)(clip / m->norm) : 1.0f;
    with_type(m, [&](auto& model) {
        for (const Tensor& t : m->tensors)
            adamw_update(model.weights + t.offset, m->parameters + t.offset, m->moment1 + t.offset,
                         m->moment2 + t.offset, m->gradients + t.offset, t.size(), a,
                         t.decays ? a.weight_decay : 0.0f, scale, step);
    });
    m->accumulated = 0;
}

static double model_norm(Model* m) { return m->norm; }

static double model_loss(Model* m) {
    double mean = m->loss_sum / m->loss_count;
    m->loss_sum = 0;
    m->loss_count = 0;
    return mean;
}

static void model_token_losses(const Model* m, float* out) {
    std::copy_n(m->losses, (size_t)m->work.B * m->work.T, out);
}

// From the last LayerNorm's output, which stays in ln until backward.
static void model_logits(Model* m, float* out) {
    size_t C = m->config.C, V = m->config.V;
    with_type(m, [=](auto& model) {
        matmul(m->ws, (size_t)m->work.B * m->work.T, V, C, along_k(model.ln, C), along_k(model.weight(WTE), C),
               [=](size_t row, size_t v, size_t count, const float* xw) {
                   std::copy_n(xw, count, out + row * V + v);
               });
    });
}

// --------------------------------------------------------------------------------------------------------------------
// Decoding with a KV cache
//
// The same layers for new tokens only: their keys and (mixed) values join the cache, their queries read all of it. Each
// head's keys lie together, as do its values, for that is how they are read.
// Prompts go through matmul and attention's tiles; one token of a sequence through attention_head_decode, and of at
// most FEW_ROWS sequences through matmul_few_rows, which add up in another order: logits agree with model_forward's
// within rounding, not to the bit.

// Queries of the new tokens, ln (rows, C), to new_q; their keys and values to the cache
template <class X>
static void cached_qkv(ModelOf<X>& m, int l, const X* w, const X* bias, size_t n) {
    size_t rows = m.work.sequences * n, C = m.config.C, HS = m.config.head_size();
    for (auto [at, count] : m.live[l])
        matmul(m.ws, rows, count, C, along_k(m.new_ln, C), along_k(w + at * C, C),
               [&, at = at](size_t row, size_t i, size_t left, const float* xw) {
                   for (size_t run, column = at + i; left > 0; left -= run, column += run, xw += run) {  // head by head
                       size_t part = column / C, h = column % C / HS, d = column % HS;
                       X* out = part == 0 ? m.new_q + row * C + column
                                          : m.cached(l, row / n, part, h, m.cache_length + row % n) + d;
                       run = std::min(left, HS - d);
                       for (size_t j = 0; j < run; j++) out[j] = xw[j] + bias[column + j];
                   }
               });
}

template <class X>
static void cached_depth(ModelOf<X>& m, int l, size_t n) {
    const std::vector<int>& sources = m.sources[l];
    size_t rows = m.work.sequences * n, S = sources.size(), C = m.config.C, NH = m.config.NH, HS = m.config.head_size();
    if (S == 0) return;
    Timed timed(DEPTH_MIXING, 4.0 * rows * C * (S + 1), (2.0 * S + 4) * rows * C * sizeof(X));
#pragma omp parallel for schedule(static) if (rows > 1)
    for (size_t r = 0; r < rows; r++) {
        for (size_t h = 0; h < NH; h++) {
            size_t b = r / n, t = m.cache_length + r % n;
            float *a = m.ws.mine(), *mixed = a + S + 1;
            depth_mix<X>(
                m.cached(l, b, 2, h, t), a, 1, mixed, m.new_q + r * C + h * HS, m.cached(l, b, 1, h, t),
                [&](size_t i) { return m.cached(sources[i], b, 1, h, t); },
                [&](size_t i) { return m.cached(sources[i], b, 2, h, t); }, S, HS);
        }
    }
}

template <class X>
static void cached_attention(ModelOf<X>& m, int l, size_t n) {
    const Config& c = m.config;
    size_t B = m.work.sequences, C = c.C, NH = c.NH, HS = c.head_size(), before = m.cache_length, T = before + n;
    Timed timed(ATTENTION, 4.0 * B * n * (before + 0.5 * n) * C, 2.0 * B * T * C * sizeof(X));
#pragma omp parallel for collapse(2) schedule(dynamic)
    for (size_t b = 0; b < B; b++) {
        for (size_t h = 0; h < NH; h++) {
            int from = skips(c, l, h) ? l - c.skip_distance : l;
            const X* q = m.new_q + b * n * C + h * HS;
            Rows<const X> k = {m.cached(from, b, 1, h, 0), HS}, v = {m.cached(from, b, 2, h, 0), HS};
            X* o = m.new_atty + b * n * C + h * HS;
            if (n == 1) attention_head_decode(m.ws.mine(), o, q, k, v, T, HS);
            else attention_head_forward<X>(m.ws.mine(), {o, C}, nullptr, {q, C}, k, v, n, before, HS);
        }
    }
}

template <class X>
static void cached_forward(ModelOf<X>& m, const int* tokens, size_t n, float* logits) {
    const Config& c = m.config;
    Workspace& ws = m.ws;
    size_t B = m.work.sequences, rows = B * n, C = c.C;
    X *x = m.new_x, *ln = m.new_ln, *fch = m.new_fch;
    auto layernorm = [&](const X* w, const X* b, size_t count) {
        layernorm_forward<X>(ln, nullptr, nullptr, x, w, b, count, C);
    };

    for (size_t b = 0; b < B; b++)
        embedding_forward(x + b * n * C, tokens + b * n, m.weight(WTE), m.weight(WPE) + m.cache_length * C, 1, n, C);
    for (int l = 0; l < c.L; l++) {
        auto w = [&](int tensor) { return m.weight(tensor, l); };
        layernorm(w(LN1W), w(LN1B), rows);
        cached_qkv(m, l, w(QKVW), w(QKVB), n);
        cached_depth(m, l, n);
        cached_attention(m, l, n);
        linear_residual_forward(ws, x, x, m.new_atty, w(ATTPROJW), w(ATTPROJB), rows, C, C);
        layernorm(w(LN2W), w(LN2B), rows);
        linear_gelu_forward(ws, fch, fch, ln, w(FCW), w(FCB), rows, C, 4 * C);
        linear_residual_forward(ws, x, x, fch, w(FCPROJW), w(FCPROJB), rows, 4 * C, C);
    }
    m.cache_length += n;
    for (size_t b = 0; b < B && n > 1; b++) std::copy_n(x + (b * n + n - 1) * C, C, x + b * C);  // the last tokens'
    layernorm(m.weight(LNFW), m.weight(LNFB), B);
    matmul(ws, B, c.V, C, along_k(ln, C), along_k(m.weight(WTE), C),
           [&](size_t b, size_t v, size_t count, const float* xw) { std::copy_n(xw, count, logits + b * c.V + v); });
}

static void model_prompt(Model* m, const int* tokens, int n, float* logits) {
    with_type(m, [=](auto& model) { cached_forward(model, tokens, n, logits); });
}
static void model_decode(Model* m, const int* tokens, float* logits) { model_prompt(m, tokens, 1, logits); }
static void model_reset_cache(Model* m) { m->cache_length = 0; }

// --------------------------------------------------------------------------------------------------------------------
// The machine

// The numbers at the start of a file of the operating system; those that are not there keep their values.
static void read_numbers(const char* path, double& first, double& second) {
    FILE* file = fopen(path, "r");
    if (!file) return;
    if (fscanf(file, "%lf %lf", &first, &second) < 1) first = 0;  // "max": no limit
    fclose(file);
}

#if defined(__AMX_BF16__)
static const char* const instruction_set = "AVX-512 with AMX";
#elif defined(__AVX512BF16__)
static const char* const instruction_set = "AVX-512 with bf16";
#elif defined(__AVX512F__)
static const char* const instruction_set = "AVX-512";
#elif defined(__AVX2__)
static const char* const instruction_set = "AVX2";
#elif defined(__ARM_NEON)
static const char* const instruction_set = "NEON";
#else
static const char* const instruction_set = "128-bit vectors";
#endif

#ifdef __x86_64__
// Ends the program where the processor lacks what the binary was built for, or the system does not let it be used.
// Any other function may use such instructions, so this one goes before main and is itself built for any processor.
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
    constexpr int ARCH_REQ_XCOMP_PERM = 0x1023, XFEATURE_XTILEDATA = 18;  // tiles are large, so Linux wants to be asked
    unsigned registers[4];  // AMX for bf16 is bit 22 of the last; not all compilers have a name for it
    __cpuid_count(7, 0, registers[0], registers[1], registers[2], registers[3]);
    found = found && (registers[3] >> 22 & 1);
    if (found && syscall(SYS_arch_prctl, ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA) != 0) {
        fprintf(stderr, "error: this system does not let programs use AMX: run 'make clean' and "
                        "'make ARCH=\"-march=native -mno-amx-bf16\"'\n");
        exit(1);
    }
#endif
    if (found) return;
    fprintf(stderr, "error: this binary was built for %s, which this processor lacks: "
                    "run 'make clean' and 'make' here\n", instruction_set);
    exit(1);
}
#endif

static void device_init([[maybe_unused]] char** argv, bool) {
#ifdef _OPENMP
    // OpenMP's threads spin for milliseconds wherever they wait for each other. On cores that other programs use too,
    // this makes small steps several times slower, and a tenth of a millisecond is as good elsewhere. GNU's OpenMP
    // takes the number of spins, others sleep at once. It is read as OpenMP is loaded, hence the second start.
    if (!getenv("OMP_WAIT_POLICY")) {
        setenv("OMP_WAIT_POLICY", "passive", 1);
        setenv("GOMP_SPINCOUNT", "1000", 0);
        std::error_code error;
        std::filesystem::path self = std::filesystem::read_symlink("/proc/self/exe", error);
        execv(self.c_str(), argv);
    }
    if (!getenv("OMP_NUM_THREADS")) {  // what the affinity mask and the container's quota allow
        double quota = 0, period = 100000, unused;
        read_numbers("/sys/fs/cgroup/cpu.max", quota, period);
        if (quota <= 0) {  // control groups of version 1
            read_numbers("/sys/fs/cgroup/cpu/cpu.cfs_quota_us", quota, unused);
            read_numbers("/sys/fs/cgroup/cpu/cpu.cfs_period_us", period, unused);
        }
        int allowed = quota > 0 ? std::max(1, (int)ceil(quota / period)) : omp_get_num_procs();
        omp_set_num_threads(std::min(allowed, omp_get_num_procs()));
    }
#endif
}

static std::string device_name() {
    return std::to_string(thread_count()) + (thread_count() == 1 ? " thread, " : " threads, ") + instruction_set;
}

static Precision device_precision() { return FP32; }
static const char* device_help() { return "OMP_NUM_THREADS sets the number of threads."; }

// The number after a word at the start of a line of a file, or `otherwise`.
static double number_after(const char* path, const char* word, double otherwise) {
    FILE* file = fopen(path, "r");
    if (!file) return otherwise;
    char line[256];
    while (fgets(line, sizeof line, file))
        if (strncmp(line, word, strlen(word)) == 0) otherwise = atof(line + strlen(word));
    fclose(file);
    return otherwise;
}

// What the system can give without swapping, or what is left of the container's limit where that is less. File caches
// count as free.
static size_t device_free_memory() {
    double free_bytes = 1024 * number_after("/proc/meminfo", "MemAvailable:", 1e15);
    const struct { const char *limit, *used, *stat; } groups[] = {
        {"/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory.current", "/sys/fs/cgroup/memory.stat"},
        {"/sys/fs/cgroup/memory/memory.limit_in_bytes", "/sys/fs/cgroup/memory/memory.usage_in_bytes",
         "/sys/fs/cgroup/memory/memory.stat"}};
    for (const auto& group : groups) {
        double limit = 0, used = 0, unused;
        read_numbers(group.limit, limit, unused);
        read_numbers(group.used, used, unused);
        double caches = number_after(group.stat, "inactive_file ", 0) + number_after(group.stat, "active_file ", 0);
        if (limit > 0) free_bytes = std::min(free_bytes, limit - used + caches);
    }
    return (size_t)std::max(0.0, free_bytes);
}

static bool device_is_host() { return true; }

// The most memory that the process has held since the last call, in MiB; 0 where the system does not say.
static double device_most_memory() {
    double kilobytes = number_after("/proc/self/status", "VmHWM:", 0);
    if (FILE* reset = fopen("/proc/self/clear_refs", "w")) {
        fputs("5", reset);  // begins anew
        fclose(reset);
    }
    return kilobytes / 1024;
}

// The best rate of many rounds in 50 ms, in each of which every thread does so many operations.
template <class F>
static double best_rate(double operations, F round) {
    double best = 0;
    for (double begin = seconds(), start = begin; start - begin < 0.05; start = seconds()) {
        int threads = 0;
#pragma omp parallel reduction(+ : threads)  // as many as ran
        {
            round();
            threads++;
        }
        best = std::max(best, operations * threads / (seconds() - start));
    }
    return best;
}

// Independent chains of multiply-adds, all in registers, enough to hide their latency.
static double device_peak(Precision precision) {
    constexpr int CHAINS = ROWS * NV, STEPS = 1 << 16;
#ifdef __AMX_BF16__
    if (precision == BF16)
        return best_rate(4.0 * 2 * LANES * LANES * LANES * 2 * STEPS, [] {
            alignas(64) Pair ones[LANES * LANES];
            alignas(64) float c[LANES * LANES];
            std::fill_n(ones, LANES * LANES, Pair{1.0f, 1.0f});
            shape_tiles();
            asm volatile("" : : : "memory");
            _tile_zero(0);
            _tile_zero(1);
            _tile_zero(2);
            _tile_zero(3);
            _tile_loadd(4, ones, 64);
            _tile_loadd(6, ones, 64);
            for (int step = 0; step < STEPS; step++) {
                // A few instructions in between, as in any use: beside a busy neighbour on the core they take time.
                __builtin_prefetch(c);
                _tile_dpbf16ps(0, 4, 6);
                __builtin_prefetch(c);
                _tile_dpbf16ps(1, 4, 6);
                __builtin_prefetch(c);
                _tile_dpbf16ps(2, 4, 6);
                __builtin_prefetch(c);
                _tile_dpbf16ps(3, 4, 6);
            }
            _tile_stored(0, c, 64);
        });
#endif
    auto chains = [](auto link) {
        vec sum[CHAINS];
        for (vec& s : sum) {
            s = vec{} + 1.0f;
            asm volatile("" : "+m"(s));  // for all the compiler knows, it differs each time
        }
        for (int step = 0; step < STEPS; step++) {
#pragma GCC unroll 32
            for (vec& s : sum) s = link(s);
        }
        for (vec& s : sum) asm volatile("" : : "m"(s));  // so that the result counts as used
    };
    constexpr double operations = 2.0 * CHAINS * LANES * STEPS;
#ifdef __AVX512BF16__
    std::array<Pair, LANES> ones;
    ones.fill({1.0f, 1.0f});
    auto pairs = [&](vec s) {
        multiply_add(s, ones[0], ones.data());
        return s;
    };
    if (precision == BF16) return best_rate(2 * operations, [&] { chains(pairs); });
#endif
    (void)precision;  // elsewhere bf16 is computed in fp32
    return best_rate(operations, [&] { chains([](vec s) { return s * 0.999f + 0.001f; }); });
}
static size_t device_peak_memory(Precision) { return 0; }

// Reading 512 MiB as eight streams a thread with prefetch, which loads more than one stream would; or scaling them in
// place.
static size_t device_bandwidth_memory() { return 512 << 20; }
static double device_bandwidth(bool writing) {
    const size_t N = device_bandwidth_memory() / sizeof(float), STREAMS = 8, AHEAD = 128;
    float* a = (float*)allocate(N * sizeof(float), true);
    size_t share = N / (size_t)thread_count(), length = share / STREAMS / LANES * LANES;
    double best = 0;
    for (int round = 0; round < 5; round++) {
        double start = seconds();
        if (writing) {
#pragma omp parallel for schedule(static)
            for (size_t i = 0; i < N; i += LANES) store(a + i, load(a + i) * 1.0001f);
        } else {
#pragma omp parallel for schedule(static)
            for (size_t part = 0; part < N / share; part++) {
                const float* p = a + share * part;
                vec sums[STREAMS] = {};
                for (size_t i = 0; i < length; i += LANES) {
#pragma GCC unroll 8
                    for (size_t s = 0; s < STREAMS; s++) {
                        __builtin_prefetch(p + s * length + i + AHEAD);
                        sums[s] += load(p + s * length + i);
                    }
                }
                for (vec& s : sums) asm volatile("" : : "m"(s));
            }
        }
        best = std::max(best, (writing ? 2.0 : 1.0) * N * sizeof(float) / (seconds() - start));
    }
    free(a);
    return best;
}
#endif  // GPT2_CUDA
// ====================================================================================================================
// 4 · The program
//
// All that it takes to train a model that is not the model. It is written once, against the interface of section 2, so
// it neither knows nor cares what computes. In the order in which a training run needs it: options say what to do,
// files hold it, a tokenizer turns it into text, a loader feeds it, checkpoints keep it, a schedule steers it.

static_assert(std::endian::native == std::endian::little, "files are little endian, and read as they are");

// --------------------------------------------------------------------------------------------------------------------
// Text for people

// A string by printf's rules.
__attribute__((format(printf, 1, 2))) static std::string format(const char* form, ...) {
    va_list args, again;
    va_start(args, form);
    va_copy(again, args);
    std::string text(vsnprintf(nullptr, 0, form, args), '\0');
    vsnprintf(text.data(), text.size() + 1, form, again);
    va_end(again);
    va_end(args);
    return text;
}

static std::string commas(size_t n) {  // 1,234,567
    return n < 1000 ? format("%zu", n) : commas(n / 1000) + format(",%03zu", n % 1000);
}

static std::string mebibytes(size_t bytes) {
    double mib = (double)bytes / (1 << 20);
    return mib < 4096 ? format("%.*f MiB", mib < 10 ? 2 : 1, mib) : format("%.1f GiB", mib / 1024);
}

static std::string duration(double s) {
    if (s < 100) return format("%.0f s", s);
    if (s < 6000) return format("%.0f min %02d s", floor(s / 60), (int)fmod(s, 60));
    return format("%.0f h %02d min", floor(s / 3600), (int)fmod(s / 60, 60));
}

static std::string plural(size_t n, const char* noun) { return commas(n) + " " + noun + (n == 1 ? "" : "s"); }

// How many insertions, deletions and replacements of a letter make a out of b (Levenshtein), row by row of a.
static size_t edit_distance(const std::string& a, const std::string& b) {
    std::vector<size_t> row(b.size() + 1);
    for (size_t j = 0; j <= b.size(); j++) row[j] = j;
    for (size_t i = 1; i <= a.size(); i++) {
        size_t diagonal = row[0];
        row[0] = i;
        for (size_t j = 1; j <= b.size(); j++) {
            size_t replaced = diagonal + (a[i - 1] != b[j - 1]);
            diagonal = row[j];
            row[j] = std::min({row[j] + 1, row[j - 1] + 1, replaced});
        }
    }
    return row.back();
}

// The name that a misspelled word was meant to be, or `otherwise` where none is near.
static std::string did_you_mean(const std::string& word, const std::vector<std::string>& names, const char* prefix,
                                const std::string& otherwise) {
    const std::string& nearest = *std::min_element(names.begin(), names.end(), [&](const auto& a, const auto& b) {
        return edit_distance(word, a) < edit_distance(word, b);
    });
    return 2 * edit_distance(word, nearest) <= word.size() ? "did you mean " + (prefix + nearest) + "?" : otherwise;
}

// --------------------------------------------------------------------------------------------------------------------
// Options
//
// Each option is one row of a table, and everything else about it is read from there: how its value is parsed and which
// values it may have, what --help says, what is echoed at the start, and what a checkpoint remembers.

enum Schedule { COSINE, LINEAR, CONSTANT, WSD };

// A number below its option's range stands for "not set": a default that depends on the model or the data replaces it.
struct Options {
    std::string model, tokenizer;
    int layers = 0, heads = 0, channels = 0, context = 0, vocab = 0;
    int attention = VANILLA, skip_distance = 0, skip_heads = -1, depth_stride = 0, depth_window = -1;
    int precision = device_precision(), seed = 1;

    std::string train, val, out;
    bool resume = false, overwrite = false, keep = false, profile = false, recompute = false;
    int batch = 4, sequence = 0, total_batch = 0, steps = 0;
    double lr = 6e-4, min_lr = -1, weight_decay = 0.1, beta1 = 0.9, beta2 = 0.95, clip = 1;
    int warmup = -1, schedule = COSINE;
    int val_every = 100, val_batches = -1, sample_every = 0, save_every = 100;

    std::string prompt, prompt_tokens;
    int tokens = 200, top_k = 0;
    double temperature = 0.8, top_p = 0.95;
};

enum CommandBit { TRAIN = 1, EVAL = 2, GENERATE = 4, DESCRIBE = 8, BENCH = 16, EVERY = 31 };

// What a checkpoint does with an option: nothing; remembers it, and --resume refuses another value; remembers it, and
// --resume may be given another.
enum Memorable { FORGOTTEN, FIXED, CHANGEABLE };

struct Option {
    const char* name;
    const char* form;  // of the value, as --help shows it: N and X are numbers, a|b|c is one of these, "" makes a flag
    std::variant<int*, double*, std::string*, bool*> value;
    double low, high;  // of a number
    int commands;
    Memorable memorable;
    const char* help;
    bool given = false;  // on the command line
};
using OptionTable = std::vector<Option>;

static OptionTable option_table(Options& o) {
    const double most = INT_MAX;
    return {
        {"train", "GLOB", &o.train, 0, 0, TRAIN, CHANGEABLE, "shards to train on, like 'data/train_*.bin' (quoted)"},
        {"val", "GLOB", &o.val, 0, 0, TRAIN | EVAL, CHANGEABLE, "shards to measure the loss on"},
        {"out", "DIR", &o.out, 0, 0, TRAIN, FORGOTTEN, "folder for model.bin, metrics.csv and tokenizer.bin"},
        {"resume", "", &o.resume, 0, 0, TRAIN, FORGOTTEN, "go on from DIR/model.bin as if never stopped"},
        {"overwrite", "", &o.overwrite, 0, 0, TRAIN, FORGOTTEN, "replace the run that DIR holds"},
        {"batch", "N", &o.batch, 1, 65535, TRAIN | EVAL | DESCRIBE | BENCH, FIXED, "sequences computed at a time"},
        {"sequence", "N", &o.sequence, 1, 1 << 20, TRAIN | EVAL | DESCRIBE | BENCH, FIXED,
         "tokens in a sequence [the context, at most 1024]"},
        {"total-batch", "N", &o.total_batch, 1, most, TRAIN, FIXED,
         "tokens in a step, a multiple of batch x sequence, which is the default"},
        {"recompute", "", &o.recompute, 0, 0, TRAIN | DESCRIBE | BENCH, FIXED,
         "needs less memory: what is cheap to compute is not kept for backward (on a CPU it never is)"},
        {"steps", "N", &o.steps, 1, most, TRAIN | BENCH, FIXED,
         "updates [one pass over the training tokens; bench: 5]"},
        {"lr", "X", &o.lr, 0, 10, TRAIN, FIXED, "highest learning rate"},
        {"min-lr", "X", &o.min_lr, 0, 10, TRAIN, FIXED, "learning rate of the last step [a tenth of --lr]"},
        {"warmup", "N", &o.warmup, 0, most, TRAIN, FIXED, "steps in which the rate rises to --lr [a twentieth of all]"},
        {"schedule", "cosine|linear|constant|wsd", &o.schedule, 0, 0, TRAIN, FIXED,
         "of the rate after that; wsd is constant, then falls in the last fifth"},
        {"weight-decay", "X", &o.weight_decay, 0, 10, TRAIN, FIXED, "AdamW's, on matrices and embeddings"},
        {"beta1", "X", &o.beta1, 0, 0.9999999, TRAIN, FIXED, "AdamW's"},
        {"beta2", "X", &o.beta2, 0, 0.9999999, TRAIN, FIXED, "AdamW's"},
        {"clip", "X", &o.clip, 0, 1e6, TRAIN, FIXED, "largest norm of the gradient; 0: any"},
        {"val-every", "N", &o.val_every, 0, most, TRAIN, CHANGEABLE, "steps between validations; 0: at the end only"},
        {"val-batches", "N", &o.val_batches, 0, most, TRAIN | EVAL, CHANGEABLE,
         "validation is over so many batches [20 in train, 0 in eval]; 0: over all"},
        {"sample-every", "N", &o.sample_every, 0, most, TRAIN, CHANGEABLE, "steps between samples; 0: at the end only"},
        {"save-every", "N", &o.save_every, 0, most, TRAIN, CHANGEABLE, "steps between checkpoints; 0: at the end only"},
        {"keep", "", &o.keep, 0, 0, TRAIN, CHANGEABLE, "keep each checkpoint, as DIR/model_STEP.bin too"},
        {"profile", "", &o.profile, 0, 0, BENCH, FORGOTTEN, "also where the time goes"},
        {"prompt", "TEXT", &o.prompt, 0, 0, GENERATE, FORGOTTEN,
         "text to go on from [an end-of-text token, or a newline where there is none]"},
        {"prompt-tokens", "LIST", &o.prompt_tokens, 0, 0, GENERATE, FORGOTTEN, "the same as numbers, like 1,2,3"},
        {"tokens", "N", &o.tokens, 0, most, GENERATE | BENCH, FORGOTTEN,
         "how many to add, unless end-of-text comes first [200; bench: 1/16 of the context; 0 there: only training]"},
        {"temperature", "X", &o.temperature, 0, 100, GENERATE, FORGOTTEN, "0: always the likeliest token"},
        {"top-k", "N", &o.top_k, 0, 65536, GENERATE, FORGOTTEN, "choose among the k likeliest tokens; 0: all"},
        {"top-p", "X", &o.top_p, 0, 1, GENERATE, FORGOTTEN, "... among the likeliest that together have probability p"},
        {"model", "NAME|FILE", &o.model, 0, 0, EVERY, FIXED,
         "weights, or a shape: gpt2, gpt2-medium, gpt2-large, gpt2-xl [gpt2]"},
        {"layers", "N", &o.layers, 1, 1024, EVERY, FIXED, "of a model without file, like the next three"},
        {"heads", "N", &o.heads, 1, 65536, EVERY, FIXED, "in each layer; they divide the channels"},
        {"channels", "N", &o.channels, 1, 65536, EVERY, FIXED, "width of the residual stream"},
        {"context", "N", &o.context, 1, 1 << 20, EVERY, FIXED, "longest sequence"},
        {"attention", "vanilla|skip|depth", &o.attention, 0, 0, EVERY, FIXED,
         "any model can run under any [vanilla, or its file's]"},
        {"skip-distance", "N", &o.skip_distance, 1, 65536, EVERY, FIXED,
         "a skipping head reads so many layers below [3/4 of the layers]"},
        {"skip-heads", "N", &o.skip_heads, 0, 65536, EVERY, FIXED, "how many heads skip [3/4 of them]"},
        {"depth-stride", "N", &o.depth_stride, 1, 65536, EVERY, FIXED,
         "values are mixed with those of every N-th layer below [1/2 of the layers]"},
        {"depth-window", "N", &o.depth_window, 0, 65536, EVERY, FIXED, "... and of the N layers just below [0]"},
        {"tokenizer", "FILE", &o.tokenizer, 0, 0, EVERY, FORGOTTEN,
         "sets the vocabulary [tokenizer.bin beside the shards or the model]"},
        {"vocab", "N", &o.vocab, 1, 65536, EVERY, FIXED, "vocabulary where there is no tokenizer [50257]"},
        {"precision", "fp32|bf16", &o.precision, 0, 0, EVERY, FIXED, "what values are computed in"},
        {"seed", "N", &o.seed, 0, most, EVERY, FIXED, "of initial weights, order of the data, and samples"},
    };
}

static Option* find_option(OptionTable& table, const std::string& name) {
    for (Option& o : table)
        if (name == o.name) return &o;
    return nullptr;
}

static bool is_given(const OptionTable& table, const std::string& name) {
    return std::any_of(table.begin(), table.end(), [&](const Option& o) { return name == o.name && o.given; });
}

static std::vector<std::string> split(const std::string& text, char separator) {
    std::vector<std::string> parts = {""};
    for (char c : text) {
        if (c == separator) parts.emplace_back();
        else parts.back() += c;
    }
    return parts;
}

static bool is_choice(const Option& o) { return strchr(o.form, '|') && std::holds_alternative<int*>(o.value); }

// The option's value as text; empty where it isn't set. A real number has the fewest digits that give it back exactly.
static std::string value_text(const Option& o) {
    if (auto text = std::get_if<std::string*>(&o.value)) return **text;
    if (auto flag = std::get_if<bool*>(&o.value)) return **flag ? "yes" : "";
    if (auto real = std::get_if<double*>(&o.value)) {
        char digits[32];
        return **real < o.low ? "" : std::string(digits, std::to_chars(digits, digits + sizeof digits, **real).ptr);
    }
    int n = *std::get<int*>(o.value);
    return is_choice(o) ? split(o.form, '|')[n] : n < o.low ? "" : std::to_string(n);
}

// Sets the option from text. Returns what is wrong with it, or "".
static std::string set_value(Option& o, const std::string& text) {
    if (auto out = std::get_if<std::string*>(&o.value)) return **out = text, "";
    if (auto flag = std::get_if<bool*>(&o.value)) return **flag = true, "";
    if (is_choice(o)) {
        std::vector<std::string> names = split(o.form, '|');
        auto found = std::find(names.begin(), names.end(), text);
        if (found == names.end())
            return format("must be one of %s", o.form);
        *std::get<int*>(o.value) = (int)(found - names.begin());
        return "";
    }
    // strtod takes more than numbers are made of (blanks, hexadecimals, "nan"), so those letters are excluded first.
    bool whole = std::holds_alternative<int*>(o.value);
    char* end;
    double x = strtod(text.c_str(), &end);
    if (text.empty() || text.find_first_not_of(whole ? "-0123456789" : "+-.0123456789eE") != text.npos || *end)
        return whole ? "must be a whole number" : "must be a number";
    if (!(o.low <= x && x <= o.high)) return format("must be from %.10g to %.10g", o.low, o.high);
    if (whole) *std::get<int*>(o.value) = (int)x;
    else *std::get<double*>(o.value) = x;
    return "";
}

struct Command {
    const char* name;
    CommandBit bit;
    const char* summary;
    const char* notes;  // for its --help
};

static const Command commands[] = {
    {"train", TRAIN, "trains: from random weights, from a model, or from where it stopped",
     "It keeps DIR/model.bin, always the newest complete checkpoint, and DIR/metrics.csv. Ctrl-C finishes the step\n"
     "and saves; a second one ends at once. With --resume, options that are not given come from the checkpoint, and\n"
     "those that only say how often to look, save or sample may change; --train and --val may name other places, if\n"
     "the shards there have as many tokens. All else must stay, --steps too, since the learning rate follows it."},
    {"eval", EVAL, "measures loss, perplexity and bits per byte of a model on shards",
     "It needs --model FILE and --val GLOB."},
    {"generate", GENERATE, "writes text: the prompt, and what the model adds",
     "It needs --model FILE. It stops after --tokens, or where the model ends the text. Without a tokenizer it writes\n"
     "numbers of tokens. Past the context, the latest half of it is read anew from position 0."},
    {"describe", DESCRIBE, "shows a model's tensors and what each attention costs",
     "Memory is for training with --batch and --sequence, and for generating one text."},
    {"bench", BENCH, "times training steps and decoding on random tokens",
     "All three attentions, or the one that is given. Figures are medians. The peak, which multiply-adds alone reach,\n"
     "and the rate of reading memory are measured in turns with what is timed; MiB is the most that the process held."},
};

static void print_options(FILE* out, const OptionTable& table, int command, bool common) {
    for (const Option& o : table) {
        if (!(o.commands & command) || (o.commands == EVERY) != common) continue;
        std::string left = format("  --%s %s", o.name, o.form), value = value_text(o);
        if (left.size() > 26) left += format("\n%28s", "");  // a long form has a line of its own
        bool shown = !value.empty() && !strchr(o.help, '[');
        fprintf(out, "%-28s%s%s\n", left.c_str(), o.help, shown ? format(" [%s]", value.c_str()).c_str() : "");
    }
}

static void print_help(FILE* out, const char* program, const OptionTable& table, const Command* command) {
    if (command) {
        fprintf(out, "%s %s [--option value]...\n%s.\n\n%s\n\nOptions [and their defaults]\n", program, command->name,
                command->summary, command->notes);
        print_options(out, table, command->bit, false);
        fprintf(out, "\n");
    } else {
        fprintf(out, "%s COMMAND [--option value]...\nGPT-2 with three attentions.\n\nCommands\n", program);
        for (const Command& c : commands) fprintf(out, "  %-26s%s\n", c.name, c.summary);
        fprintf(out, "  %-26s%s\n\n", "COMMAND --help", "lists its options");
    }
    fprintf(out, "Options of every command\n");
    print_options(out, table, EVERY, true);
    fprintf(out, "\n%s Exit status: 0, or 1 and one line on what is wrong.\n", device_help());
}

static bool is_help(const std::string& word) { return word == "--help" || word == "-h"; }

// Returns false where an option's place holds --help.
static bool parse_options(OptionTable& table, const Command& command, int argc, char** argv) {
    for (int i = 2; i < argc; i++) {
        std::string word = argv[i];
        if (is_help(word)) return false;
        if (word.compare(0, 2, "--") != 0)
            die("'%s': no option stands before it; a GLOB, and a TEXT with blanks, needs quotes", argv[i]);
        std::string name = split(word.substr(2), '=')[0];
        Option* o = find_option(table, name);
        if (!o || !(o->commands & command.bit)) {
            std::vector<std::string> names;
            for (const Option& other : table)
                if (other.commands & command.bit) names.push_back(other.name);
            if (o) die("--%s is not an option of %s; see %s %s --help", o->name, command.name, argv[0], command.name);
            std::string help = format("see %s %s --help", argv[0], command.name);
            die("there is no option --%s; %s", name.c_str(), did_you_mean(name, names, "--", help).c_str());
        }
        if (word.find('=') != word.npos) die("%s: a blank in place of '=', please: --%s %s", argv[i], o->name, o->form);
        if (o->given) die("--%s is given twice", o->name);
        o->given = true;
        if (!*o->form) {
            set_value(*o, "");
            continue;
        }
        // What begins with -- is the next option, unless it may be a text.
        const char* value = i + 1 < argc ? argv[++i] : nullptr;
        bool text = strcmp(o->form, "TEXT") == 0;
        if (!value || (strncmp(value, "--", 2) == 0 && (!text || find_option(table, value + 2))))
            die("--%s needs a value: --%s %s", o->name, o->name, o->form);
        std::string wrong = set_value(*o, value);
        if (!wrong.empty()) die("--%s %s: %s", o->name, value, wrong.c_str());
    }
    return true;
}

// --------------------------------------------------------------------------------------------------------------------
// Files
//
// A file that others may read is written under a temporary name, forced to the disk, and only then given its own, which
// is one indivisible act: whatever happens at whatever instant, under that name stands the old file or the new, whole.
// What is read is trusted in nothing: sizes are held against the file's before memory is asked for.

enum Magic { MODEL_MAGIC = 20240326, DUMP_MAGIC = 20240327, TOKENIZER_MAGIC = 20240328, TRAILER_MAGIC = 20240329,
             SHARD_MAGIC = 20240520, LLAMA_SHARD_MAGIC = 20240801 };
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

static uint32_t crc32(uint32_t crc, const void* data, size_t n) {  // goes on from crc; 0 begins
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
    size_t slash = path.rfind('/');
    return slash == path.npos ? "." : slash == 0 ? "/" : path.substr(0, slash);
}

static bool exists(const std::string& path) {
    struct stat s;
    return stat(path.c_str(), &s) == 0;
}

// Whether two paths lead to the same file or folder.
static bool same_file(const std::string& a, const std::string& b) {
    struct stat s, t;
    return stat(a.c_str(), &s) == 0 && stat(b.c_str(), &t) == 0 && s.st_dev == t.st_dev && s.st_ino == t.st_ino;
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
    f.fd = open(path.c_str(), O_RDONLY | O_CLOEXEC | O_NONBLOCK);  // a pipe must not make us wait
    if (f.fd < 0 || fstat(f.fd, &s) != 0) return strerror(errno);
    f.size = (size_t)s.st_size;
    return S_ISREG(s.st_mode) ? "" : S_ISDIR(s.st_mode) ? "is a folder, not a file" : "is not a regular file";
}

static InputFile open_file(const std::string& path) {
    InputFile f;
    std::string wrong = try_open(f, path);
    if (!wrong.empty()) die("%s: %s", path.c_str(), wrong.c_str());
    return f;
}

// Whether all n bytes could be read.
static bool read_at(const InputFile& f, size_t offset, void* out, size_t n) {
    while (n > 0) {
        ssize_t got = pread(f.fd, out, std::min<size_t>(n, 1 << 30), (off_t)offset);
        if (got < 0 && errno == EINTR) continue;
        if (got <= 0) return false;
        out = (char*)out + got, offset += (size_t)got, n -= (size_t)got;
    }
    return true;
}

static void must_read_at(const InputFile& f, size_t offset, void* out, size_t n) {
    if (!read_at(f, offset, out, n))
        die("%s: could not be read at byte %zu: it changed meanwhile, or the disk fails", f.path.c_str(), offset);
}

struct OutputFile {
    std::string path, temporary;
    int fd = -1;
    size_t size = 0;
    uint32_t crc = 0;
};

[[noreturn]] static void die_writing(const OutputFile& f) {
    int reason = errno;
    unlink(f.temporary.c_str());
    die("%s could not be written: %s%s", f.path.c_str(), strerror(reason),
        exists(f.path) ? "; what stood there before is still there" : "");
}

static OutputFile create_file(const std::string& path) {
    OutputFile f = {path, path + ".tmp"};
    unlink(f.temporary.c_str());  // it may be left from a run that was killed, and be anything
    f.fd = open(f.temporary.c_str(), O_WRONLY | O_CREAT | O_EXCL | O_CLOEXEC, 0666);
    if (f.fd < 0) die_writing(f);
    return f;
}

static void write_file(OutputFile& f, const void* data, size_t n) {
    f.crc = crc32(f.crc, data, n);
    f.size += n;
    while (n > 0) {
        ssize_t put = write(f.fd, data, std::min<size_t>(n, 1 << 30));
        if (put < 0 && errno == EINTR) continue;
        if (put < 0) die_writing(f);
        data = (const char*)data + put, n -= (size_t)put;
    }
}

static void commit_file(OutputFile& f) {
    if (fsync(f.fd) != 0 || close(f.fd) != 0 || rename(f.temporary.c_str(), f.path.c_str()) != 0) die_writing(f);
    int folder = open(folder_of(f.path).c_str(), O_RDONLY | O_DIRECTORY | O_CLOEXEC);
    if (folder >= 0) fsync(folder), close(folder);  // the new name, too, has to reach the disk
}

static void write_whole(const std::string& path, const std::string& content) {
    OutputFile f = create_file(path);
    write_file(f, content.data(), content.size());
    commit_file(f);
}

// The files a pattern stands for, sorted by name.
static std::vector<std::string> expand_glob(const char* option, const std::string& pattern) {
    if (exists(pattern)) return {pattern};  // a name may have brackets in it
    glob_t found = {};
    int status = glob(pattern.c_str(), GLOB_ERR, nullptr, &found);
    int reason = status == GLOB_ABORTED ? errno : ENOENT;  // a folder that cannot be read
    std::vector<std::string> paths(found.gl_pathv, found.gl_pathv + (status == 0 ? found.gl_pathc : 0));
    globfree(&found);
    if (paths.empty())
        die("--%s %s: %s", option, pattern.c_str(), reason == ENOENT ? "no such file" : strerror(reason));
    std::sort(paths.begin(), paths.end());
    return paths;
}

// --------------------------------------------------------------------------------------------------------------------
// Tokenizer
//
// Text becomes tokens in data_prep/prepare.py; here tokens become text again, for which a table of each token's bytes
// is enough. Only a prompt has to be encoded. That needs no more than the table where every token is one byte or one
// character; GPT-2's tokenizer would need its list of merges, which the file does not have.

struct Tokenizer {
    std::string path = "", content = "";   // the file, whole
    std::vector<std::string> tokens = {};  // the bytes of each; empty: there is no tokenizer
    int end_of_text = -1;                  // -1: it has none

    bool known() const { return !tokens.empty(); }
};

static Tokenizer read_tokenizer(const std::string& path) {
    constexpr size_t most = 1 << 26;  // a token takes at most 256 bytes, and others may add theirs
    const char* name = path.c_str();
    InputFile f = open_file(path);
    if (f.size < HEADER_BYTES || f.size > most) die("%s: %zu bytes are no tokenizer", name, f.size);
    Tokenizer t = {path, std::string(f.size, '\0')};
    must_read_at(f, 0, t.content.data(), f.size);
    close(f.fd);
    Header h;
    memcpy(h.data(), t.content.data(), HEADER_BYTES);
    int version = h[1], n = h[2], end_of_text = version == 1 ? 50256 : h[3];
    if (h[0] != TOKENIZER_MAGIC) die("%s: begins with %d, not with a tokenizer's %d", name, h[0], TOKENIZER_MAGIC);
    if (version != 1 && version != 2) die("%s: tokenizer version %d; 1 and 2 can be read", name, version);
    if (n < 1 || n > 65536) die("%s: a vocabulary of %d tokens; it must be from 1 to 65536", name, n);
    size_t at = HEADER_BYTES;
    for (int i = 0; i < n; i++) {
        size_t length = at < f.size ? (uint8_t)t.content[at] : 0;
        if (at + 1 + length > f.size) die("%s: truncated in token %d of %d", name, i, n);
        if (length == 0) die("%s: token %d is empty: damaged", name, i);
        t.tokens.push_back(t.content.substr(at + 1, length));
        at += 1 + length;
    }
    if (h[4] < 0 || f.size != at + (size_t)h[4])
        die("%s: has %zu bytes where its header and tokens ask for %zu", name, f.size, at + (size_t)h[4]);
    if (end_of_text >= 0 && end_of_text < n) t.end_of_text = end_of_text;
    return t;
}

// The tokenizer that was named, or else the one in the first of these folders that has one, or else none.
static Tokenizer find_tokenizer(const std::string& named, const std::vector<std::string>& folders) {
    if (!named.empty()) return read_tokenizer(named);
    for (const std::string& folder : folders)
        if (exists(folder + "/tokenizer.bin")) return read_tokenizer(folder + "/tokenizer.bin");
    return {};
}

// How many bytes the UTF-8 character takes that begins with this byte; 0: none begins so.
static size_t utf8_length(uint8_t first) {
    return first < 0x80 ? 1 : first < 0xc2 ? 0 : first < 0xe0 ? 2 : first < 0xf0 ? 3 : first < 0xf5 ? 4 : 0;
}

static std::vector<int> encode(const Tokenizer& t, const std::string& text) {
    if (!t.known()) die("a --prompt needs a tokenizer: name one with --tokenizer, or give --prompt-tokens");
    std::map<std::string, int> token_of;
    for (int i = 0; i < (int)t.tokens.size(); i++) {
        const std::string& token = t.tokens[i];
        if (i == t.end_of_text) continue;  // its letters in a prompt are text
        if (token.size() != 1 && token.size() != utf8_length((uint8_t)token[0]))
            die("%s: to encode a text takes this tokenizer's merges, which are not read yet; give --prompt-tokens",
                t.path.c_str());
        token_of.emplace(token, i);
    }
    std::vector<int> tokens;
    for (size_t at = 0; at < text.size();) {
        size_t length = 4;  // the longest match; a character has at most 4 bytes
        while (length > 0 && (at + length > text.size() || !token_of.count(text.substr(at, length)))) length--;
        if (length == 0) {
            size_t bytes = std::max<size_t>(1, utf8_length((uint8_t)text[at]));
            die("--prompt: '%s' (at byte %zu) is not in the vocabulary of %s", text.substr(at, bytes).c_str(), at,
                t.path.c_str());
        }
        tokens.push_back(token_of[text.substr(at, length)]);
        at += length;
    }
    return tokens;
}

// Writes a stream of bytes as valid UTF-8. A character's bytes are held back until it is complete. Each longest run of
// bytes that begins a character and does not complete it becomes one U+FFFD, and so does each byte that begins none.
struct Utf8Writer {
    FILE* out;
    char held[4] = {};
    int n = 0, missing = 0;
    uint8_t low = 0x80, high = 0xbf;  // the next byte must lie in here

    void invalid() {
        fputs("\xef\xbf\xbd", out);
        n = missing = 0;
    }
    void put(uint8_t byte) {
        if (missing > 0 && (byte < low || byte > high)) invalid();  // then this byte begins anew
        if (missing == 0) {
            missing = (int)utf8_length(byte) - 1;
            if (missing < 0) return invalid();
            // The second byte's range excludes codes that have a shorter form, surrogates, and what is past U+10FFFF.
            low = byte == 0xe0 ? 0xa0 : byte == 0xf0 ? 0x90 : 0x80;
            high = byte == 0xed ? 0x9f : byte == 0xf4 ? 0x8f : 0xbf;
        } else {
            missing--;
            low = 0x80, high = 0xbf;
        }
        held[n++] = (char)byte;
        if (missing == 0) {
            fwrite(held, 1, (size_t)n, out);
            n = 0;
        }
    }
    void finish() {
        if (missing > 0) invalid();
    }
};

// --------------------------------------------------------------------------------------------------------------------
// Data
//
// A shard is a file of uint16 tokens. A window is T+1 of them: T inputs, and as targets the same moved on by one.
// Windows of a shard follow each other with stride T, so each target is learned from once.
//
// Training takes them in a shuffled order that is drawn anew in each epoch: first the order of the shards, then in each
// shard where its windows begin, from 0 to T-1, and their order. It all follows from (seed, epoch, shard), so a place
// in this stream is two numbers, (epoch, windows taken), and resuming is exact. A second thread reads the next shard
// while the current one is used, so that a step never waits for the disk. Shards are read, not mapped into memory,
// where one that is truncated meanwhile would be a crash.

// Separate streams of random numbers for separate uses, so that none depends on how much another has drawn.
enum RandomUse { INITIAL_VALUES, SHARD_ORDER, WINDOW_ORDER, SAMPLES };
static Random random_stream(uint64_t seed, RandomUse use, uint64_t a = 0, uint64_t b = 0) {
    Random r = {seed};
    for (uint64_t word : {(uint64_t)use, a, b}) r.state = r.next() ^ word;
    return {r.next()};
}

template <typename T>
static void shuffle(std::vector<T>& v, Random& r) {  // Fisher and Yates
    for (size_t i = v.size(); i > 1; i--) std::swap(v[i - 1], v[r.below(i)]);
}

struct Shard {
    std::string path;
    size_t begin;      // byte offset of its first token
    size_t tokens;
    size_t first = 0;  // the file's token that it begins with
};

// How many windows there are from token `phase` on.
static size_t window_count(const Shard& s, int T, size_t phase) { return (s.tokens - 1 - phase) / (size_t)T; }

static size_t window_count(const std::vector<Shard>& shards, int T) {
    size_t n = 0;
    for (const Shard& s : shards) n += window_count(s, T, 0);
    return n;
}

static size_t token_count(const std::vector<Shard>& shards) {
    size_t n = 0;
    for (const Shard& s : shards) n += s.tokens;
    return n;
}

static std::vector<Shard> open_shards(const char* option, const std::vector<std::string>& paths, int T) {
    std::vector<Shard> shards;
    size_t headerless = 0, longest = 0;
    for (const std::string& path : paths) {
        InputFile f = open_file(path);
        const char* name = path.c_str();
        Header header = {};
        if (f.size == 0) die("%s: is empty", name);
        must_read_at(f, 0, header.data(), std::min(f.size, HEADER_BYTES));
        close(f.fd);
        for (auto [magic, kind] : {std::pair(MODEL_MAGIC, "a model"), {DUMP_MAGIC, "a debug state"},
                                   {TOKENIZER_MAGIC, "a tokenizer"}, {LLAMA_SHARD_MAGIC, "a shard of uint32 tokens"}})
            if (header[0] == magic) die("%s: is %s, not a shard of uint16 tokens", name, kind);
        Shard s = {path, 0, f.size / 2};
        if (header[0] == SHARD_MAGIC) {
            if (header[1] != 1) die("%s: shard version %d; 1 can be read", name, header[1]);
            s.begin = HEADER_BYTES;
            s.tokens = (uint32_t)header[2];
            if (f.size != HEADER_BYTES + 2 * s.tokens)
                die("%s: has %zu bytes where its header asks for %zu: truncated, or not a shard", name, f.size,
                    HEADER_BYTES + 2 * s.tokens);
        } else {
            const char *bytes = (const char*)header.data(), *end = bytes + std::min(f.size, HEADER_BYTES);
            if (std::all_of(bytes, end, [](char b) { return (b >= ' ' && b <= '~') || (b >= '\t' && b <= '\r'); }))
                die("%s: looks like text; data_prep/prepare.py makes shards of it", name);
            // 1,012 bytes of zeros are no text, but what every header here ends in.
            bool zeros = std::all_of(header.begin() + 3, header.end(), [](int x) { return x == 0; });
            if (f.size >= HEADER_BYTES && zeros)
                die("%s: begins with %d, not with a shard's %d", name, header[0], SHARD_MAGIC);
            if (f.size % 2 != 0) die("%s: has neither a shard's header nor whole uint16 tokens", name);
            headerless++;
        }
        longest = std::max(longest, s.tokens);
        if (s.tokens > (size_t)T) shards.push_back(s);
        else if (paths.size() > 1) printf("left out: %s, %zu tokens, less than a window's %d\n", name, s.tokens, T + 1);
    }
    if (shards.empty())
        die("--%s: the longest shard has %zu tokens, and --sequence %d takes %d", option, longest, T, T + 1);
    if (headerless > 0)
        printf("headerless: %zu of %zu files of --%s, read as plain uint16 tokens\n", headerless, paths.size(), option);
    return shards;
}

// Splits a window's T+1 tokens into inputs and targets. `at` is the shard's token that it begins with.
static void split_window(int* x, int* y, const uint16_t* tokens, int T, int V, const Shard& s, size_t at) {
    for (int t = 0; t <= T; t++) {
        if (tokens[t] >= V)
            die("%s: token %zu (at byte %zu) is %d, outside the vocabulary of %d: another tokenizer's, or damaged",
                s.path.c_str(), s.first + at + (size_t)t, s.begin + 2 * (at + (size_t)t), tokens[t], V);
        if (t < T) x[t] = tokens[t];
        if (t > 0) y[t - 1] = tokens[t];
    }
}

// Long shards are trained on in parts, so that two of them in memory are never much.
constexpr size_t LONGEST_PART = 1 << 26;  // tokens
static std::vector<Shard> split_shards(const std::vector<Shard>& shards) {
    std::vector<Shard> parts;
    for (const Shard& s : shards) {
        size_t n = ceil_div(s.tokens, LONGEST_PART);
        for (size_t i = 0; i < n; i++) {
            size_t first = s.tokens / n * i, last = i + 1 < n ? s.tokens / n * (i + 1) : s.tokens;
            parts.push_back({s.path, s.begin + 2 * first, last - first, first});
        }
    }
    return parts;
}

// A shard in memory, with its windows in the order in which an epoch takes them.
struct LoadedShard {
    std::vector<uint16_t> tokens;
    std::vector<uint32_t> order;
    size_t phase = 0;
    std::string error;
};

// Where the windows of the shard begin in this epoch: the first number of the stream that then shuffles them.
static size_t window_phase(const Shard& s, size_t T, Random& r) { return r.below(std::min(T, s.tokens - T)); }

static LoadedShard load_shard(Shard s, size_t index, int T, uint64_t seed, uint64_t epoch) {
    LoadedShard loaded;
    InputFile f;
    loaded.error = try_open(f, s.path);
    if (loaded.error.empty() && f.size < s.begin + 2 * s.tokens) loaded.error = "was truncated since the start";
    if (loaded.error.empty()) {
        loaded.tokens.resize(s.tokens);
        if (!read_at(f, s.begin, loaded.tokens.data(), 2 * s.tokens)) loaded.error = "could not be read to its end";
        Random r = random_stream(seed, WINDOW_ORDER, epoch, index);
        loaded.phase = window_phase(s, T, r);
        loaded.order.resize(window_count(s, T, loaded.phase));
        for (size_t i = 0; i < loaded.order.size(); i++) loaded.order[i] = (uint32_t)i;
        shuffle(loaded.order, r);
    }
    if (f.fd >= 0) close(f.fd);
    if (!loaded.error.empty()) loaded.error = s.path + ": " + loaded.error;
    return loaded;
}

struct Loader {
    std::vector<Shard> shards;
    int T, V;
    uint64_t seed;
    uint64_t epoch, position;      // windows taken in this epoch
    std::vector<size_t> order;     // of the shards, in this epoch
    size_t rank, taken;            // the current shard is order[rank]; windows taken of it
    LoadedShard current;
    std::future<LoadedShard> next;
};

static std::vector<size_t> shard_order(const Loader& l, uint64_t epoch) {
    std::vector<size_t> order(l.shards.size());
    for (size_t i = 0; i < order.size(); i++) order[i] = i;
    Random r = random_stream(l.seed, SHARD_ORDER, epoch);
    shuffle(order, r);
    return order;
}

static void read_ahead(Loader& l) {
    bool last = l.rank + 1 == l.order.size();
    uint64_t epoch = l.epoch + last;
    size_t index = last ? shard_order(l, epoch)[0] : l.order[l.rank + 1];
    l.next = std::async(std::launch::async, load_shard, l.shards[index], index, l.T, l.seed, epoch);
}

// Begins where `position` windows of the epoch are taken.
static void loader_start(Loader& l, uint64_t epoch, uint64_t position) {
    l.epoch = epoch, l.position = position;
    l.order = shard_order(l, epoch);
    l.taken = position;
    for (l.rank = 0; l.rank < l.order.size(); l.rank++) {
        size_t index = l.order[l.rank];
        Random r = random_stream(l.seed, WINDOW_ORDER, epoch, index);
        size_t windows = window_count(l.shards[index], l.T, window_phase(l.shards[index], l.T, r));
        if (l.taken < windows) break;
        l.taken -= windows;
    }
    if (l.rank == l.order.size()) die("the checkpoint's position in the data lies past its end: it is of other shards");
    l.current = load_shard(l.shards[l.order[l.rank]], l.order[l.rank], l.T, l.seed, epoch);
    if (!l.current.error.empty()) die("%s", l.current.error.c_str());
    read_ahead(l);
}

// Takes the next B windows: x, y (B, T).
static void loader_batch(Loader& l, int* x, int* y, int B) {
    for (int b = 0; b < B; b++) {
        size_t at = l.current.phase + (size_t)l.current.order[l.taken] * (size_t)l.T, row = (size_t)b * (size_t)l.T;
        split_window(x + row, y + row, &l.current.tokens[at], l.T, l.V, l.shards[l.order[l.rank]], at);
        l.position++;
        if (++l.taken < l.current.order.size()) continue;
        if (++l.rank == l.order.size()) {
            l.epoch++;
            l.position = l.rank = 0;
            l.order = shard_order(l, l.epoch);
        }
        l.taken = 0;
        l.current = l.next.get();
        if (!l.current.error.empty()) die("%s", l.current.error.c_str());
        read_ahead(l);
    }
}

// What two shards in memory take at most.
static size_t loader_bytes(const std::vector<Shard>& shards, int T) {
    size_t most = 0;
    for (const Shard& s : shards) most = std::max(most, 2 * s.tokens + 4 * window_count(s, T, 0));
    return 2 * most;
}

// Validation takes all windows in order, from token 0 of each shard.
struct WindowReader {
    const std::vector<Shard>& shards;
    int T, V;
    size_t shard = 0, window = 0;
    InputFile file = {};
    std::vector<uint16_t> tokens = {};
};

static void read_window(WindowReader& r, int* x, int* y) {  // the caller keeps count of how many there are
    if (r.window == window_count(r.shards[r.shard], r.T, 0)) r.shard++, r.window = 0;
    const Shard& s = r.shards[r.shard];
    if (r.file.path != s.path) {
        if (r.file.fd >= 0) close(r.file.fd);
        r.file = open_file(s.path);
    }
    size_t at = r.window++ * (size_t)r.T;
    r.tokens.resize((size_t)r.T + 1);
    must_read_at(r.file, s.begin + 2 * at, r.tokens.data(), 2 * r.tokens.size());
    split_window(x, y, r.tokens.data(), r.T, r.V, s, at);
}

// --------------------------------------------------------------------------------------------------------------------
// Models and checkpoints
//
//     header    256 int32: magic, version, maxT, V, L, NH, C, Vp, attention, n_l, n_h, stride, window, 0 ...; [255]
//               is 1 where a trailer ends the file. Versions 3 (fp32) and 5 (bf16) are llm.c's; 1003 and 1005 are the
//               same with skip or depth, so that llm.c refuses them and doesn't run them as vanilla
//     tensors   in the order of the table
//     state     checkpoints only: uint64 n; n bytes of "name\0value\0" pairs; AdamW's moments m, then v, fp32
//     trailer   uint32 magic, CRC-32 of header and tensors, CRC-32 of the state; uint64 length of the whole file
//
// Weights and state are one file, so they never disagree. Values pass through a buffer of a million, so a model is
// never in memory twice.

static size_t chunk_values = 1 << 20;  // that are copied at a time (the tests make it small)
constexpr size_t TRAILER_BYTES = 20;

static std::string config_text(const Config& c) {
    return format("%s, %s, %d channels, context %d, vocabulary %d (padded %d)", plural(c.L, "layer").c_str(),
                  plural(c.NH, "head").c_str(), c.C, c.maxT, c.V, c.Vp);
}

static std::string attention_text(const Config& c) {
    auto layers = [](int a, int b) { return a == b ? format("layer %d", a) : format("layers %d to %d", a, b); };
    if (c.attention == SKIP && (c.skip_distance >= c.L || c.skip_heads == 0))
        return format("skip %d/%d: no head skips, so this is vanilla", c.skip_distance, c.skip_heads);
    if (c.attention == SKIP)
        return format("skip %d/%d: %d of %d heads in %s read the keys and values of %s", c.skip_distance, c.skip_heads,
                      c.skip_heads, c.NH, layers(c.skip_distance, c.L - 1).c_str(),
                      layers(0, c.L - 1 - c.skip_distance).c_str());
    if (c.attention == DEPTH && c.L == 1)
        return format("depth %d/%d: one layer has none below it, so this is vanilla", c.depth_stride, c.depth_window);
    if (c.attention == DEPTH) {
        std::string sources, window = c.depth_window > 0 ? format(", and the %d just below it", c.depth_window) : "";
        for (int j = 0; j < c.L - 1; j += c.depth_stride) sources += format(j > 0 ? ", %d" : "%d", j);
        return format("depth %d/%d: a layer's values are mixed with those of %s%s%s", c.depth_stride, c.depth_window,
                      c.depth_stride == 1 ? "all layers below it" : "the layers below it among ",
                      c.depth_stride == 1 ? "" : sources.c_str(), c.depth_stride == 1 ? "" : window.c_str());
    }
    return "vanilla";
}

// What is impossible about a model's shape, or "".
static std::string config_error(const Config& c) {
    struct { const char* name; int value, low, high; bool matters; } ranges[] = {
        {"context", c.maxT, 1, 1 << 20, true},
        {"vocabulary", c.V, 1, 65536, true},
        {"layers", c.L, 1, 1024, true},
        {"channels", c.C, 1, 65536, true},
        {"heads", c.NH, 1, c.C, true},
        {"attention", c.attention, VANILLA, DEPTH, true},
        {"skip distance", c.skip_distance, 1, 65536, c.attention == SKIP},
        {"skip heads", c.skip_heads, 0, c.NH, c.attention == SKIP},
        {"depth stride", c.depth_stride, 1, 65536, c.attention == DEPTH},
        {"depth window", c.depth_window, 0, 65536, c.attention == DEPTH},
    };
    for (const auto& r : ranges)
        if (r.matters && (r.value < r.low || r.value > r.high))
            return format("%s %d, which must be from %d to %d", r.name, r.value, r.low, r.high);
    if (c.C % c.NH != 0) return format("%d channels, which are not a multiple of the %d heads", c.C, c.NH);
    if (c.Vp != (int)round_up((size_t)c.V, 128)) return format("vocabulary %d padded to %d", c.V, c.Vp);
    return "";
}

struct ModelFile {
    InputFile file;
    Config config;
    int version;
    size_t value_bytes;  // 4, or 2 for bf16
    size_t values;
    size_t state_bytes;  // 0: weights only
    bool trailer;
};

static size_t state_begin(const ModelFile& m) { return HEADER_BYTES + m.values * m.value_bytes; }

// Opens a model or a checkpoint, and holds its header against its length.
static ModelFile open_model(const std::string& path) {
    ModelFile m = {};
    const char* name = path.c_str();
    m.file = open_file(path);
    Header h;
    if (m.file.size < HEADER_BYTES) die("%s: %zu bytes are no model: its header alone has 1024", name, m.file.size);
    must_read_at(m.file, 0, h.data(), HEADER_BYTES);
    if (h[0] != MODEL_MAGIC) die("%s: begins with %d, not with a model's %d", name, h[0], MODEL_MAGIC);
    bool vanilla = h[1] == 3 || h[1] == 5;
    if (!vanilla && h[1] != 1003 && h[1] != 1005)
        die("%s: model version %d; 3 and 5 can be read, with skip and depth 1003 and 1005", name, h[1]);
    if (h[255] != 0 && h[255] != 1) die("%s: the header ends in %d, which must be 0 or 1: it is damaged", name, h[255]);
    m.version = h[1];
    m.value_bytes = h[1] % 1000 == 5 ? 2 : 4;
    m.config = {h[2], h[3], h[7], h[4], h[5], h[6], h[8], h[9], h[10], h[11], h[12]};
    const Config unused;  // settings of the attentions that this is not
    if (h[8] != SKIP) m.config.skip_distance = unused.skip_distance, m.config.skip_heads = unused.skip_heads;
    if (h[8] != DEPTH) m.config.depth_stride = unused.depth_stride, m.config.depth_window = unused.depth_window;
    std::string wrong = config_error(m.config);
    if (wrong.empty() && vanilla != (h[8] == VANILLA)) wrong = format("version %d with attention %d", h[1], h[8]);
    if (!wrong.empty()) die("%s: its header says %s: damaged", name, wrong.c_str());

    m.values = parameter_count(m.config);
    m.trailer = h[255] == 1;
    size_t least = state_begin(m) + (m.trailer ? TRAILER_BYTES : 0);
    if (m.file.size < least || (!m.trailer && m.file.size != least))
        die("%s: has %zu bytes where its header asks for %s%zu: truncated, or damaged", name, m.file.size,
            m.trailer ? "at least " : "", least);
    m.state_bytes = m.file.size - least;
    return m;
}

// The CRC-32 of a part of the file.
static uint32_t part_crc(const InputFile& f, size_t begin, size_t end) {
    std::vector<uint8_t> buffer(std::min(end - begin, chunk_values));
    uint32_t crc = 0;
    for (size_t n; begin < end; begin += n) {
        n = std::min(end - begin, buffer.size());
        must_read_at(f, begin, buffer.data(), n);
        crc = crc32(crc, buffer.data(), n);
    }
    return crc;
}

// Dies where the file isn't what was once written. A file without a trailer, llm.c's, has nothing to go by.
static void verify_model(const ModelFile& m) {
    if (!m.trailer) return;
    const char* name = m.file.path.c_str();
    uint32_t trailer[5];
    size_t end = m.file.size - TRAILER_BYTES;
    must_read_at(m.file, end, trailer, TRAILER_BYTES);
    uint64_t length;
    memcpy(&length, trailer + 3, 8);
    if (trailer[0] != TRAILER_MAGIC || length != m.file.size) die("%s: does not end in its trailer: truncated", name);
    if (part_crc(m.file, 0, state_begin(m)) != trailer[1]) die("%s: the weights' checksum is wrong: damaged", name);
    if (part_crc(m.file, state_begin(m), end) != trailer[2])
        die("%s: the training state's checksum is wrong: damaged", name);
}

// Copies n fp32 values at a byte offset of the file into the model's, from the first on.
static void read_quantity(const ModelFile& m, Model* model, Quantity quantity, size_t offset, size_t value_bytes) {
    std::vector<float> values(std::min(chunk_values, m.values));
    std::vector<uint16_t> halves(value_bytes == 2 ? values.size() : 0);
    for (size_t begin = 0; begin < m.values; begin += chunk_values) {
        size_t n = std::min(chunk_values, m.values - begin);
        void* raw = value_bytes == 2 ? (void*)halves.data() : (void*)values.data();
        must_read_at(m.file, offset + begin * value_bytes, raw, n * value_bytes);
        if (value_bytes == 2)  // bf16 is the upper half of an fp32
            for (size_t i = 0; i < n; i++) values[i] = std::bit_cast<float>((uint32_t)halves[i] << 16);
        model_put(model, quantity, begin, n, values.data());
    }
}

static void read_parameters(const ModelFile& m, Model* model) {
    read_quantity(m, model, PARAMETERS, HEADER_BYTES, m.value_bytes);
}

// Random initial parameters. They follow from the seed and each tensor's place and shape alone: blocks of 2^16 values
// have a stream each, so that any number of threads makes the same.
static void initialize_parameters(Model* model, const Config& c, uint64_t seed) {
    constexpr size_t BLOCK = 1 << 16;
    std::vector<float> values(std::min(chunk_values, parameter_count(c)));
    TensorTable table = tensor_table(c);
    for (int i = 0; i < TENSORS; i++) {
        const Tensor& t = table[i];
        size_t live = i == WTE ? (size_t)c.V * c.C : t.size();  // wte's padded rows are 0
        for (size_t begin = 0; begin < t.size(); begin += chunk_values) {
            size_t n = std::min(chunk_values, t.size() - begin);
#pragma omp parallel for schedule(static)
            for (size_t block = 0; block < n; block += BLOCK) {
                Random r = random_stream(seed, INITIAL_VALUES, (uint64_t)i, begin + block);
                for (size_t j = block; j < std::min(n, block + BLOCK); j++) {
                    double noise = t.deviation > 0 ? t.deviation * r.normal() : 0;
                    values[j] = begin + j < live ? (float)(t.mean + noise) : 0.0f;
                }
            }
            model_put(model, PARAMETERS, t.offset + begin, n, values.data());
        }
    }
}

// What a checkpoint knows besides weights and moments. Samples have a stream of random numbers for each step, so there
// is nothing of theirs to remember.
struct Progress {
    int step = 0;                      // updates made
    uint64_t epoch = 0, position = 0;  // the loader's
    // A signal can cut validation short, so that the last step's row of metrics.csv is still due, and these are for it.
    bool due = false;
    double loss = 0, norm = 0, milliseconds = 0;
};

// The shards' numbers of tokens, by which --resume knows them.
static std::string shard_sizes(const std::vector<Shard>& shards) {
    std::string text;
    for (const Shard& s : shards) text += format(text.empty() ? "%zu" : " %zu", s.tokens);
    return text;
}

using State = std::map<std::string, std::string>;

static void write_checkpoint(const std::string& path, const std::string& copy, const Model* model, const Config& c,
                             const State& state) {
    Header h = {MODEL_MAGIC, 3, c.maxT, c.V, c.L, c.NH, c.C, c.Vp};
    int settings[] = {c.attention, c.skip_distance, c.skip_heads, c.depth_stride, c.depth_window};
    if (c.attention != VANILLA) h[1] = 1003, std::copy_n(settings, 5, &h[8]);
    h[255] = 1;
    OutputFile f = create_file(path);
    write_file(f, h.data(), HEADER_BYTES);
    size_t total = parameter_count(c);
    std::vector<float> values(std::min(chunk_values, total));
    auto write_quantity = [&](Quantity quantity) {
        for (size_t begin = 0; begin < total; begin += chunk_values) {
            size_t n = std::min(chunk_values, total - begin);
            model_get(model, quantity, begin, n, values.data());
            write_file(f, values.data(), 4 * n);
        }
    };
    write_quantity(PARAMETERS);
    uint32_t trailer[5] = {TRAILER_MAGIC, f.crc};

    f.crc = 0;
    std::string text;
    for (const auto& [name, value] : state) text += name + '\0' + value + '\0';
    uint64_t n = text.size();
    write_file(f, &n, 8);
    write_file(f, text.data(), text.size());
    write_quantity(MOMENT1);
    write_quantity(MOMENT2);
    trailer[2] = f.crc;
    uint64_t length = f.size + TRAILER_BYTES;
    memcpy(trailer + 3, &length, 8);
    write_file(f, trailer, TRAILER_BYTES);

    commit_file(f);
    if (copy.empty()) return;
    // A second name for the same file costs nothing. Where the file system has no such names, it is written twice.
    std::string temporary = copy + ".tmp";
    unlink(temporary.c_str());
    bool named = link(path.c_str(), temporary.c_str()) == 0 && rename(temporary.c_str(), copy.c_str()) == 0;
    if (!named) write_checkpoint(copy, "", model, c, state);
}

// The state of a checkpoint; empty where there is none. Moments stay in the file.
static State read_state(const ModelFile& m) {
    if (m.state_bytes == 0) return {};
    uint64_t n = 0;
    if (m.state_bytes >= 8) must_read_at(m.file, state_begin(m), &n, 8);
    if (m.state_bytes < 8 || n > m.state_bytes || m.state_bytes != 8 + n + 8 * m.values || m.value_bytes != 4)
        die("%s: %zu bytes after the weights are no training state: damaged", m.file.path.c_str(), m.state_bytes);
    std::string text(n, '\0');
    must_read_at(m.file, state_begin(m) + 8, text.data(), n);
    std::vector<std::string> words = split(text, '\0');
    State state;
    for (size_t i = 0; i + 1 < words.size(); i += 2) state[words[i]] = words[i + 1];
    return state;
}

static void read_moments(const ModelFile& m, Model* model) {
    size_t moments = m.file.size - TRAILER_BYTES - 8 * m.values;
    read_quantity(m, model, MOMENT1, moments, 4);
    read_quantity(m, model, MOMENT2, moments + 4 * m.values, 4);
}

// --------------------------------------------------------------------------------------------------------------------
// From options to a model

struct Shape {
    const char* name;
    int L, NH, C;
};
static const Shape shapes[] = {{"gpt2", 12, 12, 768}, {"gpt2-medium", 24, 16, 1024}, {"gpt2-large", 36, 20, 1280},
                               {"gpt2-xl", 48, 25, 1600}};

static const Shape* find_shape(const std::string& name) {
    for (const Shape& s : shapes)
        if (name == s.name) return &s;
    return nullptr;
}

// --model where it is a file; dies where it is none.
static ModelFile open_weights(const Options& o, const char* command) {
    const char* name = o.model.c_str();
    if (o.model.empty()) die("%s needs --model FILE, a model with weights that train wrote", command);
    if (find_shape(o.model)) die("--model %s is a shape without weights; %s needs a file of train's", name, command);
    if (!exists(o.model) && errno == ENOENT)
        die("--model %s: no such file, nor a shape: gpt2, gpt2-medium, gpt2-large or gpt2-xl", name);
    ModelFile m = open_model(o.model);
    verify_model(m);
    return m;
}

// c with an attention, whose settings are the options', else its file's where that has the same attention, else
// defaults for c's shape. Dies where that is no model.
static Config with_attention(Config c, int attention, const Options& o, const ModelFile* file) {
    const Config own = file ? file->config : Config{.attention = VANILLA};
    auto choose = [](int option, int lowest, int otherwise) { return option >= lowest ? option : otherwise; };
    bool skip = attention == SKIP && own.attention == SKIP, depth = attention == DEPTH && own.attention == DEPTH;
    c.attention = attention;
    c.skip_distance = choose(o.skip_distance, 1, skip ? own.skip_distance : std::max(1, 3 * c.L / 4));
    c.skip_heads = choose(o.skip_heads, 0, skip ? own.skip_heads : std::max(1, 3 * c.NH / 4));
    c.depth_stride = choose(o.depth_stride, 1, depth ? own.depth_stride : std::max(1, c.L / 2));
    c.depth_window = choose(o.depth_window, 0, depth ? own.depth_window : 0);
    std::string wrong = config_error(c);
    if (!wrong.empty()) die("the options ask for %s", wrong.c_str());
    return c;
}

// The Config on which file, options and tokenizer agree. Options that were not set are set by it.
static Config configure(Options& o, const OptionTable& table, CommandBit command, const ModelFile* file,
                        const Tokenizer& tokenizer) {
    Config c;
    if (file) {
        c = file->config;
    } else if (const Shape* s = find_shape(o.model)) {
        c.L = s->L, c.NH = s->NH, c.C = s->C;
    }
    if (!file && tokenizer.known() && o.vocab < 1) c.V = (int)tokenizer.tokens.size();
    struct { const char* name; int* option; int* field; } sizes[] = {
        {"layers", &o.layers, &c.L}, {"heads", &o.heads, &c.NH}, {"channels", &o.channels, &c.C},
        {"context", &o.context, &c.maxT}, {"vocab", &o.vocab, &c.V}};
    for (auto& [name, option, field] : sizes) {
        if (file && *option > 0 && *option != *field)
            die("--%s %d contradicts %s, which has %d", name, *option, file->file.path.c_str(), *field);
        if (*option > 0) *field = *option;
        *option = *field;
    }
    c.Vp = (int)round_up((size_t)c.V, 128);
    if (tokenizer.known() && tokenizer.tokens.size() != (size_t)c.V)
        die("%s has %zu tokens, and the vocabulary is %d; name the right one with --tokenizer", tokenizer.path.c_str(),
            tokenizer.tokens.size(), c.V);

    if (file && !is_given(table, "attention")) o.attention = c.attention;
    for (const char* option : {"skip-distance", "skip-heads", "depth-stride", "depth-window"}) {
        const char* needed = attention_names[strncmp(option, "skip", 4) == 0 ? SKIP : DEPTH];
        bool any = command == DESCRIBE || command == BENCH;  // they go through all three
        if (!any && is_given(table, option) && strcmp(needed, attention_names[o.attention]) != 0)
            die("--%s needs --attention %s, and this is %s", option, needed, attention_names[o.attention]);
    }
    c = with_attention(c, o.attention, o, file);
    if (c.attention == SKIP) o.skip_distance = c.skip_distance, o.skip_heads = c.skip_heads;
    if (c.attention == DEPTH) o.depth_stride = c.depth_stride, o.depth_window = c.depth_window;

    if (o.sequence < 1) o.sequence = std::min(c.maxT, 1024);
    if (o.sequence > c.maxT) die("--sequence %d is longer than the model's context, %d", o.sequence, c.maxT);
    if ((size_t)o.batch * (size_t)o.sequence > 1 << 26)
        die("--batch %d x --sequence %d is more than 2^26 tokens at a time", o.batch, o.sequence);
    return c;
}

// Floating-point operations a token, forward and backward. Each multiply-add of a matmul is two, and backward is two
// such matmuls; causal attention reads T/2 keys and values on average.
static double flops_per_token(const Config& c, int T) {
    double L = c.L, C = c.C, V = c.V;
    double flops = 6 * (V * C + 12 * L * C * C) + 6 * L * C * T;
    for (int l = 0; l < c.L; l++) {
        flops -= 6 * 2 * (C - kv_channels(c, l)) * C;  // keys and values that nobody reads are not projected
        size_t sources = depth_sources(c, l).size();
        if (sources > 0) flops += 12 * C * (double)(sources + 1);
    }
    return flops;
}

// What a model will allocate. Where less is free, together with so many bytes for other things, the program ends and
// names the largest batch that fits: one that divides `sequences`, if these are not 0.
static Memory check_memory(const Config& c, int precision, Workload work, size_t others, int sequences = 0) {
    auto needed = [&] { return model_memory(c, (Precision)precision, work).total() + others; };
    const size_t free = device_free_memory();
    if (needed() <= free) return model_memory(c, (Precision)precision, work);
    std::string line = format("this needs %s of memory, and %s are free: ", mebibytes(needed()).c_str(),
                              mebibytes(free).c_str());
    if (work.B == 0) die("%suse a smaller model", line.c_str());
    int fits = 0, too_large = work.B;
    while (too_large - fits > 1) {
        work.B = fits + (too_large - fits) / 2;
        (needed() <= free ? fits : too_large) = work.B;
    }
    while (fits > 1 && sequences % fits != 0) fits--;
    if (fits == 0) die("%snot even --batch 1 fits; a smaller --sequence or model needs less", line.c_str());
    die("%sthe largest --batch that fits is %d", line.c_str(), fits);
}

// --------------------------------------------------------------------------------------------------------------------
// Loss on a validation set

static std::atomic<int> interrupts{0};  // signals that asked us to stop

static bool on_terminal() { return isatty(STDOUT_FILENO); }

// One line of progress. On a terminal, the next one is drawn over it unless it stays.
static void show_line(const std::string& text, bool stays) {
    if (!on_terminal()) {
        printf("%s\n", text.c_str());
    } else {
        winsize window = {};
        bool known = ioctl(STDOUT_FILENO, TIOCGWINSZ, &window) == 0 && window.ws_col > 1;
        int width = known && !stays ? window.ws_col - 1 : (int)text.size();  // a line that wraps cannot be drawn over
        printf("\r%.*s\x1b[K%s", width, text.c_str(), stays ? "\n" : "");
    }
    fflush(stdout);
}

struct Evaluation {
    double loss = 0;     // mean cross-entropy, nats a token
    double entropy = 0;  // of the tokens' frequencies: the loss of the best guess that looks at no context
    size_t tokens = 0, bytes = 0;
    bool cut_short = false;
};

// The loss over exactly the windows there are, or the first --val-batches of them.
static Evaluation evaluate(Model* model, const Config& c, const std::vector<Shard>& shards, const Options& o,
                           const Tokenizer& tokenizer, bool show_progress) {
    const size_t B = (size_t)o.batch, T = (size_t)o.sequence;
    size_t total = window_count(shards, o.sequence);
    if (o.val_batches > 0) total = std::min(total, (size_t)o.val_batches * B);
    WindowReader reader = {shards, o.sequence, c.V};
    std::vector<int> x(B * T), y(B * T);
    std::vector<float> losses(B * T);
    std::vector<size_t> counts((size_t)c.V);
    Evaluation e;
    for (size_t first = 0; first < total && !e.cut_short; first += B) {
        size_t real = std::min(B, total - first);
        for (size_t b = 0; b < B; b++) {
            if (b < real) {
                read_window(reader, &x[b * T], &y[b * T]);
            } else {  // fills up the last batch, and isn't counted
                std::copy_n(&x[0], T, &x[b * T]);
                std::copy_n(&y[0], T, &y[b * T]);
            }
        }
        model_set_inputs(model, x.data(), y.data());
        model_forward(model, false, 1.0f);
        model_token_losses(model, losses.data());
        for (size_t i = 0; i < real * T; i++) {
            e.loss += losses[i];
            counts[y[i]]++;
        }
        e.tokens += real * T;
        e.cut_short = interrupts > 0 && first + real < total;
        if (show_progress && on_terminal())
            show_line(format("batch %zu/%zu  loss %.4f", first / B + 1, ceil_div(total, B), e.loss / e.tokens), false);
    }
    if (reader.file.fd >= 0) close(reader.file.fd);
    model_loss(model);  // these forwards are no part of the next training loss
    e.loss /= (double)e.tokens;
    for (int i = 0; i < c.V; i++) {
        double p = (double)counts[i] / (double)e.tokens;
        if (counts[i] > 0) e.entropy -= p * log(p);
        if (tokenizer.known() && i != tokenizer.end_of_text) e.bytes += counts[i] * tokenizer.tokens[i].size();
    }
    return e;
}

// --------------------------------------------------------------------------------------------------------------------
// Generation
//
// Each token is drawn from the model's distribution for what follows all tokens so far, whose keys and values are
// cached. When the cache is full, it is emptied, and the latest ⌊maxT/2⌋ tokens are read anew from position 0.

struct Decoder {
    Model* model;
    const Config& c;
    std::vector<int> tokens = {};    // all so far
    int cached = 0;                  // of them, the latest so many are in the cache
    std::vector<float> logits = {};  // (V) for what follows
};

static void decode_tokens(Decoder& d, const std::vector<int>& more) {
    int maxT = d.c.maxT, n = (int)more.size();
    d.logits.resize(d.c.V);
    d.tokens.insert(d.tokens.end(), more.begin(), more.end());
    if (n > maxT - d.cached) {
        // One by one, the tokens would fill the cache, then again and again empty it, read `half`, the newest token
        // among them, and fill it. Only what the last of these rounds reads matters.
        int half = std::max(1, maxT / 2), round = maxT - half + 1;
        n = half + (n - (maxT - d.cached) - 1) % round;
        d.cached = 0;
        model_reset_cache(d.model);
    }
    if (n == 1 && d.cached > 0) model_decode(d.model, &d.tokens.back(), d.logits.data());
    else model_prompt(d.model, d.tokens.data() + d.tokens.size() - n, n, d.logits.data());
    d.cached += n;
}

// Draws a token from softmax(logits/temperature), of which only the top_k likeliest are left, and of those only the
// likeliest that together reach top_p.
static int choose_token(const std::vector<float>& logits, const Options& o, Random& r) {
    int V = (int)logits.size();
    int best = (int)(std::max_element(logits.begin(), logits.end()) - logits.begin());  // the first, among equals
    if (!std::isfinite(logits[best])) die("the model's logits are not finite: its training failed, or it is damaged");
    if (o.temperature == 0) return best;

    struct Candidate {
        double p;  // not normalized
        int token;
    };
    std::vector<Candidate> candidates;
    double sum = 0;
    for (int i = 0; i < V; i++) {
        candidates.push_back({exp((logits[i] - logits[best]) / o.temperature), i});
        sum += candidates.back().p;
    }
    auto likelier = [](const Candidate& a, const Candidate& b) { return a.p != b.p ? a.p > b.p : a.token < b.token; };
    if (o.top_k > 0 && o.top_k < V) {
        std::partial_sort(candidates.begin(), candidates.begin() + o.top_k, candidates.end(), likelier);
        candidates.resize(o.top_k);
        sum = 0;
        for (const Candidate& c : candidates) sum += c.p;
    }
    if (o.top_p < 1) {
        // The last of them and those after it share more than 1 - top_p, and none has more than the last. So that has
        // more than (1 - top_p)/n, which leaves few to sort.
        double least = (1 - o.top_p) * sum / (double)candidates.size();
        std::erase_if(candidates, [&](const Candidate& c) { return c.p < least; });
        std::sort(candidates.begin(), candidates.end(), likelier);
        double reached = 0;
        size_t n = 0;
        while (n < candidates.size() && (n == 0 || reached < o.top_p * sum)) reached += candidates[n++].p;
        candidates.resize(n);
        sum = reached;
    }
    double left = r.uniform() * sum;
    for (const Candidate& c : candidates)
        if ((left -= c.p) < 0) return c.token;
    return candidates.back().token;  // rounding left a little over
}

struct Generated {
    int tokens = 0;
    double prompt_seconds = 0, seconds = 0;
};

// Prints the prompt and what the model adds, until there are --tokens of it or the text ends. The model has one cache.
static Generated generate_text(Model* model, const Config& c, const Options& o, const Tokenizer& tokenizer,
                               const std::vector<int>& prompt, Random r) {
    Utf8Writer writer = {stdout};
    bool first = true;
    auto print = [&](int token) {
        if (!tokenizer.known()) printf(first ? "%d" : " %d", token);
        else if (token != tokenizer.end_of_text)
            for (char byte : tokenizer.tokens[token]) writer.put((uint8_t)byte);
        first = false;
        fflush(stdout);
    };
    for (int token : prompt) print(token);

    Generated g;
    Decoder d = {model, c};
    double start = seconds();
    model_reset_cache(model);
    decode_tokens(d, prompt);
    g.prompt_seconds = seconds() - start;
    start = seconds();
    while (g.tokens < o.tokens && interrupts == 0) {
        int token = choose_token(d.logits, o, r);
        g.tokens++;
        if (token == tokenizer.end_of_text) break;
        print(token);
        if (g.tokens < o.tokens) decode_tokens(d, {token});
    }
    g.seconds = seconds() - start;
    writer.finish();
    printf("\n");
    fflush(stdout);
    return g;
}

// The token that an empty prompt stands for: end-of-text, or a newline where there is none; -1: neither.
static int start_token(const Tokenizer& t, int V) {
    if (!t.known()) return V == 50257 ? 50256 : -1;  // GPT-2's
    if (t.end_of_text >= 0) return t.end_of_text;
    auto newline = std::find(t.tokens.begin(), t.tokens.end(), "\n");
    return newline == t.tokens.end() ? -1 : (int)(newline - t.tokens.begin());
}

// --------------------------------------------------------------------------------------------------------------------
// Training

// The learning rate of an update, the first being 1: it rises to lr in `warmup` steps and, unless it is constant, falls
// to min_lr in the last.
static double learning_rate(const Options& o, int step) {
    if (step <= o.warmup) return o.lr * step / o.warmup;
    int start = o.schedule == WSD ? std::max(o.warmup, o.steps - o.steps / 5) : o.warmup;  // of the fall
    double progress = step <= start ? 0 : (double)(step - start) / (o.steps - start);
    double share = o.schedule == CONSTANT ? 1
                 : o.schedule == LINEAR ? 1 - progress
                 : o.schedule == COSINE ? 0.5 + 0.5 * cos(M_PI * progress)
                                        : 1 - sqrt(progress);
    return o.min_lr + (o.lr - o.min_lr) * share;
}

// Locks the folder for this process until it ends, however that may be. Returns false where there is no such folder.
static bool lock_folder(const std::string& path, int& fd) {
    fd = open(path.c_str(), O_RDONLY | O_DIRECTORY | O_CLOEXEC);
    if (fd < 0 && errno == ENOENT) return false;
    if (fd < 0) die("--out %s: %s", path.c_str(), strerror(errno));
    if (flock(fd, LOCK_EX | LOCK_NB) == 0) return true;  // fd stays open
    if (errno == EWOULDBLOCK) die("--out %s is in use by another process that trains into it", path.c_str());
    printf("note: --out %s cannot be locked against other processes: %s\n", path.c_str(), strerror(errno));
    return true;
}

// Dies where the folder isn't fit for what is asked. Returns whether it exists, and is locked now.
static bool check_folder(const Options& o, int& fd) {
    bool found = lock_folder(o.out, fd);
    std::string place = o.out;
    while (!found && !exists(place) && place != folder_of(place)) place = folder_of(place);  // where it would be made
    if (access(place.c_str(), W_OK | X_OK) != 0) die("--out %s: %s: %s", o.out.c_str(), place.c_str(), strerror(errno));
    bool checkpoint = exists(o.out + "/model.bin");
    if (o.resume && !checkpoint) die("--resume: there is nothing to resume in %s: it has no model.bin", o.out.c_str());
    if (!o.resume && !o.overwrite && checkpoint)
        die("--out %s holds a run: --resume goes on with it, --overwrite replaces it", o.out.c_str());
    if (!o.resume && !o.overwrite && exists(o.out + "/metrics.csv"))
        die("--out %s holds the metrics.csv of a run without its checkpoint: --overwrite replaces it", o.out.c_str());
    return found;
}

// All of a run.
struct Run {
    Options& o;
    OptionTable& table;
    Config c = {};
    Tokenizer tokenizer = {};
    std::vector<Shard> train = {}, val = {};
    Loader loader = {};
    Model* model = nullptr;
    Progress progress = {};
    FILE* metrics = nullptr;
    Evaluation validation = {};  // the latest
    int saved = 0;               // the step that DIR/model.bin is of
    int folder = -1;             // DIR, open and locked

    std::string path(const std::string& name) const { return o.out + "/" + name; }
};

// Sets the options that were not given as the checkpoint remembers them; dies where one that was given contradicts it.
static void recall_options(OptionTable& table, const State& state, const char* path) {
    for (Option& o : table) {
        if (o.memorable == FORGOTTEN) continue;
        auto found = state.find(std::string("--") + o.name);
        std::string remembered = found == state.end() ? "" : found->second;
        if (!o.given) {
            std::string wrong = remembered.empty() ? "" : set_value(o, remembered);
            if (!wrong.empty()) die("%s: --%s %s: %s", path, o.name, remembered.c_str(), wrong.c_str());
        } else if (o.memorable == FIXED && value_text(o) != remembered) {
            die("--%s %s contradicts %s, where it is %s; leave it out, or begin a new run with --model %s", o.name,
                value_text(o).c_str(), path, remembered.empty() ? "not set" : remembered.c_str(), path);
        }
    }
}

static State run_state(const Run& run) {
    const Progress& p = run.progress;
    State state = {{"step", std::to_string(p.step)}, {"epoch", std::to_string(p.epoch)},
                   {"position", std::to_string(p.position)}, {"train shards", shard_sizes(run.train)},
                   {"val shards", shard_sizes(run.val)}};
    if (p.due) state["due"] = format("%.17g %.17g %.17g", p.loss, p.norm, p.milliseconds);
    for (const Option& o : run.table)
        if (o.memorable != FORGOTTEN && !value_text(o).empty()) state[std::string("--") + o.name] = value_text(o);
    return state;
}

static Progress read_progress(const State& state, const Options& o, const char* path) {
    auto number = [&](const char* name) {
        auto found = state.find(name);
        return found == state.end() ? 0 : strtoull(found->second.c_str(), nullptr, 10);
    };
    Progress p;
    p.epoch = number("epoch"), p.position = number("position");
    p.step = (int)std::min<uint64_t>(number("step"), INT_MAX);
    if (p.step > o.steps) die("%s: is at step %d of %d: damaged", path, p.step, o.steps);
    if (auto due = state.find("due"); due != state.end())
        p.due = sscanf(due->second.c_str(), "%lf %lf %lf", &p.loss, &p.norm, &p.milliseconds) == 3;
    return p;
}

// Dies where the shards are not those of the checkpoint, as far as their lengths can tell.
static void check_sizes(const State& state, const char* option, const std::vector<Shard>& shards, const char* path) {
    auto found = state.find(std::string(option) + " shards");
    if (found == state.end() || found->second.empty() || found->second == shard_sizes(shards)) return;
    size_t tokens = 0, n = 0;
    for (const std::string& size : split(found->second, ' ')) tokens += strtoull(size.c_str(), nullptr, 10), n++;
    die("--%s: %s of together %s tokens, where %s had %s of %s: these are other data", option,
        plural(shards.size(), "shard").c_str(), commas(token_count(shards)).c_str(), path, plural(n, "shard").c_str(),
        commas(tokens).c_str());
}

// Removes the files of the run that the folder held.
static void remove_run(const Run& run) {
    std::error_code error;
    for (const auto& entry : std::filesystem::directory_iterator(run.o.out, error)) {
        std::string name = entry.path().filename().string();
        if (name.ends_with(".tmp")) name.resize(name.size() - 4);
        bool numbered = name.starts_with("model_") && name.ends_with(".bin") && name.size() > 10 &&
                        name.find_first_not_of("0123456789", 6) == name.size() - 4;
        bool tokenizer = name == "tokenizer.bin" && !run.tokenizer.known();
        if (!numbered && !tokenizer) continue;
        if (unlink(entry.path().c_str()) != 0) die("%s: cannot be removed: %s", entry.path().c_str(), strerror(errno));
    }
}

// Opens DIR/metrics.csv to go on after the row of the last step. Rows after it, of a run that went on and was killed
// before its next checkpoint, are cut.
static FILE* open_metrics(const Run& run) {
    std::string path = run.path("metrics.csv"), kept = "step,train_loss,val_loss,lr,grad_norm,ms,tokens_per_s\n";
    int last = run.progress.step - run.progress.due;
    FILE* old = run.o.resume ? fopen(path.c_str(), "r") : nullptr;
    if (run.o.resume && !old && errno != ENOENT) die("%s: %s", path.c_str(), strerror(errno));
    if (old) {
        char* line = nullptr;
        size_t size = 0;
        int previous = 0;
        for (ssize_t n; (n = getline(&line, &size, old)) > 0 && line[n - 1] == '\n';) {
            int step = atoi(line);  // 0 for the names of the columns
            if (step > previous && step <= last) kept += line, previous = step;
        }
        free(line);
        fclose(old);
    }
    write_whole(path, kept);
    FILE* metrics = fopen(path.c_str(), "a");
    if (!metrics) die("%s: %s", path.c_str(), strerror(errno));
    return metrics;
}

// Whether something that is done every so many steps, and after the last, is due.
static bool is_due(int every, const Run& run) {
    return run.progress.step == run.o.steps || (every > 0 && run.progress.step % every == 0);
}

static void save_run(Run& run) {
    struct stat now, locked;
    if (stat(run.o.out.c_str(), &now) != 0 || fstat(run.folder, &locked) != 0 || now.st_ino != locked.st_ino ||
        now.st_dev != locked.st_dev)
        die("--out %s: the folder was removed or replaced during the run; step %d could not be saved",
            run.o.out.c_str(), run.progress.step);
    fsync(fileno(run.metrics));  // its rows up to here are never to be written again
    bool keep = run.o.keep && is_due(run.o.save_every, run);  // and not what a signal asked for
    std::string copy = keep ? run.path(format("model_%06d.bin", run.progress.step)) : "";
    write_checkpoint(run.path("model.bin"), copy, run.model, run.c, run_state(run));
    run.saved = run.progress.step;
}

// A run that has left the finite numbers never comes back.
static void check_finite(const Run& run, const char* what, double value) {
    if (std::isfinite(value)) return;
    die("%s became %s in step %d; %s is still that of step %d; a lower --lr or a longer --warmup may help", what,
        std::isnan(value) ? "NaN" : "infinite", run.progress.step, run.path("model.bin").c_str(), run.saved);
}

static void print_start(const Run& run, size_t memory_needed, double peak) {
    const Options& o = run.o;
    size_t windows = window_count(run.train, o.sequence);
    printf("model      %s\n", config_text(run.c).c_str());
    printf("attention  %s\n", attention_text(run.c).c_str());
    printf("parameters %s, %s; %.3g GFLOP a token, forward and backward\n", commas(parameter_count(run.c)).c_str(),
           o.resume ? format("as after step %d", run.progress.step).c_str()
           : o.model.empty() || find_shape(o.model) ? format("random from seed %d", o.seed).c_str()
           : format("from %s", o.model.c_str()).c_str(), flops_per_token(run.c, o.sequence) * 1e-9);
    printf("data       %s, %s tokens; %s of %s tokens make %.2f epochs\n", plural(run.train.size(), "shard").c_str(),
           commas(token_count(run.train)).c_str(), plural(o.steps, "step").c_str(), commas(o.total_batch).c_str(),
           (double)o.steps * (o.total_batch / o.sequence) / (double)windows);
    if (!run.val.empty())
        printf("validation %s, %s tokens\n", plural(run.val.size(), "shard").c_str(),
               commas(token_count(run.val)).c_str());
    printf("machine    %s, %.0f GFLOP/s in %s; %s of memory needed, %s free\n", device_name().c_str(), peak * 1e-9,
           precision_names[o.precision], mebibytes(memory_needed).c_str(), mebibytes(device_free_memory()).c_str());
    std::string line = "options   ";  // but for those of the model, which the lines above are about
    for (const Option& option : run.table) {
        bool echoed = !(option.commands & ~(TRAIN | EVAL | DESCRIBE)) && option.memorable != FORGOTTEN &&
                      !std::holds_alternative<std::string*>(option.value);
        if (!echoed || value_text(option).empty()) continue;
        std::string text = format(" %s %s", option.name, value_text(option).c_str());
        if (line.size() + text.size() > 110) {
            printf("%s\n", line.c_str());
            line = "          ";
        }
        line += text;
    }
    printf("%s\n\n", line.c_str());
    fflush(stdout);
}

static bool can_sample(const Run& run) { return run.tokenizer.known() && start_token(run.tokenizer, run.c.V) >= 0; }

static void print_sample(const Run& run) {
    show_line(format("sample after step %d:", run.progress.step), true);
    Random r = random_stream((uint64_t)run.o.seed, SAMPLES, (uint64_t)run.progress.step);
    generate_text(run.model, run.c, run.o, run.tokenizer, {start_token(run.tokenizer, run.c.V)}, r);
}

// Training steps until the last, or until a signal. x, y (B, T) may hold the first batch already.
static void train_steps(Run& run, std::vector<int>& x, std::vector<int>& y, bool batch_ready, double peak) {
    const Options& o = run.o;
    Progress& p = run.progress;
    const int accumulation = o.total_batch / (o.batch * o.sequence);
    const double flops = flops_per_token(run.c, o.sequence), start = seconds();
    const int first_step = p.step;
    enum { NOWHERE, HERE, SET } batch = batch_ready ? HERE : NOWHERE;  // the next one: in x and y, or in the model

    while (p.step < o.steps || p.due) {
        if (!p.due) {  // the step itself
            double step_start = seconds();
            for (int i = 0; i < accumulation; i++) {
                if (batch == NOWHERE) loader_batch(run.loader, x.data(), y.data(), o.batch);
                if (batch != SET) model_set_inputs(run.model, x.data(), y.data());
                batch = NOWHERE;
                model_forward(run.model, true, 1.0f / (float)accumulation);
                model_backward(run.model);
            }
            p.step++;
            float lr = (float)learning_rate(o, p.step);
            AdamW adamw = {lr, (float)o.beta1, (float)o.beta2, 1e-8f, (float)o.weight_decay};
            model_update(run.model, adamw, (float)o.clip, p.step);
            p.epoch = run.loader.epoch, p.position = run.loader.position;
            if (p.step < o.steps) {  // a GPU is still at this step while the next batch comes in
                loader_batch(run.loader, x.data(), y.data(), o.batch);
                model_set_inputs(run.model, x.data(), y.data());
                batch = SET;
            }
            p.norm = model_norm(run.model);
            p.loss = model_loss(run.model);
            p.milliseconds = (seconds() - step_start) * 1e3;
            p.due = true;
        }
        check_finite(run, "the loss", p.loss);
        check_finite(run, "the gradient's norm", p.norm);

        double rate = o.total_batch / p.milliseconds * 1e3, lr = learning_rate(o, p.step);
        double left = (seconds() - start) / std::max(1, p.step - first_step) * (o.steps - p.step);
        std::string line = format("step %d/%d  loss %.4f  norm %.3f  lr %.2e  %.*f ms  %.0f tokens/s  %.0f%% of peak",
                                  p.step, o.steps, p.loss, p.norm, lr, p.milliseconds < 10, p.milliseconds, rate,
                                  100 * rate * flops / peak);
        if (p.step < o.steps) line += "  " + duration(left) + " left";
        bool validates = !run.val.empty() && is_due(o.val_every, run), last = p.step == o.steps;
        std::string val_loss;
        if (validates) {
            if (on_terminal()) show_line(line, false);
            run.validation = evaluate(run.model, run.c, run.val, o, run.tokenizer, false);
            if (batch == SET) batch = HERE;  // the model has other inputs now
            if (run.validation.cut_short) {
                save_run(run);  // with this step's row due
                return;
            }
            check_finite(run, "the validation loss", run.validation.loss);
            line += format("  val %.4f", run.validation.loss);
            val_loss = format("%.9g", run.validation.loss);
        }
        show_line(line, validates || last);
        fprintf(run.metrics, "%d,%.9g,%s,%.9g,%.9g,%.2f,%.0f\n", p.step, p.loss, val_loss.c_str(), lr, p.norm,
                p.milliseconds, rate);
        if (fflush(run.metrics) != 0) die("%s: %s", run.path("metrics.csv").c_str(), strerror(errno));
        p.due = false;

        if (is_due(o.sample_every, run) && can_sample(run) && !last && interrupts == 0) print_sample(run);
        if (interrupts > 0 || is_due(o.save_every, run)) save_run(run);
        if (interrupts > 0) return;
    }
}

static void on_signal(int) {
    if (interrupts++ > 0) _exit(130);
}

static void train(Options& o, OptionTable& table, const char* program) {
    // 1. The folder, and what the run starts from
    if (o.out.empty()) die("train needs --out DIR, a folder for its checkpoint");
    if (o.resume && o.overwrite) die("--resume goes on with a run and --overwrite replaces it: one of them, please");
    while (o.out.size() > 1 && o.out.back() == '/') o.out.pop_back();
    Run run = {o, table};
    const std::string checkpoint = run.path("model.bin");
    const char* name = checkpoint.c_str();
    bool locked = check_folder(o, run.folder);
    std::optional<ModelFile> file;
    State state;
    if (o.resume) {
        file = open_model(checkpoint);
        verify_model(*file);
        state = read_state(*file);
        if (state.empty()) die("%s holds weights without training state; begin a new run with --model %s", name, name);
        recall_options(table, state, name);
        run.progress = read_progress(state, o, name);
        run.saved = run.progress.step;
        if (run.progress.step == o.steps && !run.progress.due) {
            printf("%s is complete: %s of %d; to train on, begin a new run with --model %s\n", name,
                   plural(run.progress.step, "step").c_str(), o.steps, name);
            return;
        }
    } else if (!o.model.empty() && !find_shape(o.model)) {
        file = open_weights(o, "train");
        if (o.overwrite && same_file(folder_of(o.model), o.out))
            die("--model %s lies in the --out that --overwrite would empty; give another --out", o.model.c_str());
    }

    // 2. Data, tokenizer, model, in the order in which one needs the other
    if (o.train.empty()) die("train needs --train GLOB, shards that data_prep/prepare.py makes from text");
    std::vector<std::string> train_paths = expand_glob("train", o.train), val_paths, folders;
    if (!o.val.empty()) val_paths = expand_glob("val", o.val);
    if (o.resume) folders.push_back(o.out);
    folders.push_back(folder_of(train_paths[0]));
    if (!o.val.empty()) folders.push_back(folder_of(val_paths[0]));
    if (file) folders.push_back(folder_of(file->file.path));
    run.tokenizer = find_tokenizer(o.tokenizer, folders);
    run.c = configure(o, table, TRAIN, file ? &*file : nullptr, run.tokenizer);
    const int T = o.sequence, B = o.batch;
    run.train = open_shards("train", train_paths, T);
    if (!o.val.empty()) run.val = open_shards("val", val_paths, T);
    check_sizes(state, "train", run.train, name);
    check_sizes(state, "val", run.val, name);

    // 3. Options that depend on these, or on each other
    if (o.total_batch < 1) o.total_batch = B * T;
    if (o.total_batch % (B * T) != 0)
        die("--total-batch %d is not a multiple of batch x sequence, %d x %d = %d", o.total_batch, B, T, B * T);
    size_t pass = window_count(run.train, T) / (size_t)(o.total_batch / T);
    if (o.steps < 1) o.steps = (int)std::clamp<size_t>(pass, 1, INT_MAX);
    if (o.warmup < 0) o.warmup = o.steps / 20;
    if (o.warmup > o.steps) die("--warmup %d is more than --steps %d", o.warmup, o.steps);
    if (o.min_lr < 0) o.min_lr = strtod(format("%.9g", o.lr / 10).c_str(), nullptr);  // few digits, as one would give
    if (o.min_lr > o.lr) die("--min-lr %g is more than --lr %g", o.min_lr, o.lr);
    if (o.val_batches < 0) o.val_batches = 20;
    const std::string own_tokenizer = run.path("tokenizer.bin");
    if (run.tokenizer.known() && !o.overwrite && exists(own_tokenizer) &&
        read_tokenizer(own_tokenizer).content != run.tokenizer.content)
        die("%s is another tokenizer than %s; %s", own_tokenizer.c_str(), run.tokenizer.path.c_str(),
            o.resume ? "leave out --tokenizer" : "give another --out");

    // 4. Memory, and the first batches, in which tokens may be wrong
    run.loader.shards = split_shards(run.train);
    run.loader.T = T, run.loader.V = run.c.V, run.loader.seed = (uint64_t)o.seed;
    Workload work = {B, T, true, can_sample(run), o.recompute};
    size_t loading = device_is_host() ? loader_bytes(run.loader.shards, T) : 0;
    const int sequences = is_given(table, "total-batch") ? o.total_batch / T : 0;
    Memory memory = check_memory(run.c, o.precision, work, loading, sequences);
    std::vector<int> x((size_t)B * T), y((size_t)B * T);
    if (!run.val.empty()) {
        WindowReader reader = {run.val, T, run.c.V};
        size_t first = std::min((size_t)B, window_count(run.val, T));
        for (size_t i = 0; i < first; i++) read_window(reader, x.data(), y.data());
        close(reader.file.fd);
    }
    loader_start(run.loader, run.progress.epoch, run.progress.position);
    bool batch_ready = !run.progress.due;
    if (batch_ready) loader_batch(run.loader, x.data(), y.data(), B);

    // 5. The model
    const size_t for_peak = device_peak_memory((Precision)o.precision);
    if (device_free_memory() < for_peak)
        die("%s are free; measuring the peak takes %s", mebibytes(device_free_memory()).c_str(),
            mebibytes(for_peak).c_str());
    double peak = device_peak((Precision)o.precision);
    print_start(run, memory.total() + loading, peak);
    run.model = model_create(run.c, (Precision)o.precision, work);
    if (file) read_parameters(*file, run.model);
    else initialize_parameters(run.model, run.c, (uint64_t)o.seed);
    if (o.resume) read_moments(*file, run.model);
    if (file) close(file->file.fd);

    // 6. From here on the folder is written to
    if (!locked) {
        std::error_code error;
        std::filesystem::create_directories(o.out, error);
        if (error) die("--out %s could not be made: %s", o.out.c_str(), error.message().c_str());
        check_folder(o, run.folder);  // again: another process may have been faster
    }
    signal(SIGPIPE, SIG_IGN);
    if (run.tokenizer.known()) write_whole(own_tokenizer, run.tokenizer.content);
    // A new run saves its start. So --resume never takes a former run's checkpoint for this one's, the former run is
    // whole until this one can take its place, and a disk too full for a checkpoint shows now.
    if (!o.resume) write_checkpoint(checkpoint, "", run.model, run.c, run_state(run));
    run.metrics = open_metrics(run);
    if (o.overwrite) remove_run(run);

    // 7. Train
    struct sigaction action = {};
    action.sa_handler = on_signal;
    action.sa_flags = SA_RESTART;
    sigaction(SIGINT, &action, nullptr);
    sigaction(SIGTERM, &action, nullptr);
    double start = seconds();
    train_steps(run, x, y, batch_ready, peak);
    fclose(run.metrics);

    // 8. What came of it
    if (run.progress.step < o.steps || run.progress.due) {
        show_line(format("stopped after step %d of %d, and saved; to go on:\n    %s train --out %s --resume",
                         run.progress.step, o.steps, program, o.out.c_str()), true);
    } else {
        printf("\ntrained to step %d in %s%s\n", o.steps, duration(seconds() - start).c_str(),
               o.resume ? " since it went on" : "");
        if (!run.val.empty())
            printf("validation loss %.4f nats a token, over %s tokens with a unigram entropy of %.4f\n",
                   run.validation.loss, commas(run.validation.tokens).c_str(), run.validation.entropy);
        if (can_sample(run) && interrupts == 0) print_sample(run);
        printf("\ncheckpoint %s; more text:\n    %s generate --model %s --seed %d%s\n", name, program, name, o.seed + 1,
               start_token(run.tokenizer, run.c.V) < 0 ? " --prompt-tokens 0" : "");
    }
    model_free(run.model);
}

// --------------------------------------------------------------------------------------------------------------------
// The other commands

static void eval(Options& o, OptionTable& table) {
    ModelFile file = open_weights(o, "eval");
    if (o.val.empty()) die("eval needs --val GLOB, the shards to measure the loss on");
    std::vector<std::string> paths = expand_glob("val", o.val);
    Tokenizer tokenizer = find_tokenizer(o.tokenizer, {folder_of(o.model), folder_of(paths[0])});
    Config c = configure(o, table, EVAL, &file, tokenizer);
    std::vector<Shard> shards = open_shards("val", paths, o.sequence);
    Workload work = {o.batch, o.sequence, false, 0};
    check_memory(c, o.precision, work, 0);
    Model* model = model_create(c, (Precision)o.precision, work);
    read_parameters(file, model);
    bool own = file.config.attention == c.attention;
    printf("model      %s: %s\nattention  %s%s%s\n", o.model.c_str(), config_text(c).c_str(), attention_text(c).c_str(),
           own ? "" : "; it was trained as ", own ? "" : attention_names[file.config.attention]);
    Evaluation e = evaluate(model, c, shards, o, tokenizer, true);
    if (!std::isfinite(e.loss)) die("%s: its loss is not finite: its training failed", o.model.c_str());
    show_line(format("data       %s tokens in windows of %d, with a unigram entropy of %.6f", commas(e.tokens).c_str(),
                     o.sequence, e.entropy), true);
    printf("loss       %.6f nats a token\nperplexity %.4f\n", e.loss, exp(e.loss));
    if (e.bytes > 0) printf("bits/byte  %.6f\n", e.loss / log(2) * (double)e.tokens / (double)e.bytes);
    else printf("bits/byte  unknown without a tokenizer\n");
    model_free(model);
}

static std::vector<int> parse_tokens(const std::string& list, int V) {
    std::vector<int> tokens;
    for (const std::string& word : split(list, ',')) {
        bool digits = !word.empty() && word.size() < 10 && word.find_first_not_of("0123456789") == word.npos;
        int token = digits ? atoi(word.c_str()) : V;
        if (token >= V) die("--prompt-tokens: '%s' is not a number from 0 to %d, as in 1,2,3", word.c_str(), V - 1);
        tokens.push_back(token);
    }
    return tokens;
}

static void generate(Options& o, OptionTable& table) {
    if (is_given(table, "prompt") && is_given(table, "prompt-tokens")) die("--prompt or --prompt-tokens, not both");
    ModelFile file = open_weights(o, "generate");
    Tokenizer tokenizer = find_tokenizer(o.tokenizer, {folder_of(o.model)});
    Config c = configure(o, table, GENERATE, &file, tokenizer);
    std::vector<int> prompt;
    if (is_given(table, "prompt-tokens")) {
        prompt = parse_tokens(o.prompt_tokens, c.V);
    } else if (!o.prompt.empty()) {
        prompt = encode(tokenizer, o.prompt);
    } else {
        prompt = {start_token(tokenizer, c.V)};
        if (prompt[0] < 0) die("an empty prompt is an end-of-text token, and none is known here: give --prompt-tokens");
    }
    Workload work = {0, 0, false, 1};
    check_memory(c, o.precision, work, 0);
    Model* model = model_create(c, (Precision)o.precision, work);
    read_parameters(file, model);
    Random r = random_stream((uint64_t)o.seed, SAMPLES);
    Generated g = generate_text(model, c, o, tokenizer, prompt, r);
    fprintf(stderr, "prompt: %s in %.3f s; then %s in %.3f s, %.1f tokens/s\n",
            plural(prompt.size(), "token").c_str(), g.prompt_seconds, plural((size_t)g.tokens, "token").c_str(),
            g.seconds, g.tokens / std::max(g.seconds, 1e-9));
    model_free(model);
}

static void describe(Options& o, OptionTable& table) {
    std::optional<ModelFile> file;
    std::vector<std::string> folders;
    if (!o.model.empty() && !find_shape(o.model)) {
        file = open_weights(o, "describe");
        folders.push_back(folder_of(o.model));
    }
    const ModelFile* from = file ? &*file : nullptr;
    Config c = configure(o, table, DESCRIBE, from, find_tokenizer(o.tokenizer, folders));
    const Workload training = {o.batch, o.sequence, true, 0, o.recompute};
    model_memory(c, (Precision)o.precision, training);  // refuses what cannot be computed, before a line is printed
    printf("%s\n", config_text(c).c_str());
    if (file) {
        State state = read_state(*file);
        printf("%s: version %d, %s, %s\n", o.model.c_str(), file->version, attention_names[file->config.attention],
               state.empty() ? "weights only" : format("checkpoint of step %s", state["step"].c_str()).c_str());
    }

    printf("\n%-10s %-20s %15s   %-18s %s\n", "tensor", "shape", "values", "starts as", "weight decay");
    for (const Tensor& t : tensor_table(c)) {
        std::string shape = t.layers > 1 ? format("%zu x ", t.layers) : "";
        shape += t.cols > 1 ? format("%zu x %zu", t.rows, t.cols) : format("%zu", t.rows);
        std::string initial = t.deviation > 0 ? format("N(0, %.4g)", t.deviation) : format("%g", t.mean);
        printf("%-10s %-20s %15s   %-18s %s\n", t.name, shape.c_str(), commas(t.size()).c_str(), initial.c_str(),
               t.decays ? "yes" : "no");
    }
    size_t n = parameter_count(c), padding = (size_t)(c.Vp - c.V) * (size_t)c.C;
    printf("%-31s %15s   of which %s in wte are padding\n\n", "all", commas(n).c_str(), commas(padding).c_str());

    // What each attention costs
    const Precision precision = (Precision)o.precision;
    Config of[3];
    for (int a : {VANILLA, SKIP, DEPTH}) of[a] = with_attention(c, a, o, from);
    auto row = [&](const std::string& label, auto cell) {
        printf("%-46s", label.c_str());
        for (const Config& a : of) printf(" %12s", cell(a).c_str());
        printf("\n");
    };
    auto memory = [&](const Config& a) { return model_memory(a, precision, training); };
    auto decoding = [&](const Config& a) { return model_memory(a, precision, {0, 0, false, 1}); };
    for (int a : {SKIP, DEPTH}) printf("%s\n", attention_text(of[a]).c_str());
    printf("\n");
    row("", [](const Config& a) { return split(attention_text(a), ':')[0]; });
    row(format("MFLOP a token, forward and backward, T = %d", o.sequence),
        [&](const Config& a) { return format("%.3f", flops_per_token(a, o.sequence) * 1e-6); });
    row("KV cache, bytes a token", [&](const Config& a) { return commas(decoding(a).cache / (size_t)a.maxT); });
    row(format("training, B = %d, T = %d: activations", o.batch, o.sequence),
        [&](const Config& a) { return mebibytes(memory(a).activations); });
    row("    parameters, gradients, moments",
        [&](const Config& a) { return mebibytes(memory(a).parameters + memory(a).gradients + memory(a).moments); });
    row("    all, with scratch", [&](const Config& a) { return mebibytes(memory(a).total()); });
    row("generating: all, with a full cache", [&](const Config& a) { return mebibytes(decoding(a).total()); });
}

static double median(std::vector<double> v) {
    std::sort(v.begin(), v.end());
    return v[v.size() / 2];
}

static double mean(const std::vector<double>& v) {
    double sum = 0;
    for (double x : v) sum += x;
    return sum / (double)v.size();
}

// Where the time of so many steps went: each kind of work, its time a step, and its rate beside the limit that it has,
// which is operations or memory.
static void print_profile(const std::vector<Spent>& before, const std::vector<Spent>& after, double step_seconds,
                          double steps, double peak, double bandwidth) {
    double sum = 0;
    auto row = [&](const char* name, double s, double rate, const char* unit, double limit) {
        printf("    %-14s %9.1f ms %5.1f%%", name, s * 1e3, 100 * s / step_seconds);
        if (limit > 0) printf("  %8.1f %s, %.0f%% of %.0f", rate * 1e-9, unit, 100 * rate / limit, limit * 1e-9);
        printf("\n");
    };
    for (size_t i = 0; i < after.size(); i++) {
        double s = (after[i].seconds - before[i].seconds) / steps;
        double operations = (after[i].flops - before[i].flops) / steps;
        double bytes = (after[i].bytes - before[i].bytes) / steps;
        sum += s;
        if (s == 0) continue;
        if (operations / peak > bytes / bandwidth) row(after[i].name, s, operations / s, "GFLOP/s", peak);
        else row(after[i].name, s, bytes / s, "GB/s", bandwidth);
    }
    row("other", step_seconds - sum, 0, "", 0);
}

static void bench_training(const Options& o, const std::vector<Config>& configs) {
    const Precision precision = (Precision)o.precision;
    const int B = o.batch, T = o.sequence, steps = o.steps > 0 ? o.steps : 5;
    Random r = random_stream((uint64_t)o.seed, SAMPLES);
    std::vector<int> x((size_t)B * (size_t)T), y(x.size());
    for (std::vector<int>* tokens : {&x, &y})
        for (int& t : *tokens) t = (int)r.below((uint64_t)configs[0].V);
    printf("\ntraining: batch %d, sequence %d; %d steps after one to warm up\n", B, T, steps);
    printf("%-12s %9s %9s %10s %9s %9s %9s\n", "attention", "ms/step", "best", "tokens/s", "GFLOP/s", "of peak", "MiB");
    const double bandwidth = o.profile ? device_bandwidth(true) : 0;
    for (const Config& c : configs) {
        device_most_memory();
        Model* model = model_create(c, precision, {B, T, true, 0, o.recompute});
        initialize_parameters(model, c, (uint64_t)o.seed);
        std::vector<double> times, peaks;
        std::vector<Spent> before;
        for (int step = 0; step <= steps; step++) {
            peaks.push_back(device_peak(precision));
            double start = seconds();
            model_set_inputs(model, x.data(), y.data());
            model_forward(model, true, 1);
            model_backward(model);
            model_update(model, {1e-4f, 0.9f, 0.95f, 1e-8f, 0.1f}, 1, step + 1);
            model_loss(model);
            if (step > 0) times.push_back(seconds() - start);
            else if (o.profile) before = model_profile();
        }
        std::vector<Spent> after = o.profile ? model_profile() : before;
        model_free(model);
        double time = median(times), peak = median(peaks);
        double best = *std::min_element(times.begin(), times.end());
        double tokens = (double)B * T, flops = flops_per_token(c, T) * tokens;
        printf("%-12s %9.2f %9.2f %10.1f %9.1f %8.1f%% %9.0f\n", split(attention_text(c), ':')[0].c_str(), time * 1e3,
               best * 1e3, tokens / time, flops / time * 1e-9, 100 * flops / time / peak, device_most_memory());
        if (o.profile) print_profile(before, after, mean(times), steps, peak, bandwidth);
        fflush(stdout);
    }
}

// A prompt that all but fills the context, then one token at a time. Each of these reads the weights that it uses once,
// and all of the cache, so reading memory is the limit.
static void bench_decoding(const Options& o, const std::vector<Config>& configs, int n) {
    const Precision precision = (Precision)o.precision;
    const int maxT = configs[0].maxT, prompt = maxT - n;
    Random r = random_stream((uint64_t)o.seed, SAMPLES);
    std::vector<int> tokens((size_t)maxT);
    for (int& t : tokens) t = (int)r.below((uint64_t)configs[0].V);
    std::vector<float> logits((size_t)configs[0].V);
    printf("\ngenerating: a prompt of %s, then %d one by one\n", plural((size_t)prompt, "token").c_str(), n);
    printf("%-12s %16s %10s %10s %9s %11s\n", "attention", "prompt, tokens/s", "ms/token", "tokens/s", "GB/s",
           "of reading");
    for (const Config& c : configs) {
        const Workload work = {0, 0, false, 1};
        const Memory memory = check_memory(c, precision, work, device_bandwidth_memory());
        Model* model = model_create(c, precision, work);
        initialize_parameters(model, c, (uint64_t)o.seed);
        std::vector<double> times, bandwidths, prompt_times;
        for (int round = 0; round < 4; round++) {  // the first warms up
            model_reset_cache(model);
            double start = seconds();
            model_prompt(model, tokens.data(), prompt, logits.data());
            if (round > 0) prompt_times.push_back(seconds() - start);
        }
        std::vector<Spent> before = o.profile ? model_profile() : std::vector<Spent>();
        for (int i = prompt; i < maxT; i++) {
            if ((i - prompt) % 16 == 0) bandwidths.push_back(device_bandwidth(false));
            double start = seconds();
            model_decode(model, &tokens[(size_t)i], logits.data());
            times.push_back(seconds() - start);
        }
        std::vector<Spent> after = o.profile ? model_profile() : before;
        model_free(model);
        size_t read = parameter_count(c) - (size_t)(c.maxT + c.Vp - c.V) * c.C;
        for (int l = 0; l < c.L; l++) read -= 2 * (size_t)(c.C - kv_channels(c, l)) * c.C;
        double bytes = read * (precision == BF16 ? 2.0 : 4.0) + (double)memory.cache / maxT * (prompt + n / 2);
        double time = median(times), rate = bytes / time;
        printf("%-12s %16.1f %10.2f %10.1f %9.1f %10.1f%%\n", split(attention_text(c), ':')[0].c_str(),
               prompt / median(prompt_times), time * 1e3, 1 / time, rate * 1e-9, 100 * rate / median(bandwidths));
        if (o.profile) print_profile(before, after, mean(times), n, device_peak(precision), median(bandwidths));
        fflush(stdout);
    }
}

static void bench(Options& o, OptionTable& table) {
    if (!o.model.empty() && !find_shape(o.model)) die("bench takes a shape, not the file --model %s", o.model.c_str());
    const Config shape = configure(o, table, BENCH, nullptr, find_tokenizer(o.tokenizer, {}));
    std::vector<Config> configs;
    for (int a : {VANILLA, SKIP, DEPTH})
        if (!is_given(table, "attention") || a == o.attention) configs.push_back(with_attention(shape, a, o, nullptr));
    int tokens = is_given(table, "tokens") ? o.tokens : shape.maxT / 16;
    if (tokens >= shape.maxT) die("--tokens %d leave no room for a prompt in a context of %d", tokens, shape.maxT);
    const Precision precision = (Precision)o.precision;
    for (const Config& c : configs)
        check_memory(c, precision, {o.batch, o.sequence, true, 0, o.recompute}, device_peak_memory(precision));
    printf("%s\n%s, %s\n", config_text(shape).c_str(), precision_names[precision], device_name().c_str());
    bench_training(o, configs);
    if (tokens > 0) bench_decoding(o, configs, tokens);
}

// --------------------------------------------------------------------------------------------------------------------
// The command line

[[maybe_unused]] static int run_program(int argc, char** argv) {
    const char* program = argv[0];
    for (int fd = 0; fd < 3; fd++)  // lest a file of ours become standard output where that is closed
        if (fcntl(fd, F_GETFD) < 0 && open("/dev/null", O_RDONLY) != fd) return 1;
    setvbuf(stdout, nullptr, _IOLBF, 0);  // so that lines show at once in a pipe too
    signal(SIGXFSZ, SIG_IGN);  // a file size limit is an error of the write, not the end of the process
    Options o;
    OptionTable table = option_table(o);
    std::string word = argc > 1 ? argv[1] : "";
    const Command* command = nullptr;
    std::vector<std::string> names;
    for (const Command& c : commands) {
        names.push_back(c.name);
        if (word == c.name) command = &c;
    }
    if (word.empty() || is_help(word)) {
        print_help(word.empty() ? stderr : stdout, program, table, nullptr);
        return word.empty();
    }
    if (!command && word[0] == '-') die("a command stands first: %s train, eval, generate, describe or bench", program);
    if (!command)
        die("there is no command %s; %s", word.c_str(),
            did_you_mean(word, names, "", format("see %s --help", program)).c_str());
    if (!parse_options(table, *command, argc, argv)) {
        print_help(stdout, program, table, command);
        return 0;
    }

    device_init(argv, command->bit != DESCRIBE);
    switch (command->bit) {
        case TRAIN: train(o, table, program); break;
        case EVAL: eval(o, table); break;
        case GENERATE: generate(o, table); break;
        case BENCH: bench(o, table); break;
        default: describe(o, table);
    }
    if (command->bit != TRAIN && (fflush(stdout) != 0 || ferror(stdout))) die("standard output could not be written");
    return 0;
}

#ifndef GPT2_NO_MAIN
int main(int argc, char** argv) { return run_program(argc, argv); }
#endif
