#!/usr/bin/env python3
"""Our program beside PyTorch and Transformers: whole training steps of GPT-2 (124M) and of small models, and GPT-2's
greedy decoding of one sequence.

    .venv-peers/bin/python dev/bench/peers.py [--rounds 3] [CASE]...       narrow, bf16, "gpt2 4x64 fp32", decoding, ...

A word chooses the cases whose names contain it; without one, all run. In each round every side runs once, in a process
of its own with the same number of threads, since PyTorch's speed differs between processes. The table has the medians
over the rounds, but the best step of all rounds. The ratio is to the faster of PyTorch eager and compiled. PyTorch is
what pip installs: on an AMD EPYC (Zen 5), its MKL multiplies fp32 with AVX2 although there is AVX-512.

MiB is the most memory that was resident; for the peers, once they had warmed up. The limit for our memory is 16 bytes
per parameter (18 in bf16: its copy of the weights) and half of what PyTorch, eager or compiled, whichever takes less,
holds above its own 16.
"""

import argparse
import importlib.util
import json
import os
import re
import statistics
import struct
import subprocess
import sys
import tempfile
from functools import partial
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[2]
HERE = Path(__file__).resolve().parent
PROGRAM = ROOT / "train_gpt2"
BENCH = HERE / "bench"
SHARD_MAGIC = 20240520


class Shape(NamedTuple):
    """Options of both benchmarks. The steps take each side some seconds on two cores."""
    layers: int
    heads: int
    channels: int
    vocab: int
    context: int
    batch: int
    sequence: int
    steps: int


GPT2 = 12, 12, 768, 50257, 1024
MODELS = {
    "make-run": Shape(3, 4, 128, 257, 96, 8, 96, steps=300),  # the top Makefile's
    "shakespeare": Shape(4, 4, 128, 65, 64, 12, 64, steps=200),  # nanoGPT's for a CPU
    "baby": Shape(6, 6, 384, 65, 256, 16, 256, steps=5),  # nanoGPT's "baby GPT", with fewer sequences
    "narrow": Shape(12, 12, 96, 4096, 256, 8, 256, steps=20),
    "gpt2 4x64": Shape(*GPT2, 4, 64, steps=5),
    "gpt2 4x256": Shape(*GPT2, 4, 256, steps=3),
    "gpt2 8x512": Shape(*GPT2, 8, 512, steps=3),
    "gpt2 decoding": None,
}
CASES = {f"{name} {precision}": (shape, precision) for precision in ("fp32", "bf16")
         for name, shape in MODELS.items() if precision == "fp32" or name.startswith("gpt2")}
TOKENS = 256  # to decode

COLUMNS = ["ms", "best", "tokens/s", "GFLOP/s", "of peak", "MiB"]
ROW = re.compile(r"(\S.*?)" + r"\s+([\d.]+)" * 4 + r"\s+([\d.]+)%\s+(\d+)")
PART = re.compile(r"    (\S.*?)\s+(-?[\d.]+) ms\s+-?[\d.]+%.*")
GENERATED = re.compile(r"then (\d+) tokens? in ([\d.]+) s, ")


def fail(message):
    sys.exit(f"error: {message}")


def run(*command):
    """What a program says on either stream, and the most memory it held, in MiB."""
    command = list(map(str, command))
    try:
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, cwd=ROOT)
    except OSError as e:
        fail(f"{command[0]}: {e.strerror}; run make -C dev bench-peers")
    with process.stdout:
        said = process.stdout.read()
    _, status, usage = os.wait4(process.pid, 0)  # in place of process.wait(), which tells no memory
    process.returncode = status
    if status != 0:
        fail(f"{' '.join(command)}: {(said.strip() or f'ended with status {status}').splitlines()[-1]}")
    return said, usage.ru_maxrss / 1024


def parse_bench(said):
    """The training rows of dev/bench/bench: the attention, COLUMNS, and as "parts" the ms of --profile's lines."""
    rows = []
    for line in said.split("\ngenerating:")[0].splitlines():
        row, part = ROW.fullmatch(line), PART.fullmatch(line)
        if row:
            rows.append({"attention": row[1], **dict(zip(COLUMNS, map(float, row.groups()[1:]))), "parts": {}})
        elif part:
            rows[-1]["parts"][part[1]] = float(part[2])
    return rows


# ----------------------------------------------------------------------------------------------------------------------
# One run of each kind: {"tokens/s": ..., "MiB": ..., ...}


def bench_options(shape, precision):
    return ["--precision", precision, *(word for name, x in shape._asdict().items() for word in (f"--{name}", x))]


def our_training(shape, precision):
    said, _ = run(BENCH, "--attention", "vanilla", "--tokens", 0, *bench_options(shape, precision))
    row, = parse_bench(said)
    return row


def run_peer(script, *options):
    """Its line of JSON; the libraries may say other things around it."""
    said, _ = run(sys.executable, HERE / script, *options)
    return json.loads(next(line for line in reversed(said.splitlines()) if line.startswith("{")))


def pytorch_training(shape, precision, threads, *compile):
    said = run_peer("pytorch.py", "--threads", threads, *bench_options(shape, precision), *compile)
    return {"tokens/s": shape.batch * shape.sequence / said["ms"] * 1e3, "MiB": said["mib"], **said}


