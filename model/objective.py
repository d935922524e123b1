"""What training minimises: the loss of the labelled text tokens, and what the configuration weighs beside it.

Shapes: B batch, S sequence, E language width, V vocabulary, F frames, K queries and P visual tokens per frame, Q query
width, N patches.
"""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint
from transformers.utils import ModelOutput

from .losses import contrastive_loss, entropy_margin_loss

LOGITS_AT_ONCE = 2**26  # numbers: 256 MiB in fp32


@dataclass
class FoveatedVLMOutput(ModelOutput):
    """What `forward` returns; the per-token fields are aligned with `labels` (position s belongs to the token at s)."""

    loss: Tensor | None = None  # what is minimised: loss_text and the configuration's weighted further losses
    loss_text: Tensor | None = None  # mean over the labelled tokens of the last pass
    token_loss: Tensor | None = None  # [B, S] nats, 0 where not labelled
    correct: Tensor | None = None  # [B, S] bool: the most likely token is the label
    logits: Tensor | None = None  # [B, S, V], only with return_logits
    loss_coarse: Tensor | None = None  # text loss of the coarse pass, only with lambda_coarse > 0
    loss_entropy: Tensor | None = None  # only with lambda_entropy > 0
    loss_contrastive: Tensor | None = None  # only with lambda_contrastive > 0
    log_probs: Tensor | None = None  # [B, 2] of the chosen and the rejected answer, only with rejected_input_ids
    reward_margin: Tensor | None = None  # [B] nats by which the chosen answer is preferred, as `log_probs`
    visual_tokens: Tensor | None = None  # [F, P, E]
    queries: Tensor | None = None  # [F, K, Q]
    attention_weights: Tensor | None = None  # [layers, F, heads, K, N + 1], only with output_attentions


class ObjectiveMixin:
    """The losses of `FoveatedVLMForConditionalGeneration.forward`."""

    def _losses(self, hidden: Tensor, labels: Tensor | None, return_logits: bool) -> FoveatedVLMOutput:
        output = FoveatedVLMOutput()
        if return_logits:
            output.logits = self.language_model.lm_head(hidden)
        if labels is None:
            return output
        asked, losses, correct = self._token_losses(hidden, labels)
        output.loss = output.loss_text = losses.mean() if len(losses) else hidden.sum() * 0.0
        output.token_loss = torch.zeros(labels.shape, dtype=losses.dtype, device=losses.device)
        output.token_loss[:, 1:][asked] = losses.detach()
        output.correct = torch.zeros(labels.shape, dtype=torch.bool, device=losses.device)
        output.correct[:, 1:][asked] = correct
        return output

    def _token_losses(self, hidden: Tensor, labels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Cross-entropy at the labelled positions only: the vocabulary projection of the others is never computed.

        Of many labelled positions the logits are made LOGITS_AT_ONCE numbers at a time, and again in the backward pass,
        so that the memory does not grow with their number.
        Returns (asked: bool [B, S - 1], losses [labelled] in nats, correct: bool [labelled]).
        """
        asked = labels[:, 1:] != -100  # the state at s predicts the token at s + 1
        states, targets = hidden[:, :-1][asked], labels[:, 1:][asked]
        rows = max(1, LOGITS_AT_ONCE // self.language_model.lm_head.out_features)
        if len(targets) <= rows:
            return asked, *self._cross_entropy(states, targets)
        pieces = zip(states.split(rows), targets.split(rows), strict=True)
        losses, correct = zip(
            *(checkpoint(self._cross_entropy, *piece, use_reentrant=False) for piece in pieces), strict=True
        )
        return asked, torch.cat(losses), torch.cat(correct)

    def _cross_entropy(self, states: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """States [n, E], targets [n] -> (losses [n] in nats, whether the most likely token is the target [n])."""
        logits = self.language_model.lm_head(states).float()  # [n, V]
        return F.cross_entropy(logits, targets, reduction="none"), logits.argmax(-1) == targets

    def _add_coarse_loss_of_text(self, output: FoveatedVLMOutput) -> None:
        """Without frames both passes read the same text: what a text-only sample weighs does not depend on whether
        others of its batch have frames."""
        config = self.config
        if config.lambda_coarse > 0 and config.architecture == "foveated" and not config.coarse_only:
            output.loss_coarse = output.loss_text
            output.loss = output.loss + config.lambda_coarse * output.loss_coarse

    def _add_training_losses(self, output, input_ids, attention_mask, labels, coarse, fine) -> None:
        """Adds what the configuration weighs beside the text loss of the last pass."""
        config = self.config
        if config.lambda_coarse > 0:
            hidden = self.language_hidden_states(input_ids, attention_mask, coarse.visual_tokens)
            output.loss_coarse = self._losses(hidden, labels, False).loss
            output.loss = output.loss + config.lambda_coarse * output.loss_coarse
        if config.lambda_entropy > 0:
            weights = fine.attention_weights, coarse.attention_weights
            output.loss_entropy = entropy_margin_loss(*weights, config.entropy_margin)
            output.loss = output.loss + config.lambda_entropy * output.loss_entropy
        if config.lambda_contrastive > 0:
            tokens = fine.visual_tokens, coarse.visual_tokens
            output.loss_contrastive = contrastive_loss(*tokens, config.contrastive_margin)
            output.loss = output.loss + config.lambda_contrastive * output.loss_contrastive
