#!/usr/bin/env python3
"""GPT-2 with three attentions in plain PyTorch, in float64, differentiated by autograd: the reference for the C++.

The model comes first, to be read beside train_gpt2.cpp: it states each formula as the papers do, with no KV cache, no
fused operation and no gradient by hand. RoundedGPT2, after it, is the same model rounded to bf16 at the points where
`--precision bf16` rounds. The rest of the file writes and reads dumps:

    reference.py dump --out PREFIX ...      a random model and its results: PREFIX.model.bin, PREFIX.state.bin
    reference.py check MODEL STATE          compute such a pair again and compare
    reference.py round MODEL STATE          measure the rounding errors of bf16: PREFIX.bf16.txt
    reference.py generate --model MODEL ... greedy decoding: on each line a token and its logit's lead over the next
    reference.py all                        write all of dev/reference/ anew

Dimensions, as in the C++:
    B batch   T time (tokens in a sequence)   C channels   NH heads   HS = C/NH head size   L layers
    V vocabulary   Vp = V padded to a multiple of 128   maxT context: the longest sequence
"""

import argparse
import math
import os
import re
import sys
from dataclasses import dataclass, field, fields

import numpy as np
import torch

# ----------------------------------------------------------------------------------------------------------------------
# The model


def tensor_shapes(c):
    """The sixteen tensors in file order. Matrices are (out, in)."""
    L, C = c.L, c.C
    return {"wte": (c.Vp, C), "wpe": (c.maxT, C),  # embeddings of tokens and positions
            "ln1w": (L, C), "ln1b": (L, C), "qkvw": (L, 3 * C, C), "qkvb": (L, 3 * C),
            "attprojw": (L, C, C), "attprojb": (L, C),
            "ln2w": (L, C), "ln2b": (L, C), "fcw": (L, 4 * C, C), "fcb": (L, 4 * C),
            "fcprojw": (L, C, 4 * C), "fcprojb": (L, C),
            "lnfw": (C,), "lnfb": (C,)}


