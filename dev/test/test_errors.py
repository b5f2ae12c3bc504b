"""What users get wrong: each mistake is told in one line, with exit status 1, and nothing is left half-written."""

import os
import random
import re
import shutil
import signal
import struct
import subprocess
import zlib

import pytest

from helpers import (
    ATTENTIONS, BYTES_AND_END_OF_TEXT, CHANNELS, CONTEXT, END_OF_TEXT, HEADER_BYTES, HEADS, LAYERS,
    PADDED_VOCABULARY, PARAMETERS, SEQUENCE, SHARD_MAGIC, TIMEOUT, TOKENIZER_MAGIC, TRAILER_BYTES, VOCABULARY,
    WEIGHTS_END, assert_one_line, changed, contents, ended, header, made_up_tokens, read_to_step, tokens_bytes,
    training, weights_only, write_shard, write_tokenizer,
)

LARGEST = 2**31 - 1  # of an int32
NEVER = 10**6        # steps of runs that do not end by themselves


def joined(case):
    """A test's name from words of the command line."""
    return " ".join(case) if isinstance(case, list) else None


# The command line


@pytest.mark.parametrize("more, says", [
    (["--step", "3"], "train has no option --step; did you mean --steps?"),
    (["--epochs", "3"], "train has no option --epochs; did you mean --steps?"),
    (["--learning_rate=1e-4"], "train has no option --learning_rate; did you mean --lr?"),
    (["--max-iters", "5"], "did you mean --steps?"),
    (["--block-size", "5"], "did you mean --context?"),
    (["--eval_iters", "5"], "did you mean --val-tokens?"),
    (["--num-samples", "5"], "train has no option --num-samples; see "),
    (["-b", "5"], "'-b' is not an option; did you mean --batch?"),
    (["-batch", "1"], "did you mean --batch"),
    (["--profile", "1"], "train has no option --profile; see "),
    (["stray"], "'stray' is not an option"),
    (["--lr"], "--lr needs a value"),
    (["--lr", "--steps", "5"], "--lr needs a value"),
    (["--lr", "1", "--lr", "1"], "--lr is given twice"),
    (["--lr=1"], "use a space instead of '='"),
    (["--resume=1"], "use a space instead of '='"),
    (["--steps", "12abc"], "whole number"),
    (["--steps", "1.5"], "whole number"),
    (["--steps", ""], "whole number"),
    (["--steps", " 5"], "whole number"),
    (["--steps", "nan"], "whole number"),
    (["--steps", "-5"], "must be from 1"),
    (["--steps", "0"], "must be from 1"),
    (["--steps", "99999999999999999999"], "must be from 1"),
    (["--lr", "nan"], "must be a number"),
    (["--lr", "inf"], "must be a number"),
    (["--lr", "0x1"], "must be a number"),
    (["--lr", "1e-3x"], "must be a number"),
    (["--lr", "-1"], "must be from 0"),
    (["--lr", "1e999"], "must be from 0"),
    (["--min-lr", "1"], "--min-lr 1 is more than --lr"),
    (["--warmup", "100"], "--steps 10 is less than the warmup, 100 steps; use more"),
    (["--attention", "skp"], re.escape("must be one of " + "|".join(ATTENTIONS))),
    (["--schedule", "cos"], "cosine"),
    (["--precision", "fp64"], "must be one of"),
    (["--heads", "3"], "16 channels are not a multiple of 3 heads"),
    (["--sequence", "33"], "--sequence 33 is longer than the model's context, 32"),
    (["--total-batch", "100"], "--total-batch 100 is not a multiple of batch x sequence"),
    (["--batch", "65535"], "not a multiple of batch x sequence"),
    (["--batch", "65536"], "must be from 1 to 65535"),
    (["--vocab", "100"], "tokenizer.bin has 257 tokens"),
    (["--vocab", "65537"], "must be from 1 to 65536"),
    (["--skip-heads", "1"], "--skip-heads needs --attention skip"),
    (["--attention", "depth", "--skip-distance", "1"], "--skip-distance needs --attention skip"),
    (["--attention", "skip", "--depth-stride", "1"], "--depth-stride needs --attention depth"),
    (["--attention", "skip", "--skip-heads", "3"], "skip-heads is 3, but the model has only 2 heads"),
    (["--attention", "skip", "--skip-heads", "-1"], "must be from 0"),
    (["--attention", "skip", "--skip-distance", "0"], "must be from 1"),
    (["--attention", "skip", "--skip-distance", "65537"], "must be from 1"),
    (["--attention", "depth", "--depth-stride", "0"], "must be from 1"),
    (["--attention", "depth", "--depth-window", "-1"], "must be from 0"),
    (["--model", "gpt3"], "gpt3: no such file, nor a shape"),
    (["--model", "/tmp"], "is a folder"),
    (["--tokenizer", "/proc/none"], "No such file"),
    (["--resume", "--overwrite"], "give one of them"),
], ids=joined)
def test_option_is_refused(each_build, data, tmp_path, more, says):
    each_build.fails(*training(data, tmp_path / "out", *more), says=says)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("args, says", [
    (["trian"], "no command trian; did you mean train?"),
    (["sample"], "no command sample; see "),
    (["--steps", "5"], "the first word must be a command"),
    (["train"], "train needs --out"),
    (["train", "--out", "out"], "train needs --train"),
    (["train", "--out", "out", "--train", ""], "train needs --train"),
    (["eval"], "eval needs --model"),
    (["generate"], "generate needs --model"),
    (["generate", "--model", "gpt2"], "gpt2 is a shape without weights; generate needs a model file"),
    (["eval", "--model", "gpt2-xl", "--val", "x"], "gpt2-xl is a shape without weights; eval needs a model file"),
    (["describe", "--skip-heads", "13"], "skip-heads is 13, but the model has only 12 heads"),
    (["describe", "--tokenizer", "nowhere"], "nowhere: No such file"),
], ids=joined)
def test_command_is_refused(each_build, args, says):
    each_build.fails(*args, says=says)


