"""Weights of several linear layers joined into one, so that a forward pass starts fewer and larger operations.

Joining is part of the graph: gradients reach the separate parameters, whose names and values do not change. Where a
module does more than multiply (hooks, adapters, quantized or sharded weights, compiled layers), and where checkpointing
saves memory, layers run module by module instead.
"""

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn

AT_ONCE = 2**26  # elements of the weights that one operation joins


def is_plain(layer: nn.Module, kind: type) -> bool:
    """Whether a layer of this class may be computed from its weights, without calling its modules."""
    if type(layer) is not kind or "forward" in vars(layer):  # sharded; compiled or offloaded
        return False
    for module in layer.modules():
        own = vars(module)
        if own["_forward_hooks"] or own["_forward_pre_hooks"] or own["_backward_hooks"] or "_hf_hook" in own:
            return False
        if "in_features" in own and (type(module) is not nn.Linear or type(module.weight) is not nn.Parameter):
            return False
    return True


def join(layers: Iterable[Sequence[Tensor]]) -> list[Tensor]:
    """For each layer the concatenation of its tensors along their first axis, in the dtype of autocast. The tensors of
    a layer have the shapes of the other layers'. One operation joins AT_ONCE elements, so that gradients of a large
    model do not wait for all of its layers."""
    layers = list(layers)
    size = max(1, AT_ONCE // max(1, sum(tensor.numel() for tensor in layers[0])))
    found = []
    for start in range(0, len(layers), size):
        some = layers[start : start + size]
        joined = in_compute_dtype(torch.cat([tensor for own in some for tensor in own]))
        found += joined.unflatten(0, (len(some), -1)).unbind()
    return found


def in_compute_dtypes(tensors: Sequence[Tensor]) -> Sequence[Tensor]:
    """Tensors of one shape in the dtype of autocast, by one cast for many of them."""
    return join([tensor] for tensor in tensors) if torch.is_autocast_enabled(tensors[0].device.type) else tensors


def in_compute_dtype(values: Tensor) -> Tensor:
    """values in the dtype in which autocast multiplies: cast once for all linear layers that read them."""
    device = values.device.type
    return values.to(torch.get_autocast_dtype(device)) if torch.is_autocast_enabled(device) else values


def add_linear(rows: Tensor, inputs: Tensor, weight: Tensor) -> Tensor:
    """rows + linear(inputs) for matrices of rows; rows keep their dtype under autocast."""
    if torch.is_autocast_enabled(rows.device.type):
        return rows + nn.functional.linear(inputs, weight)
    return torch.addmm(rows, inputs, weight.t())
