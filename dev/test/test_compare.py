"""What of compare.py needs no packages: what it reads and refuses, its folder, its list of runs."""

import fcntl
import os
import subprocess
import sys

import pytest
from helpers import TIMEOUT, assert_one_line, made_up_tokens

if sys.version_info < (3, 11):
    pytest.skip("compare.py needs Python 3.11", allow_module_level=True)

STUDY = """
[data]
tokenizer = "bytes"
[train]
tokens = 20_000
batch-tokens = 256
context = 32
layers = 2
heads = 2
channels = 16
lr = 1e-2
val-every = 20
val-tokens = 512
save-every = 10
[attentions]
vanilla = {}
skip = { attention = "skip" }
depth = { attention = "depth", depth-stride = 1 }
"""
PARTS = """
[[part]]
name = "short"
seeds = 2
[[part]]
name = "long"
seeds = [3]
attentions = ["vanilla", "skip"]
context = 64
"""


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_bytes(bytes(made_up_tokens(5000)[1:]))
    return path


def comparison(folder, root, program, text):
    """A function that runs compare.py on a study, in this folder; its exit status, output and errors."""

    def run(study, *arguments, **environment):
        (folder / "mine.toml").write_text(study)
        command = [sys.executable, root / "dev/compare.py", "mine.toml", "--text", text, "--program", program.path]
        done = subprocess.run([str(word) for word in (*command, *arguments)], capture_output=True, text=True,
                              timeout=TIMEOUT, cwd=folder, env=program.environment() | environment)
        return done.returncode, done.stdout, done.stderr

    return run


@pytest.fixture
def compare(root, program, text, tmp_path):
    return comparison(tmp_path, root, program, text)


def test_a_dry_run_lists_the_runs(compare, tmp_path):
    status, out, err = compare(STUDY + PARTS, "--dry-run")
    assert (status, err) == (0, "")
    rows = [line.split() for line in out.splitlines()]
    # 78 steps of 256 tokens
    assert [row[:4] + row[5:6] for row in rows if row[:1] in (["short"], ["long"])] == [
        ["short", "vanilla", "2", "0", "19,968"], ["short", "skip", "2", "0", "19,968"],
        ["short", "depth", "2", "0", "19,968"],
        ["long", "vanilla", "1", "0", "19,968"], ["long", "skip", "1", "0", "19,968"]]
    assert "8 runs, 159,744 tokens" in out
    assert not (tmp_path / "run/mine/runs").exists() and (tmp_path / "run/mine/data/train_000.bin").exists()


@pytest.mark.parametrize("change, says", [
    (("", "["), "mine.toml: .*line 1"),
    (("channels", "chanels"), "mine.toml: part 'short': 'chanels' is not known here"),
    (("[train]", "[training]"), "mine.toml: 'training' is not known here"),
    (("tokenizer =", "tokeniser ="), r"mine.toml: \[data\]: 'tokeniser' is not known here"),
    (('["vanilla", "skip"]', '["vanilla", "skipped"]'), "part 'long': 'skipped' is not known here"),
    (("tokens = 20_000", ""), "mine.toml: part 'short': 'tokens' is missing"),
    (("tokens = 20_000", "token = 20_000"), "part 'short': 'token' is not known here"),
    (("tokens = 20_000", "tokens = 200"), "batch-tokens 256 must be .* at most the tokens of a run, 200"),
    (("tokens = 20_000", "tokens = '20k'"), "'tokens' is '20k', but must be a whole number, 1 or more"),
    (("batch-tokens = 256", "batch-tokens = 0"), "'batch-tokens' is 0, but must be a whole number, 1 or more"),
    *((("seeds = 2", f"seeds = {seeds}"), "'seeds' is .*, but must be a number of seeds, up to 1000, or a list of them")
      for seeds in ("'3'", "0", "[]", "1.5", "[1.5]", "true")),
    (("seeds = 2", "seeds = 1_000_000_000_000"), "a number of seeds, up to 1000"),
    (("seeds = 2", "seeds = [-1]"), "'seeds' is .*, but must be"),
    (("val-every = 20", "val-every = '20'"), "'val-every' is '20', but must be a whole number, 0 or more"),
    (("lr = 1e-2", "lr = nan"), "attention 'vanilla': 'lr' is nan, but must be a number"),
    (("lr = 1e-2", "lr = 1979-05-27"), "attention 'vanilla': 'lr' is 1979-05-27, but must be a number"),
    (('name = "short"', "name = 5"), "part 5: its name must be text"),
    (("[data]", "title = 5\n[data]"), "'title' is 5, but must be text"),
    (("[data]", "[data]\nval = 5"), "'val' is 5, but must be text"),
    (("[data]", "[data]\nval = [5]"), "'val' is .5., but must be text"),
    (("depth = {", "'skip!' = {"), "attention 'skip!': another one has the same letters and digits|same name"),
    (('attentions = ["vanilla", "skip"]', "attentions = []"), "part 'long': 'attentions' is empty"),
    (('skip = { attention = "skip" }', "skip = 3"), "mine.toml: is not as dev/compare.toml explains"),
    (("seeds = 2\n[[part]]", "seeds = 2\n[part]"), "mine.toml: .*part"),
    (("[[part]]\nname = \"short\"\nseeds = 2\n[[part]]", "[part]"), "parts, which begin with"),
    (("[train]", "[train]\nseed = 3"), "'seed' is not known here"),
    (('skip = { ', "skip = { context = 16, "), "'context' is not known here"),
    (('skip = { ', "skip = { tokens = 16, "), "'tokens' is not known here"),
    (('"long"', '"Short"'), "part 'Short' is there twice, with other options"),
    (('"long"', '"short"'), "part 'short' is there twice, with other options"),
    (("[3]", "[3]\n[[part]]\nname = 'LONG'\nseeds = [3]"), "two runs have the same name"),
    (("context = 64\n", "context = 64\n[[part]]\nname = 'long'\nseeds = [4]\ncontext = 64\n"), None),
    (("val-every = 20", ""), None),
    (("val-every = 20", "val-every = 0"), None),
    (('stride = 1', 'stride = 0'), "short-depth: --depth-stride 0"),
    (("heads = 2", "heads = 3"), "short-vanilla: impossible model: 16 channels are not a multiple of 3 heads"),
    (("context = 64", "context = 512"), "part 'long': batch-tokens 256 must be a multiple of context 512"),
    (('"bytes"', '"bytes"\nval = ["none*.txt"]'), r"there is no none\*.txt: name other files with --val"),
    (('"bytes"', '"words"'), "--tokenizer words"),
])
def test_studies_that_are_refused(compare, change, says):
    assert change[0] in STUDY + PARTS
    status, _, err = compare((STUDY + PARTS).replace(*change, 1), "--dry-run")
    if says:
        assert_one_line(status, err, says)
    else:
        assert (status, err) == (0, "")


