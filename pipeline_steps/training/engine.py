"""The training loop of all stages.

Everything random is a function of (seed, stage, step), so the state of a run is its step, weights and optimizer; a run
that is killed anywhere and started again ends with the same weights, bit by bit (CPU, same number of threads).
"""

from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from torch.nn.utils import clip_grad_norm_
from tqdm import tqdm

from pipeline_steps.params import UserError
from pipeline_steps.streaming.collate import Collator
from pipeline_steps.streaming.dataset import TokenizedShards
from pipeline_steps.streaming.loader import Loader, StagePlan, plan_stage
from pipeline_steps.training.parameters import trainable_parameters
from pipeline_steps.training.schedule import learning_rate_factor
from pipeline_steps.training.state import load_state, save_state

EXTRA_LOSSES = ("loss_coarse", "loss_entropy", "loss_contrastive")  # of the configuration's lambdas
TENSORS = ("input_ids", "attention_mask", "pixel_values", "num_frames", "labels", "target_patches")


@dataclass
class Run:
    """One stage: what is trained, on what, and how far it is."""

    stage: str
    model: torch.nn.Module
    train: TokenizedShards
    validation: TokenizedShards
    seed: int
    common: object  # training.common
    settings: object  # training.<stage>
    streaming: object
    folder: Path  # scratch, for the state
    device: str = "cpu"
    history: list[dict] = field(default_factory=list)  # rows of the metrics table

    @cached_property
    def served(self) -> StagePlan:
        """Which items, in which batches. UserError where the data lack them."""
        return plan_stage(
            self.train,
            self.settings,
            self.streaming,
            stage=self.stage,
            seed=self.seed,
            batch_size=self.common.batch_size,
            tokens_per_frame=self.model.config.tokens_per_frame,
        )

    @cached_property
    def loader(self) -> Loader:
        collate = Collator.for_model(
            self.model.config, loss=self.settings.loss, image_replication=self.streaming.image_replication
        )
        return Loader(self.train, self.served, collate, self.streaming)

    @property
    def num_steps(self) -> int:
        return self.loader.num_steps

    def generator(self, *names: int) -> np.random.Generator:
        return np.random.default_rng([self.seed, int(self.stage[-1]), *names])


def train(run: Run) -> dict:
    """Train to the end of the sample budget, from the saved state if there is one. Returns the final validation
    result."""
    optimizer = make_optimizer(run)
    first = restore(run, optimizer)
    progress = tqdm(
        run.loader, desc=run.stage, total=run.num_steps, initial=first, unit="step", mininterval=1.0, dynamic_ncols=True
    )
    for step, batch in enumerate(progress, start=first):
        row = train_step(run, optimizer, batch, step)
        if step % 10 == 0 or step == run.num_steps - 1:
            run.history.append(row)
            progress.set_postfix(loss=f"{row['loss']:.3f}")
        done = step + 1
        if done % run.common.validate_every == 0 and done < run.num_steps:
            run.history += validate(run, done)
        if done % run.common.checkpoint_every == 0 and done < run.num_steps:
            save_state(
                run.folder,
                {
                    "loader": run.loader.state_dict(),
                    "model": run.model.state_dict(),
                    "optimizer": optimizer.state_dict(),
                    "history": run.history,
                },
            )
    final = validate(run, run.num_steps, modes=("fine", "autoregressive"))
    run.history += final
    return {
        "validation": final,
        "mixture": run.served.mixture.statistics(),
        "unserved": run.served.groups.unserved,
        "quarantined": run.loader.quarantined,
    }


