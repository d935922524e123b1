"""Schema of reports/study/<name>/summary.json, which a study writes and the report reads."""

from statistics import fmean
from typing import Literal

from pipeline_steps.common.metrics import Result
from pipeline_steps.common.result import Interval, Share

BETTER, EQUAL, WORSE, UNDECIDED, UNMATCHED = "better", "equal", "worse", "undecided", "unmatched budgets"
EXPLORATORY = "exploratory"
NOT_LEARNED = "not learned: no better than predicting no change"
TOO_FEW, SINGLE_PASS = "too few runs", "single pass"
SEEDS = ["training_seed", "backbones_seed", "data_seed"]  # columns of runs.csv
VIDEOS = "videos"
CLIPS = {VIDEOS: "moving clips", "image": "static clips"}  # groups of the next-frame losses in runs.csv
FINE, COARSE = "fine", "coarse"


class NextFrameGain(Result):
    """Whether planned queries predict the next frame better than static ones, in one group of clips.

    Lists have one entry per run of the arm; null: the run has no such clips, or the network has a single pass.
    """

    loss: dict[str, list[float | None]]
    """By variant: mean squared error of the head. `fine`: the configured number of passes; the others as in
    `NextFrameScore`, and `no_state` (state zeroed)."""
    wins: list[Share | None]
    """Share of clips with fine loss below coarse."""
    gain: list[float | None]
    """(coarse - fine loss) / coarse loss of the run. Fine in networks with a single pass: the loss of the baseline's
    run with the same seeds."""
    interval: Interval | None
    """95 % t-interval of the mean gain; null: fewer than two runs."""
    verdict: Literal["better", "equal", "worse", "undecided", "too few runs", "single pass"]
    """Of planned queries, by the interval. Equal: it lies within the study's `next_frame_margin`. Undecided, too, if
    the study's `confirmation_seeds` alone give another one."""
    differences: list[float]
    """Gain of the baseline minus the arm's, per pair; empty: the baseline, another target, or no pair."""
    differences_interval: Interval | None
    """95 % t-interval of their mean; null: fewer than two pairs."""
    measures: dict[str, list[float | None]] = {}
    """By name: `wins_last_frames`, `token_similarity`, `state_sensitivity` and `previous_sensitivity` of
    `NextFrameScore`."""
    frame_gains: list[float] = []
    """Gain in the frames 1, 2 ... of moving clips, mean over runs, relative to the frame's coarse loss."""
    pass_gains: dict[str, list[float]] = {}
    """By number of frames that moving clips are cut to (`all`: as they are): gain after 1, 2 ... planned passes, mean
    over runs, relative to the coarse loss of these clips."""

    @property
    def reference(self):
        """Loss of the last configured pass, per run."""
        return self.loss.get(FINE, self.loss[COARSE])

    def relative(self, variant):
        """Mean of `ratios`; None without any."""
        ratios = self.ratios(variant)
        return fmean(ratios) if ratios else None

    def ratios(self, variant):
        """Loss of a variant / `reference`, of every run that has both."""
        pairs = zip(self.loss.get(variant, []), self.reference, strict=False)
        return [own / other for own, other in pairs if own is not None and other]

    @property
    def is_learned(self):
        """Of moving clips: whether the head predicts better than that nothing changes; True where it is unknown."""
        ratio = self.relative("unchanged")
        return ratio is None or ratio > 1

    def verdict_text(self, margin):
        """The verdict in words; margin: the study's `next_frame_margin`."""
        words = {EQUAL: f"equal within {100 * margin:g}%", SINGLE_PASS: "no planned queries"}
        words |= {BETTER: "planned queries better", WORSE: "planned queries worse"}
        return words.get(self.verdict, self.verdict)

    def known(self, name):
        """The values of `gain`, `wins` or a measure that are not null; [] for a measure that no run has."""
        values = getattr(self, name) if name in ("gain", "wins") else self.measures.get(name, [])
        return [value for value in values if value is not None]


