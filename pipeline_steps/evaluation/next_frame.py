"""How well the next frame is predicted after static and planned queries, from a checkpoint with a head for it.

    python -m pipeline_steps.evaluation.next_frame [--checkpoint outputs/stage3] [--out outputs/metrics/next_frame.json]
        [--num-frames 8 16] [--max-passes 3]

Reads params.yaml, data/shards, data/tokens, the checkpoint with its objective.safetensors and the frozen autoencoder
that this names. The stage `evaluation` writes the same numbers to evaluation.json if its checkpoint has such a head.
All losses are mean squared errors of what the head predicts (`pair_losses`), without the absolute error.

Shapes: F frames of the batch, n pairs of consecutive frames, P visual tokens per frame, E language width.
"""

import argparse
import json
import os
from pathlib import Path

os.environ.setdefault("MKL_DYNAMIC", "FALSE")

import numpy as np
import pandas as pd
import torch
import transformers
from safetensors import safe_open

from pipeline_steps.common import metrics, params
from pipeline_steps.common.checkpoint import load_model
from pipeline_steps.common.device import choose_device
from pipeline_steps.common.diagnostic_results import NextFrameResult, NextFrameScore
from pipeline_steps.common.errors import UserError, run_main
from pipeline_steps.common.files import check_outputs, parse
from pipeline_steps.common.next_frame import NextFrameHeads, TargetMaker, first_frames, pair_losses
from pipeline_steps.common.next_frame_schema import NextFrameSettings
from pipeline_steps.evaluation import statistics, temporal
from pipeline_steps.evaluation.scoring import batches, choose_items, prefetch, subset
from pipeline_steps.streaming.collate import Collator
from pipeline_steps.streaming.dataset import TokenizedShards

HEADS, PREFIX = "objective.safetensors", "next_frame."
VIDEOS = "videos"  # the group of all clips; the others are the tasks
LAST = 4  # frames of the second win statistic
NUM_FRAMES, MAX_PASSES = (8, 16), 3
STEP = 0.1  # norm of the perturbation of an input of the head, relative to the norm of the input
SENSITIVITIES = ("no_state", "state_sensitivity", "previous_sensitivity")  # columns that are no loss of a variant


class NextFramePredictor:
    """A trained head with its targets."""

    def __init__(self, settings: NextFrameSettings, weights: dict, model, where: Path, autoencoder: str | None = None):
        """weights: {name: tensor} of the head; where: its file, for messages; autoencoder: instead of the one that the
        settings name. UserError if the weights do not fit."""
        if autoencoder is not None:
            settings = settings.model_copy(update={"autoencoder": autoencoder})
        key = f"{where}: objective.next_frame"
        self.settings, device = settings, next(model.parameters()).device
        self.targets = TargetMaker(settings, model.config.vision_config.patch_size, key)
        self.heads = NextFrameHeads(settings, model.config, key)
        try:
            self.heads.load_state_dict(weights)
        except RuntimeError as error:
            raise UserError(f"{where}: the head does not fit its settings: {' '.join(str(error).split())}") from None
        self.heads.to(device).eval()

    def losses(self, name, state, queries, targets, previous):
        """Losses [n] of the pairs; name, state, queries and previous as in `NextFrameHeads`."""
        return pair_losses(self.heads(name, state, queries, previous, targets.grid), targets.expected)


def load_predictor(checkpoint: Path, model, autoencoder: str | None = None) -> NextFramePredictor | None:
    """The predictor of a checkpoint; None if it was trained without the next-frame objective."""
    path = checkpoint / HEADS
    if not path.exists():
        return None
    with safe_open(path, "pt") as file:
        settings = json.loads((file.metadata() or {}).get("objective", "{}")).get("next_frame")
        names = [name for name in file.keys() if name.startswith(PREFIX)]  # noqa: SIM118
        weights = {name.removeprefix(PREFIX): file.get_tensor(name) for name in names}
    if not weights:
        return None
    if settings is None:
        raise UserError(f"{path}: has a next-frame head but not its settings. Train the stage again.")
    settings = parse(NextFrameSettings, json.dumps(settings), f"{path}: objective.next_frame", "Train the stage again.")
    return NextFramePredictor(settings, weights, model, path, autoencoder)


