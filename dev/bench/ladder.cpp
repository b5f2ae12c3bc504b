/*
ladder.cpp: from three plain loops to the product's matmul, one idea at a time.

    make -C dev ladder                    three linear layers, from a small model's to GPT-2's
    dev/bench/ladder ROWS C OC            one of another size: rows are tokens, and C and OC multiples of 16, which
                                          spares rungs 2 to 6 their edges

Every rung computes y (rows, OC) = x (rows, C) wᵀ with w (OC, C). All are first held against the definition in double;
exit status 1 where one is off. Then they are timed, in turns with the peak of what they use: one thread or all, fp32 or
bf16. ladder.md explains what a run shows.

The first rung and the upper ones are train_gpt2.cpp's own matmul_plain, pack, multiply_tile and matmul; what leads from
one to the others is written here.
*/

#define GPT2_NO_MAIN
#include "../../train_gpt2.cpp"
#include "limits.h"

// A linear layer, and room to work in. x and w are drawn with bf16's 8 bits, so either type holds the same numbers and
// all rungs have one right answer.
struct Linear {
    size_t rows, C, OC;
    float *x, *w, *y;            // (rows, C), (OC, C), (rows, OC)
    bf16 *x_bf16, *w_bf16;       // the same x and w
    float *x_panels, *w_panels;  // for rungs 5 and 6: x in panels of ROWS rows, a block of w in panels of NR columns
    Workspace ws;                // for the product
};

// --------------------------------------------------------------------------------------------------------------------
// 1 · Three loops: the definition
//
// A compiler may not change the order of a sum of floats, so each addition waits for the one before it.

template <class Sum>
static void three_loops(Sum* y, const Linear& l, size_t m, size_t end) {  // y's rows m .. end-1
    matmul_plain(y + m * l.OC, end - m, l.OC, l.C, along_k(l.x + m * l.C, l.C), along_k(l.w, l.C));
}

// --------------------------------------------------------------------------------------------------------------------
// 2 · Vectors
//
// The product's dot says that its sum may be split (omp simd reduction): LANES sums grow side by side in one register,
// and are added up at the end. One instruction does 2·LANES operations.

static void vectors(const Linear& l) {
    for (size_t m = 0; m < l.rows; m++)
        for (size_t n = 0; n < l.OC; n++) l.y[m * l.OC + n] = dot(l.x + m * l.C, l.w + n * l.C, l.C);
}

// --------------------------------------------------------------------------------------------------------------------
// 3 · Tiles in registers
//
// A dot product loads two vectors for each multiply-add. TM × TN dot products at once load TM + TN vectors for TM·TN
// multiply-adds, whose sums do not wait for each other. Sums and loads must fit the registers.

constexpr int TM = ROWS < 8 ? 2 : 4, TN = 4;  // of 16 or 32 registers

template <int HALF, size_t... I>
static inline vec fold(vec v, std::index_sequence<I...>) {  // each lane plus the one HALF lanes away
    return v + __builtin_shufflevector(v, v, ((I ^ HALF) % LANES)...);
}
static inline float total(vec v) {
    constexpr auto lanes = std::make_index_sequence<LANES>();
    if constexpr (LANES > 8) v = fold<8>(v, lanes);
    if constexpr (LANES > 4) v = fold<4>(v, lanes);
    return fold<1>(fold<2>(v, lanes), lanes)[0];
}

// y (TM, TN), in rows of OC, from x (TM, C) and w (TN, C)
static void dot_tile(float* y, const float* x, const float* w, size_t C, size_t OC) {
    vec sum[TM][TN] = {};
    for (size_t k = 0; k < C; k += LANES) {
        vec x_k[TM];
#pragma GCC unroll 4
        for (int i = 0; i < TM; i++) x_k[i] = load(x + i * C + k);
#pragma GCC unroll 4
        for (int j = 0; j < TN; j++) {
            vec w_k = load(w + j * C + k);
#pragma GCC unroll 4
            for (int i = 0; i < TM; i++) sum[i][j] += x_k[i] * w_k;
        }
    }
#pragma GCC unroll 4
    for (int i = 0; i < TM; i++)
#pragma GCC unroll 4
        for (int j = 0; j < TN; j++) y[i * OC + j] = total(sum[i][j]);
}

// y's columns n0 .. end-1, for all rows
static void tile_columns(const Linear& l, size_t n0, size_t end) {
    for (size_t m = 0; m < l.rows; m += TM)
        for (size_t n = n0; n < end; n += TN)
            dot_tile(l.y + m * l.OC + n, l.x + m * l.C, l.w + n * l.C, l.C, l.OC);
}