class GPT2:
    """GPT-2. Each step is a method of its own, so that RoundedGPT2 can override it."""

    def __init__(self, c, p):
        self.c, self.p = c, p  # Config; tensors by name

    def forward(self, tokens):
        """Tokens (B, T) to logits (B, T, V): a score for each token that could come next."""
        c, p = self.c, self.p
        B, T = tokens.shape
        x = self.embedding(tokens)  # the residual stream (B, T, C)
        keys, values = [], []  # of layers 0 to l, (B, NH, T, HS) each

        for l in range(c.L):
            normed = self.layernorm(x, p["ln1w"][l], p["ln1b"][l])
            qkv = self.linear(normed, p["qkvw"][l], p["qkvb"][l])  # (B, T, 3C)
            q, k, v = (y.reshape(B, T, c.NH, c.HS).transpose(1, 2) for y in qkv.split(c.C, dim=-1))  # (B, NH, T, HS)
            keys.append(k)
            values.append(v)
            k, v = getattr(self, c.attention)(l, q, keys, values)  # by one of the methods vanilla, skip, depth
            o = self.attention(q, k, v).transpose(1, 2).reshape(B, T, c.C)  # the heads side by side again
            x = self.add_linear(x, o, p["attprojw"][l], p["attprojb"][l])

            normed = self.layernorm(x, p["ln2w"][l], p["ln2b"][l])
            hidden = self.gelu(self.linear(normed, p["fcw"][l], p["fcb"][l]))  # (B, T, 4C)
            x = self.add_linear(x, hidden, p["fcprojw"][l], p["fcprojb"][l])

        normed = self.layernorm(x, p["lnfw"], p["lnfb"])
        return self.linear(normed, p["wte"][:c.V])  # without wte's padding, the rows from V on

    def loss(self, logits, targets):
        """The mean of -log softmax(logits)[target] over all tokens."""
        return -torch.log_softmax(logits, dim=-1).gather(-1, targets.unsqueeze(-1)).mean()

    # The three attentions. Each method returns the keys and values that layer l's queries attend to. It is given these
    # queries q and lists of the keys k and values v of layers 0 to l. If it replaces v[l], higher layers see the new
    # values. To add an attention, write its method here and append its name to the list.
    ATTENTIONS = ["vanilla", "skip", "depth"]  # a model file stores the index

    def vanilla(self, l, q, k, v):
        return k[l], v[l]

    def skip(self, l, q, k, v):
        """The first n_h heads attend to layer l - n_l, if there is one, and the other heads to their own layer."""
        n_l, n_h = self.c.skip_distance, self.c.skip_heads
        if l < n_l:
            return k[l], v[l]
        return [torch.cat([y[l - n_l][:, :n_h], y[l][:, n_h:]], dim=1) for y in (k, v)]

    def depth(self, l, q, k, v):
        """At each token separately, v_l is mixed with the already mixed values of its sources, the earlier layers S_l:
        a = softmax over j in S_l and l itself of q_l·k_j/√HS;  ṽ_l = Σ_{j in S_l} a_j ṽ_j + a_l v_l."""
        s, w = self.c.depth_stride, self.c.depth_window
        S_l = [j for j in range(l) if j % s == 0 or j >= l - w]
        scores = torch.stack([(q * k[j]).sum(-1) for j in [*S_l, l]], dim=-1) / math.sqrt(self.c.HS)
        v[l] = self.mix(scores, torch.stack([v[j] for j in [*S_l, l]], dim=-2))
        return k[l], v[l]

    def mix(self, scores, x):
        """Σ_j a_j x_j with a = softmax(scores), for scores (B, NH, T, J) and x (B, NH, T, J, HS), J = |S_l| + 1."""
        return (torch.softmax(scores, dim=-1).unsqueeze(-1) * x).sum(-2)

    def attention(self, q, k, v):
        """softmax(causal(q kᵀ/√HS)) v: each token attends to itself and the tokens before it."""
        T, HS = q.shape[-2:]
        scores = q @ k.transpose(-2, -1) / math.sqrt(HS)  # (B, NH, T, T)
        future = torch.ones(T, T, dtype=torch.bool).triu(1)
        return self.attend(scores.masked_fill(future, -math.inf), v)

    def attend(self, scores, v):
        return torch.softmax(scores, dim=-1) @ v

    # The other steps

    def embedding(self, tokens):
        return self.p["wte"][tokens] + self.p["wpe"][:tokens.shape[1]]

    def layernorm(self, x, w, b):
        mean = x.mean(-1, keepdim=True)
        variance = ((x - mean) ** 2).mean(-1, keepdim=True)
        return (x - mean) / torch.sqrt(variance + 1e-5) * w + b

    def linear(self, x, w, b=0):
        return x @ w.T + b

    def add_linear(self, residual, x, w, b):
        return residual + (x @ w.T + b)

    def gelu(self, x):
        return 0.5 * x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


# ----------------------------------------------------------------------------------------------------------------------
# The same model, rounded to bf16 at the points where `--precision bf16` rounds


def bf16(x):
    return x.bfloat16().double()


class Rounded(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, value, gradient):
        ctx.gradient = gradient
        return bf16(x) if value else x.clone()

    @staticmethod
    def backward(ctx, dx):
        return bf16(dx) if ctx.gradient else dx, None, None


def rounded(x, value=True, gradient=True):
    """Rounds x, and in backward its gradient, which by then is the sum over everything that reads x."""
    return Rounded.apply(x, value, gradient)


