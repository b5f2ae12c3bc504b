"""The program with its model on a GPU, from outside: it trains, generates and fails as train_gpt2 does on a CPU. Its
kernels run in dev/emulator; GPU_PROGRAM=train_gpt2cu tries a real GPU, but for what only the emulator can play."""

import math
import re
import signal
import struct
import subprocess
import sys

import pytest

from conftest import GPU_PROGRAM, find_program
from helpers import (
    ATTENTIONS, CONTEXT, HEADER_BYTES, PARAMETERS, SEQUENCE, TRAILER_BYTES, WEIGHTS_END, Emulated, assert_one_line,
    contents, metrics, training,
)

emulator_alone = pytest.mark.skipif(GPU_PROGRAM == "train_gpt2cu", reason="a GPU that the emulator alone can play")
FP32 = ["--precision", "fp32"]
FEW = ["--batch", 1, "--total-batch", SEQUENCE, "--val-tokens", 2 * SEQUENCE]  # tokens a step
# Queries, keys and values of 64 channels: bf16's attention in tiles, of which a sequence takes two. At a higher rate, a
# batch of one sequence makes losses jump, and runs that differ by a rounding part.
TILES = ["--heads", 1, "--channels", 64, "--context", 70, "--sequence", 65, "--batch", 1, "--total-batch", 65,
         "--lr", "3e-4"]


@pytest.fixture(scope="session")
def gpu():
    return find_program(GPU_PROGRAM)


@pytest.fixture
def gpu_with(gpu):
    return lambda **settings: Emulated(gpu.path, **settings)


@pytest.fixture(scope="session")
def text_data(root, tmp_path_factory):
    """Shards of real text, this repository's."""
    folder = tmp_path_factory.mktemp("text_data")
    subprocess.run([sys.executable, root / "data_prep/prepare.py", "--tokenizer", "bytes", "--out", folder,
                    root / "train_gpt2.cpp", root / "train_gpt2.cu"], check=True, stdout=subprocess.DEVNULL)
    return folder


def column(out, i):
    return [float(row[i]) for row in metrics(out)[2:]]  # after the names and step 0


def losses(out):
    return column(out, 1)


def rms_difference(a, b):
    return math.sqrt(sum((x - y) ** 2 for x, y in zip(a, b, strict=True)) / len(a))


def arrays(out):
    """Parameters and both of AdamW's moments in a run's checkpoint."""
    data = (out / "model.bin").read_bytes()
    moments = data[-TRAILER_BYTES - 2 * 4 * PARAMETERS:-TRAILER_BYTES]
    return [struct.unpack(f"<{PARAMETERS}f", part) for part in
            (data[HEADER_BYTES:WEIGHTS_END], moments[:4 * PARAMETERS], moments[4 * PARAMETERS:])]


# Training


@pytest.mark.parametrize("attention", ATTENTIONS)
def test_losses_of_fifty_steps_are_those_of_the_cpu(program, gpu, text_data, tmp_path, attention):
    def run(which, precision, *more):
        out = tmp_path / f"{which.path.name}_{precision}"
        which.run(*training(text_data, out, "--attention", attention, "--precision", precision, "--overwrite",
                            "--val-tokens", 1, *more, steps=50))
        return losses(out)

    two = ["--batch", 2, "--total-batch", 2 * SEQUENCE]
    assert run(gpu, "fp32", *two) == pytest.approx(run(program, "fp32", *two), rel=1e-5, abs=0)
    # Both round the same values at the same points, and sum in another order, so some roundings fall the other way. Yet
    # the two stay nearer to each other than to fp32; how near that is follows from the run itself.
    exact, rounded = run(program, "fp32", *TILES), run(program, "bf16", *TILES)
    assert rms_difference(run(gpu, "bf16", *TILES), rounded) < 0.5 * rms_difference(rounded, exact)


@pytest.mark.parametrize("attention", ATTENTIONS)
def test_run_moves_to_the_gpu_and_back(program, gpu, data, tmp_path, attention):
    """CPU, GPU, CPU; each ends where it is stopped."""
    def arguments(out):
        return training(data, out, "--attention", attention, *FP32, *FEW, steps=200, save_every=25)

    program.run(*arguments(tmp_path / "other"))
    out = tmp_path / "out"
    status, said, err = program.stop(*arguments(out), after=20, by=signal.SIGTERM)
    assert (status, err) == (0, "") and "stopped after step" in said
    status, said, err = gpu.stop("train", "--out", out, "--resume", after=100, by=signal.SIGTERM)
    assert (status, err) == (0, "") and "stopped after step" in said
    program.run("train", "--out", out, "--resume")
    assert [row[0] for row in metrics(out)] == [row[0] for row in metrics(tmp_path / "other")]
    for i in 1, 4:  # training losses, norms
        assert column(out, i) == pytest.approx(column(tmp_path / "other", i), rel=1e-4)
    for ours, theirs in zip(arrays(out), arrays(tmp_path / "other")):
        assert rms_difference(ours, theirs) < 1e-4 * math.sqrt(sum(x * x for x in theirs) / len(theirs))


