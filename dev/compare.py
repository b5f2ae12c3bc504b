#!/usr/bin/env python3
"""Trains models that differ in their attention, with the same seeds, and reports what each attention is worth.

    dev/compare.py --dry-run                # what dev/compare.toml would take: about ten minutes on two cores
    dev/compare.py                          # trains, then writes run/compare/report.html and report.md
    dev/compare.py dev/study.toml --text 'novels/train/*.txt' --val 'novels/val/*.txt'
    dev/compare.py dev/study.toml --report  # a report of the runs that are complete, also while others train

A study is a TOML file: dev/compare.toml explains its entries. Its folder is run/NAME, for NAME.toml, or --out DIR:

    data/, data.json   shards and tokenizer of the text, and how they were made
    runs/RUN/          the folder of train_gpt2; not needed any more once the run is complete
    results/RUN.json   the run's options and, once it is complete, its losses
    costs.json         what each model costs: time, memory, FLOPs
    report.html, report.md, figures/        made from the results and costs alone

Stopped or killed, even in the middle of a run, the same command goes on. For a seed, all attentions begin with the same
weights and see the same batches, so their differences are paired. If a run fails, because its loss is not finite, say,
the others are trained all the same. Models are timed before the first run, in short runs in turns, of which the least
median counts; remove costs.json to time them anew, on an idle machine. Needs Python 3.11, matplotlib and scipy.
"""

import argparse
import csv
import ctypes
import fcntl
import glob
import json
import os
import re
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
import zlib
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace

from plot import fail, package, read_metrics
from report import duration, slug, write_file, write_report

ROOT = Path(__file__).resolve().parents[1]
ROUNDS, TIMED_STEPS, TIMED_MS, DECODED_TOKENS = 5, (20, 100), 2000, 200  # of a timing
OWN_OPTIONS = {"train", "val", "out", "resume", "overwrite", "seed", "steps", "sequence", "total-batch", "model",
               "tokens"}
SHARED_OPTIONS = {"context", "val-every", "val-tokens"}  # must be equal in what is compared
MOST_SEEDS = 1000
PART_ENTRIES = {"name", "attentions", "seeds", "tokens", "batch-tokens"}
UNTIMED_OPTIONS = {"steps", "lr", "min-lr", "warmup", "schedule", "val-every", "val-tokens", "sample-every",
                   "save-every", "prompt", "prompt-tokens"}  # do not change the time of a step


