"""The training loop that both warm-ups share."""

import math
from collections.abc import Callable

import torch

from pipeline_steps.common.errors import UserError
from pipeline_steps.monitoring.progress import progress_bar, show_values

WARMUP_RATIO = 0.1  # share of the steps with linear warm-up, followed by cosine decay to zero
GRADIENT_CLIP = 1.0


def optimise(
    parameters: list[torch.nn.Parameter],
    batch_loss: Callable[[int], torch.Tensor],
    *,
    num_steps: int,
    learning_rate: float,
    precision: str,
    title: str,
) -> float:
    """Minimise `batch_loss(step)` (a scalar tensor) with AdamW. Returns the last loss.

    precision: bf16 computes the loss under autocast. The loss is read one step later, so that a GPU does not wait for
    the host. Raises UserError on a non-finite loss.
    """
    options = {"betas": (0.9, 0.98), "weight_decay": 0.01, "fused": True}
    optimizer = torch.optim.AdamW(parameters, lr=learning_rate, **options)
    device, before = parameters[0].device.type, None
    num_warm_up = max(1, round(WARMUP_RATIO * num_steps))

    def schedule(step: int) -> float:
        if step < num_warm_up:
            return (step + 1) / num_warm_up
        return 0.5 * (1 + math.cos(math.pi * (step - num_warm_up) / max(1, num_steps - num_warm_up)))

    def check_loss(loss: torch.Tensor, step: int) -> float:
        value = loss.item()
        if not math.isfinite(value):
            raise UserError(
                f"{title}: the loss is {value} at step {step} of {num_steps}. Lower the learning rate "
                f"(now {learning_rate}) in section backbones of params.yaml."
            )
        return value

    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, schedule)
    progress = progress_bar(title, range(num_steps), unit="step")
    for step in progress:
        with torch.autocast(device, torch.bfloat16, enabled=precision == "bf16"):
            loss = batch_loss(step)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, GRADIENT_CLIP)
        optimizer.step()
        scheduler.step()
        if before is not None:
            show_values(progress, loss=check_loss(before, step - 1))
        before = loss.detach()
    return check_loss(before, num_steps - 1)
