"""The program as several processes, which mpirun starts: on CPUs, and in the emulator on GPUs. MPIRUN=mpirun.mpich and
MPICXX=mpicxx.mpich, the latter for make, too, try another MPI."""

import math
import os
import re
import resource
import shutil
import signal
import struct
import subprocess
import sys
import time

import pytest

from conftest import ROOT
from helpers import (
    ATTENTIONS, HEADER_BYTES, VOCABULARY, Program, ended, made_up_tokens, metrics, read_to_step, training,
    write_shard,
)

MPIRUN, MPICXX = os.environ.get("MPIRUN", "mpirun"), os.environ.get("MPICXX", "mpicxx")
CPU, GPU = "train_gpt2_mpi", "train_gpt2cu_emulated_mpi"
pytestmark = pytest.mark.skipif(not os.path.exists("/proc") or not shutil.which(MPIRUN) or
                                not all((ROOT / name).exists() for name in (CPU, GPU)),
                                reason="needs Linux and MPI: mpirun, and mpicxx for make")

LONG = 3000  # steps: such a run does not end before it is disturbed


class Processes(Program):
    """The program as so many processes. Settings are the emulator's."""

    def __init__(self, build, number, **settings):
        super().__init__(ROOT / build)
        self.number = number
        self.settings = {f"GPT2_EMULATOR_{name}": str(value) for name, value in {"DEVICES": 4, **settings}.items()}

    def command(self, args):
        return [MPIRUN, "-n", str(self.number), *super().command(args)]

    def environment(self, threads=1):
        """Open MPI must be told that root may run it, and more processes than there are cores."""
        return super().environment(threads) | self.settings | {
            "OMPI_ALLOW_RUN_AS_ROOT": "1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1",
            "OMPI_MCA_rmaps_base_oversubscribe": "1", "PRTE_MCA_rmaps_default_mapping_policy": ":oversubscribe"}

    def fails(self, *args, says):
        """MPI adds lines of its own to the one."""
        status, _, err = self.finish(*args)
        assert status != 0
        assert_one_error(err.decode(), says)


class Different(Processes):
    """Processes with different commands, each a list of words; {} stands for the program."""

    def command(self, commands):
        words = [MPIRUN]
        for i, command in enumerate(commands):
            words += [*[":"] * (i > 0), "-n", "1", *(str(self.path) if word == "{}" else str(word) for word in command)]
        return words


def odd(data, out, *more, steps, total=12):
    """A run of `total` micro-batches a step. Sizes are odd, and tensors smaller than the shares of all processes. Each
    learning rate is the same, whatever --steps is."""
    return training(data, out, "--layers", 3, "--heads", 3, "--channels", 24, "--context", 13, "--sequence", 13,
                    "--batch", 1, "--total-batch", total * 13, "--schedule", "constant", "--warmup", 0,
                    "--val-tokens", 65, *more, steps=steps, save_every=5)


def assert_one_error(err, says):
    errors = re.findall(r"^error: .*", err, re.M)
    assert len(errors) == 1 and re.search(says, errors[0]), err


def ranks(out):
    """The process ids of a run's processes, by their number."""
    found = {}
    for pid in filter(str.isdigit, os.listdir("/proc")):
        try:
            with open(f"/proc/{pid}/cmdline") as words, open(f"/proc/{pid}/environ") as variables:
                words, variables = words.read().split("\0"), variables.read()
        except OSError:
            continue
        if words[0] in (str(ROOT / CPU), str(ROOT / GPU)) and str(out) in words:
            number = re.search(r"(?:^|\0)(?:OMPI_COMM_WORLD|PMI|PMIX)_RANK=(\d+)", variables)
            found[int(number[1])] = int(pid)
    return found


def numbers(out):
    """Losses and norms of all steps."""
    return [float(x) for row in metrics(out)[1:] for x in (row[1], row[2], row[4]) if x]


def rms_difference(a, b):
    return math.sqrt(sum((x - y) ** 2 for x, y in zip(a, b, strict=True)) / len(a))


def weights(out):
    data = (out / "model.bin").read_bytes()
    context, _, layers, _, channels, padded = struct.unpack_from("<6i", data, 8)
    n = (padded + context + 2) * channels + layers * (12 * channels + 13) * channels
    return struct.unpack_from(f"<{n}f", data, HEADER_BYTES)


