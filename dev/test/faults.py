#!/usr/bin/env python3
"""Looks for faults: disturbs the program in every way that a machine or a user can, and checks what it leaves behind.

    python3 dev/test/faults.py                          # every part for a minute each
    python3 dev/test/faults.py --only calls --seconds 3600 --seed 2
    python3 dev/test/faults.py --only calls --seed 2 --case 17      # this one again

    kills     signals at random instants, and just before any call that changes a file
    calls     one call of the C library fails, or transfers less than asked: any call of a run (faults.c)
    disks     disks and file size limits of any size around what a run needs
    options   random command lines

A disturbed program must exit with status 0 and the right results, or with status 1 and one line that begins with
"error: ", and may not crash, hang, or take 4 GB. A former run must stay intact, or the new run must go on to the same
bits as an undisturbed one. For Linux; needs a C compiler. A fault's folder is kept, with its commands. Damaged files
are the matter of dev/fuzz."""

import argparse
import collections
import os
import pathlib
import random
import re
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from errno import EACCES, EAGAIN, EINTR, EIO, EMFILE, ENOLCK, ENOMEM, ENOSPC, EPERM

from helpers import (
    BYTES_AND_END_OF_TEXT as BYTES, END_OF_TEXT, SHAPE, contents, made_up_tokens, metrics, training, write_shard,
    write_tokenizer,
)

ROOT = pathlib.Path(__file__).resolve().parents[2]
PROGRAM, SANITIZED = ROOT / "train_gpt2", ROOT / "train_gpt2_sanitized"
PREPARE = [sys.executable, ROOT / "data_prep/prepare.py"]
TIMEOUT = 60
MEMORY = "ulimit -v 4000000; "  # KiB
INT_MAX = 2**31 - 1
COMMANDS = ["train", "eval", "generate", "describe"]
CHANGING = ["write", "fsync", "rename", "unlink", "mkdir", "rmdir"]  # functions that change files

Result = collections.namedtuple("Result", "status out err")


class Fault(Exception):
    pass


# What is no error: generate's times, and what eval says beside the CSV of --by-position
ASIDE = rb"((note|prompt): .*\n|(model|attention|data|loss|perplexity|bits/byte) .*\n)*"
OWN_MESSAGES = rb"\n?libgomp: .*\n"  # OpenMP ends the program if it gets no memory or threads


def ended_well(result, also=rb"(?!)"):
    """'worked' or 'refused'. `also`: what else an error may look like."""
    status, _, err = result
    fine = re.fullmatch(ASIDE, err) if status == 0 else re.fullmatch(ASIDE + rb"error: [^\0-\x1f\x7f]+\n", err)
    if status not in (0, 1) or not (fine or (status == 1 and re.fullmatch(also, err))):
        raise Fault(f"exit status {status}: {err[-300:].decode(errors='replace')!r}")
    return "refused" if status else "worked"


class Case:
    """A folder, random numbers, and the commands run so far."""

    def __init__(self, folder, r=None):
        self.folder, self.r, self.commands, self.note = folder, r, [], ""
        folder.mkdir(parents=True)

    def run(self, command, env=None, limits=MEMORY, signal_at=None, threads=1):
        """signal_at: a signal, and seconds after the start."""
        env = {"OMP_NUM_THREADS": threads, "OMP_WAIT_POLICY": "passive", **(env or {})}
        words = [*(f"{name}={value}" for name, value in env.items()), *map(str, command)]
        command = ["sh", "-c", f'ulimit -c 0; {limits}exec env "$@"', "sh", *words]
        self.commands.append(shlex.join(command) + (f"    # {signal_at}" if signal_at else ""))
        process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                                   cwd=self.folder)
        try:
            if signal_at:
                try:
                    process.communicate(timeout=signal_at[1])
                except subprocess.TimeoutExpired:
                    process.send_signal(signal_at[0])
            out, err = process.communicate(timeout=TIMEOUT)
        except subprocess.TimeoutExpired:
            process.kill()
            process.communicate()
            raise Fault(f"hangs: no end after {TIMEOUT} s") from None
        return Result(process.returncode, out, err)

    def run_either(self, words):
        """With the program, or sometimes with the one that watches its own memory and arithmetic."""
        if SANITIZED.exists() and self.r.random() < 0.2:
            return self.run([SANITIZED, *words], limits="")
        return self.run([PROGRAM, *words])

    def must(self, *command, **more):
        """The standard output of a command that has to work."""
        result = self.run(command, **more)
        if ended_well(result) != "worked":
            raise Fault(f"{command[1]} fails: {result.err.decode(errors='replace')!r}")
        return result.out


