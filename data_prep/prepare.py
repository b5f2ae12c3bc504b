#!/usr/bin/env python3
"""Turns text into what train_gpt2 reads: DIR/train_000.bin ..., DIR/val_000.bin ... and DIR/tokenizer.bin.

    prepare.py --tokenizer bytes --out DIR letters.txt
    prepare.py --tokenizer gpt2 --out DIR novels/train --val novels/val
    prepare.py --tokenizer bpe --vocab-size 8192 --out DIR stories.txt.gz --separator '<|endoftext|>'
    prepare.py --tokenizer gpt2 --out DIR --dataset HuggingFaceFW/fineweb-edu sample-10BT
    bzcat more.jsonl.bz2 | prepare.py --tokenizer DIR/tokenizer.bin --out MORE --field text -

    bytes   one token for each of the 256 bytes; takes any text
    chars   one token for each distinct character of the text
    bpe     byte pair encoding, learned from the training text: the 256 bytes, then merges in the order they were
            learned, --vocab-size tokens in all; needs tokenizers and tiktoken
    gpt2    GPT-2's byte pair encoding, 50,257 tokens; needs tiktoken
    FILE    the vocabulary of a tokenizer.bin, llm.c's too: of bytes, of characters, or byte-level BPE (needs tiktoken)

A text is a file, all files in a folder, those that match a pattern in quotes, or - for standard input. In .jsonl files
(JSON lines) each line is a document, in .parquet files (which need pyarrow) each row. Any other file is a document, or
with --separator each part of it. All of them can be compressed, as .gz or .zst (which needs zstandard). --dataset needs
datasets; it copies the set beside DIR for the time being, and takes its split validation, if there is one, for
validation. Of a folder of plain text files it makes a row of each line. On a terminal tqdm, if it is installed, shows
how far it is.

A document begins with the token <|endoftext|>; those letters in a text are only text.

Without --val, about a tenth of the text becomes the validation set. Of 1,000 documents or more, those are taken whose
content has a low hash, so adding text moves none of them to the other set. Of fewer, whole documents are taken, spread
over the list, small and large ones alike. Documents too long for that (of 1,000 or more, those of over a million bytes)
are divided into up to 32 stretches, and the last tenth of each is taken; a part begins with a paragraph or line if one
begins near. Parts that are neighbors in a shard come from different places, so each begins with <|endoftext|>, in both
sets. With --val-tail, the validation set is the end of the text, as in nanoGPT, and continues the training set, without
a new <|endoftext|>.

DIR/gpt2x3_manifest.txt lists the other files with sizes and checksums; it says "incomplete" while they are replaced.
"""

import argparse
import array
import contextlib
import multiprocessing
import multiprocessing.connection
import os
import re
import shutil
import signal
import struct
import sys
import tempfile
import zlib
from types import SimpleNamespace

sys.dont_write_bytecode = True  # on a full disk, Python would cache half of one, and fail from then on
import texts
from texts import MANY, SPLITS, Corpus, count, fail, package, reason

END_OF_TEXT = b"<|endoftext|>"  # the last token of bytes, chars and gpt2
SHARD, TOKENIZER = 20240520, 20240328  # magic numbers
HEADER_BYTES = 1024
MOST_SHARD_TOKENS = (2**31 - 1 - HEADER_BYTES) // 2  # llm.c seeks in shards with an int
# GPT-2 merges bytes within these words only.
GPT2_WORDS = r"""'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s"""
PIECE, BATCH = 1 << 16, 1 << 18  # characters that are encoded in one go; that a process is given at once
CHECKED_BYTES = 1 << 16  # at each end of a file, for the manifest
SIGNALS = [s for s in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP) if signal.getsignal(s) != signal.SIG_IGN]
outcome = "nothing was written"  # what to say if a signal ends the program


def header(*fields):
    return struct.pack("<256i", *fields, *[0] * (256 - len(fields)))


# ----------------------------------------------------------------------------------------------------------------------
# Tokenizers