def test_run_on_the_gpu_ends_as_if_never_stopped(gpu, data, tmp_path):
    def arguments(out):
        return training(data, out, "--attention", "depth", "--sample-every", 50, *FEW, steps=100, save_every=25)

    gpu.run(*arguments(tmp_path / "other"))
    status, said, err = gpu.stop(*arguments(tmp_path / "out"), after=10, by=signal.SIGTERM)
    assert (status, err) == (0, "") and "stopped after step" in said
    gpu.run("train", "--out", tmp_path / "out", "--resume")
    assert contents(tmp_path / "out")["model.bin"] == contents(tmp_path / "other")["model.bin"]
    assert metrics(tmp_path / "out") == metrics(tmp_path / "other")


@pytest.mark.parametrize("attention", ATTENTIONS)
@pytest.mark.parametrize("heads, channels, sequence", [(1, 8, 5), (3, 24, 3)])
def test_layers_smaller_than_their_slots(program, gpu, data, tmp_path, attention, heads, channels, sequence):
    """Biases and activations of a layer do not fill a multiple of 256 bytes, so there are gaps between layers."""
    shape = ["--heads", heads, "--channels", channels, "--batch", 1, "--sequence", sequence,
             "--total-batch", 3 * sequence, "--attention", attention, "--precision", "bf16", "--val-tokens", 1]
    program.run(*training(data, tmp_path / "cpu", *shape, steps=2))
    for name, more in ("kept", []), ("again", ["--recompute"]):
        gpu.run(*training(data, tmp_path / name, *shape, *more, steps=2))
        assert losses(tmp_path / name) == pytest.approx(losses(tmp_path / "cpu"), rel=1e-3)


def test_recompute_changes_memory_alone(gpu, data, tmp_path):
    for attention in ATTENTIONS:
        for name, more in ("kept", []), ("again", ["--recompute"]):
            gpu.run(*training(data, tmp_path / name, "--attention", attention, "--overwrite", *FP32,
                              *FEW, *more, steps=4))
        assert metrics(tmp_path / "kept") == metrics(tmp_path / "again")


# Generating and measuring


@pytest.mark.parametrize("name", ["vanilla_L2_NH5_C40_V150", "skip_L3_NH3_C24_V61", "depth_L5_NH2_C16_V61"])
def test_greedy_text_is_that_of_the_cpu(program, gpu, root, name):
    """Past the end of the context; after a prompt of one token, one that fills the context, one that is longer. The
    models are those of the dumps: their weights are wide, so that each position and layer has its say."""
    model, = root.glob(f"dev/reference/{name}_B2_T37*.model.bin")
    context = 40
    for length in 1, context, context + 9:
        prompt = ",".join(str(7 * i % 61) for i in range(length))
        args = ["generate", "--model", model, "--prompt-tokens", prompt, "--tokens", 2 * context, "--temperature", 0,
                *FP32]
        assert gpu.run(*args) == program.run(*args)


def test_text_at_random_is_that_of_the_cpu(program, gpu, model):
    args = ["generate", "--model", model, "--tokens", 2 * CONTEXT, "--seed", 3, *FP32]
    assert gpu.run(*args) == program.run(*args)


def test_eval_is_that_of_the_cpu(program, gpu, model, data):
    args = ["eval", "--model", model, "--val", data / "val_0.bin", "--sequence", SEQUENCE, "--batch", 3]
    loss, rounded, ours = (float(re.search(r"loss +([\d.]+)", p.run(*args, "--precision", precision))[1])
                           for p, precision in ((program, "fp32"), (gpu, "bf16"), (gpu, "fp32")))
    assert ours == pytest.approx(loss, abs=2e-6)
    assert rounded == pytest.approx(loss, rel=2e-3)


@pytest.mark.parametrize("args", [["--help"], *([name, "--help"] for name in
                                  ("train", "eval", "generate", "describe"))], ids=" ".join)
def test_help_is_that_of_the_cpu(program, gpu, args):
    """But for the program's name, the precision unless told otherwise, and what chooses the machine's part."""
    def neutral(p):
        text = p.run(*args).replace(str(p.path), "PROGRAM")
        text = re.sub(r"(OMP_NUM_THREADS|CUDA_VISIBLE_DEVICES).*", "MACHINE", text)
        return re.sub(r"\[(fp32|bf16)\]", "[PRECISION]", text)

    assert neutral(gpu) == neutral(program)
    assert max(map(len, gpu.run(*args).replace(str(gpu.path), "./train_gpt2cu").splitlines())) <= 80