def write_model(folder):
    """GPT-2 after one step on made-up tokens. Without a tokenizer beside it, no token ends its text."""
    tokens = [i * 7919 % 50257 for i in range(65)]
    shard = folder / "train.bin"
    shard.write_bytes(struct.pack("<256i", SHARD_MAGIC, 1, len(tokens), *[0] * 253)
                      + struct.pack(f"<{len(tokens)}H", *tokens))
    run(PROGRAM, "train", "--train", shard, "--out", folder / "run", "--batch", 1, "--sequence", 64, "--steps", 1,
        "--overwrite")
    return folder / "run/model.bin"


def our_decoding(model, precision):
    said, mib = run(PROGRAM, "generate", "--model", model, "--prompt-tokens", 50256, "--tokens", TOKENS,
                    "--temperature", 0, "--precision", precision)
    n, elapsed = GENERATED.search(said).groups()
    return {"tokens/s": (int(n) - 1) / float(elapsed), "MiB": mib}  # the prompt has given the first


def transformers_decoding(precision, threads):
    said = run_peer("transformers_generate.py", "--tokens", TOKENS, "--precision", precision, "--threads", threads)
    return {"tokens/s": (said["tokens"] - 1) / said["seconds"], "MiB": said["mib"]}


# ----------------------------------------------------------------------------------------------------------------------
# In turns


def in_turns(case, sides, rounds):
    """The figures of each side of {name: function}."""
    runs = {name: [] for name in sides}
    for i in range(rounds):
        for name, measure in sides.items():
            runs[name].append({key: x for key, x in measure().items() if isinstance(x, (int, float))})
            print(f"{case}, round {i + 1} of {rounds}, {name}: {runs[name][-1]['tokens/s']:.1f} tokens/s",
                  file=sys.stderr, flush=True)
    return {name: {key: (min if key == "best" else statistics.median)(r[key] for r in of) for key in of[0]}
            for name, of in runs.items()}


def memory_limit(precision, peers):
    n = peers[0]["parameters"] / 2**20
    return (18 if precision == "bf16" else 16) * n + (min(peer["MiB"] for peer in peers) - 16 * n) / 2


# Width and format of each column
TABLE = {"ms": (9, ".2f"), "best": (10, ".2f"), "tokens/s": (10, ".1f"), "ratio": (7, ".2f"), "of peak": (9, ".1f"),
         "MiB": (7, ".0f"), "limit": (7, ".0f")}


def print_case(case, sides, precision):
    ours, *peers = sides.values()
    ours["ratio"] = ours["tokens/s"] / max(peer["tokens/s"] for peer in peers)
    if "parameters" in peers[0]:
        ours["limit"] = memory_limit(precision, peers)
    for name, side in sides.items():
        cells = (f"{format(side[key], form) if key in side else '':>{width}}" for key, (width, form) in TABLE.items())
        print(f"{case:22}{name:12}{''.join(cells)}".rstrip(), flush=True)


def options():
    def positive(word):
        if int(word) < 1:
            raise ValueError
        return int(word)

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
                                     epilog="cases: " + ", ".join(CASES))
    parser.error = fail
    parser.add_argument("cases", metavar="CASE", nargs="*", help="part of a case's name")
    parser.add_argument("--rounds", metavar="N", type=positive, default=3, help="default %(default)s")
    parser.add_argument("--steps", metavar="N", type=positive,
                        help="training steps a run, after those that warm up (default: by case)")
    args = parser.parse_args()
    for word in args.cases:
        if not any(word in case for case in CASES):
            fail(f"{word}: no case has this in its name; see --help")
    return args


def main():
    args = options()
    cases = {name: x for name, x in CASES.items() if not args.cases or any(word in name for word in args.cases)}
    for package in ["torch", "transformers"]:
        if importlib.util.find_spec(package) is None:
            fail(f"{sys.executable} has no {package}: run make -C dev bench-peers")
    busy = os.getloadavg()[0]
    said, _ = run(BENCH, "--tokens", 0, *bench_options(Shape(1, 1, 16, 64, 1, 1, 1, steps=1), "fp32"))
    threads = int(re.search(r"(\d+) threads?,", said)[1])
    print(f"{threads} threads" + (f"; other programs keep {busy:.1f} cores busy: distrust what follows"
                                  if busy > 0.5 else ""))
    print("\n" + " " * 34 + "".join(f"{key:>{width}}" for key, (width, _) in TABLE.items()), flush=True)

    with tempfile.TemporaryDirectory() as folder:
        for case, (shape, precision) in cases.items():
            if shape:
                shape = shape._replace(steps=args.steps or shape.steps)
                eager = partial(pytorch_training, shape, precision, threads)
                sides = {"ours": partial(our_training, shape, precision), "eager": eager,
                         "compiled": partial(eager, "--compile")}
            else:
                sides = {"ours": partial(our_decoding, write_model(Path(folder)), precision),
                         "transformers": partial(transformers_decoding, precision, threads)}
            print_case(case, in_turns(case, sides, args.rounds), precision)


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        fail("interrupted")
