"""Settings of the next-frame objective: a section of training.<stage>.objective, also saved with a trained head."""

from typing import Literal

from pydantic import Field, NonNegativeFloat, PositiveInt, model_validator

from pipeline_steps.common.params import StrictModel


class Modes(StrictModel):
    """Relative weights of the kinds of batches; one kind is drawn per step."""

    joint: NonNegativeFloat
    """Text loss and next-frame loss."""
    video_only: NonNegativeFloat
    """Next-frame loss; the network sees the frames without any text."""
    text_conditioned: NonNegativeFloat
    """Next-frame loss; the text before the frames is shown."""
    captions: NonNegativeFloat
    """Text loss, as with weight 0; of captions where the mixture has nothing else."""

    @model_validator(mode="after")
    def _some_mode(self):
        if not sum(self.weights.values()):
            raise ValueError("all weights are 0: raise one, for example joint")
        return self

    @property
    def weights(self) -> dict[str, float]:
        return {"joint": self.joint, "video_only": self.video_only} | {
            "text_conditioned": self.text_conditioned,
            "captions": self.captions,
        }


class NextFrameSettings(StrictModel):
    """Prediction of the next frame from the language model's state after a frame."""

    weight: NonNegativeFloat
    """Weight of the loss of the last pass; 0: no next-frame objective."""
    coarse_weight: NonNegativeFloat
    """Weight of the coarse pass's loss, in multiples of `weight`; 0: logged only."""
    target: Literal["latent", "delta", "flow"]
    """The next frame's latent, its difference to this frame's, or the optical flow between them."""
    autoencoder: str | None
    """Folder of an `AutoencoderKL` in diffusers' format; null: none, for `flow` without previous latent only."""
    previous_latent: Literal["keep", "drop", "noise", "none"]
    """The head's second input, this frame's latent: kept, in training dropped or noisy, or none."""
    drop_probability: float = Field(ge=0, le=1)
    """With `drop`: share of frames whose latent is replaced by zeros."""
    noise_std: NonNegativeFloat
    """With `noise`: standard deviation of Gaussian noise on latents of unit variance."""
    skip_query: bool
    """Give the head the frame's query, too."""
    separate_heads: bool
    """A head each for the coarse and the planned passes."""
    l1_weight: NonNegativeFloat
    """Weight of the absolute error beside the squared one."""
    head_width: PositiveInt
    """Channels of the head."""
    modes: Modes
    """Kinds of batches."""

    @model_validator(mode="after")
    def _options_fit(self):
        if not self.weight:
            return self
        if self.separate_heads and not self.coarse_weight:
            raise ValueError(
                "separate_heads is true but coarse_weight is 0: the coarse head would not be trained. Change one"
            )
        if self.autoencoder is None and (self.target, self.previous_latent) != ("flow", "none"):
            raise ValueError(
                f"autoencoder is null, but target {self.target} with previous_latent {self.previous_latent} needs "
                "latents. Give a folder, or use target flow with previous_latent none"
            )
        return self
