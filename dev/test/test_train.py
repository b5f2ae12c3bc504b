"""train_gpt2 train: what a run leaves behind, that it can be stopped at any time, and what steers it."""

import csv
import os
import pty
import random
import re
import shutil
import signal
import struct
import subprocess
import sys
import time
import zlib

from math import ceil, cos, pi, sqrt

import pytest

from helpers import (
    ATTENTIONS, BATCH, CHANNELS, CONTEXT, HEADER_BYTES, HEADS, LAYERS, MODEL_MAGIC, PADDED_VOCABULARY,
    PARAMETERS, SEQUENCE, SHAPE, TRAILER_BYTES, VOCABULARY, WEIGHTS_END, bytes_read, contents, ended,
    made_up_tokens, metrics, read_to_step, signal_mask, training, wait_until, write_shard,
)

STEPS = 500  # of the runs that are stopped: first after SOON, and when resumed, LATER
SOON, LATER = 50, 250


@pytest.fixture(scope="module")
def never_stopped(program, data, tmp_path_factory):
    """For each attention the arguments of a run, without --out, and the folder of one that was left alone."""
    folder = tmp_path_factory.mktemp("never_stopped")
    runs = {}
    for attention in ATTENTIONS:
        def arguments(out, attention=attention):
            return training(data, out, "--attention", attention, "--sample-every", 100, steps=STEPS, save_every=25)
        program.run(*arguments(folder / attention))
        runs[attention] = arguments, folder / attention
    return runs


def assert_same_run(out, other):
    assert (out / "model.bin").read_bytes() == (other / "model.bin").read_bytes()
    assert metrics(out) == metrics(other)
    assert not list(out.glob("*.tmp"))


# What a run leaves behind


@pytest.mark.parametrize("attention", ATTENTIONS)
def test_folder_holds_model_metrics_and_tokenizer(finished, attention):
    assert sorted(os.listdir(finished[attention])) == ["metrics.csv", "model.bin", "tokenizer.bin"]


@pytest.mark.parametrize("attention", ATTENTIONS)
def test_metrics_have_a_row_a_step(finished, attention):
    names, *rows = metrics(finished[attention])
    assert names == ["step", "train_loss", "val_loss", "lr", "grad_norm"]
    assert [row[0] for row in rows] == [str(i) for i in range(1, 11)]
    assert [int(row[0]) for row in rows if row[2]] == [4, 8, 10]  # --val-every 4, and the last


@pytest.mark.parametrize("attention", ATTENTIONS)
def test_checkpoint_is_laid_out_as_documented(finished, attention):
    data = (finished[attention] / "model.bin").read_bytes()
    fields = struct.unpack("<256i", data[:HEADER_BYTES])
    version = 3 if attention == "vanilla" else 1003
    assert fields[:8] == (MODEL_MAGIC, version, CONTEXT, VOCABULARY, LAYERS, HEADS, CHANNELS, PADDED_VOCABULARY)
    assert fields[8] == ATTENTIONS.index(attention)
    assert fields[255] == 1
    state_bytes, = struct.unpack_from("<Q", data, WEIGHTS_END)
    assert len(data) == WEIGHTS_END + 8 + state_bytes + 2 * 4 * PARAMETERS + TRAILER_BYTES
    _, weights_crc, state_crc, length = struct.unpack("<IIIQ", data[-TRAILER_BYTES:])
    assert weights_crc == zlib.crc32(data[:WEIGHTS_END])
    assert state_crc == zlib.crc32(data[WEIGHTS_END:-TRAILER_BYTES])
    assert length == len(data)


@pytest.mark.parametrize("attention", ATTENTIONS)
def test_padded_rows_stay_zero(finished, attention):
    embedding = (finished[attention] / "model.bin").read_bytes()[HEADER_BYTES:]
    assert not any(embedding[4 * VOCABULARY * CHANNELS:4 * PADDED_VOCABULARY * CHANNELS])


def test_sanitizers_find_nothing(each_build, data, tmp_path):
    for attention in ATTENTIONS:
        each_build.run(*training(data, tmp_path / attention, "--attention", attention, steps=4), threads=2)


