"""Tables of what an evaluation measures besides tasks and modes: options, written answers, parts of clips, single
frames, diagnostics, gaze against references, sources. A table without rows says in its note what was not measured."""

from statistics import fmean

from pipeline_steps.common.metrics import SCORINGS
from pipeline_steps.common.modes import VIEWS
from pipeline_steps.report.controls import points
from pipeline_steps.report.tables import MISSING, MODE_NAMES, MODES, Table, count, number, of_several, share

ALL = "all"  # the group of `multiple_choice` that sums up the others
VIEW_NAMES = {
    "frames_4": "4 frames of all",
    "frames_8": "8 frames of all",
    "frames_16": "16 frames of all",
    "first_half": "first half",
    "second_half": "second half",
    "first_half_held": "first half, held",
    "second_half_held": "second half, held",
}
VERDICTS = ("suspicious", "ok", "not applicable")  # what needs a look first
FRAME_MODES = ("autoregressive", "coarse", "blind")
REFERENCES = ("chance", "coarse", "oracle")
TEXT = "text"  # mode of the items without frames


def tables(result):
    """All tables of this module, of an `EvaluationResult`."""
    return [
        by_source(result),
        multiple_choice(result),
        captions(result),
        caption_style(result),
        caption_overlap(result),
        temporal(result),
        per_frame(result, "accuracy"),
        per_frame(result, "loss"),
        gaze_difference(result),
        checks(result),
        attention(result),
    ]


def by_source(result):
    """Accuracy of every source and task; no rows where all items are of one source."""
    columns = ["source", "task", "items", *(MODE_NAMES[mode] for mode in MODES), "loss"]
    table = Table("scores_by_source", "Accuracy by source", columns, [])
    if result.sources is None:
        table.note = "Not measured by source."
    elif len(result.sources) < 2:
        table.note = f"All items are of one source: {', '.join(result.sources)}."
    else:
        table.rows = [
            source_row(source, task, scores)
            for source, tasks in result.sources.items()
            for task, scores in tasks.items()
        ]
        table.strong = [columns.index("autoregressive")]
        table.note = (
            "The same scores as above, apart for each source: where a task differs widely between its sources, "
            "the mean over them says little. In brackets 95% bootstrap intervals over items, in per cent. Loss: nats "
            "per scored answer token, autoregressive. Items without frames stand in the autoregressive column."
        )
    return table


def source_row(source, task, scores):
    deployed = scores.get("autoregressive") or scores[TEXT]
    cells = [
        share(score.accuracy, of_several(score, "accuracy")) if score else MISSING
        for score in (deployed, *(scores.get(mode) for mode in MODES[1:]))
    ]
    return [source, task, count(deployed.num_items), *cells, number(deployed.loss, 3, of_several(deployed, "loss"))]


def multiple_choice(result):
    """A row per group and scoring, the group of all items last."""
    columns = ["group", "scoring", "items", "accuracy", "chance", "blind", "gain over blind", "no option", "bias"]
    table = Table("multiple_choice", "Multiple choice", columns, [], strong=[3])
    for name in sorted(result.multiple_choice, key=lambda name: name == ALL):
        group = result.multiple_choice[name]
        for scoring in SCORINGS:
            if scoring in group.scorings:
                if name == ALL:
                    table.summary.append(len(table.rows))
                table.rows.append([name, scoring, *choice_cells(group, scoring)])
    table.note = (
        "Share of items whose right option is chosen; in brackets 95% bootstrap intervals over items. Look at the "
        "gain first: points of accuracy above the same network with grey frames; an interval that holds 0 means that "
        "the options, not the frames, may give the answer. Letter: the likeliest letter; likelihood: the option with "
        "the lowest loss per token; generation: the option that the written answer names, and the share of written "
        "answers that name none (they count as wrong). Bias: distance of the letters chosen from those that are "
        "right, 0 = none."
        if table.rows
        else "Not measured: no item of this split has options."
    )
    return table


def choice_cells(group, scoring):
    score, several = group.scorings[scoring], group.num_items > 1
    return [
        count(group.num_items),
        share(score.accuracy, score.interval if several else None),
        share(group.chance),
        share(score.blind, score.blind_interval if several else None),
        difference(score.gain, score.gain_interval if several else None),
        share(group.no_option if scoring == "generation" else None),
        optional(group.position_bias.get(scoring), 2),
    ]


