#!/usr/bin/env python3
"""Turns text into what train_gpt2 reads: DIR/train_000.bin ..., DIR/val_000.bin ... and DIR/tokenizer.bin.

    prepare.py --tokenizer bytes --out data letters.txt
    prepare.py --tokenizer gpt2 --out data novels/train/*.txt --val novels/val/*.txt
    prepare.py --tokenizer data/tokenizer.bin --out more diary.txt

    bytes   one token for each of the 256 bytes; takes any file
    chars   one token for each distinct character of the text
    bpe     byte pair encoding, learned from the training text: the 256 bytes, then merges in the order they were
            learned, --vocab-size tokens in all; needs tokenizers and tiktoken
    gpt2    GPT-2's byte pair encoding, 50,257 tokens; needs tiktoken
    FILE    the vocabulary of a tokenizer.bin, llm.c's too: of bytes, of characters, or byte-level BPE (needs tiktoken)

Each file is a document, and a document begins with the token <|endoftext|>; those letters in a text are only text.

Without --val, about a tenth of the text becomes the validation set: whole files, spread over the list, small and large
ones alike. Files too large for that, or a single file, are divided into up to 32 stretches, and the last tenth of each
is taken; a part begins with a paragraph or line if one begins near. Parts that are neighbors in a shard come from
different places, so each begins with <|endoftext|>, in both sets. With --val-tail, the validation set is the end of
the text, as in nanoGPT, and continues the training set, without a new <|endoftext|>.

DIR/gpt2x3_manifest.txt lists the other files with sizes and checksums; it says "incomplete" while they are replaced.
"""

import argparse
import bisect
import contextlib
import fcntl
import importlib
import itertools
import os
import re
import shutil
import signal
import stat
import struct
import sys
import tempfile
import zlib
from types import SimpleNamespace

END_OF_TEXT = b"<|endoftext|>"  # the last token of bytes, chars and gpt2
SHARD, TOKENIZER = 20240520, 20240328  # magic numbers
HEADER_BYTES = 1024
MOST_SHARD_TOKENS = (2**31 - 1 - HEADER_BYTES) // 2  # llm.c seeks in shards with an int
# GPT-2 merges bytes within these words only.
GPT2_WORDS = r"""'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s"""
CHECKED_BYTES = 1 << 16  # at each end of a file, for the manifest
outcome = "nothing was written"  # what to say if a signal ends the program


def shown(text):
    """The text with its control characters escaped: names may hold them."""
    return re.sub(r"[\x00-\x1f\x7f-\x9f]", lambda c: repr(c[0])[1:-1], text)


def fail(message):
    sys.exit("error: " + shown(message))


def count(n, noun):
    return f"{n:,} {noun}{'s' * (n != 1)}"


def read_file(path, most=-1):
    if os.path.isdir(path):
        fail(f"{path}: is a folder; name files in it")
    # O_NONBLOCK: a pipe is refused, even one without a writer
    with open(path, "rb", opener=lambda name, flags: os.open(name, flags | os.O_NONBLOCK)) as f:
        if not stat.S_ISREG(os.fstat(f.fileno()).st_mode):
            fail(f"{path}: not a regular file")
        return f.read(most)


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

    def learn(self, path, text):
        """Finds the tokens of each character: its own, or those of its bytes."""
        if self.bpe or self.decoding[0] == "latin-1":  # these encode any text
            return
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
            fail(f"{path}: line {line:,}, column {column:,}: {text[at]!r} (U+{ord(text[at]):04X}) is not in the "
                 f"vocabulary of {self.name}")

    def encode(self, text):
        if self.bpe:
            yield from encode_gpt2(self.bpe, text)
            return
        for begin in range(0, len(text), 1 << 20):
            chunk = text[begin:begin + (1 << 20)]
            chunk = chunk if self.name == "bytes" else chunk.translate(self.values)
            yield chunk.encode("utf-16-le", "surrogatepass")


def uint16(tokens):
    return struct.pack(f"<{len(tokens)}H", *tokens)


def chars_tokenizer(characters):
    if len(characters) >= 1 << 16:  # a token is 16 bits, and <|endoftext|> is one
        fail(f"the text has {len(characters):,} distinct characters, and --tokenizer chars takes at most 65,535; "
             "use bytes or gpt2")
    tokenizer = Tokenizer("chars", [c.encode() for c in sorted(characters)] + [END_OF_TEXT], len(characters))
    tokenizer.learn("", "".join(characters))
    return tokenizer


