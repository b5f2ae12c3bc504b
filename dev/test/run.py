"""What `make test` runs once everything is built: test_gpt2 over dev/reference, in each build; dev/fuzz; the emulator's
tests; then pytest over dev/test. Its last line adds their counts. With --peers (`make -C dev test-peers`) only what
needs PyTorch or other packages that .venv has not."""

import os
import subprocess
import sys
import tempfile
import xml.etree.ElementTree as ElementTree
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from functools import partial

ROOT = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
PROGRAMS = ["./test_gpt2", "./test_gpt2_sanitized", "./test_gpt2_amx", "dev/fuzz/fuzz"]  # on all cores
NEEDS = {"./test_gpt2_amx": "an x86-64 compiler", "dev/fuzz/fuzz": "Linux"}
EMULATED = ["./test_gpt2cu_emulated", "dev/emulator/test.py"]  # each on one
EMULATED_TESTS = ["dev/test/test_gpu.py", "dev/test/test_emulator.py"]
PEERS = ["dev/test/test_reference.py", "dev/test/test_prepare_peers.py", "dev/test/test_convert_peers.py",
         "dev/test/test_compare_peers.py"]


def run_program(program, out):
    """Counts of a program whose last line is `N passed, N failed`. That it says so and exits 0 only without a failure
    is part of the test: one that crashed counts as failed."""
    command, last = [sys.executable, program] if program.endswith(".py") else [program], ""
    print(f"== {program}", file=out, flush=True)
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, errors="replace") as process:
        for last in process.stdout:
            print(last, end="", file=out, flush=True)
    words = last.replace(",", "").split()
    counts = Counter({name: int(n) for n, name in zip(words[::2], words[1::2]) if n.isdigit()})
    if process.returncode != 0 and counts["failed"] == 0 or "passed" not in counts:
        print(f"{program} ended with exit status {process.returncode} and without its counts", file=out, flush=True)
        counts["failed"] += 1
    return counts


def side_by_side(runs):
    """Calls each with a file to write to. Shows the first one's output at once, and the others' when all have ended."""
    outs = [sys.stdout, *(tempfile.TemporaryFile("w+") for _ in runs[1:])]
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        counts = sum(pool.map(lambda run, out: run(out), runs, outs), Counter())
    for out in outs[1:]:
        out.seek(0)
        print(out.read(), end="")
        out.close()
    return counts


def run_pytest(python, tests, out):
    print("== pytest", *tests, file=out, flush=True)
    with tempfile.TemporaryDirectory() as folder:
        report = os.path.join(folder, "report.xml")
        command = [python, "-m", "pytest", "-q", "-rs", f"--junitxml={report}", *tests]
        status = subprocess.run(command, stdout=out).returncode
        if not os.path.exists(report):
            return Counter(failed=1)
        total = Counter()
        for suite in ElementTree.parse(report).iter("testsuite"):
            total.update({name: int(suite.get(name)) for name in ("tests", "failures", "errors", "skipped")})
    failed = total["failures"] + total["errors"]
    if status not in (0, 5) and failed == 0:  # 5: no test was collected
        failed = 1
    return Counter(passed=total["tests"] - failed - total["skipped"], failed=failed, skipped=total["skipped"])


def has_pytest(python):
    try:
        return subprocess.run([python, "-c", "import pytest"], stderr=subprocess.DEVNULL).returncode == 0
    except OSError:
        return False


def main():
    os.chdir(ROOT)
    peers = "--peers" in sys.argv[1:]
    environment = ".venv-peers" if peers else ".venv"
    python = next(filter(has_pytest, [f"{environment}/bin/python", sys.executable]), None)
    counts = Counter()
    if not peers:
        for program in PROGRAMS:
            if program in NEEDS and not os.path.exists(program):
                print(f"left out: {program}, which needs {NEEDS[program]}")
                continue
            counts += run_program(program, sys.stdout)
        emulated = [partial(run_program, program) for program in EMULATED]
        counts += side_by_side(emulated + ([partial(run_pytest, python, EMULATED_TESTS)] if python else []))
    if python:
        others = ["dev/test", *(f"--ignore={test}" for test in EMULATED_TESTS)]
        counts += run_pytest(python, PEERS if peers else others, sys.stdout)
    else:
        print(f"left out: dev/test, since neither {environment} nor {sys.executable} has pytest")
    skipped = f", {counts['skipped']} skipped" if counts["skipped"] else ""
    print(f"{counts['passed']} passed, {counts['failed']} failed{skipped}")
    sys.exit(counts["failed"] > 0)


if __name__ == "__main__":
    main()
