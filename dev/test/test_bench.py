"""dev/bench/bench: its rows, as dev/bench/peers.py reads them. GPU_PROGRAM=train_gpt2cu takes dev/bench/benchcu."""

import re

import pytest

from helpers import ATTENTIONS, assert_one_line

TINY = ["--layers", 2, "--heads", 2, "--channels", 16, "--context", 32, "--vocab", 61, "--batch", 2, "--sequence", 19,
        "--steps", 2]
# Steps that are long beside the table's digits
LONGER = ["--layers", 4, "--heads", 4, "--channels", 128, "--vocab", 3000, "--batch", 4, "--sequence", 128]
PARTS = {"embedding", "LayerNorm", "matmuls", "matmuls, dx", "matmuls, dw", "attention", "classifier", "AdamW"}


@pytest.fixture
def parse_bench(root, monkeypatch):
    monkeypatch.syspath_prepend(str(root / "dev/bench"))
    from peers import parse_bench
    return parse_bench


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_bench_has_a_row_for_each_attention(bench, parse_bench, precision):
    rows = parse_bench(bench.run(*TINY, "--precision", precision))
    assert [row["attention"].split()[0] for row in rows] == ATTENTIONS
    for row in rows:
        assert 0 < row["best"] <= row["ms"]
        assert row["tokens/s"] > 0
        assert row["MiB"] > 0
        assert row["parts"] == {}


@pytest.mark.parametrize("attention", ATTENTIONS)
def test_bench_takes_one_attention(bench, parse_bench, attention):
    row, = parse_bench(bench.run(*TINY, "--attention", attention))
    assert row["attention"].split()[0] == attention


def test_rates_of_bench_fit_its_time(bench, parse_bench):
    row, = parse_bench(bench.run(*LONGER, "--steps", 1, "--attention", "vanilla"))
    assert row["tokens/s"] == pytest.approx(4 * 128 / row["ms"] * 1e3, rel=0.01)
    C, L, T, V = 128, 4, 128, 3000
    flops = 6 * (V * C + 12 * L * C * C) + 6 * L * C * T  # per token
    assert row["GFLOP/s"] == pytest.approx(flops * row["tokens/s"] * 1e-9, rel=0.01, abs=0.1)


def test_bench_times_generating(bench):
    said = bench.run(*TINY, "--tokens", 12, "--attention", "vanilla")
    assert "generating: a prompt of 20 tokens, then 12 " in said
    name, prompt, ms, rate, gigabytes, share = said.splitlines()[-1].split()
    assert name == "vanilla" and float(prompt) > 0 and float(share.rstrip("%")) > 0
    assert float(ms) * float(rate) == pytest.approx(1000, rel=0.5)  # of few digits: the ms are hundredths
    C, L, V, T = 16, 2, 61, 20 + 12 // 2
    read = 4 * (V * C + L * (12 * C * C + 13 * C) + 2 * C + T * L * 2 * C)  # weights and cache, once per token
    assert float(gigabytes) == pytest.approx(read * float(rate) * 1e-9, abs=0.06)


def test_bench_can_leave_generating_out(bench):
    assert "generating: a prompt of 30 tokens, then 2 " in bench.run(*TINY)
    assert "generating" not in bench.run(*TINY, "--tokens", 0)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("attention", ATTENTIONS)
def test_profile_has_every_part_and_the_rest_of_the_step(bench, parse_bench, attention, precision):
    row, = parse_bench(bench.run(*LONGER, "--steps", 2, "--attention", attention, "--precision", precision, "--profile",
                                 "--tokens", 0))
    parts = row["parts"]
    other = parts.pop("other")
    assert set(parts) == PARTS | ({"depth mixing"} if attention == "depth" else set())
    assert min(parts.values()) > 0
    assert other == pytest.approx(row["ms"] - sum(parts.values()), abs=0.01 * len(parts))  # the ms are hundredths


@pytest.mark.parametrize("args, says", [
    (["--steps", 0], "--steps 0: must be from 1 "), (["--step", 3], "did you mean --steps?"),
    (["--lr", 1], "bench has no option --lr; see .*bench --help"), (["--model", "x.bin"], "--model x.bin is a file"),
    (["--tokens", 1024], "--tokens 1024 leaves no room for a prompt in a context of 1024"),
    (["--skip-heads", 13], "12 heads"), (["--tokenizer", "nowhere"], "nowhere: No such file"),
    (["--batch", 65535], "memory, but only .* are free: the largest --batch that fits is ")], ids=str)
def test_bench_refuses(bench, args, says):
    status, out, err = bench.finish(*args)
    assert out == b""
    assert_one_line(status, err.decode(), says)


def test_bench_lists_its_options(bench):
    said = bench.run("--help")
    for option in "--batch", "--profile", "--depth-stride", "--steps":
        assert f"  {option} " in said
    assert "--lr" not in said


def test_bench_on_a_gpu(gpu_bench, parse_bench):
    said = gpu_bench.run(*TINY, "--tokens", 2, "--profile")
    assert re.search("^bf16, .*GPU", said, re.MULTILINE) or "NVIDIA" in said
    assert [row["attention"].split()[0] for row in parse_bench(said)] == ATTENTIONS
    for attention in ATTENTIONS:
        assert len(re.findall(f"^{attention}", said, re.MULTILINE)) == 2  # training, generating
