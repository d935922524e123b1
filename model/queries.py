"""Attention of query rows, and replacements of the planned queries.

Shapes: F frames, K query rows per frame, N patches, H heads, C head width, L layers, Q query width.
"""

from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn import functional as F


@dataclass
class QueryAttention:
    """How query rows attend. The default is softmax attention to the whole frame.

    temperature: [L], or [] for one layer; divides the logits. hard: `top_k` keeps the `top_k` largest logits of every
    head; `gumbel` selects one position per head, sampled in training with a straight-through gradient (Jang et al.
    2017, "Categorical Reparameterization with Gumbel-Softmax"), the largest otherwise. allowed: bool [F, N + 1],
    positions that a query may attend to. explicit: mix the values by the weights, instead of a fused kernel that has
    none to return.
    """

    temperature: Tensor | None = None
    hard: str = "none"
    top_k: int = 1
    allowed: Tensor | None = None
    training: bool = False
    explicit: bool = False

    @property
    def is_plain(self) -> bool:
        return self.temperature is None and self.hard == "none" and self.allowed is None and not self.explicit

    def weights(self, queries: Tensor, keys: Tensor) -> Tensor:
        """Attention weights of queries [F, H, K, C] to keys [F, H, N + 1, C]: [F, H, K, N + 1]."""
        logits = queries @ keys.transpose(-1, -2) / keys.shape[-1] ** 0.5
        if self.temperature is not None:
            logits = logits / self.temperature
        if self.allowed is not None:
            logits = logits.masked_fill(~self.allowed[:, None, None], float("-inf"))
        if self.hard == "top_k":
            smallest = logits.topk(min(self.top_k, logits.shape[-1]), dim=-1).values[..., -1:]
            logits = logits.masked_fill(logits < smallest, float("-inf"))
        if self.hard == "gumbel":
            if self.training:
                return F.gumbel_softmax(logits, hard=True, dim=-1)
            return F.one_hot(logits.argmax(-1), logits.shape[-1]).to(logits.dtype)
        return logits.softmax(dim=-1)

    def of_layer(self, index: int) -> "QueryAttention":
        """The same with the temperature of one layer."""
        return self if self.temperature is None else replace(self, temperature=self.temperature[index])

    def select_frames(self, index: Tensor) -> "QueryAttention":
        """The same for a subset of the frames (index: int64 [f])."""
        if self.allowed is None:
            return self
        return replace(self, allowed=self.allowed[index])


class QuerySource:
    """Maps planned queries [f, K, Q] to the queries to use, depending on the query source.

    planned: the planned queries. static: the learned static query. random: a new random query for every frame, with the
    norm of the query it replaces. fixed: one random query for all frames, with that norm. oracle: the planned queries;
    their attention is limited to the target (`QueryAttention.allowed`).
    """

    def __init__(self, source: str, static: Tensor, generator: torch.Generator | None):
        """static [F, K, Q]; generator: for `random` and `fixed` (None: torch's default)."""
        self.source, self.static, self.noise = source, static, None
        if source in ("random", "fixed"):  # drawn once, so that all passes of a call use the same
            shape = static.shape if source == "random" else (1, *static.shape[1:])
            noise = torch.randn(shape, generator=generator, device=static.device, dtype=static.dtype)
            self.noise = (noise / noise.norm(dim=-1, keepdim=True)).expand(static.shape)

    def __call__(self, queries: Tensor, frames: Tensor | None = None) -> Tensor:
        """frames: int64 [f], frame index of each query [f, K, Q] (default: all frames in order)."""
        noise = self.noise if self.noise is None or frames is None else self.noise[frames]
        return stand_in(self.source, queries, self.static[: len(queries)], noise)


def stand_in(source: str, queries: Tensor, static: Tensor, noise: Tensor | None) -> Tensor:
    """The queries to use in place of `queries` [f, K, Q]; noise: directions of random ones, None for other sources."""
    if source == "static":
        return static
    return queries if noise is None else noise * queries.norm(dim=-1, keepdim=True)
