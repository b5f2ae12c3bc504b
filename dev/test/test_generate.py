"""train_gpt2 generate, eval and describe: text from a model, its loss, its shape."""

import math
import os
import random
import re
import shutil
import signal
import struct
import subprocess
import unicodedata

from collections import Counter

import pytest

from helpers import (
    ATTENTIONS, BATCH, BYTES_AND_END_OF_TEXT, CHANNELS, CONTEXT, END_OF_TEXT, EVAL_MAGIC, HEADER_BYTES, HEADS, LAYERS,
    PARAMETERS, SEQUENCE, VOCABULARY, changed, header, metrics, on_terminal, read_shard, tokens_bytes, weights_only,
    write_shard, write_tokenizer,
)


@pytest.fixture
def no_tokenizer(model, tmp_path):
    """The model in a folder of its own: it reads and writes numbers of tokens."""
    return shutil.copy(model, tmp_path / "model.bin")


@pytest.fixture
def lively(no_tokenizer):
    """With large random weights: the likeliest tokens vary, and depend on all that it reads."""
    r = random.Random(1)
    last_norm = [1] * CHANNELS + [0] * CHANNELS
    values = [r.gauss(0, 1) for _ in range(PARAMETERS - len(last_norm))] + last_norm
    begin = weights_only(no_tokenizer.read_bytes())[:HEADER_BYTES]
    no_tokenizer.write_bytes(begin + struct.pack(f"<{PARAMETERS}f", *values))
    return no_tokenizer


def tokens_after(program, model, prompt, n):
    """The likeliest continuation, prompt included."""
    said = program.run("generate", "--model", model, "--prompt-tokens", ",".join(map(str, prompt)), "--tokens", n,
                       "--temperature", 0)
    return [int(token) for token in said.split()]


def test_generate_depends_on_the_seed_alone(program, model):
    args = ["generate", "--model", model, "--prompt", "abc", "--tokens", 100]
    text = program.run(*args)
    assert text.startswith("abc")
    assert program.run(*args) == text != program.run(*args, "--seed", 5)


@pytest.mark.parametrize("more", [["--top-k", 1], ["--top-p", 0], ["--temperature", 1e-9]], ids=lambda more: more[0])
def test_generate_greedily_in_several_ways(program, model, more):
    args = ["generate", "--model", model, "--prompt", "abc", "--tokens", 100]
    assert program.run(*args, *more) == program.run(*args, "--temperature", 0)


def test_generate_says_how_fast_it_was(each_build, model):
    status, _, err = each_build.finish("generate", "--model", model, "--tokens", 10)
    assert status == 0
    assert err.endswith(b"tokens/s\n")


@pytest.mark.parametrize("attention", ATTENTIONS)
def test_generate_under_each_attention(each_build, finished, attention):
    model = finished["skip"] / "model.bin"
    each_build.run("generate", "--model", model, "--attention", attention, "--tokens", CONTEXT + 8)


def test_options_may_repeat_the_model(each_build, model):
    each_build.run("describe", "--model", model, "--layers", 3, "--vocab", VOCABULARY)


def test_generate_without_tokenizer_writes_numbers(each_build, no_tokenizer):
    said = each_build.run("generate", "--model", no_tokenizer, "--prompt-tokens", "5,256,7", "--tokens", 50)
    tokens = [int(word) for word in said.split()]
    assert tokens[:3] == [5, 256, 7] and len(tokens) == 53
    assert all(0 <= token < VOCABULARY for token in tokens)


@pytest.mark.parametrize("length", range(1, 3 * CONTEXT + 10, 7))
def test_prompt_of_any_length_goes_on_as_if_generated(program, lively, length):
    """Tokens read in one pass and tokens decoded one by one leave the same behind, past the context's end too."""
    prompt = tokens_after(program, lively, [97], length)
    whole = tokens_after(program, lively, [97], length + 20)
    assert len(set(whole)) > 3
    assert tokens_after(program, lively, prompt, 20) == whole


def test_reader_that_goes_away_ends_generate(program, model):
    with program.start("generate", "--model", model, "--prompt", "a", "--tokens", 10**6) as process:
        process.stdout.close()
        assert "error" not in process.stderr.read()
        assert process.wait() == -signal.SIGPIPE


