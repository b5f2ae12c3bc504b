"""data_prep/prepare.py: its files hold the text, and nothing but the text; what is wrong is said in one line."""

import os
import struct
import subprocess
import sys
import time
from array import array

import pytest

EOT = b"<|endoftext|>"
SAMPLE = "First line.\nSecond: naïve café, 東京, 🙂.\n\n\tend<|endoftext|> of\r\n  text   \n" * 20


@pytest.fixture
def prepare(root):
    """Runs prepare.py. -I -S hides all packages but the standard library's."""

    def run(*arguments, bare=True):
        command = [sys.executable, *(["-I", "-S"] if bare else []), root / "data_prep/prepare.py", *arguments]
        return subprocess.run(list(map(str, command)), capture_output=True, text=True)

    return run


def prepared(result):
    assert result.returncode == 0, result.stderr
    assert result.stderr == ""
    return result.stdout


def refused(result, *words):
    assert result.returncode == 1
    assert result.stdout == ""
    assert result.stderr.startswith("error: ") and result.stderr.count("\n") == 1, result.stderr
    for word in words:
        assert word in result.stderr


def read_shards(folder, split):
    """The tokens of all shards of a split, and how many each shard has."""
    tokens, counts = array("H"), []
    for path in sorted(folder.glob(f"{split}_*.bin")):
        assert path.name == f"{split}_{len(counts):03d}.bin"
        data = path.read_bytes()
        header = struct.unpack("<256i", data[:1024])
        assert header[:2] == (20240520, 1) and not any(header[3:])
        assert len(data) == 1024 + 2 * header[2]
        tokens.frombytes(data[1024:])
        counts.append(header[2])
    return list(tokens), counts


def read_tokenizer(folder):
    """The bytes of every token."""
    data = (folder / "tokenizer.bin").read_bytes()
    header = struct.unpack("<256i", data[:1024])
    n, end_of_text = header[2:4]
    assert header[:2] == (20240328, 2) and not any(header[4:])
    tokens, at = [], 1024
    for _ in range(n):
        tokens.append(data[at + 1:at + 1 + data[at]])
        at += 1 + data[at]
    assert at == len(data)
    assert end_of_text == n - 1 and tokens[end_of_text] == EOT
    return tokens


def decode(folder, split):
    """The documents of a split. What stands before the first <|endoftext|> comes first, and is b'' as a rule."""
    vocabulary = read_tokenizer(folder)
    documents = [[]]
    for token in read_shards(folder, split)[0]:
        if token == len(vocabulary) - 1:
            documents.append([])
        else:
            documents[-1].append(vocabulary[token])
    return [b"".join(tokens) for tokens in documents]


def write(path, text):
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


def test_bytes(prepare, tmp_path):
    data = bytes(range(256)) * 4 + SAMPLE.encode()
    out = tmp_path / "new" / "folder"
    said = prepared(prepare("--tokenizer", "bytes", "--out", out, write(tmp_path / "a", data)))
    assert read_tokenizer(out) == [bytes([i]) for i in range(256)] + [EOT]
    cut = int(len(data) * 0.9)
    assert read_shards(out, "train") == ([256] + list(data[:cut]), [cut + 1])
    assert read_shards(out, "val") == (list(data[cut:]), [len(data) - cut])
    assert f"train_000.bin: {cut + 1:,} tokens" in said and "257 tokens" in said
    assert sorted(os.listdir(out)) == ["tokenizer.bin", "train_000.bin", "val_000.bin"]


def test_chars(prepare, tmp_path):
    out = tmp_path / "out"
    prepared(prepare("--tokenizer", "chars", "--out", out, write(tmp_path / "a", SAMPLE)))
    alphabet = sorted(set(SAMPLE))
    assert read_tokenizer(out) == [c.encode() for c in alphabet] + [EOT]
    cut = int(len(SAMPLE) * 0.9)
    assert read_shards(out, "train")[0] == [len(alphabet)] + [alphabet.index(c) for c in SAMPLE[:cut]]
    assert read_shards(out, "val")[0] == [alphabet.index(c) for c in SAMPLE[cut:]]