def test_text_to_tokens_to_model_to_text(program, root, tmp_path):
    """The whole way: prepare.py, a run that is stopped and resumed, eval, generate."""
    text = tmp_path / "text"
    text.write_text("Où est la rose? Rose is a rose is a rose.\n" * 200)
    data, out = tmp_path / "data", tmp_path / "out"
    subprocess.run([sys.executable, root / "data_prep/prepare.py", "--tokenizer", "bytes", "--out", data, text],
                   check=True, stdout=subprocess.DEVNULL)
    arguments = training(data, out, "--val-batches", 0, "--lr", "1e-2", steps=300)
    status, said, err = program.stop(*arguments, after=20, by=signal.SIGTERM)
    assert (status, err) == (0, "")
    assert f"train --out {out} --resume" in said

    said = program.run("train", "--out", out, "--resume")
    loss, entropy = re.search(r"validation loss ([\d.]+) .*unigram entropy of ([\d.]+)", said).groups()
    assert float(loss) < 0.5 * float(entropy)
    assert len(metrics(out)) == 1 + 300

    model = out / "model.bin"
    said = program.run("eval", "--model", model, "--val", f"{data}/val_*.bin", "--batch", BATCH, "--sequence", SEQUENCE)
    assert float(re.search(r"loss +([\d.]+)", said)[1]) == pytest.approx(float(loss), abs=1e-4)
    said = program.run("generate", "--model", model, "--prompt", "Où", "--tokens", 50)
    assert said.startswith("Où") and "rose" in said


# Stopping and resuming


@pytest.mark.parametrize("attention", ATTENTIONS)
@pytest.mark.parametrize("by", [signal.SIGTERM, signal.SIGINT, signal.SIGKILL], ids=lambda s: s.name)
def test_stopped_twice_and_resumed_ends_as_if_never_stopped(program, never_stopped, tmp_path, attention, by):
    arguments, other = never_stopped[attention]
    out = tmp_path / "out"
    for args, after in (arguments(out), SOON), (["train", "--out", out, "--resume"], LATER):
        status, said, err = program.stop(*args, after=after, by=by)
        if by == signal.SIGKILL:
            assert status == -signal.SIGKILL
        else:
            assert (status, err) == (0, "")
            assert "stopped after step" in said and "--resume" in said
    program.run("train", "--out", out, "--resume")
    assert_same_run(out, other)


def test_killed_at_any_instant_keeps_a_checkpoint(program, data, tmp_path):
    """It saves after each step, so that most of its time it is writing a checkpoint."""
    def arguments(out):
        return training(data, out, "--attention", "depth", steps=150, save_every=1)

    program.run(*arguments(tmp_path / "other"))
    out, r = tmp_path / "out", random.Random(1)
    program.stop(*arguments(out), after=2, by=signal.SIGKILL)
    for _ in range(8):
        with program.start("train", "--out", out, "--resume"):
            time.sleep(r.random() * 0.1)
        assert "checkpoint of step" in program.run("describe", "--model", out / "model.bin")
    program.run("train", "--out", out, "--resume")
    assert_same_run(out, tmp_path / "other")


def test_stopped_in_validation_completes_it(program, data, tmp_path):
    val = tmp_path / "val.bin"
    write_shard(val, made_up_tokens(1_000_000))

    def arguments(out):
        return training(data, out, "--val", val, "--val-every", 2, "--val-batches", 0, "--tokenizer",
                        data / "tokenizer.bin", steps=3)

    program.run(*arguments(tmp_path / "other"))
    out = tmp_path / "out"
    with program.start(*arguments(out)) as process:
        read_to_step(process, 1)
        wait_until(lambda: bytes_read(process) > 500_000, process)
        process.send_signal(signal.SIGTERM)
        status, said, err = ended(process)
    assert (status, err) == (0, "")
    assert "stopped after step 2 of 3" in said
    assert metrics(out) == metrics(tmp_path / "other")[:3]  # step 2 has its validation loss
    assert metrics(out)[2][2]
    program.run("train", "--out", out, "--resume")
    assert_same_run(out, tmp_path / "other")


def test_second_ctrl_c_in_validation_ends_at_once(program, data, tmp_path):
    """In a validation of a hundred million tokens, which nobody waits for."""
    val = tmp_path / "val.bin"
    write_shard(val, made_up_tokens(100_000) * 1000)
    arguments = training(data, tmp_path / "out", "--val", val, "--val-every", 1, "--val-batches", 0, "--tokenizer",
                         data / "tokenizer.bin")
    with program.start(*arguments) as process:
        wait_until(lambda: signal_mask(process, "SigCgt", signal.SIGINT) and bytes_read(process) > 500_000, process)
        process.send_signal(signal.SIGINT)
        wait_until(lambda: not signal_mask(process, "ShdPnd", signal.SIGINT), process)
        time.sleep(0.1)
        assert process.poll() is None
        process.send_signal(signal.SIGINT)
        status, said, _ = ended(process)
    assert status == 128 + signal.SIGINT
    assert "step 1/" not in said


