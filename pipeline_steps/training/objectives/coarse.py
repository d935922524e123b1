"""Text loss of the coarse pass."""

from pydantic import NonNegativeFloat

from pipeline_steps.common.params import StrictModel
from pipeline_steps.training.objectives.base import Needs, Objective, Term


class CoarseText(Objective):
    """Cross-entropy of the labelled tokens after the coarse pass, with the static query's visual tokens."""

    name = "coarse"
    term_names = ("loss_coarse",)
    needs = Needs(text=True, planned=True)

    class Parameters(StrictModel):
        weight: NonNegativeFloat
        """Weight of the coarse pass's text loss."""

    def terms(self, outputs, batch):
        # Without frames both passes are equal. Counting the loss there too keeps the weight of a text-only sample
        # independent of the micro-batch.
        loss = outputs.text.loss
        if outputs.passes:
            tokens = outputs.passes[0].visual_tokens
            text = (batch.input_ids, batch.attention_mask, batch.labels)
            loss = outputs.network.score_text(*text, tokens, text=outputs.options.text, loss_only=True).loss
        return {"loss_coarse": Term(loss, self.parameters.weight, "tokens")}