def test_batch_too_large(each_build, data, tmp_path):
    """Whatever this machine has; a batch of the whole takes terabytes."""
    write_shard(tmp_path / "shard.bin", made_up_tokens(1100))
    shape = ["--layers", 12, "--heads", 12, "--channels", 768, "--context", 1024, "--sequence", 1024, "--batch", 65535]
    each_build.fails("train", "--train", tmp_path / "shard.bin", "--out", tmp_path / "out", *shape,
                     says="the largest --batch that fits is [1-9]|not even --batch 1 fits")


def test_no_command_shows_the_commands(each_build):
    status, out, err = each_build.finish()
    assert (status, out) == (1, b"")
    assert b"Commands" in err


@pytest.mark.parametrize("args", [["--help"], ["-h"], ["train", "--help"], ["eval", "--batch", "2", "--help"],
                                  ["generate", "-h"], ["describe", "--help"]], ids=joined)
def test_help_is_no_error(each_build, args):
    said = each_build.run(*args)
    assert "--attention" in said
    assert ("--lr " in said) == (args[0] == "train")
    assert max(map(len, said.replace(str(each_build.path), "./train_gpt2").splitlines())) <= 80


def test_version(each_build):
    assert re.fullmatch(r"gpt2x3 [\d.]+: .+; fp32 and bf16\n", each_build.run("--version"))


def test_model_too_large_for_memory(each_build, data, tmp_path):
    out = tmp_path / "out"
    each_build.fails(*training(data, out, "--layers", 1000, "--channels", 16384, "--heads", 64), says="of memory")
    assert not out.exists()


def test_prompt_of_samples_is_checked_first(each_build, data, tmp_path):
    out = tmp_path / "out"
    write_tokenizer(tmp_path / "tokenizer.bin", [bytes([i]) for i in range(97, 97 + 26)])
    write_shard(tmp_path / "train_0.bin", [i % 26 for i in range(200)])
    each_build.fails(*training(tmp_path, out, "--val", tmp_path / "train_0.bin", "--prompt", "Oh"),
                     says="the prompt's 'O' at byte 0")
    assert not out.exists()


# --train, --val


@pytest.mark.parametrize("option", ["--train", "--val"])
def test_glob_that_matches_nothing(each_build, data, tmp_path, option):
    pattern = f"{tmp_path}/none*"
    each_build.fails(*training(data, tmp_path / "out", option, pattern),
                     says=re.escape(f"{option} {pattern}: No such file") + ".*; if shards have moved, give their")


@pytest.mark.parametrize("option", ["--train", "--val"])
@pytest.mark.parametrize("path, says", [("/tmp", "is a folder"), ("/dev/null", "not a regular file"),
                                        ("1" * 300, "^error: 1+: File name too long")],
                         ids=["folder", "device", "long"])
def test_glob_that_matches_no_file(each_build, data, tmp_path, option, path, says):
    each_build.fails(*training(data, tmp_path / "out", option, path), says=says)


def test_glob_without_quotes(each_build, data, tmp_path):
    """The shell then makes several words of it."""
    args = ["train", "--train", data / "train_0.bin", data / "train_1.bin", "--out", tmp_path / "out"]
    each_build.fails(*args, says="put patterns, and texts with spaces, in quotes")


GOOD_SHARD = header(SHARD_MAGIC, 1, 100) + tokens_bytes(range(100))
BAD_SHARDS = {
    "empty": (b"", "is empty"),
    "header cut": (GOOD_SHARD[:500], "500 bytes, but its header says 1224"),
    "token cut": (GOOD_SHARD[:-2], "1222 bytes, but its header says 1224"),
    "token half": (GOOD_SHARD[:-1], "1223 bytes, but its header says 1224"),
    "longer": (GOOD_SHARD + b"xx", "1226 bytes, but its header says 1224"),
    "magic": (changed(GOOD_SHARD, 0, "<i", 1234), "begins with 1234"),
    "version": (changed(GOOD_SHARD, 4, "<i", 2), "shard version 2"),
    "count": (changed(GOOD_SHARD, 8, "<i", -1), "header says"),
    "half tokens": (b"\x01" * 101, "an odd number of bytes"),
    "text": (b"To be, or not to be.\n" * 100, "looks like text; make shards from it with data_prep/prepare.py"),
    "model": (changed(GOOD_SHARD, 0, "<i", 20240326), "is a model"),
    "tokenizer": (changed(GOOD_SHARD, 0, "<i", TOKENIZER_MAGIC), "is a tokenizer"),
    "all tokens past the vocabulary": (GOOD_SHARD[:HEADER_BYTES] + tokens_bytes([300] * 100),
                                       r"token \d+ .at byte 1\d+. is 300, outside the vocabulary of 257"),
    "one token past the vocabulary": (changed(GOOD_SHARD, HEADER_BYTES + 2 * 40, "<H", VOCABULARY),
                                      "token 40 .at byte 1104. is 257"),
}


@pytest.mark.parametrize("option", ["--train", "--val"])
@pytest.mark.parametrize("content, says", BAD_SHARDS.values(), ids=BAD_SHARDS)
def test_shard_is_damaged(each_build, data, tmp_path, content, says, option):
    """A batch takes more windows than the shard has, so the first one meets each token."""
    shard, out = tmp_path / "shard.bin", tmp_path / "out"
    shard.write_bytes(content)
    more = [option, shard, "--batch", 8, "--tokenizer", data / "tokenizer.bin"]
    each_build.fails(*training(data, out, *more), says=says)
    assert not out.exists()


def test_sequence_longer_than_every_shard(each_build, data, tmp_path):
    write_shard(tmp_path / "shard.bin", range(SEQUENCE))
    each_build.fails(*training(data, tmp_path / "out", "--train", tmp_path / "shard.bin"),
                     says="--train: no shard has the 17 tokens of a window; use more text, or a smaller --sequence")


