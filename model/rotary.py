"""Rotary position embedding (Su et al. 2021, "RoFormer") in the library's layout, as three operations.

The library computes x cos + [-x2, x1] sin for the halves x = [x1, x2]. That is x cos + [x2, x1] [-sin, sin], so the
sign goes into the sine once per pass instead of into every layer.
"""

import torch
from torch import Tensor, nn


def rotary_angles(rotary_embedding: nn.Module, like: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
    """(cosine, signed sine) [n, C] at int64 positions [n]. like: a tensor of the device and dtype wanted."""
    cos, sin = rotary_embedding(like, positions[None])
    sign = torch.ones_like(sin[0, 0])
    sign[: len(sign) // 2].neg_()
    return cos[0], sin[0] * sign


def rotate(heads: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """heads [..., C] turned by `rotary_angles`, which broadcast."""
    return torch.addcmul(heads * cos, heads.roll(heads.shape[-1] // 2, -1), sin)


def rotate_(heads: Tensor, cos: Tensor, sin: Tensor, sign: int = 1) -> Tensor:
    """`rotate` in place. sign -1 turns back, which is also the gradient of turning."""
    swapped = heads.roll(heads.shape[-1] // 2, -1)
    return heads.mul_(cos).addcmul_(swapped, sin, value=sign)
