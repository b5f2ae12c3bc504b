"""What of compare.py and plot.py needs scipy and matplotlib: run by `make -C dev test-peers`."""

import json
import random
import re
import shutil
import signal
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from pathlib import Path
from types import SimpleNamespace

import pytest
from helpers import TIMEOUT, contents, heed_signals, wait_until
from test_compare import STUDY, compare, comparison, text  # noqa: F401

pytest.importorskip("matplotlib", reason="needs matplotlib: make -C dev test-peers")
stats = pytest.importorskip("scipy.stats", reason="needs scipy: make -C dev test-peers")

SAME_AND_WORSE = STUDY + """
same = {}
worse = { lr = 1e-3 }
[[part]]
attentions = ["vanilla", "same", "worse", "depth"]
seeds = 3
"""
STEPS, RUNS = 78, 12


@pytest.fixture(scope="module")
def report(root):
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(root / "dev"))
        import report
        yield report


@pytest.fixture(scope="module")
def complete(root, program, text, tmp_path_factory):  # noqa: F811
    """The folder of a complete study. Tests do not write into it."""
    folder = tmp_path_factory.mktemp("complete")
    status, _, err = comparison(folder, root, program, text)(SAME_AND_WORSE)
    assert (status, err) == (0, "")
    return folder / "run/mine"


def table(folder, first_column="attention"):
    """The first table of report.md that begins so: a row for each attention or seed."""
    lines = [*(folder / "report.md").read_text().splitlines(), ""]
    begin = next(i for i, line in enumerate(lines) if line.startswith(f"| {first_column} |"))
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines[begin + 2:lines.index("", begin)]]
    return {row[0]: row[1:] for row in rows}


def test_the_interval_is_scipys(report):
    r = random.Random(1)
    for n in 3, 4, 5, 17:
        a, b = ([r.gauss(3, 1) for _ in range(n)] for _ in range(2))
        differences = [x - y for x, y in zip(a, b)]
        low, high = stats.ttest_rel(a, b).confidence_interval(0.95)
        assert report.half_interval(differences) == pytest.approx((high - low) / 2, rel=1e-9)
        assert report.half_interval(differences[:2]) is None


def test_the_seeds_needed_are_those_of_power_tables(report):
    """G*Power: a t-test of matched pairs, two-sided at 5 %, power 80 %, by effect size."""
    for effect, n in (0.2, 199), (0.5, 34), (0.8, 15), (1.5, 6):
        assert report.seeds_needed([effect - 1, effect, effect + 1]) == n
        assert report.seeds_needed([-3 * effect - 3, -3 * effect, 3 - 3 * effect]) == n
    assert report.seeds_needed([-1, 0, 1]) is None and report.seeds_needed([0, 0, 0]) is None
    assert report.seeds_needed([4.1 - 4.0, 4.2 - 4.1, 4.3 - 4.2]) == 2 and report.seeds_needed([29, 30, 31]) == 2


def test_a_map_of_depth_has_a_panel_for_each_head(report):
    for heads in 1, 4, 5, 6, 7, 12:
        rows = [[layer, head, source, 0.5] for layer in (1, 2) for head in range(heads) for source in (0, layer)]
        figure = report.plot_depth([{"depth weights": rows}])
        figure.draw_without_rendering()
        assert [ax.get_title() for ax in figure.axes if ax.images] == [f"head {head}" for head in range(heads)]
        report.pyplot().close(figure)


def test_the_report_finds_what_differs_and_nothing_else(complete, program):
    study = complete
    rows, seeds = table(study), table(study, "seed")
    assert rows["same"][1:4] == rows["vanilla"][1:3] + ["+0.0000 [+0.0000, +0.0000]"]
    mean, low, high = map(float, re.findall(r"[+-][\d.]+", rows["worse"][3]))
    assert 0 < low < mean < high
    assert int(rows["worse"][4]) >= 2

    # The numbers are those of eval, and the differences those of scipy.
    losses = {}
    for attention in rows:
        for seed in 1, 2, 3:
            result = json.loads((study / f"results/all-{attention}-seed-{seed}.json").read_text())
            said = program.run("eval", "--model", study / f"runs/all-{attention}-seed-{seed}/model.bin",
                               "--val", study / "data/val_*.bin", "--by-position", "--batch", 8)
            assert result["by position"] == [float(x) for x in re.findall(r"^\d+,(.*)", said, re.M)]
            assert result["loss"] == pytest.approx(sum(result["by position"]) / 32, abs=2e-6)
            assert len(result["curve"]) == 5 and result["curve"][-1][0] == STEPS
            losses.setdefault(attention, []).append(result["loss"])
            assert seeds[str(seed)][list(rows).index(attention)] == f"{result['loss']:.4f}"
        assert float(rows[attention][1]) == pytest.approx(sum(losses[attention]) / 3, abs=6e-5)
    expected = stats.ttest_rel(losses["worse"], losses["vanilla"]).confidence_interval(0.95)
    assert [low, high] == pytest.approx(list(expected), abs=6e-5)


