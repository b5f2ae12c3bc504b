#!/usr/bin/env python3
"""Prints English text for a first small model: the prose of Python's own documentation, which comes with Python. If it
is not installed, it prints the prose of this repository: Markdown files, and comments of source files.

    data_prep/demo_text.py > text.txt
"""

import re
import sys
from pathlib import Path


ROOT = Path(__file__).resolve().parents[1]
PROSE = ["README.md", "dev/README.md", "dev/bench/ladder.md", "train_gpt2.cpp", "train_gpt2.cu", "test_gpt2.cpp"]


def documentation():
    try:
        from pydoc_data.topics import topics
    except Exception:  # it is missing or broken
        return []
    return [topics[name] for name in sorted(topics)]


def prose(path):
    """A Markdown file as it is, or a source file's comments."""
    try:
        text = (ROOT / path).read_text(encoding="utf-8", errors="replace")
    except OSError as e:
        sys.exit(f"error: {path}: {e.strerror}")
    if path.endswith(".md"):
        return text
    lines = (line.strip() for line in text.splitlines())
    return "\n".join(line.removeprefix("// ") if line.startswith("// ") else "" for line in lines)


def paragraphs(text):
    """Paragraphs of full sentences, each as one line: no headings, code, grammars, tables or lists of names."""
    text = text.translate(str.maketrans("“”‘’–—\xa0", "\"\"''-- ")).replace("…", "...")
    for paragraph in re.split(r"\n\s*\n", text):
        line = re.sub(r"^(?:[*•] |\d+\. |\[\d+\] )", "", " ".join(paragraph.split()))
        letters = sum(c.isalpha() or c in " ,.'" for c in line)
        if re.search(r"[.:]$", line) and line[:1].isupper() and len(line) >= 60 and letters >= 0.93 * len(line):
            yield line


def main():
    texts = documentation() or [prose(path) for path in PROSE]
    lines = dict.fromkeys(line for text in texts for line in paragraphs(text))  # each once: topics share some
    if not lines:
        sys.exit("error: neither Python's documentation nor this repository's has prose")
    sys.stdout.reconfigure(encoding="utf-8")
    try:
        print("\n".join(lines), flush=True)
    except OSError as e:
        sys.exit(f"error: standard output: {e.strerror}")


if __name__ == "__main__":
    main()
