/*
test_emulator.cu: does the emulator run right kernels right, and catch wrong ones?

    ./test_emulator CASE [broken]     prints "right" or "wrong: ..."; test.py builds it and says what each must do

Each case is a small right program. With `broken`, it has the mistake that its name tells.
*/

#include <cuda_runtime.h>
#include <cuda_bf16.h>
#include <algorithm>
#include <cstdio>
#include <cstring>
#include <vector>

using bf16 = __nv_bfloat16;

static bool broken = false, wrong = false;

#define EXPECT(condition) expect(condition, #condition, __LINE__)
static void expect(bool condition, const char* text, int line) {
    if (!condition && !wrong) printf("wrong: line %d: %s\n", line, text);
    wrong |= !condition;
}

// An array on the device, freed at the end.
template <class T>
struct Array {
    T* p;
    size_t n;

    Array(size_t n) : n(n) { cudaMalloc(&p, n * sizeof(T)); }
    Array(const std::vector<T>& v) : Array(v.size()) { cudaMemcpy(p, v.data(), n * sizeof(T), cudaMemcpyHostToDevice); }
    ~Array() { cudaFree(p); }
    operator T*() { return p; }
    std::vector<T> get() {
        std::vector<T> v(n);
        cudaMemcpy(v.data(), p, n * sizeof(T), cudaMemcpyDeviceToHost);
        return v;
    }
};

template <class T = float>
static std::vector<T> count(int n) {
    std::vector<T> v(n);
    for (int i = 0; i < n; i++) v[i] = (T)i;
    return v;
}

static float uniform() {  // -0.5 .. 0.5, the same in every run
    static uint32_t state = 1;
    state = state * 1664525 + 1013904223;
    return (float)(state >> 8) / (1 << 24) - 0.5f;
}

// --------------------------------------------------------------------------------------------------------------------
// Barriers and races

template <int N>
__global__ void reverse(float* out, const float* in, bool broken) {
    __shared__ float tile[N];
    int i = blockIdx.x * N + threadIdx.x;
    tile[threadIdx.x] = in[i];
    if (!broken) __syncthreads();
    out[i] = tile[N - 1 - threadIdx.x];
}
static void missing_syncthreads() {
    Array<float> in(count(64 * 5)), out(64 * 5);
    reverse<64><<<5, 64>>>(out, in, broken);
    std::vector<float> v = out.get();
    for (int i = 0; i < 64 * 5; i++) EXPECT(v[i] == (float)(i / 64 * 64 + 63 - i % 64));
}

__global__ void rotate(float* out, bool broken) {
    extern __shared__ float lanes[];
    float* mine = lanes + threadIdx.x / 32 * 32;
    int lane = threadIdx.x % 32;
    for (int i = 0; i < 3; i++) {
        mine[lane] = (float)(lane + i);
        if (!broken) __syncwarp();
        out[i * blockDim.x + threadIdx.x] = mine[(lane + 1) % 32];
        __syncwarp();
    }
}
static void missing_syncwarp() {
    Array<float> out(3 * 96);
    rotate<<<1, 96, 96 * sizeof(float)>>>(out, broken);
    std::vector<float> v = out.get();
    for (int i = 0; i < 3 * 96; i++) EXPECT(v[i] == (float)((i % 32 + 1) % 32 + i / 96));
}

// A sum over all threads of all blocks: += where an atomic would be right.
__global__ void add_up(int* total, bool in_block, bool in_grid) {
    __shared__ int sum;
    bool first = threadIdx.x + threadIdx.y + threadIdx.z == 0;
    if (first) sum = 0;
    __syncthreads();
    if (in_block) sum += 1;
    else atomicAdd(&sum, 1);
    __syncthreads();
    if (!first) return;
    if (in_grid) *total += sum;
    else atomicAdd(total, sum);
}
static void sum_by(bool in_block, bool in_grid) {
    Array<int> total(1);
    cudaMemset(total, 0, 4);
    add_up<<<dim3(2, 2), dim3(4, 4, 4)>>>(total, in_block, in_grid);
    EXPECT(total.get()[0] == 256);
}
static void race_in_block() { sum_by(broken, false); }
static void race_of_blocks() { sum_by(false, broken); }

// Blocks read what others write.
__global__ void smooth(float* out, const float* in) {
    int i = blockIdx.x * blockDim.x + threadIdx.x, n = gridDim.x * blockDim.x;
    float x = in[(i + n - 1) % n];
    out[i] = x;
}
static void read_of_other_blocks() {
    Array<float> in(count(96)), out(96);
    smooth<<<3, 32>>>(broken ? in : out, in);
    std::vector<float> v = broken ? in.get() : out.get();
    for (int i = 0; i < 96; i++) EXPECT(v[i] == (float)((i + 95) % 96));
}

// bf16 neighbours that two threads write are no race.
__global__ void pairs(bf16* out, bool broken) {
    int i = blockIdx.x * blockDim.x + threadIdx.x;
    out[broken ? i / 2 : i] = (float)i;
}
static void race_of_halves() {
    Array<bf16> out(128);
    pairs<<<2, 64>>>(out, broken);
    std::vector<bf16> v = out.get();
    for (int i = 0; i < 64 + 64 * !broken; i++) EXPECT((float)v[i] == (float)(broken ? 2 * i + 1 : i));
}

// --------------------------------------------------------------------------------------------------------------------
// Memory

__global__ void shift(float* out, const float* in, int n, int by) {
    int i = blockIdx.x * blockDim.x + threadIdx.x;
    if (i < n) out[i] = in[i + by];
}
static void past_the_end() {
    Array<float> in(count(100)), out(100);
    shift<<<1, 128>>>(out, in, 100, broken);
    cudaDeviceSynchronize();
    EXPECT(!broken);
}

