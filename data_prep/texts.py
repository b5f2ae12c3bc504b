"""Finds documents in files of text, JSON lines or Parquet, each also as .gz or .zst, and in data sets of Hugging Face,
and divides them into training and validation text.

A document has a place, which is how messages call it: a file, a line or a row of one. Packages beyond the standard
library are imported when an input needs them.
"""

import bisect
import contextlib
import fcntl
import functools
import glob
import hashlib
import importlib
import itertools
import json
import os
import re
import shutil
import stat
import struct
import sys
import tempfile
import zlib
from types import SimpleNamespace

SPLITS = {"train": "training", "val": "validation"}
MANY = 1000  # documents: from here on a hash says for each whether it is for validation
LONG = 1 << 20  # bytes: longer documents are divided even among many
BLOCK = 1 << 20
# What begins like this is no text.
BINARY = {b"\x1f\x8b": "gzip: its name must end in .gz", b"\x28\xb5\x2f\xfd": "zstandard: its name must end in .zst",
          b"PAR1": "Parquet: its name must end in .parquet", b"BZh": "bzip2: decompress it first",
          b"\xfd7zXZ": "xz: decompress it first", b"PK\x03\x04": "zip: unpack it first", b"%PDF": "PDF",
          b"\x89PNG": "PNG", b"\x7fELF": "a program", struct.pack("<i", 20240520): "a shard, as prepare.py writes them",
          struct.pack("<i", 20240326): "a model", struct.pack("<i", 20240328): "a tokenizer"}
COMPRESSED_BLOCK = 1 << 13  # for zstandard, up to 256 MB of text


def shown(text):
    """The text with its control characters escaped: names may hold them."""
    return re.sub(r"[\x00-\x1f\x7f-\x9f]", lambda c: repr(c[0])[1:-1], text)


def fail(message):
    sys.exit("error: " + shown(message))


def count(n, noun):
    return f"{n:,} {noun}{'s' * (n != 1)}"


def reason(e):
    """What an exception of another package says, on one line."""
    return " ".join(str(e).split())[:200] or type(e).__name__


def make_folder(path):
    """Makes the folder and those above it. Returns those that it made, from the bottom up."""
    made, folder = [], path
    while folder and not os.path.lexists(folder):
        made.append(folder)
        folder = os.path.dirname(folder)
    os.makedirs(path, exist_ok=True)
    return made


def remove_empty(folders):
    for folder in folders:
        with contextlib.suppress(OSError):  # it is not empty
            os.rmdir(folder)


