"""Queries: how a query row attends to a frame, and which queries stand in for the planned ones.

Shapes: F frames, K query rows per frame, N patches, H heads, C head width, L layers, Q query width.
"""

from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn import functional as F


@dataclass
class QueryAttention:
    """How query rows attend; softmax attention to the whole frame where nothing is set.

    temperature: [L], or of one layer [], divides the logits. hard: `top_k` keeps the `top_k` largest logits of
    every head; `gumbel` takes one place per head, sampled in training with a straight-through gradient (Jang et al.
    2017, "Categorical Reparameterization with Gumbel-Softmax"), the largest one otherwise. allowed: bool [F, N + 1],
    where a query may look at all.
    """

    temperature: Tensor | None = None
    hard: str = "none"
    top_k: int = 1
    allowed: Tensor | None = None
    training: bool = False

    @property
    def is_plain(self) -> bool:
        return self.temperature is None and self.hard == "none" and self.allowed is None

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
        """The same for one layer, whose temperature it has."""
        return self if self.temperature is None else replace(self, temperature=self.temperature[index])

    def select_frames(self, index: Tensor) -> "QueryAttention":
        """The same for a subset of the frames (index: int64 [f])."""
        if self.allowed is None:
            return self
        return replace(self, allowed=self.allowed[index])


class QuerySource:
    """Which queries are used in place of the planned ones: called with queries [f, K, Q], it returns those to use.

    planned: the queries themselves. static: the learned static query. random: drawn anew for every frame, with the norm
    of the query it replaces. fixed: one random query for all frames, again with that norm. oracle: the planned
    queries, whose attention is limited to the target's place (`QueryAttention.allowed`).
    """

    def __init__(self, source: str, static: Tensor, generator: torch.Generator | None):
        """static [F, K, Q]; generator: for `random` and `fixed` (None: torch's own)."""
        self.source, self.static, self.noise = source, static, None
        if source in ("random", "fixed"):  # drawn once: every pass of a call sees the same
            shape = static.shape if source == "random" else (1, *static.shape[1:])
            noise = torch.randn(shape, generator=generator, device=static.device, dtype=static.dtype)
            self.noise = (noise / noise.norm(dim=-1, keepdim=True)).expand(static.shape)

    def __call__(self, queries: Tensor, frames: Tensor | None = None) -> Tensor:
        """frames: int64 [f], which frames the queries [f, K, Q] are for (all by default)."""
        noise = self.noise if self.noise is None or frames is None else self.noise[frames]
        return stand_in(self.source, queries, self.static[: len(queries)], noise)


def stand_in(source: str, queries: Tensor, static: Tensor, noise: Tensor | None) -> Tensor:
    """The queries to use in place of `queries` [f, K, Q]; noise: directions of random ones, None for other sources."""
    if source == "static":
        return static
    return queries if noise is None else noise * queries.norm(dim=-1, keepdim=True)
