#!/usr/bin/env python3
"""GPT-2 with three attentions in plain PyTorch, in float64, differentiated by autograd: what the C++ is held against.

It is written from the formulas alone and for clarity, not speed: no KV cache, no fused operation, no gradient by hand.

    reference.py dump --out PREFIX ...      a random model and what it computes: PREFIX.model.bin, PREFIX.state.bin
    reference.py check MODEL STATE          computes such a pair again and compares
    reference.py round MODEL STATE          writes how far rounding to bf16 moves each part of it: PREFIX.bf16.txt
    reference.py generate --model MODEL ... greedy decoding: in each line a token, and by how much its logit led
    reference.py all                        rewrites what is kept in dev/reference/: dumps and what `round` writes

Dimensions: B batch, T time, C channels, NH heads, HS = C/NH head size, L layers, V vocabulary, Vp = V padded to a
multiple of 128, maxT context.
"""

import argparse
import math
import os
import re
import sys
from dataclasses import dataclass

import numpy as np
import torch

MODEL_MAGIC, STATE_MAGIC = 20240326, 20240327
ATTENTIONS = ["vanilla", "skip", "depth"]
DECAYS = {"wte", "wpe", "qkvw", "attprojw", "fcw", "fcprojw"}  # weight decay applies to the matrices alone
# Dumps' AdamW: a high learning rate and much decay, so that a wrong update shows in the losses of a few steps.
ADAMW = {"lr": 0.003, "beta1": 0.9, "beta2": 0.95, "eps": 1e-8, "weight_decay": 1.0}


def die(message):
    sys.exit(f"error: {message}")  # on stderr, exit status 1


# ----------------------------------------------------------------------------------------------------------------------
# The model


