"""Next-frame losses of a study: whether planned looks predict the next frame better than static ones, from runs.csv."""

import numpy as np
import pandas as pd

from pipeline_steps.common.study_results import CLIPS, COARSE, FINE, SEEDS, SINGLE_PASS, NextFrameGain
from pipeline_steps.study import statistics
from pipeline_steps.study.design import arm_parameters, baseline_of

NEXT_FRAME = "next_frame_"  # columns next_frame_<clips>_<variant>, NextFrameScore's losses, and ..._wins
VARIANTS = (COARSE, "autoregressive", "unchanged", "shuffled_state", "no_state", "no_previous")


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
    gain = relative_gain(runs, study, arm, group)
    values = gain.dropna().to_numpy()
    verdict, interval = statistics.gain_verdict(values, study.next_frame_margin)
    differences = paired_gains(runs, table, study, arm, budget, group)
    return NextFrameGain(
        loss={name: optional(column) for name, column in losses.items() if column.notna().any()},
        wins=optional(number_column(runs, f"{NEXT_FRAME}{group}_wins")),
        gain=optional(gain),
        interval=interval,
        verdict=verdict if losses[FINE].notna().any() else SINGLE_PASS,
        differences=differences.tolist(),
        differences_interval=statistics.t_interval(differences),
    )


def fine_loss(runs, study, arm, group):
    """Loss of the last configured pass of an arm's runs; missing in networks with a single pass."""
    num_passes = arm_parameters(study, arm)["model"]["num_passes"]
    return number_column(runs, f"{NEXT_FRAME}{group}_fine_{num_passes}")


def relative_gain(runs, study, arm, group):
    """1 - fine / coarse loss of every run of an arm; missing where a loss is, or where the coarse loss is 0."""
    coarse = number_column(runs, f"{NEXT_FRAME}{group}_{COARSE}")
    return 1 - fine_loss(runs, study, arm, group) / coarse.where(coarse > 0)


def paired_gains(runs, table, study, arm, budget, group):
    """Gains of the baseline minus those of the arm with the same seeds and budget, for arms with the same target."""
    baseline = baseline_of(study, arm)
    base = table[(table["arm"] == baseline) & (table["budget"] == budget)]
    if baseline == arm or base.empty or target_of(study, baseline) != target_of(study, arm):
        return np.zeros(0)
    own, other = (
        relative_gain(rows, study, name, group).set_axis(pd.MultiIndex.from_frame(rows[SEEDS]))
        for rows, name in ((runs, arm), (base, baseline))
    )
    return (other - own).dropna().to_numpy()


def target_of(study, arm):
    """What the head predicts in the last stage."""
    return arm_parameters(study, arm)["training"]["stage3"]["objective"]["next_frame"]["target"]


def number_column(table, name):
    """A column as numbers; missing values where the table has no such column."""
    return table[name].astype(float) if name in table else pd.Series(np.nan, table.index)


def optional(column):
    return [None if pd.isna(value) else value for value in column.tolist()]
