#!/usr/bin/env python3
"""Turns text into what train_gpt2 reads: DIR/train_000.bin ..., DIR/val_000.bin ... and DIR/tokenizer.bin.

    prepare.py --tokenizer bytes --out data letters.txt
    prepare.py --tokenizer gpt2 --out data novels/train/*.txt --val novels/val/*.txt

    bytes   one token for each of the 256 bytes; takes any file
    chars   one token for each distinct character of the text
    gpt2    GPT-2's byte pair encoding, 50,257 tokens; needs tiktoken

Each file is a document, and a document begins with the token <|endoftext|>; those letters in a text are only text.
Without --val, the files are taken as one long text in the order given, and its last tenth is the validation set. So
the later files go there whole, and the one that the cut falls into continues there, without a new <|endoftext|>.
"""

import argparse
import itertools
import os
import re
import signal
import struct
import sys
import tempfile
from array import array

END_OF_TEXT = b"<|endoftext|>"  # the last token of all three vocabularies
SHARD, TOKENIZER = 20240520, 20240328  # magic numbers
MOST_SHARD_TOKENS = (2**31 - 1 - 1024) // 2  # llm.c seeks in shards with an int


def fail(message):
    sys.exit(f"error: {message}")


# ----------------------------------------------------------------------------------------------------------------------
# Tokenizers: each gives the bytes of its tokens, and a function from a text to the uint16 values of its tokens


def uint16(tokens):
    values = array("H", tokens)
    if sys.byteorder == "big":
        values.byteswap()
    return values.tobytes()


def bytes_tokenizer():
    def encode(data):
        values = bytearray(2 * len(data))
        values[::2] = data  # low bytes; the high ones are 0
        return values

    return [bytes([i]) for i in range(256)] + [END_OF_TEXT], encode


def chars_tokenizer(characters):
    if len(characters) >= 1 << 16:  # a token is 16 bits, and <|endoftext|> is one
        fail(f"the text has {len(characters):,} distinct characters, and --tokenizer chars takes at most 65,535; "
             "use bytes or gpt2")
    tokens = sorted(characters)
    index = {c: i for i, c in enumerate(tokens)}
    return [c.encode() for c in tokens] + [END_OF_TEXT], lambda text: uint16(map(index.__getitem__, text))


def gpt2_tokenizer():
    try:
        import tiktoken
    except ImportError:
        fail("--tokenizer gpt2 needs tiktoken: python3 -m pip install tiktoken")
    try:
        bpe = tiktoken.get_encoding("gpt2")
    except Exception as e:  # whatever a download can raise
        reason = " ".join(str(e).split())[:200]
        fail(f"tiktoken could not get GPT-2's vocabulary, from the network or from TIKTOKEN_CACHE_DIR: {reason}")

    def pieces(text):
        # Some 64k characters each, so that threads share the work and only a batch is held as Python integers. A
        # newline after a visible character always begins a new word of GPT-2's pattern: no token would span the cut.
        begin = 0
        while begin < len(text):
            newline = re.compile(r"(?<=\S)\n").search(text, begin + (1 << 16))
            end = newline.start() if newline else len(text)
            yield text[begin:end]
            begin = end

    def encode(text):
        values, rest = bytearray(), pieces(text)
        while True:
            batch = list(itertools.islice(rest, 256))
            if not batch:
                return values
            for tokens in bpe.encode_ordinary_batch(batch, num_threads=os.cpu_count() or 1):
                values += uint16(tokens)

    return [bpe.decode_single_token_bytes(i) for i in range(bpe.n_vocab)], encode


# ----------------------------------------------------------------------------------------------------------------------
# Texts


def read(path, as_bytes):
    if os.path.exists(path) and not os.path.isfile(path) and not os.path.isdir(path):  # a pipe, say
        fail(f"{path}: not a regular file; it is read twice")
    with open(path, "rb") as f:
        data = f.read()
    if as_bytes:
        return data
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as e:
        fail(f"{path}: not UTF-8 at byte {e.start:,}; convert it, or use --tokenizer bytes")


def token_values(documents, begin, end, as_bytes, encode, end_of_text):
    """The tokens of the text from position begin to end of all documents, a list of (path, length)."""
    position = 0
    for path, length in documents:
        first, last = max(begin - position, 0), min(end - position, length)
        position += length
        if first >= last:
            continue
        text = read(path, as_bytes)  # anew: at no time is more than one document held
        if len(text) != length:
            fail(f"{path}: another length at the second reading; it has to be a file that stays as it is")
        if first == 0:
            yield uint16([end_of_text])
        yield encode(text[first:last])


# ----------------------------------------------------------------------------------------------------------------------
# Files


def write(path, header, body):
    with open(path, "wb") as f:
        f.write(struct.pack("<256i", *header, *[0] * (256 - len(header))))
        f.write(body)
        f.flush()
        os.fsync(f.fileno())


