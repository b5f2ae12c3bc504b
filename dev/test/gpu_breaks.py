#!/usr/bin/env python3
"""Does the emulator catch what it should? Breaks train_gpt2.cu on purpose, one place at a time.

    dev/test/gpu_breaks.py [WORD ...]      all breaks, or those whose names contain one of the words

All breaks are built into one copy of the program, which an environment variable chooses among; so three builds serve
the whole list: plain, sanitized (addresses), checked (races and bounds, by the emulator). Under each break stands what
the tests said first: in the plain build, and in those that must notice, or that are tried where the plain one did not.
Exit status 1 if a break goes unnoticed, or is not caught by what should catch it.
"""

import os
import re
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from places import choose, find

ROOT = Path(__file__).resolve().parents[2]
SOURCE = ROOT / "train_gpt2.cu"
PROGRAMS = {"plain": "test_gpt2cu_emulated", "sanitized": "test_gpt2cu_sanitized", "checked": "test_gpt2cu_checked"}
CORES = len(os.sched_getaffinity(0))
SEEDS = 4  # orders of threads and blocks in the plain build; the others run in one

# Which build must notice, and how.
RACE = {"checked": "emulator: .*: race: "}
RESULT = {"plain": "FAILED "}
BOUNDS = {"sanitized": "AddressSanitizer|runtime error", "checked": "emulator: .*: (out of bounds|race): "}
STOPS = {build: "emulator: kernel .* its source is not in device memory" for build in PROGRAMS}
MEETING = {build: "emulator: kernel .* (waits for|has mask)" for build in PROGRAMS}

# What runs: settings of the emulator, then words for the driver below. Pairs of files in dev/reference; head size and
# length of bf16.
VANILLA, SKIP = ["dumps vanilla_L2_NH5_C40_V150_B2_T37"], ["dumps skip_L3_NH3_C24_V61_B2_T37_nl2_nh1"]
DEPTH, ODD = ["dumps depth_L5_NH2_C16_V61_B2_T37_s3_w0"], ["dumps skip_L4_NH3_C24_V61_B1_T67_nl1_nh2"]
# Its arrays fill their slots, so what lies past the end of a slot is another one or not allocated.
FULL = ["dumps depth_L2_NH1_C64_V61_B2_T19_s1_w0"]
TILES = ["heads 64 130", "heads 128 130"]
ACCUMULATE, UPDATE, DECODE, LONG = ["accumulate 0"], ["update 0"], ["decode 0"], ["long"]
WIDE, WIDE_VOCABULARY, WIDEST = ["wide 0"], ["wide 2"], ["wide 3"]

# name: (function, fragment of it, what replaces the broken part, which tests run, which builds must notice and how);
# see places.py
BREAKS = {}


def breaks(catcher, tests, *more):
    for name, function, fragment, broken, *own in more:
        assert name not in BREAKS
        BREAKS[name] = (function, fragment, broken, own[0] if own else tests, catcher)


