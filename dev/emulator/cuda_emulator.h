/*
cuda_emulator.h: runs the kernels of an ordinary .cu file on a CPU, to find out whether they are right.

Each CUDA thread becomes a fiber, all on one thread of the operating system, with a g++ or clang++ and nothing of CUDA
installed. It is made to make mistakes show, not to be fast: what is undefined on a GPU is made to go wrong here, in
another way for each seed, or ends the program with one line that names kernel, block, thread, file and line.

Use it for your own kernels; these are its plain, its address and its checked build:

    python3 dev/emulator/translate.py mine.cu mine.cpp        rewrites launches, __shared__ and CUDA's #includes
    E="-std=c++20 -g -include dev/emulator/cuda_emulator.h"
    g++ $E -O2 mine.cpp -o mine
    g++ $E -O2 -fsanitize=address,undefined mine.cpp -o mine_address
    g++ $E -O1 -fsanitize=thread,alignment -c mine.cpp -o mine.o && g++ mine.o -o mine_checked

The checked build has the compiler call a function before each access to memory, as it does for ThreadSanitizer; but the
functions are this header's, so it is linked without -fsanitize. ThreadSanitizer itself knows neither what CUDA's
barriers order nor where device memory ends, and its few records of an access may be gone when a race's second half
comes; these find a race in every run. All must be one translation unit.

What is caught                                                                      plain      address    checked
    memory used before it was written: it is NaN (bytes 0xff), shared memory anew
        for each block                                                              result     result     result
    missing wait for cp.async, which lands only there (its target is NaN till then) result     result     result
    cp.async into what others still read                                            some seeds some seeds always
    missing __syncthreads or __syncwarp, blocks that read what others write         some seeds some seeds always
    += on one address by several threads or blocks                                  -          -          always
    out of bounds, and after cudaFree, in device memory                             -          always     always
    out of bounds, shared memory                                                    -          always     always
    out of bounds, a thread's own arrays                                            -          always     -
    host memory used in a kernel, device memory by the host                         -          -          always
    misaligned float4 and the like (with g++)                                       (may crash) always    always
    misaligned cp.async or ldmatrix, or outside of shared memory                    always     always     always
    a collective that not all threads of its mask, or of its block, reach, or that
        they reach at different places; a mask without its caller                   always     always     always
    a launch with too many threads, too much shared memory; copies in the wrong
        direction or past the end                                        error code, and a line on stderr
    missing wait for an event: queued work runs as late as it may, in an order that
        differs by seed                                                             some seeds some seeds some seeds
    pinned memory overwritten before its copy has run, or read before               result     result     result
    an error path of the program: GPT2_EMULATOR_FAIL makes any one call fail        always     always     always
    cuBLASLt: another product's algorithm, pointers aligned less than was promised  always     always     always
    NCCL: no communicator, a group that is not ended, a number of bytes that is not
        the sender's, memory that is not the device's                               always     always     always
"result": a value is wrong, mostly NaN; the caller's test must see it. "some seeds": likewise, but not for every order.
"-": nothing, or a crash. test.py tries each of these.

Environment                                                                              or in emulator::settings
    GPT2_EMULATOR_SEED=1        order of threads, blocks and streams; right kernels give the same bits for all
    GPT2_EMULATOR_BLOCKS=1      blocks whose threads run interleaved
    GPT2_EMULATOR_FAIL=0        this call of the runtime, a launch being one, fails; 0: none
    GPT2_EMULATOR_COUNT=0       1: prints at the end how many calls there were
    GPT2_EMULATOR_MEMORY=N      bytes of device memory; 16 GiB if not set
    GPT2_EMULATOR_DEVICES=1     0: there is no device; -1: no driver
    GPT2_EMULATOR_FIRST=0       number of the first device, so that processes can have different ones
    GPT2_EMULATOR_CAPABILITY=   8.0 (as an A100 has it), 8.6 (RTX 3090), 8.9 (RTX 4090), 9.0 (H100), 10.0 (B200) or 12.0
                                (RTX 5090): the compute capability, with that GPU's number of multiprocessors, shared
                                memory and L2 cache. If not set, 9.0 with 4 multiprocessors and 1 MiB of cache
    GPT2_EMULATOR_MULTIPROCESSORS, _SHARED_BLOCK, _SHARED_MULTIPROCESSOR, _L2    another number of these; of bytes
    GPT2_EMULATOR_APPROXIMATE=0 1: exp2_approx, __expf and the like, and the tanh in cuBLASLt's epilogues, are as
                                inexact as the GPU's
    GPT2_EMULATOR_ALGORITHMS=1  number of cuBLASLt's algorithms, at most 8. Each sums in another order; which one comes
                                first depends on the product's shape, leading dimensions and promised alignment
    GPT2_EMULATOR_REFUSE_       what cuBLASLt refuses: chance, by SEED and the product, decides whether the heuristic
                                omits it, the launch refuses it, or some algorithms each
        PERCENT=0               this percentage of all algorithms of all products, by SEED and the product
        K=0                     products whose k is not a multiple of this
        ALIGNMENT=0             products with a leading dimension that is not a multiple of this many bytes, or with
                                pointers that are promised a multiple of less than this and less than 16
        EPILOGUES=0             a sum of 1 (products without epilogue), 2 (BIAS), 4 (GELU_BIAS), 8 (GELU_AUX_BIAS) and
                                16 (DGELU)
    GPT2_EMULATOR_LOG=FILE      no kernel, copy or product is run; FILE has a line for each allocation, launch and
                                product. So a program tells what it would do at sizes that a CPU could not compute; what
                                it reads back is bytes of 0xff

What it cannot show: speed; bank conflicts and coalescing; registers; weaker memory orders than the one in which its
threads run, though the checked build reports what would depend on them; protocols between running blocks, whose
spinning never ends here (the accesses that such a protocol orders count as races); launches of more threads than
__launch_bounds__ allows. Not there: wgmma, TMA, half, textures, cooperative groups, graphs, dynamic parallelism,
__activemask, template arguments of a kernel that its launch leaves to be deduced (write k<float><<<...>>>), adding to
floats by atomics, whose result depends on the order. A call of the runtime that is not there does not compile. Stricter
than a GPU: threads of a warp, or of a block, must meet on the same line.

Raw PTX cannot be run: put it into small functions, each under #ifndef GPT2_EMULATED, which is defined here. Those that
are replaced: exp2_approx, mma_m16n8k16, ldmatrix_x4, ldmatrix_x4_trans, cp_async_16, cp_async_wait. cuBLASLt is there
as far as products of fp32 or bf16 matrices with these epilogues need it; sums are fp32, alpha 1, beta 0 or 1. Before
compute capability 9.0 it offers no DGELU. NCCL is there if GPT2_MPI is defined, for groups of ncclSend, ncclRecv and
ncclAllGather on one stream.

Contents
     1  the language         keywords, vector types
     2  settings, messages, random order
     3  memory               allocations, who touched what, races
     4  threads              fibers, blocks, collectives
     5  streams              queues, events, launches
     6  the runtime          cudaMalloc and so on
     7  device functions     shuffles and votes, atomics, mathematics, bf16
     8  tensor cores         mma, ldmatrix, cp.async
     9  matrix products      the stand-in for cuBLASLt
    10  messages             the stand-in for NCCL, over MPI
    11  what the compiler calls in the checked build
*/

#pragma once

#define CUDART_VERSION 13000
#define GPT2_EMULATED

#include <algorithm>
#include <atomic>
#include <bit>
#include <cerrno>
#include <chrono>
#include <climits>
#include <cmath>
#include <cstdarg>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <functional>
#include <map>
#include <memory>
#include <mutex>
#include <string>
#include <tuple>
#include <type_traits>
#include <utility>
#include <vector>
#include <link.h>
#include <sys/mman.h>
#include <unistd.h>
#ifdef GPT2_MPI
#include <mpi.h>
#endif

#ifndef __has_feature
#define __has_feature(x) 0
#endif
#if defined(__SANITIZE_THREAD__) || __has_feature(thread_sanitizer)
#define EMULATOR_CHECKED 1
#else
#define EMULATOR_CHECKED 0
#endif
#if defined(__SANITIZE_ADDRESS__) || __has_feature(address_sanitizer)
#define EMULATOR_ADDRESS 1
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#else
#define EMULATOR_ADDRESS 0
#endif
#if !defined(__x86_64__) && !defined(EMULATOR_UCONTEXT)
#define EMULATOR_UCONTEXT 1  // threads are switched by the system's means, several times slower
#endif
#if EMULATOR_UCONTEXT
#include <ucontext.h>
#endif
// The emulator's own functions, which run in a thread's place, are not the kernel's accesses.
#ifdef __clang__
#define EMULATOR_OWN __attribute__((disable_sanitizer_instrumentation, no_sanitize("thread")))
#else
#define EMULATOR_OWN __attribute__((no_sanitize("thread")))
#endif

// ====================================================================================================================
// 1 · The language

#define __global__
#define __device__
#define __host__
#define __constant__
#define __forceinline__ inline __attribute__((always_inline))
#define __launch_bounds__(...)
#define __align__(n) __attribute__((aligned(n)))
#define __grid_constant__

#define EMULATOR_VECTOR2(T, name, alignment) \
    struct alignas(alignment) name##2 { T x, y; }; \
    inline name##2 make_##name##2(T x, T y) { return {x, y}; }
#define EMULATOR_VECTOR3(T, name) \
    struct name##3 { T x, y, z; }; \
    inline name##3 make_##name##3(T x, T y, T z) { return {x, y, z}; }
#define EMULATOR_VECTOR4(T, name, alignment) \
    struct alignas(alignment) name##4 { T x, y, z, w; }; \
    inline name##4 make_##name##4(T x, T y, T z, T w) { return {x, y, z, w}; }
#define EMULATOR_VECTORS(T, name, size) \
    EMULATOR_VECTOR2(T, name, 2 * size) EMULATOR_VECTOR3(T, name) EMULATOR_VECTOR4(T, name, 4 * size)
EMULATOR_VECTORS(float, float, 4)
EMULATOR_VECTORS(int, int, 4)
EMULATOR_VECTORS(unsigned, uint, 4)
EMULATOR_VECTORS(short, short, 2)
EMULATOR_VECTORS(unsigned short, ushort, 2)
EMULATOR_VECTORS(signed char, char, 1)
EMULATOR_VECTORS(unsigned char, uchar, 1)
EMULATOR_VECTOR2(double, double, 16)
EMULATOR_VECTOR2(long long, longlong, 16)
EMULATOR_VECTOR2(unsigned long long, ulonglong, 16)

struct dim3 {
    unsigned x, y, z;
    constexpr dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};

#define EMULATOR_ERRORS(E) \
    E(cudaSuccess, 0, "no error") \
    E(cudaErrorInvalidValue, 1, "invalid argument") \
    E(cudaErrorMemoryAllocation, 2, "out of memory") \
    E(cudaErrorInvalidConfiguration, 9, "invalid configuration argument") \
    E(cudaErrorInsufficientDriver, 35, "CUDA driver version is insufficient for CUDA runtime version") \
    E(cudaErrorNoDevice, 100, "no CUDA-capable device is detected") \
    E(cudaErrorInvalidDevice, 101, "invalid device ordinal") \
    E(cudaErrorInvalidResourceHandle, 400, "invalid resource handle") \
    E(cudaErrorNotReady, 600, "device not ready") \
    E(cudaErrorUnknown, 999, "unknown error")
enum cudaError_t {
#define EMULATOR_ERROR(name, code, text) name = code,
    EMULATOR_ERRORS(EMULATOR_ERROR)
#undef EMULATOR_ERROR
};
using cudaError = cudaError_t;

