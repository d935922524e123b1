"""Free-form answers (captions) in several modes: quality, diversity, and whether they name the visible attributes."""

from dataclasses import replace
from importlib.util import find_spec

import numpy as np

from pipeline_steps.common import modes
from pipeline_steps.common.caption_results import Captions, CaptionScore, Missed
from pipeline_steps.common.errors import UserError
from pipeline_steps.common.modes import CAPTION_MODES
from pipeline_steps.evaluation import caption_metrics, statistics
from pipeline_steps.inference import answers
from pipeline_steps.monitoring.progress import progress_bar
from pipeline_steps.streaming.prefetch import map_ordered

CAPTION = "caption"  # task whose answers are captions, however short


def choose(dataset, chosen, tokenizer, min_words, max_items):
    """{task: item numbers} of the items in `chosen` with frames and a free-form answer: items of the task `caption`,
    and items whose answer has at least `min_words` words. At most the first `max_items` per task; tasks without such
    items are omitted."""
    found = {}
    for task, numbers in chosen.items():
        own = [number for number in numbers if _is_free(dataset.rows[number], tokenizer, min_words)]
        if own:
            found[task] = own[:max_items]
    return found


def _is_free(row, tokenizer, min_words):
    if row["num_frames"] == 0:
        return False
    return row["task"] == CAPTION or len(caption_metrics.words(answers.expected_answer(tokenizer, row))) >= min_words


def check_packages(dataset, chosen, tokenizer, settings):
    """UserError, before anything is generated, if there are answers to score and a package for that is missing;
    settings: section `evaluation`."""
    missing = " ".join(name for name in caption_metrics.PACKAGES if find_spec(name) is None)
    options = (settings.caption_min_words, settings.max_captions_per_task)
    if missing and any(choose(dataset, chosen, tokenizer, *options).values()):
        raise UserError(
            f"evaluation.max_captions_per_task is {settings.max_captions_per_task}, and free answers cannot be scored "
            f"without {missing.replace(' ', ' and ')}. Run `python -m pip install {missing}`, or set it to 0."
        )


def measure(model, tokenizer, collate, dataset, chosen, settings, prefetch):
    """(answers, objects) of the items that `choose` selects from `chosen`; settings: section `evaluation`. Both are
    empty if it selects none.

    answers: one dict per item: key, item, source, task, expected, and the greedy answer in each of CAPTION_MODES.
    objects: the ground-truth objects of the same items, or None where unknown.
    """
    found = choose(dataset, chosen, tokenizer, settings.caption_min_words, settings.max_captions_per_task)
    numbers = [number for own in found.values() for number in own]
    jobs = [
        (task, own[start : start + settings.batch_size])
        for task, own in found.items()
        for start in range(0, len(own), settings.batch_size)
    ]

    def load(job):
        items = [dataset[number] for number in job[1]]
        return items, answers.prompt_batch(collate, items)

    rows = []
    with progress_bar("captions", total=len(numbers), unit="item") as progress:
        for items, batch in map_ordered(load, jobs, **prefetch):
            texts_by_mode = generate(
                model, tokenizer, batch.to(model.device), settings.max_answer_tokens, settings.seed
            )
            for place, item in enumerate(items):
                known = {name: item[name] for name in ("key", "item", "source", "task")}
                known["expected"] = answers.expected_answer(tokenizer, item)
                rows.append(known | {mode: texts[place] for mode, texts in texts_by_mode.items()})
            progress.update(len(items))
    return rows, [dataset.sample(number).objects for number in numbers]


def generate(model, tokenizer, batch, max_tokens, seed):
    """{mode: greedy answers} of a `prompt_batch` with frames, in each of CAPTION_MODES."""
    texts = {}
    for mode in CAPTION_MODES:
        entry = modes.REGISTRY[mode]
        shown = batch if entry.pixels is None else replace(batch, pixel_values=entry.pixels(batch.pixel_values))
        options = answers.seeded_options(batch, seed)
        prompts = answers.embedded_prompts(model, shown.inputs(), entry.forward_mode, options)
        texts[mode] = answers.generate_after(model, tokenizer, prompts, batch.attention_mask, max_new_tokens=max_tokens)
    return texts


def summarise(rows, objects, num_samples, seed):
    """{task: Captions} of the result of `measure`."""
    tasks = {}
    for row, visible in zip(rows, objects, strict=True):
        tasks.setdefault(row["task"], []).append((row, visible))
    options = {"num_samples": num_samples, "seed": seed}
    return {
        task: _summary([row for row, _ in pairs], [visible for _, visible in pairs], options)
        for task, pairs in sorted(tasks.items())
    }


def _summary(rows, objects, options):
    expected, clips = [row["expected"] for row in rows], [row["key"] for row in rows]
    modes_of = {mode: [row[mode] for row in rows] for mode in CAPTION_MODES}
    shared = [caption_metrics.overlap(row["fine"], row["coarse"]) for row in rows]
    return Captions(
        num_items=len(rows),
        modes={mode: _score(texts, expected, objects, clips, options) for mode, texts in modes_of.items()},
        reference=caption_metrics.style(expected),
        overlap_fine_coarse=float(np.mean(shared)),
        overlap_interval=_interval(shared, clips, options),
        same_fine_coarse=sum(row["fine"] == row["coarse"] for row in rows) / len(rows),
    )


def _score(texts, expected, objects, clips, options):
    cider = caption_metrics.cider(texts, expected) if len(texts) > 1 else None
    meteor = caption_metrics.meteor(texts, expected)
    return CaptionScore(
        cider=None if cider is None else float(np.mean(cider)),
        cider_interval=None if cider is None else _interval(cider, clips, options),
        bleu=caption_metrics.bleu(texts, expected),
        meteor=float(np.mean(meteor)),
        meteor_interval=_interval(meteor, clips, options),
        missed=missed(texts, objects, clips, options),
        style=caption_metrics.style(texts),
    )


def missed(texts, objects, clips, options):
    """{kind of attribute: Missed} over the texts whose objects are known; empty if no objects are known. clips: clip of
    every text."""
    found = {}
    for text, visible, clip in zip(texts, objects, clips, strict=True):
        for kind, truths in caption_metrics.attributes(visible or ()).items():
            found.setdefault(kind, []).append((caption_metrics.named(text, truths), len(truths), clip))
    result = {}
    for kind, counts in found.items():
        named, known, own = zip(*counts, strict=True)
        named, known = np.array(named), np.array(known)
        result[kind] = Missed(
            complete_miss=float((named == 0).mean()),
            interval=_interval(named == 0, own, options),
            named=float((named / known).mean()),
            num_items=len(counts),
        )
    return result


def _interval(values, clips, options):
    values = np.asarray(values, dtype=float)
    return statistics.ratio_interval(values, np.ones(len(values)), clips=clips, **options)
