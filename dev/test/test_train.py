"""train_gpt2 train: what a run leaves behind, that it can be stopped at any time, and what steers it."""

import csv
import os
import random
import re
import shutil
import signal
import struct
import subprocess
import sys
import time
import zlib

from errno import EPERM
from math import ceil, cos, pi, sqrt

import pytest

from helpers import (
    ATTENTIONS, BATCH, BYTES_AND_END_OF_TEXT, CHANNELS, CONTEXT, END_OF_TEXT, HEADER_BYTES, HEADS, LAYERS,
    MODEL_MAGIC, PADDED_VOCABULARY, PARAMETERS, SEQUENCE, SHAPE, TRAILER_BYTES, VOCABULARY, WEIGHTS_END,
    bytes_read, contents, ended, made_up_tokens, metrics, on_terminal, read_to_step, signal_mask, training,
    wait_until, write_shard, write_tokenizer,
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
    assert sorted(os.listdir(finished[attention])) == ["best.bin", "metrics.csv", "model.bin", "tokenizer.bin"]


@pytest.mark.parametrize("attention", ATTENTIONS)
def test_metrics_have_a_row_a_step(finished, attention):
    names, *rows = metrics(finished[attention])
    assert names == ["step", "train_loss", "val_loss", "lr", "grad_norm"]
    assert [row[0] for row in rows] == [str(i) for i in range(11)]
    assert [int(row[0]) for row in rows if row[2]] == [0, 4, 8, 10]  # the start, --val-every 4, and the last
    assert rows[0] == ["0", "", rows[0][2], "", ""]


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
    arguments = training(data, out, "--val-tokens", 0, "--lr", "1e-2", steps=300)
    status, said, err = program.stop(*arguments, after=20, by=signal.SIGTERM)
    assert (status, err) == (0, "")
    assert f"train --out {out} --resume" in said

    said = program.run("train", "--out", out, "--resume")
    loss, entropy = re.search(r"validation loss ([\d.]+) .*frequencies alone would give ([\d.]+)", said).groups()
    assert float(loss) < 0.5 * float(entropy)
    assert "the frequencies alone are better" not in said
    assert len(metrics(out)) == 2 + 300

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


def test_resumed_anywhere_in_an_epoch(program, data, tmp_path):
    """An epoch takes about 19 steps. At its end, the first shard of the next one is already being read."""
    whole = tmp_path / "whole"
    program.run(*training(data, whole, "--keep", steps=60, save_every=3))
    for step in range(3, 60, 3):
        out = shutil.copytree(whole, tmp_path / str(step))
        (out / "model.bin").unlink()
        shutil.copy(whole / f"model_{step:06d}.bin", out / "model.bin")
        program.run("train", "--out", out, "--resume")
        assert_same_run(out, whole)


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
        return training(data, out, "--val", val, "--val-every", 2, "--val-tokens", 0, "--tokenizer",
                        data / "tokenizer.bin", steps=3)

    program.run(*arguments(tmp_path / "other"))
    out = tmp_path / "out"
    with program.start(*arguments(out)) as process:
        read_to_step(process, 1)
        before = bytes_read(process)
        wait_until(lambda: bytes_read(process) > before + 500_000, process)
        process.send_signal(signal.SIGTERM)
        status, said, err = ended(process)
    assert (status, err) == (0, "")
    assert "stopped after step 2 of 3" in said
    assert metrics(out) == metrics(tmp_path / "other")[:4]  # step 2 has its validation loss
    assert metrics(out)[3][2]
    program.run("train", "--out", out, "--resume")
    assert_same_run(out, tmp_path / "other")


def test_stopped_before_the_first_step_keeps_the_former_run(program, data, finished, tmp_path):
    """In the first validation, which takes a while."""
    val = tmp_path / "val.bin"
    write_shard(val, made_up_tokens(100_000) * 10)
    out = shutil.copytree(finished["depth"], tmp_path / "out")
    before = contents(out)
    with program.start(*training(data, out, "--overwrite", "--val", val, "--val-tokens", 0)) as process:
        wait_until(lambda: signal_mask(process, "SigCgt", signal.SIGINT) and bytes_read(process) > 500_000, process)
        process.send_signal(signal.SIGINT)
        status, said, err = ended(process)
    assert (status, err) == (0, "") and "stopped before the first step; nothing is saved" in said
    assert contents(out) == before


def test_second_ctrl_c_in_validation_ends_at_once(program, data, tmp_path):
    """In a validation of a hundred million tokens, which nobody waits for."""
    val = tmp_path / "val.bin"
    write_shard(val, made_up_tokens(100_000) * 1000)
    arguments = training(data, tmp_path / "out", "--val", val, "--val-every", 1, "--val-tokens", 0, "--tokenizer",
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
        wait_until((tmp_path / "out/metrics.csv").exists, process)  # the last file before the step
        time.sleep(0.5)
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
    assert sorted(os.listdir(out)) == ["best.bin", "metrics.csv", "model.bin", "tokenizer.bin"]
    assert_same_run(out, finished["vanilla"])


def val_losses(out):
    """Validation losses by step."""
    return {int(row[0]): float(row[2]) for row in metrics(out)[1:] if row[2]}


def test_best_checkpoint_is_that_of_the_lowest_validation_loss(program, data, tmp_path):
    """At a rate at which losses go up and down. It is saved when it is found, though no checkpoint is due then."""
    out = tmp_path / "out"
    said = program.run(*training(data, out, "--lr", "0.3", "--val-every", 1, "--schedule", "constant",
                                 "--save-every", 0, steps=40))
    losses = val_losses(out)
    best = min(losses, key=losses.get)
    assert 0 < best < 40
    assert f"best validation loss {losses[best]:.4f} at step {best}\n" in said
    assert f"generate --model {out}/best.bin" in said
    assert f"checkpoint of step {best}" in program.run("describe", "--model", out / "best.bin")
    said = program.run("eval", "--model", out / "best.bin", "--val", data / "val_0.bin", "--batch", BATCH, "--sequence",
                       SEQUENCE)
    assert float(re.search(r"loss +([\d.]+)", said)[1]) == pytest.approx(losses[best], abs=1e-5)


def test_random_weights_are_no_best_checkpoint(program, data, tmp_path):
    """At a rate of 0, at which no validation is better than the first; those of a file may be the best."""
    new, tuned = tmp_path / "new", tmp_path / "tuned"
    program.run(*training(data, new, "--lr", 0))
    assert "checkpoint of step 4" in program.run("describe", "--model", new / "best.bin")
    program.run(*training(data, tuned, "--lr", 0, "--model", new / "model.bin"))
    assert "checkpoint of step 0" in program.run("describe", "--model", tuned / "best.bin")


def test_best_checkpoint_is_a_second_name_of_the_last(finished):
    assert os.path.samefile(finished["skip"] / "best.bin", finished["skip"] / "model.bin")


def test_killed_before_its_second_names_are_given(program, data, tmp_path):
    out, killed = tmp_path / "out", tmp_path / "killed"
    program.run(*training(data, out, "--keep", "--schedule", "constant", steps=20))
    before = val_losses(out)
    assert before[12] == min(before[step] for step in before if step <= 12)
    killed.mkdir()
    shutil.copy(out / "model_000012.bin", killed / "model.bin")
    for name in "metrics.csv", "model_000009.bin", "tokenizer.bin":
        shutil.copy(out / name, killed)
    program.run("train", "--out", killed, "--resume")
    assert {f"model_{step:06}.bin" for step in (9, 12, 15, 18, 20)} < set(contents(killed))
    assert_same_run(killed, out)
    assert (killed / "best.bin").read_bytes() == (out / "best.bin").read_bytes()


@pytest.mark.skipif(sys.platform != "linux" or not shutil.which("cc"), reason="needs Linux and a C compiler")
def test_second_names_where_links_fail(program, root, data, tmp_path):
    """They are copies then, also of a run that now gets other steps."""
    out = tmp_path / "out"
    program.run(*training(data, out, "--keep", "--schedule", "constant", "--save-every", 4, steps=12))
    saved = (out / "model.bin").read_bytes()
    for path in [*out.glob("model_*"), out / "best.bin"]:
        path.unlink()
    library = tmp_path / "faults.so"
    subprocess.run(["cc", "-shared", "-fPIC", root / "dev/test/faults.c", "-o", library, "-ldl"], check=True)
    for name, fault in ("best.bin", 1), ("model_000012.bin", 2):
        folder = shutil.copytree(out, tmp_path / name)
        command = program.command(["train", "--out", folder, "--resume", "--steps", 13])
        environment = {**program.environment(), "LD_PRELOAD": str(library), "FAULT": f"link {fault} error {EPERM}"}
        subprocess.run(command, env=environment, stdout=subprocess.DEVNULL, check=True)
        assert (folder / "model_000012.bin").read_bytes() == saved
        assert not list(folder.glob("*.tmp"))


def test_a_finished_run_goes_on(program, data, tmp_path):
    """With moments and data as if it had never ended; its rates are those of the new number of steps."""
    out, longer = tmp_path / "out", tmp_path / "longer"
    constant = ["--schedule", "constant", "--warmup", 2]  # so that the first 10 steps do not depend on the number
    program.run(*training(data, out, *constant, steps=10))
    before = contents(out)
    program.fails("train", "--out", out, "--resume", "--steps", 9, says="--steps 9: .*model.bin is already at step 10")
    assert contents(out) == before
    said = program.run("train", "--out", out, "--resume", "--steps", 20)
    assert "20 instead of 10; the next learning rate is 3.00e-03, after 3.00e-03" in said
    program.run(*training(data, longer, *constant, steps=20))
    assert weights(out) == weights(longer)
    assert [row for row in metrics(out) if row[0] != "10"] == [row for row in metrics(longer) if row[0] != "10"]


def weights(out):
    return (out / "model.bin").read_bytes()[:WEIGHTS_END]


def test_a_stopped_run_gets_more_or_fewer_steps(program, data, tmp_path):
    out = tmp_path / "out"
    program.stop(*training(data, out, "--warmup", 10, "--min-lr", "1e-4", steps=400), after=20, by=signal.SIGTERM)
    at = int(re.search(r"step (\d+)", program.run("describe", "--model", out / "model.bin"))[1])
    fewer = shutil.copytree(out, tmp_path / "fewer")
    for folder, steps in (out, 600), (fewer, 200):
        program.run("train", "--out", folder, "--resume", "--steps", steps)
        rates = {int(row[0]): float(row[3]) for row in metrics(folder)[2:]}
        assert list(rates) == list(range(1, steps + 1))
        for step, rate in rates.items():
            last = 400 if step <= at else steps
            cosine = 1e-4 + 2.9e-3 * (0.5 + 0.5 * cos(pi * (step - 10) / (last - 10)))
            assert rate == pytest.approx(3e-3 * step / 10 if step <= 10 else cosine)


def test_overwritten_run_stays_until_the_new_one_is_saved(program, data, finished, tmp_path):
    """A limit on the size of files in place of a full disk; the new run has another tokenizer."""
    other = tmp_path / "data"
    shutil.copytree(data, other)
    write_tokenizer(other / "tokenizer.bin", BYTES_AND_END_OF_TEXT[-2::-1] + BYTES_AND_END_OF_TEXT[-1:], END_OF_TEXT)
    out = shutil.copytree(finished["skip"], tmp_path / "out")
    before = contents(out)
    command = program.command(training(other, out, "--overwrite"))
    done = subprocess.run(["bash", "-c", 'ulimit -f 50; exec "$@"', "bash", *command], capture_output=True, text=True,
                          env=program.environment())
    assert done.returncode == 1 and "model.bin could not be written: File too large" in done.stderr
    after = contents(out)
    after.pop("tokenizer.bin.tmp", None)
    assert after == before


@pytest.mark.parametrize("killed_after", ["model.bin", "tokenizer.bin", "metrics.csv", "model_000003.bin"])
def test_overwriting_is_killed_at_its_renames(program, data, tmp_path, killed_after):
    """What such a run leaves behind, put together by hand: the new one goes on, and nothing of the old one stays."""
    old, new, other = tmp_path / "old", tmp_path / "new", tmp_path / "data"
    program.run(*training(data, old, "--keep", "--seed", 9, steps=6))
    shutil.copytree(data, other)
    write_tokenizer(other / "tokenizer.bin", BYTES_AND_END_OF_TEXT[-2::-1] + BYTES_AND_END_OF_TEXT[-1:], END_OF_TEXT)
    program.run(*training(other, new, steps=20))
    # The checkpoint of step 0 of a run that overwrites another
    begun = shutil.copytree(old, tmp_path / "begun")
    with program.start(*training(other, begun, "--overwrite", "--log-every", 1, "--save-every", 0, "--val-every", 20,
                                 "--total-batch", 2**30, steps=20)) as process:
        wait_until(lambda: not (begun / "model_000003.bin").exists(), process)
    step_0 = (begun / "model.bin").read_bytes()
    assert b"overwrites" in step_0
    out = shutil.copytree(old, tmp_path / "out")
    (out / "model.bin").write_bytes(step_0)
    names = ["model.bin", "tokenizer.bin", "metrics.csv", "model_000003.bin"]
    for name in names[1:names.index(killed_after) + 1]:
        (out / name).unlink() if name.startswith("model_") else shutil.copy(begun / name, out / name)
    if killed_after == "model.bin":
        program.fails("generate", "--model", out / "model.bin", says="no tokenizer.bin beside it")
    else:
        program.run("generate", "--model", out / "model.bin", "--tokens", 3)
    with program.start("train", "--out", out, "--resume") as process:
        wait_until(lambda: not [*out.glob("model_*"), *out.glob("best.bin")], process)
    assert (out / "tokenizer.bin").read_bytes() == (other / "tokenizer.bin").read_bytes()
    assert metrics(out) == metrics(begun)


# What steers a run


def test_validation_does_not_depend_on_the_batch(each_build, data, finished, tmp_path):
    model, losses = finished["depth"] / "model.bin", set()
    for batch in 1, 2, 3, 5, 8:
        said = each_build.run("eval", "--model", model, "--val", data / "val_0.bin", "--sequence", 7, "--batch", batch,
                              "--val-tokens", 100)
        assert "98 tokens in windows of 7" in said
        losses.add(re.search(r"loss +([\d.]+)", said)[1])
    assert len(losses) == 1


def test_sequence_is_the_context_by_default(program, data, tmp_path):
    write_shard(tmp_path / "long.bin", made_up_tokens(5000))
    said = program.run("train", "--train", tmp_path / "long.bin", "--out", tmp_path / "out", "--vocab", VOCABULARY,
                       "--layers", 1, "--heads", 1, "--channels", 8, "--context", 1500, "--steps", 1)
    assert "4 sequences of 1500 tokens: 6,000 tokens" in said


def test_start_says_what_a_step_takes(program, data, tmp_path):
    said = program.run(*training(data, tmp_path / "out", steps=1))
    assert f"{BATCH} sequences of {SEQUENCE} tokens, 2 times: {2 * BATCH * SEQUENCE} tokens" in said


def test_small_part_of_the_vocabulary_is_remarked_on(program, tmp_path):
    write_shard(tmp_path / "shard.bin", [i * i % 65 for i in range(1000)])
    arguments = ["train", "--train", tmp_path / "shard.bin", "--out", tmp_path / "out", *SHAPE, "--steps", 1]
    assert "the first shard has tokens below 65 only: is" in program.run(*arguments)
    assert "has tokens below" not in program.run(*arguments, "--overwrite", "--vocab", 65)


def test_loss_above_the_unigram_entropy_is_remarked_on(program, data, tmp_path):
    assert "note: the frequencies alone are better" in program.run(*training(data, tmp_path / "out", steps=1))


@pytest.mark.parametrize("seed", [0, 2**31 - 1])
def test_seeds_at_both_ends(program, data, tmp_path, seed):
    said = program.run(*training(data, tmp_path / "out", "--seed", seed, steps=2))
    words = re.search(r"generate --model .*", said)[0].split()
    program.run(*words, "--tokens", 3)


@pytest.mark.parametrize("name", ["with space", "quote'and\"double", "dollar$HOME`x`", "line\nbreak", "back\\slash",
                                  "é"])
def test_suggested_commands_are_quoted_for_a_shell(program, data, tmp_path, name):
    said = program.run(*training(data, tmp_path / name, steps=2))
    command = re.search(r"^    (.* generate .*)$", said, re.MULTILINE)[1]
    assert subprocess.run(["bash", "-c", command + " --tokens 3"], capture_output=True).returncode == 0


def test_suggested_command_samples_as_the_run_did(program, data, tmp_path):
    said = program.run(*training(data, tmp_path / "out", "--prompt", "it's 'a'", "--temperature", 0, "--tokens", 30))
    command = re.search(r"^    (.* generate .*)$", said, re.MULTILINE)[1]
    text = subprocess.run(["bash", "-c", command], capture_output=True, text=True, check=True).stdout
    assert text.startswith("it's 'a'") and f"sample after step 10:\n{text}\n" in said
    assert "--top" not in command  # only what was given


def learning_rates(program, data, tmp_path, *more):
    """Those of twenty steps, the highest 3e-3."""
    program.run(*training(data, tmp_path / "out", *more, "--overwrite", steps=20))
    return [float(row[3]) for row in metrics(tmp_path / "out")[2:]]


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
    assert "1,000 steps make 64.52 epochs" in said  # one of 999 / 32 windows, 4 in a step, would be 7 steps
    assert "step 1000/1000" in said and "--prompt-tokens 0" in said
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
    status, text = on_terminal(program, training(data, tmp_path / "out", "--log-every", 0))
    assert status == 0
    assert text.count(b"\x1b[K") >= 4
    assert len([line for line in text.split(b"\n") if b"step" in line and b"val " in line]) == 4


def test_pipe_gets_a_line_a_second(program, data, tmp_path):
    start = time.monotonic()
    said = program.run(*training(data, tmp_path / "out", "--log-every", 0, "--val-every", 100, "--channels", 64,
                                 steps=999, save_every=0))
    wall = time.monotonic() - start
    shown = [int(step) for step in re.findall(r"^step (\d+)/", said, re.MULTILINE)]
    assert {0, 1, *range(100, 999, 100), 999} <= set(shown)
    assert len(shown) <= 12 + wall
    with open(tmp_path / "out/metrics.csv") as file:
        ms = [float(row["ms"]) for row in csv.DictReader(file) if row["ms"]]
    for step, following in zip(shown, shown[1:]):
        assert sum(ms[step:following - 1]) <= 1001  # the steps between two lines take less than a second


def test_log_every(program, data, tmp_path):
    said = program.run(*training(data, tmp_path / "out", "--log-every", 3, steps=10))
    assert re.findall(r"^step (\d+)/", said, re.MULTILINE) == list("034689") + ["10"]  # 0, 4, 8: validations


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
