"""Cross-entropy of the labelled text tokens: the objective of every stage except preference training."""

from pipeline_steps.training.objectives.base import Needs, Objective, Term


class TextCrossEntropy(Objective):
    """Mean cross-entropy of the labelled tokens, after the last pass over the frames."""

    name = "text"
    term_names = ("loss_text",)
    needs = Needs(text=True)

    @classmethod
    def is_active(cls, settings):
        return settings.loss != "preference"

    def terms(self, outputs, batch):
        return {"loss_text": Term(outputs.text.loss, 1.0, "tokens")}
