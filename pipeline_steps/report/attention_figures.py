"""What the page shows of reports/heatmaps beside the single clips: the sheet of many clips, and the attention over the
frames."""

import io

import matplotlib
from PIL import Image

from pipeline_steps.common.errors import UserError
from pipeline_steps.common.modes import GAZE_MODES
from pipeline_steps.report.figures import COLOURS, MARKERS, WIDTH

KEYS = ("clips", "rule", "over_frames", "contact_sheet")
QUALITY = 60  # of the sheet as WebP: a seventh of the PNG, its text still sharp


def checked(index):
    """The index of reports/heatmaps, or None where there is none. UserError for one of another version."""
    absent = [key for key in KEYS if key not in (index or dict.fromkeys(KEYS))]
    if absent:
        raise UserError(
            f"reports/heatmaps/index.json has no {', '.join(absent)}: it is of another version: make it again with "
            "`dvc repro heatmaps`"
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
        pair[0].set_ylabel("entropy (1: even)")
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
    """{content: WebP, width, height, caption, path} of the sheet of many clips, or None where none was drawn."""
    sheet = (checked(index) or {"contact_sheet": None})["contact_sheet"]
    if sheet is None:
        return None
    path = folder / sheet["picture"]
    if not path.exists():
        raise UserError(f"{folder / 'index.json'} names {path}, which does not exist: run `dvc repro heatmaps`")
    buffer = io.BytesIO()
    with Image.open(path) as picture:
        picture.save(buffer, "WEBP", quality=QUALITY)
        size = {"width": picture.width, "height": picture.height}
    caption = (
        f"{len(sheet['clips'])} clips chosen by rule: {sheet['rule']}. Over the frames: attention in the "
        f"{sheet['mode']} mode; white box: the target; right: every scored token was the most likely "
        "one. Look for bright patches on the targets among the best clips, and beside them among the worst."
    )
    return {"content": buffer.getvalue(), "caption": caption, "picture": sheet["picture"], **size}