def test_version(gpu):
    assert re.fullmatch(r"gpt2x3 [\d.]+: CUDA \d+; fp32 and bf16\n", gpu.run("--version"))


# Where there is no GPU, or too little memory


@emulator_alone
@pytest.mark.parametrize("devices, says", [(0, "no CUDA-capable device"), (-1, "driver version is insufficient")])
def test_no_gpu(gpu_with, data, model, tmp_path, devices, says):
    gpu = gpu_with(devices=devices)
    for args in (training(data, tmp_path / "out"), ["eval", "--model", model, "--val", data / "val_0.bin"],
                 ["generate", "--model", model]):
        gpu.fails(*args, says=rf"no GPU can be used here \(.*{says}.*\): .*/test_gpt2 run on the CPU")
    assert not (tmp_path / "out").exists()
    assert "--attention" in gpu.run("train", "--help")


@emulator_alone
def test_describe_needs_no_gpu(gpu, gpu_with):
    args = ["describe", "--batch", 64]
    assert gpu_with(devices=-1).run(*args) == gpu.run(*args)


@emulator_alone
@pytest.mark.parametrize("command", ["train", "eval"])
def test_batch_too_large_names_the_largest_that_fits(gpu_with, data, model, tmp_path, command):
    too_large, sequence = 60, 32
    args = {"train": training(data, tmp_path / "out", "--total-batch", too_large * sequence, steps=1),
            "eval": ["eval", "--model", model, "--val", data / "val_0.bin"]}[command]
    gpu = gpu_with(memory={"train": 34 << 20, "eval": 34 << 20}[command])
    for name in "--batch", "--sequence":
        if name in args:
            at = args.index(name)
            args = args[:at] + args[at + 2:]

    def largest(batch):
        """What the program says to be the largest; None if it runs."""
        status, _, err = gpu.finish(*args, "--batch", batch, "--sequence", sequence)
        if status == 0:
            return None
        assert_one_line(status, err.decode(), r"needs [\d,.]+ MiB of memory, but only [\d,.]+ MiB are free")
        return int(re.search("the largest --batch that fits is (\\d+)$", err.decode())[1])

    best = largest(too_large)
    assert not (tmp_path / "out").exists()
    assert 1 < best < too_large
    assert largest(best) is None
    if command == "train":
        assert too_large % best == 0  # as --total-batch wants it
    else:
        assert largest(best + 1) == best


@emulator_alone
def test_not_even_a_batch_of_one_fits(gpu_with, data, model, tmp_path):
    gpu = gpu_with(memory=1 << 20)
    gpu.fails(*training(data, tmp_path / "out"), says="not even --batch 1 fits; use a smaller --sequence or model")
    gpu.fails("generate", "--model", model, says="are free: use a smaller model")
    assert not (tmp_path / "out").exists()


@emulator_alone
def test_largest_batch_can_be_launched(gpu_with, data, tmp_path):
    """A grid has at most 65535 blocks in y and z. The emulator only notes what it would run, so the loss is NaN."""
    gpu = gpu_with(log="/dev/null", memory=1 << 40)
    gpu.fails(*training(data, tmp_path, "--heads", 1, "--channels", 8, "--batch", 65535, "--sequence", 5,
                        "--total-batch", 5 * 65535, steps=1), says="became NaN")


@pytest.mark.parametrize("shape, says", [
    (["--heads", 2, "--channels", 24], "heads of 12 channels: on a GPU the head size must be a multiple of 8"),
    (["--heads", 1, "--channels", 264], "heads of 264 channels"),
    (["--heads", 64, "--channels", 8192], "8192 channels"),
    (["--heads", 256, "--channels", 2048, "--batch", 65535], "sequence x heads")])
def test_refuses_before_it_prints(gpu, shape, says):
    status, out, err = gpu.finish("describe", *shape)
    assert out == b""
    assert_one_line(status, err.decode(), says)


@emulator_alone
def test_dry_run_keeps_the_checkpoint(gpu, gpu_with, data, tmp_path):
    """Where no kernel runs there are no results, and none may be taken for one."""
    gpu.stop(*training(data, tmp_path, *FEW, steps=200), after=2, by=signal.SIGTERM)
    before = (tmp_path / "model.bin").read_bytes()
    gpu_with(log="/dev/null").fails("train", "--out", tmp_path, "--resume", says="became NaN")
    assert (tmp_path / "model.bin").read_bytes() == before
