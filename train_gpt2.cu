/*
train_gpt2.cu: GPT-2 on an NVIDIA GPU.

The program is that of train_gpt2.cpp, which is included here without its CPU model. What follows is the same model for
a GPU: the same layers, under the same names and in the same order, so that the two read side by side. A layer's
function here is a launcher; its kernel stands right above it. Formulas are derived in train_gpt2.cpp, under the same
headings; here stands which thread does what.

    make train_gpt2cu && ./train_gpt2cu --help           needs nvcc, and a GPU of compute capability 8.0 or later
    make train_gpt2cu_emulated                           runs the same kernels on a CPU, slowly: for tests

Contents
     numbers · where the time goes · matmul · linear layers · embedding · LayerNorm · attention, skip and depth ·
     classifier · AdamW · the model, forward, backward · decoding · the machine

B, T, C, NH, HS, L, V, Vp, maxT are as in train_gpt2.cpp. Arrays in comments are row-major, in device memory.
*/

#ifndef GPT2_CUDA
#define GPT2_CUDA
#endif
#include "train_gpt2.cpp"
#ifndef GPT2_EMULATED  // else the emulator stands in their place (dev/emulator)
#include <cublasLt.h>
#include <cuda_bf16.h>
#include <cuda_runtime.h>
#endif

// ====================================================================================================================
// 3 · The GPU model
//
// Every result is the same to the bit from run to run: each element is written by one thread and summed in one fixed
// order. There are no atomic operations.
//
// Layers are templates over X, the type that weights and activations are kept in: float, or bf16 (--precision bf16).
// Either way arithmetic is in float, on tensor cores with sums in float: a bf16 converts when it is read, and rounds
// when it is written.
//
// Everything runs on one stream, in order, but for batches, which come in on a second one. The CPU queues a whole step
// - forward, backward, update - and the next batch, and waits only where it needs a result: the norm and the loss.

// --------------------------------------------------------------------------------------------------------------------
// Numbers

using bf16 = __nv_bfloat16;

// Every call of CUDA goes through CHECK. What a user can mend, like lack of memory, is asked for where it arises.
static void check(cudaError_t error, const char* call, int line) {
    if (error != cudaSuccess)
        die("the GPU failed: %s: %s (%s, train_gpt2.cu:%d)", cudaGetErrorName(error), cudaGetErrorString(error), call,
            line);
}
#define CHECK(call) check((call), #call, __LINE__)

// The GPU, and the streams of work: all of it goes to `stream`, but for batches, which come in on `copies`.
struct Gpu {
    std::string name;
    int multiprocessors, major;          // major: of its compute capability
    size_t in_use = 0, most_in_use = 0;  // bytes of models
    cudaStream_t stream, copies;
};
static Gpu gpu;

constexpr int WARP = 32;
constexpr unsigned ALL_LANES = 0xffffffff;

// Rows are read and written in shares: 8 values a thread, from a row of n values that `lanes` threads share out among
// themselves. Where VECTORS, these are 8 neighbours ("blocked"), in accesses of 16 bytes; this takes an n and distances
// between rows that are multiples of 8. Elsewhere they lie `lanes` apart ("striped"). Past n is 0 when read, and not
// written.
constexpr int SHARE = 8;

template <class X>
struct alignas(16) Vector {
    X values[SHARE];
};

template <bool VECTORS>
__device__ inline int position(int i, int lane, int lanes) {  // in the row, of a share's i-th value
    return VECTORS ? lane * SHARE + i : i * lanes + lane;
}

template <bool VECTORS, class X>
__device__ inline void load(float (&share)[SHARE], const X* row, int lane, int lanes, int n) {
    if constexpr (VECTORS) {
        if (lane * SHARE >= n) {
#pragma unroll
            for (int i = 0; i < SHARE; i++) share[i] = 0;
            return;
        }
        const Vector<X> vector = *(const Vector<X>*)(row + lane * SHARE);
#pragma unroll
        for (int i = 0; i < SHARE; i++) share[i] = (float)vector.values[i];
    } else {
#pragma unroll
        for (int i = 0; i < SHARE; i++) {
            int at = position<VECTORS>(i, lane, lanes);
            share[i] = at < n ? (float)row[at] : 0.0f;
        }
    }
}

template <bool VECTORS, class X>
__device__ inline void store(X* row, const float (&share)[SHARE], int lane, int lanes, int n) {
    if constexpr (VECTORS) {
        if (lane * SHARE >= n) return;
        Vector<X> vector;
#pragma unroll
        for (int i = 0; i < SHARE; i++) vector.values[i] = (X)share[i];
        *(Vector<X>*)(row + lane * SHARE) = vector;
    } else {
#pragma unroll
        for (int i = 0; i < SHARE; i++) {
            int at = position<VECTORS>(i, lane, lanes);
            if (at < n) row[at] = (X)share[i];
        }
    }
}

// Whether rows of such lengths and distances can be read as vectors: all multiples of 8. So must be the place where a
// row begins, which is the address counted in elements.
template <class... Sizes>
static bool vectors(Sizes... sizes) {
    return ((sizes % SHARE == 0) && ...);
}
template <class X>
static size_t elements_before(const X* p) {
    return (size_t)(uintptr_t)p / sizeof(X);
}

constexpr int WARP_SHARE = WARP * SHARE;  // a warp goes through longer rows in so long pieces

// Over groups of `lanes` neighbouring threads, a power of two; each of them has the result.
__device__ inline float sum_over(float x, int lanes = WARP) {
    for (int distance = lanes / 2; distance > 0; distance /= 2) x += __shfl_xor_sync(ALL_LANES, x, distance);
    return x;
}
__device__ inline float maximum_over(float x, int lanes = WARP) {
    for (int distance = lanes / 2; distance > 0; distance /= 2)
        x = fmaxf(x, __shfl_xor_sync(ALL_LANES, x, distance));
    return x;
}

// Where a head of a token has a group of lanes: as many (a power of two) as its HS channels need, neighbours in a warp,
// which sum up a dot product together. All of a warp's groups take part in that to the end; for those past the last
// head it is all zeros, and they store nothing. Tokens · NH is less than 2³² (create).
constexpr int HEAD_SIZE_MOST = WARP_SHARE, HEADS_BLOCK = 128;

static int lanes_of_head(size_t HS) { return (int)std::bit_ceil(ceil_div(HS, SHARE)); }

struct HeadGroup {
    int lane;  // in its group
    bool inside;
    size_t r;  // token
    int h;

    __device__ HeadGroup(int lanes, size_t rows, int NH) {
        const unsigned group = blockIdx.x * (blockDim.x / lanes) + threadIdx.x / lanes, last = (unsigned)rows * NH - 1;
        const unsigned at = min(group, last);
        lane = threadIdx.x % lanes;
        inside = group <= last;
        r = at / NH;
        h = (int)(at % NH);
    }
};

static unsigned head_groups_grid(size_t rows, size_t NH, int lanes) {
    return (unsigned)ceil_div(rows * NH * lanes, HEADS_BLOCK);
}

// out (n) = or += Σ over runs of partial (runs, n), in a fixed order: warp w of a block, of up to 32, sums up the runs
// w, w + warps, ...; then the warps' sums are added up. A block has 32 columns. Where there is a second output, partial
// is (runs, 2, n).
__global__ void sum_partials_kernel(float* out, float* second, const float* partial, int runs, int n, bool accumulate) {
    __shared__ float sums[WARP][WARP];
    const int i = blockIdx.x * WARP + threadIdx.x;
    float sum = 0;
    for (int run = threadIdx.y; run < runs; run += blockDim.y)
        if (i < n) sum += partial[((size_t)run * gridDim.y + blockIdx.y) * n + i];
    sums[threadIdx.y][threadIdx.x] = sum;
    __syncthreads();
    if (threadIdx.y > 0 || i >= n) return;
    float total = 0;
    for (int w = 0; w < (int)blockDim.y; w++) total += sums[w][threadIdx.x];
    if (blockIdx.y == 1) out = second;
    out[i] = accumulate ? out[i] + total : total;
}

static void sum_partials(float* out, float* second, const float* partial, size_t runs, size_t n, bool accumulate) {
    dim3 grid((unsigned)ceil_div(n, WARP), second ? 2 : 1), block(WARP, (unsigned)std::min<size_t>(WARP, runs));
    sum_partials_kernel<<<grid, block, 0, gpu.stream>>>(out, second, partial, (int)runs, (int)n, accumulate);
    CHECK(cudaGetLastError());
}

// to (n) = from (n), in another type
template <class To, class From>
__global__ void convert_kernel(To* to, const From* from, size_t n) {
    size_t i = (size_t)blockIdx.x * blockDim.x + threadIdx.x;
    if (i < n) to[i] = (To)(float)from[i];
}

template <class To, class From>
static void convert(To* to, const From* from, size_t n) {
    constexpr int BLOCK = 256;
    convert_kernel<To, From><<<(unsigned)ceil_div(n, BLOCK), BLOCK, 0, gpu.stream>>>(to, from, n);
    CHECK(cudaGetLastError());
}

// --------------------------------------------------------------------------------------------------------------------
// Where the time goes
//
// The GPU notes the time at the begin and end of each layer function, once somebody has asked for a profile.

struct Span {
    Part part;
    cudaEvent_t begin, end;
};
static std::array<Span, 1024> spans;
static size_t spans_used = 0;
static bool profiling = false;

static void collect_spans() {
    CHECK(cudaStreamSynchronize(gpu.stream));
    for (size_t i = 0; i < spans_used; i++) {
        float milliseconds;
        CHECK(cudaEventElapsedTime(&milliseconds, spans[i].begin, spans[i].end));
        profile[spans[i].part].seconds += milliseconds * 1e-3;
    }
    spans_used = 0;
}

static std::vector<Spent> model_profile() {
    if (!std::exchange(profiling, true))
        for (Span& span : spans) {
            CHECK(cudaEventCreateWithFlags(&span.begin, cudaEventDefault));
            CHECK(cudaEventCreateWithFlags(&span.end, cudaEventDefault));
        }
    collect_spans();
    return {profile, profile + PARTS};
}

struct Timed {
    static inline Timed* outermost = nullptr;
    Part part;
    Span* span = nullptr;

    Timed(Part p, double flops, double bytes) : part(outermost ? outermost->part : p) {
        profile[part].flops += flops;
        profile[part].bytes += bytes;
        if (outermost) return;
        outermost = this;
        if (!profiling) return;
        if (spans_used == spans.size()) collect_spans();
        span = &spans[spans_used++];
        span->part = part;
        CHECK(cudaEventRecord(span->begin, gpu.stream));
    }
    ~Timed() {
        if (span) CHECK(cudaEventRecord(span->end, gpu.stream));
        if (outermost == this) outermost = nullptr;
    }
};

// --------------------------------------------------------------------------------------------------------------------
// Matmul: C (M, N) = A (M, K) B (K, N)
//
// cuBLASLt does it. One routine serves all three products of a linear layer y = x wᵀ, as on the CPU:
//     forward    y (rows, OC)  = x (rows, C)       wᵀ (C, OC)
//     backward   dx (rows, C)  = dy (rows, OC)     w (OC, C)
//                dw (OC, C)   += dyᵀ (OC, rows)    x (rows, C)

static int alignment_of(const void* p) {  // bytes, up to the 256 that cuBLASLt takes for granted unless told
    uintptr_t low = (uintptr_t)p & 255;
    return low ? (int)(low & -low) : 256;
}

// An operand's element (i, k) is data[i·stride + k] where k is the contiguous index, else data[k·stride + i];
// i is a row of A or a column of B, k is what the product sums over.
template <class X>
struct Operand {
    const X* data;
    size_t stride;
    bool along_k;
};
template <class X> static Operand<X> along_k(const X* data, size_t stride) { return {data, stride, true}; }
template <class X> static Operand<X> across_k(const X* data, size_t stride) { return {data, stride, false}; }

// Scratch memory of matmul.
struct Workspace {
    char* data;
    size_t size;
};
constexpr size_t WORKSPACE = 32 << 20;  // as NVIDIA advises for its Hopper GPUs

#ifndef GPT2_EMULATED  // the emulator has the same two
enum class MatmulType { FP32, BF16 };
enum class Epilogue { NONE, BIAS, GELU_AUX_BIAS, DGELU };

static void check(cublasStatus_t status, const char* call, int line) {
    if (status != CUBLAS_STATUS_SUCCESS)
        die("cuBLASLt failed: %s (%s, train_gpt2.cu:%d)", cublasLtGetStatusName(status), call, line);
}

// All that cuBLASLt's choice of an algorithm may depend on, and that choice.
struct MatmulShape {
    MatmulType d_type, ab_type;
    Epilogue epilogue;
    int transA, transB, m, n, k, lda, ldb, ldd, add;
    int align_A, align_B, align_C, align_D, align_bias, align_aux;

    bool operator==(const MatmulShape&) const = default;
};
struct MatmulPlan {
    MatmulShape shape;
    cublasLtMatmulDesc_t operation;
    cublasLtMatrixLayout_t A, B, D;
    cublasLtMatmulAlgo_t algorithm;
    bool possible;  // cuBLASLt has an algorithm
};

template <class Attribute, class Value>
static void set(cublasLtMatmulDesc_t operation, Attribute attribute, Value value) {
    CHECK(cublasLtMatmulDescSetAttribute(operation, attribute, &value, sizeof value));
}

static cublasLtHandle_t cublas_handle() {
    static cublasLtHandle_t handle = [] {
        cublasLtHandle_t h;
        CHECK(cublasLtCreate(&h));
        return h;
    }();
    return handle;
}

// The first algorithm that cuBLASLt proposes: always the same one, so that runs repeat to the bit. Partial sums over k
// may be added up in another pass, but only in fp32.
static MatmulPlan plan_matmul(const MatmulShape& s, const void* bias, void* aux) {
    const cudaDataType types[] = {CUDA_R_32F, CUDA_R_16BF};
    const cublasLtEpilogue_t epilogues[] = {CUBLASLT_EPILOGUE_DEFAULT, CUBLASLT_EPILOGUE_BIAS,
                                            CUBLASLT_EPILOGUE_GELU_AUX_BIAS, CUBLASLT_EPILOGUE_DGELU};
    MatmulPlan plan = {};
    plan.shape = s;
    // fp32 sums, and fp32 products where the operands are fp32: never TF32
    CHECK(cublasLtMatmulDescCreate(&plan.operation, CUBLAS_COMPUTE_32F, CUDA_R_32F));
    set(plan.operation, CUBLASLT_MATMUL_DESC_TRANSA, s.transA ? CUBLAS_OP_T : CUBLAS_OP_N);
    set(plan.operation, CUBLASLT_MATMUL_DESC_TRANSB, s.transB ? CUBLAS_OP_T : CUBLAS_OP_N);
    set(plan.operation, CUBLASLT_MATMUL_DESC_EPILOGUE, epilogues[(int)s.epilogue]);
    if (bias) {
        set(plan.operation, CUBLASLT_MATMUL_DESC_BIAS_POINTER, bias);  // its alignment counts in the choice
        set(plan.operation, CUBLASLT_MATMUL_DESC_BIAS_DATA_TYPE, types[(int)s.d_type]);
    }
    if (aux) {
        set(plan.operation, CUBLASLT_MATMUL_DESC_EPILOGUE_AUX_POINTER, aux);
        set(plan.operation, CUBLASLT_MATMUL_DESC_EPILOGUE_AUX_LD, (int64_t)s.ldd);
        set(plan.operation, CUBLASLT_MATMUL_DESC_EPILOGUE_AUX_DATA_TYPE, types[(int)s.d_type]);
    }
    uint64_t A_rows = s.transA ? s.k : s.m, A_columns = s.transA ? s.m : s.k;
    uint64_t B_rows = s.transB ? s.n : s.k, B_columns = s.transB ? s.k : s.n;
    CHECK(cublasLtMatrixLayoutCreate(&plan.A, types[(int)s.ab_type], A_rows, A_columns, s.lda));
    CHECK(cublasLtMatrixLayoutCreate(&plan.B, types[(int)s.ab_type], B_rows, B_columns, s.ldb));
    CHECK(cublasLtMatrixLayoutCreate(&plan.D, types[(int)s.d_type], s.m, s.n, s.ldd));

    cublasLtMatmulPreference_t preference;
    CHECK(cublasLtMatmulPreferenceCreate(&preference));
    auto prefer = [&](cublasLtMatmulPreferenceAttributes_t attribute, auto value) {
        CHECK(cublasLtMatmulPreferenceSetAttribute(preference, attribute, &value, sizeof value));
    };
    prefer(CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES, (uint64_t)WORKSPACE);
    prefer(CUBLASLT_MATMUL_PREF_REDUCTION_SCHEME_MASK, (uint32_t)CUBLASLT_REDUCTION_SCHEME_COMPUTE_TYPE);
    prefer(CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_A_BYTES, (uint32_t)s.align_A);
    prefer(CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_B_BYTES, (uint32_t)s.align_B);
    prefer(CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_C_BYTES, (uint32_t)s.align_C);
    prefer(CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_D_BYTES, (uint32_t)s.align_D);
    cublasLtMatmulHeuristicResult_t result;
    int found = 0;
    plan.possible = cublasLtMatmulAlgoGetHeuristic(cublas_handle(), plan.operation, plan.A, plan.B, plan.D, plan.D,
                                                   preference, 1, &result, &found) == CUBLAS_STATUS_SUCCESS &&
                    found && result.state == CUBLAS_STATUS_SUCCESS;
    CHECK(cublasLtMatmulPreferenceDestroy(preference));
    plan.algorithm = result.algo;
    return plan;
}

// D = epilogue(op(A) op(B) + C), column by column as in BLAS; C, if there is one, has D's type and distance of columns.
// False where cuBLASLt does not have this.
static bool matmul_cublaslt(const Workspace& ws, void* D, MatmulType d_type, const void* A, bool transA, const void* B,
                            bool transB, MatmulType ab_type, int m, int n, int k, int lda, int ldb, int ldd,
                            const void* C, Epilogue epilogue, const void* bias, void* aux) {
    const MatmulShape shape = {d_type, ab_type, epilogue, transA, transB, m, n, k, lda, ldb, ldd, C != nullptr,
                               alignment_of(A), alignment_of(B), alignment_of(C ? C : D), alignment_of(D),
                               alignment_of(bias), alignment_of(aux)};
    // A model has some twenty shapes, or some in each layer where layers begin at odd places. Those of decoding differ
    // from prompt to prompt; the oldest make room.
    static std::array<MatmulPlan, 1024> plans;
    static size_t made = 0;
    MatmulPlan* plan = std::find_if(plans.data(), plans.data() + std::min(made, plans.size()),
                                    [&](const MatmulPlan& p) { return p.shape == shape; });
    if (plan == plans.data() + std::min(made, plans.size())) {
        plan = &plans[made++ % plans.size()];
        if (made > plans.size()) {
            CHECK(cublasLtMatmulDescDestroy(plan->operation));
            for (cublasLtMatrixLayout_t layout : {plan->A, plan->B, plan->D})
                CHECK(cublasLtMatrixLayoutDestroy(layout));
        }
        *plan = plan_matmul(shape, bias, aux);
    }
    if (!plan->possible) return false;
    if (bias) set(plan->operation, CUBLASLT_MATMUL_DESC_BIAS_POINTER, bias);
    if (aux) set(plan->operation, CUBLASLT_MATMUL_DESC_EPILOGUE_AUX_POINTER, aux);
    const float one = 1, beta = C ? 1 : 0;
    CHECK(cublasLtMatmul(cublas_handle(), plan->operation, &one, A, plan->A, B, plan->B, &beta, C ? C : D, plan->D, D,
                         plan->D, &plan->algorithm, ws.data, ws.size, gpu.stream));
    return true;
}
#endif