@pytest.mark.parametrize("what, says", [("cut", "has changed"), ("replaced", "has changed"),
                                        ("removed", "No such file"), ("overwritten", "has changed")])
def test_shard_changes_during_the_run(program, data, tmp_path, what, says):
    folder = tmp_path / "data"
    shutil.copytree(data, folder)
    shard = folder / "train_1.bin"
    with program.start(*training(folder, tmp_path / "out", steps=NEVER)) as process:
        read_to_step(process, 5)
        if what == "cut":
            os.truncate(shard, HEADER_BYTES + 400)
        elif what == "removed":
            shard.unlink()
        elif what == "replaced":
            write_shard(tmp_path / "other.bin", made_up_tokens(1500, seed=99))
            (tmp_path / "other.bin").rename(shard)
        else:
            with shard.open("r+b") as file:
                file.seek(HEADER_BYTES)
                file.write(b"\xff" * 2000)
        status, _, err = ended(process)
    assert_one_line(status, err, f"train_1.bin: .*({says})")


# --out


def test_out_is_or_lies_below_a_file(each_build, data, tmp_path):
    file = tmp_path / "file"
    file.write_text("in the way")
    for out in file, file / "below":
        each_build.fails(*training(data, out), says=f"--out {out}: .*Not a directory")
    assert file.read_text() == "in the way"


def test_out_cannot_be_made(each_build, data):
    each_build.fails(*training(data, "/proc/out"), says="--out /proc/out")


def test_out_holds_a_run(each_build, data, finished):
    before = contents(finished["skip"])
    each_build.fails(*training(data, finished["skip"]), says="has a run's model.bin: --resume continues it")
    assert contents(finished["skip"]) == before


def test_out_holds_another_tokenizer(each_build, data, tmp_path):
    write_tokenizer(tmp_path / "tokenizer.bin", BYTES_AND_END_OF_TEXT[:-1])
    before = contents(tmp_path)
    each_build.fails(*training(data, tmp_path), says="tokenizer.bin is not the tokenizer of the shards")
    assert contents(tmp_path) == before


def test_resume_with_another_tokenizer(each_build, data, tmp_path):
    out, other = tmp_path / "out", tmp_path / "other.bin"
    with each_build.start(*training(data, out, steps=NEVER)) as process:
        read_to_step(process, 2)
        process.terminate()
        ended(process)
    write_tokenizer(other, BYTES_AND_END_OF_TEXT[::-1])
    before = contents(out)
    each_build.fails("train", "--out", out, "--resume", "--tokenizer", other, says="other.bin; leave out --tokenizer")
    shutil.move(other, out / "tokenizer.bin")
    each_build.fails("train", "--out", out, "--resume", says="trained with another .*; name its own with --tokenizer")
    shutil.move(out / "tokenizer.bin", other)
    write_tokenizer(out / "tokenizer.bin", BYTES_AND_END_OF_TEXT, END_OF_TEXT)
    assert contents(out) == before


def test_overwrite_of_what_the_run_starts_from(each_build, data, finished):
    before = contents(finished["vanilla"])
    each_build.fails(*training(data, finished["vanilla"], "--overwrite", "--model", finished["vanilla"] / "model.bin"),
                     says="is in the --out that --overwrite would empty")
    assert contents(finished["vanilla"]) == before


def test_out_is_in_use_by_another_process(each_build, data, tmp_path):
    args = training(data, tmp_path / "out", steps=NEVER)
    with each_build.start(*args) as process:
        read_to_step(process, 5)
        each_build.fails(*args, says="in use by another process")
        each_build.fails(*args, "--overwrite", says="in use by another process")
        each_build.fails("train", "--out", tmp_path / "out", "--resume", says="in use by another process")
    each_build.fails(*args, says="has a run's model.bin")  # the lock ends with its owner


def test_overwrite_with_another_mistake_keeps_the_run(each_build, data, finished):
    before = contents(finished["vanilla"])
    for mistake in ["--total-batch", 63], ["--tokenizer", "/proc/none"], ["--sequence", 999], ["--train", "/proc"]:
        each_build.fails(*training(data, finished["vanilla"], "--overwrite", *mistake))
        assert contents(finished["vanilla"]) == before


def test_disk_full_in_a_checkpoint_keeps_the_former(program, data, tmp_path):
    """In place of a full disk a limit on the size of files, which the checkpoint meets half-way."""
    out = tmp_path / "out"
    program.stop(*training(data, out, steps=5000), after=5, by=signal.SIGTERM)
    former = (out / "model.bin").read_bytes()
    blocks = len(former) // 1024 // 2
    limited = ["bash", "-c", f'ulimit -f {blocks}; exec "$@"', "bash"]
    resume = program.command(["train", "--out", out, "--resume"])
    done = subprocess.run(limited + resume, capture_output=True, text=True, env=program.environment(), timeout=TIMEOUT)
    assert_one_line(done.returncode, done.stderr, "model.bin could not be written: File too large")
    assert (out / "model.bin").read_bytes() == former
    assert not list(out.glob("*.tmp"))


def test_checkpoint_has_a_folder_in_its_way(each_build, data, tmp_path):
    out = tmp_path / "out"
    (out / "model.bin.tmp").mkdir(parents=True)
    each_build.fails(*training(data, out), says="model.bin could not be written: File exists")
    assert not (out / "model.bin").exists()


def test_overwrite_that_fails_keeps_the_former_checkpoint(each_build, data, finished, tmp_path):
    out = tmp_path / "out"
    shutil.copytree(finished["vanilla"], out)
    (out / "model.bin.tmp").mkdir()
    each_build.fails(*training(data, out, "--overwrite"), says="File exists; the old file is unchanged")
    assert (out / "model.bin").read_bytes() == (finished["vanilla"] / "model.bin").read_bytes()
    assert (out / "metrics.csv").read_bytes() == (finished["vanilla"] / "metrics.csv").read_bytes()