static void register_tiles(const Linear& l) { tile_columns(l, 0, l.OC); }

// --------------------------------------------------------------------------------------------------------------------
// 4 · Cache blocks
//
// Rung 3 reads all of w for every TM rows of x, and w is larger than L2. The same tiles in another order: some rows of
// w stay in L2 until every row of x has met them.

constexpr size_t BLOCK = 64;  // rows of w, a multiple of TN: 196 KB at C = 768

static void cache_blocks(const Linear& l) {
    for (size_t n = 0; n < l.OC; n += BLOCK) tile_columns(l, n, std::min(l.OC, n + BLOCK));
}

// --------------------------------------------------------------------------------------------------------------------
// 5 · Packed panels, and the product's microkernel
//
// Lanes become columns of y: step k multiplies one element of x, broadcast to all lanes, by row k of wᵀ. No lanes are
// added up in the end, and a vector of w serves ROWS rows of x instead of TM. The elements of wᵀ's row k must lie side
// by side, so each block of w is transposed into panels. The classic design packs x as well: the microkernel then reads
// both operands from end to end, without gaps.

constexpr size_t X_WIDTH = round_up(ROWS, LANES);  // pack() writes whole vectors; cells past ROWS are never read

// w block by block. rows_of_x(m) returns x's rows from m on, as the microkernel reads them.
template <class F>
static void multiply_blocks(const Linear& l, F rows_of_x) {
    for (size_t n0 = 0; n0 < l.OC; n0 += NC) {
        const size_t columns = std::min(l.OC - n0, NC);
        pack(l.w_panels, false, NR, along_k(l.w + n0 * l.C, l.C), columns, l.C);
        for (size_t m = 0; m < l.rows; m += ROWS) {
            const size_t count = std::min<size_t>(l.rows - m, ROWS);
            for (size_t n = 0; n < columns; n += NR)
                multiply_tile(l.y + m * l.OC + n0 + n, l.OC, rows_of_x(m), count, l.w_panels + n * l.C, NR,
                              std::min(columns - n, NR), l.C, false);
        }
    }
}

static void both_packed(const Linear& l) {
    auto panel = [&](size_t m) { return l.x_panels + m / ROWS * X_WIDTH * l.C; };
    for (size_t m = 0; m < l.rows; m += ROWS)
        pack(panel(m), false, X_WIDTH, along_k(l.x + m * l.C, l.C), std::min<size_t>(l.rows - m, ROWS), l.C);
    multiply_blocks(l, [&](size_t m) { return across_k<float>(panel(m), X_WIDTH); });
}

// --------------------------------------------------------------------------------------------------------------------
// 6 · x where it lies
//
// The microkernel reads x element by element, and a broadcast can come from anywhere: it needs no neighbours.

static void x_in_place(const Linear& l) {
    multiply_blocks(l, [&](size_t m) { return along_k(l.x + m * l.C, l.C); });
}

// --------------------------------------------------------------------------------------------------------------------
// 7, 8, 9 · The product's matmul: on one thread, on all, and of bf16
//
// The sum over C is cut into chunks, so that ROWS rows of x stay in L1 whatever the size; finished sums go through a
// function, which may add a bias or apply GELU; threads share out the blocks; and pairs of bf16 are multiplied where
// the processor can.

template <class X>
static void product(const Linear& l, const X* x, const X* w) {
    matmul(l.ws, l.rows, l.OC, l.C, along_k(x, l.C), along_k(w, l.C),
           [&](size_t m, size_t n, vec xw, size_t count) { store(l.y + m * l.OC + n, xw, count); });
}

static void product_fp32(const Linear& l) { product(l, l.x, l.w); }
static void product_bf16(const Linear& l) { product(l, l.x_bf16, l.w_bf16); }

// --------------------------------------------------------------------------------------------------------------------
// The table

struct Rung {
    const char* name;
    void (*run)(const Linear&);
    bool all_threads = false;
    Precision precision = FP32;
    double time = INFINITY, spent = 0;  // seconds: the best of several runs, and all of them
};

static void run(Rung& rung, const Linear& l) {
    const double start = seconds();
    rung.run(l);
    const double time = seconds() - start;
    rung.time = std::min(rung.time, time), rung.spent += time;
}

// The largest error as a share of the largest element
static double relative_error(const Linear& l, const std::vector<double>& right) {
    double error = 0, largest = 0;
    for (size_t i = 0; i < right.size(); i++) {
        double e = fabs(l.y[i] - right[i]);
        if (std::isnan(e)) return e;
        error = std::max(error, e);
        largest = std::max(largest, fabs(right[i]));
    }
    return error / largest;
}