def package(name):
    """An optional one."""
    try:
        return importlib.import_module(name)
    except ImportError:
        fail(f"this needs {name}: python3 -m pip install {name}")


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


def learn_bpe(texts, size):
    """A vocabulary of these texts with size tokens. Words are GPT-2's; the pair of neighbors that is most frequent
    becomes a token, then the next."""
    tokenizers = package("tokenizers")
    bytelevel = tokenizers.pre_tokenizers.ByteLevel
    model = tokenizers.Tokenizer(tokenizers.models.BPE())
    model.pre_tokenizer = bytelevel(add_prefix_space=False)
    model.train_from_iterator(texts, tokenizers.trainers.BpeTrainer(
        vocab_size=size - 1, initial_alphabet=bytelevel.alphabet(), max_token_length=255, show_progress=False))
    # Each byte is written as a letter: a visible one as itself, the others, in their order, from U+0100 on.
    visible = [*range(0x21, 0x7f), *range(0xa1, 0xad), *range(0xae, 0x100)]
    others = [b for b in range(256) if b not in visible]
    byte_of = {chr(b): b for b in visible} | {chr(0x100 + i): b for i, b in enumerate(others)}
    learned = sorted(model.get_vocab(with_added_tokens=False).items(), key=lambda item: item[1])[256:]
    tokens = [bytes([b]) for b in range(256)] + [bytes(map(byte_of.get, letters)) for letters, _ in learned]
    return Tokenizer("bpe", tokens + [END_OF_TEXT], len(tokens))


def gpt2_tokens():
    try:
        return package("tiktoken").get_encoding("gpt2").decode_tokens_bytes(range(50257))
    except Exception as e:  # whatever a download can raise
        reason = " ".join(str(e).split())[:200]
        fail(f"tiktoken could not get GPT-2's vocabulary, from the network or from TIKTOKEN_CACHE_DIR: {reason}")


def pieces(text):
    """Some 64k characters each, so that threads share the work and only a batch is held as Python integers. A newline
    after a visible character always begins a new word of GPT-2's pattern: no token would span the cut."""
    begin = 0
    while begin < len(text):
        newline = re.compile(r"(?<=\S)\n").search(text, begin + (1 << 16))
        end = newline.start() if newline else len(text)
        yield text[begin:end]
        begin = end


def encode_gpt2(bpe, text):
    rest = pieces(text)
    for batch in iter(lambda: list(itertools.islice(rest, 256)), []):
        yield from map(uint16, bpe.encode_ordinary_batch(batch, num_threads=os.cpu_count() or 1))


def read_tokenizer(path):
    most = 1 << 26  # bytes: 65,536 tokens take at most 2^24; the rest is for what may follow them
    try:
        data = read_file(path, most + 1)
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
    return Tokenizer(path, tokens, end_of_text if 0 <= end_of_text < n else -1, data)


def find_tokenizer(name):
    """The tokenizer; None for chars and bpe, which are found in the text."""
    if name == "bytes":
        return Tokenizer(name, [bytes([i]) for i in range(256)] + [END_OF_TEXT], 256)
    if name == "gpt2":
        return Tokenizer(name, gpt2_tokens(), 50256)
    return None if name in ("chars", "bpe") else read_tokenizer(name)


# ----------------------------------------------------------------------------------------------------------------------
# Texts


def read(path, decoding):
    """The text, and a stamp that tells whether it changes later."""
    data = read_file(path)
    try:
        return data.decode(*decoding), (len(data), zlib.crc32(data))
    except UnicodeDecodeError as e:
        fail(f"{path}: not UTF-8 at byte {e.start:,}; convert it, or use --tokenizer bytes")


def cut(documents, bounds, reach=0):
    """Divides documents, taken as one text, at these bounds into parts, in turn for training and for validation. A
    document has its own cuts, the first at 0 if it begins with validation, and reach, how far each may still move."""
    position = 0
    for d in documents:
        begins_with_validation = bisect.bisect_right(bounds, position) % 2 == 1
        d.cuts = [0] * begins_with_validation + [b - position for b in bounds if position < b < position + d.length]
        d.reach = reach
        position += d.length


