"""Schemas of the result files (docs/metrics.md) and their deterministic JSON form.

`outputs/metrics/evaluation.json` is an `EvaluationResult`, `outputs/metrics/flops.json` a `flop_results.FlopsResult`,
`outputs/metrics/streaming.json` a `StreamingResult`, `reports/runs/<ablation>-seed<k>.json` a `KeptRun`.
The stage that writes a file and the report that reads it both validate it here. The same
inputs give the same bytes: floats are rounded (`rounded`), keys are sorted, and nothing that changes between two runs
(times, paths, commits) is stored.
"""

from pathlib import Path

from pydantic import Field, ValidationError, model_validator

from pipeline_steps.common import files
from pipeline_steps.common.caption_results import CaptionParts, Captions
from pipeline_steps.common.diagnostic_results import Diagnostics, NextFrameResult, PreliminaryDiagnostics
from pipeline_steps.common.errors import UserError
from pipeline_steps.common.result import Interval, Result, Share

SCORINGS = ("letter", "likelihood", "generation")  # of multiple choice


class Score(Result):
    """Loss and accuracy over the scored answer tokens of a group of items, each token counting the same."""

    loss: float
    """Nats per scored token."""
    accuracy: Share
    """Token accuracy, teacher-forced."""
    num_items: int = Field(ge=1)
    """Counts."""
    num_tokens: int = Field(ge=1)
    """Counts."""
    loss_interval: Interval
    """Interval."""
    accuracy_interval: Interval
    """Interval."""


class MeanScore(Result):
    """Unweighted mean over the tasks."""

    loss: float
    """Means over tasks."""
    accuracy: Share
    """Means over tasks."""


class Gap(Result):
    """Autoregressive loss divided by fine loss: what the parallel form of training hides. 1 = nothing."""

    loss_ratio: float
    """Autoregressive loss / fine loss."""
    interval: Interval
    """Interval."""


class Gaze(Result):
    """Where the last vision layer's attention (mean over heads) lies, over the frames with a planned query (all but
    the first)."""

    peak_on_target: Share
    """Share of frames whose strongest patch is the target's."""
    peak_on_target_interval: Interval
    """Interval."""
    peak_on_any_object: Share
    """The same for any object."""
    mass_on_target: Share
    """Share of patch attention on the target."""
    chance: Share
    """The target's share of all patches."""
    chance_among_objects: Share
    """The target's share of all object patches."""
    num_frames: int = Field(ge=1)
    """Counts."""
    per_layer: list[Share]
    """`peak_on_target` by layer, head or frame."""
    per_head: list[list[Share]] | None = None
    """`peak_on_target` by layer, head or frame."""
    mass_per_head: list[list[Share]] | None = None
    """`mass_on_target` by layer and head."""
    per_frame: list[Share | None]
    """`peak_on_target` by layer, head or frame."""


class GazeDifference(Result):
    """Autoregressive peak_on_target minus a reference's, over the same frames."""

    peak_on_target: float
    """Autoregressive minus reference."""
    interval: Interval
    """Interval."""
    num_frames: int = Field(ge=1)
    """Counts."""


class Control(Result):
    """A control minus the autoregressive mode, on the items that both scored: what it costs to take something away."""

    loss_difference: float
    """Control minus autoregressive."""
    loss_interval: Interval
    """Interval."""
    accuracy_difference: float
    """Control minus autoregressive."""
    accuracy_interval: Interval
    """Interval."""
    num_items: int = Field(ge=1)
    """Counts."""


class PerFrame(Result):
    """Answers that name something in every frame after the first: scores by the frame that a token is about; null:
    nothing is asked of that frame."""

    loss: list[float | None]
    """By frame."""
    accuracy: list[Share | None]
    """By frame."""
    num_items: list[int]
    """By frame."""


class View(Result):
    """A part of the clips in autoregressive mode, against all frames of the same clips."""

    loss: float
    """On the part."""
    accuracy: Share
    """On the part."""
    all_frames_loss: float
    """Same items, all frames."""
    all_frames_accuracy: Share
    """Same items, all frames."""
    loss_difference: float
    """Part minus full."""
    loss_interval: Interval
    """Interval."""
    answers_changed: Share
    """Share of items with a changed token."""
    answers_changed_interval: Interval
    """Interval."""
    tokens_changed: Share
    """Share of changed tokens."""
    num_items: int = Field(ge=1)
    """Counts."""


class Generation(Result):
    """Greedy answers in autoregressive mode."""

    exact_match: Share
    """Share of correct answers."""
    num_items: int = Field(ge=1)
    """Counts."""


class ChoiceScore(Result):
    """Share of multiple-choice items whose right option is chosen; intervals: 95 %, bootstrap over clips."""

    accuracy: Share
    """Share of right choices."""
    interval: Interval
    """Interval."""
    blind: Share
    """The same, blind."""
    blind_interval: Interval
    """Interval."""
    gain: float = Field(ge=-1, le=1)
    """`accuracy` - `blind`."""
    gain_interval: Interval
    """Interval."""


class MultipleChoice(Result):
    """Items with options, of one source and task or of all."""

    num_items: int = Field(ge=1)
    """Counts."""
    chance: Share
    """Mean of 1 / number of options."""
    scorings: dict[str, ChoiceScore]
    """By scoring."""
    no_option: Share
    """Share of generated answers that match no option."""
    blind_no_option: Share
    """The same, blind."""
    letters: dict[str, dict[str, Share]]
    """Share of each letter, correct or chosen by scoring."""
    position_bias: dict[str, Share | None]
    """Distance between chosen and correct letters, 0 to 1."""


