"""Contrastive loss: visual tokens of planned queries should differ from those of the static query.

Shapes: F frames, P visual tokens per frame, E language width.
"""

from typing import Annotated

from pydantic import Field, NonNegativeFloat

from pipeline_steps.common.params import StrictModel
from pipeline_steps.training.objectives.base import Needs, Objective, Term


class Contrastive(Objective):
    """Contrast between a frame's fine and coarse visual tokens."""

    name = "contrastive"
    term_names = ("loss_contrastive",)
    needs = Needs(planned=True)

    class Parameters(StrictModel):
        weight: NonNegativeFloat
        """Weight of the contrastive loss."""
        margin: Annotated[float, Field(ge=-1, le=1)]
        """Cosine similarity that costs nothing."""

    def terms(self, outputs, batch):
        if not outputs.passes:
            return {}
        coarse, fine = (outputs.passes[place].visual_tokens for place in (0, -1))
        loss = contrastive_loss(fine, coarse, self.parameters.margin)
        return {"loss_contrastive": Term(loss, self.parameters.weight, "frames")}


def contrastive_loss(fine, coarse, margin):
    """Mean of relu(cos(fine, coarse) - margin) over the tokens [F, P, E] of each frame. Coarse tokens are detached."""
    from torch.nn.functional import cosine_similarity

    return (cosine_similarity(fine, coarse.detach(), dim=-1) - margin).relu().mean()