# The same results


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("attention", ATTENTIONS)
@pytest.mark.parametrize("build", [CPU, GPU])
def test_trains_as_one_process_does(data, tmp_path, build, attention, precision):
    def run(number, name):
        out = tmp_path / name
        said = Processes(build, number).run(*odd(data, out, "--attention", attention, "--precision", precision,
                                                 total=total, steps=4))
        assert number == 1 or f"processes  {number}; each computes 1/{number} of a step" in said
        frequencies.add(re.search(r"frequencies alone would give ([\d.]+)", said)[1])
        return out

    frequencies = set()
    total, several = (12, (2, 3, 4)) if build == CPU else (4, (2, 4))
    one = run(1, "one")
    for number in several:
        out = run(number, str(number))
        assert numbers(out) == pytest.approx(numbers(one), rel={"fp32": 1e-6, "bf16": 1e-3}[precision])
        assert rms_difference(weights(out), weights(one)) < {"fp32": 1e-6, "bf16": 1e-4}[precision]
    again = run(4, "again")
    assert (out / "model.bin").read_bytes() == (again / "model.bin").read_bytes()
    assert metrics(out) == metrics(again)
    assert len(frequencies) == 1


def test_one_process_needs_no_mpirun(program, data, tmp_path):
    """Nor does it differ from a program without MPI."""
    program.run(*training(data, tmp_path / "without"))
    Program(ROOT / CPU).run(*training(data, tmp_path / "with"))
    Processes(CPU, 1).run(*training(data, tmp_path / "mpirun"))
    for out in (tmp_path / "with", tmp_path / "mpirun"):
        assert (out / "model.bin").read_bytes() == (tmp_path / "without/model.bin").read_bytes()
        assert metrics(out) == metrics(tmp_path / "without")


# Stopping and resuming


def test_mpirun_passes_sigusr1_on(data, tmp_path):
    with Processes(CPU, 2).start(*odd(data, tmp_path / "out", steps=LONG)) as process:
        read_to_step(process, 3)
        process.send_signal(signal.SIGUSR1)
        status, said, _ = ended(process)
    assert status == 0 and f"of {LONG}, and saved" in said


@pytest.mark.parametrize("build, before, rank, after", [(CPU, 2, 1, 3), (CPU, 4, 0, 1), (GPU, 2, 1, 4)])
def test_a_signal_to_one_process_stops_all(data, tmp_path, build, before, rank, after):
    out, other, never_stopped = tmp_path / "out", tmp_path / "other", tmp_path / "never_stopped"
    with Processes(build, before).start(*odd(data, out, steps=LONG)) as process:
        read_to_step(process, 3)
        os.kill(ranks(out)[rank], signal.SIGTERM)
        status, said, err = ended(process)
    assert (status, err) == (0, "")
    step = int(re.search(rf"stopped after step (\d+) of {LONG}, and saved", said)[1])
    assert metrics(out)[-1][0] == str(step)

    # Resumed by the same number it goes on to the same bits, and by another one nearly so.
    shutil.copytree(out, other)
    for number, folder in ((before, out), (after, other)):
        Processes(build, number).run("train", "--out", folder, "--resume", "--steps", step + 3)
    Processes(build, before).run(*odd(data, never_stopped, steps=step + 3))
    assert (out / "model.bin").read_bytes() == (never_stopped / "model.bin").read_bytes()
    assert metrics(out) == metrics(never_stopped)
    assert numbers(other) == pytest.approx(numbers(out), rel=1e-5)


@pytest.mark.parametrize("before, rank, after", [(2, 1, 4), (3, 0, 2)])
def test_a_killed_process_ends_all(data, tmp_path, before, rank, after):
    with Processes(CPU, before).start(*odd(data, tmp_path, steps=LONG)) as process:
        read_to_step(process, 3)
        others = ranks(tmp_path)
        os.kill(others.pop(rank), signal.SIGKILL)
        status, _, err = ended(process)
    assert status != 0 and "error: " not in err
    assert_gone(others)
    resumes(tmp_path, after)


def assert_gone(processes):
    """mpirun waits for those that it started; a moment may pass until they are gone."""
    for pid in processes.values():
        for _ in range(1000):
            if not os.path.exists(f"/proc/{pid}"):
                break
            time.sleep(0.01)
        else:
            raise AssertionError(f"process {pid} still runs")


def resumes(out, number, *more):
    said = Program(ROOT / CPU).run("describe", "--model", out / "model.bin")
    saved = int(re.search(r"checkpoint of step (\d+)", said)[1])
    Processes(CPU, number).run("train", "--out", out, "--resume", "--steps", saved + 2, *more)
    assert metrics(out)[-1][0] == str(saved + 2)