class Tokenizer:
    """Encodes text into uint16 tokens. Text of bytes is decoded as Latin-1, which has a character for each byte."""

    def __init__(self, name, tokens, end_of_text, content=None):
        self.name, self.tokens, self.end_of_text = name, tokens, end_of_text
        table = b"".join(bytes([len(token)]) + token for token in tokens)
        self.content = content or header(TOKENIZER, 2, len(tokens), end_of_text) + table
        # The first of equal tokens counts; <|endoftext|> has no letters here, since in a text they are text.
        self.index = {tokens[i]: i for i in reversed(range(len(tokens))) if i != end_of_text}
        self.values = {}  # tokens of a character as a string, each token a code unit of UTF-16
        self.bpe, self.decoding = None, ("utf-8", "strict")
        if name in ("bpe", "gpt2"):
            self.use_merges()
        elif len(self.index) == 256 and all(len(token) == 1 for token in self.index):
            self.decoding = "latin-1", "strict"
            self.values = {b: chr(self.index[bytes([b])]) for b in range(256)}
        elif any(len(token.decode("utf-8", "surrogateescape")) != 1 for token in self.index):
            if not all(bytes([b]) in self.index for b in range(256)):
                fail(f"--tokenizer {name}: its tokens are neither bytes, nor characters, "
                     "nor all bytes and merges of them")
            self.use_merges()
        elif any(len(token) == 1 and token >= b"\x80" for token in self.index):  # characters and bytes
            self.decoding = "utf-8", "surrogateescape"

    def use_merges(self):
        """Byte-level BPE: a word that is a token is that token. In others, the two neighbors that together are the
        lowest token merge, until no two are a token."""
        self.bpe = encoding(GPT2_WORDS, self.index)
        appendix = b"".join(map(ranges_of, (r"\p{L}", r"\p{N}", r"\s")))
        table = b"".join(bytes([len(token)]) + token for token in self.tokens)
        self.content = header(TOKENIZER, 2, len(self.tokens), self.end_of_text, len(appendix)) + table + appendix

    def fingerprint(self):
        """The CRC-32 by which train_gpt2 tells tokenizers apart, as an int32."""
        table = b"".join(bytes([len(token)]) + token for token in self.tokens)
        crc = zlib.crc32(struct.pack("<i", self.end_of_text), zlib.crc32(table))
        return crc - (crc >> 31 << 32)

    def encodes_any_text(self):
        return self.bpe or self.decoding[0] == "latin-1"

    def learn(self, place, text):
        """Finds the tokens of each character: its own, or those of its bytes."""
        unknown = set()
        for c in set(text):
            data = c.encode(*self.decoding)
            tokens = [data] if data in self.index else [bytes([b]) for b in data]
            if all(token in self.index for token in tokens):
                self.values[ord(c)] = "".join(chr(self.index[token]) for token in tokens)
            else:
                unknown.add(c)
        if unknown:
            at = next(i for i, c in enumerate(text) if c in unknown)
            line, column = text.count("\n", 0, at) + 1, at - text.rfind("\n", 0, at)
            fail(f"{place}: line {line:,}, column {column:,}: {text[at]!r} (U+{ord(text[at]):04X}) is not in the "
                 f"vocabulary of {self.name}")

    def encode(self, batch):
        """The tokens of a split's pieces, as uint16. Where a document begins, <|endoftext|> comes first."""
        (split, some), tokens = batch, []
        for text, begins_document in some:
            if begins_document and self.end_of_text >= 0:
                tokens.append(uint16([self.end_of_text]))
            if self.bpe:
                tokens.append(uint16(self.bpe.encode_ordinary(text)))
            else:
                text = text if self.name == "bytes" else text.translate(self.values)
                tokens.append(text.encode("utf-16-le", "surrogatepass"))
        return split, b"".join(tokens)


