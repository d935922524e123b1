"""The training loop of all stages.

Everything random is a function of (seed, stage, step), so the state of a run is its step, weights and optimizer; a run
that is killed anywhere and started again ends with the same weights, bit by bit (CPU, same number of threads).
"""

import copy
import signal
from collections import Counter
from contextlib import contextmanager

import numpy as np
import torch
from torch.nn.utils import clip_grad_norm_, get_total_norm

from pipeline_steps.common.errors import UserError
from pipeline_steps.streaming.batch import Batch
from pipeline_steps.training import checkpoint_io, checks
from pipeline_steps.training.checkpointing import all_quarantined, keep_best, load_weights, publish_weights, save
from pipeline_steps.training.context import TrainContext, TrainState, announce, averaged
from pipeline_steps.training.distributed import without_sync, wrap
from pipeline_steps.training.ema import EMA
from pipeline_steps.training.optimizers import STATE_COPIES, Optimizer
from pipeline_steps.training.parameters import GROUPS, trainable_parameters, weight_matrices
from pipeline_steps.training.schedule import learning_rate
from pipeline_steps.training.validation import draw_looks, validate

STOPPED = 143  # exit code of a run that SIGTERM ended: 128 + 15


def train(run: TrainContext) -> dict:
    """Train to the end of the sample budget, from the saved state if there is one. Returns the final validation
    result."""
    trainer = prepare(run)
    first, served = run.loader.step, run.served.mixture.statistics()
    announce(run, checks.warn_of_repeats(run.stage, served, run.runtime.warn_above_epochs))
    with stopped_by_sigterm(run):
        for step, batch in enumerate(run.logger.progress(run.loader, first), start=first):
            row = train_step(run, trainer, batch, step)
            if run.is_recorded(step):
                run.history.append(row)
            after_step(run, trainer, step + 1)
    with averaged(trainer):
        final = validate(run, run.num_steps, modes=("fine", "autoregressive"))
    run.history += final
    run.logger.rows(final)
    keep_best(run, trainer, final)
    publish_weights(run, trainer)
    return {
        "validation": final,
        "best": run.best,
        "mixture": served,
        "unserved": run.served.groups.unmatched,
        "quarantined": all_quarantined(run),
    }


def prepare(run: TrainContext) -> TrainState:
    """The trainer, and the loader, at the beginning of the stage or where the last state says."""
    model = run.training_model
    if run.settings.loss == "preference":
        check_preferences(run)
    if model.needs.reference:
        run.reference = copy.deepcopy(run.model).requires_grad_(False).eval()
    if run.common.activation_checkpointing:
        run.model.gradient_checkpointing_enable()
    saved = checkpoint_io.load_state(run.folder)
    if saved is not None:
        load_weights(run, saved[0])
    options = (run.settings, run.common.weight_decay, run.common.optimizer, model.objective)
    trainable_parameters(run.model, *options)  # freezes what is not trained
    run.micro_batch_size = choose_micro_batch_size(run)  # before the processes wait for each other in every layer
    if run.is_sharded:
        check_side_by_side(run)
    if run.common.compile:
        run.model.compile_hot_paths()  # first, so that what sharding does around a layer stays outside of its graph
    wrapped = wrap(model, run.distributed, run.is_sharded)
    groups, _ = trainable_parameters(run.model, *options)  # dividing makes other ones
    names = {id(p): name for name, p in model.named_parameters()}
    optimizer = Optimizer(groups, run.common.betas)
    ema = EMA(model, run.common.ema_decay) if run.common.ema_decay is not None else None
    trainer = TrainState(wrapped, optimizer, ema, names)
    if saved is None:
        return trainer
    tensors, values = saved
    optimizer.restore(tensors["optimizer"], names)
    if ema is not None:
        ema.load(tensors["average"])
    run.history, run.best = values["history"], values["best"]
    own = values["loader"] if run.distributed.is_main else values["loader"] | {"quarantined": {}}
    run.loader.load_state_dict(own)
    announce(run, [f"{run.stage}: going on from step {run.loader.step} of {run.num_steps} ({run.folder})"])
    return trainer


def check_preferences(run: TrainContext) -> None:
    """UserError when the stage would train on an item that has no rejected answer."""
    order = run.served.plan.order
    lacking = order[run.train.index.num_rejected[order] == 0]
    if len(lacking):
        raise UserError(
            f"training.{run.stage}.loss is preference, but {len(np.unique(lacking)):,} items of its mixture have no "
            f"rejected answer, such as one of sample '{run.train.rows[int(lacking[0])]['key']}'. Name the source of "
            f"the preferences in training.{run.stage}.mixture."
        )


