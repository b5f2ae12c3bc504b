"""dev/bench/gpu_report.py on machines as they are: in a repository of shell scripts that play nvcc, nvidia-smi and the
programs, or fail at it."""

import contextlib
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from helpers import heed_signals

TOOLS = ["cat", "cmp", "echo", "env", "git", "make", "mkdir", "rm", "sh", "sleep", "timeout", "yes"]
SMALLEST = 'if [ "$1" = -v ]; then echo "1 passed, 0 failed"; exit; fi; '  # the first call of test_gpt2cu
TRAINS = """
while [ $# -gt 0 ]; do case $1 in --out) out=$2;; --steps) steps=$2;; esac; shift; done
mkdir -p $out; echo model > $out/model.bin; echo "trained to step $steps"
"""
TABLE = "\n".join(f"{name}  1.00 1.00 2.0 3.0 50.0% 6\n    attention   0.50 ms 50.0%"
                  for name in ("vanilla", "skip 1/1", "depth 1/0"))
GPUS = "GPU 0: NVIDIA A100 (UUID: GPU-aaaa)\nGPU 1: NVIDIA H200 (UUID: GPU-bbbb)"
MIGS = "GPU 0: NVIDIA A100 (UUID: GPU-aaaa)\n" + "\n".join(
    f"  MIG {size}     Device  {i}: (UUID: MIG-{i}{i})" for i, size in enumerate(["1g.5gb", "2g.10gb"]))
DETAILS = "580.65.06, 81559 MiB, 3 MiB, 0 %, 1410 MHz, 400.00 W"


def nvidia_smi(devices=GPUS, details=DETAILS):
    return f'case "$1" in -L) echo "{devices}";; *) echo "{details}";; esac'


class Machine:
    """A folder with the scripts of dev/bench and a fake of all else"""

    def __init__(self, root, folder):
        self.folder, self.nvcc = folder, folder / "bin/nvcc"
        self.environment = {"PATH": str(folder / "bin"), "LANG": "C.UTF-8"}
        (folder / "dev/bench").mkdir(parents=True)
        for name in "gpu_report.py", "gpu_machine.py", "peers.py":
            text = (root / "dev/bench" / name).read_text()
            (folder / "dev/bench" / name).write_text(text.replace("ASK_SECONDS = 20", "ASK_SECONDS = 1"))
        (folder / "dev/Makefile").write_text(".venv/ready:\n\t@echo no network\n")
        (folder / "bin").mkdir()
        for tool in TOOLS:
            (folder / "bin" / tool).symlink_to(shutil.which(tool))
        (folder / "bin/python3").symlink_to(sys.executable)
        (folder / "data_prep").mkdir()
        (folder / "data_prep/prepare.py").write_text("")
        (folder / "dev/reference").mkdir()
        (folder / "dev/reference/a.state.bin").write_text("")
        self.program("bin/nvcc", "echo Cuda compilation tools, release 13.0, V13.0.88")
        self.program("bin/nvidia-smi", nvidia_smi())
        self.program(".venv/bin/python", 'echo "3 passed"')
        self.program("train_gpt2", "")
        self.program("train_gpt2cu", TRAINS)
        self.program("test_gpt2cu", "echo '9 passed, 0 failed'")
        self.program("dev/bench/benchcu", f'echo "{TABLE}"')

    def program(self, name, script):
        path = self.folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"#!/bin/sh\n{script}\n")
        path.chmod(0o755)

    def command(self, *options):
        return [sys.executable, self.folder / "dev/bench/gpu_report.py", "--nvcc", self.nvcc, *options]

    def describe(self, monkeypatch):
        """What the report says about the machine"""
        monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
        for name, value in self.environment.items():
            monkeypatch.setenv(name, value)
        monkeypatch.syspath_prepend(str(self.folder / "dev/bench"))
        from gpu_machine import describe_machine
        return "\n".join(describe_machine(str(self.nvcc))[1]) + "\n"

    def reports(self):
        return sorted(self.folder.glob("dev/results/*.txt"))

    def report(self, *options, status):
        """The lines of the verdict, and the whole report"""
        done = subprocess.run(self.command(*options), env=self.environment, capture_output=True, text=True, timeout=60)
        assert (done.returncode, done.stderr) == (status, "")
        text = self.reports()[-1].read_text()
        verdict = text.split("\n\n")[0].split("\n")[1:]
        assert text.endswith("\n".join(["", *verdict, ""]))
        assert sorted(self.folder.glob("dev/results/*")) == self.reports()
        return verdict, text

    @contextlib.contextmanager
    def during(self, path):
        """The process of a report, once a script has written the file"""
        process = subprocess.Popen(self.command(), env=self.environment, stdout=subprocess.DEVNULL,
                                   preexec_fn=heed_signals)
        try:
            for _ in range(3000):
                if path.exists() and path.read_text().endswith("\n"):
                    break
                assert process.poll() is None
                time.sleep(0.02)
            yield process
        finally:
            process.kill()
            process.wait()


