"""Base class of objectives. Reading params.yaml must not require torch, so this package imports it inside functions.

Shapes: F frames of the micro-batch, B samples.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

from pipeline_steps.common.params import StrictModel

if TYPE_CHECKING:
    from pathlib import Path

    import numpy as np
    from torch import Tensor, nn

    from model import FoveatedVLMConfig, FoveatedVLMForConditionalGeneration, FoveatedVLMOutput, FoveationOptions
    from model.outputs import FrameTokens
    from pipeline_steps.streaming.batch import Batch


class Term(NamedTuple):
    """One term of the loss for one micro-batch."""

    value: Tensor  # scalar: mean over the units that `count` counts in the micro-batch
    weight: float  # in the loss; 0: logged only
    count: str  # tokens, frames or samples (`Batch.counts`), or a key of the objective's `counts`


@dataclass(frozen=True)
class Needs:
    """What an objective needs from the forward pass."""

    text: bool = False  # text loss of the labelled tokens; not computed unless an objective needs it
    planned: bool = False  # a coarse and a planned pass; an error for networks with a single pass
    attention_weights: bool = False  # of every pass
    reference: bool = False  # frozen copy of the stage's initial network
    pairs: bool = False  # consecutive frames; an error for a stage without an item of two


@dataclass
class Outputs:
    """Outputs of the forward pass of a micro-batch."""

    network: FoveatedVLMForConditionalGeneration
    mode: str
    options: FoveationOptions
    passes: list[FrameTokens] = field(default_factory=list)  # fine mode: coarse first; empty without frames
    text: FoveatedVLMOutput | None = None  # of the last pass; None if no objective needs it
    reference: FoveatedVLMForConditionalGeneration | None = None

    @property
    def visual_tokens(self) -> Tensor | None:
        """[F, P, E] of the last pass, None without frames."""
        return self.passes[-1].visual_tokens if self.passes else None


class Objective:
    """Base of all objectives. Subclasses in this package are registered automatically.

    name: its key in training.<stage>.objective. term_names: all names that `terms` may return; they become columns of
    the metrics table. Parameters: schema of its section; None: no parameters.
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
        """Whether a stage uses it (weight above 0). settings: training.<stage>."""
        return getattr(settings.objective, cls.name).weight > 0

    @classmethod
    def check(cls, stage: str, settings, network) -> None:
        """UserError if options of an active objective do not fit the stage or the network, as in `objectives.check`."""

    @classmethod
    def input_files(cls, stage: str, settings) -> list[Path]:
        """Files besides params.yaml on which an active objective depends. UserError if one is missing."""
        return []

    def make_module(self) -> nn.Module | None:
        """A new module of the objective, such as a head, or None. It is trained and saved together with the network."""
        return None

    def prepare(self, batch: Batch, generator: np.random.Generator) -> Batch:
        """The batch to train a step on, before it is split into micro-batches. generator: of the step, the same on all
        ranks."""
        return batch

    def counts(self, batch: Batch) -> dict[str, int]:
        """Additional {name: count} that terms are means over. They may depend on the batch only."""
        return {}

    def terms(self, outputs: Outputs, batch: Batch) -> Mapping[str, Term]:
        """{name: Term} of a micro-batch. Omit terms that do not apply, such as those of frames in a text-only one."""
        raise NotImplementedError