SYNC, SYNCWARP, NOTHING = "«__syncthreads();»", "«__syncwarp();»", ";"
FORWARD_PLAIN, QUERY_PLAIN = "attention_forward_plain_kernel", "attention_backward_query_plain_kernel"
KEY_PLAIN, CROSS_ENTROPY = "attention_backward_key_plain_kernel", "softmax_cross_entropy_kernel"
FORWARD_TILES, QUERY_TILES = "attention_forward_tiles_kernel", "attention_backward_query_tiles_kernel"
KEY_TILES = "attention_backward_key_tiles_kernel"
breaks(RACE, VANILLA,
       ("no __syncthreads: sum_partials", "sum_partials_kernel", SYNC, NOTHING),
       ("no __syncthreads: bias_backward, embedding_backward", "sum_over_warps", SYNC, NOTHING),
       ("no __syncthreads: layernorm_backward", "layernorm_backward_kernel", SYNC, NOTHING, WIDE),
       ("no __syncthreads: layernorm_backward, one buffer", "layernorm_backward_kernel", "buffer ^= 1", "buffer ^= 0",
        WIDE),
       ("no __syncthreads: attention_forward, queries", FORWARD_PLAIN, "o_w[d] = 0; " + SYNC, NOTHING),
       ("no __syncthreads: attention_forward, end", FORWARD_PLAIN, "= sum; " + SYNC, NOTHING),
       ("no __syncthreads: softmax_cross_entropy", CROSS_ENTROPY, SYNC, NOTHING),
       ("no __syncthreads: block_sum", "block_sum", SYNC, NOTHING, UPDATE),
       ("no __syncwarp: attention_forward, p", FORWARD_PLAIN, "(float)(X)p; " + SYNCWARP, NOTHING),
       ("no __syncwarp: attention_forward, tile", FORWARD_PLAIN, "} " + SYNCWARP, NOTHING),
       ("no __syncwarp: backward_query, rows", QUERY_PLAIN, "= 0; } " + SYNCWARP, NOTHING),
       ("no __syncwarp: backward_query, ds", QUERY_PLAIN, "delta[row])); } " + SYNCWARP, NOTHING),
       ("no __syncwarp: backward_query, tile", QUERY_PLAIN, "= dq_d; } " + SYNCWARP, NOTHING),
       ("no __syncwarp: backward_key, rows", KEY_PLAIN, "= 0; } " + SYNCWARP, NOTHING),
       ("no __syncwarp: backward_key, p and ds", KEY_PLAIN, "delta[rows + i])); } " + SYNCWARP, NOTHING),
       ("no __syncwarp: backward_key, tile", KEY_PLAIN, "= dv_d; } " + SYNCWARP, NOTHING),
       ("+=: threads of sum_partials", "sum_partials_kernel", "threadIdx.y > 0 || i >= n", "i >= n", ACCUMULATE),
       ("+=: blocks of embedding_backward_token", "embedding_backward_token_kernel", "(size_t)tokens[place[begin]]",
        "0"),
       ("+=: blocks of layernorm_backward", "layernorm_backward_kernel",
        "store(«partial + (size_t)blockIdx.x * 2 * C», dw", "partial"),
       ("+=: warps of bias_backward, embedding_backward", "sum_over_warps", "store(«sums[threadIdx.y]»", "sums[0]"),
       ("+=: positions of two sequences", "embedding_backward_position_kernel", "store(«dwpe + (size_t)t * C + c»",
        "dwpe + c"),
       ("+=: depth's ds, a source too many", "depth_backward_kernel", "n < S", "n <= S", DEPTH))
WAIT = "«cp_async_wait();» __syncthreads(); if"
LOOP_SYNC = "cp_async_wait(); «__syncthreads();» if"
breaks(RACE, TILES,
       ("no __syncthreads: forward tiles", FORWARD_TILES, LOOP_SYNC, NOTHING),
       ("no __syncthreads: backward query tiles, rows", QUERY_TILES, SYNC + " uint32_t", NOTHING),
       ("no __syncthreads: backward query tiles", QUERY_TILES, LOOP_SYNC, NOTHING),
       ("no __syncthreads: backward key tiles", KEY_TILES, LOOP_SYNC, NOTHING))
