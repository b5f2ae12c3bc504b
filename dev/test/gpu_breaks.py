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

# What runs: words for the driver below. Pairs of files in dev/reference; attention, head size and length of bf16.
VANILLA, SKIP = ["dumps vanilla_L2_NH5_C40_V150_B2_T37"], ["dumps skip_L3_NH3_C24_V61_B2_T37_nl2_nh1"]
DEPTH = ["dumps depth_L5_NH2_C16_V61_B2_T37_s3_w0"]
ODD, SCALARS = ["dumps skip_L4_NH3_C24_V61_B1_T67_nl1_nh2"], ["dumps skip_L2_NH3_C36_V61_B3_T13_nl1_nh1"]
TILES = ["heads 0 64 130", "heads 0 128 130"]
ACCUMULATE, UPDATE, DECODE, LONG = ["accumulate 0"], ["update 0"], ["decode 0"], ["long"]
WIDE, WIDE_VOCABULARY = ["wide 0"], ["wide 2"]

# name: (place with what is broken between « and », what then stands there, which tests run, who must notice)
BREAKS = {}


def breaks(catcher, tests, *more):
    for name, place, broken, *own in more:
        assert name not in BREAKS
        BREAKS[name] = (place, broken, own[0] if own else tests, catcher)


SYNC, SYNCWARP, NOTHING = "«__syncthreads();»", "«__syncwarp();»", ";"
breaks(RACE, VANILLA,
       ("no __syncthreads: sum_partials", f"[threadIdx.x] = sum;\n    {SYNC}", NOTHING),
       ("no __syncthreads: bias_backward, embedding_backward", f"threadIdx.x, WARP, WARP_SHARE);\n    {SYNC}", NOTHING),
       ("no __syncthreads: layernorm_backward", f"[k][warp] = sums[k];\n        }}\n        {SYNC}", NOTHING, WIDE),
       ("no __syncthreads: layernorm_backward, one buffer", "first += N, «buffer ^= 1»", "buffer ^= 0", WIDE),
       ("no __syncthreads: attention_forward, queries", f"o_w[d] = 0;\n    {SYNC}", NOTHING),
       ("no __syncthreads: attention_forward, end", f"p_w[WARP + 1] = sum;\n    {SYNC}", NOTHING),
       ("no __syncthreads: softmax_cross_entropy", f"sums[warp] = warp_sum;\n    {SYNC}", NOTHING),
       ("no __syncthreads: block_sum", f"half /= 2) {{\n        {SYNC}", NOTHING, UPDATE),
       ("no __syncwarp: attention_forward, p", f"(float)(X)p;\n        {SYNCWARP}", NOTHING),
       ("no __syncwarp: attention_forward, tile", f"o_w[d] = o_d;\n        }}\n        {SYNCWARP}", NOTHING),
       ("no __syncwarp: backward_query, rows", f"dq_i[d] = 0;\n    }}\n    {SYNCWARP}", NOTHING),
       ("no __syncwarp: backward_query, ds", f"- delta[row]));\n        }}\n        {SYNCWARP}", NOTHING),
       ("no __syncwarp: backward_query, tile", f"dq_i[d] = dq_d;\n        }}\n        {SYNCWARP}", NOTHING),
       ("no __syncwarp: backward_key, rows", f"dv_j[d] = 0;\n    }}\n    {SYNCWARP}", NOTHING),
       ("no __syncwarp: backward_key, p and ds", f"- delta[rows + i]));\n        }}\n        {SYNCWARP}", NOTHING),
       ("no __syncwarp: backward_key, tile", f"dv_j[d] = dv_d;\n        }}\n        {SYNCWARP}", NOTHING),
       ("+=: threads of sum_partials", "if («threadIdx.y > 0 || i >= n») return;", "i >= n", ACCUMULATE),
       ("+=: blocks of embedding_backward_token", "dwte[«(size_t)tokens[place[begin]]» * C + i", "0"),
       ("+=: blocks of layernorm_backward", "store<VECTORS>(«partial + (size_t)blockIdx.x * 2 * C», dw", "partial"),
       ("+=: warps of bias_backward, embedding_backward", "store<VECTORS>(«sums[threadIdx.y]», sum, threadIdx.x, WARP",
        "sums[0]"),
       ("+=: positions of two sequences", "store<VECTORS>(«dwpe + (size_t)t * C + c», sum", "dwpe + c"))
