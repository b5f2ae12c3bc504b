"""Holds dev/reference.py against its formulas written a second time, and the programs against fresh dumps."""

import math
import re
import subprocess
import sys
from pathlib import Path

import pytest

torch = pytest.importorskip("torch", reason="needs PyTorch: make -C dev test-peers")

import numpy as np  # noqa: E402
import torch.nn.functional as F  # noqa: E402

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "dev"))
import reference  # noqa: E402
from reference import GPT2, Config, RoundedGPT2  # noqa: E402

torch.set_num_threads(1)  # the models are small
ADAMW = list(reference.ADAMW.values())
TINY = [  # maxT, V, L, NH, C
    Config(9, 11, 2, 2, 6),
    Config(9, 11, 3, 3, 6, "skip", 1, 2),
    Config(9, 11, 4, 2, 6, "skip", 2, 2),
    Config(9, 11, 4, 2, 6, "depth", None, None, 1, 0),
    Config(9, 11, 5, 1, 4, "depth", None, None, 3, 0),
    Config(9, 11, 5, 2, 6, "depth", None, None, 3, 2),
]


def label(c):
    return f"{c.attention}-L{c.L}-{c.skip_distance}.{c.skip_heads}-{c.depth_stride}.{c.depth_window}"


def random_case(c, B, T, seed):
    rng = np.random.default_rng(seed)
    p = reference.trainable(reference.random_parameters(c, rng))
    return p, torch.tensor(rng.integers(0, c.V, (B, T))), torch.tensor(rng.integers(0, c.V, (B, T)))


# ----------------------------------------------------------------------------------------------------------------------
# The reference itself


def slow_logits(c, p, tokens):
    """Computed one token, layer and head at a time, with a KV cache, in NumPy."""
    p = {name: t.detach().numpy() for name, t in p.items()}
    HS = c.C // c.NH
    key, value, rows = {}, {}, []  # key[l, h, t], value[l, h, t]: (HS,)

    def softmax(s):
        e = [math.exp(x - max(s)) for x in s]
        return [x / sum(e) for x in e]

    def normalise(x, w, b):
        return (x - x.mean()) / math.sqrt(x.var() + 1e-5) * w + b

    for t, token in enumerate(tokens):
        x = p["wte"][token] + p["wpe"][t]
        for l in range(c.L):
            q, k, v = np.split(p["qkvw"][l] @ normalise(x, p["ln1w"][l], p["ln1b"][l]) + p["qkvb"][l], 3)
            out = np.zeros(c.C)
            for h in range(c.NH):
                own = slice(h * HS, (h + 1) * HS)
                key[l, h, t], value[l, h, t] = k[own], v[own]
                if c.attention == "depth":
                    read = {l} | {j for j in range(l - c.depth_window, l) if j >= 0} | set(range(0, l, c.depth_stride))
                    read = sorted(read)
                    a = softmax([q[own] @ key[j, h, t] / math.sqrt(HS) for j in read])
                    value[l, h, t] = sum(a_j * value[j, h, t] for a_j, j in zip(a, read))
                m = l
                if c.attention == "skip" and h + 1 <= c.skip_heads and l >= c.skip_distance:
                    m = l - c.skip_distance
                a = softmax([q[own] @ key[m, h, u] / math.sqrt(HS) for u in range(t + 1)])
                out[own] = sum(a[u] * value[m, h, u] for u in range(t + 1))
            x = x + p["attprojw"][l] @ out + p["attprojb"][l]
            f = p["fcw"][l] @ normalise(x, p["ln2w"][l], p["ln2b"][l]) + p["fcb"][l]
            f = f / (1 + np.exp(-2 * math.sqrt(2 / math.pi) * (f + 0.044715 * f**3)))
            x = x + p["fcprojw"][l] @ f + p["fcprojb"][l]
        rows.append([p["wte"][i] @ normalise(x, p["lnfw"], p["lnfb"]) for i in range(c.V)])
    return np.array(rows)


@pytest.mark.parametrize("c", TINY, ids=label)
def test_logits_token_by_token(c):
    p, x, _ = random_case(c, 2, 9, seed=1)
    logits = GPT2(c, p).forward(x).detach().numpy()
    for b in range(2):
        assert np.abs(logits[b] - slow_logits(c, p, x[b].tolist())).max() < 1e-12