def write_shards(folder, split, values, shard_tokens):
    """Writes split_000.bin and so on; returns their numbers of tokens."""
    counts, size, waiting = [], 2 * shard_tokens, bytearray()

    def write_one():
        body = waiting[:size]
        del waiting[:size]
        write(os.path.join(folder, f"{split}_{len(counts):03d}.bin"), [SHARD, 1, len(body) // 2], body)
        counts.append(len(body) // 2)

    for some in values:
        waiting += some
        while len(waiting) >= size:
            write_one()
    if waiting:
        write_one()
    return counts


def former_files(folder):
    names = os.listdir(folder) if os.path.isdir(folder) else []
    return sorted(name for name in names if re.fullmatch(r"(train|val)_.*\.bin|tokenizer\.bin", name))


# ----------------------------------------------------------------------------------------------------------------------


def options():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
                                allow_abbrev=False)
    p.error = fail
    p.add_argument("files", metavar="FILE", nargs="+", help="the text, UTF-8 unless for bytes")
    p.add_argument("--tokenizer", choices=["bytes", "chars", "gpt2"], required=True)
    p.add_argument("--out", metavar="DIR", required=True, help="where to write; made if need be")
    split = p.add_mutually_exclusive_group()
    split.add_argument("--val", metavar="FILE", nargs="+", default=[], help="validation text (give it after the FILEs)")
    split.add_argument("--val-fraction", metavar="X", type=float, default=0.1,
                       help="the share of the text that is its validation tail; 0 for none (default 0.1)")
    p.add_argument("--shard-tokens", metavar="N", type=int, default=100_000_000,
                   help="most tokens in one file (default 100,000,000, which is 200 MB)")
    p.add_argument("--overwrite", action="store_true", help="remove all train_*.bin and val_*.bin that DIR has")
    o = p.parse_args()

    if not 0 <= o.val_fraction < 1:
        fail(f"--val-fraction {o.val_fraction}: must be at least 0 and less than 1")
    if not 1 <= o.shard_tokens <= MOST_SHARD_TOKENS:
        fail(f"--shard-tokens {o.shard_tokens}: must be from 1 to {MOST_SHARD_TOKENS:,}, so that a file is under 2 GiB")
    for path in o.val:
        if os.path.realpath(path) in map(os.path.realpath, o.files):
            fail(f"{path}: is both training and validation text")
    former = former_files(o.out)
    if former and not o.overwrite:
        fail(f"{os.path.join(o.out, former[0])} exists; give another --out, or --overwrite to remove all shards there")
    shards = {os.path.realpath(os.path.join(o.out, name)) for name in former}
    for path in o.files + o.val:
        if os.path.realpath(path) in shards:
            fail(f"{path} has the name of a shard in --out, which --overwrite removes; give another --out")
    return o


def prepare(o):
    # First reading: lengths, in bytes or characters, and the alphabet.
    as_bytes = o.tokenizer == "bytes"
    characters, text_bytes, splits, empty = set(), 0, [], []
    for paths in o.files, o.val:
        documents = []
        for path in paths:
            text = read(path, as_bytes)
            if o.tokenizer == "chars":
                characters.update(text)
            if text:
                documents.append((path, len(text)))
                text_bytes += os.path.getsize(path)
            else:
                empty.append(path)
        splits.append((documents, sum(length for _, length in documents)))

    (train, n_train), (val, n_val) = splits
    if o.val:
        ranges = [("train", train, 0, n_train), ("val", val, 0, n_val)]
    else:
        cut = int(n_train * (1 - o.val_fraction))
        ranges = [("train", train, 0, cut), ("val", train, cut, n_train)]
    for split, _, begin, end in ranges:
        if begin == end and (split == "train" or o.val or o.val_fraction > 0):
            fail(f"there is no text for {'training' if split == 'train' else 'validation'}: what was given has "
                 f"{text_bytes} bytes in all")

    if o.tokenizer == "bytes":
        vocabulary, encode = bytes_tokenizer()
    elif o.tokenizer == "chars":
        vocabulary, encode = chars_tokenizer(characters)
    else:
        vocabulary, encode = gpt2_tokenizer()
    end_of_text = len(vocabulary) - 1

    # Second reading. All is written aside and moved into place at the end, so DIR never mixes two texts.
    try:
        os.makedirs(o.out, exist_ok=True)
        folder = tempfile.TemporaryDirectory(prefix=".prepare-", dir=o.out)
    except OSError as e:
        fail(f"--out {o.out}: cannot be written ({e.strerror})")
    with folder as aside:
        counts = {}
        for split, documents, begin, end in ranges:
            values = token_values(documents, begin, end, as_bytes, encode, end_of_text)
            counts[split] = write_shards(aside, split, values, o.shard_tokens)
        body = b"".join(bytes([len(token)]) + token for token in vocabulary)
        write(os.path.join(aside, "tokenizer.bin"), [TOKENIZER, 2, len(vocabulary), end_of_text, 0], body)
        for name in former_files(o.out):
            os.remove(os.path.join(o.out, name))
        for name in sorted(os.listdir(aside)):
            os.replace(os.path.join(aside, name), os.path.join(o.out, name))

    for split, numbers in counts.items():
        for i, n in enumerate(numbers):
            print(f"{os.path.join(o.out, f'{split}_{i:03d}.bin')}: {n:,} tokens")
    print(f"{os.path.join(o.out, 'tokenizer.bin')}: a vocabulary of {len(vocabulary):,} tokens, "
          f"{text_bytes / sum(map(sum, counts.values())):.2f} bytes of text per token")
    for path in empty:
        print(f"left out: {path} is empty")


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("error: terminated; nothing was written"))  # with all cleaned up
    sys.stdout.reconfigure(errors="backslashreplace")  # for names of files
    sys.stderr.reconfigure(errors="backslashreplace")
    try:
        prepare(options())
    except OSError as e:
        fail(f"{e.filename}: {e.strerror}" if e.filename else str(e))
    except MemoryError:
        fail("not enough memory: a document is held whole; split the largest")
    except KeyboardInterrupt:
        fail("interrupted; nothing was written")