class RoundedGPT2(GPT2):
    """The arithmetic stays float64. Every stored activation is rounded, and so is its gradient."""

    def __init__(self, c, p):  # the working copy of the weights is bf16, their gradients are fp32
        super().__init__(c, {name: rounded(t, gradient=False) for name, t in p.items()})

    def embedding(self, tokens): return rounded(super().embedding(tokens))
    def layernorm(self, x, w, b): return rounded(super().layernorm(x, w, b))
    def linear(self, x, w, b=0): return rounded(super().linear(x, w, b))
    def add_linear(self, residual, x, w, b): return rounded(super().add_linear(residual, x, w, b))
    def gelu(self, x): return rounded(super().gelu(x), gradient=False)  # stored only after GELU's backward

    def attention(self, q, k, v):  # its dq is stored before depth's mixing adds a second part
        return rounded(super().attention(rounded(q, value=False), k, v))

    def attend(self, scores, v):  # the scores' gradient and the weights a are operands of matmuls
        return self.softmax_sum(rounded(scores, value=False), v, lambda a: rounded(a, gradient=False))

    def mix(self, scores, x):  # scores and weights stay fp32
        # Softmax is the same for scores minus the layer's own, which is last. Then the gradient of the own score is
        # minus the sum of the others', as in the program, which no longer has v_l: ṽ_l has overwritten it.
        scores = (scores - scores[..., -1:]).unsqueeze(-2)
        return rounded(self.softmax_sum(scores, x, lambda a: a).squeeze(-2))

    def softmax_sum(self, scores, x, round_weights):
        """o = Σ_j a_j x_j with a = softmax(scores), in (.., n, J) and (.., J, HS). The program's backward computes
        ds_j = a_j (do·x_j - do·o) from the stored, rounded o. For autograd to do the same, the sum's normalization is a
        term of its own: o + (1 - Σ_j a_j) o, whose value is o and whose second o is a rounded constant."""
        a = torch.exp(scores - torch.logsumexp(scores, dim=-1, keepdim=True).detach())
        o = round_weights(a) @ x
        return o + (1 - a.sum(-1, keepdim=True)) * bf16(o).detach()


# ----------------------------------------------------------------------------------------------------------------------
# Configurations and random parameters


def die(message):
    sys.exit(f"error: {message}")  # on stderr, exit status 1


def setting(code, least, default, text):
    """A setting of an attention: its letters in a dump's name, its smallest value, default and help."""
    return field(default=None, metadata={"code": code, "least": least, "default": default, "help": text})


