#!/usr/bin/env python3
"""Turns HellaSwag's questions into tokens for `train_gpt2 eval --hellaswag`, in llm.c's format.

    hellaswag.py hellaswag_val.jsonl questions.bin
    hellaswag.py hellaswag_val.jsonl questions.bin --tokenizer run/mine/tokenizer.bin

Each line of IN is a question as in https://github.com/rowanz/hellaswag: {"ctx": the beginning of a text, "endings": its
possible ends, "label": which of these is right, from 0}. A space goes between them. OUT's format is described in
train_gpt2.cpp, "HellaSwag and its like". llm.c takes questions with four endings only.
"""

import argparse
import json
import os
import sys

sys.dont_write_bytecode = True  # on a full disk, Python would cache half of one, and fail from then on
import prepare
from convert import read_file, write
from prepare import header, uint16
from texts import count, fail

QUESTIONS = 20240522  # magic number
BEGIN = 65535  # the first number of a question, so no token may be it


def question(where, line, tokenizer, index):
    try:
        data = json.loads(line)
        if not isinstance(data["endings"], list) or not isinstance(data["label"], (int, str)):
            raise TypeError("endings is a list, label a number")
        texts, label = [data["ctx"], *(" " + ending for ending in data["endings"])], int(data["label"])
        texts = [text.encode().decode(*tokenizer.decoding) for text in texts]
    except (ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError) as e:
        fail(f"{where}: must have ctx, endings and label ({type(e).__name__}: {e})")
    if not 0 <= label < len(texts) - 1:
        fail(f"{where}: the label is {label}, of {count(len(texts) - 1, 'ending')}")
    encoded = []
    for text in texts:
        if not tokenizer.encodes_any_text():
            tokenizer.learn(where, text)
        _, tokens = tokenizer.encode(("", [(text, False)]))
        if not tokens or uint16([BEGIN]) in (tokens[i:i + 2] for i in range(0, len(tokens), 2)):
            fail(f"{where}: {text!r} is empty, or has the token {BEGIN}, which the format cannot hold")
        encoded.append(tokens)
    size = 2 * 5 + sum(2 + len(tokens) for tokens in encoded)
    if size > BEGIN:
        fail(f"{where}: takes {count(size, 'byte')}; the format holds {BEGIN:,}")
    numbers = [BEGIN, size, index, label, len(texts) - 1]
    return uint16(numbers) + b"".join(uint16([len(tokens) // 2]) + tokens for tokens in encoded)


def options():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
                                allow_abbrev=False)
    p.error = fail
    p.add_argument("input", metavar="IN", help="HellaSwag's questions, a .jsonl file")
    p.add_argument("out", metavar="OUT", help="the file to write")
    p.add_argument("--tokenizer", metavar="NAME", default="gpt2",
                   help="the model's: gpt2, bytes or a tokenizer.bin (default: gpt2)")
    p.add_argument("--overwrite", action="store_true", help="replace OUT")
    o = p.parse_args()
    if os.path.exists(o.out) and os.path.exists(o.input) and os.path.samefile(o.input, o.out):
        fail(f"{o.out} is the input; give another OUT")
    if os.path.lexists(o.out) and (os.path.isdir(o.out) or not o.overwrite):
        fail(f"{o.out} exists; give another OUT, or --overwrite to replace it")
    if o.tokenizer in ("chars", "bpe"):
        fail(f"--tokenizer {o.tokenizer}: name the tokenizer.bin of the model")
    return o


def main():
    o = options()
    tokenizer = prepare.find_tokenizer(o.tokenizer)
    lines = [(i, line) for i, line in enumerate(read_file(o.input).split(b"\n"), start=1) if line.strip()]
    if not 1 <= len(lines) <= BEGIN:
        fail(f"{o.input}: has {count(len(lines), 'question')}; the format holds from 1 to {BEGIN:,}")
    questions = [question(f"{o.input}, line {i:,}", line, tokenizer, index) for index, (i, line) in enumerate(lines)]
    head = header(QUESTIONS, 1, len(questions), max(map(len, questions)), tokenizer.fingerprint())
    write({o.out: [head, *questions]}, [])
    prepare.say([f"{o.out}: {count(len(questions), 'question')}, {sum(map(len, questions)) // 2:,} numbers"])


if __name__ == "__main__":
    prepare.run(main, "the questions are held whole")