template <class X> constexpr MatmulType MATMUL_TYPE = std::is_same_v<X, float> ? MatmulType::FP32 : MatmulType::BF16;

// What happens to the product before it is stored: y = epilogue(product + add), with a bias (N) or an aux (M, N).
template <class Y>
struct Finish {
    const Y* add = nullptr;
    Epilogue epilogue = Epilogue::NONE;
    const Y* bias = nullptr;
    Y* aux = nullptr;
};

static bool fuses = true;  // a test turns it off, as if cuBLASLt had the plain product alone

// Y (M, N), rows ldy apart. To cuBLASLt, which counts columns first, this is Yᵀ (N, M) = Bᵀ (N, K) Aᵀ (K, M).
// False where cuBLASLt does not have this: it lacks some epilogues, sizes or alignments on some GPUs.
template <class X, class Y>
static bool try_matmul(const Workspace& ws, Y* y, size_t ldy, size_t M, size_t N, size_t K, Operand<X> A, Operand<X> B,
                       Finish<Y> finish) {
    // Some of its kernels read a bias 16 bytes at a time, wherever it lies.
    if (finish.epilogue != Epilogue::NONE && (!fuses || alignment_of(finish.bias) < 16)) return false;
    Timed timed(MATMUL, 0, 0);
#ifdef GPT2_EMULATED
    (void)ws;
    if (finish.add && finish.add != y)
        CHECK(cudaMemcpyAsync(y, finish.add, M * ldy * sizeof(Y), cudaMemcpyDeviceToDevice, gpu.stream));
    CHECK(emulated_matmul(y, MATMUL_TYPE<Y>, B.data, B.along_k, A.data, !A.along_k, (int)N, (int)M, (int)K,
                          (int)B.stride, (int)A.stride, (int)ldy, finish.add != nullptr, finish.epilogue, finish.bias,
                          finish.aux, gpu.stream, MATMUL_TYPE<X>));
#else
    if (!matmul_cublaslt(ws, y, MATMUL_TYPE<Y>, B.data, B.along_k, A.data, !A.along_k, MATMUL_TYPE<X>, (int)N, (int)M,
                         (int)K, (int)B.stride, (int)A.stride, (int)ldy, finish.add, finish.epilogue, finish.bias,
                         finish.aux))
        return false;
#endif
    profile[timed.part].flops += 2.0 * M * N * K;
    profile[timed.part].bytes += (1.0 * M * K + 1.0 * N * K + 1.0 * M * N) * sizeof(X);
    return true;
}

// y = A B, plus `add`, if there is one, which may be y
template <class X, class Y>
static void matmul(const Workspace& ws, Y* y, size_t ldy, size_t M, size_t N, size_t K, Operand<X> A, Operand<X> B,
                   const Y* add = nullptr) {
    if (!try_matmul<X, Y>(ws, y, ldy, M, N, K, A, B, {.add = add}))
        die("cuBLASLt has no product of %zu x %zu x %zu here: try another --precision", M, N, K);
}

// --------------------------------------------------------------------------------------------------------------------
// Linear layers: y = x wᵀ + b, with w (OC, C) and `rows` tokens
//
// The three forward variants differ in what happens to the product before it is stored. ldy is the distance between
// rows of y: a layer may write some columns of a wider array. x (rows, C), b (OC), y (rows, OC).

// y (rows, OC), ldy apart, += b, where cuBLASLt cannot do it on the way. One thread a value
template <class X>
__global__ void bias_forward_kernel(X* y, const X* b, size_t rows, size_t OC, size_t ldy) {
    const size_t i = (size_t)blockIdx.x * blockDim.x + threadIdx.x;
    if (i >= rows * OC) return;
    X* to = y + i / OC * ldy + i % OC;
    *to = (X)((float)*to + (float)b[i % OC]);
}

template <class X>
static void linear_forward(const Workspace& ws, X* y, const X* x, const X* w, const X* b, size_t rows, size_t C,
                           size_t OC, size_t ldy, const X* residual = nullptr) {
    constexpr int BLOCK = 256;
    Timed timed(MATMUL, 0, 0);
    if (try_matmul<X, X>(ws, y, ldy, rows, OC, C, along_k(x, C), along_k(w, C),
                         {.add = residual, .epilogue = Epilogue::BIAS, .bias = b}))
        return;
    matmul<X, X>(ws, y, ldy, rows, OC, C, along_k(x, C), along_k(w, C), residual);
    bias_forward_kernel<X><<<(unsigned)ceil_div(rows * OC, BLOCK), BLOCK, 0, gpu.stream>>>(y, b, rows, OC, ldy);
    CHECK(cudaGetLastError());
}

// y = residual + (x wᵀ + b); y may be the residual itself
template <class X>
static void linear_residual_forward(const Workspace& ws, X* y, const X* residual, const X* x, const X* w, const X* b,
                                    size_t rows, size_t C, size_t OC) {
    linear_forward(ws, y, x, w, b, rows, C, OC, OC, residual);
}

// GELU as x σ(2u), and its derivative
__device__ inline float gelu(float x) {
    float z = 2.0f * 0.7978845608f * (x + 0.044715f * x * x * x);
    return x / (1.0f + expf(-z));
}

__device__ inline float gelu_derivative(float x) {
    float z = 2.0f * 0.7978845608f * (x + 0.044715f * x * x * x);
    float dz = 2.0f * 0.7978845608f * (1.0f + 3.0f * 0.044715f * x * x);
    float s = 1.0f / (1.0f + expf(-z));
    return s + x * s * (1.0f - s) * dz;
}

// Whether cuBLASLt does GELU and its derivative on the way: on tensor cores, with rows of whole vectors, and as fast as
// without them on Hopper GPUs and later.
template <class X>
static bool fuses_gelu(size_t OC) {
    return std::is_same_v<X, bf16> && vectors(OC) && gpu.major >= 9;
}

// y (n) = gelu(h), one thread a share
template <bool VECTORS, class X>
__global__ void gelu_forward_kernel(X* y, const X* h, size_t n) {
    size_t i = ((size_t)blockIdx.x * blockDim.x + threadIdx.x) * SHARE;
    float share[SHARE];
    int left = i < n ? (int)min((size_t)SHARE, n - i) : 0;
    load<VECTORS>(share, h + i, 0, 1, left);
#pragma unroll
    for (int j = 0; j < SHARE; j++) share[j] = gelu(share[j]);
    store<VECTORS>(y + i, share, 0, 1, left);
}

template <class X>
static void gelu_forward(X* y, const X* h, size_t n) {
    constexpr int BLOCK = 128;
    auto kernel = vectors(n, elements_before(y), elements_before(h)) ? gelu_forward_kernel<true, X>
                                                                     : gelu_forward_kernel<false, X>;
    kernel<<<(unsigned)ceil_div(n, SHARE * BLOCK), BLOCK, 0, gpu.stream>>>(y, h, n);
    CHECK(cudaGetLastError());
}

// dh (n) *= gelu'(h), one thread a value
template <class X>
__global__ void gelu_backward_kernel(X* dh, const X* h, size_t n) {
    size_t i = (size_t)blockIdx.x * blockDim.x + threadIdx.x;
    if (i < n) dh[i] = (X)((float)dh[i] * gelu_derivative((float)h[i]));
}

template <class X>
static void gelu_backward(X* dh, const X* h, size_t n) {
    constexpr int BLOCK = 256;
    gelu_backward_kernel<X><<<(unsigned)ceil_div(n, BLOCK), BLOCK, 0, gpu.stream>>>(dh, h, n);
    CHECK(cudaGetLastError());
}

// h = x wᵀ + b, y = gelu(h)
template <class X>
static void linear_gelu_forward(const Workspace& ws, X* y, X* h, const X* x, const X* w, const X* b, size_t rows,
                                size_t C, size_t OC) {
    Timed timed(MATMUL, 0, 0);
    if (fuses_gelu<X>(OC) && try_matmul<X, X>(ws, y, OC, rows, OC, C, along_k(x, C), along_k(w, C),
                                              {.epilogue = Epilogue::GELU_AUX_BIAS, .bias = b, .aux = h}))
        return;
    linear_forward(ws, h, x, w, b, rows, C, OC, OC);
    gelu_forward(y, h, rows * OC);
}

// dx = dy w. Where dy and w come in pieces, a few columns of dy and as many rows of w, dx_sum (rows, C) gathers what
// they give, in fp32, and the last one writes dx.
template <class X>
static void linear_backward_input(const Workspace& ws, X* dx, const X* dy, const X* w, size_t rows, size_t C, size_t OC,
                                  size_t lddy, float* dx_sum = nullptr, bool first = true, bool last = true) {
    Timed timed(MATMUL_DX, 0, 0);
    if (first && last) return matmul<X, X>(ws, dx, C, rows, C, OC, along_k(dy, lddy), across_k(w, C));
    matmul<X, float>(ws, dx_sum, C, rows, C, OC, along_k(dy, lddy), across_k(w, C), first ? nullptr : dx_sum);
    if (last) convert(dx, dx_sum, rows * C);
}

// The same through the GELU that made the layer's input from h: dh = (dy w) gelu'(h)
template <class X>
static void linear_gelu_backward_input(const Workspace& ws, X* dh, const X* h, const X* dy, const X* w, size_t rows,
                                       size_t C, size_t OC) {
    Timed timed(MATMUL_DX, 0, 0);
    if (fuses_gelu<X>(C) && try_matmul<X, X>(ws, dh, C, rows, C, OC, along_k(dy, OC), across_k(w, C),
                                             {.epilogue = Epilogue::DGELU, .aux = const_cast<X*>(h)}))
        return;
    linear_backward_input(ws, dh, dy, w, rows, C, OC, OC);
    gelu_backward(dh, h, rows * C);
}

// Σ over the warps of a block, in order, of their shares of WARP_SHARE columns. A thread receives the sum of the column
// that has its number.
constexpr int SUM_WARPS = WARP_SHARE / WARP;

template <bool VECTORS>
__device__ inline float sum_over_warps(const float (&sum)[SHARE]) {
    __shared__ alignas(16) float sums[SUM_WARPS][WARP_SHARE];
    store<VECTORS>(sums[threadIdx.y], sum, threadIdx.x, WARP, WARP_SHARE);
    __syncthreads();
    float total = 0;
    for (int w = 0; w < SUM_WARPS; w++) total += sums[w][threadIdx.y * WARP + threadIdx.x];
    return total;
}

// partial (runs, OC): Σ of dy over the tokens of a run. A block has a run and 256 columns; its warps take turns with
// the tokens, and a thread has a share of the columns.
constexpr int BIAS_RUN = 256;

template <bool VECTORS, class X>
__global__ void bias_backward_kernel(float* partial, const X* dy, size_t rows, int OC, size_t lddy) {
    const int lane = threadIdx.x, warp = threadIdx.y, column = blockIdx.y * WARP_SHARE;
    const size_t begin = (size_t)blockIdx.x * BIAS_RUN, end = min(rows, begin + BIAS_RUN);
    float sum[SHARE] = {}, share[SHARE];
    for (size_t r = begin + warp; r < end; r += SUM_WARPS) {
        load<VECTORS>(share, dy + r * lddy + column, lane, WARP, OC - column);
#pragma unroll
        for (int i = 0; i < SHARE; i++) sum[i] += share[i];
    }
    const float total = sum_over_warps<VECTORS>(sum);
    const int i = column + warp * WARP + lane;
    if (i < OC) partial[(size_t)blockIdx.x * OC + i] = total;
}

// dw = or += dyᵀ x and, unless db is null, db = or += Σ over tokens of dy. partial (rows / BIAS_RUN, OC) is scratch.
template <class X>
static void linear_backward_weight(const Workspace& ws, float* dw, float* db, float* partial, const X* dy, const X* x,
                                   size_t rows, size_t C, size_t OC, size_t lddy, bool accumulate) {
    Timed timed(MATMUL_DW, 0, 0);
    matmul<X, float>(ws, dw, C, OC, C, rows, across_k(dy, lddy), across_k(x, C), accumulate ? dw : nullptr);
    if (!db) return;
    size_t runs = ceil_div(rows, BIAS_RUN);
    auto kernel = vectors(OC, lddy, elements_before(dy)) ? bias_backward_kernel<true, X>
                                                         : bias_backward_kernel<false, X>;
    dim3 grid((unsigned)runs, (unsigned)ceil_div(OC, WARP_SHARE)), block(WARP, SUM_WARPS);
    kernel<<<grid, block, 0, gpu.stream>>>(partial, dy, rows, (int)OC, lddy);
    CHECK(cudaGetLastError());
    sum_partials(db, nullptr, partial, runs, OC, accumulate);
}

// --------------------------------------------------------------------------------------------------------------------
// Embedding: x[b,t] = wte[token] + wpe[t], x (B, T, C), tokens (B, T)

constexpr int ROW_WARPS = 4;  // warps of a block where each has a row of its own

// One warp a token. Its position is `first` and further on, in each of the sequences.
template <bool VECTORS, class X>
__global__ void embedding_forward_kernel(X* x, const int* tokens, const X* wte, const X* wpe, size_t rows, int T,
                                         int first, int C) {
    size_t r = (size_t)blockIdx.x * ROW_WARPS + threadIdx.y;
    if (r >= rows) return;
    const int lane = threadIdx.x;
    const X *token = wte + (size_t)tokens[r] * C, *position = wpe + (first + r % T) * C;
    for (int c = 0; c < C; c += WARP_SHARE) {
        float a[SHARE], b[SHARE];
        load<VECTORS>(a, token + c, lane, WARP, C - c);
        load<VECTORS>(b, position + c, lane, WARP, C - c);
#pragma unroll
        for (int i = 0; i < SHARE; i++) a[i] += b[i];
        store<VECTORS>(x + r * C + c, a, lane, WARP, C - c);
    }
}

template <class X>
static void embedding_forward(X* x, const int* tokens, const X* wte, const X* wpe, size_t B, size_t T, size_t C,
                              size_t first = 0) {
    Timed timed(EMBEDDING, 0, 1.0 * B * T * C * sizeof(X));  // rows that come again are in a cache
    auto kernel = vectors(C) ? embedding_forward_kernel<true, X> : embedding_forward_kernel<false, X>;
    kernel<<<(unsigned)ceil_div(B * T, ROW_WARPS), dim3(WARP, ROW_WARPS), 0, gpu.stream>>>(
        x, tokens, wte, wpe, B * T, (int)T, (int)first, (int)C);
    CHECK(cudaGetLastError());
}

// dwte[token] += dx[b,t] (wte is the classifier too, whose share is there already). A block has one of the tokens in
// use and 256 channels. Its warps take turns with the places (b, t) where the token stands: place[first[n]] up to
// place[first[n + 1]].
template <bool VECTORS, class X>
__global__ void embedding_backward_token_kernel(float* dwte, const X* dx, const int* tokens, const int* place,
                                                const int* first, int C) {
    const int lane = threadIdx.x, warp = threadIdx.y, c = blockIdx.y * WARP_SHARE;
    const int begin = first[blockIdx.x], end = first[blockIdx.x + 1];
    float sum[SHARE] = {}, share[SHARE];
    for (int n = begin + warp; n < end; n += SUM_WARPS) {
        load<VECTORS>(share, dx + (size_t)place[n] * C + c, lane, WARP, C - c);
#pragma unroll
        for (int i = 0; i < SHARE; i++) sum[i] += share[i];
    }
    const float total = sum_over_warps<VECTORS>(sum);
    const int i = c + warp * WARP + lane;
    if (i < C) dwte[(size_t)tokens[place[begin]] * C + i] += total;
}

// dwpe[t] = or += Σ_b dx[b,t]. One warp a position
template <bool VECTORS, class X>
__global__ void embedding_backward_position_kernel(float* dwpe, const X* dx, int B, int T, int C, bool accumulate) {
    const int t = blockIdx.x * ROW_WARPS + threadIdx.y, lane = threadIdx.x;
    if (t >= T) return;
    for (int c = 0; c < C; c += WARP_SHARE) {
        const int n = C - c;
        float sum[SHARE] = {}, share[SHARE];
        if (accumulate) load<VECTORS>(sum, dwpe + (size_t)t * C + c, lane, WARP, n);
        for (int b = 0; b < B; b++) {
            load<VECTORS>(share, dx + ((size_t)b * T + t) * C + c, lane, WARP, n);
#pragma unroll
            for (int i = 0; i < SHARE; i++) sum[i] += share[i];
        }
        store<VECTORS>(dwpe + (size_t)t * C + c, sum, lane, WARP, n);
    }
}

// `place` and `first` list where each of the `used` tokens stands (model_set_inputs).
template <class X>
static void embedding_backward(float* dwte, float* dwpe, const X* dx, const int* tokens, const int* place,
                               const int* first, size_t used, size_t B, size_t T, size_t C, bool accumulate) {
    Timed timed(EMBEDDING, 0, 1.0 * B * T * C * sizeof(X) + 2.0 * (used + T) * C * sizeof(float));
    auto token_kernel = vectors(C) ? embedding_backward_token_kernel<true, X>
                                   : embedding_backward_token_kernel<false, X>;
    dim3 grid((unsigned)used, (unsigned)ceil_div(C, WARP_SHARE));
    token_kernel<<<grid, dim3(WARP, SUM_WARPS), 0, gpu.stream>>>(dwte, dx, tokens, place, first, (int)C);
    CHECK(cudaGetLastError());
    auto position_kernel = vectors(C) ? embedding_backward_position_kernel<true, X>
                                      : embedding_backward_position_kernel<false, X>;
    position_kernel<<<(unsigned)ceil_div(T, ROW_WARPS), dim3(WARP, ROW_WARPS), 0, gpu.stream>>>(
        dwpe, dx, (int)B, (int)T, (int)C, accumulate);
    CHECK(cudaGetLastError());
}

// --------------------------------------------------------------------------------------------------------------------
// LayerNorm: n = (x - mean) rstd, y = n w + b, over the C channels of each token; x, y (rows, C), mean, rstd (rows)

// One warp a token. It reads its row three times: from memory, then twice from the cache.
template <bool VECTORS, class X>
__global__ void layernorm_forward_kernel(X* y, float* mean, float* rstd, const X* x, const X* w, const X* b,
                                         size_t rows, int C) {
    size_t r = (size_t)blockIdx.x * ROW_WARPS + threadIdx.y;
    if (r >= rows) return;
    const int lane = threadIdx.x;
    const X* x_r = x + r * C;
    float share[SHARE], sum = 0, variance = 0;
    for (int c = 0; c < C; c += WARP_SHARE) {
        load<VECTORS>(share, x_r + c, lane, WARP, C - c);
#pragma unroll
        for (int i = 0; i < SHARE; i++) sum += share[i];
    }
    const float m = sum_over(sum) / C;
    for (int c = 0; c < C; c += WARP_SHARE) {
        load<VECTORS>(share, x_r + c, lane, WARP, C - c);
#pragma unroll
        for (int i = 0; i < SHARE; i++)
            if (c + position<VECTORS>(VECTORS ? 0 : i, lane, WARP) < C) variance += (share[i] - m) * (share[i] - m);
    }
    const float s = 1.0f / sqrtf(sum_over(variance) / C + 1e-5f);
    if (mean && lane == 0) mean[r] = m, rstd[r] = s;  // for backward
    for (int c = 0; c < C; c += WARP_SHARE) {
        float w_c[SHARE], b_c[SHARE];
        load<VECTORS>(share, x_r + c, lane, WARP, C - c);
        load<VECTORS>(w_c, w + c, lane, WARP, C - c);
        load<VECTORS>(b_c, b + c, lane, WARP, C - c);
#pragma unroll
        for (int i = 0; i < SHARE; i++) share[i] = (share[i] - m) * s * w_c[i] + b_c[i];
        store<VECTORS>(y + r * C + c, share, lane, WARP, C - c);
    }
}

