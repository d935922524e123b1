"""Free answers for parts of the same clips: does the caption change with the number of frames, or with the half?

Every clip of at least NUM_FRAMES frames is reduced to NUM_FRAMES, uniformly spaced. The parts are 4, 8 or all of these,
and their halves, which have as many frames as `frames_8` and differ from it in what they show.
"""

from collections import defaultdict

import numpy as np

from pipeline_steps.common.caption_results import CaptionParts, PartOverlap
from pipeline_steps.evaluation import caption_metrics, captions, statistics, temporal
from pipeline_steps.inference import answers
from pipeline_steps.streaming.index import KINDS
from pipeline_steps.streaming.prefetch import map_ordered
from pipeline_steps.streaming.targets import source_frame

NUM_FRAMES = 16
ALL = f"frames_{NUM_FRAMES}"
PARTS = ("frames_4", "frames_8", "first_half", "second_half", ALL)
PAIRS = (
    ("frames_4", ALL),
    ("frames_8", ALL),
    ("first_half", ALL),
    ("second_half", ALL),
    ("frames_4", "frames_8"),
    ("first_half", "second_half"),
)


def places(part, num_frames):
    """Indices of the frames of a clip with `num_frames` >= NUM_FRAMES that a part shows: int64 array."""
    chosen = np.array([source_frame(i, NUM_FRAMES, num_frames) for i in range(NUM_FRAMES)])
    return chosen if part == ALL else chosen[temporal.places(part, NUM_FRAMES)]


def measure(model, tokenizer, collate, dataset, chosen, settings, prefetch):
    """(rows, lengths) of the videos with a free answer (`captions.choose`) among `chosen`; settings: section
    `evaluation`.

    rows: one dict per clip that is long enough, at most `max_temporal_clips_per_task` per task: key, item, source,
    task, expected, and the greedy answer for each of PARTS. lengths: {task: frames of its longest video}.
    """
    found = captions.choose(dataset, chosen, tokenizer, settings.caption_min_words, settings.max_captions_per_task)
    jobs, lengths, index = [], {}, dataset.index
    for task, numbers in found.items():
        videos = [number for number in numbers if index.kind[number] == KINDS.index("video")]
        if not videos:
            continue
        lengths[task] = int(index.num_frames[videos].max())
        own = [number for number in videos if index.num_frames[number] >= NUM_FRAMES]
        own = own[: settings.max_temporal_clips_per_task]
        jobs += [(task, own[i : i + settings.batch_size]) for i in range(0, len(own), settings.batch_size)]
    rows = []
    for task, items in map_ordered(lambda job: (job[0], [dataset[number] for number in job[1]]), jobs, **prefetch):
        texts = {part: texts_of(model, tokenizer, collate, task, items, part, settings) for part in PARTS}
        for place, item in enumerate(items):
            known = {name: item[name] for name in ("key", "item", "source")} | {"task": task}
            known["expected"] = answers.expected_answer(tokenizer, item)
            rows.append(known | {part: own[place] for part, own in texts.items()})
    return rows, lengths


def texts_of(model, tokenizer, collate, task, items, part, settings):
    """The greedy answer to every item (list of str), shown a part of its frames."""
    shown = [temporal.select(item, places(part, len(item["frames"]))) for item in items]
    batch = answers.prompt_batch(collate, shown).to(model.device)
    options = answers.seeded_options(batch, settings.seed)
    prompts = answers.embedded_prompts(model, batch.inputs(), "autoregressive", options)
    return answers.generate_after(
        model, tokenizer, prompts, batch.attention_mask, max_new_tokens=settings.max_answer_tokens
    )


def summarise(rows, lengths, settings):
    """{task: `CaptionParts`} of the result of `measure`."""
    by_task = defaultdict(list)
    for row in rows:
        by_task[row["task"]].append(row)
    options = {"num_samples": settings.bootstrap_samples, "seed": settings.seed}
    return {task: summary(by_task[task], longest, options) for task, longest in sorted(lengths.items())}


def summary(rows, longest, options):
    """`CaptionParts` of one task; longest: frames of its longest video."""
    if not rows:
        reason = (
            f"the longest clip has {longest} frames, {NUM_FRAMES} are needed"
            if longest < NUM_FRAMES
            else "evaluation.max_temporal_clips_per_task is 0"
        )
        return CaptionParts(num_items=0, longest=longest, reason=reason)
    reference = {part: _overlaps((row[part] for row in rows), (row["expected"] for row in rows)) for part in PARTS}
    others = [(row, other) for row, other in zip(rows, [*rows[1:], rows[0]], strict=True) if row["key"] != other["key"]]
    strangers = [caption_metrics.overlap(row[ALL], other[ALL]) for row, other in others]
    return CaptionParts(
        num_items=len(rows),
        longest=longest,
        reference={part: float(np.mean(values)) for part, values in reference.items()},
        pairs={f"{one} / {other}": pair(rows, one, other, options) for one, other in PAIRS},
        other_clip=float(np.mean(strangers)) if strangers else None,
    )


def pair(rows, one, other, options):
    """`PartOverlap` of the answers to two parts."""
    shared = _overlaps((row[one] for row in rows), (row[other] for row in rows))
    clips = [row["key"] for row in rows]
    return PartOverlap(
        overlap=float(np.mean(shared)),
        interval=statistics.ratio_interval(np.array(shared), np.ones(len(rows)), clips=clips, **options),
        same=sum(row[one] == row[other] for row in rows) / len(rows),
    )


def _overlaps(texts, others):
    return [caption_metrics.overlap(text, other) for text, other in zip(texts, others, strict=True)]
