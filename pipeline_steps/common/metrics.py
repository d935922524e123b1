"""Schemas of the result files (docs/metrics.md) and their deterministic JSON form.

`reports/metrics/evaluation.json` is an `EvaluationResult`, `reports/metrics/flops.json` a `FlopsResult`,
`reports/metrics/streaming.json` a `StreamingResult`. The stage that writes a file and the report that reads it both
validate it here. The same inputs give the same bytes: floats are rounded to 6 decimals, keys are sorted, and nothing
that changes between two runs (times, paths, commits) is stored.
"""

from pathlib import Path
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from pipeline_steps.common import files
from pipeline_steps.common.errors import UserError

SCORINGS = ("letter", "likelihood", "generation")  # of multiple choice

Share = Annotated[float, Field(ge=0, le=1)]
Interval = tuple[float, float]


class Result(BaseModel):
    """Base of everything in a result file: unknown keys, NaN and infinity are errors."""

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)


class Score(Result):
    """Loss and accuracy over the scored answer tokens of a group of items, each token counting the same."""

    loss: float  # nats per scored answer token
    accuracy: Share  # share of scored answer tokens that are the most likely one, given the true answer so far
    num_items: int = Field(ge=1)
    num_tokens: int = Field(ge=1)
    loss_interval: Interval  # 95 %, bootstrap over items
    accuracy_interval: Interval


class MeanScore(Result):
    """Unweighted mean over the tasks."""

    loss: float
    accuracy: Share


class Gap(Result):
    """Autoregressive loss divided by fine loss: what the parallel form of training hides. 1 = nothing."""

    loss_ratio: float
    interval: Interval  # 95 %, paired bootstrap over items


class Gaze(Result):
    """Where the last vision layer's attention (mean over heads) lies, over the frames with a planned query (all but
    the first)."""

    peak_on_target: Share  # share of frames whose strongest patch is one of the target's
    peak_on_target_interval: Interval
    peak_on_any_object: Share
    mass_on_target: Share  # share of the attention to patches (class token left out)
    chance: Share  # share of the patches that are the target's: a peak anywhere
    chance_among_objects: Share  # the same among the patches of all objects: a peak on some object
    num_frames: int = Field(ge=1)
    per_layer: list[Share]  # peak_on_target of each vision layer
    per_head: list[list[Share]] | None = None  # peak_on_target of each head of each vision layer
    mass_per_head: list[list[Share]] | None = None  # mass_on_target of each head of each vision layer
    per_frame: list[Share | None]  # peak_on_target of each frame position, the first one included; null: never visible


class GazeDifference(Result):
    """Autoregressive peak_on_target minus a reference's, over the same frames."""

    peak_on_target: float
    interval: Interval  # 95 %, paired bootstrap over items
    num_frames: int = Field(ge=1)


class Control(Result):
    """A control minus the autoregressive mode, on the items that both scored: what it costs to take something away."""

    loss_difference: float  # nats per scored answer token
    loss_interval: Interval  # 95 %, paired bootstrap over items
    accuracy_difference: float
    accuracy_interval: Interval
    num_items: int = Field(ge=1)


class PerFrame(Result):
    """Answers that name something in every frame after the first: scores by the frame that a token is about; null:
    nothing is asked of that frame."""

    loss: list[float | None]
    accuracy: list[Share | None]
    num_items: list[int]


class View(Result):
    """A part of the clips in autoregressive mode, against all frames of the same clips."""

    loss: float
    accuracy: Share
    all_frames_loss: float  # the same items with all their frames
    all_frames_accuracy: Share
    loss_difference: float
    loss_interval: Interval  # of the difference, 95 %, paired bootstrap over items
    answers_changed: Share  # share of items of which a scored token's prediction is another one
    answers_changed_interval: Interval
    tokens_changed: Share  # share of scored tokens whose prediction is another one
    num_items: int = Field(ge=1)


class Check(Result):
    """One automated diagnostic: `value` must lie within `low` and `high` (null: no bound)."""

    verdict: Literal["ok", "suspicious", "not applicable"]
    value: float | None  # null: not applicable
    low: float | None
    high: float | None
    meaning: str  # what the value is
    reason: str  # what a value out of bounds points to; or why the check does not apply


