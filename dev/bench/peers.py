#!/usr/bin/env python3
"""Our program beside PyTorch and Transformers, with GPT-2's shape (124M): whole training steps, and greedy decoding of
one sequence. The sides run in turns, each in a process of its own; the figures are medians over the rounds.

    .venv-peers/bin/python dev/bench/peers.py [--shapes 4x64,8x512] [--precisions fp32] [--peers eager,transformers]

MiB is the most memory that was resident; for the peers, once they had warmed up. The last lines hold our memory in
training against a limit: 16 bytes per parameter (18 in bf16: its copy of the weights) and half of what PyTorch, eager
or compiled, whichever takes less, holds above its own 16.
"""

import argparse
import importlib.util
import itertools
import json
import os
import re
import statistics
import struct
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
HERE = Path(__file__).resolve().parent
PROGRAM = ROOT / "train_gpt2"
BENCH = HERE / "bench"
PRECISIONS = ["fp32", "bf16"]
PEERS = ["eager", "compiled", "transformers"]
SHARD_MAGIC = 20240520

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


def our_training(B, T, precision, steps):
    said, _ = run(BENCH, "--attention", "vanilla", "--batch", B, "--sequence", T, "--steps", steps,
                  "--precision", precision, "--tokens", 0)
    return parse_bench(said)[0]


def run_peer(script, *options):
    """Its line of JSON; the libraries may say other things around it."""
    said, _ = run(sys.executable, HERE / script, *options)
    return json.loads(next(line for line in reversed(said.splitlines()) if line.startswith("{")))


def pytorch_training(B, T, precision, steps, threads, kind):
    said = run_peer("pytorch.py", "--batch", B, "--sequence", T, "--steps", steps, "--precision", precision,
                    "--threads", threads, *(["--compile"] if kind == "compiled" else []))
    return {"tokens/s": B * T / said["ms"] * 1e3, "MiB": said["mib"], "parameters": said["parameters"]}


def write_model(folder):
    """GPT-2 after one step on made-up tokens. Without a tokenizer beside it, no token ends its text."""
    tokens = [i * 7919 % 50257 for i in range(65)]
    shard = folder / "train.bin"
    shard.write_bytes(struct.pack("<256i", SHARD_MAGIC, 1, len(tokens), *[0] * 253)
                      + struct.pack(f"<{len(tokens)}H", *tokens))
    run(PROGRAM, "train", "--train", shard, "--out", folder / "run", "--batch", 1, "--sequence", 64, "--steps", 1)
    return folder / "run/model.bin"


def our_decoding(model, precision, tokens):
    said, mib = run(PROGRAM, "generate", "--model", model, "--prompt-tokens", 50256, "--tokens", tokens,
                    "--temperature", 0, "--precision", precision)
    n, elapsed = GENERATED.search(said).groups()
    return {"tokens/s": (int(n) - 1) / float(elapsed), "MiB": mib}  # the prompt has given the first


def transformers_decoding(precision, tokens, threads):
    said = run_peer("transformers_generate.py", "--tokens", tokens, "--precision", precision, "--threads", threads)
    return {"tokens/s": (said["tokens"] - 1) / said["seconds"], "MiB": said["mib"]}


# ----------------------------------------------------------------------------------------------------------------------
# In turns


def in_turns(what, sides, rounds):
    """The median of every figure of each side, {name: function}."""
    runs = {name: [] for name in sides}
    for i in range(rounds):
        for name, measure in sides.items():
            runs[name].append({key: x for key, x in measure().items() if isinstance(x, (int, float))})
            print(f"{what}, round {i + 1} of {rounds}, {name}: {runs[name][-1]['tokens/s']:.1f} tokens/s",
                  file=sys.stderr, flush=True)
    return {name: {key: statistics.median(r[key] for r in of) for key in of[0]} for name, of in runs.items()}


