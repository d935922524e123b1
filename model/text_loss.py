"""Cross-entropy of the labelled text tokens.

Shapes: B batch, S sequence, E language width, V vocabulary, F frames, P visual tokens per frame.
"""

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from .constants import IGNORE_INDEX
from .outputs import FoveatedVLMOutput

LOGITS_AT_ONCE = 2**26  # elements: 256 MiB in fp32


class TextLossMixin:
    """`score_text` of `FoveatedVLMForConditionalGeneration`."""

    def score_text(
        self,
        input_ids: Tensor,
        attention_mask: Tensor,
        labels: Tensor | None = None,
        visual_tokens: Tensor | None = None,
        return_logits: bool = False,
        logits_to_keep: int | Tensor = 0,
        num_items_in_batch: int | Tensor | None = None,
    ) -> FoveatedVLMOutput:
        """Runs the language model over text and visual tokens; returns the text fields of the output.

        input_ids, attention_mask, labels [B, S]; visual_tokens [F, P, E]. The loss is 0 if there is no labelled token.
        logits_to_keep, num_items_in_batch: as in `forward`.
        """
        hidden = self.language_hidden_states(input_ids, attention_mask, visual_tokens)
        output = FoveatedVLMOutput()  # a dict in the order of assignment, loss and logits first
        if labels is not None:
            asked, losses, correct = self._token_losses(hidden, labels)
            output.loss = losses.mean() if len(losses) else hidden.sum() * 0.0
            if num_items_in_batch is not None and len(losses):
                output.loss = losses.sum() / num_items_in_batch
        if return_logits:
            kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
            output.logits, output.last_hidden_state = self.language_model.lm_head(hidden[:, kept]), hidden
        if labels is not None:
            output.token_loss = torch.zeros(labels.shape, dtype=losses.dtype, device=losses.device)
            output.token_loss[:, 1:][asked] = losses.detach()
            output.correct = torch.zeros(labels.shape, dtype=torch.bool, device=losses.device)
            output.correct[:, 1:][asked] = correct
        return output

    def _token_losses(self, hidden: Tensor, labels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Cross-entropy at the labelled positions. The vocabulary projection is computed only there.

        With many labelled positions the logits are computed LOGITS_AT_ONCE elements at a time, with activation
        checkpointing, so that memory does not grow with their number.
        Returns (asked: bool [B, S - 1], losses [labelled] in nats, correct: bool [labelled]).
        """
        asked = labels[:, 1:] != IGNORE_INDEX  # the state at s predicts the token at s + 1
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
