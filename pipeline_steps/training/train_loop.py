"""The training loop of all stages.

All randomness is a function of (seed, stage, step), so a state needs no random state. A run that is killed at any point
and resumed ends with bit-identical weights (on CPU, with the same number of threads). Random queries and Gumbel
attention are drawn for every micro-batch of a rank, so they also depend on how a batch is divided.
"""

import copy
import signal
from contextlib import contextmanager, suppress
from typing import NoReturn

import numpy as np
import torch
from torch.nn.utils import clip_grad_norm_, get_total_norm

from pipeline_steps.common.errors import UserError
from pipeline_steps.streaming.batch import Batch
from pipeline_steps.streaming.dataset import TokenizedShards, UnreadableSample
from pipeline_steps.training import checkpoint_io, checks
from pipeline_steps.training.checkpointing import (
    all_quarantined,
    load_weights,
    publish_weights,
    save_if_best,
    save_state,
)
from pipeline_steps.training.context import LaunchedStep, TrainContext, TrainState, announce, averaged
from pipeline_steps.training.distributed import without_sync, wrap
from pipeline_steps.training.ema import EMA
from pipeline_steps.training.optimizers import STATE_COPIES, Optimizer, stack_memory
from pipeline_steps.training.parameters import GROUPS, trainable_parameters, weight_matrices
from pipeline_steps.training.schedule import learning_rate
from pipeline_steps.training.validation import log_attention_maps, validate

SIGTERM_EXIT_CODE = 143  # 128 + 15


def train(run: TrainContext) -> dict:
    """Trains to the end of the sample budget, from the saved state if there is one. Returns the content of
    training.json: final validation, best step, mixture and quarantined samples."""
    state = prepare(run)
    first, mixture = run.loader.step, run.stage_plan.mixture.statistics()
    announce(run, checks.repeat_warnings(run.stage, mixture, run.runtime.warn_above_epochs))
    with stop_on_sigterm(run):
        for step, batch in enumerate(run.logger.progress(run.loader, first), start=first):
            launched = launch_step(run, state, batch, step)
            finish_step(run, state)  # the one before: the device works meanwhile
            state.launched = launched
            if launched.done is None:
                finish_step(run, state)  # a CPU has done it already
            after_step(run, state, step + 1)
    if is_stopping(run):  # since the last step
        stop_after(run, run.num_steps)
    with averaged(state):
        final = validate(run, run.num_steps, modes=("fine", "autoregressive"))
    run.history += final
    run.logger.rows(final)
    save_if_best(run, state, final)
    publish_weights(run, state)
    return {
        "validation": final,
        "best": run.best,
        "mixture": mixture,
        "unmatched": run.stage_plan.groups.unmatched,
        "quarantined": all_quarantined(run),
    }


def prepare(run: TrainContext) -> TrainState:
    """The TrainState at the start of the stage, or resumed from the last saved state together with the loader."""
    model = run.training_model
    if run.settings.loss == "preference":
        check_preferences(run)
    if model.needs.pairs:
        check_pairs(run)
    if model.needs.reference:
        run.reference = copy.deepcopy(run.model).requires_grad_(False).eval()
    if run.common.activation_checkpointing:
        run.model.gradient_checkpointing_enable()
    saved = load_saved(run)
    if saved is not None:
        load_weights(run, saved[0])
    options = (run.settings, run.common.weight_decay, run.common.optimizer, model.objective)
    trainable_parameters(run.model, *options)  # sets requires_grad
    run.micro_batch_size = choose_micro_batch_size(run)  # before FSDP synchronises the ranks in every layer
    if run.is_sharded:
        check_lockstep(run)
    if run.common.compile:
        run.model.compile_hot_paths()  # before sharding, so that its hooks stay outside the graph of a layer
    wrapped = wrap(model, run.distributed, run.is_sharded)
    groups, _ = trainable_parameters(run.model, *options)  # again: sharding replaces the parameters
    names = {id(p): name for name, p in model.named_parameters()}
    optimizer = Optimizer(groups, run.common.betas)
    ema = EMA(model, run.common.ema_decay) if run.common.ema_decay is not None else None
    state = TrainState(wrapped, optimizer, ema, names)
    if saved is None:
        return state
    tensors, values = saved
    optimizer.restore(tensors["optimizer"], names)
    if ema is not None:
        ema.load(tensors["average"])
    run.history, run.best = values["history"], values["best"]
    own = values["loader"] if run.distributed.is_main else values["loader"] | {"quarantined": {}}  # counted once
    run.loader.load_state_dict(own)
    announce(run, [f"{run.stage}: resuming from step {run.loader.step} of {run.num_steps} ({run.folder})"])
    return state