def print_table(results):
    print(f"\n{'':30}{'tokens/s':>16}{'':12}{'our part':>10}{'MiB':>12}")
    print(f"{'':30}{'ours':>8}{'peer':>8}{'ratio':>12}{'of peak':>10}{'ours':>8}{'peer':>8}")
    for what, sides in results.items():
        ours = sides["ours"]
        of_peak = f"{ours['of peak']:.1f}%" if "of peak" in ours else ""
        for name, peer in sides.items():
            if name != "ours":
                rates = ours["tokens/s"], peer["tokens/s"]
                print(f"{what:16}{name:14}{rates[0]:8.1f}{rates[1]:8.1f}{rates[0] / rates[1]:12.2f}{of_peak:>10}"
                      f"{ours['MiB']:8.0f}{peer['MiB']:8.0f}")


def print_memory(results):
    print()
    for what, sides in results.items():
        holds = [side for name, side in sides.items() if name != "ours" and "parameters" in side]
        if holds:
            n, own = holds[0]["parameters"] / 2**20, 18 if what.startswith("bf16") else 16
            above = min(side["MiB"] for side in holds) - 16 * n
            print(f"memory, {what}: {sides['ours']['MiB']:.0f} MiB; limit {own * n:.0f} for parameters"
                  f" + half of PyTorch's {above:.0f} above its own = {own * n + above / 2:.0f}")


def options():
    def positive(word):
        if int(word) < 1:
            raise ValueError
        return int(word)

    def shapes(word):
        return [tuple(positive(n) for n in shape.split("x", 1)) for shape in word.split(",")]

    def some_of(names):
        def chosen(word):
            if not set(word.split(",")) <= set(names):
                raise argparse.ArgumentTypeError(f"{word}: must be of {','.join(names)}")
            return word.split(",")
        return chosen

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.error = fail
    parser.add_argument("--shapes", metavar="BxT,...", type=shapes, default="4x64,4x256,8x512",
                        help="batches and sequences to train on (default %(default)s)")
    parser.add_argument("--precisions", metavar="P,...", type=some_of(PRECISIONS), default=",".join(PRECISIONS),
                        help="default %(default)s")
    parser.add_argument("--peers", metavar="PEER,...", type=some_of(PEERS), default=",".join(PEERS),
                        help="default %(default)s; the last is the one that decodes")
    parser.add_argument("--rounds", metavar="N", type=positive, default=3, help="default %(default)s")
    parser.add_argument("--steps", metavar="N", type=positive, default=3,
                        help="training steps a run, after one to warm up (default %(default)s)")
    parser.add_argument("--tokens", metavar="N", type=positive, default=256, help="to decode (default %(default)s)")
    args = parser.parse_args()
    if args.tokens == 1:
        fail("--tokens 1: the prompt gives the first token, so there is nothing to time")
    return args


def main():
    args = options()
    for package in ["torch"] + ["transformers"] * ("transformers" in args.peers):
        if importlib.util.find_spec(package) is None:
            fail(f"{sys.executable} has no {package}: run make -C dev bench-peers")
    busy = os.getloadavg()[0]
    tiny = ["--layers", 1, "--heads", 1, "--channels", 16, "--batch", 1, "--sequence", 1, "--steps", 1, "--tokens", 0]
    threads = int(re.search(r"(\d+) threads?,", run(BENCH, *tiny)[0])[1])
    print(f"{threads} threads" + (f"; other programs keep {busy:.1f} cores busy: distrust what follows"
                                  if busy > 0.5 else ""), flush=True)

    results, kinds = {}, [kind for kind in args.peers if kind != "transformers"]
    for precision, (B, T) in itertools.product(args.precisions, args.shapes if kinds else []):
        sides = {"ours": lambda: our_training(B, T, precision, args.steps)}
        for kind in kinds:
            sides[kind] = lambda kind=kind: pytorch_training(B, T, precision, args.steps, threads, kind)
        what = f"{precision} {B}x{T}"
        results[what] = in_turns(what, sides, args.rounds)
    if "transformers" in args.peers:
        with tempfile.TemporaryDirectory() as folder:
            model = write_model(Path(folder))
            for precision in args.precisions:
                what = f"{precision} decoding"
                results[what] = in_turns(what, {
                    "ours": lambda: our_decoding(model, precision, args.tokens),
                    "transformers": lambda: transformers_decoding(precision, args.tokens, threads)}, args.rounds)

    print_table(results)
    print_memory(results)


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        fail("interrupted")