def captions(result):
    """Likeness to the true answers and what is left out of them, per task and mode."""
    attributes = list(
        dict.fromkeys(name for group in result.captions.values() for s in group.modes.values() for name in s.missed)
    )
    columns = ["task", "mode", "items", "CIDEr", "BLEU", "METEOR"]
    columns += [f"{name} {what}" for name in attributes for what in ("named", "all missed")]
    table = Table("captions", "Free answers against the true ones", columns, [], strong=[3])
    for task, group in result.captions.items():
        for mode in caption_modes(group):
            score = group.modes[mode]
            several = group.num_items > 1
            row = [task, MODE_NAMES[mode], count(group.num_items)]
            row += [
                optional(score.cider, 2, score.cider_interval if several else None),
                number(score.bleu, 3),
                number(score.meteor, 3, score.meteor_interval if several else None),
            ]
            for name in attributes:
                row += missed_cells(score.missed.get(name))
            table.rows.append(row)
    table.note = (
        "CIDEr-D from 0 to 10, BLEU-4 and METEOR (equal words and stems) from 0 to 1; in brackets 95% bootstrap "
        "intervals over items. Named: the share of what the clip is known to show that an answer names; all missed: "
        "answers that name none of it; bound: a colour with its own digit. Compare with blind: what it names is "
        "guessed, so a miss rate as low as blind's shows nothing."
        if table.rows
        else "Not measured: no item of this split has a free answer."
    )
    return table


def missed_cells(missed):
    if missed is None:
        return [MISSING, MISSING]
    return [share(missed.named), share(missed.complete_miss, missed.interval if missed.num_items > 1 else None)]


def caption_modes(group):
    """Modes of a `Captions`, what is deployed first."""
    return [mode for mode in MODES if mode in group.modes]


def caption_style(result):
    """How answers are written, beside the true ones."""
    columns = ["task", "answers", "words", "repetition", "distinct 1", "distinct 2", "same opening", "same", "empty"]
    table = Table("caption_style", "How free answers are written", columns, [])
    for task, group in result.captions.items():
        styles = {"true answers": group.reference}
        styles |= {MODE_NAMES[mode]: group.modes[mode].style for mode in caption_modes(group)}
        table.rows += [[task, name, *style_cells(style)] for name, style in styles.items()]
    table.note = (
        "Every mode should look like the true answers above it. Repetition: phrases of four words that their own "
        "text has said before. Distinct 1, 2: different words, and pairs of words, among all. Same opening, same: "
        "texts that begin with the most frequent three words, or are the most frequent text: near 100% the network "
        "recites."
        if table.rows
        else "Not measured: no item of this split has a free answer."
    )
    return table


def style_cells(style):
    shares = (style.distinct_1, style.distinct_2, style.same_opening, style.same_text, style.empty)
    return [number(style.num_words, 1), share(style.repetition), *map(share, shares)]


def caption_overlap(result):
    """What fine and coarse answers have in common."""
    rows = []
    for task, group in result.captions.items():
        interval = group.overlap_interval if group.num_items > 1 else None
        overlap = share(group.overlap_fine_coarse, interval)
        rows.append([task, count(group.num_items), overlap, share(group.same_fine_coarse)])
    note = (
        "Words that an item's fine and coarse answers share, and items whose answers are equal: near 100% the second "
        "look changes nothing. In brackets 95% bootstrap intervals over items."
        if rows
        else "Not measured: no item of this split has a free answer."
    )
    columns = ["task", "items", "words shared", "equal answers"]
    return Table("caption_overlap", "Free answers: fine against coarse", columns, rows, note)


def temporal(result):
    """A row per task and part of the clip: scores of the part and of all frames of the same clips."""
    columns = ["task", "shown", "items", "accuracy of part", "accuracy of all", "loss of part", "loss of all"]
    columns += ["loss lost", "answers changed", "tokens changed"]
    rows = []
    for task, views in (result.temporal or {}).items():
        for name in VIEWS:
            if name in views:
                rows.append([task, VIEW_NAMES[name], *view_cells(views[name])])
    note = (
        "Autoregressive, the same clips in part and whole. Loss lost: nats per token by which the part is worse, in "
        "brackets 95% paired bootstrap intervals over items; around 0 the rest of the clip is not used. A half tells "
        "too few frames and missing content together; held, each of its frames shown again up to the whole number, "
        "loses only what the other half shows: where the half fails and the held half does not, the network is bound "
        "to the number of frames. Answers changed: items with another most likely token anywhere."
        if rows
        else "Not measured: no clips were shown in part."
    )
    return Table("temporal", "Clips shown in part", columns, rows, note, strong=[3])


def view_cells(view):
    several = view.num_items > 1
    return [
        count(view.num_items),
        share(view.accuracy),
        share(view.all_frames_accuracy),
        number(view.loss),
        number(view.all_frames_loss),
        signed(view.loss_difference, 3, view.loss_interval if several else None),
        share(view.answers_changed, view.answers_changed_interval if several else None),
        share(view.tokens_changed),
    ]


def per_frame(result, quantity):
    """`quantity` ("accuracy" or "loss") of the tokens about each frame; frames that nothing is asked of are left
    out."""
    found = [
        (task, mode, getattr(modes[mode], quantity))
        for task, modes in (result.per_frame or {}).items()
        for mode in FRAME_MODES
        if mode in modes
    ]
    asked = sorted({t for _, _, values in found for t, value in enumerate(values) if value is not None})
    cell = share if quantity == "accuracy" else optional
    rows = [
        [task, MODE_NAMES[mode], *(cell(values[t] if t < len(values) else None) for t in asked)]
        for task, mode, values in found
    ]
    worse = "falls" if quantity == "accuracy" else "rises"
    meaning = "Share of scored answer tokens that are right" if quantity == "accuracy" else "Nats per scored token"
    note = (
        f"{meaning}, by the frame that the token is about. A row that {worse} to the right drifts over time; "
        "coarse: what the same weights get of a frame by a look without a plan."
        if rows
        else "Not measured: no task has an answer per frame."
    )
    columns = ["task", "mode", *(f"frame {t}" for t in asked)]
    return Table(f"per_frame_{quantity}", f"{quantity.capitalize()} by frame", columns, rows, note)


