"""Cross-entropy of the labelled text tokens.

Shapes: N real tokens of the batch, L labelled ones, B samples, S sequence, E language width, V vocabulary, F frames, P
visual tokens per frame.
"""

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from .input_checks import check_tokens
from .outputs import FoveatedVLMOutput
from .packed_language import PackedText
from .packing import BatchPlaces

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
        text: PackedText | None = None,
        loss_only: bool = False,
        logits_to_keep: int | Tensor = 0,
        num_items_in_batch: int | Tensor | None = None,
    ) -> FoveatedVLMOutput:
        """Runs the language model over text and visual tokens; returns the text fields of the output.

        input_ids, attention_mask, labels [B, S]; visual_tokens [F, P, E]; text: their `packed_text`.
        The loss is 0 if there is no labelled token. loss_only: without token_loss and correct. logits_to_keep,
        num_items_in_batch: as in `forward`. Raises ValueError if placeholders and visual tokens do not match, and,
        without `text`, for an id or a label outside the vocabulary.
        """
        if text is None:
            check_tokens(self.config, input_ids, attention_mask, labels)
            text = self.packed_text(input_ids, attention_mask, labels=labels)
        wanted = (return_logits, loss_only, logits_to_keep, num_items_in_batch)
        return self._score(text, visual_tokens, labels is not None, *wanted)

    def _score(
        self,
        text: PackedText,
        visual_tokens: Tensor | None,
        has_labels: bool,
        return_logits: bool,
        loss_only: bool,
        logits_to_keep: int | Tensor,
        num_items_in_batch: int | Tensor | None,
    ) -> FoveatedVLMOutput:
        hidden, places = text.hidden_states(visual_tokens), text.places
        output = FoveatedVLMOutput()  # a dict in the order of assignment, loss and logits first
        if has_labels:
            losses, correct = self._token_losses(hidden, places, loss_only)
            output.loss = losses.mean() if len(losses) else hidden.sum() * 0.0
            if num_items_in_batch is not None and len(losses):
                output.loss = losses.sum() / num_items_in_batch
        if return_logits:
            whole = places.spread(hidden, places.index)  # [B, S, E], zeros at padding
            kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
            output.logits, output.last_hidden_state = self.language_model.lm_head(whole[:, kept]), whole
        if has_labels and not loss_only:
            output.token_loss = places.spread(losses.detach(), places.label_index)
            output.correct = places.spread(correct, places.label_index)
        return output

    def _token_losses(
        self, hidden: Tensor, places: BatchPlaces, loss_only: bool = False
    ) -> tuple[Tensor, Tensor | None]:
        """Cross-entropy at the labelled positions. The vocabulary projection is computed only there.

        With many labelled positions the logits are computed LOGITS_AT_ONCE elements at a time, with activation
        checkpointing, so that memory does not grow with their number.
        Returns (losses [L] in nats, correct: bool [L], None with `loss_only`).
        """
        states, targets = hidden.index_select(0, places.states), places.targets
        rows = max(1, LOGITS_AT_ONCE // self.language_model.lm_head.out_features)
        if len(targets) <= rows:
            return self._cross_entropy(states, targets, loss_only)
        pieces = zip(states.split(rows), targets.split(rows), strict=True)
        losses, correct = zip(
            *(checkpoint(self._cross_entropy, *piece, loss_only, use_reentrant=False) for piece in pieces), strict=True
        )
        return torch.cat(losses), None if loss_only else torch.cat(correct)

    def _cross_entropy(self, states: Tensor, targets: Tensor, loss_only: bool) -> tuple[Tensor, Tensor | None]:
        """States [n, E], targets [n] -> (losses [n] in nats, whether the most likely token is the target [n])."""
        logits = self.language_model.lm_head(states).float()  # [n, V]
        losses = F.cross_entropy(logits, targets, reduction="none")
        return losses, None if loss_only else logits.argmax(-1) == targets