@pytest.fixture
def machine(root, tmp_path):
    return Machine(root, tmp_path)


def has_ended(file):
    """Whether the process whose number is in the file has; init may not have collected it yet."""
    try:
        return Path(f"/proc/{int(file.read_text())}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except FileNotFoundError:
        return True


def summary(text):
    """The parts and their outcomes at the end of a report"""
    rows = re.findall(r"^(\S.*?) +[\d.]+ s  (.*)", text.split("== summary")[1], re.M)
    return {name: outcome for outcome, name in rows}


NCU = """while [ "$1" != --log-file ]; do shift; done; cat > $2 << EOF
==PROF== Connected
"ID","Kernel Name","Grid Size","Metric Name","Metric Unit","Metric Value"
"0","void attention_kernel<64>(int)","(8, 1, 1)","dram__bytes.sum","Gbyte","1.5"
"0","void attention_kernel<64>(int)","(8, 1, 1)","gpu__time_duration.sum","us","1,250.5"
"1","norm_kernel(float)","(1, 1, 1)","dram__bytes.sum","byte","500,000"
"1","norm_kernel(float)","(1, 1, 1)","gpu__time_duration.sum","ms","2"
"2","norm_kernel(float)","(1, 1, 1)","dram__bytes.sum","Kbyte","1500"
"2","norm_kernel(float)","(1, 1, 1)","gpu__time_duration.sum","ms","3"
EOF"""


def test_times_of_kernels(machine):
    machine.program("bin/ncu", NCU)
    verdict, text = machine.report(status=0)
    assert verdict == ["All 16 parts passed."]
    assert re.search(r"calls.*\n +2 +5.000 +2500.0 +1.0  norm_kernel \(1, 1, 1\)"
                     r"\n +1 +1.250 +1250.5 +1500.0  attention_kernel<64> \(8, 1, 1\)\n", text)


def test_times_of_kernels_need_privileges(machine):
    refuses = 'while [ "$1" != --log-file ]; do shift; done; echo "==ERROR== ERR_NVGPUCTRPERM" > $2; exit 1'
    machine.program("bin/ncu", refuses)
    verdict, text = machine.report(status=0)
    assert verdict == ["left out: time of each kernel: ==ERROR== ERR_NVGPUCTRPERM"]


def test_all_parts_in_order(machine):
    git = ["git", "-C", machine.folder, "-c", "user.name=x", "-c", "user.email=x@x"]
    for words in ["init", "-q"], ["add", "dev/Makefile", "train_gpt2"], ["commit", "-qm", "x"]:
        subprocess.run([*git, *words], check=True)
    machine.program("train_gpt2", "true")
    verdict, text = machine.report(status=0)
    assert verdict == ["All 15 parts passed."]
    assert list(summary(text)) == [
        "build", "smallest dump", "test_gpt2cu", "pytest", "data", "train vanilla", "resume vanilla",
        "train skip", "resume skip", "train depth", "resume depth", "bench small",
        "bench GPT-2 bf16 batch 4", "bench GPT-2 bf16 batch 64", "bench GPT-2 fp32 batch 16"]
    for pattern in ["^commit     [0-9a-f]{7,} of [0-9-]{10}, with changes to train_gpt2$", r"^driver     580\.65\.06$",
                    r"^device     GPU 0 of 2: NVIDIA A100 \(GPU-aaaa\)\n +memory.total 81559 MiB, ",
                    "^host       .* cores;", "^nvcc       .*/bin/nvcc, CUDA 13.0$", r"^\$ \./test_gpt2cu$",
                    r"^9 passed, 0 failed\n\(passed, \d", "^vanilla +1.00\n    attention +0.50 +11.9$"]:
        assert re.search(pattern, text, re.M), pattern
    assert re.fullmatch(r"\d{4}-\d\d-\d\d_\d{6}_nvidia-a100.txt", machine.reports()[0].name)


def test_reports_never_replace_each_other(machine):
    processes = [subprocess.Popen(machine.command("--limit", "0"), env=machine.environment, stdout=subprocess.DEVNULL)
                 for _ in range(2)]
    assert [process.wait() for process in processes] == [1, 1]
    assert len(machine.reports()) == 2
    assert "not begun: build, smallest dump, test_gpt2cu, " in machine.reports()[0].read_text()


@pytest.mark.parametrize("script, says", [
    ("echo 'FAILED  dwte: 3 > 2'; echo 'FAILED  gelu'; echo '7 passed, 2 failed'; exit 1", "exit status 1: dwte, gelu"),
    ("echo ok      first; kill -SEGV $$", r"crashed with SIGSEGV: .*"),
    ("echo begun; trap '' TERM; sleep 1000 & echo $! > child; wait", "not finished after 1.5 s: begun"),
    (r"printf 'a\000\377\033[31m %01000d\n' 0", r"its output does not match '.*passed, 0 failed\$'"),
    ("yes garbage", "stopped, since it printed more than 4 MiB: garbage")],
    ids=["fails", "crashes", "hangs", "prints garbage", "prints without end"])
def test_other_parts_run_if_one_fails(machine, script, says):
    machine.program("test_gpt2cu", SMALLEST + script)
    verdict, text = machine.report("--part-limit", "1.5" if "sleep" in script else "30", status=1)
    assert len(verdict) == 1 and re.fullmatch(f"FAILED: test_gpt2cu: {says}", verdict[0])
    outcomes = summary(text)
    assert outcomes.pop("test_gpt2cu") == "FAILED" and set(outcomes.values()) == {"passed"} and len(outcomes) == 14
    assert len(text) < 20000 and not re.search("[\0\033]|0{400}", text)
    if (machine.folder / "child").exists():
        assert has_ended(machine.folder / "child")


def test_resume_that_gives_another_model_fails(machine):
    machine.program("train_gpt2cu", TRAINS + "case $out in *depth_resumed) echo other > $out/model.bin; esac")
    verdict, _ = machine.report(status=1)
    assert len(verdict) == 1 and verdict[0].startswith("FAILED: resume depth: exit status 1: ")


def test_failing_pytest_is_named(machine):
    failed = "FAILED test_gpu.py::test_x[depth] - assert 1"  # pytest says so if it is called with -rf
    machine.program(".venv/bin/python", f'[ "$1" = -c ] && exit; case "$*" in *-rf*) echo "{failed}";; esac; '
                                        'echo "=== 1 failed, 2 passed in 3 s"; exit 1')
    assert machine.report(status=1)[0] == ["FAILED: pytest: exit status 1: test_gpu.py::test_x[depth]"]


def test_without_pytest(machine):
    (machine.folder / ".venv/bin/python").unlink()
    (machine.folder / "pytest.py").write_text("raise ImportError")
    machine.environment["PYTHONPATH"] = str(machine.folder)
    verdict, text = machine.report(status=0)
    assert verdict == ["left out: pytest: no Python here has pytest: make -C dev .venv/ready"]
    assert "no network" in text and "bench small" in summary(text)


def test_program_that_is_not_built(machine):
    (machine.folder / "train_gpt2cu").unlink()
    verdict, text = machine.report(status=1)
    assert verdict[0].startswith("FAILED: build: exit status 2: ")
    assert verdict[1].startswith("FAILED: build train_gpt2cu: ")
    assert re.fullmatch("left out: pytest, train vanilla, .* depth: train_gpt2cu was not built", verdict[2])
    assert summary(text)["test_gpt2cu"] == summary(text)["bench small"] == "passed"


@pytest.mark.parametrize("rows", ["    attention  1.00 ms 5%\ndepth 1%", "vanilla 1 2 3 4.5.6 7.0% 8\ndepth 1%"])
def test_table_that_cannot_be_read(machine, rows):
    machine.program("dev/bench/benchcu", f'echo "{rows}"')
    assert machine.report(status=0)[0] == ["All 15 parts passed."]


def test_too_little_memory(machine):
    says = "error: the largest --batch that fits is 5"
    machine.program("dev/bench/benchcu", f'case "$*" in *"batch 64"*) echo "{says}" >&2; exit 1;; esac; echo "{TABLE}"')
    verdict, text = machine.report(status=0)
    assert verdict == [f"left out: bench GPT-2 bf16 batch 64: {says}"]
    assert summary(text)["bench GPT-2 fp32 batch 16"] == "passed"


def test_no_usable_gpu(machine):
    why = ("error: no GPU can be used here (CUDA driver version is insufficient): "
           "./train_gpt2 and ./test_gpt2 run on the CPU")
    machine.program("test_gpt2cu", f"echo '{why}'; exit 1")
    machine.program("bin/nvidia-smi", nvidia_smi(details=DETAILS.replace("580.65.06", "535.104.05")))
    verdict, text = machine.report(status=1)
    assert verdict[0] == f"FAILED: smallest dump: exit status 1: {why}"
    assert verdict[1].startswith("left out: test_gpt2cu, pytest, ") and verdict[1].endswith(": no usable GPU")
    assert len(verdict) == 2
    assert "\nThe driver is too old: CUDA 13 needs 580 or later, this is 535.104.05. Update it.\n" in text


@pytest.mark.parametrize("visible, devices, says", [
    (None, GPUS, r"GPU 0 of 2: NVIDIA A100 \(GPU-aaaa\)"), ("1", GPUS, r"GPU 1 of 2: NVIDIA H200 \(GPU-bbbb\)"),
    ("GPU-bb,0", GPUS, r"GPU 1 of 2: NVIDIA H200 \(GPU-bbbb\)"), ("", GPUS, "not known: .*CUDA_VISIBLE_DEVICES="),
    ("7", GPUS, "not known: nvidia-smi lists 2 GPUs, none of them CUDA_VISIBLE_DEVICES=7"),
    (None, MIGS, r"GPU 0 of 1: NVIDIA A100 MIG 1g.5gb \(MIG-00\)\n +of the whole GPU: "),
    ("GPU-aaaa", MIGS, r"GPU 0 of 1: NVIDIA A100 MIG 1g.5gb \(MIG-00\)"),
    ("MIG-11", MIGS, r"GPU 0 of 1: NVIDIA A100 MIG 2g.10gb \(MIG-11\)")])
def test_device_in_use(machine, monkeypatch, visible, devices, says):
    machine.program("bin/nvidia-smi", nvidia_smi(devices))
    if visible is not None:
        machine.environment["CUDA_VISIBLE_DEVICES"] = visible
    text = machine.describe(monkeypatch)
    assert re.search(f"^device     {says}", text, re.M)
    assert (f"CUDA_VISIBLE_DEVICES={visible}\n" in text) == (visible is not None)


@pytest.mark.parametrize("script, says", [
    (nvidia_smi(details="[N/A], [N/A], N/A, [Not Supported], [Insufficient Permissions], ERR!"),
     "not known: memory.total, memory.used, utilization.gpu, clocks.max.sm, power.limit\ndriver     not known\n"),
    (nvidia_smi(details="garbage"), "garbage\n"),
    (nvidia_smi().replace("*)", "*) exit 2;;*)"), r"\(exit status 2\)\n"),
    ("printf '\\000\\377garbage\\n'", "not known: nvidia-smi lists 0 GPUs"),
    ("echo NVIDIA-SMI has failed; exit 9", "not known: nvidia-smi: exit status 9: NVIDIA-SMI has failed\n"),
    ("sleep 1000", "not known: nvidia-smi: not finished after 1 s\n"),
    (None, "not known: nvidia-smi: No such file or directory\n")],
    ids=["N/A", "garbage", "no details", "more garbage", "fails", "hangs", "is missing"])
def test_what_nvidia_smi_may_do(machine, monkeypatch, script, says):
    machine.program("bin/nvidia-smi", script)
    if script is None:
        (machine.folder / "bin/nvidia-smi").unlink()
    assert re.search(says, machine.describe(monkeypatch))


def test_no_nvcc(machine):
    machine.nvcc = ""
    done = subprocess.run(machine.command(), env=machine.environment, capture_output=True, text=True)
    assert done.returncode == 1 and re.fullmatch("error: no nvcc in PATH or /usr/local/cuda: .*\n", done.stderr)
    assert not machine.reports()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP], ids=lambda number: number.name)
