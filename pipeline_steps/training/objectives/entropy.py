"""Entropy margin loss: planned attention should be sharper than coarse attention.

Shapes: F frames, K queries per frame, L layers, H heads, N patches.
"""

from pydantic import NonNegativeFloat

from pipeline_steps.common.params import StrictModel
from pipeline_steps.training.objectives.base import Needs, Objective, Term


class EntropyMargin(Objective):
    """Entropy margin between planned and coarse attention."""

    name = "entropy"
    term_names = ("loss_entropy",)
    needs = Needs(planned=True, attention_weights=True)

    class Parameters(StrictModel):
        weight: NonNegativeFloat
        """Weight of the entropy-margin loss."""
        margin: float
        """Margin in nats."""

    def terms(self, outputs, batch):
        if not outputs.passes:
            return {}
        coarse, fine = (outputs.passes[place].attention_weights for place in (0, -1))
        loss = entropy_margin_loss(fine, coarse, self.parameters.margin)
        return {"loss_entropy": Term(loss, self.parameters.weight, "frames")}


def attention_entropy(weights):
    """Entropy in nats of attention weights [..., N + 1] over their last axis: [...]."""
    return -(weights * weights.clamp_min(1e-12).log()).sum(-1)


def entropy_margin_loss(fine, coarse, margin):
    """Mean of relu(H(fine) - H(coarse) + margin) over frames, heads and queries of the last layer.

    fine, coarse: attention weights [L, F, H, K, N + 1]. The coarse entropy is detached.
    """
    return (attention_entropy(fine[-1]) - attention_entropy(coarse[-1]).detach() + margin).relu().mean()