# Jobs: what is disturbed. `former` is the folder that a job begins with, if any; `check` looks at what it left.


class Reading:
    former = None

    def __init__(self, lab, *args):
        self.args = args
        self.said, self.counts, self.seconds = lab.undisturbed(self, None)

    def command(self, _):
        return [PROGRAM, *self.args]

    def check(self, _case, _out, worked, result):
        if worked and result.out != self.said:
            raise Fault("exit status 0, but it says something else than undisturbed")


class Training:
    def __init__(self, lab, end, args, former=None):
        self.args, self.former, self.end = args, former, lab.folder / end
        if former:
            shutil.copytree(former, self.end)
        _, self.counts, self.seconds = lab.undisturbed(self, self.end)

    def command(self, out):
        return [PROGRAM, *self.args(out)]

    def check(self, case, out, worked, result):
        stopped_at_once = b"stopped before the first step" in result.out
        if worked and not stopped_at_once and b"stopped after step" not in result.out:
            return self.check_end(out)
        now, again = contents(out) if out.exists() else {}, self.args(out)
        former = contents(self.former) if self.former else {}
        if stopped_at_once and now != former:
            raise Fault("it stopped before the first step, but has changed the folder")
        if "model.bin" in now:
            names = [name for name in now if re.fullmatch(r"(model|best).*\.bin", name)]
            for name in {"model.bin", "best.bin", max(names)} & set(names):
                described = case.run([PROGRAM, "describe", "--model", out / name])
                former_left = name != "model.bin" and "--overwrite" in again  # with the new tokenizer
                if ended_well(described) == "refused" and not former_left:
                    raise Fault(f"{name} is no checkpoint: {described.err.decode()!r}")
            generated = ended_well(case.run([PROGRAM, "generate", "--model", out / "model.bin", "--prompt", "a"]))
            if "--overwrite" in again and now["model.bin"] == former["model.bin"]:
                lost = [name for name in former if now.get(name) != former[name]]
                if lost and generated == "worked":
                    raise Fault(f"the former model.bin is there, but no longer the former {', '.join(lost)}")
            elif "--resume" not in again:
                again = ["train", "--out", out, "--resume"]
        elif former:
            raise Fault("the folder held a model.bin and has none now")
        case.must(PROGRAM, *again)
        return self.check_end(out)

    def check_end(self, out):
        ours, end = ({p.name: metrics(folder) if p.name == "metrics.csv" else p.read_bytes() for p in folder.iterdir()}
                     for folder in (out, self.end))
        if wrong := sorted(name for name in ours | end if ours.get(name) != end.get(name)):
            raise Fault(f"at the end, not as in an undisturbed run: {', '.join(wrong)}")


class Preparing:
    """prepare.py --overwrite"""

    def __init__(self, lab, text, former):
        self.text, self.former, self.end = text, former, lab.folder / "prepared"
        shutil.copytree(former, self.end)
        _, self.counts, self.seconds = lab.undisturbed(self, self.end)
        # Not what Python itself calls when it imports modules
        self.counts = {name: n for name, n in self.counts.items() if name in CHANGING}

    def command(self, out):
        return [*PREPARE, "--tokenizer", "chars", "--out", out, "--overwrite", "--shard-tokens", 700, self.text]

    def check(self, case, out, worked, _):
        def files(folder):
            return {path.name: path.read_bytes() for path in folder.glob("*.*") if path.suffix in (".bin", ".txt")}

        new, old, now = files(self.end), files(self.former), files(out)
        if worked and now != new:
            raise Fault("prepare.py: exit status 0, but not what it writes undisturbed")
        if now not in (new, old):
            trains = case.run([PROGRAM, *training(out, case.folder / "trained", steps=1)])
            if ended_well(trains) == "worked":
                raise Fault("prepare.py leaves a mixture of two texts, and train takes it")
        case.must(*self.command(out))
        if files(out) != new:
            raise Fault("prepare.py: called again, it leaves other files than undisturbed")


