#!/usr/bin/env python3
"""`make -C dev gpu-report`: builds, tests, trains and measures on a GPU; writes dev/results/DATE_TIME_DEVICE.txt.

    dev/bench/gpu_report.py --nvcc NVCC     on the GPU that CUDA_VISIBLE_DEVICES chooses, or on the first one
    dev/bench/gpu_report.py --emulated      the same parts with emulated kernels and small models, to try this script

The report begins with a verdict and ends with a summary. It is rewritten whenever a part begins or ends, so a run that
is killed leaves a report of what it has done. The other parts run even if one fails, crashes or hangs.
"""

import argparse
import csv
import glob
import os
import re
import shlex
import shutil
import signal
import sys
import tempfile
import time
from typing import Callable, NamedTuple

from gpu_machine import ROOT, ask, describe_machine, faults, read, run, say, shorten, without
from peers import parse_bench

ATTENTIONS = ["vanilla", "skip", "depth"]
NO_GPU = "no GPU can be used here|needs a GPU of compute capability"  # what train_gpt2.cu says
IMPOSSIBLE = "the largest --batch that fits is|not even --batch 1 fits|ERR_NVGPUCTRPERM"  # the last is ncu's

# ms a step, GPT-2 124M, bf16, 65,536 tokens: what an H200's limits give by arithmetic (dev/bench/kernels.md). These are
# no measurements.
TARGETS = {"embedding": 0.2, "LayerNorm": 3.6, "matmuls": 14.1, "matmuls, dx": 14.1, "matmuls, dw": 16.7,
           "attention": 11.9, "depth mixing": 6.6, "classifier": 22.3, "AdamW": 1.0}
STEP_TARGET = "vanilla and skip: 84, and 93 to 100 would be excellent; depth: 7 more"

def with_targets(said):
    """bench's output, then the times of its profiles again, each beside its target"""
    lines = [said, "ms a step, beside what an H200's limits give by arithmetic, vanilla's at 65,536 tokens:",
             STEP_TARGET]
    for row in parse_bench(said):
        lines.append(f"{row['attention']:20}{row['ms']:10.2f}")
        lines += [f"    {part:16}{ms:10.2f}{TARGETS.get(part, ''):>10}" for part, ms in row["parts"].items()]
    return "\n".join(lines)


def kernel_table(said):
    """From ncu's CSV: calls of each kernel, mean time and traffic of a call; those that take longest in all first"""
    unit = {"ns": 1e-3, "us": 1, "ms": 1e3, "byte": 1e-6, "Kbyte": 1e-3, "Mbyte": 1, "Gbyte": 1e3}
    kernels = {}
    for row in csv.DictReader(line for line in said.splitlines() if line.startswith('"')):
        name = re.sub(r"\(.*|void ", "", row["Kernel Name"])[:70] + " " + row["Grid Size"]
        values = kernels.setdefault(name, {"gpu__time_duration.sum": [], "dram__bytes.sum": []})
        values[row["Metric Name"]].append(float(row["Metric Value"].replace(",", "")) * unit[row["Metric Unit"]])
    lines = ["calls   ms in all  us a call  MB a call  kernel and grid"]
    for name, values in sorted(kernels.items(), key=lambda kernel: -sum(kernel[1]["gpu__time_duration.sum"])):
        us, mb = values.values()
        lines.append(f"{len(us):5}{sum(us) * 1e-3:12.3f}{sum(us) / len(us):11.1f}{sum(mb) / len(mb):11.1f}  {name}")
    return "\n".join(lines)


# ----------------------------------------------------------------------------------------------------------------------
# The parts, those that tell most first


class Part(NamedTuple):
    name: str
    command: str
    limit: float  # seconds
    program: str = ""  # that must have been built
    wants: str = ""  # pattern of what it says when it has succeeded
    show: Callable = str


