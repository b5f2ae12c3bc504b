#!/usr/bin/env python3
"""Judges the GPU's kernels without a GPU: writes dev/bench/kernels.md. `make -C dev gpu-table` calls it.

    dev/bench/kernels.py NVCC        needs nvcc, cuobjdump, nm, c++filt and the emulated programs

Registers, shared memory and spills are what nvcc says; instructions are cuobjdump's; how often which kernel runs, on
which grid, with which arguments, is what the program itself does with GPT-2 124M: the emulator's log of a step of
dev/bench/bench. Only the bytes and operations that a call needs are given here, as formulas over its arguments. Ends
with status 1 where a kernel spills, has no formula, or lacks an instruction that it should have.
"""

import glob
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections import Counter, defaultdict

HERE = os.path.dirname(os.path.abspath(__file__))
ROOT = os.path.dirname(os.path.dirname(HERE))
OUT = os.path.join(HERE, "kernels.md")
BENCH = "dev/bench/benchcu_emulated"

# GPT-2 124M, 65,536 tokens a step, bf16
B, T, C, NH, L, V, VP = 64, 1024, 768, 12, 12, 50257, 50304
BT, HS = B * T, C // NH
X = 2  # bytes of a bf16
CONFIGS = {
    "vanilla": ["--attention", "vanilla"],
    "skip": ["--attention", "skip"],
    "depth": ["--attention", "depth"],
    "depth, stride 1": ["--attention", "depth", "--depth-stride", "1"],
    "vanilla, recomputing": ["--attention", "vanilla", "--recompute"],
    "heads of 128": ["--attention", "vanilla", "--heads", "6"],
}

# An H200's limits. mma.sync reaches 63 % of what wgmma does; one of its m16n8k16 then takes 4 / 0.63 cycles of a
# scheduler, which issues one instruction a cycle.
TENSOR, MMA_SYNC, BANDWIDTH = 790e12, 0.63, 4.3e12
CYCLES_OF_HMMA = 4 / MMA_SYNC
REGISTERS, WARPS, BLOCKS, SHARED, RESERVED = 65536, 64, 32, 228 << 10, 1 << 10

# What an H200 took (dev/results/2026-11-26_nvidia-h200.md): all products, in ms; attention with heads of 128 beside
# that with heads of 64; a step of training beside the sum of its kernels.
PRODUCTS, HEADS_OF_128, WHOLE_STEP = 69.0, (0.430 + 1.531) / (0.415 + 1.317), 113.5 / 103
# An H100 differs in its memory, of 3.35 instead of 4.8 TB/s, which bounds these groups.
H100_MEMORY = 4.8 / 3.35
BOUND_BY_MEMORY = ["softmax and loss", "LayerNorm", "AdamW, norm", "bias gradients", "embedding", "skip", "depth",
                   "recomputing"]


def die(message):
    sys.exit(f"error: {message}")


# ----------------------------------------------------------------------------------------------------------------------
# What a call needs: from its arguments to (bytes, FLOP). Each array counts once, in or out; what is read again while it
# is still in a cache does not.


