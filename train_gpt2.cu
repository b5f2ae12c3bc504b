/*
train_gpt2.cu: GPT-2 on an NVIDIA GPU.

It includes train_gpt2.cpp, which contains the model and the program, and defines section 4 of that file again: the same
layers, with the same names and in the same order, so that the two can be read side by side. Here a layer's function is
a launcher, and its kernel stands right above it. Formulas are derived in train_gpt2.cpp under the same headings;
comments here say which thread computes what.

    make train_gpt2cu && ./train_gpt2cu --help      needs nvcc, and a GPU of compute capability 8.0 or later
    make -C dev train_gpt2cu_emulated               runs the same kernels on a CPU, slowly, for tests

Contents
     types and constants that train_gpt2.cpp expects
     numbers · matmul · linear layers · embedding · LayerNorm · attention: plain, in tiles · skip · depth · KV cache ·
     classifier · several processes · losses, norm, AdamW · the machine

B, T, C, NH, HS, L, V, Vp, maxT are as in train_gpt2.cpp. Arrays in comments are row-major, in device memory.
*/

#ifndef GPT2_CUDA
#define GPT2_CUDA
#endif
#ifndef GPT2_EMULATED  // else dev/emulator/cuda_emulator.h stands in for these
#include <cublasLt.h>
#include <cuda_bf16.h>
#include <cuda_runtime.h>
#ifdef GPT2_MPI
#include <nccl.h>
#endif
#endif
#include <cstddef>
#include <cstdint>
#include <thread>
#include <vector>

// --------------------------------------------------------------------------------------------------------------------
// The types and constants that train_gpt2.cpp expects from a backend

using bf16 = __nv_bfloat16;

constexpr size_t SLOT_ALIGNMENT = 128;      // in elements: 256 bytes of bf16, as cudaMalloc aligns
constexpr bool ALWAYS_RECOMPUTES = false;  // --recompute decides whether backward computes LayerNorm and GELU again
constexpr bool COMPUTES_PADDING = true;    // logits of the vocabulary's padding: rows of logits are whole vectors
constexpr size_t CLASSIFIER_LOGITS = 1 << 30;   // at a time: products large enough for all multiprocessors
static size_t vocabulary_chunk = SIZE_MAX;      // the classifier's dx is one product

// A batch. There are two buffers, used in turn: while a step computes on one, the next batch is copied into the other.
struct Inputs {
    int *x, *y;           // (B, T) tokens and targets
    int *place, *first;   // the positions of x sorted by their token, for embedding_backward
    int used;             // number of different tokens in x
    struct Buffer {
        int *device, *host;        // x, y, place (B, T each), first (up to B·T + 1); host is pinned
        cudaEvent_t copied, done;  // its copy to the device; the step that used it
    } buffers[2];
    int turn;                // index of the buffer in use
    std::vector<int> counts;  // (V) scratch of set_inputs
};

// The results of a step. They are copied to the host once, at the end of the step.
struct StepResults;
struct Results {
    StepResults *device, *host;  // host is pinned
    bool fresh;                  // host equals device
};

// Scratch memory of the layers
struct Workspace {
    char* cublas;        // (CUBLAS_WORKSPACE bytes) cuBLASLt's own
    float* partial;      // sums over chunks of tokens: layernorm_backward, linear_backward_weight
    float* delta;        // attention_backward: (B, NH, T)
    double* squares;     // global_norm: sums over chunks of each process's gradients
    float* dx_sum;       // linear_backward_input, in chunks: (B, T, C), or null if no layer has any
    float* logits;       // logits_forward: (logits_rows, Vp)
    size_t logits_rows;
};

#include "train_gpt2.cpp"

// ====================================================================================================================
// 4 · The layers on a GPU
//
// Every result is the same to the bit from run to run: each element is written by one thread and summed in one fixed
// order. There are no atomic operations.
//
// Arithmetic is in float, whatever X is: a bf16 is converted when it is read and rounded when it is written. Products
// of bf16 are computed on tensor cores, which add in float.
//
// Everything runs on one stream, in order, but copies of batches and sums over processes have streams of their own. The
// host queues a whole step (forward, backward, update) and the next batch. It waits only for the norm and the loss.
//
// The head size is a multiple of 8 (device_check), and so are the lengths of rows and the distances between them. Slots
// begin at multiples of 256 bytes. So every row consists of whole vectors of 8 values.

// --------------------------------------------------------------------------------------------------------------------
// Numbers and threads

// Every call of CUDA goes through CHECK. Errors that a user can fix, such as lack of memory, are handled at the call.
static void check(cudaError_t error, const char* call, int line) {
    if (error != cudaSuccess)
        die("the GPU failed: %s: %s (%s, train_gpt2.cu:%d)", cudaGetErrorName(error), cudaGetErrorString(error), call,
            line);
}
#define CHECK(call) check((call), #call, __LINE__)

struct Gpu {
    std::string name;
    int major;                    // of its compute capability
    size_t block_shared;          // bytes of shared memory with which two blocks fit on a multiprocessor
    cudaStream_t stream, copies;  // layers run on `stream`; batches are copied on `copies`
};
static Gpu gpu;

constexpr int WARP = 32;
constexpr unsigned ALL_LANES = 0xffffffff;

// Threads read and write rows in vectors of 8 neighbouring values, in accesses of 16 bytes. A warp covers 256 values.
constexpr int VECTOR = 8, WARP_VALUES = WARP * VECTOR;

// Words, because the compiler would load an array of eight bf16 in eight pieces.
template <class X>
struct Vector {
    uint4 words[VECTOR * sizeof(X) / sizeof(uint4)];
};

template <class X>
__device__ inline void unpack(float (&x)[VECTOR], const Vector<X>& vector) {
    X values[VECTOR];
    memcpy(values, vector.words, sizeof values);
#pragma unroll
    for (int i = 0; i < VECTOR; i++) x[i] = (float)values[i];
}

template <class X>
__device__ inline void load(float (&x)[VECTOR], const X* from) {
    const Vector<X> vector = *(const Vector<X>*)from;
    unpack(x, vector);
}

template <class X>
__device__ inline void store(X* to, const float (&x)[VECTOR]) {
    X values[VECTOR];
#pragma unroll
    for (int i = 0; i < VECTOR; i++) values[i] = (X)x[i];
    Vector<X> vector;
    memcpy(vector.words, values, sizeof values);
    *(Vector<X>*)to = vector;
}

// Vector number `lane` of a row of n values. Past its end, zeros are read and nothing is written.
template <class X>
__device__ inline Vector<X> load_vector(const X* row, int lane, int n) {
    Vector<X> vector = {};
    if (lane * VECTOR < n) vector = *(const Vector<X>*)(row + lane * VECTOR);
    return vector;
}

template <class X>
__device__ inline void load(float (&x)[VECTOR], const X* row, int lane, int n) {
    unpack(x, load_vector(row, lane, n));
}

template <class X>
__device__ inline void store(X* row, const float (&x)[VECTOR], int lane, int n) {
    if (lane * VECTOR < n) store(row + lane * VECTOR, x);
}

// Sum and maximum over groups of `lanes` neighbouring threads, a power of two. All threads of a group get the result.
__device__ inline float sum_over(float x, int lanes = WARP) {
    for (int distance = lanes / 2; distance > 0; distance /= 2) x += __shfl_xor_sync(ALL_LANES, x, distance);
    return x;
}
__device__ inline float maximum_over(float x, int lanes = WARP) {
    for (int distance = lanes / 2; distance > 0; distance /= 2)
        x = fmaxf(x, __shfl_xor_sync(ALL_LANES, x, distance));
    return x;
}

__device__ inline float dot_over(const float (&a)[VECTOR], const float (&b)[VECTOR], int lanes) {
    float sum = 0;
#pragma unroll
    for (int i = 0; i < VECTOR; i++) sum += a[i] * b[i];
    return sum_over(sum, lanes);
}

// Skip and depth work on each head of each token separately: a group of neighbouring lanes has one, each lane a vector
// of its HS channels. The number of lanes in a group is a power of two. All groups of a warp take part in its shuffles
// to the end; those past the last head compute with the last head's place and store nothing.
constexpr int HEAD_SIZE_MOST = WARP_VALUES, HEADS_BLOCK = 128;

static int lanes_of_head(size_t HS) { return (int)std::bit_ceil(ceil_div(HS, VECTOR)); }

struct HeadGroup {
    int lane;     // within the group
    bool inside;  // not past the last head
    size_t r;     // token
    int h;        // head

