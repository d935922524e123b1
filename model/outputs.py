"""What the network returns.

Shapes: B batch, S sequence, V vocabulary, F frames, K queries and P visual tokens per frame, Q query width, E language
width, N patches.
"""

from dataclasses import dataclass

from torch import Tensor
from transformers.utils import ModelOutput


@dataclass
class FrameTokens:
    """The visual tokens of one pass over the frames, and their queries."""

    visual_tokens: Tensor | None  # [F, P, E]
    queries: Tensor | None = None  # [F, K, Q]
    attention_weights: Tensor | None = None  # [layers, F, heads, K, N + 1]
    read: "FramesRead | None" = None  # noqa: F821 - of frame_step.py: what the language model has read, to answer from


@dataclass
class FoveatedVLMOutput(ModelOutput):
    """Output of `forward`. The per-token fields are aligned with `labels`: position s belongs to the token at s."""

    loss: Tensor | None = None  # mean cross-entropy of the labelled tokens
    token_loss: Tensor | None = None  # [B, S] nats, 0 where not labelled; without gradient
    correct: Tensor | None = None  # [B, S] bool: the most likely token is the label
    logits: Tensor | None = None  # [B, S, V], only with return_logits
    visual_tokens: Tensor | None = None  # [F, P, E]
    queries: Tensor | None = None  # [F, K, Q]
    attention_weights: Tensor | None = None  # [layers, F, heads, K, N + 1], only with output_attentions
    passes: list[FrameTokens] | None = None  # in order, the last is the one above; only with output_passes
