"""data_prep/prepare.py: its files hold the text, and nothing but the text; what is wrong is said in one line."""

import itertools
import os
import random
import re
import resource
import shutil
import signal
import subprocess
import sys

import pytest
from helpers import (BYTES_AND_END_OF_TEXT, changed, contents, header, heed_signals, read_shard, wait_until,
                     write_tokenizer)
from prepare_helpers import (EOT, FILES, SAMPLE, check_manifest, command, decode, encode_by_file, parts, prepared,
                             read_shards, read_tokenizer, refused, run, write)


def contents_of_files(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


def test_bytes(prepare, tmp_path):
    data = bytes(range(256)) * 4 + SAMPLE.encode()
    out = tmp_path / "new" / "folder"
    said = prepared(prepare("--tokenizer", "bytes", "--out", out, "--val-tail", write(tmp_path / "a", data)))
    assert read_tokenizer(out) == [bytes([i]) for i in range(256)] + [EOT]
    cut = int(len(data) * 0.9)
    assert read_shards(out, "train") == ([256] + list(data[:cut]), [cut + 1])
    assert read_shards(out, "val") == (list(data[cut:]), [len(data) - cut])
    assert f"train_000.bin: {cut + 1:,} tokens" in said and "257 tokens" in said
    part = f"1 part of {tmp_path / 'a'}"
    assert f"training: {part}, 90.0 % of the text, {cut + 1:,} tokens, 1.00 bytes per token\n" in said
    assert f"validation: {part}, 10.0 % of the text, {len(data) - cut} tokens, 1.00 bytes per token\n" in said
    assert sorted(os.listdir(out)) == FILES


def test_chars(prepare, tmp_path):
    out = tmp_path / "out"
    prepared(prepare("--tokenizer", "chars", "--out", out, "--val-tail", write(tmp_path / "a", SAMPLE)))
    alphabet = sorted(set(SAMPLE))
    assert read_tokenizer(out) == [c.encode() for c in alphabet] + [EOT]
    cut = int(len(SAMPLE) * 0.9)
    assert read_shards(out, "train")[0] == [len(alphabet)] + [alphabet.index(c) for c in SAMPLE[:cut]]
    assert read_shards(out, "val")[0] == [alphabet.index(c) for c in SAMPLE[cut:]]


def test_files_are_documents(prepare, tmp_path):
    files = [write(tmp_path / f"{i} x", f"text {i} " * 10) for i in range(10)]  # names with spaces
    out = tmp_path / "out"
    prepared(prepare("--tokenizer", "chars", "--out", out, *files, "--val-fraction", "0.15", "--val-tail"))
    texts = [f.read_bytes() for f in files]
    half = len(texts[0]) // 2
    assert decode(out, "train") == [b""] + texts[:8] + [texts[8][:half]]
    assert decode(out, "val") == [texts[8][half:]] + texts[9:]

    said = prepared(prepare("--tokenizer", "chars", "--out", out, write(tmp_path / "none", ""), *files[3:],
                            "--val", *files[:3], "--overwrite"))
    assert f"left out: 1 empty document; {tmp_path / 'none'} is empty" in said
    assert "training: 7 documents, 70.0 % of the text, 497 tokens, 0.99 bytes per token" in said
    assert "validation: 3 documents, 30.0 % of the text, 213 tokens, 0.99 bytes per token" in said
    assert decode(out, "train") == [b""] + texts[3:]
    assert decode(out, "val") == [b""] + texts[:3]

    prepared(prepare("--tokenizer", "chars", "--out", out, *files, "--val-fraction", "0", "--overwrite"))
    assert decode(out, "train") == [b""] + texts
    assert read_shards(out, "val") == ([], [])


@pytest.mark.parametrize("tokens", [1, 7, 450, 451, 452])
def test_shards(prepare, tmp_path, tokens):
    out = tmp_path / "out"
    prepared(prepare("--tokenizer", "bytes", "--out", out, "--shard-tokens", tokens, "--val-tail",
                     write(tmp_path / "a", b"x" * 500)))
    values, counts = read_shards(out, "train")
    assert values == [256] + [ord("x")] * 450
    assert all(n == tokens for n in counts[:-1]) and 1 <= counts[-1] <= tokens


def test_keeps_former_run(prepare, tmp_path):
    a, b = write(tmp_path / "a", "a" * 500), write(tmp_path / "b", "b" * 100)
    out = tmp_path / "out"
    arguments = "--tokenizer", "bytes", "--out", out, "--shard-tokens", 100, "--val-tail"
    prepared(prepare(*arguments, a))
    write(out / "train_other.bin", "would be read as a shard, too")
    write(out / "notes", "stay")
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    refused(prepare(*arguments, b), "gpt2x3_manifest.txt exists", "--overwrite")
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before
    refused(prepare(*arguments, tmp_path / "missing", "--overwrite"), "missing: No such file")
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before
    prepared(prepare(*arguments, b, "--overwrite"))
    assert decode(out, "train")[1] == b"b" * 90
    assert sorted(os.listdir(out)) == sorted(["notes", *FILES])
    check_manifest(out)
    (out / "val_folder.bin").mkdir()
    before = contents_of_files(out)
    refused(prepare(*arguments, a, "--overwrite"), "val_folder.bin is a folder")
    assert contents_of_files(out) == before


def test_refuses(prepare, tmp_path):
    good = write(tmp_path / "good", "good text, " * 10)
    out = tmp_path / "out"
    chars = "--tokenizer", "chars", "--out", out
    bpe = "--out", out, "--tokenizer", "bpe", "--vocab-size"
    refused(prepare(*chars, tmp_path / "missing"), "missing: No such file")
    refused(prepare(*chars, good, write(tmp_path / "latin", b"12345 caf\xe9")), "latin: not UTF-8 at byte 9")
    refused(prepare(*chars, write(tmp_path / "empty", "")), "no text", "0 bytes")
    refused(prepare(*chars, good, "--val", tmp_path / "empty"), "validation")
    refused(prepare(*chars, good, "--val", good), "both")
    refused(prepare(*chars, good, "--val", tmp_path / "." / "good"), "both")
    refused(prepare(*chars, good, "--val", tmp_path / "latin", "--val-tail"), "--val-tail: not with --val")
    refused(prepare(*chars, good, "--val", tmp_path / "latin", "--val-fraction", 0), "--val-fraction: not with --val")
    refused(prepare(*chars, good, good), "good: is given twice")
    refused(prepare(*chars, tmp_path / "two\nlines"), "two\\nlines: No such file")
    refused(prepare(*chars, write(tmp_path / "short", "x")), "1 byte in all")
    refused(prepare(*chars, good, "--val-fraction", "1"), "--val-fraction")
    refused(prepare(*chars, good, "--val-fraction", "nan"), "--val-fraction")
    refused(prepare(*chars, good, "--shard-tokens", "0"), "--shard-tokens")
    refused(prepare(*chars, good, "--shard-tokens", 2**30), "2 GiB")
    refused(prepare("--tokenizer", "words", "--out", out, good),
            "--tokenizer words: must be bytes, chars, bpe, gpt2 or an existing tokenizer.bin")
    refused(prepare("--out", out, good), "--tokenizer")
    refused(prepare("--tokenizer", "bpe", "--out", out, good), "--vocab-size N")
    refused(prepare(*chars, good, "--vocab-size", 300), "--vocab-size N")
    for size in 256, 65537, -1:
        refused(prepare(*bpe, size, good), f"--vocab-size {size}: must be")
    refused(prepare(*bpe, 300, good), "pip install tokenizers")
    refused(prepare(*chars), "no text: name a FILE, or a --dataset")
    refused(prepare(*chars, good, "--processes", 0), "--processes 0: must be 1 or more")
    assert not out.exists()
    refused(prepare("--tokenizer", "bytes", "--out", good, good), "cannot be written")
    refused(prepare("--tokenizer", "bytes", "--out", good / "below", good), "cannot be written")


def test_chars_has_room_for_65535(prepare, tmp_path):
    scalars = [chr(i) for i in range(0x10000 + 4096) if not 0xD800 <= i < 0xE000]
    most = write(tmp_path / "most", "".join(scalars[:65535]))
    out = tmp_path / "out"
    prepared(prepare("--tokenizer", "chars", "--out", out, "--val-tail", most))
    tokens = read_shards(out, "train")[0] + read_shards(out, "val")[0]
    assert tokens == [65535] + list(range(65535))
    assert len(read_tokenizer(out)) == 65536
    more = write(tmp_path / "more", "".join(scalars[:65536]))
    refused(prepare("--tokenizer", "chars", "--out", tmp_path / "no", more), "65,536 distinct characters")
    assert not (tmp_path / "no").exists()


def test_gpt2_without_tiktoken(prepare, tmp_path):
    refused(prepare("--tokenizer", "gpt2", "--out", tmp_path / "out", write(tmp_path / "a", SAMPLE)),
            "pip install tiktoken")


def test_gpt2(prepare, tmp_path, gpt2_bpe):
    out = tmp_path / "out"
    prepared(prepare("--tokenizer", "gpt2", "--out", out, "--val-tail", write(tmp_path / "a", SAMPLE), bare=False))
    vocabulary = read_tokenizer(out)
    assert vocabulary[:50256] == [gpt2_bpe.decode_single_token_bytes(i) for i in range(50256)]
    cut = int(len(SAMPLE) * 0.9)
    train = read_shards(out, "train")[0]
    assert train == [50256] + gpt2_bpe.encode_ordinary(SAMPLE[:cut])
    assert 50256 not in train[1:]  # <|endoftext|> in a text is text
    assert decode(out, "train") == [b"", SAMPLE[:cut].encode()]
    assert decode(out, "val") == [SAMPLE[cut:].encode()]


def test_tokenizer_file_says_how_to_encode(prepare, tmp_path, gpt2_bpe):
    """Its tokens and its appendix are all that train_gpt2 knows about a vocabulary of byte-level BPE."""
    r = random.Random(1)
    characters = [chr(c) for c in r.sample([*range(0xD800), *range(0xE000, 0x110000)], 20_000)]
    near = [chr(c) for c in range(0x3000)]
    text = SAMPLE + "".join(characters) + "".join(r.choice([r.choice(near), " ", "'", "s", "7", "\n", "e"])
                                                  for _ in range(20_000))
    out = tmp_path / "out"
    prepared(prepare("--tokenizer", "gpt2", "--out", out, "--val-fraction", 0, write(tmp_path / "a", text), bare=False))
    assert encode_by_file(out, text) == read_shards(out, "train")[0][1:] == gpt2_bpe.encode_ordinary(text)


def test_gpt2_long_text(prepare, tmp_path, test_data, gpt2_bpe):
    """Long texts are cut into pieces for threads, which must not show in the tokens."""
    novels = [path.read_bytes().decode()
              for path in sorted((test_data / "novels" / "val").iterdir())]
    white = "".join(f"{'x' * 65530}{' ' * i}{chr(10) * j}\t {chr(0x85)}\n y" for i in range(4) for j in range(4))
    text = "".join(novels) + white
    out = tmp_path / "out"
    write(tmp_path / "a", text)
    prepared(prepare("--tokenizer", "gpt2", "--out", out, tmp_path / "a", "--val-fraction", "0", bare=False))
    assert read_shards(out, "train")[0] == [50256] + gpt2_bpe.encode_ordinary(text)


def test_gpt2_on_white_space(prepare, tmp_path, gpt2_bpe):
    """tiktoken alone fails on the first text; it is cut before the last space."""
    spaces = write(tmp_path / "a", "x" + " " * 1_000_000 + "y")
    prepared(prepare("--tokenizer", "gpt2", "--val-fraction", 0, "--out", tmp_path / "spaces", spaces, bare=False))
    expected = gpt2_bpe.encode_ordinary("x" + " " * 999_999) + gpt2_bpe.encode_ordinary(" y")
    assert read_shards(tmp_path / "spaces", "train")[0] == [50256] + expected
    r = random.Random(2)
    text = "".join(r.choice(" \n\t\r\x1c\u2003") * r.choice([1, 2, 70_000]) + r.choice(["", "a", "7", "!"])
                   for _ in range(60))
    prepared(prepare("--tokenizer", "gpt2", "--val-fraction", 0, "--out", tmp_path / "all",
                     write(tmp_path / "b", text), bare=False))
    assert read_shards(tmp_path / "all", "train")[0] == [50256] + gpt2_bpe.encode_ordinary(text)


def test_tinyshakespeare(prepare, tmp_path, test_data, gpt2_bpe):
    """With --val-tail, nanoGPT's split: its counts of tokens, and the <|endoftext|> in front."""
    for tokenizer, train, val in ("chars", 1003854, 111540), ("gpt2", 301966, 36059):
        out = tmp_path / tokenizer
        text = test_data / "tinyshakespeare.txt"
        prepared(prepare("--tokenizer", tokenizer, "--out", out, "--val-tail", text, bare=False))
        assert read_shards(out, "train")[1] == [train + 1]
        assert read_shards(out, "val")[1] == [val]
        assert b"".join(decode(out, "train") + decode(out, "val")) == text.read_bytes()


def test_a_pipe_is_refused(prepare, tmp_path):
    os.mkfifo(tmp_path / "pipe")
    refused(prepare("--tokenizer", "bytes", "--out", tmp_path / "data", tmp_path / "pipe"), "not a regular file")


def test_an_abbreviated_option_is_refused(prepare, tmp_path):
    refused(prepare("--tok", "bytes", "--out", tmp_path / "data", __file__), "--tokenizer")


def test_says_one_token(prepare, tmp_path):
    said = prepared(prepare("--tokenizer", "bytes", "--out", tmp_path / "out", "--shard-tokens", 1,
                            write(tmp_path / "a", "12")))
    assert said.count("bin: 1 token\n") == 4


# ----------------------------------------------------------------------------------------------------------------------
# The tokenizer of an existing file


@pytest.fixture
def vocabulary(tmp_path):
    """Writes a tokenizer file."""

    def write_vocabulary(tokens, end_of_text=-1, **named):
        path = tmp_path / "vocabulary"
        write_tokenizer(path, tokens, end_of_text, **named)
        return path

    return write_vocabulary


def test_bytes_of_a_file(prepare, tmp_path, vocabulary):
    text = write(tmp_path / "a", bytes(range(256)) * 20)
    prepared(prepare("--tokenizer", "bytes", "--out", tmp_path / "bytes", text))
    prepared(prepare("--tokenizer", tmp_path / "bytes" / "tokenizer.bin", "--out", tmp_path / "file", text))
    assert contents(tmp_path / "file") == contents(tmp_path / "bytes")

    # In another order, and more than 256 tokens in front of them.
    tokens = [b"\xff"] * 300 + [bytes([i]) for i in reversed(range(256))]
    file = vocabulary(tokens)
    prepared(prepare("--tokenizer", file, "--out", tmp_path / "other", text, "--val-fraction", "0"))
    assert read_shard(tmp_path / "other" / "train_000.bin") == [0 if i == 255 else 300 + 255 - i
                                                                for i in text.read_bytes()]
    assert (tmp_path / "other" / "tokenizer.bin").read_bytes() == file.read_bytes()


def test_characters_of_a_file(prepare, tmp_path):
    """Also where the file is in --out itself, and the run's own."""
    out, a, b = tmp_path / "out", write(tmp_path / "a", SAMPLE), write(tmp_path / "b", "東京🙂 naïve\n" * 10)
    prepared(prepare("--tokenizer", "chars", "--out", out, a))
    before = (out / "tokenizer.bin").read_bytes()
    refused(prepare("--tokenizer", out / "tokenizer.bin", "--out", out, b), "exists")
    prepared(prepare("--tokenizer", out / "tokenizer.bin", "--out", out, b, "--overwrite", "--val-fraction", 0))
    assert (out / "tokenizer.bin").read_bytes() == before
    assert decode(out, "train") == [b"", b.read_bytes()]
    prepared(prepare("--tokenizer", out / "tokenizer.bin", "--out", tmp_path / "ab", a, "--val", b))
    assert (decode(tmp_path / "ab", "train"), decode(tmp_path / "ab", "val")) == ([b"", a.read_bytes()],
                                                                                  [b"", b.read_bytes()])


def test_unknown_characters_are_named(prepare, tmp_path, vocabulary):
    file, out = vocabulary([bytes([c]) for c in b"abc\n"] + ["é".encode(), EOT], 5), tmp_path / "out"

    def refuses(text, *words):
        refused(prepare("--tokenizer", file, "--out", out, write(tmp_path / "good", "abc"), "--val",
                        write(tmp_path / "text", text)), *words)
        assert not out.exists()

    refuses("abc\nébé東\n", "text: line 2, column 4: '東' (U+6771)", str(file))
    refuses("d", "line 1, column 1: 'd' (U+0064)")
    refuses("a\n\n\t", r"line 3, column 1: '\t' (U+0009)")
    refuses("ab\u202e", r"line 1, column 3: '\u202e' (U+202E)")
    refuses("ab<|endoftext|>", "column 3: '<' (U+003C)")  # those letters are no token
    refuses(b"abc\xe9", "not UTF-8 at byte 3")


def test_letters_of_end_of_text_are_text(prepare, tmp_path, vocabulary):
    """One letter may be that token, or none."""
    out, text = tmp_path / "out", write(tmp_path / "a", "abba")
    prepared(prepare("--tokenizer", vocabulary([b"b", b"a", b"b"], 0), "--out", out, text, "--val-fraction", 0))
    assert read_shard(out / "train_000.bin") == [0, 1, 2, 2, 1]
    for no_end_of_text in -1, 3, -7:
        file = vocabulary([b"b", b"a", b"b"], no_end_of_text)
        prepared(prepare("--tokenizer", file, "--out", out, text, "--val-fraction", 0, "--overwrite"))
        assert read_shard(out / "train_000.bin") == [1, 0, 0, 1]
        assert (out / "tokenizer.bin").read_bytes() == file.read_bytes()


def test_characters_without_a_token_are_bytes(prepare, tmp_path, vocabulary):
    file = vocabulary(["é".encode()] + [bytes([i]) for i in range(256)])
    text = write(tmp_path / "a", "xé東".encode() + b"\xff\xed\xa0\x80")
    prepared(prepare("--tokenizer", file, "--out", tmp_path / "out", text, "--val-fraction", 0))
    data = "東".encode() + b"\xff\xed\xa0\x80"
    assert read_shard(tmp_path / "out" / "train_000.bin") == [1 + ord("x"), 0] + [1 + i for i in data]


@pytest.mark.parametrize("version", [1, 2])
def test_gpt2_of_a_file(prepare, tmp_path, vocabulary, gpt2_bpe, version):
    """llm.c's, too. It is written with the appendix that encoding needs."""
    text, out = write(tmp_path / "a", SAMPLE), tmp_path / "out"
    prepared(prepare("--tokenizer", "gpt2", "--out", tmp_path / "gpt2", text, "--val-fraction", 0, bare=False))
    file = vocabulary(gpt2_bpe.decode_tokens_bytes(range(50257)), 50256 if version == 2 else 0, version=version)
    prepared(prepare("--tokenizer", file, "--out", out, text, "--val-fraction", 0, bare=False))
    assert contents(out) == contents(tmp_path / "gpt2")
    prepared(prepare("--tokenizer", out / "tokenizer.bin", "--out", out, text, "--val-fraction", 0, "--overwrite",
                     bare=False))
    assert contents(out) == contents(tmp_path / "gpt2")
    refused(prepare("--tokenizer", file, "--out", tmp_path / "bare", text), "pip install tiktoken")


def test_merges_of_a_file(prepare, tmp_path, vocabulary):
    """In any order, with bytes anywhere, without <|endoftext|>; but all bytes must be there."""
    pytest.importorskip("tiktoken")
    text, out = write(tmp_path / "a", "ababab ab abb\r\nba"), tmp_path / "out"
    tokens = [b"abab", b"\r\n", *(bytes([b]) for b in reversed(range(256))), b" a", b"ab", b"ab", b" ab"]
    prepared(prepare("--tokenizer", vocabulary(tokens), "--out", out, text, "--val-fraction", 0, bare=False))
    assert [tokens[token] for token in read_shard(out / "train_000.bin")] == [
        b"abab", b"ab", b" ab",  # a word that is a token is not merged
        b" ab", b"b", b"\r", b"\n", b"b", b"a"]
    file = vocabulary(tokens[:2] + tokens[3:])
    refused(prepare("--tokenizer", file, "--out", tmp_path / "no", text, bare=False), str(file), "nor all bytes and")


def test_damaged_tokenizers(prepare, tmp_path, vocabulary):
    file, text, out = vocabulary(BYTES_AND_END_OF_TEXT, 256), write(tmp_path / "a", "text" * 10), tmp_path / "out"
    good = file.read_bytes()

    def refuses(data, *words):
        refused(prepare("--tokenizer", write(file, data), "--out", out, text), str(file), *words)
        assert not out.exists()

    for length in 0, 1, 4, 1023:
        refuses(good[:length])
    for length in 1024, 1025, len(good) - 1:
        refuses(good[:length], "damaged", "257 tokens")
    refuses(good + b"x", "damaged")
    refuses(text.read_bytes() * 100, "not a tokenizer")
    refuses(changed(good, 0, "<i", 20240520), "not a tokenizer")
    for version in 0, 3, -1:
        refuses(changed(good, 4, "<i", version), "not a tokenizer")
    for n in -1, 0, 1, 256, 258, 65536, 65537, 2**31 - 1, -2**31:
        refuses(changed(good, 8, "<i", n), "damaged")
    for appendix in 1, -1, 2**31 - 1, -2**31:
        refuses(changed(good, 16, "<i", appendix), "damaged")
    refuses(changed(good, 1024, "B", 0), "damaged", "0 tokens end at byte 1,024")
    refuses(header(20240328, 2, 65537, -1) + b"\1x" * 65537, "damaged")
    with open(file, "wb") as f:  # sparse
        f.write(good)
        f.truncate(1 << 40)
    refused(prepare("--tokenizer", file, "--out", out, text), "damaged")

    vocabulary(BYTES_AND_END_OF_TEXT, 256, appendix=b"merges")
    prepared(prepare("--tokenizer", file, "--out", out, text))
    assert (out / "tokenizer.bin").read_bytes() == file.read_bytes()
    vocabulary([b"a", b"text"])
    refused(prepare("--tokenizer", file, "--out", tmp_path / "no", text), "neither bytes, nor characters")


def test_a_tokenizer_is_a_regular_file(prepare, tmp_path):
    text = write(tmp_path / "a", "text" * 10)
    os.mkfifo(tmp_path / "pipe")
    for path, words in ((tmp_path / "pipe", "not a regular file"), (tmp_path, "is a folder"),
                        ("/dev/zero", "not a regular file"), (text / "below", "must be bytes, chars, bpe, gpt2 or")):
        refused(prepare("--tokenizer", path, "--out", tmp_path / "out", text), str(path), words)
    if os.geteuid() != 0:
        text.chmod(0)
        refused(prepare("--tokenizer", text, "--out", tmp_path / "out", text), "Permission denied")


# ----------------------------------------------------------------------------------------------------------------------
# The validation set


def lines_of(n, length, paragraph=0):
    """Numbered lines of a file, 32 bytes each; every so many of them, one is empty."""
    text = "".join(f"file {n:06} line {i:014}\n" + "\n" * (paragraph and i % paragraph == 0)
                   for i in range(length // 32 + 1))
    return text[:length].encode()


def share(folder):
    """The validation set's, without <|endoftext|>."""
    val, train = (sum(map(len, parts(folder, split))) for split in ("val", "train"))
    return val / (val + train)


def test_parts_of_one_file(prepare, tmp_path):
    """Long ones, from everywhere, from paragraph to paragraph; nothing is lost or twice."""
    data = lines_of(1, 400_000, paragraph=8)
    out = tmp_path / "out"
    said = prepared(prepare("--tokenizer", "bytes", "--out", out, write(tmp_path / "big.txt", data)))
    train, val = parts(out, "train"), parts(out, "val")
    assert len(train) == len(val) == 10
    assert b"".join(part for pair in zip(train, val) for part in pair) == data
    edges = list(itertools.accumulate(len(part) for pair in zip(train, val) for part in pair))
    paragraph = 8 * 32 + 1  # the nearest beginning is no farther away than half of one
    assert all(abs(edge - at) <= paragraph / 2 for edge, at in zip(edges[::2], range(36_000, 400_000, 40_000)))
    assert all(abs(edge - at) <= paragraph / 2 for edge, at in zip(edges[1::2], range(40_000, 400_001, 40_000)))
    assert all(part.endswith(b"\n\n") for part in (train + val)[:-1])
    assert abs(share(out) - 0.1) < 0.005
    check_manifest(out)
    assert f"validation: 10 parts of {tmp_path / 'big.txt'}, {100 * share(out):.1f} % of the text, " in said


@pytest.mark.parametrize("tokenizer", ["bytes", "chars"])
@pytest.mark.parametrize("text", ["é東🙂" * 9001, "word " * 6000, "words of a line\n" * 2000],
                         ids=["none", "words", "lines"])
def test_parts_begin_with_whole_words(prepare, tmp_path, text, tokenizer):
    """Or with whole characters, if there are no words."""
    out = tmp_path / "out"
    prepared(prepare("--tokenizer", tokenizer, "--out", out, write(tmp_path / "a", text)))
    train, val = parts(out, "train"), parts(out, "val")
    assert len(val) >= 5
    assert b"".join(part for pair in zip(train, val) for part in pair) == text.encode()
    for part in train + val:
        part.decode()
        assert tokenizer == "chars" or len(set(text)) == 3 or part.endswith((b" ", b"\n"))


@pytest.mark.parametrize("fraction", [0.01, 0.1, 0.5, 0.9])
@pytest.mark.parametrize("sizes", [[600_000], [300_000, 300_000], [500_000] + [3000] * 30, [3000] * 100,
                                   [1000 + 50 * i for i in range(100)], [2**(i % 8 + 8) for i in range(200)],
                                   [200_000, 1, 2, 3, 150_000], [60_000] * 4 + [2000] * 120],
                         ids=["one", "two", "huge", "equal", "growing", "mixed", "odd", "half"])
def test_share_is_near_what_was_asked(prepare, tmp_path, sizes, fraction):
    texts = [lines_of(i, size) for i, size in enumerate(sizes)]
    files = [write(tmp_path / f"{i:03}", text) for i, text in enumerate(texts)]
    out = tmp_path / "out"
    prepared(prepare("--tokenizer", "bytes", "--out", out, *files, "--val-fraction", fraction))
    assert abs(share(out) - fraction) <= 0.4 * min(fraction, 1 - fraction)
    pieces = parts(out, "train") + parts(out, "val")
    begins = [(i, text.index(piece)) for piece in pieces for i, text in enumerate(texts) if piece in text]
    if len(begins) == len(pieces):  # none is so short that it is in two texts
        assert b"".join(piece for _, piece in sorted(zip(begins, pieces))) == b"".join(texts)
    assert sum(map(len, pieces)) == sum(sizes)


def test_some_files_whole(prepare, tmp_path):
    """They are neither the last ones nor of one size."""
    r = random.Random(1)
    for order in "random", "growing", "shrinking":
        sizes = [int(1000 * 2**r.uniform(0, 6)) for _ in range(60)]
        sizes = {"random": sizes, "growing": sorted(sizes), "shrinking": sorted(sizes)[::-1]}[order]
        texts = [lines_of(i, size) for i, size in enumerate(sizes)]
        files = [write(tmp_path / f"{i:03}", text) for i, text in enumerate(texts)]
        arguments = "--tokenizer", "bytes", "--out", tmp_path / "out", "--overwrite", *files
        said = prepared(prepare(*arguments))
        before = contents(tmp_path / "out")
        prepared(prepare(*arguments))
        assert contents(tmp_path / "out") == before
        taken = [texts.index(part) for part in parts(tmp_path / "out", "val")]
        assert parts(tmp_path / "out", "train") == [text for i, text in enumerate(texts) if i not in taken]
        assert f"validation: {len(taken)} documents, {100 * share(tmp_path / 'out'):.1f} % of the text" in said
        assert abs(share(tmp_path / "out") - 0.1) < 0.03
        assert {i // 20 for i in taken} == {0, 1, 2}
        assert len({sizes[i].bit_length() for i in taken}) >= 4


def test_large_and_small_files_are_taken_alike(prepare, tmp_path):
    texts = [lines_of(i, 9000 if i % 2 else 2000) for i in range(40)]
    prepared(prepare("--tokenizer", "bytes", "--out", tmp_path / "out",
                     *(write(tmp_path / f"{i:03}", text) for i, text in enumerate(texts))))
    assert sorted(map(len, parts(tmp_path / "out", "val"))) == [2000, 2000, 9000, 9000]


@pytest.mark.parametrize("n", [2, 3, 5, 7, 8, 10, 12, 14, 15, 20, 31])
def test_files_of_one_size(prepare, tmp_path, n):
    texts = [lines_of(i, 20_000) for i in range(n)]
    out = tmp_path / "out"
    prepared(prepare("--tokenizer", "bytes", "--out", out,
                     *(write(tmp_path / f"{i:03}", text) for i, text in enumerate(texts))))
    assert 0.06 < share(out) < 0.14
    val = parts(out, "val")
    if n < 8:  # a whole one would be too much
        assert all(any(part in text for part in val) for text in texts)
    else:
        assert set(val) < set(texts) and val != texts[-len(val):]


def test_one_large_file_among_small_ones(prepare, tmp_path):
    sizes = [2000] * 20 + [400_000] + [2000] * 20
    texts = [lines_of(i, size) for i, size in enumerate(sizes)]
    out = tmp_path / "out"
    said = prepared(prepare("--tokenizer", "bytes", "--out", out,
                            *(write(tmp_path / f"{i:03}", text) for i, text in enumerate(texts))))
    val = parts(out, "val")
    whole = [part for part in val if part in texts]
    assert len(whole) == 4 and len(val) == 14 and texts[20] not in whole
    assert f"validation: 4 documents and 10 parts of {tmp_path / '020'}, " in said


@pytest.mark.parametrize("size", [2, 3, 10, 100, 1000, 5120, 20_000, 50_000])
def test_small_texts(prepare, tmp_path, size):
    out, data = tmp_path / "out", lines_of(0, size)
    said = prepared(prepare("--tokenizer", "bytes", "--out", out, write(tmp_path / "a", data)))
    train, val = parts(out, "train"), parts(out, "val")
    assert b"".join(part for pair in zip(train, val) for part in pair) == data
    assert len(val) == max(1, size // 10 // 512)
    assert f"validation: {len(val)} part{'s' * (len(val) > 1)} of" in said
    assert size < 100 or 0.08 < share(out) < 0.12


def test_tail_of_several_files(prepare, tmp_path):
    texts = [lines_of(i, 1000) for i in range(3)]
    out = tmp_path / "out"
    prepared(prepare("--tokenizer", "bytes", "--out", out, "--val-tail", "--val-fraction", 0.5,
                     *(write(tmp_path / str(i), text) for i, text in enumerate(texts))))
    assert decode(out, "train") == [b"", texts[0], texts[1][:500]]
    assert decode(out, "val") == [texts[1][500:], texts[2]]


# ----------------------------------------------------------------------------------------------------------------------
# Full disks, signals, other runs, files that change


def test_full_disk(root, prepare, tmp_path):
    """A limit on the size of files stands for one."""
    def limit(most):
        def before():
            heed_signals()
            signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
            resource.setrlimit(resource.RLIMIT_FSIZE, (most, most))
        return before

    out, text = tmp_path / "out", write(tmp_path / "a", "some text " * 1000)
    arguments = "--tokenizer", "bytes", "--out", out
    for former in None, "former text" * 10:
        if former:
            prepared(prepare(*arguments, write(tmp_path / "b", former)))
        before = contents(out) if out.exists() else {}
        for most, name in (0, "train_000.bin"), (1000, "train_000.bin"), (15_000, "train_000.bin"):
            refused(prepare(*arguments, text, "--overwrite", before=limit(most)),
                    f"{out / name} could not be written: File too large; nothing was changed in {out}")
            assert contents(out) == before if former else not out.exists()
        refused(prepare(*arguments, write(tmp_path / "c", "ab"), "--overwrite", before=limit(1100)), "tokenizer.bin")
        assert contents(out) == before if former else not out.exists()
    refused(prepare(*arguments, "-", "--overwrite", before=limit(1000), stdin=b"some text" * 1000),
            f"standard input could not be copied into {out}: File too large")
    copy = tmp_path / "copy"  # of the scripts, of which Python has cached nothing
    shutil.copytree(root / "data_prep", copy / "data_prep", ignore=shutil.ignore_patterns("__pycache__"))
    refused(run(copy, *arguments, text, "--overwrite", before=limit(1000)), "train_000.bin could not be written")
    prepared(run(copy, *arguments, text, "--overwrite"))


def test_full_standard_output(prepare, tmp_path):
    out, text = tmp_path / "out", write(tmp_path / "a", "some text " * 1000)
    arguments = "--tokenizer", "bytes", "--out", out, "--overwrite", text
    with open("/dev/full", "w") as full:
        result = prepare(*arguments, stdout=full)
    assert (result.returncode, result.stderr) == (
        1, f"error: standard output: No space left on device; all files in {out} are written\n")
    check_manifest(out)
    result = prepare(*arguments, before=lambda: os.close(1))
    assert (result.returncode, result.stderr) == (0, "")


@pytest.fixture
def two_runs(prepare, tmp_path):
    """The arguments of a run over another one's files, and what both write."""
    runs = {}
    for name, size in ("old", 5000), ("new", 9000):
        arguments = ["--tokenizer", "chars", "--shard-tokens", 2000, write(tmp_path / f"{name}.txt",
                                                                            name + " text\n" * (size // 10))]
        prepared(prepare(*arguments, "--out", tmp_path / name))
        check_manifest(tmp_path / name)
        runs[name] = arguments, contents(tmp_path / name)
    assert len(runs["old"][1]) != len(runs["new"][1])
    return runs


def test_killed_at_any_instant(prepare, tmp_path, two_runs):
    """The folder has all old files, or all new ones, or a manifest that says so."""
    states = []
    for instant in itertools.count(1):
        out = tmp_path / f"out{instant}"
        shutil.copytree(tmp_path / "old", out)
        arguments = *two_runs["new"][0], "--out", out, "--overwrite"
        result = prepare(*arguments, code="os.kill(os.getpid(), signal.SIGKILL)", instant=instant)
        if result.returncode == 0:
            break
        assert result.returncode == -signal.SIGKILL
        found = contents_of_files(out)
        if found["gpt2x3_manifest.txt"] == b"incomplete\n":
            states.append("incomplete")
        else:
            states.append("new" if found == two_runs["new"][1] else "old")
            assert found == two_runs[states[-1]][1]
        prepared(prepare(*arguments))
        assert contents(out) == two_runs["new"][1]  # without the killed run's hidden folder
    assert [state for state, _ in itertools.groupby(states)] == ["old", "incomplete", "new"]


@pytest.mark.parametrize("by", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP], ids=lambda s: s.name)
def test_stopped_at_any_instant(prepare, tmp_path, two_runs, by):
    """Nothing is left half done, and what is said is true."""
    states = []
    for instant in itertools.count(1):
        out = tmp_path / f"out{instant}"
        shutil.copytree(tmp_path / "old", out)
        result = prepare(*two_runs["new"][0], "--out", out, "--overwrite", code=f"os.kill(os.getpid(), {int(by)})",
                         instant=instant)
        if result.returncode == 0:
            break
        word = "interrupted" if by == signal.SIGINT else "terminated"
        states.append("old" if "nothing was written" in result.stderr else "new")
        refused(result, f"{word}; " + ("nothing was written" if states[-1] == "old" else
                                       f"all files in {out} are written"))
        assert contents_of_files(out) == two_runs[states[-1]][1]
    assert [state for state, _ in itertools.groupby(states)] == ["old", "new"]


def test_sigterm_leaves_nothing(root, tmp_path):
    (tmp_path / "text").write_bytes(b"some text " * 20_000_000)
    arguments = command(root, "--tokenizer", "bytes", "--out", tmp_path / "data", tmp_path / "text")
    with subprocess.Popen(arguments, stderr=subprocess.PIPE, text=True, preexec_fn=heed_signals) as process:
        wait_until(lambda: list(tmp_path.glob("data/.prepare-*/*")), process)
        process.terminate()
        assert process.wait() == 1 and "terminated; nothing was written" in process.stderr.read()
    assert not (tmp_path / "data").exists()


def test_ignored_signals_stay_ignored(prepare, tmp_path):
    """As under nohup, or in the background."""
    result = prepare("--tokenizer", "bytes", "--out", tmp_path / "out", write(tmp_path / "a", "text" * 10), instant=3,
                     before=lambda: [signal.signal(s, signal.SIG_IGN) for s in (signal.SIGHUP, signal.SIGINT)],
                     code="os.kill(os.getpid(), signal.SIGHUP), os.kill(os.getpid(), signal.SIGINT)")
    prepared(result)


def test_files_that_cannot_be_replaced(prepare, tmp_path):
    """It says that the folder is incomplete, if it is."""
    out = tmp_path / "out"
    arguments = "--tokenizer", "bytes", "--out", out, write(tmp_path / "a", "text" * 10), "--overwrite"
    prepared(prepare(*arguments))
    said = set()
    for instant in range(1, 20):
        result = prepare(*arguments, code="raise OSError(5, 'Input/output error', 'some file')", instant=instant)
        if result.returncode:
            refused(result, "Input/output error")
            incomplete = f"{out} is incomplete; run again with --overwrite" in result.stderr
            assert incomplete == ((out / "gpt2x3_manifest.txt").read_text() == "incomplete\n")
            said.add(incomplete)
    assert said == {False, True}


def test_second_run_at_the_same_time_is_refused(root, prepare, tmp_path, two_runs):
    out = tmp_path / "out"
    first = command(root, *two_runs["new"][0], "--out", out, code="os.kill(os.getpid(), signal.SIGSTOP)", instant=3)
    with subprocess.Popen(first, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True) as process:
        try:
            wait_until(lambda: re.search(r"^State:\s+T", open(f"/proc/{process.pid}/status").read(), re.M), process)
            before = os.listdir(out)
            refused(prepare(*two_runs["old"][0], "--out", out), f"{out}: another process is writing there")
            assert os.listdir(out) == before and before[0].startswith(".prepare-")
        finally:
            process.send_signal(signal.SIGCONT)
        assert process.wait(60) == 0, process.stderr.read()
    assert contents(out) == two_runs["new"][1]


def test_run_that_ended_meanwhile_is_kept(prepare, root, tmp_path, two_runs):
    """Both began with an empty folder."""
    out = tmp_path / "out"
    other = command(root, *two_runs["old"][0], "--out", out)
    refused(prepare(*two_runs["new"][0], "--out", out, instant=1,
                    code=f"import subprocess; subprocess.run({other}, stdout=subprocess.DEVNULL)"), "exists")
    assert contents(out) == two_runs["old"][1]


def test_files_that_another_program_wrote_meanwhile_are_kept(prepare, tmp_path):
    out, text = tmp_path / "out", write(tmp_path / "a", SAMPLE)
    refused(prepare("--tokenizer", "bytes", "--out", out, text, instant=4,
                    code=f"open({str(out / 'train_000.bin')!r}, 'w').write('mine')"), "train_000.bin exists")
    assert contents(out) == {"train_000.bin": b"mine"}


CHANGES = {
    "longer": "open(text, 'a').write('more')",
    "shorter": "open(text, 'w').write('less')",
    "empty": "open(text, 'w')",
    "gone": "os.remove(text)",
    "folder": "os.remove(text); os.mkdir(text)",
    "pipe": "os.remove(text); os.mkfifo(text)",
    "characters": "open(text, 'w').write('#' * size)",
    "same characters": "open(text, 'w').write('ba' * (size // 2))",
    "not UTF-8": "open(text, 'wb').write(b'\\xff' * size)",
    "same time": "t = os.stat(text); open(text, 'w').write('ba' * (size // 2)); "
                 "os.utime(text, ns=(t.st_atime_ns, t.st_mtime_ns))",
}


@pytest.mark.parametrize("tokenizer", ["bytes", "chars", "FILE"])
@pytest.mark.parametrize("change", CHANGES)
def test_files_that_change_between_two_readings(prepare, tmp_path, vocabulary, change, tokenizer):
    out, text = tmp_path / "out", write(tmp_path / "a", "ab" * 5000)
    if tokenizer == "FILE":
        tokenizer = vocabulary([b"a", b"b"])
    result = prepare("--tokenizer", tokenizer, "--out", out, text, instant=1,
                     code=f"text, size = {str(text)!r}, 10000; {CHANGES[change]}")
    refused(result, f"{text}: ")
    assert not out.exists()


def test_files_written_anew_have_not_changed(prepare, tmp_path):
    out, text = tmp_path / "out", write(tmp_path / "a", "ab" * 5000)
    prepared(prepare("--tokenizer", "chars", "--out", out, text, instant=1,
                     code=f"os.remove({str(text)!r}); open({str(text)!r}, 'w').write('ab' * 5000)"))


# ----------------------------------------------------------------------------------------------------------------------
# What else data_prep and dev write


def test_make_run_refuses_too_little_text_before_it_replaces_anything(root, tmp_path):
    """make does not build the program here, and leaves out what it would try the compiler for."""
    own = tmp_path / "data/own"
    prepared(subprocess.run(command(root, "--tokenizer", "bytes", "--out", own, write(tmp_path / "old", SAMPLE)),
                            capture_output=True, text=True))
    before = contents(own)
    write(tmp_path / "two words", "too little text. " * 40)
    done = subprocess.run(["make", "-s", "-f", root / "Makefile", "-o", "train_gpt2", "OPENMP=", "ARCH=", "run",
                           "TEXT='two words'"], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode and "error: TEXT needs 2,000 bytes or more" in done.stderr
    assert contents(own) == before


@pytest.mark.parametrize("documented", [True, False])
def test_demo_text_is_prose(root, tmp_path, documented):
    if not documented:  # a package that hides Python's own
        (tmp_path / "pydoc_data").mkdir()
        (tmp_path / "pydoc_data/__init__.py").touch()
    result = subprocess.run([sys.executable, root / "data_prep/demo_text.py"], capture_output=True, text=True,
                            env=dict(os.environ, PYTHONPATH=str(tmp_path)))
    text = prepared(result)
    assert len(text) > (100_000 if documented else 25_000)
    assert ("NameError" in text) == documented
    assert all(line[0].isupper() and line[-1] in ".:" for line in text.splitlines())


def test_picture_is_what_its_script_draws(root):
    drawn = subprocess.run([sys.executable, root / "dev/attentions.py"], capture_output=True, text=True, check=True)
    assert drawn.stdout == (root / "dev/attentions.svg").read_text(encoding="utf-8")
