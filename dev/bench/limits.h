// limits.h: what this machine can do at best: its peak (FLOP/s) and its bandwidth (bytes/s), each measured now, as the
// best of several rounds. bench.cpp and ladder.cpp include it after the program. device_peak_memory and
// device_bandwidth_memory are the bytes that a measurement allocates.
#pragma once

#ifndef GPT2_CUDA
// The best rate in 50 ms of rounds. In a round, every thread calls f, which does so many operations.
template <class F>
static double best_rate(double operations, F f) {
    double best = 0;
    for (double begin = seconds(), start = begin; start - begin < 0.05; start = seconds()) {
        int threads = 0;
#pragma omp parallel reduction(+ : threads)  // as many as ran
        {
            f();
            threads++;
        }
        best = std::max(best, operations * threads / (seconds() - start));
    }
    return best;
}

constexpr int CHAINS = ROWS * NV, LINKS = 1 << 16;

// Independent chains sum = link(sum), all in registers and, as in the microkernel, enough to hide a link's latency
template <class F>
static void run_chains(F link) {
    vec sum[CHAINS];
    for (vec& s : sum) {
        s = vec{} + 1.0f;
        asm volatile("" : "+m"(s));  // the compiler cannot know the value
    }
    for (int i = 0; i < LINKS; i++) {
#pragma GCC unroll 32
        for (vec& s : sum) s = link(s);
    }
    for (vec& s : sum) asm volatile("" : : "m"(s));  // the compiler cannot leave out what is used
}