def load_saved(run: TrainContext) -> tuple[dict[str, dict], dict] | None:
    """The last intact state, the same one on every rank: the main process chooses it."""
    saved = checkpoint_io.load_state(run.folder) if run.distributed.is_main else None
    step = run.distributed.broadcast(saved[1]["step"] if saved is not None else None)
    return saved if run.distributed.is_main or step is None else checkpoint_io.load_state(run.folder, step)


def check_preferences(run: TrainContext) -> None:
    """UserError if an item of the stage has no rejected answer."""
    order = run.stage_plan.plan.order
    lacking = order[run.train.index.num_rejected[order] == 0]
    if len(lacking):
        raise UserError(
            f"training.{run.stage}.loss is preference, but {len(np.unique(lacking)):,} items of its mixture have no "
            f"rejected answer, for example one of sample '{run.train.rows[int(lacking[0])]['key']}'. Select the "
            f"preference data in training.{run.stage}.mixture."
        )


def check_pairs(run: TrainContext) -> None:
    """UserError if an objective needs consecutive frames, and no item of the stage has two."""
    if (run.train.index.shown_frames(run.streaming.image_replication)[run.stage_plan.plan.order] > 1).any():
        return
    name = next(own.name for own in run.training_model.objectives if own.needs.pairs)
    raise UserError(
        f"training.{run.stage}.objective.{name} needs consecutive frames, but no item of the stage's mixture has two. "
        f"Select videos in training.{run.stage}.mixture, raise streaming.image_replication (now "
        f"{run.streaming.image_replication}), or set the weight to 0."
    )


def check_lockstep(run: TrainContext) -> None:
    """UserError if FSDP ranks would deadlock. They run in lockstep, so all need the same number of micro-batches, with
    frames in the same ones."""
    plan, size, world = run.stage_plan.plan, run.micro_batch_size or run.common.batch_size, run.distributed.world_size
    for step in range(plan.num_steps):
        shown = [run.train.index.num_frames[plan.items(step, rank, world)] > 0 for rank in range(world)]
        pieces = [[bool(own[at : at + size].any()) for at in range(0, len(own), size)] for own in shown]
        if any(own != pieces[0] for own in pieces):
            raise UserError(
                f"step {step + 1} of {run.stage}: FSDP ranks run in lockstep, so all {world} ranks need frames in the "
                f"same micro-batches (of {size} samples), but which of theirs contain frames differs: {pieces}. Raise "
                "training.common.batch_size or micro_batch_size, set text_share to 0, or set sharding to ddp."
            )


