"""Cross-entropy of the labelled text tokens: the objective of every stage except preference training."""

from pydantic import NonNegativeFloat

from pipeline_steps.common.params import StrictModel
from pipeline_steps.training.objectives.base import Needs, Objective, Term


class TextCrossEntropy(Objective):
    """Mean cross-entropy of the labelled tokens, after the last pass over the frames."""

    name = "text"
    term_names = ("loss_text",)
    needs = Needs(text=True)

    class Parameters(StrictModel):
        weight: NonNegativeFloat
        """Weight of the text loss (none in preference training)."""

    @classmethod
    def is_active(cls, settings):
        return settings.loss != "preference" and settings.objective.text.weight > 0

    def terms(self, outputs, batch):
        return {"loss_text": Term(outputs.text.loss, self.parameters.weight, "tokens")}
