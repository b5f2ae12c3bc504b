"""train_gpt2 bench: its rows, as dev/bench/peers.py reads them."""

import pytest

from helpers import ATTENTIONS

TINY = ["--layers", 2, "--heads", 2, "--channels", 16, "--context", 32, "--vocab", 61, "--batch", 2, "--sequence", 19,
        "--steps", 2]
# With a single step its time is the median, and so what the parts add up to; it is long beside the table's digits.
LONGER = ["--layers", 4, "--heads", 4, "--channels", 128, "--vocab", 3000, "--batch", 4, "--sequence", 128,
          "--steps", 1]


@pytest.fixture
def parse_bench(root, monkeypatch):
    monkeypatch.syspath_prepend(str(root / "dev/bench"))
    from peers import parse_bench
    return parse_bench


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_bench_has_a_row_for_each_attention(each_build, parse_bench, precision):
    rows = parse_bench(each_build.run("bench", *TINY, "--precision", precision))
    assert [row["attention"].split()[0] for row in rows] == ATTENTIONS
    for row in rows:
        assert 0 < row["best"] <= row["ms"]
        assert row["tokens/s"] > 0
        assert row["MiB"] > 0
        assert row["parts"] == {}


@pytest.mark.parametrize("attention", ATTENTIONS)
def test_bench_takes_one_attention(program, parse_bench, attention):
    row, = parse_bench(program.run("bench", *TINY, "--attention", attention))
    assert row["attention"].split()[0] == attention


def test_rates_of_bench_fit_its_time(program, parse_bench):
    row, = parse_bench(program.run("bench", *LONGER, "--attention", "vanilla"))
    assert row["tokens/s"] == pytest.approx(4 * 128 / row["ms"] * 1e3, rel=0.01)
    C, L, T, V = 128, 4, 128, 3000
    flops = 6 * (V * C + 12 * L * C * C) + 6 * L * C * T  # a token
    assert row["GFLOP/s"] == pytest.approx(flops * row["tokens/s"] * 1e-9, rel=0.01, abs=0.1)


def test_bench_times_generating(program):
    said = program.run("bench", *TINY, "--tokens", 12, "--attention", "vanilla")
    assert "generating: a prompt of 20 tokens, then 12 " in said
    name, prompt, ms, rate, gigabytes, share = said.splitlines()[-1].split()
    assert name == "vanilla" and float(prompt) > 0 and float(share.rstrip("%")) > 0
    assert float(ms) * float(rate) == pytest.approx(1000, rel=0.5)  # of few digits: the ms are hundredths
    C, L, V, T = 16, 2, 61, 20 + 12 // 2
    read = 4 * (V * C + L * (12 * C * C + 13 * C) + 2 * C + T * L * 2 * C)  # weights and cache, once a token
    assert float(gigabytes) == pytest.approx(read * float(rate) * 1e-9, abs=0.06)


def test_bench_can_leave_generating_out(program):
    assert "generating: a prompt of 30 tokens, then 2 " in program.run("bench", *TINY)
    assert "generating" not in program.run("bench", *TINY, "--tokens", 0)


@pytest.mark.parametrize("attention", ATTENTIONS)
def test_parts_of_the_profile_add_up_to_the_step(program, parse_bench, attention):
    row, = parse_bench(program.run("bench", *LONGER, "--attention", attention, "--profile"))
    other = row["parts"].pop("other")  # the rest of the step
    assert ("depth mixing" in row["parts"]) == (attention == "depth")
    assert {"matmuls", "matmuls, dx", "matmuls, dw", "attention", "classifier", "AdamW"} < set(row["parts"])
    assert abs(other) <= 0.1 * row["ms"]  # little, but that a busy machine may stop the program anywhere
