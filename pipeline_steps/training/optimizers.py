"""The optimizer of a training stage: AdamW alone, or Muon for the weight matrices and AdamW for the rest.

Muon (Jordan et al. 2024, "Muon: An optimizer for hidden layers in neural networks") replaces the momentum of a weight
matrix by the nearest semi-orthogonal matrix, so every direction of its input changes its output alike. The update of a
matrix [m, n] is scaled by 0.2 sqrt(max(m, n)) to the root mean square of AdamW's (Liu et al. 2025, "Muon is Scalable
for LLM Training", `match_rms_adamw`): both optimizers take the same learning rates and weight decay.
"""

import torch
from torch import nn
from torch.distributed.tensor import DTensor, Replicate

from pipeline_steps.training import checkpoint_io

STATE_COPIES = {"adamw": 2, "muon": 1}  # numbers kept of every trained weight
MOMENTUM = 0.95  # of Muon, with Nesterov's step


class Muon(torch.optim.Muon):
    """torch's Muon, also for matrices that are divided among processes (FSDP2).

    The momentum of a divided matrix stays divided. A step puts together one matrix at a time, which every process then
    orthogonalizes, and of which it applies its own part: the update is that of one process. Cost per step and process:
    one all-gather of every matrix in fp32, the whole orthogonalization (about 20 m^2 n floating-point operations for
    m <= n) where DDP does the same, and the memory of the largest matrix three times. (torch's own step runs on divided
    matrices too, but exchanges and adds bfloat16 products in every iteration, which moves the curve.)
    """

    def __init__(self, groups: list[dict]):
        super().__init__(groups, lr=0.0, momentum=MOMENTUM, nesterov=True, adjust_lr_fn="match_rms_adamw")

    @torch.no_grad()
    def step(self, closure=None):
        shard_like = [
            (parameter, group)
            for group in self.param_groups
            for parameter in group["params"]
            if isinstance(parameter, DTensor) and parameter.grad is not None
        ]
        if not shard_like:
            return super().step(closure)
        if closure is not None:
            raise NotImplementedError("Muon takes no closure for matrices that are divided among processes")
        for parameter, group in shard_like:
            self._step_divided(parameter, group)
        return None

    def _step_divided(self, parameter: DTensor, group: dict) -> None:
        gradient, momentum = parameter.grad, self.state[parameter].get("momentum_buffer")
        if momentum is None:
            momentum = self.state[parameter]["momentum_buffer"] = torch.zeros_like(gradient)
        momentum.lerp_(gradient, 1 - group["momentum"])
        change = nn.Parameter(torch.zeros(parameter.shape, device=parameter.device, dtype=parameter.dtype))
        change.grad = gradient.lerp(momentum, group["momentum"]).full_tensor()
        options = {name: group[name] for name in ("lr", "ns_coefficients", "eps", "ns_steps", "adjust_lr_fn")}
        torch.optim.Muon([change], weight_decay=0.0, momentum=0.0, **options).step()
        mesh, placements = parameter.device_mesh, parameter.placements
        full_tensor = DTensor.from_local(change.detach(), mesh, [Replicate()] * mesh.ndim, run_check=False)
        parameter.mul_(1 - group["lr"] * group["weight_decay"])
        parameter.add_(full_tensor.redistribute(placements=placements))


class Optimizer:
    """The optimizers of all parameter groups as one: each group goes to the one that its key `optimizer` names."""

    def __init__(self, groups: list[dict], betas: tuple[float, float]):
        """groups: of `trainable_parameters`. betas: AdamW's. The learning rates are 0 until they are set."""
        of = {name: [group for group in groups if group["optimizer"] == name] for name in ("adamw", "muon")}
        self.parts: list[torch.optim.Optimizer] = []
        if of["muon"]:
            self.parts.append(Muon(of["muon"]))
        if of["adamw"]:
            self.parts.append(torch.optim.AdamW(of["adamw"], lr=0.0, betas=betas, fused=True))

    @property
    def param_groups(self) -> list[dict]:
        """The groups themselves: a learning rate set in one holds for the next step."""
        return [group for part in self.parts for group in part.param_groups]

    def zero_grad(self) -> None:
        for part in self.parts:
            part.zero_grad(set_to_none=True)

    def step(self) -> None:
        for part in self.parts:
            part.step()

    def tensors(self, names: dict[int, str]) -> dict[str, torch.Tensor]:
        """{"<parameter name>/<what>": whole tensor} of the state. names: {id(parameter): name}. Every process of a
        divided network has to call it."""
        return {
            key: value for part in self.parts for key, value in checkpoint_io.optimizer_tensors(part, names).items()
        }

    def restore(self, tensors: dict[str, torch.Tensor], names: dict[int, str]) -> None:
        """Puts what `tensors` gave back, by parameter name."""
        for part in self.parts:
            checkpoint_io.restore_optimizer(part, tensors, names)
