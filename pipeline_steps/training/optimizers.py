"""The optimizer of a training stage: AdamW alone, or Muon for the weight matrices and AdamW for the rest.

Muon (Jordan et al. 2024, "Muon: An optimizer for hidden layers in neural networks") replaces the momentum of a weight
matrix by the nearest semi-orthogonal matrix, so that all singular values of the update are equal. The update of a
matrix [m, n] is scaled by 0.2 sqrt(max(m, n)), which matches the root mean square of AdamW's updates (Liu et al. 2025,
"Muon is Scalable for LLM Training", `match_rms_adamw`). Both optimizers can therefore share learning rates and weight
decay.
"""

import torch
from torch import nn
from torch.distributed.tensor import DTensor, Replicate

from pipeline_steps.training import checkpoint_io

STATE_COPIES = {"adamw": 2, "muon": 1}  # state numbers per trained weight
MOMENTUM = 0.95  # of Muon, with Nesterov momentum


class Muon(torch.optim.Muon):
    """torch's Muon, extended to sharded matrices (FSDP2).

    The momentum stays sharded. A step gathers one matrix at a time; every rank orthogonalizes the whole matrix and
    applies its own shard, so the update equals that of a single process. Cost per step and rank: one fp32 all-gather
    of every matrix, the full orthogonalization (about 20 m^2 n floating-point operations for m <= n; the same as with
    DDP), and three times the memory of the largest matrix. torch's own step also accepts sharded matrices, but it
    reduces bfloat16 products in every iteration, which changes the learning curve.
    """

    def __init__(self, groups: list[dict]):
        super().__init__(groups, lr=0.0, momentum=MOMENTUM, nesterov=True, adjust_lr_fn="match_rms_adamw")

    @torch.no_grad()
    def step(self, closure=None):
        sharded = [
            (parameter, group)
            for group in self.param_groups
            for parameter in group["params"]
            if isinstance(parameter, DTensor) and parameter.grad is not None
        ]
        if not sharded:
            return super().step(closure)
        if closure is not None:
            raise NotImplementedError("Muon does not support a closure for sharded matrices")
        for parameter, group in sharded:
            self._step_sharded(parameter, group)
        return None

    def _step_sharded(self, parameter: DTensor, group: dict) -> None:
        gradient, momentum = parameter.grad, self.state[parameter].get("momentum_buffer")
        if momentum is None:
            momentum = self.state[parameter]["momentum_buffer"] = torch.zeros_like(gradient)
        momentum.lerp_(gradient, 1 - group["momentum"])
        change = nn.Parameter(torch.zeros(parameter.shape, device=parameter.device, dtype=parameter.dtype))
        change.grad = gradient.lerp(momentum, group["momentum"]).full_tensor()
        options = {name: group[name] for name in ("lr", "ns_coefficients", "eps", "ns_steps", "adjust_lr_fn")}
        torch.optim.Muon([change], weight_decay=0.0, momentum=0.0, **options).step()
        mesh, placements = parameter.device_mesh, parameter.placements
        replicated = DTensor.from_local(change.detach(), mesh, [Replicate()] * mesh.ndim, run_check=False)
        parameter.mul_(1 - group["lr"] * group["weight_decay"])
        parameter.add_(replicated.redistribute(placements=placements))


class Optimizer:
    """All optimizers as one. The key `optimizer` of a parameter group names the optimizer that updates it."""

    def __init__(self, groups: list[dict], betas: tuple[float, float]):
        """groups: from `trainable_parameters`. betas: of AdamW. Learning rates are 0 until the loop sets them."""
        of = {name: [group for group in groups if group["optimizer"] == name] for name in ("adamw", "muon")}
        self.parts: list[torch.optim.Optimizer] = []
        if of["muon"]:
            self.parts.append(Muon(of["muon"]))
        if of["adamw"]:
            self.parts.append(torch.optim.AdamW(of["adamw"], lr=0.0, betas=betas, fused=True))

    @property
    def param_groups(self) -> list[dict]:
        """The groups of all optimizers; set `lr` in them before a step."""
        return [group for part in self.parts for group in part.param_groups]

    def zero_grad(self) -> None:
        for part in self.parts:
            part.zero_grad(set_to_none=True)

    def step(self) -> None:
        for part in self.parts:
            part.step()

    def tensors(self, names: dict[int, str]) -> dict[str, torch.Tensor]:
        """{"<parameter name>/<state name>": full tensor} of the state. names: {id(parameter): name}. With FSDP2 every
        rank must call it."""
        return {
            key: value for part in self.parts for key, value in checkpoint_io.optimizer_tensors(part, names).items()
        }

    def restore(self, tensors: dict[str, torch.Tensor], names: dict[int, str]) -> None:
        """Loads a state from `tensors`, by parameter name."""
        for part in self.parts:
            checkpoint_io.restore_optimizer(part, tensors, names)