class Diagnostics(Result):
    checks: dict[str, Check]
    entropy: dict[str, list[list[Share]]]  # by mode, layer, head: entropy of attention as a share of the greatest
    peak: dict[str, list[list[Share]]]  # by mode, layer, head: the largest attention weight, mean over frames
    num_items: int = Field(ge=1)
    num_frames: int = Field(ge=1)


class Generation(Result):
    """Greedy answers in autoregressive mode."""

    exact_match: Share
    num_items: int = Field(ge=1)


class ChoiceScore(Result):
    """Share of multiple-choice items whose right option is chosen; intervals: 95 %, bootstrap over items."""

    accuracy: Share
    interval: Interval
    blind: Share  # the same with grey frames
    blind_interval: Interval
    gain: float = Field(ge=-1, le=1)  # accuracy - blind
    gain_interval: Interval  # items resampled in pairs


class MultipleChoice(Result):
    """Items with options, of one source and task or of all."""

    num_items: int = Field(ge=1)
    chance: Share  # mean of 1 / number of options
    scorings: dict[str, ChoiceScore]  # SCORINGS
    no_option: Share  # generated answers that are none of the options: they count as wrong
    blind_no_option: Share
    letters: dict[str, dict[str, Share]]  # "correct" and SCORINGS: how often each letter is right, or chosen
    position_bias: dict[
        str, Share | None
    ]  # distance of the letters chosen from those that are right; null: none chosen


class CaptionStyle(Result):
    """How a group of texts is written, whatever it says. Words: lower case, without punctuation."""

    num_words: float  # mean
    empty: Share  # texts without a word
    repetition: Share  # phrases of four words that their own text has said before
    distinct_1: Share | None  # different words / words, over all texts; null: no words
    distinct_2: Share | None  # the same of pairs of words
    same_opening: Share  # texts that begin with the most frequent first three words
    same_text: Share  # texts that are the most frequent one


class Missed(Result):
    """What the texts name of the attributes that the packed sample knows."""

    complete_miss: Share  # texts that name none
    interval: Interval  # 95 %, bootstrap over items
    named: Share  # of a text's attributes, mean over texts
    num_items: int = Field(ge=1)


class CaptionScore(Result):
    cider: float | None  # CIDEr-D, 0 to 10; null: fewer than two items
    cider_interval: Interval | None
    bleu: Share  # of the whole group, BLEU-4
    meteor: Share  # equal words and stems, no synonyms
    meteor_interval: Interval
    missed: dict[str, Missed]  # 'colour', 'digit', 'bound' (a colour and its own digit); those that are known
    style: CaptionStyle


class Captions(Result):
    """Free answers of a task."""

    num_items: int = Field(ge=1)
    modes: dict[str, CaptionScore]  # CAPTION_MODES
    reference: CaptionStyle  # of the true answers
    overlap_fine_coarse: Share  # words that an item's fine and coarse answers share
    overlap_interval: Interval
    same_fine_coarse: Share  # items whose fine and coarse answers are equal


class EvaluationResult(Result):
    """A key that is null by default is one that the evaluation did not measure."""

    tasks: dict[str, dict[str, Score]] = Field(min_length=1)
    mean: dict[str, MeanScore]
    gap: dict[str, Gap]
    text: Score | None  # text-only samples; null where the split has none
    chance: dict[str, Share | None]  # null for a task that the training split does not have
    gaze: dict[str, dict[str, Gaze]]  # tasks whose items name a target with known boxes
    generation: dict[str, Generation]
    multiple_choice: dict[str, MultipleChoice] = {}  # by 'source/task', and 'all'; empty: no item has options
    captions: dict[str, Captions] = {}  # by task; empty: no item has a free answer
    provenance: dict
    sources: dict[str, dict[str, dict[str, Score]]] | None = None  # by source, task, mode
    controls: dict[str, dict[str, Control]] | None = None  # by task, control (blind and random_query too)
    gaze_difference: dict[str, dict[str, GazeDifference]] | None = None  # by task, reference: chance, coarse, oracle
    per_frame: dict[str, dict[str, PerFrame]] | None = None  # by task, mode; tasks with an answer per frame
    temporal: dict[str, dict[str, View]] | None = None  # by task, part of the clip (VIEWS)
    diagnostics: Diagnostics | None = None


