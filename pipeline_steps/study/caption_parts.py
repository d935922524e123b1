"""Answers to parts of clips in a study: do captions change with the number of frames, or with the half?"""

from statistics import fmean

from pipeline_steps.report.captions import PART_NAMES

CAPTION_PARTS = "caption_parts_"  # columns caption_parts_<part>/<part, reference or other_clip>
OTHERS = {"reference": "reference", "other_clip": "another clip's answer"}
NOTE = (
    "Share of words that the answers have in common (autoregressive mode), clips of 16 frames or more: mean (lowest to "
    "highest run). Near 100 %, the answer does not use the frames that differ; read it against another clip's answer."
)


def columns_of(found):
    """Columns of runs.csv from {task: `CaptionParts`} or None: word overlaps, mean over tasks with long clips."""
    by_name = {}
    for parts in (found or {}).values():
        if parts.reason is None:
            own = {name.replace(" / ", "/"): pair.overlap for name, pair in parts.pairs.items()}
            own |= {f"{part}/reference": value for part, value in parts.reference.items()}
            own |= {} if parts.other_clip is None else {"frames_16/other_clip": parts.other_clip}
            for name, value in own.items():
                by_name.setdefault(f"{CAPTION_PARTS}{name}", []).append(value)
    return {name: fmean(values) for name, values in by_name.items()}


def rows_of(runs):
    """[(answers for, compared with, overlaps of the runs)] of the runs of an arm."""
    names = PART_NAMES | OTHERS
    found = {name.removeprefix(CAPTION_PARTS): runs[name].dropna() for name in runs if name.startswith(CAPTION_PARTS)}
    return [(*map(names.get, name.split("/")), values.tolist()) for name, values in found.items() if len(values)]