def test_the_report_is_complete(complete):
    study = complete
    names = {"all-curves", "all-positions", "all-depth-weights"}
    assert set(contents(study / "figures")) == {name + kind for name in names for kind in (".png", ".svg")}
    page = (study / "report.html").read_text()
    assert page.count('src="data:image/svg+xml;base64,') == page.count("<img") == 3 and "http" not in page
    for name in names:
        ElementTree.parse(study / f"figures/{name}.svg")
        assert f"figures/{name}.svg" in (study / "report.md").read_text()
    weights = json.loads((study / "results/all-depth-seed-1.json").read_text())["depth weights"]
    assert [row[:3] for row in weights] == [[1, head, source] for head in (0, 1) for source in (0, 1)]
    for head in 0, 1:
        assert sum(row[3] for row in weights if row[1] == head) == pytest.approx(1, abs=2e-6)


def test_a_complete_study_needs_results_only(complete, compare, tmp_path):  # noqa: F811
    study = shutil.copytree(complete, tmp_path / "run/mine")
    before = contents(study / "figures"), (study / "report.html").read_text()
    shutil.rmtree(study / "runs")
    shutil.rmtree(study / "data")
    for more in ["--report"], []:
        status, _, err = compare(SAME_AND_WORSE, *more)
        assert (status, err) == (0, "")
        assert before == (contents(study / "figures"), (study / "report.html").read_text())
    status, _, err = compare(SAME_AND_WORSE.replace("1e-2", "2e-2"), "--report")
    assert status == 1 and "all-vanilla-seed-1.json: this run has other options" in err
    (study / "results/all-worse-seed-2.json").unlink()
    assert compare(SAME_AND_WORSE, "--report")[0] == 0
    assert table(study)["worse"][3].count("[") == 0 and "11 of 12 runs" in (study / "report.md").read_text()
    assert "which are not complete or not timed: worse, seed 2.\n" in (study / "report.md").read_text()
    costs = (study / "costs.json").read_text()
    (study / "costs.json").write_text(costs.replace('"channels": 16', '"channels": 32'))  # of another study
    assert "no costs.json" in compare(SAME_AND_WORSE, "--report")[2]
    (study / "costs.json").write_text(costs)
    shutil.rmtree(study / "results")
    status, _, err = compare(SAME_AND_WORSE, "--report")
    assert status == 1 and "no complete run" in err


def steps_done(study):
    return sum(max(0, path.read_bytes().count(b"\n") - 2) for path in study.glob("runs/*/metrics.csv"))


def without_times(study):
    text = (study / "report.md").read_text()
    return re.sub(r"steps took \d+ \w+", "", text)


