#!/usr/bin/env python3
"""Turns a .cu file into C++ for cuda_emulator.h.

    python3 translate.py mine.cu mine.cpp

Rewritten, each in its place so that line numbers stay:
    kernel<64, X><<<grid, block, shared, stream>>>(arguments);      a call of emulator::Launch
    __shared__ float tile[32][33];  extern __shared__ X memory[];   references into the block's shared memory
    #include <cuda_runtime.h> and other headers of CUDA's           nothing
    #pragma unroll                                                  nothing
    #include "kernels.cuh", where that has kernels itself           its translation
"""

import pathlib
import re
import sys

CUDA_HEADER = re.compile(r"^[ \t]*#[ \t]*(include[ \t]*<(cuda|cublas|nccl|nv|vector_types|device_launch|sm_\d)[^>]*>|"
                         r"pragma[ \t]+unroll)[^\n]*", re.M)
QUOTED_INCLUDE = re.compile(r'^[ \t]*#[ \t]*include[ \t]*"([^"]+)"[^\n]*$', re.M)
NOT_CODE = re.compile(r"""//(?:\\\n|[^\n])*|/\*.*?\*/|R"([^(\s]*)\(.*?\)\1"|"(?:\\.|[^"\\\n])*"|"""
                      r"""(?<![0-9A-Za-z_])'(?:\\.|[^'\\\n])+'""", re.S)
CLOSING = {"(": ")", "[": "]", "{": "}"}


class Wrong(Exception):
    pass


def blank(text):
    """The text with spaces in place of comments, strings and characters."""
    return NOT_CODE.sub(lambda m: re.sub(r"[^\n]", " ", m[0]), text)


def end_of(code, begin, close):
    """Where, at or after `begin`, `close` stands outside of all brackets that open there."""
    open_brackets = []
    at = begin
    while at < len(code):
        if not open_brackets and code.startswith(close, at):
            return at
        if code[at] in CLOSING:
            open_brackets.append(CLOSING[code[at]])
        elif open_brackets and code[at] == open_brackets[-1]:
            open_brackets.pop()
        at += 1
    raise Wrong(f"line {code.count(chr(10), 0, begin) + 1}: no {close}")


def split(code):
    """At the commas outside of all brackets: the ends of the parts. Within others, < and > compare or shift."""
    depth, angles, ends = 0, 0, []
    for i, c in enumerate(code):
        depth += (c in "([{") - (c in ")]}")
        if depth == 0:
            angles += (c == "<") - (c == ">")
        if c == "," and depth == 0 and angles == 0:
            ends.append(i)
    return ends + [len(code)]


def kernel_before(code, end):
    """Where the kernel's name, with its template's arguments, begins that ends at `end`."""
    at = len(code[:end].rstrip())
    if code[at - 1] == ">":
        angles = brackets = 0
        while at == len(code[:end].rstrip()) or angles or brackets:
            at -= 1
            if at < 0:
                raise Wrong(f"line {code.count(chr(10), 0, end) + 1}: no kernel in front of <<<")
            brackets += (code[at] in ")]}") - (code[at] in "([{")
            if not brackets:
                angles += {">": 1, "<": -1}.get(code[at], 0)
    name = re.search(r"(?:::\s*)?\b[A-Za-z_]\w*(?:\s*::\s*[A-Za-z_]\w*)*\s*$", code[:at])
    if not name:
        raise Wrong(f"line {code.count(chr(10), 0, end) + 1}: no kernel in front of <<<")
    return name.start()


def without_comments(text):
    return NOT_CODE.sub(lambda m: " " if m[0].startswith("/") else m[0], text)


def one_line(text):
    return re.sub(r"\s*\n\s*", " ", text).strip()


def launches(text, code):
    for match in re.finditer("<<<", code):
        begin = kernel_before(code, match.start())
        close = end_of(code, match.end(), ">>>")
        call = re.compile(r"\s*\(").match(code, close + 3)
        if not call:
            raise Wrong(f"line {code.count(chr(10), 0, close) + 1}: no ( after >>>")
        kernel = text[begin:match.start()]
        none = code[call.end():end_of(code, call.end(), ")")].strip() == ""
        name = one_line(without_comments(kernel))
        yield (begin, match.end(), f'::emulator::Launch("{name}", __FILE__, __LINE__, ' + "\n" * kernel.count("\n"))
        yield (close, call.end(), f").run({name}" + ("" if none else ", ") + "\n" * text[close:call.end()].count("\n"))