def gaze_difference(result):
    """A row per task: the peak's share on the target above each reference, in points."""
    tasks = result.gaze_difference or {}
    names = [name for name in REFERENCES if any(name in entries for entries in tasks.values())]
    rows = []
    for task, entries in tasks.items():
        # The oracle is looked at on fewer items: the frames of both are told apart
        row = [task]
        for name in names:
            entry = entries.get(name)
            row += (
                [difference(entry.peak_on_target, entry.interval), count(entry.num_frames)] if entry else [MISSING] * 2
            )
        rows.append(row)
    note = (
        "Points of frames whose most attended patch is the target's, autoregressive minus each reference over the "
        "same frames; in brackets 95% paired bootstrap intervals over items. Above chance and coarse is what choosing "
        "where to look gains; the oracle is told where the target is: where that "
        "interval holds 0, a better choice would show no gain on these frames."
        if rows
        else "Not measured: no item of this split names a target whose place is known, or the network has no queries."
    )
    columns = ["task", *(text for name in names for text in (f"against {name}", "frames"))]
    return Table("gaze_difference", "Gaze against its references", columns, rows, note)


def checks(result):
    """The automated diagnostics, suspicious ones first."""
    columns = ["check", "verdict", "value", "expected", "what the value is", "out of bounds, or not applicable"]
    table = Table("checks", "Automated checks", columns, [])
    if result.diagnostics is None:
        table.note = "Not measured: the evaluation ran without diagnostic clips."
        return table
    found = sorted(result.diagnostics.checks.items(), key=lambda entry: VERDICTS.index(entry[1].verdict))
    table.rows = [
        [name.replace("_", " "), check.verdict, signed_value(check.value), bounds(check), check.meaning, check.reason]
        for name, check in found
    ]
    counts = [sum(check.verdict == verdict for _, check in found) for verdict in VERDICTS]
    table.note = (
        f"{counts[0]} suspicious, {counts[1]} ok, {counts[2]} not applicable; suspicious ones stand first. Measured on "
        f"{result.diagnostics.num_items} items with {result.diagnostics.num_frames} frames. A suspicious value is a "
        "reason to look, not a proof; the last column says what it points to."
    )
    return table


def attention(result):
    """A row per mode and vision layer: how sharp its heads look."""
    columns = ["mode", "layer", "entropy, mean", "lowest head", "highest head", "largest weight, mean", "sharpest head"]
    entropy = result.diagnostics.entropy if result.diagnostics else {}
    rows = []
    for mode in (mode for mode in MODES if mode in entropy):
        for layer, (heads, peaks) in enumerate(zip(entropy[mode], result.diagnostics.peak[mode], strict=True)):
            cells = map(share, (fmean(heads), min(heads), max(heads), fmean(peaks), max(peaks)))
            rows.append([MODE_NAMES[mode], count(layer), *cells])
    note = (
        "Attention of the queries to the patches. Entropy: as a share of an even spread's; 100% means that a head "
        "chooses nothing. Largest weight: of one patch, mean over frames. Look at the last layer, which the gaze "
        "tables are about: sharp heads choose, and heads that differ widely share the work."
        if rows
        else "Not measured: the evaluation ran without diagnostic clips, or the network has no queries."
    )
    return Table("attention_layers", "Attention by layer", columns, rows, note)


def bounds(check):
    """The allowed values of a `Check` as text."""
    if check.low is not None and check.high is not None:
        return f"{check.low:g} to {check.high:g}"
    if check.low is not None:
        return f"≥ {check.low:g}"
    return "–" if check.high is None else f"≤ {check.high:g}"


def optional(value, digits=3, interval=None):
    """A number or None as a cell."""
    return MISSING if value is None else number(value, digits, interval)


def signed_value(value):
    """A value of any size as a cell, with three significant digits."""
    return MISSING if value is None else (f"{value:.3g}".replace("-", "−"), value)


def signed(value, digits, interval=None):
    """A difference as a cell."""

    def written(number):
        text = f"{number:+.{digits}f}"
        return text.replace("-", "−") if float(text) else text[1:]  # zero has no sign

    text = written(value)
    return (f"{text} [{written(interval[0])} to {written(interval[1])}]" if interval else text, value)


def difference(value, interval=None):
    """A difference of shares as a cell, in points."""
    text, number_of_points = points(value)
    if interval is None:
        return (text, number_of_points)
    return (f"{text} [{points(interval[0])[0]} to {points(interval[1])[0]}]", number_of_points)