breaks(RESULT, TILES,
       ("no cp.async wait: forward tiles", FORWARD_TILES, WAIT, NOTHING),
       ("no cp.async wait: backward query tiles, rows", QUERY_TILES, "«cp_async_wait();» __syncthreads(); uint32_t",
        NOTHING),
       ("no cp.async wait: backward query tiles", QUERY_TILES, WAIT, NOTHING),
       ("no cp.async wait: backward key tiles", KEY_TILES, WAIT, NOTHING),
       ("mask: forward tiles, none at the diagonal", FORWARD_TILES, "j * TILE + TILE > first_position + 1", "false"),
       ("mask: forward tiles, one ahead", FORWARD_TILES, "key > «first_position»", "first_position + 1"),
       ("mask: second half as the first", "mask", "e / 2 * 8", "0"),
       ("mask: backward query tiles", QUERY_TILES, "first_key + key > «first_query»", "first_query + 1"),
       ("mask: backward key tiles", KEY_TILES, "first_key + key > «first_query»", "first_query + 1"),
       ("rescale: forward tiles, sum", FORWARD_TILES, "sum[m][half] *= rescale;", NOTHING),
       ("rescale: forward tiles, o", FORWARD_TILES, "sums_o[m][d][2 * half + 1] *= rescale;", NOTHING),
       ("tiles: statistics of the tile before", KEY_TILES, "statistics[«(i + 1) % 2»", "i % 2"),
       ("tiles: rows past the end are not 0", "copy_tile", ": head, «valid»", "true"),
       ("tiles: dk, dv of skipping heads go to their own layer", KEY_TILES, "dkv.values(h)", "dkv.v",
        ["heads 64 130"]))

breaks(STOPS, TILES, ("past the end: rows of a tile", "copy_tile", "first + r + below < end",
                      "first + r + below <= end"))

