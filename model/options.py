"""The optional arguments of `forward`, `generate` and `encode_frames` as one object."""

from collections.abc import Mapping
from dataclasses import dataclass, fields

import torch
from torch import Tensor


@dataclass(frozen=True)
class FoveationOptions:
    """How a call plans its queries, and what it returns.

    Shapes: F frames, N patches.
    """

    num_plans: int | None = None  # planned passes of fine mode; None: the configuration's num_passes
    query_source: str | None = None  # None: the configuration's
    generator: torch.Generator | None = None  # for the query sources random and fixed; None: torch's own
    target_patches: Tensor | None = None  # bool [F, N], for the query source oracle
    output_attentions: bool = False  # return attention_weights
    output_passes: bool = False  # return every pass over the frames, not only the last one
    return_logits: bool = False  # return logits (of `forward` only)
    frame_step: str | None = None  # autoregressive: `graph`, `static` or `dynamic`, see frame_step.py; None: the best

    @classmethod
    def of(cls, options: "FoveationOptions | Mapping | None") -> "FoveationOptions":
        """The options themselves, or those of a mapping {field: value}. ValueError for an unknown field, or for another
        type."""
        names = [field.name for field in fields(cls)]
        if options is None:
            return cls()
        if isinstance(options, Mapping):
            unknown = sorted(set(options) - set(names))
            if unknown:
                raise ValueError(f"options: {', '.join(unknown)} unknown, expected some of {', '.join(names)}")
            return cls(**options)
        if not all(hasattr(options, name) for name in names):  # the class of a checkpoint's own code is another one
            raise ValueError(f"options: {type(options).__name__} instead of FoveationOptions or a dict of its fields")
        return options