def cut_spread(documents, fraction):
    """Takes whole documents for validation, and the ends of stretches of those that are too long for that."""
    smaller_set = min(fraction, 1 - fraction) * sum(d.length for d in documents)
    for most in 1.5 * smaller_set, 0.5 * smaller_set:  # the second always comes near enough
        cut(documents, [])
        due = 0
        for d in sorted(documents, key=lambda d: d.length.bit_length()):  # some of each size, large or small
            if d.length <= most:
                due += fraction * d.length
                if due >= d.length / 2:
                    due -= d.length
                    d.cuts = [0]
        if abs(due) <= 0.4 * smaller_set:
            break
    long = [d for d in documents if d.length > most]
    length = sum(d.length for d in long)
    # Parts of 4096 characters or more, in up to 32 stretches; shorter ones where there would be fewer than 10.
    smaller_part = int(min(fraction, 1 - fraction) * length)
    n = max(1, min(32, max(smaller_part // 4096, min(10, smaller_part // 512))))
    ends = [length * i // n for i in range(n + 1)]
    bounds = [b for begin, end in zip(ends, ends[1:]) for b in (begin + int((end - begin) * (1 - fraction)), end)]
    cut(long, bounds, reach=min(smaller_part // n // 8, 4096))


def nearest_beginning(text, at, reach):
    """That of a paragraph within reach, else of a line or word, else of a UTF-8 character."""
    low, high = max(at - reach, 0), min(at + reach, len(text))
    for mark in "\n\n", "\n", " ":
        before, after = text.rfind(mark, low, at), text.find(mark, max(at - len(mark), 0), high)
        found = [i + len(mark) for i in (before, after) if i >= 0] + [i for i in (0, len(text)) if low <= i <= high]
        if found:
            return min(found, key=lambda i: abs(i - at))
    while at < high and "\x80" <= text[at] < "\xc0":  # in text of bytes, inside a character
        at += 1
    return at


def parts(documents, split, decoding):
    """The texts of a split, and whether each is the beginning of its document."""
    for d in documents:
        if split == "train" and d.cuts == [0] or split == "val" and not d.cuts:
            continue
        text, stamp = read(d.path, decoding)  # anew: at no time is more than one document held
        if stamp != d.stamp:
            fail(f"{d.path}: changed between two readings; it has to be a file that stays as it is")
        edges = [0, *(nearest_beginning(text, at, d.reach) for at in d.cuts), d.length]
        d.parts = [(begin, end) for begin, end in zip(edges, edges[1:])][split == "val"::2]
        for begin, end in d.parts:
            if begin < end:
                yield text[begin:end], begin == 0


def token_values(documents, split, tokenizer, val_tail):
    """The tokens of a split, part by part."""
    for text, is_beginning in parts(documents, split, tokenizer.decoding):
        if tokenizer.end_of_text >= 0 and (is_beginning or not val_tail):
            yield uint16([tokenizer.end_of_text])
        yield from tokenizer.encode(text)


# ----------------------------------------------------------------------------------------------------------------------
# Files


class Output:
    """Writes files into a hidden folder in DIR, and moves them to DIR together."""

    def __init__(self, o):
        self.folder, self.manifest = o.out, {}
        try:
            os.makedirs(self.folder, exist_ok=True)
            self.lock = os.open(self.folder, os.O_RDONLY | os.O_DIRECTORY)
            try:
                fcntl.flock(self.lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                fail(f"--out {self.folder}: another process is writing there; wait for it, or give another --out")
            check_former_files(o)  # again, since another run may just have ended
            for name in os.listdir(self.folder):
                if re.fullmatch(r"\.prepare-\w{8}", name):  # of a run that was killed: one that lives has the lock
                    shutil.rmtree(os.path.join(self.folder, name), ignore_errors=True)
            self.aside = tempfile.mkdtemp(prefix=".prepare-", dir=self.folder)
        except OSError as e:
            fail(f"--out {self.folder}: cannot be written ({e.strerror})")

    def write(self, name, head, body):
        try:
            with open(os.path.join(self.aside, name), "wb") as f:
                f.write(head)
                f.write(body)
                f.flush()
                os.fsync(f.fileno())
        except OSError as e:
            fail(f"{os.path.join(self.folder, name)} could not be written: {e.strerror}; "
                 f"nothing was changed in {self.folder}")
        ends = head + (body if len(body) < 2 * CHECKED_BYTES else body[:CHECKED_BYTES] + body[-CHECKED_BYTES:])
        check = zlib.crc32(ends[:CHECKED_BYTES] + ends[-CHECKED_BYTES:])
        self.manifest[name] = f"{name} {len(head) + len(body)} {check:08x}\n"

    def write_shards(self, split, values, shard_tokens):
        """Writes split_000.bin and so on; returns their numbers of tokens."""
        counts, size, waiting = [], 2 * shard_tokens, bytearray()

        def write_one():
            body = waiting[:size]
            del waiting[:size]
            self.write(f"{split}_{len(counts):03d}.bin", header(SHARD, 1, len(body) // 2), body)
            counts.append(len(body) // 2)

        for some in values:
            waiting += some
            while len(waiting) >= size:
                write_one()
        if waiting:
            write_one()
        return counts

    def move_all(self):
        """Killed at any instant, it leaves the old files, the new ones, or a manifest that says "incomplete"."""
        global outcome
        names = sorted(self.manifest)
        self.write("incomplete", b"", b"incomplete\n")
        self.write("gpt2x3_manifest.txt", b"gpt2x3 manifest 1\n", "".join(map(self.manifest.get, names)).encode())
        signals = []  # they wait until all is done
        for s in SIGNALS:
            signal.signal(s, lambda s, _: signals.append(s))
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
        for s in SIGNALS:
            signal.signal(s, stop)
        if signals:
            stop(signals[0])

    def move(self, name, to):
        os.replace(os.path.join(self.aside, name), os.path.join(self.folder, to))
        with contextlib.suppress(OSError):  # some file systems cannot
            os.fsync(self.lock)


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
    p.add_argument("files", metavar="FILE", nargs="+", help="the text, UTF-8 unless for bytes")
    p.add_argument("--tokenizer", metavar="NAME", required=True, help="bytes, chars, bpe, gpt2 or a file (see above)")
    p.add_argument("--vocab-size", metavar="N", type=int, help="tokens of bpe, bytes and <|endoftext|> included")
    p.add_argument("--out", metavar="DIR", required=True, help="where to write; made if need be")
    split = p.add_mutually_exclusive_group()
    split.add_argument("--val", metavar="FILE", nargs="+", default=[], help="validation text (give it after the FILEs)")
    split.add_argument("--val-fraction", metavar="X", type=float, default=0.1,
                       help="the share of the text that is for validation; 0 for none (default 0.1)")
    p.add_argument("--val-tail", action="store_true", help="validation is the end of the text, as in nanoGPT")
    p.add_argument("--shard-tokens", metavar="N", type=int, default=100_000_000,
                   help="most tokens in one file (default 100,000,000, which is 200 MB)")
    p.add_argument("--overwrite", action="store_true",
                   help="remove all train_*.bin, val_*.bin, tokenizer.bin and gpt2x3_manifest.txt that DIR has")
    o = p.parse_args()

    if not 0 <= o.val_fraction < 1:
        fail(f"--val-fraction {o.val_fraction}: must be at least 0 and less than 1")
    if (o.tokenizer == "bpe") != (o.vocab_size is not None):
        fail("--tokenizer bpe and --vocab-size N (8192, say) take each other")
    if o.vocab_size is not None and not 257 <= o.vocab_size <= 1 << 16:
        fail(f"--vocab-size {o.vocab_size}: must be from 257 to 65,536: 256 bytes, merges, and <|endoftext|>")
    if o.val and o.val_tail:
        fail("--val-tail: not with --val, which names the validation text")
    if not 1 <= o.shard_tokens <= MOST_SHARD_TOKENS:
        fail(f"--shard-tokens {o.shard_tokens}: must be from 1 to {MOST_SHARD_TOKENS:,}, so that a file is under 2 GiB")
    check_former_files(o)
    shards = {os.path.realpath(os.path.join(o.out, name)) for name in former_files(o.out)}
    given_as = {}
    for path, split in [(path, "FILE") for path in o.files] + [(path, "--val") for path in o.val]:
        real = os.path.realpath(path)
        if real in shards:
            fail(f"{path} has the name of a shard in --out, which --overwrite removes; give another --out")
        if given_as.get(real, split) != split or real in given_as and not o.val and o.val_fraction > 0:
            fail(f"{path}: is given twice, so it could be both training and validation text")
        given_as[real] = split
    return o


def prepare(o):
    # First reading: lengths, in characters (bytes are some, too), and the alphabet.
    tokenizer = find_tokenizer(o.tokenizer)
    characters, text_bytes, documents = set(), 0, []
    for path in o.files + o.val:
        text, stamp = read(path, tokenizer.decoding if tokenizer else ("utf-8", "strict"))
        if tokenizer:
            tokenizer.learn(path, text)
        elif o.tokenizer == "chars":
            characters.update(text)
        text_bytes += stamp[0]
        documents.append(SimpleNamespace(path=path, length=len(text), stamp=stamp))
    train = [d for d in documents[:len(o.files)] if d.length]
    val = [d for d in documents[len(o.files):] if d.length]
    cut(val, [0])
    cut(train, [])
    if o.val_tail:
        cut(train, [int(sum(d.length for d in train) * (1 - o.val_fraction))])
    elif not o.val and o.val_fraction > 0:
        cut_spread(train, o.val_fraction)
    no_training, no_validation = all(d.cuts == [0] for d in train), not any(d.cuts for d in train + val)
    if no_training or no_validation and (o.val or o.val_fraction > 0):
        fail(f"there is no text for {'training' if no_training else 'validation'}: what was given has "
             f"{count(text_bytes, 'byte')} in all")

    if o.tokenizer == "bpe":
        texts = parts(train, "train", ("utf-8", "strict"))
        tokenizer = learn_bpe((piece for text, _ in texts for piece in pieces(text)), o.vocab_size)
    elif o.tokenizer == "chars":
        tokenizer = chars_tokenizer(characters)

    # Later readings. All is written aside and moved into place at the end, so DIR never mixes two texts.
    output, counts = Output(o), {}
    try:
        for split in "train", "val":
            values = token_values(train + val, split, tokenizer, o.val_tail)
            counts[split] = output.write_shards(split, values, o.shard_tokens)
        output.write("tokenizer.bin", tokenizer.content, b"")
        output.move_all()
    finally:
        shutil.rmtree(output.aside, ignore_errors=True)

    lines = [f"{os.path.join(o.out, f'{split}_{i:03d}.bin')}: {count(n, 'token')}"
             for split, numbers in counts.items() for i, n in enumerate(numbers)]
    lines.append(f"{os.path.join(o.out, 'tokenizer.bin')}: a vocabulary of {count(len(tokenizer.tokens), 'token')}, "
                 f"{text_bytes / sum(map(sum, counts.values())):.2f} bytes of text per token")
    if o.vocab_size and len(tokenizer.tokens) < o.vocab_size:
        lines.append(f"fewer than --vocab-size {o.vocab_size:,}: the training text has no more pairs to merge")
    if counts["val"] and not o.val:
        lines.append("validation: " + summary(train, o.val_tail))
    lines += [f"left out: {d.path} is empty" for d in documents if not d.length]
    try:
        print("\n".join(lines), flush=True)
    except OSError as e:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # Python flushes once more
        fail(f"standard output: {e.strerror}; {outcome}")


def summary(documents, val_tail):
    """What was taken for validation."""
    whole = [d for d in documents if d.cuts == [0]]
    cut_ones = [d for d in documents if d.cuts not in ([], [0])]
    lengths = [end - begin for d in whole + cut_ones for begin, end in d.parts if begin < end]
    taken = [f"{len(whole):,} of {count(len(documents), 'file')}"] * bool(whole)
    if cut_ones:
        of = cut_ones[0].path if len(cut_ones) == 1 else count(len(cut_ones), "file")
        taken.append(f"{count(len(lengths) - len(whole), 'part')} of {of}")
    share = f"{100 * sum(lengths) / sum(d.length for d in documents):.1f} % of the text"
    return f"the last {share}" if val_tail else f"{' and '.join(taken)}, {share}"


def stop(number, _=None):
    fail(f"{'interrupted' if number == signal.SIGINT else 'terminated'}; {outcome}")


if __name__ == "__main__":
    SIGNALS = [s for s in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP) if signal.getsignal(s) != signal.SIG_IGN]
    for s in SIGNALS:
        signal.signal(s, stop)
    for stream in filter(None, (sys.stdout, sys.stderr)):
        stream.reconfigure(errors="backslashreplace")  # for names of files
    try:
        prepare(options())
    except OSError as e:
        fail(f"{e.filename}: {e.strerror}" if e.filename else str(e))
    except MemoryError:
        fail("not enough memory: a document is held whole; split the largest")