def test_killed_at_random_it_ends_in_the_same_report(complete, root, program, text, tmp_path):  # noqa: F811
    """Four times killed and once stopped by a Ctrl-C. It takes the costs of the complete study, so that all else in the
    report must be equal."""
    logged = tmp_path / "logged" / Path(program.path).name
    logged.parent.mkdir()
    logged.write_text(f'#!/bin/sh\necho "$@" >> {tmp_path}/log\nexec {program.path} "$@"\n')
    logged.chmod(0o755)
    study = tmp_path / "run/mine"
    study.mkdir(parents=True)
    shutil.copy(complete / "costs.json", study)
    (tmp_path / "mine.toml").write_text(SAME_AND_WORSE)
    command = [sys.executable, root / "dev/compare.py", "mine.toml", "--text", text, "--program", logged]
    steps = sorted(random.Random(7).sample(range(RUNS * STEPS * 9 // 10), 5))
    for when, by in zip(steps, (signal.SIGKILL, signal.SIGKILL, signal.SIGINT, signal.SIGKILL, signal.SIGKILL)):
        with subprocess.Popen(command, cwd=tmp_path, env=program.environment(), stdout=subprocess.DEVNULL,
                              stderr=subprocess.PIPE, text=True, preexec_fn=heed_signals) as process:
            wait_until(lambda: steps_done(study) >= when, process)  # noqa: B023
            process.send_signal(by)
            _, err = process.communicate(timeout=TIMEOUT)
        assert err == ("" if by == signal.SIGKILL else "stopped; the same command goes on\n")
    subprocess.run(command, cwd=tmp_path, env=program.environment(), check=True, stdout=subprocess.DEVNULL)
    trained = re.findall("^train .*--seed.*", (tmp_path / "log").read_text(), re.M)
    assert 1 <= sum(line.endswith("--resume") for line in trained) and len(trained) <= RUNS + 5
    assert contents(study / "figures") == contents(complete / "figures")
    assert without_times(study) == without_times(complete)


def test_a_run_that_fails_does_not_stop_the_others(compare, tmp_path):  # noqa: F811
    """Here because of a learning rate that train_gpt2 refuses; timing does without the rate."""
    study = STUDY.replace("20_000", "2560") + 'wild = { lr = 1e38, min-lr = 1e38, clip = 0 }\n[[part]]\nseeds = 2\n'
    status, out, err = compare(study)
    assert status == 1 and err.startswith("error: 2 of 8 runs failed; the first error: all-wild-seed-1: "), err
    assert out.count("  failed: all-wild-seed-") == 2 and out.count("  loss ") == 6
    assert list(table(tmp_path / "run/mine")) == ["vanilla", "skip", "depth"]


def test_a_run_without_its_result_begins_anew(compare, program, tmp_path):  # noqa: F811
    """With other options, say, than the checkpoint has that is there. Names are not mathematics."""
    study = STUDY + "[[part]]\nname = '$x^$ | y'\nseeds = 1\nattentions = ['vanilla']\n"
    first = study.replace("20_000", "10_000")
    assert compare(first)[0] == 0
    status, _, err = compare(study)
    assert status == 1 and "other options or data: steps 39, now 78; give another --out" in err
    shutil.rmtree(tmp_path / "run/mine/results")
    stops = tmp_path / "stops"  # a program that ends before it saves
    stops.write_text(f'#!/bin/sh\ncase "$*" in *--seed*) exit 1;; *) exec {program.path} "$@";; esac\n')
    stops.chmod(0o755)
    assert compare(study, "--program", stops)[0] == 1
    assert compare(study)[0] == 0
    result = json.loads((tmp_path / "run/mine/results/x-y-vanilla-seed-1.json").read_text())
    assert [step for step, _ in result["curve"]] == [0, 20, 40, 60, 78]
    assert compare(study, "--out", "again")[0] == 0
    assert result["loss"] == json.loads((tmp_path / "again/results/x-y-vanilla-seed-1.json").read_text())["loss"]


def test_costs_are_those_of_the_precision(compare, tmp_path):  # noqa: F811
    study = STUDY + "half = { precision = 'bf16' }\n[[part]]\nseeds = 1\nattentions = ['vanilla', 'half']\n"
    assert compare(study, "--dry-run")[0] == 0
    costs = json.loads((tmp_path / "run/mine/costs.json").read_text())
    cache = [int(costs[model]["cache"].replace(",", "")) for model in ("all-vanilla", "all-half")]
    assert cache[0] == 2 * cache[1]


def test_losses_at_equal_time(report):
    """A steep curve, known at few points: e^-step, at a step and a half."""
    curve = [[step, 2.718281828**-step] for step in range(9)]
    runs = [SimpleNamespace(part="p", attention=a, name=a, model=a, seed=1, options={"steps": 8, "total-batch": 1})
            for a in ("fast", "slow")]
    for n, fine in (9, True), (6, False):
        results = {run.name: {"curve": curve[:n]} for run in runs}
        part = report.Part("p", runs, results, {"fast": {"ms": 2}, "slow": {"ms": 4}})
        assert part.has_fine_curves() == fine
        assert part.loss_at(6)("slow", results["slow"]) == pytest.approx(2.718281828**-1.5, rel=0.05)
        assert part.loss_at(6)("fast", results["fast"]) == pytest.approx(2.718281828**-3)


def test_options_in_which_attentions_differ(report):
    base, other = {"attention": "skip", "lr": 1, "heads": 2}, {"heads": 2, "lr": 3}
    assert report.options_changed(other, base) == "attention by default, lr 3"
    assert report.options_changed(base, base) == "the same options"


def test_a_run_gets_the_signal(root, program, text, tmp_path):  # noqa: F811
    """Ctrl-C reaches train_gpt2, here a script that ends only then."""
    waiting = tmp_path / "program"
    waiting.write_text('#!/bin/sh\ncase "$*" in *--seed*) trap "exit 0" INT; touch started; while :; do sleep 0.05; '
                       f'done;; *) exec {program.path} "$@";; esac\n')
    waiting.chmod(0o755)
    (tmp_path / "mine.toml").write_text(SAME_AND_WORSE)
    command = [sys.executable, root / "dev/compare.py", "mine.toml", "--text", text, "--program", waiting]
    with subprocess.Popen(command, cwd=tmp_path, env=program.environment(), stdout=subprocess.DEVNULL,
                          stderr=subprocess.PIPE, text=True, preexec_fn=heed_signals) as process:
        wait_until((tmp_path / "started").exists, process)
        process.send_signal(signal.SIGINT)
        try:
            _, err = process.communicate(timeout=TIMEOUT)
        finally:
            process.kill()
    assert (process.returncode, err) == (1, "stopped; the same command goes on\n")


def test_plot(complete, root, tmp_path):
    study = shutil.copytree(complete, tmp_path / "study")
    runs = [study / "runs/all-vanilla-seed-1", study / "runs/all-depth-seed-1"]
    for words, path in ((runs, study / "runs/plot"), (runs[:1], runs[0] / "plot"),
                        ([*runs, "--out", tmp_path / "mine"], tmp_path / "mine")):
        subprocess.run([sys.executable, root / "dev/plot.py", *words], check=True, stdout=subprocess.DEVNULL)
        assert path.with_suffix(".png").stat().st_size > 10_000
        ElementTree.parse(path.with_suffix(".svg"))