namespace emulator {

// ====================================================================================================================
// 2 · Settings, messages, random order

inline long long environment(const char* name, long long otherwise) {
    const char* text = getenv(name);
    if (!text || !*text) return otherwise;
    char* end;
    errno = 0;
    long long value = strtoll(text, &end, 10);
    if (end == text || *end || errno) {
        fprintf(stderr, "emulator: %s=%s: no whole number\n", name, text);
        exit(1);
    }
    return value;
}

inline FILE* log_file(const char* name) {
    const char* path = getenv(name);
    if (!path || !*path) return nullptr;
    FILE* file = fopen(path, "w");
    if (!file) {
        fprintf(stderr, "emulator: %s=%s: %s\n", name, path, strerror(errno));
        exit(1);
    }
    return file;
}

// NVIDIA's CUDA C++ Programming Guide, "Technical Specifications per Compute Capability", and the GPUs' data sheets
struct Gpu {
    const char *capability, *name;
    int major, minor, multiprocessors, threads;         // threads of a multiprocessor
    size_t shared_block, shared_multiprocessor, l2;     // bytes; the first on request
    int memory_bus;                                     // bits
};
constexpr Gpu GPUS[] = {
    {"", "GPU", 9, 0, 4, 2048, 227 << 10, 228 << 10, 1 << 20, 512},
    {"8.0", "A100", 8, 0, 108, 2048, 163 << 10, 164 << 10, 40 << 20, 5120},
    {"8.6", "RTX 3090", 8, 6, 82, 1536, 99 << 10, 100 << 10, 6 << 20, 384},
    {"8.9", "RTX 4090", 8, 9, 128, 1536, 99 << 10, 100 << 10, 72 << 20, 384},
    {"9.0", "H100", 9, 0, 132, 2048, 227 << 10, 228 << 10, 50 << 20, 5120},
    {"10.0", "B200", 10, 0, 148, 2048, 227 << 10, 228 << 10, 126 << 20, 8192},
    {"12.0", "RTX 5090", 12, 0, 170, 1536, 99 << 10, 100 << 10, 96 << 20, 512},
};
inline Gpu gpu_of(const char* capability) {
    for (const Gpu& gpu : GPUS)
        if (!strcmp(capability ? capability : "", gpu.capability)) return gpu;
    fprintf(stderr, "emulator: GPT2_EMULATOR_CAPABILITY=%s: not one of those in cuda_emulator.h\n", capability);
    exit(1);
}
inline Gpu gpu_of_environment() {
    Gpu gpu = gpu_of(getenv("GPT2_EMULATOR_CAPABILITY"));
    gpu.multiprocessors = (int)environment("GPT2_EMULATOR_MULTIPROCESSORS", gpu.multiprocessors);
    gpu.shared_block = (size_t)environment("GPT2_EMULATOR_SHARED_BLOCK", (long long)gpu.shared_block);
    gpu.shared_multiprocessor =
        (size_t)environment("GPT2_EMULATOR_SHARED_MULTIPROCESSOR", (long long)gpu.shared_multiprocessor);
    gpu.l2 = (size_t)environment("GPT2_EMULATOR_L2", (long long)gpu.l2);
    return gpu;
}

struct Settings {
    unsigned long long seed = (unsigned long long)environment("GPT2_EMULATOR_SEED", 1);
    int blocks = (int)environment("GPT2_EMULATOR_BLOCKS", 1);
    long long fail = environment("GPT2_EMULATOR_FAIL", 0);
    bool count = environment("GPT2_EMULATOR_COUNT", 0) != 0;
    size_t memory = (size_t)environment("GPT2_EMULATOR_MEMORY", 1ll << 34);
    int devices = (int)environment("GPT2_EMULATOR_DEVICES", 1);
    int first_device = (int)environment("GPT2_EMULATOR_FIRST", 0);
    Gpu gpu = gpu_of_environment();
    bool approximate = environment("GPT2_EMULATOR_APPROXIMATE", 0) != 0;
    int algorithms = (int)std::clamp(environment("GPT2_EMULATOR_ALGORITHMS", 1), 1ll, 8ll);
    int refuse_percent = (int)environment("GPT2_EMULATOR_REFUSE_PERCENT", 0);
    int refuse_k = (int)environment("GPT2_EMULATOR_REFUSE_K", 0);
    int refuse_alignment = (int)environment("GPT2_EMULATOR_REFUSE_ALIGNMENT", 0);
    int refuse_epilogues = (int)environment("GPT2_EMULATOR_REFUSE_EPILOGUES", 0);
    FILE* log = log_file("GPT2_EMULATOR_LOG");
};
inline Settings settings;

constexpr size_t SHARED_DEFAULT = 48 << 10;  // bytes a block; more on request
constexpr unsigned WARP = 32, THREADS_MOST = 1024;

// splitmix64
struct Order {
    uint64_t state = settings.seed;
    EMULATOR_OWN uint64_t below(uint64_t n) {
        uint64_t z = (state += 0x9e3779b97f4a7c15);
        z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9;
        z = (z ^ (z >> 27)) * 0x94d049bb133111eb;
        return (uint64_t)(((unsigned __int128)(z ^ (z >> 31)) * n) >> 64);
    }
};
inline Order order;

struct Thread;
inline thread_local Thread* self = nullptr;  // the thread that runs; null outside of kernels
inline thread_local int unchecked = 0;       // > 0 while the emulator itself works

struct Unchecked {
    EMULATOR_OWN Unchecked() { unchecked++; }
    EMULATOR_OWN ~Unchecked() { unchecked--; }
};

inline std::string describe(const Thread& thread);  // "kernel sum, block (0,0,0), thread (3,0,0)"

inline std::string text(const char* format, va_list args) {
    char line[1024];
    vsnprintf(line, sizeof line, format, args);
    return line;
}
__attribute__((format(printf, 1, 2))) inline std::string text(const char* format, ...) {
    va_list args;
    va_start(args, format);
    std::string s = text(format, args);
    va_end(args);
    return s;
}

// A line of the program: as a default argument, here() is the caller's.
struct Where {
    const char* file = "";
    unsigned line = 0;
};
constexpr Where here(const char* file = __builtin_FILE(), unsigned line = __builtin_LINE()) { return {file, line}; }
inline std::string text(const Where& where) { return text("%s:%u", where.file, where.line); }

inline uintptr_t program = 0;  // where the program was loaded, so that places in it fit into 32 bits
EMULATOR_OWN inline uint32_t place_in_program(const void* pc) {
    if (!program) {
        Unchecked own;
        dl_iterate_phdr([](dl_phdr_info* info, size_t, void*) { return program = info->dlpi_addr | 1, 1; }, nullptr);
    }
    return (uint32_t)((uintptr_t)pc - program + 1);
}

// What the debug information says of a place, in lines.
inline std::vector<std::string> look_up(const char* options, uint32_t place) {
    std::vector<std::string> lines;
    char path[4096] = {}, line[4096];
    if (readlink("/proc/self/exe", path, sizeof path - 1) <= 0) return lines;
    FILE* pipe = popen(text("addr2line %s -e '%s' %#x 2>/dev/null", options, path, place).c_str(), "r");
    while (pipe && fgets(line, sizeof line, pipe)) lines.emplace_back(line, strcspn(line, "\n"));
    if (pipe) pclose(pipe);
    return lines;
}
inline std::string line_of(uint32_t pc) {
    auto lines = look_up("-s", pc - 1);
    if (lines.empty() || lines[0][0] == '?') return text("%#x in the program (compile with -g)", pc);
    return lines[0].substr(0, lines[0].find(' '));
}
// The kernel's name and template arguments, without its type; `otherwise` is what its launch called it.
inline std::string name_of(const void* kernel, const char* otherwise) {
    auto lines = look_up("-f -i -C", place_in_program(kernel));  // functions and lines by turns, the outermost last
    std::string name = lines.size() < 2 || lines[lines.size() - 2][0] == '?' ? "" : lines[lines.size() - 2];
    size_t end = 0;
    for (int depth = 0; end < name.size() && (depth || name[end] != '('); end++)
        depth += (name[end] == '<') - (name[end] == '>');
    name.resize(end);
    if (name.starts_with("void ")) name.erase(0, 5);
    return name.empty() ? otherwise : name;
}

// Ends the program over a mistake in a kernel, or in the calls around it.
[[noreturn]] __attribute__((format(printf, 2, 3)))
EMULATOR_OWN inline void fail(const Thread* thread, const char* format, ...) {
    unchecked++;
    va_list args;
    va_start(args, format);
    std::string line = (thread ? describe(*thread) + ": " : "") + text(format, args);
    va_end(args);
    fflush(stdout);
    fprintf(stderr, "emulator: %s\n", line.c_str());
    fflush(stderr);
#ifdef GPT2_MPI
    usleep(300'000);  // mpirun can lose a line that is newer
#endif
    _exit(1);
}

// ====================================================================================================================
// 3 · Memory
//
// Device and pinned memory is the host's, each allocation by itself and of its exact size, so that AddressSanitizer
// knows its bounds.
//
// The checked build remembers for each two bytes of device and shared memory who wrote them last, and two of those who
// have read them since. Two accesses to the same bytes, one of them writing, are a race unless they are of one thread,
// or a barrier that both threads took part in lies in between. There is one clock for all, which barriers and launches
// advance; so it is enough to remember when an access was made, and when two threads last met.

struct Record {
    uint32_t moment = 0;  // on the clock
    uint32_t who = 0;     // atomic?, block, thread: see `who`
    uint32_t pc = 0;      // where in the program
};
struct Cell {
    Record write, read[2];
};
constexpr size_t GRANULE = 2;  // bytes a cell. Accesses to single bytes are checked for bounds, not for races
constexpr uint32_t ATOMIC = 1u << 31;
inline uint32_t now = 1;       // the clock

struct Allocation {
    char* begin;
    size_t size;
    bool device;  // else pinned
    Cell* cells;  // checked build, device memory
};

// All allocations in order of their address. Host threads may look one up while another allocates.
inline std::vector<Allocation> allocations;
inline std::atomic_flag allocations_busy;
inline size_t device_used = 0;

// The allocation that holds address p, if one does.
EMULATOR_OWN inline bool find(const void* p, Allocation& found) {
    Unchecked own;
    while (allocations_busy.test_and_set(std::memory_order_acquire)) {}
    size_t low = 0, high = allocations.size();
    while (low < high) {  // down to the first that begins after p
        size_t middle = (low + high) / 2;
        if ((uintptr_t)allocations[middle].begin <= (uintptr_t)p) low = middle + 1;
        else high = middle;
    }
    bool inside = low > 0 && (uintptr_t)p - (uintptr_t)allocations[low - 1].begin < allocations[low - 1].size;
    if (inside) found = allocations[low - 1];
    allocations_busy.clear(std::memory_order_release);
    return inside;
}

// Whether n bytes from p on lie within one allocation of device memory, or of pinned memory.
inline bool on_device(const void* p, size_t n, bool or_pinned = false) {
    Allocation a;
    return n == 0 || (find(p, a) && (a.device || or_pinned) && n <= (size_t)(a.begin + a.size - (const char*)p));
}

inline size_t cells_size(size_t bytes) { return (bytes / GRANULE + 1) * sizeof(Cell); }
inline Cell* new_cells(size_t bytes) {  // zero pages that cost nothing until they are used
    int flags = MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE;
    void* p = mmap(nullptr, cells_size(bytes), PROT_READ | PROT_WRITE, flags, -1, 0);
    if (p == MAP_FAILED) fail(nullptr, "no memory to watch %zu bytes of device memory", bytes);
    return (Cell*)p;
}

inline void* allocate(size_t size, bool device) {
    void* p = nullptr;
    if (posix_memalign(&p, 256, size)) return nullptr;
    if (!settings.log) memset(p, 0xff, size);
    else if (device) fprintf(settings.log, "allocate %zu\n", size);
    Allocation a = {(char*)p, size, device, EMULATOR_CHECKED && device ? new_cells(size) : nullptr};
    while (allocations_busy.test_and_set(std::memory_order_acquire)) {}
    auto after = std::find_if(allocations.begin(), allocations.end(), [&](auto& b) { return b.begin > a.begin; });
    allocations.insert(after, a);
    allocations_busy.clear(std::memory_order_release);
    if (device) device_used += size;
    return p;
}

inline bool release(void* p, bool device) {  // false: it is no such allocation
    Allocation a;
    if (!find(p, a) || a.begin != p || a.device != device) return false;
    while (allocations_busy.test_and_set(std::memory_order_acquire)) {}
    std::erase_if(allocations, [&](auto& b) { return b.begin == a.begin; });
    allocations_busy.clear(std::memory_order_release);
    if (a.cells) munmap(a.cells, cells_size(a.size));
    if (device) device_used -= a.size;
    free(p);
    return true;
}

// ====================================================================================================================
// 4 · Threads
//
// A block's threads are fibers: each has a stack, and runs until it ends or meets a collective (a barrier, a shuffle,
// mma, ...) that others have yet to reach. Which one runs next is left to chance. Whoever is last to reach a collective
// does its work for all of them.

struct Fiber {
#if EMULATOR_UCONTEXT
    ucontext_t context;
#else
    void* stack_pointer = nullptr;
#endif
    char* stack = nullptr;  // its low end
    size_t size = 0;
    void* fake_stack = nullptr;  // AddressSanitizer's
};

#if EMULATOR_UCONTEXT
inline void prepare(Fiber& fiber, void (*entry)()) {
    getcontext(&fiber.context);
    fiber.context.uc_stack.ss_sp = fiber.stack;
    fiber.context.uc_stack.ss_size = fiber.size;
    makecontext(&fiber.context, entry, 0);
}
#else
inline void prepare(Fiber& fiber, void (*entry)()) {
    void** top = (void**)(fiber.stack + fiber.size);  // a multiple of 16
    *--top = nullptr;                                 // in place of a return address
    *--top = (void*)entry;
    fiber.stack_pointer = top - 6;                    // the six registers
}
// Saves what a function must preserve and the stack pointer, takes the other's, and returns into it.
__attribute__((naked, noinline, no_sanitize("thread", "address", "undefined")))
inline void switch_stacks([[maybe_unused]] void** save, [[maybe_unused]] void* load) {
    asm("pushq %rbp; pushq %rbx; pushq %r12; pushq %r13; pushq %r14; pushq %r15\n"
        "movq %rsp, (%rdi); movq %rsi, %rsp\n"
        "popq %r15; popq %r14; popq %r13; popq %r12; popq %rbx; popq %rbp; ret");
}
#endif

inline Fiber scheduler;  // what runs when no thread does

EMULATOR_OWN inline void switch_fiber(Fiber& from, Fiber& to) {
#if EMULATOR_ADDRESS
    __sanitizer_start_switch_fiber(&from.fake_stack, to.stack, to.size);
#endif
#if EMULATOR_UCONTEXT
    swapcontext(&from.context, &to.context);
#else
    switch_stacks(&from.stack_pointer, to.stack_pointer);
#endif
#if EMULATOR_ADDRESS
    const void* old;
    size_t old_size;
    __sanitizer_finish_switch_fiber(from.fake_stack, &old, &old_size);
    if (&from != &scheduler) scheduler.stack = (char*)old, scheduler.size = old_size;
#endif
}

// Where a thread waits for others.
struct Waiting {
    const char* at = nullptr;  // the collective: its name, compared as a pointer; null: it does not wait
    unsigned mask = 0;
    Where where;
    void* arguments = nullptr;

    bool same(const Waiting& other) const {
        return at && at == other.at && mask == other.mask && where.line == other.where.line &&
               (where.file == other.where.file || strcmp(where.file, other.where.file) == 0);
    }
};

struct Copy {  // a cp.async that has not landed
    char* to;
    const char* from;  // null: zeros
    uint32_t pc;
};

struct Block;
struct Thread {
    dim3 index;
    unsigned number = 0;      // in its block
    bool alive = false;
    Block* block = nullptr;
    Waiting waiting;
    std::vector<Copy> copies;
    uint32_t met[WARP] = {};  // when it last met each thread of its warp at a __syncwarp, if indirectly
    Fiber fiber;

    EMULATOR_OWN unsigned lane() const { return number % WARP; }
};

struct Block {
    dim3 index;
    unsigned number = 0, size = 0, alive = 0, arrived = 0;
    unsigned prepared = 0;                    // so many threads have had their fibers made
    uint32_t started = 0, synced = 0;         // on the clock; its last barrier
    unsigned waiting[THREADS_MOST / WARP] = {};  // by warp: the lanes that wait at a warp's collective
    char* shared = nullptr;                   // dynamic first, then each __shared__ variable
    size_t dirty = 0;                         // bytes of it that may have been used
    Cell* cells = nullptr;
    char* stacks = nullptr;
    Thread* threads = nullptr;

    EMULATOR_OWN Thread* warp(unsigned number) { return &threads[number / WARP * WARP]; }
};

struct SharedVariable {
    const char* name;
    size_t offset, size;
};

// The launch that runs.
struct Grid {
    const char* name = "";                 // in the source of the launch
    const void* kernel = nullptr;
    dim3 grid, block;
    size_t dynamic = 0, dynamic_most = SHARED_DEFAULT;
    void (*enter)(const void*) = nullptr;  // the kernel ...
    const void* arguments = nullptr;       // ... and what it is called with
    uint32_t started = 0;
    uint64_t serial = 0;
    size_t shared_used = 0;
    std::vector<SharedVariable> variables;
};
inline Grid* grid = nullptr;
inline std::vector<Thread*> ready;
inline std::deque<Block>& blocks = *new std::deque<Block>;  // places for blocks that run interleaved
inline uint64_t launches = 0;

constexpr size_t PAGE = 65536;  // a multiple of the system's
constexpr size_t STACK = EMULATOR_ADDRESS || EMULATOR_CHECKED ? 256 << 10 : 64 << 10;
constexpr size_t ARENA = 256 << 10;  // a block's shared memory, with gaps

// Who made an access: which thread of which block of the launch.
EMULATOR_OWN inline uint32_t who(const Thread& t) { return (t.block->number & 0x1fffff) << 10 | t.number; }

inline std::string place(const char* what, dim3 i) { return text("%s (%u,%u,%u)", what, i.x, i.y, i.z); }
inline dim3 unravel(unsigned number, dim3 size) {
    return {number % size.x, number / size.x % size.y, number / size.x / size.y};
}
inline std::string describe(const Thread& t) {
    return "kernel " + name_of(grid->kernel, grid->name) + ", " + place("block", t.block->index) + ", " +
           place("thread", t.index);
}

EMULATOR_OWN inline void pause() {
    int depth = unchecked;
    switch_fiber(self->fiber, scheduler);
    unchecked = depth;
}

EMULATOR_OWN inline void thread_main() {
#if EMULATOR_ADDRESS
    const void* old;
    __sanitizer_finish_switch_fiber(nullptr, &old, &scheduler.size);
    scheduler.stack = (char*)old;
#endif
    for (;;) {
        grid->enter(grid->arguments);
        self->alive = false;
        pause();
    }
}

inline void protect_shared(const Block& b, size_t offset, size_t size, bool usable) {
#if EMULATOR_ADDRESS
    if (usable) ASAN_UNPOISON_MEMORY_REGION(b.shared + offset, size);
    else ASAN_POISON_MEMORY_REGION(b.shared + offset, size);
#else
    (void)b, (void)offset, (void)size, (void)usable;
#endif
}

inline void start(Block& b, unsigned number) {
    if (!b.shared) {
        b.stacks = (char*)mmap(nullptr, THREADS_MOST * (PAGE + STACK), PROT_READ | PROT_WRITE,
                               MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
        b.shared = (char*)mmap(nullptr, ARENA, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
        if (b.stacks == MAP_FAILED || b.shared == MAP_FAILED) fail(nullptr, "no memory for the threads' stacks");
        if (EMULATOR_CHECKED) b.cells = new_cells(ARENA);
        b.threads = new Thread[THREADS_MOST];
        b.dirty = ARENA;
    }
    b.size = b.alive = grid->block.x * grid->block.y * grid->block.z;
    for (; b.prepared < b.size; b.prepared++) {
        Fiber& fiber = b.threads[b.prepared].fiber;
        char* guard = b.stacks + b.prepared * (PAGE + STACK);
        mprotect(guard, PAGE, PROT_NONE);  // a stack that overflows ends the program
        // Tops of stacks do not lie the same distance apart: of those that do, caches hold few at a time.
        fiber.stack = guard + PAGE, fiber.size = STACK - b.prepared % 32 * 448;
        prepare(fiber, thread_main);
    }
    protect_shared(b, 0, ARENA, true);
    memset(b.shared, 0xff, b.dirty);
    b.dirty = grid->shared_used;
    protect_shared(b, 0, ARENA, false);
    protect_shared(b, 0, grid->dynamic, true);
    for (const SharedVariable& v : grid->variables) protect_shared(b, v.offset, v.size, true);

    b.index = unravel(number, grid->grid);
    b.number = number;
    b.arrived = 0;
    b.started = b.synced = ++now;
    std::fill(std::begin(b.waiting), std::end(b.waiting), 0u);
    for (unsigned i = 0; i < b.size; i++) {
        Thread& t = b.threads[i];
        t.index = unravel(i, grid->block);
        t.number = i;
        t.alive = true;
        t.block = &b;
        t.waiting = {};
        t.copies.clear();
        std::fill(std::begin(t.met), std::end(t.met), now);
        ready.push_back(&t);
    }
}

// No thread can go on: says who waits for whom.
[[noreturn]] inline void stuck(const Block& b) {
    auto at = [](const Waiting& w) {
        return text("%s at ", w.at) + text(w.where) + (w.mask ? text(" with mask %08x", w.mask) : "");
    };
    for (unsigned i = 0; i < b.size; i++) {
        const Thread& t = b.threads[i];
        bool of_block = t.waiting.mask == 0;
        unsigned begin = of_block ? 0 : i / WARP * WARP, end = of_block ? b.size : begin + WARP;
        for (unsigned j = begin; t.waiting.at && j < end; j++) {
            const Thread& u = b.threads[j];
            if ((!of_block && !(t.waiting.mask >> (j - begin) & 1)) || t.waiting.same(u.waiting)) continue;
            std::string does = j >= b.size ? "does not exist" : !u.alive ? "has returned" : "waits in " + at(u.waiting);
            fail(&t, "%s waits for %s, which %s", at(t.waiting).c_str(),
                 place("thread", unravel(j, grid->block)).c_str(), does.c_str());
        }
    }
    fail(nullptr, "kernel %s does not end", name_of(grid->kernel, grid->name).c_str());
}

EMULATOR_OWN inline void run_grid(Grid& g) {
    grid = &g;
    g.serial = ++launches;
    g.shared_used = g.dynamic;
    g.started = ++now;
    std::vector<unsigned> numbers(g.grid.x * g.grid.y * g.grid.z);
    for (size_t i = 0; i < numbers.size(); i++) numbers[i] = (unsigned)i;
    for (size_t i = numbers.size(); i > 1; i--) std::swap(numbers[i - 1], numbers[order.below(i)]);
    size_t next = 0, interleaved = std::min(numbers.size(), (size_t)std::max(settings.blocks, 1));
    while (blocks.size() < interleaved) blocks.emplace_back();
    for (Block& b : blocks) b.alive = 0;
    for (size_t i = 0; i < interleaved; i++) start(blocks[i], numbers[next++]);

    while (!ready.empty()) {
        Thread*& chosen = ready[order.below(ready.size())];
        Thread* t = chosen;
        chosen = ready.back();
        ready.pop_back();
        self = t;
        int depth = std::exchange(unchecked, 0);
        switch_fiber(scheduler, t->fiber);
        unchecked = depth;
        self = nullptr;
        if (!t->alive && --t->block->alive == 0 && next < numbers.size()) start(*t->block, numbers[next++]);
    }
    for (Block& b : blocks)
        if (b.alive) stuck(b);
    for (Block& b : blocks) b.dirty = std::max(b.dirty, g.shared_used), protect_shared(b, 0, ARENA, true);
    now++;
    grid = nullptr;
}

// __shared__ T name; becomes one static Shared<T>, which says where in its block's memory the variable is.
template <class T>
struct Shared {
    const char* name;
    size_t alignment = alignof(T);
    uint64_t serial = 0;  // of the launch for which offset holds
    size_t offset = 0;

    EMULATOR_OWN T& here() {
        if (serial != grid->serial) {
            Unchecked own;
            size_t align = std::max(alignment, alignof(T)), used = 0;
            offset = (grid->shared_used + (EMULATOR_ADDRESS || EMULATOR_CHECKED ? 32 : 0) + align - 1) / align * align;
            for (auto& v : grid->variables) used += v.size;
            if (used + sizeof(T) > SHARED_DEFAULT || used + sizeof(T) + grid->dynamic > settings.gpu.shared_block)
                fail(self, "%zu bytes of __shared__ variables and %zu of dynamic shared memory are too many",
                     used + sizeof(T), grid->dynamic);
            grid->shared_used = offset + sizeof(T);
            grid->variables.push_back({name, offset, sizeof(T)});
            for (Block& b : blocks) {
                if (b.shared) protect_shared(b, offset, sizeof(T), true);
                b.dirty = std::max(b.dirty, grid->shared_used);
            }
            serial = grid->serial;
        }
        return *(T*)(self->block->shared + offset);
    }
};

// extern __shared__ T name[]; becomes T* name.
template <class T>
EMULATOR_OWN T* dynamic_shared() { return (T*)self->block->shared; }

// Whether n bytes from p on are shared memory of this thread's block, all in one variable.
EMULATOR_OWN inline bool in_shared(const void* p, size_t n) {
    Unchecked own;
    size_t offset = (uintptr_t)p - (uintptr_t)self->block->shared;
    if (offset < grid->dynamic) return n <= grid->dynamic - offset;
    for (const SharedVariable& v : grid->variables)
        if (offset - v.offset < v.size) return n <= v.size - (offset - v.offset);
    return false;
}

// A warp's collective: returns when every thread that mask names has come to the same one with its own `mine`. The last
// to come calls complete(all), where all[lane] is that lane's `mine`.
template <class Arguments, class Complete>
EMULATOR_OWN void collective(const char* name, unsigned mask, Arguments& mine, const Where& where,
                             Complete complete) {
    Unchecked own;
    Thread& t = *self;
    Thread* warp = t.block->warp(t.number);
    unsigned& waiting = t.block->waiting[t.number / WARP];
    t.waiting = {name, mask, where, &mine};
    if (!(mask >> t.lane() & 1))
        fail(&t, "%s at %s has mask %08x, without its own lane %u", name, text(where).c_str(), mask, t.lane());
    waiting |= 1u << t.lane();
    bool last = (waiting & mask) == mask;
    for (unsigned i = 0; last && i < WARP; i++)
        last = !(mask >> i & 1) || t.waiting.same(warp[i].waiting);
    if (!last) {
        pause();
        return;
    }
    Arguments* all[WARP] = {};
    for (unsigned i = 0; i < WARP; i++)
        if (mask >> i & 1) all[i] = (Arguments*)warp[i].waiting.arguments;
    complete(all);
    waiting &= ~mask;
    for (unsigned i = 0; i < WARP; i++)
        if (mask >> i & 1) {
            warp[i].waiting = {};
            if (&warp[i] != &t) ready.push_back(&warp[i]);
        }
}

// A block's: `mine` as above, in all[thread].
template <class Arguments, class Complete>
EMULATOR_OWN void block_collective(const char* name, Arguments& mine, const Where& where,
                                   Complete complete) {
    Unchecked own;
    Thread& t = *self;
    Block& b = *t.block;
    t.waiting = {name, 0, where, &mine};
    if (++b.arrived < b.size) {
        pause();
        return;
    }
    for (unsigned i = 0; i < b.size; i++)
        if (!t.waiting.same(b.threads[i].waiting)) stuck(b);
    std::vector<Arguments*> all(b.size);
    for (unsigned i = 0; i < b.size; i++) all[i] = (Arguments*)b.threads[i].waiting.arguments;
    complete(all);
    b.arrived = 0;
    b.synced = ++now;
    for (unsigned i = 0; i < b.size; i++) {
        b.threads[i].waiting = {};
        if (&b.threads[i] != &t) ready.push_back(&b.threads[i]);
    }
}

// --------------------------------------------------------------------------------------------------------------------
// The checked build's view of an access

enum Access { READ, WRITE, ATOMIC_ADD };  // the last stands for all atomics
inline const char* const access_names[] = {"reads", "writes", "changes by an atomic"};

// Whether an earlier access is known to have ended before thread t goes on. All before `since` have.
EMULATOR_OWN inline bool before(const Record& r, const Thread& t, uint32_t since) {
    if (r.moment < since) return true;
    uint32_t mine = who(t), theirs = r.who & ~ATOMIC;
    if (mine == theirs) return true;
    if (mine >> 10 != theirs >> 10) return false;  // another block
    if (r.moment < t.block->synced) return true;
    return mine / WARP == theirs / WARP && r.moment < t.met[theirs % WARP];
}

[[noreturn]] inline void race(const Thread& t, const void* p, const char* memory, Access access, uint32_t pc,
                              const Record& other, bool other_wrote) {
    uint32_t block = (other.who & ~ATOMIC) >> 10;
    std::string them = place("thread", unravel(other.who % THREADS_MOST, grid->block));
    if (block != t.block->number) them += place(" of block", unravel(block, grid->grid));
    fail(&t, "race: %s %s memory at %s, which %s %s at %s, with no barrier in between (address %p)",
         access_names[access], memory, line_of(pc).c_str(), them.c_str(),
         other.who & ATOMIC ? "changed by an atomic" : other_wrote ? "wrote" : "read", line_of(other.pc).c_str(), p);
}

extern "C" const char __executable_start, _end;  // the linker's

// Thread `self` accesses n bytes at p.
EMULATOR_OWN inline void check(const void* p, size_t n, Access access, size_t alignment, uint32_t pc) {
    Unchecked own;
    Thread& t = *self;
    if ((uintptr_t)p % alignment)
        fail(&t, "misaligned: %s %zu bytes at %p at %s", access_names[access], n, p, line_of(pc).c_str());
    Block& b = *t.block;
    if ((uintptr_t)p - (uintptr_t)t.fiber.stack < t.fiber.size) return;  // its own variables
    auto outside = [&](const std::string& what) {
        fail(&t, "out of bounds: %s %zu bytes at %p, %s, at %s", access_names[access], n, p, what.c_str(),
             line_of(pc).c_str());
    };
    Cell* cells = b.cells;
    size_t offset = (uintptr_t)p - (uintptr_t)b.shared;
    uint32_t since = b.started;
    bool shared = offset < ARENA;
    if (shared) {
        if (!in_shared(p, n)) outside("past the end of a variable in shared memory");
    } else {
        Allocation a;
        if (!find(p, a)) {
            if (p >= &__executable_start && p < &_end) return;  // constants and __device__ variables
            size_t past = SIZE_MAX;
            for (const Allocation& c : allocations)
                if (c.device && c.begin <= p) past = std::min(past, (size_t)((char*)p - c.begin - c.size));
            outside("which is not device memory" +
                    (past < 4096 ? text(", %zu bytes past the end of an allocation", past) : ""));
        }
        cells = a.cells;
        offset = (uintptr_t)p - (uintptr_t)a.begin;
        since = grid->started;
        if (n > a.size - offset) outside("which begin in an allocation and end past it");
        if (!a.device) return;
    }
    if (n < GRANULE) return;
    Record mine = {now, who(t) | (access == ATOMIC_ADD ? ATOMIC : 0), pc};
    for (size_t i = offset / GRANULE; i < (offset + n) / GRANULE; i++) {
        Cell& cell = cells[i];
        const char* memory = shared ? "shared" : "global";
        bool atomics = access == ATOMIC_ADD && (cell.write.who & ATOMIC);
        if (!atomics && !before(cell.write, t, since)) race(t, p, memory, access, pc, cell.write, true);
        if (access == READ) {
            // Of two remembered reads, the less telling one is replaced: an old one, or one from the same thread, warp,
            // or block.
            Record *r = cell.read, me = mine;
            auto nearness = [&](const Record& o) {
                return before(o, t, since) ? 3 : o.who / WARP == me.who / WARP ? 2 : o.who >> 10 == me.who >> 10;
            };
            r[nearness(r[1]) >= nearness(r[0])] = mine;
        } else {
            for (Record& r : cell.read)
                if (!before(r, t, since)) race(t, p, memory, access, pc, r, false);
            cell = {mine, {}};
        }
    }
}

// What the emulator's own functions do in a thread's place.
EMULATOR_OWN inline void check_own(const void* p, size_t n, Access access, const void* return_address) {
    if (EMULATOR_CHECKED) check(p, n, access, 1, place_in_program(return_address));
}

// ====================================================================================================================
// 5 · Streams
//
// What is put on a stream stays in its queue until the program waits for something; then chance picks streams, and runs
// from their queues, until that has happened. So whatever is not ordered by the program is in another order sometimes.

struct EventState {
    uint64_t recorded = 0, done = 0;  // how often
    double time = 0;                  // of the last, in ms
};
struct Work {
    uint64_t serial;
    std::function<void()> run;
    std::shared_ptr<EventState> waits_for = nullptr;  // goes on when this one ...
    uint64_t count = 0;                               // ... is done so often
};

}  // namespace emulator

struct CUstream_st {
    bool blocking = true;  // ordered with the default stream
    std::deque<emulator::Work> queue = {};
};
struct CUevent_st {
    std::shared_ptr<emulator::EventState> state = std::make_shared<emulator::EventState>();
    bool timing = true;
};
using cudaStream_t = CUstream_st*;
using cudaEvent_t = CUevent_st*;

namespace emulator {

inline std::recursive_mutex busy;
inline CUstream_st default_stream;
inline std::vector<cudaStream_t> streams = {&default_stream};
inline uint64_t serials = 0;
inline long long calls = 0;
inline cudaError_t last_error = cudaSuccess;
inline int device = 0;        // the one in use
inline int groups_begun = 0;  // of NCCL's calls; they have not ended

inline cudaError_t error(cudaError_t e) { if (e != cudaSuccess) last_error = e; return e; }

__attribute__((format(printf, 2, 3))) inline cudaError_t error(cudaError_t e, const char* format, ...) {
    va_list args;
    va_start(args, format);
    fprintf(stderr, "emulator: %s\n", text(format, args).c_str());
    va_end(args);
    return error(e);
}

// Every call of the runtime begins with one of these: one call at a time, and any of them may be made to fail.
struct Call : Unchecked {
    std::lock_guard<std::recursive_mutex> lock{busy};
    cudaError_t fault = cudaSuccess;

    explicit Call(const char* name, bool may_fail = true) {
        if (settings.devices == 0) fault = error(cudaErrorNoDevice);
        if (settings.devices < 0) fault = error(cudaErrorInsufficientDriver);
        if (!may_fail || fault) return;
        if (++calls == 1 && settings.count) atexit([] { fprintf(stderr, "emulator: %lld calls\n", calls); });
        if (calls == settings.fail) fault = error(cudaErrorUnknown, "call %lld, %s, is made to fail", calls, name);
    }
};

inline void submit(cudaStream_t stream, std::function<void()> run, std::shared_ptr<EventState> waits_for = nullptr,
                   uint64_t count = 0) {
    (stream ? stream : &default_stream)->queue.push_back({++serials, std::move(run), std::move(waits_for), count});
}

// Kernels, copies and products; with a log they are left out.
inline void submit_work(cudaStream_t stream, std::function<void()> run) {
    submit(stream, settings.log ? nullptr : std::move(run));
}

// Runs the first work of one stream that may go on; false: there is none.
inline bool run_one() {
    uint64_t oldest = UINT64_MAX;  // on streams that the default stream waits for
    for (cudaStream_t s : streams)
        if (s != &default_stream && s->blocking && !s->queue.empty())
            oldest = std::min(oldest, s->queue.front().serial);
    std::vector<cudaStream_t> able;
    for (cudaStream_t s : streams) {
        if (s->queue.empty()) continue;
        const Work& w = s->queue.front();
        if (w.waits_for && w.waits_for->done < w.count) continue;
        if (s == &default_stream && w.serial > oldest) continue;
        if (s != &default_stream && s->blocking && !default_stream.queue.empty() &&
            w.serial > default_stream.queue.front().serial)
            continue;
        able.push_back(s);
    }
    if (able.empty()) return false;
    cudaStream_t s = able[order.below(able.size())];
    Work w = std::move(s->queue.front());
    s->queue.pop_front();
    if (w.run) w.run();
    return true;
}

template <class Done>
void wait_until(Done done) {
    if (grid) fail(self, "calls the host's functions from within a kernel");
    if (groups_begun) fail(nullptr, "NCCL: the program waits within a group, which ncclGroupEnd has not ended");
    while (!done())
        if (!run_one()) fail(nullptr, "streams wait for each other");
}
inline void wait_for(cudaStream_t s) {
    if (!s) s = &default_stream;
    uint64_t last = s->queue.empty() ? 0 : s->queue.back().serial;
    wait_until([=] { return s->queue.empty() || s->queue.front().serial > last; });
}
inline void wait_for_all() { for (size_t i = 0; i < streams.size(); i++) wait_for(streams[i]); }
inline bool known(cudaStream_t s) { return !s || std::find(streams.begin(), streams.end(), s) != streams.end(); }

inline std::map<const void*, int> dynamic_most;  // by kernel, where cudaFuncSetAttribute set it

template <class... P>
struct Invocation {
    void (*kernel)(P...);
    std::tuple<P...> arguments;

    template <size_t... I>
    EMULATOR_OWN static void call(const Invocation& i, std::index_sequence<I...>) {
        i.kernel(std::get<I>(i.arguments)...);
    }
    EMULATOR_OWN static void enter(const void* p) { call(*(const Invocation*)p, std::index_sequence_for<P...>{}); }
};

// kernel<<<grid, block, shared, stream>>>(x) becomes Launch("kernel", file, line, grid, block, ...).run(kernel, x).
struct Launch {
    const char *name, *file;
    int line;
    dim3 grid, block;
    size_t shared = 0;
    cudaStream_t stream = nullptr;

    Launch(const char* name, const char* file, int line, dim3 grid, dim3 block, size_t shared = 0,
           cudaStream_t stream = nullptr)
        : name(name), file(file), line(line), grid(grid), block(block), shared(shared), stream(stream) {}

    // launch: the kernel's place in the program (nm knows its name), grid, block, dynamic shared memory; then its
    // arguments, those that are not integers as -
    template <class... P>
    void log(const void* kernel, const P&... arguments) const {
        fprintf(settings.log, "launch %zx %u %u %u %u %u %u %zu", (size_t)((const char*)kernel - &__executable_start),
                grid.x, grid.y, grid.z, block.x, block.y, block.z, shared);
        auto put = [](const auto& x) {
            if constexpr (std::is_integral_v<std::remove_cvref_t<decltype(x)>>)
                fprintf(settings.log, " %lld", (long long)x);
            else
                fputs(" -", settings.log);
        };
        (put(arguments), ...);
        fputs("\n", settings.log);
    }

    template <class... P>
    void run(void (*kernel)(P...), std::type_identity_t<P>... arguments) const {
        Call call(name);
        if (call.fault) return;
        auto most = dynamic_most.find((const void*)kernel);
        size_t shared_most = most == dynamic_most.end() ? SHARED_DEFAULT : (size_t)most->second;
        size_t threads = (size_t)block.x * block.y * block.z;
        std::string at = text("%s:%d: launch of %s", file, line, name);
        if (!threads || threads > THREADS_MOST || block.z > 64 || !grid.x || !grid.y || !grid.z || grid.x > INT_MAX ||
            grid.y > 65535 || grid.z > 65535) {
            error(cudaErrorInvalidConfiguration, "%s with %s, %s", at.c_str(), place("grid", grid).c_str(),
                  place("block", block).c_str());
        } else if (shared > shared_most) {
            error(cudaErrorInvalidValue, "%s with %zu bytes of dynamic shared memory; it may use %zu", at.c_str(),
                  shared, shared_most);
        } else if (!known(stream)) {
            error(cudaErrorInvalidResourceHandle, "%s on a stream that is not one", at.c_str());
        } else {
            if (settings.log) log((const void*)kernel, arguments...);
            auto invocation = std::make_shared<Invocation<P...>>(Invocation<P...>{kernel, {arguments...}});
            submit_work(stream, [invocation, launch = *this] {
                Grid g;
                g.name = launch.name, g.kernel = (const void*)invocation->kernel;
                g.grid = launch.grid, g.block = launch.block, g.dynamic = launch.shared;
                g.enter = invocation->enter, g.arguments = invocation.get();
                run_grid(g);
            });
        }
    }
};

EMULATOR_OWN inline dim3 thread_index() { return self->index; }
EMULATOR_OWN inline dim3 block_index() { return self->block->index; }
EMULATOR_OWN inline dim3 block_size() { return grid->block; }
EMULATOR_OWN inline dim3 grid_size() { return grid->grid; }

}  // namespace emulator

#define threadIdx (::emulator::thread_index())
#define blockIdx (::emulator::block_index())
#define blockDim (::emulator::block_size())
#define gridDim (::emulator::grid_size())
constexpr int warpSize = 32;

// ====================================================================================================================
// 6 · The runtime

#define EMULATOR_CALL(name) \
    ::emulator::Call call(name); \
    if (call.fault) return call.fault

#define EMULATOR_ERROR(name, code, text) if (e == name) return #name;
inline const char* cudaGetErrorName(cudaError_t e) { EMULATOR_ERRORS(EMULATOR_ERROR) return "unknown"; }
#undef EMULATOR_ERROR
#define EMULATOR_ERROR(name, code, text) if (e == name) return text;
inline const char* cudaGetErrorString(cudaError_t e) { EMULATOR_ERRORS(EMULATOR_ERROR) return "unknown"; }
#undef EMULATOR_ERROR
inline cudaError_t cudaPeekAtLastError() { emulator::Call call("", false); return emulator::last_error; }
inline cudaError_t cudaGetLastError() {
    emulator::Call call("", false);
    return std::exchange(emulator::last_error, cudaSuccess);
}

// The device

inline cudaError_t cudaGetDeviceCount(int* count) {
    *count = 0;
    EMULATOR_CALL("cudaGetDeviceCount");
    *count = emulator::settings.devices;
    return cudaSuccess;
}
inline cudaError_t cudaSetDevice(int device) {
    EMULATOR_CALL("cudaSetDevice");
    emulator::device = device;
    return emulator::error(device >= 0 && device < emulator::settings.devices ? cudaSuccess : cudaErrorInvalidDevice);
}

struct cudaDeviceProp {
    char name[256];
    size_t totalGlobalMem, sharedMemPerBlock, sharedMemPerBlockOptin, sharedMemPerMultiprocessor;
    int major, minor, multiProcessorCount, warpSize, maxThreadsPerBlock, maxThreadsPerMultiProcessor;
    int regsPerBlock, regsPerMultiprocessor, l2CacheSize, memoryBusWidth, maxGridSize[3], maxThreadsDim[3];
};
inline cudaError_t cudaGetDeviceProperties(cudaDeviceProp* p, int) {
    *p = {};
    EMULATOR_CALL("cudaGetDeviceProperties");
    const emulator::Gpu& gpu = emulator::settings.gpu;
    *p = {"", emulator::settings.memory, emulator::SHARED_DEFAULT, gpu.shared_block, gpu.shared_multiprocessor,
          gpu.major, gpu.minor, gpu.multiprocessors, 32, 1024, gpu.threads, 65536, 65536, (int)gpu.l2, gpu.memory_bus,
          {INT_MAX, 65535, 65535}, {1024, 1024, 64}};
    snprintf(p->name, sizeof p->name, "emulated %s", gpu.name);
    return cudaSuccess;
}
inline cudaError_t cudaDeviceSynchronize() {
    EMULATOR_CALL("cudaDeviceSynchronize");
    return emulator::wait_for_all(), cudaSuccess;
}

// Memory

inline cudaError_t cudaMemGetInfo(size_t* free, size_t* total) {
    *free = *total = 0;
    EMULATOR_CALL("cudaMemGetInfo");
    *total = emulator::settings.memory;
    *free = *total - std::min(*total, emulator::device_used);
    return cudaSuccess;
}
template <class T>
cudaError_t cudaMalloc(T** p, size_t size) {
    *p = nullptr;
    EMULATOR_CALL("cudaMalloc");
    if (size == 0) return cudaSuccess;
    if (size > emulator::settings.memory - std::min(emulator::settings.memory, emulator::device_used))
        return emulator::error(cudaErrorMemoryAllocation);
    *p = (T*)emulator::allocate(size, true);
    return emulator::error(*p ? cudaSuccess : cudaErrorMemoryAllocation);
}
inline cudaError_t cudaFree(void* p) {
    EMULATOR_CALL("cudaFree");
    if (!p) return cudaSuccess;
    emulator::wait_for_all();
    if (emulator::release(p, true)) return cudaSuccess;
    return emulator::error(cudaErrorInvalidValue, "cudaFree of %p, which cudaMalloc did not return", p);
}
template <class T>
cudaError_t cudaMallocHost(T** p, size_t size, unsigned = 0) {
    *p = nullptr;
    EMULATOR_CALL("cudaMallocHost");
    if (size) *p = (T*)emulator::allocate(size, false);
    return emulator::error(!size || *p ? cudaSuccess : cudaErrorMemoryAllocation);
}
inline cudaError_t cudaFreeHost(void* p) {
    EMULATOR_CALL("cudaFreeHost");
    if (!p) return cudaSuccess;
    emulator::wait_for_all();
    if (emulator::release(p, false)) return cudaSuccess;
    return emulator::error(cudaErrorInvalidValue, "cudaFreeHost of %p, which cudaMallocHost did not return", p);
}

enum cudaMemcpyKind {
    cudaMemcpyHostToHost, cudaMemcpyHostToDevice, cudaMemcpyDeviceToHost, cudaMemcpyDeviceToDevice, cudaMemcpyDefault
};
inline cudaError_t cudaMemcpyAsync(void* to, const void* from, size_t n, cudaMemcpyKind kind,
                                   cudaStream_t stream = nullptr) {
    EMULATOR_CALL("cudaMemcpy");
    emulator::Allocation a;
    bool to_device = emulator::find(to, a) && a.device, from_device = emulator::find(from, a) && a.device;
    bool to_pinned = emulator::find(to, a) && !a.device, from_pinned = emulator::find(from, a) && !a.device;
    const char* names[] = {"HostToHost", "HostToDevice", "DeviceToHost", "DeviceToDevice", "Default"};
    bool says_to = kind == cudaMemcpyHostToDevice || kind == cudaMemcpyDeviceToDevice;
    bool says_from = kind == cudaMemcpyDeviceToHost || kind == cudaMemcpyDeviceToDevice;
    if (n && kind != cudaMemcpyDefault && (to_device != says_to || from_device != says_from))
        return emulator::error(cudaErrorInvalidValue, "cudaMemcpy%s from %s to %s memory", names[kind],
                               from_device ? "device" : "host", to_device ? "device" : "host");
    if (((to_device || to_pinned) && !emulator::on_device(to, n, true)) ||
        ((from_device || from_pinned) && !emulator::on_device(from, n, true)))
        return emulator::error(cudaErrorInvalidValue, "cudaMemcpy of %zu bytes past the end of an allocation", n);
    if (!emulator::known(stream)) return emulator::error(cudaErrorInvalidResourceHandle);
    // Memory that is not pinned is read before the call returns, and is written before it returns.
    if (from_device || from_pinned) {
        emulator::submit_work(stream, [=] { memmove(to, from, n); });
    } else {
        auto bytes = std::make_shared<std::vector<char>>((const char*)from, (const char*)from + n);
        emulator::submit_work(stream, [=] { memcpy(to, bytes->data(), n); });
    }
    if (emulator::settings.log && !to_device) memset(to, 0xff, n);  // nobody shall take it for a result
    if (!to_device && !to_pinned) emulator::wait_for(stream);
    return cudaSuccess;
}
inline cudaError_t cudaMemcpy(void* to, const void* from, size_t n, cudaMemcpyKind kind) {
    cudaError_t e = cudaMemcpyAsync(to, from, n, kind, nullptr);
    emulator::Call call("", false);
    if (e == cudaSuccess) emulator::wait_for(nullptr);
    return e;
}
inline cudaError_t cudaMemsetAsync(void* to, int value, size_t n, cudaStream_t stream = nullptr) {
    EMULATOR_CALL("cudaMemset");
    if (!emulator::on_device(to, n))
        return emulator::error(cudaErrorInvalidValue, "cudaMemset of %zu bytes that are not device memory", n);
    if (!emulator::known(stream)) return emulator::error(cudaErrorInvalidResourceHandle);
    emulator::submit_work(stream, [=] { memset(to, value, n); });
    return cudaSuccess;
}
inline cudaError_t cudaMemset(void* to, int value, size_t n) { return cudaMemsetAsync(to, value, n, nullptr); }

// Streams and events

enum { cudaStreamDefault = 0, cudaStreamNonBlocking = 1 };
enum { cudaEventDefault = 0, cudaEventBlockingSync = 1, cudaEventDisableTiming = 2 };

inline cudaError_t cudaStreamCreateWithFlags(cudaStream_t* stream, unsigned flags) {
    *stream = nullptr;
    EMULATOR_CALL("cudaStreamCreate");
    *stream = new CUstream_st{.blocking = flags != cudaStreamNonBlocking};
    emulator::streams.push_back(*stream);
    return cudaSuccess;
}
inline cudaError_t cudaStreamCreate(cudaStream_t* s) { return cudaStreamCreateWithFlags(s, cudaStreamDefault); }
inline cudaError_t cudaStreamDestroy(cudaStream_t stream) {
    EMULATOR_CALL("cudaStreamDestroy");
    if (!stream || !emulator::known(stream)) return emulator::error(cudaErrorInvalidResourceHandle);
    emulator::wait_for(stream);
    std::erase(emulator::streams, stream);
    delete stream;
    return cudaSuccess;
}
inline cudaError_t cudaStreamSynchronize(cudaStream_t stream) {
    EMULATOR_CALL("cudaStreamSynchronize");
    if (!emulator::known(stream)) return emulator::error(cudaErrorInvalidResourceHandle);
    return emulator::wait_for(stream), cudaSuccess;
}
inline cudaError_t cudaStreamWaitEvent(cudaStream_t stream, cudaEvent_t event, unsigned = 0) {
    EMULATOR_CALL("cudaStreamWaitEvent");
    if (!emulator::known(stream)) return emulator::error(cudaErrorInvalidResourceHandle);
    emulator::submit(stream, nullptr, event->state, event->state->recorded);
    return cudaSuccess;
}
inline cudaError_t cudaEventCreateWithFlags(cudaEvent_t* event, unsigned flags) {
    *event = nullptr;
    EMULATOR_CALL("cudaEventCreate");
    *event = new CUevent_st;
    (*event)->timing = !(flags & cudaEventDisableTiming);
    return cudaSuccess;
}
inline cudaError_t cudaEventCreate(cudaEvent_t* event) { return cudaEventCreateWithFlags(event, cudaEventDefault); }
inline cudaError_t cudaEventDestroy(cudaEvent_t event) {
    EMULATOR_CALL("cudaEventDestroy");
    delete event;
    return cudaSuccess;
}
inline cudaError_t cudaEventRecord(cudaEvent_t event, cudaStream_t stream = nullptr) {
    EMULATOR_CALL("cudaEventRecord");
    if (!emulator::known(stream)) return emulator::error(cudaErrorInvalidResourceHandle);
    auto state = event->state;
    uint64_t count = ++state->recorded;
    emulator::submit(stream, [=] {
        using namespace std::chrono;
        state->done = std::max(state->done, count);
        state->time = duration<double, std::milli>(steady_clock::now().time_since_epoch()).count();
    });
    return cudaSuccess;
}
inline cudaError_t cudaEventSynchronize(cudaEvent_t event) {
    EMULATOR_CALL("cudaEventSynchronize");
    auto state = event->state;
    uint64_t count = state->recorded;
    emulator::wait_until([=] { return state->done >= count; });
    return cudaSuccess;
}
inline cudaError_t cudaEventQuery(cudaEvent_t event) {
    EMULATOR_CALL("cudaEventQuery");
    emulator::run_one();  // so that a loop around this ends
    return event->state->done < event->state->recorded ? cudaErrorNotReady : cudaSuccess;
}
inline cudaError_t cudaEventElapsedTime(float* ms, cudaEvent_t begin, cudaEvent_t end) {
    *ms = 0;
    EMULATOR_CALL("cudaEventElapsedTime");
    if (!begin->timing || !end->timing || !begin->state->recorded || !end->state->recorded)
        return emulator::error(cudaErrorInvalidResourceHandle);
    if (begin->state->done < begin->state->recorded || end->state->done < end->state->recorded)
        return cudaErrorNotReady;
    *ms = (float)(end->state->time - begin->state->time);
    return cudaSuccess;
}

// Kernels

enum cudaFuncAttribute {
    cudaFuncAttributeMaxDynamicSharedMemorySize = 8, cudaFuncAttributePreferredSharedMemoryCarveout = 9
};
template <class Kernel>
cudaError_t cudaFuncSetAttribute(Kernel* kernel, cudaFuncAttribute attribute, int value) {
    EMULATOR_CALL("cudaFuncSetAttribute");
    if (attribute != cudaFuncAttributeMaxDynamicSharedMemorySize) return cudaSuccess;
    if (value < 0 || (size_t)value > emulator::settings.gpu.shared_block)
        return emulator::error(cudaErrorInvalidValue, "cudaFuncSetAttribute: %d bytes of shared memory; %zu is most",
                               value, emulator::settings.gpu.shared_block);
    emulator::dynamic_most[(const void*)kernel] = value;
    return cudaSuccess;
}

// ====================================================================================================================
// 7 · Device functions

// Barriers

inline void __syncthreads(emulator::Where where = emulator::here()) {
    char nothing;
    emulator::block_collective("__syncthreads", nothing, where, [](auto&) {});
}
#define EMULATOR_SYNCTHREADS(name, first, step) \
    inline int name(int predicate, emulator::Where where = emulator::here()) { \
        emulator::block_collective(#name, predicate, where, [](auto& all) { \
            int result = first; \
            for (int* p : all) result = step; \
            for (int* p : all) *p = result; \
        }); \
        return predicate; \
    }
EMULATOR_SYNCTHREADS(__syncthreads_count, 0, result + (*p != 0))
EMULATOR_SYNCTHREADS(__syncthreads_and, 1, result && *p)
EMULATOR_SYNCTHREADS(__syncthreads_or, 0, result || *p)

EMULATOR_OWN inline void __syncwarp(unsigned mask = ~0u, emulator::Where where = emulator::here()) {
    emulator::Thread* mine = emulator::self;
    // A warp that its block does not fill has no more lanes.
    unsigned rest = mine->block->size - mine->number / 32 * 32;
    if (rest < 32) mask &= (1u << rest) - 1;
    emulator::collective("__syncwarp", mask, mine, where, [](emulator::Thread** all[32]) {
        uint32_t met[32] = {};
        for (int i = 0; i < 32; i++)
            for (int j = 0; all[i] && j < 32; j++) met[j] = std::max(met[j], (*all[i])->met[j]);
        emulator::now++;
        for (int i = 0; i < 32; i++)
            if (all[i]) met[i] = emulator::now;
        for (int i = 0; i < 32; i++)
            if (all[i]) std::copy(met, met + 32, (*all[i])->met);
    });
}

// Shuffles. What a lane outside of the mask would have given is bytes of 0xff.

namespace emulator {
template <class T>
EMULATOR_OWN T shuffle(const char* name, unsigned mask, T value, int from, const Where& where) {
    struct Arguments { T in, out; int from; } mine = {value, value, from};
    collective(name, mask, mine, where, [](Arguments* (&all)[WARP]) {
        for (Arguments* a : all) {
            if (a && all[a->from]) a->out = all[a->from]->in;
            else if (a) memset((void*)&a->out, 0xff, sizeof(T));
        }
    });
    return mine.out;
}
EMULATOR_OWN inline int lane() { return (int)self->lane(); }
}  // namespace emulator

template <class T>
T __shfl_sync(unsigned mask, T value, int source, int width = 32, emulator::Where where = emulator::here()) {
    int base = emulator::lane() & ~(width - 1);
    return emulator::shuffle("__shfl_sync", mask, value, base | (source & (width - 1)), where);
}
template <class T>
T __shfl_xor_sync(unsigned mask, T value, int bits, int width = 32, emulator::Where where = emulator::here()) {
    int lane = emulator::lane(), from = lane ^ bits;
    return emulator::shuffle("__shfl_xor_sync", mask, value, from > (lane | (width - 1)) ? lane : from, where);
}
template <class T>
T __shfl_up_sync(unsigned mask, T value, unsigned delta, int width = 32, emulator::Where where = emulator::here()) {
    int lane = emulator::lane(), from = lane - (int)delta;
    return emulator::shuffle("__shfl_up_sync", mask, value, from < (lane & ~(width - 1)) ? lane : from, where);
}
template <class T>
T __shfl_down_sync(unsigned mask, T value, unsigned delta, int width = 32, emulator::Where where = emulator::here()) {
    int lane = emulator::lane(), from = lane + (int)delta;
    return emulator::shuffle("__shfl_down_sync", mask, value, from > (lane | (width - 1)) ? lane : from, where);
}

// Votes and reductions: one result for all lanes, by `step` from each lane's a.

namespace emulator {
template <class T, class Step>
EMULATOR_OWN T reduce(const char* name, unsigned mask, T value, const Where& where, Step step) {
    collective(name, mask, value, where, [step](T* (&all)[WARP]) {
        T* result = nullptr;
        for (unsigned i = 0; i < WARP; i++)
            if (all[i]) result ? (void)(*result = step(*result, *all[i])) : (void)(result = all[i]);
        for (T* a : all)
            if (a) *a = *result;
    });
    return value;
}
}  // namespace emulator

#define EMULATOR_REDUCE(T, name, step) \
    inline T name(unsigned mask, T value, emulator::Where where = emulator::here()) { \
        return emulator::reduce(#name, mask, value, where, [](T a, T b) -> T { return step; }); \
    }
EMULATOR_REDUCE(int, __reduce_add_sync, (int)((unsigned)a + (unsigned)b))
EMULATOR_REDUCE(int, __reduce_min_sync, std::min(a, b))
EMULATOR_REDUCE(int, __reduce_max_sync, std::max(a, b))
EMULATOR_REDUCE(unsigned, __reduce_add_sync, a + b)
EMULATOR_REDUCE(unsigned, __reduce_min_sync, std::min(a, b))
EMULATOR_REDUCE(unsigned, __reduce_max_sync, std::max(a, b))
EMULATOR_REDUCE(unsigned, __reduce_and_sync, a & b)
EMULATOR_REDUCE(unsigned, __reduce_or_sync, a | b)
EMULATOR_REDUCE(unsigned, __reduce_xor_sync, a ^ b)

inline unsigned __ballot_sync(unsigned mask, int predicate, emulator::Where where = emulator::here()) {
    unsigned mine = predicate ? 1u << emulator::lane() : 0;
    return emulator::reduce("__ballot_sync", mask, mine, where, [](unsigned a, unsigned b) { return a | b; });
}
inline int __any_sync(unsigned mask, int predicate, emulator::Where where = emulator::here()) {
    return emulator::reduce("__any_sync", mask, (int)(predicate != 0), where, [](int a, int b) { return a | b; });
}
inline int __all_sync(unsigned mask, int predicate, emulator::Where where = emulator::here()) {
    return emulator::reduce("__all_sync", mask, (int)(predicate != 0), where, [](int a, int b) { return a & b; });
}

// Atomics, on integers. There is none that adds floats: its result would depend on the order of threads.

namespace emulator {
template <class T, class Step>
EMULATOR_OWN T atomic(T* p, const void* caller, Step step) {
    check_own(p, sizeof(T), ATOMIC_ADD, caller);
    T old = *p;
    *p = step(old);
    return old;
}
}  // namespace emulator
#define EMULATOR_ATOMIC(name, result) \
    template <class T> requires std::is_integral_v<T> \
    __attribute__((noinline)) T name(T* p, std::type_identity_t<T> value) { \
        auto step = [=]([[maybe_unused]] T old) -> T { return (T)(result); }; \
        return emulator::atomic(p, __builtin_return_address(0), step); \
    }
EMULATOR_ATOMIC(atomicAdd, old + value)
EMULATOR_ATOMIC(atomicSub, old - value)
EMULATOR_ATOMIC(atomicMin, std::min(old, value))
EMULATOR_ATOMIC(atomicMax, std::max(old, value))
EMULATOR_ATOMIC(atomicAnd, old & value)
EMULATOR_ATOMIC(atomicOr, old | value)
EMULATOR_ATOMIC(atomicXor, old ^ value)
EMULATOR_ATOMIC(atomicExch, value)
EMULATOR_ATOMIC(atomicInc, old >= value ? 0 : old + 1)
template <class T> requires std::is_integral_v<T>
__attribute__((noinline)) T atomicCAS(T* p, std::type_identity_t<T> compare, std::type_identity_t<T> value) {
    return emulator::atomic(p, __builtin_return_address(0), [=](T old) { return old == compare ? value : old; });
}
float atomicAdd(float*, float) = delete;
double atomicAdd(double*, double) = delete;

// Loads, stores, numbers

template <class T> T __ldg(const T* p) { return *p; }
template <class T> T __ldcs(const T* p) { return *p; }
template <class T> T __ldcg(const T* p) { return *p; }
template <class T> T __ldca(const T* p) { return *p; }
template <class T> void __stcs(T* p, std::type_identity_t<T> value) { *p = value; }
template <class T> void __stcg(T* p, std::type_identity_t<T> value) { *p = value; }
template <class T> void __stwt(T* p, std::type_identity_t<T> value) { *p = value; }

inline float __int_as_float(int x) { return std::bit_cast<float>(x); }
inline int __float_as_int(float x) { return std::bit_cast<int>(x); }
inline float __uint_as_float(unsigned x) { return std::bit_cast<float>(x); }
inline unsigned __float_as_uint(float x) { return std::bit_cast<unsigned>(x); }
inline int __popc(unsigned x) { return std::popcount(x); }
inline int __popcll(unsigned long long x) { return std::popcount(x); }
inline int __clz(int x) { return std::countl_zero((unsigned)x); }
inline int __ffs(int x) { return __builtin_ffs(x); }
inline unsigned __brev(unsigned x) {
    unsigned y = 0;
    for (int i = 0; i < 32; i++) y |= (x >> i & 1) << (31 - i);
    return y;
}
inline unsigned __umulhi(unsigned a, unsigned b) { return (unsigned)((uint64_t)a * b >> 32); }
inline int __mul24(int a, int b) { return a * b; }

using std::max;
using std::min;
inline float max(float a, float b) { return fmaxf(a, b); }
inline float min(float a, float b) { return fminf(a, b); }
inline unsigned max(int a, unsigned b) { return std::max((unsigned)a, b); }
inline unsigned min(int a, unsigned b) { return std::min((unsigned)a, b); }
inline unsigned max(unsigned a, int b) { return std::max(a, (unsigned)b); }
inline unsigned min(unsigned a, int b) { return std::min(a, (unsigned)b); }

namespace emulator {
// f(x) with a relative error of at most 2^-bits, which as an interpolation's waxes and wanes with x; without subnormals
EMULATOR_OWN inline float approximate(float (*f)(float), float x, int bits) {
    const float y = f(x);
    if (!settings.approximate || x == 0) return y;
    if (fabsf(y) < 0x1p-126f) return 0;
    const double most = ldexp(1, -bits) - 0x1p-23, wave = std::isfinite(x) ? sin(100.0 * x + (double)settings.seed) : 0;
    return (float)(y * (1 + most * wave));
}
EMULATOR_OWN inline float tanh_approx(float x) { return approximate(tanhf, x, 11); }
}  // namespace emulator
// ex2.approx.ftz.f32
EMULATOR_OWN inline float exp2_approx(float x) { return emulator::approximate(exp2f, x, 22); }

// Some of these names are declared, but not defined, by the C library: hence macros.
#define __expf(x) ::emulator::approximate(expf, x, 21)
#define __exp2f(x) ::emulator::approximate(exp2f, x, 22)
#define __exp10f(x) ::emulator::approximate(exp10f, x, 21)
#define __logf(x) logf(x)
#define __log2f(x) log2f(x)
#define __log10f(x) log10f(x)
#define __sinf(x) sinf(x)
#define __cosf(x) cosf(x)
#define __tanf(x) tanf(x)
#define __powf(x, y) powf(x, y)
inline float rsqrtf(float x) { return 1 / sqrtf(x); }
inline float __frsqrt_rn(float x) { return 1 / sqrtf(x); }
inline float __fsqrt_rn(float x) { return sqrtf(x); }
inline float __frcp_rn(float x) { return 1 / x; }
inline float __fdividef(float x, float y) { return x / y; }
inline float __fdiv_rn(float x, float y) { return x / y; }
inline float __fmaf_rn(float x, float y, float z) { return fmaf(x, y, z); }
inline float __saturatef(float x) { return fminf(fmaxf(x, 0), 1); }
// Never contracted into a fused multiply-add.
__attribute__((noinline)) inline float __fmul_rn(float x, float y) { return x * y; }
__attribute__((noinline)) inline float __fadd_rn(float x, float y) { return x + y; }
__attribute__((noinline)) inline float __fsub_rn(float x, float y) { return x - y; }

inline int __float2int_rn(float x) { return (int)lrintf(x); }
inline int __float2int_rz(float x) { return (int)x; }
inline float __int2float_rn(int x) { return (float)x; }

EMULATOR_OWN inline void __trap(emulator::Where where = emulator::here()) {
    emulator::fail(emulator::self, "__trap() at %s:%u", where.file, where.line);
}
inline size_t __cvta_generic_to_shared(const void* p) { return (size_t)p; }

// bf16: the upper half of a float. Arithmetic on two of them rounds its result.

struct __nv_bfloat16 {
    unsigned short __x;

    __nv_bfloat16() = default;
    __nv_bfloat16(float x) {  // to the nearest, ties to even
        uint32_t b = std::bit_cast<uint32_t>(x);
        __x = (unsigned short)(x != x ? 0x7fff : (b + 0x7fff + (b >> 16 & 1)) >> 16);
    }
    __nv_bfloat16(double x) : __nv_bfloat16((float)x) {}
    __nv_bfloat16(int x) : __nv_bfloat16((float)x) {}
    operator float() const { return std::bit_cast<float>((uint32_t)__x << 16); }
};
using nv_bfloat16 = __nv_bfloat16;
struct alignas(4) __nv_bfloat162 {
    __nv_bfloat16 x, y;
};
using nv_bfloat162 = __nv_bfloat162;

#define EMULATOR_BF16(op) \
    inline __nv_bfloat16 operator op(__nv_bfloat16 a, __nv_bfloat16 b) { return (float)a op (float)b; } \
    inline __nv_bfloat162 operator op(__nv_bfloat162 a, __nv_bfloat162 b) { return {a.x op b.x, a.y op b.y}; } \
    inline __nv_bfloat16& operator op##=(__nv_bfloat16& a, __nv_bfloat16 b) { return a = a op b; }
EMULATOR_BF16(+)
EMULATOR_BF16(-)
EMULATOR_BF16(*)
EMULATOR_BF16(/)
inline __nv_bfloat16 operator-(__nv_bfloat16 a) { return -(float)a; }
inline __nv_bfloat16 __float2bfloat16(float x) { return x; }
inline __nv_bfloat16 __float2bfloat16_rn(float x) { return x; }
inline float __bfloat162float(__nv_bfloat16 x) { return x; }
inline __nv_bfloat162 __floats2bfloat162_rn(float x, float y) { return {x, y}; }
inline __nv_bfloat162 __float22bfloat162_rn(float2 v) { return {v.x, v.y}; }
inline __nv_bfloat162 __float2bfloat162_rn(float x) { return {x, x}; }
inline __nv_bfloat162 __halves2bfloat162(__nv_bfloat16 x, __nv_bfloat16 y) { return {x, y}; }
inline __nv_bfloat162 __bfloat162bfloat162(__nv_bfloat16 x) { return {x, x}; }
inline float2 __bfloat1622float2(__nv_bfloat162 v) { return {v.x, v.y}; }
inline float __low2float(__nv_bfloat162 v) { return v.x; }
inline float __high2float(__nv_bfloat162 v) { return v.y; }
inline __nv_bfloat16 __low2bfloat16(__nv_bfloat162 v) { return v.x; }
inline __nv_bfloat16 __high2bfloat16(__nv_bfloat162 v) { return v.y; }
inline __nv_bfloat16 __ushort_as_bfloat16(unsigned short x) { return std::bit_cast<__nv_bfloat16>(x); }
inline unsigned short __bfloat16_as_ushort(__nv_bfloat16 x) { return x.__x; }
inline __nv_bfloat16 __hadd(__nv_bfloat16 a, __nv_bfloat16 b) { return a + b; }
inline __nv_bfloat16 __hmul(__nv_bfloat16 a, __nv_bfloat16 b) { return a * b; }
inline __nv_bfloat162 __hadd2(__nv_bfloat162 a, __nv_bfloat162 b) { return a + b; }
inline __nv_bfloat162 __hmul2(__nv_bfloat162 a, __nv_bfloat162 b) { return a * b; }

// ====================================================================================================================
// 8 · Tensor cores

namespace emulator {
using float8 __attribute__((vector_size(32))) = float;

inline float low(uint32_t pair) { return std::bit_cast<float>(pair << 16); }
inline float high(uint32_t pair) { return std::bit_cast<float>(pair & 0xffff0000u); }

struct MmaArguments {
    float* d;
    const uint32_t *a, *b;
};
// What lane 4·g + t holds: of a, rows g and g+8, columns 2t, 2t+1, 2t+8, 2t+9; of b, column g, rows 2t, 2t+1, 2t+8,
// 2t+9; of d, rows g and g+8, columns 2t, 2t+1.
EMULATOR_OWN inline void mma(MmaArguments* all[WARP]) {
    float a[16][16];        // [column][row]
    float8 b[16], d[16];    // [row]
    for (int lane = 0; lane < 32; lane++) {
        int g = lane / 4, t = lane % 4;
        for (int i = 0; i < 4; i++) {
            int row = g + i % 2 * 8, column = 2 * t + i / 2 * 8;
            a[column][row] = low(all[lane]->a[i]), a[column + 1][row] = high(all[lane]->a[i]);
            d[g + i / 2 * 8][2 * t + i % 2] = all[lane]->d[i];
        }
        for (int i = 0; i < 2; i++)
            b[2 * t + 8 * i][g] = low(all[lane]->b[i]), b[2 * t + 8 * i + 1][g] = high(all[lane]->b[i]);
    }
    for (int row = 0; row < 16; row++) {
        float8 sum = d[row];
        for (int k = 0; k < 16; k++) sum += a[k][row] * b[k];
        d[row] = sum;
    }
    for (int lane = 0; lane < 32; lane++)
        for (int i = 0; i < 4; i++) all[lane]->d[i] = d[lane / 4 + i / 2 * 8][lane % 4 * 2 + i % 2];
}

struct LdmatrixArguments {
    uint32_t* r;
    const uint16_t* row;
};
template <bool TRANS>
EMULATOR_OWN void ldmatrix(const char* name, uint32_t (&r)[4], const void* row, const void* caller,
                           const Where& where) {
    Unchecked own;
    if (!in_shared(row, 16)) fail(self, "%s at %s: its row is not in shared memory", name, text(where).c_str());
    if ((uintptr_t)row % 16) fail(self, "%s at %s: misaligned: %p", name, text(where).c_str(), row);
    check_own(row, 16, READ, caller);
    LdmatrixArguments mine = {r, (const uint16_t*)row};
    collective(name, ~0u, mine, where, [](LdmatrixArguments* all[WARP]) {
        for (int lane = 0; lane < 32; lane++)
            for (int i = 0; i < 4; i++) {  // four matrices, their rows' addresses from eight lanes each
                int g = lane / 4, t = lane % 4 * 2;
                auto at = [&](int row, int column) { return (uint32_t)all[8 * i + row]->row[column]; };
                all[lane]->r[i] = TRANS ? at(t, g) | at(t + 1, g) << 16 : at(g, t) | at(g, t + 1) << 16;
            }
    });
}

}  // namespace emulator

// d += a b: mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32
inline void mma_m16n8k16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2],
                         emulator::Where where = emulator::here()) {
    emulator::MmaArguments mine = {d, a, b};
    emulator::collective("mma_m16n8k16", ~0u, mine, where, emulator::mma);
}

// ldmatrix.sync.aligned.m8n8.x4.shared.b16: lane 8·i + j gives the address of matrix i's row j.
__attribute__((noinline)) inline void ldmatrix_x4(uint32_t (&r)[4], const void* shared_row,
                                                  emulator::Where where = emulator::here()) {
    emulator::ldmatrix<false>("ldmatrix_x4", r, shared_row, __builtin_return_address(0), where);
}
__attribute__((noinline)) inline void ldmatrix_x4_trans(uint32_t (&r)[4], const void* shared_row,
                                                        emulator::Where where = emulator::here()) {
    emulator::ldmatrix<true>("ldmatrix_x4_trans", r, shared_row, __builtin_return_address(0), where);
}

// cp.async.cg.shared.global, 16 bytes, zeros where not valid. Until it lands, at its wait, its target holds NaN.
EMULATOR_OWN __attribute__((noinline)) inline void cp_async_16(void* shared, const void* global, bool valid,
                                                  emulator::Where where = emulator::here()) {
    emulator::Unchecked own;
    emulator::Thread& t = *emulator::self;
    const void* caller = __builtin_return_address(0);
    const char* wrong = (uintptr_t)shared % 16                     ? "misaligned: its target is not at a multiple of 16"
                        : !emulator::in_shared(shared, 16)         ? "its target is not in shared memory"
                        : valid && (uintptr_t)global % 16          ? "misaligned: its source is not at a multiple of 16"
                        : valid && !emulator::on_device(global, 16) ? "its source is not in device memory"
                                                                   : nullptr;
    if (wrong) emulator::fail(&t, "cp_async_16 at %s: %s", emulator::text(where).c_str(), wrong);
    emulator::check_own(shared, 16, emulator::WRITE, caller);
    memset(shared, 0xff, 16);
    uint32_t pc = EMULATOR_CHECKED ? emulator::place_in_program(caller) : 0;
    t.copies.push_back({(char*)shared, valid ? (const char*)global : nullptr, pc});
}
EMULATOR_OWN inline void cp_async_wait() {  // for all copies of this thread
    emulator::Unchecked own;
    for (const emulator::Copy& c : emulator::self->copies) {
        if (EMULATOR_CHECKED && c.from) emulator::check(c.from, 16, emulator::READ, 1, c.pc);
        if (EMULATOR_CHECKED) emulator::check(c.to, 16, emulator::WRITE, 1, c.pc);
        c.from ? memcpy(c.to, c.from, 16) : memset(c.to, 0, 16);
    }
    emulator::self->copies.clear();
}

// ====================================================================================================================
// 9 · Matrix products

// The part of cublasLt.h that takes a product of real matrices. Values are cuBLASLt's.
#define EMULATOR_STATUSES(E) \
    E(CUBLAS_STATUS_SUCCESS, 0) E(CUBLAS_STATUS_INVALID_VALUE, 7) E(CUBLAS_STATUS_ARCH_MISMATCH, 8) \
    E(CUBLAS_STATUS_EXECUTION_FAILED, 13) E(CUBLAS_STATUS_INTERNAL_ERROR, 14) E(CUBLAS_STATUS_NOT_SUPPORTED, 15)
enum cublasStatus_t {
#define EMULATOR_STATUS(name, code) name = code,
    EMULATOR_STATUSES(EMULATOR_STATUS)
#undef EMULATOR_STATUS
};
#define EMULATOR_STATUS(name, code) if (s == name) return #name;
inline const char* cublasLtGetStatusName(cublasStatus_t s) { EMULATOR_STATUSES(EMULATOR_STATUS) return "unknown"; }
#undef EMULATOR_STATUS
enum cudaDataType { CUDA_R_32F = 0, CUDA_R_16BF = 14 };
enum cublasComputeType_t { CUBLAS_COMPUTE_32F = 68 };
enum cublasOperation_t { CUBLAS_OP_N, CUBLAS_OP_T };
enum cublasLtEpilogue_t {
    CUBLASLT_EPILOGUE_DEFAULT = 1,
    CUBLASLT_EPILOGUE_BIAS = 4,
    CUBLASLT_EPILOGUE_GELU_BIAS = 36,
    CUBLASLT_EPILOGUE_GELU_AUX_BIAS = 164,
    CUBLASLT_EPILOGUE_DGELU = 192
};
enum cublasLtMatmulDescAttributes_t {
    CUBLASLT_MATMUL_DESC_TRANSA = 3,
    CUBLASLT_MATMUL_DESC_TRANSB,
    CUBLASLT_MATMUL_DESC_EPILOGUE = 7,
    CUBLASLT_MATMUL_DESC_BIAS_POINTER,
    CUBLASLT_MATMUL_DESC_EPILOGUE_AUX_POINTER = 11,
    CUBLASLT_MATMUL_DESC_EPILOGUE_AUX_LD,
    CUBLASLT_MATMUL_DESC_EPILOGUE_AUX_DATA_TYPE = 22,
    CUBLASLT_MATMUL_DESC_BIAS_DATA_TYPE = 26
};
enum cublasLtMatmulPreferenceAttributes_t {
    CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES = 1,
    CUBLASLT_MATMUL_PREF_REDUCTION_SCHEME_MASK = 3,
    CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_A_BYTES = 5,
    CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_B_BYTES,
    CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_C_BYTES,
    CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_D_BYTES
};
enum cublasLtReductionScheme_t { CUBLASLT_REDUCTION_SCHEME_COMPUTE_TYPE = 2 };
struct cublasLtMatmulAlgo_t {
    uint64_t data[8];  // of the stand-in: which product, which algorithm, the alignment and workspace that it needs
};
struct cublasLtMatmulHeuristicResult_t {
    cublasLtMatmulAlgo_t algo;
    size_t workspaceSize;
    cublasStatus_t state;
    float wavesCount;
    int reserved[4];
};

namespace emulator {

struct MatmulOperation {
    cublasOperation_t trans[2] = {CUBLAS_OP_N, CUBLAS_OP_N};
    cublasLtEpilogue_t epilogue = CUBLASLT_EPILOGUE_DEFAULT;
    const void* bias = nullptr;
    void* aux = nullptr;
    int64_t aux_ld = 0;
    cudaDataType bias_type = CUDA_R_32F, aux_type = CUDA_R_32F;
};
struct MatrixLayout {
    cudaDataType type;
    uint64_t rows, columns;
    int64_t ld;
};
struct MatmulPreference {
    uint64_t workspace = 0;
    uint32_t reductions = 0, alignment[4] = {256, 256, 256, 256};  // of A, B, C, D
};

template <class T>
void set_attribute(T& to, const void* from, size_t size) {
    if (size != sizeof to) fail(nullptr, "cuBLASLt: an attribute of %zu bytes is set to %zu", sizeof to, size);
    memcpy(&to, from, size);
}

struct Matmul {
    cudaDataType d_type, ab_type;
    cublasLtEpilogue_t epilogue;
    bool transA, transB;
    int m, n, k, lda, ldb, ldd;
    int algorithm;
    const void *A, *B, *C;
    void *D, *aux;
    const void* bias;
};

inline size_t size_of(cudaDataType type) { return type == CUDA_R_32F ? 4 : 2; }
inline int number_of(cublasLtEpilogue_t epilogue) {  // 0: none, 1: BIAS, 2: GELU_BIAS, 3: GELU_AUX_BIAS, 4: DGELU
    switch (epilogue) {
        case CUBLASLT_EPILOGUE_DEFAULT: return 0;
        case CUBLASLT_EPILOGUE_BIAS: return 1;
        case CUBLASLT_EPILOGUE_GELU_BIAS: return 2;
        case CUBLASLT_EPILOGUE_GELU_AUX_BIAS: return 3;
        case CUBLASLT_EPILOGUE_DGELU: return 4;
    }
    fail(nullptr, "cuBLASLt: epilogue %d is not there", (int)epilogue);
}

// The product that operation and layouts describe, without its pointers
inline Matmul described(const MatmulOperation& o, const MatrixLayout& A, const MatrixLayout& B, const MatrixLayout& C,
                        const MatrixLayout& D) {
    Matmul p = {};
    p.d_type = D.type, p.ab_type = A.type, p.epilogue = o.epilogue;
    p.transA = o.trans[0] == CUBLAS_OP_T, p.transB = o.trans[1] == CUBLAS_OP_T;
    p.m = (int)D.rows, p.n = (int)D.columns, p.k = (int)(p.transA ? A.rows : A.columns);
    p.lda = (int)A.ld, p.ldb = (int)B.ld, p.ldd = (int)D.ld;
    const int a_rows = p.transA ? p.k : p.m, b_rows = p.transB ? p.n : p.k;
    const bool fits = (int)(p.transA ? A.columns : A.rows) == p.m && (int)(p.transB ? B.rows : B.columns) == p.n &&
                      (int)(p.transB ? B.columns : B.rows) == p.k && B.type == A.type && C.type == D.type &&
                      C.rows == D.rows && C.columns == D.columns && C.ld == D.ld;
    if (!fits || p.m <= 0 || p.n <= 0 || p.k <= 0 || p.lda < a_rows || p.ldb < b_rows || p.ldd < p.m)
        fail(nullptr, "cuBLASLt: matrices do not fit: m %d, n %d, k %d, lda %d, ldb %d, ldd %d", p.m, p.n, p.k, p.lda,
             p.ldb, p.ldd);
    if (o.bias && o.bias_type != p.d_type) fail(nullptr, "cuBLASLt: the bias has another type than D");
    if (o.aux && (o.aux_type != p.d_type || o.aux_ld != p.ldd))
        fail(nullptr, "cuBLASLt: the auxiliary matrix has another type or leading dimension than D");
    return p;
}

EMULATOR_OWN inline uint64_t hash(std::initializer_list<uint64_t> values) {
    Order mixed = {0};
    for (uint64_t v : values) mixed.state = mixed.below(UINT64_MAX) ^ v;
    return mixed.below(UINT64_MAX);
}
inline uint64_t hash(const Matmul& p) {
    return hash({(uint64_t)p.d_type, (uint64_t)p.ab_type, (uint64_t)p.epilogue, (uint64_t)p.transA, (uint64_t)p.transB,
                 (uint64_t)p.m, (uint64_t)p.n, (uint64_t)p.k, (uint64_t)p.lda, (uint64_t)p.ldb, (uint64_t)p.ldd});
}

inline bool lacks_epilogue(const Matmul& p) { return p.epilogue == CUBLASLT_EPILOGUE_DGELU && settings.gpu.major < 9; }

inline bool refuses(const Matmul& p, uint64_t algorithm, uint64_t alignment) {
    const int n = settings.refuse_alignment, size = (int)size_of(p.ab_type);
    return hash({settings.seed, hash(p), alignment, algorithm, 1}) % 100 < (uint64_t)settings.refuse_percent ||
           (settings.refuse_k && p.k % settings.refuse_k) || settings.refuse_epilogues >> number_of(p.epilogue) & 1 ||
           lacks_epilogue(p) ||
           (n && (p.lda * size % n || p.ldb * size % n || p.ldd * (int)size_of(p.d_type) % n ||
                  alignment < (uint64_t)std::min(n, 16)));
}
inline bool refuses_at_launch(const Matmul& p, uint64_t algorithm, uint64_t alignment) {
    const uint64_t draw = hash({settings.seed, hash(p), alignment, 2}) % 3;
    return !lacks_epilogue(p) && (draw < 2 ? draw : hash({settings.seed, hash(p), alignment, algorithm, 3}) % 2);
}

inline long long searches = 0, refusals = 0;  // how often the heuristic was asked; refused launches
// Products for which the heuristic offered what would not be refused, but that were never launched successfully
inline std::map<std::pair<uint64_t, uint64_t>, bool> given_up;

EMULATOR_OWN inline float element(const void* p, cudaDataType type, size_t i) {
    return type == CUDA_R_32F ? ((const float*)p)[i] : low(((const uint16_t*)p)[i]);
}
EMULATOR_OWN inline void set_element(void* p, cudaDataType type, size_t i, float x) {
    if (type == CUDA_R_32F) ((float*)p)[i] = x;
    else ((__nv_bfloat16*)p)[i] = x;
}

// Algorithm i splits k into i + 1 parts. Each is summed in order, then the parts are, those of algorithms 2, 3, 6 and 7
// from the last to the first. A part of an odd algorithm has every (i + 1)th 16 terms, else neighbours.
EMULATOR_OWN inline void run_matmul(const Matmul& p) {
    constexpr int ROWS = 16, COLUMNS = 4;
    using floats __attribute__((vector_size(ROWS * 4))) = float;
    static std::vector<float> a_storage, b_storage;
    size_t panels = (size_t)(p.m + ROWS - 1) / ROWS, groups = (size_t)(p.n + COLUMNS - 1) / COLUMNS, k = (size_t)p.k;
    a_storage.assign(panels * ROWS * k + ROWS, 0);
    b_storage.assign(groups * COLUMNS * k, 0);
    float* a = (float*)(((uintptr_t)a_storage.data() + 4 * ROWS - 1) / (4 * ROWS) * (4 * ROWS));  // panels of (k, ROWS)
    float* b = b_storage.data();                                                               // groups of (k, COLUMNS)
    for (size_t l = 0; l < k; l++)
        for (size_t i = 0; i < (size_t)p.m; i++)
            a[(i / ROWS * k + l) * ROWS + i % ROWS] = element(p.A, p.ab_type, p.transA ? l + i * p.lda : i + l * p.lda);
    for (size_t j = 0; j < (size_t)p.n; j++)
        for (size_t l = 0; l < k; l++)
            b[(j / COLUMNS * k + l) * COLUMNS + j % COLUMNS] =
                element(p.B, p.ab_type, p.transB ? j + l * p.ldb : l + j * p.ldb);

    const float root = 0.7978845608028654f, cubic = 0.044715f;  // GELU by tanh
    const size_t parts = (size_t)p.algorithm + 1;
    const bool every_16 = p.algorithm & 1, backwards = p.algorithm & 2;
    for (size_t panel = 0; panel < panels; panel++)
        for (size_t group = 0; group < groups; group++) {
            const floats* column = (const floats*)(a + panel * k * ROWS);
            const float* row = b + group * k * COLUMNS;
            floats sums[COLUMNS] = {};
            for (size_t i = 0; i < parts; i++) {
                const size_t part = backwards ? parts - 1 - i : i;
                const size_t first = every_16 ? 16 * part : part * k / parts, step = every_16 ? 16 * parts : k;
                const size_t length = every_16 ? 16 : (part + 1) * k / parts - first;
                floats s0 = {}, s1 = {}, s2 = {}, s3 = {};
                for (size_t begin = first; begin < k; begin += step)
                    for (size_t l = begin; l < std::min(k, begin + length); l++) {
                        const floats x = column[l];
                        const float* y = row + l * COLUMNS;
                        s0 += x * y[0], s1 += x * y[1], s2 += x * y[2], s3 += x * y[3];
                    }
                sums[0] += s0, sums[1] += s1, sums[2] += s2, sums[3] += s3;
            }
            for (size_t j = group * COLUMNS; j < std::min((size_t)p.n, (group + 1) * COLUMNS); j++)
                for (size_t i = panel * ROWS; i < std::min((size_t)p.m, (panel + 1) * ROWS); i++) {
                    size_t at = i + j * p.ldd;
                    float x = sums[j % COLUMNS][i % ROWS];
                    if (p.C) x += element(p.C, p.d_type, at);
                    if (p.bias) x += element(p.bias, p.d_type, i);
                    if (p.epilogue == CUBLASLT_EPILOGUE_GELU_AUX_BIAS) set_element(p.aux, p.d_type, at, x);
                    if (p.epilogue == CUBLASLT_EPILOGUE_GELU_BIAS || p.epilogue == CUBLASLT_EPILOGUE_GELU_AUX_BIAS) {
                        x = 0.5f * x * (1 + tanh_approx(root * (x + cubic * x * x * x)));
                    } else if (p.epilogue == CUBLASLT_EPILOGUE_DGELU) {
                        float y = element(p.aux, p.d_type, at), t = tanh_approx(root * (y + cubic * y * y * y));
                        x *= 0.5f * (1 + t) + 0.5f * y * (1 - t * t) * root * (1 + 3 * cubic * y * y);
                    }
                    set_element(p.D, p.d_type, at, x);
                }
        }
}
}  // namespace emulator

using cublasLtHandle_t = int*;
using cublasLtMatmulDesc_t = emulator::MatmulOperation*;
using cublasLtMatrixLayout_t = emulator::MatrixLayout*;
using cublasLtMatmulPreference_t = emulator::MatmulPreference*;

inline cublasStatus_t cublasLtCreate(cublasLtHandle_t* handle) {
    static int only_one;
    *handle = &only_one;
    return CUBLAS_STATUS_SUCCESS;
}
inline cublasStatus_t cublasLtMatmulDescCreate(cublasLtMatmulDesc_t* o, cublasComputeType_t, cudaDataType) {
    *o = new emulator::MatmulOperation;
    return CUBLAS_STATUS_SUCCESS;
}
inline cublasStatus_t cublasLtMatmulDescDestroy(cublasLtMatmulDesc_t o) { return delete o, CUBLAS_STATUS_SUCCESS; }
inline cublasStatus_t cublasLtMatmulDescSetAttribute(cublasLtMatmulDesc_t o, cublasLtMatmulDescAttributes_t attribute,
                                                     const void* value, size_t size) {
    auto set = [&](auto& to) { emulator::set_attribute(to, value, size); };
    switch (attribute) {
        case CUBLASLT_MATMUL_DESC_TRANSA: set(o->trans[0]); break;
        case CUBLASLT_MATMUL_DESC_TRANSB: set(o->trans[1]); break;
        case CUBLASLT_MATMUL_DESC_EPILOGUE: set(o->epilogue); break;
        case CUBLASLT_MATMUL_DESC_BIAS_POINTER: set(o->bias); break;
        case CUBLASLT_MATMUL_DESC_BIAS_DATA_TYPE: set(o->bias_type); break;
        case CUBLASLT_MATMUL_DESC_EPILOGUE_AUX_POINTER: set(o->aux); break;
        case CUBLASLT_MATMUL_DESC_EPILOGUE_AUX_LD: set(o->aux_ld); break;
        case CUBLASLT_MATMUL_DESC_EPILOGUE_AUX_DATA_TYPE: set(o->aux_type); break;
    }
    return CUBLAS_STATUS_SUCCESS;
}
inline cublasStatus_t cublasLtMatrixLayoutCreate(cublasLtMatrixLayout_t* layout, cudaDataType type, uint64_t rows,
                                                 uint64_t columns, int64_t ld) {
    *layout = new emulator::MatrixLayout{type, rows, columns, ld};
    return CUBLAS_STATUS_SUCCESS;
}
inline cublasStatus_t cublasLtMatrixLayoutDestroy(cublasLtMatrixLayout_t layout) {
    return delete layout, CUBLAS_STATUS_SUCCESS;
}
inline cublasStatus_t cublasLtMatmulPreferenceCreate(cublasLtMatmulPreference_t* p) {
    *p = new emulator::MatmulPreference;
    return CUBLAS_STATUS_SUCCESS;
}
inline cublasStatus_t cublasLtMatmulPreferenceDestroy(cublasLtMatmulPreference_t p) {
    return delete p, CUBLAS_STATUS_SUCCESS;
}
inline cublasStatus_t cublasLtMatmulPreferenceSetAttribute(cublasLtMatmulPreference_t p,
                                                           cublasLtMatmulPreferenceAttributes_t attribute,
                                                           const void* value, size_t size) {
    if (attribute == CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES) emulator::set_attribute(p->workspace, value, size);
    else if (attribute == CUBLASLT_MATMUL_PREF_REDUCTION_SCHEME_MASK)
        emulator::set_attribute(p->reductions, value, size);
    else emulator::set_attribute(p->alignment[attribute - CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_A_BYTES], value, size);
    return CUBLAS_STATUS_SUCCESS;
}

inline cublasStatus_t cublasLtMatmulAlgoGetHeuristic(
    cublasLtHandle_t, cublasLtMatmulDesc_t operation, cublasLtMatrixLayout_t A, cublasLtMatrixLayout_t B,
    cublasLtMatrixLayout_t C, cublasLtMatrixLayout_t D, cublasLtMatmulPreference_t preference, int requested,
    cublasLtMatmulHeuristicResult_t* results, int* found) {
    emulator::Call call("cublasLtMatmulAlgoGetHeuristic");
    if (call.fault) return CUBLAS_STATUS_INTERNAL_ERROR;
    const emulator::Matmul p = emulator::described(*operation, *A, *B, *C, *D);
    const uint64_t product = emulator::hash(p), algorithms = (uint64_t)emulator::settings.algorithms;
    uint64_t alignment = 256;  // bias and aux have theirs, whatever was promised of the others
    for (uint64_t at : {(uint64_t)operation->bias, (uint64_t)operation->aux})
        if (at) alignment = std::min(alignment, at & -at);
    for (uint64_t promised : preference->alignment) alignment = std::min(alignment, promised);
    emulator::searches++;
    *found = 0;
    for (uint64_t i = 0; i < algorithms && *found < requested; i++) {
        const uint64_t algorithm = (i + emulator::hash({product, alignment})) % algorithms;
        const bool refuses = emulator::refuses(p, algorithm, alignment);
        if (refuses && !emulator::refuses_at_launch(p, algorithm, alignment)) continue;
        results[(*found)++] = {{{product, algorithm, alignment, preference->workspace}}, preference->workspace,
                               CUBLAS_STATUS_SUCCESS, 1, {}};
        if (!refuses) emulator::given_up[{product, alignment}] = true;
    }
    return *found ? CUBLAS_STATUS_SUCCESS : CUBLAS_STATUS_NOT_SUPPORTED;
}

// D = op(A) op(B) [+ C], then the epilogue; matrices by columns: op(A) (m, k), op(B) (k, n), C and D (m, n). Sums are
// fp32; D and aux are rounded to D's type when they are stored, and nothing else is. Epilogues use bias (m) and
// aux (m, n; its leading dimension is D's), both of D's type:
//   BIAS           D = product + bias            GELU_AUX_BIAS  aux = product + bias, D = gelu of that before rounding
//   DGELU          D = product · gelu'(aux)      GELU_BIAS      D = gelu(product + bias)
inline cublasStatus_t cublasLtMatmul(cublasLtHandle_t, cublasLtMatmulDesc_t operation, const void* alpha, const void* A,
                                     cublasLtMatrixLayout_t a, const void* B, cublasLtMatrixLayout_t b,
                                     const void* beta, const void* C, cublasLtMatrixLayout_t c, void* D,
                                     cublasLtMatrixLayout_t d, const cublasLtMatmulAlgo_t* algorithm, void* workspace,
                                     size_t workspace_bytes, cudaStream_t stream) {
    emulator::Call call("cublasLtMatmul");
    if (call.fault) return CUBLAS_STATUS_EXECUTION_FAILED;
    emulator::Matmul p = emulator::described(*operation, *a, *b, *c, *d);
    const uint64_t product = algorithm->data[0], which = algorithm->data[1], alignment = algorithm->data[2];
    const uint64_t needs = algorithm->data[3];
    const float add = *(const float*)beta;
    const int epilogue = emulator::number_of(p.epilogue);
    auto extent = [](uint64_t columns, uint64_t rows, int64_t ld, cudaDataType type) {
        return ((size_t)ld * (columns - 1) + rows) * emulator::size_of(type);
    };
    if (product != emulator::hash(p)) emulator::fail(nullptr, "cuBLASLt: the algorithm of another product");
    if (*(const float*)alpha != 1 || (add != 0 && add != 1)) emulator::fail(nullptr, "cuBLASLt: alpha or beta");
    const size_t of_d = extent(d->columns, d->rows, d->ld, d->type);
    const struct { const char* name; const void* at; size_t bytes; bool used; } operands[] = {
        {"A", A, extent(a->columns, a->rows, a->ld, a->type), true},
        {"B", B, extent(b->columns, b->rows, b->ld, b->type), true},
        {"C", C, of_d, add != 0},
        {"D", D, of_d, true},
        {"bias", operation->bias, (size_t)p.m * emulator::size_of(p.d_type), epilogue > 0 && epilogue < 4},
        {"aux", operation->aux, of_d, epilogue > 2},
        {"the workspace", workspace, needs, needs > 0}};
    for (const auto& o : operands) {
        if (!o.used) continue;
        if (!emulator::on_device(o.at, o.bytes))
            emulator::fail(nullptr, "cuBLASLt: %s is not all in device memory", o.name);
        if ((uintptr_t)o.at % alignment)
            emulator::fail(nullptr, "cuBLASLt: %s is not at a multiple of %d bytes, as the heuristic was promised",
                           o.name, (int)alignment);
    }
    if (workspace_bytes < needs) emulator::fail(nullptr, "cuBLASLt: the workspace is smaller than was promised");
    if (emulator::refuses(p, which, alignment)) {
        emulator::refusals++;
        emulator::error(cudaErrorInvalidValue);
        return which % 2 ? CUBLAS_STATUS_INVALID_VALUE : CUBLAS_STATUS_NOT_SUPPORTED;
    }
    emulator::given_up.erase({product, alignment});
    p.A = A, p.B = B, p.C = add != 0 ? C : nullptr, p.D = D, p.algorithm = (int)which;
    p.bias = operands[4].used ? operation->bias : nullptr, p.aux = operation->aux;
    if (emulator::settings.log)
        fprintf(emulator::settings.log, "product %d %d %d %zu %zu %d %d\n", p.m, p.n, p.k, emulator::size_of(p.d_type),
                emulator::size_of(p.ab_type), p.C != nullptr, epilogue);
    emulator::submit_work(stream, [=] { emulator::run_matmul(p); });
    return CUBLAS_STATUS_SUCCESS;
}

// ====================================================================================================================
// 10 · Messages between processes: the stand-in for NCCL, over MPI
//
// A group of calls becomes one work on its stream. Works of a communicator run in the order in which they were put on
// their streams, as NCCL's do.

#ifdef GPT2_MPI
enum ncclResult_t { ncclSuccess = 0, ncclUnhandledCudaError = 1, ncclInvalidUsage = 5 };
enum ncclDataType_t { ncclChar = 0, ncclFloat = 7, ncclDouble = 8, ncclBfloat16 = 9 };
struct ncclUniqueId {
    char internal[128];
};
struct ncclComm {
    MPI_Comm processes;
    int rank, size;
    std::shared_ptr<emulator::EventState> works = std::make_shared<emulator::EventState>();
};
using ncclComm_t = ncclComm*;

#define EMULATOR_NCCL(name) \
    ::emulator::Call call(name); \
    if (call.fault) return ncclUnhandledCudaError

namespace emulator {

struct Message {
    bool sent;
    char* at;
    size_t bytes;
    int peer;
};
struct Group {
    ncclComm_t comm;
    cudaStream_t stream;
    std::vector<Message> messages = {};
};
inline std::string nccl_error;
inline Group group;  // what the calls since the first ncclGroupStart have asked for

inline size_t size_of(ncclDataType_t type) {
    return type == ncclDouble ? 8 : type == ncclFloat ? 4 : type == ncclBfloat16 ? 2 : 1;
}

inline void run_group(const Group& g) {
    std::vector<MPI_Request> requests;
    std::vector<MPI_Status> statuses(g.messages.size());
    for (const Message& m : g.messages) {
        MPI_Request& request = requests.emplace_back();
        if (m.sent) MPI_Isend(m.at, (int)m.bytes, MPI_BYTE, m.peer, 0, g.comm->processes, &request);
        else MPI_Irecv(m.at, (int)m.bytes, MPI_BYTE, m.peer, 0, g.comm->processes, &request);
    }
    bool fits = true;
    for (int done = 0; !done; usleep(50))
        fits &= MPI_Testall((int)requests.size(), requests.data(), &done, statuses.data()) == MPI_SUCCESS;
    for (size_t i = 0; i < statuses.size(); i++) {
        int bytes = 0;
        if (g.messages[i].sent) continue;
        MPI_Get_count(&statuses[i], MPI_BYTE, &bytes);
        if (!fits || (size_t)bytes != g.messages[i].bytes)
            fail(nullptr, "NCCL: process %d receives %zu bytes from process %d, which sends another number",
                 g.comm->rank, g.messages[i].bytes, g.messages[i].peer);
    }
}

inline ncclResult_t end_group() {
    if (groups_begun || group.messages.empty()) return ncclSuccess;
    const Group g = std::exchange(group, {});
    auto works = g.comm->works;
    submit(g.stream, [=] {
        if (!settings.log) run_group(g);
        works->done++;
    }, works, works->recorded);
    works->recorded++;
    return ncclSuccess;
}

inline void add_message(const char* call, bool sent, const void* at, size_t bytes, int peer, ncclComm_t comm,
                        cudaStream_t stream) {
    if (!comm) fail(nullptr, "%s without a communicator", call);
    if (peer < 0 || peer >= comm->size) fail(nullptr, "%s: there is no process %d", call, peer);
    if (!on_device(at, bytes)) fail(nullptr, "%s: %zu bytes that are not all in device memory", call, bytes);
    if (!known(stream)) fail(nullptr, "%s on a stream that is not one", call);
    if (group.messages.empty()) group.comm = comm, group.stream = stream;
    if (group.comm != comm || group.stream != stream) fail(nullptr, "%s: its group is on another stream", call);
    group.messages.push_back({sent, (char*)at, bytes, peer});
}

}  // namespace emulator

inline const char* ncclGetErrorString(ncclResult_t e) {
    return e == ncclSuccess ? "no error" : e == ncclInvalidUsage ? "invalid usage" : "unhandled cuda error";
}
inline const char* ncclGetLastError(ncclComm_t) { return emulator::nccl_error.c_str(); }

inline ncclResult_t ncclGetUniqueId(ncclUniqueId* id) {
    EMULATOR_NCCL("ncclGetUniqueId");
    snprintf(id->internal, sizeof id->internal, "%d", (int)getpid());
    return ncclSuccess;
}
inline ncclResult_t ncclCommInitRank(ncclComm_t* comm, int size, ncclUniqueId id, int rank) {
    *comm = nullptr;
    EMULATOR_NCCL("ncclCommInitRank");
    ncclUniqueId first = id;
    MPI_Bcast(&first, sizeof first, MPI_BYTE, 0, MPI_COMM_WORLD);
    if (strcmp(id.internal, first.internal)) emulator::fail(nullptr, "ncclCommInitRank: not the id of process 0");
    std::vector<int> devices(size);
    const int own = emulator::settings.first_device + emulator::device;
    MPI_Allgather(&own, 1, MPI_INT, devices.data(), 1, MPI_INT, MPI_COMM_WORLD);
    for (int p = 0; p < size; p++) {
        if (p == rank || devices[p] != own) continue;
        emulator::nccl_error = emulator::text("Duplicate GPU detected : rank %d and rank %d both on CUDA device %d",
                                              rank, p, own);
        return ncclInvalidUsage;
    }
    *comm = new ncclComm{MPI_COMM_NULL, rank, size};
    MPI_Comm_dup(MPI_COMM_WORLD, &(*comm)->processes);
    for (MPI_Comm c : {(*comm)->processes, MPI_COMM_WORLD})  // the latter because of MPI_Testall
        MPI_Comm_set_errhandler(c, MPI_ERRORS_RETURN);
    return ncclSuccess;
}
inline ncclResult_t ncclGroupStart() {
    EMULATOR_NCCL("ncclGroupStart");
    emulator::groups_begun++;
    return ncclSuccess;
}
inline ncclResult_t ncclGroupEnd() {
    EMULATOR_NCCL("ncclGroupEnd");
    if (emulator::groups_begun == 0) emulator::fail(nullptr, "ncclGroupEnd without ncclGroupStart");
    emulator::groups_begun--;
    return emulator::end_group();
}
inline ncclResult_t ncclSend(const void* from, size_t n, ncclDataType_t type, int peer, ncclComm_t comm,
                             cudaStream_t stream) {
    EMULATOR_NCCL("ncclSend");
    emulator::add_message("ncclSend", true, from, n * emulator::size_of(type), peer, comm, stream);
    return emulator::end_group();
}
inline ncclResult_t ncclRecv(void* to, size_t n, ncclDataType_t type, int peer, ncclComm_t comm, cudaStream_t stream) {
    EMULATOR_NCCL("ncclRecv");
    emulator::add_message("ncclRecv", false, to, n * emulator::size_of(type), peer, comm, stream);
    return emulator::end_group();
}
inline ncclResult_t ncclAllGather(const void* from, void* to, size_t n, ncclDataType_t type, ncclComm_t comm,
                                  cudaStream_t stream) {
    EMULATOR_NCCL("ncclAllGather");
    if (!comm) emulator::fail(nullptr, "ncclAllGather without a communicator");
    const size_t bytes = n * emulator::size_of(type);
    emulator::groups_begun++;
    for (int p = 0; p < comm->size; p++) {
        char* place = (char*)to + p * bytes;
        if (p == comm->rank && place == from) continue;
        emulator::add_message("ncclAllGather", true, from, bytes, p, comm, stream);
        emulator::add_message("ncclAllGather", false, place, bytes, p, comm, stream);
    }
    emulator::groups_begun--;
    return emulator::end_group();
}
#endif

// ====================================================================================================================
// 11 · What the compiler calls in the checked build
//
// -fsanitize=thread has it call these before each access, and in place of atomic operations.

#if EMULATOR_CHECKED
namespace emulator {
EMULATOR_OWN inline void accessed(const void* p, size_t n, Access access, size_t alignment, const void* pc) {
    if (unchecked) return;
    if (self) {
        check(p, n, access, alignment, place_in_program(pc));
        return;
    }
    Allocation a;
    if (find(p, a) && a.device)
        fail(nullptr, "the host %s device memory at %s", access_names[access],
             line_of(place_in_program(pc)).c_str());
}
}  // namespace emulator

#define EMULATOR_ON(name, access, n, alignment) \
    EMULATOR_OWN void name(void* p) { \
        emulator::accessed(p, n, emulator::access, alignment, __builtin_return_address(0)); \
    }
#define EMULATOR_ACCESSES(n) \
    EMULATOR_ON(__tsan_read##n, READ, n, n) EMULATOR_ON(__tsan_unaligned_read##n, READ, n, 1) \
    EMULATOR_ON(__tsan_write##n, WRITE, n, n) EMULATOR_ON(__tsan_unaligned_write##n, WRITE, n, 1)
#define EMULATOR_COPY(name) \
    EMULATOR_OWN void* name(void* to, const void* from, size_t n) { \
        if (n) emulator::accessed(from, n, emulator::READ, 1, __builtin_return_address(0)); \
        if (n) emulator::accessed(to, n, emulator::WRITE, 1, __builtin_return_address(0)); \
        return memmove(to, from, n); \
    }
#define EMULATOR_FETCH(bits, T, name, operation) \
    EMULATOR_OWN T __tsan_atomic##bits##_##name(volatile T* p, T x, int) { return operation(p, x, __ATOMIC_SEQ_CST); }
#define EMULATOR_EXCHANGE(bits, T, strength, weak) \
    EMULATOR_OWN int __tsan_atomic##bits##_compare_exchange_##strength(volatile T* p, T* old, T x, int, int) { \
        return __atomic_compare_exchange_n(p, old, x, weak, __ATOMIC_SEQ_CST, __ATOMIC_SEQ_CST); \
    }
#define EMULATOR_ATOMICS(bits, T) \
    EMULATOR_OWN T __tsan_atomic##bits##_load(const volatile T* p, int) { \
        return __atomic_load_n(p, __ATOMIC_SEQ_CST); \
    } \
    EMULATOR_OWN void __tsan_atomic##bits##_store(volatile T* p, T x, int) { \
        __atomic_store_n(p, x, __ATOMIC_SEQ_CST); \
    } \
    EMULATOR_FETCH(bits, T, exchange, __atomic_exchange_n) EMULATOR_FETCH(bits, T, fetch_add, __atomic_fetch_add) \
    EMULATOR_FETCH(bits, T, fetch_sub, __atomic_fetch_sub) EMULATOR_FETCH(bits, T, fetch_and, __atomic_fetch_and) \
    EMULATOR_FETCH(bits, T, fetch_or, __atomic_fetch_or) EMULATOR_FETCH(bits, T, fetch_xor, __atomic_fetch_xor) \
    EMULATOR_EXCHANGE(bits, T, strong, false) EMULATOR_EXCHANGE(bits, T, weak, true) \
    EMULATOR_OWN T __tsan_atomic##bits##_compare_exchange_val(volatile T* p, T old, T x, int, int) { \
        __atomic_compare_exchange_n(p, &old, x, false, __ATOMIC_SEQ_CST, __ATOMIC_SEQ_CST); \
        return old; \
    }

