"""Teacher-forced scores of every item in every mode: one table row per item and mode.

Shapes: B batch, S sequence, F frames of the batch, T frames of an item, L layers, H heads, K queries per frame, N
patches.
"""

from dataclasses import replace
from itertools import pairwise

import numpy as np
import pandas as pd
import torch

from model import FoveationOptions
from model.constants import IGNORE_INDEX
from pipeline_steps.common import modes
from pipeline_steps.common.errors import UserError
from pipeline_steps.common.modes import GAZE_MODES, SCORED_MODES
from pipeline_steps.evaluation import per_frame
from pipeline_steps.inference import gaze
from pipeline_steps.streaming import targets
from pipeline_steps.streaming.prefetch import map_ordered

TEXT = "text"  # task and mode of text-only samples, for which all modes are equal


def groups_by_task(dataset):
    """{task: item numbers} of the items with frames; all text-only items under TEXT."""
    text = dataset.index.is_text
    groups = {name: numbers[~text[numbers]] for name, numbers in dataset.tasks().items()}
    return {**groups, TEXT: np.flatnonzero(text)}


def choose_items(dataset, max_items, seed):
    """{task: row numbers} of the items with a scored token, text-only ones under TEXT; at most `max_items` per task,
    sampled with `seed`.

    Raises UserError if no item with frames has a scored token.
    """
    usable = {name: numbers[dataset.scored[numbers]] for name, numbers in groups_by_task(dataset).items()}
    tasks = {name: numbers for name, numbers in usable.items() if len(numbers)}
    if not set(tasks) - {TEXT}:
        raise UserError(
            f"{dataset.tokens_dir}: no item of split '{dataset.split}' has frames and an answer with a letter or "
            "digit: 0 items to score, expected at least 1. Add such samples to the split (sections sources and shards) "
            "or change evaluation.split."
        )
    chosen = {}
    for task in sorted(tasks):
        chosen[task] = drawn(tasks[task], max_items, seed)
    return chosen


def score_items(model, collate, dataset, chosen, *, batch_size, seed, prefetch, progress):
    """Runs all modes over the chosen rows ({task: row numbers}): DataFrame with one row per item and mode.

    Columns: key, item, source, task, mode, num_frames, num_tokens (scored), loss_sum (nats), num_correct; and,
    if the item has a target with known boxes, those of `gaze.summary` and `gaze.head_summary`; if it has one answer
    token per frame, those of `per_frame.token_columns`.
    """
    generator = torch.Generator(next(model.parameters()).device).manual_seed(seed)
    rows = []
    for task, items, batch, truths in batches(model, collate, dataset, chosen, batch_size, prefetch):
        for mode in (TEXT,) if task == TEXT else SCORED_MODES:
            attentions = mode in GAZE_MODES and any(truth is not None for truth in truths)
            output = run_mode(model, batch, mode, generator, attentions)
            rows += table_rows(task, items, truths, batch, mode, output)
        progress.update(len(items))
    return pd.DataFrame(rows).sort_values(["task", "mode", "key", "item"], ignore_index=True)


def prefetch(runtime, dataset, collate):
    """Arguments of `streaming.prefetch.map_ordered` for jobs (task, item numbers)."""
    return {
        "num_workers": runtime.num_workers,
        "limit": runtime.prefetch_megabytes * 2**20,
        "size_of": lambda job: dataset.batch_bytes(
            np.array(job[1]), collate.image_replication, collate.tokens_per_frame
        ),
    }


def batches(model, collate, dataset, chosen, batch_size, prefetch):
    """(task, items, batch on the model's device, ground truth of each item or None) of all chosen rows, task by
    task. Adds a bool `per_frame` to each item: it has one answer token per frame."""
    device = next(model.parameters()).device
    jobs = [
        (task, numbers[start : start + batch_size])
        for task, numbers in chosen.items()
        for start in range(0, len(numbers), batch_size)
    ]
    for task, items, batch, truths in map_ordered(
        lambda job: load(dataset, collate, model.config.vision_config.patch_size, *job), jobs, **prefetch
    ):
        yield task, items, batch.to(device), truths


