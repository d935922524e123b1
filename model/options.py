"""The optional arguments of `forward`, `generate` and `encode_frames` as one object."""

from collections.abc import Mapping
from dataclasses import dataclass, fields

import torch
from torch import Tensor

from .packed_language import PackedText


@dataclass(frozen=True)
class FoveationOptions:
    """Options of a call: how queries are planned, and what is returned.

    Shapes: F frames, N patches.
    """

    num_plans: int | None = None  # planned passes in fine mode; None: num_passes of the configuration
    query_source: str | None = None  # None: query_source of the configuration
    generator: torch.Generator | None = None  # for the query sources random and fixed; None: torch's default
    target_patches: Tensor | None = None  # bool [F, N], for the query source oracle
    output_attentions: bool = False  # return attention_weights
    output_passes: bool = False  # return every pass over the frames, not only the last one
    text: PackedText | None = None  # of `packed_text`, shared by calls for one batch; None: made in the call
    loss_only: bool = False  # of `forward`: no token_loss and no correct
    return_logits: bool = True  # of `forward`: compute logits; False saves the memory of [B, S, V] values
    frame_step: str | None = None  # autoregressive: `graph`, `static` or `dynamic`, see frame_step.py; None: the best

    @classmethod
    def of(cls, options: "FoveationOptions | Mapping | None") -> "FoveationOptions":
        """The options as an object of this class. options: such an object, a mapping {field: value}, or None.
        ValueError for an unknown field or another type."""
        names = [field.name for field in fields(cls)]
        if options is None:
            return cls()
        if isinstance(options, Mapping):
            unknown = sorted(set(options) - set(names))
            if unknown:
                raise ValueError(f"options: {', '.join(unknown)} unknown, expected fields among {', '.join(names)}")
            return cls(**options)
        if not all(hasattr(options, name) for name in names):  # not isinstance: a checkpoint's code has its own class
            raise ValueError(f"options: {type(options).__name__} instead of FoveationOptions or a dict of its fields")
        return options