class Components(Result):
    """FLOPs per sample (2 per multiply-accumulate)."""

    vision_encoder: float
    query_passes: float
    connector: float
    planner: float
    language_model: float
    vocabulary_projection: float


class ModeFlops(Result):
    components: Components  # of one forward pass with loss
    language_passes: list[float]  # the language model's passes: the planning passes, then the full sequence
    language_positions: list[float]  # positions of each
    num_query_passes: float  # per frame; 0: the network has no queries
    total: float  # sum of the components
    backward: float  # where every weight is trained


class AnswerCost(Result):
    """An answer in autoregressive mode, at the mean lengths (pipeline_steps/flops/serving.py)."""

    num_prompt_tokens: int  # visual tokens included
    num_answer_tokens: int = Field(ge=1)
    prefill: float  # FLOPs until the first token
    first_decoded_token: float  # FLOPs of the second token
    per_decoded_token: float  # mean of all after the first
    total: float
    key_value_bytes: int  # the language model's cache at the last token
    vision_bytes: int  # keys and values that the queries look at


class TrainingMemory(Result):
    """Bytes of the activations of one training sample: an estimate (pipeline_steps/flops/serving.py)."""

    vision_bytes: int
    query_bytes: int
    language_bytes: int
    vocabulary_bytes: int


class BudgetSamples(Result):
    """Training samples that a compute budget pays for."""

    budget: float  # FLOPs
    scale: str
    arm: str
    flops_per_sample: float
    num_samples: int
    predecessor_flops_per_sample: float  # as the predecessor counted
    predecessor_num_samples: int


class CountStep(Result):
    """One reason why the predecessor's count of a training sample differs, and the count after it is put right."""

    reason: str
    flops_per_sample: float


class Frontier(Result):
    """Cost over the number of frames for one size of language model."""

    num_frames: list[int]
    foveated: list[float]  # autoregressive forward pass
    multi_token: list[float]
    foveated_training: list[float]
    multi_token_training: list[float]
    vision_share: list[Share]  # of the foveated forward pass: vision encoder and queries
    cheaper_from: int | None  # frames from which one token a frame costs less than several; null: nowhere on the curve
    cheaper_training_from: int | None


class FlopsResult(Result):
    modes: dict[str, ModeFlops]  # this model: coarse, fine, autoregressive
    arms: dict[str, ModeFlops]  # autoregressive (or only) mode of the networks that a fair comparison trains separately
    training_sample: float  # this network: one training sample, forward and backward
    training: dict[str, float]  # one training sample of each arm
    curves: dict[str, list[float]]  # "num_frames", and each arm's total over it at the mean text length
    answers: dict[str, AnswerCost]  # of each arm
    memory: dict[str, TrainingMemory]  # of each arm
    budgets: list[BudgetSamples]  # iso-FLOP: samples per budget, scale and arm, at the predecessor's lengths
    corrections: dict[str, list[CountStep]]  # "SCALE ARM": from the predecessor's count to ours
    frontier: dict[str, Frontier]  # by language model
    per: str
    assumptions: dict


class Served(Result):
    """What a run serves of some items: of a source and task, or of all."""

    num_items: int = Field(ge=0)  # that there are
    num_samples: int = Field(ge=0)  # served: an item as often as it is
    share: Share  # of the run's samples
    epochs: float = Field(ge=0)  # num_samples / num_items
    num_frames: int = Field(ge=0)  # a still as often as it is shown
    text_tokens: int = Field(ge=0)
    visual_tokens: int = Field(ge=0)
    num_truncated: int = Field(ge=0)  # samples whose chat lost its last turns to tokens.max_tokens


class StageServed(Result):
    num_steps: int = Field(ge=1)
    sources: dict[str, dict[str, Served]]  # by source and task
    total: Served
    unserved: dict[str, int]  # items that no entry of the mixture takes, by 'source/task'


class StreamingResult(Result):
    stages: dict[str, StageServed]


def write_json(path, result):
    """Writes a `Result` as deterministic JSON, whole or not at all."""
    files.write_json(path, _rounded(result.model_dump(mode="json")))


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


def _rounded(value):
    if isinstance(value, float):
        return round(value, 6) + 0.0  # + 0.0: no negative zero
    if isinstance(value, dict):
        return {str(key): _rounded(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_rounded(item) for item in value]
    return value