def check_side_by_side(run: TrainContext) -> None:
    """UserError when the processes of a divided network would not run the same layers at the same time, and so wait for
    each other for ever: all need as many micro-batches, and frames in the same ones."""
    plan, size, world = run.served.plan, run.micro_batch_size or run.common.batch_size, run.distributed.world_size
    for step in range(plan.num_steps):
        shown = [run.train.index.num_frames[plan.items(step, rank, world)] > 0 for rank in range(world)]
        pieces = [[bool(own[at : at + size].any()) for at in range(0, len(own), size)] for own in shown]
        if any(own != pieces[0] for own in pieces):
            raise UserError(
                f"step {step + 1} of {run.stage}: with training.common.sharding fsdp all {world} processes need frames "
                f"in the same micro-batches (of {size} samples), their shares have them in {pieces}. Raise "
                "training.common.batch_size or micro_batch_size, set text_share to 0, or take sharding ddp."
            )


def choose_micro_batch_size(run: TrainContext) -> int | None:
    """Samples per forward pass: the given number, None for a whole batch, or as many of the largest samples as fit the
    memory of every process's GPU, beside what the run keeps there from the first step on (`state_to_come`).

    Every process tries by itself with the whole model, so with fsdp, which divides it, more may fit than is found.
    """
    wanted = run.common.micro_batch_size
    if wanted != "auto":
        return wanted
    if run.device == "cpu":
        return None
    share = -(-int(np.diff(run.served.plan.starts).max()) // run.distributed.world_size)
    patches = (run.train.image_size // run.model.config.vision_config.patch_size) ** 2
    places = run.train.index.num_tokens + run.train.index.shown_frames(run.streaming.image_replication) * patches
    largest = np.argsort(-places, kind="stable").tolist()

    def try_size(size: int) -> None:
        batch = run.loader.collate([run.train[number] for number in largest[:size]])
        try_micro_batch(run, batch, accumulates=size < share)

    size = run.distributed.smallest(checks.find_micro_batch_size(share, try_size))
    announce(run, [f"{run.stage}: micro-batches of {size} samples fit the memory of {run.device}"])
    return size


def state_to_come(run: TrainContext) -> list[torch.Tensor]:
    """Empty tensors as large as what one process keeps of its trained weights beside them: the optimizer's state, and
    the average of the weights where there is one. With fsdp a process keeps its part."""
    parts = run.distributed.world_size if run.is_sharded else 1
    model = run.training_model
    for_muon = weight_matrices(run.model, model.objective) if run.common.optimizer == "muon" else set()
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    has_average = run.common.ema_decay is not None
    copies = [STATE_COPIES["muon" if id(parameter) in for_muon else "adamw"] + has_average for parameter in trained]
    return [p.new_empty(count * -(-p.numel() // parts)) for p, count in zip(trained, copies, strict=True)]


def try_micro_batch(run: TrainContext, batch: Batch, accumulates: bool) -> None:
    """A forward and a backward pass of a batch of the whole network, beside the `state_to_come` and, where the step
    `accumulates` micro-batches or several processes share their gradients in buckets, beside all gradients."""
    model, kept = run.training_model.train(), state_to_come(run)
    if accumulates or (run.distributed.world_size > 1 and not run.is_sharded):
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.grad = torch.zeros_like(parameter)
    try:
        with torch.autocast(run.device.split(":")[0], torch.bfloat16, enabled=run.common.precision == "bf16"):
            plans = run.model.config.num_passes + 1
            model(batch.to(run.device), plans, model.counts(batch), run.reference)[0].backward()
    finally:
        model.zero_grad(set_to_none=True)
        del kept


def train_step(run: TrainContext, trainer: TrainState, batch: Batch, step: int) -> dict:
    """One optimizer step; returns its row of the metrics table."""
    rates = set_learning_rates(run, trainer.optimizer, step)
    trainer.wrapped.train()
    again = run.generator(step).random() < run.settings.objective.second_pass_probability
    num_plans = run.model.config.num_passes + int(again)
    torch.manual_seed(int(run.generator(step, 1).integers(2**63)))  # random queries, sampled attention
    trainer.optimizer.zero_grad()
    sums, totals = accumulate(run, trainer, batch, num_plans)
    parameters = [p for group in trainer.optimizer.param_groups for p in group["params"]]
    norms = group_norms(trainer.optimizer) if run.is_recorded(step) or run.is_logged(step) else {}
    norm = checkpoint_io.full_tensor(clip_grad_norm_(parameters, run.common.clip_norm)).item()
    losses = over_processes(run, sums)
    checks.refuse_non_finite(run.stage, step, losses["loss"], norm, batch, run.folder)
    trainer.optimizer.step()
    if trainer.ema is not None:
        trainer.ema.update()
    row = {
        "event": "train",
        "step": step + 1,
        "samples": run.loader.samples_seen(step + 1),
        "tokens": int(totals["tokens"]),
    }
    row |= losses
    row |= {"grad_norm": norm, **norms, "num_plans": num_plans, **rates}
    flops = run.step_flops.of_batch(batch, num_plans) if run.logger.peak else 0.0
    sizes = {"num_samples": int(totals["samples"]), "num_positions": int(totals["positions"])}
    run.logger.step(row, run.is_logged(step), **sizes, flops=flops)
    return row


def accumulate(
    run: TrainContext, trainer: TrainState, batch: Batch, num_plans: int
) -> tuple[dict[str, float], dict[str, float]]:
    """Gradients of the whole step's loss, from this process's micro-batches.

    Returns (this process's parts of "loss" and of the terms that there are, which add up over the processes to the
    step's values; the whole step's `TrainingModel.counts`).
    """
    model, device = run.training_model, run.device
    own = model.counts(batch)
    totals = dict(zip(own, run.distributed.sum(*own.values()), strict=True))
    pieces = list(batch.split(run.micro_batch_size))
    sums: Counter = Counter(loss=0.0)
    for number, piece in enumerate(pieces):
        with (
            without_sync(trainer.wrapped, number == len(pieces) - 1),
            torch.autocast(device.split(":")[0], torch.bfloat16, enabled=run.common.precision == "bf16"),
        ):
            loss, values = trainer.wrapped(piece.to(device), num_plans, totals, run.reference)
            # the processes' gradients are averaged, the parts of the loss are to be added
            (loss * run.distributed.world_size).backward()
        for name, value in {"loss": loss, **values}.items():
            sums[name] += value.item()
    return sums, totals


def over_processes(run: TrainContext, sums: dict[str, float]) -> dict[str, float]:
    """The step's loss and terms from this process's parts: what any process has. All of them send the same number of
    values, whatever their shares hold: one of text only has no loss of the attention."""
    names = ("loss", *run.training_model.term_names)
    values = run.distributed.sum(*(sums.get(name, 0.0) for name in names), *(name in sums for name in names))
    return {name: value for name, value, there in zip(names, values, values[len(names) :], strict=False) if there}


def set_learning_rates(run: TrainContext, optimizer: Optimizer, step: int) -> dict[str, float]:
    for group in optimizer.param_groups:
        group["lr"] = learning_rate(step, run.num_steps, group["peak"], group["name"], run.settings)
    return {f"lr_{group['name']}": group["lr"] for group in optimizer.param_groups}


def group_norms(optimizer: Optimizer) -> dict[str, float]:
    """Gradient norm of every learning-rate group, before clipping."""
    norms = {}
    for name in GROUPS:
        own = [p.grad for g in optimizer.param_groups if g["name"] == name for p in g["params"] if p.grad is not None]
        if own:
            norms[f"grad_norm_{name}"] = checkpoint_io.full_tensor(get_total_norm(own)).item()
    return norms


def after_step(run: TrainContext, trainer: TrainState, done: int) -> None:
    """Validation and states, where they are due; the end of the process where SIGTERM asked for it."""
    last = done == run.num_steps
    if done % run.common.validate_every == 0 and not last:
        with averaged(trainer):
            rows = validate(run, done)
        run.history += rows
        run.logger.rows(rows)
        keep_best(run, trainer, rows)
        warn_of_plateau(run, done)
    every = run.runtime.heatmaps_every
    if every and (done % every == 0 or last):
        with averaged(trainer):
            draw_looks(run, done)
    stop = run.distributed.sum(run.stop_requested)[0] > 0
    if (done % run.runtime.checkpoint_every == 0 or stop) and not last:
        save(run, trainer, done)
    if stop and not last:
        announce(
            run,
            [f"{run.stage}: ended by SIGTERM after step {done}; the same command goes on from there ({run.folder})"],
        )
        raise SystemExit(STOPPED)


def warn_of_plateau(run: TrainContext, step: int) -> None:
    """A line, and a row of the metrics table, when the run has stopped learning in a way that is known."""
    rows = [row for row in run.history if row["event"] == "validation" and row["mode"] == "fine"]
    means = {}
    for row in rows:
        means.setdefault(row["step"], []).append((row["loss"], row["accuracy"]))
    losses, accuracies = ([float(np.mean([pair[i] for pair in pairs])) for pairs in means.values()] for i in (0, 1))
    diagnostics = next((row for row in reversed(run.history) if row["event"] == "diagnostics"), {})
    limits = (run.common.plateau_validations, run.common.plateau_progress)
    message = checks.plateau(losses, accuracies, diagnostics, *limits)
    if message:
        run.history.append({"event": "warning", "step": step, "message": message})
        announce(run, [f"{run.stage} step {step}: {message}"])


@contextmanager
def stopped_by_sigterm(run: TrainContext):
    """SIGTERM, which clusters send before they take a node away, lets the step end and saves its state."""

    def request(*_):
        run.stop_requested = True

    before = signal.signal(signal.SIGTERM, request)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