class Lab:
    """What every case starts from; none of them writes here."""

    def __init__(self, folder):
        self.folder, self.case, self.preload = folder, Case(folder / "setup"), folder / "faults.so"
        library = ["-shared", "-fPIC", ROOT / "dev/test/faults.c", "-o", self.preload, "-ldl"]
        subprocess.run(["cc", "-O1", *library], check=True)
        text, other_text, data, old_data, old, self.stopped, self.end = (
            folder / name for name in ("text", "other", "data", "old_data", "old", "stopped", "end"))
        text.write_bytes(bytes(made_up_tokens(2900)[1:]))
        other_text.write_bytes(text.read_bytes().upper())
        self.case.must(*PREPARE, "--tokenizer", "bytes", "--out", data, "--shard-tokens", 1000, text)
        self.data = data
        shutil.copytree(data, old_data)  # with another tokenizer of the same size
        (old_data / "gpt2x3_manifest.txt").unlink(missing_ok=True)
        write_tokenizer(old_data / "tokenizer.bin", BYTES[-2::-1] + BYTES[-1:], END_OF_TEXT)
        write_shard(folder / "long.bin", made_up_tokens(40_000))
        self.help = {word: self.case.must(PROGRAM, word, "--help").decode() for word in COMMANDS}

        def new(out, *more):
            return training(data, out, "--attention", "depth", "--keep", *more, steps=8, save_every=1)

        whole = "--val-batches" if "--val-batches" in self.help["train"] else "--val-tokens"
        long = ["--val", folder / "long.bin", "--val-every", 2, whole, 0, "--tokenizer", data / "tokenizer.bin"]
        resume, extend, model = ["--resume"], ["--resume", "--steps", 11], ["--model", self.stopped / "model.bin"]
        self.case.must(PROGRAM, *training(old_data, old, "--attention", "skip", "--keep", steps=11, save_every=2))
        self.stop(new(self.stopped))
        self.jobs = {
            "new": Training(self, "end", new),
            "overwrite": Training(self, "overwritten", lambda out: new(out, "--overwrite"), old),
            "resume": Training(self, "resumed", lambda out: ["train", "--out", out, *resume], self.stopped),
            "validation": Training(self, "validated", lambda out: new(out, *long)),
            "prepare": Preparing(self, other_text, data),
            "eval": Reading(self, "eval", *model, "--val", f"{data}/val_*.bin", "--batch", 2),
            "generate": Reading(self, "generate", *model, "--prompt", "ab", "--tokens", 40),
            "describe": Reading(self, "describe", *model),
        }
        self.jobs["extend"] = Training(self, "extended", lambda out: ["train", "--out", out, *extend], self.end)

    def disturb(self, fault):
        return {"LD_PRELOAD": str(self.preload), "FAULT": fault}

    def stop(self, args):
        """Stops a run after step 4."""
        for rename in range(1, 99):
            shutil.rmtree(self.stopped, ignore_errors=True)
            result = self.case.run([PROGRAM, *args], self.disturb(f"rename {rename} signal {signal.SIGTERM}"))
            if b"stopped after step 4 " in result.out:
                return
        raise Fault("SIGTERM does not stop a run after its step")

    def undisturbed(self, job, out):
        """The output of a job, its numbers of calls by function, its time."""
        counts, start = self.folder / "counts", time.monotonic()
        said = self.case.must(*job.command(out), env={"LD_PRELOAD": str(self.preload), "FAULT_COUNTS": str(counts)})
        return said, {name: int(n) for name, n in map(str.split, counts.open())}, time.monotonic() - start


def begin(job, case):
    out = case.folder / "out"
    if job.former:
        shutil.copytree(job.former, out)
    return out


# Signals


