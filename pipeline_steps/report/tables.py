"""Tables of the report. Each is built once and rendered as HTML and as Markdown."""

import re
from dataclasses import dataclass, field

from pipeline_steps.common.modes import GAZE_MODES, LABELS

MODES = ("autoregressive", "fine", "coarse", "blind", "random_query")  # the inference mode first
MISSING = ("–", None)  # sorts last in both directions

MODE_NAMES = LABELS
COMPONENT_NAMES = {
    "vision_encoder": "vision encoder",
    "query_passes": "query passes",
    "connector": "connector",
    "planner": "planner",
    "language_model": "language model",
    "vocabulary_projection": "vocabulary",
}


@dataclass
class Table:
    """A table. A cell is text, or (text, value to sort by)."""

    name: str
    title: str
    columns: list[str]
    rows: list[list]
    note: str = ""
    strong: list[int] = field(default_factory=list)  # columns in bold
    summary: list[int] = field(default_factory=list)  # summary rows; sorting keeps them at the bottom

    def markdown(self, level=1):
        """Title as a heading (level 0: none), table and note. Without rows: title and note."""
        lines = [f"{'#' * level} {self.title}", ""] if level else []
        if not self.rows:
            return "\n".join([*lines, self.note, ""])
        lines += ["| " + " | ".join(self.columns) + " |", "|" + "|".join(" --- " for _ in self.columns) + "|"]
        lines += ["| " + " | ".join(markdown_cell(text_of(cell)) for cell in row) + " |" for row in self.rows]
        return "\n".join([*lines, "", self.note, ""] if self.note else [*lines, ""])


def markdown_cell(text):
    """Text as a cell of a Markdown table, on one line, in which links, HTML, formulas and formats are inert."""
    return re.sub(r"[\\`|$*]|<(?=[A-Za-z/!?])|(?<=\])[(\[:]|~(?=~)", r"\\\g<0>", " ".join(text.split()))


def is_number(cell):
    return isinstance(cell, tuple)


def text_of(cell):
    return cell[0] if isinstance(cell, tuple) else str(cell)


def share(value, interval=None):
    """A share in per cent as a cell, with its interval in brackets."""
    if value is None:
        return MISSING
    text = f"{value:.1%}"
    return (f"{text} [{interval[0] * 100:.0f}–{interval[1] * 100:.0f}]" if interval else text, value)


def of_several(score, quantity):
    """The interval of a Score's `quantity`, or None for a single item, which has no bootstrap interval."""
    return getattr(score, f"{quantity}_interval") if score.num_items > 1 else None


def number(value, digits=3, interval=None):
    text = f"{value:.{digits}f}"
    return (f"{text} [{interval[0]:.{digits}f}–{interval[1]:.{digits}f}]" if interval else text, value)


def count(value):
    return (f"{value:,}", value)


def targets(result, settings):
    """Required and reached values of the targets. No rows for data other than the embedded world."""
    absent = [task for task in settings.tasks if task not in result.tasks]
    note = "Held-out items, autoregressive mode. The targets apply to the embedded world only."
    if absent:
        return Table(
            "targets",
            "Targets",
            ["target", "result", "required", "reached"],
            [],
            f"Not judged: the targets apply to the embedded world, and this split has no task {', '.join(absent)}.",
        )
    chosen = {task: result.tasks[task] for task in settings.tasks}
    scores = {task: modes["autoregressive"] for task, modes in chosen.items()}
    worst = min(scores, key=lambda task: scores[task].accuracy)
    accuracy = sum(score.accuracy for score in scores.values()) / len(scores)
    losses = {mode: sum(modes[mode].loss for modes in chosen.values()) for mode in ("fine", "autoregressive")}
    gap = losses["autoregressive"] / losses["fine"] - 1
    excess = {task: modes["blind"].accuracy - (result.chance[task] or 0) for task, modes in chosen.items()}
    blind = max(excess, key=excess.get)
    rows = [
        ("mean accuracy", f"≥ {settings.mean_accuracy:.0%}", f"{accuracy:.1%}", accuracy >= settings.mean_accuracy),
        (
            "accuracy of every task",
            f"≥ {settings.task_accuracy:.0%}",
            f"{scores[worst].accuracy:.1%} ({worst}, the lowest)",
            scores[worst].accuracy >= settings.task_accuracy,
        ),
        (
            "loss of card",
            f"< {settings.card_loss}",
            f"{scores['card'].loss:.3f}",
            scores["card"].loss < settings.card_loss,
        )
        if "card" in scores
        else ("loss of card", f"< {settings.card_loss}", "no such task", False),
        (
            "autoregressive loss above fine",
            f"≤ {settings.gap:.0%}",
            f"{gap:+.1%}",
            gap <= settings.gap,
        ),
        (
            "blind accuracy above chance, every task",
            f"≤ {100 * settings.blind_excess:g} points",
            f"{100 * excess[blind]:+.1f} points ({blind}, the highest)",
            excess[blind] <= settings.blind_excess,
        ),
        (
            "loss of text-only samples is reported",
            "yes",
            "no text-only samples"
            if result.text is None
            else f"{result.text.loss:.3f} nats ({result.text.accuracy:.1%})",
            result.text is not None,
        ),
    ]
    cells = [[name, "met" if met else "missed", required, reached] for name, required, reached, met in rows]
    return Table("targets", "Targets", ["target", "result", "required", "reached"], cells, note)