__global__ void past_shared(float* out, int at) {
    __shared__ float a[8], b[8];
    b[threadIdx.x] = 1;
    a[threadIdx.x + at] = 2;
    __syncthreads();
    out[threadIdx.x] = a[threadIdx.x] + b[threadIdx.x];
}
static void past_the_end_of_shared() {
    Array<float> out(8);
    past_shared<<<1, 8>>>(out, broken);
    EXPECT(out.get()[7] == 3);
    EXPECT(!broken);
}
__global__ void past_dynamic(float* out, int at) {
    extern __shared__ __align__(16) float a[];
    a[threadIdx.x + at] = 2;
    out[threadIdx.x] = a[threadIdx.x + at];
}
static void past_the_end_of_dynamic() {
    Array<float> out(8);
    past_dynamic<<<1, 8, 32>>>(out, broken);
    cudaDeviceSynchronize();
    EXPECT(!broken);
}

__global__ void past_own(float* out, int n) {
    float own[8];
    float* p = own;
    for (int i = 0; i < n; i++) p[i] = (float)i;
    __syncwarp();
    out[threadIdx.x] = p[threadIdx.x];
}
static void past_own_array() {
    Array<float> out(8);
    past_own<<<1, 8>>>(out, broken ? 9 : 8);
    EXPECT(out.get()[7] == 7);
}

static void use_after_free() {
    Array<float> out(8);
    float* in;
    cudaMalloc(&in, 32);
    cudaMemset(in, 0, 32);
    if (!broken) shift<<<1, 8>>>(out, in, 8, 0);
    cudaFree(in);
    if (broken) shift<<<1, 8>>>(out, in, 8, 0);
    EXPECT(out.get()[7] == 0);
    EXPECT(!broken);
}

static void device_memory_uninitialised() {
    Array<float> in(64), out(64);
    if (!broken) cudaMemset(in, 0, 256);
    reverse<64><<<1, 64>>>(out, in, false);
    EXPECT(out.get()[5] == 0);
}

__global__ void sum_shared(float* out, int n) {  // n values written, 64 read; other blocks have written 64
    __shared__ float tile[64];
    if (blockIdx.x > 0) n = 64;
    if ((int)threadIdx.x < n) tile[threadIdx.x] = 1;
    __syncthreads();
    float sum = 0;
    for (int i = 0; i < 64; i++) sum += tile[i];
    if (threadIdx.x == 0) out[blockIdx.x] = sum;
}
static void shared_uninitialised() {
    Array<float> out(5);
    sum_shared<<<5, 64>>>(out, broken ? 63 : 64);
    for (float sum : out.get()) EXPECT(sum == 64);
}

__global__ void load4(float* out, const float* in, int at) {
    float4 v = *reinterpret_cast<const float4*>(in + 4 * threadIdx.x + at);
    *reinterpret_cast<float4*>(out + 4 * threadIdx.x) = make_float4(v.w, v.z, v.y, v.x);
}
static void misaligned_float4() {
    Array<float> in(count(33)), out(32);
    load4<<<1, 8>>>(out, in, broken);
    EXPECT(out.get()[0] == 3 + broken);
    EXPECT(!broken);
}

static void host_memory_in_kernel() {
    std::vector<float> host = count(8);
    Array<float> in(host), out(8);
    shift<<<1, 8>>>(out, broken ? host.data() : in, 8, 0);
    EXPECT(out.get()[7] == 7);
    EXPECT(!broken);
}
static void device_memory_by_host() {
    Array<float> in(count(8));
    float x = broken ? in[3] : in.get()[3];
    EXPECT(x == 3);
    EXPECT(!broken);
}

static void copy_direction() {
    std::vector<float> host(8);
    Array<float> in(count(8));
    EXPECT(cudaMemcpy(host.data(), in, 32, broken ? cudaMemcpyHostToDevice : cudaMemcpyDeviceToHost) == cudaSuccess);
}
static void copy_past_the_end() {
    std::vector<float> host(9);
    Array<float> in(count(8));
    EXPECT(cudaMemcpy(host.data(), in, 32 + broken, cudaMemcpyDeviceToHost) == cudaSuccess);
}
static void copy_past_pinned() {
    float* pinned;
    Array<float> in(count(9));
    cudaMallocHost(&pinned, 32);
    EXPECT(cudaMemcpyAsync(pinned, in, 32 + 4 * broken, cudaMemcpyDeviceToHost) == cudaSuccess);
    cudaFreeHost(pinned);
}

// --------------------------------------------------------------------------------------------------------------------
// Collectives

__global__ void collectives(int* out) {
    int lane = threadIdx.x % 32, i = 0;
    unsigned all = 0xffffffff;
    auto put = [&](int x) { out[i++ * blockDim.x + threadIdx.x] = x; };
    put(__shfl_sync(all, lane, 3) == 3);
    put(__shfl_sync(all, lane, lane + 1, 8) == lane / 8 * 8 + (lane + 1) % 8);
    put(__shfl_xor_sync(all, (double)lane, 16) == (lane ^ 16));
    put(__shfl_up_sync(all, lane, 2) == (lane < 2 ? lane : lane - 2));
    put(__shfl_down_sync(all, lane, 2, 16) == (lane % 16 < 14 ? lane + 2 : lane));
    put((float)__shfl_xor_sync(all, __float2bfloat16((float)lane), 1) == (lane ^ 1));
    put(__ballot_sync(all, lane % 2) == 0xaaaaaaaa);
    put(__any_sync(all, lane == 7) && !__any_sync(all, lane == 32));
    put(__all_sync(all, lane < 32) && !__all_sync(all, lane < 31));
    put(__reduce_add_sync(all, lane) == 496);
    put(__reduce_max_sync(all, -lane) == 0 && __reduce_min_sync(all, (unsigned)lane + 5) == 5);
    put(__reduce_xor_sync(all, (unsigned)lane) == 0 && __reduce_or_sync(all, (unsigned)lane) == 31);
    if (lane < 8) put(__shfl_sync(0xff, lane, 7) == 7);  // a part of the warp
    else put(__reduce_add_sync(0xffffff00, 1) == 24);
    put(__syncthreads_count(threadIdx.x < 40) == 40);
    put(__syncthreads_or(threadIdx.x == 63) && !__syncthreads_and(threadIdx.x != 63));
}
static void all_collectives() {
    constexpr int N = 15;
    Array<int> out(N * 64);
    collectives<<<1, 64>>>(out);
    std::vector<int> v = out.get();
    for (int i = 0; i < N * 64; i++) {
        if (!v[i]) printf("collective %d, thread %d\n", i / 64, i % 64);
        EXPECT(v[i] == 1);
    }
}

