"""Tables of free-form answers: similarity to the references, style, and overlap of two modes.

The note of an empty table says what was not measured.
"""

from pipeline_steps.report.cells import optional
from pipeline_steps.report.tables import MISSING, MODE_NAMES, MODES, Table, count, number, share

NO_CAPTIONS = "Not measured: no item of this split has a free-form answer."
PART_NAMES = {
    "frames_4": "4 frames",
    "frames_8": "8 frames",
    "frames_16": "16 frames",
    "first_half": "first half",
    "second_half": "second half",
}


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
        "intervals over clips. Named: share of the clip's known attributes that an answer names. None named: share of "
        "answers that name none of them. Bound: a colour together with its own digit. Compare with blind, which can "
        "only guess: a mode that names no more than blind shows nothing."
        if table.rows
        else NO_CAPTIONS
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
    table.rows = [[task, name, *style_cells(style)] for task, name, style in styles(result)]
    table.note = (
        "Every mode should be close to the references above it. Repetition: share of four-word phrases that occurred "
        "earlier in the same text. Distinct 1, 2: distinct words and word pairs / all. Same opening, same: share of "
        "texts that begin with the most frequent three words, or equal the most frequent text; near 100% the network "
        "always says the same."
        if table.rows
        else NO_CAPTIONS
    )
    return table


def styles(result):
    """(task, whose texts, `CaptionStyle`) of the references and of the answers in every mode."""
    for task, group in result.captions.items():
        yield task, "references", group.reference
        for mode in caption_modes(group):
            yield task, MODE_NAMES[mode], group.modes[mode].style


def caption_form(result):
    """Sentences and technical terms of the answers and of the references."""
    columns = ["task", "answers", "sentences", "proper end", "distinct per text", "repeated pairs"]
    columns += ["with technical terms", "technical words", "terms"]
    table = Table("caption_form", "Free-form answers: sentences and technical terms", columns, [])
    table.rows = [
        [task, name, *form_cells(style)] for task, name, style in styles(result) if style.technical is not None
    ]
    table.note = (
        "Proper end: share of texts that end with a full stop, question or exclamation mark. Distinct per text: "
        "distinct / all words of a text. Repeated pairs: share of word pairs that occurred earlier in the same text. "
        "Technical terms describe the file and not the picture (4k, hd, 1080p, 30 fps); in brackets the number of "
        "texts with the term. The answers should have no more of them than the references."
        if table.rows
        else NO_CAPTIONS
    )
    return table


def form_cells(style):
    terms = sorted(style.technical_terms.items(), key=lambda entry: (-entry[1], entry[0]))
    return [
        number(style.num_sentences, 1),
        *map(share, (style.proper_end, style.type_token_ratio, style.repetition_2)),
        *map(share, (style.technical, style.technical_words)),
        ", ".join(f"{term} ({texts})" for term, texts in terms) or "–",
    ]


def caption_parts(result):
    """Overlap of the answers to parts of the same clips."""
    columns = ["task", "clips", "answers for", "compared with", "word overlap", "equal answers"]
    table = Table("caption_parts", "Free-form answers: parts of a clip", columns, [])
    for task, found in (result.caption_parts or {}).items():
        if found.reason is None:
            table.rows += [[task, count(found.num_items), *cells] for cells in part_rows(found)]
    short = [f"{task}: {found.reason}" for task, found in (result.caption_parts or {}).items() if found.reason]
    missing = f"Not measured for {'; '.join(short)}." if short else "Not measured: no video has a free-form answer."
    table.note = (
        "The same clips of 16 frames or more, with all, 8 or 4 of 16 frames and with the halves of these, in "
        "autoregressive mode. Overlap: words that both answers share; brackets: 95% bootstrap intervals over clips. "
        "Near 100% the answer does not use the frames that differ; read it against the overlap with another clip's "
        f"answer.{' ' + missing if short else ''}"
        if table.rows
        else missing
    )
    return table


def part_rows(found):
    """[answers for, compared with, overlap, equal] of a `CaptionParts`."""
    for name, pair in found.pairs.items():
        one, other = (PART_NAMES[part] for part in name.split(" / "))
        interval = pair.interval if found.num_items > 1 else None
        yield [one, other, share(pair.overlap, interval), share(pair.same)]
    for part, value in found.reference.items():
        yield [PART_NAMES[part], "reference", share(value), MISSING]
    yield [PART_NAMES["frames_16"], "another clip", share(found.other_clip), MISSING]


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
        "planned queries change nothing. Brackets: 95% bootstrap intervals over clips."
        if rows
        else NO_CAPTIONS
    )
    columns = ["task", "items", "word overlap", "equal answers"]
    return Table("caption_overlap", "Free-form answers: fine and coarse", columns, rows, note)
