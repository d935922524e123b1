"""Controls: autoregressive mode with something taken away, on a part of the items that all modes score.

static_query      the learned static query on every frame, in place of the planned ones
shuffled_frames   the frames of every clip in another order, drawn from (seed, key, item)
first_frame       every frame is the clip's first
oracle_query      attention limited to the target's patches, where the truth is known (an upper bound)

`blind` and `random_query` are among the modes that all items are scored in. Shapes: F frames of a batch, N patches.
"""

import hashlib

import numpy as np
import pandas as pd
import torch

from pipeline_steps.common.metrics import CONTROLS, Control
from pipeline_steps.evaluation import scoring

QUERY_SOURCES = {"static_query": "static", "oracle_query": "oracle"}
COMPARED = ("blind", "random_query", *CONTROLS)
SUMS = ("loss_sum", "num_correct", "num_tokens")


def applicable(config):
    """The controls that change something in a network: ordinary tokens have no queries."""
    return [name for name in CONTROLS if config.architecture == "foveated" or name not in QUERY_SOURCES]


def score_controls(model, loaded, seed, progress):
    """DataFrame as of `scoring.score_items`, one row per item and control. loaded: `scoring.batches`."""
    rows = []
    for task, items, batch, truths in loaded:
        for name in applicable(model.config):
            if name == "oracle_query" and all(truth is None for truth in truths):
                continue
            shown = controlled(name, items, batch, truths, seed)
            measured = name in QUERY_SOURCES and any(truth is not None for truth in truths)
            output = scoring.forward(model, shown, "autoregressive", QUERY_SOURCES.get(name), None, measured)
            known = truths if name in QUERY_SOURCES else [None] * len(items)  # else the frames moved from the truth
            made = scoring.table_rows(task, items, known, shown, name, output)
            rows += [
                row for row, truth in zip(made, truths, strict=True) if name != "oracle_query" or truth is not None
            ]
        progress.update(len(items))
    return pd.DataFrame(rows)


def controlled(name, items, batch, truths, seed):
    """The batch as a control shows it."""
    if name == "oracle_query":
        return batch | {"target_patches": target_patches(batch, truths)}
    if name == "static_query":
        return batch
    counts = batch["num_frames"].tolist()
    starts = np.cumsum([0, *counts[:-1]])
    if name == "first_frame":
        places = [np.full(count, start) for start, count in zip(starts, counts, strict=True)]
    else:
        orders = [shuffled(count, seed, item["key"], item["item"]) for item, count in zip(items, counts, strict=True)]
        places = [start + order for start, order in zip(starts, orders, strict=True)]
    index = torch.from_numpy(np.concatenate(places)).to(batch["pixel_values"].device)
    moved = {key: batch[key][index] for key in ("pixel_values", "target_patches") if key in batch}
    return batch | moved


def shuffled(count, seed, key, item):
    """An order of `count` frames that is not their own (of one frame it is), the same in any batch: int64 [count]."""
    digest = hashlib.sha256(f"{seed} {key} {item}".encode()).digest()
    rng = np.random.default_rng(int.from_bytes(digest[:8], "big"))
    order = rng.permutation(count)
    while count > 1 and np.array_equal(order, np.arange(count)):
        order = rng.permutation(count)
    return order


def target_patches(batch, truths):
    """bool [F, N], all False where the target is unknown or not visible: there the query looks where it likes."""
    known = next(truth for truth in truths if truth is not None)
    nothing = np.zeros((1, known.target.shape[1]), bool)
    pairs = zip(truths, batch["num_frames"].tolist(), strict=True)
    rows = [nothing.repeat(count, 0) if truth is None else truth.target for truth, count in pairs]
    return torch.from_numpy(np.concatenate(rows)).to(batch["pixel_values"].device)


def effects(table, interval):
    """{task: {control: `Control`}}; interval: function of (numerators, denominators) per item."""
    indexed = table.set_index(["task", "mode", "key", "item"]).sort_index()[list(SUMS)]
    found = {}
    for task, mode in table[["task", "mode"]].drop_duplicates().sort_values(["task", "mode"]).itertuples(False):
        if mode not in COMPARED:
            continue
        control = indexed.loc[task, mode]
        found.setdefault(task, {})[mode] = effect(control, indexed.loc[task, "autoregressive"], interval)
    return found


def effect(control, base, interval):
    """`Control` of the items of `control`; both are indexed by (key, item)."""
    base = base.loc[control.index]
    loss, correct, tokens = ((control[name] - base[name]).to_numpy() for name in SUMS)
    if tokens.any():
        raise ValueError(f"{int((tokens != 0).sum())} items have other scored tokens in the control than without it")
    tokens = base["num_tokens"].to_numpy()
    return Control(
        loss_difference=float(loss.sum() / tokens.sum()),
        loss_interval=interval(loss, tokens),
        accuracy_difference=float(correct.sum() / tokens.sum()),
        accuracy_interval=interval(correct, tokens),
        num_items=len(base),
    )
