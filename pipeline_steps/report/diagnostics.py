"""Tables of the automated checks and of the attention by layer. The note of an empty table says what was not
measured."""

from statistics import fmean

from pipeline_steps.report.cells import signed_value
from pipeline_steps.report.tables import MODE_NAMES, MODES, Table, count, share

VERDICTS = ("suspicious", "ok", "not applicable")  # most urgent first


def checks(result):
    """The automated diagnostics, suspicious ones first."""
    columns = [
        "check",
        "verdict",
        "value",
        "expected",
        "meaning of the value",
        "likely cause if out of bounds, or why not applicable",
    ]
    table = Table("checks", "Automated checks", columns, [])
    if result.diagnostics is None:
        table.note = "Not measured: the evaluation ran without diagnostic clips."
        return table
    found = sorted(result.diagnostics.checks.items(), key=lambda entry: VERDICTS.index(entry[1].verdict))
    table.rows = [
        [name.replace("_", " "), check.verdict, signed_value(check.value), bounds(check), check.meaning, check.reason]
        for name, check in found
    ]
    counts = [sum(check.verdict == verdict for _, check in found) for verdict in VERDICTS]
    table.note = (
        f"{counts[0]} suspicious, {counts[1]} ok, {counts[2]} not applicable. Measured on "
        f"{result.diagnostics.num_items} items with {result.diagnostics.num_frames} frames. A suspicious value is a "
        "reason to investigate, not a proof; the last column names the likely cause."
    )
    return table


def attention(result):
    """A row per mode and vision layer: entropy and largest weight of its attention heads."""
    columns = ["mode", "layer", "entropy, mean", "lowest head", "highest head", "largest weight, mean", "sharpest head"]
    entropy = result.diagnostics.entropy if result.diagnostics else {}
    rows = []
    for mode in (mode for mode in MODES if mode in entropy):
        for layer, (heads, peaks) in enumerate(zip(entropy[mode], result.diagnostics.peak[mode], strict=True)):
            cells = map(share, (fmean(heads), min(heads), max(heads), fmean(peaks), max(peaks)))
            rows.append([MODE_NAMES[mode], count(layer), *cells])
    note = (
        "Attention of the queries to the patches. Entropy: relative to uniform attention; 100% means that a head "
        "selects nothing. Largest weight: of one patch, mean over frames. The gaze tables use the last layer; its "
        "heads should be sharp, and differ if they specialise."
        if rows
        else "Not measured: the evaluation ran without diagnostic clips, or the network has no queries."
    )
    return Table("attention_layers", "Attention by layer", columns, rows, note)


def bounds(check):
    """The allowed values of a `Check` as text."""
    if check.low is not None and check.high is not None:
        return f"{check.low:g} to {check.high:g}"
    if check.low is not None:
        return f"≥ {check.low:g}"
    return "–" if check.high is None else f"≤ {check.high:g}"
