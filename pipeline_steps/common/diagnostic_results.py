"""Schemas of the results about the network's inner workings: checks, next-frame head, preliminary diagnostics."""

from typing import Literal

from pydantic import Field

from pipeline_steps.common.result import Interval, Result, Share


class Check(Result):
    """One automated diagnostic: `value` must lie within `low` and `high` (null: no bound)."""

    verdict: Literal["ok", "suspicious", "not applicable"]
    """`ok`, `suspicious`, `not applicable`."""
    value: float | None
    """Measured value and bounds."""
    low: float | None
    """Measured value and bounds."""
    high: float | None
    """Measured value and bounds."""
    meaning: str
    """What is measured."""
    reason: str
    """What a value out of bounds indicates, or why the check does not apply."""


class Diagnostics(Result):
    checks: dict[str, Check]
    """By check."""
    entropy: dict[str, list[list[Share]]]
    """By mode, layer, head: attention entropy / its maximum."""
    peak: dict[str, list[list[Share]]]
    """By mode, layer, head: largest attention weight."""
    num_items: int = Field(ge=1)
    """Counts."""
    num_frames: int = Field(ge=1)
    """Counts."""


class NextFrameScore(Result):
    """Mean squared errors of the next-frame head over pairs of consecutive frames."""

    loss: dict[str, float]
    """By variant: `coarse`, `fine_1`.. (planned passes), `autoregressive`, `unchanged` (nothing changes),
    `shuffled_state` (another clip's state), `no_previous` (latent zeroed)."""
    per_frame: dict[str, list[float]]
    """By pass: loss of the frames 1, 2 ... of the clip."""
    ratio: float | None = None
    """Coarse / fine loss; null: a network with one pass."""
    ratio_interval: Interval | None = None
    """Interval."""
    wins: Share | None = None
    """Share of clips with fine loss below coarse, all frames and the last four."""
    wins_last_frames: Share | None = None
    """Share of clips with fine loss below coarse, all frames and the last four."""
    token_similarity: float | None = None
    """Mean cosine of a frame's static and planned token, first frames left out."""
    num_clips: int
    """Counts."""
    num_pairs: int
    """Counts."""
    no_state: float | None = None
    """Loss with the language model's state zeroed."""
    state_sensitivity: float | None = None
    """Relative change of the prediction / of the input (random 10 % step)."""
    previous_sensitivity: float | None = None
    """Relative change of the prediction / of the input (random 10 % step)."""


class NextFrameResult(Result):
    settings: dict
    """The objective's parameters."""
    groups: dict[str, NextFrameScore]
    """By task, and all clips (`videos`)."""
    passes: dict[str, dict[str, float]]
    """By number of frames and pass: loss of clips cut to so many frames (`all`: as they are)."""


class PreviousLatent(Result):
    """Loss of the next-frame head (mean squared error) without one of its inputs."""

    loss: float
    """As trained."""
    no_previous: float | None
    """Previous latent zeroed; null: the head takes none."""
    no_state: float | None
    """State zeroed, or of another clip."""
    shuffled_state: float | None
    """State zeroed, or of another clip."""


class FeatureSimilarity(Result):
    """Visual tokens of the same frames with two queries; planned: fine mode."""

    cosine: dict[str, float]
    """By pair of queries: mean cosine, or distance / mean norm."""
    distance: dict[str, float]
    """By pair of queries: mean cosine, or distance / mean norm."""


class TemperatureScore(Result):
    """The finished network with another attention temperature, autoregressive mode, not trained with it."""

    factor: float = Field(gt=0)
    """Multiple of the trained temperature."""
    loss: float
    """Nats per scored token."""
    accuracy: Share
    """Token accuracy, teacher-forced."""
    entropy: Share
    """Last layer, mean over heads: entropy / its maximum, largest weight, weight of the strongest tenth of places."""
    peak: Share
    """Last layer, mean over heads: entropy / its maximum, largest weight, weight of the strongest tenth of places."""
    top_tenth: Share
    """Last layer, mean over heads: entropy / its maximum, largest weight, weight of the strongest tenth of places."""


class QueryProjection(Result):
    """Mean cosine of planned and static queries before and after the query projection."""

    before: float
    """Mean cosine."""
    after: float
    """Mean cosine."""


class HeadSensitivity(Result):
    """Relative change of the next-frame prediction / of one of its inputs (random 10 % step)."""

    state: float
    """Of the state, or the previous latent; null: the head takes none."""
    previous: float | None
    """Of the state, or the previous latent; null: the head takes none."""


class PreliminaryDiagnostics(Result):
    previous_latent: PreviousLatent | None
    """1: how much the next-frame head relies on the previous latent."""
    feature_similarity: FeatureSimilarity | None
    """2: how much tokens depend on the query."""
    temperature: list[TemperatureScore]
    """3: attention temperature."""
    query_projection: QueryProjection | None
    """4: whether the projection makes queries alike."""
    head_sensitivity: HeadSensitivity | None
    """5: whether the next-frame head reacts to the state."""
    not_measured: dict[str, str]
    """By diagnostic: why it is null or empty."""
    num_items: int = Field(ge=1)
    """Counts."""
