"""The report of dev/compare.py: statistics, figures, and the page as Markdown and HTML."""

import base64
import html
import math
import os
import re
import statistics

from plot import package, pyplot, save, style

MOST_SEEDS = 10_000
METHOD = (
    "For a seed, all attentions begin with the same weights and see the same batches, so differences are taken seed "
    "by seed, over the seeds that both have. Brackets hold the 95 % interval of the mean difference, by Student's t, "
    "from three seeds on; one that contains 0 leaves open which is better. Intervals are not corrected for the "
    "number of comparisons. \"Seeds needed\" is how many a paired t-test at the 5 % level needs to find a mean "
    "difference of this size, at this spread, in four of five studies: a rough guess where seeds are few. The time "
    "of a step is the least median of short runs of all models in turns; the times of training are steps times this. "
    "Losses at equal time are interpolated between validations, if three or more lie in the second half of training; "
    "the learning rates of the slower ones still fall then. Memory, FLOPs and cache are what train_gpt2 describe "
    "prints; decoding is one sequence, token by token.")
PAGE_STYLE = """
  body { font: 16px/1.5 sans-serif; max-width: 66em; margin: 2em auto; padding: 0 1em; color: #1f2328 }
  table { border-collapse: collapse; font-size: 14px }
  td, th { border-bottom: 1px solid #d0d7de; padding: 4px 10px; text-align: right; vertical-align: bottom }
  td:first-child, th:first-child { text-align: left }
  figure { margin: 1.5em 0 }
  img { max-width: 100% }
  figcaption { font-size: 14px; color: #59636e }
"""


def slug(text):
    return re.sub(r"[^a-z0-9.]+", "-", text.lower()).strip("-")


def duration(seconds):
    minutes = round(seconds / 60)
    return f"{seconds:.0f} s" if seconds < 100 else f"{minutes} min" if minutes < 100 else \
        f"{minutes // 60} h {minutes % 60:02d} min"


def write_file(path, text):
    """Under another name first: readers see the old file or the new one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".tmp")
    with open(temporary, "w", encoding="utf-8") as f:
        f.write(text)
        f.flush()
        os.fsync(f.fileno())
    temporary.replace(path)


# ----------------------------------------------------------------------------------------------------------------------
# Statistics


def half_interval(values):
    """Half the 95 % interval of the mean, by Student's t; None below three values."""
    if len(values) < 3:
        return None
    return float(package("scipy.stats").t.ppf(0.975, len(values) - 1)) * statistics.stdev(values) / len(values)**0.5


def seeds_needed(differences):
    """How many seeds a paired t-test at the 5 % level takes to find this mean, given this spread, in four of five
    studies; None if they are more than MOST_SEEDS."""
    stats, numpy = package("scipy.stats"), package("numpy")
    mean, deviation = statistics.mean(differences), statistics.stdev(differences)
    if deviation <= 1e-9 * abs(mean):
        return 2 if mean else None
    n = numpy.arange(2, MOST_SEEDS + 1)
    critical, shift = stats.t.ppf(0.975, n - 1), numpy.sqrt(n) * abs(mean) / deviation
    with numpy.errstate(all="ignore"):  # scipy's tail on the other side is NaN where it is 0
        power = stats.nct.sf(critical, n - 1, shift) + numpy.nan_to_num(stats.nct.cdf(-critical, n - 1, shift))
    return int(n[power >= 0.8][0]) if (power >= 0.8).any() else None


