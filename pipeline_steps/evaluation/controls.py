"""Scores the controls: autoregressive mode with one change each, on a subset of the items that all modes score.

The controls are the entries of `pipeline_steps.common.modes` with `subset`; a new control needs no change here. `blind`
and `random_query` are scored on all items, together with the modes. Shapes: F frames of a batch, N patches.
"""

import hashlib
from dataclasses import replace

import numpy as np
import pandas as pd
import torch

from pipeline_steps.common import modes
from pipeline_steps.common.metrics import Control
from pipeline_steps.evaluation import scoring

SUMS = ("loss_sum", "num_correct", "num_tokens")


def applicable(config):
    """Names of the controls that apply to a network. Query controls do not apply to `multi_token` networks."""
    return [
        name
        for name in modes.subset_controls()
        if config.architecture == "foveated" or modes.REGISTRY[name].query_source is None
    ]


def score_controls(model, loaded, seed, progress):
    """DataFrame like `scoring.score_items`, one row per item and control. loaded: `scoring.batches`."""
    rows = []
    generator = None
    for task, items, batch, truths in loaded:
        generator = generator or torch.Generator(batch.pixel_values.device).manual_seed(seed)
        for name in applicable(model.config):
            control = modes.REGISTRY[name]
            if control.needs_target and all(truth is None for truth in truths):
                continue
            shown = controlled(name, items, batch, truths, seed)
            own_frames = control.query_source is not None and control.frame_order is None
            known = truths if own_frames else [None] * len(items)  # boxes match the frames only in the original order
            measured = any(truth is not None for truth in known)
            output = scoring.forward(model, shown, control.forward_mode, control.query_source, generator, measured)
            made = scoring.table_rows(task, items, known, shown, name, output)
            rows += [
                row for row, truth in zip(made, truths, strict=True) if not control.needs_target or truth is not None
            ]
        progress.update(len(items))
    return pd.DataFrame(rows)


def controlled(name, items, batch, truths, seed):
    """The batch with the control's change applied."""
    control = modes.REGISTRY[name]
    if control.needs_target:
        batch = replace(batch, target_patches=target_patches(batch, truths))
    if control.pixels is not None:
        batch = replace(batch, pixel_values=control.pixels(batch.pixel_values))
    if control.frame_order is None:
        return batch
    counts = batch.num_frames.tolist()
    starts = np.cumsum([0, *counts[:-1]])
    orders = [
        control.frame_order(count, item_rng(seed, item["key"], item["item"]))
        for item, count in zip(items, counts, strict=True)
    ]
    index = np.concatenate([start + order for start, order in zip(starts, orders, strict=True)])
    return batch.reorder_frames(torch.from_numpy(index).to(batch.pixel_values.device))


def item_rng(seed, key, item):
    """A numpy Generator seeded by (seed, key, item), independent of batching."""
    digest = hashlib.sha256(f"{seed} {key} {item}".encode()).digest()
    return np.random.default_rng(int.from_bytes(digest[:8], "big"))


def target_patches(batch, truths):
    """bool [F, N], all False for frames whose target is unknown or not visible: attention is not limited there."""
    known = next(truth for truth in truths if truth is not None)
    nothing = np.zeros((1, known.target.shape[1]), bool)
    pairs = zip(truths, batch.num_frames.tolist(), strict=True)
    rows = [nothing.repeat(count, 0) if truth is None else truth.target for truth, count in pairs]
    return torch.from_numpy(np.concatenate(rows)).to(batch.pixel_values.device)


def effects(table, interval):
    """{task: {control: `Control`}}; interval: function of (numerators, denominators, clips) per item."""
    indexed = table.set_index(["task", "mode", "key", "item"]).sort_index()[list(SUMS)]
    found, compared = {}, modes.all_controls()
    for task, mode in table[["task", "mode"]].drop_duplicates().sort_values(["task", "mode"]).itertuples(False):
        if mode not in compared:
            continue
        control = indexed.loc[task, mode]
        found.setdefault(task, {})[mode] = effect(control, indexed.loc[task, "autoregressive"], interval)
    return found


def effect(control, base, interval):
    """`Control` of the items of `control`; both are indexed by (key, item)."""
    base = base.loc[control.index]
    loss, correct, tokens = ((control[name] - base[name]).to_numpy() for name in SUMS)
    if tokens.any():
        raise ValueError(
            f"{int((tokens != 0).sum())} of {len(tokens)} items have a different number of scored tokens in the control"
        )
    tokens = base["num_tokens"].to_numpy()
    return Control(
        loss_difference=float(loss.sum() / tokens.sum()),
        loss_interval=interval(loss, tokens, clips=base.index.get_level_values("key")),
        accuracy_difference=float(correct.sum() / tokens.sum()),
        accuracy_interval=interval(correct, tokens, clips=base.index.get_level_values("key")),
        num_items=len(base),
    )
