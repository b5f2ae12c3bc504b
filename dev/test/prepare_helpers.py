"""What the tests of prepare.py share: running it, and reading what it wrote."""

import os
import re
import struct
import subprocess
import sys
import zlib
from array import array

from helpers import TIMEOUT, heed_signals

EOT = b"<|endoftext|>"
SAMPLE = "First line.\nSecond: naïve café, 東京, 🙂.\n\n\tend<|endoftext|> of\r\n  text   \n" * 20
FILES = ["gpt2x3_manifest.txt", "tokenizer.bin", "train_000.bin", "val_000.bin"]

# Runs prepare.py, and CODE when it makes its Nth change in a folder, or saves a file for good. The first is after the
# first reading of the text.
AT_CHANGE = """
import os, runpy, signal, sys
path, code, instant = sys.argv[1], sys.argv[2], int(sys.argv[3])
changes = 0
def hook(function):
    def hooked(*arguments, **named):
        global changes
        changes += 1
        if changes == instant:
            exec(code)
        return function(*arguments, **named)
    return hooked
for name in "mkdir", "remove", "unlink", "rmdir", "rename", "replace", "fsync":
    setattr(os, name, hook(getattr(os, name)))
sys.argv = [path] + sys.argv[4:]
sys.path[0] = os.path.dirname(path)
runpy.run_path(path, run_name="__main__")
"""


def command(root, *arguments, bare=True, code=None, instant=0):
    """-S hides all packages but the standard library's."""
    script = [root / "data_prep/prepare.py"] if code is None else [
        "-c", AT_CHANGE, root / "data_prep/prepare.py", code, instant]
    return list(map(str, [sys.executable, *(["-E", "-s", "-S"] if bare else []), *script, *arguments]))


def run(root, *arguments, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, before=heed_signals, **named):
    """Runs prepare.py; at its instant-th change, it also runs code. stdin is a file, or text."""
    given = {"input": stdin} if isinstance(stdin, bytes) else {"stdin": stdin}
    done = subprocess.run(command(root, *arguments, **named), **given, stdout=stdout, stderr=subprocess.PIPE,
                          preexec_fn=before, timeout=TIMEOUT)
    done.stdout, done.stderr = (done.stdout or b"").decode(), done.stderr.decode()
    return done


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


def read_tokenizer(folder, with_appendix=False):
    """The bytes of every token, and what may follow them."""
    data = (folder / "tokenizer.bin").read_bytes()
    header = struct.unpack("<256i", data[:1024])
    n, end_of_text, appendix = header[2:5]
    assert header[:2] == (20240328, 2) and not any(header[5:])
    tokens, at = [], 1024
    for _ in range(n):
        tokens.append(data[at + 1:at + 1 + data[at]])
        at += 1 + data[at]
    assert at == len(data) - appendix
    assert end_of_text == n - 1 and tokens[end_of_text] == EOT
    return (tokens, data[at:]) if with_appendix else tokens


def encode_by_file(folder, text):
    """Byte-level BPE with nothing but tokenizer.bin: words by the appendix's letters, numbers and white space; in each
    word that is no token, merges by the lowest token."""
    tokens, appendix = read_tokenizer(folder, with_appendix=True)
    classes, at = [], 0
    for _ in range(3):
        n, = struct.unpack_from("<I", appendix, at)
        ends = struct.unpack_from(f"<{2 * n}I", appendix, at + 4)
        assert list(ends) == sorted(ends) and all(a + 1 < b for a, b in zip(ends[1::2], ends[2::2]))
        classes.append("".join(f"\\U{a:08x}-\\U{b:08x}" for a, b in zip(ends[::2], ends[1::2])))
        at += 4 + 8 * n
    assert at == len(appendix)
    L, N, S = classes
    words = re.findall(f"'(?:[sdmt]|ll|ve|re)| ?[{L}]+| ?[{N}]+| ?[^{S}{L}{N}]+|[{S}]+(?![^{S}])|[{S}]+", text)
    assert "".join(words) == text
    ranks = {token: i for i, token in enumerate(tokens[:-1])}
    encoded = []
    for word in words:
        word = [word.encode()] if word.encode() in ranks else [bytes([b]) for b in word.encode()]
        while True:
            pairs = [ranks.get(a + b, len(ranks)) for a, b in zip(word, word[1:])]
            if min(pairs, default=len(ranks)) == len(ranks):
                break
            i = pairs.index(min(pairs))
            word[i:i + 2] = [word[i] + word[i + 1]]
        encoded += map(ranks.get, word)
    return encoded


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


def parts(folder, split):
    """The texts of a split after each <|endoftext|>."""
    first, *rest = decode(folder, split)
    assert first == b""
    return rest


def check_manifest(folder):
    """The manifest names each file that is read, with its size and the checksum of its ends."""
    names = sorted(name for name in os.listdir(folder) if name.endswith(".bin"))
    data = [(folder / name).read_bytes() for name in names]
    lines = [f"{name} {len(d)} {zlib.crc32(d[:65536] + d[-65536:]):08x}" for name, d in zip(names, data)]
    assert (folder / "gpt2x3_manifest.txt").read_text().splitlines() == ["gpt2x3 manifest 1", *lines]


def write(path, text):
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


def children(process):
    with open(f"/proc/{process.pid}/task/{process.pid}/children") as f:
        return list(map(int, f.read().split()))


def is_running(pid):
    try:
        with open(f"/proc/{pid}/stat") as f:
            return f.read().rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False
