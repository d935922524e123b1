"""Training budgets of runs, and how those of two arms compare.

Comparisons at equal samples (iso-sample) and at equal compute (iso-FLOP) answer different questions; the report keeps
them apart.
"""

from dataclasses import dataclass

TOLERANCE = 0.02  # relative difference up to which budgets count as equal
ISO_SAMPLE, ISO_FLOP, UNMATCHED, UNKNOWN = "iso-sample", "iso-FLOP", "unmatched", "unknown"
MATCHED = (ISO_SAMPLE, ISO_FLOP)  # only these decide anything
NAMES = {
    ISO_SAMPLE: "equal training samples (iso-sample)",
    ISO_FLOP: "equal training compute (iso-FLOP)",
    UNMATCHED: "neither equal training samples nor equal training compute",
    UNKNOWN: "training budget not kept",
}


@dataclass(frozen=True)
class Budget:
    num_samples: int  # of all training stages
    flops: float  # of all training stages (pipeline_steps/report/training_flops.py)


def kind_of(base, arms):
    """One of NAMES: how the budgets of two lists of runs, paired by position, compare."""
    pairs = [(own.budget, other.budget) for own, other in zip(base, arms, strict=True)]
    if any(budget is None for pair in pairs for budget in pair):
        return UNKNOWN
    for kind, name in ((ISO_SAMPLE, "num_samples"), (ISO_FLOP, "flops")):
        ratios = [getattr(other, name) / getattr(own, name) for own, other in pairs]
        if all(abs(ratio - 1) <= TOLERANCE for ratio in ratios):
            return kind
    return UNMATCHED


def ratios_of(base, arms):
    """(samples, compute) of the arm / those of the baseline, from the sums over the runs; None if unknown."""
    if kind_of(base, arms) == UNKNOWN:
        return None
    return tuple(
        sum(getattr(run.budget, name) for run in arms) / sum(getattr(run.budget, name) for run in base)
        for name in ("num_samples", "flops")
    )