def test_leftover_name_is_a_link_to_something_else(program, data, tmp_path):
    out, precious = tmp_path / "out", tmp_path / "precious.txt"
    precious.write_text("precious")
    out.mkdir()
    (out / "model.bin.tmp").symlink_to(precious)
    program.run(*training(data, out))
    assert precious.read_text() == "precious" and not (out / "model.bin").is_symlink()


def test_output_cannot_be_written(each_build, model):
    with open("/dev/full", "w") as full:
        command = each_build.command(["generate", "--model", model, "--tokens", 20])
        done = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True, timeout=TIMEOUT)
    assert done.returncode == 1
    assert done.stderr.endswith("error: standard output could not be written\n")


def test_out_vanishes_during_the_run(program, data, tmp_path):
    with program.start(*training(data, tmp_path / "out", steps=NEVER, save_every=100)) as process:
        read_to_step(process, 5)
        (tmp_path / "out").rename(tmp_path / "elsewhere")
        status, _, err = ended(process)
    assert_one_line(status, err, r"folder was removed or replaced during the run; step \d+ could not be saved|"
                    "could not be written: No such file")  # if it was renamed in the midst of saving


# --resume


def test_resume_with_nothing_to_resume(each_build, tmp_path):
    out = tmp_path / "out"
    each_build.fails("train", "--out", out, "--resume", says="nothing to resume")
    assert not out.exists()
    out.mkdir()
    each_build.fails("train", "--out", out, "--resume", says="nothing to resume")
    assert os.listdir(out) == []


@pytest.mark.parametrize("more", [["--lr", "1e-2"], ["--seed", "2"], ["--batch", "2"],
                                  ["--attention", "skip"], ["--layers", "2"], ["--model", "gpt2"], ["--vocab", "300"],
                                  ["--schedule", "linear"], ["--depth-stride", "3"], ["--skip-heads", "1"]], ids=joined)
def test_resume_with_an_option_that_contradicts(each_build, finished, more):
    each_build.fails("train", "--resume", "--out", finished["depth"], *more, says=f"{' '.join(more[:1])} .*contradicts")


def test_resume_with_options_that_repeat_the_checkpoint(each_build, finished):
    repeated = ["--steps", 10, "--lr", "0.003", "--layers", LAYERS, "--attention", "depth"]
    said = each_build.run("train", "--resume", "--out", finished["depth"], *repeated, "--val-every", 3)
    assert "is complete" in said


def test_resume_with_other_data(program, data, tmp_path):
    out, other = tmp_path / "out", tmp_path / "other"
    program.stop(*training(data, out, steps=400), after=5, by=signal.SIGTERM)
    shutil.copytree(data, other)
    write_shard(other / "train_3.bin", range(50))
    write_shard(other / "val_0.bin", [5] * 99)
    before = contents(out)
    for option in "train", "val":
        program.fails("train", "--resume", "--out", out, f"--{option}", f"{other}/{option}_*.bin",
                      says=f"--{option}: these are not the shards")
    assert contents(out) == before


# Models and checkpoints

CUTS = [0, 4, HEADER_BYTES - 1, HEADER_BYTES, 2000, WEIGHTS_END - 1, WEIGHTS_END, WEIGHTS_END + 8,
        -TRAILER_BYTES - 1, -TRAILER_BYTES, -1]  # negative: from the end


@pytest.mark.parametrize("length", CUTS)
def test_checkpoint_is_cut(each_build, finished, tmp_path, length):
    out = tmp_path / "out"
    shutil.copytree(finished["skip"], out)
    (out / "model.bin").write_bytes((out / "model.bin").read_bytes()[:length])
    before = contents(out)
    each_build.fails("generate", "--model", out / "model.bin", says="model.bin: .*(not a model|truncated)")
    each_build.fails("train", "--resume", "--out", out, says="model.bin: .*(not a model|truncated)")
    assert contents(out) == before


def test_checkpoint_is_longer(each_build, finished, tmp_path):
    out = tmp_path / "out"
    shutil.copytree(finished["skip"], out)
    with (out / "model.bin").open("ab") as file:
        file.write(b"x")
    each_build.fails("train", "--resume", "--out", out, says="no trailer at its end")


def test_checkpoint_is_changed_at_any_byte(each_build, finished, tmp_path):
    """One bit of it: in what the header holds, in the trailer, where parts begin, and at random."""
    out = tmp_path / "out"
    shutil.copytree(finished["skip"], out)
    good = (out / "model.bin").read_bytes()
    r = random.Random(1)
    places = [*range(0, 60, 4), HEADER_BYTES - 1, HEADER_BYTES, WEIGHTS_END - 1, WEIGHTS_END, WEIGHTS_END + 9,
              *range(len(good) - TRAILER_BYTES, len(good)), *[r.randrange(len(good)) for _ in range(30)]]
    for at in places:
        (out / "model.bin").write_bytes(changed(good, at, "B", good[at] ^ 1 << r.randrange(8)))
        each_build.fails("train", "--resume", "--out", out, says="model.bin")


# What a model's header may not hold: the field, its place, values.
BAD_FIELDS = [
    ("magic", 0, [1, SHARD_MAGIC]),
    ("version", 1, [0, 1, 2, 3, 5, 1004, 1005, -1]),
    ("context", 2, [0, -1, CONTEXT + 1, LARGEST]),
    ("vocabulary", 3, [0, VOCABULARY - 1, VOCABULARY + 1, 70000, -5]),
    ("layers", 4, [0, LAYERS - 1, -1, LARGEST]),
    ("heads", 5, [0, 1, HEADS + 1, CHANNELS + 1, -LARGEST]),
    ("channels", 6, [0, CHANNELS - 1, 2 * CHANNELS, -CHANNELS, LARGEST]),
    ("padded vocabulary", 7, [0, PADDED_VOCABULARY - 1, PADDED_VOCABULARY - 128, PADDED_VOCABULARY + 128]),
    ("attention", 8, [ATTENTIONS.index("vanilla"), ATTENTIONS.index("depth"), len(ATTENTIONS), -1]),
    ("skip distance", 9, [0, -1, 1, LARGEST]),
    ("skip heads", 10, [-1, 0, HEADS, HEADS + 1, LARGEST]),
    ("unused", 100, [1]),
    ("trailer", 255, [0, 2, -1]),
]