__global__ void wrong_mask(float* out, unsigned mask) { out[threadIdx.x] = __shfl_xor_sync(mask, 1.0f, 1); }
static void mask_without_caller() {
    Array<float> out(32);
    wrong_mask<<<1, 32>>>(out, broken ? 0xffff : ~0u);
    EXPECT(out.get()[31] == 1);
}
__global__ void returned(float* out, int n) {
    if ((int)threadIdx.x >= n) return;
    out[threadIdx.x] = __shfl_xor_sync(~0u, 1.0f, 1);
}
static void shuffle_with_returned() {
    Array<float> out(64);
    returned<<<1, 64>>>(out, broken ? 40 : 64);
    EXPECT(out.get()[0] == 1);
}
__global__ void two_masks(float* out, bool broken) {
    unsigned mask = !broken ? ~0u : threadIdx.x < 16 ? 0xffff : ~0u;
    out[threadIdx.x] = __shfl_xor_sync(mask, 1.0f, 1);
}
static void masks_that_differ() {
    Array<float> out(32);
    two_masks<<<1, 32>>>(out, broken);
    EXPECT(out.get()[0] == 1);
}
__global__ void diverge(float* out, bool broken) {
    if (broken && threadIdx.x < 32) __syncthreads();
    else __syncthreads();
    out[threadIdx.x] = 1;
}
static void divergent_syncthreads() {
    Array<float> out(64);
    diverge<<<1, 64>>>(out, broken);
    EXPECT(out.get()[0] == 1);
}
__global__ void leave(float* out, int n) {
    if ((int)threadIdx.x >= n) return;
    __syncthreads();
    out[threadIdx.x] = 1;
}
static void syncthreads_with_returned() {
    Array<float> out(64);
    leave<<<1, 64>>>(out, broken ? 63 : 64);
    EXPECT(out.get()[0] == 1);
}
__global__ void stop(float* out, bool broken) {
    if (broken && blockIdx.x == 2 && threadIdx.y == 3) __trap();
    out[4 * blockIdx.x + threadIdx.y] = 1;
}
static void trap() {
    Array<float> out(16);
    stop<<<1 + 3 * broken, dim3(1, 4)>>>(out, broken);
    cudaDeviceSynchronize();
}

// --------------------------------------------------------------------------------------------------------------------
// Tensor cores: C (64, 64) = A (64, K) B (64, K)^T, 16 rows a warp

enum Mistake { NO_MISTAKE, NO_WAIT, NO_BARRIER, MISALIGNED_COPY, MISALIGNED_ROW, ROW_NOT_SHARED };

template <int K>
__global__ void __launch_bounds__(128) product(float* C, const bf16* A, const bf16* B, Mistake mistake) {
    __shared__ alignas(16) bf16 a[2][64][24], b[2][64][24];
    int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    float d[8][4] = {};
    auto load = [&](int k) {
        int row = threadIdx.x / 2, column = threadIdx.x % 2 * 8;
        cp_async_16(&a[k & 1][row][column + (mistake == MISALIGNED_COPY)], A + row * K + k * 16 + column, true);
        cp_async_16(&b[k & 1][row][column], B + row * K + k * 16 + column, true);
    };
    load(0);
    for (int k = 0; k < K / 16; k++) {
        if (mistake != NO_WAIT) cp_async_wait();
        if (mistake != NO_BARRIER || k == 0) __syncthreads();
        if (k + 1 < K / 16) load(k + 1);
        uint32_t fa[4], fb[4];
        bf16 mine[8] = {};
        const bf16* row = &a[k & 1][warp * 16 + lane % 16][lane / 16 * 8];
        ldmatrix_x4(fa, mistake == ROW_NOT_SHARED ? mine : row + (mistake == MISALIGNED_ROW));
        for (int n = 0; n < 4; n++) {
            ldmatrix_x4(fb, &b[k & 1][n * 16 + lane / 16 * 8 + lane % 8][lane / 8 % 2 * 8]);
            uint32_t b0[2] = {fb[0], fb[1]}, b1[2] = {fb[2], fb[3]};
            mma_m16n8k16(d[2 * n], fa, b0);
            mma_m16n8k16(d[2 * n + 1], fa, b1);
        }
    }
    for (int n = 0; n < 8; n++)
        for (int i = 0; i < 4; i++) C[(warp * 16 + lane / 4 + i / 2 * 8) * 64 + n * 8 + lane % 4 * 2 + i % 2] = d[n][i];
}
static void multiply(Mistake mistake) {
    constexpr int K = 80;
    std::vector<bf16> a(64 * K), b(64 * K);
    for (bf16& x : a) x = uniform();
    for (bf16& x : b) x = uniform();
    Array<bf16> A(a), B(b);
    Array<float> C(64 * 64);
    product<K><<<1, 128>>>(C, A, B, broken ? mistake : NO_MISTAKE);
    std::vector<float> c = C.get();
    for (int i = 0; i < 64 * 64; i++) {
        double sum = 0;
        for (int k = 0; k < K; k++) sum += (float)a[i / 64 * K + k] * (float)b[i % 64 * K + k];
        EXPECT(fabs(sum - c[i]) < 1e-5);
    }
}
static void missing_copy_wait() { multiply(NO_WAIT); }
static void copy_over_what_is_read() { multiply(NO_BARRIER); }
static void misaligned_copy() { multiply(MISALIGNED_COPY); }
static void misaligned_ldmatrix() { multiply(MISALIGNED_ROW); }
static void ldmatrix_not_shared() { multiply(ROW_NOT_SHARED); }