def pieces(text, by_words):
    """Cuts a text where no token spans the cut. In byte-level BPE, a word begins at white space after anything else,
    and at the last of several white spaces before anything else: tiktoken fails on a million of these and a word."""
    cut = re.compile(r"(?<=\S)[\n ]|(?<=[\t\n\r ])[\t\n\r ](?=\S)" if by_words else "")
    begin = 0
    while begin < len(text):
        found = cut.search(text, begin + PIECE)
        end = found.start() if found else len(text)
        yield text[begin:end]
        begin = end


def uint16(tokens):
    return struct.pack(f"<{len(tokens)}H", *tokens)


def chars_tokenizer(characters):
    if len(characters) >= 1 << 16:  # a token is 16 bits, and <|endoftext|> is one
        fail(f"the text has {len(characters):,} distinct characters, and --tokenizer chars takes at most 65,535; "
             "use bytes or gpt2")
    tokenizer = Tokenizer("chars", [c.encode() for c in sorted(characters)] + [END_OF_TEXT], len(characters))
    tokenizer.learn("", "".join(characters))
    return tokenizer


def encoding(pattern, ranks):
    return package("tiktoken").Encoding("prepare", pat_str=pattern, mergeable_ranks=ranks, special_tokens={})


def ranges_of(pattern):
    """The characters that a pattern matches, as the encoder sees them: the number of ranges, then each one's ends."""
    every_character = "".join(map(chr, (*range(0xD800), *range(0xE000, 0x110000))))
    matched = bytes(encoding(pattern, {bytes([b]): b for b in range(256)}).encode_ordinary(every_character)).decode()
    ranges = []
    for c in map(ord, matched):
        if ranges and ranges[-1] == c - 1:
            ranges[-1] = c
        else:
            ranges += c, c
    return struct.pack(f"<{1 + len(ranges)}I", len(ranges) // 2, *ranges)


def learn_bpe(pipe, size, threads):
    """Receives texts through the pipe, then None, and sends the tokens. Words are GPT-2's; the most frequent pair of
    neighbors becomes a token, then the next."""
    os.environ["RAYON_NUM_THREADS"] = str(threads)
    tokenizers = package("tokenizers")
    bytelevel = tokenizers.pre_tokenizers.ByteLevel
    model = tokenizers.Tokenizer(tokenizers.models.BPE())
    model.pre_tokenizer = bytelevel(add_prefix_space=False)
    model.train_from_iterator(iter(pipe.recv, None), tokenizers.trainers.BpeTrainer(
        vocab_size=size - 1, initial_alphabet=bytelevel.alphabet(), max_token_length=255, show_progress=False))
    # Each byte is written as a letter: a visible one as itself, the others, in their order, from U+0100 on.
    visible = [*range(0x21, 0x7f), *range(0xa1, 0xad), *range(0xae, 0x100)]
    others = [b for b in range(256) if b not in visible]
    byte_of = {chr(b): b for b in visible} | {chr(0x100 + i): b for i, b in enumerate(others)}
    learned = sorted(model.get_vocab(with_added_tokens=False).items(), key=lambda item: item[1])[256:]
    pipe.send([bytes([b]) for b in range(256)] + [bytes(map(byte_of.get, letters)) for letters, _ in learned])


def gpt2_tokens():
    try:
        return package("tiktoken").get_encoding("gpt2").decode_tokens_bytes(range(50257))
    except Exception as e:  # whatever a download can raise
        fail(f"tiktoken could not get GPT-2's vocabulary, from the network or from TIKTOKEN_CACHE_DIR: {reason(e)}")


def read_vocabulary(path):
    """The tokens of a tokenizer.bin, the number of the one that ends a text or -1, and the file's content."""
    most = 1 << 26  # bytes: 65,536 tokens take at most 2^24; the rest is for what may follow them
    try:
        with texts.open_file(path) as f:
            data = f.read(most + 1)
    except IsADirectoryError:
        fail(f"--tokenizer {path}: is a folder; name a file in it")
    except (FileNotFoundError, NotADirectoryError):
        fail(f"--tokenizer {path}: must be bytes, chars, bpe, gpt2 or an existing tokenizer.bin")
    magic, version, n, end_of_text, appendix = struct.unpack_from("<5i", data.ljust(HEADER_BYTES, b"\0"))
    if magic != TOKENIZER or version not in (1, 2):
        fail(f"{path}: not a tokenizer: it begins with {magic} and {version}, not with {TOKENIZER} and 1 or 2")
    tokens, at = [], HEADER_BYTES
    while len(tokens) < min(n, 1 << 16) and at < len(data) and 0 < data[at] < len(data) - at:
        tokens.append(data[at + 1:at + 1 + data[at]])
        at += 1 + data[at]
    if not tokens or len(tokens) != n or appendix < 0 or at + appendix != len(data) or len(data) > most:
        fail(f"{path}: damaged: its header says {count(n, 'token')} (at most 65,536) and {count(appendix, 'byte')} "
             f"after them; but of {count(len(data), 'byte')}, {count(len(tokens), 'token')} end at byte {at:,}")
    if version == 1:
        end_of_text = 50256
    return tokens, end_of_text if 0 <= end_of_text < n else -1, data


def find_tokenizer(name):
    """The tokenizer; None for chars and bpe, which are found in the text."""
    if name == "bytes":
        return Tokenizer(name, [bytes([i]) for i in range(256)] + [END_OF_TEXT], 256)
    if name == "gpt2":
        return Tokenizer(name, gpt2_tokens(), 50256)
    if name == "bpe":
        package("tokenizers"), package("tiktoken")
    return None if name in ("chars", "bpe") else Tokenizer(name, *read_vocabulary(name))


# ----------------------------------------------------------------------------------------------------------------------
# Processes


class Processes:
    """Processes that this one forks, each with a pipe. They end with it."""

    def __init__(self):
        self.pipes = {}

    def start(self, function, *arguments):
        """Calls function(pipe, *arguments) in another process."""
        def main():
            for s in SIGNALS:
                signal.signal(s, signal.SIG_DFL)  # only the parent says why all end
            signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)
            for pipe in *self.pipes, ours:  # so that theirs ends where the parent does
                pipe.close()
            with contextlib.suppress(EOFError, ConnectionError, MemoryError):
                function(theirs, *arguments)

        ours, theirs = multiprocessing.Pipe()
        process = multiprocessing.get_context("fork").Process(target=main, daemon=True)
        signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
        process.start()
        self.pipes[ours] = process
        signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)
        theirs.close()
        return ours

    def map(self, items):
        """What the processes send back for each item, in the order of the items."""
        items, idle, busy, done, turn = enumerate(items), list(self.pipes), {}, {}, 0
        number, item = next(items, (0, None))
        while item or busy or done:
            while item and idle and number < turn + 4 * len(self.pipes):
                pipe = idle.pop()
                pipe.send(item)
                busy[pipe] = number
                number, item = next(items, (0, None))
            for pipe in multiprocessing.connection.wait(busy):
                done[busy.pop(pipe)] = pipe.recv()
                idle.append(pipe)
            while turn in done:
                yield done.pop(turn)
                turn += 1

    def stop(self):
        for process in self.pipes.values():
            process.kill()
        for process in self.pipes.values():
            process.join()
        self.pipes = {}