def subset(chosen, max_items, seed):
    """At most `max_items` rows per task of {task: row numbers}, without TEXT, sampled with `seed`. Deterministic:
    callers with equal arguments get the same items."""
    return {task: drawn(numbers, max_items, seed) for task, numbers in chosen.items() if task != TEXT}


def drawn(numbers, max_items, seed):
    """At most `max_items` of an ascending array of row numbers, sampled with `seed`: ascending list."""
    if len(numbers) > max_items:
        numbers = np.sort(np.random.default_rng(seed).choice(numbers, max_items, replace=False))
    return np.asarray(numbers).tolist()


def load(dataset, collate, patch_size, task, numbers):
    """(task, items, batch on the CPU, ground truth of each item or None)."""
    items = [dataset[number] for number in numbers]
    batch = collate(items)
    samples = [dataset.sample(number) for number in numbers]
    grid = batch.pixel_values.shape[-1] // patch_size
    counts = batch.num_frames.tolist()
    truths = [
        targets.ground_truth(sample, item["item"], num_frames, grid, dataset.resize_mode)
        for sample, item, num_frames in zip(samples, items, counts, strict=True)
    ]
    for item, sample, num_frames in zip(items, samples, counts, strict=True):
        item["per_frame"] = per_frame.is_per_frame(sample, item, num_frames)
    return task, items, batch, truths


def run_mode(model, batch, mode, generator, output_attentions):
    """The model's output in one of SCORED_MODES (or TEXT: autoregressive). generator: for random queries."""
    entry = modes.REGISTRY["autoregressive" if mode == TEXT else mode]
    if entry.pixels is not None:
        batch = replace(batch, pixel_values=entry.pixels(batch.pixel_values))
    return forward(model, batch, entry.forward_mode, entry.query_source, generator, output_attentions)


@torch.inference_mode()
def forward(model, batch, mode, query_source=None, generator=None, output_attentions=False):
    """The model's output with the loss of the scored tokens. mode: a `mode` of the network's forward pass."""
    options = FoveationOptions(
        query_source=query_source,
        generator=generator,
        target_patches=batch.target_patches,
        output_attentions=output_attentions,
        return_logits=False,
    )
    labels = batch.labels.masked_fill(~batch.score_mask, IGNORE_INDEX)
    return model(**batch.inputs(), labels=labels, mode=mode, options=options)


def table_rows(task, items, truths, batch, mode, output):
    """One dict per item: sums over its scored tokens, and its gaze columns."""
    scored = batch.score_mask
    sums = {
        "num_tokens": scored.sum(1),
        "loss_sum": (output.token_loss.double() * scored).sum(1),
        "num_correct": (output.correct & scored).sum(1),
        "num_frames": batch.num_frames,
    }
    sums = {name: values.tolist() for name, values in sums.items()}
    weights = output.attention_weights
    weights = None if weights is None else weights.float().cpu().numpy()
    bounds = pairwise([0, *np.cumsum(sums["num_frames"])])
    rows = []
    for index, (item, truth, (start, stop)) in enumerate(zip(items, truths, bounds, strict=True)):
        row = {name: item[name] for name in ("key", "item", "source")} | {"task": task, "mode": mode}
        row |= {name: values[index] for name, values in sums.items()}
        if item["per_frame"]:
            row |= per_frame.token_columns(
                *(values[index][scored[index]] for values in (output.token_loss, output.correct))
            )
        if truth is not None and weights is not None:
            own = weights[:, start:stop]
            row |= gaze.summary(gaze.attention_maps(own), truth)
            row |= gaze.head_summary(gaze.head_maps(own), truth)
        rows.append(row)
    return rows


def for_file(table):
    """The item table rounded to 6 decimals, its lists of losses and attention to 3 to limit the file size."""
    lists = [name for name in ("token_losses", "mass_per_head") if name in table]
    short = {name: [rounded(values) for values in table[name]] for name in lists}
    return table.round(6).assign(**short)


def rounded(values):
    return [round(value, 3) for value in values] if isinstance(values, list) else None
