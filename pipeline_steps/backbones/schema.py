"""Parameters of the `backbones` stage (section `backbones` of params.yaml)."""

from typing import Literal

from pydantic import NonNegativeInt, PositiveFloat, PositiveInt

from pipeline_steps.params import StrictModel


class Local(StrictModel):
    """Folders of backbones that exist already; read only when kind is local."""

    vision_path: str | None
    language_path: str | None


class Embedded(StrictModel):
    """Sizes and warm-up of the backbones that the stage trains itself; read only when kind is embedded."""

    seed: NonNegativeInt
    num_threads: PositiveInt  # part of the result: another number gives other last bits
    image_size: PositiveInt  # px
    patch_size: PositiveInt  # px
    vision_width: PositiveInt
    vision_layers: PositiveInt
    vision_heads: PositiveInt
    vision_steps: PositiveInt
    vision_batch_size: PositiveInt  # frames
    vision_learning_rate: PositiveFloat
    language_width: PositiveInt
    language_layers: PositiveInt
    language_heads: PositiveInt
    language_kv_heads: PositiveInt
    language_steps: PositiveInt
    language_batch_size: PositiveInt  # chats
    language_learning_rate: PositiveFloat
    vocabulary_size: PositiveInt
    max_positions: PositiveInt


class Section(StrictModel):
    kind: Literal["embedded", "local"]
    local: Local
    embedded: Embedded