def encode_batches(pipe, tokenizer):
    while True:
        pipe.send(tokenizer.encode(pipe.recv()))


def batches(parts, tokenizer, totals, val_tail):
    """The text of each split, in pieces that say whether a document begins with them, some of them at a time."""
    waiting = {split: ([], 0) for split in SPLITS}
    for split, d, begin, end in parts:
        text, total = d.text[begin:end], totals[split]
        total.characters += len(text)
        total.bytes += len(text.encode(*tokenizer.decoding))
        if len(text) == len(d.text):
            total.documents += 1
        else:
            total.parts += 1
            total.divided.add(d.place)
        begins_document = begin == 0 or not val_tail
        for piece in pieces(text, by_words=tokenizer.bpe):
            batch, length = waiting[split]
            batch.append((piece, begins_document))
            begins_document, length = False, length + len(piece)
            if length >= BATCH:
                yield split, batch
                batch, length = [], 0
            waiting[split] = batch, length
    yield from ((split, batch) for split, (batch, _) in waiting.items() if batch)


# ----------------------------------------------------------------------------------------------------------------------
# Files


class Output:
    """Writes files into a hidden folder in DIR, and moves them to DIR together."""

    def __init__(self, o):
        self.o, self.folder, self.manifest = o, o.out, {}
        try:
            self.made = texts.make_folder(self.folder)
            self.lock = texts.lock(self.folder)
            check_former_files(o)  # again, since another run may just have ended
            for name in os.listdir(self.folder):
                if re.fullmatch(r"\.prepare-\w{8}", name):  # of a run that was killed: one that lives has the lock
                    shutil.rmtree(os.path.join(self.folder, name), ignore_errors=True)
            self.aside = tempfile.mkdtemp(prefix=".prepare-", dir=self.folder)
        except OSError as e:
            fail(f"--out {self.folder}: cannot be written ({e.strerror})")

    @contextlib.contextmanager
    def writing(self, name):
        try:
            yield os.path.join(self.aside, name)
        except OSError as e:
            fail(f"{os.path.join(self.folder, name)} could not be written: {e.strerror}; "
                 f"nothing was changed in {self.folder}")

    def write(self, name, content):
        with self.writing(name) as path, open(path, "w+b", buffering=0) as f:
            write_all(f, content)
            self.finish(name, f)

    def finish(self, name, f):
        """Puts a file on the disk and into the manifest."""
        os.fsync(f.fileno())
        size, ends = f.seek(0, os.SEEK_END), b""
        for begin in 0, max(0, size - CHECKED_BYTES):
            f.seek(begin)
            ends += f.read(CHECKED_BYTES)
        self.manifest[name] = f"{name} {size} {zlib.crc32(ends):08x}\n"

    def move_all(self):
        """Killed at any instant, it leaves the old files, the new ones, or a manifest that says "incomplete"."""
        global outcome
        check_former_files(self.o)  # other programs do not heed the lock
        names = sorted(self.manifest)
        self.write("incomplete", b"incomplete\n")
        self.write("gpt2x3_manifest.txt", ("gpt2x3 manifest 1\n" + "".join(map(self.manifest.get, names))).encode())
        with signals_wait():
            try:
                self.move("incomplete", to="gpt2x3_manifest.txt")
                outcome = f"{self.folder} is incomplete; run again with --overwrite"
                for name in set(former_files(self.folder)) - {"gpt2x3_manifest.txt"}:
                    os.remove(os.path.join(self.folder, name))
                for name in names:
                    self.move(name, to=name)
                self.move("gpt2x3_manifest.txt", to="gpt2x3_manifest.txt")
                outcome = f"all files in {self.folder} are written"
            except OSError as e:
                fail(f"{e.filename2 or e.filename}: {e.strerror}; {outcome}")

    def move(self, name, to):
        os.replace(os.path.join(self.aside, name), os.path.join(self.folder, to))
        with contextlib.suppress(OSError):  # some file systems cannot
            os.fsync(self.lock)

    def clear(self):
        shutil.rmtree(self.aside, ignore_errors=True)
        texts.remove_empty(self.made)


