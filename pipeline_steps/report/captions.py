"""Tables of free-form answers: similarity to the references, style, and overlap of two modes.

The note of an empty table says what was not measured.
"""

from pipeline_steps.report.cells import optional
from pipeline_steps.report.tables import MISSING, MODE_NAMES, MODES, Table, count, number, share


def captions(result):
    """Similarity to the references and named attributes, by task and mode."""
    attributes = list(
        dict.fromkeys(name for group in result.captions.values() for s in group.modes.values() for name in s.missed)
    )
    columns = ["task", "mode", "items", "CIDEr", "BLEU", "METEOR"]
    columns += [f"{name} {what}" for name in attributes for what in ("named", "none named")]
    table = Table("captions", "Free-form answers: similarity to the references", columns, [], strong=[3])
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
        "CIDEr-D from 0 to 10, BLEU-4 and METEOR (exact and stem matches) from 0 to 1. Brackets: 95% bootstrap "
        "intervals over items. Named: share of the clip's known attributes that an answer names. None named: share of "
        "answers that name none of them. Bound: a colour together with its own digit. Compare with blind, which can "
        "only guess: a mode that names no more than blind shows nothing."
        if table.rows
        else "Not measured: no item of this split has a free-form answer."
    )
    return table


def missed_cells(missed):
    if missed is None:
        return [MISSING, MISSING]
    return [share(missed.named), share(missed.complete_miss, missed.interval if missed.num_items > 1 else None)]


def caption_modes(group):
    """Modes of a `Captions`, the inference mode first."""
    return [mode for mode in MODES if mode in group.modes]


def caption_style(result):
    """Style of the answers and of the references."""
    columns = ["task", "answers", "words", "repetition", "distinct 1", "distinct 2", "same opening", "same", "empty"]
    table = Table("caption_style", "Free-form answers: style", columns, [])
    for task, group in result.captions.items():
        styles = {"references": group.reference}
        styles |= {MODE_NAMES[mode]: group.modes[mode].style for mode in caption_modes(group)}
        table.rows += [[task, name, *style_cells(style)] for name, style in styles.items()]
    table.note = (
        "Every mode should be close to the references above it. Repetition: share of four-word phrases that occurred "
        "earlier in the same text. Distinct 1, 2: distinct words and word pairs / all. Same opening, same: share of "
        "texts that begin with the most frequent three words, or equal the most frequent text; near 100% the network "
        "always says the same."
        if table.rows
        else "Not measured: no item of this split has a free-form answer."
    )
    return table


def style_cells(style):
    shares = (style.distinct_1, style.distinct_2, style.same_opening, style.same_text, style.empty)
    return [number(style.num_words, 1), share(style.repetition), *map(share, shares)]


def caption_overlap(result):
    """Overlap of fine and coarse answers."""
    rows = []
    for task, group in result.captions.items():
        interval = group.overlap_interval if group.num_items > 1 else None
        overlap = share(group.overlap_fine_coarse, interval)
        rows.append([task, count(group.num_items), overlap, share(group.same_fine_coarse)])
    note = (
        "Word overlap of an item's fine and coarse answers, and share of items with equal answers. Near 100% the "
        "planned queries change nothing. Brackets: 95% bootstrap intervals over items."
        if rows
        else "Not measured: no item of this split has a free-form answer."
    )
    columns = ["task", "items", "word overlap", "equal answers"]
    return Table("caption_overlap", "Free-form answers: fine and coarse", columns, rows, note)