class Part:
    """The complete runs of a part: results[attention][seed]. The other attentions are compared with the first one."""

    def __init__(self, name, runs, results, costs):
        self.name, self.runs = name, [run for run in runs if run.part == name]
        attentions = list(dict.fromkeys(run.attention for run in self.runs))
        self.base, self.results = attentions[0], {}
        for run in sorted(self.runs, key=lambda run: attentions.index(run.attention)):
            if run.name in results:
                self.results.setdefault(run.attention, {})[run.seed] = results[run.name]
        self.costs = {run.attention: costs[run.model] for run in self.runs if run.attention in self.results}
        self.steps, self.batch_tokens = (self.runs[0].options[name] for name in ("steps", "total-batch"))

    def differences(self, attention, value):
        """value(attention, result) less that of the first attention, for each seed that both have."""
        base, other = self.results.get(self.base, {}), self.results[attention]
        return [value(attention, other[seed]) - value(self.base, base[seed])
                for seed in other if seed in base and attention != self.base]

    def compared(self, attention, value):
        """The mean of these differences with its interval, and the seeds needed, as cells of a table."""
        differences = self.differences(attention, value)
        if not differences:
            return ["", ""]
        mean, half = statistics.mean(differences), half_interval(differences)
        if half is None:
            return [f"{mean:+.4f}", ""]
        return [f"{mean:+.4f} [{mean - half:+.4f}, {mean + half:+.4f}]",
                seeds_needed(differences) or f"over {MOST_SEEDS:,}"]

    def loss_at(self, ms):
        """A value for these: the loss after this time of training, between validations, on a smooth monotone curve."""
        curve = package("scipy.interpolate").PchipInterpolator
        return lambda attention, result: float(curve(*zip(*result["curve"]))(ms / self.costs[attention]["ms"]))

    def has_fine_curves(self):
        """Enough validations for loss_at."""
        return all(sum(step >= self.steps / 2 for step, _ in result["curve"]) >= 3
                   for results in self.results.values() for result in results.values())


# ----------------------------------------------------------------------------------------------------------------------
# Figures


