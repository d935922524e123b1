"""Table of the five preliminary diagnostics, beside what the predecessor found."""

from pipeline_steps.report.tables import MISSING, Table

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


def preliminary(result):
    """A row per measure of the five diagnostics; of one that was not measured, a row with the reason."""
    found = result.preliminary
    columns = ["diagnostic", "measure", "value", "predecessor"]
    table = Table("preliminary", "Preliminary diagnostics", columns, [])
    if found is None:
        table.note = "Not measured: the evaluation ran without diagnostic clips."
        return table
    for name, make in zip(NAMES, (previous_latent, similarity, temperature, projection, sensitivity), strict=True):
        value = getattr(found, name)
        cells = make(value) if value else {found.not_measured[name]: MISSING}
        table.rows += [[NAMES[name], key, cell, PREDECESSOR.get(key, MISSING)] for key, cell in cells.items()]
    table.note = " ".join(NOTE.format(found.num_items).split())
    return table


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