class EvaluationResult(Result):
    """A key that is null by default is one that the evaluation did not measure."""

    tasks: dict[str, dict[str, Score]] = Field(min_length=1)
    """By task and mode."""
    mean: dict[str, MeanScore]
    """By mode."""
    gap: dict[str, Gap]
    """By task."""
    text: Score | None
    """Text-only samples."""
    chance: dict[str, Share | None]
    """By task: commonest training token at each position."""
    gaze: dict[str, dict[str, Gaze]]
    """By task and mode."""
    generation: dict[str, Generation]
    """By task."""
    mean_exact_match: Share | None = None
    """Unweighted mean over tasks."""
    multiple_choice: dict[str, MultipleChoice] = {}
    """By `source/task`, and `all`."""
    captions: dict[str, Captions] = {}
    """By task."""
    provenance: dict
    """Hashes, split, seed, device, threads, versions."""
    sources: dict[str, dict[str, dict[str, Score]]] | None = None
    """By source, task and mode."""
    controls: dict[str, dict[str, Control]] | None = None
    """By task and control."""
    gaze_difference: dict[str, dict[str, GazeDifference]] | None = None
    """By task and reference: chance, coarse, oracle."""
    per_frame: dict[str, dict[str, PerFrame]] | None = None
    """By task and mode."""
    temporal: dict[str, dict[str, View]] | None = None
    """By task and view."""
    diagnostics: Diagnostics | None = None
    """Automated checks."""
    next_frame: NextFrameResult | None = None
    """Next-frame objective, if the checkpoint has its head."""
    caption_parts: dict[str, CaptionParts] | None = None
    """By task."""
    preliminary: PreliminaryDiagnostics | None = None
    """The predecessor's five diagnostics."""


class SampleCounts(Result):
    """What a run reads of some items: of a source and task, or of all."""

    num_items: int = Field(ge=0)
    """Items available."""
    num_samples: int = Field(ge=0)
    """Samples read, with repeats."""
    share: Share
    """Share of the stage's samples."""
    epochs: float = Field(ge=0)
    """`num_samples` / `num_items`."""
    num_frames: int = Field(ge=0)
    """Of the samples, stills replicated."""
    text_tokens: int = Field(ge=0)
    """Of the samples, stills replicated."""
    visual_tokens: int = Field(ge=0)
    """Of the samples, stills replicated."""
    num_truncated: int = Field(ge=0)
    """Samples shortened to `tokens.max_tokens`."""


class StageCounts(Result):
    num_steps: int = Field(ge=1)
    """Optimizer steps."""
    sources: dict[str, dict[str, SampleCounts]]
    """By source and task."""
    total: SampleCounts
    """All items."""
    unmatched: dict[str, int]
    """Items outside the mixture, by `source/task`."""


class StreamingResult(Result):
    stages: dict[str, StageCounts]
    """By stage."""


class KeptItems(Result):
    """Columns of the autoregressive rows of outputs/evaluation/items.parquet for one task; all of the same length."""

    key: list[str]
    """Key of the sample."""
    item: list[int]
    """Number of the item within its sample."""
    num_tokens: list[int]
    """Scored answer tokens."""
    loss_sum: list[float]
    """Nats, over the scored tokens."""
    num_correct: list[int]
    """Scored tokens that are the most likely one."""

    @model_validator(mode="after")
    def of_one_length(self):
        lengths = {name: len(getattr(self, name)) for name in type(self).model_fields}
        if len(set(lengths.values())) != 1:
            raise ValueError(f"columns of different length: {lengths}")
        return self


class KeptBudget(Result):
    num_samples: int = Field(ge=1)
    """Training samples of all stages."""
    flops: float
    """Training FLOPs of all stages."""


class KeptRun(Result):
    """What later reports need of a finished run: scores, per-item sums for paired intervals, budget and provenance.
    Written by `python -m pipeline_steps.report.keep`."""

    ablation: str
    seed: int
    provenance: dict
    summary: dict[str, float | int | None]  # reports/metrics/summary.json
    budget: KeptBudget
    mean: dict[str, MeanScore]
    tasks: dict[str, dict[str, Score]] = Field(min_length=1)  # by task and mode
    items: dict[str, KeptItems]  # by task


def write_json(path, result):
    """Writes a `Result` as deterministic JSON, whole or not at all."""
    files.write_json(path, rounded(result.model_dump(mode="json")))


def read_json(path, schema, made_by):
    """The file as a `schema` object. UserError when it is absent (naming the command that makes it) or does not
    match."""
    try:
        return schema.model_validate_json(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{path} does not exist: run `{made_by}` first") from None
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(str(part) for part in first["loc"]) or "the whole file"
        raise UserError(
            f"{path}: {error.error_count()} problem(s), the first one at '{key}': {first['msg']}. The file is of "
            f"another version of docs/metrics.md: make it again with `{made_by}`"
        ) from None


def rounded(value):
    """A nested value of JSON with keys as text and floats of six decimals, below .1 of six significant digits and at
    most twelve decimals: quotients of small losses keep their precision, rounding errors of sums do not appear."""
    if isinstance(value, float):
        digits = round(float(f"{value:.6g}"), 12) if abs(value) < 0.1 else round(value, 6)
        return digits + 0.0  # + 0.0: no negative zero
    if isinstance(value, dict):
        return {str(key): rounded(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [rounded(item) for item in value]
    return value