@torch.inference_mode()
def pair_table(model, predictor, task, items, batch, max_passes) -> pd.DataFrame:
    """One row per pair: task, key, item, kind, frame (of the clip, that is predicted), `similarity` of that clip's
    static and planned token of the pair's first frame (None for the first one), and the loss of every variant:

    coarse, fine_1 ... fine_<max_passes>, autoregressive   by pass; a network with one pass has `coarse` alone
    unchanged        the prediction that nothing changes
    shuffled_state   fine, with the state after the same frame of another clip
    no_previous      fine, with zeros for the previous latent

    and the columns of `sensitivities`.
    """
    counts = batch.places.counts
    firsts = first_frames(counts)
    clips = np.repeat(np.arange(len(counts)), counts)[firsts]
    times = (np.arange(counts.sum()) - np.repeat(counts.cumsum() - counts, counts))[firsts]
    table = pd.DataFrame(
        {
            "task": task,
            "key": [items[clip]["key"] for clip in clips],
            "item": [items[clip]["item"] for clip in clips],
            "kind": [items[clip]["kind"] for clip in clips],
            "frame": times + 1,
        }
    )
    if not len(firsts):
        return table
    index = torch.from_numpy(firsts).to(batch.pixel_values.device)
    targets = predictor.targets(batch.inputs()["pixel_values"], index)
    text = model.packed_text(batch.input_ids, batch.attention_mask, places=batch.places)
    common = {"text": text, "target_patches": batch.target_patches}

    def passes(mode, **options):
        return model.encode_frames(**batch.inputs(), mode=mode, options=common | options)

    def parts(tokens):
        state = text.at_frames(tokens.visual_tokens)[index, -1]
        return state, None if tokens.queries is None else tokens.queries[index]

    found = {"coarse": passes("coarse")[-1]}
    if model.config.architecture == "foveated" and not model.config.coarse_only:
        _, *planned = passes("fine", num_plans=max_passes)
        found |= {f"fine_{number}": tokens for number, tokens in enumerate(planned, start=1)}
        found["autoregressive"] = passes("autoregressive")[-1]
    losses = {"unchanged": pair_losses(targets.unchanged, targets.expected)}
    for name, tokens in found.items():
        head = "coarse" if name == "coarse" else "fine"
        losses[name] = predictor.losses(head, *parts(tokens), targets, targets.previous)
    fine = fine_name(model.config) if len(found) > 1 else "coarse"
    head, (state, queries) = fine.partition("_")[0], parts(found[fine])
    other = other_clip(times, table["key"])
    known = torch.from_numpy(np.maximum(other, 0)).to(index.device)
    shuffled = None if queries is None else queries[known]
    losses["shuffled_state"] = predictor.losses(head, state[known], shuffled, targets, targets.previous)
    losses["shuffled_state"][torch.from_numpy(other < 0).to(index.device)] = torch.nan
    if targets.previous is not None and predictor.heads.takes_previous:
        nothing = torch.zeros_like(targets.previous)
        losses["no_previous"] = predictor.losses(head, state, queries, targets, nothing)
    for name, values in (losses | sensitivities(predictor, head, state, queries, targets)).items():
        table[name] = values.double().cpu().numpy()
    if len(found) > 1:
        tokens = (found[name].visual_tokens.flatten(1)[index] for name in ("coarse", fine))
        table["similarity"] = torch.cosine_similarity(*tokens).double().cpu().numpy()
        table.loc[table["frame"] == 1, "similarity"] = np.nan  # no planned query
    return table


def fine_name(config):
    """Name of the loss after the configured passes."""
    return f"fine_{config.num_passes}"