def test_second_ctrl_c_ends_at_once(program, data, tmp_path):
    """In a step of a billion tokens, which nobody waits for."""
    with program.start(*training(data, tmp_path / "out", "--total-batch", 2**30)) as process:
        wait_until(lambda: signal_mask(process, "SigCgt", signal.SIGINT), process)
        process.send_signal(signal.SIGINT)
        wait_until(lambda: not signal_mask(process, "ShdPnd", signal.SIGINT), process)
        assert process.poll() is None
        process.send_signal(signal.SIGINT)
        status, said, _ = ended(process)
    assert status == 128 + signal.SIGINT
    assert "step 1/" not in said


def test_finished_run_is_left_as_it_is(program, finished):
    before = contents(finished["skip"])
    assert "is complete" in program.run("train", "--out", finished["skip"], "--resume")
    assert contents(finished["skip"]) == before


def test_resume_may_change_places_and_how_often_to_look_and_save(program, data, tmp_path):
    part = tmp_path / "part"
    program.stop(*training(data, part, steps=400, save_every=100), after=5, by=signal.SIGTERM)
    moved = tmp_path / "moved"
    shutil.copytree(data, moved)
    program.run("train", "--resume", "--out", part, "--train", f"{moved}/train_*.bin", "--val", f"{moved}/val_*.bin",
                "--val-every", 50, "--save-every", 200, "--sample-every", 150, "--keep", "--steps", 400)
    assert sorted(path.name for path in part.glob("model_*")) == ["model_000200.bin", "model_000400.bin"]


def test_overwrite_replaces_the_whole_run(program, data, finished, tmp_path):
    out = tmp_path / "out"
    program.run(*training(data, out, "--keep", "--seed", 9, steps=6))
    assert (out / "model_000003.bin").exists()
    program.run(*training(data, out, "--overwrite"))
    assert sorted(os.listdir(out)) == ["metrics.csv", "model.bin", "tokenizer.bin"]
    assert_same_run(out, finished["vanilla"])


# What steers a run


def learning_rates(program, data, tmp_path, *more):
    """Those of twenty steps, the highest 3e-3."""
    program.run(*training(data, tmp_path / "out", *more, "--overwrite", steps=20))
    return [float(row[3]) for row in metrics(tmp_path / "out")[1:]]


def test_schedule_cosine(program, data, tmp_path):
    rates = learning_rates(program, data, tmp_path, "--warmup", 5, "--min-lr", "1e-4")
    assert rates[:5] == pytest.approx([3e-3 * i / 5 for i in range(1, 6)])
    assert rates[5:] == pytest.approx([1e-4 + 2.9e-3 * (0.5 + 0.5 * cos(pi * i / 15)) for i in range(1, 16)])


def test_schedule_linear(program, data, tmp_path):
    rates = learning_rates(program, data, tmp_path, "--warmup", 0, "--schedule", "linear", "--min-lr", 0)
    assert rates == pytest.approx([3e-3 * (1 - i / 20) for i in range(1, 21)])


def test_schedule_constant(program, data, tmp_path):
    rates = learning_rates(program, data, tmp_path, "--warmup", 0, "--schedule", "constant")
    assert rates == pytest.approx([3e-3] * 20)


def test_schedule_wsd(program, data, tmp_path):
    rates = learning_rates(program, data, tmp_path, "--warmup", 2, "--schedule", "wsd", "--min-lr", 0)
    assert rates[:16] == pytest.approx([1.5e-3] + [3e-3] * 15)
    assert rates[16:] == pytest.approx([3e-3 * (1 - sqrt(i / 4)) for i in range(1, 5)])


@pytest.mark.parametrize("setting", [["--skip-heads", 0], ["--skip-distance", LAYERS]], ids=lambda s: s[0])
def test_skip_without_a_skipping_head_says_so(program, data, tmp_path, setting):
    said = program.run(*training(data, tmp_path / "out", "--attention", "skip", *setting, steps=1))
    assert "no head skips" in said


def test_seed_changes_the_run(program, data, finished, tmp_path):
    program.run(*training(data, tmp_path / "out", "--seed", 5))
    assert metrics(tmp_path / "out") != metrics(finished["vanilla"])


def test_headerless_shards_are_read(program, data, finished, tmp_path):
    for path in data.glob("*_*.bin"):
        (tmp_path / path.name).write_bytes(path.read_bytes()[HEADER_BYTES:])
    said = program.run(*training(tmp_path, tmp_path / "out", "--tokenizer", data / "tokenizer.bin"))
    assert "headerless: 3 of 3 files of --train" in said
    assert metrics(tmp_path / "out") == metrics(finished["vanilla"])


def test_shard_shorter_than_a_window_is_left_out(program, data, tmp_path):
    write_shard(tmp_path / "train_0.bin", range(SEQUENCE))
    shutil.copy(data / "train_1.bin", tmp_path)
    said = program.run(*training(data, tmp_path / "out", "--train", f"{tmp_path}/train_*.bin", steps=2))
    assert f"left out: {tmp_path}/train_0.bin, {SEQUENCE} tokens" in said


