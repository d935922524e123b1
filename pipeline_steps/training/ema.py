"""Exponential moving average (EMA) of the trained weights. If enabled, it is what is validated and published."""

from contextlib import contextmanager

import torch
from torch import nn

from pipeline_steps.training.checkpoint_io import shard_like


class EMA:
    """EMA of a model's trainable parameters: each update sets average = decay * average + (1 - decay) * weights."""

    def __init__(self, model: nn.Module, decay: float):
        self.parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
        self.values = {name: p.detach().clone() for name, p in self.parameters.items()}
        self.decay = decay

    @torch.no_grad()
    def update(self, is_finite: torch.Tensor | None = None) -> None:
        """Call after every optimizer step. is_finite: 0-dim bool, False (a skipped step) leaves the averages as they
        are; nothing waits for it (None: update)."""
        values, weight = list(self.values.values()), 1 - self.decay
        changes = torch._foreach_sub([p.detach() for p in self.parameters.values()], values)
        torch._foreach_mul_(changes, weight if is_finite is None else is_finite * weight)
        torch._foreach_add_(values, changes)

    def load(self, values: dict[str, torch.Tensor]) -> None:
        """Loads the averages of a saved state."""
        for name, value in values.items():
            self.values[name].copy_(shard_like(value, self.parameters[name]))

    @contextmanager
    def in_place(self):
        """Inside the block the model has the averaged weights; afterwards it has its own again."""
        self._swap()
        try:
            yield
        finally:
            self._swap()

    @torch.no_grad()
    def _swap(self) -> None:
        for name, parameter in self.parameters.items():
            own = parameter.detach().clone()
            parameter.copy_(self.values[name])
            self.values[name].copy_(own)