@dataclass
class Config:
    maxT: int
    V: int
    L: int
    NH: int
    C: int
    attention: str = "vanilla"
    # Settings in the order of a model file's header; each name begins with its attention's.
    skip_distance: int | None = setting("nl", 1, lambda c: max(1, 3 * c.L // 4),
                                        "n_l: heads that skip attend to the layer n_l below (default: 3L/4)")
    skip_heads: int | None = setting("nh", 0, lambda c: max(1, 3 * c.NH // 4),
                                     "n_h: number of heads that skip (default: 3NH/4)")
    depth_stride: int | None = setting("s", 1, lambda c: max(1, c.L // 2),
                                       "s: every s-th earlier layer is a source ... (default: L/2)")
    depth_window: int | None = setting("w", 0, lambda c: 0,
                                       "w: ... and so are the w layers just below (default: 0)")

    def __post_init__(self):
        if min(self.maxT, self.V, self.L, self.NH, self.C) < 1 or self.C % self.NH:
            die(f"context {self.maxT}, vocabulary {self.V}, {self.L} layers, {self.NH} heads, {self.C} channels: each "
                "must be at least 1, and the channels a multiple of the heads")
        for name, metadata in SETTINGS.items():
            if getattr(self, name) is None:
                setattr(self, name, metadata["default"](self))
            if getattr(self, name) < metadata["least"]:
                die(f"{name.replace('_', ' ')} {getattr(self, name)}: must be at least {metadata['least']}")
        if self.skip_heads > self.NH:
            die(f"skip heads {self.skip_heads}: must be at most the number of heads, {self.NH}")

    @property
    def HS(self):
        return self.C // self.NH

    @property
    def Vp(self):
        return (self.V + 127) // 128 * 128


SETTINGS = {f.name: f.metadata for f in fields(Config) if f.metadata}


def random_parameters(c, rng):
    """Wider than a new model's, so that every term of every formula matters. fp32, as in files."""
    p = {}
    for name, shape in tensor_shapes(c).items():
        if name.endswith("b"):
            t = rng.normal(0, 0.3, shape)
        elif name.startswith("ln"):
            t = rng.normal(1, 0.3, shape)
        else:
            t = rng.normal(0, rng.uniform(1, 1.5) / math.sqrt(c.C), shape)
        p[name] = t.astype(np.float32)
    p["wte"][c.V:] = 0
    return p


def trainable(arrays):
    return {name: torch.tensor(a, dtype=torch.float64, requires_grad=True) for name, a in arrays.items()}


# ----------------------------------------------------------------------------------------------------------------------
# Results of a model

DECAYS = {"wte", "wpe", "qkvw", "attprojw", "fcw", "fcprojw"}  # weight decay applies to the matrices only
# A high learning rate and strong decay, so that a wrong update shows in the losses of a few steps.
ADAMW = {"lr": 0.003, "beta1": 0.9, "beta2": 0.95, "eps": 1e-8, "weight_decay": 1.0}


def compute(c, p, x, y, adamw=(0.0,) * 5, steps=0, model=GPT2):
    """Logits, loss and gradients for tokens x and targets y; then AdamW steps, with the loss before each. The steps
    change p."""

    def forward_backward():
        m = model(c, p)  # anew for each step, since RoundedGPT2 copies p
        logits = m.forward(x)
        loss = m.loss(logits, y)
        loss.backward()
        return logits.detach(), loss.detach()

    logits, loss = forward_backward()
    result = {"logits": logits, "loss": loss} | {f"d{name}": t.grad.clone() for name, t in p.items()}

    lr, beta1, beta2, eps, weight_decay = adamw
    groups = [{"params": [t for name, t in p.items() if name in DECAYS], "weight_decay": weight_decay},
              {"params": [t for name, t in p.items() if name not in DECAYS], "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=lr, betas=(beta1, beta2), eps=eps)
    losses = []
    for _ in range(steps):
        optimizer.zero_grad()
        losses.append(forward_backward()[1])
        optimizer.step()
    return result | ({"losses": torch.stack(losses)} if losses else {})


def blocks(result):
    """The parts that are compared separately: logits, loss, and each layer of each gradient, with qkv's split into q, k
    and v."""
    for name, a in result.items():
        whole = name in ("logits", "loss", "dwte", "dwpe", "dlnfw", "dlnfb")
        for l, layer in enumerate([a] if whole else a):
            parts = zip((".q", ".k", ".v"), layer.chunk(3)) if name.startswith("dqkv") else [("", layer)]
            for part, block in parts:
                yield name + ("" if whole else f".{l}") + part, block


NEARBY = 128  # models


def rounding_errors(c, p, x, y):
    """The rms error of bf16, by block. One model is too small a sample (its loss is a single number), so this takes the
    mean over models around p, far enough apart that their roundings are independent."""
    rng = np.random.default_rng(0)
    squares = {}
    for _ in range(NEARBY):
        near = {name: t.detach().numpy() * rng.normal(1, 0.01, t.shape) for name, t in p.items()}
        exact, in_bf16 = (dict(blocks(compute(c, trainable(near), x, y, model=m))) for m in (GPT2, RoundedGPT2))
        for name in exact:
            squares[name] = squares.get(name, 0) + ((in_bf16[name] - exact[name]) ** 2).mean().item()
    return {name: math.sqrt(s / NEARBY) for name, s in squares.items()}


@torch.no_grad()
def greedy(c, p, tokens, n):
    """The likeliest next token, n times, each with its logit's lead over the next best."""
    tokens, start = list(tokens), 0  # the model reads tokens[start:length]
    for length in range(1, len(tokens) + n):
        if length - start > c.maxT:
            start = length - max(1, c.maxT // 2)  # the context is full: read its latest half anew from position 0
        if length == len(tokens):
            best = GPT2(c, p).forward(torch.tensor([tokens[start:]]))[0, -1].topk(2)
            tokens.append(best.indices[0].item())
            yield tokens[-1], (best.values[0] - best.values[1]).item()


# ----------------------------------------------------------------------------------------------------------------------
# Files: little endian, a header of 256 int32, then arrays of int32 or fp32

MODEL_MAGIC, STATE_MAGIC = 20240326, 20240327


def write(path, content):
    try:  # under a temporary name first, so that readers never see a partial file
        with open(f"{path}.part", "wb") as file:
            file.write(content)
        os.replace(f"{path}.part", path)
    except OSError as e:
        die(f"{path}: {e.strerror}")


def write_arrays(path, header, arrays):
    full = np.zeros(256, "<i4")
    full[:len(header)] = header
    arrays = [full, *(np.asarray(a) for a in arrays)]
    write(path, b"".join(a.astype("<i4" if a.dtype.kind == "i" else "<f4").tobytes() for a in arrays))


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
    """Splits data into arrays of these shapes. With `exact`, nothing may follow them."""
    sizes = [4 * math.prod(shape) for shape in shapes.values()]
    if len(data) < sum(sizes) or (exact and len(data) != sum(sizes)):
        die(f"{path}: {len(data)} bytes follow the header, its arrays take {sum(sizes)}")
    ends = np.cumsum(sizes)
    return {name: data[end - size:end].view("<i4" if name in "xy" else "<f4").reshape(shape)
            for (name, shape), size, end in zip(shapes.items(), sizes, ends)}


def write_model(path, c, p):
    header = [MODEL_MAGIC, 3, c.maxT, c.V, c.L, c.NH, c.C, c.Vp]  # llm.c's
    if c.attention != "vanilla":
        header[1] = 1003
        header += [GPT2.ATTENTIONS.index(c.attention), *(getattr(c, name) for name in SETTINGS)]
    write_arrays(path, header, p.values())


def read_model(path, **variant):
    """Config and parameters. `variant` holds fields of Config that replace the file's."""
    header, data = read(path, MODEL_MAGIC)
    version, maxT, V, L, NH, C, Vp, number = header[1:9]
    if version not in (3, 5, 1003, 1005) or not 0 <= number < len(GPT2.ATTENTIONS):
        die(f"{path}: version {version}, attention {number}; this program reads versions 3, 5, 1003 and 1005 and "
            f"attentions 0 to {len(GPT2.ATTENTIONS) - 1}")
    attention = GPT2.ATTENTIONS[number]
    own = {name: value for name, value in zip(SETTINGS, header[9:]) if name.startswith(attention + "_")}
    c = Config(maxT, V, L, NH, C, **{"attention": attention, **own, **variant})
    if Vp != c.Vp:
        die(f"{path}: vocabulary {V} padded to {Vp}, must be {c.Vp}")
    if version % 1000 == 5:  # bf16, the upper half of an fp32
        data = (data[:len(data) // 2 * 2].view("<u2").astype("<u4") << 16).view(np.uint8)
    # header[255] is 1 in a checkpoint, whose training state follows the parameters.
    return c, trainable(cut(path, data, tensor_shapes(c), exact=header[255] == 0))


def state_shapes(c, B, T, steps):
    shapes = {"x": (B, T), "y": (B, T), "logits": (B, T, c.V), "loss": ()}
    shapes |= {f"d{name}": shape for name, shape in tensor_shapes(c).items()}
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
        state[name] = torch.tensor(state[name]).long()
    return state, bits == 64


# ----------------------------------------------------------------------------------------------------------------------
# Commands


def write_dump(prefix, c, B, T, seed, steps, adamw):
    torch.set_num_threads(1)  # one order of summation, on any number of cores
    rng = np.random.default_rng(seed)
    p = random_parameters(c, rng)
    tokens = torch.tensor(rng.integers(0, c.V, (B, T + 1)))
    x, y = tokens[:, :-1], tokens[:, 1:]
    adamw = np.float32(adamw)
    state = {"x": x, "y": y, "adamw": adamw} | compute(c, trainable(p), x, y, adamw.tolist(), steps)
    write_model(f"{prefix}.model.bin", c, p)
    write_arrays(f"{prefix}.state.bin", [STATE_MAGIC, 2, B, T, steps, 64],
                 [state[name] for name in state_shapes(c, B, T, steps)])


def dump(out, layers, heads, channels, context, vocab, batch, sequence, seed, steps, lr, beta1, beta2, eps,
         weight_decay, **variant):
    c = Config(context, vocab, layers, heads, channels, **variant)
    if batch < 1 or not 1 <= sequence <= c.maxT or steps < 0 or seed < 0:
        die(f"--batch {batch}, --sequence {sequence} (context {c.maxT}), --steps {steps} or --seed {seed} is out of "
            "range")
    write_dump(out, c, batch, sequence, seed, steps, [lr, beta1, beta2, eps, weight_decay])


def check(model, state):
    c, p = read_model(model)
    theirs, float64 = read_state(state, c)
    steps = len(theirs.get("losses", []))
    result = compute(c, p, theirs["x"], theirs["y"], theirs.get("adamw", np.zeros(5)).tolist(), steps)
    wrong = 0
    for name, ours in result.items():
        tolerance = (1e-6 if float64 else 5e-4) * ours.abs().max().item()
        error = (ours - torch.tensor(theirs[name])).abs().max().item()
        ok = error <= tolerance  # false for NaN
        wrong += not ok
        print(f"{name:10} largest error {error:.2e}   tolerance {tolerance:.2e}   {'ok' if ok else 'WRONG'}")
    if wrong:
        die(f"{state}: {wrong} of {len(result)} arrays are not what {model} computes")


def write_rounding(model, state):
    torch.set_num_threads(1)
    c, p = read_model(model)
    arrays, _ = read_state(state, c)
    errors = rounding_errors(c, p, arrays["x"], arrays["y"])
    path = state.removesuffix(".state.bin") + ".bf16.txt"
    write(path, "".join(f"{name} {error:.3e}\n" for name, error in errors.items()).encode())
    print(path)


def generate(model, prompt_tokens, tokens, **variant):
    c, p = read_model(model, **variant)
    try:
        prompt = [int(t) for t in prompt_tokens.split(",")]
    except ValueError:
        prompt = []
    if not prompt or not all(0 <= t < c.V for t in prompt) or c.V < 2:
        die(f"--prompt-tokens {prompt_tokens}: must be numbers from 0 to {c.V - 1}, like 1,2,3")
    for token, lead in greedy(c, p, prompt, tokens):
        print(token, f"{lead:.6g}", flush=True)


# The dumps in dev/reference/ are small, and together cover every case: layers that are both reader and source, one head
# or all heads skipping, sources by stride, by window and by both, T below one tile and across several, odd widths.
# A dump's position in the list is its seed, so append new ones.
DUMPS = """
vanilla_L2_NH2_C24_V61_B1_T131        vanilla_L2_NH5_C40_V150_B2_T37
skip_L2_NH3_C36_V61_B3_T13_nl1_nh1    skip_L4_NH3_C24_V61_B1_T67_nl1_nh2    skip_L3_NH2_C24_V61_B1_T131_nl1_nh2
skip_L3_NH3_C24_V61_B2_T37_nl2_nh1    skip_L5_NH2_C16_V127_B3_T13_nl2_nh2
depth_L2_NH1_C64_V61_B2_T19_s1_w0     depth_L4_NH3_C24_V61_B1_T67_s1_w0     depth_L4_NH2_C24_V61_B2_T37_s2_w0
depth_L5_NH2_C16_V61_B1_T131_s2_w1    depth_L5_NH2_C16_V61_B2_T37_s3_w0     depth_L6_NH2_C16_V61_B3_T13_s3_w2
depth_L4_NH2_C16_V61_B2_T1_s3_w1
"""
# On a GPU the head size is a multiple of 8, so the four dumps above with head size 12 run on a CPU only. These repeat
# them with head size 24, which is not a power of two either; all but the third with one head fewer, to keep the folder
# under 6 MB.
DUMPS += """
vanilla_L2_NH1_C24_V61_B1_T131        skip_L2_NH2_C48_V61_B3_T13_nl1_nh1    skip_L3_NH2_C48_V61_B1_T131_nl1_nh2
depth_L4_NH1_C24_V61_B2_T37_s2_w0
"""


def parse_name(name):
    """The Config of a dump, and its B and T, from its name."""
    attention, *parts = name.split("_")
    n = {code: int(number) for code, number in (re.fullmatch(r"([A-Za-z]+)(\d+)", part).groups() for part in parts)}
    settings = [n.get(metadata["code"]) for metadata in SETTINGS.values()]
    return Config(n["T"] + 3, n["V"], n["L"], n["NH"], n["C"], attention, *settings), n["B"], n["T"]


def write_all(out):
    for seed, name in enumerate(DUMPS.split(), start=1):
        prefix = os.path.join(out, name)
        write_dump(prefix, *parse_name(name), seed, steps=4, adamw=list(ADAMW.values()))
        write_rounding(f"{prefix}.model.bin", f"{prefix}.state.bin")


# ----------------------------------------------------------------------------------------------------------------------
# Command line


class Parser(argparse.ArgumentParser):
    def error(self, message):
        die(f"{message}; see {self.prog} --help")


# Options: name, type, default (...: required; None: not passed on unless given), help
VARIANT = [("--attention", str, None, f"{', '.join(GPT2.ATTENTIONS)} (default: the file's; dump: vanilla)"),
           *(("--" + name.replace("_", "-"), int, None, metadata["help"]) for name, metadata in SETTINGS.items())]
PAIR = [("model", str, ..., "PREFIX.model.bin"), ("state", str, ..., "PREFIX.state.bin")]
COMMANDS = [
    (dump, "dump", "write a random model and its results", [
        ("--out", str, ..., "prefix of the names of both files"),
        ("--layers", int, 2, "L"), ("--heads", int, 2, "NH"), ("--channels", int, 24, "C"),
        ("--context", int, 40, "maxT"), ("--vocab", int, 61, "V"),
        ("--batch", int, 2, "B"), ("--sequence", int, 37, "T"),
        ("--seed", int, 1, "of parameters and tokens"), ("--steps", int, 4, "number of AdamW steps"),
        *(("--" + name.replace("_", "-"), float, value, "of AdamW") for name, value in ADAMW.items()), *VARIANT]),
    (check, "check", "compute a dump again and compare", PAIR),
    (write_rounding, "round", "measure the rounding errors of bf16 and write PREFIX.bf16.txt", PAIR),
    (generate, "generate", "greedy decoding: on each line a token and its logit's lead over the next best", [
        ("--model", str, ..., "model or checkpoint"), ("--prompt-tokens", str, ..., "numbers like 1,2,3"),
        ("--tokens", int, 100, "number of tokens to generate"), *VARIANT]),
    (write_all, "all", "write all of dev/reference/ anew", [
        ("--out", str, os.path.join(os.path.dirname(os.path.abspath(__file__)), "reference"), "folder")]),
]


def main(argv=None):
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    for function, command, text, options in COMMANDS:
        added = commands.add_parser(command, help=text, description=text, allow_abbrev=False)
        added.set_defaults(function=function)
        for name, kind, default, meaning in options:
            settings = {"type": kind, "metavar": kind.__name__.upper(), "help": meaning}
            if default is ...:
                settings |= {"required": True} if name.startswith("--") else {"metavar": name.upper()}
            elif default is None:
                settings["default"] = argparse.SUPPRESS
            else:
                settings |= {"default": default, "help": f"{meaning} (default: {default})"}
            if name == "--attention":
                settings["choices"] = GPT2.ATTENTIONS
            added.add_argument(name, **settings)
    arguments = vars(parser.parse_args(argv))
    arguments.pop("function")(**arguments)


if __name__ == "__main__":
    main()
