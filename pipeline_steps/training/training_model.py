"""The network and the objectives' own modules as one module, whose forward pass is a micro-batch's part of the loss.

Everything that is trained is in it, so that sharing gradients among processes (DDP, FSDP2), averages and states see all
of it. The terms of all objectives are summed here and nowhere else.
"""

from collections.abc import Mapping

from torch import Tensor, nn

from model import FoveatedVLMForConditionalGeneration, FoveatedVLMOutput, FoveationOptions
from pipeline_steps.streaming.batch import Batch
from pipeline_steps.training.objectives import Needs, Objective, Outputs, Term


class TrainingModel(nn.Module):
    def __init__(self, network: FoveatedVLMForConditionalGeneration, objectives: list[Objective]):
        super().__init__()
        self.network, self.objectives = network, objectives
        self.objective = nn.ModuleDict({entry.name: entry.module for entry in objectives if entry.module is not None})
        self.needs = Needs(**{name: any(getattr(own.needs, name) for own in objectives) for name in vars(Needs())})
        self.mode = "coarse" if network.config.coarse_only else "fine"

    @property
    def term_names(self) -> tuple[str, ...]:
        return tuple(name for objective in self.objectives for name in objective.term_names)

    def counts(self, batch: Batch) -> dict[str, int]:
        """The batch's counts and those of the objectives: what terms are means over."""
        counts = batch.counts()
        for objective in self.objectives:
            counts |= objective.counts(batch)
        return counts

    def forward(
        self, batch: Batch, num_plans: int, totals: Mapping[str, float], reference: nn.Module | None = None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The micro-batch's part of the step's loss, and of every term by name (unweighted, without gradient).

        totals: `counts` of the whole step, over all micro-batches and processes. The parts add up to the loss and the
        terms of the undivided batch. reference: the frozen copy of the network, where an objective needs it.
        """
        outputs = self._outputs(batch, num_plans, reference)
        terms: dict[str, Term] = {}
        for objective in self.objectives:
            found = objective.terms(outputs, batch)
            if unknown := set(found) - set(objective.term_names):
                raise ValueError(f"objective {objective.name}: {', '.join(unknown)} not among its term_names")
            terms |= found
        return sum_terms(terms, self.counts(batch), totals)

    def _outputs(self, batch: Batch, num_plans: int, reference: nn.Module | None) -> Outputs:
        options = FoveationOptions(
            num_plans=num_plans,
            target_patches=batch.target_patches,
            output_attentions=self.needs.attention_weights,
            output_passes=True,
        )
        outputs = Outputs(self.network, self.mode, options, reference=reference)
        if self.needs.text:
            outputs.text = self.network(**batch.inputs(), labels=batch.labels, mode=self.mode, options=options)
            outputs.passes = outputs.text.passes
        else:
            outputs.passes = self.network.encode_frames(**batch.inputs(), mode=self.mode, options=options)
        return outputs

    def infer(self, **inputs) -> FoveatedVLMOutput:
        """The network's own forward pass: with FSDP2 the network cannot be called by itself."""
        return self.network(**inputs)


def sum_terms(
    terms: Mapping[str, Term], counts: Mapping[str, int], totals: Mapping[str, float]
) -> tuple[Tensor, dict[str, Tensor]]:
    """(loss, {name: value}) of one micro-batch, each term times its share of the step's count."""
    loss, values = 0.0, {}
    for name, term in terms.items():
        share = counts[term.count] / max(totals[term.count], 1)
        values[name] = term.value.detach() * share
        if term.weight:
            loss = loss + term.weight * share * term.value
    return loss, values
