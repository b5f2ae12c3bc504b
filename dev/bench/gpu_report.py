#!/usr/bin/env python3
"""`make -C dev gpu-report`: all that is to know of this program on a GPU, in one file: dev/results/DATE_DEVICE.txt.

    dev/bench/gpu_report.py NVCC          builds, tests, measures on the first GPU; ten minutes
    dev/bench/gpu_report.py emulated      the same course with emulated kernels and a small model, to try this script
"""

import datetime
import os
import re
import shutil
import subprocess
import sys

from peers import parse_bench

ROOT = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

# ms a step, GPT-2 124M, bf16, 65,536 tokens: what an H200's limits give by arithmetic (dev/bench/kernels.md). These are
# no measurements.
TARGETS = {"embedding": 0.2, "LayerNorm": 3.6, "matmuls": 14.1, "matmuls, dx": 14.1, "matmuls, dw": 16.7,
           "attention": 11.9, "depth mixing": 6.6, "classifier": 22.3, "AdamW": 1.0}
STEP_TARGET = "vanilla and skip: 84, and 93 to 100 would be excellent; depth: 7 more"


def die(message):
    sys.exit(f"error: {message}")


def run(command, **more):
    try:
        return subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, **more)
    except OSError as error:
        die(f"{command[0]}: {error.strerror}")


def first_line(command):
    done = run(command) if shutil.which(command[0]) else None
    return done.stdout.strip().split("\n")[0] if done and done.returncode == 0 else ""


class Report:
    """Prints what it collects, so that one can watch."""

    def __init__(self):
        self.text, self.failed = "", []

    def say(self, line=""):
        print(line, flush=True)
        self.text += line + "\n"

    def step(self, command, show=lambda said: said):
        self.say(f"\n$ {' '.join(command)}")
        done = run(command)
        for line in show(done.stdout).rstrip("\n").split("\n"):
            self.say(line)
        if done.returncode:
            self.say(f"(exit status {done.returncode})")
            self.failed.append(" ".join(command))
        return done


def beside_targets(report, said):
    """The profiles in bench's output again, each part beside its target"""
    report.say("\nms a step, beside what an H200's limits give by arithmetic, vanilla's at 65,536 tokens:")
    report.say(STEP_TARGET)
    for row in parse_bench(said):
        report.say(f"{row['attention']:20}{row['ms']:10.2f}")
        for part, ms in row["parts"].items():
            report.say(f"    {part:16}{ms:10.2f}{TARGETS.get(part, ''):>10}")


def verdicts(said):
    """What a test program says, without the tests that pass."""
    return "\n".join(line for line in said.split("\n") if not line.startswith("ok ") and line.strip())


def pytest_verdicts(said):
    return "\n".join(re.findall("^(?:FAILED|ERROR|E ) .*|.*(?:passed|failed).*", said, re.M))


def main():
    if len(sys.argv) != 2 or not sys.argv[1]:
        die("no nvcc: `make -C dev gpu-report` looks for it in PATH and in /usr/local/cuda, or in CUDA=FOLDER")
    emulated = sys.argv[1] == "emulated"
    kind = "cu_emulated" if emulated else "cu"
    device, nvcc = "emulated", ""
    if not emulated:
        nvcc = first_line([sys.argv[1], "--version"]) and run([sys.argv[1], "--version"]).stdout.strip().split("\n")[-1]
        if not nvcc:
            die(f"{sys.argv[1]} does not run")
        os.environ["CUDA_DEVICE_ORDER"] = "PCI_BUS_ID"  # as nvidia-smi counts them
        query = "name,driver_version,memory.total,clocks.max.sm,power.limit"
        device = first_line(["nvidia-smi", "-i", os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0],
                             f"--query-gpu={query}", "--format=csv,noheader"])
        if not device:
            die("no GPU: nvidia-smi is missing or finds none "
                "(make -C dev gpu-report DEVICE=emulated tries this without one)")

    report = Report()
    now = datetime.datetime.now()
    commit = first_line(["git", "log", "-1", "--format=%h %cs"]) or "unknown (no git)"
    changed = ", with changes" if first_line(["git", "status", "--porcelain", "-uno"]) else ""
    report.say(f"train_gpt2{kind}, {now:%Y-%m-%d %H:%M}")
    report.say(f"commit {commit}{changed}")
    if emulated:
        report.say("EMULATED: no GPU took part. The kernels ran on a CPU; their times mean nothing and are left out.")
    else:
        report.say(f"device {device}")
        report.say(f"nvcc {nvcc}")
    programs = ["train_gpt2", f"train_gpt2{kind}", f"test_gpt2{kind}", f"dev/bench/bench{kind}"]
    make = ["make", "--no-print-directory", "-f", "dev/Makefile"] + ([] if emulated else [f"NVCC={sys.argv[1]}"])
    built = report.step(make + programs, lambda said: "built" if not re.search("error|warning", said) else said)
    if built.returncode:
        die("it does not build")

    report.step([f"./test_gpt2{kind}"], verdicts)
    if os.path.exists(os.path.join(ROOT, ".venv/ready")):
        report.step(["env", f"GPU_PROGRAM=train_gpt2{kind}", ".venv/bin/python", "-m", "pytest", "-q",
                     "dev/test/test_gpu.py"], pytest_verdicts)
    else:
        report.say("\nleft out: dev/test/test_gpu.py, for lack of .venv (make -C dev .venv/ready)")

    if emulated:
        shape = ["--layers", "2", "--heads", "2", "--channels", "128", "--context", "32", "--vocab", "257",
                 "--batch", "1", "--sequence", "32", "--steps", "1"]
    else:
        shape = ["--model", "gpt2", "--vocab", "50257", "--batch", "64", "--sequence", "1024", "--steps", "10"]
    for precision in ["bf16", "fp32"]:
        command = [f"dev/bench/bench{kind}", *shape, "--precision", precision, "--profile"]
        if precision == "fp32":
            command += ["--tokens", "0"]
        done = report.step(command, lambda said: said if not emulated or "error:" in said else
                           "it ran; its times are left out")
        fits = re.search(r"the largest --batch that fits is (\d+)", done.stdout)
        if fits and done.returncode:
            report.failed.pop()
            command[command.index("--batch") + 1] = fits[1]
            done = report.step(command)
        if precision == "bf16" and not emulated and done.returncode == 0:
            beside_targets(report, done.stdout)

    report.say("\n" + (f"failed: {'; '.join(report.failed)}" if report.failed else "all of this passed"))
    name = re.sub(r"[^a-z0-9]+", "-", device.split(",")[0].lower()).strip("-")
    path = os.path.join("dev", "results", f"{now:%Y-%m-%d}_{name}.txt")
    os.makedirs(os.path.join(ROOT, "dev", "results"), exist_ok=True)
    with open(os.path.join(ROOT, path), "w") as f:
        f.write(report.text)
    print(f"written: {path}")
    sys.exit(1 if report.failed else 0)


if __name__ == "__main__":
    main()