template <class X>
static void layernorm_forward(X* y, float* mean, float* rstd, const X* x, const X* w, const X* b, size_t rows,
                              size_t C) {
    Timed timed(LAYERNORM, 0, 2.0 * rows * C * sizeof(X));
    auto kernel = vectors(C) ? layernorm_forward_kernel<true, X> : layernorm_forward_kernel<false, X>;
    kernel<<<(unsigned)ceil_div(rows, ROW_WARPS), dim3(WARP, ROW_WARPS), 0, gpu.stream>>>(y, mean, rstd, x, w, b, rows,
                                                                                         (int)C);
    CHECK(cudaGetLastError());
}

// dx = (or +=, into the gradient that flows past the layer in the residual stream); dw, db = or +=.
// dx_i = rstd (g_i - mean(g) - n_i mean(g n)) with g = dy w. dw = Σ dy n and db = Σ dy over tokens: partial sums over
// fixed runs of tokens, then added up in order.
constexpr int LAYERNORM_RUN = 32, LAYERNORM_AT_ONCE = 2;
template <bool VECTORS> constexpr int LAYERNORM_BLOCK = VECTORS ? 768 : 512;  // more threads would lack registers

// A block has a run of tokens and goes through it, two tokens at a time; a thread has a share of the channels, whose dw
// and db stay in its registers. The two tokens' mean(g) and mean(g n) are sums over the block: each warp's go through
// shared memory, in one of two buffers by turns, so that one barrier is enough.
template <bool VECTORS, class X>
__global__ void __launch_bounds__(LAYERNORM_BLOCK<VECTORS>)
    layernorm_backward_kernel(X* dx, float* partial /* (runs, 2, C) */, const X* dy, const X* x, const X* w,
                              const float* mean, const float* rstd, size_t rows, int C, bool accumulate_dx) {
    constexpr int N = LAYERNORM_AT_ONCE;
    __shared__ float warp_sums[2][2 * N][WARP];
    const int lane = threadIdx.x, lanes = blockDim.x, warp = lane / WARP, warps = lanes / WARP;
    const size_t begin = (size_t)blockIdx.x * LAYERNORM_RUN, end = min(rows, begin + LAYERNORM_RUN);
    float w_c[SHARE], dw[SHARE] = {}, db[SHARE] = {};
    load<VECTORS>(w_c, w, lane, lanes, C);
    int buffer = 0;
    for (size_t first = begin; first < end; first += N, buffer ^= 1) {
        float n[N][SHARE], g[N][SHARE], s[N], sums[2 * N] = {};
#pragma unroll
        for (int j = 0; j < N; j++) {
            const size_t r = min(first + j, end - 1);  // a last odd token goes twice, and counts once
            const float m = mean[r];
            s[j] = rstd[r];
            load<VECTORS>(n[j], x + r * C, lane, lanes, C);
            load<VECTORS>(g[j], dy + r * C, lane, lanes, C);
#pragma unroll
            for (int i = 0; i < SHARE; i++) {
                n[j][i] = (n[j][i] - m) * s[j];
                if (first + j < end) dw[i] += g[j][i] * n[j][i], db[i] += g[j][i];
                g[j][i] *= w_c[i];
                sums[2 * j] += g[j][i];
                sums[2 * j + 1] += g[j][i] * n[j][i];
            }
        }
#pragma unroll
        for (int k = 0; k < 2 * N; k++) {
            sums[k] = sum_over(sums[k]);
            if (lane % WARP == 0) warp_sums[buffer][k][warp] = sums[k];
        }
        __syncthreads();
#pragma unroll
        for (int k = 0; k < 2 * N; k++) {
            sums[k] = 0;
            for (int other = 0; other < warps; other++) sums[k] += warp_sums[buffer][k][other];
            sums[k] *= 1.0f / C;
        }
#pragma unroll
        for (int j = 0; j < N; j++) {
            if (first + j >= end) break;
            X* dx_r = dx + (first + j) * C;
            float share[SHARE] = {};
            if (accumulate_dx) load<VECTORS>(share, dx_r, lane, lanes, C);
#pragma unroll
            for (int i = 0; i < SHARE; i++) share[i] += s[j] * (g[j][i] - sums[2 * j] - n[j][i] * sums[2 * j + 1]);
            store<VECTORS>(dx_r, share, lane, lanes, C);
        }
    }
    store<VECTORS>(partial + (size_t)blockIdx.x * 2 * C, dw, lane, lanes, C);
    store<VECTORS>(partial + (size_t)blockIdx.x * 2 * C + C, db, lane, lanes, C);
}

template <class X>
static void layernorm_backward(X* dx, float* dw, float* db, float* partial, const X* dy, const X* x, const X* w,
                               const float* mean, const float* rstd, size_t rows, size_t C, bool accumulate_dx,
                               bool accumulate) {
    Timed timed(LAYERNORM, 0, (accumulate_dx ? 4.0 : 3.0) * rows * C * sizeof(X));
    size_t runs = ceil_div(rows, LAYERNORM_RUN), threads = round_up(ceil_div(C, SHARE), WARP);
    auto kernel = vectors(C) ? layernorm_backward_kernel<true, X> : layernorm_backward_kernel<false, X>;
    kernel<<<(unsigned)runs, (unsigned)threads, 0, gpu.stream>>>(dx, partial, dy, x, w, mean, rstd, rows, (int)C,
                                                                accumulate_dx);
    CHECK(cudaGetLastError());
    sum_partials(dw, db, partial, runs, C, accumulate);
}

// --------------------------------------------------------------------------------------------------------------------
// Attention: o = softmax(causal(q kᵀ/√HS)) v
//
// Backward, with p = softmax(s), s = scale q kᵀ, delta_i = do_i·o_i:
//     dv_j = Σ_i p_ij do_i      ds_ij = p_ij (do_i·v_j - delta_i)
//     dq_i = scale Σ_j ds_ij k_j      dk_j = scale Σ_i ds_ij q_i
// Sums over keys belong to a query, sums over queries to a key. So dq has a kernel and dk, dv have another, which both
// compute s and dp: each gradient is then summed by one thread in one order. delta comes first: in the tiles it is the
// dq kernel's, else it has one of its own.
//
// There are two sets of kernels: tiles on tensor cores for bf16 and head sizes 64 and 128, plain ones for the rest and
// for a single query.

// The rows of all heads in an array: that of sequence b, head h, position t.
template <class X>
struct Heads {
    X* data;
    size_t batch, head, row;  // distances

    __device__ X* at(int b, int h, int t) const { return data + b * batch + h * head + t * row; }
};

// Keys and values, or their gradients; those of skipping heads, the first `skipping`, are `below`: in layer
// l - skip_distance.
template <class X>
struct KeysValues {
    Heads<X> k, v, k_below, v_below;
    int skipping;

    __device__ Heads<X> keys(int h) const { return h < skipping ? k_below : k; }
    __device__ Heads<X> values(int h) const { return h < skipping ? v_below : v; }
};

struct AttentionShape {
    int B, NH, HS;
    int queries, before;  // query i is at position before + i; there are before + queries keys

    float scale() const { return 1.0f / sqrtf((float)HS); }
};

// a in shared memory, b a head's row
template <class X>
__device__ inline float dot(const float* a, const X* b, int n) {
    float sum = 0, sums[SHARE] = {}, share[SHARE];
    if (n % SHARE > 0) {
        for (int i = 0; i < n; i++) sum += a[i] * (float)b[i];
        return sum;
    }
    for (int i = 0; i < n; i += SHARE) {  // all rows of heads are then at multiples of 16 bytes
        load<true>(share, b + i, 0, 1, SHARE);
#pragma unroll
        for (int j = 0; j < SHARE; j++) sums[j] += a[i + j] * share[j];
    }
#pragma unroll
    for (int j = 0; j < SHARE; j++) sum += sums[j];
    return sum;
}

// A block has a query, and its warps take turns with tiles of 32 keys: lane by lane, first a key's score, then a
// channel of the sum over the tile's values. At the end the warps' results become one, as tiles did before. With one
// warp for training, with eight for decoding, where there are few queries. Scores, and their max, are kept unscaled.
// Shared memory: q (HS), then for each warp o (HS), p (32), max, sum.
template <class X>
__global__ void attention_forward_plain_kernel(Heads<X> o, float* lse, Heads<const X> q, KeysValues<const X> kv, int HS,
                                               int before, float scale) {
    extern __shared__ uint4 shared_memory[];
    const int lane = threadIdx.x, warp = threadIdx.y, warps = blockDim.y, warp_size = HS + WARP + 2;
    const int i = blockIdx.x, h = blockIdx.y, b = blockIdx.z, keys = before + i + 1;
    const Heads<const X> k = kv.keys(h), v = kv.values(h);
    float *q_i = (float*)shared_memory, *all = q_i + HS, *o_w = all + warp * warp_size, *p_w = o_w + HS;
    for (int d = warp * WARP + lane; d < HS; d += warps * WARP) q_i[d] = (float)q.at(b, h, i)[d];
    for (int d = lane; d < HS; d += WARP) o_w[d] = 0;
    __syncthreads();
    float max = -INFINITY, sum = 0;
    for (int j0 = warp * WARP; j0 < keys; j0 += warps * WARP) {
        const int n = min(keys - j0, WARP);
        const float s = lane < n ? dot(q_i, k.at(b, h, j0 + lane), HS) : -INFINITY;
        const float new_max = fmaxf(max, maximum_over(s)), rescale = expf(scale * (max - new_max));
        const float p = expf(scale * (s - new_max));
        sum = sum * rescale + sum_over(p);
        max = new_max;
        p_w[lane] = (float)(X)p;
        __syncwarp();
        for (int d = lane; d < HS; d += WARP) {
            float o_d = o_w[d] * rescale;
            for (int j = 0; j < n; j++) o_d += p_w[j] * (float)v.at(b, h, j0 + j)[d];
            o_w[d] = o_d;
        }
        __syncwarp();
    }
    if (lane == 0) p_w[WARP] = max, p_w[WARP + 1] = sum;
    __syncthreads();
    float all_max = -INFINITY, all_sum = 0;
    for (int w = 0; w < warps; w++) all_max = fmaxf(all_max, all[w * warp_size + HS + WARP]);
    for (int w = 0; w < warps; w++) {
        const float* of_w = all + w * warp_size + HS + WARP;
        all_sum += of_w[1] * expf(scale * (of_w[0] - all_max));
    }
    for (int d = warp * WARP + lane; d < HS; d += warps * WARP) {
        float o_d = 0;
        for (int w = 0; w < warps; w++) {
            const float* of_w = all + w * warp_size;
            o_d += of_w[d] * expf(scale * (of_w[HS + WARP] - all_max));
        }
        o.at(b, h, i)[d] = (X)(o_d / all_sum);
    }
    if (lse && warp == 0 && lane == 0)
        lse[((size_t)b * gridDim.y + h) * gridDim.x + i] = scale * all_max + logf(all_sum);
}

template <class X>
static void attention_forward_plain(Heads<X> o, float* lse, Heads<const X> q, const KeysValues<const X>& kv,
                                    const AttentionShape& s, int warps) {
    dim3 grid((unsigned)s.queries, (unsigned)s.NH, (unsigned)s.B), block(WARP, (unsigned)warps);
    size_t shared = (s.HS + warps * (s.HS + WARP + 2)) * sizeof(float);
    attention_forward_plain_kernel<X><<<grid, block, shared, gpu.stream>>>(o, lse, q, kv, s.HS, s.before, s.scale());
    CHECK(cudaGetLastError());
}

// delta (B, NH, T): do·o. One warp a row
template <class X>
__global__ void attention_delta_kernel(float* delta, Heads<const X> dout, Heads<const X> o, int HS, int T) {
    const int t = blockIdx.x * ROW_WARPS + threadIdx.y, h = blockIdx.y, b = blockIdx.z;
    if (t >= T) return;
    const X *do_t = dout.at(b, h, t), *o_t = o.at(b, h, t);
    float sum = 0;
    for (int d = threadIdx.x; d < HS; d += WARP) sum += (float)do_t[d] * (float)o_t[d];
    sum = sum_over(sum);
    if (threadIdx.x == 0) delta[((size_t)b * gridDim.y + h) * T + t] = sum;
}

// dq. One warp a query: lane by lane, first a key's ds, then a channel of the sum over a tile of 32 keys.
// Shared memory: q, do, dq (HS), ds (32).
template <class X>
__global__ void attention_backward_query_plain_kernel(Heads<X> dq, Heads<const X> dout, const float* lse,
                                                      const float* delta, Heads<const X> q, KeysValues<const X> kv,
                                                      int HS, float scale) {
    extern __shared__ uint4 shared_memory[];
    const int lane = threadIdx.x, i = blockIdx.x, h = blockIdx.y, b = blockIdx.z;
    const size_t row = ((size_t)b * gridDim.y + h) * gridDim.x + i;
    const Heads<const X> k = kv.keys(h), v = kv.values(h);
    float *q_i = (float*)shared_memory, *do_i = q_i + HS, *dq_i = do_i + HS, *ds = dq_i + HS;
    for (int d = lane; d < HS; d += WARP) {
        q_i[d] = (float)q.at(b, h, i)[d];
        do_i[d] = (float)dout.at(b, h, i)[d];
        dq_i[d] = 0;
    }
    __syncwarp();
    for (int j0 = 0; j0 <= i; j0 += WARP) {
        const int n = min(i + 1 - j0, WARP);
        if (lane < n) {
            float p = expf(scale * dot(q_i, k.at(b, h, j0 + lane), HS) - lse[row]);
            ds[lane] = (float)(X)(scale * p * (dot(do_i, v.at(b, h, j0 + lane), HS) - delta[row]));
        }
        __syncwarp();
        for (int d = lane; d < HS; d += WARP) {
            float dq_d = dq_i[d];
            for (int j = 0; j < n; j++) dq_d += ds[j] * (float)k.at(b, h, j0 + j)[d];
            dq_i[d] = dq_d;
        }
        __syncwarp();
    }
    for (int d = lane; d < HS; d += WARP) dq.at(b, h, i)[d] = (X)dq_i[d];
}

// dk, dv. One warp a key: lane by lane, first a query's p and ds, then a channel of the sums over a tile of 32 queries.
// Shared memory: k, v, dk, dv (HS), p, ds (32).
template <class X, class DKV>
__global__ void attention_backward_key_plain_kernel(KeysValues<DKV> dkv, Heads<const X> dout, const float* lse,
                                                    const float* delta, Heads<const X> q, KeysValues<const X> kv,
                                                    int HS, float scale) {
    extern __shared__ uint4 shared_memory[];
    const int lane = threadIdx.x, j = blockIdx.x, h = blockIdx.y, b = blockIdx.z, T = gridDim.x;
    const size_t rows = ((size_t)b * gridDim.y + h) * T;
    float *k_j = (float*)shared_memory, *v_j = k_j + HS, *dk_j = v_j + HS, *dv_j = dk_j + HS, *p = dv_j + HS;
    float* ds = p + WARP;
    for (int d = lane; d < HS; d += WARP) {
        k_j[d] = (float)kv.keys(h).at(b, h, j)[d];
        v_j[d] = (float)kv.values(h).at(b, h, j)[d];
        dk_j[d] = dv_j[d] = 0;
    }
    __syncwarp();
    for (int i0 = j; i0 < T; i0 += WARP) {
        const int n = min(T - i0, WARP);
        if (lane < n) {
            const int i = i0 + lane;
            float p_ij = expf(scale * dot(k_j, q.at(b, h, i), HS) - lse[rows + i]);
            p[lane] = (float)(X)p_ij;
            ds[lane] = (float)(X)(scale * p_ij * (dot(v_j, dout.at(b, h, i), HS) - delta[rows + i]));
        }
        __syncwarp();
        for (int d = lane; d < HS; d += WARP) {
            float dk_d = dk_j[d], dv_d = dv_j[d];
            for (int i = 0; i < n; i++) {
                dk_d += ds[i] * (float)q.at(b, h, i0 + i)[d];
                dv_d += p[i] * (float)dout.at(b, h, i0 + i)[d];
            }
            dk_j[d] = dk_d, dv_j[d] = dv_d;
        }
        __syncwarp();
    }
    for (int d = lane; d < HS; d += WARP) {
        dkv.keys(h).at(b, h, j)[d] = (DKV)dk_j[d];
        dkv.values(h).at(b, h, j)[d] = (DKV)dv_j[d];
    }
}

template <class X, class DKV>
static void attention_backward_plain(Heads<X> dq, const KeysValues<DKV>& dkv, float* delta, Heads<const X> dout,
                                     Heads<const X> o, const float* lse, Heads<const X> q,
                                     const KeysValues<const X>& kv, const AttentionShape& s) {
    dim3 grid((unsigned)s.queries, (unsigned)s.NH, (unsigned)s.B), rows = grid;
    rows.x = (unsigned)ceil_div(s.queries, ROW_WARPS);
    attention_delta_kernel<X><<<rows, dim3(WARP, ROW_WARPS), 0, gpu.stream>>>(delta, dout, o, s.HS, s.queries);
    CHECK(cudaGetLastError());
    attention_backward_query_plain_kernel<X><<<grid, WARP, (3 * s.HS + WARP) * sizeof(float), gpu.stream>>>(
        dq, dout, lse, delta, q, kv, s.HS, s.scale());
    CHECK(cudaGetLastError());
    attention_backward_key_plain_kernel<X, DKV><<<grid, WARP, (4 * s.HS + 2 * WARP) * sizeof(float), gpu.stream>>>(
        dkv, dout, lse, delta, q, kv, s.HS, s.scale());
    CHECK(cudaGetLastError());
}

// Tiles on tensor cores. A warp multiplies m16n8k16: D (16, 8) += A (16, 16) B (16, 8), the operands in registers
// called fragments. With g = lane / 4 and c = lane % 4, a lane's four values of D are at rows g and g + 8, columns 2c,
// 2c + 1: (g, 2c) (g, 2c+1) (g+8, 2c) (g+8, 2c+1). Two D next to each other are thus, rounded to bf16, an A fragment of
// the next product: probabilities never leave the registers.
#ifndef GPT2_EMULATED  // these are all instructions that C++ has no name for
__device__ inline void mma_m16n8k16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, "
                 "{%0,%1,%2,%3};"
                 : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