def lock(folder):
    """Locks it against other processes that write there, until this one ends. Returns its file descriptor."""
    number = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        fcntl.flock(number, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        fail(f"{folder}: another process is writing there; wait for it, or give another folder")
    except OSError:  # some file systems cannot
        pass
    return number


def package(name):
    """An optional one."""
    try:
        return importlib.import_module(name)
    except ImportError as e:
        needed = (e.name or name).split(".")[0]
        fail(f"this needs the package {needed}: python3 -m pip install {needed}")


def open_file(path):
    """Opens a regular file. O_NONBLOCK: a pipe is refused, even one without a writer."""
    file = open(path, "rb", opener=lambda name, flags: os.open(name, flags | os.O_NONBLOCK))
    if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
        fail(f"{path}: not a regular file; for standard input name -")
    return file


def split(blocks, separator):
    """What stands between the separators."""
    waiting = bytearray()
    for block in blocks:
        begin, search_from = 0, max(0, len(waiting) - len(separator) + 1)
        waiting += block
        while (end := waiting.find(separator, search_from)) >= 0:
            yield bytes(waiting[begin:end])
            begin = search_from = end + len(separator)
        del waiting[:begin]
    yield bytes(waiting)


def progress(title, total):
    """On a terminal, a bar for bytes, if tqdm is installed."""
    if sys.stderr and sys.stderr.isatty():
        with contextlib.suppress(ImportError):
            from tqdm import tqdm
            tqdm.monitor_interval = 0  # no thread of its own
            return tqdm(desc=title, total=total, unit="B", unit_scale=True, leave=False)
    return SimpleNamespace(update=lambda n: None, close=lambda: None)


class Source:
    """A file of documents, or a copy of what can be read only once: the documents can be read again."""

    def __init__(self, name, field, separator=None, copy=None, kind=None, unit="line"):
        self.name, self.field, self.separator, self.copy, self.unit = name, field, separator, copy, unit
        stem, suffix = os.path.splitext(name.lower())
        self.compression = suffix if suffix in (".gz", ".zst") and not copy else None
        suffix = os.path.splitext(stem)[1] if self.compression else suffix
        self.kind = kind or {".jsonl": "jsonl", ".parquet": "parquet"}.get(suffix, "text")
        self.size = 0 if copy else os.stat(name).st_size
        self.separated = False  # whether the separator has been found
        self.is_val = False

    def documents(self, progress):
        """The place and the text of each document. progress is told how many more bytes of the file are done."""
        if self.kind == "parquet":
            yield from self.rows(progress)
        elif self.kind == "jsonl":
            for number, line in enumerate(split(self.blocks(progress), b"\n"), 1):
                place = f"{self.name}, {self.unit} {number:,}"
                if line.strip():
                    yield place, self.text_of(object_of(line, place), place)
        elif self.separator:
            for number, part in enumerate(split(self.blocks(progress), self.separator), 1):
                self.separated = self.separated or number > 1
                if part.strip():
                    yield f"{self.name}, part {number:,}", part
        else:
            yield self.name, b"".join(self.blocks(progress))

    def open(self):
        if not self.copy:
            return open_file(self.name)
        self.copy.seek(0)
        return open(os.dup(self.copy.fileno()), "rb")

    def blocks(self, progress):
        """The content, decompressed."""
        if self.compression == ".gz":
            start, damage = functools.partial(zlib.decompressobj, wbits=31), zlib.error
        elif self.compression:
            zstandard = package("zstandard")
            start, damage = zstandard.ZstdDecompressor(max_window_size=1 << 31).decompressobj, zstandard.ZstdError
        stream = None  # a file is one of these after the other
        with self.open() as f:
            begin = f.read(8)
            for magic, kind in BINARY.items():
                if begin.startswith(magic) and not self.compression and self.kind != "parquet":
                    fail(f"{self.name}: is no text but {kind}")
            f.seek(0)
            for block in iter(lambda: f.read(COMPRESSED_BLOCK if self.compression else BLOCK), b""):
                progress(len(block))
                if not self.compression:
                    yield block
                    continue
                while block:
                    if not stream and self.compression == ".gz" and not (block := block.lstrip(b"\0")):
                        break  # tapes and some disks pad with zeros
                    stream = stream or start()
                    try:
                        text = stream.decompress(block)
                    except damage as e:
                        fail(f"{self.name}: damaged, or not {self.compression}: {reason(e)}")
                    block, stream = stream.unused_data, None if stream.eof else stream
                    yield text
        if stream:
            fail(f"{self.name}: damaged: it ends too early")

    def rows(self, progress):
        parquet, number = package("pyarrow.parquet"), 0
        with tempfile.TemporaryFile() if self.compression else self.open() as f:
            if self.compression:
                f.writelines(self.blocks(progress))
            try:
                file = parquet.ParquetFile(f)
                self.require_field(file.schema_arrow.names, self.name)
                for batch in file.iter_batches(256, columns=[self.field]):
                    for row in batch.to_pylist():
                        number += 1
                        place = f"{self.name}, row {number:,}"
                        yield place, self.text_of(row, place)
                    if not self.compression:
                        progress(self.size * batch.num_rows / file.metadata.num_rows)
            except MemoryError:
                raise
            except Exception as e:  # whatever damage leads to
                fail(f"{self.name}: not Parquet, or damaged after row {number:,}: {reason(e)}")

    def require_field(self, names, place):
        if self.field not in names:
            fail(f"{place}: has no field {self.field!r}; --field takes one of its own: {', '.join(names)}"[:500])

    def text_of(self, fields, place):
        self.require_field(fields, place)
        value = fields[self.field]
        if not isinstance(value, str):
            fail(f"{place}: its {self.field!r} is {'null' if value is None else type(value).__name__}, not a string")
        try:
            return value.encode()
        except UnicodeEncodeError as e:
            fail(f"{place}: its {self.field!r} has half of a character, the lone surrogate {value[e.start]!r}")


def object_of(line, place):
    """The JSON object that a line is."""
    try:
        value = json.loads(line.decode("utf-8-sig"))
    except UnicodeDecodeError:
        fail(f"{place}: not UTF-8")
    except (ValueError, RecursionError) as e:
        fail(f"{place}: not JSON: {getattr(e, 'msg', e)}")
    return value if isinstance(value, dict) else fail(f"{place}: not a JSON object")


def find_files(names):
    """The files that are named, those of folders, and those that match patterns."""
    def refuse(e):
        raise e

    for name in names:
        found = [name]
        if name != "-" and not os.path.lexists(name) and glob.has_magic(name):
            found = sorted(glob.glob(name, recursive=True)) or fail(f"{name}: no file has such a name")
        for path in found:
            if not os.path.isdir(path):
                yield path
                continue
            inside, seen = [], set()
            for folder, folders, files in os.walk(path, onerror=refuse, followlinks=True):
                seen.add(os.path.realpath(folder))  # links can lead back
                folders[:] = [f for f in folders if not f.startswith(".")
                              and os.path.realpath(os.path.join(folder, f)) not in seen]
                inside += [os.path.join(folder, f) for f in files if not f.startswith(".")]
            yield from sorted(inside) or fail(f"{path}: a folder without files")


def find(names, field, separator, folder):
    """The sources of these names. Standard input is copied into the folder, without a name."""
    for path in find_files(names):
        if path != "-":
            yield Source(path, field or "text", separator)
            continue
        if not sys.stdin:
            fail("-: standard input is closed")
        source = Source("standard input", field, separator, tempfile.TemporaryFile(dir=folder), field and "jsonl")
        try:
            shutil.copyfileobj(sys.stdin.buffer, source.copy)
        except OSError as e:
            fail(f"standard input could not be copied into {folder}: {e.strerror}")
        source.size = source.copy.tell()
        yield source


def data_set(name_and_configuration, wanted, field, folder):
    """The sources of those splits of a data set that are wanted and that it has; train must be there."""
    datasets = package("datasets")
    name, *configuration = name_and_configuration
    sources = []
    try:
        datasets.disable_progress_bars()
        splits = datasets.load_dataset(name, *configuration, streaming=True)
        if "train" not in splits:
            fail(f"--dataset {name}: no split of it is called train: {', '.join(splits)}")
        for split in [split for split in wanted if split in splits]:
            source = Source(f"{name}, {split}", field, None, tempfile.TemporaryFile(dir=folder), "jsonl", "row")
            with contextlib.closing(progress("copying", None)) as bar:
                for number, row in enumerate(splits[split], 1):
                    text = source.text_of(row, f"{source.name}, row {number:,}").decode()
                    bar.update(source.copy.write(json.dumps({field: text}).encode() + b"\n"))
            source.size = source.copy.tell()
            sources.append(source)
    except Exception as e:  # whatever a download can raise
        fail(f"--dataset {name}: {reason(e)}")
    return sources


# ----------------------------------------------------------------------------------------------------------------------
# The validation set


class Corpus:
    """All documents. They can be read several times, and have to be the same each time."""

    def __init__(self, sources, decoding, separator):
        self.sources, self.decoding, self.separator, self.stamps = sources, decoding, separator, {}
        self.bar = progress("", 0)

    def read(self, title):
        """The documents that are not empty, with their numbers and where they begin in all of the text."""
        self.empty, self.first_empty, number, position = 0, None, 0, 0
        self.bar = progress(title, sum(source.size for source in self.sources))
        for source in self.sources:
            stamp = 0
            for place, data in source.documents(self.bar.update):
                stamp = zlib.crc32(data, zlib.crc32(b"%d" % len(data), stamp))
                try:
                    text = data.decode(*self.decoding)
                except UnicodeDecodeError as e:
                    fail(f"{place}: not UTF-8 at byte {e.start:,}; convert it, or use --tokenizer bytes")
                if not text:
                    self.empty, self.first_empty = self.empty + 1, self.first_empty or place
                    continue
                yield SimpleNamespace(place=place, data=data, text=text, number=number, position=position,
                                      is_val=source.is_val)
                number, position = number + 1, position + len(text)
            if self.stamps.setdefault(source, stamp) != stamp:
                fail(f"{source.name}: changed between two readings; it has to stay as it is")
        self.bar.close()
        if self.separator and not any(source.separated for source in self.sources):
            fail(f"--separator {self.separator!r}: occurs in none of the texts")

    def parts(self, title, rule):
        """The split that a part of a document belongs to, the document, and the part's ends. rule(document) says where
        it is cut, into parts for training and for validation in turn, and how far each cut may move."""
        for d in self.read(title):
            cuts, reach = rule(d)
            edges = [0, *(nearest_beginning(d.text, at, reach) for at in cuts), len(d.text)]
            for split, begin, end in zip(itertools.cycle(SPLITS), edges, edges[1:]):
                if begin < end:
                    yield split, d, begin, end


def split_rule(lengths, fraction, tail):
    """A function for Corpus.parts, from the lengths of the documents, or the first of them: where a document is cut,
    and how far the cuts may move."""
    if fraction == 0:
        return lambda d: ([0] * d.is_val, 0)
    if tail:
        bounds = [int(sum(lengths) * (1 - fraction))]
        return lambda d: (cut(d.position, len(d.text), bounds), 0)
    if len(lengths) < MANY:
        result = spread(lengths, fraction)
        return lambda d: result[d.number] if d.number < len(result) else ([], 0)  # it is new: read will find that out
    return lambda d: hashed(d, fraction)


def cut(position, length, bounds):
    """The cuts of a document, where these bounds divide the whole text, in turn for training and for validation. The
    first is 0 if the document begins with validation."""
    begins_with_validation = bisect.bisect_right(bounds, position) % 2 == 1
    return [0] * begins_with_validation + [b - position for b in bounds if position < b < position + length]


def stretches(length, fraction):
    """The bounds in a text of this length of which the ends of stretches are for validation, and how far they may move:
    parts of 4096 characters or more, in up to 32 stretches; shorter ones where there would be fewer than 10."""
    smaller_part = int(min(fraction, 1 - fraction) * length)
    n = max(1, min(32, max(smaller_part // 4096, min(10, smaller_part // 512))))
    ends = [length * i // n for i in range(n + 1)]
    bounds = [b for begin, end in zip(ends, ends[1:]) for b in (begin + int((end - begin) * (1 - fraction)), end)]
    return bounds, min(smaller_part // n // 8, 4096)


def spread(lengths, fraction):
    """Takes whole documents for validation, and the ends of stretches of those that are too long for that: the cuts of
    each document, and how far they may move."""
    smaller_set = min(fraction, 1 - fraction) * sum(lengths)
    for most in 1.5 * smaller_set, 0.5 * smaller_set:  # the second always comes near enough
        result = [([], 0)] * len(lengths)
        due = 0
        for i in sorted(range(len(lengths)), key=lambda i: lengths[i].bit_length()):  # some of each size
            if lengths[i] <= most:
                due += fraction * lengths[i]
                if due >= lengths[i] / 2:
                    due -= lengths[i]
                    result[i] = [0], 0
        if abs(due) <= 0.4 * smaller_set:
            break
    bounds, reach = stretches(sum(length for length in lengths if length > most), fraction)
    position = 0
    for i, length in enumerate(lengths):
        if length > most:
            result[i] = cut(position, length, bounds), reach
            position += length
    return result


def hashed(d, fraction):
    """What is for validation depends on nothing but the document's content."""
    if len(d.data) > LONG:
        bounds, reach = stretches(len(d.text), fraction)
        return cut(0, len(d.text), bounds), reach
    number = int.from_bytes(hashlib.blake2b(d.data, digest_size=8).digest(), "big")
    return [0] * (number < fraction * 2**64), 0


def nearest_beginning(text, at, reach):
    """The position nearest to `at`, within reach, where a paragraph begins, else a line, a word, a UTF-8 character."""
    low, high = max(at - reach, 0), min(at + reach, len(text))
    for mark in "\n\n", "\n", " ":
        before, after = text.rfind(mark, low, at), text.find(mark, max(at - len(mark), 0), high)
        found = [i + len(mark) for i in (before, after) if i >= 0] + [i for i in (0, len(text)) if low <= i <= high]
        if found:
            return min(found, key=lambda i: abs(i - at))
    while at < high and "\x80" <= text[at] < "\xc0":  # in text of bytes, inside a character
        at += 1
    return at
