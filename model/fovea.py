"""A fovea: frames are encoded at low resolution, and where a query looks also a window of full-resolution patches.

A low-resolution patch covers r x r patches of the frame (r = `frame_downsampling`). The window is a square of
`fovea_size` x `fovea_size` patches of the frame, centred on the low-resolution patch with the most attention. It is the
peak and not the mean of the attention, because the mean of two objects lies between them. The index has no gradient:
the query attends to the low-resolution patches again, together with the window, which trains where it looks.

Shapes: F frames, N patches of the frame, M = N / r^2 patches at low resolution, W patches of the window, K queries,
H heads, L layers.
"""

import math

import torch
from torch import Tensor
from torch.nn import functional as F


def downsample(pixel_values: Tensor, factor: int, patch_size: int) -> Tensor:
    """Frames [F, 3, side, side] -> [F, 3, side / factor, side / factor], averaged over squares. ValueError if the
    frames are not square or do not divide into whole low-resolution patches."""
    if factor == 1:
        return pixel_values
    height, width = pixel_values.shape[-2:]
    if height != width or height % (factor * patch_size):
        raise ValueError(
            f"the frames have {height} x {width} px. With frame_downsampling={factor} and patches of {patch_size} px "
            f"they must be square with a side that is a multiple of {factor * patch_size}. Resize them, or lower "
            "frame_downsampling"
        )
    return F.avg_pool2d(pixel_values, factor)


def allowed_at_low_resolution(allowed: Tensor, factor: int) -> Tensor:
    """Positions that a query may attend to, bool [F, N + 1] -> [F, M + 1]: patches of which any part is allowed."""
    if factor == 1:
        return allowed
    side = math.isqrt(allowed.shape[1] - 1) // factor
    blocks = allowed[:, 1:].unflatten(1, (side, factor, side, factor))
    return torch.cat([allowed[:, :1], blocks.any(4).any(2).flatten(1)], dim=1)


def window_around_peak(attention: Tensor, factor: int, size: int) -> Tensor:
    """Attention weights of the queries [F, H, K, M + 1] -> indices of the window's patches in the frame: int64 [F, W].

    The window is moved inwards where it would leave the frame. ValueError if it is larger than the frame.
    """
    low_side = math.isqrt(attention.shape[-1] - 1)
    side = low_side * factor
    if size > side:
        raise ValueError(f"fovea_size={size} exceeds the {side} x {side} patches of a frame. Lower it")
    peak = attention[..., 1:].mean((1, 2)).argmax(1)  # [F], without the class token
    corner = torch.stack([peak // low_side, peak % low_side], dim=1) * factor + (factor - size) // 2
    corner = corner.clamp(0, side - size)  # [F, 2] row and column
    steps = torch.arange(size, device=attention.device)
    rows, columns = (corner[:, axis, None] + steps for axis in (0, 1))  # [F, size]
    return (rows[:, :, None] * side + columns[:, None]).flatten(1)


def on_full_grid(attention: Tensor, factor: int, window: Tensor | None = None) -> Tensor:
    """Attention weights at the positions of a fovea [L, F, H, K, M + 1 (+ W)] -> [L, F, H, K, N + 1].

    The weight of a low-resolution patch is shared equally by the patches of the frame that it covers; window [F, W]
    says where the others go.
    """
    if factor == 1:
        return attention
    num_window = 0 if window is None else window.shape[1]
    low_side = math.isqrt(attention.shape[-1] - num_window - 1)
    class_token, low, high = attention.split([1, low_side**2, num_window], dim=-1)
    low = low.unflatten(-1, (low_side, low_side)) / factor**2
    grid = low.repeat_interleave(factor, -1).repeat_interleave(factor, -2).flatten(-2)  # [L, F, H, K, N]
    if window is not None:
        grid = grid.scatter_add(-1, window[None, :, None, None].expand_as(high), high)
    return torch.cat([class_token, grid], dim=-1)
