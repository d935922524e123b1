"""The two questions and what the runs say about them.

Both compare separately trained networks on the same items: the ratio of their losses (mean over families,
autoregressive mode; a network trained coarse-only or with ordinary tokens has one way to look, which is the same in
every mode). Fewer than `min_seeds` seeds of both, no per-item results, other data or items, or an interval that
reaches over the border: undecided.
"""

from dataclasses import dataclass, field

import numpy as np

MODE = "autoregressive"
VALIDATED, NOT_VALIDATED, UNDECIDED = "validated", "not validated", "undecided"


@dataclass
class Comparison:
    """Loss of an arm divided by the loss of the default recipe, 1 = the same, above 1 = the default recipe is
    better."""

    ratio: float
    interval: tuple[float, float] | None  # 95 %, items and seeds resampled together; None: no per-item results
    accuracy: float  # default recipe, mean over families
    arm_accuracy: float
    seeds: list[int]
    num_families: int
    num_items: int


@dataclass
class Verdict:
    question: str
    status: str
    statement: str
    reasons: list[str] = field(default_factory=list)  # why it is undecided
    commands: list[str] = field(default_factory=list)  # which would change that
    comparison: Comparison | None = None


def verdicts(inputs, settings):
    """The verdicts of the page, in order."""
    margin = settings.margin
    return [
        judge(
            inputs,
            settings,
            question="Does looking where you choose help?",
            arm="A6",
            arm_name="the same network trained with one fixed look (A6)",
            border=1 + margin,
        ),
        judge(
            inputs,
            settings,
            question="Does one token per frame equal sixteen?",
            arm="B1",
            arm_name="the same backbones with sixteen ordinary tokens per frame (B1)",
            border=1 - margin,
        ),
    ]


def judge(inputs, settings, question, arm, arm_name, border):
    """`Verdict`: validated when the whole interval of arm loss / default loss is above `border`, not validated when
    it is below."""
    all_runs = [*inputs.runs, inputs.current]  # of two with the same seed the run of this page counts
    base = {run.seed: run for run in all_runs if run.ablation == "none"}
    arms = {run.seed: run for run in all_runs if run.ablation == arm}
    seeds = sorted(set(base) & set(arms))
    needed = list(range(1, settings.min_seeds + 1))
    if not seeds:
        absent = [name for name, found in (("none", base), (arm, arms)) if not found]
        what = (
            " and ".join("the default recipe" if name == "none" else arm for name in absent)
            or f"{arm} with the seed of the default run"
        )
        return Verdict(
            question,
            UNDECIDED,
            f"No separately trained run to compare with: the answer needs {arm_name}, on the same data.",
            reasons=[f"no results of {what} in reports/runs"],
            commands=missing_commands(base, arms, arm, needed),
        )
    reasons = outdated(inputs.current, inputs.runs)
    reasons += different_data([base[seed] for seed in seeds] + [arms[seed] for seed in seeds])
    if reasons:
        return Verdict(
            question, UNDECIDED, f"The runs of {arm} and of the default recipe are not comparable.", reasons=reasons
        )
    found = compare(
        [base[seed] for seed in seeds], [arms[seed] for seed in seeds], settings.bootstrap_samples, settings.seed
    )
    statement = (
        f"Loss of {arm_name}: {found.ratio:.2f} times that of one chosen look"
        + (f" [{found.interval[0]:.2f}, {found.interval[1]:.2f}]" if found.interval else "")
        + f"; accuracy {found.arm_accuracy:.1%} against {found.accuracy:.1%}. "
        + f"{len(seeds)} seed{'s' * (len(seeds) > 1)}, {found.num_families} families, {found.num_items} items."
    )
    if found.interval is None:
        reasons.append("per-item results (items.parquet) of a run are missing, so there is no paired interval")
    elif found.interval[0] <= border <= found.interval[1]:
        reasons.append(f"the interval reaches over {border:.2f}, the border between yes and no")
    if len(seeds) < settings.min_seeds:
        reasons.append(f"{len(seeds)} of {settings.min_seeds} seeds")
    if reasons:
        status, commands = UNDECIDED, missing_commands(base, arms, arm, needed)
    else:
        status, commands = (VALIDATED if found.interval[0] > border else NOT_VALIDATED), []
    return Verdict(question, status, statement, reasons, commands, found)


def missing_commands(base, arms, arm, seeds):
    """Commands that train and keep the runs which are not there yet."""
    return [
        command
        for ablation, runs in (("none", base), (arm, arms))
        for seed in seeds
        if seed not in runs
        for command in run_commands(ablation, seed)
    ]


