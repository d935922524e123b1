"""The optimizer of a training stage: AdamW alone, or Muon for the weight matrices and AdamW for the rest.

Muon (Jordan et al. 2024, "Muon: An optimizer for hidden layers in neural networks") replaces the momentum of a weight
matrix by the nearest semi-orthogonal matrix, so that all singular values of the update are equal. The update of a
matrix [m, n] is scaled by 0.2 sqrt(max(m, n)), which matches the root mean square of AdamW's updates (Liu et al. 2025,
"Muon is Scalable for LLM Training", `match_rms_adamw`). Both optimizers can therefore share learning rates and weight
decay.
"""

import math
from collections import Counter

import torch
from torch import nn
from torch.distributed.tensor import DTensor, Replicate

from pipeline_steps.training import checkpoint_io

STATE_COPIES = {"adamw": 2, "muon": 1}  # state numbers per trained weight
MOMENTUM = 0.95  # of Muon, with Nesterov momentum
STACKED = 2**26  # elements of the matrices that are orthogonalized together


class Muon(torch.optim.Muon):
    """torch's Muon, which updates all matrices of one shape together, and extended to sharded matrices (FSDP2).

    Matrices of one shape are stacked, transposed ones included, so a step starts a few operations per shape instead of
    about forty per matrix.

    The momentum of sharded matrices stays sharded. A step gathers one matrix at a time; every rank orthogonalizes the
    whole matrix and applies its own shard, so the update equals that of a single process. Cost per step and rank: one
    fp32 all-gather of every matrix, the full orthogonalization (about 20 m^2 n floating-point operations for m <= n;
    the same as with DDP), and three times the memory of the largest matrix. torch's own step also accepts sharded
    matrices, but it reduces bfloat16 products in every iteration, which changes the learning curve.
    """

    def __init__(self, groups: list[dict]):
        super().__init__(groups, lr=0.0, momentum=MOMENTUM, nesterov=True, adjust_lr_fn="match_rms_adamw")
        self.is_finite: torch.Tensor | None = None  # 0-dim bool: whether to update at all; None: yes

    @torch.no_grad()
    def step(self, closure=None):
        if closure is not None:
            raise NotImplementedError("Muon does not support a closure")
        for group in self.param_groups:
            stacks: dict[tuple, list[nn.Parameter]] = {}
            for parameter in group["params"]:
                if isinstance(parameter, DTensor) and parameter.grad is not None:
                    self._step_sharded(parameter, group)
                elif parameter.grad is not None:
                    stacks.setdefault(tuple(sorted(parameter.shape)), []).append(parameter)
            for shape, parameters in stacks.items():
                size = stack_size(shape)
                for start in range(0, len(parameters), size):
                    self._step_stacked(parameters[start : start + size], group)

    def _step_stacked(self, parameters: list[nn.Parameter], group: dict) -> None:
        """The step of matrices of one shape [m, n] or [n, m], m <= n."""
        for parameter in parameters:
            if "momentum_buffer" not in self.state[parameter]:
                self.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)
        wide = [wide_matrix(parameter.detach()) for parameter in parameters]
        held = [wide_matrix(self.state[parameter]["momentum_buffer"]) for parameter in parameters]
        gradient = torch.stack([wide_matrix(parameter.grad) for parameter in parameters])
        momentum = torch.stack(held)
        rate, decay = -group["lr"] * 0.2 * wide[0].shape[1] ** 0.5, group["lr"] * group["weight_decay"]
        if self.is_finite is not None:  # else leaves momentum and weights as they are: adds zeros
            gradient = torch.where(self.is_finite, gradient, momentum)
            rate, decay = self.is_finite * rate, self.is_finite * decay
        momentum.lerp_(gradient, 1 - group["momentum"])
        torch._foreach_copy_(held, list(momentum.unbind()))
        change = orthogonalize(gradient.lerp_(momentum, group["momentum"]), group).to(wide[0].dtype)
        torch._foreach_mul_(wide, 1 - decay)
        torch._foreach_add_(wide, list((change * rate).unbind()))

    def _step_sharded(self, parameter: DTensor, group: dict) -> None:
        gradient, momentum = parameter.grad, self.state[parameter].get("momentum_buffer")
        if momentum is None:
            momentum = self.state[parameter]["momentum_buffer"] = torch.zeros_like(gradient)
        if self.is_finite is not None and not self.is_finite:  # collectives wait for the host anyway
            return
        momentum.lerp_(gradient, 1 - group["momentum"])
        whole = gradient.lerp(momentum, group["momentum"]).full_tensor()
        change = orthogonalize(whole[None], group)[0].to(parameter.dtype) * (
            -group["lr"] * 0.2 * max(whole.shape) ** 0.5
        )
        mesh, placements = parameter.device_mesh, parameter.placements
        replicated = DTensor.from_local(change, mesh, [Replicate()] * mesh.ndim, run_check=False)
        parameter.mul_(1 - group["lr"] * group["weight_decay"])
        parameter.add_(replicated.redistribute(placements=placements))


def wide_matrix(matrix: torch.Tensor) -> torch.Tensor:
    """The matrix or its transpose, with at least as many columns as rows."""
    return matrix.t() if matrix.shape[0] > matrix.shape[1] else matrix


def stack_size(shape: tuple[int, ...]) -> int:
    """How many matrices of this shape are orthogonalized together."""
    return max(1, STACKED // math.prod(shape))


def stack_memory(shapes: list[tuple[int, ...]]) -> int:
    """Bytes of device memory that orthogonalization works with at most: of every number of a stack two copies in fp32
    (gradient and momentum) and three in bfloat16 (the matrices, their next iterate, a product)."""
    numbers = Counter(tuple(sorted(shape)) for shape in shapes)
    return max((14 * math.prod(shape) * min(count, stack_size(shape)) for shape, count in numbers.items()), default=0)


def orthogonalize(matrices: torch.Tensor, group: dict) -> torch.Tensor:
    """Matrices near the semi-orthogonal ones of [k, m, n], by Newton-Schulz iterations (Jordan et al. 2024), in
    `iteration_dtype`. group: has ns_coefficients, ns_steps and eps."""
    a, b, c = group["ns_coefficients"]
    is_tall = matrices.shape[1] > matrices.shape[2]
    found = matrices.to(iteration_dtype(matrices.device))
    found = found.mT if is_tall else found
    found = found / torch.linalg.matrix_norm(found, keepdim=True).clamp(min=group["eps"])
    for _ in range(group["ns_steps"]):
        gram = found @ found.mT
        gram = torch.baddbmm(gram, gram, gram, beta=b, alpha=c)
        found = torch.baddbmm(found, gram, found, beta=a)
    return found.mT if is_tall else found


def iteration_dtype(device: torch.device) -> torch.dtype:
    """bfloat16, as in torch's own Muon, but float32 on a CPU: without bfloat16 instructions, which most CPUs lack,
    the products of the iterations take ten times as long as in float32."""
    return torch.float32 if device.type == "cpu" else torch.bfloat16


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

    def step(self, is_finite: torch.Tensor | None = None) -> None:
        """Updates the weights. is_finite: 0-dim bool, False leaves weights and state as they are; nothing waits for it
        (None: update)."""
        for part in self.parts:
            if isinstance(part, Muon):
                part.is_finite = is_finite
            else:
                part.found_inf = None if is_finite is None else (~is_finite).float()
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
