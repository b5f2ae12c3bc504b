"""train_gpt2.cu under the emulator: the order of threads, blocks and streams changes nothing, every call of CUDA may
fail, cuBLASLt may refuse any product, and other GPUs give what the reference gives."""

import os
import re
import shutil

from concurrent.futures import ThreadPoolExecutor

import pytest

from conftest import GPU_PROGRAM, find_program
from helpers import ATTENTIONS, HEADS, Emulated, training

SEEDS = range(1, 11)
# Heads of 64, and a sequence of more than a tile: in bf16 attention goes by tiles, in fp32 by the plain kernels.
TILES = ["--layers", 2, "--heads", 2, "--channels", 128, "--context", 66, "--batch", 1, "--sequence", 66,
         "--total-batch", 132]
PLAIN = ["--context", 40, "--batch", 1, "--sequence", 37, "--total-batch", 74]
FAILING = 20  # how many calls of a run are made to fail


def emulated(**settings):
    return Emulated(find_program(GPU_PROGRAM).path, **settings)


@pytest.fixture(scope="module")
def shards(data, tmp_path_factory):
    """The shards alone: without a tokenizer there is no sample at a run's end, which would take most of its time."""
    folder = tmp_path_factory.mktemp("shards")
    for path in data.glob("*_?.bin"):
        (folder / path.name).symlink_to(path)
    return folder


def all_at_once(function, items):
    """The function's results, from as many processes at a time as there are cores."""
    with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
        return list(pool.map(function, items))


@pytest.mark.parametrize("attention", ATTENTIONS)
@pytest.mark.parametrize("precision, shape", [("bf16", TILES), ("fp32", PLAIN)], ids=["bf16", "fp32"])
def test_every_order_gives_the_same_bits(precision, shape, attention, shards, tmp_path):
    def trained(seed):
        out = tmp_path / str(seed)
        arguments = training(shards, out, "--vocab", 257, "--precision", precision, "--attention", attention, *shape,
                             "--val-tokens", 1, steps=2)
        text = emulated(seed=seed, blocks=1 + seed % 3).run(*arguments)
        losses = re.findall(r"loss [\d.]+", text)
        assert losses
        return (out / "model.bin").read_bytes(), losses

    first, *others = all_at_once(trained, SEEDS)
    assert all(other == first for other in others)


def calls_of(arguments):
    """How many calls of CUDA a run makes."""
    status, _, err = emulated(count=1).finish(*arguments)
    assert status == 0, err.decode()
    return int(re.search(r"^emulator: (\d+) calls$", err.decode(), re.M)[1])