    __device__ HeadGroup(int lanes, size_t rows, int NH) {  // rows · NH < 2³² (device_check)
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

// out (n) = or += Σ over chunks of partial (chunks, n). A block has 32 columns and up to 32 warps: warp w adds up the
// chunks w, w + warps, ...; then the warps' sums are added in order. If there is a second output, partial is
// (chunks, 2, n).
__global__ void sum_partials_kernel(float* out, float* second, const float* partial, int chunks, int n, bool add) {
    constexpr int AHEAD = 8;
    __shared__ float sums[WARP][WARP];
    const int i = blockIdx.x * WARP + threadIdx.x;
    const float* column = partial + (size_t)blockIdx.y * n + min(i, n - 1);
    float sum = 0;
    for (int first = threadIdx.y; first < chunks; first += AHEAD * blockDim.y) {
        float ahead[AHEAD];  // loaded together, so that their latencies overlap
#pragma unroll
        for (int k = 0; k < AHEAD; k++) {
            const int chunk = first + k * blockDim.y;
            ahead[k] = chunk < chunks ? column[(size_t)chunk * gridDim.y * n] : 0;
        }
#pragma unroll
        for (int k = 0; k < AHEAD; k++) sum += ahead[k];
    }
    sums[threadIdx.y][threadIdx.x] = sum;
    __syncthreads();
    if (threadIdx.y > 0 || i >= n) return;
    float total = 0;
    for (int w = 0; w < (int)blockDim.y; w++) total += sums[w][threadIdx.x];
    if (blockIdx.y == 1) out = second;
    out[i] = add ? out[i] + total : total;
}

static void sum_partials(float* out, float* second, const float* partial, size_t chunks, size_t n, bool add,
                         cudaStream_t stream = gpu.stream) {
    dim3 grid((unsigned)ceil_div(n, WARP), second ? 2 : 1), block(WARP, (unsigned)std::min<size_t>(WARP, chunks));
    sum_partials_kernel<<<grid, block, 0, stream>>>(out, second, partial, (int)chunks, (int)n, add);
    CHECK(cudaGetLastError());
}

// to (n) = from (n), rounded to X. One thread per value, since n and the places may be odd
template <class X>
__global__ void convert_kernel(X* to, const float* from, size_t n) {
    size_t i = (size_t)blockIdx.x * blockDim.x + threadIdx.x;
    if (i < n) to[i] = (X)from[i];
}

template <class X>
static void convert(X* to, const float* from, size_t n) {
    constexpr int BLOCK = 256;
    convert_kernel<X><<<(unsigned)ceil_div(n, BLOCK), BLOCK, 0, gpu.stream>>>(to, from, n);
    CHECK(cudaGetLastError());
}

// --------------------------------------------------------------------------------------------------------------------
// Matmul: C (M, N) = A (M, K) B (K, N)
//
// cuBLASLt computes it. One routine serves all three products of a linear layer y = x wᵀ:
//     forward    y (rows, OC)  = x (rows, C)       wᵀ (C, OC)
//     backward   dx (rows, C)  = dy (rows, OC)     w (OC, C)
//                dw (OC, C)    = dyᵀ (OC, rows)    x (rows, C)
// The operands differ only in which index is contiguous.

// An operand's element (i, k) is data[i·stride + k] if k is the contiguous index, else data[k·stride + i]. i is a row
// of A or a column of B; the product sums over k.
template <class X>
struct Operand {
    const X* data;
    size_t stride;
    bool along_k;
};
template <class X> static Operand<X> along_k(const X* data, size_t stride) { return {data, stride, true}; }
template <class X> static Operand<X> across_k(const X* data, size_t stride) { return {data, stride, false}; }

constexpr size_t CUBLAS_WORKSPACE = 32 << 20;  // bytes; NVIDIA's advice for Hopper GPUs

// What is done to the product before it is stored: y = epilogue(product + add). Epilogues use bias (N) and aux (M, N):
//     BIAS            product + bias                  GELU_AUX_BIAS   aux = product + bias, y = gelu(product + bias)
//     GELU_BIAS       gelu(product + bias)            DGELU           product · gelu'(aux)
enum class Epilogue : uint32_t {
    NONE = CUBLASLT_EPILOGUE_DEFAULT,
    BIAS = CUBLASLT_EPILOGUE_BIAS,
    GELU_BIAS = CUBLASLT_EPILOGUE_GELU_BIAS,
    GELU_AUX_BIAS = CUBLASLT_EPILOGUE_GELU_AUX_BIAS,
    DGELU = CUBLASLT_EPILOGUE_DGELU
};
template <class Y>
struct Finish {
    const Y* add = nullptr;
    Epilogue epilogue = Epilogue::NONE;
    const Y* bias = nullptr;
    Y* aux = nullptr;
};

template <class X> constexpr cudaDataType DATA_TYPE = std::is_same_v<X, float> ? CUDA_R_32F : CUDA_R_16BF;

static void check(cublasStatus_t status, const char* call, int line) {
    if (status != CUBLAS_STATUS_SUCCESS)
        die("cuBLASLt failed: %s (%s, train_gpt2.cu:%d)", cublasLtGetStatusName(status), call, line);
}

// Whether cuBLASLt lacks what it is asked for. It may refuse to launch an algorithm that it has offered.
static bool refused(cublasStatus_t status) {
    return status == CUBLAS_STATUS_NOT_SUPPORTED || status == CUBLAS_STATUS_INVALID_VALUE ||
           status == CUBLAS_STATUS_ARCH_MISMATCH;
}

// Everything that the choice of an algorithm depends on. A product has the same shape, and so the same algorithm, in
// all layers, in training and in evaluation.
struct MatmulShape {
    cudaDataType d_type, ab_type;
    Epilogue epilogue;
    int transA, transB, m, n, k, lda, ldb, ldd, add;
    int alignment;  // of all pointers, in bytes: at most 16, the widest access of a thread, so mostly that

    bool operator==(const MatmulShape&) const = default;
};
struct MatmulPlan {
    MatmulShape shape;
    cublasLtMatmulDesc_t operation;
    cublasLtMatrixLayout_t A, B, D;
    cublasLtMatmulAlgo_t algorithms[8];  // those that cuBLASLt offers, the best first
    int offered, chosen;                 // those before the chosen one were refused at launch; == offered: all were
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

// cuBLASLt always offers the same algorithms in the same order, so runs repeat to the bit. An algorithm may split the
// sum over k, but only if it adds the parts in fp32.
static MatmulPlan plan_matmul(const Workspace& ws, const MatmulShape& s, bool bias, bool aux) {
    MatmulPlan plan = {};
    plan.shape = s;
    // Sums are fp32, and products of fp32 operands are too: never TF32
    CHECK(cublasLtMatmulDescCreate(&plan.operation, CUBLAS_COMPUTE_32F, CUDA_R_32F));
    set(plan.operation, CUBLASLT_MATMUL_DESC_TRANSA, s.transA ? CUBLAS_OP_T : CUBLAS_OP_N);
    set(plan.operation, CUBLASLT_MATMUL_DESC_TRANSB, s.transB ? CUBLAS_OP_T : CUBLAS_OP_N);
    set(plan.operation, CUBLASLT_MATMUL_DESC_EPILOGUE, s.epilogue);
    const void* aligned = ws.cublas + s.alignment;  // stands for the pointers, whose alignment the choice depends on
    if (bias) {
        set(plan.operation, CUBLASLT_MATMUL_DESC_BIAS_POINTER, aligned);
        set(plan.operation, CUBLASLT_MATMUL_DESC_BIAS_DATA_TYPE, s.d_type);
    }
    if (aux) {
        set(plan.operation, CUBLASLT_MATMUL_DESC_EPILOGUE_AUX_POINTER, aligned);
        set(plan.operation, CUBLASLT_MATMUL_DESC_EPILOGUE_AUX_LD, (int64_t)s.ldd);
        set(plan.operation, CUBLASLT_MATMUL_DESC_EPILOGUE_AUX_DATA_TYPE, s.d_type);
    }
    uint64_t A_rows = s.transA ? s.k : s.m, A_columns = s.transA ? s.m : s.k;
    uint64_t B_rows = s.transB ? s.n : s.k, B_columns = s.transB ? s.k : s.n;
    CHECK(cublasLtMatrixLayoutCreate(&plan.A, s.ab_type, A_rows, A_columns, s.lda));
    CHECK(cublasLtMatrixLayoutCreate(&plan.B, s.ab_type, B_rows, B_columns, s.ldb));
    CHECK(cublasLtMatrixLayoutCreate(&plan.D, s.d_type, s.m, s.n, s.ldd));

    cublasLtMatmulPreference_t preference;
    CHECK(cublasLtMatmulPreferenceCreate(&preference));
    auto prefer = [&](cublasLtMatmulPreferenceAttributes_t attribute, auto value) {
        CHECK(cublasLtMatmulPreferenceSetAttribute(preference, attribute, &value, sizeof value));
    };
    prefer(CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES, (uint64_t)CUBLAS_WORKSPACE);
    prefer(CUBLASLT_MATMUL_PREF_REDUCTION_SCHEME_MASK, (uint32_t)CUBLASLT_REDUCTION_SCHEME_COMPUTE_TYPE);
    for (auto operand : {CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_A_BYTES, CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_B_BYTES,
                         CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_C_BYTES, CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_D_BYTES})
        prefer(operand, (uint32_t)s.alignment);
    constexpr int MOST = std::extent_v<decltype(plan.algorithms)>;
    cublasLtMatmulHeuristicResult_t results[MOST] = {};
    int found = 0;
    const cublasStatus_t status = cublasLtMatmulAlgoGetHeuristic(
        cublas_handle(), plan.operation, plan.A, plan.B, plan.D, plan.D, preference, MOST, results, &found);
    if (!refused(status)) check(status, "cublasLtMatmulAlgoGetHeuristic", __LINE__);
    CHECK(cublasLtMatmulPreferenceDestroy(preference));
    for (int i = 0; i < found; i++)
        if (results[i].state == CUBLAS_STATUS_SUCCESS) plan.algorithms[plan.offered++] = results[i].algo;
    return plan;
}

// D = epilogue(op(A) op(B) + C), column by column as in BLAS. C, unless null, has D's type and leading dimension.
// Returns false if cuBLASLt has no algorithm for this.
static bool matmul_cublaslt(const Workspace& ws, void* D, cudaDataType d_type, const void* A, bool transA,
                            const void* B, bool transB, cudaDataType ab_type, int m, int n, int k, int lda, int ldb,
                            int ldd, const void* C, Epilogue epilogue, const void* bias, void* aux) {
    uintptr_t low = 16;
    for (const void* p : {(const void*)D, A, B, C, bias, (const void*)aux}) low |= (uintptr_t)p;
    const MatmulShape shape = {d_type, ab_type, epilogue, transA, transB, m, n, k, lda, ldb, ldd, C != nullptr,
                               (int)(low & -low)};
    // Training has some twenty shapes. Decoding has others for each length of a prompt; the oldest make room.
    static std::array<MatmulPlan, 1024> plans;
    static size_t made = 0;
    MatmulPlan *end = plans.data() + std::min(made, plans.size()), *plan = plans.data();
    while (plan < end && plan->shape != shape) plan++;
    if (plan == end) {
        plan = &plans[made++ % plans.size()];
        if (made > plans.size()) {
            CHECK(cublasLtMatmulDescDestroy(plan->operation));
            for (cublasLtMatrixLayout_t layout : {plan->A, plan->B, plan->D})
                CHECK(cublasLtMatrixLayoutDestroy(layout));
        }
        *plan = plan_matmul(ws, shape, bias, aux);
    }
    if (bias) set(plan->operation, CUBLASLT_MATMUL_DESC_BIAS_POINTER, bias);
    if (aux) set(plan->operation, CUBLASLT_MATMUL_DESC_EPILOGUE_AUX_POINTER, aux);
    const float one = 1, beta = C ? 1 : 0;
    for (; plan->chosen < plan->offered; plan->chosen++) {
        const cublasStatus_t status = cublasLtMatmul(
            cublas_handle(), plan->operation, &one, A, plan->A, B, plan->B, &beta, C ? C : D, plan->D, D, plan->D,
            &plan->algorithms[plan->chosen], ws.cublas, CUBLAS_WORKSPACE, gpu.stream);
        if (!refused(status)) {
            check(status, "cublasLtMatmul", __LINE__);
            return true;
        }
        cudaGetLastError();  // forgets the error that a refused launch may leave
    }
    return false;
}

static bool fuses = true;  // a test turns it off: then no epilogue is possible

// y (M, N), in rows ldy apart, = finish(A B). cuBLASLt, which is column-major, sees this as yᵀ (N, M) = Bᵀ Aᵀ.
// Returns false if cuBLASLt cannot do it: on some GPUs it lacks some epilogues and sizes.
template <class X, class Y>
static bool try_matmul(const Workspace& ws, Y* y, size_t ldy, size_t M, size_t N, size_t K, Operand<X> A, Operand<X> B,
                       Finish<Y> finish) {
    if (finish.epilogue != Epilogue::NONE && !fuses) return false;
    return matmul_cublaslt(ws, y, DATA_TYPE<Y>, B.data, B.along_k, A.data, !A.along_k, DATA_TYPE<X>, (int)N, (int)M,
                           (int)K, (int)B.stride, (int)A.stride, (int)ldy, finish.add, finish.epilogue, finish.bias,
                           finish.aux);
}

// The products that cuBLASLt refuses: a block computes a square of y, from squares of A and B in shared memory
constexpr int SQUARE = 32, SQUARE_WARPS = 8;

// tile[k][i] = element (i0 + i, k0 + k) of an operand (n, K), 0 past its end. The lanes of a warp read neighbours.
template <class X>
__device__ inline void load_square(float (&tile)[SQUARE][SQUARE + 1], Operand<X> from, size_t i0, size_t n, size_t k0,
                                   size_t K) {
    for (int other = threadIdx.y; other < SQUARE; other += SQUARE_WARPS) {
        const int i = from.along_k ? other : threadIdx.x, k = from.along_k ? threadIdx.x : other;
        const X* at = from.data + (from.along_k ? (i0 + i) * from.stride + k0 + k : (k0 + k) * from.stride + i0 + i);
        tile[k][i] = i0 + i < n && k0 + k < K ? (float)*at : 0.0f;
    }
}

// A warp has every eighth row of the square, a lane per column.
template <class X, class Y>
__global__ void matmul_plain_kernel(Y* y, size_t ldy, size_t M, size_t N, size_t K, Operand<X> A, Operand<X> B,
                                    const Y* add) {
    __shared__ float a[SQUARE][SQUARE + 1], b[SQUARE][SQUARE + 1];
    const size_t across = (N + SQUARE - 1) / SQUARE;
    const size_t m0 = blockIdx.x / across * SQUARE, n0 = blockIdx.x % across * SQUARE;
    float sums[SQUARE / SQUARE_WARPS] = {};
    for (size_t k0 = 0; k0 < K; k0 += SQUARE) {
        load_square(a, A, m0, M, k0, K);
        load_square(b, B, n0, N, k0, K);
        __syncthreads();
        for (int k = 0; k < SQUARE; k++)
#pragma unroll
            for (int i = 0; i < SQUARE / SQUARE_WARPS; i++)
                sums[i] += a[k][threadIdx.y + i * SQUARE_WARPS] * b[k][threadIdx.x];
        __syncthreads();
    }
#pragma unroll
    for (int i = 0; i < SQUARE / SQUARE_WARPS; i++) {
        const size_t m = m0 + threadIdx.y + i * SQUARE_WARPS, n = n0 + threadIdx.x;
        if (m < M && n < N) y[m * ldy + n] = (Y)(add ? (float)add[m * ldy + n] + sums[i] : sums[i]);
    }
}

template <class X, class Y>
static void matmul_plain(Y* y, size_t ldy, size_t M, size_t N, size_t K, Operand<X> A, Operand<X> B, const Y* add) {
    matmul_plain_kernel<X, Y><<<(unsigned)(ceil_div(M, SQUARE) * ceil_div(N, SQUARE)), dim3(WARP, SQUARE_WARPS), 0,
                                gpu.stream>>>(y, ldy, M, N, K, A, B, add);
    CHECK(cudaGetLastError());
}

// y = A B, plus `add` unless it is null. `add` may be y.
template <class X, class Y>
static void matmul(const Workspace& ws, Y* y, size_t ldy, size_t M, size_t N, size_t K, Operand<X> A, Operand<X> B,
                   const Y* add = nullptr) {
    if (try_matmul<X, Y>(ws, y, ldy, M, N, K, A, B, {.add = add})) return;
    static bool told = false;
    if (!std::exchange(told, true))
        fprintf(stderr, "note: cuBLASLt refuses a product of %zu x %zu x %zu; a slower kernel computes it\n", M, N, K);
    matmul_plain<X, Y>(y, ldy, M, N, K, A, B, add);
}

// --------------------------------------------------------------------------------------------------------------------
// Linear layers: y = x wᵀ + b, with x (rows, C), w (OC, C), b (OC), y (rows, OC)
//
// The forward variants differ in what happens to the product before it is stored: in cuBLASLt's epilogue, or in a
// kernel of its own if cuBLASLt lacks that epilogue.

// y (rows, OC) += b. One thread per vector
template <class X>
__global__ void bias_forward_kernel(X* y, const X* b, size_t rows, size_t OC, size_t ldy) {
    const size_t at = ((size_t)blockIdx.x * blockDim.x + threadIdx.x) * VECTOR;
    if (at >= rows * OC) return;
    X* to = y + at / OC * ldy + at % OC;
    float sum[VECTOR], b_i[VECTOR];
    load(sum, to);
    load(b_i, b + at % OC);
#pragma unroll
    for (int i = 0; i < VECTOR; i++) sum[i] += b_i[i];
    store(to, sum);
}

template <class X>
static void linear_forward(const Workspace& ws, X* y, const X* residual, const X* x, const X* w, const X* b,
                           size_t rows, size_t C, size_t OC, size_t ldy) {
    constexpr int BLOCK = 128;
    if (b && try_matmul<X, X>(ws, y, ldy, rows, OC, C, along_k(x, C), along_k(w, C),
                              {.add = residual, .epilogue = Epilogue::BIAS, .bias = b}))
        return;
    matmul<X, X>(ws, y, ldy, rows, OC, C, along_k(x, C), along_k(w, C), residual);
    if (!b) return;
    bias_forward_kernel<X>
        <<<(unsigned)ceil_div(rows * OC, BLOCK * VECTOR), BLOCK, 0, gpu.stream>>>(y, b, rows, OC, ldy);
    CHECK(cudaGetLastError());
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

// y (n) = gelu(h); y may be h. One thread per vector
template <class X>
__global__ void gelu_forward_kernel(X* y, const X* h, size_t n) {
    const size_t at = ((size_t)blockIdx.x * blockDim.x + threadIdx.x) * VECTOR;
    if (at >= n) return;
    float x[VECTOR];
    load(x, h + at);
#pragma unroll
    for (int i = 0; i < VECTOR; i++) x[i] = gelu(x[i]);
    store(y + at, x);
}

template <class X>
static void gelu_forward(X* y, const X* h, size_t n) {
    constexpr int BLOCK = 128;
    gelu_forward_kernel<X><<<(unsigned)ceil_div(n, BLOCK * VECTOR), BLOCK, 0, gpu.stream>>>(y, h, n);
    CHECK(cudaGetLastError());
}

// dh (n) *= gelu'(h). One thread per vector
template <class X>
__global__ void gelu_backward_kernel(X* dh, const X* h, size_t n) {
    const size_t at = ((size_t)blockIdx.x * blockDim.x + threadIdx.x) * VECTOR;
    if (at >= n) return;
    float d[VECTOR], x[VECTOR];
    load(d, dh + at);
    load(x, h + at);
#pragma unroll
    for (int i = 0; i < VECTOR; i++) d[i] *= gelu_derivative(x[i]);
    store(dh + at, d);
}

template <class X>
static void gelu_backward(X* dh, const X* h, size_t n) {
    constexpr int BLOCK = 128;
    gelu_backward_kernel<X><<<(unsigned)ceil_div(n, BLOCK * VECTOR), BLOCK, 0, gpu.stream>>>(dh, h, n);
    CHECK(cudaGetLastError());
}

// Whether cuBLASLt's epilogues compute GELU and its derivative: on tensor cores, and on Hopper GPUs and later, where
// they cost nothing
template <class X>
static bool fuses_gelu() {
    return std::is_same_v<X, bf16> && gpu.major >= 9;
}

// An epilogue takes GELU of the sum before it is rounded to X, gelu_forward after.
template <class X>
static void linear_gelu_forward(const Workspace& ws, X* y, X* h, const X* x, const X* w, const X* b, size_t rows,
                                size_t C, size_t OC) {
    const Epilogue epilogue = h ? Epilogue::GELU_AUX_BIAS : Epilogue::GELU_BIAS;
    if (fuses_gelu<X>() && try_matmul<X, X>(ws, y, OC, rows, OC, C, along_k(x, C), along_k(w, C),
                                            {.epilogue = epilogue, .bias = b, .aux = h}))
        return;
    X* sum = h ? h : y;
    linear_forward<X>(ws, sum, nullptr, x, w, b, rows, C, OC, OC);
    gelu_forward(y, sum, rows * OC);
}

template <class X>
static void linear_backward_input(const Workspace& ws, X* dx, const X* dy, const X* w, size_t rows, size_t C, size_t OC,
                                  size_t lddy, bool first, bool last) {
    if (first && last) return matmul<X, X>(ws, dx, C, rows, C, OC, along_k(dy, lddy), across_k(w, C));
    matmul<X, float>(ws, ws.dx_sum, C, rows, C, OC, along_k(dy, lddy), across_k(w, C), first ? nullptr : ws.dx_sum);
    if (last) convert(dx, ws.dx_sum, rows * C);
}

// x is GELU of the rounded h. So in bf16 it may differ in the last bit from what an epilogue made of the unrounded one.
template <class X>
static void linear_gelu_backward_input(const Workspace& ws, X* dh, X* x, const X* h, const X* dy, const X* w,
                                       size_t rows, size_t C, size_t OC) {
    if (!fuses_gelu<X>() || !try_matmul<X, X>(ws, dh, C, rows, C, OC, along_k(dy, OC), across_k(w, C),
                                              {.epilogue = Epilogue::DGELU, .aux = const_cast<X*>(h)})) {
        linear_backward_input(ws, dh, dy, w, rows, C, OC, OC);
        gelu_backward(dh, h, rows * C);
    }
    if (x) gelu_forward(x, h, rows * C);
}

// Σ over the 8 warps of a block of their 256 columns, a vector per thread. Each thread gets the sum of the column that
// has its number.
constexpr int SUM_WARPS = WARP_VALUES / WARP;

__device__ inline float sum_over_warps(const float (&sum)[VECTOR]) {
    __shared__ alignas(16) float sums[SUM_WARPS][WARP_VALUES];
    store(sums[threadIdx.y] + threadIdx.x * VECTOR, sum);
    __syncthreads();
    float total = 0;
    for (int w = 0; w < SUM_WARPS; w++) total += sums[w][threadIdx.y * WARP + threadIdx.x];
    return total;
}

// partial (chunks, OC): Σ of dy over a chunk of tokens. A block has a chunk and 256 columns. Its warps take turns with
// the tokens; a thread has a vector of columns.
constexpr int BIAS_CHUNK = 256;

template <class X>
__global__ void bias_backward_kernel(float* partial, const X* dy, size_t rows, int OC, size_t lddy) {
    const int lane = threadIdx.x, warp = threadIdx.y, column = blockIdx.y * WARP_VALUES;
    const size_t begin = (size_t)blockIdx.x * BIAS_CHUNK, end = min(rows, begin + BIAS_CHUNK);
    float sum[VECTOR] = {}, dy_r[VECTOR];
    for (size_t r = begin + warp; r < end; r += SUM_WARPS) {
        load(dy_r, dy + r * lddy + column, lane, OC - column);
#pragma unroll
        for (int i = 0; i < VECTOR; i++) sum[i] += dy_r[i];
    }
    const float total = sum_over_warps(sum);
    const int i = column + warp * WARP + lane;
    if (i < OC) partial[(size_t)blockIdx.x * OC + i] = total;
}

template <class X>
static void linear_backward_weight(const Workspace& ws, float* dw, float* db, const X* dy, const X* x, size_t rows,
                                   size_t C, size_t OC, size_t lddy, bool add) {
    matmul<X, float>(ws, dw, C, OC, C, rows, across_k(dy, lddy), across_k(x, C), add ? dw : nullptr);
    if (!db) return;
    size_t chunks = ceil_div(rows, BIAS_CHUNK);
    dim3 grid((unsigned)chunks, (unsigned)ceil_div(OC, WARP_VALUES)), block(WARP, SUM_WARPS);
    bias_backward_kernel<X><<<grid, block, 0, gpu.stream>>>(ws.partial, dy, rows, (int)OC, lddy);
    CHECK(cudaGetLastError());
    sum_partials(db, nullptr, ws.partial, chunks, OC, add);
}

// --------------------------------------------------------------------------------------------------------------------
// Embedding: x[b,t] = wte[token] + wpe[t]

constexpr int ROW_WARPS = 4;  // warps of a block, where each has a row of its own

// One warp per token
template <class X>
__global__ void embedding_forward_kernel(X* x, const int* tokens, const X* wte, const X* wpe, size_t rows, int T,
                                         int C) {
    const size_t r = (size_t)blockIdx.x * ROW_WARPS + threadIdx.y;
    if (r >= rows) return;
    const int lane = threadIdx.x;
    const X *token = wte + (size_t)tokens[r] * C, *position = wpe + r % T * C;
    for (int c = 0; c < C; c += WARP_VALUES) {
        float a[VECTOR], b[VECTOR];
        load(a, token + c, lane, C - c);
        load(b, position + c, lane, C - c);
#pragma unroll
        for (int i = 0; i < VECTOR; i++) a[i] += b[i];
        store(x + r * C + c, a, lane, C - c);
    }
}

template <class X>
static void embedding_forward(X* x, const int* tokens, const X* wte, const X* wpe, size_t B, size_t T, size_t C) {
    embedding_forward_kernel<X><<<(unsigned)ceil_div(B * T, ROW_WARPS), dim3(WARP, ROW_WARPS), 0, gpu.stream>>>(
        x, tokens, wte, wpe, B * T, (int)T, (int)C);
    CHECK(cudaGetLastError());
}

// dwte[token] += dx[b,t]. Block (n, .) has the n-th token in use, and 256 channels. Its warps take turns with the
// positions where that token stands: place[first[n]], place[first[n] + 1], ... before place[first[n + 1]].
template <class X>
__global__ void embedding_backward_token_kernel(float* dwte, const X* dx, const int* tokens, const int* place,
                                                const int* first, int C) {
    const int lane = threadIdx.x, warp = threadIdx.y, c = blockIdx.y * WARP_VALUES;
    const int begin = first[blockIdx.x], end = first[blockIdx.x + 1];
    float sum[VECTOR] = {}, dx_bt[VECTOR];
    for (int n = begin + warp; n < end; n += SUM_WARPS) {
        load(dx_bt, dx + (size_t)place[n] * C + c, lane, C - c);
#pragma unroll
        for (int i = 0; i < VECTOR; i++) sum[i] += dx_bt[i];
    }
    const float total = sum_over_warps(sum);
    const int i = c + warp * WARP + lane;
    if (i < C) dwte[(size_t)tokens[place[begin]] * C + i] += total;
}

// dwpe[t] = or += Σ_b dx[b,t]. One warp per position
template <class X>
__global__ void embedding_backward_position_kernel(float* dwpe, const X* dx, int B, int T, int C, bool add) {
    const int t = blockIdx.x * ROW_WARPS + threadIdx.y, lane = threadIdx.x;
    if (t >= T) return;
    for (int c = 0; c < C; c += WARP_VALUES) {
        float sum[VECTOR] = {}, dx_bt[VECTOR];
        if (add) load(sum, dwpe + (size_t)t * C + c, lane, C - c);
        for (int b = 0; b < B; b++) {
            load(dx_bt, dx + ((size_t)b * T + t) * C + c, lane, C - c);
#pragma unroll
            for (int i = 0; i < VECTOR; i++) sum[i] += dx_bt[i];
        }
        store(dwpe + (size_t)t * C + c, sum, lane, C - c);
    }
}

template <class X>
static void embedding_backward(float* dwte, float* dwpe, const X* dx, const Inputs& inputs, size_t B, size_t T,
                               size_t C, bool add) {
    dim3 grid((unsigned)inputs.used, (unsigned)ceil_div(C, WARP_VALUES));
    embedding_backward_token_kernel<X>
        <<<grid, dim3(WARP, SUM_WARPS), 0, gpu.stream>>>(dwte, dx, inputs.x, inputs.place, inputs.first, (int)C);
    CHECK(cudaGetLastError());
    embedding_backward_position_kernel<X><<<(unsigned)ceil_div(T, ROW_WARPS), dim3(WARP, ROW_WARPS), 0, gpu.stream>>>(
        dwpe, dx, (int)B, (int)T, (int)C, add);
    CHECK(cudaGetLastError());
}

// --------------------------------------------------------------------------------------------------------------------
// LayerNorm: n = (x - mean) rstd, y = n w + b, over the C channels of each row; rstd = 1/√(variance + 1e-5)

// One warp per row, which it goes through three times. The first LAYERNORM_KEPT vectors of a lane stay in registers;
// the rest of longer rows is read again each time.
constexpr int LAYERNORM_KEPT = 4;

template <class X>
__global__ void layernorm_forward_kernel(X* y, float* mean, float* rstd, const X* x, const X* w, const X* b,
                                         size_t rows, int C) {
    const size_t r = (size_t)blockIdx.x * ROW_WARPS + threadIdx.y;
    if (r >= rows) return;
    const int lane = threadIdx.x;
    const X* x_r = x + r * C;
    float kept[LAYERNORM_KEPT][VECTOR], sum = 0, variance = 0;
#pragma unroll
    for (int k = 0; k < LAYERNORM_KEPT; k++) load(kept[k], x_r + k * WARP_VALUES, lane, C - k * WARP_VALUES);
    auto for_each = [&](auto f) {  // f(first channel, x) for the vectors of this lane; zeros past the row's end
#pragma unroll
        for (int k = 0; k < LAYERNORM_KEPT; k++)
            if (k * WARP_VALUES < C) f(k * WARP_VALUES, kept[k]);
        for (int c = LAYERNORM_KEPT * WARP_VALUES; c < C; c += WARP_VALUES) {
            float x_c[VECTOR];
            load(x_c, x_r + c, lane, C - c);
            f(c, x_c);
        }
    };
    for_each([&](int, float (&x_c)[VECTOR]) {
#pragma unroll
        for (int i = 0; i < VECTOR; i++) sum += x_c[i];
    });
    const float m = sum_over(sum) / C;
    for_each([&](int c, float (&x_c)[VECTOR]) {
        if (lane * VECTOR >= C - c) return;
#pragma unroll
        for (int i = 0; i < VECTOR; i++) variance += (x_c[i] - m) * (x_c[i] - m);
    });
    const float s = 1.0f / sqrtf(sum_over(variance) / C + 1e-5f);
    if (mean && lane == 0) mean[r] = m, rstd[r] = s;
    for_each([&](int c, float (&x_c)[VECTOR]) {
        float w_c[VECTOR], b_c[VECTOR];
        load(w_c, w + c, lane, C - c);
        load(b_c, b + c, lane, C - c);
#pragma unroll
        for (int i = 0; i < VECTOR; i++) x_c[i] = (x_c[i] - m) * s * w_c[i] + b_c[i];
        store(y + r * C + c, x_c, lane, C - c);
    });
}

// `again` computes the statistics again too: they cost no further pass over memory.
template <class X>
static void layernorm_forward(X* y, float* mean, float* rstd, const X* x, const X* w, const X* b, size_t rows,
                              size_t C, bool again) {
    layernorm_forward_kernel<X><<<(unsigned)ceil_div(rows, ROW_WARPS), dim3(WARP, ROW_WARPS), 0, gpu.stream>>>(
        y, again ? nullptr : mean, rstd, x, w, b, rows, (int)C);
    CHECK(cudaGetLastError());
}

// With g = dy w: dx_i = rstd (g_i - mean(g) - n_i mean(g n)). dw = Σ dy n and db = Σ dy over rows: first over chunks of
// rows (this kernel), then over chunks (sum_partials).
//
// A block has a chunk and takes two rows at a time; a thread has a vector of channels, whose dw and db stay in its
// registers. mean(g) and mean(g n) are sums over the block: the warps' sums go through shared memory, in two buffers
// used in turn, so that one barrier is enough.
constexpr int LAYERNORM_CHUNK = 32, LAYERNORM_ROWS = 2;
constexpr int LAYERNORM_BLOCK = 640;  // a thread may then use 96 registers: more threads would spill

template <class X>
__global__ void __launch_bounds__(LAYERNORM_BLOCK)
    layernorm_backward_kernel(X* dx, float* partial /* (chunks, 2, C) */, const X* dy, const X* x, const X* w,
                              const float* mean, const float* rstd, size_t rows, int C, bool add_dx) {
    constexpr int N = LAYERNORM_ROWS;
    __shared__ float warp_sums[2][2 * N][WARP];
    const int lane = threadIdx.x, warp = lane / WARP, warps = blockDim.x / WARP;
    const size_t begin = (size_t)blockIdx.x * LAYERNORM_CHUNK, end = min(rows, begin + LAYERNORM_CHUNK);
    float w_i[VECTOR], dw[VECTOR] = {}, db[VECTOR] = {};
    load(w_i, w, lane, C);
    int buffer = 0;
    for (size_t first = begin; first < end; first += N, buffer ^= 1) {
        Vector<X> x_r[N], dy_r[N], dx_r[N] = {};
#pragma unroll
        for (int j = 0; j < N; j++) {  // all loads come first, so that their latencies overlap
            const size_t r = min(first + j, end - 1);  // an odd last row is read twice and counted once
            x_r[j] = load_vector(x + r * C, lane, C);
            dy_r[j] = load_vector(dy + r * C, lane, C);
            if (add_dx) dx_r[j] = load_vector(dx + r * C, lane, C);
        }
        float n[N][VECTOR], g[N][VECTOR], s[N], sums[2 * N] = {};
#pragma unroll
        for (int j = 0; j < N; j++) {
            const size_t r = min(first + j, end - 1);
            const float m = mean[r];
            s[j] = rstd[r];
            unpack(n[j], x_r[j]);
            unpack(g[j], dy_r[j]);
#pragma unroll
            for (int i = 0; i < VECTOR; i++) {
                n[j][i] = (n[j][i] - m) * s[j];
                if (first + j < end) dw[i] += g[j][i] * n[j][i], db[i] += g[j][i];
                g[j][i] *= w_i[i];
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
            float dx_i[VECTOR];
            unpack(dx_i, dx_r[j]);
#pragma unroll
            for (int i = 0; i < VECTOR; i++) dx_i[i] += s[j] * (g[j][i] - sums[2 * j] - n[j][i] * sums[2 * j + 1]);
            store(dx + (first + j) * C, dx_i, lane, C);
        }
    }
    store(partial + (size_t)blockIdx.x * 2 * C, dw, lane, C);
    store(partial + (size_t)blockIdx.x * 2 * C + C, db, lane, C);
}

template <class X>
static void layernorm_backward(const Workspace& ws, X* dx, float* dw, float* db, const X* dy, const X* x, const X* w,
                               const float* mean, const float* rstd, size_t rows, size_t C, bool add_dx, bool add) {
    size_t chunks = ceil_div(rows, LAYERNORM_CHUNK), threads = round_up(ceil_div(C, VECTOR), WARP);
    layernorm_backward_kernel<X><<<(unsigned)chunks, (unsigned)threads, 0, gpu.stream>>>(
        dx, ws.partial, dy, x, w, mean, rstd, rows, (int)C, add_dx);
    CHECK(cudaGetLastError());
    sum_partials(dw, db, ws.partial, chunks, C, add);
}

// --------------------------------------------------------------------------------------------------------------------
// Attention: o = softmax(causal(q kᵀ/√HS)) v, in each head of each sequence
//
// Backward, with p = softmax(s), s = scale q kᵀ, scale = 1/√HS, delta_i = do_i·o_i (= Σ_j p_ij do_i·v_j):
//     dv_j = Σ_i p_ij do_i           ds_ij = p_ij (do_i·v_j - delta_i)
//     dq_i = scale Σ_j ds_ij k_j     dk_j = scale Σ_i ds_ij q_i
// Sums over keys belong to a query, sums over queries to a key. So dq has one kernel, and dk and dv have another. Both
// compute s and dp = do vᵀ; in return, one thread sums each gradient, in one order.
//
// There are two sets of kernels: in tiles, on tensor cores, for bf16 and head sizes 32, 64 and 128; and plain ones, for
// all else and for a single query.

static float attention_scale(int HS) { return 1.0f / sqrtf((float)HS); }

// a is in shared memory, b a row of a head; n is a multiple of 8
template <class X>
__device__ inline float dot(const float* a, const X* b, int n) {
    float sum = 0, sums[VECTOR] = {}, b_i[VECTOR];
    for (int i = 0; i < n; i += VECTOR) {
        load(b_i, b + i);
#pragma unroll
        for (int j = 0; j < VECTOR; j++) sums[j] += a[i + j] * b_i[j];
    }
#pragma unroll
    for (int j = 0; j < VECTOR; j++) sum += sums[j];
    return sum;
}

// A block has a query. Its warps take turns with tiles of 32 keys: first each lane computes a key's score, then each
// lane sums channels of p v over the tile. This is the online softmax: max, sum and o of the tiles so far are rescaled
// when max grows. At the end the warps' results are combined in the same way. One warp for training and prefill, eight
// for a single query, where there are few blocks. Scores and max are not scaled.
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
                                    const AttentionShape& s) {
    const int warps = s.queries == 1 ? 8 : 1;
    dim3 grid((unsigned)s.queries, (unsigned)s.NH, (unsigned)s.B), block(WARP, (unsigned)warps);
    size_t shared = (s.HS + warps * (s.HS + WARP + 2)) * sizeof(float);
    attention_forward_plain_kernel<X>
        <<<grid, block, shared, gpu.stream>>>(o, lse, q, kv, s.HS, s.before, attention_scale(s.HS));
    CHECK(cudaGetLastError());
}

// delta (B, NH, T) = do·o. One warp per row
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

// dq. One warp per query, over tiles of 32 keys: first each lane computes a key's ds, then each lane sums channels of
// ds k over the tile.
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

// dk, dv. One warp per key, over tiles of 32 queries: first each lane computes a query's p and ds, then each lane sums
// channels of p do and ds q over the tile.
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
    const float scale = attention_scale(s.HS);
    dim3 grid((unsigned)s.queries, (unsigned)s.NH, (unsigned)s.B), rows = grid;
    rows.x = (unsigned)ceil_div(s.queries, ROW_WARPS);
    attention_delta_kernel<X><<<rows, dim3(WARP, ROW_WARPS), 0, gpu.stream>>>(delta, dout, o, s.HS, s.queries);
    CHECK(cudaGetLastError());
    attention_backward_query_plain_kernel<X><<<grid, WARP, (3 * s.HS + WARP) * sizeof(float), gpu.stream>>>(
        dq, dout, lse, delta, q, kv, s.HS, scale);
    CHECK(cudaGetLastError());
    attention_backward_key_plain_kernel<X, DKV><<<grid, WARP, (4 * s.HS + 2 * WARP) * sizeof(float), gpu.stream>>>(
        dkv, dout, lse, delta, q, kv, s.HS, scale);
    CHECK(cudaGetLastError());
}

// --------------------------------------------------------------------------------------------------------------------
// Attention in tiles, on tensor cores
//
// A warp's instruction mma.m16n8k16 computes D (16, 8) += A (16, 16) B (16, 8). The operands are spread over the lanes'
// registers; a lane's part is called a fragment. With g = lane / 4 and c = lane % 4, a lane's four values of D are at
// (g, 2c), (g, 2c+1), (g+8, 2c), (g+8, 2c+1). A fragment of A has the same rows and columns as the fragments of two
// neighbouring D. So p, rounded to bf16, becomes the A of p v without leaving the registers.

#ifndef GPT2_EMULATED  // the instructions that C++ has no name for; the emulator has its own
__device__ inline void mma_m16n8k16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, "
                 "{%0,%1,%2,%3};"
                 : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

// Loads four matrices of 8 × 8 bf16. Lane l passes the address of row l % 8 of matrix l / 8. It receives, of each
// matrix (of its transpose with _trans), the values in row l / 4 at columns 2 (l % 4) and 2 (l % 4) + 1.
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

// Starts a copy of 16 bytes from global to shared memory, or of zeros if not `valid`.
__device__ inline void cp_async_16(void* shared, const void* global, bool valid) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"((uint32_t)__cvta_generic_to_shared(shared)),
                 "l"(global), "r"(valid ? 16 : 0)
                 : "memory");
}
// Waits for all copies that this thread has started.
__device__ inline void cp_async_wait() { asm volatile("cp.async.wait_all;" ::: "memory"); }

__device__ inline float exp2_approx(float x) {  // relative error 2^-22
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}
#endif

constexpr int TILE = 64, TILE_BLOCK = 128;  // rows of a tile; threads of a block
constexpr float LOG2_E = 1.44269504f;       // powers of 2 are faster than powers of e

// Where vector c of row r of a tile lies in shared memory. A row is HS bf16: HS/8 vectors of 16 bytes. Vector c is
// stored in the place of vector c ^ (r % 8). ldmatrix reads the same vector of eight rows at once: they then occupy all
// 32 banks, without conflict. For HS 32, two rows share the banks, and it is c ^ (r / 2 % 4).
template <int HS>
__device__ inline int in_tile(int r, int c) {
    return r * HS + ((c ^ (HS == 32 ? r >> 1 & 3 : r & 7)) << 3);
}

// Copies rows first .. first + ROWS - 1 of a head; rows from `end` on are 0. A thread copies the same vector of every
// STEP-th row. STEP is a multiple of 8, so in_tile's exclusive or is computed once. A whole tile needs no checks, which
// halves the instructions for addresses.
template <int HS, int ROWS>
__device__ inline void copy_tile(bf16* tile, const bf16* head, size_t row, int first, int end) {
    constexpr int VECTORS = HS / 8, STEP = TILE_BLOCK / VECTORS;
    static_assert(STEP % 8 == 0 && ROWS % STEP == 0);
    const int r = threadIdx.x / VECTORS, c = threadIdx.x % VECTORS;
    bf16* to = tile + in_tile<HS>(r, c);
    const bf16* from = head + (first + r) * row + c * 8;
    auto copy = [&](auto whole) {
#pragma unroll
        for (int below = 0; below < ROWS; below += STEP) {
            const bool valid = whole || first + r + below < end;
            cp_async_16(to + below * HS, valid ? from + below * row : head, valid);
        }
    };
    if (first + ROWS <= end) copy(std::true_type());
    else copy(std::false_type());
}

// Copies tile number `tile` of two arrays: k and v, or q and do. `pairs` has room for two such pairs, used in turn.
template <int HS>
__device__ inline void copy_pair(bf16* pairs, const Heads<const bf16>& one, const Heads<const bf16>& other, int b,
                                 int h, int tile, int end) {
    bf16* to = pairs + tile % 2 * 2 * TILE * HS;
    copy_tile<HS, TILE>(to, one.at(b, h, 0), one.row, tile * TILE, end);
    copy_tile<HS, TILE>(to + TILE * HS, other.at(b, h, 0), other.row, tile * TILE, end);
}

// These load rows r .. r+15, channels 16k .. 16k+15 of a tile as fragments: load_A as one A, the others as two B of
// 16 × 8, in b[0], b[1] and b[2], b[3]. For a product over channels, like q kᵀ, rows of the tile are columns of B
// (load_B_of_columns): the two B are rows r .. r+7 and r+8 .. r+15. For a product over rows, like p v, rows of the tile
// are rows of B (load_B_of_rows): the two B are channels 16k .. 16k+7 and 16k+8 .. 16k+15. r is a multiple of 8, so
// in_tile's exclusive or depends on the lane and k alone.
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

// d0 += a b0, d1 += a b1, where b holds the fragments of b0 and b1
__device__ inline void mma_two(float (&d0)[4], float (&d1)[4], const uint32_t (&a)[4], const uint32_t (&b)[4]) {
    const uint32_t b0[2] = {b[0], b[1]}, b1[2] = {b[2], b[3]};
    mma_m16n8k16(d0, a, b0);
    mma_m16n8k16(d1, a, b1);
}

__device__ inline uint32_t pack_two(float low, float high) {
    const __nv_bfloat162 both = __floats2bfloat162_rn(low, high);
    uint32_t bits;
    memcpy(&bits, &both, sizeof bits);
    return bits;
}

// Dot product of the two bf16 in a register of a fragment with two others
__device__ inline float dot_two(uint32_t bits, const bf16* others) {
    const __nv_bfloat162 b = *(const __nv_bfloat162*)others;
    __nv_bfloat162 a;
    memcpy(&a, &bits, sizeof a);
    return (float)a.x * (float)b.x + (float)a.y * (float)b.y;
}

// The A fragment made of two neighbouring D
__device__ inline void as_A(uint32_t (&a)[4], const float (&d0)[4], const float (&d1)[4]) {
    a[0] = pack_two(d0[0], d0[1]), a[1] = pack_two(d0[2], d0[3]);
    a[2] = pack_two(d1[0], d1[1]), a[3] = pack_two(d1[2], d1[3]);
}

__device__ inline void store_two(bf16* to, float x, float y) { *(__nv_bfloat162*)to = __floats2bfloat162_rn(x, y); }
__device__ inline void store_two(float* to, float x, float y) { *(float2*)to = make_float2(x, y); }

// sums (16·M, HS) += x y. x (16·M, 16·N), the D of earlier products, becomes A. y is the 16·N rows of a tile that begin
// at row `first`.
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

// Sets s to -inf where hidden(row, column): where the key is later than the query
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

// Stores this lane's part of a row of HS sums: of row g of the fragments (half 0), or row g + 8 (half 1)
template <int N, class Y>
__device__ inline void store_row(Y* row, const float (&sums)[N][4], int half) {
    const int c = threadIdx.x % 4;
#pragma unroll
    for (int d = 0; d < N; d++) store_two(row + 8 * d + 2 * c, sums[d][2 * half], sums[d][2 * half + 1]);
}

// A kernel must ask for more than 48 KB of shared memory, of which its static arrays are a part.
template <class Kernel>
static void allow_shared(Kernel kernel, size_t bytes) {
    CHECK(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, (int)bytes));
}

