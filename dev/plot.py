#!/usr/bin/env python3
"""Plots loss, learning rate, gradient norm and speed of runs, from their metrics.csv. Needs matplotlib.

    make plot RUN=run/mine                               # writes run/mine/plot.png and plot.svg
    make plot RUN="run/mine run/other"                   # writes run/plot.png and plot.svg
    dev/plot.py run/mine run/other --out comparison      # writes comparison.png and comparison.svg
"""

import argparse
import csv
import importlib
import os
import sys
from pathlib import Path

# Distinct in black and white, too: by dashes, markers and brightness.
STYLES = [{"color": color, "linestyle": dashes, "marker": marker, "markersize": 4, "linewidth": 1.4}
          for color, dashes, marker in (("#000000", "-", "o"), ("#0072b2", "--", "s"), ("#d55e00", "-.", "^"),
                                        ("#009e73", ":", "D"), ("#cc79a7", (0, (6, 1, 1, 1, 1, 1)), "v"),
                                        ("#7f7f7f", (0, (3, 3)), "x"),
                                        ("#b8860b", (0, (8, 2, 1, 2)), "*"))]
COLUMNS = ["step", "train_loss", "val_loss", "lr", "grad_norm", "ms", "tokens_per_s"]


def fail(message):
    sys.exit(f"error: {message}")


def package(name):
    try:
        return importlib.import_module(name)
    except ImportError:
        fail(f"this needs {name.split('.')[0]}: {sys.executable} -m pip install {name.split('.')[0]}")


def pyplot():
    package("matplotlib").use("Agg")
    plt = package("matplotlib.pyplot")
    plt.rcdefaults()
    plt.rcParams.update({"text.parse_math": False,  # a name may have a $
                         "font.size": 9, "axes.grid": True, "grid.color": "0.9", "axes.axisbelow": True,
                         "axes.spines.top": False, "axes.spines.right": False, "legend.frameon": False,
                         "svg.hashsalt": "gpt2x3"})  # so that equal plots are equal files
    return plt


def style(i):
    return STYLES[i % len(STYLES)]


def save(figure, path):
    """Writes path.png and path.svg."""
    path.parent.mkdir(parents=True, exist_ok=True)
    for kind, more in ("png", {"dpi": 150}), ("svg", {"metadata": {"Date": None}}):
        figure.savefig(f"{path}.{kind}.tmp", format=kind, **more)  # so that a full disk leaves the former one
        os.replace(f"{path}.{kind}.tmp", f"{path}.{kind}")
    pyplot().close(figure)


def read_metrics(folder):
    """A row for each step: values by name, None where there is none."""
    path = Path(folder) / "metrics.csv"
    try:
        with open(path, encoding="utf-8") as f:
            rows = [row for row in csv.DictReader(f) if None not in row.values()]  # the last one may be incomplete
        rows = [{name: float(row[name]) if row[name] else None for name in COLUMNS} for row in rows]
    except OSError as e:
        fail(f"{path}: {e.strerror}; name the folder of a run")
    except (ValueError, KeyError):
        fail(f"{path}: is not of train_gpt2")
    return rows or fail(f"{path}: has no rows yet")


def column(rows, name):
    """The steps that have a value, and these values."""
    rows = [row for row in rows if row[name] is not None]
    return [row["step"] for row in rows], [row[name] for row in rows]


def smoothed(values, n):
    """The mean of the n values that end at each place; of fewer at the beginning."""
    sums = [0.0]
    for value in values:
        sums.append(sums[-1] + value)
    return [(sums[i] - sums[max(0, i - n)]) / min(i, n) for i in range(1, len(sums))]


def plot_runs(folders, path):
    runs = [read_metrics(folder) for folder in folders]
    figure, axes = pyplot().subplots(2, 2, figsize=(10, 7), layout="constrained")
    (loss, rate), (norm, speed) = axes
    for i, (folder, rows) in enumerate(zip(folders, runs)):
        look = style(i)
        line = look | {"marker": ""}
        for ax, name in (loss, "train_loss"), (rate, "lr"), (norm, "grad_norm"), (speed, "tokens_per_s"):
            steps, values = column(rows, name)
            n = 1 if name == "lr" else max(1, len(steps) // 50)
            ax.plot(steps, smoothed(values, n), **line, alpha=0.5 if ax is loss else 1,
                    label=f"{folder}, training" + (f", mean of {n} steps" if n > 1 else "") if ax is loss else None)
        steps, values = column(rows, "val_loss")
        if steps:
            loss.plot(steps, values, **look, label=f"{folder}, validation")
    for ax, label in (loss, "loss (nats per token)"), (rate, "learning rate"), (norm, "norm of the gradient"), \
            (speed, "speed (tokens per second)"):
        ax.set(xlabel="step", ylabel=label, ylim=(None if ax is loss else 0, None))
    figure.legend(loc="outside lower center", ncols=2, fontsize=8)
    save(figure, path)


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.error = fail
    p.add_argument("runs", metavar="DIR", nargs="+", help="folder of a run")
    p.add_argument("--out", metavar="PATH", type=Path,
                   help="the plot, without .png or .svg [DIR/plot; of several runs, in the folder that they share]")
    o = p.parse_args()
    runs = [Path(folder).absolute() for folder in o.runs]
    out = o.out or Path(os.path.commonpath(runs if len(runs) == 1 else [run.parent for run in runs])) / "plot"
    plot_runs(o.runs, out)
    print(f"{out}.png and {out}.svg are written")


if __name__ == "__main__":
    try:
        main()
    except OSError as e:
        fail(f"{e.filename}: {e.strerror}" if e.filename else str(e))