class Shards:
    """The files of a split, each with so many tokens at most."""

    def __init__(self, output, split, most):
        self.output, self.split, self.most = output, split, most
        self.names, self.counts, self.f = [], [], None

    def start(self):
        self.names.append(f"{self.split}_{len(self.names):03d}.bin")
        self.counts.append(0)
        with self.output.writing(self.names[-1]) as path:
            self.f = open(path, "w+b", buffering=0)
            write_all(self.f, header(SHARD, 1, 0))

    def write(self, tokens):
        tokens = memoryview(tokens)
        while tokens:
            if not self.f:
                self.start()
            some = tokens[:2 * (self.most - self.counts[-1])]
            with self.output.writing(self.names[-1]):
                write_all(self.f, some)
            self.counts[-1] += len(some) // 2
            tokens = tokens[len(some):]
            if self.counts[-1] == self.most:
                self.finish()

    def finish(self):
        if self.f:
            with self.output.writing(self.names[-1]), self.f:
                self.f.seek(0)
                write_all(self.f, header(SHARD, 1, self.counts[-1]))
                self.output.finish(self.names[-1], self.f)
        self.f = None


def write_all(f, data):
    data = memoryview(data)
    while data:
        data = data[f.write(data):]


def former_files(folder):
    names = os.listdir(folder) if os.path.isdir(folder) else []
    ours = re.compile(r"(train|val)_.*\.bin|tokenizer\.bin|gpt2x3_manifest\.txt")
    return sorted(name for name in names if ours.fullmatch(name))


