"""The sentences of the report: captions, and those that are made of numbers."""

from pipeline_steps.report.summary import gaze_means

CAPTIONS = {  # figure -> (alternative text, what to see)
    "curves": (
        "Training loss and validation accuracy over the training samples of the three stages",
        "Top: training loss (grey: single steps, blue: running mean; each stage has its own data and loss, so steps "
        "between stages are no surprise). Bottom: accuracy on validation items, by task, and by source where a "
        "task comes from several. Look for tasks that stay flat while others rise.",
    ),
    "attention": (
        "Entropy of the attention and similarity of the visual tokens over the training samples",
        "Measured at every validation, last vision layer. Look for entropy that falls from 1 (the same attention on "
        "every patch): the queries begin to choose. Cosines that stay near 1 mean that all frames give the same token, "
        "or that planned queries find what the static one finds.",
    ),
    "tasks": (
        "Accuracy of every task in every mode",
        "Each task's accuracy by mode, with 95% intervals. Look for the distance between autoregressive (what is "
        "deployed) and the two controls, and for autoregressive lying on fine: then the parallel form of training "
        "hides nothing.",
    ),
    "gaze": (
        "Share of frames whose attention peak is on the target, by task and by frame",
        "Top: how often the most attended patch is the target's, against the share of patches that show it. Bottom: "
        "over the frames; frame 0 is attended before anything is known.",
    ),
    "flops": (
        "Compute per sample by component, and over the number of frames",
        "Top: where the compute goes. Bottom: cost over the number of frames for one foveated token, the static query "
        "(A6) and ordinary tokens (B1), same backbones, mean text length.",
    ),
    "frontier": (
        "Cost of one token a frame against several over the number of frames, by language model",
        "Look for where a line falls below the dotted one: from there on one token a frame costs less than several, in "
        "use (top) and in training (middle). Bottom: share of vision encoder and queries in the cost of one token a "
        "frame; above the dotted line the vision encoder dominates, and fewer tokens can save little.",
    ),
    "over_frames": (
        "Entropy and largest weight of the attention over the frames, by mode",
        "Mean of the clips above, last vision layer, mean over heads; 1 is the same attention on every patch. Look for "
        "planned queries that choose (low entropy, high peak) from frame 1 on, where the static one (coarse) does not.",
    ),
}


def banner(parameters):
    """What the reader must know about the data before the numbers, for the embedded scale."""
    if parameters["backbones"]["kind"] != "embedded":
        return []
    return [
        "The data is synthetic: short generated clips of moving digits. The results say nothing about natural video.",
        "The backbones' warm-up pre-trains the selection of named objects; training does not start without it.",
    ]


def lead(inputs):
    """What this run alone shows, in two or three sentences."""
    result = inputs.current.result
    mean = result.mean
    exact = "" if (value := result.mean_exact_match) is None else f" and an exact-match accuracy of {value:.1%}"
    text = (
        f"In this run (ablation {inputs.current.ablation}, seed {inputs.current.seed}) the model answers "
        f"{len(result.tasks)} tasks of held-out items with a mean token accuracy of "
        f"{mean['autoregressive'].accuracy:.1%}{exact} with planned queries, frame by frame (autoregressive mode). "
        f"With grey frames its token accuracy is {mean['blind'].accuracy:.1%}, "
        f"with random queries {mean['random_query'].accuracy:.1%}."
    )
    if means := gaze_means(result):
        peak, chance = means
        text += f" Its attention peak is on the target in {peak:.0%} of the frames (any object: {chance:.0%})."
    return text


def tiles(result):
    """Key figures: name, value, note."""
    mean = result.mean
    entries = [
        {"name": f"{name} accuracy", "value": f"{mean[mode].accuracy:.1%}", "note": note}
        for mode, name, note in (
            ("autoregressive", "Autoregressive token", "mean of the tasks"),
            ("fine", "Fine", "all frames in parallel"),
            ("blind", "Blind", "grey frames"),
            ("random_query", "Random query", "attends anywhere"),
        )
    ]
    if (value := result.mean_exact_match) is not None:
        note = "generated answers equal to the expected one"
        entries.insert(1, {"name": "Exact-match accuracy", "value": f"{value:.1%}", "note": note})
    ratio = mean["autoregressive"].loss / mean["fine"].loss
    entries.append(
        {"name": "Loss, autoregressive / fine", "value": f"{ratio:.3f}", "note": "1 = training hides nothing"}
    )
    if means := gaze_means(result):
        peak, chance = means
        entries.append(
            {"name": "Gaze on target", "value": f"{peak:.0%}", "note": f"any object by chance: {chance:.0%}"}
        )
    return entries


def controls(result, targets):
    """Sentences on what blind and random queries leave over, task by task; `targets`: schema.Targets."""
    lines = []
    chances = {task: value for task, value in result.chance.items() if value is not None and task in result.tasks}
    near = [
        task for task, value in chances.items() if result.tasks[task]["blind"].accuracy <= value + targets.blind_excess
    ]
    far = [task for task in chances if task not in near]
    if chances:
        lines.append(
            f"Blind is within {100 * targets.blind_excess:.0f} points of chance in {len(near)} of {len(chances)} "
            "tasks" + (f"; not in {', '.join(far)}." if far else ".")
        )
    lost = {
        task: modes["autoregressive"].accuracy - modes["random_query"].accuracy for task, modes in result.tasks.items()
    }
    needed = [
        task
        for task, modes in result.tasks.items()
        if modes["random_query"].accuracy_interval[1] < modes["autoregressive"].accuracy_interval[0]
        and modes["autoregressive"].num_items > 1
    ]
    largest = max(lost, key=lost.get)
    lines.append(
        f"Random queries of the same norm cost {100 * lost[largest]:.1f} points in {largest} (the most), "
        f"{100 * sum(lost.values()) / len(lost):.1f} on average; the intervals lie apart in {len(needed)} of "
        f"{len(lost)} tasks. A model that never needed its gaze would lose nothing."
    )
    wide = [task for task, entry in result.gap.items() if entry.interval[0] > 1 + targets.gap]
    lines.append(
        f"Autoregressive loss is within {targets.gap:.0%} of fine in every task, or not distinguishable from that."
        if not wide
        else f"Autoregressive loss is more than {targets.gap:.0%} above fine in {', '.join(wide)}."
    )
    return lines


def verdict_markdown(found):
    """The verdicts for review in a pull request."""
    lines = ["# Verdict", ""]
    for verdict in found:
        lines += [f"**{verdict.question}** {verdict.status.capitalize()}. {verdict.statement}", ""]
        if verdict.reasons:
            lines += [f"Undecided because: {'; '.join(verdict.reasons)}.", ""]
        if verdict.commands:
            lines += [
                "Commands that produce the missing runs:",
                "",
                "```",
                *verdict.commands,
                "git restore params.yaml",
                "dvc repro",
                "```",
                "",
            ]
    return "\n".join(lines)


def flattened(values, prefix=""):
    """(dotted name, text) of every leaf of a nested dict, floats with three decimals."""
    for name, value in values.items():
        if isinstance(value, dict):
            yield from flattened(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}".replace("_", " "), f"{value:.3f}" if isinstance(value, float) else str(value)