def sensitivities(predictor, head, state, queries, targets):
    """How the head depends on its inputs: {name: [n]}; head, state and queries as in `NextFrameHeads`.

    no_state: loss with zeros for state and queries. state_sensitivity, previous_sensitivity: relative change of the
    prediction / STEP, when the state or the previous latent moves by STEP of its norm in a random direction; the latter
    is left out if the head takes no previous latent.
    """
    heads, generator = predictor.heads, torch.Generator(state.device).manual_seed(0)

    def predicted(state, queries, previous):
        return heads(head, state, queries, previous, targets.grid)

    def moved(values):
        noise = torch.randn(values.shape, generator=generator, device=values.device, dtype=values.dtype)
        length = STEP * norm(values) / norm(noise)
        return values + noise * length.reshape(-1, *[1] * (values.dim() - 1))

    def norm(values):
        return values.flatten(1).norm(dim=1).clamp_min(1e-12)

    own = predicted(state, queries, targets.previous)
    nothing = None if queries is None else torch.zeros_like(queries)
    without = predicted(torch.zeros_like(state), nothing, targets.previous)
    found = {"no_state": pair_losses(without, targets.expected)}
    others = {"state_sensitivity": predicted(moved(state), queries, targets.previous)}
    if targets.previous is not None and heads.takes_previous:
        others["previous_sensitivity"] = predicted(state, queries, moved(targets.previous))
    return found | {name: norm(other - own) / norm(own) / STEP for name, other in others.items()}


def other_clip(times, keys):
    """For every pair, a pair at the same time of another clip: int64 [n], -1 where there is none. keys: the clip of
    every pair, since two items may share one."""
    other = np.full(len(times), -1)
    keys = np.asarray(keys)
    for time in np.unique(times):
        own = np.flatnonzero(times == time)
        for shift in range(1, len(own)):
            candidates = np.roll(own, -shift)
            free = (other[own] < 0) & (keys[candidates] != keys[own])
            other[own[free]] = candidates[free]
            if (other[own] >= 0).all():
                break
    return other


def measure(
    model, predictor, collate, dataset, chosen, settings, loading, num_frames=NUM_FRAMES, max_passes=MAX_PASSES
):
    """`NextFrameResult` of items with frames ({task: row numbers}). settings: section `evaluation`; loading:
    arguments of `streaming.prefetch.map_ordered`; num_frames: clips are also cut to so many first frames."""
    max_passes = max(max_passes, model.config.num_passes)
    own = subset(chosen, settings.max_items_per_task, settings.seed)
    tables, cut = [], {count: [] for count in num_frames}
    for task, items, batch, _ in batches(model, collate, dataset, own, settings.batch_size, loading):
        tables.append(pair_table(model, predictor, task, items, batch, max_passes))
        for count, found in cut.items():
            shown = [item for item in items if item["kind"] == "video" and len(item["frames"]) >= count]
            if shown:
                shown = [temporal.select(item, np.arange(count)) for item in shown]
                shorter = collate(shown).to(next(model.parameters()).device)
                found.append(pair_table(model, predictor, task, shown, shorter, max_passes))
    table = pd.concat(tables, ignore_index=True)
    if table.empty:
        raise UserError("no clip of the chosen items has two frames: nothing to predict. Change evaluation.split.")
    groups = {VIDEOS: table[table["kind"] == "video"], **dict(iter(table.groupby("task")))}
    by_passes = {"all": groups[VIDEOS], **{str(count): pd.concat(own) for count, own in cut.items() if own}}
    return NextFrameResult(
        settings=predictor.settings.model_dump(mode="json"),
        groups={name: summarise(rows, fine_name(model.config), settings) for name, rows in groups.items() if len(rows)},
        passes={name: by_pass(rows) for name, rows in by_passes.items() if len(rows)},
    )


def variants(rows):
    """Names of the losses in a pair table."""
    fixed = {"task", "key", "item", "kind", "frame", "similarity", *SENSITIVITIES}
    return [name for name in rows if name not in fixed and rows[name].notna().any()]


def by_pass(rows):
    """{coarse, fine_1, ...: mean loss}."""
    return {name: float(rows[name].mean()) for name in variants(rows) if name == "coarse" or name.startswith("fine_")}