def choose_micro_batch_size(run: TrainContext) -> int | None:
    """Samples per forward pass: the configured number, or None for the whole batch. `auto` finds how many of the
    stage's largest samples fit into every GPU's memory beside gradients and optimizer state (`reserve_state`).

    Every rank tries it with the unsharded model, so with FSDP more may fit than is found.
    """
    wanted = run.common.micro_batch_size
    if wanted != "auto":
        return wanted
    if run.device == "cpu":
        return None
    share = -(-int(np.diff(run.stage_plan.plan.starts).max()) // run.distributed.world_size)
    patches = (run.train.image_size // run.model.config.vision_config.patch_size) ** 2
    places = run.train.index.num_tokens + run.train.index.shown_frames(run.streaming.image_replication) * patches
    read = np.unique(run.stage_plan.plan.order)
    largest = read[np.argsort(-places[read], kind="stable")].tolist()

    def try_size(size: int) -> None:
        if items := readable(run.train, largest, size):  # without any, the first step stops the run
            try_micro_batch(run, run.loader.collate(items), accumulates=size < share)

    size = run.distributed.smallest(checks.find_micro_batch_size(share, try_size))
    announce(run, [f"{run.stage}: micro-batches of {size} samples fit into the memory of {run.device}"])
    return size


def readable(dataset: TokenizedShards, numbers: list[int], count: int) -> list[dict]:
    """The first `count` items among `numbers` whose frames can be read."""
    items = []
    for number in numbers:
        if len(items) == count:
            break
        with suppress(UnreadableSample):
            items.append(dataset[number])
    return items


def reserve_state(run: TrainContext) -> list[torch.Tensor]:
    """Empty tensors of the size of the optimizer state and, if enabled, the EMA of this rank. With FSDP that is its
    shard."""
    parts = run.distributed.world_size if run.is_sharded else 1
    model = run.training_model
    for_muon = weight_matrices(run.model, model.objective) if run.common.optimizer == "muon" else set()
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    has_average = run.common.ema_decay is not None
    copies = [STATE_COPIES["muon" if id(parameter) in for_muon else "adamw"] + has_average for parameter in trained]
    return [p.new_empty(count * -(-p.numel() // parts)) for p, count in zip(trained, copies, strict=True)]


def try_micro_batch(run: TrainContext, batch: Batch, accumulates: bool) -> None:
    """Runs forward and backward with the memory of `reserve_state` allocated, and also that of all gradients if the
    step `accumulates` micro-batches or DDP reduces gradients in buckets; then allocates what Muon works with."""
    model, kept = run.training_model.train(), reserve_state(run)
    if accumulates or (run.distributed.world_size > 1 and not run.is_sharded):
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.grad = torch.zeros_like(parameter)
    try:
        with torch.autocast(run.device.split(":")[0], torch.bfloat16, enabled=run.common.precision == "bf16"):
            plans = run.model.config.num_passes + 1
            model(batch.to(run.device), plans, model.counts(batch), run.reference)[0].backward()
        if run.common.optimizer == "muon":
            trained = weight_matrices(run.model, model.objective)
            shapes = [p.shape for p in model.parameters() if id(p) in trained and p.requires_grad]
            torch.empty(stack_memory(shapes), dtype=torch.uint8, device=run.device)
    finally:
        model.zero_grad(set_to_none=True)
        del kept


def train_step(run: TrainContext, state: TrainState, batch: Batch, step: int) -> dict:
    """One optimizer step; returns its row of the metrics table. The loop reads the row one step later instead."""
    return read_step(run, launch_step(run, state, batch, step))


def launch_step(run: TrainContext, state: TrainState, batch: Batch, step: int) -> LaunchedStep:
    """Starts one optimizer step without waiting for the device. If the loss or the gradient norm is not finite, the
    device leaves the weights and the optimizer's state as they are, and `read_step` stops the run."""
    rates = set_learning_rates(run, state.optimizer, step)
    state.wrapped.train()
    has_second_pass = run.generator(step).random() < run.settings.objective.second_pass_probability
    num_plans = run.model.config.num_passes + int(has_second_pass)
    torch.manual_seed(int(run.generator(step, 1).integers(2**63)))  # for random queries and sampled attention
    state.optimizer.zero_grad()
    batch = run.training_model.prepare(batch, run.generator(step, 2))
    sums, totals = accumulate(run, state, batch, num_plans, run.stage_plan.plan.step_weight(step))
    parameters = [p for group in state.optimizer.param_groups for p in group["params"]]
    norms = group_norms(state.optimizer) if run.is_recorded(step) or run.is_logged(step) else {}
    norm = checkpoint_io.full_tensor(clip_grad_norm_(parameters, run.common.clip_norm))
    losses = all_reduce_losses(run, sums)
    is_finite = torch.isfinite(losses["loss"]) & torch.isfinite(norm)
    state.optimizer.step(is_finite)
    if state.ema is not None:
        state.ema.update(is_finite)
    numbers = losses | {"grad_norm": norm, **norms}
    values, done = to_host(torch.stack([value.double() for value in numbers.values()]))
    row = {
        "event": "train",
        "step": step + 1,
        "samples": run.loader.samples_seen(step + 1),
        "tokens": int(totals["tokens"]),
    }
    row |= dict.fromkeys(numbers) | {"num_plans": num_plans, **rates}
    flops = run.step_flops.of_batch(batch, num_plans) if run.logger.peak else 0.0
    return LaunchedStep(step, batch, row, list(numbers), values, done, totals, flops)


def to_host(values: torch.Tensor) -> tuple[torch.Tensor, torch.cuda.Event | None]:
    """(copy on the CPU, event after which it is complete), without waiting for it."""
    if not values.is_cuda:
        return values, None
    copy, done = torch.empty_like(values, device="cpu", pin_memory=True), torch.cuda.Event()
    copy.copy_(values, non_blocking=True)
    done.record()
    return copy, done


def read_step(run: TrainContext, launched: LaunchedStep) -> dict:
    """The row of the metrics table of a step, once its work is done; logs it.

    UserError if the loss or the gradient norm is not finite.
    """
    if launched.done is not None:
        launched.done.synchronize()
    numbers = dict(zip(launched.names, launched.values.tolist(), strict=True))
    losses = (numbers["loss"], numbers["grad_norm"])
    checks.check_finite(run.stage, launched.step, *losses, launched.batch, run.folder, run.distributed.rank)
    row = launched.row | numbers
    if run.distributed.world_size > 1:  # a term that no rank has is NaN
        row = {name: value for name, value in row.items() if value == value}
    sizes = {"num_samples": int(launched.counts["samples"]), "num_positions": int(launched.counts["positions"])}
    run.logger.step(row, run.is_logged(launched.step), **sizes, flops=launched.flops)
    return row


def finish_step(run: TrainContext, state: TrainState) -> None:
    """Reads the launched step, if there is one, and records it."""
    launched, state.launched = state.launched, None
    if launched is None:
        return
    row = read_step(run, launched)
    if run.is_recorded(launched.step):
        run.history.append(row)


def accumulate(
    run: TrainContext, state: TrainState, batch: Batch, num_plans: int, weight: float
) -> tuple[dict[str, torch.Tensor], dict[str, float]]:
    """Accumulates the gradients of the step's loss, times `weight`, over this rank's micro-batches.

    Returns (this rank's share of "loss" and of every term present, whose sums over the ranks are the step's values;
    `TrainingModel.counts` of the whole step). Weights are cast to the compute dtype once for all micro-batches.
    """
    model, device = run.training_model, run.device
    own = model.counts(batch)
    totals = dict(zip(own, run.distributed.sum(*own.values()), strict=True))
    pieces = list(batch.split(run.micro_batch_size))
    precision = {"device_type": device.split(":")[0], "dtype": torch.bfloat16}
    sums: dict[str, torch.Tensor] = {}
    with torch.autocast(**precision, enabled=run.common.precision == "bf16"):
        for number, piece in enumerate(pieces):
            with without_sync(state.wrapped, number == len(pieces) - 1):
                loss, values = state.wrapped(piece.to(device), num_plans, totals, run.reference)
                with torch.autocast(**precision, enabled=False):
                    # DDP and FSDP average gradients over the ranks, but the shares of the loss add up
                    (loss * (run.distributed.world_size * weight)).backward()
            for name, value in {"loss": loss.detach(), **values}.items():
                sums[name] = sums[name] + value if name in sums else value
    return sums, totals


def all_reduce_losses(run: TrainContext, sums: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The step's loss and terms, summed over the ranks.

    With several ranks all terms are there, NaN where no rank has the term: a rank with text-only samples lacks the
    terms of attention, but every rank must reduce the same number of values.
    """
    if run.distributed.world_size == 1:
        return sums
    names = ("loss", *run.training_model.term_names)
    nothing = torch.zeros_like(sums["loss"])
    values = torch.stack(
        [sums.get(name, nothing) for name in names] + [nothing + (name in sums) for name in names]
    ).double()
    run.distributed.add_up(values)
    values, there = values.chunk(2)
    return dict(zip(names, torch.where(there > 0, values, torch.nan).unbind(), strict=True))


def set_learning_rates(run: TrainContext, optimizer: Optimizer, step: int) -> dict[str, float]:
    """Sets the learning rate of every group; returns them as columns of the metrics table."""
    for group in optimizer.param_groups:
        group["lr"] = learning_rate(step, run.num_steps, group["peak"], group["name"], run.settings)
    return {f"lr_{group['name']}": group["lr"] for group in optimizer.param_groups}


def group_norms(optimizer: Optimizer) -> dict[str, torch.Tensor]:
    """Gradient norm of every learning-rate group, before clipping."""
    norms = {}
    for name in GROUPS:
        own = [p.grad for g in optimizer.param_groups if g["name"] == name for p in g["params"] if p.grad is not None]
        if own:
            norms[f"grad_norm_{name}"] = checkpoint_io.full_tensor(get_total_norm(own))
    return norms


def after_step(run: TrainContext, state: TrainState, done: int) -> None:
    """Validates, logs attention maps and saves the state when due, always after the last step: the final validation
    can take long. Exits if SIGTERM was received."""
    last = done == run.num_steps
    every, saves = run.runtime.heatmaps_every, done % run.runtime.checkpoint_every == 0
    validates, draws = done % run.common.validate_every == 0 and not last, every and (done % every == 0 or last)
    stop = is_stopping(run)
    if last or saves or stop or validates or draws:
        finish_step(run, state)  # before anything of it is saved or shown
    if validates:
        with averaged(state):
            rows = validate(run, done)
        run.history += rows
        run.logger.rows(rows)
        save_if_best(run, state, rows)
        warn_on_plateau(run, done)
    if draws:
        with averaged(state):
            log_attention_maps(run, done)
    if saves or stop or last:
        save_state(run, state, done)
    if stop:
        stop_after(run, done)


def is_stopping(run: TrainContext) -> bool:
    """Whether any process has received SIGTERM. Every rank must call this."""
    return run.distributed.sum(run.stop_requested)[0] > 0


def stop_after(run: TrainContext, step: int) -> NoReturn:
    """Exits after the step whose state was saved."""
    message = f"{run.stage}: stopped by SIGTERM after step {step}. Run the same command to resume ({run.folder})."
    announce(run, [message])
    raise SystemExit(SIGTERM_EXIT_CODE)


def warn_on_plateau(run: TrainContext, step: int) -> None:
    """Prints a line and adds a row to the metrics table if the run is on a plateau with a known cause."""
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
def stop_on_sigterm(run: TrainContext):
    """Inside the block SIGTERM, which clusters send before preemption, finishes the step and saves the state. After it
    the signal ends the process: the state of the last step is saved."""

    def request(*_):
        run.stop_requested = True

    before = signal.signal(signal.SIGTERM, request)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