__global__ void transpose(uint16_t* out, const uint16_t* in) {  // four 8×8 matrices
    __shared__ alignas(16) uint16_t rows[32][8];
    cp_async_16(rows[threadIdx.x], in + 8 * threadIdx.x, threadIdx.x != 5);  // zeros for row 5 of matrix 0
    cp_async_wait();
    __syncwarp();
    uint32_t r[4];
    ldmatrix_x4_trans(r, rows[threadIdx.x]);
    for (int i = 0; i < 4; i++)
        for (int j = 0; j < 2; j++) out[64 * i + 2 * threadIdx.x + j] = (uint16_t)(r[i] >> 16 * j);
}
static void ldmatrix_transposed() {
    Array<uint16_t> in(count<uint16_t>(256)), out(256);
    transpose<<<1, 32>>>(out, in);
    std::vector<uint16_t> v = out.get();
    for (int i = 0; i < 256; i++) {
        int row = i / 8 % 8, column = i % 8;
        EXPECT(v[i] == (i < 64 && column == 5 ? 0 : i / 64 * 64 + column * 8 + row));
    }
}

// --------------------------------------------------------------------------------------------------------------------
// Matrix products in cuBLASLt's place

static const cublasLtEpilogue_t epilogues[] = {CUBLASLT_EPILOGUE_DEFAULT, CUBLASLT_EPILOGUE_BIAS,
                                               CUBLASLT_EPILOGUE_GELU_BIAS, CUBLASLT_EPILOGUE_GELU_AUX_BIAS,
                                               CUBLASLT_EPILOGUE_DGELU};

struct Product {
    int m, n, k, lda, ldb, ldd;
    bool ta = false, tb = false;
    cudaDataType type = CUDA_R_32F, d_type = CUDA_R_32F;
    cublasLtMatmulDesc_t operation = nullptr;
    cublasLtMatrixLayout_t A = nullptr, B = nullptr, D = nullptr;
    std::vector<cublasLtMatmulAlgo_t> offered = {};

    // Asks for up to 8 algorithms.
    cublasStatus_t search(cublasLtEpilogue_t epilogue = CUBLASLT_EPILOGUE_DEFAULT, const void* bias = nullptr,
                          void* aux = nullptr, uint32_t alignment = 4) {
        const cublasOperation_t a = ta ? CUBLAS_OP_T : CUBLAS_OP_N, b = tb ? CUBLAS_OP_T : CUBLAS_OP_N;
        const int64_t ld = ldd;
        cublasLtMatmulDescCreate(&operation, CUBLAS_COMPUTE_32F, CUDA_R_32F);
        auto set = [&](cublasLtMatmulDescAttributes_t attribute, auto value) {
            cublasLtMatmulDescSetAttribute(operation, attribute, &value, sizeof value);
        };
        set(CUBLASLT_MATMUL_DESC_TRANSA, a);
        set(CUBLASLT_MATMUL_DESC_TRANSB, b);
        set(CUBLASLT_MATMUL_DESC_EPILOGUE, epilogue);
        set(CUBLASLT_MATMUL_DESC_BIAS_POINTER, bias);
        set(CUBLASLT_MATMUL_DESC_BIAS_DATA_TYPE, d_type);
        set(CUBLASLT_MATMUL_DESC_EPILOGUE_AUX_POINTER, aux);
        set(CUBLASLT_MATMUL_DESC_EPILOGUE_AUX_LD, ld);
        set(CUBLASLT_MATMUL_DESC_EPILOGUE_AUX_DATA_TYPE, d_type);
        cublasLtMatrixLayoutCreate(&A, type, ta ? k : m, ta ? m : k, lda);
        cublasLtMatrixLayoutCreate(&B, type, tb ? n : k, tb ? k : n, ldb);
        cublasLtMatrixLayoutCreate(&D, d_type, m, n, ldd);
        cublasLtMatmulPreference_t preference;
        cublasLtMatmulPreferenceCreate(&preference);
        for (int i = 0; i < 4; i++)
            cublasLtMatmulPreferenceSetAttribute(
                preference, (cublasLtMatmulPreferenceAttributes_t)(CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_A_BYTES + i),
                &alignment, sizeof alignment);
        cublasLtMatmulHeuristicResult_t results[8];
        int found = 0;
        cublasStatus_t status =
            cublasLtMatmulAlgoGetHeuristic(nullptr, operation, A, B, D, D, preference, 8, results, &found);
        cublasLtMatmulPreferenceDestroy(preference);
        for (int i = 0; i < found; i++) offered.push_back(results[i].algo);
        return status;
    }
    cublasStatus_t run(const void* a, const void* b, void* d, size_t which = 0, float add = 0) {
        const float one = 1;
        return cublasLtMatmul(nullptr, operation, &one, a, A, b, B, &add, d, D, d, D, &offered[which], nullptr, 0,
                              nullptr);
    }
    ~Product() {
        cublasLtMatmulDescDestroy(operation);
        for (cublasLtMatrixLayout_t layout : {A, B, D}) cublasLtMatrixLayoutDestroy(layout);
    }
};

