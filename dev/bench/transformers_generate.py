#!/usr/bin/env python3
"""Times greedy decoding with the KV cache in Transformers: GPT-2's shape with random weights, one sequence that no
token ends. Its last line is JSON: seconds for the tokens after the first, which the prompt gives, and the most memory
resident meanwhile in MiB.

    transformers_generate.py [--tokens 256] [--precision bf16]
"""

import argparse
import json
import time

import torch
import transformers
from pytorch import keep_freed_memory, peak_mib, reset_peak, threads

PROMPT = [50256]
WARM_UP = 8  # tokens


class Clock(transformers.generation.BaseStreamer):
    """Notes when each token is there."""

    def __init__(self):
        self.times = []

    def put(self, tokens):
        self.times.append(time.perf_counter())

    def end(self):
        pass


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=256)
    parser.add_argument("--threads", type=int, default=threads())
    parser.add_argument("--precision", choices=["fp32", "bf16"], default="fp32")
    args = parser.parse_args()

    keep_freed_memory()
    torch.set_num_threads(args.threads)
    torch.manual_seed(1)
    config = transformers.GPT2Config(bos_token_id=None, eos_token_id=None)  # the rest is GPT-2's
    model = transformers.GPT2LMHeadModel(config).eval()
    if args.precision == "bf16":
        model = model.to(torch.bfloat16)

    def generate(n):
        clock, prompt = Clock(), torch.tensor([PROMPT])
        text = model.generate(prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=n, do_sample=False,
                              use_cache=True, streamer=clock)
        assert text.shape[1] == len(clock.times) - 1 + len(PROMPT) == n + len(PROMPT)  # the prompt comes first, at once
        return clock.times[-1] - clock.times[1]

    generate(WARM_UP)
    reset_peak()
    elapsed = generate(args.tokens)
    print(json.dumps({"program": f"Transformers {transformers.__version__}", "threads": torch.get_num_threads(),
                      "tokens": args.tokens, "seconds": round(elapsed, 3), "mib": round(peak_mib())}))


if __name__ == "__main__":
    main()