def check_former_files(o):
    for path in (os.path.join(o.out, name) for name in former_files(o.out)):
        if not o.overwrite:
            fail(f"{path} exists; give another --out, or --overwrite to remove all shards there")
        if os.path.isdir(path) and not os.path.islink(path):
            fail(f"{path} is a folder, which --overwrite does not remove")


# ----------------------------------------------------------------------------------------------------------------------


def options():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
                                allow_abbrev=False)
    p.error = fail
    p.add_argument("files", metavar="FILE", nargs="*", help="the text; UTF-8, unless for bytes")
    p.add_argument("--dataset", metavar="NAME", nargs="+", default=[],
                   help="instead of FILEs: a data set of Hugging Face's or a folder that is one, and its configuration")
    p.add_argument("--field", metavar="NAME", help="the text's field or column in JSON lines, Parquet and data sets "
                   "(default text); standard input is JSON lines, if it is given")
    p.add_argument("--separator", metavar="TEXT", help="what stands between the documents of a text file")
    p.add_argument("--tokenizer", metavar="NAME", required=True, help="bytes, chars, bpe, gpt2 or a file (see above)")
    p.add_argument("--vocab-size", metavar="N", type=int, help="tokens of bpe, bytes and <|endoftext|> included")
    p.add_argument("--out", metavar="DIR", required=True, help="where to write; made if need be")
    p.add_argument("--val", metavar="FILE", nargs="+", default=[], help="validation text (give it after the FILEs)")
    p.add_argument("--val-fraction", metavar="X", type=float,
                   help="the share of the text that is for validation; 0 for none (default 0.1)")
    p.add_argument("--val-tail", action="store_true", help="validation is the end of the text, as in nanoGPT")
    p.add_argument("--shard-tokens", metavar="N", type=int, default=100_000_000,
                   help="most tokens in one file (default 100,000,000, which is 200 MB)")
    p.add_argument("--processes", metavar="N", type=int, default=usable_cores(),
                   help="how many encode (default: this machine's cores)")
    p.add_argument("--overwrite", action="store_true",
                   help="remove all train_*.bin, val_*.bin, tokenizer.bin and gpt2x3_manifest.txt that DIR has")
    o = p.parse_args()

    if bool(o.files) == bool(o.dataset):
        fail("FILEs and --dataset: give one or the other" if o.files else "no text: name a FILE, or a --dataset")
    if len(o.dataset) > 2:
        fail(f"--dataset {' '.join(o.dataset)}: takes a name and a configuration")
    if o.val and (o.val_tail or o.val_fraction is not None):
        fail(f"{'--val-tail' if o.val_tail else '--val-fraction'}: not with --val, which names the validation text")
    if o.val_fraction is not None and not 0 <= o.val_fraction < 1:
        fail(f"--val-fraction {o.val_fraction}: must be at least 0 and less than 1")
    if o.separator == "" or o.processes < 1:
        fail("--separator: must not be empty" if o.separator == "" else f"--processes {o.processes}: must be 1 or more")
    if (o.tokenizer == "bpe") != (o.vocab_size is not None):
        fail("--vocab-size N (8192, say) goes with --tokenizer bpe, and with no other: give both")
    if o.vocab_size is not None and not 257 <= o.vocab_size <= 1 << 16:
        fail(f"--vocab-size {o.vocab_size}: must be from 257 to 65,536: 256 bytes, merges, and <|endoftext|>")
    if not 1 <= o.shard_tokens <= MOST_SHARD_TOKENS:
        fail(f"--shard-tokens {o.shard_tokens}: must be from 1 to {MOST_SHARD_TOKENS:,}, so that a file is under 2 GiB")
    check_former_files(o)
    return o