def some_of(calls):
    """The first calls, and some throughout."""
    return sorted({*range(1, 9), *(1 + (calls - 1) * i // (FAILING - 9) for i in range(FAILING - 8))})


def assert_says_so(status, err, call):
    """The emulator says which call it made to fail, and the program stops with one line."""
    said = (rf"emulator: call {call}, .* is made to fail\n"
            r"error: (the GPU failed|cuBLASLt failed|no GPU can be used here).*\n")
    assert status == 1 and re.search(rf"^{said}\Z", err.decode(), re.M), err


def test_any_call_may_fail_in_training(shards, tmp_path):
    options = ["--vocab", 257, "--attention", "depth", "--val-tokens", 1]
    emulated().run(*training(shards, tmp_path / "kept", "--keep", *options, steps=4, save_every=1))
    complete = [path.read_bytes() for path in (tmp_path / "kept").glob("model_*.bin")]
    begun = tmp_path / "begun"
    begun.mkdir()
    (begun / "model.bin").write_bytes((tmp_path / "kept/model_000002.bin").read_bytes())
    shutil.copy(tmp_path / "kept/metrics.csv", begun)

    def resume(out):
        return training(shards, out, "--resume", *options, steps=4, save_every=1)

    def failing(call):
        out = shutil.copytree(begun, tmp_path / str(call))
        status, _, err = emulated(fail=call).finish(*resume(out))
        assert_says_so(status, err, call)
        assert (out / "model.bin").read_bytes() in complete  # what a failed save leaves is model.bin.tmp

    all_at_once(failing, some_of(calls_of(resume(shutil.copytree(begun, tmp_path / "counted")))))


def test_layers_without_a_cache(data, tmp_path):
    """Where all heads skip, the last layers keep neither keys nor values."""
    emulated().run(*training(data, tmp_path, "--attention", "skip", "--skip-heads", HEADS, steps=1))
    emulated().run("generate", "--model", tmp_path / "model.bin", "--tokens", 3, "--prompt", "ab")


def test_any_call_may_fail_in_generating(data, tmp_path):
    emulated().run(*training(data, tmp_path, "--attention", "skip", steps=1))
    arguments = ["generate", "--model", tmp_path / "model.bin", "--tokens", 3, "--prompt", "ab"]

    def failing(call):
        status, _, err = emulated(fail=call).finish(*arguments)
        assert_says_so(status, err, call)

    all_at_once(failing, some_of(calls_of(arguments)))


# What cuBLASLt refuses, and whether our own kernel then computes a product
REFUSALS = {
    "half": (False, {"algorithms": 8, "refuse_percent": 50, "seed": 1}),
    "most": (True, {"algorithms": 8, "refuse_percent": 90, "seed": 2}),
    "k": (True, {"algorithms": 8, "refuse_k": 16}),
    "alignment": (True, {"refuse_alignment": 32}),
    "epilogues": (False, {"refuse_epilogues": 30}),
    "everything": (True, {"refuse_percent": 100}),
}
DUMPS = ["skip_L2_NH2_C48_V61_B3_T13_nl1_nh1", "depth_L2_NH1_C64_V61_B2_T19_s1_w0"]


@pytest.mark.parametrize("regime", REFUSALS)
def test_cublaslt_may_refuse_products(root, regime):
    falls_back, settings = REFUSALS[regime]
    program = Emulated(find_program(GPU_PROGRAM.replace("train", "test")).path, **settings)
    paths = [root / f"dev/reference/{dump}.{part}.bin" for dump in DUMPS for part in ("model", "state")]
    status, out, err = program.finish(*paths)
    assert status == 0 and "FAILED" not in out.decode(), (out, err)
    notes = err.decode().splitlines()
    assert bool(notes) == falls_back and all(re.match("note: cuBLASLt refuses a product of", note) for note in notes)


# Other GPUs: shared memory and epilogues by compute capability, sums in other orders, inexact exp and tanh
CAPABILITIES = ["8.0", "8.6", "8.9", "9.0", "10.0", "12.0"]
OTHER = {"algorithms": 8, "approximate": 1}


@pytest.mark.skipif("_emulated" not in GPU_PROGRAM, reason="gives the same in each build, and the others are slow")
def test_dumps_on_other_gpus(root):
    test_program = find_program(GPU_PROGRAM.replace("train", "test")).path
    states = [path for path in sorted(root.glob("dev/reference/*.state.bin"))
              if int(re.search(r"_T(\d+)", path.name)[1]) < 64]  # the longer ones are slow
    paths = [str(state).replace(".state.", f".{part}.") for state in states for part in ("model", "state")]

    def finish(capability):
        seed = CAPABILITIES.index(capability)
        return Emulated(test_program, capability=capability, seed=seed, **OTHER).finish(*paths)

    for capability, (status, out, err) in zip(CAPABILITIES, all_at_once(finish, CAPABILITIES)):
        assert status == 0 and not err, (capability, re.findall(r"^FAILED.*", out.decode(), re.M), err)


def test_largest_heads_with_little_shared_memory(shards, tmp_path):
    shape = ["--vocab", 257, "--layers", 1, "--heads", 1, "--channels", 128, *TILES[6:]]
    program = emulated(capability="8.6")
    program.run(*training(shards, tmp_path, *shape, "--val-tokens", 1, steps=1))
    program.run("generate", "--model", tmp_path / "model.bin", "--tokens", 2, "--prompt-tokens", "1,2")