// Four matrices of 8 × 8 bf16; lane l has the address of row l % 8 of matrix l / 8, and receives of each matrix the two
// values at row l / 4 from column 2 (l % 4) on; transposed: at column l / 4, from that row on.
__device__ inline void ldmatrix_x4(uint32_t (&r)[4], const void* shared_row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"((uint32_t)__cvta_generic_to_shared(shared_row))
                 : "memory");
}
__device__ inline void ldmatrix_x4_trans(uint32_t (&r)[4], const void* shared_row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"((uint32_t)__cvta_generic_to_shared(shared_row))
                 : "memory");
}

// Copies 16 bytes, past the registers, while the thread goes on; zeros if not `valid`. What was copied before a commit
// is a group; wait<N> waits until at most the N latest groups are still under way.
__device__ inline void cp_async_16(void* shared, const void* global, bool valid) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"((uint32_t)__cvta_generic_to_shared(shared)),
                 "l"(global), "r"(valid ? 16 : 0)
                 : "memory");
}
__device__ inline void cp_async_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
template <int N>
__device__ inline void cp_async_wait() {
    asm volatile("cp.async.wait_group %0;" ::"n"(N) : "memory");
}

__device__ inline float exp2_approx(float x) {  // relative error 2^-22
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}
#else
inline float exp2_approx(float x) { return exp2f(x); }
#endif

constexpr int TILE = 64, TILE_BLOCK = 128;  // rows of a tile of keys; threads
constexpr float LOG2_E = 1.44269504f;

// A tile in shared memory has rows of HS bf16, in chunks of 16 bytes. Chunk c of row r lies where chunk c ^ (r % 8)
// would: the same chunk of eight rows, which ldmatrix reads together, is then in all 32 banks.
template <int HS>
__device__ inline int in_tile(int r, int c) {
    return r * HS + ((c ^ (r & 7)) << 3);
}

// Rows first .. first + ROWS - 1 of a head, by all threads; those from `end` on are 0. A thread's chunks are all in one
// column, a multiple of 8 rows apart, so that its addresses differ by what they have in common.
template <int HS, int ROWS>
__device__ inline void copy_tile(bf16* tile, const bf16* head, size_t row, int first, int end) {
    constexpr int CHUNKS = HS / 8, STEP = TILE_BLOCK / CHUNKS;
    static_assert(STEP % 8 == 0 && ROWS % STEP == 0, "the same chunk ^ row % 8 for all of a thread's rows");
    const int r = threadIdx.x / CHUNKS, c = threadIdx.x % CHUNKS;
    bf16* to = tile + in_tile<HS>(r, c);
    const bf16* from = head + (first + r) * row + c * 8;
#pragma unroll
    for (int below = 0; below < ROWS; below += STEP) {
        const bool valid = first + r + below < end;
        cp_async_16(to + below * HS, valid ? from + below * row : head, valid);
    }
}

// Tile number `tile` of two arrays, of keys and values or of queries and do. Two such pairs take turns in `pairs`.
template <int HS>
__device__ inline void copy_pair(bf16* pairs, const Heads<const bf16>& one, const Heads<const bf16>& other, int b,
                                 int h, int tile, int end) {
    bf16* to = pairs + tile % 2 * 2 * TILE * HS;
    copy_tile<HS, TILE>(to, one.at(b, h, 0), one.row, tile * TILE, end);
    copy_tile<HS, TILE>(to + TILE * HS, other.at(b, h, 0), other.row, tile * TILE, end);
}

// Fragments, of rows r .. r+15 and channels 16k .. 16k+15 of a tile. load_A: as an A. The others: as two B of 16 × 8,
// in b[0], b[1] and b[2], b[3], for two products side by side. A tile's row is a column of B in load_B_of_columns (a
// product over channels, as q kᵀ), which gives B of rows r .. r+7 and r+8 .. r+15; it is a row of B in load_B_of_rows
// (a product over rows, as p v), which gives B of channels 16k .. 16k+7 and 16k+8 .. 16k+15. r is a multiple of 8, and
// so in_tile's share of a lane stays the same in all loops.
template <int HS>
__device__ inline void load_A(uint32_t (&a)[4], const bf16* tile, int r, int k) {
    const int lane = threadIdx.x % WARP;
    ldmatrix_x4(a, tile + r * HS + in_tile<HS>(lane % 16, 2 * k + lane / 16));
}
template <int HS>
__device__ inline void load_B_of_columns(uint32_t (&b)[4], const bf16* tile, int r, int k) {
    const int lane = threadIdx.x % WARP;
    ldmatrix_x4(b, tile + r * HS + in_tile<HS>(lane / 16 * 8 + lane % 8, 2 * k + lane / 8 % 2));
}
template <int HS>
__device__ inline void load_B_of_rows(uint32_t (&b)[4], const bf16* tile, int r, int k) {
    const int lane = threadIdx.x % WARP;
    ldmatrix_x4_trans(b, tile + r * HS + in_tile<HS>(lane % 16, 2 * k + lane / 16));
}

// Two products side by side
__device__ inline void mma_two(float (&d0)[4], float (&d1)[4], const uint32_t (&a)[4], const uint32_t (&b)[4]) {
    const uint32_t b0[2] = {b[0], b[1]}, b1[2] = {b[2], b[3]};
    mma_m16n8k16(d0, a, b0);
    mma_m16n8k16(d1, a, b1);
}

__device__ inline uint32_t pair(float low, float high) {
    const __nv_bfloat162 both = __floats2bfloat162_rn(low, high);
    uint32_t bits;
    memcpy(&bits, &both, sizeof bits);
    return bits;
}

// Of a fragment's two values with two others
__device__ inline float dot_two(uint32_t bits, const bf16* others) {
    const __nv_bfloat162 b = *(const __nv_bfloat162*)others;
    __nv_bfloat162 a;
    memcpy(&a, &bits, sizeof a);
    return (float)a.x * (float)b.x + (float)a.y * (float)b.y;
}

// The A fragment of two D side by side
__device__ inline void as_A(uint32_t (&a)[4], const float (&d0)[4], const float (&d1)[4]) {
    a[0] = pair(d0[0], d0[1]), a[1] = pair(d0[2], d0[3]), a[2] = pair(d1[0], d1[1]), a[3] = pair(d1[2], d1[3]);
}

__device__ inline void store_two(bf16* to, float x, float y) { *(__nv_bfloat162*)to = __floats2bfloat162_rn(x, y); }
__device__ inline void store_two(float* to, float x, float y) { *(float2*)to = make_float2(x, y); }

// sums (16·M, HS) += x y, where x (16·M, 16·N), D of earlier products, becomes A, and y is 16·N rows of a tile from
// `first` on
template <int HS, int M, int N>
__device__ inline void add_product(float (&sums)[M][HS / 8][4], const float (&x)[M][2 * N][4], const bf16* tile,
                                   int first) {
#pragma unroll
    for (int n = 0; n < N; n++) {
        uint32_t x_A[M][4];
#pragma unroll
        for (int m = 0; m < M; m++) as_A(x_A[m], x[m][2 * n], x[m][2 * n + 1]);
#pragma unroll
        for (int d = 0; d < HS / 16; d++) {
            uint32_t y_B[4];
            load_B_of_rows<HS>(y_B, tile, first + 16 * n, d);
#pragma unroll
            for (int m = 0; m < M; m++) mma_two(sums[m][2 * d], sums[m][2 * d + 1], x_A[m], y_B);
        }
    }
}

// Scores of pairs that causality hides, by their row and column in s, become -inf.
template <int M, int N, class Hidden>
__device__ inline void mask(float (&s)[M][N][4], Hidden hidden) {
    const int lane = threadIdx.x % WARP, g = lane / 4, c = lane % 4;
#pragma unroll
    for (int m = 0; m < M; m++)
#pragma unroll
        for (int n = 0; n < N; n++)
#pragma unroll
            for (int e = 0; e < 4; e++)
                if (hidden(16 * m + g + e / 2 * 8, 8 * n + 2 * c + e % 2)) s[m][n][e] = -INFINITY;
}

// A row of HS sums, of which this lane has some: row g of a fragment (half 0), or g + 8 (half 1)
template <int N, class Y>
__device__ inline void store_row(Y* row, const float (&sums)[N][4], int half) {
    const int c = threadIdx.x % 4;
#pragma unroll
    for (int d = 0; d < N; d++) store_two(row + 8 * d + 2 * c, sums[d][2 * half], sums[d][2 * half + 1]);
}

// More shared memory than 48 KB has to be asked for.
template <class Kernel>
static void allow_shared(Kernel kernel, size_t bytes) {
    if (bytes > 48 << 10)
        CHECK(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, (int)bytes));
}

// A warp has 16·M rows, queries or keys: M fragments of 16, which share the fragments of the other side, so that shared
// memory keeps up with the tensor cores. A block has 64·M rows.
template <int HS> constexpr int FRAGMENTS = HS == 64 ? 2 : 1;

// A block has a head's 64·M queries, and goes through tiles of 64 keys; the next one comes in meanwhile. A head's
// blocks with the most keys start first.
// Shared memory: q (64·M, HS), then k and v (64, HS) of this tile and of the next.
template <int HS> constexpr size_t FORWARD_SHARED = (FRAGMENTS<HS> + 4) * TILE * HS * sizeof(bf16);

template <int HS>
__global__ void __launch_bounds__(TILE_BLOCK, 2)
    attention_forward_tiles_kernel(Heads<bf16> o, float* lse, Heads<const bf16> q, KeysValues<const bf16> kv,
                                   int queries, int before, float scale) {
    constexpr int M = FRAGMENTS<HS>, K = HS / 16, ROWS = TILE * M;
    extern __shared__ uint4 shared_memory[];
    bf16 *q_tile = (bf16*)shared_memory, *kv_tiles = q_tile + ROWS * HS;
    const int lane = threadIdx.x % WARP, g = lane / 4, c = lane % 4, row = threadIdx.x / WARP * 16 * M;  // of the warp
    const int i0 = (int)(gridDim.x - 1 - blockIdx.x) * ROWS, h = blockIdx.y, b = blockIdx.z;
    const int keys = before + min(i0 + ROWS, queries), tiles = (keys + TILE - 1) / TILE;
    const Heads<const bf16> k_rows = kv.keys(h), v_rows = kv.values(h);
    const float scale2 = scale * LOG2_E;  // powers of 2 are faster than those of e
    auto copy_keys = [&](int j) { copy_pair<HS>(kv_tiles, k_rows, v_rows, b, h, j, keys); };
    copy_tile<HS, ROWS>(q_tile, q.at(b, h, 0), q.row, i0, queries);
    copy_keys(0);
    cp_async_commit();

    uint32_t q_A[M][K][4];
    float sums_o[M][2 * K][4] = {}, max[M][2], sum[M][2] = {};
#pragma unroll
    for (int m = 0; m < M; m++) max[m][0] = max[m][1] = -INFINITY;
    for (int j = 0; j < tiles; j++) {
        if (j + 1 < tiles) copy_keys(j + 1);
        cp_async_commit();
        cp_async_wait<1>();
        __syncthreads();
        const bf16 *k_tile = kv_tiles + j % 2 * 2 * TILE * HS, *v_tile = k_tile + TILE * HS;
        if (j == 0) {
#pragma unroll
            for (int m = 0; m < M; m++)
#pragma unroll
                for (int k = 0; k < K; k++) load_A<HS>(q_A[m][k], q_tile, row + 16 * m, k);
        }
        const int first_position = before + i0 + row;  // of the warp's queries
        if (j * TILE < first_position + 16 * M) {
            // s = q kᵀ
            float s[M][8][4] = {};
#pragma unroll
            for (int k = 0; k < K; k++)
#pragma unroll
                for (int n = 0; n < 4; n++) {
                    uint32_t k_B[4];
                    load_B_of_columns<HS>(k_B, k_tile, 16 * n, k);
#pragma unroll
                    for (int m = 0; m < M; m++) mma_two(s[m][2 * n], s[m][2 * n + 1], q_A[m][k], k_B);
                }
            if (j * TILE + TILE > first_position + 1)
                mask(s, [&](int query, int key) { return j * TILE + key > first_position + query; });
            // p = e^(s - max), in place; a row's values are with the four lanes of the same g
#pragma unroll
            for (int m = 0; m < M; m++)
#pragma unroll
                for (int half = 0; half < 2; half++) {
                    float new_max = max[m][half];
#pragma unroll
                    for (int n = 0; n < 8; n++)
                        new_max = fmaxf(new_max, fmaxf(s[m][n][2 * half], s[m][n][2 * half + 1]));
                    new_max = maximum_over(new_max, 4);
                    const float rescale = exp2_approx(scale2 * (max[m][half] - new_max)), top = scale2 * new_max;
                    max[m][half] = new_max;
                    sum[m][half] *= rescale;
#pragma unroll
                    for (int n = 0; n < 8; n++)
#pragma unroll
                        for (int e = 2 * half; e < 2 * half + 2; e++) {
                            s[m][n][e] = exp2_approx(scale2 * s[m][n][e] - top);
                            sum[m][half] += s[m][n][e];
                        }
#pragma unroll
                    for (int d = 0; d < 2 * K; d++) {
                        sums_o[m][d][2 * half] *= rescale;
                        sums_o[m][d][2 * half + 1] *= rescale;
                    }
                }
            add_product<HS, M, 4>(sums_o, s, v_tile, 0);  // o += p v
        }
        __syncthreads();
    }
#pragma unroll
    for (int m = 0; m < M; m++)
#pragma unroll
        for (int half = 0; half < 2; half++) {
            const int i = i0 + row + 16 * m + g + 8 * half;
            const float row_sum = sum_over(sum[m][half], 4), of_one = 1.0f / row_sum;
            if (i >= queries) continue;
#pragma unroll
            for (int d = 0; d < 2 * K; d++) sums_o[m][d][2 * half] *= of_one, sums_o[m][d][2 * half + 1] *= of_one;
            store_row(o.at(b, h, i), sums_o[m], half);
            if (lse && c == 0)
                lse[((size_t)b * gridDim.y + h) * queries + i] = scale * max[m][half] + logf(row_sum);
        }
}

template <int HS>
static void attention_forward_tiles(Heads<bf16> o, float* lse, Heads<const bf16> q, const KeysValues<const bf16>& kv,
                                    const AttentionShape& s) {
    dim3 grid((unsigned)ceil_div(s.queries, TILE * FRAGMENTS<HS>), (unsigned)s.NH, (unsigned)s.B);
    auto kernel = attention_forward_tiles_kernel<HS>;
    allow_shared(kernel, FORWARD_SHARED<HS>);
    kernel<<<grid, TILE_BLOCK, FORWARD_SHARED<HS>, gpu.stream>>>(o, lse, q, kv, s.queries, s.before, s.scale());
    CHECK(cudaGetLastError());
}

// dq, and delta for the kernel of dk and dv. A block has a head's 64·M queries, and goes through tiles of 64 keys, 32
// at a time.
// Shared memory: q and do (64·M, HS), then k and v (64, HS) of this tile and of the next.
template <int HS> constexpr size_t BACKWARD_QUERY_SHARED = (2 * FRAGMENTS<HS> + 4) * TILE * HS * sizeof(bf16);

template <int HS>
__global__ void __launch_bounds__(TILE_BLOCK, 2)
    attention_backward_query_tiles_kernel(Heads<bf16> dq, float* delta, Heads<const bf16> dout, Heads<const bf16> o,
                                          const float* lse, Heads<const bf16> q, KeysValues<const bf16> kv, int T,
                                          float scale) {
    constexpr int M = FRAGMENTS<HS>, K = HS / 16, ROWS = TILE * M;
    constexpr int HELD = HS == 64 ? K : 1;  // fragments of q and do that stay in registers
    extern __shared__ uint4 shared_memory[];
    bf16 *q_tile = (bf16*)shared_memory, *do_tile = q_tile + ROWS * HS, *kv_tiles = do_tile + ROWS * HS;
    const int lane = threadIdx.x % WARP, g = lane / 4, c = lane % 4, row = threadIdx.x / WARP * 16 * M;  // of the warp
    const int i0 = (int)(gridDim.x - 1 - blockIdx.x) * ROWS, h = blockIdx.y, b = blockIdx.z;
    const int keys = min(i0 + ROWS, T), tiles = (keys + TILE - 1) / TILE, first_query = i0 + row;
    const Heads<const bf16> k_rows = kv.keys(h), v_rows = kv.values(h);
    const size_t rows = ((size_t)b * gridDim.y + h) * T;
    const float scale2 = scale * LOG2_E;
    auto copy_keys = [&](int j) { copy_pair<HS>(kv_tiles, k_rows, v_rows, b, h, j, keys); };
    copy_tile<HS, ROWS>(q_tile, q.at(b, h, 0), q.row, i0, T);
    copy_tile<HS, ROWS>(do_tile, dout.at(b, h, 0), dout.row, i0, T);
    cp_async_commit();
    copy_keys(0);
    cp_async_commit();
    cp_async_wait<1>();
    __syncthreads();

    uint32_t q_A[M][HELD][4], do_A[M][HELD][4];
    auto load_rows = [&](int slot, int k) {
#pragma unroll
        for (int m = 0; m < M; m++) {
            load_A<HS>(q_A[m][slot], q_tile, row + 16 * m, k);
            load_A<HS>(do_A[m][slot], do_tile, row + 16 * m, k);
        }
    };
    // delta = do·o; o comes in the way that do lies in its fragments
    float scaled_delta[M][2] = {}, lse2[M][2];
#pragma unroll
    for (int k = 0; k < K; k++) {
        const int slot = HELD < K ? 0 : k;
        load_rows(slot, k);
#pragma unroll
        for (int m = 0; m < M; m++)
#pragma unroll
            for (int n = 0; n < 4; n++) {
                const int i = first_query + 16 * m + g + n % 2 * 8, at = 16 * k + n / 2 * 8 + 2 * c;
                if (i < T) scaled_delta[m][n % 2] += dot_two(do_A[m][slot][n], o.at(b, h, i) + at);
            }
    }
#pragma unroll
    for (int m = 0; m < M; m++)
#pragma unroll
        for (int half = 0; half < 2; half++) {
            const int i = first_query + 16 * m + g + 8 * half;
            const float delta_i = sum_over(scaled_delta[m][half], 4);
            if (i < T && c == 0) delta[rows + i] = delta_i;
            scaled_delta[m][half] = scale * delta_i;
            lse2[m][half] = i < T ? lse[rows + i] * LOG2_E : 0;
        }
    float sums[M][2 * K][4] = {};
    for (int j = 0; j < tiles; j++) {
        if (j + 1 < tiles) copy_keys(j + 1);
        cp_async_commit();
        cp_async_wait<1>();
        __syncthreads();
        const bf16 *k_tile = kv_tiles + j % 2 * 2 * TILE * HS, *v_tile = k_tile + TILE * HS;
#pragma unroll 1
        for (int first = 0; first < TILE; first += 32) {
            const int first_key = j * TILE + first;
            if (first_key >= first_query + 16 * M) break;  // later than all of the warp's queries
            // s = q kᵀ, dp = do vᵀ
            float s[M][4][4] = {}, dp[M][4][4] = {};
#pragma unroll
            for (int k = 0; k < K; k++) {
                const int slot = HELD < K ? 0 : k;
                if (HELD < K) load_rows(slot, k);
#pragma unroll
                for (int n = 0; n < 2; n++) {
                    uint32_t k_B[4], v_B[4];
                    load_B_of_columns<HS>(k_B, k_tile, first + 16 * n, k);
                    load_B_of_columns<HS>(v_B, v_tile, first + 16 * n, k);
#pragma unroll
                    for (int m = 0; m < M; m++) {
                        mma_two(s[m][2 * n], s[m][2 * n + 1], q_A[m][slot], k_B);
                        mma_two(dp[m][2 * n], dp[m][2 * n + 1], do_A[m][slot], v_B);
                    }
                }
            }
            if (first_key + 32 > first_query + 1)
                mask(s, [&](int query, int key) { return first_key + key > first_query + query; });
            // ds = p (scale dp - scale delta), in s's place
#pragma unroll
            for (int m = 0; m < M; m++)
#pragma unroll
                for (int n = 0; n < 4; n++)
#pragma unroll
                    for (int e = 0; e < 4; e++)
                        s[m][n][e] = exp2_approx(scale2 * s[m][n][e] - lse2[m][e / 2]) *
                                     (scale * dp[m][n][e] - scaled_delta[m][e / 2]);
            add_product<HS, M, 2>(sums, s, k_tile, first);  // dq += ds k
        }
        __syncthreads();
    }
#pragma unroll
    for (int m = 0; m < M; m++)
#pragma unroll
        for (int half = 0; half < 2; half++) {
            const int i = first_query + 16 * m + g + 8 * half;
            if (i < T) store_row(dq.at(b, h, i), sums[m], half);
        }
}