def test_stopped_in_the_middle(machine, number):
    child = machine.folder / "child"
    machine.program("test_gpt2cu", f"{SMALLEST} echo begun; echo $$ > child; sleep 1000")
    with machine.during(child) as process:
        process.send_signal(number)
        assert process.wait(20) == 1
    text = machine.reports()[0].read_text()
    assert f"\nINCOMPLETE: ended by {number.name}\nstopped: test_gpt2cu\nnot begun: pytest, data, " in text
    assert summary(text)["smallest dump"] == "passed" and "\nbegun\n(stopped, " in text
    assert has_ended(child)


def test_killed_in_the_middle(machine):
    child = machine.folder / "child"
    machine.program("test_gpt2cu", f"{SMALLEST} echo begun; echo $$ > child; sleep 1000")
    with machine.during(child) as process:
        process.kill()
    os.killpg(os.getpgid(int(child.read_text())), signal.SIGKILL)
    path, = machine.reports()
    assert re.search(r"\nINCOMPLETE: test_gpt2cu began at [\d:]+ and has not ended. Its output: .*\n", path.read_text())
    assert summary(path.read_text()) == {"build": "passed", "smallest dump": "passed"}
    assert path.with_name(path.name + ".running").read_text() == "begun\n"


def test_killed_between_two_parts(machine):
    machine.program(".venv/bin/python", "echo > asked; sleep 2")
    with machine.during(machine.folder / "asked") as process:
        process.kill()
    path, = machine.reports()
    assert path.read_text().splitlines()[1] == "INCOMPLETE: no part after test_gpt2cu has begun"


def test_limit(machine):
    machine.program("test_gpt2cu", SMALLEST + "sleep 1000")
    verdict, _ = machine.report("--limit", "1", status=1)
    assert verdict[0] == "INCOMPLETE: ended by LIMIT=1"  # on a busy machine, during an earlier part
    assert "pytest, data, train vanilla, " in verdict[-1]
    assert verdict[-1].startswith("not begun: ")


def test_make_passes_its_variables(root):
    done = subprocess.run(["make", "-n", "-C", root / "dev", "gpu-report", "LIMIT=7", "DEVICE=emulated", "ARCH=-a -b"],
                          capture_output=True, text=True)
    assert re.search(r'gpu_report\.py --emulated +(\\\n)? +--limit "7" -- .*ARCH=-a\\ -b', done.stdout), done.stdout
