"""Where prepare.py finds documents, and which set they go to; how several processes encode them."""

import gzip
import json
import os
import random
import shutil
import signal
import subprocess
import time

import pytest
from helpers import BYTES_AND_END_OF_TEXT, contents, heed_signals, wait_until, write_tokenizer
from prepare_helpers import children, command, decode, is_running, parts, prepared, refused, write

ODD_TEXTS = ["two\nlines\n", "\r\nCRLF\r\nand a \r\n", "\ufeffafter a BOM", "NUL \0 inside", "naïve 東京 🙂",
             "\u2028 \x85", "<|endoftext|>", " ", '"quoted" \\ {"text": 1}']


@pytest.fixture
def train(prepare, tmp_path):
    """The training documents, where none is for validation."""

    def run(*arguments, tokenizer="bytes", **named):
        out = tmp_path / "out"
        prepared(prepare("--tokenizer", tokenizer, "--out", out, "--overwrite", "--val-fraction", 0, *arguments,
                         **named))
        return [text.decode() for text in parts(out, "train")]

    return run


@pytest.fixture
def refuses(prepare, tmp_path):
    def check(*arguments, says=(), **named):
        out = tmp_path / "no"
        refused(prepare("--tokenizer", "bytes", "--out", out, *arguments, **named), *says)
        assert not out.exists()

    return check


def json_lines(texts, field="text", **named):
    return "".join(json.dumps({"id": i, field: text}, **named) + "\n" for i, text in enumerate(texts))


# ----------------------------------------------------------------------------------------------------------------------
# JSON lines


@pytest.mark.parametrize("ascii", [True, False])
def test_lines_are_documents(train, tmp_path, ascii):
    lines = json_lines(ODD_TEXTS, ensure_ascii=ascii)
    assert train(write(tmp_path / "a.jsonl", lines)) == ODD_TEXTS
    assert train(write(tmp_path / "a.jsonl", lines), tokenizer="chars") == ODD_TEXTS
    # Windows' line ends, empty lines, a byte order mark, no newline at the end, an empty text
    lines = lines.replace("\n", "\r\n\r\n") + '{"text": ""}'
    assert train(write(tmp_path / "A.JSONL", "\ufeff" + lines)) == ODD_TEXTS


def test_field(train, refuses, tmp_path):
    a = write(tmp_path / "a.jsonl", json_lines(["one", "two"], field="body"))
    assert train("--field", "body", a) == ["one", "two"]
    refuses(a, says=[f"{a}, line 1: has no field 'text'; --field takes one of its own: id, body"])
    refuses("--field", "body", write(tmp_path / "a.txt", "text"), says=["--field: is for JSON lines"])


@pytest.mark.parametrize("line, says", [
    (b"plain text", "not JSON: Expecting value"), (b'{"text": "a"', "not JSON"), (b'{"text": "a"} {}', "not JSON"),
    (b'{"text": "a\nb"}', "not JSON"), (b'["text"]', "not a JSON object"), (b'"text"', "not a JSON object"),
    (b'{"text": null}', "its 'text' is null, not a string"), (b'{"text": ["a"]}', "its 'text' is list, not a string"),
    (b'{"text": 1}', "its 'text' is int"), (b'{"txt": "a"}', "has no field 'text'"), (b"{}", "has no field 'text'"),
    (b'{"text": "a\xff"}', "not UTF-8"), ('{"text": "a"}'.encode("utf-16"), "not UTF-8"), (b"\0", "not JSON"),
    (rb'{"text": "a\ud800b"}', "half of a character, the lone surrogate '\\ud800'"),
    (rb'{"text": "\udfff\ud800"}', "lone surrogate '\\udfff'"), (b"[" * 100_000, "not JSON"), (b"9" * 10_000, ""),
], ids=lambda x: x[:20].decode("latin-1") if isinstance(x, bytes) else "")
def test_bad_lines_are_named(refuses, tmp_path, line, says):
    a = write(tmp_path / "a.jsonl", b'{"text": "good"}\n\n' + line + b'\n{"text": "good"}\n')
    refuses(a, says=[f"{a}, line 3: ", says])