// dk, dv. A block has a head's 64·M keys, and goes through tiles of 64 queries, 32 at a time. With keys as rows,
// sᵀ = k qᵀ and dpᵀ = v doᵀ, so that pᵀ and dsᵀ are A fragments of dv = pᵀ do and dk = dsᵀ q.
// Shared memory: k and v (64·M, HS); q and do (64, HS) of this tile and of the next; lse and delta (64) of both.
template <int HS>
constexpr size_t BACKWARD_KEY_SHARED = (2 * FRAGMENTS<HS> + 4) * TILE * HS * sizeof(bf16) + 4 * TILE * sizeof(float);

template <int HS, class DKV>
__global__ void __launch_bounds__(TILE_BLOCK, 2)
    attention_backward_key_tiles_kernel(KeysValues<DKV> dkv, Heads<const bf16> dout, const float* lse,
                                        const float* delta, Heads<const bf16> q, KeysValues<const bf16> kv, int T,
                                        float scale) {
    constexpr int M = FRAGMENTS<HS>, K = HS / 16, ROWS = TILE * M;
    extern __shared__ uint4 shared_memory[];
    bf16 *k_tile = (bf16*)shared_memory, *v_tile = k_tile + ROWS * HS, *q_tiles = v_tile + ROWS * HS;
    float* statistics = (float*)(q_tiles + 4 * TILE * HS);  // (2, 2, TILE): lse and delta, as they are used
    static_assert(TILE_BLOCK == 2 * TILE, "one thread for each of a tile's lse and delta");
    const int lane = threadIdx.x % WARP, g = lane / 4, c = lane % 4, row = threadIdx.x / WARP * 16 * M;  // of the warp
    const int j0 = blockIdx.x * ROWS, h = blockIdx.y, b = blockIdx.z, first_key = j0 + row;
    const int begin = j0 / TILE, tiles = (T + TILE - 1) / TILE;
    const Heads<const bf16> k_rows = kv.keys(h), v_rows = kv.values(h);
    const size_t rows = ((size_t)b * gridDim.y + h) * T;
    const float scale2 = scale * LOG2_E;
    auto copy_queries = [&](int i) { copy_pair<HS>(q_tiles, q, dout, b, h, i, T); };
    // Past the end q and do are 0, and with lse = delta = 0 so is all that they give.
    auto read_statistic = [&](int tile) {
        const int i = tile * TILE + (int)threadIdx.x % TILE;
        if (i >= T) return 0.0f;
        return (int)threadIdx.x < TILE ? LOG2_E * lse[rows + i] : scale * delta[rows + i];
    };
    copy_tile<HS, ROWS>(k_tile, k_rows.at(b, h, 0), k_rows.row, j0, T);
    copy_tile<HS, ROWS>(v_tile, v_rows.at(b, h, 0), v_rows.row, j0, T);
    copy_queries(begin);
    cp_async_commit();
    statistics[begin % 2 * 2 * TILE + threadIdx.x] = read_statistic(begin);

    float sums_k[M][2 * K][4] = {}, sums_v[M][2 * K][4] = {};
    for (int i = begin; i < tiles; i++) {
        if (i + 1 < tiles) copy_queries(i + 1);
        cp_async_commit();
        const float next_statistic = read_statistic(i + 1);
        cp_async_wait<1>();
        __syncthreads();
        const bf16 *q_tile = q_tiles + i % 2 * 2 * TILE * HS, *do_tile = q_tile + TILE * HS;
        const float *lse2 = statistics + i % 2 * 2 * TILE, *scaled_delta = lse2 + TILE;
#pragma unroll 1
        for (int first = 0; first < TILE; first += 32) {
            const int first_query = i * TILE + first;
            if (first_query + 32 <= first_key) continue;  // earlier than all of the warp's keys
            // sᵀ = k qᵀ, dpᵀ = v doᵀ
            float s[M][4][4] = {}, dp[M][4][4] = {};
#pragma unroll
            for (int k = 0; k < K; k++) {
                uint32_t A[M][4], B[4];
#pragma unroll
                for (int m = 0; m < M; m++) load_A<HS>(A[m], k_tile, row + 16 * m, k);
#pragma unroll
                for (int n = 0; n < 2; n++) {
                    load_B_of_columns<HS>(B, q_tile, first + 16 * n, k);
#pragma unroll
                    for (int m = 0; m < M; m++) mma_two(s[m][2 * n], s[m][2 * n + 1], A[m], B);
                }
#pragma unroll
                for (int m = 0; m < M; m++) load_A<HS>(A[m], v_tile, row + 16 * m, k);
#pragma unroll
                for (int n = 0; n < 2; n++) {
                    load_B_of_columns<HS>(B, do_tile, first + 16 * n, k);
#pragma unroll
                    for (int m = 0; m < M; m++) mma_two(dp[m][2 * n], dp[m][2 * n + 1], A[m], B);
                }
            }
            if (first_query < first_key + 16 * M - 1)
                mask(s, [&](int key, int query) { return first_key + key > first_query + query; });
            // p in s's place, ds = p (scale dp - scale delta) in dp's
#pragma unroll
            for (int n = 0; n < 4; n++)
#pragma unroll
                for (int e = 0; e < 4; e++) {
                    const int query = first + 8 * n + 2 * c + e % 2;
#pragma unroll
                    for (int m = 0; m < M; m++) {
                        s[m][n][e] = exp2_approx(scale2 * s[m][n][e] - lse2[query]);
                        dp[m][n][e] = s[m][n][e] * (scale * dp[m][n][e] - scaled_delta[query]);
                    }
                }
            add_product<HS, M, 2>(sums_v, s, do_tile, first);  // dv += pᵀ do
            add_product<HS, M, 2>(sums_k, dp, q_tile, first);  // dk += dsᵀ q
        }
        statistics[(i + 1) % 2 * 2 * TILE + threadIdx.x] = next_statistic;
        __syncthreads();
    }
#pragma unroll
    for (int m = 0; m < M; m++)
#pragma unroll
        for (int half = 0; half < 2; half++) {
            const int j = first_key + 16 * m + g + 8 * half;
            if (j >= T) continue;
            store_row(dkv.keys(h).at(b, h, j), sums_k[m], half);
            store_row(dkv.values(h).at(b, h, j), sums_v[m], half);
        }
}

template <int HS, class DKV>
static void attention_backward_tiles(Heads<bf16> dq, const KeysValues<DKV>& dkv, float* delta, Heads<const bf16> dout,
                                     Heads<const bf16> o, const float* lse, Heads<const bf16> q,
                                     const KeysValues<const bf16>& kv, const AttentionShape& s) {
    dim3 grid((unsigned)ceil_div(s.queries, TILE * FRAGMENTS<HS>), (unsigned)s.NH, (unsigned)s.B);
    auto query_kernel = attention_backward_query_tiles_kernel<HS>;
    allow_shared(query_kernel, BACKWARD_QUERY_SHARED<HS>);
    query_kernel<<<grid, TILE_BLOCK, BACKWARD_QUERY_SHARED<HS>, gpu.stream>>>(dq, delta, dout, o, lse, q, kv, s.queries,
                                                                             s.scale());
    CHECK(cudaGetLastError());
    auto key_kernel = attention_backward_key_tiles_kernel<HS, DKV>;
    allow_shared(key_kernel, BACKWARD_KEY_SHARED<HS>);
    key_kernel<<<grid, TILE_BLOCK, BACKWARD_KEY_SHARED<HS>, gpu.stream>>>(dkv, dout, lse, delta, q, kv, s.queries,
                                                                         s.scale());
    CHECK(cudaGetLastError());
}

// All heads, by the kernels that suit them. o, q: `queries` rows; k, v: `before` more; lse (B, NH, queries) or null.
template <class X>
static void attention_heads_forward(Heads<X> o, float* lse, Heads<const X> q, const KeysValues<const X>& kv,
                                    const AttentionShape& s) {
    if constexpr (std::is_same_v<X, bf16>) {
        if (s.HS == 64 && s.queries > 1) return attention_forward_tiles<64>(o, lse, q, kv, s);
        if (s.HS == 128 && s.queries > 1) return attention_forward_tiles<128>(o, lse, q, kv, s);
    }
    attention_forward_plain(o, lse, q, kv, s, s.queries == 1 ? 8 : 1);
}

// dq, dk, dv = from do; dk, dv of type DKV. delta (B, NH, T) is scratch for do·o.
template <class X, class DKV>
static void attention_heads_backward(Heads<X> dq, const KeysValues<DKV>& dkv, float* delta, Heads<const X> dout,
                                     Heads<const X> o, const float* lse, Heads<const X> q,
                                     const KeysValues<const X>& kv, const AttentionShape& s) {
    if constexpr (std::is_same_v<X, bf16>) {
        if (s.HS == 64) return attention_backward_tiles<64>(dq, dkv, delta, dout, o, lse, q, kv, s);
        if (s.HS == 128) return attention_backward_tiles<128>(dq, dkv, delta, dout, o, lse, q, kv, s);
    }
    attention_backward_plain<X, DKV>(dq, dkv, delta, dout, o, lse, q, kv, s);
}

// A whole layer. qkv (B, T, 3C) is the layer's own; skipping heads find keys and values in qkv_below, that of layer
// l - skip_distance. o (B, T, C), lse (B, NH, T).
template <class X>
static Heads<X> qkv_heads(X* qkv, int part, const Config& c, size_t T) {  // part 0: queries, 1: keys, 2: values
    size_t C = c.C;
    return {qkv + part * C, T * 3 * C, (size_t)c.head_size(), 3 * C};
}

template <class X>
static KeysValues<X> qkv_keys_values(X* qkv, X* qkv_below, const Config& c, int l, size_t T) {
    return {qkv_heads(qkv, 1, c, T), qkv_heads(qkv, 2, c, T), qkv_heads(qkv_below, 1, c, T),
            qkv_heads(qkv_below, 2, c, T), skipping_heads(c, l)};
}

template <class X>
static void attention_forward(X* o, float* lse, const X* qkv, const X* qkv_below, const Config& c, int l, size_t B,
                              size_t T) {
    size_t C = c.C, HS = c.head_size();
    Timed timed(ATTENTION, attention_flops(B, T, C, 2), 0);
    attention_heads_forward<X>({o, T * C, HS, C}, lse, qkv_heads(qkv, 0, c, T),
                               qkv_keys_values(qkv, qkv_below, c, l, T), {(int)B, c.NH, (int)HS, (int)T, 0});
}

// dq = in dqkv (B, T, 3C). dk, dv = there too if dkv is null, as with vanilla; else they are only shares of a sum, and
// go to dkv (B, T, 2C), those of skipping heads to dkv_below, which belongs to layer l - skip_distance.
// delta (B, NH, T) is scratch.
template <class X>
static void attention_backward(X* dqkv, float* dkv, float* dkv_below, float* delta, const X* dout, const X* o,
                               const float* lse, const X* qkv, const X* qkv_below, const Config& c, int l, size_t B,
                               size_t T) {
    size_t C = c.C, HS = c.head_size();
    Timed timed(ATTENTION, attention_flops(B, T, C, 4), 0);
    const AttentionShape shape = {(int)B, c.NH, (int)HS, (int)T, 0};
    const Heads<const X> dout_heads = {dout, T * C, HS, C}, o_heads = {o, T * C, HS, C};
    auto heads = [&](const auto& dkv_heads) {
        attention_heads_backward(qkv_heads(dqkv, 0, c, T), dkv_heads, delta, dout_heads, o_heads, lse,
                                 qkv_heads(qkv, 0, c, T), qkv_keys_values(qkv, qkv_below, c, l, T), shape);
    };
    auto shares = [&](float* share, int part) { return Heads<float>{share + (part - 1) * C, T * 2 * C, HS, 2 * C}; };
    if (!dkv) return heads(qkv_keys_values<X>(dqkv, dqkv, c, l, T));
    heads(KeysValues<float>{shares(dkv, 1), shares(dkv, 2), shares(dkv_below, 1), shares(dkv_below, 2),
                            skipping_heads(c, l)});
}

// --------------------------------------------------------------------------------------------------------------------
// Skip-Layer Attention: where the keys and values of a layer go

// Lanes by head. Head h of `own_from` and further on reads this layer, head h < above_heads is read from above.
template <bool VECTORS, class X>
__global__ void skip_backward_kernel(X* dqkv, const float* dkv, const float* dkv_above, int own_from, int above_heads,
                                     size_t rows, int NH, int HS, int lanes) {
    const HeadGroup g(lanes, rows, NH);
    const bool own = g.h >= own_from, above = g.h < above_heads;
    if (!g.inside || (!own && !above)) return;
    const size_t C = (size_t)NH * HS;
    for (int part = 0; part < 2; part++) {  // of keys, of values
        const size_t at = (g.r * 2 + part) * C + g.h * HS;
        float sum[SHARE] = {}, more[SHARE] = {};
        if (own) load<VECTORS>(sum, dkv + at, g.lane, lanes, HS);
        if (above) load<VECTORS>(more, dkv_above + at, g.lane, lanes, HS);
#pragma unroll
        for (int i = 0; i < SHARE; i++) sum[i] += more[i];
        store<VECTORS>(dqkv + (g.r * 3 + part + 1) * C + g.h * HS, sum, g.lane, lanes, HS);
    }
}

// dk, dv of layer l in dqkv (rows, 3C) = the sum of its readers' shares (rows, 2C): dkv, of its own heads that do not
// skip, and dkv_above, of the heads that layer l + skip_distance read here (null: there is no such layer). Heads that
// nobody reads stay untouched.
template <class X>
static void skip_backward(X* dqkv, const float* dkv, const float* dkv_above, const Config& c, int l, size_t rows) {
    size_t HS = c.head_size();
    Timed timed(ATTENTION, 0, 2.0 * rows * c.C * (sizeof(float) + sizeof(X)));
    const int lanes = lanes_of_head(HS);
    auto kernel = vectors(HS) ? skip_backward_kernel<true, X> : skip_backward_kernel<false, X>;
    kernel<<<head_groups_grid(rows, c.NH, lanes), HEADS_BLOCK, 0, gpu.stream>>>(
        dqkv, dkv, dkv_above, skipping_heads(c, l), dkv_above ? c.skip_heads : 0, rows, c.NH, (int)HS,
        lanes);
    CHECK(cudaGetLastError());
}

// --------------------------------------------------------------------------------------------------------------------
// Depth-Attention: each value is mixed with the values of earlier layers, at one token at a time

__device__ inline float dot_over(const float (&a)[SHARE], const float (&b)[SHARE], int lanes) {
    float sum = 0;
#pragma unroll
    for (int i = 0; i < SHARE; i++) sum += a[i] * b[i];
    return sum_over(sum, lanes);
}

// v becomes ṽ. Layer l's queries, keys and values are at q, k, v; those of layer j at `layer` times (j - l) from there.
// a (rows, S + 1, NH), the layer itself last. Token r is position r % T of sequence r / T.
template <bool VECTORS, class X>
__global__ void depth_mix_kernel(Heads<X> v, float* a, Heads<const X> q, Heads<const X> k, ptrdiff_t layer,
                                 const int* sources, int S, int l, size_t rows, int T, int NH, int HS, int lanes,
                                 float scale) {
    const HeadGroup g(lanes, rows, NH);
    const int b = (int)g.r / T, t = (int)g.r % T, channels = g.inside ? HS : 0;
    float q_l[SHARE], k_j[SHARE], v_j[SHARE];
    float* a_l = a + g.r * (S + 1) * NH + g.h;
    load<VECTORS>(q_l, q.at(b, g.h, t), g.lane, lanes, channels);
    load<VECTORS>(k_j, k.at(b, g.h, t), g.lane, lanes, channels);
    load<VECTORS>(v_j, v.at(b, g.h, t), g.lane, lanes, channels);
    // Online, as in attention: the mean so far is mixed/sum, with e^(s - max) as weights.
    const float own = scale * dot_over(q_l, k_j, lanes);
    float max = own, sum = 1, mixed[SHARE];
#pragma unroll
    for (int i = 0; i < SHARE; i++) mixed[i] = v_j[i];
#pragma unroll 2
    for (int n = 0; n < S; n++) {
        const ptrdiff_t to_j = layer * (sources[n] - l);
        load<VECTORS>(k_j, k.at(b, g.h, t) + to_j, g.lane, lanes, channels);
        load<VECTORS>(v_j, v.at(b, g.h, t) + to_j, g.lane, lanes, channels);
        const float s = scale * dot_over(q_l, k_j, lanes), new_max = fmaxf(max, s);
        const float rescale = expf(max - new_max), p = expf(s - new_max);
        if (g.inside && g.lane == 0) a_l[n * NH] = s;
        max = new_max;
        sum = sum * rescale + p;
#pragma unroll
        for (int i = 0; i < SHARE; i++) mixed[i] = mixed[i] * rescale + p * v_j[i];
    }
    const float part = 1.0f / sum;
#pragma unroll
    for (int i = 0; i < SHARE; i++) mixed[i] *= part;
    store<VECTORS>(v.at(b, g.h, t), mixed, g.lane, lanes, channels);
    if (!g.inside || g.lane > 0) return;
    for (int n = 0; n < S; n++) a_l[n * NH] = expf(a_l[n * NH] - max) * part;
    a_l[S * NH] = expf(own - max) * part;
}

template <class X>
static void depth_mix(Heads<X> v, float* a, Heads<const X> q, Heads<const X> k, ptrdiff_t layer, const int* sources,
                      size_t S, const Config& c, int l, size_t rows, size_t T) {
    size_t C = c.C, HS = c.head_size();
    Timed timed(DEPTH_MIXING, 4.0 * rows * C * (S + 1), (2.0 * S + 4) * rows * C * sizeof(X));
    const int lanes = lanes_of_head(HS);
    auto kernel = vectors(HS, C) ? depth_mix_kernel<true, X> : depth_mix_kernel<false, X>;
    kernel<<<head_groups_grid(rows, c.NH, lanes), HEADS_BLOCK, 0, gpu.stream>>>(
        v, a, q, k, layer, sources, (int)S, l, rows, (int)T, c.NH, (int)HS, lanes, 1.0f / sqrtf((float)HS));
    CHECK(cudaGetLastError());
}