def summarise(rows, fine, settings):
    """`NextFrameScore` of the rows of a pair table. fine: name of the loss of the configured passes."""
    names = variants(rows)
    frames = rows.groupby("frame")
    fields = {
        "loss": {name: float(rows[name].mean()) for name in names},
        "per_frame": {
            name: frames[name].mean().tolist() for name in ("coarse", fine, "autoregressive") if name in names
        },
        "num_clips": rows["key"].nunique(),
        "num_pairs": len(rows),
        **{name: float(rows[name].mean()) for name in SENSITIVITIES if name in rows},
    }
    if fine not in names:
        return NextFrameScore(**fields)
    by_clip = rows.groupby(["key", "item"])
    is_last = rows["frame"] > by_clip["frame"].transform("max") - LAST
    options = {"num_samples": settings.bootstrap_samples, "seed": settings.seed}
    similarity = rows["similarity"].mean()
    return NextFrameScore(
        **fields,
        ratio=float(rows["coarse"].sum() / rows[fine].sum()),
        ratio_interval=statistics.ratio_interval(rows["coarse"], rows[fine], clips=rows["key"], **options),
        wins=wins(by_clip, fine),
        wins_last_frames=wins(rows[is_last].groupby(["key", "item"]), fine),
        token_similarity=None if np.isnan(similarity) else float(similarity),
    )


def wins(by_clip, fine):
    """Share of clips whose fine loss is below their coarse loss."""
    sums = by_clip[["coarse", fine]].sum()
    return float((sums[fine] < sums["coarse"]).mean())


def main():
    parser = argparse.ArgumentParser(description="Next-frame losses of a checkpoint after static and planned queries.")
    parser.add_argument("--params", default="params.yaml")
    parser.add_argument("--checkpoint", type=Path, default=Path("outputs/stage3"))
    parser.add_argument("--autoencoder", help="its folder, if not the one that the checkpoint names")
    parser.add_argument("--shards", type=Path, default=Path("data/shards"))
    parser.add_argument("--tokens", type=Path, default=Path("data/tokens"))
    parser.add_argument("--num-frames", type=int, nargs="*", default=NUM_FRAMES, help="cut clips to so many frames")
    parser.add_argument("--max-passes", type=int, default=MAX_PASSES)
    parser.add_argument("--out", type=Path, default=Path("outputs/metrics/next_frame.json"))
    arguments = parser.parse_args()
    numbers = {"--num-frames": (2, arguments.num_frames), "--max-passes": (1, [arguments.max_passes])}
    for name, (smallest, given) in numbers.items():
        if given and min(given) < smallest:
            parser.error(f"argument {name}: {min(given)} is below {smallest}")
    parameters = params.read(arguments.params, "evaluation", "streaming.image_replication")
    settings, replication = parameters.evaluation, parameters.streaming.image_replication
    check_outputs(files=[arguments.out])
    torch.set_num_threads(settings.num_threads)
    transformers.utils.logging.disable_progress_bar()
    model = load_model(arguments.checkpoint).to(choose_device())
    predictor = load_predictor(arguments.checkpoint, model, arguments.autoencoder)
    if predictor is None:
        raise UserError(
            f"{arguments.checkpoint}: has no next-frame head. Train its stage with objective.next_frame.weight above 0."
        )
    dataset = TokenizedShards.for_model(model.config, arguments.shards, arguments.tokens, settings.split, replication)
    chosen = choose_items(dataset, settings.max_items_per_task, settings.seed)
    collate = Collator.for_model(model.config, loss="answer_only", image_replication=replication)
    loading = prefetch(parameters.runtime, dataset, collate)
    cuts = (tuple(arguments.num_frames), arguments.max_passes)
    result = measure(model, predictor, collate, dataset, chosen, settings, loading, *cuts)
    metrics.write_json(arguments.out, result)
    for name, score in result.groups.items():
        losses = ", ".join(f"{variant} {value:.4f}" for variant, value in score.loss.items())
        wins = "" if score.wins is None else f"; fine wins {score.wins:.1%}"
        print(f"{name} ({score.num_clips} clips): {losses}{wins}")


if __name__ == "__main__":
    run_main(main)