def test_a_character_that_a_line_must_not_have(prepare, tmp_path):
    prepared(prepare("--tokenizer", "chars", "--out", tmp_path / "chars", write(tmp_path / "a", "abc\n" * 10)))
    a = write(tmp_path / "a.jsonl", json_lines(["cab", "ab\nad"]))
    refused(prepare("--tokenizer", tmp_path / "chars/tokenizer.bin", "--out", tmp_path / "out", a),
            f"{a}, line 2: line 2, column 2: 'd' (U+0064) is not in the vocabulary")


# ----------------------------------------------------------------------------------------------------------------------
# Compressed files


def test_gzip(train, tmp_path):
    text = "\r\n".join(ODD_TEXTS) * 1000
    half = len(text) // 2
    (tmp_path / "a.txt.gz").write_bytes(gzip.compress(text[:half].encode()) + gzip.compress(text[half:].encode()))
    assert train(tmp_path / "a.txt.gz") == [text]
    write(tmp_path / "b.JSONL.GZ", gzip.compress(json_lines(ODD_TEXTS * 5000).encode()))
    assert train(tmp_path / "b.JSONL.GZ") == ODD_TEXTS * 5000
    assert train(write(tmp_path / "empty.gz", ""), tmp_path / "a.txt.gz") == [text]


def test_damaged_gzip(refuses, tmp_path):
    r = random.Random(1)
    good = gzip.compress(bytes(r.choices(range(97, 123), k=50_000)))
    a = tmp_path / "a.gz"
    for length in [1, 2, 9, 10, 11, *range(12, len(good), 9001), len(good) - 8, len(good) - 1]:
        refuses(write(a, good[:length]), says=[f"{a}: damaged: it ends too early"])
    for bad in good[2:], good + b"more", b"plain text", good[:20_000] + b"\0" * 100 + good[20_100:]:
        refuses(write(a, bad), says=[f"{a}: damaged, or not .gz: "])


# ----------------------------------------------------------------------------------------------------------------------
# Folders, patterns, standard input, separators


def test_folders(train, refuses, tmp_path):
    """All files, in the order of their names, without hidden ones."""
    folder = tmp_path / "folder"
    for name in "b/z.txt", "b/a.md", "a", "c/d/e.jsonl", ".hidden", ".git/config", "c/.swp", "b c":
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        write(folder / name, json_lines([name]) if name.endswith(".jsonl") else name)
    (folder / "empty").mkdir()
    assert train(folder) == ["a", "b c", "b/a.md", "b/z.txt", "c/d/e.jsonl"]
    assert train(f"{folder}/b/", folder / "a") == ["b/a.md", "b/z.txt", "a"]
    refuses(folder / "empty", says=[f"{folder / 'empty'}: a folder without files"])
    refuses(folder / ".git" / "..", folder / "a", says=["is given twice"])
    os.mkfifo(folder / "pipe")
    refuses(folder, says=[f"{folder / 'pipe'}: not a regular file"])


def test_patterns(train, refuses, tmp_path):
    for name in "a1", "a2", "b1", "[ab]1", "deep/a3":
        (tmp_path / name).parent.mkdir(exist_ok=True)
        write(tmp_path / name, name)
    assert train(f"{tmp_path}/a*") == ["a1", "a2"]
    assert train(f"{tmp_path}/[ab]1") == ["[ab]1"]  # a file of that name
    assert train(f"{tmp_path}/[ab]?") == ["a1", "a2", "b1"]
    assert train(f"{tmp_path}/**/a?") == ["a1", "a2", "deep/a3"]
    assert train(f"{tmp_path}/dee*") == ["deep/a3"]
    refuses(f"{tmp_path}/c*", says=[f"{tmp_path}/c*: no file has such a name"])


def test_standard_input(train, refuses, tmp_path):
    text = "".join(ODD_TEXTS)
    assert train("-", stdin=text.encode()) == [text]
    assert train("--field", "text", "-", stdin=json_lines(ODD_TEXTS).encode()) == ODD_TEXTS
    assert train("--separator", "|", write(tmp_path / "a", "b|c"), "-", stdin=b"d|e") == ["b", "c", "d", "e"]
    assert train("-", tokenizer="chars", stdin=b"ab" * 3_000_000) == ["ab" * 3_000_000]
    refuses("-", "-", stdin=b"text", says=["standard input: is given twice"])
    refuses("-", says=["there is no text for training: what was given has 0 bytes"])
    refuses("-", before=lambda: os.close(0), says=["-: standard input is closed"])
    refuses("--field", "text", "-", stdin=b"text", says=["standard input, line 1: not JSON"])