# Where the tile kernels' loops begin
KEYS = "\n        const bf16 *k_tile = kv_tiles + j % 2 * 2 * TILE * HS, *v_tile = k_tile + TILE * HS;\n"
FORWARD, QUERY, KEY = KEYS + "        if (j == 0)", KEYS + "#pragma", "\n        const bf16 *q_tile = q_tiles + i % 2"
ROWS = "\n\n    uint32_t q_A[M][HELD]"
COME = f"cp_async_wait<1>();\n        {SYNC}"
WAIT = "«cp_async_wait<1>();»\n        __syncthreads();"
COMMIT = "«cp_async_commit();»\n        cp_async_wait<1>();\n        __syncthreads();"
LAST = f"\n        }}\n        {SYNC}"
breaks(RACE, TILES,
       ("no __syncthreads: forward tiles, begin", COME + FORWARD, NOTHING),
       ("no __syncthreads: forward tiles, overwritten early", "// o += p v" + LAST, NOTHING),
       ("no __syncthreads: backward query tiles, rows", f"cp_async_wait<1>();\n    {SYNC}" + ROWS, NOTHING),
       ("no __syncthreads: backward query tiles, begin", COME + QUERY, NOTHING),
       ("no __syncthreads: backward query tiles, overwritten early", "// dq += ds k" + LAST, NOTHING),
       ("no __syncthreads: backward key tiles, begin", COME + KEY, NOTHING),
       ("no __syncthreads: backward key tiles, overwritten early", f"= next_statistic;\n        {SYNC}", NOTHING))
breaks(RESULT, TILES,
       ("no cp.async wait: forward tiles", WAIT + FORWARD, NOTHING),
       ("no cp.async wait: backward query tiles, rows", "«cp_async_wait<1>();»\n    __syncthreads();" + ROWS, NOTHING),
       ("no cp.async wait: backward query tiles", WAIT + QUERY, NOTHING),
       ("no cp.async wait: backward key tiles", WAIT + KEY, NOTHING),
       ("cp.async: forward tiles, one group too many", WAIT + FORWARD, "cp_async_wait<2>();"),
       ("cp.async: forward tiles, no commit", COMMIT + FORWARD, NOTHING),
       ("mask: forward tiles, none at the diagonal", "if («j * TILE + TILE > first_position + 1»)", "false"),
       ("mask: forward tiles, one ahead", "key > «first_position» + query", "first_position + 1"),
       ("mask: second half as the first", "hidden(16 * m + g + «e / 2 * 8»", "0"),
       ("mask: backward query tiles", "(int query, int key) { return first_key + key > «first_query»", "first_query + 1"),
       ("mask: backward key tiles", "(int key, int query) { return first_key + key > «first_query»", "first_query + 1"),
       ("rescale: forward tiles, sum", "«sum[m][half] *= rescale;»", NOTHING),
       ("rescale: forward tiles, o", "«sums_o[m][d][2 * half + 1] *= rescale;»", NOTHING),
       ("tiles: statistics of the tile before", "statistics[«(i + 1) % 2» * 2 * TILE + threadIdx.x] = next", "i % 2"),
       ("tiles: rows past the end are not 0", "* row : head, «valid»)", "true"),
       ("tiles: dk, dv of skipping heads go to their own layer", "store_row(«dkv.values(h)».at(b, h, j)", "dkv.v",
        ["heads 1 64 130"]))

breaks(STOPS, TILES, ("past the end: rows of a tile", "valid = «first + r + below < end»;", "first + r + below <= end"))