def test_without_tokenizer_validation_or_steps(program, tmp_path):
    shard, out = tmp_path / "shard.bin", tmp_path / "out"
    write_shard(shard, made_up_tokens(1000))
    said = program.run("train", "--train", shard, "--out", out, *SHAPE, "--vocab", 300)
    assert "step 15/15" in said  # one pass: 999 / 16 windows, 4 in a step
    assert "--prompt-tokens 0" in said
    program.run("generate", "--model", out / "model.bin", "--prompt-tokens", "0", "--tokens", 3)


def test_training_begins_from_a_model_with_its_or_another_attention(program, data, finished, tmp_path):
    out = tmp_path / "out"
    arguments = ["train", "--train", f"{data}/train_*.bin", "--out", out, "--model", finished["skip"] / "model.bin",
                 "--batch", BATCH, "--steps", 3]
    assert "attention  skip" in program.run(*arguments)
    program.run(*arguments, "--overwrite", "--attention", "depth")
    fields = struct.unpack("<256i", (out / "model.bin").read_bytes()[:HEADER_BYTES])
    assert ATTENTIONS[fields[8]] == "depth"


def test_terminal_has_one_live_line_and_keeps_validations(program, data, tmp_path):
    command = program.command(training(data, tmp_path / "out", "--log-every", 0))
    pid, terminal = pty.fork()
    if pid == 0:
        os.execve(command[0], command, program.environment())
    text = b""
    try:
        while piece := os.read(terminal, 4096):
            text += piece
    except OSError:  # Linux's way to say that the other side is closed
        pass
    os.close(terminal)
    assert os.waitpid(pid, 0)[1] == 0
    assert text.count(b"\x1b[K") >= 4
    assert len([line for line in text.split(b"\n") if b"step" in line and b"val " in line]) == 3


def test_pipe_gets_a_line_a_second(program, data, tmp_path):
    start = time.monotonic()
    said = program.run(*training(data, tmp_path / "out", "--log-every", 0, "--val-every", 100, "--channels", 64,
                                 steps=999, save_every=0))
    wall = time.monotonic() - start
    shown = [int(step) for step in re.findall(r"^step (\d+)/", said, re.MULTILINE)]
    assert {1, *range(100, 999, 100), 999} <= set(shown)
    assert len(shown) <= 11 + wall
    with open(tmp_path / "out/metrics.csv") as file:
        ms = [float(row["ms"]) for row in csv.DictReader(file)]
    for step, following in zip(shown, shown[1:]):
        assert sum(ms[step:following - 1]) <= 1001  # the steps between two lines take less than a second


def test_log_every(program, data, tmp_path):
    said = program.run(*training(data, tmp_path / "out", "--log-every", 3, steps=10))
    assert re.findall(r"^step (\d+)/", said, re.MULTILINE) == ["3", "4", "6", "8", "9", "10"]  # 4, 8: validations


def test_samples_begin_with_the_prompt(program, data, tmp_path):
    said = program.run(*training(data, tmp_path / "out", "--sample-every", 4, "--prompt", "abc d"))
    assert len(re.findall(r"^sample after step \d+:\nabc d", said, re.MULTILINE)) == 3


def test_resume_keeps_the_prompt_of_samples(program, data, tmp_path):
    out = tmp_path / "out"
    program.stop(*training(data, out, "--prompt", "abc d", steps=500), after=2, by=signal.SIGTERM)
    again = shutil.copytree(out, tmp_path / "again")
    assert "sample after step 500:\nabc d" in program.run("train", "--out", out, "--resume")
    assert "sample after step 500:\nbc" in program.run("train", "--out", again, "--resume", "--prompt-tokens", "98,99")


def test_ignored_signals_stay_ignored(program, data, tmp_path):
    with program.start(*training(data, tmp_path / "out", steps=100)) as process:
        read_to_step(process, 2)
        assert not signal_mask(process, "SigIgn", signal.SIGHUP) and signal_mask(process, "SigCgt", signal.SIGHUP)
    arguments = training(data, tmp_path / "nohup", steps=100)
    command = ["sh", "-c", 'trap "" HUP; exec "$@"', "sh", *program.command(arguments)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
                          env=program.environment()) as process:
        read_to_step(process, 2)
        process.send_signal(signal.SIGHUP)
        out, _ = ended(process)[1:]
        assert "step 100/100" in out


@pytest.mark.parametrize("number", [signal.SIGHUP, signal.SIGUSR1, signal.SIGXCPU])
def test_signals_that_save(program, data, tmp_path, number):
    status, said, _ = program.stop(*training(data, tmp_path / "out", steps=500), after=2, by=number)
    assert status == 0 and "and saved" in said