@pytest.mark.parametrize("separator", ["<|endoftext|>", "\n\n", "东"])
def test_separators(train, tmp_path, separator):
    """Also one that is not in a single block of 1 MiB, as files are read."""
    begin = separator.join(["one", "\r\ntwo ", ""])
    texts = ["one", "\r\ntwo ", "x" * ((1 << 20) - 1 - len(begin.encode()))] + ["z" * i for i in range(1, 99)]
    text = separator.join(texts)
    assert text.encode()[(1 << 20) - 1:].startswith(separator.encode())
    assert train("--separator", separator, write(tmp_path / "a", text)) == texts
    assert train("--separator", separator, write(tmp_path / "a.gz", gzip.compress(text.encode()))) == texts
    parts = separator + separator.join(["one", "", " \n\t", "two"]) + separator + " \n"
    assert train("--separator", separator, write(tmp_path / "a", parts)) == ["one", "two"]


def test_separators_that_separate_nothing(refuses, tmp_path):
    a, b = write(tmp_path / "a", "a text"), write(tmp_path / "b.jsonl", json_lines(["a||b"]))
    refuses("--separator", "||", a, b, says=["--separator '||': occurs in none of the texts"])
    refuses("--separator", "||", b, says=["--separator: is for text, and no file of text is given"])
    refuses("--separator", "", a, says=["--separator: must not be empty"])


def test_texts_stay_as_they_are(train, tmp_path):
    files = [write(tmp_path / f"{i}.txt", text) for i, text in enumerate(ODD_TEXTS)]
    assert train(*files) == train(*files, tokenizer="chars") == ODD_TEXTS


def test_packages_that_are_missing(refuses, tmp_path):
    for needs, *arguments in (("pyarrow", write(tmp_path / "a.parquet", "text")), ("datasets", "--dataset", tmp_path),
                              ("zstandard", write(tmp_path / "a.txt.zst", "text"))):
        refuses(*arguments, says=[f"this needs the package {needs}: python3 -m pip install {needs}"])


# ----------------------------------------------------------------------------------------------------------------------
# Many documents: a hash says which are for validation


def made_up_documents(n, seed=0):
    r = random.Random(seed)
    return [f"{seed} {i} " + "".join(r.choices("abcdefgh é東\n", k=r.randint(1, 60))) for i in range(n)]


@pytest.fixture
def divide(prepare, tmp_path):
    """The documents of both sets."""

    def run(*arguments, tokenizer="bytes"):
        out = tmp_path / "out"
        said = prepared(prepare("--tokenizer", tokenizer, "--out", out, "--overwrite", *arguments))
        train, val = ([text.decode() for text in parts(out, split)] for split in ("train", "val"))
        assert f"training: {len(train):,} documents, " in said and f"validation: {len(val):,} documents, " in said
        return train, val

    return run


def test_more_text_moves_no_document(divide, tmp_path):
    texts, more = made_up_documents(1000), made_up_documents(500, seed=1)
    train, val = divide(write(tmp_path / "a.jsonl", json_lines(texts)))
    assert sorted(train + val) == sorted(texts)
    assert 60 < len(val) < 140
    assert [text for text in texts if text in set(val)] == val  # in their order
    new_train, new_val = divide(write(tmp_path / "b.jsonl", json_lines(more)), tmp_path / "a.jsonl")
    assert set(val) == set(new_val) & set(texts) and set(train) == set(new_train) & set(texts)
    _, larger_val = divide(tmp_path / "a.jsonl", "--val-fraction", 0.3)
    assert set(val) < set(larger_val) and 240 < len(larger_val) < 360