// M: a warp has 16·M rows (queries or keys), in M fragments; a block has 64·M rows. Each fragment of the other operand
// that a warp loads serves all M, which takes load off shared memory. For HS 128, registers suffice for M = 1 only.
template <int HS> constexpr int FRAGMENTS = HS == 128 ? 1 : 2;

// o, lse. A block has 64·M queries of a head and goes through tiles of 64 keys; while it computes on one, the next is
// being copied. There is one barrier a tile, here and in backward: after it, the tile has arrived, and all warps have
// finished with the tile before, which the next one may replace. The blocks with the most keys start first.
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
    const float scale2 = scale * LOG2_E;
    auto copy_keys = [&](int j) { copy_pair<HS>(kv_tiles, k_rows, v_rows, b, h, j, keys); };
    copy_tile<HS, ROWS>(q_tile, q.at(b, h, 0), q.row, i0, queries);
    copy_keys(0);

    uint32_t q_A[M][K][4];
    float sums_o[M][2 * K][4] = {}, max[M][2], sum[M][2] = {};
#pragma unroll
    for (int m = 0; m < M; m++) max[m][0] = max[m][1] = -INFINITY;
    for (int j = 0; j < tiles; j++) {
        cp_async_wait();
        __syncthreads();
        if (j + 1 < tiles) copy_keys(j + 1);
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
            // p = e^(scale (s - max)), in place of s. The four lanes of the same g share a row.
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
    kernel<<<grid, TILE_BLOCK, FORWARD_SHARED<HS>, gpu.stream>>>(o, lse, q, kv, s.queries, s.before,
                                                                 attention_scale(s.HS));
    CHECK(cudaGetLastError());
}