def read_json(path):
    """The file's entries; none if there is no such file."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        return content if isinstance(content, dict) else fail(f"{path}: was not written by compare.py; remove it")
    except FileNotFoundError:
        return {}
    except ValueError as e:
        fail(f"{path}: {e}; remove the file to make it anew")


def write_json(path, content):
    """One entry a line."""
    write_file(path, "{" + ",\n".join(f"{json.dumps(key)}: {json.dumps(content[key])}" for key in content) + "}\n")


def show(text, stays=False):
    """On a terminal, a line in place of the last one that was not to stay."""
    if sys.stdout.isatty():
        text = text if stays else text[:shutil.get_terminal_size().columns - 1]
        print(f"\r\x1b[K{text}", end="\n" if stays else "", flush=True)
    elif stays:
        print(text, flush=True)


# ----------------------------------------------------------------------------------------------------------------------
# Processes


class Failed(Exception):
    """A command ended with an error; its last line says why."""


class Child:
    """The process at work, if any. Signals are passed on to it: train_gpt2 then saves and ends."""
    process, stopped = None, False


def on_signal(number, _):
    Child.stopped = True
    if Child.process is None:
        stop()
    Child.process.send_signal(number)


def stop():
    show("")
    sys.exit("stopped; the same command goes on")


def end_with_parent():
    """Linux tells the child to save and end if this process is killed."""
    with suppress(AttributeError):
        ctypes.CDLL(None).prctl(1, signal.SIGTERM)  # PR_SET_PDEATHSIG


def lines_of(command, place=""):
    """The lines that a command prints."""
    command = [str(word) for word in command]
    if not shutil.which(command[0]):
        fail(f"{command[0]} is not there: run make{' gpu' if 'gpt2cu' in command[0] else ''}")
    # In a process group of its own, so that Ctrl-C reaches it once, through on_signal.
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace",
                               process_group=0, preexec_fn=end_with_parent)
    Child.process, last = process, ""
    for line in process.stdout:
        last = line.strip() or last
        yield line
    status = process.wait()
    Child.process = None
    if Child.stopped:
        stop()
    if status:
        how = f"was killed by signal {-status}" if status < 0 else f"ended with status {status}"
        raise Failed(place + (last[7:] if last.startswith("error: ") else f"{' '.join(command[:2])} {how}"))


def output(command, place=""):
    return "".join(lines_of(command, place))


# ----------------------------------------------------------------------------------------------------------------------
# The study


def check_names(place, table, known):
    for name in table:
        if name not in known:
            fail(f"{place}: '{name}' is not known here; known are {', '.join(sorted(known))}")


def read_study(path, program):
    """Title, data and runs. A run has options, those of train_gpt2, a name, and a model: its name without the seed."""
    try:
        import tomllib
    except ImportError:
        fail("this needs Python 3.11 or later, which reads TOML")
    try:
        with open(path, "rb") as f:
            study = tomllib.load(f)
    except (OSError, ValueError) as e:
        fail(f"{path}: {getattr(e, 'strerror', None) or e}")
    known = set(re.findall(r"^  --([\w-]+)", output([program, "train", "--help"]), re.M)) - OWN_OPTIONS
    try:
        check_names(path, study, ["title", "data", "train", "attentions", "part"])
        if not isinstance(study.get("title", ""), str):
            fail(f"{path}: 'title' is {study['title']!r}, but must be text, in quotes")
        data = study.get("data", {})
        check_names(f"{path}: [data]", data, ["text", "val", "tokenizer", "vocab-size"])
        for name, value in data.items():
            if name != "vocab-size" and not (isinstance(value, str) or name != "tokenizer" and isinstance(value, list)
                                             and all(isinstance(pattern, str) for pattern in value)):
                fail(f"{path}: [data]: '{name}' is {value!r}, but must be text, in quotes, or a list of it")
        if not isinstance(study.get("part"), list) or not study["part"]:
            fail(f"{path}: a study has parts, which begin with [[part]], in two brackets")
        runs = [run for part in study["part"] for run in runs_of(path, study, part, known)]
    except (LookupError, TypeError, ValueError, AttributeError, ArithmeticError) as e:
        fail(f"{path}: is not as dev/compare.toml explains: {type(e).__name__}: {e}")
    if len({run.name for run in runs}) < len(runs):
        fail(f"{path}: two runs have the same name, which is made of letters and digits of part, attention and seed")
    parts, models = {}, {}
    for run in runs:
        if parts.setdefault(slug(run.part), run.shared) != run.shared:
            fail(f"{path}: part '{run.part}' is there twice, with other options: give one another name (letters and "
                 "digits count)")
        if models.setdefault(run.model, (run.part, run.attention)) != (run.part, run.attention):
            fail(f"{path}: part '{run.part}', attention '{run.attention}': another one has the same letters and digits")
    return SimpleNamespace(title=study.get("title", Path(path).stem), data=data, runs=runs, program=program)


def runs_of(path, study, part, known):
    """In turns: one seed of all attentions, then the next."""
    part = {"name": "all", "attentions": list(study["attentions"]), **study.get("train", {}), **part}
    place = f"{path}: part {part['name']!r}"
    check_names(place, part, known | PART_ENTRIES)
    if not isinstance(part["name"], str):
        fail(f"{place}: its name must be text, in quotes")
    for name in "context", "tokens", "batch-tokens", "seeds":
        if name not in part:
            fail(f"{place}: '{name}' is missing")
    for name, least in ("context", 1), ("tokens", 1), ("batch-tokens", 1), ("val-every", 0), ("val-tokens", 0):
        if name in part and (type(part[name]) is not int or part[name] < least):
            fail(f"{place}: '{name}' is {part[name]!r}, but must be a whole number, {least} or more")
    count = part["seeds"]
    seeds = list(range(1, count + 1)) if type(count) is int and count <= MOST_SEEDS else count
    if not seeds or type(seeds) is not list or any(type(seed) is not int or not 0 <= seed < 1 << 31 for seed in seeds):
        fail(f"{place}: 'seeds' is {count!r}, but must be a number of seeds, up to {MOST_SEEDS}, or a list of them")
    if not part["attentions"]:
        fail(f"{place}: 'attentions' is empty")
    tokens, context, batch_tokens = part["tokens"], part["context"], part["batch-tokens"]
    if batch_tokens % context or tokens < batch_tokens:
        fail(f"{place}: batch-tokens {batch_tokens} must be a multiple of context {context}, and at most the tokens "
             f"of a run, {tokens}")
    shared = {name: value for name, value in part.items() if name not in ("attentions", "seeds")}
    for seed in seeds:
        for attention in part["attentions"]:
            check_names(place, [attention], study["attentions"])
            check_names(f"{place}, attention '{attention}'", study["attentions"][attention], known - SHARED_OPTIONS)
            options = {"batch": batch_tokens // context, **part, **study["attentions"][attention]}
            options = {name: value for name, value in options.items() if name not in PART_ENTRIES}
            for name, value in options.items():
                if not isinstance(value, (str, bool, int, float)) or value != value:
                    fail(f"{place}, attention '{attention}': '{name}' is {value}, but must be a number, text, or true")
            options |= {"total-batch": batch_tokens, "steps": tokens // batch_tokens}
            model = slug(f"{part['name']} {attention}")
            yield SimpleNamespace(part=part["name"], attention=attention, seed=seed, options=options, model=model,
                                  name=f"{model}-seed-{seed}", tokens=options["steps"] * batch_tokens, shared=shared)


def words(options):
    """As a command line has them."""
    return [word for name, value in options.items() if value is not False
            for word in ([f"--{name}"] if value is True else [f"--{name}", str(value)])]


def find_files(patterns, option):
    patterns = [patterns] if isinstance(patterns, str) else patterns
    files = [[os.path.realpath(pattern)] if os.path.exists(pattern) else
             sorted(map(os.path.realpath, glob.glob(os.path.expanduser(pattern)))) for pattern in patterns]
    if [] in files:
        fail(f"there is no {patterns[files.index([])]}: name other files with --{option}")
    for file in sum(files, []):
        if file.endswith(".toml"):
            fail(f"{file} is taken for text: name the study before --{option}")
    return sum(files, [])


def prepare_data(study):
    """Shards of the text or, without one, of what data_prep/demo_text.py finds on the machine."""
    data, out = study.data, study.out / "data"
    texts, val = find_files(data.get("text", []), "text"), find_files(data.get("val", []), "val")
    arguments = words({"tokenizer": data.get("tokenizer", "bytes")} | {k: data[k] for k in data if k == "vocab-size"})
    arguments += (texts or ["demo.txt"]) + (["--val", *val] if val else [])
    now = {"arguments": arguments, "bytes": [os.path.getsize(file) for file in texts + val]}
    former, manifest = read_json(study.out / "data.json"), out / "gpt2x3_manifest.txt"
    if former and manifest.exists() and now | former != now:
        fail(f"{study.out} was begun with another text or tokenizer, which data.json there names: give that one, or "
             "another --out")
    if not former and out.exists():
        fail(f"{out} is there, but compare.py did not make it: give another --out")
    write_json(study.out / "data.json", now)  # before the shards, so that they are known to be the study's
    if not manifest.exists():
        demo = study.out / "demo.txt"
        if not texts:
            write_file(demo, output([sys.executable, ROOT / "data_prep/demo_text.py"]))
        print(output([sys.executable, ROOT / "data_prep/prepare.py", "--out", out, "--overwrite",
                      *(demo if word == "demo.txt" else word for word in arguments)]), end="", flush=True)
    data["crc"] = f"{zlib.crc32(manifest.read_bytes()):08x}"
    data["val tokens"] = sum(path.stat().st_size - 1024 for path in out.glob("val_*.bin")) // 2


def shards(study, split):
    return [f"--{split}", f"{glob.escape(str(study.out / 'data'))}/{split}_*.bin"]


# ----------------------------------------------------------------------------------------------------------------------
# Costs


def step_time(rows):
    """The median in milliseconds, without the first step."""
    return statistics.median(row["ms"] for row in rows if row["step"] > 1)


def timed_options(run):
    return {name: value for name, value in run.options.items() if name not in UNTIMED_OPTIONS}


def measure_costs(study):
    """All models anew if one is not known, so that they are timed in turns."""
    study.costs = read_json(study.out / "costs.json")
    program = Path(study.program).name
    if all(known_cost(study.costs, run) and study.costs[run.model].get("program", program) == program
           for run in study.runs):
        return
    timed = {}  # the models that have the same costs, with a run of theirs
    for run in study.runs:
        timed.setdefault(json.dumps(timed_options(run)), {})[run.model] = run
    measured = [[] for _ in timed]
    with tempfile.TemporaryDirectory() as folder:
        for i in range(ROUNDS):
            for j, models in enumerate(timed.values()):
                run = next(iter(models.values()))
                show(f"timing {j + 1} of {len(timed)} models, round {i + 1} of {ROUNDS}: {run.model}")
                measured[j].append(measure(study, run, folder, measured[j]))
    show("")
    study.costs = {model: times[0] | {"ms": min(m["ms"] for m in times), "decoding": max(m["decoding"] for m in times)}
                   for models, times in zip(timed.values(), measured) for model in models}
    write_json(study.out / "costs.json", study.costs)


def known_cost(costs, run):
    return costs.get(run.model, {}).get("options") == timed_options(run)


def measure(study, run, folder, former):
    """Trains for about two seconds, in 20 to 100 steps, and decodes for about one; the first time shorter."""
    options, tokens = timed_options(run), max(1, min(run.options["context"] - 1, DECODED_TOKENS))
    steps = sorted([*TIMED_STEPS, int(TIMED_MS / former[-1]["ms"])])[1] if former else TIMED_STEPS[0]
    samples = min(10, 1 + int(former[-1]["decoding"] / tokens)) if former else 1
    said = output([study.program, "train", *shards(study, "train"), "--out", folder, "--overwrite",
                   *words(options | {"steps": steps, "tokens": 0})], f"{run.model}: ")
    model = ["--model", f"{folder}/model.bin", *words({k: options[k] for k in options if k == "precision"})]
    text = output([study.program, "generate", *model, "--prompt-tokens", 0, "--tokens", tokens, "--samples", samples])
    table = output([study.program, "describe", *model, *words({k: options[k] for k in ("batch", "recompute")
                                                               if k in options})])
    table = [re.split(r"\s{2,}", line.strip()) for line in table.splitlines()]
    names = [name.split()[0] for name in next(row for row in table if row[0] == "vanilla")]
    column = names.index(run.options.get("attention", "vanilla")) - len(names)
    described = {key: next(row[column] for row in table if label in row[0]) for key, label in
                 (("mflop", "MFLOP"), ("cache", "KV cache"), ("memory", "total, with scratch"))}
    return {"ms": step_time(read_metrics(folder)), **described, "options": options,
            "program": Path(study.program).name,
            "decoding": statistics.median(map(float, re.findall(r"([\d.]+) tokens/s$", text, re.M))),
            "parameters": re.search(r"^parameters ([\d,]+),", said, re.M)[1],
            "machine": re.search(r"^machine +(.*?);", said, re.M)[1]}


# ----------------------------------------------------------------------------------------------------------------------
# Runs


def result_of(study, run):
    """What is known of a run: {} before it begins. Dies if it was begun with other options than the study now has."""
    path, folder = study.out / "results" / f"{run.name}.json", study.out / "runs" / run.name
    result = read_json(path)
    if not {"options", "data"} <= result.keys() or not ("loss" in result or (folder / "model.bin").exists()):
        return {}
    was = {"data": result["data"], **result["options"]}
    now = {"data": study.data.get("crc", was["data"]), **run.options}  # a report needs no text
    changed = [f"{name} {was.get(name, 'not given')}, now {now.get(name, 'not given')}"
               for name in sorted(was | now) if was.get(name) != now.get(name)]
    if changed:
        fail(f"{path}: this run has other options or data: {'; '.join(changed)}; give another --out, or remove this "
             f"file and {folder} to begin the run anew")
    return result


def is_complete(study, run):
    return "loss" in result_of(study, run)


class Progress:
    """Estimates the time left of the study, from the timed steps and from how long they have taken since the start."""

    def __init__(self, study):
        self.study, self.start, self.done = study, time.monotonic(), 0
        self.left = sum(self.seconds(run) for run in study.runs if not is_complete(study, run))

    def seconds(self, run):
        """Of a whole run. A token of a validation, without backward, takes a third of the time."""
        o = run.options
        validations = o["steps"] // (o.get("val-every", 100) or o["steps"])
        val_tokens = self.study.data["val tokens"]
        validated = validations * (o.get("val-tokens", 1 << 14) or val_tokens) + val_tokens
        return self.study.costs[run.model]["ms"] / 1000 * (o["steps"] + validated / 3 / o["total-batch"])

    def advance(self, run, steps, trained_now):
        seconds = self.seconds(run) * steps / run.options["steps"]
        self.left -= seconds
        self.done += seconds if trained_now else 0

    def __str__(self):
        elapsed = time.monotonic() - self.start
        pace = elapsed / self.done if elapsed > 10 and self.done > 0 else 1
        return f"{duration(max(0, self.left) * pace)} left of all"


def train(study, run, begun, progress, title):
    """The rows of metrics.csv. Goes on with a run that results/ knows; what else its folder has is of another."""
    folder = study.out / "runs" / run.name
    folder.mkdir(parents=True, exist_ok=True)
    lock = os.open(folder, os.O_RDONLY)
    fcntl.flock(lock, fcntl.LOCK_EX)  # waits for what a compare.py that was killed left at work
    os.close(lock)
    resume = "--resume" if result_of(study, run) else "--overwrite"
    if resume == "--overwrite":
        for name in "model.bin", "metrics.csv":
            (folder / name).unlink(missing_ok=True)
    write_json(study.out / "results" / f"{run.name}.json", begun)
    command = [study.program, "train", *shards(study, "train"), *shards(study, "val"), "--out", folder,
               "--seed", run.seed, "--tokens", 0, *words(run.options), resume]
    before = None
    for line in lines_of(command, f"{run.name}: "):
        step = re.match(r"step (\d+)/\d+(?:  loss ([\d.]+))?", line)
        if step:
            progress.advance(run, int(step[1]) - (before or 0), before is not None)
            before = int(step[1])
            loss = f"  loss {step[2]}" if step[2] else ""
            show(f"{progress}; {title}  step {before}/{run.options['steps']}{loss}")
    rows = read_metrics(folder)
    if rows[-1]["step"] < run.options["steps"]:  # by a signal to train_gpt2 alone
        stop()
    return rows


def evaluate(study, run, rows):
    """The results of a run that is trained."""
    folder = study.out / "runs" / run.name
    weights = folder / "depth_weights.csv"
    depth = ["--depth-weights", weights] if run.options.get("attention") == "depth" else []
    said = output([study.program, "eval", "--model", folder / "model.bin", *shards(study, "val"), "--by-position",
                   *depth, "--batch", run.options["batch"]], f"{run.name}: ")
    return {
        "tokens": run.tokens,
        "loss": float(re.search(r"^loss +([\d.]+)", said, re.M)[1]),
        "bits per byte": float(re.search(r"^bits/byte +([\d.]+)", said, re.M)[1]),
        "validation": re.search(r"^data +(.*);", said, re.M)[1],
        "hours": round(sum(row["ms"] or 0 for row in rows) / 3.6e6, 4),
        "curve": [[int(row["step"]), row["val_loss"]] for row in rows if row["val_loss"] is not None],
        "by position": [float(loss) for loss in re.findall(r"^\d+,([\d.]+)$", said, re.M)],
        "depth weights": read_weights(weights) if depth else [],
    }


def read_weights(path):
    """Rows of layer, head, source and weight."""
    with open(path, encoding="utf-8") as f:
        return [[*map(int, row[:3]), float(row[3])] for row in list(csv.reader(f))[1:]]


def run_all(study):
    """What failed, one line a run."""
    progress, failures = Progress(study), []
    for i, run in enumerate(study.runs):
        if is_complete(study, run):
            continue
        begun = {"options": run.options, "data": study.data["crc"]}
        title = f"run {i + 1} of {len(study.runs)}: {run.part}, {run.attention}, seed {run.seed}"
        try:
            result = evaluate(study, run, train(study, run, begun, progress, title))
        except Failed as failure:
            failures.append(str(failure))
            show(f"{title}  failed: {failure}", stays=True)
            progress.left = sum(map(progress.seconds, [r for r in study.runs[i + 1:] if not is_complete(study, r)]))
            continue
        write_json(study.out / "results" / f"{run.name}.json", begun | result)
        show(f"{title}  loss {result['loss']:.4f}  {progress}", stays=True)
    return failures


def list_runs(study):
    print(f"{'part':24}{'attention':24}{'runs':>5}{'complete':>10}{'parameters':>12}{'tokens a run':>14}"
          f"{'ms a step':>11}{'time of all':>13}")
    progress = Progress(study)
    for model in dict.fromkeys(run.model for run in study.runs):
        cost, runs = study.costs[model], [run for run in study.runs if run.model == model]
        print(f"{runs[0].part:24}{runs[0].attention:24}{len(runs):5}{sum(is_complete(study, run) for run in runs):10}"
              f"{cost['parameters']:>12}{runs[0].tokens:14,}{cost['ms']:11.2f}"
              f"{duration(sum(map(progress.seconds, runs))):>13}")
    print(f"{len(study.runs)} runs, {sum(run.tokens for run in study.runs):,} tokens; {progress}, if the machine does "
          "nothing else")


def options():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
                                allow_abbrev=False)
    p.error = fail
    p.add_argument("study", metavar="FILE", nargs="?", default=ROOT / "dev/compare.toml", help="[dev/compare.toml]")
    p.add_argument("--text", metavar="FILE", nargs="+", help="text: files, or patterns in quotes [the study's]")
    p.add_argument("--val", metavar="FILE", nargs="+", help="validation text [the study's, or a tenth of the text]")
    p.add_argument("--out", metavar="DIR", type=Path, help="the study's folder [run/NAME, for NAME.toml]")
    p.add_argument("--program", metavar="FILE", default=ROOT / "train_gpt2", help="train_gpt2cu trains on a GPU")
    p.add_argument("--dry-run", action="store_true", help="prepare the text, time the models and list the runs")
    p.add_argument("--report", action="store_true", help="only write the report")
    return p.parse_args()


def main():
    o = options()
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) != signal.SIG_IGN:  # as nohup wants SIGHUP
            signal.signal(number, on_signal)
    sys.stdout.reconfigure(errors="replace")
    study = read_study(o.study, os.path.abspath(o.program) if os.path.exists(o.program) else o.program)
    study.out = o.out or Path("run") / Path(o.study).stem
    failures = []
    study.data |= {name: given for name, given in (("text", o.text), ("val", o.val)) if given}
    for name in [] if o.dry_run else ["matplotlib", "scipy"]:
        package(name)  # if one is missing, rather now than after the last run
    if not o.report:
        study.out.mkdir(parents=True, exist_ok=True)
        lock = os.open(study.out, os.O_RDONLY)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            fail(f"{study.out} is in use by another compare.py; wait for it, or give another --out")
        prepare_data(study)
        for run in study.runs:
            result_of(study, run)  # dies if it is of another study
        measure_costs(study)
        if o.dry_run:
            return list_runs(study)
        failures = run_all(study)
    costs = read_json(study.out / "costs.json")
    results = {run.name: result_of(study, run) for run in study.runs
               if known_cost(costs, run) and is_complete(study, run)}
    if not results:
        fail(failures[0] if failures else f"{study.out} has no complete run of this study, or no costs.json: start "
             "without --report")
    write_report(study.out, study.title, study.runs, results, costs)
    if failures:
        fail(f"{len(failures)} of {len(study.runs)} runs failed; the first error: {failures[0]}. To begin a failed run "
             f"anew, remove its folder in {study.out}/runs")


if __name__ == "__main__":
    try:
        main()
    except Failed as e:
        show("")
        fail(str(e))
    except OSError as e:
        fail(f"{e.filename}: {e.strerror}" if e.filename else str(e))