def test_the_hash_is_of_the_text(divide, tmp_path):
    """Whatever file it is in, whatever encodes it."""
    texts = made_up_documents(1000)
    split = divide(write(tmp_path / "a.jsonl", json_lines(texts)))
    assert divide(tmp_path / "a.jsonl", tokenizer="chars") == split
    assert divide("--separator", "<>", write(tmp_path / "a.txt", "<>".join(texts))) == split
    (tmp_path / "folder").mkdir()
    for i, text in enumerate(texts):
        write(tmp_path / f"folder/{i:04}.txt", text)
    assert divide(tmp_path / "folder") == split


def test_from_a_thousand_documents_on(divide, tmp_path):
    """Fewer are spread, so their share is nearer to what was asked for."""
    texts = made_up_documents(1000)
    _, val = divide(write(tmp_path / "a.jsonl", json_lines(texts[:999])))
    assert abs(sum(map(len, val)) / sum(map(len, texts[:999])) - 0.1) < 0.01
    _, hashed = divide(write(tmp_path / "a.jsonl", json_lines(texts)))
    assert len(set(hashed) & set(val)) < 50
    _, more = divide(write(tmp_path / "a.jsonl", json_lines([""] * 10 + texts + ["one more"])))
    assert [text for text in more if text != "one more"] == hashed


def test_given_sets_of_many_documents(divide, prepare, tmp_path):
    texts, val = made_up_documents(1100), made_up_documents(1200, seed=1)
    a, b = write(tmp_path / "a.jsonl", json_lines(texts)), write(tmp_path / "b.jsonl", json_lines(val))
    assert divide(a, "--val", b) == (texts, val)
    refused(prepare("--tokenizer", "bytes", "--out", tmp_path / "no", a, "--val", write(tmp_path / "none", "")),
            "there is no text for validation")
    assert not (tmp_path / "no").exists()
    prepared(prepare("--tokenizer", "bytes", "--out", tmp_path / "tail", "--val-tail", a))
    train, tail = (b"".join(decode(tmp_path / "tail", split)).decode() for split in ("train", "val"))
    assert train + tail == "".join(texts)
    assert len(tail.encode()) == pytest.approx(0.1 * len("".join(texts).encode()), abs=1)


