"""Shared by the tests: the repository's root, the program and runs of it, the real texts of TEST_DATA, GPT-2's
vocabulary for tiktoken."""

import functools
import os
import pathlib

import pytest

pytest.register_assert_rewrite("helpers", "prepare_helpers")
import prepare_helpers
from helpers import (
    ATTENTIONS, BYTES_AND_END_OF_TEXT, END_OF_TEXT, Parts, Program, made_up_tokens, training, weights_only,
    write_shard, write_tokenizer,
)

ROOT = pathlib.Path(__file__).resolve().parents[2]
# The names under which tiktoken looks for the files that it would otherwise download.
TIKTOKEN_NAMES = {
    "vocab.bpe": "6d1cbeee0f20b3d9449abfede4726ed8212e3aee",
    "encoder.json": "6c7ea1a7e38e3a7f062df639a5b80947f075ffe6",
}
# PROGRAM=train_gpt2_sanitized runs all tests with that build.
PROGRAM = os.environ.get("PROGRAM", "train_gpt2")
SANITIZED = "train_gpt2_sanitized"
# GPU_PROGRAM=train_gpt2cu runs those of the GPU on one; train_gpt2cu_checked and _sanitized watch its code.
GPU_PROGRAM = os.environ.get("GPU_PROGRAM", "train_gpt2cu_emulated")
BUILDS = [PROGRAM] + [SANITIZED] * (PROGRAM != SANITIZED and (ROOT / SANITIZED).exists())


@pytest.fixture(scope="session")
def root():
    return ROOT


@pytest.fixture(scope="session")
def prepare():
    """Runs prepare.py."""
    return functools.partial(prepare_helpers.run, ROOT)


@pytest.fixture(scope="session")
def test_data():
    """The folder with tinyshakespeare.txt, novels/ and gpt2/; the repository holds no text of others."""
    folder = os.environ.get("TEST_DATA")
    if not folder:
        pytest.skip("needs real text: the environment variable TEST_DATA names no folder")
    folder = pathlib.Path(folder).resolve()
    if not (folder / "tinyshakespeare.txt").is_file():
        pytest.fail(f"TEST_DATA={folder} has no tinyshakespeare.txt")
    return folder


@pytest.fixture(scope="session")
def gpt2_bpe(test_data, tmp_path_factory):
    """tiktoken's GPT-2, found without a network by this process and by those that it starts."""
    tiktoken = pytest.importorskip("tiktoken")
    cache = tmp_path_factory.mktemp("tiktoken")
    for name, cached in TIKTOKEN_NAMES.items():
        (cache / cached).symlink_to(test_data / "gpt2" / name)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TIKTOKEN_CACHE_DIR", str(cache))
        yield tiktoken.get_encoding("gpt2")


def find_program(name, if_missing=pytest.fail):
    if not (ROOT / name).is_file():
        if_missing(f"there is no {name}: run make -C dev {name}")
    return Program(ROOT / name)


@pytest.fixture(scope="session")
def program():
    return find_program(PROGRAM)


@pytest.fixture(scope="session", params=BUILDS)
def each_build(request):
    """For quick tests: the program, and the one that watches its own memory and arithmetic, where that is built."""
    return find_program(request.param)


@pytest.fixture(scope="session")
def parts():
    return Parts(find_program("dev/test/parts").path)


@pytest.fixture(scope="session")
def bench():
    return find_program("dev/bench/bench")


@pytest.fixture(scope="session")
def gpu_bench():
    return find_program(GPU_PROGRAM.replace("train_gpt2", "dev/bench/bench"), if_missing=pytest.skip)


@pytest.fixture(scope="session")
def data(tmp_path_factory):
    """Three shards to train on, one to validate on, and a tokenizer of bytes."""
    folder = tmp_path_factory.mktemp("data")
    for i, n in enumerate([700, 1500, 333]):
        write_shard(folder / f"train_{i}.bin", made_up_tokens(n, seed=i))
    write_shard(folder / "val_0.bin", made_up_tokens(400, seed=7))
    write_tokenizer(folder / "tokenizer.bin", BYTES_AND_END_OF_TEXT, END_OF_TEXT)
    return folder


@pytest.fixture(scope="session")
def finished(program, data, tmp_path_factory):
    """The folder of a finished run for each attention. Tests do not write into it."""
    folder = tmp_path_factory.mktemp("finished")
    for attention in ATTENTIONS:
        program.run(*training(data, folder / attention, "--attention", attention))
    return {attention: folder / attention for attention in ATTENTIONS}


@pytest.fixture(scope="session")
def model(finished):
    return finished["depth"] / "model.bin"


@pytest.fixture(scope="session")
def without_state(model, tmp_path_factory):
    """The model as llm.c would write it: it does not know its tokenizer, and none lies beside it."""
    path = tmp_path_factory.mktemp("without_state") / "model.bin"
    path.write_bytes(weights_only((model.parent.parent / "vanilla/model.bin").read_bytes()))
    return path