struct EmulatorMismatch {  // what -fsanitize=alignment gives
    const char* file;
    uint32_t line, column;
    const void* type;
    unsigned char log_alignment, kind;
};

extern "C" {
EMULATOR_ACCESSES(1)
EMULATOR_ACCESSES(2)
EMULATOR_ACCESSES(4)
EMULATOR_ACCESSES(8)
EMULATOR_ACCESSES(16)
EMULATOR_OWN void __tsan_read_range(void* p, size_t n) {
    emulator::accessed(p, n, emulator::READ, 1, __builtin_return_address(0));
}
EMULATOR_OWN void __tsan_write_range(void* p, size_t n) {
    emulator::accessed(p, n, emulator::WRITE, 1, __builtin_return_address(0));
}
EMULATOR_COPY(__tsan_memcpy)
EMULATOR_COPY(__tsan_memmove)
EMULATOR_OWN void* __tsan_memset(void* to, int value, size_t n) {
    if (n) emulator::accessed(to, n, emulator::WRITE, 1, __builtin_return_address(0));
    return memset(to, value, n);
}
EMULATOR_ATOMICS(8, unsigned char)
EMULATOR_ATOMICS(16, unsigned short)
EMULATOR_ATOMICS(32, unsigned)
EMULATOR_ATOMICS(64, unsigned long)
EMULATOR_OWN void __ubsan_handle_type_mismatch_v1(EmulatorMismatch* at, void* p) {
    emulator::fail(emulator::self, "misaligned: %p at %s:%u is not at a multiple of %d", p, at->file, at->line,
                   1 << at->log_alignment);
}
EMULATOR_OWN void __ubsan_handle_type_mismatch_v1_abort(EmulatorMismatch* at, void* p) {
    __ubsan_handle_type_mismatch_v1(at, p);
}
EMULATOR_OWN void __tsan_init() {}
EMULATOR_OWN void __tsan_func_entry(void*) {}
EMULATOR_OWN void __tsan_func_exit() {}
EMULATOR_OWN void __tsan_vptr_update(void**, void*) {}
EMULATOR_OWN void __tsan_vptr_read(void**) {}
EMULATOR_OWN void __tsan_atomic_thread_fence(int) {}
EMULATOR_OWN void __tsan_atomic_signal_fence(int) {}
}
#endif