def test_weights_in_bf16_are_read(each_build, finished, tmp_path):
    """llm.c's version 5: the upper halves of fp32."""
    weights = weights_only((finished["vanilla"] / "model.bin").read_bytes())
    values = struct.unpack(f"<{PARAMETERS}I", weights[HEADER_BYTES:])
    halves = struct.pack(f"<{PARAMETERS}H", *(value >> 16 for value in values))
    path = tmp_path / "model.bin"
    path.write_bytes(changed(weights[:HEADER_BYTES], 4, "<i", 5) + halves)
    assert len(each_build.run("generate", "--model", path, "--prompt-tokens", "1", "--tokens", 5).split()) <= 6
    path.write_bytes(path.read_bytes() + b"x")
    each_build.fails("generate", "--model", path, "--prompt-tokens", "1", says="header says")


# Prompts and text


def test_prompt_in_bytes(each_build, without_state, tmp_path):
    """Tokens of bytes in another order; what looks like a special token is text."""
    tokenizer = tmp_path / "tokenizer.bin"
    write_tokenizer(tokenizer, BYTES_AND_END_OF_TEXT[-2::-1] + BYTES_AND_END_OF_TEXT[-1:], END_OF_TEXT)
    prompt = "a é日b😀\n<|endoftext|>"
    said = each_build.run("generate", "--model", without_state, "--tokenizer", tokenizer, "--prompt", prompt,
                          "--tokens", 0)
    assert said == prompt + "\n"


def test_prompt_in_characters(each_build, without_state, tmp_path):
    characters = ["\n", " ", "a", "b", "é", "日", "😀"]
    characters += [chr(0x4000 + i) for i in range(VOCABULARY - 1 - len(characters))]
    tokenizer = tmp_path / "tokenizer.bin"
    write_tokenizer(tokenizer, [c.encode() for c in characters] + [b"<|endoftext|>"], END_OF_TEXT)
    args = ["generate", "--model", without_state, "--tokenizer", tokenizer, "--tokens", 0, "--prompt"]
    assert each_build.run(*args, "a é日b😀\n") == "a é日b😀\n\n"
    each_build.fails(*args, "aéx", says="'x' at byte 3 is not in the vocabulary")
    each_build.fails(*args, "aü", says="'ü'")
    each_build.fails(*args, "<|endoftext|>", says="'<'")


def test_bytes_that_are_no_utf8_become_replacement_characters(each_build, model):
    r = random.Random(0)
    edges = bytes.fromhex("41 80 82 8f 90 9f a0 ac bf c0 c2 e0 e2 ed ef f0 f4 f5 ff")
    for _ in range(30):
        text = bytes(r.choices(edges, k=40))
        said = each_build.run("generate", "--model", model, "--prompt-tokens", ",".join(map(str, text)), "--tokens", 0)
        assert said == text.decode("utf-8", "replace") + "\n"


def test_tokenizer_with_an_appendix(each_build, without_state, tmp_path):
    write_tokenizer(tmp_path / "t.bin", BYTES_AND_END_OF_TEXT, END_OF_TEXT, appendix=b"merges")
    each_build.run("generate", "--model", without_state, "--tokenizer", tmp_path / "t.bin", "--tokens", 3)


def test_tokenizer_without_end_of_text_begins_with_a_newline(each_build, without_state, tmp_path):
    """Version 1 has GPT-2's, 50256, which lies outside this vocabulary."""
    write_tokenizer(tmp_path / "t.bin", BYTES_AND_END_OF_TEXT, version=1)
    said = each_build.run("generate", "--model", without_state, "--tokenizer", tmp_path / "t.bin", "--tokens", 3)
    assert said.startswith("\n")


def test_tokens_of_several_bytes_are_written(each_build, without_state, tmp_path):
    write_tokenizer(tmp_path / "t.bin", [b"ab%c" % i for i in range(VOCABULARY - 1)] + [b"x"])
    args = ["generate", "--model", without_state, "--tokenizer", tmp_path / "t.bin", "--prompt-tokens", "1,2",
            "--tokens", 0]
    assert each_build.run(*args) == "ab\x01ab\x02\n"