def kills(lab):
    names = [name for name, job in lab.jobs.items() if not isinstance(job, Reading)] + ["overwrite"] * 2

    def case(case, _):
        r, name = case.r, case.r.choice(names)
        job, out = lab.jobs[name], begin(lab.jobs[name], case)
        case.note = f"{name}: "
        others = [signal.SIGTERM, signal.SIGHUP, signal.SIGXCPU] + [signal.SIGINT] * (name != "prepare")
        number = r.choice([signal.SIGKILL] * 3 + others)
        if r.random() < 0.6:
            function = r.choice(sorted({*CHANGING, "open", "close", "link", "fflush", "fclose"} & {*job.counts}))
            # Most calls of an overwriting run are like those of a new one; its first ones replace the former run.
            most = job.counts[function] if r.random() < 0.5 else min(job.counts[function], 12)
            result = case.run(job.command(out), env=lab.disturb(f"{function} {1 + r.randrange(most)} signal {number}"))
        else:
            result = case.run(job.command(out), signal_at=(number, r.random() * r.choice([0.3, 1.1]) * job.seconds))
        if result.status == -number:
            if number != signal.SIGKILL and b"\nstep 2/" in result.out:
                raise Fault(f"{number.name} ends the run at once, without a checkpoint")
            outcome = "killed"
        else:
            outcome = ended_well(result)
        job.check(case, out, outcome == "worked", result)
        return outcome
    return None, case


# Calls

ERRORS = {"open": [EACCES, EMFILE, EIO], "openat": [EACCES], "rename": [EACCES, ENOSPC], "unlink": [EACCES, EIO],
          "link": [EPERM, EIO], "mkdir": [ENOSPC, EACCES], "stat": [EIO, EACCES], "write": [ENOSPC, EIO],
          "fflush": [ENOSPC], "fclose": [ENOSPC], "flock": [ENOLCK, EAGAIN], "access": [EACCES], "fopen": [EMFILE],
          "pthread_create": [EAGAIN], "malloc": [ENOMEM], "large": [ENOMEM], "mmap": [ENOMEM]}
TRANSFERS = ["read", "pread", "write", "pwrite"]
SAMPLE = 40  # calls of a function in a job, where it has more of them


def calls(lab):
    plan, r = [], random.Random(1)
    for name, job in lab.jobs.items():
        for function, n in job.counts.items():
            actions = [f"error {error}" for error in ERRORS.get(function, [EIO])]
            if function in TRANSFERS:
                actions += [f"error {EINTR}", "short 0"]
            n = 8 if function == "pthread_create" else n
            for action in actions:
                plan += [(name, f"{function} {k} {action}") for k in r.sample(range(1, n + 1), min(n, SAMPLE))]
    r.shuffle(plan)

    def case(case, i):
        name, fault = plan[i]
        function, _, action, error = fault.split()
        case.note = f"{name}, {fault}: "
        job, out = lab.jobs[name], begin(lab.jobs[name], case)
        result = case.run(job.command(out), env=lab.disturb(fault), threads=3 if function == "pthread_create" else 1)
        outcome = ended_well(result, *[OWN_MESSAGES] * (function in ("pthread_create", "malloc", "large")))
        if outcome == "refused" and (action == "short" or int(error) == EINTR):
            raise Fault(f"gives up: {result.err.decode()!r}")
        job.check(case, out, outcome == "worked", result)
        return outcome
    return len(plan), case


# Disks

# Arguments: the disk's size and place, a folder to copy to it, a folder to copy it to, a command
ON_A_DISK = ["unshare", "-rm", "sh", "-c", """
    mount -t tmpfs -o size=$1 none "$2" && cp -a "$3/." "$2" || exit
    disk=$2 after=$4; shift 4; "$@"; status=$?; cp -a "$disk/." "$after"; exit $status""", "sh"]


def size_of(folder):
    return sum(path.stat().st_size + 4095 & -4096 for path in folder.iterdir()) if folder else 0