breaks(RESULT, VANILLA,
       ("shared memory before written: attention_forward", FORWARD_PLAIN, "o_w[d] = 0;", NOTHING),
       ("shared memory before written: backward_query", QUERY_PLAIN, "dq_i[d] = 0;", NOTHING),
       ("shared memory before written: backward_key", KEY_PLAIN, "dk_j[d] = dv_j[d] = 0;", "dv_j[d] = 0;"),
       ("shared memory before written: classifier", CROSS_ENTROPY, "(«lane == 0») maxima", "threadIdx.x == 0",
        WIDE_VOCABULARY),
       ("mask: attention_forward, one ahead", FORWARD_PLAIN, "«before + i + 1»;",
        "before + i + 1 + (i + 1 < (int)gridDim.x)"),
       ("rescale: attention_forward, sum", FORWARD_PLAIN, "sum * rescale", "sum"),
       ("rescale: attention_forward, o", FORWARD_PLAIN, "o_w[d] * rescale", "o_w[d]"),
       ("rescale: attention_forward, warps", FORWARD_PLAIN, "of_w[d] * «expf(scale * (of_w[HS + WARP] - all_max))»",
        "1.0f", DECODE),
       ("rescale: depth, mixed", "depth_forward_kernel", "mixed[i] * rescale", "mixed[i]", DEPTH),
       ("rescale: depth, sum", "depth_forward_kernel", "sum * rescale", "sum", DEPTH),
       ("rescale: classifier", CROSS_ENTROPY, "sum *= exp2_approx(LOG2_E * max - top);", NOTHING, WIDE_VOCABULARY),
       ("embedding: one place too many", "embedding_backward_token_kernel", "n < end", "n <= end"),
       ("padding: takes probability", CROSS_ENTROPY, "if (v + i >= V) x[i] = -INFINITY;", NOTHING),
       ("padding: gets a gradient", CROSS_ENTROPY, "continue; «read(v);»", "load(x, logits + v);", UPDATE),
       ("depth: gathers all but the last reader", "depth_backward_kernel", "m <= l + R", "m < l + R", DEPTH),
       ("depth: gathers all but the first reader", "depth_backward_kernel", "m = «l + 1»", "l + 2", DEPTH),
       ("depth: layer 0 has a and ds", "depth_backward_kernel", "m > 1", "true", DEPTH),
       ("depth: layer 1 has no a and ds", "depth_backward_kernel", "m > 1", "m > 2", DEPTH),
       ("depth: a is as wide as ds", "depth_backward_kernel", "previous + 1", "previous", DEPTH),
       ("depth: all layers as wide as the first", "depth_backward_kernel", "previous = «S_m»", "previous", DEPTH),
       ("depth: place among the reader's sources", "depth_backward_kernel", "of_m.index(l)", "0", DEPTH),
       ("depth: mixes all but the last source", "depth_forward_kernel", "«n < S»; n++) { const ptrdiff_t", "n < S - 1",
        DEPTH),
       ("depth: own ds forgotten", "depth_backward_kernel", "ds_own -= ds_j;", NOTHING, DEPTH),
       ("depth: dv not scaled by the layer's own weight", "depth_backward_kernel", "dv[i] *= a_own;", NOTHING, DEPTH),
       ("skip: the share from above forgotten", "skip_backward_kernel",
        "if (from_above) load(more, above + at, g.lane, HS);", NOTHING, SKIP),
       ("add: sum_partials", "sum_partials_kernel", "= «add» ?", "false", ACCUMULATE),
       ("add: weights", "linear_backward_weight", "«add» ? dw", "false", ACCUMULATE),
       ("add: positions", "embedding_backward_position_kernel", "if («add»)", "false", ACCUMULATE),
       ("add: losses", "sum_losses_kernel", "= «add» ?", "false", ACCUMULATE),
       ("add: LayerNorm's dx", "layernorm_backward_kernel", "if («add_dx»)", "false"),
       ("add: pieces of dqkv", "linear_backward_input", "«first» ? nullptr", "true", SKIP),
       ("sum_partials: more than 32 chunks", "sum_partials_kernel", "«k * blockDim.y»", "k * chunks", LONG),
       ("LayerNorm: channels past 256", "layernorm_forward_kernel", "«k * WARP_VALUES < C»", "k < 1", WIDE),
       ("LayerNorm: channels past 1024", "layernorm_forward_kernel", "«c < C»; c += WARP_VALUES", "false", WIDEST),
       ("LayerNorm: an odd last token counts twice", "layernorm_backward_kernel", "(«first + j < end») dw", "true",
        ODD),
       ("AdamW: decay forgotten", "adamw_update_kernel", "decay * w_i[i]", "0", UPDATE),
       ("clipping forgotten", "adamw_update_kernel", "g[i] *= gradient_scale;", NOTHING, UPDATE),
       ("results: an old loss", "sum_losses", "results.fresh = false;", NOTHING, WIDE),
       ("bf16: working copy not updated", "adamw_update_kernel", "store(working + at, w_i);", NOTHING, ["update 1"]),
       ("position: one further", "embedding_forward_kernel", "r % T", "(r % T + (r % T + 1 < (size_t)T))"),
       ("cache: keys at the first new position", "cache_append_kernel", "k.at(b, h, «before + i»)", "before", DECODE),
       ("cache: values at the first new position", "cache_append_kernel", "v.at(b, h, «before + i»)", "before", DECODE),
       ("cache: keys for values", "cache_append_kernel", "«new_v».at", "new_k", DECODE),
       ("cache: first instead of last heads", "cache_append_kernel", "h = «first_head»", "0", DECODE),
       ("logits: of the first sequence alone", "logits_forward", "i * Vp", "0 * Vp", DECODE),
       ("GELU: none in decoding", "linear_gelu_forward", "Epilogue::GELU_BIAS", "Epilogue::BIAS", ["update 1"]),
       ("GELU: derivative", "gelu_backward_kernel", "gelu_derivative(x[i])", "gelu(x[i])"))

