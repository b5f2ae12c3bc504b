#!/usr/bin/env python3
"""How a training step grows: with the sequence at equal tokens, with layers and channels, and with threads.

    make dev/bench/bench && dev/bench/growth.py [--precision bf16] [--attention vanilla] [--steps 3]

Beside each figure stands what it should be in theory: the time in proportion to the operations of a step
(6 · (V·C + 12·L·C²) + 6·L·C·T for each token), taken from the first row of its table.
"""

import argparse
import os

from peers import BENCH, parse_bench, run

V = 50257


def step(T, L, C, threads, args):
    """A row of bench for GPT-2 with L layers and C channels, on 1,024 tokens."""
    if threads:
        os.environ["OMP_NUM_THREADS"] = str(threads)
    said, _ = run(BENCH, "--attention", args.attention, "--precision", args.precision, "--batch", 1024 // T,
                  "--sequence", T, "--layers", L, "--channels", C, "--heads", C // 64, "--steps", args.steps, "--tokens", 0)
    return parse_bench(said)[0]


def operations(T, L, C):
    return 6 * (V * C + 12 * L * C * C) + 6 * L * C * T


def table(title, rows, args):
    print(f"\n{title}\n{'':24}{'tokens/s':>10}{'in theory':>11}{'of peak':>9}{'MiB':>8}", flush=True)
    first = None
    for label, (T, L, C, threads) in rows.items():
        row = step(T, L, C, threads, args)
        work = operations(T, L, C) / (threads or 1)
        first = first or (row["tokens/s"], work)
        theory = first[0] * first[1] / work
        print(f"{label:24}{row['tokens/s']:10.1f}{theory:11.1f}{row['of peak']:8.1f}%{row['MiB']:8.0f}", flush=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--precision", choices=["fp32", "bf16"], default="fp32")
    parser.add_argument("--attention", choices=["vanilla", "skip", "depth"], default="vanilla")
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
