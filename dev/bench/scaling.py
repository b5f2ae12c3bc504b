#!/usr/bin/env python3
"""What to expect of several processes: the tables of dev/scaling.md, computed, not measured.

    dev/bench/scaling.py

A step of N processes takes

    compute + max(0, reduce - overlap) + last + gather

    compute   tokens of a process / its measured tokens per second
    reduce    (N-1)/N · 4 (P - E) bytes through the link, and N-1 messages for each of the M slots of the model
    last      (N-1)/N · 4E bytes, of the embeddings
    overlap   the backward pass of the last micro-batch, two thirds of its time, during which gradients are summed
    gather    (N-1)/N · 4P bytes (bf16: 2P), and as many messages

P is the number of parameters, E that of the embeddings, M = 12 L + 4. Links carry their nominal rate in each
direction, all at the same time."""

from types import SimpleNamespace

TOKENS = 524_288  # of a step
NUMBERS = [2, 4, 8, 16, 64, 256, 1024]
# flops: of a token, in those of the first model, as `train_gpt2 describe` counts them at T = 1024
MODELS = {"GPT-2 (124M)": SimpleNamespace(P=124_439_808, E=51_281 * 768, L=12, flops=1),
          "GPT-2 XL (1.5B)": SimpleNamespace(P=1_557_611_200, E=51_281 * 1600, L=48, flops=12.3)}
# Tokens per second with the first model: measured on two cores of an AMD EPYC (Zen 5) in fp32, here times 8 for the 16
# cores of a process; and on an H200 in bf16. micro: tokens of a micro-batch.
MACHINES = {"16 cores": SimpleNamespace(rate=8 * 548, micro=4096, weight_bytes=4),
            "an H200": SimpleNamespace(rate=577_000, micro=65_536, weight_bytes=2)}
# Bytes per second in each direction; seconds that a message costs
LINKS = {"1 Gbit/s": (1e9 / 8, 5e-6), "10 Gbit/s": (10e9 / 8, 5e-6), "100 Gbit/s": (100e9 / 8, 2e-6),
         "NVLink (450 GB/s)": (450e9, 2e-6)}


def seconds(model, machine, link, n):
    rate, (bandwidth, message) = machine.rate / model.flops, link
    own = TOKENS / n
    messages = (12 * model.L + 4) * (n - 1) * message
    reduce = (n - 1) / n * 4 * (model.P - model.E) / bandwidth + messages
    last = (n - 1) / n * 4 * model.E / bandwidth
    gather = (n - 1) / n * machine.weight_bytes * model.P / bandwidth + messages
    overlap = 2 / 3 * min(own, machine.micro) / rate
    return own / rate + (max(0, reduce - overlap) + last + gather if n > 1 else 0)


def main():
    for name, model in MODELS.items():
        for kind, machine in MACHINES.items():
            one = seconds(model, machine, (1, 0), 1)
            print(f"\n### {name}, processes of {kind} each: {one:,.1f} s a step with one\n")
            print("| link | " + " | ".join(f"N = {n:,}" for n in NUMBERS) + " | 80 % up to |")
            print("|---|" + "---|" * (len(NUMBERS) + 1))
            for title, link in LINKS.items():
                if "NVLink" in title and kind != "an H200":
                    continue
                most = 8 if "NVLink" in title else 1024  # of a machine's GPUs
                speedups = [f"{one / seconds(model, machine, link, n):,.1f}" if n <= most else "" for n in NUMBERS]
                good = [n for n in range(1, most + 1) if one / seconds(model, machine, link, n) >= 0.8 * n]
                print(f"| {title} | " + " | ".join(speedups) + f" | {max(good):,} |")


if __name__ == "__main__":
    main()
