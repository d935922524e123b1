"""Parameters of the `backbones` stage (section `backbones` of params.yaml)."""

from typing import Literal

from pydantic import Field, NonNegativeInt, PositiveFloat, PositiveInt, model_validator

from pipeline_steps.common.params import StrictModel


class Local(StrictModel):
    """Folders of backbones that exist already; read only when kind is local."""

    vision_path: str | None
    language_path: str | None


class Repository(StrictModel):
    """A model on the Hugging Face Hub."""

    repository: str = Field(pattern=r"^[\w.-]+/[\w.-]+$")  # owner/name
    revision: str = Field(pattern=r"^[0-9a-f]{40}$")  # a commit: branches and tags move


class Hub(StrictModel):
    """Backbones to download; read only when kind is hub."""

    vision: Repository
    language: Repository


class Embedded(StrictModel):
    """Sizes and warm-up of the backbones that the stage trains itself; read only when kind is embedded."""

    seed: NonNegativeInt
    device: Literal["auto", "cpu", "cuda"]  # auto: cuda where there is one
    num_threads: PositiveInt  # of torch on the CPU; part of the result: another number gives other last bits
    num_workers: PositiveInt  # processes that draw frames; no part of the result
    image_size: PositiveInt  # px: 56, 112 or 224
    patch_size: PositiveInt  # px: a quarter of image_size, or what divides it
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
    vocabulary_size: int = Field(ge=259)  # at most; 3 special tokens, the 256 bytes, then merges
    max_positions: PositiveInt

    @model_validator(mode="after")
    def _heads_divide(self):
        if self.vision_width % self.vision_heads:
            raise ValueError(
                f"vision_heads is {self.vision_heads}, which does not divide vision_width {self.vision_width}"
            )
        if self.language_width % (2 * self.language_heads):  # rotary embeddings turn pairs
            raise ValueError(
                f"language_width is {self.language_width}, no multiple of twice the "
                f"language_heads {self.language_heads}"
            )
        if self.language_heads % self.language_kv_heads:
            raise ValueError(
                f"language_kv_heads is {self.language_kv_heads}, which does not divide language_heads "
                f"{self.language_heads}"
            )
        return self


class Section(StrictModel):
    kind: Literal["embedded", "local", "hub"]
    local: Local
    hub: Hub
    embedded: Embedded