@pytest.mark.parametrize("c", TINY, ids=label)
def test_gradients_by_finite_differences(c):
    p, x, y = random_case(c, 2, 7, seed=2)
    result = reference.compute(c, p, x, y, ADAMW, 0)
    for name, t in p.items():
        direction, h = torch.randn(t.shape, dtype=t.dtype, generator=torch.Generator().manual_seed(3)), 2e-6
        with torch.no_grad():
            here = t.clone()
            up, down = (GPT2(c, {**p, name: here + step * direction}) for step in (h, -h))
            up, down = (m.loss(m.forward(x), y) for m in (up, down))
        expected = (result[f"d{name}"] * direction).sum()
        assert abs((up - down) / (2 * h) - expected) <= 1e-7 * max(1, abs(expected)), name


class FromPyTorch(GPT2):
    """GPT2 with PyTorch's own layers."""

    def attention(self, q, k, v): return F.scaled_dot_product_attention(q, k, v, is_causal=True)
    def layernorm(self, x, w, b): return F.layer_norm(x, w.shape, w, b)
    def gelu(self, x): return F.gelu(x, approximate="tanh")
    def loss(self, logits, targets): return F.cross_entropy(logits.flatten(0, 1), targets.flatten())


def assert_same_results(c, model, other):
    p, x, y = random_case(c, 2, 9, seed=4)
    ours = reference.compute(c, p, x, y, model=model)
    for t in p.values():
        t.grad = None
    theirs = reference.compute(c, p, x, y, model=other)
    for name in ours:
        assert (ours[name] - theirs[name]).abs().max() < 1e-12, name


@pytest.mark.parametrize("c", TINY, ids=label)
def test_pytorch_layers(c):
    assert_same_results(c, GPT2, FromPyTorch)


@pytest.mark.parametrize("c", TINY, ids=label)
def test_rounded_model_without_its_rounding(c, monkeypatch):
    monkeypatch.setattr(reference, "bf16", lambda x: x)
    assert_same_results(c, GPT2, RoundedGPT2)


@pytest.mark.parametrize("c", TINY, ids=label)
def test_adamw_keeps_padding_rows_zero(c):
    p, x, y = random_case(c, 2, 9, seed=6)
    reference.compute(c, p, x, y, ADAMW, 4)
    assert not p["wte"][c.V :].any()


KEPT = ROOT / "dev" / "reference"
DUMPS = reference.DUMPS.split()


def test_kept_files_are_those_that_make_reference_writes(tmp_path, monkeypatch):
    monkeypatch.setattr(reference, "NEARBY", 1)  # test_kept_rounding_errors compares the contents of .bf16.txt
    reference.write_all(tmp_path)
    assert {f.name for f in KEPT.iterdir()} == {f.name for f in tmp_path.iterdir()}
    for f in tmp_path.glob("*.model.bin"):
        assert f.read_bytes() == (KEPT / f.name).read_bytes(), f.name
    assert sum(f.stat().st_size for f in KEPT.iterdir()) <= 6e6


@pytest.mark.parametrize("name", DUMPS)
def test_kept_dump(name):
    reference.check(KEPT / f"{name}.model.bin", KEPT / f"{name}.state.bin")


def test_kept_dumps_of_all_cases_have_head_sizes_for_a_gpu():  # multiples of 8
    def case(name):  # all but NH and C
        return re.sub(r"_NH\d+_C\d+", "", name)

    on_gpu = {name for name in DUMPS if reference.parse_name(name)[0].HS % 8 == 0}
    assert {case(name) for name in on_gpu} == {case(name) for name in DUMPS}


@pytest.mark.parametrize("name", {n.split("_")[0]: n for n in DUMPS}.values())  # the last of each
def test_kept_rounding_errors(name, tmp_path):
    state = tmp_path / f"{name}.state.bin"
    state.write_bytes((KEPT / state.name).read_bytes())
    reference.write_rounding(str(KEPT / f"{name}.model.bin"), str(state))

    def errors(folder):
        return {n: float(e) for n, e in (line.split() for line in (folder / f"{name}.bf16.txt").open())}

    assert errors(tmp_path) == pytest.approx(errors(KEPT), rel=2e-3, abs=1e-12)


# ----------------------------------------------------------------------------------------------------------------------
# The programs against fresh dumps

