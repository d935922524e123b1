"""What a run was trained with, and which runs were trained with the same: comparisons at equal samples (iso-sample)
and at equal compute (iso-FLOP) answer different questions and are never mixed."""

import json
from dataclasses import dataclass

from pipeline_steps.common.errors import UserError
from pipeline_steps.common.metrics import FlopsResult, read_json

STAGES = ("stage1", "stage2", "stage3")
TOLERANCE = 0.02  # budgets that differ by less count as equal
ISO_SAMPLE, ISO_FLOP, UNMATCHED, UNKNOWN = "iso-sample", "iso-FLOP", "unmatched", "unknown"
NAMES = {
    ISO_SAMPLE: "equal training samples (iso-sample)",
    ISO_FLOP: "equal training compute (iso-FLOP)",
    UNMATCHED: "neither equal training samples nor equal training compute",
    UNKNOWN: "training budget not kept",
}


@dataclass(frozen=True)
class Budget:
    num_samples: int  # of all training stages
    flops: float  # of all training stages, every sample counted as the mean one with frames


def budget_of(stages, flops):
    """`Budget` from the training stages' records {stage: content of its json} and a `FlopsResult`, or None where a
    stage is missing."""
    if set(stages) != set(STAGES) or any("mixture" not in values for values in stages.values()):
        return None
    num_samples = sum(entry["num_samples"] for values in stages.values() for entry in values["mixture"].values())
    return Budget(num_samples, num_samples * flops.training_sample)


def read_budget(folder):
    """`Budget` of a kept run, or None where its folder lacks stage1.json, stage2.json, stage3.json or flops.json."""
    paths = {stage: folder / f"{stage}.json" for stage in STAGES}
    if not all(path.exists() for path in (*paths.values(), folder / "flops.json")):
        return None
    flops = read_json(folder / "flops.json", FlopsResult, "python -m pipeline_steps.flops")
    stages = {}
    for stage, path in paths.items():
        try:
            stages[stage] = json.loads(path.read_text(encoding="utf-8"))
        except json.JSONDecodeError as error:
            raise UserError(f"{path}: not valid JSON ({error}): keep the run's file anew") from None
    return budget_of(stages, flops)


def kind_of(base, arms):
    """How the budgets of two lists of runs compare, paired by position: one of NAMES."""
    pairs = [(own.budget, other.budget) for own, other in zip(base, arms, strict=True)]
    if any(budget is None for pair in pairs for budget in pair):
        return UNKNOWN
    for kind, name in ((ISO_SAMPLE, "num_samples"), (ISO_FLOP, "flops")):
        ratios = [getattr(other, name) / getattr(own, name) for own, other in pairs]
        if all(abs(ratio - 1) <= TOLERANCE for ratio in ratios):
            return kind
    return UNMATCHED


def ratios_of(base, arms):
    """(training samples, training compute) of the arm divided by the baseline's, means over the runs; None: unknown."""
    if kind_of(base, arms) == UNKNOWN:
        return None
    return tuple(
        sum(getattr(run.budget, name) for run in arms) / sum(getattr(run.budget, name) for run in base)
        for name in ("num_samples", "flops")
    )