template <class X, class Y>  // A, B of X; D of Y
static void products(cudaDataType x, cudaDataType y) {
    for (int variant = 0; variant < 40; variant++) {
        int m = 19, n = 7, k = 33, lda = 40, ldb = 36, ldd = 24;
        bool ta = variant & 1, tb = variant & 2, accumulate = variant & 4;
        const int epilogue = variant / 8;
        std::vector<X> a(40 * 40), b(40 * 40);
        std::vector<Y> d(24 * 7), bias(19), aux(24 * 7);
        for (X& v : a) v = uniform();
        for (X& v : b) v = uniform();
        for (Y& v : d) v = uniform();
        for (Y& v : bias) v = uniform();
        for (Y& v : aux) v = 4 * uniform();
        Array<X> A(a), B(b);
        Array<Y> D(d), BIAS(bias), AUX(aux);
        Product product = {m, n, k, lda, ldb, ldd, ta, tb, x, y};
        EXPECT(product.search(epilogues[epilogue], BIAS, AUX) == CUBLAS_STATUS_SUCCESS);
        EXPECT(product.run(A, B, D, 0, accumulate) == CUBLAS_STATUS_SUCCESS);
        std::vector<Y> d2 = D.get(), aux2 = AUX.get();
        double eps = sizeof(Y) == 4 ? 4e-6 : 1.0 / 256;
        for (int j = 0; j < n; j++)
            for (int i = 0; i < m; i++) {
                double sum = accumulate ? (float)d[i + j * ldd] : 0;
                for (int l = 0; l < k; l++)
                    sum += (double)(float)a[ta ? l + i * lda : i + l * lda] * (float)b[tb ? j + l * ldb : l + j * ldb];
                auto gelu = [](double v) { return 0.5 * v * (1 + tanh(sqrt(2 / M_PI) * (v + 0.044715 * v * v * v))); };
                if (epilogue > 0 && epilogue < 4) sum += (float)bias[i];
                if (epilogue == 3) EXPECT(fabs((float)aux2[i + j * ldd] - sum) <= eps * (1 + fabs(sum)));
                if (epilogue == 2 || epilogue == 3) sum = gelu(sum);
                if (epilogue == 4) {
                    double v = (float)aux[i + j * ldd];
                    sum *= (gelu(v + 1e-5) - gelu(v - 1e-5)) / 2e-5;
                }
                EXPECT(fabs((float)d2[i + j * ldd] - sum) <= eps * (1 + fabs(sum)));
            }
        EXPECT((float)d2[m] == (float)d[m]);  // below the matrix
    }
}
static void matmul() {
    products<float, float>(CUDA_R_32F, CUDA_R_32F);
    products<bf16, bf16>(CUDA_R_16BF, CUDA_R_16BF);
    products<bf16, float>(CUDA_R_16BF, CUDA_R_32F);
    emulator::settings.algorithms = 8;
    products<bf16, float>(CUDA_R_16BF, CUDA_R_32F);

    // All algorithms sum the same terms, each in another order; which one is the first depends on the shape.
    constexpr int K = 333;
    std::vector<float> x(K), y(K), sums;
    std::vector<uint64_t> firsts;
    for (float& v : x) v = uniform();
    for (float& v : y) v = uniform();
    double sum = 0;
    for (int l = 0; l < K; l++) sum += (double)x[l] * y[l];
    Array<float> X(x), Y(y), one(1);
    Product dot = {1, 1, K, 1, K, 1};
    dot.search();
    for (size_t i = 0; i < 8; i++) {
        EXPECT(dot.run(X, Y, one, i) == CUBLAS_STATUS_SUCCESS);
        sums.push_back(one.get()[0]);
        EXPECT(fabs(sums.back() - sum) < 1e-5);
        Product shorter = {1, 1, K - 1 - (int)i, 1, K, 1};
        shorter.search();
        firsts.push_back(shorter.offered[0].data[1]);
    }
    auto distinct = [](auto values) {
        std::sort(values.begin(), values.end());
        return std::unique(values.begin(), values.end()) - values.begin();
    };
    EXPECT(distinct(sums) >= 5 && distinct(firsts) >= 3);

    Array<float> a(16), d(16);
    Product product = {4, 4, 5, 4, 5, 4};
    product.search();
    if (broken) product.run(a, a, d);
}

