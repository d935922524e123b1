"""Learning curves: training loss, validation accuracy by task, attention diagnostics, and training warnings."""

import matplotlib.ticker
import numpy as np

from pipeline_steps.common.names import without_math
from pipeline_steps.report.figures import COLOURS, WIDTH

TASK_COLOURS = ["#2f80ed", "#d97706", "#12a594", "#b05cc6", "#e05252", "#8b95a3", "#a18a00", "#8d6e5a"]
TASK_MARKERS = "osD^vXP*"  # tasks differ in marker as well as in colour
TASK_STYLES = ["-", "--", ":"]  # of tasks beyond the colours
ATTENTION = {  # column of the tables -> (label, colour, marker)
    "attention_uniformity": ("attention entropy / maximum", COLOURS["autoregressive"], "o"),
    "token_similarity": ("tokens of different frames, cosine", COLOURS["blind"], "X"),
    "coarse_similarity": ("fine and coarse token, cosine", COLOURS["fine"], "D"),
}


class Timeline:
    """The training samples of all stages on one axis."""

    def __init__(self, tables):
        self.stages, start = {}, 0.0
        for stage, table in tables.items():
            train = table[table["event"] == "train"]
            self.stages[stage] = (start, train["step"].to_numpy(float), train["samples"].to_numpy(float))
            start += float(train["samples"].iloc[-1])

    def position(self, stage, steps):
        """Cumulative training samples at steps of a stage, interpolated between logged steps."""
        start, known, samples = self.stages[stage]
        return start + np.interp(steps, [0, *known], [0, *samples])

    def mark(self, all_axes, ink):
        """Draws a line at the end of every stage and its name above the first axes."""
        top = all_axes[0]
        for stage, (start, _, samples) in self.stages.items():
            for axes in all_axes:
                axes.axvline(start + samples[-1], color=ink, linewidth=0.8, linestyle=":")
            middle = start + samples[-1] / 2
            top.text(middle, 1.02, stage, transform=top.get_xaxis_transform(), ha="center", va="bottom", fontsize=10)


def finish(all_axes):
    """Adds grids, and formats the thousands of the last x axis."""
    with_commas = matplotlib.ticker.FuncFormatter(lambda value, _: f"{value:,.0f}")
    all_axes[-1].xaxis.set_major_locator(matplotlib.ticker.MaxNLocator(5))
    all_axes[-1].xaxis.set_major_formatter(with_commas)
    all_axes[-1].set_xlabel("training samples")
    for axes in all_axes:
        axes.grid(linewidth=0.6)
        axes.set_axisbelow(True)


def learning(tables):
    """(draw, width, height): training loss and validation accuracy over the samples of all stages; None without
    tables."""
    if not tables:
        return None
    lines = task_lines(tables)

    def draw(figure, ink):
        top, bottom = figure.subplots(2, 1, sharex=True, height_ratios=[1, 1.2])
        timeline = Timeline(tables)
        for stage, table in tables.items():
            train = table[table["event"] == "train"]
            x, loss = timeline.position(stage, train["step"]), train["loss"].to_numpy()
            top.plot(x, loss, color=COLOURS["coarse"], alpha=0.5, linewidth=0.8)
            top.plot(x, smooth(loss), color=COLOURS["autoregressive"], linewidth=1.8)
        for number, (name, pieces) in enumerate(lines.items()):
            style = {
                "color": TASK_COLOURS[number % len(TASK_COLOURS)],
                "marker": TASK_MARKERS[number % len(TASK_MARKERS)],
                "linestyle": TASK_STYLES[number // len(TASK_COLOURS) % len(TASK_STYLES)],
                "label": without_math(name),
            }
            for stage, rows in pieces:
                x = timeline.position(stage, rows["step"])
                bottom.plot(x, rows["accuracy"], markersize=4.5, linewidth=1.3, **style)
                style["label"] = None  # one legend entry per task
        timeline.mark((top, bottom), ink)
        top.set_ylabel("training loss (nats)")
        bottom.set_ylabel("validation accuracy (fine)")
        bottom.set_ylim(-0.02, 1.02)
        bottom.yaxis.set_major_formatter(matplotlib.ticker.PercentFormatter(1))
        finish((top, bottom))
        if lines:
            figure.legend(*bottom.get_legend_handles_labels(), loc="outside lower center", ncols=3 if many else 4)

    many = any(len(name) > 12 for name in lines)
    return draw, WIDTH, 6.2 + 0.24 * (len(lines) // (3 if many else 4))


def task_lines(tables):
    """{name: [(stage, rows of the fine validations)]}: one line per task, per source and task where a task
    comes from several sources."""
    checks = {
        stage: table[(table["event"] == "validation") & (table["mode"] == "fine")] for stage, table in tables.items()
    }
    sources = {}
    for rows in checks.values():
        for source, task in zip(rows["source"], rows["task"], strict=True):
            sources.setdefault(task, set()).add(source)
    lines = {}
    for stage, rows in checks.items():
        for (source, task), group in rows.groupby(["source", "task"], sort=True):
            name = task if len(sources[task]) == 1 else f"{source}/{task}"
            lines.setdefault(name, []).append((stage, group))
    return dict(sorted(lines.items()))


def smooth(values, span=9):
    """Running mean over `span` values, or an eighth of all if that is less; fewer at the ends."""
    half = min(span, len(values) // 8) // 2
    return np.array([values[max(0, i - half) : i + half + 1].mean() for i in range(len(values))])


def attention(tables):
    """(draw, width, height): attention entropy and token similarity over training; None without diagnostics rows, as
    for networks without queries."""
    rows = {stage: table[table["event"] == "diagnostics"] for stage, table in tables.items()}
    if not sum(map(len, rows.values())):
        return None

    def draw(figure, ink):
        axes = figure.subplots()
        timeline = Timeline(tables)
        for column, (label, colour, marker) in ATTENTION.items():
            for number, (stage, found) in enumerate(rows.items()):
                axes.plot(
                    timeline.position(stage, found["step"]),
                    found[column],
                    marker=marker,
                    markersize=4,
                    linewidth=1.4,
                    color=colour,
                    label=label if number == 0 else None,
                )
        timeline.mark((axes,), ink)
        axes.set_ylim(min(0, axes.get_ylim()[0]), 1.03)  # a cosine may be negative
        axes.set_ylabel("ratio, or cosine")
        finish((axes,))
        figure.legend(*axes.get_legend_handles_labels(), loc="outside lower center", ncols=1)

    return draw, WIDTH, 4.0


def warnings(tables):
    """One line per warning of the training stages."""
    return [
        f"{stage}, step {int(row.step)}: {row.message}"
        for stage, table in tables.items()
        for row in table[table["event"] == "warning"].itertuples()
    ]