breaks(BOUNDS, VANILLA,
       ("past the end: load", "load_vector", "lane * VECTOR < n", "lane * VECTOR <= n", ["heads 64 17"]),
       ("past the end: store", "store", "lane * VECTOR < n", "lane * VECTOR <= n", ["heads 64 17"]),
       ("past the end: convert", "convert_kernel", "i < n", "i <= n", ["heads 24 17"]),
       ("past the end: GELU", "gelu_forward_kernel", "at >= n", "at > n", FULL),
       ("past the end: depth's readers", "depth_backward_kernel", "m <= l + R", "m <= l + R + 1", DEPTH),
       ("past the end: LayerNorm's tokens", "layernorm_forward_kernel", "r >= rows", "r > rows", FULL),
       ("past the end: attention's keys", FORWARD_PLAIN, "lane < n", "lane <= n", FULL),
       ("past the end: attention's tile", FORWARD_PLAIN, "min(keys - j0, WARP)", "min(keys - j0, WARP) + 1"),
       ("past the end: heads", "HeadGroup", "min(group, last)", "group", DEPTH),
       ("past the end: positions", "embedding_backward_position_kernel", "t >= T", "t > T"),
       ("past the end: partial sums", "sum_partials_kernel", "chunk < chunks", "chunk <= chunks"),
       ("past the end: logits", CROSS_ENTROPY, "v >= Vp", "v > Vp", SKIP),
       ("past the end: cache", "cache_append_kernel", "at >= vectors", "at > vectors", DECODE),
       ("past the end: tokens", "embedding_forward_kernel", "r >= rows", "r > rows", DECODE))

breaks(MEETING, VANILLA,
       ("mask: half a warp in sum_over", "sum_over", "ALL_LANES", "0xffffu"),
       ("mask: half a warp in maximum_over", "maximum_over", "ALL_LANES", "0xffffu"),
       ("divergence: lanes past the last head leave", "depth_forward_kernel", "load(q_l, q_at, g.lane, channels);",
        "if (!g.inside) return;", FULL),
       ("divergence: some threads leave before the barrier", CROSS_ENTROPY, SYNC,
        "if (threadIdx.x > 4) return; __syncthreads();"))

STREAMS = ["accumulate 0", "accumulate 1"]
breaks(RESULT, STREAMS,
       ("streams: a step does not wait for its batch", "set_inputs",
        "CHECK(cudaStreamWaitEvent(gpu.stream, buffer.copied, 0));", NOTHING),
       ("streams: a batch does not wait for the step before", "set_inputs",
        "CHECK(cudaStreamWaitEvent(gpu.copies, buffer.done, 0));", NOTHING),
       ("streams: a pinned batch overwritten early", "set_inputs", "CHECK(cudaEventSynchronize(buffer.copied));",
        NOTHING),
       ("streams: a batch before memory is filled", "backend_create", "CHECK(cudaStreamSynchronize(gpu.stream));",
        NOTHING, ["rounding vanilla_L2_NH5_C40_V150_B2_T37"]),
       ("streams: results read early", "copy_to_host", "CHECK(cudaStreamSynchronize(gpu.stream));", NOTHING),
       ("streams: `done` is not recorded", "set_inputs",
        "CHECK(cudaEventRecord(inputs.buffers[inputs.turn].done, gpu.stream));", NOTHING),
       ("streams: a kernel on the default stream", "sum_partials", "gpu.stream", "nullptr"))

# cuBLASLt refuses many of eight algorithms, or all there are.
MANY, ALL = "GPT2_EMULATOR_ALGORITHMS=8 GPT2_EMULATOR_REFUSE_PERCENT=60", "GPT2_EMULATOR_REFUSE_PERCENT=100"
breaks(RESULT, [f"{MANY} products", f"{ALL} products"],
       ("refused: no kernel of our own", "matmul", "matmul_plain<X, Y>(y, ldy, M, N, K, A, B, add);", NOTHING),
       ("refused: taken for computed", "matmul_cublaslt", "cudaGetLastError();", "cudaGetLastError(); return true;"),
       ("refused: the next algorithm is not tried", "matmul_cublaslt", "plan->chosen < «plan->offered»",
        "std::min(plan->offered, 1)"),
       ("refused: the first algorithm again", "matmul_cublaslt", "plan->algorithms[«plan->chosen»]", "0"),
       ("refused: the search begins anew", "matmul_cublaslt", "plan < end && «plan->shape != shape»", "true"),
       ("refused: the choice is not kept", "matmul_cublaslt", 'check(status, "cublasLtMatmul", __LINE__);',
        "plan->chosen = 0;"),
       ("algorithm: its alignment is what the pointers have", "matmul_cublaslt", "low = «16»", "256"),
       ("matmul_plain: what is past K", "load_square", "i0 + i < n && «k0 + k < K»", "true"),
       ("matmul_plain: no sum with C", "matmul_plain_kernel", "(Y)(«add» ?", "nullptr"),
       ("matmul_plain: a column past the end", "matmul_plain_kernel", "m < M && «n < N»", "n <= N"))
