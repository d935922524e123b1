"""Texts of the report: figure captions, and sentences built from the results."""

from pipeline_steps.common.markdown import escaped
from pipeline_steps.report.summary import gaze_means

GENERATED = {"procedural", "chat"}  # sources of made-up data
CAPTIONS = {  # figure -> (alternative text, caption)
    "curves": (
        "Training loss and validation accuracy over the training samples of the three stages",
        "Top: training loss (grey: single steps, blue: running mean). It jumps between stages because each stage has "
        "its own data and loss. Bottom: accuracy on validation items by task, and by source if a task has several "
        "sources. A task that stays flat while others rise is not learned.",
    ),
    "attention": (
        "Entropy of the attention and similarity of the visual tokens over the training samples",
        "Measured at every validation, last vision layer. Entropy falling from 1 (uniform attention) means that the "
        "queries become selective. A cosine that stays near 1 means that all frames give the same token, or that "
        "planned queries give the same token as the static query.",
    ),
    "tasks": (
        "Accuracy of every task in every mode",
        "Accuracy of every task by mode, with 95% intervals. Compare autoregressive, the inference mode, with the two "
        "controls, blind and random query. If autoregressive and fine agree, parallel training transfers to "
        "frame-by-frame inference.",
    ),
    "gaze": (
        "Share of frames whose attention peak is on the target, by task and by frame",
        "Top: share of frames whose most attended patch shows the target, and the levels reached by chance. Bottom: "
        "the same by frame. Frame 0 has no planned query.",
    ),
    "flops": (
        "Compute per sample by component, and over the number of frames",
        "Top: compute by component. Bottom: cost over the number of frames for one foveated token, the static query "
        "(A6) and multiple tokens (B1), with the same backbones and the mean text length.",
    ),
    "frontier": (
        "Cost of one token per frame relative to several over the number of frames, by language model",
        "Below the dotted line one token per frame costs less than several, at inference (top) and in training "
        "(middle). Bottom: share of the vision encoder and the queries in the cost of one token per frame. Above the "
        "dotted line the vision encoder dominates, and fewer tokens save little.",
    ),
    "over_frames": (
        "Entropy and largest weight of the attention over the frames, by mode",
        "Mean over the clips below, last vision layer, mean over heads. Entropy 1 is uniform attention. Planned "
        "queries should be selective (low entropy, high peak) from frame 1 on, unlike the static query (coarse).",
    ),
}


def banner(parameters):
    """Up to two lines on the data and on what is pre-trained, to show before the numbers."""
    lines, sources = [], parameters["sources"]
    if "procedural" in sources["collect"] and GENERATED.issuperset(sources["collect"]):
        pictures = {"digits": "moving digits", "objects": "moving photographs of objects"}[
            sources["procedural"]["world"]
        ]
        lines.append(
            f"The world is synthetic: short generated clips of {pictures}. Nothing here applies to natural video."
        )
    backbones = parameters["backbones"]
    if backbones["kind"] == "embedded" and backbones["embedded"]["vision_queries"] == "selecting":
        lines.append(
            "The backbones' warm-up, on clips of moving digits, already teaches the model to select a named object."
        )
    return lines


def lead(inputs, numbers):
    """The results of this run in a few sentences. numbers: of `summary.headline`."""
    exact = "" if (value := numbers["exact_match_accuracy"]) is None else f" and an exact match of {value:.1%}"
    text = (
        f"This run (ablation {inputs.current.ablation}, seed {inputs.current.seed}) has a token accuracy of "
        f"{numbers['mean_token_accuracy']:.1%}{exact} on held-out items (mean of {len(inputs.current.result.tasks)} "
        f"tasks, frame by frame with planned queries). Token accuracy is {numbers['blind_accuracy']:.1%} with grey "
        f"frames and {numbers['random_query_accuracy']:.1%} with random queries; these controls use the same weights "
        f"and are not separately trained baselines. The frame-by-frame loss is "
        f"{numbers['autoregressive_fine_loss_ratio']:.3f} times the loss with all frames in parallel."
    )
    if means := gaze_means(inputs.current.result):
        text += (
            " With planned queries, from the second frame on, the attention peak is on the target in "
            f"{means[0]:.0%} of the frames (chance among the objects: {means[1]:.0%})."
        )
    return text


def tiles(numbers):
    """Key figures of this run: name, value, note. numbers: of `summary.headline`."""
    entries = [
        {
            "name": "Token accuracy",
            "value": f"{numbers['mean_token_accuracy']:.1%}",
            "note": "of this run, mean of the tasks: answer tokens predicted right, given the tokens before",
        }
    ]
    if (value := numbers["exact_match_accuracy"]) is not None:
        note = "of this run, mean of the tasks: whole generated answers that are right"
        entries.insert(0, {"name": "Exact match", "value": f"{value:.1%}", "note": note})
    return entries


def controls(result, targets):
    """Sentences on the controls: blind against chance, random queries, autoregressive against fine. targets:
    schema.Targets."""
    lines = []
    chances = {task: value for task, value in result.chance.items() if value is not None and task in result.tasks}
    near = [
        task for task, value in chances.items() if result.tasks[task]["blind"].accuracy <= value + targets.blind_excess
    ]
    far = [task for task in chances if task not in near]
    if chances:
        lines.append(
            f"Blind is within {100 * targets.blind_excess:.0f} points of chance in {len(near)} of {len(chances)} "
            "tasks" + (f"; it is not in {', '.join(far)}." if far else ".")
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
        f"Random queries of the same norm cost at most {100 * lost[largest]:.1f} points of accuracy (in {largest}) and "
        f"{100 * sum(lost.values()) / len(lost):.1f} on average. The 95% intervals are apart in {len(needed)} of "
        f"{len(lost)} tasks. A model that does not use its queries would lose nothing."
    )
    wide = [task for task, entry in result.gap.items() if entry.interval[0] > 1 + targets.gap]
    lines.append(
        f"In every task the autoregressive loss is within {targets.gap:.0%} of the fine loss, or the interval includes "
        "that."
        if not wide
        else f"The autoregressive loss is more than {targets.gap:.0%} above the fine loss in {', '.join(wide)}."
    )
    return lines


def verdict_lines(found, headline):
    """(question, answer) of every verdict of the page: of the study that leads it, else of single runs. headline: name,
    question and cards of that study, or None."""
    if not headline:
        return [(verdict.question, f"{verdict.status.upper()}. {verdict.statement}") for verdict in found]
    lines = [(f"Study {headline['name']}:", headline["question"])]
    for card in headline["cards"]:
        note = f" ({card['open']})" if card["open"] else ""
        lines.append((f"{card['question']}:", f"{card['status'].upper()}{note}. {card['statement']}"))
    return lines


def verdict_markdown(found, headline):
    """The verdicts as Markdown, for review in a pull request: of the study that leads the page, then of single runs.
    headline: as for `verdict_lines`."""
    lines = ["# Verdict", ""]
    if headline:
        for question, answer in verdict_lines(found, headline):
            lines += [f"**{escaped(question)}** {escaped(answer)}", ""]
        lines += ["## Single runs kept in reports/runs", "", "The study above decides, not these runs.", ""]
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