breaks(RESULT, VANILLA,
       ("shared memory before written: attention_forward", "«o_w[d] = 0;»", NOTHING),
       ("shared memory before written: backward_query", "«dq_i[d] = 0;»", NOTHING),
       ("shared memory before written: backward_key", "«dk_j[d] = dv_j[d] = 0;»", "dv_j[d] = 0;"),
       ("shared memory before written: classifier", "if («lane == 0») maxima[warp]", "threadIdx.x == 0",
        WIDE_VOCABULARY),
       ("mask: attention_forward, one ahead", "keys = «before + i + 1»;", "before + i + 1 + (i + 1 < (int)gridDim.x)"),
       ("rescale: attention_forward, sum", "sum = «sum * rescale» + sum_over(p);", "sum"),
       ("rescale: attention_forward, o", "float o_d = «o_w[d] * rescale»;", "o_w[d]"),
       ("rescale: attention_forward, warps", "o_d += of_w[d] * «expf(scale * (of_w[HS + WARP] - all_max))»", "1.0f",
        DECODE),
       ("rescale: depth, mixed", "mixed[i] = «mixed[i] * rescale» + p", "mixed[i]", DEPTH),
       ("rescale: depth, sum", "sum = «sum * rescale» + p;", "sum", DEPTH),
       ("rescale: classifier", "«sum *= exp2_approx(LOG2_E * max - top);»", NOTHING, WIDE_VOCABULARY),
       ("embedding: one place too many", "«n < end»; n += SUM_WARPS", "n <= end"),
       ("padding: takes probability", "«if (v + i >= V) share[i] = -INFINITY;»", NOTHING),
       ("padding: gets a gradient",
        "continue;\n        «read(v);»", "load<true>(share, logits + v, 0, 1, SHARE);", UPDATE),
       ("depth: gathers all but the last source", "«j < R»; j++", "j < R - 1", DEPTH),
       ("depth: gathers all but the first source", "for (int j = «0»; j < R", "1", DEPTH),
       ("depth: mixes all but the last source", "«n < S»; n++) {\n        const ptrdiff_t", "n < S - 1", DEPTH),
       ("depth: own ds forgotten", "«ds_own -= ds_j;»", NOTHING, DEPTH),
       ("depth: dv not scaled by the layer's own weight", "«dv[i] *= a_own;»", NOTHING, DEPTH),
       ("skip: the share from above forgotten",
        "«if (above) load<VECTORS>(more, dkv_above + at, g.lane, lanes, HS);»", NOTHING, SKIP),
       ("accumulate: sum_partials", "out[i] = «accumulate» ? out[i]", "false", ACCUMULATE),
       ("accumulate: weights", "«accumulate» ? dw : nullptr", "false", ACCUMULATE),
       ("accumulate: positions", "if («accumulate») load<VECTORS>(sum, dwpe", "false", ACCUMULATE),
       ("accumulate: classifier", "Vp, Vp, «accumulate || r > 0»);", "false", ACCUMULATE),
       ("accumulate: losses", "loss_sum = «accumulate» ?", "false", ACCUMULATE),
       ("accumulate: LayerNorm's dx", "if («accumulate_dx») load", "false"),
       ("accumulate: not begun anew", "«m->accumulated = 0;»", NOTHING, ACCUMULATE),
       ("accumulate: pieces of dqkv", "«first» ? nullptr : dx_sum", "true", SKIP),
       ("sum_partials: more than 32 runs", "run < runs; run += «blockDim.y»", "runs", LONG),
       ("LayerNorm: channels past 256", "«c < C»; c += WARP_SHARE) {\n        float w_c", "c < 256", WIDE),
       ("LayerNorm: an odd last token counts twice", "if («first + j < end») dw[i]", "true", ODD),
       ("AdamW: decay forgotten", "«decay * w_i[i]»", "0", UPDATE),
       ("clipping forgotten", "«g[i] *= gradient_scale;»", NOTHING, UPDATE),
       ("bf16: working copy not updated", "«store<VECTORS>(working + at, w_i, 0, 1, left);»", NOTHING, ["update 1"]),
       ("position: one further", "«first + r % T»", "first + r % T + (r % T + 1 < (size_t)T)"),
       ("cache: one position further", "«before + row % n»", "(before + row % n + 1) % maxT", DECODE),
       ("cache: first instead of last heads", "(part + 2) * C - «width» + at", "C", DECODE),
       ("GELU: derivative", "dh[i] * «gelu_derivative((float)h[i])»", "gelu((float)h[i])"))

breaks(BOUNDS, VANILLA,
       ("past the end: load", "share[i] = «at < n» ?", "at <= n", SCALARS),
       ("past the end: load of vectors", "if («lane * SHARE >= n») {", "lane * SHARE > n", ["heads 2 64 17"]),
       ("past the end: store", "if («at < n») row[at]", "at <= n", SCALARS),
       ("past the end: convert", "if («i < n») to[i]", "i <= n", ["heads 1 24 17"]),
       ("past the end: skip's layer below", "return «h < skipping» ? v_below", "h <= skipping", SKIP),
       ("past the end: depth's sources", "«n < S»; n++) {\n            read", "n <= S", DEPTH),
       ("past the end: depth's readers", "«j < R»; j++", "j <= R", DEPTH),
       ("past the end: LayerNorm's tokens",
        "if («r >= rows») return;\n    const int lane = threadIdx.x;\n    const X* x_r", "r > rows"),
       ("past the end: attention's keys", "const float s = «lane < n» ?", "lane <= n"),
       ("past the end: attention's tile", "n = «min(keys - j0, WARP)»;", "min(keys - j0, WARP) + 1"),
       ("past the end: heads", "at = «min(group, last)»;", "group", DEPTH),
       ("past the end: positions", "if («t >= T») return;\n    for", "t > T"),
       ("past the end: partial sums", "int run = threadIdx.y; «run < runs»;", "run <= runs"),
       ("past the end: logits", "if («v >= Vp») continue;", "v > Vp", WIDE_VOCABULARY),
       ("past the end: tokens",
        "if («r >= rows») return;\n    const int lane = threadIdx.x;\n    const X *token", "r > rows", DECODE))