def train_step(run: Run, optimizer: torch.optim.Optimizer, batch: dict, step: int) -> dict:
    """One optimizer step; returns its row of the metrics table."""
    model, config = run.model.train(), run.model.config
    factor = learning_rate_factor(step, run.num_steps, run.settings.warmup_share, run.settings.final_learning_rate)
    for group in optimizer.param_groups:
        group["lr"] = factor * group["peak"]
    num_plans = config.num_passes + int(run.generator(step).random() < config.second_pass_probability)
    torch.manual_seed(int(run.generator(step, 1).integers(2**63)))  # random queries, sampled attention
    with torch.autocast(run.device, torch.bfloat16, enabled=run.common.precision == "bf16"):
        output = model(
            **to_device(batch, run.device), mode="coarse" if config.coarse_only else "fine", num_plans=num_plans
        )
    optimizer.zero_grad(set_to_none=True)
    output.loss.backward()
    norm = clip_grad_norm_([p for group in optimizer.param_groups for p in group["params"]], run.common.clip_norm)
    loss = output.loss.item()
    if not (np.isfinite(loss) and torch.isfinite(norm)):
        raise UserError(
            f"{run.stage} step {step}: loss {loss}, gradient norm {norm.item()} on samples {', '.join(batch['keys'])}. "
            f"Lower training.{run.stage}.learning_rate or look at these samples; the last state is in {run.folder}."
        )
    optimizer.step()
    rates = {f"lr_{group['name']}": group["lr"] for group in optimizer.param_groups}
    return {
        "event": "train",
        "step": step + 1,
        "samples": run.loader.samples_seen(step + 1),
        "loss": loss,
        **{name: output[name].item() for name in EXTRA_LOSSES if name in output},
        "grad_norm": norm.item(),
        "num_plans": num_plans,
        **rates,
    }


def validate(run: Run, step: int, modes: tuple[str, ...] = ("fine",)) -> list[dict]:
    """Loss per scored token and accuracy of every family, token-weighted: one row per family and mode.

    A family without any scored token (answers of punctuation only) has no row.
    """
    collate = Collator.for_model(
        run.model.config, loss="answer_only", image_replication=run.streaming.image_replication
    )
    rows = []
    for family, numbers in sorted(run.validation.families().items()):
        scored = numbers[run.validation.scored[numbers]]
        items = [run.validation[number] for number in scored[: run.common.max_validation_items].tolist()]
        for mode in modes if items else ():
            loss, correct, tokens = evaluate_loss(run, items, collate, mode)
            rows.append(
                {
                    "event": "validation",
                    "step": step,
                    "family": family,
                    "mode": mode,
                    "loss": loss / tokens,
                    "accuracy": correct / tokens,
                }
            )
    return rows


@torch.no_grad()
def evaluate_loss(run: Run, items: list[dict], collate: Collator, mode: str) -> tuple[float, int, int]:
    """Sum of the losses, number of correct tokens and number of tokens, over the scored tokens of the items."""
    run.model.eval()
    loss = correct = tokens = 0
    for start in range(0, len(items), run.common.batch_size):
        batch = collate(items[start : start + run.common.batch_size])
        scored = batch["score_mask"].to(run.device)
        output = run.model(**to_device(batch, run.device), mode=mode)
        loss += output.token_loss[scored].double().sum().item()
        correct += int(output.correct[scored].sum())
        tokens += int(scored.sum())
    return loss, correct, tokens


def make_optimizer(run: Run) -> torch.optim.AdamW:
    groups, _ = trainable_parameters(run.model, run.settings.learning_rate.model_dump(), run.common.weight_decay)
    return torch.optim.AdamW(groups, lr=0.0, betas=run.common.betas, fused=True)


def restore(run: Run, optimizer: torch.optim.Optimizer) -> int:
    """Put the saved state back, if there is one; returns the step to go on from."""
    state = load_state(run.folder)
    if state is None:
        return 0
    run.model.load_state_dict(state["model"])
    optimizer.load_state_dict(state["optimizer"])
    run.history = state["history"]
    run.loader.load_state_dict(state["loader"])
    print(f"{run.stage}: going on from step {run.loader.step} of {run.num_steps} ({run.folder})")
    return run.loader.step


def to_device(batch: dict, device: str) -> dict:
    return {name: batch[name].to(device, non_blocking=True) for name in TENSORS if name in batch}