FRESH = [  # shapes that no kept dump has; for the CPU, so some head sizes are no multiple of 8
    "--attention vanilla --layers 3 --heads 2 --channels 128 --vocab 200 --sequence 70 --context 71 --seed 91",
    "--attention skip --layers 4 --heads 2 --channels 128 --vocab 200 --batch 1 --sequence 70 --context 71 --seed 92 "
    "--skip-distance 1 --skip-heads 1",
    "--attention skip --layers 7 --heads 5 --channels 20 --vocab 300 --batch 3 --sequence 29 --context 29 --seed 93 "
    "--skip-distance 2 --skip-heads 3",
    "--attention depth --layers 3 --heads 2 --channels 128 --vocab 200 --batch 1 --sequence 70 --context 71 --seed 94 "
    "--depth-stride 1",
    "--attention depth --layers 7 --heads 3 --channels 33 --vocab 130 --batch 2 --sequence 41 --context 50 --seed 95 "
    "--depth-stride 4 --depth-window 2",
]
SMALL = {
    "vanilla": "--layers 2 --heads 2 --channels 24 --context 30 --sequence 19",
    "skip": "--layers 3 --heads 3 --channels 24 --context 30 --sequence 19 --skip-distance 1 --skip-heads 2",
    "depth": "--layers 4 --heads 2 --channels 24 --context 30 --sequence 19 --depth-stride 2 --depth-window 1",
}


def run(program, *args):
    path = ROOT / program
    assert path.exists(), f"{path} is missing: run make -C dev {program}"
    return subprocess.run([path, *map(str, args)], capture_output=True, text=True, cwd=ROOT)


def attention_of(options):
    return options.split()[1]


def make_dump(prefix, options):
    reference.main(["dump", "--out", str(prefix), *options.split()])
    return f"{prefix}.model.bin", f"{prefix}.state.bin"


@pytest.mark.parametrize("options", FRESH, ids=attention_of)
def test_fresh_dump_passes(options, tmp_path):
    result = run("test_gpt2", *make_dump(tmp_path / "fresh", options))
    assert result.returncode == 0, result.stdout + result.stderr


# T, head size, whether bf16 is tested too. A GPU's head sizes are multiples of 8. T is one token, part of a tile of 64,
# a whole tile, one token more, several tiles.
EMULATED = [(1, 64, False), (17, 128, False), (64, 64, False), (65, 24, False), (65, 64, True), (161, 64, False)]


@pytest.mark.parametrize("T, HS, bf16", EMULATED)
@pytest.mark.parametrize("attention", GPT2.ATTENTIONS)
def test_fresh_dump_passes_under_the_emulator(attention, T, HS, bf16, tmp_path, monkeypatch):
    variant = {"vanilla": "", "skip": "--skip-distance 1 --skip-heads 1", "depth": "--depth-stride 1"}[attention]
    # A model this wide fits so few tokens in one step, so a lower learning rate keeps the losses well above 0.
    model, state = make_dump(tmp_path / "fresh", f"--attention {attention} {variant} --layers 3 --heads 2 --channels "
                             f"{2 * HS} --vocab 150 --batch 1 --sequence {T} --context {T} --seed {T + HS} --lr 1e-4")
    if bf16:
        monkeypatch.setattr(reference, "NEARBY", 64)  # half as many as usual, to save time
        reference.write_rounding(model, state)
    result = run("test_gpt2cu_emulated", model, state)
    assert result.returncode == 0, result.stdout + result.stderr
    assert len(re.findall(r"^ok .*/fresh\.", result.stdout, re.MULTILINE)) == 1 + bf16


@pytest.mark.parametrize("attention", GPT2.ATTENTIONS)
@pytest.mark.parametrize("change", [0.01, math.nan])
def test_one_changed_gradient_is_named(attention, change, tmp_path):
    model, state = make_dump(tmp_path / "fresh", f"--attention {attention} {SMALL[attention]} --seed 96")
    c, _ = reference.read_model(model)
    header, data = reference.read(state, reference.STATE_MAGIC)
    content = Path(state).read_bytes()
    broken = tmp_path / "broken.state.bin"
    rng = np.random.default_rng(97)
    for name, gradient in reference.cut(state, data, reference.state_shapes(c, *header[2:5]), exact=True).items():
        if name[1:] not in reference.tensor_shapes(c):
            continue
        entry = rng.integers(gradient.size)
        value = np.float32(gradient.flat[entry] + change * np.abs(gradient).max())
        at = len(content) - len(data) + gradient.ctypes.data - data.ctypes.data + 4 * entry
        broken.write_bytes(content[:at] + value.tobytes() + content[at + 4 :])
        result = run("test_gpt2", model, broken)
        blamed = set(re.findall(r"^ +(\w+),? .*(?:error|tolerance)", result.stdout, re.MULTILINE))
        assert result.returncode == 1 and blamed == {name}, f"{name}[{entry}]\n{result.stdout}{result.stderr}"


