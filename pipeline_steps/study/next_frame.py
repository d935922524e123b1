"""Next-frame losses of a study: whether planned queries predict the next frame better than static, from runs.csv."""

from itertools import count, takewhile

import numpy as np
import pandas as pd

from pipeline_steps.common.study_results import (
    CLIPS,
    COARSE,
    FINE,
    SEEDS,
    SINGLE_PASS,
    UNDECIDED,
    VIDEOS,
    NextFrameGain,
)
from pipeline_steps.study import statistics
from pipeline_steps.study.design import arm_parameters, baseline_of, reference_budget

# Columns next_frame_<clips>_<variant>: NextFrameScore's losses, wins and measures; of moving clips also
# next_frame_frame_<number>_<variant> and next_frame_passes_<frames>_<variant>.
NEXT_FRAME = "next_frame_"
FRAME, PASSES = f"{NEXT_FRAME}frame_", f"{NEXT_FRAME}passes_"
STATIC_TASKS = ("image", "still")  # of the digit world and of the world of objects
VARIANTS = (COARSE, "autoregressive", "unchanged", "shuffled_state", "no_state", "no_previous")
MEASURES = ("wins_last_frames", "token_similarity", "state_sensitivity", "previous_sensitivity")


def columns_of(found):
    """Columns of runs.csv from a `NextFrameResult`; {} for None."""
    if found is None:
        return {}
    groups, columns = found.groups, {}
    static = next((groups[task] for task in STATIC_TASKS if task in groups), None)
    for name, group in ((VIDEOS, groups.get(VIDEOS)), ("image", static)):
        if group is not None:
            prefix = f"{NEXT_FRAME}{name}_"
            columns |= {f"{prefix}{variant}": value for variant, value in group.loss.items()}
            columns |= {f"{prefix}{measure}": getattr(group, measure) for measure in ("no_state", "wins", *MEASURES)}
    for variant, values in groups[VIDEOS].per_frame.items() if VIDEOS in groups else ():
        columns |= {f"{FRAME}{number}_{variant}": value for number, value in enumerate(values, start=1)}
    for length, losses in found.passes.items():
        columns |= {f"{PASSES}{length}_{variant}": value for variant, value in losses.items()}
    return columns


def trained_on_answers(table, study):
    """The arms of the table whose stage 2 or 3 has a loss on answers. Without next-frame losses in the table: all."""
    arms = set(table["arm"])
    if not any(name.startswith(NEXT_FRAME) for name in table):
        return arms
    return {arm for arm in arms | {baseline_of(study, arm) for arm in arms} if trains_answers(study, arm)}


def trains_answers(study, arm):
    training = arm_parameters(study, arm)["training"]
    stages = [training[stage] for stage in ("stage2", "stage3")]
    return any(stage["loss"] == "preference" or stage["objective"]["text"]["weight"] > 0 for stage in stages)


def next_frame_of(runs, table, study):
    """{group of clips: `NextFrameGain`} of the runs of an arm at a budget; {} without next-frame losses."""
    arm, budget = runs[["arm", "budget"]].iloc[0]
    groups = [name for name in CLIPS if number_column(runs, f"{NEXT_FRAME}{name}_{COARSE}").notna().any()]
    return {group: gain_of(runs, table, study, arm, budget, group) for group in groups}


def gain_of(runs, table, study, arm, budget, group):
    """`NextFrameGain` of an arm's runs at a budget, in a group of clips."""
    losses = {name: number_column(runs, f"{NEXT_FRAME}{group}_{name}") for name in VARIANTS}
    losses[FINE] = fine_loss(runs, study, arm, group)
    has_planned = losses[FINE].notna().any()
    if has_planned:
        gain = relative_gain(runs, study, arm, group)
    else:
        gain = gain_over_static(runs, table, study, arm, budget, group)
    values = gain.dropna().to_numpy()
    verdict, interval = statistics.gain_verdict(values, study.next_frame_margin)
    confirming = gain[runs["training_seed"].isin(study.confirmation_seeds)].dropna().to_numpy()
    if len(confirming) and statistics.gain_verdict(confirming, study.next_frame_margin)[0] != verdict:
        verdict = UNDECIDED
    differences = paired_gains(runs, table, study, arm, budget, group)
    measures = {name: number_column(runs, f"{NEXT_FRAME}{group}_{name}") for name in MEASURES}
    return NextFrameGain(
        loss={name: optional(column) for name, column in losses.items() if column.notna().any()},
        wins=optional(number_column(runs, f"{NEXT_FRAME}{group}_wins")),
        gain=optional(gain),
        interval=interval,
        verdict=verdict if has_planned or len(values) else SINGLE_PASS,
        differences=differences.tolist(),
        differences_interval=statistics.t_interval(differences),
        measures={name: optional(column) for name, column in measures.items() if column.notna().any()},
        frame_gains=frame_gains(runs, study, arm) if group == VIDEOS else [],
        pass_gains=pass_gains(runs) if group == VIDEOS else {},
    )