// What is refused leaves D as it is, and an error; what is not is computed.
static void matmul_refused() {
    using Rule = int emulator::Settings::*;
    Array<float> ones(std::vector<float>(32 * 32, 1));
    int none = 0, some = 0, at_launch = 0;
    auto whether_all = [&](Rule rule, int value, Product product, cublasLtEpilogue_t epilogue, uint32_t alignment) {
        emulator::settings.*rule = value;
        Array<float> d(count(32 * 32));
        const cublasStatus_t found = product.search(epilogue, ones, nullptr, alignment);
        EXPECT((found == CUBLAS_STATUS_NOT_SUPPORTED) == product.offered.empty());
        none += product.offered.empty(), some += product.offered.size() % 8 > 0;
        bool all = true;
        for (size_t i = 0; i < product.offered.size(); i++) {
            const cublasStatus_t status = product.run(ones, ones, d, i);
            const bool refused = status != CUBLAS_STATUS_SUCCESS;
            EXPECT(!refused || status == CUBLAS_STATUS_NOT_SUPPORTED || status == CUBLAS_STATUS_INVALID_VALUE);
            EXPECT(cudaGetLastError() == (refused ? cudaErrorInvalidValue : cudaSuccess));
            at_launch += refused, all = all && refused;
            if (all) EXPECT(d.get() == count(32 * 32));
        }
        EXPECT(all || d.get()[0] == product.k + (epilogue == CUBLASLT_EPILOGUE_BIAS));
        emulator::settings.*rule = 0;
        return all;
    };
    const cublasLtEpilogue_t plain = CUBLASLT_EPILOGUE_DEFAULT, bias = CUBLASLT_EPILOGUE_BIAS;
    const Rule percent = &emulator::Settings::refuse_percent, alignment = &emulator::Settings::refuse_alignment;
    emulator::settings.algorithms = 8;
    for (int i = 1; i < 30; i++) {
        const Product product = {i, 3, 16, 32, 32, 32};
        EXPECT(!whether_all(percent, 0, product, plain, 16) && whether_all(percent, 100, product, plain, 16));
        EXPECT(whether_all(&emulator::Settings::refuse_k, 32, product, plain, 16));
        EXPECT(!whether_all(&emulator::Settings::refuse_k, 8, product, plain, 16));
        EXPECT(whether_all(&emulator::Settings::refuse_epilogues, 2, product, bias, 16));
        EXPECT(!whether_all(&emulator::Settings::refuse_epilogues, 2, product, plain, 16));
        EXPECT(whether_all(alignment, 16, product, plain, 8) && !whether_all(alignment, 128, product, plain, 16));
        EXPECT(whether_all(alignment, 256, product, plain, 16));
        whether_all(percent, 50, product, plain, 16);
    }
    EXPECT(none && some && at_launch);
    Product product = {4, 4, 4, 4, 4, 4}, other = {4, 4, 5, 4, 5, 4};
    product.search();
    other.search();
    if (broken) product.offered = other.offered;
    EXPECT(product.run(ones, ones, ones) == CUBLAS_STATUS_SUCCESS);
}

static void matmul_misaligned() {
    Array<float> a(std::vector<float>(32, 1)), d(16);
    Product product = {2, 2, 2, 4, 4, 4};
    product.search(CUBLASLT_EPILOGUE_DEFAULT, nullptr, nullptr, 16);
    EXPECT(product.run(a + (broken ? 1 : 4), a, d) == CUBLAS_STATUS_SUCCESS && d.get()[0] == 2);
}

// --------------------------------------------------------------------------------------------------------------------
// bf16, atomics, mathematics

static void numbers() {
    for (uint32_t i = 0; i < 1 << 16; i++) {  // each bf16, and what lies half-way to the next
        uint32_t bits = i << 16;
        if ((i & 0x7f80) == 0x7f80) continue;  // infinite or NaN
        float x = __uint_as_float(bits), half = __uint_as_float(bits | 0x8000), more = __uint_as_float(bits | 0x8001);
        EXPECT(__bfloat16_as_ushort(bf16(x)) == i);
        EXPECT(__bfloat16_as_ushort(bf16(half)) == i + (i & 1));
        EXPECT(__bfloat16_as_ushort(bf16(more)) == i + 1);
    }
    EXPECT(std::isnan((float)bf16(NAN)) && std::isinf((float)bf16(INFINITY)));
    EXPECT((float)(bf16(1.0f) + bf16(1.0f / 512)) == 1);  // rounded to bf16
    float2 v = __bfloat1622float2(__floats2bfloat162_rn(3, -2));
    EXPECT(v.x == 3 && v.y == -2);
    EXPECT(__clz(1) == 31 && __popc(7) == 3 && __brev(1) == 1u << 31 && __ffs(8) == 4);
    EXPECT(rsqrtf(4) == 0.5f && __fdividef(1, 4) == 0.25f && max(1, 2) == 2 && min(1.0f, 2.0f) == 1);
    EXPECT(sizeof(float3) == 12 && alignof(float4) == 16 && alignof(uint2) == 8);
}

__global__ void counters(unsigned* c) {
    atomicAdd(&c[0], 2);
    atomicMax(&c[1], threadIdx.x);
    atomicMin(&c[2], threadIdx.x + 3);
    atomicOr(&c[3], 1u << threadIdx.x % 32);
    atomicCAS(&c[4], threadIdx.x, threadIdx.x + 100);
    atomicSub(&c[5], 1);
}
static void atomics() {
    Array<unsigned> c(std::vector<unsigned>{0, 0, 1000, 0, 17, 64});
    counters<<<2, 64>>>(c);
    std::vector<unsigned> v = c.get();
    EXPECT(v[0] == 256 && v[1] == 63 && v[2] == 3 && v[3] == ~0u && v[5] == (unsigned)-64);
    EXPECT(v[4] == 117);
}

// --------------------------------------------------------------------------------------------------------------------
// Streams