def test_full_disk_of_the_process_that_writes(data, tmp_path):
    """A limit on the size of files in its place, from some step on."""
    with Processes(CPU, 2).start(*odd(data, tmp_path, steps=LONG)) as process:
        read_to_step(process, 3)
        resource.prlimit(ranks(tmp_path)[0], resource.RLIMIT_FSIZE, (10_000, 10_000))
        status, _, err = ended(process)
    assert status != 0
    assert_one_error(err, r"/(model.bin|metrics.csv).*: File too large")
    resumes(tmp_path, 3)


# Errors


@pytest.mark.parametrize("rank", [0, 1])
def test_a_shard_that_is_corrupt_for_one_process(data, tmp_path, rank):
    """Such as on one of two machines; in its middle, so that it is noticed only in the midst of a run."""
    commands = []
    for i in range(2):
        folder, tokens = tmp_path / str(i), made_up_tokens(100_000)
        if i == rank:
            tokens[40_000:60_000:500] = [VOCABULARY] * 40
        shutil.copytree(data, folder)
        write_shard(folder / "train_3.bin", tokens)
        commands.append(["{}", *odd(folder, tmp_path / "out", steps=LONG)])
    Different(CPU, 2).fails(*commands, says=rf"/{rank}/train_3.bin: token \d+ .* is {VOCABULARY}, outside")
    resumes(tmp_path / "out", 3, "--train", f"{tmp_path}/{1 - rank}/train_*.bin")


def test_different_shards_are_refused(data, tmp_path):
    other = tmp_path / "other"
    shutil.copytree(data, other)
    write_shard(other / "train_1.bin", made_up_tokens(1500, seed=9))
    commands = [["{}", *odd(folder, tmp_path / "out", steps=1)] for folder in (data, data, other)]
    Different(CPU, 3).fails(*commands, says="the processes have different options, models or shards")
    assert not (tmp_path / "out").exists()


def test_different_commands_are_refused(data, tmp_path):
    Different(CPU, 2).fails(["{}", *odd(data, tmp_path / "out", steps=1)], ["{}", "describe"],
                            says="the processes were given different commands")


@pytest.mark.parametrize("args, says", [
    (["train"], "train needs --out"),
    (["eval", "--model", "nowhere"], "eval needs one process: leave out mpirun"),
    (["generate", "--model", "nowhere"], "generate needs one process"),
    (["train", "--lr", "much"], "--lr much")])
def test_an_error_of_all_is_printed_once(args, says):
    Processes(CPU, 3).fails(*args, says=says)


@pytest.mark.skipif("MPI" in Program(ROOT / "train_gpt2").run("--version"), reason="train_gpt2 was built with MPI")
def test_program_without_this_mpi(data, tmp_path):
    """Else each of them would train for itself."""
    Processes("train_gpt2", 3).fails(*odd(data, tmp_path / "out", steps=1),
                                     says="mpirun has started 3 processes, but this program was built without its MPI")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("number, total, nearest", [
    (3, 8, 9), (3, 10, 9), (4, 1, 4), (2, 7, 8), (2, 165_191_049, 165_191_048)])
def test_total_batch_that_does_not_divide(data, tmp_path, number, total, nearest):
    Processes(CPU, number).fails(
        *odd(data, tmp_path / "out", steps=1, total=total),
        says=rf"--total-batch {13 * total} .* x processes, {13 * number}; the nearest is {13 * nearest}$")
    assert not (tmp_path / "out").exists()


# Threads and memory


