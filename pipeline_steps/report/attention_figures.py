"""Figures of attention besides the single clips of reports/heatmaps: its contact sheet, attention over the frames, and
the heatmaps that are kept with studies.
"""

import io

import matplotlib
from PIL import Image

from pipeline_steps.common.errors import UserError
from pipeline_steps.common.modes import GAZE_MODES
from pipeline_steps.report.figures import COLOURS, MARKERS, WIDTH

KEYS = ("clips", "rule", "over_frames", "contact_sheet")
QUALITY = 60  # of the sheet as WebP: a seventh of the size of the PNG, with legible text


def checked(index):
    """The index of reports/heatmaps, or None. UserError if it lacks a key of KEYS."""
    absent = [key for key in KEYS if key not in (index or dict.fromkeys(KEYS))]
    if absent:
        raise UserError(
            f"reports/heatmaps/index.json has no {', '.join(absent)}: it was written by another version. Run "
            "`dvc repro heatmaps`."
        )
    return index


def over_frames(index):
    """(draw, width, height): entropy and largest weight of the attention per frame and mode, or None without clips."""
    curves = (checked(index) or {"over_frames": {}})["over_frames"]
    if not curves:
        return None

    def draw(figure, ink):
        pair = figure.subplots(2, 1, sharex=True)
        for mode in (mode for mode in GAZE_MODES if mode in curves):
            style = {"marker": MARKERS[mode], "color": COLOURS[mode], "markersize": 5, "linewidth": 1.4}
            for axes, name in zip(pair, ("entropy", "peak"), strict=True):
                axes.plot(range(len(curves[mode][name])), curves[mode][name], label=mode, **style)
        pair[0].set_ylabel("entropy (1: uniform)")
        pair[1].set_ylabel("largest weight")
        pair[1].set_xlabel("frame")
        pair[1].yaxis.set_major_formatter(matplotlib.ticker.PercentFormatter(1))
        pair[1].xaxis.set_major_locator(matplotlib.ticker.MaxNLocator(integer=True))
        for axes in pair:
            axes.set_ylim(-0.02, 1.02)
            axes.grid(linewidth=0.6)
            axes.set_axisbelow(True)
        figure.legend(*pair[0].get_legend_handles_labels(), loc="outside upper center", ncols=3)

    return draw, WIDTH, 4.6


def contact_sheet(folder, index):
    """{content: WebP, width, height, caption, path} of the contact sheet, or None if none was drawn."""
    sheet = (checked(index) or {"contact_sheet": None})["contact_sheet"]
    if sheet is None:
        return None
    path = folder / sheet["picture"]
    if not path.exists():
        raise UserError(f"{folder / 'index.json'} names {path}, which does not exist. Run `dvc repro heatmaps`.")
    caption = (
        f"{len(sheet['clips'])} clips. Selection rule: {sheet['rule']}. Overlay: attention in the {sheet['mode']} "
        "mode. White box: the target. Right: every scored token is the most likely one. Attention should be on the "
        "target in the best clips; in the worst it is often beside it."
    )
    return embedded(path) | {"caption": caption, "picture": sheet["picture"]}


def kept(study):
    """{content: WebP, width, height, caption, alt, picture} of a study's heatmap.png, or None if it has none."""
    if study.heatmap is None:
        return None
    caption = (
        f"A held-out clip of a run of study {study.name}: its frames, and over them the attention of the static and of "
        "the planned queries. White box: the target."
    )
    alt = f"Frames of a clip of study {study.name} with the attention over them"
    return embedded(study.heatmap) | {"caption": caption, "alt": alt, "picture": study.heatmap.name}


def embedded(path, quality=QUALITY):
    """{content: WebP, width, height} of a picture. UserError if it cannot be read."""
    buffer = io.BytesIO()
    try:
        with Image.open(path) as picture:
            picture.save(buffer, "WEBP", quality=quality)
            size = {"width": picture.width, "height": picture.height}
    except OSError as error:
        raise UserError(f"{path} is no picture ({error}). Remove it, or write it again.") from None
    return {"content": buffer.getvalue(), **size}
