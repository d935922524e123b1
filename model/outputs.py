"""Outputs of the network.

Shapes: B batch, S sequence, V vocabulary, F frames, K queries and P visual tokens per frame, Q query width, E language
width, N patches.
"""

from dataclasses import dataclass

from torch import Tensor
from transformers.utils import ModelOutput


@dataclass
class FrameTokens:
    """Visual tokens of one pass over the frames, with the queries that produced them."""

    visual_tokens: Tensor | None  # [F, P, E]
    queries: Tensor | None = None  # [F, K, Q]
    attention_weights: Tensor | None = None  # [layers, F, heads, K, N + 1]
    read: "FramesRead | None" = None  # noqa: F821 - of frame_step.py: what the language model has read, to answer from


@dataclass
class FoveatedVLMOutput(ModelOutput):
    """Output of `forward`. Per-token fields are aligned with `labels`."""

    loss: Tensor | None = None  # mean cross-entropy of the labelled tokens
    logits: Tensor | None = None  # [B, S, V] or fewer positions (logits_to_keep), None without return_logits
    token_loss: Tensor | None = None  # [B, S] nats, 0 without a label; detached
    correct: Tensor | None = None  # [B, S] bool: the most likely token is the label
    last_hidden_state: Tensor | None = None  # [B, S, E] of the language model, only with return_logits
    visual_tokens: Tensor | None = None  # [F, P, E]
    queries: Tensor | None = None  # [F, K, Q]
    attention_weights: Tensor | None = None  # [layers, F, heads, K, N + 1], only with output_attentions
    passes: list[FrameTokens] | None = None  # all passes in order, only with output_passes; the last is the one above