# A model file in bf16. llm.c computes the state that goes with it from the weights before they are rounded.


def round_weights(monkeypatch):
    exact = reference.random_parameters
    monkeypatch.setattr(reference, "random_parameters", lambda c, rng: {
        name: torch.tensor(a).bfloat16().float().numpy() for name, a in exact(c, rng).items()})


def check_bf16_pair(prefix, options):
    """Result of test_gpt2 for a fresh dump whose model file is then written in bf16."""
    model, state = make_dump(prefix, options)
    content = np.fromfile(model, "<i4")
    content[1] += 2  # version 3 to 5, 1003 to 1005
    weights = torch.tensor(content[256:].view("<f4")).bfloat16().view(torch.int16)
    Path(model).write_bytes(content[:256].tobytes() + weights.numpy().tobytes())
    return run("test_gpt2", model, state)


@pytest.mark.parametrize("rounded_first", [False, True])
@pytest.mark.parametrize("seed", [101, 102])
@pytest.mark.parametrize("attention", GPT2.ATTENTIONS)
def test_bf16_file_passes(attention, seed, rounded_first, tmp_path, monkeypatch):
    if rounded_first:
        round_weights(monkeypatch)
    result = check_bf16_pair(tmp_path / "fresh", f"--attention {attention} {SMALL[attention]} --seed {seed}")
    assert result.returncode == 0, result.stdout + result.stderr
    assert ("allows for weights rounded to bf16 after" in result.stdout) == (not rounded_first)


def without_last_bias(forward):
    return lambda m, x: forward(GPT2(m.c, m.p | {"fcb": torch.cat([m.p["fcb"][:-1], 0 * m.p["fcb"][-1:]])}), x)


def gradients_5_percent_larger(compute):
    def wrong(*args):
        result = compute(*args)
        result["dqkvw"][1] *= 1.05
        return result
    return wrong


@pytest.mark.parametrize("rounded_first", [False, True])
@pytest.mark.parametrize("where, name, mistake", [
    (GPT2, "attention", lambda right: lambda m, q, k, v: right(m, q, k, v).flip(1)),  # heads in the wrong order
    (GPT2, "attention", lambda right: lambda m, q, k, v: right(m, 1.05 * q, k, v)),  # another scale
    (GPT2, "attention", lambda right: lambda m, q, k, v: m.attend(q @ k.transpose(-2, -1) / math.sqrt(m.c.HS), v)),
    (GPT2, "gelu", lambda right: lambda m, x: F.gelu(x)),  # not the tanh approximation
    (GPT2, "forward", without_last_bias),
    (reference, "compute", gradients_5_percent_larger),
], ids=["heads", "scale", "mask", "GELU", "bias", "gradient"])
def test_bf16_file_fails_after_a_mistake(where, name, mistake, rounded_first, tmp_path, monkeypatch):
    if rounded_first:
        round_weights(monkeypatch)
    monkeypatch.setattr(where, name, mistake(getattr(where, name)))
    result = check_bf16_pair(tmp_path / "fresh", f"--attention vanilla {SMALL['vanilla']} --seed 97")
    too_small = name == "gelu" and not rounded_first  # a thirtieth of what rounding the weights does to the logits
    assert result.returncode == (0 if too_small else 1), result.stdout + result.stderr


def assert_same_text(model, count, *options, prompt=(1, 2, 3)):
    """Compares greedy text, up to where the reference's two best logits nearly tie. Returns the number of tokens."""
    result = run("train_gpt2", "generate", "--model", model, "--prompt-tokens", ",".join(map(str, prompt)),
                 "--tokens", count, "--temperature", 0, *options)
    assert result.returncode == 0, result.stderr
    ours = [int(t) for t in re.findall(r"\d+", result.stdout)][-count:]
    assert len(ours) == count, result.stdout
    c, p = reference.read_model(model, **dict(zip([o[2:].replace("-", "_") for o in options[::2]], options[1::2])))
    compared = 0
    for token, lead in reference.greedy(c, p, prompt, count):
        if lead < 1e-4:
            break
        assert ours[compared] == token, f"token {compared}, where the best logit leads by {lead}"
        compared += 1
    return compared