@pytest.mark.parametrize("field, values", [case[1:] for case in BAD_FIELDS], ids=[case[0] for case in BAD_FIELDS])
def test_model_has_a_wrong_header(each_build, finished, tmp_path, field, values):
    good, bad = (finished["skip"] / "model.bin").read_bytes(), tmp_path / "model.bin"
    shutil.copy(finished["skip"] / "tokenizer.bin", tmp_path)
    for value in values:
        if struct.unpack_from("<i", good, 4 * field)[0] != value:
            bad.write_bytes(changed(good, 4 * field, "<i", value))
            each_build.fails("generate", "--model", bad, says="model.bin")


def test_weights_without_training_state(each_build, finished, tmp_path):
    """llm.c's files: what is there of them can be used, and only that."""
    out = tmp_path / "out"
    shutil.copytree(finished["vanilla"], out)
    weights = weights_only((out / "model.bin").read_bytes())
    (out / "model.bin").write_bytes(weights)
    each_build.fails("train", "--resume", "--out", out, says="without training state")
    each_build.run("generate", "--model", out / "model.bin", "--tokens", 3)
    for wrong in weights[:-1], weights + b"x":
        (out / "model.bin").write_bytes(wrong)
        each_build.fails("generate", "--model", out / "model.bin", says="but its header says")


def test_model_and_options_disagree(each_build, data, finished, tmp_path):
    model = finished["skip"] / "model.bin"
    each_build.fails("describe", "--model", model, "--layers", LAYERS + 1, says="--layers 4 contradicts .*model.bin")
    each_build.fails("describe", "--model", model, "--vocab", 4, says="contradicts")
    each_build.fails("generate", "--model", model, "--layers", LAYERS, says="generate has no option --layers")
    each_build.fails("eval", "--model", model, "--val", data / "val_0.bin", "--sequence", CONTEXT + 1,
                     says="--sequence 33 is longer than the model's context, 32")
    each_build.fails(*training(data, tmp_path / "out", "--model", model, "--channels", 2 * CHANNELS),
                     says="--channels 32 contradicts")


@pytest.mark.parametrize("command", ["train", "eval", "generate"])
def test_weights_are_not_finite(each_build, data, finished, tmp_path, command):
    good, bad = (finished["vanilla"] / "model.bin").read_bytes(), tmp_path / "nan.bin"
    bad.write_bytes(changed(weights_only(good), WEIGHTS_END - 4, "<f", float("nan")))
    if command == "train":
        each_build.fails("train", "--model", bad, "--train", f"{data}/train_*.bin", "--out", tmp_path / "out",
                         says="nan.bin: holds infinite values or NaN")
        assert not (tmp_path / "out").exists()
    elif command == "eval":
        each_build.fails("eval", "--model", bad, "--val", data / "val_0.bin", says="nan.bin: holds infinite")
    else:
        each_build.fails("generate", "--model", bad, "--prompt-tokens", "0",
                         says="nan.bin: holds infinite values or NaN")


@pytest.mark.parametrize("value", [float("inf"), float("nan"), -float("inf")])
@pytest.mark.parametrize("at", [0, PARAMETERS - 1])
def test_any_weight_is_not_finite(program, finished, tmp_path, at, value):
    good, bad = (finished["vanilla"] / "model.bin").read_bytes(), tmp_path / "bad.bin"
    bad.write_bytes(changed(weights_only(good), HEADER_BYTES + 4 * at, "<f", value))
    program.fails("generate", "--model", bad, "--prompt-tokens", "5", "--tokens", 0, says="bad.bin: holds infinite")


def test_weight_becomes_infinite_in_the_last_update(program, data, finished, tmp_path):
    """One of a position that no sequence reaches: neither the loss nor a gradient shows it."""
    good, large, out = (finished["vanilla"] / "model.bin").read_bytes(), tmp_path / "large.bin", tmp_path / "out"
    last_position = HEADER_BYTES + 4 * (PADDED_VOCABULARY + CONTEXT - 1) * CHANNELS
    large.write_bytes(changed(weights_only(good), last_position, "<f", 1e38))
    arguments = training(data, out, "--model", large, "--lr", 10, "--weight-decay", 10, "--warmup", 0, steps=1)
    program.fails(*arguments, says="model.bin could not be written: the weights became infinite or NaN .*unchanged")
    assert "checkpoint of step 0" in program.run("describe", "--model", out / "model.bin")


def test_gradient_that_is_not_finite_changes_no_weight(program, data, finished, tmp_path):
    """Weights near the largest number, so that the gradient's norm overflows."""
    good, huge = (finished["vanilla"] / "model.bin").read_bytes(), tmp_path / "huge.bin"
    huge.write_bytes(changed(weights_only(good), WEIGHTS_END - 8 * CHANNELS, "<f", 3e38))
    out = tmp_path / "out"
    status, _, err = program.finish(*training(data, out, "--model", huge, "--val-every", 0, save_every=1))
    assert_one_line(status, err.decode(), r"became (NaN|infinite) in step 1; .*model.bin is still that of step 0")
    assert "checkpoint of step 0" in program.run("describe", "--model", out / "model.bin")


def test_exploded_loss_is_saved_with_a_warning(program, data, tmp_path):
    out = tmp_path / "out"
    mad = ["--lr", 3, "--clip", 0, "--schedule", "constant", "--val-every", 1, "--warmup", 12]
    said = program.run(*training(data, out, *mad, steps=12))
    assert re.search(r"warning: the loss, [\d.e+]+, is far above that of guessing, 5.55; try a lower", said)
    loss, step = re.search(r"best validation loss ([\d.]+) at step (\d+)", said).groups()
    assert float(loss) < 10 and f"checkpoint of step {step}" in program.run("describe", "--model", out / "best.bin")