# --stop, --samples, the terminal


def test_stop_ends_the_text_before_it(program, without_state, tmp_path):
    """The text is cut where the first --stop begins, also where a token holds more than that, or ends in the middle."""
    r = random.Random(1)
    tokens = [bytes(r.choices(b"ab", k=r.randint(1, 5))) for _ in range(VOCABULARY)]
    write_tokenizer(tmp_path / "t.bin", tokens)
    args = ["generate", "--model", without_state, "--tokenizer", tmp_path / "t.bin", "--prompt-tokens", "1",
            "--tokens", 40]
    for seed in range(8):
        text = program.run(*args, "--seed", seed)[:-1]
        prompt, rest = text[:len(tokens[1])], text[len(tokens[1]):]
        for stops in (["bbb"], ["aaaa", "bab"], ["ababa", "bb", "aa"], ["a"], ["x"], ["b" * 30, "ab"],
                      ["a" * 30, "b" * 30]):
            words = [word for stop in stops for word in ("--stop", stop)]
            ends = [rest.find(stop) for stop in stops if stop in rest]
            said = program.run(*args, "--seed", seed, *words)
            assert said == prompt + rest[:min(ends, default=len(rest))] + "\n"


def test_stop_without_tokenizer(each_build, no_tokenizer):
    each_build.fails("generate", "--model", no_tokenizer, "--prompt-tokens", "1", "--stop", "x",
                     says="--stop needs a tokenizer")
    each_build.fails("generate", "--model", no_tokenizer, "--stop", "", says="--stop : is empty")


def test_samples_are_those_of_the_next_seeds(program, model):
    args = ["generate", "--model", model, "--prompt", "ab", "--tokens", 20]
    alone = [program.run(*args, "--seed", seed) for seed in (5, 6, 7)]
    assert program.run(*args, "--seed", 5, "--samples", 3) == "---\n".join(alone)
    program.run(*args, "--seed", 2**31 - 1, "--samples", 2)