def pairs(step, rows):
    """(query, key) pairs of a head that are computed: a warp has so many rows, and keys come in steps."""
    return sum(-(-(first + rows) // step) * step * rows for first in range(0, T, rows))


def attention(matmuls, step, operands):
    return lambda a: (operands * BT * C * X + BT * NH * 4, matmuls * 2 * HS * pairs(step, 32) * NH * B)


def key_tiles(kernel):
    share = 4 if "float" in kernel else X  # bytes of dk and dv
    return lambda a: (4 * BT * C * X + 2 * BT * C * share + 2 * BT * NH * 4, 4 * 2 * HS * pairs(32, 32) * NH * B)


def depth_backward(a):
    S, R = a[7], a[8]
    own = 6 if S else 0  # q, k, ṽ and dq read; dq and dṽ written
    return BT * C * (8 + X * (2 + own + 2 * S + 2 * R)) + BT * NH * 8 * (S + R), BT * C * (8 * (S + 1) + 4 * R)


def skip_backward(a):
    own, above = NH - a[3], a[4]
    union = NH - max(0, a[3] - a[4])
    return 2 * BT * HS * (4 * own + 4 * above + X * union), 0


# name: (group, formula, 128-bit accesses that it must have)
GROUPS = ["matmuls of the blocks", "matmuls of the classifier", "attention", "softmax and loss",
          "LayerNorm", "AdamW, norm", "bias gradients", "embedding", "skip", "depth", "recomputing"]
KERNELS = {
    "embedding_forward_kernel": ("embedding", lambda a: (2 * BT * C * X + T * C * X, BT * C), "load store"),
    "embedding_backward_token_kernel": ("embedding", lambda a, used=BT: (BT * C * X + used * C * 8, BT * C), "load"),
    "embedding_backward_position_kernel": ("embedding", lambda a: (BT * C * X + T * C * 4, BT * C), "load store"),
    "layernorm_forward_kernel": ("LayerNorm", lambda a: (2 * BT * C * X + 8 * BT, 7 * BT * C),
                                 "load store"),
    "layernorm_backward_kernel": ("LayerNorm",
                                  lambda a: ((3 + a[9]) * BT * C * X + 8 * BT + BT // 32 * 8 * C, 15 * BT * C),
                                  "load store"),
    "attention_forward_tiles_kernel": ("attention", attention(2, 64, 4), ""),
    "attention_backward_query_tiles_kernel": ("attention", attention(3, 32, 6), ""),
    "attention_backward_key_tiles_kernel": ("attention", key_tiles, ""),
    "bias_backward_kernel": ("bias gradients",
                             lambda a: (a[2] * a[3] * X + a[2] // 256 * a[3] * 4, a[2] * a[3]), "load"),
    "sum_partials_kernel": ("bias gradients", lambda a, both=1: (both * (a[3] + 1) * a[4] * 4, both * a[3] * a[4]), ""),
    "softmax_cross_entropy_kernel": ("softmax and loss", lambda a, rows=1: (2 * rows * VP * X, 8 * rows * VP), "store"),
    "sum_losses_kernel": ("softmax and loss", lambda a: (BT * 4, BT), ""),
    "sum_of_squares_kernel": ("AdamW, norm", lambda a: (a[2] * 4, 2 * a[2]), "load"),
    "norm_kernel": ("AdamW, norm", lambda a: (a[2] * 8, a[2]), ""),
    "adamw_update_kernel": ("AdamW, norm", lambda a: (30 * a[5], 16 * a[5]), "load store"),
    "skip_backward_kernel": ("skip", skip_backward, "load store"),
    "convert_kernel": ("skip", lambda a: (6 * a[2], 0), ""),
    "depth_forward_kernel": ("depth", lambda a: (BT * C * X * (4 + 2 * a[6]) + BT * NH * 4 * (2 * a[6] + 1),
                                                 4 * BT * C * (a[6] + 1)), "load store"),
    "depth_backward_kernel": ("depth", depth_backward, "load store"),
    "gelu_forward_kernel": ("recomputing", lambda a: (2 * X * a[2], 10 * a[2]), "load store"),
}
MIXED = ["sum_partials_kernel"]  # its calls differ too much for a mean to say anything
BY_GRID = {"embedding_backward_token_kernel": 0, "sum_partials_kernel": 1, "softmax_cross_entropy_kernel": 0}
EPILOGUES = ["", ", bias", ", bias and GELU", ", bias and GELU, both kept", ", GELU's gradient"]
WITH_AUX = [3, 4]  # of these: the input of GELU is written or read too


def needs(kernel, grid, arguments):
    """(bytes, FLOP) of a call"""
    base = kernel.split("<")[0]
    if base not in KERNELS:
        die(f"{kernel} is launched, and dev/bench/kernels.py has no formula for it")
    formula = KERNELS[base][1]
    if formula is key_tiles:
        formula = key_tiles(kernel)
    if base in BY_GRID:
        return formula(arguments, grid[BY_GRID[base]])
    return formula(arguments)


def product_needs(m, n, k, d_size, size, add, epilogue):
    values = m * n * (d_size * (1 + add) + (size if epilogue in WITH_AUX else 0))
    return size * k * (m + n) + values, 2 * m * n * k


def measured():
    """The newest report of an H200, and for each of our kernels in it: µs of the mean call, ms a step"""
    times = defaultdict(lambda: [0, 0.0])
    for report in sorted(glob.glob(os.path.join(ROOT, "dev/results/*_nvidia-h200.txt")), reverse=True):
        with open(report, encoding="utf-8") as file:
            rows = re.findall(r"^ +(\d+) +([\d.]+) +[\d.]+ +[\d.]+  (\w+_kernel)\b", file.read(), re.M)
        for calls, ms, base in rows:
            times[base][0] += int(calls)
            times[base][1] += float(ms)
        if rows:
            break
    else:
        report = None
    return report, {base: (1e3 * ms / calls, ms / 2) for base, (calls, ms) in times.items()}  # of two steps


# ----------------------------------------------------------------------------------------------------------------------
# The compiler's side


def output(command, **more):
    done = subprocess.run(command, capture_output=True, text=True, **more)
    if done.returncode:
        die(f"{' '.join(command)}\n{done.stdout}{done.stderr}")
    return done.stdout + done.stderr


def plain(names):
    """From a mangled name to the kernel and its template's arguments"""
    lines = subprocess.run(["c++filt"], input="\n".join(names), capture_output=True, text=True, check=True).stdout
    short = {}
    for name, line in zip(names, lines.split("\n")):
        line = re.sub(r"^void ", "", line).replace("__nv_bfloat16", "bf16").replace("(bool)1", "true")
        line = line.replace("(bool)0", "false").replace("(int)", "")
        depth = 0
        for end, character in enumerate(line):
            depth += (character == "<") - (character == ">")
            if character == "(" and depth == 0:
                break
        short[name] = line[:end] if "(" in line else line
    return short


def compile_kernels(nvcc, folder, architecture):
    """Each kernel's registers, static shared memory, spills; the file with its machine code"""
    cubin = os.path.join(folder, f"{architecture}.cubin")
    said = output([nvcc, "-O3", "-std=c++20", "--expt-relaxed-constexpr", f"-arch={architecture}", "-Xcompiler",
                   "-Wall,-Wextra", "-Xptxas", "-v", "-cubin", "train_gpt2.cu", "-o", cubin], cwd=ROOT)
    if "warning" in said:
        die(f"nvcc warns:\n{said[said.index('warning') - 100:][:1000]}")
    found, name = {}, None
    for line in said.split("\n"):
        if m := re.search(r"Compiling entry function '(\w+)'", line):
            name = m[1]
        if m := re.search(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", line):
            stack = [int(x) for x in m.groups()]
        if m := re.search(r"Used (\d+) registers", line):
            shared = re.search(r"(\d+) bytes smem", line)
            found[name] = {"registers": int(m[1]), "static": int(shared[1]) if shared else 0, "stack": stack}
    return found, cubin


def find_cuobjdump(nvcc):
    path = shutil.which("cuobjdump", path=os.path.dirname(nvcc) + os.pathsep + os.environ.get("PATH", ""))
    if not path:
        die("no cuobjdump beside nvcc or in PATH; PyPI has it in nvidia-cuda-cuobjdump, with nvidia-cuda-nvdisasm")
    return path


def disassemble(nvcc, cubin):
    """Each kernel's instructions: (address, opcode with its suffixes, whole text)"""
    tool = find_cuobjdump(nvcc)
    path = os.path.dirname(tool) + os.pathsep + os.environ["PATH"]
    said = output([tool, "-sass", cubin], env=os.environ | {"PATH": path})
    found, name = {}, None
    for line in said.split("\n"):
        if m := re.match(r"\s*Function : (\w+)", line):
            name = m[1]
            found[name] = []
        elif m := re.match(r"\s*/\*([0-9a-f]{4,})\*/\s+(?:@!?U?P\w+ +)?([A-Z]\S*)(.*?);", line):
            found[name].append((int(m[1], 16), m[2], m[3]))
    return found


def instructions_per_hmma(code):
    """In the loop over tiles. Backward's has one within, which runs twice a tile: 32 rows at a time, of 64."""
    loops = []
    for address, opcode, rest in code:
        target = re.search(r"0x([0-9a-f]+)", rest)
        if opcode.startswith("BRA") and target and int(target[1], 16) < address:
            inside = [o for a, o, _ in code if int(target[1], 16) <= a <= address]
            hmma = sum(o.startswith("HMMA") for o in inside)
            if hmma:
                loops.append((len(inside), hmma))
    loops.sort()
    if len(loops) == 1:
        return loops[0][0] / loops[0][1]
    (inner, hmma), (outer, _) = loops[:2]
    return (outer + inner) / (2 * hmma)


def occupancy(registers, shared, threads):
    warps = -(-threads // 32)
    by_registers = REGISTERS // 4 // (-(-registers * 32 // 256) * 256) * 4 // warps
    by_shared = SHARED // (-(-shared // 128) * 128 + RESERVED)
    return min(by_registers, by_shared, WARPS // warps, BLOCKS)


# ----------------------------------------------------------------------------------------------------------------------
# The program's side


SHAPE = ["--model", "gpt2", "--vocab", str(V), "--batch", str(B), "--sequence", str(T), "--precision", "bf16"]


def step_log(options, folder):
    """All allocations, launches and products of the benchmark: two steps, the first one's model before them"""
    log = os.path.join(folder, "log")
    environment = os.environ | {"GPT2_EMULATOR_LOG": log, "GPT2_EMULATOR_MEMORY": str(1 << 38)}
    output([BENCH, *SHAPE, "--steps", "1", "--tokens", "0"] + options, cwd=ROOT,
           env=environment)
    with open(log) as f:
        return [line.split() for line in f]


def memory_of(log, options):
    """Activations and all, as `describe` counts them, in GiB; what was allocated before the first launch, in bytes"""
    size = lambda text: float(text[0]) / (1024 if text[1] == "MiB" else 1)  # noqa: E731
    said = output(["./train_gpt2cu_emulated", "describe", *SHAPE] + options, cwd=ROOT)
    header = re.search("^ {20,}(.*)", said, re.MULTILINE)[1]  # like: vanilla  skip 9/9  depth 6/0
    column = re.findall("[a-z]+", header).index(options[1])
    counted = [size(re.findall(r"([\d.]+) ([MG]iB)", re.search(row, said)[0])[column])
               for row in [r"activations .*", r"total, with scratch .*"]]
    allocated = 0
    for line in log:
        if line[0] != "allocate":
            break
        allocated += int(line[1])
    if abs(allocated / 2**30 - counted[1]) > 0.051:
        die(f"describe counts {counted[1]} GiB, and {allocated} bytes are allocated ({' '.join(options)})")
    return counted[0], counted[1], allocated


def kernels_of(program):
    """From a place in the program to a mangled name"""
    symbols = [line.split() for line in output(["nm", program], cwd=ROOT).split("\n")]
    base = next(int(s[0], 16) for s in symbols if s[-1:] == ["__executable_start"])
    return {int(s[0], 16) - base: s[2] for s in symbols if len(s) == 3}


def last_step(log, names):
    """From the embedding's launch to AdamW's last"""
    short = plain(sorted({names[int(line[1], 16)] for line in log if line[0] == "launch"}))
    calls = []
    for line in log:
        if line[0] == "launch":
            numbers = [int(x) if x != "-" else None for x in line[2:]]
            name = names[int(line[1], 16)]
            calls.append((short[name], name, numbers[:3], numbers[3:6], numbers[6], numbers[7:]))
        elif line[0] == "product":
            calls.append(("product", None, [int(x) for x in line[1:]], None, None, None))
    begin = max(i for i, call in enumerate(calls) if call[0].startswith("embedding_forward"))
    end = max(i for i, call in enumerate(calls) if call[0].startswith("adamw_update"))
    return calls[begin:end + 1]


# ----------------------------------------------------------------------------------------------------------------------
# The table


def table(rows, header):
    lines = ["| " + " | ".join(header) + " |", "|---" + "|---:" * (len(header) - 1) + "|"]
    return "\n".join(lines + ["| " + " | ".join(row) + " |" for row in rows])


def main():
    if len(sys.argv) != 2 or not sys.argv[1]:
        die("no nvcc: `make -C dev gpu-table` looks for it in PATH and in /usr/local/cuda, or in CUDA=FOLDER")
    nvcc = shutil.which(sys.argv[1]) or die(f"no {sys.argv[1]}")
    find_cuobjdump(nvcc)
    names = kernels_of(BENCH)
    with tempfile.TemporaryDirectory() as folder:
        built = {a: compile_kernels(nvcc, folder, a) for a in ["sm_80", "sm_90"]}
        spills = [f"{plain([k])[k]} ({a})" for a, (found, _) in built.items()
                  for k, of in found.items() if any(of["stack"])]
        compiled, cubin = built["sm_90"]
        code = disassemble(nvcc, cubin)
        logs, memory = {}, {}
        for config, options in CONFIGS.items():
            log = step_log(options, folder)
            logs[config] = last_step(log, names)
            memory[config] = memory_of(log, options)
        version = re.search(r"release ([\d.]+)", output([nvcc, "--version"]))[1]

    wrong = []
    if spills:
        wrong.append(f"local memory or spills: {', '.join(spills)}")

    # By kernel, and by configuration: calls, bytes, FLOP, seconds
    kernels, uses = {}, defaultdict(lambda: defaultdict(lambda: [0, 0, 0, 0.0]))
    sums = defaultdict(Counter)
    for config, calls in logs.items():
        previous = None
        for name, mangled, grid, block, shared, arguments in calls:
            if name == "product":
                m, n, k, d_size, size, add, epilogue = grid
                classifier = VP in (m, n, k)
                row = f"{n:,} × {m:,} × {k:,}{' + C' if add else ''}{', fp32' if d_size == 4 else ''}"
                row += EPILOGUES[epilogue]
                group = f"matmuls of the {'classifier' if classifier else 'blocks'}"
                moved, operations = product_needs(*grid)
                seconds = max(operations / TENSOR, moved / BANDWIDTH)
            else:
                if mangled not in compiled:
                    die(f"the emulator launches {name}, and nvcc has no such kernel")
                row = name
                base = name.split("<")[0]
                group, _, claims = KERNELS.get(base, ("", None, ""))
                moved, operations = needs(name, grid, arguments)
                if base == "sum_partials_kernel":
                    group = previous  # it ends what the last kernel began
                seconds = moved / BANDWIDTH
                opcodes = [o for _, o, _ in code[mangled]]
                counts = {"HMMA": sum(o.startswith("HMMA") for o in opcodes),
                          "LDSM": sum(o.startswith("LDSM") for o in opcodes),
                          "LDGSTS": sum(o.startswith("LDGSTS") for o in opcodes),
                          "LDG.128": sum(bool(re.match(r"LDG\.E\.128", o)) for o in opcodes),
                          "STG.128": sum(bool(re.match(r"STG\.E\.128", o)) for o in opcodes)}
                per_hmma = None
                if "_tiles_" in name:
                    per_hmma = instructions_per_hmma(code[mangled])
                    rate = TENSOR * MMA_SYNC / max(1, per_hmma / CYCLES_OF_HMMA)
                    seconds = max(seconds, operations / rate)
                    missing = [x for x in ["HMMA", "LDSM", "LDGSTS"] if not counts[x]]
                else:
                    missing = [x for x, claim in [("LDG.128", "load"), ("STG.128", "store")]
                               if claim in claims and not counts[x]]
                if missing:
                    wrong.append(f"{name} has no {', '.join(missing)}")
                threads = block[0] * block[1] * block[2]
                kernels[name] = (compiled[mangled], threads, shared, counts, per_hmma)
            previous = group
            use = uses[group, row][config]
            for i, x in enumerate([1, moved, operations, seconds]):
                use[i] += x
            sums[config][group] += seconds
    wrong = sorted(set(wrong))

    text = f"""# The GPU's kernels: limits and measurements

`make -C dev gpu-table` writes this file. GPT-2 124M, bf16, B {B}, T {T}: {BT:,} tokens a step; sm_90, nvcc {version}.
Its times, but for the columns "measured", are the least that an H200's limits allow for the bytes and operations of a
call, at {BANDWIDTH / 1e12:.1f} TB/s, {TENSOR / 1e12:.0f} TFLOP/s for cuBLAS's products, and {100 * MMA_SYNC:.0f} % of
that for the kernels of mma.sync. Of the latter, those that issue more than {CYCLES_OF_HMMA:.1f} instructions for each
HMMA are slower by as much. Kernels, calls, grids, arguments and products are the program's own, from the emulator's log
of a step; each array counts once, however often a cache serves it.

## What the compiler made of each kernel of a step

Blocks and warps: how many run at a time on a multiprocessor, of 32 and 64. The last columns count instructions of a
kind in the kernel's code; "per HMMA" is how many of all kinds there are for one HMMA in the loop over tiles, with the
mask of the diagonal, which other tiles leave out, and with both ways to copy a tile, of which one runs. No kernel of the
program, in these tables or not, spills or has a stack frame, on sm_80 either.

"""
    rows = []
    for name in sorted(kernels):
        of, threads, shared, counts, per_hmma = kernels[name]
        blocks = occupancy(of["registers"], of["static"] + shared, threads)
        rows.append([f"`{name}`", str(of["registers"]), f"{of['static']:,}", f"{shared:,}", str(threads), str(blocks),
                     str(blocks * -(-threads // 32))] + [str(x) if x else "" for x in counts.values()] +
                    [f"{per_hmma:.1f}" if per_hmma else ""])
    text += table(rows, ["kernel", "registers", "static shared", "dynamic", "threads", "blocks", "warps",
                         "HMMA", "LDSM", "LDGSTS", "LDG.128", "STG.128", "per HMMA"])

    report, times = measured()
    text += f"""

## Where a step's time would go

For each configuration, calls a step and their ms together; MB, GFLOP and µs of the mean call are those of the first
configuration that makes it. A product is rows × columns × what is summed over; "+ C": it is added to what is there.
Measured, for the kernels of our own: µs of the mean call of a vanilla step, from
{os.path.relpath(report, os.path.join(ROOT, "dev")) if report else "no report yet"}, which may be of an earlier commit.

"""
    rows = []
    for group in GROUPS:
        of_group = sorted(((row, by) for (g, row), by in uses.items() if g == group),
                          key=lambda x: -max(use[3] for use in x[1].values()))
        for row, by in of_group:
            calls, moved, operations, seconds = next(by[c] for c in CONFIGS if c in by)
            base = row.split("<")[0]
            cells = [f"{by[c][0]}: {by[c][3] * 1e3:.2f}" if c in by else "" for c in CONFIGS]
            rows.append([row if " × " in row else f"`{row}`", f"{moved / calls / 1e6:,.1f}",
                         f"{operations / calls / 1e9:,.1f}", f"{seconds / calls * 1e6:,.1f}",
                         f"{times[base][0]:,.1f}" if base in times and "vanilla" in by and base not in MIXED else ""]
                        + cells)
    text += table(rows, ["call", "MB", "GFLOP", "µs", "measured"] + list(CONFIGS))

    text += "\n\n## The sum, in ms\n\n"
    rows = []
    for group in GROUPS:
        ms = sum(times[base][1] for base, (of, *_) in KERNELS.items() if of == group and base in times)
        rows.append([group] + [f"{sums[c][group] * 1e3:.2f}" if sums[c][group] else "" for c in CONFIGS] +
                    [f"{ms:.2f}" if ms and sums["vanilla"][group] else ""])
    totals = {c: sum(sums[c].values()) for c in CONFIGS}
    rows.append(["**all**"] + [f"**{totals[c] * 1e3:.1f}**" for c in CONFIGS] + [""])
    rows.append(["tokens/s"] + [f"{BT / totals[c] / 1e3:,.0f}k" for c in CONFIGS] + [""])
    text += table(rows, ["", *CONFIGS, "measured, vanilla"])
    text += f"""

Of the measured times, those of bias gradients include all sums of partial results. Attention's backward has seven
products instead of five, since dq has a kernel of its own, which makes its sum the same in every run. What the sums
leave out: gaps between launches, the first and last wave of blocks, cuBLAS's choice for small products, cache misses; a
step of 93 to 100 ms on an H200 would be excellent. What was tried there, and the next five improvements by what they
could save: ../results/2026-11-26_nvidia-h200.md.

## What is likely, in ms

The least time of each group, multiplied by how much slower than that an H200 was with vanilla attention; groups that
were not measured, by as much as LayerNorm; and {100 * WHOLE_STEP - 100:.0f} % for the time between kernels. An H100
takes {H100_MEMORY:.2f} times as long for what its memory bounds, and as long as an H200 for the rest.

"""
    slower = {group: sum(times[base][1] for base, (of, *_) in KERNELS.items() if of == group and base in times)
              / (1e3 * seconds) for group, seconds in sums["vanilla"].items()}
    slower |= dict.fromkeys(GROUPS[:2], PRODUCTS / 1e3 / sum(sums["vanilla"][group] for group in GROUPS[:2]))

    def likely(config, memory_factor):
        return WHOLE_STEP * sum(seconds * 1e3 * (slower.get(group) or slower["LayerNorm"])
                                * (memory_factor if group in BOUND_BY_MEMORY else 1)
                                * (HEADS_OF_128 if group == "attention" and config == "heads of 128" else 1)
                                for group, seconds in sums[config].items())

    rows = [[name] + [f"{likely(c, factor):.0f}" for c in CONFIGS]
            for name, factor in [("H200", 1), ("H100", H100_MEMORY)]]
    text += table(rows, ["", *CONFIGS])
    text += "\n\nllm.c, with cuDNN's attention, publishes 140 ms for as many tokens on each of eight H100s.\n"
    text += """
## Memory

What `describe` counts, and what the program allocated before its first launch.

"""
    rows = [["activations, GiB"] + [f"{memory[c][0]:.1f}" for c in CONFIGS],
            ["... in GB; llm.c with cuDNN: 22.25"] + [f"{memory[c][0] * 2**30 / 1e9:.1f}" for c in CONFIGS],
            ["all, GiB"] + [f"{memory[c][1]:.1f}" for c in CONFIGS],
            ["allocated, bytes"] + [f"{memory[c][2]:,}" for c in CONFIGS]]
    text += table(rows, ["", *CONFIGS])
    text += "\n"
    if any(activations * 2**30 > 22.25e9 for activations, _, _ in memory.values()):
        wrong.append("more activations than llm.c's")
    launched = {mangled for calls in logs.values() for _, mangled, *_ in calls}
    rest = sorted(set(plain(sorted(set(compiled) - launched)).values()))
    text += f"\nKernels that these steps do not launch (fp32, other sizes, decoding):\n{', '.join(rest)}.\n"
    with open(OUT, "w") as f:
        f.write(text)
    print(f"{os.path.relpath(OUT)}: {len(kernels)} kernels; a step in ms: " +
          ", ".join(f"{c} {totals[c] * 1e3:.1f}" for c in CONFIGS))
    if wrong:
        die("; ".join(wrong))


if __name__ == "__main__":
    main()
