"""Log-probabilities of two answers to one question, after one encoding of the frames.

Shapes: B batch, S sequence, E language width, F frames, P visual tokens per frame.
"""

from collections.abc import Mapping

import torch
from torch import Tensor

from .input_checks import check_preference, check_tokens
from .packed_language import PackedText


class PreferenceMixin:
    """`preference_log_probs` of `FoveatedVLMForConditionalGeneration`."""

    def preference_log_probs(self, chosen: Mapping, rejected: Mapping, visual_tokens: Tensor | None = None) -> Tensor:
        """Summed log-probabilities of the labelled tokens of both answers of every sample: [B, 2] (chosen, rejected).

        chosen, rejected: {input_ids, attention_mask (optional), labels}, each [B, S]; S may differ between the two.
        With `text`, the `packed_text` of each, the values of the tensors are not checked.
        visual_tokens [F, P, E]: from one `encode_frames` for both (None without frames), so both must be identical up
        to the last frame.

        Raises ValueError if the answers do not match each other or the visual tokens.
        """
        answers = [_with_mask(answer) for answer in (chosen, rejected)]
        check_preference(self.config, *answers)
        texts = [answer.get("text") for answer in (chosen, rejected)]
        if None in texts:
            for answer in answers:
                check_tokens(self.config, *answer)
            self._check_shared_prefix(*answers)
        pairs = zip(answers, texts, strict=True)
        return torch.stack([self._answer_log_probs(*answer, text, visual_tokens) for answer, text in pairs], dim=1)

    def _answer_log_probs(
        self,
        input_ids: Tensor,
        attention_mask: Tensor,
        labels: Tensor,
        text: PackedText | None,
        visual_tokens: Tensor | None,
    ) -> Tensor:
        """Summed log-probability of the labelled tokens of every sample: [B]."""
        text = text or self.packed_text(input_ids, attention_mask, labels=labels)
        losses, _ = self._token_losses(text.hidden_states(visual_tokens), text.places, loss_only=True)
        return -losses.new_zeros(len(labels)).index_add(0, text.places.label_sample, losses)

    def _check_shared_prefix(self, chosen, rejected) -> None:
        prefixes = (self._up_to_last_frame(*answer[:2]) for answer in (chosen, rejected))
        for row, (one, other) in enumerate(zip(*prefixes, strict=True)):
            if not torch.equal(one, other):
                raise ValueError(
                    f"sample {row}: the chosen and the rejected sequence differ before the end of the frames "
                    f"({len(one)} and {len(other)} tokens). Pass the same question and frames for both; only the "
                    "answers may differ"
                )

    def _up_to_last_frame(self, input_ids: Tensor, attention_mask: Tensor) -> list[Tensor]:
        prefixes = []
        for ids, mask in zip(input_ids, attention_mask, strict=True):
            real = ids[mask.bool()]
            visual = (real == self.config.visual_token_id).nonzero()[:, 0]
            prefixes.append(real[: int(visual[-1]) + 1] if len(visual) else real[:0])
        return prefixes


def _with_mask(answer: Mapping) -> tuple[Tensor, Tensor, Tensor | None]:
    """(input_ids, attention_mask, labels)."""
    ids, mask = answer["input_ids"], answer.get("attention_mask")
    return ids, torch.ones_like(ids) if mask is None else mask, answer.get("labels")
