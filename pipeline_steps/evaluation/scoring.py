"""Teacher-forced scores of every item in every mode: one table row per item and mode.

Shapes: B batch, S sequence, F frames of the batch, T frames of an item, L layers, H heads, K queries per frame, N
patches.
"""

from itertools import pairwise

import numpy as np
import pandas as pd
import torch

from pipeline_steps import gaze
from pipeline_steps.metrics import GAZE_MODES, MODES
from pipeline_steps.params import UserError
from pipeline_steps.streaming import targets
from pipeline_steps.streaming.workers import ordered

TEXT = "text"  # family and mode of text-only samples: without frames all modes are the same


def groups_by_family(dataset):
    """{family: item numbers} of the items with frames, all text-only ones under TEXT."""
    text = dataset.index.is_text
    groups = {name: numbers[~text[numbers]] for name, numbers in dataset.families().items()}
    return {**groups, TEXT: np.flatnonzero(text)}


def choose_items(dataset, max_items, seed):
    """Row numbers per family, text-only samples under TEXT: those with a scored token, at most `max_items` each,
    drawn with `seed`.

    Raises UserError when no item with frames has a scored token.
    """
    usable = {name: numbers[dataset.scored[numbers]] for name, numbers in groups_by_family(dataset).items()}
    families = {name: numbers for name, numbers in usable.items() if len(numbers)}
    if not set(families) - {TEXT}:
        raise UserError(
            f"{dataset.tokens_dir}: no item of split '{dataset.split}' has frames and an answer with a letter or "
            "digit, so there is nothing to score. Give the split such samples (sections sources and shards) or change "
            "evaluation.split."
        )
    chosen = {}
    for family in sorted(families):
        numbers = families[family]
        if len(numbers) > max_items:
            numbers = np.sort(np.random.default_rng(seed).choice(numbers, max_items, replace=False))
        chosen[family] = numbers.tolist()
    return chosen


def score_items(model, collate, dataset, chosen, *, batch_size, seed, prefetch, progress):
    """Runs all modes over the chosen rows ({family: row numbers}): DataFrame with one row per item and mode.

    Columns: key, item, source, family, mode, num_frames, num_tokens (scored), loss_sum (nats), num_correct; and,
    where the item names a target whose boxes are known, those of `gaze.summary`.
    """
    device = next(model.parameters()).device
    generator = torch.Generator(device).manual_seed(seed)
    jobs = [
        (family, numbers[start : start + batch_size])
        for family, numbers in chosen.items()
        for start in range(0, len(numbers), batch_size)
    ]
    rows = []
    for family, items, batch, truths in ordered(
        lambda job: load(dataset, collate, model.config.vision_config.patch_size, *job), jobs, **prefetch
    ):
        batch = {name: value.to(device) for name, value in batch.items() if name != "keys"}
        for mode in (TEXT,) if family == TEXT else MODES:
            attentions = mode in GAZE_MODES and any(truth is not None for truth in truths)
            output = run_mode(model, batch, mode, generator, attentions)
            rows += table_rows(family, items, truths, batch, mode, output)
        progress.update(len(items))
    return pd.DataFrame(rows).sort_values(["family", "mode", "key", "item"], ignore_index=True)


def load(dataset, collate, patch_size, family, numbers):
    """(family, items, batch on the CPU, ground truth of each item or None)."""
    items = [dataset[number] for number in numbers]
    batch = collate(items)
    samples = [dataset.sample(number) for number in numbers]
    grid = batch["pixel_values"].shape[-1] // patch_size
    truths = [
        targets.truth(sample, item["item"], num_frames, grid, dataset.fit)
        for sample, item, num_frames in zip(samples, items, batch["num_frames"].tolist(), strict=True)
    ]
    return family, items, batch, truths


@torch.inference_mode()
def run_mode(model, batch, mode, generator, output_attentions):
    """The model's output for one of MODES (or TEXT). Blind: the frames are grey. Random query: drawn from
    `generator`, planned norm."""
    control = mode not in GAZE_MODES
    pixels = torch.zeros_like(batch["pixel_values"]) if mode == "blind" else batch["pixel_values"]
    return model(
        input_ids=batch["input_ids"],
        attention_mask=batch["attention_mask"],
        pixel_values=pixels,
        num_frames=batch["num_frames"],
        labels=batch["labels"].masked_fill(~batch["score_mask"], -100),
        mode="autoregressive" if control else mode,
        query_source="random" if mode == "random_query" else None,
        generator=generator,
        target_patches=batch.get("target_patches"),
        output_attentions=output_attentions,
    )


def table_rows(family, items, truths, batch, mode, output):
    """One dict per item: sums over its scored tokens, and its gaze."""
    scored = batch["score_mask"]
    sums = {
        "num_tokens": scored.sum(1),
        "loss_sum": (output.token_loss.double() * scored).sum(1),
        "num_correct": (output.correct & scored).sum(1),
        "num_frames": batch["num_frames"],
    }
    sums = {name: values.tolist() for name, values in sums.items()}
    weights = output.attention_weights
    maps = None if weights is None else gaze.attention_maps(weights.float().cpu().numpy())
    bounds = pairwise([0, *np.cumsum(sums["num_frames"])])
    rows = []
    for index, (item, truth, (start, stop)) in enumerate(zip(items, truths, bounds, strict=True)):
        row = {name: item[name] for name in ("key", "item", "source")} | {"family": family, "mode": mode}
        row |= {name: values[index] for name, values in sums.items()}
        if truth is not None and maps is not None:
            row |= gaze.summary(maps[:, start:stop], truth)
        rows.append(row)
    return rows