def draw_differences(ax, i, x, less, label):
    """The mean of rows of differences, a row a seed; from three seeds on, with its interval."""
    mean = less.mean(0)
    ax.plot(x, mean, **style(i), markevery=max(1, len(x) // 10), label=label)
    if len(less) >= 3:
        half = package("numpy").array([half_interval(values.tolist()) for values in less.T])
        ax.fill_between(x, mean - half, mean + half, color=style(i)["color"], alpha=0.15, linewidth=0)


def plot_curves(part):
    numpy, plt = package("numpy"), pyplot()
    figure, axes = plt.subplots(1, 3, figsize=(12, 4), layout="constrained")
    longest = part.steps * max(cost["ms"] for cost in part.costs.values())
    unit, unit_ms = ("minutes", 60_000) if longest > 100_000 else ("seconds", 1000)
    for i, (attention, results) in enumerate(part.results.items()):
        steps = numpy.array([step for step, _ in next(iter(results.values()))["curve"]])
        late = steps >= part.steps / 10
        tokens, time = steps * part.batch_tokens / 1e6, steps * part.costs[attention]["ms"] / unit_ms
        curves = numpy.array([[loss for _, loss in result["curve"]] for result in results.values()])[:, late]
        for ax, x in (axes[0], tokens[late]), (axes[1], time[late]):
            ax.plot(x, curves.mean(0), **style(i), markevery=max(1, len(x) // 10), label=attention)
            ax.fill_between(x, curves.min(0), curves.max(0), color=style(i)["color"], alpha=0.15, linewidth=0)
        less = part.differences(attention, lambda _, result: numpy.array([loss for _, loss in result["curve"]])[late])
        if less:
            draw_differences(axes[2], i, tokens[late], numpy.array(less), attention)
    axes[0].set(xlabel="training tokens (millions)", ylabel="validation loss (nats per token)")
    axes[1].set(xlabel=f"time ({unit})", ylabel="validation loss (nats per token)")
    axes[2].set(xlabel="training tokens (millions)", ylabel=f"difference from {part.base} (nats per token)")
    axes[2].axhline(0, **(style(0) | {"marker": ""}))
    axes[0].legend()
    return figure


def plot_positions(part):
    numpy, plt = package("numpy"), pyplot()
    figure, ax = plt.subplots(figsize=(7, 4), layout="constrained")
    for i, attention in enumerate(part.results):
        less = numpy.array(part.differences(attention, lambda _, result: numpy.array(result["by position"])))
        if len(less):
            edges = numpy.unique(numpy.round(numpy.geomspace(1, less.shape[1] + 1, 20)).astype(int))
            groups = numpy.array([less[:, a - 1:b - 1].mean(1) for a, b in zip(edges, edges[1:])]).T  # (seeds, groups)
            draw_differences(ax, i, numpy.sqrt(edges[:-1] * (edges[1:] - 1)), groups, attention)
    ax.axhline(0, **(style(0) | {"marker": ""}), label=part.base)
    ax.set_xscale("log", base=2)
    ax.xaxis.set_major_formatter("{x:.0f}")
    ax.set(xlabel="tokens that the prediction is made from", ylabel=f"difference from {part.base} (nats per token)")
    ax.legend()
    return figure


def plot_depth(results):
    """A panel for each head: layers upwards, their sources to the right."""
    numpy, plt = package("numpy"), pyplot()
    rows = numpy.mean([result["depth weights"] for result in results], 0)  # of layer, head, source, weight
    layers, heads = int(rows[:, 0].max()) + 1, int(rows[:, 1].max()) + 1
    weights = numpy.full((heads, layers, layers), numpy.nan)
    for layer, head, source, weight in rows:
        weights[int(head), int(layer), int(source)] = weight
    down = math.ceil(heads / 4)
    across = math.ceil(heads / down)
    figure, axes = plt.subplots(down, across, squeeze=False, sharey=True, figsize=(1 + 2.6 * across, 0.6 + 2.5 * down),
                                layout="constrained")
    for head, ax in enumerate(axes.flat):
        if head >= heads:
            ax.remove()
            continue
        ax.patch.set(hatch="////", edgecolor="0.85", facecolor="white")
        image = ax.imshow(weights[head, 1:], cmap="Greys", vmin=0, vmax=1, origin="lower",
                          extent=(-0.5, layers - 0.5, 0.5, layers - 0.5))
        ax.grid(False)
        ax.set(title=f"head {head}", xlabel="source layer", ylabel="layer" if head % across == 0 else "",
               xticks=range(0, layers, 1 + layers // 8), yticks=range(1, layers, 1 + layers // 8))
    figure.colorbar(image, ax=figure.axes, label="mean weight", fraction=0.03)
    return figure


# ----------------------------------------------------------------------------------------------------------------------
# The page


class Page:
    def __init__(self, folder, title):
        self.folder, self.title, self.markdown, self.html = folder, title, [], []
        self.heading(1, title)

    def heading(self, level, text):
        self.markdown.append(f"{'#' * level} {text}")
        self.html.append(f"<h{level}>{html.escape(text)}</h{level}>")

    def text(self, text):
        self.markdown.append(text)
        self.html.append(f"<p>{html.escape(text)}</p>")

    def table(self, head, rows):
        lines = ["| " + " | ".join(str(cell).replace("|", "\\|") for cell in row) + " |"
                 for row in (head, ["---"] * len(head), *rows)]
        self.markdown.append("\n".join(lines))
        lines = ["".join(f"<{tag}>{html.escape(str(cell))}</{tag}>" for cell in row)
                 for tag, row in (("th", head), *(("td", row) for row in rows))]
        self.html.append("<table>\n" + "".join(f"<tr>{line}</tr>\n" for line in lines) + "</table>")

    def figure(self, figure, name, caption):
        path = self.folder / "figures" / name
        save(figure, path)
        self.markdown.append(f"![{caption}](figures/{name}.svg)\n\n{caption}")
        image = base64.b64encode(path.with_name(name + ".svg").read_bytes()).decode()
        self.html.append(f'<figure><img alt="" src="data:image/svg+xml;base64,{image}">\n<figcaption>'
                         f"{html.escape(caption)}</figcaption></figure>")

    def write(self):
        write_file(self.folder / "report.md", "\n\n".join(self.markdown) + "\n")
        write_file(self.folder / "report.html",
                   f'<!DOCTYPE html>\n<html lang="en"><meta charset="utf-8"><title>{html.escape(self.title)}</title>\n'
                   f"<style>{PAGE_STYLE}</style>\n" + "\n".join(self.html) + "\n</html>\n")


def write_report(folder, title, runs, results, costs):
    """results: by the names of runs, of those that are complete; costs: by the names of models."""
    page = Page(folder, title)
    hours = sum(result["hours"] for result in results.values())
    page.text(f"{len(results)} of {len(runs)} runs are complete; their steps took {duration(3600 * hours)}. {METHOD}")
    for name in dict.fromkeys(run.part for run in runs):
        part = Part(name, runs, results, costs)
        page.heading(2, part.name)
        missing = [f"{run.attention}, seed {run.seed}" for run in part.runs if run.name not in results]
        if missing:
            page.text(f"Without these runs, which are not complete or not timed: {'; '.join(missing)}.")
        if part.base in part.results:
            report_part(page, part)
        else:
            page.text(f"No comparison yet: {part.base} has no complete run.")
    page.write()
    print(f"{folder}/report.html and report.md are written")


def options_text(options):
    return ", ".join(f"{name} {value}" for name, value in sorted(options.items()))


def options_changed(options, base):
    """What one attention has in place of the base's options."""
    changed = {name: options.get(name, "by default") for name in options | base if options.get(name) != base.get(name)}
    return options_text(changed) or "the same options"


def report_part(page, part):
    costs, base = part.costs, part.costs[part.base]
    some = next(result for results in part.results.values() for result in results.values())
    options = {run.attention: run.options for run in part.runs}
    own = [f"{a}: {options_changed(options[a], options[part.base])}." for a in costs if a != part.base]
    page.text(f"{base['parameters']} parameters, {some['tokens']:,} tokens a run, on {base['machine']}; validation on "
              f"{some['validation']}. Options: {options_text(options[part.base])}. {' '.join(own)}")

    def mean(attention, key):
        return f"{statistics.mean(result[key] for result in part.results[attention].values()):.4f}"

    page.table(["attention", "seeds", "validation loss (nats per token)", "bits per byte",
                f"difference from {part.base} [95 %] (nats per token)", "seeds needed"],
               [[a, len(results), mean(a, "loss"), mean(a, "bits per byte"),
                 *part.compared(a, lambda _, result: result["loss"])] for a, results in part.results.items()])
    page.figure(plot_curves(part), slug(part.name) + "-curves",
                f"Validation loss after the first tenth of training: by tokens, by time, and its difference from "
                f"{part.base}. Lines are means over the seeds. Bands: losses from the lowest seed to the highest; 95 % "
                "intervals of the differences, from three seeds on.")
    if any(part.differences(a, lambda *_: 0) for a in part.results):
        page.figure(plot_positions(part), slug(part.name) + "-positions",
                    f"Validation loss by how many tokens the prediction is made from: difference from {part.base}. "
                    "Lines are means over the seeds; bands are 95 % intervals, from three seeds on.")
    for a, results in part.results.items():
        if any(result["depth weights"] for result in results.values()):
            page.figure(plot_depth(results.values()), slug(f"{part.name} {a}") + "-weights",
                        f"Mean weights of {a} over the validation tokens and the seeds: how much of each source's "
                        "values a layer mixes in. A layer's last source is itself; hatched: no source.")
    end = min(cost["ms"] for cost in costs.values()) * part.steps
    page.text(f"Costs, and losses at equal time: after {duration(end / 1000)}, when the fastest has finished training:")
    page.table(["attention", "ms a step", f"times {part.base}'s", "memory in training", "MFLOP a token",
                "KV cache (bytes a token)", "decoding (tokens/s)", f"difference from {part.base} at equal time [95 %]"],
               [[a, f"{c['ms']:.2f}", f"{c['ms'] / base['ms']:.3f}", c["memory"], c["mflop"], c["cache"],
                 f"{c['decoding']:,.0f}", part.compared(a, part.loss_at(end))[0] if part.has_fine_curves() else ""]
                for a, c in costs.items()])
    seeds = sorted({seed for results in part.results.values() for seed in results})
    page.text("Loss by seed:")
    page.table(["seed", *part.results], [[seed, *(f"{results[seed]['loss']:.4f}" if seed in results else ""
                                                  for results in part.results.values())] for seed in seeds])