// All tokens of layer l: qkv of each layer j (L, rows, 3C), a (rows, S + 1, NH)
template <class X>
static void depth_forward(float* a, X* qkv, const int* sources, size_t S, const Config& c, int l, size_t rows) {
    if (S == 0) return;
    const size_t layer = rows * 3 * c.C;
    X* qkv_l = qkv + l * layer;
    depth_mix<X>(qkv_heads(qkv_l, 2, c, rows), a, qkv_heads<const X>(qkv_l, 0, c, rows),
                 qkv_heads<const X>(qkv_l, 1, c, rows), (ptrdiff_t)layer, sources, S, c, l, rows, rows);
}

// What layer l gathers from layer m, of which it is the n-th of so many sources: a (rows, sources + 1, NH) and
// ds (rows, sources, NH).
struct Gather {
    int m, n, sources;
    const float *a, *ds;
};

// dqkv (rows, 3C) comes in with causal attention's dq, dkv (rows, 2C) with its dk and dṽ of layer l; dqkv goes out with
// dq, dk, dv complete. qkv (L, rows, 3C); ds =, and dṽ_l in place of ṽ_l in qkv.
template <bool VECTORS, class X>
__global__ void depth_backward_kernel(X* dqkv, const float* dkv, float* ds, const float* a, X* qkv, const int* sources,
                                      int S, const Gather* gathers, int R, int l, size_t rows, int NH, int HS,
                                      int lanes, float scale) {
    const HeadGroup g(lanes, rows, NH);
    const size_t C = (size_t)NH * HS, at_q = g.r * 3 * C + g.h * HS, at_k = at_q + C, at_v = at_k + C;
    const size_t layer = rows * 3 * C;
    const int channels = g.inside ? HS : 0;
    auto read = [&](float (&share)[SHARE], const auto* row) { load<VECTORS>(share, row, g.lane, lanes, channels); };
    auto write = [&](X* row, const float (&share)[SHARE]) {
        store<VECTORS>(row, share, g.lane, lanes, channels);
    };
    float dq[SHARE], dk[SHARE], dv[SHARE], x[SHARE], y[SHARE], a_own = 1;
    read(dk, dkv + g.r * 2 * C + g.h * HS);
    read(dv, dkv + g.r * 2 * C + C + g.h * HS);
    // Gather: dk_l += Σ_m ds_m,l q_m/√HS, dṽ_l += Σ_m a_m,l dṽ_m
#pragma unroll 2
    for (int j = 0; j < R; j++) {
        const Gather from = gathers[j];
        const float a_ml = from.a[(g.r * (from.sources + 1) + from.n) * NH + g.h];
        const float ds_ml = scale * from.ds[(g.r * from.sources + from.n) * NH + g.h];
        read(x, qkv + from.m * layer + at_q);
        read(y, qkv + from.m * layer + at_v);
#pragma unroll
        for (int i = 0; i < SHARE; i++) dk[i] += ds_ml * x[i], dv[i] += a_ml * y[i];
    }
    // Through the mixing; dv is dṽ_l up to here
    if (S > 0) {
        const float* a_l = a + g.r * (S + 1) * NH + g.h;
        read(x, qkv + l * layer + at_v);
        read(dq, dqkv + at_q);
        const float delta = dot_over(dv, x, lanes);
        float ds_own = 0;
#pragma unroll 2
        for (int n = 0; n < S; n++) {
            read(x, qkv + sources[n] * layer + at_k);
            read(y, qkv + sources[n] * layer + at_v);
            const float ds_j = a_l[n * NH] * (dot_over(dv, y, lanes) - delta);
            if (g.inside && g.lane == 0) ds[(g.r * S + n) * NH + g.h] = ds_j;
            ds_own -= ds_j;
#pragma unroll
            for (int i = 0; i < SHARE; i++) dq[i] += scale * ds_j * x[i];
        }
        read(x, qkv + l * layer + at_q);
        read(y, qkv + l * layer + at_k);
#pragma unroll
        for (int i = 0; i < SHARE; i++) dq[i] += scale * ds_own * y[i], dk[i] += scale * ds_own * x[i];
        write(dqkv + at_q, dq);
        write(qkv + l * layer + at_v, dv);
        a_own = a_l[S * NH];
    }
#pragma unroll
    for (int i = 0; i < SHARE; i++) dv[i] *= a_own;
    write(dqkv + at_k, dk);
    write(dqkv + at_v, dv);
}

template <class X>
static void depth_backward(X* dqkv, const float* dkv, float* ds, const float* a, X* qkv, const int* sources, size_t S,
                           const Gather* gathers, size_t R, const Config& c, int l, size_t rows) {
    size_t C = c.C, HS = c.head_size();
    Timed timed(DEPTH_MIXING, (8.0 * (S > 0 ? S + 1 : 0) + 4.0 * R) * rows * C,
                (4.0 * S + 2.0 * R + 6) * rows * C * sizeof(X));
    const int lanes = lanes_of_head(HS);
    auto kernel = vectors(HS, C) ? depth_backward_kernel<true, X> : depth_backward_kernel<false, X>;
    kernel<<<head_groups_grid(rows, c.NH, lanes), HEADS_BLOCK, 0, gpu.stream>>>(
        dqkv, dkv, ds, a, qkv, sources, (int)S, gathers, (int)R, l, rows, c.NH, (int)HS, lanes,
        1.0f / sqrtf((float)HS));
    CHECK(cudaGetLastError());
}

// --------------------------------------------------------------------------------------------------------------------
// Classifier: logits = x wteᵀ, loss = -log softmax(logits)[y]
//
// Some tokens at a time (classifier_rows) go all the way, to the gradients of x and wte, so that logits for all B·T
// never exist at once. With p = softmax(logits), loss = log Σ e^logit - logit_y, so dlogits = p - 1[y].
// Columns from V to Vp are computed, and then left out: they get no probability, and their gradient is 0.

// A block has a token. It reads the logits twice, the second time from the L2 cache, and writes gradient_scale ·
// dlogits in their place, unless gradient_scale is 0.
constexpr int CLASSIFIER_BLOCK = 1024;  // so that the rows under way fit into an H100's L2 cache

template <class X>
__global__ void __launch_bounds__(CLASSIFIER_BLOCK, 2)
    softmax_cross_entropy_kernel(float* losses, X* all_logits, const int* targets, int V, int Vp,
                                 float gradient_scale) {
    __shared__ float maxima[WARP], sums[WARP];
    X* logits = all_logits + (size_t)blockIdx.x * Vp;
    const int lane = threadIdx.x % WARP, warp = threadIdx.x / WARP, warps = blockDim.x / WARP;
    const int y = targets[blockIdx.x], step = blockDim.x * SHARE;
    const float logit_y = (float)logits[y];
    float max = -INFINITY, sum = 0, share[SHARE];
    auto read = [&](int v) {
        load<true>(share, logits + v, 0, 1, SHARE);
        if (v + SHARE <= V) return;
#pragma unroll
        for (int i = 0; i < SHARE; i++)
            if (v + i >= V) share[i] = -INFINITY;
    };
    for (int v = threadIdx.x * SHARE; v < V; v += step) {
        read(v);
        float new_max = max;
#pragma unroll
        for (int i = 0; i < SHARE; i++) new_max = fmaxf(new_max, share[i]);
        const float top = LOG2_E * new_max;  // e^(x - max) = 2^(x log₂e - top): two instructions, exact to some 1e-6
        sum *= exp2_approx(LOG2_E * max - top);
#pragma unroll
        for (int i = 0; i < SHARE; i++) sum += exp2_approx(LOG2_E * share[i] - top);
        max = new_max;
    }
    // Threads that had nothing have max = -inf and sum = 0; the first of a warp, or a block, always had something.
    auto scaled = [](float sum, float max, float new_max) { return max == -INFINITY ? 0 : sum * expf(max - new_max); };
    const float warp_max = maximum_over(max), warp_sum = sum_over(scaled(sum, max, warp_max));
    if (lane == 0) maxima[warp] = warp_max, sums[warp] = warp_sum;
    __syncthreads();
    const float max_w = lane < warps ? maxima[lane] : -INFINITY, sum_w = lane < warps ? sums[lane] : 0;
    max = maximum_over(max_w);  // by each warp for itself, a lane for each of the block's warps
    sum = sum_over(scaled(sum_w, max_w, max));
    if (threadIdx.x == 0) losses[blockIdx.x] = logf(sum) + max - logit_y;
    if (gradient_scale == 0) return;
    const float scale = gradient_scale / sum, top = LOG2_E * max;
    // Backwards, since what was read last is nearest.
    for (int v = (int)threadIdx.x * SHARE + (Vp - 1) / step * step; v >= 0; v -= step) {
        if (v >= Vp) continue;
        read(v);
#pragma unroll
        for (int i = 0; i < SHARE; i++) share[i] = scale * exp2_approx(LOG2_E * share[i] - top);
        if (v <= y && y < v + SHARE) {
#pragma unroll
            for (int i = 0; i < SHARE; i++)
                if (v + i == y) share[i] -= gradient_scale;
        }
        store<true>(logits + v, share, 0, 1, SHARE);
    }
}

template <class X>
static void softmax_cross_entropy(float* losses, X* logits, const int* targets, size_t rows, size_t V, size_t Vp,
                                  float gradient_scale) {
    const unsigned block = (unsigned)std::min<size_t>(CLASSIFIER_BLOCK, round_up(ceil_div(Vp, SHARE), WARP));
    softmax_cross_entropy_kernel<X><<<(unsigned)rows, block, 0, gpu.stream>>>(losses, logits, targets, (int)V, (int)Vp,
                                                                          gradient_scale);
    CHECK(cudaGetLastError());
}

// losses (rows); with gradient_scale ≠ 0 also dx = and dwte = or +=. Scratch: logits (classifier_rows, Vp).
template <class X>
static void classifier(const Workspace& ws, float* losses, X* dx, float* dwte, X* logits, const X* x, const X* wte,
                       const int* targets, size_t rows, size_t C, size_t V, size_t Vp, float gradient_scale,
                       bool accumulate) {
    Timed timed(CLASSIFIER, 0, 0);
    size_t at_once = classifier_rows(rows, Vp);
    for (size_t r = 0; r < rows; r += at_once) {
        size_t n = std::min(rows - r, at_once);
        matmul<X, X>(ws, logits, Vp, n, Vp, C, along_k(x + r * C, C), along_k(wte, C));
        softmax_cross_entropy(losses + r, logits, targets + r, n, V, Vp, gradient_scale);
        if (gradient_scale == 0) continue;
        linear_backward_input(ws, dx + r * C, logits, wte, n, C, Vp, Vp);
        linear_backward_weight<X>(ws, dwte, nullptr, nullptr, logits, x + r * C, n, C, Vp, Vp, accumulate || r > 0);
    }
}

// --------------------------------------------------------------------------------------------------------------------
// AdamW

// What a step gives back. It comes to the CPU once, at the step's end.
struct Results {
    double loss_sum, norm;
    float gradient_scale;  // min(1, clip/norm)
};

constexpr int SUM_BLOCK = 256;
constexpr size_t UPDATE_RUN = 1 << 14;  // elements that a block of sum_of_squares goes through

// Over the block; the first thread has the result.
__device__ inline double block_sum(double x) {
    __shared__ double terms[SUM_BLOCK];
    terms[threadIdx.x] = x;
    for (int half = SUM_BLOCK / 2; half > 0; half /= 2) {
        __syncthreads();
        if ((int)threadIdx.x < half) terms[threadIdx.x] += terms[threadIdx.x + half];
    }
    return threadIdx.x == 0 ? terms[0] : 0;
}

// partial (runs): Σ g² over a run of UPDATE_RUN elements, one block each
__global__ void sum_of_squares_kernel(double* partial, const float* g, size_t n) {
    const size_t begin = blockIdx.x * UPDATE_RUN, end = min(n, begin + UPDATE_RUN);
    double sum = 0;
    for (size_t i = begin + threadIdx.x * SHARE; i < end; i += SUM_BLOCK * SHARE) {
        float share[SHARE];
        if (i + SHARE <= end) load<true>(share, g + i, 0, 1, SHARE);
        else load<false>(share, g + i, 0, 1, (int)(end - i));
#pragma unroll
        for (int j = 0; j < SHARE; j++) sum += (double)share[j] * share[j];
    }
    sum = block_sum(sum);
    if (threadIdx.x == 0) partial[blockIdx.x] = sum;
}

// One block
__global__ void norm_kernel(Results* results, const double* partial, int runs, float clip) {
    double sum = 0;
    for (int run = threadIdx.x; run < runs; run += SUM_BLOCK) sum += partial[run];
    sum = block_sum(sum);
    if (threadIdx.x > 0) return;
    const double norm = sqrt(sum);
    results->norm = norm;
    results->gradient_scale = clip > 0 && norm > clip ? (float)(clip / norm) : 1.0f;
}

// The norm of all gradients g (n), over fixed runs, then over the runs in a fixed order; partial (runs) is scratch
static void global_norm(Results* results, double* partial, const float* g, size_t n, float clip) {
    Timed timed(ADAMW, 0, n * sizeof(float));
    size_t runs = ceil_div(n, UPDATE_RUN);
    sum_of_squares_kernel<<<(unsigned)runs, SUM_BLOCK, 0, gpu.stream>>>(partial, g, n);
    CHECK(cudaGetLastError());
    norm_kernel<<<1, SUM_BLOCK, 0, gpu.stream>>>(results, partial, (int)runs, clip);
    CHECK(cudaGetLastError());
}

// loss_sum = or += Σ losses (n). One block
__global__ void sum_losses_kernel(Results* results, const float* losses, size_t n, bool accumulate) {
    double sum = 0;
    for (size_t i = threadIdx.x; i < n; i += SUM_BLOCK) sum += losses[i];
    sum = block_sum(sum);
    if (threadIdx.x == 0) results->loss_sum = accumulate ? results->loss_sum + sum : sum;
}

static void sum_losses(Results* results, const float* losses, size_t n, bool accumulate) {
    sum_losses_kernel<<<1, SUM_BLOCK, 0, gpu.stream>>>(results, losses, n, accumulate);
    CHECK(cudaGetLastError());
}

// m = β1 m + (1-β1) g, v = β2 v + (1-β2) g²; both start at 0 and so fall short of the mean of the g, g² so far by the
// factor 1-β^step, which is divided out; w -= lr (m̂/(√v̂ + eps) + decay w)   (Loshchilov and Hutter, arXiv 1711.05101)
// `working` is the copy of w that layers use; with float it is w itself. A thread has a share of the elements.
template <bool VECTORS, class X>
__global__ void adamw_update_kernel(X* working, float* w, float* m, float* v, const float* gradient, size_t n, AdamW a,
                                    float decay, const Results* results, float m_correction, float v_correction) {
    const size_t at = ((size_t)blockIdx.x * blockDim.x + threadIdx.x) * SHARE;
    if (at >= n) return;
    const int left = (int)min((size_t)SHARE, n - at);
    const float gradient_scale = results->gradient_scale;
    float g[SHARE], w_i[SHARE], m_i[SHARE], v_i[SHARE];
    load<VECTORS>(g, gradient + at, 0, 1, left);
    load<VECTORS>(w_i, w + at, 0, 1, left);
    load<VECTORS>(m_i, m + at, 0, 1, left);
    load<VECTORS>(v_i, v + at, 0, 1, left);
#pragma unroll
    for (int i = 0; i < SHARE; i++) {
        g[i] *= gradient_scale;
        m_i[i] = a.beta1 * m_i[i] + (1.0f - a.beta1) * g[i];
        v_i[i] = a.beta2 * v_i[i] + (1.0f - a.beta2) * g[i] * g[i];
        w_i[i] -= a.lr * (m_i[i] * m_correction / (sqrtf(v_i[i] * v_correction) + a.eps) + decay * w_i[i]);
    }
    store<VECTORS>(w + at, w_i, 0, 1, left);
    store<VECTORS>(m + at, m_i, 0, 1, left);
    store<VECTORS>(v + at, v_i, 0, 1, left);
    if constexpr (!std::is_same_v<X, float>) store<VECTORS>(working + at, w_i, 0, 1, left);
}

template <class X>
static void adamw_update(X* working, float* w, float* m, float* v, const float* gradient, size_t n, const AdamW& a,
                         float decay, const Results* results, int step) {
    constexpr int BLOCK = 256;
    Timed timed(ADAMW, 0, n * (7.0 * sizeof(float) + (sizeof(X) == sizeof(float) ? 0 : sizeof(X))));
    float m_correction = (float)(1.0 / (1.0 - pow(a.beta1, step)));
    float v_correction = (float)(1.0 / (1.0 - pow(a.beta2, step)));
    auto kernel = vectors(n, elements_before(w)) ? adamw_update_kernel<true, X> : adamw_update_kernel<false, X>;
    kernel<<<(unsigned)ceil_div(n, BLOCK * SHARE), BLOCK, 0, gpu.stream>>>(working, w, m, v, gradient, n, a, decay,
                                                                          results, m_correction, v_correction);
    CHECK(cudaGetLastError());
}

// --------------------------------------------------------------------------------------------------------------------
// The model

// One batch on its way, by turns in one of two buffers: while a step computes on the one, the next batch comes in on
// another stream into the other.
struct Inputs {
    int *host, *device;          // (4 B·T + 1) of x, y and where each token of x stands: place, first
    int used;                    // different tokens
    cudaEvent_t copied, done;    // on its way in; with its step

    const int* part(int n, size_t BT) const { return device + n * BT; }  // 0: x, 1: y, 2: place, 3: first
};

struct Model {
    Config config;
    Precision precision;
    Workload work;
    TensorTable tensors;
    Memory memory;
    std::vector<void*> blocks;  // all that was allocated

    float *parameters, *gradients, *moment1, *moment2;  // (parameter_count) each, in tensor_table's order
    int accumulated;                  // backward passes since the last update
    Inputs inputs[2];
    int turn;                         // of the inputs
    std::vector<int> counts;          // (V) scratch of model_set_inputs
    float *ln_mean, *ln_rstd;         // (2L+1, B, T)    of the LayerNorm that reads the residual stream there
    float* lse;                       // (L, B, NH, T)   attention's log-sum-exp
    std::vector<float*> mix, dmix;    // depth: a, L × (B, T, |S_l|+1, NH), and its gradient ds, L × (B, T, |S_l|, NH)
    float* losses;                    // (B, T)
    Results *results, *results_here;  // on the GPU; and on the CPU, as of ...
    bool results_fresh;               // ... now
    size_t loss_count;
    float *dkv, *skip_dkv;            // (B, T, 2C) shares of dk, dv; (skip_slots, B, T, 2C) those that wait for a layer
    float *delta;                     // (B, NH, T) scratch of attention_backward
    float *partial, *dx_sum;          // scratch of sums over tokens, and of linear_backward_input
    double* norm_partial;             // scratch of global_norm
    // By layer, as depth_sources, depth_readers and live_columns say; and the first two's tables on the GPU
    std::vector<std::vector<int>> sources;
    std::vector<std::vector<Reader>> readers;
    std::vector<std::vector<Columns>> live;
    std::vector<int*> source_tables;
    std::vector<Gather*> gather_tables;
    size_t cache_length;              // positions filled
    int* new_tokens;                  // (sequences · maxT)
    float *new_mix, *new_logits;      // scratch of depth_mix, (sequences, Vp)
    Workspace ws;
};