__global__ void scale(float* x, int n, float by) {
    int i = blockIdx.x * blockDim.x + threadIdx.x;
    if (i < n) x[i] *= by;
}
__global__ void add_one(float* x, int n) {
    int i = blockIdx.x * blockDim.x + threadIdx.x;
    if (i < n) x[i] += 1;
}
static void missing_event_wait() {
    Array<float> x(count(50));
    cudaStream_t one, two;
    cudaEvent_t done;
    cudaStreamCreateWithFlags(&one, cudaStreamNonBlocking), cudaStreamCreateWithFlags(&two, cudaStreamNonBlocking);
    cudaEventCreateWithFlags(&done, cudaEventDisableTiming);
    scale<<<1, 64, 0, one>>>(x, 50, 2);
    cudaEventRecord(done, one);
    if (!broken) cudaStreamWaitEvent(two, done);
    add_one<<<1, 64, 0, two>>>(x, 50);
    cudaStreamSynchronize(two);
    std::vector<float> v(50);
    cudaMemcpyAsync(v.data(), x, 200, cudaMemcpyDeviceToHost, two);
    cudaStreamSynchronize(two);
    for (int i = 0; i < 50; i++) EXPECT(v[i] == (float)(2 * i + 1));
    cudaStreamDestroy(one), cudaStreamDestroy(two), cudaEventDestroy(done);
}
// The default stream waits for other streams, unless these are non-blocking.
static void default_stream_does_not_wait() {
    Array<float> x(count(50));
    cudaStream_t one;
    cudaStreamCreateWithFlags(&one, broken ? cudaStreamNonBlocking : cudaStreamDefault);
    scale<<<1, 64, 0, one>>>(x, 50, 2);
    add_one<<<1, 64>>>(x, 50);
    scale<<<1, 64, 0, one>>>(x, 50, 3);
    cudaStreamSynchronize(one);
    std::vector<float> v = x.get();
    for (int i = 0; i < 50; i++) EXPECT(v[i] == (float)(3 * (2 * i + 1)));
    cudaStreamDestroy(one);
}
static void pinned_overwritten() {
    float* pinned;
    Array<float> x(50);
    cudaStream_t stream;
    cudaStreamCreate(&stream);
    cudaMallocHost(&pinned, 200);
    for (int i = 0; i < 50; i++) pinned[i] = 1;
    cudaMemcpyAsync(x, pinned, 200, cudaMemcpyHostToDevice, stream);
    if (!broken) cudaStreamSynchronize(stream);
    for (int i = 0; i < 50; i++) pinned[i] = 2;
    scale<<<1, 64, 0, stream>>>(x, 50, 3);
    cudaStreamSynchronize(stream);
    std::vector<float> v = x.get();
    EXPECT(v[0] == 3);
    cudaFreeHost(pinned), cudaStreamDestroy(stream);
}
static void result_read_early() {
    float* pinned;
    Array<float> x(count(50));
    cudaMallocHost(&pinned, 200);
    memset(pinned, 0, 200);
    scale<<<1, 64>>>(x, 50, 3);
    cudaMemcpyAsync(pinned, x, 200, cudaMemcpyDeviceToHost);
    if (!broken) cudaDeviceSynchronize();
    EXPECT(pinned[1] == 3);
    cudaFreeHost(pinned);
}
static void pageable_copies() {  // may be overwritten, and read, at once
    Array<float> x(50);
    cudaStream_t stream;
    cudaStreamCreate(&stream);
    std::vector<float> v(50, 1);
    cudaMemcpyAsync(x, v.data(), 200, cudaMemcpyHostToDevice, stream);
    v.assign(50, 2);
    cudaMemcpyAsync(v.data(), x, 200, cudaMemcpyDeviceToHost, stream);
    EXPECT(v[7] == 1);
    cudaStreamDestroy(stream);
}
static void events() {
    Array<float> x(count(50));
    cudaEvent_t begin, end;
    cudaEventCreate(&begin), cudaEventCreate(&end);
    EXPECT(cudaEventQuery(begin) == cudaSuccess);  // never recorded
    cudaEventRecord(begin);
    scale<<<1, 64>>>(x, 50, 3);
    cudaEventRecord(end);
    float ms = -1;
    while (cudaEventQuery(end) == cudaErrorNotReady) {}
    EXPECT(cudaEventElapsedTime(&ms, begin, end) == cudaSuccess && ms >= 0);
    cudaEventDestroy(begin), cudaEventDestroy(end);
}

// --------------------------------------------------------------------------------------------------------------------
// Errors

