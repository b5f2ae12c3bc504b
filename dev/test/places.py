"""Where breaks.py and gpu_breaks.py break a program: a fragment of a function in its source.

White space in a fragment does not count. « and » enclose the part that is broken; without them, all of it is."""

import re
import sys


def closing(source, at):
    """Where the bracket is closed that opens at `at`."""
    depth = 0
    for match in re.finditer(r"[(){}]", source[at:]):
        depth += 1 if match[0] in "({" else -1
        if depth == 0:
            return at + match.start()


def definitions(source, function):
    """Where the definitions of a function begin and end."""
    for match in re.finditer(rf"\b{function}(?=\()", source):
        body = re.compile(r"\)\s*\{").match(source, closing(source, match.end()))
        if body:
            yield match.start(), closing(source, body.end() - 1)


def pattern(text):
    return r"\s*".join(map(re.escape, re.findall(r"\w+|\S", text)))


def find(source, function, fragment):
    """Where the broken part of a fragment begins and ends, for each place of the fragment in the function."""
    before, broken, after = re.split("[«»]", fragment) if "«" in fragment else ("", fragment, "")
    whole = re.compile(rf"{pattern(before)}\s*(?P<broken>{pattern(broken)})\s*{pattern(after)}")
    return [match.span("broken") for begin, end in definitions(source, function)
            for match in whole.finditer(source, begin, end)]


def stale(source, breaks):
    """Names of the breaks, name: (function, fragment, ...), whose fragment is not in exactly one place."""
    return [name for name, (function, fragment, *_) in breaks.items() if len(find(source, function, fragment)) != 1]


def choose(path, breaks, words):
    """The breaks whose names contain one of the words, or all if there are no words. Exits if one of the words is in no
    name, or a break is stale."""
    for word in words:
        if not any(word in name for name in breaks):
            sys.exit(f"error: {word}: no break has this in its name")
    if names := stale(path.read_text(), breaks):
        sys.exit(f"error: not in exactly one place of {path.name}: {'; '.join(names)}")
    return {name: b for name, b in breaks.items() if not words or any(word in name for word in words)}