// What is kept in the type that layers compute on. Training keeps every layer's activations; else layers take turns,
// but for qkv, which skip and depth read later.
template <class X>
struct ModelOf : Model {
    X* weights;                       // the working copy of the parameters; with float, these themselves
    X* residual;                      // (2L+1, B, T, C) the stream into each attention and MLP, and out of the last
    X* qkv;                           // (L, B, T, 3C)   depth: ṽ in place of v, and after backward dṽ
    X* atty;                          // (L, B, T, C)
    X* fch;                           // (L, B, T, 4C)   before GELU
    // A LayerNorm's output (2L+1, B, T, C) and GELU's (L, B, T, 4C): of all layers, or, recomputed, of one at a time
    X *ln, *fch_gelu;

    // Scratch, used within a layer. Gradients:
    X* logits;                        // (classifier_rows, Vp)
    X *dresidual, *dln, *datty;       // (B, T, C)
    X *dqkv, *dfch;                   // (B, T, 3C), (B, T, 4C)

    // Decoding
    std::vector<X*> cache;            // L × (sequences, 2, kept heads, maxT, HS): keys and (mixed) values
    X *new_x, *new_ln, *new_atty;     // of the new tokens: (sequences · maxT, C)
    X *new_qkv, *new_fch, *new_gelu;  // (sequences · maxT, 3C), 4C, 4C

    size_t offset(int tensor, int l) const { return tensors[tensor].offset + l * tensors[tensor].layer_size(); }
    X* weight(int tensor, int l = 0) { return weights + offset(tensor, l); }
    float* gradient(int tensor, int l = 0) { return gradients + offset(tensor, l); }
    bool keeps_cheap() const { return work.train && !work.recompute; }
    X* ln_output(int i) { return ln + (keeps_cheap() ? i : 0) * (size_t)work.B * work.T * config.C; }
    X* gelu_output(int l) { return fch_gelu + (keeps_cheap() ? l : 0) * (size_t)work.B * work.T * 4 * config.C; }
    // Keys (part 1, as in qkv) or values (part 2) in layer l from position t on. Skip may have left out first heads.
    Heads<X> cached(int l, size_t part, size_t t) {
        if (!cache[l]) return {};  // all heads skip, and nobody reads this layer's
        size_t HS = config.head_size(), kept_heads = kv_channels(config, l) / HS, left_out = config.NH - kept_heads;
        size_t head = config.maxT * HS;
        return {cache[l] + (ptrdiff_t)(((part - 1) * kept_heads - left_out) * head + t * HS), 2 * kept_heads * head,
                head, HS};
    }
};

// Calls f with the model as what it is.
template <class F>
static void with_type(Model* m, F f) {
    if (m->precision == BF16) f(*(ModelOf<bf16>*)m);
    else f(*(ModelOf<float>*)m);
}

static void* allocate(size_t bytes, bool zero) {
    void* p = nullptr;
    cudaError_t error = cudaMalloc(&p, bytes);
    if (error == cudaErrorMemoryAllocation)
        die("cannot allocate %zu MiB on the GPU: use a smaller model, --batch or --sequence", bytes >> 20);
    check(error, "cudaMalloc", __LINE__);
    if (zero || poison_memory) CHECK(cudaMemsetAsync(p, zero ? 0 : 0xff, bytes, gpu.stream));
    return p;
}

// Copies to the GPU or from it, after what it has still to do; done when it returns.
static void copy(void* to, const void* from, size_t bytes, cudaMemcpyKind kind) {
    CHECK(cudaMemcpyAsync(to, from, bytes, kind, gpu.stream));
    CHECK(cudaStreamSynchronize(gpu.stream));
}

// Everything a model holds on the GPU; with `dry` it is only counted.
template <class X>
static void lay_out(ModelOf<X>& m, bool dry) {
    const Config& c = m.config;
    bool train = m.work.train;
    size_t L = c.L, C = c.C, NH = c.NH, P = parameter_count(c);
    size_t BT = (size_t)m.work.B * m.work.T, kept_layers = train ? L : 1, streams = train ? 2 * L + 1 : 2;
    m.memory = {};
    auto take = [&](auto*& p, size_t n, size_t& account, bool zero = false) {
        p = nullptr;
        if (n == 0) return;
        account += n * sizeof *p;
        if (dry) return;
        m.blocks.push_back(p = (std::remove_reference_t<decltype(p)>)allocate(n * sizeof *p, zero));
        gpu.most_in_use = std::max(gpu.most_in_use, gpu.in_use += n * sizeof *p);
    };
    take(m.parameters, P, m.memory.parameters);
    if constexpr (std::is_same_v<X, float>) m.weights = m.parameters;
    else take(m.weights, P, m.memory.parameters);
    take(m.gradients, train ? P : 0, m.memory.gradients, true);
    take(m.moment1, train ? P : 0, m.memory.moments, true);
    take(m.moment2, train ? P : 0, m.memory.moments, true);

    size_t &activations = m.memory.activations, &scratch = m.memory.scratch;
    size_t& cheap = m.keeps_cheap() ? activations : scratch;
    for (Inputs& inputs : m.inputs) take(inputs.device, BT ? 4 * BT + 1 : 0, activations);
    take(m.residual, streams * BT * C, activations);
    take(m.ln_mean, (train ? streams : 1) * BT, activations);
    take(m.ln_rstd, (train ? streams : 1) * BT, activations);
    take(m.qkv, (train || c.attention != VANILLA ? L : 1) * BT * 3 * C, activations);
    m.mix.resize(L), m.dmix.resize(L), m.cache.resize(L), m.source_tables.resize(L), m.gather_tables.resize(L);
    size_t most_sources = 0;
    for (size_t l = 0; l < L; l++) {
        m.sources.push_back(depth_sources(c, l));
        m.readers.push_back(depth_readers(c, l));
        m.live.push_back(live_columns(c, l));
        size_t sources = m.sources[l].size();
        most_sources = std::max(most_sources, sources);
        take(m.source_tables[l], sources, scratch);
        take(m.gather_tables[l], train ? m.readers[l].size() : 0, scratch);
        take(m.mix[l], sources ? BT * (sources + 1) * NH : 0, activations);
        take(m.dmix[l], train ? BT * sources * NH : 0, activations);
    }
    take(m.cache[0], c.attention == SKIP ? 0 : m.work.sequences * L * c.maxT * 2 * C, m.memory.cache);
    const size_t rows = m.work.sequences * (size_t)c.maxT;  // of all sequences that are generated
    for (size_t l = 0; l < L; l++)
        if (c.attention == SKIP) take(m.cache[l], rows * 2 * kv_channels(c, l), m.memory.cache);
        else if (l > 0 && m.cache[0]) m.cache[l] = m.cache[0] + l * rows * 2 * C;
    take(m.lse, kept_layers * BT * NH, activations);
    take(m.atty, kept_layers * BT * C, activations);
    take(m.fch, kept_layers * BT * 4 * C, activations);
    take(m.losses, BT, activations);
    take(m.ln, (m.keeps_cheap() ? streams : 1) * BT * C, cheap);
    take(m.fch_gelu, (m.keeps_cheap() ? L : 1) * BT * 4 * C, cheap);

    take(m.results, 1, scratch, true);
    // model_logits holds rows of it in fp32, which take the room of two of bf16: at the least one.
    take(m.logits, std::max<size_t>(BT ? 2 : 0, classifier_rows(BT, c.Vp)) * c.Vp, scratch);
    if (train) {
        take(m.dresidual, BT * C, scratch);
        take(m.dln, BT * C, scratch);
        take(m.datty, BT * C, scratch);
        take(m.dqkv, BT * 3 * C, scratch);
        take(m.dfch, BT * 4 * C, scratch);
        take(m.delta, BT * NH, scratch);
        take(m.dkv, c.attention == VANILLA ? 0 : BT * 2 * C, scratch);
        take(m.skip_dkv, skip_slots(c) * BT * 2 * C, scratch);
        take(m.partial, std::max(ceil_div(BT, LAYERNORM_RUN) * 2, ceil_div(BT, BIAS_RUN) * 4) * C, scratch);
        take(m.norm_partial, ceil_div(P, UPDATE_RUN), scratch);
        take(m.dx_sum, skip_slots(c) ? BT * C : 0, scratch);
    }
    take(m.new_tokens, rows, scratch);
    take(m.new_x, rows * C, scratch);
    take(m.new_ln, rows * C, scratch);
    take(m.new_atty, rows * C, scratch);
    take(m.new_qkv, rows * 3 * C, scratch);
    take(m.new_fch, rows * 4 * C, scratch);
    take(m.new_gelu, rows * 4 * C, scratch);
    take(m.new_mix, most_sources ? rows * (most_sources + 1) * NH : 0, scratch);
    take(m.new_logits, (size_t)m.work.sequences * c.Vp, scratch);
    m.ws.size = WORKSPACE;
    take(m.ws.data, m.ws.size, scratch);
}

// What there is besides arrays: tables, and what batches and results go through.
template <class X>
static void furnish(ModelOf<X>& m) {
    const Config& c = m.config;
    for (int l = 0; l < c.L; l++) {
        if (int* table = m.source_tables[l])
            copy(table, m.sources[l].data(), m.sources[l].size() * sizeof(int), cudaMemcpyHostToDevice);
        if (!m.gather_tables[l]) continue;
        std::vector<Gather> gathers;
        for (const Reader& r : m.readers[l])
            gathers.push_back({r.m, (int)r.n, (int)r.sources, m.mix[r.m], m.dmix[r.m]});
        copy(m.gather_tables[l], gathers.data(), gathers.size() * sizeof(Gather), cudaMemcpyHostToDevice);
    }
    CHECK(cudaMallocHost((void**)&m.results_here, sizeof(Results)));
    CHECK(cudaStreamSynchronize(gpu.stream));  // batches come in on another stream, and not before memory is filled
    if (m.work.B == 0) return;
    m.counts.resize(c.V);
    for (Inputs& inputs : m.inputs) {
        CHECK(cudaMallocHost((void**)&inputs.host, (4 * (size_t)m.work.B * m.work.T + 1) * sizeof(int)));
        CHECK(cudaEventCreateWithFlags(&inputs.copied, cudaEventDisableTiming));
        CHECK(cudaEventCreateWithFlags(&inputs.done, cudaEventDisableTiming));
    }
}

template <class X>
static Model* create(const Config& c, Precision precision, const Workload& work, bool dry) {
    const int most = SHARE * (vectors(c.C) ? LAYERNORM_BLOCK<true> : LAYERNORM_BLOCK<false>);
    if (c.C > most) die("%d channels: on a GPU there can be %d", c.C, most);
    if (c.head_size() > HEAD_SIZE_MOST)
        die("heads of %d channels: on a GPU they can have %d", c.head_size(), HEAD_SIZE_MOST);
    if ((size_t)work.B * work.T * c.NH > UINT_MAX) die("batch x sequence x heads: on a GPU at most %u", UINT_MAX);
    ModelOf<X>* m = new ModelOf<X>{};
    m->config = c;
    m->precision = precision;
    m->work = work;
    m->tensors = tensor_table(c);
    lay_out(*m, dry);
    if (!dry) furnish(*m);
    return m;
}

static Model* model_create(const Config& c, Precision precision, const Workload& work) {
    return precision == BF16 ? create<bf16>(c, precision, work, false) : create<float>(c, precision, work, false);
}

static void model_free(Model* m) {
    if (!m->blocks.empty()) {
        CHECK(cudaStreamSynchronize(gpu.copies));
        CHECK(cudaStreamSynchronize(gpu.stream));
        gpu.in_use -= m->memory.total();
    }
    for (void* block : m->blocks) CHECK(cudaFree(block));
    if (m->results_here) CHECK(cudaFreeHost(m->results_here));
    for (Inputs& inputs : m->inputs) {
        if (!inputs.host) continue;
        CHECK(cudaFreeHost(inputs.host));
        CHECK(cudaEventDestroy(inputs.copied));
        CHECK(cudaEventDestroy(inputs.done));
    }
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
    copy(out, quantity(m, q) + begin, n * sizeof(float), cudaMemcpyDeviceToHost);
}
static void model_put(Model* m, Quantity q, size_t begin, size_t n, const float* in) {
    if (n == 0) return;
    copy(quantity(m, q) + begin, in, n * sizeof(float), cudaMemcpyHostToDevice);
    if (q == PARAMETERS && m->precision == BF16)
        convert(((ModelOf<bf16>*)m)->weights + begin, m->parameters + begin, n);
}

// For the gradient of the embedding, positions are sorted by their token, by counting.
static void model_set_inputs(Model* m, const int* x, const int* y) {
    const size_t BT = (size_t)m->work.B * m->work.T, V = m->config.V;
    CHECK(cudaEventRecord(m->inputs[m->turn].done, gpu.stream));
    Inputs& in = m->inputs[m->turn ^= 1];
    CHECK(cudaEventSynchronize(in.copied));  // its last batch, before the one that the GPU may be at
    int *place = in.host + 2 * BT, *first = in.host + 3 * BT;
    std::copy_n(x, BT, in.host);
    std::copy_n(y, BT, in.host + BT);
    std::fill(m->counts.begin(), m->counts.end(), 0);
    for (size_t bt = 0; bt < BT; bt++) m->counts[x[bt]]++;
    in.used = 0;
    int before = 0;  // how many positions there are of smaller tokens
    for (size_t v = 0; v < V; v++) {
        if (m->counts[v] == 0) continue;
        first[in.used++] = before;
        before += std::exchange(m->counts[v], before);
    }
    first[in.used] = before;
    for (size_t bt = 0; bt < BT; bt++) place[m->counts[x[bt]]++] = (int)bt;
    CHECK(cudaStreamWaitEvent(gpu.copies, in.done, 0));
    const size_t bytes = (3 * BT + in.used + 1) * sizeof(int);
    CHECK(cudaMemcpyAsync(in.device, in.host, bytes, cudaMemcpyHostToDevice, gpu.copies));
    CHECK(cudaEventRecord(in.copied, gpu.copies));
    CHECK(cudaStreamWaitEvent(gpu.stream, in.copied, 0));
}

// A layer's lines stand once here and once, reversed, in backward. w(QKVW) is a weight of layer l, d(QKVW) its
// gradient; mean(i) and rstd(i) are those of the LayerNorm that reads residual(i).
template <class X>
static void forward(ModelOf<X>& m, bool train, float loss_scale) {
    const Config& c = m.config;
    const Workspace& ws = m.ws;
    const Inputs& in = m.inputs[m.turn];
    const size_t B = m.work.B, T = m.work.T, BT = B * T, C = c.C;
    const bool keeps_all = m.work.train, all_qkv = keeps_all || c.attention != VANILLA;
    auto residual = [&](int i) { return m.residual + (keeps_all ? i : i % 2) * BT * C; };
    auto mean = [&](int i) { return m.ln_mean + (keeps_all ? i : 0) * BT; };
    auto rstd = [&](int i) { return m.ln_rstd + (keeps_all ? i : 0) * BT; };

    embedding_forward(residual(0), in.part(0, BT), m.weight(WTE), m.weight(WPE), B, T, C);
    for (int l = 0; l < c.L; l++) {
        const int i = 2 * l, slot = keeps_all ? l : 0;
        auto w = [&](int tensor) { return m.weight(tensor, l); };
        X *x = residual(i), *x2 = residual(i + 1), *x3 = residual(i + 2);  // into attention, into the MLP, out of it
        X *ln1 = m.ln_output(i), *ln2 = m.ln_output(i + 1), *fch_gelu = m.gelu_output(l);
        X *qkv = m.qkv + (all_qkv ? l : 0) * BT * 3 * C, *atty = m.atty + slot * BT * C;
        X* fch = m.fch + slot * BT * 4 * C;
        const X* qkv_below = m.qkv + (all_qkv ? std::max(0, l - c.skip_distance) : 0) * BT * 3 * C;
        float* lse = m.lse + slot * BT * c.NH;

        layernorm_forward(ln1, mean(i), rstd(i), x, w(LN1W), w(LN1B), BT, C);
        for (auto [at, count] : m.live[l])
            linear_forward(ws, qkv + at, ln1, w(QKVW) + at * C, w(QKVB) + at, BT, C, count, 3 * C);
        depth_forward(m.mix[l], m.qkv, m.source_tables[l], m.sources[l].size(), c, l, BT);
        attention_forward<X>(atty, lse, qkv, qkv_below, c, l, B, T);
        linear_residual_forward(ws, x2, x, atty, w(ATTPROJW), w(ATTPROJB), BT, C, C);
        layernorm_forward(ln2, mean(i + 1), rstd(i + 1), x2, w(LN2W), w(LN2B), BT, C);
        linear_gelu_forward(ws, fch_gelu, fch, ln2, w(FCW), w(FCB), BT, C, 4 * C);
        linear_residual_forward(ws, x3, x2, fch_gelu, w(FCPROJW), w(FCPROJB), BT, 4 * C, C);
    }
    const int last = 2 * c.L;
    layernorm_forward(m.ln_output(last), mean(last), rstd(last), residual(last), m.weight(LNFW), m.weight(LNFB), BT, C);
    // Each token's loss counts loss_scale/(B·T) in the loss that gradients are of.
    classifier(ws, m.losses, m.dln, m.gradients, m.logits, m.ln_output(last), m.weight(WTE), in.part(1, BT), BT, C, c.V,
               c.Vp, train ? loss_scale / BT : 0, m.accumulated > 0);
    sum_losses(m.results, m.losses, BT, m.loss_count > 0);
    m.loss_count += BT;
    m.results_fresh = false;
}