def test_loss_becomes_nan(program, data, tmp_path):
    """Decay by a hundred times the weights drives them past the largest number within twenty steps."""
    out = tmp_path / "out"
    mad = ["--lr", 10, "--weight-decay", 10, "--clip", 0, "--schedule", "constant", "--warmup", 0]
    status, _, err = program.finish(*training(data, out, *mad, steps=100, save_every=1))
    assert_one_line(status, err.decode(), r"became (NaN|infinite) in step \d+; .*model.bin is still that of step \d+; ")
    failed, saved = (int(n) for n in re.findall(r"step (\d+);", err.decode()))
    assert saved == failed - 1
    assert f"checkpoint of step {saved}" in program.run("describe", "--model", out / "model.bin")


@pytest.mark.parametrize("flag", ["-Ofast", "-ffast-math", "-ffinite-math-only", "-funsafe-math-optimizations"])
def test_fast_math_is_refused_by_the_compiler(root, flag):
    command = [os.environ.get("CXX", "g++"), "-std=c++20", "-fsyntax-only", "-Wfatal-errors", flag]
    done = subprocess.run([*command, root / "train_gpt2.cpp"], capture_output=True, text=True)
    if "clang" in command[0] and flag == "-funsafe-math-optimizations":
        pytest.skip("clang++ does not tell a program of this flag")
    assert done.returncode != 0 and "-Ofast and -ffast-math change results and hide NaN: use -O3" in done.stderr


def test_eval_without_shards(each_build, model):
    each_build.fails("eval", "--model", model, says="eval needs --val")


# Tokenizers and prompts


def bad_tokenizers(folder):
    path = folder / "good.bin"
    write_tokenizer(path, BYTES_AND_END_OF_TEXT, END_OF_TEXT)
    good = path.read_bytes()
    return [
        (b"", "not a tokenizer: it has 0 bytes"),
        (good[:100], "not a tokenizer: it has 100 bytes"),
        (good[:HEADER_BYTES + 6], "truncated in token 3 of 257"),
        (good[:-1], "truncated in token 256 of 257"),
        (good + b"x", "tokens say"),
        (changed(good, 0, "<i", 5), "begins with 5"),
        (changed(good, 4, "<i", 3), "tokenizer version 3"),
        (changed(good, 8, "<i", 0), "vocabulary of 0"),
        (changed(good, 8, "<i", LARGEST), "vocabulary of 2147483647"),
        (changed(good, 8, "<i", 256), "tokens say"),
        (changed(good, 8, "<i", 258), "truncated"),
        (changed(good, 16, "<i", 1), "tokens say"),
        (changed(good, 16, "<i", -1), "tokens say"),
        (changed(good, HEADER_BYTES, "B", 0), "token 0 is empty"),
    ]


def test_tokenizer_is_damaged(each_build, model, tmp_path):
    bad = tmp_path / "bad.bin"
    for content, says in bad_tokenizers(tmp_path):
        bad.write_bytes(content)
        each_build.fails("generate", "--model", model, "--tokenizer", bad, says=f"bad.bin: .*{says}")
    each_build.fails("generate", "--model", model, "--tokenizer", tmp_path / "none.bin", says="none.bin: No such file")


def test_tokenizer_of_another_vocabulary(each_build, model, without_state, tmp_path):
    write_tokenizer(tmp_path / "other.bin", BYTES_AND_END_OF_TEXT[:-1])
    named = ["--tokenizer", tmp_path / "other.bin"]
    each_build.fails("generate", "--model", model, *named, says="trained with another tokenizer than .*other.bin")
    each_build.fails("generate", "--model", without_state, *named,
                     says="has 256 tokens, but the model's vocabulary is 257")


SHIFTED = BYTES_AND_END_OF_TEXT[1:-1] + BYTES_AND_END_OF_TEXT[:1] + BYTES_AND_END_OF_TEXT[-1:]  # as many tokens


@pytest.fixture
def shifted(data, tmp_path):
    """The same shards with a tokenizer of the same size."""
    folder = shutil.copytree(data, tmp_path / "shifted")
    write_tokenizer(folder / "tokenizer.bin", SHIFTED, END_OF_TEXT)
    return folder


@pytest.mark.parametrize("name", ["tokenizer.bin", "gpt2_tokenizer.bin"])
def test_shards_of_another_tokenizer_of_the_same_size(each_build, data, finished, shifted, tmp_path, name):
    (shifted / "tokenizer.bin").rename(shifted / name)
    model, out = finished["vanilla"] / "model.bin", tmp_path / "out"
    alone = tmp_path / "alone" / "model.bin"  # knows its tokenizer, though none lies beside it
    alone.parent.mkdir()
    shutil.copy(model, alone)
    def two(first):
        return f"{first}/tokenizer.bin and {shifted}/{name} are .*; .*prepare.py --tokenizer {first}/tokenizer.bin"

    ours, theirs = two(model.parent), two(data)
    shards = f"{shifted}/val_0.bin"
    each_build.fails("eval", "--model", model, "--val", shards, says=ours)
    each_build.fails("eval", "--model", alone, "--val", shards, says=f"trained with another tokenizer than .*{name}")
    each_build.fails(*training(data, out, "--val", shards), says=theirs)
    each_build.fails(*training(data, out, "--train", f"{tmp_path}/*/train_0.bin", "--val", shards, "--tokenizer",
                               data / "tokenizer.bin"), says=theirs)
    each_build.fails(*training(shifted, out, "--model", model), says=ours)
    each_build.fails(*training(shifted, out, "--model", alone), says="trained with another tokenizer")
    assert not out.exists()


def test_resume_with_shards_of_another_tokenizer(program, data, shifted, tmp_path):
    out = tmp_path / "out"
    program.stop(*training(data, out, steps=400), after=5, by=signal.SIGTERM)
    before = contents(out)
    program.fails("train", "--resume", "--out", out, "--train", f"{shifted}/train_*.bin",
                  says="out/tokenizer.bin and .*shifted/tokenizer.bin are different")
    assert contents(out) == before


