"""Shared by the tests: the repository's root, the real texts of TEST_DATA, GPT-2's vocabulary for tiktoken."""

import os
import pathlib

import pytest

ROOT = pathlib.Path(__file__).resolve().parents[2]
# The names under which tiktoken looks for the files that it would otherwise download.
TIKTOKEN_NAMES = {
    "vocab.bpe": "6d1cbeee0f20b3d9449abfede4726ed8212e3aee",
    "encoder.json": "6c7ea1a7e38e3a7f062df639a5b80947f075ffe6",
}


@pytest.fixture(scope="session")
def root():
    return ROOT


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