def all_parts(report, kind, make, nvcc, work):
    emulated = kind == "cu_emulated"
    train, test, bench = f"train_gpt2{kind}", f"test_gpt2{kind}", f"dev/bench/bench{kind}"
    programs = ["train_gpt2", train, test, bench]
    yield Part("build", f"{make} -k {' '.join(programs)}", 1800, show=faults)
    if report.outcomes("FAILED"):
        for program in programs:
            yield Part(f"build {program}", f"{make} {program}", 900)

    state = min(glob.glob("dev/reference/*.state.bin"), key=os.path.getsize, default="dev/reference/*.state.bin")
    all_passed = r"^[1-9]\d* passed, 0 failed$"
    yield Part("smallest dump", f"./{test} -v {state.replace('.state.', '.model.')} {state}", 120, test, all_passed,
               without("^    .* ok$"))
    dumps = " dev/reference/*.bin" if emulated else ""  # without finite differences, which take minutes in the emulator
    yield Part(test, f"./{test}{dumps}", 1800, test, all_passed, without("^ok "))

    if ask(".venv/bin/python", "-c", "import pytest")[1]:
        yield Part("installing pytest", f"rm -f .venv/ready; timeout 180 {make} .venv/ready || true", 200)
    python = next((p for p in (".venv/bin/python", sys.executable) if not ask(p, "-c", "import pytest")[1]), "")
    tests = f"GPU_PROGRAM={train} {shlex.quote(python)} -m pytest -v --no-header --tb=short -rfEs "
    tests += "dev/test/test_gpu.py dev/test/test_bench.py::test_bench_on_a_gpu"
    if emulated:
        tests += " -k 'not fifty and not and_back'"  # the longest
    yield Part("pytest", tests if python else "", 1800, train, "passed", without(r"PASSED|SKIPPED (\(|\[ )"))

    yield Part("data", "python3 data_prep/prepare.py --tokenizer bytes "
               f"--out {work}/data train_gpt2.cpp train_gpt2.cu", 60)
    shape, half, whole = "--layers 4 --heads 4 --channels 256 --context 256 --batch 16 --log-every 20", 100, 200
    if emulated:
        shape, half, whole = "--layers 2 --heads 2 --channels 128 --context 32 --batch 1 --log-every 2", 5, 10
    for attention in ATTENTIONS:
        out = f"{work}/{attention}"
        new = f"./{train} train --train '{work}/data/train_*.bin' {shape} --attention {attention}"
        new += " --schedule constant --warmup 5 --tokens 30"
        yield Part(f"train {attention}", f"{new} --steps {whole} --out {out}", 300, train,
                   f"trained to step {whole}")
        yield Part(f"resume {attention}", f"{new} --steps {half} --out {out}_resumed && "
                   f"./{train} train --resume --steps {whole} --out {out}_resumed && "
                   f"cmp {out}/model.bin {out}_resumed/model.bin && echo 'the same model to the bit'", 300, train,
                   "^the same model to the bit$", lambda said: shorten(said, 0, 8))

    gpt2 = "--model gpt2 --vocab 50257 --sequence 1024"
    benchmarks = [("small", "--layers 3 --heads 4 --channels 128 --context 96 --vocab 257 --batch 8 --steps 100", 200),
                  ("GPT-2 bf16 batch 4", f"{gpt2} --batch 4 --steps 10 --profile", 300),
                  ("GPT-2 bf16 batch 64", f"{gpt2} --batch 64 --steps 10 --profile --tokens 0", 600),
                  ("GPT-2 fp32 batch 16", f"{gpt2} --batch 16 --steps 5 --profile --tokens 0 --precision fp32", 600)]
    if emulated:
        small = "--layers 2 --heads 2 --channels 128 --context 32 --vocab 257 --batch 1 --steps 1 --profile"
        benchmarks = [("bf16", small, 300), ("fp32", f"{small} --tokens 0 --precision fp32", 300)]
    for name, options, limit in benchmarks:
        yield Part(f"bench {name}", f"{bench} {options}", limit, bench, "^depth .*%",
                   (lambda said: "it ran; its times mean nothing and are left out") if emulated else
                   with_targets if "bf16 batch 64" in name else str)
    ncu = shutil.which("ncu") or f"{os.path.dirname(nvcc)}/ncu"  # Nsight Compute's command, if it is installed
    if not emulated and os.access(ncu, os.X_OK):
        # Two steps and the products that measure the peak, without the many small kernels that initialize weights
        yield Part("time of each kernel", f"{ncu} --clock-control none --csv --log-file {work}/kernels.csv "
                   "-k 'regex:^(?!convert|noise).*' --metrics gpu__time_duration.sum,dram__bytes.sum "
                   f"{bench} {gpt2} --batch 64 --steps 1 --tokens 0 --attention vanilla; "
                   f"status=$?; cat {work}/kernels.csv; exit $status", 300, bench, '^"', kernel_table)