breaks({"plain": "error: the GPU failed: "}, [f"{ALL} products"],
       ("refused: its error stays", "matmul_cublaslt", "cudaGetLastError();", NOTHING))
breaks({"plain": "error: cuBLASLt failed: "}, [f"{MANY} products"],
       ("refused: ends the program", "refused", "status == CUBLAS_STATUS_INVALID_VALUE", "false"))
breaks({"plain": "emulator: cuBLASLt: .* is not at a multiple of 16 bytes"}, ["products"],
       ("algorithm: 16 bytes whatever the pointers have", "matmul_cublaslt", "(int)(«low & -low»)", "16"))
breaks(RACE, [f"{ALL} products"],
       ("no __syncthreads: matmul_plain, begin", "matmul_plain_kernel", SYNC + " for", NOTHING),
       ("no __syncthreads: matmul_plain, overwritten early", "matmul_plain_kernel", SYNC + " }", NOTHING))

DRIVER = r"""
#include <stdlib.h>
static const int chosen_break = getenv("GPT2_BREAK") ? atoi(getenv("GPT2_BREAK")) : -1;
[[gnu::noinline]] __attribute__((no_sanitize("thread"))) static bool broken(int i) { return i == chosen_break; }
#define main all_tests
#include "all_tests.cpp"
#undef main
int main(int argc, char** argv) {
    setvbuf(stdout, nullptr, _IOLBF, 0);
    poison_memory = true;
    device_start(argv);
    device_init();
    const std::string what = argv[1], path = std::string("dev/reference/") + (argc > 2 ? argv[2] : "");
    auto number = [&](int i) { return i < argc ? atoi(argv[i]) : 0; };
    if (what == "products") {
        test_products<bf16, bf16>("bf16");
        test_products<bf16, float>("bf16 into fp32");
    }
    if (what == "dumps") check_dump(path + ".model.bin", path + ".state.bin", false, NEVER);
    if (what == "rounding") check_dump(path + ".model.bin", path + ".state.bin", false, MUST);
    if (what == "heads") test_head_sizes({number(2)}, {number(3)});
    if (what == "accumulate") test_accumulation((Precision)number(2), small_config(VANILLA), 1, 23);
    if (what == "update") test_update((Precision)number(2));
    if (what == "wide") test_finite_differences({wide_settings()[number(2)]});
    if (what == "long") test_accumulation(FP32, small_config(VANILLA, 1), 264, 1);
    for (int attention : {SKIP, DEPTH}) {
        Config c = small_config(attention);
        c.maxT = 40;
        if (what == "decode") check_decoding(c, (Precision)number(2), {1, 2, 33, 40});
    }
    printf("%d passed, %d failed\n", passed, failed);
    return failed > 0;
}
"""


def with_switches(source):
    """The source with all breaks in it, of which broken(i) chooses the i-th."""
    spans = {}
    for i, (function, fragment, broken, _, _) in enumerate(BREAKS.values()):
        spans.setdefault(find(source, function, fragment)[0], []).append((i, broken))
    ordered = sorted(spans)
    for a, b in zip(ordered, ordered[1:]):
        assert a[1] <= b[0], f"two breaks overlap: {source[a[0]:a[1]]}, {source[b[0]:b[1]]}"
    for begin, end in reversed(ordered):
        right, wrongs = source[begin:end], spans[begin, end]
        if right.endswith(";"):
            switch = "".join(f"if (broken({i})) {{ {wrong} }} else " for i, wrong in wrongs)
            switch = f"{{ {switch}{{ {right} }} }}"
        else:
            switch = "(" + "".join(f"broken({i}) ? {wrong} : " for i, wrong in wrongs) + right + ")"
        source = source[:begin] + switch + source[end:]
    return source


