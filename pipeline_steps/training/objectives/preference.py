"""Direct preference optimisation (DPO). The reference model has the stage's initial weights.

Shapes: B samples.
"""

from pydantic import PositiveFloat

from pipeline_steps.common.params import StrictModel
from pipeline_steps.training.objectives.base import Needs, Objective, Term


class Preference(Objective):
    """Direct preference optimisation (DPO), with `loss: preference`."""

    name = "preference"
    term_names = ("loss_preference", "reward_margin")
    needs = Needs(reference=True)

    class Parameters(StrictModel):
        beta: PositiveFloat
        """Strength of the reference in preference training."""

    @classmethod
    def is_active(cls, settings):
        return settings.loss == "preference"

    def terms(self, outputs, batch):
        from dataclasses import replace

        import torch

        from pipeline_steps.training.training_model import text_of

        def answers(network, text):
            return batch.answer() | {"text": text}, batch.rejected.answer() | {"text": text_of(network, batch.rejected)}

        with torch.no_grad():
            frozen = outputs.reference
            text = text_of(frozen, batch)
            options = replace(outputs.options, text=text)
            passes = frozen.encode_frames(**batch.inputs(), mode=outputs.mode, options=options)
            expected = frozen.preference_log_probs(*answers(frozen, text), passes[-1].visual_tokens if passes else None)
        own = answers(outputs.network, outputs.options.text)
        found = outputs.network.preference_log_probs(*own, outputs.visual_tokens)
        loss, margin = dpo_loss(*found.unbind(1), *expected.to(found).unbind(1), self.parameters.beta)
        return {
            "loss_preference": Term(loss, 1.0, "samples"),
            "reward_margin": Term(margin.mean(), 0.0, "samples"),
        }


def dpo_loss(chosen, rejected, reference_chosen, reference_rejected, beta):
    """Direct preference optimisation (Rafailov et al. 2023, equation 7): mean over samples of
    -log sigmoid(beta * ((chosen - reference_chosen) - (rejected - reference_rejected))).

    All arguments are summed answer log-probabilities [B]. Returns (loss, reward margin [B] in nats, without gradient).
    """
    from torch.nn.functional import logsigmoid

    margin = beta * ((chosen - reference_chosen) - (rejected - reference_rejected))
    return -logsigmoid(margin).mean(), margin.detach()
