"""Settings of the next-frame objective: a section of training.<stage>.objective, also saved with a trained head."""

from typing import Literal

from pydantic import Field, NonNegativeFloat, PositiveInt, model_validator

from pipeline_steps.common.params import StrictModel


class Modes(StrictModel):
    """Relative weights of the kinds of batches; one kind is drawn per step."""

    joint: NonNegativeFloat
    """Text loss and next-frame loss."""
    video_only: NonNegativeFloat
    """Next-frame loss, frames without text."""
    text_conditioned: NonNegativeFloat
    """Next-frame loss, text before the frames shown."""
    captions: NonNegativeFloat
    """Text loss alone."""

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
    """Weight of the last pass's loss."""
    coarse_weight: NonNegativeFloat
    """Coarse pass's weight / `weight`; 0: logged only."""
    target: Literal["latent", "delta", "flow"]
    """The next frame's latent, its change, or the optical flow."""
    autoencoder: str | None
    """Folder of an `AutoencoderKL`; null: for `flow` without previous latent."""
    previous_latent: Literal["keep", "drop", "noise", "none"]
    """This frame's latent as second input: kept, in training dropped or noisy, or none."""
    drop_probability: float = Field(ge=0, le=1)
    """With `drop`: share of zeroed latents."""
    noise_std: NonNegativeFloat
    """With `noise`: its standard deviation (latents: 1)."""
    skip_query: bool
    """Give the head the query, too."""
    separate_heads: bool
    """A head each for coarse and planned passes."""
    l1_weight: NonNegativeFloat
    """Weight of the absolute error."""
    head_width: PositiveInt
    """Channels of the head."""
    modes: Modes
    """Kinds of batches."""

    @model_validator(mode="after")
    def _options_fit(self):
        if not self.weight:
            return self
        if not sum(self.modes.weights.values()) - self.modes.captions:
            raise ValueError(
                f"weight is {self.weight:g} but all modes except captions are 0: nothing would be predicted. Raise "
                "modes.joint, video_only or text_conditioned, or set weight to 0"
            )
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
