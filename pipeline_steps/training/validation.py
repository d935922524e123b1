"""Validation during training: loss and accuracy by source and task, attention diagnostics and attention maps."""

import numpy as np
import torch

from model import FoveatedVLMOutput, FoveationOptions
from pipeline_steps.streaming.batch import Batch
from pipeline_steps.streaming.collate import Collator
from pipeline_steps.training.checks import attention_diagnostics
from pipeline_steps.training.training_model import text_of


def validate(run, step: int, modes: tuple[str, ...] = ("fine",)) -> list[dict]:
    """Rows of the metrics table: token-weighted loss and accuracy of every source, task and mode, and one row of
    attention diagnostics.

    A task without a scored token (answers of punctuation only) has no row. With DDP the ranks split the items and sum
    their scores; with FSDP, whose ranks run in lockstep, every rank scores all items. Random queries are a function of
    (seed, stage, step), the same for all modes.
    """
    collate = Collator.for_model(
        run.model.config, loss="answer_only", image_replication=run.streaming.image_replication
    )
    run.training_model.eval()
    rows = []
    for (source, task), numbers in sorted(chosen_items(run).items()):
        for mode in modes:
            loss, correct, tokens = _sums(run, numbers, collate, mode, step)
            scores = {"mode": mode, "tokens": int(tokens), "loss": loss / tokens, "accuracy": correct / tokens}
            rows.append({"event": "validation", "step": step, "source": source, "task": task, **scores})
    diagnostics = diagnose(run, collate, step)
    return [*rows, {"event": "diagnostics", "step": step, **diagnostics}] if diagnostics else rows


def chosen_items(run) -> dict[tuple[str, str], list[int]]:
    """{(source, task): indices of the first max_validation_items items with a scored token}."""
    chosen: dict[tuple[str, str], list[int]] = {}
    index = run.validation.index
    for task, numbers in run.validation.tasks().items():
        scored = numbers[run.validation.scored[numbers]]
        for source, places in index.numbers_by(index.source[scored], index.sources).items():
            chosen[source, task] = scored[places][: run.common.max_validation_items].tolist()
    return chosen


def noise(run, step: int) -> torch.Generator:
    """Generator of random queries, seeded by (seed, stage, step), on the run's device."""
    return torch.Generator(run.device).manual_seed(int(run.generator(step, 3).integers(2**63)))


def infer(run, batch: Batch, mode: str, **options) -> FoveatedVLMOutput:
    """The network's output for a batch with its labels. options: of `FoveationOptions`."""
    text = text_of(run.training_model.network, batch)
    options = FoveationOptions(target_patches=batch.target_patches, text=text, return_logits=False, **options)
    return run.training_model.infer(**batch.inputs(), labels=batch.labels, mode=mode, options=options)


@torch.no_grad()
def _sums(run, numbers: list[int], collate: Collator, mode: str, step: int) -> tuple[float, float, float]:
    """(sum of losses, correct tokens, tokens) over the scored tokens of the items."""
    group, size = run.distributed, run.micro_batch_size or run.common.batch_size
    own = numbers if run.is_sharded else numbers[group.rank :: group.world_size]
    loss = correct = tokens = 0
    generator = noise(run, step)
    for start in range(0, len(own), size):
        batch = collate([run.validation[number] for number in own[start : start + size]]).to(run.device)
        output, scored = infer(run, batch, mode, generator=generator), batch.score_mask
        loss += output.token_loss[scored].double().sum().item()
        correct += int(output.correct[scored].sum())
        tokens += int(scored.sum())
    return (loss, correct, tokens) if run.is_sharded else tuple(group.sum(loss, correct, tokens))


def monitored_items(run) -> list[dict]:
    """The fixed validation items of diagnostics and attention maps: items with frames, equally many of every task."""
    shown = ~run.validation.index.is_text
    tasks = [numbers[shown[numbers]] for _, numbers in sorted(run.validation.tasks().items())]
    turns = [number for turn in zip(*(own for own in tasks if len(own)), strict=False) for number in turn]
    return [run.validation[int(number)] for number in turns[: run.micro_batch_size or run.common.batch_size]]


@torch.no_grad()
def diagnose(run, collate: Collator, step: int) -> dict[str, float]:
    """`attention_diagnostics` of the monitored items; {} for a network without queries or a split without frames."""
    items = monitored_items(run)
    if run.model.config.architecture != "foveated" or not items:
        return {}
    batch = collate(items).to(run.device)
    options = {"output_attentions": True}
    fine, coarse = (infer(run, batch, mode, generator=noise(run, step), **options) for mode in ("fine", "coarse"))
    values = attention_diagnostics(fine, coarse, batch.num_frames)
    return {name: value for name, value in values.items() if np.isfinite(value)}


@torch.no_grad()
def log_attention_maps(run, step: int) -> None:
    """Logs attention overlays of the first monitored items: fine mode, last layer, mean over heads and queries."""
    items = monitored_items(run)[: run.runtime.num_heatmap_clips]
    if run.model.config.architecture != "foveated" or not items:
        return
    run.training_model.eval()
    collate = Collator.for_model(run.model.config, loss="answer_only", image_replication=1)
    options = {"generator": noise(run, step), "output_attentions": True}
    weights = infer(run, collate(items).to(run.device), "fine", **options).attention_weights
    maps = weights[-1].float().mean((1, 2))[:, 1:]  # [F, N], without the class token, which may get everything
    totals = maps.sum(1, keepdim=True).clamp_min(torch.finfo(maps.dtype).tiny)
    run.logger.pictures(step, items, (maps / totals).cpu().numpy())
