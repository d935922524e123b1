"""Compute: the tables of passes, answers and budgets, and the figure that compares one token per frame with several."""

import numpy as np

from pipeline_steps.common.modes import GAZE_MODES
from pipeline_steps.report.tables import Table, count, number, ordered_arms

SCALES = ("this network", "135M", "360M", "1.7B")  # smallest first
COLOURS = dict(zip(SCALES, ("#8b95a3", "#2f80ed", "#12a594", "#d97706"), strict=True))
MARKERS = dict(zip(SCALES, "sovD", strict=True))


def tables(result):
    """All tables of this module, of a `FlopsResult`."""
    return [crossovers(result), passes(result), answers(result), budgets(result)]


def crossovers(result):
    """From how many frames one token per frame is cheaper, by language model and length of the question."""
    names = [name for name in SCALES if name in result.crossovers]
    rows = [
        [name, use, *(crossover(getattr(entry, use)) for entry in result.crossovers[name])]
        for name in names
        for use in ("inference", "training")
    ]
    entries, several = result.crossovers[names[0]], multi_tokens(result)
    columns = ["language model", "FLOPs of", *(f"{entry.num_tokens_before:,} text tokens" for entry in entries)]
    after = entries[0].num_text_tokens - entries[0].num_tokens_before
    note = (
        f"Smallest number of frames from which one planned token per frame costs fewer FLOPs than {several} pooled "
        f"ones, by text tokens before the frames (the question); {after} more follow the frames (the answer). Never: "
        f"at no number of frames up to {entries[0].max_num_frames}. At inference, a scored pass in autoregressive "
        f"mode, one token per frame reads the question twice and {several} tokens once; in training, and for a "
        "generated answer, both read it once."
    )
    return Table("crossovers", "Frames from which one token per frame is cheaper", columns, rows, note)


def crossover(frames):
    """A cell; a number of frames that is not reached sorts last."""
    return ("never", None) if frames is None else count(frames)


def passes(result):
    """Language-model passes and backward pass of every mode."""
    rows = []
    for mode in GAZE_MODES:
        entry = result.modes[mode]
        *planning, reading = entry.language_passes
        cells = [number(value / 1e6, 2) for value in (sum(planning), reading, entry.total, entry.backward)]
        positions = count(round(sum(entry.language_positions[:-1]))), count(round(entry.language_positions[-1]))
        rows.append([mode, number(entry.num_query_passes, 0), positions[0], positions[1], *cells])
    columns = [
        "mode",
        "query passes",
        "planning positions",
        "positions read",
        "planning",
        "reading",
        "forward",
        "backward",
    ]
    note = (
        "This network, mean sample, MFLOP. Planning: passes up to the last visual token, or frame by frame. Reading: "
        "the pass over the whole sequence, in fine mode without the text before the frames, which planning has read. "
        "Backward: with every weight trained in this mode."
    )
    return Table("flops_passes", "Passes of the language model and backward", columns, rows, note, strong=[6])


def answers(result):
    """FLOPs and memory of an answer, and activation memory of a training sample, by arm."""
    rows = []
    for name in ordered_arms(result):
        entry, memory = result.answers[name], result.memory[name]
        cells = [number(value / 1e6, 2) for value in (entry.prefill, entry.per_decoded_token, entry.total)]
        sizes = (entry.key_value_bytes, entry.vision_bytes, sum(memory.model_dump().values()))
        rows.append([name.replace("_", " "), count(entry.num_prompt_tokens), *cells, *(kib(size) for size in sizes)])
    num_tokens = next(iter(result.answers.values())).num_answer_tokens
    columns = ["arm", "prompt", "prefill", "per token", f"{num_tokens} tokens", "key-value cache", "vision cache"]
    note = (
        "Autoregressive mode at the mean lengths. Prefill: MFLOP until the first token. Per token: mean MFLOP of "
        "later tokens. Key-value cache: of the language model at the last token. Vision cache: keys and values that "
        "the queries attend to. Activations: estimate for the backward pass of one training sample, with fused "
        f"attention and without checkpointing. {result.assumptions['bytes_per_number']} bytes per number."
    )
    return Table("answers", "Cost and memory of an answer", [*columns, "activations"], rows, note, strong=[4])