// dq, and delta for the next kernel. A block has 64·M queries of a head and goes through tiles of 64 keys, 32 keys at a
// time.
// Shared memory: q and do (64·M, HS), then k and v (64, HS) of this tile and of the next.
template <int HS> constexpr size_t BACKWARD_QUERY_SHARED = (2 * FRAGMENTS<HS> + 4) * TILE * HS * sizeof(bf16);

template <int HS>
__global__ void __launch_bounds__(TILE_BLOCK, 2)
    attention_backward_query_tiles_kernel(Heads<bf16> dq, float* delta, Heads<const bf16> dout, Heads<const bf16> o,
                                          const float* lse, Heads<const bf16> q, KeysValues<const bf16> kv, int T,
                                          float scale) {
    constexpr int M = FRAGMENTS<HS>, K = HS / 16, ROWS = TILE * M;
    constexpr int HELD = HS == 128 ? 1 : K;  // fragments of q and do kept in registers; for HS 128 they do not fit
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
    copy_keys(0);
    cp_async_wait();
    __syncthreads();

    uint32_t q_A[M][HELD][4], do_A[M][HELD][4];
    auto load_rows = [&](int slot, int k) {
#pragma unroll
        for (int m = 0; m < M; m++) {
            load_A<HS>(q_A[m][slot], q_tile, row + 16 * m, k);
            load_A<HS>(do_A[m][slot], do_tile, row + 16 * m, k);
        }
    };
    // delta = do·o; each lane reads those values of o that match its fragments of do
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
        cp_async_wait();
        __syncthreads();
        if (j + 1 < tiles) copy_keys(j + 1);
        const bf16 *k_tile = kv_tiles + j % 2 * 2 * TILE * HS, *v_tile = k_tile + TILE * HS;
#pragma unroll 1
        for (int first = 0; first < TILE; first += 32) {
            const int first_key = j * TILE + first;
            if (first_key >= first_query + 16 * M) break;  // all keys are later than the warp's queries
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
            // ds = p (scale dp - scale delta), in place of s: with the factor `scale` of dq = scale ds k
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
    }
#pragma unroll
    for (int m = 0; m < M; m++)
#pragma unroll
        for (int half = 0; half < 2; half++) {
            const int i = first_query + 16 * m + g + 8 * half;
            if (i < T) store_row(dq.at(b, h, i), sums[m], half);
        }
}