// dresidual is the gradient of the residual stream: each LayerNorm adds to it what flows back through its branch. dln
// came from the classifier. `add`: to the gradients of earlier micro-batches.
template <class X>
static void backward(ModelOf<X>& m) {
    const Config& c = m.config;
    const Workspace& ws = m.ws;
    const Inputs& in = m.inputs[m.turn];
    const size_t B = m.work.B, T = m.work.T, BT = B * T, C = c.C, slots = skip_slots(c), slot_size = BT * 2 * C;
    const bool add = m.accumulated > 0;
    X* dx = m.dresidual;
    auto layernorm = [&](int i, float* dw, float* db, const X* w, bool into_stream) {
        layernorm_backward(dx, dw, db, m.partial, m.dln, m.residual + i * BT * C, w, m.ln_mean + i * BT,
                           m.ln_rstd + i * BT, BT, C, into_stream, add);
    };
    // What is not kept comes again: LayerNorm's output the same to the bit; GELU's in bf16 not quite, since h, which it
    // then comes from, was rounded when it was stored.
    auto layernorm_again = [&](int i, const X* w, const X* b) {
        if (!m.keeps_cheap())
            layernorm_forward<X>(m.ln_output(i), nullptr, nullptr, m.residual + i * BT * C, w, b, BT, C);
    };
    auto gelu_again = [&](int l, const X* fch) {
        Timed timed(MATMUL_DX, 0, 0);
        if (!m.keeps_cheap()) gelu_forward(m.gelu_output(l), fch, BT * 4 * C);
    };

    layernorm(2 * c.L, m.gradient(LNFW), m.gradient(LNFB), m.weight(LNFW), false);
    for (int l = c.L - 1; l >= 0; l--) {
        const int i = 2 * l, below = l - c.skip_distance, above = l + c.skip_distance;
        auto w = [&](int tensor) { return m.weight(tensor, l); };
        auto d = [&](int tensor) { return m.gradient(tensor, l); };
        const X *qkv = m.qkv + l * BT * 3 * C, *qkv_below = m.qkv + std::max(0, below) * BT * 3 * C;
        const X *atty = m.atty + l * BT * C, *fch = m.fch + l * BT * 4 * C;
        X *ln1 = m.ln_output(i), *ln2 = m.ln_output(i + 1), *fch_gelu = m.gelu_output(l);
        const float* lse = m.lse + l * BT * c.NH;
        // Skip: where this layer leaves dk, dv for the one that it reads, and where the one that reads it left them.
        float* dkv_below = slots > 0 && below >= 0 ? m.skip_dkv + below % slots * slot_size : nullptr;
        float* dkv_above = slots > 0 && above < c.L ? m.skip_dkv + l % slots * slot_size : nullptr;

        linear_gelu_backward_input(ws, m.dfch, fch, dx, w(FCPROJW), BT, 4 * C, C);
        gelu_again(l, fch);
        linear_backward_weight(ws, d(FCPROJW), d(FCPROJB), m.partial, dx, fch_gelu, BT, 4 * C, C, C, add);
        linear_backward_input(ws, m.dln, m.dfch, w(FCW), BT, C, 4 * C, 4 * C);
        layernorm_again(i + 1, w(LN2W), w(LN2B));
        linear_backward_weight(ws, d(FCW), d(FCB), m.partial, m.dfch, ln2, BT, C, 4 * C, 4 * C, add);
        layernorm(i + 1, d(LN2W), d(LN2B), w(LN2W), true);
        linear_backward_input(ws, m.datty, dx, w(ATTPROJW), BT, C, C, C);
        linear_backward_weight(ws, d(ATTPROJW), d(ATTPROJB), m.partial, dx, atty, BT, C, C, C, add);
        // dk and dv of a layer that no other has a share in need no fp32 sum; vanilla has no dkv at all.
        float* dkv = c.attention == SKIP && !skips(c, l, 0) && !dkv_above ? nullptr : m.dkv;
        attention_backward<X>(m.dqkv, dkv, dkv_below, m.delta, m.datty, atty, lse, qkv, qkv_below, c, l, B, T);
        if (c.attention == SKIP && dkv) skip_backward(m.dqkv, dkv, dkv_above, c, l, BT);
        if (c.attention == DEPTH)
            depth_backward(m.dqkv, m.dkv, m.dmix[l], m.mix[l], m.qkv, m.source_tables[l], m.sources[l].size(),
                           m.gather_tables[l], m.readers[l].size(), c, l, BT);
        layernorm_again(i, w(LN1W), w(LN1B));
        for (const Columns& some : m.live[l]) {
            const size_t at = some.begin, count = some.count;
            linear_backward_input(ws, m.dln, m.dqkv + at, w(QKVW) + at * C, BT, C, count, 3 * C, m.dx_sum,
                                  &some == &m.live[l].front(), &some == &m.live[l].back());
            linear_backward_weight(ws, d(QKVW) + at * C, d(QKVB) + at, m.partial, m.dqkv + at, ln1, BT, C, count, 3 * C,
                                   add);
        }
        layernorm(i, d(LN1W), d(LN1B), w(LN1W), true);
    }
    embedding_backward(m.gradient(WTE), m.gradient(WPE), dx, in.part(0, BT), in.part(2, BT), in.part(3, BT),
                       (size_t)in.used, B, T, C, add);
    m.accumulated++;
}

static void model_forward(Model* m, bool train, float loss_scale) {
    with_type(m, [=](auto& model) { forward(model, train, loss_scale); });
}
static void model_backward(Model* m) {
    with_type(m, [](auto& model) { backward(model); });
}

// The one time in a step that the CPU waits
static void read_results(Model* m) {
    copy(m->results_here, m->results, sizeof(Results), cudaMemcpyDeviceToHost);
    m->results_fresh = true;
}

static void model_update(Model* m, const AdamW& a, float clip, int step) {
    global_norm(m->results, m->norm_partial, m->gradients, parameter_count(m->config), clip);
    with_type(m, [&](auto& model) {
        for (const Tensor& t : m->tensors)
            adamw_update(model.weights + t.offset, m->parameters + t.offset, m->moment1 + t.offset,
                         m->moment2 + t.offset, m->gradients + t.offset, t.size(), a,
                         t.decays ? a.weight_decay : 0.0f, m->results, step);
    });
    m->accumulated = 0;
    m->results_fresh = false;
}

static double model_norm(Model* m) {
    if (!m->results_fresh) read_results(m);
    return m->results_here->norm;
}

static double model_loss(Model* m) {
    if (!m->results_fresh) read_results(m);
    double mean = m->results_here->loss_sum / m->loss_count;
    m->loss_count = 0;
    return mean;
}

static void model_token_losses(const Model* m, float* out) {
    copy(out, m->losses, (size_t)m->work.B * m->work.T * sizeof(float), cudaMemcpyDeviceToHost);
}

// Rows of n floats, `distance` apart on the GPU, to rows of n here
static void copy_rows(float* to, const float* from, size_t rows, size_t n, size_t distance) {
    for (size_t r = 0; r < rows; r++)
        CHECK(cudaMemcpyAsync(to + r * n, from + r * distance, n * sizeof(float), cudaMemcpyDeviceToHost, gpu.stream));
    CHECK(cudaStreamSynchronize(gpu.stream));
}

// From the last LayerNorm's output, which stays until backward, in fp32.
static void model_logits(Model* m, float* out) {
    const size_t C = m->config.C, V = m->config.V, Vp = m->config.Vp, BT = (size_t)m->work.B * m->work.T;
    with_type(m, [=](auto& model) {
        using X = std::remove_pointer_t<decltype(model.logits)>;
        float* logits = (float*)model.logits;
        const X* ln = model.ln_output(2 * m->config.L);
        const size_t at_once = std::max<size_t>(1, classifier_rows(BT, Vp) * sizeof(X) / sizeof(float));
        for (size_t r = 0; r < BT; r += at_once) {
            size_t n = std::min(BT - r, at_once);
            matmul<X, float>(m->ws, logits, Vp, n, Vp, C, along_k<X>(ln + r * C, C), along_k<X>(model.weight(WTE), C));
            copy_rows(out + r * V, logits, n, V, Vp);
        }
    });
}

// --------------------------------------------------------------------------------------------------------------------
// Decoding with a KV cache
//
// The same layers for new tokens only: their keys and (mixed) values join the cache, their queries read all of it. Each
// head's keys lie together, as do its values, for that is how they are read.

// cache (sequences, 2, kept_heads, maxT, HS), at positions `before` and further on = keys and values of the n new tokens
// of each sequence in qkv (sequences, n, 3C), those of the last heads. One thread an element.
template <class X>
__global__ void cache_kernel(X* cache, const X* qkv, int n, int before, int kept_heads, int maxT, int C, int HS,
                             size_t total) {
    const size_t at = (size_t)blockIdx.x * blockDim.x + threadIdx.x, width = (size_t)kept_heads * HS;
    if (at >= total) return;
    const size_t row = at / (2 * width), b = row / n, t = before + row % n;
    const size_t part = at / width % 2, h = at % width / HS, d = at % HS;
    cache[(((b * 2 + part) * kept_heads + h) * maxT + t) * HS + d] =
        qkv[row * 3 * C + (part + 2) * C - width + at % width];
}

// Queries, keys and values of the new tokens, ln (rows, C), to new_qkv; these keys and values to the cache
template <class X>
static void cached_qkv(ModelOf<X>& m, int l, const X* w, const X* bias, size_t n) {
    constexpr int BLOCK = 256;
    const Config& c = m.config;
    size_t rows = m.work.sequences * n, C = c.C, HS = c.head_size(), kept_heads = kv_channels(c, l) / HS;
    size_t total = rows * 2 * kept_heads * HS;
    for (auto [at, count] : m.live[l])
        linear_forward(m.ws, m.new_qkv + at, m.new_ln, w + at * C, bias + at, rows, C, count, 3 * C);
    if (total == 0) return;
    cache_kernel<X><<<(unsigned)ceil_div(total, BLOCK), BLOCK, 0, gpu.stream>>>(
        m.cache[l], m.new_qkv, (int)n, (int)m.cache_length, (int)kept_heads, c.maxT, c.C, (int)HS, total);
    CHECK(cudaGetLastError());
}

template <class X>
static Heads<const X> read_only(const Heads<X>& heads) {
    return {heads.data, heads.batch, heads.head, heads.row};
}

template <class X>
static void cached_depth(ModelOf<X>& m, int l, size_t n) {
    const Config& c = m.config;
    const size_t S = m.sources[l].size(), rows = m.work.sequences * n;
    const size_t layer = m.work.sequences * (size_t)c.maxT * 2 * c.C;
    if (S == 0) return;
    depth_mix<X>(m.cached(l, 2, m.cache_length), m.new_mix, qkv_heads<const X>(m.new_qkv, 0, c, n),
                 read_only(m.cached(l, 1, m.cache_length)), (ptrdiff_t)layer, m.source_tables[l], S, c, l, rows, n);
}

template <class X>
static void cached_attention(ModelOf<X>& m, int l, size_t n) {
    const Config& c = m.config;
    size_t B = m.work.sequences, C = c.C, HS = c.head_size(), before = m.cache_length;
    Timed timed(ATTENTION, 4.0 * B * n * (before + 0.5 * n) * C, 2.0 * B * (before + n) * C * sizeof(X));
    const int below = std::max(0, l - c.skip_distance);
    attention_heads_forward<X>({m.new_atty, n * C, HS, C}, nullptr, qkv_heads<const X>(m.new_qkv, 0, c, n),
                               {read_only(m.cached(l, 1, 0)), read_only(m.cached(l, 2, 0)),
                                read_only(m.cached(below, 1, 0)), read_only(m.cached(below, 2, 0)),
                                skipping_heads(c, l)},
                               {(int)B, c.NH, (int)HS, (int)n, (int)before});
}

template <class X>
static void cached_forward(ModelOf<X>& m, const int* tokens, size_t n, float* logits) {
    const Config& c = m.config;
    const Workspace& ws = m.ws;
    size_t B = m.work.sequences, rows = B * n, C = c.C;
    X *x = m.new_x, *ln = m.new_ln;
    auto layernorm = [&](X* to, const X* from, const X* w, const X* b, size_t count) {
        layernorm_forward<X>(to, nullptr, nullptr, from, w, b, count, C);
    };

    copy(m.new_tokens, tokens, rows * sizeof(int), cudaMemcpyHostToDevice);
    embedding_forward(x, m.new_tokens, m.weight(WTE), m.weight(WPE), B, n, C, m.cache_length);
    for (int l = 0; l < c.L; l++) {
        auto w = [&](int tensor) { return m.weight(tensor, l); };
        layernorm(ln, x, w(LN1W), w(LN1B), rows);
        cached_qkv(m, l, w(QKVW), w(QKVB), n);
        cached_depth(m, l, n);
        cached_attention(m, l, n);
        linear_residual_forward(ws, x, x, m.new_atty, w(ATTPROJW), w(ATTPROJB), rows, C, C);
        layernorm(ln, x, w(LN2W), w(LN2B), rows);
        linear_gelu_forward(ws, m.new_gelu, m.new_fch, ln, w(FCW), w(FCB), rows, C, 4 * C);
        linear_residual_forward(ws, x, x, m.new_gelu, w(FCPROJW), w(FCPROJB), rows, 4 * C, C);
    }
    m.cache_length += n;
    for (size_t b = 0; b < B; b++)  // the logits after each sequence's last token
        layernorm(ln + b * C, x + (b * n + n - 1) * C, m.weight(LNFW), m.weight(LNFB), 1);
    matmul<X, float>(ws, m.new_logits, c.Vp, B, c.Vp, C, along_k<X>(ln, C), along_k<X>(m.weight(WTE), C));
    copy_rows(logits, m.new_logits, B, c.V, c.Vp);
}

static void model_prompt(Model* m, const int* tokens, int n, float* logits) {
    with_type(m, [=](auto& model) { cached_forward(model, tokens, n, logits); });
}
static void model_decode(Model* m, const int* tokens, float* logits) { model_prompt(m, tokens, 1, logits); }
static void model_reset_cache(Model* m) { m->cache_length = 0; }

// --------------------------------------------------------------------------------------------------------------------
// The machine

static void device_init(char**, bool computes) {
    classifier_logits_most = 1 << 30;  // 2 GiB of bf16: matrices large enough for all multiprocessors
    if (!computes) return;
    int count = 0;
    cudaError_t error = cudaGetDeviceCount(&count);
    if (error != cudaSuccess || count == 0)
        die("no GPU can be used here (%s): ./train_gpt2 runs on the CPU",
            error == cudaSuccess ? "there is none" : cudaGetErrorString(error));
    CHECK(cudaSetDevice(0));
    cudaDeviceProp properties;
    CHECK(cudaGetDeviceProperties(&properties, 0));
    if (properties.major < 8)
        die("this program needs a GPU of compute capability 8.0 or later; the %s has %d.%d", properties.name,
            properties.major, properties.minor);
    gpu.name = properties.name;
    gpu.multiprocessors = properties.multiProcessorCount;
    gpu.major = properties.major;
    CHECK(cudaStreamCreateWithFlags(&gpu.stream, cudaStreamNonBlocking));
    CHECK(cudaStreamCreateWithFlags(&gpu.copies, cudaStreamNonBlocking));
}

static std::string device_name() { return gpu.name; }
static Precision device_precision() { return BF16; }
static const char* device_help() { return "CUDA_VISIBLE_DEVICES chooses the GPU, the first if it is not set."; }

static bool device_is_host() { return false; }

// The code of kernels, cuBLASLt's above all, comes into memory when it is first used; and allocations are rounded up.
#ifdef GPT2_EMULATED
constexpr size_t RESERVED = 0;
#else
constexpr size_t RESERVED = 512 << 20;
#endif
static size_t device_free_memory() {
    size_t free_bytes, total;
    CHECK(cudaMemGetInfo(&free_bytes, &total));
    return free_bytes - std::min(free_bytes, RESERVED);
}

static double device_most_memory() { return (double)std::exchange(gpu.most_in_use, gpu.in_use) / (1 << 20); }

#ifdef GPT2_EMULATED
constexpr double WARM_UP = 0;
#else
constexpr double WARM_UP = 0.3;  // s, since a GPU that was idle takes a while to reach its clock
#endif

// The best rate of some rounds, each of so many operations
template <class F>
static double best_rate(double operations, F round) {
    static const double first = seconds();
    double best = 0;
    for (int i = 0; i < 10 || seconds() - first < WARM_UP; i++) {
        CHECK(cudaStreamSynchronize(gpu.stream));
        double start = seconds();
        round();
        CHECK(cudaStreamSynchronize(gpu.stream));
        best = std::max(best, operations / (seconds() - start));
    }
    return best;
}

static size_t peak_matrix() { return 64 * (size_t)gpu.multiprocessors; }  // its rows

// a (n): any values from -1 to 1. One thread a value
template <class X>
__global__ void noise_kernel(X* a, size_t n) {
    const size_t i = (size_t)blockIdx.x * blockDim.x + threadIdx.x;
    if (i < n) a[i] = (X)((float)(int32_t)((uint32_t)i * 2654435769u ^ (uint32_t)i << 13) * 0x1p-31f);
}

// What cuBLASLt reaches with a product of two square matrices that is large for this GPU. They are not of zeros: these
// take less power, and so let a GPU run faster than it does in training.
template <class X>
static double matmul_peak() {
    constexpr size_t BLOCK = 256;
    const size_t N = peak_matrix();
    X* matrices = (X*)allocate(3 * N * N * sizeof(X), false);
    noise_kernel<X><<<(unsigned)ceil_div(3 * N * N, BLOCK), BLOCK, 0, gpu.stream>>>(matrices, 3 * N * N);
    CHECK(cudaGetLastError());
    const Workspace ws = {(char*)allocate(WORKSPACE, false), WORKSPACE};
    const bool was_profiling = std::exchange(profiling, false);  // this is no part of a step
    const std::vector<Spent> before = {profile, profile + PARTS};
    double rate = best_rate(2.0 * N * N * N, [&] {
        matmul<X, X>(ws, matrices, N, N, N, N, along_k<X>(matrices + N * N, N), along_k<X>(matrices + 2 * N * N, N));
    });
    std::copy(before.begin(), before.end(), profile);
    profiling = was_profiling;
    CHECK(cudaFree(matrices));
    CHECK(cudaFree(ws.data));
    return rate;
}
static double device_peak(Precision precision) {
    return precision == BF16 ? matmul_peak<bf16>() : matmul_peak<float>();
}
static size_t device_peak_memory(Precision precision) {
    return 3 * peak_matrix() * peak_matrix() * (precision == BF16 ? sizeof(bf16) : sizeof(float)) + WORKSPACE;
}

// a (n) scaled in place, one thread a share
__global__ void scale_kernel(float* a, size_t n) {
    const size_t at = ((size_t)blockIdx.x * blockDim.x + threadIdx.x) * SHARE;
    if (at >= n) return;
    float share[SHARE];
    load<true>(share, a + at, 0, 1, SHARE);
#pragma unroll
    for (int i = 0; i < SHARE; i++) share[i] *= 1.0001f;
    store<true>(a + at, share, 0, 1, SHARE);
}

// sums (threads): each thread's of every so many shares
__global__ void read_kernel(float* sums, const float* a, size_t n) {
    const size_t thread = (size_t)blockIdx.x * blockDim.x + threadIdx.x, threads = (size_t)gridDim.x * blockDim.x;
    float share[SHARE], sum = 0;
#pragma unroll 4
    for (size_t at = thread * SHARE; at < n; at += threads * SHARE) {
        load<true>(share, a + at, 0, 1, SHARE);
#pragma unroll
        for (int i = 0; i < SHARE; i++) sum += share[i];
    }
    sums[thread] = sum;
}

// Reading 4 MiB for each multiprocessor, far more than caches hold; or scaling them in place
constexpr size_t READ_BYTES = 4 << 20;
constexpr unsigned READ_BLOCK = 256, READ_BLOCKS = 8;  // threads; blocks for each multiprocessor

static double device_bandwidth(bool writing) {
    const unsigned blocks = READ_BLOCKS * (unsigned)gpu.multiprocessors;
    const size_t n = (size_t)gpu.multiprocessors * READ_BYTES / sizeof(float);
    float* a = (float*)allocate(n * sizeof(float), true);
    float* sums = (float*)allocate(blocks * READ_BLOCK * sizeof(float), false);
    double rate = best_rate((writing ? 2.0 : 1.0) * n * sizeof(float), [&] {
        if (writing) scale_kernel<<<(unsigned)ceil_div(n, SHARE * READ_BLOCK), READ_BLOCK, 0, gpu.stream>>>(a, n);
        else read_kernel<<<blocks, READ_BLOCK, 0, gpu.stream>>>(sums, a, n);
        CHECK(cudaGetLastError());
    });
    CHECK(cudaFree(a));
    CHECK(cudaFree(sums));
    return rate;
}
static size_t device_bandwidth_memory() {
    return (size_t)gpu.multiprocessors * (READ_BYTES + READ_BLOCKS * READ_BLOCK * sizeof(float));
}
