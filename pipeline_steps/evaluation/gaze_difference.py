"""Gaze accuracy (`peak_on_target`) of the autoregressive mode minus that of a reference, on the same frames.

References: a uniformly random patch (`chance`), the static query (`coarse`), and attention limited to the target
(`oracle`).
"""

from pipeline_steps.common.metrics import GazeDifference

REFERENCES = {"coarse": "coarse", "oracle": "oracle_query"}  # name: mode of the item table
OWN = "autoregressive"


def differences(table, interval):
    """{task: {reference: `GazeDifference`}}; interval: function of (numerators, denominators, clips) per item."""
    if "gaze_frames" not in table:
        return {}
    rows = table[table["gaze_frames"] > 0].set_index(["task", "mode", "key", "item"]).sort_index()
    found = {}
    for task in sorted(set(rows.index.get_level_values("task"))):
        modes = {mode: rows.loc[task, mode] for mode in set(rows.loc[task].index.get_level_values("mode"))}
        if OWN not in modes:
            continue
        own = modes[OWN]
        found[task] = {"chance": difference(own, own["chance"], interval)}
        for name, mode in REFERENCES.items():
            if mode in modes:
                shared = own.loc[modes[mode].index]
                found[task][name] = difference(shared, modes[mode]["peak_on_target"], interval)
    return found


def difference(own, reference, interval):
    """`GazeDifference` of `own` and the reference. reference: peak_on_target sums per item over the same frames."""
    change = (own["peak_on_target"] - reference).to_numpy()
    frames = own["gaze_frames"].to_numpy()
    return GazeDifference(
        peak_on_target=float(change.sum() / frames.sum()),
        interval=interval(change, frames, clips=own.index.get_level_values("key")),
        num_frames=int(frames.sum()),
    )