@pytest.mark.parametrize("options", FRESH[::2], ids=attention_of)
def test_greedy_text_across_the_end_of_the_context(options, tmp_path):
    model, _ = make_dump(tmp_path / "fresh", options + " --steps 0")
    assert assert_same_text(model, 200) == 200


@pytest.mark.parametrize("attention", GPT2.ATTENTIONS)
@pytest.mark.parametrize("length", [1, 29, 30, 31, 45, 100])
def test_greedy_text_after_short_and_long_prompts(attention, length, tmp_path):
    model, _ = make_dump(tmp_path / "fresh", f"--attention {attention} {SMALL[attention]} --seed 98 --steps 0")
    assert assert_same_text(model, 20, prompt=np.random.default_rng(99).integers(0, 61, length)) > 0


def test_greedy_text_under_another_attention(tmp_path):
    model, _ = make_dump(tmp_path / "fresh", FRESH[0] + " --steps 0")
    assert assert_same_text(model, 100, "--attention", "skip", "--skip-distance", 1, "--skip-heads", 2) == 100
    assert assert_same_text(model, 100, "--attention", "depth", "--depth-stride", 1, "--depth-window", 1) == 100


@pytest.mark.parametrize("attention", GPT2.ATTENTIONS)
def test_greedy_text_of_a_checkpoint(attention, tmp_path):
    np.random.default_rng(98).integers(0, 200, 5000).astype("<u2").tofile(tmp_path / "shard.bin")  # without a header
    shard = tmp_path / "shard.bin"
    options = SMALL[attention].replace("--sequence 19", "").split()
    result = run("train_gpt2", "train", "--train", shard, "--val", shard, "--out", tmp_path / "run", "--attention",
                 attention, *options, "--vocab", 200, "--batch", 2, "--sequence", 19, "--steps", 20, "--lr", 0.01)
    assert result.returncode == 0, result.stderr
    assert assert_same_text(tmp_path / "run" / "model.bin", 60) > 0


# ----------------------------------------------------------------------------------------------------------------------
# What eval shows of depth's mixing


class WatchedGPT2(GPT2):
    """Keeps the mean weights (NH, |S_l| + 1) of each layer that mixes."""

    def __init__(self, c, p):
        super().__init__(c, p)
        self.means = []

    def mix(self, scores, x):
        self.means.append(torch.softmax(scores, dim=-1).mean(dim=(0, 2)))
        return super().mix(scores, x)


@pytest.mark.parametrize("program", ["train_gpt2", "train_gpt2cu_emulated"])
@pytest.mark.parametrize("batch", [1, 3, 4])
def test_depth_weights(program, batch, tmp_path):
    c = Config(20, 61, 5, 2, 16, "depth", None, None, 3, 1)
    rng = np.random.default_rng(1)
    p = reference.trainable(reference.random_parameters(c, rng))
    reference.write_model(tmp_path / "model.bin", c, {name: t.detach() for name, t in p.items()})
    T, windows = 20, 4
    tokens = rng.integers(0, c.V, T * windows + 1)
    head = np.array([20240520, 1, len(tokens)] + [0] * 253, dtype=np.int32)
    (tmp_path / "val.bin").write_bytes(head.tobytes() + tokens.astype(np.uint16).tobytes())
    subprocess.run([ROOT / program, "eval", "--model", tmp_path / "model.bin", "--val", tmp_path / "val.bin",
                    "--batch", str(batch), "--precision", "fp32", "--depth-weights", tmp_path / "weights.csv"],
                   check=True, capture_output=True)
    watched = WatchedGPT2(c, p)
    watched.forward(torch.tensor(tokens[:-1].reshape(windows, T)))
    rows = iter((tmp_path / "weights.csv").read_text().splitlines())
    assert next(rows) == "layer,head,source,weight"
    for l, means in enumerate(watched.means):
        sources = [*(j for j in range(l) if j % 3 == 0 or j >= l - 1), l]
        for h in range(c.NH) if l > 0 else []:
            for j, mean in zip(sources, means[h], strict=True):
                layer, head, source, weight = next(rows).split(",")
                assert (int(layer), int(head), int(source)) == (l, h, j)
                assert abs(float(weight) - mean.item()) < 2e-6
    assert next(rows, None) is None
