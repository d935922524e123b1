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
    """Loss with zero state."""
    state_sensitivity: float | None = None
    """Relative change of the prediction / of the input."""
    previous_sensitivity: float | None = None
    """Relative change of the prediction / of the input."""


class NextFrameResult(Result):
    settings: dict
    """The objective's parameters."""
    groups: dict[str, NextFrameScore]
    """By task, and all clips (`videos`)."""
    passes: dict[str, dict[str, float]]
    """By number of frames and pass: loss of clips cut to so many frames (`all`: as they are)."""


class TemperatureScore(Result):
    """The finished network with another attention temperature, autoregressive mode, not trained with it."""

    factor: float = Field(gt=0)
    """Of the trained temperature."""
    loss: float
    """As in Score."""
    accuracy: Share
    """As in Score."""
    entropy: Share
    """Last layer: relative entropy, largest weight, strongest tenth."""
    peak: Share
    """Last layer: relative entropy, largest weight, strongest tenth."""
    top_tenth: Share
    """Last layer: relative entropy, largest weight, strongest tenth."""


class PreliminaryDiagnostics(Result):
    """The predecessor's five (pipeline_steps/evaluation/preliminary.py). Null or empty: see `not_measured`."""

    previous_latent: dict[str, float] | None
    """1: next-frame loss, and without an input."""
    feature_similarity: dict[str, float] | None
    """2: tokens of two queries."""
    temperature: list[TemperatureScore]
    """3: other temperatures."""
    query_projection: dict[str, float] | None
    """4: cosine of planned and static queries."""
    head_sensitivity: dict[str, float] | None
    """5: as in NextFrameScore."""
    not_measured: dict[str, str]
    """Reasons."""
    num_items: int = Field(ge=1)
    """Counts."""