def test_threads(data, tmp_path):
    """Processes that may use the same cores share them."""
    def said(number, **variables):
        several = Processes(CPU, number)
        several.settings |= {"OMPI_MCA_hwloc_base_binding_policy": "none", **variables}
        environment = several.environment()
        del environment["OMP_NUM_THREADS"], environment["OMP_WAIT_POLICY"]  # so the program starts itself again
        several.environment = lambda _: environment | variables
        return several.run(*odd(data, tmp_path / "out", "--overwrite", steps=1, total=number))

    cores = len(os.sched_getaffinity(0))
    alone = int(re.search(r"machine +(\d+) thread", said(1))[1])  # a container may allow less than all cores
    assert re.search(r"machine +(\d+) thread", said(2))[1] == str(max(1, alone // 2))
    assert f"note: there are fewer cores than {cores + 1} processes x 1 thread" in said(cores + 1)
    threads = f"{cores} thread{'s' * (cores > 1)}"
    assert f"note: there are fewer cores than 2 processes x {threads}" in said(2, OMP_NUM_THREADS=str(cores))


def test_memory_is_what_is_counted(data, tmp_path):
    """To the byte. The emulator's log, with which nothing is computed, has a line for each allocation."""
    def fails(says, **settings):
        commands = [["env", f"GPT2_EMULATOR_LOG={log}", "{}", *odd(data, tmp_path / "out", "--overwrite", steps=1)]
                    for log in (tmp_path / "log", "/dev/null", "/dev/null")]
        Different(GPU, 3, **settings).fails(*commands, says=says)

    fails("became NaN")
    taken = sum(map(int, re.findall(r"^allocate (\d+)$", (tmp_path / "log").read_text(), re.M)))
    fails("became NaN", MEMORY=taken)
    fails("this needs .* of memory", MEMORY=taken - 1)


def test_describe_shards_moments():
    """16 bytes a parameter are weights, gradients and moments. Several processes have a share of the moments and one of
    the summed gradients each, and room for the largest tensor's, wte's, from all."""
    for number in (1, 2, 4):
        said = Processes(CPU, number).run("describe", "--model", "gpt2")
        bytes_ = 124_475_904 * (16 if number == 1 else 8 + 12 / number) + (number > 1) * 4 * 50_304 * 768
        assert re.search(r"gradients, moments +([\d.]+) MiB", said)[1] == f"{bytes_ / 2**20:.1f}"


# GPUs


@pytest.fixture(scope="module")
def nccl(tmp_path_factory):
    """test_nccl.cu"""
    emulator, place = ROOT / "dev/emulator", tmp_path_factory.mktemp("nccl")
    code, program = place / "test.cpp", place / "test"
    subprocess.run([sys.executable, emulator / "translate.py", emulator / "test_nccl.cu", code], check=True)
    subprocess.run([MPICXX, "-std=c++20", "-g", "-DGPT2_MPI", "-DOMPI_SKIP_MPICXX", "-DMPICH_SKIP_MPICXX", "-include",
                    emulator / "cuda_emulator.h", code, "-o", program], check=True)
    return Processes(program, 2)


@pytest.mark.parametrize("what, says", [
    ("right", None),
    ("another id", "ncclCommInitRank: not the id of process 0"),
    ("no communicator", "ncclSend without a communicator"),
    ("end without start", "ncclGroupEnd without ncclGroupStart"),
    ("group not ended", "NCCL: the program waits within a group, which ncclGroupEnd has not ended"),
    ("host memory", "ncclSend: 40 bytes that are not all in device memory"),
    ("fewer sent", r"NCCL: process \d receives 40 bytes from process \d, which sends another number"),
    ("more sent", r"NCCL: process \d receives 36 bytes from process \d, which sends another number"),
    ("two streams", "ncclRecv: its group is on another stream")])
def test_emulated_nccl(nccl, what, says):
    for seed in range(1, 5 if what == "right" else 2):
        nccl.settings["GPT2_EMULATOR_SEED"] = str(seed)
        status, _, err = nccl.finish(what)
        assert (status == 0) == (says is None)
        assert says is None or re.search(f"^emulator: {says}$", err.decode(), re.M), err.decode()


def test_more_processes_than_gpus(data, tmp_path):
    train = odd(data, tmp_path / "out", steps=1)
    Processes(GPU, 3, DEVICES=2).fails(*train, says="2 GPUs: start at most 2 processes here")
    Processes(GPU, 2, DEVICES=1).fails(*train, says="NCCL failed: invalid usage.*: Duplicate GPU detected")


def test_a_scheduler_shows_each_process_its_own_gpu(data, tmp_path):
    Different(GPU, 2, DEVICES=1).run(*(["env", f"GPT2_EMULATOR_FIRST={gpu}", "{}", *odd(data, tmp_path, steps=1)]
                                       for gpu in (5, 3)))


def test_calls_that_fail(data, tmp_path):
    """Of CUDA or NCCL, in one of two processes, from those that begin to those of the last step."""
    run = ["{}", *odd(data, tmp_path / "out", "--overwrite", steps=2, total=2)]
    _, _, err = Different(GPU, 2).finish(["env", "GPT2_EMULATOR_COUNT=1", *run], run)
    count = int(re.search(rb"emulator: (\d+) calls", err)[1])
    for call in (6, 7, count // 2, count - 150):
        Different(GPU, 2).fails(["env", f"GPT2_EMULATOR_FAIL={call}", *run], run, says=" failed: ")
