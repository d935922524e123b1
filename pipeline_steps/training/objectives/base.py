"""What an objective is. Parameters are read where torch is missing, so files of this package import it in functions.

Shapes: F frames of the micro-batch, B samples.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

from pipeline_steps.common.params import StrictModel

if TYPE_CHECKING:
    from torch import Tensor, nn

    from model import FoveatedVLMConfig, FoveatedVLMForConditionalGeneration, FoveatedVLMOutput, FoveationOptions
    from model.outputs import FrameTokens
    from pipeline_steps.streaming.batch import Batch


class Term(NamedTuple):
    """One term of the loss, of one micro-batch."""

    value: Tensor  # scalar: the mean over what `count` counts in the micro-batch
    weight: float  # in the loss; 0: reported only
    count: str  # tokens, frames or samples (`Batch.counts`), or a name of the objective's own `counts`


@dataclass(frozen=True)
class Needs:
    """What an objective needs of the forward pass."""

    text: bool = False  # the text loss of the labelled tokens (preference training skips it otherwise)
    planned: bool = False  # a coarse and a planned pass: refused for networks that have one pass
    attention_weights: bool = False  # of every pass
    reference: bool = False  # a frozen copy of the network that the stage began with


@dataclass
class Outputs:
    """The forward pass of a micro-batch."""

    network: FoveatedVLMForConditionalGeneration
    mode: str
    options: FoveationOptions
    passes: list[FrameTokens] = field(default_factory=list)  # fine mode: coarse first; empty without frames
    text: FoveatedVLMOutput | None = None  # of the last pass; None where no objective needs it
    reference: FoveatedVLMForConditionalGeneration | None = None

    @property
    def visual_tokens(self) -> Tensor | None:
        """[F, P, E] of the last pass, None without frames."""
        return self.passes[-1].visual_tokens if self.passes else None


class Objective:
    """A part of what a stage trains on: one file of this package, found by itself.

    `name`: its key in training.<stage>.objective. `term_names`: all names that `terms` may return, which are columns of
    the metrics table. `Parameters`: its section; None: it has none.
    """

    name: ClassVar[str]
    term_names: ClassVar[tuple[str, ...]]
    needs: ClassVar[Needs] = Needs()
    Parameters: ClassVar[type[StrictModel] | None] = None

    def __init__(self, parameters: Any, config: FoveatedVLMConfig):
        self.parameters, self.config = parameters, config
        self.module: nn.Module | None = self.make_module()

    @classmethod
    def is_active(cls, settings) -> bool:
        """Whether a stage (`settings`: training.<stage>) uses it: its weight is above 0."""
        return getattr(settings.objective, cls.name).weight > 0

    def make_module(self) -> nn.Module | None:
        """A new head of the objective's own, or None. It is trained and saved with the network, as `self.module`."""
        return None

    def counts(self, batch: Batch) -> dict[str, int]:
        """Further counts that its terms are means over. They must follow from the batch alone."""
        return {}

    def terms(self, outputs: Outputs, batch: Batch) -> Mapping[str, Term]:
        """{name: Term} of a micro-batch; without what a micro-batch does not hold, such as frames."""
        raise NotImplementedError