def test_files_of_the_same_tokens_are_equal(program, data, finished, tmp_path):
    """llm.c's version, and what follows the tokens, make no difference."""
    folder = shutil.copytree(data, tmp_path / "data")
    write_tokenizer(folder / "tokenizer.bin", BYTES_AND_END_OF_TEXT, END_OF_TEXT, appendix=b"merges")
    model = finished["vanilla"] / "model.bin"
    program.run("eval", "--model", model, "--val", folder / "val_0.bin")
    program.run(*training(folder, tmp_path / "out", "--model", model, steps=1))
    program.run("generate", "--model", tmp_path / "out/model.bin", "--tokenizer", data / "tokenizer.bin", "--tokens", 1)


def test_links_to_shards_do_not_hide_their_tokenizer_or_manifest(program, data, shifted, tmp_path):
    links = tmp_path / "links"
    links.mkdir()
    (links / "train_0.bin").symlink_to(data / "train_0.bin")
    (links / "train_1.bin").symlink_to(shifted / "train_1.bin")
    arguments = training(links, tmp_path / "out", "--val", data / "val_0.bin")
    program.fails(*arguments, says="are different tokenizers")
    (links / "train_1.bin").unlink()
    program.run(*arguments)
    (links / "train_1.bin").symlink_to(tmp_path / "train_1.bin")
    shutil.copy(data / "train_1.bin", tmp_path)
    (tmp_path / "gpt2x3_manifest.txt").write_text("incomplete\n")
    program.fails(*arguments, "--overwrite", says="is incomplete")


def test_folder_without_a_checkpoint(program, data, tmp_path):
    (tmp_path / "metrics.csv").write_text("mine")
    program.fails(*training(data, tmp_path), says="has a run's metrics.csv: --overwrite replaces it")
    assert contents(tmp_path) == {"metrics.csv": b"mine"}
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    program.fails(*training(data, tmp_path / "link"), says="is a link that leads nowhere")


def test_tokens_of_32_bits(each_build, data, tmp_path):
    """As in llm.c's first token files."""
    (tmp_path / "tokens.bin").write_bytes(struct.pack("<500i", *(i % 200 for i in range(500))))
    each_build.fails(*training(data, tmp_path / "out", "--train", tmp_path / "tokens.bin"), says="tokens of 32 bits")


def test_end_of_text_is_part_of_a_tokenizer(program, data, finished, tmp_path):
    folder = shutil.copytree(data, tmp_path / "data")
    write_tokenizer(folder / "tokenizer.bin", BYTES_AND_END_OF_TEXT, END_OF_TEXT - 1)
    program.fails("eval", "--model", finished["vanilla"] / "model.bin", "--val", folder / "val_0.bin", says="different")


# The manifest that prepare.py leaves beside shards


def manifest(folder):
    def line(path):
        content = path.read_bytes()
        return f"{path.name} {len(content)} {zlib.crc32(content[:65536] + content[-65536:]):08x}\n"

    return "gpt2x3 manifest 1\n" + "".join(map(line, sorted(folder.glob("*.bin"))))


def test_shards_are_held_against_their_manifest(each_build, data, finished, tmp_path):
    folder = shutil.copytree(data, tmp_path / "data")
    write_shard(folder / "train_3.bin", made_up_tokens(100_000))  # longer than what its checksum covers
    (folder / "gpt2x3_manifest.txt").write_text(manifest(folder))
    model, val = finished["vanilla"] / "model.bin", folder / "val_0.bin"

    def fails(says):
        each_build.fails("eval", "--model", model, "--val", val, says=says)
        each_build.fails(*training(folder, tmp_path / "out"), says=says)

    each_build.run("eval", "--model", model, "--val", val)
    for name in "val_0.bin", "train_3.bin":
        good = (folder / name).read_bytes()
        for bad in changed(good, len(good) - 1, "B", good[-1] ^ 1), good[:-2], good + good[-2:]:
            (folder / name).write_bytes(bad)
            fails(f"{name} is not what prepare.py wrote; .*remove .*gpt2x3_manifest.txt")
        (folder / name).unlink()
        if name == "train_3.bin":
            fails(f"{name} is missing; run prepare.py again")
        (folder / name).write_bytes(good)
    tokenizer = (folder / "tokenizer.bin").read_bytes()
    write_tokenizer(folder / "tokenizer.bin", BYTES_AND_END_OF_TEXT, END_OF_TEXT, appendix=b"another file")
    fails("tokenizer.bin is not what prepare.py wrote")
    (folder / "tokenizer.bin").write_bytes(tokenizer)
    each_build.run("eval", "--model", model, "--val", val)
    shutil.copy(val, folder / "val_1.bin")
    each_build.fails("eval", "--model", model, "--val", f"{folder}/val_*.bin",
                     says="val_1.bin is not one of prepare.py's shards")
    for wrong in f"{folder}/", f"{folder}/*":
        each_build.fails("eval", "--model", model, "--val", wrong, says=r"; name only those, as in '.*/val_\*.bin'")
    for content, says in [("incomplete\n", "is incomplete: prepare.py was stopped"), ("", "damaged"),
                          ("incomplete", "was stopped"), (manifest(folder)[:-1], "damaged"), ("x" * 99, "damaged"),
                          ("gpt2x3 manifest 1\n\n", " is missing"), ("gpt2x3 manifest 1\n\0\n", ""),
                          ("gpt2x3 manifest 1\n../../etc/passwd 1 00000000\n", "passwd is (missing|not what)"),
                          ("gpt2x3 manifest 1\n", "is not one of prepare.py's shards")]:
        (folder / "gpt2x3_manifest.txt").write_text(content)
        fails(says)
    (folder / "gpt2x3_manifest.txt").unlink()
    os.mkfifo(folder / "gpt2x3_manifest.txt")
    fails("gpt2x3_manifest.txt: is not a regular file")