def disks(lab):
    mounts = not subprocess.run(["sh", "-c", "unshare -rm mount -t tmpfs none /tmp"], capture_output=True).returncode
    if not mounts:
        print("disks: left out: small disks, since this system lets no user mount one", flush=True)
    plan, r = [], random.Random(1)
    for name in "new", "overwrite", "resume", "prepare":
        job = lab.jobs[name]
        least, most = size_of(job.former), size_of(job.former) + size_of(job.end) + 2**18
        largest = max(path.stat().st_size for path in job.end.iterdir())
        plan += [(name, "disk", size) for size in range(least + 4096, most, 4096) if mounts]
        plan += [(name, "file", blocks) for blocks in range(0, largest // 512 + 8)]  # POSIX has 512 bytes
    r.shuffle(plan)

    def case(case, i):
        name, kind, size = plan[i]
        case.note = f"{name}, {kind} of {size} {'bytes' if kind == 'disk' else 'blocks'}: "
        job, out = lab.jobs[name], begin(lab.jobs[name], case)
        out.mkdir(exist_ok=True)
        if kind == "file":
            place, result = out, case.run(job.command(out), limits=f"ulimit -f {size}; ")
        else:
            place, before, out = case.folder / "disk", out, case.folder / "after"
            place.mkdir()
            out.mkdir()
            result = case.run([*ON_A_DISK, size, place, before, out, *job.command(place)], limits="")
        outcome = ended_well(result)
        if outcome == "refused" and str(place) not in result.err.decode():
            raise Fault(f"the message names no file: {result.err.decode()!r}")
        job.check(case, out, outcome == "worked", result)
        return outcome
    return len(plan), case


# Options

INTEGERS = [0, 1, 2, -1, 7, 127, 257, 65535, 65536, 2**24, INT_MAX, -INT_MAX - 1]
# Values that bound the time of a run, where a larger one would be no mistake
BOUNDED = {"steps": [0, 1, 2], "batch": [0, 1, 3, 65536], "sequence": [0, 1, 7, 16], "total-batch": [0, 1, 48, 64, 128],
           "tokens": [-1, 0, 1, 5], "samples": [0, 1, 2], "layers": [0, 1, 2, 1025], "heads": [0, 1, 2, 4, 65537],
           "channels": [0, 8, 16, 24, 65537], "context": [0, 16, 33], "vocab": [0, 256, 257, 300, 65537],
           "model": ["", "gpt2", "none"]}
WORDS = ["", " ", "nan", "inf", "-1", "1e999", "-0", "0x10", " 1", "1 ", "1.5", "+1", "1,2", "1,", "9" * 40, "1" * 5000,
         "--", "-", "--lr", "=", "\n", "a\nb", "\x1b[31m", "\x7f", "'", '"', "%s%n", "[", "*", "\\", "é", "日本",
         "..", os.fsdecode(b"\xff\xfe"), "/dev/null", "/dev/zero", "/proc/self/mem", "/proc/none/x", "."]


def options(lab):
    forms = {word: dict(re.findall(r"^  --(\S+) (\S*)", text, re.MULTILINE)) for word, text in lab.help.items()}

    def value(r, command, name, form):
        if r.random() < 0.2:
            return r.choice(WORDS)
        if name in BOUNDED and (command != "describe" or r.random() < 0.3):
            return r.choice(BOUNDED[name])
        reals = [0, 1, "0.5", "1e-300", "1e-3", 10, "9e9", "-0.0", ".5", "5."]
        return r.choice(INTEGERS if form == "N" else reals if form == "X" else [*form.split("|"), *WORDS])

    def case(case, _):
        r, folder = case.r, case.folder
        place = folder / r.choice([word for word in WORDS if word != ".." and "/" not in word and len(word) < 99])
        place.mkdir(parents=True, exist_ok=True)
        shutil.copytree(lab.data, place / "data")
        shutil.copytree(lab.stopped, place / "run")
        model, val = {"--model": place / "run/model.bin"}, {"--val": f"{place}/data/val_*.bin"}
        train = {"--train": f"{place}/data/train_*.bin", "--steps": 2, "--tokens": 5}
        command, given = r.choice([
            ("train", {**train, **val, **dict(zip(SHAPE[::2], SHAPE[1::2])), "--out": place / "new"}),
            ("eval", {**model, **val, "--batch": 2}),
            ("train", {**train, **model, "--batch": 2, "--out": place / "new"}), ("generate", {**model, "--tokens": 5}),
            ("train", {"--out": place / "run", "--resume": None}), ("describe", {}), ("describe", model)])
        # Those of another command are mistakes.
        known = forms[command if r.random() < 0.9 else r.choice(list(forms))]
        for name in r.sample(list(known), min(r.choice([0, 1, 1, 2, 3, 6]), len(known))):
            given[f"--{name}"] = value(r, command, name, known[name]) if known[name] else None
        pairs = [[name] if value is None else [name, value] for name, value in given.items()]
        r.shuffle(pairs)
        pairs += r.sample(pairs, min(len(pairs), r.random() < 0.1))
        words = [command, *(word for pair in pairs for word in pair)]
        if r.random() < 0.15:
            i = r.randrange(len(words))
            word = str(words[i])
            words[i:i + 1] = r.choice([[], [word[:-1]], [word + "s"], [word + "=1"], [r.choice(WORDS)], [word, "-h"]])
        data = contents(place / "data")
        outcome = ended_well(case.run_either(words), *[] if words and words[0] else [rb"(?s).*\nCommands\n.*"])
        if contents(place / "data") != data:
            raise Fault("the data has changed")
        return outcome
    return None, case


# The campaign

PARTS = {"kills": kills, "calls": calls, "disks": disks, "options": options}
ALIKE = 3  # Of faults with the same message, so many are shown and kept.


def run_part(part, lab, args):
    """The numbers of cases and faults"""
    start, lock, outcomes, alike = time.monotonic(), threading.Lock(), collections.Counter(), collections.Counter()
    limit, run_case = PARTS[part](lab)
    numbers = iter([args.case] if args.case is not None else range(min(limit or INT_MAX, args.rounds or INT_MAX)))

    def work(_):
        while args.rounds or args.case is not None or time.monotonic() < start + args.seconds:
            with lock:
                n = next(numbers, None)
            if n is None:
                return
            case, message = Case(lab.folder.parent / f"{part}{n}", random.Random(f"{args.seed} {part} {n}")), None
            try:
                outcome = run_case(case, n)
            except Fault as fault:
                outcome, message = "faults", str(fault)
                (case.folder / "commands.txt").write_text("\n".join(case.commands), errors="surrogateescape")
            with lock:
                outcomes[outcome] += 1
                alike[kind := message and re.sub(r"\d+|/\S+", "N", message)] += 1
                if message and alike[kind] <= ALIKE:
                    again = f"dev/test/faults.py --only {part} --seed {args.seed} --case {n}"
                    print(f"fault: {case.note}{message}\n    again: {again}    kept: {case.folder}", flush=True)
                else:
                    shutil.rmtree(case.folder)

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        try:
            list(pool.map(work, range(os.cpu_count())))
        finally:
            numbers = iter([])  # Ctrl-C ends all of them
    total, faults, of = sum(outcomes.values()), outcomes.pop("faults", 0), f" of {limit}" if limit else ""
    said = "".join(f", {n} {name}" for name, n in sorted(outcomes.items()))
    print(f"{part}: {total}{of} cases in {time.monotonic() - start:.0f} s{said}, {faults} faults", flush=True)
    return total, faults


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    length = parser.add_mutually_exclusive_group()
    length.add_argument("--seconds", type=float, default=60, help="for each part [60]")
    length.add_argument("--rounds", type=int, help="number of cases in each part")
    parser.add_argument("--only", choices=PARTS)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--case", type=int, help="only this one, of the part that --only names")
    args = parser.parse_args()
    if args.case is not None and not args.only:
        parser.error("--case needs --only")
    for number in signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGXCPU:  # they may be ignored where this starts
        signal.signal(number, signal.default_int_handler)
    folder = pathlib.Path(tempfile.mkdtemp(prefix="faults-"))
    faults = None
    try:
        lab = Lab(folder / "lab")
        counts = [run_part(part, lab, args) for part in ([args.only] if args.only else PARTS)]
        cases, faults = map(sum, zip(*counts))
    finally:
        if not faults:
            shutil.rmtree(folder)
    print(f"{cases} cases, {faults} faults")
    sys.exit(faults > 0)


if __name__ == "__main__":
    main()