#ifdef __AMX_BF16__
static void run_tiles() {
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
    // With an instruction between products, as in any use: a busy hyperthread beside this one makes it count.
    for (int i = 0; i < LINKS; i++) {
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
}
#endif

static double device_peak([[maybe_unused]] int precision) {
#ifdef __AMX_BF16__
    if (precision == BF16) return best_rate(4.0 * 2 * LANES * LANES * 2 * LANES * LINKS, run_tiles);
#elif defined(__AVX512BF16__)
    static const std::array<Pair, LANES> ones = [] {
        std::array<Pair, LANES> pairs;
        pairs.fill({1.0f, 1.0f});
        return pairs;
    }();
    auto add_pairs = [](vec s) { return multiply_add(s, ones[0], ones.data()), s; };
    if (precision == BF16) return best_rate(4.0 * CHAINS * LANES * LINKS, [&] { run_chains(add_pairs); });
#endif
    return best_rate(2.0 * CHAINS * LANES * LINKS, [] { run_chains([](vec s) { return s * 0.999f + 0.001f; }); });
}
[[maybe_unused]] static size_t device_peak_memory(int) { return 0; }

// Reads 512 MiB, each thread in eight streams with prefetch, which is faster than one; or scales them in place.
static size_t device_bandwidth_memory() { return 512 << 20; }
[[maybe_unused]] static double device_bandwidth(bool writing) {
    const size_t n = device_bandwidth_memory() / sizeof(float), STREAMS = 8, AHEAD = 128;
    const size_t share = n / thread_count(), length = share / STREAMS / LANES * LANES;
    float* a = (float*)device_allocate(n * sizeof(float), true);
    double best = 0;
    for (int round = 0; round < 5; round++) {
        double start = seconds();
        if (writing) {
#pragma omp parallel for schedule(static)
            for (size_t i = 0; i < n; i += LANES) store(a + i, load(a + i) * 1.0001f);
        } else {
#pragma omp parallel for schedule(static)
            for (size_t part = 0; part < n / share; part++) {
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
        best = std::max(best, (writing ? 2.0 : 1.0) * n * sizeof(float) / (seconds() - start));
    }
    device_free(a);
    return best;
}

// Most memory in use since the reset, in MiB; 0 if the system does not say
[[maybe_unused]] static void device_reset_most_memory() {
    if (FILE* file = fopen("/proc/self/clear_refs", "w")) {
        fputs("5", file);
        fclose(file);
    }
}
[[maybe_unused]] static double device_most_memory(const Model&) {
    return number_after("/proc/self/status", "VmHWM:", 0) / 1024;
}

#else  // GPT2_CUDA
#ifdef GPT2_EMULATED
constexpr double WARM_UP = 0;
#else
constexpr double WARM_UP = 0.3;  // s, until a GPU that was idle has reached its clock
#endif

// The best rate of several rounds of so many operations
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

static size_t multiprocessors() {
    static const int count = [] {
        cudaDeviceProp properties;
        CHECK(cudaGetDeviceProperties(&properties, 0));
        return properties.multiProcessorCount;
    }();
    return count;
}

// a (n) = any values from -1 to 1. One thread per value
template <class X>
__global__ void noise_kernel(X* a, size_t n) {
    const size_t i = (size_t)blockIdx.x * blockDim.x + threadIdx.x;
    if (i < n) a[i] = (X)((float)(int32_t)((uint32_t)i * 2654435769u ^ (uint32_t)i << 13) * 0x1p-31f);
}

// What cuBLASLt reaches with a product of two square matrices, large enough for this GPU. They hold noise, since
// products of zeros take less power, which lets a GPU run faster than it does in training.
static size_t peak_size() { return 64 * multiprocessors(); }
static size_t device_peak_memory(int precision) {
    return 3 * peak_size() * peak_size() * (precision == BF16 ? sizeof(bf16) : sizeof(float)) + CUBLAS_WORKSPACE;
}
template <class X>
static double matmul_peak() {
    constexpr size_t BLOCK = 256;
    const size_t N = peak_size(), n = 3 * N * N;
    X* matrices = (X*)device_allocate(n * sizeof(X), false);
    noise_kernel<X><<<(unsigned)ceil_div(n, BLOCK), BLOCK, 0, gpu.stream>>>(matrices, n);
    CHECK(cudaGetLastError());
    Workspace ws = {};
    ws.cublas = (char*)device_allocate(CUBLAS_WORKSPACE, false);
    double rate = best_rate(2.0 * N * N * N, [&] {
        matmul<X, X>(ws, matrices, N, N, N, N, along_k<X>(matrices + N * N, N), along_k<X>(matrices + 2 * N * N, N));
    });
    device_free(matrices);
    device_free(ws.cublas);
    return rate;
}
static double device_peak(int precision) {
    return precision == BF16 ? matmul_peak<bf16>() : matmul_peak<float>();
}

// a (n) *= 1.0001. One thread per vector
__global__ void scale_kernel(float* a, size_t n) {
    const size_t at = ((size_t)blockIdx.x * blockDim.x + threadIdx.x) * VECTOR;
    if (at >= n) return;
    float x[VECTOR];
    load(x, a + at);
    for (int i = 0; i < VECTOR; i++) x[i] *= 1.0001f;
    store(a + at, x);
}

// sums (threads): each thread's, of every vector that it reads
__global__ void read_kernel(float* sums, const float* a, size_t n) {
    const size_t thread = (size_t)blockIdx.x * blockDim.x + threadIdx.x, threads = (size_t)gridDim.x * blockDim.x;
    float x[VECTOR], sum = 0;
#pragma unroll 4
    for (size_t at = thread * VECTOR; at < n; at += threads * VECTOR) {
        load(x, a + at);
        for (int i = 0; i < VECTOR; i++) sum += x[i];
    }
    sums[thread] = sum;
}

// Reads 4 MiB per multiprocessor, far more than caches hold; or scales them in place.
constexpr size_t READ_BYTES = 4 << 20;
constexpr unsigned READ_BLOCK = 256, READ_BLOCKS = 8;  // threads; blocks per multiprocessor

static size_t device_bandwidth_memory() {
    return multiprocessors() * (READ_BYTES + READ_BLOCKS * READ_BLOCK * sizeof(float));
}
static double device_bandwidth(bool writing) {
    const unsigned blocks = READ_BLOCKS * multiprocessors();
    const size_t n = multiprocessors() * READ_BYTES / sizeof(float);
    float* a = (float*)device_allocate(n * sizeof(float), true);
    float* sums = (float*)device_allocate(blocks * READ_BLOCK * sizeof(float), false);
    double rate = best_rate((writing ? 2.0 : 1.0) * n * sizeof(float), [&] {
        if (writing) scale_kernel<<<(unsigned)ceil_div(n, VECTOR * READ_BLOCK), READ_BLOCK, 0, gpu.stream>>>(a, n);
        else read_kernel<<<blocks, READ_BLOCK, 0, gpu.stream>>>(sums, a, n);
        CHECK(cudaGetLastError());
    });
    device_free(a);
    device_free(sums);
    return rate;
}

static void device_reset_most_memory() {}
static double device_most_memory(const Model& m) { return m.allocator.memory.total() / 0x1p20; }
#endif
