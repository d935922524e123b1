"""Tables of free answers: likeness to the true answers, style, and what two modes have in common.

A table without rows says in its note what was not measured.
"""

from pipeline_steps.report.cells import optional
from pipeline_steps.report.tables import MISSING, MODE_NAMES, MODES, Table, count, number, share


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