// dk, dv. A block has 64·M keys of a head and goes through tiles of 64 queries, 32 queries at a time. It computes
// sᵀ = k qᵀ and dpᵀ = v doᵀ, with keys as rows, so that pᵀ and dsᵀ are A fragments of dv = pᵀ do and dk = dsᵀ q.
// Shared memory: k and v (64·M, HS); q and do (64, HS) of this tile and of the next; lse and delta (64) of both.
template <int HS>
constexpr size_t BACKWARD_KEY_SHARED = (2 * FRAGMENTS<HS> + 4) * TILE * HS * sizeof(bf16) + 4 * TILE * sizeof(float);
static_assert(BACKWARD_KEY_SHARED<128> <= 99 << 10, "a block can have no more on some GPUs");

template <int HS, class DKV>
__global__ void __launch_bounds__(TILE_BLOCK, 2)
    attention_backward_key_tiles_kernel(KeysValues<DKV> dkv, Heads<const bf16> dout, const float* lse,
                                        const float* delta, Heads<const bf16> q, KeysValues<const bf16> kv, int T,
                                        float scale) {
    constexpr int M = FRAGMENTS<HS>, K = HS / 16, ROWS = TILE * M;
    extern __shared__ uint4 shared_memory[];
    bf16 *k_tile = (bf16*)shared_memory, *v_tile = k_tile + ROWS * HS, *q_tiles = v_tile + ROWS * HS;
    float* statistics = (float*)(q_tiles + 4 * TILE * HS);  // (2, 2, TILE): lse · log₂e and scale · delta
    static_assert(TILE_BLOCK == 2 * TILE, "one thread reads each lse and each delta of a tile");
    const int lane = threadIdx.x % WARP, g = lane / 4, c = lane % 4, row = threadIdx.x / WARP * 16 * M;  // of the warp
    const int j0 = blockIdx.x * ROWS, h = blockIdx.y, b = blockIdx.z, first_key = j0 + row;
    const int begin = j0 / TILE, tiles = (T + TILE - 1) / TILE;
    const Heads<const bf16> k_rows = kv.keys(h), v_rows = kv.values(h);
    const size_t rows = ((size_t)b * gridDim.y + h) * T;
    const float scale2 = scale * LOG2_E;
    auto copy_queries = [&](int i) { copy_pair<HS>(q_tiles, q, dout, b, h, i, T); };
    // Queries past the end add nothing: q, do, lse and delta are 0 there, so p = 1 and p do = 0, ds = 0.
    auto read_statistic = [&](int tile) {
        const int i = tile * TILE + (int)threadIdx.x % TILE;
        if (i >= T) return 0.0f;
        return (int)threadIdx.x < TILE ? LOG2_E * lse[rows + i] : scale * delta[rows + i];
    };
    copy_tile<HS, ROWS>(k_tile, k_rows.at(b, h, 0), k_rows.row, j0, T);
    copy_tile<HS, ROWS>(v_tile, v_rows.at(b, h, 0), v_rows.row, j0, T);
    copy_queries(begin);
    statistics[begin % 2 * 2 * TILE + threadIdx.x] = read_statistic(begin);

    float sums_k[M][2 * K][4] = {}, sums_v[M][2 * K][4] = {};
    for (int i = begin; i < tiles; i++) {
        cp_async_wait();
        __syncthreads();
        if (i + 1 < tiles) copy_queries(i + 1);
        const float next_statistic = read_statistic(i + 1);
        const bf16 *q_tile = q_tiles + i % 2 * 2 * TILE * HS, *do_tile = q_tile + TILE * HS;
        const float *lse2 = statistics + i % 2 * 2 * TILE, *scaled_delta = lse2 + TILE;
#pragma unroll 1
        for (int first = 0; first < TILE; first += 32) {
            const int first_query = i * TILE + first;
            if (first_query + 32 <= first_key) continue;  // all queries are earlier than the warp's keys
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
            // p in place of s, ds = p (scale dp - scale delta) in place of dp
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
                                                                             attention_scale(s.HS));
    CHECK(cudaGetLastError());
    auto key_kernel = attention_backward_key_tiles_kernel<HS, DKV>;
    allow_shared(key_kernel, BACKWARD_KEY_SHARED<HS>);
    key_kernel<<<grid, TILE_BLOCK, BACKWARD_KEY_SHARED<HS>, gpu.stream>>>(dkv, dout, lse, delta, q, kv, s.queries,
                                                                         attention_scale(s.HS));
    CHECK(cudaGetLastError());
}

template <class X>
static void attention_forward(const Workspace&, Heads<X> o, float* lse, Heads<const X> q,
                              const KeysValues<const X>& kv, const AttentionShape& s) {
    if constexpr (std::is_same_v<X, bf16>) {
        if (s.HS == 32 && s.queries > 1) return attention_forward_tiles<32>(o, lse, q, kv, s);
        if (s.HS == 64 && s.queries > 1) return attention_forward_tiles<64>(o, lse, q, kv, s);
        if (s.HS == 128 && s.queries > 1) return attention_forward_tiles<128>(o, lse, q, kv, s);
    }
    attention_forward_plain(o, lse, q, kv, s);
}

template <class X, class DKV>
static void attention_backward(const Workspace& ws, Heads<X> dq, const KeysValues<DKV>& dkv, Heads<const X> dout,
                               Heads<const X> o, const float* lse, Heads<const X> q, const KeysValues<const X>& kv,
                               const AttentionShape& s) {
    if constexpr (std::is_same_v<X, bf16>) {
        if (s.HS == 32) return attention_backward_tiles<32>(dq, dkv, ws.delta, dout, o, lse, q, kv, s);
        if (s.HS == 64) return attention_backward_tiles<64>(dq, dkv, ws.delta, dout, o, lse, q, kv, s);
        if (s.HS == 128) return attention_backward_tiles<128>(dq, dkv, ws.delta, dout, o, lse, q, kv, s);
    }
    attention_backward_plain<X, DKV>(dq, dkv, ws.delta, dout, o, lse, q, kv, s);
}

// --------------------------------------------------------------------------------------------------------------------
// Skip-Layer Attention (explained in section 2): the sum of two layers' gradients

// A group of lanes per head and token. Heads from own_from on take `own`, heads before above_heads take `above`.
template <class X>
__global__ void skip_backward_kernel(X* dqkv, const float* own, const float* above, int own_from, int above_heads,
                                     size_t rows, int NH, int HS, int lanes) {
    const HeadGroup g(lanes, rows, NH);
    const bool from_own = g.h >= own_from, from_above = g.h < above_heads;
    if (!g.inside || (!from_own && !from_above)) return;
    const size_t C = (size_t)NH * HS;
    for (int part = 0; part < 2; part++) {  // keys, values
        const size_t at = (g.r * 2 + part) * C + g.h * HS;
        float sum[VECTOR] = {}, more[VECTOR] = {};
        if (from_own) load(sum, own + at, g.lane, HS);
        if (from_above) load(more, above + at, g.lane, HS);
#pragma unroll
        for (int i = 0; i < VECTOR; i++) sum[i] += more[i];
        store(dqkv + (g.r * 3 + 1 + part) * C + g.h * HS, sum, g.lane, HS);
    }
}

template <class X>
static void skip_backward(X* dqkv, const float* own, const float* above, const Config& c, int l, size_t rows) {
    const int HS = c.head_size(), lanes = lanes_of_head(HS);
    skip_backward_kernel<X><<<head_groups_grid(rows, c.NH, lanes), HEADS_BLOCK, 0, gpu.stream>>>(
        dqkv, own, above, skipping_heads(c, l), above ? c.skip_heads : 0, rows, c.NH, HS, lanes);
    CHECK(cudaGetLastError());
}

// --------------------------------------------------------------------------------------------------------------------
// Depth-Attention (explained and derived in section 2): mixing values, a token and a head at a time

// A group of lanes per head and token. Softmax and sum are online, as in attention: the mean so far is mixed/sum, with
// weights e^(s - max). a holds the scores s of the S sources until max and sum are known.
template <class X>
__global__ void depth_forward_kernel(Heads<X> v, float* a, Heads<const X> q, Heads<const X> k, ptrdiff_t layer_stride,
                                     DepthSources sources, int S, int queries, int before, size_t rows, int NH, int HS,
                                     int lanes, float scale) {
    const HeadGroup g(lanes, rows, NH);
    const int b = (int)g.r / queries, i_q = (int)g.r % queries, t = before + i_q, channels = g.inside ? HS : 0;
    const X *q_at = q.at(b, g.h, i_q), *k_at = k.at(b, g.h, t);
    X* v_at = v.at(b, g.h, t);
    float *a_l = a + g.r * (S + 1) * NH + g.h, q_l[VECTOR], k_j[VECTOR], v_j[VECTOR];
    load(q_l, q_at, g.lane, channels);
    load(k_j, k_at, g.lane, channels);
    load(v_j, v_at, g.lane, channels);
    const float own = scale * dot_over(q_l, k_j, lanes);
    float max = own, sum = 1, mixed[VECTOR];
#pragma unroll
    for (int i = 0; i < VECTOR; i++) mixed[i] = v_j[i];
#pragma unroll 2
    for (int n = 0; n < S; n++) {
        const ptrdiff_t to_j = layer_stride * (sources[n] - sources.l);
        load(k_j, k_at + to_j, g.lane, channels);
        load(v_j, v_at + to_j, g.lane, channels);
        const float s = scale * dot_over(q_l, k_j, lanes), new_max = fmaxf(max, s);
        const float rescale = expf(max - new_max), p = expf(s - new_max);
        if (g.inside && g.lane == 0) a_l[n * NH] = s;
        max = new_max;
        sum = sum * rescale + p;
#pragma unroll
        for (int i = 0; i < VECTOR; i++) mixed[i] = mixed[i] * rescale + p * v_j[i];
    }
    const float part = 1.0f / sum;
#pragma unroll
    for (int i = 0; i < VECTOR; i++) mixed[i] *= part;
    store(v_at, mixed, g.lane, channels);
    if (!g.inside || g.lane > 0) return;
    for (int n = 0; n < S; n++) a_l[n * NH] = expf(a_l[n * NH] - max) * part;
    a_l[S * NH] = expf(own - max) * part;
}

template <class X>
static void depth_forward(const Workspace&, Heads<X> v, float* a, Heads<const X> q, Heads<const X> k,
                          ptrdiff_t layer_stride, const Config& c, int l, const AttentionShape& s) {
    const DepthSources sources = depth_sources(c, l);
    const size_t rows = (size_t)s.B * s.queries;
    const int lanes = lanes_of_head(s.HS);
    depth_forward_kernel<X><<<head_groups_grid(rows, s.NH, lanes), HEADS_BLOCK, 0, gpu.stream>>>(
        v, a, q, k, layer_stride, sources, sources.count(), s.queries, s.before, rows, s.NH, s.HS, lanes,
        attention_scale(s.HS));
    CHECK(cudaGetLastError());
}

// A group of lanes per head and token. S sources; R readers: layers l+1 .. l+R. Leaves dṽ_l in qkv. 7 blocks at a time:
// at most 73 registers per thread.
template <class X>
__global__ void __launch_bounds__(HEADS_BLOCK, 7)
    depth_backward_kernel(X* dqkv, const float* dkv, float* ds, const float* a, X* qkv, ptrdiff_t layer_stride,
                          DepthSources sources, int S, int R, int window, size_t rows, int NH, int HS, int lanes,
                          float scale) {
    const HeadGroup g(lanes, rows, NH);
    const size_t C = (size_t)NH * HS, at_q = g.r * 3 * C + g.h * HS, at_k = at_q + C, at_v = at_k + C;
    const int l = sources.l, channels = g.inside ? HS : 0;
    auto read = [&](float (&x)[VECTOR], const auto* row) { load(x, row, g.lane, channels); };
    auto write = [&](X* row, const float (&x)[VECTOR]) { store(row, x, g.lane, channels); };
    float dq[VECTOR], dk[VECTOR], dv[VECTOR], x[VECTOR], y[VECTOR], a_own = 1;
    read(dk, dkv + g.r * 2 * C + g.h * HS);
    read(dv, dkv + g.r * 2 * C + C + g.h * HS);
    // Gather: dk_l += Σ_m ds_{m,l} q_m/√HS, dṽ_l += Σ_m a_{m,l} dṽ_m. a and ds of layer m follow those of layer m-1;
    // layer 0 has none.
    const float *a_m = a, *ds_m = ds;
#pragma unroll 2
    for (int m = l + 1, previous = S; m <= l + R; m++) {
        const DepthSources of_m(m, sources.stride, window);
        const int n = of_m.index(l), S_m = of_m.count();
        if (m > 1) a_m += depth_slot(rows, previous + 1, NH), ds_m += depth_slot(rows, previous, NH);
        previous = S_m;
        const float a_ml = a_m[(g.r * (S_m + 1) + n) * NH + g.h], ds_ml = scale * ds_m[(g.r * S_m + n) * NH + g.h];
        read(x, qkv + layer_stride * (m - l) + at_q);
        read(y, qkv + layer_stride * (m - l) + at_v);
#pragma unroll
        for (int i = 0; i < VECTOR; i++) dk[i] += ds_ml * x[i], dv[i] += a_ml * y[i];
    }
    // Through the mixing; dv is dṽ_l up to here
    if (S > 0) {
        const float* a_l = a + g.r * (S + 1) * NH + g.h;
        read(x, qkv + at_v);
        read(dq, dqkv + at_q);
        const float delta = dot_over(dv, x, lanes);
        float ds_own = 0;
#pragma unroll 2
        for (int n = 0; n < S; n++) {
            const X* k_j = qkv + layer_stride * (sources[n] - l) + at_k;
            read(x, k_j);
            read(y, k_j + C);
            const float ds_j = a_l[n * NH] * (dot_over(dv, y, lanes) - delta);
            if (g.inside && g.lane == 0) ds[(g.r * S + n) * NH + g.h] = ds_j;
            ds_own -= ds_j;
#pragma unroll
            for (int i = 0; i < VECTOR; i++) dq[i] += scale * ds_j * x[i];
        }
        read(x, qkv + at_q);
        read(y, qkv + at_k);
#pragma unroll
        for (int i = 0; i < VECTOR; i++) dq[i] += scale * ds_own * y[i], dk[i] += scale * ds_own * x[i];
        write(dqkv + at_q, dq);
        write(qkv + at_v, dv);
        a_own = a_l[S * NH];
    }
#pragma unroll
    for (int i = 0; i < VECTOR; i++) dv[i] *= a_own;
    write(dqkv + at_k, dk);
    write(dqkv + at_v, dv);
}

template <class X>
static void depth_backward(const Workspace&, X* dqkv, const float* dkv, float* ds, const float* a, X* qkv,
                           ptrdiff_t layer_stride, const Config& c, int l, size_t rows) {
    const int HS = c.head_size(), lanes = lanes_of_head(HS);
    const DepthSources sources = depth_sources(c, l);
    depth_backward_kernel<X><<<head_groups_grid(rows, c.NH, lanes), HEADS_BLOCK, 0, gpu.stream>>>(
        dqkv, dkv, ds, a, qkv, layer_stride, sources, sources.count(), last_depth_reader(c, l) - l, c.depth_window,
        rows, c.NH, HS, lanes, attention_scale(HS));
    CHECK(cudaGetLastError());
}

// --------------------------------------------------------------------------------------------------------------------
// KV cache

// One thread per vector of a key, and of the value beside it
template <class X>
__global__ void cache_append_kernel(Heads<X> k, Heads<X> v, Heads<const X> new_k, Heads<const X> new_v, int first_head,
                                    int heads, int HS, int queries, int before, size_t vectors) {
    const size_t at = (size_t)blockIdx.x * blockDim.x + threadIdx.x;
    if (at >= vectors) return;
    const size_t of_head = HS / VECTOR, row = at / of_head / heads, b = row / queries, i = row % queries;
    const size_t h = first_head + at / of_head % heads, d = at % of_head * VECTOR;
    *(Vector<X>*)(k.at(b, h, before + i) + d) = *(const Vector<X>*)(new_k.at(b, h, i) + d);
    *(Vector<X>*)(v.at(b, h, before + i) + d) = *(const Vector<X>*)(new_v.at(b, h, i) + d);
}

template <class X>
static void cache_append(Heads<X> k, Heads<X> v, Heads<const X> new_k, Heads<const X> new_v, int first_head,
                         const AttentionShape& s) {
    constexpr int BLOCK = 128;
    const int heads = s.NH - first_head;
    const size_t vectors = (size_t)s.B * s.queries * heads * s.HS / VECTOR;
    if (vectors == 0) return;
    cache_append_kernel<X><<<(unsigned)ceil_div(vectors, BLOCK), BLOCK, 0, gpu.stream>>>(
        k, v, new_k, new_v, first_head, heads, s.HS, s.queries, s.before, vectors);
    CHECK(cudaGetLastError());
}

// --------------------------------------------------------------------------------------------------------------------
// Classifier
//
// Columns from V to Vp are computed and then ignored: they get no probability, and their gradient is 0.

// A block has a token and goes through its logits twice. With KEEPS, they fit into shared memory and are copied there
// first; without, the second pass reads them from the L2 cache. Unless gradient_scale is 0, it replaces them by
// gradient_scale · dlogits.
constexpr int CLASSIFIER_BLOCK = 1024;  // large, so that few rows are in use at a time and stay in the L2 cache

template <class X, bool KEEPS>
__global__ void __launch_bounds__(CLASSIFIER_BLOCK, 2)
    softmax_cross_entropy_kernel(float* losses, X* all_logits, const int* targets, int V, int Vp,
                                 float gradient_scale) {
    __shared__ float maxima[WARP], sums[WARP];
    X* logits = all_logits + (size_t)blockIdx.x * Vp;
    const int lane = threadIdx.x % WARP, warp = threadIdx.x / WARP, warps = blockDim.x / WARP;
    const int y = targets[blockIdx.x], step = blockDim.x * VECTOR;
    const float logit_y = (float)logits[y];
    extern __shared__ uint4 shared_memory[];
    const X* row = KEEPS ? (const X*)shared_memory : logits;
    if (KEEPS) {  // a thread copies what it will read itself
        for (int v = threadIdx.x * VECTOR; v < Vp; v += step)
#pragma unroll
            for (int i = 0; i < VECTOR; i += sizeof(uint4) / sizeof(X))
                cp_async_16((X*)shared_memory + v + i, logits + v + i, true);
        cp_async_wait();
    }
    float max = -INFINITY, sum = 0, x[VECTOR];
    auto read = [&](int v) {
        load(x, row + v);
        if (v + VECTOR <= V) return;
#pragma unroll
        for (int i = 0; i < VECTOR; i++)
            if (v + i >= V) x[i] = -INFINITY;
    };
    for (int v = threadIdx.x * VECTOR; v < V; v += step) {
        read(v);
        float new_max = max;
#pragma unroll
        for (int i = 0; i < VECTOR; i++) new_max = fmaxf(new_max, x[i]);
        const float top = LOG2_E * new_max;  // e^(x - max) = 2^(x log₂e - top): two instructions, relative error 1e-6
        sum *= exp2_approx(LOG2_E * max - top);
#pragma unroll
        for (int i = 0; i < VECTOR; i++) sum += exp2_approx(LOG2_E * x[i] - top);
        max = new_max;
    }
    // Threads without logits have max = -inf and sum = 0. In a warp of only such threads, max - new_max would be NaN.
    auto scaled = [](float sum, float max, float new_max) { return max == -INFINITY ? 0 : sum * expf(max - new_max); };
    const float warp_max = maximum_over(max), warp_sum = sum_over(scaled(sum, max, warp_max));
    if (lane == 0) maxima[warp] = warp_max, sums[warp] = warp_sum;
    __syncthreads();
    const float max_w = lane < warps ? maxima[lane] : -INFINITY, sum_w = lane < warps ? sums[lane] : 0;
    max = maximum_over(max_w);  // each warp combines all warps' results, one per lane
    sum = sum_over(scaled(sum_w, max_w, max));
    if (threadIdx.x == 0) losses[blockIdx.x] = logf(sum) + max - logit_y;
    if (gradient_scale == 0) return;
    const float scale = gradient_scale / sum, top = LOG2_E * max;
    // From the end to the beginning: without KEEPS, what was read last is most likely still in a cache.
    for (int v = (int)threadIdx.x * VECTOR + (Vp - 1) / step * step; v >= 0; v -= step) {
        if (v >= Vp) continue;
        read(v);
#pragma unroll
        for (int i = 0; i < VECTOR; i++) x[i] = scale * exp2_approx(LOG2_E * x[i] - top);
        if (v <= y && y < v + VECTOR) {
#pragma unroll
            for (int i = 0; i < VECTOR; i++)
                if (v + i == y) x[i] -= gradient_scale;
        }
        store(logits + v, x);
    }
}

template <class X>
static void softmax_cross_entropy(float* losses, X* logits, const int* targets, size_t rows, size_t V, size_t Vp,
                                  float gradient_scale) {
    const unsigned block = (unsigned)std::min<size_t>(CLASSIFIER_BLOCK, round_up(ceil_div(Vp, VECTOR), WARP));
    const size_t shared = Vp * sizeof(X), own = 2 * WARP * sizeof(float);  // own: what the kernel declares itself
    const bool keeps = shared + own <= gpu.block_shared;
    auto kernel = keeps ? softmax_cross_entropy_kernel<X, true> : softmax_cross_entropy_kernel<X, false>;
    if (keeps) allow_shared(kernel, shared);
    kernel<<<(unsigned)rows, block, keeps ? shared : 0, gpu.stream>>>(losses, logits, targets, (int)V, (int)Vp,
                                                                     gradient_scale);
    CHECK(cudaGetLastError());
}

template <class X>
static void logits_forward(const Workspace& ws, float* logits, const X* x, const X* wte, size_t rows, size_t C,
                           size_t V, size_t Vp) {
    for (size_t r = 0; r < rows; r += ws.logits_rows) {
        size_t n = std::min(rows - r, ws.logits_rows);
        matmul<X, float>(ws, ws.logits, Vp, n, Vp, C, along_k(x + r * C, C), along_k(wte, C));
        for (size_t i = 0; i < n; i++)
            CHECK(cudaMemcpyAsync(logits + (r + i) * V, ws.logits + i * Vp, V * sizeof(float), cudaMemcpyDeviceToHost,
                                  gpu.stream));
    }
    CHECK(cudaStreamSynchronize(gpu.stream));
}

// --------------------------------------------------------------------------------------------------------------------
// Several processes (explained in section 2)

#ifdef GPT2_MPI
static ncclComm_t world;            // all processes
static cudaStream_t sums;           // on which gradients are exchanged and summed
static cudaEvent_t reached;         // what one of the streams has reached when the other one waits for it

static void check(ncclResult_t e, const char* call, int line) {
    if (e != ncclSuccess)
        die("NCCL failed: %s: %s (%s, train_gpt2.cu:%d)", ncclGetErrorString(e), ncclGetLastError(world), call, line);
}

static void reduce_gradients(Model& m, int l) {
    CHECK(cudaEventRecord(reached, gpu.stream));
    CHECK(cudaStreamWaitEvent(sums, reached, 0));
    for_slots(m.tensors, l, [&](const Tensor& t, size_t slot) {
        const size_t n = t.share();
        CHECK(ncclGroupStart());
        for (int p = 0; p < processes; p++) {
            CHECK(ncclSend(m.gradients + slot + p * n, n, ncclFloat, p, world, sums));
            CHECK(ncclRecv(m.received + p * n, n, ncclFloat, p, world, sums));
        }
        CHECK(ncclGroupEnd());
        sum_partials(m.own_gradients + slot / processes, nullptr, m.received, processes, n, false, sums);
    });
    if (l >= 0) return;
    CHECK(cudaEventRecord(reached, sums));
    CHECK(cudaStreamWaitEvent(gpu.stream, reached, 0));
}

template <class X>
static void gather_weights(ModelOf<X>& m) {
    CHECK(ncclGroupStart());
    for (const Tensor& t : m.tensors)
        for (size_t slot = t.place; slot < t.place + t.layers * t.stride(); slot += t.stride())
            CHECK(ncclAllGather(m.weights + slot + process * t.share(), m.weights + slot, t.share() * sizeof(X),
                                ncclChar, world, gpu.stream));
    CHECK(ncclGroupEnd());
}
#endif

// --------------------------------------------------------------------------------------------------------------------
// Losses, norm, AdamW

constexpr int SUM_BLOCK = 256;
constexpr size_t UPDATE_CHUNK = 1 << 14;  // elements that a block of sum_of_squares goes through

// Sum over a block of SUM_BLOCK threads, once in a kernel. Thread 0 gets the result.
__device__ inline double block_sum(double x) {
    __shared__ double terms[SUM_BLOCK];
    terms[threadIdx.x] = x;
    for (int half = SUM_BLOCK / 2; half > 0; half /= 2) {
        __syncthreads();
        if ((int)threadIdx.x < half) terms[threadIdx.x] += terms[threadIdx.x + half];
    }
    return threadIdx.x == 0 ? terms[0] : 0;
}

// loss_sum = or += Σ losses (n). One block
__global__ void sum_losses_kernel(StepResults* results, const float* losses, size_t n, bool add) {
    double sum = 0;
    for (size_t i = threadIdx.x; i < n; i += SUM_BLOCK) sum += losses[i];
    sum = block_sum(sum);
    if (threadIdx.x == 0) results->loss_sum = add ? results->loss_sum + sum : sum;
}

static void sum_losses(Results& results, const float* losses, size_t n, bool add) {
    sum_losses_kernel<<<1, SUM_BLOCK, 0, gpu.stream>>>(results.device, losses, n, add);
    CHECK(cudaGetLastError());
    results.fresh = false;
}

// partial (chunks) = Σ g² over each chunk. One block per chunk; n is a multiple of 8
__global__ void sum_of_squares_kernel(double* partial, const float* g, size_t n) {
    const size_t begin = blockIdx.x * UPDATE_CHUNK, end = min(n, begin + UPDATE_CHUNK);
    double sum = 0;
    for (size_t i = begin + threadIdx.x * VECTOR; i < end; i += SUM_BLOCK * VECTOR) {
        float g_i[VECTOR];
        load(g_i, g + i);
#pragma unroll
        for (int j = 0; j < VECTOR; j++) sum += (double)g_i[j] * g_i[j];
    }
    sum = block_sum(sum);
    if (threadIdx.x == 0) partial[blockIdx.x] = sum;
}

// The sum over chunks, and what follows from it. One block
__global__ void norm_kernel(StepResults* results, const double* partial, int chunks, float clip) {
    double sum = 0;
    for (int chunk = threadIdx.x; chunk < chunks; chunk += SUM_BLOCK) sum += partial[chunk];
    sum = block_sum(sum);
    if (threadIdx.x > 0) return;
    const double norm = sqrt(sum);
    results->norm = norm;
    results->gradient_scale = clip_scale(norm, clip);
}

static void global_norm(const Workspace& ws, Results& results, const float* g, size_t n, float clip) {
    const size_t chunks = ceil_div(n, UPDATE_CHUNK), own = process * chunks;
    sum_of_squares_kernel<<<(unsigned)chunks, SUM_BLOCK, 0, gpu.stream>>>(ws.squares + own, g, n);
    CHECK(cudaGetLastError());
#ifdef GPT2_MPI
    if (processes > 1) CHECK(ncclAllGather(ws.squares + own, ws.squares, chunks, ncclDouble, world, gpu.stream));
#endif
    norm_kernel<<<1, SUM_BLOCK, 0, gpu.stream>>>(results.device, ws.squares, (int)(processes * chunks), clip);
    CHECK(cudaGetLastError());
    results.fresh = false;
}

// One thread per vector; n is a multiple of 8
template <class X>
__global__ void adamw_update_kernel(X* working, float* w, float* m, float* v, const float* gradient, size_t n, AdamW a,
                                    float decay, const StepResults* results, float m_correction, float v_correction) {
    const size_t at = ((size_t)blockIdx.x * blockDim.x + threadIdx.x) * VECTOR;
    const float gradient_scale = results->gradient_scale;
    if (at >= n || gradient_scale == 0) return;
    float g[VECTOR], w_i[VECTOR], m_i[VECTOR], v_i[VECTOR];
    load(g, gradient + at);
    load(w_i, w + at);
    load(m_i, m + at);
    load(v_i, v + at);
#pragma unroll
    for (int i = 0; i < VECTOR; i++) {
        g[i] *= gradient_scale;
        m_i[i] = a.beta1 * m_i[i] + (1.0f - a.beta1) * g[i];
        v_i[i] = a.beta2 * v_i[i] + (1.0f - a.beta2) * g[i] * g[i];
        w_i[i] -= a.lr * (m_i[i] * m_correction / (sqrtf(v_i[i] * v_correction) + a.eps) + decay * w_i[i]);
    }
    store(w + at, w_i);
    store(m + at, m_i);
    store(v + at, v_i);
    if constexpr (!std::is_same_v<X, float>) store(working + at, w_i);  // float: working is w
}

template <class X>
static void adamw_update(X* working, float* w, float* m, float* v, const float* g, size_t n, const AdamW& a,
                         float decay, const Results& results, float m_correction, float v_correction) {
    constexpr int BLOCK = 256;
    adamw_update_kernel<X><<<(unsigned)ceil_div(n, BLOCK * VECTOR), BLOCK, 0, gpu.stream>>>(
        working, w, m, v, g, n, a, decay, results.device, m_correction, v_correction);
    CHECK(cudaGetLastError());
}

template <class X>
static void round_weights(X* working, const float* w, size_t n) {
    if constexpr (!std::is_same_v<X, float>) convert(working, w, n);  // float: working is w
}

static StepResults read_results(Results& results) {
    if (!results.fresh) copy_to_host(results.host, results.device, sizeof(StepResults));
    results.fresh = true;
    return *results.host;
}

// --------------------------------------------------------------------------------------------------------------------
// The machine

// Copies a batch into the buffer that the step under way does not use. For embedding_backward, it sorts positions by
// their token, by counting.
static void set_inputs(Inputs& inputs, const int* x, const int* y, size_t BT, size_t V) {
    CHECK(cudaEventRecord(inputs.buffers[inputs.turn].done, gpu.stream));
    Inputs::Buffer& buffer = inputs.buffers[inputs.turn ^= 1];
    CHECK(cudaEventSynchronize(buffer.copied));  // the batch before last, from the same pinned memory
    std::vector<int>& counts = inputs.counts;
    int *host_place = buffer.host + 2 * BT, *host_first = buffer.host + 3 * BT, before = 0;
    std::copy_n(x, BT, buffer.host);
    std::copy_n(y, BT, buffer.host + BT);
    std::fill(counts.begin(), counts.end(), 0);
    for (size_t bt = 0; bt < BT; bt++) counts[x[bt]]++;
    inputs.used = 0;
    for (size_t v = 0; v < V; v++) {  // counts[v] becomes the place of the first token v
        if (counts[v] == 0) continue;
        host_first[inputs.used++] = before;
        before += std::exchange(counts[v], before);
    }
    host_first[inputs.used] = before;
    for (size_t bt = 0; bt < BT; bt++) host_place[counts[x[bt]]++] = (int)bt;
    CHECK(cudaStreamWaitEvent(gpu.copies, buffer.done, 0));  // the step before last reads this buffer
    CHECK(cudaMemcpyAsync(buffer.device, buffer.host, (3 * BT + inputs.used + 1) * sizeof(int), cudaMemcpyHostToDevice,
                          gpu.copies));
    CHECK(cudaEventRecord(buffer.copied, gpu.copies));
    CHECK(cudaStreamWaitEvent(gpu.stream, buffer.copied, 0));
    inputs.x = buffer.device;
    inputs.y = inputs.x + BT;
    inputs.place = inputs.y + BT;
    inputs.first = inputs.place + BT;
}

template <class X>
static void backend_create(Allocator& all, Workspace& ws, Inputs& inputs, Results& results, const Config& c,
                           const Workload& work) {
    const size_t C = c.C, BT = work.tokens(), BT_trained = work.train ? BT : 0;
    const size_t own_gradients = work.train ? allocated_parameters(tensor_table(c)) / processes : 0;
    all.take(ws.cublas, CUBLAS_WORKSPACE, &Memory::scratch);
    // dw and db of a LayerNorm; db of a linear layer with at most 4C outputs
    const size_t sums = std::max(ceil_div(BT_trained, LAYERNORM_CHUNK) * 2, ceil_div(BT_trained, BIAS_CHUNK) * 4);
    all.take(ws.partial, sums * C, &Memory::scratch);
    all.take(ws.delta, BT_trained * c.NH, &Memory::scratch);
    all.take(ws.squares, processes * ceil_div(own_gradients, UPDATE_CHUNK), &Memory::scratch);
    all.take(ws.dx_sum, has_chunks(c) ? BT_trained * C : 0, &Memory::scratch);
    ws.logits_rows = std::max(1, work.sequences);
    all.take(ws.logits, ws.logits_rows * c.Vp, &Memory::scratch);
    all.take(results.device, 1, &Memory::scratch, true);
    const size_t input_size = BT ? 4 * BT + 1 : 0;
    for (Inputs::Buffer& buffer : inputs.buffers) all.take(buffer.device, input_size, &Memory::activations);
    if (all.dry) return;
    CHECK(cudaMallocHost((void**)&results.host, sizeof(StepResults)));
    CHECK(cudaStreamSynchronize(gpu.stream));  // batches, on another stream, must not come before memory is initialized
    if (BT == 0) return;
    inputs.counts.resize(c.V);
    for (Inputs::Buffer& buffer : inputs.buffers) {
        CHECK(cudaMallocHost((void**)&buffer.host, input_size * sizeof(int)));
        CHECK(cudaEventCreateWithFlags(&buffer.copied, cudaEventDisableTiming));
        CHECK(cudaEventCreateWithFlags(&buffer.done, cudaEventDisableTiming));
    }
}

// Waits for all work first, since the model's memory is freed next. A model that was only counted has nothing to free.
static void backend_free(Inputs& inputs, Results& results) {
    if (!results.host) return;
    CHECK(cudaStreamSynchronize(gpu.copies));
    CHECK(cudaStreamSynchronize(gpu.stream));
    CHECK(cudaFreeHost(results.host));
    for (Inputs::Buffer& buffer : inputs.buffers) {
        if (!buffer.host) continue;
        CHECK(cudaFreeHost(buffer.host));
        CHECK(cudaEventDestroy(buffer.copied));
        CHECK(cudaEventDestroy(buffer.done));
    }
}

static void* device_allocate(size_t bytes, bool zero) {
    void* p = nullptr;
    cudaError_t error = cudaMalloc(&p, bytes);
    if (error == cudaErrorMemoryAllocation)
        die("cannot allocate %zu MiB on the GPU: use a smaller model, --batch or --sequence", bytes >> 20);
    check(error, "cudaMalloc", __LINE__);
    if (zero || poison_memory) CHECK(cudaMemsetAsync(p, zero ? 0 : 0xff, bytes, gpu.stream));
    return p;
}
static void device_free(void* p) { CHECK(cudaFree(p)); }

static void host_parallel_for(size_t n, auto f) {  // nvcc's host code is built without OpenMP
    std::atomic<size_t> next = 0;
    auto work = [&] {
        for (size_t i; (i = next++) < n;) f(i);
    };
    std::vector<std::jthread> others(std::min<size_t>(n, std::max(1u, std::thread::hardware_concurrency())) - (n > 0));
    for (std::jthread& other : others) other = std::jthread(work);
    work();
}

// Copies run after all work queued before, and are complete on return.
static void copy_to_device(void* to, const void* from, size_t bytes) {
    CHECK(cudaMemcpyAsync(to, from, bytes, cudaMemcpyHostToDevice, gpu.stream));
    CHECK(cudaStreamSynchronize(gpu.stream));
}
static void copy_to_host(void* to, const void* from, size_t bytes) {
    CHECK(cudaMemcpyAsync(to, from, bytes, cudaMemcpyDeviceToHost, gpu.stream));
    CHECK(cudaStreamSynchronize(gpu.stream));
}

static void device_check(const Config& c, const Workload& work) {
    constexpr int CHANNELS_MOST = VECTOR * LAYERNORM_BLOCK, GRID_MOST = 65535;
    const int HS = c.head_size();
    if (HS % VECTOR != 0) die("heads of %d channels: on a GPU the head size must be a multiple of %d", HS, VECTOR);
    if (HS > HEAD_SIZE_MOST) die("heads of %d channels: on a GPU the head size can be at most %d", HS, HEAD_SIZE_MOST);
    if (c.C > CHANNELS_MOST) die("%d channels: on a GPU there can be at most %d", c.C, CHANNELS_MOST);
    // The kernels count heads of tokens in 32 bits, and have a sequence per block in z.
    const size_t tokens = std::max(work.tokens(), (size_t)work.sequences * c.maxT);
    if (tokens * c.NH > UINT_MAX) die("batch x sequence x heads: on a GPU at most %u", UINT_MAX);
    if (std::max(work.B, work.sequences) > GRID_MOST) die("%d sequences at a time: on a GPU at most %d",
                                                          std::max(work.B, work.sequences), GRID_MOST);
}

static void device_start(char**) {}
static void device_init(bool computes) {
    if (!computes) return;
    int count = 0;
    cudaError_t error = cudaGetDeviceCount(&count);
    if (error != cudaSuccess || count == 0)
        die("no GPU can be used here (%s): ./train_gpt2 and ./test_gpt2 run on the CPU",
            error == cudaSuccess ? "there is none" : cudaGetErrorString(error));
    if (count > 1 && count < local_processes) die("%1$d GPUs: start at most %1$d processes here", count);
    CHECK(cudaSetDevice(local_process % count));  // with a count of 1, a scheduler may show each process another one
    cudaDeviceProp properties;
    CHECK(cudaGetDeviceProperties(&properties, local_process % count));
    if (properties.major < 8)
        die("this program needs a GPU of compute capability 8.0 or later; the %s has %d.%d", properties.name,
            properties.major, properties.minor);
    gpu.name = properties.name;
    gpu.major = properties.major;
    constexpr size_t RESERVED = 1 << 10;  // of a block's shared memory, by CUDA
    gpu.block_shared =
        std::min(properties.sharedMemPerBlockOptin, properties.sharedMemPerMultiprocessor / 2 - RESERVED);
    CHECK(cudaStreamCreateWithFlags(&gpu.stream, cudaStreamNonBlocking));
    CHECK(cudaStreamCreateWithFlags(&gpu.copies, cudaStreamNonBlocking));
#ifdef GPT2_MPI
    if (processes == 1) return;
    ncclUniqueId id;
    if (process == 0) CHECK(ncclGetUniqueId(&id));
    MPI_Bcast(&id, sizeof id, MPI_BYTE, 0, MPI_COMM_WORLD);
    CHECK(ncclCommInitRank(&world, processes, id, process));
    CHECK(cudaStreamCreateWithFlags(&sums, cudaStreamNonBlocking));
    CHECK(cudaEventCreateWithFlags(&reached, cudaEventDisableTiming));
#endif
}

static std::string device_name() { return gpu.name; }
static Precision device_precision() { return BF16; }
static std::string device_build() { return "CUDA " + std::to_string(CUDART_VERSION / 1000); }
static const char* device_help() { return "CUDA_VISIBLE_DEVICES chooses the GPU; the default is the first one."; }

// Less a reserve: the code of kernels, above all cuBLASLt's, is loaded when it is first used, and cudaMalloc rounds up.
static size_t device_free_memory() {
#ifdef GPT2_EMULATED
    const size_t reserve = 0;
#else
    const size_t reserve = (processes > 1 ? 1536 : 512) << 20;  // MiB
#endif
    size_t free_bytes, total;
    CHECK(cudaMemGetInfo(&free_bytes, &total));
    return free_bytes - std::min(free_bytes, reserve);
}

static bool device_is_host() { return false; }