def test_a_huge_document_among_many_is_divided(prepare, tmp_path):
    huge = "".join(f"line {i:026}\n" for i in range((1 << 20) // 32 + 1))
    a = write(tmp_path / "a.jsonl", json_lines(made_up_documents(1000)))
    said = prepared(prepare("--tokenizer", "bytes", "--out", tmp_path / "out", a, write(tmp_path / "huge", huge)))
    assert f"documents and 25 parts of {tmp_path / 'huge'}, 10." in said
    train, val = ([p for p in parts(tmp_path / "out", split) if p.startswith(b"line")] for split in ("train", "val"))
    assert b"".join(p for pair in zip(train, val) for p in pair).decode() == huge


@pytest.mark.parametrize("tokenizer", ["bytes", "chars"])
@pytest.mark.parametrize("n", [10, 1500])
def test_lines_that_change_between_two_readings(prepare, tmp_path, tokenizer, n):
    lines = json_lines(made_up_documents(n))
    first = lines[:lines.index("\n") + 1]
    for changed in lines + first, lines[len(first):], lines[len(first):] + first, lines.replace("a", "b"), "", "{":
        a = write(tmp_path / "a.jsonl", lines)
        other = write(tmp_path / "other", changed)
        result = prepare("--tokenizer", tokenizer, "--out", tmp_path / "out", a, instant=1,
                         code=f"import shutil; shutil.copyfile({str(other)!r}, {str(a)!r})")
        if n < 1000 or tokenizer == "chars":
            refused(result, f"{a}")
        if result.returncode:  # if not, there was nothing to learn from the text, and the first reading was cut short
            assert not (tmp_path / "out").exists()
        else:
            shutil.rmtree(tmp_path / "out")


# ----------------------------------------------------------------------------------------------------------------------
# Several processes


@pytest.fixture(scope="module")
def long_lines(tmp_path_factory):
    """Some 9 MB, which are enough for eight processes."""
    r, path = random.Random(1), tmp_path_factory.mktemp("long") / "a.jsonl"
    return write(path, json_lines(("".join(r.choices("aé東🙂 \n", k=r.randint(0, 3000))) for _ in range(2000)),
                                  ensure_ascii=False))


def test_processes_do_not_show(prepare, tmp_path, long_lines):
    for n in 1, 2, 3, 8:
        prepared(prepare("--tokenizer", "chars", "--out", tmp_path / str(n), "--processes", n, long_lines,
                         "--shard-tokens", 10**6))
        assert contents(tmp_path / str(n)) == contents(tmp_path / "1")
    texts = [json.loads(line)["text"] for line in long_lines.read_text(encoding="utf-8").splitlines()]
    found = [text.decode() for split in ("train", "val") for text in parts(tmp_path / "1", split)]
    assert sorted(found) == sorted(filter(None, texts))


@pytest.fixture
def encoding(root, tmp_path, long_lines):
    """A run that is encoding with two processes, far from its end, and those. A vocabulary with merges takes longest."""
    pytest.importorskip("tiktoken")
    write_tokenizer(tmp_path / "t.bin", [*BYTES_AND_END_OF_TEXT, b"ab"], 256)
    (tmp_path / "many").mkdir()
    for i in range(30):
        (tmp_path / f"many/{i}.jsonl").symlink_to(long_lines)
    arguments = command(root, "--tokenizer", tmp_path / "t.bin", "--out", tmp_path / "out", "--processes", 2,
                        "--val-fraction", 0, tmp_path / "many", bare=False)
    with subprocess.Popen(arguments, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
                          preexec_fn=heed_signals, start_new_session=True) as process:
        wait_until(lambda: any(file.stat().st_size > 10_000 for file in tmp_path.glob("out/.prepare-*/*.bin")), process)
        encoders = children(process)
        assert len(encoders) == 2
        yield process, encoders
        process.kill()


@pytest.mark.parametrize("to", ["process", "group"])
@pytest.mark.parametrize("by", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP], ids=lambda s: s.name)
def test_stopped_while_processes_encode(encoding, tmp_path, by, to):
    process, encoders = encoding
    (os.kill if to == "process" else os.killpg)(process.pid, by)
    assert process.wait(60) == 1
    word = "interrupted" if by == signal.SIGINT else "terminated"
    assert process.stderr.read() == f"error: {word}; nothing was written\n"
    assert not any(map(is_running, encoders)) and not (tmp_path / "out").exists()


def test_processes_end_with_one_that_is_killed(encoding):
    process, encoders = encoding
    process.kill()
    assert process.wait(60) == -signal.SIGKILL
    end = time.monotonic() + 60
    while any(map(is_running, encoders)) and time.monotonic() < end:
        time.sleep(0.01)
    for pid in filter(is_running, encoders):
        os.kill(pid, signal.SIGKILL)
        pytest.fail("a process lives on without its parent")
    assert process.stderr.read() == ""


def test_a_process_that_is_killed_ends_all(encoding, tmp_path):
    process, encoders = encoding
    os.kill(encoders[0], signal.SIGKILL)
    assert process.wait(60) == 1
    assert process.stderr.read().startswith("error: a process that this one started was killed")
    assert not any(map(is_running, encoders)) and not (tmp_path / "out").exists()


# ----------------------------------------------------------------------------------------------------------------------
# Links, and what is no text


def test_linked_folders(train, tmp_path):
    for folder, name in ("a", "1"), ("b", "2"):
        (tmp_path / folder).mkdir()
        write(tmp_path / folder / name, name)
    (tmp_path / "a" / "link").symlink_to("../b")
    (tmp_path / "b" / "back").symlink_to("../a")
    assert train(tmp_path / "a") == ["1", "2"]


@pytest.mark.parametrize("name, content, says", [
    ("a.txt", gzip.compress(b"text"), "gzip: its name must end in .gz"), ("a.bz2", b"BZh91AY&SY", "bzip2"),
    ("a.txt", b"\x28\xb5\x2f\xfd rest", "zstandard: its name"), ("a", b"PAR1....", "Parquet: its name"),
    ("a.jsonl", gzip.compress(b"{}"), "gzip"), ("train.bin", (20240520).to_bytes(4, "little") + bytes(1020), "a shard")])
def test_no_text(refuses, tmp_path, name, content, says):
    refuses(write(tmp_path / name, content), says=[name, "is no text but", says])
    refuses("-", stdin=content, says=["standard input: is no text but", says])
