"""Answers to parts of clips in a study: do captions change with the number of frames, or with the half?"""

from statistics import fmean

from pipeline_steps.report.study_tables import CAPTION_PARTS


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
