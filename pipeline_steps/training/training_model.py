"""Network and objectives as one module whose forward pass returns the loss of a micro-batch.

It contains everything that is trained, so DDP, FSDP2, the EMA and saved states cover all of it. The terms of the
objectives are summed here only.
"""

from collections.abc import Mapping

import numpy as np
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from model import FoveatedVLMForConditionalGeneration, FoveatedVLMOutput, FoveationOptions
from model.packed_language import PackedText
from pipeline_steps.streaming.batch import Batch, Text
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
        """{name: count} that terms are means over, from the batch and from the objectives."""
        counts = batch.counts()
        for objective in self.objectives:
            counts |= objective.counts(batch)
        return counts

    def prepare(self, batch: Batch, generator: np.random.Generator) -> Batch:
        """The batch of a step as its objectives train on it."""
        for objective in self.objectives:
            batch = objective.prepare(batch, generator)
        return batch

    def forward(
        self, batch: Batch, num_plans: int, totals: Mapping[str, float], reference: nn.Module | None = None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """(share of the step's loss, {name: share of the term, unweighted and detached}) of a micro-batch.

        totals: `counts` of the whole step, over all micro-batches and ranks. The shares add up to the loss and terms
        of the whole batch. reference: frozen copy of the network, if an objective needs it.
        """
        outputs = self._outputs(batch, num_plans, reference)
        terms: dict[str, Term] = {}
        for objective in self.objectives:
            found = objective.terms(outputs, batch)
            if unknown := set(found) - set(objective.term_names):
                raise ValueError(
                    f"objective {objective.name}: terms() returned {', '.join(sorted(unknown))}, which term_names "
                    "lacks. Add it."
                )
            terms |= found
        loss, values = sum_terms(terms, self.counts(batch), totals)
        if not (isinstance(loss, Tensor) and loss.requires_grad):  # text only, and the language model is frozen
            loss = loss + self._zero()
        return loss, values

    def _zero(self) -> Tensor:
        """A zero with a gradient: a micro-batch that trains nothing still takes part in the backward pass of all ranks.
        It depends on a parameter of the root module, which FSDP2 has gathered here."""
        own = (p for p in self.parameters() if p.requires_grad and not isinstance(p, DTensor))
        return next(own).sum() * 0.0

    def _outputs(self, batch: Batch, num_plans: int, reference: nn.Module | None) -> Outputs:
        options = FoveationOptions(
            num_plans=num_plans,
            target_patches=batch.target_patches,
            text=text_of(self.network, batch),
            loss_only=True,
            output_attentions=self.needs.attention_weights,
            output_passes=True,
            return_logits=False,
        )
        outputs = Outputs(self.network, self.mode, options, reference=reference)
        if self.needs.text:
            outputs.text = self.network(**batch.inputs(), labels=batch.labels, mode=self.mode, options=options)
            outputs.passes = outputs.text.passes
        else:
            outputs.passes = self.network.encode_frames(**batch.inputs(), mode=self.mode, options=options)
        return outputs

    def infer(self, **inputs) -> FoveatedVLMOutput:
        """The network's own forward pass. With FSDP2 the network must be called through this module."""
        return self.network(**inputs)


def text_of(network: FoveatedVLMForConditionalGeneration, batch: Text) -> PackedText:
    """The text of a batch or of its rejected answers, with the indices that the collator has computed."""
    return network.packed_text(batch.input_ids, batch.attention_mask, places=batch.places)


def sum_terms(
    terms: Mapping[str, Term], counts: Mapping[str, int], totals: Mapping[str, float]
) -> tuple[Tensor, dict[str, Tensor]]:
    """(loss, {name: value}) of one micro-batch: each term is scaled by the micro-batch's share of the step's count. A
    term has no value in a step without anything it is a mean of, such as the text loss in a step of videos only."""
    loss, values = 0.0, {}
    for name, term in terms.items():
        share = counts[term.count] / max(totals[term.count], 1)
        if totals[term.count]:
            values[name] = term.value.detach() * share
        if term.weight:
            loss = loss + term.weight * share * term.value
    return loss, values
