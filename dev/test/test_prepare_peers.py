"""What of prepare.py needs packages that `make test` does not install: run by `make -C dev test-peers`."""

import gzip
import json
import random
import re
import signal
import subprocess
import time
from collections import Counter

import pytest
from helpers import Program, contents, heed_signals, on_terminal, wait_until
from prepare_helpers import (EOT, SAMPLE, children, command, decode, encode_by_file, is_running, parts, prepared,
                             read_shards, read_tokenizer, refused, write)

pytest.importorskip("tokenizers", reason="needs Hugging Face's packages: make -C dev test-peers")


@pytest.fixture
def learn(prepare, tmp_path):
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


def test_bpe_encodes_by_its_file(learn, prepare, tmp_path):
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
    assert "fewer than --vocab-size 1,000: the training text has no more pairs to merge" in said
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


def test_bpe_does_not_depend_on_processes(learn, tmp_path):
    """Nor on whether its documents are many; a first reading is cut short then."""
    texts = made_up_text(400_000).split("b")
    lines = "".join(json.dumps({"text": text}, ensure_ascii=False) + "\n" for text in texts)
    a = write(tmp_path / "a.jsonl", lines)
    assert len(lines) > 2_000_000 and len(texts) > 1000
    for n in 1, 2, 3:
        said = prepared(learn(str(n), 500, "--processes", n, a))
        assert contents(tmp_path / str(n)) == contents(tmp_path / "1")
    documents = parts(tmp_path / "1", "train") + parts(tmp_path / "1", "val")
    assert sorted(documents) == sorted(text.encode() for text in texts if text)
    assert "500 tokens" in said


def test_interrupted_while_it_learns(root, tmp_path):
    """The process that learns would not heed it."""
    text = write(tmp_path / "a", made_up_text(3_000_000))
    with subprocess.Popen(command(root, "--tokenizer", "bpe", "--vocab-size", 60_000, "--out", tmp_path / "out", text,
                                  bare=False), stderr=subprocess.PIPE, text=True, preexec_fn=heed_signals) as process:
        wait_until(lambda: children(process), process)
        time.sleep(0.5)
        learner, = children(process)
        process.send_signal(signal.SIGINT)
        assert process.wait(60) == 1
        assert process.stderr.read() == "error: interrupted; nothing was written\n"
        assert not is_running(learner) and not (tmp_path / "out").exists()


# ----------------------------------------------------------------------------------------------------------------------
# Inputs


TEXTS = [*SAMPLE.split("\n"), "NUL \0 and \r\n", "\ufeff", *(f"document {i}" for i in range(600))]
DOCUMENTS = [text.encode() for text in TEXTS if text]


@pytest.fixture
def train(prepare, tmp_path):
    """The training documents, where none is for validation."""

    def run(*arguments):
        out = tmp_path / "out"
        prepared(prepare("--tokenizer", "bytes", "--out", out, "--overwrite", "--val-fraction", 0, *arguments,
                         bare=False))
        return parts(out, "train")

    return run


@pytest.fixture
def refuses(prepare, tmp_path):
    def check(*arguments, says=()):
        refused(prepare("--tokenizer", "bytes", "--out", tmp_path / "no", *arguments, bare=False), *says)
        assert not (tmp_path / "no").exists()

    return check


def test_zstandard(train, tmp_path):
    zstandard = pytest.importorskip("zstandard")
    text = SAMPLE.encode() * 500
    frames = [zstandard.compress(text[:10_000]), zstandard.compress(b""), zstandard.compress(text[10_000:])]
    assert train(write(tmp_path / "a.txt.zst", b"".join(frames))) == [text]
    lines = "".join(json.dumps({"text": text}) + "\n" for text in TEXTS).encode()
    assert train(write(tmp_path / "a.jsonl.zst", zstandard.compress(lines))) == DOCUMENTS
    wide = zstandard.ZstdCompressionParameters.from_level(3, window_log=31)  # as zstd --long=31 < FILE writes it
    compressor = zstandard.ZstdCompressor(compression_params=wide).compressobj()
    assert train(write(tmp_path / "b.zst", compressor.compress(text) + compressor.flush())) == [text]


def test_damaged_zstandard(refuses, tmp_path):
    zstandard = pytest.importorskip("zstandard")
    r, a = random.Random(1), tmp_path / "a.zst"
    good = zstandard.ZstdCompressor(write_checksum=True).compress(bytes(r.choices(range(97, 123), k=50_000)))
    for length in [1, 4, 5, 6, *range(7, len(good), 9001), len(good) - 4, len(good) - 1]:
        refuses(write(a, good[:length]), says=[f"{a}: damaged: it ends too early"])
    for bad in good[2:], good + b"more", b"plain text", good[:20_000] + b"\0" * 100 + good[20_100:]:
        refuses(write(a, bad), says=[f"{a}: damaged, or not .zst: "])