def kib(size):
    return (f"{size / 1024:,.0f} KiB", size)


def budgets(result):
    """How many training samples each compute budget pays for."""
    rows = [
        [
            (f"{row.budget:.1e}", row.budget),
            row.scale,
            row.arm.replace("_", " "),
            number(row.flops_per_sample / 1e9, 1),
            count(row.num_samples),
        ]
        for row in result.budgets
    ]
    lengths = result.assumptions["budget_sample"]
    columns = ["budget, FLOP", "scale", "arm", "GFLOP per sample", "samples"]
    note = (
        f"Equal training compute (iso-FLOP). Backbones: SmolLM2 and DINOv2-small. A sample has {lengths['num_frames']} "
        f"frames and {lengths['num_text_tokens']} text tokens, {lengths['num_labels']} of them with a loss. For other "
        "lengths run `python -m pipeline_steps.flops --budget ... --frames ...`."
    )
    return Table("budgets", "Training samples per compute budget", columns, rows, note, strong=[4])


def statements(result):
    """One line per language model: where one token per frame saves compute, and where the vision encoder dominates."""
    lines = []
    for name in (name for name in SCALES if name in result.frontier):
        entry = result.frontier[name]
        most = next((n for n, part in zip(entry.num_frames, entry.vision_share, strict=True) if part > 0.5), None)
        last = entry.num_frames[-1]
        use, training = (frames_text(found, last) for found in (entry.cheaper_from, entry.cheaper_training_from))
        saved = 1 - entry.foveated[-1] / entry.multi_token[-1]
        share = f"more than half of the cost from {most}" if most else f"less than half of it up to {last}"
        lines.append(
            f"{name[0].upper()}{name[1:]}: one token per frame costs less than {multi_tokens(result)} {use} at "
            f"inference and {training} in training. At {last} frames it costs {abs(saved):.0%} "
            f"{'less' if saved > 0 else 'more'} at inference. The vision encoder takes {share} "
            f"frames{' on' if most else ''}."
        )
    return lines


def multi_tokens(result):
    """Tokens per frame of the multi-token network."""
    return next(name.split("_")[1] for name in result.arms if name.startswith("B1_"))


def frames_text(count_, last):
    if count_ is None:
        return f"at no number of frames up to {last}"
    return f"from {count_} frame{'s' * (count_ > 1)} on"


def frontier(result):
    """(draw, width, height): cost of one token relative to several over the number of frames, by language model, and
    the vision encoder's share."""
    names, several = [name for name in SCALES if name in result.frontier], multi_tokens(result)

    def draw(figure, ink):
        panels = figure.subplots(3, 1, sharex=True)
        for name in names:
            entry = result.frontier[name]
            use, training = (
                np.array(getattr(entry, f"foveated{what}")) / np.array(getattr(entry, f"multi_token{what}"))
                for what in ("", "_training")
            )
            for axes, values in zip(panels, (use, training, entry.vision_share), strict=True):
                style = {"color": COLOURS[name], "marker": MARKERS[name], "markersize": 4, "linewidth": 1.4}
                axes.plot(entry.num_frames, values, label=name, **style)
        frames = result.frontier[names[0]].num_frames
        for axes, border, text in zip(
            panels,
            (1.0, 1.0, 0.5),
            (
                f"cost of one token / {several}, inference",
                f"cost of one token / {several}, training",
                "vision encoder's share",
            ),
            strict=True,
        ):
            axes.axhline(border, color=ink, linewidth=0.8, linestyle=":")
            axes.set_title(text, fontsize=10, loc="left")
            axes.set_ylim(bottom=0)
            axes.grid(linewidth=0.6)
            axes.set_axisbelow(True)
        panels[-1].set_xscale("log", base=2)
        panels[-1].set_xticks([n for n in frames if n & (n - 1) == 0], [str(n) for n in frames if n & (n - 1) == 0])
        panels[-1].set_xlabel("frames")
        figure.legend(*panels[0].get_legend_handles_labels(), loc="outside upper center", ncols=4)

    return draw, 6.2, 7.0