class ArmResult(Result):
    """The finished runs of an arm at a budget; lists have one entry per run."""

    arm: str
    """Name of the arm."""
    budget: str
    """Name of the budget."""
    seeds: list[list[int]]
    """Seeds of training, backbones and data."""
    groups: dict[str, list[float]]
    """By group of tasks: mean token accuracy, autoregressive mode."""
    exact_match: list[float | None]
    """Share of generated answers that are right, mean over tasks."""
    num_above_plateau: int
    """Runs whose mean token accuracy is at least the study's `plateau`."""
    num_converged: int
    """Runs whose validation loss had stopped falling."""
    num_measured: int
    """Runs for which that could be measured."""
    training_samples: float
    """Mean over runs."""
    training_flops: float
    """Mean over runs."""
    training_seconds: float | None
    """Median over runs without interruption; null: there is none."""
    answers_trained: bool = True
    """Whether stage 2 or 3 trains answers; if not, accuracies are no result."""
    next_frame: dict[str, NextFrameGain] = {}
    """By group of clips (`CLIPS`); empty: not trained to predict the next frame."""

    def prediction_verdict(self, group, margin):
        """The verdict on planned queries in a group of clips, in words; none for a head that has learned nothing.
        margin: the study's `next_frame_margin`."""
        moving = self.next_frame.get(VIDEOS)
        return NOT_LEARNED if moving and not moving.is_learned else self.next_frame[group].verdict_text(margin)


class ComparisonResult(Result):
    """The baseline against an arm in a group of tasks, over pairs of runs with equal seeds."""

    arm: str
    """Name of the arm, with its budget if the study has several."""
    baseline: str
    """The arm that it is compared with."""
    group: str
    """Name of the group of tasks."""
    differences: list[float]
    """Accuracy of the baseline minus the arm's, per pair."""
    interval: tuple[float, float] | None
    """95 % t-interval of the mean difference; null: one pair."""
    bounded_interval: tuple[float, float]
    """95 % interval for any distribution."""
    p_value: float
    """Exact sign-flip test, two-sided."""
    p_adjusted: float
    """The same after Holm's correction for the headline questions."""
    verdict: Literal["better", "equal", "worse", "undecided", "too few runs", "unmatched budgets", "exploratory"]
    """Of the baseline; exploratory: not among the study's headline questions."""
    smallest_margin: float | None
    """Margin with which these runs would be called equal; null: too few runs."""
    matched: str | None
    """What the budgets have in common: samples, FLOPs, both, or convergence (every run has converged); null: nothing,
    or unknown."""
    num_not_converged: int
    """Runs of both arms whose validation loss was still falling."""
    num_unmeasured: int = 0
    """Runs of both arms for which that could not be measured."""
    beats_blind: bool | None = None
    """Whether one of the arms is better in these tasks than it is with grey frames, by more than the margin; null: not
    measured. If not, being equal says nothing: the verdict is `undecided`."""

    @property
    def num_measured(self):
        """Runs of both arms for which convergence was measured."""
        return 2 * len(self.differences) - self.num_unmeasured

    @property
    def convergence(self):
        """How many runs had not converged, in words; "" if all had."""
        if not self.num_measured:
            return "convergence not measured"
        text = f"{self.num_not_converged} of {self.num_measured}"
        if self.num_unmeasured:
            return f"{text} measured not converged, {self.num_unmeasured} not measured"
        return f"{text} runs not converged" if self.num_not_converged else ""


class Series(Result):
    """One way of training at several sizes."""

    name: str
    """Name of the series."""
    arms: list[str]
    """Names of its arms, smallest network first."""


class StudySummary(Result):
    """What a study has found so far."""

    name: str
    """File name in conf/study."""
    question: str
    """What the study asks."""
    baseline: str
    """The first arm."""
    num_runs: int
    """Finished runs."""
    num_planned: int
    """All runs."""
    margin: float
    """Differences below it count as none."""
    next_frame_margin: float = 0.01
    """Gains of planned queries in next-frame prediction below it count as none."""
    confirmation_seeds: list[int] = []
    """Seeds that alone have to give the verdict on such gains, too."""
    plateau: float
    """Mean token accuracy from which a run has left the plateau."""
    split: str = "test"
    """Split that was scored; studies that choose a recipe score the validation split."""
    group_tasks: dict[str, list[str]] = {}
    """Tasks of every group of `comparisons`; empty in files of an earlier version."""
    series: list[Series] = []
    """Of a scaling grid, in the study's order."""
    arms: list[ArmResult]
    """In the study's order."""
    comparisons: list[ComparisonResult]
    """Every arm and group of tasks, where both arms train answers."""