static void too_many_threads() {
    Array<float> x(count(50));
    scale<<<1, broken ? 1025 : 1024>>>(x, 50, 3);
    EXPECT(cudaPeekAtLastError() == cudaGetLastError());
    scale<<<broken ? 0 : 1, 64>>>(x, 50, 3);
    EXPECT(cudaGetLastError() == (broken ? cudaErrorInvalidConfiguration : cudaSuccess));
    EXPECT(cudaGetLastError() == cudaSuccess);
    EXPECT(!broken);
}
static void too_much_shared() {
    Array<float> out(8);
    past_dynamic<<<1, 8, 49152>>>(out, 0);
    EXPECT(cudaGetLastError() == cudaSuccess);
    auto attribute = cudaFuncAttributeMaxDynamicSharedMemorySize;
    if (!broken) EXPECT(cudaFuncSetAttribute(past_dynamic, attribute, 100000) == cudaSuccess);
    EXPECT(cudaFuncSetAttribute(past_shared, attribute, 300000) == cudaErrorInvalidValue);
    cudaGetLastError();
    past_dynamic<<<1, 8, 100000>>>(out, 0);
    EXPECT(cudaGetLastError() == cudaSuccess);
}
// A careful program: each call is checked. test.py makes each of them fail.
static void every_call_fails() {
    auto check = [](cudaError_t e) {
        if (e == cudaSuccess) return;
        printf("stopped: %s\n", cudaGetErrorString(e));
        exit(3);
    };
    int devices;
    float* x;
    cudaStream_t stream;
    check(cudaGetDeviceCount(&devices));
    check(cudaMalloc(&x, 4000));
    check(cudaStreamCreate(&stream));
    check(cudaMemsetAsync(x, 0, 4000, stream));
    scale<<<1, 64, 0, stream>>>(x, 64, 2);
    check(cudaGetLastError());
    check(cudaStreamSynchronize(stream));
    check(cudaStreamDestroy(stream));
    check(cudaFree(x));
}
static void properties() {
    cudaDeviceProp p;
    size_t free, total, after;
    EXPECT(cudaGetDeviceProperties(&p, 0) == cudaSuccess && p.sharedMemPerBlockOptin == 227 << 10);
    EXPECT(cudaMemGetInfo(&free, &total) == cudaSuccess && total == p.totalGlobalMem && free == total);
    {
        Array<float> x(1000);
        cudaMemGetInfo(&after, &total);
        EXPECT(after == free - 4000);
    }
    cudaMemGetInfo(&after, &total);
    EXPECT(after == free);
    EXPECT(cudaSetDevice(1) == cudaErrorInvalidDevice);
}
// What each capability allows; what it does not allow fails, and a launch that is refused does nothing.
static void capabilities() {
    const std::pair<const char*, int> kilobytes[] = {{"8.0", 163}, {"8.6", 99}, {"8.9", 99}, {"9.0", 227},
                                                     {"10.0", 227}, {"12.0", 99}};
    for (auto [capability, most] : kilobytes) {
        emulator::settings.gpu = emulator::gpu_of(capability);
        const size_t bytes = (size_t)most << 10;
        cudaDeviceProp p;
        EXPECT(cudaGetDeviceProperties(&p, 0) == cudaSuccess && p.sharedMemPerBlockOptin == bytes);
        EXPECT(std::to_string(p.major) + "." + std::to_string(p.minor) == capability);
        EXPECT(p.sharedMemPerMultiprocessor == bytes + 1024 && p.multiProcessorCount > 80 && p.l2CacheSize >= 6 << 20);
        const auto attribute = cudaFuncAttributeMaxDynamicSharedMemorySize;
        EXPECT(cudaFuncSetAttribute(past_dynamic, attribute, bytes + 1) == cudaErrorInvalidValue);
        EXPECT(cudaGetLastError() == cudaErrorInvalidValue);
        EXPECT(cudaFuncSetAttribute(past_dynamic, attribute, bytes) == cudaSuccess);
        Array<float> out(std::vector<float>(8));
        past_dynamic<<<1, 8, bytes + 1>>>(out, 0);
        EXPECT(cudaGetLastError() == cudaErrorInvalidValue && out.get()[0] == 0);
        past_dynamic<<<1, 8, bytes>>>(out, 0);
        EXPECT(cudaGetLastError() == cudaSuccess && out.get()[0] == 2);
        for (int i = 1; i < 20; i++) {
            Product product = {i, 4, 4, 20, 20, 20}, plain = {i, 4, 4, 20, 20, 20};
            const cublasStatus_t status = product.search(CUBLASLT_EPILOGUE_DGELU, nullptr, out);
            EXPECT(status == (p.major < 9 ? CUBLAS_STATUS_NOT_SUPPORTED : CUBLAS_STATUS_SUCCESS));
            EXPECT(plain.search() == CUBLAS_STATUS_SUCCESS);
        }
    }
    if (broken) emulator::gpu_of("8.5");
}
static void approximations() {
    for (bool approximate : {false, true}) {
        emulator::settings.approximate = approximate;
        double exp2_worst = 0, tanh_worst = 0;
        for (float x = -30; x < 30; x += 0.01f) {
            exp2_worst = std::max(exp2_worst, fabs(exp2_approx(x) / exp2((double)x) - 1));
            tanh_worst = std::max(tanh_worst, fabs(emulator::tanh_approx(x) / tanh((double)x) - 1));
        }
        EXPECT(exp2_worst <= 0x1p-22 && (exp2_worst > 0x1p-23) == approximate);
        EXPECT(tanh_worst <= 0x1p-11 && (tanh_worst > 0x1p-12) == approximate);
        EXPECT(exp2_approx(0) == 1 && exp2_approx(-INFINITY) == 0 && std::isinf(exp2_approx(INFINITY)));
        EXPECT(std::isnan(exp2_approx(NAN)) && (exp2_approx(-140) == 0) == approximate);
    }
}
static void many_calls() {  // for a look at the time that it takes
    Array<float> x(1 << 16);
    cudaMemset(x, 0, 4 << 16);
    for (int i = 0; i < 10; i++) add_one<<<256, 256>>>(x, 1 << 16);
    EXPECT(x.get()[65535] == 10);
    for (int i = 0; i < 20; i++) multiply(NO_MISTAKE);
}

int main(int argc, char** argv) {
    struct { const char* name; void (*run)(); } cases[] = {
#define CASE(name) {#name, name}
        CASE(missing_syncthreads), CASE(missing_syncwarp), CASE(race_in_block), CASE(race_of_blocks),
        CASE(read_of_other_blocks), CASE(race_of_halves), CASE(past_the_end), CASE(past_the_end_of_shared),
        CASE(past_the_end_of_dynamic), CASE(past_own_array), CASE(use_after_free), CASE(device_memory_uninitialised),
        CASE(shared_uninitialised), CASE(misaligned_float4), CASE(host_memory_in_kernel), CASE(device_memory_by_host),
        CASE(copy_direction), CASE(copy_past_the_end), CASE(copy_past_pinned), CASE(all_collectives),
        CASE(mask_without_caller),
        CASE(shuffle_with_returned), CASE(masks_that_differ), CASE(divergent_syncthreads),
        CASE(syncthreads_with_returned), CASE(trap), CASE(missing_copy_wait), CASE(copy_over_what_is_read),
        CASE(misaligned_copy), CASE(misaligned_ldmatrix), CASE(ldmatrix_not_shared), CASE(ldmatrix_transposed),
        CASE(matmul), CASE(matmul_refused), CASE(matmul_misaligned), CASE(numbers), CASE(atomics),
        CASE(missing_event_wait), CASE(default_stream_does_not_wait), CASE(pinned_overwritten), CASE(result_read_early),
        CASE(pageable_copies), CASE(events), CASE(too_many_threads), CASE(too_much_shared), CASE(every_call_fails),
        CASE(properties), CASE(capabilities), CASE(approximations), CASE(many_calls),
    };
    broken = argc > 2 && strcmp(argv[2], "broken") == 0;
    for (auto& c : cases)
        if (argc > 1 && strcmp(argv[1], c.name) == 0) {
            c.run();
            if (!wrong) printf("right\n");
            return wrong ? 2 : 0;
        }
    for (auto& c : cases) printf("%s\n", c.name);
    return 1;
}
