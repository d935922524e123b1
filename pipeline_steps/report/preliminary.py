"""Table of the five preliminary diagnostics, beside what the predecessor found."""

from pipeline_steps.report.cells import optional
from pipeline_steps.report.tables import MISSING, Table, number

NAMES = {
    "previous_latent": "1 previous latent",
    "feature_similarity": "2 feature similarity",
    "temperature": "3 attention temperature",
    "query_projection": "4 query projection",
    "head_sensitivity": "5 head sensitivity",
}
PREDECESSOR = {  # its knowledge base, 6 January 2026; the maximum of the entropy is log(325)
    ("feature_similarity", "static / planned"): number(0.9875),
    ("feature_similarity", "static / random"): number(0.9899),
    ("temperature", 0.1): ("entropy 86%, largest weight 4.6%", None),
    ("temperature", 1.0): ("entropy 100%, largest weight 0.4%", None),
    ("query_projection", "before"): number(-0.015),
    ("head_sensitivity", "ratio"): number(4.7, 1),
}


def preliminary(result):
    """A row per measure of the five diagnostics; of one that was not measured, a row with the reason."""
    found = result.preliminary
    columns = ["diagnostic", "measure", "value", "predecessor"]
    table = Table("preliminary", "Preliminary diagnostics", columns, [])
    if found is None:
        table.note = "Not measured: the evaluation ran without diagnostic clips."
        return table
    makers = (previous_latent, feature_similarity, temperature, query_projection, head_sensitivity)
    for name, make in zip(NAMES, makers, strict=True):
        value = getattr(found, name)
        rows = make(value) if value else [(found.not_measured[name], MISSING, None)]
        table.rows += [
            [NAMES[name], measure, cell, PREDECESSOR.get((name, key), MISSING)] for measure, cell, key in rows
        ]
    table.note = (
        f"Measured on {found.num_items} clips. 1: next-frame loss without an input / with it; 1 means that the head "
        "does not use the input. 2: visual tokens of the same frames with two queries; a cosine near 1 means that the query "
        "changes nothing (distance: relative to the mean norm). 3: autoregressive mode with the trained temperature "
        "times a factor, without training; entropy relative to its maximum, last layer. 4: planned and static queries; "
        "a cosine that rises means that the projection makes queries alike. 5: relative change of the prediction / of "
        "the input; a ratio below 1 means that the head copies the previous latent. The predecessor measured on random "
        "pixels, 2 with its first query in place of a planned one."
    )
    return table


def previous_latent(value):
    losses = {
        "loss without the previous latent / loss": value.no_previous,
        "loss without the state / loss": value.no_state,
        "loss with another clip's state / loss": value.shuffled_state,
    }
    return [(name, MISSING if loss is None else number(loss / value.loss), None) for name, loss in losses.items()]


def feature_similarity(value):
    rows = [(f"cosine, {pair} query", number(found), pair) for pair, found in value.cosine.items()]
    return rows + [(f"distance, {pair} query", number(found), None) for pair, found in value.distance.items()]


def temperature(scores):
    def cell(score):
        text = f"loss {score.loss:.3f}, accuracy {score.accuracy:.1%}, entropy {score.entropy:.1%}"
        return (f"{text}, largest weight {score.peak:.1%}, strongest tenth {score.top_tenth:.1%}", score.loss)

    return [(f"temperature × {score.factor:g}", cell(score), score.factor) for score in scores]


def query_projection(value):
    places = {"before": value.before, "after": value.after}
    return [
        (f"cosine, planned / static, {place} the projection", number(found), place) for place, found in places.items()
    ]


def head_sensitivity(value):
    ratio = None if not value.previous else value.state / value.previous
    return [
        ("change by the state", number(value.state), None),
        ("change by the previous latent", optional(value.previous), None),
        ("state / previous latent", optional(ratio, 1), "ratio"),
    ]