def accuracies(result):
    """Token accuracy of every task and mode, with chance level and exact-match accuracy."""
    rows = []
    for task, modes in result.tasks.items():
        row = [task, count(modes["autoregressive"].num_items)]
        row += [share(modes[mode].accuracy, of_several(modes[mode], "accuracy")) for mode in MODES]
        row += [share(result.chance.get(task))]
        generated = result.generation.get(task)
        rows.append([*row, share(generated.exact_match) if generated else share(None)])
    mean = [share(result.mean[mode].accuracy) for mode in MODES]
    first_summary = len(rows)
    rows.append(
        [
            "mean of tasks",
            count(sum(m["autoregressive"].num_items for m in result.tasks.values())),
            *mean,
            share(None),
            share(None),
        ]
    )
    if result.text:
        text = share(result.text.accuracy, of_several(result.text, "accuracy"))
        generated = result.generation.get("text")
        cells = [text if mode == "autoregressive" else share(None) for mode in MODES]
        exact = share(generated.exact_match) if generated else share(None)
        rows.append(
            [
                "text only (no frames)",
                count(result.text.num_items),
                *cells,
                share(result.chance.get("text")),
                exact,
            ]
        )
    return Table(
        "accuracy",
        "Accuracy by task and mode",
        ["task", "items", *(MODE_NAMES[mode] for mode in MODES), "chance", "exact match"],
        rows,
        "Teacher-forced token accuracy: share of scored answer tokens that are the most likely token. Autoregressive: "
        "frame by frame, as at inference, with queries planned from the frames before. Fine: all frames in parallel, "
        "as in training, with queries planned from the coarse tokens of the frames before. Coarse: the static query on "
        "every frame. Blind: frames of the mean colour. Random query: random ones, as large as the planned. Brackets: "
        "95% bootstrap intervals over clips, in per cent. Chance: accuracy of the training split's most frequent token "
        "at each answer position. Exact match: share of greedily generated answers equal to the expected one, on fewer "
        "items.",
        strong=[MODES.index("autoregressive") + 2],
        summary=list(range(first_summary, len(rows))),
    )


def losses(result):
    """Loss of every task and mode, and the ratio of autoregressive to fine loss."""
    rows = []
    for task, modes in result.tasks.items():
        row = [
            task,
            *(
                number(modes[mode].loss, 3, of_several(modes[mode], "loss") if mode == "autoregressive" else None)
                for mode in MODES
            ),
        ]
        interval = result.gap[task].interval if modes["autoregressive"].num_items > 1 else None
        rows.append([*row, number(result.gap[task].loss_ratio, 2, interval)])
    mean, first_summary = result.mean, len(rows)
    ratio = number(mean["autoregressive"].loss / mean["fine"].loss, 2)
    rows.append(["mean of tasks", *(number(mean[mode].loss) for mode in MODES), ratio])
    if result.text:
        text = number(result.text.loss, 3, of_several(result.text, "loss"))
        cells = [text if mode == "autoregressive" else MISSING for mode in MODES]
        rows.append(["text only (no frames)", *cells, MISSING])
    return Table(
        "loss",
        "Loss by task and mode",
        ["task", *(MODE_NAMES[mode] for mode in MODES), "autoregressive / fine"],
        rows,
        "Nats per scored answer token. Last column: autoregressive loss / fine loss; 1 means that parallel training "
        "transfers to frame-by-frame inference. Brackets: 95% bootstrap intervals over clips, paired in the last "
        "column.",
        strong=[MODES.index("autoregressive") + 1],
        summary=list(range(first_summary, len(rows))),
    )