// Prints a layer's table and returns whether all rungs are right
static bool climb(size_t rows, size_t C, size_t OC, int threads) {
    constexpr int ROUNDS = 5;
    constexpr double ROUND = 0.05, ENOUGH = 1;  // seconds: a rung's share of a round, and when it has run enough
    Linear l = {};
    l.rows = rows, l.C = C, l.OC = OC;
    l.ws.local_size = std::max(matmul_local_size<float>(), matmul_local_size<bf16>());
    std::vector<void*> arrays;
    auto take = [&](auto*& p, size_t n) {
        p = (std::remove_reference_t<decltype(p)>)device_allocate(n * sizeof *p, true);
        arrays.push_back(p);
    };
    take(l.x, rows * C), take(l.x_bf16, rows * C), take(l.x_panels, ceil_div(rows, ROWS) * X_WIDTH * C);
    take(l.w, OC * C), take(l.w_bf16, OC * C), take(l.w_panels, NC * C);
    take(l.y, rows * OC), take(l.ws.local, threads * l.ws.local_size);
    Random random = {1};
    for (size_t i = 0; i < rows * C; i++) l.x[i] = l.x_bf16[i] = (float)random.normal();
    for (size_t i = 0; i < OC * C; i++) l.w[i] = l.w_bf16[i] = (float)random.normal();

    Rung rungs[] = {
        {"1  three loops", [](const Linear& l) { three_loops(l.y, l, 0, l.rows); }},
        {"2  vectors", vectors},
        {"3  tiles in registers", register_tiles},
        {"4  cache blocks", cache_blocks},
        {"5  x and w packed", both_packed},
        {"6  x where it lies", x_in_place},
        {"7  matmul, one thread", product_fp32},
        {"8  matmul, all threads", product_fp32, true},
        {"9  matmul, bf16", product_bf16, true, BF16},
    };
    std::vector<double> right(rows * OC);
    set_thread_count(threads);
#pragma omp parallel for schedule(static)
    for (size_t m = 0; m < rows; m++) three_loops(right.data(), l, m, m + 1);
    bool ok = true;
    for (Rung& rung : rungs) {
        set_thread_count(rung.all_threads ? threads : 1);
        std::fill_n(l.y, rows * OC, NAN);
        run(rung, l);
        // A sum of C terms rounds C times, by 2^-24 of its value at most; random terms use a small part of that.
        double error = relative_error(l, right);
        if (error <= C * 0x1p-24) continue;
        printf("%s is wrong: relative error %.1e\n", rung.name, error);
        ok = false;
    }

    if (!ok) return false;

    double peak[2][2] = {};  // [all threads][precision]
    for (int round = 0; round < ROUNDS; round++)
        for (Rung& rung : rungs) {
            set_thread_count(rung.all_threads ? threads : 1);
            double& best = peak[rung.all_threads][rung.precision];
            best = std::max(best, device_peak(rung.precision));
            for (double start = seconds(); rung.spent < ENOUGH && seconds() - start < ROUND;) run(rung, l);
        }
    printf("y (%zu, %zu) = x wᵀ, C = %zu; %s\n\n", rows, OC, C, device_name().c_str());
    printf("%-24s %9s %9s  %s\n", "rung", "ms", "GFLOP/s", "of the peak");
    for (const Rung& rung : rungs) {
        double rate = 2.0 * rows * C * OC / rung.time, limit = peak[rung.all_threads][rung.precision];
        printf("%-24s %9.3f %9.1f  %4.1f %% of %.0f (%s, %s)\n", rung.name, rung.time * 1e3, rate * 1e-9,
               100 * rate / limit, limit * 1e-9, rung.all_threads ? "all threads" : "one thread",
               precision_names[rung.precision]);
    }
    printf("\n");
    for (void* array : arrays) device_free(array);
    return true;
}

int main(int argc, char** argv) {
    size_t size[3] = {};
    for (int i = 1; i < argc; i++) {
        long n = atol(argv[i]);
        if (argc != 4 || n < 1 || n > 1 << 17 || n % 16) die("usage: %s [ROWS C OC], multiples of 16", argv[0]);
        size[i - 1] = (size_t)n;
    }
    device_start(argv);
    device_init();
    const int threads = thread_count();
    if (argc > 1) return !climb(size[0], size[1], size[2], threads);
    // The MLP's first layer of models with 128, 384 and 768 channels
    bool ok = climb(768, 128, 512, threads);
    ok &= climb(4096, 384, 1536, threads);
    ok &= climb(1024, 768, 3072, threads);
    return !ok;
}
