"""Parameters of the `backbones` stage (section `backbones` of params.yaml)."""

from typing import Literal

from pydantic import Field, NonNegativeInt, PositiveFloat, PositiveInt, model_validator

from pipeline_steps.common.params import StrictModel


class Local(StrictModel):
    """Folders of backbones that exist already; read only when kind is local."""

    vision_path: str | None
    """Folder of the vision encoder."""
    language_path: str | None
    """Folder of the language model and its tokenizer, or a `.gguf` file (needs the extra `pretrained`)."""


class Repository(StrictModel):
    """A model on the Hugging Face Hub."""

    repository: str = Field(pattern=r"^[\w.-]+/[\w.-]+$")
    """Repository on the Hugging Face Hub, `owner/name`."""
    revision: str = Field(pattern=r"^[0-9a-f]{40}$")
    """Commit (40 hex digits); branches and tags can move."""


class Hub(StrictModel):
    """Backbones to download; read only when kind is hub."""

    vision: Repository
    """The vision encoder."""
    language: Repository
    """The language model and its tokenizer."""


class Embedded(StrictModel):
    """Sizes and warm-up of the backbones that the stage trains itself; read only when kind is embedded."""

    seed: NonNegativeInt
    """Seed of the initial weights and of the warm-up data."""
    device: Literal["auto", "cpu", "cuda"]
    """Device of the warm-up; `auto` uses a GPU if there is one."""
    num_threads: PositiveInt
    """CPU threads of torch. Another number changes the last bits of the result."""
    image_size: PositiveInt
    """Side of the square frames in pixels: 56, 112 or 224."""
    patch_size: PositiveInt
    """Side of a patch in pixels: a quarter of `image_size` or a divisor of that."""
    vision_width: PositiveInt
    """Hidden size of the vision encoder."""
    vision_layers: PositiveInt
    """Layers of the vision encoder."""
    vision_heads: PositiveInt
    """Attention heads of the vision encoder."""
    vision_steps: PositiveInt
    """Warm-up steps of the vision encoder."""
    vision_batch_size: PositiveInt
    """Frames per warm-up step."""
    vision_learning_rate: PositiveFloat
    """Peak learning rate of the vision warm-up."""
    language_width: PositiveInt
    """Hidden size of the language model."""
    language_layers: PositiveInt
    """Layers of the language model."""
    language_heads: PositiveInt
    """Attention heads of the language model."""
    language_kv_heads: PositiveInt
    """Key-value heads (grouped-query attention)."""
    language_steps: PositiveInt
    """Warm-up steps of the language model."""
    language_batch_size: PositiveInt
    """Chats per warm-up step."""
    language_learning_rate: PositiveFloat
    """Peak learning rate of the language warm-up."""
    vocabulary_size: int = Field(ge=259)
    """Upper limit of the BPE vocabulary: 3 special tokens, 256 bytes, then merges."""
    max_positions: PositiveInt
    """Longest sequence of the language model, in tokens."""

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
    """`embedded` trains small backbones; `hub` downloads pretrained ones; `local` reads folders."""
    local: Local
    """Existing folders."""
    hub: Hub
    """Pinned repositories."""
    embedded: Embedded
    """Sizes and warm-up of the embedded backbones."""