@dataclass
class Config:
    maxT: int
    V: int
    L: int
    NH: int
    C: int
    attention: str = "vanilla"
    skip_distance: int | None = None  # n_l
    skip_heads: int | None = None  # n_h
    depth_stride: int | None = None  # s
    depth_window: int | None = None  # w

    def __post_init__(self):
        if min(self.maxT, self.V, self.L, self.NH, self.C) < 1 or self.C % self.NH:
            die(f"context {self.maxT}, vocabulary {self.V}, {self.L} layers, {self.NH} heads, {self.C} channels: each "
                "must be at least 1, and the channels a multiple of the heads")
        defaults = {"skip_distance": max(1, 3 * self.L // 4), "skip_heads": max(1, 3 * self.NH // 4),
                    "depth_stride": max(1, self.L // 2), "depth_window": 0}
        for name, value in defaults.items():
            if getattr(self, name) is None:
                setattr(self, name, value)
        if self.skip_distance < 1 or not 0 <= self.skip_heads <= self.NH:
            die(f"skip distance {self.skip_distance} (at least 1) or skip heads {self.skip_heads} (0 to {self.NH})")
        if self.depth_stride < 1 or self.depth_window < 0:
            die(f"depth stride {self.depth_stride} (at least 1) or depth window {self.depth_window} (at least 0)")

    @property
    def Vp(self):
        return (self.V + 127) // 128 * 128

    def shapes(self):  # the sixteen tensors in file order
        L, C = self.L, self.C
        return {"wte": (self.Vp, C), "wpe": (self.maxT, C), "ln1w": (L, C), "ln1b": (L, C),
                "qkvw": (L, 3 * C, C), "qkvb": (L, 3 * C), "attprojw": (L, C, C), "attprojb": (L, C),
                "ln2w": (L, C), "ln2b": (L, C), "fcw": (L, 4 * C, C), "fcb": (L, 4 * C),
                "fcprojw": (L, C, 4 * C), "fcprojb": (L, C), "lnfw": (C,), "lnfb": (C,)}


class Rounded(torch.autograd.Function):
    """x rounded to bf16, and on the way back its gradient, which by then is summed over all that read x."""

    @staticmethod
    def forward(ctx, x, values, gradients):
        ctx.gradients = gradients
        return x.bfloat16().double() if values else x.clone()

    @staticmethod
    def backward(ctx, dx):
        return dx.bfloat16().double() if ctx.gradients else dx, None, None


# The model is written with a rounding r(x) at each point where bf16 training rounds: r is one of these two.
def exact(x, values=True, gradients=True):
    return x


def to_bf16(x, values=True, gradients=True):
    return Rounded.apply(x, values, gradients)


def layernorm(x, w, b):
    mean = x.mean(-1, keepdim=True)
    variance = ((x - mean) ** 2).mean(-1, keepdim=True)
    return (x - mean) / torch.sqrt(variance + 1e-5) * w + b


def linear(x, w, b):
    return x @ w.T + b


def gelu(x):
    return 0.5 * x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


def softmax_mean(scores, x, r_weights, r):
    """softmax(scores) x, with scores (.., n, S) and x (.., S, HS)."""
    weights = torch.exp(scores - torch.logsumexp(scores, dim=-1, keepdim=True).detach())
    total = weights.sum(-1, keepdim=True)  # 1, but not constant
    mean = r_weights(weights, gradients=False) @ x
    # mean / total, whose derivative by the total is -mean. Backward reads that from memory, rounded; so it is apart.
    return mean + (1 - total) * r(mean).detach()


def causal_attention(q, k, v, r):  # each (B, NH, T, HS)
    T, HS = q.shape[-2:]
    scores = q @ k.transpose(-2, -1) / math.sqrt(HS)  # (B, NH, T, T)
    future = torch.ones(T, T, dtype=torch.bool).triu(1)
    scores = r(scores.masked_fill(future, -math.inf), values=False)
    return softmax_mean(scores, v, r, r)


def skip_sources(c, l, k, v):
    """What layer l's heads read: the keys and values of layer l - n_l if h < n_h and there is one, else its own."""
    below = l - c.skip_distance
    source = [below if h < c.skip_heads and below >= 0 else l for h in range(c.NH)]
    return tuple(torch.stack([y[source[h]][:, h] for h in range(c.NH)], dim=1) for y in (k, v))


def depth_mix(c, l, q, k, mixed, v, r):
    """Layer l's values v mixed, at each token, with those of its sources, which are mixed already."""
    sources = [j for j in range(l) if j % c.depth_stride == 0 or j >= l - c.depth_window]
    k = torch.stack([k[j] for j in [*sources, l]], dim=-2)  # (B, NH, T, S, HS)
    x = torch.stack([mixed[j] for j in sources] + [v], dim=-2)  # (B, NH, T, S, HS)
    # A token's query with its own keys only: (B, NH, T, 1, S)
    scores = q.unsqueeze(-2) @ k.transpose(-2, -1) / math.sqrt(q.shape[-1])
    # Softmax sees differences only. Taken from the own score, its gradient is minus the sum of the others', without v.
    scores = scores - scores[..., -1:]
    return softmax_mean(scores, x, exact, r).squeeze(-2)


def forward(c, p, x, r=exact):
    """Tokens x (B, T) to logits (B, T, V), with the parameters p, rounded by r."""
    B, T = x.shape
    p = {name: r(t, gradients=False) for name, t in p.items()}  # a working copy; p itself and its gradient stay exact
    residual = r(p["wte"][x] + p["wpe"][:T])  # (B, T, C)
    keys, values = [], []  # one (B, NH, T, HS) a layer; with depth the values are the mixed ones

    for l in range(c.L):
        normed = r(layernorm(residual, p["ln1w"][l], p["ln1b"][l]))
        qkv = r(linear(normed, p["qkvw"][l], p["qkvb"][l]))  # (B, T, 3C)
        q, k, v = (y.reshape(B, T, c.NH, c.C // c.NH).transpose(1, 2) for y in qkv.split(c.C, dim=-1))
        keys.append(k)
        if c.attention == "depth":
            v = r(depth_mix(c, l, q, keys, values, v, r))
        values.append(v)
        if c.attention == "skip":
            k, v = skip_sources(c, l, keys, values)
        q = r(q, values=False)  # attention's dq is rounded before the mixing adds its share
        o = r(causal_attention(q, k, v, r).transpose(1, 2).reshape(B, T, c.C))
        residual = r(residual + linear(o, p["attprojw"][l], p["attprojb"][l]))

        normed = r(layernorm(residual, p["ln2w"][l], p["ln2b"][l]))
        hidden = r(linear(normed, p["fcw"][l], p["fcb"][l]))  # (B, T, 4C)
        hidden = r(gelu(hidden), gradients=False)  # its gradient goes on, in fp32, through GELU
        residual = r(residual + linear(hidden, p["fcprojw"][l], p["fcprojb"][l]))

    normed = r(layernorm(residual, p["lnfw"], p["lnfb"]))
    return r(normed @ p["wte"][: c.V].T)  # the padding is no token: no logit, no gradient


def cross_entropy(logits, y):  # mean over (B, T)
    return -torch.log_softmax(logits, dim=-1).gather(-1, y.unsqueeze(-1)).mean()


# ----------------------------------------------------------------------------------------------------------------------
# What a dump records


def compute(c, p, x, y, adamw=(0.0,) * 5, steps=0, r=exact):
    """Logits, loss and gradients on x, y; then AdamW steps, with the loss before each. The parameters p change."""
    logits = forward(c, p, x, r)
    loss = cross_entropy(logits, y)
    loss.backward()
    result = {"logits": logits.detach(), "loss": loss.detach()}
    result |= {f"d{name}": t.grad.clone() for name, t in p.items()}

    lr, beta1, beta2, eps, weight_decay = adamw
    groups = [{"params": [t for name, t in p.items() if name in DECAYS], "weight_decay": weight_decay},
              {"params": [t for name, t in p.items() if name not in DECAYS], "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=lr, betas=(beta1, beta2), eps=eps)
    losses = []
    for _ in range(steps):
        optimizer.zero_grad()
        loss = cross_entropy(forward(c, p, x, r), y)
        loss.backward()
        optimizer.step()
        losses.append(loss.detach())
    return result | ({"losses": torch.stack(losses)} if losses else {})


def blocks(result):
    """What is compared on its own: logits, loss, and of each gradient each layer; of qkv the share of q, k and v."""
    for name, a in result.items():
        whole = name in ("logits", "loss", "dwte", "dwpe", "dlnfw", "dlnfb")
        for l, layer in enumerate([a] if whole else a):
            parts = zip((".q", ".k", ".v"), layer.chunk(3)) if name.startswith("dqkv") else [("", layer)]
            for part, block in parts:
                yield name + ("" if whole else f".{l}") + part, block


NEARBY = 128  # models


def rounding_errors(c, p, x, y):
    """By block, the rms error of bf16. In one model it is an accident where a block is small (the loss is one number).
    So it is taken over models around p, far enough from each other that each rounds in its own way."""
    rng = np.random.default_rng(0)
    squares = {}
    for _ in range(NEARBY):
        near = {name: a.detach().numpy() * rng.normal(1, 0.01, a.shape) for name, a in p.items()}
        should, does = (dict(blocks(compute(c, promote(near), x, y, r=r))) for r in (exact, to_bf16))
        for name in should:
            squares[name] = squares.get(name, 0) + ((does[name] - should[name]) ** 2).mean().item()
    return {name: math.sqrt(s / NEARBY) for name, s in squares.items()}


def random_parameters(c, rng):
    """Wide, unlike what a model starts with, so that each term of the mathematics weighs. In fp32, as files hold it."""
    p = {}
    for name, shape in c.shapes().items():
        if name.endswith("b"):
            t = rng.normal(0, 0.3, shape)
        elif name.startswith("ln"):
            t = rng.normal(1, 0.3, shape)
        else:
            t = rng.normal(0, rng.uniform(1, 1.5) / math.sqrt(c.C), shape)
        p[name] = t.astype(np.float32)
    p["wte"][c.V :] = 0
    return p


def promote(arrays):
    return {name: torch.tensor(a, dtype=torch.float64, requires_grad=True) for name, a in arrays.items()}


# ----------------------------------------------------------------------------------------------------------------------
# Files: little endian, a header of 256 int32, then arrays of int32 or fp32


def write(path, header, arrays):
    full = np.zeros(256, "<i4")
    full[: len(header)] = header
    arrays = [full, *(np.asarray(a) for a in arrays)]
    try:  # under another name first, so that the file is there in whole or not at all
        with open(f"{path}.part", "wb") as file:
            for a in arrays:
                file.write(a.astype("<i4" if a.dtype.kind == "i" else "<f4").tobytes())
        os.replace(f"{path}.part", path)
    except OSError as e:
        die(f"{path}: {e.strerror}")


def read(path, magic):
    """The header, and the bytes that follow it."""
    try:
        data = np.fromfile(path, np.uint8)
    except OSError as e:
        die(f"{path}: {e.strerror}")
    header = data[:1024].view("<i4").tolist() if len(data) >= 1024 else [0]
    if header[0] != magic:
        die(f"{path}: does not begin with a header of magic {magic}")
    return header, data[1024:]


def cut(path, data, shapes, exact):
    """The arrays of these shapes that data holds one after another."""
    sizes = [4 * math.prod(shape) for shape in shapes.values()]
    if len(data) < sum(sizes) or (exact and len(data) != sum(sizes)):
        die(f"{path}: {len(data)} bytes follow the header, its arrays take {sum(sizes)}")
    ends = np.cumsum(sizes)
    return {name: data[end - size : end].view("<i4" if name in "xy" else "<f4").reshape(shape)
            for (name, shape), size, end in zip(shapes.items(), sizes, ends)}


def write_model(path, c, p):
    vanilla = c.attention == "vanilla"
    header = [MODEL_MAGIC, 3 if vanilla else 1003, c.maxT, c.V, c.L, c.NH, c.C, c.Vp, ATTENTIONS.index(c.attention)]
    write(path, header + ([] if vanilla else [c.skip_distance, c.skip_heads, c.depth_stride, c.depth_window]),
          p.values())


def read_model(path, override):
    """Config and parameters; `override` holds fields of Config that replace the file's."""
    header, data = read(path, MODEL_MAGIC)
    version, maxT, V, L, NH, C, Vp, attention = header[1:9]
    if version not in (3, 1003) or not 0 <= attention <= 2:
        die(f"{path}: version {version}, attention {attention}; versions 3 and 1003, attentions 0 to 2 can be read")
    own = [{}, {"skip_distance": header[9], "skip_heads": header[10]},
           {"depth_stride": header[11], "depth_window": header[12]}][attention]
    c = Config(maxT, V, L, NH, C, **{"attention": ATTENTIONS[attention], **own, **override})
    if Vp != c.Vp:
        die(f"{path}: vocabulary {V} padded to {Vp}, must be {c.Vp}")
    return c, promote(cut(path, data, c.shapes(), exact=header[255] == 0))  # 1: a checkpoint, whose state follows


def state_shapes(c, B, T, steps):
    shapes = {"x": (B, T), "y": (B, T), "logits": (B, T, c.V), "loss": ()}
    shapes |= {f"d{name}": shape for name, shape in c.shapes().items()}
    return shapes | ({"adamw": (5,), "losses": (steps,)} if steps else {})


def read_state(path, c):
    """The arrays by name, and whether they were computed in float64."""
    header, data = read(path, STATE_MAGIC)
    version, B, T, steps, bits = header[1:6]
    if version != 2 or B < 1 or not 1 <= T <= c.maxT or steps < 0:
        die(f"{path}: version {version} (must be 2), B {B}, T {T} (context {c.maxT}), {steps} steps")
    state = cut(path, data, state_shapes(c, B, T, steps), exact=True)
    for name in "xy":
        if not ((0 <= state[name]) & (state[name] < c.V)).all():
            die(f"{path}: {name} holds a token outside 0 to {c.V - 1}")
    return state, bits == 64


# ----------------------------------------------------------------------------------------------------------------------
# Commands


def write_dump(prefix, c, B, T, seed, steps, adamw):
    torch.set_num_threads(1)  # one order of summation, whatever the machine
    rng = np.random.default_rng(seed)
    p = random_parameters(c, rng)
    tokens = torch.tensor(rng.integers(0, c.V, (B, T + 1)))
    x, y = tokens[:, :-1], tokens[:, 1:]
    adamw = np.float32(adamw)
    result = compute(c, promote(p), x, y, adamw.tolist(), steps)
    state = {"x": x, "y": y, "adamw": adamw} | result
    write_model(f"{prefix}.model.bin", c, p)
    write(f"{prefix}.state.bin", [STATE_MAGIC, 2, B, T, steps, 64], [state[n] for n in state_shapes(c, B, T, steps)])


def dump(args):
    c = Config(args.context, args.vocab, args.layers, args.heads, args.channels, **variant(args))
    if args.batch < 1 or not 1 <= args.sequence <= c.maxT or args.steps < 0 or args.seed < 0:
        die(f"--batch {args.batch}, --sequence {args.sequence} (context {c.maxT}), --steps {args.steps} or "
            f"--seed {args.seed} is out of range")
    write_dump(args.out, c, args.batch, args.sequence, args.seed, args.steps, [getattr(args, n) for n in ADAMW])


def check(args):
    c, p = read_model(args.model, {})
    state, float64 = read_state(args.state, c)
    x, y = torch.tensor(state["x"]).long(), torch.tensor(state["y"]).long()
    result = compute(c, p, x, y, state.get("adamw", np.zeros(5)).tolist(), len(state.get("losses", [])))
    wrong = 0
    for name, ours in result.items():
        tolerance = (1e-6 if float64 else 5e-4) * ours.abs().max().item()
        error = (ours - torch.tensor(state[name])).abs().max().item()
        ok = error <= tolerance  # false for NaN
        wrong += not ok
        print(f"{name:10} largest error {error:.2e}   tolerance {tolerance:.2e}   {'ok' if ok else 'WRONG'}")
    if wrong:
        die(f"{args.state}: {wrong} of {len(result)} arrays are not what {args.model} computes")


def write_rounding(model, state):
    torch.set_num_threads(1)
    c, p = read_model(model, {})
    arrays, _ = read_state(state, c)
    errors = rounding_errors(c, p, torch.tensor(arrays["x"]).long(), torch.tensor(arrays["y"]).long())
    path = state.removesuffix(".state.bin") + ".bf16.txt"
    try:
        with open(f"{path}.part", "w") as file:
            file.writelines(f"{name} {error:.3e}\n" for name, error in errors.items())
        os.replace(f"{path}.part", path)
    except OSError as e:
        die(f"{path}: {e.strerror}")
    print(path)


@torch.no_grad()
def greedy(c, p, tokens, n):
    """The likeliest next token, n times, each with its logit's lead over the next best."""
    tokens, start = list(tokens), 0  # of the first `length` tokens, the model reads those from `start`
    for length in range(1, len(tokens) + n):
        if length - start > c.maxT:
            start = length - max(1, c.maxT // 2)  # past the context: the latest half, anew from position 0
        if length == len(tokens):
            best = forward(c, p, torch.tensor([tokens[start:]]))[0, -1].topk(2)
            tokens.append(best.indices[0].item())
            yield tokens[-1], (best.values[0] - best.values[1]).item()


def generate(args):
    c, p = read_model(args.model, variant(args))
    try:
        tokens = [int(t) for t in args.prompt_tokens.split(",")]
    except ValueError:
        tokens = []
    if not tokens or not all(0 <= t < c.V for t in tokens) or c.V < 2:
        die(f"--prompt-tokens {args.prompt_tokens}: must be numbers from 0 to {c.V - 1}, like 1,2,3")
    for token, lead in greedy(c, p, tokens, args.tokens):
        print(token, f"{lead:.6g}", flush=True)


# The dumps of dev/reference/: small, and between them every case: layers that are reader and source at once, one head
# or all of them skipping, sources by stride, by window and by both, T below and across any tile, odd widths.
DUMPS = """
vanilla_L2_NH2_C24_V61_B1_T131        vanilla_L2_NH5_C40_V150_B2_T37
skip_L2_NH3_C36_V61_B3_T13_nl1_nh1    skip_L4_NH3_C24_V61_B1_T67_nl1_nh2    skip_L3_NH2_C24_V61_B1_T131_nl1_nh2
skip_L3_NH3_C24_V61_B2_T37_nl2_nh1    skip_L5_NH2_C16_V127_B3_T13_nl2_nh2
depth_L2_NH1_C64_V61_B2_T19_s1_w0     depth_L4_NH3_C24_V61_B1_T67_s1_w0     depth_L4_NH2_C24_V61_B2_T37_s2_w0
depth_L5_NH2_C16_V61_B1_T131_s2_w1    depth_L5_NH2_C16_V61_B2_T37_s3_w0     depth_L6_NH2_C16_V61_B3_T13_s3_w2
depth_L4_NH2_C16_V61_B2_T1_s3_w1
"""


def write_all(args):
    for seed, name in enumerate(DUMPS.split(), start=1):
        n = {field: int(number) for field, number in re.findall(r"_([A-Za-z]+)(\d+)", name)}
        c = Config(n["T"] + 3, n["V"], n["L"], n["NH"], n["C"], name.split("_")[0],
                   n.get("nl"), n.get("nh"), n.get("s"), n.get("w"))
        prefix = os.path.join(args.out, name)
        write_dump(prefix, c, n["B"], n["T"], seed, steps=4, adamw=list(ADAMW.values()))
        print(name)
        write_rounding(f"{prefix}.model.bin", f"{prefix}.state.bin")


# ----------------------------------------------------------------------------------------------------------------------
# Command line


class Parser(argparse.ArgumentParser):
    def error(self, message):
        die(f"{message}; see {self.prog} --help")


VARIANT_OPTIONS = [  # name, type, default (...: required), help
    ("attention", str, None, "vanilla, skip or depth (default: the file's; dump: vanilla)"),
    ("skip_distance", int, None, "n_l: skipping heads read this many layers below (default: 3L/4)"),
    ("skip_heads", int, None, "n_h: so many heads skip (default: 3NH/4)"),
    ("depth_stride", int, None, "s: every s-th earlier layer is a source ... (default: L/2)"),
    ("depth_window", int, None, "w: ... and so are the w layers just below (default: 0)"),
]
DUMP_OPTIONS = [
    ("out", str, ..., "writes OUT.model.bin and OUT.state.bin"),
    ("layers", int, 2, "L"), ("heads", int, 2, "NH"), ("channels", int, 24, "C"), ("context", int, 40, "maxT"),
    ("vocab", int, 61, "V"), ("batch", int, 2, "B"), ("sequence", int, 37, "T"), *VARIANT_OPTIONS,
    ("seed", int, 1, "of parameters and tokens"), ("steps", int, 4, "AdamW steps, whose losses are recorded"),
    *((name, float, value, "of AdamW") for name, value in ADAMW.items()),
]
GENERATE_OPTIONS = [
    ("model", str, ..., "model or checkpoint"), ("prompt_tokens", str, ..., "numbers like 1,2,3"),
    ("tokens", int, 100, "how many to generate"), *VARIANT_OPTIONS,
]
KEPT = os.path.join(os.path.dirname(os.path.abspath(__file__)), "reference")
COMMANDS = [
    ("dump", dump, DUMP_OPTIONS, "write a random model and what it computes"),
    ("check", check, [], "compute a dump again and compare"),
    ("round", lambda args: write_rounding(args.model, args.state), [],
     "write beside STATE, as .bf16.txt, how far rounding to bf16 moves each part of it"),
    ("generate", generate, GENERATE_OPTIONS, "greedy decoding: in each line a token and its logit's lead"),
    ("all", write_all, [("out", str, KEPT, "folder")], "rewrite the dumps that are kept"),
]


def variant(args):
    """The fields of Config about attention that were given."""
    return {name: getattr(args, name) for name, *_ in VARIANT_OPTIONS if getattr(args, name) is not None}


def main(argv=None):
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    for name, function, options, text in COMMANDS:
        command = commands.add_parser(name, help=text, description=text, allow_abbrev=False)
        command.set_defaults(function=function)
        for option, kind, default, meaning in options:
            given = {"required": True} if default is ... else {"default": default}
            meaning += "" if default in (None, ...) else f" (default: {default})"
            command.add_argument("--" + option.replace("_", "-"), type=kind, metavar=kind.__name__.upper(),
                                 choices=ATTENTIONS if option == "attention" else None, help=meaning, **given)
        if name in ("check", "round"):
            command.add_argument("model", metavar="MODEL")
            command.add_argument("state", metavar="STATE")
    args = parser.parse_args(argv)
    args.function(args)


if __name__ == "__main__":
    main()