def shared_variables(text, code):
    for match in re.finditer(r"\b__shared__\b", code):
        line = code.count("\n", 0, match.start()) + 1
        begin = max(code.rfind(c, 0, match.start()) for c in ";{}") + 1
        directive = [m.end() for m in re.finditer(r"^[ \t]*#(?:\\\n|[^\n])*\n", code[begin:match.start()], re.M)]
        begin += directive[-1] if directive else 0
        begin += len(code[begin:]) - len(code[begin:].lstrip())
        end = end_of(code, match.start(), ";")
        if code.count("{", 0, begin) == code.count("}", 0, begin):
            raise Wrong(f"line {line}: __shared__ outside of functions")
        declaration = code[begin:end]
        alignment = re.search(r"(?:\balignas|__align__)\s*\(([^()]*(?:\([^()]*\))?[^()]*)\)", declaration)
        align = alignment[1].strip() if alignment else "1"
        if alignment:
            declaration = declaration.replace(alignment[0], "")
        extern = re.search(r"\bextern\b", declaration)
        declaration = re.sub(r"\b(extern|static|__shared__)\b", "", declaration)
        ends = split(declaration)
        parts = [declaration[a + 1:b].strip() for a, b in zip([-1] + ends, ends)]
        first = re.match(r"(.*?)\b([A-Za-z_]\w*)\s*((?:\[.*\]\s*)?)$", parts[0], re.S)
        if not first:
            raise Wrong(f"line {line}: cannot read this declaration of __shared__ variables")
        kind = first[1].strip()
        written = []
        for part in [first[2] + first[3]] + parts[1:]:
            variable = re.match(r"([A-Za-z_]\w*)\s*((?:\[.*\]\s*)?)$", part, re.S)
            if not variable:
                raise Wrong(f"line {line}: cannot read this declaration of __shared__ variables")
            name, size = variable[1], one_line(variable[2])
            if extern:
                written.append(f"{kind}* {name} = ::emulator::dynamic_shared<{kind}>()")
            else:
                written.append(f'static ::emulator::Shared<{kind}{size}> emulated_{name}{{"{name}", {align}}}; '
                               f"auto& {name} = emulated_{name}.here()")
        yield (begin, end, one_line("; ".join(written)) + "\n" * text[begin:end].count("\n"))


def has_kernels(path, seen):
    if path in seen or not path.is_file():
        return False
    seen.add(path)
    text = path.read_text()
    code = blank(text)
    return ("<<<" in code or "__shared__" in code or
            any(has_kernels(path.parent / m[1], seen) for m in QUOTED_INCLUDE.finditer(text)))


def translate(path, done):
    text = path.read_text()
    code = blank(text)
    edits = []
    try:
        edits += launches(text, code)
        edits += shared_variables(text, code)
    except Wrong as wrong:
        sys.exit(f"{path}: {wrong}")
    for match in CUDA_HEADER.finditer(text):
        if code[match.start():match.end()].strip():
            edits.append((match.start(), match.end(), ""))
    for match in QUOTED_INCLUDE.finditer(text):
        other = path.parent / match[1]
        if not code[match.start():match.end()].strip() or not has_kernels(other, {path}):
            continue
        if other.resolve() in done:  # had a #pragma once
            edits.append((match.start(), match.end(), ""))
            continue
        line = text.count("\n", 0, match.start()) + 2
        edits.append((match.start(), match.end(), f'{translate(other, done)}\n#line {line} "{path}"'))
    if re.search(r"^[ \t]*#[ \t]*pragma[ \t]+once", code, re.M):
        done.add(path.resolve())
        text = re.sub(r"^([ \t]*#[ \t]*pragma[ \t]+once)", lambda m: " " * len(m[1]), text, flags=re.M)
    for begin, end, new in sorted(edits, reverse=True):
        text = text[:begin] + new + text[end:]
    return f'#line 1 "{path}"\n{text}'


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit(__doc__)
    mine, translated = pathlib.Path(sys.argv[1]), pathlib.Path(sys.argv[2])
    try:
        if translated.exists() and translated.samefile(mine):
            sys.exit(f"{mine}: would be replaced by its own translation")
        translated.write_text(translate(mine, set()))
    except OSError as error:
        sys.exit(f"{error.filename}: {error.strerror}")