@pytest.mark.parametrize("length", [CONTEXT, CONTEXT + 1, 3 * CONTEXT])
def test_prompt_longer_than_the_context_says_what_is_dropped(each_build, no_tokenizer, length):
    args = ["generate", "--model", no_tokenizer, "--prompt-tokens", ",".join(["5"] * length), "--tokens", 2]
    _, _, err = each_build.finish(*args)
    said = re.search(rb"note: the prompt has (\d+) tokens, more than the context, 32; only the last (\d+) are", err)
    assert bool(said) == (length > CONTEXT)
    assert not said or (int(said[1]) == length and CONTEXT // 2 <= int(said[2]) <= CONTEXT)


def test_terminal_gets_no_control_characters(each_build, model):
    """All bytes, and U+009B, a terminal's other way to begin a command; in a pipe they stay as they are."""
    text = bytes(range(256)) + "\u009b1mé\n\t".encode()
    args = ["generate", "--model", model, "--prompt-tokens", ",".join(map(str, text)), "--tokens", 0]
    assert each_build.run(*args) == text.decode(errors="replace") + "\n"
    status, said = on_terminal(each_build, args)
    assert status == 0 and rb"\x00\x01" in said and rb"\x1b" in said and rb"\x7f" in said and rb"\u009b1m\xc3\xa9" in \
        said.replace("é".encode(), rb"\xc3\xa9")
    sent = said.decode().replace("\r\n", "\n").splitlines(keepends=True)[:4]
    assert not [c for c in "".join(sent) if unicodedata.category(c) == "Cc" and c not in "\n\t"]


def test_prompt_from_a_file(each_build, model, tmp_path):
    text = "from a file: é\n"
    (tmp_path / "prompt.txt").write_text(text)
    args = ["generate", "--model", model, "--tokens", 5]
    said = each_build.run(*args, "--prompt", text)
    assert said.startswith(text) and each_build.run(*args, "--prompt-file", tmp_path / "prompt.txt") == said
    piped = subprocess.run(each_build.command([*args, "--prompt-file", "-"]), input=text.encode(), capture_output=True)
    assert piped.stdout.decode() == said
    each_build.fails(*args, "--prompt-file", tmp_path / "none", says="none: No such file")
    each_build.fails(*args, "--prompt-file", tmp_path, says="[Ii]s a directory")
    each_build.fails(*args, "--prompt-file", "/dev/zero", says="zero: longer than 16 MiB, or without end")
    os.mkfifo(tmp_path / "pipe")
    writer = subprocess.Popen(["sh", "-c", 'printf %s "$0" > "$1"', text, tmp_path / "pipe"])
    assert each_build.run(*args, "--prompt-file", tmp_path / "pipe") == said and writer.wait() == 0
    each_build.fails(*args, "--prompt-file", "-", "--prompt", "x", says="give one of --prompt, --prompt-file and")


def test_prompt_like_an_option(each_build, model):
    args = ["generate", "--model", model, "--prompt"]
    assert each_build.run(*args, "--token", "--tokens", 0) == "--token\n"
    each_build.fails(*args, "--tokens", 5, says="--prompt needs a value: --prompt TEXT")


def test_end_of_text_ends_the_text_if_asked(program, model):
    """At this temperature all tokens are equally likely."""
    args = ["generate", "--model", model, "--prompt", "abc", "--temperature", 100, "--top-p", 1]
    end = "<|endoftext|>"
    assert program.run(*args[:3], "--prompt-tokens", f"{END_OF_TEXT},97", "--tokens", 0) == "a\n"
    for seed in range(5):
        text = program.run(*args, "--tokens", 1000, "--seed", seed)
        stopped = program.run(*args, "--tokens", 1000, "--seed", seed, "--stop-at-end")
        assert stopped == program.run(*args, "--tokens", 1000, "--seed", seed, "--stop", end)
        assert len(text) > len(stopped) or end not in text
        assert text.startswith(stopped[:-2]) and end not in stopped  # the last character may have been cut off


def test_no_end_of_text_to_stop_at(each_build, without_state, tmp_path):
    args = ["generate", "--model", without_state, "--stop-at-end", "--prompt-tokens", 1]
    each_build.fails(*args, says="--stop-at-end needs a tokenizer that has an end-of-text")
    write_tokenizer(tmp_path / "t.bin", BYTES_AND_END_OF_TEXT)
    each_build.fails(*args, "--tokenizer", tmp_path / "t.bin", says="--stop-at-end needs a tokenizer")


def test_penalty_avoids_repetition(program, no_tokenizer):
    args = ["generate", "--model", no_tokenizer, "--prompt-tokens", 97, "--tokens", CONTEXT - 1, "--temperature", 0]
    tokens = program.run(*args).split()
    assert program.run(*args, "--repetition-penalty", 1).split() == tokens
    assert len(set(program.run(*args, "--repetition-penalty", 100).split())) > len(set(tokens))


# eval


def number(pattern, text):
    return float(re.search(pattern, text)[1])


def test_eval_is_what_train_measured_last(each_build, finished, data):
    said = each_build.run("eval", "--model", finished["depth"] / "model.bin", "--val", data / "val_0.bin",
                          "--batch", BATCH, "--sequence", SEQUENCE)
    assert number(r"loss +([\d.]+)", said) == pytest.approx(float(metrics(finished["depth"])[-1][2]), abs=1e-5)


def test_eval_does_not_depend_on_the_batch(program, model, data):
    losses = [number(r"loss +([\d.]+)", program.run("eval", "--model", model, "--val", data / "val_0.bin",
                                                    "--sequence", SEQUENCE, "--batch", batch))
              for batch in (1, 3, 7, 100)]
    assert losses == pytest.approx(losses[:1] * len(losses), abs=2e-6)


def test_eval_figures_agree(each_build, model, data):
    said = each_build.run("eval", "--model", model, "--val", data / "val_0.bin", "--sequence", SEQUENCE)
    loss = number(r"loss +([\d.]+)", said)
    assert number(r"perplexity +([\d.]+)", said) == pytest.approx(math.exp(loss), rel=1e-5)
    assert number(r"bits/byte +([\d.]+)", said) == pytest.approx(loss / math.log(2), abs=1e-4)  # a token is a byte
    tokens = read_shard(data / "val_0.bin")
    n = (len(tokens) - 1) // SEQUENCE * SEQUENCE
    shares = [count / n for count in Counter(tokens[1:n + 1]).values()]
    entropy = -sum(share * math.log(share) for share in shares)
    assert number(r"frequencies alone would give a loss of ([\d.]+)", said) == pytest.approx(entropy, abs=1e-5)


def test_eval_under_another_attention(each_build, model, data):
    said = each_build.run("eval", "--model", model, "--val", data / "val_0.bin", "--attention", "vanilla")
    assert "attention  vanilla" in said


def test_eval_of_so_many_tokens(each_build, model, data):
    """Whole windows, one at least."""
    args = ["eval", "--model", model, "--val", data / "val_0.bin", "--sequence", SEQUENCE, "--val-tokens"]
    for asked, measured in (1, SEQUENCE), (3 * SEQUENCE, 3 * SEQUENCE), (4 * SEQUENCE - 1, 3 * SEQUENCE), (0, 384):
        assert f"data       {measured} tokens " in each_build.run(*args, asked)


def test_eval_by_position(each_build, model, data, tmp_path):
    """The losses' mean is the loss; those of the first positions are what shorter windows give."""
    args = ["eval", "--model", model, "--val", tmp_path / "val.bin", "--sequence"]
    write_shard(tmp_path / "val.bin", read_shard(data / "val_0.bin")[:SEQUENCE + 1])
    rows = each_build.run(*args, SEQUENCE, "--by-position").splitlines()
    losses = [float(row.split(",")[1]) for row in rows[1:]]
    assert rows[0] == "position,loss" and [row.split(",")[0] for row in rows[1:]] == [*map(str, range(SEQUENCE))]
    for n in 1, 7, SEQUENCE:
        write_shard(tmp_path / "val.bin", read_shard(data / "val_0.bin")[:n + 1])
        assert number(r"loss +([\d.]+)", each_build.run(*args, n)) == pytest.approx(sum(losses[:n]) / n, abs=2e-6)


def test_eval_writes_depth_weights(each_build, model, data, tmp_path):
    """The weights of a layer and head sum to 1; their values are tested where PyTorch is."""
    args = ["eval", "--model", model, "--val", data / "val_0.bin", "--depth-weights", tmp_path / "weights.csv"]
    each_build.fails(*args, "--attention", "vanilla", says="--depth-weights needs --attention depth")
    each_build.run(*args, "--depth-stride", 1)
    sums = Counter()
    for row in (tmp_path / "weights.csv").read_text().splitlines()[1:]:
        layer, head, _, weight = row.split(",")
        sums[layer, head] += float(weight)
    assert len(sums) == (LAYERS - 1) * HEADS and list(sums.values()) == pytest.approx([1] * len(sums), abs=1e-5)


# Questions


def questions_bytes(questions):
    """llm.c's eval format, of (context, endings, index of the right ending)."""
    def counted(tokens):
        return tokens_bytes([len(tokens), *tokens])

    bodies = [counted(context) + b"".join(map(counted, endings)) for context, endings, _ in questions]
    return header(EVAL_MAGIC, 1, len(questions), 10 + max(map(len, bodies))) + b"".join(
        tokens_bytes([65535, 10 + len(body), i, right, len(endings)]) + body
        for i, (body, (_, endings, right)) in enumerate(zip(bodies, questions)))


@pytest.fixture
def questions(tmp_path):
    r = random.Random(4)

    def some_tokens(least, most):
        return r.choices(range(97, 123), k=r.randint(least, most))

    asked = [(some_tokens(1, 9), [some_tokens(1, 12) for _ in range(n)], r.randrange(n)) for n in (4, 2, 4, 7, 1, 4)]
    (tmp_path / "questions.bin").write_bytes(questions_bytes(asked))
    return tmp_path / "questions.bin", asked


def test_questions(each_build, model, questions, tmp_path):
    """Accuracies from the losses that eval gives for context and ending, less those for the context."""
    path, asked = questions

    def total_loss(tokens):
        if len(tokens) < 2:
            return 0
        write_shard(tmp_path / "one.bin", tokens)
        n = len(tokens) - 1
        return n * number(r"loss +([\d.]+)",
                          each_build.run("eval", "--model", model, "--val", tmp_path / "one.bin", "--sequence", n))

    by_sum = by_mean = 0
    for context, endings, right in asked:
        losses = [total_loss(context + ending) - total_loss(context) for ending in endings]
        means = [loss / len(ending) for loss, ending in zip(losses, endings)]
        by_sum += losses.index(min(losses)) == right
        by_mean += means.index(min(means)) == right
    for batch in 1, 3, 50:
        said = each_build.run("eval", "--model", model, "--hellaswag", path, "--batch", batch)
        assert f"accuracy   {by_sum / len(asked):.4f}\nnormalized {by_mean / len(asked):.4f}" in said
        assert "6 questions with 22 endings" in said


def test_damaged_questions(each_build, model, questions, tmp_path):
    path, asked = questions
    good = path.read_bytes()
    args = ["eval", "--model", model, "--hellaswag", tmp_path / "bad.bin"]

    def refuses(data, says):
        (tmp_path / "bad.bin").write_bytes(data)
        each_build.fails(*args, says=says)

    refuses(b"", "holds no questions: it begins with 0 and 0")
    refuses(changed(good, 0, "<i", 20240520), "holds no questions")
    refuses(changed(good, 4, "<i", 2), "begins with 20240522 and 2")
    refuses(good[:HEADER_BYTES], "damaged: 0 questions, but its header says 6")
    refuses(good[:-1], "question 5, .* but the file ends")
    refuses(good + b"\0\0", "question 6, .* but is 0")
    for n in 5, 7, 0, -1, 2**31 - 1:
        refuses(changed(good, 8, "<i", n), "damaged")
    refuses(changed(good, HEADER_BYTES + 6, "<H", 4), "a number of endings must be from 5 to 65535, but is 4")
    refuses(changed(good, HEADER_BYTES + 10, "<H", 0), "a number of tokens must be from 1")
    refuses(changed(good, HEADER_BYTES + 12, "<H", 257), "a token must be from 0 to 256, but is 257")
    (tmp_path / "bad.bin").write_bytes(questions_bytes([([97] * CONTEXT, [[98], [98, 99]], 0)]))
    each_build.fails(*args, says="question 1 with an ending has 34 tokens, but the model's context is 32")
    each_build.fails(*args, "--val", path, says="eval needs --val GLOB, .*or --hellaswag FILE")


def test_questions_without_finite_losses(each_build, no_tokenizer, questions):
    """The last LayerNorm's weights are too large."""
    args = ["eval", "--model", no_tokenizer, "--hellaswag", questions[0]]
    data = weights_only(no_tokenizer.read_bytes())
    no_tokenizer.write_bytes(data[:-8 * CHANNELS] + struct.pack("<f", 3e38) * CHANNELS + data[-4 * CHANNELS:])
    each_build.fails(*args, says="model.bin: a loss is not finite: its training failed")
    for more in ["--by-position"], ["--depth-weights", "w.csv"]:
        each_build.fails(*args, *more, says=f"{more[0]} goes with --val")


# describe


def test_describe_counts_the_parameters(each_build, model):
    said = each_build.run("describe", "--model", model)
    assert f"{PARAMETERS:,}" in said
    assert "checkpoint of step 10" in said
    assert "124,475,904" in each_build.run("describe")  # GPT-2 with the 47 rows that pad its vocabulary


def test_describe_of_shapes_and_settings(each_build):
    each_build.run("describe", "--model", "gpt2-xl", "--attention", "skip")
    each_build.run("describe", "--skip-heads", 3, "--depth-window", 2)


def test_describe_of_many_sources(each_build):
    """In time that grows with the square of the layers at most: with the cube, it would take more than the limit."""
    command = each_build.command(["describe", "--layers", 1024, "--depth-stride", 1])
    subprocess.run(["sh", "-c", 'ulimit -t 3; exec "$@"', "sh", *command], check=True, stdout=subprocess.DEVNULL)


def test_describe_of_the_largest_shape(each_build):
    each_build.run("describe", "--layers", 1024, "--channels", 65536, "--heads", 1024, "--context", 2**20,
                   "--vocab", 65536, "--batch", 64)
