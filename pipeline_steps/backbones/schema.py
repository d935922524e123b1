"""Parameters of the `backbones` stage (section `backbones` of params.yaml)."""

from typing import Literal

from pydantic import Field, NonNegativeInt, PositiveFloat, PositiveInt, model_validator

from pipeline_steps.common.params import StrictModel
from pipeline_steps.world.grid import GRID, SCALES, UNITS


class Local(StrictModel):
    """Folders of backbones that exist already; read only when kind is local."""

    vision_path: str | None
    """Folder or trained checkpoint."""
    language_path: str | None
    """The same with tokenizer, or a `.gguf` file (extra `pretrained`)."""


class Repository(StrictModel):
    """A model on the Hugging Face Hub."""

    repository: str = Field(pattern=r"^[\w.-]+/[\w.-]+$")
    """`owner/name` on the Hub."""
    revision: str = Field(pattern=r"^[0-9a-f]{40}$")
    """Commit hash."""


class Hub(StrictModel):
    """Backbones to download; read only when kind is hub."""

    vision: Repository
    """The vision encoder."""
    language: Repository
    """The language model and its tokenizer."""


class Embedded(StrictModel):
    """Sizes and warm-up of the backbones that the stage trains itself; read only when kind is embedded."""

    seed: NonNegativeInt
    """Seed of weights and warm-up data."""
    device: Literal["auto", "cpu", "cuda"]
    """`auto` prefers a GPU."""
    precision: Literal["fp32", "bf16"]
    """Autocast precision."""
    num_threads: PositiveInt
    """CPU threads; affects rounding."""
    image_size: PositiveInt
    """Frame side: 56, 112 or 224 pixels."""
    patch_size: PositiveInt
    """Patch side; divides a quarter of `image_size`."""
    vision_width: PositiveInt
    """Hidden size."""
    vision_layers: PositiveInt
    """Layers."""
    vision_heads: PositiveInt
    """Attention heads."""
    vision_steps: PositiveInt
    """Warm-up steps."""
    vision_batch_size: PositiveInt
    """Frames or chats per step."""
    vision_learning_rate: PositiveFloat
    """Peak learning rate of the warm-up."""
    vision_queries: Literal["selecting", "reading", "none"]
    """Warm-up queries: each reports the digit of a colour or place, one reports all, or none."""
    vision_downsampling: PositiveInt
    """Every second step of the vision warm-up shows frames reduced by this factor; 1: none."""
    language_width: PositiveInt
    """Hidden size."""
    language_layers: PositiveInt
    """Layers."""
    language_heads: PositiveInt
    """Attention heads."""
    language_kv_heads: PositiveInt
    """Key-value heads."""
    language_steps: PositiveInt
    """Warm-up steps."""
    language_batch_size: PositiveInt
    """Frames or chats per step."""
    language_learning_rate: PositiveFloat
    """Peak learning rate of the warm-up."""
    autoencoder_steps: NonNegativeInt
    """Training steps of the next-frame objective's autoencoder (extra `latents`)."""
    vocabulary_size: int = Field(ge=259)
    """Largest BPE vocabulary."""
    max_positions: PositiveInt
    """Longest sequence (tokens)."""

    @model_validator(mode="after")
    def _heads_divide(self):
        if self.vision_width % self.vision_heads:
            raise ValueError(
                f"vision_width is {self.vision_width}, expected a multiple of vision_heads ({self.vision_heads})"
            )
        if self.language_width % (2 * self.language_heads):  # rotary embeddings turn pairs
            raise ValueError(
                f"language_width is {self.language_width}, expected a multiple of 2 * language_heads "
                f"({2 * self.language_heads})"
            )
        if self.language_heads % self.language_kv_heads:
            raise ValueError(
                f"language_heads is {self.language_heads}, expected a multiple of language_kv_heads "
                f"({self.language_kv_heads})"
            )
        return self


class Section(StrictModel):
    kind: Literal["embedded", "local", "hub"]
    """Train small ones, read folders or download."""
    local: Local
    """Existing folders."""
    hub: Hub
    """Pinned repositories."""
    embedded: Embedded
    """Sizes and warm-up of the embedded backbones."""

    @model_validator(mode="after")
    def _local_is_read(self):
        given = [key for key in ("vision_path", "language_path") if getattr(self.local, key)]
        if given and self.kind != "local":
            raise ValueError(
                f"local.{given[0]} is set, but kind is {self.kind}, so it would not be read: set kind to local, or "
                f"local.{given[0]} to null"
            )
        return self

    @model_validator(mode="after")
    def _patches_subdivide_the_worlds(self):
        """The warm-up renders frames of the procedural world and labels their cells."""
        if self.kind != "embedded":
            return self
        own, sizes = self.embedded, [UNITS * scale for scale in SCALES]
        if own.image_size not in sizes:
            raise ValueError(
                f"embedded.image_size is {own.image_size}, expected one of {', '.join(map(str, sizes))}: the "
                "procedural world supports only these sizes"
            )
        cell = own.image_size // GRID  # px of one of the world's patches, which holds at most one digit
        if cell % own.patch_size:
            raise ValueError(
                f"embedded.image_size is {own.image_size} and patch_size {own.patch_size}, expected a patch_size that "
                f"divides {cell}: the labels of the warm-up refer to cells of {cell} x {cell} px"
            )
        if cell // own.patch_size % own.vision_downsampling:
            raise ValueError(
                f"embedded.vision_downsampling is {own.vision_downsampling}, expected a divisor of "
                f"{cell // own.patch_size}: a cell of {cell} px has so many patches of {own.patch_size} px a side, "
                "and a reduced patch may not reach beyond its cell"
            )
        return self