def usable_cores():
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def find_sources(o):
    """The sources of the training text, then those of the validation text, if that is given."""
    def find(names):
        return list(texts.find(names, o.field, o.separator and os.fsencode(o.separator), folder))

    folder = os.path.abspath(o.out)  # or what there is of it: for copies of what can be read only once
    while not os.path.isdir(folder):
        folder = os.path.dirname(folder)
    train, val = find(o.files), find(o.val)
    if o.dataset:
        wanted = ["train"] + ["validation"] * (not val and not o.val_tail and o.val_fraction is None)
        more = texts.data_set(o.dataset, wanted, o.field or "text", folder)
        train, val = more[:1], val + more[1:]
    for source in val:
        source.is_val = True
    formats = {source.kind == "text" for source in train + val}
    if o.field and formats == {True}:
        fail("--field: is for JSON lines, Parquet and data sets, and nothing of that kind is given")
    if o.separator and formats == {False}:
        fail("--separator: is for text, and no file of text is given")
    shards = {os.path.realpath(os.path.join(o.out, name)) for name in former_files(o.out)}
    given_as = {}
    for source in train + val:
        real = os.path.realpath(source.name)
        if real in shards:
            fail(f"{source.name} has the name of a shard in --out, which --overwrite removes; give another --out")
        if given_as.get(real, source.is_val) != source.is_val or real in given_as and not val and o.val_fraction != 0:
            fail(f"{source.name}: is given twice, so it could be both training and validation text")
        given_as[real] = source.is_val
    return train + val


def survey(corpus, tokenizer, o):
    """The lengths of the documents, in characters (of bytes: in bytes), and all characters. It ends when the documents
    are many, if nothing else is to be learned from them."""
    lengths, characters = array.array("Q"), set()
    for d in corpus.read("reading"):
        if o.tokenizer == "chars":
            characters.update(d.text)
        elif tokenizer and not tokenizer.encodes_any_text():
            tokenizer.learn(d.place, d.text)
        elif len(lengths) == MANY and not o.val_tail:
            break
        lengths.append(len(d.text))
    return lengths, characters


def bpe_tokenizer(corpus, rule, processes, o):
    pipe = processes.start(learn_bpe, o.vocab_size, o.processes)
    for split, d, begin, end in corpus.parts("learning", rule):
        if split == "train":
            for piece in pieces(d.text[begin:end], by_words=True):
                pipe.send(piece)
    pipe.send(None)
    tokens = pipe.recv()
    processes.stop()
    return Tokenizer("bpe", tokens + [END_OF_TEXT], len(tokens))