def build(folder):
    """The three builds, in a copy of what they take."""
    for name in "dev/emulator", "dev/reference":
        shutil.copytree(ROOT / name, folder / name)
    for name in "train_gpt2.cpp", "Makefile", "dev/Makefile":
        shutil.copy(ROOT / name, folder / name)
    shutil.copy(ROOT / "test_gpt2.cpp", folder / "all_tests.cpp")
    (folder / "test_gpt2.cpp").write_text(DRIVER)
    (folder / "train_gpt2.cu").write_text(with_switches(SOURCE.read_text()))
    done = subprocess.run(["make", "-s", "-f", "dev/Makefile", *PROGRAMS.values()], cwd=folder, capture_output=True,
                          text=True)
    if done.returncode:
        sys.exit(f"error: does not build\n{done.stderr}")


def first_message(output):
    found = re.search(r"^(FAILED .*|emulator: .*|error: .*|.*AddressSanitizer: .*|.*: runtime error: .*)", output, re.M)
    message = found[1] if found else output.strip().split("\n")[-1]
    return re.sub(r"^\S*/", "", re.sub(r"==\d+==|dev/reference/|, address \S+|\(address \S+\)", "", message)).strip()


def run(folder, build, tests, number, seed):
    """What the first of the tests says that fails; None: all pass."""
    environment = {**os.environ, "GPT2_BREAK": str(number), "GPT2_EMULATOR_SEED": str(seed)}
    for test in tests:
        words = [word for word in test.split() if "=" not in word]
        settings = dict(word.split("=") for word in test.split() if "=" in word)
        try:
            done = subprocess.run([folder / PROGRAMS[build], *words], cwd=folder, env=environment | settings,
                                  timeout=600, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
                                  errors="replace")
        except subprocess.TimeoutExpired:
            return "does not end"
        if done.returncode:
            return first_message(done.stdout) or f"exit status {done.returncode}"
    return None


def main():
    chosen = choose(SOURCE, BREAKS, sys.argv[1:])
    numbers = {name: i for i, name in enumerate(BREAKS)}
    wrong = 0
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        build(folder)
        pool = ThreadPoolExecutor(CORES)
        tests = sorted({test for _, _, _, tests, _ in chosen.values() for test in tests})
        right = [(program, test) for program in PROGRAMS for test in tests]
        for (program, test), message in zip(right, pool.map(lambda r: run(folder, r[0], [r[1]], -1, 1), right)):
            if message:
                sys.exit(f"error: {test} fails in the {program} build without a break: {message}")

        def shown(item):
            """Whether a break is caught as it should be, and the lines about it."""
            name, (_, _, _, tests, catcher) = item
            said = {}
            for program in PROGRAMS:
                if program not in catcher and any(said.values()):
                    continue
                for seed in range(1, 1 + (SEEDS if program == "plain" else 1)):
                    said[program] = run(folder, program, tests, numbers[name], seed)
                    if said[program]:
                        said[program] += f" (seed {seed})" * (seed > 1)
                        break
            ok = all(re.search(pattern, said[program] or "") for program, pattern in catcher.items())
            first = f"{'' if ok else 'OTHERWISE ' if any(said.values()) else 'UNNOTICED '}{name}"
            return ok, "\n".join([first, *(f"    {program:9} {message or '-'}" for program, message in said.items())])

        for ok, lines in pool.map(shown, chosen.items()):
            wrong += not ok
            print(lines, flush=True)
    print(f"{len(chosen) - wrong} caught, {wrong} not")
    sys.exit(wrong > 0)


if __name__ == "__main__":
    main()