def run_commands(ablation, seed):
    """The commands that train one run beside the workspace and keep its results for the report."""
    name = f"{ablation}-seed{seed}"
    return [
        f"dvc exp run --temp --name {name} -S ablation={ablation} -S seed={seed}",
        f"dvc get . reports/metrics/evaluation.json --rev {name} -o reports/runs/{name}/evaluation.json",
        f"dvc get . outputs/evaluation/items.parquet --rev {name} -o reports/runs/{name}/items.parquet",
    ]


def outdated(current, runs):
    """Reasons why the kept runs are of another version: one with the ablation and seed of this page is not this run."""
    return [
        f"reports/runs/{run.name} is not the run of this page, though ablation and seed are the same: keep it anew"
        for run in runs
        if (run.ablation, run.seed) == (current.ablation, current.seed)
        and run.result.provenance.get("checkpoint_sha256") != current.result.provenance.get("checkpoint_sha256")
    ]


def different_data(runs):
    """Reasons why the runs cannot be compared: other data, another split, other families or other items."""
    reasons = []
    for key in ("shards_sha256", "tokens_sha256", "split"):
        values = {run.name: str(run.result.provenance.get(key))[:12] for run in runs}
        if len(set(values.values())) > 1:
            reasons.append(f"{key} differs: " + ", ".join(f"{name} {value}" for name, value in values.items()))
    if len({tuple(sorted(run.result.families)) for run in runs}) > 1:
        reasons.append("the runs have different families")
    if all(run.items is not None for run in runs) and len({scored_items(run) for run in runs}) > 1:
        reasons.append("the runs scored different items (evaluation.seed or evaluation.max_items_per_family)")
    return reasons


def scored_items(run):
    """(key, item) of everything that the run's table holds in the mode of the comparison."""
    rows = run.items[run.items["mode"] == MODE]
    return frozenset(zip(rows["key"], rows["item"], strict=True))


def compare(base, arms, num_samples, seed):
    """`Comparison` of two lists of runs, paired by position (the same seed)."""
    families = sorted(base[0].result.families)
    losses = {name: mean_of(runs, families, "loss") for name, runs in (("base", base), ("arm", arms))}
    interval = None
    if all(run.items is not None for run in (*base, *arms)):
        interval = paired_interval([family_arrays(base, arms, family) for family in families], num_samples, seed)
    return Comparison(
        ratio=losses["arm"] / losses["base"],
        interval=interval,
        accuracy=mean_of(base, families, "accuracy"),
        arm_accuracy=mean_of(arms, families, "accuracy"),
        seeds=[run.seed for run in base],
        num_families=len(families),
        num_items=sum(base[0].result.families[family][MODE].num_items for family in families),
    )


def mean_of(runs, families, name):
    """Mean of a score over families and runs."""
    return float(np.mean([getattr(run.result.families[family][MODE], name) for run in runs for family in families]))


def family_arrays(base, arms, family):
    """(base loss sums [seeds, items], arm loss sums [seeds, items], scored tokens [items]); all runs have the same
    items (`different_data`)."""
    tables = []
    for run in (*base, *arms):
        rows = run.items[(run.items["family"] == family) & (run.items["mode"] == MODE)]
        tables.append(rows.set_index(["key", "item"])[["loss_sum", "num_tokens"]])
    order = tables[0].index
    losses = np.stack([table.loc[order, "loss_sum"].to_numpy() for table in tables])
    return losses[: len(base)], losses[len(base) :], tables[0]["num_tokens"].to_numpy()


def paired_interval(families, num_samples, seed):
    """95 % interval of the ratio of mean losses: every resample draws items (the same for both arms and all seeds)
    and seeds (in pairs)."""
    rng = np.random.default_rng(seed)
    base_means, arm_means = [], []  # one [num_samples, seeds] per family
    for base, arm, tokens in families:
        num_items = len(tokens)
        counts = np.stack(
            [np.bincount(row, minlength=num_items) for row in rng.integers(0, num_items, (num_samples, num_items))]
        )
        weight = (counts @ tokens)[:, None]
        base_means.append(counts @ base.T / weight)
        arm_means.append(counts @ arm.T / weight)
    base_mean, arm_mean = np.mean(base_means, axis=0), np.mean(arm_means, axis=0)
    num_seeds = base_mean.shape[1]
    drawn = rng.integers(0, num_seeds, (num_samples, num_seeds))
    ratios = np.take_along_axis(arm_mean, drawn, 1).mean(1) / np.take_along_axis(base_mean, drawn, 1).mean(1)
    low, high = np.percentile(ratios, (2.5, 97.5))
    return float(low), float(high)