def test_files_are_documents(prepare, tmp_path):
    files = [write(tmp_path / f"{i} x", f"text {i} " * 10) for i in range(10)]  # names with spaces
    out = tmp_path / "out"
    prepared(prepare("--tokenizer", "chars", "--out", out, *files, "--val-fraction", "0.15"))
    texts = [f.read_bytes() for f in files]
    half = len(texts[0]) // 2
    assert decode(out, "train") == [b""] + texts[:8] + [texts[8][:half]]
    assert decode(out, "val") == [texts[8][half:]] + texts[9:]

    said = prepared(prepare("--tokenizer", "chars", "--out", out, write(tmp_path / "none", ""), *files[3:],
                            "--val", *files[:3], "--overwrite"))
    assert "none is empty" in said
    assert decode(out, "train") == [b""] + texts[3:]
    assert decode(out, "val") == [b""] + texts[:3]

    prepared(prepare("--tokenizer", "chars", "--out", out, *files, "--val-fraction", "0", "--overwrite"))
    assert decode(out, "train") == [b""] + texts
    assert read_shards(out, "val") == ([], [])


@pytest.mark.parametrize("tokens", [1, 7, 450, 451, 452])
def test_shards(prepare, tmp_path, tokens):
    out = tmp_path / "out"
    prepared(prepare("--tokenizer", "bytes", "--out", out, "--shard-tokens", tokens, write(tmp_path / "a", b"x" * 500)))
    values, counts = read_shards(out, "train")
    assert values == [256] + [ord("x")] * 450
    assert all(n == tokens for n in counts[:-1]) and 1 <= counts[-1] <= tokens


def test_keeps_former_run(prepare, tmp_path):
    a, b = write(tmp_path / "a", "a" * 500), write(tmp_path / "b", "b" * 100)
    out = tmp_path / "out"
    arguments = "--tokenizer", "bytes", "--out", out, "--shard-tokens", 100
    prepared(prepare(*arguments, a))
    write(out / "train_other.bin", "would be read as a shard, too")
    write(out / "notes", "stay")
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    refused(prepare(*arguments, b), "tokenizer.bin", "--overwrite")
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before
    refused(prepare(*arguments, tmp_path / "missing", "--overwrite"), "missing: No such file")
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before
    prepared(prepare(*arguments, b, "--overwrite"))
    assert decode(out, "train")[1] == b"b" * 90
    assert sorted(os.listdir(out)) == ["notes", "tokenizer.bin", "train_000.bin", "val_000.bin"]


def test_refuses(prepare, tmp_path):
    good = write(tmp_path / "good", "good text, " * 10)
    out = tmp_path / "out"
    chars = "--tokenizer", "chars", "--out", out
    refused(prepare(*chars, tmp_path / "missing"), "missing: No such file")
    refused(prepare(*chars, tmp_path), "Is a directory")
    refused(prepare(*chars, good, write(tmp_path / "latin", b"12345 caf\xe9")), "latin: not UTF-8 at byte 9")
    refused(prepare(*chars, write(tmp_path / "empty", "")), "no text", "0 bytes")
    refused(prepare(*chars, good, "--val", tmp_path / "empty"), "validation")
    refused(prepare(*chars, good, "--val", good), "both")
    refused(prepare(*chars, good, "--val-fraction", "1"), "--val-fraction")
    refused(prepare(*chars, good, "--val-fraction", "nan"), "--val-fraction")
    refused(prepare(*chars, good, "--shard-tokens", "0"), "--shard-tokens")
    refused(prepare(*chars, good, "--shard-tokens", 2**30), "2 GiB")
    refused(prepare("--tokenizer", "words", "--out", out, good), "words")
    refused(prepare("--out", out, good), "--tokenizer")
    assert not out.exists()
    refused(prepare("--tokenizer", "bytes", "--out", good, good), "cannot be written")
    refused(prepare("--tokenizer", "bytes", "--out", good / "below", good), "cannot be written")