def prepare(o):
    tokenizer = find_tokenizer(o.tokenizer)
    sources = find_sources(o)
    has_val = any(source.is_val for source in sources)
    fraction = 0 if has_val else 0.1 if o.val_fraction is None else o.val_fraction
    corpus = Corpus(sources, tokenizer.decoding if tokenizer else ("utf-8", "strict"), o.separator)
    processes, output = Processes(), None
    try:
        lengths, characters = survey(corpus, tokenizer, o)
        rule = texts.split_rule(lengths, fraction, o.val_tail)
        if o.tokenizer == "chars":
            tokenizer = chars_tokenizer(characters)
        elif o.tokenizer == "bpe":
            tokenizer = bpe_tokenizer(corpus, rule, processes, o)
        n = min(o.processes, sum(source.size for source in sources) // (4 * BATCH))
        if n > 1 and tokenizer.decoding[0] != "latin-1":  # there is little to do for bytes
            for _ in range(n):
                processes.start(encode_batches, tokenizer)

        # All is written aside and moved into place at the end, so DIR never mixes two texts.
        output = Output(o)
        totals = {split: SimpleNamespace(documents=0, parts=0, divided=set(), characters=0, bytes=0)
                  for split in SPLITS}
        items = batches(corpus.parts("encoding", rule), tokenizer, totals, o.val_tail)
        shards = {split: Shards(output, split, o.shard_tokens) for split in SPLITS}
        for split, tokens in processes.map(items) if processes.pipes else map(tokenizer.encode, items):
            shards[split].write(tokens)
        for split in SPLITS:
            shards[split].finish()
            if not shards[split].counts and (split == "train" or has_val or fraction > 0):
                fail(f"there is no text for {SPLITS[split]}: what was given has "
                     f"{count(sum(total.bytes for total in totals.values()), 'byte')} in all")
        output.write("tokenizer.bin", tokenizer.content)
        output.move_all()
    except (EOFError, ConnectionError):
        fail("a process that this one started was killed; if for lack of memory, give fewer --processes")
    finally:
        corpus.bar.close()
        processes.stop()
        if output:
            output.clear()

    report(o, tokenizer, shards, totals, corpus)


def report(o, tokenizer, shards, totals, corpus):
    lines = [f"{os.path.join(o.out, name)}: {count(n, 'token')}"
             for split in SPLITS for name, n in zip(shards[split].names, shards[split].counts)]
    lines.append(f"{os.path.join(o.out, 'tokenizer.bin')}: a vocabulary of {count(len(tokenizer.tokens), 'token')}")
    if o.vocab_size and len(tokenizer.tokens) < o.vocab_size:
        lines.append(f"fewer than --vocab-size {o.vocab_size:,}: the training text has no more pairs to merge")
    characters = sum(total.characters for total in totals.values())
    for split, total in totals.items():
        tokens = sum(shards[split].counts)
        if tokens:
            of = total.divided.pop() if len(total.divided) == 1 else count(len(total.divided), "document")
            what = [count(total.documents, "document")] * (total.documents > 0) + [
                f"{count(total.parts, 'part')} of {of}"] * (total.parts > 0)
            lines.append(f"{SPLITS[split]}: {' and '.join(what)}, {100 * total.characters / characters:.1f} % of "
                         f"the text, {count(tokens, 'token')}, {total.bytes / tokens:.2f} bytes per token")
    if corpus.empty:
        lines.append(f"left out: {count(corpus.empty, 'empty document')}; {corpus.first_empty} is empty")
    say(lines)


def say(lines):
    try:
        print("\n".join(lines), flush=True)
    except OSError as e:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # Python flushes once more
        fail(f"standard output: {e.strerror}; {outcome}")


def stop(number, _=None):
    fail(f"{'interrupted' if number == signal.SIGINT else 'terminated'}; {outcome}")


@contextlib.contextmanager
def signals_wait():
    """Within, signals only leave a note."""
    noted = []
    for s in SIGNALS:
        signal.signal(s, lambda s, _: noted.append(s))
    yield
    for s in SIGNALS:
        signal.signal(s, stop)
    if noted:
        stop(noted[0])


def run(main, out_of_memory):
    """Calls main. What goes wrong, and signals, end it with one line."""
    for s in SIGNALS:
        signal.signal(s, stop)
    for stream in filter(None, (sys.stdout, sys.stderr)):
        stream.reconfigure(errors="backslashreplace")  # for names of files
    try:
        main()
    except OSError as e:
        fail(f"{e.filename}: {e.strerror}" if e.filename else str(e))
    except MemoryError:
        fail(f"not enough memory: {out_of_memory}")


if __name__ == "__main__":
    run(lambda: prepare(options()), "a document is held whole; split the largest")
