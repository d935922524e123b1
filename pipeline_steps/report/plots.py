"""Small tables for `dvc plots show` and `dvc plots diff` (`plots:` in dvc.yaml says how each is drawn)."""

import pandas as pd

WINDOW = 20  # steps of the running mean of the training loss
MODE = "autoregressive"


def tables(inputs):
    """{name: DataFrame} of the report's `Inputs`. Without data a table has its columns but no rows.

    training_loss (stage, samples, loss), validation_accuracy (stage, samples, accuracy: fine mode, mean over tasks),
    accuracy_by_task (task, accuracy), gaze_by_frame (frame, peak_on_target: mean over tasks). `samples` is cumulative
    over the stages.
    """
    losses, accuracies, before = [], [], 0
    for stage, table in inputs.curves.items():
        train = table[table["event"] == "train"]
        mean = train["loss"].rolling(WINDOW, min_periods=1).mean()
        losses += [(stage, before + int(n), loss) for n, loss in zip(train["samples"], mean, strict=True)]
        samples = train.set_index("step")["samples"]
        checks = table[(table["event"] == "validation") & (table["mode"] == "fine")]
        for step, accuracy in checks.groupby(["step", "task"])["accuracy"].mean().groupby("step").mean().items():
            if step in samples.index:
                accuracies.append((stage, before + int(samples[step]), accuracy))
        before += int(train["samples"].max()) if len(train) else 0
    result = inputs.current.result
    by_task = [(task, modes[MODE].accuracy) for task, modes in sorted(result.tasks.items())]
    return {
        "training_loss": pd.DataFrame(losses, columns=["stage", "samples", "loss"]),
        "validation_accuracy": pd.DataFrame(accuracies, columns=["stage", "samples", "accuracy"]),
        "accuracy_by_task": pd.DataFrame(by_task, columns=["task", "accuracy"]),
        "gaze_by_frame": pd.DataFrame(gaze_by_frame(result), columns=["frame", "peak_on_target"]),
    }


def gaze_by_frame(result):
    """[(frame, share of peaks on the target, mean over tasks)] of the frames with a visible target."""
    shares = [modes[MODE].per_frame for modes in result.gaze.values() if MODE in modes]
    rows = []
    for frame in range(max(map(len, shares), default=0)):
        seen = [values[frame] for values in shares if frame < len(values) and values[frame] is not None]
        if seen:
            rows.append((frame, sum(seen) / len(seen)))
    return rows