def test_other_things_that_are_refused(compare, tmp_path):
    def refused(*arguments, says, **environment):
        status, _, err = compare(STUDY + PARTS, *arguments, **environment)
        assert_one_line(status, err, says)

    refused("--dry", says="unrecognized arguments: --dry")
    refused("--program", "none", says="none is not there: run make")
    refused("--dry-run", "--text", "none.txt", says="there is no none.txt: name other files with --text")
    refused("--dry-run", "--out", "mine.toml", says="mine.toml: File exists")
    refused("--dry-run", "--text", "mine.toml", says="mine.toml is taken for text: name the study before --text")
    status, _, err = compare((STUDY + PARTS).replace('"bytes"', '"words"'), "--dry-run", "--out", "typo")
    assert status == 1 and "--tokenizer words" in err
    assert compare(STUDY + PARTS, "--dry-run", "--out", "typo")[0] == 0
    (tmp_path / "theirs/data").mkdir(parents=True)
    refused("--dry-run", "--out", "theirs", says="theirs/data is there, but compare.py did not make it")
    (tmp_path / "without").mkdir()
    for name in "matplotlib", "scipy", "tomllib":
        (tmp_path / f"without/{name}.py").write_text("raise ImportError")
        path = os.pathsep.join([str(tmp_path / "without"), *filter(None, [os.environ.get("PYTHONPATH")])])
        says = "needs Python 3.11" if name == "tomllib" else f"needs {name}: .* -m pip install {name}"
        if name != "scipy":  # where matplotlib is missing too, it is asked for first
            refused(says=says, PYTHONPATH=path)


def test_a_folder_belongs_to_one_study(compare, tmp_path):
    status, out, _ = compare(STUDY + PARTS, "--dry-run")
    assert status == 0 and "tokens" in out
    (tmp_path / "other.txt").write_bytes(bytes(made_up_tokens(5000, seed=1)[1:]))
    status, _, err = compare(STUDY + PARTS, "--dry-run", "--text", "other.txt")
    assert_one_line(status, err, "run/mine was begun with another text or tokenizer")
    folder = os.open(tmp_path / "run/mine", os.O_RDONLY)
    fcntl.flock(folder, fcntl.LOCK_SH)
    status, _, err = compare(STUDY + PARTS, "--dry-run")
    os.close(folder)
    assert_one_line(status, err, "run/mine is in use by another compare.py")
    assert compare(STUDY + PARTS, "--dry-run")[0] == 0


@pytest.mark.parametrize("text, says", [
    ("a,b\n1,2\n", "is not of train_gpt2"),
    ("step,train_loss,val_loss,lr,grad_norm,ms,tokens_per_s\n1,x,,1,1,1,1\n", "is not of train_gpt2"),
    ("step,train_loss,val_loss,lr,grad_norm,ms,tokens_per_s\n1,2.5,,1\n", "has no rows yet"),
    ("", "has no rows yet"),
    (None, "metrics.csv: No such file or directory; name the folder of a run"),
])
def test_a_plot_needs_runs(root, tmp_path, text, says):
    if text is not None:
        (tmp_path / "metrics.csv").write_text(text)
    done = subprocess.run([sys.executable, root / "dev/plot.py", tmp_path], capture_output=True, text=True)
    assert_one_line(done.returncode, done.stderr, says)
