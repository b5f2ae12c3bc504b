#!/usr/bin/env python3
"""Which tokenizer learns a text fastest? Trains the README's model with each for as many steps as take the same time,
and prints bits per byte of the validation text, which, unlike losses, can be compared between vocabularies.

    dev/bench/tokenizers.py --seconds 180 mine.txt
    dev/bench/tokenizers.py --seconds 180 novels/*.txt --val other.txt

Needs train_gpt2 (make), tokenizers and tiktoken. The time of a step is the least median of three short runs, in turns,
so that other work on the machine counts little; the long runs may then be slowed down by it without effect."""

import argparse
import csv
import pathlib
import re
import statistics
import subprocess
import sys
import tempfile

ROOT = pathlib.Path(__file__).resolve().parents[2]
TOKENIZERS = {"bytes": [], "chars": [], "bpe 1,024": ["--vocab-size", 1024], "bpe 4,096": ["--vocab-size", 4096],
              "gpt2": []}
MODEL = ["--layers", 6, "--heads", 6, "--channels", 384, "--context", 256, "--batch", 8]
TIMED_STEPS = 12


def run(*command):
    done = subprocess.run([str(word) for word in command], stdout=subprocess.PIPE, text=True)
    if done.returncode:
        sys.exit(f"{command[0]} {command[1]} failed")
    return done.stdout


def train(folder, out, steps, *more):
    run(ROOT / "train_gpt2", "train", "--train", f"{folder}/train_*.bin", "--out", out, "--overwrite", *MODEL,
        "--steps", steps, "--tokens", 0, *more)


def step_time(folder, out):
    """The median time of a step, in seconds, without the first two."""
    train(folder, out, TIMED_STEPS)
    with open(out / "metrics.csv") as rows:
        times = [float(row["ms"]) for row in csv.DictReader(rows) if row["ms"]]
    return statistics.median(times[2:]) / 1000


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("texts", metavar="FILE", nargs="+", type=pathlib.Path)
    p.add_argument("--val", metavar="FILE", nargs="+", type=pathlib.Path, help="[the last tenth of each FILE]")
    p.add_argument("--seconds", metavar="S", type=float, default=180, help="training time of each [180]")
    o = p.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        work = pathlib.Path(temporary)
        texts = [path.read_text() for path in o.texts]
        held_out = [path.read_text() for path in o.val] if o.val else [t[len(t) * 9 // 10:] for t in texts]
        kept = texts if o.val else [t[:len(t) * 9 // 10] for t in texts]
        for name, parts in ("train", kept), ("val", held_out):
            (work / name).mkdir()
            for i, text in enumerate(parts):
                (work / name / f"{i:03d}.txt").write_text(text)
        folders, times = {}, {}
        for i, (name, more) in enumerate(TOKENIZERS.items()):
            folders[name] = work / str(i)
            run(sys.executable, ROOT / "data_prep/prepare.py", "--tokenizer", name.split()[0], *more, "--out",
                folders[name], *sorted((work / "train").iterdir()), "--val", *sorted((work / "val").iterdir()))
        for _ in range(3):
            for name, folder in folders.items():
                times[name] = min(times.get(name, 1e9), step_time(folder, work / "run"))
        print("| tokenizer | bytes per token | ms per step | steps | tokens seen | bits per byte |")
        print("|---|---|---|---|---|---|", flush=True)
        for name, folder in folders.items():
            steps = round(o.seconds / times[name])
            train(folder, work / "run", steps)
            said = run(ROOT / "train_gpt2", "eval", "--model", work / "run/model.bin", "--val", f"{folder}/val_*.bin",
                       "--batch", 8)
            loss, bits = (float(re.search(rf"{word} +([\d.]+)", said)[1]) for word in ("loss", "bits/byte"))
            print(f"| {name} | {loss / bits / 0.6931472:.2f} | {times[name] * 1000:.0f} | {steps:,} | "
                  f"{steps * 8 * 256:,} | {bits:.3f} |", flush=True)


if __name__ == "__main__":
    main()