# ----------------------------------------------------------------------------------------------------------------------
# The report


class Report:
    def __init__(self, name, head, limit, part_limit):
        self.head, self.limit, self.part_limit = head, limit, part_limit
        self.began, self.sections, self.results = time.monotonic(), [], []  # a result: part's name, outcome, seconds
        self.stop_reason = self.no_gpu = self.incomplete = ""
        for number in signal.SIGINT, signal.SIGTERM, signal.SIGHUP:
            if signal.getsignal(number) != signal.SIG_IGN:  # nohup ignores SIGHUP
                signal.signal(number, lambda number, _: self.stop(signal.Signals(number).name))
        os.makedirs("dev/results", exist_ok=True)
        while True:
            self.path = f"dev/results/{time.strftime('%Y-%m-%d_%H%M%S')}_{name}.txt"
            try:
                open(self.path, "x").close()
                break
            except FileExistsError:  # another report began in this second
                time.sleep(1)
        say("\n".join(head))

    def stop(self, reason):
        self.stop_reason = self.stop_reason or reason

    def stopped(self):
        if time.monotonic() - self.began > self.limit:
            self.stop(f"LIMIT={self.limit:g}")
        return self.stop_reason

    def outcomes(self, beginning):
        """Lines of the outcomes that begin so, each with its parts"""
        found = {}
        for name, outcome, _ in self.results:
            if outcome.startswith(beginning):
                found.setdefault(outcome, []).append(name)
        return [": ".join([outcome.split(": ")[0], ", ".join(names), *outcome.split(": ", 1)[1:]])
                for outcome, names in found.items()]

    def verdict(self):
        lines = self.outcomes("FAILED")
        if self.incomplete:
            lines.append(f"INCOMPLETE: {self.incomplete}")
        elif self.stop_reason:
            lines += [f"INCOMPLETE: ended by {self.stop_reason}", *self.outcomes("stopped")]
        lines += self.outcomes("not begun") + self.outcomes("left out")
        return lines or [f"All {len(self.results)} parts passed."]

    def write(self):
        """The whole report, in place of the last one"""
        times = [f"{outcome.split(':')[0]:10}{seconds:9.1f} s  {name}" for name, outcome, seconds in self.results]
        summary = [f"\n== summary, after {time.monotonic() - self.began:.0f} s", *times, *self.verdict()]
        text = "\n".join([self.head[0], *self.verdict(), "", *self.head[1:], *self.sections, *summary]) + "\n"
        try:
            with open(self.path + ".new", "w", encoding="utf-8") as file:
                file.write(text)
            os.replace(self.path + ".new", self.path)
        except OSError as error:
            say(f"{self.path}: {error.strerror}")

    def why_left_out(self, part):
        not_built = [name for name, outcome, _ in self.results if name.startswith("build ") and outcome != "passed"]
        if f"build {part.program}" in not_built:
            return f"{part.program} was not built"
        return self.no_gpu or ("" if part.command else "no Python here has pytest: make -C dev .venv/ready")

    def run(self, part):
        outcome = "not begun" if self.stopped() else self.why_left_out(part) and f"left out: {self.why_left_out(part)}"
        if outcome:
            self.results.append((part.name, outcome, 0))
            return say(f"\n== {part.name}: {outcome}")
        say(f"\n== {part.name}\n$ {part.command}")
        output, began = f"{self.path}.running", time.monotonic()
        self.incomplete = f"{part.name} began at {time.strftime('%H:%M:%S')} and has not ended. Its output: {output}"
        self.write()
        failure = run(["sh", "-c", part.command], output, min(part.limit, self.part_limit), self.stopped)
        seconds, said = time.monotonic() - began, read(output)
        os.remove(output)
        outcome = self.outcome(part, failure, said)
        try:
            shown = part.show(said) if outcome == "passed" else said
        except (IndexError, ValueError):  # rows of a table are missing
            shown = said
        shown = f"{shorten(shown)}\n({outcome}, {seconds:.1f} s)".lstrip()
        say(shown)
        self.results.append((part.name, outcome, seconds))
        self.sections.append(f"\n== {part.name}\n$ {part.command}\n{shown}")
        self.incomplete = f"no part after {part.name} has begun"
        self.write()

    def outcome(self, part, failure, said):
        last = shorten(said, 0, 1).split("\n")[-1]
        if not failure:
            succeeded = re.search(part.wants, said, re.M)
            return "passed" if succeeded else f"FAILED: its output does not match '{part.wants}'"
        if self.stop_reason:
            return "stopped"
        if re.search(IMPOSSIBLE, said):
            return f"left out: {last}"
        if re.search(NO_GPU, said):
            self.no_gpu = "no usable GPU"
        failing = re.findall(r"^FAILED +(.*?)(?: - .*|: .*)?$", said, re.M)
        more = f" and {len(failing) - 3} more" if len(failing) > 3 else ""
        return f"FAILED: {failure}: {', '.join(failing[:3]) + more or last}"


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--nvcc", default="", help="the compiler that make uses")
    parser.add_argument("--emulated", action="store_true", help="emulated kernels instead")
    parser.add_argument("--limit", type=float, metavar="SECONDS", default=3600, help="for all parts [%(default)s]")
    parser.add_argument("--part-limit", type=float, metavar="SECONDS", default=1800, help="for each [%(default)s]")
    parser.add_argument("variables", nargs="*", metavar="NAME=VALUE", help="variables of the Makefile")
    args = parser.parse_args()
    if not args.emulated and not args.nvcc:
        sys.exit("error: no nvcc in PATH or /usr/local/cuda: CUDA=FOLDER names its folder; DEVICE=emulated needs none")
    os.chdir(ROOT)
    os.environ["CUDA_DEVICE_ORDER"] = "PCI_BUS_ID"  # CUDA then numbers GPUs as nvidia-smi does
    kind = "cu_emulated" if args.emulated else "cu"
    device, machine = describe_machine(args.nvcc)
    head = [f"Report of train_gpt2{kind}, {time.strftime('%Y-%m-%d %H:%M:%S')}", *machine]
    if args.emulated:
        head.insert(1, "EMULATED: no GPU took part. The kernels ran on a CPU.")
    slug = "emulated" if args.emulated else re.sub("[^a-z0-9]+", "-", device.lower()).strip("-") or "gpu"
    try:
        report = Report(slug, head, args.limit, args.part_limit)
    except OSError as error:
        sys.exit(f"error: dev/results cannot be written: {error.strerror}")
    make = shlex.join(["make", "--no-print-directory", "-f", "dev/Makefile", *args.variables])
    with tempfile.TemporaryDirectory() as work:
        for part in all_parts(report, kind, make, args.nvcc, work):
            report.run(part)
    report.incomplete = ""
    report.write()
    verdict = report.verdict()
    say("\n" + "\n".join([*verdict, f"written: {report.path}"]))
    sys.exit(any(line.startswith(("FAILED", "INCOMPLETE")) for line in verdict))


if __name__ == "__main__":
    main()
