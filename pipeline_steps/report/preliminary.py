"""Table of the five preliminary diagnostics, beside what the predecessor found."""

from statistics import fmean

from pipeline_steps.common.study_results import VIDEOS
from pipeline_steps.report.tables import MISSING, Table

STUDY, ARM = "next_frame", "latent"
NAMES = {
    "previous_latent": "1 previous latent",
    "feature_similarity": "2 feature similarity",
    "temperature": "3 attention temperature",
    "query_projection": "4 query projection",
    "head_sensitivity": "5 head sensitivity",
}
NOTE = """2 to 4 were measured on {} clips, 1 and 5 on those of the next-frame scores. 1: next-frame loss without an
input / with it; 1 means that the head does not use the input. 2: visual tokens of the same frames with two
queries; a cosine near 1 means that the query changes nothing (distance: relative to the mean norm). 3:
autoregressive mode with the trained temperature times a factor, without training; entropy relative to its
maximum, last layer. 4: planned and static queries; a cosine that rises means that the projection makes
queries alike. 5: relative change of the prediction / of the input; a ratio below 1 means that the head
copies the previous latent. The predecessor measured on random pixels, 2 and 4 with its first query in place
of a planned one."""


def number(value, digits=3):
    return (f"{value:.{digits}f}".replace("-", "−"), value)


PREDECESSOR = {  # its knowledge base, 6 January 2026; the maximum of the entropy is log(325)
    "cosine static / planned": number(0.9875),
    "cosine static / random": number(0.9899),
    "temperature × 0.1": ("entropy 86%, largest weight 4.6%", None),
    "temperature × 1": ("entropy 100%, largest weight 0.4%", None),
    "cosine before": number(-0.015),
    "state / previous latent": number(4.7, 1),
}


def preliminary(result, kept=()):
    """A row per measure of the five diagnostics; of one that was not measured, a row with the reason. Where the run
    was trained without the next-frame objective, 1 and 5 are those of the study next_frame among `kept` (a list of
    `studies.Study`)."""
    found = result.preliminary
    columns = ["diagnostic", "measure", "value", "predecessor"]
    table = Table("preliminary", "Preliminary diagnostics", columns, [])
    if found is None:
        table.note = "Not measured: the evaluation ran without diagnostic clips."
        return table
    lent, num_runs = of_study(kept)
    for name, make in zip(NAMES, (previous_latent, similarity, temperature, projection, sensitivity), strict=True):
        value, label = getattr(found, name), NAMES[name]
        if not value and lent.get(name):
            value, label = lent[name], f"{label} ({STUDY}, {num_runs} run{'s' * (num_runs > 1)})"
        cells = make(value) if value else {found.not_measured[name]: MISSING}
        table.rows += [[label, key, cell, PREDECESSOR.get(key, MISSING)] for key, cell in cells.items()]
    table.note = " ".join(NOTE.format(found.num_items).split())
    return table


def of_study(kept):
    """({diagnostic: its values}, number of runs) of the arm in STUDY that is trained as the predecessor's first system,
    means of its runs; ({}, 0) without any."""
    arms = (arm for study in kept if study.name == STUDY for arm in study.summary.arms)
    arm = next((arm for arm in arms if arm.arm == ARM and VIDEOS in arm.next_frame), None)
    if arm is None:
        return {}, 0
    moving = arm.next_frame[VIDEOS]
    ratios = {name: moving.relative(name) for name in ("no_previous", "no_state", "shuffled_state")}
    means = {name: fmean(values) for name in ("state", "previous") if (values := moving.known(f"{name}_sensitivity"))}
    losses = {"loss": 1.0} | {name: ratio for name, ratio in ratios.items() if ratio is not None}
    return {"previous_latent": losses, "head_sensitivity": means if "state" in means else None}, len(arm.seeds)


def previous_latent(losses):
    names = {
        "no_previous": "loss without the previous latent / loss",
        "no_state": "loss without the state / loss",
        "shuffled_state": "loss with another clip's state / loss",
    }
    return {text: number(losses[name] / losses["loss"]) if name in losses else MISSING for name, text in names.items()}


def similarity(values):
    return {name: number(value) for name, value in values.items()}


def temperature(scores):
    def cell(score):
        text = f"loss {score.loss:.3f}, accuracy {score.accuracy:.1%}, entropy {score.entropy:.1%}"
        return (f"{text}, largest weight {score.peak:.1%}, strongest tenth {score.top_tenth:.1%}", score.loss)

    return {f"temperature × {score.factor:g}": cell(score) for score in scores}


def projection(values):
    return {f"cosine {place}": number(values[place]) for place in ("before", "after")}


def sensitivity(values):
    state, previous = values["state"], values.get("previous")
    return {
        "change by the state": number(state),
        "change by the previous latent": MISSING if previous is None else number(previous),
        "state / previous latent": number(state / previous, 1) if previous else MISSING,
    }
