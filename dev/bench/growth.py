#!/usr/bin/env python3
"""How a training step grows: with the sequence at equal tokens, with layers and channels, and with threads.

    make dev/bench/bench && dev/bench/growth.py [--precision bf16] [--attention vanilla] [--steps 3]

Beside each speed stands what it should be in theory, if every thread did as many operations per second as in the first
row of the table. The benchmark's GFLOP/s, divided by its tokens/s, is the work of a token.
"""

import argparse
import os

from peers import BENCH, parse_bench, run


def step(T, L, C, threads, args):
    """A row of bench for GPT-2 with L layers and C channels, on 1,024 tokens."""
    if threads:
        os.environ["OMP_NUM_THREADS"] = str(threads)
    said, _ = run(BENCH, "--attention", args.attention, "--precision", args.precision, "--batch", 1024 // T,
                  "--sequence", T, "--layers", L, "--channels", C, "--heads", C // 64, "--steps", args.steps,
                  "--tokens", 0)
    return parse_bench(said)[0]


def table(title, rows, args):
    print(f"\n{title}\n{'':24}{'tokens/s':>10}{'in theory':>11}{'of peak':>9}{'MiB':>8}", flush=True)
    rate = None
    for label, (T, L, C, threads) in rows.items():
        row = step(T, L, C, threads, args)
        rate = rate or row["GFLOP/s"] / (threads or 1)
        work = row["GFLOP/s"] / row["tokens/s"]
        theory = rate * (threads or 1) / work
        print(f"{label:24}{row['tokens/s']:10.1f}{theory:11.1f}{row['of peak']:8.1f}%{row['MiB']:8.0f}", flush=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--precision", choices=["fp32", "bf16"], default="fp32")
    parser.add_argument("--attention", default="vanilla")
    parser.add_argument("--steps", type=int, default=3)
    args = parser.parse_args()
    print(f"{args.attention}, {args.precision}, 1,024 tokens a step")
    table("the sequence (memory should stay: nothing is of size T x T)",
          {f"B = {1024 // T}, T = {T}": (T, 12, 768, 0) for T in (64, 128, 256, 512, 1024)}, args)
    table("layers and channels (memory: 16 bytes for each parameter, and activations in proportion to L·C)",
          {"12 layers, 768 channels": (256, 12, 768, 0), "24 layers, 1024 channels": (256, 24, 1024, 0)}, args)
    table("threads (memory: a few MiB of scratch for each)",
          {f"{n} thread{'s' * (n > 1)}": (256, 12, 768, n) for n in (1, 2)}, args)


if __name__ == "__main__":
    main()