# What a message may hold


@pytest.mark.parametrize("name, shown", [("a\nb", r"a\\nb"), ("a\x1b[2Jb", r"a\\x1b\[2Jb"), ("a\tb", r"a\\tb"),
                                         ("a\x9bb", r"a\\u009bb"), ("aéb", "aéb"), ("a\x7f", r"a\\x7f")])
def test_control_characters_in_messages_are_escaped(each_build, data, tmp_path, name, shown):
    each_build.fails("generate", "--model", name, says=shown)
    each_build.fails("train", f"--{name}", says=shown)
    each_build.fails(name, says=shown)
    each_build.fails(*training(data, tmp_path / "out", "--train", tmp_path / name), says=shown)


# metrics.csv


@pytest.fixture
def stopped(program, data, tmp_path):
    """A run that was stopped in the middle, with at least ten rows."""
    program.stop(*training(data, tmp_path / "out", steps=60), after=10, by=signal.SIGTERM)
    return tmp_path / "out"


def test_metrics_are_no_regular_file(program, stopped):
    metrics = stopped / "metrics.csv"
    metrics.unlink()
    for make, says in [(os.mkfifo, "is not a regular file"), (os.mkdir, "is a folder"),
                       (lambda path: os.symlink("/dev/zero", path), "is not a regular file")]:
        make(metrics)
        before = (stopped / "model.bin").read_bytes()
        program.fails("train", "--out", stopped, "--resume", says=f"metrics.csv: {says}")
        assert (stopped / "model.bin").read_bytes() == before
        metrics.rmdir() if metrics.is_dir() else metrics.unlink()


@pytest.mark.parametrize("at, bad", [
    (0, "other,names"), (3, "\0" * 40), (3, ""), (3, "2,nan,,1e-3,0.5,1.0,10"), (3, "2,1.5,,1e-3"), (3, "x"),
    (3, "1,1.5,,1e-3,0.5,1.00,10"), (3, "2,1.5,,1e-3,0.5,1.00,10,11"), (3, "-2,1.5,,1e-3,0.5,1.00,10"),
    (3, "2 2,1.5,,1e-3,0.5,1.00,10")])
def test_metrics_are_damaged(program, stopped, at, bad):
    """Nothing is lost, and nothing invented: whoever knows what happened decides."""
    metrics = stopped / "metrics.csv"
    lines = metrics.read_text().split("\n")
    lines[at] = bad
    metrics.write_text("\n".join(lines))
    before = contents(stopped)
    program.fails("train", "--out", stopped, "--resume",
                  says=f"metrics.csv: line {at + 1} is no row of" if at else "metrics.csv: is not of this program")
    assert contents(stopped) == before
    metrics.unlink()
    program.run("train", "--out", stopped, "--resume")


@pytest.mark.parametrize("torn", ["\0" * 400, "12,1.2", "garbage\nmore\n", "999999,1,,1,1,1,1\n\0\0\n"])
def test_rows_after_the_checkpoint_may_be_anything(program, stopped, torn):
    """What a power cut leaves of them."""
    with (stopped / "metrics.csv").open("a") as file:
        file.write(torn)
    program.run("train", "--out", stopped, "--resume")
    rows = (stopped / "metrics.csv").read_text().splitlines()[1:]
    assert [int(row.split(",")[0]) for row in rows] == list(range(61))


@pytest.mark.parametrize("tokens", ["1,", ",1", "1,,2", "1, 2", "-1", "257", "99999999999", "1.5", "a", "+1"])
def test_prompt_tokens_are_malformed(each_build, model, tokens):
    each_build.fails("generate", "--model", model, "--prompt-tokens", tokens, says="--prompt-tokens: .*from 0 to 256")


def test_two_prompts(each_build, model):
    each_build.fails("generate", "--model", model, "--prompt-tokens", "", says="--prompt-tokens : is empty")
    each_build.fails("generate", "--model", model, "--prompt", "a", "--prompt-tokens", "1",
                     says="give one of --prompt, --prompt-file and --prompt-tokens")


def test_prompt_without_tokenizer(each_build, model, tmp_path):
    alone = tmp_path / "model.bin"
    shutil.copy(model, alone)
    each_build.fails("generate", "--model", alone, says="no tokenizer.bin beside it: use --tokenizer")
    each_build.fails("generate", "--model", alone, "--prompt", "x", says="a prompt needs a tokenizer")


def test_prompt_that_needs_merges(each_build, without_state, tmp_path):
    tokenizer, model = tmp_path / "merges.bin", without_state
    write_tokenizer(tokenizer, [b"ab%c" % i for i in range(VOCABULARY - 1)] + [b"x"])
    each_build.fails("generate", "--model", model, "--tokenizer", tokenizer, "--prompt", "a", says="merges")
    each_build.fails("generate", "--model", model, "--tokenizer", tokenizer, says="no newline")


# Dumps, which test_gpt2 reads


def test_dump_is_damaged(root, tmp_path):
    state = min((root / "dev/reference").glob("*.state.bin"), key=lambda path: path.stat().st_size)
    model = state.with_name(state.name.replace(".state.", ".model."))
    good, bad = state.read_bytes(), tmp_path / "state.bin"
    cases = [(good[:100], "too short"), (good[:-4], "bytes, not the"), (good + b"xxxx", "bytes, not the"),
             (changed(good, 0, "<i", SHARD_MAGIC), "not a debug state"), (changed(good, 4, "<i", 1), "version 1"),
             (changed(good, 8, "<i", LARGEST), ""), (changed(good, 12, "<i", -1), ""),
             (changed(good, HEADER_BYTES, "<i", VOCABULARY), "outside the vocabulary")]
    for content, says in cases:
        bad.write_bytes(content)
        done = subprocess.run([root / "test_gpt2", model, bad], capture_output=True, text=True, timeout=TIMEOUT)
        assert_one_line(done.returncode, done.stderr, says)