def fine_loss(runs, study, arm, group):
    """Loss of the last configured pass of an arm's runs; missing in networks with a single pass."""
    return number_column(runs, f"{NEXT_FRAME}{group}_{fine_name(study, arm)}")


def fine_name(study, arm):
    return f"fine_{arm_parameters(study, arm)['model']['num_passes']}"


def relative_gain(runs, study, arm, group):
    """Gain of every run of an arm, as in `NextFrameGain`; missing where a loss is, or where the divisor is 0."""
    coarse = coarse_loss(runs, group)
    return (coarse - fine_loss(runs, study, arm, group)) / coarse


def coarse_loss(runs, group):
    """Loss of the static queries of every run; missing where it is 0."""
    loss = number_column(runs, f"{NEXT_FRAME}{group}_{COARSE}")
    return loss.where(loss > 0)


def gain_over_static(runs, table, study, arm, budget, group):
    """Gain of the baseline's planned queries over the static ones of an arm that was trained with these alone, for
    every run of the arm; missing without a run of the baseline with its seeds and budget (`reference_budget`), or for
    another target."""
    planned = baseline_runs(table, study, arm, budget)
    if planned is None:
        return pd.Series(np.nan, runs.index)
    planned = by_seeds(planned, fine_loss(planned, study, baseline_of(study, arm), group))
    own = by_seeds(runs, coarse_loss(runs, group))
    return (1 - planned.reindex(own.index) / own).set_axis(runs.index)


def paired_gains(runs, table, study, arm, budget, group):
    """Gains of the baseline minus those of the arm with the same seeds and budget, for arms with the same target."""
    base = baseline_runs(table, study, arm, budget)
    if base is None:
        return np.zeros(0)
    own, other = (
        by_seeds(rows, relative_gain(rows, study, name, group))
        for rows, name in ((runs, arm), (base, baseline_of(study, arm)))
    )
    return (other - own).dropna().to_numpy()


def baseline_runs(table, study, arm, budget):
    """The runs of an arm's baseline that its runs at a budget are compared with; None for the baseline itself, without
    runs or with another target."""
    baseline = baseline_of(study, arm)
    found = table[(table["arm"] == baseline) & (table["budget"] == reference_budget(study, budget))]
    is_other = target_of(study, baseline) != target_of(study, arm)
    return None if baseline == arm or found.empty or is_other else found


def by_seeds(runs, column):
    return column.set_axis(pd.MultiIndex.from_frame(runs[SEEDS]))


def frame_gains(runs, study, arm):
    """As in `NextFrameGain`, of the frames that the arm's clips have."""
    fine = fine_name(study, arm)
    return while_known(lambda number: mean_gain(runs, f"{FRAME}{number}_", fine))


def pass_gains(runs):
    """As in `NextFrameGain`."""
    lengths = dict.fromkeys(name.removeprefix(PASSES).partition("_")[0] for name in runs if name.startswith(PASSES))
    found = {
        length: while_known(lambda number, length=length: mean_gain(runs, f"{PASSES}{length}_", f"fine_{number}"))
        for length in lengths
    }
    return {length: gains for length, gains in found.items() if gains}


def mean_gain(runs, prefix, fine):
    """1 - fine / coarse loss of the columns with a prefix, mean over the runs that have both; NaN without any."""
    coarse = number_column(runs, f"{prefix}{COARSE}")
    return float((1 - number_column(runs, f"{prefix}{fine}") / coarse.where(coarse > 0)).mean())


def while_known(gain_of_number):
    """The gains of the numbers 1, 2 ... until one is NaN."""
    return list(takewhile(lambda gain: not np.isnan(gain), map(gain_of_number, count(1))))


def target_of(study, arm):
    """What the head predicts in the last stage."""
    return arm_parameters(study, arm)["training"]["stage3"]["objective"]["next_frame"]["target"]


def number_column(table, name):
    """A column as numbers; missing values where the table has no such column."""
    return table[name].astype(float) if name in table else pd.Series(np.nan, table.index)


def optional(column):
    return [None if pd.isna(value) else value for value in column.tolist()]