def write_parquet(path, texts, name="text", **named):
    pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    parquet.write_table(pyarrow.table({"id": list(range(len(texts))), name: texts}), path, **named)
    return path


def test_parquet(train, tmp_path):
    for named in {"row_group_size": 70}, {"compression": "zstd"}, {"use_dictionary": True, "data_page_size": 100}:
        assert train(write_parquet(tmp_path / "a.parquet", TEXTS, **named)) == DOCUMENTS
    assert train("--field", "body", write_parquet(tmp_path / "b.PARQUET", TEXTS, "body")) == DOCUMENTS
    gz = write(tmp_path / "c.parquet.gz", gzip.compress((tmp_path / "a.parquet").read_bytes()))
    assert train(gz) == DOCUMENTS


def test_bad_parquet(refuses, tmp_path):
    a = write_parquet(tmp_path / "a.parquet", TEXTS, "body")
    refuses(a, says=[f"{a}: has no field 'text'; --field takes one of its own: id, body"])
    refuses("--field", "id", a, says=[f"{a}, row 1: its 'id' is int, not a string"])
    write_parquet(a, ["a"] * 300 + [None])
    refuses(a, says=[f"{a}, row 301: its 'text' is null, not a string"])
    good = write_parquet(a, TEXTS, compression="gzip").read_bytes()
    damaged = good[:200] + b"x" * (len(good) - 400) + good[-200:]
    for bad in b"", b"text", b"PAR1" * 5, good[:-1], good[1:], good[:100], damaged:
        refuses(write(a, bad), says=[f"{a}: not Parquet, or damaged after row "])


@pytest.fixture
def data_set(tmp_path):
    folder = tmp_path / "data_set"
    folder.mkdir()
    for split in "train", "validation", "test":
        write(folder / f"{split}.jsonl", "".join(json.dumps({"body": f"{split} {text}"}) + "\n" for text in TEXTS))
    return folder


def test_data_sets(prepare, tmp_path, data_set, monkeypatch):
    pytest.importorskip("datasets")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_HOME", str(tmp_path / "home"))
    out, own = tmp_path / "out", write(tmp_path / "own", "of my own")
    arguments = "--tokenizer", "bytes", "--out", out, "--overwrite", "--field", "body", "--dataset", data_set
    texts = {split: [f"{split} {text}".encode() for text in TEXTS] for split in ("train", "validation")}
    for more, val in ([], texts["validation"]), (["--val", own], [b"of my own"]), (["--val-fraction", 0], []):
        prepared(prepare(*arguments, *more, bare=False))
        assert parts(out, "train") == texts["train"]
        assert (parts(out, "val") if val else []) == val
    prepared(prepare(*arguments, "--val-fraction", 0.3, bare=False))
    assert sorted(parts(out, "train") + parts(out, "val")) == sorted(texts["train"])


def test_bad_data_sets(refuses, tmp_path, data_set, monkeypatch):
    pytest.importorskip("datasets")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_HOME", str(tmp_path / "home"))
    refuses("--dataset", data_set, says=[f"{data_set}, train, row 1: has no field 'text'; --field takes", "body"])
    refuses("--dataset", "no/such-set", says=["--dataset no/such-set: "])
    refuses("--dataset", "a", "b", "c", says=["takes a name and a configuration"])
    refuses(write(tmp_path / "a", "text"), "--dataset", data_set, says=["FILEs and --dataset: give one or the other"])
    (data_set / "train.jsonl").unlink()
    refuses("--dataset", data_set, says=["no split of it is called train: "])


def test_progress_on_a_terminal(root, tmp_path):
    """Nowhere else: the other tests see that standard error is empty."""
    pytest.importorskip("tqdm")
    lines = write(tmp_path / "a.jsonl", "".join(json.dumps({"text": text * 10}) + "\n" for text in TEXTS * 30))
    arguments = command(root, "--tokenizer", "chars", "--out", tmp_path / "out", lines, bare=False)
    status, said = on_terminal(Program("/bin/sh"), ["-c", 'stty cols 80 rows 24; "$0" "$@"', *arguments])
    assert status == 0
    assert b"reading:   0%" in said and b"encoding:   0%" in said and b"B/s" in said
    assert said.rpartition(b"\r")[0].endswith(b"\r") or b"tokenizer.bin: a vocabulary" in said