def gaze(result):
    """Share of attention peaks on the target, and chance levels."""
    rows = []
    for task, modes in result.gaze.items():
        shown = modes.get("autoregressive") or next(iter(modes.values()))
        row = [task, count(shown.num_frames)]
        for mode in reversed(GAZE_MODES):
            row.append(
                share(modes[mode].peak_on_target, modes[mode].peak_on_target_interval) if mode in modes else share(None)
            )
        rows.append(
            [
                *row,
                share(shown.chance),
                share(shown.chance_among_objects),
                share(shown.peak_on_any_object),
                share(shown.mass_on_target),
            ]
        )
    return Table(
        "gaze",
        "Gaze: does the attention peak hit the target?",
        [
            "task",
            "frames",
            *reversed(GAZE_MODES),
            "any patch",
            "any object",
            "peak on an object",
            "attention on target",
        ],
        rows,
        "Share of frames whose most attended patch (last vision layer, mean over heads) shows the target. Frame 0 is "
        "excluded because it has no planned query. Any patch, any object: chance level of a peak on a random patch, "
        "or on a random object. The last two columns are for the autoregressive mode."
        if rows
        else "Not measured: no item of this split has a target with known boxes, or the network has no queries.",
        strong=[2],
    )


def ordered_arms(result):
    """Names of the arms of a `FlopsResult`, the foveated one first."""
    return sorted(result.arms, key=lambda name: (name != "foveated", name))


def flops(result):
    """FLOPs of every mode and arm by component."""
    rows = []
    for kind, entries, names in (
        ("this network", result.modes, GAZE_MODES),
        ("arm", result.arms, ordered_arms(result)),
    ):
        for name in names:
            entry = entries[name]
            parts = [number(getattr(entry.components, component) / 1e6, 2) for component in COMPONENT_NAMES]
            training = number(result.training[name] / 1e6, 1) if kind == "arm" else MISSING
            rows.append([f"{kind}: {name.replace('_', ' ')}", *parts, number(entry.total / 1e6, 2), training])
    facts = result.assumptions
    return Table(
        "flops",
        "Compute per sample",
        ["mode or arm", *COMPONENT_NAMES.values(), "total", "training"],
        rows,
        f"MFLOP, 2 FLOPs per multiply-accumulate. Means over the {facts['num_samples']} samples with frames of the "
        f"{facts['split']} split ({facts['mean_num_frames']:.1f} frames, {facts['mean_num_text_tokens']:.1f} text "
        f"tokens, {facts['mean_num_labels']:.1f} of them with a loss). Training: forward and backward of one sample, "
        f"all weights trained. Not counted: {facts['not_counted']}.",
    )


def data(shards, tokens):
    """Samples, shards and items of every split."""
    rows = []
    for split, entry in shards.splits.items():
        items = tokens.splits.get(split)
        cells = [*map(count, (len(entry.shards), entry.num_samples, entry.num_frames))]
        cells += [number(entry.seconds / 60, 1), number(entry.bytes / 1e6, 1)]
        cells += [*map(count, (items.num_items, items.num_tokens) if items else (0, 0))]
        rows.append([split, *cells])
    quarantined = "; ".join(f"{entry.key} ({entry.reason})" for entry in shards.quarantined[:5])
    more = f" and {len(shards.quarantined) - 5} more" if len(shards.quarantined) > 5 else ""
    return Table(
        "data",
        "Data",
        ["split", "shards", "samples", "frames", "minutes of video", "MB", "items", "text tokens"],
        rows,
        f"Samples: {shards.seen} read = {shards.packed} packed + {len(shards.quarantined)} quarantined"
        + (f": {quarantined}{more}" if quarantined else "")
        + f". Items: {tokens.seen} read = {tokens.kept} kept + {len(tokens.dropped)} dropped.",
    )


def mixture(stages):
    """Training samples of every stage by mixture entry, from the stages' own records."""
    tasks = sorted({name for values in stages.values() for name in values.get("mixture", {})})
    rows = []
    for task in tasks:
        row = [task]
        for values in stages.values():
            entry = values.get("mixture", {}).get(task)
            row += [count(entry["num_samples"]), share(entry["share"])] if entry else [count(0), share(None)]
        rows.append(row)
    columns = ["task", *(f"{stage} {what}" for stage in stages for what in ("samples", "share"))]
    return Table(
        "mixture",
        "Training mixture",
        columns,
        rows,
        "Samples that each stage trained on. `text`: samples without frames.",
    )