breaks(MEETING, VANILLA,
       ("mask: half a warp in sum_over", "x += __shfl_xor_sync(«ALL_LANES»", "0xffffu"),
       ("mask: half a warp in maximum_over", "fmaxf(x, __shfl_xor_sync(«ALL_LANES»", "0xffffu"),
       ("divergence: lanes past the last head leave", "«load<VECTORS>(q_l, q.at(b, g.h, t), g.lane, lanes, channels);»",
        "if (!g.inside) return;", ["dumps depth_L2_NH1_C64_V61_B2_T19_s1_w0"]),
       ("divergence: some threads leave before the barrier", "«__syncthreads();»\n    const float max_w",
        "if (threadIdx.x > 4) return; __syncthreads();"))

STREAMS = ["accumulate 0", "accumulate 1"]
breaks(RESULT, STREAMS,
       ("streams: a step does not wait for its batch",
        "«CHECK(cudaStreamWaitEvent(gpu.stream, in.copied, 0));»", NOTHING),
       ("streams: a batch does not wait for the step before",
        "«CHECK(cudaStreamWaitEvent(gpu.copies, in.done, 0));»", NOTHING),
       ("streams: a pinned batch overwritten early", "«CHECK(cudaEventSynchronize(in.copied));»", NOTHING),
       ("streams: a batch before memory is filled", "«CHECK(cudaStreamSynchronize(gpu.stream));»  // batches", NOTHING,
        ["rounding vanilla_L2_NH5_C40_V150_B2_T37"]),
       ("streams: results read early", "CHECK(cudaMemcpyAsync(to, from, bytes, kind, gpu.stream));\n    "
        "«CHECK(cudaStreamSynchronize(gpu.stream));»", NOTHING),
       ("streams: `done` is not recorded", "«CHECK(cudaEventRecord(m->inputs[m->turn].done, gpu.stream));»", NOTHING),
       ("streams: a kernel on the default stream", "block, 0, «gpu.stream»>>>(out, second", "nullptr"))

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
    device_init(argv);
    const std::string what = argv[1], path = std::string("dev/reference/") + (argc > 2 ? argv[2] : "");
    auto number = [&](int i) { return i < argc ? atoi(argv[i]) : 0; };
    if (what == "dumps") check_dump(path + ".model.bin", path + ".state.bin", false, NEVER);
    if (what == "rounding") check_dump(path + ".model.bin", path + ".state.bin", false, MUST);
    if (what == "heads") test_head_sizes({number(2)}, {number(3)}, {number(4)});
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


def parts(place):
    """Of a place: its text, and from where to where what is broken stands in it."""
    begin, end = place.index("«"), place.index("»")
    return place[:begin] + place[begin + 1:end] + place[end + 1:], begin, end - 1


def stale(source, names=BREAKS):
    """The breaks whose place is not in the source, or more than once."""
    return [name for name in names if source.count(parts(BREAKS[name][0])[0]) != 1]


def with_switches(source):
    """The source with all breaks in it, of which broken(i) chooses the i-th."""
    spans = {}
    for i, (place, broken, _, _) in enumerate(BREAKS.values()):
        text, begin, end = parts(place)
        at = source.index(text)
        spans.setdefault((at + begin, at + end), []).append((i, broken))
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
    for name in "train_gpt2.cpp", "Makefile":
        shutil.copy(ROOT / name, folder)
    for name in "dev/emulator", "dev/reference":
        shutil.copytree(ROOT / name, folder / name)
    shutil.copy(ROOT / "test_gpt2.cpp", folder / "all_tests.cpp")
    (folder / "test_gpt2.cpp").write_text(DRIVER)
    (folder / "train_gpt2.cu").write_text(with_switches(SOURCE.read_text()))
    done = subprocess.run(["make", "-s", *PROGRAMS.values()], cwd=folder, capture_output=True, text=True)
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
        try:
            done = subprocess.run([folder / PROGRAMS[build], *test.split()], cwd=folder, env=environment, timeout=600,
                                  stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace")
        except subprocess.TimeoutExpired:
            return "does not end"
        if done.returncode:
            return first_message(done.stdout) or f"exit status {done.returncode}"
    return None


def main():
    words = sys.argv[1:]
    chosen = {name: b for name, b in BREAKS.items() if not words or any(word in name for word in words)}
    if stale(SOURCE.read_text()):
        sys.exit(f"error: not one place of train_gpt2.cu: {'; '.join(stale(SOURCE.read_text()))}")
    numbers = {name: i for i, name in enumerate(BREAKS)}
    wrong = 0
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        build(folder)
        pool = ThreadPoolExecutor(CORES)
        tests = sorted({test for _, _, tests, _ in chosen.values() for test in tests})
        right = [(program, test) for program in PROGRAMS for test in tests]
        for (program, test), message in zip(right, pool.map(lambda r: run(folder, r[0], [r[1]], -1, 1), right)):
            if message:
                sys.exit(f"error: {test} fails in the {program} build without a break: {message}")

        def shown(item):
            """Whether a break is caught as it should be, and the lines about it."""
            name, (_, _, tests, catcher) = item
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