def test_chars_has_room_for_65535(prepare, tmp_path):
    scalars = [chr(i) for i in range(0x10000 + 4096) if not 0xD800 <= i < 0xE000]
    most = write(tmp_path / "most", "".join(scalars[:65535]))
    out = tmp_path / "out"
    prepared(prepare("--tokenizer", "chars", "--out", out, most))
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
    prepared(prepare("--tokenizer", "gpt2", "--out", out, write(tmp_path / "a", SAMPLE), bare=False))
    vocabulary = read_tokenizer(out)
    assert vocabulary[:50256] == [gpt2_bpe.decode_single_token_bytes(i) for i in range(50256)]
    cut = int(len(SAMPLE) * 0.9)
    train = read_shards(out, "train")[0]
    assert train == [50256] + gpt2_bpe.encode_ordinary(SAMPLE[:cut])
    assert 50256 not in train[1:]  # <|endoftext|> in a text is text
    assert decode(out, "train") == [b"", SAMPLE[:cut].encode()]
    assert decode(out, "val") == [SAMPLE[cut:].encode()]


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


def test_tinyshakespeare(prepare, tmp_path, test_data, gpt2_bpe):
    """nanoGPT's split: its counts of tokens, and the <|endoftext|> in front."""
    for tokenizer, train, val in ("chars", 1003854, 111540), ("gpt2", 301966, 36059):
        out = tmp_path / tokenizer
        text = test_data / "tinyshakespeare.txt"
        prepared(prepare("--tokenizer", tokenizer, "--out", out, text, bare=False))
        assert read_shards(out, "train")[1] == [train + 1]
        assert read_shards(out, "val")[1] == [val]
        assert b"".join(decode(out, "train") + decode(out, "val")) == text.read_bytes()


def test_a_pipe_is_refused(prepare, tmp_path):
    os.mkfifo(tmp_path / "pipe")
    refused(prepare("--tokenizer", "bytes", "--out", tmp_path / "data", tmp_path / "pipe"), "not a regular file")


def test_an_abbreviated_option_is_refused(prepare, tmp_path):
    refused(prepare("--tok", "bytes", "--out", tmp_path / "data", __file__), "--tokenizer")


def test_sigterm_leaves_nothing(root, tmp_path):
    (tmp_path / "text").write_bytes(b"some text " * 20_000_000)
    command = [sys.executable, root / "data_prep/prepare.py", "--tokenizer", "bytes", "--out", tmp_path / "data",
               tmp_path / "text"]
    with subprocess.Popen(list(map(str, command)), stderr=subprocess.PIPE, text=True) as process:
        while process.poll() is None and not list(tmp_path.glob("data/.prepare-*/*")):
            time.sleep(0.001)
        process.terminate()
        assert process.wait() == 1 and "terminated; nothing was written" in process.stderr.read()
    assert not list((tmp_path / "data").iterdir())


@pytest.mark.parametrize("documented", [True, False])
def test_demo_text_is_prose(root, tmp_path, documented):
    if not documented:  # a package that hides Python's own
        (tmp_path / "pydoc_data").mkdir()
        (tmp_path / "pydoc_data/__init__.py").touch()
    files = [root / name for name in ("README.md", "dev/README.md", "train_gpt2.cpp", "train_gpt2.cu")]
    result = subprocess.run([sys.executable, root / "data_prep/demo_text.py", *files], capture_output=True, text=True,
                            env=dict(os.environ, PYTHONPATH=str(tmp_path)))
    text = prepared(result)
    assert len(text) > (100_000 if documented else 25_000)
    assert ("NameError" in text) == documented
    assert all(line[0].isupper() and line[-1] in ".:" for line in text.splitlines())


def test_picture_is_what_its_script_draws(root):
    drawn = subprocess.run([sys.executable, root / "dev/attentions.py"], capture_output=True, text=True, check=True)
    assert drawn.stdout == (root / "dev/attentions.svg").read_text(encoding="utf-8")
