"""Visual tokens of the multi-token baseline: average-pooled patches, 16 (B1) or 49 (B2) per frame, without queries.

Shapes: F frames, N patches, K pooled tokens per frame, D vision width.
"""

from torch import Tensor
from torch.nn import functional as F


def pool_patches(patch_features: Tensor, num_tokens: int) -> Tensor:
    """Patch features with the class token first [F, N + 1, D] -> [F, K, D], averaged over a square grid of K cells.

    Raises ValueError if K is not a square number, the frame has fewer than K patches, or its patch grid is not square.
    """
    side, patches = round(num_tokens**0.5), patch_features[:, 1:]
    grid = round(patches.shape[1] ** 0.5)
    if grid * grid != patches.shape[1]:
        raise ValueError(
            f"the frames have {patches.shape[1]} patches, which is not a square number (nearest: {grid * grid}). "
            "Resize or crop them to squares"
        )
    if side * side != num_tokens or side > grid:
        raise ValueError(
            f"num_visual_tokens_per_frame={num_tokens} must be a square number of at most {grid * grid}, "
            "the number of patches of a frame. Lower it or use larger frames"
        )
    cells = patches.unflatten(1, (grid, grid)).permute(0, 3, 1, 2)  # [F, D, grid, grid]
    return F.adaptive_avg_pool2d(cells, side).flatten(2).transpose(1, 2)
