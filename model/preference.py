"""Preference training: two answers to one question, read after one look at the frames.

Shapes: B batch, S sequence, E language width.
"""

import torch
from torch import Tensor

from .input_checks import check_preference
from .losses import dpo_loss


class PreferenceMixin:
    """What `FoveatedVLMForConditionalGeneration.forward` does with a chosen and a rejected answer."""

    def _preference(
        self, chosen, rejected, visual_tokens: Tensor | None, reference: Tensor | None
    ) -> dict[str, Tensor]:
        """`log_probs` of both answers, and the loss where the reference is known. chosen, rejected: (ids, mask,
        labels)."""
        ids, mask, labels = rejected
        rejected = ids, torch.ones_like(ids) if mask is None else mask, labels
        check_preference(self.config, chosen, rejected, reference)
        self._check_shared_prefix(chosen, rejected)
        log_probs = torch.stack(
            [self._answer_log_probs(*answer, visual_tokens) for answer in (chosen, rejected)], dim=1
        )
        if reference is None:
            return {"log_probs": log_probs}
        loss, margin = dpo_loss(*log_probs.unbind(1), *reference.to(log_probs).unbind(1), self.config.dpo_beta)
        return {"log_probs": log_probs, "loss": loss, "reward_margin": margin}

    def _answer_log_probs(
        self, input_ids: Tensor, attention_mask: Tensor, labels: Tensor, visual_tokens: Tensor | None
    ) -> Tensor:
        """Summed log-probability of the labelled tokens of every sample: [B]."""
        hidden = self.language_hidden_states(input_ids, attention_mask, visual_tokens)
        asked, losses, _ = self._token_losses(hidden, labels)
        return -losses.new_zeros(len(labels)).index_add(0, asked.nonzero()[:, 0], losses)

    def _check_shared_prefix(self, chosen, rejected) -> None:
        """Both answers are read after the same look, so everything up to the last frame must be the same."""
        prefixes = (self._up_to_last_frame(*answer[:2]) for answer in (chosen, rejected))
        for row, (one, other) in enumerate(zip(*prefixes, strict=True)):
            if not torch.equal(one, other):
                raise ValueError(
                    f"sample {row}: up to the last frame the chosen sequence has {len(one)} tokens, the rejected one "
                    f"{len(other)}, and they are not the same. Give both the same question and frames: only the "
                    "answers may differ"
                )

    def _up_to_last_frame(self, input_ids: Tensor, attention_mask: Tensor) -> list[Tensor]:
        prefixes = []
        for ids, mask in zip(input_ids, attention_mask, strict=True):
            real = ids[mask.bool()]
            visual = (real == self.config.visual_token_id).nonzero()[:, 0]
            prefixes.append(real[: int(visual[-1]) + 1] if len(visual) else real[:0])
        return prefixes

    @torch.no_grad()
    def preference_log_probs(self, **batch) -> Tensor:
        """Reference log-probabilities [B, 2] of a batch of `forward`'s preference arguments, for a frozen copy of the
        model or to be computed before training. Evaluation mode during the call: hard attention is not sampled."""
        training = self.training
        self.eval()
        log_probs = self(**{**batch, "reference_log_probs": None}).log_probs
        self.train(training)
        return log_probs
