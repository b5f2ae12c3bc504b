#!/usr/bin/env python3
"""Times training steps of GPT-2 in PyTorch, written as its users write it: the library's fused attention, cross entropy
and AdamW, the matrices decayed, the head tied to the embedding. As nanoGPT does, it pads GPT-2's vocabulary of 50,257
to 50,304, a multiple of 64, and no other vocabulary. Freed memory is kept for reuse. Its last line is JSON: times in
milliseconds and the most memory resident in MiB, both without the first steps, which warm up.

    pytorch.py --batch 4 --sequence 256 [--compile] [--precision bf16] [--steps 5]
"""

import argparse
import ctypes
import json
import os
import statistics
import time

import torch
import torch.nn.functional as F
from torch import nn

WARM_UP = 2  # steps; on a CPU the second, too, is slower than the rest


class Block(nn.Module):
    def __init__(self, C, NH):
        super().__init__()
        self.NH = NH
        self.ln1, self.ln2 = nn.LayerNorm(C), nn.LayerNorm(C)
        self.qkv, self.attproj = nn.Linear(C, 3 * C), nn.Linear(C, C)
        self.fc, self.fcproj = nn.Linear(C, 4 * C), nn.Linear(4 * C, C)

    def forward(self, x):
        B, T, C = x.shape
        q, k, v = (y.view(B, T, self.NH, C // self.NH).transpose(1, 2) for y in self.qkv(self.ln1(x)).split(C, dim=2))
        o = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.attproj(o.transpose(1, 2).reshape(B, T, C))
        return x + self.fcproj(F.gelu(self.fc(self.ln2(x)), approximate="tanh"))


class GPT2(nn.Module):
    def __init__(self, V, maxT, L, NH, C):
        super().__init__()
        self.wte, self.wpe = nn.Embedding(V, C), nn.Embedding(maxT, C)
        self.blocks = nn.ModuleList(Block(C, NH) for _ in range(L))
        self.lnf = nn.LayerNorm(C)
        self.head = nn.Linear(C, V, bias=False)
        self.head.weight = self.wte.weight
        for p in self.parameters():
            if p.dim() > 1:
                nn.init.normal_(p, std=0.02)

    def forward(self, x, y):
        h = self.wte(x) + self.wpe(torch.arange(x.shape[1]))
        for block in self.blocks:
            h = block(h)
        logits = self.head(self.lnf(h))
        return F.cross_entropy(logits.view(-1, logits.shape[-1]), y.view(-1))


def threads():
    """PyTorch itself would take one thread a core, however many the core runs."""
    return len(os.sched_getaffinity(0))


def keep_freed_memory():
    """Otherwise malloc returns large blocks to the system, and every step faults them in again. For a CPU, PyTorch's
    tuning guide advises jemalloc or tcmalloc; these settings of malloc also keep freed memory."""
    M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4  # malloc.h
    libc = ctypes.CDLL(None)
    libc.mallopt(M_TRIM_THRESHOLD, -1)  # never shrink the heap
    libc.mallopt(M_MMAP_MAX, 0)  # large blocks, too, come from the heap


def reset_peak():
    """From here on, peak_mib() is what is held from here on."""
    with open("/proc/self/clear_refs", "w") as file:
        file.write("5")


def peak_mib():
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) for line in file if line.startswith("VmHWM:")) / 1024


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in {"batch": 4, "sequence": 256, "steps": 5, "layers": 12, "heads": 12, "channels": 768,
                          "context": 1024, "vocab": 50257, "threads": threads()}.items():
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--precision", choices=["fp32", "bf16"], default="fp32", help="bf16 is by autocast")
    args = parser.parse_args()

    keep_freed_memory()
    torch.set_num_threads(args.threads)
    torch.manual_seed(1)
    padded_vocab = 50304 if args.vocab == 50257 else args.vocab
    model = GPT2(padded_vocab, args.context, args.layers, args.heads, args.channels)
    loss_of = torch.compile(model) if args.compile else model
    matrices = [p for p in model.parameters() if p.dim() > 1]
    vectors = [p for p in model.parameters() if p.dim() == 1]
    optimizer = torch.optim.AdamW([{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0}],
                                  lr=1e-4, betas=(0.9, 0.95), fused=True)
    x, y = torch.randint(0, args.vocab, (2, args.batch, args.sequence))
    ms = []
    for step in range(WARM_UP + args.steps):
        start = time.perf_counter()
        with torch.autocast("cpu", torch.bfloat16, enabled=args.precision == "bf16"):
            loss = loss_of(x, y)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        loss.item()
        if step >= WARM_UP:
            ms.append((time.perf_counter() - start) * 1e3)
        elif step == WARM_UP - 1:
            reset_peak()
    print(json.dumps({"program": f"PyTorch {torch.__version__}", "threads": torch.get_num_threads(),
                      "parameters": sum(p.numel() for p in model.parameters()), "ms": round(statistics.median(ms), 2),
                      "best": round(min(ms), 2), "mib": round(peak_mib())}))


if __name__ == "__main__":
    main()
