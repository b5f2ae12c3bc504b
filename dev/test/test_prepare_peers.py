"""What of prepare.py needs packages that `make test` does not install: run by `make -C dev test-peers`."""

import random
import re
from collections import Counter

import pytest
from helpers import contents
from test_prepare import (EOT, SAMPLE, command, decode, encode_by_file, prepare, prepared, read_shards,  # noqa: F401
                          read_tokenizer, refused, write)

pytest.importorskip("tokenizers", reason="needs Hugging Face's tokenizers: make -C dev test-peers")


@pytest.fixture
def learn(prepare, tmp_path):  # noqa: F811
    """Learns a vocabulary from files and writes it to a folder."""

    def run(out, size, *arguments):
        return prepare("--tokenizer", "bpe", "--vocab-size", size, "--out", tmp_path / out, *arguments, bare=False)

    return run


def made_up_text(words, seed=0):
    r = random.Random(seed)
    vocabulary = ["".join(r.choice("aábcdeé 東") for _ in range(r.randint(1, 9))) for _ in range(words // 20)]
    return " ".join(r.choice(vocabulary) for _ in range(words))


def test_bpe_merges_the_most_frequent_pair(learn, tmp_path):
    text = made_up_text(3000)
    prepared(learn("out", 400, "--val-fraction", 0, write(tmp_path / "a", text)))
    tokens = read_tokenizer(tmp_path / "out")
    assert tokens[:256] == [bytes([b]) for b in range(256)] and tokens[256:][-1] == EOT
    assert len(tokens) == len(set(tokens)) == 400
    words = Counter(tuple(bytes([b]) for b in word.encode()) for word in re.findall(r" ?[^ ]+| +(?= )| +", text))
    for token in tokens[256:-1]:
        pairs = Counter()
        for word, n in words.items():
            for pair in zip(word, word[1:]):
                pairs[pair] += n
        pair = next(pair for pair in pairs if pair[0] + pair[1] == token and pairs[pair] == max(pairs.values()))
        merged = Counter()
        for word, n in words.items():
            new = []
            for part in word:
                new[-1:] = [token] if new and (new[-1], part) == pair and new[-1] is not token else [*new[-1:], part]
            merged[tuple(new)] += n
        words = merged


def test_bpe_encodes_by_its_file(learn, prepare, tmp_path):  # noqa: F811
    text = SAMPLE + made_up_text(3000)
    a = write(tmp_path / "a", text)
    said = prepared(learn("out", 300, "--val-fraction", 0, a))
    assert "a vocabulary of 300 tokens" in said
    assert encode_by_file(tmp_path / "out", text) == read_shards(tmp_path / "out", "train")[0][1:]
    assert decode(tmp_path / "out", "train") == [b"", text.encode()]
    prepared(learn("again", 300, "--val-fraction", 0, a))
    assert contents(tmp_path / "again") == contents(tmp_path / "out")
    prepared(prepare("--tokenizer", tmp_path / "out/tokenizer.bin", "--out", tmp_path / "file", "--val-fraction", 0, a,
                     bare=False))
    assert contents(tmp_path / "file") == contents(tmp_path / "out")


def test_bpe_learns_from_training_text(learn, tmp_path):
    train, val = write(tmp_path / "train", "abcdefgh " * 50), write(tmp_path / "val", "xyz " * 1000)
    said = prepared(learn("out", 1000, train, "--val", val))
    merges = read_tokenizer(tmp_path / "out")[256:-1]
    assert b" abcdefgh" in merges and not any(b"x" in token for token in merges)
    assert f"fewer than --vocab-size 1,000: the training text has no more pairs to merge" in said
    assert f"a vocabulary of {257 + len(merges)} tokens" in said


def test_bpe_of_bytes_alone(learn, tmp_path):
    prepared(learn("out", 257, "--val-fraction", 0, write(tmp_path / "a", SAMPLE)))
    assert read_shards(tmp_path / "out", "train")[0] == [256, *SAMPLE.encode()]


def test_bpe_has_no_token_of_256_bytes(learn, tmp_path):
    """Their lengths are bytes."""
    text = ("x" * 600 + " ") * 20
    prepared(learn("out", 2000, "--val-fraction", 0, write(tmp_path / "a", text)))
    assert decode(tmp_path / "out", "train") == [b"", text.encode()]
    assert 100 < max(map(len, read_tokenizer(tmp_path / "out"))) < 256
